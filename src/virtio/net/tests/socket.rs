//! The device on a packet socket.

use std::os::fd::{AsRawFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair,
};
use rustix::net::{Shutdown, shutdown};

use super::*;
use crate::rate_limiter::TokenBucket;
use crate::sys::fd::{Interest, wait};
use crate::sys::link::PacketSocket;
use crate::sys::testing::wait_for_last_close;

const FEATURES: u64 = feature::COMMON | bit::MRG_RXBUF | bit::MTU;

struct Socket {
    ram: Ram,
    net: Net,
    peer: OwnedFd,
}

fn socket_with(features: u64, tx_limiter: RateLimiter) -> Socket {
    let (near, peer) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )
    .unwrap();
    let mut net = Net::new(
        PacketSocket::from_fd(near).unwrap(),
        Some([2, 0, 0, 0, 0, 1]),
        None,
        RateLimiter::default(),
        tx_limiter,
        &NetState::default(),
        0,
    )
    .unwrap();
    net.activate(features).unwrap();
    Socket {
        ram: ram(),
        net,
        peer,
    }
}

fn socket() -> Socket {
    socket_with(FEATURES, RateLimiter::default())
}

impl Socket {
    /// Sends a packet to the device, which gets to know of it.
    fn send(&mut self, packet: &[u8]) {
        assert_eq!(
            send(&self.peer, packet, SendFlags::NOSIGNAL),
            Ok(packet.len())
        );
        assert!(self.net.backend(source::LINK).contains(queue::RECEIVE));
    }

    fn receive(&self) -> Result<Vec<u8>, Errno> {
        let mut packet = vec![0; 100_000];
        let (len, _) = recv(&self.peer, &mut packet[..], RecvFlags::empty())?;
        packet.truncate(len);
        Ok(packet)
    }

    /// Lets the device work on a queue until it waits; how often it was called.
    fn work(&mut self, index: usize, queue: &mut Queue) -> usize {
        let mut calls = 1;
        while self.net.process(index, queue, &self.ram) == Ok(Progress::More) {
            calls += 1;
            assert!(calls < 100, "it does not come to rest");
        }
        calls
    }

    /// Whether the source that tells of room is ready.
    fn has_room(&self) -> bool {
        let room = *self.net.sources().last().unwrap();
        let mut interests = [Interest::read(room)];
        wait(&mut interests, Some(0)).unwrap();
        interests[0].is_ready()
    }
}

/// Offers 48 buffers of 1536 bytes, from descriptor `first` on.
fn offer_buffers(rings: &mut Rings<'_>, first: u16) {
    for index in first..first + 48 {
        rings.offer_chain(index, &[(DATA + u64::from(index) * 1536, 1536, true)]);
    }
}

#[test]
fn features_when_the_link_is_a_socket_have_no_offloads_and_a_large_mtu() {
    let socket = socket();
    let expected = feature::COMMON | bit::MRG_RXBUF | bit::MTU | bit::MAC;
    assert_eq!(socket.net.features(), expected);
    let mut config = [0; 12];
    socket.net.config().read(0, &mut config);
    assert_eq!(config[10..], [0xff, 0xff]);
    assert_eq!(socket.net.sources().len(), 4);
}

#[test]
fn frame_when_it_has_all_64_kib_passes_in_one_piece_both_ways() {
    let mut socket = socket();
    let ram = socket.ram.clone();
    let (mut receive, mut transmit) = (
        Rings::new(&ram, BASE, 256),
        Rings::new(&ram, BASE + 0x8000, 256),
    );
    let (mut rx, mut tx) = (queue(&receive), queue(&transmit));
    let sent = frame(14 + 65_535);
    offer_buffers(&mut receive, 0);
    socket.send(&sent);
    let before = allocator_calls();
    socket.work(0, &mut rx);
    assert_eq!(allocator_calls(), before);
    let count = sent.len().div_ceil(1536);
    assert_eq!(usize::from(num_buffers(&ram, DATA)), count);
    assert_eq!(guest(&ram, DATA + 12, sent.len() - 12), sent[12..]);
    for index in 0..count {
        let len = (sent.len() - index * 1536).min(1536) as u32;
        assert_eq!(receive.take(), Some((index as u32, len)));
    }
    ram.write_slice(&sent, GuestAddress(DATA)).unwrap();
    transmit.offer_chain(0, &[(DATA, sent.len() as u32, false)]);
    socket.work(1, &mut tx);
    assert_eq!(transmit.take(), Some((0, 0)));
    assert_eq!(socket.receive(), Ok(sent));
}

#[test]
fn header_when_the_other_end_fills_it_is_zeros_for_the_guest() {
    for (features, pieces) in [
        (FEATURES, [1536, 0]),
        (FEATURES & !bit::MRG_RXBUF, [5, 1531]),
    ] {
        let mut socket = socket_with(features, RateLimiter::default());
        let ram = socket.ram.clone();
        let mut rings = Rings::new(&ram, BASE, 256);
        let mut queue = queue(&rings);
        let pieces: Vec<_> = pieces
            .iter()
            .scan(DATA, |at, len| {
                let here = *at;
                *at += u64::from(*len);
                Some((here, *len, true))
            })
            .filter(|(_, len, _)| *len > 0)
            .collect();
        rings.offer_chain(0, &pieces);
        let mut sent = frame(100);
        sent[..12].fill(0xff);
        socket.send(&sent);
        socket.work(0, &mut queue);
        assert_eq!(rings.take(), Some((0, 112)));
        let mut expected = frame(100);
        expected[10] = 1;
        assert_eq!(guest(&ram, DATA, 112), expected);
    }
}

#[test]
fn frames_when_the_socket_is_full_wait_for_room_and_none_is_lost() {
    // So many frames a minute: one that waits for room costs nothing.
    let limiter = RateLimiter::new(None, TokenBucket::new(150, 0, 60_000));
    let mut socket = socket_with(FEATURES, limiter);
    let ram = socket.ram.clone();
    let mut rings = Rings::new(&ram, BASE, 256);
    let mut queue = queue(&rings);
    let len = 4000;
    for index in 0..150u16 {
        let at = DATA + u64::from(index) * 4096;
        let mut frame = frame(len - 12);
        frame[12..14].copy_from_slice(&index.to_le_bytes());
        ram.write_slice(&frame, GuestAddress(at)).unwrap();
        rings.offer_chain(index, &[(at, len as u32, false)]);
    }
    let before = allocator_calls();
    let calls = socket.work(1, &mut queue);
    assert_eq!(allocator_calls(), before);
    let sent = socket.net.counters.tx_frames.get();
    assert!(sent > 0 && sent < 150, "{sent}");
    // It waits for the event, and is not tried again and again.
    assert!(calls <= 10 && !socket.has_room(), "{calls}");
    let mut got = 0u16;
    while got < 150 {
        let frame = socket.receive().unwrap();
        assert_eq!(frame.len(), len);
        assert_eq!(frame[12..14], got.to_le_bytes());
        got += 1;
        if socket.has_room() {
            assert!(socket.net.backend(3).contains(queue::TRANSMIT));
            socket.work(1, &mut queue);
        }
    }
    assert_eq!(socket.receive(), Err(Errno::AGAIN));
    let counters = &socket.net.counters;
    assert_eq!(counters.tx_frames.get(), 150);
    assert_eq!(counters.tx_dropped.get() + counters.tx_throttled.get(), 0);
    for index in 0..150 {
        assert_eq!(rings.take(), Some((index, 0)));
    }
}

#[test]
fn frames_when_the_guest_has_no_buffers_stay_in_the_socket() {
    let mut socket = socket();
    let ram = socket.ram.clone();
    let mut rings = Rings::new(&ram, BASE, 256);
    let mut queue = queue(&rings);
    for _ in 0..3 {
        socket.send(&frame(100));
    }
    assert_eq!(socket.work(0, &mut queue), 1);
    offer_buffers(&mut rings, 0);
    socket.work(0, &mut queue);
    assert_eq!(socket.net.counters.rx_frames.get(), 3);
    assert_eq!(socket.net.counters.rx_dropped.get(), 0);
}

#[test]
fn end_of_a_frame_when_buffers_run_out_waits_longer_than_on_a_tap() {
    let mut socket = socket();
    let ram = socket.ram.clone();
    let rings = Rings::new(&ram, BASE, 256);
    let mut queue = queue(&rings);
    rings.offer_chain(0, &[(DATA, 1536, true)]);
    socket.send(&frame(3000));
    socket.work(0, &mut queue);
    std::thread::sleep(Duration::from_nanos(PATIENCE_NANOS + 1_000_000));
    socket.work(0, &mut queue);
    assert_eq!(socket.net.counters.rx_dropped.get(), 0);
    rings.offer_chain(1, &[(DATA + 1536, 1536, true)]);
    socket.work(0, &mut queue);
    assert_eq!(socket.net.counters.rx_frames.get(), 1);
    assert_eq!(guest(&ram, DATA + 12, 3000), frame(3000)[12..]);
}

#[test]
fn packets_when_of_a_bad_length_are_dropped_and_the_next_one_passes() {
    for features in [FEATURES, FEATURES & !bit::MRG_RXBUF] {
        let mut socket = socket_with(features, RateLimiter::default());
        let ram = socket.ram.clone();
        let mut rings = Rings::new(&ram, BASE, 256);
        let mut queue = queue(&rings);
        // More room than any frame needs: it is cut off there, or in memory of the device's.
        rings.offer_chain(0, &[(DATA, 90_000, true)]);
        let lens = [
            1,
            11,
            12,
            SOCKET_FRAME_MAX + 1,
            FRAME_MAX,
            FRAME_MAX + 1,
            90_000,
            90_001,
        ];
        for len in lens {
            socket.send(&vec![7; len as usize]);
            socket.work(0, &mut queue);
            assert_eq!(rings.take(), None, "{len}");
        }
        let dropped = socket.net.counters.rx_dropped.get();
        assert_eq!(dropped, lens.len() as u64);
        for len in [13, SOCKET_FRAME_MAX] {
            let sent = frame(len as usize - 12);
            socket.send(&sent);
            socket.work(0, &mut queue);
            assert_eq!(rings.take(), Some((0, len)));
            assert_eq!(guest(&ram, DATA + 12, sent.len() - 12), sent[12..]);
            rings.offer_chain(0, &[(DATA, 90_000, true)]);
        }
        assert_eq!(socket.net.counters.rx_dropped.get(), dropped);
    }
}

#[test]
fn device_when_the_other_end_is_closed_delivers_what_was_sent_and_is_quiet() {
    // With packets that the other end has not read, its end is told as a reset connection first.
    for unread in [false, true] {
        let mut socket = socket();
        let ram = socket.ram.clone();
        let (mut receive, mut transmit) = (
            Rings::new(&ram, BASE, 256),
            Rings::new(&ram, BASE + 0x8000, 256),
        );
        let (mut rx, mut tx) = (queue(&receive), queue(&transmit));
        offer_buffers(&mut receive, 0);
        if unread {
            transmit.offer_chain(0, &[(DATA + 0x30000, 100, false)]);
            socket.work(1, &mut tx);
            assert_eq!(transmit.take(), Some((0, 0)));
        }
        for payload in [100, 200] {
            socket.send(&frame(payload));
        }
        let (other, _) = socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        drop(std::mem::replace(&mut socket.peer, other));
        wait_for_last_close(|| {
            let mut end = [Interest::read(socket.net.link.as_raw_fd())];
            wait(&mut end, Some(0)).unwrap();
            end[0].hung_up()
        });
        // The guest sends before the device has looked: nothing ends the process.
        transmit.offer_chain(1, &[(DATA + 0x30000, 100, false)]);
        socket.work(1, &mut tx);
        assert_eq!(transmit.take(), Some((1, 0)));
        assert!(socket.net.backend(0).contains(queue::RECEIVE));
        socket.work(0, &mut rx);
        assert_eq!(receive.take(), Some((0, 112)), "unread: {unread}");
        assert_eq!(receive.take(), Some((1, 212)));
        assert_eq!(receive.take(), None);
        assert_eq!(socket.net.counters.tap_gone.get(), 1);
        // From now on nothing is tried any more.
        for round in 2..10u16 {
            assert_eq!(socket.net.poll(), QueueSet::NONE);
            let _ = socket.net.backend(0);
            assert_eq!(socket.work(0, &mut rx), 1);
            transmit.offer_chain(round, &[(DATA + 0x30000, 100, false)]);
            socket.work(1, &mut tx);
            assert_eq!(transmit.take(), Some((round.into(), 0)));
        }
        assert_eq!(socket.net.counters.tap_gone.get(), 1);
        assert_eq!(socket.net.counters.tx_dropped.get(), 9);
        assert_eq!(socket.net.counters.rx_failed.get(), 0);
        // Nor after a new driver.
        socket.net.reset();
        socket.net.activate(FEATURES).unwrap();
        assert_eq!(socket.work(0, &mut rx), 1);
    }
}

#[test]
fn packet_when_empty_ends_the_link_as_a_close_does() {
    for shut in [false, true] {
        let mut socket = socket();
        let ram = socket.ram.clone();
        let mut rings = Rings::new(&ram, BASE, 256);
        let mut queue = queue(&rings);
        offer_buffers(&mut rings, 0);
        socket.send(&frame(100));
        match shut {
            true => shutdown(&socket.peer, Shutdown::Write).unwrap(),
            false => {
                socket.send(&[]);
                socket.send(&frame(100));
            }
        }
        socket.work(0, &mut queue);
        assert_eq!(rings.take(), Some((0, 112)));
        assert_eq!(rings.take(), None);
        assert_eq!(socket.net.counters.tap_gone.get(), 1);
    }
}

#[test]
fn device_when_restored_on_a_socket_announces_nothing() {
    let mut socket = socket();
    socket.net.was_restored();
    assert_eq!(socket.receive(), Err(Errno::AGAIN));
    assert_eq!(socket.net.counters.announcements.get(), 0);
}
