//! The way from a device to the guest: status bits and an interrupt line.
//!
//! Shared by the worker, which raises, and the registers, which show and acknowledge. Atomics and
//! an eventfd: no thread ever waits here.

use vmm_sys_util::eventfd::EventFd;

use crate::sys::sync::Bell;
use crate::sys::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// Bits of InterruptStatus and InterruptACK (virtio 1.2, 4.2.2).
mod bit {
    /// The device used a buffer.
    pub const USED_BUFFER: u32 = 1;
    /// The configuration, or the need for a reset, changed.
    pub const CONFIG_CHANGE: u32 = 2;
}

/// All bits of InterruptStatus.
pub const STATUS_BITS: u32 = bit::USED_BUFFER | bit::CONFIG_CHANGE;

/// One device's interrupt.
#[derive(Debug)]
pub struct Interrupt {
    status: AtomicU32,
    needs_reset: AtomicBool,
    /// Registered with KVM as an irqfd.
    line: Bell,
}

impl Interrupt {
    /// An interrupt that pulses `line`.
    pub fn new(line: EventFd) -> Self {
        Interrupt {
            status: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
            line: line.into(),
        }
    }

    /// Shows what a saved one showed, and the configuration's change if it has one. The line stays as
    /// it is, until [`Interrupt::raise_again`].
    pub fn restore(&self, status: u32, needs_reset: bool, config_has_changed: bool) {
        let change = if config_has_changed {
            bit::CONFIG_CHANGE
        } else {
            0
        };
        self.needs_reset.store(needs_reset, Ordering::SeqCst);
        self.status.store(status | change, Ordering::SeqCst);
    }

    /// Pulses the line if there is something that the driver has not acknowledged: the pulse may
    /// have been lost.
    pub fn raise_again(&self) {
        if self.status() != 0 {
            self.raise(0);
        }
    }

    /// Tells the driver that buffers were used.
    pub fn used_buffers(&self) {
        self.raise(bit::USED_BUFFER);
    }

    /// Tells the driver that the configuration space changed.
    pub fn config_changed(&self) {
        self.raise(bit::CONFIG_CHANGE);
    }

    /// Tells the driver that the device needs a reset (virtio 1.2, 2.1.2).
    pub fn demand_reset(&self) {
        self.needs_reset.store(true, Ordering::SeqCst);
        self.raise(bit::CONFIG_CHANGE);
    }

    /// Whether the device needs a reset.
    pub fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    /// The value of InterruptStatus.
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// A write to InterruptACK.
    pub fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    /// Back to the start, after the device was reset.
    pub fn clear(&self) {
        self.needs_reset.store(false, Ordering::SeqCst);
        self.status.store(0, Ordering::SeqCst);
    }

    fn raise(&self, bits: u32) {
        self.status.fetch_or(bits, Ordering::SeqCst);
        self.line.ring();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    #[test]
    fn status_when_raised_and_acknowledged_follows() {
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let interrupt = Interrupt::new(line.try_clone().unwrap());
        interrupt.used_buffers();
        interrupt.config_changed();
        assert_eq!(interrupt.status(), 3);
        assert_eq!(line.read().unwrap(), 2);
        interrupt.acknowledge(1);
        assert_eq!(interrupt.status(), 2);
        interrupt.acknowledge(u32::MAX);
        assert_eq!(interrupt.status(), 0);
    }

    #[test]
    fn needs_reset_when_cleared_is_gone() {
        let interrupt = Interrupt::new(EventFd::new(EFD_NONBLOCK).unwrap());
        interrupt.demand_reset();
        assert!(interrupt.needs_reset());
        assert_eq!(interrupt.status(), 2);
        interrupt.clear();
        assert!(!interrupt.needs_reset());
        assert_eq!(interrupt.status(), 0);
    }
}
