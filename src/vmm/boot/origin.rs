//! What a machine begins as, a kernel that boots or a guest that goes on, and what that makes of its
//! parts: the rest of a start is the same for both.

use std::fs::File;
use std::sync::Arc;

use kvm_ioctls::Kvm;

use super::{Host, guest};
use crate::arch::chips::{self, Chips};
use crate::arch::fingerprint::Fingerprint;
use crate::arch::generation;
use crate::arch::vm::state::{ClockAfterRestore, VmState};
use crate::error::{ActionError, Context};
use crate::memory::lazy::Handler;
use crate::memory::working_set::Prefetch;
use crate::memory::{Backing, Memory, Pages};
use crate::snapshot::SnapshotId;
use crate::steps;
use crate::threads::parked;
use crate::vmm::configuration::{Boot, Configuration};
use crate::vmm::cpu;
use crate::vmm::saved::MachineState;
use crate::wire::config::{HugePages, InterruptController, RamBackend};

/// What a machine begins as.
pub enum Origin {
    /// A kernel that boots.
    Kernel,
    /// A guest that goes on.
    Snapshot(Box<Restored>),
}

/// A guest that was saved.
pub struct Restored {
    /// KVM's part of it.
    pub vm: VmState,
    /// The state of each other part.
    pub state: MachineState,
    /// Its memory.
    pub memory: Memory,
    /// The process that brings in its pages, if one does.
    pub handler: Option<Handler>,
    /// What brings in pages that it needs first, if that is known.
    pub prefetch: Option<Prefetch>,
    /// Where it is to be recorded which these are.
    pub record: Option<Record>,
    /// How its clock goes on.
    pub clock: ClockAfterRestore,
    /// Nanoseconds of the host's wall clock since it was saved.
    pub elapsed: u64,
    /// What the guest depends on of the host's processor, if that is to be checked.
    pub cpu: Option<Fingerprint>,
    /// The snapshot's id.
    pub id: SnapshotId,
}

/// What takes the record of the pages that a restored guest needs first.
#[derive(Debug)]
pub struct Record {
    /// Where it goes.
    pub file: File,
    /// A /proc/PID/pagemap of this process, where it cannot open one itself.
    pub pagemap: Option<Arc<File>>,
}

/// What differs between a machine that boots and one that goes on.
pub(super) struct Begins {
    pub state: MachineState,
    pub memory: Memory,
    pub chips: Chips,
    pub load: guest::Load,
    pub restored: Option<(VmState, ClockAfterRestore)>,
    pub handler: Option<Handler>,
    /// What the guest depends on of the host's processor.
    pub cpu: Option<Fingerprint>,
    pub elapsed: u64,
}

/// A machine that boots: all parts are new.
pub(super) fn boots(
    host: &Host<'_>,
    configuration: &Configuration,
    kvm: &Kvm,
) -> Result<Begins, ActionError> {
    let kernel = configuration.check_start()?;
    let machine = &configuration.machine;
    let pages = pages(machine.huge_pages);
    let backing = match machine.memory_backend {
        RamBackend::Anonymous => Backing::Anonymous,
        RamBackend::Shared => Backing::Shared,
    };
    let memory = Memory::new(
        machine.mem_size_mib,
        pages,
        backing,
        machine.track_dirty_pages,
    );
    Ok(Begins {
        state: MachineState::default(),
        memory: memory.context("Making guest memory failed")?,
        chips: choose_chips(kvm, configuration, kernel)?,
        load: guest::load(host, configuration, kernel)?,
        restored: None,
        handler: None,
        cpu: None,
        elapsed: 0,
    })
}

/// A machine that goes on: all parts are as they were saved, but for the generation ID.
pub(super) fn goes_on(restored: Restored) -> Result<Begins, ActionError> {
    let Restored {
        vm,
        state,
        memory,
        handler,
        prefetch,
        record: _,
        clock,
        elapsed,
        cpu,
        id: _,
    } = restored;
    if let Some(prefetch) = prefetch {
        // Beside all that follows; the thread ends with its work.
        let _ = parked("prefetch".into())?.ask(move || prefetch.run());
    }
    Ok(Begins {
        state,
        memory,
        chips: vm.chips.place(),
        // Guest memory may have to be brought in: the files thread waits for that, not control.
        load: Box::new(|memory| {
            steps::may_wait(
                "writing to guest memory (of the backend Uffd: its page fault handler)",
            );
            generation::renew(memory).bare()?;
            Ok(None)
        }),
        restored: Some((vm, clock)),
        handler,
        cpu,
        elapsed,
    })
}

/// What guest memory is made of, as the configuration says it.
pub fn pages(pages: HugePages) -> Pages {
    match pages {
        HugePages::None => Pages::Ordinary,
        HugePages::Transparent => Pages::Transparent,
        HugePages::TwoMib => Pages::TwoMib,
    }
}

/// Where the guest's interrupt chips are to be.
fn choose_chips(
    kvm: &Kvm,
    configuration: &Configuration,
    kernel: &Boot,
) -> Result<Chips, ActionError> {
    match configuration.machine.interrupt_controller {
        InterruptController::Kernel => Ok(Chips::Kernel),
        InterruptController::Split if chips::host_can_split(kvm) => Ok(Chips::Split),
        InterruptController::Split => Err(ActionError(
            "The interrupt controller cannot be split on this host: KVM lacks KVM_CAP_SPLIT_IRQCHIP \
             or KVM_CAP_TSC_DEADLINE_TIMER. Leave `interrupt_controller` out of the machine \
             configuration."
                .into(),
        )),
        InterruptController::Auto => {
            let masks = configuration.cpu.as_ref().map(cpu::cpuid_masks);
            let boot_args = kernel.source.boot_args.as_deref().unwrap_or_default();
            Ok(chips::choose(kvm, boot_args, &masks.unwrap_or_default()))
        }
    }
}
