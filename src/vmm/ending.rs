//! The end of a guest: what is said of it, what is written out before the process goes, and how
//! long that may take.

use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use super::machine::Machine;
use super::{Event, Vmm};
use crate::memory::mapped::{self, NAME_MAX};
use crate::serial::SerialEvent;
use crate::sys::fd::{self, Interest};
use crate::vcpu::End;
use crate::{error, exit, info};

/// How long clients' last answers may take to be written.
const ANSWERS_PATIENCE: Duration = Duration::from_millis(50);
/// How long the console and the log may take to be written out.
const FINISH_PATIENCE: Duration = Duration::from_millis(300);

impl Vmm {
    /// The end: what the guest and the log still had to say is written out, as far as anybody reads.
    pub(super) fn finish(&mut self) {
        if self.machine().is_some_and(Machine::finish_console) {
            self.await_finished();
        }
        // There is nobody left to tell that it failed.
        let _ = self.flush_metrics();
        self.await_answers();
    }

    /// Gives the API thread time to write what clients have been answered; those that were not
    /// are told that the microVM is ending.
    fn await_answers(&self) {
        while let Some(unanswered) = self.inbox.next() {
            drop(unanswered);
        }
        let deadline = Instant::now() + ANSWERS_PATIENCE;
        while !self.owed.is_settled() && Instant::now() < deadline {
            // Nothing rings when an answer is written, and most are by now.
            let _ = fd::wait(&mut [], Some(1));
        }
    }

    fn await_finished(&self) {
        let deadline = Instant::now() + FINISH_PATIENCE;
        loop {
            while let Some(event) = self.inbox.next() {
                if matches!(event, Event::Serial(SerialEvent::Finished)) {
                    return;
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let millis = u32::try_from(left.as_millis())
                .unwrap_or(0)
                .saturating_add(1);
            let mut interests = [Interest::read(self.inbox.as_raw_fd())];
            if fd::wait(&mut interests, Some(millis)).is_err() {
                return;
            }
            self.inbox.silence();
        }
    }

    /// Says how the guest ended, in the log and to whoever asked for a word, and gives the exit code
    /// for it.
    pub(super) fn guest_ended(&self, index: u8, end: End) -> i32 {
        if let Some(told) = &self.end {
            // Who does not read it has the exit code.
            let _ = fd::write(told.as_raw_fd(), word(end).as_bytes());
        }
        match end {
            End::Reset => {
                info!("The guest reset its machine.");
                exit::GUEST_ENDED
            }
            End::PowerOff => {
                info!("The guest powered its machine off.");
                exit::GUEST_ENDED
            }
            End::TripleFault => {
                error!("The guest crashed: vCPU {index} met a triple fault.");
                exit::GUEST_CRASHED
            }
            End::InternalError { suberror, rip } => {
                let why = match suberror {
                    1 => " (an instruction that KVM can not emulate)",
                    _ => "",
                };
                error!(
                    "KVM can not run vCPU {index} any further: internal error {suberror}{why}, \
                     instruction pointer {:#x}.",
                    rip.unwrap_or(0)
                );
                exit::GUEST_NOT_RUNNABLE
            }
            End::FailedEntry(reason) => {
                error!("The processor refused to run vCPU {index}: hardware reason {reason:#x}.");
                exit::GUEST_NOT_RUNNABLE
            }
            End::MemoryGone => {
                match self.machine().and_then(|m| m.memory.changed_file()) {
                    Some(name) => error!(
                        "The file `{name}`, which is mapped into the guest, was cut short; replace \
                         such a file by rename."
                    ),
                    None => {
                        error!("vCPU {index} reached guest memory that the host can not provide.")
                    }
                }
                exit::SIGBUS
            }
            End::Unexpected(kind) => {
                error!(
                    "vCPU {index} left the guest for a reason nobody asked for: KVM exit {kind}."
                );
                exit::GUEST_NOT_RUNNABLE
            }
            End::RunFailed(errno) => {
                let cause = io::Error::from_raw_os_error(errno);
                let why = match errno {
                    libc::EAGAIN => {
                        " KVM could not make a thread that it needs: is a limit on processes \
                         (RLIMIT_NPROC, the pids of a control group) too low?"
                    }
                    _ => "",
                };
                error!("Running vCPU {index} failed: {cause}.{why}");
                exit::GUEST_NOT_RUNNABLE
            }
        }
    }
}

/// A line for programs: the exit code alone does not tell a reset from a power-off.
const fn word(end: End) -> &'static str {
    match end {
        End::Reset => "reset\n",
        End::PowerOff => "shutdown\n",
        End::TripleFault => "crash\n",
        End::MemoryGone => "memory-gone\n",
        End::InternalError { .. }
        | End::FailedEntry(_)
        | End::Unexpected(_)
        | End::RunFailed(_) => "not-runnable\n",
    }
}

/// Says which file is mapped at `address`. Runs in a signal handler.
pub(super) fn name_mapped_file(address: usize, say: &mut dyn FnMut(&str)) {
    let mut name = [0; NAME_MAX];
    let len = mapped::file_at(address, &mut name).unwrap_or(0);
    if let Some(Ok(name)) = name
        .get(..len)
        .filter(|n| !n.is_empty())
        .map(std::str::from_utf8)
    {
        say(": `");
        say(name);
        say("` was cut short; replace such a file by rename");
    }
}
