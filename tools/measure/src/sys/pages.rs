//! Which pages of the floor's memory hold something, and their way into a file.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use super::GuestMemory;

/// From the kernel's `linux/fs.h`.
#[repr(C)]
#[derive(Default)]
struct ScanArguments {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    regions: u64,
    regions_len: u64,
    max_pages: u64,
    inverted: u64,
    all_of: u64,
    any_of: u64,
    returned: u64,
}

/// Likewise.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
const PRESENT: u64 = 1 << 3;
const ZERO_PAGE: u64 = 1 << 5;
/// Regions found by one call.
const REGIONS: usize = 512;

impl GuestMemory {
    /// Offsets of the pages that are present and not the shared page of zeros.
    pub fn used(&self, pagemap: &File) -> io::Result<Vec<Range<usize>>> {
        let base = self.start.as_ptr() as u64;
        let mut found = Vec::new();
        let mut regions = vec![Region::default(); REGIONS];
        let mut arguments = ScanArguments {
            size: size_of::<ScanArguments>() as u64,
            start: base,
            end: base + self.len as u64,
            regions: regions.as_mut_ptr() as u64,
            regions_len: REGIONS as u64,
            inverted: ZERO_PAGE,
            all_of: PRESENT | ZERO_PAGE,
            returned: PRESENT,
            ..Default::default()
        };
        while arguments.start < arguments.end {
            // SAFETY: the arguments have the kernel's layout, and the regions have room for as many as they say.
            let count =
                unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN as _, &mut arguments) };
            let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
            let offsets =
                |region: &Region| (region.start - base) as usize..(region.end - base) as usize;
            found.extend(regions.iter().take(count).map(offsets));
            arguments.start = arguments.walk_end;
        }
        Ok(found)
    }

    /// Writes a range to the same offsets of a file.
    pub fn save(&self, range: Range<usize>, file: &File) -> io::Result<()> {
        self.check(range.start, range.len())?;
        let mut at = range.start;
        while at < range.end {
            // SAFETY: `check` keeps the range inside the mapping, which `self` owns and the kernel only reads.
            let written = unsafe {
                libc::pwrite(
                    file.as_raw_fd(),
                    self.start.add(at).as_ptr().cast(),
                    range.end - at,
                    at as libc::off_t,
                )
            };
            match usize::try_from(written) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => at += written,
                Err(_) => return Err(io::Error::last_os_error()),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn used_when_two_pages_were_written_has_them_and_they_come_to_a_file() {
        const LEN: usize = 64 << 20;
        let written = [3 << 12, LEN - (1 << 12)];
        let mut memory = GuestMemory::new(LEN).unwrap();
        for at in written {
            memory.write(at, b"a").unwrap();
        }
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let used = memory.used(&pagemap).unwrap();
        for at in written {
            assert!(used.iter().any(|range| range.contains(&at)), "{used:?}");
        }
        // With huge pages more than the two is used, but not all.
        assert!(used.iter().map(Range::len).sum::<usize>() < LEN / 2);
        let path = std::env::temp_dir().join(format!("mayfly-pages-{}", std::process::id()));
        let mut options = File::options();
        let file = options
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .unwrap();
        std::fs::remove_file(&path).unwrap();
        for range in used {
            memory.save(range, &file).unwrap();
        }
        for at in written {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at as u64).unwrap();
            assert_eq!(byte, *b"a");
        }
    }
}
