//! The event loop of any device, on a thread of its own.
//!
//! A [`Worker`] owns its device, the live queues, and its view of guest memory. It has two
//! inboxes, one per authority: [`DriverMsg`] from the registers and `ControlMsg` from control.
//!
//! ```text
//!                 Activate                        broken ring, host refuses
//!     Idle  --------------------->  Active  -------------------------------->  Broken
//!       ^                              |  (NEEDS_RESET is shown to the driver)    |
//!       '------------ Reset -----------'------------------- Reset ---------------'
//! ```
//!
//! Events only note what became ready; work is done in one place, `Loop::turn`, in units that
//! the device bounds, at most `UNITS_PER_TURN` of them between two looks at the descriptors,
//! and with a look at both inboxes between any two. Paused, a worker does no unit at all and so
//! touches no guest memory; messages are still answered.
//!
//! Everything is watched edge-triggered: kicks, bells and timers are never read, nothing has to
//! be taken out of the epoll set, and nothing can make it spin. What became ready is remembered
//! in `Loop::runnable` until a device says that there is nothing more to do. Kicks from before the
//! activation need no keeping: an activation looks into every queue.
//!
//! Everything is made by [`attach`], before the thread exists: [`Worker::run`] opens nothing,
//! watches nothing new, and allocates nothing.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use event_manager::{
    EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberId, SubscriberOps,
};
use vmm_sys_util::eventfd::EventFd;

use super::messages::ControlMsg;
use super::registers::{DRIVER_MESSAGES, DriverMsg};
use super::{
    Device, DeviceHandle, Done, Interrupt, MAX_QUEUES, Progress, Queue, QueueLayout, QueueSet, Ram,
    Registers, Updated, WorkerCounters, WorkerEvent, WorkerReply,
};
use crate::guest_warn;
use crate::inbox::{Inbox, Outbox, inbox};
use crate::sys::io::Brief;

/// Units of work between two looks at the descriptors; interrupts are sent at its end.
const UNITS_PER_TURN: u32 = 64;

/// Control waits for an answer before it asks again, but it may give up on one that is late.
const CONTROL_MESSAGES: usize = 16;

/// What an event's number means.
mod token {
    pub const INBOX: u32 = 0;
    pub const KICKS: u32 = 1;
    pub const SOURCES: u32 = 0x100;
}

/// Gives `device` its registers and its worker. The worker's thread is the caller's to make: it
/// installs its filter and calls [`Worker::run`].
///
/// # Errors
/// When the host has no descriptors left, or will not watch one of the device's.
pub fn attach<D: Device>(
    device: D,
    name: &str,
    ram: Ram,
    irqfd: EventFd,
    replies: Outbox<WorkerReply>,
    events: Outbox<WorkerEvent>,
) -> io::Result<(Arc<Registers>, Worker<D>, DeviceHandle<D>)> {
    let name: Arc<str> = Arc::from(name);
    let interrupt = Arc::new(Interrupt::new(irqfd));
    let (to_driver_inbox, driver) = inbox(DRIVER_MESSAGES)?;
    let (to_control_inbox, control) = inbox(CONTROL_MESSAGES)?;
    let registers = Arc::new(Registers::new(
        D::ID,
        device.features(),
        D::QUEUES,
        device.config(),
        Arc::clone(&interrupt),
        to_driver_inbox,
    )?);
    let worker_counters = Arc::new(WorkerCounters::default());
    let handle = DeviceHandle::new(
        Arc::clone(&name),
        to_control_inbox,
        Arc::clone(&registers),
        device.counters(),
        Arc::clone(&worker_counters),
    );
    let watched = watched(&registers, &driver, &control, &device);
    let events_at_once = watched.len();
    let body = Loop {
        name,
        device,
        ram,
        interrupt,
        counters: worker_counters,
        driver,
        control,
        replies,
        phase: Phase::Idle,
        queues: [const { None }; MAX_QUEUES],
        runnable: QueueSet::NONE,
        last: 0,
        paused: false,
        stopped: false,
        watched,
        unwatched: None,
    };
    let mut manager = EventManager::new_with_capacity(events_at_once).map_err(io::Error::other)?;
    let id = manager.add_subscriber(body);
    let body = manager.subscriber_mut(id).map_err(io::Error::other)?;
    if let Some(error) = body.unwatched.take() {
        return Err(io::Error::other(error));
    }
    let worker = Worker {
        manager,
        id,
        events,
    };
    Ok((registers, worker, handle))
}

/// All that a worker watches, with its numbers.
fn watched<D: Device>(
    registers: &Registers,
    driver: &Inbox<DriverMsg>,
    control: &Inbox<ControlMsg<D::Update>>,
    device: &D,
) -> Vec<(RawFd, u32)> {
    let kicks = registers.kicks().iter().map(AsRawFd::as_raw_fd);
    let sources = device.sources();
    let mut all = vec![
        (driver.as_raw_fd(), token::INBOX),
        (control.as_raw_fd(), token::INBOX),
    ];
    all.extend(kicks.zip(token::KICKS..));
    all.extend(sources.into_iter().zip(token::SOURCES..));
    all
}

/// A device's thread, before and while it runs.
pub struct Worker<D: Device> {
    manager: EventManager<Loop<D>>,
    id: SubscriberId,
    events: Outbox<WorkerEvent>,
}

impl<D: Device> Worker<D> {
    /// Works until control says stop. Returns itself, so that whoever joins the thread closes and
    /// frees what it holds.
    pub fn run(mut self) -> Self {
        // Messages from before this call still ring: their edge has not been seen yet.
        let mut wait = Some(0);
        while let Some(millis) = wait {
            let waited = self.manager.run_with_timeout(millis);
            let (Ok(_), Ok(body)) = (&waited, self.manager.subscriber_mut(self.id)) else {
                self.fail();
                break;
            };
            wait = match body.turn() {
                Turn::More => Some(0),
                Turn::Wait => Some(-1),
                Turn::Stopped => None,
            };
        }
        self
    }

    fn fail(&mut self) {
        let error = io::Error::last_os_error();
        if let Ok(body) = self.manager.subscriber_mut(self.id) {
            let _ = self.events.post(WorkerEvent::Failed {
                device: Arc::clone(&body.name),
                error,
            });
        }
    }
}

impl<D: Device> fmt::Debug for Worker<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Worker")
    }
}

/// Where a device is in its life with a driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// No driver.
    Idle,
    /// Serving the queues.
    Active,
    /// Waiting to be reset.
    Broken,
}

/// What the thread does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    /// There is work left.
    More,
    /// Nothing to do before the next event.
    Wait,
    /// Control said stop.
    Stopped,
}

/// The state of a worker.
struct Loop<D: Device> {
    name: Arc<str>,
    device: D,
    ram: Ram,
    interrupt: Arc<Interrupt>,
    counters: Arc<WorkerCounters>,
    driver: Inbox<DriverMsg>,
    control: Inbox<ControlMsg<D::Update>>,
    replies: Outbox<WorkerReply>,
    phase: Phase,
    queues: [Option<Queue>; MAX_QUEUES],
    /// Queues that may have work.
    runnable: QueueSet,
    /// The queue served last, so that each has its turn.
    last: usize,
    paused: bool,
    stopped: bool,
    watched: Vec<(RawFd, u32)>,
    /// Why the set-up failed: event-manager has no way to say so.
    unwatched: Option<event_manager::Error>,
}

impl<D: Device> MutEventSubscriber for Loop<D> {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        for (fd, number) in &self.watched {
            let interest = EventSet::IN | EventSet::EDGE_TRIGGERED;
            if let Err(error) = ops.add(Events::with_data_raw(*fd, *number, interest)) {
                self.unwatched = Some(error);
            }
        }
    }

    fn process(&mut self, events: Events, _: &mut EventOps<'_>) {
        let number = events.data();
        if let Some(source) = number.checked_sub(token::SOURCES) {
            let ready = self.device.backend(source as usize);
            self.runnable.insert(ready);
        } else if let Some(queue) = number.checked_sub(token::KICKS) {
            if let Some(kicks) = self.counters.kicks.get(queue as usize) {
                kicks.one();
            }
            self.runnable.insert(QueueSet::one(queue as usize));
        }
        // The inboxes are looked into in any case.
    }
}

impl<D: Device> Loop<D> {
    fn turn(&mut self) -> Turn {
        self.take_messages();
        for _ in 0..UNITS_PER_TURN {
            let Some(index) = self.next_queue() else {
                break;
            };
            self.unit(index);
            self.take_messages();
        }
        self.announce();
        if self.stopped {
            Turn::Stopped
        } else if self.next_queue().is_some() {
            Turn::More
        } else {
            Turn::Wait
        }
    }

    /// The next queue with work, each in its turn; none when no work may be done.
    fn next_queue(&self) -> Option<usize> {
        if self.paused || self.stopped || self.phase != Phase::Active {
            return None;
        }
        (0..MAX_QUEUES)
            .map(|i| self.last.wrapping_add(1).wrapping_add(i) & (MAX_QUEUES - 1))
            .find(|i| self.runnable.contains(*i))
    }

    fn unit(&mut self, index: usize) {
        self.last = index;
        let Some(Some(queue)) = self.queues.get_mut(index) else {
            self.runnable.remove(QueueSet::one(index));
            return;
        };
        match self.device.process(index, queue, &self.ram) {
            Ok(Progress::More) => {}
            Ok(Progress::Wait) => self.runnable.remove(QueueSet::one(index)),
            Err(broken) => self.break_down(&broken),
        }
    }

    /// Interrupts the driver if it wants to know what was done.
    fn announce(&mut self) {
        if self.paused || self.phase != Phase::Active {
            return;
        }
        let mut wanted = false;
        for queue in self.queues.iter_mut().flatten() {
            match queue.wants_interrupt(&self.ram) {
                Ok(yes) => wanted |= yes,
                Err(broken) => return self.break_down(&broken),
            }
        }
        if wanted {
            self.counters.interrupts.one();
            self.interrupt.used_buffers();
        }
    }

    fn take_messages(&mut self) {
        self.take_driver_messages();
        while let Some(message) = self.control.next() {
            match message {
                ControlMsg::Pause(token) => {
                    // Nothing a vCPU has said may be left for after the pause.
                    self.take_driver_messages();
                    self.announce();
                    self.paused = true;
                    self.reply(token, Done::Paused);
                }
                ControlMsg::Resume(token) => {
                    self.paused = false;
                    self.reply(token, Done::Resumed);
                }
                ControlMsg::Update(token, update) => {
                    let Updated {
                        config,
                        replaced,
                        runnable,
                    } = self.device.update(update);
                    self.runnable.insert(runnable);
                    self.reply(token, Done::Updated { config, replaced });
                }
                ControlMsg::Stop => self.stopped = true,
            }
        }
    }

    fn reply(&self, token: u64, done: Done) {
        // Control's inbox being full means that it has given up on this answer.
        let _ = self.replies.post(WorkerReply {
            device: Arc::clone(&self.name),
            token,
            done,
        });
    }

    fn take_driver_messages(&mut self) {
        while let Some(message) = self.driver.next() {
            match message {
                DriverMsg::Activate { features, layouts } => self.activate(features, &layouts),
                DriverMsg::Reset(completer) => {
                    self.reset();
                    // The vCPU goes on from here.
                    drop(completer);
                }
            }
        }
    }

    fn activate(&mut self, features: u64, layouts: &[QueueLayout; MAX_QUEUES]) {
        self.counters.activations.one();
        self.phase = Phase::Active;
        self.runnable = QueueSet::ALL;
        for ((slot, layout), max_size) in self.queues.iter_mut().zip(layouts).zip(D::QUEUES) {
            *slot = None;
            // A driver need not use every queue.
            if !layout.ready {
                continue;
            }
            match Queue::new(layout, *max_size, features, &self.ram) {
                Ok(queue) => *slot = Some(queue),
                Err(broken) => return self.break_down(&broken),
            }
        }
        if let Err(error) = self.device.activate(features) {
            self.break_down(&Brief(&error));
        }
    }

    fn reset(&mut self) {
        self.counters.resets.one();
        self.device.reset();
        self.forget_driver(Phase::Idle);
    }

    fn break_down(&mut self, why: &dyn fmt::Display) {
        self.counters.broken.one();
        guest_warn!("the device needs a reset: {why}");
        self.forget_driver(Phase::Broken);
        self.interrupt.demand_reset();
    }

    fn forget_driver(&mut self, phase: Phase) {
        self.phase = phase;
        self.runnable = QueueSet::NONE;
        self.queues = [const { None }; MAX_QUEUES];
    }
}

const _: () = assert!(MAX_QUEUES.is_power_of_two());

#[cfg(test)]
mod tests {
    use super::super::DeviceControl;
    use super::super::block::{self, Block, Disk};
    use super::super::testing::{Rings, mailbox, next, ram, read32, reset, start, write32};
    use super::*;
    use crate::bus::Registers as _;
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
    const EVENT_IDX: u64 = super::super::feature::EVENT_IDX;

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
        let ram = ram();
        let block = Block::new(disk(64), "disk", true, RateLimiter::default()).unwrap();
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let (to_replies, replies) = mailbox();
        let (to_events, events) = mailbox();
        let (registers, worker, handle) = attach(
            block,
            "disk",
            ram.clone(),
            line.try_clone().unwrap(),
            to_replies,
            to_events,
        )
        .unwrap();
        Bench {
            ram,
            registers,
            handle,
            thread: Some(thread::spawn(move || worker.run())),
            line,
            replies,
            _events: events,
        }
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

        fn wait_for_status(&self, status: u32) {
            let until = Instant::now() + Duration::from_secs(20);
            while read32(&self.registers, 0x70) != status {
                assert!(Instant::now() < until, "status is not {status:#x}");
                thread::sleep(Duration::from_micros(50));
            }
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
        bench.kick();
        thread::sleep(Duration::from_millis(20));
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
        bench.kick();
        let rings = Rings::new(&bench.ram, BASE, 16);
        start(&bench.registers, EVENT_IDX, &[rings.layout()]);
        bench.kick();
        thread::sleep(Duration::from_millis(50));
        let stat = |bench: &Bench| {
            let _ = bench;
            bench.handle.worker_counters().kicks[0].get()
        };
        let kicks = stat(&bench);
        thread::sleep(Duration::from_millis(50));
        // Unread kicks make no further events.
        assert_eq!(stat(&bench), kicks);
        assert!(kicks <= 2);
    }

    #[test]
    fn interrupts_when_event_index_is_far_do_not_come() {
        let mut bench = bench();
        let mut rings = Rings::new(&bench.ram, BASE, 16);
        rings.set_used_event(2);
        start(&bench.registers, EVENT_IDX, &[rings.layout()]);
        for round in 0..3 {
            bench.offer(&rings, 0);
            bench.kick();
            rings.wait();
            let _ = round;
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
        bench.kick();
        thread::sleep(Duration::from_millis(50));
        assert_eq!(rings.take(), None);
        // Twice is fine, and updates are answered.
        bench.handle.pause(8).unwrap();
        assert_eq!(next(&bench.replies).token, 8);
        bench.handle.update(9, block::Update::default()).unwrap();
        assert_eq!(next(&bench.replies).token, 9);
        thread::sleep(Duration::from_millis(20));
        assert_eq!(rings.take(), None);
        bench.handle.resume(10).unwrap();
        assert!(matches!(next(&bench.replies).done, Done::Resumed));
        assert_eq!(rings.wait(), (0, 21));
    }

    #[test]
    fn driver_when_it_spoke_before_the_pause_is_heard() {
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
            bench.kick();
            thread::sleep(Duration::from_millis(1));
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
        bench.kick();
        thread::sleep(Duration::from_millis(10));
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
            // Whatever was done, nothing is done any more.
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
            disk: Some(disk(5)),
            limits: RateLimiterUpdate {
                ops: BucketUpdate::Replace(TokenBucket::new(1, 0, 100)),
                ..RateLimiterUpdate::default()
            },
        };
        bench.handle.update(1, update).unwrap();
        let Done::Updated { config, replaced } = next(&bench.replies).done else {
            panic!("no update");
        };
        assert_eq!(replaced.unwrap().metadata().unwrap().len(), 64 * 512);
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
        let block = Block::new(disk(64), "disk", true, RateLimiter::default()).unwrap();
        let (to_replies, replies) = mailbox();
        let (to_events, _events) = mailbox();
        let line = bench.line.try_clone().unwrap();
        let (registers, worker, handle) =
            attach(block, "disk", ram.clone(), line, to_replies, to_events).unwrap();
        let thread = thread::spawn(move || {
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
                disk: Some(disk(8)),
                limits: RateLimiterUpdate {
                    bandwidth: BucketUpdate::Replace(TokenBucket::new(1000, 0, 10)),
                    ..RateLimiterUpdate::default()
                },
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
        let block = Block::new(disk(64), "disk", true, RateLimiter::default()).unwrap();
        let (to_replies, replies) = mailbox();
        let (to_events, _events) = mailbox();
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let (_registers, worker, handle) =
            attach(block, "disk", ram(), line, to_replies, to_events).unwrap();
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
        // The registers live on without it, and leave nobody waiting.
        reset(&bench.registers);
        write32(&bench.registers, 0x70, 1);
        assert!(bench.handle.pause(1).is_err());
    }
}
