//! The files thread's part of a snapshot: both files, or the state file of a fork whose memory is where
//! it is.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use super::super::saved::SavedMachine;
use crate::error::{ActionError, Context};
use crate::info;
use crate::memory::Source as MappedFile;
use crate::memory::fork::{Frozen, copy_image};
use crate::memory::image::{Contents, Stamp};
use crate::memory::page_set::PageSet;
use crate::snapshot::{self, Header, Kind, MemoryImage, SnapshotId, Target};
use crate::steps::may_wait;
use crate::sys::passed::Passed;
use crate::sys::socket::send_now_with_descriptors;
use crate::wire::config::{Drive, DriveOverlay, SnapshotCreate, Source};

/// How Firecracker begins the message.
pub(super) const CREATE_FAILED: &str = "Create snapshot error: Cannot create the snapshot";

/// What the files thread has made of it.
pub struct Written {
    /// The pages that had changed since the snapshot before.
    pub(super) changed: Option<PageSet>,
    pub(super) result: Result<SnapshotId, ActionError>,
}

/// What the files thread needs to write both files, beside the memory.
pub struct Job {
    pub(super) request: SnapshotCreate,
    pub(super) passed: Passed,
    pub(super) stamp: Stamp,
    pub(super) header: Header,
    pub(super) saved: SavedMachine,
}

/// Where a memory image comes from.
pub(super) enum Image {
    /// Guest memory, which stands still; what of it has changed, if that is tracked.
    Memory(Contents, Option<PageSet>),
    /// Memory that a fork has frozen.
    Frozen(Frozen),
}

impl Job {
    pub(super) fn write(mut self, image: Image) -> Written {
        let (changed, result) = match image {
            Image::Memory(contents, changed) => {
                let result = self.write_memory(&contents, changed.as_ref());
                (changed, result)
            }
            Image::Frozen(frozen) => (None, self.write_frozen(frozen)),
        };
        Written {
            changed,
            result: result.map(|()| self.header.id),
        }
    }

    /// Where both files go; a fork need not have a memory file.
    fn targets(&mut self) -> Result<(Target, Option<Target>), ActionError> {
        may_wait("looking for the places of the snapshot's files");
        let state = target(&self.request.snapshot_path, &mut self.passed)?;
        let memory = self.request.mem_file_path.as_ref();
        let memory = memory.map(|memory| target(memory, &mut self.passed));
        let memory = memory.transpose()?;
        for target in [Some(&state), memory.as_ref()].into_iter().flatten() {
            self.check_is_no_disk(target)?;
        }
        Ok((state, memory))
    }

    /// A file of the snapshot must not take the place of a disk of this guest, or be written into it.
    fn check_is_no_disk(&self, target: &Target) -> Result<(), ActionError> {
        let (found, name) = match target {
            Target::Path(path) => (path.metadata(), path.display().to_string()),
            Target::File { file, name } => (file.metadata(), name.clone()),
        };
        // One that is still to be made is none.
        let Ok(found) = found else { return Ok(()) };
        let is_it = |disk: &Source| match disk.name() {
            Some(path) => Path::new(path)
                .metadata()
                .is_ok_and(|disk| (disk.dev(), disk.ino()) == (found.dev(), found.ino())),
            None => false,
        };
        let overlay = |drive: &Drive| match &drive.overlay {
            Some(DriveOverlay::File { path_on_host }) => is_it(path_on_host),
            Some(DriveOverlay::Memory { .. }) | None => false,
        };
        let mut drives = self.saved.config.devices.drives.iter();
        match drives.find(|drive| is_it(&drive.path_on_host) || overlay(drive)) {
            Some(drive) => Err(ActionError(format!(
                "{CREATE_FAILED}: `{name}` is a file of the disk `{}` of this guest. Name another",
                drive.drive_id
            ))),
            None => Ok(()),
        }
    }

    /// Writes both files of guest memory that stands still.
    fn write_memory(
        &mut self,
        contents: &Contents,
        changed: Option<&PageSet>,
    ) -> Result<(), ActionError> {
        let (state, memory) = self.targets()?;
        let memory = memory.ok_or_else(|| ActionError("missing field `mem_file_path`".into()))?;
        for target in [&state, &memory] {
            check_not_below(target, contents)?;
        }
        let image = self.image(contents.len(), None);
        if let Some(parent) = self.header.parent
            && snapshot::is_onto(&memory, &image, parent)
        {
            // It takes the place of its base, and so has to hold all that the base does.
            (self.header.kind, self.header.parent) = (Kind::Full, None);
        }
        let stamp = &self.stamp;
        let fill = |file: &File| {
            if contents.may_wait() {
                may_wait("reading guest memory (of the backend Uffd: its page fault handler)");
            }
            let written = match (self.header.kind, changed) {
                (Kind::Diff, Some(changed)) => contents.write_diff(file, stamp, changed),
                (Kind::Diff, None) => contents.write_private(file, stamp),
                _ => contents.write_full(file, stamp),
            };
            Ok(self.image(contents.len(), Some(written?.check)))
        };
        self.write_pair(state, memory, fill)
    }

    /// Writes the state file of a fork, and its memory where that is wanted.
    fn write_frozen(&mut self, frozen: Frozen) -> Result<(), ActionError> {
        let frozen = frozen.seal().context(CREATE_FAILED)?;
        match self.targets()? {
            (state, Some(Target::File { file, .. })) if is_socket(&file) => {
                let pass =
                    || send_now_with_descriptors(&file, b"m", &[frozen.file().as_fd()]).map(drop);
                self.write_state(state, &frozen, pass)?;
            }
            (state, Some(memory)) => {
                let fill = |file: &File| {
                    let written = copy_image(&frozen, file)?;
                    Ok(self.image(frozen.len(), Some(written.check)))
                };
                self.write_pair(state, memory, fill)?;
            }
            (state, None) => {
                self.write_state(state, &frozen, || Ok(()))?;
                let fd = frozen.file().as_raw_fd();
                info!(
                    "The memory of snapshot {} is descriptor {fd} of this process.",
                    self.header.id
                );
            }
        }
        Ok(())
    }

    fn write_pair(
        &self,
        state: Target,
        memory: Target,
        fill: impl FnOnce(&File) -> io::Result<MemoryImage>,
    ) -> Result<(), ActionError> {
        let encode = |image| snapshot::encode(&self.header_with(image), &self.saved);
        snapshot::write_pair(state, memory, fill, encode).context(CREATE_FAILED)
    }

    /// Writes the state file alone: the memory is where it is, or `pass` hands it on.
    fn write_state(
        &self,
        state: Target,
        frozen: &MappedFile,
        pass: impl FnOnce() -> io::Result<()>,
    ) -> Result<(), ActionError> {
        let header = self.header_with(self.image(frozen.len(), None));
        let bytes = snapshot::encode(&header, &self.saved);
        let bytes = bytes.context(CREATE_FAILED)?;
        snapshot::write_state(state, &bytes, pass).context(CREATE_FAILED)
    }

    fn image(&self, len: u64, check: Option<u64>) -> MemoryImage {
        MemoryImage {
            len,
            check,
            id_at: self.stamp.offset,
        }
    }

    fn header_with(&self, memory: MemoryImage) -> Header {
        Header {
            memory,
            ..self.header.clone()
        }
    }
}

/// Guest memory must not be a mapping of a descriptor that is written to.
fn check_not_below(target: &Target, contents: &Contents) -> Result<(), ActionError> {
    match target {
        Target::File { file, name } if contents.is_mapped_from(file) => Err(ActionError(format!(
            "{CREATE_FAILED}: the memory of this guest is mapped from `{name}`, which would change it. \
             Name another file"
        ))),
        _ => Ok(()),
    }
}

fn is_socket(file: &File) -> bool {
    file.metadata()
        .is_ok_and(|metadata| metadata.file_type().is_socket())
}

/// Where a file of the snapshot goes.
fn target(source: &Source, passed: &mut Passed) -> Result<Target, ActionError> {
    Ok(match source {
        Source::Named(path) => Target::Path(path.into()),
        Source::Fd(passed_fd) => {
            let fd = passed.claim(passed_fd.fd);
            let name = source.to_string();
            let fd = fd.context(format_args!("{CREATE_FAILED}: Cannot use `{name}`"))?;
            let file = File::from(fd);
            Target::File { file, name }
        }
    })
}
