//! The raw system calls of the jailer, each behind a safe function: the only unsafe code here.
//!
//! The jailer has one thread from start to end, and several promises below rest on that: `fork` and
//! `clone` copy a consistent process, and changed credentials hold for the whole process.

#![expect(
    unsafe_code,
    reason = "fork, clone3, exec, signals, close_range and tap requests have no safe wrapper"
)]

use std::ffi::{CStr, CString, c_char, c_int, c_uint};
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
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

/// Has the ends of children kept for [`wait`], whatever the caller does with its own: a signal that
/// is ignored stays so across exec, and the children of whoever ignores SIGCHLD leave no word.
pub fn expect_children() {
    // SAFETY: SIG_DFL installs no code of ours as a handler.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
}

/// The signals that end a program which does nothing about them, but for SIGKILL, which nobody can,
/// and those that a write brings.
fn ending() -> impl Iterator<Item = c_int> {
    [
        libc::SIGHUP,
        libc::SIGINT,
        libc::SIGQUIT,
        libc::SIGTERM,
        libc::SIGUSR1,
        libc::SIGUSR2,
        libc::SIGALRM,
        libc::SIGVTALRM,
        libc::SIGPROF,
        libc::SIGXCPU,
        libc::SIGIO,
        libc::SIGPWR,
        libc::SIGSTKFLT,
        // Sent by somebody; a fault of this program's own ends it all the same.
        libc::SIGABRT,
        libc::SIGTRAP,
        libc::SIGSYS,
        libc::SIGILL,
        libc::SIGFPE,
        libc::SIGBUS,
        libc::SIGSEGV,
    ]
    .into_iter()
    .chain(libc::SIGRTMIN()..=libc::SIGRTMAX())
}

/// What a shell ignores for a job in the background, but is somebody's wish all the same.
const WISHES: [c_int; 3] = [libc::SIGINT, libc::SIGQUIT, libc::SIGTERM];

/// Those of them that the caller has not chosen to ignore, as nohup(1) does: held back, they would
/// count.
fn held() -> libc::sigset_t {
    let mut set = empty_signal_set();
    for signal in ending() {
        // SAFETY: sigaction is plain numbers, for which zeros are valid.
        let mut now: libc::sigaction = unsafe { mem::zeroed() };
        // SAFETY: the kernel writes `now`, which is ours; no action is set.
        unsafe { libc::sigaction(signal, ptr::null(), &raw mut now) };
        if now.sa_sigaction != libc::SIG_IGN || WISHES.contains(&signal) {
            // SAFETY: `set` was initialised above and the numbers are below 65.
            unsafe { libc::sigaddset(&mut set, signal) };
        }
    }
    set
}

/// Holds back the signals that end a program, so that none of them stops the jailer half-way.
pub fn hold_ending_signals() -> Result<(), Errno> {
    let set = held();
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
    ending().find(|&signal| {
        // SAFETY: `set` is initialised and the numbers are below 65.
        let member = unsafe { libc::sigismember(&set, signal) };
        member == 1
    })
}

/// Makes a write to a broken pipe, or beyond the largest file that is allowed, an error instead of
/// an end.
pub fn survive_writes() {
    for signal in WRITING {
        // SAFETY: SIG_IGN installs no code of ours as a handler.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}

/// The signals that a write may bring.
const WRITING: [c_int; 2] = [libc::SIGPIPE, libc::SIGXFSZ];

/// Gives the program to come what a program expects: no signal blocked, and none ignored of those
/// that are here (an ignored signal stays so across exec).
pub fn reset_signals() -> Result<(), Errno> {
    for signal in WRITING {
        // SAFETY: SIG_DFL installs no code of ours as a handler.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
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

/// Which side of a `clone` this is.
pub enum Clone {
    /// The new process.
    Child,
    /// The old one, with the new one's pid in this process's pid namespace and a descriptor of it.
    Parent(Pid, OwnedFd),
}

/// Of linux/sched.h; the C library's constant is too narrow.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Copies this process; the copy is alone in new namespaces, and in a control group of version 2 if
/// one is given.
pub fn clone(namespaces: UnshareFlags, group: Option<BorrowedFd<'_>>) -> Result<Clone, Errno> {
    let mut pidfd: c_int = -1;
    // SAFETY: clone_args is plain numbers, for which zeros mean "nothing of this".
    let mut args: libc::clone_args = unsafe { mem::zeroed() };
    args.flags = u64::from(namespaces.bits()) | libc::CLONE_PIDFD as u64;
    args.pidfd = (&raw mut pidfd) as u64;
    args.exit_signal = libc::SIGCHLD as u64;
    if let Some(group) = group {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = group.as_raw_fd() as u64;
    }
    // SAFETY: without CLONE_VM this is a fork: the child gets a copy of this process, which has one
    // thread, so that the copy is whole. The kernel reads `args` and writes `pidfd`, both ours.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, mem::size_of_val(&args)) };
    let pid = checked(pid)?;
    Ok(match Pid::from_raw(pid as i32) {
        None => Clone::Child,
        // SAFETY: the call succeeded, so the kernel opened a descriptor for us alone.
        Some(pid) => Clone::Parent(pid, unsafe { OwnedFd::from_raw_fd(pidfd) }),
    })
}

/// Replaces this process by an opened program with `argv` and an empty environment. Returns only
/// the reason why that did not happen.
pub fn exec_opened(program: BorrowedFd<'_>, argv: &[CString]) -> Errno {
    let mut pointers: Vec<*const c_char> = argv.iter().map(|word| word.as_ptr()).collect();
    pointers.push(ptr::null());
    let environment: [*const c_char; 1] = [ptr::null()];
    // SAFETY: the descriptor is open while borrowed; the words of `argv` are C strings borrowed for
    // the call; both lists end with a null pointer, put there above.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            program.as_raw_fd(),
            c"".as_ptr(),
            pointers.as_ptr(),
            environment.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    last_error()
}

/// How a child ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// By itself, with this code.
    Exited(i32),
    /// By this signal.
    Killed(i32),
}

/// What a child has used, as the kernel counts it at the end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Used {
    /// Most memory resident at once, in bytes.
    pub peak_memory: u64,
    /// Processor time, its own and the kernel's for it, in microseconds.
    pub cpu_us: u64,
}

/// Waits for the end of a child.
pub fn wait(child: Pid) -> Result<(Ended, Used), Errno> {
    let mut status: c_int = 0;
    // SAFETY: rusage is plain numbers, for which zeros are valid.
    let mut usage: libc::rusage = unsafe { mem::zeroed() };
    loop {
        // SAFETY: `status` and `usage` are ours and what the kernel fills.
        let result = unsafe {
            libc::wait4(
                child.as_raw_nonzero().get(),
                &raw mut status,
                0,
                &raw mut usage,
            )
        };
        match checked(i64::from(result)) {
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
            Ok(_) => break,
        }
    }
    let micros =
        |time: libc::timeval| time.tv_sec.unsigned_abs() * 1_000_000 + time.tv_usec.unsigned_abs();
    let ended = if libc::WIFSIGNALED(status) {
        Ended::Killed(libc::WTERMSIG(status))
    } else {
        Ended::Exited(libc::WEXITSTATUS(status))
    };
    let used = Used {
        peak_memory: usage.ru_maxrss.unsigned_abs() * 1024,
        cpu_us: micros(usage.ru_utime) + micros(usage.ru_stime),
    };
    Ok((ended, used))
}

/// Closes the descriptors from `first` to `last`, both included.
fn close_between(first: RawFd, last: RawFd) -> Result<(), Errno> {
    // SAFETY: the caller promises that no owner in this process holds one of these descriptors;
    // the call touches no memory.
    let result =
        unsafe { libc::syscall(libc::SYS_close_range, first as c_uint, last as c_uint, 0) };
    checked(result).map(drop)
}

/// Closes every descriptor above 2 but those in `kept`. Nothing of this program may own any other,
/// or it must never be used nor dropped again.
pub fn close_all_but(kept: &[RawFd]) -> Result<(), Errno> {
    let mut kept: Vec<RawFd> = kept.to_vec();
    kept.sort_unstable();
    let mut first = 3;
    for number in kept {
        if number > first {
            close_between(first, number - 1)?;
        }
        first = first.max(number + 1);
    }
    close_between(first, RawFd::MAX)
}

/// Leaves to the program to come none of the descriptors from `first` up.
pub fn close_at_exec_from(first: RawFd) -> Result<(), Errno> {
    // SAFETY: nothing is closed before this process is replaced; the call touches no memory.
    let result = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            first as c_uint,
            c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    checked(result).map(drop)
}

/// Takes over a descriptor that was open when this program started. Each number once.
pub fn adopt(number: RawFd) -> Result<OwnedFd, Errno> {
    // SAFETY: F_SETFD touches no memory, and says if `number` is not open.
    let result = unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) };
    checked(i64::from(result))?;
    // SAFETY: it is open; the caller promises to ask for a number once, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Puts copies of `descriptors` at the numbers 0, 1, 2 and so on, for the program to come. Whatever
/// else had those numbers is closed: this is for a process about to be replaced, which goes on to
/// use only descriptors above them.
pub fn place(descriptors: &[BorrowedFd<'_>]) -> Result<(), Errno> {
    // First all out of the way, so that none is overwritten before it has been copied.
    let mut aside = Vec::with_capacity(descriptors.len());
    for descriptor in descriptors {
        aside.push(rustix::io::fcntl_dupfd_cloexec(descriptor, ASIDE)?);
    }
    for (number, descriptor) in aside.iter().enumerate() {
        // SAFETY: the caller promises not to use what had the number before.
        let result = unsafe { libc::dup2(descriptor.as_raw_fd(), number as c_int) };
        checked(i64::from(result))?;
    }
    Ok(())
}

/// Above every number that a jail's program is given.
pub const ASIDE: RawFd = 32;

/// The signals that are held back as a descriptor.
pub fn ending_signals() -> Result<OwnedFd, Errno> {
    let set = held();
    // SAFETY: `set` is initialised.
    let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    let fd = checked(i64::from(fd))?;
    // SAFETY: the call succeeded, so the kernel opened this descriptor for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// The next signal from [`ending_signals`], if one has come.
pub fn next_signal(signals: BorrowedFd<'_>) -> Option<c_int> {
    // One record; it begins with the number.
    let mut record = [0; mem::size_of::<libc::signalfd_siginfo>()];
    let count = rustix::io::read(signals, &mut record).ok()?;
    let number = record.get(..count)?.first_chunk::<4>()?;
    c_int::try_from(u32::from_ne_bytes(*number)).ok()
}

/// Makes using a terminal in the background an error instead of a stop.
pub fn ignore_terminal_signals() {
    for signal in [libc::SIGTTIN, libc::SIGTTOU] {
        // SAFETY: SIG_IGN installs no code of ours as a handler.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}

/// What a tap for a guest is attached with: Ethernet frames with a virtio-net header.
const TAP_FLAGS: i16 = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as i16;

/// Attaches an opened /dev/net/tun to the tap `name`, which is made if it does not exist.
pub fn attach_tap(tun: BorrowedFd<'_>, name: &str) -> Result<(), Errno> {
    // SAFETY: ifreq is plain bytes, for which zeros are valid.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    // The last byte stays zero.
    if name.len() >= request.ifr_name.len() {
        return Err(Errno::NAMETOOLONG);
    }
    for (slot, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *slot = byte as c_char;
    }
    request.ifr_ifru.ifru_flags = TAP_FLAGS;
    // SAFETY: the descriptor is open while borrowed; the kernel reads and writes `request`, which
    // is ours and of the size this request has.
    let result = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    checked(i64::from(result)).map(drop)
}

/// Leaves the end of an attached tap to its network namespace.
pub fn keep_tap(tap: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: the descriptor is open while borrowed; the argument is a number.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETPERSIST, 1) };
    checked(i64::from(result)).map(drop)
}

/// Whether `fd` is a tap attached as a guest needs it; an error if it is no tap at all.
pub fn is_guest_tap(fd: BorrowedFd<'_>) -> Result<bool, Errno> {
    // SAFETY: ifreq is plain bytes, for which zeros are valid.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    // SAFETY: the descriptor is open while borrowed; the kernel writes `request`, which is ours and
    // of the size this request has.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETIFF, &raw mut request) };
    checked(i64::from(result))?;
    // SAFETY: the kernel filled the flags; any bits are a valid number.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    Ok(flags & TAP_FLAGS == TAP_FLAGS)
}

/// The version of KVM's interface that an opened /dev/kvm speaks.
pub fn kvm_version(kvm: BorrowedFd<'_>) -> Result<i32, Errno> {
    /// `KVM_GET_API_VERSION` of linux/kvm.h.
    const GET_API_VERSION: libc::c_ulong = 0xae00;
    // SAFETY: the descriptor is open while borrowed; this request has no argument.
    let result = unsafe { libc::ioctl(kvm.as_raw_fd(), GET_API_VERSION, 0) };
    checked(i64::from(result)).map(|version| version as i32)
}

/// The version of Landlock's interface.
pub fn landlock_version() -> Result<i64, Errno> {
    /// `LANDLOCK_CREATE_RULESET_VERSION` of linux/landlock.h.
    const VERSION: c_uint = 1;
    // SAFETY: asked for the version alone, the kernel reads no memory.
    let result = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            ptr::null::<u8>(),
            0_usize,
            VERSION,
        )
    };
    checked(result)
}

/// Puts a filter on this process's system calls, for good. It must have no_new_privs.
pub fn install_filter(program: &[libc::sock_filter]) -> Result<(), Errno> {
    let program = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: the kernel copies `len` instructions from `filter`, which is borrowed for the call, and
    // checks them; it writes nothing.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            0_u32,
            &raw const program,
        )
    };
    checked(result).map(drop)
}

/// Leaves the session's keys behind, for an empty set of them.
pub fn leave_session_keys() -> Result<(), Errno> {
    /// `KEYCTL_JOIN_SESSION_KEYRING` of linux/keyctl.h.
    const JOIN_SESSION_KEYRING: c_int = 1;
    // SAFETY: without a name the kernel reads no memory.
    let result = unsafe {
        libc::syscall(
            libc::SYS_keyctl,
            JOIN_SESSION_KEYRING,
            ptr::null::<c_char>(),
        )
    };
    checked(result).map(drop)
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
