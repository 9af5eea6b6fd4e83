//! Clients that behave, that do not, and that are gone.

use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};

use mayfly_agent_protocol::messages;
use rustix::event::{PollFd, poll};

use super::*;
use crate::testing::Folder;

/// A socket for clients, one of them, and the guest's end of the link.
struct Session {
    clients: Clients,
    client: UnixStream,
    link: Link,
    guest: OwnedFd,
}

const RUN: Message<'_> = Message::Start {
    process: COMMAND,
    // One word.
    body: &[fields::ARGUMENT, 1, 0, b'x', 0],
};

fn frame_of(sequence: u32, message: &Message<'_>) -> Vec<u8> {
    let mut frame = Frame::new();
    assert!(frame.push(message));
    frame.finish(sequence).to_vec()
}

impl Session {
    fn new(name: &str) -> Session {
        let place = Folder::new(name);
        let listener = UnixListener::bind(place.path().join("s")).unwrap();
        listener.set_nonblocking(true).unwrap();
        let client = UnixStream::connect(place.path().join("s")).unwrap();
        let (link, guest) = Link::pair().unwrap();
        let mut clients = Clients::new(Some(listener.into()));
        clients.handle(ClientPart::New);
        Session {
            clients,
            client,
            link,
            guest,
        }
    }

    /// What a turn of the loop does when the client has sent something.
    fn serve(&mut self) {
        let process = self.clients.all[0].process;
        self.clients.handle(ClientPart::Of(process));
        self.clients.serve(&mut self.link, true);
    }

    /// The kinds of the messages that reached the guest.
    fn heard(&self) -> Vec<u8> {
        let mut kinds = Vec::new();
        let mut packet = vec![0; 70_000];
        let mut sequence = 0;
        loop {
            let now = Default::default();
            let mut fds = [PollFd::new(&self.guest, PollFlags::IN)];
            if poll(&mut fds, Some(&now)) != Ok(1) {
                return kinds;
            }
            let count = rustix::io::read(&self.guest, &mut packet).unwrap();
            for message in messages(&packet[26..count], sequence).unwrap() {
                kinds.push(message.unwrap().kind());
            }
            sequence += 1;
        }
    }
}

#[test]
fn frames_that_came_at_once_are_all_passed_on() {
    let mut session = Session::new("clients-at-once");
    let stream = Stream::Input;
    let all = [
        RUN,
        Message::Data {
            process: COMMAND,
            stream,
            bytes: b"input",
        },
        Message::End {
            process: COMMAND,
            stream,
        },
    ];
    let frames = (0..).zip(&all).map(|(at, it)| frame_of(at, it));
    let bytes = frames.collect::<Vec<_>>().concat();
    session.client.write_all(&bytes).unwrap();
    session.serve();
    let expected: Vec<u8> = all.iter().map(Message::kind).collect();
    assert_eq!(session.heard(), expected);
}

#[test]
fn request_is_answered_while_as_many_processes_run_as_can_and_more_wait() {
    let place = Folder::new("clients-full");
    let listener = UnixListener::bind(place.path().join("s")).unwrap();
    listener.set_nonblocking(true).unwrap();
    let mut clients = Clients::new(Some(listener.into()));
    let (mut link, guest) = Link::pair().unwrap();
    let mut others = Vec::new();
    let mut session = |message: &Message<'_>| {
        let mut client = UnixStream::connect(place.path().join("s")).unwrap();
        client.write_all(&frame_of(0, message)).unwrap();
        others.push(client);
        let mut is_taken = false;
        clients.interests(true, |part, _, _| is_taken |= part == ClientPart::New);
        assert!(is_taken, "the next one is not taken");
        clients.handle(ClientPart::New);
        let process = clients.all.last().unwrap().process;
        clients.handle(ClientPart::Of(process));
        clients.serve(&mut link, true);
        let mut packet = [0; 1024];
        let mut fds = [PollFd::new(&guest, PollFlags::IN)];
        let has_come = poll(&mut fds, Some(&Default::default())) == Ok(1);
        if has_come {
            rustix::io::read(&guest, &mut packet).unwrap();
        }
        (has_come, clients.next_request().map(|(_, request)| request))
    };
    for count in 1..PROCESSES_MAX {
        assert_eq!(session(&RUN), (true, None), "{count}");
    }
    // The agent has no place for more.
    assert_eq!(session(&RUN), (false, None));
    let signal = session(&Message::Request(b"signal 9"));
    assert_eq!(signal, (false, Some(Request::Signal(9))));
    assert!(!clients.has_frame(true), "there is nothing to do");
    // Once one has ended, the one that waits has its turn.
    let exited = |process| Message::Exited {
        process,
        status: Status::Exited(0),
    };
    let first = clients.all[0].process;
    clients.receive(first, &exited(first)).unwrap();
    assert!(clients.has_frame(true));
    clients.serve(&mut link, true);
    let mut fds = [PollFd::new(&guest, PollFlags::IN)];
    assert_eq!(poll(&mut fds, Some(&Default::default())), Ok(1));
}

#[test]
fn frames_beyond_a_turn_are_told_of() {
    let mut session = Session::new("clients-turn");
    let mut bytes = frame_of(0, &RUN);
    let signal = Message::Signal {
        process: COMMAND,
        number: 1,
    };
    for at in 1..=TURN {
        bytes.extend(frame_of(at as u32, &signal));
    }
    session.client.write_all(&bytes).unwrap();
    session.serve();
    let mut count = session.heard().len();
    assert!(count <= TURN);
    while session.clients.has_frame(true) {
        assert!(session.link.takes_data() || !session.heard().is_empty());
        session.clients.serve(&mut session.link, true);
        session.link.flush();
        count += 1;
    }
    assert_eq!(count, TURN + 1);
}

#[test]
fn client_that_takes_no_output_gets_it_and_the_end_after_the_guest_is_gone() {
    let mut session = Session::new("clients-slow");
    session.client.write_all(&frame_of(0, &RUN)).unwrap();
    session.serve();
    let process = session.clients.all[0].process;
    let piece = vec![b'x'; 32 * 1024];
    let data = Message::Data {
        process,
        stream: Stream::Output,
        bytes: &piece,
    };
    for _ in 0..OUTPUT_WINDOW as usize / piece.len() {
        session.clients.receive(process, &data).unwrap();
    }
    session.clients.dismiss();
    assert_eq!(session.clients.held().count(), 1);
    let client = session.client.try_clone().unwrap();
    let reader = std::thread::spawn(move || {
        let (mut client, mut bytes) = (client, Vec::new());
        client.read_to_end(&mut bytes).map(|_| bytes)
    });
    while session.clients.held().count() > 0 {
        session.clients.flush_all();
    }
    let bytes = reader.join().unwrap().unwrap();
    let status = Status::Killed(KILL);
    let mut last = Frame::new();
    assert!(last.push(&Message::Exited {
        process: COMMAND,
        status
    }));
    let count = (OUTPUT_WINDOW as usize / piece.len()) as u32;
    assert!(bytes.len() > OUTPUT_WINDOW as usize);
    assert!(bytes.ends_with(last.finish(count)));
}

#[test]
fn client_of_a_process_that_ended_may_still_give_credit() {
    let mut session = Session::new("clients-credit");
    session.client.write_all(&frame_of(0, &RUN)).unwrap();
    session.serve();
    let process = session.clients.all[0].process;
    session.clients.all[0].state = State::Ended;
    let credit = Message::Credit {
        process: COMMAND,
        stream: Stream::Output,
        bytes: 1,
    };
    session.client.write_all(&frame_of(1, &credit)).unwrap();
    session.clients.handle(ClientPart::Of(process));
    session.clients.all[0].serve(&mut Frame::new());
    assert!(!session.clients.all[0].link.is_closed);
}

#[test]
fn request_is_answered_and_a_process_waits_until_it_can_be_started() {
    let mut session = Session::new("clients-request");
    session.client.write_all(&frame_of(0, &RUN)).unwrap();
    let process = session.clients.all[0].process;
    session.clients.handle(ClientPart::Of(process));
    assert!(!session.clients.has_frame(false) && session.clients.has_frame(true));
    session.clients.serve(&mut session.link, false);
    assert!(session.heard().is_empty());
    session.clients.serve(&mut session.link, true);
    assert_eq!(session.heard(), [RUN.kind()]);

    let mut session = Session::new("clients-answer");
    let request = frame_of(0, &Message::Request(b"signal 15"));
    session.client.write_all(&request).unwrap();
    session.serve();
    let (client, request) = session.clients.next_request().unwrap();
    assert_eq!(request, Request::Signal(15));
    assert_eq!(session.clients.next_request(), None);
    session.clients.answer(client, Err("why".into()));
    let expected = frame_of(0, &Message::Answer(b"-why"));
    let mut got = vec![0; expected.len()];
    session.client.read_exact(&mut got).unwrap();
    assert_eq!(got, expected);
    session.clients.serve(&mut session.link, true);
    assert!(session.clients.all.is_empty() && session.heard().is_empty());
}

#[test]
fn request_that_is_not_known_closes_the_connection_and_not_the_guest() {
    for text in [&b""[..], b"stop", b"signal 65", b"signal x", b"start\xff"] {
        assert_eq!(Request::of(text), None);
        let mut session = Session::new("clients-unknown");
        let request = frame_of(0, &Message::Request(text));
        session.client.write_all(&request).unwrap();
        session.serve();
        assert_eq!(session.clients.next_request(), None);
        assert!(session.clients.all.is_empty() && session.heard().is_empty());
    }
}

#[test]
fn listener_is_not_looked_at_for_a_while_after_a_client_could_not_be_taken() {
    let mut session = Session::new("clients-pause");
    let is_listening = |clients: &Clients| {
        let mut found = false;
        clients.interests(true, |part, _, _| found |= part == ClientPart::New);
        found
    };
    assert!(is_listening(&session.clients));
    // Of a descriptor that is no socket, as of a process without a free descriptor.
    let null = std::fs::File::open("/dev/null").unwrap();
    let listener = session.clients.listener.replace(null.into());
    session.clients.handle(ClientPart::New);
    assert!(!is_listening(&session.clients));
    session.clients.listener = listener;
    let until = session.clients.paused_until().unwrap();
    assert!(until > Instant::now());
    // A client that goes gives a descriptor back.
    let _ = session.client.shutdown(std::net::Shutdown::Both);
    session.serve();
    assert!(is_listening(&session.clients));
}

/// Clients that connect by themselves, and the guest's end of the link.
struct Crowd {
    place: Folder,
    clients: Clients,
    link: Link,
    guest: OwnedFd,
}

impl Crowd {
    fn new(name: &str) -> Crowd {
        let place = Folder::new(name);
        let listener = UnixListener::bind(place.path().join("s")).unwrap();
        listener.set_nonblocking(true).unwrap();
        let (link, guest) = Link::pair().unwrap();
        Crowd {
            place,
            clients: Clients::new(Some(listener.into())),
            link,
            guest,
        }
    }

    /// One more connection; whether it was taken.
    fn connect(&mut self) -> (UnixStream, bool) {
        let client = UnixStream::connect(self.place.path().join("s")).unwrap();
        client.set_nonblocking(true).unwrap();
        let mut is_taken = false;
        let add = |part, _: BorrowedFd<'_>, _| is_taken |= part == ClientPart::New;
        self.clients.interests(true, add);
        if is_taken {
            self.clients.handle(ClientPart::New);
        }
        (client, is_taken)
    }

    /// One more, which says something.
    fn say(&mut self, message: &Message<'_>) -> UnixStream {
        let (mut client, is_taken) = self.connect();
        assert!(is_taken, "the next one is not taken");
        client.write_all(&frame_of(0, message)).unwrap();
        let process = self.clients.all.last().unwrap().process;
        self.clients.handle(ClientPart::Of(process));
        self.clients.serve(&mut self.link, true);
        let mut packet = [0; 1024];
        let mut fds = [PollFd::new(&self.guest, PollFlags::IN)];
        if poll(&mut fds, Some(&Default::default())) == Ok(1) {
            rustix::io::read(&self.guest, &mut packet).unwrap();
        }
        client
    }
}

/// What has come, and whether there is more to come.
fn received(client: &mut UnixStream) -> (Vec<u8>, bool) {
    let mut bytes = Vec::new();
    let is_open = client.read_to_end(&mut bytes).is_err();
    (bytes, is_open)
}

#[test]
fn processes_that_wait_leave_places_for_requests_and_those_beyond_are_told() {
    let mut crowd = Crowd::new("clients-crowd");
    let mut others: Vec<_> = (0..FOR_PROCESSES_MAX).map(|_| crowd.say(&RUN)).collect();
    for other in &mut others {
        assert_eq!(received(other), (Vec::new(), true));
    }
    for _ in 0..CLIENTS_MAX {
        let mut refused = crowd.say(&RUN);
        let (bytes, is_open) = received(&mut refused);
        assert_eq!(bytes, frame_of(0, &Message::Answer(FULL)));
        assert!(!is_open);
    }
    let _asks = crowd.say(&Message::Request(b"signal 9"));
    let request = crowd.clients.next_request().map(|(_, request)| request);
    assert_eq!(request, Some(Request::Signal(9)));
    assert!(!crowd.clients.has_frame(true), "there is nothing to do");
}

#[test]
fn clients_that_say_nothing_give_way_to_the_next_one() {
    let mut crowd = Crowd::new("clients-silent");
    let mut silent: Vec<_> = (0..CLIENTS_MAX).map(|_| crowd.connect().0).collect();
    assert_eq!(crowd.clients.all.len(), CLIENTS_MAX);
    let _asks = crowd.say(&Message::Request(b"state"));
    assert!(crowd.clients.next_request().is_some());
    assert_eq!(crowd.clients.all.len(), CLIENTS_MAX);
    // The oldest of them.
    assert_eq!(received(&mut silent[0]), (Vec::new(), false));
    assert_eq!(received(&mut silent[1]), (Vec::new(), true));
}

#[test]
fn request_is_heard_while_the_guest_takes_nothing() {
    let mut session = Session::new("clients-stuck");
    while session.link.takes_data() {
        assert!(session.link.out.push(&RUN));
        session.link.flush();
    }
    let request = frame_of(0, &Message::Request(b"signal 9"));
    session.client.write_all(&request).unwrap();
    let mut is_looked_at = false;
    let can_send = session.link.takes_data();
    session.clients.interests(can_send, |part, _, flags| {
        is_looked_at |= matches!(part, ClientPart::Of(_)) && flags.contains(PollFlags::IN);
    });
    assert!(is_looked_at && !can_send);
    session.serve();
    assert!(session.clients.next_request().is_some());
}
