//! The seccomp filter of each kind of thread.
//!
//! The rules are data: `resources/seccomp/x86_64/*.json`, one file a category, each rule with the
//! reason it is there, compiled to BPF by the build. A thread's code knows one thing about its
//! filter: its [`Category`]. A call outside the filter traps; the handler
//! ([`sys::signal`](crate::sys::signal)) writes one line and ends the process with code 148.
#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use std::error::Error;
use std::fmt;

use seccompiler::sock_filter;

// The programs, and `Category`, which has a variant for each file of rules.
include!(concat!(env!("OUT_DIR"), "/filters.rs"));
include!(concat!(env!("OUT_DIR"), "/categories.rs"));

/// A filter could not be installed.
#[derive(Debug)]
pub struct InstallError {
    category: Category,
    cause: seccompiler::Error,
}

impl fmt::Display for InstallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Installing the seccomp filter of a {:?} thread failed (does the host's kernel have \
             CONFIG_SECCOMP_FILTER?)",
            self.category
        )
    }
}

impl Error for InstallError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(&self.cause)
    }
}

/// Installs the filter of `category` on the calling thread, for good.
///
/// # Errors
/// When the kernel has no seccomp filters.
pub fn install(category: Category) -> Result<(), InstallError> {
    seccompiler::apply_filter(category.program()).map_err(|cause| InstallError { category, cause })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::syscalls;
    use serde_json::Value;
    use std::collections::BTreeMap;

    const ARCHITECTURE: u32 = 0xc000_003e;
    const TRAP: u32 = libc::SECCOMP_RET_TRAP;
    const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;

    /// What `program` returns for a call, by the rules of the kernel's interpreter.
    fn run(program: &[sock_filter], architecture: u32, number: u32, arguments: [u64; 6]) -> u32 {
        let mut data = [number.to_le_bytes(), architecture.to_le_bytes()].concat();
        data.extend([0; 8]);
        data.extend(arguments.iter().flat_map(|argument| argument.to_le_bytes()));
        let (mut at, mut value) = (0, 0);
        loop {
            let sock_filter { code, jt, jf, k } = program[at].clone();
            at += 1;
            let holds = match u32::from(code) {
                0x20 => {
                    let bytes = data[k as usize..][..4].try_into().unwrap();
                    value = u32::from_le_bytes(bytes);
                    continue;
                }
                0x54 => {
                    value &= k;
                    continue;
                }
                0x05 => {
                    at += k as usize;
                    continue;
                }
                0x06 => return k,
                0x15 => value == k,
                0x25 => value > k,
                0x35 => value >= k,
                code => panic!("instruction {code:#x}"),
            };
            at += usize::from(if holds { jt } else { jf });
        }
    }

    #[test]
    fn filters_when_run_allow_what_their_rules_say_and_nothing_else() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/resources/seccomp/x86_64");
        for category in Category::ALL {
            let program = category.program();
            let category = &*format!("{category:?}").to_lowercase();
            let text = std::fs::read(format!("{folder}/{category}.json")).unwrap();
            let text: Value = serde_json::from_slice(&text).unwrap();
            let mut rules: BTreeMap<&str, Vec<&Value>> = BTreeMap::new();
            for rule in text[category]["filter"].as_array().unwrap() {
                let name = rule["syscall"].as_str().unwrap();
                rules.entry(name).or_default().push(rule);
            }
            let number = |name: &&str| (0..1000).find(|n| syscalls::name(*n) == *name).is_some();
            assert!(
                rules.keys().all(number),
                "{category}: a call without a number"
            );
            for n in 0..1000 {
                let name = syscalls::name(n);
                let call = |arguments| run(program, ARCHITECTURE, n as u32, arguments);
                let rules = rules.get(name).map(Vec::as_slice).unwrap_or_default();
                let is_free = rules.iter().any(|rule| rule["args"].is_null());
                // No rule is about this value.
                let other = if is_free { ALLOW } else { TRAP };
                assert_eq!(call([u64::MAX; 6]), other, "{category}: {name}");
                for rule in rules {
                    let mut arguments = [u64::MAX; 6];
                    for argument in rule["args"].as_array().into_iter().flatten() {
                        let index = argument["index"].as_u64().unwrap() as usize;
                        arguments[index] = argument["val"].as_u64().unwrap();
                    }
                    assert_eq!(call(arguments), ALLOW, "{category}: {rule}");
                }
                assert_eq!(
                    run(program, 3, n as u32, [0; 6]),
                    libc::SECCOMP_RET_KILL_PROCESS
                );
            }
        }
    }
}
