//! Landlock: this process gives up the file system, the network and everybody else's sockets and
//! signals, for good. What is open stays open.
//!
//! Three system calls, of which two are used: a ruleset that handles everything and allows
//! nothing needs no rules.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// `struct landlock_ruleset_attr`. Kernels that know less of it want less of it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Handled {
    /// Kinds of access to files (bits LANDLOCK_ACCESS_FS_*).
    fs: u64,
    /// Binding (bit 0) and connecting (bit 1) TCP sockets, since ABI 4.
    net: u64,
    /// Abstract Unix sockets (bit 0) and signals (bit 1) beyond this process, since ABI 6.
    scoped: u64,
}

/// Ask for the version instead of a ruleset.
const CREATE_RULESET_VERSION: u32 = 1;

/// All that a kernel of `abi` can be asked to handle, and the bytes by which it is told.
const fn everything(abi: u32) -> (Handled, usize) {
    // Execute, read and write files, read folders, remove and make each kind of file.
    let mut fs = (1 << 13) - 1;
    if abi >= 2 {
        // Link and rename between folders.
        fs |= 1 << 13;
    }
    if abi >= 3 {
        // Truncate.
        fs |= 1 << 14;
    }
    if abi >= 5 {
        // ioctl on devices opened from here on.
        fs |= 1 << 15;
    }
    let net = if abi >= 4 { 0b11 } else { 0 };
    let scoped = if abi >= 6 { 0b11 } else { 0 };
    let size = match abi {
        ..=3 => 8,
        4..=5 => 16,
        _ => 24,
    };
    (Handled { fs, net, scoped }, size)
}

/// Gives up all that the running kernel can be asked to deny; the version of its Landlock, or
/// `None` when it has none. Threads made afterwards are held by it too: call it while there is
/// one.
///
/// # Errors
/// The kernel has Landlock and refuses.
pub fn restrict() -> io::Result<Option<u32>> {
    let none = std::ptr::null::<Handled>();
    // SAFETY: asked for its version, the kernel reads no memory.
    let version = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            none,
            0usize,
            CREATE_RULESET_VERSION,
        )
    };
    // Not built in, or not enabled at boot.
    let Some(abi) = u32::try_from(version).ok().filter(|abi| *abi > 0) else {
        return Ok(None);
    };
    let (handled, size) = everything(abi);
    // SAFETY: `handled` is whole, and at least `size` bytes long.
    let ruleset = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            &raw const handled,
            size,
            0,
        )
    };
    let ruleset = RawFd::try_from(ruleset).unwrap_or(-1);
    if ruleset < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded: the descriptor is open and nobody else's.
    let ruleset = unsafe { OwnedFd::from_raw_fd(ruleset) };
    // What a process without privileges must promise first.
    // SAFETY: takes numbers only.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: takes numbers only; `ruleset` is open.
    let result = unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Some(abi))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_when_the_kernel_is_newer_is_more() {
        let cases = [
            (1, 0x1fff, 0, 0, 8),
            (2, 0x3fff, 0, 0, 8),
            (3, 0x7fff, 0, 0, 8),
            (4, 0x7fff, 3, 0, 16),
            (5, 0xffff, 3, 0, 16),
            (6, 0xffff, 3, 3, 24),
            (99, 0xffff, 3, 3, 24),
        ];
        for (abi, fs, net, scoped, size) in cases {
            assert_eq!(everything(abi), (Handled { fs, net, scoped }, size));
        }
    }

    #[test]
    fn restrict_when_the_kernel_can_denies_all_of_it() {
        // Only the calling thread is held, and no other comes from it.
        let outcome = std::thread::spawn(|| {
            let opened = || std::fs::File::open("/proc/self/stat").is_ok();
            let bound = || std::net::TcpListener::bind("127.0.0.1:0").is_ok();
            assert!(opened() && bound());
            let abi = restrict().unwrap();
            (abi, opened(), bound())
        })
        .join()
        .unwrap();
        match outcome {
            (None, opened, _) => {
                eprintln!("SKIPPED: this kernel has no Landlock");
                assert!(opened);
            }
            (Some(abi), opened, bound) => assert!(!opened && (!bound || abi < 4)),
        }
    }
}
