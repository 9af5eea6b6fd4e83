//! `blkload`: requests in flight on one or more queues of one or more disks.
//!
//! A lane is one queue with its requests; all lanes are driven by the one processor, in turn. With the option `check`
//! each write has bytes of its own, no two requests in flight have the same place, and what is read is compared with what
//! was last written there: a proof and no measurement. Queues of one disk then have a share of its places each.

use super::{Latency, indices, interrupts, per_second};
use crate::arena::{self, Arena};
use crate::clock::{self, Deadline};
use crate::text::Text;
use crate::virtio::queue::{Buffer, CHAIN_MAX, Interrupts, Queue};
use crate::virtio::{BLOCK, Device};
use crate::words::block::{HEADER, SECTOR, UNTOUCHED, config, feature, request};
use crate::words::{Arguments, Outcome};
use crate::{pattern, serial, text, x86};

/// The greatest number of requests in flight on one queue.
const SLOTS: usize = 256;
const ENTRIES: u32 = 256;
/// What a request's buffer is cut into with the option `pieces`.
const PAGE: u64 = 4096;
/// The greatest number of data buffers of one request: the header and the status byte need one each.
const PIECES: usize = CHAIN_MAX as usize - 2;

/// What is asked for.
struct Load {
    /// Request type of all requests, or of every other one with `mixed`.
    kind: u32,
    mixed: bool,
    random: bool,
    /// Bytes of an operation, and of each buffer of it.
    size: u64,
    piece: u64,
    /// Operations in flight on each queue.
    depth: u64,
    interrupts: Interrupts,
    /// Queues of each disk.
    queues: u64,
    check: bool,
}

impl Load {
    /// `MODE:SIZE:DEPTH` and what `MODE` means.
    fn read(arguments: &mut Arguments) -> Result<Self, Text> {
        let mode = arguments.text().ok_or("MODE is missing")?;
        let (kind, mixed, random) = match mode {
            "read" => (request::READ, false, false),
            "write" => (request::WRITE, false, false),
            "randread" => (request::READ, false, true),
            "randwrite" => (request::WRITE, false, true),
            "randrw" => (request::READ, true, true),
            _ => return Err(text!("no mode {mode}")),
        };
        let (size, depth) = (arguments.number("SIZE")?, arguments.number("DEPTH")?);
        if size == 0 || !size.is_multiple_of(SECTOR) || depth == 0 || depth > SLOTS as u64 {
            return Err("SIZE or DEPTH out of range".into());
        }
        Ok(Load {
            kind,
            mixed,
            random,
            size,
            piece: size,
            depth,
            interrupts: Interrupts::None,
            queues: 1,
            check: false,
        })
    }

    fn options(&mut self, arguments: &mut Arguments) -> Result<(), Text> {
        while let Some(option) = arguments.text() {
            match (option, interrupts(option)) {
                ("check", _) => self.check = true,
                ("pieces", _) => self.piece = self.size.min(PAGE),
                (_, Some(wanted)) => self.interrupts = wanted,
                _ if option.starts_with("queues=") => {
                    let count = crate::words::number(&option["queues=".len()..]);
                    self.queues = count.filter(|n| *n > 0).ok_or("no number of queues")?;
                }
                _ => return Err(text!("no option {option}")),
            }
        }
        Ok(())
    }
}

/// One request in flight.
#[derive(Clone, Copy, Default)]
struct Slot {
    header: u64,
    /// First buffer; the others follow at the lane's stride.
    data: u64,
    started: u64,
    /// What it does and where.
    kind: u32,
    place: u64,
}

/// One queue of one disk.
struct Lane {
    /// Which of the disks, and which of its queues.
    disk: usize,
    index: u32,
    queue: Queue,
    slots: [Slot; SLOTS],
    /// Which slot a chain's head belongs to.
    owner: [u16; ENTRIES as usize],
    idle: [u16; SLOTS],
    idle_count: usize,
    in_flight: u64,
    /// Bytes of a request, of each of its buffers, and from one buffer to the next.
    size: u64,
    piece: u64,
    stride: u64,
    /// Requests that fit on the disk.
    places: u64,
    /// The first of them.
    first_place: u64,
    /// With `check`, for each place how often it was written, or 0 if that is not known; 0: no check.
    generations: u64,
    checked: u64,
    submitted: u64,
    completed: u64,
    kicks: u64,
    latency: Latency,
}

/// Bit of a generation: a request for the place is in flight.
const BUSY: u64 = 1 << 31;

/// What a disk's features say of requests.
struct Limits {
    /// Bytes of a request, of each of its buffers, and the number of those.
    size: u64,
    piece: u64,
    pieces: u64,
    /// Requests in flight on one queue that make up the operations asked for.
    depth: u64,
    /// Requests that fit on the disk.
    places: u64,
}

impl Limits {
    fn read(device: &Device, load: &Load) -> Result<Self, Text> {
        let limit = |bit, offset, without: u64| match device.features & bit {
            0 => without,
            _ => device.config(offset, 4).max(1),
        };
        // A device that does not say how many buffers a request may have gets one, as from Linux.
        let pieces_max = limit(feature::SEG_MAX, config::SEG_MAX, 1).min(PIECES as u64);
        let piece_max = limit(feature::SIZE_MAX, config::SIZE_MAX, u64::MAX);
        let piece = load.piece.min(piece_max);
        // An operation is cut into requests of the same size.
        let pieces = match load.size.div_ceil(piece) {
            all if all <= pieces_max => all,
            _ => 1 << pieces_max.ilog2(),
        };
        let size = (pieces * piece).min(load.size);
        let depth = load.depth.saturating_mul(load.size.div_ceil(size));
        let places = (device.config(config::CAPACITY, 8) * SECTOR) / size;
        if places == 0 || !load.size.is_multiple_of(size) {
            return Err(text!("requests of {size} bytes do not fit"));
        }
        Ok(Limits {
            size,
            piece,
            pieces,
            depth: depth.min(SLOTS as u64),
            places,
        })
    }
}

impl Lane {
    fn new(
        arena: &mut Arena,
        (disk, device): (usize, &Device),
        index: u32,
        load: &Load,
    ) -> Result<Self, Text> {
        let Limits {
            size,
            piece,
            pieces,
            depth,
            places,
        } = Limits::read(device, load)?;
        let mut queue = device.queue(arena, index, ENTRIES)?;
        queue.ask_for_interrupts(load.interrupts);
        let mut lane = Lane {
            disk,
            index,
            queue,
            slots: [Slot::default(); SLOTS],
            owner: [0; ENTRIES as usize],
            idle: [0; SLOTS],
            idle_count: depth as usize,
            in_flight: 0,
            size,
            piece,
            // Buffers that belong together do not follow one another in memory, unless there is one.
            stride: if pieces > 1 { 2 * piece } else { piece },
            places,
            first_place: 0,
            generations: 0,
            checked: 0,
            submitted: 0,
            completed: 0,
            kicks: 0,
            latency: Latency::new(),
        };
        if load.check {
            lane.places /= load.queues;
            lane.first_place = u64::from(index) * lane.places;
            lane.generations = arena.take(4 * lane.places, 4096)?;
            // Each needs a place to itself.
            lane.idle_count = lane.idle_count.min(lane.places as usize);
        }
        for i in 0..lane.idle_count {
            let slot = &mut lane.slots[i];
            slot.header = arena.take(HEADER + 1, 64)?;
            slot.data = arena.reserve(pieces * lane.stride, PAGE)?;
            // Pages that are touched only now would be measured with the first requests.
            pattern::fill(i as u64, 0, arena::bytes(slot.data, pieces * lane.stride));
            lane.idle[i] = i as u16;
        }
        Ok(lane)
    }

    /// Publishes requests up to the depth, and tells the device if it wants that.
    fn submit(&mut self, device: &Device, load: &Load) {
        while let Some(last) = self.idle_count.checked_sub(1) {
            let index = self.idle[last];
            if !self.publish(load, index) {
                break;
            }
            self.idle_count = last;
            self.submitted += 1;
            self.in_flight += 1;
        }
        if self.queue.should_kick() {
            device.kick(self.index);
            self.kicks += 1;
        }
    }

    /// False when the ring is full.
    fn publish(&mut self, load: &Load, index: u16) -> bool {
        let mut place = match load.random {
            true => pattern::word(u64::from(self.index), self.submitted) % self.places,
            false => self.submitted % self.places,
        };
        let kind = match load.mixed && self.submitted % 2 == 1 {
            true => request::WRITE,
            false => load.kind,
        };
        if self.generations != 0 {
            place = self.take_place(place, kind, index);
        }
        let place = self.first_place + place;
        let slot = &mut self.slots[usize::from(index)];
        (slot.kind, slot.place) = (kind, place);
        x86::store(slot.header, 8, u64::from(kind));
        x86::store(slot.header + 8, 8, place * (self.size / SECTOR));
        x86::store(slot.header + HEADER, 1, u64::from(UNTOUCHED));
        let header = Buffer::readable(slot.header, HEADER as u32);
        let status = Buffer::writable(slot.header + HEADER, 1);
        let data = |address, size: u64| Buffer {
            address,
            size: size as u32,
            writable: kind == request::READ,
        };
        let head = if self.size <= self.piece {
            let chain = [header, data(slot.data, self.size), status];
            self.queue.add(&chain)
        } else {
            let mut chain = [header; CHAIN_MAX as usize];
            let (mut used, mut left, mut at) = (1, self.size, slot.data);
            while left > 0 {
                let size = left.min(self.piece);
                chain[used] = data(at, size);
                used += 1;
                left -= size;
                at += self.stride;
            }
            chain[used] = status;
            self.queue.add(&chain[..=used])
        };
        let Some(head) = head else {
            return false;
        };
        slot.started = x86::rdtsc();
        self.owner[usize::from(head)] = index;
        true
    }

    /// With `check`: the next place that no request in flight has, and for a write its next generation's bytes.
    fn take_place(&mut self, wanted: u64, kind: u32, index: u16) -> u64 {
        let mut place = wanted;
        while self.generation(place) & BUSY != 0 {
            place = (place + 1) % self.places;
        }
        let mut generation = self.generation(place);
        if kind == request::WRITE {
            generation += 1;
            let seed = self.seed(place, generation);
            self.pieces(index, |sector, bytes| {
                pattern::fill(seed, sector, bytes);
                Ok(())
            })
            .unwrap_or_default();
        }
        x86::store(self.generations + 4 * place, 4, generation | BUSY);
        place
    }

    fn generation(&self, place: u64) -> u64 {
        x86::load(self.generations + 4 * place, 4)
    }

    /// The seed of what is written to a place.
    fn seed(&self, place: u64, generation: u64) -> u64 {
        pattern::word(self.first_place + place, generation)
    }

    /// Compares what was read, and gives the place back.
    fn check(&mut self, index: u16) -> Result<(), Text> {
        let Slot { kind, place, .. } = self.slots[usize::from(index)];
        let at = place - self.first_place;
        let generation = self.generation(at) & !BUSY;
        x86::store(self.generations + 4 * at, 4, generation);
        if kind == request::READ && generation != 0 {
            let seed = self.seed(at, generation);
            self.pieces(index, |sector, bytes| {
                let wrong = pattern::first_difference(seed, sector, bytes);
                wrong.map_or(Ok(()), |offset| {
                    Err(text!(
                        "place {place}: byte {offset} of sector {sector} is not what was written"
                    ))
                })
            })?;
            self.checked += 1;
        }
        Ok(())
    }

    /// The buffers of a request, each with the sector of the request that it begins with.
    fn pieces(
        &self,
        index: u16,
        mut each: impl FnMut(u64, &mut [u8]) -> Result<(), Text>,
    ) -> Result<(), Text> {
        let (mut at, mut done) = (self.slots[usize::from(index)].data, 0);
        while done < self.size {
            let size = self.piece.min(self.size - done);
            each(done / SECTOR, arena::bytes(at, size))?;
            done += size;
            at += self.stride;
        }
        Ok(())
    }

    /// Takes completions; says whether there were some.
    fn reap(&mut self) -> Result<bool, Text> {
        let before = self.completed;
        while let Some((head, _)) = self.queue.pop() {
            let index = *self
                .owner
                .get(usize::from(head))
                .ok_or("completion of no request")?;
            let slot = &self.slots[usize::from(index)];
            let status = x86::load(slot.header + HEADER, 1);
            if status != 0 {
                return Err(text!("status {status} after {} requests", self.completed));
            }
            self.latency.add(x86::rdtsc() - slot.started);
            if self.generations != 0 {
                self.check(index)?;
            }
            *self
                .idle
                .get_mut(self.idle_count)
                .ok_or("more completions than requests")? = index;
            self.idle_count += 1;
            self.in_flight -= 1;
            self.completed += 1;
        }
        Ok(self.completed != before)
    }
}

pub fn load(arguments: &mut Arguments) -> Outcome {
    let (disks, count) = indices(arguments.text().ok_or("N is missing")?)?;
    let mut load = Load::read(arguments)?;
    let ms = arguments.number("MS")?;
    load.options(arguments)?;
    let mut arena = Arena::new();
    let mut devices = [const { None }; super::LANES];
    let mut lanes = [const { None }; super::LANES];
    let mut free = lanes.iter_mut();
    for (place, index) in disks[..count].iter().enumerate() {
        let mut device = Device::find_type(*index, BLOCK)?;
        device.negotiate(feature::ALL)?;
        for queue in 0..load.queues {
            let lane = free.next().ok_or("too many queues")?;
            *lane = Some(Lane::new(
                &mut arena,
                (place, &device),
                queue as u32,
                &load,
            )?);
        }
        device.driver_ok();
        devices[place] = Some(device);
    }
    serial::line(format_args!("  blkload begun"));
    let ticks = drive(&devices, &mut lanes, &load, ms)?;
    let (mut requests, mut bytes, mut kicks, mut checked) = (0, 0, 0, 0);
    let mut latency = Latency::new();
    for lane in lanes.iter().flatten() {
        requests += lane.completed;
        bytes += lane.completed * lane.size;
        kicks += lane.kicks;
        checked += lane.checked;
        latency.join(&lane.latency);
    }
    Ok(text!(
        "requests={requests} bytes={bytes} ns={} iops={} kb/s={} kicks={kicks} checked={checked} {}",
        clock::ns(ticks),
        per_second(requests, ticks),
        per_second(bytes, ticks) / 1000,
        latency.text(),
    ))
}

/// Keeps all lanes busy for `ms` milliseconds, then waits for what is in flight; the ticks that took.
fn drive(
    devices: &[Option<Device>],
    lanes: &mut [Option<Lane>],
    load: &Load,
    ms: u64,
) -> Result<u64, Text> {
    let start = x86::rdtsc();
    let end = super::end_of_span(ms);
    let mut patience = Deadline::in_ms(clock::patience_ms());
    loop {
        let going_on = x86::rdtsc() < end;
        let (mut progress, mut in_flight) = (false, 0);
        for lane in lanes.iter_mut().flatten() {
            if going_on && let Some(device) = &devices[lane.disk] {
                lane.submit(device, load);
            }
            progress |= lane.reap()?;
            in_flight += lane.in_flight;
        }
        if !going_on && in_flight == 0 {
            return Ok(x86::rdtsc() - start);
        }
        if progress {
            patience = Deadline::in_ms(clock::patience_ms());
        } else if patience.passed() {
            return Err(text!("{in_flight} requests are not answered"));
        } else {
            core::hint::spin_loop();
        }
    }
}
