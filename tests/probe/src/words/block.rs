//! Words for virtio-block (virtio 1.2, section 5.2).

use super::{Arguments, Outcome};
use crate::arena::{self, Arena};
use crate::clock::{self, Moment};
use crate::text::Text;
use crate::virtio::queue::{Buffer, Interrupts, Queue};
use crate::virtio::{BLOCK, Device};
use crate::{pattern, serial, text, x86};

/// Feature bits (section 5.2.3).
pub mod feature {
    pub const SIZE_MAX: u64 = 1 << 1;
    pub const SEG_MAX: u64 = 1 << 2;
    pub const RO: u64 = 1 << 5;
    pub const BLK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
    pub const TOPOLOGY: u64 = 1 << 10;
    pub const CONFIG_WCE: u64 = 1 << 11;
    pub const MQ: u64 = 1 << 12;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
    pub const ALL: u64 = SIZE_MAX
        | SEG_MAX
        | RO
        | BLK_SIZE
        | FLUSH
        | TOPOLOGY
        | CONFIG_WCE
        | MQ
        | DISCARD
        | WRITE_ZEROES;
}

/// Offsets in the configuration space (section 5.2.4).
pub mod config {
    pub const CAPACITY: u64 = 0;
    pub const SIZE_MAX: u64 = 8;
    pub const SEG_MAX: u64 = 12;
    pub const BLK_SIZE: u64 = 20;
    pub const NUM_QUEUES: u64 = 34;
    pub const MAX_DISCARD: u64 = 36;
    pub const MAX_ZEROES: u64 = 48;
}

/// Request types (section 5.2.6).
pub mod request {
    pub const READ: u32 = 0;
    pub const WRITE: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const GET_ID: u32 = 8;
    pub const DISCARD: u32 = 11;
    pub const WRITE_ZEROES: u32 = 13;
}

pub const SECTOR: u64 = 512;
pub const HEADER: u64 = 16;
/// Size of what GET_ID returns.
const ID: u64 = 20;
/// Most bytes of one request of the simple words.
const CHUNK: u64 = 256 << 10;
/// A status byte no device writes.
pub const UNTOUCHED: u8 = 0xee;

/// A running block device with one queue, one request at a time.
pub struct Disk {
    pub device: Device,
    pub queue: Queue,
    pub arena: Arena,
    /// Request header, status byte behind it.
    header: u64,
    data: u64,
    pub capacity: u64,
}

impl Disk {
    pub fn open(index: u64) -> Result<Self, Text> {
        Self::open_with(Device::find_type(index, BLOCK)?, feature::ALL)
    }

    pub fn open_with(mut device: Device, features: u64) -> Result<Self, Text> {
        let mut arena = Arena::new();
        device.negotiate(features)?;
        let queue = device.queue(&mut arena, 0, 256)?;
        let header = arena.take(HEADER + 1, 64)?;
        let data = arena.take(CHUNK, 4096)?;
        device.driver_ok();
        let capacity = device.config(config::CAPACITY, 8);
        Ok(Disk {
            device,
            queue,
            arena,
            header,
            data,
            capacity,
        })
    }

    pub fn has(&self, feature: u64) -> bool {
        self.device.features & feature != 0
    }

    /// One request with the given data buffers: status byte and bytes written.
    fn request(&mut self, kind: u32, sector: u64, data: &[Buffer]) -> Result<(u8, u32), Text> {
        let status = self.header + HEADER;
        x86::store(self.header, 4, u64::from(kind));
        x86::store(self.header + 4, 4, 0);
        x86::store(self.header + 8, 8, sector);
        x86::store(status, 1, u64::from(UNTOUCHED));
        let mut chain = [Buffer::readable(self.header, HEADER as u32); 32];
        let count = data.len() + 2;
        chain
            .get_mut(1..count - 1)
            .ok_or("too many buffers")?
            .copy_from_slice(data);
        chain[count - 1] = Buffer::writable(status, 1);
        self.queue.add(&chain[..count]).ok_or("ring full")?;
        if self.queue.should_kick() {
            self.device.kick(0);
        }
        let mut done = None;
        clock::wait_until(clock::patience_ms(), || {
            done = self.queue.pop();
            done.is_some()
        });
        let (_, written) = done.ok_or_else(|| {
            text!(
                "request {kind} not answered, status {:#x}",
                self.device.status()
            )
        })?;
        Ok((x86::load(status, 1) as u8, written))
    }

    /// The same, with anything but success as an error.
    fn succeed(&mut self, kind: u32, sector: u64, data: &[Buffer]) -> Result<u32, Text> {
        match self.request(kind, sector, data)? {
            (0, written) => Ok(written),
            (status, _) => Err(text!("request {kind} at sector {sector}: status {status}")),
        }
    }

    /// Reads at most `CHUNK` bytes.
    fn read(&mut self, sector: u64, size: u64) -> Result<&'static mut [u8], Text> {
        let buffer = Buffer::writable(self.data, size as u32);
        let written = self.succeed(request::READ, sector, &[buffer])?;
        if u64::from(written) != size + 1 {
            return Err(text!("read of {size} bytes says it wrote {written}"));
        }
        Ok(arena::bytes(self.data, size))
    }

    /// What GET_ID returns.
    pub fn id(&mut self, id: &mut [u8; ID as usize]) -> Result<(), Text> {
        let buffer = Buffer::writable(self.data, ID as u32);
        self.succeed(request::GET_ID, 0, &[buffer])?;
        id.copy_from_slice(arena::bytes(self.data, ID));
        Ok(())
    }

    /// Whether ordinary requests work: the check after an attack.
    pub fn health(&mut self) -> Result<(), Text> {
        let mut id = [0; ID as usize];
        self.id(&mut id)?;
        if self.capacity > 0 {
            self.read(0, SECTOR)?;
        }
        Ok(())
    }
}

/// Sectors `SECTOR:COUNT` of the arguments, in pieces of at most `CHUNK`: (sector, size).
fn pieces(sector: u64, count: u64) -> impl Iterator<Item = (u64, u64)> {
    let step = CHUNK / SECTOR;
    (0..count)
        .step_by(step as usize)
        .map(move |done| (sector + done, (count - done).min(step) * SECTOR))
}

pub fn info(arguments: &mut Arguments) -> Outcome {
    let mut disk = Disk::open(arguments.number("N")?)?;
    let offered = disk.device.offered();
    let mut id = [0; ID as usize];
    let id_text = match disk.id(&mut id) {
        Ok(()) => text!("{}", printable(&id)),
        Err(error) => error,
    };
    let field = |feature, offset, size| match disk.has(feature) {
        true => disk.device.config(offset, size),
        false => 0,
    };
    Ok(text!(
        "offered={offered:#x} features={:#x} capacity={} ro={} flush={} discard={} zeroes={} queues={} queue-size={} seg-max={} size-max={} blk-size={} id={id_text}",
        disk.device.features,
        disk.capacity,
        disk.has(feature::RO),
        disk.has(feature::FLUSH),
        disk.has(feature::DISCARD),
        disk.has(feature::WRITE_ZEROES),
        field(feature::MQ, config::NUM_QUEUES, 2).max(1),
        disk.device.queue_size_max(0),
        field(feature::SEG_MAX, config::SEG_MAX, 4),
        field(feature::SIZE_MAX, config::SIZE_MAX, 4),
        field(feature::BLK_SIZE, config::BLK_SIZE, 4),
    ))
}

/// An id up to its first zero.
fn printable(id: &[u8]) -> &str {
    let end = id.iter().position(|byte| *byte == 0).unwrap_or(id.len());
    core::str::from_utf8(&id[..end]).unwrap_or("?")
}

pub fn read(arguments: &mut Arguments) -> Outcome {
    let mut disk = Disk::open(arguments.number("N")?)?;
    let (sector, count) = (
        arguments.number("SECTOR")?,
        arguments.number_or("COUNT", 1)?,
    );
    // One completion with its interrupt, so that a test can see that there was one.
    disk.queue.ask_for_interrupts(Interrupts::Next);
    let mut sum = pattern::SUM_START;
    let mut first = [0u8; 16];
    for (at, size) in pieces(sector, count) {
        let bytes = disk.read(at, size)?;
        if at == sector {
            first.copy_from_slice(&bytes[..16]);
        }
        sum = pattern::sum(sum, bytes);
    }
    // The interrupt comes after the completion that polling has seen already.
    let mut interrupts = disk.device.take_interrupts();
    for _ in 0..10_000 {
        if interrupts != 0 {
            break;
        }
        core::hint::spin_loop();
        interrupts = disk.device.take_interrupts();
    }
    Ok(text!(
        "sum={sum:016x} isr={interrupts} first={:032x}",
        u128::from_be_bytes(first)
    ))
}

pub fn write(arguments: &mut Arguments) -> Outcome {
    let disk = Disk::open(arguments.number("N")?)?;
    write_to(disk, arguments)
}

/// The same, by a driver that accepts no feature of block devices.
pub fn write_plainly(arguments: &mut Arguments) -> Outcome {
    let device = Device::find_type(arguments.number("N")?, BLOCK)?;
    write_to(Disk::open_with(device, 0)?, arguments)
}

fn write_to(mut disk: Disk, arguments: &mut Arguments) -> Outcome {
    let (sector, count) = (arguments.number("SECTOR")?, arguments.number("COUNT")?);
    let seed = arguments.number("SEED")?;
    let mut sum = pattern::SUM_START;
    for (at, size) in pieces(sector, count) {
        let bytes = arena::bytes(disk.data, size);
        pattern::fill(seed, at, bytes);
        sum = pattern::sum(sum, bytes);
        let buffer = Buffer::readable(disk.data, size as u32);
        disk.succeed(request::WRITE, at, &[buffer])?;
    }
    Ok(text!("sum={sum:016x}"))
}

pub fn verify(arguments: &mut Arguments) -> Outcome {
    let mut disk = Disk::open(arguments.number("N")?)?;
    let (sector, count) = (arguments.number("SECTOR")?, arguments.number("COUNT")?);
    let seed = arguments.number("SEED")?;
    for (at, size) in pieces(sector, count) {
        let bytes = disk.read(at, size)?;
        if let Some(offset) = pattern::first_difference(seed, at, bytes) {
            return Err(text!(
                "first difference at byte {}",
                at * SECTOR + offset as u64
            ));
        }
    }
    Ok(text!("{count} sectors"))
}

pub fn scatter(arguments: &mut Arguments) -> Outcome {
    let mut disk = Disk::open(arguments.number("N")?)?;
    let (sector, count) = (
        arguments.number("SECTOR")?,
        arguments.number_or("COUNT", 16)?,
    );
    let size = count * SECTOR;
    if size > CHUNK / 2 {
        return Err("COUNT is too large for one request".into());
    }
    let plain = pattern::sum(pattern::SUM_START, disk.read(sector, size)?);
    // Uneven pieces: odd sizes, a byte apart in the second half of the buffer.
    let mut buffers = [Buffer::writable(0, 0); 30];
    let (mut used, mut done, mut at) = (0, 0, disk.data + CHUNK / 2);
    while done < size {
        let last = used + 1 == buffers.len();
        let piece = if last {
            size - done
        } else {
            (61 + 97 * used as u64).min(size - done)
        };
        buffers[used] = Buffer::writable(at, piece as u32);
        used += 1;
        done += piece;
        at += piece + 1;
    }
    disk.succeed(request::READ, sector, &buffers[..used])?;
    let sum = buffers[..used]
        .iter()
        .fold(pattern::SUM_START, |sum, buffer| {
            pattern::sum(sum, arena::bytes(buffer.address, u64::from(buffer.size)))
        });
    let result = text!("{used} buffers sum={sum:016x} plain={plain:016x}");
    if sum == plain {
        Ok(result)
    } else {
        Err(result)
    }
}

pub fn flush(arguments: &mut Arguments) -> Outcome {
    let mut disk = Disk::open(arguments.number("N")?)?;
    disk.succeed(request::FLUSH, 0, &[])?;
    Ok(text!("offered={}", disk.has(feature::FLUSH)))
}

pub fn discard(arguments: &mut Arguments) -> Outcome {
    range(arguments, request::DISCARD, feature::DISCARD)
}

pub fn zero(arguments: &mut Arguments) -> Outcome {
    range(arguments, request::WRITE_ZEROES, feature::WRITE_ZEROES)
}

/// A request whose data is one segment: sector, number of sectors, flags.
fn range(arguments: &mut Arguments, kind: u32, feature: u64) -> Outcome {
    let mut disk = Disk::open(arguments.number("N")?)?;
    let (sector, count) = (arguments.number("SECTOR")?, arguments.number("COUNT")?);
    if !disk.has(feature) {
        return Err("not offered".into());
    }
    x86::store(disk.data, 8, sector);
    x86::store(disk.data + 8, 8, count);
    let buffer = Buffer::readable(disk.data, 16);
    disk.succeed(kind, 0, &[buffer])?;
    Ok(text!("{count} sectors"))
}

/// What `blkbench` does with the disk.
struct Load {
    kind: u32,
    random: bool,
}

pub fn bench(arguments: &mut Arguments) -> Outcome {
    let mut disk = Disk::open(arguments.number("N")?)?;
    let (size, operations) = (arguments.number("SIZE")?, arguments.number("OPS")?);
    let depth = arguments.number("DEPTH")?;
    let mode = arguments.text().unwrap_or("read");
    let load = match mode {
        "read" => Load {
            kind: request::READ,
            random: false,
        },
        "write" => Load {
            kind: request::WRITE,
            random: false,
        },
        "randread" => Load {
            kind: request::READ,
            random: true,
        },
        "randwrite" => Load {
            kind: request::WRITE,
            random: true,
        },
        _ => return Err(text!("no mode {mode}")),
    };
    let blocks = (disk.capacity * SECTOR).checked_div(size).unwrap_or(0);
    if size % SECTOR != 0 || blocks == 0 || depth == 0 || depth > SLOTS as u64 || operations == 0 {
        return Err("SIZE, OPS or DEPTH out of range".into());
    }
    let result = run(&mut disk, &load, size, blocks, operations, depth)?;
    let ns = clock::ns(result.ticks).max(1);
    let per_second = |amount: u64| (u128::from(amount) * 1_000_000_000 / u128::from(ns)) as u64;
    serial::line(format_args!(
        "  blkbench mode={mode} size={size} ops={operations} depth={depth} ns={ns} ticks={} kicks={}",
        result.ticks, result.kicks
    ));
    Ok(text!(
        "iops={} mib/s={} latency-ns min={} mean={} max={}",
        per_second(operations),
        per_second(operations.saturating_mul(size)) >> 20,
        clock::ns(result.least),
        clock::ns(result.total / operations),
        clock::ns(result.most),
    ))
}

/// Most requests in flight.
const SLOTS: usize = 128;

/// One request in flight.
#[derive(Clone, Copy, Default)]
struct Slot {
    header: u64,
    data: u64,
    started: u64,
}

/// Figures of a run, in ticks.
struct Run {
    ticks: u64,
    total: u64,
    least: u64,
    most: u64,
    kicks: u64,
}

fn run(
    disk: &mut Disk,
    load: &Load,
    size: u64,
    blocks: u64,
    operations: u64,
    depth: u64,
) -> Result<Run, Text> {
    let mut slots = [Slot::default(); SLOTS];
    // Which slot a chain's head belongs to.
    let mut owner = [0u8; 256];
    let mut idle = [0u8; SLOTS];
    for (i, slot) in slots[..depth as usize].iter_mut().enumerate() {
        slot.header = disk.arena.take(HEADER + 1, 64)?;
        slot.data = disk.arena.reserve(size, 4096)?;
        // Pages a device has to fault in would be measured with the first requests.
        pattern::fill(i as u64, 0, arena::bytes(slot.data, size));
        idle[i] = i as u8;
    }
    let mut idle_count = depth as usize;
    let (mut submitted, mut completed) = (0, 0);
    let mut figures = Run {
        ticks: 0,
        total: 0,
        least: u64::MAX,
        most: 0,
        kicks: 0,
    };
    let start = x86::rdtsc();
    let mut last_progress = Moment::now();
    while completed < operations {
        while idle_count > 0 && submitted < operations {
            let index = idle[idle_count - 1];
            let slot = &mut slots[usize::from(index)];
            let block = match load.random {
                true => pattern::word(1, submitted) % blocks,
                false => submitted % blocks,
            };
            x86::store(slot.header, 8, u64::from(load.kind));
            x86::store(slot.header + 8, 8, block * (size / SECTOR));
            x86::store(slot.header + HEADER, 1, u64::from(UNTOUCHED));
            let data = Buffer {
                address: slot.data,
                size: size as u32,
                writable: load.kind == request::READ,
            };
            let chain = [
                Buffer::readable(slot.header, HEADER as u32),
                data,
                Buffer::writable(slot.header + HEADER, 1),
            ];
            let Some(head) = disk.queue.add(&chain) else {
                break;
            };
            slot.started = x86::rdtsc();
            owner[usize::from(head)] = index;
            idle_count -= 1;
            submitted += 1;
        }
        if disk.queue.should_kick() {
            disk.device.kick(0);
            figures.kicks += 1;
        }
        let before = completed;
        while let Some((head, _)) = disk.queue.pop() {
            let index = *owner
                .get(usize::from(head))
                .ok_or("completion of no request")?;
            let slot = &slots[usize::from(index)];
            let status = x86::load(slot.header + HEADER, 1);
            if status != 0 {
                return Err(text!("status {status} after {completed} requests"));
            }
            let ticks = x86::rdtsc() - slot.started;
            figures.total += ticks;
            figures.least = figures.least.min(ticks);
            figures.most = figures.most.max(ticks);
            *idle
                .get_mut(idle_count)
                .ok_or("more completions than requests")? = index;
            idle_count += 1;
            completed += 1;
        }
        if completed != before {
            last_progress = Moment::now();
        } else if last_progress.elapsed_ns() > clock::patience_ms() * 1_000_000 {
            return Err(text!("no answer after {completed} requests"));
        }
    }
    figures.ticks = x86::rdtsc() - start;
    Ok(figures)
}
