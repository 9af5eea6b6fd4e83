//! Why there is no guest memory, or why something did not get into it.

use std::error::Error;
use std::fmt;
use std::io;

use vm_memory::mmap::{FromRangesError, MmapRegionError};

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
    /// Shared memory of huge pages.
    SharedHugePages,
    /// No file in memory for shared memory.
    Shared(io::Error),
    /// A memory image of another size.
    ImageLength {
        /// The image.
        name: String,
        /// Its length in bytes.
        len: u64,
        /// What guest memory needs.
        wanted: u64,
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
    /// A fork of memory that is not shared, without the file that it needs.
    NotPrepared,
    /// Memory could not be frozen.
    Freeze(io::Error),
    /// The same, and the guest's memory is gone.
    Lost(io::Error),
    /// Memory that was frozen is still in use for writing.
    Seal(io::Error),
    /// No userfaultfd for kernel-mode faults.
    Userfaultfd(io::Error),
    /// A handler of page faults that did not take the message.
    Handler(io::Error),
    /// A fork of memory that a handler brings in.
    LazyFork,
    /// KVM does not tell which pages have changed.
    DirtyLog(kvm_ioctls::Error),
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
            MemoryError::SharedHugePages => write!(
                f,
                "shared guest memory cannot be made of 2M huge pages: leave out either, or use \
                 \"Transparent\""
            ),
            MemoryError::Shared(_) => write!(f, "cannot make the file for shared guest memory"),
            MemoryError::ImageLength { name, len, wanted } => write!(
                f,
                "the memory file {name} has {len} bytes, but the guest's memory has {wanted}"
            ),
            MemoryError::Outside { address, len } => {
                write!(f, "{len} bytes at {address:#x} are not in guest memory")
            }
            MemoryError::Read { name, .. } => write!(f, "{name} cannot be read"),
            MemoryError::Register(_) => write!(f, "KVM refused the guest memory"),
            MemoryError::NotPrepared => write!(
                f,
                "guest memory has changed its file since the fork was prepared: try again"
            ),
            MemoryError::Freeze(_) => write!(f, "cannot freeze guest memory"),
            MemoryError::Lost(_) => write!(f, "guest memory was lost while it was frozen"),
            MemoryError::Seal(_) => write!(f, "cannot seal guest memory, which is still in use"),
            MemoryError::Userfaultfd(_) => write!(
                f,
                "cannot use userfaultfd for the guest's page faults: this needs access to \
                 /dev/userfaultfd, the capability SYS_PTRACE, or vm.unprivileged_userfaultfd=1"
            ),
            MemoryError::Handler(_) => {
                write!(f, "the page fault handler did not take the guest's memory")
            }
            MemoryError::LazyFork => write!(
                f,
                "a guest whose memory a page fault handler brings in cannot be forked: take a full \
                 snapshot"
            ),
            MemoryError::DirtyLog(_) => write!(f, "KVM_GET_DIRTY_LOG failed"),
        }
    }
}

impl Error for MemoryError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            MemoryError::Map { cause, .. } => Some(cause),
            MemoryError::HugePages { cause, .. } => Some(cause),
            MemoryError::Shared(cause)
            | MemoryError::Read { cause, .. }
            | MemoryError::Freeze(cause)
            | MemoryError::Lost(cause)
            | MemoryError::Userfaultfd(cause)
            | MemoryError::Handler(cause)
            | MemoryError::Seal(cause) => Some(cause),
            MemoryError::Register(cause) | MemoryError::DirtyLog(cause) => Some(cause),
            _ => None,
        }
    }
}
