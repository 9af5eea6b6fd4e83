//! The supervisor's side of a guest that runs a command: what the agent in it is told, and what it answers.
//!
//! ```text
//!   caller's streams --- front ---+
//!                                 +--- link === monitor's network device === agent
//!   mayfly-jailer exec --- client +            (private: the supervisor is all there is)
//! ```
//!
//! - Runs in the supervisor's loop, and never waits. `link` carries the frames, `front` is the caller's side
//!   of a process, `clients` are further processes for other programs of this user, `command` what is to be
//!   run, `initramfs` what the guest boots from, `place` where the socket for clients is.
//! - All that the guest sends is hostile input. It is decoded by `mayfly-agent-protocol`, which allocates
//!   nothing; what is held is bounded by the credit that was given; a turn of the loop takes a bounded number
//!   of packets. What is malformed, out of turn or without credit ends the guest, with one message.
//! - The guest's bytes reach the caller's standard output and error, the clients that asked for a process,
//!   and, as text without control characters, messages. Nothing else on the host is reachable from it.

mod clients;
pub mod initramfs;
mod link;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use mayfly_agent_protocol::{COMMAND, Frame, Malformed, Message, Status, fields};
use rustix::event::PollFlags;

pub use self::clients::Request;
use self::clients::{ClientPart, Clients};
use self::link::Link;
use crate::console::Sink;
use crate::error::{AnyError, Step as _};
use crate::process::command::{Body, Command, CommandError};
use crate::process::front::{Front, FrontPart};
use crate::process::pack::{CopyIn, Packing};

/// Most turns for what came before the guest ended: more than a socket holds.
const REST_TURNS: usize = 1024;

/// What became ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AgentPart {
    /// The link has something, or takes more.
    Link,
    /// The caller's streams.
    Front(FrontPart),
    /// What is copied in.
    CopyIn(FrontPart),
    /// A client, or one that comes.
    Client(ClientPart),
}

/// The guest's agent ended the session.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    #[error("the guest's agent broke the protocol, and the microVM was ended")]
    Protocol(#[from] Malformed),
    #[error("cannot run the command: the guest's agent {0}")]
    Failed(String),
    #[error("{0}")]
    CopyIn(String),
}

/// What the root disk is to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RootMode {
    /// Only read.
    ReadOnly,
    /// Written to.
    ReadWrite,
    /// Only read, with the guest's memory for what is written.
    Overlay,
}

/// What the guest is to be, and run.
#[derive(Debug)]
pub struct Plan {
    /// The name of its host.
    pub hostname: String,
    /// Type of the root disk's file system.
    pub root_type: &'static str,
    /// What the root disk is to it.
    pub root_mode: RootMode,
    /// What it runs.
    pub command: Command,
    /// Whether no program writes to the root once the command starts.
    pub is_sealed: bool,
    /// Type of the file system of the second disk, which takes what is written to an overlay.
    pub upper_type: Option<&'static str>,
    /// Where memory is mounted.
    pub memory: Vec<Memory>,
    /// The network interface that it is to set up.
    pub interface: Option<Interface>,
    /// What is copied into the guest before the command starts.
    pub copies: Vec<CopyIn>,
    /// Whether it is to run only when it is asked for ([`Agent::begin`]).
    pub is_held: bool,
}

/// Memory that is mounted in the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Where.
    pub path: String,
    /// Flags of mount(2).
    pub flags: u32,
    /// Options of tmpfs(5).
    pub options: String,
}

/// A network interface that the guest sets up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// By which the guest knows it.
    pub mac: [u8; 6],
    /// Longest packet.
    pub mtu: u32,
    /// Its addresses.
    pub addresses: Vec<Address>,
    /// Routes by it; those without a gateway first.
    pub routes: Vec<Route>,
}

/// An address of 4 or 16 bytes, and how many of its bits are the network's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// In the network's order.
    pub bytes: Vec<u8>,
    /// Bits of the network.
    pub prefix: u8,
}

/// A route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// To this network.
    pub to: Address,
    /// By way of this address, if it is not empty.
    pub gateway: Vec<u8>,
}

impl Interface {
    fn add_to(&self, setup: &mut Body) -> Result<(), CommandError> {
        let interface = [&self.mac[..], &self.mtu.to_le_bytes()].concat();
        setup.add(fields::INTERFACE, &interface)?;
        for Address { bytes, prefix } in &self.addresses {
            setup.add(fields::ADDRESS, &[&[*prefix][..], bytes].concat())?;
        }
        for Route { to, gateway } in &self.routes {
            setup.add(
                fields::ROUTE,
                &[&[to.prefix][..], &to.bytes, gateway].concat(),
            )?;
        }
        Ok(())
    }
}

/// The number of the process that unpacks what is copied in; no client's.
const COPY_IN: u32 = u32::MAX;

/// Files on their way into the guest.
#[derive(Debug)]
struct Copying {
    packing: Packing,
    front: Front,
    /// The guest has been asked to unpack.
    is_asked: bool,
}

impl Copying {
    fn start(copies: &[CopyIn]) -> Result<Copying, AnyError> {
        let (archive, packing) = Packing::start(copies)?;
        let sinks = [Sink::Nowhere, Sink::Tail(Vec::new())];
        Ok(Copying {
            packing,
            front: Front::with(COPY_IN, Some(archive), sinks),
            is_asked: false,
        })
    }

    /// Sends what is to be sent.
    fn say(&mut self, frame: &mut Frame) {
        if !self.is_asked {
            let mut body = Body::default();
            // Both are short and without zeros.
            let made = body
                .add(fields::UNPACK, b"/")
                .and_then(|()| body.add(fields::HAS_INPUT, b""))
                .and_then(|()| body.finish());
            self.is_asked = made.is_ok_and(|body| {
                frame.push(&Message::Start {
                    process: COPY_IN,
                    body: &body,
                })
            });
        }
        if self.is_asked {
            self.front.say(frame);
        }
    }

    /// What came of it.
    fn end(self) -> Result<(), AgentError> {
        let code = self.front.status.map_or(1, Status::code);
        let said = self.front.error_tail();
        // That closes the archive.
        drop(self.front);
        match self.packing.end() {
            Some(why) => Err(AgentError::CopyIn(why)),
            None if code == 0 => Ok(()),
            None => {
                let line = said.lines().last().unwrap_or_default();
                let text = format!("cannot copy into the guest (--copy-in): {line}");
                Err(AgentError::CopyIn(text))
            }
        }
    }
}

/// The session with the agent.
#[derive(Debug)]
pub struct Agent {
    link: Link,
    front: Front,
    clients: Clients,
    /// What is copied into the guest, until it is there.
    copying: Option<Copying>,
    /// What starts the command, until that is sent.
    start: Option<Vec<u8>>,
    /// The command is not to be started yet.
    is_held: bool,
    /// The guest is set up.
    is_ready: bool,
    has_started: bool,
    /// The client that had the command started, until it has.
    starter: Option<u32>,
}

impl Agent {
    /// The session, and what the monitor is to have for a network interface. `listener` is the socket for
    /// clients.
    pub fn new(plan: &Plan, listener: Option<OwnedFd>) -> Result<(Agent, OwnedFd), AnyError> {
        let (mut link, theirs) = Link::pair().step("make the link to the guest's agent")?;
        let mode = match plan.root_mode {
            RootMode::ReadOnly => fields::READ_ONLY,
            RootMode::ReadWrite => fields::READ_WRITE,
            RootMode::Overlay => fields::OVERLAY,
        };
        let mut setup = Body::default();
        setup.add(fields::HOSTNAME, plan.hostname.as_bytes())?;
        setup.add(fields::ROOT_TYPE, plan.root_type.as_bytes())?;
        setup.add(fields::ROOT_MODE, &[mode])?;
        if plan.is_sealed {
            setup.add(fields::SEALED, b"")?;
        }
        if let Some(kind) = plan.upper_type {
            setup.add(fields::UPPER_TYPE, kind.as_bytes())?;
        }
        if let Some(interface) = &plan.interface {
            interface.add_to(&mut setup)?;
        }
        for memory in &plan.memory {
            setup.add(fields::MEMORY, memory.path.as_bytes())?;
            let options = [&memory.flags.to_le_bytes()[..], memory.options.as_bytes()].concat();
            setup.add(fields::MEMORY_OPTIONS, &options)?;
        }
        // The guest takes it when its agent is there.
        if !link.out.push(&Message::Setup(&setup.finish()?)) {
            return Err(CommandError::TooLong.into());
        }
        let mut agent = Agent {
            link,
            front: Front::new(COMMAND, &plan.command),
            clients: Clients::new(listener),
            copying: match plan.copies.is_empty() {
                true => None,
                false => Some(Copying::start(&plan.copies)?),
            },
            start: Some(plan.command.body(&plan.hostname)?),
            is_held: plan.is_held,
            is_ready: false,
            has_started: false,
            starter: None,
        };
        // In the same frame, where nothing has to be done before.
        if !agent.is_held && agent.copying.is_none() {
            agent.send_start();
        }
        agent.link.flush();
        Ok((agent, theirs))
    }

    /// Starts the command, if there is room for that now.
    fn send_start(&mut self) {
        if let Some(body) = &self.start
            && self.link.out.push(&Message::Start {
                process: COMMAND,
                body,
            })
        {
            self.start = None;
        }
    }

    /// Whether the guest is set up, so that a held command could be started.
    pub fn is_ready(&self) -> bool {
        self.is_ready && self.copying.is_none()
    }

    /// Whether the command waits to be asked for.
    pub fn is_held(&self) -> bool {
        self.is_held
    }

    /// Starts a command that was held, for a client, which is answered when it runs.
    pub fn begin(&mut self, client: u32) -> Result<(), &'static str> {
        if !self.is_held {
            return Err("the command was started already");
        }
        if !self.is_ready() {
            return Err("the guest is not ready yet");
        }
        self.is_held = false;
        self.starter = Some(client);
        self.settle();
        Ok(())
    }

    /// What a client asks of the supervisor, in turn, and which one it is.
    pub fn next_request(&mut self) -> Option<(u32, Request)> {
        self.clients.next_request()
    }

    /// Answers a request.
    pub fn answer(&mut self, client: u32, answer: Result<String, String>) {
        self.clients.answer(client, answer);
    }

    /// Whether the command runs, or ran.
    pub fn has_started(&self) -> bool {
        self.has_started
    }

    /// How the command ended.
    pub fn status(&self) -> Option<Status> {
        self.front.status
    }

    /// The caller's side of the command.
    pub fn front(&mut self) -> &mut Front {
        &mut self.front
    }

    /// Whether signals are the command's.
    pub fn is_running(&self) -> bool {
        self.has_started && self.front.status.is_none()
    }

    /// Whether there is a terminal, which this process has to look at.
    pub fn is_in_background(&self) -> bool {
        self.front.is_in_background()
    }

    /// In how long there is something to do besides ([`Agent::settle`]).
    pub fn due(&self) -> Option<Duration> {
        if self.link.takes_data() && self.clients.has_frame(self.is_ready()) {
            return Some(Duration::ZERO);
        }
        let due = [self.link.paused_until(), self.clients.paused_until()];
        let due = due.into_iter().flatten().min()?;
        Some(due.saturating_duration_since(Instant::now()))
    }

    /// What to wait for.
    pub fn interests<'a>(&'a self, mut add: impl FnMut(AgentPart, BorrowedFd<'a>, PollFlags)) {
        if self.link.is_open() {
            let mut flags = PollFlags::IN;
            flags.set(PollFlags::OUT, self.link.is_blocked());
            add(AgentPart::Link, self.link.as_fd(), flags);
        }
        let can_send = self.link.takes_data();
        // What is read before the command is started would be lost.
        self.front
            .interests(can_send && self.start.is_none(), |part, fd, flags| {
                add(AgentPart::Front(part), fd, flags)
            });
        if let Some(copying) = self.copying.as_ref().filter(|it| it.is_asked) {
            copying.front.interests(can_send, |part, fd, flags| {
                add(AgentPart::CopyIn(part), fd, flags)
            });
        }
        self.clients.interests(can_send, |part, fd, flags| {
            add(AgentPart::Client(part), fd, flags)
        });
    }

    /// Serves what became ready.
    pub fn handle(&mut self, part: AgentPart) -> Result<(), AgentError> {
        match part {
            AgentPart::Link => {
                self.link.flush();
                // What more has come keeps the socket readable.
                let _: bool = self.receive()?;
            }
            AgentPart::Front(part) => {
                let is_input = part == FrontPart::Input;
                if !is_input || (self.link.takes_data() && self.start.is_none()) {
                    self.front.handle(part, &mut self.link.out);
                }
            }
            AgentPart::CopyIn(part) => {
                if let Some(copying) = &mut self.copying
                    && self.link.takes_data()
                {
                    copying.front.handle(part, &mut self.link.out);
                }
            }
            AgentPart::Client(part) => self.clients.handle(part),
        }
        let is_copied = |it: &mut Copying| it.front.status.is_some();
        if let Some(copying) = self.copying.take_if(is_copied) {
            copying.end()?;
        }
        self.settle();
        Ok(())
    }

    fn receive(&mut self) -> Result<bool, AgentError> {
        let Agent {
            link,
            front,
            clients,
            copying,
            start,
            is_ready,
            has_started,
            starter,
            ..
        } = self;
        let is_asked = start.is_none();
        link.receive(|_: &mut Frame, message| match *message {
            Message::Ready if !*is_ready => {
                *is_ready = true;
                Ok(())
            }
            Message::Started { process: COMMAND } if *is_ready && is_asked && !*has_started => {
                *has_started = true;
                if let Some(client) = starter.take() {
                    clients.answer(client, Ok(String::new()));
                }
                Ok(())
            }
            Message::Failed(text) => {
                let text = String::from_utf8_lossy(text);
                Err(AgentError::Failed(text.replace(char::is_control, "?")))
            }
            Message::Data { process, .. }
            | Message::End { process, .. }
            | Message::Credit { process, .. }
            | Message::Exited { process, .. } => {
                match process {
                    COMMAND if *has_started => front.receive(message)?,
                    COMMAND => return Err(Malformed::Kind(message.kind()).into()),
                    COPY_IN => match copying {
                        Some(copying) if copying.is_asked => copying.front.receive(message)?,
                        _ => return Err(Malformed::Kind(message.kind()).into()),
                    },
                    _ => clients.receive(process, message)?,
                }
                Ok(())
            }
            _ => Err(Malformed::Kind(message.kind()).into()),
        })
    }

    /// Says what is to be said.
    pub fn settle(&mut self) {
        match &mut self.copying {
            Some(copying) if self.is_ready => copying.say(&mut self.link.out),
            None if self.is_ready && !self.is_held && self.start.is_some() => self.send_start(),
            _ => {}
        }
        if self.start.is_none() {
            self.front.say(&mut self.link.out);
        }
        self.clients.say(&mut self.link.out);
        self.link.flush();
        let can_start = self.is_ready();
        self.clients.serve(&mut self.link, can_start);
    }

    /// The guest has ended: no more comes, but what has come is still to be taken.
    pub fn hear_the_rest(&mut self) -> Result<(), AgentError> {
        for _ in 0..REST_TURNS {
            if !self.receive()? {
                break;
            }
        }
        Ok(())
    }

    /// The clients hear that the guest has ended.
    pub fn dismiss_clients(&mut self) {
        self.clients.dismiss();
    }

    /// What to wait for before more goes of what is held for readers, and of clients.
    pub fn holders<'a>(&'a self, with_clients: bool, mut add: impl FnMut(BorrowedFd<'a>)) {
        let can_send = false;
        self.front.interests(can_send, |_, fd, _| add(fd));
        if with_clients {
            self.clients.held().for_each(add);
        }
    }

    /// The further processes' clients.
    pub fn clients(&mut self) -> &mut Clients {
        &mut self.clients
    }
}

#[cfg(test)]
mod tests {
    use mayfly_agent_protocol::{
        AGENT_MAC, DATA_MAX, ETHER_TYPE, SUPERVISOR_MAC, Stream, messages,
    };

    use super::*;
    use crate::console::pipe;

    /// The guest's end of a session, which says what it likes.
    struct Guest {
        agent: Agent,
        link: OwnedFd,
        sequence: u32,
        /// The number of the next frame from the supervisor.
        heard: u32,
        out: OwnedFd,
    }

    impl Guest {
        fn new() -> Guest {
            Guest::with(false)
        }

        fn with(is_held: bool) -> Guest {
            let plan = Plan {
                hostname: "h".into(),
                root_type: "erofs",
                root_mode: RootMode::Overlay,
                command: Command {
                    words: vec!["true".into()],
                    ..Command::default()
                },
                is_held,
                is_sealed: false,
                upper_type: None,
                memory: Vec::new(),
                interface: None,
                copies: Vec::new(),
            };
            let (mut agent, link) = Agent::new(&plan, None).unwrap();
            let (out, to) = pipe(false, false).unwrap();
            let sinks = [Sink::Output { to, patient: false }, Sink::Nowhere];
            agent.front = Front::with(COMMAND, None, sinks);
            Guest {
                agent,
                link,
                sequence: 0,
                heard: 0,
                out,
            }
        }

        /// A packet with these bytes for a frame.
        fn send_bytes(&self, ether_type: u16, frame: &[u8]) {
            let mut packet = vec![0; 12];
            packet.extend(SUPERVISOR_MAC);
            packet.extend(AGENT_MAC);
            packet.extend(ether_type.to_be_bytes());
            packet.extend(frame);
            rustix::io::write(&self.link, &packet).unwrap();
        }

        fn send(&mut self, all: &[Message<'_>]) {
            let mut frame = Frame::new();
            assert!(all.iter().all(|message| frame.push(message)));
            self.send_bytes(ETHER_TYPE, frame.finish(self.sequence));
            self.sequence += 1;
        }

        fn has_room(&self) -> bool {
            let mut fds = [rustix::event::PollFd::new(&self.link, PollFlags::OUT)];
            rustix::event::poll(&mut fds, Some(&Default::default())) == Ok(1)
        }

        /// The kinds of all messages that reached the guest since the last time.
        fn heard(&mut self) -> Vec<u8> {
            let mut kinds = Vec::new();
            let mut packet = vec![0; 70_000];
            loop {
                let mut fds = [rustix::event::PollFd::new(&self.link, PollFlags::IN)];
                if rustix::event::poll(&mut fds, Some(&Default::default())) != Ok(1) {
                    return kinds;
                }
                let count = rustix::io::read(&self.link, &mut packet).unwrap();
                let all = messages(&packet[26..count], self.heard).unwrap();
                kinds.extend(all.map(|it| it.unwrap().kind()));
                self.heard += 1;
            }
        }

        fn serve(&mut self) -> Result<(), AgentError> {
            self.agent.handle(AgentPart::Link)
        }

        fn fault(mut self, all: &[Message<'_>]) -> String {
            self.send(all);
            crate::error::message(&self.serve().unwrap_err())
        }
    }

    const STARTED: Message<'_> = Message::Started { process: COMMAND };

    fn data(process: u32, bytes: &[u8]) -> Message<'_> {
        Message::Data {
            process,
            stream: Stream::Output,
            bytes,
        }
    }

    #[test]
    fn agent_is_told_what_to_be_in_the_first_frame() {
        let guest = Guest::new();
        let mut packet = vec![0; 70_000];
        let count = rustix::io::read(&guest.link, &mut packet).unwrap();
        assert_eq!(packet[12..18], AGENT_MAC);
        let all: Vec<_> = messages(&packet[26..count], 0)
            .unwrap()
            .map(Result::unwrap)
            .collect();
        assert!(matches!(
            all[..],
            [
                Message::Setup(_),
                Message::Start {
                    process: COMMAND,
                    ..
                }
            ]
        ));
    }

    #[test]
    fn command_that_runs_is_heard_to_its_end() {
        let mut guest = Guest::new();
        let status = Status::Exited(7);
        guest.send(&[
            Message::Ready,
            STARTED,
            data(COMMAND, b"out"),
            Message::Exited {
                process: COMMAND,
                status,
            },
        ]);
        guest.serve().unwrap();
        assert_eq!(guest.agent.status(), Some(status));
        let mut bytes = [0; 10];
        assert_eq!(rustix::io::read(&guest.out, &mut bytes), Ok(3));
    }

    #[test]
    fn held_command_is_started_when_that_is_asked_for_and_its_input_is_kept_until_then() {
        let mut guest = Guest::with(true);
        let (input, typed) = pipe(false, false).unwrap();
        let sinks = [Sink::Tail(Vec::new()), Sink::Tail(Vec::new())];
        guest.agent.front = Front::with(COMMAND, Some(input), sinks);
        rustix::io::write(&typed, b"typed").unwrap();
        let waits_for_input = |guest: &Guest| {
            let mut found = false;
            let of_input = AgentPart::Front(FrontPart::Input);
            guest
                .agent
                .interests(|part, _, _| found |= part == of_input);
            found
        };
        assert!(guest.agent.begin(2).unwrap_err().contains("not ready"));
        guest.send(&[Message::Ready]);
        guest.serve().unwrap();
        assert!(guest.agent.is_ready() && !waits_for_input(&guest));
        guest.agent.front().signal(1);
        guest.agent.settle();
        assert_eq!(guest.heard().len(), 1, "the setup alone");
        guest.agent.begin(2).unwrap();
        let kinds = guest.heard();
        assert_eq!(kinds.len(), 2, "the start, and the signal behind it");
        assert!(waits_for_input(&guest));
        assert!(guest.agent.begin(2).unwrap_err().contains("already"));
        guest.send(&[STARTED]);
        guest.serve().unwrap();
        assert!(guest.agent.is_running());
    }

    #[test]
    fn all_that_came_before_the_guest_ended_is_heard() {
        let mut guest = Guest::new();
        guest.send(&[Message::Ready, STARTED]);
        // More than one turn takes.
        let mut count = 0;
        while count < 40 && guest.has_room() {
            guest.send(&[data(COMMAND, b"x")]);
            count += 1;
        }
        assert!(count > link::TURN, "{count}");
        guest.agent.hear_the_rest().unwrap();
        let mut bytes = [0; 100];
        assert_eq!(rustix::io::read(&guest.out, &mut bytes), Ok(count));
    }

    #[test]
    fn frames_of_other_protocols_are_passed_over() {
        let mut guest = Guest::new();
        guest.send_bytes(0x86dd, &[0xff; 100]);
        guest.send_bytes(0x0800, &[]);
        rustix::io::write(&guest.link, b"short").unwrap();
        guest.send(&[Message::Ready, STARTED]);
        guest.serve().unwrap();
        assert!(guest.agent.has_started());
    }

    #[test]
    fn messages_that_an_agent_may_not_send_end_the_session() {
        let exited = Message::Exited {
            process: COMMAND,
            status: Status::Exited(0),
        };
        let cases: [&[Message<'_>]; 16] = [
            &[data(COMMAND, b"before the start")],
            &[exited],
            &[STARTED],
            &[Message::Ready, Message::Ready],
            &[Message::Ready, exited],
            &[Message::Ready, Message::Request(b"start")],
            &[Message::Ready, STARTED, STARTED],
            &[Message::Ready, Message::Started { process: 2 }],
            &[Message::Ready, STARTED, data(2, b"of no process")],
            &[
                Message::Ready,
                STARTED,
                Message::Exited {
                    process: 77,
                    status: Status::Exited(0),
                },
            ],
            &[Message::Ready, STARTED, Message::Setup(b"")],
            &[
                Message::Ready,
                STARTED,
                Message::Start {
                    process: 3,
                    body: b"",
                },
            ],
            &[
                Message::Ready,
                STARTED,
                Message::Signal {
                    process: COMMAND,
                    number: 9,
                },
            ],
            &[
                Message::Ready,
                STARTED,
                Message::Credit {
                    process: COMMAND,
                    stream: Stream::Input,
                    bytes: u32::MAX,
                },
            ],
            &[Message::Ready, STARTED, exited, exited],
            &[
                Message::Ready,
                STARTED,
                exited,
                data(COMMAND, b"after the end"),
            ],
        ];
        for all in cases {
            let text = Guest::new().fault(all);
            assert!(text.contains("broke the protocol"), "{all:?}: {text}");
        }
    }

    #[test]
    fn output_without_end_is_refused_at_its_credit_and_no_more_is_held() {
        let mut guest = Guest::new();
        guest.send(&[Message::Ready, STARTED]);
        guest.serve().unwrap();
        let piece = vec![b'x'; DATA_MAX];
        let mut sent = 0;
        let error = loop {
            guest.send(&[data(COMMAND, &piece)]);
            sent += piece.len();
            match guest.serve() {
                Ok(()) => assert!(sent < 1 << 20, "it is taken without end"),
                Err(error) => break crate::error::message(&error),
            }
        };
        assert!(error.contains("credit"), "{error}");
    }

    #[test]
    fn frames_that_are_malformed_or_out_of_turn_end_the_session() {
        for (frame, expected) in [
            (&[][..], "cut short"),
            (&[1, 0, 0, 0, 0, 0, 0, 0], "version 1"),
            (&[2, 0, 0xff, 0xff, 0, 0, 0, 0], "wrong length"),
            (&[2, 0, 4, 0, 0, 0, 0, 0, 1, 2, 3, 4], "cut short"),
            (
                &[2, 0, 0, 0, 9, 0, 0, 0],
                "frame 9 came in place of frame 0",
            ),
        ] {
            let mut guest = Guest::new();
            guest.send_bytes(ETHER_TYPE, frame);
            let text = crate::error::message(&guest.serve().unwrap_err());
            assert!(text.contains(expected), "{frame:?}: {text}");
        }
    }

    #[test]
    fn reason_of_an_agent_is_text_without_control_characters() {
        let text = Guest::new().fault(&[Message::Failed(b"cannot \x1b[2J\xff\n")]);
        assert!(text.ends_with("agent cannot ?[2J\u{fffd}?"), "{text}");
    }

    #[test]
    fn random_packets_are_refused_and_nothing_panics() {
        let mut state = u64::from(std::process::id()) * 7919 + 1;
        println!("seed {state}");
        let mut next = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        for _ in 0..300 {
            let mut guest = Guest::new();
            guest.send(&[Message::Ready, STARTED]);
            for _ in 0..20 {
                let mut bytes: Vec<u8> = (0..next() % 100).map(|_| next() as u8 & 15).collect();
                if let Some(header) = bytes.first_chunk_mut::<8>() {
                    *header = [2, 0, 0, 0, guest.sequence as u8, 0, 0, 0];
                    bytes[2] = (bytes.len() - 8) as u8;
                }
                guest.send_bytes(ETHER_TYPE, &bytes);
                guest.sequence += 1;
                if guest.serve().is_err() {
                    break;
                }
            }
        }
    }
}
