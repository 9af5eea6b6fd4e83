//! The supervisor's watch over one microVM: from the moment its jail is asked for until it is gone.
//!
//! One loop over one set of descriptors. What has to happen in order (the jail stands, the
//! configuration is sent, the guest starts) happens as soon as each has been heard of; the console,
//! the log, signals and the time limit are served all the while.

pub mod start;

use std::borrow::Cow;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use mayfly::wire::limits::END_REPORT_MAX;
use mayfly::wire::{Client, ClientError, EndReport, Response};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, Signal};

use super::channel::Channel;
use super::console::{Console, LOOK_EVERY, Part, Relay};
use super::jail;
use super::keeper::Keeper;
use super::outcome::{Asked, Seen, Times, Verdict};
use super::spec::Ender;
use super::spec::vm::Vm;
use crate::cgroup::exclusive;
use crate::error::{AnyError, Remedy, Reported, message};
use crate::sys::{self, Ended, Used};

/// How long a start may take, in microseconds: a big guest on huge pages takes seconds.
const START_US: u64 = 60_000_000;
/// How long the monitor may take to end when it is asked to.
const GRACE_US: u64 = 3_000_000;
/// How long the last of console and log may take to be written.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// The microVM cannot be started or watched.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    #[error("cannot start the microVM: {0}")]
    Refused(String),
    #[error("cannot start the microVM: the monitor did not answer for {0} seconds")]
    NoAnswer(u64),
    #[error("cannot speak to the monitor")]
    Client(#[from] ClientError),
    #[error("cannot hear from the jail")]
    Jail(#[source] Errno),
    #[error("cannot wait for the microVM")]
    Poll(#[source] Errno),
    #[error("cannot learn how the monitor ended")]
    Wait(#[source] Errno),
    #[error("cannot run the monitor: {0} before the guest started")]
    EndedEarly(String),
}

impl Remedy for WatchError {
    fn remedy(&self) -> Option<Cow<'static, str>> {
        matches!(self, WatchError::EndedEarly(_)).then_some("its log may say why".into())
    }
}

/// Everything there is to watch.
#[derive(Debug)]
pub struct Watch {
    /// When the jailer began, microseconds of the monotonic clock.
    pub began_us: u64,
    /// When the jail was asked for, microseconds after that.
    pub asked_us: u64,
    /// The process in the jail.
    pub pid: Pid,
    /// A descriptor of it.
    pub pidfd: OwnedFd,
    /// To the process in the jail, until it is the monitor.
    pub jail: Channel,
    /// The process that keeps what has a name.
    pub keeper: Option<Keeper>,
    /// When the control groups were made, microseconds after the jailer began.
    pub limited_us: Option<u64>,
    /// What to start; none if a client of the API does that.
    pub vm: Option<Vm>,
    /// The console.
    pub console: Console,
    /// The log.
    pub log: Relay,
    /// Where the monitor reports how the guest ended.
    pub end: OwnedFd,
    /// Signals that end this program, and SIGCONT.
    pub signals: OwnedFd,
    /// Connection to the API, if there is one already.
    pub client: Option<Client>,
    /// What ends the microVM besides: descriptors that are ready then.
    pub enders: Vec<(OwnedFd, Ender)>,
    /// How many processes had been killed at a memory limit of the caller's own group.
    pub kills_before: Option<u64>,
    /// When to end the microVM, microseconds after the jailer began.
    pub time_limit_us: Option<u64>,
    /// For `check`: what to type at the guest's first byte, after asking for the timeline.
    pub first_reply: Option<&'static [u8]>,
    /// What to tell the user once the monitor runs.
    pub announcement: String,
    /// Why it is to be given up at once.
    pub doomed: Option<AnyError>,
}

/// What became of it.
#[derive(Debug)]
pub struct Watched {
    /// How the monitor ended and what it used, or why that is not known.
    pub ended: Result<(Ended, Used), WatchError>,
    /// Why it was given up before it ran, if it was.
    pub failure: Option<AnyError>,
    /// What was seen.
    pub seen: Seen,
    /// When.
    pub times: Times,
    /// The monitor's timeline, where it was asked for.
    pub timeline: Option<Vec<u8>>,
    /// The keeper, which waits for the exit report.
    pub keeper: Option<Keeper>,
}

impl Watched {
    /// How it ended, in a word, a code and a message.
    pub fn verdict(&self) -> Verdict {
        match (&self.failure, &self.ended) {
            // Whatever else failed did so for that.
            (_, Ok((ended, _))) if self.seen.was_memory_limit(*ended) => {
                Verdict::of(*ended, &self.seen)
            }
            (Some(error), _) => Verdict::not_started(message(&**error)),
            (None, Ok((ended, _))) => Verdict::of(*ended, &self.seen),
            (None, Err(error)) => Verdict::unknown(message(error)),
        }
    }
}

/// Something that became ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ready {
    Ended,
    Signal,
    Ender(Ender),
    Jail,
    Api,
    Console(Part),
    Log(Part),
}

/// What the monitor is being asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Question {
    /// To start the guest.
    Start,
    /// When it did what.
    Timeline,
}

/// The state of the watch besides what there is to watch.
#[derive(Debug, Default)]
struct Progress {
    /// The question whose answer is awaited.
    question: Option<Question>,
    /// The monitor has been asked to start the guest, and has; or a client is to ask.
    has_started: bool,
    /// The process in the jail has said its last: it is the monitor, or gone.
    is_monitor: bool,
    failure: Option<AnyError>,
    kill_at_us: Option<u64>,
    /// The connection to the API broke; by when the process at its other end has to have said why, or
    /// ended.
    hung_up: Option<(u64, ClientError)>,
    seen: Seen,
    times: Times,
    timeline: Option<Vec<u8>>,
}

impl Watch {
    /// Watches to the end.
    pub fn run(mut self) -> Watched {
        let mut progress = Progress::default();
        progress.times.asked_us = Some(self.asked_us);
        progress.times.limited_us = self.limited_us;
        if let Some(failure) = self.doomed.take() {
            self.give_up(&mut progress, failure);
        }
        loop {
            self.advance(&mut progress);
            if let Err(error) = self.answer_first_byte(&mut progress) {
                self.give_up(&mut progress, error.into());
            }
            self.look_at_clock(&mut progress);
            match self.wait(&progress) {
                Ok(ready) => {
                    // Last, so that what was said before is heard.
                    let mut has_ended = false;
                    for what in ready {
                        has_ended |= what == Ready::Ended;
                        if let Err(failure) = self.handle(what, &mut progress) {
                            self.give_up(&mut progress, failure);
                        }
                    }
                    if has_ended {
                        break;
                    }
                }
                Err(error) => {
                    self.give_up(&mut progress, error.into());
                    break;
                }
            }
        }
        self.finish(progress)
    }

    fn now_us(&self) -> u64 {
        sys::monotonic_us().saturating_sub(self.began_us)
    }

    fn kill(&self) {
        // An error means that it has ended.
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
        if let Some(keeper) = &self.keeper {
            keeper.let_end();
        }
    }

    fn give_up(&self, progress: &mut Progress, failure: AnyError) {
        // The first reason is the reason.
        progress.failure.get_or_insert(failure);
        self.kill();
    }

    /// Has the guest started, once the jail stands.
    fn advance(&mut self, progress: &mut Progress) {
        if progress.times.jailed_us.is_none() || progress.failure.is_some() {
            return;
        }
        // The monitor has its own then: a tap or disk is not held open here.
        let (Some(vm), Some(client)) = (self.vm.take(), &mut self.client) else {
            // A client of its own configures and starts it, unless the above is under way.
            progress.has_started |= progress.question.is_none() && progress.hung_up.is_none();
            return;
        };
        match client.send("PUT", "/vm", &vm.request(), &vm.files()) {
            Ok(()) => progress.question = Some(Question::Start),
            // The process in the jail failed before it was the monitor, or the monitor at its start:
            // its own message, or how it ends, tells more than a broken connection.
            Err(error) => progress.hung_up = Some((self.now_us() + GRACE_US, error)),
        }
    }

    fn look_at_clock(&mut self, progress: &mut Progress) {
        if self.console.is_in_background() {
            self.console.look_at_terminal();
        }
        let now = self.now_us();
        if progress.kill_at_us.is_some_and(|at| now >= at) {
            progress.kill_at_us = None;
            self.kill();
        }
        if let Some((_, error)) = progress.hung_up.take_if(|(at, _)| now >= *at) {
            self.give_up(progress, WatchError::from(error).into());
        }
        if !progress.seen.timed_out && self.time_limit_us.is_some_and(|at| now >= at) {
            progress.seen.timed_out = true;
            self.kill();
        }
        if !progress.has_started && progress.failure.is_none() && now >= START_US {
            self.give_up(progress, WatchError::NoAnswer(START_US / 1_000_000).into());
        }
    }

    /// Waits until something is ready or due.
    fn wait(&self, progress: &Progress) -> Result<Vec<Ready>, WatchError> {
        let mut polled = Vec::with_capacity(12);
        let mut kinds = Vec::with_capacity(12);
        {
            let mut add = |ready: Ready, fd, flags| {
                kinds.push(ready);
                polled.push(PollFd::from_borrowed_fd(fd, flags));
            };
            add(Ready::Signal, self.signals.as_fd(), PollFlags::IN);
            for (fd, ender) in self.enders.iter().filter(|_| progress.seen.asked.is_none()) {
                let flags = match ender {
                    Ender::HangUp => PollFlags::RDHUP,
                    Ender::Parent => PollFlags::IN,
                };
                add(Ready::Ender(*ender), fd.as_fd(), flags);
            }
            if !progress.is_monitor {
                add(Ready::Jail, self.jail.as_fd(), PollFlags::IN);
            }
            if let Some(client) = self.client.as_ref().filter(|_| progress.question.is_some()) {
                let more = if client.is_sending() {
                    PollFlags::OUT
                } else {
                    PollFlags::empty()
                };
                add(Ready::Api, client.as_fd(), PollFlags::IN | more);
            }
            self.log
                .interests(&mut |part, fd, flags| add(Ready::Log(part), fd, flags));
            self.console
                .interests(&mut |part, fd, flags| add(Ready::Console(part), fd, flags));
            add(Ready::Ended, self.pidfd.as_fd(), PollFlags::IN);
        }
        match poll(&mut polled, self.patience(progress).as_ref()) {
            Err(Errno::INTR) => return Ok(Vec::new()),
            other => other.map_err(WatchError::Poll)?,
        };
        Ok(kinds
            .into_iter()
            .zip(&polled)
            .filter(|(_, fd)| !fd.revents().is_empty())
            .map(|(ready, _)| ready)
            .collect())
    }

    fn patience(&self, progress: &Progress) -> Option<Timespec> {
        let start = (!progress.has_started && progress.failure.is_none()).then_some(START_US);
        let limit = self.time_limit_us.filter(|_| !progress.seen.timed_out);
        let hung_up = progress.hung_up.as_ref().map(|(at, _)| *at);
        let look = self
            .console
            .is_in_background()
            .then(|| self.now_us() + LOOK_EVERY.as_micros() as u64);
        let due = [start, limit, progress.kill_at_us, hung_up, look]
            .into_iter()
            .flatten()
            .min()?;
        let rest = due.saturating_sub(self.now_us());
        Some(Timespec {
            tv_sec: (rest / 1_000_000) as i64,
            tv_nsec: (rest % 1_000_000 * 1000) as i64,
        })
    }

    fn handle(&mut self, ready: Ready, progress: &mut Progress) -> Result<(), AnyError> {
        match ready {
            Ready::Ended => {}
            Ready::Signal => match sys::next_signal(self.signals.as_fd()) {
                Some(libc::SIGCONT) => self.console.resume(),
                Some(signal) => self.ask_to_end(Asked::Signal(signal), progress),
                None => {}
            },
            Ready::Ender(ender) => self.ask_to_end(Asked::Ender(ender), progress),
            Ready::Jail => self.hear_jail(progress)?,
            Ready::Api => self.hear_monitor(progress)?,
            Ready::Console(part) => {
                if self.console.handle(part) {
                    self.ask_to_end(Asked::Signal(libc::SIGINT), progress);
                }
                if self.console.out.has_begun && progress.times.first_byte_us.is_none() {
                    progress.times.first_byte_us = Some(self.now_us());
                }
            }
            Ready::Log(Part::Guest) => drop(self.log.take()),
            Ready::Log(_) => drop(self.log.flush()),
        }
        Ok(())
    }

    fn ask_to_end(&self, asked: Asked, progress: &mut Progress) {
        if progress.seen.asked.is_some() || !progress.has_started {
            progress.seen.asked.get_or_insert(asked);
            return self.kill();
        }
        progress.seen.asked = Some(asked);
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::TERM);
        progress.kill_at_us = Some(self.now_us() + GRACE_US);
    }

    fn hear_jail(&mut self, progress: &mut Progress) -> Result<(), AnyError> {
        match self.jail.receive().map_err(WatchError::Jail)? {
            Some(message) if message.kind == jail::READY => {
                progress.times.jailed_us = Some(self.now_us());
                let mut files = message.files.into_iter();
                if self.client.is_none() {
                    let client = files.next().map(|fd| Client::new(UnixStream::from(fd)));
                    self.client = client.transpose().map_err(WatchError::Client)?;
                }
                if let (Some(vm), Some(tap)) = (&mut self.vm, files.next()) {
                    vm.set_tap(tap);
                }
                Ok(())
            }
            Some(message) => {
                progress.is_monitor = true;
                Err(Reported(message.text).into())
            }
            // Closed by the exec, or by the end of the process, which will be heard of.
            None => {
                progress.is_monitor = true;
                progress.times.executed_us = Some(self.now_us());
                let text = std::mem::take(&mut self.announcement);
                // A reader that does not read it does not hold up the guest.
                let _ = std::io::Write::write_all(&mut std::io::stderr(), text.as_bytes());
                Ok(())
            }
        }
    }

    fn hear_monitor(&mut self, progress: &mut Progress) -> Result<(), WatchError> {
        let Some(client) = &mut self.client else {
            return Ok(());
        };
        let answer = match client.receive() {
            Ok(Some(answer)) => answer,
            Ok(None) => return Ok(()),
            Err(error) => {
                let question = progress.question.take();
                self.client = None;
                // A guest may be over before the answer to its start is out; how it ended counts.
                // And what is not the monitor yet is about to say why it never will be.
                let is_start = question == Some(Question::Start);
                if is_start || !progress.is_monitor {
                    progress.has_started |= is_start;
                    progress.hung_up = Some((self.now_us() + GRACE_US, error));
                    return Ok(());
                }
                return Err(error.into());
            }
        };
        self.take_answer(answer, progress)
    }

    fn take_answer(&mut self, answer: Response, progress: &mut Progress) -> Result<(), WatchError> {
        match progress.question.take() {
            Some(Question::Timeline) => {
                progress.timeline = Some(answer.body);
                if let Some(reply) = self.first_reply.take() {
                    self.console.type_in(reply);
                }
            }
            _ if !answer.is_success() => return Err(WatchError::Refused(answer.fault())),
            Some(Question::Start) => {
                progress.has_started = true;
                progress.times.started_us = Some(self.now_us());
            }
            _ => {}
        }
        Ok(())
    }

    /// For `check`: the guest has written and waits for a reply.
    fn answer_first_byte(&mut self, progress: &mut Progress) -> Result<(), WatchError> {
        let is_time = progress.times.first_byte_us.is_some()
            && progress.question.is_none()
            && progress.times.started_us.is_some()
            && progress.timeline.is_none();
        if let Some(client) = self.client.as_mut().filter(|_| is_time)
            && self.first_reply.is_some()
        {
            client.send("GET", "/vm/timeline", "", &[])?;
            progress.question = Some(Question::Timeline);
        }
        Ok(())
    }

    /// The process in the jail is gone: hears its last words and has everything removed.
    fn finish(mut self, mut progress: Progress) -> Watched {
        progress.times.ended_us = Some(self.now_us());
        let ended = sys::wait(self.pid).map_err(WatchError::Wait);
        // A failure may have been told just before the end.
        while !progress.is_monitor {
            if let Err(error) = self.hear_jail(&mut progress) {
                progress.failure.get_or_insert(error);
            }
        }
        if progress.question.is_some()
            && let Err(error) = self.hear_monitor(&mut progress)
        {
            progress.failure.get_or_insert(error.into());
        }
        while self.log.take() {}
        while self.console.out.take() {}
        // A monitor that was taken over may have written anything, but this much is read.
        let mut report = [0; END_REPORT_MAX];
        let count = rustix::io::read(&self.end, &mut report).unwrap_or(0);
        progress.seen.end = report.get(..count).and_then(EndReport::parse);
        self.write_the_rest();
        self.console.close();
        if let Some(keeper) = &self.keeper {
            progress.seen.account = keeper.remove();
        }
        let kills = exclusive::kills_around().zip(self.kills_before);
        let kills = kills.map_or(0, |(now, before)| now.saturating_sub(before));
        let counted = &mut progress.seen.account.out_of_memory;
        *counted = kills.max(*counted);
        if let Ok((ended, _)) = ended
            && !progress.has_started
            && progress.failure.is_none()
            && progress.seen.asked.is_none()
        {
            let why = match ended {
                Ended::Exited(code) => format!("it ended with code {code}"),
                Ended::Killed(signal) => format!("signal {signal} ended it"),
            };
            if !progress.seen.timed_out {
                progress.failure = Some(WatchError::EndedEarly(why).into());
            }
        }
        Watched {
            ended,
            failure: progress.failure,
            seen: progress.seen,
            times: progress.times,
            timeline: progress.timeline,
            keeper: self.keeper,
        }
    }

    /// Gives slow readers of console and log a moment for what is still held for them.
    fn write_the_rest(&mut self) {
        let until = self.now_us() + LAST_WORDS.as_micros() as u64;
        while (self.log.is_holding() || self.console.out.is_holding()) && self.now_us() < until {
            if !(self.log.flush() | self.console.out.flush()) {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
    }
}
