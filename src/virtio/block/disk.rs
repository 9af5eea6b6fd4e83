//! What a block device stores its sectors in: a file of fixed size.

use std::fmt;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};

use super::super::segment::Slice;
use crate::sys;

/// Bytes of a sector, whatever the disk (virtio 1.2, 5.2.4).
pub const SECTOR: u64 = 512;

/// A file, or a block device of the host, that is a disk.
#[derive(Debug)]
pub struct Disk {
    file: File,
    sectors: u64,
    read_only: bool,
}

/// Why a file cannot be used as a disk.
#[derive(Debug)]
pub enum DiskError {
    /// Its size cannot be determined.
    Size(io::Error),
}

impl fmt::Display for DiskError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DiskError::Size(_) => f.write_str("cannot determine the size of the disk"),
        }
    }
}

impl std::error::Error for DiskError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            DiskError::Size(error) => Some(error),
        }
    }
}

impl Disk {
    /// A disk of all whole sectors of `file`, which the caller has opened for reading only if
    /// `read_only`.
    ///
    /// # Errors
    /// When its size cannot be determined.
    pub fn new(mut file: File, read_only: bool) -> Result<Self, DiskError> {
        // Also right for block devices, whose metadata says 0.
        let size = file.seek(SeekFrom::End(0)).map_err(DiskError::Size)?;
        let sectors = size.checked_div(SECTOR).unwrap_or(0);
        let rest = size.checked_rem(SECTOR).unwrap_or(0);
        if rest != 0 {
            crate::warn!(
                "the disk's size of {size} bytes is not a multiple of 512 bytes; the last {rest} bytes \
                 are not visible to the guest"
            );
        }
        Ok(Disk {
            file,
            sectors,
            read_only,
        })
    }

    /// Its size in sectors of 512 bytes.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Whether it refuses writes.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Where sector `first` is in the file, if it and all of `len` bytes from it on are on the disk.
    pub fn locate(&self, first: u64, len: u32) -> Option<u64> {
        let len = u64::from(len);
        if len & (SECTOR - 1) != 0 {
            return None;
        }
        let end = first.checked_add(len.checked_div(SECTOR)?)?;
        if end > self.sectors {
            return None;
        }
        first.checked_mul(SECTOR)
    }

    /// Reads from byte `at` on.
    pub fn read<'a>(&self, slices: impl Iterator<Item = Slice<'a>>, at: u64) -> io::Result<()> {
        sys::io::read_exact_at(&self.file, slices, at)
    }

    /// Writes from byte `at` on.
    pub fn write<'a>(&self, slices: impl Iterator<Item = Slice<'a>>, at: u64) -> io::Result<()> {
        sys::io::write_all_at(&self.file, slices, at)
    }

    /// Makes all writes so far last.
    pub fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// The file, to be closed by another thread.
    pub fn into_file(self) -> File {
        self.file
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::tempfile::TempFile;

    fn disk(size: u64) -> Disk {
        let file = TempFile::new().unwrap().into_file();
        file.set_len(size).unwrap();
        Disk::new(file, false).unwrap()
    }

    #[test]
    fn new_when_size_is_odd_rounds_down() {
        for (size, sectors) in [(0, 0), (511, 0), (512, 1), (1023, 1), (1 << 30, 1 << 21)] {
            assert_eq!(disk(size).sectors(), sectors, "{size}");
        }
    }

    #[test]
    fn locate_when_any_of_it_is_beyond_the_end_is_none() {
        let disk = disk(10 * 512);
        for (first, len, at) in [
            (0, 512, Some(0)),
            (9, 512, Some(9 * 512)),
            (0, 5120, Some(0)),
            (10, 0, Some(5120)),
            (11, 0, None),
            (9, 1024, None),
            (0, 511, None),
            (u64::MAX, 512, None),
            (u64::MAX / 512 + 1, 512, None),
            (1 << 55, 512, None),
        ] {
            assert_eq!(disk.locate(first, len), at, "{first} {len}");
        }
    }
}
