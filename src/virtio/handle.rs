//! Control's end of a device. Nothing here waits.
//!
//! What control tells any device alike, and asks of it, is [`DeviceControl`]: a list of devices of
//! several kinds is a list of these. What only one kind of device understands, its update, needs
//! the handle's own type.
//!
//! Of a device with several workers, each is told, and each answers. [`DeviceControl::gather`] makes one answer
//! of theirs: control deals with one device.

mod answers;

use std::cell::{Cell, RefCell};
use std::fmt;
use std::sync::Arc;

use self::answers::Answers;
pub use self::answers::Gathered;
use super::share::{Division, PerWorker};
use super::state::ShareState;
use super::worker::messages::ControlMsg;
use super::worker::state::StateBuffer;
use super::{Device, DeviceState, Registers, WorkerCounters, WorkerReply};
use crate::inbox::Sender;
use crate::metrics::Report;
use crate::sys::sync::mpsc::Receiver;

/// A message was not delivered: the worker's inbox is full, or the worker has ended.
#[derive(Debug)]
pub struct Unreachable;

impl fmt::Display for Unreachable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the device's thread does not answer")
    }
}

impl std::error::Error for Unreachable {}

/// What control can do with a device of any kind.
pub trait DeviceControl: fmt::Debug {
    /// The name given to [`super::attach_all`].
    fn name(&self) -> &str;

    /// Asks for [`super::Done::Paused`].
    ///
    /// # Errors
    /// When the worker cannot be reached.
    fn pause(&self, token: u64) -> Result<(), Unreachable>;

    /// Asks for [`super::Done::Resumed`].
    ///
    /// # Errors
    /// When the worker cannot be reached.
    fn resume(&self, token: u64) -> Result<(), Unreachable>;

    /// Asks for [`super::Done::Saved`], or [`super::Done::NotSaved`] unless it is paused.
    ///
    /// # Errors
    /// When the worker cannot be reached.
    fn save(&self, token: u64) -> Result<(), Unreachable>;

    /// Whether the last pause or resume did not reach the worker: to be sent again once the worker
    /// has answered an earlier message.
    fn has_missed(&self) -> bool;

    /// What comes of `reply` if it is of this device: its answer, once each of its workers has answered.
    fn gather(&self, reply: WorkerReply) -> Gathered;

    /// The device's registers.
    fn registers(&self) -> &Registers;

    /// Writes what the device and its worker have counted into `report`.
    fn read_counters(&self, report: &mut Report);
}

/// Control's end of a device of kind `D`.
pub struct DeviceHandle<D: Device> {
    name: Arc<str>,
    registers: Arc<Registers>,
    division: Division,
    links: PerWorker<Link<D>>,
    /// What workers have answered while others have not.
    answers: RefCell<Answers>,
    /// The token of the last save.
    saving: Cell<Option<u64>>,
    /// The last pause or resume.
    told: Cell<Option<Told>>,
    /// Workers, by bit, whose inbox was full then.
    missed: Cell<u32>,
}

/// What workers are told that control repeats when it did not reach them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    /// With this token.
    Pause(u64),
    Resume,
}

/// Control's end of one worker.
pub(super) struct Link<D: Device> {
    pub control: Sender<ControlMsg<D>>,
    pub counters: Arc<D::Counters>,
    pub worker_counters: Arc<WorkerCounters>,
    /// What the worker has saved.
    pub saved: Receiver<Box<StateBuffer<D::State>>>,
}

impl<D: Device> DeviceHandle<D> {
    pub(super) fn new(
        name: Arc<str>,
        registers: Arc<Registers>,
        division: Division,
        links: PerWorker<Link<D>>,
    ) -> Self {
        DeviceHandle {
            name,
            registers,
            division,
            links,
            answers: RefCell::new(Answers::default()),
            saving: Cell::new(None),
            told: Cell::new(None),
            missed: Cell::new(0),
        }
    }

    /// Asks for [`super::Done::Updated`]: each worker has its own of `updates`.
    ///
    /// # Errors
    /// When a worker cannot be reached: none is told then.
    pub fn update(
        &self,
        token: u64,
        updates: impl Into<PerWorker<D::Update>>,
    ) -> Result<(), Unreachable> {
        let updates = updates.into();
        // Nothing else sends there.
        let has_room = self.links.iter().all(|link| link.control.has_room());
        if !has_room || updates.count() != self.links.count() {
            return Err(Unreachable);
        }
        let mut sent = self.links.iter().zip(updates.into_all());
        sent.try_for_each(|(link, update)| link.send(ControlMsg::Update(token, update)))
    }

    /// The device as the last save found it, once [`super::Done::Saved`] has come; `None` before that,
    /// or when it was not saved.
    pub fn take_saved(&self) -> Option<DeviceState<D::State>> {
        let wanted = self.saving.take()?;
        let registers = self.registers.save()?;
        let first = self.links.first.take_saved(wanted)?;
        let others = self.links.others.iter();
        Some(DeviceState {
            registers,
            worker: first.worker,
            device: first.device,
            others: others
                .map(|link| link.take_saved(wanted))
                .collect::<Option<_>>()?,
        })
    }

    /// Ends the workers: [`super::Worker::run`] returns.
    ///
    /// # Errors
    /// When a worker cannot be reached.
    #[cfg(test)]
    pub fn stop(&self) -> Result<(), Unreachable> {
        let mut links = self.links.iter();
        links.try_for_each(|link| link.send(ControlMsg::Stop))
    }

    /// What the device has counted; its first worker's part.
    #[cfg(test)]
    pub fn counters(&self) -> &D::Counters {
        &self.links.first.counters
    }

    /// What its first worker has counted.
    #[cfg(test)]
    pub fn worker_counters(&self) -> &WorkerCounters {
        &self.links.first.worker_counters
    }

    /// Sends a pause or a resume to each worker, and remembers which could not be told; when it is the same
    /// as the last one, only to those.
    fn tell(&self, what: Told, token: u64) -> Result<(), Unreachable> {
        let again = self.told.replace(Some(what)) == Some(what) && self.links.count() > 1;
        if let (Told::Pause(token), false) = (what, again) {
            self.answers.borrow_mut().begin_pause(token);
        }
        let mut missed = 0;
        for (worker, link) in (0..).zip(self.links.iter()) {
            let bit = answers::bit(worker);
            let message = match what {
                Told::Pause(_) => ControlMsg::Pause(token),
                Told::Resume => ControlMsg::Resume(token),
            };
            let is_told = again && self.missed.get() & bit == 0;
            if !is_told && link.send(message).is_err() {
                missed |= bit;
            }
        }
        self.missed.set(missed);
        match missed {
            0 => Ok(()),
            _ => Err(Unreachable),
        }
    }
}

impl<D: Device> Link<D> {
    fn send(&self, message: ControlMsg<D>) -> Result<(), Unreachable> {
        self.control.send(message).map_err(|_| Unreachable)
    }

    /// What was saved as the message with `token` asked for.
    fn take_saved(&self, token: u64) -> Option<ShareState<D::State>> {
        // Earlier ones were given up on.
        let mut buffers = self.saved.try_iter();
        let buffer = buffers.find(|buffer| buffer.token == token)?;
        buffer.is_filled.then_some(ShareState {
            worker: buffer.worker,
            device: buffer.device,
        })
    }
}

impl<D: Device> DeviceControl for DeviceHandle<D> {
    fn name(&self) -> &str {
        &self.name
    }

    fn pause(&self, token: u64) -> Result<(), Unreachable> {
        self.tell(Told::Pause(token), token)
    }

    fn resume(&self, token: u64) -> Result<(), Unreachable> {
        self.tell(Told::Resume, token)
    }

    fn save(&self, token: u64) -> Result<(), Unreachable> {
        self.saving.set(Some(token));
        self.answers.borrow_mut().begin_save(token);
        for (worker, link) in (0..).zip(self.links.iter()) {
            // What a worker gave back and nothing took is freed here.
            link.saved.try_iter().for_each(drop);
            let queues = self.division.queues(worker).count();
            let buffer = StateBuffer::new(token, queues, D::state_buffer());
            link.send(ControlMsg::Save(token, Box::new(buffer)))?;
        }
        Ok(())
    }

    fn has_missed(&self) -> bool {
        self.missed.get() != 0
    }

    fn gather(&self, reply: WorkerReply) -> Gathered {
        // A name is not enough: devices of two kinds may have the same.
        if !Arc::ptr_eq(&reply.device, &self.name) {
            return Gathered::Other(reply);
        }
        let mut answers = self.answers.borrow_mut();
        answers.gather(reply, self.links.count())
    }

    fn registers(&self) -> &Registers {
        &self.registers
    }

    fn read_counters(&self, report: &mut Report) {
        let read = |counters: &D::Counters, workers: &WorkerCounters, report: &mut Report| {
            workers.read(&self.name, report);
            D::read_counters(counters, workers, &self.name, report);
        };
        let first = &self.links.first;
        if self.links.others.is_empty() {
            return read(&first.counters, &first.worker_counters, report);
        }
        let workers = WorkerCounters::of_all(self.division.sizes().len());
        let counters = D::Counters::default();
        for link in self.links.iter() {
            workers.add(&link.worker_counters);
            D::add_counters(&counters, &link.counters);
        }
        read(&counters, &workers, report);
    }
}

impl<D: Device> fmt::Debug for DeviceHandle<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceHandle")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}
