//! The guest's receive buffers that are parsed and waiting for frames.

use std::collections::VecDeque;

use vm_memory::{Address, GuestMemoryBackend};

use super::super::Ram;
use super::super::queue::{Chain, MAX_SEGMENTS};
use super::super::segment::{Segment, slices, window};
use super::{HEADER, QUEUE_SIZE};
use crate::sys::packets::{Incoming, PIECES};

/// Buffers that can be kept at hand.
const CHAINS_MAX: usize = QUEUE_SIZE as usize;
/// Their pieces. There is place for more: for those that lie across the border of two regions of RAM.
const PIECES_MAX: usize = MAX_SEGMENTS * 3 / 4;

/// The guest's buffers at hand for frames to come: fixed storage.
#[derive(Debug)]
pub struct Buffers {
    /// Each in one region of RAM.
    pieces: VecDeque<Segment>,
    chains: VecDeque<Buffer>,
    /// Bytes of all of them.
    room: u32,
}

/// One chain of the receive queue.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    /// What names it in the used ring.
    pub head: u16,
    /// Its bytes.
    pub len: u32,
    /// Its pieces.
    pub pieces: usize,
}

impl Buffers {
    /// Nothing at hand.
    pub fn new() -> Self {
        Buffers {
            pieces: VecDeque::with_capacity(PIECES),
            chains: VecDeque::with_capacity(CHAINS_MAX),
            room: 0,
        }
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        self.pieces.clear();
        self.chains.clear();
        self.room = 0;
    }

    /// Whether `chain` is a buffer that can be used at all.
    pub fn can_hold(chain: &Chain) -> bool {
        chain.readable_len() == 0
            && chain.writable_len() > HEADER
            && chain.writable().len() <= PIECES_MAX
    }

    /// The memory of all of them, to be read into.
    pub fn incoming<'a>(&self, ram: &'a Ram) -> Incoming<'a> {
        let mut incoming = Incoming::new();
        for piece in &self.pieces {
            // Both have place for as many.
            for slice in slices(ram, std::iter::once(*piece)) {
                incoming.push(&slice);
            }
        }
        incoming
    }

    /// Takes the writable part of `chain`, and adds its memory to `incoming`, which is that of all buffers
    /// at hand; `false`, without it, when there is no place left.
    pub fn push<'a>(&mut self, chain: &Chain, ram: &'a Ram, incoming: &mut Incoming<'a>) -> bool {
        let pieces = self.pieces.len().saturating_add(chain.writable().len());
        if self.chains.len() >= CHAINS_MAX || pieces > PIECES_MAX {
            return false;
        }
        let mut count: usize = 0;
        for segment in chain.writable() {
            let mut addr = segment.addr;
            for slice in ram.get_slices(segment.addr, segment.len as usize) {
                // Every segment was found to lie in RAM, which never changes.
                let Ok(slice) = slice else { continue };
                if self.pieces.len() >= PIECES || !incoming.push(&slice) {
                    self.pieces
                        .truncate(self.pieces.len().saturating_sub(count));
                    incoming.truncate(count);
                    return false;
                }
                let len = slice.len() as u32;
                self.pieces.push_back(Segment { addr, len });
                addr = addr.unchecked_add(u64::from(len));
                count = count.saturating_add(1);
            }
        }
        self.chains.push_back(Buffer {
            head: chain.head(),
            len: chain.writable_len(),
            pieces: count,
        });
        self.room = self.room.saturating_add(chain.writable_len());
        true
    }

    /// Gives away the one that has been here longest.
    pub fn pop(&mut self) -> Option<Buffer> {
        let buffer = self.chains.pop_front()?;
        self.pieces.drain(..buffer.pieces.min(self.pieces.len()));
        self.room = self.room.saturating_sub(buffer.len);
        Some(buffer)
    }

    /// What names them in the used ring, in order.
    pub fn heads(&self) -> impl Iterator<Item = u16> + '_ {
        self.chains.iter().map(|buffer| buffer.head)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.chains.is_empty()
    }

    /// Bytes and pieces of all of them.
    pub fn all(&self) -> (u32, usize) {
        (self.room, self.pieces.len())
    }

    /// Bytes and pieces of the next one; 0 when there is none.
    pub fn next(&self) -> (u32, usize) {
        let next = self.chains.front();
        next.map_or((0, 0), |buffer| (buffer.len, buffer.pieces))
    }

    /// Where the bytes from `skip` on lie, `len` of them.
    pub fn place(&self, skip: u32, len: u32) -> impl Iterator<Item = Segment> + '_ {
        window(self.pieces.iter().copied(), skip, len)
    }

    /// How many of them `len` bytes take.
    pub fn count_for(&self, len: u32) -> u16 {
        let mut left = len;
        let mut count: u16 = 0;
        for buffer in &self.chains {
            count = count.saturating_add(1);
            left = left.saturating_sub(buffer.len);
            if left == 0 {
                break;
            }
        }
        count
    }
}
