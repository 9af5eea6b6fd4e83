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

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, Signal};
use serde_json::json;

use self::socket::NamedSocket;
use super::channel::{Channel, Message};
use super::outcome::report::{Place, Report};
use super::outcome::{self, Seen, Times, Verdict};
use crate::cgroup::exclusive::{self, Entrances, Groups, Usage};
use crate::error::{AnyError, Failure, Step as _, message};
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

const START: &str = "start the keeper";
const SPEAK: &str = "speak to the keeper";

/// What there is to keep.
#[derive(Clone, Debug, Default)]
pub struct Assignment {
    /// Control groups.
    pub groups: Option<exclusive::Plan>,
    /// Listening sockets at these paths.
    pub sockets: Vec<PathBuf>,
    /// The exit report.
    pub report: Option<Place>,
    /// Name of the microVM.
    pub id: String,
    /// When the jailer began, microseconds of the monotonic clock.
    pub began_us: u64,
}

/// The supervisor's hold on the keeper.
#[derive(Debug)]
pub struct Keeper {
    channel: Channel,
    pid: Pid,
    assignment: Assignment,
}

impl Keeper {
    /// Starts one, if there is something to keep.
    pub fn start(
        mut assignment: Assignment,
        report: Option<&Report>,
        supervisor: &OwnedFd,
    ) -> Result<Option<Keeper>, Failure> {
        assignment.report = report.map(Report::place);
        let Assignment {
            groups, sockets, ..
        } = &assignment;
        if groups.is_none() && sockets.is_empty() && report.is_none() {
            return Ok(None);
        }
        let (channel, theirs) = Channel::pair().step(START)?;
        if let Some(report) = report {
            channel.send(REPORT, "", &report.files()).step(SPEAK)?;
        }
        let pid = sys::fork_apart(theirs.into(), supervisor.as_fd(), &assignment, keep);
        Ok(Some(Keeper {
            channel,
            pid: pid.step(START)?,
            assignment,
        }))
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
    pub fn watch(&self, pidfd: BorrowedFd<'_>) -> Result<(), Failure> {
        self.channel.send(WATCH, "", &[pidfd]).step(SPEAK)
    }

    /// Tells it that the monitor has been killed: nothing in its groups is to hold its end up.
    pub fn let_end(&self) {
        let _ = self.channel.send(KILLED, "", &[]);
    }

    /// The answer to the last request.
    fn answer(&self) -> Result<Message, AnyError> {
        match self.channel.receive().step(SPEAK)? {
            Some(message) if message.kind == DONE => Ok(message),
            Some(message) => Err(message.text.into()),
            None => Err("cannot hear from the keeper: it was killed".into()),
        }
    }

    /// Has everything removed, once the monitor is gone.
    pub fn remove(&self) -> Usage {
        let _ = self.channel.send(END, "", &[]);
        if let Ok(message) = self.answer() {
            return decode(&message.text);
        }
        // It was killed.
        if let Some(groups) = &self.assignment.groups {
            groups.remove_abandoned();
        }
        for path in &self.assignment.sockets {
            NamedSocket::remove_dead(path);
        }
        Usage::default()
    }

    /// Lets it end, once the exit report is written.
    pub fn dismiss(self) {
        let _ = self.channel.send(REPORTED, "", &[]);
        let _ = sys::wait(self.pid);
    }
}

fn encode(usage: Usage) -> String {
    json!([usage.out_of_memory, usage.peak_memory]).to_string()
}

fn decode(text: &str) -> Usage {
    let (out_of_memory, peak_memory) = serde_json::from_str(text).unwrap_or_default();
    Usage {
        out_of_memory,
        peak_memory,
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
    let report = assignment.report.as_ref().and_then(|place| {
        let files = channel.receive().ok()??.files;
        Report::of(files, place.clone())
    });
    let mut holdings = Holdings::default();
    let silent = closed
        .and_then(|()| sys::leave_standard_streams())
        .step(START);
    let made = silent.map_err(AnyError::from);
    let made = made.and_then(|()| holdings.make(assignment));
    let told = made.and_then(|(sockets, entrances)| {
        let text = if entrances.v2.is_some() { WITH_V2 } else { "" };
        let groups = entrances.v1.iter().chain(&entrances.v2);
        let files: Vec<_> = sockets.iter().chain(groups).map(AsFd::as_fd).collect();
        Ok(channel.send(DONE, text, &files).step(SPEAK)?)
    });
    if let Err(error) = told {
        holdings.remove(assignment);
        let _ = channel.send(FAILED, &message(&*error), &[]);
        return;
    }
    let mut monitor: Option<OwnedFd> = None;
    let mut usage = Usage::default();
    loop {
        match next(channel, supervisor) {
            Some(message) if message.kind == WATCH => monitor = message.files.into_iter().next(),
            Some(message) if message.kind == KILLED => holdings.let_end(),
            Some(message) if message.kind == END => {
                usage = holdings.remove(assignment).unwrap_or(usage);
                let _ = channel.send(DONE, &encode(usage), &[]);
            }
            Some(_) => return,
            None => break,
        }
    }
    // The supervisor was killed.
    if let Some(monitor) = &monitor {
        let _ = rustix::process::pidfd_send_signal(monitor, Signal::KILL);
    }
    holdings.let_end();
    if let Some(monitor) = monitor {
        let ended = PollFd::from_borrowed_fd(monitor.as_fd(), PollFlags::IN);
        let _ = poll(&mut [ended], Some(&PATIENCE));
    }
    let usage = holdings.remove(assignment).unwrap_or(usage);
    if let Some(report) = report.filter(|report| !report.is_written()) {
        let seen = Seen {
            usage,
            ..Seen::default()
        };
        let times = Times::ended_now(assignment.began_us);
        let verdict = Verdict::jailer_killed();
        // There is no process left to tell if it fails.
        let _ = report.write(&outcome::facts(
            &assignment.id,
            &verdict,
            None,
            &seen,
            &times,
        ));
    }
}

/// The next message; none once the supervisor is gone.
fn next(channel: &Channel, supervisor: BorrowedFd<'_>) -> Option<Message> {
    let mut events =
        [channel.as_fd(), supervisor].map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
    rustix::io::retry_on_intr(|| poll(&mut events, None)).ok()?;
    // What it said before it ended still counts.
    if events[0].revents().is_empty() {
        return None;
    }
    channel.receive().ok().flatten()
}

/// What was made.
#[derive(Default)]
struct Holdings {
    groups: Option<Groups>,
    sockets: Vec<NamedSocket>,
}

impl Holdings {
    fn make(&mut self, assignment: &Assignment) -> Result<(Vec<OwnedFd>, Entrances), AnyError> {
        let mut listening = Vec::new();
        for path in &assignment.sockets {
            let (named, socket) = NamedSocket::bind(path)?;
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
        self.sockets.drain(..).for_each(NamedSocket::remove);
        // What stays (a group that another process was put in) the next start will remove.
        let (usage, left) = self.groups.take()?.end();
        if let Some(plan) = &assignment.groups {
            // A process in the jail that this one was not told of may take its time to end.
            match left.is_empty() {
                true => plan.remove_parents(),
                false => plan.remove_abandoned(),
            }
        }
        Some(usage)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_survives_the_channel() {
        for usage in [
            Usage::default(),
            Usage {
                out_of_memory: 2,
                peak_memory: Some(77),
            },
        ] {
            assert_eq!(decode(&encode(usage)), usage);
        }
        assert_eq!(decode(""), Usage::default());
    }
}
