//! The loop with the block device, whose units end what they begin. `delayed` has the loop with
//! requests in flight, `polling` with a clock of the test's, `slow` with units that take long, `several` with workers that share a device, `saved` with workers that are saved and made
//! anew, `hostile` with states that were spoilt.

/// What the test devices here do not need: they offer nothing of their own, have no configuration and count
/// nothing.
macro_rules! plain {
    () => {
        const ID: u32 = 2;
        const FEATURES: &'static [(u64, &'static str)] = &[];
        type Update = ();
        type Counters = ();

        fn features(&self) -> u64 {
            feature::COMMON
        }

        fn config(&self) -> ConfigSpace {
            ConfigSpace::new()
        }

        fn counters(&self) -> Arc<()> {
            Arc::new(())
        }

        fn add_counters((): &(), (): &()) {}
        fn read_counters((): &(), _: &WorkerCounters, _: &str, _: &mut Report) {}

        fn activate(&mut self, _: u64) -> io::Result<()> {
            Ok(())
        }
    };
}

mod delayed;
mod hostile;
mod polling;
mod saved;
mod several;
mod slow;

use super::super::block::{self, Block, BlockState, Disk};
use super::super::testing::{Rings, mailbox, next, ram, read32, reset, start, wait_until, write32};
use super::super::{DeviceControl, QueueLayout};
use super::*;
use crate::bus::Registers as _;
use crate::inbox::Inbox;
use crate::rate_limiter::{BucketUpdate, RateLimiter, RateLimiterUpdate, TokenBucket};
use crate::sys::testing::allocator_calls;
use std::fs::File;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EFD_NONBLOCK;
use vmm_sys_util::tempfile::TempFile;

const BASE: u64 = 0x10000;
const HEAD: u64 = 0x20000;
const DATA: u64 = 0x30000;
const STATUS: u64 = 0x2f000;
pub(super) const EVENT_IDX: u64 = super::super::feature::EVENT_IDX;

struct Bench {
    ram: Ram,
    registers: Arc<Registers>,
    handle: DeviceHandle<Block>,
    thread: Option<JoinHandle<Worker<Block>>>,
    line: EventFd,
    replies: Inbox<WorkerReply>,
    _events: Inbox<WorkerEvent>,
}

fn disk(sectors: u64) -> Disk {
    let file: File = TempFile::new().unwrap().into_file();
    file.set_len(sectors * 512).unwrap();
    Disk::new(file, false).unwrap()
}

fn bench() -> Bench {
    let block = new_block();
    bench_of(block, &ram(), &Start::default()).unwrap()
}

fn new_block() -> Block {
    let limiter = RateLimiter::default();
    Block::new(disk(64), "disk", true, limiter, &BlockState::default(), 0).unwrap()
}

fn bench_of(block: Block, ram: &Ram, start: &Start) -> io::Result<Bench> {
    let line = EventFd::new(EFD_NONBLOCK).unwrap();
    let (to_replies, replies) = mailbox();
    let (to_events, events) = mailbox();
    let irqfd = line.try_clone().unwrap();
    let (registers, worker, handle) = attach(
        block,
        "disk",
        start,
        ram.clone(),
        irqfd,
        to_replies,
        to_events,
    )?;
    Ok(Bench {
        ram: ram.clone(),
        registers,
        handle,
        thread: Some(thread::spawn(move || worker.run())),
        line,
        replies,
        _events: events,
    })
}

impl Bench {
    /// Offers a request for the serial number, beginning at descriptor `first`.
    fn offer(&self, rings: &Rings<'_>, first: u16) {
        let mut header = [0; 16];
        header[0] = 8;
        self.ram.write_slice(&header, GuestAddress(HEAD)).unwrap();
        rings.offer_chain(
            first,
            &[(HEAD, 16, false), (DATA, 20, true), (STATUS, 1, true)],
        );
    }

    fn kick(&self) {
        self.registers.kicks()[0].write(1).unwrap();
    }

    /// Kicks, and returns once the worker has noticed.
    fn kick_and_wait(&self) {
        let kicks = self.handle.worker_counters().kicks(0);
        self.kick();
        wait_until("the kick is noticed", || {
            self.handle.worker_counters().kicks(0) > kicks
        });
    }

    /// Returns once the worker has done all that it had to do before this call.
    fn round_trip(&self) {
        self.handle.update(99, block::Update::default()).unwrap();
        assert_eq!(next(&self.replies).token, 99);
    }

    fn wait_for_status(&self, status: u32) {
        wait_until("the status changes", || {
            read32(&self.registers, 0x70) == status
        });
    }

    fn stop(&mut self) -> Worker<Block> {
        self.handle.stop().unwrap();
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.stop();
        }
    }
}

#[test]
fn kick_when_before_the_activation_is_not_lost() {
    let bench = bench();
    let mut rings = Rings::new(&bench.ram, BASE, 16);
    bench.offer(&rings, 0);
    bench.kick_and_wait();
    start(&bench.registers, 0, &[rings.layout()]);
    assert_eq!(rings.wait(), (0, 21));
    // And without any kick at all.
    reset(&bench.registers);
    let mut rings = Rings::new(&bench.ram, BASE, 16);
    bench.offer(&rings, 0);
    start(&bench.registers, 0, &[rings.layout()]);
    assert_eq!(rings.wait(), (0, 21));
    bench.offer(&rings, 3);
    bench.kick();
    assert_eq!(rings.wait(), (3, 21));
    assert!(bench.line.read().is_ok());
    assert_eq!(read32(&bench.registers, 0x60), 1);
}

#[test]
fn worker_when_not_kicked_or_not_active_sleeps() {
    let bench = bench();
    bench.kick_and_wait();
    let rings = Rings::new(&bench.ram, BASE, 16);
    start(&bench.registers, EVENT_IDX, &[rings.layout()]);
    bench.kick_and_wait();
    // Each round trip is a wake-up: kicks that are left unread make no further events.
    for _ in 0..100 {
        bench.round_trip();
    }
    assert_eq!(bench.handle.worker_counters().kicks(0), 2);
}

#[test]
fn interrupts_when_event_index_is_far_do_not_come() {
    let mut bench = bench();
    let mut rings = Rings::new(&bench.ram, BASE, 16);
    rings.set_used_event(2);
    start(&bench.registers, EVENT_IDX, &[rings.layout()]);
    for _ in 0..3 {
        bench.offer(&rings, 0);
        bench.kick();
        rings.wait();
    }
    bench.stop();
    assert_eq!(bench.line.read().unwrap(), 1);
}

#[test]
fn pause_when_answered_leaves_guest_memory_alone() {
    let bench = bench();
    let mut rings = Rings::new(&bench.ram, BASE, 16);
    start(&bench.registers, 0, &[rings.layout()]);
    bench.handle.pause(7).unwrap();
    let reply = next(&bench.replies);
    assert_eq!((&*reply.device, reply.token), ("disk", 7));
    assert!(matches!(reply.done, Done::Paused));
    bench.offer(&rings, 0);
    bench.kick_and_wait();
    bench.round_trip();
    assert_eq!(rings.take(), None);
    // Twice is fine, and updates are answered.
    bench.handle.pause(8).unwrap();
    assert_eq!(next(&bench.replies).token, 8);
    bench.handle.update(9, block::Update::default()).unwrap();
    assert_eq!(next(&bench.replies).token, 9);
    bench.round_trip();
    assert_eq!(rings.take(), None);
    bench.handle.resume(10).unwrap();
    assert!(matches!(next(&bench.replies).done, Done::Resumed));
    assert_eq!(rings.wait(), (0, 21));
}

#[test]
fn messages_of_the_driver_before_a_pause_are_done_before_its_answer() {
    let bench = bench();
    for round in 0..200 {
        let mut rings = Rings::new(&bench.ram, BASE, 16);
        bench.offer(&rings, 0);
        start(&bench.registers, 0, &[rings.layout()]);
        bench.handle.pause(round).unwrap();
        assert_eq!(next(&bench.replies).token, round);
        assert_eq!(bench.handle.worker_counters().activations.get(), round + 1);
        // A vCPU whose reset is under way is not left waiting by the pause.
        reset(&bench.registers);
        assert_eq!(rings.used_index() | 1, 1);
        rings.take();
        bench.handle.resume(round).unwrap();
        next(&bench.replies);
    }
}

#[test]
fn ring_when_broken_asks_for_a_reset_and_comes_back() {
    let bench = bench();
    for round in 1..20 {
        let mut rings = Rings::new(&bench.ram, BASE, 16);
        start(&bench.registers, 0, &[rings.layout()]);
        bench.offer(&rings, 0);
        rings.set_avail_index(100);
        bench.kick();
        bench.wait_for_status(0x4f);
        assert_eq!(read32(&bench.registers, 0x60), 2);
        assert_eq!(bench.handle.worker_counters().broken.get(), round);
        // It does nothing more until it is reset.
        rings.set_avail_index(1);
        bench.kick_and_wait();
        bench.round_trip();
        assert_eq!(rings.take(), None);
        reset(&bench.registers);
        assert_eq!(read32(&bench.registers, 0x60), 0);
        let mut rings = Rings::new(&bench.ram, BASE, 16);
        bench.offer(&rings, 0);
        start(&bench.registers, 0, &[rings.layout()]);
        assert_eq!(rings.wait(), (0, 21));
        reset(&bench.registers);
    }
}

#[test]
fn layout_when_impossible_asks_for_a_reset() {
    let bench = bench();
    let good = Rings::new(&bench.ram, BASE, 16).layout();
    for layout in [
        QueueLayout { size: 7, ..good },
        QueueLayout { size: 512, ..good },
        QueueLayout {
            used: u64::MAX,
            ..good
        },
        QueueLayout {
            avail: 1 << 40,
            ..good
        },
    ] {
        start(&bench.registers, 0, &[layout]);
        bench.wait_for_status(0x4f);
        reset(&bench.registers);
    }
    // A queue that the driver does not use is no fault.
    start(&bench.registers, 0, &[]);
    bench.kick_and_wait();
    bench.round_trip();
    assert_eq!(read32(&bench.registers, 0x70), 15);
}

#[test]
fn resets_when_thousands_bring_the_device_back_each_time() {
    let bench = bench();
    let fds = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let before = fds();
    for _ in 0..5000 {
        let mut rings = Rings::new(&bench.ram, BASE, 16);
        start(&bench.registers, 0, &[rings.layout()]);
        bench.offer(&rings, 0);
        bench.kick();
        reset(&bench.registers);
        // Nothing is done any more.
        let done = rings.used_index();
        assert!(done <= 1);
        rings.take();
    }
    let mut rings = Rings::new(&bench.ram, BASE, 16);
    bench.offer(&rings, 0);
    start(&bench.registers, 0, &[rings.layout()]);
    assert_eq!(rings.wait(), (0, 21));
    assert_eq!(bench.handle.worker_counters().resets.get(), 5000);
    // Other tests run beside this one.
    assert!(fds() < before + 500);
}

#[test]
fn reset_when_the_driver_never_stops_offering_comes_through() {
    let bench = bench();
    let rings = Rings::new(&bench.ram, BASE, 256);
    start(&bench.registers, 0, &[rings.layout()]);
    for i in 0..80 {
        bench.offer(&rings, i * 3);
    }
    // More than a turn's worth, offered again and again.
    for round in 0..200u16 {
        rings.set_avail_index(80u16.wrapping_add(round));
        bench.kick();
    }
    reset(&bench.registers);
}

#[test]
fn update_when_applied_answers_with_config_and_the_old_file() {
    let bench = bench();
    let mut rings = Rings::new(&bench.ram, BASE, 16);
    start(&bench.registers, 0, &[rings.layout()]);
    let update = block::Update {
        disk: Some(Box::new(disk(5))),
        reset: None,
        limits: RateLimiterUpdate {
            ops: BucketUpdate::Replace(TokenBucket::new(1, 0, 100)),
            ..RateLimiterUpdate::default()
        },
        number: 0,
    };
    bench.handle.update(1, update).unwrap();
    let Done::Updated {
        config, replaced, ..
    } = next(&bench.replies).done
    else {
        panic!("no update");
    };
    let replaced = replaced.unwrap().downcast::<Disk>().unwrap();
    assert_eq!(replaced.sectors(), 64);
    bench.registers.set_config(config.unwrap());
    let mut capacity = [0; 8];
    bench.registers.read(0x100, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), 5);
    assert_eq!(read32(&bench.registers, 0x60) & 2, 2);
    // The limiter's timer brings the queue back by itself.
    let since = Instant::now();
    for first in [0, 3, 6] {
        bench.offer(&rings, first);
    }
    bench.kick();
    for first in [0, 3, 6] {
        assert_eq!(rings.wait(), (first, 21));
    }
    assert!(since.elapsed() >= Duration::from_millis(190));
}

#[test]
fn worker_when_it_runs_does_not_touch_the_allocator() {
    let mut bench = bench();
    bench.stop();
    let ram = bench.ram.clone();
    let block = new_block();
    let (to_replies, replies) = mailbox();
    let (to_events, _events) = mailbox();
    let line = bench.line.try_clone().unwrap();
    let (registers, mut worker, handle) = attach(
        block,
        "disk",
        &Start::default(),
        ram.clone(),
        line,
        to_replies,
        to_events,
    )
    .unwrap();
    worker.poll_up_to(50);
    let thread = thread::spawn(move || {
        worker.enter_thread(false);
        let before = allocator_calls();
        let worker = worker.run();
        (allocator_calls() - before, worker)
    });
    for round in 0..10 {
        let mut rings = Rings::new(&ram, BASE, 16);
        start(&registers, EVENT_IDX, &[rings.layout()]);
        bench.offer(&rings, 0);
        rings.offer_chain(4, &[(HEAD, 0, false)]);
        registers.kicks()[0].write(1).unwrap();
        rings.wait();
        rings.wait();
        handle.pause(round).unwrap();
        let update = block::Update {
            disk: Some(Box::new(disk(8))),
            reset: None,
            limits: RateLimiterUpdate {
                bandwidth: BucketUpdate::Replace(TokenBucket::new(1000, 0, 10)),
                ..RateLimiterUpdate::default()
            },
            number: 0,
        };
        handle.update(round, update).unwrap();
        handle.resume(round).unwrap();
        for _ in 0..3 {
            next(&replies);
        }
        rings.set_avail_index(1000);
        registers.kicks()[0].write(1).unwrap();
        reset(&registers);
    }
    handle.stop().unwrap();
    let (calls, _worker) = thread.join().unwrap();
    assert_eq!(calls, 0);
}

#[test]
fn resume_when_the_inbox_is_full_is_remembered_as_missed() {
    let block = new_block();
    let (to_replies, replies) = mailbox();
    let (to_events, _events) = mailbox();
    let line = EventFd::new(EFD_NONBLOCK).unwrap();
    let (_registers, worker, handle) = attach(
        block,
        "disk",
        &Start::default(),
        ram(),
        line,
        to_replies,
        to_events,
    )
    .unwrap();
    for token in 0..CONTROL_MESSAGES as u64 {
        handle.pause(token).unwrap();
    }
    assert!(handle.resume(100).is_err() && handle.has_missed());
    let thread = thread::spawn(move || worker.run());
    next(&replies);
    handle.resume(100).unwrap();
    assert!(!handle.has_missed());
    let mut last = next(&replies);
    while last.token != 100 {
        last = next(&replies);
    }
    assert!(matches!(last.done, Done::Resumed));
    handle.stop().unwrap();
    thread.join().unwrap();
}

#[test]
fn stop_when_asked_gives_the_worker_back() {
    let mut bench = bench();
    let rings = Rings::new(&bench.ram, BASE, 16);
    start(&bench.registers, 0, &[rings.layout()]);
    let worker = bench.stop();
    drop(worker);
    // The registers live on without it, and keep no vCPU waiting.
    reset(&bench.registers);
    write32(&bench.registers, 0x70, 1);
    assert!(bench.handle.pause(1).is_err());
}
