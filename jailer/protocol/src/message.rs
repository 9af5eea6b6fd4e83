//! Messages: the kinds, and their bytes.

use crate::{BODY_MAX, DATA_MAX, Malformed, u16_at, u32_at};

/// Length of a message's header.
pub const HEADER: usize = 12;

/// Kinds of messages.
pub(crate) const DATA: u8 = 1;
const END: u8 = 2;
const CREDIT: u8 = 3;
const SETUP: u8 = 4;
const START: u8 = 6;
const SIGNAL: u8 = 7;
const SIZE: u8 = 8;
const STARTED: u8 = 9;
const EXITED: u8 = 10;
const FAILED: u8 = 11;
const READY: u8 = 12;
const REQUEST: u8 = 13;
const ANSWER: u8 = 14;
const HELLO: u8 = 15;

/// A stream of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Stream {
    /// To the process.
    Input = 0,
    /// Its standard output, or its terminal.
    Output = 1,
    /// Its standard error.
    Error = 2,
}

impl Stream {
    /// Those from the process.
    pub const OUTPUTS: [Stream; 2] = [Stream::Output, Stream::Error];

    /// Its place among [`Stream::OUTPUTS`].
    ///
    /// # Errors
    /// [`Malformed::Stream`] of one to the process.
    pub fn output_index(self) -> Result<usize, Malformed> {
        match self {
            Stream::Input => Err(Malformed::Stream(self as u8)),
            Stream::Output => Ok(0),
            Stream::Error => Ok(1),
        }
    }

    fn of(number: u8) -> Result<Stream, Malformed> {
        match number {
            0 => Ok(Stream::Input),
            1 => Ok(Stream::Output),
            2 => Ok(Stream::Error),
            _ => Err(Malformed::Stream(number)),
        }
    }
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// By itself, with this code.
    Exited(u8),
    /// By this signal.
    Killed(u8),
}

impl Status {
    /// The exit code that a shell gives it.
    pub fn code(self) -> i32 {
        match self {
            Status::Exited(code) => i32::from(code),
            Status::Killed(signal) => 128_i32.saturating_add(i32::from(signal)),
        }
    }
}

/// A message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message<'a> {
    /// Bytes of a stream, for which there is credit.
    Data {
        /// Whose.
        process: u32,
        /// Which one.
        stream: Stream,
        /// At most [`DATA_MAX`].
        bytes: &'a [u8],
    },
    /// Of an input: it has no more bytes. Of an output: no more are wanted.
    End {
        /// Whose.
        process: u32,
        /// Which one.
        stream: Stream,
    },
    /// The other side may send that many bytes more.
    Credit {
        /// Whose.
        process: u32,
        /// Of which stream.
        stream: Stream,
        /// How many.
        bytes: u32,
    },
    /// To the agent, first of all: what the guest is to be. See [`crate::fields`].
    Setup(&'a [u8]),
    /// To the agent: run a process.
    Start {
        /// The number that it is to have.
        process: u32,
        /// See [`crate::fields`].
        body: &'a [u8],
    },
    /// To the agent: send a signal to a process.
    Signal {
        /// To which.
        process: u32,
        /// Its number, as in x86-64 Linux.
        number: u8,
    },
    /// To the agent: the size of a process's terminal.
    Size {
        /// Whose.
        process: u32,
        /// Lines.
        rows: u16,
        /// Characters of a line.
        columns: u16,
    },
    /// From the agent, first of all: it waits for the setup, and has looked at no disk yet.
    Hello,
    /// From the agent: the guest is set up, and processes can be started.
    Ready,
    /// From the agent: the command has been started. Of other processes it does not say so.
    Started {
        /// Which one.
        process: u32,
    },
    /// From the agent: a process has ended, and all of its output was sent.
    Exited {
        /// Which one.
        process: u32,
        /// How.
        status: Status,
    },
    /// From the agent, last of all: the guest cannot be set up; why.
    Failed(&'a [u8]),
    /// To a supervisor, from another program of its user: what it is to do. Never to or from an agent.
    Request(&'a [u8]),
    /// From a supervisor, to such a program: `+` and what it asked for, or `-` and why that cannot be.
    Answer(&'a [u8]),
}

/// The header of a message.
pub(crate) fn header(kind: u8, stream: u8, process: u32, length: u32) -> [u8; HEADER] {
    let [a, b, c, d] = process.to_le_bytes();
    let [e, f, g, h] = length.to_le_bytes();
    [kind, stream, 0, 0, a, b, c, d, e, f, g, h]
}

/// A body of a fixed length.
fn exactly<const N: usize>(body: &[u8]) -> Result<[u8; N], Malformed> {
    <[u8; N]>::try_from(body).map_err(|_| Malformed::Length(body.len() as u32))
}

impl<'a> Message<'a> {
    /// Writes it to the beginning of `into`; its length, or none if there is too little room or its body is
    /// too long.
    pub(crate) fn encode(&self, into: &mut [u8]) -> Option<usize> {
        let small: [u8; 4];
        let (kind, stream, process, body): (u8, u8, u32, &[u8]) = match *self {
            Message::Data {
                process,
                stream,
                bytes,
            } => (DATA, stream as u8, process, bytes),
            Message::End { process, stream } => (END, stream as u8, process, &[]),
            Message::Credit {
                process,
                stream,
                bytes,
            } => {
                small = bytes.to_le_bytes();
                (CREDIT, stream as u8, process, &small)
            }
            Message::Setup(body) => (SETUP, 0, 0, body),
            Message::Start { process, body } => (START, 0, process, body),
            Message::Signal { process, number } => {
                small = [number, 0, 0, 0];
                (SIGNAL, 0, process, small.get(..1)?)
            }
            Message::Size {
                process,
                rows,
                columns,
            } => {
                let [a, b] = rows.to_le_bytes();
                let [c, d] = columns.to_le_bytes();
                small = [a, b, c, d];
                (SIZE, 0, process, &small)
            }
            Message::Started { process } => (STARTED, 0, process, &[]),
            Message::Exited { process, status } => {
                small = match status {
                    Status::Exited(code) => [0, code, 0, 0],
                    Status::Killed(signal) => [1, signal, 0, 0],
                };
                (EXITED, 0, process, small.get(..2)?)
            }
            Message::Failed(text) => (FAILED, 0, 0, text),
            Message::Hello => (HELLO, 0, 0, &[]),
            Message::Ready => (READY, 0, 0, &[]),
            Message::Request(text) => (REQUEST, 0, 0, text),
            Message::Answer(text) => (ANSWER, 0, 0, text),
        };
        if body.len() > BODY_MAX {
            return None;
        }
        let total = HEADER.checked_add(body.len())?;
        let into = into.get_mut(..total)?;
        let (place, rest) = into.split_at_mut_checked(HEADER)?;
        place.copy_from_slice(&header(kind, stream, process, body.len() as u32));
        rest.copy_from_slice(body);
        Some(total)
    }

    /// The first message of `bytes`, and what follows it.
    ///
    /// # Errors
    /// When it is malformed.
    pub fn decode(bytes: &'a [u8]) -> Result<(Message<'a>, &'a [u8]), Malformed> {
        let header = bytes.first_chunk::<HEADER>().ok_or(Malformed::Short)?;
        let [kind, stream, zero, nought, ..] = *header;
        if (zero, nought) != (0, 0) {
            return Err(Malformed::Reserved);
        }
        let process = u32_at(header, 4).ok_or(Malformed::Short)?;
        let length = u32_at(header, 8).ok_or(Malformed::Short)?;
        if length as usize > BODY_MAX.max(DATA_MAX) {
            return Err(Malformed::Length(length));
        }
        let rest = bytes.get(HEADER..).ok_or(Malformed::Short)?;
        let (body, rest) = rest
            .split_at_checked(length as usize)
            .ok_or(Malformed::Short)?;
        let message = Message::of(kind, stream, process, body)?;
        Ok((message, rest))
    }

    fn of(kind: u8, stream: u8, process: u32, body: &'a [u8]) -> Result<Message<'a>, Malformed> {
        if !matches!(kind, DATA | END | CREDIT) && stream != 0 {
            return Err(Malformed::Stream(stream));
        }
        if matches!(kind, SETUP | FAILED | HELLO | READY | REQUEST | ANSWER) && process != 0 {
            return Err(Malformed::Reserved);
        }
        Ok(match kind {
            DATA => Message::Data {
                process,
                stream: Stream::of(stream)?,
                bytes: body,
            },
            END => {
                exactly::<0>(body)?;
                let stream = Stream::of(stream)?;
                Message::End { process, stream }
            }
            CREDIT => Message::Credit {
                process,
                stream: Stream::of(stream)?,
                bytes: u32::from_le_bytes(exactly(body)?),
            },
            SETUP => Message::Setup(body),
            START => Message::Start { process, body },
            SIGNAL => {
                let [number] = exactly(body)?;
                Message::Signal { process, number }
            }
            SIZE => {
                exactly::<4>(body)?;
                Message::Size {
                    process,
                    rows: u16_at(body, 0).ok_or(Malformed::Short)?,
                    columns: u16_at(body, 2).ok_or(Malformed::Short)?,
                }
            }
            STARTED => {
                exactly::<0>(body)?;
                Message::Started { process }
            }
            EXITED => {
                let [how, number] = exactly(body)?;
                let status = match how {
                    0 => Status::Exited(number),
                    1 => Status::Killed(number),
                    _ => return Err(Malformed::Field(how)),
                };
                Message::Exited { process, status }
            }
            FAILED => {
                if body.len() > crate::TEXT_MAX {
                    return Err(Malformed::Length(body.len() as u32));
                }
                Message::Failed(body)
            }
            HELLO => {
                exactly::<0>(body)?;
                Message::Hello
            }
            READY => {
                exactly::<0>(body)?;
                Message::Ready
            }
            REQUEST => Message::Request(body),
            ANSWER => Message::Answer(body),
            _ => return Err(Malformed::Kind(kind)),
        })
    }

    /// The number of its kind, for messages about it.
    pub const fn kind(&self) -> u8 {
        match self {
            Message::Data { .. } => DATA,
            Message::End { .. } => END,
            Message::Credit { .. } => CREDIT,
            Message::Setup(_) => SETUP,
            Message::Start { .. } => START,
            Message::Signal { .. } => SIGNAL,
            Message::Size { .. } => SIZE,
            Message::Started { .. } => STARTED,
            Message::Exited { .. } => EXITED,
            Message::Failed(_) => FAILED,
            Message::Hello => HELLO,
            Message::Ready => READY,
            Message::Request(_) => REQUEST,
            Message::Answer(_) => ANSWER,
        }
    }
}
