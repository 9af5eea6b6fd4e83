//! A whole machine as a state file holds it: what was asked for, and the state of each part.
//!
//! A machine is built of this, always: one that boots has the default, in which every part is new.
//! Only [`crate::snapshot`] knows the file around it. What is in here was read from a file and is
//! distrusted: each part checks its own state when it is made, [`SavedMachine::checked`] what belongs to
//! none of them.

#[cfg(any(test, fuzzing))]
pub mod fuzz;

use serde::{Deserialize, Serialize};

use super::devices::SavedDevices;
use crate::arch::fingerprint::Fingerprint;
use crate::arch::i8042::I8042State;
use crate::arch::power::PowerState;
use crate::arch::split::SplitChipsState;
use crate::arch::vcpu::VcpuState;
use crate::arch::vm::state::VmState;
use crate::serial::UartState;
use crate::snapshot::{FIRST_VERSION, Refusal};
use crate::wire::config::{JsonError, SavedConfig};

/// All that a state file holds beside its header.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedMachine {
    /// What was asked for.
    pub config: SavedConfig,
    /// What the guest depends on of the host's processor.
    pub cpu: Fingerprint,
    /// The state of each part.
    pub state: MachineState,
}

/// The state of each part of a machine; by default all are new.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineState {
    /// KVM's part of the virtual machine: its clock, and the interrupt chips that are in KVM.
    pub vm: Option<VmState>,
    /// The interrupt chips that are in the monitor.
    pub chips: Option<SplitChipsState>,
    /// One for each vCPU, by number.
    pub vcpus: Vec<VcpuState>,
    /// The serial port.
    pub uart: UartState,
    /// The keyboard controller.
    pub keyboard: I8042State,
    /// The registers by which the guest ends its machine.
    pub power: PowerState,
    /// Disks and network interfaces, in the order of the configuration.
    pub devices: SavedDevices,
}

/// The version of the format in which devices may have several queues.
const WITH_QUEUES: (u16, u16) = (1, 1);

impl SavedMachine {
    /// The earliest version of the format that has all members of this.
    pub fn version(&self) -> (u16, u16) {
        let devices = &self.config.devices;
        let mut drives = devices.drives.iter();
        let mut interfaces = devices.network_interfaces.iter();
        // With one queue, also where that was asked for, none of their state has a member of its own: only
        // `queues` does.
        let has_queues = drives.any(|drive| drive.queues.is_some())
            || interfaces.any(|interface| interface.queues.is_some());
        match has_queues {
            true => WITH_QUEUES,
            false => FIRST_VERSION,
        }
    }

    /// The same, if the parts belong together, and KVM's part of it apart.
    ///
    /// # Errors
    /// Which do not.
    pub fn checked(mut self) -> Result<(VmState, Self), Refusal> {
        let wrong = |what: String| Refusal::Content(JsonError::new(what));
        let (vcpus, count) = (self.state.vcpus.len(), self.config.machine.vcpu_count);
        if vcpus != usize::from(count) {
            let what = format!("it has {vcpus} vCPUs, and the machine {count}");
            return Err(wrong(what));
        }
        let vm = self.state.vm.take();
        let vm = vm.ok_or_else(|| wrong("it has no clock".into()))?;
        Ok((vm, self))
    }
}
