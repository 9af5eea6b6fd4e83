//! Requests of a disk that goes past the host's page cache whose memory, place or length is not aligned as that needs
//! ([`Alignment`]): they go by a buffer.
//!
//! A [`Bounce`] is a few buffers, made when the device's thread begins, and seen by the engine as one more region of
//! guest memory, behind all that there is: so the one way that bytes of guest memory go serves them too. The guest
//! cannot name it: what a driver offers is looked up in guest memory without it.
//!
//! A request takes a buffer before it begins and keeps it to its end; the next one that needs one waits in the ring
//! until there is one. What is longer than a buffer goes in parts. A write that covers some block in part reads that
//! first ([`Stage::Filling`]), and no other such write of the same queue begins meanwhile. Of two writes to the same
//! block that are in flight at once, one may be lost with more than the bytes that both have, and on two queues also
//! where they have none in common: a driver that knows the size of the blocks and orders neither has no promise of
//! either.
//!
//! Here are the buffers, and how far a request is with its own; the steps are in `bounced_steps`. Nothing here allocates once [`Bounce::new`] has.

use std::io;
use std::sync::Arc;

use vm_memory::{Address, GuestAddress, GuestRegionMmap};

use super::super::Ram;
use super::super::segment::Segment;
use super::request::Request;
use crate::sys::io::Alignment;

/// Buffers, and bytes of each.
const BUFFERS: u8 = 8;
const BUFFER: u32 = 128 * 1024;

/// Where the engine sees them: no guest has memory there.
const AT: u64 = 1 << 62;

/// The buffers.
#[derive(Debug)]
pub struct Bounce {
    /// Guest memory, and the buffers.
    view: Ram,
    /// A bit for each buffer that is taken.
    taken: u8,
    /// A write has its buffer that covers some block in part.
    is_patching: bool,
}

/// How far a request is that goes by a buffer.
#[derive(Debug)]
pub struct Bounced {
    buffer: u8,
    is_patch: bool,
    pub(super) stage: Stage,
    /// The aligned part of the file that the buffer is for at present.
    pub(super) at: u64,
    pub(super) len: u32,
    /// Bytes of it before those of the request, and how many those are.
    pub(super) skip: u32,
    pub(super) bytes: u32,
}

/// What is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// Nothing: the next part begins.
    Idle,
    /// The part is being read, for the guest.
    Reading,
    /// The blocks that the part covers are being read, to be written back with what the guest has for them.
    Filling,
    /// The part is being written.
    Writing,
}

impl Bounce {
    /// Buffers beside `ram`.
    ///
    /// # Errors
    /// When the host has no memory for them.
    pub fn new(ram: &Ram) -> io::Result<Self> {
        let len = usize::from(BUFFERS).saturating_mul(BUFFER as usize);
        let region = GuestRegionMmap::from_range(GuestAddress(AT), len, None);
        let region = region.map_err(io::Error::other)?;
        let view = ram.insert_region(Arc::new(region));
        Ok(Bounce {
            view: view.map_err(io::Error::other)?,
            taken: 0,
            is_patching: false,
        })
    }

    /// Guest memory, and the buffers.
    pub fn view(&self) -> &Ram {
        &self.view
    }

    /// Takes a buffer; none when there is no more, or `is_patch` and another write is one already.
    pub fn take(&mut self, is_patch: bool) -> Option<Bounced> {
        let buffer = u8::try_from(self.taken.trailing_ones()).ok()?;
        if buffer >= BUFFERS || is_patch && self.is_patching {
            return None;
        }
        self.taken |= bit(buffer);
        self.is_patching |= is_patch;
        Some(Bounced {
            buffer,
            is_patch,
            stage: Stage::Idle,
            at: 0,
            len: 0,
            skip: 0,
            bytes: 0,
        })
    }

    /// The request has ended.
    pub fn give_back(&mut self, bounced: &Bounced) {
        self.taken &= !bit(bounced.buffer);
        self.is_patching &= !bounced.is_patch;
    }

    /// All requests are forgotten.
    pub fn clear(&mut self) {
        (self.taken, self.is_patching) = (0, false);
    }
}

fn bit(buffer: u8) -> u8 {
    1u8.checked_shl(u32::from(buffer)).unwrap_or(0)
}

impl Bounced {
    /// The `len` bytes from byte `skip` on of its buffer.
    pub(super) fn memory(&self, skip: u32, len: u32) -> Segment {
        let first = u64::from(self.buffer).saturating_mul(u64::from(BUFFER));
        let addr = AT.saturating_add(first).saturating_add(u64::from(skip));
        Segment {
            addr: GuestAddress(addr),
            len,
        }
    }

    /// Begins the part of at most `left` bytes that the disk has from `at` on.
    pub(super) fn begin(&mut self, at: u64, left: u64, alignment: Alignment) {
        let mask = u64::from(alignment.file).saturating_sub(1);
        self.at = at & !mask;
        // Less than a block, which is less than a buffer.
        self.skip = (at & mask) as u32;
        let room = BUFFER.saturating_sub(self.skip);
        self.bytes = u32::try_from(left).unwrap_or(u32::MAX).min(room);
        let end = u64::from(self.skip.saturating_add(self.bytes));
        // At most a buffer, which is whole blocks.
        self.len = (end.saturating_add(mask) & !mask) as u32;
    }

    pub(super) fn covers_blocks_in_part(&self) -> bool {
        self.skip > 0 || self.skip.saturating_add(self.bytes) < self.len
    }
}

/// Whether `request`, whose bytes are in `memory`, can only go by a buffer, and whether it covers some block in part.
pub fn need(
    request: &Request,
    alignment: Alignment,
    memory: impl Iterator<Item = Segment>,
) -> (bool, bool) {
    if alignment == Alignment::NONE {
        return (false, false);
    }
    let file = u64::from(alignment.file).saturating_sub(1);
    let piece = u64::from(alignment.memory).saturating_sub(1);
    let (at, len) = match *request {
        Request::Read { at, len } | Request::Write { at, len } => (at, u64::from(len)),
        // Where the file system does not do it, zeros are written out of a buffer.
        Request::WriteZeroes { at, len, .. } => return (true, (at | len) & file != 0),
        _ => return (false, false),
    };
    let is_read = matches!(request, Request::Read { .. });
    let in_part = (at | len) & file != 0;
    let mut memory = memory;
    let is_odd = |segment: Segment| {
        segment.addr.raw_value() & piece != 0 || u64::from(segment.len) & (file | piece) != 0
    };
    (in_part || memory.any(is_odd), in_part && !is_read)
}

/// All buffers are taken: the request waits.
#[derive(Debug)]
pub struct NoBuffer;
