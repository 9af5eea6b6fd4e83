//! Split virtqueues (virtio 1.2, 2.7), the device's side.
//!
//! [`QueueLayout`] is what the guest wrote into the registers; [`Queue`] is that, checked, with
//! live indices. They are two types so that neither can be mistaken for the other. The notification
//! flags are read and written by virtio-queue; taking chains and the used ring are here: a walk must tell an error
//! from an end, and the buffers of one received frame must become visible to the driver all at once (virtio 1.2,
//! 5.1.6.4).
//!
//! What the driver has just written lies in another processor's cache, and each first look at a line of it takes as
//! long as much of a request. So the driver's index is read once for all chains that it offers, and
//! the descriptors of the chains that come next are called into this processor's cache while one is worked on
//! ([`Queue::prefetch`]).
//!
//! Everything the guest wrote is read once, checked, and not read again. A [`Chain`] is fixed
//! storage that is filled anew for each request, so nothing here allocates once it exists.

#[cfg(any(test, fuzzing))]
pub mod fuzz;
#[cfg(test)]
mod tests;

use std::sync::atomic::{Ordering, fence};

use serde::{Deserialize, Serialize};
use virtio_queue::QueueT;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress};

pub use super::chain::{Chain, ChainError, MAX_SEGMENTS};
use super::segment::{KnownRegion, Segment, prefetch};
use super::{BrokenRing, Ram, feature};

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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
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

/// A queue as it is saved, unchecked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueState {
    /// As the guest has described it.
    pub layout: QueueLayout,
    /// The index in the available ring of the next chain.
    pub next_avail: u16,
    /// The index in the used ring of the next entry.
    pub next_used: u16,
}

impl QueueState {
    /// A queue that nothing has been done with.
    pub fn fresh(layout: QueueLayout) -> Self {
        QueueState {
            layout,
            next_avail: 0,
            next_used: 0,
        }
    }
}

/// What [`Queue::pop`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Popped {
    /// Nothing. The driver has not been asked to kick: [`Queue::arm`] does that.
    Empty,
    /// A whole, checked chain.
    Chain,
    /// A chain that cannot be served; only its head is known.
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
    /// The last [`Queue::pop`] found nothing.
    found_empty: bool,
    /// The driver's index when it was read last: chains before it are offered.
    offered: u16,
    next_used: u16,
    /// Entries written to the used ring beyond `next_used`, which the driver cannot see yet.
    staged: u16,
    /// Entries published since the driver was last considered for an interrupt.
    unannounced: u16,
}

impl Queue {
    /// Checks what the guest described, for a queue of at most `max_size`. Its indices may be any: they
    /// are checked against the driver's with each chain.
    ///
    /// # Errors
    /// [`BrokenRing::Layout`] when the size is not a power of two up to `max_size`, or a ring is
    /// misaligned or not wholly in RAM.
    pub fn new(
        state: &QueueState,
        max_size: u16,
        features: u64,
        ram: &Ram,
    ) -> Result<Self, BrokenRing> {
        let broken = BrokenRing::Layout;
        let layout = &state.layout;
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
        ring.set_next_avail(state.next_avail);
        // 0 stands for "never set" in virtio-queue.
        if layout.avail == 0 || !ring.is_valid(ram) {
            return Err(broken);
        }
        Ok(Queue {
            ring,
            indirect: features & feature::INDIRECT_DESC != 0,
            event_idx,
            quiet: false,
            found_empty: false,
            offered: state.next_avail,
            next_used: state.next_used,
            staged: 0,
            unannounced: 0,
        })
    }

    /// The state to save. Nothing is staged, and what was published has been announced.
    pub fn save(&self) -> QueueState {
        QueueState {
            layout: QueueLayout {
                size: u32::from(self.ring.size()),
                ready: self.ring.ready(),
                descriptors: self.ring.desc_table(),
                avail: self.ring.avail_ring(),
                used: self.ring.used_ring(),
            },
            next_avail: self.ring.next_avail(),
            next_used: self.next_used,
        }
    }

    /// Has [`Queue::wants_interrupt`] consider all entries that the driver may not have noticed.
    pub fn announce_again(&mut self) {
        self.unannounced = self.ring.size();
    }

    /// Takes the next chain into `chain`. The driver is left as it is when there is none: as long as we
    /// look again by ourselves, it need not kick.
    ///
    /// # Errors
    /// When the ring cannot be trusted any more.
    pub fn pop(&mut self, ram: &Ram, chain: &mut Chain) -> Result<Popped, BrokenRing> {
        let head = self.next_head(ram)?;
        self.found_empty = head.is_none();
        let Some(head) = head else {
            return Ok(Popped::Empty);
        };
        if !self.quiet {
            self.quiet = true;
            self.ring
                .disable_notification(ram)
                .map_err(|_| BrokenRing::Memory)?;
        }
        self.walk_again(ram, head, chain)
    }

    /// Has the processor bring to its cache what the next two calls of [`Queue::pop`] need first: of the next chain,
    /// whose descriptor came by the last call of this, its first buffer; of the one after it, its descriptor. It is
    /// worth it where the driver writes both anew for each request, and where a request takes long enough. Only a
    /// hint: what is found here is used for nothing else, and checked when it is popped.
    pub fn prefetch(&self, ram: &Ram) {
        let next = self.ring.next_avail();
        let ahead = self.offered.wrapping_sub(next);
        let table = GuestAddress(self.ring.desc_table());
        let descriptor = |index| descriptor_at(table, self.head_at(ram, index).ok()?);
        if ahead >= 2
            && let Some(at) = descriptor(next.wrapping_add(1))
        {
            prefetch(ram, at);
        }
        if ahead >= 1
            && let Some(at) = descriptor(next)
            && let Ok(first) = ram.read_obj::<Descriptor>(at)
        {
            prefetch(ram, first.addr());
        }
    }

    /// Asks the driver to kick when it offers the next chain; whether it has offered one meanwhile.
    ///
    /// # Errors
    /// When the ring cannot be reached.
    pub fn arm(&mut self, ram: &Ram) -> Result<bool, BrokenRing> {
        self.quiet = false;
        let more = self.ring.enable_notification(ram);
        more.map_err(|_| BrokenRing::Memory)
    }

    /// Whether the driver has offered a chain that was not popped.
    pub fn has_chain(&self, ram: &Ram) -> bool {
        let next = self.ring.next_avail();
        self.offered != next
            || self
                .load_avail(ram, ring::INDEX, Ordering::Relaxed)
                .is_ok_and(|index| index != next)
    }

    /// Forgets what earlier calls of [`Queue::pop`] found.
    pub(super) fn begin_unit(&mut self) {
        self.found_empty = false;
    }

    /// Whether the last [`Queue::pop`] since [`Queue::begin_unit`] found nothing.
    pub(super) fn was_found_empty(&self) -> bool {
        self.found_empty
    }

    /// Takes the chain `head`, which was popped before and not returned, into `chain`.
    ///
    /// # Errors
    /// When there is no such descriptor.
    pub fn walk_again(
        &self,
        ram: &Ram,
        head: u16,
        chain: &mut Chain,
    ) -> Result<Popped, BrokenRing> {
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
    /// When the used ring cannot be written.
    pub fn add_used(&mut self, ram: &Ram, head: u16, len: u32) -> Result<(), BrokenRing> {
        self.stage_used(ram, head, len)?;
        self.publish_used(ram)
    }

    /// As [`Queue::add_used`], not visible to the driver before [`Queue::publish_used`].
    ///
    /// # Errors
    /// When the used ring cannot be written.
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
    /// When the used ring cannot be written.
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
    /// When the available ring cannot be read.
    pub fn wants_interrupt(&mut self, ram: &Ram) -> Result<bool, BrokenRing> {
        let published = std::mem::take(&mut self.unannounced);
        if published == 0 {
            return Ok(false);
        }
        // The entries must be visible before the driver's wish is read.
        fence(Ordering::SeqCst);
        if self.event_idx {
            // It is behind the last entry.
            let event = self.avail_entry(ram, self.ring.size())?;
            // Whether the event index is among the entries just published (2.7.7.1).
            let behind = self.next_used.wrapping_sub(event).wrapping_sub(1);
            Ok(behind < published)
        } else {
            Ok(self.load_avail(ram, 0, Ordering::Relaxed)? & ring::NO_INTERRUPT == 0)
        }
    }

    fn next_head(&mut self, ram: &Ram) -> Result<Option<u16>, BrokenRing> {
        let next = self.ring.next_avail();
        if next == self.offered {
            // What the driver wrote before the index is seen after it.
            let index = self.load_avail(ram, ring::INDEX, Ordering::Acquire)?;
            if index == next {
                return Ok(None);
            }
            if index.wrapping_sub(next) > self.ring.size() {
                return Err(BrokenRing::AvailIndex);
            }
            self.offered = index;
        }
        let head = self.head_at(ram, next)?;
        self.ring.set_next_avail(next.wrapping_add(1));
        Ok(Some(head))
    }

    /// The head of the chain with index `index` in the available ring.
    fn head_at(&self, ram: &Ram, index: u16) -> Result<u16, BrokenRing> {
        let slot = index
            .checked_rem(self.ring.size())
            .ok_or(BrokenRing::Layout)?;
        self.avail_entry(ram, slot)
    }

    fn walk(&self, ram: &Ram, head: u16, chain: &mut Chain) -> Result<(), ChainError> {
        let mut table = GuestAddress(self.ring.desc_table());
        let mut entries = self.ring.size();
        let mut in_indirect = false;
        let mut index = head;
        let mut steps: u16 = 0;
        let mut known = KnownRegion::new();
        loop {
            if index >= entries {
                return Err(ChainError::NextOutOfRange);
            }
            steps = steps.saturating_add(1);
            if steps > entries {
                return Err(ChainError::TooLong);
            }
            let at = descriptor_at(table, index).ok_or(ChainError::OutsideRam)?;
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
                if !known.holds(ram, addr, len) {
                    return Err(ChainError::OutsideRam);
                }
                table = addr;
                in_indirect = true;
                index = 0;
                steps = 0;
                continue;
            }

            if len == 0 {
                return Err(ChainError::ZeroLength);
            }
            if !known.holds(ram, addr, len) {
                return Err(ChainError::OutsideRam);
            }
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

    /// The entry `slot` of the available ring.
    fn avail_entry(&self, ram: &Ram, slot: u16) -> Result<u16, BrokenRing> {
        let offset = u64::from(slot)
            .saturating_mul(ring::AVAIL_ENTRY)
            .saturating_add(ring::HEADER);
        self.load_avail(ram, offset, Ordering::Relaxed)
    }

    fn load_avail(&self, ram: &Ram, offset: u64, order: Ordering) -> Result<u16, BrokenRing> {
        let at = GuestAddress(self.ring.avail_ring())
            .checked_add(offset)
            .ok_or(BrokenRing::Memory)?;
        ram.load(at, order)
            .map(u16::from_le)
            .map_err(|_| BrokenRing::Memory)
    }
}

/// Where descriptor `index` of a table is.
fn descriptor_at(table: GuestAddress, index: u16) -> Option<GuestAddress> {
    table.checked_add(u64::from(index).saturating_mul(ring::DESCRIPTOR_SIZE))
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
