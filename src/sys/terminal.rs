//! The terminal on standard input: raw while a guest runs, as it was found on every way out.

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// How the terminal was found.
static FOUND: OnceLock<libc::termios> = OnceLock::new();
static RAW: AtomicBool = AtomicBool::new(false);

/// Makes the terminal on standard input raw. Does nothing when it is no terminal.
///
/// # Errors
/// When the terminal refuses.
pub fn make_raw() -> io::Result<()> {
    // SAFETY: termios is plain numbers, for which zeros are valid.
    let mut found: libc::termios = unsafe { std::mem::zeroed() };
    // SAFETY: `found` is ours and what the call fills.
    if unsafe { libc::tcgetattr(libc::STDIN_FILENO, &raw mut found) } != 0 {
        return Ok(());
    }
    let found = FOUND.get_or_init(|| found);
    let mut raw = *found;
    // SAFETY: `raw` is a whole termios of ours.
    unsafe { libc::cfmakeraw(&raw mut raw) };
    // SAFETY: `raw` is a whole termios of ours.
    if unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, &raw const raw) } != 0 {
        return Err(io::Error::last_os_error());
    }
    RAW.store(true, Ordering::Release);
    Ok(())
}

/// Gives the terminal back as it was found. May be called in a signal handler, and twice.
pub fn restore() {
    if !RAW.swap(false, Ordering::AcqRel) {
        return;
    }
    if let Some(found) = FOUND.get() {
        // The bare ioctl: tcsetattr makes a second one, which no filter allows.
        // SAFETY: the kernel reads its own termios, 36 bytes, which the C library's begins with;
        // `found` is never written again.
        unsafe { libc::ioctl(libc::STDIN_FILENO, libc::TCSETS, std::ptr::from_ref(found)) };
    }
}
