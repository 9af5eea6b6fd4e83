//! Guest memory: what it is made of, how files get into it, and its registration with KVM.
//!
//! Owned by control; devices and vCPUs hold clones of [`Ram`], whose regions are shared. Files
//! are mapped privately over the guest's pages rather than read into them: nothing is copied at
//! start, all guests of a host share one copy in its page cache, and what a guest writes is its
//! own. The price: a file that is mapped must be replaced by rename, never rewritten in place.
//! [`Memory::changed_file`] tells whether that was done, [`mapped::file_at`] who is to blame
//! when it is done later: a file cut short shows as SIGBUS where this process touches guest
//! memory, and where the guest does as EFAULT or a memory fault from KVM_RUN, or, when KVM
//! emulates the instruction, as an MMIO exit with an address in RAM.
#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

pub mod mapped;

use std::error::Error;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vm_memory::mmap::{FromRangesError, MmapRegionError};
use vm_memory::{
    Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap, MmapRegion, VolatileSlice,
};

/// Guest RAM as devices see it. Cloning it copies a few pointers.
pub type Ram = GuestMemoryMmap<()>;

const MIB: u64 = 1 << 20;

/// Granularity of mapping, and of what the guest is told.
pub const PAGE: u64 = 4096;

/// RAM below 4 GiB ends here at the latest: the last GiB of it is the hole for devices.
pub const LOW_RAM_END_MAX: u64 = 0xc000_0000;

/// RAM continues here when there is more than fits below the hole.
pub const HIGH_RAM: u64 = 0x1_0000_0000;

/// KVM takes at most 2^31 - 1 pages in a slot (KVM_MEM_MAX_NR_PAGES).
const SLOT_MAX: u64 = ((1 << 31) - 1) * PAGE;

/// More guest memory than this many times the host's is refused. Guests may be given more than
/// there is, since they seldom use all of it; but KVM's own tables grow with what they are
/// given, and with sizes that can only be a mistake they could exhaust the host.
const OVERCOMMIT_MAX: u64 = 16;

/// What is shorter is copied: a mapping costs about as much as 16 pages copied.
const MAP_MIN: u64 = 16 * PAGE;

/// How much is read at a time when a file is copied.
const COPY_CHUNK: u64 = 256 * 1024;

/// What guest memory is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pages {
    /// The host's ordinary pages.
    Ordinary,
    /// Ordinary pages that the host is asked to join to huge ones where it can.
    Transparent,
    /// Pages of 2 MiB out of the host's pool, all of them set aside at once.
    TwoMib,
}

/// Guest memory, and the files that are mapped into it.
#[derive(Debug)]
pub struct Memory {
    ram: Ram,
    size_mib: u64,
    pages: Pages,
    /// Kept open to see whether they change.
    sources: Vec<Arc<Source>>,
    records: Vec<mapped::Record>,
}

/// A file to fill guest memory from, with its size and time of change when it was opened.
#[derive(Debug)]
pub struct Source {
    file: File,
    name: String,
    len: u64,
    modified: (i64, i64),
}

/// Why there is no guest memory, or why something did not get into it.
#[derive(Debug)]
pub enum MemoryError {
    /// 0 MiB.
    Nothing,
    /// More than KVM, or any host, can have.
    TooLarge {
        /// What was asked for.
        size_mib: u64,
        /// What would have been possible.
        limit_mib: u64,
    },
    /// The host refused to map it.
    Map {
        /// What was asked for.
        size_mib: u64,
        /// The host's reason.
        cause: FromRangesError,
    },
    /// The host's pool has not as many huge pages.
    HugePages {
        /// What was asked for.
        size_mib: u64,
        /// The host's reason.
        cause: MmapRegionError,
    },
    /// A range that is not in RAM, or not in one piece of it.
    Outside {
        /// First guest address.
        address: u64,
        /// Bytes.
        len: u64,
    },
    /// A file could not be read, or ended early.
    Read {
        /// The file.
        name: String,
        /// The host's reason.
        cause: io::Error,
    },
    /// KVM refused a memory slot.
    Register(kvm_ioctls::Error),
}

impl fmt::Display for MemoryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            MemoryError::Nothing => write!(f, "0 MiB of guest memory is too little to run a guest"),
            MemoryError::TooLarge {
                size_mib,
                limit_mib,
            } => write!(
                f,
                "{size_mib} MiB of guest memory is more than this host can map ({limit_mib} MiB)"
            ),
            MemoryError::Map { size_mib, .. } => {
                write!(f, "the host cannot map {size_mib} MiB of guest memory")
            }
            MemoryError::HugePages { size_mib, .. } => write!(
                f,
                "{size_mib} MiB of guest memory need {} huge pages of 2 MiB, and the host's pool \
                 has not as many free (see nr_hugepages below /sys/kernel/mm/hugepages)",
                size_mib.div_ceil(2)
            ),
            MemoryError::Outside { address, len } => {
                write!(f, "{len} bytes at {address:#x} are not in guest memory")
            }
            MemoryError::Read { name, .. } => write!(f, "{name} cannot be read"),
            MemoryError::Register(_) => write!(f, "KVM refused the guest memory"),
        }
    }
}

impl Error for MemoryError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            MemoryError::Map { cause, .. } => Some(cause),
            MemoryError::HugePages { cause, .. } => Some(cause),
            MemoryError::Read { cause, .. } => Some(cause),
            MemoryError::Register(cause) => Some(cause),
            _ => None,
        }
    }
}

impl Source {
    /// Takes a copy of the descriptor `file`; `name` is how errors call it.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn new(file: &File, name: &str) -> io::Result<Source> {
        let file = file.try_clone()?;
        let metadata = file.metadata()?;
        Ok(Source {
            name: name.to_owned(),
            len: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            file,
        })
    }

    /// Another handle on the same file, with the size and time of change of this one.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn try_clone(&self) -> io::Result<Source> {
        Ok(Source {
            file: self.file.try_clone()?,
            name: self.name.clone(),
            len: self.len,
            modified: self.modified,
        })
    }

    /// How errors call it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes in the file when it was opened.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there was nothing in the file.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Fills `bytes` from `offset` on, without moving the file's position.
    ///
    /// # Errors
    /// The host's, or an unexpected end.
    pub fn read_exact_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(bytes, offset)
    }

    /// Whether size and time of change are what they were.
    pub fn is_unchanged(&self) -> bool {
        self.file.metadata().is_ok_and(|now| {
            now.len() == self.len && (now.mtime(), now.mtime_nsec()) == self.modified
        })
    }
}

impl Memory {
    /// Makes `size_mib` MiB of private anonymous memory, none of it touched: up to 3 GiB from
    /// address 0, the rest from 4 GiB.
    ///
    /// # Errors
    /// [`MemoryError`] when the size is 0 or more than the host can map.
    #[cfg(test)]
    pub fn anonymous(size_mib: u64) -> Result<Memory, MemoryError> {
        Memory::new(size_mib, Pages::Ordinary)
    }

    /// The same, made of `pages`.
    ///
    /// # Errors
    /// [`MemoryError`] when the size is 0, more than the host can map, or more than its pool of
    /// huge pages has.
    pub fn new(size_mib: u64, pages: Pages) -> Result<Memory, MemoryError> {
        if size_mib == 0 {
            return Err(MemoryError::Nothing);
        }
        let limit = host_bytes()
            .saturating_mul(OVERCOMMIT_MAX)
            .min(SLOT_MAX)
            .checked_div(MIB)
            .unwrap_or(0);
        let too_large = MemoryError::TooLarge {
            size_mib,
            limit_mib: limit,
        };
        let Some(size) = size_mib.checked_mul(MIB).filter(|_| size_mib <= limit) else {
            return Err(too_large);
        };
        let low = size.min(LOW_RAM_END_MAX);
        let high = size.saturating_sub(low);
        let mut ranges = Vec::with_capacity(2);
        for (first, len) in [(0, low), (HIGH_RAM, high)] {
            if len > 0 {
                let Ok(len) = usize::try_from(len) else {
                    return Err(too_large);
                };
                ranges.push((GuestAddress(first), len));
            }
        }
        let refused = |cause| MemoryError::Map { size_mib, cause };
        let ram = match pages {
            Pages::Ordinary => Ram::from_ranges(&ranges).map_err(refused)?,
            Pages::Transparent => {
                let ram = Ram::from_ranges(&ranges).map_err(refused)?;
                ram.iter().for_each(advise_huge);
                ram
            }
            Pages::TwoMib => huge(&ranges, size_mib)?,
        };
        Ok(Memory {
            ram,
            size_mib,
            pages,
            sources: Vec::new(),
            records: Vec::new(),
        })
    }

    /// The guest's RAM.
    pub fn ram(&self) -> &Ram {
        &self.ram
    }

    /// Size in MiB.
    pub fn size_mib(&self) -> u64 {
        self.size_mib
    }

    /// Where RAM below the hole ends.
    pub fn low_end(&self) -> u64 {
        self.ram
            .find_region(GuestAddress(0))
            .map_or(0, |region| region.len())
    }

    /// The pieces of RAM: first address and length in bytes, in order.
    pub fn regions(&self) -> impl Iterator<Item = (u64, u64)> {
        self.ram
            .iter()
            .map(|region| (region.start_addr().raw_value(), region.len()))
    }

    /// Writes `bytes` at guest address `address`.
    ///
    /// # Errors
    /// [`MemoryError::Outside`] when they do not all lie in RAM.
    pub fn write(&self, address: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        self.ram
            .write_slice(bytes, GuestAddress(address))
            .map_err(|_| MemoryError::Outside {
                address,
                len: bytes.len() as u64,
            })
    }

    /// Makes `len` bytes of `source` from `offset` on appear at guest address `address`.
    ///
    /// Whole pages are mapped privately from the file where file and guest agree about where
    /// pages begin; what is left at both ends, and files that cannot be mapped, are copied.
    ///
    /// # Errors
    /// [`MemoryError`] when the range is not in one piece of RAM, or the file cannot be read.
    pub fn map_file(
        &mut self,
        source: &Source,
        offset: u64,
        address: u64,
        len: u64,
    ) -> Result<(), MemoryError> {
        let outside = MemoryError::Outside { address, len };
        let (Some(end), Some(_)) = (address.checked_add(len), offset.checked_add(len)) else {
            return Err(outside);
        };
        let in_one_piece = self
            .ram
            .find_region(GuestAddress(address))
            .is_some_and(|r| end.saturating_sub(1) <= r.last_addr().raw_value());
        if len == 0 || !in_one_piece {
            return Err(outside);
        }

        // Bytes before the first whole page, whole pages, and the rest.
        let head = address.wrapping_neg() & (PAGE - 1);
        let whole = len.saturating_sub(head) & !(PAGE - 1);
        let agree = (address ^ offset) & (PAGE - 1) == 0;
        // A part of a huge page cannot be exchanged.
        if !agree || whole < MAP_MIN || self.pages == Pages::TwoMib {
            return self.copy(source, offset, address, len);
        }
        let (Some(from), Some(to)) = (offset.checked_add(head), address.checked_add(head)) else {
            return Err(outside);
        };
        let (Some(rest_from), Some(rest_to)) = (from.checked_add(whole), to.checked_add(whole))
        else {
            return Err(outside);
        };
        if !self.map_pages(source, from, to, whole)? {
            self.copy(source, from, to, whole)?;
        }
        self.copy(source, offset, address, head)?;
        self.copy(source, rest_from, rest_to, end.saturating_sub(rest_to))
    }

    /// The first mapped file whose size or time of change is no longer what it was when it was
    /// opened.
    pub fn changed_file(&self) -> Option<&str> {
        self.sources
            .iter()
            .find(|source| !source.is_unchanged())
            .map(|source| source.name())
    }

    /// The files that are mapped into it.
    pub fn mapped_files(&self) -> Vec<Arc<Source>> {
        self.sources.clone()
    }

    /// Registers all of RAM with `vm`, one slot for each piece. With `track_dirty` KVM logs which
    /// pages the guest writes; to switch that on later costs milliseconds.
    ///
    /// To be called by what keeps RAM mapped for as long as any descriptor of `vm` is open.
    ///
    /// # Errors
    /// [`MemoryError::Register`] when KVM refuses a slot.
    #[expect(unsafe_code, reason = "registration with KVM")]
    pub(crate) fn register(&self, vm: &VmFd, track_dirty: bool) -> Result<(), MemoryError> {
        let flags = if track_dirty {
            KVM_MEM_LOG_DIRTY_PAGES
        } else {
            0
        };
        for (slot, region) in (0u32..).zip(self.ram.iter()) {
            let slot = kvm_userspace_memory_region {
                slot,
                flags,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the region is mapped for its whole length as long as a clone of `ram`
            // lives; `arch::Vm` and its `Vcpu`s each hold one beside their descriptor. Regions
            // do not overlap, by construction of `ram`.
            unsafe { vm.set_user_memory_region(slot) }.map_err(MemoryError::Register)?;
        }
        Ok(())
    }

    /// Maps whole pages of `source` over the guest's; `false` when the host cannot map that file.
    fn map_pages(
        &mut self,
        source: &Source,
        offset: u64,
        address: u64,
        len: u64,
    ) -> Result<bool, MemoryError> {
        let outside = MemoryError::Outside { address, len };
        let (Ok(file_offset), Ok(bytes)) = (i64::try_from(offset), usize::try_from(len)) else {
            return Err(outside);
        };
        let Ok(host) = self.ram.get_slice(GuestAddress(address), bytes) else {
            return Err(outside);
        };
        let first = host.ptr_guard().as_ptr() as usize;
        let Some(end) = first.checked_add(bytes) else {
            return Err(outside);
        };
        if map_over(&host, Some((&source.file, file_offset))).is_err() {
            // The attempt may have taken away what was there.
            return match map_over(&host, None) {
                Ok(()) => Ok(false),
                Err(cause) => Err(MemoryError::Read {
                    name: source.name.clone(),
                    cause,
                }),
            };
        }
        self.records
            .extend(mapped::record(first..end, &source.name));
        if !self.sources.iter().any(|s| s.name == source.name) {
            let copy = source.try_clone().map_err(|cause| MemoryError::Read {
                name: source.name.clone(),
                cause,
            })?;
            self.sources.push(Arc::new(copy));
        }
        Ok(true)
    }

    fn copy(
        &self,
        source: &Source,
        offset: u64,
        address: u64,
        len: u64,
    ) -> Result<(), MemoryError> {
        let mut chunk = vec![0; usize::try_from(len.min(COPY_CHUNK)).unwrap_or(0)];
        let mut done: u64 = 0;
        while done < len {
            let count = len.saturating_sub(done).min(COPY_CHUNK);
            let outside = MemoryError::Outside { address, len };
            let (Some(from), Some(to)) = (offset.checked_add(done), address.checked_add(done))
            else {
                return Err(outside);
            };
            let Some(bytes) = usize::try_from(count).ok().and_then(|n| chunk.get_mut(..n)) else {
                return Err(outside);
            };
            source
                .read_exact_at(bytes, from)
                .map_err(|cause| MemoryError::Read {
                    name: source.name.clone(),
                    cause,
                })?;
            self.write(to, bytes)?;
            done = done.saturating_add(count);
        }
        Ok(())
    }
}

/// Guest memory of huge pages. They are set aside here (there is no MAP_NORESERVE), so that the
/// guest cannot come to an end for want of one.
fn huge(ranges: &[(GuestAddress, usize)], size_mib: u64) -> Result<Ram, MemoryError> {
    const FLAGS: i32 =
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_HUGE_2MB;
    let mut regions = Vec::with_capacity(ranges.len());
    for (first, len) in ranges {
        let (address, len) = (first.raw_value(), *len);
        let mapped = MmapRegion::build(None, len, libc::PROT_READ | libc::PROT_WRITE, FLAGS)
            .map_err(|cause| MemoryError::HugePages { size_mib, cause })?;
        regions.push(
            GuestRegionMmap::new(mapped, *first).ok_or(MemoryError::Outside {
                address,
                len: len as u64,
            })?,
        );
    }
    Ram::from_regions(regions).map_err(|cause| MemoryError::Map {
        size_mib,
        cause: cause.into(),
    })
}

/// Asks the host to use huge pages for a piece of guest memory where it can.
#[expect(unsafe_code, reason = "madvise(2) on guest memory")]
fn advise_huge(region: &GuestRegionMmap) {
    let host = region.as_ptr().cast();
    // SAFETY: the region, borrowed for the call, is mapped for its whole length; the advice changes
    // nothing that is in it. A host that does not take it uses ordinary pages.
    unsafe { libc::madvise(host, region.size(), libc::MADV_HUGEPAGE) };
}

/// Replaces whole pages of guest memory by private ones of a file, or by fresh ones.
#[expect(unsafe_code, reason = "mapping files into guest memory")]
fn map_over(pages: &VolatileSlice<'_>, file: Option<(&File, i64)>) -> io::Result<()> {
    if pages.len() as u64 & (PAGE - 1) != 0 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let flags = libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE;
    let (flags, fd, offset) = match file {
        Some((file, offset)) => (flags, file.as_raw_fd(), offset),
        None => (flags | libc::MAP_ANONYMOUS, -1, 0),
    };
    // SAFETY: the slice's lifetime keeps it mapped, and no reference to what is in it exists, as
    // with all memory that is accessed by such slices: to them this is a write like any other. It
    // is whole pages, as was just checked, and the kernel refuses it if it does not begin with one:
    // so nothing beside it is replaced.
    let result = unsafe {
        libc::mmap(
            pages.ptr_guard_mut().as_ptr().cast(),
            pages.len(),
            libc::PROT_READ | libc::PROT_WRITE,
            flags,
            fd,
            offset,
        )
    };
    if result == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Memory and swap of the host, in bytes.
fn host_bytes() -> u64 {
    let info = rustix::system::sysinfo();
    info.totalram
        .saturating_add(info.totalswap)
        .saturating_mul(u64::from(info.mem_unit))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use vmm_sys_util::tempfile::TempFile;

    fn source(bytes: &[u8]) -> (TempFile, Source) {
        let file = TempFile::new().unwrap();
        file.as_file().write_all(bytes).unwrap();
        let name = file.as_path().to_str().unwrap().to_owned();
        let source = Source::new(file.as_file(), &name).unwrap();
        (file, source)
    }

    fn pattern(len: usize) -> Vec<u8> {
        (0..len).map(|i| (i / 7) as u8 ^ (i >> 12) as u8).collect()
    }

    fn read(memory: &Memory, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0xee; len];
        memory
            .ram()
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }

    #[test]
    fn anonymous_when_more_than_3_gib_continues_at_4() {
        let regions = |mib| -> Vec<_> { Memory::anonymous(mib).unwrap().regions().collect() };
        assert_eq!(regions(1), [(0, MIB)]);
        assert_eq!(regions(3072), [(0, 3072 * MIB)]);
        assert_eq!(regions(3073), [(0, 3072 * MIB), (HIGH_RAM, MIB)]);
        assert_eq!(regions(4096), [(0, 3072 * MIB), (HIGH_RAM, 1024 * MIB)]);
    }

    #[test]
    fn anonymous_when_size_is_absurd_names_it() {
        assert_eq!(
            Memory::anonymous(0).unwrap_err().to_string(),
            "0 MiB of guest memory is too little to run a guest"
        );
        for size in [1 << 33, u64::MAX / MIB, u64::MAX] {
            let error = Memory::anonymous(size).unwrap_err().to_string();
            let start = format!("{size} MiB of guest memory is more than this host can map (");
            assert!(error.starts_with(&start), "{error}");
        }
    }

    #[test]
    fn map_file_when_pages_agree_maps_all_but_the_ends() {
        let bytes = pattern(40 * 4096 + 100);
        let (_file, source) = source(&bytes);
        let mut memory = Memory::anonymous(2).unwrap();
        memory
            .map_file(&source, 10, 0x10_0000 + 10, bytes.len() as u64 - 10)
            .unwrap();
        assert_eq!(memory.records.len(), 1);
        assert_eq!(
            read(&memory, 0x10_0000 + 10, bytes.len() - 10),
            &bytes[10..]
        );
        assert_eq!(read(&memory, 0x10_0000, 10), [0; 10]);
        let end = 0x10_0000 + bytes.len() as u64;
        assert_eq!(read(&memory, end, 100), [0; 100]);

        let host = memory
            .ram()
            .get_host_address(GuestAddress(0x10_2000))
            .unwrap();
        let mut name = [0; mapped::NAME_MAX];
        let len = mapped::file_at(host as usize, &mut name).unwrap();
        assert_eq!(&name[..len], source.name().as_bytes());
    }

    #[test]
    fn map_file_when_guest_writes_the_file_stays() {
        let bytes = pattern(32 * 4096);
        let (file, source) = source(&bytes);
        let mut memory = Memory::anonymous(2).unwrap();
        memory
            .map_file(&source, 0, 0x10_0000, bytes.len() as u64)
            .unwrap();
        memory.write(0x10_1000, b"changed").unwrap();
        assert_eq!(read(&memory, 0x10_1000, 7), b"changed");
        assert_eq!(std::fs::read(file.as_path()).unwrap(), bytes);
    }

    #[test]
    fn map_file_when_pages_disagree_copies() {
        let bytes = pattern(300 * 4096);
        let (_file, source) = source(&bytes);
        let mut memory = Memory::anonymous(4).unwrap();
        memory
            .map_file(&source, 1, 0x10_0000, bytes.len() as u64 - 1)
            .unwrap();
        assert!(memory.records.is_empty());
        assert_eq!(read(&memory, 0x10_0000, bytes.len() - 1), &bytes[1..]);
    }

    #[test]
    fn map_file_when_range_leaves_ram_is_refused() {
        let bytes = pattern(32 * 4096);
        let (_file, source) = source(&bytes);
        let mut memory = Memory::anonymous(1).unwrap();
        let len = bytes.len() as u64;
        for address in [MIB - len + 1, MIB, LOW_RAM_END_MAX, u64::MAX - 5, u64::MAX] {
            let error = memory.map_file(&source, 0, address, len).unwrap_err();
            assert!(matches!(error, MemoryError::Outside { .. }), "{error}");
        }
        memory.map_file(&source, 0, MIB - len, len).unwrap();
        assert!(memory.map_file(&source, u64::MAX, 0, len).is_err());
        assert!(memory.map_file(&source, 0, 0, 0).is_err());
    }

    #[test]
    fn map_file_when_file_is_shorter_is_an_error_that_names_it() {
        let (_file, source) = source(&pattern(100));
        let mut memory = Memory::anonymous(1).unwrap();
        let error = memory.map_file(&source, 0, 0, 200).unwrap_err();
        assert!(error.to_string().contains(source.name()));
    }

    #[test]
    fn changed_file_when_a_mapped_file_is_cut_names_it() {
        let (file, source) = source(&pattern(32 * 4096));
        let mut memory = Memory::anonymous(1).unwrap();
        memory.map_file(&source, 0, 0, 32 * 4096).unwrap();
        assert_eq!(memory.changed_file(), None);
        file.as_file().set_len(10 * 4096).unwrap();
        assert_eq!(memory.changed_file(), Some(source.name()));
    }

    /// Huge pages that are free.
    fn free_huge_pages() -> u64 {
        let path = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
        std::fs::read_to_string(path).map_or(0, |text| text.trim().parse().unwrap_or(0))
    }

    #[test]
    fn huge_when_the_pool_has_too_few_says_so() {
        // More than any pool has, less than would be refused for its size alone.
        let mib = host_bytes() / MIB + (host_bytes() / MIB) % 2;
        let error = Memory::new(mib, Pages::TwoMib).unwrap_err().to_string();
        assert!(
            error.contains(&format!("need {} huge pages", mib / 2)),
            "{error}"
        );
    }

    #[test]
    fn huge_when_there_are_pages_holds_what_is_copied() {
        if free_huge_pages() < 2 {
            eprintln!("no huge pages here: only the refusal is tested");
            return;
        }
        let bytes = pattern(1 << 20);
        let (_file, source) = source(&bytes);
        let mut memory = Memory::new(4, Pages::TwoMib).unwrap();
        memory.map_file(&source, 0, 0, 1 << 20).unwrap();
        assert_eq!(read(&memory, 0, 1 << 20), bytes);
    }

    #[test]
    fn transparent_when_asked_for_is_memory_all_the_same() {
        let bytes = pattern(1 << 20);
        let (_file, source) = source(&bytes);
        let mut memory = Memory::new(4, Pages::Transparent).unwrap();
        memory.map_file(&source, 0, 0, 1 << 20).unwrap();
        assert_eq!(read(&memory, 0, 1 << 20), bytes);
    }
}
