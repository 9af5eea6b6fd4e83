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
//! Nothing here allocates once [`Bounce::new`] has.

use std::io;
use std::sync::Arc;

use vm_memory::{Address, GuestAddress, GuestRegionMmap};

use super::super::Ram;
use super::super::segment::{Segment, clear, slices, window};
use super::Block;
use super::disk::FileIndex;
use super::job::Job;
use super::request::{HEADER, Request};
use super::steps::offset;
use crate::sys;
use crate::sys::io::Alignment;
use crate::sys::ring::Transfer;

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
    stage: Stage,
    /// The aligned part of the file that the buffer is for at present.
    at: u64,
    len: u32,
    /// Bytes of it before those of the request, and how many those are.
    skip: u32,
    bytes: u32,
}

/// What is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
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
    fn memory(&self, skip: u32, len: u32) -> Segment {
        let first = u64::from(self.buffer).saturating_mul(u64::from(BUFFER));
        let addr = AT.saturating_add(first).saturating_add(u64::from(skip));
        Segment {
            addr: GuestAddress(addr),
            len,
        }
    }

    /// Begins the part of at most `left` bytes that the disk has from `at` on.
    fn begin(&mut self, at: u64, left: u64, alignment: Alignment) {
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

    fn covers_blocks_in_part(&self) -> bool {
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

impl Block {
    /// Takes the buffer that `request`, of the chain at hand, needs; whether it can begin.
    pub(super) fn take_buffer(&mut self, request: &Request) -> Result<Option<Bounced>, NoBuffer> {
        let alignment = self.disk.alignment();
        let (memory, skip) = match request {
            Request::Read { .. } => (self.chain.writable(), 0),
            _ => (self.chain.readable(), HEADER),
        };
        let len = u32::try_from(request.limited_bytes()).unwrap_or(u32::MAX);
        let (needed, is_patch) = need(
            request,
            alignment,
            window(memory.iter().copied(), skip, len),
        );
        match &mut self.bounce {
            Some(bounce) if needed => bounce.take(is_patch).map(Some).ok_or(NoBuffer),
            _ => Ok(None),
        }
    }

    /// Goes on with `job`, which has a buffer, or ends it; the slot, when the engine has it.
    pub(super) fn step_bounced(
        &mut self,
        ram: &Ram,
        job: &mut Job,
        slot: Option<u16>,
    ) -> io::Result<Option<u16>> {
        let (at, len, transfer) = match job.request {
            Request::Read { at, len } => (at, u64::from(len), Transfer::Read),
            Request::Write { at, len } => (at, u64::from(len), Transfer::Write),
            Request::WriteZeroes { at, len, .. } => (at, len, Transfer::Write),
            _ => return Ok(None),
        };
        let alignment = self.disk.alignment();
        while job.done < len {
            let Some(bounced) = &mut job.bounced else {
                return Err(io::ErrorKind::InvalidInput.into());
            };
            let next = match bounced.stage {
                Stage::Idle => {
                    let left = len.saturating_sub(job.done);
                    bounced.begin(at.saturating_add(job.done), left, alignment);
                    match transfer {
                        Transfer::Read => Stage::Reading,
                        Transfer::Write if bounced.covers_blocks_in_part() => Stage::Filling,
                        Transfer::Write => Stage::Writing,
                    }
                }
                // It was filled.
                _ => Stage::Writing,
            };
            bounced.stage = next;
            if next == Stage::Writing {
                self.copy_to_buffer(ram, job, slot)?;
            }
            let direction = match next {
                Stage::Writing => Transfer::Write,
                _ => Transfer::Read,
            };
            if let Some(slot) = self.push_bounced(job, slot, transfer, direction) {
                return Ok(Some(slot));
            }
            let moved = self.move_by_call(job, direction)?;
            self.bounced_moved(ram, job, slot, moved)?;
            if matches!(job.request, Request::WriteZeroes { .. })
                && job.done < len
                && let Some(slot) = self.yield_in(job, slot)
            {
                return Ok(Some(slot));
            }
        }
        Ok(None)
    }

    /// The engine has moved `moved` bytes for `job`.
    ///
    /// # Errors
    /// When that was none of what was wanted: the request has failed.
    pub(super) fn bounced_moved(
        &mut self,
        ram: &Ram,
        job: &mut Job,
        slot: Option<u16>,
        moved: u32,
    ) -> io::Result<()> {
        let Some(bounced) = &mut job.bounced else {
            return Ok(());
        };
        let bytes = moved.saturating_sub(bounced.skip).min(bounced.bytes);
        match bounced.stage {
            Stage::Idle => {}
            Stage::Filling if moved < bounced.len => {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            // What is in the buffer is written next.
            Stage::Filling => {}
            Stage::Reading if bytes == 0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            Stage::Writing if bytes == 0 => return Err(io::ErrorKind::WriteZero.into()),
            Stage::Reading => {
                bounced.stage = Stage::Idle;
                let from = bounced.memory(bounced.skip, bytes);
                let done = offset(job)?;
                let memory = self.memory(slot, Transfer::Read).iter().copied();
                if !self.copy(ram, Some(from).into_iter(), window(memory, done, bytes)) {
                    return Err(io::ErrorKind::InvalidInput.into());
                }
                job.done = job.done.saturating_add(u64::from(bytes));
            }
            Stage::Writing => {
                bounced.stage = Stage::Idle;
                job.done = job.done.saturating_add(u64::from(bytes));
            }
        }
        Ok(())
    }

    /// What the guest has for the present part goes over what is in the buffer.
    fn copy_to_buffer(&self, ram: &Ram, job: &Job, slot: Option<u16>) -> io::Result<()> {
        let (Some(bounced), Some(bounce)) = (&job.bounced, &self.bounce) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let to = bounced.memory(bounced.skip, bounced.bytes);
        let copied = match job.request {
            Request::WriteZeroes { .. } => clear(bounce.view(), Some(to).into_iter()),
            _ => {
                let skip = HEADER.saturating_add(offset(job)?);
                let memory = self.memory(slot, Transfer::Write).iter().copied();
                let from = window(memory, skip, bounced.bytes);
                self.copy(ram, from, Some(to).into_iter())
            }
        };
        match copied {
            true => Ok(()),
            false => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    /// Copies all bytes of `from`, of the buffers or of guest memory, to `to`, which is as long; whether it is.
    fn copy(
        &self,
        ram: &Ram,
        from: impl Iterator<Item = Segment>,
        to: impl Iterator<Item = Segment>,
    ) -> bool {
        let view = self.bounce.as_deref().map_or(ram, Bounce::view);
        let mut to = slices(view, to);
        let mut room = None;
        for mut source in slices(view, from) {
            while !source.is_empty() {
                let Some(target) = room.take().or_else(|| to.next()) else {
                    return false;
                };
                let count = source.len().min(target.len());
                source.copy_to_volatile_slice(target);
                let (Ok(rest), Ok(left)) = (source.offset(count), target.offset(count)) else {
                    return false;
                };
                source = rest;
                room = Some(left).filter(|left| !left.is_empty());
            }
        }
        true
    }

    /// Gives the engine the present part; the slot, unless it cannot be given.
    fn push_bounced(
        &mut self,
        job: &Job,
        slot: Option<u16>,
        kept: Transfer,
        direction: Transfer,
    ) -> Option<u16> {
        let bounced = job.bounced.as_ref()?;
        let place = (FileIndex::DATA, bounced.at);
        let memory = bounced.memory(0, bounced.len);
        self.give(job, slot, Some(kept), |engine, disk, slot, _| {
            engine.push(slot, direction, disk, place, Some(memory).into_iter())
        })
    }

    /// Moves the present part by a call that waits; how many bytes that were.
    fn move_by_call(&self, job: &Job, direction: Transfer) -> io::Result<u32> {
        let (Some(bounced), Some(bounce)) = (&job.bounced, &self.bounce) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let (file, _) = self
            .disk
            .file(FileIndex::DATA)
            .ok_or(io::ErrorKind::InvalidInput)?;
        let memory = slices(
            bounce.view(),
            Some(bounced.memory(0, bounced.len)).into_iter(),
        );
        match direction {
            Transfer::Read => sys::io::read_exact_at(file, memory, bounced.at)?,
            Transfer::Write => sys::io::write_all_at(file, memory, bounced.at)?,
        }
        Ok(bounced.len)
    }
}

/// All buffers are taken: the request waits.
#[derive(Debug)]
pub struct NoBuffer;

impl Job {
    /// Whether the step under way is one of the buffer's.
    pub fn is_in_buffer(&self) -> bool {
        let stage = self.bounced.as_ref().map(|bounced| bounced.stage);
        stage.is_some_and(|stage| stage != Stage::Idle)
    }

    /// The step under way has to be made again.
    pub fn repeat_bounced(&mut self) {
        if let Some(bounced) = &mut self.bounced {
            bounced.stage = Stage::Idle;
        }
    }
}
