//! An open overlay: where its disk's bytes are, and what has to be done around a write.

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use super::header::{BaseId, Header};
use super::layout::{Layout, MAP_AT, SECTOR, UNIT};
use super::map::{Map, State};
use super::open::{Content, Refusal};
use super::stale::{InUse, Stale};
use super::storage::Storage;

/// When the map reaches the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// At a flush, once the data is on the storage: what was flushed survives the host's end, and what was not
    /// flushed is there or not, unit by unit.
    Ordered,
    /// Before a write is complete: what is complete survives the end of this process, but not the host's.
    Immediate,
    /// Never: the file is memory, and goes with this process.
    Volatile,
}

/// Where bytes of the disk are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the base, where they are on the disk.
    Base,
    /// In the overlay's file, at this offset.
    File(u64),
    /// Nowhere: they are zeros.
    Zero,
}

/// Sectors of the map that are written at once.
const MAP_RUN: usize = 8;

/// An open overlay. Whoever reads and writes the disk asks it where, and tells it what was written.
pub struct Overlay<S: Storage> {
    file: Arc<S>,
    layout: Layout,
    header: Header,
    map: Map,
    durability: Durability,
    in_use: InUse,
    /// The storage may not have the header yet. The next generation but one uses the data region of this one, so it
    /// must not begin before.
    is_header_new: bool,
}

/// Whole units of a range, and the parts of units at its two ends.
struct Split {
    first: u64,
    end: u64,
    /// Units of which the range has only a part.
    edges: [Option<u64>; 2],
}

impl<S: Storage> Overlay<S> {
    /// Of `content`, that of `file`: reads the map.
    ///
    /// # Errors
    /// When the map is damaged, or cannot be read.
    pub fn load(file: Arc<S>, content: &Content, durability: Durability) -> Result<Self, Refusal> {
        let Content { layout, header, .. } = *content;
        let mut map = Map::new(&layout, header.generation, header.id);
        if durability != Durability::Volatile {
            super::open::read_map(&*file, &layout, &mut map)?;
        }
        let in_use = Arc::new(Mutex::new(layout.region_at(header.generation)));
        let mut overlay = Overlay {
            file,
            layout,
            header,
            map,
            durability,
            in_use,
            is_header_new: true,
        };
        if durability == Durability::Ordered && content.is_new {
            // Data without a header, after an end of the host, would be a file of another kind.
            let synced = overlay.sync();
            synced.map_err(|cause| Refusal::Io("syncing its header", cause))?;
        }
        Ok(overlay)
    }

    /// The file.
    pub fn file(&self) -> &S {
        &self.file
    }

    /// The file, to be kept open or closed by another thread.
    pub fn shared_file(&self) -> Arc<S> {
        Arc::clone(&self.file)
    }

    /// What its first sector says.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.layout.size
    }

    /// Where the byte `at` of the disk is, and how many bytes from it on lie together there, at most `len`.
    pub fn locate(&self, at: u64, len: u64) -> (Place, u64) {
        let first = at / UNIT;
        let end = at.saturating_add(len).div_ceil(UNIT);
        let (state, count) = self.map.run(first, end.saturating_sub(first));
        let bytes = first.saturating_add(count).saturating_mul(UNIT);
        let place = match state {
            State::Base => Place::Base,
            State::Data => Place::File(self.write_at(at)),
            State::Zero => Place::Zero,
        };
        (place, bytes.saturating_sub(at).min(len))
    }

    /// The state of the unit that begins at byte `at` of the disk or holds it, and of how many whole units from it on.
    pub fn state(&self, at: u64) -> (State, u64) {
        let unit = at / UNIT;
        self.map.run(unit, self.layout.units.saturating_sub(unit))
    }

    /// Where in the file byte `at` of the disk is written to.
    pub fn write_at(&self, at: u64) -> u64 {
        let region = self.layout.region_at(self.map.generation());
        region.saturating_add(at)
    }

    /// Makes the file ready for a write of `len` bytes at `at`, after which [`Overlay::wrote`] must be called: units
    /// of which it leaves a part as it is are brought into the file. No other write may be under way to them.
    ///
    /// # Errors
    /// The host's.
    pub fn before_write(&mut self, base: &impl Storage, at: u64, len: u64) -> io::Result<()> {
        let split = self.split(at, len);
        for unit in split.edges.into_iter().flatten() {
            self.bring_in(base, unit)?;
        }
        self.publish()
    }

    /// `len` bytes at `at` have been written where [`Overlay::write_at`] says.
    ///
    /// # Errors
    /// When the map cannot be written: then the write must count as failed.
    pub fn wrote(&mut self, at: u64, len: u64) -> io::Result<()> {
        let Split { first, end, .. } = self.split(at, len);
        if self.map.set(first, end, State::Data) {
            return self.publish();
        }
        Ok(())
    }

    /// What of `len` bytes at `at` is whole units: where it begins, and how long it is.
    pub fn whole_units(&self, at: u64, len: u64) -> (u64, u64) {
        let Split { first, end, .. } = self.split(at, len);
        let count = end.saturating_sub(first);
        (first.saturating_mul(UNIT), count.saturating_mul(UNIT))
    }

    /// The whole units of `len` bytes at `at` are zeros from now on, whatever the file has in their place.
    ///
    /// # Errors
    /// When the map cannot be written.
    pub fn set_zero(&mut self, at: u64, len: u64) -> io::Result<()> {
        let Split { first, end, .. } = self.split(at, len);
        if self.map.set(first, end, State::Zero) {
            return self.publish();
        }
        Ok(())
    }

    /// Writes what of the map the file does not have, in an order in which it may be synced after that; then all
    /// writes so far survive as [`Durability`] says, once the file is synced.
    ///
    /// # Errors
    /// The host's.
    pub fn flush_map(&mut self) -> io::Result<()> {
        if self.durability == Durability::Ordered && (self.map.is_dirty() || self.is_header_new) {
            self.sync()?;
        }
        match self.durability {
            Durability::Ordered | Durability::Immediate => self.write_map(),
            Durability::Volatile => Ok(()),
        }
    }

    /// Makes all writes so far survive as [`Durability`] says.
    ///
    /// # Errors
    /// The host's.
    pub fn flush(&mut self) -> io::Result<()> {
        self.flush_map()?;
        match self.durability {
            Durability::Ordered => self.sync(),
            Durability::Immediate | Durability::Volatile => Ok(()),
        }
    }

    /// Makes the disk what its base is, in a time that does not depend on what was written. The space is given
    /// back when what this returns is dropped.
    ///
    /// # Errors
    /// The host's; then nothing has changed.
    pub fn reset(&mut self) -> io::Result<Stale<S>> {
        if self.durability == Durability::Ordered && self.is_header_new {
            self.sync()?;
        }
        self.begin(self.header)
    }

    /// The same after all of it was written into the base, which is `base` now.
    ///
    /// # Errors
    /// The host's.
    pub fn committed(&mut self, base: BaseId) -> io::Result<Stale<S>> {
        let stale = self.begin(Header {
            base,
            committing: None,
            ..self.header
        })?;
        self.sync()?;
        Ok(stale)
    }

    /// Begins the generation after the present one, with what else `header` says.
    fn begin(&mut self, header: Header) -> io::Result<Stale<S>> {
        let before = self.header.generation;
        let header = Header {
            generation: before.saturating_add(1),
            ..header
        };
        self.write_header(header)?;
        self.map.reset(header.generation);
        let region = self.layout.region_at(header.generation);
        *self.in_use.lock().unwrap_or_else(PoisonError::into_inner) = region;
        Ok(self.stale(before))
    }

    /// What of the file is not in use, if there is anything in it.
    ///
    /// # Errors
    /// The host's.
    pub fn left_over(&self) -> io::Result<Option<Stale<S>>> {
        let other = self.header.generation.saturating_add(1);
        let data = self.file.next_data(self.region(other))?;
        Ok(data.map(|_| self.stale(other)))
    }

    /// Notes in the file that a commit into the base, the file with this inode, is under way.
    ///
    /// # Errors
    /// The host's.
    pub fn set_committing(&mut self, base: u64) -> io::Result<()> {
        self.write_header(Header {
            committing: Some(base),
            ..self.header
        })?;
        self.sync()
    }

    fn write_header(&mut self, header: Header) -> io::Result<()> {
        if self.durability != Durability::Volatile {
            self.file.write_all_at(&mut header.encode(), 0)?;
        }
        self.header = header;
        self.is_header_new = true;
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        self.file.sync_data()?;
        self.is_header_new = false;
        Ok(())
    }

    fn region(&self, generation: u64) -> Range<u64> {
        let start = self.layout.region_at(generation);
        start..start.saturating_add(self.layout.region)
    }

    fn stale(&self, generation: u64) -> Stale<S> {
        Stale {
            file: Arc::clone(&self.file),
            region: self.region(generation),
            in_use: Arc::clone(&self.in_use),
            is_ordered: self.durability == Durability::Ordered,
        }
    }

    fn split(&self, at: u64, len: u64) -> Split {
        let size = self.layout.size;
        let past = at.saturating_add(len).min(size);
        let first = at.div_ceil(UNIT);
        // The last unit is whole where the disk ends.
        let end = match past == size {
            true => self.layout.units,
            false => past / UNIT,
        };
        let in_first = at < past && !at.is_multiple_of(UNIT);
        let in_last = at < past && past != size && !past.is_multiple_of(UNIT);
        let head = in_first.then_some(at / UNIT);
        let tail = in_last
            .then_some(past / UNIT)
            .filter(|unit| head != Some(*unit));
        Split {
            first,
            end: end.max(first),
            edges: [head, tail],
        }
    }

    /// Copies `unit` into the file, whole, unless it is there. Its bytes are the same as before, so it may count as
    /// written at once.
    fn bring_in(&mut self, base: &impl Storage, unit: u64) -> io::Result<()> {
        let state = self.map.state(unit);
        if state == State::Data {
            return Ok(());
        }
        let mut bytes = [0; UNIT as usize];
        let len = self.layout.unit_len(unit) as usize;
        let bytes = bytes.get_mut(..len).unwrap_or_default();
        let at = unit.saturating_mul(UNIT);
        if state == State::Base {
            base.read_exact_at(bytes, at)?;
        }
        self.file.write_all_at(bytes, self.write_at(at))?;
        self.map.set(unit, unit.saturating_add(1), State::Data);
        Ok(())
    }

    /// The map has changed.
    fn publish(&mut self) -> io::Result<()> {
        match self.durability {
            Durability::Immediate if self.map.is_dirty() => self.write_map(),
            _ => Ok(()),
        }
    }

    fn write_map(&mut self) -> io::Result<()> {
        while let Some(first) = self.map.first_dirty() {
            let mut bytes = [0; SECTOR * MAP_RUN];
            let mut count = 0u64;
            for place in bytes.as_chunks_mut::<SECTOR>().0 {
                let index = first.saturating_add(count);
                if !self.map.is_sector_dirty(index) {
                    break;
                }
                *place = self.map.sector(index);
                count = count.saturating_add(1);
            }
            let len = (count as usize).saturating_mul(SECTOR);
            let bytes = bytes.get_mut(..len).unwrap_or_default();
            self.file.write_all_at(bytes, Layout::sector_at(first))?;
            for index in first..first.saturating_add(count) {
                self.map.note_written(index);
            }
        }
        Ok(())
    }
}

const _: () = assert!(MAP_AT.is_multiple_of(UNIT));

impl<S: Storage> fmt::Debug for Overlay<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Overlay")
            .field("header", &self.header)
            .field("durability", &self.durability)
            .finish_non_exhaustive()
    }
}
