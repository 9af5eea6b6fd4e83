//! Fork of a running guest: its memory becomes a file that never changes again, and the guest goes
//! on with a private mapping of that file. For shared memory nothing is copied.
//!
//! In order: [`Zap`] empties the page tables while the guest runs, because exchanging a mapping takes
//! as long as its page tables are full; [`Memory::freeze`] exchanges it while the guest is paused and
//! its devices are quiescent; [`Frozen::seal`] forbids every further write, once the guest runs again.
//! Only a sealed file is given out.
//!
//! Memory that is not shared, as after the first fork or a restore, needs a file of its own first:
//! [`Prepare`] copies what is below the guest's own pages while it runs, and freezing adds those.
//!
//! A buffer that io_uring has fixed would keep writing into the frozen file: sealing refuses then.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{MemfdFlags, SealFlags};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use super::image::{Contents, Stamp, Writer, Written};
use super::mapping::{Advice, Over, advise};
use super::{Base, Memory, MemoryError, Pages, Ram, Source, map_all};
use crate::steps::goes_on;

/// How much of the page tables is emptied at a time: a few milliseconds' worth.
const ZAP_STEP: u64 = 16 << 20;

/// How errors call the file in memory.
const NAME: &str = "guest memory";

/// Shared memory, and whether it still is: what empties its page tables looks, since in a private
/// mapping that would undo what the guest has written.
#[derive(Clone, Debug)]
pub(super) struct Shared {
    pub(super) source: Arc<Source>,
    is_shared: Arc<Mutex<bool>>,
}

impl Shared {
    /// A file in memory for `len` bytes of guest memory, all of them holes.
    pub(super) fn new(len: u64) -> io::Result<Shared> {
        Ok(Shared {
            source: memfd(len)?,
            is_shared: Arc::new(Mutex::new(true)),
        })
    }
}

/// A file in memory that can be sealed.
fn memfd(len: u64) -> io::Result<Arc<Source>> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(rustix::fs::memfd_create("guest memory", flags)?);
    file.set_len(len)?;
    Ok(Arc::new(Source::in_memory(file, NAME, len)))
}

/// Empties the page tables of shared memory, step by step, on any thread, while the guest runs. What
/// is in the memory stays; each page that is used again costs a fault.
#[derive(Debug)]
pub struct Zap {
    ram: Ram,
    shared: Option<Shared>,
    at: u64,
}

impl Zap {
    /// Empties all of it; whether that is still wanted. What was emptied until then needs nothing.
    pub fn run(mut self) -> bool {
        while goes_on() {
            if self.step() {
                return true;
            }
        }
        false
    }

    /// Empties the next part; whether that was the last.
    fn step(&mut self) -> bool {
        let Some(shared) = &self.shared else {
            return true;
        };
        let is_shared = shared.is_shared.lock();
        if !*is_shared.unwrap_or_else(PoisonError::into_inner) {
            return true;
        }
        let mut before: u64 = 0;
        for region in self.ram.iter() {
            let end = before.saturating_add(region.len());
            if self.at < end {
                let first = self.at.saturating_sub(before);
                let len = ZAP_STEP.min(region.len().saturating_sub(first));
                if let Ok(part) = region.get_slice(MemoryRegionAddress(first), len as usize) {
                    advise(&part, Advice::DropTables);
                }
                self.at = self.at.saturating_add(len);
                return self.at >= end && !self.goes_on(end);
            }
            before = end;
        }
        true
    }

    /// Whether there is RAM from offset `end` on.
    fn goes_on(&self, end: u64) -> bool {
        let all = self.ram.iter().map(GuestMemoryRegion::len);
        all.fold(0, u64::saturating_add) > end
    }
}

/// The copying of what is below a guest's own pages to a new file, for a fork of memory that is not
/// shared. Runs on any thread while the guest runs.
#[derive(Debug)]
pub struct Prepare(Contents);

/// A file that only lacks the guest's own pages.
#[derive(Debug)]
pub struct Prepared {
    file: Arc<Source>,
    /// What it was copied from.
    below: Option<Arc<Source>>,
}

impl Prepare {
    /// Copies.
    ///
    /// # Errors
    /// The host's.
    pub fn run(self) -> io::Result<Prepared> {
        let Prepare(contents) = self;
        let file = memfd(contents.len())?;
        let below = match &contents.base {
            Base::Image(source) => {
                Writer::new(file.file(), false).copy(source.file(), contents.len())?;
                Some(Arc::clone(source))
            }
            Base::Anonymous | Base::Lazy | Base::Shared(_) => None,
        };
        Ok(Prepared { file, below })
    }
}

/// Guest memory as it was at a fork, in a file that nothing is to write any more.
#[derive(Debug)]
pub struct Frozen(Arc<Source>);

impl Frozen {
    /// Forbids every further change, and gives the file out.
    ///
    /// # Errors
    /// [`MemoryError::Seal`] when the host finds it still in use for writing: it is not frozen then.
    pub fn seal(self) -> Result<Arc<Source>, MemoryError> {
        let seals = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(self.0.file(), seals)
            .map_err(|error| MemoryError::Seal(error.into()))?;
        Ok(self.0)
    }
}

/// Writes the frozen memory `from`, which bears its id already, into `file`, whatever was in that.
///
/// # Errors
/// The host's; the file is then of no use.
pub fn copy_image(from: &Source, file: &File) -> io::Result<Written> {
    file.set_len(0)?;
    file.set_len(from.len())?;
    let mut writer = Writer::new(file, false);
    writer.copy(from.file(), from.len())?;
    Ok(writer.written())
}

impl Memory {
    /// What empties the page tables before a fork. Of memory that is not shared there is nothing to
    /// empty.
    pub fn zap(&self) -> Zap {
        let shared = match &self.base {
            Base::Shared(shared) => Some(shared.clone()),
            Base::Anonymous | Base::Lazy | Base::Image(_) => None,
        };
        Zap {
            ram: self.ram.clone(),
            shared,
            at: 0,
        }
    }

    /// What has to run before memory that is not shared can be frozen.
    pub fn prepare(&self) -> Option<Prepare> {
        match self.base {
            Base::Shared(_) | Base::Lazy => None,
            Base::Anonymous | Base::Image(_) => Some(Prepare(self.contents(None))),
        }
    }

    /// Freezes what is in memory now, with an id, for a fork; the guest's next write is its own. The
    /// guest is paused and its devices are quiescent.
    ///
    /// # Errors
    /// [`MemoryError`] when the pages are of 2 MiB, when `prepared` is not what [`Memory::prepare`]
    /// gave last, and when the host refuses. Memory is as before then, but for
    /// [`MemoryError::Lost`], after which the guest cannot go on.
    pub fn freeze(
        &mut self,
        prepared: Option<Prepared>,
        stamp: &Stamp,
        pagemap: Option<Arc<File>>,
    ) -> Result<Frozen, MemoryError> {
        if self.pages == Pages::TwoMib {
            return Err(MemoryError::SharedHugePages);
        }
        let file = match (&self.base, prepared) {
            (Base::Shared(shared), _) => {
                let file = Arc::clone(&shared.source);
                file.file()
                    .write_all_at(&stamp.id, stamp.offset)
                    .map_err(MemoryError::Freeze)?;
                file
            }
            (Base::Image(base), Some(Prepared { file, below }))
                if below.as_ref().is_some_and(|below| Arc::ptr_eq(below, base)) =>
            {
                file
            }
            (Base::Anonymous, Some(Prepared { file, below: None })) => file,
            (Base::Lazy, _) => return Err(MemoryError::LazyFork),
            _ => return Err(MemoryError::NotPrepared),
        };
        if let Base::Shared(shared) = self.base.clone() {
            let mut is_shared = shared
                .is_shared
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            self.exchange(&file)?;
            *is_shared = false;
        } else {
            let contents = self.contents(pagemap);
            let mut writer = Writer::new(file.file(), true);
            contents
                .write_own(&mut writer, stamp)
                .map_err(MemoryError::Freeze)?;
            self.exchange(&file)?;
        }
        // What was mapped is in the file now.
        self.parts.clear();
        self.records.clear();
        self.base = Base::Image(Arc::clone(&file));
        Ok(Frozen(file))
    }

    /// Maps `file` privately over all of RAM.
    fn exchange(&self, file: &Source) -> Result<(), MemoryError> {
        let Err(cause) = map_all(&self.ram, |offset| Over::Private(file.file(), offset)) else {
            return Ok(());
        };
        // What was mapped before may be gone. What was in it is in its file if that was shared.
        let back = match self.base {
            Base::Shared(_) => map_all(&self.ram, |offset| Over::Shared(file.file(), offset)),
            Base::Anonymous | Base::Lazy | Base::Image(_) => Err(io::ErrorKind::Unsupported.into()),
        };
        Err(match back {
            Ok(()) => MemoryError::Freeze(cause),
            Err(_) => MemoryError::Lost(cause),
        })
    }
}

#[cfg(test)]
mod tests;
