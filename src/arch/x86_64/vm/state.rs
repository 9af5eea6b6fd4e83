//! What KVM knows of a virtual machine beside its vCPUs: the clock that guests read, and the
//! interrupt chips where they are KVM's.
//!
//! [`Vm::save`] runs on control's thread while all vCPUs are paused: what they have read of the clock
//! is before what is saved. [`Vm::restore`] runs once all vCPUs have their state, and before one runs:
//! the I/O APIC delivers at once what is pending in it, to local APICs that must be the saved ones by
//! then.

use kvm_bindings::{KVM_CLOCK_REALTIME, kvm_clock_data};
use kvm_ioctls::Cap;
use serde::{Deserialize, Serialize};

use super::super::chips::Chips;
use super::super::mirror::mirror;
use super::{Vm, VmError};
use crate::sys::clock;
use crate::sys::kvm::blocks::{self, Pic};

/// KVM's state of a virtual machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmState {
    /// KVM's clock.
    pub clock: ClockState,
    /// The interrupt chips.
    pub chips: ChipsState,
}

/// KVM's clock, and the host's wall clock at the same moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClockState {
    /// What guests read, in nanoseconds.
    pub nanos: u64,
    /// The host's wall clock, in nanoseconds since 1970.
    pub realtime: u64,
}

/// How a restored guest's clock goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClockAfterRestore {
    /// From where it stopped: monotonic time does not jump, the wall clock is behind by as long as
    /// the guest did not run.
    Continue,
    /// From where it would be had the guest run on: both are right, and monotonic time jumps. It never
    /// goes back, also where the host's wall clock has.
    CatchUp,
}

/// Where the interrupt chips are, and their state where they are KVM's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub enum ChipsState {
    /// In KVM.
    Kernel(Box<KernelChips>),
    /// In the monitor, which saves them itself; the local APICs are part of the vCPUs.
    Split,
}

/// KVM's 8259s, I/O APIC and 8254.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KernelChips {
    /// The 8259 with lines 0 to 7.
    pub master: PicState,
    /// The 8259 with lines 8 to 15.
    pub slave: PicState,
    /// The I/O APIC.
    pub io_apic: IoApicState,
    /// The counters of the 8254.
    pub pit: [PitCounter; 3],
    /// `KVM_PIT_FLAGS_*`
    pub pit_flags: u32,
}

mirror! {
    /// An 8259.
    PicState of kvm_pic_state {
        last_irr: u8, irr: u8, imr: u8, isr: u8, priority_add: u8, irq_base: u8,
        read_reg_select: u8, poll: u8, special_mask: u8, init_state: u8, auto_eoi: u8,
        rotate_on_auto_eoi: u8, special_fully_nested_mode: u8, init4: u8, elcr: u8, elcr_mask: u8,
    }
}

mirror! {
    /// A counter of the 8254. When it was started is the host's time, and KVM sets it anew.
    PitCounter of kvm_pit_channel_state {
        count: u32, latched_count: u16, count_latched: u8, status_latched: u8, status: u8,
        read_state: u8, write_state: u8, write_latch: u8, rw_mode: u8, mode: u8, bcd: u8, gate: u8,
    }
}

/// The I/O APIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IoApicState {
    /// Registers.
    pub registers: IoApicRegisters,
    /// The table of lines.
    pub entries: [u64; 24],
}

mirror! {
    /// The I/O APIC's registers but for its table.
    IoApicRegisters of kvm_ioapic_state { base_address: u64, ioregsel: u32, id: u32, irr: u32 }
}

impl ChipsState {
    /// Where they are.
    pub fn place(&self) -> Chips {
        match self {
            ChipsState::Kernel(_) => Chips::Kernel,
            ChipsState::Split => Chips::Split,
        }
    }
}

impl Vm {
    /// Takes the state of a virtual machine whose vCPUs are paused.
    ///
    /// # Errors
    /// [`VmError::Save`] when KVM does not give a part of it.
    pub fn save(&self) -> Result<VmState, VmError> {
        let failed = |what| move |cause| VmError::Save { what, cause };
        let clock = self.fd.get_clock().map_err(|e| failed("clock")(e.into()))?;
        let realtime = match clock.flags & KVM_CLOCK_REALTIME {
            0 => clock::realtime_nanos(),
            _ => clock.realtime,
        };
        let chips = match self.chips {
            Chips::Split => ChipsState::Split,
            Chips::Kernel => {
                let io_apic = blocks::io_apic(&self.fd).map_err(failed("I/O APIC"))?;
                let (registers, entries) = io_apic;
                let pit = self.fd.get_pit2();
                let pit = pit.map_err(|e| failed("timer")(e.into()))?;
                let pic = |which| blocks::pic(&self.fd, which).map_err(failed("8259"));
                ChipsState::Kernel(Box::new(KernelChips {
                    master: pic(Pic::Master)?.into(),
                    slave: pic(Pic::Slave)?.into(),
                    io_apic: IoApicState {
                        registers: registers.into(),
                        entries,
                    },
                    pit: pit.channels.map(Into::into),
                    pit_flags: pit.flags,
                }))
            }
        };
        Ok(VmState {
            clock: ClockState {
                nanos: clock.clock,
                realtime,
            },
            chips,
        })
    }

    /// Puts `state` back, after the vCPUs have theirs.
    ///
    /// # Errors
    /// [`VmError::Restore`] for the part that KVM refuses, [`VmError::OtherChips`] for the state of a
    /// machine whose chips are elsewhere.
    pub fn restore(&self, state: &VmState, then: ClockAfterRestore) -> Result<(), VmError> {
        let failed = |what| move |cause| VmError::Restore { what, cause };
        match (&state.chips, self.chips) {
            (ChipsState::Split, Chips::Split) => {}
            (ChipsState::Kernel(chips), Chips::Kernel) => {
                let mut pit = kvm_bindings::kvm_pit_state2 {
                    flags: chips.pit_flags,
                    ..kvm_bindings::kvm_pit_state2::default()
                };
                pit.channels = chips.pit.map(Into::into);
                let set = self.fd.set_pit2(&pit);
                set.map_err(|e| failed("timer")(e.into()))?;
                for (which, pic) in [(Pic::Master, chips.master), (Pic::Slave, chips.slave)] {
                    blocks::set_pic(&self.fd, which, &pic.into()).map_err(failed("8259"))?;
                }
                let IoApicState { registers, entries } = chips.io_apic;
                blocks::set_io_apic(&self.fd, (registers.into(), entries))
                    .map_err(failed("I/O APIC"))?;
            }
            (ChipsState::Kernel(_), Chips::Split) | (ChipsState::Split, Chips::Kernel) => {
                return Err(VmError::OtherChips);
            }
        }
        self.set_clock(state.clock, then)
            .map_err(|e| failed("clock")(e.into()))
    }

    fn set_clock(
        &self,
        state: ClockState,
        then: ClockAfterRestore,
    ) -> Result<(), kvm_ioctls::Error> {
        let mut clock = kvm_clock_data {
            clock: state.nanos,
            ..kvm_clock_data::default()
        };
        if then == ClockAfterRestore::CatchUp {
            if self.can_catch_up() {
                clock.flags = KVM_CLOCK_REALTIME;
                clock.realtime = state.realtime;
            } else {
                let passed = clock::realtime_nanos().saturating_sub(state.realtime);
                clock.clock = clock.clock.saturating_add(passed);
            }
        }
        self.fd.set_clock(&clock)
    }

    /// Whether KVM adds the time that has passed itself (Linux 5.16).
    fn can_catch_up(&self) -> bool {
        let can = self.fd.check_extension_int(Cap::AdjustClock);
        can.cast_unsigned() & KVM_CLOCK_REALTIME != 0
    }
}
