//! Opening the overlay of a disk: a file that is made when it is missing, or memory.

use std::error::Error;
use std::fs::{File, Metadata};
use std::io::{self, Seek};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use super::made_if_missing;
use super::purpose::{DISK_TO_READ, OVERLAY, Purpose};
use crate::error::ActionError;
use crate::overlay::{self, BaseId, Content, Durability, Overlay, Refusal};
use crate::sys::fd;
use crate::sys::passed::Passed;
use crate::warn;
use crate::wire::config::Source;

/// The overlay of a disk: its file, and what is in it.
#[derive(Debug)]
pub struct OpenOverlay {
    /// Open for writing, and locked; or memory.
    pub file: File,
    /// What was found in it.
    pub content: Content,
}

/// Bytes of the whole sectors of a disk, also of a block device.
fn disk_size(mut disk: &File) -> io::Result<u64> {
    Ok(disk.seek(io::SeekFrom::End(0))? & !511)
}

impl OpenOverlay {
    /// Opens the overlay that `source` names, or makes it, over the disk `base`, which `base_source` names; or takes it
    /// from `before`, where it is open in this process already. What was made for one that is refused goes again.
    ///
    /// # Errors
    /// When it is missing and cannot be made, not permitted, no regular file, the overlay of another disk, damaged, or in
    /// use.
    pub fn file(
        source: &Source,
        base: (&Source, &File),
        before: Option<&OpenOverlay>,
        passed: &mut Passed,
    ) -> Result<Self, ActionError> {
        let Source::Named(path) = source else {
            return OpenOverlay::existing(source, base, before, passed);
        };
        OVERLAY.may_wait("making", source);
        let made = made_if_missing(path).map_err(|cause| OVERLAY.not_opened(source, &cause))?;
        let opened = OpenOverlay::existing(source, base, before, passed);
        if made && opened.is_err() {
            // It is empty: nothing is lost if it stays.
            let _ = rustix::fs::unlinkat(rustix::fs::CWD, path, rustix::fs::AtFlags::empty());
        }
        opened
    }

    fn existing(
        source: &Source,
        (base_source, base): (&Source, &File),
        before: Option<&OpenOverlay>,
        passed: &mut Passed,
    ) -> Result<Self, ActionError> {
        let purpose = &OVERLAY;
        let (mut file, metadata) = purpose.open(source, passed)?;
        if !metadata.is_file() {
            return Err(purpose.wrong_kind(source, &metadata));
        }
        if is_same(base, &metadata) {
            return Err(ActionError(format!(
                "{}The overlay `{source}` is the disk `{base_source}` itself. Name another file",
                purpose.section
            )));
        }
        let own = before.filter(|other| is_same(&other.file, &metadata));
        match own.map(|other| other.file.try_clone()) {
            // This process has the lock.
            Some(copy) => file = copy.map_err(|cause| purpose.not_opened(source, &cause))?,
            None => {
                purpose.may_wait("locking", source);
                let locked = overlay::lock(&file, false);
                locked.map_err(|refusal| refused(purpose, source, &refusal))?;
            }
        }
        purpose.may_wait("reading", source);
        let base_purpose = &DISK_TO_READ;
        base_purpose.may_wait("reading", base_source);
        let locked = overlay::lock(base, true);
        locked.map_err(|refusal| refused(base_purpose, base_source, &refusal))?;
        let base = base_id(base).map_err(|cause| base_purpose.not_opened(base_source, &cause))?;
        let mut id = [0; 16];
        let content = fd::random(&mut id)
            .map_err(|cause| Refusal::Io("taking a random number", cause))
            .and_then(|()| Content::open(&file, &base, id));
        let content = content.map_err(|refusal| refused(purpose, source, &refusal))?;
        if content.is_base_modified {
            warn!(
                "The disk `{base_source}` has another modification time than when the overlay `{source}` was made over \
                 it. If it was written to since, what the guest sees is a mixture."
            );
        }
        Ok(OpenOverlay { file, content })
    }

    /// Makes one of memory, over the disk `base`, which `base_source` names.
    ///
    /// # Errors
    /// When the host has none left, or the disk is too large.
    pub fn memory((base_source, base): (&Source, &File)) -> Result<Self, ActionError> {
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let made =
            disk_size(base).map_err(|cause| Refusal::Io("reading the size of the disk", cause));
        let made = made.and_then(|size| {
            let file = rustix::fs::memfd_create("overlay", flags);
            let file = File::from(file.map_err(|cause| Refusal::Io("making it", cause.into()))?);
            let content = Content::in_memory(&file, size)?;
            Ok(OpenOverlay { file, content })
        });
        made.map_err(|refusal| {
            let text = format!(
                "{}The overlay of the disk `{base_source}` {refusal}",
                OVERLAY.section
            );
            with_cause(text, &refusal)
        })
    }

    /// Whether both are in one file.
    pub fn is_in_file_of(&self, other: &OpenOverlay) -> bool {
        let metadata = other.file.metadata();
        metadata.is_ok_and(|metadata| is_same(&self.file, &metadata))
    }

    /// It once more.
    ///
    /// # Errors
    /// The host's.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(OpenOverlay {
            file: self.file.try_clone()?,
            content: self.content.clone(),
        })
    }

    /// Reads its map. Space that an earlier generation left is given back.
    ///
    /// # Errors
    /// When it is damaged, or cannot be read.
    pub fn load(self, durability: Durability) -> Result<Overlay<File>, Refusal> {
        let overlay = Overlay::load(Arc::new(self.file), &self.content, durability)?;
        if durability != Durability::Volatile {
            // That it could not be given back does no harm.
            drop(overlay.left_over());
        }
        Ok(overlay)
    }
}

fn base_id(base: &File) -> io::Result<BaseId> {
    let metadata = base.metadata()?;
    // Nanoseconds are less than 2^30.
    let nanos = u32::try_from(metadata.mtime_nsec()).unwrap_or(0);
    BaseId::of(base, disk_size(base)?, (metadata.mtime(), nanos))
}

fn is_same(file: &File, metadata: &Metadata) -> bool {
    file.metadata()
        .is_ok_and(|other| (other.dev(), other.ino()) == (metadata.dev(), metadata.ino()))
}

fn refused(purpose: &Purpose, source: &Source, refusal: &Refusal) -> ActionError {
    with_cause(purpose.wrong(source, refusal).0, refusal)
}

fn with_cause(text: String, refusal: &Refusal) -> ActionError {
    match refusal.source() {
        Some(cause) => ActionError(format!("{text}: {cause}")),
        None => ActionError(text),
    }
}
