//! What is done for a request between two answers of the host: plain calls as long as nothing waits,
//! then one push to the engine.

use std::io;
use std::mem;

use super::super::Ram;
use super::super::segment::{Segment, clear, copy_out, slices, window};
use super::disk::{Disk, Extent, FileIndex};
use super::engine::Engine;
use super::job::{Job, is_unsupported};
use super::request::{HEADER, Outcome, Request, status};
use super::{Block, SERIAL_LEN};
use crate::sys;
use crate::sys::io::{Access, Space};
use crate::sys::ring::Transfer;

/// How far a step came.
pub enum Step {
    /// The request has ended.
    Ended(Outcome),
    /// The engine has it, in this slot.
    Pushed(u16),
    /// More work than one step may have: it is kept in this slot, to go on with the next one.
    Yielded(u16),
}

/// The most zeros that one step writes, in bytes.
const ZEROS_STEP: u64 = 1 << 20;

/// What was done for one extent.
enum Moved {
    /// This many bytes of it are done.
    Bytes(u64),
    /// The engine has it, in this slot.
    Pushed(u16),
}

impl Block {
    /// Goes on with `job`, whose memory is that of the chain at hand, or is kept in `slot`.
    pub(super) fn step(&mut self, ram: &Ram, job: &mut Job, slot: Option<u16>) -> Step {
        let stepped = match job.request {
            Request::Read { .. } | Request::Write { .. } if job.bounced.is_some() => {
                self.step_bounced(ram, job, slot)
            }
            Request::Read { at, len } => {
                self.parts(ram, job, slot, (at, u64::from(len)), Block::read)
            }
            Request::Write { at, len } => self
                .before_write(job, at, u64::from(len))
                .and_then(|()| self.parts(ram, job, slot, (at, u64::from(len)), Block::write)),
            Request::WriteZeroes { at, len, .. } => self
                .before_write(job, at, len)
                .and_then(|()| self.parts(ram, job, slot, (at, len), Block::write_zeroes)),
            Request::Flush => self.flush(job, slot),
            Request::Discard { at, len } => self.discard(job, slot, at, len),
            Request::GetId => {
                let place = || self.chain.writable().iter().copied();
                // What is behind it is said to be written too.
                let rest = job
                    .writable
                    .saturating_sub(1)
                    .saturating_sub(SERIAL_LEN as u32);
                let told = copy_out(ram, place(), &self.serial)
                    && clear(ram, window(place(), SERIAL_LEN as u32, rest));
                let refused = Outcome::Invalid(status::IOERR);
                return Step::Ended(if told { Outcome::Done } else { refused });
            }
        };
        let is_written = self.served.writes_through && matches!(stepped, Ok(None));
        let stepped = match job.request {
            Request::Write { .. } | Request::WriteZeroes { .. } if is_written => {
                self.make_stable().map(|()| None)
            }
            _ => stepped,
        };
        match stepped {
            Ok(Some(slot)) if mem::take(&mut job.has_yielded) => Step::Yielded(slot),
            Ok(Some(slot)) => Step::Pushed(slot),
            Ok(None) => Step::Ended(Outcome::Done),
            Err(error) => Step::Ended(Outcome::Failed(error)),
        }
    }

    fn before_write(&mut self, job: &Job, at: u64, len: u64) -> io::Result<()> {
        if job.done > 0 {
            return Ok(());
        }
        self.disk.before_write(at, len)
    }

    /// Does `one` for each extent that is left of the request's `len` bytes from `at` on; the slot, when
    /// the engine has one of them.
    fn parts(
        &mut self,
        ram: &Ram,
        job: &mut Job,
        slot: Option<u16>,
        (at, len): (u64, u64),
        one: impl Fn(&mut Block, &Ram, &mut Job, Option<u16>, Extent) -> io::Result<Moved>,
    ) -> io::Result<Option<u16>> {
        let is_read = matches!(job.request, Request::Read { .. });
        while job.done < len {
            let from = at.saturating_add(job.done);
            let left = u32::try_from(len.saturating_sub(job.done)).unwrap_or(1 << 30);
            self.extents.clear();
            if is_read {
                self.disk.read_extents(from, left, &mut self.extents);
            } else {
                self.disk.write_extents(from, left, &mut self.extents);
            }
            let mut number = 0usize;
            while let Some(extent) = self.extents.as_slice().get(number).copied() {
                number = number.saturating_add(1);
                match one(self, ram, job, slot, extent)? {
                    Moved::Bytes(done) => {
                        job.done = job.done.saturating_add(done);
                        if job.by_writing
                            && job.done < len
                            && let Some(slot) = self.yield_in(job, slot)
                        {
                            return Ok(Some(slot));
                        }
                        if done < u64::from(extent.len) {
                            // The rest of it, and where that is.
                            break;
                        }
                    }
                    Moved::Pushed(slot) => return Ok(Some(slot)),
                }
            }
            if number == 0 {
                return Err(io::ErrorKind::InvalidData.into());
            }
        }
        match job.request {
            Request::Write { .. } => self.disk.wrote(at, len)?,
            Request::WriteZeroes { .. } => self.disk.zeroed(at, len)?,
            _ => {}
        }
        Ok(None)
    }

    /// A slot to go on with `job` in with the next unit of work, so that this one has an end.
    pub(super) fn yield_in(&mut self, job: &mut Job, slot: Option<u16>) -> Option<u16> {
        let slot = slot.or_else(|| self.jobs.keep(&[]))?;
        (job.has_yielded, job.step) = (true, 0);
        Some(slot)
    }

    fn read(
        &mut self,
        ram: &Ram,
        job: &mut Job,
        slot: Option<u16>,
        extent: Extent,
    ) -> io::Result<Moved> {
        let skip = job.offset()?;
        if let Some(moved) = self.read_what_is_there(ram, slot, extent, skip)? {
            return Ok(moved);
        }
        if let Some(slot) = self.push(job, slot, Transfer::Read, extent, skip) {
            return Ok(Moved::Pushed(slot));
        }
        let (file, data) = self.plain(slot, Transfer::Read, extent, skip)?;
        sys::io::read_exact_at(file, slices(ram, data), extent.at)?;
        Ok(Moved::Bytes(u64::from(extent.len)))
    }

    /// Reads what needs no waiting; none if that is nothing.
    fn read_what_is_there(
        &self,
        ram: &Ram,
        slot: Option<u16>,
        extent: Extent,
        skip: u32,
    ) -> io::Result<Option<Moved>> {
        let all = Some(Moved::Bytes(u64::from(extent.len)));
        if extent.file == FileIndex::ZERO {
            let memory = self.memory(slot, Transfer::Read).iter().copied();
            let cleared = clear(ram, window(memory, skip, extent.len));
            return match cleared {
                true => Ok(all),
                false => Err(io::ErrorKind::InvalidInput.into()),
            };
        }
        let access = self.disk.file(extent.file).map(|(_, access)| access);
        match access {
            Some(Access::InMemory) => {
                let (file, data) = self.plain(slot, Transfer::Read, extent, skip)?;
                sys::io::read_exact_at(file, slices(ram, data), extent.at)?;
                Ok(all)
            }
            Some(Access::Cached) if slot.is_none() && !self.engine.is_absent() => {
                let (file, data) = self.plain(slot, Transfer::Read, extent, skip)?;
                match sys::io::read_now_at(file, slices(ram, data), extent.at) {
                    Ok(done) => Ok(Some(Moved::Bytes(done as u64))),
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(Some(Moved::Bytes(0))),
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
                    Err(e) if is_unsupported(&e) => Ok(None),
                    Err(e) => Err(e),
                }
            }
            _ => Ok(None),
        }
    }

    fn write(
        &mut self,
        ram: &Ram,
        job: &mut Job,
        slot: Option<u16>,
        extent: Extent,
    ) -> io::Result<Moved> {
        let skip = HEADER.saturating_add(job.offset()?);
        let access = self.disk.file(extent.file).map(|(_, access)| access);
        if matches!(access, Some(Access::Direct | Access::MayWait))
            && let Some(slot) = self.push(job, slot, Transfer::Write, extent, skip)
        {
            return Ok(Moved::Pushed(slot));
        }
        // To the page cache: io_uring is slower there.
        let (file, data) = self.plain(slot, Transfer::Write, extent, skip)?;
        sys::io::write_all_at(file, slices(ram, data), extent.at)?;
        Ok(Moved::Bytes(u64::from(extent.len)))
    }

    /// The file of `extent`, and the part of the request's memory from byte `skip` on that goes there.
    fn plain(
        &self,
        slot: Option<u16>,
        transfer: Transfer,
        extent: Extent,
        skip: u32,
    ) -> io::Result<(&std::fs::File, impl Iterator<Item = Segment>)> {
        let memory = self.memory(slot, transfer).iter().copied();
        let (file, _) = self
            .disk
            .file(extent.file)
            .ok_or(io::ErrorKind::InvalidInput)?;
        Ok((file, window(memory, skip, extent.len)))
    }

    /// The request's memory for a transfer: kept in `slot`, or that of the chain at hand.
    pub(super) fn memory(&self, slot: Option<u16>, transfer: Transfer) -> &[Segment] {
        match (slot, transfer) {
            (Some(slot), _) => self.jobs.memory(slot),
            (None, Transfer::Read) => self.chain.writable(),
            (None, Transfer::Write) => self.chain.readable(),
        }
    }

    /// Gives the engine a transfer; the slot, unless it cannot be given.
    fn push(
        &mut self,
        job: &Job,
        slot: Option<u16>,
        transfer: Transfer,
        extent: Extent,
        skip: u32,
    ) -> Option<u16> {
        let place = (extent.file, extent.at);
        self.give(job, slot, Some(transfer), |engine, disk, slot, memory| {
            let data = window(memory.iter().copied(), skip, extent.len);
            engine.push(slot, transfer, disk, place, data)
        })
    }

    /// Has the engine do what `push` asks it for, in `slot` or in one that keeps the memory for
    /// `transfer`; the slot, unless it cannot be given and has to be done by calls.
    pub(super) fn give(
        &mut self,
        job: &Job,
        slot: Option<u16>,
        transfer: Option<Transfer>,
        push: impl FnOnce(&mut Engine, &Disk, u16, &[Segment]) -> io::Result<()>,
    ) -> Option<u16> {
        if job.by_calls || self.engine.is_absent() {
            return None;
        }
        let memory = match transfer {
            Some(Transfer::Read) => self.chain.writable(),
            Some(Transfer::Write) => self.chain.readable(),
            None => &[],
        };
        let kept = match slot {
            Some(slot) => slot,
            None => self.jobs.keep(memory)?,
        };
        let memory = self.jobs.memory(kept);
        if push(&mut self.engine, &self.disk, kept, memory).is_ok() {
            return Some(kept);
        }
        if slot.is_none() {
            self.jobs.free(kept);
        }
        None
    }

    fn flush(&mut self, job: &Job, slot: Option<u16>) -> io::Result<Option<u16>> {
        self.disk.flush_metadata()?;
        let file = FileIndex::DATA;
        let Some((_, access)) = self.disk.file(file) else {
            return Ok(None);
        };
        let push = |engine: &mut Engine, disk: &Disk, slot, _: &[Segment]| {
            engine.push_sync(slot, disk, file)
        };
        if access != Access::InMemory
            && let Some(slot) = self.give(job, slot, None, push)
        {
            return Ok(Some(slot));
        }
        self.sync().map(|()| None)
    }

    /// A flush that is waited for: for drivers that know none, each write has one.
    fn make_stable(&mut self) -> io::Result<()> {
        self.disk.flush_metadata()?;
        self.sync()
    }

    fn sync(&self) -> io::Result<()> {
        let file = self.disk.file(FileIndex::DATA);
        file.map_or(Ok(()), |(file, _)| file.sync_data())
    }

    fn discard(
        &mut self,
        job: &Job,
        slot: Option<u16>,
        at: u64,
        len: u64,
    ) -> io::Result<Option<u16>> {
        let Some((index, place, space)) = self.disk.discard_extent(at, len) else {
            return Ok(None);
        };
        let Some((_, access)) = self.disk.file(index) else {
            return Ok(None);
        };
        if space == 0 {
            return Ok(None);
        }
        // Before the hole is there: what lay there is given up by the guest from now on.
        self.disk.discarded(at, len)?;
        let push = |engine: &mut Engine, disk: &Disk, slot, _: &[Segment]| {
            engine.push_allocate(slot, disk, (index, place, space), Space::Punched.mode())
        };
        if access != Access::InMemory
            && let Some(slot) = self.give(job, slot, None, push)
        {
            return Ok(Some(slot));
        }
        let Some((file, _)) = self.disk.file(index) else {
            return Ok(None);
        };
        match sys::io::change_space(file, Space::Punched, place, space) {
            Err(e) if is_unsupported(&e) => Ok(None),
            done => done.map(|()| None),
        }
    }

    fn write_zeroes(
        &mut self,
        ram: &Ram,
        job: &mut Job,
        slot: Option<u16>,
        extent: Extent,
    ) -> io::Result<Moved> {
        let Request::WriteZeroes { unmap, .. } = job.request else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let len = u64::from(extent.len);
        let space = if unmap { Space::Punched } else { Space::Zeroed };
        let access = self.disk.file(extent.file).map(|(_, access)| access);
        let place = (extent.file, extent.at, len);
        let push = |engine: &mut Engine, disk: &Disk, slot, _: &[Segment]| {
            engine.push_allocate(slot, disk, place, space.mode())
        };
        if access != Some(Access::InMemory)
            && !job.by_writing
            && let Some(slot) = self.give(job, slot, None, push)
        {
            job.step = len;
            return Ok(Moved::Pushed(slot));
        }
        if !job.by_writing {
            let (file, _) = self
                .disk
                .file(extent.file)
                .ok_or(io::ErrorKind::InvalidInput)?;
            match sys::io::change_space(file, space, extent.at, len) {
                Err(e) if is_unsupported(&e) => job.by_writing = true,
                done => return done.map(|()| Moved::Bytes(len)),
            }
        }
        if job.bounced.is_some() {
            // All that is left.
            let pushed = self.step_bounced(ram, job, slot)?;
            return Ok(pushed.map_or(Moved::Bytes(0), Moved::Pushed));
        }
        let (file, _) = self
            .disk
            .file(extent.file)
            .ok_or(io::ErrorKind::InvalidInput)?;
        let len = len.min(ZEROS_STEP);
        sys::io::write_zeros_at(file, extent.at, len)?;
        Ok(Moved::Bytes(len))
    }
}
