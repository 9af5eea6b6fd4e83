//! How a microVM ended: one word, one exit code and one message for each way, and what the report says.

pub mod report;

use std::time::{SystemTime, UNIX_EPOCH};

use mayfly::wire::{EndReport, SOFTWARE_KVM, exit};
use serde::Serialize;
use serde_json::{Value, json};

use super::spec::Ender;
use crate::cgroup::exclusive::Usage;
use crate::sys::{self, Ended, Used};

/// The microVM could not be started.
pub const NOT_STARTED: i32 = 1;
/// There is no snapshot of it, which was asked for.
const NO_SNAPSHOT: i32 = 1;
/// A command could not be run, or is not known to have been, as of container engines.
const NO_COMMAND: i32 = 125;
/// The jailer could not learn how it ended.
const UNKNOWN: i32 = 1;
/// As timeout(1) has it.
const TIME_LIMIT: i32 = 124;
/// Above the monitor's own codes.
const MEMORY_LIMIT: i32 = 164;

/// What asked for the end of the microVM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// This signal.
    Signal(i32),
    /// The user, who left the console by its keys.
    User,
    /// The parent, or a descriptor.
    Ender(Ender),
}

/// What was seen besides the monitor's exit.
#[derive(Debug, Default)]
pub struct Seen {
    /// What the monitor reported of the guest's end.
    pub end: Option<EndReport>,
    /// `--timeout` came.
    pub timed_out: bool,
    /// What asked for the end.
    pub asked: Option<Asked>,
    /// What the control groups counted.
    pub usage: Usage,
    /// The exit code of the guest's command.
    pub command: Option<i32>,
    /// Of a guest that may be a copy of a template: whether it is, and what there is to say of that.
    pub copied: Option<(bool, String)>,
    /// Why the guest was ended for what its agent said or did.
    pub agent_fault: Option<String>,
}

impl Seen {
    /// Whether the kernel ended a monitor that ended like this for want of memory in its group.
    pub fn was_memory_limit(&self, ended: Ended) -> bool {
        ended == Ended::Killed(libc::SIGKILL) && self.usage.out_of_memory > 0
    }
}

/// How it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// For programs.
    pub word: &'static str,
    /// For shells.
    pub code: i32,
    /// For people; empty when there is nothing to say.
    pub message: String,
}

impl Verdict {
    fn new(word: &'static str, code: i32, message: impl Into<String>) -> Verdict {
        Verdict {
            word,
            code,
            message: message.into(),
        }
    }

    /// From all that is known.
    pub fn of(ended: Ended, seen: &Seen) -> Verdict {
        // The machine was ended for that, in whichever way it then ended.
        if let Some(code) = seen.command {
            return Verdict::new("exited", code, "");
        }
        if let Some(fault) = &seen.agent_fault {
            return Verdict::new("agent-failed", NO_COMMAND, fault);
        }
        if seen.timed_out {
            let text = "the time limit (--timeout) ended the microVM";
            return Verdict::new("time-limit", TIME_LIMIT, text);
        }
        if let Some(asked) = seen.asked {
            // What is no signal counts as the one that a terminal sends in that case.
            let (signal, text) = match asked {
                Asked::Signal(signal) => (
                    signal,
                    format!("signal {signal} asked for the end of the microVM"),
                ),
                Asked::User => (
                    libc::SIGINT,
                    "Ctrl-A X was typed, which ends the microVM".into(),
                ),
                Asked::Ender(Ender::Parent) => (
                    libc::SIGHUP,
                    "the process that started mayfly-jailer ended (--with-parent)".into(),
                ),
                Asked::Ender(Ender::Process) => (
                    libc::SIGHUP,
                    "the process of the passed descriptor ended (--end-with-fd)".into(),
                ),
                Asked::Ender(Ender::HangUp) => (
                    libc::SIGHUP,
                    "the other end of the descriptor was closed (--end-with-fd)".into(),
                ),
            };
            return Verdict::new("stopped", 128 + signal, text);
        }
        if seen.was_memory_limit(ended) {
            let text = "the memory limit of its control group ended the microVM";
            return Verdict::new("memory-limit", MEMORY_LIMIT, text);
        }
        let signal = match ended {
            Ended::Exited(code) => return Verdict::of_code(code, seen),
            Ended::Killed(libc::SIGSYS) => return Verdict::of_code(exit::BAD_SYSCALL, seen),
            Ended::Killed(signal) => signal,
        };
        let text = format!("signal {signal} ended the monitor");
        match signal {
            libc::SIGSEGV | libc::SIGBUS | libc::SIGILL | libc::SIGABRT => {
                Verdict::new("fault", 128 + signal, text + ": this is a bug in it")
            }
            _ => Verdict::new("killed", 128 + signal, text),
        }
    }

    fn of_code(code: i32, seen: &Seen) -> Verdict {
        let (word, text) = match code {
            exit::GUEST_ENDED => return Verdict::orderly(seen),
            exit::ERROR => ("error", "the monitor failed; its log says why".into()),
            exit::BAD_SYSCALL => (
                "seccomp",
                "the monitor made a system call that its filter denies".into(),
            ),
            exit::SIGBUS => (
                "file-cut-short",
                "a file mapped into the guest was cut short".into(),
            ),
            exit::GUEST_CRASHED => ("crash", crash_text(seen)),
            exit::GUEST_PANICKED => ("panic", "the guest's kernel panicked".into()),
            exit::GUEST_NOT_RUNNABLE => ("not-runnable", stop_text(seen)),
            exit::WORKER_FAILED => ("worker-failed", "a thread of the monitor failed".into()),
            exit::BAD_LOG_LEVEL | exit::BAD_ARGUMENTS => (
                "refused",
                "the monitor did not understand its arguments: do the versions match?".into(),
            ),
            exit::SIGSEGV | exit::SIGILL | exit::PANIC => (
                "fault",
                "internal error of the monitor (panic): this is a bug in it".into(),
            ),
            129..=192 => (
                "killed",
                format!("the monitor ended with code {code}, as for a signal or limit"),
            ),
            _ => (
                "fault",
                format!("the monitor ended with code {code}, which it does not have"),
            ),
        };
        Verdict::new(word, code, text)
    }

    /// The guest reset or powered off its machine: with the code that it wrote, if it wrote one.
    fn orderly(seen: &Seen) -> Verdict {
        let report = seen.end.as_ref();
        let report = report.filter(|report| report.end.is_orderly());
        let word = report.map_or("ended", |report| report.end.word());
        let code = report.and_then(|report| report.guest_code);
        Verdict::new(word, code.map_or(exit::GUEST_ENDED, i32::from), "")
    }

    /// The guest was ended because there is a snapshot of it, or none could be taken.
    pub fn of_snapshot(outcome: &Result<String, String>) -> Verdict {
        match outcome {
            Ok(text) => Verdict::new("snapshot", 0, text),
            Err(why) => Verdict::new("no-snapshot", NO_SNAPSHOT, why),
        }
    }

    /// The same where a command was to run, whose exit codes stay apart from those of this program; and a
    /// guest that ended in order, without an end of its command, did not run it.
    pub fn with_command(mut self, has_command: bool) -> Verdict {
        if has_command && (self.word == "not-started" || self.word == "unknown") {
            self.code = NO_COMMAND;
        }
        if has_command && self.code == 0 && self.word != "exited" {
            self.code = NO_COMMAND;
            self.message = "the guest ended before its command did".into();
        }
        self
    }

    /// How the monitor ended could not be found out.
    pub fn unknown(why: String) -> Verdict {
        Verdict::new("unknown", UNKNOWN, why)
    }

    /// The supervisor was killed, and the monitor ended with it; the keeper reports that.
    pub fn jailer_killed() -> Verdict {
        let text = "mayfly-jailer was killed, and the microVM ended with it";
        Verdict::new("jailer-killed", 128 + libc::SIGKILL, text)
    }

    /// It never ran.
    pub fn not_started(why: String) -> Verdict {
        Verdict::new("not-started", NOT_STARTED, why)
    }
}

/// With what is known of the vCPU.
fn crash_text(seen: &Seen) -> String {
    let text = "the guest crashed (triple fault)";
    let crash = seen.end.as_ref().and_then(|report| report.crash.as_ref());
    match crash.and_then(|crash| Some((crash, crash.rip?))) {
        Some((crash, rip)) => format!("{text} on vCPU {}, RIP {rip:#x}", crash.vcpu),
        None => text.to_owned(),
    }
}

/// The same for a guest that KVM cannot run: with the instruction, and why the host lacks it.
fn stop_text(seen: &Seen) -> String {
    let mut text = "KVM cannot run the guest any further".to_owned();
    let Some(crash) = seen.end.as_ref().and_then(|report| report.crash.as_ref()) else {
        return text;
    };
    if let Some(rip) = crash.rip {
        text += &format!(": vCPU {}, RIP {rip:#x}", crash.vcpu);
    }
    if !crash.instruction.is_empty() {
        text += &format!(", instruction bytes {}", crash.instruction);
    }
    if let Some(name) = &crash.instruction_name {
        text += &format!(" ({name})");
    }
    if crash.software_kvm {
        text += &format!("; {SOFTWARE_KVM}");
    }
    text
}

/// When what happened, in microseconds since the jailer began.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Times {
    /// Everything was opened, the jail is asked for.
    pub asked_us: Option<u64>,
    /// The jail stands.
    pub jailed_us: Option<u64>,
    /// The control groups hold the monitor.
    pub limited_us: Option<u64>,
    /// The monitor runs.
    pub executed_us: Option<u64>,
    /// The monitor has started the guest.
    pub started_us: Option<u64>,
    /// The guest's first byte on the console.
    pub first_byte_us: Option<u64>,
    /// The monitor is gone.
    pub ended_us: Option<u64>,
}

impl Times {
    /// Of what ends now and began then.
    pub fn ended_now(began_us: u64) -> Times {
        Times {
            ended_us: Some(sys::monotonic_us().saturating_sub(began_us)),
            ..Times::default()
        }
    }
}

/// What the report says.
pub fn facts(
    id: &str,
    verdict: &Verdict,
    ended: Option<(Ended, Used)>,
    seen: &Seen,
    times: &Times,
) -> Value {
    let began = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let wall_us = times.ended_us.unwrap_or(0);
    let (exit_code, signal) = match ended {
        Some((Ended::Exited(code), _)) => (Some(code), None),
        Some((Ended::Killed(signal), _)) => (None, Some(signal)),
        None => (None, None),
    };
    let used = ended.map(|(_, used)| used).unwrap_or_default();
    let crash = seen.end.as_ref().and_then(|report| report.crash.as_ref());
    let guest_code = seen.end.as_ref().and_then(|report| report.guest_code);
    json!({
        "id": id,
        "ended": verdict.word,
        "exit_code": verdict.code,
        "guest_code": guest_code,
        "sentence": verdict.message,
        "monitor": { "exit_code": exit_code, "signal": signal },
        "ended_at_unix_ms": began.as_millis() as u64,
        "wall_us": wall_us,
        "cpu_us": used.cpu_us,
        "peak_memory_bytes": seen.usage.peak_memory.unwrap_or(used.peak_memory),
        "peak_memory_by": if seen.usage.peak_memory.is_some() { "cgroup" } else { "process" },
        "out_of_memory_kills": seen.usage.out_of_memory,
        "crash": crash,
        "template": seen.copied.as_ref().map(|(is_copy, note)| json!({ "used": is_copy, "note": note })),
        "times": times,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(ended: Ended, seen: Seen) -> (&'static str, i32) {
        let verdict = Verdict::of(ended, &seen);
        (verdict.word, verdict.code)
    }

    #[test]
    fn every_end_has_its_word_and_code() {
        let seen = Seen::default;
        let out_of_memory = || Seen {
            usage: Usage {
                out_of_memory: 1,
                peak_memory: None,
            },
            ..seen()
        };
        let told = |text: &str| Seen {
            end: EndReport::parse(text.as_bytes()),
            ..seen()
        };
        let cases = [
            (Ended::Exited(0), told("shutdown\n"), ("shutdown", 0)),
            (Ended::Exited(0), told("reset\n"), ("reset", 0)),
            (Ended::Exited(0), told("crash\n"), ("ended", 0)),
            (Ended::Exited(0), told(&with_code("reset", 7)), ("reset", 7)),
            (
                Ended::Exited(0),
                told(&with_code("shutdown", 165)),
                ("shutdown", 165),
            ),
            (
                Ended::Exited(0),
                told(&with_code("shutdown", 0)),
                ("shutdown", 0),
            ),
            // Where the word and the exit code contradict each other, the exit code counts.
            (Ended::Exited(0), told(&with_code("crash", 7)), ("ended", 0)),
            (
                Ended::Exited(160),
                told(&with_code("crash", 7)),
                ("crash", 160),
            ),
            (
                Ended::Exited(165),
                told(&with_code("panic", 7)),
                ("panic", 165),
            ),
            (
                Ended::Exited(160),
                told(&with_code("reset", 7)),
                ("crash", 160),
            ),
            (
                Ended::Killed(9),
                told(&with_code("reset", 7)),
                ("killed", 137),
            ),
            (Ended::Exited(0), seen(), ("ended", 0)),
            (Ended::Exited(1), seen(), ("error", 1)),
            (Ended::Exited(148), seen(), ("seccomp", 148)),
            (Ended::Exited(160), seen(), ("crash", 160)),
            (Ended::Exited(165), seen(), ("panic", 165)),
            (Ended::Exited(161), seen(), ("not-runnable", 161)),
            (Ended::Exited(162), seen(), ("worker-failed", 162)),
            (Ended::Exited(163), seen(), ("fault", 163)),
            (Ended::Exited(143), seen(), ("killed", 143)),
            (Ended::Exited(7), seen(), ("fault", 7)),
            (Ended::Killed(9), seen(), ("killed", 137)),
            (Ended::Killed(11), seen(), ("fault", 139)),
            (Ended::Killed(31), seen(), ("seccomp", 148)),
            (Ended::Killed(9), out_of_memory(), ("memory-limit", 164)),
            (Ended::Exited(0), out_of_memory(), ("ended", 0)),
            (
                Ended::Killed(9),
                Seen {
                    timed_out: true,
                    ..seen()
                },
                ("time-limit", 124),
            ),
            (
                Ended::Exited(143),
                Seen {
                    asked: Some(Asked::Signal(15)),
                    ..seen()
                },
                ("stopped", 143),
            ),
        ];
        let left = Seen {
            asked: Some(Asked::User),
            ..seen()
        };
        let verdict = Verdict::of(Ended::Exited(143), &left);
        assert_eq!((verdict.word, verdict.code), ("stopped", 130));
        assert!(verdict.message.contains("Ctrl-A X"), "{verdict:?}");
        for asked in [Ender::Parent, Ender::HangUp, Ender::Process].map(Asked::Ender) {
            let seen = Seen {
                asked: Some(asked),
                ..seen()
            };
            assert_eq!(word(Ended::Killed(9), seen), ("stopped", 129));
        }
        let reference = include_str!("../../../docs/reference.md");
        let is_there = |word: &str| reference.contains(&format!("`{word}`"));
        for (ended, seen, expected) in cases {
            assert_eq!(word(ended, seen), expected, "{ended:?}");
            assert!(is_there(expected.0), "{}", expected.0);
        }
        for other in [
            Verdict::of_snapshot(&Ok(String::new())),
            Verdict::of_snapshot(&Err(String::new())),
            Verdict::unknown(String::new()),
            Verdict::jailer_killed(),
            Verdict::not_started(String::new()),
        ] {
            assert!(is_there(other.word), "{}", other.word);
        }
    }

    #[test]
    fn ends_with_a_command_are_told_apart_from_those_of_this_program() {
        let exited = Seen {
            command: Some(0),
            ..Seen::default()
        };
        let failed = Seen {
            agent_fault: Some("it sent nonsense".into()),
            ..Seen::default()
        };
        for (verdict, word, code) in [
            (Verdict::of(Ended::Exited(0), &exited), "exited", 0),
            (Verdict::of(Ended::Exited(0), &failed), "agent-failed", 125),
            (
                Verdict::of(Ended::Exited(0), &Seen::default()),
                "ended",
                125,
            ),
            (Verdict::of(Ended::Exited(1), &Seen::default()), "error", 1),
            (Verdict::not_started("no".into()), "not-started", 125),
            (Verdict::unknown("why".into()), "unknown", 125),
        ] {
            let verdict = verdict.with_command(true);
            assert_eq!((verdict.word, verdict.code), (word, code));
            let reference = include_str!("../../../docs/reference.md");
            assert!(reference.contains(&format!("`{word}`")), "{word}");
        }
    }

    /// What the monitor writes of a guest that wrote a code and ended like this.
    fn with_code(word: &str, code: u8) -> String {
        format!("{word}\n{{\"guest_code\":{code}}}\n")
    }

    #[test]
    fn code_of_the_guest_is_in_the_report_and_none_is_told_apart_from_zero() {
        for (report, expected) in [
            ("reset\n".to_owned(), Value::Null),
            (with_code("reset", 0), json!(0)),
            (with_code("crash", 7), json!(7)),
        ] {
            let seen = Seen {
                end: EndReport::parse(report.as_bytes()),
                ..Seen::default()
            };
            let verdict = Verdict::of(Ended::Exited(0), &seen);
            let facts = facts("x", &verdict, None, &seen, &Times::default());
            assert_eq!(facts["guest_code"], expected, "{report}");
        }
    }

    #[test]
    fn crash_has_its_vcpu_in_message_and_report() {
        let report = "crash\n{\"vcpu\":1,\"rip\":\"0x12\",\"last_exits\":[\"hlt\"]}\n";
        let seen = Seen {
            end: EndReport::parse(report.as_bytes()),
            ..Seen::default()
        };
        let verdict = Verdict::of(Ended::Exited(160), &seen);
        assert!(verdict.message.contains("vCPU 1, RIP 0x12"), "{verdict:?}");
        let facts = facts("x", &verdict, None, &seen, &Times::default());
        assert_eq!(facts["crash"]["rip"], "0x12");
        assert_eq!(facts["crash"]["last_exits"], json!(["hlt"]));
    }

    #[test]
    fn stop_has_its_instruction_and_the_kind_of_host_in_its_message() {
        let report = "not-runnable\n{\"vcpu\":0,\"rip\":\"0x12\",\"suberror\":1,\"instruction\":\
                      \"f3 0f b8 c7\",\"instruction_name\":\"popcnt\",\"software_kvm\":true}\n";
        let seen = Seen {
            end: EndReport::parse(report.as_bytes()),
            ..Seen::default()
        };
        let verdict = Verdict::of(Ended::Exited(161), &seen);
        let expected = "KVM cannot run the guest any further: vCPU 0, RIP 0x12, instruction bytes \
                        f3 0f b8 c7 (popcnt); this host has software KVM";
        assert!(verdict.message.starts_with(expected), "{verdict:?}");
        let facts = facts("x", &verdict, None, &seen, &Times::default());
        assert_eq!(facts["crash"]["instruction_name"], "popcnt");
    }
}
