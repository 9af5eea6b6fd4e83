//! Other programs of this user that run further processes in the guest: `mayfly-jailer exec` and `cp`.
//!
//! Each has a connection to the supervisor's socket, sends a message that starts a process, and then what
//! the supervisor itself would send for one. It is this user's, and yet checked: what a client may do to
//! the agent is its own process, and no mistake of a client's may end the guest. A client that is gone has
//! its process killed.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use mayfly_agent_protocol::{
    COMMAND, Frame, INPUT_WINDOW, Malformed, Message, OUTPUT_WINDOW, PROCESSES_MAX, Receiver,
    Sender, Status, Stream, fields,
};
use rustix::event::PollFlags;
use rustix::net::SocketFlags;

use super::link::{Link, StreamLink};

/// SIGKILL.
const KILL: u8 = 9;

/// What became ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientPart {
    /// One wants to connect.
    New,
    /// One has something, or takes more.
    Of(u32),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// It has not said what to run.
    New,
    /// Its process runs.
    Running,
    /// It is gone, and its process is to be killed.
    Gone,
    /// It is gone, and its process was killed, and will be heard of.
    Killed,
    /// Its process has ended.
    Ended,
}

#[derive(Debug)]
struct Client {
    link: StreamLink,
    process: u32,
    state: State,
    input: Sender,
    outputs: [Receiver; 2],
    /// What is to be sent to it.
    out: Box<Frame>,
}

/// All of them.
#[derive(Debug)]
pub struct Clients {
    listener: Option<OwnedFd>,
    all: Vec<Client>,
    next: u32,
}

impl Clients {
    /// Those of a socket.
    pub fn new(listener: Option<OwnedFd>) -> Clients {
        Clients {
            listener,
            all: Vec::new(),
            next: COMMAND,
        }
    }

    /// What to wait for. Nothing of those that could not be served now.
    pub fn interests<'a>(
        &'a self,
        can_send: bool,
        mut add: impl FnMut(ClientPart, BorrowedFd<'a>, PollFlags),
    ) {
        // The command is one of the processes.
        let is_full = self.all.len() + 1 >= PROCESSES_MAX;
        if let Some(listener) = self.listener.as_ref().filter(|_| !is_full) {
            add(ClientPart::New, listener.as_fd(), PollFlags::IN);
        }
        for client in &self.all {
            if matches!(client.state, State::Gone | State::Killed) {
                continue;
            }
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::IN, can_send && client.link.is_wanting());
            flags.set(PollFlags::OUT, client.link.is_holding());
            if !flags.is_empty() {
                add(ClientPart::Of(client.process), client.link.as_fd(), flags);
            }
        }
    }

    /// Serves what became ready.
    pub fn handle(&mut self, part: ClientPart) {
        match part {
            ClientPart::New => self.accept(),
            ClientPart::Of(process) => {
                let client = self.all.iter_mut().find(|it| it.process == process);
                if let Some(client) = client {
                    client.link.flush();
                    client.link.fill();
                }
            }
        }
    }

    fn accept(&mut self) {
        let Some(listener) = &self.listener else {
            return;
        };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let Ok(socket) = rustix::net::accept_with(listener, flags) else {
            return;
        };
        // Numbers that are in use are those of clients that are here, far fewer than there are numbers.
        loop {
            self.next = self.next.wrapping_add(1).max(COMMAND + 1);
            if self.all.iter().all(|it| it.process != self.next) {
                break;
            }
        }
        self.all.push(Client {
            link: StreamLink::new(socket),
            process: self.next,
            state: State::New,
            input: Sender::new(INPUT_WINDOW),
            outputs: [Receiver::new(OUTPUT_WINDOW), Receiver::new(OUTPUT_WINDOW)],
            out: Box::new(Frame::new()),
        });
    }

    /// Takes a message of the guest about a process.
    pub fn receive(&mut self, process: u32, message: &Message<'_>) -> Result<(), Malformed> {
        let unexpected = Malformed::Kind(message.kind());
        let client = self.all.iter_mut().find(|it| it.process == process);
        let client = client.ok_or(unexpected)?;
        if matches!(client.state, State::New | State::Ended) {
            return Err(unexpected);
        }
        client.receive(message)
    }

    /// Passes on what clients have sent, one frame of each, as far as there is room.
    pub fn serve(&mut self, link: &mut Link) {
        for client in &mut self.all {
            if link.takes_data() && client.link.has_frame() {
                client.serve(&mut link.out);
                link.flush();
            }
            if client.link.is_closed && matches!(client.state, State::New | State::Running) {
                client.state = match client.state {
                    State::New => State::Ended,
                    _ => State::Gone,
                };
            }
        }
        self.all.retain(|client| {
            let is_done = client.state == State::Ended;
            !is_done || (client.link.is_holding() && !client.link.is_closed)
        });
    }

    /// Adds what is to be said for those that are gone.
    pub fn say(&mut self, frame: &mut Frame) {
        for client in self.all.iter_mut().filter(|it| it.state == State::Gone) {
            let process = client.process;
            let kill = Message::Signal {
                process,
                number: KILL,
            };
            let ends = [Stream::Input, Stream::Output, Stream::Error];
            let ends = ends.map(|stream| Message::End { process, stream });
            if frame.push(&kill) && ends.iter().all(|end| frame.push(end)) {
                client.state = State::Killed;
            }
        }
    }

    /// Tells all that their processes ended with the guest.
    pub fn dismiss(&mut self) {
        let status = Status::Killed(KILL);
        for client in self.all.iter_mut().filter(|it| it.state == State::Running) {
            client.send(&Message::Exited {
                process: COMMAND,
                status,
            });
        }
        self.listener = None;
        self.all.clear();
    }
}

impl Client {
    /// A message of the guest, as the client is to have it: its process has the number 1 there.
    fn receive(&mut self, message: &Message<'_>) -> Result<(), Malformed> {
        let process = COMMAND;
        let unexpected = Err(Malformed::Kind(message.kind()));
        let passed = match *message {
            Message::Data { stream, bytes, .. } => {
                let index = match stream {
                    Stream::Output => 0,
                    Stream::Error => 1,
                    Stream::Input => return Err(Malformed::Stream(0)),
                };
                self.outputs[index].received(bytes.len())?;
                Message::Data {
                    process,
                    stream,
                    bytes,
                }
            }
            Message::Credit {
                stream: Stream::Input,
                bytes,
                ..
            } => {
                self.input.grant(bytes)?;
                Message::Credit {
                    process,
                    stream: Stream::Input,
                    bytes,
                }
            }
            Message::End {
                stream: Stream::Input,
                ..
            } => Message::End {
                process,
                stream: Stream::Input,
            },
            Message::Exited { status, .. } => Message::Exited { process, status },
            _ => return unexpected,
        };
        if self.state == State::Running {
            self.send(&passed);
        }
        if matches!(message, Message::Exited { .. }) {
            self.state = State::Ended;
        }
        Ok(())
    }

    fn send(&mut self, message: &Message<'_>) {
        // It is empty, so that anything fits.
        let _ = self.out.push(message);
        self.link.send(&mut self.out);
    }

    /// Passes on one frame of the client's. What is not right ends the connection, and not the guest.
    fn serve(&mut self, frame: &mut Frame) {
        let Client {
            link,
            process,
            state,
            input,
            outputs,
            ..
        } = self;
        let process = *process;
        let taken = link.take(|message| {
            let unexpected = Err(Malformed::Kind(message.kind()));
            let passed = match *message {
                Message::Start { body, .. } if *state == State::New => {
                    fields::check_process(body)?;
                    *state = State::Running;
                    Message::Start { process, body }
                }
                _ if *state != State::Running => return unexpected,
                Message::Data {
                    stream: Stream::Input,
                    bytes,
                    ..
                } => {
                    if bytes.len() > input.left() {
                        return Err(Malformed::Credit);
                    }
                    input.sent(bytes.len());
                    Message::Data {
                        process,
                        stream: Stream::Input,
                        bytes,
                    }
                }
                Message::Credit { stream, bytes, .. } => {
                    let index = match stream {
                        Stream::Output => 0,
                        Stream::Error => 1,
                        Stream::Input => return unexpected,
                    };
                    outputs[index].give(bytes)?;
                    Message::Credit {
                        process,
                        stream,
                        bytes,
                    }
                }
                Message::End { stream, .. } => Message::End { process, stream },
                Message::Signal { number, .. } => Message::Signal { process, number },
                Message::Size { rows, columns, .. } => Message::Size {
                    process,
                    rows,
                    columns,
                },
                _ => return unexpected,
            };
            match frame.push(&passed) {
                true => Ok(()),
                false => Err(Malformed::Length(0)),
            }
        });
        link.is_closed |= taken.is_err();
    }
}
