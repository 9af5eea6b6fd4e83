//! The filters as the kernel has them: read back from the threads of a running monitor, and asked about calls.

use std::collections::BTreeMap;
use std::fs;

use serde_json::Value;

use super::common::filters::{Call, installed};
use super::common::{Folder, Netns, needs, root};
use super::{KINDS, whole_monitor};

#[path = "../../src/sys/syscalls.rs"]
mod syscalls;

/// The rules of a category, by the name of the call.
type Rules = BTreeMap<String, Vec<Vec<Condition>>>;

/// What must hold of an argument. All of ours look at its lower half.
struct Condition {
    argument: usize,
    /// The bits that are compared.
    mask: u32,
    value: u32,
}

fn rules(category: &str) -> Rules {
    let path = format!("resources/seccomp/x86_64/{category}.json");
    let text = fs::read_to_string(root().join(path)).unwrap();
    let file: Value = serde_json::from_str(&text).unwrap();
    let mut rules = Rules::new();
    for rule in file[category]["filter"].as_array().unwrap() {
        let conditions = rule["args"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|argument| {
                assert_eq!(argument["type"], "dword", "{rule}");
                let mask = match &argument["op"] {
                    Value::String(op) if op == "eq" => u32::MAX,
                    op => op["masked_eq"].as_u64().expect("eq or masked_eq") as u32,
                };
                Condition {
                    argument: argument["index"].as_u64().unwrap() as usize,
                    mask,
                    value: argument["val"].as_u64().unwrap() as u32,
                }
            });
        let name = rule["syscall"].as_str().unwrap().to_owned();
        rules.entry(name).or_default().push(conditions.collect());
    }
    rules
}

/// Whether one of `rules` allows `arguments`.
fn is_allowed(rules: &[Vec<Condition>], arguments: &[u64; 6]) -> bool {
    let holds = |condition: &Condition| {
        arguments[condition.argument] as u32 & condition.mask == condition.value & condition.mask
    };
    rules.iter().any(|conditions| conditions.iter().all(holds))
}

/// Arguments of every kind: none that a rule speaks of, those of each rule, and those that differ from them in
/// a single bit.
fn trials(rules: &[Vec<Condition>]) -> Vec<[u64; 6]> {
    let mut trials = vec![[0; 6], [u64::MAX; 6], [0x5a5a_5a5a_5a5a_5a5a; 6]];
    for conditions in rules {
        for others in [0, u64::MAX] {
            let mut arguments = [others; 6];
            for condition in conditions {
                let rest = arguments[condition.argument] & !u64::from(condition.mask);
                arguments[condition.argument] = rest | u64::from(condition.value);
            }
            trials.push(arguments);
            for condition in conditions {
                for bit in 0..u64::BITS {
                    let mut near = arguments;
                    near[condition.argument] ^= 1 << bit;
                    trials.push(near);
                }
            }
        }
    }
    trials
}

#[test]
fn filters_when_read_back_from_the_running_process_allow_their_rules_and_nothing_else() {
    needs!(kvm, root);
    let folder = Folder::new();
    let netns = Netns::new();
    let monitor = whole_monitor(&folder, &netns, &[]);
    let threads = monitor.threads();
    for (begins, category) in KINDS {
        let thread = threads.iter().find(|(_, name)| name.starts_with(begins));
        let (id, _) = thread.unwrap_or_else(|| panic!("no {category} thread among {threads:?}"));
        let filters = installed(*id);
        assert_eq!(filters.len(), 1, "{category}");
        let rules = rules(category);
        let mut asked = 0;
        // Beyond the last call of this kernel, and those of the x32 ABI, whose numbers have this bit.
        for number in (0..1024).chain(0x4000_0000..0x4000_0400) {
            let name = syscalls::name(number as i32);
            let rules = rules.get(name);
            let rules = rules.map(Vec::as_slice).unwrap_or_default();
            for arguments in trials(rules) {
                let call = Call::native(number, arguments);
                let allowed = filters.iter().all(|filter| call.is_allowed_by(filter));
                let expected = is_allowed(rules, &arguments);
                assert_eq!(
                    allowed, expected,
                    "{category}: {name} {number:#x} {arguments:x?}"
                );
                asked += 1;
            }
            for filter in &filters {
                let foreign = Call::of_32_bit_code(number).action_of(filter);
                assert_eq!(
                    foreign,
                    libc::SECCOMP_RET_KILL_PROCESS,
                    "{category}: {number}"
                );
            }
        }
        let names: Vec<_> = (0..1024).map(syscalls::name).collect();
        let is_known = |name: &String| names.contains(&name.as_str());
        assert!(
            rules.keys().all(is_known),
            "{category}: a call without a number"
        );
        println!(
            "{category}: {} rules, {asked} calls asked",
            rules.values().map(Vec::len).sum::<usize>()
        );
    }
}
