//! The map: for each unit of a disk, where its bytes are. Two bits a unit, in sectors that are in memory as they
//! are in the file.
//!
//! ```text
//!   word 0       word 1           words 2 to 63
//!   generation | check value    | the states of 1984 units, two bits each, the first in the lowest bits
//! ```
//!
//! A sector of an earlier generation says nothing: all its units are those of the base.

use super::layout::{HEAD_WORDS, Layout, SECTOR, SECTOR_UNITS, SECTOR_WORDS, WORD_UNITS};

/// Where the bytes of a unit are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// In the base.
    Base = 0,
    /// In the overlay's file.
    Data = 1,
    /// Nowhere: they are zeros.
    Zero = 2,
}

impl State {
    fn of(bits: u64) -> Self {
        match bits & 3 {
            1 => State::Data,
            2 => State::Zero,
            _ => State::Base,
        }
    }

    /// A word of nothing but this state.
    fn word(self) -> u64 {
        (self as u64).wrapping_mul(0x5555_5555_5555_5555)
    }
}

/// Why a sector of a file is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BadSector {
    /// Its check value is wrong, or it says what no overlay does.
    Damaged,
    /// It is of a generation that the header does not know yet.
    Newer,
}

/// The map of a disk.
pub(super) struct Map {
    words: Vec<u64>,
    units: u64,
    generation: u64,
    /// Of the overlay: sectors of another do not pass for its own.
    id: [u8; 16],
    /// One bit for each sector that differs from the file.
    dirty: Vec<u64>,
    /// How many these are.
    dirty_count: u64,
    /// Words of `dirty` from the first to the last that may have a bit.
    dirty_words: (usize, usize),
}

/// Where the states of a unit are.
#[derive(Clone, Copy)]
struct Position {
    sector: usize,
    /// The first word of the sector.
    head: usize,
    word: usize,
    /// Bits of the word below those of the unit.
    shift: u32,
}

fn position(unit: u64) -> Position {
    // The sizes of disks are bounded, so nothing here is cut or wraps.
    let sector = unit.wrapping_div(SECTOR_UNITS) as usize;
    let within = unit.wrapping_rem(SECTOR_UNITS);
    let head = sector.wrapping_mul(SECTOR_WORDS);
    let word = head
        .wrapping_add(HEAD_WORDS)
        .wrapping_add(within.wrapping_div(WORD_UNITS) as usize);
    Position {
        sector,
        head,
        word,
        shift: (within.wrapping_rem(WORD_UNITS) as u32).wrapping_mul(2),
    }
}

impl Map {
    /// One in which every unit is that of the base.
    pub fn new(layout: &Layout, generation: u64, id: [u8; 16]) -> Self {
        let sectors = layout.sectors as usize;
        Map {
            words: vec![0; sectors.saturating_mul(SECTOR_WORDS)],
            units: layout.units,
            generation,
            id,
            dirty: vec![0; sectors.div_ceil(64)],
            dirty_count: 0,
            dirty_words: (usize::MAX, 0),
        }
    }

    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Makes all units those of the base.
    pub fn reset(&mut self, generation: u64) {
        self.generation = generation;
        if self.dirty_count > 0 {
            self.dirty.fill(0);
        }
        self.dirty_count = 0;
        self.dirty_words = (usize::MAX, 0);
    }

    fn word(&self, at: usize) -> u64 {
        self.words.get(at).copied().unwrap_or(0)
    }

    /// The state of `unit`.
    pub fn state(&self, unit: u64) -> State {
        let at = position(unit);
        if self.word(at.head) != self.generation {
            return State::Base;
        }
        State::of(self.word(at.word) >> at.shift)
    }

    /// The state of `unit`, and how many units from it on have it, at most `limit`.
    pub fn run(&self, unit: u64, limit: u64) -> (State, u64) {
        let state = self.state(unit);
        let end = unit.saturating_add(limit.max(1));
        let mut next = unit;
        while next < end {
            let at = position(next);
            let in_word = if self.word(at.head) == self.generation {
                let differing = (self.word(at.word) ^ state.word()) >> at.shift;
                if differing != 0 {
                    let same = u64::from(differing.trailing_zeros() >> 1);
                    return (
                        state,
                        next.saturating_add(same).min(end).saturating_sub(unit),
                    );
                }
                WORD_UNITS.saturating_sub(u64::from(at.shift >> 1))
            } else if state == State::Base {
                // To the end of the sector.
                SECTOR_UNITS.saturating_sub(next.wrapping_rem(SECTOR_UNITS))
            } else {
                break;
            };
            next = next.saturating_add(in_word);
        }
        (state, next.min(end).saturating_sub(unit))
    }

    /// Gives the units from `first` to before `end` the state `state`; whether that changed anything.
    pub fn set(&mut self, first: u64, end: u64, state: State) -> bool {
        let end = end.min(self.units);
        let mut next = first;
        let mut changed = false;
        while next < end {
            let at = position(next);
            if self.word(at.head) != self.generation {
                self.begin_sector(at.head);
            }
            let in_word = WORD_UNITS
                .saturating_sub(u64::from(at.shift >> 1))
                .min(end.saturating_sub(next));
            // All ones where it is a whole word.
            let ones = u64::MAX.wrapping_shr(64u32.wrapping_sub((in_word as u32).wrapping_mul(2)));
            let mask = ones << at.shift;
            if let Some(word) = self.words.get_mut(at.word) {
                let new = (*word & !mask) | (state.word() & mask);
                if new != *word {
                    *word = new;
                    changed = true;
                    self.note_dirty(at.sector);
                }
            }
            next = next.saturating_add(in_word);
        }
        changed
    }

    /// Empties a sector of an earlier generation.
    fn begin_sector(&mut self, head: usize) {
        let end = head.saturating_add(SECTOR_WORDS);
        if let Some(words) = self.words.get_mut(head..end) {
            words.fill(0);
            if let Some(first) = words.first_mut() {
                *first = self.generation;
            }
        }
    }

    fn note_dirty(&mut self, sector: usize) {
        let (at, bit) = (sector / 64, 1u64 << (sector % 64));
        if let Some(word) = self.dirty.get_mut(at)
            && *word & bit == 0
        {
            *word |= bit;
            self.dirty_count = self.dirty_count.saturating_add(1);
            let (first, last) = self.dirty_words;
            self.dirty_words = (first.min(at), last.max(at));
        }
    }

    /// Whether the file does not have all of it.
    pub fn is_dirty(&self) -> bool {
        self.dirty_count > 0
    }

    /// The number of the first sector that the file does not have.
    pub fn first_dirty(&mut self) -> Option<u64> {
        if self.dirty_count == 0 {
            return None;
        }
        let (first, last) = self.dirty_words;
        let range = self.dirty.get(first..=last).unwrap_or_default();
        let (skipped, bits) = range.iter().enumerate().find(|(_, bits)| **bits != 0)?;
        let at = first.saturating_add(skipped);
        let sector = at
            .saturating_mul(64)
            .saturating_add(bits.trailing_zeros() as usize);
        self.dirty_words.0 = at;
        Some(sector as u64)
    }

    /// Whether the file does not have sector `index`.
    pub fn is_sector_dirty(&self, index: u64) -> bool {
        let bits = self.dirty.get((index / 64) as usize).copied();
        bits.unwrap_or(0) & (1 << (index % 64)) != 0
    }

    /// The file has sector `index` now.
    pub fn note_written(&mut self, index: u64) {
        let (at, bit) = ((index / 64) as usize, 1u64 << (index % 64));
        if let Some(word) = self.dirty.get_mut(at)
            && *word & bit != 0
        {
            *word &= !bit;
            self.dirty_count = self.dirty_count.saturating_sub(1);
            if self.dirty_count == 0 {
                self.dirty_words = (usize::MAX, 0);
            }
        }
    }

    /// Sector `index` as it is in the file.
    pub fn sector(&self, index: u64) -> [u8; SECTOR] {
        let head = (index as usize).saturating_mul(SECTOR_WORDS);
        let words = self.words.get(head..).unwrap_or_default();
        let mut bytes = [0; SECTOR];
        for (to, word) in bytes.chunks_exact_mut(8).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        Map::sign(&self.id, index, &mut bytes);
        bytes
    }

    /// Gives sector `index` of the overlay `id` its check value.
    pub fn sign(id: &[u8; 16], index: u64, bytes: &mut [u8; SECTOR]) {
        let check = check(id, index, bytes);
        if let Some(place) = bytes.get_mut(8..16) {
            place.copy_from_slice(&u64::from(check).to_le_bytes());
        }
    }

    /// Takes sector `index` out of a file.
    ///
    /// # Errors
    /// When it cannot be one of this overlay.
    pub fn load(&mut self, index: u64, bytes: &[u8; SECTOR]) -> Result<(), BadSector> {
        if bytes.iter().all(|byte| *byte == 0) {
            return Ok(());
        }
        let mut words = [0; SECTOR_WORDS];
        for (word, from) in words.iter_mut().zip(bytes.as_chunks::<8>().0) {
            *word = u64::from_le_bytes(*from);
        }
        let [generation, found, states @ ..] = &words;
        if *found != u64::from(check(&self.id, index, bytes)) || *generation == 0 {
            return Err(BadSector::Damaged);
        }
        if *generation > self.generation {
            return Err(BadSector::Newer);
        }
        // There is no fourth state, and nothing behind the end of the disk.
        let first = index.saturating_mul(SECTOR_UNITS);
        let room = self.units.saturating_sub(first);
        for (number, word) in (0u64..).zip(states) {
            let known = room.saturating_sub(number.saturating_mul(WORD_UNITS));
            let is_known = match known {
                0 => *word == 0,
                32.. => true,
                // Below 32.
                some => word.wrapping_shr((some as u32).wrapping_mul(2)) == 0,
            };
            if !is_known || *word & (*word >> 1) & 0x5555_5555_5555_5555 != 0 {
                return Err(BadSector::Damaged);
            }
        }
        if *generation == self.generation {
            let head = (index as usize).saturating_mul(SECTOR_WORDS);
            let end = head.saturating_add(SECTOR_WORDS);
            let place = self.words.get_mut(head..end).ok_or(BadSector::Damaged)?;
            place.copy_from_slice(&words);
        }
        Ok(())
    }
}

/// The check value of sector `index`, whose own place in `bytes` does not count.
fn check(id: &[u8; 16], index: u64, bytes: &[u8; SECTOR]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(id);
    crc.update(&index.to_le_bytes());
    crc.update(bytes.get(..8).unwrap_or_default());
    crc.update(bytes.get(16..).unwrap_or_default());
    crc.finalize()
}

impl std::fmt::Debug for Map {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Map")
            .field("units", &self.units)
            .field("generation", &self.generation)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::Random;
    use super::*;

    const ID: [u8; 16] = [7; 16];

    fn map(units: u64, generation: u64) -> Map {
        Map::new(&Layout::new(units * 4096).unwrap(), generation, ID)
    }

    /// Writes what is dirty; the numbers of the sectors and their bytes.
    fn written(map: &mut Map) -> Vec<(u64, [u8; SECTOR])> {
        let mut all = Vec::new();
        while let Some(index) = map.first_dirty() {
            assert!(map.is_sector_dirty(index));
            all.push((index, map.sector(index)));
            map.note_written(index);
        }
        assert!(!map.is_dirty());
        all
    }

    #[test]
    fn states_when_set_at_random_are_those_of_a_model() {
        let seed = Random::seed();
        let mut random = Random::new(seed);
        for units in [1, 31, 32, 33, 1983, 1984, 1985, 6000] {
            let mut map = map(units, 1);
            let mut model = vec![State::Base; units as usize];
            let mut generation = 1;
            let mut file = std::collections::BTreeMap::new();
            for _ in 0..400 {
                let first = random.below(units);
                let most = 1 << random.below(12);
                let end = first + 1 + random.below((units - first).min(most));
                let state = [State::Base, State::Data, State::Zero][random.below(3) as usize];
                let differs = model[first as usize..end as usize]
                    .iter()
                    .any(|s| *s != state);
                assert_eq!(map.set(first, end, state), differs, "seed {seed}");
                model[first as usize..end as usize].fill(state);
                if random.below(50) == 0 {
                    generation += 1;
                    map.reset(generation);
                    model.fill(State::Base);
                }
                if random.below(4) == 0 {
                    file.extend(written(&mut map));
                    let mut again = self::map(units, generation);
                    for (index, bytes) in &file {
                        again.load(*index, bytes).unwrap();
                    }
                    map = again;
                }
                let from = random.below(units);
                let limit = 1 + random.below(units - from);
                let (state, count) = map.run(from, limit);
                let rest = &model[from as usize..(from + limit) as usize];
                let same = rest.iter().take_while(|other| **other == rest[0]).count() as u64;
                assert_eq!(
                    (state, count),
                    (rest[0], same),
                    "seed {seed}: {units} {from} {limit}"
                );
            }
            for (unit, state) in model.iter().enumerate() {
                assert_eq!(map.state(unit as u64), *state, "seed {seed}");
            }
        }
    }

    #[test]
    fn dirty_sectors_when_written_are_just_those_that_changed() {
        let mut map = map(1984 * 200, 1);
        assert!(map.first_dirty().is_none());
        assert!(map.set(1984 * 3 + 5, 1984 * 3 + 6, State::Data));
        assert!(map.set(1984 * 150, 1984 * 150 + 1, State::Zero));
        let indices: Vec<u64> = written(&mut map).iter().map(|(index, _)| *index).collect();
        assert_eq!(indices, [3, 150]);
        assert!(!map.set(1984 * 3 + 5, 1984 * 3 + 6, State::Data));
        assert!(!map.is_dirty());
    }

    #[test]
    fn sector_when_altered_in_any_byte_is_refused() {
        let mut map = map(1984 * 2, 3);
        map.set(0, 10, State::Data);
        let [(index, bytes)] = written(&mut map)[..] else {
            panic!();
        };
        for at in 0..SECTOR {
            let mut altered = bytes;
            altered[at] ^= 0x10;
            assert!(
                self::map(1984 * 2, 3).load(index, &altered).is_err(),
                "{at}"
            );
        }
        assert_eq!(
            self::map(1984 * 2, 3).load(1, &bytes),
            Err(BadSector::Damaged)
        );
        assert_eq!(
            self::map(1984 * 2, 2).load(0, &bytes),
            Err(BadSector::Newer)
        );
        let mut other = Map::new(&Layout::new(1984 * 8192).unwrap(), 3, [8; 16]);
        assert_eq!(other.load(0, &bytes), Err(BadSector::Damaged));
        // Of an earlier generation: it says nothing.
        let mut later = self::map(1984 * 2, 4);
        assert_eq!(later.load(0, &bytes), Ok(()));
        assert_eq!(later.state(0), State::Base);
    }

    #[test]
    fn sector_when_it_says_what_cannot_be_is_refused_although_its_check_value_is_right() {
        let sealed = |words: &[(usize, u64)]| {
            let mut bytes = [0; SECTOR];
            bytes[..8].copy_from_slice(&1u64.to_le_bytes());
            for (at, word) in words {
                bytes[at * 8..at * 8 + 8].copy_from_slice(&word.to_le_bytes());
            }
            let value = check(&ID, 0, &bytes);
            bytes[8..16].copy_from_slice(&u64::from(value).to_le_bytes());
            bytes
        };
        assert_eq!(map(10, 1).load(0, &sealed(&[(2, 0b10_01)])), Ok(()));
        for words in [
            // The fourth state.
            [(2, 0b11)],
            [(2, 0b11 << 18)],
            // Behind the end.
            [(2, 1 << 20)],
            [(3, 1)],
            [(63, 1 << 63)],
            // No generation.
            [(0, 0)],
        ] {
            assert_eq!(
                map(10, 1).load(0, &sealed(&words)),
                Err(BadSector::Damaged),
                "{words:?}"
            );
        }
    }
}
