//! A snapshot to start from (`run --snapshot`): which files stand for the disks and taps that it was
//! saved with, and all of them opened, since the empty jail can open nothing.
//!
//! The saved configuration is read with the monitor's own reader of state files
//! ([`mayfly::snapshot`]) and its own type for that part ([`SavedConfig`]): one description of the
//! format, and what is truncated, altered, foreign or mixed is refused here in the same words,
//! before there is a jail. The rest of the state stays bytes to this program. It is read here
//! although the monitor reads it again: only this process can open what it names.
//!
//! A disk that the guest writes to has to be named anew, or `--same-disks` given: many microVMs come
//! from one snapshot, and two that write to one file damage both. What was saved as a descriptor
//! has no more than a name for messages; that is taken for a path only if it is an absolute one.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use mayfly::snapshot::{self, Header, MEMORY_NAME, RawState, Refusal, STATE_NAME, SnapshotId};
use mayfly::wire::Source;
use mayfly::wire::config::{
    Backing, Drive, DriveOverlay, DriveOverride, Mac, NetworkInterface, NetworkOverride, Restore,
    SavedConfig, SnapshotLoad,
};
use serde::Deserialize;

use super::OWN_TAP;
use super::devices::{DriveSettings, GivenDrive};
use super::inherited::{Passed, number_in};
use super::resources;
use crate::error::{AnyError, Step};

/// A snapshot cannot be started from.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    #[error("cannot start from a snapshot: the {0} file {1} {2}")]
    Refused(&'static str, PathBuf, Refusal),
    #[error("cannot start from this snapshot: it has no {0} {1}, which {2} names; it has {3}")]
    NoSuch(&'static str, String, &'static str, String),
    #[error(
        "cannot start from this snapshot: its disk {id} ({saved}) is writable, and another microVM may \
         have it; give a copy of it with --drive {id}=FILE, or --same-disks if nothing else uses it"
    )]
    Writable { id: String, saved: String },
    #[error(
        "cannot use --drive {0}: that disk was saved writable, and a guest is not told of a change; \
         leave out :ro"
    )]
    OnlyToRead(String),
    #[error(
        "cannot start from this snapshot: its disk {id} was saved as \"{saved}\", which is not an \
         absolute path; name its file with --drive {id}=FILE"
    )]
    NoPath { id: String, saved: String },
    #[error(
        "cannot start from this snapshot: what the guest wrote to its disk {id} is in the overlay \
         \"{saved}\"; copy that, and give --drive {id}=BASE:overlay=COPY, or --same-disks if nothing else uses it"
    )]
    NoOverlay { id: String, saved: String },
    #[error(
        "cannot start from this snapshot: its network interface {id} was saved with \"{saved}\", which \
         is not a tap of this host; give --net {id}=TAP, or auto or user if it was booted with that"
    )]
    NoTap { id: String, saved: String },
}

/// What the options say of it.
#[derive(Debug, Default, PartialEq)]
pub struct Restoring {
    /// The folder with both files.
    pub folder: PathBuf,
    /// The file that says which of its memory is used first, or is to.
    pub working_set: Option<PathBuf>,
    /// What is given for its disks, by id.
    pub drives: Vec<(String, GivenDrive)>,
    /// Taps for its network interfaces, by id.
    pub taps: Vec<(String, Source)>,
    /// Open writable disks where they were.
    pub same_disks: bool,
    /// Start although the host's processor differs.
    pub ignore_cpu_differences: bool,
}

/// A state file's content, as far as this program looks at it.
#[derive(Deserialize)]
struct Saved {
    config: SavedConfig,
}

/// It, opened.
#[derive(Debug)]
pub struct Opened {
    /// The request, which refers to the files by number.
    pub request: Restore,
    /// In the order of those numbers.
    pub files: Vec<OwnedFd>,
    /// The MAC address that the interface on a tap of the jail's was saved with.
    pub mac: Option<Mac>,
}

impl Restoring {
    /// All that the options name.
    pub fn sources(&mut self) -> impl Iterator<Item = &mut Source> {
        let disks = self.drives.iter_mut().flat_map(|(_, given)| {
            let overlay = match &mut given.overlay {
                Some(DriveOverlay::File { path_on_host }) => Some(path_on_host),
                _ => None,
            };
            std::iter::once(&mut given.image).chain(overlay)
        });
        disks.chain(self.taps.iter_mut().map(|(_, source)| source))
    }

    /// Reads the saved configuration and opens everything but a tap still to be made in the jail.
    pub fn open(mut self, passed: &mut Passed) -> Result<Opened, AnyError> {
        let (state, header, raw, memory) = self.open_pair()?;
        let saved: Saved = raw.parse().map_err(|refusal| {
            SnapshotError::Refused(STATE_NAME, self.path(STATE_NAME), refusal)
        })?;
        let name = |file| self.path(file).display().to_string();
        let load = SnapshotLoad {
            resume_vm: true,
            clock_realtime: true,
            ignore_cpu_differences: self.ignore_cpu_differences,
            ..SnapshotLoad::new(
                Source::passed(0, name(STATE_NAME)),
                Source::passed(1, name(MEMORY_NAME)),
            )
        };
        let mut opened = Opened {
            request: Restore::new(load),
            files: vec![state, memory],
            mac: None,
        };
        if let Some(path) = &self.working_set {
            opened.request.load.working_set = Some(opened.add_working_set(path, header.id)?);
        }
        let devices = saved.config.devices;
        for drive in &devices.drives {
            let GivenDrive { image, overlay, .. } = self.disk(drive)?;
            let backing = Backing::Disk {
                read_only: drive.read_only() || overlay.is_some(),
            };
            let path_on_host = Some(opened.add(backing, &image, passed)?);
            let overlay = match overlay {
                Some(DriveOverlay::File { path_on_host }) => Some(DriveOverlay::File {
                    path_on_host: opened.add(Backing::Overlay, &path_on_host, passed)?,
                }),
                other => other,
            };
            opened.request.load.drive_overrides.push(DriveOverride {
                drive_id: drive.drive_id.clone(),
                path_on_host,
                overlay,
            });
        }
        for interface in &devices.network_interfaces {
            let mut source = self.tap(interface)?;
            let mut queue_fds = Vec::new();
            if interface.queues.is_some_and(|queues| queues > 1) && source.name() != Some(OWN_TAP) {
                let mut queues = interface.clone();
                queues.host_dev_name = source.clone();
                queues.queue_fds.clear();
                queues.name_queues();
                for queue in queues.queue_fds {
                    queue_fds.push(opened.add(Backing::TapQueue, &queue, passed)?);
                }
                source = opened.add(Backing::TapQueue, &source, passed)?;
            }
            let host_dev_name = match source.name() {
                Some(OWN_TAP) => {
                    opened.mac = interface.guest_mac;
                    source
                }
                None if !queue_fds.is_empty() => source,
                _ => opened.add(Backing::Tap, &source, passed)?,
            };
            let iface_id = interface.iface_id.clone();
            let change = NetworkOverride {
                iface_id,
                host_dev_name,
                queue_fds,
                guest_mac: None,
            };
            opened.request.load.network_overrides.push(change);
        }
        let drives = devices.drives.iter().map(|it| &*it.drive_id).collect();
        let left = self.drives.first().map(|(id, ..)| id);
        check_all_found(("disk", "--drive"), left, drives)?;
        let interfaces = devices.network_interfaces.iter().map(|it| &*it.iface_id);
        let left = self.taps.first().map(|(id, _)| id);
        check_all_found(("network interface", "--net"), left, interfaces.collect())?;
        Ok(opened)
    }

    fn path(&self, file: &str) -> PathBuf {
        self.folder.join(file)
    }

    /// The state file, and the memory file that belongs to it: what a writer that was killed left has another
    /// name.
    fn open_pair(&self) -> Result<(OwnedFd, Header, RawState, OwnedFd), SnapshotError> {
        let [state_at, memory_at] = [STATE_NAME, MEMORY_NAME].map(|name| self.path(name));
        let open_state = || {
            let file = snapshot::open_regular(&state_at)?;
            let (header, raw) = snapshot::read(&file)?;
            header.check_whole()?;
            Ok((header, (file, raw)))
        };
        let open_memory = |header: &Header| {
            let opened = snapshot::open_regular(&memory_at);
            snapshot::memory_of(header, opened, Some(&memory_at))
        };
        match snapshot::read_pair(open_state, open_memory) {
            Ok((header, (state, raw), Ok(memory))) => {
                Ok((state.into(), header, raw, memory.into()))
            }
            Ok((.., Err(refusal))) => Err(SnapshotError::Refused(MEMORY_NAME, memory_at, refusal)),
            Err(refusal) => Err(SnapshotError::Refused(STATE_NAME, state_at, refusal)),
        }
    }

    /// What stands for a disk.
    fn disk(&mut self, drive: &Drive) -> Result<GivenDrive, SnapshotError> {
        let id = drive.drive_id.clone();
        let given = self.drives.iter().position(|(other, ..)| *other == id);
        let saved_overlay = match &drive.overlay {
            Some(DriveOverlay::File { path_on_host }) => Some(path_on_host.to_string()),
            _ => None,
        };
        if let Some((_, given)) = given.map(|at| self.drives.swap_remove(at)) {
            if given.read_only && !drive.read_only() {
                return Err(SnapshotError::OnlyToRead(id));
            }
            return match saved_overlay {
                Some(saved) if given.overlay.is_none() => {
                    Err(SnapshotError::NoOverlay { id, saved })
                }
                _ => Ok(given),
            };
        }
        let saved = drive.path_on_host.to_string();
        if !drive.read_only() && !self.same_disks {
            return Err(match saved_overlay {
                Some(overlay) => SnapshotError::NoOverlay { id, saved: overlay },
                None => SnapshotError::Writable { id, saved },
            });
        }
        let source =
            |saved: String| match Path::new(&saved).is_absolute() && number_in(&saved).is_none() {
                true => Ok(Source::Named(saved)),
                false => Err(SnapshotError::NoPath {
                    id: id.clone(),
                    saved,
                }),
            };
        let overlay = match saved_overlay {
            Some(saved) => Some(DriveOverlay::File {
                path_on_host: source(saved)?,
            }),
            None => None,
        };
        Ok(GivenDrive {
            image: source(saved)?,
            read_only: drive.read_only(),
            overlay,
            settings: DriveSettings::default(),
        })
    }

    /// What stands for the tap of an interface.
    fn tap(&mut self, interface: &NetworkInterface) -> Result<Source, SnapshotError> {
        let id = interface.iface_id.clone();
        let given = self.taps.iter().position(|(other, _)| *other == id);
        if let Some((_, source)) = given.map(|at| self.taps.swap_remove(at)) {
            return Ok(source);
        }
        let saved = interface.host_dev_name.to_string();
        // The kernel's rule for names; those of descriptors and of a jail's own have blanks.
        match saved.contains([' ', '/']) {
            true => Err(SnapshotError::NoTap { id, saved }),
            false => Ok(Source::Named(saved)),
        }
    }
}

/// Whether there is no option left over, whose id the snapshot does not have.
fn check_all_found(
    (kind, option): (&'static str, &'static str),
    left: Option<&String>,
    saved: Vec<&str>,
) -> Result<(), SnapshotError> {
    let Some(id) = left else {
        return Ok(());
    };
    let saved = match saved.is_empty() {
        true => "none".to_owned(),
        false => saved.join(", "),
    };
    Err(SnapshotError::NoSuch(kind, id.clone(), option, saved))
}

impl Opened {
    /// Opens the file of the working set of snapshot `id`, which is recorded into it if it is new; what the
    /// request is to call it. The monitor refuses all but regular files.
    fn add_working_set(&mut self, path: &Path, id: SnapshotId) -> Result<Source, AnyError> {
        let name = path.display().to_string();
        let opened = snapshot::open_working_set(path, id);
        let file = opened.step(format!("open the working set {name} (--working-set)"))?;
        Ok(self.push(file.into(), name))
    }

    /// Opens `source`; what the request is to call it.
    fn add(
        &mut self,
        backing: Backing,
        source: &Source,
        passed: &mut Passed,
    ) -> Result<Source, AnyError> {
        let (file, name) = resources::open_or_take(backing, source, passed)?;
        Ok(self.push(file, name))
    }

    fn push(&mut self, file: OwnedFd, name: String) -> Source {
        self.files.push(file);
        Source::passed(self.files.len() as u32 - 1, name)
    }
}
