use std::os::unix::net::UnixDatagram;
use std::process::Command;
use std::thread;

use vm_memory::{Bytes, GuestAddress};

use super::super::super::queue::QueueState;
use super::super::super::testing::{Random, Rings, ram};
use super::super::super::{Device, Progress, Queue, Ram, feature};
use super::super::bit;
use super::*;
use crate::rate_limiter::{RateLimiter, TokenBucket};
use crate::state::state_round_trip;
use crate::sys::tap::Tap;
use crate::sys::testing::{allocator_calls, enter_network_namespace, packets};

const BASE: u64 = 0x10000;
const DATA: u64 = 0x40000;
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// Descriptors, each with a buffer of its own.
const SLOTS: u16 = 64;
const SLOT_SIZE: u64 = 2048;

/// A device on one end of a cable.
fn device(cable: &UnixDatagram, features: u64, state: &NetState) -> Net {
    let tap = Tap::fake(cable.try_clone().unwrap());
    let bucket = || TokenBucket::new(1 << 40, 1 << 20, 1000);
    let limiter = || RateLimiter::new(bucket(), None);
    let mut net = Net::new(tap, Some(MAC), None, limiter(), limiter(), state, 0).unwrap();
    net.activate(features).unwrap();
    net
}

fn save(net: &Net) -> NetState {
    let mut state = NetState::buffer();
    let before = allocator_calls();
    net.save_into(&mut state);
    assert_eq!(allocator_calls(), before);
    state
}

fn again<T: serde::Serialize + serde::de::DeserializeOwned>(state: &T) -> T {
    serde_json::from_str(&serde_json::to_string(state).unwrap()).unwrap()
}

/// A guest that offers receive buffers and checks what comes back in them.
struct Guest<'a> {
    ram: &'a Ram,
    rings: Rings<'a>,
    /// Length of the buffer that each descriptor has offered.
    offered: [Option<u32>; SLOTS as usize],
    /// The number of the next frame.
    expected: u32,
    lost: u64,
}

impl<'a> Guest<'a> {
    fn new(ram: &'a Ram) -> Self {
        Guest {
            ram,
            rings: Rings::new(ram, BASE, 256),
            offered: [None; SLOTS as usize],
            expected: 0,
            lost: 0,
        }
    }

    /// Offers a buffer, one in 16 of no use to the device; whether there was one left.
    fn offer(&mut self, random: &mut Random) -> bool {
        let Some(slot) = self.offered.iter().position(Option::is_none) else {
            return false;
        };
        let len = if random.one_in(16) {
            HEADER
        } else {
            1600 + random.below(400) as u32
        };
        self.offered[slot] = Some(len);
        let at = DATA + slot as u64 * SLOT_SIZE;
        self.rings.offer_chain(slot as u16, &[(at, len, true)]);
        true
    }

    fn has_offered(&self) -> bool {
        self.offered.iter().any(Option::is_some)
    }

    /// Takes all that the device has returned.
    fn take(&mut self) {
        while let Some((slot, mut frame)) = self.take_buffer() {
            if frame.is_empty() {
                continue;
            }
            let at = DATA + u64::from(slot) * SLOT_SIZE + u64::from(super::super::NUM_BUFFERS);
            let buffers: u16 = self.ram.read_obj(GuestAddress(at)).unwrap();
            for _ in 1..buffers {
                frame.extend(self.take_buffer().expect("a frame comes all at once").1);
            }
            let payload = &frame[HEADER as usize..];
            let number = u32::from_le_bytes(payload[..4].try_into().unwrap());
            assert!(number >= self.expected, "frame {number} comes twice");
            self.lost += u64::from(number - self.expected);
            self.expected = number + 1;
            assert_eq!(payload, payload_of(number, payload.len()));
        }
    }

    fn take_buffer(&mut self) -> Option<(u32, Vec<u8>)> {
        let (slot, len) = self.rings.take()?;
        let offered = self.offered[slot as usize].take();
        let offered = offered.expect("a buffer is returned twice");
        assert_eq!(len == 0, offered == HEADER);
        let mut bytes = vec![0; len as usize];
        let at = GuestAddress(DATA + u64::from(slot) * SLOT_SIZE);
        self.ram.read_slice(&mut bytes, at).unwrap();
        Some((slot, bytes))
    }
}

fn payload_of(number: u32, len: usize) -> Vec<u8> {
    let pattern = (0..len).map(|i| (i as u32 ^ number) as u8);
    let mut payload: Vec<u8> = pattern.collect();
    payload[..4].copy_from_slice(&number.to_le_bytes());
    payload
}

/// Sends frame `number`, unless the cable is full.
fn send(cable: &UnixDatagram, number: u32, len: usize) -> bool {
    let mut frame = vec![0; HEADER as usize];
    frame.extend(payload_of(number, len));
    cable.send(&frame).is_ok()
}

/// Counts that devices had when they were saved.
#[derive(Default)]
struct Sum {
    received: u64,
    dropped: u64,
}

impl Sum {
    fn add(&mut self, net: &Net) {
        self.received += net.counters.rx_frames.get();
        self.dropped += net.counters.rx_dropped.get();
    }
}

#[test]
fn frames_when_devices_are_made_anew_in_between_come_once_and_in_order() {
    let mut random = Random::printed();
    for (features, longest) in [
        (bit::MRG_RXBUF | bit::GUEST_TSO4, 9000),
        (bit::MRG_RXBUF, 1500),
        (0, 1500),
    ] {
        let features = feature::COMMON | features;
        let (near, far) = UnixDatagram::pair().unwrap();
        far.set_nonblocking(true).unwrap();
        let ram = ram();
        let mut guest = Guest::new(&ram);
        let fresh = QueueState::fresh(guest.rings.layout());
        let mut queue = Queue::new(&fresh, 256, features, &ram).unwrap();
        let mut net = device(&near, features, &NetState::default());
        let (mut sum, mut sent, mut unfinished) = (Sum::default(), 0, 0);
        for _ in 0..4000 {
            match random.below(8) {
                0 | 1 => {
                    let len = 60 + random.below(longest) as usize;
                    sent += u32::from(send(&far, sent, len));
                }
                2 | 3 => {
                    guest.offer(&mut random);
                }
                4 if random.one_in(4) => {
                    let state = save(&net);
                    unfinished += usize::from(state.unfinished.len > 0);
                    sum.add(&net);
                    net = device(&near, features, &again(&state));
                    assert_eq!(save(&net), state);
                    queue = Queue::new(&again(&queue.save()), 256, features, &ram).unwrap();
                    net.was_restored();
                    far.recv(&mut [0; 100]).expect("the announcement");
                }
                5 => guest.take(),
                _ => {
                    net.backend(super::super::source::LINK);
                    net.process(0, &mut queue, &ram).unwrap();
                }
            }
        }
        let mut finish = |guest: &mut Guest<'_>| {
            net.backend(super::super::source::LINK);
            while net.process(0, &mut queue, &ram).unwrap() == Progress::More {}
            guest.take();
        };
        // What waits for buffers gets them, and every buffer comes back once there are frames for all.
        for _ in 0..4 {
            while guest.offer(&mut random) {}
            finish(&mut guest);
        }
        for _ in 0..2 * SLOTS {
            if guest.has_offered() {
                sent += u32::from(send(&far, sent, 60));
                finish(&mut guest);
            }
        }
        assert!(!guest.has_offered(), "a buffer is kept");
        sum.add(&net);
        assert_eq!(u64::from(guest.expected) - guest.lost, sum.received);
        assert_eq!(sum.received + sum.dropped, u64::from(sent));
        assert!(sum.received > 300, "{} received", sum.received);
        assert_eq!(unfinished > 0, longest > 1500, "{unfinished} unfinished");
    }
}

#[test]
fn device_when_saved_with_a_frame_unfinished_is_the_same_when_made_anew() {
    let features = feature::COMMON | bit::MRG_RXBUF | bit::GUEST_TSO4;
    let (near, far) = UnixDatagram::pair().unwrap();
    let ram = ram();
    let rings = Rings::new(&ram, BASE, 256);
    let fresh = QueueState::fresh(rings.layout());
    let mut queue = Queue::new(&fresh, 256, features, &ram).unwrap();
    let mut net = device(&near, features, &NetState::default());
    state_round_trip!(net, |state: NetState| device(&near, features, &state), save);
    rings.offer_chain(7, &[(DATA, 1000, true)]);
    rings.offer_chain(3, &[(DATA + 2000, 500, true)]);
    assert!(send(&far, 0, 5000));
    assert_eq!(net.process(0, &mut queue, &ram), Ok(Progress::More));
    net.rx_throttle.charge(12345);
    let make = |state: NetState| device(&near, features, &state);
    state_round_trip!(net, make, save);
    let state = save(&net);
    assert_eq!(state.held, [7, 3]);
    assert_eq!(
        (state.unfinished.len, state.unfinished.in_guest),
        (5012, 1500)
    );
    assert_eq!(state.unfinished.rest, payload_of(0, 5000)[1488..]);
    assert_eq!(state.rx_limiter.bandwidth.burst_used, 12345);
    // Also before the buffers have been walked again, and once the driver has gone.
    let mut made = make(state);
    made.reset();
    assert!(save(&made).held.is_empty());
    assert_eq!(save(&made).unfinished, UnfinishedState::default());
}

#[test]
fn state_when_no_device_could_have_saved_it_is_refused() {
    let unfinished = |len, in_guest, rest: usize| NetState {
        unfinished: UnfinishedState {
            len,
            in_guest,
            rest: vec![0; rest],
        },
        ..NetState::default()
    };
    for (state, ok) in [
        (NetState::default(), true),
        (unfinished(5000, 4000, 1000), true),
        (unfinished(FRAME_MAX, 0, FRAME_MAX as usize), true),
        (unfinished(FRAME_MAX + 1, 0, FRAME_MAX as usize + 1), false),
        (unfinished(5000, 4000, 999), false),
        (unfinished(5000, 5000, 0), false),
        (unfinished(5000, 5001, 0), false),
        (unfinished(HEADER, 0, HEADER as usize), false),
        (unfinished(0, 0, 1), false),
        (unfinished(0, 1, 0), false),
        (unfinished(u32::MAX, u32::MAX, 0), false),
        (unfinished(u32::MAX, 0, 0), false),
    ] {
        assert_eq!(state.check().is_ok(), ok, "{:?}", state.unfinished);
    }
    for (count, ok) in [(256, true), (257, false)] {
        let state = NetState {
            held: vec![0; count],
            ..NetState::default()
        };
        assert_eq!(state.check().is_ok(), ok, "{count}");
    }
}

#[test]
fn buffers_when_the_guest_has_spoilt_them_are_returned_or_break_the_ring() {
    let features = feature::COMMON | bit::MRG_RXBUF;
    let (near, far) = UnixDatagram::pair().unwrap();
    let ram = ram();
    let mut rings = Rings::new(&ram, BASE, 16);
    let fresh = QueueState::fresh(rings.layout());
    let mut queue = Queue::new(&fresh, 16, features, &ram).unwrap();
    rings.describe(1, DATA, 0, 2, 0);
    rings.describe(2, DATA, 2000, 2, 0);
    rings.describe(3, 1 << 20, 2000, 2, 0);
    let held = |held: &[u16]| NetState {
        held: held.to_vec(),
        ..NetState::default()
    };
    let mut net = device(&near, features, &held(&[1, 2, 3]));
    assert!(send(&far, 0, 100));
    assert_eq!(net.process(0, &mut queue, &ram), Ok(Progress::More));
    let used: Vec<_> = std::iter::from_fn(|| rings.take()).collect();
    assert_eq!(used, [(1, 0), (3, 0), (2, 112)]);
    assert_eq!(net.counters.rx_invalid.get(), 2);
    let mut net = device(&near, features, &held(&[16]));
    let broken = net.process(0, &mut queue, &ram);
    assert_eq!(broken, Err(crate::virtio::BrokenRing::Head));
}

#[test]
fn announcement_when_the_device_was_restored_is_one_frame_on_the_tap() {
    // The namespace goes with the thread, and with it the tap.
    let in_namespace = thread::spawn(|| {
        let name = "mf-t-rarp";
        let tap = match enter_network_namespace()
            .and_then(|()| Tap::open(name).map_err(std::io::Error::other))
        {
            Ok(tap) => tap,
            Err(error) => return crate::needs::skip("announcement", &error.to_string()),
        };
        let up = Command::new("ip")
            .args(["link", "set", name, "up"])
            .status();
        if !up.is_ok_and(|status| status.success()) {
            return crate::needs::skip("announcement", "no ip command here");
        }
        let mut network = packets().unwrap();
        let limiter = RateLimiter::default;
        let state = NetState::default();
        let mut net = Net::new(tap, Some(MAC), None, limiter(), limiter(), &state, 0).unwrap();
        net.was_restored();
        assert_eq!(net.counters.announcements.get(), 1);
        let frame = loop {
            let mut frame = vec![0; 2000];
            let len = std::io::Read::read(&mut network, &mut frame).unwrap();
            // The host says something of its own on a new interface.
            if frame[6..12] == MAC {
                frame.truncate(len);
                break frame;
            }
        };
        let mut expected = vec![0xff; 6];
        expected.extend(MAC);
        expected.extend([0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
        expected.extend(MAC);
        expected.extend([0; 4]);
        expected.extend(MAC);
        expected.resize(60, 0);
        assert_eq!(frame, expected);
        // On a tap that is down, or gone, it is lost and nothing else comes of it.
        for arguments in [
            &["link", "set", name, "down"][..],
            &["link", "delete", name],
        ] {
            Command::new("ip").args(arguments).status().unwrap();
            net.was_restored();
            assert_eq!(net.counters.announcements.get(), 1);
        }
        assert_eq!(net.counters.tap_gone.get(), 1);
        net.was_restored();
    });
    in_namespace.join().unwrap();
}

#[test]
fn announcement_when_the_guest_has_chosen_its_address_is_not_made() {
    let (near, far) = UnixDatagram::pair().unwrap();
    far.set_nonblocking(true).unwrap();
    let limiter = RateLimiter::default;
    let state = NetState::default();
    let tap = Tap::fake(near);
    let mut net = Net::new(tap, None, None, limiter(), limiter(), &state, 0).unwrap();
    net.was_restored();
    assert!(far.recv(&mut [0; 100]).is_err());
    assert_eq!(net.counters.announcements.get(), 0);
}
