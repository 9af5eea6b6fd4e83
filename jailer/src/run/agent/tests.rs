//! The guest plays the agent, as it is and as it may not be.

use mayfly_agent_protocol::{
    AGENT_MAC, DATA_MAX, ETHER_TYPE, SUPERVISOR_MAC, Stream, VERSION, messages,
};

use super::testing::session;
use super::*;
use crate::console::{Sink, pipe};

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
        Guest::at(Beginning::Boot, is_held)
    }

    fn at(beginning: Beginning, is_held: bool) -> Guest {
        let (agent, link, out) = session(beginning, is_held);
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
fn guest_that_is_to_wait_is_set_up_when_that_is_asked_for() {
    let mut guest = Guest::at(Beginning::Wait, false);
    assert!(guest.heard().is_empty() && !guest.agent.awaits_setup());
    guest.send(&[Message::Hello]);
    guest.serve().unwrap();
    assert!(guest.heard().is_empty() && guest.agent.awaits_setup());
    guest.agent.set_up().unwrap();
    let start = Message::Start {
        process: COMMAND,
        body: b"",
    };
    assert_eq!(guest.heard(), [Message::Setup(b"").kind(), start.kind()]);
    assert!(!guest.agent.awaits_setup());
    guest.send(&[Message::Ready, STARTED]);
    guest.serve().unwrap();
    assert!(guest.agent.is_running());
}

#[test]
fn guest_that_was_not_told_what_to_be_cannot_be_ready() {
    let fault = Guest::at(Beginning::Wait, false).fault(&[Message::Hello, Message::Ready]);
    assert!(fault.contains("unexpected message"), "{fault}");
}

#[test]
fn copy_of_a_guest_goes_on_behind_the_frame_that_the_first_one_sent() {
    let mut guest = Guest::at(Beginning::Copy, false);
    assert_eq!(guest.heard().len(), 2);
    guest.sequence = 1;
    guest.send(&[Message::Ready, STARTED]);
    guest.serve().unwrap();
    assert!(guest.agent.is_running());
    let mut guest = Guest::at(Beginning::Copy, false);
    guest.send(&[Message::Ready]);
    let fault = crate::error::message(&guest.serve().unwrap_err());
    assert!(
        fault.contains("frame 0 came in place of frame 1"),
        "{fault}"
    );
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
    let cases: [&[Message<'_>]; 18] = [
        &[data(COMMAND, b"before the start")],
        &[exited],
        &[STARTED],
        &[Message::Ready, Message::Ready],
        &[Message::Hello, Message::Hello],
        &[Message::Ready, Message::Hello],
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
        (&[VERSION, 0, 0xff, 0xff, 0, 0, 0, 0], "wrong length"),
        (&[VERSION, 0, 4, 0, 0, 0, 0, 0, 1, 2, 3, 4], "cut short"),
        (
            &[VERSION, 0, 0, 0, 9, 0, 0, 0],
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
                *header = [VERSION, 0, 0, 0, guest.sequence as u8, 0, 0, 0];
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
