//! The state a vCPU starts in. Each ioctl costs microseconds before the guest's first
//! instruction, so what KVM's own reset state has right already is left alone: the FPU, the local
//! APIC (the boot vCPU's LINT0 brings interrupts of the 8259; Linux sets up LINT1 itself), and
//! everything of the vCPUs that wait for the boot vCPU to start them.

use std::error::Error;
use std::fmt;

use kvm_bindings::{CpuId, Msrs, kvm_dtable, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;

use super::boot::{Entry, Protocol};
use super::gdt::{self, Segments};
use super::mask::MsrMask;
use super::{layout, msr};

/// Bit 1 of RFLAGS is always set.
const RFLAGS: u64 = 0x2;

/// CR0: protected mode, the FPU is a 387 or later, paging (Intel SDM volume 3, section 2.5).
const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
/// CR4: physical address extension, which long mode needs.
const CR4_PAE: u64 = 1 << 5;
/// EFER: long mode enabled and active (section 2.2.1).
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// IA32_APIC_BASE: enabled, and this is the boot processor (section 11.4.4).
const APIC_ENABLED: u64 = 1 << 11;
const APIC_BOOT_PROCESSOR: u64 = 1 << 8;

/// A step of configuring a vCPU that KVM refused.
#[derive(Debug)]
pub struct VcpuError {
    what: Refused,
    cause: kvm_ioctls::Error,
}

/// What KVM refused.
#[derive(Debug)]
enum Refused {
    Part(&'static str),
    /// A register that the CPU configuration changes.
    Msr(u32),
}

impl fmt::Display for VcpuError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.what {
            Refused::Part(what) => write!(f, "KVM refused the {what} of a vCPU"),
            Refused::Msr(address) => write!(
                f,
                "the CPU configuration changes an MSR that KVM does not support so: register \
                 address {address:#x}"
            ),
        }
    }
}

impl Error for VcpuError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(&self.cause)
    }
}

fn refused(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> VcpuError {
    move |cause| VcpuError {
        what: Refused::Part(what),
        cause,
    }
}

/// Gives `vcpu` its CPUID table and the MSRs it starts with. It then waits for the guest to wake
/// it (KVM's wait-for-SIPI state), unless it is the one that [`enter`] is called for.
///
/// # Errors
/// [`VcpuError`] when KVM refuses a part of it.
#[cfg_attr(
    not(test),
    expect(clippy::expect_used, reason = "the list is ours, and short")
)]
pub fn prepare(vcpu: &VcpuFd, cpuid: &CpuId) -> Result<(), VcpuError> {
    vcpu.set_cpuid2(cpuid).map_err(refused("CPUID table"))?;
    let msrs = Msrs::from_entries(&msr::BOOT).expect("two entries fit");
    let done = vcpu.set_msrs(&msrs).map_err(refused("MSRs"))?;
    if done != msr::BOOT.len() {
        return Err(refused("MSRs")(kvm_ioctls::Error::new(libc::EINVAL)));
    }
    Ok(())
}

/// Changes model-specific registers of `vcpu` by masks, on top of what [`prepare`] has set.
///
/// # Errors
/// [`VcpuError`] for a register that KVM does not know, or does not let be as it was asked for.
#[cfg_attr(not(test), expect(clippy::expect_used, reason = "one entry fits"))]
pub fn mask_msrs(vcpu: &VcpuFd, masks: &[MsrMask]) -> Result<(), VcpuError> {
    for mask in masks {
        let unknown = |cause| VcpuError {
            what: Refused::Msr(mask.address),
            cause,
        };
        let entry = kvm_msr_entry {
            index: mask.address,
            ..kvm_msr_entry::default()
        };
        let mut msrs = Msrs::from_entries(&[entry]).expect("one entry fits");
        if vcpu.get_msrs(&mut msrs).map_err(unknown)? != 1 {
            return Err(unknown(kvm_ioctls::Error::new(libc::EINVAL)));
        }
        for entry in msrs.as_mut_slice() {
            entry.data = mask.mask.apply(entry.data);
        }
        if vcpu.set_msrs(&msrs).map_err(unknown)? != 1 {
            return Err(unknown(kvm_ioctls::Error::new(libc::EINVAL)));
        }
    }
    Ok(())
}

/// Puts `vcpu`, the boot vCPU, before the guest's first instruction.
///
/// # Errors
/// [`VcpuError`] when KVM refuses the registers.
pub fn enter(vcpu: &VcpuFd, entry: &Entry) -> Result<(), VcpuError> {
    vcpu.set_sregs(&sregs(entry))
        .map_err(refused("system registers"))?;
    vcpu.set_regs(&regs(entry)).map_err(refused("registers"))
}

fn regs(entry: &Entry) -> kvm_regs {
    let mut regs = kvm_regs {
        rflags: RFLAGS,
        rip: entry.rip,
        ..kvm_regs::default()
    };
    match entry.protocol {
        Protocol::Pvh => regs.rbx = layout::PVH_START_INFO,
        Protocol::Linux64 => {
            regs.rsi = layout::ZERO_PAGE;
            regs.rsp = layout::BOOT_STACK;
            regs.rbp = layout::BOOT_STACK;
        }
    }
    regs
}

fn sregs(entry: &Entry) -> kvm_sregs {
    let long = entry.protocol == Protocol::Linux64;
    let Segments { code, data, task } = Segments::flat(long);
    let mut sregs = kvm_sregs {
        cs: code,
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: task,
        ldt: kvm_segment {
            unusable: 1,
            ..kvm_segment::default()
        },
        gdt: kvm_dtable {
            base: layout::GDT,
            limit: gdt::TABLE_SIZE - 1,
            ..kvm_dtable::default()
        },
        cr0: CR0_PE | CR0_ET,
        apic_base: u64::from(layout::LOCAL_APIC) | APIC_ENABLED | APIC_BOOT_PROCESSOR,
        ..kvm_sregs::default()
    };
    if long {
        sregs.cr0 |= CR0_PG;
        sregs.cr3 = layout::PAGE_TABLES;
        sregs.cr4 = CR4_PAE;
        sregs.efer = EFER_LME | EFER_LMA;
    }
    sregs
}
