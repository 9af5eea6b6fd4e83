//! Writing guest memory into a file, while the guest is paused and its devices are quiescent.
//!
//! Runs on the files thread, with what [`Memory::contents`] gives out: it touches neither control's
//! nor the devices' state, and never changes guest memory. The image has exactly the length of guest
//! memory and is sparse: a page of zeros is a hole in a full image. In a diff a hole is a page that
//! has not changed, and a page that has become zero is written.
//!
//! Both bear the 16 bytes of their snapshot's id, at a place that guests do not use. The page that
//! they are in is always written.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;

use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::occupied::{Finder, data_ranges};
use super::page_set::PageSet;
use super::{Base, MappedPart, Memory, PAGE, Piece, Ram};
use crate::steps::goes_on;
use crate::wire::check;

/// Bytes in an id of a snapshot.
pub const ID_LEN: usize = 16;

/// How much of an image is looked at at a time: the sets of pages stay small however large the
/// guest is.
const WINDOW: u64 = 64 << 20;

/// How many pages are copied out of guest memory at a time: few enough to stay in the host CPU's
/// cache until they are written.
const CHUNK: usize = 64;

/// What there is to know of guest memory to write it into a file, on any thread.
#[derive(Clone, Debug)]
pub struct Contents {
    pub(super) ram: Ram,
    pub(super) base: Base,
    pub(super) parts: Vec<MappedPart>,
    /// This process's /proc/self/pagemap, where it cannot be opened by name.
    pub(super) pagemap: Option<Arc<File>>,
}

/// The id that an image is to bear.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// Where in the image; see [`Memory::offset_of`].
    pub offset: u64,
    /// The snapshot's id.
    pub id: [u8; ID_LEN],
}

/// An image that was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// Its check value, see [`check`].
    pub check: u64,
    /// How many of its pages are data.
    pub pages: u64,
}

impl Memory {
    /// What a writer of images needs. `pagemap` is this process's /proc/self/pagemap, for places
    /// where it cannot be opened by name.
    pub fn contents(&self, pagemap: Option<Arc<File>>) -> Contents {
        Contents {
            ram: self.ram.clone(),
            base: self.base.clone(),
            parts: self.parts.clone(),
            pagemap,
        }
    }
}

impl Contents {
    /// Whether some of guest memory is a mapping of `file`.
    pub fn is_mapped_from(&self, file: &File) -> bool {
        let below = match &self.base {
            Base::Image(source) => Some(source),
            Base::Anonymous | Base::Shared(_) | Base::Lazy => None,
        };
        let mut sources = self.parts.iter().map(|part| &part.source).chain(below);
        let identity = |file: &File| file.metadata().map(|is| (is.dev(), is.ino())).ok();
        let this = identity(file);
        this.is_some() && sources.any(|source| identity(source.file()) == this)
    }

    /// Whether reading it may wait for the handler of page faults.
    pub fn may_wait(&self) -> bool {
        matches!(self.base, Base::Lazy)
    }

    /// Bytes in an image.
    pub fn len(&self) -> u64 {
        self.ram
            .iter()
            .fold(0, |sum: u64, region| sum.saturating_add(region.len()))
    }

    /// Writes all of guest memory into `file`, whatever was in that.
    ///
    /// # Errors
    /// The host's; the file is then of no use.
    pub fn write_full(&self, file: &File, stamp: &Stamp) -> io::Result<Written> {
        let mut finder = Finder::new(self.pagemap.as_ref());
        self.write(file, stamp, false, |place, window, pages| {
            finder.find(self, place, window, pages);
        })
    }

    /// Writes the pages `changed` of guest memory into `file`, whatever was in that.
    ///
    /// # Errors
    /// The host's; the file is then of no use.
    pub fn write_diff(&self, file: &File, stamp: &Stamp, changed: &PageSet) -> io::Result<Written> {
        self.write(file, stamp, true, |_, window, pages| {
            let first = window.start / PAGE;
            pages.insert_from(changed, first);
        })
    }

    /// Writes the pages that this process has of its own over what is in `writer`'s file.
    pub(super) fn write_own(&self, writer: &mut Writer<'_>, stamp: &Stamp) -> io::Result<()> {
        let mut finder = Finder::new(self.pagemap.as_ref());
        self.write_over(writer, stamp, |place, window, pages| {
            finder.find_own(self, place, window, pages);
        })
    }

    /// Where nothing is tracked: writes every page that this process has had of its own
    /// since the guest was booted, restored or last forked, which are all that can have changed and
    /// more. A page that was only read of memory without an image below it, and pages of the page
    /// cache where the host does not tell them apart, may be among them.
    ///
    /// # Errors
    /// The host's; the file is then of no use.
    pub fn write_private(&self, file: &File, stamp: &Stamp) -> io::Result<Written> {
        let mut finder = Finder::new(self.pagemap.as_ref());
        self.write(file, stamp, true, |place, window, pages| {
            finder.find_own(self, place, window, pages);
        })
    }

    /// Writes what `find` puts into the set of pages, window after window.
    fn write(
        &self,
        file: &File,
        stamp: &Stamp,
        with_zeros: bool,
        find: impl FnMut((Piece, u64), Range<u64>, &mut PageSet),
    ) -> io::Result<Written> {
        // Of what was there, nothing is left; all is a hole.
        file.set_len(0)?;
        file.set_len(self.len())?;
        let mut writer = Writer::new(file, with_zeros);
        self.write_over(&mut writer, stamp, find)?;
        Ok(writer.written)
    }

    fn write_over(
        &self,
        writer: &mut Writer<'_>,
        stamp: &Stamp,
        mut find: impl FnMut((Piece, u64), Range<u64>, &mut PageSet),
    ) -> io::Result<()> {
        for (piece, host) in self.pieces() {
            let end = piece.offset.saturating_add(piece.len as u64);
            let mut start = piece.offset;
            while start < end {
                let window = start..start.saturating_add(WINDOW).min(end);
                let len = window.end.saturating_sub(window.start);
                let mut pages = PageSet::new(len / PAGE);
                find((piece, host), window.clone(), &mut pages);
                if window.contains(&stamp.offset) {
                    let page = stamp.offset.saturating_sub(window.start) / PAGE;
                    pages.insert(page..page.saturating_add(1));
                }
                for run in pages.runs() {
                    let first = window.start.saturating_add(run.start.saturating_mul(PAGE));
                    let count = run.end.saturating_sub(run.start);
                    writer.run(&self.ram, &piece, stamp, first, count)?;
                }
                start = window.end;
            }
        }
        Ok(())
    }

    /// The pieces of RAM, and where each is in this process.
    pub(super) fn pieces(&self) -> impl Iterator<Item = (Piece, u64)> {
        let mut offset: u64 = 0;
        self.ram.iter().map(move |region| {
            let piece = Piece {
                address: region.start_addr(),
                offset,
                len: region.size(),
            };
            offset = offset.saturating_add(region.len());
            (piece, region.as_ptr() as u64)
        })
    }
}

/// The id that the image `file` bears at `offset`.
///
/// # Errors
/// The host's; UnexpectedEof when the file ends before.
#[cfg(test)]
pub fn read_id(file: &File, offset: u64) -> io::Result<[u8; ID_LEN]> {
    let mut id = [0; ID_LEN];
    file.read_exact_at(&mut id, offset)?;
    Ok(id)
}

/// Copies runs of pages into a file, but for those of zeros.
pub(super) struct Writer<'a> {
    file: &'a File,
    with_zeros: bool,
    buffer: Box<[[u8; check::PAGE]]>,
    written: Written,
}

impl<'a> Writer<'a> {
    pub(super) fn new(file: &'a File, with_zeros: bool) -> Self {
        Writer {
            file,
            with_zeros,
            buffer: vec![[0; check::PAGE]; CHUNK].into(),
            written: Written { check: 0, pages: 0 },
        }
    }

    /// What was written so far.
    pub(super) fn written(&self) -> Written {
        self.written
    }

    /// Writes `count` pages from offset `first` on, which lie in `piece`.
    fn run(
        &mut self,
        ram: &Ram,
        piece: &Piece,
        stamp: &Stamp,
        first: u64,
        count: u64,
    ) -> io::Result<()> {
        let mut offset = first;
        let mut left = count;
        while left > 0 {
            let now = left.min(CHUNK as u64);
            let Some(pages) = self.buffer.get_mut(..now as usize) else {
                return Err(io::ErrorKind::InvalidInput.into());
            };
            let inside = offset.saturating_sub(piece.offset);
            let address = GuestAddress(piece.address.raw_value().saturating_add(inside));
            ram.read_slice(pages.as_flattened_mut(), address)
                .map_err(io::Error::other)?;
            let last = offset.saturating_add(now.saturating_mul(PAGE));
            if (offset..last).contains(&stamp.offset) {
                let at = stamp.offset.saturating_sub(offset) as usize;
                let bytes = pages.as_flattened_mut().get_mut(at..);
                if let Some((place, _)) = bytes.and_then(|b| b.split_first_chunk_mut()) {
                    *place = stamp.id;
                }
            }
            self.chunk(now as usize, offset)?;
            offset = last;
            left = left.saturating_sub(now);
        }
        Ok(())
    }

    /// Copies what is data in the image `from`, which has `len` bytes.
    pub(super) fn copy(&mut self, from: &File, len: u64) -> io::Result<()> {
        for data in data_ranges(from, 0..len) {
            let data = data?;
            // Whole pages, whatever the file system's blocks are.
            let mut at = data.start & !(PAGE - 1);
            while at < data.end {
                let left = data.end.saturating_sub(at).div_ceil(PAGE);
                let count = left.min(CHUNK as u64);
                let pages = self.buffer.get_mut(..count as usize).unwrap_or_default();
                from.read_exact_at(pages.as_flattened_mut(), at)?;
                self.chunk(count as usize, at)?;
                at = at.saturating_add(count.saturating_mul(PAGE));
            }
        }
        Ok(())
    }

    /// Writes the first `count` pages of the buffer to `offset`, in as few pieces as can be.
    fn chunk(&mut self, count: usize, offset: u64) -> io::Result<()> {
        if !goes_on() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let mut page = offset / PAGE;
        for pages in self
            .buffer
            .get(..count)
            .unwrap_or_default()
            .chunk_by(|a, b| check::is_zero(a) == check::is_zero(b))
        {
            let is_zero = pages.first().is_some_and(check::is_zero);
            if !is_zero || self.with_zeros {
                let at = page.saturating_mul(PAGE);
                self.file.write_all_at(pages.as_flattened(), at)?;
                for (number, bytes) in (page..).zip(pages) {
                    let value = check::of_page(number, bytes);
                    self.written.check = self.written.check.wrapping_add(value);
                }
                let count = pages.len() as u64;
                self.written.pages = self.written.pages.saturating_add(count);
            }
            page = page.saturating_add(pages.len() as u64);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
