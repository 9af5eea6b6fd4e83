//! The guest's own exit code: written to its port, told on `--end-fd` and in the log, kept in a snapshot, and
//! what `mayfly-jailer run` ends with.

#[path = "common/mod.rs"]
mod common;
#[path = "jail/host.rs"]
mod host;
#[path = "snapshot/pair.rs"]
mod pair;
#[path = "jail/run.rs"]
mod run;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::{Folder, LINUX_PATIENCE, Monitor, needs, probe_vm};
use pair::{Pair, save_and_end};
use run::{BOTH, Ended, Place, Who};
use serde_json::{Value, json};

/// Words of the probe; the report; the end of the line in the log; the exit code of the monitor with
/// `--guest-exit-code`, and without.
const ENDS: &[(&str, &str, &str, i32, i32)] = &[
    ("reset", "reset\n", "reset its machine.", 0, 0),
    (
        "exitcode:7,reset",
        "reset\n{\"guest_code\":7}\n",
        "reset its machine; the exit code that it wrote is 7.",
        7,
        0,
    ),
    (
        "exitcode:0,reset",
        "reset\n{\"guest_code\":0}\n",
        "the exit code that it wrote is 0.",
        0,
        0,
    ),
    (
        "exitcode:255,poweroff",
        "shutdown\n{\"guest_code\":255}\n",
        "powered its machine off; the exit code that it wrote is 255.",
        255,
        0,
    ),
    // The last one counts.
    (
        "exitcode:7,exitcode:8,acpireset",
        "reset\n{\"guest_code\":8}\n",
        "is 8.",
        8,
        0,
    ),
    // Of a wide access the first byte does.
    (
        "exitcode:0x1122:2,reset",
        "reset\n{\"guest_code\":34}\n",
        "is 34.",
        34,
        0,
    ),
    (
        "exitcode:0x11223344:4,reset",
        "reset\n{\"guest_code\":68}\n",
        "is 68.",
        68,
        0,
    ),
    // A guest that did not end in an orderly way keeps the code for that.
    (
        "tellpanic,exitcode:7,reset",
        "panic\n{\"guest_code\":7}\n",
        "kernel panicked, and then ended its machine; the exit code that it wrote is 7.",
        165,
        165,
    ),
];

#[test]
fn code_when_written_is_told_beside_the_reason() {
    needs!(kvm);
    for (words, report, log, with, without) in ENDS {
        for (more, code) in [(&["--guest-exit-code"][..], with), (&[], without)] {
            let told = common::end_of(&probe_vm(words), more, common::PATIENCE);
            assert_eq!(told.code, Some(*code), "{words} {more:?}: {}", told.log);
            assert_eq!(told.report, *report, "{words}");
            assert!(told.log.contains(log), "{words}: {}", told.log);
            assert!(!told.output.contains("FAILED"), "{}", told.output);
            let last = format!("exit_code={code}");
            assert!(told.log.contains(&last), "{words}: {}", told.log);
        }
    }
}

#[test]
fn code_when_the_guest_then_crashes_is_told_and_does_not_hide_that() {
    needs!(kvm);
    let config = probe_vm("exitcode:7,triple");
    let told = common::end_of(&config, &["--guest-exit-code"], common::PATIENCE);
    assert_eq!(told.code, Some(160), "{}", told.log);
    let lines: Vec<&str> = told.report.lines().collect();
    let [word, crash, code] = lines[..] else {
        panic!("{}", told.report)
    };
    assert_eq!((word, code), ("crash", "{\"guest_code\":7}"));
    let crash: Value = serde_json::from_str(crash).unwrap();
    assert_eq!(crash["vcpu"], 0, "{crash}");
}

#[test]
fn code_when_written_without_end_costs_no_line_and_no_memory() {
    needs!(kvm);
    let lines = |words: &str| {
        let told = common::end_of(&probe_vm(words), &[], common::PATIENCE);
        assert_eq!(told.code, Some(0), "{}", told.log);
        assert_eq!(told.report, "reset\n{\"guest_code\":7}\n", "{words}");
        told.log.lines().count()
    };
    assert_eq!(lines("exitcode:7:1:20000,reset"), lines("exitcode:7,reset"));
}

#[test]
fn code_when_a_snapshot_is_between_it_and_the_end_is_that_of_the_restored_guest() {
    needs!(kvm);
    for (first, then, expected) in [("exitcode:7,", "", 7), ("exitcode:7,", "exitcode:8\n", 8)] {
        let (folder, other) = (Folder::new(), Folder::new());
        let (monitor, api) = Monitor::boot_with_api(&folder, &probe_vm(&format!("{first}shell")));
        monitor.expect("shell ready");
        let pair = Pair::new(&folder, "snapshot");
        save_and_end(monitor, &api, &pair);

        let (mut monitor, _api) = pair.restore(&other, json!({}));
        monitor.type_in(&format!("{then}reset\n"));
        monitor.exits_with(0);
        let log = other.read("log");
        let told = format!("the exit code that it wrote is {expected}.");
        assert!(log.contains(&told), "{log}");
    }
}

// In a jail

#[test]
fn jailer_when_its_guest_wrote_a_code_ends_with_it() {
    needs!(root, kvm);
    let place = Place::real("exitcode", &common::mayfly());
    let kernel = place.path("probe");
    fs::copy(common::probe(), &kernel).unwrap();
    fs::set_permissions(&kernel, fs::Permissions::from_mode(0o755)).unwrap();
    let path = place.shared("report.json");
    let ends = ENDS.iter().map(|(words, report, .., with, _)| {
        let word = report.lines().next().unwrap();
        (*words, word, code_of(report), *with)
    });
    let crash = ("exitcode:7,triple", "crash", json!(7), 160);
    // Codes of other ends are the guest's own here: the word tells them apart, and nothing is said.
    let own = ("exitcode:165,reset", "reset", json!(165), 165);
    for (words, word, guest_code, code) in ends.chain([crash, own]) {
        // An ordinary user's jail gets it by the same way: once is enough there.
        let all = BOTH.into_iter();
        for who in all.filter(|who| *who == Who::Root || code == 7) {
            let cmdline = format!("probe={words}");
            let machine = ["run", "--kernel", &kernel, "--cmdline", &cmdline];
            let more = [&machine[..], &["--exit-report", &path]].concat();
            let output = place.jailer(who, &more).output().unwrap();
            let ended = Ended::of(&output);
            assert_eq!(ended.code, Some(code), "{who:?} {words}: {ended:?}");
            let report = fs::read_to_string(&path).unwrap();
            let report: Value = serde_json::from_str(&report).unwrap();
            assert_eq!(report["ended"], word, "{words}: {report}");
            assert_eq!(report["exit_code"], code, "{words}: {report}");
            assert_eq!(report["guest_code"], guest_code, "{words}: {report}");
            let is_silent = ended.err.is_empty();
            assert_eq!(is_silent, !["crash", "panic"].contains(&word), "{ended:?}");
            fs::remove_file(&path).unwrap();
            place.nothing_is_left();
        }
    }
}

/// The code in what `--end-fd` is told.
fn code_of(report: &str) -> Value {
    let line = report.lines().nth(1);
    line.map_or(Value::Null, |line| {
        serde_json::from_str::<Value>(line).unwrap()["guest_code"].clone()
    })
}

// The helper

/// The helper: MAYFLY_EXIT_BIN, else the one that `cargo build --release` made.
fn mayfly_exit() -> PathBuf {
    common::built("MAYFLY_EXIT_BIN", "mayfly-exit")
}

/// One entry of a cpio archive of the form `newc`, executable.
fn entry(name: &str, mode: u32, content: &[u8]) -> Vec<u8> {
    let size = content.len();
    let mut bytes = format!("070701{:08X}{mode:08X}{:016X}{:08X}{:08X}", 1, 0, 1, 0).into_bytes();
    bytes.extend(format!("{size:08X}{:032X}{:08X}{:08X}", 0, name.len() + 1, 0).bytes());
    bytes.extend([name.as_bytes(), b"\0"].concat());
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes.extend(content);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// A guest whose init is `script`, and that has the helper.
fn linux_with(folder: &Folder, script: &str) -> Value {
    let linux = common::linux();
    let mut initrd = fs::read(&linux.initrd).unwrap();
    initrd.resize(initrd.len().next_multiple_of(4), 0);
    let script = format!(
        "#!/bin/busybox sh\nexport PATH=/bin\nmount -t devtmpfs dev /dev\n{script}\nreboot -f\n"
    );
    initrd.extend(entry("test-init", 0o100_755, script.as_bytes()));
    initrd.extend(entry(
        "bin/mayfly-exit",
        0o100_755,
        &fs::read(mayfly_exit()).unwrap(),
    ));
    initrd.extend(entry("TRAILER!!!", 0, b""));
    json!({
        "boot-source": {
            "kernel_image_path": linux.kernel,
            "initrd_path": folder.file("initrd", initrd),
            "boot_args": format!("{} rdinit=/test-init", linux.cmdline),
        },
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 128},
        "drives": [],
    })
}

#[test]
fn linux_when_it_has_the_helper_or_dev_port_tells_its_code() {
    needs!(kvm);
    let folder = Folder::new();
    // The examples of docs/guests.md. Applets that the initramfs has no name for are busybox's.
    for (script, expected) in [
        ("mayfly-exit 7", 7),
        ("mayfly-exit --reboot 8; echo not reached", 8),
        (
            "printf '\\011' | busybox dd of=/dev/port bs=1 seek=$((0x610)) conv=notrunc 2>/dev/null",
            9,
        ),
    ] {
        let config = linux_with(&folder, script);
        let told = common::end_of(&config, &["--guest-exit-code"], LINUX_PATIENCE);
        let all = format!("{script}: {}\n{}", told.log, told.output);
        assert_eq!(told.code, Some(expected), "{all}");
        let report = format!("reset\n{{\"guest_code\":{expected}}}\n");
        assert_eq!(told.report, report, "{all}");
        assert!(!told.output.contains("not reached"), "{all}");
    }
}

#[test]
fn helper_when_started_on_the_host_or_with_bad_words_refuses_and_is_small() {
    let helper = mayfly_exit();
    assert!(fs::metadata(&helper).unwrap().len() < 8 << 10);
    let run = |words: &[&str]| {
        let mut command = Command::new(&helper);
        let output = command.args(words).stdin(Stdio::null()).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.stdout.is_empty());
        (output.status.code(), said)
    };
    for (words, expected) in [
        (&[][..], "the exit code is missing"),
        (&["--reboot"], "the exit code is missing"),
        (&["256"], "`256` is no exit code"),
        (&["-1"], "`-1` is no exit code"),
        (&["+1"], "`+1` is no exit code"),
        (&[""], "`` is no exit code"),
        (&["--halt"], "`--halt` is no exit code"),
        (&["1", "2"], "unexpected argument `2`"),
        (&["--reboot", "--poweroff", "1"], "`--poweroff` is no exit"),
    ] {
        let (code, said) = run(words);
        assert_eq!(code, Some(2), "{words:?}: {said}");
        assert!(said.starts_with("mayfly-exit: "), "{said}");
        assert!(said.contains(expected), "{words:?}: {said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
    let (code, said) = run(&["--help"]);
    assert!(code == Some(0) && said.starts_with("usage: mayfly-exit"));
    // Only where this is no guest of ours.
    if !Path::new("/dev/port").exists() {
        let (code, said) = run(&["1"]);
        assert_eq!(code, Some(1), "{said}");
        assert!(said.contains("CONFIG_DEVPORT"), "{said}");
    }
}
