//! What tests need of the system that the standard library has no word for.
#![expect(unsafe_code, reason = "thin wrappers over single system calls")]

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

fn check(result: i32) -> io::Result<i32> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Has the kernel kill what `command` starts when the calling thread ends, however it does: a
/// test run that is killed leaves no monitor behind.
pub fn die_with_us(command: &mut Command) {
    // SAFETY: prctl is async-signal-safe and touches no memory.
    unsafe {
        command.pre_exec(|| check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL)).map(|_| ()))
    };
}

/// Has `command` start with `fd` as its descriptor `number`, open beyond the exec.
pub fn hand_in(command: &mut Command, fd: OwnedFd, number: i32) {
    // Out of the way of the numbers that others are given before it.
    const ASIDE: i32 = 400;
    // SAFETY: F_DUPFD_CLOEXEC makes a new descriptor and has no other effect.
    let aside = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, ASIDE) };
    // SAFETY: the call succeeded, so it is open and owned by nothing else.
    let fd = unsafe { OwnedFd::from_raw_fd(check(aside).unwrap()) };
    assert!(number < ASIDE);
    // SAFETY: dup2 is async-signal-safe and touches no memory.
    unsafe { command.pre_exec(move || check(libc::dup2(fd.as_raw_fd(), number)).map(|_| ())) };
}

/// Has `command` start with at most `count` descriptors to have.
pub fn limit_descriptors(command: &mut Command, count: u64) {
    let limit = libc::rlimit {
        rlim_cur: count,
        rlim_max: count,
    };
    // SAFETY: setrlimit is async-signal-safe and reads what the closure owns.
    unsafe {
        command.pre_exec(move || {
            check(libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit)).map(|_| ())
        })
    };
}

/// Sends `bytes` and `fds` in one message.
pub fn send_with(stream: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let mut control = [0u64; 64];
    let mut piece = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    let length = u32::try_from(size_of_val(fds)).unwrap();
    // SAFETY: zeros are a valid msghdr; `control` has room for the header and all of `fds`, which
    // the assertion holds; everything outlives the call, which only reads.
    let sent = unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        (message.msg_iov, message.msg_iovlen) = (&raw mut piece, 1);
        if !fds.is_empty() {
            let space = libc::CMSG_SPACE(length) as usize;
            assert!(space <= size_of_val(&control));
            message.msg_control = control.as_mut_ptr().cast();
            message.msg_controllen = space;
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(length) as usize;
            let data = libc::CMSG_DATA(header).cast::<i32>();
            for (place, fd) in fds.iter().enumerate() {
                data.add(place).write_unaligned(fd.as_raw_fd());
            }
        }
        libc::sendmsg(stream.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL)
    };
    assert_eq!(usize::try_from(sent).unwrap(), bytes.len());
}

/// A message with one descriptor: how many bytes it has, and the descriptor.
pub fn receive_with(socket: &UnixStream, bytes: &mut [u8]) -> (usize, OwnedFd) {
    let mut space = [std::mem::MaybeUninit::uninit(); 64];
    let mut messages = RecvAncillaryBuffer::new(&mut space);
    let mut pieces = [io::IoSliceMut::new(bytes)];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let received = rustix::net::recvmsg(socket, &mut pieces, &mut messages, flags).unwrap();
    let fds = messages.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    let fds: Vec<OwnedFd> = fds.flatten().collect();
    let [fd] = <[OwnedFd; 1]>::try_from(fds).expect("one descriptor");
    (received.bytes, fd)
}

/// The address of the next page fault of a userfaultfd, if there is one within `millis`.
pub fn next_fault(faults: &File, millis: i32) -> Option<u64> {
    const PAGEFAULT: u8 = 0x12;
    // `struct uffd_msg`: the kind of event, and the address of a page fault.
    let mut event = [0; 32];
    if !wait_readable(faults, millis) || (&*faults).read(&mut event).ok()? != event.len() {
        return None;
    }
    assert_eq!(event[0], PAGEFAULT);
    Some(u64::from_le_bytes(event[16..24].try_into().unwrap()))
}

/// Answers a page fault with a page, `UFFDIO_COPY`, unless it was answered before: a thread that was
/// interrupted while it waited has its fault twice.
pub fn answer_fault(faults: &File, address: u64, page: &[u8; 4096]) {
    let mut copy = [address & !4095, page.as_ptr() as u64, 4096, 0, 0];
    // SAFETY: the structure is of five numbers, and the source is as long as it says.
    let result = unsafe { libc::ioctl(faults.as_raw_fd(), 0xc028_aa03, copy.as_mut_ptr()) };
    if let Err(error) = check(result) {
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists, "{error}");
    }
}

/// A new tap as a monitor takes it, attached and up, in the network namespace of this thread.
pub fn open_tap(name: &str) -> OwnedFd {
    attach_tap(name, 0)
}

/// Another queue of the tap `name`, which has several or is made with several, in the network namespace of this thread.
pub fn open_tap_queue(name: &str) -> OwnedFd {
    attach_tap(name, libc::IFF_MULTI_QUEUE)
}

fn attach_tap(name: &str, more: libc::c_int) -> OwnedFd {
    let file = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .unwrap();
    // SAFETY: zeros are a valid ifreq; the kernel reads and writes no more than that.
    unsafe {
        let mut request: libc::ifreq = std::mem::zeroed();
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | more;
        request.ifr_ifru.ifru_flags = i16::try_from(flags).unwrap();
        check(libc::ioctl(
            file.as_raw_fd(),
            libc::TUNSETIFF,
            &raw mut request,
        ))
        .unwrap();
    }
    file.into()
}

/// Gives SIGINT and SIGQUIT back what they do by default, here and in what is started from here: a
/// shell that runs the tests in the background has them ignored.
pub fn heed_the_user() {
    for signal in [libc::SIGINT, libc::SIGQUIT] {
        // SAFETY: installs no handler.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}

/// Whether `file` has something to read within `millis`.
pub fn wait_readable(file: &impl AsRawFd, millis: i32) -> bool {
    let mut poll = libc::pollfd {
        fd: file.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: `poll` is one whole pollfd of ours.
    unsafe { libc::poll(&raw mut poll, 1, millis) > 0 }
}

/// Sends `signal` to the process `pid`, which is a child of ours.
/// Kills the processes of a group.
pub fn kill_group(group: u32) {
    let group = i32::try_from(group).unwrap();
    // SAFETY: touches no memory.
    let _ = check(unsafe { libc::kill(-group, libc::SIGKILL) });
}

pub fn kill(pid: u32, signal: i32) {
    let pid = i32::try_from(pid).unwrap();
    // SAFETY: touches no memory.
    check(unsafe { libc::kill(pid, signal) }).unwrap();
}

/// How much a pipe holds.
pub fn set_pipe_size(pipe: &impl AsRawFd, size: i32) {
    // SAFETY: the descriptor is open while `pipe` is borrowed; no memory is touched.
    check(unsafe { libc::fcntl(pipe.as_raw_fd(), libc::F_SETPIPE_SZ, size) }).unwrap();
}

/// Raises the priority of the calling thread and of what it starts, as far as that is permitted.
pub fn prefer_what_is_started() {
    // SAFETY: touches no memory.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, -15) };
}

/// Waits until `pipe` has bytes or its end.
pub fn await_bytes(pipe: &impl AsRawFd) {
    let mut poll = libc::pollfd {
        fd: pipe.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: `poll` is one pollfd of ours. A wait that is interrupted is begun again.
    while unsafe { libc::poll(&raw mut poll, 1, -1) } < 0 {}
}

/// How many bytes wait in `pipe`.
pub fn waiting_in(pipe: &impl AsRawFd) -> i32 {
    let mut count = 0;
    // SAFETY: the descriptor is open while `pipe` is borrowed; the kernel writes one int to `count`.
    check(unsafe { libc::ioctl(pipe.as_raw_fd(), libc::FIONREAD, &raw mut count) }).unwrap();
    count
}

/// Makes thread `id` of another process call `number` with all arguments 0, by way of the system
/// call instruction it is at. Its filter decides: what the call gave, or `None` when it was refused.
pub fn inject(id: i32, number: i64) -> Option<i64> {
    let deadline = Instant::now() + super::PATIENCE;
    loop {
        assert!(
            Instant::now() < deadline,
            "thread {id} is never in a system call"
        );
        // SAFETY: ptrace and waitpid act on the other process; `regs` is ours and whole.
        unsafe {
            let null = std::ptr::null_mut::<libc::c_void>();
            let stopped = || {
                let mut status = 0;
                assert_eq!(libc::waitpid(id, &raw mut status, libc::__WALL), id);
                assert!(libc::WIFSTOPPED(status), "{status:#x}");
                libc::WSTOPSIG(status)
            };
            let options = libc::PTRACE_O_TRACESYSGOOD as usize as *mut libc::c_void;
            assert_eq!(
                libc::ptrace(libc::PTRACE_SEIZE, id, null, options),
                0,
                "seize {id}"
            );
            assert_eq!(libc::ptrace(libc::PTRACE_INTERRUPT, id, null, null), 0);
            stopped();
            let mut regs: libc::user_regs_struct = std::mem::zeroed();
            let read = |regs: &mut libc::user_regs_struct| {
                let to = (&raw mut *regs).cast::<libc::c_void>();
                assert_eq!(libc::ptrace(libc::PTRACE_GETREGS, id, null, to), 0);
            };
            read(&mut regs);
            let in_call = regs.orig_rax as i64 >= 0;
            let mut result = None;
            if in_call {
                // Back to the two bytes of `syscall`, which it will execute again.
                regs.rip -= 2;
                regs.rax = number as u64;
                regs.orig_rax = u64::MAX;
                (regs.rdi, regs.rsi, regs.rdx) = (0, 0, 0);
                (regs.r10, regs.r8, regs.r9) = (0, 0, 0);
                assert_eq!(
                    libc::ptrace(libc::PTRACE_SETREGS, id, null, &raw mut regs),
                    0
                );
                // Where the call begins, and where it ends or the filter's signal comes.
                for _ in 0..2 {
                    assert_eq!(libc::ptrace(libc::PTRACE_SYSCALL, id, null, null), 0);
                    let mut signal = stopped();
                    // The stop that was asked for above may be told once more.
                    while signal == libc::SIGTRAP {
                        assert_eq!(libc::ptrace(libc::PTRACE_SYSCALL, id, null, null), 0);
                        signal = stopped();
                    }
                    if signal == libc::SIGSYS {
                        let signal = signal as usize as *mut libc::c_void;
                        assert_eq!(libc::ptrace(libc::PTRACE_DETACH, id, null, signal), 0);
                        return None;
                    }
                    assert_eq!(signal, libc::SIGTRAP | 0x80);
                }
                read(&mut regs);
                // A call that the filter refuses is undone, its number put back, and the signal
                // comes when the thread goes on.
                result = (regs.rax as i64 != number).then_some(regs.rax as i64);
            }
            assert_eq!(libc::ptrace(libc::PTRACE_DETACH, id, null, null), 0);
            if in_call {
                return result;
            }
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A thread of another process that is kept from running, until dropped by the same thread.
pub struct Held(i32);

impl Held {
    pub fn thread(id: i32) -> Self {
        // SAFETY: ptrace and waitpid act on the other process; `status` is ours.
        unsafe {
            let null = std::ptr::null_mut::<libc::c_void>();
            assert_eq!(libc::ptrace(libc::PTRACE_SEIZE, id, null, null), 0);
            assert_eq!(libc::ptrace(libc::PTRACE_INTERRUPT, id, null, null), 0);
            let mut status = 0;
            assert_eq!(libc::waitpid(id, &raw mut status, libc::__WALL), id);
            assert!(libc::WIFSTOPPED(status));
        }
        Held(id)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let null = std::ptr::null_mut::<libc::c_void>();
        // SAFETY: acts on the other process.
        unsafe { libc::ptrace(libc::PTRACE_DETACH, self.0, null, null) };
    }
}

/// A terminal: the end that people type at, and the end that programs have.
pub struct Terminal {
    pub keyboard: File,
    pub line: File,
}

/// How a terminal is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    flags: [libc::tcflag_t; 4],
    characters: [libc::cc_t; libc::NCCS],
}

impl Settings {
    /// Whether lines are edited and typed characters shown, as people expect.
    pub fn is_for_people(&self) -> bool {
        let local = self.flags[3];
        local & libc::ICANON != 0 && local & libc::ECHO != 0 && local & libc::ISIG != 0
    }

    /// Whether every byte passes as it is.
    pub fn is_raw(&self) -> bool {
        let local = self.flags[3];
        local & (libc::ICANON | libc::ECHO | libc::ISIG | libc::IEXTEN) == 0
    }
}

impl Terminal {
    pub fn new() -> Self {
        let (mut keyboard, mut line) = (-1, -1);
        // SAFETY: both descriptors are ours to fill; the rest is optional.
        let result = unsafe {
            libc::openpty(
                &raw mut keyboard,
                &raw mut line,
                std::ptr::null_mut(),
                std::ptr::null(),
                std::ptr::null(),
            )
        };
        check(result).unwrap();
        for fd in [keyboard, line] {
            // SAFETY: just opened; no memory is touched.
            check(unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) }).unwrap();
        }
        // SAFETY: the call succeeded: both are open and owned by nothing else.
        unsafe {
            Terminal {
                keyboard: File::from_raw_fd(keyboard),
                line: File::from_raw_fd(line),
            }
        }
    }

    pub fn settings(&self) -> Settings {
        // SAFETY: termios is plain numbers, for which zeros are valid.
        let mut found: libc::termios = unsafe { std::mem::zeroed() };
        // SAFETY: `found` is ours and what the call fills.
        check(unsafe { libc::tcgetattr(self.line.as_raw_fd(), &raw mut found) }).unwrap();
        Settings {
            flags: [found.c_iflag, found.c_oflag, found.c_cflag, found.c_lflag],
            characters: found.c_cc,
        }
    }
}

/// Puts the calling thread into the network namespace that the file `path` stands for.
pub fn enter_netns(path: &Path) {
    let file = File::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    // SAFETY: the descriptor is open; no memory is touched.
    check(unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) }).unwrap();
}

/// Gives the calling thread mounts of its own, seen only by what it starts.
pub fn own_mounts() {
    let root = CString::new("/").unwrap();
    // SAFETY: touches no memory.
    check(unsafe { libc::unshare(libc::CLONE_NEWNS) }).unwrap();
    // SAFETY: `root` is a C string that outlives the call; the others may be null for a change
    // of propagation.
    let result = unsafe {
        libc::mount(
            std::ptr::null(),
            root.as_ptr(),
            std::ptr::null(),
            libc::MS_REC | libc::MS_PRIVATE,
            std::ptr::null(),
        )
    };
    check(result).unwrap();
}

/// Mounts a file system of type `kind` on `target`.
pub fn mount(kind: &str, target: &Path, options: &str) {
    let kind = CString::new(kind).unwrap();
    let target = CString::new(target.to_str().unwrap()).unwrap();
    let options = CString::new(options).unwrap();
    // SAFETY: all four are C strings that outlive the call.
    let result = unsafe {
        libc::mount(
            kind.as_ptr(),
            target.as_ptr(),
            kind.as_ptr(),
            libc::MS_NOSUID | libc::MS_NODEV,
            options.as_ptr().cast(),
        )
    };
    check(result).unwrap();
}

/// A socket for whole Ethernet frames of one type on interface `name`; one frame a read or write.
pub fn frames(name: &str, ethertype: u16) -> File {
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
    let protocol = i32::from(ethertype.to_be());
    // SAFETY: touches no memory.
    let fd = check(unsafe { libc::socket(libc::AF_PACKET, kind, protocol) }).unwrap();
    // SAFETY: the call succeeded: `fd` is open and owned by nothing else.
    let socket = unsafe { File::from_raw_fd(fd) };
    let name = CString::new(name).unwrap();
    // SAFETY: `name` is a C string that outlives the call.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    assert_ne!(index, 0, "{name:?}: {}", io::Error::last_os_error());
    // SAFETY: sockaddr_ll is plain numbers, for which zeros are valid.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = ethertype.to_be();
    address.sll_ifindex = i32::try_from(index).unwrap();
    let patience = libc::timeval {
        tv_sec: 60,
        tv_usec: 0,
    };
    // SAFETY: `address` and `patience` are ours, whole, and of the sizes given.
    unsafe {
        check(libc::bind(
            fd,
            (&raw const address).cast(),
            size_of_val(&address) as u32,
        ))
        .unwrap();
        check(libc::setsockopt(
            fd,
            libc::SOL_SOCKET,
            libc::SO_RCVTIMEO,
            (&raw const patience).cast(),
            size_of_val(&patience) as u32,
        ))
        .unwrap();
    }
    socket
}

/// Has the kernel answer every try of the calling thread, and of what it starts, to make an io_uring with `errno`: as
/// the filter of a container does, or a kernel without it.
pub fn forbid_io_uring(errno: i32) {
    let step = |code: u32, jt, jf, k| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    let mut program = [
        // The number of the call.
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        step(
            libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
            0,
            1,
            libc::SYS_io_uring_setup as u32,
        ),
        step(
            libc::BPF_RET | libc::BPF_K,
            0,
            0,
            libc::SECCOMP_RET_ERRNO | errno as u32,
        ),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: both calls only read what they are given, which lives across them.
    unsafe {
        check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)).unwrap();
        let mode = libc::SECCOMP_MODE_FILTER;
        check(libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const program)).unwrap();
    }
}
