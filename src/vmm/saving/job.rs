//! The files thread's part of a snapshot: both files, or the state file of a fork whose memory is where
//! it is.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileTypeExt;

use super::super::saved::SavedMachine;
use crate::error::{ActionError, Context};
use crate::files::Steps;
use crate::info;
use crate::memory::Source as MappedFile;
use crate::memory::fork::{Frozen, copy_image};
use crate::memory::image::{Contents, Stamp};
use crate::memory::page_set::PageSet;
use crate::snapshot::{self, Header, Kind, MemoryImage, SnapshotId, Target};
use crate::sys::passed::Passed;
use crate::sys::socket::send_now_with_descriptors;
use crate::wire::config::{SnapshotCreate, Source};

/// How Firecracker begins the message.
pub(super) const CREATE_FAILED: &str = "Create snapshot error: Cannot create the snapshot";

/// What the files thread has made of it.
pub struct Written {
    /// The pages that had changed since the snapshot before.
    pub(super) changed: Option<PageSet>,
    pub(super) result: Result<SnapshotId, ActionError>,
}

/// What the files thread needs to write both files.
pub struct Job {
    pub(super) request: SnapshotCreate,
    pub(super) passed: Passed,
    pub(super) image: ImageSource,
    pub(super) stamp: Stamp,
    pub(super) header: Header,
    pub(super) saved: SavedMachine,
}

/// Where a memory image comes from.
pub(super) enum ImageSource {
    /// Guest memory, which stands still; what of it has changed, if that is tracked.
    Memory(Contents, Option<PageSet>),
    /// Memory that a fork has frozen.
    Frozen(Option<Frozen>),
}

impl Job {
    pub(super) fn write(mut self, steps: &Steps) -> Written {
        let result = self.write_files(steps);
        let changed = match self.image {
            ImageSource::Memory(_, changed) => changed,
            ImageSource::Frozen(_) => None,
        };
        Written { changed, result }
    }

    fn write_files(&mut self, steps: &Steps) -> Result<SnapshotId, ActionError> {
        let frozen = match &mut self.image {
            ImageSource::Memory(..) => None,
            ImageSource::Frozen(frozen) => frozen.take(),
        };
        let frozen = frozen.map(Frozen::seal).transpose();
        let frozen = frozen.context(CREATE_FAILED)?;
        let wait = |what: &str| steps.begin(what);
        let state = target(&self.request.snapshot_path, &mut self.passed)?;
        self.check_not_below(&state)?;
        let memory = self.request.mem_file_path.clone();
        let memory = memory.map(|memory| target(&memory, &mut self.passed));
        match (memory.transpose()?, frozen) {
            (Some(Target::File { file, .. }), Some(frozen)) if is_socket(&file) => {
                self.write_state(state, &frozen, &wait)?;
                let sent = send_now_with_descriptors(&file, b"m", &[frozen.file().as_fd()]);
                sent.context(format_args!("{CREATE_FAILED}: Cannot pass the memory"))?;
            }
            (None, Some(frozen)) => {
                self.write_state(state, &frozen, &wait)?;
                let fd = frozen.file().as_raw_fd();
                info!(
                    "The memory of snapshot {} is descriptor {fd} of this process.",
                    self.header.id
                );
            }
            (Some(memory), frozen) => {
                self.check_not_below(&memory)?;
                let fill = |file: &File| self.fill(file, frozen.as_deref());
                let encode = |memory| snapshot::encode(&self.header_with(memory), &self.saved);
                snapshot::write_pair(state, memory, &wait, fill, encode).context(CREATE_FAILED)?;
            }
            (None, None) => return Err(ActionError("missing field `mem_file_path`".into())),
        }
        Ok(self.header.id)
    }

    /// Guest memory must not be a mapping of a descriptor that is written to.
    fn check_not_below(&self, target: &Target) -> Result<(), ActionError> {
        match (target, &self.image) {
            (Target::File { file, name }, ImageSource::Memory(contents, _))
                if contents.is_mapped_from(file) =>
            {
                Err(ActionError(format!(
                    "{CREATE_FAILED}: the memory of this guest is mapped from `{name}`, which would \
                     change it. Name another file"
                )))
            }
            _ => Ok(()),
        }
    }

    /// Writes the memory image.
    fn fill(&self, file: &File, frozen: Option<&MappedFile>) -> io::Result<MemoryImage> {
        let stamp = &self.stamp;
        let (len, written) = match (&self.image, frozen) {
            (ImageSource::Memory(contents, changed), _) => {
                let written = match (self.header.kind, changed) {
                    (Kind::Diff, Some(changed)) => contents.write_diff(file, stamp, changed),
                    (Kind::Diff, None) => contents.write_private(file, stamp),
                    _ => contents.write_full(file, stamp),
                };
                (contents.len(), written?)
            }
            (ImageSource::Frozen(_), Some(frozen)) => {
                (frozen.len(), copy_image(frozen, stamp, file)?)
            }
            (ImageSource::Frozen(_), None) => return Err(io::ErrorKind::InvalidInput.into()),
        };
        Ok(MemoryImage {
            len,
            check: Some(written.check),
            id_at: stamp.offset,
        })
    }

    /// Writes the state file alone: the memory is where it is.
    fn write_state(
        &self,
        state: Target,
        frozen: &MappedFile,
        wait: &dyn Fn(&str),
    ) -> Result<(), ActionError> {
        let header = self.header_with(MemoryImage {
            len: frozen.len(),
            check: None,
            id_at: self.stamp.offset,
        });
        let bytes = snapshot::encode(&header, &self.saved);
        let bytes = bytes.context(CREATE_FAILED)?;
        snapshot::write_state(state, &bytes, wait).context(CREATE_FAILED)
    }

    fn header_with(&self, memory: MemoryImage) -> Header {
        Header {
            memory,
            ..self.header.clone()
        }
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
