//! The supervisor's watch over one microVM: from the moment its jail is asked for until it is gone.
//!
//! One loop over one set of descriptors. What has to happen in order (the jail stands, the
//! configuration is sent, the guest starts) happens as soon as each has been heard of; the console,
//! the log, signals and the time limit are served all the while.
//!
//! `start` makes what is watched, `waiting` is what is waited for, `requests` are those of other programs,
//! `snapshot` those for snapshots, `warm` has guests that are copies of a template, `ending` is what follows when the monitor is gone.

mod ending;
mod requests;
mod snapshot;
pub mod start;
mod waiting;
mod warm;

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use mayfly::wire::{Client, ClientError, Response};
use rustix::process::{Pid, Signal};

use self::snapshot::{Snapshots, pagemap_of};
use self::waiting::Ready;
use self::warm::Making;
use super::agent::{Agent, AgentError};
use super::channel::Channel;
use super::jail;
use super::keeper::Keeper;
use super::network::namespace::Redirected;
use super::outcome::{Asked, Seen, Times, Verdict};
use super::spec::WatchSpec;
use super::spec::vm::Vm;
use super::template::Template;
use crate::console::{Console, Part, Relay};
use crate::error::{AnyError, Failure, Step as _, message};
use crate::sys::{self, Ended, Used};

/// How long a start may take, in microseconds: a big guest on huge pages takes seconds.
const START_US: u64 = 60_000_000;
/// How long the monitor may take to end when it is asked to.
const GRACE_US: u64 = 3_000_000;

const SPEAK: &str = "speak to the monitor";
const NO_SNAPSHOT: &str = "cannot take a snapshot (--snapshot-to): the guest ended before it was \
                           taken. It is taken when the guest has written to its boot timer, or on \
                           SIGUSR1: let it run until then";

/// The microVM did not start.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    #[error("cannot start the microVM: {0}")]
    Refused(String),
    #[error(
        "cannot start the microVM as a copy of a template (--template): {0}. The template was removed: run it again"
    )]
    Template(String),
    #[error("cannot start the microVM: the monitor did not answer for {0} seconds")]
    NoAnswer(u64),
    #[error("cannot run the monitor: {0} before the guest started; its log may say why")]
    EndedEarly(String),
}

/// Everything there is to watch.
#[derive(Debug)]
pub struct Watch {
    /// What was asked for.
    pub spec: WatchSpec,
    /// The process in the jail.
    pub pid: Pid,
    /// A descriptor of it.
    pub pidfd: OwnedFd,
    /// To the process in the jail, until it is the monitor.
    pub jail: Channel,
    /// The process that keeps what has a name.
    pub keeper: Option<Keeper>,
    /// The console.
    pub console: Console,
    /// The log.
    pub log: Relay,
    /// The session with the guest's agent, if it has one.
    pub agent: Option<Agent>,
    /// A template that is to be made of the guest.
    pub making: Option<Making>,
    /// The template that the guest is a copy of.
    pub template: Option<Template>,
    /// The hold on what connects the guest to an interface of a network namespace.
    pub redirected: Option<Redirected>,
    /// Where the monitor reports how the guest ended.
    pub end: OwnedFd,
    /// Signals that end this program, and SIGCONT.
    pub signals: OwnedFd,
    /// Connection to the API, if there is one already.
    pub client: Option<Client>,
    /// How many processes had been killed at a memory limit of the caller's own group.
    pub kills_before: Option<u64>,
    /// What to tell the user once the monitor runs.
    pub announcement: String,
    /// What has been seen so far.
    pub progress: Progress,
}

/// What became of it.
#[derive(Debug, Default)]
pub struct Progress {
    /// How the monitor ended and what it used, or why that is not known.
    pub ended: Option<Result<(Ended, Used), Failure>>,
    /// Why it was given up before it ran, if it was.
    failure: Option<AnyError>,
    /// What was seen.
    pub seen: Seen,
    /// When.
    pub times: Times,
    /// What the guest last wrote to its console, where it ended without running its command.
    pub console_tail: String,
    /// The monitor's timeline, where it was asked for.
    pub timeline: Option<Vec<u8>>,
    /// Snapshots to be taken.
    snapshots: Snapshots,
    /// The question whose answer is awaited.
    question: Option<Question>,
    /// The monitor has been asked to start the guest, and has; or a client is to ask.
    has_started: bool,
    /// The process in the jail has said its last: it is the monitor, or gone.
    is_monitor: bool,
    kill_at_us: Option<u64>,
    /// The connection to the API broke; by when the process at its other end has to have said why, or
    /// ended.
    hung_up: Option<(u64, ClientError)>,
}

impl Progress {
    /// How it ended, in a word, a code and a message.
    pub fn verdict(&self) -> Verdict {
        let ended = self.ended.as_ref().map(Result::as_ref);
        match (&self.failure, ended) {
            // Whatever else failed did so for that.
            (_, Some(Ok((ended, _)))) if self.seen.was_memory_limit(*ended) => {
                Verdict::of(*ended, &self.seen)
            }
            (Some(error), _) => Verdict::not_started(message(&**error)),
            (None, Some(Ok((ended, _)))) => {
                let verdict = Verdict::of(*ended, &self.seen);
                match &self.snapshots.outcome {
                    Some(outcome) => Verdict::of_snapshot(outcome),
                    None if verdict.code == 0 && self.snapshots.is_missing() => {
                        Verdict::of_snapshot(&Err(NO_SNAPSHOT.into()))
                    }
                    None => verdict,
                }
            }
            (None, Some(Err(error))) => Verdict::unknown(message(error)),
            (None, None) => Verdict::unknown("the microVM was not watched to its end".into()),
        }
    }
}

/// What the monitor is being asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Question {
    /// To start the guest.
    Start,
    /// When it did what.
    Timeline,
    /// To pause, to write a snapshot, to resume.
    Snapshot,
}

impl Watch {
    /// Watches to the end. The keeper, if there is one, waits for the exit report then.
    pub fn run(mut self) -> (Progress, Option<Keeper>) {
        loop {
            self.advance();
            if let Err(error) = self.answer_first_byte() {
                self.give_up(error.into());
            }
            self.take_snapshot_when_due();
            self.make_template_when_due();
            self.answer_requests();
            self.tell_ready();
            self.end_with_command();
            if self.serve() {
                break;
            }
        }
        self.finish();
        (self.progress, self.keeper)
    }

    /// Waits once, and serves what is ready; whether the monitor has ended.
    fn serve(&mut self) -> bool {
        self.look_at_clock();
        let ready = match self.wait() {
            Ok(ready) => ready,
            Err(error) => {
                self.give_up(error.into());
                return true;
            }
        };
        for &what in &ready {
            if let Err(failure) = self.handle(what) {
                self.give_up(failure);
            }
        }
        // Last, so that what was said before is heard.
        ready.contains(&Ready::Ended)
    }

    fn now_us(&self) -> u64 {
        sys::monotonic_us().saturating_sub(self.spec.began_us)
    }

    fn kill(&self) {
        // An error means that it has ended.
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
        if let Some(keeper) = &self.keeper {
            keeper.let_end();
        }
    }

    /// Ends it, because of `failure`.
    pub fn give_up(&mut self, failure: AnyError) {
        // The first reason is the reason.
        self.progress.failure.get_or_insert(failure);
        self.kill();
    }

    /// Has the guest started, once the jail stands.
    fn advance(&mut self) {
        if self.progress.times.jailed_us.is_none() || self.progress.failure.is_some() {
            return;
        }
        let Some(client) = &mut self.client else {
            return;
        };
        let spec = &mut self.spec;
        // Before it is the monitor, its table of pages is another.
        if !self.progress.is_monitor && spec.vm.as_ref().is_some_and(Vm::may_record) {
            return;
        }
        // The monitor has its own then: a tap or disk is not held open here.
        let Some(mut vm) = spec.vm.take() else {
            return self.leave_to_client();
        };
        if vm.may_record() {
            vm.set_pagemap(pagemap_of(self.pid));
        }
        let (body, files) = vm.into_request();
        let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        match client.send("PUT", "/vm", &body, &files) {
            Ok(()) => self.progress.question = Some(Question::Start),
            // The process in the jail failed before it was the monitor, or the monitor at its start:
            // its own message, or how it ends, tells more than a broken connection.
            Err(error) => self.progress.hung_up = Some((self.now_us() + GRACE_US, error)),
        }
    }

    /// Unless it is under way here, a client of its own configures and starts the guest.
    fn leave_to_client(&mut self) {
        let progress = &mut self.progress;
        let is_idle = progress.question.is_none() && progress.hung_up.is_none();
        progress.has_started |= self.spec.vm.is_none() && is_idle;
    }

    /// Ends the machine once its command has ended, or its agent said or did what ends it.
    fn end_with_command(&mut self) {
        let status = self.agent.as_ref().and_then(Agent::status);
        if let Some(status) = status.filter(|_| self.progress.seen.command.is_none()) {
            self.progress.seen.command = Some(status.code());
            let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::TERM);
            self.progress.kill_at_us = Some(self.now_us() + GRACE_US);
        }
    }

    /// What the agent said or did ends the machine.
    fn end_for(&mut self, error: AgentError) {
        let text = message(&error);
        self.progress.seen.agent_fault.get_or_insert(text);
        self.kill();
    }

    /// Passes a signal to the command, if there is one; whether it was. One that asks for the end, and comes
    /// for the third time, ends the machine.
    fn signal_command(&mut self, signal: i32) -> bool {
        let Some(agent) = self.agent.as_mut().filter(|agent| agent.is_running()) else {
            return false;
        };
        if agent.front().is_asked_too_often(signal) {
            return false;
        }
        agent.front().signal(signal);
        agent.settle();
        true
    }

    fn handle(&mut self, ready: Ready) -> Result<(), AnyError> {
        match ready {
            Ready::Ended => {}
            Ready::Signal => match sys::next_signal(self.signals.as_fd()) {
                Some(libc::SIGCONT) => {
                    self.console.resume();
                    if let Some(agent) = &mut self.agent {
                        agent.front().resume();
                        agent.settle();
                    }
                }
                Some(libc::SIGWINCH) => {
                    if let Some(agent) = &mut self.agent {
                        agent.front().resize();
                        agent.settle();
                    }
                }
                Some(libc::SIGUSR1) if self.progress.snapshots.is_wanted => {
                    self.progress.snapshots.is_due = true;
                }
                Some(signal) if self.signal_command(signal) => {}
                Some(signal) => self.ask_to_end(Asked::Signal(signal)),
                None => {}
            },
            Ready::Agent(part) => {
                if let Some(Err(error)) = self.agent.as_mut().map(|agent| agent.handle(part)) {
                    self.end_for(error);
                }
            }
            Ready::Ender(ender) => self.ask_to_end(Asked::Ender(ender)),
            Ready::Jail => self.hear_jail()?,
            Ready::Api => self.hear_monitor()?,
            Ready::Booted => self.progress.snapshots.hear(self.end.as_fd()),
            Ready::Console(Part::Source) => {
                self.console.out.take();
                if self.console.out.has_begun {
                    let now = self.now_us();
                    self.progress.times.first_byte_us.get_or_insert(now);
                }
            }
            Ready::Console(Part::Sink) => drop(self.console.out.flush()),
            Ready::Typed(Part::Source) if self.console.take_typed() => self.ask_to_end(Asked::User),
            Ready::Typed(Part::Source) => {}
            Ready::Typed(Part::Sink) => drop(self.console.input.flush()),
            Ready::Log(Part::Source) => drop(self.log.take()),
            Ready::Log(Part::Sink) => drop(self.log.flush()),
        }
        Ok(())
    }

    fn ask_to_end(&mut self, asked: Asked) {
        // A guest that has written something runs, whatever its monitor has answered so far.
        let runs = self.progress.has_started || self.progress.times.first_byte_us.is_some();
        if self.progress.seen.asked.is_some() || !runs {
            self.progress.seen.asked.get_or_insert(asked);
            return self.kill();
        }
        self.progress.seen.asked = Some(asked);
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::TERM);
        self.progress.kill_at_us = Some(self.now_us() + GRACE_US);
    }

    fn hear_jail(&mut self) -> Result<(), AnyError> {
        match self.jail.receive().step("hear from the jail")? {
            Some(message) if message.kind == jail::READY => {
                self.progress.times.jailed_us = Some(self.now_us());
                let mut files = message.files.into_iter();
                if self.client.is_none() {
                    let client = files.next().map(|fd| Client::new(UnixStream::from(fd)));
                    self.client = client.transpose().step(SPEAK)?;
                }
                if let (Some(vm), Some(tap)) = (&mut self.spec.vm, files.next()) {
                    vm.set_tap(tap);
                }
                Ok(())
            }
            Some(message) => {
                self.progress.is_monitor = true;
                Err(message.text.into())
            }
            // Closed by the exec, or by the end of the process, which will be heard of.
            None => {
                self.progress.is_monitor = true;
                self.progress.times.executed_us = Some(self.now_us());
                let text = std::mem::take(&mut self.announcement);
                // A reader that does not read it does not hold up the guest.
                let _ = std::io::Write::write_all(&mut std::io::stderr(), text.as_bytes());
                Ok(())
            }
        }
    }

    fn hear_monitor(&mut self) -> Result<(), AnyError> {
        let Some(client) = &mut self.client else {
            return Ok(());
        };
        let progress = &mut self.progress;
        match client.receive() {
            Ok(Some(answer)) => self.take_answer(answer),
            Ok(None) => Ok(()),
            Err(error) => {
                let question = progress.question.take();
                self.client = None;
                // A guest may be over before the answer to its start is out; how it ended counts.
                // And what is not the monitor yet is about to say why it never will be.
                // The same where it ends while it is to give a snapshot.
                let is_start = question == Some(Question::Start);
                let is_snapshot = question == Some(Question::Snapshot);
                if !is_start && !is_snapshot && progress.is_monitor {
                    return Err(Failure::new(SPEAK, error).into());
                }
                progress.has_started |= is_start;
                self.progress.hung_up = Some((self.now_us() + GRACE_US, error));
                Ok(())
            }
        }
    }

    fn take_answer(&mut self, answer: Response) -> Result<(), AnyError> {
        match self.progress.question.take() {
            Some(Question::Timeline) => {
                self.progress.timeline = Some(answer.body);
                if let Some(reply) = self.spec.first_reply.take() {
                    self.console.input.pass_on(reply);
                }
            }
            Some(Question::Snapshot) => self.progress.snapshots.answer = Some(answer),
            _ if !answer.is_success() => {
                let fault = answer.fault();
                return Err(match &self.template {
                    Some(template) => {
                        template.discard();
                        WatchError::Template(fault)
                    }
                    None => WatchError::Refused(fault),
                }
                .into());
            }
            Some(Question::Start) => {
                self.progress.has_started = true;
                self.progress.times.started_us = Some(self.now_us());
            }
            None => {}
        }
        Ok(())
    }

    /// For `check`: the guest has written and waits for a reply.
    fn answer_first_byte(&mut self) -> Result<(), Failure> {
        let progress = &mut self.progress;
        let is_time = self.spec.first_reply.is_some()
            && progress.times.first_byte_us.is_some()
            && progress.times.started_us.is_some()
            && progress.question.is_none()
            && progress.timeline.is_none();
        if let Some(client) = self.client.as_mut().filter(|_| is_time) {
            client.send("GET", "/vm/timeline", "", &[]).step(SPEAK)?;
            progress.question = Some(Question::Timeline);
        }
        Ok(())
    }
}
