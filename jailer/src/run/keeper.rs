//! The keeper: a small process outside the jail that makes what must have a name on the host (the
//! control groups, a socket at a path) and removes it again, whichever process is killed first.
//!
//! It holds process descriptors of the supervisor and the monitor. When the supervisor says that the
//! guest has ended, it adds up what the groups counted, removes everything, and ends. When the
//! supervisor is gone without a word, it sees to it that the monitor is gone too, does the same, and
//! writes the exit report. Should it be killed itself, the supervisor removes what it can, or the next
//! start does.
//!
//! It is started only when there is something to keep.

mod socket;

use std::borrow::Cow;
use std::ffi::OsString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal};

use self::socket::NamedSocket;
use super::channel::{Channel, Message};
use super::outcome::{self, Report, Seen, Times, Verdict};
use crate::cgroup::exclusive::{self, Entrances, Groups, Usage};
use crate::error::{AnyError, Remedy, Reported, message};
use crate::sys;

/// To the keeper: the process in the jail, by a descriptor.
const WATCH: u8 = b'w';
/// To the keeper: the monitor has been killed, and is to end.
const KILLED: u8 = b'k';
/// To the keeper: the monitor has ended.
const END: u8 = b'e';
/// To the keeper: the exit report is written.
const REPORTED: u8 = b'r';
/// To the keeper, before all else: the descriptors of the exit report.
const REPORT: u8 = b'f';
/// From the keeper: done, with what it came to.
const DONE: u8 = b'+';
/// With that: the last descriptor is a version 2 group.
const WITH_V2: &str = "v2";
/// From the keeper: the message of an error.
const FAILED: u8 = b'-';

/// How long a killed monitor may take to end.
const PATIENCE: Timespec = Timespec {
    tv_sec: 10,
    tv_nsec: 0,
};

/// The keeper cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    #[error("cannot get a descriptor of this process")]
    OwnDescriptor(#[source] Errno),
    #[error("cannot start the keeper")]
    Start(#[source] Errno),
    #[error("cannot speak to the keeper")]
    Channel(#[source] Errno),
    #[error("cannot hear from the keeper: it was killed")]
    Killed,
}

impl Remedy for KeeperError {
    fn remedy(&self) -> Option<Cow<'static, str>> {
        match self {
            KeeperError::OwnDescriptor(_) => Some("use Linux 5.10 or newer".into()),
            _ => None,
        }
    }
}

/// What there is to keep.
#[derive(Clone, Debug, Default)]
pub struct Assignment {
    /// Control groups.
    pub groups: Option<exclusive::Plan>,
    /// Listening sockets at these paths.
    pub sockets: Vec<PathBuf>,
    /// The exit report.
    report: Option<ReportPlace>,
}

/// What the keeper has to know to write an exit report.
#[derive(Clone, Debug)]
struct ReportPlace {
    id: String,
    began_us: u64,
    path: PathBuf,
    name: Option<OsString>,
}

/// The supervisor's hold on the keeper.
#[derive(Debug)]
pub struct Keeper {
    channel: Channel,
    pid: Pid,
    assignment: Assignment,
}

impl Keeper {
    /// Starts one. With the report go the microVM's name and when the jailer began.
    pub fn start(
        groups: Option<exclusive::Plan>,
        sockets: Vec<PathBuf>,
        report: Option<(&Report, &str, u64)>,
        supervisor: &OwnedFd,
    ) -> Result<Keeper, KeeperError> {
        let (channel, theirs) = Channel::pair().map_err(KeeperError::Start)?;
        let mut assignment = Assignment {
            groups,
            sockets,
            report: None,
        };
        if let Some((report, id, began_us)) = report {
            let (files, path, name) = report.parts();
            channel
                .send(REPORT, "", &files)
                .map_err(KeeperError::Channel)?;
            assignment.report = Some(ReportPlace {
                id: id.to_owned(),
                began_us,
                path,
                name,
            });
        }
        let pid = sys::fork_apart(theirs.into(), supervisor.as_fd(), &assignment, keep)
            .map_err(KeeperError::Start)?;
        Ok(Keeper {
            channel,
            pid,
            assignment,
        })
    }

    /// Waits until everything is made: the sockets, in the order in which they were asked for, and
    /// the ways into the groups.
    pub fn made(&self) -> Result<(Vec<OwnedFd>, Entrances), AnyError> {
        let message = self.answer()?;
        let mut sockets = message.files;
        let mut entrances = Entrances::default();
        if message.text == WITH_V2 {
            entrances.v2 = sockets.pop();
        }
        entrances.v1 = sockets.split_off(sockets.len().min(self.assignment.sockets.len()));
        Ok((sockets, entrances))
    }

    /// Tells it which process is in the jail.
    pub fn watch(&self, pidfd: BorrowedFd<'_>) -> Result<(), KeeperError> {
        let sent = self.channel.send(WATCH, "", &[pidfd]);
        sent.map_err(KeeperError::Channel)
    }

    /// Tells it that the monitor has been killed: nothing in its groups is to hold its end up.
    pub fn let_end(&self) {
        let _ = self.channel.send(KILLED, "", &[]);
    }

    /// The answer to the last request.
    fn answer(&self) -> Result<Message, AnyError> {
        match self.channel.receive().map_err(KeeperError::Channel)? {
            Some(message) if message.kind == DONE => Ok(message),
            Some(message) => Err(Reported(message.text).into()),
            None => Err(KeeperError::Killed.into()),
        }
    }

    /// Has everything removed, once the monitor is gone.
    pub fn remove(&self) -> Usage {
        let _ = self.channel.send(END, "", &[]);
        match self.answer() {
            Ok(message) => decode(&message.text),
            Err(_) => {
                // It was killed.
                if let Some(groups) = &self.assignment.groups {
                    groups.remove_abandoned();
                }
                for path in &self.assignment.sockets {
                    NamedSocket::remove_dead(path);
                }
                Usage::default()
            }
        }
    }

    /// Lets it end, once the exit report is written.
    pub fn dismiss(self) {
        let _ = self.channel.send(REPORTED, "", &[]);
        let _ = sys::wait(self.pid);
    }
}

fn encode(account: Usage) -> String {
    let peak = account
        .peak_memory
        .map_or(String::new(), |bytes| bytes.to_string());
    format!("{} {peak}", account.out_of_memory)
}

fn decode(text: &str) -> Usage {
    let (kills, peak) = text.split_once(' ').unwrap_or_default();
    Usage {
        out_of_memory: kills.parse().unwrap_or(0),
        peak_memory: peak.parse().ok(),
    }
}

/// The life of the keeper, which holds nothing of the supervisor's but what it needs: an output kept
/// open would keep its reader waiting.
fn keep(
    closed: Result<(), Errno>,
    channel: OwnedFd,
    supervisor: BorrowedFd<'_>,
    assignment: &Assignment,
) {
    let channel = &Channel::from(channel);
    // Signals that end a program stay held back; a terminal's do not come here.
    let _ = rustix::process::setsid();
    let _ = rustix::thread::set_name(c"mayfly-keeper");
    let silent = closed.and_then(|()| be_silent());
    if let Err(error) = silent.map_err(KeeperError::Start) {
        let _ = channel.send(FAILED, &message(&error), &[]);
        return;
    }
    let mut holdings = Holdings::default();
    let report = assignment.report.as_ref().and_then(|place| {
        let files = channel.receive().ok()??.files;
        Report::of(files, place.path.clone(), place.name.clone())
    });
    match holdings.make(assignment) {
        Ok(made) => {
            let (sockets, entrances) = &made;
            let text = if entrances.v2.is_some() { WITH_V2 } else { "" };
            let files: Vec<BorrowedFd<'_>> = sockets
                .iter()
                .chain(&entrances.v1)
                .chain(&entrances.v2)
                .map(AsFd::as_fd)
                .collect();
            if channel.send(DONE, text, &files).is_err() {
                holdings.remove(assignment);
                return;
            }
        }
        Err(error) => {
            holdings.remove(assignment);
            let _ = channel.send(FAILED, &message(&*error), &[]);
            return;
        }
    }
    let mut monitor = None;
    let mut account = Usage::default();
    loop {
        match next(channel, supervisor) {
            Some(message) if message.kind == WATCH => monitor = message.files.into_iter().next(),
            Some(message) if message.kind == KILLED => holdings.let_end(),
            Some(message) if message.kind == END => {
                account = holdings.remove(assignment).unwrap_or(account);
                let _ = channel.send(DONE, &encode(account), &[]);
            }
            Some(_) => return,
            None => {
                if let Some(monitor) = &monitor {
                    let _ = rustix::process::pidfd_send_signal(monitor, Signal::KILL);
                }
                holdings.let_end();
                if let Some(monitor) = monitor {
                    let ended = PollFd::from_borrowed_fd(monitor.as_fd(), PollFlags::IN);
                    let _ = poll(&mut [ended], Some(&PATIENCE));
                }
                account = holdings.remove(assignment).unwrap_or(account);
                if let (Some(report), Some(place)) = (&report, &assignment.report) {
                    write_report(report, place, account);
                }
                return;
            }
        }
    }
}

/// For a supervisor that was killed before it has written one.
fn write_report(report: &Report, place: &ReportPlace, account: Usage) {
    if report.is_written() {
        return;
    }
    let seen = Seen {
        account,
        ..Seen::default()
    };
    let times = Times {
        ended_us: Some(sys::monotonic_us().saturating_sub(place.began_us)),
        ..Times::default()
    };
    let facts = outcome::facts(&place.id, &Verdict::jailer_killed(), None, &seen, &times);
    // There is no process left to tell if it fails.
    let _ = report.write(&facts);
}

/// The next message; none once the supervisor is gone.
fn next(channel: &Channel, supervisor: BorrowedFd<'_>) -> Option<Message> {
    loop {
        let mut events = [
            PollFd::from_borrowed_fd(channel.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(supervisor, PollFlags::IN),
        ];
        match poll(&mut events, None) {
            Err(Errno::INTR) => continue,
            Err(_) => return None,
            Ok(_) => {}
        }
        // What it said before it ended still counts.
        if !events[0].revents().is_empty() {
            return channel.receive().ok().flatten();
        }
        if !events[1].revents().is_empty() {
            return None;
        }
    }
}

/// Lets go of the standard streams, where there is something to put in their place.
fn be_silent() -> Result<(), Errno> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let Ok(null) = rustix::fs::open("/dev/null", flags, Mode::empty()) else {
        return Ok(());
    };
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)
}

/// What was made.
#[derive(Default)]
struct Holdings {
    groups: Option<Groups>,
    sockets: Vec<NamedSocket>,
}

impl Holdings {
    fn make(&mut self, assignment: &Assignment) -> Result<(Vec<OwnedFd>, Entrances), AnyError> {
        let bound = assignment
            .sockets
            .iter()
            .map(|path| NamedSocket::bind(path));
        let mut listening = Vec::new();
        for bound in bound {
            let (named, socket) = bound?;
            self.sockets.push(named);
            listening.push(socket);
        }
        let Some(plan) = &assignment.groups else {
            return Ok((listening, Entrances::default()));
        };
        let groups = self.groups.insert(plan.make()?);
        Ok((listening, groups.entrances()?))
    }

    fn let_end(&self) {
        if let Some(groups) = &self.groups {
            groups.let_end();
        }
    }

    /// What the groups counted, unless they were removed before or never made.
    fn remove(&mut self, assignment: &Assignment) -> Option<Usage> {
        for socket in self.sockets.drain(..) {
            socket.remove();
        }
        // What stays (a group that another process was put in) the next start will remove.
        let (account, left) = self.groups.take()?.end();
        if let Some(assignment) = &assignment.groups {
            // A process in the jail that this one was not told of may take its time to end.
            if left.is_empty() {
                assignment.remove_parents();
            } else {
                assignment.remove_abandoned();
            }
        }
        Some(account)
    }
}

/// A descriptor of this process, by which others can tell that it has ended.
pub fn own_descriptor() -> Result<OwnedFd, KeeperError> {
    let own = rustix::process::getpid();
    rustix::process::pidfd_open(own, PidfdFlags::empty()).map_err(KeeperError::OwnDescriptor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_survives_the_channel() {
        for account in [
            Usage::default(),
            Usage {
                out_of_memory: 2,
                peak_memory: Some(77),
            },
        ] {
            assert_eq!(decode(&encode(account)), account);
        }
        assert_eq!(decode(""), Usage::default());
    }
}
