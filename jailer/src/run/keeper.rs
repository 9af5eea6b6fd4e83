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

use std::ffi::OsString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal};

use super::channel::{Channel, Message};
use super::outcome::{self, Report, Seen, Times, Verdict};
use super::socket::NamedSocket;
use crate::cgroup::exclusive::{self, Entrances, Groups, Usage};
use crate::failure::{Doing, Failure};
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
/// From the keeper: a failure's sentence.
const FAILED: u8 = b'-';

/// How long a killed monitor may take to end.
const PATIENCE: Timespec = Timespec {
    tv_sec: 10,
    tv_nsec: 0,
};

/// What there is to keep.
#[derive(Clone, Debug, Default)]
pub struct Errand {
    /// Control groups.
    pub groups: Option<exclusive::Plan>,
    /// Listening sockets at these paths.
    pub sockets: Vec<PathBuf>,
    /// The exit report.
    pub report: Option<Described>,
}

/// What the keeper has to know to write an exit report.
#[derive(Clone, Debug)]
pub struct Described {
    /// Name of the microVM.
    pub id: String,
    /// When the jailer began, microseconds of the monotonic clock.
    pub began_us: u64,
    path: PathBuf,
    name: Option<OsString>,
}

/// The supervisor's hold on the keeper.
#[derive(Debug)]
pub struct Keeper {
    channel: Channel,
    pid: Pid,
    errand: Errand,
}

impl Keeper {
    /// Starts one.
    pub fn start(
        mut errand: Errand,
        report: Option<(&Report, &str, u64)>,
        supervisor: &OwnedFd,
    ) -> Result<Keeper, Failure> {
        let what = "start the keeper";
        let (channel, theirs) = Channel::pair().doing(what)?;
        if let Some((report, id, began_us)) = report {
            let (files, path, name) = report.parts();
            channel.send(REPORT, "", &files).doing(what)?;
            errand.report = Some(Described {
                id: id.to_owned(),
                began_us,
                path,
                name,
            });
        }
        let pid = sys::fork_apart(theirs.into(), supervisor.as_fd(), &errand, keep).doing(what)?;
        Ok(Keeper {
            channel,
            pid,
            errand,
        })
    }

    /// Waits until everything is made: the sockets, in the order in which they were asked for, and
    /// the way into the groups.
    pub fn made(&self) -> Result<(Vec<OwnedFd>, Entrances), Failure> {
        let message = self.answer()?;
        let mut sockets = message.files;
        let mut doors = Entrances::default();
        if message.text == WITH_V2 {
            doors.v2 = sockets.pop();
        }
        doors.v1 = sockets.split_off(sockets.len().min(self.errand.sockets.len()));
        Ok((sockets, doors))
    }

    /// Tells it which process is in the jail.
    pub fn watch(&self, pidfd: BorrowedFd<'_>) -> Result<(), Failure> {
        self.channel
            .send(WATCH, "", &[pidfd])
            .doing("speak to the keeper")
    }

    /// Tells it that the monitor has been killed: nothing in its groups is to hold its end up.
    pub fn let_end(&self) {
        let _ = self.channel.send(KILLED, "", &[]);
    }

    /// The answer to the last request.
    fn answer(&self) -> Result<Message, Failure> {
        match self.channel.receive().doing("hear from the keeper")? {
            Some(message) if message.kind == DONE => Ok(message),
            Some(message) => Err(Failure::reported(message.text)),
            None => Err(Failure::new("hear from the keeper", "it was killed")),
        }
    }

    /// Has everything removed, once the monitor is gone.
    pub fn remove(&self) -> Usage {
        let _ = self.channel.send(END, "", &[]);
        match self.answer() {
            Ok(message) => decode(&message.text),
            Err(_) => {
                // It was killed. What it made is nobody's now.
                if let Some(groups) = &self.errand.groups {
                    groups.remove_abandoned();
                }
                for path in &self.errand.sockets {
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
fn keep(closed: Result<(), Errno>, channel: OwnedFd, supervisor: BorrowedFd<'_>, errand: &Errand) {
    let channel = &Channel::from(channel);
    // Signals that end a program stay held back; a terminal's do not come here.
    let _ = rustix::process::setsid();
    let _ = rustix::thread::set_name(c"mayfly-keeper");
    let silent = closed.and_then(|()| be_silent());
    if let Err(failure) = silent.doing("close inherited descriptors") {
        let _ = channel.send(FAILED, &failure.to_string(), &[]);
        return;
    }
    let mut kept = Kept::default();
    let report = errand.report.as_ref().and_then(|described| {
        let files = channel.receive().ok()??.files;
        Report::of(files, described.path.clone(), described.name.clone())
    });
    match kept.make(errand) {
        Ok(made) => {
            let (sockets, doors) = &made;
            let text = if doors.v2.is_some() { WITH_V2 } else { "" };
            let files: Vec<BorrowedFd<'_>> = sockets
                .iter()
                .chain(&doors.v1)
                .chain(&doors.v2)
                .map(AsFd::as_fd)
                .collect();
            if channel.send(DONE, text, &files).is_err() {
                kept.remove(errand);
                return;
            }
        }
        Err(failure) => {
            kept.remove(errand);
            let _ = channel.send(FAILED, &failure.to_string(), &[]);
            return;
        }
    }
    let mut monitor = None;
    let mut account = Usage::default();
    loop {
        match next(channel, supervisor) {
            Some(message) if message.kind == WATCH => monitor = message.files.into_iter().next(),
            Some(message) if message.kind == KILLED => kept.let_end(),
            Some(message) if message.kind == END => {
                account = kept.remove(errand).unwrap_or(account);
                let _ = channel.send(DONE, &encode(account), &[]);
            }
            Some(_) => return,
            None => {
                if let Some(monitor) = &monitor {
                    let _ = rustix::process::pidfd_send_signal(monitor, Signal::KILL);
                }
                kept.let_end();
                if let Some(monitor) = monitor {
                    let ended = PollFd::from_borrowed_fd(monitor.as_fd(), PollFlags::IN);
                    let _ = poll(&mut [ended], Some(&PATIENCE));
                }
                account = kept.remove(errand).unwrap_or(account);
                if let (Some(report), Some(described)) = (&report, &errand.report) {
                    write_report(report, described, account);
                }
                return;
            }
        }
    }
}

/// For a supervisor that was killed before it has written one.
fn write_report(report: &Report, described: &Described, account: Usage) {
    if report.is_written() {
        return;
    }
    let seen = Seen {
        account,
        ..Seen::default()
    };
    let times = Times {
        ended_us: Some(sys::monotonic_us().saturating_sub(described.began_us)),
        ..Times::default()
    };
    let facts = outcome::facts(
        &described.id,
        &Verdict::jailer_killed(),
        None,
        &seen,
        &times,
    );
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
struct Kept {
    groups: Option<Groups>,
    sockets: Vec<NamedSocket>,
}

impl Kept {
    fn make(&mut self, errand: &Errand) -> Result<(Vec<OwnedFd>, Entrances), Failure> {
        let mut listening = Vec::new();
        for path in &errand.sockets {
            let (named, socket) = NamedSocket::bind(path)?;
            self.sockets.push(named);
            listening.push(socket);
        }
        self.groups = errand
            .groups
            .as_ref()
            .map(exclusive::Plan::make)
            .transpose()?;
        let doors = self.groups.as_ref().map(Groups::entrances).transpose()?;
        Ok((listening, doors.unwrap_or_default()))
    }

    fn let_end(&self) {
        if let Some(groups) = &self.groups {
            groups.let_end();
        }
    }

    /// What the groups counted, unless they were removed before or never made.
    fn remove(&mut self, errand: &Errand) -> Option<Usage> {
        for socket in self.sockets.drain(..) {
            socket.remove();
        }
        // What stays (a group somebody else has put a process in) the next start will sweep.
        let (account, left) = self.groups.take()?.end();
        if let Some(errand) = &errand.groups {
            // A process in the jail that nobody told us of may take its time to end.
            if left.is_empty() {
                errand.remove_parents();
            } else {
                errand.remove_abandoned();
            }
        }
        Some(account)
    }
}

/// A descriptor of this process, by which others can tell that it has ended.
pub fn own_descriptor() -> Result<OwnedFd, Failure> {
    rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty()).doing_or(
        "get a descriptor of this process",
        |_| "use Linux 5.10 or newer",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accounts_survive_the_channel() {
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
