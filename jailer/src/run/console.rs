//! The guest's console between the monitor's pipes and the terminal, a file or nowhere. (A socket for
//! clients of the console is the monitor's.) And the monitor's log, which goes the same way.
//!
//! Nothing here waits: what cannot be written stays in a small buffer, and while that is full nothing
//! more is read, so that a slow reader costs console bytes and never holds up the supervisor.

mod terminal;

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;

pub use self::terminal::LOOK_EVERY;
use self::terminal::Terminal;
use crate::error::errno;

/// Most bytes held for a slow reader.
const HELD: usize = 64 * 1024;
/// Bytes moved at once.
const PIECE: usize = 16 * 1024;
/// Ctrl-A, the key before a command.
const COMMAND: u8 = 1;

/// What can be waited for here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The guest writes.
    Guest,
    /// The sink takes more.
    Sink,
    /// There is input.
    Typed,
    /// The guest reads.
    ToGuest,
}

/// Where bytes go.
#[derive(Debug)]
pub enum Sink {
    /// Nowhere.
    Nowhere,
    /// To an output of this process: `patient` if writing to it may wait.
    Output {
        /// The output.
        to: OwnedFd,
        /// Whether a write may wait, so that only a little is written at once.
        patient: bool,
    },
    /// To a file.
    File(File),
}

impl Sink {
    /// Standard output or error. Opened anew where that is possible: not waiting is a property that
    /// would otherwise be shared with others that have it open, a shell for one.
    pub fn output(of: BorrowedFd<'_>) -> Sink {
        let Ok(own) = rustix::io::fcntl_dupfd_cloexec(of, 3) else {
            return Sink::Nowhere;
        };
        let kind = rustix::fs::fstat(&own).map(|stat| FileType::from_raw_mode(stat.st_mode));
        if matches!(kind, Ok(FileType::Fifo | FileType::CharacterDevice)) {
            let path = format!("/proc/self/fd/{}", own.as_raw_fd());
            let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
            if let Ok(to) = rustix::fs::open(path, flags, Mode::empty()) {
                return Sink::Output { to, patient: false };
            }
        }
        // Writing to a file does not wait for a reader.
        let patient = kind != Ok(FileType::RegularFile);
        Sink::Output { to: own, patient }
    }

    /// Writes what can be written now; how much that was. An error means that these
    /// bytes are lost.
    fn write(&mut self, bytes: &[u8]) -> Result<usize, Errno> {
        match self {
            Sink::Nowhere => Ok(bytes.len()),
            Sink::Output { to, patient } => {
                // What has room for something has room for this much.
                let most = if *patient { 512 } else { bytes.len() };
                if *patient && !has_room(to.as_fd()) {
                    return Ok(0);
                }
                match rustix::io::write(to, &bytes[..bytes.len().min(most)]) {
                    Err(Errno::AGAIN | Errno::INTR) => Ok(0),
                    other => other,
                }
            }
            Sink::File(file) => match file.write(bytes).map_err(errno) {
                Err(Errno::AGAIN | Errno::INTR) => Ok(0),
                other => other,
            },
        }
    }
}

/// Whether a sink that failed like this may take more later: what is full may be emptied.
fn is_for_now(error: Errno) -> bool {
    matches!(error, Errno::NOSPC | Errno::DQUOT | Errno::FBIG)
}

/// Whether a write would not wait.
fn has_room(to: BorrowedFd<'_>) -> bool {
    let now = Timespec::default();
    let mut fds = [PollFd::from_borrowed_fd(to, PollFlags::OUT)];
    poll(&mut fds, Some(&now)) == Ok(1)
}

/// Bytes on their way from a pipe to a sink.
#[derive(Debug)]
pub struct Relay {
    source: Option<OwnedFd>,
    held: Vec<u8>,
    sink: Sink,
    /// Whether anything has come.
    pub has_begun: bool,
}

impl Relay {
    /// From the reading end of a pipe, which does not wait.
    pub fn new(source: OwnedFd, sink: Sink) -> Relay {
        Relay {
            source: Some(source),
            held: Vec::new(),
            sink,
            has_begun: false,
        }
    }

    /// What to wait for.
    pub fn interests<'a>(&'a self, add: &mut dyn FnMut(Part, BorrowedFd<'a>, PollFlags)) {
        if let Some(source) = self.source.as_ref().filter(|_| self.held.len() < HELD) {
            add(Part::Guest, source.as_fd(), PollFlags::IN);
        }
        if let Sink::Output { to, .. } = &self.sink
            && !self.held.is_empty()
        {
            add(Part::Sink, to.as_fd(), PollFlags::OUT);
        }
    }

    /// Takes what has come and passes it on; whether anything has.
    pub fn take(&mut self) -> bool {
        let Some(source) = &self.source else {
            return false;
        };
        let mut buffer = [0; PIECE];
        match rustix::io::read(source, &mut buffer) {
            Err(Errno::AGAIN | Errno::INTR) => false,
            Ok(0) | Err(_) => {
                self.source = None;
                false
            }
            Ok(count) => {
                self.has_begun = true;
                self.held.extend_from_slice(&buffer[..count]);
                self.flush();
                true
            }
        }
    }

    /// Passes on what is held; whether some of it went.
    pub fn flush(&mut self) -> bool {
        if self.held.is_empty() {
            return false;
        }
        match self.sink.write(&self.held) {
            Ok(count) => {
                self.held.drain(..count);
                count > 0
            }
            Err(error) => {
                self.held.clear();
                if !is_for_now(error) {
                    self.sink = Sink::Nowhere;
                }
                false
            }
        }
    }

    /// Whether something is still to be written.
    pub fn is_holding(&self) -> bool {
        !self.held.is_empty()
    }
}

/// The console: a relay out, typed bytes in, and a terminal in raw mode.
#[derive(Debug)]
pub struct Console {
    /// What the guest writes.
    pub out: Relay,
    to_guest: OwnedFd,
    typed: Option<OwnedFd>,
    unread: Vec<u8>,
    terminal: Option<Terminal>,
    /// The key before a command was pressed.
    is_command: bool,
}

impl Console {
    /// `to_guest` is the writing end of a pipe, which does not wait.
    pub fn new(out: Relay, to_guest: OwnedFd, typed: Option<OwnedFd>) -> Console {
        let terminal = typed
            .as_ref()
            .filter(|_| matches!(out.sink, Sink::Output { .. }));
        let terminal = terminal
            .and_then(|fd| rustix::io::fcntl_dupfd_cloexec(fd, 3).ok())
            .and_then(Terminal::new);
        Console {
            out,
            to_guest,
            typed,
            unread: Vec::new(),
            terminal,
            is_command: false,
        }
    }

    /// Writes to the guest as if typed.
    pub fn type_in(&mut self, bytes: &[u8]) {
        self.unread.extend_from_slice(bytes);
    }

    /// What to wait for.
    pub fn interests<'a>(&'a self, add: &mut dyn FnMut(Part, BorrowedFd<'a>, PollFlags)) {
        self.out.interests(add);
        if self.unread.is_empty() {
            if let Some(typed) = self.typed.as_ref().filter(|_| !self.is_in_background()) {
                add(Part::Typed, typed.as_fd(), PollFlags::IN);
            }
        } else {
            add(Part::ToGuest, self.to_guest.as_fd(), PollFlags::OUT);
        }
    }

    /// Whether there is a terminal that this process may only use in the foreground, and is not there.
    pub fn is_in_background(&self) -> bool {
        self.terminal.as_ref().is_some_and(|it| !it.is_raw())
    }

    /// Looks whether this process is in the foreground of its terminal now.
    pub fn look_at_terminal(&mut self) {
        if let Some(terminal) = &mut self.terminal {
            terminal.look();
        }
    }

    /// Sets the terminal anew, after this process was stopped.
    pub fn resume(&mut self) {
        if let Some(terminal) = &mut self.terminal {
            terminal.resume();
        }
    }

    /// Does what there is to do; whether the user asked to leave.
    pub fn handle(&mut self, part: Part) -> bool {
        match part {
            Part::Guest => {
                self.out.take();
            }
            Part::Sink => {
                self.out.flush();
            }
            Part::Typed => return self.take_typed(),
            Part::ToGuest => {}
        }
        if !self.unread.is_empty() {
            match rustix::io::write(&self.to_guest, &self.unread) {
                Ok(count) => drop(self.unread.drain(..count)),
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(_) => self.unread.clear(),
            }
        }
        false
    }

    fn take_typed(&mut self) -> bool {
        if let Some(terminal) = &mut self.terminal
            && !terminal.look()
        {
            return false;
        }
        let Some(source) = &self.typed else {
            return false;
        };
        let mut buffer = [0; 1024];
        let count = match rustix::io::read(source, &mut buffer) {
            Err(Errno::AGAIN | Errno::INTR) => return false,
            // Sent to the background a moment ago.
            Err(Errno::IO) if self.terminal.is_some() => return false,
            Ok(0) | Err(_) => {
                // The end of the input; the guest goes on.
                self.typed = None;
                return false;
            }
            Ok(count) => count,
        };
        if self.terminal.is_none() {
            self.unread.extend_from_slice(&buffer[..count]);
        } else {
            for &byte in &buffer[..count] {
                match (self.is_command, byte) {
                    (true, b'x' | b'X') => return true,
                    (true, COMMAND) | (false, _) if byte != COMMAND || self.is_command => {
                        self.unread.push(byte);
                        self.is_command = false;
                    }
                    (false, _) => self.is_command = true,
                    (true, _) => {
                        self.unread.extend([COMMAND, byte]);
                        self.is_command = false;
                    }
                }
            }
        }
        self.handle(Part::ToGuest)
    }

    /// Gives the terminal back, and everything else.
    pub fn close(&mut self) {
        self.terminal = None;
        self.out.sink = Sink::Nowhere;
    }
}

/// A pipe of which one end does not wait.
pub fn pipe(reader_waits: bool, writer_waits: bool) -> Result<(OwnedFd, OwnedFd), Errno> {
    let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    if !reader_waits {
        rustix::fs::fcntl_setfl(&reader, OFlags::NONBLOCK)?;
    }
    if !writer_waits {
        rustix::fs::fcntl_setfl(&writer, OFlags::NONBLOCK)?;
    }
    Ok((reader, writer))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn relay(to: &str, is_file: bool) -> (OwnedFd, Relay) {
        let (reader, writer) = pipe(false, false).unwrap();
        let file = File::options().write(true).open(to).unwrap();
        let sink = if is_file {
            Sink::File(file)
        } else {
            Sink::Output {
                to: file.into(),
                patient: false,
            }
        };
        (writer, Relay::new(reader, sink))
    }

    #[test]
    fn full_sink_loses_bytes_and_is_tried_again() {
        for is_file in [true, false] {
            let (_writer, mut relay) = relay("/dev/full", is_file);
            relay.held.extend(b"lost");
            relay.flush();
            assert!(!relay.is_holding());
            assert!(!matches!(relay.sink, Sink::Nowhere));
        }
    }

    #[test]
    fn sink_without_a_reader_is_given_up() {
        let (reader, to) = pipe(false, false).unwrap();
        let (source, _writer) = pipe(false, false).unwrap();
        drop(reader);
        let mut relay = Relay::new(source, Sink::Output { to, patient: false });
        relay.held.extend(b"lost");
        relay.flush();
        assert!(!relay.is_holding());
        assert!(matches!(relay.sink, Sink::Nowhere));
    }
}
