//! Split virtqueues (virtio 1.2, 2.7), the device's side.
//!
//! [`QueueLayout`] is what the guest wrote into the registers; [`Queue`] is that, checked, with
//! live indices. They are two types so that neither can be mistaken for the other. The available
//! ring and the notification flags are read and written by virtio-queue; walking descriptors and
//! the used ring are here: a walk must tell an error from an end, and the buffers of one received
//! frame must become visible to the driver all at once (virtio 1.2, 5.1.6.4).
//!
//! Everything the guest wrote is read once, checked, and not read again. A [`Chain`] is fixed
//! storage that is filled anew for each request, so nothing here allocates once it exists.

use std::sync::atomic::{Ordering, fence};

use virtio_queue::desc::split::Descriptor;
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend};

use super::segment::Segment;
use super::{BrokenRing, Ram, feature};

/// The most descriptors a chain may have, an indirect table's included: the size of our queues.
pub const MAX_SEGMENTS: usize = 256;

/// Descriptor flags (virtio 1.2, 2.7.5).
mod descriptor_flag {
    pub const NEXT: u16 = 1;
    pub const WRITE: u16 = 2;
    pub const INDIRECT: u16 = 4;
}

/// Offsets and sizes in the rings (virtio 1.2, 2.7.5, 2.7.6, 2.7.8).
mod ring {
    pub const DESCRIPTOR_SIZE: u64 = 16;
    /// Flags and index, before the entries of both rings.
    pub const HEADER: u64 = 4;
    pub const INDEX: u64 = 2;
    pub const AVAIL_ENTRY: u64 = 2;
    pub const USED_ENTRY: u64 = 8;
    /// The driver's flag "do not interrupt" (2.7.7).
    pub const NO_INTERRUPT: u16 = 1;
}

/// One queue as the guest has described it, unchecked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueLayout {
    /// Entries.
    pub size: u32,
    /// Whether the driver has finished describing it.
    pub ready: bool,
    /// Guest address of the descriptor table.
    pub descriptors: u64,
    /// Guest address of the available ring.
    pub avail: u64,
    /// Guest address of the used ring.
    pub used: u64,
}

/// What is wrong with a chain. The request fails; the queue goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChainError {
    /// More descriptors than the table has, or than we take: a loop, most likely.
    TooLong,
    /// A descriptor names a next one outside its table.
    NextOutOfRange,
    /// A descriptor of no bytes.
    ZeroLength,
    /// A descriptor or table not wholly in RAM.
    OutsideRam,
    /// An indirect table inside an indirect table.
    NestedIndirect,
    /// An indirect table that is no whole number of descriptors, or empty.
    OddIndirect,
    /// An indirect descriptor where none may be: not negotiated, or with a next one.
    UnexpectedIndirect,
    /// A part for the device to read after a part for it to write.
    ReadableAfterWritable,
    /// More than 4 GiB.
    TooLarge,
}

/// A request: the parts the device may read, then those it may write.
#[derive(Debug)]
pub struct Chain {
    head: u16,
    segments: Vec<Segment>,
    readable: usize,
    readable_len: u32,
    writable_len: u32,
}

impl Chain {
    /// Room for one chain.
    pub fn new() -> Self {
        Chain {
            head: 0,
            segments: Vec::with_capacity(MAX_SEGMENTS),
            readable: 0,
            readable_len: 0,
            writable_len: 0,
        }
    }

    /// The descriptor it begins with, which names it in the used ring.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// What the device may read.
    pub fn readable(&self) -> &[Segment] {
        self.segments.get(..self.readable).unwrap_or_default()
    }

    /// What the device may write.
    pub fn writable(&self) -> &[Segment] {
        self.segments.get(self.readable..).unwrap_or_default()
    }

    /// Bytes the device may read.
    pub fn readable_len(&self) -> u32 {
        self.readable_len
    }

    /// Bytes the device may write.
    pub fn writable_len(&self) -> u32 {
        self.writable_len
    }

    fn clear(&mut self, head: u16) {
        self.head = head;
        self.segments.clear();
        self.readable = 0;
        self.readable_len = 0;
        self.writable_len = 0;
    }

    fn push(&mut self, segment: Segment, writable: bool) -> Result<(), ChainError> {
        if self.segments.len() >= MAX_SEGMENTS {
            return Err(ChainError::TooLong);
        }
        let total = if writable {
            &mut self.writable_len
        } else if self.segments.len() > self.readable {
            return Err(ChainError::ReadableAfterWritable);
        } else {
            self.readable = self.readable.saturating_add(1);
            &mut self.readable_len
        };
        *total = total.checked_add(segment.len).ok_or(ChainError::TooLarge)?;
        self.segments.push(segment);
        Ok(())
    }
}

impl Default for Chain {
    fn default() -> Self {
        Chain::new()
    }
}

/// What [`Queue::pop`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Popped {
    /// Nothing; the driver will kick when there is.
    Empty,
    /// A whole, checked chain.
    Chain,
    /// A chain that can not be served; only its head is known.
    Malformed(ChainError),
}

/// A live queue.
#[derive(Debug)]
pub struct Queue {
    ring: virtio_queue::Queue,
    indirect: bool,
    event_idx: bool,
    /// The driver was asked not to kick, because we are looking anyway.
    quiet: bool,
    next_used: u16,
    /// Entries written to the used ring beyond `next_used`, which the driver can not see yet.
    staged: u16,
    /// Entries published since the driver was last considered for an interrupt.
    unannounced: u16,
}

impl Queue {
    /// Checks what the guest described, for a queue of at most `max_size`.
    ///
    /// # Errors
    /// [`BrokenRing::Layout`] when the size is not a power of two up to `max_size`, or a ring is
    /// misaligned or not wholly in RAM.
    pub fn new(
        layout: &QueueLayout,
        max_size: u16,
        features: u64,
        ram: &Ram,
    ) -> Result<Self, BrokenRing> {
        let broken = BrokenRing::Layout;
        let size = u16::try_from(layout.size).map_err(|_| broken)?;
        let event_idx = features & feature::EVENT_IDX != 0;
        let mut ring = virtio_queue::Queue::new(max_size).map_err(|_| broken)?;
        ring.try_set_size(size).map_err(|_| broken)?;
        ring.try_set_desc_table_address(GuestAddress(layout.descriptors))
            .map_err(|_| broken)?;
        ring.try_set_avail_ring_address(GuestAddress(layout.avail))
            .map_err(|_| broken)?;
        ring.try_set_used_ring_address(GuestAddress(layout.used))
            .map_err(|_| broken)?;
        ring.set_event_idx(event_idx);
        ring.set_ready(layout.ready);
        // 0 stands for "never set" in virtio-queue.
        if layout.avail == 0 || !ring.is_valid(ram) {
            return Err(broken);
        }
        Ok(Queue {
            ring,
            indirect: features & feature::INDIRECT_DESC != 0,
            event_idx,
            quiet: false,
            next_used: 0,
            staged: 0,
            unannounced: 0,
        })
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.ring.size()
    }

    /// Takes the next chain into `chain`. When there is none, the driver has been asked to kick.
    ///
    /// # Errors
    /// When the ring can not be trusted any more.
    pub fn pop(&mut self, ram: &Ram, chain: &mut Chain) -> Result<Popped, BrokenRing> {
        let head = loop {
            match self.next_head(ram)? {
                Some(head) => break head,
                None => {
                    self.quiet = false;
                    let more = self.ring.enable_notification(ram);
                    if !more.map_err(|_| BrokenRing::Memory)? {
                        return Ok(Popped::Empty);
                    }
                }
            }
        };
        if !self.quiet {
            self.quiet = true;
            self.ring
                .disable_notification(ram)
                .map_err(|_| BrokenRing::Memory)?;
        }
        if head >= self.ring.size() {
            return Err(BrokenRing::Head);
        }
        chain.clear(head);
        Ok(match self.walk(ram, head, chain) {
            Ok(()) => Popped::Chain,
            Err(error) => Popped::Malformed(error),
        })
    }

    /// Gives back the last `count` chains popped, as if they had not been.
    pub fn rewind(&mut self, count: u16) {
        let next = self.ring.next_avail().wrapping_sub(count);
        self.ring.set_next_avail(next);
    }

    /// Returns chain `head` to the driver with `len` bytes written.
    ///
    /// # Errors
    /// When the used ring can not be written.
    pub fn add_used(&mut self, ram: &Ram, head: u16, len: u32) -> Result<(), BrokenRing> {
        self.stage_used(ram, head, len)?;
        self.publish_used(ram)
    }

    /// As [`Queue::add_used`], not visible to the driver before [`Queue::publish_used`].
    ///
    /// # Errors
    /// When the used ring can not be written.
    pub fn stage_used(&mut self, ram: &Ram, head: u16, len: u32) -> Result<(), BrokenRing> {
        let slot = self
            .next_used
            .wrapping_add(self.staged)
            .checked_rem(self.ring.size())
            .ok_or(BrokenRing::Layout)?;
        let mut entry = [0; ring::USED_ENTRY as usize];
        entry
            .iter_mut()
            .zip(
                u32::from(head)
                    .to_le_bytes()
                    .into_iter()
                    .chain(len.to_le_bytes()),
            )
            .for_each(|(to, from)| *to = from);
        let offset = u64::from(slot)
            .saturating_mul(ring::USED_ENTRY)
            .saturating_add(ring::HEADER);
        ram.write_slice(&entry, self.used_at(offset)?)
            .map_err(|_| BrokenRing::Memory)?;
        self.staged = self.staged.wrapping_add(1);
        Ok(())
    }

    /// Makes all staged entries visible to the driver at once.
    ///
    /// # Errors
    /// When the used ring can not be written.
    pub fn publish_used(&mut self, ram: &Ram) -> Result<(), BrokenRing> {
        self.next_used = self.next_used.wrapping_add(self.staged);
        self.unannounced = self.unannounced.saturating_add(self.staged);
        self.staged = 0;
        ram.store(
            self.next_used.to_le(),
            self.used_at(ring::INDEX)?,
            Ordering::Release,
        )
        .map_err(|_| BrokenRing::Memory)
    }

    /// Whether the driver wants an interrupt for what was published since the last call.
    ///
    /// # Errors
    /// When the available ring can not be read.
    pub fn wants_interrupt(&mut self, ram: &Ram) -> Result<bool, BrokenRing> {
        let published = std::mem::take(&mut self.unannounced);
        if published == 0 {
            return Ok(false);
        }
        // The entries must be visible before the driver's wish is read.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let offset = u64::from(self.ring.size())
                .saturating_mul(ring::AVAIL_ENTRY)
                .saturating_add(ring::HEADER);
            let event = self.load_avail(ram, offset)?;
            // Whether the event index is among the entries just published (2.7.7.1).
            let behind = self.next_used.wrapping_sub(event).wrapping_sub(1);
            Ok(behind < published)
        } else {
            Ok(self.load_avail(ram, 0)? & ring::NO_INTERRUPT == 0)
        }
    }

    fn next_head(&mut self, ram: &Ram) -> Result<Option<u16>, BrokenRing> {
        match self.ring.iter(ram) {
            Ok(mut iter) => Ok(iter.next().map(|chain| chain.head_index())),
            Err(virtio_queue::Error::InvalidAvailRingIndex) => Err(BrokenRing::AvailIndex),
            Err(_) => Err(BrokenRing::Memory),
        }
    }

    fn walk(&self, ram: &Ram, head: u16, chain: &mut Chain) -> Result<(), ChainError> {
        let mut table = GuestAddress(self.ring.desc_table());
        let mut entries = self.ring.size();
        let mut in_indirect = false;
        let mut index = head;
        let mut steps: u16 = 0;
        loop {
            if index >= entries {
                return Err(ChainError::NextOutOfRange);
            }
            steps = steps.saturating_add(1);
            if steps > entries {
                return Err(ChainError::TooLong);
            }
            let at = table
                .checked_add(u64::from(index).saturating_mul(ring::DESCRIPTOR_SIZE))
                .ok_or(ChainError::OutsideRam)?;
            let descriptor: Descriptor = ram.read_obj(at).map_err(|_| ChainError::OutsideRam)?;
            let flags = descriptor.flags();
            let (addr, len) = (descriptor.addr(), descriptor.len());

            if flags & descriptor_flag::INDIRECT != 0 {
                if in_indirect {
                    return Err(ChainError::NestedIndirect);
                }
                if !self.indirect || flags & descriptor_flag::NEXT != 0 {
                    return Err(ChainError::UnexpectedIndirect);
                }
                entries = indirect_entries(len)?;
                check_in_ram(ram, addr, len)?;
                table = addr;
                in_indirect = true;
                index = 0;
                steps = 0;
                continue;
            }

            if len == 0 {
                return Err(ChainError::ZeroLength);
            }
            check_in_ram(ram, addr, len)?;
            chain.push(Segment { addr, len }, flags & descriptor_flag::WRITE != 0)?;
            if flags & descriptor_flag::NEXT == 0 {
                return Ok(());
            }
            index = descriptor.next();
        }
    }

    fn used_at(&self, offset: u64) -> Result<GuestAddress, BrokenRing> {
        GuestAddress(self.ring.used_ring())
            .checked_add(offset)
            .ok_or(BrokenRing::Memory)
    }

    fn load_avail(&self, ram: &Ram, offset: u64) -> Result<u16, BrokenRing> {
        let at = GuestAddress(self.ring.avail_ring())
            .checked_add(offset)
            .ok_or(BrokenRing::Memory)?;
        ram.load(at, Ordering::Relaxed)
            .map(u16::from_le)
            .map_err(|_| BrokenRing::Memory)
    }
}

fn indirect_entries(len: u32) -> Result<u16, ChainError> {
    let len = u64::from(len);
    let entries = len.checked_div(ring::DESCRIPTOR_SIZE).unwrap_or(0);
    if entries == 0 || entries.saturating_mul(ring::DESCRIPTOR_SIZE) != len {
        return Err(ChainError::OddIndirect);
    }
    // A table may be larger than the chain in it; the chain itself is limited in `push`.
    u16::try_from(entries).map_err(|_| ChainError::TooLong)
}

fn check_in_ram(ram: &Ram, addr: GuestAddress, len: u32) -> Result<(), ChainError> {
    let len = usize::try_from(len).map_err(|_| ChainError::OutsideRam)?;
    if ram.check_range(addr, len) {
        Ok(())
    } else {
        Err(ChainError::OutsideRam)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{INDIRECT, NEXT, Rings, WRITE, ram};
    use super::*;

    const BASE: u64 = 0x10000;
    const TABLE: u64 = 0x50000;
    const DATA: u64 = 0x80000;

    fn queue(rings: &Rings<'_>, features: u64) -> Queue {
        Queue::new(&rings.layout(), 256, features, rings.ram).unwrap()
    }

    /// Writes an entry of an indirect table at [`TABLE`].
    fn indirect(ram: &Ram, index: u64, descriptor: (u64, u32, u16, u16)) {
        let (addr, len, flags, next) = descriptor;
        let at = GuestAddress(TABLE + 16 * index);
        ram.write_obj(Descriptor::new(addr, len, flags, next), at)
            .unwrap();
    }

    #[test]
    fn new_when_layout_is_impossible_refuses() {
        let ram = ram();
        let good = Rings::new(&ram, BASE, 16).layout();
        assert!(Queue::new(&good, 256, 0, &ram).is_ok());
        let end = 1 << 20;
        let bad: Vec<(&str, QueueLayout)> = vec![
            ("size 0", QueueLayout { size: 0, ..good }),
            ("size no power of two", QueueLayout { size: 15, ..good }),
            ("size above the maximum", QueueLayout { size: 512, ..good }),
            (
                "size beyond 16 bits",
                QueueLayout {
                    size: 0x10010,
                    ..good
                },
            ),
            (
                "not ready",
                QueueLayout {
                    ready: false,
                    ..good
                },
            ),
            (
                "table misaligned",
                QueueLayout {
                    descriptors: BASE + 8,
                    ..good
                },
            ),
            (
                "avail misaligned",
                QueueLayout {
                    avail: good.avail + 1,
                    ..good
                },
            ),
            (
                "used misaligned",
                QueueLayout {
                    used: good.used + 2,
                    ..good
                },
            ),
            (
                "table across the end",
                QueueLayout {
                    descriptors: end - 16 * 15,
                    ..good
                },
            ),
            (
                "avail across the end",
                QueueLayout {
                    avail: end - 36,
                    ..good
                },
            ),
            (
                "used across the end",
                QueueLayout {
                    used: end - 132,
                    ..good
                },
            ),
            (
                "table in the hole",
                QueueLayout {
                    descriptors: end + 0x1000,
                    ..good
                },
            ),
            ("avail never set", QueueLayout { avail: 0, ..good }),
            (
                "table at the top",
                QueueLayout {
                    descriptors: u64::MAX - 15,
                    ..good
                },
            ),
            (
                "used at the top",
                QueueLayout {
                    used: u64::MAX - 3,
                    ..good
                },
            ),
        ];
        for (what, layout) in bad {
            let result = Queue::new(&layout, 256, 0, &ram);
            assert_eq!(result.err(), Some(BrokenRing::Layout), "{what}");
        }
        let last = QueueLayout {
            descriptors: end - 256,
            avail: end - 256 - 38,
            used: end - 512 - 134 + 2,
            ..good
        };
        assert!(Queue::new(&last, 256, 0, &ram).is_ok());
    }

    #[test]
    fn pop_when_chain_is_whole_splits_it() {
        let ram = ram();
        let rings = Rings::new(&ram, BASE, 16);
        let mut queue = queue(&rings, 0);
        let mut chain = Chain::new();
        assert_eq!(queue.pop(&ram, &mut chain), Ok(Popped::Empty));
        rings.offer_chain(
            3,
            &[
                (DATA, 16, false),
                (DATA + 16, 4, false),
                (DATA + 99, 512, true),
            ],
        );
        assert_eq!(queue.pop(&ram, &mut chain), Ok(Popped::Chain));
        assert_eq!(chain.head(), 3);
        assert_eq!((chain.readable_len(), chain.writable_len()), (20, 512));
        assert_eq!(chain.readable().len(), 2);
        assert_eq!(
            chain.writable(),
            [Segment {
                addr: GuestAddress(DATA + 99),
                len: 512
            }]
        );
        assert_eq!(queue.pop(&ram, &mut chain), Ok(Popped::Empty));
        queue.rewind(1);
        assert_eq!(queue.pop(&ram, &mut chain), Ok(Popped::Chain));
        assert_eq!(chain.head(), 3);
    }

    #[test]
    fn pop_when_chain_is_hostile_refuses_it_and_goes_on() {
        type Entry = (u64, u32, u16, u16);
        type Case = (&'static str, ChainError, Vec<Entry>, &'static [Entry]);
        let ram_end = 1 << 20;
        #[rustfmt::skip]
        let cases: Vec<Case> = vec![
            ("a loop of one", ChainError::TooLong, vec![(DATA, 1, NEXT, 0)], &[]),
            ("a loop of two", ChainError::TooLong, vec![(DATA, 1, NEXT, 1), (DATA, 1, NEXT, 0)], &[]),
            ("next past the table", ChainError::NextOutOfRange, vec![(DATA, 1, NEXT, 16)], &[]),
            ("next far past the table", ChainError::NextOutOfRange, vec![(DATA, 1, NEXT, 0xffff)], &[]),
            ("no bytes", ChainError::ZeroLength, vec![(DATA, 0, 0, 0)], &[]),
            ("no bytes at the end", ChainError::ZeroLength, vec![(DATA, 1, NEXT, 1), (DATA, 0, WRITE, 0)], &[]),
            ("in the hole", ChainError::OutsideRam, vec![(ram_end + 5, 1, 0, 0)], &[]),
            ("into the hole", ChainError::OutsideRam, vec![(ram_end - 1, 2, 0, 0)], &[]),
            ("over the hole", ChainError::OutsideRam, vec![(ram_end - 1, 0x10_0002, 0, 0)], &[]),
            ("4 GiB", ChainError::OutsideRam, vec![(DATA, u32::MAX, 0, 0)], &[]),
            ("past the top", ChainError::OutsideRam, vec![(u64::MAX, 1, 0, 0)], &[]),
            ("around the top", ChainError::OutsideRam, vec![(u64::MAX - 3, 8, 0, 0)], &[]),
            ("readable after writable", ChainError::ReadableAfterWritable, vec![(DATA, 1, NEXT | WRITE, 1), (DATA, 1, 0, 0)], &[]),
            ("indirect with next", ChainError::UnexpectedIndirect, vec![(TABLE, 16, INDIRECT | NEXT, 1)], &[]),
            ("empty table", ChainError::OddIndirect, vec![(TABLE, 0, INDIRECT, 0)], &[]),
            ("odd table", ChainError::OddIndirect, vec![(TABLE, 17, INDIRECT, 0)], &[]),
            ("short table", ChainError::OddIndirect, vec![(TABLE, 15, INDIRECT, 0)], &[]),
            ("table of 65536", ChainError::TooLong, vec![(0, 0x10_0000, INDIRECT, 0)], &[]),
            ("table in the hole", ChainError::OutsideRam, vec![(ram_end, 16, INDIRECT, 0)], &[]),
            ("table past the top", ChainError::OutsideRam, vec![(u64::MAX - 7, 32, INDIRECT, 0)], &[]),
            ("indirect in indirect", ChainError::NestedIndirect, vec![(TABLE, 32, INDIRECT, 0)], &[(TABLE, 16, INDIRECT, 0)]),
            ("a loop in a table", ChainError::TooLong, vec![(TABLE, 32, INDIRECT, 0)], &[(DATA, 1, NEXT, 1), (DATA, 1, NEXT, 0)]),
            ("next past the indirect table", ChainError::NextOutOfRange, vec![(TABLE, 16, INDIRECT, 0)], &[(DATA, 1, NEXT, 1)]),
        ];
        for (what, error, direct, table) in cases {
            let ram = ram();
            let mut rings = Rings::new(&ram, BASE, 16);
            let mut queue = queue(&rings, feature::INDIRECT_DESC);
            let mut chain = Chain::new();
            for (index, d) in (0..).zip(&direct) {
                rings.describe(index, d.0, d.1, d.2, d.3);
            }
            for (index, d) in (0..).zip(table) {
                indirect(&ram, index, *d);
            }
            rings.offer(0);
            rings.offer_chain(8, &[(DATA, 7, true)]);
            assert_eq!(
                queue.pop(&ram, &mut chain),
                Ok(Popped::Malformed(error)),
                "{what}"
            );
            assert_eq!(chain.head(), 0);
            queue.add_used(&ram, 0, 0).unwrap();
            assert_eq!(queue.pop(&ram, &mut chain), Ok(Popped::Chain), "{what}");
            assert_eq!((chain.head(), chain.writable_len()), (8, 7), "{what}");
            assert_eq!(rings.take(), Some((0, 0)));
        }
    }

    #[test]
    fn pop_when_total_is_over_4_gib_refuses() {
        // 256 pieces of 16 MiB come to exactly 4 GiB: one byte too many for 32 bits.
        let ram = Ram::from_ranges(&[(GuestAddress(0), 32 << 20)]).unwrap();
        let rings = Rings::new(&ram, BASE, 256);
        let mut queue = queue(&rings, 0);
        for i in 0..256 {
            let flags = if i < 255 { NEXT } else { 0 };
            rings.describe(i, 0x100000, 16 << 20, flags, i + 1);
        }
        rings.offer(0);
        assert_eq!(
            queue.pop(&ram, &mut Chain::new()),
            Ok(Popped::Malformed(ChainError::TooLarge))
        );
    }

    #[test]
    fn pop_when_indirect_is_longer_than_we_take_refuses() {
        let ram = ram();
        let rings = Rings::new(&ram, BASE, 16);
        let mut queue = queue(&rings, feature::INDIRECT_DESC);
        for i in 0..MAX_SEGMENTS as u64 + 1 {
            let flags = if i < MAX_SEGMENTS as u64 { NEXT } else { 0 };
            indirect(&ram, i, (DATA, 1, flags, i as u16 + 1));
        }
        let mut chain = Chain::new();
        rings.describe(0, TABLE, 16 * (MAX_SEGMENTS as u32 + 1), INDIRECT, 0);
        rings.offer(0);
        assert_eq!(
            queue.pop(&ram, &mut chain),
            Ok(Popped::Malformed(ChainError::TooLong))
        );
        indirect(&ram, MAX_SEGMENTS as u64 - 1, (DATA, 1, 0, 0));
        rings.offer(0);
        assert_eq!(queue.pop(&ram, &mut chain), Ok(Popped::Chain));
        assert_eq!(chain.readable().len(), MAX_SEGMENTS);
    }

    #[test]
    fn pop_when_indirect_follows_direct_ones_takes_both() {
        let ram = ram();
        let rings = Rings::new(&ram, BASE, 16);
        let mut chain = Chain::new();
        rings.describe(0, DATA, 4, NEXT, 1);
        rings.describe(1, TABLE, 32, INDIRECT, 0);
        indirect(&ram, 0, (DATA, 5, NEXT, 1));
        indirect(&ram, 1, (DATA, 6, WRITE, 0));
        rings.offer(0);
        let mut with = queue(&rings, feature::INDIRECT_DESC);
        assert_eq!(with.pop(&ram, &mut chain), Ok(Popped::Chain));
        assert_eq!((chain.readable_len(), chain.writable_len()), (9, 6));
        let mut without = queue(&rings, 0);
        assert_eq!(
            without.pop(&ram, &mut chain),
            Ok(Popped::Malformed(ChainError::UnexpectedIndirect))
        );
    }

    #[test]
    fn pop_when_ring_is_broken_says_how() {
        for (index, head, broken) in [
            (17, 0, BrokenRing::AvailIndex),
            (0xffff, 0, BrokenRing::AvailIndex),
            (1, 16, BrokenRing::Head),
            (1, 0xffff, BrokenRing::Head),
        ] {
            let ram = ram();
            let rings = Rings::new(&ram, BASE, 16);
            let mut queue = queue(&rings, feature::EVENT_IDX);
            rings.offer(head);
            rings.set_avail_index(index);
            let error = queue.pop(&ram, &mut Chain::new()).unwrap_err();
            assert_eq!(error, broken, "{index} {head}");
        }
    }

    #[test]
    fn indices_when_they_wrap_go_on() {
        let ram = ram();
        let mut rings = Rings::new(&ram, BASE, 4);
        let mut queue = queue(&rings, feature::EVENT_IDX);
        let mut chain = Chain::new();
        for round in 0..70_000u32 {
            rings.offer_chain((round % 4) as u16, &[(DATA, 1, true)]);
            assert_eq!(queue.pop(&ram, &mut chain), Ok(Popped::Chain));
            queue.add_used(&ram, chain.head(), round).unwrap();
            assert_eq!(rings.take(), Some((round % 4, round)));
        }
    }

    #[test]
    fn used_when_staged_is_invisible_until_published() {
        let ram = ram();
        let mut rings = Rings::new(&ram, BASE, 16);
        let mut queue = queue(&rings, 0);
        for head in 0..3 {
            queue.stage_used(&ram, head, 10 + u32::from(head)).unwrap();
        }
        assert_eq!(rings.used_index(), 0);
        queue.publish_used(&ram).unwrap();
        assert_eq!(rings.used_index(), 3);
        let taken: Vec<_> = std::iter::from_fn(|| rings.take()).collect();
        assert_eq!(taken, [(0, 10), (1, 11), (2, 12)]);
    }

    #[test]
    fn interrupt_when_driver_declines_is_not_wanted() {
        let ram = ram();
        let rings = Rings::new(&ram, BASE, 16);
        let mut queue = queue(&rings, 0);
        assert_eq!(queue.wants_interrupt(&ram), Ok(false));
        queue.add_used(&ram, 0, 0).unwrap();
        assert_eq!(queue.wants_interrupt(&ram), Ok(true));
        assert_eq!(queue.wants_interrupt(&ram), Ok(false));
        rings.set_avail_flags(1);
        queue.add_used(&ram, 0, 0).unwrap();
        assert_eq!(queue.wants_interrupt(&ram), Ok(false));
    }

    #[test]
    fn interrupt_when_event_index_is_used_comes_exactly_then() {
        let ram = ram();
        let rings = Rings::new(&ram, BASE, 16);
        // Published in one go, event index before: 0-based entries published so far in `from`.
        for (from, published, event, wanted) in [
            (0u16, 1, 0, true),
            (0, 1, 1, false),
            (0, 3, 2, true),
            (0, 3, 3, false),
            (5, 2, 4, false),
            (5, 2, 5, true),
            (5, 2, 6, true),
            (5, 2, 7, false),
            (0xffff, 2, 0xffff, true),
            (0xffff, 2, 0, true),
            (0xffff, 2, 1, false),
        ] {
            let mut queue = queue(&rings, feature::EVENT_IDX);
            queue.next_used = from;
            rings.set_used_event(event);
            for _ in 0..published {
                queue.stage_used(&ram, 0, 0).unwrap();
            }
            queue.publish_used(&ram).unwrap();
            let wants = queue.wants_interrupt(&ram).unwrap();
            assert_eq!(wants, wanted, "{from} {published} {event}");
        }
    }

    #[test]
    fn kicks_when_busy_are_declined_and_when_empty_are_asked_for() {
        let ram = ram();
        let rings = Rings::new(&ram, BASE, 16);
        let mut chain = Chain::new();
        let mut by_flag = queue(&rings, 0);
        rings.offer_chain(0, &[(DATA, 1, true)]);
        by_flag.pop(&ram, &mut chain).unwrap();
        assert_eq!(rings.used_flags(), 1);
        assert_eq!(by_flag.pop(&ram, &mut chain), Ok(Popped::Empty));
        assert_eq!(rings.used_flags(), 0);
        let mut by_index = queue(&rings, feature::EVENT_IDX);
        by_index.pop(&ram, &mut chain).unwrap();
        assert_eq!(by_index.pop(&ram, &mut chain), Ok(Popped::Empty));
        assert_eq!(rings.avail_event(), 1);
    }
}
