//! The terminal on standard input: raw while a guest runs, as it was found on every way out.
//!
//! Only the foreground process group changes a terminal: in the background it belongs to the shell
//! or to another job. So raw mode is set at the start if the process is in the foreground, and
//! again whenever the process is continued there ([`set_raw_again`]): the shell has set its own
//! mode meanwhile. The functions on a descriptor know nothing of this process's state; control
//! calls the others, but for [`restore`], which any thread may call, in a signal handler too.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use rustix::process::{Pid, getpgrp};
use rustix::stdio::stdin;
use rustix::termios::tcgetpgrp;

/// The kernel's `struct termios`, which the requests TCGETS and TCSETS take; the C library's is
/// longer.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Termios {
    input: libc::tcflag_t,
    output: libc::tcflag_t,
    control: libc::tcflag_t,
    local: libc::tcflag_t,
    line: libc::cc_t,
    characters: [libc::cc_t; 19],
}

const _: () = assert!(size_of::<Termios>() == 36);

impl Termios {
    /// The same terminal, passing bytes on as they come: "raw mode" of termios(3).
    #[must_use]
    pub fn raw(mut self) -> Self {
        self.input &= !(libc::IGNBRK
            | libc::BRKINT
            | libc::PARMRK
            | libc::ISTRIP
            | libc::INLCR
            | libc::IGNCR
            | libc::ICRNL
            | libc::IXON);
        self.output &= !libc::OPOST;
        self.local &= !(libc::ECHO | libc::ECHONL | libc::ICANON | libc::ISIG | libc::IEXTEN);
        self.control = self.control & !(libc::CSIZE | libc::PARENB) | libc::CS8;
        // A read waits for one byte, and for no time.
        for (index, value) in [(libc::VMIN, 1), (libc::VTIME, 0)] {
            if let Some(character) = self.characters.get_mut(index) {
                *character = value;
            }
        }
        self
    }
}

/// How the terminal `fd` is set.
///
/// # Errors
/// The host's; ENOTTY when it is no terminal.
pub fn settings(fd: BorrowedFd<'_>) -> io::Result<Termios> {
    let mut found = Termios::default();
    ioctl(fd, libc::TCGETS, &mut found)?;
    Ok(found)
}

/// Sets the terminal `fd`.
///
/// # Errors
/// The host's.
pub fn set(fd: BorrowedFd<'_>, termios: &Termios) -> io::Result<()> {
    ioctl(fd, libc::TCSETS, &mut { *termios })
}

/// The bare request: for TCSETS the C library makes a second one after it, which no filter allows.
fn ioctl(fd: BorrowedFd<'_>, request: libc::Ioctl, termios: &mut Termios) -> io::Result<()> {
    // SAFETY: both requests take a termios, 36 bytes, which is what `termios` is laid out as; the
    // kernel reads or writes it during the call.
    if unsafe { libc::ioctl(fd.as_raw_fd(), request, ptr::from_mut(termios)) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Whether process group `group`, the caller's own, may change the terminal `fd`: it is in the
/// foreground, or the terminal is not the one that controls its session.
pub fn is_in_foreground(fd: BorrowedFd<'_>, group: Pid) -> bool {
    tcgetpgrp(fd).map_or(true, |foreground| foreground == group)
}

/// How the terminal was before it was first set.
static FOUND: OnceLock<Termios> = OnceLock::new();
/// The guest's console is the terminal: it is to be raw.
static WANTED: AtomicBool = AtomicBool::new(false);
/// It has been made raw.
static RAW: AtomicBool = AtomicBool::new(false);
/// The process group, which stays the same once the process runs.
static GROUP: AtomicI32 = AtomicI32::new(0);

/// Whether standard input is a terminal that belongs to another job at the moment.
pub fn is_in_background() -> bool {
    WANTED.load(Ordering::Acquire)
        && Pid::from_raw(GROUP.load(Ordering::Acquire))
            .is_some_and(|group| !is_in_foreground(stdin(), group))
}

/// Makes the terminal on standard input raw, now or when the process comes to the foreground. Does
/// nothing when it is no terminal.
///
/// # Errors
/// When the terminal refuses.
pub fn make_raw() -> io::Result<()> {
    if settings(stdin()).is_err() {
        return Ok(());
    }
    GROUP.store(getpgrp().as_raw_nonzero().get(), Ordering::Release);
    WANTED.store(true, Ordering::Release);
    set_raw_again()
}

/// Makes the terminal raw if it is to be, after the process was continued.
///
/// # Errors
/// When the terminal refuses.
pub fn set_raw_again() -> io::Result<()> {
    if !WANTED.load(Ordering::Acquire) || is_in_background() {
        return Ok(());
    }
    let now = settings(stdin())?;
    let found = FOUND.get_or_init(|| now);
    RAW.store(true, Ordering::Release);
    set(stdin(), &found.raw())
}

/// Gives the terminal back as it was found. May be called in a signal handler, and twice.
pub fn restore() {
    let background = is_in_background();
    WANTED.store(false, Ordering::Release);
    if !RAW.swap(false, Ordering::AcqRel) || background {
        return;
    }
    if let Some(found) = FOUND.get() {
        // The process ends: there is no place to report a failure to.
        let _ = set(stdin(), found);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn raw_when_compared_is_the_c_librarys() {
        // Every flag set, then none.
        for flags in [libc::tcflag_t::MAX, 0] {
            // SAFETY: termios is plain numbers, for which zeros are valid.
            let mut theirs: libc::termios = unsafe { std::mem::zeroed() };
            (theirs.c_iflag, theirs.c_oflag) = (flags, flags);
            (theirs.c_cflag, theirs.c_lflag) = (flags, flags);
            theirs.c_cc = [7; 32];
            let ours = Termios {
                input: flags,
                output: flags,
                control: flags,
                local: flags,
                line: 0,
                characters: [7; 19],
            }
            .raw();
            // SAFETY: `theirs` is a whole termios of ours.
            unsafe { libc::cfmakeraw(&raw mut theirs) };
            assert_eq!(
                (ours.input, ours.output, ours.control, ours.local),
                (
                    theirs.c_iflag,
                    theirs.c_oflag,
                    theirs.c_cflag,
                    theirs.c_lflag
                )
            );
            assert_eq!(ours.characters, theirs.c_cc[..19]);
        }
    }
}
