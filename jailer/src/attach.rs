//! `mayfly-jailer exec` and `cp`: further processes in a guest that runs a command, and files in and out of
//! it, through the socket of its supervisor. And `start`, `signal` and `state`, which are requests to the
//! supervisor (`control`).
//!
//! One thread, one loop over the connection and the caller's streams, which are those of the process
//! (`process::front`). What is copied is packed or unpacked by a child of this program (`copy`), with a
//! pipe between. The supervisor passes the guest's messages on: they are hostile input here too.

mod control;
mod copy;
mod options;
mod pid_file;

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use mayfly_agent_protocol::{COMMAND, Frame, Malformed, Message};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use self::copy::Copy;
use self::options::Exec;
use crate::console::pipe;
use crate::console::terminal::LOOK_EVERY;
use crate::error::{Advice as _, AnyError, Failure, Step as _, message};
use crate::process::command::{Body, CommandError};
use crate::process::front::{Front, FrontPart};
use crate::process::place::{PATIENCE, Place, connect_to};
use crate::process::stream::StreamLink;
use crate::sys::{self, Ended, Inherited};

#[cfg(any(test, fuzzing))]
pub use self::copy::fuzz;

pub use self::control::{CONTROL_HELP, Control, parse_control};
pub use self::options::{COPY_HELP, EXEC_HELP, parse_copy, parse_exec};

/// A command could not be run, as of container engines.
const NOT_RUN: i32 = 125;
/// A copy failed.
const NOT_COPIED: i32 = 1;
/// What was asked for was not done.
const NOT_DONE: i32 = 1;
/// The same, as nothing is there, or not any more, that could be asked.
const GONE: i32 = 3;

/// The connection, or the process behind it, failed.
#[derive(Debug, thiserror::Error)]
enum AttachError {
    #[error("cannot go on: the connection to the microVM {0} was lost")]
    Lost(String),
    #[error("cannot go on: the microVM sent what it may not")]
    Protocol(#[from] Malformed),
    #[error("cannot start it: {0}")]
    Command(#[from] CommandError),
    #[error("cannot start a process in the microVM {0}: {1}")]
    Refused(String, String),
}

/// Runs a command in a guest; the exit code.
pub fn exec(mut exec: Exec, inherited: Inherited) -> i32 {
    // While descriptors that were passed are there.
    let read = exec.command.read();
    prepare(inherited);
    ended(read.and_then(|()| exec.run()), NOT_RUN)
}

impl Exec {
    fn run(mut self) -> Result<i32, AnyError> {
        if !self.is_detached {
            return Ok(self.start()?.run()?);
        }
        const DETACH: &str = "go on in a process of its own (--detach)";
        let (started, tell) = pipe(true, true).step(DETACH)?;
        let Some(child) = sys::fork().step(DETACH)? else {
            drop(started);
            // A terminal's signals are not for it.
            let _ = rustix::process::setsid();
            let session = self.start().and_then(|session| {
                rustix::io::write(tell, b"1").step(DETACH)?;
                Ok(session)
            });
            let run = session.and_then(|mut session| Ok(session.run()?));
            sys::exit_now(ended(run, NOT_RUN));
        };
        drop(tell);
        let mut byte = [0];
        match rustix::io::retry_on_intr(|| rustix::io::read(&started, &mut byte)) {
            Ok(1) => Ok(0),
            // It has said why.
            _ => match sys::wait(child).step(DETACH)? {
                (Ended::Exited(code), _) if code != 0 => Ok(code),
                _ => Ok(NOT_RUN),
            },
        }
    }

    fn start(&mut self) -> Result<Session, AnyError> {
        if let Some(path) = &self.pid_file {
            // Before something runs.
            pid_file::check(path).step_on("write the file (--pid-file)", path)?;
        }
        self.command.prepare_terminal()?;
        let body = self.command.body("")?;
        let socket = connect(&self.target, PATIENCE)?;
        let front = Front::new(COMMAND, &self.command);
        let session = Session::start(&self.target.id, socket, front, &body)?;
        if let Some(path) = &self.pid_file {
            let number = std::process::id().to_string();
            pid_file::write(path, &number).step_on("write the file (--pid-file)", path)?;
        }
        Ok(session)
    }
}

/// Asks something of the supervisor of a guest; the exit code.
pub fn control(control: Control, inherited: Inherited) -> i32 {
    prepare(inherited);
    let done = control.run();
    let is_gone = done.as_ref().is_err_and(is_gone);
    ended(done, if is_gone { GONE } else { NOT_DONE })
}

fn is_gone(error: &AnyError) -> bool {
    let failure = error.downcast_ref::<Failure>();
    let errno = failure.and_then(Failure::errno);
    let is_lost = matches!(error.downcast_ref(), Some(AttachError::Lost(_)));
    is_lost || matches!(errno, Some(Errno::NOENT | Errno::CONNREFUSED))
}

/// Copies files to or from a guest; the exit code.
pub fn copy(copy: Copy, inherited: Inherited) -> i32 {
    prepare(inherited);
    ended(copy.run(), NOT_COPIED)
}

fn prepare(inherited: Inherited) {
    sys::survive_writes();
    // What is open besides is for other programs.
    let _ = inherited.keep(&[]);
}

fn ended(result: Result<i32, AnyError>, otherwise: i32) -> i32 {
    result.unwrap_or_else(|error| {
        let text = format!("mayfly-jailer: {}\n", message(&*error));
        // With standard error gone, the exit code still says it.
        let _ = std::io::Write::write_all(&mut std::io::stderr(), text.as_bytes());
        otherwise
    })
}

/// A microVM that runs a command.
#[derive(Debug, PartialEq, Eq)]
pub struct Target {
    /// Its name.
    pub id: String,
    /// Where its socket is.
    pub place: Place,
}

/// A connection to the supervisor of a microVM, which takes it within `patience`.
fn connect(target: &Target, patience: Duration) -> Result<OwnedFd, AnyError> {
    let Target { id, place } = target;
    let path = place.socket(id);
    let remedy = |answer| match answer {
        Errno::NOENT | Errno::CONNREFUSED => Some(
            "no microVM of this user with that id runs a command; its id is that of --id of \
             mayfly-jailer run --image",
        ),
        Errno::AGAIN => Some(
            "as many programs wait for it as may, and it has not taken one for a minute: its \
             mayfly-jailer is stopped; continue or end that",
        ),
        _ => None,
    };
    let what = format!("reach the microVM {id}");
    if path.exists() {
        place.check()?;
    }
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .step(what.clone())?;
    connect_to(&socket, &path, patience)
        .step(what)
        .hints(remedy)?;
    rustix::io::ioctl_fionbio(&socket, true).step("use the connection")?;
    Ok(socket)
}

/// A process in the guest, to its end.
struct Session {
    id: String,
    link: StreamLink,
    front: Front,
    frame: Box<Frame>,
    signals: OwnedFd,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Ready {
    Signal,
    Link,
    Front(FrontPart),
}

impl Session {
    fn start(id: &str, socket: OwnedFd, front: Front, body: &[u8]) -> Result<Session, AnyError> {
        let signals = sys::watch_signals().step("hold back signals")?;
        let mut session = Session {
            id: id.to_owned(),
            link: StreamLink::new(socket),
            front,
            frame: Box::new(Frame::new()),
            signals,
        };
        let start = Message::Start {
            process: COMMAND,
            body,
        };
        if !session.frame.push(&start) {
            return Err(AttachError::Command(CommandError::TooLong).into());
        }
        session.link.send(&mut session.frame);
        // It may have been changed while nothing was told of that here.
        session.front.resize();
        Ok(session)
    }

    /// To its end. The caller's streams are closed with the session.
    fn run(&mut self) -> Result<i32, AttachError> {
        loop {
            self.front.say(&mut self.frame);
            self.link.send(&mut self.frame);
            let status = self.front.status.filter(|_| !self.front.is_holding());
            if let Some(status) = status {
                self.front.close();
                return Ok(status.code());
            }
            if self.link.is_closed && self.front.status.is_none() {
                return Err(AttachError::Lost(self.id.clone()));
            }
            for ready in self.wait() {
                match ready {
                    Ready::Signal => {
                        if let Some(code) = self.hear_signal() {
                            self.front.close();
                            return Ok(code);
                        }
                    }
                    Ready::Link => self.receive()?,
                    Ready::Front(part) => self.front.handle(part, &mut self.frame),
                }
            }
        }
    }

    fn wait(&mut self) -> Vec<Ready> {
        self.front.look_at_terminal();
        let mut kinds = vec![Ready::Signal];
        let mut polled = vec![PollFd::from_borrowed_fd(
            self.signals.as_fd(),
            PollFlags::IN,
        )];
        if !self.link.is_closed {
            let mut flags = PollFlags::IN;
            flags.set(PollFlags::OUT, self.link.is_holding());
            kinds.push(Ready::Link);
            polled.push(PollFd::from_borrowed_fd(self.link.as_fd(), flags));
        }
        self.front
            .interests(self.link.takes_data(), |part, fd, flags| {
                kinds.push(Ready::Front(part));
                polled.push(PollFd::from_borrowed_fd(fd, flags));
            });
        let look = self.front.is_in_background().then_some(LOOK_EVERY);
        let look = look.and_then(|it| Timespec::try_from(it).ok());
        if poll(&mut polled, look.as_ref()).is_err() {
            return Vec::new();
        }
        let all = kinds.into_iter().zip(&polled);
        all.filter(|(_, fd)| !fd.revents().is_empty())
            .map(|(ready, _)| ready)
            .collect()
    }

    /// The code to end with, where a signal asks for that.
    fn hear_signal(&mut self) -> Option<i32> {
        let signal = sys::next_signal(self.signals.as_fd())?;
        match signal {
            libc::SIGCONT => self.front.resume(),
            libc::SIGWINCH => self.front.resize(),
            _ => {
                // This program's end kills the process.
                if self.front.is_asked_too_often(signal) || self.front.status.is_some() {
                    return Some(128 + signal);
                }
                self.front.signal(signal);
            }
        }
        None
    }

    fn receive(&mut self) -> Result<(), AttachError> {
        self.link.flush();
        self.link.fill();
        while self.link.has_frame() {
            let (front, id) = (&mut self.front, &self.id);
            self.link.take(|message| match *message {
                Message::Answer(text) => {
                    let text = String::from_utf8_lossy(text);
                    let why = text.trim_start_matches('-').to_owned();
                    Err(AttachError::Refused(id.clone(), why))
                }
                Message::Data {
                    process: COMMAND, ..
                }
                | Message::End {
                    process: COMMAND, ..
                }
                | Message::Credit {
                    process: COMMAND, ..
                }
                | Message::Exited {
                    process: COMMAND, ..
                } => Ok(front.receive(message)?),
                _ => Err(Malformed::Kind(message.kind()).into()),
            })?;
        }
        Ok(())
    }
}

/// The body that starts a copy of the agent for an archive.
fn archive_body(tag: u8, path: &str, has_input: bool) -> Result<Vec<u8>, CommandError> {
    let mut body = Body::default();
    body.add(tag, path.as_bytes())?;
    if has_input {
        body.add(mayfly_agent_protocol::fields::HAS_INPUT, b"")?;
    }
    body.finish()
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;
    use crate::console::Sink;
    use crate::process::place::own_working_folder;
    use crate::testing::Folder;

    #[test]
    fn supervisor_that_takes_no_connection_is_not_waited_for_without_end() {
        own_working_folder();
        let folder = Folder::new("attach-full");
        let place = Place::new(Some(folder.path().to_owned()));
        let path = place.socket("vm");
        let flags = SocketFlags::CLOEXEC;
        let socket = || {
            let made =
                rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
            made.unwrap()
        };
        let listener = UnixListener::bind(&path).unwrap();
        // Room for one, which is taken.
        rustix::net::listen(&listener, 0).unwrap();
        let first = socket();
        connect_to(&first, &path, Duration::from_millis(1)).unwrap();
        let target = Target {
            id: "vm".into(),
            place,
        };
        let error = connect(&target, Duration::from_millis(1)).unwrap_err();
        let text = message(&*error);
        assert!(text.contains("reach the microVM vm"), "{text}");
        assert!(text.contains("is stopped"), "{text}");
        // Once that one is taken, there is room again.
        drop(listener.accept().unwrap());
        connect(&target, Duration::from_millis(1)).unwrap();
    }

    #[test]
    fn process_that_is_refused_says_why() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let mut frame = Frame::new();
        assert!(frame.push(&Message::Answer(b"-there are many")));
        std::io::Write::write_all(&mut theirs, frame.finish(0)).unwrap();
        let front = Front::with(COMMAND, None, [Sink::Nowhere, Sink::Nowhere]);
        let mut session = Session::start("vm", ours.into(), front, b"").unwrap();
        let text = session.run().unwrap_err().to_string();
        assert_eq!(
            text,
            "cannot start a process in the microVM vm: there are many"
        );
    }
}
