//! Guest memory: what it is made of, how files get into it, and how it gets into files.
//!
//! Owned by control; devices and vCPUs hold clones of [`Ram`], whose regions are shared. Files
//! are mapped privately over the guest's pages rather than read into them: nothing is copied at
//! start, all guests of a host share one copy in its page cache, and what a guest writes is its
//! own. The price: a file that is mapped must be replaced by rename, never rewritten in place.
//! [`Memory::changed_file`] tells whether that was done, [`mapped::file_at`] who is to blame
//! when it is done later: a file cut short shows as SIGBUS where this process touches guest
//! memory, and where the guest does as EFAULT or a memory fault from KVM_RUN, or, when KVM
//! emulates the instruction, as an MMIO exit with an address in RAM.
//!
//! A memory image is a file of exactly the size of guest memory: its regions one after the other,
//! without the hole. A place in it is called an offset, in contrast to a guest address. [`image`]
//! writes one while the guest is paused, [`Memory::from_image`] maps one.
#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

mod changed;
mod error;
pub mod fork;
pub mod image;
mod layout;
pub mod lazy;
mod load;
pub mod mapped;
mod mapping;
mod occupied;
pub mod page_set;
mod source;
#[cfg(test)]
mod testing;
pub mod working_set;
mod write_log;

use std::io;
use std::sync::Arc;

use vm_memory::{
    Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
};

pub use error::MemoryError;
use layout::{Layout, Piece, fresh};
use mapping::Over;
pub use source::Source;
pub use write_log::WriteLog;

/// Guest RAM as devices see it. Cloning it copies a few pointers.
pub type Ram = GuestMemoryMmap<WriteLog>;

const MIB: u64 = 1 << 20;

/// Granularity of mapping, and of what the guest is told.
pub const PAGE: u64 = 4096;

/// RAM below 4 GiB ends here at the latest: the last GiB of it is the hole for devices.
pub const LOW_RAM_END_MAX: u64 = 0xc000_0000;

/// RAM continues here when there is more than fits below the hole.
pub const HIGH_RAM: u64 = 0x1_0000_0000;

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

/// Where the pages of fresh guest memory belong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// To this process alone.
    Anonymous,
    /// To a file in memory (memfd) that can be frozen and passed on.
    Shared,
}

/// What is below everything that was mapped over guest memory.
#[derive(Clone, Debug)]
enum Base {
    Anonymous,
    Shared(fork::Shared),
    /// What a handler of page faults brings in.
    Lazy,
    /// A private mapping of a memory image.
    Image(Arc<Source>),
}

/// A part of guest memory that is a private mapping of a file.
#[derive(Clone, Debug)]
struct MappedPart {
    /// Where it begins in a memory image.
    offset: u64,
    len: u64,
    source: Arc<Source>,
    in_file: u64,
}

/// Guest memory, and the files that are mapped into it.
#[derive(Debug)]
pub struct Memory {
    ram: Ram,
    size_mib: u64,
    pages: Pages,
    base: Base,
    /// Kept open to see whether they change.
    parts: Vec<MappedPart>,
    records: Vec<mapped::Record>,
}

impl Memory {
    /// Makes `size_mib` MiB of private anonymous memory, none of it touched: up to 3 GiB from
    /// address 0, the rest from 4 GiB.
    ///
    /// # Errors
    /// [`MemoryError`] when the size is 0 or more than the host can map.
    #[cfg(any(test, fuzzing))]
    pub fn anonymous(size_mib: u64) -> Result<Memory, MemoryError> {
        Memory::new(size_mib, Pages::Ordinary, Backing::Anonymous, false)
    }

    /// The same, made of `pages` that belong to `backing`. With `log_writes` it is recorded which
    /// pages the monitor writes.
    ///
    /// # Errors
    /// [`MemoryError`] when the size is 0, more than the host can map, or more than its pool of
    /// huge pages has; when there cannot be such pages with this backing.
    pub fn new(
        size_mib: u64,
        pages: Pages,
        backing: Backing,
        log_writes: bool,
    ) -> Result<Memory, MemoryError> {
        let layout = Layout::new(size_mib)?;
        if backing == Backing::Shared && pages == Pages::TwoMib {
            return Err(MemoryError::SharedHugePages);
        }
        let ram = fresh(&layout, size_mib, pages, log_writes)?;
        let base = match backing {
            Backing::Anonymous => Base::Anonymous,
            Backing::Shared => {
                let shared = fork::Shared::new(layout.size).map_err(MemoryError::Shared)?;
                let file = shared.source.file();
                map_all(&ram, |offset| Over::Shared(file, offset)).map_err(MemoryError::Shared)?;
                Base::Shared(shared)
            }
        };
        if pages == Pages::Transparent {
            advise_huge(&ram);
        }
        Ok(Memory::of(ram, size_mib, pages, base))
    }

    /// Guest memory that is a private mapping of the memory image `source`, whose length must be
    /// exactly `size_mib` MiB. Pages of 2 MiB are filled by copying instead.
    ///
    /// # Errors
    /// [`MemoryError`] as from [`Memory::new`], and when the length differs or the file can be
    /// neither mapped nor read.
    pub fn from_image(
        source: &Arc<Source>,
        size_mib: u64,
        pages: Pages,
        log_writes: bool,
    ) -> Result<Memory, MemoryError> {
        let layout = Layout::new(size_mib)?;
        if source.len() != layout.size {
            return Err(MemoryError::ImageLength {
                name: source.name().to_owned(),
                len: source.len(),
                wanted: layout.size,
            });
        }
        if pages == Pages::TwoMib {
            let memory = Memory::new(size_mib, pages, Backing::Anonymous, log_writes)?;
            memory.fill(source)?;
            memory.forget_writes();
            return Ok(memory);
        }
        let read = |cause| MemoryError::Read {
            name: source.name().to_owned(),
            cause,
        };
        let ram = fresh(&layout, size_mib, pages, log_writes)?;
        map_all(&ram, |offset| Over::Private(source.file(), offset)).map_err(read)?;
        if pages == Pages::Transparent {
            advise_huge(&ram);
        }
        let base = Base::Image(Arc::clone(source));
        let mut memory = Memory::of(ram, size_mib, pages, base);
        for region in memory.ram.iter() {
            let first = region.as_ptr() as usize;
            let range = first..first.saturating_add(region.size());
            memory.records.extend(mapped::record(range, source.name()));
        }
        Ok(memory)
    }

    fn of(ram: Ram, size_mib: u64, pages: Pages, base: Base) -> Memory {
        Memory {
            ram,
            size_mib,
            pages,
            base,
            parts: Vec::new(),
            records: Vec::new(),
        }
    }

    /// The guest's RAM.
    pub fn ram(&self) -> &Ram {
        &self.ram
    }

    /// Size in MiB.
    #[cfg(test)]
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

    /// Where the byte at guest address `address` is in a memory image.
    pub fn offset_of(&self, address: u64) -> Option<u64> {
        let mut before: u64 = 0;
        for (first, len) in self.regions() {
            match address.checked_sub(first) {
                Some(inside) if inside < len => return before.checked_add(inside),
                _ => before = before.saturating_add(len),
            }
        }
        None
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

    /// The first mapped file whose size or time of change is no longer what it was when it was
    /// opened.
    pub fn changed_file(&self) -> Option<&str> {
        self.sources()
            .find(|source| !source.is_unchanged())
            .map(|source| source.name())
    }

    /// The files that are mapped into it.
    pub fn mapped_files(&self) -> Vec<Arc<Source>> {
        let mut files: Vec<Arc<Source>> = Vec::new();
        for source in self.sources() {
            if !files.iter().any(|file| file.name() == source.name()) {
                files.push(Arc::clone(source));
            }
        }
        files
    }

    /// The file of each part that is mapped.
    fn sources(&self) -> impl Iterator<Item = &Arc<Source>> {
        let image = match &self.base {
            Base::Image(source) => Some(source),
            Base::Anonymous | Base::Lazy | Base::Shared(_) => None,
        };
        image
            .into_iter()
            .chain(self.parts.iter().map(|part| &part.source))
    }
}

/// Asks the host to use huge pages where it can.
fn advise_huge(ram: &Ram) {
    for pages in ram.iter().filter_map(|r| r.as_volatile_slice().ok()) {
        mapping::advise(&pages, mapping::Advice::Huge);
    }
}

/// Maps a file over each piece of RAM, as `over` says for a place in the file.
fn map_all<'a>(ram: &Ram, over: impl Fn(i64) -> Over<'a>) -> io::Result<()> {
    let mut offset: i64 = 0;
    for region in ram.iter() {
        let all = region.as_volatile_slice().map_err(io::Error::other)?;
        mapping::map_over(&all, over(offset))?;
        offset = offset.saturating_add_unsigned(region.len());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::layout::host_bytes;
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
        let error = Memory::new(mib, Pages::TwoMib, Backing::Anonymous, false)
            .unwrap_err()
            .to_string();
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
        let mut memory = Memory::new(4, Pages::TwoMib, Backing::Anonymous, false).unwrap();
        memory.map_file(&source, 0, 0, 1 << 20).unwrap();
        assert_eq!(read(&memory, 0, 1 << 20), bytes);
    }

    #[test]
    fn transparent_when_asked_for_is_memory_all_the_same() {
        let bytes = pattern(1 << 20);
        let (_file, source) = source(&bytes);
        let mut memory = Memory::new(4, Pages::Transparent, Backing::Anonymous, false).unwrap();
        memory.map_file(&source, 0, 0, 1 << 20).unwrap();
        assert_eq!(read(&memory, 0, 1 << 20), bytes);
    }
}
