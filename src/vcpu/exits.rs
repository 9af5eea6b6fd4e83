//! From an exit of KVM_RUN to the bus, and to what becomes of the guest.

use std::time::Instant;

use kvm_bindings::{KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};
use kvm_ioctls::VcpuExit;

use super::Buses;
use crate::bus::{Ticket, Written};
use crate::sys::kvm::Runner;

/// What the guest left for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// `in`
    PortRead,
    /// `out`
    PortWrite,
    /// A load from a register in memory.
    MemoryRead,
    /// A store to one.
    MemoryWrite,
    /// Something else.
    None,
}

impl Access {
    const fn of(exit: &VcpuExit<'_>) -> Self {
        match exit {
            VcpuExit::IoIn(..) => Access::PortRead,
            VcpuExit::IoOut(..) => Access::PortWrite,
            VcpuExit::MmioRead(..) => Access::MemoryRead,
            VcpuExit::MmioWrite(..) => Access::MemoryWrite,
            _ => Access::None,
        }
    }
}

/// What the guest's last exit came to.
#[derive(Debug)]
pub(super) enum Outcome {
    /// The guest goes on.
    Continue,
    /// It goes on once the ticket is complete.
    Wait(Ticket),
    /// KVM_RUN was interrupted: there may be a message.
    Interrupted,
    /// KVM_RUN did nothing: the processor waits to be woken, or the host was short of something.
    NotRun,
    /// This vCPU will not run again.
    End(End),
}

/// Why a vCPU will not run again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest asked for a machine reset.
    Reset,
    /// The guest asked for power-off.
    PowerOff,
    /// The guest crashed: a triple fault.
    TripleFault,
    /// KVM could not go on: `suberror` of KVM_EXIT_INTERNAL_ERROR (1 is an instruction that
    /// KVM's emulator lacks), with the guest's instruction pointer where it could be had.
    InternalError {
        /// KVM's number for the kind of failure.
        suberror: u32,
        /// The guest's instruction pointer.
        rip: Option<u64>,
    },
    /// The processor refused the guest's state; the hardware's reason.
    FailedEntry(u64),
    /// Guest memory could not be reached: a file mapped into it was cut short.
    MemoryGone,
    /// An exit that nothing here asked for; KVM's number.
    Unexpected(u32),
    /// KVM_RUN itself failed with this errno.
    RunFailed(i32),
}

/// Runs the guest until its next exit and answers that; what it left for, when, and what came of it.
pub(super) fn run_once(vcpu: &mut Runner, buses: &Buses) -> (Access, Instant, Outcome) {
    let page = vcpu.page();
    let exit = vcpu.run();
    let since = Instant::now();
    let exit = match exit {
        Ok(exit) => exit,
        Err(error) => {
            let outcome = match error.errno() {
                libc::EINTR => Outcome::Interrupted,
                libc::EAGAIN => Outcome::NotRun,
                libc::EFAULT => Outcome::End(End::MemoryGone),
                errno => Outcome::End(End::RunFailed(errno)),
            };
            return (Access::None, since, outcome);
        }
    };
    let access = Access::of(&exit);
    let outcome = match exit {
        VcpuExit::IoIn(port, data) => {
            for unit in data.chunks_mut(page.port_unit()) {
                buses.ports.read(u64::from(port), unit);
            }
            Outcome::Continue
        }
        VcpuExit::IoOut(port, data) => data
            .chunks(page.port_unit())
            .map(|unit| written(buses.ports.write(u64::from(port), unit)))
            .find(|outcome| !matches!(outcome, Outcome::Continue))
            .unwrap_or(Outcome::Continue),
        VcpuExit::MmioRead(address, _) | VcpuExit::MmioWrite(address, _)
            if buses.is_ram(address) =>
        {
            Outcome::End(End::MemoryGone)
        }
        VcpuExit::MmioRead(address, data) => {
            buses.memory.read(address, data);
            Outcome::Continue
        }
        VcpuExit::MmioWrite(address, data) => written(buses.memory.write(address, data)),
        VcpuExit::Intr | VcpuExit::IrqWindowOpen => Outcome::Interrupted,
        VcpuExit::Shutdown => Outcome::End(End::TripleFault),
        VcpuExit::InternalError => {
            let suberror = page.internal_suberror();
            let rip = vcpu.get_regs().ok().map(|regs| regs.rip);
            Outcome::End(End::InternalError { suberror, rip })
        }
        VcpuExit::FailEntry(reason, _) => Outcome::End(End::FailedEntry(reason)),
        VcpuExit::MemoryFault { .. } => Outcome::End(End::MemoryGone),
        VcpuExit::SystemEvent(kind, _) => Outcome::End(match kind {
            KVM_SYSTEM_EVENT_RESET => End::Reset,
            KVM_SYSTEM_EVENT_SHUTDOWN => End::PowerOff,
            KVM_SYSTEM_EVENT_CRASH => End::TripleFault,
            _ => End::Unexpected(kvm_bindings::KVM_EXIT_SYSTEM_EVENT),
        }),
        _ => Outcome::End(End::Unexpected(vcpu.exit_reason())),
    };
    (access, since, outcome)
}

fn written(written: Written) -> Outcome {
    match written {
        Written::Done => Outcome::Continue,
        Written::After(ticket) => Outcome::Wait(ticket),
        Written::MachineReset => Outcome::End(End::Reset),
    }
}
