//! The agent: first process of a guest that `mayfly-jailer run --image` made. It mounts the root disk,
//! runs the command and further processes for the supervisor on the host, passes on their streams, and
//! resets the machine.
//!
//! One thread, one loop around poll(2), which waits for the supervisor's frames, the ends of children,
//! and the streams of processes. It allocates nothing but one window for each input that its process does
//! not read, has no standard library (which would be most of what is unpacked and started in each guest),
//! and never waits for a process. A new process is a copy of it, which becomes the program (`child`), or packs or
//! unpacks files (`archive`).
//!
//! ```text
//!   supervisor on the host
//!        | frames (mayfly-agent-protocol), private interface
//!   +----v----+   +---------+   pipes, terminals   +-----------+
//!   |  link   |-->| process |--------------------->| processes |
//!   +---------+   +---------+                      +-----------+
//!   root   mounts          child, user   what a copy does until it is the program
//! ```
//!
//! Until the setup comes it looks at no disk and reads nothing random: this machine may be saved then, and go on as
//! any number of copies with other disks. What is to be new in each of them comes with the setup.
//!
//! What it is told is the supervisor's, which owns this guest; it is checked all the same. What it does for
//! programs of the guest gives them no more than root of this guest has: they could do as the agent does.

#![no_std]
#![no_main]

mod archive;
mod child;
mod link;
mod net;
mod process;
mod root;
#[expect(
    unsafe_code,
    reason = "system calls, memory and the start of a program without a standard library"
)]
mod sys;
mod text;
mod user;

use mayfly_agent_protocol::{COMMAND, FRAME_MAX, Frame, Malformed, Message, Status};

use crate::link::Link;
use crate::process::{POLLED, Table};
use crate::root::Setup;
use crate::sys::{Fd, POLL_IN, POLL_OUT, Poll, Static};
use crate::text::Text;

/// How long the supervisor may take to end the machine once it was told all, in milliseconds.
const PATIENCE: i32 = 5000;

/// What would be too large for the stack. All zero, so that none of it is in the file, or touched before it is
/// used.
struct Frames {
    received: [u8; FRAME_MAX],
    sent: Frame,
}

static FRAMES: Static<Frames> = Static::new(Frames {
    received: [0; FRAME_MAX],
    sent: Frame::new(),
});

/// The life of the agent.
fn main() -> ! {
    let Some(Frames { received, sent }) = FRAMES.take() else {
        give_up(b"")
    };
    let mut link = match Link::open() {
        Ok(link) => link,
        Err(text) => give_up(text.bytes()),
    };
    let children = match sys::watch_children() {
        Ok(children) => children,
        Err(error) => {
            let text = Text::of(b"hear of children (CONFIG_SIGNALFD)", error);
            fail(&mut link, sent, text.bytes())
        }
    };
    let mut agent = Agent {
        received,
        frame: sent,
        table: Table::new(),
        link,
        children,
        is_set_up: false,
        root: Root::default(),
    };
    // What takes no knowledge of what the guest is to be.
    link::bring_up_loopback(&agent.link);
    if let Err(text) = root::prepare() {
        fail(&mut agent.link, agent.frame, text.bytes());
    }
    // A supervisor may wait for it, and have this machine saved and copied before it sends the setup. There is room.
    let _ = agent.frame.push(&Message::Hello);
    agent.link.flush(agent.frame);
    loop {
        agent.turn();
    }
}

struct Agent {
    received: &'static mut [u8; FRAME_MAX],
    /// What is to be sent.
    frame: &'static mut Frame,
    table: Table,
    link: Link,
    children: Fd,
    is_set_up: bool,
    root: Root,
}

/// What is to be done about the root later.
#[derive(Default)]
struct Root {
    /// Whether there is something to bring to a disk.
    is_written: bool,
    /// The second disk, if that takes what is written.
    upper: Option<Fd>,
    /// Whether no program is to write to it.
    is_sealed: bool,
}

impl Agent {
    /// Waits once, and serves what is ready.
    fn turn(&mut self) {
        let unused = Poll {
            fd: -1,
            events: 0,
            revents: 0,
        };
        let mut polled = [unused; POLLED + 2];
        let is_blocked = self.link.is_blocked;
        let for_link = if is_blocked {
            POLL_IN | POLL_OUT
        } else {
            POLL_IN
        };
        polled[0] = Poll {
            fd: self.link.number(),
            events: for_link,
            revents: 0,
        };
        polled[1] = Poll {
            fd: self.children.number(),
            events: POLL_IN,
            revents: 0,
        };
        let count = self.table.interests(&mut polled[2..], !is_blocked);
        let polled = &mut polled[..count + 2];
        let patience = if !is_blocked && self.table.has_rest() {
            0
        } else {
            -1
        };
        if sys::poll(polled, patience).is_err() {
            return;
        }
        if polled[0].revents & POLL_OUT != 0 {
            self.link.flush(self.frame);
        }
        if polled[0].revents & !POLL_OUT != 0 {
            self.hear();
        }
        if polled[1].revents != 0 {
            let mut records = [0; 128];
            let _ = sys::read(&self.children, &mut records);
            self.table.reap();
        }
        self.table.pass_on_inputs();
        if self.link.is_blocked {
            return;
        }
        let is_ready = |fd| polled[2..].iter().any(|it| it.fd == fd && it.revents != 0);
        let (frame, table) = (&mut *self.frame, &mut self.table);
        table.take_outputs(frame, is_ready);
        let ended = table.report(frame, COMMAND);
        self.link.flush(frame);
        if let Some(status) = ended.filter(|_| !self.link.is_blocked) {
            self.finish(status);
        }
    }

    /// Serves all frames that have come.
    fn hear(&mut self) {
        while let Some(messages) = self.link.receive(self.received) {
            let served = messages.and_then(|mut messages| {
                messages.try_for_each(|message| {
                    let machine = Machine {
                        link: &mut self.link,
                        frame: self.frame,
                        is_set_up: &mut self.is_set_up,
                        root: &mut self.root,
                    };
                    machine.serve(&message?, &mut self.table)
                })
            });
            if let Err(error) = served {
                self.refuse(error);
            }
        }
    }

    /// What came is not of the protocol: the two are of different versions, or a frame was lost.
    fn refuse(&mut self, error: Malformed) -> ! {
        let text: &[u8] = match error {
            Malformed::Version(_) => b"the agent and mayfly-jailer are of different versions",
            Malformed::Sequence { .. } => b"the agent has lost a frame",
            Malformed::Credit => b"the agent was sent more than it gave credit for",
            _ => b"the agent did not understand mayfly-jailer",
        };
        fail(&mut self.link, self.frame, text)
    }

    /// The command has ended, and all it wrote was sent.
    fn finish(&mut self, status: Status) -> ! {
        if self.root.is_written {
            root::leave(self.root.upper.as_ref());
        }
        root::tell_port(status.code() as u8);
        let exited = Message::Exited {
            process: COMMAND,
            status,
        };
        end_with(&mut self.link, self.frame, &exited)
    }
}

/// What messages change, but for processes.
struct Machine<'a> {
    link: &'a mut Link,
    frame: &'a mut Frame,
    is_set_up: &'a mut bool,
    root: &'a mut Root,
}

impl Machine<'_> {
    /// Does what a message says.
    fn serve(self, message: &Message<'_>, table: &mut Table) -> Result<(), Malformed> {
        match *message {
            Message::Setup(body) if !*self.is_set_up => {
                let setup = Setup::read(body)?;
                let upper = match setup.enter() {
                    Ok(upper) => upper,
                    Err(text) => fail(self.link, self.frame, text.bytes()),
                };
                if let Err(text) = net::set_up(setup.fields, self.link) {
                    fail(self.link, self.frame, text.bytes());
                }
                *self.is_set_up = true;
                *self.root = Root {
                    is_written: setup.is_written(),
                    upper,
                    is_sealed: setup.is_sealed,
                };
                // It is the first message: there is room.
                match self.frame.push(&Message::Ready) {
                    true => Ok(()),
                    false => Err(Malformed::Reserved),
                }
            }
            // All else comes after it.
            _ if !*self.is_set_up => Err(Malformed::Kind(message.kind())),
            Message::Start { process, body } => {
                if process == COMMAND
                    && self.root.is_sealed
                    && let Err(text) = root::seal()
                {
                    fail(self.link, self.frame, text.bytes());
                }
                table.start(process, body)?;
                // The command is the first of all: there is room.
                let started = Message::Started { process };
                if process == COMMAND && !self.frame.push(&started) {
                    return Err(Malformed::Reserved);
                }
                Ok(())
            }
            _ => table.handle(message),
        }
    }
}

/// Says why the guest cannot be set up, and ends it.
fn fail(link: &mut Link, frame: &mut Frame, text: &[u8]) -> ! {
    end_with(link, frame, &Message::Failed(text))
}

/// Sends the last message, gives the supervisor time to end the machine, and ends it.
fn end_with(link: &mut Link, frame: &mut Frame, message: &Message<'_>) -> ! {
    link.flush(frame);
    frame.clear();
    let _ = frame.push(message);
    let wait_for = |link: &Link, events| {
        let _ = sys::poll(
            &mut [Poll {
                fd: link.number(),
                events,
                revents: 0,
            }],
            PATIENCE,
        );
    };
    link.flush(frame);
    if link.is_blocked {
        wait_for(link, POLL_OUT);
        link.flush(frame);
    }
    // Nothing that comes now is wanted, and the supervisor sends no more.
    let _ = sys::poll(&mut [], PATIENCE);
    give_up(b"")
}

/// Says why on the console, and ends the machine.
fn give_up(text: &[u8]) -> ! {
    if !text.is_empty() {
        child::complain(text, 0);
    }
    sys::reset_machine();
    sys::exit(child::CANNOT_START)
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    give_up(b"internal error (panic)")
}
