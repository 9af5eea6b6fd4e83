//! The virtio-mmio register block, version 2 (virtio 1.2, 4.2.2): what the guest's driver sees.
//!
//! There is one for a device, however many workers it has; each is told of its own queues, and a reset is
//! complete when all of them have reset.
//!
//! It belongs to the vCPUs, behind one mutex that is never held while anything waits. Control
//! takes it too when an update has changed the configuration space. It knows what the device
//! offers and what the driver chose; it never touches guest memory, and what becomes of the
//! driver's choices is the worker's business.
//!
//! Registers are 32 bits wide and aligned (4.2.2.1); any other access to them reads as zeros and
//! writes nothing. The configuration space takes any size; beyond its end there are zeros. What
//! the driver may not do at this moment is ignored and counted.

#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod state;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::sync::{Arc, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::queue::QueueLayout;
use super::share::{Division, PerWorker};
use super::status::{ACKNOWLEDGE, DEVICE_NEEDS_RESET, DRIVER, DRIVER_OK, FAILED, FEATURES_OK};
use super::{ConfigSpace, Counter, Interrupt, feature};
use crate::bus::{self, Completer, Ticket, Tickets, Written};
use crate::guest_warn;
use crate::inbox::Sender;
use crate::sys::sync::{Mutex, MutexGuard};
pub use state::RegistersState;

/// Length of the block in bytes.
pub const LENGTH: u64 = 0x1000;

/// Offset of QueueNotify, for ioeventfds (datamatch: the queue's number, 4 bytes).
pub const QUEUE_NOTIFY: u64 = reg::QUEUE_NOTIFY;

/// Register offsets (virtio 1.2, 4.2.2, table 4.1).
mod reg {
    pub const MAGIC_VALUE: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_ID: u64 = 0x008;
    pub const VENDOR_ID: u64 = 0x00c;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub const QUEUE_SEL: u64 = 0x030;
    pub const QUEUE_NUM_MAX: u64 = 0x034;
    pub const QUEUE_NUM: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const INTERRUPT_STATUS: u64 = 0x060;
    pub const INTERRUPT_ACK: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESC_LOW: u64 = 0x080;
    pub const QUEUE_DESC_HIGH: u64 = 0x084;
    pub const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x094;
    pub const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
    pub const SHM_LEN_LOW: u64 = 0x0b0;
    pub const SHM_BASE_HIGH: u64 = 0x0bc;
    pub const CONFIG_GENERATION: u64 = 0x0fc;
    pub const CONFIG: u64 = 0x100;
}

/// "virt", little-endian.
const MAGIC: u32 = 0x7472_6976;
/// Not a legacy device.
const VERSION: u32 = 2;
/// Drivers do not look at it.
const VENDOR: u32 = 0;
/// What SHMLen and SHMBase read when there is no such shared memory region.
const NO_SHARED_MEMORY: u32 = u32::MAX;

/// What a driver may do to Status, beside giving up (FAILED) and resetting (0): from, to. Some
/// drivers set the first two bits in one write.
const STEPS: [(u32, u32); 5] = [
    (0, ACKNOWLEDGE),
    (0, ACKNOWLEDGE | DRIVER),
    (ACKNOWLEDGE, ACKNOWLEDGE | DRIVER),
    (ACKNOWLEDGE | DRIVER, ACKNOWLEDGE | DRIVER | FEATURES_OK),
    (
        ACKNOWLEDGE | DRIVER | FEATURES_OK,
        ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK,
    ),
];

/// What a driver tells the device, by way of its registers.
#[derive(Debug)]
pub enum DriverMsg {
    /// A queue that the activation that follows is to serve.
    Queue {
        /// Its place among those of the worker.
        index: usize,
        /// As described, and unchecked.
        layout: QueueLayout,
    },
    /// DRIVER_OK: serve the queues.
    Activate {
        /// What was negotiated.
        features: u64,
    },
    /// Status was set to 0: end what is in flight, forget the queues, then drop the completer.
    Reset(Completer),
}

/// What a device's registers offer to a driver.
pub(super) struct Offer {
    /// The kind of device (virtio 1.2, 5).
    pub device_id: u32,
    /// All features.
    pub features: u64,
    /// Their names, for messages.
    pub feature_names: fn(u64) -> String,
    /// Its queues, and whose they are.
    pub division: Division,
    /// The configuration space.
    pub config: ConfigSpace,
}

/// How many messages can be under way for a worker with `queues` queues: each vCPU (32) waits for
/// its own reset, and one activation precedes a reset.
pub(super) const fn driver_messages(queues: usize) -> usize {
    queues.saturating_add(40)
}

/// One device's registers.
pub struct Registers {
    device_id: u32,
    offered: u64,
    division: Division,
    kicks: Vec<EventFd>,
    interrupt: Arc<Interrupt>,
    workers: PerWorker<Sender<DriverMsg>>,
    /// Accesses that no driver should have made.
    ignored: Counter,
    block: Mutex<RegisterBlock>,
}

/// What is behind the mutex.
#[derive(Debug)]
struct RegisterBlock {
    status: u32,
    /// A reset that the worker has not completed: Status stays as it is, and nothing else is taken.
    resetting: Option<Ticket>,
    tickets: Tickets,
    device_features_sel: u32,
    driver_features_sel: u32,
    accepted: u64,
    queue_sel: u32,
    layouts: Box<[QueueLayout]>,
    config: ConfigSpace,
    generation: u32,
}

impl Registers {
    /// The registers of a device in `state`, as it was saved or of a new one. `feature_names` is for
    /// the message about features that the driver uses and the device does not offer.
    ///
    /// # Errors
    /// When the host has no descriptor left for the kicks, or `state` cannot be.
    pub(super) fn new(
        offer: Offer,
        state: &RegistersState,
        interrupt: Arc<Interrupt>,
        workers: PerWorker<Sender<DriverMsg>>,
    ) -> io::Result<Self> {
        let Offer {
            device_id,
            features: offered,
            feature_names,
            division,
            config,
        } = offer;
        let queues = division.sizes().len();
        state
            .check(offered, queues, feature_names)
            .map_err(io::Error::other)?;
        let tickets = Tickets::completed_by(division.workers());
        let (block, config_has_changed) = RegisterBlock::new(state, config, queues, tickets);
        let tell = config_has_changed && block.has_driver();
        interrupt.restore(state.interrupt_status, state.needs_reset, tell);
        let kicks = (0..queues)
            .map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC))
            .collect::<io::Result<_>>()?;
        Ok(Registers {
            device_id,
            offered,
            division,
            kicks,
            interrupt,
            workers,
            ignored: Counter::default(),
            block: Mutex::new(block),
        })
    }

    /// The queues' kicks, by queue number: to be registered as ioeventfds at [`QUEUE_NOTIFY`].
    pub fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    /// The interrupt these registers show.
    #[cfg(any(test, fuzzing))]
    pub fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    /// Accesses so far that were ignored because no driver should have made them.
    #[cfg(test)]
    pub fn ignored(&self) -> u64 {
        self.ignored.get()
    }

    /// Changes the configuration space, and tells the driver if there is one.
    pub fn set_config(&self, config: ConfigSpace) {
        let mut block = self.lock();
        block.config = config;
        block.generation = block.generation.wrapping_add(1);
        if block.has_driver() {
            self.interrupt.config_changed();
        }
    }

    fn lock(&self) -> MutexGuard<'_, RegisterBlock> {
        // A thread that panics ends the process; in tests the data is as whole as it was.
        let mut block = self.block.lock().unwrap_or_else(PoisonError::into_inner);
        if block.resetting.as_ref().is_some_and(Ticket::is_done) {
            self.finish_reset(&mut block);
        }
        block
    }

    fn finish_reset(&self, block: &mut RegisterBlock) {
        self.interrupt.clear();
        block.status = 0;
        block.resetting = None;
        block.device_features_sel = 0;
        block.driver_features_sel = 0;
        block.accepted = 0;
        block.queue_sel = 0;
        block.layouts.fill(QueueLayout::default());
    }

    fn read_register(&self, offset: u64) -> Option<u32> {
        match offset {
            reg::MAGIC_VALUE => return Some(MAGIC),
            reg::VERSION => return Some(VERSION),
            reg::DEVICE_ID => return Some(self.device_id),
            reg::VENDOR_ID => return Some(VENDOR),
            reg::SHM_LEN_LOW..=reg::SHM_BASE_HIGH => return Some(NO_SHARED_MEMORY),
            _ => {}
        }
        let block = self.lock();
        Some(match offset {
            reg::DEVICE_FEATURES => match block.device_features_sel {
                0 => low(self.offered),
                1 => high(self.offered),
                _ => 0,
            },
            reg::QUEUE_NUM_MAX => block
                .selected()
                .and_then(|i| self.division.sizes().get(i))
                .map_or(0, |size| u32::from(*size)),
            reg::QUEUE_READY => block
                .selected()
                .and_then(|i| block.layouts.get(i))
                .map_or(0, |layout| u32::from(layout.ready)),
            // Behind the lock too: a reset that has just been completed clears it.
            reg::INTERRUPT_STATUS => self.interrupt.status(),
            reg::STATUS if self.interrupt.needs_reset() => block.status | DEVICE_NEEDS_RESET,
            reg::STATUS => block.status,
            reg::CONFIG_GENERATION => block.generation,
            _ => return None,
        })
    }

    /// What came of writing `value`; `None` when that may not be done, or not now.
    fn write_register(&self, offset: u64, value: u32) -> Option<Written> {
        match offset {
            reg::INTERRUPT_ACK => {
                self.interrupt.acknowledge(value);
                return Some(Written::Done);
            }
            reg::QUEUE_NOTIFY => {
                // Ordinarily an ioeventfd, and never seen here.
                let kick = self.kicks.get(usize::try_from(value).ok()?)?;
                let _ = kick.write(1);
                return Some(Written::Done);
            }
            _ => {}
        }
        let mut block = self.lock();
        let block = &mut *block;
        if offset == reg::STATUS {
            return self.write_status(block, value);
        }
        if block.resetting.is_some() {
            return None;
        }
        match offset {
            reg::DEVICE_FEATURES_SEL => block.device_features_sel = value,
            reg::DRIVER_FEATURES_SEL => block.driver_features_sel = value,
            reg::QUEUE_SEL => block.queue_sel = value,
            reg::DRIVER_FEATURES => {
                if !block.is_between(DRIVER, FEATURES_OK) {
                    return None;
                }
                let rest = block.accepted;
                block.accepted = match block.driver_features_sel {
                    0 => with_low(rest, value),
                    1 => with_high(rest, value),
                    // Bits that do not exist can only be refused.
                    _ if value == 0 => rest,
                    _ => return None,
                };
            }
            _ => {
                if !block.is_between(FEATURES_OK, DRIVER_OK) {
                    return None;
                }
                let index = block.selected().filter(|i| *i < self.kicks.len())?;
                let layout = block.layouts.get_mut(index)?;
                match offset {
                    reg::QUEUE_NUM => layout.size = value,
                    reg::QUEUE_READY => layout.ready = value & 1 != 0,
                    reg::QUEUE_DESC_LOW => layout.descriptors = with_low(layout.descriptors, value),
                    reg::QUEUE_DESC_HIGH => {
                        layout.descriptors = with_high(layout.descriptors, value);
                    }
                    reg::QUEUE_DRIVER_LOW => layout.avail = with_low(layout.avail, value),
                    reg::QUEUE_DRIVER_HIGH => layout.avail = with_high(layout.avail, value),
                    reg::QUEUE_DEVICE_LOW => layout.used = with_low(layout.used, value),
                    reg::QUEUE_DEVICE_HIGH => layout.used = with_high(layout.used, value),
                    _ => return None,
                }
            }
        }
        Some(Written::Done)
    }

    fn write_status(&self, block: &mut RegisterBlock, value: u32) -> Option<Written> {
        if value == 0 {
            return Some(self.reset(block));
        }
        if block.resetting.is_some() {
            return None;
        }
        // Drivers write back what they read; this bit is ours.
        let value = value & !DEVICE_NEEDS_RESET;
        let status = block.status;
        if value == status {
            return Some(Written::Done);
        }
        if value == status | FAILED {
            block.status = value;
            return Some(Written::Done);
        }
        if !STEPS.contains(&(status, value)) {
            return None;
        }
        if value & !status == FEATURES_OK {
            self.forget_unknown(block);
            if !self.can_accept(block.accepted) {
                // Refused by leaving the bit clear (3.1.1, step 6).
                return None;
            }
        }
        block.status = value;
        if value & !status == DRIVER_OK && !self.activate(block) {
            // The worker is gone.
            self.interrupt.demand_reset();
        }
        Some(Written::Done)
    }

    /// Tells each worker of its queues and to serve them; whether that reached all.
    fn activate(&self, block: &RegisterBlock) -> bool {
        let described = block.layouts.iter().copied().enumerate();
        let mut queues = described.filter(|(_, layout)| layout.ready);
        let features = block.accepted;
        queues.all(|(queue, layout)| {
            let (worker, index) = self.division.owner(queue);
            let message = DriverMsg::Queue { index, layout };
            let worker = self.workers.get(worker);
            worker.is_some_and(|worker| worker.send(message).is_ok())
        }) && self
            .workers
            .iter()
            .all(|worker| worker.send(DriverMsg::Activate { features }).is_ok())
    }

    fn reset(&self, block: &mut RegisterBlock) -> Written {
        if !block.has_driver() {
            self.finish_reset(block);
            return Written::Done;
        }
        let (ticket, completers) = block.tickets.issue();
        let mut reached_any = false;
        for (worker, completer) in self.workers.iter().zip(completers) {
            // What does not reach a worker is completed at once: it is gone, and with it everything that
            // was in flight.
            reached_any |= worker.send(DriverMsg::Reset(completer)).is_ok();
        }
        if !reached_any {
            self.finish_reset(block);
            return Written::Done;
        }
        // Messages are taken in order: of several resets the first is the one that counts.
        block.resetting.get_or_insert_with(|| ticket.clone());
        Written::After(ticket)
    }

    /// Takes features of this kind of device that it does not offer for not accepted. There are drivers that accept some
    /// always and work without them, and never read whether that was refused.
    fn forget_unknown(&self, block: &mut RegisterBlock) {
        let unknown = block.accepted & !self.offered & feature::OF_A_DEVICE;
        if unknown != 0 {
            guest_warn!(
                "The driver of a device of the kind {} accepted features that were not offered, {unknown:#x}; they \
                 are ignored.",
                self.device_id
            );
            block.accepted &= !unknown;
        }
        if !self.can_accept(block.accepted) {
            guest_warn!(
                "The driver of a device of the kind {} is refused: it accepts the features {:#x}. It may accept {:#x}, \
                 and must accept VIRTIO_F_VERSION_1.",
                self.device_id,
                block.accepted,
                self.offered
            );
        }
    }

    fn can_accept(&self, features: u64) -> bool {
        features & !self.offered == 0 && features & feature::VERSION_1 != 0
    }
}

impl bus::Registers for Registers {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(at) = offset.checked_sub(reg::CONFIG) {
            if let Ok(at) = usize::try_from(at) {
                self.lock().config.read(at, data);
            }
        } else if let Ok(data) = <&mut [u8; 4]>::try_from(data)
            && let Some(value) = self.read_register(offset)
        {
            *data = value.to_le_bytes();
        } else {
            self.ignored.one();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Written {
        // No field of our devices' configuration spaces may be written.
        let written = if offset < reg::CONFIG
            && let Ok(data) = <[u8; 4]>::try_from(data)
        {
            self.write_register(offset, u32::from_le_bytes(data))
        } else {
            None
        };
        written.unwrap_or_else(|| {
            self.ignored.one();
            Written::Done
        })
    }
}

impl RegisterBlock {
    /// Whether the device was activated and has not been reset since.
    fn has_driver(&self) -> bool {
        self.status & DRIVER_OK != 0
    }

    /// Whether the driver has reached `from`, not yet `to`, and has not given up.
    fn is_between(&self, from: u32, to: u32) -> bool {
        self.status & (from | to | FAILED) == from
    }

    fn selected(&self) -> Option<usize> {
        usize::try_from(self.queue_sel).ok()
    }
}

impl fmt::Debug for Registers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registers")
            .field("device_id", &self.device_id)
            .finish_non_exhaustive()
    }
}

const fn low(value: u64) -> u32 {
    (value & 0xffff_ffff) as u32
}

const fn high(value: u64) -> u32 {
    (value >> 32) as u32
}

const fn with_low(value: u64, low: u32) -> u64 {
    value & !0xffff_ffff | low as u64
}

const fn with_high(value: u64, high: u32) -> u64 {
    value & 0xffff_ffff | (high as u64) << 32
}
