//! Whether a monitor runs under seccomp filters that forbid something: looked at, never assumed.
//!
//! `Seccomp: 2` in `/proc` says only that a filter is there; one that allows everything says the same. So the filters
//! are read back from the kernel and asked about a system call that no monitor makes once it runs.

use std::fs;
use std::path::Path;

use crate::failure::{Context, Result};
use crate::sys::{self, Instruction};

/// What is known of a monitor's filters.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Filters {
    /// Threads of the monitor; the kernel's workers in its process are not among them.
    pub threads: usize,
    /// Those with `Seccomp: 2`.
    pub filtered: usize,
    /// Those that may not execute another program; nothing where filters cannot be read (that needs root).
    pub strict: Option<usize>,
}

impl Filters {
    /// In words.
    pub fn text(&self) -> String {
        let Self {
            threads, filtered, ..
        } = self;
        match self.strict {
            _ if *filtered == 0 => format!("no seccomp filter (threads: {threads})"),
            None => format!(
                "seccomp filters on {filtered} of {threads} threads (what they forbid was not read: that needs root)"
            ),
            Some(strict) if strict == *threads => {
                format!("seccomp filters on {filtered} of {threads} threads, all in force")
            }
            Some(strict) => format!(
                "seccomp filters on {filtered} of {threads} threads, of which {} allow everything",
                filtered - strict
            ),
        }
    }

    /// Whether every thread has a filter that forbids something, as far as is known.
    pub fn all_on(&self) -> bool {
        self.strict.unwrap_or(self.filtered) == self.threads
    }
}

/// Looks at the threads of a process.
pub fn filters(pid: u32) -> Result<Filters> {
    let reading = || format!("read the threads of process {pid}");
    let mut found = Filters {
        strict: Some(0),
        ..Default::default()
    };
    for thread in fs::read_dir(format!("/proc/{pid}/task")).cannot(reading)? {
        let thread = thread.cannot(reading)?;
        if is_kernel_worker(&thread.path()) {
            continue;
        }
        // A thread may end while it is looked at.
        let Ok(status) = fs::read_to_string(thread.path().join("status")) else {
            continue;
        };
        found.threads += 1;
        let mode = status
            .lines()
            .find_map(|line| line.strip_prefix("Seccomp:"));
        if mode.is_none_or(|mode| mode.trim() != "2") {
            continue;
        }
        found.filtered += 1;
        let tid = thread.file_name().to_str().and_then(|t| t.parse().ok());
        match tid.map(sys::seccomp_filters) {
            Some(Ok(filters)) => {
                let forbids = filters.iter().any(|filter| !allows_execve(filter));
                found.strict = found.strict.map(|count| count + usize::from(forbids));
            }
            _ => found.strict = None,
        }
    }
    Ok(found)
}

/// Whether a thread is the kernel's own (KVM keeps one in each process with a VM): `PF_USER_WORKER` in the flags, the
/// seventh field after the name.
fn is_kernel_worker(thread: &Path) -> bool {
    const PF_USER_WORKER: u64 = 0x4000;
    fs::read_to_string(thread.join("stat"))
        .ok()
        .and_then(|stat| {
            let (_, after_name) = stat.rsplit_once(')')?;
            after_name.split_whitespace().nth(6)?.parse().ok()
        })
        .is_some_and(|flags: u64| flags & PF_USER_WORKER != 0)
}

/// Runs a filter for `execve` with all arguments zero.
fn allows_execve(filter: &[Instruction]) -> bool {
    const EXECVE: u32 = 59;
    const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
    const RET_ALLOW: u32 = 0x7fff_0000;
    const RET_LOG: u32 = 0x7ffc_0000;
    // struct seccomp_data: number, architecture, then addresses and arguments.
    let data = |offset: u32| match offset {
        0 => EXECVE,
        4 => AUDIT_ARCH_X86_64,
        _ => 0,
    };
    matches!(
        evaluate(filter, data).map(|action| action & 0xffff_0000),
        Some(RET_ALLOW | RET_LOG)
    )
}

/// As much classic BPF as seccomp filters use; nothing for anything else. Filters only jump forward, so this ends.
fn evaluate(filter: &[Instruction], data: impl Fn(u32) -> u32) -> Option<u32> {
    let mut accumulator = 0_u32;
    let mut at = 0_usize;
    loop {
        let Instruction {
            code,
            jump_true,
            jump_false,
            operand,
        } = *filter.get(at)?;
        at += 1;
        let holds = match code {
            0x20 => {
                accumulator = data(operand); // load a word
                continue;
            }
            0x54 => {
                accumulator &= operand;
                continue;
            }
            0x05 => {
                at += operand as usize; // jump
                continue;
            }
            0x06 => return Some(operand),
            0x15 => accumulator == operand,
            0x25 => accumulator > operand,
            0x35 => accumulator >= operand,
            0x45 => accumulator & operand != 0,
            _ => return None,
        };
        at += usize::from(if holds { jump_true } else { jump_false });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALLOW: Instruction = instruction(0x06, 0, 0, 0x7fff_0000);
    const TRAP: Instruction = instruction(0x06, 0, 0, 0x0003_0000);
    const LOAD_NUMBER: Instruction = instruction(0x20, 0, 0, 0);

    const fn instruction(code: u16, jump_true: u8, jump_false: u8, operand: u32) -> Instruction {
        Instruction {
            code,
            jump_true,
            jump_false,
            operand,
        }
    }

    #[test]
    fn filter_when_it_allows_everything_is_seen_through() {
        assert!(allows_execve(&[LOAD_NUMBER, ALLOW]));
    }

    #[test]
    fn filter_when_it_lists_other_calls_forbids_execve() {
        let is_read = instruction(0x15, 0, 1, 0);
        assert!(!allows_execve(&[LOAD_NUMBER, is_read, ALLOW, TRAP]));
    }

    #[test]
    fn filter_when_it_lists_execve_allows_it() {
        let is_execve = instruction(0x15, 0, 1, 59);
        assert!(allows_execve(&[LOAD_NUMBER, is_execve, ALLOW, TRAP]));
    }

    #[test]
    fn filter_when_cut_or_unknown_is_not_taken_for_an_open_one() {
        assert!(!allows_execve(&[LOAD_NUMBER]));
        assert!(!allows_execve(&[instruction(0xffff, 0, 0, 0), ALLOW]));
    }

    #[test]
    fn threads_when_of_this_process_are_counted() {
        let found = filters(std::process::id()).unwrap();
        assert!(found.threads >= 1 && found.filtered <= found.threads);
    }
}
