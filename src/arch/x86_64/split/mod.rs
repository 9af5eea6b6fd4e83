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

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::layout;
use super::vm::Vm;
use crate::bus::{Bus, Overlap};
use crate::warn;

/// Puts the chips of `vm` on the buses.
///
/// # Errors
/// [`Overlap`] when something is there already.
pub fn place(vm: &Arc<Vm>, memory: &mut Bus, ports: &mut Bus) -> Result<(), Overlap> {
    let missed = Arc::new(Missed::default());
    let state = ioapic::IoApicState::default();
    let io_apic = ioapic::IoApic::new(state, Arc::clone(vm), Arc::clone(&missed));
    memory.insert(layout::IO_APIC.into(), ioapic::LENGTH, Arc::new(io_apic))?;
    for first in [pic::MASTER_PORT, pic::SLAVE_PORT] {
        let pic = pic::Pic::new(first == pic::MASTER_PORT, Arc::clone(&missed));
        ports.insert(first, pic::PORTS, Arc::new(pic))?;
    }
    ports.insert(
        pic::EDGE_LEVEL_PORT,
        pic::PORTS,
        Arc::new(pic::EdgeLevel::default()),
    )?;
    let pit = Arc::new(pit::Pit::default());
    ports.insert(pit::PORT, pit::PORTS, Arc::clone(&pit) as _)?;
    ports.insert(pit::SPEAKER_PORT, 1, Arc::new(pit::Speaker::new(pit)))
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
