//! The user's terminal: raw while this process is in its foreground, as it was found otherwise.
//!
//! A job in the background neither reads a terminal nor changes it: it belongs to the foreground. A
//! shell that stops a job sets the terminal for itself, so that raw mode is set again at SIGCONT; and
//! since a running job that is brought to the foreground gets no signal, a job in the background
//! looks now and then.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::termios::{OptionalActions, OutputModes, Termios};

use crate::sys;

/// How often a job in the background looks whether it is in the foreground.
pub const LOOK_EVERY: Duration = Duration::from_millis(300);

/// A terminal of this process's session.
#[derive(Debug)]
pub struct Terminal {
    fd: OwnedFd,
    /// How it was before it was first made raw.
    found: Option<Termios>,
    is_raw: bool,
}

impl Terminal {
    /// Takes `fd` if it is the terminal of this session, and makes it raw in the foreground.
    pub fn new(fd: OwnedFd) -> Option<Terminal> {
        rustix::termios::tcgetpgrp(&fd).ok()?;
        // Using a terminal in the background becomes an error instead of a stop.
        sys::ignore_terminal_signals();
        let mut terminal = Terminal {
            fd,
            found: None,
            is_raw: false,
        };
        terminal.look();
        Some(terminal)
    }

    fn is_ours(&self) -> bool {
        rustix::termios::tcgetpgrp(&self.fd) == Ok(rustix::process::getpgrp())
    }

    /// Makes it raw if this process has come to the foreground; whether it is there.
    pub fn look(&mut self) -> bool {
        match (self.is_ours(), self.is_raw) {
            (true, false) => self.set_raw(),
            (false, _) => self.is_raw = false,
            (true, true) => {}
        }
        self.is_raw
    }

    /// After this process was stopped: others may have changed it.
    pub fn resume(&mut self) {
        self.is_raw = false;
        self.look();
    }

    /// Whether it is raw, and this process the one that reads it.
    pub fn is_raw(&self) -> bool {
        self.is_raw
    }

    fn set_raw(&mut self) {
        if self.found.is_none() {
            self.found = rustix::termios::tcgetattr(&self.fd).ok();
        }
        let Some(found) = &self.found else { return };
        let mut raw = found.clone();
        raw.make_raw();
        // Our own messages end in a newline alone.
        raw.output_modes |= found.output_modes & (OutputModes::OPOST | OutputModes::ONLCR);
        self.is_raw =
            rustix::termios::tcsetattr(self.fd.as_fd(), OptionalActions::Now, &raw).is_ok();
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Some(found) = self
            .found
            .as_ref()
            .filter(|_| self.is_raw && self.is_ours())
        {
            // There is no other way to give it back.
            let _ = rustix::termios::tcsetattr(&self.fd, OptionalActions::Now, found);
        }
    }
}
