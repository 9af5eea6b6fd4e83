//! A server on a socket of its own, a control that answers it, and clients, for tests.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::tempdir::TempDir;

use super::{Server, bind};
use crate::inbox::{self, Sender};
use crate::sys::passed::Passed;
use crate::sys::testing::unread_by_peer;
use crate::vmm::action::{Action, ActionError, Command, Outcome, Question, Reply};

/// Longer than any test takes.
const LONG: Duration = Duration::from_secs(600);
/// How long anything may take before a test gives up: the machines are shared.
const PATIENCE: Duration = Duration::from_secs(120);
pub const HOLDERS_MAX: usize = 4;
pub const GET: &[u8] = b"GET /version HTTP/1.1\r\n\r\n";
pub const VERSION: &str = r#"{"firecracker_version":"1.17.0"}"#;

/// A server with a control that answers GETs, never answers a pause, and refuses the rest.
pub struct Fixture {
    dir: TempDir,
    pub commands: Sender<Command>,
    pub held: Arc<Mutex<Vec<Reply>>>,
    /// How many descriptors came with each question.
    pub came: Arc<Mutex<Vec<usize>>>,
    pub stopped: Arc<AtomicBool>,
}

impl Fixture {
    pub fn new(control_room: usize) -> Self {
        Fixture::with(control_room, |_| {})
    }

    /// The same with a server that was changed by `set`.
    pub fn with(control_room: usize, set: impl FnOnce(&mut Server)) -> Self {
        let dir = TempDir::new().unwrap();
        let (commands, inbox) = inbox::inbox::<Command>(control_room).unwrap();
        let listener = bind(&dir.as_path().join("s")).unwrap();
        let mut server = Server::new(listener, commands.outbox(), 51_200).unwrap();
        server.holders_max = HOLDERS_MAX;
        // No client of a test is too slow, however busy the machine is.
        server.drain_patience = LONG;
        server.stalled = LONG;
        set(&mut server);
        thread::spawn(move || server.run());
        let held = Arc::new(Mutex::new(Vec::new()));
        let came = Arc::new(Mutex::new(Vec::new()));
        let count = Arc::clone(&came);
        let stopped = Arc::new(AtomicBool::new(false));
        let (hold, stop) = (Arc::clone(&held), Arc::clone(&stopped));
        thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                thread::sleep(Duration::from_millis(1));
                while let Some(Command {
                    action,
                    passed,
                    reply,
                }) = inbox.next()
                {
                    if let Passed::Received(fds) = passed {
                        count.lock().unwrap().push(fds.len());
                    }
                    match *action {
                        Action::Ask(Question::Version) => {
                            reply.send(Ok(Outcome::Version("1.17.0")))
                        }
                        Action::Resume => reply.send(Ok(Outcome::Done)),
                        Action::Pause => hold.lock().unwrap().push(reply),
                        _ => reply.send(Err(ActionError("No.".into()))),
                    }
                }
            }
        });
        Fixture {
            dir,
            commands,
            held,
            came,
            stopped,
        }
    }

    pub fn connect(&self) -> Client {
        let stream = UnixStream::connect(self.dir.as_path().join("s")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Client(stream)
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Relaxed);
    }
}

/// A pipe whose end shows when all copies of `writer` are closed.
pub struct Witness {
    reader: File,
    pub writer: File,
}

impl Witness {
    pub fn new() -> Self {
        let (reader, writer) = crate::sys::fd::pipe().unwrap();
        Witness { reader, writer }
    }

    pub fn sees_all_closed(self) -> bool {
        drop(self.writer);
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if matches!((&self.reader).read(&mut [0]), Ok(0)) {
                return true;
            }
            thread::sleep(Duration::from_millis(1));
        }
        false
    }
}

pub struct Client(pub UnixStream);

impl Client {
    /// Waits until the server has read all that was sent.
    pub fn wait_until_read(&self) {
        let deadline = Instant::now() + PATIENCE;
        while unread_by_peer(&self.0) > 0 {
            assert!(Instant::now() < deadline, "the server does not read");
            thread::sleep(Duration::from_millis(1));
        }
    }

    pub fn send(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.write_all(bytes).unwrap();
        self
    }

    /// One response: status and body.
    pub fn response(&mut self) -> (u16, String) {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            self.0.read_exact(&mut byte).unwrap();
            head.push(byte[0]);
        }
        let head = String::from_utf8(head).unwrap();
        let status = head[9..12].parse().unwrap();
        let length = head
            .lines()
            .find_map(|l| l.strip_prefix("Content-Length: "))
            .map_or(0, |l| l.parse().unwrap());
        let mut body = vec![0; length];
        self.0.read_exact(&mut body).unwrap();
        (status, String::from_utf8(body).unwrap())
    }

    pub fn get(&mut self) {
        assert_eq!(self.send(GET).response(), (200, VERSION.into()));
    }

    /// The server has closed its side, and all it wrote was read.
    pub fn sees_the_end(&mut self) {
        assert_eq!(self.0.read(&mut [0]).unwrap(), 0);
    }

    /// The server has closed the connection, maybe with bytes that it did not read.
    pub fn is_closed(&mut self) -> bool {
        match self.0.read(&mut [0]) {
            Ok(count) => count == 0,
            Err(error) => error.kind() == ErrorKind::ConnectionReset,
        }
    }

    /// Waits until the server has closed both sides.
    pub fn is_hung_up_on(&self) {
        let epoll = Epoll::new().unwrap();
        // A hang-up is told in any case.
        let event = EpollEvent::new(EventSet::empty(), 0);
        epoll
            .ctl(ControlOperation::Add, self.0.as_raw_fd(), event)
            .unwrap();
        let mut events = [EpollEvent::default()];
        let patience = i32::try_from(PATIENCE.as_millis()).unwrap();
        assert_eq!(epoll.wait(patience, &mut events).unwrap(), 1, "still open");
        assert!(events[0].event_set().contains(EventSet::HANG_UP));
    }
}

pub fn put(path: &str, body: &str) -> Vec<u8> {
    format!(
        "PUT {path} HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

pub fn patch_vm(state: &str) -> Vec<u8> {
    let body = format!(r#"{{"state":"{state}"}}"#);
    format!(
        "PATCH /vm HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}
