//! The raw system calls of the jailer, each behind a safe function: the only unsafe code here.
//!
//! The jailer has one thread from start to end, and several promises below rest on that: `fork` and
//! `clone` copy a consistent process, and changed credentials hold for the whole process.

#![expect(
    unsafe_code,
    reason = "fork, clone3, exec, signals, close_range and some ioctls have no safe wrapper"
)]

use std::convert::Infallible;
use std::ffi::{CStr, CString, c_char, c_int, c_uint};
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use libc::{SIGCHLD, SIGCONT, SIGKILL, SIGPIPE, SIGSTOP, SIGTSTP};
use libc::{SIGTTIN, SIGTTOU, SIGURG, SIGWINCH, SIGXFSZ};
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Pid, Resource, Rlimit};
use rustix::thread::{CapabilitySet, UnshareFlags};
use rustix::time::{ClockId, clock_gettime};

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

/// The descriptors above 2 that this program was started with, and the promise that it has opened
/// none that it still holds: `main` makes the only value before all else, and what is opened while
/// it is there is closed again.
#[derive(Debug)]
pub struct Inherited(());

impl Inherited {
    /// For `main`, before all else.
    ///
    /// # Panics
    /// The second time.
    pub fn at_start() -> Inherited {
        static MADE: AtomicBool = AtomicBool::new(false);
        assert!(!MADE.swap(true, Ordering::Relaxed), "main begins once");
        Inherited(())
    }

    /// Closes all but those of these numbers, which can be taken over one by one then
    /// (`mayfly::wire::take_over`).
    pub fn keep(self, numbers: &[RawFd]) -> Result<(), Errno> {
        // SAFETY: `self` says that no value of this process owns one.
        unsafe { close_all_but(numbers) }
    }
}

/// Above the standard streams.
const FIRST: RawFd = 3;

/// Closes the descriptors from `first` to `last`, both included, or does with them what `flags` say.
///
/// # Safety
/// No value of this process owns one of them, or it is neither used nor dropped afterwards.
unsafe fn close_range(first: RawFd, last: RawFd, flags: c_uint) -> Result<(), Errno> {
    let (first, last) = (first as c_uint, last as c_uint);
    // SAFETY: passed on to the caller; the call touches no memory.
    checked(unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) }).map(drop)
}

/// Closes every descriptor above 2 but those in `kept`. If a parent shares the table of them with this
/// process, the parent's stays whole.
///
/// # Safety
/// No value of this process owns one of them, or it is neither used nor dropped afterwards.
unsafe fn close_all_but(kept: &[RawFd]) -> Result<(), Errno> {
    let mut kept: Vec<RawFd> = kept.to_vec();
    kept.sort_unstable();
    // Closes up to the end.
    kept.push(RawFd::MAX);
    let mut first = FIRST;
    for number in kept {
        if number > first {
            // SAFETY: passed on to the caller.
            unsafe { close_range(first, number - 1, libc::CLOSE_RANGE_UNSHARE) }?;
        }
        first = first.max(number.saturating_add(1));
    }
    Ok(())
}

/// Closes every descriptor above 2, and does nothing until a signal ends this process.
pub fn stay() -> ! {
    // SAFETY: nothing of this process is used or dropped afterwards: this does not return.
    let _ = unsafe { close_all_but(&[]) };
    loop {
        // SAFETY: the call touches no memory.
        unsafe { libc::pause() };
    }
}

/// Opens what is there, for this program alone.
pub fn open(path: impl rustix::path::Arg, flags: OFlags) -> Result<OwnedFd, Errno> {
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty())
}

/// Opens a folder to reach what is in it.
pub fn open_folder(path: impl rustix::path::Arg) -> Result<OwnedFd, Errno> {
    open(path, OFlags::RDONLY | OFlags::DIRECTORY)
}

/// Puts `file` in the place of the standard input and outputs.
pub fn replace_standard_streams(file: &OwnedFd) -> Result<(), Errno> {
    rustix::stdio::dup2_stdin(file)?;
    rustix::stdio::dup2_stdout(file)?;
    rustix::stdio::dup2_stderr(file)
}

/// Lets go of the standard streams, where there is something to put in their place.
pub fn leave_standard_streams() -> Result<(), Errno> {
    match open("/dev/null", OFlags::RDWR) {
        Ok(null) => replace_standard_streams(&null),
        Err(_) => Ok(()),
    }
}

/// Leaves the namespaces in `flags` for new ones (for the pid namespace: its next child does).
pub fn unshare(flags: UnshareFlags) -> Result<(), Errno> {
    // SAFETY: unshare_unsafe is unsafe for FILES alone (descriptors of other threads); this
    // process has one thread.
    unsafe { rustix::thread::unshare_unsafe(flags) }
}

/// Copies this process: none in the copy, and here the copy's pid.
pub fn fork() -> Result<Option<Pid>, Errno> {
    // SAFETY: this process has one thread, so the child's memory, allocator included, is whole.
    let pid = unsafe { libc::fork() };
    Ok(Pid::from_raw(checked(i64::from(pid))? as i32))
}

/// Ends this process at once: no destructors, no flushing of what the parent will flush.
pub fn exit_now(code: c_int) -> ! {
    // SAFETY: _exit touches nothing of this process; it only ends it.
    unsafe { libc::_exit(code) }
}

/// Replaces this process by the program at `path`, or opened as `at` if the path is empty, with
/// `argv` and an empty environment. Returns only the reason why that did not happen.
pub fn exec(at: BorrowedFd<'_>, path: &CStr, argv: &[CString]) -> Errno {
    let mut pointers: Vec<*const c_char> = argv.iter().map(|word| word.as_ptr()).collect();
    pointers.push(ptr::null());
    let environment: [*const c_char; 1] = [ptr::null()];
    // SAFETY: the descriptor is open while borrowed; the path and the words of `argv` are C strings
    // borrowed for the call; both lists end with a null pointer, put there above.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            at.as_raw_fd(),
            path.as_ptr(),
            pointers.as_ptr(),
            environment.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
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
/// is ignored stays so across exec, and the kernel keeps no end for a process that ignores SIGCHLD.
pub fn expect_children() {
    ignore(SIGCHLD, false);
}

/// The signals that end a program which does nothing about them: all but those that stop or continue
/// it, or do nothing; and but for SIGKILL, which none can do anything about, and those that a write
/// brings. A fault of this program's own ends it all the same.
fn ending() -> impl Iterator<Item = c_int> {
    let others = [SIGCHLD, SIGCONT, SIGKILL, SIGPIPE, SIGSTOP, SIGTSTP]
        .into_iter()
        .chain([SIGTTIN, SIGTTOU, SIGURG, SIGWINCH, SIGXFSZ]);
    // Between these are the C library's own.
    let all = (1..=libc::SIGSYS).chain(libc::SIGRTMIN()..=libc::SIGRTMAX());
    all.filter(move |signal| !others.clone().any(|other| other == *signal))
}

/// Held back even if ignored: a shell ignores them for a job in the background, but one that is sent
/// asks for the end all the same.
const ALWAYS: [c_int; 3] = [libc::SIGINT, libc::SIGQUIT, libc::SIGTERM];

/// Those of them that the caller has not chosen to ignore, as nohup(1) does: held back, they would
/// count.
fn held() -> Vec<c_int> {
    let counts = |signal: &c_int| {
        // SAFETY: sigaction is plain numbers, for which zeros are valid.
        let mut now: libc::sigaction = unsafe { mem::zeroed() };
        // SAFETY: the kernel writes `now`, which is ours; no action is set.
        unsafe { libc::sigaction(*signal, ptr::null(), &raw mut now) };
        now.sa_sigaction != libc::SIG_IGN || ALWAYS.contains(signal)
    };
    ending().filter(counts).collect()
}

/// Makes a write to a broken pipe, or beyond the largest file that is allowed, an error instead of
/// an end.
pub fn survive_writes() {
    for signal in WRITING {
        ignore(signal, true);
    }
}

/// The signals that a write may bring.
const WRITING: [c_int; 2] = [SIGPIPE, SIGXFSZ];

/// Gives the program to come what a program expects: no signal blocked, and none ignored of those
/// that are here (an ignored signal stays so across exec).
pub fn reset_signals() -> Result<(), Errno> {
    for signal in WRITING {
        ignore(signal, false);
    }
    change_mask(libc::SIG_SETMASK, &signal_set(&[]))
}

/// Ignores a signal, or lets it do what it does to a program that never heard of it.
fn ignore(signal: c_int, yes: bool) {
    let action = if yes { libc::SIG_IGN } else { libc::SIG_DFL };
    // SAFETY: neither action installs code of ours as a handler.
    unsafe { libc::signal(signal, action) };
}

fn change_mask(how: c_int, set: &libc::sigset_t) -> Result<(), Errno> {
    // SAFETY: `set` is a whole signal set, which is only read; the old mask is not asked for.
    let result = unsafe { libc::sigprocmask(how, set, ptr::null_mut()) };
    checked(i64::from(result)).map(drop)
}

fn signal_set(signals: &[c_int]) -> libc::sigset_t {
    let mut set = mem::MaybeUninit::uninit();
    // SAFETY: sigemptyset writes the whole of the set it is given, and cannot fail on a valid one;
    // to add a number that is no signal's fails and changes nothing.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in signals {
            libc::sigaddset(set.as_mut_ptr(), *signal);
        }
        set.assume_init()
    }
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

/// Whether this process is root and may become another user. The root of a user namespace in which
/// groups are denied (`unshare -r`) may not: it is an ordinary user by another number.
pub fn is_superuser() -> bool {
    let groups = std::fs::read_to_string("/proc/self/setgroups");
    rustix::process::geteuid().is_root() && groups.map_or(true, |text| text.trim() != "deny")
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

/// Of linux/sched.h; the C library's constant is too narrow.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Copies this process; the copy is alone in new namespaces, and in a control group of version 2 if
/// one is given. None in the copy; here the copy's pid and a descriptor of it.
pub fn clone(
    namespaces: UnshareFlags,
    group: Option<BorrowedFd<'_>>,
) -> Result<Option<(Pid, OwnedFd)>, Errno> {
    let mut pidfd: c_int = -1;
    // SAFETY: clone_args is plain numbers, for which zeros are valid: nothing of this.
    let mut args: libc::clone_args = unsafe { mem::zeroed() };
    args.flags = u64::from(namespaces.bits()) | libc::CLONE_PIDFD as u64;
    args.pidfd = (&raw mut pidfd) as u64;
    args.exit_signal = SIGCHLD as u64;
    if let Some(group) = group {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = group.as_raw_fd() as u64;
    }
    // SAFETY: without CLONE_VM this is a fork: the child gets a copy of this process, which has one
    // thread, so that the copy is whole. The kernel reads `args` and writes `pidfd`, both ours.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, mem::size_of_val(&args)) };
    let pid = Pid::from_raw(checked(pid)? as i32);
    // SAFETY: the call succeeded, so the kernel opened a descriptor for us alone.
    Ok(pid.map(|pid| (pid, unsafe { OwnedFd::from_raw_fd(pidfd) })))
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
    rustix::io::retry_on_intr(|| {
        let pid = child.as_raw_nonzero().get();
        // SAFETY: `status` and `usage` are ours and what the kernel fills.
        let result = unsafe { libc::wait4(pid, &raw mut status, 0, &raw mut usage) };
        checked(i64::from(result))
    })?;
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

/// Copies this process. The copy has descriptors 0 to 2, `channel` and `other`, and no others; it
/// runs `body`, and ends. `body` is told if the others could not be closed.
///
/// It is a plain function, and what it is told can be cloned, as the owner of a descriptor cannot: so
/// it reaches none that was open before.
pub fn fork_apart<T: Clone + 'static>(
    channel: OwnedFd,
    other: BorrowedFd<'_>,
    with: &T,
    body: fn(Result<(), Errno>, OwnedFd, BorrowedFd<'_>, &T),
) -> Result<Pid, Errno> {
    if let Some(pid) = fork()? {
        return Ok(pid);
    }
    // SAFETY: what is closed belongs to values of the callers, to whom this process, a copy, never
    // returns; and `body`, by its type, reaches none of them.
    let closed = unsafe { close_all_but(&[channel.as_raw_fd(), other.as_raw_fd()]) };
    body(closed, channel, other, with);
    exit_now(0)
}

/// What the last function of a process may still use: copies of three descriptors.
pub type Aside = [OwnedFd; 3];

/// Locks what is open, by a call that does not wait, and tries again for a fifth of a second. What any process can lock is
/// not waited for longer.
pub fn lock_soon(open: OwnedFd, how: FlockOperation) -> Option<OwnedFd> {
    for _ in 0..100 {
        if rustix::fs::flock(&open, how).is_ok() {
            return Some(open);
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    None
}

/// Above every number that a jail's program is given.
pub const ASIDE: RawFd = 32;

/// Gives the program to come its descriptors, copies of `placed` at the numbers 0, 1, 2 and so on and
/// no others, and lets `last` start it. `last` is told if they could not be placed, and has copies of
/// `kept`. When it returns, this process ends.
///
/// What else had those numbers is closed, even if a value owns it. `last` is a plain function, and told
/// words alone, so that it reaches no descriptor that was open before.
///
/// Returns only when there is no room for the copies. Nothing has changed then.
pub fn place(
    placed: &[BorrowedFd<'_>],
    kept: [BorrowedFd<'_>; 3],
    argv: &[CString],
    name: &str,
    last: fn(Result<(), Errno>, Aside, &[CString], &str),
) -> Result<Infallible, Errno> {
    // First all out of the way, so that none is overwritten before it has been copied.
    let copy = |descriptor: &BorrowedFd<'_>| rustix::io::fcntl_dupfd_cloexec(descriptor, ASIDE);
    let [one, two, three] = &kept;
    let kept = [copy(one)?, copy(two)?, copy(three)?];
    let placed: Vec<OwnedFd> = placed.iter().map(copy).collect::<Result<_, _>>()?;
    let mut count = 0;
    let put = placed.iter().try_for_each(|descriptor| {
        // SAFETY: what had the number belongs to values of the callers, to whom this never returns;
        // and `last`, by its type, reaches none of them. The call touches no memory.
        let result = unsafe { libc::dup2(descriptor.as_raw_fd(), count) };
        count += 1;
        checked(i64::from(result)).map(drop)
    });
    drop(placed);
    // SAFETY: nothing is closed before this process is replaced.
    let others = || unsafe { close_range(count, RawFd::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    last(put.and_then(|()| others()), kept, argv, name);
    exit_now(1)
}

/// Holds back the signals that end a program, SIGCONT, which says that this one was stopped, and SIGWINCH,
/// which says that its terminal has another size; and gives a descriptor to read them from.
pub fn watch_signals() -> Result<OwnedFd, Errno> {
    let mut signals = held();
    signals.extend([SIGCONT, SIGWINCH]);
    let set = signal_set(&signals);
    change_mask(libc::SIG_BLOCK, &set)?;
    // SAFETY: `set` is initialised.
    let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    let fd = checked(i64::from(fd))?;
    // SAFETY: the call succeeded, so the kernel opened this descriptor for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// The next signal from [`watch_signals`], if one has come.
pub fn next_signal(signals: BorrowedFd<'_>) -> Option<c_int> {
    // One record; it begins with the number.
    let mut record = [0; mem::size_of::<libc::signalfd_siginfo>()];
    let count = rustix::io::read(signals, &mut record).ok()?;
    let number = record.get(..count)?.first_chunk::<4>()?;
    c_int::try_from(u32::from_ne_bytes(*number)).ok()
}

/// Makes using a terminal in the background an error instead of a stop.
pub fn ignore_terminal_signals() {
    for signal in [SIGTTIN, SIGTTOU] {
        ignore(signal, true);
    }
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
    let none = ptr::null::<u8>();
    // SAFETY: asked for the version alone, the kernel reads no memory.
    checked(unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, none, 0_usize, VERSION) })
}

/// Leaves the session's keys behind, for an empty set of them.
pub fn leave_session_keys() -> Result<(), Errno> {
    let without_name = ptr::null::<c_char>();
    // SAFETY: without a name the kernel reads no memory.
    let result = unsafe {
        libc::syscall(
            libc::SYS_keyctl,
            libc::KEYCTL_JOIN_SESSION_KEYRING,
            without_name,
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
        let error = exec(rustix::fs::CWD, c"/nonexistent/program", &argv);
        assert_eq!(error, Errno::NOENT);
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
