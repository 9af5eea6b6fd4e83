//! From an exit of KVM_RUN to the bus, and to what becomes of the guest.

use std::time::Instant;

use kvm_bindings::{KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};

use super::Buses;
use super::Crash;
use super::crash::LastExits;
use crate::bus::{Ticket, Written};
use crate::sys::kvm::{Exit, InternalError, PortAccess, Vcpu};

/// What the guest left for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Access {
    /// `in`
    PortRead,
    /// `out`
    PortWrite,
    /// A load from a register in memory.
    MemoryRead,
    /// A store to one.
    MemoryWrite,
    /// Something else.
    #[default]
    None,
}

impl Access {
    /// The kind of access and its port or address.
    const fn of(exit: Exit) -> (Self, u64) {
        match exit {
            Exit::PortRead(access) => (Access::PortRead, access.port as u64),
            Exit::PortWrite(access) => (Access::PortWrite, access.port as u64),
            Exit::MemoryRead { address, .. } => (Access::MemoryRead, address),
            Exit::MemoryWrite { address, .. } => (Access::MemoryWrite, address),
            _ => (Access::None, 0),
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
    /// KVM could not go on (KVM_EXIT_INTERNAL_ERROR).
    InternalError {
        /// KVM's number for the kind of failure; 1 is an instruction that it cannot emulate.
        suberror: u32,
    },
    /// The processor refused the guest's state; the hardware's reason.
    FailedEntry(u64),
    /// Guest memory could not be reached: a file mapped into it was cut short.
    MemoryGone,
    /// An exit that this program has not asked KVM for; KVM's number.
    Unexpected(u32),
    /// KVM_RUN itself failed with this errno.
    RunFailed(i32),
}

/// One run of the guest, up to its next exit, and what came of that.
pub(super) struct Ran {
    /// What the guest left for.
    pub access: Access,
    /// The port or the address.
    pub address: u64,
    /// When it left.
    pub since: Instant,
    /// What came of it.
    pub outcome: Outcome,
}

/// What runs guest code until it leaves for something: KVM's vCPU, on the thread that owns it.
pub trait Processor {
    /// Lets the guest run until its next exit.
    ///
    /// # Errors
    /// KVM's, EINTR included.
    fn run(&self) -> Result<Exit, i32>;
    /// Lets the next run go on, whatever kicks there were before.
    fn forget_kicks(&self);
    /// Makes the next run finish the instruction of the last exit and return before another one.
    fn leave_at_once(&self);
    /// Unit number `index` of what the guest wrote to a port; its bytes are the first ones.
    fn port_data(&self, access: PortAccess, index: usize) -> [u8; 4];
    /// Gives the guest unit number `index` of what it reads from a port.
    fn answer_port(&self, access: PortAccess, index: usize, unit: &[u8]);
    /// Gives the guest what it reads from memory.
    fn answer_memory(&self, data: &[u8]);
    /// What is told after [`Exit::InternalError`].
    fn internal_error(&self) -> InternalError;
    /// What is known after `end`.
    fn crash(&self, end: End, last_exits: LastExits) -> Crash;
}

impl Processor for Vcpu {
    fn run(&self) -> Result<Exit, i32> {
        Vcpu::run(self)
    }

    fn forget_kicks(&self) {
        Vcpu::forget_kicks(self);
    }

    fn leave_at_once(&self) {
        Vcpu::leave_at_once(self);
    }

    fn port_data(&self, access: PortAccess, index: usize) -> [u8; 4] {
        Vcpu::port_data(self, access, index)
    }

    fn answer_port(&self, access: PortAccess, index: usize, unit: &[u8]) {
        Vcpu::answer_port(self, access, index, unit);
    }

    fn answer_memory(&self, data: &[u8]) {
        Vcpu::answer_memory(self, data);
    }

    fn internal_error(&self) -> InternalError {
        Vcpu::internal_error(self)
    }

    fn crash(&self, end: End, last_exits: LastExits) -> Crash {
        Crash::of(self, end, last_exits)
    }
}

/// Runs the guest until its next exit and answers that.
pub(super) fn run_once(vcpu: &impl Processor, buses: &Buses) -> Ran {
    let exit = vcpu.run();
    let since = Instant::now();
    let (access, address, outcome) = match exit {
        Ok(exit) => {
            let (access, address) = Access::of(exit);
            (access, address, answer(vcpu, buses, exit))
        }
        Err(errno) => (Access::None, 0, not_run(errno)),
    };
    Ran {
        access,
        address,
        since,
        outcome,
    }
}

/// What KVM_RUN's failure with `errno` means.
const fn not_run(errno: i32) -> Outcome {
    match errno {
        libc::EINTR => Outcome::Interrupted,
        libc::EAGAIN => Outcome::NotRun,
        libc::EFAULT => Outcome::End(End::MemoryGone),
        errno => Outcome::End(End::RunFailed(errno)),
    }
}

fn answer(vcpu: &impl Processor, buses: &Buses, exit: Exit) -> Outcome {
    match exit {
        Exit::PortRead(access) => read_port(vcpu, buses, access),
        Exit::PortWrite(access) => write_port(vcpu, buses, access),
        Exit::MemoryRead { address, .. } | Exit::MemoryWrite { address, .. }
            if buses.is_ram(address) =>
        {
            Outcome::End(End::MemoryGone)
        }
        Exit::MemoryRead { address, len } => {
            let mut data = [0; 8];
            if let Some(data) = data.get_mut(..len) {
                buses.memory.read(address, data);
                vcpu.answer_memory(data);
            }
            Outcome::Continue
        }
        Exit::MemoryWrite { address, data, len } => {
            let data = data.get(..len).unwrap_or_default();
            written(buses.memory.write(address, data))
        }
        Exit::Interrupted => Outcome::Interrupted,
        // Lines are pulses: none is still asserted.
        Exit::EndOfInterrupt => Outcome::Continue,
        Exit::Shutdown => Outcome::End(End::TripleFault),
        Exit::InternalError => Outcome::End(End::InternalError {
            suberror: vcpu.internal_error().suberror,
        }),
        Exit::FailedEntry(reason) => Outcome::End(End::FailedEntry(reason)),
        Exit::MemoryFault => Outcome::End(End::MemoryGone),
        Exit::SystemEvent(kind) => Outcome::End(match kind {
            KVM_SYSTEM_EVENT_RESET => End::Reset,
            KVM_SYSTEM_EVENT_SHUTDOWN => End::PowerOff,
            KVM_SYSTEM_EVENT_CRASH => End::TripleFault,
            _ => End::Unexpected(kvm_bindings::KVM_EXIT_SYSTEM_EVENT),
        }),
        Exit::Other(reason) => Outcome::End(End::Unexpected(reason)),
    }
}

fn read_port(vcpu: &impl Processor, buses: &Buses, access: PortAccess) -> Outcome {
    for index in 0..access.count {
        let mut unit = [0; 4];
        if let Some(unit) = unit.get_mut(..access.unit) {
            buses.ports.read(u64::from(access.port), unit);
            vcpu.answer_port(access, index, unit);
        }
    }
    Outcome::Continue
}

/// Writes every unit, until one asks for more than to go on.
fn write_port(vcpu: &impl Processor, buses: &Buses, access: PortAccess) -> Outcome {
    for index in 0..access.count {
        let unit = vcpu.port_data(access, index);
        let unit = unit.get(..access.unit).unwrap_or_default();
        match written(buses.ports.write(u64::from(access.port), unit)) {
            Outcome::Continue => {}
            other => return other,
        }
    }
    Outcome::Continue
}

fn written(written: Written) -> Outcome {
    match written {
        Written::Done => Outcome::Continue,
        Written::After(ticket) => Outcome::Wait(ticket),
        Written::MachineReset => Outcome::End(End::Reset),
        Written::PowerOff => Outcome::End(End::PowerOff),
    }
}
