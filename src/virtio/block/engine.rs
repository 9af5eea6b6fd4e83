//! Where a block device sends what would hold it up: an io_uring.
//!
//! The ring is made with the device and enabled by the device's thread before its filter is installed
//! ([`crate::sys::ring`]); both are impossible later. Without one, everything is done by calls that
//! wait.

use std::fs::File;
use std::io;
use std::mem;
use std::os::fd::{AsFd, RawFd};

use super::super::Ram;
use super::super::segment::Segment;
use super::disk::FileIndex;
use super::job::{KEPT, SLOTS};
use crate::memory::WriteLog;
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
    /// One that has lost its files.
    Lost(
        #[expect(dead_code, reason = "no thread with a filter can take a ring apart")]
        Box<Ring<WriteLog>>,
    ),
}

impl Engine {
    /// One for `files`, by their numbers, which [`Engine::replace`] can put others in the place of only
    /// if `is_replaceable`; none where the host has none.
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
        });
        match ring {
            Ok(ring) => Engine::Ring(Box::new(ring)),
            Err(error) => {
                crate::info!(
                    "This host has no io_uring for a disk, which is served without: {error}."
                );
                Engine::Absent
            }
        }
    }

    /// The calling thread is the one that uses it.
    ///
    /// # Errors
    /// The host's.
    pub fn enter(&mut self, ram: &Ram) -> io::Result<()> {
        match self {
            Engine::Absent | Engine::Lost(_) => Ok(()),
            Engine::Ring(ring) => ring.enable(ram),
        }
    }

    /// What to watch for completions.
    pub fn source(&self) -> Option<RawFd> {
        match self {
            Engine::Absent | Engine::Lost(_) => None,
            Engine::Ring(ring) => Some(ring.completed()),
        }
    }

    /// Whether anything can be pushed.
    pub fn is_absent(&self) -> bool {
        !matches!(self, Engine::Ring(_))
    }

    /// Asks for bytes between `file`, from byte `at` on, and `memory`.
    ///
    /// # Errors
    /// When it cannot be asked for: nothing is under way then.
    pub fn push(
        &mut self,
        slot: u16,
        transfer: Transfer,
        (file, at): (FileIndex, u64),
        memory: impl Iterator<Item = Segment>,
    ) -> io::Result<()> {
        let pieces = memory.map(|segment| (segment.addr, segment.len as usize));
        match self {
            Engine::Absent | Engine::Lost(_) => Err(io::ErrorKind::Unsupported.into()),
            Engine::Ring(ring) => ring.push(slot, transfer, file.number(), at, pieces),
        }
    }

    /// Asks for an fdatasync of `file`.
    ///
    /// # Errors
    /// As [`Engine::push`].
    pub fn push_sync(&mut self, slot: u16, file: FileIndex) -> io::Result<()> {
        match self {
            Engine::Absent | Engine::Lost(_) => Err(io::ErrorKind::Unsupported.into()),
            Engine::Ring(ring) => ring.push_sync(slot, file.number()),
        }
    }

    /// Asks for an fallocate with `mode` of `len` bytes of `file` from `at` on.
    ///
    /// # Errors
    /// As [`Engine::push`].
    pub fn push_allocate(
        &mut self,
        slot: u16,
        (file, at, len): (FileIndex, u64, u64),
        mode: i32,
    ) -> io::Result<()> {
        match self {
            Engine::Absent | Engine::Lost(_) => Err(io::ErrorKind::Unsupported.into()),
            Engine::Ring(ring) => ring.push_allocate(slot, file.number(), mode, at, len),
        }
    }

    /// Has what was pushed begun; whether all was, or it has to be tried again.
    pub fn submit(&mut self) -> bool {
        match self {
            Engine::Absent | Engine::Lost(_) => true,
            Engine::Ring(ring) => ring.submit().is_ok(),
        }
    }

    /// Whether [`Engine::reap`] may find something.
    pub fn has_completions(&mut self) -> bool {
        match self {
            Engine::Absent | Engine::Lost(_) => false,
            Engine::Ring(ring) => ring.has_completions(),
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
        }
    }

    /// `with` takes the place of the files, by their numbers. Nothing is in flight.
    ///
    /// # Errors
    /// The host's: nothing can be pushed any more.
    pub fn replace(&mut self, with: &[&File]) -> io::Result<()> {
        if self.is_absent() {
            return Ok(());
        }
        let Engine::Ring(mut ring) = mem::replace(self, Engine::Absent) else {
            return Ok(());
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
