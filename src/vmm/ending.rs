//! The end of a guest: what is said of it, what is written out before the process goes, and how
//! long that may take.

use std::os::fd::AsRawFd;
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use super::file_work::FileResult;
use super::lifecycle::Input;
use super::machine::Machine;
use super::{Event, Vmm, file_work};
use crate::files::Limit;
use crate::serial::SerialEvent;
use crate::steps::Steps;
use crate::sys::fd::{self, Interest};
use crate::sys::{clock, signal};
use crate::vcpu::{End, GuestStatus};
use crate::{error, info, log, warn};

/// How long clients' last answers may take to be written. As a rule they are at once; on a busy host
/// the API thread may have to wait for a processor.
const ANSWERS_PATIENCE: Duration = Duration::from_secs(1);
/// How long the console and the log may take to be written out. At once where what takes them is read; on a busy host
/// their threads may have to wait for a processor.
const FINISH_PATIENCE: Duration = Duration::from_secs(2);

/// How long devices may take to bring into their files what they keep of these. A disk that others keep busy takes
/// more than 5 s for a sync; who ends a microVM seldom waits for more than 30.
const SETTLE_PATIENCE: Duration = Duration::from_secs(20);

impl Vmm {
    /// Has every device that keeps something of its files in memory write that to them, in a bounded time: all that
    /// was complete for the guest is there at the next start, as on a disk that is a plain file.
    fn settle_devices(&mut self) {
        let deadline = Instant::now() + SETTLE_PATIENCE;
        let token = self.new_token();
        let mut missing: Vec<String> = Vec::new();
        for device in self.configuration.devices.unsettled() {
            // What a pause does: nothing new begins, what is in flight ends, and then it settles.
            if device.pause(token).is_ok() {
                missing.push(device.name().to_owned());
            } else {
                unsettled(device.name());
            }
        }
        while !missing.is_empty() {
            match self.inbox.next_until(deadline) {
                Some(Event::Answer(reply)) if reply.token == token => {
                    if let Some(reply) = self.configuration.devices.gather(reply) {
                        missing.retain(|name| **name != *reply.device);
                    }
                }
                Some(Event::Files(finished)) => {
                    self.file_work_finished(finished);
                }
                Some(other) => file_work::drop_unclosed(other),
                None => break,
            }
        }
        missing.iter().for_each(|name| unsettled(name));
    }

    /// Writes out what the guest still had to say, as far as its place takes it; before the lines
    /// about the guest's end, since both may go to one place.
    pub(super) fn finish_console(&mut self) {
        if self.machine.as_ref().is_some_and(Machine::finish_console) {
            self.await_finished();
        }
    }

    /// Has a fork that is being written completed, as long as its files answer. What clients ask for meanwhile is refused; a
    /// signal ends the wait.
    pub(super) fn finish_fork(&mut self) {
        if self.is_writing_fork() {
            self.held.drain(..).for_each(file_work::drop_command);
        }
        while self.is_writing_fork() {
            // The bell may have been silenced with events left.
            let left = match self.inbox.is_pending() {
                true => Some(0),
                false => self.files.deadline().map(clock::millis_until),
            };
            let mut interests = [
                Interest::read(self.inbox.as_raw_fd()),
                Interest::read(self.signals.as_raw_fd()),
            ];
            if fd::wait(&mut interests, left).is_err()
                || (self.signals.next()).is_some_and(|it| it.number != signal::CONTINUED)
            {
                return;
            }
            self.inbox.silence();
            while let Some(event) = self.inbox.next() {
                match event {
                    Event::Files(finished) => {
                        self.file_work_finished(finished);
                    }
                    other => file_work::drop_unclosed(other),
                }
            }
            self.look_at_files(Instant::now());
        }
    }

    /// The end: the last line of metrics, the last answers and the last lines of the log are
    /// written, as far as that can be done in a bounded time.
    pub(super) fn finish(&mut self) {
        self.settle_devices();
        self.write_metrics(Vec::new());
        self.await_files(Instant::now() + FINISH_PATIENCE);
        // Clients that wait for a pause or an update are told that the microVM is ending.
        self.advance(Input::End);
        self.updates.clear();
        self.await_answers();
        log::flush(FINISH_PATIENCE);
    }

    /// Gives the API thread time to write what clients have been answered; those that were not
    /// are told that the microVM is ending.
    fn await_answers(&mut self) {
        self.held.drain(..).for_each(file_work::drop_command);
        while let Some(unanswered) = self.inbox.next() {
            file_work::drop_unclosed(unanswered);
        }
        let deadline = Instant::now() + ANSWERS_PATIENCE;
        while !self.pending.is_settled() && Instant::now() < deadline {
            // Nothing rings when an answer is written, and most are by now.
            let _ = fd::wait(&mut [], Some(1));
        }
    }

    fn await_finished(&mut self) {
        let deadline = Instant::now() + FINISH_PATIENCE;
        while let Some(event) = self.inbox.next_until(deadline) {
            match event {
                Event::Serial(SerialEvent::Finished) => return,
                Event::Files(finished) => {
                    self.file_work_finished(finished);
                }
                other => file_work::drop_unclosed(other),
            }
        }
    }

    /// Tells how the guest ended, in the log and on `--end-fd`, and gives the exit code for it.
    pub(super) fn guest_ended(&mut self, index: u8, end: End) -> i32 {
        let machine = self.machine.as_ref();
        let crash = machine.and_then(|machine| machine.crash(index)).copied();
        let status = machine.map_or_else(GuestStatus::default, |machine| GuestStatus {
            panicked: machine.power.has_panicked(),
            exit_code: machine.power.exit_code(),
        });
        if let Some(told) = self.end.take() {
            let report = end.report(index, crash.as_ref(), status);
            // The exit code says the most important part if nothing reads this.
            self.write_once("how the guest ended", told, report.to_string());
        }
        let message = end.message(index, crash.as_ref(), status, || self.changed_file());
        let is_orderly = end.is_orderly() && !status.panicked;
        match is_orderly {
            true => info!("{message}"),
            false => error!("{message}"),
        }
        match status.exit_code {
            Some(code) if is_orderly && self.settings.guest_exit_code => i32::from(code),
            _ => end.exit_code(status.panicked),
        }
    }

    /// The mapped file that was changed, as far as the files thread finds out in time.
    fn changed_file(&mut self) -> Option<String> {
        let mapped = self.memory()?.mapped_files();
        let (send, name) = sync_channel(1);
        let work = Box::new(move |steps: &Steps| {
            steps.begin("reading the state of the files that are mapped into the guest");
            let changed = mapped.iter().find(|file| !file.is_unchanged());
            let _ = send.send(changed.map(|file| file.name().to_owned()));
            FileResult::Done
        });
        self.files
            .submit(Limit::Whole(FINISH_PATIENCE), work)
            .ok()?;
        name.recv_timeout(FINISH_PATIENCE).ok()?
    }
}

fn unsettled(name: &str) {
    warn!(
        "The disk `{name}` does not answer: of what the guest wrote to it and did not flush, some may be missing at the \
         next start."
    );
}
