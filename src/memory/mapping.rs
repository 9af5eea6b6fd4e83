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
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, VolatileSlice};

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

/// What the host is asked to do with pages of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Advice {
    /// Join them to huge ones where it can.
    Huge,
    /// Forget where they are. Of a shared mapping what is in them stays in its file; of a private one
    /// it is lost: to be asked for under the lock that says that it is shared.
    DropTables,
    /// Give this process pages of its own, as if it had written them.
    OwnPages,
    /// Read them from their file, if they are not in the page cache.
    ReadAhead,
}

/// Asks the host; whether it does it. A refusal leaves the pages as they are.
pub(super) fn advise<B: BitmapSlice>(pages: &VolatileSlice<'_, B>, advice: Advice) -> bool {
    let advice = match advice {
        Advice::Huge => libc::MADV_HUGEPAGE,
        Advice::DropTables => libc::MADV_DONTNEED,
        Advice::OwnPages => libc::MADV_POPULATE_WRITE,
        Advice::ReadAhead => libc::MADV_WILLNEED,
    };
    let host = pages.ptr_guard_mut().as_ptr().cast();
    // SAFETY: the slice's lifetime keeps it mapped, and no reference to what is in it exists: the one
    // advice that may change what is in it is a write like any other.
    unsafe { libc::madvise(host, pages.len(), advice) == 0 }
}
