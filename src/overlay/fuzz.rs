//! Overlays: files that hold anything, and what is done with them, against a model of the disk.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::sync::{Arc, Mutex};

use super::header::Header;
use super::layout::{Layout, MAP_AT, SECTOR, UNIT};
use super::map::Map;
use super::*;
use crate::fuzz::Input;

const SECTOR_BYTES: u64 = SECTOR as u64;
const ID: [u8; 16] = [7; 16];
/// Sectors of a disk: less than a unit, some units and a part, and more than a sector of the map has.
const SIZES: [u64; 5] = [1, 8, 9, 8 * 70 + 3, 8 * 1984 * 2 + 1];

/// A disk with an overlay that is written to, cleared, reset, flushed and opened again, and a file that is
/// altered in between: its header, its map (with check values that are right, or not), its length, or
/// any bytes. Checked: what is read is what the model has; what was altered is refused with a reason, or
/// is an overlay whose every byte has a place in one of the two files; no file is longer than its layout.
pub fn overlay(bytes: &[u8]) {
    let input = &mut Input::new(bytes);
    let base = Base(input.one_of(&SIZES));
    let durability = input.one_of(&[Durability::Immediate, Durability::Ordered]);
    let mut test = Test::new(base, durability);
    for _ in 0..200 {
        if input.is_empty() || test.step(input).is_none() {
            break;
        }
    }
}

/// The base: each sector has bytes of its own.
#[derive(Clone, Copy)]
struct Base(u64);

impl Base {
    fn sector(sector: u64) -> [u8; SECTOR] {
        std::array::from_fn(|i| (sector * 7 + i as u64 + 1) as u8)
    }

    fn id(self) -> BaseId {
        BaseId::of(&self, self.0 * SECTOR_BYTES, (5, 6)).unwrap()
    }
}

/// A file in memory, by sectors that hold something.
#[derive(Default)]
struct Sparse(Mutex<(u64, BTreeMap<u64, [u8; SECTOR]>)>);

/// Where the parts of `len` bytes at `at` are that lie in one sector each, and which bytes they are.
fn pieces(at: u64, len: usize) -> impl Iterator<Item = (u64, Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = at + done as u64;
        let in_sector = (SECTOR_BYTES - at % SECTOR_BYTES) as usize;
        let piece = done..len.min(done + in_sector);
        done = piece.end;
        (!piece.is_empty()).then_some((at, piece))
    })
}

impl Sparse {
    /// Changes bytes of the file, whatever is in them.
    fn alter(&self, at: u64, bytes: &[u8]) {
        let mut file = self.0.lock().unwrap();
        for (at, piece) in pieces(at, bytes.len()) {
            let sector = file.1.entry(at / SECTOR_BYTES).or_insert([0; SECTOR]);
            let from = (at % SECTOR_BYTES) as usize;
            sector[from..from + piece.len()].copy_from_slice(&bytes[piece]);
        }
    }

    fn sector(&self, at: u64) -> [u8; SECTOR] {
        let sectors = &self.0.lock().unwrap().1;
        sectors
            .get(&(at / SECTOR_BYTES))
            .copied()
            .unwrap_or([0; SECTOR])
    }
}

impl Storage for Base {
    fn read_exact_at(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        assert!(at + bytes.len() as u64 <= self.0 * SECTOR_BYTES);
        for (at, byte) in (at..).zip(bytes) {
            *byte = (at / SECTOR_BYTES * 7 + at % SECTOR_BYTES + 1) as u8;
        }
        Ok(())
    }

    fn write_all_at(&self, _: &mut [u8], _: u64) -> io::Result<()> {
        panic!("a base is only read");
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn punch(&self, _: Range<u64>) -> io::Result<()> {
        panic!("a base is only read");
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.0 * SECTOR_BYTES)
    }

    fn set_size(&self, _: u64) -> io::Result<()> {
        panic!("a base is only read");
    }

    fn next_data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        Ok(Some(range))
    }
}

impl Storage for Sparse {
    fn read_exact_at(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        if at + bytes.len() as u64 > self.size()? {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        for (at, piece) in pieces(at, bytes.len()) {
            let from = (at % SECTOR_BYTES) as usize;
            let len = piece.len();
            bytes[piece].copy_from_slice(&self.sector(at)[from..from + len]);
        }
        Ok(())
    }

    fn write_all_at(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        assert!(at + bytes.len() as u64 <= self.size()?, "the file grows");
        self.alter(at, bytes);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn punch(&self, range: Range<u64>) -> io::Result<()> {
        let range = range.start.div_ceil(SECTOR_BYTES)..range.end / SECTOR_BYTES;
        self.0
            .lock()
            .unwrap()
            .1
            .retain(|sector, _| !range.contains(sector));
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap().0)
    }

    fn set_size(&self, size: u64) -> io::Result<()> {
        self.0.lock().unwrap().0 = size;
        Ok(())
    }

    fn next_data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        let sectors = &self.0.lock().unwrap().1;
        let first = range.start / SECTOR_BYTES;
        let past = range.end.div_ceil(SECTOR_BYTES);
        let Some((found, _)) = sectors.range(first..past).next() else {
            return Ok(None);
        };
        let end = (*found..)
            .find(|it| !sectors.contains_key(it))
            .unwrap_or(past);
        let found = found * SECTOR_BYTES;
        Ok(Some(
            found.max(range.start)..(end * SECTOR_BYTES).min(range.end),
        ))
    }
}

struct Test {
    base: Base,
    base_id: BaseId,
    file: Arc<Sparse>,
    durability: Durability,
    overlay: Overlay<Sparse>,
    layout: Layout,
    /// What the disk has in place of the base's.
    model: BTreeMap<u64, [u8; SECTOR]>,
    stale: Vec<Stale<Sparse>>,
}

fn open(base: &BaseId, file: &Arc<Sparse>, how: Durability) -> Result<Overlay<Sparse>, Refusal> {
    let content = Content::open(&**file, base, ID)?;
    Overlay::load(Arc::clone(file), &content, how)
}

impl Test {
    fn new(base: Base, durability: Durability) -> Self {
        let file = Arc::new(Sparse::default());
        let base_id = base.id();
        Test {
            base,
            base_id,
            overlay: open(&base_id, &file, durability).unwrap(),
            file,
            durability,
            layout: Layout::new(base.0 * SECTOR_BYTES).unwrap(),
            model: BTreeMap::new(),
            stale: Vec::new(),
        }
    }

    /// None when the file is no overlay any more.
    fn step(&mut self, input: &mut Input<'_>) -> Option<()> {
        let sector = u64::from(input.u16()) % self.base.0;
        let count = (1 + u64::from(input.u8() % 40)).min(self.base.0 - sector);
        let (at, len) = (sector * SECTOR_BYTES, count * SECTOR_BYTES);
        match input.below(10) {
            0..=2 => self.write(at, &vec![input.u8(); len as usize]),
            3 => {
                let (first, len) = self.overlay.whole_units(at, len);
                let end = (first + len).min(self.layout.size);
                assert!(first >= at || len == 0);
                self.overlay.set_zero(at, count * SECTOR_BYTES).unwrap();
                for sector in first / SECTOR_BYTES..end.max(first).div_ceil(SECTOR_BYTES) {
                    self.model.insert(sector, [0; SECTOR]);
                }
            }
            4 => {
                self.stale.push(self.overlay.reset().unwrap());
                self.model.clear();
            }
            5 => self.overlay.flush().unwrap(),
            6 => self.stale.clear(),
            7 => self.stale.extend(self.overlay.left_over().unwrap()),
            8 => self.reopen(|_| {})?,
            _ => return self.reopen_altered(input),
        }
        self.compare(at, len);
        assert!(self.file.size().unwrap() == self.layout.total);
        Some(())
    }

    fn write(&mut self, at: u64, bytes: &[u8]) {
        let len = bytes.len() as u64;
        self.overlay.before_write(&self.base, at, len).unwrap();
        let to = self.overlay.write_at(at);
        self.file.write_all_at(&mut bytes.to_vec(), to).unwrap();
        self.overlay.wrote(at, len).unwrap();
        for (sector, bytes) in (at / SECTOR_BYTES..).zip(bytes.as_chunks().0) {
            self.model.insert(sector, *bytes);
        }
    }

    fn expected(&self, sector: u64) -> [u8; SECTOR] {
        self.model
            .get(&sector)
            .copied()
            .unwrap_or_else(|| Base::sector(sector))
    }

    /// The sector of the disk, by way of where the overlay says that it is.
    fn read(&self, sector: u64) -> [u8; SECTOR] {
        let mut bytes = [0xee; SECTOR];
        match self.overlay.locate(sector * SECTOR_BYTES, SECTOR_BYTES).0 {
            Place::Base => self
                .base
                .read_exact_at(&mut bytes, sector * SECTOR_BYTES)
                .unwrap(),
            Place::File(at) => self.file.read_exact_at(&mut bytes, at).unwrap(),
            Place::Zero => bytes.fill(0),
        }
        bytes
    }

    fn compare(&self, at: u64, len: u64) {
        let (mut at, end) = (at, at + len);
        while at < end {
            let (place, run) = self.overlay.locate(at, end - at);
            assert!(run > 0 && run <= end - at);
            if let Place::File(place) = place {
                assert!(place >= self.layout.data_at && place + run <= self.layout.total);
            }
            for sector in at / SECTOR_BYTES..(at + run) / SECTOR_BYTES {
                assert!(
                    self.read(sector) == self.expected(sector),
                    "sector {sector}"
                );
            }
            at += run;
        }
    }

    /// Ends as a monitor does, has the file `altered`, and begins again.
    fn reopen(&mut self, altered: impl FnOnce(&mut Self)) -> Option<()> {
        self.overlay.flush().unwrap();
        self.stale.clear();
        altered(self);
        self.overlay = open(&self.base_id, &self.file, self.durability).unwrap();
        let sectors: Vec<u64> = self.model.keys().copied().collect();
        for sector in sectors {
            self.compare(sector * SECTOR_BYTES, SECTOR_BYTES);
        }
        Some(())
    }

    /// The same with changes that need not leave an overlay.
    fn reopen_altered(&mut self, input: &mut Input<'_>) -> Option<()> {
        self.overlay.flush().unwrap();
        self.stale.clear();
        let is_blank_before = self.file.0.lock().unwrap().1.is_empty();
        assert!(!is_blank_before);
        match input.below(5) {
            0 => self.alter_header(input),
            1 => self.alter_map(input),
            2 => {
                let at = u64::from(input.u16()) % (MAP_AT + self.layout.sectors * SECTOR_BYTES);
                let len = input.below(20);
                self.file.alter(at, input.bytes(len));
            }
            3 => {
                let size = match input.flag() {
                    true => u64::from(input.u32()),
                    false => self.layout.total ^ (1 << input.below(63)),
                };
                self.file.set_size(size).unwrap();
                self.file
                    .0
                    .lock()
                    .unwrap()
                    .1
                    .retain(|sector, _| sector * SECTOR_BYTES < size);
            }
            _ => {
                let at = self.layout.data_at + u64::from(input.u32()) % (self.layout.region * 2);
                let len = (input.below(20) as u64).min(self.layout.total - at);
                self.file.alter(at, input.bytes(len as usize));
            }
        }
        // A tool reads it whatever its base is.
        if let Ok(content) = Content::read(&*self.file) {
            let total = Layout::new(content.header().base.size).unwrap().total;
            assert_eq!(self.file.size().unwrap(), total);
        }
        match open(&self.base_id, &self.file, self.durability) {
            Ok(overlay) => self.overlay = overlay,
            Err(refusal) => {
                assert!(!refusal.to_string().is_empty());
                return None;
            }
        }
        assert_eq!(self.file.size().unwrap(), self.layout.total);
        self.learn();
        Some(())
    }

    /// Takes what the disk has now for what it is to have: only the file can tell.
    fn learn(&mut self) {
        self.model.clear();
        let mut at = 0;
        while at < self.layout.size {
            let (place, run) = self.overlay.locate(at, self.layout.size - at);
            assert!(run > 0 && at + run <= self.layout.size);
            if place != Place::Base {
                for sector in at / SECTOR_BYTES..(at + run) / SECTOR_BYTES {
                    self.model.insert(sector, self.read(sector));
                }
            }
            at += run;
        }
        let (_, units) = self.overlay.state(0);
        assert!(units > 0 && units <= self.layout.units);
    }

    fn alter_header(&self, input: &mut Input<'_>) {
        let mut header = *self.overlay.header();
        match input.below(7) {
            0 => header.generation = input.u64(),
            1 => header.generation ^= 1 << input.below(64),
            2 => header.base.size = input.u64(),
            3 => header.base.samples ^= 1 << input.below(32),
            4 => header.base.modified.0 = 1,
            5 => header.id = [8; 16],
            _ => header.committing = Some(input.u64()),
        }
        self.file.alter(0, &Header::encode(&header));
    }

    fn alter_map(&self, input: &mut Input<'_>) {
        let header = self.overlay.header();
        let at = MAP_AT + u64::from(input.u8()) % self.layout.sectors * SECTOR_BYTES;
        let mut sector = self.file.sector(at);
        for _ in 0..=input.below(4) {
            let at = match input.below(3) {
                0 => input.below(16),
                _ => 16 + usize::from(input.u16()) % 496,
            };
            sector[at] = match input.flag() {
                true => input.u8(),
                false => 0x55 << input.below(2),
            };
        }
        if input.below(4) > 0 {
            if input.flag() {
                sector[..8].copy_from_slice(&header.generation.to_le_bytes());
            }
            let index = (at - MAP_AT) / SECTOR_BYTES;
            Map::sign(&header.id, index, &mut sector);
        }
        self.file.alter(at, &sector);
    }
}

const _: () = assert!(UNIT == 8 * SECTOR_BYTES);
