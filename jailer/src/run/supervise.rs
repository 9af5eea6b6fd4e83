//! The supervisor's watch over one microVM: from the moment its jail is asked for until it is gone.
//!
//! One loop over one set of descriptors. What has to happen in order (the jail stands, the
//! configuration is sent, the guest starts) happens as soon as each has been
//! heard of; the console, the log, signals and the time limit are served all the while.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, Signal};

use super::api::{Answer, Client};
use super::channel::Channel;
use super::console::{Console, Part, Relay};
use super::jail;
use super::keeper::Keeper;
use super::machine::{Machine, Request, rename};
use super::outcome::{Asked, ORDERLY, Seen, Times, Verdict};
use super::terminal::LOOK_EVERY;
use crate::cgroup::exclusive;
use crate::failure::{Doing, Failure};
use crate::sys::{self, Ended, Used};

/// How long a start may take, in microseconds: a big guest on huge pages takes seconds.
const START_US: u64 = 60_000_000;
/// How long the monitor may take to end when it is asked to.
const GRACE_US: u64 = 3_000_000;
/// How long the last of console and log may take to be written.
const LAST_WORDS: Duration = Duration::from_millis(500);

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
    /// Who keeps what has a name.
    pub keeper: Option<Keeper>,
    /// When the control groups were made, microseconds after the jailer began.
    pub limited_us: Option<u64>,
    /// What to start; none if a client does that.
    pub machine: Option<Machine>,
    /// The console.
    pub console: Console,
    /// The log.
    pub log: Log,
    /// Where it says how the guest ended.
    pub end: OwnedFd,
    /// Signals that end this program.
    pub signals: OwnedFd,
    /// Connection to the API, if there is one already.
    pub client: Option<Client>,
    /// What ends it besides: descriptors that are ready then, and why.
    pub enders: Vec<(OwnedFd, Asked)>,
    /// How many processes had been killed at a memory limit of the caller's own group.
    pub kills_before: Option<u64>,
    /// When to end the microVM, microseconds after the jailer began.
    pub time_limit_us: Option<u64>,
    /// What to do when the guest's first byte is there.
    pub on_first_byte: Option<FirstByte>,
    /// What to tell the user once the monitor runs.
    pub announcement: String,
    /// Why it is to be given up at once.
    pub doomed: Option<Failure>,
}

/// For `check`: ask for the monitor's timeline, then type something.
#[derive(Debug)]
pub struct FirstByte {
    /// What to type.
    pub reply: &'static [u8],
}

/// What became of it.
#[derive(Debug)]
pub struct Watched {
    /// How the monitor ended and what it used, or why nobody knows.
    pub ended: Result<(Ended, Used), Failure>,
    /// Why it was given up before it ran, if it was.
    pub failure: Option<Failure>,
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
    /// How it ended, in a word, a code and a sentence.
    pub fn verdict(&self) -> Verdict {
        match (&self.failure, &self.ended) {
            // Whatever else failed did so for that.
            (_, Ok((ended, _))) if self.seen.was_memory_limit(*ended) => {
                Verdict::of(*ended, &self.seen)
            }
            (Some(failure), _) => Verdict::not_started(failure),
            (None, Ok((ended, _))) => Verdict::of(*ended, &self.seen),
            (None, Err(failure)) => Verdict::unknown(failure),
        }
    }
}

/// The monitor's log on its way.
#[derive(Debug)]
pub struct Log {
    relay: Relay,
    /// Lines of little weight are for a file, not for a person's terminal.
    only_troubles: bool,
    line: Vec<u8>,
    /// What the user calls the files of the request that is asked just now.
    names: Vec<String>,
    /// What the user calls the files that the guest has mapped.
    images: Vec<String>,
}

/// The monitor's words about a file that is mapped into the guest. Any other file may have been
/// handed in by a client of the API, once the guest runs.
const MAPPED: &[u8] = b"was cut short; replace such a file";

impl Log {
    /// Longest line that is looked at.
    const LONGEST: usize = 4096;

    /// To where `relay` goes.
    pub fn new(relay: Relay, only_troubles: bool) -> Log {
        Log {
            relay,
            only_troubles,
            line: Vec::new(),
            names: Vec::new(),
            images: Vec::new(),
        }
    }

    fn take(&mut self) -> bool {
        let mut came = Vec::new();
        if !self.relay.look(&mut came) {
            return false;
        }
        for piece in came.split_inclusive(|&byte| byte == b'\n') {
            if self.line.len() < Self::LONGEST {
                self.line.extend_from_slice(piece);
            }
            if piece.ends_with(b"\n") {
                let line = std::mem::take(&mut self.line);
                let has = |words: &[u8]| line.windows(words.len()).any(|part| part == words);
                let is_minor = [&b":INFO]"[..], b":DEBUG]", b":TRACE]"]
                    .into_iter()
                    .any(has);
                if !(self.only_troubles && is_minor) {
                    let names = if has(MAPPED) {
                        &self.images
                    } else {
                        &self.names
                    };
                    self.relay.pass(&rename(&line, names));
                }
            }
        }
        true
    }
}

/// Something that became ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ready {
    Ended,
    Signal,
    Ender(Asked),
    Jail,
    Api,
    Console(Part),
    Log(Part),
}

/// The state of the watch besides what there is to watch.
#[derive(Debug, Default)]
struct Progress {
    requests: Option<VecDeque<Request>>,
    /// The request whose answer is awaited.
    asked: Option<String>,
    /// The monitor has been asked to start the guest, and has.
    has_started: bool,
    /// The process in the jail has said its last: it is the monitor, or gone.
    is_monitor: bool,
    failure: Option<Failure>,
    kill_at_us: Option<u64>,
    /// The connection to the API broke; by when whoever was behind it has to have said why, or
    /// ended.
    hung_up: Option<(u64, Failure)>,
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
            let advanced = self.advance(&mut progress);
            if let Err(failure) = advanced.and_then(|()| self.answer_first_byte(&mut progress)) {
                self.give_up(&mut progress, failure);
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
                Err(failure) => {
                    self.give_up(&mut progress, failure);
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

    fn give_up(&self, progress: &mut Progress, failure: Failure) {
        // The first reason is the reason.
        progress.failure.get_or_insert(failure);
        self.kill();
    }

    /// Sends what is next, if its time has come.
    fn advance(&mut self, progress: &mut Progress) -> Result<(), Failure> {
        let is_ready = progress.times.jailed_us.is_some();
        let is_over = progress.failure.is_some() || progress.hung_up.is_some();
        if !is_ready || is_over || progress.asked.is_some() {
            return Ok(());
        }
        let (Some(machine), Some(client)) = (&self.machine, &mut self.client) else {
            // A client of its own configures and starts it.
            progress.has_started = true;
            return Ok(());
        };
        let requests = progress
            .requests
            .get_or_insert_with(|| machine.requests().into());
        if let Some(request) = requests.pop_front() {
            let files = machine.files(&request);
            self.log.names = machine.names(&request);
            self.log.images = machine.images();
            match client.send(&request.line, Some(&request.body), &files) {
                Ok(()) => progress.asked = Some(request.line),
                // The process in the jail failed before it was the monitor, or the monitor at its
                // start: its own words, or how it ends, tell more than a broken connection.
                Err(failure) => progress.hung_up = Some((self.now_us() + GRACE_US, failure)),
            }
        }
        Ok(())
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
        if let Some((_, failure)) = progress.hung_up.take_if(|(at, _)| now >= *at) {
            self.give_up(progress, failure);
        }
        if !progress.seen.timed_out && self.time_limit_us.is_some_and(|at| now >= at) {
            progress.seen.timed_out = true;
            self.kill();
        }
        if !progress.has_started && progress.failure.is_none() && now >= START_US {
            let seconds = START_US / 1_000_000;
            let why = format!("the monitor did not answer for {seconds} seconds");
            self.give_up(progress, Failure::new("start the microVM", why));
        }
    }

    /// Waits until something is ready or due.
    fn wait(&self, progress: &Progress) -> Result<Vec<Ready>, Failure> {
        let mut polled = Vec::with_capacity(12);
        let mut kinds = Vec::with_capacity(12);
        {
            let mut add = |ready: Ready, fd, flags| {
                kinds.push(ready);
                polled.push(PollFd::from_borrowed_fd(fd, flags));
            };
            add(Ready::Signal, self.signals.as_fd(), PollFlags::IN);
            for (fd, asked) in self.enders.iter().filter(|_| progress.seen.asked.is_none()) {
                let flags = match asked {
                    Asked::HangUp => PollFlags::RDHUP,
                    _ => PollFlags::IN,
                };
                add(Ready::Ender(*asked), fd.as_fd(), flags);
            }
            if !progress.is_monitor {
                add(Ready::Jail, self.jail.as_fd(), PollFlags::IN);
            }
            if let Some(client) = self.client.as_ref().filter(|_| progress.asked.is_some()) {
                let more = if client.is_sending() {
                    PollFlags::OUT
                } else {
                    PollFlags::empty()
                };
                add(Ready::Api, client.as_fd(), PollFlags::IN | more);
            }
            self.log
                .relay
                .interests(&mut |part, fd, flags| add(Ready::Log(part), fd, flags));
            self.console
                .interests(&mut |part, fd, flags| add(Ready::Console(part), fd, flags));
            add(Ready::Ended, self.pidfd.as_fd(), PollFlags::IN);
        }
        match poll(&mut polled, self.patience(progress).as_ref()) {
            Err(Errno::INTR) => return Ok(Vec::new()),
            other => other.doing("wait for the microVM")?,
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

    fn handle(&mut self, ready: Ready, progress: &mut Progress) -> Result<(), Failure> {
        match ready {
            Ready::Ended => {}
            Ready::Signal => match sys::next_signal(self.signals.as_fd()) {
                Some(libc::SIGCONT) => self.console.resume(),
                Some(signal) => self.ask_to_end(Asked::Signal(signal), progress),
                None => {}
            },
            Ready::Ender(asked) => self.ask_to_end(asked, progress),
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
            Ready::Log(_) => drop(self.log.relay.flush()),
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

    fn hear_jail(&mut self, progress: &mut Progress) -> Result<(), Failure> {
        match self.jail.receive().doing("hear from the jail")? {
            Some(message) if message.kind == jail::READY => {
                progress.times.jailed_us = Some(self.now_us());
                let mut files = message.files.into_iter();
                if self.client.is_none() {
                    self.client = files.next().map(Client::new);
                }
                if let (Some(machine), Some(tap)) = (&mut self.machine, files.next()) {
                    machine.set_tap(tap);
                }
                Ok(())
            }
            Some(message) => {
                progress.is_monitor = true;
                Err(Failure::reported(message.text))
            }
            // Closed by the exec, or by the end of the process, which will be heard of.
            None => {
                progress.is_monitor = true;
                progress.times.executed_us = Some(self.now_us());
                let text = std::mem::take(&mut self.announcement);
                // Whoever does not want to read it does not hold up the guest.
                let _ = std::io::Write::write_all(&mut std::io::stderr(), text.as_bytes());
                Ok(())
            }
        }
    }

    fn hear_monitor(&mut self, progress: &mut Progress) -> Result<(), Failure> {
        let Some(client) = &mut self.client else {
            return Ok(());
        };
        let answer = match client.receive() {
            Ok(Some(answer)) => answer,
            Ok(None) => return Ok(()),
            Err(failure) => {
                progress.asked = None;
                self.client = None;
                // A guest may be over before the answer to its start is out; how it ended counts.
                // And what is not the monitor yet is about to say why it never will be.
                let is_last = progress.requests.as_ref().is_some_and(VecDeque::is_empty);
                if is_last || !progress.is_monitor {
                    progress.has_started = is_last;
                    progress.hung_up = Some((self.now_us() + GRACE_US, failure));
                    return Ok(());
                }
                return Err(failure);
            }
        };
        let line = progress.asked.take().unwrap_or_default();
        self.judge(&line, answer, progress)
    }

    fn judge(
        &mut self,
        line: &str,
        answer: Answer,
        progress: &mut Progress,
    ) -> Result<(), Failure> {
        if line.starts_with("GET /vm/timeline") {
            progress.timeline = Some(answer.body);
            if let Some(first) = self.on_first_byte.take() {
                self.console.type_in(first.reply);
            }
            return Ok(());
        }
        if !answer.is_success() {
            let fault = rename(answer.fault().as_bytes(), &self.log.names);
            let fault = String::from_utf8_lossy(&fault).into_owned();
            return Err(Failure::new("start the microVM", fault));
        }
        if progress.requests.as_ref().is_some_and(VecDeque::is_empty) {
            progress.has_started = true;
            progress.times.started_us = Some(self.now_us());
            // The monitor has its own now; a tap or disk is not held open here.
            self.machine = None;
            self.log.names.clear();
        }
        Ok(())
    }

    /// For `check`: the guest has spoken and waits for an answer.
    fn answer_first_byte(&mut self, progress: &mut Progress) -> Result<(), Failure> {
        if self.on_first_byte.is_none()
            || progress.times.first_byte_us.is_none()
            || progress.asked.is_some()
            || !progress.has_started
            || progress.timeline.is_some()
        {
            return Ok(());
        }
        if let Some(client) = &mut self.client {
            client.send("GET /vm/timeline", None, &[])?;
            progress.asked = Some("GET /vm/timeline".into());
        }
        Ok(())
    }

    /// The process in the jail is gone: hears its last words and has everything removed.
    fn finish(mut self, mut progress: Progress) -> Watched {
        progress.times.ended_us = Some(self.now_us());
        let ended = sys::wait(self.pid).doing("learn how the monitor ended");
        // A failure may have been told just before the end.
        while !progress.is_monitor {
            if let Err(failure) = self.hear_jail(&mut progress) {
                progress.failure.get_or_insert(failure);
            }
        }
        if progress.asked.is_some()
            && let Err(failure) = self.hear_monitor(&mut progress)
        {
            progress.failure.get_or_insert(failure);
        }
        while self.log.take() {}
        while self.console.out.take() {}
        // A monitor gone bad may have written anything, but it has no more to say than this.
        let mut word = [0; 16];
        let said = rustix::io::read(&self.end, &mut word).unwrap_or(0);
        let said = word.get(..said).and_then(|line| line.strip_suffix(b"\n"));
        progress.seen.told = ORDERLY
            .into_iter()
            .find(|word| said == Some(word.as_bytes()));
        self.write_the_rest();
        // Nobody listens any more on what is now removed.
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
                Ended::Exited(code) => {
                    format!("it ended with code {code} before the guest started")
                }
                Ended::Killed(signal) => {
                    format!("signal {signal} ended it before the guest started")
                }
            };
            let failure = Failure::new("run the monitor", why).remedy("its log may say why");
            progress.failure = (!progress.seen.timed_out).then_some(failure);
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
        while (self.log.relay.is_holding() || self.console.out.is_holding())
            && self.now_us() < until
        {
            if !(self.log.relay.flush() | self.console.out.flush()) {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
    }
}
