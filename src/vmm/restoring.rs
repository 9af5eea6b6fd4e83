//! Loading a snapshot: the middle step of that change, on the files thread, from the request to what
//! control builds a machine of.
//!
//! What is read is distrusted like what a guest writes: each part checks its own state when it is
//! made. Before the first byte is read, this thread and control install a filter that has no more than
//! making a machine takes ([`Category::Restore`]); the threads that control makes then inherit it.
//! Whatever is wrong is told in one message, and no guest runs; the process can be configured, or load
//! again, after that.

use std::fmt;
use std::fs::File;
use std::sync::Arc;

use super::boot::{self, Origin, Record, Restored};
use super::change::{Edit, edit};
use super::configuration::{Boot, Configuration};
use super::devices::{Devices, Reopened};
use super::requests::{Ready, Start, Then};
use super::saved::SavedMachine;
use crate::arch::vm::state::ClockAfterRestore;
use crate::error::{ActionError, Context};
use crate::files::open::{self, WorkingSetFile};
use crate::memory::lazy::Handler;
use crate::memory::working_set::{Prefetch, WorkingSet};
use crate::memory::{Memory, PAGE, Source as MappedFile};
use crate::seccomp::Category;
use crate::snapshot::{self, Header};
use crate::sys::clock;
use crate::sys::passed::Passed;
use crate::wire::config::{
    self as wire, DriveOverlay, DriveOverride, HugePages, LoadPages, MachineConfig,
    MemoryBackendType, SavedConfig, SnapshotLoad, Source,
};
use crate::{threads, warn};

const FAILED: &str = "Load snapshot error: Failed to restore from snapshot";

/// The second step of loading a snapshot: reads and opens all of it, behind `filter`. The machine takes the place of all
/// that there is of a configuration; what that has `before` may be what it needs.
///
/// # Errors
/// What is wrong with it; nothing of the attempt is left then.
pub(super) fn restore(
    load: &SnapshotLoad,
    filter: Option<Category>,
    before: Reopened,
    passed: &mut Passed,
) -> Result<Vec<Ready>, ActionError> {
    threads::filter_or_end(filter);
    let then = match load.resume_vm {
        true => Then::Resume,
        false => Then::Pause,
    };
    let (configuration, restored) = read(load, before, passed)?;
    let origin = Origin::Snapshot(Box::new(restored));
    let line = None;
    Ok(vec![
        Ready::Configuration(configuration),
        Ready::Start(Start { origin, then, line }),
    ])
}

fn read(
    load: &SnapshotLoad,
    before: Reopened,
    passed: &mut Passed,
) -> Result<(Edit<Configuration>, Restored), ActionError> {
    let (header, raw, image) = match load.mem_backend.backend_type {
        MemoryBackendType::File => {
            let memory = &load.mem_backend.backend_path;
            let (header, raw, image) = open::snapshot_pair(&load.snapshot_path, memory, passed)?;
            (header, raw, Some(image))
        }
        MemoryBackendType::Uffd => {
            let (header, raw) = open::snapshot_state(&load.snapshot_path, passed)?;
            (header, raw, None)
        }
    };
    let wrong = |why: &dyn fmt::Display| open::wrong_state(&load.snapshot_path, why);
    let saved: SavedMachine = raw.parse().map_err(|refusal| wrong(&refusal))?;
    let (vm, saved) = saved.checked().map_err(|refusal| wrong(&refusal))?;
    let SavedMachine { config, cpu, state } = saved;
    let SavedConfig {
        mut machine,
        boot_source,
        cpu: masks,
        mut devices,
    } = config;
    machine.track_dirty_pages = load.track_dirty_pages;
    machine.huge_pages = match load.huge_pages {
        LoadPages::Snapshot => machine.huge_pages,
        LoadPages::None => HugePages::None,
        LoadPages::Transparent => HugePages::Transparent,
        LoadPages::TwoMib => HugePages::TwoMib,
    };
    let (memory, handler) = open_memory(load, image, &machine, passed)?;
    let (prefetch, record) = match &load.working_set {
        Some(source) => open_working_set(source, &header, &memory, passed)?,
        None => (None, None),
    };
    let record = match record {
        Some(file) => {
            let pagemap = load
                .pagemap
                .as_ref()
                .map(|passed_fd| passed.claim(passed_fd.fd));
            let pagemap = pagemap.transpose().context(FAILED)?;
            let pagemap = pagemap.map(|fd| Arc::new(File::from(fd)));
            Some(Record { file, pagemap })
        }
        None => None,
    };
    override_sources(&mut devices, load)?;
    let opened = Devices::opening(devices, before).and_then(|open| open(passed));
    let devices = opened.context(FAILED)?;
    let boot = boot_source.map(Boot::started);
    let edit = edit(move |whole: &mut Configuration| whole.restore(machine, boot, masks, devices))?;
    let restored = Restored {
        vm,
        state,
        memory,
        handler,
        prefetch,
        record,
        clock: match load.clock_realtime {
            true => ClockAfterRestore::CatchUp,
            false => ClockAfterRestore::Continue,
        },
        cpu: (!load.ignore_cpu_differences).then_some(cpu),
        elapsed: clock::realtime_nanos().saturating_sub(header.taken),
        id: header.id,
    };
    Ok((edit, restored))
}

/// Guest memory of its image, or else of the process that brings it in.
fn open_memory(
    load: &SnapshotLoad,
    image: Option<File>,
    machine: &MachineConfig,
    passed: &mut Passed,
) -> Result<(Memory, Option<Handler>), ActionError> {
    let source = &load.mem_backend.backend_path;
    let (size, tracked) = (machine.mem_size_mib, machine.track_dirty_pages);
    let pages = boot::pages(machine.huge_pages);
    match image {
        Some(file) => {
            let mapped = MappedFile::new(&file, &source.to_string()).context(FAILED)?;
            let memory = Memory::from_image(&Arc::new(mapped), size, pages, tracked);
            Ok((memory.context(FAILED)?, None))
        }
        None => {
            let socket = open::fault_handler(source, passed)?;
            let memory = Memory::from_handler(socket, None, size, pages, tracked);
            let (memory, handler) = memory.context(FAILED)?;
            Ok((memory, Some(handler)))
        }
    }
}

/// What brings in the pages that are recorded in the file, or else the file to record them in.
fn open_working_set(
    source: &Source,
    header: &Header,
    memory: &Memory,
    passed: &mut Passed,
) -> Result<(Option<Prefetch>, Option<File>), ActionError> {
    let WorkingSetFile { file, can_record } = open::working_set(source, header.id, passed)?;
    let mut tries = 3;
    loop {
        if snapshot::is_unrecorded(&file) {
            return can_record.map(|()| (None, Some(file)));
        }
        tries -= 1;
        match WorkingSet::read(&file, header.id.0, header.memory.len / PAGE) {
            Ok(Some(set)) => return Ok((Some(Prefetch::new(memory.ram(), set)), None)),
            Ok(None) if can_record.is_ok() => {
                warn!(
                    "The working set `{source}` is that of another snapshot, and is recorded anew."
                );
                return Ok((None, Some(file)));
            }
            Ok(None) => {
                warn!(
                    "The working set `{source}` is that of another snapshot and cannot be written to: it is \
                     not used. Name another."
                );
                return Ok((None, None));
            }
            // Another process may have begun to record it anew just now.
            Err(_) if tries > 0 => {}
            // It may be anything of the user's.
            Err(cause) => {
                return Err(ActionError(format!(
                    "{FAILED}: the file `{source}` is not empty and no working set, and is not overwritten: \
                     {cause}. Name another"
                )));
            }
        }
    }
}

/// Puts what the request says in the place of what devices were saved with. What was a descriptor then
/// must be named anew.
fn override_sources(devices: &mut wire::Devices, load: &SnapshotLoad) -> Result<(), ActionError> {
    let mut named = Vec::new();
    let mut overlays = Vec::new();
    for change in &load.drive_overrides {
        let DriveOverride {
            drive_id,
            path_on_host,
            overlay,
        } = change;
        named.extend(
            path_on_host
                .as_ref()
                .map(|source| (&**drive_id, source, "drive")),
        );
        overlays.extend(overlay.as_ref().map(|overlay| (&**drive_id, overlay)));
    }
    for drive in &mut devices.drives {
        let place = (&*drive.drive_id, "drive", "drive_overrides");
        take_over(&mut drive.path_on_host, place, &mut named)?;
        let id = &drive.drive_id;
        let given = overlays.iter().position(|(other, _)| other == id);
        if let Some(at) = given {
            drive.overlay = Some(overlays.swap_remove(at).1.clone());
        } else if let Some(DriveOverlay::File {
            path_on_host: Source::Fd(_),
        }) = drive.overlay
        {
            return Err(ActionError(format!(
                "{FAILED}: the overlay of the drive `{id}` was saved with a passed descriptor: name \
                 what it is to use now in `drive_overrides`"
            )));
        }
    }
    named.extend(
        overlays
            .first()
            .map(|(id, _)| (*id, &load.snapshot_path, "drive")),
    );
    for change in &load.network_overrides {
        named.push((
            &*change.iface_id,
            &change.host_dev_name,
            "network interface",
        ));
    }
    for network in &mut devices.network_interfaces {
        let place = (&*network.iface_id, "network interface", "network_overrides");
        take_over(&mut network.host_dev_name, place, &mut named)?;
        let mut changes = load.network_overrides.iter();
        if let Some(change) = changes.find(|change| change.iface_id == network.iface_id) {
            network.queue_fds.clone_from(&change.queue_fds);
            network.guest_mac = change.guest_mac.or(network.guest_mac);
        }
    }
    match named.first() {
        Some((id, _, kind)) => Err(ActionError(format!(
            "{FAILED}: the snapshot has no {kind} `{id}`, which an override names"
        ))),
        None => Ok(()),
    }
}

fn take_over(
    source: &mut Source,
    (id, kind, list): (&str, &str, &str),
    named: &mut Vec<(&str, &Source, &str)>,
) -> Result<(), ActionError> {
    let at = named
        .iter()
        .position(|(other, _, of)| (*other, *of) == (id, kind));
    match (at, &source) {
        (Some(at), _) => *source = named.swap_remove(at).1.clone(),
        (None, Source::Named(_)) => {}
        (None, Source::Fd(_)) => {
            return Err(ActionError(format!(
                "{FAILED}: the {kind} `{id}` was saved with a passed descriptor: name what it is to \
                 use now in `{list}`"
            )));
        }
    }
    Ok(())
}
