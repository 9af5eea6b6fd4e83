//! System calls made by number, whatever wrappers think of their arguments: an attacker does so too.

#![expect(unsafe_code, reason = "an attacker has no wrappers")]

use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};

/// Makes a system call; the error's number if it fails. Every pointer in `arguments` belongs to
/// something the caller holds, or is one that the kernel has to refuse.
pub fn call(number: i64, arguments: &[usize]) -> Result<usize, i32> {
    let argument = |index: usize| arguments.get(index).copied().unwrap_or(0);
    // SAFETY: the caller promises that what the kernel writes to is the caller's.
    let result = unsafe {
        libc::syscall(
            number,
            argument(0),
            argument(1),
            argument(2),
            argument(3),
            argument(4),
            argument(5),
        )
    };
    if result < 0 {
        Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(0))
    } else {
        Ok(result as usize)
    }
}

/// Whether `number` is an open descriptor, and what it is.
pub fn describe(number: i32) -> Option<String> {
    call(libc::SYS_fcntl, &[number as usize, libc::F_GETFD as usize]).ok()?;
    // SAFETY: it is open, as the line above says, and stays so: this program closes nothing.
    let fd = unsafe { BorrowedFd::borrow_raw(number) };
    let stat = rustix::fs::fstat(fd).ok()?;
    let kind = rustix::fs::FileType::from_raw_mode(stat.st_mode);
    let access = rustix::fs::fcntl_getfl(fd).ok()? & rustix::fs::OFlags::RWMODE;
    Some(format!("{number} {kind:?} {}", access.bits()))
}

/// Takes over the API socket that the jailer passes.
pub fn take(number: i32) -> OwnedFd {
    // SAFETY: the jailer opened it for this program, which takes each once.
    unsafe { OwnedFd::from_raw_fd(number) }
}
