//! The guest's console between the monitor's pipes and the terminal, a file or nowhere. (A socket for
//! clients of the console is the monitor's.) And the monitor's log, which goes the same way.
//!
//! Nothing here waits: what cannot be written stays in a small buffer, and while that is full nothing
//! more is read, so that a slow reader costs console bytes and never holds up the supervisor.

pub mod terminal;

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;

pub use self::terminal::LOOK_EVERY;
use self::terminal::Terminal;
use crate::error::errno;
use crate::sys;

/// Most bytes held for a slow reader.
const HELD: usize = 64 * 1024;
/// Bytes moved at once.
const PIECE: usize = 16 * 1024;
/// Ctrl-A, the key before a command.
const COMMAND: u8 = 1;

/// What can be waited for of a relay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// There is something to read.
    Source,
    /// The sink takes more.
    Sink,
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
    /// Nowhere, but the last bytes are kept.
    Tail(Vec<u8>),
}

/// So many of them.
const TAIL: usize = 16 * 1024;

impl Sink {
    /// Standard output or error. Opened anew where that is possible: not waiting is a property that
    /// would otherwise be shared with others that have it open, a shell for one.
    pub fn output(of: BorrowedFd<'_>) -> Sink {
        let Ok(own) = rustix::io::fcntl_dupfd_cloexec(of, 3) else {
            return Sink::Nowhere;
        };
        if let Some(to) = opened_anew(own.as_fd(), OFlags::WRONLY) {
            return Sink::Output { to, patient: false };
        }
        let kind = rustix::fs::fstat(&own).map(|stat| FileType::from_raw_mode(stat.st_mode));
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
            Sink::Tail(tail) => {
                tail.extend_from_slice(bytes);
                let rest = tail.len().saturating_sub(TAIL);
                tail.drain(..rest);
                Ok(bytes.len())
            }
            Sink::File(file) => match file.write(bytes).map_err(errno) {
                Err(Errno::AGAIN | Errno::INTR) => Ok(0),
                other => other,
            },
        }
    }
}

/// Standard input. Opened anew, as an output is, so that a read of it does not wait where another program that
/// has it open was first.
pub fn input(of: BorrowedFd<'_>) -> Option<OwnedFd> {
    let own = rustix::io::fcntl_dupfd_cloexec(of, 3).ok()?;
    match opened_anew(own.as_fd(), OFlags::RDONLY) {
        Some(opened) => Some(opened),
        None => Some(own),
    }
}

/// What a pipe or a character device is, opened once more, so that it does not wait. Another opening of the
/// device for new pseudo-terminals would be one more of those.
fn opened_anew(of: BorrowedFd<'_>, access: OFlags) -> Option<OwnedFd> {
    let stat = rustix::fs::fstat(of).ok()?;
    let kind = FileType::from_raw_mode(stat.st_mode);
    let is_ptmx = kind == FileType::CharacterDevice && stat.st_rdev == PTMX;
    if is_ptmx || !matches!(kind, FileType::Fifo | FileType::CharacterDevice) {
        return None;
    }
    let path = format!("/proc/self/fd/{}", of.as_raw_fd());
    sys::open(path, access | OFlags::NONBLOCK | OFlags::NOCTTY).ok()
}

/// Number of /dev/ptmx.
const PTMX: u64 = libc::makedev(5, 2);

/// Reads of an input what is there now. A socket cannot be opened anew, but read without waiting.
pub fn read_now(from: BorrowedFd<'_>, place: &mut [u8]) -> Result<usize, Errno> {
    match rustix::net::recv(from, &mut *place, rustix::net::RecvFlags::DONTWAIT) {
        Err(Errno::NOTSOCK) => rustix::io::read(from, place),
        Ok((count, _)) => Ok(count),
        Err(error) => Err(error),
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

/// Bytes on their way from a pipe or an input to a sink.
#[derive(Debug)]
pub struct Relay {
    source: Option<OwnedFd>,
    held: Vec<u8>,
    sink: Sink,
    /// Whether anything has come.
    pub has_begun: bool,
}

impl Relay {
    /// From a source that is read when there is something.
    pub fn new(source: Option<OwnedFd>, sink: Sink) -> Relay {
        Relay {
            source,
            held: Vec::new(),
            sink,
            has_begun: false,
        }
    }

    /// What to wait for.
    pub fn interests<'a>(&'a self, mut add: impl FnMut(Part, BorrowedFd<'a>, PollFlags)) {
        if let Some(source) = self.source.as_ref().filter(|_| self.held.len() < HELD) {
            add(Part::Source, source.as_fd(), PollFlags::IN);
        }
        if let Sink::Output { to, .. } = &self.sink
            && !self.held.is_empty()
        {
            add(Part::Sink, to.as_fd(), PollFlags::OUT);
        }
    }

    /// Takes what has come and passes it on; whether anything has.
    pub fn take(&mut self) -> bool {
        let mut buffer = [0; PIECE];
        let count = self.read(&mut buffer, None);
        self.pass_on(&buffer[..count]);
        count > 0
    }

    /// Reads what has come, up to the end of the source or an error that is not `passing`.
    fn read(&mut self, buffer: &mut [u8], passing: Option<Errno>) -> usize {
        let Some(source) = &self.source else {
            return 0;
        };
        match read_now(source.as_fd(), buffer) {
            Err(Errno::AGAIN | Errno::INTR) => 0,
            Err(error) if Some(error) == passing => 0,
            Ok(0) | Err(_) => {
                self.source = None;
                0
            }
            Ok(count) => count,
        }
    }

    /// Passes on these bytes, behind what is held.
    pub fn pass_on(&mut self, bytes: &[u8]) {
        self.has_begun |= !bytes.is_empty();
        self.held.extend_from_slice(bytes);
        self.flush();
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

    /// How many bytes are held for a slow reader.
    pub fn held(&self) -> usize {
        self.held.len()
    }

    /// Whether nothing reads the sink any more.
    pub fn is_lost(&self) -> bool {
        matches!(self.sink, Sink::Nowhere)
    }

    /// The last bytes, where those are kept: as text of several lines, without control characters.
    pub fn tail(&self) -> String {
        let Sink::Tail(tail) = &self.sink else {
            return String::new();
        };
        let text = String::from_utf8_lossy(tail).replace('\r', "");
        text.replace(|it: char| it.is_control() && it != '\n', "?")
    }

    /// Whether something is still to be written.
    pub fn is_holding(&self) -> bool {
        !self.held.is_empty()
    }
}

/// The console: a relay out, one for typed bytes in, and a terminal in raw mode.
#[derive(Debug)]
pub struct Console {
    /// What the guest writes.
    pub out: Relay,
    /// What it reads.
    pub input: Relay,
    terminal: Option<Terminal>,
    /// The key before a command was pressed.
    is_command: bool,
}

impl Console {
    /// `to_guest` is the writing end of a pipe, which does not wait.
    pub fn new(out: Relay, typed: Option<OwnedFd>, to_guest: OwnedFd) -> Console {
        let is_shown = matches!(out.sink, Sink::Output { .. });
        let terminal = typed.as_ref().filter(|_| is_shown);
        let terminal = terminal.and_then(|fd| rustix::io::fcntl_dupfd_cloexec(fd, 3).ok());
        let to_guest = Sink::Output {
            to: to_guest,
            patient: false,
        };
        Console {
            out,
            input: Relay::new(typed, to_guest),
            terminal: terminal.and_then(Terminal::new),
            is_command: false,
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

    /// Takes what was typed and passes it on; whether the user asked to leave.
    pub fn take_typed(&mut self) -> bool {
        self.look_at_terminal();
        if self.is_in_background() {
            return false;
        }
        let mut buffer = [0; 1024];
        // The error of a job that was sent to the background a moment ago.
        let passing = self.terminal.as_ref().map(|_| Errno::IO);
        let count = self.input.read(&mut buffer, passing);
        let mut for_guest = Vec::with_capacity(count + 1);
        let mut leaves = false;
        for &byte in &buffer[..count] {
            let was_command = std::mem::take(&mut self.is_command);
            match byte {
                _ if self.terminal.is_none() => for_guest.push(byte),
                b'x' | b'X' if was_command => leaves = true,
                COMMAND if !was_command => self.is_command = true,
                COMMAND => for_guest.push(COMMAND),
                _ if was_command => for_guest.extend([COMMAND, byte]),
                _ => for_guest.push(byte),
            }
        }
        self.input.pass_on(&for_guest);
        leaves
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
        (writer, Relay::new(Some(reader), sink))
    }

    #[test]
    fn input_that_another_program_emptied_does_not_wait() {
        let (reader, writer) = pipe(true, true).unwrap();
        let own = input(reader.as_fd()).unwrap();
        let mut place = [0; 10];
        assert_eq!(read_now(own.as_fd(), &mut place), Err(Errno::AGAIN));
        rustix::io::write(&writer, b"abc").unwrap();
        assert_eq!(read_now(own.as_fd(), &mut place), Ok(3));
        // The other one waits as before.
        let flags = rustix::fs::fcntl_getfl(&reader).unwrap();
        assert!(!flags.contains(OFlags::NONBLOCK));
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let own = input(socket.as_fd()).unwrap();
        assert_eq!(read_now(own.as_fd(), &mut place), Err(Errno::AGAIN));
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
    fn tail_keeps_the_last_bytes_without_control_characters() {
        let (source, _writer) = pipe(false, false).unwrap();
        let mut relay = Relay::new(Some(source), Sink::Tail(Vec::new()));
        for _ in 0..1000 {
            relay.pass_on(&[b'a'; 999]);
        }
        relay.pass_on(b"\x1b[31mlast\r\nline\xff");
        let text = relay.tail();
        assert!(text.ends_with("?[31mlast\nline\u{fffd}"), "{text}");
        assert!(text.len() <= TAIL + 2 && !relay.is_holding());
    }

    #[test]
    fn sink_without_a_reader_is_given_up() {
        let (reader, to) = pipe(false, false).unwrap();
        let (source, _writer) = pipe(false, false).unwrap();
        drop(reader);
        let mut relay = Relay::new(Some(source), Sink::Output { to, patient: false });
        relay.held.extend(b"lost");
        relay.flush();
        assert!(!relay.is_holding());
        assert!(matches!(relay.sink, Sink::Nowhere));
    }
}
