//! The caller's side of a process in the guest: this program's standard input, output and error, a
//! terminal in raw mode, signals and the terminal's size, and the messages that stand for them.
//!
//! Nothing here waits. What the guest writes is held up to the credit that was given for it; what a reader
//! does not take keeps the guest's process waiting, and costs no memory.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use mayfly_agent_protocol::{
    Frame, INPUT_WINDOW, Malformed, Message, OUTPUT_WINDOW, Receiver, Sender, Status, Stream,
};
use rustix::event::PollFlags;
use rustix::io::Errno;

use super::command::{Command, terminal_size};
use crate::console::terminal::Terminal;
use crate::console::{self, Part, Relay, Sink};

/// Signals that wait to be sent: more than there are.
const SIGNALS_MAX: usize = 64;
/// Bytes that are read at once.
const PIECE: usize = mayfly_agent_protocol::DATA_MAX;

/// What became ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrontPart {
    /// The input has something.
    Input,
    /// An output takes more.
    Output(usize),
}

#[derive(Debug)]
struct Output {
    relay: Relay,
    credit: Receiver,
    /// The reader is gone, and the guest has been told.
    is_refused: bool,
}

/// A process that was asked to end so many times is ended with what it runs in or for.
const ASKED_MAX: u32 = 3;

/// One process's streams.
#[derive(Debug)]
pub struct Front {
    process: u32,
    input: Option<OwnedFd>,
    input_credit: Sender,
    /// The end of the input is to be said.
    input_ended: bool,
    outputs: [Output; 2],
    terminal: Option<Terminal>,
    size_changed: bool,
    signals: Vec<u8>,
    /// Signals that asked the process to end, of those that a user sends again and again.
    asked: u32,
    /// How the process ended.
    pub status: Option<Status>,
}

impl Front {
    /// Of `process`, which runs `command`, with the standard streams of this program.
    pub fn new(process: u32, command: &Command) -> Front {
        let input = command.has_input.then(std::io::stdin);
        let input = input.and_then(|it| console::input(it.as_fd()));
        let is_terminal = command.is_terminal;
        let terminal = input.as_ref().filter(|_| is_terminal);
        let terminal = terminal.and_then(|fd| rustix::io::fcntl_dupfd_cloexec(fd, 3).ok());
        let input_ended = command.has_input && input.is_none();
        let output = Sink::output(std::io::stdout().as_fd());
        let error = Sink::output(std::io::stderr().as_fd());
        let mut front = Front::with(process, input, [output, error]);
        front.terminal = terminal.and_then(Terminal::new);
        front.input_ended = input_ended;
        front
    }

    /// With these streams.
    pub fn with(process: u32, input: Option<OwnedFd>, sinks: [Sink; 2]) -> Front {
        Front {
            process,
            input,
            input_credit: Sender::new(INPUT_WINDOW),
            input_ended: false,
            outputs: sinks.map(|sink| Output {
                relay: Relay::new(None, sink),
                credit: Receiver::new(OUTPUT_WINDOW),
                is_refused: false,
            }),
            terminal: None,
            size_changed: false,
            signals: Vec::new(),
            asked: 0,
            status: None,
        }
    }

    /// What to wait for.
    pub fn interests<'a>(
        &'a self,
        can_send: bool,
        mut add: impl FnMut(FrontPart, BorrowedFd<'a>, PollFlags),
    ) {
        let is_in_background = self.terminal.as_ref().is_some_and(|it| !it.is_raw());
        let wants_input = can_send && self.input_credit.left() > 0 && !is_in_background;
        if let Some(input) = self.input.as_ref().filter(|_| wants_input) {
            add(FrontPart::Input, input.as_fd(), PollFlags::IN);
        }
        for (index, output) in self.outputs.iter().enumerate() {
            output.relay.interests(|part, fd, flags| {
                if part == Part::Sink {
                    add(FrontPart::Output(index), fd, flags);
                }
            });
        }
    }

    /// Serves what became ready.
    pub fn handle(&mut self, part: FrontPart, frame: &mut Frame) {
        match part {
            FrontPart::Input => self.take_input(frame),
            FrontPart::Output(index) => self.flush(index),
        }
    }

    fn take_input(&mut self, frame: &mut Frame) {
        self.look_at_terminal();
        let Some(input) = &self.input else { return };
        let most = self.input_credit.left().min(PIECE);
        let read = frame.push_data(self.process, Stream::Input, most, |place| {
            console::read_now(input.as_fd(), place)
        });
        match read {
            Ok(0) if most > 0 => (self.input, self.input_ended) = (None, true),
            Ok(count) => self.input_credit.sent(count),
            Err(Errno::AGAIN | Errno::INTR) => {}
            // Of a job that was sent to the background a moment ago.
            Err(Errno::IO) if self.terminal.is_some() => {}
            Err(_) => (self.input, self.input_ended) = (None, true),
        }
    }

    fn flush(&mut self, index: usize) {
        if let Some(output) = self.outputs.get_mut(index) {
            let before = output.relay.held();
            output.relay.flush();
            output
                .credit
                .passed_on(before.saturating_sub(output.relay.held()));
        }
    }

    /// Takes a message of the guest about this process.
    pub fn receive(&mut self, message: &Message<'_>) -> Result<(), Malformed> {
        let unexpected = Err(Malformed::Kind(message.kind()));
        match *message {
            _ if self.status.is_some() => return unexpected,
            Message::Data { stream, bytes, .. } => {
                let index = stream.output_index()?;
                let output = &mut self.outputs[index];
                output.credit.received(bytes.len())?;
                let before = output.relay.held();
                output.relay.pass_on(bytes);
                let gone = before
                    .saturating_add(bytes.len())
                    .saturating_sub(output.relay.held());
                output.credit.passed_on(gone);
            }
            Message::Credit {
                stream: Stream::Input,
                bytes,
                ..
            } => self.input_credit.grant(bytes)?,
            Message::End {
                stream: Stream::Input,
                ..
            } => self.input = None,
            Message::Exited { status, .. } => {
                self.status = Some(status);
                self.input = None;
            }
            _ => return unexpected,
        }
        Ok(())
    }

    /// Sends a signal to the process.
    pub fn signal(&mut self, number: i32) {
        if let Ok(number) = u8::try_from(number)
            && self.signals.len() < SIGNALS_MAX
        {
            self.signals.push(number);
        }
    }

    /// Counts a signal that asks for the end; whether the process was asked so often that it is not to be asked again.
    pub fn is_asked_too_often(&mut self, signal: i32) -> bool {
        if matches!(signal, libc::SIGINT | libc::SIGTERM | libc::SIGQUIT) {
            self.asked += 1;
        }
        self.asked >= ASKED_MAX
    }

    /// The terminal has another size.
    pub fn resize(&mut self) {
        self.size_changed = self.terminal.is_some();
    }

    /// This process was stopped: others may have changed the terminal.
    pub fn resume(&mut self) {
        if let Some(terminal) = &mut self.terminal {
            terminal.resume();
        }
        self.resize();
    }

    /// Looks whether this process is in the foreground of its terminal now.
    pub fn look_at_terminal(&mut self) {
        if let Some(terminal) = &mut self.terminal {
            terminal.look();
        }
    }

    /// Whether there is a terminal, which this process has to look at.
    pub fn is_in_background(&self) -> bool {
        self.terminal.as_ref().is_some_and(|it| !it.is_raw())
    }

    /// Adds what is to be said.
    pub fn say(&mut self, frame: &mut Frame) {
        let process = self.process;
        if self.status.is_some() {
            return;
        }
        for (output, stream) in self.outputs.iter_mut().zip(Stream::OUTPUTS) {
            if let Some(bytes) = output.credit.due()
                && frame.push(&Message::Credit {
                    process,
                    stream,
                    bytes,
                })
            {
                output.credit.given(bytes);
            }
            if output.relay.is_lost() && !output.is_refused {
                output.is_refused = frame.push(&Message::End { process, stream });
            }
        }
        if self.input_ended {
            let stream = Stream::Input;
            self.input_ended = !frame.push(&Message::End { process, stream });
        }
        self.signals
            .retain(|&number| !frame.push(&Message::Signal { process, number }));
        if self.size_changed {
            let (rows, columns) = terminal_size();
            self.size_changed = !frame.push(&Message::Size {
                process,
                rows,
                columns,
            });
        }
    }

    /// Whether something that the guest wrote is still to be passed on.
    pub fn is_holding(&self) -> bool {
        self.outputs.iter().any(|output| output.relay.is_holding())
    }

    /// Passes on what is held, as far as it goes now.
    pub fn flush_all(&mut self) {
        (0..self.outputs.len()).for_each(|index| self.flush(index));
    }

    /// The last of what the process wrote to its standard error, where that is kept.
    pub fn error_tail(&self) -> String {
        self.outputs[1].relay.tail()
    }

    /// Gives the terminal back.
    pub fn close(&mut self) {
        self.terminal = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::console::pipe;

    fn front() -> (OwnedFd, OwnedFd, OwnedFd, Front) {
        let (input, typed) = pipe(false, false).unwrap();
        let (read, out) = pipe(false, false).unwrap();
        let (read_error, error) = pipe(false, false).unwrap();
        let sinks = [out, error].map(|to| Sink::Output { to, patient: false });
        (typed, read, read_error, Front::with(1, Some(input), sinks))
    }

    fn data(bytes: &[u8]) -> Message<'_> {
        Message::Data {
            process: 1,
            stream: Stream::Output,
            bytes,
        }
    }

    #[test]
    fn output_beyond_the_credit_is_refused_and_what_is_held_is_bounded() {
        let (_typed, read, _error, mut front) = front();
        let piece = vec![7; 32 * 1024];
        for _ in 0..OUTPUT_WINDOW as usize / piece.len() {
            front.receive(&data(&piece)).unwrap();
        }
        assert!(front.is_holding());
        assert_eq!(front.receive(&data(b"x")), Err(Malformed::Credit));
        let mut frame = Frame::new();
        front.say(&mut frame);
        assert!(frame.is_empty(), "a reader that takes nothing gets no more");
        let mut total = 0;
        let mut buffer = vec![0; 1 << 20];
        while front.is_holding() {
            total += rustix::io::read(&read, &mut buffer).unwrap();
            front.flush_all();
        }
        total += rustix::io::read(&read, &mut buffer).unwrap();
        assert_eq!(total, OUTPUT_WINDOW as usize);
        front.say(&mut frame);
        assert!(!frame.is_empty(), "credit for what was taken");
        front.receive(&data(b"x")).unwrap();
    }

    fn messages_in(frame: &[u8]) -> Vec<Message<'_>> {
        let messages = mayfly_agent_protocol::messages(frame, 0).unwrap();
        messages.map(Result::unwrap).collect()
    }

    #[test]
    fn input_is_read_for_credit_and_its_end_is_said_once() {
        let (typed, _read, _error, mut front) = front();
        rustix::io::write(&typed, b"abc").unwrap();
        drop(typed);
        let mut frame = Frame::new();
        front.handle(FrontPart::Input, &mut frame);
        front.handle(FrontPart::Input, &mut frame);
        front.say(&mut frame);
        front.say(&mut frame);
        let bytes = frame.finish(0).to_vec();
        let said = messages_in(&bytes);
        let stream = Stream::Input;
        assert_eq!(
            said,
            [
                Message::Data {
                    process: 1,
                    stream,
                    bytes: b"abc"
                },
                Message::End { process: 1, stream },
            ]
        );
    }

    #[test]
    fn messages_out_of_turn_are_refused() {
        let (_typed, _read, _error, mut front) = front();
        let stream = Stream::Input;
        for message in [
            Message::Data {
                process: 1,
                stream,
                bytes: b"x",
            },
            Message::Signal {
                process: 1,
                number: 9,
            },
            Message::Credit {
                process: 1,
                stream: Stream::Output,
                bytes: 1,
            },
            Message::Credit {
                process: 1,
                stream,
                bytes: 1,
            },
            Message::End {
                process: 1,
                stream: Stream::Output,
            },
        ] {
            assert!(front.receive(&message).is_err(), "{message:?}");
        }
        let exited = Message::Exited {
            process: 1,
            status: Status::Exited(0),
        };
        front.receive(&exited).unwrap();
        assert!(front.receive(&exited).is_err());
        assert!(front.receive(&data(b"x")).is_err());
    }

    #[test]
    fn output_without_a_reader_is_ended_once() {
        let (_typed, read, _error, mut front) = front();
        drop(read);
        front.receive(&data(b"x")).unwrap();
        let mut frame = Frame::new();
        front.say(&mut frame);
        front.say(&mut frame);
        let bytes = frame.finish(0).to_vec();
        let said = messages_in(&bytes);
        assert_eq!(
            said,
            [Message::End {
                process: 1,
                stream: Stream::Output
            }]
        );
        front.receive(&data(b"y")).unwrap();
    }
}
