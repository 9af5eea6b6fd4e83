//! Signals: which end the process and how, which wake a vCPU, which are read by control.
//!
//! - SIGTERM, SIGINT, SIGQUIT, SIGHUP, SIGXCPU and whatever else ends a process that does not care
//!   are blocked on every thread; control reads them from a descriptor ([`Signals`]) and ends the
//!   process in order. SIGINT and SIGQUIT stay ignored where the caller ignored them, as shells do
//!   for what they start in the background.
//! - SIGCONT continues the process as ever; control reads it too, and sets the terminal again.
//! - SIGSYS (a filter's trap), SIGBUS, SIGSEGV, SIGILL, SIGFPE, SIGTRAP and SIGABRT end the process
//!   from a handler that writes one line, restores the terminal and exits; it allocates nothing
//!   and takes no lock.
//! - SIGPIPE and SIGXFSZ are ignored: the write that raised them fails instead. So are SIGTTIN
//!   and SIGTTOU: a monitor in the background loses its terminal, and does not stop.
//! - The first real-time signal makes a vCPU's KVM_RUN return ([`kick`]).

use std::cell::Cell;
use std::fs::File;
use std::io::{self, Read};
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;

use vmm_sys_util::signal::{Killable, create_sigset};

use super::{fd, process, terminal, thread};

/// The process goes on after it was stopped.
pub const CONTINUED: i32 = libc::SIGCONT;

/// Signals that control reads, beside the real-time ones.
const READ_BY_CONTROL: [libc::c_int; 12] = [
    CONTINUED,
    libc::SIGTERM,
    libc::SIGHUP,
    libc::SIGXCPU,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGALRM,
    libc::SIGVTALRM,
    libc::SIGPROF,
    libc::SIGIO,
    libc::SIGPWR,
    libc::SIGSTKFLT,
];

/// Signals of a terminal's user, which control reads unless the caller ignored them.
const FROM_THE_USER: [libc::c_int; 2] = [libc::SIGINT, libc::SIGQUIT];

const IGNORED: [libc::c_int; 4] = [libc::SIGPIPE, libc::SIGXFSZ, libc::SIGTTIN, libc::SIGTTOU];

const FATAL: [libc::c_int; 7] = [
    libc::SIGSYS,
    libc::SIGBUS,
    libc::SIGSEGV,
    libc::SIGILL,
    libc::SIGFPE,
    libc::SIGTRAP,
    libc::SIGABRT,
];

/// The exit code of a process that a signal ends. It runs in a signal handler: it may compute and
/// nothing else.
pub type ExitCode = fn(i32) -> i32;

/// Says what lies at a host address, for the line about a SIGBUS.
pub type DescribeAddress = fn(usize, &mut dyn FnMut(&str));

/// The signals that control reads, as a descriptor for its loop.
#[derive(Debug)]
pub struct Signals(File);

/// One of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Signal {
    /// Its number.
    pub number: i32,
    /// Where it came from: 0 is another process (`si_code` of sigaction(2)).
    pub code: i32,
}

impl Signals {
    /// Sets up every signal of the process, with the exit code for each. Call it on the first
    /// thread, before any other exists: threads inherit what is blocked.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn install(exit_code: ExitCode) -> io::Result<Self> {
        let _ = EXIT_CODE.set(exit_code);
        for signal in IGNORED {
            set_action(signal, Action::Ignore)?;
        }
        for signal in FATAL {
            set_action(signal, Action::Fatal)?;
        }
        set_action(libc::SIGRTMIN(), Action::Kick)?;

        let mut read = READ_BY_CONTROL.to_vec();
        read.extend(libc::SIGRTMIN().saturating_add(1)..=libc::SIGRTMAX());
        for signal in FROM_THE_USER {
            if set_action(signal, Action::Default)? == libc::SIG_IGN {
                set_action(signal, Action::Ignore)?;
            } else {
                read.push(signal);
            }
        }
        let set = create_sigset(&read)?;
        change_mask(libc::SIG_BLOCK, &set)?;
        // SAFETY: `set` is a whole signal set of ours, which the call only reads.
        let fd =
            unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call succeeded: `fd` is open and owned by nothing else.
        Ok(Signals(File::from(unsafe { OwnedFd::from_raw_fd(fd) })))
    }

    /// The next signal that came, if one did.
    pub fn next(&self) -> Option<Signal> {
        // One record is 128 bytes and begins with the signal's number, an error, and the code.
        let mut record = [0; mem::size_of::<libc::signalfd_siginfo>()];
        let n = (&self.0).read(&mut record).ok()?;
        let (numbers, _) = record.get(..n)?.as_chunks::<4>();
        let [number, _, code, ..] = numbers else {
            return None;
        };
        Some(Signal {
            number: i32::from_le_bytes(*number),
            code: i32::from_le_bytes(*code),
        })
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Ends the process the way `signal` would have ended it, or with the documented code where
/// that cannot be (process 1 of a namespace).
pub fn end_by(signal: i32) -> ! {
    let has_own_code = matches!(signal, libc::SIGHUP | libc::SIGXCPU);
    if !has_own_code && !process::is_first_process() {
        let _ = set_action(signal, Action::Default);
        if let Ok(set) = create_sigset(&[signal]) {
            let _ = change_mask(libc::SIG_UNBLOCK, &set);
        }
        // SAFETY: `raise` touches no memory of ours.
        unsafe { libc::raise(signal) };
    }
    process::exit(exit_code(signal))
}

thread_local! {
    /// The flag of the vCPU that this thread runs, if it runs one.
    static IMMEDIATE_EXIT: Cell<Option<&'static AtomicU8>> = const { Cell::new(None) };
}

/// Makes kicks of the calling thread set `flag`, its vCPU's.
pub fn aim_kicks_at(flag: &'static AtomicU8) {
    IMMEDIATE_EXIT.set(Some(flag));
}

/// Makes KVM_RUN return on the thread of `vcpu`, now or as soon as it is next called.
pub fn kick<T>(vcpu: &JoinHandle<T>) {
    // It cannot fail: the handle exists, so the thread has not been joined.
    let _ = vcpu.kill(libc::SIGRTMIN());
}

/// Lets this process be kicked, as [`Signals::install`] does.
#[cfg(test)]
pub fn install_kicks() {
    set_action(libc::SIGRTMIN(), Action::Kick).expect("real-time signals can be caught");
}

extern "C" fn on_kick(_: libc::c_int) {
    if let Some(flag) = IMMEDIATE_EXIT.get() {
        flag.store(1, Ordering::Relaxed);
    }
}

/// How what the kernel tells of a fatal signal begins (`struct siginfo`, members `_sigfault` and
/// `_sigsys`).
#[repr(C)]
struct Info {
    signo: i32,
    errno: i32,
    code: i32,
    pad: i32,
    /// What could not be reached; where the call was made.
    address: usize,
    /// SIGSYS: the system call that a filter trapped.
    call: i32,
    arch: u32,
}

extern "C" fn on_fatal(signal: libc::c_int, info: &Info, _: *mut libc::c_void) {
    let mut line = Text::new();
    line.say("mayfly: thread ");
    thread::with_name(|name| line.say(name));
    match signal {
        libc::SIGSYS => {
            line.say(": the seccomp filter does not allow system call ");
            line.number(info.call);
            line.say(" (");
            line.say(super::syscalls::name(info.call));
            line.say(")");
        }
        libc::SIGBUS => {
            line.say(": SIGBUS: memory mapped from a file is gone");
            if let Some(describe) = DESCRIBE.get() {
                describe(info.address, &mut |text| line.say(text));
            }
        }
        libc::SIGSEGV => {
            line.say(": SIGSEGV: invalid memory access in the monitor");
        }
        libc::SIGILL => {
            line.say(": SIGILL: the monitor executed an instruction that this CPU lacks");
        }
        other => {
            line.say(": signal ");
            line.number(other);
            line.say(" ended the monitor");
        }
    }
    line.say("\n");
    let _ = fd::write(libc::STDERR_FILENO, line.bytes());
    terminal::restore();
    process::exit(exit_code(signal))
}

static DESCRIBE: OnceLock<DescribeAddress> = OnceLock::new();
static EXIT_CODE: OnceLock<ExitCode> = OnceLock::new();

/// As shells have it, unless the program has said otherwise.
fn exit_code(signal: i32) -> i32 {
    EXIT_CODE
        .get()
        .map_or_else(|| signal.saturating_add(128), |code| code(signal))
}

/// Lets the line about a SIGBUS name the file. `describe` runs in the signal handler: it may
/// read memory and call its second argument, and nothing else.
pub fn describe_addresses_by(describe: DescribeAddress) {
    let _ = DESCRIBE.set(describe);
}

/// Changes what the calling thread blocks.
fn change_mask(how: libc::c_int, set: &libc::sigset_t) -> io::Result<()> {
    // SAFETY: `set` is a whole signal set, which the call only reads; the old one is not asked for.
    match unsafe { libc::pthread_sigmask(how, set, ptr::null_mut()) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// What becomes of a signal.
#[derive(Clone, Copy)]
enum Action {
    Default,
    Ignore,
    /// [`on_kick`].
    Kick,
    /// [`on_fatal`].
    Fatal,
}

/// Decides that; what had been decided before.
fn set_action(signal: libc::c_int, action: Action) -> io::Result<libc::sighandler_t> {
    let (handler, flags) = match action {
        Action::Default => (libc::SIG_DFL, 0),
        Action::Ignore => (libc::SIG_IGN, 0),
        Action::Kick => {
            let handler: extern "C" fn(libc::c_int) = on_kick;
            (handler as libc::sighandler_t, 0)
        }
        Action::Fatal => {
            let handler: extern "C" fn(libc::c_int, &Info, *mut libc::c_void) = on_fatal;
            // On the thread's other stack, which the standard library makes: the first may be full.
            let flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            (handler as libc::sighandler_t, flags)
        }
    };
    let action = libc::sigaction {
        sa_sigaction: handler,
        sa_mask: create_sigset(&[])?,
        sa_flags: flags,
        sa_restorer: None,
    };
    let mut before = action;
    // SAFETY: `action` is whole, and `before` ours to be written. The two handlers do only what a signal handler may, and have the
    // arguments that their flags ask for: with SA_SIGINFO the kernel passes the address of a
    // siginfo of 128 bytes, all of them written, which begins as `Info`.
    if unsafe { libc::sigaction(signal, &raw const action, &raw mut before) } == 0 {
        Ok(before.sa_sigaction)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// A line built without allocation.
pub(super) struct Text {
    bytes: [u8; 256],
    len: usize,
}

impl Text {
    pub(super) const fn new() -> Self {
        Text {
            bytes: [0; 256],
            len: 0,
        }
    }

    pub(super) fn say(&mut self, text: &str) {
        for byte in text.bytes() {
            if let Some(slot) = self.bytes.get_mut(self.len) {
                *slot = byte;
                self.len += 1;
            }
        }
    }

    fn number(&mut self, number: i32) {
        if number < 0 {
            self.say("-");
        }
        self.size(number.unsigned_abs() as usize);
    }

    pub(super) fn size(&mut self, mut rest: usize) {
        let mut digits = [0; 20];
        let mut len = 0;
        for digit in digits.iter_mut().rev() {
            *digit = b'0' + (rest % 10) as u8;
            rest /= 10;
            len += 1;
            if rest == 0 {
                break;
            }
        }
        let text = digits.get(digits.len() - len..).unwrap_or_default();
        self.say(std::str::from_utf8(text).unwrap_or("?"));
    }

    pub(super) fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn info_when_compared_lies_as_the_c_librarys() {
        assert!(mem::size_of::<Info>() <= mem::size_of::<libc::siginfo_t>());
        let signo = mem::offset_of!(libc::siginfo_t, si_signo);
        assert_eq!(mem::offset_of!(Info, signo), signo);
        let code = mem::offset_of!(libc::siginfo_t, si_code);
        assert_eq!(mem::offset_of!(Info, code), code);
        // SAFETY: a siginfo is plain numbers, for which zeros are valid.
        let mut info: libc::siginfo_t = unsafe { mem::zeroed() };
        let ours = (&raw mut info).cast::<Info>();
        // SAFETY: `Info` is no larger and needs no other alignment than what it is put into.
        unsafe { (*ours).address = 0x1234_5678_9abc };
        // SAFETY: any bytes are a valid address.
        assert_eq!(unsafe { info.si_addr() } as usize, 0x1234_5678_9abc);
    }

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
