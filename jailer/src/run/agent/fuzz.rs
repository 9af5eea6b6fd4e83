//! A guest's agent that says anything, and clients that do, to the supervisor.

use std::os::unix::net::UnixStream;

use mayfly_agent_protocol::{
    AGENT_MAC, DATA_MAX, ETHER_TYPE, OUTPUT_WINDOW, SUPERVISOR_MAC, Stream, messages,
};
use rustix::event::{PollFd, poll};
use rustix::io::{Errno, read, write};

use super::testing::session;
use super::*;
use crate::error::message;
use crate::fuzz::Input;

/// A session in which the guest sends any messages and any bytes, and up to four clients do too. Checked:
/// what the command's output is given is what the guest sent, in order; the guest sends no more than it
/// has credit for, or the session ends; each frame that the guest and the clients get is one of the
/// protocol, with the next number; why a session ended is told in one bounded line.
pub fn supervisor(bytes: &[u8]) {
    let input = &mut Input::new(bytes);
    let mut test = Test::new(input);
    for _ in 0..200 {
        if input.is_empty() || test.step(input).is_none() {
            break;
        }
    }
    test.agent.dismiss_clients();
}

struct Test {
    agent: Agent,
    link: OwnedFd,
    out: OwnedFd,
    clients: Vec<Client>,
    /// Numbers of the next frames, to the supervisor and from it.
    next: u32,
    heard: u32,
    /// What the guest may still send of the command's output.
    credit: u64,
    /// What it has sent, and how much of that has come out.
    said: Vec<u8>,
    read: usize,
    packet: Vec<u8>,
}

struct Client {
    socket: UnixStream,
    next: u32,
    received: Vec<u8>,
    heard: u32,
}

impl Test {
    fn new(input: &mut Input<'_>) -> Self {
        let beginning = input.one_of(&[Beginning::Boot, Beginning::Copy, Beginning::Wait]);
        let (agent, link, out) = session(beginning, input.below(4) == 0);
        Test {
            agent,
            link,
            out,
            clients: Vec::new(),
            next: u32::from(beginning == Beginning::Copy),
            heard: 0,
            credit: OUTPUT_WINDOW.into(),
            said: Vec::new(),
            read: 0,
            packet: vec![0; 70_000],
        }
    }

    /// None when the session has ended.
    fn step(&mut self, input: &mut Input<'_>) -> Option<()> {
        let served = match input.below(12) {
            0..=6 => self.say(input),
            7 => self.say_bytes(input),
            8 => {
                self.connect();
                Ok(())
            }
            9 | 10 if !self.clients.is_empty() => {
                let index = input.below(self.clients.len());
                self.clients[index].say(input);
                Ok(())
            }
            _ => self.ask(input),
        };
        if let Err(error) = served.and_then(|()| self.turn()) {
            let text = message(&error);
            assert!(
                !text.contains(char::is_control) && text.len() < 2000,
                "{text}"
            );
            return None;
        }
        self.hear();
        self.read_output();
        Some(())
    }

    /// What the loop of the supervisor does: all that is ready.
    fn turn(&mut self) -> Result<(), AgentError> {
        let mut waits = Vec::new();
        self.agent
            .interests(|part, fd, flags| waits.push((part, fd, flags)));
        let mut fds: Vec<PollFd<'_>> = waits
            .iter()
            .map(|(_, fd, flags)| PollFd::from_borrowed_fd(*fd, *flags))
            .collect();
        let _ = poll(&mut fds, Some(&Default::default()));
        let ready = waits
            .iter()
            .zip(&fds)
            .filter(|(_, fd)| !fd.revents().is_empty());
        let ready: Vec<AgentPart> = ready.map(|((part, ..), _)| *part).collect();
        drop(fds);
        for part in ready {
            self.agent.handle(part)?;
        }
        self.agent.settle();
        Ok(())
    }

    /// Whether there was room for it.
    fn send(&self, frame: &[u8], ether_type: u16) -> bool {
        let mut packet = vec![0; 12];
        packet.extend(SUPERVISOR_MAC);
        packet.extend(AGENT_MAC);
        packet.extend(ether_type.to_be_bytes());
        packet.extend(frame);
        write(&self.link, &packet).is_ok()
    }

    /// A few messages in a frame, as an agent could say them but for when.
    fn say(&mut self, input: &mut Input<'_>) -> Result<(), AgentError> {
        let has_started = self.agent.has_started() && self.agent.front.status.is_none();
        let bytes = vec![input.u8(); DATA_MAX];
        let mut frame = Frame::new();
        let (mut is_too_much, mut said, mut credit) = (false, Vec::new(), self.credit);
        for _ in 0..=input.below(4) {
            let message = any_message(input, &bytes);
            if !frame.push(&message) {
                break;
            }
            if let Message::Data {
                process: COMMAND,
                stream: Stream::Output,
                bytes,
            } = message
            {
                is_too_much |= bytes.len() as u64 > credit;
                credit = credit.saturating_sub(bytes.len() as u64);
                said.extend_from_slice(bytes);
            }
        }
        let is_ended = self.agent.front.status.is_some();
        if !self.send(frame.finish(self.next), ETHER_TYPE) {
            return Ok(());
        }
        self.next = self.next.wrapping_add(1);
        let served = self.agent.handle(AgentPart::Link);
        if served.is_ok() && !is_ended {
            assert!(
                !(has_started && is_too_much),
                "more than there was credit for"
            );
            self.said.extend(said);
            self.credit = credit;
        }
        served
    }

    fn say_bytes(&mut self, input: &mut Input<'_>) -> Result<(), AgentError> {
        let ether_type = input.one_of(&[ETHER_TYPE, 0x0800, 0x86dd]);
        let len = input.below(100);
        self.send(input.bytes(len), ether_type);
        self.agent.handle(AgentPart::Link)
    }

    fn connect(&mut self) {
        if self.clients.len() < 4 {
            let (near, socket) = UnixStream::pair().unwrap();
            near.set_nonblocking(true).unwrap();
            socket.set_nonblocking(true).unwrap();
            self.agent.clients.add(near.into());
            self.clients.push(Client {
                socket,
                next: 0,
                received: Vec::new(),
                heard: 0,
            });
        }
    }

    /// What the supervisor does besides.
    fn ask(&mut self, input: &mut Input<'_>) -> Result<(), AgentError> {
        if let Some((client, request)) = self.agent.next_request() {
            match request {
                Request::Start => {
                    if let Err(why) = self.agent.begin(client) {
                        self.agent.answer(client, Err(why.into()));
                    }
                }
                _ => self.agent.answer(client, Ok("state".into())),
            }
        }
        if self.agent.awaits_setup() {
            self.agent.set_up().unwrap();
        }
        if input.below(8) == 0 && !self.clients.is_empty() {
            let index = input.below(self.clients.len());
            self.clients.swap_remove(index);
        }
        Ok(())
    }

    /// Takes the frames that the guest gets.
    fn hear(&mut self) {
        loop {
            let count = match read(&self.link, &mut self.packet) {
                Ok(count) if count > 0 => count,
                Ok(_) | Err(Errno::AGAIN) => break,
                Err(error) => panic!("{error}"),
            };
            let frame = &self.packet[26..count];
            for message in messages(frame, self.heard).expect("it is a frame of the protocol") {
                if let Message::Credit {
                    process: COMMAND,
                    stream: Stream::Output,
                    bytes,
                } = message.unwrap()
                {
                    self.credit += u64::from(bytes);
                    assert!(self.credit <= OUTPUT_WINDOW.into());
                }
            }
            self.heard = self.heard.wrapping_add(1);
        }
        self.clients.iter_mut().for_each(Client::hear);
    }

    /// What comes out is what was said.
    fn read_output(&mut self) {
        while let Ok(count) = read(&self.out, &mut self.packet) {
            let end = self.read + count;
            if count == 0 {
                break;
            }
            assert!(end <= self.said.len(), "more came out than was said");
            assert!(self.packet[..count] == self.said[self.read..end]);
            self.read = end;
        }
    }
}

fn any_message<'a>(input: &mut Input<'_>, bytes: &'a [u8]) -> Message<'a> {
    let process = match input.below(8) {
        0 => input.u32(),
        1 => COPY_IN,
        2..=4 => COMMAND + 1 + u32::from(input.u8() % 3),
        _ => COMMAND,
    };
    let stream = input.one_of(&[Stream::Output, Stream::Output, Stream::Error, Stream::Input]);
    let len = match input.below(4) {
        0 => usize::from(input.u16()).min(DATA_MAX),
        1 => DATA_MAX,
        _ => 1 + input.below(200),
    };
    match input.below(12) {
        0 => Message::Hello,
        1 => Message::Ready,
        2 => Message::Started { process },
        3 => Message::Failed(b"a\x1b[31m\nb"),
        4 => Message::Credit {
            process,
            stream: Stream::Input,
            bytes: input.u32() >> input.below(32),
        },
        5 => Message::End { process, stream },
        6 => Message::Exited {
            process,
            status: Status::Exited(input.u8()),
        },
        7 => Message::Setup(&[]),
        _ => Message::Data {
            process,
            stream,
            bytes: &bytes[..len],
        },
    }
}

impl Client {
    /// A frame of what a client may say, or bytes.
    fn say(&mut self, input: &mut Input<'_>) {
        let process = COMMAND;
        let stream = input.one_of(&[Stream::Input, Stream::Output]);
        let start = [mayfly_agent_protocol::fields::ARGUMENT, 1, 0, b'x', 0];
        let message = match input.below(9) {
            0 | 1 => Message::Start {
                process,
                body: &start,
            },
            2 => Message::Request(input.one_of(&[
                &b"start"[..],
                b"state",
                b"signal 9",
                b"signal 65",
            ])),
            3 => Message::Data {
                process,
                stream,
                bytes: &[7; 500],
            },
            4 => Message::Credit {
                process,
                stream,
                bytes: input.u32() >> input.below(32),
            },
            5 => Message::End { process, stream },
            6 => Message::Signal {
                process,
                number: input.u8(),
            },
            7 => Message::Size {
                process,
                rows: 1,
                columns: 2,
            },
            _ => {
                let len = input.below(100);
                let _ = write(&self.socket, input.bytes(len));
                return;
            }
        };
        let mut frame = Frame::new();
        assert!(frame.push(&message));
        let _ = write(&self.socket, frame.finish(self.next));
        self.next += 1;
    }

    fn hear(&mut self) {
        let mut bytes = [0; 4096];
        while let Ok(count) = read(&self.socket, &mut bytes) {
            if count == 0 {
                break;
            }
            self.received.extend_from_slice(&bytes[..count]);
        }
        while let Some(len) = mayfly_agent_protocol::frame::length(&self.received) {
            let Some(frame) = self.received.get(..len) else {
                break;
            };
            for message in messages(frame, self.heard).expect("it is a frame of the protocol") {
                message.unwrap();
            }
            self.heard += 1;
            self.received.drain(..len);
        }
    }
}
