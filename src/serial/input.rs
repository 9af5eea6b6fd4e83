//! Console input from its usual place: standard input, or a file.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::fd::AsRawFd;

use super::port::SerialPort;
use super::uart;
use crate::sys::fd::Interest;

/// Where typed bytes come from.
#[derive(Debug)]
pub struct Input {
    source: Option<File>,
    /// The source has nothing more. It stays open: the serial thread closes no files.
    ended: bool,
    /// The terminal belongs to another job, and was not asked again yet.
    in_background: Background,
}

/// What is known of a terminal that other jobs use as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Background {
    /// The last read was ours to make.
    No,
    /// The last read was refused; the next wait leaves the terminal alone.
    Refused,
    /// It was refused, and is tried again.
    Retried,
}

impl Input {
    pub fn new(source: Option<File>) -> Self {
        Input {
            ended: source.is_none(),
            source,
            in_background: Background::No,
        }
    }

    /// Whether the source is left alone in the wait that follows, for it belongs to another job. It
    /// is tried again after that.
    pub fn rests(&mut self) -> bool {
        let rests = self.in_background == Background::Refused;
        if rests {
            self.in_background = Background::Retried;
        }
        rests
    }

    /// What to wait for, when the UART has room.
    pub fn interest(&self) -> Interest {
        match &self.source {
            Some(source) => {
                let wanted = !self.ended && self.in_background != Background::Refused;
                Interest::read(source.as_raw_fd()).when(wanted)
            }
            None => Interest::none(),
        }
    }

    /// Moves to the UART what it has room for; whether a terminal that belonged to another job is
    /// ours again.
    pub fn step(&mut self, ready: Interest, port: &SerialPort) -> bool {
        let Some(source) = &mut self.source else {
            return false;
        };
        let mut bytes = [0; uart::LINE];
        let Some(bytes) = bytes.get_mut(..port.room()).filter(|b| !b.is_empty()) else {
            return false;
        };
        match source.read(bytes) {
            Ok(0) => self.ended = true,
            Ok(n) => {
                port.feed(bytes.get(..n).unwrap_or_default());
                let back = self.in_background != Background::No;
                self.in_background = Background::No;
                return back;
            }
            Err(e) if matches!(e.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => {}
            // A terminal refuses a process in the background so, as this one ignores SIGTTIN.
            Err(e) if e.raw_os_error() == Some(libc::EIO) && !ready.hung_up() => {
                self.in_background = Background::Refused;
            }
            Err(_) => self.ended = true,
        }
        false
    }
}
