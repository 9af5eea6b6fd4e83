//! The guest's receive buffers that are parsed and waiting for frames.

use std::collections::VecDeque;

use super::super::queue::{Chain, MAX_SEGMENTS};
use super::super::segment::{Segment, window};
use super::{HEADER, QUEUE_SIZE};

/// Buffers that can be kept at hand.
const CHAINS_MAX: usize = QUEUE_SIZE as usize;
/// Their pieces. A vector has room for more: for the spill, and for pieces that lie across the
/// border of two regions of RAM.
const PIECES_MAX: usize = MAX_SEGMENTS * 3 / 4;

/// The guest's buffers at hand for frames to come: fixed storage.
#[derive(Debug)]
pub struct Buffers {
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
    pieces: usize,
}

impl Buffers {
    /// Nothing at hand.
    pub fn new() -> Self {
        Buffers {
            pieces: VecDeque::with_capacity(PIECES_MAX),
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

    /// Takes the writable part of `chain`; `false`, without it, when there is no place left.
    pub fn push(&mut self, chain: &Chain) -> bool {
        let pieces = chain.writable();
        let (len, room) = (
            chain.writable_len(),
            self.room.saturating_add(chain.writable_len()),
        );
        if self.pieces.len().saturating_add(pieces.len()) > PIECES_MAX
            || self.chains.len() >= CHAINS_MAX
        {
            return false;
        }
        self.pieces.extend(pieces.iter().copied());
        self.chains.push_back(Buffer {
            head: chain.head(),
            len,
            pieces: pieces.len(),
        });
        self.room = room;
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

    /// Bytes of all of them.
    pub fn room(&self) -> u32 {
        self.room
    }

    /// Bytes of the next one; 0 when there is none.
    pub fn next_room(&self) -> u32 {
        self.chains.front().map_or(0, |buffer| buffer.len)
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
