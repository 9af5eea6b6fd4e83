//! Block requests on plain disks and overlays, against a model of the disk that is an array of bytes.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, memfd_create};

use super::disk::FileIndex;
use super::*;
use crate::fuzz::Input;
use crate::overlay::{BaseId, Content, Durability, Overlay};
use crate::virtio::DeviceState;
use crate::virtio::fuzz::{Memory, Piece, address, describe, empty_ram, length, poke};
use crate::virtio::queue::{QueueLayout, QueueState};

/// Below this are descriptors and rings, and nothing else that requests name on purpose.
const RINGS_END: u64 = 0x1000;
const SIZE: u16 = 16;
const LAYOUT: QueueLayout = QueueLayout {
    size: SIZE as u32,
    ready: true,
    descriptors: 0,
    avail: 0x400,
    used: 0x800,
};
const ID: [u8; 16] = [7; 16];

/// Requests of any shape on a disk: writable, read-only, or an overlay in a file or in memory.
/// Checked after each: status, used length, all of guest memory and, at the end, all of the disk are
/// what the model says; no file has changed its length, and the base of an overlay nothing.
pub fn block(bytes: &[u8]) {
    let input = &mut Input::new(bytes);
    let mut test = Test::new(input);
    for _ in 0..64 {
        if input.is_empty() || !test.step(input) {
            break;
        }
    }
    test.check_files();
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Writable,
    ReadOnly,
    Overlay,
    InMemory,
}

struct Test {
    ram: Ram,
    queue: Queue,
    block: Block,
    kind: Kind,
    /// The plain disk, or the base; what it had, and what the disk is to have.
    file: File,
    original: Vec<u8>,
    disk: Vec<u8>,
    overlay: Option<File>,
    served: Served,
    /// No kick was asked for yet, and how many chains have been returned.
    is_first: bool,
    used: u16,
    event_idx: bool,
    takes_indirect: bool,
}

fn memory_file(content: &[u8]) -> File {
    let file = File::from(memfd_create("mayfly-fuzz", MemfdFlags::CLOEXEC).unwrap());
    file.write_all_at(content, 0).unwrap();
    file
}

fn clone(file: &File) -> File {
    file.try_clone().unwrap()
}

fn base_id(base: &File, size: usize) -> BaseId {
    BaseId::of(base, size as u64, (1, 2)).unwrap()
}

/// What a guest reads of `disk`.
fn contents(disk: &Disk) -> Vec<u8> {
    let mut data = vec![0; disk.sectors() as usize * 512];
    let (mut at, mut extents) = (0, Extents::new());
    while at < data.len() {
        extents.clear();
        disk.read_extents(at as u64, (data.len() - at) as u32, &mut extents);
        assert!(!extents.as_slice().is_empty());
        for extent in extents.as_slice() {
            let to = &mut data[at..at + extent.len as usize];
            if extent.file != FileIndex::ZERO {
                let (file, _) = disk.file(extent.file).unwrap();
                file.read_exact_at(to, extent.at).unwrap();
            }
            at += extent.len as usize;
        }
    }
    data
}

impl Test {
    fn new(input: &mut Input<'_>) -> Self {
        let kinds = [
            Kind::Writable,
            Kind::Overlay,
            Kind::InMemory,
            Kind::ReadOnly,
        ];
        let kind = input.one_of(&kinds);
        let sectors: usize = input.one_of(&[24, 20, 1, 65]);
        let original: Vec<u8> = (0..sectors * 512)
            .map(|i| (i / 512 * 7 + i + 1) as u8)
            .collect();
        let file = memory_file(&original);
        let overlay = match kind {
            Kind::Overlay | Kind::InMemory => Some(memory_file(&[])),
            _ => None,
        };
        let disk = match &overlay {
            None => Disk::new(clone(&file), kind == Kind::ReadOnly).unwrap(),
            Some(overlay) => {
                let (content, durability) = if kind == Kind::InMemory {
                    let content = Content::in_memory(overlay, original.len() as u64);
                    (content, Durability::Volatile)
                } else {
                    let durability = input.one_of(&[Durability::Ordered, Durability::Immediate]);
                    let base = base_id(&file, original.len());
                    (Content::open(overlay, &base, ID), durability)
                };
                let overlay = Arc::new(clone(overlay));
                let overlay = Overlay::load(overlay, &content.unwrap(), durability).unwrap();
                Disk::with_overlay(clone(&file), overlay).unwrap()
            }
        };
        let limiter = RateLimiter::default();
        let writeback = input.flag();
        let mut block =
            Block::new(disk, "root", writeback, limiter, &BlockState::default(), 0).unwrap();
        let ram = empty_ram();
        block.enter_thread(&ram, false).unwrap();
        let features = block.features() & (u64::from(input.u32()) << 9 | feature::VERSION_1);
        block.activate(features).unwrap();
        let state = QueueState::fresh(LAYOUT);
        Test {
            queue: Queue::new(&state, SIZE, features, &ram).unwrap(),
            served: block.served,
            ram,
            block,
            kind,
            file,
            disk: original.clone(),
            original,
            overlay,
            is_first: true,
            used: 0,
            event_idx: features & feature::EVENT_IDX != 0,
            takes_indirect: features & feature::INDIRECT_DESC != 0,
        }
    }

    /// One request; false when the rings have been written to, so that the model knows no more.
    fn step(&mut self, input: &mut Input<'_>) -> bool {
        match input.below(8) {
            0 => {
                let (at, len) = (address(input), input.below(64));
                if at >= RINGS_END {
                    poke(&self.ram, at, input.bytes(len));
                }
                return true;
            }
            1 => self.describe_anything(input),
            _ => self.describe_request(input),
        }
        let index = self.used.wrapping_add(1);
        let slot = LAYOUT.avail + 4 + 2 * u64::from(self.used % SIZE);
        poke(&self.ram, slot, &[0, 0]);
        poke(&self.ram, LAYOUT.avail + 2, &index.to_le_bytes());
        self.serve()
    }

    fn describe_anything(&self, input: &mut Input<'_>) {
        for i in 0..u64::from(SIZE) {
            let flags = u16::from(input.u8() % 8);
            let (addr, len) = (address(input), length(input));
            describe(
                &self.ram,
                16 * i,
                addr,
                len,
                flags,
                u16::from(input.u8() % 20),
            );
        }
    }

    fn describe_request(&self, input: &mut Input<'_>) {
        let kind: u32 = input.one_of(&[0, 1, 0, 1, 4, 8, 11, 13, 13, 1, 11, 2]);
        let sectors = self.disk.len() / 512;
        let sector = match input.below(8) {
            0 => input.u64(),
            _ => input.below(sectors + 2) as u64,
        };
        let header = 0x1000 + 8 * u64::from(input.u8());
        poke(&self.ram, header, &u64::from(kind).to_le_bytes());
        poke(&self.ram, header + 8, &sector.to_le_bytes());
        let mut pieces: Vec<Piece> = match input.below(4) {
            0 => vec![(header, 7, false), (header + 7, 9, false)],
            _ => vec![(header, 16, false)],
        };
        if matches!(kind, 11 | 13) {
            poke(&self.ram, header + 16, &sector.to_le_bytes());
            let count = input.below(sectors + 2) as u64;
            poke(
                &self.ram,
                header + 24,
                &(count | u64::from(input.u8() & 3) << 32).to_le_bytes(),
            );
            pieces.push((header + 16, 16, false));
        } else if matches!(kind, 0 | 1 | 8) {
            for _ in 0..input.below(5) {
                let len = match input.below(4) {
                    0 => length(input),
                    1 => 20,
                    _ => 512 * (1 + input.below(10) as u32),
                };
                let at = address(input).max(if input.flag() { RINGS_END } else { 0 });
                pieces.push((at, len, kind != 1));
            }
        }
        if input.below(16) != 0 {
            pieces.push((0x3000 + u64::from(input.u8()), 1, true));
        }
        let table = if self.takes_indirect && input.flag() {
            describe(&self.ram, 0, 0x2000, 16 * pieces.len() as u32, 4, 0);
            0x2000
        } else {
            0
        };
        for (i, (addr, len, writable)) in (0u16..).zip(&pieces) {
            let goes_on = usize::from(i) + 1 < pieces.len();
            let flags = (u16::from(*writable) << 1) | u16::from(goes_on);
            describe(
                &self.ram,
                table + 16 * u64::from(i),
                *addr,
                *len,
                flags,
                i + 1,
            );
        }
    }

    fn serve(&mut self) -> bool {
        let mut expected = Memory::of(&self.ram);
        if std::mem::take(&mut self.is_first) && !self.event_idx {
            expected.set(LAYOUT.used, &[1, 0]);
        }
        let walked = expected.walk(&LAYOUT, 0, self.takes_indirect);
        let pieces = walked.unwrap_or_default();
        let writes_rings = pieces
            .iter()
            .any(|(at, _, writable)| *writable && *at < RINGS_END);
        if writes_rings {
            for _ in 0..2 * SIZE {
                if self.block.process(0, &mut self.queue, &self.ram) != Ok(Progress::More) {
                    break;
                }
            }
            // What that was, only the files can tell.
            self.disk = contents(&self.block.disk);
            return false;
        }
        let done = self.block.process(0, &mut self.queue, &self.ram);
        assert_eq!(done, Ok(Progress::More));
        self.block.end_turn();
        assert_eq!(self.block.in_flight(), 0);
        let len = self.expect(&pieces, &mut expected);
        let slot = LAYOUT.used + 4 + 8 * u64::from(self.used % SIZE);
        expected.set(slot, &[0; 4]);
        expected.set(slot + 4, &len.to_le_bytes());
        self.used = self.used.wrapping_add(1);
        expected.set(LAYOUT.used + 2, &self.used.to_le_bytes());
        let difference = Memory::of(&self.ram).difference(&expected);
        assert_eq!(difference, None, "a byte of guest memory; {pieces:x?}");
        let done = self.block.process(0, &mut self.queue, &self.ram);
        assert_eq!(done, Ok(Progress::Wait));
        true
    }

    /// Does the request of `pieces` to the model; the used length.
    fn expect(&mut self, pieces: &[Piece], memory: &mut Memory) -> u32 {
        let all = |writable| pieces.iter().filter(move |piece| piece.2 == writable);
        let bytes = |(at, len, _): &Piece| memory.get(*at, u64::from(*len)).to_vec();
        let readable: Vec<u8> = all(false).flat_map(bytes).collect();
        let places: Vec<u64> = all(true)
            .flat_map(|(at, len, _)| *at..*at + u64::from(*len))
            .collect();
        let Some((status_at, places)) = places.split_last() else {
            return 0;
        };
        let (status, data) = match self.answer(&readable, places.len()) {
            Ok(data) => (status::OK, data),
            Err(status) => (status, None),
        };
        for (at, byte) in places.iter().zip(data.iter().flatten()) {
            memory.set(*at, &[*byte]);
        }
        memory.set(*status_at, &[status]);
        match (places.len(), data) {
            (0, _) => 1,
            (more, Some(_)) => more as u32 + 1,
            _ => 0,
        }
    }

    /// What a request answers, with its effect on the model: bytes for the guest, or a status.
    fn answer(&mut self, readable: &[u8], room: usize) -> Result<Option<Vec<u8>>, u8> {
        let number = |at: usize| {
            let bytes = readable.get(at..at + 8).ok_or(status::IOERR)?;
            Ok::<_, u8>(u64::from_le_bytes(bytes.try_into().unwrap()))
        };
        let (kind, sector) = (number(0)? as u32, number(8)?);
        let data = &readable[16..];
        let is_read_only = self.kind == Kind::ReadOnly;
        let sectors = self.disk.len() as u64 / 512;
        let range = |sector: u64, len: u64| {
            let end = sector.checked_add(len / 512).ok_or(status::IOERR)?;
            if !len.is_multiple_of(512) || end > sectors {
                return Err(status::IOERR);
            }
            Ok(sector as usize * 512..end as usize * 512)
        };
        match kind {
            0 if !data.is_empty() => Err(status::IOERR),
            0 => Ok(Some(self.disk[range(sector, room as u64)?].to_vec())),
            1 if is_read_only || room > 0 => Err(status::IOERR),
            1 => {
                self.disk[range(sector, data.len() as u64)?].copy_from_slice(data);
                Ok(None)
            }
            4 if self.served.flush => Ok(None),
            8 if room < 20 => Err(status::IOERR),
            8 => {
                let mut id = b"root".to_vec();
                id.resize(room, 0);
                Ok(Some(id))
            }
            11 | 13
                if kind == 11 && self.served.discard || kind == 13 && self.served.write_zeroes =>
            {
                if data.len() != 16 || room > 0 {
                    return Err(status::IOERR);
                }
                let (count, flags) = (number(24)? & 0xffff_ffff, number(24)? >> 32);
                let range = range(number(16)?, count * 512)?;
                if flags & !u64::from(kind == 13) != 0 {
                    return Err(status::UNSUPP);
                }
                if kind == 13 {
                    self.disk[range].fill(0);
                    return Ok(None);
                }
                // The bytes are as they were, or 0.
                let now = contents(&self.block.disk);
                for at in range {
                    assert!(
                        now[at] == 0 || now[at] == self.disk[at],
                        "byte {at} discarded"
                    );
                    self.disk[at] = now[at];
                }
                Ok(None)
            }
            _ => Err(status::UNSUPP),
        }
    }

    fn check_files(mut self) {
        assert!(contents(&self.block.disk) == self.disk, "the disk");
        self.block.settle().unwrap();
        let mut file = vec![0; self.original.len() + 1];
        let len = self.file.read_at(&mut file, 0).unwrap();
        let expected = match self.kind {
            Kind::Writable => &self.disk,
            _ => &self.original,
        };
        assert!(file[..len] == **expected, "the file of the disk");
        let Some(overlay) = self.overlay.filter(|_| self.kind == Kind::Overlay) else {
            return;
        };
        drop(self.block);
        let base = base_id(&self.file, self.original.len());
        let content = Content::open(&overlay, &base, [0; 16]).unwrap();
        let overlay = Overlay::load(Arc::new(overlay), &content, Durability::Ordered).unwrap();
        let again = Disk::with_overlay(self.file, overlay).unwrap();
        assert!(contents(&again) == self.disk, "the overlay, opened again");
    }
}

/// A device of a saved state: refused just where the disk is not what it was.
pub fn restore(state: &DeviceState<BlockState>) {
    let disk = || Disk::new(memory_file(&[0; 512]), true).unwrap();
    let limiter = RateLimiter::default();
    let made = Block::new(disk(), "root", false, limiter, &state.device, 0);
    let is_another = state.device.is_writable || state.device.overlay.is_some();
    assert_eq!(made.is_err(), is_another);
}
