//! What a block device stores its sectors in.
//!
//! A [`Disk`] says where bytes are, as [`Extent`]s of its files, and keeps what has to be kept about
//! that; it moves no data of the guest's itself: the block device does, by the way that suits each file
//! ([`Access`]). So what a kind of disk has to know of requests in flight is only when a write is about
//! to begin ([`Disk::before_write`]) and when it has been done ([`Disk::wrote`]).
//!
//! Made on the files thread, used on the device's: nothing but [`Disk::new`] allocates or opens.

use std::fmt;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use super::overlay::{Layers, Reset};
use crate::overlay::Overlay;
use crate::sys;
use crate::sys::io::{Access, Alignment};

/// Bytes of a sector, whatever the disk (virtio 1.2, 5.2.4).
pub const SECTOR: u64 = 512;

/// Which of a disk's files, or none of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileIndex(u8);

impl FileIndex {
    /// The disk, or what a guest wrote.
    pub const DATA: FileIndex = FileIndex(0);
    /// What a guest has not written, for a disk that has it in a file of its own.
    pub const BASE: FileIndex = FileIndex(1);
    /// No file: the bytes are 0.
    pub const ZERO: FileIndex = FileIndex(u8::MAX);

    /// Its number among the disk's files.
    pub fn number(self) -> u32 {
        u32::from(self.0)
    }
}

/// Bytes of a disk that lie side by side in one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Which file.
    pub file: FileIndex,
    /// The first byte's place in it.
    pub at: u64,
    /// How many.
    pub len: u32,
}

/// The extents of part of a disk, in the order of its bytes; a list of bounded length.
#[derive(Debug)]
pub struct Extents {
    list: [Extent; Extents::MAX],
    len: usize,
}

impl Extents {
    const MAX: usize = 16;
    const NONE: Extent = Extent {
        file: FileIndex::ZERO,
        at: 0,
        len: 0,
    };

    /// No extents.
    pub fn new() -> Self {
        Extents {
            list: [Extents::NONE; Extents::MAX],
            len: 0,
        }
    }

    /// Takes all out.
    pub fn clear(&mut self) {
        self.len = 0;
    }

    /// Adds `extent` at the end, as part of the last one where it goes on from that; whether there
    /// was room.
    pub fn push(&mut self, extent: Extent) -> bool {
        let last = self.len.checked_sub(1).and_then(|i| self.list.get_mut(i));
        if let Some(last) = last
            && last.file == extent.file
            && (last.file == FileIndex::ZERO
                || last.at.checked_add(u64::from(last.len)) == Some(extent.at))
            && let Some(len) = last.len.checked_add(extent.len)
        {
            last.len = len;
            return true;
        }
        let Some(place) = self.list.get_mut(self.len) else {
            return false;
        };
        *place = extent;
        self.len = self.len.saturating_add(1);
        true
    }

    /// All of them.
    pub fn as_slice(&self) -> &[Extent] {
        self.list.get(..self.len).unwrap_or_default()
    }
}

/// The blocks that a guest is told of, in bytes; both powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocks {
    /// The smallest piece that can be read or written.
    pub logical: u32,
    /// The smallest piece that is written without reading what is around it.
    pub physical: u32,
}

/// A file, or a block device of the host, that is a disk.
#[derive(Debug)]
pub struct Disk {
    store: Store,
    sectors: u64,
    read_only: bool,
    blocks: Blocks,
    is_direct: bool,
    alignment: Alignment,
}

/// Where the bytes of a disk are.
#[derive(Debug)]
enum Store {
    /// All in one file, each where it is on the disk.
    Plain { file: Arc<File>, access: Access },
    /// In a base, or in an overlay over it.
    Layered(Box<Layers>),
}

/// Why a file cannot be used as a disk.
#[derive(Debug)]
pub enum DiskError {
    /// Its size cannot be determined.
    Size(io::Error),
    /// What kind of file it is cannot be determined.
    Kind(io::Error),
}

impl fmt::Display for DiskError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DiskError::Size(_) => "cannot determine the size of the disk",
            DiskError::Kind(_) => "cannot determine the file system of the disk",
        })
    }
}

impl std::error::Error for DiskError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            DiskError::Size(error) | DiskError::Kind(error) => Some(error),
        }
    }
}

impl Disk {
    /// A disk of all whole sectors of `file`, which the caller has opened for reading only if
    /// `read_only`.
    ///
    /// # Errors
    /// When its size or its file system cannot be determined.
    pub fn new(mut file: File, read_only: bool) -> Result<Self, DiskError> {
        // Also right for block devices, whose metadata says 0.
        let size = file.seek(SeekFrom::End(0)).map_err(DiskError::Size)?;
        sys::fd::set_blocking(&file).map_err(DiskError::Kind)?;
        let access = Access::of(&file).map_err(DiskError::Kind)?;
        let alignment = access.alignment(&file).map_err(DiskError::Kind)?;
        let blocks = blocks_of(&file, alignment).map_err(DiskError::Kind)?;
        let block = u64::from(blocks.logical);
        let rest = size.checked_rem(block).unwrap_or(0);
        if rest != 0 {
            crate::warn!(
                "the disk's size of {size} bytes is not a multiple of {block} bytes; the last {rest} bytes \
                 are not visible to the guest"
            );
        }
        let sectors = size.saturating_sub(rest).checked_div(SECTOR).unwrap_or(0);
        Ok(Disk {
            store: Store::Plain {
                file: Arc::new(file),
                access,
            },
            sectors,
            read_only,
            blocks,
            is_direct: false,
            alignment,
        })
    }

    /// A disk that has what is in `overlay`, and else what is in `base`.
    ///
    /// # Errors
    /// When the file system of either cannot be determined.
    pub fn with_overlay(base: File, overlay: Overlay<File>) -> Result<Self, DiskError> {
        let layers = Layers::new(base, overlay)?;
        Ok(Disk {
            sectors: layers.size().checked_div(SECTOR).unwrap_or(0),
            blocks: Blocks {
                logical: SECTOR as u32,
                physical: crate::overlay::UNIT as u32,
            },
            store: Store::Layered(Box::new(layers)),
            read_only: false,
            is_direct: false,
            alignment: Alignment::NONE,
        })
    }

    /// The id of its overlay, if it has one.
    pub fn overlay_id(&self) -> Option<[u8; 16]> {
        match &self.store {
            Store::Plain { .. } => None,
            Store::Layered(layers) => Some(layers.id()),
        }
    }

    /// Forgets what its overlay has. What has to be dropped then comes in `reset`.
    ///
    /// # Errors
    /// The host's, or when it has no overlay: then nothing has changed.
    pub fn reset(&mut self, reset: &mut Reset) -> io::Result<()> {
        match &mut self.store {
            Store::Plain { .. } => Err(io::ErrorKind::Unsupported.into()),
            Store::Layered(layers) => layers.reset(reset),
        }
    }

    /// Nothing is in flight, and another process may open the files next.
    ///
    /// # Errors
    /// The host's: it would not find all that was written.
    pub fn settle(&mut self) -> io::Result<()> {
        match &mut self.store {
            Store::Plain { .. } => Ok(()),
            Store::Layered(layers) => layers.settle(),
        }
    }

    /// Its size in sectors of 512 bytes.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Its blocks.
    pub fn blocks(&self) -> Blocks {
        self.blocks
    }

    /// Its file, and those that may take its place, go past the host's page cache.
    #[must_use]
    pub fn past_cache(mut self) -> Self {
        self.is_direct = true;
        self
    }

    /// It must be used as if its file system wanted this.
    #[cfg(test)]
    pub fn set_alignment(&mut self, alignment: Alignment) {
        self.alignment = alignment;
    }

    /// Whether its file goes past the host's page cache.
    pub fn is_direct(&self) -> bool {
        self.is_direct
    }

    /// What reads and writes have to be multiples of.
    pub fn alignment(&self) -> Alignment {
        self.alignment
    }

    /// All files, by their numbers; one that there is none of is another one once more.
    pub fn files(&self) -> Option<[&File; 2]> {
        let (data, _) = self.file(FileIndex::DATA)?;
        let (base, _) = self
            .file(FileIndex::BASE)
            .unwrap_or((data, Access::InMemory));
        Some([data, base])
    }

    /// Whether any of it may be in storage that has to be waited for.
    pub fn may_wait(&self) -> bool {
        let files = [FileIndex::DATA, FileIndex::BASE];
        let mut access = files.into_iter().filter_map(|file| self.file(file));
        access.any(|(_, access)| access != Access::InMemory)
    }

    /// Whether it refuses writes.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Where sector `first` is on the disk, in bytes, if it and all of `len` bytes from it on are on
    /// it.
    pub fn locate(&self, first: u64, len: u64) -> Option<u64> {
        if len & (SECTOR - 1) != 0 {
            return None;
        }
        let end = first.checked_add(len.checked_div(SECTOR)?)?;
        if end > self.sectors {
            return None;
        }
        first.checked_mul(SECTOR)
    }

    /// File number `file`.
    pub fn file(&self, file: FileIndex) -> Option<(&File, Access)> {
        match &self.store {
            Store::Plain { file: it, access } if file == FileIndex::DATA => Some((it, *access)),
            Store::Plain { .. } => None,
            Store::Layered(layers) => layers.file(file),
        }
    }

    /// File number `file`, for another thread too.
    pub fn shared(&self, file: FileIndex) -> Option<Arc<File>> {
        match &self.store {
            Store::Plain { file: it, .. } => (file == FileIndex::DATA).then(|| Arc::clone(it)),
            Store::Layered(layers) => layers.shared(file),
        }
    }

    /// Adds to `out`, which is empty, where the `len` bytes from `at` on are to be read: at least the
    /// first of them.
    pub fn read_extents(&self, at: u64, len: u32, out: &mut Extents) {
        match &self.store {
            Store::Plain { .. } => {
                out.push(Extent {
                    file: FileIndex::DATA,
                    at,
                    len,
                });
            }
            Store::Layered(layers) => layers.read_extents(at, len, out),
        }
    }

    /// Adds to `out`, which is empty, where the `len` bytes from `at` on are to be written: at least
    /// the first of them.
    pub fn write_extents(&self, at: u64, len: u32, out: &mut Extents) {
        match &self.store {
            Store::Plain { .. } => {
                out.push(Extent {
                    file: FileIndex::DATA,
                    at,
                    len,
                });
            }
            Store::Layered(layers) => {
                out.push(layers.write_extent(at, len));
            }
        }
    }

    /// The `len` bytes from `at` on will be written, or made 0, where [`Disk::write_extents`] says.
    ///
    /// # Errors
    /// The host's: they cannot be.
    pub fn before_write(&mut self, at: u64, len: u64) -> io::Result<()> {
        match &mut self.store {
            Store::Plain { .. } => Ok(()),
            Store::Layered(layers) => layers.before_write(at, len),
        }
    }

    /// The `len` bytes from `at` on have been written.
    ///
    /// # Errors
    /// The host's: the write has failed.
    pub fn wrote(&mut self, at: u64, len: u64) -> io::Result<()> {
        match &mut self.store {
            Store::Plain { .. } => Ok(()),
            Store::Layered(layers) => layers.wrote(at, len),
        }
    }

    /// Where space can be given back for the `len` bytes from `at` on, which the guest needs no more:
    /// a file, a place in it, and a length.
    pub fn discard_extent(&self, at: u64, len: u64) -> Option<(FileIndex, u64, u64)> {
        match &self.store {
            Store::Plain { .. } => Some((FileIndex::DATA, at, len)),
            Store::Layered(layers) => layers.discard_extent(at, len),
        }
    }

    /// Space for the `len` bytes from `at` on has been given back.
    ///
    /// # Errors
    /// The host's: the request has failed.
    pub fn discarded(&mut self, at: u64, len: u64) -> io::Result<()> {
        match &mut self.store {
            Store::Plain { .. } => Ok(()),
            Store::Layered(layers) => layers.set_zero(at, len),
        }
    }

    /// The `len` bytes from `at` on have been made 0 where [`Disk::write_extents`] says.
    ///
    /// # Errors
    /// The host's: the request has failed.
    pub fn zeroed(&mut self, at: u64, len: u64) -> io::Result<()> {
        match &mut self.store {
            Store::Plain { .. } => Ok(()),
            Store::Layered(layers) => layers.set_zero(at, len),
        }
    }

    /// What has to reach the host's storage together with the data does, as far as an fdatasync of
    /// [`FileIndex::DATA`] that follows does not see to it.
    ///
    /// # Errors
    /// The host's: what was written since the last time may be lost.
    pub fn flush_metadata(&mut self) -> io::Result<()> {
        match &mut self.store {
            Store::Plain { .. } => Ok(()),
            Store::Layered(layers) => layers.flush_metadata(),
        }
    }
}

/// The blocks of a disk that is `file`: a block device has its own; a file on a file system can be written
/// by the sector, or what `alignment` says, and best by that system's blocks.
fn blocks_of(file: &File, alignment: Alignment) -> io::Result<Blocks> {
    const LARGEST: u32 = 64 * 1024;
    let sector = (SECTOR as u32).max(alignment.file);
    let metadata = file.metadata()?;
    let preferred = u32::try_from(metadata.blksize()).unwrap_or(sector);
    let physical = match preferred.is_power_of_two() {
        true => preferred.clamp(sector, LARGEST),
        false => sector,
    };
    Ok(Blocks {
        logical: sector,
        physical,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::tempfile::TempFile;

    fn disk(size: u64) -> Disk {
        let file = TempFile::new().unwrap().into_file();
        file.set_len(size).unwrap();
        Disk::new(file, false).unwrap()
    }

    #[test]
    fn new_when_size_is_odd_rounds_down() {
        for (size, sectors) in [(0, 0), (511, 0), (512, 1), (1023, 1), (1 << 30, 1 << 21)] {
            assert_eq!(disk(size).sectors(), sectors, "{size}");
        }
    }

    #[test]
    fn locate_when_any_of_it_is_beyond_the_end_is_none() {
        let disk = disk(10 * 512);
        for (first, len, at) in [
            (0, 512, Some(0)),
            (9, 512, Some(9 * 512)),
            (0, 5120, Some(0)),
            (10, 0, Some(5120)),
            (11, 0, None),
            (9, 1024, None),
            (0, 511, None),
            (u64::MAX, 512, None),
            (u64::MAX / 512 + 1, 512, None),
            (1 << 55, 512, None),
        ] {
            assert_eq!(disk.locate(first, len), at, "{first} {len}");
        }
    }

    #[test]
    fn extents_when_they_go_on_from_each_other_are_one() {
        let extent = |file, at, len| Extent { file, at, len };
        let (data, zero) = (FileIndex::DATA, FileIndex::ZERO);
        let mut extents = Extents::new();
        for part in [
            extent(data, 0, 10),
            extent(data, 10, 5),
            extent(data, 20, 5),
            extent(zero, 0, 7),
            extent(zero, 0, 3),
            extent(data, 25, u32::MAX),
            extent(data, 25 + u64::from(u32::MAX), 1),
        ] {
            assert!(extents.push(part));
        }
        assert_eq!(
            extents.as_slice(),
            [
                extent(data, 0, 15),
                extent(data, 20, 5),
                extent(zero, 0, 10),
                extent(data, 25, u32::MAX),
                extent(data, 25 + u64::from(u32::MAX), 1),
            ]
        );
        while extents.push(extent(data, 0, 1)) {}
        assert_eq!(extents.as_slice().len(), Extents::MAX);
        extents.clear();
        assert!(extents.as_slice().is_empty());
    }
}
