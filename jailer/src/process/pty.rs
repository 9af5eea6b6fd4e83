//! A pseudo-terminal for a process of a guest, whose other end goes to the program that asked for it
//! (`--console-socket`), as container engines do.
//!
//! It is made on the host: this process becomes the one that uses it, as if it had been started from a terminal. What
//! the guest's process has is a terminal of the guest's own, which this one is passed on to.

use std::os::fd::AsFd as _;
use std::path::Path;

use mayfly::wire::send_with_descriptors;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::pty::OpenptFlags;
use rustix::termios::{OptionalActions, Winsize};

use super::place::{PATIENCE, connect_to};
use crate::error::{Failure, Step as _, errno};

/// Makes one of this size (rows and columns), sends its controlling end to the socket, and makes the other one standard
/// input and output of this process, and the terminal of its session.
pub fn make(socket: &Path, size: Option<(u16, u16)>) -> Result<(), Failure> {
    const MAKE: &str = "make a terminal (--console-socket)";
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let ours = || {
        let controller = rustix::pty::openpt(flags)?;
        rustix::pty::unlockpt(&controller)?;
        let line = rustix::pty::ioctl_tiocgptpeer(&controller, flags)?;
        // The guest's terminal edits lines and ends them.
        let mut settings = rustix::termios::tcgetattr(&line)?;
        settings.make_raw();
        rustix::termios::tcsetattr(&line, OptionalActions::Now, &settings)?;
        if let Some((rows, columns)) = size {
            let size = Winsize {
                ws_row: rows,
                ws_col: columns,
                ws_xpixel: 0,
                ws_ypixel: 0,
            };
            rustix::termios::tcsetwinsize(&controller, size)?;
        }
        Ok::<_, Errno>((controller, line))
    };
    let (controller, line) = ours().step(MAKE)?;
    let send = || {
        let flags = SocketFlags::CLOEXEC;
        let to = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        connect_to(&to, socket, PATIENCE)?;
        let sent = send_with_descriptors(&to, b"/dev/ptmx", &[controller.as_fd()]);
        sent.map(drop).map_err(errno)
    };
    send().step_on("send the terminal to the socket (--console-socket)", socket)?;
    let take = || {
        // It leads a session already, or can.
        let _ = rustix::process::setsid();
        rustix::process::ioctl_tiocsctty(&line)?;
        rustix::stdio::dup2_stdin(&line)?;
        rustix::stdio::dup2_stdout(&line)
    };
    take().step(MAKE)
}
