//! How a guest ended: one word, which the monitor writes to the descriptor of `--end-fd` and the
//! jailer reads there and puts into its report. The exit code alone does not tell a reset from a
//! power-off.
//!
//! With `--boot-timer`, [`BOOTED`] stands before that once the guest has said that it has booted.
//!
//! The first line is exactly the word. Lines of JSON may follow: where the guest did not end itself, what
//! is known of the vCPU; where it has written an exit code, `{"guest_code":N}`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::limits::END_REPORT_MAX;

/// What is written there when the guest says that it has booted, the first time.
pub const BOOTED: &str = "booted\n";

/// How a guest ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It reset its machine.
    Reset,
    /// It powered its machine off.
    Shutdown,
    /// Its kernel panicked, said so, and then ended the machine in whatever way.
    Panic,
    /// It crashed: a triple fault.
    Crash,
    /// Its memory is gone: a file that is mapped into it was cut short, or the host has no more.
    MemoryGone,
    /// KVM cannot run it any further.
    NotRunnable,
}

impl End {
    /// All of them.
    pub const ALL: [End; 6] = [
        End::Reset,
        End::Shutdown,
        End::Panic,
        End::Crash,
        End::MemoryGone,
        End::NotRunnable,
    ];

    /// The word for it.
    pub const fn word(self) -> &'static str {
        match self {
            End::Reset => "reset",
            End::Shutdown => "shutdown",
            End::Panic => "panic",
            End::Crash => "crash",
            End::MemoryGone => "memory-gone",
            End::NotRunnable => "not-runnable",
        }
    }

    /// Whether the guest ended itself, in an orderly way.
    pub const fn is_orderly(self) -> bool {
        matches!(self, End::Reset | End::Shutdown)
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// A text that is not the word of any [`End`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotAnEnd;

impl fmt::Display for NotAnEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not a word for how a guest ended")
    }
}

impl std::error::Error for NotAnEnd {}

impl FromStr for End {
    type Err = NotAnEnd;

    fn from_str(word: &str) -> Result<Self, NotAnEnd> {
        let mut known = End::ALL.into_iter();
        known.find(|end| end.word() == word).ok_or(NotAnEnd)
    }
}

/// What to tell the user of a guest that stopped at an instruction that software KVM lacks.
pub const SOFTWARE_KVM: &str = "this host has software KVM (kvm_pvm), which emulates the guest's \
                                kernel mode: a stock kernel does not run here, one that \
                                tools/guest makes does, with the command line beside it \
                                (docs/guest-kernel.md)";

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn is_false(value: &bool) -> bool {
    !value
}

/// What is known of the vCPU that a guest ended on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Crash {
    /// Its number.
    pub vcpu: u8,
    /// Its instruction pointer.
    #[serde(default, with = "hexadecimal")]
    pub rip: Option<u64>,
    /// The address of its last page fault.
    #[serde(default, with = "hexadecimal")]
    pub cr2: Option<u64>,
    /// KVM's number for the kind of failure (KVM_EXIT_INTERNAL_ERROR); 1 is an instruction that it
    /// cannot emulate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suberror: Option<u32>,
    /// The bytes at its instruction pointer, in hexadecimal; empty when not known.
    #[serde(default)]
    pub instruction: String,
    /// The name of that instruction.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instruction_name: Option<String>,
    /// Whether it is certain that the host has software KVM: see [`SOFTWARE_KVM`].
    #[serde(default, skip_serializing_if = "is_false")]
    pub software_kvm: bool,
    /// Its last exits before that, the latest last.
    #[serde(default)]
    pub last_exits: Vec<String>,
}

/// What is written to the descriptor of `--end-fd`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndReport {
    /// The word.
    pub end: End,
    /// More about a crash.
    pub crash: Option<Crash>,
    /// The exit code that the guest wrote to its port.
    pub guest_code: Option<u8>,
}

/// The line of the guest's exit code.
#[derive(Deserialize)]
struct GuestCode {
    guest_code: u8,
}

impl EndReport {
    /// Reads what the monitor wrote; none if that does not begin with a word for an end. Another line
    /// that is not understood is as good as none.
    pub fn parse(bytes: &[u8]) -> Option<EndReport> {
        let bytes = bytes.strip_prefix(BOOTED.as_bytes()).unwrap_or(bytes);
        let bytes = bytes.get(..END_REPORT_MAX).unwrap_or(bytes);
        let mut lines = std::str::from_utf8(bytes).ok()?.lines();
        let end = lines.next()?.parse().ok()?;
        let mut report = EndReport::of(end);
        for line in lines.take(2) {
            if let Ok(GuestCode { guest_code }) = serde_json::from_str(line) {
                report.guest_code = Some(guest_code);
            } else if report.crash.is_none() {
                report.crash = serde_json::from_str(line).ok();
            }
        }
        Some(report)
    }

    /// No more than the word.
    const fn of(end: End) -> EndReport {
        EndReport {
            end,
            crash: None,
            guest_code: None,
        }
    }
}

impl fmt::Display for EndReport {
    /// As it is written; the line of a crash that would not fit is left out.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.end)?;
        let detail = self.crash.as_ref().map(serde_json::to_string);
        match detail {
            Some(Ok(line)) if line.len() < END_REPORT_MAX / 2 => writeln!(f, "{line}")?,
            _ => {}
        }
        match self.guest_code {
            Some(code) => writeln!(f, "{{\"guest_code\":{code}}}"),
            None => Ok(()),
        }
    }
}

/// Numbers as texts, `0x` before them; null when not known.
mod hexadecimal {
    use super::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(
        number: &Option<u64>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match number {
            Some(number) => serializer.collect_str(&format_args!("{number:#x}")),
            None => serializer.serialize_none(),
        }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<u64>, D::Error> {
        let text = Option::<String>::deserialize(deserializer)?;
        Ok(text.and_then(|text| u64::from_str_radix(text.strip_prefix("0x")?, 16).ok()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn word_when_parsed_is_the_end_it_was_written_for() {
        for end in End::ALL {
            assert_eq!(end.to_string().parse(), Ok(end));
        }
        for bad in ["", "Reset", "reset ", "powered-off"] {
            assert_eq!(bad.parse::<End>(), Err(NotAnEnd), "{bad}");
        }
    }

    #[test]
    fn report_when_parsed_is_what_was_written() {
        let reset = EndReport::of(End::Reset);
        assert_eq!(reset.to_string(), "reset\n");
        assert_eq!(EndReport::parse(b"reset\n"), Some(reset.clone()));
        assert_eq!(EndReport::parse(b"booted\nreset\n"), Some(reset));
        assert_eq!(EndReport::parse(BOOTED.as_bytes()), None);
        let crash = EndReport {
            end: End::Crash,
            crash: Some(Crash {
                vcpu: 1,
                rip: Some(0xffff_8000_0000_1234),
                cr2: None,
                instruction: "0f 0b".into(),
                last_exits: vec!["io out 0x3f8".into()],
                ..Crash::default()
            }),
            guest_code: None,
        };
        let text = crash.to_string();
        assert_eq!(
            text,
            "crash\n{\"vcpu\":1,\"rip\":\"0xffff800000001234\",\"cr2\":null,\
             \"instruction\":\"0f 0b\",\"last_exits\":[\"io out 0x3f8\"]}\n"
        );
        assert_eq!(EndReport::parse(text.as_bytes()), Some(crash.clone()));
        let coded = EndReport {
            guest_code: Some(7),
            ..crash
        };
        assert_eq!(coded.to_string(), text + "{\"guest_code\":7}\n");
        assert_eq!(
            EndReport::parse(coded.to_string().as_bytes()),
            Some(coded.clone())
        );
        let stopped = EndReport {
            end: End::NotRunnable,
            crash: Some(Crash {
                suberror: Some(1),
                instruction: "f3 0f b8 c7".into(),
                instruction_name: Some("popcnt".into()),
                software_kvm: true,
                ..Crash::default()
            }),
            guest_code: None,
        };
        let text = stopped.to_string();
        assert!(text.contains("\"suberror\":1,"), "{text}");
        assert!(text.contains("\"instruction_name\":\"popcnt\",\"software_kvm\":true"));
        assert_eq!(EndReport::parse(text.as_bytes()), Some(stopped));
    }

    #[test]
    fn report_when_the_guest_wrote_a_code_has_it_in_a_line_of_its_own() {
        for code in [0, 7, 255] {
            let report = EndReport {
                guest_code: Some(code),
                ..EndReport::of(End::Shutdown)
            };
            let text = report.to_string();
            assert_eq!(text, format!("shutdown\n{{\"guest_code\":{code}}}\n"));
            assert_eq!(EndReport::parse(text.as_bytes()), Some(report.clone()));
            let text = BOOTED.to_owned() + &text;
            assert_eq!(EndReport::parse(text.as_bytes()), Some(report));
        }
        for bad in ["256", "-1", "null", "\"7\"", "[]"] {
            let text = format!("reset\n{{\"guest_code\":{bad}}}\n");
            let report = EndReport::parse(text.as_bytes());
            assert_eq!(report, Some(EndReport::of(End::Reset)), "{bad}");
        }
    }

    #[test]
    fn report_when_its_second_line_is_bad_is_its_first() {
        for rest in ["", "\n", "\nno json", "\n{}", "\n{\"vcpu\":300}"] {
            let report = EndReport::parse(format!("crash{rest}").as_bytes()).unwrap();
            assert_eq!((report.end, report.crash), (End::Crash, None), "{rest}");
        }
        for bad in [&b""[..], b"\n", b"\xff", b"gone\n", b"{}"] {
            assert_eq!(EndReport::parse(bad), None);
        }
        let long = EndReport {
            end: End::Crash,
            crash: Some(Crash {
                last_exits: vec!["x".repeat(END_REPORT_MAX)],
                ..Crash::default()
            }),
            guest_code: Some(1),
        };
        assert_eq!(long.to_string(), "crash\n{\"guest_code\":1}\n");
    }
}
