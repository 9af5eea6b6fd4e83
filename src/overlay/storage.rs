//! What an overlay does with a file.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::ops::Range;

use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;
use vm_memory::VolatileSlice;

use crate::sys;

/// A file, as far as an overlay uses it. Tests have others than [`File`].
pub trait Storage {
    /// Fills `bytes` from `at` on.
    ///
    /// # Errors
    /// The host's; UnexpectedEof when the file ends before.
    fn read_exact_at(&self, bytes: &mut [u8], at: u64) -> io::Result<()>;

    /// Writes all of `bytes` at `at`.
    ///
    /// # Errors
    /// The host's.
    fn write_all_at(&self, bytes: &mut [u8], at: u64) -> io::Result<()>;

    /// Makes what was written last.
    ///
    /// # Errors
    /// The host's.
    fn sync_data(&self) -> io::Result<()>;

    /// The same by the call that the files thread may make.
    ///
    /// # Errors
    /// The host's.
    fn sync_all(&self) -> io::Result<()> {
        self.sync_data()
    }

    /// Gives the space of `range` back, where the file system can; what is read there is zeros then, or else
    /// what was there.
    ///
    /// # Errors
    /// The host's.
    fn punch(&self, range: Range<u64>) -> io::Result<()>;

    /// Its length.
    ///
    /// # Errors
    /// The host's.
    fn size(&self) -> io::Result<u64>;

    /// Changes its length.
    ///
    /// # Errors
    /// The host's.
    fn set_size(&self, size: u64) -> io::Result<()>;

    /// The first part of `range` that may hold something else than a hole.
    ///
    /// # Errors
    /// The host's.
    fn next_data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>>;
}

impl Storage for File {
    fn read_exact_at(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        sys::io::read_exact_at(self, Some(VolatileSlice::from(bytes)).into_iter(), at)
    }

    fn write_all_at(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        sys::io::write_all_at(self, Some(VolatileSlice::from(bytes)).into_iter(), at)
    }

    fn sync_data(&self) -> io::Result<()> {
        File::sync_data(self)
    }

    fn sync_all(&self) -> io::Result<()> {
        File::sync_all(self)
    }

    fn punch(&self, range: Range<u64>) -> io::Result<()> {
        let len = range.end.saturating_sub(range.start);
        if len == 0 {
            return Ok(());
        }
        let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        loop {
            match rustix::fs::fallocate(self, how, range.start, len) {
                // A file system without holes keeps the space.
                Ok(()) | Err(Errno::OPNOTSUPP) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn set_size(&self, size: u64) -> io::Result<()> {
        self.set_len(size)
    }

    fn next_data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        let start = match rustix::fs::seek(self, SeekFrom::Data(range.start)) {
            Ok(start) => start.max(range.start),
            // A hole to the end.
            Err(Errno::NXIO) => return Ok(None),
            // A file system without holes: all of it is data.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some(range)),
            Err(error) => return Err(error.into()),
        };
        if start >= range.end {
            return Ok(None);
        }
        let end = match rustix::fs::seek(self, SeekFrom::Hole(start)) {
            Ok(end) if end > start => end.min(range.end),
            Ok(_) => return Err(ErrorKind::UnexpectedEof.into()),
            Err(error) => return Err(error.into()),
        };
        Ok(Some(start..end))
    }
}
