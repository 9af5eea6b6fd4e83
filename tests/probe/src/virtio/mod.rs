//! The driver's half of virtio-mmio version 2 (virtio 1.2, section 4.2), by polling.
//!
//! A [`Device`] is a register window found on the command line. It hides nothing: attacks use
//! the same registers and rings as the ordinary words. Dropping it resets the device, so that
//! no word leaves one running over memory that the next word uses.

pub mod queue;

use crate::arena::Arena;
use crate::text::Text;
use crate::{boot, clock, text, x86};
use queue::Queue;

/// Register offsets (virtio 1.2, section 4.2.2).
pub mod reg {
    pub const MAGIC: u64 = 0x00;
    pub const VERSION: u64 = 0x04;
    pub const DEVICE_ID: u64 = 0x08;
    pub const DEVICE_FEATURES: u64 = 0x10;
    pub const DEVICE_FEATURES_SELECT: u64 = 0x14;
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_SELECT: u64 = 0x24;
    pub const QUEUE_SELECT: u64 = 0x30;
    pub const QUEUE_SIZE_MAX: u64 = 0x34;
    pub const QUEUE_SIZE: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const QUEUE_NOTIFY: u64 = 0x50;
    pub const INTERRUPT_STATUS: u64 = 0x60;
    pub const INTERRUPT_ACK: u64 = 0x64;
    pub const STATUS: u64 = 0x70;
    pub const QUEUE_DESCRIPTORS: u64 = 0x80;
    pub const QUEUE_DRIVER: u64 = 0x90;
    pub const QUEUE_DEVICE: u64 = 0xa0;
    pub const CONFIG_GENERATION: u64 = 0xfc;
    pub const CONFIG: u64 = 0x100;
}

/// Device status bits (section 2.1).
pub mod status {
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 2;
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
    pub const NEEDS_RESET: u32 = 0x40;
    pub const FAILED: u32 = 0x80;
}

/// Feature bits of every device (section 6).
pub mod feature {
    pub const INDIRECT_DESC: u64 = 1 << 28;
    pub const EVENT_IDX: u64 = 1 << 29;
    pub const VERSION_1: u64 = 1 << 32;
}

/// Device types (section 5).
pub const NET: u32 = 1;
pub const BLOCK: u32 = 2;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");

pub struct Device {
    base: u64,
    pub id: u32,
    /// What was negotiated; 0 before that.
    pub features: u64,
}

/// Where the `index`th device named on the command line is.
pub fn address(index: u64) -> Option<u64> {
    let word = boot::info()
        .options("virtio_mmio.device=")
        .nth(index as usize)?;
    let address = word.split_once('@')?.1.split(':').next()?;
    match address.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => address.parse().ok(),
    }
}

/// How many devices the command line names.
pub fn count() -> u64 {
    boot::info().options("virtio_mmio.device=").count() as u64
}

impl Device {
    /// Device `index`, recognised and reset.
    pub fn find(index: u64) -> Result<Self, Text> {
        let base = address(index).ok_or_else(|| text!("no device {index} on the command line"))?;
        let mut device = Device {
            base,
            id: 0,
            features: 0,
        };
        let (magic, version) = (device.read(reg::MAGIC), device.read(reg::VERSION));
        if magic != MAGIC || version != 2 {
            // Dropping it would write to something that is no device.
            core::mem::forget(device);
            return Err(text!("at {base:#x}: magic {magic:#x} version {version}"));
        }
        device.id = device.read(reg::DEVICE_ID);
        device.reset()?;
        Ok(device)
    }

    /// The same, if it is of the wanted type.
    pub fn find_type(index: u64, id: u32) -> Result<Self, Text> {
        let device = Self::find(index)?;
        if device.id != id {
            return Err(text!("device {index} is of type {}", device.id));
        }
        Ok(device)
    }

    pub fn base(&self) -> u64 {
        self.base
    }

    pub fn read(&self, register: u64) -> u32 {
        x86::load(self.base + register, 4) as u32
    }

    pub fn write(&self, register: u64, value: u32) {
        x86::store(self.base + register, 4, u64::from(value));
    }

    /// A field of the configuration space, read consistently (section 2.5.3.1).
    pub fn config(&self, offset: u64, size: u8) -> u64 {
        loop {
            let before = self.read(reg::CONFIG_GENERATION);
            let value = match size {
                8 => {
                    let low = x86::load(self.base + reg::CONFIG + offset, 4);
                    low | x86::load(self.base + reg::CONFIG + offset + 4, 4) << 32
                }
                _ => x86::load(self.base + reg::CONFIG + offset, size),
            };
            if self.read(reg::CONFIG_GENERATION) == before {
                return value;
            }
        }
    }

    pub fn status(&self) -> u32 {
        self.read(reg::STATUS)
    }

    /// Writes 0 to the status and waits until it reads 0.
    pub fn reset(&self) -> Result<(), Text> {
        self.write(reg::STATUS, 0);
        if clock::wait_until(clock::patience_ms(), || self.status() == 0) {
            Ok(())
        } else {
            Err(text!("reset does not end, status {:#x}", self.status()))
        }
    }

    pub fn offered(&self) -> u64 {
        self.write(reg::DEVICE_FEATURES_SELECT, 0);
        let low = self.read(reg::DEVICE_FEATURES);
        self.write(reg::DEVICE_FEATURES_SELECT, 1);
        u64::from(low) | u64::from(self.read(reg::DEVICE_FEATURES)) << 32
    }

    /// From reset to FEATURES_OK with what is offered of `wanted`, VERSION_1, EVENT_IDX and
    /// INDIRECT_DESC (section 3.1.1, steps 1 to 6).
    pub fn negotiate(&mut self, wanted: u64) -> Result<(), Text> {
        self.reset()?;
        self.write(reg::STATUS, status::ACKNOWLEDGE);
        self.write(reg::STATUS, status::ACKNOWLEDGE | status::DRIVER);
        let wanted = wanted | feature::VERSION_1 | feature::EVENT_IDX | feature::INDIRECT_DESC;
        let features = self.offered() & wanted;
        self.write(reg::DRIVER_FEATURES_SELECT, 0);
        self.write(reg::DRIVER_FEATURES, features as u32);
        self.write(reg::DRIVER_FEATURES_SELECT, 1);
        self.write(reg::DRIVER_FEATURES, (features >> 32) as u32);
        let accepted = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
        self.write(reg::STATUS, accepted);
        if self.status() & status::FEATURES_OK == 0 {
            return Err(text!("features {features:#x} refused"));
        }
        self.features = features;
        Ok(())
    }

    /// The device's limit for a queue; 0 when there is none of that number.
    pub fn queue_size_max(&self, queue: u32) -> u32 {
        self.write(reg::QUEUE_SELECT, queue);
        self.read(reg::QUEUE_SIZE_MAX)
    }

    /// Makes queue `index` of at most `limit` entries and tells the device.
    pub fn queue(&self, arena: &mut Arena, index: u32, limit: u32) -> Result<Queue, Text> {
        let max = self.queue_size_max(index);
        if max == 0 {
            return Err(text!("no queue {index}"));
        }
        let size = 1 << max.min(limit).ilog2();
        let queue = Queue::new(
            arena,
            size as u16,
            self.features & feature::EVENT_IDX != 0,
            self.features & feature::INDIRECT_DESC != 0,
        )?;
        self.tell_queue(index, &queue);
        if self.read(reg::QUEUE_READY) != 1 {
            return Err(text!("queue {index} does not become ready"));
        }
        Ok(queue)
    }

    /// Tells the device of a queue as it is.
    pub fn tell_queue(&self, index: u32, queue: &Queue) {
        let size = u32::from(queue.size);
        self.tell(index, size, queue.descriptors, queue.avail, queue.used);
    }

    /// Writes a queue's registers and makes it ready: any values, for attacks.
    pub fn tell(&self, index: u32, size: u32, descriptors: u64, driver: u64, device: u64) {
        self.write(reg::QUEUE_SELECT, index);
        self.write(reg::QUEUE_SIZE, size);
        for (register, address) in [
            (reg::QUEUE_DESCRIPTORS, descriptors),
            (reg::QUEUE_DRIVER, driver),
            (reg::QUEUE_DEVICE, device),
        ] {
            self.write(register, address as u32);
            self.write(register + 4, (address >> 32) as u32);
        }
        self.write(reg::QUEUE_READY, 1);
    }

    pub fn driver_ok(&self) {
        self.write(reg::STATUS, self.status() | status::DRIVER_OK);
    }

    pub fn kick(&self, queue: u32) {
        self.write(reg::QUEUE_NOTIFY, queue);
    }

    /// Reads and acknowledges the interrupt bits.
    pub fn take_interrupts(&self) -> u32 {
        let bits = self.read(reg::INTERRUPT_STATUS);
        if bits != 0 {
            self.write(reg::INTERRUPT_ACK, bits);
        }
        bits
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // A device that does not reset has been reported by the word that needed it.
        let _ = self.reset();
    }
}
