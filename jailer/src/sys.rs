//! The raw system calls of the jailer, each behind a safe function: the only unsafe code here.
//!
//! The jailer has one thread from start to end, and several promises below rest on that: `fork`
//! copies a consistent process, and changed credentials hold for the whole process.

#![expect(
    unsafe_code,
    reason = "fork, exec, signal masks, close_range and namespaces have no safe wrapper"
)]

use std::ffi::{CStr, CString, c_char, c_int, c_uint};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::ptr;

use rustix::io::Errno;
use rustix::process::{Pid, Resource, Rlimit};
use rustix::thread::{CapabilitySet, UnshareFlags};
use rustix::time::{ClockId, clock_gettime};

/// Which side of a fork this is.
pub enum Fork {
    /// The new process.
    Child,
    /// The old one, with the new one's pid in this process's pid namespace.
    Parent(Pid),
}

/// Microseconds since the host started.
pub fn monotonic_us() -> u64 {
    micros(ClockId::Monotonic)
}

/// Microseconds of processor time this process has used.
pub fn process_cpu_us() -> u64 {
    micros(ClockId::ProcessCPUTime)
}

fn micros(clock: ClockId) -> u64 {
    let now = clock_gettime(clock);
    // Both clocks count up from zero, so neither part is negative.
    now.tv_sec.unsigned_abs() * 1_000_000 + now.tv_nsec.unsigned_abs() / 1_000
}

/// Closes every descriptor from `first` up. Nothing of this program may own one of them, which is
/// why it comes before the first file is opened.
pub fn close_from(first: RawFd) -> Result<(), Errno> {
    // SAFETY: the caller promises that no owner in this process holds a descriptor from `first`
    // up; the call touches no memory. UNSHARE keeps a descriptor table that a parent shares whole.
    let result = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            first as c_uint,
            c_uint::MAX,
            libc::CLOSE_RANGE_UNSHARE,
        )
    };
    checked(result).map(drop)
}

/// Leaves the namespaces in `flags` for new ones (for the pid namespace: its next child does).
pub fn unshare(flags: UnshareFlags) -> Result<(), Errno> {
    // SAFETY: unshare_unsafe is unsafe for FILES alone (descriptors of other threads); this
    // process has one thread.
    unsafe { rustix::thread::unshare_unsafe(flags) }
}

/// Copies this process.
pub fn fork() -> Result<Fork, Errno> {
    // SAFETY: this process has one thread, so the child's memory, allocator included, is whole.
    let pid = unsafe { libc::fork() };
    let pid = checked(i64::from(pid))?;
    Ok(match Pid::from_raw(pid as i32) {
        None => Fork::Child,
        Some(pid) => Fork::Parent(pid),
    })
}

/// Ends this process at once: no destructors, no flushing of what the parent will flush.
pub fn exit_now(code: c_int) -> ! {
    // SAFETY: _exit touches nothing of this process; it only ends it.
    unsafe { libc::_exit(code) }
}

/// Replaces this process by `program` (a path) with `argv` and an empty environment.
/// Returns only the reason why that did not happen.
pub fn exec(program: &CStr, argv: &[CString]) -> Errno {
    let mut pointers: Vec<*const c_char> = argv.iter().map(|word| word.as_ptr()).collect();
    pointers.push(ptr::null());
    let environment: [*const c_char; 1] = [ptr::null()];
    // SAFETY: `program` and the words of `argv` are C strings borrowed for the call; both lists
    // end with a null pointer, put there above.
    unsafe { libc::execve(program.as_ptr(), pointers.as_ptr(), environment.as_ptr()) };
    last_error()
}

/// The kind of namespace (a CLONE_NEW* bit) that a file of the namespace file system stands for.
pub fn namespace_kind(namespace: BorrowedFd<'_>) -> Result<UnshareFlags, Errno> {
    // SAFETY: the descriptor is open while borrowed; this request has no argument, so the kernel
    // reads and writes no memory of ours.
    let kind = unsafe { libc::ioctl(namespace.as_raw_fd(), libc::NS_GET_NSTYPE) };
    checked(i64::from(kind)).map(|kind| UnshareFlags::from_bits_retain(kind as u32))
}

/// The signals a user or a service manager ends a program with.
const ENDING: [c_int; 3] = [libc::SIGHUP, libc::SIGINT, libc::SIGTERM];

/// Holds back the signals that end a program, so that none of them stops the jailer half-way.
pub fn hold_ending_signals() -> Result<(), Errno> {
    let mut set = empty_signal_set();
    for signal in ENDING {
        // SAFETY: `set` was initialised above and the numbers are constants below 64.
        unsafe { libc::sigaddset(&mut set, signal) };
    }
    // SAFETY: `set` is initialised; the old mask is not asked for.
    let result = unsafe { libc::sigprocmask(libc::SIG_BLOCK, &set, ptr::null_mut()) };
    checked(i64::from(result)).map(drop)
}

/// The ending signal that arrived while they were held back, if one did.
pub fn held_signal() -> Option<c_int> {
    let mut set = empty_signal_set();
    // SAFETY: `set` is a valid place for the kernel to write the pending signals to.
    let result = unsafe { libc::sigpending(&mut set) };
    if result != 0 {
        return None;
    }
    ENDING.into_iter().find(|&signal| {
        // SAFETY: `set` is initialised and the numbers are constants below 64.
        let member = unsafe { libc::sigismember(&set, signal) };
        member == 1
    })
}

/// Gives the program to come what a program expects: no signal blocked, SIGPIPE not ignored (the
/// Rust runtime ignores it, and an ignored signal stays so across exec).
pub fn reset_signals() -> Result<(), Errno> {
    // SAFETY: SIG_DFL installs no code of ours as a handler.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    let set = empty_signal_set();
    // SAFETY: `set` is initialised; the old mask is not asked for.
    let result = unsafe { libc::sigprocmask(libc::SIG_SETMASK, &set, ptr::null_mut()) };
    checked(i64::from(result)).map(drop)
}

fn empty_signal_set() -> libc::sigset_t {
    let mut set = std::mem::MaybeUninit::uninit();
    // SAFETY: sigemptyset writes the whole of the set it is given and cannot fail on a valid one.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: initialised by the line above.
    unsafe { set.assume_init() }
}

/// Sets the soft and the hard limit of `resource`.
pub fn set_limit(resource: Resource, value: u64) -> Result<(), Errno> {
    // The kernel's infinity is u64::MAX, which is what None stands for.
    let value = Some(value).filter(|&value| value != u64::MAX);
    let limit = Rlimit {
        current: value,
        maximum: value,
    };
    rustix::process::setrlimit(resource, limit)
}

/// The capabilities of `wanted` that this process cannot use.
pub fn missing_capabilities(wanted: CapabilitySet) -> Result<CapabilitySet, Errno> {
    let have = rustix::thread::capabilities(None)?;
    Ok(wanted - have.effective)
}

/// Takes every capability but `kept` out of the bounding set: no program started from here can
/// ever have it again.
pub fn bound_capabilities(kept: CapabilitySet) -> Result<(), Errno> {
    for number in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        if kept.contains(capability) {
            continue;
        }
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            // Past the last capability this kernel knows.
            Err(Errno::INVAL) => break,
            other => other?,
        }
    }
    Ok(())
}

/// Makes the permitted capabilities usable again after a change of user that kept them, to take
/// back what was made when the exec after that change fails.
pub fn regain_capabilities() {
    if let Ok(mut sets) = rustix::thread::capabilities(None) {
        sets.effective = sets.permitted;
        // Without them the clean-up fails and says so; there is nothing better to do here.
        let _ = rustix::thread::set_capabilities(None, sets);
    }
}

fn checked(result: i64) -> Result<i64, Errno> {
    if result < 0 {
        Err(last_error())
    } else {
        Ok(result)
    }
}

fn last_error() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exec_of_a_missing_program_returns_the_reason() {
        let argv = [CString::from(c"nothing")];
        assert_eq!(exec(c"/nonexistent/program", &argv), Errno::NOENT);
    }

    #[test]
    fn namespace_kind_of_an_ordinary_file_is_refused() {
        use std::os::fd::AsFd;
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(namespace_kind(file.as_fd()).is_err());
    }

    #[test]
    fn clocks_advance() {
        let before = monotonic_us();
        std::thread::sleep(std::time::Duration::from_millis(2));
        assert!(monotonic_us() >= before + 2_000);
        assert!(process_cpu_us() > 0);
    }
}
