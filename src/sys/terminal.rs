//! The terminal on standard input: raw while a guest runs, as it was found on every way out.

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// The kernel's `struct termios`, which the requests TCGETS and TCSETS take; the C library's is
/// longer.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Termios {
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
    fn raw(mut self) -> Self {
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

/// How the terminal was found.
static FOUND: OnceLock<Termios> = OnceLock::new();
static RAW: AtomicBool = AtomicBool::new(false);

/// Makes the terminal on standard input raw. Does nothing when it is no terminal.
///
/// # Errors
/// When the terminal refuses.
pub fn make_raw() -> io::Result<()> {
    let mut found = Termios::default();
    // SAFETY: the kernel writes its termios, 36 bytes, which is what `found` is laid out as.
    if unsafe { libc::ioctl(libc::STDIN_FILENO, libc::TCGETS, &raw mut found) } != 0 {
        return Ok(());
    }
    set(&FOUND.get_or_init(|| found).raw())?;
    RAW.store(true, Ordering::Release);
    Ok(())
}

/// Gives the terminal back as it was found. May be called in a signal handler, and twice.
pub fn restore() {
    if !RAW.swap(false, Ordering::AcqRel) {
        return;
    }
    if let Some(found) = FOUND.get() {
        // There is nobody left to tell if it fails.
        let _ = set(found);
    }
}

/// The bare ioctl: the C library makes a second one after it, which no filter allows.
fn set(termios: &Termios) -> io::Result<()> {
    // SAFETY: the kernel reads its termios, 36 bytes, which is what `termios` is laid out as.
    if unsafe { libc::ioctl(libc::STDIN_FILENO, libc::TCSETS, termios) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
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
