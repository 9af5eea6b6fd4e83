//! What follows when the monitor is gone: its last words, how it ended, and what readers have not taken yet.

use std::os::fd::AsFd;
use std::time::Duration;

use mayfly::wire::EndReport;
use mayfly::wire::limits::END_REPORT_MAX;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{Watch, WatchError};
use crate::cgroup::exclusive;
use crate::error::Step as _;
use crate::sys::{self, Ended};

/// How long clients of a guest that ended may take to read what is held for them.
const CLIENTS_US: u64 = 3_000_000;
/// How long the last of console and log may take to be written.
const LAST_WORDS: Duration = Duration::from_millis(500);

impl Watch {
    /// The process in the jail is gone: hears its last words and has everything removed.
    pub(super) fn finish(&mut self) {
        self.progress.times.ended_us = Some(self.now_us());
        let ended = sys::wait(self.pid).step("learn how the monitor ended");
        // A failure may have been told just before the end.
        while !self.progress.is_monitor {
            if let Err(error) = self.hear_jail() {
                self.progress.failure.get_or_insert(error);
            }
        }
        if self.progress.times.executed_us.is_some() {
            // Its whole life may have been shorter than the wait here.
            self.leave_to_client();
        }
        if self.progress.question.is_some()
            && let Err(error) = self.hear_monitor()
        {
            self.progress.failure.get_or_insert(error);
        }
        while self.log.take() {}
        while self.console.out.take() {}
        self.hear_the_rest();
        // A monitor that was taken over may have written anything, but this much is read.
        let mut report = [0; END_REPORT_MAX];
        let count = rustix::io::read(&self.end, &mut report).unwrap_or(0);
        let heard = &mut self.progress.snapshots.heard;
        heard.extend(report.get(..count).unwrap_or_default());
        self.progress.seen.end = EndReport::parse(heard);
        self.write_the_rest();
        self.console.close();
        self.redirected = None;
        // A socket that is still held here would not count as dead.
        self.spec.vm = None;
        let progress = &mut self.progress;
        if let Some(keeper) = &self.keeper {
            progress.seen.usage = keeper.remove();
        }
        let kills = exclusive::kills_around().zip(self.kills_before);
        let kills = kills.map_or(0, |(now, before)| now.saturating_sub(before));
        let counted = &mut progress.seen.usage.out_of_memory;
        *counted = kills.max(*counted);
        let is_expected = progress.seen.asked.is_some() || progress.seen.timed_out;
        if !progress.has_started && !is_expected && progress.failure.is_none() {
            let why = match &ended {
                Ok((Ended::Exited(code), _)) => Some(format!("it ended with code {code}")),
                Ok((Ended::Killed(signal), _)) => Some(format!("signal {signal} ended it")),
                Err(_) => None,
            };
            progress.failure = why.map(|why| WatchError::EndedEarly(why).into());
        }
        progress.ended = Some(ended);
    }

    /// What the agent said before the machine ended, and what of the command's output readers have not taken
    /// yet: they have all the time they need, up to the time limit or a signal.
    fn hear_the_rest(&mut self) {
        let Some(mut agent) = self.agent.take() else {
            return;
        };
        if self.progress.seen.agent_fault.is_none() {
            if let Err(error) = agent.hear_the_rest() {
                self.end_for(error);
            }
            let status = agent.status().map(|status| status.code());
            self.progress.seen.command = self.progress.seen.command.or(status);
        }
        agent.dismiss_clients();
        if !agent.is_ready() {
            self.progress.console_tail = self.console.out.tail();
        }
        let clients_until = self.now_us() + CLIENTS_US;
        while self.progress.failure.is_none() {
            let is_holding = agent.front().is_holding();
            let awaits_clients =
                self.now_us() < clients_until && agent.clients().held().next().is_some();
            if !is_holding && !awaits_clients {
                break;
            }
            let due = [
                self.time_limit_us(),
                awaits_clients.then_some(clients_until),
            ];
            if self.time_limit_us().is_some_and(|at| self.now_us() >= at) {
                break;
            }
            let limit = due.into_iter().flatten().min();
            let limit = limit.map(|at| at.saturating_sub(self.now_us()));
            let limit = limit.and_then(|us| Timespec::try_from(Duration::from_micros(us)).ok());
            let mut polled = vec![PollFd::from_borrowed_fd(
                self.signals.as_fd(),
                PollFlags::IN,
            )];
            agent.holders(awaits_clients, |fd| {
                polled.push(PollFd::from_borrowed_fd(fd, PollFlags::OUT));
            });
            let has_waited = poll(&mut polled, limit.as_ref()).is_ok();
            let is_signal = has_waited && !polled[0].revents().is_empty();
            let signal = is_signal
                .then(|| sys::next_signal(self.signals.as_fd()))
                .flatten();
            if signal.is_some_and(|it| !matches!(it, libc::SIGCONT | libc::SIGWINCH)) {
                break;
            }
            agent.front().flush_all();
            agent.clients().flush_all();
        }
        agent.front().close();
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
