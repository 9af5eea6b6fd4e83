//! Opening the file of an overlay: what it must be, and why it is refused.

use std::fmt;
use std::fs::File;
use std::io;
use std::time::Duration;

use super::header::{BadHeader, BaseId, Header};
use super::layout::{Layout, MAP_AT, SECTOR};
use super::map::{BadSector, Map};
use super::storage::Storage;
use crate::sys::folder::{self, FlockOperation};

const SECTOR_BYTES: u64 = SECTOR as u64;

/// A file that was found to be an overlay.
#[derive(Clone, Debug)]
pub struct Content {
    pub(super) layout: Layout,
    pub(super) header: Header,
    /// The base has another modification time than when the overlay was made, though its size and the pieces that were
    /// looked at are the same: it is a copy, or was written to.
    pub is_base_modified: bool,
    /// It was made just now.
    pub is_new: bool,
}

/// Why a file is not taken as an overlay.
#[derive(Debug)]
pub enum Refusal {
    /// It is another file.
    Foreign,
    /// It was made by another version of the program.
    Version(u32),
    /// What is in it contradicts itself.
    Damaged(&'static str),
    /// It has this length and not that.
    Length(u64, u64),
    /// It belongs to a disk of this size and not of that.
    Size(u64, u64),
    /// It belongs to another base, or the base was changed.
    OtherBase,
    /// A commit into the base has not ended.
    Committing,
    /// The disk has this many bytes, which is too much.
    TooLarge(u64),
    /// It must be there already.
    Empty,
    /// Another process has it open.
    InUse,
    /// The host's.
    Io(&'static str, io::Error),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refusal::Foreign => f.write_str(
                "is not an overlay: it holds something else. Name a file that does not exist yet, or an empty one",
            ),
            Refusal::Version(version) => write!(
                f,
                "is an overlay of version {version}, and this program knows version 1 only"
            ),
            Refusal::Damaged(what) => write!(f, "is damaged: {what}"),
            Refusal::Length(is, should) => write!(
                f,
                "is {is} bytes long instead of {should}: it was cut off or added to"
            ),
            Refusal::Size(of, base) => write!(
                f,
                "belongs to a disk of {of} bytes, and the base has {base}: name the base that it was made over"
            ),
            Refusal::OtherBase => f.write_str(
                "belongs to another base, or the base was written to since: name the base that it was made over",
            ),
            Refusal::Committing => f.write_str(
                "was being committed into its base when that was interrupted: run tools/guest overlay commit again",
            ),
            Refusal::TooLarge(size) => write!(
                f,
                "cannot be made: the disk has {size} bytes, and one with an overlay at most {}",
                super::SIZE_MAX
            ),
            Refusal::Empty => f.write_str(
                "is empty, and the guest was saved with one that need not have been: name a copy of that",
            ),
            Refusal::InUse => f.write_str("is in use by another process, and would be damaged by two"),
            Refusal::Io(what, _) => write!(f, "cannot be used: {what} failed"),
        }
    }
}

impl std::error::Error for Refusal {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Refusal::Io(_, cause) => Some(cause),
            _ => None,
        }
    }
}

fn io(what: &'static str) -> impl Fn(io::Error) -> Refusal {
    move |cause| Refusal::Io(what, cause)
}

impl Content {
    /// What is in `file`, which is to be the overlay of `base`. An empty file becomes one, with the id `id`.
    ///
    /// # Errors
    /// Why it cannot be.
    pub fn open(file: &impl Storage, base: &BaseId, id: [u8; 16]) -> Result<Self, Refusal> {
        let layout = Layout::new(base.size).ok_or(Refusal::TooLarge(base.size))?;
        let len = file.size().map_err(io("reading its length"))?;
        if is_blank(file, len, &layout)? {
            return Content::make(file, base, id, layout);
        }
        let header = read_header(file, len)?;
        if header.base.size != base.size {
            return Err(Refusal::Size(header.base.size, base.size));
        }
        if header.committing.is_some() {
            return Err(Refusal::Committing);
        }
        if header.base.samples != base.samples {
            return Err(Refusal::OtherBase);
        }
        Content::of(header, len, header.base.modified != base.modified)
    }

    /// What is in `file`, whatever its base is.
    ///
    /// # Errors
    /// When it is not an overlay.
    pub fn read(file: &impl Storage) -> Result<Self, Refusal> {
        let len = file.size().map_err(io("reading its length"))?;
        Content::of(read_header(file, len)?, len, false)
    }

    /// Of one in a file that is memory.
    ///
    /// # Errors
    /// When the disk is too large, or the host has no memory for it.
    pub fn in_memory(file: &impl Storage, size: u64) -> Result<Self, Refusal> {
        let layout = Layout::new(size).ok_or(Refusal::TooLarge(size))?;
        file.set_size(layout.total).map_err(io("making it"))?;
        let base = BaseId {
            size,
            ..BaseId::default()
        };
        Ok(Content {
            layout,
            header: first_header(&base, [0; 16]),
            is_base_modified: false,
            is_new: true,
        })
    }

    /// What its first sector says.
    pub fn header(&self) -> &Header {
        &self.header
    }

    fn of(header: Header, len: u64, is_base_modified: bool) -> Result<Self, Refusal> {
        let size = header.base.size;
        let layout = Layout::new(size).ok_or(Refusal::Damaged("the size of its disk"))?;
        if len != layout.total {
            return Err(Refusal::Length(len, layout.total));
        }
        Ok(Content {
            layout,
            header,
            is_base_modified,
            is_new: false,
        })
    }

    fn make(
        file: &impl Storage,
        base: &BaseId,
        id: [u8; 16],
        layout: Layout,
    ) -> Result<Self, Refusal> {
        let header = first_header(base, id);
        // In this order: a file that was not finished is still blank.
        file.set_size(layout.total).map_err(io("making it"))?;
        let written = file.write_all_at(&mut header.encode(), 0);
        written.map_err(io("writing its header"))?;
        Ok(Content {
            layout,
            header,
            is_base_modified: false,
            is_new: true,
        })
    }
}

fn first_header(base: &BaseId, id: [u8; 16]) -> Header {
    Header {
        base: *base,
        generation: 1,
        id,
        committing: None,
    }
}

/// Whether nothing was written to the file yet.
fn is_blank(file: &impl Storage, len: u64, layout: &Layout) -> Result<bool, Refusal> {
    if len != layout.total {
        return Ok(len == 0);
    }
    let data = file.next_data(0..len).map_err(io("looking for its data"))?;
    Ok(data.is_none())
}

fn read_header(file: &impl Storage, len: u64) -> Result<Header, Refusal> {
    let mut bytes = [0; SECTOR];
    if len < SECTOR as u64 {
        return Err(Refusal::Foreign);
    }
    let read = file.read_exact_at(&mut bytes, 0);
    read.map_err(io("reading its header"))?;
    Header::decode(&bytes).map_err(|bad| match bad {
        BadHeader::Magic => Refusal::Foreign,
        BadHeader::Version(version) => Refusal::Version(version),
        BadHeader::Damaged => Refusal::Damaged("its header was altered"),
    })
}

/// Takes the map out of `file`. Of its holes nothing is read.
pub(super) fn read_map(file: &impl Storage, layout: &Layout, map: &mut Map) -> Result<(), Refusal> {
    let end = Layout::sector_at(layout.sectors);
    let mut rest = MAP_AT..end;
    while let Some(data) = file
        .next_data(rest.clone())
        .map_err(io("looking for its map"))?
    {
        let before = data.start.saturating_sub(MAP_AT) / SECTOR_BYTES;
        let past = data.end.saturating_sub(MAP_AT).div_ceil(SECTOR_BYTES);
        let mut index = before;
        let mut bytes = [0; SECTOR * 64];
        while index < past.min(layout.sectors) {
            let count = past.min(layout.sectors).saturating_sub(index).min(64) as usize;
            let len = count.saturating_mul(SECTOR);
            let bytes = bytes.get_mut(..len).unwrap_or_default();
            let read = file.read_exact_at(bytes, Layout::sector_at(index));
            read.map_err(io("reading its map"))?;
            for sector in bytes.as_chunks::<SECTOR>().0 {
                map.load(index, sector).map_err(|bad| match bad {
                    BadSector::Damaged => Refusal::Damaged("its map was altered"),
                    BadSector::Newer => Refusal::Damaged("its map is newer than its header"),
                })?;
                index = index.saturating_add(1);
            }
        }
        rest.start = Layout::sector_at(past).max(data.end);
        if rest.start >= end {
            break;
        }
    }
    Ok(())
}

/// How long a lock is tried.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);

/// Keeps other processes from opening `file` as an overlay or, `for_all` to share it, from changing it as a base, as
/// long as this open file is open anywhere. May wait for one that goes.
///
/// # Errors
/// [`Refusal::InUse`], or the host's.
pub fn lock(file: &File, for_all: bool) -> Result<(), Refusal> {
    let how = match for_all {
        true => FlockOperation::NonBlockingLockShared,
        false => FlockOperation::NonBlockingLockExclusive,
    };
    match folder::lock(file, how, LOCK_PATIENCE) {
        Ok(true) => Ok(()),
        Ok(false) => Err(Refusal::InUse),
        Err(error) => Err(Refusal::Io("locking it", error.into())),
    }
}
