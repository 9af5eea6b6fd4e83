//! Control's end of a device. Nothing here waits.
//!
//! What control tells any device alike, and asks of it, is [`DeviceControl`]: a list of devices of
//! several kinds is a list of these. What only one kind of device understands, its update, needs
//! the handle's own type.

use std::cell::Cell;
use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::Receiver;

use super::worker::messages::ControlMsg;
use super::worker::state::StateBuffer;
use super::{Device, DeviceState, Registers, WorkerCounters};
use crate::inbox::Sender;
use crate::metrics::Report;

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
    /// The name given to [`super::attach`].
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

    /// The device's registers.
    fn registers(&self) -> &Registers;

    /// Writes what the device and its worker have counted into `report`.
    fn read_counters(&self, report: &mut Report);
}

/// Control's end of a device of kind `D`.
pub struct DeviceHandle<D: Device> {
    name: Arc<str>,
    control: Sender<ControlMsg<D>>,
    registers: Arc<Registers>,
    counters: Arc<D::Counters>,
    worker_counters: Arc<WorkerCounters>,
    /// What the worker has saved.
    saved: Receiver<Box<StateBuffer<D::State>>>,
    /// The token of the last save.
    saving: Cell<Option<u64>>,
    /// The last pause or resume found the inbox full.
    missed: Cell<bool>,
}

impl<D: Device> DeviceHandle<D> {
    pub(super) fn new(
        name: Arc<str>,
        control: Sender<ControlMsg<D>>,
        registers: Arc<Registers>,
        counters: Arc<D::Counters>,
        worker_counters: Arc<WorkerCounters>,
        saved: Receiver<Box<StateBuffer<D::State>>>,
    ) -> Self {
        DeviceHandle {
            name,
            control,
            registers,
            counters,
            worker_counters,
            saved,
            saving: Cell::new(None),
            missed: Cell::new(false),
        }
    }

    /// Asks for [`super::Done::Updated`].
    ///
    /// # Errors
    /// When the worker cannot be reached.
    pub fn update(&self, token: u64, update: D::Update) -> Result<(), Unreachable> {
        self.send(ControlMsg::Update(token, update))
    }

    /// The device as the last save found it, once [`super::Done::Saved`] has come; `None` before that,
    /// or when it was not saved.
    pub fn take_saved(&self) -> Option<DeviceState<D::State>> {
        let wanted = self.saving.take()?;
        // Earlier ones were given up on.
        let mut buffers = self.saved.try_iter();
        let buffer = buffers.find(|buffer| buffer.token == wanted)?;
        let registers = self.registers.save()?;
        buffer.is_filled.then_some(DeviceState {
            registers,
            worker: buffer.worker,
            device: buffer.device,
        })
    }

    /// Ends the worker: [`super::Worker::run`] returns.
    ///
    /// # Errors
    /// When the worker cannot be reached.
    #[cfg(test)]
    pub fn stop(&self) -> Result<(), Unreachable> {
        self.send(ControlMsg::Stop)
    }

    /// What the device has counted.
    #[cfg(test)]
    pub fn counters(&self) -> &D::Counters {
        &self.counters
    }

    /// What its worker has counted.
    #[cfg(test)]
    pub fn worker_counters(&self) -> &WorkerCounters {
        &self.worker_counters
    }

    /// Sends a pause or a resume, and remembers whether it was delivered.
    fn tell(&self, message: ControlMsg<D>) -> Result<(), Unreachable> {
        let sent = self.send(message);
        self.missed.set(sent.is_err());
        sent
    }

    fn send(&self, message: ControlMsg<D>) -> Result<(), Unreachable> {
        self.control.send(message).map_err(|_| Unreachable)
    }
}

impl<D: Device> DeviceControl for DeviceHandle<D> {
    fn name(&self) -> &str {
        &self.name
    }

    fn pause(&self, token: u64) -> Result<(), Unreachable> {
        self.tell(ControlMsg::Pause(token))
    }

    fn resume(&self, token: u64) -> Result<(), Unreachable> {
        self.tell(ControlMsg::Resume(token))
    }

    fn save(&self, token: u64) -> Result<(), Unreachable> {
        // What a worker gave back and nothing took is freed here.
        self.saved.try_iter().for_each(drop);
        self.saving.set(Some(token));
        let buffer = StateBuffer::new(token, D::QUEUES.len(), D::state_buffer());
        self.send(ControlMsg::Save(token, Box::new(buffer)))
    }

    fn has_missed(&self) -> bool {
        self.missed.get()
    }

    fn registers(&self) -> &Registers {
        &self.registers
    }

    fn read_counters(&self, report: &mut Report) {
        self.worker_counters.read(&self.name, report);
        D::read_counters(&self.counters, &self.worker_counters, &self.name, report);
    }
}

impl<D: Device> fmt::Debug for DeviceHandle<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceHandle")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}
