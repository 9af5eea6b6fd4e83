//! Saved states that were spoilt: refused, or a device that behaves.

use std::os::unix::net::UnixDatagram;

use serde_json::Value;

use super::super::super::net::{Net, NetState};
use super::super::super::testing::{Random, spoil};
use super::super::super::{DeviceState, StateError};
use super::*;
use crate::sys::tap::Tap;

/// A running device of any kind that was made of a state.
struct Running<D: Device> {
    registers: Arc<Registers>,
    handle: DeviceHandle<D>,
    thread: JoinHandle<Worker<D>>,
    replies: Inbox<WorkerReply>,
    _events: Inbox<WorkerEvent>,
}

impl<D: Device> Running<D> {
    fn new(device: D, start: &Start, ram: &Ram) -> io::Result<Self> {
        let (to_replies, replies) = mailbox();
        let (to_events, events) = mailbox();
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let (registers, worker, handle) = attach(
            device,
            "spoilt",
            start,
            ram.clone(),
            line,
            to_replies,
            to_events,
        )?;
        let thread = thread::spawn(move || worker.run());
        Ok(Running {
            registers,
            handle,
            thread,
            replies,
            _events: events,
        })
    }

    fn state(&self) -> DeviceState<D::State> {
        self.handle.pause(1).unwrap();
        next(&self.replies);
        self.handle.save(2).unwrap();
        assert!(matches!(next(&self.replies).done, Done::Saved));
        self.handle.take_saved().unwrap()
    }

    fn stop(self) -> Worker<D> {
        self.handle.stop().unwrap();
        self.thread.join().unwrap()
    }
}

/// Makes devices of spoilt states by `make`; how many were made, and how many refused.
fn try_spoilt<D: Device>(
    rounds: u64,
    saved: &DeviceState<D::State>,
    ram: &Ram,
    make: impl Fn(&D::State) -> io::Result<D>,
) -> (u64, u64) {
    let mut random = Random::printed();
    let whole = serde_json::to_value(saved).unwrap();
    let (mut made, mut refused) = (0, 0);
    for round in 0..rounds {
        let mut spoilt = whole.clone();
        for _ in 0..=random.below(3) {
            spoil(&mut spoilt, &mut random);
        }
        match try_one(&spoilt, ram, &make) {
            Ok(()) => made += 1,
            Err(error) => {
                refused += 1;
                assert!(!error.is_empty(), "round {round}");
            }
        }
    }
    (made, refused)
}

fn try_one<D: Device>(
    spoilt: &Value,
    ram: &Ram,
    make: impl Fn(&D::State) -> io::Result<D>,
) -> Result<(), String> {
    let text = spoilt.to_string();
    let state: DeviceState<D::State> =
        serde_json::from_str(&text).map_err(|error| error.to_string())?;
    let device = make(&state.device).map_err(|error| error.to_string())?;
    let start = Start::saved(state.registers, state.worker.into());
    let running = Running::new(device, &start, ram).map_err(|error| error.to_string())?;
    // It can be saved again, goes on, answers, and comes back from a reset.
    let again = running.state();
    assert_eq!(running.state(), again);
    running.handle.resume(3).unwrap();
    next(&running.replies);
    for kick in running.registers.kicks() {
        kick.write(1).unwrap();
    }
    running.handle.pause(4).unwrap();
    next(&running.replies);
    running.handle.resume(5).unwrap();
    next(&running.replies);
    reset(&running.registers);
    let rings = Rings::new(ram, BASE, 16);
    start_all(&running.registers, D::QUEUES.len(), &rings);
    assert_eq!(read32(&running.registers, 0x70) & !0x40, 15, "{text}");
    reset(&running.registers);
    running.stop();
    Ok(())
}

fn start_all(registers: &Registers, queues: usize, rings: &Rings<'_>) {
    super::start(registers, EVENT_IDX, &vec![rings.layout(); queues]);
}

#[test]
fn block_states_when_spoilt_are_refused_or_make_a_device_that_behaves() {
    let ram = ram();
    let rings = Rings::new(&ram, BASE, 16);
    let limiter = || RateLimiter::new(TokenBucket::new(1000, 10, 1), None);
    let make = |state: &BlockState| Block::new(disk(64), "disk", true, limiter(), state, 1);
    let device = make(&BlockState::default()).unwrap();
    let running = Running::new(device, &Start::default(), &ram).unwrap();
    start_all(&running.registers, 1, &rings);
    let saved = running.state();
    running.stop();
    // Requests for it, among them one that is no request.
    rings.offer_chain(
        0,
        &[(HEAD, 16, false), (DATA, 512, true), (STATUS, 1, true)],
    );
    rings.offer_chain(3, &[(HEAD, 16, false), (DATA, 0, true)]);
    let (made, refused) = try_spoilt(1000, &saved, &ram, make);
    println!("{made} made, {refused} refused");
    assert!(made > 100 && refused > 100);
}

#[test]
fn net_states_when_spoilt_are_refused_or_make_a_device_that_behaves() {
    let ram = ram();
    let rings = Rings::new(&ram, BASE, 16);
    let (near, far) = UnixDatagram::pair().unwrap();
    far.set_nonblocking(true).unwrap();
    let limiter = || RateLimiter::new(TokenBucket::new(1 << 40, 10, 1), None);
    let make = |state: &NetState| {
        // Room in the cable for what the device says, and a frame for it.
        while far.recv(&mut [0; 100]).is_ok() {}
        let _ = far.send(&[0; 1000]);
        let tap = Tap::fake(near.try_clone().unwrap());
        Net::new(tap, Some([2; 6]), None, limiter(), limiter(), state, 1)
    };
    let device = make(&NetState::default()).unwrap();
    let running = Running::new(device, &Start::default(), &ram).unwrap();
    far.send(&[0; 5000]).unwrap();
    for head in 0..4 {
        rings.offer_chain(head, &[(DATA + u64::from(head) * 400, 400, true)]);
    }
    // MRG_RXBUF: the long frame stays unfinished.
    let features = EVENT_IDX | 1 << 15;
    super::start(&running.registers, features, &[rings.layout()]);
    let saved = loop {
        let saved = running.state();
        if saved.device.unfinished.len > 0 {
            break saved;
        }
        running.handle.resume(9).unwrap();
        next(&running.replies);
        let _ = far.send(&[0; 5000]);
    };
    running.stop();
    let (made, refused) = try_spoilt(1000, &saved, &ram, make);
    println!("{made} made, {refused} refused");
    assert!(made > 100 && refused > 100);
}

#[test]
fn disk_when_it_takes_no_writes_any_more_is_refused() {
    let read_only = |read_only| {
        let file: File = TempFile::new().unwrap().into_file();
        Disk::new(file, read_only).unwrap()
    };
    for (was_writable, is_read_only, refused) in [
        (true, true, true),
        (true, false, false),
        (false, true, false),
        (false, false, false),
    ] {
        let state = BlockState {
            is_writable: was_writable,
            ..BlockState::default()
        };
        let disk = read_only(is_read_only);
        let made = Block::new(disk, "disk", true, RateLimiter::default(), &state, 0);
        let error = made.err().map(|error| error.to_string());
        assert_eq!(error, refused.then(|| StateError::ReadOnly.to_string()));
    }
}

#[test]
fn features_when_the_device_does_not_have_them_are_named() {
    let bench = bench();
    super::start(&bench.registers, EVENT_IDX | 1 << 9 | 1 << 2, &[]);
    bench.handle.pause(1).unwrap();
    next(&bench.replies);
    bench.handle.save(2).unwrap();
    next(&bench.replies);
    let saved = bench.handle.take_saved().unwrap();
    let start = Start::saved(saved.registers, saved.worker.into());
    // Without flushes.
    let limiter = RateLimiter::default();
    let block = Block::new(disk(64), "disk", false, limiter, &saved.device, 0).unwrap();
    let error = bench_of(block, &ram(), &start).err().unwrap().to_string();
    let expected =
        "its guest uses features that the device does not offer here: VIRTIO_BLK_F_FLUSH;";
    assert!(error.starts_with(expected), "{error}");
}

#[test]
fn registers_and_worker_when_they_disagree_are_refused() {
    let bench = bench();
    let rings = Rings::new(&bench.ram, BASE, 16);
    super::start(&bench.registers, 0, &[rings.layout()]);
    bench.handle.pause(1).unwrap();
    next(&bench.replies);
    bench.handle.save(2).unwrap();
    next(&bench.replies);
    let saved = bench.handle.take_saved().unwrap();
    for (status, needs_reset, phase, member) in [
        (15, false, Phase::Active, ""),
        (15, false, Phase::Idle, "`phase`"),
        (15, false, Phase::Broken, "`phase`"),
        (15, true, Phase::Active, "`phase`"),
        // A broken device has no queues.
        (15, true, Phase::Broken, "`queues`"),
        (11, false, Phase::Active, "`phase`"),
        (11, false, Phase::Idle, "`queues`"),
    ] {
        let mut saved = saved.clone();
        saved.registers.status = status;
        saved.registers.needs_reset = needs_reset;
        saved.worker.phase = phase;
        let start = Start::saved(saved.registers, saved.worker.into());
        let made = bench_of(new_block(), &bench.ram, &start);
        let error = made
            .err()
            .map_or_else(String::new, |error| error.to_string());
        assert!(error.contains(member), "{status} {phase:?}: {error}");
        assert_eq!(
            error.is_empty(),
            member.is_empty(),
            "{status} {phase:?}: {error}"
        );
    }
}
