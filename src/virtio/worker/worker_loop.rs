//! What a worker does between two waits for events.
//!
//! ```text
//!                 Activate                        broken ring, host refuses
//!     Idle  --------------------->  Active  -------------------------------->  Broken
//!       ^                              |  (NEEDS_RESET is shown to the driver)    |
//!       '------------ Reset -----------'------------------- Reset ---------------'
//! ```
//!
//! Events only note what became ready; work is done in one place, [`WorkerLoop::turn`], in units
//! that the device bounds, at most [`UNITS_PER_TURN`] of them between two looks at the
//! descriptors, and with a look at both inboxes between any two. Only before the thread sleeps is the
//! driver asked to kick, for the queues that were found empty ([`WorkerLoop::arm`]): one that waits for
//! the host needs no kick. Before it sleeps it may poll (`polling`): it then looks at the same things as
//! the descriptors stand for, without a system call of its own. Paused, a worker does no unit at
//! all and so touches no guest memory; messages are still answered.
//!
//! **Draining.** A device may have requests in flight: begun, and still using guest memory. A
//! message that must not meet any (pause, reset, update, stop) waits for them: until it has been
//! done, no new request is begun and no further message is taken, so that all keep their order.
//! Requests that end meanwhile are returned to the driver, at most [`UNITS_PER_TURN`] between two looks at control's
//! inbox, since a device may have to work for each; but not before a reset, after which nothing of the old rings is
//! written. One exception to the order: a resume right after a pause
//! that still waits calls it off, so that a request that never ends holds up no others.
//!
//! **Interrupts** are sent at the end of a turn, and within it as soon as [`LATE_NANOS`] have
//! passed since the first unit that has not been announced: a slow disk with a deep queue announces each
//! completion as it comes, a fast one several at once.

mod saved;

use std::fmt;
use std::hint;
use std::io;
use std::mem;
use std::sync::Arc;

use super::counters::WorkerCounters;
use super::messages::{ControlMsg, Done, WorkerReply};
use super::polling::Polling;
use super::state::{Phase, StateBuffer};
use crate::bus::Completer;
use crate::guest_warn;
use crate::inbox::{Inbox, Outbox};
use crate::sys::io::ErrorText;
use crate::sys::sync::mpsc::SyncSender;
use crate::sys::{clock, thread};
use crate::virtio::queue::QueueState;
use crate::virtio::registers::DriverMsg;
use crate::virtio::share::Share;
use crate::virtio::{Device, Interrupt, Progress, Queue, QueueLayout, QueueSet, Ram, Updated};

/// Units of work between two looks at the descriptors; interrupts are sent at its end.
const UNITS_PER_TURN: u32 = 64;

/// How long the driver may be left without an interrupt while units go on.
const LATE_NANOS: u64 = 100_000;

/// Turns without a look at the descriptors, while polling finds work: the timers are among them.
const TURNS_UNSEEN: u32 = 64;

/// What the thread does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// There is work left, or may be: look at the descriptors.
    More,
    /// Nothing to do before the next event.
    Wait,
    /// Control said stop.
    Stopped,
}

/// A message that is done once nothing is in flight.
enum Draining<U> {
    /// The token is in [`WorkerLoop::pauses`].
    Pause,
    Update(u64, U),
    Stop,
    Reset(Completer),
}

/// The state of a worker.
pub(super) struct WorkerLoop<D: Device> {
    name: Arc<str>,
    share: Share,
    device: D,
    ram: Ram,
    interrupt: Arc<Interrupt>,
    counters: Arc<WorkerCounters>,
    driver: Inbox<DriverMsg>,
    control: Inbox<ControlMsg<D>>,
    replies: Outbox<WorkerReply>,
    /// Where filled boxes go; as large as the inbox that they come from.
    saved: SyncSender<Box<StateBuffer<D::State>>>,
    phase: Phase,
    /// As the driver has described them, until it activates the device.
    layouts: Box<[QueueLayout]>,
    queues: Box<[Option<Queue>]>,
    /// Queues that may have work.
    runnable: QueueSet,
    /// Queues that were found empty when they were served last: their next work comes from the driver.
    empty: QueueSet,
    /// The queue served last, so that each has its turn.
    last: usize,
    paused: bool,
    /// It was made of a saved state, and has not been resumed since.
    is_restored: bool,
    stopped: bool,
    draining: Option<Draining<D::Update>>,
    /// Not all that has ended was returned when the message that waits was looked at last.
    has_more_ended: bool,
    /// Tokens of the pauses that wait; room for a whole inbox.
    pauses: Vec<u64>,
    /// Taken from the inbox while a pause waited, and to be done after it.
    put_off: Option<ControlMsg<D>>,
    polling: Polling,
    /// Something was done since the present wait for work began.
    has_worked: bool,
    clock: fn() -> u64,
}

impl<D: Device> WorkerLoop<D> {
    #[expect(
        clippy::too_many_arguments,
        reason = "each is a part that another thread has the other end of"
    )]
    pub(super) fn new(
        name: Arc<str>,
        share: Share,
        device: D,
        ram: Ram,
        interrupt: Arc<Interrupt>,
        counters: Arc<WorkerCounters>,
        driver: Inbox<DriverMsg>,
        control: Inbox<ControlMsg<D>>,
        replies: Outbox<WorkerReply>,
        saved: SyncSender<Box<StateBuffer<D::State>>>,
    ) -> Self {
        let count = share.queues().count();
        WorkerLoop {
            name,
            share,
            device,
            ram,
            interrupt,
            counters,
            driver,
            control,
            replies,
            saved,
            phase: Phase::Idle,
            layouts: vec![QueueLayout::default(); count].into_boxed_slice(),
            queues: (0..count).map(|_| None).collect(),
            runnable: QueueSet::NONE,
            empty: QueueSet::NONE,
            last: 0,
            paused: false,
            is_restored: false,
            stopped: false,
            draining: None,
            has_more_ended: false,
            pauses: Vec::with_capacity(super::CONTROL_MESSAGES),
            put_off: None,
            polling: Polling::off(),
            has_worked: false,
            clock: clock::monotonic_nanos,
        }
    }

    /// The device's name.
    pub(super) fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// Polls as `polling` says from now on, by the time that `clock` tells.
    pub(super) fn set_polling(&mut self, polling: Polling, clock: fn() -> u64) {
        self.polling = polling;
        self.clock = clock;
    }

    #[cfg(test)]
    pub(super) fn device_mut(&mut self) -> &mut D {
        &mut self.device
    }

    /// The thread is the device's own from now on, and has no filter yet; it gets one if it is to be `filtered`.
    pub(super) fn enter_thread(&mut self, filtered: bool) -> io::Result<()> {
        if self.polling.is_on() && thread::allowed_cpus() < 2 {
            self.polling = Polling::off();
        }
        self.device.enter_thread(&self.ram, filtered)
    }

    /// Source number `source` of the device has become ready.
    pub(super) fn source_ready(&mut self, source: usize) {
        let ready = self.device.backend(source);
        self.runnable.insert(ready);
    }

    /// The driver has kicked queue `index`.
    pub(super) fn kicked(&mut self, index: usize) {
        self.counters.kicked(index);
        self.runnable.insert(QueueSet::one(index));
    }

    /// The thread has slept.
    pub(super) fn woke(&mut self) {
        if self.polling.is_on() {
            self.polling.woke((self.clock)());
        }
    }

    /// Works until there is nothing left to do, or the descriptors have to be looked at; polls in
    /// between. With [`Turn::Wait`], the driver has been asked to kick.
    pub(super) fn work(&mut self) -> Turn {
        for _ in 0..TURNS_UNSEEN {
            match self.turn() {
                Turn::Wait if self.poll() => {}
                Turn::Wait if self.arm() => return Turn::More,
                turn => return turn,
            }
        }
        Turn::More
    }

    /// Looks for work for as long as polling is worth it; whether there is a message or a runnable queue.
    fn poll(&mut self) -> bool {
        if !self.polling.is_on() || !self.may_begin() {
            return false;
        }
        if mem::take(&mut self.has_worked) {
            let outcome = self.polling.begin((self.clock)());
            self.counters.polled(outcome);
        } else if self.polling.is_wanted() {
            // What the last look found was none.
            self.found_nothing();
        }
        while self.polling.is_wanted() {
            if self.look() {
                return true;
            }
            self.found_nothing();
        }
        false
    }

    /// A look has found nothing. Offers the CPU to threads that wait for it, if that was some time ago.
    fn found_nothing(&mut self) {
        if self.polling.is_long() {
            thread::yield_now();
        }
        hint::spin_loop();
        let outcome = self.polling.looked((self.clock)());
        self.counters.polled(outcome);
    }

    /// Looks, without a system call of its own, for a message or work; whether there is any.
    fn look(&mut self) -> bool {
        for (index, queue) in self.queues.iter().enumerate() {
            if let Some(queue) = queue
                && self.empty.contains(index)
                && queue.has_chain(&self.ram)
            {
                self.runnable.insert(QueueSet::one(index));
            }
        }
        self.runnable.insert(self.device.poll());
        self.driver.is_pending() || self.control.is_pending() || self.next_queue().is_some()
    }

    fn turn(&mut self) -> Turn {
        self.take_messages();
        self.break_with_others();
        let mut index = self.next_queue();
        // When the driver was last interrupted, or had been for everything.
        let mut announced = if D::UNITS_MAY_WAIT && index.is_some() {
            clock::monotonic_nanos()
        } else {
            0
        };
        for _ in 0..UNITS_PER_TURN {
            let Some(queue) = index else {
                break;
            };
            let progress = self.unit(queue);
            self.take_messages();
            index = self.next_queue();
            if D::UNITS_MAY_WAIT && progress == Progress::More && index.is_some() {
                let now = self.device.last_look();
                if now.saturating_sub(announced) >= LATE_NANOS {
                    self.announce();
                    announced = now;
                }
            }
        }
        let ended = self.device.end_turn();
        self.runnable.insert(ended);
        self.announce();
        // A message that waits is looked at again once requests have ended.
        let may_be_drained =
            self.draining.is_some() && (self.has_more_ended || ended != QueueSet::NONE);
        if self.stopped {
            Turn::Stopped
        } else if may_be_drained || self.next_queue().is_some() {
            Turn::More
        } else {
            Turn::Wait
        }
    }

    /// Asks the driver to kick for the queues that were found empty: the thread is about to sleep.
    /// Whether there is work after all.
    fn arm(&mut self) -> bool {
        if !self.may_begin() {
            return false;
        }
        for (index, queue) in self.queues.iter_mut().enumerate() {
            let Some(queue) = queue else { continue };
            if !self.empty.contains(index) {
                continue;
            }
            match queue.arm(&self.ram) {
                Ok(true) => self.runnable.insert(QueueSet::one(index)),
                Ok(false) => {}
                Err(broken) => {
                    self.break_down(&broken);
                    return false;
                }
            }
        }
        self.next_queue().is_some()
    }

    /// Whether requests may be begun.
    fn may_begin(&self) -> bool {
        !self.paused
            && !self.stopped
            && self.draining.is_none()
            && self.phase == Phase::Active
            && !self.is_broken_elsewhere()
    }

    /// Whether another worker of the device has found that it needs a reset.
    fn is_broken_elsewhere(&self) -> bool {
        self.share.has_others() && self.interrupt.needs_reset()
    }

    /// Serves nothing either, where another worker of the device has found that it needs a reset.
    pub(super) fn break_with_others(&mut self) {
        if self.phase == Phase::Active && self.is_broken_elsewhere() {
            self.forget_driver(Phase::Broken);
        }
    }

    /// The next queue with work, each in its turn; none when no request may be begun.
    fn next_queue(&self) -> Option<usize> {
        if !self.may_begin() {
            return None;
        }
        let after_last = self.last.saturating_add(1);
        let queues = || 0..self.queues.len();
        let mut in_turn = queues().skip(after_last).chain(queues().take(after_last));
        in_turn.find(|index| self.runnable.contains(*index))
    }

    fn unit(&mut self, index: usize) -> Progress {
        self.last = index;
        let Some(Some(queue)) = self.queues.get_mut(index) else {
            self.runnable.remove(QueueSet::one(index));
            return Progress::Wait;
        };
        let this = QueueSet::one(index);
        queue.begin_unit();
        self.empty.remove(this);
        match self.device.process(index, queue, &self.ram) {
            Ok(Progress::More) => {
                self.has_worked = true;
                Progress::More
            }
            Ok(Progress::Wait) => {
                self.runnable.remove(this);
                if queue.was_found_empty() {
                    self.empty.insert(this);
                }
                Progress::Wait
            }
            Err(broken) => {
                self.break_down(&broken);
                Progress::Wait
            }
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

    /// Takes and does messages, until there are no more or one has to wait.
    fn take_messages(&mut self) {
        loop {
            if self.draining.is_some() {
                if !self.drain() {
                    return;
                }
            } else if let Some(message) = self.driver.next() {
                self.take_from_driver(message);
            } else if let Some(message) = self.put_off.take().or_else(|| self.control.next()) {
                self.take_from_control(message);
            } else {
                return;
            }
        }
    }

    fn take_from_driver(&mut self, message: DriverMsg) {
        match message {
            DriverMsg::Queue { index, layout } => {
                if let Some(slot) = self.layouts.get_mut(index) {
                    *slot = layout;
                }
            }
            DriverMsg::Activate { features } => self.activate(features),
            DriverMsg::Reset(completer) => self.draining = Some(Draining::Reset(completer)),
        }
    }

    fn take_from_control(&mut self, message: ControlMsg<D>) {
        self.draining = Some(match message {
            ControlMsg::Pause(token) => {
                self.pauses.push(token);
                Draining::Pause
            }
            ControlMsg::Update(token, update) => Draining::Update(token, update),
            ControlMsg::Stop => Draining::Stop,
            ControlMsg::Resume(token) => return self.resume(token),
            ControlMsg::Save(token, buffer) => return self.save(token, buffer),
        });
    }

    /// Does the message that waits, if nothing is in flight any more; whether it has been done.
    fn drain(&mut self) -> bool {
        let is_reset = matches!(self.draining, Some(Draining::Reset(_)));
        self.has_more_ended = !is_reset && self.return_ended() == Progress::More;
        if self.has_more_ended || self.device.in_flight() > 0 {
            return matches!(self.draining, Some(Draining::Pause)) && self.is_called_off();
        }
        match self.draining.take() {
            Some(Draining::Pause) => self.pause(),
            Some(Draining::Update(token, update)) => self.update(token, update),
            Some(Draining::Stop) => self.stopped = true,
            Some(Draining::Reset(completer)) => {
                self.reset();
                // The vCPU goes on from here.
                drop(completer);
            }
            None => {}
        }
        true
    }

    /// Returns to the driver what has ended since; whether there may be more of it.
    fn return_ended(&mut self) -> Progress {
        if self.paused || self.phase != Phase::Active {
            return Progress::Wait;
        }
        let mut units_left = UNITS_PER_TURN;
        for (index, queue) in self.queues.iter_mut().enumerate() {
            let Some(queue) = queue else { continue };
            loop {
                if units_left == 0 {
                    return Progress::More;
                }
                units_left = units_left.saturating_sub(1);
                match self.device.complete(index, queue, &self.ram) {
                    Ok(Progress::More) => {}
                    Ok(Progress::Wait) => break,
                    Err(broken) => {
                        self.break_down(&broken);
                        return Progress::Wait;
                    }
                }
            }
        }
        Progress::Wait
    }

    /// Looks at what control says while a pause waits; whether it is to go on instead.
    fn is_called_off(&mut self) -> bool {
        while self.put_off.is_none()
            && self.pauses.len() < super::CONTROL_MESSAGES
            && let Some(message) = self.control.next()
        {
            match message {
                ControlMsg::Resume(token) => {
                    self.draining = None;
                    self.pauses.clear();
                    self.resume(token);
                    return true;
                }
                ControlMsg::Pause(token) => self.pauses.push(token),
                other => self.put_off = Some(other),
            }
        }
        false
    }

    fn pause(&mut self) {
        // Nothing a vCPU has said may be left for after the pause. Nothing is in flight now.
        while let Some(message) = self.driver.next() {
            match message {
                DriverMsg::Reset(completer) => {
                    self.reset();
                    drop(completer);
                }
                other => self.take_from_driver(other),
            }
        }
        self.announce();
        self.break_with_others();
        if let Err(error) = self.device.settle() {
            guest_warn!(
                "what the device keeps did not reach its file: {}",
                ErrorText(&error)
            );
        }
        self.paused = true;
        for token in &self.pauses {
            self.reply(*token, Done::Paused);
        }
        self.pauses.clear();
    }

    fn resume(&mut self, token: u64) {
        self.paused = false;
        if mem::take(&mut self.is_restored) {
            self.continue_restored();
        }
        self.reply(token, Done::Resumed);
    }

    fn update(&mut self, token: u64, update: D::Update) {
        let Updated {
            config,
            replaced,
            failed,
            runnable,
        } = self.device.update(update);
        self.runnable.insert(runnable);
        self.reply(
            token,
            Done::Updated {
                config,
                replaced,
                failed,
            },
        );
    }

    fn reply(&self, token: u64, done: Done) {
        // Control's inbox being full means that it has given up on this answer.
        let _ = self.replies.post(WorkerReply {
            device: Arc::clone(&self.name),
            worker: self.share.number,
            token,
            done,
        });
    }

    fn activate(&mut self, features: u64) {
        self.counters.activations.one();
        let layouts = mem::take(&mut self.layouts);
        // A driver need not use every queue.
        let used = |layout: &QueueLayout| layout.ready.then(|| QueueState::fresh(*layout));
        let served = self.serve(features, layouts.iter().map(used));
        self.layouts = layouts;
        if let Err(why) = served {
            self.break_down(&why);
        }
    }

    fn reset(&mut self) {
        self.counters.resets.one();
        self.device.reset();
        self.layouts.fill(QueueLayout::default());
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
        self.empty = QueueSet::NONE;
        self.queues.fill_with(|| None);
    }
}
