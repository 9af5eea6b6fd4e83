//! The steps of a request that goes by a buffer (see [`super::bounce`]).

use std::io;

use super::super::Ram;
use super::super::segment::{Segment, clear, slices, window};
use super::Block;
use super::bounce::{Bounce, Bounced, NoBuffer, Stage, need};
use super::disk::FileIndex;
use super::job::Job;
use super::request::{HEADER, Request};
use crate::sys;
use crate::sys::ring::Transfer;

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
                let done = job.offset()?;
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
                let skip = HEADER.saturating_add(job.offset()?);
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
