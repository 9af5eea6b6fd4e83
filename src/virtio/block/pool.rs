//! Threads that do what an engine has to wait for, on a host that has no io_uring or forbids it.
//!
//! A [`Pool`] is made with the device and its threads by the device's thread before its filter, all of them at once:
//! there are [`THREADS`], each behind a filter of its own that has reads, writes, fdatasync and fallocate, and nothing
//! else but what waiting and telling takes. A request that hangs holds up one of them. When all hang, requests wait
//! in the pool, and what needs no waiting goes on on the device's thread.
//!
//! The device's thread owns the [`Pool`]; it puts tasks in by [`Pool::push`] and takes what came of them out by
//! [`Pool::reap`]. A task has its file, which stays open as long, and the pieces of guest memory that it uses, copied
//! to where the thread that takes it finds them. Nothing allocates once the threads are there.
//!
//! The threads last as long as the process, or until the pool is dropped and they have no task.

use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use vm_memory::GuestAddress;

use super::super::Ram;
use super::super::segment::{Segment, slices};
use super::job::{KEPT, SLOTS};
use crate::inbox::{Inbox, Sender, inbox};
use crate::seccomp::{self, Category};
use crate::sys;
use crate::sys::io::change_space_by;
use crate::sys::ring::Transfer;

/// Requests that can be waited for at once.
pub const THREADS: usize = 8;
/// Stack of each, in bytes: address space; only what is touched costs memory.
const STACK: usize = 128 * 1024;

/// The threads, and what they have to do.
pub struct Pool {
    shared: Arc<Shared>,
    ended: Inbox<Ended>,
    /// For the threads, until they are made.
    teller: Option<Sender<Ended>>,
    /// Put in since the threads were woken last.
    unannounced: usize,
}

/// What came of a task.
struct Ended {
    slot: u16,
    result: io::Result<u32>,
}

/// What is to be done with a file.
#[derive(Clone, Copy, Debug)]
pub enum Work {
    /// Move bytes between the file and the pieces.
    Transfer(Transfer),
    /// fdatasync.
    Sync,
    /// fallocate with this mode, of so many bytes.
    Allocate(i32, u64),
}

struct Task {
    slot: u16,
    work: Work,
    file: Arc<File>,
    at: u64,
    /// How many pieces it has, from [`KEPT`] times its slot on.
    count: usize,
}

struct Shared {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

struct Waiting {
    tasks: VecDeque<Task>,
    /// [`KEPT`] for each slot that was ever used.
    pieces: Vec<Segment>,
    is_over: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        // A panic ends the process, so a poisoned lock is never seen.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pool {
    /// One without threads.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn new() -> io::Result<Self> {
        let slots = usize::from(SLOTS);
        let (teller, ended) = inbox(slots)?;
        Ok(Pool {
            shared: Arc::new(Shared {
                waiting: Mutex::new(Waiting {
                    tasks: VecDeque::with_capacity(slots),
                    pieces: Vec::with_capacity(slots.saturating_mul(KEPT)),
                    is_over: false,
                }),
                changed: Condvar::new(),
            }),
            ended,
            teller: Some(teller),
            unannounced: 0,
        })
    }

    /// Makes the threads, which use `ram`, and waits until each has its filter, if they are `filtered`; how many the
    /// host lets be made.
    ///
    /// # Errors
    /// When the host has no filters.
    pub fn enter(&mut self, ram: &Ram, filtered: bool) -> io::Result<usize> {
        let Some(teller) = self.teller.take() else {
            return Ok(0);
        };
        let (ready, readies) = sync_channel(THREADS);
        let mut made = 0usize;
        for number in 0..THREADS {
            let (shared, ram) = (Arc::clone(&self.shared), ram.clone());
            let (teller, ready) = (teller.clone(), ready.clone());
            let body = move || work(&shared, &ram, &teller, filtered, &ready);
            let thread = thread::Builder::new().name(format!("block-pool {number}"));
            if thread.stack_size(STACK).spawn(body).is_ok() {
                made = made.saturating_add(1);
            }
        }
        drop(ready);
        readies.iter().take(made).collect::<io::Result<()>>()?;
        Ok(made)
    }

    /// What to watch for ended tasks.
    pub fn source(&self) -> RawFd {
        self.ended.as_raw_fd()
    }

    /// Has `work` done with `file` from byte `at` on, and `pieces` of guest memory.
    ///
    /// # Errors
    /// When there is no room: nothing is under way then.
    pub fn push(
        &mut self,
        slot: u16,
        work: Work,
        (file, at): (Arc<File>, u64),
        pieces: impl Iterator<Item = Segment>,
    ) -> io::Result<()> {
        let mut waiting = self.shared.lock();
        let Waiting {
            tasks,
            pieces: kept,
            ..
        } = &mut *waiting;
        if tasks.len() >= usize::from(SLOTS) || slot >= SLOTS {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let first = usize::from(slot).saturating_mul(KEPT);
        let end = first.saturating_add(KEPT);
        if kept.len() < end {
            let nothing = Segment {
                addr: GuestAddress(0),
                len: 0,
            };
            kept.resize(end, nothing);
        }
        let mut room = kept.iter_mut().skip(first).take(KEPT);
        let mut count = 0usize;
        for piece in pieces {
            *room.next().ok_or(io::ErrorKind::InvalidInput)? = piece;
            count = count.saturating_add(1);
        }
        tasks.push_back(Task {
            slot,
            work,
            file,
            at,
            count,
        });
        self.unannounced = self.unannounced.saturating_add(1);
        Ok(())
    }

    /// Has what was pushed begun.
    pub fn submit(&mut self) {
        match self.unannounced {
            0 => return,
            1 => self.shared.changed.notify_one(),
            _ => self.shared.changed.notify_all(),
        }
        self.unannounced = 0;
    }

    /// Whether [`Pool::reap`] may find something.
    pub fn has_completions(&self) -> bool {
        self.ended.is_pending()
    }

    /// Something that has ended: its slot, and what came of it.
    pub fn reap(&mut self) -> Option<(u16, io::Result<u32>)> {
        let Ended { slot, result } = self.ended.next()?;
        Some((slot, result))
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.lock().is_over = true;
        self.shared.changed.notify_all();
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pool")
    }
}

/// One of the threads.
fn work(
    shared: &Shared,
    ram: &Ram,
    teller: &Sender<Ended>,
    filtered: bool,
    ready: &SyncSender<io::Result<()>>,
) {
    sys::thread::set_name("block-pool");
    let mut pieces = [Segment {
        addr: GuestAddress(0),
        len: 0,
    }; KEPT];
    let installed = match filtered {
        true => seccomp::install(Category::Pool).map_err(io::Error::other),
        false => Ok(()),
    };
    let is_ready = installed.is_ok();
    let _ = ready.send(installed);
    while is_ready && let Some(task) = next(shared, &mut pieces) {
        let memory = pieces.get(..task.count).unwrap_or_default();
        let result = task.run(ram, memory);
        let slot = task.slot;
        // Before it is told of: the device's thread may give the file up then.
        drop(task);
        // There is room for one of each slot.
        let _ = teller.send(Ended { slot, result });
    }
}

/// The next task, once there is one, and its pieces; none when it is over.
fn next(shared: &Shared, pieces: &mut [Segment; KEPT]) -> Option<Task> {
    let mut waiting = shared.lock();
    loop {
        if let Some(task) = waiting.tasks.pop_front() {
            let first = usize::from(task.slot).saturating_mul(KEPT);
            let from = waiting.pieces.iter().skip(first).take(task.count);
            for (to, from) in pieces.iter_mut().zip(from) {
                *to = *from;
            }
            return Some(task);
        }
        if waiting.is_over {
            return None;
        }
        let woken = shared.changed.wait(waiting);
        waiting = woken.unwrap_or_else(PoisonError::into_inner);
    }
}

impl Task {
    fn run(&self, ram: &Ram, memory: &[Segment]) -> io::Result<u32> {
        let file = &*self.file;
        let data = slices(ram, memory.iter().copied());
        match self.work {
            Work::Transfer(Transfer::Read) => sys::io::read_exact_at(file, data, self.at)?,
            Work::Transfer(Transfer::Write) => sys::io::write_all_at(file, data, self.at)?,
            Work::Sync => return file.sync_data().map(|()| 0),
            Work::Allocate(mode, len) => {
                return change_space_by(file, mode, self.at, len).map(|()| 0);
            }
        }
        // At most 4 GiB.
        Ok(memory
            .iter()
            .fold(0, |sum, piece| sum.saturating_add(piece.len)))
    }
}
