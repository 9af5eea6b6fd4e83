//! README.md, SECURITY.md and docs/ against the code: each command block is run as it stands, in a
//! place of its own; links lead somewhere; tests that are named exist; limits are those of the
//! source.

mod common;
#[path = "jail/host.rs"]
mod host;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;

use common::{LINUX_PATIENCE, needs};
use host::{GID, Host, UID};

const README: &str = include_str!("../README.md");
const API: &str = include_str!("../docs/api.md");
const SNAPSHOTS: &str = include_str!("../docs/snapshots.md");
const SECURITY: &str = include_str!("../SECURITY.md");
const LIMITS: &str = include_str!("../docs/limits.md");

/// The `sh` blocks of a document, each with its heading.
fn blocks(document: &'static str) -> Vec<(&'static str, &'static str)> {
    let (mut heading, mut found, mut rest) = ("", Vec::new(), document);
    while let Some((before, after)) = rest.split_once("```sh\n") {
        let mut headings = before.lines().filter_map(|line| line.strip_prefix("## "));
        heading = headings.next_back().unwrap_or(heading);
        let (block, behind) = after.split_once("```").expect("a block ends");
        found.push((heading, block));
        rest = behind;
    }
    found
}

/// The only `sh` block under a heading that has `part` in it.
fn block(document: &'static str, heading: &str, part: &str) -> &'static str {
    let all = blocks(document);
    let mut fitting = all
        .iter()
        .filter(|(of, block)| *of == heading && block.contains(part));
    let (_, block) = fitting
        .next()
        .unwrap_or_else(|| panic!("no block with {part:?} under {heading:?}"));
    assert!(fitting.next().is_none(), "{part:?} is in several blocks");
    block
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Who {
    Root,
    User,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Guest {
    /// As `tools/guest` makes it.
    Linux,
    /// The probe guest in its place, with this command line.
    Probe(&'static str),
}

/// What a reader of the documents has: the top folder of the source with everything built, a folder
/// /tmp, programs in PATH, and the devices. All of it in a mount and a network namespace, so that
/// the names which the documents use are free there, and nothing reaches the host.
struct Place {
    host: Host,
}

/// Makes the namespaces' mounts, and becomes a shell of the user that runs the block. The new /tmp is
/// mounted last: what it hides is needed before.
const SCRIPT: &str = r#"
    set -eu
    cd "$1"
    ip link set lo up
    mount -t sysfs none /sys
    mount -t tmpfs none devices
    mknod -m 666 devices/kvm c 10 232
    mknod -m 666 devices/tun c 10 200
    mount --bind devices/kvm /dev/kvm
    mount --bind devices/tun /dev/net/tun
    mount --bind work /mnt
    mount --bind tmp /tmp
    cd /mnt
    exec 2>&1
    exec setpriv --reuid "$2" --regid "$3" --clear-groups bash block
"#;

/// What ends with a block that fails.
const PROLOGUE: &str = "set -eu; trap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n";

/// What the test does when a line of a block's output contains something.
enum Reaction {
    /// Types this on the terminal's line.
    Type(&'static str),
    /// Pings the address that follows this in what was put out so far.
    PingAfter(&'static str),
    /// Pings this address.
    Ping(&'static str),
}

impl Place {
    fn new(test: &str, who: Who, guest: Guest) -> Place {
        let host = Host::new(test);
        for folder in [
            "devices",
            "tmp",
            "work/tools",
            "work/target/guest",
            "work/bin",
        ] {
            fs::create_dir_all(host.path(folder)).unwrap();
        }
        let release = host.path("work/target/x86_64-unknown-linux-gnu/release");
        fs::create_dir_all(&release).unwrap();
        let copy = |from: &Path, to: PathBuf| {
            let status = Command::new("cp")
                .arg("--sparse=always")
                .args([from, &to])
                .status();
            assert!(status.unwrap().success(), "cp {} {to:?}", from.display());
        };
        copy(&common::mayfly(), release.join("mayfly"));
        copy(host.jailer_program(), release.join("mayfly-jailer"));
        copy(&common::agent(), release.join("mayfly-agent"));
        let made = host.path("work/target/guest");
        let linux = common::linux();
        copy(&linux.disk, made.join("rootfs.ext4"));
        match guest {
            Guest::Linux => {
                copy(&linux.kernel, made.join("vmlinux"));
                fs::write(made.join("cmdline"), linux.cmdline + "\n").unwrap();
            }
            Guest::Probe(words) => {
                copy(&common::probe(), made.join("vmlinux"));
                fs::write(made.join("cmdline"), format!("{words}\n")).unwrap();
            }
        }
        copy(
            &common::built("MAYFLY_SNAPSHOT_BIN", "mayfly-snapshot"),
            host.path("work/tools/snapshot"),
        );
        // What the documents build is built.
        for name in ["work/bin/cargo", "work/tools/guest"] {
            copy(Path::new("/bin/true"), host.path(name));
        }
        // What an earlier block of README leaves for later ones.
        copy(&linux.disk, host.path("tmp/mayfly-disk"));
        let owner = if who == Who::User { UID } else { 0 };
        let status = Command::new("sh")
            .args([
                "-c",
                "cd \"$1\" && chown -R $2:$2 work tmp && chmod -R u=rwX,go=rX work tmp",
                "sh",
            ])
            .arg(host.path(""))
            .arg(owner.to_string())
            .status();
        assert!(status.unwrap().success());
        Place { host }
    }

    /// Runs `block` to its end and gives what it put out. Only the disk may be left in /tmp.
    fn run(&self, who: Who, block: &str, reactions: &[(&str, Reaction)]) -> String {
        let (uid, gid) = match who {
            Who::Root => (0, 0),
            Who::User => (UID, GID),
        };
        fs::write(self.host.path("work/block"), format!("{PROLOGUE}{block}")).unwrap();
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "--propagation", "private", "--net", "sh", "-c"])
            .args([SCRIPT, "sh"])
            .arg(self.host.path(""))
            .args([uid.to_string(), gid.to_string()])
            .env("TMPDIR", "/tmp")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .process_group(0);
        let path =
            "/mnt/bin:/mnt/target/x86_64-unknown-linux-gnu/release:/usr/sbin:/usr/bin:/sbin:/bin";
        command.env("PATH", path);
        let mut child = command.spawn().unwrap();
        let pid = child.id().to_string();
        let (lines, arriving) = mpsc::channel();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let reader = std::thread::spawn(move || {
            let mut line = Vec::new();
            while output.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
                let text = String::from_utf8_lossy(&line).into_owned();
                line.clear();
                if lines.send(text).is_err() {
                    return;
                }
            }
        });
        let mut input = child.stdin.take();
        let mut said = String::new();
        let fail = |said: &str, why: &str| -> ! {
            let _ = Command::new("kill")
                .args(["-KILL", "--", &format!("-{pid}")])
                .status();
            panic!("{why}\n--- the block:\n{block}\n--- what it put out:\n{said}");
        };
        loop {
            match arriving.recv_timeout(3 * LINUX_PATIENCE) {
                Ok(line) => {
                    said += &line;
                    let due = reactions.iter().filter(|(what, _)| line.contains(what));
                    for (_, reaction) in due {
                        match reaction {
                            Reaction::Type(text) => {
                                let input = input.as_mut().unwrap();
                                input.write_all(text.as_bytes()).unwrap();
                            }
                            Reaction::Ping(address) => ping(&pid, address, |why| fail(&said, why)),
                            Reaction::PingAfter(words) => {
                                let (_, rest) = said.split_once(words).unwrap();
                                let address = rest.split(' ').next().unwrap().to_owned();
                                ping(&pid, &address, |why| fail(&said, why));
                            }
                        }
                    }
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
                Err(mpsc::RecvTimeoutError::Timeout) => fail(&said, "it goes on for ever"),
            }
        }
        reader.join().unwrap();
        drop(input.take());
        let status = child.wait().unwrap();
        if !status.success() {
            fail(&said, &format!("{status}"));
        }
        for (what, _) in reactions {
            assert!(said.contains(what), "no {what:?} in:\n{said}");
        }
        let left: Vec<_> = fs::read_dir(self.host.path("tmp"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .filter(|name| name != "mayfly-disk" && name != "mayfly.log")
            // The folder of the sockets of a user without a XDG_RUNTIME_DIR.
            .filter(|name| **name != *format!("mayfly-{uid}"))
            .collect();
        assert!(left.is_empty(), "left in /tmp: {left:?}\n{said}");
        said
    }
}

/// Pings from the network namespace of process `pid`, a few times: the guest may just be starting.
fn ping(pid: &str, address: &str, fail: impl Fn(&str)) {
    let output = Command::new("nsenter")
        .args([
            "--target", pid, "--net", "ping", "-c", "10", "-i", "0.5", "-W", "2", address,
        ])
        .output()
        .unwrap();
    if !output.status.success() {
        fail(&format!("no answer from {address}: {output:?}"));
    }
}

/// Every block is run by a test below, or is one of the two commands that everything begins with.
#[test]
fn blocks_when_counted_are_those_that_are_run() {
    let headings = |document| -> Vec<&str> { blocks(document).iter().map(|(of, _)| *of).collect() };
    assert_eq!(
        headings(README),
        [
            "Two commands",
            "Run a guest",
            "Run a guest",
            "Give it a network",
            "Give it a network",
            "Give it a network",
            "Drive it by API",
        ]
    );
    assert_eq!(
        headings(API),
        [
            "Step by step",
            "One request (mayfly's own)",
            "One file, no API"
        ]
    );
    assert_eq!(
        headings(SNAPSHOTS),
        [
            "Boot once, clone many",
            "Fork a running guest",
            "Diffs, and merging them"
        ]
    );
    for name in documents() {
        let has = fs::read_to_string(common::root().join(&name))
            .unwrap()
            .contains("```sh\n");
        assert!(
            !has || ["README.md", "docs/api.md", "docs/snapshots.md"].contains(&name.as_str()),
            "{name}"
        );
    }
}

#[test]
fn readme_runs_a_guest_as_an_ordinary_user() {
    needs!(kvm, root);
    let place = Place::new("readme-run", Who::User, Guest::Linux);
    let block = block(README, "Run a guest", "mayfly-jailer check");
    let said = place.run(
        Who::User,
        block,
        &[("shell ready", Reaction::Type("exit\n"))],
    );
    assert!(said.contains("ok    guest: "), "{said}");
}

#[test]
fn readme_runs_a_command_from_an_image_as_an_ordinary_user() {
    needs!(kvm, root);
    let place = Place::new("readme-image", Who::User, Guest::Linux);
    let block = block(README, "Run a guest", "--image").trim_end();
    let said = place.run(Who::User, &format!("{block} || test $? = 7\n"), &[]);
    assert!(said.contains("hello\n"), "{said}");
}

#[test]
fn readme_gives_root_a_network_that_answers() {
    needs!(kvm, root);
    let place = Place::new("readme-auto", Who::Root, Guest::Linux);
    let auto = block(README, "Give it a network", "--net auto");
    let ready = [
        (
            "shell ready",
            Reaction::PingAfter("the guest's address is "),
        ),
        ("shell ready", Reaction::Type("exit\n")),
    ];
    place.run(Who::Root, auto, &ready);
}

#[test]
fn readme_makes_a_tap_by_hand_that_answers() {
    needs!(kvm, root);
    let place = Place::new("readme-tap", Who::Root, Guest::Linux);
    let by_hand = block(README, "Give it a network", "ip tuntap add");
    let ready = [
        ("shell ready", Reaction::Ping("172.16.0.2")),
        ("shell ready", Reaction::Type("exit\n")),
    ];
    place.run(Who::Root, by_hand, &ready);
}

#[test]
fn readme_gives_an_ordinary_user_a_network() {
    needs!(kvm, root);
    // What pasta and slirp4netns make of it: tests/jail_net.rs.
    let place = Place::new("readme-user", Who::User, Guest::Probe("probe=reset"));
    let block = block(README, "Give it a network", "--net user");
    let said = place.run(Who::User, block, &[]);
    for part in [
        "slirp4netns --configure PID tap0",
        "pasta --config-net PID",
        "where PID is",
    ] {
        assert!(said.contains(part), "no {part:?} in:\n{said}");
    }
}

#[test]
fn readme_drives_a_guest_by_api() {
    needs!(kvm, root);
    let place = Place::new("readme-api", Who::User, Guest::Probe("probe=stay"));
    let block = block(README, "Drive it by API", "InstanceStart");
    let said = place.run(Who::User, block, &[]);
    assert!(said.contains(r#""state":"Running""#), "{said}");
}

#[test]
fn api_tour_does_what_it_says() {
    needs!(kvm, root);
    let place = Place::new("readme-tour", Who::User, Guest::Probe("probe=stay"));
    let said = place.run(Who::User, block(API, "Step by step", "InstanceStart"), &[]);
    for part in [
        r#""state":"Running""#,
        r#""mem_size_mib":160"#,
        "fault_message",
        "/nowhere",
        r#""api_ready_us":"#,
        "# TYPE mayfly_",
    ] {
        assert!(said.contains(part), "no {part}:\n{said}");
    }
    let one = block(API, "One request (mayfly's own)", "PUT");
    let said = place.run(Who::User, one, &[]);
    assert!(said.contains(r#""state":"Running""#), "{said}");
}

#[test]
fn api_page_boots_from_a_file() {
    needs!(kvm, root);
    let place = Place::new("readme-file", Who::User, Guest::Probe("probe=reset"));
    place.run(
        Who::User,
        block(API, "One file, no API", "--config-file"),
        &[],
    );
}

#[test]
fn snapshots_page_clones_forks_and_merges() {
    needs!(kvm, root);
    let place = Place::new("readme-snapshots", Who::User, Guest::Probe("probe=count"));
    for (heading, guests, parts) in [
        ("Boot once, clone many", 3, &[][..]),
        ("Fork a running guest", 2, &[]),
        (
            "Diffs, and merging them",
            1,
            &["kind       Full", "whole: snapshot "],
        ),
    ] {
        let said = place.run(Who::User, block(SNAPSHOTS, heading, "start"), &[]);
        let running = said.matches(r#""state":"Running""#).count();
        assert_eq!(running, guests, "{heading}: {said}");
        for part in parts {
            assert!(said.contains(part), "no {part:?} in:\n{said}");
        }
    }
}

/// README.md, its siblings, and docs/, by their paths in the source.
fn documents() -> Vec<String> {
    let mut found = Vec::new();
    for folder in ["", "docs/"] {
        for entry in fs::read_dir(common::root().join(folder)).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            if name.ends_with(".md") {
                found.push(format!("{folder}{name}"));
            }
        }
    }
    assert!(found.len() > 8, "{found:?}");
    found
}

#[test]
fn links_in_documents_lead_to_files() {
    let mut seen = 0;
    for name in documents() {
        let path = common::root().join(&name);
        let text = fs::read_to_string(&path).unwrap();
        for link in text.split("](").skip(1) {
            let link = link.split([')', '#']).next().unwrap();
            if link.is_empty() || link.starts_with("https://") {
                continue;
            }
            let target = path.parent().unwrap().join(link);
            assert!(
                target.exists(),
                "{name} links to {link}, which is not there"
            );
            seen += 1;
        }
    }
    assert!(seen > 20, "{seen}");
}

/// All Rust source, by path.
fn sources() -> BTreeMap<PathBuf, String> {
    fn collect(folder: &Path, into: &mut BTreeMap<PathBuf, String>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                collect(&path, into);
            } else if path.extension().is_some_and(|kind| kind == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                into.insert(path, text);
            }
        }
    }
    let mut all = BTreeMap::new();
    for folder in ["src", "jailer/src", "jailer/images", "tests"] {
        collect(&common::root().join(folder), &mut all);
    }
    all
}

/// Names of tests that `text` quotes, `"like_this"` or `"like_this..."`, and that `sources` lack.
fn missing_tests(text: &str, sources: &BTreeMap<PathBuf, String>) -> (usize, Vec<String>) {
    let is_name = |word: &&str| {
        let letters = word.strip_suffix("...").unwrap_or(word);
        letters.contains('_')
            && letters
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
    };
    let quoted: Vec<&str> = text.split('"').skip(1).step_by(2).filter(is_name).collect();
    let exists = |name: &str| {
        let function = match name.strip_suffix("...") {
            Some(begin) => format!("fn {begin}"),
            None => format!("fn {name}("),
        };
        sources.values().any(|text| text.contains(&function))
    };
    let missing = quoted.iter().filter(|name| !exists(name));
    (
        quoted.len(),
        missing.map(|name| (*name).to_owned()).collect(),
    )
}

#[test]
fn tests_named_in_security_exist() {
    let sources = sources();
    let (named, missing) = missing_tests(SECURITY, &sources);
    assert!(missing.is_empty(), "SECURITY.md names {missing:?}");
    assert!(named > 20, "{named}");
    // That a wrong name is seen; in two pieces, so that it is not in this file.
    let planted = format!("see \"{}_{}...\"", "name_of", "no_test");
    assert_eq!(missing_tests(&planted, &sources).1.len(), 1);
}

/// Rows of docs/limits.md, how they state the limit, and the constant that it is, by one of its
/// names.
const CONSTANTS: &[(&str, &str, &str, u64)] = &[
    ("vCPUs", "32", "VCPUS_MAX", 32),
    ("guest memory", "16 times", "OVERCOMMIT_MAX", 16),
    ("virtio devices", "19", "DEVICES_MAX", 19),
    (
        "kernel command line",
        "2047 bytes",
        "COMMAND_LINE_MAX",
        2047,
    ),
    ("kernel |", "64 program headers", "PROGRAM_HEADERS_MAX", 64),
    ("kernel |", "64 KiB of notes", "NOTES_MAX", 64 << 10),
    ("one request of a driver", "16 MiB", "REQUEST_MAX", 16 << 20),
    (
        "one request of a driver",
        "256 descriptors",
        "MAX_SEGMENTS",
        256,
    ),
    ("MTU", "68", "MTU_MIN", 68),
    ("name of a TAP", "15 bytes", "TAP_NAME_MAX", 15),
    ("serial number", "20 bytes", "SERIAL_LEN", 20),
    ("id of a microVM", "64", "ID_MAX|INSTANCE_ID_MAX", 64),
    ("API connections", "256", "CONNECTIONS_MAX", 256),
    ("API connections", "at least 8", "CONNECTIONS_MIN", 8),
    ("API requests that wait", "128", "OUTSTANDING_MAX", 128),
    ("body of a request", "51,200 bytes", "BODY_MAX", 51_200),
    ("configuration file", "1 MiB", "CONFIG_FILE_MAX", 1 << 20),
    ("request line", "1,023 bytes", "LINE_MAX", 1024),
    ("head of a request", "16 KiB", "HEAD_MAX", 16 << 10),
    ("head of a request", "64 headers", "HEADERS_MAX", 64),
    (
        "descriptors with a request",
        "32",
        "PASSED_MAX|DESCRIPTORS_MAX",
        32,
    ),
    ("files and taps", "27", "FILES_MAX", 27),
    ("console socket", "4 clients", "CLIENTS", 4),
    ("console socket", "64 KiB", "REPLAY", 64 << 10),
    ("log line |", "1,024 bytes", "LINE_MAX", 1024),
    (
        "log lines that a guest",
        "64 KiB at once",
        "GUEST_BURST",
        64 << 10,
    ),
    (
        "log lines that a guest",
        "4 KiB a second",
        "GUEST_RATE",
        4 << 10,
    ),
    ("reports of the boot timer", "8", "REPORTS_MAX", 8),
    (
        "descriptors of a jailed monitor",
        "2048",
        "OPEN_FILES",
        2048,
    ),
];

/// The values of all constants of that name: products and shifts of plain numbers.
fn constants(name: &str, sources: &BTreeMap<PathBuf, String>) -> Vec<u64> {
    let number = |text: &str| text.trim().replace('_', "").parse::<u64>().ok();
    let value = |text: &str| match text.split_once("<<") {
        Some((value, bits)) => Some(number(value)? << number(bits)?),
        None => text.split('*').map(number).product::<Option<u64>>(),
    };
    let begin = format!("const {name}: ");
    let uses = sources.values().flat_map(|text| text.split(&begin).skip(1));
    let values = uses.filter_map(|rest| rest.split(';').next()?.split_once('='));
    values.filter_map(|(_, text)| value(text)).collect()
}

#[test]
fn limits_are_those_of_the_source() {
    let sources = sources();
    for &(row, stated, name, value) in CONSTANTS {
        let found: Vec<u64> = name
            .split('|')
            .flat_map(|name| constants(name, &sources))
            .collect();
        assert!(
            found.contains(&value),
            "{name} is {found:?}, and not {value}"
        );
        let begin = format!("| {row}");
        let line = LIMITS.lines().find(|line| line.starts_with(&begin));
        let line = line.unwrap_or_else(|| panic!("docs/limits.md has no row {row:?}"));
        assert!(line.contains(stated), "{line}: no {stated:?}");
    }
}

/// Paths of the source that a document quotes, `like/this.rs`, and that are not there.
fn missing_paths(text: &str) -> (usize, Vec<String>) {
    let folders = ["src/", "jailer/", "tests/", "tools/", "resources/", "docs/"];
    let is_path = |word: &&str| {
        folders.iter().any(|folder| word.starts_with(folder))
            && !word.contains(|c: char| c.is_whitespace() || "*{,".contains(c))
    };
    let quoted: Vec<&str> = text.split('`').skip(1).step_by(2).filter(is_path).collect();
    let missing = quoted
        .iter()
        .filter(|path| !common::root().join(path).exists());
    (
        quoted.len(),
        missing.map(|path| (*path).to_owned()).collect(),
    )
}

#[test]
fn paths_in_documents_exist() {
    let mut seen = 0;
    for name in documents() {
        let text = fs::read_to_string(common::root().join(&name)).unwrap();
        // Blocks have fences of the same sign.
        let prose: String = text.split("```").step_by(2).collect();
        let (count, missing) = missing_paths(&prose);
        assert!(missing.is_empty(), "{name} names {missing:?}");
        seen += count;
    }
    assert!(seen > 60, "{seen}");
    assert_eq!(missing_paths("see `src/no/such.rs`").1, ["src/no/such.rs"]);
}
