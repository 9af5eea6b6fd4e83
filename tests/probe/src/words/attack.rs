//! `attack:N[.QUEUE]:KIND[:COUNT]`: a driver that breaks the rules, on device N.
//!
//! Each kind sets the device up properly, misuses it, waits a little for the reaction and
//! reports what can be seen: status, NEEDS_RESET, interrupt bits, used index, and for a block
//! device the last request's status byte. Then the device is set up again: the word is `ok`
//! when ordinary requests work afterwards. That the monitor is still there goes without saying
//! if there is a line at all. Without QUEUE, the block queue or the transmit queue is attacked.
//!
//! The kinds are the names in [`KINDS`]; `all` runs each of them, `list` prints them.

use super::{Arguments, Outcome, block, net};
use crate::arena::Arena;
use crate::text::Text;
use crate::virtio::queue::{
    Buffer, DESCRIPTOR, INDIRECT, Interrupts, NEXT, Queue, WRITE, set_descriptor,
};
use crate::virtio::{BLOCK, Device, NET, feature, reg, status};
use crate::{boot, clock, pattern, serial, text, x86};

/// How long a device gets to react.
const REACTION_MS: u64 = 5;
/// Repetitions where the word names no number.
const COUNT: u64 = 1000;
/// An address that no machine of ours has memory at.
const NOWHERE: u64 = 1 << 46;

type Attack = fn(&mut Target) -> Result<(), Text>;

const KINDS: &[(&str, Attack)] = &[
    // The available ring.
    ("avail-ahead", |t| t.avail_moved_by(t.queue.size + 1)),
    ("avail-far", |t| t.avail_moved_by(0x8000)),
    ("avail-back", |t| t.avail_moved_by(0xffff)),
    ("head-range", |t| {
        t.publish_all(&[t.queue.size, 0x7fff, 0xffff])
    }),
    ("head-twice", head_twice),
    // Descriptors.
    ("desc-loop", desc_loop),
    ("next-range", next_range),
    ("chain-long", chain_long),
    ("zero-len", |t| t.with_data(|_, _| (None, 0))),
    ("oob", |t| {
        t.each_address(&[NOWHERE, !0xfff, ram_end(), ram_end() - 16])
    }),
    ("wrap", |t| t.each_address(&[u64::MAX - 4, u64::MAX])),
    ("mmio", |t| {
        t.each_address(&[t.device.base(), 0xfee0_0000, 0xfec0_0000])
    }),
    ("huge-len", |t| t.with_data(|_, _| (None, u32::MAX))),
    ("no-flags", |t| t.with_flags(|flags| flags & !WRITE)),
    ("readonly-write", |t| t.with_flags(|flags| flags ^ WRITE)),
    ("odd-flags", |t| t.with_flags(|flags| flags | 0xfff8)),
    ("rings-as-data", |t| {
        t.each_address(&[t.queue.used, t.queue.avail, t.queue.descriptors])
    }),
    // Indirect tables.
    ("indirect-nested", |t| {
        t.indirect(DESCRIPTOR as u32 * 2, 0, INDIRECT)
    }),
    ("indirect-next", |t| {
        t.indirect(DESCRIPTOR as u32 * 2, NEXT, 0)
    }),
    ("indirect-write", |t| {
        t.indirect(DESCRIPTOR as u32 * 2, WRITE, 0)
    }),
    ("indirect-odd", |t| t.indirect(24, 0, 0)),
    ("indirect-empty", |t| t.indirect(0, 0, 0)),
    ("indirect-huge", |t| t.indirect(0xffff_fff0, 0, 0)),
    ("indirect-loop", indirect_loop),
    ("indirect-oob", indirect_oob),
    // Queue registers.
    ("queue-huge", |t| {
        t.sizes(&[0xffff, 0x8000, 0xffff_ffff, 0x1_0000])
    }),
    ("queue-odd", |t| t.sizes(&[0, 3, 255])),
    ("rings-oob", |t| {
        t.rings(&[NOWHERE, !0xfff, ram_end(), ram_end() - 16])
    }),
    ("rings-mmio", |t| t.rings(&[t.device.base(), 0xfee0_0000])),
    ("rings-odd", |t| {
        t.rings(&[t.queue.descriptors + 1, t.queue.descriptors + 2])
    }),
    ("rings-overlap", |t| t.rings(&[t.queue.descriptors])),
    ("rings-late", rings_late),
    ("not-ready", not_ready),
    ("queue-select", queue_select),
    // Status and features.
    ("bad-status", bad_status),
    ("bad-features", bad_features),
    ("early-kick", early_kick),
    ("reset-storm", reset_storm),
    ("reset-busy", reset_busy),
    // Registers.
    ("kick-storm", kick_storm),
    ("kick-range", kick_range),
    ("ack-storm", ack_storm),
    ("config-write", config_write),
    ("odd-access", odd_access),
    ("race", race),
    // Block requests.
    ("sector-range", |t| {
        t.requests(&[
            (0, u64::MAX),
            (0, u64::MAX / 512),
            (0, 1 << 55),
            (1, u64::MAX),
            (1, 1 << 60),
        ])
    }),
    ("request-type", |t| {
        t.requests(&[
            (2, 0),
            (0xffff_ffff, 0),
            (0x8000_0000, 0),
            (13, 0),
            (11, 0),
            (14, 0),
        ])
    }),
    ("request-shape", request_shape),
    ("data-size", |t| {
        t.with_data(|i, size| (None, if i == 1 { 511 } else { size }))
    }),
];

/// One past the last byte of memory below 4 GiB.
fn ram_end() -> u64 {
    let ram = boot::info()
        .regions()
        .iter()
        .filter(|r| r.kind == boot::RAM);
    ram.map(|r| r.end())
        .filter(|end| *end <= 0xc000_0000)
        .max()
        .unwrap_or(NOWHERE)
}

/// A device that has been set up properly, about to be misused.
struct Target {
    device: Device,
    arena: Arena,
    queue: Queue,
    number: u32,
    features: u64,
    /// The device's other queue, which stays as it should be.
    other: Option<(u32, Queue)>,
    /// Some memory for requests: a block header at its start, a status byte at 16, data at 512.
    memory: u64,
    count: u64,
}

const STATUS_BYTE: u64 = 16;
const DATA: u64 = 512;
const MEMORY: u64 = 64 << 10;

pub fn attack(arguments: &mut Arguments) -> Outcome {
    let place = arguments.text().ok_or("N is missing")?;
    let (device, queue) = match place.split_once('.') {
        Some((device, queue)) => (
            device,
            Some(super::number(queue).ok_or("QUEUE is no number")?),
        ),
        None => (place, None),
    };
    let device = super::number(device).ok_or("N is no number")?;
    let kind = arguments.text().ok_or("KIND is missing")?;
    let count = arguments.number_or("COUNT", COUNT)?;
    match kind {
        "list" => {
            KINDS
                .iter()
                .for_each(|(name, _)| serial::line(format_args!("  {name}")));
            Ok(text!("{} kinds", KINDS.len()))
        }
        "all" => all(device, queue, count),
        _ => {
            let known = KINDS.iter().find(|(name, _)| *name == kind);
            let (_, attack) = known.ok_or("no such kind")?;
            one(device, queue, count, *attack)
        }
    }
}

fn all(device: u64, queue: Option<u64>, count: u64) -> Outcome {
    // Without a device that works to begin with, every kind would fail.
    health(device)?;
    let mut failed = 0;
    for (name, attack) in KINDS {
        match one(device, queue, count, *attack) {
            Ok(text) => serial::line(format_args!("  {name} ok {text}")),
            Err(text) => {
                serial::line(format_args!("  {name} FAILED {text}"));
                failed += 1;
            }
        }
    }
    let text = text!("{} of {} kinds", KINDS.len() - failed, KINDS.len());
    if failed == 0 { Ok(text) } else { Err(text) }
}

fn one(device: u64, queue: Option<u64>, count: u64, attack: Attack) -> Outcome {
    let seen = {
        let mut target = Target::set_up(device, queue, count)?;
        let outcome = attack(&mut target);
        clock::wait_ms(REACTION_MS);
        let seen = target.describe();
        match outcome {
            Ok(()) => seen,
            Err(text) => text!("{text}; {seen}"),
        }
    };
    match health(device) {
        Ok(()) => Ok(text!("{seen} after=works")),
        Err(error) => Err(text!("{seen} after={error}")),
    }
}

/// Whether a device can be set up and does its ordinary work.
pub fn health(device: u64) -> Result<(), Text> {
    let device = Device::find(device)?;
    match device.id {
        BLOCK => block::Disk::open_with(device, 0)?.health(),
        NET => net::Nic::open_with(device, 0)?.health(),
        id => Err(text!("device of type {id}")),
    }
}

impl Target {
    fn set_up(device: u64, queue: Option<u64>, count: u64) -> Result<Self, Text> {
        let mut device = Device::find(device)?;
        let (usual, several) = match device.id {
            BLOCK => (1, block::feature::MQ),
            NET => (2, net::feature::MQ | net::feature::CTRL_VQ),
            id => return Err(text!("device of type {id}")),
        };
        let number = queue.unwrap_or(usual - 1) as u32;
        // Queues beyond the usual ones are there for who has accepted that.
        let queues = usual.max(u64::from(number) + 1);
        let features = if queues > usual { several } else { 0 };
        let mut arena = Arena::new();
        device.negotiate(features)?;
        let (mut attacked, mut other) = (None, None);
        for i in 0..queues as u32 {
            let queue = device.queue(&mut arena, i, 256)?;
            if i == number {
                attacked = Some(queue);
            } else {
                other = Some((i, queue));
            }
        }
        let memory = arena.take(MEMORY, 4096)?;
        x86::store(memory + STATUS_BYTE, 1, u64::from(block::UNTOUCHED));
        let mut target = Target {
            device,
            arena,
            queue: attacked.ok_or("no such queue")?,
            number,
            features,
            other,
            memory,
            count,
        };
        // No interrupts suppressed: they are part of what a device may get wrong.
        target.queue.ask_for_interrupts(Interrupts::Each);
        target.device.driver_ok();
        Ok(target)
    }

    /// What can be seen of the device.
    fn describe(&self) -> Text {
        let bits = self.device.status();
        text!(
            "status={bits:#x} needs-reset={} isr={} used={} request-status={:#x}",
            u8::from(bits & status::NEEDS_RESET != 0),
            self.device.read(reg::INTERRUPT_STATUS),
            self.queue.used_index(),
            x86::load(self.memory + STATUS_BYTE, 1),
        )
    }

    /// An ordinary chain for this queue.
    fn chain(&self) -> ([Buffer; 3], usize) {
        let memory = self.memory;
        let chain = match (self.device.id, self.number) {
            (BLOCK, _) => [
                Buffer::readable(memory, block::HEADER as u32),
                Buffer::writable(memory + DATA, 512),
                Buffer::writable(memory + STATUS_BYTE, 1),
            ],
            (_, 0) => [Buffer::writable(memory + DATA, 2048); 3],
            _ => [Buffer::readable(memory + DATA, 72); 3],
        };
        (chain, if self.device.id == BLOCK { 3 } else { 1 })
    }

    /// Puts the ordinary chain into descriptors 0 and up, each changed by `change`, given its
    /// index, (address, size, flags, next); makes it available and kicks.
    fn write_chain(&mut self, change: impl Fn(u16, (u64, u32, u16, u16)) -> (u64, u32, u16, u16)) {
        let (chain, count) = self.chain();
        for (i, buffer) in (0u16..).zip(&chain[..count]) {
            let more = if usize::from(i) + 1 < count { NEXT } else { 0 };
            let flags = if buffer.writable { WRITE } else { 0 };
            let ordinary = (buffer.address, buffer.size, flags | more, i + 1);
            let (address, size, flags, next) = change(i, ordinary);
            self.queue.set_descriptor(i, address, size, flags, next);
        }
        self.queue.publish(0);
        self.kick();
    }

    fn kick(&self) {
        self.device.kick(self.number);
    }

    fn with_data(&mut self, change: fn(u16, u32) -> (Option<u64>, u32)) -> Result<(), Text> {
        self.write_chain(|i, (address, size, flags, next)| {
            let (other, size) = change(i, size);
            (other.unwrap_or(address), size, flags, next)
        });
        Ok(())
    }

    fn with_flags(&mut self, change: fn(u16) -> u16) -> Result<(), Text> {
        self.write_chain(|_, (address, size, flags, next)| (address, size, change(flags), next));
        Ok(())
    }

    /// Each address in each descriptor of a chain, one at a time, then in all of them.
    fn each_address(&mut self, addresses: &[u64]) -> Result<(), Text> {
        for bad in addresses {
            for place in [0, 1, 2, 0xffff] {
                self.write_chain(|i, (address, size, flags, next)| {
                    let hit = place == i || place == 0xffff;
                    (if hit { *bad } else { address }, size, flags, next)
                });
                clock::wait_ms(1);
            }
        }
        Ok(())
    }

    fn avail_moved_by(&mut self, by: u16) -> Result<(), Text> {
        self.write_chain(|_, ordinary| ordinary);
        clock::wait_ms(1);
        let index = self.queue.avail_index();
        self.queue.set_avail_index(index.wrapping_add(by));
        self.kick();
        Ok(())
    }

    fn publish_all(&mut self, heads: &[u16]) -> Result<(), Text> {
        for head in heads {
            self.queue.publish(*head);
            self.kick();
            clock::wait_ms(1);
        }
        Ok(())
    }

    /// One indirect descriptor over a table with an ordinary chain, with the wrong size or
    /// flags outside or inside.
    fn indirect(&mut self, size: u32, outer: u16, inner: u16) -> Result<(), Text> {
        let table = self.arena.take(4096, 4096)?;
        self.fill_table(table, inner);
        if self.device.features & feature::INDIRECT_DESC == 0 {
            serial::line(format_args!("  indirect descriptors were not offered"));
        }
        self.queue
            .set_descriptor(0, table, size, INDIRECT | outer, 1);
        self.queue.set_descriptor(1, self.memory + DATA, 64, 0, 0);
        self.queue.publish(0);
        self.kick();
        Ok(())
    }

    fn fill_table(&self, table: u64, flags: u16) {
        let (chain, count) = self.chain();
        for (i, buffer) in chain[..count].iter().enumerate() {
            let more = if i + 1 < count { NEXT } else { 0 };
            let write = if buffer.writable { WRITE } else { 0 };
            let at = table + i as u64 * DESCRIPTOR;
            set_descriptor(
                at,
                buffer.address,
                buffer.size,
                write | more | flags,
                i as u16 + 1,
            );
        }
    }

    /// Sets up again as far as FEATURES_OK, with empty rings and with the other queue as it
    /// should be: for attacks on the queue registers.
    fn again(&mut self) -> Result<(), Text> {
        self.device.negotiate(self.features)?;
        self.queue.set_avail_index(0);
        x86::store(self.queue.used + 2, 2, 0);
        if let Some((number, queue)) = &self.other {
            self.device.tell_queue(*number, queue);
        }
        Ok(())
    }

    fn sizes(&mut self, sizes: &[u32]) -> Result<(), Text> {
        for size in sizes {
            self.again()?;
            let queue = &self.queue;
            self.device.tell(
                self.number,
                *size,
                queue.descriptors,
                queue.avail,
                queue.used,
            );
            self.device.driver_ok();
            self.write_chain(|_, ordinary| ordinary);
            clock::wait_ms(1);
        }
        Ok(())
    }

    /// Each address as each of the three rings, then as all of them.
    fn rings(&mut self, addresses: &[u64]) -> Result<(), Text> {
        for bad in addresses {
            for place in 0..4 {
                self.again()?;
                let good = [self.queue.descriptors, self.queue.avail, self.queue.used];
                let [descriptors, driver, device] = core::array::from_fn(|i| {
                    if i == place || place == 3 {
                        *bad
                    } else {
                        good[i]
                    }
                });
                let size = u32::from(self.queue.size);
                self.device
                    .tell(self.number, size, descriptors, driver, device);
                self.device.driver_ok();
                self.write_chain(|_, ordinary| ordinary);
                clock::wait_ms(1);
            }
        }
        Ok(())
    }

    /// Block requests of any type and sector.
    fn requests(&mut self, requests: &[(u32, u64)]) -> Result<(), Text> {
        for (kind, sector) in requests {
            x86::store(self.memory, 8, u64::from(*kind));
            x86::store(self.memory + 8, 8, *sector);
            // A write has its data readable.
            let flip = if *kind == block::request::WRITE {
                WRITE
            } else {
                0
            };
            self.write_chain(|i, (address, size, flags, next)| {
                (
                    address,
                    size,
                    if i == 1 { flags ^ flip } else { flags },
                    next,
                )
            });
            clock::wait_ms(1);
        }
        Ok(())
    }
}

fn head_twice(t: &mut Target) -> Result<(), Text> {
    t.write_chain(|_, ordinary| ordinary);
    for _ in 0..t.queue.size {
        t.queue.publish(0);
    }
    t.kick();
    Ok(())
}

fn desc_loop(t: &mut Target) -> Result<(), Text> {
    t.write_chain(|_, (address, size, flags, _)| (address, size, flags | NEXT, 0));
    clock::wait_ms(1);
    // A longer one, and one that the head is no part of.
    for (head, next) in [(0, 1), (1, 2), (2, 0), (3, 0)] {
        t.queue
            .set_descriptor(head, t.memory + DATA, 512, NEXT, next);
    }
    t.publish_all(&[0, 3])
}

fn next_range(t: &mut Target) -> Result<(), Text> {
    for next in [t.queue.size, 0x7fff, 0xffff] {
        t.write_chain(|_, (address, size, flags, _)| (address, size, flags | NEXT, next));
        clock::wait_ms(1);
    }
    Ok(())
}

/// Every descriptor of the ring in one chain, the first few as they should be.
fn chain_long(t: &mut Target) -> Result<(), Text> {
    let (chain, _) = t.chain();
    for i in 0..t.queue.size {
        let buffer = chain[usize::from(i.min(2))];
        let more = if i + 1 < t.queue.size { NEXT } else { 0 };
        let write = if buffer.writable { WRITE } else { 0 };
        t.queue
            .set_descriptor(i, buffer.address, buffer.size, write | more, i + 1);
    }
    t.publish_all(&[0])
}

/// An indirect table whose chain never ends.
fn indirect_loop(t: &mut Target) -> Result<(), Text> {
    let table = t.arena.take(4096, 4096)?;
    t.fill_table(table, NEXT);
    for i in 0..3 {
        // The next index of each entry.
        x86::store(table + i * DESCRIPTOR + 14, 2, (i + 1) % 3);
    }
    t.queue
        .set_descriptor(0, table, 3 * DESCRIPTOR as u32, INDIRECT, 0);
    t.publish_all(&[0])
}

fn indirect_oob(t: &mut Target) -> Result<(), Text> {
    for table in [NOWHERE, !15, ram_end(), ram_end() - 16, t.device.base()] {
        t.queue
            .set_descriptor(0, table, 3 * DESCRIPTOR as u32, INDIRECT, 0);
        t.publish_all(&[0])?;
    }
    Ok(())
}

/// Changes everything about a queue that is in use.
fn rings_late(t: &mut Target) -> Result<(), Text> {
    for (register, value) in [
        (reg::QUEUE_SIZE, 0x4000),
        (reg::QUEUE_DESCRIPTORS, 0xffff_f000),
        (reg::QUEUE_DRIVER + 4, 0xffff),
        (reg::QUEUE_DEVICE, 1),
        (reg::QUEUE_READY, 0),
        (reg::QUEUE_READY, 1),
        (reg::QUEUE_READY, 0xffff_ffff),
        (reg::DRIVER_FEATURES, 0xffff_ffff),
    ] {
        t.device.write(reg::QUEUE_SELECT, t.number);
        t.device.write(register, value);
        t.write_chain(|_, ordinary| ordinary);
    }
    Ok(())
}

fn not_ready(t: &mut Target) -> Result<(), Text> {
    t.again()?;
    t.device.driver_ok();
    t.write_chain(|_, ordinary| ordinary);
    Ok(())
}

/// Queue registers of queues that do not exist.
fn queue_select(t: &mut Target) -> Result<(), Text> {
    for number in [2, 16, 0xff, 0xffff, 0xffff_ffff] {
        t.again()?;
        let max = t.device.queue_size_max(number);
        if max != 0 {
            serial::line(format_args!("  queue {number} has {max} entries"));
        }
        let queue = &t.queue;
        t.device
            .tell(number, 16, queue.descriptors, queue.avail, queue.used);
        t.device.driver_ok();
        t.kick();
    }
    Ok(())
}

/// Every value as first status, then some orders no driver has.
fn bad_status(t: &mut Target) -> Result<(), Text> {
    for value in 0..=0xff {
        t.device.reset()?;
        t.device.write(reg::STATUS, value);
        t.kick();
    }
    for order in [
        &[status::DRIVER_OK][..],
        &[1, 3, 7],
        &[1, 3, 11, 15, 7, 3, 1],
        &[1, 3, 11, 15, 15 | status::FAILED, 15],
        &[1, 3, 11, 15, status::NEEDS_RESET, 15 | status::NEEDS_RESET],
        &[0xffff_ffff, 0xff, 0x7f, 0x1_0000],
    ] {
        t.device.reset()?;
        for value in order {
            t.device.write(reg::STATUS, *value);
            t.kick();
        }
    }
    Ok(())
}

/// Accepts what was never offered, and nothing at all.
fn bad_features(t: &mut Target) -> Result<(), Text> {
    for features in [u64::MAX, 0, 1 << 63, !t.device.offered()] {
        t.device.reset()?;
        t.device.write(reg::STATUS, status::ACKNOWLEDGE);
        t.device
            .write(reg::STATUS, status::ACKNOWLEDGE | status::DRIVER);
        for (select, half) in [(0, features as u32), (1, (features >> 32) as u32), (7, !0)] {
            t.device.write(reg::DRIVER_FEATURES_SELECT, select);
            t.device.write(reg::DRIVER_FEATURES, half);
        }
        let wanted = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
        t.device.write(reg::STATUS, wanted);
        if t.device.status() & status::FEATURES_OK != 0 {
            serial::line(format_args!("  features {features:#x} were accepted"));
        }
        t.device.driver_ok();
        t.kick();
    }
    Ok(())
}

fn early_kick(t: &mut Target) -> Result<(), Text> {
    t.again()?;
    t.device.tell_queue(t.number, &t.queue);
    t.write_chain(|_, ordinary| ordinary);
    t.device.driver_ok();
    Ok(())
}

/// Sets the device up, gives it a request and resets it at once.
fn reset_storm(t: &mut Target) -> Result<(), Text> {
    for _ in 0..t.count {
        t.again()?;
        t.device.tell_queue(t.number, &t.queue);
        t.device.driver_ok();
        t.write_chain(|_, ordinary| ordinary);
    }
    Ok(())
}

/// Resets with a full ring in flight, and looks for writes to memory after the reset.
fn reset_busy(t: &mut Target) -> Result<(), Text> {
    let (chain, count) = t.chain();
    while t.queue.add(&chain[..count]).is_some() {}
    t.kick();
    t.device.reset()?;
    let watched = |t: &Target| {
        let bytes = crate::arena::bytes(t.memory, 4096);
        let used = u64::from(t.queue.used_index());
        pattern::sum(used, bytes)
    };
    crate::arena::bytes(t.memory, 4096).fill(0x5a);
    let before = watched(t);
    clock::wait_ms(20);
    match watched(t) == before {
        true => Ok(()),
        false => Err("memory was WRITTEN AFTER THE RESET".into()),
    }
}

fn kick_storm(t: &mut Target) -> Result<(), Text> {
    t.write_chain(|_, ordinary| ordinary);
    (0..t.count).for_each(|_| t.kick());
    Ok(())
}

fn kick_range(t: &mut Target) -> Result<(), Text> {
    for queue in [1, 2, 3, 8, 0xff, 0xffff, 0x1_0000, 0xffff_ffff] {
        t.device.kick(queue);
        // Notifications are also matched by address and size.
        x86::store(t.device.base() + reg::QUEUE_NOTIFY, 1, u64::from(queue));
        x86::store(t.device.base() + reg::QUEUE_NOTIFY, 2, u64::from(queue));
        x86::store(t.device.base() + reg::QUEUE_NOTIFY, 8, u64::from(queue));
    }
    Ok(())
}

fn ack_storm(t: &mut Target) -> Result<(), Text> {
    t.write_chain(|_, ordinary| ordinary);
    for i in 0..t.count {
        t.device
            .write(reg::INTERRUPT_ACK, pattern::word(1, i) as u32);
        t.device.write(reg::INTERRUPT_STATUS, 3);
    }
    Ok(())
}

/// Writes all over the configuration space.
fn config_write(t: &mut Target) -> Result<(), Text> {
    for offset in (0..0x100).chain(0xef0..0xf00) {
        for size in [1, 2, 4, 8] {
            x86::store(t.device.base() + reg::CONFIG + offset, size, !0);
        }
    }
    t.write_chain(|_, ordinary| ordinary);
    Ok(())
}

/// Every register and the bytes between, in every size; the window's last bytes too.
fn odd_access(t: &mut Target) -> Result<(), Text> {
    for offset in (0..0x120).chain(0xff0..0x1000) {
        for size in [1, 2, 4, 8] {
            let at = t.device.base() + offset;
            x86::load(at, size);
            // Writes that are no registers' size: none may do anything.
            if size != 4 || offset % 4 != 0 {
                x86::store(at, size, !0);
            }
        }
    }
    t.write_chain(|_, ordinary| ordinary);
    Ok(())
}

/// Rewrites the chain while the device looks at it.
fn race(t: &mut Target) -> Result<(), Text> {
    let header = t.memory;
    for i in 0..t.count {
        t.write_chain(|_, ordinary| ordinary);
        for j in 0..50 {
            let dice = pattern::word(i, j);
            let place = (dice % 3) as u16;
            let address = if dice & 8 == 0 {
                t.memory + DATA
            } else {
                NOWHERE
            };
            let size = if dice & 16 == 0 { 512 } else { u32::MAX };
            let flags = (dice >> 8) as u16 & (NEXT | WRITE | INDIRECT);
            t.queue
                .set_descriptor(place, address, size, flags, (dice >> 32) as u16 % 5);
            // Type only among reads and unknown ones: the disk has content.
            x86::store(header, 4, dice >> 40 & 8 | 4);
            x86::store(header + 8, 8, dice);
        }
    }
    Ok(())
}

/// Block requests with pieces missing, too short or in the wrong place.
fn request_shape(t: &mut Target) -> Result<(), Text> {
    let (memory, data) = (t.memory, t.memory + DATA);
    let shapes: [&[(u64, u32, u16)]; 9] = [
        // Header alone, short, split, writable.
        &[(memory, 16, 0)],
        &[
            (memory, 8, 0),
            (data, 512, WRITE),
            (memory + STATUS_BYTE, 1, WRITE),
        ],
        &[
            (memory, 8, 0),
            (memory + 8, 8, 0),
            (data, 512, WRITE),
            (memory + STATUS_BYTE, 1, WRITE),
        ],
        &[
            (memory, 16, WRITE),
            (data, 512, WRITE),
            (memory + STATUS_BYTE, 1, WRITE),
        ],
        // Status alone, empty, readable, part of the data.
        &[(memory + STATUS_BYTE, 1, WRITE)],
        &[
            (memory, 16, 0),
            (data, 512, WRITE),
            (memory + STATUS_BYTE, 0, WRITE),
        ],
        &[
            (memory, 16, 0),
            (data, 512, WRITE),
            (memory + STATUS_BYTE, 1, 0),
        ],
        &[(memory, 16, 0), (data, 513, WRITE)],
        // Readable after writable.
        &[
            (memory, 16, 0),
            (data, 512, WRITE),
            (data, 512, 0),
            (memory + STATUS_BYTE, 1, WRITE),
        ],
    ];
    for shape in shapes {
        let last = shape.len() as u16 - 1;
        for (i, (address, size, flags)) in (0u16..).zip(shape) {
            let more = if i < last { NEXT } else { 0 };
            t.queue
                .set_descriptor(i, *address, *size, flags | more, i + 1);
        }
        t.publish_all(&[0])?;
    }
    Ok(())
}
