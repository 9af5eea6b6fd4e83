//! Batches: any chains, hostile ones among them, and a tap that fails in the middle.

use super::*;
use crate::rate_limiter::TokenBucket;
use crate::sys::testing::{enter_network_namespace, packets};
use crate::virtio::testing::Random;
use std::io::Read;
use std::process::Command;
use std::thread;

/// Descriptors that a round may use; chains are laid out one after the other.
const SLOTS: u16 = 200;
const TABLES: u64 = 0x8000;

/// A chain that was offered: what the tap is to give of it.
struct Offered {
    head: u16,
    frame: Option<Vec<u8>>,
}

/// What may be wrong with a frame.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    Short,
    Writable,
    OutsideRam,
    ZeroLength,
    Loop,
}

/// Offers one chain from descriptor `first` on, in any number of pieces, perhaps by an indirect table; how
/// many descriptors it took.
fn offer(
    random: &mut Random,
    ram: &Ram,
    rings: &Rings<'_>,
    first: u16,
    number: u32,
) -> (u16, Offered) {
    let fault = match random.below(20) {
        0 => Fault::Short,
        1 => Fault::Writable,
        2 => Fault::OutsideRam,
        3 => Fault::ZeroLength,
        4 => Fault::Loop,
        _ => Fault::None,
    };
    let payload = if random.one_in(8) {
        1 + random.below(9000) as usize
    } else {
        1 + random.below(1514) as usize
    };
    let mut frame = frame(payload);
    for (to, from) in frame[12..].iter_mut().zip(number.to_le_bytes()) {
        *to = from;
    }
    if fault == Fault::Short {
        frame.truncate(1 + random.below(12) as usize);
    }
    let start = DATA + u64::from(first) * 256;
    ram.write_slice(&frame, GuestAddress(start)).unwrap();
    let wanted = 1 + random.below(8) as usize;
    let mut parts = Vec::new();
    let mut at = 0;
    for left in (0..wanted).rev() {
        let rest = frame.len() - at;
        let len = if left == 0 || rest <= left {
            rest
        } else {
            1 + random.below((rest - left) as u64) as usize
        };
        if len > 0 {
            parts.push((start + at as u64, len as u32, false));
        }
        at += len;
    }
    match fault {
        Fault::Writable => parts.push((DATA, 1, true)),
        Fault::OutsideRam => parts.push((1 << 40, 10, false)),
        Fault::ZeroLength => parts.push((DATA, 0, false)),
        Fault::None | Fault::Short | Fault::Loop => {}
    }
    let count = parts.len() as u16;
    let taken = if fault == Fault::Loop {
        rings.offer_chain(first, &parts);
        let (addr, len, _) = parts[parts.len() - 1];
        rings.describe(first + count - 1, addr, len, 1, first);
        count
    } else if random.one_in(2) {
        let table = TABLES + u64::from(first) * 16;
        for (i, (addr, len, writable)) in (0u16..).zip(&parts) {
            let more = u16::from(i + 1 < count);
            let flags = more | u16::from(*writable) << 1;
            let mut entry = addr.to_le_bytes().to_vec();
            entry.extend(len.to_le_bytes());
            entry.extend(flags.to_le_bytes());
            entry.extend((i + 1).to_le_bytes());
            let at = GuestAddress(table + u64::from(i) * 16);
            ram.write_slice(&entry, at).unwrap();
        }
        rings.describe(first, table, u32::from(count) * 16, 4, 0);
        rings.offer(first);
        count
    } else {
        rings.offer_chain(first, &parts);
        count
    };
    let is_whole = fault == Fault::None;
    let offered = Offered {
        head: first,
        frame: is_whole.then_some(frame),
    };
    (taken, offered)
}

#[test]
fn transmit_when_chains_are_random_passes_the_whole_ones_in_order() {
    let mut random = Random::printed();
    let mut bench = bench(feature::COMMON);
    let ram = bench.ram.clone();
    let mut rings = Rings::new(&ram, BASE, 256);
    let mut queue = queue(&rings);
    let (mut number, mut invalid, mut largest) = (0, 0, 0);
    for _ in 0..300 {
        let mut round = Vec::new();
        let mut next = 0;
        // Fewer than what the cable holds.
        while next + 10 < SLOTS && round.len() < 100 && !random.one_in(100) {
            let (taken, offered) = offer(&mut random, &ram, &rings, next, number);
            // Data of a chain may reach beyond its own place.
            next += taken.max(40.min(SLOTS));
            number += 1;
            round.push(offered);
        }
        largest = largest.max(round.len());
        let before = allocator_calls();
        while bench.net.process(1, &mut queue, &ram) == Ok(Progress::More) {}
        assert_eq!(allocator_calls(), before);
        let mut got = vec![0; 70_000];
        for offered in &round {
            assert_eq!(rings.take(), Some((u32::from(offered.head), 0)));
            match &offered.frame {
                Some(frame) => {
                    let len = bench.peer.recv(&mut got).unwrap();
                    assert!(got[..len] == frame[..], "head {}", offered.head);
                }
                None => invalid += 1,
            }
        }
        assert_eq!(rings.take(), None);
        assert!(bench.peer.recv(&mut got).is_err());
    }
    let counters = &bench.net.counters;
    assert_eq!(counters.tx_invalid.get(), invalid);
    assert_eq!(counters.tx_frames.get(), u64::from(number) - invalid);
    assert!(invalid > 50, "{invalid}");
    assert!(largest > 3, "{largest}");
}

#[test]
fn transmit_when_more_is_offered_than_a_batch_leaves_some_for_the_next() {
    let mut bench = bench(feature::COMMON);
    let ram = bench.ram.clone();
    let mut rings = Rings::new(&ram, BASE, 256);
    let mut queue = queue(&rings);
    for head in 0..100 {
        rings.offer_chain(head, &[(DATA, 100, false)]);
    }
    let mut used = Vec::new();
    loop {
        let progress = bench.net.process(1, &mut queue, &ram).unwrap();
        let count = std::iter::from_fn(|| rings.take()).count();
        while bench.peer.recv(&mut [0; 200]).is_ok() {}
        if progress == Progress::Wait {
            assert_eq!(count, 0);
            break;
        }
        used.push(count);
    }
    assert_eq!(used, [32, 32, 32, 4]);
    // Large frames end a batch by their bytes.
    for head in 0..4 {
        rings.offer_chain(head, &[(DATA, 65574, false)]);
    }
    assert_eq!(bench.net.process(1, &mut queue, &ram), Ok(Progress::More));
    assert_eq!(std::iter::from_fn(|| rings.take()).count(), 2);
}

#[test]
fn batch_when_the_ring_breaks_in_it_returns_what_was_sent_before() {
    let mut bench = bench(feature::COMMON);
    let ram = bench.ram.clone();
    let mut rings = Rings::new(&ram, BASE, 256);
    let mut queue = queue(&rings);
    for head in 0..3 {
        rings.offer_chain(head, &[(DATA, 100, false)]);
    }
    rings.offer(256);
    rings.offer_chain(4, &[(DATA, 100, false)]);
    let broken = bench.net.process(1, &mut queue, &ram);
    assert_eq!(broken, Err(BrokenRing::Head));
    for head in 0..3 {
        assert_eq!(rings.take(), Some((head, 0)));
        assert_eq!(bench.peer.recv(&mut [0; 200]).unwrap(), 100);
    }
    assert_eq!(rings.take(), None);
    assert!(bench.peer.recv(&mut [0; 200]).is_err());
    assert_eq!(bench.net.counters.tx_frames.get(), 3);
}

#[test]
fn limiter_when_it_ends_a_batch_holds_back_the_rest_and_counts_one_wait() {
    for bytes in [150, 250] {
        let mut bench = bench(feature::COMMON | bit::MRG_RXBUF);
        let ram = bench.ram.clone();
        let limits = || RateLimiter::new(TokenBucket::new(bytes, 0, 1_000_000_000), None);
        bench.net.tx_throttle = Throttle::new(limits()).unwrap();
        bench.net.rx_throttle = Throttle::new(limits()).unwrap();
        let mut rings = Rings::new(&ram, BASE, 256);
        let mut queue = queue(&rings);
        for head in 0..10 {
            rings.offer_chain(head, &[(DATA, 112, false)]);
        }
        while bench.net.process(1, &mut queue, &ram) == Ok(Progress::More) {}
        let sent = std::iter::from_fn(|| rings.take()).count();
        assert_eq!(sent as u64, bytes / 100);
        assert_eq!(bench.net.counters.tx_throttled.get(), 1);
        // What is received is only known afterwards: the limit is passed by one frame at most.
        let mut rings = Rings::new(&ram, BASE, 256);
        let mut queue = super::queue(&rings);
        for head in 0..10 {
            rings.offer_chain(head, &[(DATA, 1600, true)]);
            bench.peer.send(&frame(100)).unwrap();
        }
        while bench.net.process(0, &mut queue, &ram) == Ok(Progress::More) {}
        let received = std::iter::from_fn(|| rings.take()).count();
        assert_eq!(received as u64, bytes / 100 + 1);
        assert_eq!(bench.net.counters.rx_throttled.get(), 1);
    }
}

/// A device on a tap of a network namespace that goes with the calling thread.
fn on_a_tap(name: &str) -> Option<Net> {
    let tap = enter_network_namespace()
        .and_then(|()| Tap::open(name).map_err(io::Error::other))
        .inspect_err(|error| crate::needs::skip("batches", &error.to_string()))
        .ok()?;
    let limiter = RateLimiter::default;
    let state = NetState::default();
    let mut net = Net::new(tap, None, None, limiter(), limiter(), &state, 0).unwrap();
    net.activate(net.features()).unwrap();
    Some(net)
}

fn ip(arguments: &[&str]) -> bool {
    let status = Command::new("ip").args(arguments).status();
    status.is_ok_and(|status| status.success())
}

#[test]
fn tap_when_it_goes_down_or_vanishes_during_batches_costs_frames_only() {
    let in_namespace = thread::spawn(|| {
        let name = "mf-t-batch";
        let Some(mut net) = on_a_tap(name) else {
            return;
        };
        if !ip(&["link", "set", name, "up"]) {
            return crate::needs::skip("batches", "no ip command here");
        }
        let mut network = packets().unwrap();
        let ram = ram();
        let mut rings = Rings::new(&ram, BASE, 256);
        let mut queue = queue(&rings);
        ram.write_slice(&frame(100), GuestAddress(DATA)).unwrap();
        let mut offered = 0;
        let mut turn = |net: &mut Net| {
            for head in 0..64 {
                rings.offer_chain(head, &[(DATA, 112, false)]);
            }
            offered += 64;
            while net.process(1, &mut queue, &ram) == Ok(Progress::More) {}
            assert_eq!(std::iter::from_fn(|| rings.take()).count(), 64);
            assert_eq!(
                net.counters.tx_frames.get() + net.counters.tx_dropped.get(),
                offered
            );
        };
        turn(&mut net);
        assert!(network.read(&mut [0; 200]).is_ok());
        assert_eq!(net.counters.tx_frames.get(), 64);
        for arguments in [
            &["link", "set", name, "down"][..],
            &["link", "set", name, "up"],
            &["link", "delete", name],
        ] {
            let sent = net.counters.tx_frames.get();
            thread::scope(|scope| {
                // The namespace is inherited by the thread, and by the command.
                let change = scope.spawn(|| assert!(ip(arguments)));
                while !change.is_finished() {
                    turn(&mut net);
                }
            });
            let sent_after = net.counters.tx_frames.get();
            turn(&mut net);
            let is_up = arguments[arguments.len() - 1] == "up";
            assert_eq!(net.counters.tx_frames.get() > sent_after, is_up);
            assert!(sent_after >= sent);
        }
        assert_eq!(net.counters.tap_gone.get(), 1);
    });
    in_namespace.join().unwrap();
}

/// A UDP packet over IPv4 that the host is to cut up, with its virtio-net header.
fn unsegmented_udp(payload: usize, segment: u16) -> Vec<u8> {
    const NEEDS_CSUM: u8 = 1;
    const GSO_UDP_L4: u8 = 5;
    let mut frame = frame(14 + 20 + 8 + payload);
    let (header, ethernet) = frame.split_at_mut(12);
    header[..2].copy_from_slice(&[NEEDS_CSUM, GSO_UDP_L4]);
    for (at, value) in [(2, 42), (4, segment), (6, 34), (8, 6)] {
        header[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }
    ethernet[12..14].copy_from_slice(&[8, 0]);
    let (ip, udp) = ethernet[14..].split_at_mut(20);
    let len = |bytes: usize| u16::try_from(bytes).unwrap().to_be_bytes();
    ip.copy_from_slice(&[
        0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
    ]);
    ip[2..4].copy_from_slice(&len(28 + payload));
    udp[4..6].copy_from_slice(&len(8 + payload));
    frame
}

#[test]
fn udp_segmentation_when_offered_is_taken_by_the_tap() {
    let in_namespace = thread::spawn(|| {
        let name = "mf-t-uso";
        let Some(mut net) = on_a_tap(name) else {
            return;
        };
        if net.features() & bit::USO == 0 {
            return crate::needs::skip("udp_segmentation", "this kernel's taps lack it");
        }
        // A driver may take one version of IP alone: the tap then cuts up both.
        for one in [bit::GUEST_USO4, bit::GUEST_USO6] {
            net.activate(feature::COMMON | bit::GUEST_CSUM | one)
                .unwrap();
        }
        net.activate(net.features()).unwrap();
        if !ip(&["link", "set", name, "up"]) {
            return crate::needs::skip("udp_segmentation", "no ip command here");
        }
        let ram = ram();
        let rings = Rings::new(&ram, BASE, 256);
        let mut queue = queue(&rings);
        let packet = unsegmented_udp(8000, 1000);
        ram.write_slice(&packet, GuestAddress(DATA)).unwrap();
        rings.offer_chain(0, &[(DATA, packet.len() as u32, false)]);
        assert_eq!(net.process(1, &mut queue, &ram), Ok(Progress::More));
        assert_eq!(net.counters.tx_frames.get(), 1);
        assert_eq!(net.counters.tx_dropped.get(), 0);
    });
    in_namespace.join().unwrap();
}
