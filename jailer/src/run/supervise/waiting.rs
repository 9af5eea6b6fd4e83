//! What the supervisor waits for: descriptors, and moments.

use std::os::fd::AsFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{SPEAK, START_US, Watch, WatchError};
use crate::console::{LOOK_EVERY, Part};
use crate::error::{Failure, Step as _};
use crate::run::agent::{Agent, AgentPart};
use crate::run::spec::Ender;

/// Something that became ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ready {
    Ended,
    Signal,
    Ender(Ender),
    Jail,
    Api,
    Booted,
    Console(Part),
    Typed(Part),
    Log(Part),
    Agent(AgentPart),
}

impl Watch {
    /// When the guest has to have started, until it has.
    fn start_by_us(&self) -> Option<u64> {
        let is_starting = !self.progress.has_started && self.progress.failure.is_none();
        // What is prepared before has limits of its own.
        let times = &self.progress.times;
        let begun = times.jailed_us.or(times.asked_us).unwrap_or(0);
        is_starting.then_some(begun + START_US)
    }

    /// When to end the microVM for its time limit, until that has come.
    pub(super) fn time_limit_us(&self) -> Option<u64> {
        let limit = self.spec.options.timeout.map(|it| it.as_micros() as u64);
        limit.filter(|_| !self.progress.seen.timed_out)
    }

    pub(super) fn look_at_clock(&mut self) {
        if self.console.is_in_background() {
            self.console.look_at_terminal();
        }
        if let Some(agent) = self.agent.as_mut().filter(|it| it.is_in_background()) {
            agent.front().look_at_terminal();
        }
        let is_due = |it: &&mut Agent| it.due() == Some(Duration::ZERO);
        if let Some(agent) = self.agent.as_mut().filter(is_due) {
            agent.settle();
        }
        let now = self.now_us();
        if self.progress.kill_at_us.take_if(|at| now >= *at).is_some() {
            self.kill();
        }
        if let Some((_, error)) = self.progress.hung_up.take_if(|(at, _)| now >= *at) {
            self.give_up(Failure::new(SPEAK, error).into());
        }
        if self.time_limit_us().is_some_and(|at| now >= at) {
            self.progress.seen.timed_out = true;
            self.kill();
        }
        if self.start_by_us().is_some_and(|at| now >= at) {
            self.give_up(WatchError::NoAnswer(START_US / 1_000_000).into());
        }
    }

    /// Waits until something is ready or due.
    pub(super) fn wait(&self) -> Result<Vec<Ready>, Failure> {
        let progress = &self.progress;
        let mut polled = Vec::with_capacity(12);
        let mut kinds = Vec::with_capacity(12);
        let mut add = |ready: Ready, fd, flags| {
            kinds.push(ready);
            polled.push(PollFd::from_borrowed_fd(fd, flags));
        };
        add(Ready::Signal, self.signals.as_fd(), PollFlags::IN);
        for (fd, ender) in &self.spec.enders {
            let flags = match ender {
                _ if progress.seen.asked.is_some() => continue,
                Ender::HangUp => PollFlags::RDHUP,
                Ender::Parent | Ender::Process => PollFlags::IN,
            };
            add(Ready::Ender(*ender), fd.as_fd(), flags);
        }
        if !progress.is_monitor {
            add(Ready::Jail, self.jail.as_fd(), PollFlags::IN);
        }
        if let Some(client) = self.client.as_ref().filter(|_| progress.question.is_some()) {
            let mut flags = PollFlags::IN;
            flags.set(PollFlags::OUT, client.is_sending());
            add(Ready::Api, client.as_fd(), flags);
        }
        if progress.snapshots.is_waiting() {
            add(Ready::Booted, self.end.as_fd(), PollFlags::IN);
        }
        self.log
            .interests(|part, fd, flags| add(Ready::Log(part), fd, flags));
        self.console
            .out
            .interests(|part, fd, flags| add(Ready::Console(part), fd, flags));
        self.console.input.interests(|part, fd, flags| {
            if part == Part::Sink || !self.console.is_in_background() {
                add(Ready::Typed(part), fd, flags);
            }
        });
        if let Some(agent) = &self.agent {
            agent.interests(|part, fd, flags| add(Ready::Agent(part), fd, flags));
        }
        add(Ready::Ended, self.pidfd.as_fd(), PollFlags::IN);
        match poll(&mut polled, self.patience().as_ref()) {
            Err(rustix::io::Errno::INTR) => return Ok(Vec::new()),
            other => other.step("wait for the microVM")?,
        };
        let all = kinds.into_iter().zip(&polled);
        let ready = all.filter(|(_, fd)| !fd.revents().is_empty());
        Ok(ready.map(|(ready, _)| ready).collect())
    }

    fn patience(&self) -> Option<Timespec> {
        let progress = &self.progress;
        let is_in_background = self.console.is_in_background()
            || self.agent.as_ref().is_some_and(Agent::is_in_background);
        let look = is_in_background.then(|| self.now_us() + LOOK_EVERY.as_micros() as u64);
        let agent = self.agent.as_ref().and_then(Agent::due);
        let due = [
            // Not before it: the poll ends at a whole microsecond.
            agent.map(|it| self.now_us() + it.as_nanos().div_ceil(1000) as u64),
            self.start_by_us(),
            self.time_limit_us(),
            progress.kill_at_us,
            self.template_due_us(),
            progress.hung_up.as_ref().map(|(at, _)| *at),
            look,
        ];
        let rest = due
            .into_iter()
            .flatten()
            .min()?
            .saturating_sub(self.now_us());
        Timespec::try_from(Duration::from_micros(rest)).ok()
    }
}
