//! A queue as the fuzz target's guest keeps it.

use std::collections::VecDeque;

use super::super::{QUEUE_SIZE, Queue, Ram};
use crate::virtio::fuzz::{Memory, Walked};
use crate::virtio::queue::{QueueLayout, QueueState};

pub const SIZE: u16 = 16;
/// Chains that a queue may have at once, of as many descriptors.
pub const SLOTS: usize = 4;

fn layout(queue: usize) -> QueueLayout {
    let at = 0x100 * queue as u64;
    QueueLayout {
        size: SIZE.into(),
        ready: true,
        descriptors: at,
        avail: 0x400 + at,
        used: 0x800 + at,
    }
}

/// A queue, and what of it is with the device.
pub struct Ring {
    pub layout: QueueLayout,
    pub queue: Queue,
    pub offered: u16,
    returned: u16,
    pub live: [Option<Walked>; SLOTS],
    /// Slots in the order in which they were offered.
    pub order: VecDeque<usize>,
}

impl Ring {
    pub fn new(queue: usize, features: u64, ram: &Ram) -> Self {
        let layout = layout(queue);
        let state = QueueState::fresh(layout);
        Ring {
            layout,
            queue: Queue::new(&state, QUEUE_SIZE, features, ram).unwrap(),
            offered: 0,
            returned: 0,
            live: Default::default(),
            order: VecDeque::new(),
        }
    }

    /// What the device has returned since: the chains, and how much of each it says to have written.
    pub fn take(&mut self, memory: &Memory) -> Vec<(Walked, u32)> {
        let mut all = Vec::new();
        while self.returned != memory.u16(self.layout.used + 2) {
            let at = self.layout.used + 4 + 8 * u64::from(self.returned % SIZE);
            self.returned = self.returned.wrapping_add(1);
            let (head, len) = (memory.u32(at) as usize, memory.u32(at + 4));
            let slot = head / SLOTS;
            assert!(head.is_multiple_of(SLOTS) && slot < SLOTS);
            let walked = self.live[slot].take().expect("one that is on offer");
            self.order.retain(|other| *other != slot);
            all.push((walked, len));
        }
        all
    }
}

/// The first `len` bytes of the writable pieces of a chain.
pub fn content(memory: &Memory, walked: &Walked, len: u32) -> Vec<u8> {
    let pieces = walked.as_ref().expect("a chain that can be served");
    assert!(pieces.iter().all(|piece| piece.2));
    let bytes = |(at, len, _): &(u64, u32, bool)| memory.get(*at, u64::from(*len));
    let mut all: Vec<u8> = pieces.iter().flat_map(bytes).copied().collect();
    assert!(len as usize <= all.len());
    all.truncate(len as usize);
    all
}
