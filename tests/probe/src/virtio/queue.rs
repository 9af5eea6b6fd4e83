//! A split queue (virtio 1.2, section 2.7), driver's half.
//!
//! It owns three rings in the arena and a free list; buffers are their users'. Completions are
//! polled. Raw accessors let attacks write what no driver would.

use core::sync::atomic::{Ordering, fence};

use crate::arena::Arena;
use crate::x86;

/// Descriptor flags.
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;
/// Size of a descriptor.
pub const DESCRIPTOR: u64 = 16;
/// Most buffers of one chain: 32 pages, a header and a status byte, and some room.
pub const CHAIN_MAX: u64 = 40;
/// Ring flag: no interrupts, or no kicks, please.
const SUPPRESS: u64 = 1;

/// How far ahead the used event of a driver that polls is set.
const FAR: u16 = 0x7fff;

/// A piece of memory for the device.
#[derive(Clone, Copy)]
pub struct Buffer {
    pub address: u64,
    pub size: u32,
    /// The device writes it.
    pub writable: bool,
}

impl Buffer {
    /// A buffer the device reads.
    pub fn readable(address: u64, size: u32) -> Self {
        Buffer {
            address,
            size,
            writable: false,
        }
    }

    /// A buffer the device writes.
    pub fn writable(address: u64, size: u32) -> Self {
        Buffer {
            address,
            size,
            writable: true,
        }
    }

    fn flags(&self) -> u16 {
        if self.writable { WRITE } else { 0 }
    }
}

pub struct Queue {
    pub descriptors: u64,
    pub avail: u64,
    pub used: u64,
    pub size: u16,
    event_idx: bool,
    /// One table of `CHAIN_MAX` descriptors for each descriptor, or 0: no indirect ones.
    indirect: u64,
    /// Head of the free list, linked through the descriptors; valid while `free` is not 0.
    first_free: u16,
    pub free: u16,
    /// Next index to publish, and the one the device was last told of.
    next_avail: u16,
    kicked: u16,
    next_used: u16,
    interrupts: Interrupts,
}

/// Which completions the device shall interrupt for; the status register then shows it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Interrupts {
    None,
    /// The next one for sure. With the event index, a driver that polls and moves the index on may
    /// be ahead of the device's look at it, and then rightly gets none: so the index stays.
    Next,
    /// Each one that is not polled away before.
    Each,
}

impl Queue {
    pub fn new(
        arena: &mut Arena,
        size: u16,
        event_idx: bool,
        indirect: bool,
    ) -> Result<Self, &'static str> {
        let count = u64::from(size);
        let mut queue = Queue {
            descriptors: arena.take(count * DESCRIPTOR, 4096)?,
            avail: arena.take(6 + 2 * count, 4096)?,
            used: arena.take(6 + 8 * count, 4096)?,
            size,
            event_idx,
            indirect: match indirect {
                true => arena.take(count * CHAIN_MAX * DESCRIPTOR, 4096)?,
                false => 0,
            },
            first_free: 0,
            free: size,
            next_avail: 0,
            kicked: 0,
            next_used: 0,
            interrupts: Interrupts::None,
        };
        for i in 0..size {
            queue.set_descriptor(i, 0, 0, 0, i + 1);
        }
        queue.ask_for_interrupts(Interrupts::None);
        Ok(queue)
    }

    /// Which completions shall set the interrupt status; none from the start.
    pub fn ask_for_interrupts(&mut self, wanted: Interrupts) {
        self.interrupts = wanted;
        let flags = if wanted != Interrupts::None || self.event_idx {
            0
        } else {
            SUPPRESS
        };
        x86::store(self.avail, 2, flags);
        self.set_used_event();
    }

    /// Event index: right ahead when interrupts are wanted, else as far away as can be.
    fn set_used_event(&mut self) {
        if self.event_idx {
            let ahead = match self.interrupts {
                Interrupts::None => FAR,
                Interrupts::Next | Interrupts::Each => 0,
            };
            let at = self.avail + 4 + 2 * u64::from(self.size);
            x86::store(at, 2, u64::from(self.next_used.wrapping_add(ahead)));
        }
    }

    /// Writes one descriptor of the ring.
    pub fn set_descriptor(&mut self, index: u16, address: u64, size: u32, flags: u16, next: u16) {
        let at = self.descriptors + u64::from(index) * DESCRIPTOR;
        set_descriptor(at, address, size, flags, next);
    }

    /// Makes a chain available and returns its head; `None` when the ring is full. The device
    /// sees it at once, but is told by `should_kick` only.
    pub fn add(&mut self, buffers: &[Buffer]) -> Option<u16> {
        let count = buffers.len() as u16;
        let head = self.first_free;
        if self.indirect != 0 && count > 1 && u64::from(count) <= CHAIN_MAX {
            if self.free == 0 {
                return None;
            }
            let table = self.indirect + u64::from(head) * CHAIN_MAX * DESCRIPTOR;
            for (i, buffer) in (0u16..).zip(buffers) {
                let more = if i + 1 < count { NEXT } else { 0 };
                let at = table + u64::from(i) * DESCRIPTOR;
                set_descriptor(
                    at,
                    buffer.address,
                    buffer.size,
                    buffer.flags() | more,
                    i + 1,
                );
            }
            let next = self.next_of(head);
            let size = u32::from(count) * DESCRIPTOR as u32;
            self.set_descriptor(head, table, size, INDIRECT, next);
            self.first_free = next;
            self.free -= 1;
        } else {
            if self.free < count || count == 0 {
                return None;
            }
            let mut index = head;
            for (i, buffer) in (0u16..).zip(buffers) {
                let next = self.next_of(index);
                let more = if i + 1 < count { NEXT } else { 0 };
                self.set_descriptor(
                    index,
                    buffer.address,
                    buffer.size,
                    buffer.flags() | more,
                    next,
                );
                index = next;
            }
            self.first_free = index;
            self.free -= count;
        }
        self.publish(head);
        Some(head)
    }

    /// Puts any head into the available ring.
    pub fn publish(&mut self, head: u16) {
        let slot = u64::from(self.next_avail % self.size);
        x86::store(self.avail + 4 + 2 * slot, 2, u64::from(head));
        self.set_avail_index(self.next_avail.wrapping_add(1));
    }

    /// Moves the available index anywhere.
    pub fn set_avail_index(&mut self, index: u16) {
        self.next_avail = index;
        // The device must not see the index before the entries.
        fence(Ordering::Release);
        x86::store(self.avail + 2, 2, u64::from(index));
    }

    pub fn avail_index(&self) -> u16 {
        self.next_avail
    }

    /// Whether the device wants to hear of what was added since the last call (section 2.7.7.2).
    pub fn should_kick(&mut self) -> bool {
        let (old, new) = (self.kicked, self.next_avail);
        if old == new {
            return false;
        }
        fence(Ordering::SeqCst);
        self.kicked = new;
        if self.event_idx {
            let event = x86::load(self.used + 4 + 8 * u64::from(self.size), 2) as u16;
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            x86::load(self.used, 2) & SUPPRESS == 0
        }
    }

    pub fn used_index(&self) -> u16 {
        x86::load(self.used + 2, 2) as u16
    }

    /// The next completion: head and number of bytes written. Its descriptors are free again.
    pub fn pop(&mut self) -> Option<(u16, u32)> {
        if self.used_index() == self.next_used {
            return None;
        }
        fence(Ordering::Acquire);
        let slot = u64::from(self.next_used % self.size);
        let head = x86::load(self.used + 4 + 8 * slot, 4) as u16;
        let written = x86::load(self.used + 8 + 8 * slot, 4) as u32;
        self.next_used = self.next_used.wrapping_add(1);
        match self.interrupts {
            Interrupts::Next => {}
            Interrupts::Each => self.set_used_event(),
            // Far ahead stays far ahead for long; each store takes the line from the device.
            Interrupts::None if self.next_used.is_multiple_of(FAR / 8) => self.set_used_event(),
            Interrupts::None => {}
        }
        if head < self.size {
            self.release(head);
        }
        Some((head, written))
    }

    fn next_of(&self, index: u16) -> u16 {
        x86::load(self.descriptors + u64::from(index) * DESCRIPTOR + 14, 2) as u16
    }

    fn flags_of(&self, index: u16) -> u16 {
        x86::load(self.descriptors + u64::from(index) * DESCRIPTOR + 12, 2) as u16
    }

    /// Gives a chain's descriptors back to the free list.
    fn release(&mut self, head: u16) {
        let mut last = head;
        let mut count = 1;
        while self.flags_of(last) & NEXT != 0 && count < self.size {
            last = self.next_of(last);
            count += 1;
        }
        let at = self.descriptors + u64::from(last) * DESCRIPTOR;
        x86::store(at + 12, 2, 0);
        x86::store(at + 14, 2, u64::from(self.first_free));
        self.first_free = head;
        self.free += count;
    }
}

/// Writes a descriptor anywhere, for rings and indirect tables.
pub fn set_descriptor(at: u64, address: u64, size: u32, flags: u16, next: u16) {
    x86::store(at, 8, address);
    x86::store(at + 8, 4, u64::from(size));
    x86::store(at + 12, 2, u64::from(flags));
    x86::store(at + 14, 2, u64::from(next));
}
