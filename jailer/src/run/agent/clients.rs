//! Other programs of this user that run further processes in the guest (`mayfly-jailer exec` and `cp`), or ask
//! something of the supervisor (`start`, `signal` and the like).
//!
//! Each has a connection to the supervisor's socket. It sends a message that starts a process, and then what
//! the supervisor itself would send for one; or one request, which is answered. It is this user's, and yet
//! checked: what a client may do to the agent is its own process, and no mistake of a client's may end the
//! guest. A client that is gone has its process killed.

#[cfg(test)]
mod tests;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use mayfly_agent_protocol::{
    COMMAND, Frame, INPUT_WINDOW, Malformed, Message, OUTPUT_WINDOW, PROCESSES_MAX, Receiver,
    Sender, Status, Stream, fields,
};
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::SocketFlags;

use super::copying::COPY_IN;
use super::link::Link;
use crate::process::stream::StreamLink;

/// SIGKILL.
const KILL: u8 = 9;
/// The kind of a message that starts a process.
const START: u8 = Message::Start {
    process: 0,
    body: &[],
}
.kind();
/// Most frames of one client that are passed on in one turn.
const TURN: usize = 16;
/// The kind of a request.
const REQUEST: u8 = Message::Request(&[]).kind();
/// Most clients at once.
const CLIENTS_MAX: usize = 4 * PROCESSES_MAX;
/// Most of them for processes: those that run, those that wait for their turn, and those whose client has not taken
/// all of its output. The other places are for requests, which are answered whatever runs.
const FOR_PROCESSES_MAX: usize = 3 * PROCESSES_MAX;
/// What a client beyond that is told.
const FULL: &[u8] =
    b"-as many processes as it takes run in it, and as many as may wait for their turn do; try it \
    again when some have ended";
/// How long no client is taken after one could not be: this process has no descriptor for it.
const PAUSE: Duration = Duration::from_secs(1);

/// What a client asks of the supervisor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// To start the command that was held.
    Start,
    /// To send this signal to the command.
    Signal(u8),
    /// To tell how the microVM is, and what it is.
    State,
}

impl Request {
    /// The text of [`Message::Request`].
    pub fn of(text: &[u8]) -> Option<Request> {
        let text = std::str::from_utf8(text).ok()?;
        match text {
            "start" => Some(Request::Start),
            "state" => Some(Request::State),
            _ => {
                let number = text.strip_prefix("signal ")?.parse().ok()?;
                // As many as Linux has.
                (0..=64)
                    .contains(&number)
                    .then_some(Request::Signal(number))
            }
        }
    }
}

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
    /// It has asked something of the supervisor, which is to be answered.
    Asking(Request),
    /// The supervisor knows of that.
    Waiting,
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
    /// Before that, none is taken, unless one goes.
    paused_until: Option<Instant>,
    all: Vec<Client>,
    next: u32,
}

impl Clients {
    /// Those of a socket.
    pub fn new(listener: Option<OwnedFd>) -> Clients {
        Clients {
            listener,
            paused_until: None,
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
        let is_full = self.all.len() >= CLIENTS_MAX && self.silent().is_none();
        let is_paused = self.paused_until.is_some();
        let listener = self.listener.as_ref();
        if let Some(listener) = listener.filter(|_| !is_full && !is_paused) {
            add(ClientPart::New, listener.as_fd(), PollFlags::IN);
        }
        for client in &self.all {
            if matches!(client.state, State::Gone | State::Killed) {
                continue;
            }
            let mut flags = PollFlags::empty();
            // A request reaches the supervisor also while the guest takes nothing.
            let is_taken = can_send || client.state == State::New;
            flags.set(PollFlags::IN, is_taken && client.link.is_wanting());
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
        let socket = match rustix::net::accept_with(listener, flags) {
            Ok(socket) => socket,
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => return,
            // The listener stays readable.
            Err(_) => {
                self.paused_until = Some(Instant::now() + PAUSE);
                return;
            }
        };
        self.add(socket);
    }

    /// Takes a client on a socket that does not wait.
    pub(super) fn add(&mut self, socket: OwnedFd) {
        if self.all.len() >= CLIENTS_MAX
            && let Some(silent) = self.silent()
        {
            self.all.remove(silent);
        }
        // Numbers that are in use are those of clients that are here, far fewer than there are numbers.
        loop {
            self.next = self.next.wrapping_add(1).max(COMMAND + 1);
            if self.next != COPY_IN && self.all.iter().all(|it| it.process != self.next) {
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

    /// The client that has said nothing for the longest time: its place is the next one's where there is no other.
    fn silent(&self) -> Option<usize> {
        let is_silent = |it: &Client| it.state == State::New && !it.link.has_frame();
        self.all.iter().position(is_silent)
    }

    /// Takes a message of the guest about a process.
    pub fn receive(&mut self, process: u32, message: &Message<'_>) -> Result<(), Malformed> {
        let unexpected = Malformed::Kind(message.kind());
        let client = self.all.iter_mut().find(|it| it.process == process);
        let client = client.ok_or(unexpected)?;
        let has_process = matches!(client.state, State::Running | State::Gone | State::Killed);
        if !has_process {
            return Err(unexpected);
        }
        client.receive(message)
    }

    /// When clients are taken again, where that is to be waited for.
    pub fn paused_until(&self) -> Option<Instant> {
        self.paused_until
    }

    /// Whether there is a frame that could be passed on, if there is room.
    pub fn has_frame(&self, can_start: bool) -> bool {
        let can_start = can_start && self.has_place();
        self.all.iter().any(|it| it.has_frame(can_start))
    }

    /// Whether the guest's agent takes one more process. The command is one of them.
    fn has_place(&self) -> bool {
        let has_process =
            |it: &&Client| matches!(it.state, State::Running | State::Gone | State::Killed);
        self.all.iter().filter(has_process).count() + 1 < PROCESSES_MAX
    }

    /// What a client asks of the supervisor, in turn, and which one it is.
    pub fn next_request(&mut self) -> Option<(u32, Request)> {
        self.all.iter_mut().find_map(|client| match client.state {
            State::Asking(request) => {
                client.state = State::Waiting;
                Some((client.process, request))
            }
            _ => None,
        })
    }

    /// Answers a request. The client may be gone by then.
    pub fn answer(&mut self, client: u32, answer: Result<String, String>) {
        let found = self.all.iter_mut().find(|it| it.process == client);
        if let Some(client) = found.filter(|it| it.state == State::Waiting) {
            let text = match answer {
                Ok(text) => format!("+{text}"),
                Err(why) => format!("-{why}"),
            };
            client.send(&Message::Answer(text.as_bytes()));
            client.state = State::Ended;
        }
    }

    /// Passes on what clients have sent, a bounded part of it, as far as there is room. Processes are started only
    /// if they can be.
    pub fn serve(&mut self, link: &mut Link, can_start: bool) {
        let count = self.all.len();
        let mut for_processes = 0;
        for index in 0..count {
            let can_start = can_start && self.has_place();
            let client = &mut self.all[index];
            for_processes += usize::from(client.is_for_a_process());
            if client.state == State::New && for_processes > FOR_PROCESSES_MAX {
                client.refuse();
            }
            let mut left = TURN;
            while left > 0 && client.has_frame(can_start) {
                if !link.takes_data() && !client.has_request() {
                    break;
                }
                client.serve(&mut link.out);
                link.flush();
                left -= 1;
            }
            let is_gone = client.link.is_closed || client.link.cannot_send();
            match client.state {
                State::Running if is_gone => client.state = State::Gone,
                State::New | State::Asking(_) | State::Waiting if is_gone => {
                    client.state = State::Ended;
                }
                _ => {}
            }
        }
        self.all.retain(|client| {
            let is_done = client.state == State::Ended;
            !is_done || (client.link.is_holding() && !client.link.is_closed)
        });
        let has_waited = self.paused_until.is_some_and(|it| Instant::now() >= it);
        if has_waited || self.all.len() < count {
            self.paused_until = None;
        }
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

    /// Tells all that their processes ended with the guest. What is held for them is still to be sent.
    pub fn dismiss(&mut self) {
        let status = Status::Killed(KILL);
        let exited = Message::Exited {
            process: COMMAND,
            status,
        };
        for client in &mut self.all {
            match client.state {
                State::Running => client.send(&exited),
                // As for those that ask when nothing takes connections any more.
                State::Asking(Request::State) => {}
                State::Asking(_) | State::Waiting => {
                    client.send(&Message::Answer(b"-the guest has ended"));
                }
                _ => continue,
            }
            client.state = State::Ended;
        }
        self.listener = None;
        self.flush_all();
    }

    /// Sends what is held, as far as it goes now; those for which nothing is held are let go of.
    pub fn flush_all(&mut self) {
        self.all.iter_mut().for_each(|it| it.link.flush());
        let is_holding = |it: &Client| it.link.is_holding() && !it.link.is_closed;
        self.all.retain(is_holding);
    }

    /// What to wait for before more goes of what is held; nothing once all is sent.
    pub fn held(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.all.iter().map(|it| it.link.as_fd())
    }
}

impl Client {
    /// Whether its place is one of those for processes.
    fn is_for_a_process(&self) -> bool {
        match self.state {
            State::New => self.link.next_kind() == Some(START),
            State::Asking(_) | State::Waiting => false,
            State::Running | State::Gone | State::Killed | State::Ended => true,
        }
    }

    /// Whether it has a request, which needs nothing of the guest.
    fn has_request(&self) -> bool {
        self.state == State::New && self.link.next_kind() == Some(REQUEST)
    }

    /// Refuses to start its process.
    fn refuse(&mut self) {
        if self.is_for_a_process() {
            self.send(&Message::Answer(FULL));
            self.state = State::Ended;
        }
    }

    /// Whether it has sent a frame that can be served.
    fn has_frame(&self, can_start: bool) -> bool {
        let has_to_wait = match self.state {
            State::New => !can_start && self.link.next_kind() == Some(START),
            State::Asking(_) | State::Waiting => true,
            _ => false,
        };
        !self.link.is_closed && !has_to_wait && self.link.has_frame()
    }

    /// A message of the guest, as the client is to have it: its process has the number 1 there.
    fn receive(&mut self, message: &Message<'_>) -> Result<(), Malformed> {
        let process = COMMAND;
        let unexpected = Err(Malformed::Kind(message.kind()));
        let passed = match *message {
            Message::Data { stream, bytes, .. } => {
                let index = stream.output_index()?;
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
                Message::Request(text) if *state == State::New => {
                    let request = Request::of(text).ok_or(Malformed::Kind(message.kind()))?;
                    *state = State::Asking(request);
                    return Ok(());
                }
                // What it sent before it heard of the end is for no process.
                _ if *state == State::Ended => return Ok(()),
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
                    let Ok(index) = stream.output_index() else {
                        return unexpected;
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
