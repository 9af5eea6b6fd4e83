//! What guest memory is mapped to: the calls that change it, and its registration with KVM.
//!
//! The only code of this folder that may be `unsafe`. Nothing in this process makes a reference to
//! what is in guest memory, so exchanging its pages is to the rest a write like any other.
#![expect(unsafe_code, reason = "mapping files into guest memory, and KVM")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, VolatileSlice};

use super::{Memory, MemoryError, PAGE};

impl Memory {
    /// Registers all of RAM with `vm`, one slot for each piece. With `track_dirty` KVM logs which
    /// pages the guest writes; to switch that on later costs milliseconds.
    ///
    /// To be called by what keeps RAM mapped for as long as any descriptor of `vm` is open.
    ///
    /// # Errors
    /// [`MemoryError::Register`] when KVM refuses a slot.
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
}

/// Asks the host to use huge pages for a piece of guest memory where it can.
pub(super) fn advise_huge<B>(region: &GuestRegionMmap<B>)
where
    B: vm_memory::bitmap::Bitmap,
{
    let host = region.as_ptr().cast();
    // SAFETY: the region, borrowed for the call, is mapped for its whole length; the advice changes
    // nothing that is in it. A host that does not take it uses ordinary pages.
    unsafe { libc::madvise(host, region.size(), libc::MADV_HUGEPAGE) };
}

/// What is mapped over pages of guest memory; of a file, from which of its bytes on.
#[derive(Clone, Copy)]
pub(super) enum Over<'a> {
    Fresh,
    Private(&'a File, i64),
    Shared(&'a File, i64),
}

/// Replaces whole pages of guest memory.
pub(super) fn map_over<B: BitmapSlice>(
    pages: &VolatileSlice<'_, B>,
    over: Over<'_>,
) -> io::Result<()> {
    if pages.len() as u64 & (PAGE - 1) != 0 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let (flags, fd, offset) = match over {
        Over::Fresh => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0),
        Over::Private(file, offset) => (libc::MAP_PRIVATE, file.as_raw_fd(), offset),
        Over::Shared(file, offset) => (libc::MAP_SHARED, file.as_raw_fd(), offset),
    };
    let flags = flags | libc::MAP_FIXED | libc::MAP_NORESERVE;
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

/// Empties the page tables of a shared mapping; what is in it stays in its file.
///
/// Of a private mapping this would take away what was written: to be called under the lock that
/// says that it is shared.
pub(super) fn drop_page_tables<B: BitmapSlice>(pages: &VolatileSlice<'_, B>) {
    let host = pages.ptr_guard_mut().as_ptr().cast();
    // SAFETY: the slice's lifetime keeps it mapped, and no reference to what is in it exists: were
    // it not shared, this would be a write like any other. A refusal leaves it as it is.
    unsafe { libc::madvise(host, pages.len(), libc::MADV_DONTNEED) };
}
