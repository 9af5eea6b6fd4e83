//! Requests under way: how far each has got, and what is kept of it while the host works on it.

use std::io;

use vm_memory::GuestAddress;

use super::super::segment::Segment;
use super::bounce::Bounced;
use super::request::{Outcome, Request};

/// Requests that may be under way at once. More wait in the ring.
pub const SLOTS: u16 = 128;
/// Parts of guest memory kept for each; longer chains are served without being kept.
pub const KEPT: usize = 256;

/// Times that the host may say "again" to the engine, before the request is done without it.
const AGAIN_MAX: u8 = 8;

/// A request that has been begun.
#[derive(Debug)]
pub struct Job {
    pub request: Request,
    /// The descriptor that it began with.
    pub head: u16,
    /// Where its status goes.
    pub status: Option<GuestAddress>,
    /// Bytes the device may write.
    pub writable: u32,
    /// Nanoseconds, when it began.
    pub since: u64,
    /// Bytes of it that are done.
    pub done: u64,
    /// Bytes that the step under way makes 0.
    pub step: u64,
    /// The file does not make bytes 0 by itself: zeros have to be written.
    pub by_writing: bool,
    /// The engine cannot do it now: it is done by calls that wait.
    pub by_calls: bool,
    /// It goes on with the next unit of work, without an answer of the host's.
    pub has_yielded: bool,
    /// The buffer that it goes by, if it has to.
    pub bounced: Option<Bounced>,
    /// The host said "again" this often.
    again: u8,
}

impl Job {
    pub fn new(
        request: Request,
        head: u16,
        status: Option<Segment>,
        writable: u32,
        since: u64,
    ) -> Self {
        Job {
            request,
            head,
            status: status.map(|segment| segment.addr),
            writable,
            since,
            done: 0,
            step: 0,
            by_writing: false,
            by_calls: false,
            has_yielded: false,
            bounced: None,
            again: 0,
        }
    }

    /// Bytes of its transfer that are done.
    pub fn offset(&self) -> io::Result<u32> {
        u32::try_from(self.done).map_err(|_| io::ErrorKind::InvalidInput.into())
    }

    /// What the host answered to the step under way: the outcome, when that was the last.
    pub fn answered(&mut self, result: io::Result<u32>) -> Option<Outcome> {
        match (self.request, result) {
            (_, Err(e)) if may_try_again(&e) && !self.by_calls => {
                self.again = self.again.saturating_add(1);
                self.by_calls = self.again >= AGAIN_MAX;
                None
            }
            (Request::Read { .. }, Ok(0)) => {
                Some(Outcome::Failed(io::ErrorKind::UnexpectedEof.into()))
            }
            (Request::Write { .. }, Ok(0)) => {
                Some(Outcome::Failed(io::ErrorKind::WriteZero.into()))
            }
            (Request::Read { .. } | Request::Write { .. }, Ok(moved)) => {
                self.done = self.done.saturating_add(u64::from(moved));
                None
            }
            (Request::WriteZeroes { .. }, Ok(_)) => {
                self.done = self.done.saturating_add(self.step);
                None
            }
            (Request::WriteZeroes { .. }, Err(e)) if is_unsupported(&e) && !self.by_writing => {
                self.by_writing = true;
                None
            }
            // A discard is a hint (5.2.6.2).
            (Request::Discard { .. }, Err(e)) if is_unsupported(&e) => Some(Outcome::Done),
            (_, Ok(_)) => Some(Outcome::Done),
            (_, Err(e)) => Some(Outcome::Failed(e)),
        }
    }
}

/// The host could not do it now, and has done nothing.
fn may_try_again(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EAGAIN | libc::EINTR | libc::ECANCELED)
    )
}

/// The file has no such operation.
pub fn is_unsupported(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::EINVAL | libc::ENOSYS | libc::ENODEV)
    )
}

/// All jobs that wait for the host, each in a slot. Nothing here allocates once it exists.
#[derive(Debug)]
pub struct Jobs {
    jobs: Vec<Option<Job>>,
    /// [`KEPT`] for each slot that was ever used.
    kept: Vec<Segment>,
    /// How many are kept, by slot.
    kept_len: Vec<usize>,
    /// Bits by slot: taken, in the host's hands, and answered by it.
    taken: u128,
    under_way: u128,
    answered: u128,
    results: Vec<i32>,
}

impl Jobs {
    pub fn new() -> Self {
        let slots = usize::from(SLOTS);
        Jobs {
            jobs: Vec::with_capacity(slots),
            kept: Vec::with_capacity(slots.saturating_mul(KEPT)),
            kept_len: Vec::with_capacity(slots),
            taken: 0,
            under_way: 0,
            answered: 0,
            results: Vec::with_capacity(slots),
        }
    }

    /// Whether another one has room.
    pub fn has_room(&self) -> bool {
        self.taken != u128::MAX
    }

    /// Jobs that the host works on.
    pub fn under_way(&self) -> usize {
        self.under_way.count_ones() as usize
    }

    /// Gives `job` a slot, and keeps `memory` for it; none when there is no room.
    pub fn keep(&mut self, memory: &[Segment]) -> Option<u16> {
        let slot = u16::try_from(self.taken.trailing_ones()).ok()?;
        let index = usize::from(slot);
        if slot >= SLOTS || memory.len() > KEPT {
            return None;
        }
        if index >= self.jobs.len() {
            // The lowest free slot is at most one beyond those that were used before.
            self.jobs.push(None);
            self.kept_len.push(0);
            self.results.push(0);
            let nothing = Segment {
                addr: GuestAddress(0),
                len: 0,
            };
            self.kept
                .resize(self.kept.len().saturating_add(KEPT), nothing);
        }
        let first = index.saturating_mul(KEPT);
        let kept = self.kept.iter_mut().skip(first);
        for (to, from) in kept.zip(memory) {
            *to = *from;
        }
        *self.kept_len.get_mut(index)? = memory.len();
        self.taken |= bit(slot);
        Some(slot)
    }

    /// The memory kept for `slot`.
    pub fn memory(&self, slot: u16) -> &[Segment] {
        let index = usize::from(slot);
        let first = index.saturating_mul(KEPT);
        let len = self.kept_len.get(index).copied().unwrap_or(0);
        let kept = self.kept.get(first..first.saturating_add(len));
        kept.unwrap_or_default()
    }

    /// The host has the job of `slot`.
    pub fn put(&mut self, slot: u16, job: Job) {
        if let Some(place) = self.jobs.get_mut(usize::from(slot)) {
            *place = Some(job);
            self.under_way |= bit(slot);
        }
    }

    /// The slot is free again.
    pub fn free(&mut self, slot: u16) {
        self.taken &= !bit(slot);
        self.under_way &= !bit(slot);
        self.answered &= !bit(slot);
    }

    /// The host has answered to the step of `slot` that was under way.
    pub fn note(&mut self, slot: u16, result: io::Result<u32>) {
        let number = match result {
            Ok(moved) => i32::try_from(moved).unwrap_or(i32::MAX),
            Err(e) => e.raw_os_error().unwrap_or(libc::EIO).saturating_neg(),
        };
        if let Some(place) = self.results.get_mut(usize::from(slot)) {
            *place = number;
            self.under_way &= !bit(slot);
            self.answered |= bit(slot);
        }
    }

    /// A job that the host has answered to; it keeps its slot.
    pub fn take_answered(&mut self) -> Option<(u16, Job, io::Result<u32>)> {
        let slot = u16::try_from(self.answered.trailing_zeros()).ok()?;
        let job = self.jobs.get_mut(usize::from(slot))?.take()?;
        self.answered &= !bit(slot);
        let number = self.results.get(usize::from(slot)).copied()?;
        let result = match u32::try_from(number) {
            Ok(moved) => Ok(moved),
            Err(_) => Err(io::Error::from_raw_os_error(number.saturating_neg())),
        };
        Some((slot, job, result))
    }

    /// Whether the host has answered to any.
    pub fn has_answered(&self) -> bool {
        self.answered != 0
    }

    /// Forgets all of them; the host works on none.
    pub fn clear(&mut self) {
        (self.taken, self.answered) = (self.under_way, 0);
    }
}

fn bit(slot: u16) -> u128 {
    1u128.checked_shl(u32::from(slot)).unwrap_or(0)
}
