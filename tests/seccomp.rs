//! The filters, from outside: every thread of the shipped binary is made to call what its filter
//! does not allow, the filters are read back from its threads and asked about all calls, and the table in SECURITY.md
//! is held to the rules.

mod common;
#[path = "seccomp/installed.rs"]
mod installed;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use common::sys::inject;
use common::{Api, Folder, Monitor, Netns, needs};
use serde_json::json;

/// A monitor with one thread of each kind and a guest that runs.
fn whole_monitor(folder: &Folder, netns: &Netns, more: &[&str]) -> Monitor {
    netns.tap("mftap", "172.16.9.1/24");
    let disk = folder.disk("disk", 1 << 20);
    let config = json!({
        "boot-source": {
            "kernel_image_path": common::probe(),
            "boot_args": "probe=print:up,spin",
        },
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 32},
        "drives": [{"drive_id": "d", "path_on_host": disk, "is_root_device": false}],
        "network-interfaces": [{"iface_id": "n", "host_dev_name": "mftap"}],
    });
    let file = folder.file("vm.json", config.to_string());
    let mut command = netns.command(common::mayfly());
    command
        .arg("--api-sock")
        .arg(folder.join("api"))
        .arg("--config-file")
        .arg(file)
        // Log lines would come in between the guest's.
        .args(["--level", "Off"])
        .args(more);
    let monitor = Monitor::spawn(command);
    monitor.expect("probe: spin");
    Api::at(folder.join("api"));
    monitor
}

/// The kinds of thread, by the beginning of their names, and calls that none of them may make.
const KINDS: [(&str, &str); 8] = [
    ("mayfly", "control"),
    ("fc_api", "api"),
    ("fc_vcpu", "vcpu"),
    ("block", "block"),
    ("net", "net"),
    ("serial", "serial"),
    ("log", "log"),
    ("files", "files"),
];

const FORBIDDEN: [(i64, &str); 5] = [
    (libc::SYS_socket, "socket"),
    (libc::SYS_execve, "execve"),
    (libc::SYS_clone3, "clone3"),
    (libc::SYS_mprotect, "mprotect"),
    (libc::SYS_io_uring_setup, "io_uring_setup"),
];

#[test]
fn call_outside_the_filter_when_made_on_any_thread_ends_the_process_with_148() {
    needs!(kvm, root);
    for (begins, kind) in KINDS {
        for (number, name) in FORBIDDEN {
            let folder = Folder::new();
            let netns = Netns::new();
            let mut monitor = whole_monitor(&folder, &netns, &[]);
            let (id, thread) = monitor
                .threads()
                .into_iter()
                .find(|(_, name)| name.starts_with(begins))
                .unwrap_or_else(|| panic!("no {kind} thread among {:?}", monitor.threads()));
            assert_eq!(inject(id, number), None);
            monitor.exits_with(148);
            let line = format!("system call {number} ({name})");
            let errors = monitor.stderr();
            assert!(errors.contains(&line), "{kind}: {errors}");
            let named = if kind == "control" {
                "main"
            } else {
                thread.as_str()
            };
            assert!(
                errors.contains(&format!("thread {named}: ")),
                "{thread}: {errors}"
            );
            assert_eq!(errors.lines().count(), 1, "one line: {errors}");
        }
    }
}

/// Where the host's clock source cannot be read without a call, every thread makes it.
#[test]
fn time_when_asked_for_by_a_call_is_no_violation_on_any_thread() {
    needs!(kvm, root);
    for (begins, kind) in KINDS {
        let folder = Folder::new();
        let netns = Netns::new();
        let monitor = whole_monitor(&folder, &netns, &[]);
        let threads = monitor.threads();
        let (id, _) = threads
            .iter()
            .find(|(_, name)| name.starts_with(begins))
            .unwrap();
        // Allowed by the filter, and refused by the kernel: there is no place for the time.
        let result = inject(*id, libc::SYS_clock_gettime);
        assert_eq!(result, Some(-i64::from(libc::EFAULT)), "{kind}");
    }
}

#[test]
fn open_when_made_by_any_thread_but_files_ends_the_process() {
    needs!(kvm, root);
    for (begins, kind) in KINDS.into_iter().filter(|(_, kind)| *kind != "files") {
        let folder = Folder::new();
        let netns = Netns::new();
        let mut monitor = whole_monitor(&folder, &netns, &[]);
        let threads = monitor.threads();
        let (id, _) = threads
            .iter()
            .find(|(_, name)| name.starts_with(begins))
            .unwrap();
        assert_eq!(inject(*id, libc::SYS_openat), None);
        monitor.exits_with(148);
        assert!(monitor.stderr().contains("(openat)"), "{kind}");
    }
}

#[test]
fn threads_when_a_guest_runs_are_all_filtered() {
    needs!(kvm, root);
    let folder = Folder::new();
    let netns = Netns::new();
    for (more, mode) in [(&[][..], "2"), (&["--no-seccomp"][..], "0")] {
        let _ = fs::remove_file(folder.join("api"));
        let monitor = whole_monitor(&folder, &netns, more);
        let mut threads = monitor.threads();
        // KVM's own worker belongs to the kernel, though it is listed here.
        threads.retain(|(_, name)| !name.starts_with("kvm-"));
        assert_eq!(threads.len(), KINDS.len(), "{threads:?}");
        for (id, name) in threads {
            let status =
                fs::read_to_string(format!("/proc/{}/task/{id}/status", monitor.pid())).unwrap();
            let line = status.lines().find(|l| l.starts_with("Seccomp:")).unwrap();
            assert_eq!(line.split_whitespace().last(), Some(mode), "{name}");
        }
        drop(monitor);
        netns.run("ip", &["link", "del", "mftap"]);
    }
}

#[test]
fn threads_when_stopped_and_continued_go_on() {
    needs!(kvm, root);
    let folder = Folder::new();
    let netns = Netns::new();
    let mut monitor = whole_monitor(&folder, &netns, &[]);
    let api = Api::at(folder.join("api"));
    // What shells, debuggers, frozen cgroups and a host that sleeps do to a process at any time.
    for _ in 0..5 {
        common::sys::kill(monitor.pid(), libc::SIGSTOP);
        common::wait_until("every thread to stop", || {
            monitor.threads().iter().all(|(id, _)| {
                let stat = fs::read_to_string(format!("/proc/{id}/stat")).unwrap();
                stat.rsplit(") ").next().unwrap().starts_with('T')
            })
        });
        common::sys::kill(monitor.pid(), libc::SIGCONT);
        assert_eq!(api.get("/")["state"], "Running", "{}", monitor.stderr());
        assert!(monitor.child.try_wait().unwrap().is_none());
    }
}

/// The calls of each category as the rules have them: steady, for snapshots, and on the failure path.
fn rules() -> BTreeMap<String, [BTreeSet<String>; 3]> {
    let folder = common::root().join("resources/seccomp/x86_64");
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let text = fs::read_to_string(entry.unwrap().path()).unwrap();
        let file: serde_json::Value = serde_json::from_str(&text).unwrap();
        for (category, filter) in file.as_object().unwrap() {
            let mut calls = [const { BTreeSet::new() }; 3];
            for rule in filter["filter"].as_array().unwrap() {
                let call = rule["syscall"].as_str().unwrap().to_owned();
                let comment = rule["comment"].as_str().unwrap();
                let kinds = ["Steady: ", "Snapshot: ", "Failure: "];
                let kind = kinds.iter().position(|kind| comment.starts_with(kind));
                let kind = kind.unwrap_or_else(|| panic!("{category} {call}: {comment}"));
                calls[kind].insert(call);
            }
            all.insert(category.clone(), calls);
        }
    }
    all
}

#[test]
fn rules_of_the_jail_tell_each_why_they_are_there() {
    let folder = common::root().join("resources/seccomp/jail/x86_64");
    let mut rules = 0;
    for entry in fs::read_dir(folder).unwrap() {
        let text = fs::read_to_string(entry.unwrap().path()).unwrap();
        let file: serde_json::Value = serde_json::from_str(&text).unwrap();
        for (category, filter) in file.as_object().unwrap() {
            for rule in filter["filter"].as_array().unwrap() {
                let (subject, reason) = rule["comment"].as_str().unwrap().split_once(": ").unwrap();
                assert!(
                    !subject.is_empty() && reason.len() > 10,
                    "{category}: {rule}"
                );
                rules += 1;
            }
        }
    }
    assert!(rules > 60, "{rules}");
}

#[test]
fn table_in_security_md_when_compared_is_what_the_filters_say() {
    let text = fs::read_to_string(common::root().join("SECURITY.md")).unwrap();
    let calls = |cell: &str| -> BTreeSet<String> {
        cell.split([',', ' '])
            .map(|word| word.trim_matches('`'))
            .filter(|word| !word.is_empty())
            .map(str::to_owned)
            .collect()
    };
    let mut found = BTreeMap::new();
    for line in text.lines() {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        if let ["", thread, _, steady, snapshot, failure, ""] = cells[..]
            && let Some(category) = thread.strip_prefix("**").and_then(|t| t.strip_suffix("**"))
        {
            let all = [calls(steady), calls(snapshot), calls(failure)];
            found.insert(category.to_owned(), all);
        }
    }
    assert_eq!(found, rules());
}

/// What is made after a load is behind that filter as well: it must not forbid what their own ones allow.
#[test]
fn filter_of_a_load_when_compared_allows_what_threads_do_after_it() {
    let rules = rules();
    let all = |category: &str| -> BTreeSet<String> {
        rules[category].iter().flatten().cloned().collect()
    };
    let restore = all("restore");
    // Those two are made before.
    let made_before = ["api", "log"];
    for category in rules
        .keys()
        .filter(|name| !made_before.contains(&name.as_str()))
    {
        let missing: Vec<_> = all(category).difference(&restore).cloned().collect();
        assert!(missing.is_empty(), "{category}: {missing:?}");
    }
}

#[test]
fn filters_when_counted_are_as_small_as_promised() {
    for (category, [steady, snapshot, _]) in rules() {
        let most_more = match category.as_str() {
            "files" => 21,
            "control" => 2,
            // All that building a machine takes.
            "restore" => 90,
            _ => 0,
        };
        assert!(snapshot.len() <= most_more, "{category}: {snapshot:?}");
        let most = match category.as_str() {
            "vcpu" | "block" | "net" => 12,
            "pool" => 6,
            "serial" | "log" => 10,
            // One of them for the space of overlays.
            "files" => 13,
            "api" => 14,
            "control" => 20,
            "restore" => 0,
            other => panic!("{other}"),
        };
        assert!(
            steady.len() <= most,
            "{category}: {} steady calls: {steady:?}",
            steady.len()
        );
        if category == "restore" {
            assert!(!snapshot.contains("execve") && !snapshot.contains("ptrace"));
            continue;
        }
        for never in [
            "clone", "clone3", "fork", "execve", "socket", "mprotect", "ptrace",
        ] {
            let may = steady.contains(never) || snapshot.contains(never);
            assert!(!may, "{category} may {never}");
        }
    }
}
