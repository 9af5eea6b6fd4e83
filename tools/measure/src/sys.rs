//! System calls that the standard library does not offer: the only module with `unsafe`.

#![expect(
    unsafe_code,
    reason = "mmap, ioctl, poll, inotify, pidfd and a signal handler have no safe form in std; each is wrapped here once"
)]

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;

mod frames;
mod pages;
mod passing;

pub use frames::{
    EXPERIMENT, TAP_HEADER, experiment_socket, frame_socket, limit_sending, limit_waiting,
    make_tap, open_tap, send_many, with_header,
};
pub use passing::{receive_descriptor, send_with_descriptor};

/// One instruction of a filter (`struct sock_filter`).
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Instruction {
    /// Operation.
    pub code: u16,
    /// Instructions to skip when a comparison holds.
    pub jump_true: u8,
    /// Instructions to skip when it does not.
    pub jump_false: u8,
    /// Operand.
    pub operand: u32,
}

/// Guest memory of the floor program: one private mapping.
#[derive(Debug)]
pub struct GuestMemory {
    start: NonNull<u8>,
    len: usize,
}

impl GuestMemory {
    /// Maps `len` bytes of anonymous memory.
    pub fn new(len: usize) -> io::Result<Self> {
        Self::map(len, libc::MAP_ANONYMOUS, -1)
    }

    /// Maps the whole of `file`.
    pub fn of_file(file: &File) -> io::Result<Self> {
        let len = file.metadata()?.len();
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
        Self::map(len, 0, file.as_raw_fd())
    }

    fn map(len: usize, flags: libc::c_int, file: libc::c_int) -> io::Result<Self> {
        // SAFETY: no address is asked for, so no existing mapping is touched.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_NORESERVE | flags,
                file,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).expect("mmap returns no null pointer");
        Ok(Self { start, len })
    }

    /// Copies `bytes` to the guest-physical address `at`.
    pub fn write(&mut self, at: usize, bytes: &[u8]) -> io::Result<()> {
        self.check(at, bytes.len())?;
        // SAFETY: `check` keeps the sum inside the mapping.
        let to = unsafe { self.start.add(at) };
        // SAFETY: `check` keeps the range inside the mapping, which `self` owns; `bytes` is ordinary Rust memory.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to.as_ptr(), bytes.len()) };
        Ok(())
    }

    /// Maps `len` bytes of `file` privately in place of the memory at `at`.
    pub fn map_file(&mut self, at: usize, file: &File, offset: u64, len: usize) -> io::Result<()> {
        self.check(at, len)?;
        let offset = i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: `check` keeps the sum inside the mapping.
        let to = unsafe { self.start.add(at) };
        // SAFETY: `check` keeps the range inside the mapping that `self` owns, so that MAP_FIXED replaces nothing else;
        // no reference into it exists.
        let mapped = unsafe {
            libc::mmap(
                to.as_ptr().cast(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_FIXED,
                file.as_raw_fd(),
                offset,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Makes this memory the guest's, from guest-physical address 0.
    pub fn register(&self, vm: &VmFd) -> io::Result<()> {
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: self.len as u64,
            userspace_addr: self.start.as_ptr() as u64,
        };
        // SAFETY: the region is the mapping of `self`, which is never unmapped (there is no `Drop`).
        let registered = unsafe { vm.set_user_memory_region(region) };
        registered.map_err(|error| io::Error::from_raw_os_error(error.errno()))
    }

    fn check(&self, at: usize, len: usize) -> io::Result<()> {
        match at.checked_add(len) {
            Some(end) if end <= self.len => Ok(()),
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "outside guest memory",
            )),
        }
    }
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Processor time of all children that have ended and been waited for.
pub fn time_of_children() -> io::Result<Duration> {
    // SAFETY: all zeros is a value of this plain structure.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: `usage` is a whole structure of the kind that is written.
    if unsafe { libc::getrusage(libc::RUSAGE_CHILDREN, &mut usage) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let time = |t: libc::timeval| {
        Duration::from_secs(t.tv_sec as u64) + Duration::from_micros(t.tv_usec as u64)
    };
    Ok(time(usage.ru_utime) + time(usage.ru_stime))
}

/// Processor time of a process, all its threads.
pub fn time_of_process(pid: u32) -> io::Result<Duration> {
    let mut clock = 0;
    // SAFETY: `clock` is one clock id, which is written.
    let error = unsafe { libc::clock_getcpuclockid(pid as libc::pid_t, &mut clock) };
    if error != 0 {
        return Err(io::Error::from_raw_os_error(error));
    }
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is a whole structure of the kind that is written.
    if unsafe { libc::clock_gettime(clock, &mut time) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Duration::new(time.tv_sec as u64, time.tv_nsec as u32))
}

/// Reads into the first, third, fifth... page of `space`: half as many bytes as that has.
pub fn read_scattered(file: &File, space: &mut [u8], at: u64) -> io::Result<()> {
    const PAGE: usize = 4096;
    let pieces: Vec<libc::iovec> = space
        .chunks_exact_mut(2 * PAGE)
        .map(|pages| libc::iovec {
            iov_base: pages.as_mut_ptr().cast(),
            iov_len: PAGE,
        })
        .collect();
    // SAFETY: the pieces lie apart in `space`, which this function has for itself.
    let done = unsafe {
        libc::preadv(
            file.as_raw_fd(),
            pieces.as_ptr(),
            pieces.len() as libc::c_int,
            at as libc::off_t,
        )
    };
    match usize::try_from(done) {
        Ok(done) if done == pieces.len() * PAGE => Ok(()),
        Ok(_) => Err(io::ErrorKind::UnexpectedEof.into()),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

extern "C" fn note_interrupt(_signal: libc::c_int) {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

/// Makes SIGINT, SIGTERM and SIGHUP end the measurement in order, with everything cleaned up. Started programs get the
/// default actions (an exec resets handlers).
pub fn catch_interrupts() {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        let handler = note_interrupt as extern "C" fn(libc::c_int);
        // SAFETY: all zeroes is a valid sigaction: default action, empty mask, no flags.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = handler as usize;
        // No SA_RESTART: a blocking poll returns, and its caller asks `interrupted`.
        // SAFETY: `action` is initialised, and its handler does nothing but store to an atomic.
        unsafe { libc::sigaction(signal, &action, std::ptr::null_mut()) };
    }
}

/// Whether one of those signals came.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// Waits until one of `fds` is readable (or at its end) and says which; all false after `timeout`. An interrupt is an
/// error of kind `Interrupted`.
pub fn poll<const N: usize>(fds: [BorrowedFd<'_>; N], timeout: Duration) -> io::Result<[bool; N]> {
    let deadline = Instant::now() + timeout;
    let mut entries = fds.map(|fd| libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    });
    loop {
        if interrupted() {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let left = deadline.saturating_duration_since(Instant::now());
        // A signal may be taken by another thread, so no wait is longer than this.
        let wait = left.min(Duration::from_millis(250)).as_millis() as libc::c_int;
        // SAFETY: `entries` has N valid elements, and the descriptors are borrowed for the whole call.
        let ready = unsafe { libc::poll(entries.as_mut_ptr(), N as libc::nfds_t, wait) };
        if ready > 0 {
            return Ok(entries.map(|entry| entry.revents != 0));
        }
        if ready < 0 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        } else if left.is_zero() {
            return Ok([false; N]);
        }
    }
}

/// The same for less than a millisecond, exact to the kernel's timers.
pub fn poll_for<const N: usize>(
    fds: [BorrowedFd<'_>; N],
    timeout: Duration,
) -> io::Result<[bool; N]> {
    if interrupted() {
        return Err(io::ErrorKind::Interrupted.into());
    }
    let mut entries = fds.map(|fd| libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    });
    let wait = libc::timespec {
        tv_sec: 0,
        tv_nsec: timeout.subsec_nanos().into(),
    };
    let (count, no_mask) = (N as libc::nfds_t, std::ptr::null());
    // SAFETY: `entries` has N valid elements, `wait` is whole, and the descriptors are borrowed for the whole call.
    let ready = unsafe { libc::ppoll(entries.as_mut_ptr(), count, &wait, no_mask) };
    match ready {
        0.. => Ok(entries.map(|entry| entry.revents != 0)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A descriptor of the child `pid` that becomes readable when it ends.
pub fn pidfd(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: the call has two integer arguments.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })
}

/// A descriptor that becomes readable when a name (a socket, say) appears in `directory`.
pub fn watch_for_names(directory: &Path) -> io::Result<OwnedFd> {
    let flags = libc::IN_CLOEXEC | libc::IN_NONBLOCK;
    // SAFETY: the call has one integer argument.
    let inotify = owned(i64::from(unsafe { libc::inotify_init1(flags) }))?;
    let directory = CString::new(directory.as_os_str().as_bytes())?;
    // SAFETY: the path is a C string that outlives the call.
    let watch = unsafe {
        libc::inotify_add_watch(inotify.as_raw_fd(), directory.as_ptr(), libc::IN_CREATE)
    };
    if watch < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(inotify)
}

/// Moves the calling thread, and whatever it starts, into a network namespace of its own. The kernel removes it, and
/// all its interfaces, with its last process.
pub fn enter_own_network() -> io::Result<()> {
    // SAFETY: the call has one integer argument.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Has processes whose parent ends before them become children of this one, as a host's first process does.
pub fn adopt_orphans() -> io::Result<()> {
    // SAFETY: the call has five integer arguments.
    if unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Takes the end of a child, if it has ended.
pub fn reap(pid: u32) {
    let mut status = 0;
    // SAFETY: `status` is an integer of ours.
    unsafe { libc::waitpid(pid as libc::pid_t, &mut status, libc::WNOHANG) };
}

/// SIGUSR1.
pub const USR1: libc::c_int = libc::SIGUSR1;

/// SIGKILL.
pub const KILL: libc::c_int = libc::SIGKILL;

/// Sends a signal to a process.
pub fn signal(pid: u32, signal: libc::c_int) -> io::Result<()> {
    // SAFETY: the call has two integer arguments.
    if unsafe { libc::kill(pid as libc::pid_t, signal) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// A socket that sends ICMP messages to an IPv4 address and receives, with their IPv4 headers, those that it sends.
pub fn icmp_socket(peer: [u8; 4]) -> io::Result<File> {
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
    // SAFETY: the call has three integer arguments.
    let socket = unsafe { libc::socket(libc::AF_INET, kind, libc::IPPROTO_ICMP) };
    let socket = owned(i64::from(socket))?;
    // SAFETY: all zeroes is a valid sockaddr_in.
    let mut address: libc::sockaddr_in = unsafe { std::mem::zeroed() };
    address.sin_family = libc::AF_INET as u16;
    address.sin_addr.s_addr = u32::from_ne_bytes(peer);
    // SAFETY: the address is ours and has the size given.
    let connected = unsafe {
        libc::connect(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of_val(&address) as u32,
        )
    };
    if connected < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(File::from(socket))
}

/// Reads the seccomp filters of a thread that is not this process's, the newest first. It is stopped meanwhile.
pub fn seccomp_filters(tid: libc::pid_t) -> io::Result<Vec<Vec<Instruction>>> {
    ptrace(libc::PTRACE_SEIZE as _, tid, 0)?;
    let stopped = ptrace(libc::PTRACE_INTERRUPT as _, tid, 0).and_then(|_| {
        let mut status = 0;
        // SAFETY: `status` is an integer of ours.
        match unsafe { libc::waitpid(tid, &mut status, libc::__WALL) } {
            waited if waited == tid => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    });
    let filters = stopped.and_then(|()| {
        let mut filters = Vec::new();
        loop {
            match seccomp_filter(tid, filters.len()) {
                Ok(filter) => filters.push(filter),
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(filters),
                Err(error) => return Err(error),
            }
        }
    });
    ptrace(libc::PTRACE_DETACH as _, tid, 0)?;
    filters
}

fn seccomp_filter(tid: libc::pid_t, index: usize) -> io::Result<Vec<Instruction>> {
    /// From the kernel's `linux/ptrace.h`.
    const PTRACE_SECCOMP_GET_FILTER: libc::c_uint = 0x420c;
    let request = PTRACE_SECCOMP_GET_FILTER;
    // Without a buffer the kernel answers with the number of instructions.
    // SAFETY: a null buffer is not written to.
    let count = unsafe { libc::ptrace(request, tid, index, std::ptr::null_mut::<Instruction>()) };
    if count < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut filter = vec![Instruction::default(); count as usize];
    // SAFETY: the buffer has room for `count` instructions of the kernel's layout, and a filter never changes.
    let copied = unsafe { libc::ptrace(request, tid, index, filter.as_mut_ptr()) };
    if copied < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(filter)
}

fn ptrace(request: libc::c_uint, tid: libc::pid_t, data: usize) -> io::Result<()> {
    // SAFETY: only requests without pointers come here.
    if unsafe { libc::ptrace(request, tid, 0_usize, data) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn owned(fd: i64) -> io::Result<OwnedFd> {
    match libc::c_int::try_from(fd) {
        // SAFETY: a system call has just returned this descriptor, and nothing else knows it.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}
