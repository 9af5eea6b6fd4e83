//! The event loop of any device, on a thread of its own.
//!
//! A [`Worker`] owns its device, the live queues, and its view of guest memory. It has two
//! inboxes, one per authority: [`DriverMsg`] from the registers and `ControlMsg` from control.
//! What it does with them is in `worker_loop`.
//!
//! Everything is watched edge-triggered: kicks, inboxes and timers are never read, nothing has to
//! be taken out of the epoll set, and nothing can make it spin. Kicks from before the activation
//! need no keeping: an activation looks into every queue.
//!
//! Everything is made by [`attach_all`], before the thread exists: [`Worker::run`] opens nothing,
//! watches nothing new, and allocates nothing.

mod counters;
pub(super) mod messages;
mod polling;
pub(super) mod state;
#[cfg(test)]
mod tests;
mod worker_loop;

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use event_manager::{
    EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberId, SubscriberOps,
};
use vmm_sys_util::eventfd::EventFd;

use self::messages::ControlMsg;
use self::polling::Polling;
use self::worker_loop::{Turn, WorkerLoop};
use super::handle::Link;
use super::registers::{DriverMsg, Offer, RegistersState, driver_messages};
use super::share::{Division, Share};
use super::state::feature_names;
use super::status::DRIVER_OK;
use super::{
    Device, DeviceHandle, Interrupt, PerWorker, QueueSet, Ram, Registers, Start, StateError,
};
use crate::inbox::{Inbox, Outbox, inbox};
use crate::sys::clock;
use crate::sys::sync::mpsc::sync_channel;
use crate::sys::sync::wait_for;
pub use counters::WorkerCounters;
pub use messages::{Done, WorkerEvent, WorkerReply};
pub use polling::DEFAULT_MICROS;
pub use state::{Phase, WorkerState};

/// The most workers of a device: the handle has a bit for each.
const WORKERS_MAX: usize = u32::BITS as usize;

/// Control waits for an answer before it asks again, but it may give up on one that is late.
const CONTROL_MESSAGES: usize = 16;

/// What an event's number means.
mod token {
    pub const INBOX: u32 = 0;
    pub const KICKS: u32 = 1;
    pub const SOURCES: u32 = 0x100;
}

/// A device in front of the guest: its registers, its workers, and control's end of it.
pub type Attached<D> = (Arc<Registers>, PerWorker<Worker<D>>, DeviceHandle<D>);

/// Gives `devices`, of which each serves its share of one, their registers and each its worker, which go on
/// from `start`. The workers' threads are the caller's to make: each calls [`Worker::enter_thread`], installs
/// its filter and calls [`Worker::run`].
///
/// # Errors
/// When the host has no descriptors left, will not watch one of the device's, or refuses what the
/// driver has chosen; or when `start` cannot be.
pub fn attach_all<D: Device>(
    devices: PerWorker<D>,
    name: &str,
    start: &Start,
    ram: &Ram,
    irqfd: EventFd,
    replies: &Outbox<WorkerReply>,
    events: &Outbox<WorkerEvent>,
) -> io::Result<Attached<D>> {
    const { assert!(D::QUEUES.len() < QueueSet::LIMIT) };
    let workers = devices.count();
    let division = Division::of::<D>(workers)
        .filter(|_| workers <= WORKERS_MAX)
        .ok_or_else(|| io::Error::other(format!("a device cannot have {workers} of its queues")))?;
    start.check(workers).map_err(io::Error::other)?;
    let name: Arc<str> = Arc::from(name);
    let interrupt = Arc::new(Interrupt::new(irqfd));
    let inboxes = PerWorker::try_make(workers, |worker| {
        inbox(driver_messages(division.queues(worker).count()))
    })?;
    let (to_workers, inboxes) = inboxes.unzip();
    let registers = Arc::new(Registers::new(
        Offer {
            device_id: D::ID,
            features: devices.first.features(),
            feature_names: |features| feature_names(features, D::FEATURES),
            division,
            config: devices.first.config(),
        },
        start.registers(),
        Arc::clone(&interrupt),
        to_workers,
    )?);
    let mut number = 0usize;
    let made = devices.zip(inboxes).try_map(|(device, driver)| {
        let share = Share { number, division };
        number = number.saturating_add(1);
        let (to_inbox, control) = inbox(CONTROL_MESSAGES)?;
        let (to_handle, saved) = sync_channel(CONTROL_MESSAGES);
        let link = Link {
            control: to_inbox,
            counters: device.counters(),
            worker_counters: Arc::new(WorkerCounters::new(&share)),
            saved,
        };
        let watched = watched(&registers, share, &driver, &control, &device);
        let mut body = WorkerLoop::new(
            Arc::clone(&name),
            share,
            device,
            ram.clone(),
            Arc::clone(&interrupt),
            Arc::clone(&link.worker_counters),
            driver,
            control,
            replies.clone(),
            to_handle,
        );
        let state = start.worker(share.number);
        check_phase(start.registers(), &state).map_err(io::Error::other)?;
        let features = start.registers().negotiated().unwrap_or(0);
        body.begin(&state, features, start.is_saved())?;
        Ok::<_, io::Error>((Worker::new(body, watched, events.clone())?, link))
    })?;
    let (workers, links) = made.unzip();
    let handle = DeviceHandle::new(name, Arc::clone(&registers), division, links);
    Ok((registers, workers, handle))
}

/// [`attach_all`] for a device with one worker.
#[cfg(test)]
pub fn attach<D: Device>(
    device: D,
    name: &str,
    start: &Start,
    ram: Ram,
    irqfd: EventFd,
    replies: Outbox<WorkerReply>,
    events: Outbox<WorkerEvent>,
) -> io::Result<(Arc<Registers>, Worker<D>, DeviceHandle<D>)> {
    let devices = PerWorker::from(device);
    let attached = attach_all(devices, name, start, &ram, irqfd, &replies, &events)?;
    let (registers, workers, handle) = attached;
    Ok((registers, workers.first, handle))
}

/// Checks that registers and worker tell the same: a driver that has none on the one side and some on
/// the other could not even reset the device.
fn check_phase(registers: &RegistersState, worker: &WorkerState) -> Result<(), StateError> {
    let has_driver = registers.status & DRIVER_OK != 0;
    let expected = match (has_driver, registers.needs_reset) {
        (false, _) => Phase::Idle,
        (true, false) => Phase::Active,
        (true, true) => Phase::Broken,
    };
    if worker.phase == expected {
        Ok(())
    } else {
        Err(StateError::Value("phase"))
    }
}

/// All that a worker watches, with its numbers.
fn watched<D: Device>(
    registers: &Registers,
    share: Share,
    driver: &Inbox<DriverMsg>,
    control: &Inbox<ControlMsg<D>>,
    device: &D,
) -> Vec<(RawFd, u32)> {
    let kicks = share
        .queues()
        .filter_map(|queue| registers.kicks().get(queue));
    let kicks = kicks.map(AsRawFd::as_raw_fd);
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
    manager: EventManager<Subscriber<D>>,
    id: SubscriberId,
    events: Outbox<WorkerEvent>,
    /// What [`Worker::enter_thread`] came to, once it was called.
    has_entered: Option<bool>,
}

impl<D: Device> Worker<D> {
    /// # Errors
    /// When the host will not watch one of `watched`.
    fn new(
        body: WorkerLoop<D>,
        watched: Vec<(RawFd, u32)>,
        events: Outbox<WorkerEvent>,
    ) -> io::Result<Self> {
        let events_at_once = watched.len();
        let subscriber = Subscriber {
            body,
            watched,
            unwatched: None,
        };
        let mut manager =
            EventManager::new_with_capacity(events_at_once).map_err(io::Error::other)?;
        let id = manager.add_subscriber(subscriber);
        let subscriber = manager.subscriber_mut(id).map_err(io::Error::other)?;
        if let Some(error) = subscriber.unwatched.take() {
            return Err(io::Error::other(error));
        }
        Ok(Worker {
            manager,
            id,
            events,
            has_entered: None,
        })
    }

    /// Has it poll for up to `micros` microseconds before it sleeps; without this call it never does.
    pub fn poll_up_to(&mut self, micros: u16) {
        self.poll_by(micros, clock::monotonic_nanos);
    }

    /// The same, by the time that `clock` tells.
    pub(crate) fn poll_by(&mut self, micros: u16, clock: fn() -> u64) {
        if let Ok(subscriber) = self.manager.subscriber_mut(self.id) {
            let polling = Polling::up_to(micros);
            subscriber.body.set_polling(polling, clock);
        }
    }

    /// Lets the device do what only its own thread can do, and only without a filter. Control is told
    /// when the device cannot go on. Threads that the device makes get a filter if this one is to be `filtered`.
    pub fn enter_thread(&mut self, filtered: bool) {
        let entered = match self.manager.subscriber_mut(self.id) {
            Ok(subscriber) => subscriber.body.enter_thread(filtered),
            Err(error) => Err(io::Error::other(error)),
        };
        self.has_entered = Some(entered.is_ok());
        if let Err(error) = entered {
            self.fail(error);
        }
    }

    /// Works until control says stop. Returns itself, so that the thread that joins this one closes
    /// and frees what it holds.
    pub fn run(mut self) -> Self {
        if self.has_entered.is_none() {
            self.enter_thread(false);
        }
        // Messages from before this call still ring: their edge has not been seen yet.
        let mut wait = (self.has_entered == Some(true)).then_some(0);
        while let Some(millis) = wait {
            let waited = wait_for(millis, |millis| self.manager.run_with_timeout(millis));
            let (Ok(_), Ok(subscriber)) = (&waited, self.manager.subscriber_mut(self.id)) else {
                self.fail(io::Error::last_os_error());
                break;
            };
            if millis != 0 {
                subscriber.body.woke();
            }
            wait = match subscriber.body.work() {
                Turn::More => Some(0),
                Turn::Wait => Some(-1),
                Turn::Stopped => None,
            };
        }
        self
    }

    fn fail(&mut self, error: io::Error) {
        if let Ok(subscriber) = self.manager.subscriber_mut(self.id) {
            let _ = self.events.post(WorkerEvent::Failed {
                device: Arc::clone(subscriber.body.name()),
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

/// A worker's loop as the one subscriber of its event manager.
struct Subscriber<D: Device> {
    body: WorkerLoop<D>,
    watched: Vec<(RawFd, u32)>,
    /// Why the set-up failed: event-manager has no way to return it.
    unwatched: Option<event_manager::Error>,
}

impl<D: Device> MutEventSubscriber for Subscriber<D> {
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
            self.body.source_ready(source as usize);
        } else if let Some(queue) = number.checked_sub(token::KICKS) {
            self.body.kicked(queue as usize);
        }
        // The inboxes are looked into in any case.
    }
}
