//! The supervisor's side of a guest that runs a command: what the agent in it is told, and what it answers.
//!
//! ```text
//!   caller's streams --- front ---+
//!                                 +--- link === monitor's network device === agent
//!   mayfly-jailer exec --- client +            (private: the supervisor is all there is)
//! ```
//!
//! - Runs in the supervisor's loop, and never waits. `link` carries the frames, `front` is the caller's side
//!   of a process, `clients` are further processes for other programs of this user, `plan` is what the guest
//!   is to be, `copying` what is copied into it, `initramfs` what it boots from.
//! - All that the guest sends is hostile input. It is decoded by `mayfly-agent-protocol`, which allocates
//!   nothing; what is held is bounded by the credit that was given; a turn of the loop takes a bounded number
//!   of packets. What is malformed, out of turn or without credit ends the guest, with one message.
//! - The guest's bytes reach the caller's standard output and error, the clients that asked for a process,
//!   and, as text without control characters, messages. Nothing else on the host is reachable from it.

mod clients;
mod copying;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod initramfs;
mod link;
mod plan;
#[cfg(any(test, fuzzing))]
mod testing;
#[cfg(test)]
mod tests;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use mayfly_agent_protocol::{COMMAND, Frame, Malformed, Message, Status};
use rustix::event::PollFlags;

pub use self::clients::Request;
use self::clients::{ClientPart, Clients};
use self::copying::{COPY_IN, Copying};
use self::link::Link;
pub use self::plan::{Address, Interface, Memory, Plan, Renewal, RootMode, Route};
use crate::error::{AnyError, Step as _};
use crate::process::command::CommandError;
use crate::process::front::{Front, FrontPart};

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

/// Where the session begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Beginning {
    /// With a guest that boots.
    Boot,
    /// With a guest that boots, and is told what it is to be when that is asked for ([`Agent::set_up`]).
    Wait,
    /// With a copy of a guest that waited for that.
    Copy,
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

/// The session with the agent.
#[derive(Debug)]
pub struct Agent {
    link: Link,
    front: Front,
    clients: Clients,
    /// What is copied into the guest, until it is there.
    copying: Option<Copying>,
    /// The agent has said that it is there.
    has_said_hello: bool,
    /// What tells the guest what it is to be, until that is sent.
    setup: Option<Vec<u8>>,
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
    pub fn new(
        plan: &Plan,
        listener: Option<OwnedFd>,
        beginning: Beginning,
    ) -> Result<(Agent, OwnedFd), AnyError> {
        let (mut link, theirs) = Link::pair().step("make the link to the guest's agent")?;
        if beginning == Beginning::Copy {
            // The first frame reached the supervisor of the guest that was copied.
            link.is_behind_hello();
        }
        let mut agent = Agent {
            link,
            front: Front::new(COMMAND, &plan.command),
            clients: Clients::new(listener),
            copying: match plan.copies.is_empty() {
                true => None,
                false => Some(Copying::start(&plan.copies)?),
            },
            has_said_hello: beginning == Beginning::Copy,
            setup: Some(plan.setup()?),
            start: Some(plan.command.body(&plan.hostname)?),
            is_held: plan.is_held,
            is_ready: false,
            has_started: false,
            starter: None,
        };
        if beginning != Beginning::Wait {
            // The guest takes it when its agent is there.
            agent.set_up()?;
        }
        Ok((agent, theirs))
    }

    /// Whether the agent is there, and waits for [`Agent::set_up`].
    pub fn awaits_setup(&self) -> bool {
        self.has_said_hello && self.setup.is_some()
    }

    /// Tells the guest what it is to be, once.
    pub fn set_up(&mut self) -> Result<(), CommandError> {
        let Some(setup) = self.setup.take() else {
            return Ok(());
        };
        if !self.link.out.push(&Message::Setup(&setup)) {
            return Err(CommandError::TooLong);
        }
        // In the same frame, where nothing has to be done before.
        if !self.is_held && self.copying.is_none() {
            self.send_start();
        }
        self.link.flush();
        Ok(())
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
            has_said_hello,
            setup,
            start,
            is_ready,
            has_started,
            starter,
            ..
        } = self;
        let is_asked = start.is_none();
        link.receive(|_: &mut Frame, message| match *message {
            Message::Hello if !*has_said_hello && !*is_ready => {
                *has_said_hello = true;
                Ok(())
            }
            Message::Ready if !*is_ready && setup.is_none() => {
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
