//! virtio devices: the DEVICE THREADS, and the registers in front of them.
//!
//! A device is three parts that share nothing but messages and one [`Interrupt`]:
//!
//! - [`Registers`] belongs to the vCPUs. It is what the guest's driver negotiates with, behind one
//!   mutex, and it never touches guest memory.
//! - [`Worker`](worker::Worker) is a thread of its own, resident before the first guest instruction. It owns the
//!   device, its live queues and its view of guest memory, and takes no lock but that of an inbox, for as
//!   long as one message takes.
//! - [`DeviceHandle`] is control's end: pause, resume, update, stop, counters.
//!
//! ```text
//!   vCPU ----> Registers ---- DriverMsg: Activate, Reset ----> Worker ----> Device
//!     |                                                         ^   |
//!     '--- kick: ioeventfd -------------------------------------'   '--> Interrupt -> irqfd
//!   control -> DeviceHandle -- ControlMsg: Pause, Update ... ---^   '--> WorkerReply -> control
//! ```
//!
//! The order of events that matters: DRIVER_OK sends `Activate` and is not awaited; writing 0 to
//! Status sends `Reset` and is (virtio 1.2, 2.1.2), without holding the registers' mutex.
//!
//! Each part is made of its state, and a new one of the default state; a paused device can be saved
//! ([`DeviceState`]). A saved state is distrusted like what a guest writes.
//!
//! A device of which the driver may use several queues is several workers behind one set of registers, each
//! with a device and queues of its own: `share` tells how they are one device to all others.
//!
//! What the guest does wrong costs only the guest: a bad request is failed, a broken ring marks
//! the device NEEDS_RESET, and both are counted. Nothing here panics on what a guest wrote.
#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

pub mod block;
mod chain;
#[cfg(any(test, fuzzing))]
mod fuzz;
pub mod handle;
mod interrupt;
pub mod net;
#[cfg(test)]
mod properties;
pub mod queue;
pub mod registers;
mod segment;
mod share;
mod state;
#[cfg(test)]
pub mod testing;
#[cfg(test)]
mod tests;
mod throttle;
pub mod worker;

use std::any::Any;
use std::fmt;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::memory::Ram;
pub use crate::metrics::Counter;
use crate::metrics::Report;
pub use handle::{DeviceControl, DeviceHandle, Gathered};
pub use interrupt::Interrupt;
pub use queue::{Queue, QueueLayout};
pub use registers::Registers;
pub use share::PerWorker;
pub use state::{DeviceState, Start, StateError};
pub use worker::{
    DEFAULT_MICROS as POLL_DEFAULT_MICROS, Done, WorkerCounters, WorkerEvent, WorkerReply,
    attach_all,
};

/// Device status bits (virtio 1.2, 2.1).
pub mod status {
    /// The guest has noticed the device.
    pub const ACKNOWLEDGE: u32 = 1;
    /// The guest knows how to drive it.
    pub const DRIVER: u32 = 2;
    /// The driver is set up and ready.
    pub const DRIVER_OK: u32 = 4;
    /// Feature negotiation is complete.
    pub const FEATURES_OK: u32 = 8;
    /// The device cannot go on without a reset.
    pub const DEVICE_NEEDS_RESET: u32 = 0x40;
    /// The guest has given up on the device.
    pub const FAILED: u32 = 0x80;
}

/// Feature bits that belong to no single device (virtio 1.2, 6).
pub mod feature {
    /// VIRTIO_F_INDIRECT_DESC (2.7.5.3)
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// VIRTIO_F_EVENT_IDX (2.7.7, 2.7.10)
    pub const EVENT_IDX: u64 = 1 << 29;
    /// VIRTIO_F_VERSION_1 (6.1)
    pub const VERSION_1: u64 = 1 << 32;
    /// Their names.
    pub const NAMES: [(u64, &str); 3] = [
        (INDIRECT_DESC, "VIRTIO_F_INDIRECT_DESC"),
        (EVENT_IDX, "VIRTIO_F_EVENT_IDX"),
        (VERSION_1, "VIRTIO_F_VERSION_1"),
    ];
    /// Those that belong to a kind of device, and not to all (2.2).
    pub const OF_A_DEVICE: u64 = !(((1 << 26) - 1) << 24);
    /// What every device of ours offers.
    pub const COMMON: u64 = INDIRECT_DESC | EVENT_IDX | VERSION_1;
}

/// What a device is to its worker. All of it runs on the worker's thread once that is running;
/// the first four are asked before, by [`attach_all`].
pub trait Device: Send + 'static {
    /// The kind of device (virtio 1.2, 5).
    const ID: u32;
    /// The largest size of each queue of a device with one worker; powers of two, fewer than
    /// [`QueueSet::LIMIT`] of them. Each of several workers has as many.
    const QUEUES: &'static [u16];
    /// The names of its features, those of [`feature`] left out.
    const FEATURES: &'static [(u64, &'static str)];
    /// Whether a unit of work may take long, as one that waits for the host's storage may: then
    /// the worker looks at the clock after each, so that no completion is announced late.
    const UNITS_MAY_WAIT: bool;
    /// What control may change while the device runs.
    type Update: Send + 'static;
    /// What is saved of it beside its queues; by default that of a new device. A device is made of it.
    type State: Clone
        + fmt::Debug
        + Default
        + PartialEq
        + Send
        + Serialize
        + DeserializeOwned
        + 'static;
    /// What the device counts.
    type Counters: Default + Send + Sync + 'static;

    /// The largest size of each queue of a device with `workers` workers, of which there is more than one; at
    /// the end there may be one more queue than those of [`Device::QUEUES`] for each, which is the first
    /// worker's. None when the kind of device has not so many.
    fn queues_of_several(_workers: usize) -> Option<&'static [u16]> {
        None
    }

    /// All features offered, [`feature::COMMON`] included.
    fn features(&self) -> u64;
    /// The configuration space as the guest sees it at the start.
    fn config(&self) -> ConfigSpace;
    /// The counters, for the thread that reads them.
    fn counters(&self) -> Arc<Self::Counters>;
    /// Adds what was counted in `from` to `to`, which no thread counts in.
    fn add_counters(to: &Self::Counters, from: &Self::Counters);
    /// Writes `counters`, and what of `worker` belongs to the same line of Firecracker's
    /// metrics, into `report`, for the device `name`.
    fn read_counters(
        counters: &Self::Counters,
        worker: &WorkerCounters,
        name: &str,
        report: &mut Report,
    );
    /// Descriptors to watch, edge-triggered, beside the kicks; open for the device's life.
    fn sources(&self) -> Vec<RawFd>;
    /// Called once, on the device's own thread, before its filter is installed and before anything
    /// else is called there: it may open, allocate and make threads, as nothing later may; those get a filter if they
    /// are to be `filtered`. `ram` is guest memory.
    ///
    /// # Errors
    /// When the host refuses what the device cannot do without: its thread ends then.
    fn enter_thread(&mut self, _ram: &Ram, _filtered: bool) -> io::Result<()> {
        Ok(())
    }

    /// The driver is ready and has accepted `features`.
    ///
    /// # Errors
    /// When the host refuses what that asks for: the device then needs a reset.
    fn activate(&mut self, features: u64) -> io::Result<()>;
    /// Does one bounded piece of work on queue `index`: begins a request, or returns one that has
    /// ended.
    ///
    /// # Errors
    /// [`BrokenRing`] when the ring itself cannot be trusted any more.
    fn process(
        &mut self,
        index: usize,
        queue: &mut Queue,
        ram: &Ram,
    ) -> Result<Progress, BrokenRing>;
    /// Nanoseconds of the monotonic clock when the last call of [`Device::process`] ended, or nearly: a device that has
    /// looked at the clock for itself spares the worker a look after each unit.
    fn last_look(&self) -> u64 {
        crate::sys::clock::monotonic_nanos()
    }
    /// Requests that have been begun and still use guest memory: the host may read and write it at
    /// any moment. None, for a device whose `process` ends what it begins.
    fn in_flight(&self) -> usize {
        0
    }
    /// Returns one request of queue `index` that is no longer in flight to the driver, if there is
    /// one; begins none. Called while a message waits for what is in flight.
    ///
    /// # Errors
    /// [`BrokenRing`] when the ring itself cannot be trusted any more.
    fn complete(&mut self, _: usize, _: &mut Queue, _: &Ram) -> Result<Progress, BrokenRing> {
        Ok(Progress::Wait)
    }
    /// The worker's turn ends: what was begun and not given to the host yet is given to it now. The
    /// queues that may now have work: requests may have ended already.
    fn end_turn(&mut self) -> QueueSet {
        QueueSet::NONE
    }
    /// Source number `source` has become ready; the queues that may now have work. Requests that
    /// the host has ended stop being in flight here.
    fn backend(&mut self, source: usize) -> QueueSet;
    /// Looks, without waiting, whether the host has brought something; the queues that may now have
    /// work. Called again and again while the worker polls, so it must be cheap.
    fn poll(&mut self) -> QueueSet {
        QueueSet::NONE
    }
    /// Applies what control asked for; nothing is in flight. Runs also when paused.
    fn update(&mut self, update: Self::Update) -> Updated;
    /// A state with room for all that [`Device::save`] writes, made by control.
    fn state_buffer() -> Self::State;
    /// It is paused, and nothing is in flight: what it keeps of files reaches them, so that they can be copied, or
    /// opened together with its saved state.
    ///
    /// # Errors
    /// The host's. It is tried again at the next pause, and before it is saved.
    fn settle(&mut self) -> io::Result<()> {
        Ok(())
    }
    /// Writes its state into `state`, a [`Device::state_buffer`]. The device is paused, nothing is in flight,
    /// and nothing may be allocated.
    fn save(&self, state: &mut Self::State);
    /// Called once, at the first resume of a device that was made of a saved state.
    fn was_restored(&mut self) {}
    /// Forgets everything that came from the driver, requests not returned to it included. Nothing
    /// is in flight.
    fn reset(&mut self);
}

/// What a call of [`Device::process`] came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Something was done, and there may be more.
    More,
    /// The queue was found empty by [`Queue::pop`], or the device itself must become ready first.
    /// The driver's next chain in the first case, a [`Device::backend`] or [`Device::poll`] call in
    /// both, brings the queue back.
    Wait,
}

/// What a device has no more use for, in the box that its replacement came in: a worker may neither
/// close nor free.
pub type Replaced = Box<dyn Any + Send>;

/// The outcome of [`Device::update`].
#[derive(Debug, Default)]
pub struct Updated {
    /// The configuration space, when it has changed.
    pub config: Option<ConfigSpace>,
    /// What control is to close: a worker may not.
    pub replaced: Option<Replaced>,
    /// Why the change was not made, if it was not.
    pub failed: Option<io::Error>,
    /// Queues that may now have work.
    pub runnable: QueueSet,
}

/// A set of queue numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueSet(u32);

impl QueueSet {
    /// The most queues that a device may have.
    pub const LIMIT: usize = 32;
    /// No queue.
    pub const NONE: QueueSet = QueueSet(0);
    /// Every queue there is.
    pub const ALL: QueueSet = QueueSet(u32::MAX);

    /// The set of just `index`; empty when no device has such a queue.
    pub const fn one(index: usize) -> Self {
        if index < QueueSet::LIMIT {
            QueueSet(1 << index)
        } else {
            QueueSet::NONE
        }
    }

    /// Adds all of `other`.
    pub const fn insert(&mut self, other: QueueSet) {
        self.0 |= other.0;
    }

    /// Takes all of `other` out.
    pub const fn remove(&mut self, other: QueueSet) {
        self.0 &= !other.0;
    }

    /// Whether `index` is in it.
    pub const fn contains(self, index: usize) -> bool {
        self.0 & QueueSet::one(index).0 != 0
    }
}

/// A ring that cannot be trusted any more: its device needs a reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BrokenRing {
    /// A ring does not lie in guest memory, or is misaligned, or its size is no power of two.
    Layout,
    /// The driver's index runs ahead of the ring.
    AvailIndex,
    /// The driver offered a descriptor that does not exist.
    Head,
    /// Guest memory that was there is gone.
    Memory,
}

impl fmt::Display for BrokenRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            BrokenRing::Layout => "a ring does not lie whole and aligned in guest memory",
            BrokenRing::AvailIndex => "the available index runs ahead of the ring",
            BrokenRing::Head => "the available ring names a descriptor outside the table",
            BrokenRing::Memory => "a ring cannot be reached in guest memory",
        })
    }
}

impl std::error::Error for BrokenRing {}

/// A device's configuration space: up to 64 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConfigSpace {
    bytes: [u8; ConfigSpace::MAX],
}

impl ConfigSpace {
    const MAX: usize = 64;

    /// All zeros.
    pub const fn new() -> Self {
        ConfigSpace {
            bytes: [0; ConfigSpace::MAX],
        }
    }

    /// The same with `field` at `offset`; what does not fit is left out.
    #[must_use]
    pub fn with(mut self, offset: usize, field: &[u8]) -> Self {
        for (to, from) in self.bytes.iter_mut().skip(offset).zip(field) {
            *to = *from;
        }
        self
    }

    /// Fills `data` from `offset` on; zeros beyond the end.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        data.fill(0);
        for (to, from) in data.iter_mut().zip(self.bytes.iter().skip(offset)) {
            *to = *from;
        }
    }
}

impl Default for ConfigSpace {
    fn default() -> Self {
        ConfigSpace::new()
    }
}
