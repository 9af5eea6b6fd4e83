mod batches;
mod socket;

use super::super::queue::QueueState;
use super::super::testing::{Rings, ram};
use super::receive::PATIENCE_NANOS;
use super::*;
use crate::sys::tap::Tap;
use crate::sys::testing::{allocator_calls, own_name};
use std::os::unix::net::UnixDatagram;
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress};

const BASE: u64 = 0x10000;
const DATA: u64 = 0x40000;

struct Bench {
    ram: Ram,
    net: Net,
    /// The far end of the cable.
    peer: UnixDatagram,
}

fn bench(features: u64) -> Bench {
    let (ours, peer) = UnixDatagram::pair().unwrap();
    peer.set_nonblocking(true).unwrap();
    let limiter = RateLimiter::default;
    let mut net = Net::new(
        Tap::fake(ours),
        Some([2, 0, 0, 0, 0, 1]),
        None,
        limiter(),
        limiter(),
        &NetState::default(),
        0,
    )
    .unwrap();
    net.activate(features).unwrap();
    // Longer than a test takes on a busy host.
    net.patience = 3_600_000_000_000;
    Bench {
        ram: ram(),
        net,
        peer,
    }
}

/// A frame as the tap gives it: an empty header and a payload with a pattern.
fn frame(payload: usize) -> Vec<u8> {
    let mut frame = vec![0; HEADER as usize];
    frame.extend((0..payload).map(|i| (i % 251) as u8));
    frame
}

fn queue(rings: &Rings<'_>) -> Queue {
    Queue::new(
        &QueueState::fresh(rings.layout()),
        256,
        feature::COMMON,
        rings.ram,
    )
    .unwrap()
}

fn guest(ram: &Ram, addr: u64, len: usize) -> Vec<u8> {
    let mut data = vec![0; len];
    ram.read_slice(&mut data, GuestAddress(addr)).unwrap();
    data
}

fn num_buffers(ram: &Ram, addr: u64) -> u16 {
    ram.read_obj(GuestAddress(addr + 10)).unwrap()
}

#[test]
fn features_when_options_are_given_follow() {
    let (ours, _peer) = UnixDatagram::pair().unwrap();
    let tap = Tap::fake(ours);
    let with = |mac, mtu| {
        let limiter = RateLimiter::default;
        let state = NetState::default();
        Net::new(
            tap.try_clone().unwrap(),
            mac,
            mtu,
            limiter(),
            limiter(),
            &state,
            0,
        )
        .unwrap()
    };
    let plain = with(None, None);
    assert_eq!(plain.features() & (bit::MAC | bit::MTU), 0);
    assert_eq!(plain.features() & bit::USO, bit::USO);
    let full = with(Some([2, 3, 4, 5, 6, 7]), Some(9000));
    assert_eq!(full.features() & (bit::MAC | bit::MTU), bit::MAC | bit::MTU);
    let mut config = [0; 12];
    full.config().read(0, &mut config);
    assert_eq!(config, [2, 3, 4, 5, 6, 7, 0, 0, 0, 0, 0x28, 0x23]);
}

#[test]
fn transmit_when_frame_is_whole_reaches_the_tap() {
    let mut bench = bench(feature::COMMON);
    let ram = bench.ram.clone();
    let mut rings = Rings::new(&ram, BASE, 256);
    let mut queue = queue(&rings);
    let sent = frame(1000);
    ram.write_slice(&sent, GuestAddress(DATA)).unwrap();
    rings.offer_chain(
        0,
        &[
            (DATA, 12, false),
            (DATA + 12, 500, false),
            (DATA + 512, 500, false),
        ],
    );
    assert_eq!(bench.net.process(1, &mut queue, &ram), Ok(Progress::More));
    assert_eq!(bench.net.process(1, &mut queue, &ram), Ok(Progress::Wait));
    assert_eq!(rings.take(), Some((0, 0)));
    let mut got = vec![0; 2000];
    let n = bench.peer.recv(&mut got).unwrap();
    assert_eq!(got[..n], sent);
    assert_eq!(bench.net.counters.tx_bytes.get(), 1000);
}

#[test]
fn transmit_when_frame_is_malformed_drops_and_completes_it() {
    let big: Vec<(u64, u32, bool)> = vec![(DATA, 65562 + 13, false)];
    for parts in [
        vec![(DATA, 11, false)],
        vec![(DATA, 12, false)],
        vec![(DATA, 100, true)],
        vec![(DATA, 100, false), (DATA, 100, true)],
        vec![(DATA, 0, false)],
        vec![(1 << 20, 100, false)],
        big,
    ] {
        let mut bench = bench(feature::COMMON);
        let ram = bench.ram.clone();
        let mut rings = Rings::new(&ram, BASE, 256);
        let mut queue = queue(&rings);
        rings.offer_chain(0, &parts);
        assert_eq!(bench.net.process(1, &mut queue, &ram), Ok(Progress::More));
        assert_eq!(rings.take(), Some((0, 0)), "{parts:x?}");
        assert_eq!(bench.net.counters.tx_invalid.get(), 1, "{parts:x?}");
        assert!(bench.peer.recv(&mut [0; 10]).is_err());
    }
}

#[test]
fn transmit_when_the_host_does_not_take_it_drops_and_completes_it() {
    let mut bench = bench(feature::COMMON);
    let ram = bench.ram.clone();
    let mut rings = Rings::new(&ram, BASE, 256);
    let mut queue = queue(&rings);
    // The peer does not read: sooner or later the socket is full.
    for round in 0..2000u32 {
        rings.offer_chain(0, &[(DATA, 1500, false)]);
        assert_eq!(bench.net.process(1, &mut queue, &ram), Ok(Progress::More));
        assert_eq!(rings.take(), Some((0, 0)), "{round}");
    }
    let counters = &bench.net.counters;
    assert!(counters.tx_dropped.get() > 0);
    assert_eq!(counters.tx_dropped.get() + counters.tx_frames.get(), 2000);
}

#[test]
fn receive_when_one_buffer_is_enough_uses_one() {
    for features in [feature::COMMON, feature::COMMON | bit::MRG_RXBUF] {
        let mut bench = bench(features);
        let ram = bench.ram.clone();
        let mut rings = Rings::new(&ram, BASE, 256);
        let mut queue = queue(&rings);
        rings.offer_chain(0, &[(DATA, 12, true), (DATA + 0x1000, 1600, true)]);
        rings.offer_chain(2, &[(DATA + 0x2000, 2000, true)]);
        ram.write_slice(&[0xee; 12], GuestAddress(DATA)).unwrap();
        for payload in [100, 1514] {
            bench.peer.send(&frame(payload)).unwrap();
        }
        assert_eq!(bench.net.process(0, &mut queue, &ram), Ok(Progress::More));
        assert_eq!(bench.net.process(0, &mut queue, &ram), Ok(Progress::Wait));
        assert_eq!(rings.take(), Some((0, 112)));
        assert_eq!(rings.take(), Some((2, 1526)));
        assert_eq!(num_buffers(&ram, DATA), 1);
        assert_eq!(guest(&ram, DATA + 0x1000, 100), frame(100)[12..]);
        assert_eq!(guest(&ram, DATA + 0x200c, 1514), frame(1514)[12..]);
    }
}

#[test]
fn receive_when_mergeable_spreads_over_as_many_buffers_as_needed() {
    let mut bench = bench(feature::COMMON | bit::MRG_RXBUF | bit::GUEST_CSUM | bit::GUEST_TSO4);
    let ram = bench.ram.clone();
    let mut rings = Rings::new(&ram, BASE, 256);
    let mut queue = queue(&rings);
    for i in 0..100 {
        rings.offer_chain(i, &[(DATA + u64::from(i) * 1536, 1536, true)]);
    }
    let sent = frame(65000);
    bench.peer.send(&sent).unwrap();
    let before = allocator_calls();
    assert_eq!(bench.net.process(0, &mut queue, &ram), Ok(Progress::More));
    assert_eq!(allocator_calls(), before);
    let used = rings.used_index();
    assert_eq!(usize::from(used), sent.len().div_ceil(1536));
    assert_eq!(num_buffers(&ram, DATA), used);
    let mut total = 0;
    for head in 0..u32::from(used) {
        let (id, len) = rings.take().unwrap();
        assert_eq!(id, head);
        total += len as usize;
    }
    assert_eq!(total, sent.len());
    assert_eq!(guest(&ram, DATA + 12, 65000), sent[12..]);
    // Buffers that were gathered and not needed take the next frame.
    bench.peer.send(&frame(60)).unwrap();
    bench.net.backend(source::LINK);
    assert_eq!(bench.net.process(0, &mut queue, &ram), Ok(Progress::More));
    assert_eq!(rings.take(), Some((u32::from(used), 72)));
}

#[test]
fn receive_when_there_are_no_buffers_waits_for_a_kick() {
    let mut bench = bench(feature::COMMON | bit::MRG_RXBUF);
    let ram = bench.ram.clone();
    let mut rings = Rings::new(&ram, BASE, 256);
    let mut queue = queue(&rings);
    bench.peer.send(&frame(60)).unwrap();
    bench.net.backend(source::LINK);
    for _ in 0..3 {
        assert_eq!(bench.net.process(0, &mut queue, &ram), Ok(Progress::Wait));
    }
    rings.offer_chain(0, &[(DATA, 1536, true)]);
    assert_eq!(bench.net.process(0, &mut queue, &ram), Ok(Progress::More));
    assert_eq!(rings.take(), Some((0, 72)));
}

#[test]
fn receive_when_buffers_run_out_in_a_frame_waits_for_more() {
    let mut bench = bench(feature::COMMON | bit::MRG_RXBUF | bit::GUEST_TSO4);
    let ram = bench.ram.clone();
    let rings = Rings::new(&ram, BASE, 256);
    let mut queue = queue(&rings);
    rings.offer_chain(0, &[(DATA, 1000, true)]);
    rings.offer_chain(1, &[(DATA + 1000, 1000, true)]);
    let sent = frame(5000);
    bench.peer.send(&sent).unwrap();
    assert_eq!(bench.net.process(0, &mut queue, &ram), Ok(Progress::More));
    assert_eq!(bench.net.process(0, &mut queue, &ram), Ok(Progress::Wait));
    assert_eq!(rings.used_index(), 0);
    rings.offer_chain(2, &[(DATA + 2000, 2000, true)]);
    assert_eq!(bench.net.process(0, &mut queue, &ram), Ok(Progress::Wait));
    rings.offer_chain(3, &[(DATA + 4000, 2000, true)]);
    assert_eq!(bench.net.process(0, &mut queue, &ram), Ok(Progress::More));
    assert_eq!(rings.used_index(), 4);
    assert_eq!(num_buffers(&ram, DATA), 4);
    assert_eq!(guest(&ram, DATA + 12, 5000), sent[12..]);
    assert_eq!(bench.net.counters.rx_frames.get(), 1);
}

#[test]
fn receive_when_no_more_buffers_come_drops_the_frame_and_goes_on() {
    let mut bench = bench(feature::COMMON | bit::MRG_RXBUF | bit::GUEST_TSO4);
    let ram = bench.ram.clone();
    let mut rings = Rings::new(&ram, BASE, 256);
    let mut queue = queue(&rings);
    rings.offer_chain(0, &[(DATA, 1000, true)]);
    bench.peer.send(&frame(5000)).unwrap();
    bench.peer.send(&frame(500)).unwrap();
    assert_eq!(bench.net.process(0, &mut queue, &ram), Ok(Progress::More));
    assert_eq!(bench.net.process(0, &mut queue, &ram), Ok(Progress::Wait));
    bench
        .net
        .unfinished
        .as_mut()
        .unwrap()
        .wait_anew(PATIENCE_NANOS);
    std::thread::sleep(Duration::from_nanos(PATIENCE_NANOS));
    assert_eq!(bench.net.process(0, &mut queue, &ram), Ok(Progress::More));
    assert_eq!(bench.net.counters.rx_dropped.get(), 1);
    assert_eq!(rings.take(), Some((0, 512)));
    assert_eq!(guest(&ram, DATA + 12, 500), frame(500)[12..]);
}

#[test]
fn receive_when_not_mergeable_and_too_long_drops_and_keeps_the_buffer() {
    let mut bench = bench(feature::COMMON);
    let ram = bench.ram.clone();
    let mut rings = Rings::new(&ram, BASE, 256);
    let mut queue = queue(&rings);
    rings.offer_chain(0, &[(DATA, 1000, true)]);
    for payload in [989, 988] {
        bench.peer.send(&frame(payload)).unwrap();
    }
    assert_eq!(bench.net.process(0, &mut queue, &ram), Ok(Progress::More));
    assert_eq!(rings.take(), Some((0, 1000)));
    assert_eq!(bench.net.counters.rx_dropped.get(), 1);
}

#[test]
fn receive_when_buffers_are_unusable_returns_them_empty() {
    let mut bench = bench(feature::COMMON | bit::MRG_RXBUF);
    let ram = bench.ram.clone();
    let mut rings = Rings::new(&ram, BASE, 256);
    let mut queue = queue(&rings);
    rings.offer_chain(0, &[(DATA, 12, true)]);
    rings.offer_chain(1, &[(DATA, 2000, false)]);
    rings.offer_chain(2, &[(DATA, 20, false), (DATA, 2000, true)]);
    rings.offer_chain(4, &[(1 << 20, 2000, true)]);
    rings.offer_chain(5, &[(DATA, 2000, true)]);
    bench.peer.send(&frame(60)).unwrap();
    assert_eq!(bench.net.process(0, &mut queue, &ram), Ok(Progress::More));
    for head in [0, 1, 2, 4] {
        assert_eq!(rings.take(), Some((head, 0)));
    }
    assert_eq!(rings.take(), Some((5, 72)));
    assert_eq!(bench.net.counters.rx_invalid.get(), 4);
}

#[test]
fn receive_when_buffers_are_in_many_pieces_keeps_to_its_places() {
    let mut bench = bench(feature::COMMON | bit::MRG_RXBUF | bit::GUEST_TSO4);
    let ram = bench.ram.clone();
    let mut rings = Rings::new(&ram, BASE, 256);
    let mut queue = queue(&rings);
    // Two chains of 90 pieces find a place, a third must wait for its turn; one of 193 pieces
    // never finds one.
    let offer = |first: u16, pieces: u64, at: u64| {
        let parts: Vec<_> = (0..pieces)
            .map(|i| (DATA + at + i * 20, 20, true))
            .collect();
        rings.offer_chain(first, &parts);
    };
    offer(0, 90, 0);
    offer(90, 90, 1800);
    offer(180, 70, 3600);
    for payload in [3000, 900] {
        bench.peer.send(&frame(payload)).unwrap();
    }
    assert_eq!(bench.net.process(0, &mut queue, &ram), Ok(Progress::More));
    offer(0, 193, 0);
    offer(200, 50, 0);
    bench.peer.send(&frame(60)).unwrap();
    bench.net.backend(source::LINK);
    assert_eq!(bench.net.process(0, &mut queue, &ram), Ok(Progress::More));
    assert_eq!(
        guest(&ram, DATA + 1812, 1000)[..988],
        frame(3000)[1812..2800]
    );
    assert_eq!(guest(&ram, DATA + 3612, 900), frame(900)[12..]);
    let used: Vec<_> = std::iter::from_fn(|| rings.take()).collect();
    assert_eq!(used, [(0, 1800), (90, 1212), (180, 912), (0, 0), (200, 72)]);
}

#[test]
fn reset_when_buffers_are_at_hand_forgets_them() {
    let mut bench = bench(feature::COMMON | bit::MRG_RXBUF | bit::GUEST_TSO4);
    let ram = bench.ram.clone();
    let rings = Rings::new(&ram, BASE, 256);
    let mut old = queue(&rings);
    rings.offer_chain(0, &[(DATA, 1000, true)]);
    bench.peer.send(&frame(5000)).unwrap();
    assert_eq!(bench.net.process(0, &mut old, &ram), Ok(Progress::More));
    bench.net.reset();
    bench.net.activate(feature::COMMON).unwrap();
    let mut rings = Rings::new(&ram, BASE, 256);
    let mut queue = queue(&rings);
    bench.peer.send(&frame(100)).unwrap();
    assert_eq!(bench.net.process(0, &mut queue, &ram), Ok(Progress::Wait));
    rings.offer_chain(7, &[(DATA + 0x1000, 1600, true)]);
    assert_eq!(bench.net.process(0, &mut queue, &ram), Ok(Progress::More));
    assert_eq!(rings.take(), Some((7, 112)));
}

#[test]
fn tap_when_it_vanishes_is_left_alone() {
    let name = own_name("gone");
    let Ok(tap) = Tap::open(&name) else {
        crate::needs::skip("tap_when_it_vanishes", "no TAP can be made here");
        return;
    };
    let limiter = RateLimiter::default;
    let mut net = Net::new(
        tap,
        None,
        None,
        limiter(),
        limiter(),
        &NetState::default(),
        0,
    )
    .unwrap();
    net.activate(net.features()).unwrap();
    let ram = ram();
    let mut receive_rings = Rings::new(&ram, BASE, 256);
    let mut receive = queue(&receive_rings);
    let mut transmit_rings = Rings::new(&ram, BASE + 0x8000, 256);
    let mut transmit = queue(&transmit_rings);
    receive_rings.offer_chain(0, &[(DATA, 65574, true)]);
    assert_eq!(net.process(0, &mut receive, &ram), Ok(Progress::Wait));
    let deleted = std::process::Command::new("ip")
        .args(["link", "delete", &name])
        .status();
    if !deleted.is_ok_and(|s| s.success()) {
        crate::needs::skip("tap_when_it_vanishes", "no ip command here");
        return;
    }
    net.backend(source::LINK);
    assert_eq!(net.process(0, &mut receive, &ram), Ok(Progress::Wait));
    assert_eq!(net.counters.tap_gone.get(), 1);
    for _ in 0..3 {
        transmit_rings.offer_chain(0, &[(DATA, 100, false)]);
        assert_eq!(net.process(1, &mut transmit, &ram), Ok(Progress::More));
        assert_eq!(transmit_rings.take(), Some((0, 0)));
        net.backend(source::LINK);
        assert_eq!(net.process(0, &mut receive, &ram), Ok(Progress::Wait));
    }
    assert_eq!(net.counters.tx_dropped.get(), 3);
    assert_eq!(net.counters.rx_failed.get(), 1);
    // A driver that starts anew finds a device without a cable.
    net.reset();
    net.activate(net.features()).unwrap();
    assert_eq!(net.counters.tap_gone.get(), 1);
    assert_eq!(receive_rings.take(), None);
}
