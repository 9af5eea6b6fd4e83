//! Where RAM is in the guest and in a memory image, and its fresh mappings.

use vm_memory::mmap::{FromRangesError, MmapRegionBuilder, MmapRegionError};
use vm_memory::{GuestAddress, GuestRegionMmap};

use super::{HIGH_RAM, LOW_RAM_END_MAX, MIB, MemoryError, PAGE, Pages, Ram, WriteLog};

/// KVM takes at most 2^31 - 1 pages in a slot (KVM_MEM_MAX_NR_PAGES).
const SLOT_MAX: u64 = ((1 << 31) - 1) * PAGE;

/// More guest memory than this many times the host's is refused. Guests may be given more than
/// there is, since they seldom use all of it; but KVM's own tables grow with what they are
/// given, and with sizes that can only be a mistake they could exhaust the host.
const OVERCOMMIT_MAX: u64 = 16;

/// The pieces of RAM of a guest: first address, place in a memory image, bytes.
pub(super) struct Layout {
    pub(super) size: u64,
    pieces: Vec<Piece>,
}

/// One of them.
#[derive(Clone, Copy)]
pub(super) struct Piece {
    pub(super) address: GuestAddress,
    pub(super) offset: u64,
    pub(super) len: usize,
}

impl Layout {
    /// Up to 3 GiB from address 0, the rest from 4 GiB.
    pub(super) fn new(size_mib: u64) -> Result<Layout, MemoryError> {
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
        let mut pieces = Vec::with_capacity(2);
        for (address, offset, len) in [(0, 0, low), (HIGH_RAM, low, high)] {
            if len > 0 {
                let Ok(len) = usize::try_from(len) else {
                    return Err(too_large);
                };
                let address = GuestAddress(address);
                pieces.push(Piece {
                    address,
                    offset,
                    len,
                });
            }
        }
        Ok(Layout { size, pieces })
    }

    /// Maps all pieces, of fresh memory with `flags`.
    fn map(&self, flags: i32, log_writes: bool) -> Result<Ram, MmapRegionError> {
        let mut regions = Vec::with_capacity(self.pieces.len());
        for piece in &self.pieces {
            let log = WriteLog::new(piece.len, log_writes);
            let builder = MmapRegionBuilder::new_with_bitmap(piece.len, log)
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(flags | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            let region = GuestRegionMmap::new(builder.build()?, piece.address);
            regions.push(region.ok_or(MmapRegionError::InvalidOffsetLength)?);
        }
        // In order and without overlap: never refused.
        Ram::from_regions(regions).map_err(|_| MmapRegionError::MappingOverlap)
    }
}

/// Memory that belongs to this process alone. Huge pages are set aside here (there is no
/// MAP_NORESERVE), so that the guest cannot come to an end for want of one.
pub(super) fn fresh(
    layout: &Layout,
    size_mib: u64,
    pages: Pages,
    log_writes: bool,
) -> Result<Ram, MemoryError> {
    match pages {
        Pages::Ordinary | Pages::Transparent => layout
            .map(libc::MAP_NORESERVE, log_writes)
            .map_err(|cause| MemoryError::Map {
                size_mib,
                cause: FromRangesError::from(cause),
            }),
        Pages::TwoMib => layout
            .map(libc::MAP_HUGETLB | libc::MAP_HUGE_2MB, log_writes)
            .map_err(|cause| MemoryError::HugePages { size_mib, cause }),
    }
}

/// Memory and swap of the host, in bytes.
pub(super) fn host_bytes() -> u64 {
    let info = rustix::system::sysinfo();
    info.totalram
        .saturating_add(info.totalswap)
        .saturating_mul(u64::from(info.mem_unit))
}
