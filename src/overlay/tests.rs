//! An overlay against a model of its disk: writes of any size, discards, zeros, resets, and ends at any step.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{SystemTime, UNIX_EPOCH};

use super::*;

/// A generator of numbers that only its seed decides.
pub struct Random(u64);

impl Random {
    /// Another one each time, or that of `MAYFLY_TEST_SEED`.
    pub fn seed() -> u64 {
        let given = std::env::var("MAYFLY_TEST_SEED").ok();
        given.map_or_else(
            || {
                SystemTime::now()
                    .duration_since(UNIX_EPOCH)
                    .unwrap()
                    .as_nanos() as u64
                    | 1
            },
            |text| text.parse().expect("MAYFLY_TEST_SEED is a number"),
        )
    }

    pub fn new(seed: u64) -> Self {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// A number below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % limit.max(1)
    }
}

const SECTOR: u64 = 512;
type Sectors = BTreeMap<u64, [u8; 512]>;

/// A change of a file that was not synced.
#[derive(Clone)]
enum Change {
    Write(u64, Box<[u8; 512]>),
    Punch(Range<u64>),
}

fn apply(sectors: &mut Sectors, change: &Change) {
    match change {
        Change::Write(index, bytes) => {
            sectors.insert(*index, **bytes);
        }
        Change::Punch(range) => {
            let inside: Vec<u64> = sectors
                .range(range.clone())
                .map(|(index, _)| *index)
                .collect();
            for index in inside {
                sectors.remove(&index);
            }
        }
    }
}

#[derive(Default)]
struct Content {
    sectors: Sectors,
    size: u64,
    /// As it was at the last sync, and what was done since.
    synced: Sectors,
    since: Vec<Change>,
}

/// A file that ends its user's work at a chosen step.
#[derive(Clone, Default)]
struct Fake {
    content: Arc<Mutex<Content>>,
    /// Steps that still succeed.
    steps: Arc<AtomicU64>,
}

impl Fake {
    fn new() -> Self {
        let fake = Fake::default();
        fake.allow(u64::MAX);
        fake
    }

    /// So many steps succeed from now on.
    fn allow(&self, steps: u64) {
        self.steps.store(steps, Ordering::Relaxed);
    }

    fn content(&self) -> MutexGuard<'_, Content> {
        self.content.lock().unwrap()
    }

    fn step(&self) -> io::Result<()> {
        let left = self.steps.load(Ordering::Relaxed).checked_sub(1);
        self.allow(left.ok_or(io::Error::other("killed"))?);
        Ok(())
    }

    fn change(&self, change: Change) {
        let mut content = self.content();
        apply(&mut content.sectors, &change);
        content.since.push(change);
    }

    /// The host ends: of what was not synced, each sector is there or not.
    fn lose_power(&self, random: &mut Random) {
        let mut content = self.content();
        let mut sectors = content.synced.clone();
        for change in std::mem::take(&mut content.since) {
            match change {
                Change::Punch(range) => {
                    for index in range.step_by(8) {
                        if random.below(2) == 0 {
                            apply(&mut sectors, &Change::Punch(index..index + 8));
                        }
                    }
                }
                write if random.below(2) == 0 => apply(&mut sectors, &write),
                _ => {}
            }
        }
        content.sectors = sectors.clone();
        content.synced = sectors;
    }

    fn bytes(&self) -> u64 {
        self.content().sectors.len() as u64 * SECTOR
    }
}

impl Storage for Fake {
    fn read_exact_at(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        assert_eq!((at % SECTOR, bytes.len() as u64 % SECTOR), (0, 0));
        let content = self.content();
        if at + bytes.len() as u64 > content.size {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        for (index, part) in (at / SECTOR..).zip(bytes.chunks_exact_mut(512)) {
            part.copy_from_slice(content.sectors.get(&index).unwrap_or(&[0; 512]));
        }
        Ok(())
    }

    fn write_all_at(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        assert_eq!((at % SECTOR, bytes.len() as u64 % SECTOR), (0, 0));
        assert!(at + bytes.len() as u64 <= self.content().size);
        let pages = at / 4096..(at + bytes.len() as u64).div_ceil(4096);
        for page in pages {
            // Bytes reach a file page by page: a kill comes between two.
            self.step()?;
            let from = at.max(page * 4096) - at;
            let to = (at + bytes.len() as u64).min((page + 1) * 4096) - at;
            let part = &bytes[from as usize..to as usize];
            for (index, sector) in ((at + from) / SECTOR..).zip(part.as_chunks::<512>().0) {
                self.change(Change::Write(index, Box::new(*sector)));
            }
        }
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        self.step()?;
        let mut content = self.content();
        let mut synced = std::mem::take(&mut content.synced);
        for change in content.since.drain(..) {
            apply(&mut synced, &change);
        }
        content.synced = synced;
        Ok(())
    }

    fn punch(&self, range: Range<u64>) -> io::Result<()> {
        self.step()?;
        assert_eq!((range.start % SECTOR, range.end % SECTOR), (0, 0));
        // Only whole pages are given back; parts of others become zeros.
        let whole = range.start.next_multiple_of(4096) / SECTOR..range.end / 4096 * 8;
        for index in range.start / SECTOR..range.end / SECTOR {
            if !whole.contains(&index) {
                self.change(Change::Write(index, Box::new([0; 512])));
            }
        }
        if !whole.is_empty() {
            self.change(Change::Punch(whole));
        }
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.content().size)
    }

    fn set_size(&self, size: u64) -> io::Result<()> {
        self.step()?;
        self.content().size = size;
        Ok(())
    }

    fn next_data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        let content = self.content();
        let sectors = range.start / SECTOR / 8 * 8..range.end.div_ceil(SECTOR);
        let first = content.sectors.range(sectors).next();
        Ok(first.map(|(index, _)| {
            let page = index / 8 * 4096;
            page.max(range.start)..(page + 4096).min(range.end)
        }))
    }
}

impl Storage for Vec<u8> {
    fn read_exact_at(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        let from = self.get(at as usize..at as usize + bytes.len());
        bytes.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_all_at(&self, _: &mut [u8], _: u64) -> io::Result<()> {
        panic!("the base is written to")
    }

    fn sync_data(&self) -> io::Result<()> {
        panic!("the base is synced")
    }

    fn punch(&self, _: Range<u64>) -> io::Result<()> {
        panic!("the base is punched")
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }

    fn set_size(&self, _: u64) -> io::Result<()> {
        panic!("the base is cut")
    }

    fn next_data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        Ok(Some(range))
    }
}

const ID: [u8; 16] = [9; 16];

/// A sector whose content is its `tag`, again and again.
fn tagged(tag: u64) -> [u8; 512] {
    let mut bytes = [0; 512];
    for part in bytes.chunks_exact_mut(8) {
        part.copy_from_slice(&tag.to_le_bytes());
    }
    bytes
}

fn tag(bytes: &[u8]) -> u64 {
    let tag = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    assert_eq!(bytes, tagged(tag), "a sector is a mixture");
    tag
}

/// Tags of the base begin here.
const BASE: u64 = 1 << 40;

fn base(sectors: u64) -> Vec<u8> {
    (0..sectors)
        .flat_map(|index| tagged(BASE + index))
        .collect()
}

/// What each sector may be: the content at the last flush, or any since. By epochs: a reset is for all of them.
struct Model {
    epochs: Vec<Vec<BTreeSet<u64>>>,
    /// With every step complete.
    now: Vec<u64>,
}

impl Model {
    fn new(now: Vec<u64>) -> Self {
        let mut model = Model {
            epochs: Vec::new(),
            now,
        };
        model.settle();
        model
    }

    /// All so far is certain.
    fn settle(&mut self) {
        self.epochs = vec![self.now.iter().map(|tag| BTreeSet::from([*tag])).collect()];
    }

    /// May become, and if nothing fails will be.
    fn put(&mut self, index: u64, tag: u64) {
        self.now[index as usize] = tag;
        self.epochs.last_mut().unwrap()[index as usize].insert(tag);
    }

    fn reset(&mut self) {
        self.now = (0..self.now.len() as u64)
            .map(|index| BASE + index)
            .collect();
        let epoch = self.now.iter().map(|tag| BTreeSet::from([*tag])).collect();
        self.epochs.push(epoch);
    }

    fn check(&self, found: &[u64]) -> Result<(), String> {
        let wrong = |epoch: &Vec<BTreeSet<u64>>| {
            let mut all = epoch.iter().zip(found).enumerate();
            all.find(|(_, (may, is))| !may.contains(is))
                .map(|(index, (may, is))| {
                    format!("sector {index} is {is:x} and may be one of {may:x?}")
                })
        };
        let wrong: Vec<_> = self.epochs.iter().map(wrong).collect();
        match wrong.iter().any(Option::is_none) {
            true => Ok(()),
            false => Err(format!("{wrong:?}")),
        }
    }
}

/// A disk with an overlay, as a block device drives it.
struct Disk {
    overlay: Overlay<Fake>,
    base: Vec<u8>,
}

fn open(file: &Fake, base: &Vec<u8>, how: Durability) -> Result<Overlay<Fake>, Refusal> {
    let id = BaseId::of(base, base.len() as u64, (1, 2)).unwrap();
    let content = super::Content::open(file, &id, ID)?;
    Overlay::load(Arc::new(file.clone()), &content, how)
}

impl Disk {
    fn new(file: &Fake, base: &Vec<u8>, how: Durability) -> Self {
        Disk {
            overlay: open(file, base, how).unwrap(),
            base: base.clone(),
        }
    }

    fn read(&self, at: u64, len: u64) -> Vec<u8> {
        let mut bytes = vec![0xee; len as usize];
        let mut done = 0;
        while done < len {
            let (place, count) = self.overlay.locate(at + done, len - done);
            assert!(count > 0 && count <= len - done);
            let part = &mut bytes[done as usize..(done + count) as usize];
            match place {
                Place::Base => self.base.read_exact_at(part, at + done).unwrap(),
                Place::File(at) => self.overlay.file().read_exact_at(part, at).unwrap(),
                Place::Zero => part.fill(0),
            }
            done += count;
        }
        bytes
    }

    fn tags(&self) -> Vec<u64> {
        let all = self.read(0, self.base.len() as u64);
        all.chunks_exact(512).map(tag).collect()
    }

    fn write(&mut self, at: u64, mut bytes: Vec<u8>) -> io::Result<()> {
        let len = bytes.len() as u64;
        self.overlay.before_write(&self.base, at, len)?;
        let place = self.overlay.write_at(at);
        self.overlay.file().write_all_at(&mut bytes, place)?;
        self.overlay.wrote(at, len)
    }

    fn write_zeroes(&mut self, at: u64, len: u64) -> io::Result<()> {
        self.overlay.before_write(&self.base, at, len)?;
        let place = self.overlay.write_at(at);
        self.overlay.file().punch(place..place + len)?;
        self.overlay.set_zero(at, len)
    }

    fn discard(&mut self, at: u64, len: u64) -> io::Result<()> {
        let (at, len) = self.overlay.whole_units(at, len);
        if len > 0 {
            let place = self.overlay.write_at(at);
            self.overlay.file().punch(place..place + len)?;
        }
        self.overlay.set_zero(at, len)
    }
}

/// Sectors from and to, with a liking for whole units and for what lies close together.
fn range(random: &mut Random, sectors: u64) -> Range<u64> {
    let first = match random.below(3) {
        0 => random.below(sectors),
        1 => random.below(sectors.min(64)),
        _ => random.below(sectors / 8 + 1) * 8,
    }
    .min(sectors - 1);
    let count = match random.below(4) {
        0 => 1 + random.below(8),
        1 => 8,
        2 => 8 * (1 + random.below(8)),
        _ => 1 + random.below(300),
    };
    first..(first + count).min(sectors)
}

/// One step of a random run; what it may bring about is noted in `model` first.
fn step(
    disk: &mut Disk,
    model: &mut Model,
    random: &mut Random,
    next_tag: &mut u64,
    stale: &mut Vec<Stale<Fake>>,
    how: Durability,
) -> io::Result<()> {
    let sectors = model.now.len() as u64;
    let Range { start, end } = range(random, sectors);
    let (at, len) = (start * SECTOR, (end - start) * SECTOR);
    match random.below(40) {
        0..20 => {
            let mut bytes = Vec::new();
            for index in start..end {
                *next_tag += 1;
                model.put(index, *next_tag);
                bytes.extend_from_slice(&tagged(*next_tag));
            }
            disk.write(at, bytes)?;
        }
        20..25 => {
            (start..end).for_each(|index| model.put(index, 0));
            disk.write_zeroes(at, len)?;
        }
        25..29 => {
            // Whole units become zeros; of others nothing changes.
            let past = if end == sectors {
                sectors.next_multiple_of(8)
            } else {
                end
            };
            for unit in start.div_ceil(8)..past / 8 {
                (unit * 8..(unit * 8 + 8).min(sectors)).for_each(|index| model.put(index, 0));
            }
            disk.discard(at, len)?;
        }
        29..33 => {
            disk.overlay.flush()?;
            model.settle();
        }
        33 => {
            model.reset();
            stale.push(disk.overlay.reset()?);
        }
        34 => stale.clear(),
        _ => {
            let found: Vec<u64> = disk.read(at, len).chunks_exact(512).map(tag).collect();
            assert_eq!(
                found,
                model.now[start as usize..end as usize],
                "{start} {end}"
            );
        }
    }
    if how == Durability::Immediate {
        model.settle();
    }
    Ok(())
}

fn run(how: Durability, sectors: u64, rounds: u64, seed: u64) {
    let mut random = Random::new(seed);
    let base = base(sectors);
    let file = Fake::new();
    let mut model = Model::new((BASE..BASE + sectors).collect());
    let mut next_tag = 0;
    for round in 0..rounds {
        // Also opening may be what is killed.
        file.allow(random.below(200));
        let killed = (|| {
            let id = BaseId::of(&base, base.len() as u64, (1, 2)).unwrap();
            let content = super::Content::open(&file, &id, ID)?;
            let overlay = Overlay::load(Arc::new(file.clone()), &content, how)?;
            let mut disk = Disk {
                overlay,
                base: base.clone(),
            };
            let mut stale: Vec<_> = disk.overlay.left_over().unwrap().into_iter().collect();
            loop {
                let went = step(
                    &mut disk,
                    &mut model,
                    &mut random,
                    &mut next_tag,
                    &mut stale,
                    how,
                );
                if let Err(error) = went {
                    return Err::<(), _>(Refusal::Io("a step", error));
                }
            }
        })();
        assert!(
            matches!(killed, Err(Refusal::Io(..))),
            "seed {seed} round {round}: {killed:?}"
        );
        file.allow(u64::MAX);
        if how == Durability::Ordered && random.below(2) == 0 {
            file.lose_power(&mut random);
        }
        let disk = Disk::new(&file, &base, how);
        let found = disk.tags();
        if let Err(wrong) = model.check(&found) {
            panic!("seed {seed} round {round}: {wrong}");
        }
        model = Model::new(found);
        if how == Durability::Ordered {
            // What is seen now need not be there after the next end of the host, unless it is flushed.
            file.sync_data().unwrap();
        }
    }
}

#[test]
fn disk_when_killed_at_any_step_has_all_that_was_complete() {
    let seed = Random::seed();
    run(Durability::Immediate, 1001, 150, seed);
    run(Durability::Immediate, 3 * 1984 * 8 + 3, 10, seed);
}

#[test]
fn disk_when_the_host_ends_at_any_step_has_all_that_was_flushed() {
    let seed = Random::seed();
    run(Durability::Ordered, 1001, 150, seed);
    run(Durability::Ordered, 3 * 1984 * 8 + 3, 10, seed);
}

#[test]
fn disk_when_reset_twice_before_the_host_ends_is_as_before_or_after() {
    let seed = Random::seed();
    let mut random = Random::new(seed);
    let base = base(8 * 10);
    for round in 0..100 {
        let file = Fake::new();
        let mut disk = Disk::new(&file, &base, Durability::Ordered);
        let written: Vec<u64> = (1..=80).collect();
        disk.write(0, written.iter().flat_map(|tag| tagged(*tag)).collect())
            .unwrap();
        disk.overlay.flush().unwrap();
        let first = disk.overlay.reset().unwrap();
        let second = disk.overlay.reset().unwrap();
        disk.write(0, tagged(99).repeat(80)).unwrap();
        if random.below(2) == 0 {
            drop((first, second));
        }
        file.lose_power(&mut random);
        let found = Disk::new(&file, &base, Durability::Ordered).tags();
        let reset: Vec<u64> = (BASE..BASE + 80).collect();
        assert!(
            found == written || found == reset,
            "seed {seed} round {round}: {found:x?}"
        );
    }
}

#[test]
fn space_when_discarded_or_reset_is_given_back() {
    let (file, base) = (Fake::new(), base(8 * 100));
    let mut disk = Disk::new(&file, &base, Durability::Immediate);
    let empty = file.bytes();
    disk.write(0, vec![1; 4096 * 50]).unwrap();
    let full = file.bytes();
    assert!(full >= empty + 4096 * 50);
    disk.discard(4096, 4096 * 20).unwrap();
    assert_eq!(file.bytes(), full - 4096 * 20);
    disk.write_zeroes(4096 * 30 + 512, 4096 * 10).unwrap();
    assert_eq!(file.bytes(), full - 4096 * 29);
    let stale = disk.overlay.reset().unwrap();
    assert_eq!(disk.tags(), (BASE..BASE + 800).collect::<Vec<_>>());
    disk.write(0, vec![1; 4096]).unwrap();
    drop(stale);
    // The header, a page of the map, one unit.
    assert_eq!(file.bytes(), empty + 512 + 4096);
    assert_eq!(disk.read(0, 4096), [1; 4096]);
    assert_eq!(disk.read(4096, 512), tagged(BASE + 8));
}

#[test]
fn space_when_its_region_is_in_use_again_is_left_and_found_at_the_next_opening() {
    let (file, base) = (Fake::new(), base(8 * 100));
    let mut disk = Disk::new(&file, &base, Durability::Immediate);
    disk.write(0, vec![1; 4096 * 50]).unwrap();
    let first = disk.overlay.reset().unwrap();
    disk.write(0, vec![2; 4096]).unwrap();
    let second = disk.overlay.reset().unwrap();
    disk.write(4096 * 3, vec![3; 4096]).unwrap();
    drop(first);
    assert_eq!(disk.read(4096 * 3, 4096), [3; 4096]);
    // Killed before it was given back.
    file.allow(0);
    drop(second);
    file.allow(u64::MAX);
    let before = file.bytes();
    let disk = Disk::new(&file, &base, Durability::Immediate);
    drop(
        disk.overlay
            .left_over()
            .unwrap()
            .expect("space to give back"),
    );
    assert_eq!(file.bytes(), before - 4096);
    assert!(disk.overlay.left_over().unwrap().is_none());
    assert_eq!(disk.read(4096 * 3, 4096), [3; 4096]);
}

#[test]
fn writes_when_of_whole_units_copy_nothing_and_others_copy_the_rest() {
    let (file, base) = (Fake::new(), base(8 * 10 + 3));
    let mut disk = Disk::new(&file, &base, Durability::Ordered);
    let before = file.bytes();
    disk.write(4096, vec![1; 8192]).unwrap();
    assert_eq!(file.bytes(), before + 8192);
    // Whole is also what ends where the disk does.
    disk.write(80 * 512, vec![1; 3 * 512]).unwrap();
    assert_eq!(file.bytes(), before + 8192 + 3 * 512);
    disk.write(512, vec![1; 512]).unwrap();
    assert_eq!(file.bytes(), before + 8192 + 3 * 512 + 4096);
    assert_eq!(disk.read(0, 512), tagged(BASE));
    assert_eq!(disk.read(1024, 512), tagged(BASE + 2));
}

#[test]
fn file_when_it_is_not_the_overlay_of_this_base_is_refused() {
    let bytes = base(8 * 100);
    let file = Fake::new();
    let mut disk = Disk::new(&file, &bytes, Durability::Immediate);
    disk.write(0, vec![1; 4096]).unwrap();
    let refused = |base: &Vec<u8>| {
        let opened = open(&file, base, Durability::Immediate);
        opened
            .err()
            .map(|refusal| refusal.to_string())
            .unwrap_or_default()
    };
    assert_eq!(refused(&bytes), "");
    let mut other = bytes.clone();
    other[1024] ^= 1;
    assert!(
        refused(&other).contains("belongs to another base"),
        "{}",
        refused(&other)
    );
    other = bytes.clone();
    other.truncate(8 * 99 * 512);
    assert!(refused(&other).contains("belongs to a disk of 409600 bytes"));
    let alter = |at: u64, value: u8| {
        let mut content = file.content();
        let sector = content.sectors.entry(at / 512).or_insert([0; 512]);
        std::mem::replace(&mut sector[(at % 512) as usize], value)
    };
    for (at, expected) in [
        (0, "is not an overlay"),
        (8, "version"),
        (20, "its header was altered"),
        (4096, "its map was altered"),
        (4096 + 16, "its map was altered"),
    ] {
        let before = alter(at, 0x55);
        assert!(
            refused(&bytes).contains(expected),
            "{at}: {}",
            refused(&bytes)
        );
        alter(at, before);
    }
    let size = file.size().unwrap();
    for wrong in [size - 4096, 4096, 100, size + 1] {
        file.set_size(wrong).unwrap();
        let refusal = refused(&bytes);
        assert!(
            refusal.contains("cut off") || refusal.contains("is not an overlay"),
            "{refusal}"
        );
    }
    file.set_size(size).unwrap();
    // An earlier header beside a later map: what no order of writes leaves.
    let header = file.content().sectors[&0];
    drop(disk.overlay.reset().unwrap());
    disk.write(0, vec![1; 4096]).unwrap();
    file.content().sectors.insert(0, header);
    assert!(refused(&bytes).contains("newer than its header"));
}
