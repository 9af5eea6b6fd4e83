//! A built virtual machine: what control holds of it besides its devices, which stay in the list that
//! was configured.

use std::sync::Arc;

use crate::arch::Vm;
use crate::arch::i8042::I8042;
use crate::arch::power::Power;
use crate::inbox::Sender;
use crate::memory::Memory;
use crate::serial::{self, SerialMessage};
use crate::vcpu::{Crash, UnresponsiveVcpu, VcpuHandle};

/// Handles of everything that makes up a VM. The threads own the things themselves.
#[derive(Debug)]
pub struct Machine {
    /// One for each vCPU, by number.
    pub vcpus: Vec<VcpuHandle>,
    /// The serial thread.
    pub console: Sender<SerialMessage>,
    /// What it and the UART count.
    pub console_counters: Arc<serial::Counters>,
    /// Where Ctrl-Alt-Del is pressed.
    pub keyboard: Arc<I8042>,
    /// Where the guest ends its machine, and tells of a panic.
    pub power: Arc<Power>,
    /// Kept open: the last one to hold it ends the virtual machine.
    pub _vm: Arc<Vm>,
    /// Kept mapped.
    pub memory: Memory,
}

impl Machine {
    /// Lets every vCPU run.
    ///
    /// # Errors
    /// When a vCPU's thread does not take messages.
    pub fn run_vcpus(&self) -> Result<(), UnresponsiveVcpu> {
        self.vcpus.iter().try_for_each(VcpuHandle::run)
    }

    /// The same after a pause, which the guest's watchdogs are not to take for a lock-up.
    ///
    /// # Errors
    /// As above.
    pub fn resume_vcpus(&self) -> Result<(), UnresponsiveVcpu> {
        for vcpu in &self.vcpus {
            vcpu.forgive_pause();
        }
        self.run_vcpus()
    }

    /// Asks every vCPU to pause.
    pub fn pause_vcpus(&self) {
        for vcpu in &self.vcpus {
            // The inbox has room: a vCPU is told the next thing once it has answered the last.
            let _ = vcpu.pause();
        }
    }

    /// What is known of vCPU `index`, if it could not go on.
    pub fn crash(&self, index: u8) -> Option<&Crash> {
        self.vcpus.get(usize::from(index))?.crash()
    }

    /// Tells the serial thread to write out what is left; whether it will answer.
    pub fn finish_console(&self) -> bool {
        self.console.send(SerialMessage::Finish).is_ok()
    }
}
