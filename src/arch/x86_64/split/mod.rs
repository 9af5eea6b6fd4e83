//! The split interrupt chip: KVM keeps the local APICs, and what else a PC has is here, in the
//! monitor. The guest's vCPU threads run this code when the guest reads or writes a register; no
//! other thread does, no thread waits here for another one longer than for a lock, and nothing
//! here is on the way of an interrupt: devices raise theirs by irqfds, which KVM turns into the
//! messages that the I/O APIC's table asks for.
//!
//! - [`ioapic`]: an I/O APIC, whole;
//! - [`pic`]: the two 8259s' registers, without interrupts: kernels look for them, and for
//!   nothing more once they have found the I/O APIC;
//! - [`pit`]: the 8254's counters, without interrupts: kernels measure the processor's clock by
//!   them where KVM's own clock is not used.
//!
//! Why: KVM's own 8259, I/O APIC and 8254 take some 20 ms to take apart when the process ends,
//! these take none. Which guests need KVM's, and who decides: [`super::chips`].
#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

pub mod ioapic;
pub mod pic;
pub mod pit;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vmm_sys_util::eventfd::EventFd;

use self::ioapic::IoApic;
use super::chips::Chips;
use super::layout;
use super::vm::Vm;
use crate::bus::{Bus, Overlap};
use crate::warn;

/// The interrupt lines of a machine: by them a device's eventfd becomes an interrupt.
#[derive(Clone, Debug)]
pub struct Lines {
    vm: Arc<Vm>,
    /// With the split chip.
    io_apic: Option<Arc<IoApic<Arc<Vm>>>>,
}

impl Lines {
    /// The lines of `vm`, whose chips are where `chips` says: what of them is in the monitor is put
    /// on the buses.
    ///
    /// # Errors
    /// [`Overlap`] when something is there already.
    pub fn place(
        chips: Chips,
        vm: &Arc<Vm>,
        memory: &mut Bus,
        ports: &mut Bus,
    ) -> Result<Lines, Overlap> {
        let mut lines = Lines {
            vm: Arc::clone(vm),
            io_apic: None,
        };
        if chips == Chips::Split {
            lines.io_apic = Some(place(vm, memory, ports)?);
        }
        Ok(lines)
    }

    /// Makes `line` the eventfd of line `gsi`. With the split chip KVM listens to it from when the
    /// guest first unmasks that line: KVM takes milliseconds to let go of an eventfd at the end of a
    /// VM, and a guest that takes no interrupts is not to wait for that.
    ///
    /// # Errors
    /// The host's.
    pub fn connect(&self, line: &EventFd, gsi: u32) -> io::Result<()> {
        match &self.io_apic {
            Some(io_apic) => io_apic.connect(line.try_clone()?, gsi),
            None => Ok(self.vm.register_irqfd(line, gsi)?),
        }
    }
}

/// Puts the chips of `vm` on the buses.
fn place(vm: &Arc<Vm>, memory: &mut Bus, ports: &mut Bus) -> Result<Arc<IoApic<Arc<Vm>>>, Overlap> {
    let missed = Arc::new(Missed::default());
    let state = ioapic::IoApicState::default();
    let io_apic = Arc::new(IoApic::new(state, Arc::clone(vm), Arc::clone(&missed)));
    memory.insert(layout::IO_APIC.into(), ioapic::LENGTH, io_apic.clone())?;
    for first in [pic::MASTER_PORT, pic::SLAVE_PORT] {
        let pic = pic::Pic::new(first == pic::MASTER_PORT, Arc::clone(&missed));
        ports.insert(first, pic::PORTS, Arc::new(pic))?;
    }
    let edge_level = Arc::new(pic::EdgeLevel::default());
    ports.insert(pic::EDGE_LEVEL_PORT, pic::PORTS, edge_level)?;
    let pit = Arc::new(pit::Pit::default());
    ports.insert(pit::PORT, pit::PORTS, Arc::clone(&pit) as _)?;
    ports.insert(pit::SPEAKER_PORT, 1, Arc::new(pit::Speaker::new(pit)))?;
    Ok(io_apic)
}

/// Says once that the guest asks for interrupts which only KVM's own chips deliver.
#[derive(Debug, Default)]
pub struct Missed(AtomicBool);

impl Missed {
    /// The guest waits for interrupts from `what`.
    fn tell(&self, what: &str) {
        if !self.0.swap(true, Ordering::Relaxed) {
            warn!(
                "The guest waits for interrupts from {what}, which the split interrupt controller \
                 does not have. If it stops here, set \"interrupt_controller\": \"kernel\" in the \
                 machine configuration."
            );
        }
    }

    #[cfg(test)]
    fn was_told(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
