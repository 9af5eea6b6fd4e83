//! The network device: frames of any shape in both directions, and commands, on a tap or a socket.

mod ring;

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair,
};

use self::ring::{Ring, SIZE, SLOTS, content};
use super::*;
use crate::fuzz::Input;
use crate::sys::link::PacketSocket;
use crate::sys::tap::Tap;
use crate::virtio::DeviceState;
use crate::virtio::fuzz::{Memory, Walked, address, describe, empty_ram, length, poke};

const PAIRS: usize = 3;
/// Below this are descriptors, rings and indirect tables, and nothing that is named on purpose.
const RINGS_END: u64 = 0x1000;

/// A device with one pair of queues, on a tap or a socket, or the first of several; buffers, frames and
/// commands of any shape, also with the device saved and made again, or reset, in between. Checked: no
/// byte of guest memory changes but those of used rings and of buffers on offer; each chain comes back
/// once, with no more bytes than it has; what the guest receives are frames that were sent, whole, in
/// order and none of them twice, what it sends arrives, and what does neither is counted as dropped; a
/// command is answered as the specification says.
pub fn net(bytes: &[u8]) {
    let input = &mut Input::new(bytes);
    let mut test = Test::new(input);
    for _ in 0..48 {
        if input.is_empty() || !test.step(input) {
            break;
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Tap,
    Socket,
    Pairs,
}

struct Test {
    ram: Ram,
    net: Net,
    link: Link,
    peer: OwnedFd,
    kind: Kind,
    features: u64,
    rings: [Ring; 3],
    /// Frames on their way to the guest; how many were sent, and were done with by a device before.
    frames: VecDeque<Vec<u8>>,
    sent: u64,
    done_before: u64,
    /// The beginning of a frame whose end waits may have been written over.
    is_written_over: bool,
}

fn new_net(kind: Kind, link: &Link, state: &NetState) -> io::Result<Net> {
    let limiter = RateLimiter::default;
    let mut links = PerWorker::from(link.try_clone()?);
    if kind == Kind::Pairs {
        let fake = |_| Tap::fake(UnixDatagram::unbound().unwrap()).into();
        links.others.extend((1..PAIRS).map(fake));
    }
    let states = PerWorker::from(state.clone());
    let options = (Some([2; 6]), None);
    let mut net = Net::for_pairs(links, options, limiter(), limiter(), &states, 0)?.first;
    if let Some(pairs) = &mut net.pairs {
        // Nothing is to depend on the time that an input takes.
        pairs.throttle = Throttle::new(limiter())?;
    }
    Ok(net)
}

fn saved(net: &Net) -> NetState {
    let mut state = Net::state_buffer();
    net.save(&mut state);
    state
}

impl Test {
    fn new(input: &mut Input<'_>) -> Self {
        let kind = input.one_of(&[Kind::Tap, Kind::Socket, Kind::Pairs]);
        let kind_of_socket = match kind {
            Kind::Socket => SocketType::SEQPACKET,
            _ => SocketType::DGRAM,
        };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (near, peer) = socketpair(AddressFamily::UNIX, kind_of_socket, flags, None).unwrap();
        let link: Link = match kind {
            Kind::Socket => PacketSocket::from_fd(near).unwrap().into(),
            _ => Tap::fake(near.into()).into(),
        };
        let mut net = new_net(kind, &link, &NetState::default()).unwrap();
        let offered = net.features();
        let features = offered & (input.u64() | feature::VERSION_1);
        net.activate(features).unwrap();
        let ram = empty_ram();
        Test {
            rings: [0, 1, 2].map(|queue| Ring::new(queue, features, &ram)),
            ram,
            net,
            link,
            peer,
            kind,
            features,
            frames: VecDeque::new(),
            sent: 0,
            done_before: 0,
            is_written_over: false,
        }
    }

    /// False when the guest has let the device write to its rings, of which the model knows no more.
    fn step(&mut self, input: &mut Input<'_>) -> bool {
        match input.below(16) {
            0..=4 => self.offer(queue::RECEIVE, input),
            5..=7 => self.offer(queue::TRANSMIT, input),
            8 if self.net.is_control(queue::CONTROL) => self.offer(queue::CONTROL, input),
            9..=12 => self.send(input),
            13 => {
                let (at, len) = (address(input), input.below(64));
                if at >= RINGS_END {
                    self.is_written_over = true;
                    poke(&self.ram, at, input.bytes(len));
                }
            }
            14 => self.save_and_restore(),
            _ if input.below(8) == 0 => self.reset(),
            _ => {}
        }
        if self.writes_rings() {
            for queue in [queue::RECEIVE, queue::CONTROL] {
                let _ = self
                    .net
                    .process(queue, &mut self.rings[queue].queue, &self.ram);
            }
            return false;
        }
        self.receive();
        self.transmit();
        self.control();
        true
    }

    fn offer(&mut self, queue: usize, input: &mut Input<'_>) {
        let Some(slot) = self.rings[queue].live.iter().position(Option::is_none) else {
            return;
        };
        let is_rx = queue == queue::RECEIVE;
        let takes_indirect = self.features & feature::INDIRECT_DESC != 0;
        let mut pieces = Vec::new();
        if queue == queue::CONTROL {
            let at = 0x2000 + u64::from(input.u8());
            let said = [
                input.one_of(&[4, 4, 0]),
                0,
                input.u8() % 5,
                input.u8() / 250,
            ];
            poke(&self.ram, at, &said);
            self.is_written_over = true;
            pieces.push((at, input.one_of(&[4, 4, 4, 3, 5]), false));
            pieces.push((0x3000 + u64::from(input.u8()), 1, input.below(8) > 0));
        }
        for _ in 0..=input.below(SLOTS - 1 - pieces.len()) {
            let len = match input.below(6) {
                0 => length(input),
                1 => 65562 + 12 + u32::from(input.u8()) - 100,
                2 => 1500,
                _ => 1 + u32::from(input.u8()),
            };
            // Every other time it is memory.
            let at = match input.flag() {
                true => address(input),
                false => 0x1000 + u64::from(input.u16()) % 0x6000,
            };
            // What is sent is not to change by that it is sent: rings do.
            let first = if is_rx { 0 } else { RINGS_END };
            pieces.push((at.max(first), len, is_rx ^ (input.below(32) == 0)));
        }
        let ring = &mut self.rings[queue];
        let head = ring.layout.descriptors + 16 * (slot * SLOTS) as u64;
        let mut table = head;
        if takes_indirect && input.flag() {
            table = 0xc00 + 0x40 * (queue * SLOTS + slot) as u64;
            describe(&self.ram, head, table, 16 * pieces.len() as u32, 4, 0);
        }
        let first = if table == head { slot * SLOTS } else { 0 };
        for (i, (at, len, writable)) in pieces.iter().enumerate() {
            let flags = u16::from(*writable) << 1 | u16::from(i + 1 < pieces.len());
            let next = (first + i + 1) as u16;
            describe(&self.ram, table + 16 * i as u64, *at, *len, flags, next);
        }
        let number = (slot * SLOTS) as u16;
        let place = ring.layout.avail + 4 + 2 * u64::from(ring.offered % SIZE);
        ring.offered = ring.offered.wrapping_add(1);
        poke(&self.ram, place, &number.to_le_bytes());
        poke(
            &self.ram,
            ring.layout.avail + 2,
            &ring.offered.to_le_bytes(),
        );
        let walked = Memory::of(&self.ram).walk(&ring.layout, number, takes_indirect);
        ring.live[slot] = Some(walked);
        ring.order.push_back(slot);
    }

    /// Sends a frame to the guest.
    fn send(&mut self, input: &mut Input<'_>) {
        let len = match input.below(4) {
            0 => usize::from(input.u16()),
            1 => input.one_of(&[
                0,
                11,
                12,
                13,
                1514,
                65562 + 12,
                65562 + 13,
                65557 + 12,
                70000,
            ]),
            _ => 13 + usize::from(input.u8()),
        };
        let number = self.sent as usize;
        let frame: Vec<u8> = (0..len).map(|i| (number * 31 + i * 7) as u8).collect();
        if send(
            &self.peer,
            &frame,
            SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
        )
        .is_ok()
        {
            self.sent += 1;
            self.frames.push_back(frame);
        }
        let _ = self.net.backend(source::LINK);
    }

    fn writes_rings(&self) -> bool {
        let is_there = |piece: &(u64, u32, bool)| piece.2 && piece.0 < RINGS_END;
        let writers = [queue::RECEIVE, queue::CONTROL].map(|queue| &self.rings[queue]);
        let mut chains = writers
            .iter()
            .flat_map(|ring| ring.live.iter().flatten().flatten());
        chains.any(|pieces| pieces.iter().any(is_there))
    }

    /// Serves `queue` until it waits, once more after the other end has read each time; what was returned,
    /// and what the other end has read.
    fn process(&mut self, queue: usize) -> (Vec<(Walked, u32)>, Vec<Vec<u8>>) {
        let (mut returned, mut arrived) = (Vec::new(), Vec::new());
        for turn in 0.. {
            assert!(turn < 100, "it does not come to an end");
            let before = Memory::of(&self.ram);
            let ring = &mut self.rings[queue];
            let progress = self.net.process(queue, &mut ring.queue, &self.ram).unwrap();
            let after = Memory::of(&self.ram);
            self.changed_only_what_it_may(queue, &before, &after);
            returned.extend(self.rings[queue].take(&after));
            let mut frame = vec![0; 0x2_0000];
            let mut is_empty = true;
            while let Ok((_, len)) = recv(&self.peer, &mut frame[..], RecvFlags::DONTWAIT) {
                arrived.push(frame[..len].to_vec());
                is_empty = len == 0;
                if len == 0 {
                    break;
                }
            }
            if progress == Progress::Wait && is_empty {
                break;
            }
        }
        (returned, arrived)
    }

    fn changed_only_what_it_may(&self, queue: usize, before: &Memory, after: &Memory) {
        if before == after {
            return;
        }
        let ring = &self.rings[queue];
        let mut allowed = after.clone();
        let mut same = |at: u64, len: u64| allowed.set(at, before.get(at, len));
        same(ring.layout.used, 6 + 8 * u64::from(SIZE));
        if queue != queue::TRANSMIT {
            let chains = ring.live.iter().flatten().flatten().flatten();
            for (at, len, _) in chains.filter(|piece| piece.2) {
                same(*at, u64::from(*len));
            }
        }
        assert_eq!(allowed.difference(before), None, "a byte of guest memory");
    }

    fn receive(&mut self) {
        if self.frames.is_empty() && self.rings[queue::RECEIVE].order.is_empty() {
            return;
        }
        self.is_written_over |= !self.buffers_are_disjoint();
        let (returned, _) = self.process(queue::RECEIVE);
        let memory = Memory::of(&self.ram);
        let mut used = returned.into_iter();
        while let Some((walked, len)) = used.next() {
            if len == 0 {
                continue;
            }
            let mut frame = content(&memory, &walked, len);
            if self.is_written_over {
                // How many buffers it has, the memory does not tell any more.
                continue;
            }
            let header = frame.first_chunk::<12>().expect("a buffer holds a header");
            let mut count = u16::from_le_bytes([header[10], header[11]]);
            assert!(count >= 1 && (count == 1 || self.net.mergeable));
            while count > 1 {
                let (walked, len) = used.next().expect("as many as the first says");
                frame.extend(content(&memory, &walked, len));
                count -= 1;
            }
            self.is_next(&frame);
        }
        self.is_written_over &= self.net.unfinished.is_some();
        self.is_accounted();
    }

    /// `frame` is one of those that were sent; those before it were dropped.
    fn is_next(&mut self, frame: &[u8]) {
        let from = if self.kind == Kind::Socket { 10 } else { 0 };
        assert!(frame[..from].iter().all(|byte| *byte == 0));
        while let Some(sent) = self.frames.pop_front() {
            let is_same = sent.len() == frame.len()
                && sent[from..10] == frame[from..10]
                && sent[12..] == frame[12..];
            if is_same {
                return;
            }
        }
        panic!("a frame of {} bytes that was not sent", frame.len());
    }

    fn done(&self) -> u64 {
        let counters = &self.net.counters;
        let done = counters.rx_frames.get() + counters.rx_dropped.get();
        self.done_before + done + counters.rx_failed.get()
    }

    /// Whatever was sent was received, dropped or waits; and it waits for buffers only.
    fn is_accounted(&self) {
        let net = &self.net;
        if net.gone {
            return;
        }
        if !net.readable {
            let waits = u64::from(net.unfinished.is_some());
            assert_eq!(self.sent, self.done() + waits);
        } else {
            assert!(net.buffers.is_empty() || net.unfinished.is_some());
        }
    }

    fn buffers_are_disjoint(&self) -> bool {
        let ring = &self.rings[queue::RECEIVE];
        let mut pieces: Vec<(u64, u64)> = ring
            .live
            .iter()
            .flatten()
            .flatten()
            .flatten()
            .map(|(at, len, _)| (*at, *at + u64::from(*len)))
            .collect();
        pieces.sort_unstable();
        pieces.windows(2).all(|pair| pair[0].1 <= pair[1].0)
    }

    fn transmit(&mut self) {
        if self.rings[queue::TRANSMIT].order.is_empty() {
            return;
        }
        let memory = Memory::of(&self.ram);
        let ring = &self.rings[queue::TRANSMIT];
        let chains = ring
            .order
            .iter()
            .map(|slot| ring.live[*slot].as_ref().unwrap());
        let mut expected: VecDeque<Vec<u8>> = chains
            .flatten()
            .filter(|pieces| pieces.iter().all(|piece| !piece.2))
            .map(|pieces| {
                let bytes = |(at, len, _): &(u64, u32, bool)| memory.get(*at, u64::from(*len));
                pieces.iter().flat_map(bytes).copied().collect()
            })
            .filter(|frame: &Vec<u8>| (13..=65562 + 12).contains(&frame.len()))
            .collect();
        let offered = ring.order.len();
        let dropped = self.net.counters.tx_dropped.get();
        let (returned, arrived) = self.process(queue::TRANSMIT);
        assert_eq!(returned.len(), offered);
        assert!(returned.iter().all(|(_, len)| *len == 0));
        let missing = expected.len() - arrived.len();
        for frame in arrived {
            // On a tap one that there is no room for is dropped.
            while expected.pop_front().expect("a frame that was sent") != frame {}
        }
        assert_eq!(missing as u64, self.net.counters.tx_dropped.get() - dropped);
        assert!(missing == 0 || self.kind != Kind::Socket || self.net.gone);
    }

    fn control(&mut self) {
        let is_idle = self.rings[queue::CONTROL].order.is_empty();
        if is_idle || !self.net.is_control(queue::CONTROL) {
            return;
        }
        let before = Memory::of(&self.ram);
        let ring = &self.rings[queue::CONTROL];
        let chains: Vec<Walked> = ring
            .order
            .iter()
            .map(|slot| ring.live[*slot].clone().unwrap())
            .collect();
        let (returned, _) = self.process(queue::CONTROL);
        let after = Memory::of(&self.ram);
        assert_eq!(returned.len(), chains.len());
        for ((_, len), walked) in returned.iter().zip(chains) {
            let pieces = walked.unwrap_or_default();
            let of = |writable| pieces.iter().filter(move |piece| piece.2 == writable);
            let Some((answer, _, _)) = of(true).next() else {
                assert_eq!(*len, 0);
                continue;
            };
            assert_eq!(*len, 1);
            let said: Vec<u8> = of(false)
                .flat_map(|(at, len, _)| before.get(*at, u64::from(*len)).to_vec())
                .collect();
            let wanted = match said[..] {
                [4, 0, low, high] => u16::from_le_bytes([low, high]),
                _ => 0,
            };
            let is_good = (1..=PAIRS as u16).contains(&wanted);
            assert_eq!(after.get(*answer, 1), [u8::from(!is_good)]);
            if is_good {
                assert_eq!(self.net.pairs.as_ref().unwrap().active, wanted);
            }
        }
    }

    /// A device made of what this one saves saves the same, and goes on.
    fn save_and_restore(&mut self) {
        let state = saved(&self.net);
        let text = serde_json::to_vec(&state).unwrap();
        assert_eq!(serde_json::from_slice::<NetState>(&text).unwrap(), state);
        let mut net = new_net(self.kind, &self.link, &state).unwrap();
        net.activate(self.features).unwrap();
        assert_eq!(saved(&net), state);
        self.done_before = self.done();
        net.gone = self.net.gone;
        self.net = net;
        for ring in &mut self.rings {
            let state = ring.queue.save();
            ring.queue = Queue::new(&state, QUEUE_SIZE, self.features, &self.ram).unwrap();
            assert_eq!(ring.queue.save(), state);
        }
    }

    fn reset(&mut self) {
        let waited = u64::from(self.net.unfinished.is_some());
        self.net.reset();
        self.done_before += waited;
        assert!(self.net.buffers.is_empty());
        for at in (0..RINGS_END).step_by(0x100) {
            poke(&self.ram, at, &[0; 0x100]);
        }
        self.rings = [0, 1, 2].map(|queue| Ring::new(queue, self.features, &self.ram));
        self.net.activate(self.features).unwrap();
        assert!(
            self.net
                .pairs
                .as_ref()
                .is_none_or(|pairs| pairs.active == 1)
        );
    }
}

/// A device of a saved state: refused, or saved as what it was made of.
pub fn restore(state: &DeviceState<NetState>) {
    let ram = empty_ram();
    let (near, _peer) = UnixDatagram::pair().unwrap();
    let link = Tap::fake(near).into();
    if let Ok(net) = new_net(Kind::Tap, &link, &state.device) {
        let again = saved(&net);
        assert_eq!(again.held, state.device.held);
        assert_eq!(again.unfinished, state.device.unfinished);
        assert_eq!(again.pairs, state.device.pairs);
    }
    for queue in state.worker.queues.iter().flatten() {
        if let Ok(made) = Queue::new(queue, QUEUE_SIZE, u64::MAX, &ram) {
            assert_eq!(made.save(), *queue);
        }
    }
}
