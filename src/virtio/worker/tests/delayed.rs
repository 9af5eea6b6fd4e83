//! The loop with a device whose requests end later, as an asynchronous engine's do.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::super::super::queue::{Chain, Popped};
use super::super::super::testing::{Rings, mailbox, next, ram, start, wait_until};
use super::super::super::{
    BrokenRing, ConfigSpace, DeviceControl, DeviceHandle, Progress, Queue, QueueLayout, QueueSet,
    Ram, Registers, Updated, feature,
};
use super::super::*;
use crate::bus::{Registers as _, Ticket, Written};
use crate::metrics::Report;

const BASE: u64 = 0x10000;
const DATA: u64 = 0x30000;

/// What the test and the device share.
#[derive(Debug, Default)]
struct Host {
    /// How many requests the host has ended so far.
    ended: AtomicUsize,
    /// How many the device has begun.
    begun: AtomicUsize,
    updates: AtomicUsize,
}

/// Each request writes its number to its buffer when it ends, and not before the test says so.
struct Delayed {
    host: Arc<Host>,
    wake: EventFd,
    ram: Ram,
    chain: Chain,
    /// Heads and buffers, in the order in which they were begun.
    flying: Vec<(u16, u64)>,
    ended: Vec<u16>,
    seen: usize,
}

impl Device for Delayed {
    plain!();
    const QUEUES: &'static [u16] = &[16, 16, 16];
    const UNITS_MAY_WAIT: bool = false;
    type State = ();

    fn sources(&self) -> Vec<RawFd> {
        vec![self.wake.as_raw_fd()]
    }

    fn process(
        &mut self,
        index: usize,
        queue: &mut Queue,
        ram: &Ram,
    ) -> Result<Progress, BrokenRing> {
        if self.complete(index, queue, ram)? == Progress::More {
            return Ok(Progress::More);
        }
        match queue.pop(ram, &mut self.chain)? {
            Popped::Empty => return Ok(Progress::Wait),
            Popped::Chain => {}
            Popped::Malformed(error) => panic!("{error:?}"),
        }
        let buffer = self.chain.writable()[0].addr;
        self.flying.push((self.chain.head(), buffer.0));
        self.host.begun.fetch_add(1, Ordering::SeqCst);
        Ok(Progress::More)
    }

    fn in_flight(&self) -> usize {
        self.flying.len()
    }

    fn complete(&mut self, _: usize, queue: &mut Queue, ram: &Ram) -> Result<Progress, BrokenRing> {
        let Some(head) = self.ended.pop() else {
            return Ok(Progress::Wait);
        };
        queue.add_used(ram, head, 4)?;
        Ok(Progress::More)
    }

    fn backend(&mut self, _: usize) -> QueueSet {
        let ended = self.host.ended.load(Ordering::SeqCst);
        for _ in self.seen..ended {
            let (head, buffer) = self.flying.remove(0);
            self.ram
                .write_obj(u32::from(head) + 1, GuestAddress(buffer))
                .unwrap();
            self.ended.insert(0, head);
        }
        self.seen = ended;
        QueueSet::one(LAST)
    }

    fn update(&mut self, (): ()) -> Updated {
        assert!(self.flying.is_empty());
        self.host.updates.fetch_add(1, Ordering::SeqCst);
        Updated::default()
    }

    fn state_buffer() {}

    fn save(&self, (): &mut ()) {}

    fn reset(&mut self) {
        assert!(self.flying.is_empty());
        self.ended.clear();
    }
}

/// The queue that is used: a device may have more than two.
const LAST: usize = 2;

struct Bench {
    ram: Ram,
    registers: Arc<Registers>,
    handle: DeviceHandle<Delayed>,
    thread: Option<JoinHandle<Worker<Delayed>>>,
    host: Arc<Host>,
    wake: EventFd,
    line: EventFd,
    replies: Inbox<WorkerReply>,
    _events: Inbox<WorkerEvent>,
}

fn bench() -> Bench {
    let ram = ram();
    let host = Arc::new(Host::default());
    let event = || EventFd::new(EFD_NONBLOCK).unwrap();
    let (wake, line) = (event(), event());
    let device = Delayed {
        host: Arc::clone(&host),
        wake: wake.try_clone().unwrap(),
        ram: ram.clone(),
        chain: Chain::new(),
        flying: Vec::new(),
        ended: Vec::new(),
        seen: 0,
    };
    let (to_replies, replies) = mailbox();
    let (to_events, events) = mailbox();
    let irqfd = line.try_clone().unwrap();
    let (registers, worker, handle) = attach(
        device,
        "delayed",
        &Start::default(),
        ram.clone(),
        irqfd,
        to_replies,
        to_events,
    )
    .unwrap();
    Bench {
        ram,
        registers,
        handle,
        thread: Some(thread::spawn(move || worker.run())),
        host,
        wake,
        line,
        replies,
        _events: events,
    }
}

impl Bench {
    /// Activates the device with `count` requests on its last queue, which all begin.
    fn begin<'a>(&'a self, count: u16) -> Rings<'a> {
        let rings = Rings::new(&self.ram, BASE, 16);
        let already = self.begun();
        for head in 0..count {
            self.ram.write_obj(0u32, at(head)).unwrap();
            rings.offer_chain(head, &[(at(head).0, 4, true)]);
        }
        let unused = QueueLayout::default();
        start(&self.registers, 0, &[unused, unused, rings.layout()]);
        wait_until("all are in flight", || {
            self.begun() == already + usize::from(count)
        });
        rings
    }

    fn begun(&self) -> usize {
        self.host.begun.load(Ordering::SeqCst)
    }

    /// Offers request `head` and kicks; returns once the worker has noticed.
    fn offer(&self, rings: &Rings<'_>, head: u16) {
        let kicks = self.handle.worker_counters().kicks(LAST);
        rings.offer_chain(head, &[(at(head).0, 4, true)]);
        self.registers.kicks()[LAST].write(1).unwrap();
        wait_until("the kick is noticed", || {
            self.handle.worker_counters().kicks(LAST) > kicks
        });
    }

    /// Lets the host end `count` requests.
    fn end(&self, count: usize) {
        self.host.ended.fetch_add(count, Ordering::SeqCst);
        self.wake.write(1).unwrap();
    }

    fn written(&self, head: u16) -> u32 {
        self.ram.read_obj(at(head)).unwrap()
    }

    /// Writes 0 to Status; the reset is under way then.
    fn begin_reset(&self) -> Ticket {
        match self.registers.write(0x70, &[0; 4]) {
            Written::After(ticket) => ticket,
            other => panic!("{other:?}"),
        }
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.end(self.begun() - self.host.ended.load(Ordering::SeqCst));
        if let Some(thread) = self.thread.take() {
            self.handle.stop().unwrap();
            thread.join().unwrap();
        }
    }
}

/// Where request `head` has its buffer.
fn at(head: u16) -> GuestAddress {
    GuestAddress(DATA + u64::from(head) * 16)
}

#[test]
fn requests_when_they_end_later_are_returned_and_announced() {
    let bench = bench();
    let mut rings = bench.begin(3);
    assert_eq!(rings.take(), None);
    for head in 0..3 {
        bench.end(1);
        assert_eq!(rings.wait(), (u32::from(head), 4));
        assert_eq!(bench.written(head), u32::from(head) + 1);
        wait_until("the interrupt", || bench.line.read().is_ok());
    }
}

#[test]
fn pause_when_requests_are_in_flight_waits_for_all_and_begins_none() {
    let bench = bench();
    let mut rings = bench.begin(3);
    bench.handle.pause(7).unwrap();
    bench.end(1);
    // What has ended is returned at once; what is new is left in the ring.
    assert_eq!(rings.wait(), (0, 4));
    bench.offer(&rings, 3);
    assert!(bench.replies.next().is_none());
    bench.end(2);
    let reply = next(&bench.replies);
    assert!(matches!((reply.token, reply.done), (7, Done::Paused)));
    assert_eq!(rings.used_index(), 3, "all were returned before the answer");
    assert_eq!(bench.begun(), 3);
    bench.handle.resume(8).unwrap();
    assert!(matches!(next(&bench.replies).done, Done::Resumed));
    wait_until("the fourth begins", || bench.begun() == 4);
}

#[test]
fn pauses_when_more_come_while_one_waits_are_all_answered_in_order() {
    let bench = bench();
    let _rings = bench.begin(1);
    for token in 1..=3 {
        bench.handle.pause(token).unwrap();
    }
    bench.handle.update(4, ()).unwrap();
    bench.handle.resume(5).unwrap();
    bench.end(1);
    let answers: Vec<WorkerReply> = (0..5).map(|_| next(&bench.replies)).collect();
    let tokens: Vec<u64> = answers.iter().map(|answer| answer.token).collect();
    assert_eq!(tokens, [1, 2, 3, 4, 5]);
    for paused in &answers[..3] {
        assert!(matches!(paused.done, Done::Paused));
    }
    assert!(matches!(answers[3].done, Done::Updated { .. }));
    assert!(matches!(answers[4].done, Done::Resumed));
}

#[test]
fn resume_when_the_pause_still_waits_calls_it_off() {
    let bench = bench();
    let rings = bench.begin(1);
    bench.handle.pause(1).unwrap();
    bench.handle.resume(2).unwrap();
    let reply = next(&bench.replies);
    assert!(matches!((reply.token, reply.done), (2, Done::Resumed)));
    // The first request never ends; others go on beside it.
    bench.offer(&rings, 1);
    wait_until("the second begins", || bench.begun() == 2);
    // A new pause waits for both.
    bench.handle.pause(3).unwrap();
    bench.end(2);
    let reply = next(&bench.replies);
    assert!(matches!((reply.token, reply.done), (3, Done::Paused)));
    assert_eq!(rings.used_index(), 2);
}

#[test]
fn update_when_requests_are_in_flight_waits_and_keeps_its_order() {
    let bench = bench();
    let rings = bench.begin(2);
    bench.handle.update(1, ()).unwrap();
    bench.handle.pause(2).unwrap();
    bench.offer(&rings, 2);
    bench.end(1);
    wait_until("one is returned", || rings.used_index() == 1);
    assert_eq!(bench.host.updates.load(Ordering::SeqCst), 0);
    assert!(bench.replies.next().is_none());
    bench.end(1);
    let reply = next(&bench.replies);
    assert!(matches!(
        (reply.token, reply.done),
        (1, Done::Updated { .. })
    ));
    let reply = next(&bench.replies);
    assert!(matches!((reply.token, reply.done), (2, Done::Paused)));
    assert_eq!(bench.begun(), 2, "the pause came before the third");
}

#[test]
fn reset_when_requests_are_in_flight_waits_and_writes_nothing_afterwards() {
    let bench = bench();
    let rings = bench.begin(3);
    let first = bench.begin_reset();
    let second = bench.begin_reset();
    bench.end(1);
    wait_until("the first has ended", || bench.written(0) == 1);
    assert!(!first.is_done());
    bench.end(2);
    wait_until("both resets are done", || {
        first.is_done() && second.is_done()
    });
    assert_eq!(bench.handle.worker_counters().resets.get(), 2);
    // After further kicks and ends the old rings stay as they are.
    let used = rings.used_index();
    bench.offer(&rings, 3);
    bench.handle.update(1, ()).unwrap();
    next(&bench.replies);
    assert_eq!((rings.used_index(), bench.begun()), (used, 3));
    assert!(bench.line.read().is_err(), "no interrupt");
    // And the device comes back.
    let mut rings = bench.begin(1);
    bench.end(1);
    assert_eq!(rings.wait(), (0, 4));
}

#[test]
fn pause_and_reset_when_they_meet_are_both_done() {
    let bench = bench();
    // A reset while a pause waits: the vCPU is let go when the pause is answered.
    let _rings = bench.begin(2);
    bench.handle.pause(1).unwrap();
    let ticket = bench.begin_reset();
    bench.end(1);
    wait_until("the first has ended", || bench.written(0) == 1);
    assert!(!ticket.is_done());
    bench.end(1);
    assert!(matches!(next(&bench.replies).done, Done::Paused));
    assert!(ticket.is_done());
    bench.handle.resume(2).unwrap();
    next(&bench.replies);
    // A pause while a reset waits.
    let _rings = bench.begin(2);
    let ticket = bench.begin_reset();
    bench.handle.pause(3).unwrap();
    bench.end(1);
    wait_until("the first has ended", || bench.written(0) == 1);
    assert!(!ticket.is_done() && bench.replies.next().is_none());
    bench.end(1);
    assert!(matches!(next(&bench.replies).done, Done::Paused));
    assert!(ticket.is_done());
}

#[test]
fn pause_when_the_ring_broke_still_waits_for_what_is_in_flight() {
    let bench = bench();
    let rings = bench.begin(2);
    rings.set_avail_index(1000);
    bench.registers.kicks()[LAST].write(1).unwrap();
    wait_until("the ring is broken", || {
        bench.handle.worker_counters().broken.get() == 1
    });
    bench.handle.pause(1).unwrap();
    bench.end(1);
    wait_until("the first has ended", || bench.written(0) == 1);
    assert!(bench.replies.next().is_none());
    bench.end(1);
    assert!(matches!(next(&bench.replies).done, Done::Paused));
    assert_eq!(bench.written(1), 2);
    assert_eq!(rings.used_index(), 0);
    let ticket = bench.begin_reset();
    wait_until("the reset is done", || ticket.is_done());
    bench.handle.resume(2).unwrap();
    next(&bench.replies);
    let mut rings = bench.begin(1);
    bench.end(1);
    assert_eq!(rings.wait(), (0, 4));
}

#[test]
fn stop_when_requests_are_in_flight_waits_for_them() {
    let mut bench = bench();
    let thread = bench.thread.take().unwrap();
    let rings = bench.begin(2);
    bench.handle.stop().unwrap();
    bench.end(1);
    wait_until("one is returned", || rings.used_index() == 1);
    assert!(!thread.is_finished());
    bench.end(1);
    thread.join().unwrap();
    assert_eq!(rings.used_index(), 2);
}
