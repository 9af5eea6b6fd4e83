//! The loop while it polls, with a clock of the test's and a device that the test looks through: what
//! happens between two looks is done in its `poll`.

use std::cell::Cell;
use std::os::fd::RawFd;
use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::super::super::queue::{Chain, Popped};
use super::super::super::testing::{Rings, mailbox, ram, start};
use super::super::super::{
    BrokenRing, ConfigSpace, DeviceControl, DeviceHandle, Progress, Queue, QueueSet, Ram,
    Registers, Updated, feature,
};
use super::super::polling::Polling;
use super::super::*;
use super::EVENT_IDX;
use crate::inbox::Inbox;
use crate::metrics::Report;

const BASE: u64 = 0x10000;
const DATA: u64 = 0x30000;

thread_local! {
    static NOW: Cell<u64> = const { Cell::new(1_000_000) };
}

/// Each look at it takes a microsecond.
fn clock() -> u64 {
    NOW.set(NOW.get() + 1000);
    NOW.get()
}

/// What happens at the n-th look since the last turn that did work.
type OnLook = Box<dyn FnMut(u32) -> QueueSet + Send>;

struct Looked {
    chain: Chain,
    on_look: OnLook,
    looks: u32,
    /// It waits for its host and leaves its queue alone.
    is_stuck: bool,
}

impl Device for Looked {
    plain!();
    const QUEUES: &'static [u16] = &[16];
    const UNITS_MAY_WAIT: bool = false;
    type State = ();

    fn sources(&self) -> Vec<RawFd> {
        Vec::new()
    }

    fn process(&mut self, _: usize, queue: &mut Queue, ram: &Ram) -> Result<Progress, BrokenRing> {
        if self.is_stuck {
            return Ok(Progress::Wait);
        }
        match queue.pop(ram, &mut self.chain)? {
            Popped::Empty => return Ok(Progress::Wait),
            _ => queue.add_used(ram, self.chain.head(), 0)?,
        }
        self.looks = 0;
        Ok(Progress::More)
    }

    fn backend(&mut self, _: usize) -> QueueSet {
        QueueSet::NONE
    }

    fn poll(&mut self) -> QueueSet {
        self.looks += 1;
        assert!(self.looks < 10_000, "it polls for ever");
        (self.on_look)(self.looks)
    }

    fn update(&mut self, (): ()) -> Updated {
        Updated::default()
    }

    fn state_buffer() {}

    fn save(&self, (): &mut ()) {}

    fn reset(&mut self) {}
}

struct Bench {
    worker: Worker<Looked>,
    handle: DeviceHandle<Looked>,
    _registers: Arc<Registers>,
    replies: Inbox<WorkerReply>,
    _events: Inbox<WorkerEvent>,
}

/// A driver's side that is not tied to the lifetime of another.
fn offer(ram: &Ram, head: u16) {
    use vm_memory::{Bytes, GuestAddress};
    let at = GuestAddress(BASE + 0x2002);
    let index: u16 = ram.read_obj(at).unwrap();
    let slot = GuestAddress(BASE + 0x2004 + 2 * u64::from(index % 16));
    ram.write_obj(head, slot).unwrap();
    ram.write_obj(index.wrapping_add(1), at).unwrap();
}

impl Bench {
    /// A worker that has just done a request, was woken soon after, and has a window of 10 microseconds.
    fn new(rings: &Rings<'_>, on_look: OnLook) -> Self {
        let device = Looked {
            chain: Chain::new(),
            on_look: Box::new(|_| QueueSet::NONE),
            looks: 0,
            is_stuck: false,
        };
        let (to_replies, replies) = mailbox();
        let (to_events, events) = mailbox();
        let irqfd = EventFd::new(EFD_NONBLOCK).unwrap();
        let (registers, worker, handle) = attach(
            device,
            "looked",
            &Start::default(),
            rings.ram.clone(),
            irqfd,
            to_replies,
            to_events,
        )
        .unwrap();
        start(&registers, EVENT_IDX, &[rings.layout()]);
        let mut bench = Bench {
            worker,
            handle,
            _registers: registers,
            replies,
            _events: events,
        };
        bench.body().set_polling(Polling::up_to(50), clock);
        rings.offer_chain(0, &[(DATA, 1, true)]);
        assert_eq!(bench.body().work(), Turn::Wait);
        assert_eq!(rings.avail_event(), 1);
        bench.body().woke();
        offer(rings.ram, 0);
        bench.body().kicked(0);
        bench.body().device_mut().on_look = on_look;
        bench
    }

    fn body(&mut self) -> &mut WorkerLoop<Looked> {
        let id = self.worker.id;
        &mut self.worker.manager.subscriber_mut(id).unwrap().body
    }

    /// Polls that paid, and in vain.
    fn polls(&self) -> (u64, u64) {
        let counters = self.handle.worker_counters();
        (counters.polls_paid.get(), counters.polls_vain.get())
    }
}

#[test]
fn poll_when_nothing_comes_ends_armed_and_asleep() {
    let ram = ram();
    let rings = Rings::new(&ram, BASE, 16);
    let mut bench = Bench::new(&rings, Box::new(|_| QueueSet::NONE));
    assert_eq!(bench.body().work(), Turn::Wait);
    assert_eq!((rings.used_index(), rings.avail_event()), (2, 2));
    assert_eq!(bench.polls(), (0, 1));
    // A wake-up without work is no reason to look again.
    bench.body().device_mut().looks = 0;
    for _ in 0..100 {
        bench.body().woke();
        bench.body().kicked(0);
        assert_eq!(bench.body().work(), Turn::Wait);
    }
    assert_eq!(bench.body().device_mut().looks, 0);
    assert_eq!(bench.polls(), (0, 1));
}

#[test]
fn poll_when_a_chain_comes_serves_it_and_leaves_the_driver_quiet() {
    let ram = ram();
    let rings = Rings::new(&ram, BASE, 16);
    let driver = ram.clone();
    let mut left = 10;
    let mut bench = Bench::new(
        &rings,
        Box::new(move |look| {
            if look == 4 && left > 0 {
                left -= 1;
                offer(&driver, 0);
                // Nothing has asked for a kick since.
                let at = vm_memory::GuestAddress(BASE + 0x3004 + 8 * 16);
                let event: u16 = vm_memory::Bytes::read_obj(&driver, at).unwrap();
                assert_eq!(event, 1);
            }
            QueueSet::NONE
        }),
    );
    assert_eq!(bench.body().work(), Turn::Wait);
    assert_eq!((rings.used_index(), rings.avail_event()), (12, 12));
    assert_eq!(bench.polls(), (10, 1));
}

#[test]
fn poll_when_the_device_names_queues_in_vain_ends_all_the_same() {
    let ram = ram();
    let rings = Rings::new(&ram, BASE, 16);
    let mut bench = Bench::new(&rings, Box::new(|_| QueueSet::one(0)));
    assert_eq!(bench.body().work(), Turn::Wait);
    assert_eq!(bench.polls(), (0, 1));
    assert_eq!(rings.avail_event(), 2);
}

#[test]
fn poll_when_the_index_moves_and_the_device_waits_for_its_host_ends_all_the_same() {
    let ram = ram();
    let rings = Rings::new(&ram, BASE, 16);
    let driver = ram.clone();
    let mut left = 10;
    let mut bench = Bench::new(
        &rings,
        Box::new(move |_| {
            if left > 0 {
                left -= 1;
                offer(&driver, 0);
            }
            QueueSet::NONE
        }),
    );
    bench.body().device_mut().is_stuck = true;
    for _ in 0..10 {
        assert_eq!(bench.body().work(), Turn::Wait);
        bench.body().woke();
        bench.body().kicked(0);
    }
    assert_eq!(bench.polls(), (0, 0));
    // What it left in the ring is not forgotten.
    bench.body().device_mut().is_stuck = false;
    bench.body().kicked(0);
    assert_eq!(bench.body().work(), Turn::Wait);
    assert!(rings.used_index() > 2, "{}", rings.used_index());
}

#[test]
fn poll_when_work_never_ends_looks_at_the_descriptors() {
    let ram = ram();
    let rings = Rings::new(&ram, BASE, 16);
    let driver = ram.clone();
    let mut bench = Bench::new(
        &rings,
        Box::new(move |_| {
            offer(&driver, 0);
            QueueSet::NONE
        }),
    );
    for _ in 0..10 {
        assert_eq!(bench.body().work(), Turn::More);
    }
    assert!(rings.used_index() >= 10);
}

#[test]
fn poll_when_a_pause_comes_answers_it_and_touches_nothing_more() {
    let ram = ram();
    let rings = Rings::new(&ram, BASE, 16);
    let mut bench = Bench::new(&rings, Box::new(|_| QueueSet::NONE));
    bench.handle.pause(7).unwrap();
    assert_eq!(bench.body().work(), Turn::Wait);
    assert_eq!(bench.replies.next().unwrap().token, 7);
    // Neither the chain nor the driver's wish was looked at.
    assert_eq!((rings.used_index(), rings.avail_event()), (1, 1));
    assert_eq!(bench.body().device_mut().looks, 0);
    bench.handle.resume(8).unwrap();
    assert_eq!(bench.body().work(), Turn::Wait);
    assert_eq!((rings.used_index(), rings.avail_event()), (2, 2));
}

#[test]
fn driver_when_the_thread_sleeps_beside_a_throttled_queue_is_not_asked_to_kick() {
    let ram = ram();
    let rings = Rings::new(&ram, BASE, 16);
    let mut bench = Bench::new(&rings, Box::new(|_| QueueSet::NONE));
    bench.body().device_mut().is_stuck = true;
    assert_eq!(bench.body().work(), Turn::Wait);
    assert_eq!((rings.used_index(), rings.avail_event()), (1, 1));
}
