//! `blkfuzz`: random requests in random chains, compared with a model of the disk.
//!
//! The model is a sum for each sector. It begins with what the disk holds, and knows after each request what the disk
//! must hold now; a sector that was discarded is unknown until it is read, and must then stay what it was. Requests
//! that are in flight at the same time never touch the same sectors, unless both read, so that the model knows their
//! order. Chains are cut anywhere (virtio 1.2, 2.7.4.2): header and data may share a buffer, or be in many that lie
//! apart at odd addresses. Some requests must fail: those beyond the end, and those of no known kind. In the end the
//! whole disk is read and compared.

use super::block::{HEADER, SECTOR, UNTOUCHED, config, feature, request};
use super::{Arguments, Outcome};
use crate::arena::{self, Arena};
use crate::clock::{self, Deadline};
use crate::text::Text;
use crate::virtio::queue::{Buffer, CHAIN_MAX, Queue};
use crate::virtio::{BLOCK, Device};
use crate::{pattern, text, x86};

const SLOTS: usize = 64;
const ENTRIES: u32 = 256;
/// The greatest number of sectors of one request that carries data, and of one that does not.
const SECTORS: u64 = 128;
const RANGE: u64 = 1024;
/// The greatest number of buffers for what the device reads, and for what it writes.
const PIECES: u64 = 18;
/// Bytes that a request may have in one direction.
const STREAM: u64 = SECTORS * SECTOR + HEADER;
/// Unused bytes between two buffers at the most.
const GAP: u64 = 7;
/// A request type that no device knows, and what devices answer (section 5.2.6).
const UNKNOWN_KIND: u32 = 77;
const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;
/// The sum of a sector whose content is not known.
const UNKNOWN: u64 = 0;

/// Numbers without a pattern, the same for the same seed.
struct Random {
    seed: u64,
    taken: u64,
}

impl Random {
    /// From 0 up to, but not including, `limit`.
    fn below(&mut self, limit: u64) -> u64 {
        self.taken += 1;
        pattern::word(self.seed, self.taken) % limit.max(1)
    }
}

/// What the disk must hold.
struct Model {
    sums: u64,
    sectors: u64,
}

impl Model {
    fn get(&self, sector: u64) -> u64 {
        x86::load(self.sums + 8 * sector, 8)
    }

    fn set(&self, sector: u64, sum: u64) {
        x86::store(self.sums + 8 * sector, 8, sum);
    }

    fn sum(bytes: &[u8]) -> u64 {
        match pattern::sum(pattern::SUM_START, bytes) {
            UNKNOWN => 1,
            sum => sum,
        }
    }

    /// Compares what was read from `sector` on; what was not known is known from now on.
    fn compare(&self, sector: u64, bytes: &[u8]) -> Result<(), Text> {
        for (sector, bytes) in (sector..).zip(bytes.chunks(SECTOR as usize)) {
            let (wanted, found) = (self.get(sector), Self::sum(bytes));
            if wanted == UNKNOWN {
                self.set(sector, found);
            } else if wanted != found {
                return Err(text!("sector {sector} has sum {found:x}, not {wanted:x}"));
            }
        }
        Ok(())
    }
}

/// A request in flight.
#[derive(Clone, Copy)]
struct Slot {
    /// Memory for its buffers.
    memory: u64,
    number: u64,
    kind: u32,
    sector: u64,
    count: u64,
    /// The status that it must end with.
    status: u8,
    /// Bytes that the device writes if it succeeds, the status byte included.
    writes: u64,
    /// Seed of the data it writes.
    seed: u64,
    chain: [Buffer; CHAIN_MAX as usize],
    readable: usize,
    total: usize,
    in_flight: bool,
}

impl Slot {
    fn overlaps(&self, sector: u64, count: u64) -> bool {
        self.in_flight && sector < self.sector + self.count && self.sector < sector + count
    }

    /// What the device wrote, in one piece.
    fn gather(&self, space: &mut [u8]) {
        let mut at = 0;
        for buffer in &self.chain[self.readable..self.total] {
            let size = buffer.size as usize;
            space[at..at + size].copy_from_slice(arena::bytes(buffer.address, size as u64));
            at += size;
        }
    }
}

/// How many requests there were of each kind.
#[derive(Default)]
struct Counts {
    reads: u64,
    writes: u64,
    flushes: u64,
    discards: u64,
    zeroes: u64,
    failed: u64,
}

struct Fuzz {
    device: Device,
    queue: Queue,
    random: Random,
    model: Model,
    slots: [Slot; SLOTS],
    /// Which slot a chain's head belongs to.
    owner: [u8; ENTRIES as usize],
    /// One stream of bytes.
    space: &'static mut [u8],
    /// The greatest number of data buffers of a request; 1: header, data and status have a buffer each.
    pieces: u64,
    ranges: [u64; 2],
    counts: Counts,
}

pub fn fuzz(arguments: &mut Arguments) -> Outcome {
    let index = arguments.number("N")?;
    let (seed, operations) = (arguments.number("SEED")?, arguments.number("OPS")?);
    let depth = arguments.number("DEPTH")? as usize;
    let framed = match arguments.text() {
        None => false,
        Some("framed") => true,
        Some(option) => return Err(text!("no option {option}")),
    };
    if depth == 0 || depth > SLOTS {
        return Err("DEPTH out of range".into());
    }
    let mut fuzz = Fuzz::open(index, seed, framed)?;
    fuzz.read_all()?;
    let mut patience = Deadline::in_ms(clock::patience_ms());
    let (mut begun, mut ended) = (0, 0);
    while ended < operations {
        while begun < operations && fuzz.slots[..depth].iter().any(|slot| !slot.in_flight) {
            if !fuzz.begin(depth, begun)? {
                break;
            }
            begun += 1;
        }
        fuzz.kick();
        let before = ended;
        while fuzz.end()? {
            ended += 1;
        }
        if ended != before {
            patience = Deadline::in_ms(clock::patience_ms());
        } else if patience.passed() {
            return Err(text!("{} requests are not answered", begun - ended));
        }
    }
    let sum = fuzz.read_all()?;
    let counts = &fuzz.counts;
    Ok(text!(
        "requests={operations} reads={} writes={} flushes={} discards={} zeroes={} failed={} sectors={} sum={sum:016x}",
        counts.reads,
        counts.writes,
        counts.flushes,
        counts.discards,
        counts.zeroes,
        counts.failed,
        fuzz.model.sectors,
    ))
}

impl Fuzz {
    fn open(index: u64, seed: u64, framed: bool) -> Result<Self, Text> {
        let mut device = Device::find_type(index, BLOCK)?;
        device.negotiate(feature::ALL)?;
        let mut arena = Arena::new();
        let queue = device.queue(&mut arena, 0, ENTRIES)?;
        device.driver_ok();
        let limit = |bit, offset, without: u64| match device.features & bit {
            0 => without,
            _ => device.config(offset, 4),
        };
        let pieces = match framed {
            true => 1,
            false => limit(feature::SEG_MAX, config::SEG_MAX, 1).clamp(1, PIECES),
        };
        let ranges = [
            limit(feature::DISCARD, config::MAX_DISCARD, 0),
            limit(feature::WRITE_ZEROES, config::MAX_ZEROES, 0),
        ];
        let sectors = device.config(config::CAPACITY, 8);
        if sectors < 2 * SECTORS {
            return Err(text!("a disk of {sectors} sectors is too small"));
        }
        let model = Model {
            sums: arena.take(8 * sectors, 4096)?,
            sectors,
        };
        let space = arena::bytes(arena.take(STREAM + 1, 4096)?, STREAM + 1);
        let mut slots = [Slot {
            memory: 0,
            number: 0,
            kind: 0,
            sector: 0,
            count: 0,
            status: 0,
            writes: 0,
            seed: 0,
            chain: [Buffer::readable(0, 0); CHAIN_MAX as usize],
            readable: 0,
            total: 0,
            in_flight: false,
        }; SLOTS];
        for slot in &mut slots {
            slot.memory = arena.take(2 * (STREAM + (PIECES + 1) * GAP), 4096)?;
        }
        Ok(Fuzz {
            device,
            queue,
            random: Random { seed, taken: 0 },
            model,
            slots,
            owner: [0; ENTRIES as usize],
            space,
            pieces,
            ranges,
            counts: Counts::default(),
        })
    }

    /// Chooses a request and publishes it; false when it has to wait for others.
    fn begin(&mut self, depth: usize, number: u64) -> Result<bool, Text> {
        let Some(free) = self.slots[..depth].iter().position(|slot| !slot.in_flight) else {
            return Ok(false);
        };
        let (kind, status) = self.kind();
        let most = match kind {
            request::READ | request::WRITE => SECTORS,
            request::DISCARD => RANGE.min(self.ranges[0]),
            request::WRITE_ZEROES => RANGE.min(self.ranges[1]),
            _ => 0,
        };
        let count = match most {
            0 => 0,
            _ => 1 + self.random.below(most.min(self.model.sectors / 2)),
        };
        let beyond = kind == request::READ && status != OK;
        let sector = match beyond {
            // Its last sector, or all of them, are beyond the end.
            true => self.model.sectors - count + 1 + self.random.below(count),
            false => self.random.below(self.model.sectors - count + 1),
        };
        let reads = kind == request::READ;
        let conflicts =
            |slot: &Slot| slot.overlaps(sector, count) && !(reads && slot.kind == request::READ);
        if !beyond && self.slots.iter().any(conflicts) {
            // It is another one the next time: the numbers go on.
            return Ok(false);
        }
        let mut slot = self.slots[free];
        slot.number = number;
        (slot.kind, slot.sector, slot.status) = (kind, sector, status);
        // What fails touches nothing.
        slot.count = if beyond { 0 } else { count };
        slot.seed = self.random.below(u64::MAX);
        let reads_bytes = self.stream(&slot, count);
        slot.writes = 1 + match kind {
            request::READ => count * SECTOR,
            request::GET_ID => 20,
            _ => 0,
        };
        self.lay_out(&mut slot, reads_bytes);
        slot.in_flight = true;
        let Some(head) = self.queue.add(&slot.chain[..slot.total]) else {
            return Ok(false);
        };
        self.slots[free] = slot;
        *self
            .owner
            .get_mut(usize::from(head))
            .ok_or("a head beyond the ring")? = free as u8;
        Ok(true)
    }

    /// A kind of request, and the status it must end with.
    fn kind(&mut self) -> (u32, u8) {
        let offered = |bit| self.device.features & bit != 0;
        let (discard, zeroes) = (offered(feature::DISCARD), offered(feature::WRITE_ZEROES));
        let flush = offered(feature::FLUSH);
        match self.random.below(100) {
            0..=39 => (request::WRITE, OK),
            40..=44 if flush => (request::FLUSH, OK),
            45..=51 if discard => (request::DISCARD, OK),
            52..=58 if zeroes => (request::WRITE_ZEROES, OK),
            59..=60 => (request::GET_ID, OK),
            61..=62 => (UNKNOWN_KIND, UNSUPPORTED),
            63..=65 => (request::READ, IO_ERROR),
            _ => (request::READ, OK),
        }
    }

    /// Writes what the device shall read of a request into the space; how many bytes.
    fn stream(&mut self, slot: &Slot, count: u64) -> u64 {
        let mut header = [0; HEADER as usize];
        header[..4].copy_from_slice(&slot.kind.to_le_bytes());
        let has_place = matches!(slot.kind, request::READ | request::WRITE);
        let sector = if has_place { slot.sector } else { 0 };
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.space[..HEADER as usize].copy_from_slice(&header);
        let data = &mut self.space[HEADER as usize..];
        match slot.kind {
            request::WRITE => {
                let bytes = count * SECTOR;
                pattern::fill(slot.seed, slot.sector, &mut data[..bytes as usize]);
                HEADER + bytes
            }
            request::DISCARD | request::WRITE_ZEROES => {
                data[..8].copy_from_slice(&slot.sector.to_le_bytes());
                data[8..12].copy_from_slice(&(count as u32).to_le_bytes());
                // Zeroes may be holes, or not.
                let unmap = slot.kind == request::WRITE_ZEROES && slot.seed % 2 == 1;
                data[12..16].copy_from_slice(&u32::from(unmap).to_le_bytes());
                HEADER + 16
            }
            _ => HEADER,
        }
    }

    /// Cuts a request into buffers, and copies what the device shall read into them.
    fn lay_out(&mut self, slot: &mut Slot, reads: u64) {
        let (mut at, mut used) = (slot.memory, 0);
        let mut done = 0;
        while done < reads {
            let whole = if done == 0 && self.pieces == 1 {
                HEADER
            } else {
                reads - done
            };
            let last = used as u64 + 1 >= PIECES;
            let size = if self.pieces == 1 || last {
                whole
            } else {
                self.piece(whole)
            };
            let bytes = &self.space[done as usize..(done + size) as usize];
            arena::bytes(at, size).copy_from_slice(bytes);
            slot.chain[used] = Buffer::readable(at, size as u32);
            used += 1;
            done += size;
            at += size + self.gap();
        }
        slot.readable = used;
        let mut left = slot.writes;
        while left > 0 {
            let whole = if left > 1 && self.pieces == 1 {
                left - 1
            } else {
                left
            };
            let last = used - slot.readable + 1 >= PIECES as usize;
            let size = if self.pieces == 1 || last {
                whole
            } else {
                self.piece(whole)
            };
            arena::bytes(at, size).fill(UNTOUCHED);
            slot.chain[used] = Buffer::writable(at, size as u32);
            used += 1;
            left -= size;
            at += size + self.gap();
        }
        slot.total = used;
    }

    /// The size of the next buffer of `left` bytes: often all, often a few.
    fn piece(&mut self, left: u64) -> u64 {
        match self.random.below(4) {
            0 => left,
            1 => 1 + self.random.below(left.min(32)),
            _ => 1 + self.random.below(left),
        }
    }

    fn gap(&mut self) -> u64 {
        match self.pieces {
            1 => 0,
            _ => self.random.below(GAP + 1),
        }
    }

    fn kick(&mut self) {
        if self.queue.should_kick() {
            self.device.kick(0);
        }
    }

    /// Takes the next completion and checks it; false when there is none.
    fn end(&mut self) -> Result<bool, Text> {
        let Some((head, written)) = self.queue.pop() else {
            return Ok(false);
        };
        let index = *self
            .owner
            .get(usize::from(head))
            .ok_or("completion of no request")?;
        let slot = &mut self.slots[usize::from(index)];
        if !slot.in_flight {
            return Err(text!("completion of head {head}, which is not in flight"));
        }
        slot.in_flight = false;
        let slot = *slot;
        let Slot {
            number,
            kind,
            sector,
            count,
            ..
        } = slot;
        slot.gather(self.space);
        let status = self.space[slot.writes as usize - 1];
        if status != slot.status {
            return Err(text!(
                "request {number}, kind {kind}, {count} sectors at {sector}: status {status}, not {}",
                slot.status
            ));
        }
        let wanted = if status == OK { slot.writes } else { 1 };
        // What failed may have written nothing but its status, or no more than that is said.
        if u64::from(written) != wanted && !(status != OK && written == 0) {
            return Err(text!(
                "request {number}, kind {kind}, {count} sectors at {sector}: {written} bytes written, not {wanted}"
            ));
        }
        self.learn(&slot)
            .map_err(|error| text!("request {number}, {count} sectors at {sector}: {error}"))?;
        Ok(true)
    }

    /// Compares what was read, or notes what was written.
    fn learn(&mut self, slot: &Slot) -> Result<(), Text> {
        let sectors = slot.sector..slot.sector + slot.count;
        let counts = &mut self.counts;
        if slot.status != OK {
            counts.failed += 1;
            return Ok(());
        }
        match slot.kind {
            request::READ => {
                counts.reads += 1;
                let bytes = &self.space[..(slot.count * SECTOR) as usize];
                self.model.compare(slot.sector, bytes)?;
            }
            request::WRITE => {
                counts.writes += 1;
                let mut bytes = [0; SECTOR as usize];
                for sector in sectors {
                    pattern::fill(slot.seed, sector, &mut bytes);
                    self.model.set(sector, Model::sum(&bytes));
                }
            }
            request::DISCARD => {
                counts.discards += 1;
                sectors.for_each(|sector| self.model.set(sector, UNKNOWN));
            }
            request::WRITE_ZEROES => {
                counts.zeroes += 1;
                let sum = Model::sum(&[0; SECTOR as usize]);
                sectors.for_each(|sector| self.model.set(sector, sum));
            }
            request::FLUSH => counts.flushes += 1,
            _ => {}
        }
        Ok(())
    }

    /// Reads the whole disk, one request at a time, and compares it; its sum.
    fn read_all(&mut self) -> Result<u64, Text> {
        let mut sum = pattern::SUM_START;
        let mut sector = 0;
        while sector < self.model.sectors {
            let count = SECTORS.min(self.model.sectors - sector);
            let mut slot = self.slots[0];
            (slot.kind, slot.sector, slot.count) = (request::READ, sector, count);
            (slot.status, slot.writes) = (OK, count * SECTOR + 1);
            let reads = self.stream(&slot, count);
            self.lay_out(&mut slot, reads);
            slot.in_flight = true;
            let head = self.queue.add(&slot.chain[..slot.total]);
            self.owner[usize::from(head.ok_or("ring full")?)] = 0;
            self.slots[0] = slot;
            self.kick();
            let limit = Deadline::in_ms(clock::patience_ms());
            while !self.end()? {
                if limit.passed() {
                    return Err(text!("a read of sector {sector} is not answered"));
                }
                core::hint::spin_loop();
            }
            sum = pattern::sum(sum, &self.space[..(count * SECTOR) as usize]);
            sector += count;
        }
        Ok(sum)
    }
}
