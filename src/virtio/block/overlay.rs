//! A disk of two files: a base that is only read, and an overlay that has what was written.
//!
//! [`crate::overlay`] knows what is where; this makes [`Extent`]s of it, and says what has to be done before and after a
//! write. Of two writes to the same bytes that are in flight at once, one may be lost where it does not cover a unit,
//! with more than those bytes: a driver that orders neither has no promise of either.

use std::fs::File;
use std::io;
use std::sync::Arc;

use super::disk::{DiskError, Extent, Extents, FileIndex};
use crate::overlay::{Overlay, Place, Stale};
use crate::sys;
use crate::sys::io::Access;

/// The two files.
#[derive(Debug)]
pub struct Layers {
    base: Arc<File>,
    base_access: Access,
    overlay: Overlay<File>,
    access: Access,
}

/// What a reset gives back: the space of what was forgotten, once it is dropped. It comes back in the box that
/// asked for it.
#[derive(Debug, Default)]
pub struct Reset(pub Option<Stale<File>>);

impl Layers {
    pub fn new(base: File, overlay: Overlay<File>) -> Result<Self, DiskError> {
        for file in [&base, overlay.file()] {
            sys::fd::set_blocking(file).map_err(DiskError::Kind)?;
        }
        Ok(Layers {
            base_access: Access::of(&base).map_err(DiskError::Kind)?,
            access: Access::of(overlay.file()).map_err(DiskError::Kind)?,
            base: Arc::new(base),
            overlay,
        })
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.overlay.size()
    }

    /// The same for copies of the overlay.
    pub fn id(&self) -> [u8; 16] {
        self.overlay.header().id
    }

    pub fn file(&self, file: FileIndex) -> Option<(&File, Access)> {
        match file {
            FileIndex::DATA => Some((self.overlay.file(), self.access)),
            FileIndex::BASE => Some((&self.base, self.base_access)),
            _ => None,
        }
    }

    pub fn shared(&self, file: FileIndex) -> Option<Arc<File>> {
        match file {
            FileIndex::DATA => Some(self.overlay.shared_file()),
            FileIndex::BASE => Some(Arc::clone(&self.base)),
            _ => None,
        }
    }

    pub fn read_extents(&self, at: u64, len: u32, out: &mut Extents) {
        let mut done: u32 = 0;
        while done < len {
            let from = at.saturating_add(u64::from(done));
            let (place, count) = self
                .overlay
                .locate(from, u64::from(len.saturating_sub(done)));
            let (file, at) = match place {
                Place::Base => (FileIndex::BASE, from),
                Place::File(at) => (FileIndex::DATA, at),
                Place::Zero => (FileIndex::ZERO, 0),
            };
            // No more than was asked for.
            let len = u32::try_from(count).unwrap_or(0);
            if len == 0 || !out.push(Extent { file, at, len }) {
                return;
            }
            done = done.saturating_add(len);
        }
    }

    pub fn write_extent(&self, at: u64, len: u32) -> Extent {
        Extent {
            file: FileIndex::DATA,
            at: self.overlay.write_at(at),
            len,
        }
    }

    pub fn before_write(&mut self, at: u64, len: u64) -> io::Result<()> {
        self.overlay.before_write(&*self.base, at, len)
    }

    pub fn wrote(&mut self, at: u64, len: u64) -> io::Result<()> {
        self.overlay.wrote(at, len)
    }

    /// What of a range that is discarded is whole units, where it is in the file.
    pub fn discard_extent(&self, at: u64, len: u64) -> Option<(FileIndex, u64, u64)> {
        let (at, len) = self.overlay.whole_units(at, len);
        (len > 0).then(|| (FileIndex::DATA, self.overlay.write_at(at), len))
    }

    /// The whole units of a range are zeros from now on.
    pub fn set_zero(&mut self, at: u64, len: u64) -> io::Result<()> {
        self.overlay.set_zero(at, len)
    }

    pub fn flush_metadata(&mut self) -> io::Result<()> {
        self.overlay.flush_map()
    }

    /// Makes the file tell all of the disk to whatever opens it next.
    pub fn settle(&mut self) -> io::Result<()> {
        self.overlay.flush()
    }

    pub fn reset(&mut self, reset: &mut Reset) -> io::Result<()> {
        reset.0 = Some(self.overlay.reset()?);
        Ok(())
    }
}
