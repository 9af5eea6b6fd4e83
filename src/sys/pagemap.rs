//! Which pages of a range of this process's own addresses hold something: /proc/self/pagemap and
//! mincore(2). Nothing is read of the memory itself.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

const PAGE: u64 = 4096;

/// What the kernel's `struct pm_scan_arg` is (linux/fs.h).
#[repr(C)]
struct ScanArgument {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// The kernel's `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// `_IOWR('f', 16, struct pm_scan_arg)`
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;

const IS_FILE: u64 = 1 << 2;
const IS_PRESENT: u64 = 1 << 3;
const IS_SWAPPED: u64 = 1 << 4;
const IS_PFNZERO: u64 = 1 << 5;

/// Bits of an entry of /proc/self/pagemap (Documentation/admin-guide/mm/pagemap.rst).
const ENTRY_FILE: u64 = 1 << 61;
const ENTRY_SWAPPED: u64 = 1 << 62;
const ENTRY_PRESENT: u64 = 1 << 63;

/// How many ranges the kernel gives at a time.
const REGIONS: usize = 256;

/// How many entries are read at a time.
const ENTRIES: usize = 1024;

/// Which pages are looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// This process's own: present or swapped out, neither a file's nor the page of zeros that all
    /// share.
    Own,
    /// A file's that are in this process's page tables.
    File,
}

/// Tells `found` the ranges of `addresses` whose pages are of a kind.
///
/// # Errors
/// The host's; ENOTTY before Linux 6.7.
pub fn scan(
    pagemap: &File,
    kind: Kind,
    addresses: Range<u64>,
    mut found: impl FnMut(Range<u64>),
) -> io::Result<()> {
    let mut regions = [PageRegion {
        start: 0,
        end: 0,
        categories: 0,
    }; REGIONS];
    let mut start = addresses.start;
    while start < addresses.end {
        let mut argument = ScanArgument {
            size: size_of::<ScanArgument>() as u64,
            flags: 0,
            start,
            end: addresses.end,
            walk_end: 0,
            vec: regions.as_mut_ptr() as u64,
            vec_len: REGIONS as u64,
            max_pages: 0,
            category_inverted: match kind {
                Kind::Own => IS_FILE | IS_PFNZERO,
                Kind::File => IS_PFNZERO,
            },
            category_mask: IS_FILE | IS_PFNZERO,
            category_anyof_mask: IS_PRESENT | IS_SWAPPED,
            return_mask: IS_PRESENT,
        };
        // SAFETY: both structures are as the kernel declares them, and it writes at most
        // `vec_len` of the regions, which outlive the call. It looks at page tables only.
        let count = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut argument) };
        let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        for region in regions.iter().take(count) {
            found(region.start..region.end);
        }
        if argument.walk_end <= start {
            return Err(io::ErrorKind::InvalidData.into());
        }
        start = argument.walk_end;
    }
    Ok(())
}

/// The same by the entries of pagemap, on any Linux; pages of zeros count as present.
///
/// # Errors
/// The host's.
pub fn read_entries(
    pagemap: &File,
    kind: Kind,
    addresses: Range<u64>,
    mut found: impl FnMut(Range<u64>),
) -> io::Result<()> {
    let mut buffer = [0; ENTRIES * size_of::<u64>()];
    let mut address = addresses.start;
    while address < addresses.end {
        let pages = (addresses.end - address).div_ceil(PAGE).min(ENTRIES as u64);
        let bytes = buffer.get_mut(..pages as usize * size_of::<u64>());
        let bytes = bytes.unwrap_or_default();
        pagemap.read_exact_at(bytes, address / PAGE * size_of::<u64>() as u64)?;
        for entry in bytes.as_chunks().0 {
            let entry = u64::from_le_bytes(*entry);
            let is_there = entry & (ENTRY_PRESENT | ENTRY_SWAPPED) != 0;
            let is_file = entry & ENTRY_FILE != 0;
            if is_there && is_file == (kind == Kind::File) {
                found(address..address + PAGE);
            }
            address += PAGE;
        }
    }
    Ok(())
}

/// The same by mincore(2), which needs no descriptor: pages of zeros and those of files count, and
/// where the host has swap what is swapped out is missed.
///
/// # Errors
/// The host's; Unsupported where there is swap.
pub fn resident(addresses: Range<u64>, mut found: impl FnMut(Range<u64>)) -> io::Result<()> {
    has_no_swap()?;
    let mut buffer = [0; 4096];
    let mut address = addresses.start;
    while address < addresses.end {
        let pages = (addresses.end - address)
            .div_ceil(PAGE)
            .min(buffer.len() as u64);
        let len = pages * PAGE;
        // SAFETY: the kernel writes a byte for each page of the range, which `buffer` has room for;
        // of the range it looks at page tables only.
        let done = unsafe { libc::mincore(address as *mut _, len as usize, buffer.as_mut_ptr()) };
        if done != 0 {
            return Err(io::Error::last_os_error());
        }
        for byte in buffer.iter().take(pages as usize) {
            if byte & 1 != 0 {
                found(address..address + PAGE);
            }
            address += PAGE;
        }
    }
    has_no_swap()
}

/// Whether nothing can be swapped out, in-memory swap included.
fn has_no_swap() -> io::Result<()> {
    match rustix::system::sysinfo().totalswap {
        0 => Ok(()),
        _ => Err(io::ErrorKind::Unsupported.into()),
    }
}
