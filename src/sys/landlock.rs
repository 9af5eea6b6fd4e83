//! Landlock: this process gives up the file system, the network and everybody else's sockets and
//! signals, for good. What is open stays open.
//!
//! Three system calls, of which two are used: a ruleset that handles everything and allows
//! nothing needs no rules.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

/// The attributes of a ruleset, in the order of `struct landlock_ruleset_attr`. Kernels that know
/// less of it want less of it.
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

/// All that a kernel of `abi` can be asked to handle, and how many attributes it knows.
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
    let known = match abi {
        ..=3 => 1,
        4..=5 => 2,
        _ => 3,
    };
    (Handled { fs, net, scoped }, known)
}

/// Gives up all that the running kernel can be asked to deny; the version of its Landlock, or
/// `None` when it has none. Threads made afterwards are held by it too: call it while there is
/// one.
///
/// # Errors
/// The kernel has Landlock and refuses.
pub fn restrict() -> io::Result<Option<u32>> {
    let abi = create_ruleset(&[], CREATE_RULESET_VERSION).map_or(0, RawFd::unsigned_abs);
    // Not built in, or not enabled at boot.
    if abi == 0 {
        return Ok(None);
    }
    let (handled, known) = everything(abi);
    let attributes = [handled.fs, handled.net, handled.scoped];
    let ruleset = create_ruleset(attributes.get(..known).unwrap_or_default(), 0)?;
    // SAFETY: asked for a ruleset, the call succeeded: it is open and owned by nothing else.
    let ruleset = unsafe { OwnedFd::from_raw_fd(ruleset) };
    // What a process without privileges must promise first.
    rustix::thread::set_no_new_privs(true)?;
    // SAFETY: takes numbers only; `ruleset` is open.
    let result = unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Some(abi))
}

/// Makes a ruleset of these attributes; or, without any, what `flags` ask for.
fn create_ruleset(attributes: &[u64], flags: u32) -> io::Result<RawFd> {
    let address = match attributes {
        [] => ptr::null(),
        _ => attributes.as_ptr(),
    };
    // SAFETY: the kernel reads no more than the attributes, which are borrowed for the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            address,
            size_of_val(attributes),
            flags,
        )
    };
    match RawFd::try_from(result) {
        Ok(result) if result >= 0 => Ok(result),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_when_the_kernel_is_newer_is_more() {
        let cases = [
            (1, 0x1fff, 0, 0, 1),
            (2, 0x3fff, 0, 0, 1),
            (3, 0x7fff, 0, 0, 1),
            (4, 0x7fff, 3, 0, 2),
            (5, 0xffff, 3, 0, 2),
            (6, 0xffff, 3, 3, 3),
            (99, 0xffff, 3, 3, 3),
        ];
        for (abi, fs, net, scoped, known) in cases {
            assert_eq!(everything(abi), (Handled { fs, net, scoped }, known));
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
                crate::needs::skip("landlock", "this kernel has no Landlock");
                assert!(opened);
            }
            (Some(abi), opened, bound) => assert!(!opened && (!bound || abi < 4)),
        }
    }
}
