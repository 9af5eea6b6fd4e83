//! Making a virtual machine, in the order that is fast.
//!
//! Memory slots come first: each waits for a grace period when an interrupt controller or timer
//! has just been made (kernels since 6.18 free their list of I/O devices in the background), a
//! matter of 4 to 8 ms instead of 0.1.

pub mod state;

use std::error::Error;
use std::fmt;
use std::io;
use std::ops::Deref;
use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_PIT_SPEAKER_DUMMY, KvmIrqRouting,
    kvm_enable_cap, kvm_irq_routing_entry, kvm_pit_config,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::chips::Chips;
use super::layout;
use super::split::ioapic::{Message, Router, Routes};
use crate::memory::{Memory, MemoryError, Ram};
use crate::sys::kvm;

/// A virtual machine with memory and interrupt controllers.
///
/// Dereferences to its descriptor, for irqfds and ioeventfds.
#[derive(Debug)]
pub struct Vm {
    // Closed before the memory it refers to can be unmapped.
    fd: VmFd,
    ram: Ram,
    chips: Chips,
    /// Bytes that each vCPU shares with KVM.
    vcpu_page: usize,
}

/// A vCPU. Dereferences to what runs it, and so to its descriptor.
#[derive(Debug)]
pub struct Vcpu {
    // A vCPU keeps its virtual machine alive in the kernel, so it keeps the memory too.
    vcpu: kvm::Vcpu,
    ram: Ram,
}

/// A vCPU's descriptor alone, for a thread that does not run the vCPU but asks for its state.
#[derive(Clone, Debug)]
pub struct VcpuAccess {
    fd: Arc<VcpuFd>,
    // As for `Vcpu`.
    _ram: Ram,
}

/// A step that KVM refused.
#[derive(Debug)]
pub enum VmError {
    /// No virtual machine.
    Create(kvm_ioctls::Error),
    /// No memory.
    Memory(MemoryError),
    /// No place for KVM's own pages.
    Tss(kvm_ioctls::Error),
    /// No interrupt controllers.
    InterruptController(kvm_ioctls::Error),
    /// No timer.
    Timer(kvm_ioctls::Error),
    /// No vCPU.
    Vcpu {
        /// Which.
        index: u8,
        /// KVM's reason.
        cause: kvm_ioctls::Error,
    },
    /// A part of the state is not given.
    Save {
        /// Which.
        what: &'static str,
        /// KVM's reason.
        cause: io::Error,
    },
    /// A part of the state is refused.
    Restore {
        /// Which.
        what: &'static str,
        /// KVM's reason.
        cause: io::Error,
    },
    /// The state is of a machine whose interrupt chips are elsewhere.
    OtherChips,
}

impl fmt::Display for VmError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            VmError::Create(_) => write!(f, "KVM cannot create a virtual machine"),
            VmError::Memory(_) => write!(f, "cannot give the virtual machine its memory"),
            VmError::Tss(_) => write!(f, "KVM refused the address of its TSS"),
            VmError::InterruptController(_) => {
                write!(f, "KVM cannot create the interrupt controllers")
            }
            VmError::Timer(_) => write!(f, "KVM cannot create the timer"),
            VmError::Vcpu { index, .. } => write!(f, "KVM cannot create vCPU {index}"),
            VmError::Save { what, .. } => write!(f, "KVM does not tell the state of the {what}"),
            VmError::Restore { what, .. } => write!(f, "KVM refused the state of the {what}"),
            VmError::OtherChips => write!(
                f,
                "the saved state is of a machine with another interrupt controller"
            ),
        }
    }
}

impl Error for VmError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            VmError::Memory(cause) => Some(cause),
            VmError::Create(cause)
            | VmError::Tss(cause)
            | VmError::InterruptController(cause)
            | VmError::Timer(cause)
            | VmError::Vcpu { cause, .. } => Some(cause),
            VmError::Save { cause, .. } | VmError::Restore { cause, .. } => Some(cause),
            VmError::OtherChips => None,
        }
    }
}

impl Vm {
    /// Makes the virtual machine around `memory`, with KVM's part of `chips`. With `track_dirty`
    /// KVM logs which pages the guest writes.
    ///
    /// # Errors
    /// [`VmError`] naming the step that KVM refused.
    #[cfg(test)]
    pub fn new(kvm: &Kvm, memory: &Memory, track_dirty: bool, chips: Chips) -> Result<Vm, VmError> {
        Vm::around(create(kvm)?, kvm, memory, track_dirty, chips)
    }

    /// The same of a virtual machine that [`create`] has made.
    ///
    /// # Errors
    /// As above.
    pub fn around(
        fd: VmFd,
        kvm: &Kvm,
        memory: &Memory,
        track_dirty: bool,
        chips: Chips,
    ) -> Result<Vm, VmError> {
        memory.register(&fd, track_dirty).map_err(VmError::Memory)?;
        fd.set_tss_address(layout::KVM_TSS as usize)
            .map_err(VmError::Tss)?;
        match chips {
            Chips::Kernel => create_chips(&fd)?,
            Chips::Split => split_chips(&fd)?,
        }
        Ok(Vm {
            fd,
            ram: memory.ram().clone(),
            chips,
            vcpu_page: kvm.get_vcpu_mmap_size().map_err(VmError::Create)?,
        })
    }

    /// Makes vCPU number `index`, whose APIC ID is the same number.
    ///
    /// # Errors
    /// [`VmError::Vcpu`] when KVM refuses.
    pub fn create_vcpu(&self, index: u8) -> Result<Vcpu, VmError> {
        let failed = |cause| VmError::Vcpu { index, cause };
        let fd = self.fd.create_vcpu(u64::from(index)).map_err(failed)?;
        let vcpu = kvm::Vcpu::new(fd, self.vcpu_page).map_err(|e| failed(e.into()))?;
        Ok(Vcpu {
            vcpu,
            ram: self.ram.clone(),
        })
    }
}

/// KVM's 8259, I/O APIC and 8254; local APICs come with the vCPUs.
fn create_chips(vm: &VmFd) -> Result<(), VmError> {
    vm.create_irq_chip().map_err(VmError::InterruptController)?;
    // Port 0x61, the speaker, is answered by KVM instead of costing an exit.
    let pit = kvm_pit_config {
        flags: KVM_PIT_SPEAKER_DUMMY,
        ..kvm_pit_config::default()
    };
    vm.create_pit2(pit).map_err(VmError::Timer)
}

/// Only local APICs in KVM. The number is that of the I/O APIC's lines, for which KVM tells of
/// the end of an interrupt if the line is a level.
fn split_chips(vm: &VmFd) -> Result<(), VmError> {
    let mut cap = kvm_enable_cap {
        cap: KVM_CAP_SPLIT_IRQCHIP,
        ..kvm_enable_cap::default()
    };
    let [lines, ..] = &mut cap.args;
    *lines = layout::GSI_COUNT.into();
    vm.enable_cap(&cap).map_err(VmError::InterruptController)
}

impl Router for Arc<Vm> {
    fn set(&self, routes: &Routes) -> io::Result<()> {
        let route = |(gsi, message): (u32, &Option<Message>)| {
            let message = (*message)?;
            let mut entry = kvm_irq_routing_entry {
                gsi,
                type_: KVM_IRQ_ROUTING_MSI,
                ..kvm_irq_routing_entry::default()
            };
            entry.u.msi.address_lo = message.address;
            entry.u.msi.data = message.data;
            Some(entry)
        };
        let entries: Vec<_> = (0..).zip(routes).filter_map(route).collect();
        let table = KvmIrqRouting::from_entries(&entries);
        let table = table.map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?;
        self.fd.set_gsi_routing(&table).map_err(io::Error::from)
    }

    fn listen(&self, line: &EventFd, gsi: u32) -> io::Result<()> {
        self.fd.register_irqfd(line, gsi).map_err(io::Error::from)
    }
}

/// Makes an empty virtual machine. KVM_CREATE_VM gives up when a signal arrives while it waits for
/// the host's locks.
///
/// # Errors
/// [`VmError::Create`] when KVM refuses.
pub fn create(kvm: &Kvm) -> Result<VmFd, VmError> {
    const ATTEMPTS: usize = 5;
    let mut result = kvm.create_vm();
    for _ in 1..ATTEMPTS {
        match &result {
            Err(cause) if cause.errno() == libc::EINTR => result = kvm.create_vm(),
            _ => break,
        }
    }
    result.map_err(VmError::Create)
}

impl Deref for Vm {
    type Target = VmFd;

    fn deref(&self) -> &VmFd {
        &self.fd
    }
}

impl Vcpu {
    /// Access to its state from another thread.
    pub fn access(&self) -> VcpuAccess {
        VcpuAccess {
            fd: self.vcpu.share(),
            _ram: self.ram.clone(),
        }
    }
}

impl Deref for VcpuAccess {
    type Target = VcpuFd;

    fn deref(&self) -> &VcpuFd {
        &self.fd
    }
}

impl Deref for Vcpu {
    type Target = kvm::Vcpu;

    fn deref(&self) -> &kvm::Vcpu {
        &self.vcpu
    }
}
