//! The event loop of any device, on a thread of its own.
//!
//! A [`Worker`] owns its device, the live queues, and its view of guest memory. It has two
//! inboxes, one per authority: [`DriverMsg`] from the registers and [`ControlMsg`] from control.
//!
//! ```text
//!                 Activate                        broken ring, host refuses
//!     Idle  --------------------->  Active  -------------------------------->  Broken
//!       ^                              |  (NEEDS_RESET is shown to the driver)    |
//!       '------------ Reset -----------'------------------- Reset ---------------'
//! ```
//!
//! Events only note what became ready; work is done in one place, [`Loop::turn`], in units that
//! the device bounds, at most [`UNITS_PER_TURN`] of them between two looks at the descriptors,
//! and with a look at both inboxes between any two. Paused, a worker does no unit at all and so
//! touches no guest memory; messages are still answered.
//!
//! Everything is watched edge-triggered: kicks, bells and timers are never read, nothing has to
//! be taken out of the epoll set, and nothing can make it spin. What became ready is remembered
//! in [`Loop::runnable`] until a device says that there is nothing more to do. Kicks from before the
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

use super::registers::{DRIVER_MESSAGES, DriverMsg};
use super::{
    ConfigSpace, Counter, Device, Interrupt, MAX_QUEUES, Progress, Queue, QueueLayout, QueueSet,
    Ram, Registers, Updated,
};
use crate::guest_warn;
use crate::inbox::{Inbox, Outbox, Sender, inbox};

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

/// What control asks of a worker. The number comes back in the answer.
enum ControlMsg<U> {
    Pause(u64),
    Resume(u64),
    Update(u64, U),
    Stop,
}

/// A worker's answer to control.
#[derive(Debug)]
pub struct WorkerReply {
    /// Whose answer it is: the name given to [`attach`].
    pub device: Arc<str>,
    /// The number that came with the question.
    pub token: u64,
    /// The answer.
    pub done: Done,
}

/// What a worker has done.
#[derive(Debug)]
pub enum Done {
    /// No guest memory is touched from now on, and nothing is in flight.
    Paused,
    /// Work goes on.
    Resumed,
    /// The update holds. Hand a changed configuration space to [`Registers::set_config`]; close
    /// what was replaced.
    Updated {
        /// The configuration space, when it has changed.
        config: Option<ConfigSpace>,
        /// The old file, when it has been replaced.
        replaced: Option<std::fs::File>,
    },
}

/// What a worker tells control unasked.
#[derive(Debug)]
pub enum WorkerEvent {
    /// The worker can not go on at all, and has ended.
    Failed {
        /// The name given to [`attach`].
        device: Arc<str>,
        /// What the host said.
        error: io::Error,
    },
}

impl fmt::Display for WorkerEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let WorkerEvent::Failed { device, error } = self;
        write!(f, "The thread of device `{device}` can not go on: {error}.")
    }
}

/// What every worker counts.
#[derive(Debug, Default)]
pub struct WorkerCounters {
    /// Times the driver activated the device.
    pub activations: Counter,
    /// Times the driver reset an active device.
    pub resets: Counter,
    /// Times the device had to be marked NEEDS_RESET.
    pub broken: Counter,
    /// Wake-ups by the driver.
    pub kicks: Counter,
    /// Interrupts for used buffers.
    pub interrupts: Counter,
}

/// A message was not delivered: the worker has stopped listening, or has ended.
#[derive(Debug)]
pub struct Unreachable;

impl fmt::Display for Unreachable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the device's thread does not answer")
    }
}

impl std::error::Error for Unreachable {}

/// Control's end of a device. Nothing here waits.
pub struct DeviceHandle<D: Device> {
    name: Arc<str>,
    control: Sender<ControlMsg<D::Update>>,
    registers: Arc<Registers>,
    counters: Arc<D::Counters>,
    worker_counters: Arc<WorkerCounters>,
}

impl<D: Device> DeviceHandle<D> {
    /// The name given to [`attach`].
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// Asks for [`Done::Paused`].
    ///
    /// # Errors
    /// When the worker can not be reached.
    pub fn pause(&self, token: u64) -> Result<(), Unreachable> {
        self.send(ControlMsg::Pause(token))
    }

    /// Asks for [`Done::Resumed`].
    ///
    /// # Errors
    /// When the worker can not be reached.
    pub fn resume(&self, token: u64) -> Result<(), Unreachable> {
        self.send(ControlMsg::Resume(token))
    }

    /// Asks for [`Done::Updated`].
    ///
    /// # Errors
    /// When the worker can not be reached.
    pub fn update(&self, token: u64, update: D::Update) -> Result<(), Unreachable> {
        self.send(ControlMsg::Update(token, update))
    }

    /// Ends the worker: [`Worker::run`] returns.
    ///
    /// # Errors
    /// When the worker can not be reached.
    pub fn stop(&self) -> Result<(), Unreachable> {
        self.send(ControlMsg::Stop)
    }

    /// The device's registers.
    pub fn registers(&self) -> &Registers {
        &self.registers
    }

    /// What the device has counted.
    pub fn counters(&self) -> &D::Counters {
        &self.counters
    }

    /// What its worker has counted.
    pub fn worker_counters(&self) -> &WorkerCounters {
        &self.worker_counters
    }

    fn send(&self, message: ControlMsg<D::Update>) -> Result<(), Unreachable> {
        self.control.send(message).map_err(|_| Unreachable)
    }
}

impl<D: Device> fmt::Debug for DeviceHandle<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceHandle")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
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
    let handle = DeviceHandle {
        name: Arc::clone(&name),
        control: to_control_inbox,
        registers: Arc::clone(&registers),
        counters: device.counters(),
        worker_counters: Arc::clone(&worker_counters),
    };
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
            self.counters.kicks.one();
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
            self.break_down(&error);
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
