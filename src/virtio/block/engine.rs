//! Where a block device sends what would hold it up: an io_uring or, on a host that has none or forbids it, a pool of
//! threads.
//!
//! Either is made with the device; the ring is enabled and the threads are made by the device's thread before its
//! filter is installed ([`crate::sys::ring`], [`Pool`]): both are impossible later. Without any, everything is done
//! by calls that wait.

use std::fs::File;
use std::io;
use std::iter;
use std::mem;
use std::os::fd::{AsFd, RawFd};
use std::sync::Arc;

use super::super::Ram;
use super::super::segment::Segment;
use super::disk::{Disk, FileIndex};
use super::job::{KEPT, SLOTS};
use super::pool::{Pool, THREADS, Work};
use crate::memory::WriteLog;
use crate::sys::io::Access;
use crate::sys::ring::{Design, Operation, Ring, Transfer};

/// Threads that the kernel may use for one device.
const WORKERS: u32 = 16;

/// What a ring may do; the last only where files can be replaced.
const ALL: [Operation; 4] = [
    Operation::Transfer,
    Operation::Sync,
    Operation::Allocate,
    Operation::ReplaceFile,
];

/// What does the waiting.
#[derive(Debug)]
pub enum Engine {
    /// The device's thread.
    Absent,
    /// An io_uring.
    Ring(Box<Ring<WriteLog>>),
    /// Threads.
    Pool(Box<Pool>),
    /// One that has lost its files.
    Lost(
        #[expect(dead_code, reason = "no thread with a filter can take a ring apart")]
        Box<Ring<WriteLog>>,
    ),
}

impl Engine {
    /// One for `files`, by their numbers, which [`Engine::replace`] can put others in the place of only
    /// if `is_replaceable`.
    pub fn new(files: &[&File], is_replaceable: bool) -> Self {
        let mut fds = Vec::with_capacity(files.len());
        fds.extend(files.iter().map(|file| file.as_fd()));
        let ring = Ring::new(&Design {
            slots: SLOTS,
            pieces: KEPT as u16,
            operations: match is_replaceable {
                true => &ALL,
                false => ALL.get(..3).unwrap_or_default(),
            },
            files: &fds,
            workers: WORKERS,
            has_aside: true,
        });
        match ring {
            Ok(ring) => Engine::Ring(Box::new(ring)),
            Err(error) => {
                crate::info!(
                    "This host has no io_uring for a disk, which is served by {THREADS} threads: {error}."
                );
                Pool::new().map_or(Engine::Absent, |pool| Engine::Pool(Box::new(pool)))
            }
        }
    }

    /// The calling thread is the one that uses it. Threads of its own get a filter if they are to be `filtered`.
    ///
    /// # Errors
    /// The host's.
    pub fn enter(&mut self, ram: &Ram, filtered: bool) -> io::Result<()> {
        match self {
            Engine::Absent | Engine::Lost(_) => Ok(()),
            Engine::Ring(ring) => ring.enable(ram),
            Engine::Pool(pool) => {
                if pool.enter(ram, filtered)? == 0 {
                    crate::warn!(
                        "No thread can be made for a disk (a limit on processes or memory?): what it waits for holds \
                         up its other requests"
                    );
                    *self = Engine::Absent;
                }
                Ok(())
            }
        }
    }

    /// What to watch for completions.
    pub fn source(&self) -> Option<RawFd> {
        match self {
            Engine::Absent | Engine::Lost(_) => None,
            Engine::Ring(ring) => Some(ring.completed()),
            Engine::Pool(pool) => Some(pool.source()),
        }
    }

    /// Whether anything can be pushed.
    pub fn is_absent(&self) -> bool {
        matches!(self, Engine::Absent | Engine::Lost(_))
    }

    /// Asks for bytes between file `file` of `disk`, from byte `at` on, and `memory`.
    ///
    /// # Errors
    /// When it cannot be asked for: nothing is under way then.
    pub fn push(
        &mut self,
        slot: u16,
        transfer: Transfer,
        disk: &Disk,
        (file, at): (FileIndex, u64),
        memory: impl Iterator<Item = Segment>,
    ) -> io::Result<()> {
        match self {
            Engine::Absent | Engine::Lost(_) => Err(io::ErrorKind::Unsupported.into()),
            Engine::Ring(ring) => {
                let pieces = memory.map(|segment| (segment.addr, segment.len as usize));
                let number = file.number();
                match disk.file(file) {
                    Some((_, Access::MayWait)) => {
                        ring.push_aside(slot, transfer, number, at, pieces)
                    }
                    _ => ring.push(slot, transfer, number, at, pieces),
                }
            }
            Engine::Pool(pool) => {
                let file = shared(disk, file)?;
                pool.push(slot, Work::Transfer(transfer), (file, at), memory)
            }
        }
    }

    /// Asks for an fdatasync of file `file` of `disk`.
    ///
    /// # Errors
    /// As [`Engine::push`].
    pub fn push_sync(&mut self, slot: u16, disk: &Disk, file: FileIndex) -> io::Result<()> {
        match self {
            Engine::Absent | Engine::Lost(_) => Err(io::ErrorKind::Unsupported.into()),
            Engine::Ring(ring) => ring.push_sync(slot, file.number()),
            Engine::Pool(pool) => {
                let file = shared(disk, file)?;
                pool.push(slot, Work::Sync, (file, 0), iter::empty())
            }
        }
    }

    /// Asks for an fallocate with `mode` of `len` bytes of file `file` of `disk` from `at` on.
    ///
    /// # Errors
    /// As [`Engine::push`].
    pub fn push_allocate(
        &mut self,
        slot: u16,
        disk: &Disk,
        (file, at, len): (FileIndex, u64, u64),
        mode: i32,
    ) -> io::Result<()> {
        match self {
            Engine::Absent | Engine::Lost(_) => Err(io::ErrorKind::Unsupported.into()),
            Engine::Ring(ring) => ring.push_allocate(slot, file.number(), mode, at, len),
            Engine::Pool(pool) => {
                let file = shared(disk, file)?;
                pool.push(slot, Work::Allocate(mode, len), (file, at), iter::empty())
            }
        }
    }

    /// Has what was pushed begun; whether all was, or it has to be tried again.
    pub fn submit(&mut self) -> bool {
        match self {
            Engine::Absent | Engine::Lost(_) => true,
            Engine::Ring(ring) => ring.submit().is_ok(),
            Engine::Pool(pool) => {
                pool.submit();
                true
            }
        }
    }

    /// Whether [`Engine::reap`] may find something.
    pub fn has_completions(&mut self) -> bool {
        match self {
            Engine::Absent | Engine::Lost(_) => false,
            Engine::Ring(ring) => ring.has_completions(),
            Engine::Pool(pool) => pool.has_completions(),
        }
    }

    /// Something that has ended: its slot, and what came of it.
    pub fn reap(&mut self) -> Option<(u16, io::Result<u32>)> {
        match self {
            Engine::Absent | Engine::Lost(_) => None,
            Engine::Ring(ring) => {
                let completion = ring.reap()?;
                Some((completion.slot, completion.result))
            }
            Engine::Pool(pool) => pool.reap(),
        }
    }

    /// `with` takes the place of the files, by their numbers. Nothing is in flight.
    ///
    /// # Errors
    /// The host's: nothing can be pushed any more.
    pub fn replace(&mut self, with: &[&File]) -> io::Result<()> {
        let mut ring = match mem::replace(self, Engine::Absent) {
            Engine::Ring(ring) => ring,
            // A task of the pool has its file with it.
            other => {
                *self = other;
                return Ok(());
            }
        };
        let mut files = (0u32..).zip(with);
        let replaced = files.try_for_each(|(number, file)| ring.replace_file(number, file));
        *self = match replaced {
            Ok(()) => Engine::Ring(ring),
            Err(_) => Engine::Lost(ring),
        };
        replaced
    }
}

fn shared(disk: &Disk, file: FileIndex) -> io::Result<Arc<File>> {
    disk.shared(file).ok_or(io::ErrorKind::InvalidInput.into())
}
