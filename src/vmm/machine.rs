//! A built virtual machine: what control holds of it besides its devices, which stay in the list that
//! was configured.

use std::cell::OnceCell;
use std::sync::Arc;

use kvm_ioctls::Kvm;

use crate::arch::Vm;
use crate::arch::i8042::I8042;
use crate::arch::power::Power;
use crate::arch::split::Lines;
use crate::arch::vcpu::{MsrList, VcpuError, VcpuState};
use crate::inbox::Sender;
use crate::memory::Memory;
use crate::memory::lazy::Handler;
use crate::serial::{self, SerialMessage, SerialPort};
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
    /// The registers of the serial port.
    pub uart: Arc<SerialPort>,
    /// Where Ctrl-Alt-Del is pressed.
    pub keyboard: Arc<I8042>,
    /// Where the guest ends its machine, and tells of a panic.
    pub power: Arc<Power>,
    /// The interrupt lines, and the chips where they are in the monitor.
    pub lines: Lines,
    /// The last one to hold it ends the virtual machine.
    pub vm: Arc<Vm>,
    /// /dev/kvm.
    pub kvm: Arc<Kvm>,
    /// Kept mapped. The files thread has it while it is frozen for a fork.
    pub memory: Option<Memory>,
    /// The process that brings in its pages, if one does.
    pub handler: Option<Handler>,
    /// Which model-specific registers there are, once they have been asked for.
    pub msrs: OnceCell<MsrList>,
}

impl Machine {
    /// Lets every vCPU run.
    ///
    /// # Errors
    /// When a vCPU's thread does not take messages.
    pub fn run_vcpus(&self) -> Result<(), UnresponsiveVcpu> {
        self.vcpus.iter().try_for_each(VcpuHandle::run)
    }

    /// Lets every vCPU run that was paused. The guest's watchdog does not take the pause for a lock-up.
    ///
    /// # Errors
    /// When a vCPU's thread does not take messages.
    pub fn resume_vcpus(&self) -> Result<(), UnresponsiveVcpu> {
        self.vcpus.iter().for_each(VcpuHandle::forgive_pause);
        self.run_vcpus()
    }

    /// The states of all vCPUs, which are paused.
    ///
    /// # Errors
    /// When KVM does not give a part of one.
    pub fn save_vcpus(&self) -> Result<Vec<VcpuState>, VcpuError> {
        let Some(first) = self.vcpus.first() else {
            return Ok(Vec::new());
        };
        let msrs = match self.msrs.get() {
            Some(known) => known,
            None => {
                let asked = first.ask_msrs(&self.kvm)?;
                self.msrs.get_or_init(|| asked)
            }
        };
        let states = self.vcpus.iter().map(|vcpu| vcpu.save(&self.vm, msrs));
        states.collect()
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
