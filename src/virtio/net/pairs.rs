//! An interface with several pairs of queues (virtio 1.2, 5.1.6.5.5).
//!
//! Each pair has a worker with a queue of the tap. The first worker also serves the control queue, by which the
//! driver says how many pairs it uses: one, from each activation on, until it has said so. Only the tap's queues of these
//! are attached: the host's kernel gives frames to no other. All is done by the first worker, which has a
//! descriptor of each of the tap's queues: workers send each other nothing.
//!
//! Each queue of the tap that is attached or detached takes a lock that all of the host's network has: commands that change
//! the number of pairs are limited ([`changes`]), and one more waits in its queue. One that says what is so is answered
//! at once.
//!
//! A batch of frames that a worker had read from the tap before its queue was detached still reaches the
//! driver. Frames that the driver sends by a pair that it does not use are sent.

use std::io;

use super::{Net, bit, queue};
use crate::rate_limiter::{RateLimiter, TokenBucket};
use crate::sys::tap::{self, Tap};
use crate::virtio::queue::Popped;
use crate::virtio::segment::{copy_in, copy_out};
use crate::virtio::throttle::Throttle;
use crate::virtio::{BrokenRing, Progress, Queue, Ram};

/// What a driver says by the control queue (virtio 1.2, 5.1.6.5).
mod command {
    /// Class VIRTIO_NET_CTRL_MQ, command VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET.
    pub const PAIRS_SET: [u8; 2] = [4, 0];
    /// Class, command, and the number of pairs.
    pub const LEN: u32 = 4;
    pub const OK: u8 = 0;
    pub const ERR: u8 = 1;
}

/// What the device of one of several pairs has besides.
#[derive(Debug)]
pub(super) struct Pairs {
    /// Which pair.
    pub number: usize,
    /// How many there are.
    pub count: u16,
    /// Of the first: the tap's queues of the other pairs.
    pub others: Vec<Tap>,
    /// Of the first: the pairs whose queues of the tap are attached, counted from the first.
    pub active: u16,
    /// Of the first: pairs to be active after the next activation.
    pub wanted: u16,
    /// What the driver has accepted.
    pub features: u64,
    /// Holds back commands that change something.
    pub throttle: Throttle,
}

/// What limits a driver's commands that change the number of pairs: 10 in a second.
pub(super) fn changes() -> RateLimiter {
    RateLimiter::new(None, TokenBucket::new(10, 0, 1000))
}

impl Pairs {
    /// Whether queue `index` of this worker is the control queue. Where the driver has not accepted
    /// several pairs, that is where the second pair has its receive queue (5.1.2).
    fn is_control(&self, index: usize) -> bool {
        let several = self.features & bit::MQ != 0;
        match (self.number, several) {
            (0, true) => index == queue::CONTROL,
            (1, false) => index == queue::RECEIVE && self.features & bit::CTRL_VQ != 0,
            _ => false,
        }
    }

    /// Attaches the tap's queues of the first `wanted` pairs, and detaches the others.
    fn attach(&mut self, wanted: u16) -> io::Result<()> {
        while self.active != wanted {
            let more = self.active < wanted;
            let last = if more {
                self.active
            } else {
                self.active.saturating_sub(1)
            };
            // The first pair's is always attached.
            let Some(tap) = usize::from(last)
                .checked_sub(1)
                .and_then(|other| self.others.get(other))
            else {
                return Err(io::ErrorKind::InvalidInput.into());
            };
            tap.set_attached(more)?;
            self.active = if more { last.saturating_add(1) } else { last };
        }
        Ok(())
    }
}

impl Net {
    /// Whether queue `index` is the control queue.
    pub(super) fn is_control(&self, index: usize) -> bool {
        let pairs = self.pairs.as_ref();
        pairs.is_some_and(|pairs| pairs.is_control(index))
    }

    /// Has the first `wanted` pairs be active; whether they are.
    fn set_pairs(&mut self, wanted: u16) -> bool {
        let Some(pairs) = &mut self.pairs else {
            return false;
        };
        let before = pairs.active;
        match pairs.attach(wanted) {
            Ok(()) => true,
            // Without a tap the device works like one without a cable.
            Err(error) if tap::is_gone(&error) => {
                pairs.active = wanted;
                self.note_if_gone(&error);
                true
            }
            Err(_) => {
                let _ = pairs.attach(before);
                false
            }
        }
    }

    /// The driver is ready, and has accepted `features`.
    ///
    /// # Errors
    /// The host's: the pairs that a restored driver uses cannot be had.
    pub(super) fn activate_pairs(&mut self, features: u64) -> io::Result<()> {
        let Some(pairs) = &mut self.pairs else {
            return Ok(());
        };
        pairs.features = features;
        if pairs.number > 0 {
            return Ok(());
        }
        let wanted = match features & bit::MQ {
            0 => 1,
            _ => pairs.wanted,
        };
        match self.set_pairs(wanted) {
            true => Ok(()),
            false => Err(io::Error::other(
                "the tap's queues cannot be attached or detached",
            )),
        }
    }

    /// Forgets what the driver has said.
    pub(super) fn reset_pairs(&mut self) {
        if let Some(pairs) = &mut self.pairs {
            pairs.features = 0;
            pairs.wanted = 1;
            if pairs.number == 0 {
                self.set_pairs(1);
            }
        }
    }

    /// Pairs that are active, to be saved; 0 where that need not be said.
    pub(super) fn saved_pairs(&self) -> u16 {
        let pairs = self.pairs.as_ref().filter(|pairs| pairs.number == 0);
        match pairs {
            // One that was made of a saved state and not activated has not applied it yet.
            Some(pairs) if pairs.features & bit::MQ != 0 => pairs.active,
            _ => 0,
        }
    }

    /// Does one command of the driver's.
    pub(super) fn control(&mut self, queue: &mut Queue, ram: &Ram) -> Result<Progress, BrokenRing> {
        let popped = queue.pop(ram, &mut self.chain)?;
        if popped == Popped::Empty {
            return Ok(Progress::Wait);
        }
        let mut written = 0;
        // Without a place for the answer the command is none.
        if popped == Popped::Chain && self.chain.writable_len() > 0 {
            let wanted = self.command(ram);
            if let (Some(wanted), Some(pairs)) = (wanted, &mut self.pairs)
                && wanted != pairs.active
            {
                if !pairs.throttle.permits(0) {
                    queue.rewind(1);
                    return Ok(Progress::Wait);
                }
                pairs.throttle.charge(0);
            }
            let answer = match wanted.is_some_and(|wanted| self.set_pairs(wanted)) {
                true => command::OK,
                false => command::ERR,
            };
            let place = self.chain.writable().iter().copied();
            written = u32::from(copy_out(ram, place, &[answer]));
        }
        queue.add_used(ram, self.chain.head(), written)?;
        Ok(Progress::More)
    }

    /// The number of pairs that the chain at hand says; none when it is no such command.
    fn command(&self, ram: &Ram) -> Option<u16> {
        let mut said = [0; command::LEN as usize];
        let place = self.chain.readable().iter().copied();
        if self.chain.readable_len() != command::LEN || !copy_in(ram, place, &mut said) {
            return None;
        }
        let [class, number, low, high] = said;
        let wanted = u16::from_le_bytes([low, high]);
        let pairs = self.pairs.as_ref().filter(|pairs| pairs.number == 0)?;
        let is_known = [class, number] == command::PAIRS_SET;
        (is_known && (1..=pairs.count).contains(&wanted)).then_some(wanted)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixDatagram;

    use vm_memory::{Bytes, GuestAddress};

    use super::super::super::testing::{Rings, ram};
    use super::super::super::{Device, feature};
    use super::super::{NetState, QUEUE_SIZE, field};
    use super::*;
    use crate::rate_limiter::RateLimiter;
    use crate::sys::testing::own_name;
    use crate::virtio::PerWorker;
    use crate::virtio::queue::QueueState;

    const BASE: u64 = 0x10000;
    const SAID: u64 = 0x20000;
    const ANSWER: u64 = 0x21000;
    const PAIRS: usize = 3;

    fn nets(taps: PerWorker<Tap>, states: &PerWorker<NetState>) -> io::Result<PerWorker<Net>> {
        let limiter = RateLimiter::default;
        let links = PerWorker {
            first: taps.first.into(),
            others: taps.others.into_iter().map(Into::into).collect(),
        };
        Net::for_pairs(links, (Some([2; 6]), None), limiter(), limiter(), states, 0)
    }

    fn fakes(count: usize) -> PerWorker<Tap> {
        let fake = |_| Ok::<_, ()>(Tap::fake(UnixDatagram::unbound().unwrap()));
        PerWorker::try_make(count, fake).unwrap()
    }

    /// Sends `said` to queue `index`; the answer.
    fn command(net: &mut Net, index: usize, said: &[u8]) -> u8 {
        let ram = ram();
        let mut rings = Rings::new(&ram, BASE, 16);
        let state = QueueState::fresh(rings.layout());
        let mut queue = Queue::new(&state, QUEUE_SIZE, feature::COMMON, &ram).unwrap();
        ram.write_slice(said, GuestAddress(SAID)).unwrap();
        ram.write_obj(0xeeu8, GuestAddress(ANSWER)).unwrap();
        rings.offer_chain(0, &[(SAID, said.len() as u32, false), (ANSWER, 1, true)]);
        let done = net.process(index, &mut queue, &ram).unwrap();
        assert_eq!(done, Progress::More);
        assert_eq!(rings.take(), Some((0, 1)));
        ram.read_obj(GuestAddress(ANSWER)).unwrap()
    }

    fn set(net: &mut Net, count: u16) -> u8 {
        let [low, high] = count.to_le_bytes();
        command(net, queue::CONTROL, &[4, 0, low, high])
    }

    #[test]
    fn interface_when_it_has_one_pair_is_what_it_always_was() {
        let nets = nets(fakes(1), &PerWorker::default()).unwrap();
        let offered = nets.first.features();
        assert_eq!(offered & (bit::MQ | bit::CTRL_VQ), 0);
        let mut count = [0xee; 2];
        nets.first.config().read(field::MAX_PAIRS, &mut count);
        assert_eq!(count, [0, 0]);
        assert!(nets.first.pairs.is_none());
        let mut state = Net::state_buffer();
        nets.first.save(&mut state);
        assert!(!serde_json::to_string(&state).unwrap().contains("pairs"));
    }

    #[test]
    fn commands_when_they_are_hostile_are_refused_and_others_are_done() {
        let mut nets = nets(fakes(PAIRS), &PerWorker::default()).unwrap();
        let net = &mut nets.first;
        let mut count = [0; 2];
        net.config().read(field::MAX_PAIRS, &mut count);
        assert_eq!(count, [3, 0]);
        net.activate(net.features()).unwrap();
        for count in [0, 4, 0x100, u16::MAX] {
            assert_eq!(set(net, count), command::ERR, "{count}");
        }
        let others: [&[u8]; 6] = [
            &[4],
            &[4, 0, 1],
            &[4, 0, 1, 0, 0],
            &[4, 1, 1, 0],
            &[0, 0, 1, 0],
            &[0xff; 100],
        ];
        for said in others {
            assert_eq!(command(net, queue::CONTROL, said), command::ERR, "{said:?}");
        }
        for count in [3, 1, 2, 2] {
            assert_eq!(set(net, count), command::OK);
            assert_eq!(net.pairs.as_ref().unwrap().active, count);
        }
        net.reset();
        assert_eq!(net.pairs.as_ref().unwrap().active, 1);
    }

    #[test]
    fn commands_when_they_change_much_wait_and_those_that_change_nothing_do_not() {
        let mut nets = nets(fakes(PAIRS), &PerWorker::default()).unwrap();
        let net = &mut nets.first;
        net.activate(net.features()).unwrap();
        // A limit that no host is too slow for.
        let limiter = RateLimiter::new(None, TokenBucket::new(3, 0, 3_600_000));
        net.pairs.as_mut().unwrap().throttle = Throttle::new(limiter).unwrap();
        for count in [2, 1, 2] {
            assert_eq!(set(net, count), command::OK);
        }
        for _ in 0..20 {
            assert_eq!(set(net, 2), command::OK);
            assert_eq!(set(net, 9), command::ERR);
        }
        let ram = ram();
        let mut rings = Rings::new(&ram, BASE, 16);
        let state = QueueState::fresh(rings.layout());
        let mut queue = Queue::new(&state, QUEUE_SIZE, feature::COMMON, &ram).unwrap();
        ram.write_slice(&[4, 0, 3, 0], GuestAddress(SAID)).unwrap();
        rings.offer_chain(0, &[(SAID, 4, false), (ANSWER, 1, true)]);
        for _ in 0..2 {
            let done = net.process(queue::CONTROL, &mut queue, &ram).unwrap();
            assert_eq!((done, rings.take()), (Progress::Wait, None));
        }
        assert_eq!(net.pairs.as_ref().unwrap().active, 2);
        // Its timer makes it go on.
        let timer = net.pairs.as_ref().unwrap().throttle.as_raw_fd();
        let source = net.sources().iter().position(|fd| *fd == timer).unwrap();
        assert!(net.backend(source).contains(queue::CONTROL));
        net.pairs.as_mut().unwrap().throttle = Throttle::new(changes()).unwrap();
        let done = net.process(queue::CONTROL, &mut queue, &ram).unwrap();
        assert_eq!((done, rings.take()), (Progress::More, Some((0, 1))));
        assert_eq!(net.pairs.as_ref().unwrap().active, 3);
    }

    #[test]
    fn driver_without_several_pairs_has_its_control_queue_behind_the_first() {
        let mut nets = nets(fakes(PAIRS), &PerWorker::default()).unwrap();
        let second = &mut nets.others[0];
        second.activate(second.features() & !bit::MQ).unwrap();
        assert_eq!(command(second, queue::RECEIVE, &[4, 0, 1, 0]), command::ERR);
        let first = &mut nets.first;
        first.activate(first.features() & !bit::MQ).unwrap();
        assert!(!first.is_control(queue::CONTROL));
    }

    #[test]
    fn pairs_when_saved_are_active_again_and_hostile_ones_refused() {
        let mut before = nets(fakes(PAIRS), &PerWorker::default()).unwrap();
        let features = before.first.features();
        before.first.activate(features).unwrap();
        set(&mut before.first, 2);
        let mut saved = Net::state_buffer();
        before.first.save(&mut saved);
        assert_eq!(saved.pairs, 2);
        let mut after = nets(fakes(PAIRS), &PerWorker::from(saved.clone())).unwrap();
        after.first.activate(features).unwrap();
        assert_eq!(after.first.pairs.as_ref().unwrap().active, 2);
        let mut again = Net::state_buffer();
        after.first.save(&mut again);
        assert_eq!(again, saved);

        let bad = NetState {
            pairs: 4,
            ..NetState::default()
        };
        assert!(nets(fakes(PAIRS), &bad.clone().into()).is_err());
        assert!(nets(fakes(1), &bad.into()).is_err());
    }

    #[test]
    fn tap_when_pairs_are_set_has_as_many_queues() {
        let name = own_name("many");
        let Ok(first) = Tap::open_queue(&name) else {
            crate::needs::skip(&name, "no tap can be made here");
            return;
        };
        let mut taps = PerWorker::from(first);
        for _ in 1..PAIRS {
            taps.others.push(Tap::open_queue(&name).unwrap());
        }
        assert!(taps.first.has_queues());
        let queues = || {
            let folder = format!("/sys/class/net/{name}/queues");
            let names = std::fs::read_dir(folder).unwrap();
            let names = names.map(|entry| entry.unwrap().file_name());
            names
                .filter(|name| name.as_encoded_bytes().starts_with(b"rx-"))
                .count()
        };
        assert_eq!(queues(), PAIRS);
        let mut nets = nets(taps, &PerWorker::default()).unwrap();
        assert_eq!(queues(), 1);
        let net = &mut nets.first;
        net.activate(net.features()).unwrap();
        for count in [3, 2, 1, 2] {
            assert_eq!(set(net, count), command::OK);
            assert_eq!(queues(), usize::from(count));
        }
        net.reset();
        assert_eq!(queues(), 1);
        // One queue where several are asked for.
        let single = Tap::open(&own_name("one")).unwrap();
        let error = Tap::open_queue(single.name()).unwrap_err().to_string();
        assert!(error.contains("multi_queue"), "{error}");
        assert!(!single.has_queues());
    }
}
