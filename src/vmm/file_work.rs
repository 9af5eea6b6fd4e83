//! What control has the files thread do ([`crate::files`]), and what it does with the results.
//!
//! - A change of the configuration or of a device: its middle step, the opening. One change at a
//!   time: what clients ask for meanwhile waits in order ([`Vmm::is_held_back`]), but for questions,
//!   which are answered at once.
//! - The start: the kernel and the initrd are read and mapped ([`super::boot`]). One that fails meanwhile is answered
//!   when what was opened for it is closed.
//! - A line of metrics; the word about the guest's end; whatever is to be closed.
//!
//! Each has a deadline. When it passes, the client is told which file did not answer, nothing is
//! changed, and what comes of it later is closed. Before there are clients, control waits for the
//! result, for a signal or for the deadline ([`Vmm::wait_for_file`]).

use std::any::Any;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::action::{Action, Answer, Command, Outcome, Reply};
use super::boot::{Begun, Loaded};
use super::change::Change;
use super::requests::{Ready, Then};
use super::rules::State;
use super::saving::{Job, Written};
use super::{Event, Next, Vmm};
use crate::error::{ActionError, Context};
use crate::files::{Finished, Limit};
use crate::memory::fork::{Frozen, Prepared};
use crate::memory::{Memory, MemoryError};
use crate::steps::Steps;
use crate::sys::clock;
use crate::sys::fd::{self, Interest};
use crate::sys::passed::Passed;
use crate::sys::signal;
use crate::warn;

/// How long a client waits for a file: for each step, where there are several.
pub(super) const FILE_PATIENCE: Duration = Duration::from_secs(5);

/// What the files thread gives back.
pub enum FileResult {
    /// The middle step of a change.
    Opened(Box<Result<Ready, ActionError>>),
    /// The kernel and the initrd are in guest memory, or why not.
    Loaded(Box<Loaded>),
    /// A line of metrics was written, or why not; and how many were not so far.
    Written(io::Result<()>, u64),
    /// A snapshot was written, or why not.
    Saved(Box<Written>),
    /// Memory is ready for a fork, or why not.
    ForkPrepared(io::Result<Option<Prepared>>),
    /// Guest memory, frozen or not, and what is to be written then.
    ForkFrozen(Box<(Memory, Result<Frozen, MemoryError>, Job)>),
    /// The result went another way.
    Done,
}

impl fmt::Debug for FileResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FileResult")
    }
}

/// Who asked for a change.
pub(super) enum Asker {
    /// A client of the API.
    Client(Reply),
    /// The command line; the process ends when it fails.
    CommandLine(Box<dyn FnOnce(ActionError)>),
}

impl Asker {
    pub(super) fn answer(self, answer: Answer) {
        match (self, answer) {
            (Asker::Client(reply), answer) => reply.send(answer),
            (Asker::CommandLine(fail), Err(error)) => fail(error),
            (Asker::CommandLine(_), Ok(_)) => {}
        }
    }
}

impl fmt::Debug for Asker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Asker::Client(_) => "Client",
            Asker::CommandLine(_) => "CommandLine",
        })
    }
}

/// Whether a line of metrics is being written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum MetricsLine {
    #[default]
    None,
    /// It may still be written before its deadline.
    InTime,
    /// Its deadline has passed.
    Late,
}

/// What control awaits of the files thread.
#[derive(Debug)]
pub(super) enum Awaited {
    /// The opening of a change.
    Change(Asker),
    /// The loading of a start, and what the machine does then.
    Start(Asker, Box<Begun>, Then),
    /// What was loaded for a start that has failed meanwhile, to be closed before its answer: another start
    /// may need what it holds.
    Refusal(Asker, ActionError),
    /// A line of metrics, and the clients that asked for it, if any did.
    Metrics(Vec<Reply>),
    /// A snapshot that is written.
    Saving,
    /// Nothing is done with it.
    Nothing,
}

/// Work that control will wait for.
pub(super) struct UnderWay<T> {
    token: u64,
    result: Receiver<Result<T, ActionError>>,
}

impl Vmm {
    pub(super) fn is_changing(&self) -> bool {
        if self.is_saving() {
            return true;
        }
        let mut awaited = self.awaited.iter().map(|(_, awaited)| awaited);
        awaited.any(|awaited| {
            matches!(
                awaited,
                Awaited::Change(_) | Awaited::Start(..) | Awaited::Refusal(..)
            )
        })
    }

    /// Whether `action` must not overtake a change, nor be overtaken.
    fn keeps_its_turn(&self, action: &Action) -> bool {
        match action {
            Action::Ask(_) => false,
            // A start may be under way, or wait.
            Action::Pause | Action::Resume | Action::SendCtrlAltDel | Action::FlushMetrics => {
                matches!(self.state(), State::NotStarted) || self.is_saving()
            }
            _ => true,
        }
    }

    /// Whether `action` has to wait for the change that is under way.
    pub(super) fn is_held_back(&self, action: &Action) -> bool {
        (self.is_changing() || !self.held.is_empty()) && self.keeps_its_turn(action)
    }

    /// Does what has been held back, until something has to wait again.
    pub(super) fn release_held(&mut self) {
        while let Some(command) = self.held.pop_front() {
            if self.is_changing() && self.keeps_its_turn(&command.action) {
                self.held.push_front(command);
                return;
            }
            self.carry_out(command);
        }
    }

    /// Has the files of `change` opened; the rest follows when they are.
    pub(super) fn open(&mut self, change: Change<Ready>, mut passed: Passed, asker: Asker) {
        if !change.waits() {
            let ready = change.open(&mut passed);
            self.close_passed(passed);
            return self.conclude(asker, ready);
        }
        if let Some(refused) = self.files.refuses() {
            self.close_passed(passed);
            return asker.answer(Err(ActionError::of(&refused)));
        }
        let work =
            Box::new(move |_: &Steps| FileResult::Opened(Box::new(change.open(&mut passed))));
        match self.files.submit(Limit::EachStep(FILE_PATIENCE), work) {
            Ok(token) => self.awaited.push((token, Awaited::Change(asker))),
            Err(refused) => asker.answer(Err(ActionError::of(&refused))),
        }
    }

    /// Closes the descriptors that came with a request and were not claimed, if there are any.
    pub(super) fn close_passed(&mut self, passed: Passed) {
        if passed.holds_any() {
            self.close(passed);
        }
    }

    /// Closes `value` on the files thread: closing a file may wait too.
    pub(super) fn close(&mut self, value: impl Any + Send) {
        self.files.close(Box::new(value));
    }

    /// Something that the files thread was given has ended.
    pub(super) fn file_work_finished(&mut self, finished: Finished<FileResult>) -> Next {
        let Finished { token, result } = finished;
        let is_in_time = self.files.is_in_time(token);
        self.counters.late_files = self.files.late();
        let at = self.awaited.iter().position(|(known, _)| *known == token);
        let awaited = at.map(|at| self.awaited.swap_remove(at).1);
        match (result, awaited) {
            (FileResult::Written(result, missed), awaited) => {
                self.metrics_written(result, missed, awaited);
            }
            (FileResult::Opened(ready), Some(Awaited::Change(asker))) if is_in_time => {
                self.conclude(asker, *ready);
            }
            (FileResult::Loaded(loaded), Some(Awaited::Start(asker, begun, then)))
                if is_in_time =>
            {
                match self.complete_start(*begun, *loaded, then) {
                    Ok(()) => asker.answer(Ok(Outcome::Done)),
                    Err(error) if self.forget_snapshot() => self.refuse_when_closed(asker, error),
                    Err(error) => asker.answer(Err(error)),
                }
            }
            (FileResult::Saved(written), Some(Awaited::Saving)) if is_in_time => {
                self.snapshot_written(*written);
            }
            (FileResult::ForkPrepared(prepared), Some(Awaited::Saving)) => {
                self.fork_prepared(prepared);
            }
            (FileResult::ForkFrozen(frozen), Some(Awaited::Saving)) => {
                let (memory, frozen, job) = *frozen;
                if let end @ Next::Exit(_) = self.fork_frozen(memory, frozen, job) {
                    return end;
                }
            }
            (FileResult::Done, Some(Awaited::Refusal(asker, error))) => asker.answer(Err(error)),
            (FileResult::Done, _) => {}
            (loaded, Some(Awaited::Refusal(asker, error))) => {
                self.close(loaded);
                self.refuse_when_closed(asker, error);
            }
            (late, _) => self.close(late),
        }
        self.release_held();
        Next::GoOn
    }

    /// Answers once the files thread has closed what it was given until now.
    pub(super) fn refuse_when_closed(&mut self, asker: Asker, error: ActionError) {
        let closed = Box::new(|_: &Steps| FileResult::Done);
        match self.files.submit(Limit::Whole(FILE_PATIENCE), closed) {
            Ok(token) => self.awaited.push((token, Awaited::Refusal(asker, error))),
            Err(_) => asker.answer(Err(error)),
        }
    }

    /// Tells clients whose file did not answer in time.
    pub(super) fn look_at_files(&mut self, now: Instant) {
        while let Some((token, message)) = self.files.overdue(now) {
            let at = self.awaited.iter().position(|(known, _)| *known == token);
            match at.map(|at| self.awaited.swap_remove(at).1) {
                Some(Awaited::Change(asker)) => asker.answer(Err(ActionError(message))),
                Some(Awaited::Start(asker, ..)) => {
                    self.forget_snapshot();
                    asker.answer(Err(ActionError(message)));
                }
                Some(Awaited::Refusal(asker, error)) => asker.answer(Err(error)),
                Some(Awaited::Metrics(asked)) => {
                    self.metrics_line = MetricsLine::Late;
                    let next = std::mem::take(&mut self.next_metrics);
                    refuse_metrics(asked, message);
                    if !next.is_empty() {
                        self.skip_metrics(next, &BEFORE_IT);
                    }
                }
                Some(Awaited::Saving) => self.saving_hangs(message),
                Some(Awaited::Nothing) => warn!("{message}."),
                None => {}
            }
            self.release_held();
        }
    }

    /// Has a line of metrics written, if there is a place for it; `asked` are answered then. While the
    /// line before is being written they wait for the next one, which is for all that ask meanwhile.
    pub(super) fn write_metrics(&mut self, asked: Vec<Reply>) {
        let Some(sink) = &self.metrics else {
            for reply in asked {
                reply.send(Ok(Outcome::Done));
            }
            return;
        };
        match self.metrics_line {
            MetricsLine::None => {}
            MetricsLine::InTime if !asked.is_empty() => return self.next_metrics.extend(asked),
            _ => return self.skip_metrics(asked, &BEFORE_IT),
        }
        if let Some(refused) = self.files.refuses() {
            return self.skip_metrics(asked, &refused);
        }
        let (sink, report) = (Arc::clone(sink), self.report());
        let work = Box::new(move |steps: &Steps| {
            steps.begin("writing the metrics");
            // The only thread that locks it.
            let mut sink = sink.lock().unwrap_or_else(PoisonError::into_inner);
            let result = sink.write(report);
            FileResult::Written(result, sink.missed())
        });
        match self.files.submit(Limit::Whole(FILE_PATIENCE), work) {
            Ok(token) => {
                self.metrics_line = MetricsLine::InTime;
                self.awaited.push((token, Awaited::Metrics(asked)));
            }
            Err(refused) => self.skip_metrics(asked, &refused),
        }
    }

    /// Leaves a line out, and tells why.
    fn skip_metrics(&mut self, asked: Vec<Reply>, why: &dyn fmt::Display) {
        self.counters.skipped_lines = self.counters.skipped_lines.saturating_add(1);
        refuse_metrics(asked, format!("{NOT_WRITTEN}: {why}"));
    }

    fn metrics_written(&mut self, result: io::Result<()>, missed: u64, awaited: Option<Awaited>) {
        self.metrics_line = MetricsLine::None;
        self.counters.missed_lines = missed;
        let asked = match awaited {
            Some(Awaited::Metrics(asked)) => asked,
            _ => Vec::new(),
        };
        match result.context(NOT_WRITTEN) {
            Ok(()) => {
                for reply in asked {
                    reply.send(Ok(Outcome::Done));
                }
            }
            Err(ActionError(message)) => refuse_metrics(asked, message),
        }
        let next = std::mem::take(&mut self.next_metrics);
        if !next.is_empty() {
            self.write_metrics(next);
        }
    }

    /// Has `text` written to `file`, whose only purpose that is.
    pub(super) fn write_once(&mut self, what: &'static str, file: File, text: String) {
        let work = Box::new(move |steps: &Steps| {
            steps.begin(format_args!("writing {what}"));
            // A reader that is gone has the exit code.
            let _ = fd::write(file.as_raw_fd(), text.as_bytes());
            FileResult::Done
        });
        if let Ok(token) = self.files.submit(Limit::EachStep(FILE_PATIENCE), work) {
            self.awaited.push((token, Awaited::Nothing));
        }
    }

    /// Waits until all that the files thread was given has ended, or until `deadline`. What clients
    /// ask for meanwhile is refused: the process is ending.
    pub(super) fn await_files(&mut self, deadline: Instant) {
        while self.files.is_busy() {
            match self.inbox.next_until(deadline) {
                Some(Event::Files(Finished { token, .. })) => {
                    self.files.is_in_time(token);
                }
                Some(other) => drop_unclosed(other),
                None => return,
            }
        }
    }

    /// Has `work` done while there are no clients yet, and waits for it. A signal ends the process meanwhile.
    ///
    /// # Errors
    /// Which file did not answer, or what `work` gives.
    pub fn wait_for_file<T: Send + 'static>(
        &mut self,
        limit: Limit,
        work: impl FnOnce() -> Result<T, ActionError> + Send + 'static,
    ) -> Result<T, ActionError> {
        let begun = self.begin_file(limit, work)?;
        self.await_file(begun)
    }

    /// The first half of that: something else can be done before [`Vmm::await_file`].
    pub(super) fn begin_file<T: Send + 'static>(
        &mut self,
        limit: Limit,
        work: impl FnOnce() -> Result<T, ActionError> + Send + 'static,
    ) -> Result<UnderWay<T>, ActionError> {
        let (send, result) = sync_channel(1);
        let work = Box::new(move |_: &Steps| {
            let _ = send.send(work());
            FileResult::Done
        });
        let token = self.files.submit(limit, work).bare()?;
        Ok(UnderWay { token, result })
    }

    /// The second half.
    pub(super) fn await_file<T>(&mut self, begun: UnderWay<T>) -> Result<T, ActionError> {
        let UnderWay { token, result } = begun;
        loop {
            let left = self.files.deadline().map(clock::millis_until);
            let mut interests = [
                Interest::read(self.inbox.as_raw_fd()),
                Interest::read(self.signals.as_raw_fd()),
            ];
            fd::wait(&mut interests, left).context("Cannot wait for a file")?;
            if let Some(signal) = self.signals.next()
                && signal.number != signal::CONTINUED
            {
                self.end_by_signal(signal);
            }
            self.inbox.silence();
            while let Some(event) = self.inbox.next() {
                let Event::Files(Finished { token: ended, .. }) = event else {
                    continue;
                };
                self.files.is_in_time(ended);
                if ended == token {
                    let gone = |_| ActionError("The files thread has gone.".into());
                    return result.recv().map_err(gone)?;
                }
            }
            if let Some((overdue, message)) = self.files.overdue(Instant::now())
                && overdue == token
            {
                return Err(ActionError(message));
            }
        }
    }
}

const NOT_WRITTEN: &str = "The metrics could not be written, and will be with the next line";
const BEFORE_IT: &str = "the line before has not been written yet";

/// Tells the clients that asked for a line, or the log, why it was not written.
fn refuse_metrics(asked: Vec<Reply>, message: String) {
    if asked.is_empty() {
        warn!("{message}.");
    }
    for reply in asked {
        reply.send(Err(ActionError(message.clone())));
    }
}

/// Drops `event` without closing what came with it, which may wait: the process is ending.
pub(super) fn drop_unclosed(event: Event) {
    match event {
        Event::Command(command) => drop_command(command),
        Event::Files(finished) => std::mem::forget(finished),
        Event::Answer(reply) => std::mem::forget(reply),
        _ => {}
    }
}

/// The same of a command, whose client is told that the process is ending.
pub(super) fn drop_command(command: Command) {
    std::mem::forget(command.passed);
}
