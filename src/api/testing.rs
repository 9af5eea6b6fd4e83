//! A server on a socket of its own, a control that answers it, and clients, for tests.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use vmm_sys_util::tempdir::TempDir;

use super::{Server, bind};
use crate::inbox::{self, Sender};
use crate::sys::handed::Handed;
use crate::vmm::action::{Action, ActionError, Command, Outcome, Reply};

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
        let dir = TempDir::new().unwrap();
        let (commands, inbox) = inbox::inbox::<Command>(control_room).unwrap();
        let listener = bind(&dir.as_path().join("s")).unwrap();
        let mut server = Server::new(listener, commands.outbox(), 51_200).unwrap();
        server.holders_max = HOLDERS_MAX;
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
                    handed,
                    reply,
                }) = inbox.next()
                {
                    if let Handed::Received(fds) = handed {
                        count.lock().unwrap().push(fds.len());
                    }
                    match *action {
                        Action::GetVersion => reply.send(Ok(Outcome::Version("1.17.0"))),
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
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
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
        let deadline = Instant::now() + Duration::from_secs(20);
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

    pub fn is_closed(&mut self) -> bool {
        matches!(self.0.read(&mut [0]), Ok(0) | Err(_))
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
