//! The vCPUs, each made by the thread that will run it.

use std::sync::Arc;
use std::sync::mpsc::Receiver;

use kvm_bindings::CpuId;

use super::{Host, NO_VM};
use crate::arch::boot;
use crate::arch::fingerprint::Fingerprint;
use crate::arch::mask::MsrMask;
use crate::arch::vcpu::VcpuState;
use crate::arch::{self, Vm, cpuid};
use crate::error::{ActionError, Context};
use crate::threads::ParkedThread;
use crate::vcpu::{Buses, Vcpu, VcpuLink};
use crate::vmm::configuration::Configuration;
use crate::vmm::cpu;

const BAD_VCPU: &str = "Setting up a vCPU failed";
const OTHER_CPU: &str = "The snapshot was made on a CPU that this host cannot stand in for";

type NewVcpus = Vec<(Vcpu, VcpuLink)>;

/// A vCPU that its thread is making.
pub(super) type Making = Receiver<Result<arch::Vcpu, ActionError>>;

/// What the vCPUs start in.
pub(super) enum StartState {
    /// As the processor is after a reset, with the CPUID table that the host offers.
    Reset(Arc<CpuId>),
    /// As they were saved.
    Saved(SavedVcpus),
}

/// vCPUs of a snapshot.
pub(super) struct SavedVcpus {
    /// By number.
    pub states: Vec<VcpuState>,
    /// What the guest depends on, if this host is to have it, and the CPUID table that guests of the
    /// host can be given, changed as the saved configuration says.
    pub check: Option<(Fingerprint, Arc<CpuId>)>,
}

/// Lets the thread of each vCPU make it. Of saved states there are as many as threads.
pub(super) fn begin_vcpus(
    threads: &[ParkedThread],
    vm: &Arc<Vm>,
    config: &Configuration,
    start: StartState,
) -> Vec<Making> {
    match start {
        StartState::Reset(supported) => begin_reset(threads, vm, config, &supported),
        StartState::Saved(saved) => begin_saved(threads, vm, config, saved),
    }
}

fn begin_saved(
    threads: &[ParkedThread],
    vm: &Arc<Vm>,
    config: &Configuration,
    saved: SavedVcpus,
) -> Vec<Making> {
    let (count, smt) = (config.machine.vcpu_count, config.machine.smt);
    let mut check = saved.check;
    (0u8..)
        .zip(threads.iter().zip(saved.states))
        .map(|(index, (thread, state))| {
            let vm = Arc::clone(vm);
            // All vCPUs of a guest are alike: the first one stands for them.
            let check = check.take();
            thread.ask(move || {
                let vcpu = vm.create_vcpu(index).context(NO_VM)?;
                if let Some((fingerprint, supported)) = check {
                    let table = cpuid::table(&supported, index, count, smt);
                    check_host(&vm, &vcpu, &fingerprint, &table)?;
                }
                arch::vcpu::restore(&vm, &vcpu, &state).context(BAD_VCPU)?;
                Ok(vcpu)
            })
        })
        .collect()
}

/// Refuses a host that lacks what the saved guest depends on.
fn check_host(
    vm: &Vm,
    vcpu: &arch::Vcpu,
    fingerprint: &Fingerprint,
    table: &CpuId,
) -> Result<(), ActionError> {
    let host = Fingerprint::of_host(vm, vcpu, table).context(BAD_VCPU)?;
    let differences = fingerprint.differences(&host);
    if differences.is_empty() {
        return Ok(());
    }
    let list = differences.join("; ");
    Err(ActionError(format!("{OTHER_CPU}: {list}.")))
}

fn begin_reset(
    threads: &[ParkedThread],
    vm: &Arc<Vm>,
    config: &Configuration,
    supported: &Arc<CpuId>,
) -> Vec<Making> {
    let (count, smt) = (config.machine.vcpu_count, config.machine.smt);
    let masks = config.cpu.as_ref().map(cpu::msr_masks);
    let masks: Arc<[MsrMask]> = Arc::from(masks.unwrap_or_default());
    (0u8..)
        .zip(threads)
        .map(|(index, thread)| {
            let (vm, supported) = (Arc::clone(vm), Arc::clone(supported));
            let masks = Arc::clone(&masks);
            thread.ask(move || {
                let vcpu = vm.create_vcpu(index);
                let vcpu = vcpu.context(NO_VM)?;
                let mut table = cpuid::table(&supported, index, count, smt);
                if let Ok(khz) = vcpu.get_tsc_khz() {
                    table = cpuid::with_rates(&table, khz);
                }
                arch::vcpu::prepare(&vcpu, &table).context(BAD_VCPU)?;
                arch::vcpu::mask_msrs(&vcpu, &masks).context(BAD_VCPU)?;
                Ok(vcpu)
            })
        })
        .collect()
}

/// Collects the vCPUs, in order, and puts the first before the guest's first instruction; those that
/// were saved have theirs.
pub(super) fn finish_vcpus(
    host: &Host<'_>,
    making: Vec<Making>,
    entry: Option<&boot::Entry>,
    buses: &Arc<Buses>,
) -> Result<NewVcpus, ActionError> {
    (0u8..)
        .zip(making)
        .map(|(index, making)| {
            let made = making.recv();
            let fd = made.context("Making a vCPU failed: its thread is gone")??;
            if let (0, Some(entry)) = (index, entry) {
                arch::vcpu::enter(&fd, entry).context(BAD_VCPU)?;
            }
            Ok(Vcpu::new(
                index,
                fd,
                Arc::clone(buses),
                host.events.outbox(),
                host.timeline.clone(),
            ))
        })
        .collect()
}
