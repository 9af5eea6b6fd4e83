//! The state a vCPU starts in. Each ioctl costs microseconds before the guest's first
//! instruction, so what KVM's own reset state has right already is left alone: the FPU, the local
//! APIC (the boot vCPU's LINT0 brings interrupts of the 8259; Linux sets up LINT1 itself), and
//! everything of the vCPUs that wait for the boot vCPU to start them.
//!
//! A vCPU of a snapshot starts in the state that was saved: [`save`], [`restore`].

mod saving;
pub mod state;

use std::error::Error;
use std::fmt;

use kvm_bindings::{
    CpuId, KVM_MAX_MSR_ENTRIES, Msrs, kvm_dtable, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs,
};
use kvm_ioctls::VcpuFd;

use super::boot::{Entry, Protocol};
use super::gdt::{self, Segments};
use super::mask::MsrMask;
use super::{layout, msr};

pub use self::saving::{MsrList, forgive_pause, restore, save};
pub(super) use self::saving::{is_same_rate, not_given};
pub use self::state::VcpuState;

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

/// A step of configuring, saving or restoring a vCPU that failed.
#[derive(Debug)]
pub struct VcpuError {
    what: Refused,
    cause: Option<kvm_ioctls::Error>,
}

/// What failed.
#[derive(Debug)]
enum Refused {
    Part(&'static str),
    /// A register that the CPU configuration changes.
    Msr(u32),
    /// A register at the value that it was saved with, or starts with.
    MsrValue(u32),
    /// A part of the state.
    NotGiven(&'static str),
    /// A register of it.
    MsrNotGiven(u32),
    /// A saved state that cannot be a vCPU's.
    Invalid(&'static str),
    /// It stands in the middle of an instruction.
    Unfinished,
    /// The guest runs guests of its own.
    Hypervisor,
    /// The rate of the time stamp counter.
    TscRate {
        wanted: u32,
        host: u32,
    },
}

impl VcpuError {
    /// Of a vCPU that cannot be saved where it stands.
    pub const fn unfinished() -> Self {
        VcpuError {
            what: Refused::Unfinished,
            cause: None,
        }
    }
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
            Refused::MsrValue(address) => write!(
                f,
                "KVM refused the value of an MSR of a vCPU: register address {address:#x}"
            ),
            Refused::NotGiven(what) => write!(f, "KVM does not tell the {what} of a vCPU"),
            Refused::MsrNotGiven(address) => write!(
                f,
                "KVM does not tell an MSR of a vCPU: register address {address:#x}"
            ),
            Refused::Invalid(why) => write!(f, "the saved state of a vCPU is not valid: {why}"),
            Refused::Unfinished => write!(
                f,
                "a vCPU is in the middle of an instruction that it does not finish"
            ),
            Refused::Hypervisor => write!(
                f,
                "the guest runs a hypervisor of its own, whose state cannot be saved"
            ),
            Refused::TscRate { wanted, host } => write!(
                f,
                "the guest's time stamp counter runs at {wanted} kHz, this host's at {host} kHz, and \
                 KVM cannot scale it"
            ),
        }
    }
}

impl Error for VcpuError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        let cause = self.cause.as_ref()?;
        Some(cause)
    }
}

fn refused(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> VcpuError {
    move |cause| VcpuError {
        what: Refused::Part(what),
        cause: Some(cause),
    }
}

/// Gives `vcpu` its CPUID table and the MSRs it starts with. It then waits for the guest to wake
/// it (KVM's wait-for-SIPI state), unless it is the one that [`enter`] is called for.
///
/// # Errors
/// [`VcpuError`] when KVM refuses a part of it.
pub fn prepare(vcpu: &VcpuFd, cpuid: &CpuId) -> Result<(), VcpuError> {
    set_cpuid(vcpu, cpuid)?;
    set_msrs(vcpu, &msr::BOOT)
}

pub(super) fn set_cpuid(vcpu: &VcpuFd, cpuid: &CpuId) -> Result<(), VcpuError> {
    vcpu.set_cpuid2(cpuid).map_err(refused("CPUID table"))
}

/// Sets registers in this order. One that KVM does not let be set is no fault if it has the value
/// already.
#[cfg_attr(not(test), expect(clippy::expect_used, reason = "a chunk fits"))]
fn set_msrs(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), VcpuError> {
    let mut rest = entries;
    while !rest.is_empty() {
        let chunk = rest.get(..KVM_MAX_MSR_ENTRIES).unwrap_or(rest);
        let msrs = Msrs::from_entries(chunk).expect("as many fit as KVM takes");
        let done = vcpu.set_msrs(&msrs).map_err(refused("MSRs"))?;
        let failed = chunk.get(done);
        if let Some(entry) = failed
            && !has_value(vcpu, entry)
        {
            return Err(VcpuError {
                what: Refused::MsrValue(entry.index),
                cause: None,
            });
        }
        let next = done.saturating_add(usize::from(failed.is_some()));
        rest = rest.get(next..).unwrap_or_default();
    }
    Ok(())
}

/// Whether a register has the value of `entry`.
fn has_value(vcpu: &VcpuFd, entry: &kvm_msr_entry) -> bool {
    let asked = kvm_msr_entry {
        index: entry.index,
        ..kvm_msr_entry::default()
    };
    let Ok(mut msrs) = Msrs::from_entries(&[asked]) else {
        return false;
    };
    let read = vcpu.get_msrs(&mut msrs);
    read == Ok(1) && msrs.as_slice().iter().all(|msr| msr.data == entry.data)
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
            cause: Some(cause),
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
