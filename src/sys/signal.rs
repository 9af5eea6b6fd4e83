//! Signals: which end the process and how, which wake a vCPU, which are read by control.
//!
//! - SIGTERM, SIGINT, SIGQUIT, SIGHUP and SIGXCPU are blocked on every thread; control reads them
//!   from a descriptor ([`Signals`]) and ends the process in order.
//! - SIGSYS (a filter's trap), SIGBUS, SIGSEGV and SIGILL end the process from a handler that
//!   writes one line, gives the terminal back and exits; it allocates nothing and takes no lock.
//! - SIGPIPE and SIGXFSZ are ignored: the write that raised them fails instead. So are SIGTTIN
//!   and SIGTTOU: a monitor in the background loses its terminal, and does not stop.
//! - The first real-time signal makes a vCPU's KVM_RUN return ([`kick`]).

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::thread::JoinHandleExt;
use std::ptr;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;

use super::kvm::RunPage;
use super::{fd, process, terminal};
use crate::{exit, log};

/// Signals that control reads.
const READ_BY_CONTROL: [libc::c_int; 5] = [
    libc::SIGTERM,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGHUP,
    libc::SIGXCPU,
];

const IGNORED: [libc::c_int; 4] = [libc::SIGPIPE, libc::SIGXFSZ, libc::SIGTTIN, libc::SIGTTOU];

const FATAL: [libc::c_int; 4] = [libc::SIGSYS, libc::SIGBUS, libc::SIGSEGV, libc::SIGILL];

/// Says what lies at a host address, for the line about a SIGBUS.
pub type DescribeAddress = fn(usize, &mut dyn FnMut(&str));

/// The signals that control reads, as a descriptor for its loop.
#[derive(Debug)]
pub struct Signals(File);

impl Signals {
    /// Sets up every signal of the process. Call it on the first thread, before any other exists:
    /// threads inherit what is blocked.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn install() -> io::Result<Self> {
        for signal in IGNORED {
            set_action(signal, libc::SIG_IGN, 0)?;
        }
        for signal in FATAL {
            let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                on_fatal;
            // On the thread's other stack, which the standard library makes: the first may be full.
            let flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            set_action(signal, handler as libc::sighandler_t, flags)?;
        }
        let handler: extern "C" fn(libc::c_int) = on_kick;
        set_action(libc::SIGRTMIN(), handler as libc::sighandler_t, 0)?;

        let set = set_of(&READ_BY_CONTROL);
        // SAFETY: `set` is a whole signal set of ours; the old one is not asked for.
        let result =
            unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut()) };
        if result != 0 {
            return Err(io::Error::from_raw_os_error(result));
        }
        // SAFETY: `set` is a whole signal set of ours.
        let fd =
            unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call succeeded: `fd` is open and nobody else's.
        Ok(Signals(File::from(unsafe { OwnedFd::from_raw_fd(fd) })))
    }

    /// The next signal that came, if one did.
    pub fn next(&self) -> Option<i32> {
        // One record is 128 bytes and begins with the signal's number.
        let mut record = [0; mem::size_of::<libc::signalfd_siginfo>()];
        let n = fd::read(self.0.as_raw_fd(), &mut record).ok()?;
        let number = record.get(..n)?.first_chunk::<4>()?;
        i32::try_from(u32::from_le_bytes(*number)).ok()
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Ends the process the way `signal` would have ended it, or with the documented code where
/// that can not be (process 1 of a namespace).
pub fn end_by(signal: i32) -> ! {
    match signal {
        libc::SIGHUP => process::exit(exit::SIGHUP),
        libc::SIGXCPU => process::exit(exit::SIGXCPU),
        _ => {}
    }
    if !process::is_first_process() {
        let _ = set_action(signal, libc::SIG_DFL, 0);
        let set = set_of(&[signal]);
        // SAFETY: `set` is a whole signal set of ours.
        unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, ptr::null_mut()) };
        // SAFETY: `raise` touches no memory of ours.
        unsafe { libc::raise(signal) };
    }
    process::exit(exit::by_signal(signal))
}

thread_local! {
    /// The flag of the vCPU that this thread runs, if it runs one.
    static IMMEDIATE_EXIT: Cell<Option<&'static AtomicU8>> = const { Cell::new(None) };
}

/// Makes kicks of the calling thread reach the vCPU that `page` belongs to.
pub fn aim_kicks_at(page: RunPage) {
    IMMEDIATE_EXIT.set(Some(page.immediate_exit()));
}

/// Makes KVM_RUN return on the thread of `vcpu`, now or as soon as it is next called.
pub fn kick<T>(vcpu: &JoinHandle<T>) {
    // SAFETY: the handle exists, so the thread has not been joined and its id is valid.
    unsafe { libc::pthread_kill(vcpu.as_pthread_t(), libc::SIGRTMIN()) };
}

extern "C" fn on_kick(_: libc::c_int) {
    if let Some(flag) = IMMEDIATE_EXIT.get() {
        flag.store(1, Ordering::Relaxed);
    }
}

extern "C" fn on_fatal(signal: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let mut line = Text::new();
    line.say("mayfly: thread ");
    log::with_thread_name(|name| line.say(name));
    let code = match signal {
        libc::SIGSYS => {
            let number = trapped_call(info);
            line.say(": the seccomp filter does not allow system call ");
            line.number(number);
            line.say(" (");
            line.say(super::syscalls::name(number));
            line.say(")");
            exit::BAD_SYSCALL
        }
        libc::SIGBUS => {
            // SAFETY: the kernel passes a valid siginfo, and SIGBUS fills the address.
            let address = unsafe { (*info).si_addr() } as usize;
            line.say(": SIGBUS: memory mapped from a file is gone");
            if let Some(describe) = DESCRIBE.get() {
                describe(address, &mut |text| line.say(text));
            }
            exit::SIGBUS
        }
        libc::SIGSEGV => {
            line.say(": SIGSEGV: the monitor touched memory that is not its own");
            exit::SIGSEGV
        }
        _ => {
            line.say(": SIGILL: the monitor met an instruction that this CPU lacks");
            exit::SIGILL
        }
    };
    line.say("\n");
    let _ = fd::write(libc::STDERR_FILENO, line.bytes());
    terminal::restore();
    process::exit(code)
}

static DESCRIBE: std::sync::OnceLock<DescribeAddress> = std::sync::OnceLock::new();

/// Lets the line about a SIGBUS name the file. `describe` runs in the signal handler: it may
/// read memory and call its second argument, and nothing else.
pub fn describe_addresses_by(describe: DescribeAddress) {
    let _ = DESCRIBE.set(describe);
}

/// The number of the system call that a filter trapped.
fn trapped_call(info: *const libc::siginfo_t) -> i32 {
    /// What the kernel writes for SIGSYS (`struct siginfo`, member `_sigsys`).
    #[repr(C)]
    struct SigSys {
        signo: i32,
        errno: i32,
        code: i32,
        pad: i32,
        call_address: usize,
        syscall: i32,
        arch: u32,
    }
    // SAFETY: the kernel passes a valid siginfo of 128 bytes, which for SIGSYS begins so.
    unsafe { (*info.cast::<SigSys>()).syscall }
}

fn set_of(signals: &[libc::c_int]) -> libc::sigset_t {
    // SAFETY: a signal set is plain bits, for which zeros are valid (the empty set).
    let mut set: libc::sigset_t = unsafe { mem::zeroed() };
    for signal in signals {
        // SAFETY: `set` is a whole signal set of ours; the numbers are valid signals.
        unsafe { libc::sigaddset(&raw mut set, *signal) };
    }
    set
}

fn set_action(
    signal: libc::c_int,
    handler: libc::sighandler_t,
    flags: libc::c_int,
) -> io::Result<()> {
    // SAFETY: sigaction is plain numbers and a set, for which zeros are valid.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    action.sa_sigaction = handler;
    action.sa_flags = flags;
    // SAFETY: `action` is whole; `handler` is SIG_IGN, SIG_DFL or a function of the right type
    // for its flags that does only what a signal handler may.
    if unsafe { libc::sigaction(signal, &raw const action, ptr::null_mut()) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// A line built without allocation.
struct Text {
    bytes: [u8; 256],
    len: usize,
}

impl Text {
    const fn new() -> Self {
        Text {
            bytes: [0; 256],
            len: 0,
        }
    }

    fn say(&mut self, text: &str) {
        for byte in text.bytes() {
            if let Some(slot) = self.bytes.get_mut(self.len) {
                *slot = byte;
                self.len += 1;
            }
        }
    }

    fn number(&mut self, number: i32) {
        let mut digits = [0; 10];
        let mut rest = number.unsigned_abs();
        let mut len = 0;
        for digit in digits.iter_mut().rev() {
            *digit = b'0' + (rest % 10) as u8;
            rest /= 10;
            len += 1;
            if rest == 0 {
                break;
            }
        }
        if number < 0 {
            self.say("-");
        }
        let text = digits.get(digits.len() - len..).unwrap_or_default();
        self.say(std::str::from_utf8(text).unwrap_or("?"));
    }

    fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn number_when_any_prints_as_decimal() {
        for n in [0, 7, 10, 101, -3, i32::MAX, i32::MIN] {
            let mut text = Text::new();
            text.number(n);
            assert_eq!(text.bytes(), n.to_string().as_bytes());
        }
    }

    #[test]
    fn say_when_too_long_is_cut() {
        let mut text = Text::new();
        text.say(&"x".repeat(1000));
        assert_eq!(text.bytes().len(), 256);
    }
}
