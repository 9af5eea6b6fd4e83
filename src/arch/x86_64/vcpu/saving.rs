//! Taking a vCPU's state, and putting it back into a vCPU that is as KVM makes it.
//!
//! [`save`] runs on control's thread while the vCPU is paused: no KVM_RUN is under way then, and the
//! last exit is finished. [`restore`] runs on the vCPU's own thread before its filter. Neither waits
//! for anything but KVM. The state may come from a file: it is distrusted.
//!
//! The order of both is a matter of meaning:
//! - KVM_GET_MP_STATE comes first: it takes up INIT and SIPI, which changes the rest.
//! - The time stamp counter's deadline is read before the local APIC: a timer that goes off in
//!   between is then seen twice. The other way round it would be lost: the deadline is 0 by then, and
//!   the interrupt not yet in the APIC's state.
//! - KVM_GET_VCPU_EVENTS comes last, for what the others may have changed.
//! - Going back, CPUID comes first: it decides which bits of the others exist (since Linux 6.13 an
//!   MSR that it does not announce is even zero when read). The system registers come before the
//!   local APIC, of which they hold the base; the APIC and the time stamp counter before the deadline;
//!   KVM_SET_REGS before KVM_SET_VCPU_EVENTS, as it forgets a pending exception.

use std::collections::BTreeSet;
use std::io;

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MAX_MSR_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use super::super::msr::{TSC, TSC_DEADLINE};
use super::state::{CpuidEntry, Msr, VcpuState};
use super::{Refused, VcpuError, refused};
use crate::sys::kvm::blocks;

/// KVM's own registers, beside those it lists.
const KVM_MSRS: std::ops::RangeInclusive<u32> = 0x4b56_4d00..=0x4b56_4dff;

/// What KVM does not list either: the memory type range registers, in pairs, fixed, and the default
/// (Intel SDM volume 4, table 2-2). What guests start with is among them ([`BOOT`](super::super::msr::BOOT)).
const MTRRS: [std::ops::RangeInclusive<u32>; 5] = [
    0x200..=0x20f,
    0x250..=0x250,
    0x258..=0x259,
    0x268..=0x26f,
    0x2ff..=0x2ff,
];

/// Parts per million by which the rates of two hosts' time stamp counters may differ and still count
/// as one: kernels measure them anew at each boot.
const TSC_TOLERANCE: u64 = 250;

/// Which model-specific registers the vCPUs of this host have. Asked once, of a vCPU that is paused.
#[derive(Clone, Debug)]
pub struct MsrList {
    /// Those that KVM lists, and lets be read.
    listed: Vec<u32>,
    /// Others that it lets be read.
    unlisted: Vec<u32>,
}

impl MsrList {
    /// Asks for the list, and tries which registers can be read.
    ///
    /// # Errors
    /// [`VcpuError`] when KVM does not give its list.
    pub fn ask(kvm: &Kvm, vcpu: &VcpuFd) -> Result<MsrList, VcpuError> {
        let list = kvm
            .get_msr_index_list()
            .map_err(not_given("list of MSRs"))?;
        let listed: BTreeSet<u32> = list.as_slice().iter().copied().collect();
        let others = MTRRS.into_iter().flatten().chain(KVM_MSRS);
        let unlisted: Vec<u32> = others.filter(|index| !listed.contains(index)).collect();
        let listed: Vec<u32> = listed.into_iter().collect();
        // A call for each of them that does not exist takes milliseconds. They are given out in rows, so
        // that one call tells of sixteen: it reads up to the first that does not exist.
        let rows = unlisted.chunk_by(|a, b| a >> 4 == b >> 4);
        let unlisted = rows.flat_map(|row| read_some(vcpu, row));
        Ok(MsrList {
            unlisted: unlisted.map(|msr| msr.index).collect(),
            listed: readable(vcpu, &listed),
        })
    }
}

/// Those of `indexes` that KVM lets be read. It reads up to the first that it does not.
fn readable(vcpu: &VcpuFd, indexes: &[u32]) -> Vec<u32> {
    let mut readable = Vec::new();
    let mut rest = indexes;
    while !rest.is_empty() {
        let read = read_some(vcpu, rest);
        readable.extend(read.iter().map(|msr| msr.index));
        let tried = read.len();
        // The one after them cannot be read, unless all were.
        let next = tried.saturating_add(usize::from(tried < rest.len().min(KVM_MAX_MSR_ENTRIES)));
        rest = rest.get(next..).unwrap_or_default();
    }
    readable
}

/// The values of the first of `indexes`, as many as KVM reads in one call.
fn read_some(vcpu: &VcpuFd, indexes: &[u32]) -> Vec<Msr> {
    let indexes = indexes.iter().take(KVM_MAX_MSR_ENTRIES);
    let entries: Vec<_> = indexes.map(|index| entry(*index, 0)).collect();
    let Ok(mut msrs) = Msrs::from_entries(&entries) else {
        return Vec::new();
    };
    let count = vcpu.get_msrs(&mut msrs).unwrap_or(0);
    let read = msrs.as_slice().iter().take(count);
    read.map(|msr| Msr {
        index: msr.index,
        data: msr.data,
    })
    .collect()
}

fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        data,
        ..kvm_msr_entry::default()
    }
}

/// KVM does not give a part of a vCPU.
pub fn not_given(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> VcpuError {
    move |cause| VcpuError {
        what: Refused::NotGiven(what),
        cause: Some(cause),
    }
}

fn errno(error: io::Error) -> kvm_ioctls::Error {
    kvm_ioctls::Error::new(error.raw_os_error().unwrap_or(libc::EIO))
}

/// Takes the state of `vcpu`, one of `vm`, which is paused.
///
/// # Errors
/// [`VcpuError`] when KVM does not give a part of it, and for a guest that runs guests of its own: what
/// the processor holds of those is not saved.
pub fn save(vm: &VmFd, vcpu: &VcpuFd, list: &MsrList) -> Result<VcpuState, VcpuError> {
    let mp_state = vcpu.get_mp_state().map_err(not_given("run state"))?;
    let cpuid = cpuid(vcpu)?;
    if offers_virtualization(&cpuid) && vm.check_extension(Cap::NestedState) {
        let runs_guests = blocks::runs_guests(vcpu);
        if runs_guests.map_err(|error| not_given("nested state")(errno(error)))? {
            return Err(VcpuError {
                what: Refused::Hypervisor,
                cause: None,
            });
        }
    }
    let msrs = read_msrs(vcpu, list)?;
    let lapic = vcpu.get_lapic().map_err(not_given("local APIC"))?;
    let xcrs = vcpu.get_xcrs();
    let xcrs = xcrs.map_err(not_given("extended control registers"))?;
    let count = usize::try_from(xcrs.nr_xcrs).unwrap_or(usize::MAX);
    Ok(VcpuState {
        cpuid,
        tsc_khz: vcpu.get_tsc_khz().ok(),
        mp_state: mp_state.mp_state,
        regs: vcpu.get_regs().map_err(not_given("registers"))?.into(),
        sregs: vcpu
            .get_sregs()
            .map_err(not_given("system registers"))?
            .into(),
        xsave: blocks::xsave(vm, vcpu).map_err(|error| not_given("XSAVE state")(errno(error)))?,
        xcrs: xcrs.xcrs.into_iter().take(count).map(Into::into).collect(),
        debug_regs: vcpu
            .get_debug_regs()
            .map_err(not_given("debug registers"))?
            .into(),
        lapic: lapic.regs.map(i8::cast_unsigned),
        msrs,
        events: vcpu.get_vcpu_events().map_err(not_given("events"))?.into(),
    })
}

/// Whether the guest was told of VMX or SVM: only such a one can run guests of its own.
fn offers_virtualization(cpuid: &[CpuidEntry]) -> bool {
    let ecx = |leaf| {
        let mut entries = cpuid.iter();
        let entry = entries.find(|entry| entry.function == leaf);
        entry.map_or(0, |entry| entry.ecx)
    };
    ecx(1) & 1 << 5 != 0 || ecx(0x8000_0001) & 1 << 2 != 0
}

/// The table as it was set. Behind it older kernels leave entries of zeros.
fn cpuid(vcpu: &VcpuFd) -> Result<Vec<CpuidEntry>, VcpuError> {
    let table = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES);
    let table = table.map_err(not_given("CPUID table"))?;
    let used = |entry: &&kvm_cpuid_entry2| **entry != kvm_cpuid_entry2::default();
    let entries = table.as_slice().iter().filter(used);
    Ok(entries.map(|entry| (*entry).into()).collect())
}

/// Reads all registers of `list`. Of those that KVM does not list, the ones that are as after a reset
/// are left out: the host of the restore may not know them.
fn read_msrs(vcpu: &VcpuFd, list: &MsrList) -> Result<Vec<Msr>, VcpuError> {
    let mut msrs = Vec::with_capacity(list.listed.len());
    for (indexes, zeros_too) in [(&list.listed, true), (&list.unlisted, false)] {
        for chunk in indexes.chunks(KVM_MAX_MSR_ENTRIES) {
            let read = read_some(vcpu, chunk);
            if let Some(index) = chunk.get(read.len()) {
                return Err(VcpuError {
                    what: Refused::MsrNotGiven(*index),
                    cause: None,
                });
            }
            msrs.extend(read.into_iter().filter(|msr| zeros_too || msr.data != 0));
        }
    }
    Ok(msrs)
}

/// Puts `state` into `vcpu`, one of `vm`, which has never run.
///
/// # Errors
/// [`VcpuError`] for a state that cannot be a vCPU's, and for the part of it that KVM refuses. The
/// vCPU cannot be used then.
pub fn restore(vm: &VmFd, vcpu: &VcpuFd, state: &VcpuState) -> Result<(), VcpuError> {
    if let Some(fault) = state.first_fault(blocks::xsave_len(vm)) {
        return Err(VcpuError {
            what: Refused::Invalid(fault),
            cause: None,
        });
    }
    let cpuid: Vec<kvm_cpuid_entry2> = state.cpuid.iter().map(|e| (*e).into()).collect();
    let cpuid = CpuId::from_entries(&cpuid);
    let cpuid = cpuid.map_err(|_| refused("CPUID table")(kvm_ioctls::Error::new(libc::E2BIG)))?;
    super::set_cpuid(vcpu, &cpuid)?;
    set_tsc_rate(vcpu, state.tsc_khz)?;

    vcpu.set_sregs(&state.sregs.into())
        .map_err(refused("system registers"))?;
    vcpu.set_regs(&state.regs.into())
        .map_err(refused("registers"))?;
    vcpu.set_xcrs(&state.kvm_xcrs())
        .map_err(refused("extended control registers"))?;
    blocks::set_xsave(vm, vcpu, &state.xsave)
        .map_err(|error| refused("XSAVE state")(errno(error)))?;
    vcpu.set_debug_regs(&state.debug_regs.into())
        .map_err(refused("debug registers"))?;
    let lapic = kvm_lapic_state {
        regs: state.lapic.map(u8::cast_signed),
    };
    vcpu.set_lapic(&lapic).map_err(refused("local APIC"))?;

    let last = |msr: &&Msr| matches!(msr.index, TSC | TSC_DEADLINE);
    let (timed, others): (Vec<&Msr>, Vec<&Msr>) = state.msrs.iter().partition(last);
    let of = |index| timed.iter().copied().filter(move |msr| msr.index == index);
    let others = others.into_iter();
    let ordered = others.chain(of(TSC)).chain(of(TSC_DEADLINE));
    let ordered: Vec<_> = ordered.map(|msr| entry(msr.index, msr.data)).collect();
    super::set_msrs(vcpu, &ordered)?;

    let mp_state = kvm_mp_state {
        mp_state: state.mp_state,
    };
    vcpu.set_mp_state(mp_state).map_err(refused("run state"))?;
    vcpu.set_vcpu_events(&state.events.into())
        .map_err(refused("events"))?;
    forgive_pause(vcpu);
    Ok(())
}

/// Tells the guest's watchdog of a `vcpu` that stands still that it has been paused, so that it does
/// not take the time for a lock-up. Only a guest that uses KVM's clock can be told: KVM refuses
/// otherwise, and nothing is lost.
pub fn forgive_pause(vcpu: &VcpuFd) {
    let _ = vcpu.kvmclock_ctrl();
}

/// Makes the vCPU's time stamp counter run at `khz`, if it does not already. KVM may refuse and have
/// changed the rate that it tells all the same, so it is asked only where that is needed.
fn set_tsc_rate(vcpu: &VcpuFd, khz: Option<u32>) -> Result<(), VcpuError> {
    let (Some(wanted), Ok(host)) = (khz, vcpu.get_tsc_khz()) else {
        return Ok(());
    };
    if is_same_rate(wanted, host) {
        return Ok(());
    }
    vcpu.set_tsc_khz(wanted).map_err(|cause| VcpuError {
        what: Refused::TscRate { wanted, host },
        cause: Some(cause),
    })
}

/// Whether two time stamp counters run at one rate.
pub fn is_same_rate(a: u32, b: u32) -> bool {
    let difference = u64::from(a.abs_diff(b));
    difference.saturating_mul(1_000_000) <= u64::from(a).saturating_mul(TSC_TOLERANCE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_when_they_differ_by_what_a_boot_measures_are_the_same() {
        for (a, b, same) in [
            (2_500_000, 2_500_000, true),
            (2_500_000, 2_500_625, true),
            (2_500_000, 2_499_375, true),
            (2_500_000, 2_500_626, false),
            (2_500_000, 2_400_000, false),
            (0, 0, true),
            (0, 1, false),
            (u32::MAX, 0, false),
        ] {
            assert_eq!(is_same_rate(a, b), same, "{a} {b}");
        }
    }
}
