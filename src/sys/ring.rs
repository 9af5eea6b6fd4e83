//! A queue of requests to the kernel in shared memory (io_uring), which can do only what it was made
//! for.
//!
//! io_uring goes past seccomp, so a ring is made disabled, restricted to the operations that it is for,
//! on the files that are registered with it (unless it may replace those), and enabled by the thread that
//! will use it, before that thread's filter takes away all ways to change it: what was not allowed ends
//! with EACCES, also when the thread is compromised. The thread that enables a ring owns it for good: requests from
//! others are refused by the kernel (kernels before 6.0 do not check).
//!
//! **Memory.** A ring reads and writes guest memory, and nothing else: it keeps the mapping as long as the
//! kernel may use it, also after its own end. The lists of pieces that the kernel takes lie in storage
//! of the ring's, one *slot* for each request under way; a slot is taken by a push and free again when its
//! completion has been reaped. No buffers are registered: those would go on pointing at the pages
//! that guest memory had before a fork.
//!
//! **Completions** are looked for by [`Ring::reap`]; a thread that sleeps is woken by an eventfd. Nothing
//! allocates after [`Ring::enable`].

#[cfg(test)]
mod tests;

use std::io;
use std::mem::{self, MaybeUninit};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::{Ordering, fence};

use io_uring::register::Restriction;
use io_uring::{IoUring, opcode, squeue, types};
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// What a ring may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Reads and writes.
    Transfer,
    /// fdatasync.
    Sync,
    /// fallocate.
    Allocate,
    /// Putting another file in the place of a registered one. A ring that may do that also takes
    /// requests for files that are not registered.
    ReplaceFile,
}

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transfer {
    /// From the file into guest memory.
    Read,
    /// From guest memory to the file.
    Write,
}

/// What a ring is made for.
#[derive(Clone, Copy, Debug)]
pub struct Design<'a> {
    /// Requests that may be under way.
    pub slots: u16,
    /// Pieces of memory that each may have.
    pub pieces: u16,
    /// What it may do.
    pub operations: &'a [Operation],
    /// Files, by number.
    pub files: &'a [BorrowedFd<'a>],
    /// The most threads the kernel may use for what has to wait; 0 for as many as it likes.
    pub workers: u32,
    /// Requests can be given to these threads at once ([`Ring::push_aside`]).
    pub has_aside: bool,
}

/// A request that has ended.
#[derive(Debug)]
pub struct Completion {
    /// The slot it was pushed with; it is free again.
    pub slot: u16,
    /// Bytes that were moved, or why it failed.
    pub result: io::Result<u32>,
}

/// The most requests between two calls of [`Ring::submit`]; more are submitted by themselves.
const QUEUED: u32 = 64;

/// A ring.
pub struct Ring<B: Bitmap + 'static> {
    ring: IoUring,
    completed: EventFd,
    /// What the pieces lie in, from the enabling on.
    memory: Option<GuestMemoryMmap<B>>,
    slots: Slots,
    /// The file that takes the place of another: the kernel reads it.
    replacement: Box<RawFd>,
    in_flight: u16,
    requires_registered: bool,
}

/// The requests under way, and the pieces of memory of each.
struct Slots {
    /// Those of slot N begin at N times `pieces_each`. Untouched storage costs nothing.
    pieces: Box<[MaybeUninit<libc::iovec>]>,
    pieces_each: usize,
    slots: Box<[Slot]>,
}

#[derive(Clone, Copy, Default)]
struct Slot {
    is_busy: bool,
    /// Pieces of memory that it has.
    filled: u16,
}

// SAFETY: the pieces point into guest memory, which any thread may use; each is used by the thread that
// owns the ring and by the kernel.
unsafe impl Send for Slots {}

impl<B: Bitmap + 'static> Ring<B> {
    /// A ring that does nothing yet.
    ///
    /// # Errors
    /// When the host has no io_uring, forbids it, or lacks what a restricted ring needs (Linux 5.10).
    pub fn new(design: &Design<'_>) -> io::Result<Self> {
        let ring = make(u32::from(design.slots))?;
        let completed = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let submitter = ring.submitter();
        let mut files = [-1; 8];
        if design.files.len() > files.len() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        for (number, file) in files.iter_mut().zip(design.files) {
            *number = file.as_raw_fd();
        }
        submitter.register_files(files.get(..design.files.len()).unwrap_or_default())?;
        submitter.register_eventfd(completed.as_raw_fd())?;
        if design.workers > 0 {
            // What is pushed aside counts among requests that may take as long as they like: their file is looked up
            // later (Linux 6.18). Kernels before 5.15 have no limit to set; the slots are one too.
            let unbound = if design.has_aside { design.workers } else { 1 };
            let mut limits = [design.workers, unbound];
            let _ = submitter.register_iowq_max_workers(&mut limits);
        }
        let flags = match design.has_aside {
            true => squeue::Flags::FIXED_FILE | squeue::Flags::ASYNC,
            false => squeue::Flags::FIXED_FILE,
        };
        let requires_registered = !design.operations.contains(&Operation::ReplaceFile);
        restrict(&ring, design.operations, flags, requires_registered)?;
        Ok(Ring {
            ring,
            completed,
            memory: None,
            slots: Slots::new(design.slots, design.pieces),
            replacement: Box::new(-1),
            in_flight: 0,
            requires_registered,
        })
    }

    /// Lets the ring work for the calling thread, on `memory`. No other thread can use it then.
    ///
    /// # Errors
    /// The host's; a ring that could be made can be enabled, once.
    pub fn enable(&mut self, memory: &GuestMemoryMmap<B>) -> io::Result<()> {
        self.ring.submitter().register_enable_rings()?;
        self.memory = Some(memory.clone());
        Ok(())
    }

    /// Readable when something may have completed; to be watched edge-triggered, and never read.
    pub fn completed(&self) -> RawFd {
        self.completed.as_raw_fd()
    }

    /// Requests pushed, and not reaped yet.
    #[cfg(test)]
    pub fn in_flight(&self) -> u16 {
        self.in_flight
    }

    /// Asks for bytes between file number `file`, from byte `at` on, and `pieces` of guest memory, all of
    /// which lie in RAM. For a file without positions, `at` is 0.
    ///
    /// # Errors
    /// InvalidInput when the slot is not free, there are too many pieces or they lie outside; else why
    /// nothing can be submitted. Nothing is under way then.
    pub fn push(
        &mut self,
        slot: u16,
        transfer: Transfer,
        file: u32,
        at: u64,
        pieces: impl Iterator<Item = (GuestAddress, usize)>,
    ) -> io::Result<()> {
        self.push_with(squeue::Flags::empty(), slot, transfer, (file, at), pieces)
    }

    /// As [`Ring::push`], for a file that would have the calling thread wait where requests are begun: one of the
    /// kernel's threads begins this one. The ring must have been made for it.
    ///
    /// # Errors
    /// As [`Ring::push`].
    pub fn push_aside(
        &mut self,
        slot: u16,
        transfer: Transfer,
        file: u32,
        at: u64,
        pieces: impl Iterator<Item = (GuestAddress, usize)>,
    ) -> io::Result<()> {
        self.push_with(squeue::Flags::ASYNC, slot, transfer, (file, at), pieces)
    }

    fn push_with(
        &mut self,
        flags: squeue::Flags,
        slot: u16,
        transfer: Transfer,
        (file, at): (u32, u64),
        pieces: impl Iterator<Item = (GuestAddress, usize)>,
    ) -> io::Result<()> {
        let memory = self.memory.as_ref().ok_or(io::ErrorKind::InvalidInput)?;
        let is_write = transfer == Transfer::Write;
        self.slots.fill(slot, memory, is_write, pieces)?;
        self.push_transfer(flags, slot, types::Fixed(file), at, is_write)
    }

    /// Asks for an fdatasync of file number `file`.
    ///
    /// # Errors
    /// As [`Ring::push`].
    pub fn push_sync(&mut self, slot: u16, file: u32) -> io::Result<()> {
        let entry = opcode::Fsync::new(types::Fixed(file)).flags(types::FsyncFlags::DATASYNC);
        self.slots.clear(slot)?;
        self.push_entry(slot, entry.build())
    }

    /// Asks for an fallocate with `mode` of `len` bytes of file number `file` from `at` on.
    ///
    /// # Errors
    /// As [`Ring::push`].
    pub fn push_allocate(
        &mut self,
        slot: u16,
        file: u32,
        mode: i32,
        at: u64,
        len: u64,
    ) -> io::Result<()> {
        let entry = opcode::Fallocate::new(types::Fixed(file), len);
        self.slots.clear(slot)?;
        self.push_entry(slot, entry.mode(mode).offset(at).build())
    }

    /// Puts `with` in the place of file number `file`, for what is pushed from now on, and waits for
    /// that. Nothing may be in flight.
    ///
    /// # Errors
    /// ResourceBusy when something is in flight; else the host's.
    pub fn replace_file(&mut self, file: u32, with: impl AsFd) -> io::Result<()> {
        if self.in_flight > 0 {
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        *self.replacement = with.as_fd().as_raw_fd();
        let number: *const RawFd = &raw const *self.replacement;
        let offset = i32::try_from(file).map_err(|_| io::ErrorKind::InvalidInput)?;
        let entry = opcode::FilesUpdate::new(number, 1).offset(offset).build();
        self.slots.clear(0)?;
        self.push_entry(0, entry)?;
        loop {
            self.submit()?;
            if let Some(completion) = self.reap() {
                return completion.result.map(drop);
            }
            self.ring.submit_and_wait(1)?;
        }
    }

    /// Gives the kernel what was pushed. Requests that need not wait have ended then: see
    /// [`Ring::reap`], which the eventfd does not tell of.
    ///
    /// # Errors
    /// When the kernel takes nothing now, because memory or room for completions is short; it can be tried
    /// again.
    pub fn submit(&mut self) -> io::Result<()> {
        let (submitter, mut submissions, completions) = self.ring.split();
        if submissions.is_empty() {
            return Ok(());
        }
        completions.disable_eventfd();
        let submitted = loop {
            let submitted = submitter.submit();
            submissions.sync();
            match submitted {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // One that is refused ends a call of its own on kernels before 5.18.
                Ok(taken) if taken > 0 && !submissions.is_empty() => {}
                other => break other,
            }
        };
        completions.enable_eventfd();
        // What completes from here on rings, and what has before is seen by the caller's look.
        fence(Ordering::SeqCst);
        match submitted {
            Ok(_) if !submissions.is_empty() => Err(io::ErrorKind::WouldBlock.into()),
            other => other.map(drop),
        }
    }

    /// Whether [`Ring::reap`] would find something, as far as can be seen without a system call.
    pub fn has_completions(&mut self) -> bool {
        let (_, submissions, completions) = self.ring.split();
        !completions.is_empty() || submissions.taskrun() || submissions.cq_overflow()
    }

    /// A request that has ended, if there is one. The eventfd tells of what ends after this has found
    /// none.
    pub fn reap(&mut self) -> Option<Completion> {
        if self.in_flight == 0 {
            return None;
        }
        let (submitter, submissions, mut completions) = self.ring.split();
        while completions.is_empty() && (submissions.taskrun() || submissions.cq_overflow()) {
            completions.disable_eventfd();
            // It does what is left to be done for completions.
            let done = submitter.submit_and_wait(0);
            completions.enable_eventfd();
            fence(Ordering::SeqCst);
            completions.sync();
            if done.is_err_and(|e| e.kind() != io::ErrorKind::Interrupted) {
                break;
            }
        }
        let entry = completions.next()?;
        let slot = u16::try_from(entry.user_data()).ok()?;
        let result = match u32::try_from(entry.result()) {
            Ok(moved) => Ok(moved),
            Err(_) => Err(io::Error::from_raw_os_error(entry.result().wrapping_neg())),
        };
        self.slots.release(slot);
        self.in_flight = self.in_flight.saturating_sub(1);
        Some(Completion { slot, result })
    }

    fn push_transfer(
        &mut self,
        flags: squeue::Flags,
        slot: u16,
        file: types::Fixed,
        at: u64,
        is_write: bool,
    ) -> io::Result<()> {
        let pieces = self.slots.pieces(slot)?;
        let entry = match (pieces, is_write) {
            ([one], false) => {
                let len = length(one.iov_len)?;
                opcode::Read::new(file, one.iov_base.cast(), len)
                    .offset(at)
                    .build()
            }
            ([one], true) => {
                let len = length(one.iov_len)?;
                opcode::Write::new(file, one.iov_base.cast(), len)
                    .offset(at)
                    .build()
            }
            (many, false) => opcode::Readv::new(file, many.as_ptr(), length(many.len())?)
                .offset(at)
                .build(),
            (many, true) => opcode::Writev::new(file, many.as_ptr(), length(many.len())?)
                .offset(at)
                .build(),
        };
        self.push_entry(slot, entry.flags(flags))
    }

    fn push_entry(&mut self, slot: u16, entry: squeue::Entry) -> io::Result<()> {
        if self.memory.is_none() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if self.ring.submission().is_full() {
            self.submit()?;
        }
        let entry = entry.user_data(u64::from(slot));
        // SAFETY: the entry names pieces of the slot's, which is free and is held from here on until
        // its completion has been reaped; they lie in `memory`, which is kept as long. Or it names
        // `replacement`, which is kept while something is in flight. Or it names no memory.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        pushed.map_err(|_| io::ErrorKind::WouldBlock)?;
        self.slots.hold(slot);
        self.in_flight = self.in_flight.saturating_add(1);
        Ok(())
    }
}

impl<B: Bitmap + 'static> Drop for Ring<B> {
    fn drop(&mut self) {
        if self.in_flight > 0 {
            // The kernel may use both until it has taken the ring apart, which it does later.
            mem::forget(self.memory.take());
            mem::forget(mem::take(&mut self.slots.pieces));
            mem::forget(mem::take(&mut self.replacement));
        }
    }
}

impl<B: Bitmap + 'static> std::fmt::Debug for Ring<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring")
            .field("in_flight", &self.in_flight)
            .field("requires_registered", &self.requires_registered)
            .finish_non_exhaustive()
    }
}

impl Slots {
    fn new(slots: u16, pieces: u16) -> Self {
        let (slots, pieces_each) = (usize::from(slots), usize::from(pieces));
        Slots {
            pieces: Box::new_uninit_slice(slots.saturating_mul(pieces_each)),
            pieces_each,
            slots: vec![Slot::default(); slots].into_boxed_slice(),
        }
    }

    /// A free slot.
    fn slot(&self, number: u16) -> io::Result<Slot> {
        let slot = self.slots.get(usize::from(number));
        let free = slot.filter(|slot| !slot.is_busy);
        free.copied().ok_or(io::ErrorKind::InvalidInput.into())
    }

    fn hold(&mut self, number: u16) {
        if let Some(slot) = self.slots.get_mut(usize::from(number)) {
            slot.is_busy = true;
        }
    }

    fn release(&mut self, number: u16) {
        if let Some(slot) = self.slots.get_mut(usize::from(number)) {
            slot.is_busy = false;
        }
    }

    /// Writes the pieces of a free slot, and notes that those that will be written to are.
    fn fill<B: Bitmap>(
        &mut self,
        number: u16,
        memory: &GuestMemoryMmap<B>,
        is_write: bool,
        pieces: impl Iterator<Item = (GuestAddress, usize)>,
    ) -> io::Result<()> {
        self.clear(number)?;
        let first = usize::from(number).saturating_mul(self.pieces_each);
        let mut room = self.pieces.iter_mut().skip(first).take(self.pieces_each);
        let mut filled: u16 = 0;
        for (address, len) in pieces {
            for slice in memory.get_slices(address, len) {
                let slice = slice.map_err(|_| io::ErrorKind::InvalidInput)?;
                if !is_write {
                    slice.bitmap().mark_dirty(0, slice.len());
                }
                let piece = room.next().ok_or(io::ErrorKind::InvalidInput)?;
                piece.write(libc::iovec {
                    iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                    iov_len: slice.len(),
                });
                filled = filled.saturating_add(1);
            }
        }
        if let Some(slot) = self.slots.get_mut(usize::from(number)) {
            slot.filled = filled;
        }
        Ok(())
    }

    fn clear(&mut self, number: u16) -> io::Result<()> {
        self.slot(number)?;
        if let Some(slot) = self.slots.get_mut(usize::from(number)) {
            *slot = Slot::default();
        }
        Ok(())
    }

    /// The pieces of a free slot.
    fn pieces(&mut self, number: u16) -> io::Result<&mut [libc::iovec]> {
        let slot = self.slot(number)?;
        let base = usize::from(number).saturating_mul(self.pieces_each);
        let end = base.saturating_add(usize::from(slot.filled));
        let pieces = self.pieces.get_mut(base..end);
        let pieces = pieces.ok_or(io::ErrorKind::InvalidInput)?;
        let (start, count) = (pieces.as_mut_ptr().cast(), pieces.len());
        // SAFETY: `fill`, the only place that raises `filled`, has written that many pieces, and
        // `MaybeUninit` has the layout of what is in it. The borrow of `self` is kept.
        Ok(unsafe { std::slice::from_raw_parts_mut(start, count) })
    }
}

fn length(number: usize) -> io::Result<u32> {
    u32::try_from(number).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// A disabled ring, with what this kernel has of what makes it cheaper for one thread.
fn make(slots: u32) -> io::Result<IoUring> {
    let queued = slots.clamp(1, QUEUED);
    let mut refused = io::Error::from(io::ErrorKind::Unsupported);
    // Since Linux 6.6, 6.1, 5.19 and 5.10.
    for level in (0..4).rev() {
        let mut builder = IoUring::builder();
        builder.setup_r_disabled();
        builder.setup_cqsize(slots.max(queued));
        if level >= 1 {
            builder.setup_submit_all().setup_taskrun_flag();
        }
        match level {
            1 => {
                builder.setup_coop_taskrun();
            }
            2 | 3 => {
                builder.setup_single_issuer().setup_defer_taskrun();
            }
            _ => {}
        }
        if level == 3 {
            builder.setup_no_sqarray();
        }
        match builder.build(queued) {
            Ok(ring) => return Ok(ring),
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => refused = e,
            Err(e) => return Err(e),
        }
    }
    Err(refused)
}

/// Takes away all that is not in `operations`.
fn restrict(
    ring: &IoUring,
    operations: &[Operation],
    flags: squeue::Flags,
    requires_registered: bool,
) -> io::Result<()> {
    let mut list: [Restriction; 9] =
        std::array::from_fn(|_| Restriction::sqe_op(opcode::Readv::CODE));
    let registered = squeue::Flags::FIXED_FILE.bits();
    let mut used = 0;
    let mut add = |restriction| {
        if let Some(place) = list.get_mut(used) {
            *place = restriction;
            used += 1;
        }
    };
    add(Restriction::sqe_flags_allowed(flags.bits()));
    if requires_registered {
        add(Restriction::sqe_flags_required(registered));
    }
    for operation in operations {
        let codes: &[u8] = match operation {
            Operation::Transfer => &[
                opcode::Read::CODE,
                opcode::Readv::CODE,
                opcode::Write::CODE,
                opcode::Writev::CODE,
            ],
            Operation::Sync => &[opcode::Fsync::CODE],
            Operation::Allocate => &[opcode::Fallocate::CODE],
            Operation::ReplaceFile => &[opcode::FilesUpdate::CODE],
        };
        for code in codes {
            add(Restriction::sqe_op(*code));
        }
    }
    let list = list.get_mut(..used).unwrap_or_default();
    ring.submitter().register_restrictions(list)
}
