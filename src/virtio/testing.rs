//! The guest's half, for tests: rings in real guest memory by virtio-queue's mock, and a driver
//! that goes through the registers as a guest does.

use std::time::{Duration, Instant};

use serde_json::Value;
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::mock::{AvailRing, DescriptorTable, UsedRing};
use vm_memory::{Bytes, GuestAddress};

use super::registers::Registers;
use super::{QueueLayout, Ram, feature};
use crate::bus::{Registers as _, Written};
use crate::inbox::{Inbox, Outbox, inbox};
pub use crate::sys::testing::wait_until;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// 1 MiB at 0, a hole of 1 MiB, 1 MiB more.
pub fn ram() -> Ram {
    Ram::from_ranges(&[(GuestAddress(0), 1 << 20), (GuestAddress(2 << 20), 1 << 20)]).unwrap()
}

/// The driver's side of one queue: table, rings, and what has been offered and taken back.
pub struct Rings<'a> {
    pub ram: &'a Ram,
    pub base: u64,
    pub size: u16,
    table: DescriptorTable<'a, Ram>,
    avail: AvailRing<'a, Ram>,
    used: UsedRing<'a, Ram>,
    taken: u16,
}

impl<'a> Rings<'a> {
    /// Rings of `size` entries in the 16 KiB from `base` on.
    pub fn new(ram: &'a Ram, base: u64, size: u16) -> Self {
        ram.write_slice(&[0; 0x4000], GuestAddress(base)).unwrap();
        Rings {
            ram,
            base,
            size,
            table: DescriptorTable::new(ram, GuestAddress(base), size),
            avail: AvailRing::new(ram, GuestAddress(base + 0x2000), size),
            used: UsedRing::new(ram, GuestAddress(base + 0x3000), size),
            taken: 0,
        }
    }

    pub fn layout(&self) -> QueueLayout {
        QueueLayout {
            size: u32::from(self.size),
            ready: true,
            descriptors: self.base,
            avail: self.base + 0x2000,
            used: self.base + 0x3000,
        }
    }

    /// Writes descriptor `index`.
    pub fn describe(&self, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let descriptor = RawDescriptor::from(Descriptor::new(addr, len, flags, next));
        self.table.store(index, descriptor).unwrap();
    }

    /// Writes a chain of (address, length, writable) from descriptor `first` on, and offers it.
    pub fn offer_chain(&self, first: u16, parts: &[(u64, u32, bool)]) {
        for (i, (addr, len, writable)) in parts.iter().enumerate() {
            let index = first + i as u16;
            let mut flags = if *writable { WRITE } else { 0 };
            if i + 1 < parts.len() {
                flags |= NEXT;
            }
            self.describe(index, *addr, *len, flags, index + 1);
        }
        self.offer(first);
    }

    /// Puts `head` into the available ring.
    pub fn offer(&self, head: u16) {
        let index = u16::from_le(self.avail.idx().load());
        let slot = usize::from(index % self.size);
        self.avail.ring().ref_at(slot).unwrap().store(head.to_le());
        self.set_avail_index(index.wrapping_add(1));
    }

    pub fn set_avail_index(&self, index: u16) {
        self.avail.idx().store(index.to_le());
    }

    pub fn set_avail_flags(&self, flags: u16) {
        self.ram
            .write_obj(flags.to_le(), GuestAddress(self.base + 0x2000))
            .unwrap();
    }

    /// The index after which the driver wants an interrupt.
    pub fn set_used_event(&self, index: u16) {
        let at = self.base + 0x2004 + 2 * u64::from(self.size);
        self.ram.write_obj(index.to_le(), GuestAddress(at)).unwrap();
    }

    pub fn used_flags(&self) -> u16 {
        self.ram.read_obj(GuestAddress(self.base + 0x3000)).unwrap()
    }

    pub fn avail_event(&self) -> u16 {
        let at = self.base + 0x3004 + 8 * u64::from(self.size);
        self.ram.read_obj(GuestAddress(at)).unwrap()
    }

    pub fn used_index(&self) -> u16 {
        u16::from_le(self.used.idx().load())
    }

    /// The next used entry, if there is one: head and length.
    pub fn take(&mut self) -> Option<(u32, u32)> {
        if self.used_index() == self.taken {
            return None;
        }
        let slot = usize::from(self.taken % self.size);
        self.taken = self.taken.wrapping_add(1);
        let entry = self.used.ring().ref_at(slot).unwrap().load();
        Some((entry.id(), entry.len()))
    }

    /// How many used entries were taken.
    pub fn taken(&self) -> u16 {
        self.taken
    }

    /// The next used entry, once there is one.
    pub fn wait(&mut self) -> (u32, u32) {
        let until = Instant::now() + Duration::from_secs(120);
        loop {
            if let Some(entry) = self.take() {
                return entry;
            }
            assert!(Instant::now() < until, "the device does not answer");
            std::thread::sleep(Duration::from_micros(50));
        }
    }
}

pub fn read32(registers: &Registers, offset: u64) -> u32 {
    let mut data = [0xee; 4];
    registers.read(offset, &mut data);
    u32::from_le_bytes(data)
}

pub fn write32(registers: &Registers, offset: u64, value: u32) {
    assert!(matches!(
        registers.write(offset, &value.to_le_bytes()),
        Written::Done
    ));
}

/// Goes through the initialisation of virtio 1.2, 3.1, up to FEATURES_OK; whether it was granted.
pub fn negotiate(registers: &Registers, features: u64) -> bool {
    write32(registers, 0x70, 1);
    write32(registers, 0x70, 3);
    for (page, half) in [(0, features), (1, features >> 32)] {
        write32(registers, 0x24, page);
        write32(registers, 0x20, half as u32);
    }
    write32(registers, 0x70, 11);
    read32(registers, 0x70) & 8 != 0
}

/// Describes queue `index` to the device.
pub fn set_queue(registers: &Registers, index: u32, layout: &QueueLayout) {
    write32(registers, 0x30, index);
    write32(registers, 0x38, layout.size);
    for (offset, addr) in [
        (0x80, layout.descriptors),
        (0x90, layout.avail),
        (0xa0, layout.used),
    ] {
        write32(registers, offset, addr as u32);
        write32(registers, offset + 4, (addr >> 32) as u32);
    }
    write32(registers, 0x44, u32::from(layout.ready));
}

/// All of it, DRIVER_OK included.
pub fn start(registers: &Registers, features: u64, layouts: &[QueueLayout]) {
    assert!(negotiate(registers, features | feature::VERSION_1));
    for (index, layout) in (0..).zip(layouts) {
        set_queue(registers, index, layout);
    }
    write32(registers, 0x70, 15);
}

/// Writes 0 to Status and waits as a vCPU does.
pub fn reset(registers: &Registers) {
    if let Written::After(ticket) = registers.write(0x70, &[0; 4]) {
        let until = Instant::now() + Duration::from_secs(120);
        while !ticket.is_done() {
            assert!(Instant::now() < until, "the reset does not end");
            std::thread::park_timeout(Duration::from_millis(10));
        }
    }
    assert_eq!(read32(registers, 0x70), 0);
}

/// An outbox, and where what is posted arrives.
pub fn mailbox<T: Send + 'static>() -> (Outbox<T>, Inbox<T>) {
    let (sender, inbox) = inbox(64).unwrap();
    (sender.outbox(), inbox)
}

/// The next message, once there is one.
pub fn next<T>(inbox: &Inbox<T>) -> T {
    let until = Instant::now() + Duration::from_secs(120);
    loop {
        if let Some(message) = inbox.next() {
            return message;
        }
        assert!(Instant::now() < until, "no message comes");
        std::thread::sleep(Duration::from_micros(50));
    }
}

/// Numbers from a seed (Steele, Lea, Flood: SplitMix).
pub struct Random(u64);

impl Random {
    /// From a seed that is printed, and differs from run to run unless MAYFLY_SEED is set.
    pub fn printed() -> Self {
        let set = std::env::var("MAYFLY_SEED").ok();
        let seed = set.map_or_else(
            || u64::from(std::process::id()),
            |seed| seed.parse().expect("MAYFLY_SEED is a number"),
        );
        println!("MAYFLY_SEED={seed}");
        Random(seed)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ z >> 31) % end
    }

    /// Whether it is one case of `cases`.
    pub fn one_in(&mut self, cases: u64) -> bool {
        self.below(cases) == 0
    }
}

/// Changes one thing somewhere in `value`: a number, a text, a whole part of it.
pub fn spoil(value: &mut Value, random: &mut Random) {
    let inner: Vec<&mut Value> = match value {
        Value::Array(items) => items.iter_mut().collect(),
        Value::Object(members) => members.values_mut().collect(),
        _ => Vec::new(),
    };
    let count = inner.len() as u64;
    if count > 0 && !random.one_in(40) {
        let at = random.below(count) as usize;
        return spoil(inner.into_iter().nth(at).unwrap(), random);
    }
    match value {
        Value::Array(items) if !items.is_empty() && !random.one_in(4) => {
            let at = random.below(items.len() as u64) as usize;
            if random.one_in(2) {
                items.remove(at);
            } else {
                let item = items[at].clone();
                items.resize(items.len() + random.below(600) as usize, item);
            }
        }
        Value::Object(members) if !members.is_empty() && !random.one_in(4) => {
            let at = random.below(members.len() as u64) as usize;
            let name = members.keys().nth(at).unwrap().clone();
            members.remove(&name);
        }
        Value::Number(number) if !random.one_in(20) => {
            let old = number.as_u64().unwrap_or(0);
            let new = match random.below(6) {
                0 => old.wrapping_add(1),
                1 => old.wrapping_sub(1),
                2 => old ^ 1 << random.below(64),
                3 => random.below(1 << 16),
                4 => (1u64 << random.below(64)).wrapping_sub(random.below(2)),
                _ => random.below(u64::MAX),
            };
            *value = new.into();
        }
        Value::String(text) if !random.one_in(20) => {
            let len = random.below(text.len() as u64 + 1) as usize;
            match random.below(3) {
                0 => text.truncate(len & !1),
                1 => text.push_str(&"5a".repeat(random.below(70_000) as usize)),
                _ => *text = ["idle", "active", "broken", "", "0"][random.below(5) as usize].into(),
            }
        }
        _ => {
            *value = match random.below(6) {
                0 => Value::Null,
                1 => random.one_in(2).into(),
                2 => random.below(u64::MAX).into(),
                3 => "active".into(),
                4 => Value::Array(Vec::new()),
                _ => serde_json::json!({}),
            };
        }
    }
}
