//! The end of a guest: what is said of it, what is written out before the process goes, and how
//! long that may take.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_EXIT_FAIL_ENTRY, KVM_EXIT_INTERNAL_ERROR, KVM_INTERNAL_ERROR_EMULATION};

use super::file_work::FileResult;
use super::lifecycle::Input;
use super::machine::Machine;
use super::{Event, Vmm, file_work};
use crate::files::Steps;
use crate::memory::mapped::{self, NAME_MAX};
use crate::serial::SerialEvent;
use crate::sys::fd::{self, Interest};
use crate::sys::kvm;
use crate::vcpu::{Crash, End};
use crate::wire::{self, EndReport, SOFTWARE_KVM};
use crate::{error, exit, info, log};

/// How long clients' last answers may take to be written. As a rule they are at once; on a busy host
/// the API thread may have to wait for a processor.
const ANSWERS_PATIENCE: Duration = Duration::from_secs(1);
/// How long the console and the log may take to be written out.
const FINISH_PATIENCE: Duration = Duration::from_millis(300);

impl Vmm {
    /// Writes out what the guest still had to say, as far as its place takes it; before the lines
    /// about the guest's end, since both may go to one place.
    pub(super) fn finish_console(&mut self) {
        if self.machine.as_ref().is_some_and(Machine::finish_console) {
            self.await_finished();
        }
    }

    /// The end: the last line of metrics, the last answers and the last lines of the log are
    /// written, as far as that can be done in a bounded time.
    pub(super) fn finish(&mut self) {
        self.write_metrics(None);
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
        loop {
            while let Some(event) = self.inbox.next() {
                match event {
                    Event::Serial(SerialEvent::Finished) => return,
                    Event::Files(finished) => self.file_work_finished(finished),
                    other => file_work::drop_unclosed(other),
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

    /// Tells how the guest ended, in the log and on `--end-fd`, and gives the exit code for it.
    pub(super) fn guest_ended(&mut self, index: u8, end: End) -> i32 {
        let crash = self
            .machine
            .as_ref()
            .and_then(|machine| machine.crash(index))
            .copied();
        let panicked = self
            .machine
            .as_ref()
            .is_some_and(|machine| machine.power.has_panicked());
        if let Some(told) = self.end.take() {
            let report = EndReport {
                end: word(end, panicked),
                crash: crash.map(|crash| detail(index, end, &crash)),
            };
            // The exit code says the most important part if nothing reads this.
            self.write_once("how the guest ended", told, report.to_string());
        }
        match end {
            End::Reset | End::PowerOff if panicked => {
                error!("The guest's kernel panicked, and then ended its machine.");
            }
            End::Reset => info!("The guest reset its machine."),
            End::PowerOff => info!("The guest powered its machine off."),
            _ => {
                let what = self.failure(index, end);
                let why = match needs_hardware_kvm(end) {
                    true => format!("; {SOFTWARE_KVM}"),
                    false => String::new(),
                };
                match crash {
                    Some(crash) => error!("{what}: {crash}{why}."),
                    None => error!("{what}{why}."),
                }
            }
        }
        exit_code(end, panicked)
    }

    /// The mapped file that was changed, as far as the files thread finds out in time.
    fn changed_file(&mut self) -> Option<String> {
        let mapped = self.machine.as_ref()?.memory.mapped_files();
        let (send, name) = sync_channel(1);
        let work = Box::new(move |steps: &Steps| {
            steps.begin("reading the state of the files that are mapped into the guest");
            let changed = mapped.iter().find(|file| !file.is_unchanged());
            let _ = send.send(changed.map(|file| file.name().to_owned()));
            FileResult::Done
        });
        self.files.submit(Some(FINISH_PATIENCE), work).ok()?;
        name.recv_timeout(FINISH_PATIENCE).ok()?
    }

    /// What failed, on which vCPU, and why.
    fn failure(&mut self, index: u8, end: End) -> String {
        let unexpected = |reason: u32, detail: String| {
            let name = kvm::exit_name(reason);
            format!("Unexpected KVM exit reason {reason} ({name}) on vCPU {index}{detail}")
        };
        match end {
            End::Reset | End::PowerOff => String::new(),
            End::TripleFault => format!("The guest crashed: triple fault on vCPU {index}"),
            End::InternalError { suberror } => {
                let why = match suberror {
                    KVM_INTERNAL_ERROR_EMULATION => {
                        " (emulation failure: KVM cannot emulate the instruction)"
                    }
                    _ => "",
                };
                unexpected(
                    KVM_EXIT_INTERNAL_ERROR,
                    format!(", suberror {suberror}{why}"),
                )
            }
            End::FailedEntry(reason) => unexpected(
                KVM_EXIT_FAIL_ENTRY,
                format!(", hardware entry failure reason {reason:#x}"),
            ),
            End::Unexpected(reason) => unexpected(reason, String::new()),
            End::MemoryGone => match self.changed_file() {
                Some(name) => format!(
                    "The file `{name}`, which is mapped into the guest, was cut short; replace such \
                     a file by rename. Seen on vCPU {index}"
                ),
                None => {
                    format!("vCPU {index} reached guest memory that the host cannot provide")
                }
            },
            End::RunFailed(errno) => {
                let cause = io::Error::from_raw_os_error(errno);
                let why = match errno {
                    libc::EAGAIN => {
                        ". KVM could not create a thread that it needs: is a limit on processes \
                         (RLIMIT_NPROC, the pids of a control group) too low?"
                    }
                    _ => "",
                };
                format!("KVM_RUN failed on vCPU {index}: {cause}{why}")
            }
        }
    }
}

/// Whether the guest stopped at an instruction because this host's KVM emulates its kernel mode.
fn needs_hardware_kvm(end: End) -> bool {
    let is_emulation = matches!(
        end,
        End::InternalError {
            suberror: KVM_INTERNAL_ERROR_EMULATION
        }
    );
    is_emulation && !kvm::may_be_hardware()
}

/// What programs are told of a vCPU that the guest ended on.
fn detail(vcpu: u8, end: End, crash: &Crash) -> wire::Crash {
    let bytes = crash.instruction().iter();
    let instruction: Vec<String> = bytes.map(|byte| format!("{byte:02x}")).collect();
    let exits = crash.last_exits.iter();
    wire::Crash {
        vcpu,
        rip: crash.rip,
        cr2: crash.cr2,
        suberror: match end {
            End::InternalError { suberror } => Some(suberror),
            _ => None,
        },
        instruction: instruction.join(" "),
        instruction_name: crash.instruction_name().map(Into::into),
        software_kvm: needs_hardware_kvm(end),
        last_exits: exits.map(|exit| exit.to_string()).collect(),
    }
}

/// The process's exit code for an end of the guest, whose kernel may have told of a panic before.
const fn exit_code(end: End, panicked: bool) -> i32 {
    match end {
        End::Reset | End::PowerOff | End::TripleFault if panicked => exit::GUEST_PANICKED,
        End::Reset | End::PowerOff => exit::GUEST_ENDED,
        End::TripleFault => exit::GUEST_CRASHED,
        End::MemoryGone => exit::SIGBUS,
        End::InternalError { .. }
        | End::FailedEntry(_)
        | End::Unexpected(_)
        | End::RunFailed(_) => exit::GUEST_NOT_RUNNABLE,
    }
}

/// What programs are told of `end`, after a panic of the guest's kernel if it told of one.
const fn word(end: End, panicked: bool) -> wire::End {
    match end {
        // A kernel that resets after a panic may do it by a triple fault.
        End::Reset | End::PowerOff | End::TripleFault if panicked => wire::End::Panic,
        End::Reset => wire::End::Reset,
        End::PowerOff => wire::End::Shutdown,
        End::TripleFault => wire::End::Crash,
        End::MemoryGone => wire::End::MemoryGone,
        End::InternalError { .. }
        | End::FailedEntry(_)
        | End::Unexpected(_)
        | End::RunFailed(_) => wire::End::NotRunnable,
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
