//! The split interrupt chip: KVM keeps the local APICs, and what else a PC has is here, in the
//! monitor. The guest's vCPU threads run this code when the guest reads or writes a register; control
//! makes the chips from their state, and saves them. No thread waits here for another one longer than
//! for a lock, and nothing here is on the way of an interrupt: devices raise theirs by irqfds, which
//! KVM turns into the messages that the I/O APIC's table asks for.
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

#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod ioapic;
pub mod pic;
pub mod pit;

use std::error::Error;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use self::ioapic::{IoApic, IoApicError, IoApicState};
use self::pic::{EdgeLevel, Levels, Pic, PicState};
use self::pit::{Pit, PitState};
use super::chips::Chips;
use super::layout;
use super::vm::Vm;
use crate::bus::{Bus, Overlap};
use crate::state::StateError;
use crate::warn;

/// The chips that are in the monitor, as they are saved.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SplitChipsState {
    /// The I/O APIC.
    pub io_apic: IoApicState,
    /// The 8259s: the master, then the other one.
    pub pics: [PicState; 2],
    /// Which of their lines are levels.
    pub edge_level: Levels,
    /// The 8254, and port 0x61.
    pub pit: PitState,
}

/// Why the chips are not there.
#[derive(Debug)]
pub enum PlaceError {
    /// No chip can be in such a state.
    State(StateError),
    /// The I/O APIC was not made.
    IoApic(IoApicError),
    /// Something has their addresses.
    Overlap(Overlap),
}

impl fmt::Display for PlaceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PlaceError::State(cause) => cause.fmt(f),
            PlaceError::IoApic(cause) => cause.fmt(f),
            PlaceError::Overlap(cause) => cause.fmt(f),
        }
    }
}

impl Error for PlaceError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            PlaceError::State(cause) => cause.source(),
            PlaceError::IoApic(cause) => cause.source(),
            PlaceError::Overlap(cause) => cause.source(),
        }
    }
}

impl From<StateError> for PlaceError {
    fn from(cause: StateError) -> Self {
        PlaceError::State(cause)
    }
}

impl From<Overlap> for PlaceError {
    fn from(cause: Overlap) -> Self {
        PlaceError::Overlap(cause)
    }
}

/// The interrupt lines of a machine: by them a device's eventfd becomes an interrupt.
#[derive(Clone, Debug)]
pub struct Lines {
    vm: Arc<Vm>,
    /// With the split chip.
    split: Option<Arc<SplitChips>>,
}

/// The chips that are in the monitor.
#[derive(Debug)]
struct SplitChips {
    io_apic: Arc<IoApic<Arc<Vm>>>,
    pics: [Arc<Pic>; 2],
    edge_level: Arc<EdgeLevel>,
    pit: Arc<Pit>,
}

impl Lines {
    /// The lines of `vm`, whose chips are where `chips` says: what of them is in the monitor is made
    /// from `state` and put on the buses. KVM has no routes yet; it gets those of the state.
    ///
    /// # Errors
    /// [`PlaceError`], when no chip can be in that state or something has their addresses.
    pub fn place(
        chips: Chips,
        state: &SplitChipsState,
        vm: &Arc<Vm>,
        memory: &mut Bus,
        ports: &mut Bus,
    ) -> Result<Lines, PlaceError> {
        let mut lines = Lines {
            vm: Arc::clone(vm),
            split: None,
        };
        if chips == Chips::Split {
            let split = SplitChips::new(state, vm)?;
            split.place(memory, ports)?;
            lines.split = Some(Arc::new(split));
        }
        Ok(lines)
    }

    /// The state of the chips that are in the monitor; `None` if they are in KVM. A vCPU that runs
    /// may change it at any time.
    pub fn save(&self) -> Option<SplitChipsState> {
        self.split.as_ref().map(|split| split.save())
    }

    /// Makes `line` the eventfd of line `gsi`. With the split chip KVM listens to it from when the
    /// guest first unmasks that line: KVM takes milliseconds to let go of an eventfd at the end of a
    /// VM, and a guest that takes no interrupts is not to wait for that.
    ///
    /// # Errors
    /// The host's.
    pub fn connect(&self, line: &EventFd, gsi: u32) -> io::Result<()> {
        match &self.split {
            Some(split) => split.io_apic.connect(line.try_clone()?, gsi),
            None => Ok(self.vm.register_irqfd(line, gsi)?),
        }
    }

    /// Pulses line `gsi` once, wherever the chips are, whether or not it has an eventfd; nothing comes of
    /// it while the guest masks the line. Not for a thread that has its filter.
    ///
    /// # Errors
    /// The host's.
    pub fn pulse(&self, gsi: u32) -> io::Result<()> {
        self.vm.set_irq_line(gsi, true)?;
        Ok(self.vm.set_irq_line(gsi, false)?)
    }
}

impl SplitChips {
    fn new(state: &SplitChipsState, vm: &Arc<Vm>) -> Result<Self, PlaceError> {
        let missed = Arc::new(Missed::default());
        let [master, slave] = &state.pics;
        let pic = |is_master, state| Pic::new(is_master, state, Arc::clone(&missed));
        let pics = [Arc::new(pic(true, master)?), Arc::new(pic(false, slave)?)];
        let io_apic = IoApic::new(&state.io_apic, Arc::clone(vm), missed);
        Ok(SplitChips {
            io_apic: Arc::new(io_apic.map_err(PlaceError::IoApic)?),
            pics,
            edge_level: Arc::new(EdgeLevel::new(state.edge_level)?),
            pit: Arc::new(Pit::new(&state.pit, Instant::now())?),
        })
    }

    fn save(&self) -> SplitChipsState {
        let [master, slave] = &self.pics;
        SplitChipsState {
            io_apic: self.io_apic.save(),
            pics: [master.save(), slave.save()],
            edge_level: self.edge_level.save(),
            pit: self.pit.save(Instant::now()),
        }
    }

    /// Puts them on the buses.
    fn place(&self, memory: &mut Bus, ports: &mut Bus) -> Result<(), Overlap> {
        memory.insert(layout::IO_APIC.into(), ioapic::LENGTH, self.io_apic.clone())?;
        for (first, pic) in [pic::MASTER_PORT, pic::SLAVE_PORT].iter().zip(&self.pics) {
            ports.insert(*first, pic::PORTS, pic.clone())?;
        }
        ports.insert(pic::EDGE_LEVEL_PORT, pic::PORTS, self.edge_level.clone())?;
        ports.insert(pit::PORT, pit::PORTS, self.pit.clone())?;
        let speaker = pit::Speaker::new(Arc::clone(&self.pit));
        ports.insert(pit::SPEAKER_PORT, 1, Arc::new(speaker))
    }
}

/// Says once that the guest asks for interrupts which only KVM's own chips deliver.
#[derive(Debug, Default)]
pub struct Missed(AtomicBool);

impl Missed {
    /// The guest waits for interrupts from `what`.
    fn warn_once(&self, what: &str) {
        if !self.0.swap(true, Ordering::Relaxed) {
            warn!(
                "The guest waits for interrupts from {what}, which the split interrupt controller \
                 does not have. If it stops here, set \"interrupt_controller\": \"kernel\" in the \
                 machine configuration."
            );
        }
    }

    #[cfg(test)]
    fn has_warned(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
