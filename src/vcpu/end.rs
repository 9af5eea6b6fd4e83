//! What is said of a guest's end: the line for people, the report for programs, the exit code.

use std::io;

use kvm_bindings::{KVM_EXIT_FAIL_ENTRY, KVM_EXIT_INTERNAL_ERROR, KVM_INTERNAL_ERROR_EMULATION};

use super::{Crash, End};
use crate::exit;
use crate::sys::kvm;
use crate::wire::{self, EndReport, SOFTWARE_KVM};

/// What the guest said before it ended, by the ports it has for that.
#[derive(Clone, Copy, Debug, Default)]
pub struct GuestStatus {
    /// Its kernel panicked.
    pub panicked: bool,
    /// Its exit code.
    pub exit_code: Option<u8>,
}

impl End {
    /// Whether it is what a guest ends with on purpose.
    pub const fn is_orderly(self) -> bool {
        matches!(self, End::Reset | End::PowerOff)
    }

    /// For people: what happened to vCPU `index`. `changed` tells which mapped file was changed, if that
    /// is known.
    pub fn message(
        self,
        index: u8,
        crash: Option<&Crash>,
        status: GuestStatus,
        changed: impl FnOnce() -> Option<String>,
    ) -> String {
        let code = status.exit_code.map_or(String::new(), |code| {
            format!("; the exit code that it wrote is {code}")
        });
        if self.is_orderly() && status.panicked {
            return format!("The guest's kernel panicked, and then ended its machine{code}.");
        }
        let what = self.failure(index, changed);
        let crash = crash.map_or(String::new(), |crash| format!(": {crash}"));
        let why = match self.needs_hardware_kvm() {
            true => format!("; {SOFTWARE_KVM}"),
            false => String::new(),
        };
        format!("{what}{crash}{why}{code}.")
    }

    /// For programs.
    pub fn report(self, index: u8, crash: Option<&Crash>, status: GuestStatus) -> EndReport {
        EndReport {
            end: self.word(status.panicked),
            crash: crash.map(|crash| detail(index, self, crash)),
            guest_code: status.exit_code,
        }
    }

    /// The process's exit code for it, without the guest's own; its kernel may have told of a panic before.
    pub const fn exit_code(self, panicked: bool) -> i32 {
        match self {
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

    /// The word for it that programs are told.
    const fn word(self, panicked: bool) -> wire::End {
        match self {
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

    /// Whether the guest stopped at an instruction because this host's KVM emulates its kernel mode.
    fn needs_hardware_kvm(self) -> bool {
        let is_emulation = matches!(
            self,
            End::InternalError {
                suberror: KVM_INTERNAL_ERROR_EMULATION
            }
        );
        is_emulation && !kvm::may_be_hardware()
    }

    /// What failed, on vCPU `index`, and why; `changed` tells which mapped file was changed, if that is
    /// known.
    fn failure(self, index: u8, changed: impl FnOnce() -> Option<String>) -> String {
        let unexpected = |reason: u32, detail: String| {
            let name = kvm::exit_name(reason);
            format!("Unexpected KVM exit reason {reason} ({name}) on vCPU {index}{detail}")
        };
        match self {
            End::Reset => "The guest reset its machine".into(),
            End::PowerOff => "The guest powered its machine off".into(),
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
            End::MemoryGone => match changed() {
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
        software_kvm: end.needs_hardware_kvm(),
        last_exits: exits.map(|exit| exit.to_string()).collect(),
    }
}
