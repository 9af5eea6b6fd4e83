//! Files into guest memory: mapped where that can be, copied where it cannot.

use std::io;
use std::sync::Arc;

use vm_memory::bitmap::Bitmap;
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::mapping::{Over, map_over};
use super::occupied::data_ranges;
use super::{Base, MappedPart, Memory, MemoryError, PAGE, Pages, Source, mapped};
use crate::steps::goes_on;

/// What is shorter is copied: a mapping costs about as much as 16 pages copied.
const MAP_MIN: u64 = 16 * PAGE;

/// How much is read at a time when a file is copied.
const COPY_CHUNK: u64 = 256 * 1024;

impl Memory {
    /// Makes `len` bytes of `source` from `offset` on appear at guest address `address`.
    ///
    /// Whole pages are mapped privately from the file where file and guest agree about where
    /// pages begin; what is left at both ends, and files that cannot be mapped, are copied.
    ///
    /// # Errors
    /// [`MemoryError`] when the range is not in one piece of RAM, or the file cannot be read.
    pub fn map_file(
        &mut self,
        source: &Source,
        offset: u64,
        address: u64,
        len: u64,
    ) -> Result<(), MemoryError> {
        let outside = MemoryError::Outside { address, len };
        let (Some(end), Some(_)) = (address.checked_add(len), offset.checked_add(len)) else {
            return Err(outside);
        };
        let in_one_piece = self
            .ram
            .find_region(GuestAddress(address))
            .is_some_and(|r| end.saturating_sub(1) <= r.last_addr().raw_value());
        if len == 0 || !in_one_piece {
            return Err(outside);
        }

        // Bytes before the first whole page, whole pages, and the rest.
        let head = address.wrapping_neg() & (PAGE - 1);
        let whole = len.saturating_sub(head) & !(PAGE - 1);
        let agree = (address ^ offset) & (PAGE - 1) == 0;
        // A part of a huge page cannot be exchanged; what is to be frozen must be in its file.
        let is_whole = self.pages == Pages::TwoMib || matches!(self.base, Base::Shared(_));
        if !agree || whole < MAP_MIN || is_whole {
            return self.copy(source, offset, address, len);
        }
        let (Some(from), Some(to)) = (offset.checked_add(head), address.checked_add(head)) else {
            return Err(outside);
        };
        let (Some(rest_from), Some(rest_to)) = (from.checked_add(whole), to.checked_add(whole))
        else {
            return Err(outside);
        };
        if !self.map_pages(source, from, to, whole)? {
            self.copy(source, from, to, whole)?;
        }
        self.copy(source, offset, address, head)?;
        self.copy(source, rest_from, rest_to, end.saturating_sub(rest_to))
    }

    /// Copies what the memory image `source` holds into memory that is all zeros.
    pub(super) fn fill(&self, source: &Source) -> Result<(), MemoryError> {
        let read = |cause| MemoryError::Read {
            name: source.name.clone(),
            cause,
        };
        let mut before: u64 = 0;
        for (address, len) in self.regions() {
            let end = before.saturating_add(len);
            for data in data_ranges(source.file(), before..end) {
                let data = data.map_err(read)?;
                let to = address.saturating_add(data.start.saturating_sub(before));
                self.copy(source, data.start, to, data.end.saturating_sub(data.start))?;
            }
            before = end;
        }
        Ok(())
    }

    /// Maps whole pages of `source` over the guest's; `false` when the host cannot map that file.
    fn map_pages(
        &mut self,
        source: &Source,
        offset: u64,
        address: u64,
        len: u64,
    ) -> Result<bool, MemoryError> {
        let outside = MemoryError::Outside { address, len };
        let (Ok(file_offset), Ok(bytes)) = (i64::try_from(offset), usize::try_from(len)) else {
            return Err(outside);
        };
        let Ok(host) = self.ram.get_slice(GuestAddress(address), bytes) else {
            return Err(outside);
        };
        let first = host.ptr_guard().as_ptr() as usize;
        let Some(end) = first.checked_add(bytes) else {
            return Err(outside);
        };
        if map_over(&host, Over::Private(source.file(), file_offset)).is_err() {
            // The attempt may have taken away what was there.
            return match map_over(&host, Over::Fresh) {
                Ok(()) => Ok(false),
                Err(cause) => Err(MemoryError::Read {
                    name: source.name.clone(),
                    cause,
                }),
            };
        }
        host.bitmap().mark_dirty(0, bytes);
        self.records
            .extend(mapped::record(first..end, &source.name));
        let copy = match self.parts.iter().find(|p| p.source.name == source.name) {
            Some(part) => Arc::clone(&part.source),
            None => Arc::new(source.try_clone().map_err(|cause| MemoryError::Read {
                name: source.name.clone(),
                cause,
            })?),
        };
        self.parts.push(MappedPart {
            offset: self.offset_of(address).ok_or(outside)?,
            len,
            source: copy,
            in_file: offset,
        });
        Ok(true)
    }

    fn copy(
        &self,
        source: &Source,
        offset: u64,
        address: u64,
        len: u64,
    ) -> Result<(), MemoryError> {
        let mut chunk = vec![0; usize::try_from(len.min(COPY_CHUNK)).unwrap_or(0)];
        let mut done: u64 = 0;
        while done < len {
            let count = len.saturating_sub(done).min(COPY_CHUNK);
            let outside = MemoryError::Outside { address, len };
            let (Some(from), Some(to)) = (offset.checked_add(done), address.checked_add(done))
            else {
                return Err(outside);
            };
            let Some(bytes) = usize::try_from(count).ok().and_then(|n| chunk.get_mut(..n)) else {
                return Err(outside);
            };
            let read = source.read_exact_at(bytes, from);
            let read = read.and_then(|()| match goes_on() {
                true => Ok(()),
                false => Err(io::ErrorKind::TimedOut.into()),
            });
            read.map_err(|cause| MemoryError::Read {
                name: source.name.clone(),
                cause,
            })?;
            self.write(to, bytes)?;
            done = done.saturating_add(count);
        }
        Ok(())
    }
}
