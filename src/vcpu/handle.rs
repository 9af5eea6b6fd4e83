//! Control's end of a vCPU: what it is told, and what is read of it.

use std::error::Error;
use std::fmt;
use std::sync::Arc;
use std::thread::JoinHandle;

use kvm_ioctls::Kvm;

use super::{Crash, Shared, TimedCounter, VcpuMessage};
use crate::arch::vcpu::{MsrList, VcpuError, VcpuState};
use crate::arch::{self, VcpuAccess, Vm};
use crate::metrics::{Counter, Report};
use crate::sys::signal;
use crate::sys::sync::atomic::Ordering;
use crate::sys::sync::mpsc::SyncSender;

/// Control's end of a vCPU.
#[derive(Debug)]
pub struct VcpuHandle {
    pub(super) messages: VcpuMessages,
    thread: JoinHandle<()>,
    pub(super) access: VcpuAccess,
}

/// Control's end of a vCPU whose thread is not known yet: becomes a [`VcpuHandle`].
#[derive(Debug)]
pub struct VcpuLink {
    pub(super) messages: VcpuMessages,
    pub(super) access: VcpuAccess,
}

/// Where control talks to the loop of a vCPU, and what that counts.
#[derive(Debug)]
pub(super) struct VcpuMessages {
    pub index: u8,
    pub messages: SyncSender<VcpuMessage>,
    pub shared: Arc<Shared>,
}

/// The thread of a vCPU, for the one that wakes it.
pub trait VcpuThread {
    /// Makes KVM_RUN return, now or as soon as it is next called.
    fn kick(&self);
    /// Ends its parking, or the next one.
    fn unpark(&self);
}

impl VcpuThread for JoinHandle<()> {
    fn kick(&self) {
        signal::kick(self);
    }

    fn unpark(&self) {
        self.thread().unpark();
    }
}

/// A vCPU does not take messages: its thread is gone or does not answer.
#[derive(Debug)]
pub struct UnresponsiveVcpu {
    index: u8,
}

impl fmt::Display for UnresponsiveVcpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "The thread of vCPU {} takes no messages", self.index)
    }
}

impl Error for UnresponsiveVcpu {}

impl VcpuHandle {
    /// A handle of the vCPU that runs on `thread`.
    pub fn new(link: VcpuLink, thread: JoinHandle<()>) -> Self {
        let VcpuLink { messages, access } = link;
        VcpuHandle {
            messages,
            thread,
            access,
        }
    }

    /// Writes what the vCPU has counted into `report`.
    pub fn read_counters(&self, report: &mut Report) {
        let index = self.messages.index.to_string();
        let exits = &self.messages.shared.exits;
        let exit = |report: &mut Report, kind: &str, count: &Counter| {
            report.counter(
                "mayfly_vcpu_exits_total",
                "Times a vCPU left the guest and came to the monitor.",
                &[("vcpu", &index), ("kind", kind)],
                count.get(),
            );
        };
        for (kind, key, times_key, TimedCounter { count, times }) in [
            (
                "port_read",
                "exit_io_in",
                "exit_io_in_agg",
                &exits.port_reads,
            ),
            (
                "port_write",
                "exit_io_out",
                "exit_io_out_agg",
                &exits.port_writes,
            ),
            (
                "mmio_read",
                "exit_mmio_read",
                "exit_mmio_read_agg",
                &exits.memory_reads,
            ),
            (
                "mmio_write",
                "exit_mmio_write",
                "exit_mmio_write_agg",
                &exits.memory_writes,
            ),
        ] {
            exit(report, kind, count);
            report.add("vcpu", key, count.get());
            report.times("vcpu", times_key, times);
        }
        exit(report, "interrupted", &exits.interruptions);
        exit(report, "other", &exits.others);
    }

    /// What is known of the vCPU's end, when it could not go on.
    pub fn crash(&self) -> Option<&Crash> {
        self.messages.shared.crash.get()
    }

    /// Keeps the guest's watchdog from taking the time of a pause for a lock-up. The vCPU is paused.
    pub fn forgive_pause(&self) {
        arch::vcpu::forgive_pause(&self.access);
    }

    /// Lets guest code run.
    ///
    /// # Errors
    /// [`UnresponsiveVcpu`] when the thread takes no messages.
    pub fn run(&self) -> Result<(), UnresponsiveVcpu> {
        self.messages.send(VcpuMessage::Run)
    }

    /// Asks the vCPU to stop running guest code. It answers with [`VcpuEvent::Paused`](super::VcpuEvent::Paused).
    ///
    /// # Errors
    /// [`UnresponsiveVcpu`] when the thread takes no messages.
    pub fn pause(&self) -> Result<(), UnresponsiveVcpu> {
        self.messages.pause(&self.thread)
    }
}

impl VcpuMessages {
    pub fn pause(&self, thread: &impl VcpuThread) -> Result<(), UnresponsiveVcpu> {
        self.send(VcpuMessage::Pause)?;
        thread.kick();
        thread.unpark();
        Ok(())
    }

    pub fn send(&self, message: VcpuMessage) -> Result<(), UnresponsiveVcpu> {
        self.messages
            .try_send(message)
            .map_err(|_| UnresponsiveVcpu { index: self.index })
    }
}

impl VcpuHandle {
    /// Which model-specific registers the vCPUs of this host have. The vCPU is paused.
    ///
    /// # Errors
    /// KVM's.
    pub fn ask_msrs(&self, kvm: &Kvm) -> Result<MsrList, VcpuError> {
        MsrList::ask(kvm, &self.access)
    }

    /// Takes the state of the vCPU, one of `vm`, which is paused; `msrs` is what
    /// [`VcpuHandle::ask_msrs`] has told of this vCPU or another one.
    ///
    /// # Errors
    /// When KVM does not give a part of it, or the vCPU could not finish its last instruction.
    pub fn save(&self, vm: &Vm, msrs: &MsrList) -> Result<VcpuState, VcpuError> {
        if self.messages.shared.in_access.load(Ordering::Relaxed) {
            return Err(VcpuError::unfinished());
        }
        arch::vcpu::save(vm, &self.access, msrs)
    }
}
