//! Queues and descriptor chains, against the reference reader of [`crate::virtio::fuzz`].

use vm_memory::Address;

use crate::fuzz::Input;
use crate::virtio::fuzz::{Memory, Walked, address, describe, empty_ram, length, poke};
use crate::virtio::queue::{Chain, Popped, QueueState};
use crate::virtio::{BrokenRing, Queue, QueueLayout, Ram, feature};

const SIZE_MAX: u16 = 256;

/// A queue that a guest describes and fills with anything; chains are taken, given back and
/// returned. Checked after each step: what was taken is what the reference reader finds, lies in
/// memory, and no byte has changed but those that the step is to write.
pub fn queue(bytes: &[u8]) {
    let input = &mut Input::new(bytes);
    let ram = empty_ram();
    let features = u64::from(input.u8()) << 28;
    let state = QueueState {
        layout: layout(input),
        next_avail: input.u16() & if input.flag() { 0xffff } else { 0 },
        next_used: input.u16() & if input.flag() { 0xffff } else { 0 },
    };
    let Ok(queue) = Queue::new(&state, SIZE_MAX, features, &ram) else {
        return;
    };
    assert_eq!(queue.save(), state);
    let layout = state.layout;
    let size = u64::from(layout.size);
    assert!(layout.ready && size.is_power_of_two() && size <= u64::from(SIZE_MAX));
    assert_eq!(
        (layout.descriptors % 16, layout.avail % 2, layout.used % 4),
        (0, 0, 0)
    );
    assert!(Memory::holds(layout.descriptors, 16 * size));
    assert!(Memory::holds(layout.avail, 6 + 2 * size));
    assert!(Memory::holds(layout.used, 6 + 8 * size));
    let mut test = Test {
        offered: state.next_avail,
        ram,
        queue,
        layout,
        event_idx: features & feature::EVENT_IDX != 0,
        takes_indirect: features & feature::INDIRECT_DESC != 0,
        chain: Chain::new(),
        next_avail: state.next_avail,
        next_used: state.next_used,
        staged: 0,
        unannounced: 0,
        quiet: false,
        taken: Vec::new(),
    };
    while !input.is_empty() {
        if test.step(input).is_err() {
            return;
        }
    }
}

fn layout(input: &mut Input<'_>) -> QueueLayout {
    if input.below(8) == 0 {
        return QueueLayout {
            size: length(input),
            ready: input.flag(),
            descriptors: address(input),
            avail: address(input),
            used: address(input),
        };
    }
    QueueLayout {
        size: 1 << input.below(9),
        ready: true,
        descriptors: u64::from(input.u8()) * 0x80,
        avail: input.one_of(&[0x7000, 0x7d00, 0xc000, 0x5f00]) + u64::from(input.u8()) * 2,
        used: input.one_of(&[0xe000, 0x5ff0, 0xc400]) + u64::from(input.u8()) * 4,
    }
}

struct Test {
    ram: Ram,
    queue: Queue,
    layout: QueueLayout,
    event_idx: bool,
    takes_indirect: bool,
    chain: Chain,
    /// What the queue is to know.
    offered: u16,
    next_avail: u16,
    next_used: u16,
    staged: u16,
    unannounced: u16,
    quiet: bool,
    /// Heads and writable bytes of chains that were taken and not returned.
    taken: Vec<(u16, u32)>,
}

impl Test {
    fn step(&mut self, input: &mut Input<'_>) -> Result<(), BrokenRing> {
        let size = self.layout.size as u16;
        match input.below(10) {
            0 => {
                let index = u64::from(input.u8());
                let flags = u16::from(input.u8() % 8);
                let next = if input.flag() {
                    index as u16 + 1
                } else {
                    input.u16()
                };
                let at = self.layout.descriptors + 16 * index;
                describe(&self.ram, at, address(input), length(input), flags, next);
            }
            1 => {
                // A table of its own, as for an indirect descriptor.
                let at = address(input);
                for i in 0..input.below(20) as u64 {
                    let (flags, next) = (u16::from(input.u8() % 8), u16::from(input.u8()));
                    let at = at.wrapping_add(16 * i);
                    describe(&self.ram, at, address(input), length(input), flags, next);
                }
            }
            2 => {
                // An offer, as a driver makes it.
                let index = Memory::of(&self.ram).u16(self.layout.avail + 2);
                let at = self.layout.avail + 4 + 2 * u64::from(index % size);
                poke(&self.ram, at, &u16::from(input.u8()).to_le_bytes());
                poke(
                    &self.ram,
                    self.layout.avail + 2,
                    &index.wrapping_add(1).to_le_bytes(),
                );
            }
            3 => {
                let at = if input.flag() {
                    address(input)
                } else {
                    self.layout.avail
                };
                let len = input.below(32);
                poke(&self.ram, at, input.bytes(len));
            }
            4 => self.arm(),
            5 => self.announce(),
            6 => self.publish(),
            7 => self.give_back(input),
            8 => self.return_one(input),
            _ => return self.pop(),
        }
        Ok(())
    }

    fn pop(&mut self) -> Result<(), BrokenRing> {
        let before = Memory::of(&self.ram);
        let popped = self.queue.pop(&self.ram, &mut self.chain);
        let index = before.u16(self.layout.avail + 2);
        let ahead = index.wrapping_sub(self.next_avail);
        let mut expected = before.clone();
        if self.offered == self.next_avail {
            if ahead == 0 {
                assert_eq!(popped, Ok(Popped::Empty));
                return self.changed_only(&expected);
            }
            if u32::from(ahead) > self.layout.size {
                assert_eq!(popped, Err(BrokenRing::AvailIndex));
                self.changed_only(&expected)?;
                return Err(BrokenRing::AvailIndex);
            }
            self.offered = index;
        }
        let slot = u64::from(self.next_avail) % u64::from(self.layout.size);
        let head = before.u16(self.layout.avail + 4 + 2 * slot);
        self.next_avail = self.next_avail.wrapping_add(1);
        if !self.quiet && !self.event_idx {
            expected.set(self.layout.used, &[1, 0]);
        }
        self.quiet = true;
        self.changed_only(&expected)?;
        if u32::from(head) >= self.layout.size {
            assert_eq!(popped, Err(BrokenRing::Head));
            return Err(BrokenRing::Head);
        }
        let walked = expected.walk(&self.layout, head, self.takes_indirect);
        self.is_what_was_walked(popped?, head, walked);
        self.queue.prefetch(&self.ram);
        self.changed_only(&expected)
    }

    fn is_what_was_walked(&mut self, popped: Popped, head: u16, walked: Walked) {
        assert_eq!(self.chain.head(), head);
        let sum = |writable| {
            let pieces = walked.iter().flatten().filter(|piece| piece.2 == writable);
            pieces.map(|(_, len, _)| u64::from(*len)).sum::<u64>()
        };
        if walked.is_none() || sum(false).max(sum(true)) > u64::from(u32::MAX) {
            assert!(
                matches!(popped, Popped::Malformed(_)),
                "{popped:?} {walked:x?}"
            );
            self.taken.push((head, 0));
            return;
        }
        assert_eq!(popped, Popped::Chain, "{walked:x?}");
        let readable = self.chain.readable().iter().map(|it| (it, false));
        let found = readable.chain(self.chain.writable().iter().map(|it| (it, true)));
        let found: Vec<_> = found
            .map(|(segment, writable)| (segment.addr.raw_value(), segment.len, writable))
            .collect();
        assert_eq!(Some(found), walked);
        assert_eq!(u64::from(self.chain.readable_len()), sum(false));
        assert_eq!(u64::from(self.chain.writable_len()), sum(true));
        self.taken.push((head, self.chain.writable_len()));
    }

    fn arm(&mut self) {
        let mut expected = Memory::of(&self.ram);
        let more = self.queue.arm(&self.ram);
        self.quiet = false;
        if self.event_idx {
            let at = self.layout.used + 4 + 8 * u64::from(self.layout.size);
            expected.set(at, &self.next_avail.to_le_bytes());
        } else {
            expected.set(self.layout.used, &[0, 0]);
        }
        let index = expected.u16(self.layout.avail + 2);
        assert_eq!(more, Ok(index != self.next_avail));
        let has_chain = index != self.next_avail || self.offered != self.next_avail;
        assert_eq!(self.queue.has_chain(&self.ram), has_chain);
        self.changed_only(&expected).unwrap();
    }

    fn announce(&mut self) {
        let memory = Memory::of(&self.ram);
        let published = std::mem::take(&mut self.unannounced);
        let wants = if self.event_idx {
            let event = memory.u16(self.layout.avail + 4 + 2 * u64::from(self.layout.size));
            // One of the entries just published is that with the index `event`.
            (1..=published).any(|back| self.next_used.wrapping_sub(back) == event)
        } else {
            published > 0 && memory.u16(self.layout.avail) & 1 == 0
        };
        assert_eq!(self.queue.wants_interrupt(&self.ram), Ok(wants));
        self.changed_only(&memory).unwrap();
    }

    fn return_one(&mut self, input: &mut Input<'_>) {
        if self.taken.is_empty() {
            return;
        }
        let (head, writable) = self.taken.remove(input.below(self.taken.len().min(256)));
        let len = writable.min(input.u32());
        let mut expected = Memory::of(&self.ram);
        self.queue.stage_used(&self.ram, head, len).unwrap();
        let slot = self.next_used.wrapping_add(self.staged);
        let slot = u64::from(slot) % u64::from(self.layout.size);
        let at = self.layout.used + 4 + 8 * slot;
        expected.set(at, &u32::from(head).to_le_bytes());
        expected.set(at + 4, &len.to_le_bytes());
        self.staged += 1;
        self.changed_only(&expected).unwrap();
        if input.flag() {
            self.publish();
        }
    }

    fn publish(&mut self) {
        let mut expected = Memory::of(&self.ram);
        self.queue.publish_used(&self.ram).unwrap();
        self.next_used = self.next_used.wrapping_add(self.staged);
        self.unannounced = self.unannounced.saturating_add(self.staged);
        self.staged = 0;
        expected.set(self.layout.used + 2, &self.next_used.to_le_bytes());
        self.changed_only(&expected).unwrap();
    }

    /// The last chains, as a device does that must wait: they come again.
    fn give_back(&mut self, input: &mut Input<'_>) {
        let count = input.below(4).min(self.taken.len());
        let rest = self.taken.len() - count;
        self.taken.truncate(rest);
        self.queue.rewind(count as u16);
        self.next_avail = self.next_avail.wrapping_sub(count as u16);
        assert_eq!(self.queue.save().next_avail, self.next_avail);
    }

    fn changed_only(&self, expected: &Memory) -> Result<(), BrokenRing> {
        let difference = Memory::of(&self.ram).difference(expected);
        assert_eq!(difference, None, "a byte of guest memory");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    #[test]
    fn memory_when_it_spans_regions_is_what_the_queue_can_reach() {
        let ram = empty_ram();
        for (at, len) in [(0, 0x8000), (0x5fff, 2), (0xc000, 0x4000)] {
            assert!(Memory::holds(at, len));
            assert!(
                ram.read_slice(&mut vec![0; len as usize], GuestAddress(at))
                    .is_ok()
            );
        }
        for (at, len) in [(0x7fff, 2), (0xffff, 2), (0xbfff, 1), (u64::MAX, 2)] {
            assert!(!Memory::holds(at, len));
            assert!(
                ram.read_slice(&mut vec![0; len as usize], GuestAddress(at))
                    .is_err()
            );
        }
    }
}
