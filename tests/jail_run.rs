//! `mayfly-jailer run`, with a witness in the monitor's place: what it finds in the empty jail, that
//! it cannot get out, how each end is told, and that bad input gets a message and leaves nothing.
//! Each as root and as an ordinary user made for the test.
//!
//! They take root (to become both), and are skipped, loudly, without it.

#[path = "jail/host.rs"]
mod host;
#[path = "common/needs.rs"]
mod needs;
#[path = "jail/run.rs"]
mod run;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use host::{GID, Report, UID, cgroup_mount, wait_until};
use needs::needs;
use run::{BOTH, Place, Who, activated, fact, inheriting};

/// The place for a test of this name, unless it has to be skipped.
macro_rules! place {
    ($test:literal) => {{
        needs!(root, kvm);
        Place::new($test)
    }};
}

#[test]
fn empty_jail_holds_seven_descriptors_and_nothing_else() {
    let place = place!("rempty");
    let disk = format!("{}:ro", place.path("disk"));
    for who in BOTH {
        let mut command = place.run(who, "report exit=0", &["--drive", &disk, "--id", "box-1"]);
        command.env("SECRET", "1");
        // Descriptors that a careless caller leaves open.
        let shell = inheriting(&command, "exec 3</etc/passwd 7<>/tmp 50</dev/null;");
        let report = Report::parse(place.ends(shell, 0).out.lines());
        assert_eq!(report.one("pid"), "1");
        assert_eq!(report.one("uid"), UID.to_string());
        assert_eq!(report.one("egid"), GID.to_string());
        assert_eq!(report.one("groups"), "0");
        assert_eq!(report.one("cwd"), "/");
        assert_eq!(report.one("host"), "box-1");
        assert_eq!(report.one("nofile"), "2048 2048");
        assert!(report.all("env").is_empty());
        // The root folder alone, which no user may write to.
        assert_eq!(report.all("file").len(), 1, "{:?}", report.all("file"));
        assert!(report.one("file").starts_with("40555 "));
        let fds = [
            "0 Fifo 0",
            "1 Fifo 1",
            "2 Fifo 1",
            "3 Socket 2",
            "4 CharacterDevice 2",
            "5 Fifo 1",
            "6 Fifo 1",
        ];
        assert_eq!(report.all("fd"), fds);
        // Kernel and disk, both for reading.
        assert_eq!(report.all("received"), ["RegularFile 0", "RegularFile 0"]);
        assert!(report.all("open").iter().all(|line| line.ends_with(" no")));
    }
}

#[test]
fn passed_descriptor_may_be_named_by_its_path() {
    let place = place!("rdevfd");
    let open = format!("exec 9<{};", place.path("disk"));
    for who in BOTH {
        for path in ["/dev/fd/9:ro", "/proc/self/fd/9:ro"] {
            let command = place.run(who, "report exit=0", &["--drive", path]);
            let report = place.ends(inheriting(&command, &open), 0);
            let report = Report::parse(report.out.lines());
            assert_eq!(report.all("received"), ["RegularFile 0", "RegularFile 0"]);
            place.refuses(inheriting(&command, ""), "No such file");
        }
        // A number that was not passed is not taken from what is opened meanwhile.
        let disk = format!("{}:ro", place.path("disk"));
        let words = [
            &["--drive", disk.as_str()].repeat(12)[..],
            &["--net", "fd:9"],
        ]
        .concat();
        let command = place.run(who, "exit=0", &words);
        place.refuses(inheriting(&command, ""), "descriptor 9");
    }
}

#[test]
fn monitor_gone_bad_cannot_get_out() {
    let place = place!("rattack");
    let tcp = TcpListener::bind("0.0.0.0:0").unwrap();
    let port = tcp.local_addr().unwrap().port();
    let address = SocketAddr::from_abstract_name(place.host.name.as_bytes()).unwrap();
    let _abstract = UnixListener::bind_addr(&address).unwrap();
    let mut victim = Command::new("sleep").arg("1000").spawn().unwrap();
    let words = format!(
        "attack victim={} port={port} abstract={} exit=0",
        victim.id(),
        place.host.name
    );
    // An outsider of the jail's own user is no easier to reach.
    let mut kinds: Vec<(Who, Vec<&str>)> = vec![
        (Who::Root, vec![]),
        (Who::User, vec![]),
        (Who::Root, vec!["--uid", "0", "--gid", "0"]),
    ];
    if fs::File::open("/dev/net/tun").is_ok() {
        kinds.push((Who::Root, vec!["--net", "auto"]));
        kinds.push((Who::User, vec!["--net", "user"]));
    }
    for (who, more) in kinds {
        let report = Report::parse(place.ends(place.run(who, &words, &more), 0).out.lines());
        let attacks = report.all("attack");
        assert!(attacks.len() > 100, "{attacks:?}");
        for attack in attacks {
            // It is root's number already, which no user has in there.
            if more.contains(&"0") && attack.starts_with("set") {
                continue;
            }
            assert!(attack.contains(" refused "), "{who:?} {more:?}: {attack}");
        }
    }
    assert!(victim.try_wait().unwrap().is_none());
    victim.kill().unwrap();
    victim.wait().unwrap();
}

#[test]
fn every_end_has_its_code_and_its_word() {
    let place = place!("rends");
    let report = place.path("shared/report.json");
    for who in BOTH {
        for (words, more, code, word) in [
            ("exit=0", &[][..], 0, "ended"),
            ("end=shutdown exit=0", &[], 0, "shutdown"),
            ("end=reset exit=0", &[], 0, "reset"),
            ("end=reset_and_more exit=0", &[], 0, "ended"),
            ("end=reset exit=160", &[], 160, "crash"),
            ("exit=1", &[], 1, "error"),
            ("exit=148", &[], 148, "seccomp"),
            ("exit=149", &[], 149, "file-cut-short"),
            ("exit=160", &[], 160, "crash"),
            ("exit=161", &[], 161, "not-runnable"),
            ("exit=162", &[], 162, "worker-failed"),
            ("exit=163", &[], 163, "fault"),
            ("abort", &[], 139, "fault"),
            ("stay", &["--timeout", "0.3"], 124, "time-limit"),
            ("refuse", &[], 1, "not-started"),
        ] {
            let more = [more, &["--exit-report", &report]].concat();
            let output = place.run(who, words, &more).output().unwrap();
            let text = fs::read_to_string(&report).unwrap();
            assert_eq!(fact(&text, "ended"), word, "{words}: {text}");
            assert_eq!(
                fact(&text, "exit_code"),
                code.to_string(),
                "{words}: {text}"
            );
            assert_eq!(output.status.code(), Some(code), "{words}: {text}");
            let wall: u64 = fact(&text, "wall_us").parse().unwrap();
            assert!((1000..60_000_000).contains(&wall), "{text}");
            assert!(
                fact(&text, "peak_memory_bytes").parse::<u64>().unwrap() > 100_000,
                "{text}"
            );
            let err = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!(
                err.lines().count(),
                usize::from(code != 0),
                "{words}: {err}"
            );
            fs::remove_file(&report).unwrap();
            place.nothing_is_left();
        }
    }
}

/// `command`, started by another program, which is told to with `words`.
fn started_by(words: &[&str], command: &Command) -> Command {
    let mut other = Command::new(words[0]);
    other.args(&words[1..]);
    other.arg(command.get_program()).args(command.get_args());
    other.stdin(Stdio::null());
    other
}

#[test]
fn caller_that_ignores_its_children_is_told_every_end_all_the_same() {
    let place = place!("rsigchld");
    let deaf = ["env", "--ignore-signal=CHLD"];
    for (words, code) in [("end=shutdown exit=0", 0), ("exit=160", 160)] {
        let command = place.run(Who::Root, words, &["--api-sock", &place.shared("api")]);
        place.ends(started_by(&deaf, &command), code);
    }
    // With the witness for a monitor `check` fails, but never for want of the end.
    let command = place.jailer(Who::Root, &["check"]);
    let ended = place.ends(started_by(&deaf, &command), 1);
    assert!(!ended.out.contains("signal 9"), "{}", ended.out);
}

#[test]
fn refusal_of_the_monitor_is_passed_on_in_one_line() {
    let place = place!("rrefuse");
    for who in BOTH {
        place.refuses(
            place.run(who, "refuse", &[]),
            "start the microVM: Not with this one.",
        );
        place.refuses(
            place.run(who, "hangup", &[]),
            "was closed before the answer",
        );
    }
}

#[test]
fn killed_and_asked_to_end_are_told_apart() {
    let place = place!("rkilled");
    for who in BOTH {
        let running = Running::start(&place, who, "report stay", &[]);
        kill(running.monitor(), "KILL");
        let (status, err) = running.end();
        assert_eq!(status.code(), Some(137), "{err}");
        assert!(err.contains("signal 9"), "{err}");
        place.nothing_is_left();
        let signals = [
            ("TERM", 143),
            ("INT", 130),
            ("HUP", 129),
            ("USR1", 138),
            ("XCPU", 152),
            ("SEGV", 139),
            ("40", 168),
        ];
        for (signal, code) in signals {
            let running = Running::start(&place, who, "report stay", &[]);
            // The witness does not handle SIGTERM, and as process 1 it does not even die of it.
            kill_and_see_taken(running.child.id(), signal);
            if code > 143 || code == 138 {
                // Once is enough, for those above.
                kill(running.child.id(), signal);
            }
            let (status, err) = running.end();
            assert_eq!(status.code(), Some(code), "{err}");
            place.nothing_is_left();
        }
    }
}

#[test]
fn death_of_the_jailer_is_the_end_of_the_guest() {
    let place = place!("rorphan");
    for who in BOTH {
        let running = Running::start(&place, who, "report stay", &[]);
        kill(running.child.id(), "KILL");
        let (status, _) = running.end();
        assert_eq!(status.signal(), Some(9));
        place.nothing_is_left();
    }
}

#[test]
fn report_when_the_jailer_is_killed_is_written_by_the_keeper() {
    let place = place!("rkeeper");
    let report = place.path("shared/report.json");
    let socket = place.shared("api");
    for who in BOTH {
        for more in [&[][..], &["--api-sock", &socket]] {
            let more = [more, &["--exit-report", &report]].concat();
            let running = Running::start(&place, who, "report stay", &more);
            kill(running.child.id(), "KILL");
            running.end();
            wait_until("the report", || fs::metadata(&report).is_ok());
            let text = fs::read_to_string(&report).unwrap();
            assert_eq!(fact(&text, "ended"), "jailer-killed", "{text}");
            assert_eq!(fact(&text, "exit_code"), "137", "{text}");
            assert_eq!(fact(&text, "id"), place.host.name, "{text}");
            assert!(fact(&text, "wall_us").parse::<u64>().unwrap() > 1000);
            fs::remove_file(&report).unwrap();
            place.nothing_is_left();
        }
    }
}

#[test]
fn end_of_the_parent_or_of_a_pipe_is_the_end_where_that_is_asked_for() {
    let place = place!("rparent");
    let report = place.path("shared/report.json");
    let ended = |words: &str| {
        wait_until("the report", || fs::metadata(&report).is_ok());
        let text = fs::read_to_string(&report).unwrap();
        assert_eq!(fact(&text, "ended"), "stopped", "{text}");
        assert_eq!(fact(&text, "exit_code"), "129", "{text}");
        assert!(fact(&text, "sentence").contains(words), "{text}");
        fs::remove_file(&report).unwrap();
        place.nothing_is_left();
    };
    for who in BOTH {
        // A shell in a session of its own starts it and waits; then the shell is killed.
        let more = ["--with-parent", "--exit-report", &report];
        let command = place.run(who, "report stay", &more);
        let mut starter = Command::new("setsid");
        starter.args(["bash", "-c", "\"$0\" \"$@\"; exit"]);
        starter
            .arg(command.get_program())
            .args(command.get_args())
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        let mut starter = starter.spawn().unwrap();
        read_report(starter.stdout.take().unwrap());
        starter.kill().unwrap();
        starter.wait().unwrap();
        ended("--with-parent");

        let more = ["--end-with-fd", "9", "--exit-report", &report];
        let command = place.run(who, "report stay", &more);
        let (theirs, ours) = std::io::pipe().unwrap();
        let mut shell = inheriting(&command, "exec 9<&0 0</dev/null;");
        shell.stdin(OwnedFd::from(theirs)).stdout(Stdio::piped());
        let mut child = shell.spawn().unwrap();
        drop(shell);
        read_report(child.stdout.take().unwrap());
        drop(ours);
        assert_eq!(child.wait().unwrap().code(), Some(129));
        ended("--end-with-fd");

        let command = place.run(who, "report stay", &more);
        let mut process = Command::new("sleep").arg("100000").spawn().unwrap();
        let pid = rustix::process::Pid::from_child(&process);
        let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty());
        let mut shell = inheriting(&command, "exec 9<&0 0</dev/null;");
        shell.stdin(pidfd.unwrap()).stdout(Stdio::piped());
        let mut child = shell.spawn().unwrap();
        read_report(child.stdout.take().unwrap());
        process.kill().unwrap();
        process.wait().unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(129));
        ended("--end-with-fd");
        let command = place.run(who, "exit=0", &["--end-with-fd", "9"]);
        place.refuses(inheriting(&command, "exec 9</dev/null;"), "hangs up");
        let command = place.run(who, "exit=0", &["--end-with-fd", "9"]);
        place.refuses(inheriting(&command, ""), "descriptor 9");
    }
}

/// Reads the report of a witness to its last line, and returns the rest of its output.
fn read_report(out: std::process::ChildStdout) -> std::process::ChildStdout {
    let mut out = std::io::BufReader::new(out);
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        let count = std::io::BufRead::read_line(&mut out, &mut line).unwrap();
        lines.push(line.trim_end().to_owned());
        if count == 0 || line.trim_end() == "end" {
            break;
        }
    }
    Report::parse(lines.iter().map(String::as_str)).one("end");
    out.into_inner()
}

/// A run that stays, in which the guest has spoken.
struct Running {
    child: std::process::Child,
}

impl Running {
    fn start(place: &Place, who: Who, words: &str, more: &[&str]) -> Running {
        let mut command = place.run(who, words, more);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        child.stdout = child.stdout.take().map(read_report);
        Running { child }
    }

    /// The process in the jail.
    fn monitor(&self) -> u32 {
        let pid = self.child.id();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        let is_keeper = |pid: &&str| {
            fs::read_to_string(format!("/proc/{pid}/comm"))
                .unwrap_or_default()
                .trim()
                == "mayfly-keeper"
        };
        let mut others = children.split_whitespace().filter(|pid| !is_keeper(pid));
        others.next().expect("it has one").parse().unwrap()
    }

    fn end(mut self) -> (std::process::ExitStatus, String) {
        let mut err = String::new();
        self.child
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut err)
            .unwrap();
        (self.child.wait().unwrap(), err)
    }
}

fn kill(pid: u32, signal: &str) {
    let status = Command::new("kill")
        .args([&format!("-{signal}"), &pid.to_string()])
        .status();
    assert!(status.unwrap().success());
}

#[test]
fn console_is_relayed_both_ways_and_log_goes_elsewhere() {
    let place = place!("rconsole");
    for who in BOTH {
        let log = place.path("shared/log");
        let mut command = place.run(who, "echo log=some_words exit=0", &["--log", &log]);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // Ctrl-A X means nothing without a terminal.
        child.stdin.take().unwrap().write_all(b"ab\x01xq").unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.stdout, b"<a><b><\\x01><x><q>");
        assert_eq!(output.status.code(), Some(0));
        assert_eq!(
            fs::read_to_string(&log).unwrap(),
            "now [witness:main:INFO] some words\n"
        );
        fs::remove_file(&log).unwrap();

        let file = place.path("shared/console");
        place
            .run(who, "report exit=0", &["--console", &file])
            .status()
            .unwrap();
        let report = fs::read_to_string(&file).unwrap();
        assert_eq!(Report::parse(report.lines()).one("end"), "");
        fs::remove_file(&file).unwrap();
        let ended = place.ends(place.run(who, "report exit=0", &["--console", "none"]), 0);
        assert!(ended.out.is_empty());
        // Without a place of its own, the log shows troubles only.
        let ended = place.ends(place.run(who, "log=quiet warn=loud exit=0", &[]), 0);
        assert_eq!(ended.err, "now [witness:main:WARN] loud\n");
        // What the monitor writes is passed on as it is: names travel with descriptors.
        let ended = place.ends(place.run(who, "warn=descriptor_0 exit=0", &[]), 0);
        assert_eq!(ended.err, "now [witness:main:WARN] descriptor 0\n");
    }
}

#[test]
fn reader_that_does_not_read_holds_nobody_up() {
    let place = place!("rslow");
    for who in BOTH {
        let mut command = place.run(who, "flood exit=0", &["--timeout", "1"]);
        // Never read: the guest's flood stops at full buffers, the time limit still holds.
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        // If it did not hold, this would wait for ever.
        assert_eq!(child.wait().unwrap().code(), Some(124));
        let mut command = place.run(who, "flood flood-kib=2000 exit=0", &[]);
        let output = command.stdout(Stdio::piped()).output().unwrap();
        assert_eq!(output.stdout.len(), 2000 * 1024);
        place.nothing_is_left();
    }
}

#[test]
fn console_file_at_its_limit_costs_bytes_and_not_the_run() {
    let place = place!("rfsize");
    let (file, report) = (place.path("console"), place.path("report.json"));
    let more = ["--console", &file, "--exit-report", &report];
    let words = "flood flood-kib=200 end=shutdown exit=0";
    let command = inheriting(&place.run(Who::Root, words, &more), "ulimit -f 20;");
    place.ends(command, 0);
    assert_eq!(fs::metadata(&file).unwrap().len(), 20 * 1024);
    let text = fs::read_to_string(&report).unwrap();
    assert_eq!(fact(&text, "ended"), "shutdown", "{text}");
    // The monitor has the signal as every program has it.
    let command = place.run(Who::Root, "report exit=0", &[]);
    let report = Report::parse(place.ends(command, 0).out.lines());
    assert_eq!(report.one("xfsz"), "0");
}

#[test]
fn terminal_is_raw_while_the_guest_runs_and_ctrl_a_x_leaves() {
    let place = place!("rterminal");
    for who in BOTH {
        let command = place.run(who, "report echo", &[]);
        // script(1) gives it a terminal.
        let words: Vec<String> = std::iter::once(command.get_program())
            .chain(command.get_args())
            .map(|word| format!("'{}'", word.to_str().unwrap().replace('\'', "'\\''")))
            .collect();
        let mut script = Command::new("script");
        script.args([
            "-qec",
            &format!(
                "stty -g >&2; {}; code=$?; stty -g >&2; exit $code",
                words.join(" ")
            ),
        ]);
        script
            .arg("/dev/null")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut child = script.spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let mut stdout = child.stdout.take().unwrap();
        let mut text = String::new();
        let mut read_until = |text: &mut String, words: &str| {
            while !text.contains(words) {
                let mut bytes = [0; 4096];
                let count = stdout.read(&mut bytes).unwrap_or(0);
                assert!(count > 0, "{words} in {text:?}");
                text.push_str(&String::from_utf8_lossy(&bytes[..count]));
            }
        };
        read_until(&mut text, "end\r\n");
        stdin.write_all(b"a\x03\x01\x01").unwrap();
        read_until(&mut text, "<a><\\x03><\\x01>");
        stdin.write_all(b"\x01x").unwrap();
        let _ = stdout.read_to_string(&mut text);
        let status = child.wait().unwrap();
        // Ctrl-C is the guest's, and so is a second Ctrl-A.
        assert!(text.contains("<a><\\x03><\\x01>"), "{who:?}: {text:?}");
        assert_eq!(status.code(), Some(130), "{text}");
        assert!(text.contains("Ctrl-A X was typed"), "{text}");
        let settings: Vec<&str> = text
            .lines()
            .filter(|line| line.matches(':').count() > 10)
            .collect();
        assert_eq!(settings.len(), 2, "{text:?}");
        assert_eq!(settings[0].trim(), settings[1].trim());
        place.nothing_is_left();
    }
}

#[test]
fn terminal_is_the_foregrounds_alone_and_raw_again_after_a_stop() {
    let place = place!("rjobs");
    let command = place.run(Who::Root, "report echo", &[]);
    let words: Vec<String> = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| quoted(word.to_str().unwrap()))
        .collect();
    let go = place.shared("go");
    // A shell with jobs: in the background, brought to the foreground, stopped, brought back.
    let script = format!(
        "set -m; s=$(stty -g); echo $s; {} & echo job $!; until [ -e {go} ]; do sleep 0.05; done; rm {go}; \
         stty -g; echo unchanged; fg; stty $s; fg; stty -g",
        words.join(" ")
    );
    let mut terminal = Command::new("script");
    let script = format!("bash -c {}", quoted(&script));
    terminal.args(["-qec", &script, "/dev/null"]);
    let mut child = terminal
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let mut text = String::new();
    let mut read_until = |text: &mut String, words: &str| {
        while !text.contains(words) {
            let mut bytes = [0; 4096];
            let count = stdout.read(&mut bytes).unwrap_or(0);
            assert!(count > 0, "{words} in {text:?}");
            text.push_str(&String::from_utf8_lossy(&bytes[..count]));
        }
    };
    read_until(&mut text, "end\r\n");
    fs::write(&go, "").unwrap();
    read_until(&mut text, "unchanged\r\n");
    // Only a raw terminal gives these to the guest: without a newline, and the second at all.
    for (key, shown) in [(&b"a"[..], "<a>"), (b"\x03", "<\\x03>")] {
        stdin.write_all(key).unwrap();
        read_until(&mut text, shown);
    }
    let (_, rest) = text.split_once("job ").unwrap();
    let job = rest.split_whitespace().next().unwrap().parse().unwrap();
    kill(job, "STOP");
    read_until(&mut text, "Stopped");
    for (key, shown) in [(&b"b"[..], "<b>"), (b"\x04", "<\\x04>")] {
        stdin.write_all(key).unwrap();
        read_until(&mut text, shown);
    }
    stdin.write_all(b"\x01x").unwrap();
    let mut rest = String::new();
    let _ = stdout.read_to_string(&mut rest);
    text.push_str(&rest);
    assert!(child.wait().unwrap().success(), "{text}");
    let settings: Vec<&str> = text
        .lines()
        .filter(|line| line.matches(':').count() > 10)
        .collect();
    assert_eq!(settings.len(), 3, "{text:?}");
    assert!(
        settings.iter().all(|it| it.trim() == settings[0].trim()),
        "{text:?}"
    );
    place.nothing_is_left();
}

#[test]
fn terminal_is_given_back_whatever_ends_the_jailer() {
    let place = place!("rgiven");
    for signal in ["USR1", "USR2", "ALRM", "XCPU", "XFSZ", "IO", "ABRT", "34"] {
        // XFSZ ends nothing, so that the time limit has to; a busy host starts the witness in less. What
        // the others end is not to meet a limit at all.
        let limit = if signal == "XFSZ" { "10" } else { "600" };
        let command = place.run(Who::Root, "report stay", &["--timeout", limit]);
        let words: Vec<String> = std::iter::once(command.get_program())
            .chain(command.get_args())
            .map(|word| format!("'{}'", word.to_str().unwrap()))
            .collect();
        let script = format!("stty -g >&2; echo job $$; exec {}", words.join(" "));
        let script = format!("bash -c {}; stty -g >&2", quoted(&script));
        let mut terminal = Command::new("script");
        terminal.args(["-qec", &script, "/dev/null"]);
        terminal.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = terminal.spawn().unwrap();
        let mut stdout = child.stdout.take().unwrap();
        let mut text = String::new();
        while !text.contains("end\r\n") {
            let mut bytes = [0; 4096];
            let count = stdout.read(&mut bytes).unwrap_or(0);
            assert!(count > 0, "{signal}: {text:?}");
            text.push_str(&String::from_utf8_lossy(&bytes[..count]));
        }
        let (_, rest) = text.split_once("job ").unwrap();
        let job = rest.split_whitespace().next().unwrap().parse().unwrap();
        // A second signal does not wait for the witness to end by itself.
        kill_and_see_taken(job, signal);
        kill(job, signal);
        let _ = stdout.read_to_string(&mut text);
        child.wait().unwrap();
        let settings: Vec<&str> = text
            .lines()
            .filter(|line| line.matches(':').count() > 10)
            .collect();
        assert_eq!(settings.len(), 2, "{signal}: {text:?}");
        assert_eq!(settings[0].trim(), settings[1].trim(), "{signal}");
        let expected = if signal == "XFSZ" {
            "time limit"
        } else {
            "asked for the end"
        };
        assert!(text.contains(expected), "{signal}: {text:?}");
        place.nothing_is_left();
    }
}

/// As one word of a shell.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

#[test]
fn signals_that_the_caller_ignores_end_nothing() {
    let place = place!("rnohup");
    let command = place.run(Who::Root, "report stay", &["--timeout", "1"]);
    let mut command = started_by(
        &["env", "--ignore-signal=HUP", "--ignore-signal=USR1"],
        &command,
    );
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let _out = read_report(child.stdout.take().unwrap());
    // The second of a kind would not wait for the witness.
    for signal in ["HUP", "USR1", "HUP", "USR1"] {
        kill_and_see_taken(child.id(), signal);
    }
    assert_eq!(child.wait().unwrap().code(), Some(124));
    place.nothing_is_left();
}

#[test]
fn api_socket_at_a_path_is_for_clients_and_gives_way_when_dead() {
    let place = place!("rapi");
    for who in BOTH {
        let socket = place.shared("api");
        // Left by a process that was killed.
        drop(UnixListener::bind(&socket).unwrap());
        if who == Who::User {
            std::os::unix::fs::chown(&socket, Some(UID), Some(GID)).unwrap();
        }
        let running = Running::start(&place, who, "report stay", &["--api-sock", &socket]);
        assert!(UnixStream::connect(&socket).is_ok());
        let again = place
            .run(who, "exit=0", &["--api-sock", &socket])
            .output()
            .unwrap();
        let err = String::from_utf8_lossy(&again.stderr).into_owned();
        assert!(err.contains("there already"), "{err}");
        kill(running.child.id(), "TERM");
        running.end();
        place.nothing_is_left();

        // Without a machine, the first request comes from outside.
        let mut command = place.jailer(who, &["run", "--api-sock", &socket]);
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        wait_until("the socket", || UnixStream::connect(&socket).is_ok());
        kill(child.id(), "TERM");
        assert!(!child.wait().unwrap().success());
        place.nothing_is_left();
    }
}

#[test]
fn caller_paths_may_lead_through_symbolic_links() {
    let place = place!("rlinks");
    std::os::unix::fs::symlink(place.path("shared"), place.path("link")).unwrap();
    let [api, console, report] = ["api", "console", "report.json"].map(|name| {
        let path = place.path(&format!("link/{name}"));
        (path, place.shared(name))
    });
    let at = format!("unix:{}", console.0);
    let more = ["--api-sock", &api.0, "--console", &at];
    for who in BOTH {
        let more = [&more[..], &["--exit-report", &report.0]].concat();
        let mut child = place.run(who, "stay", &more).spawn().unwrap();
        for path in [&api.1, &console.1] {
            wait_until("the socket", || UnixStream::connect(path).is_ok());
        }
        kill_until_it_ends(&mut child, "TERM");
        let text = fs::read_to_string(&report.1).unwrap();
        assert_eq!(fact(&text, "ended"), "stopped", "{text}");
        fs::remove_file(&report.1).unwrap();
        place.nothing_is_left();
    }
}

/// Sends a signal, and waits until the process has taken it: a second one that comes earlier is none.
fn kill_and_see_taken(pid: u32, signal: &str) {
    kill(pid, signal);
    wait_until("the signal taken", || {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let pending = status.lines().find_map(|line| line.strip_prefix("ShdPnd:"));
        pending.is_none_or(|mask| mask.trim().bytes().all(|digit| digit == b'0'))
    });
}

/// Sends a signal again and again: the witness does not end at the first.
fn kill_until_it_ends(child: &mut std::process::Child, signal: &str) {
    wait_until("the end", || {
        let _ = Command::new("kill")
            .args([&format!("-{signal}"), &child.id().to_string()])
            .stderr(Stdio::null())
            .status();
        child.try_wait().unwrap().is_some()
    });
}

#[test]
fn socket_from_a_service_manager_is_handed_on() {
    let place = place!("rlisten");
    for who in BOTH {
        let path = place.shared("activated");
        let listener = UnixListener::bind(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
        let command = place.run(who, "report exit=0", &[]);
        let mut shell = activated(&command, listener.try_clone().unwrap());
        let output = shell.output().unwrap();
        let err = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(0), "{err}");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            Report::parse(text.lines())
                .all("fd")
                .contains(&"3 Socket 2".to_owned())
        );
        // It is the manager's: it stays.
        assert!(fs::metadata(&path).is_ok());
        drop(listener);
        fs::remove_file(&path).unwrap();
        place.nothing_is_left();
    }
}

#[test]
fn bad_input_gets_a_sentence_and_makes_nothing() {
    let place = place!("rbad");
    let path = |name: &str| place.path(name);
    let long = "a".repeat(101);
    fs::write(place.path("broken.json"), "{ \"boot-source\": ").unwrap();
    fs::write(place.path("list.json"), "[]").unwrap();
    fs::write(place.path("odd.json"), "{ \"drives\": 7 }").unwrap();
    let text = "{ \"boot-source\": { \"kernel_image_path\": \"/k\" }, \"drives\": 7 }";
    fs::write(place.path("drives.json"), text).unwrap();
    Command::new("mkfifo")
        .arg(place.path("fifo"))
        .status()
        .unwrap();
    for name in [
        "broken.json",
        "list.json",
        "odd.json",
        "drives.json",
        "fifo",
    ] {
        fs::set_permissions(place.path(name), fs::Permissions::from_mode(0o666)).unwrap();
    }
    let (none, fifo, folder) = (path("none"), path("fifo"), path("shared"));
    let below_none = path("none/x");
    let endless = path(&"x".repeat(300));
    let kernel = path("kernel");
    let many: &[(&[&str], &str)] = &[
        (&["--id", "a/b"], "1 to 100 letters"),
        (&["--id", &long], "1 to 100 letters"),
        (&["--id", ""], "1 to 100 letters"),
        (&["--id", "a\nb"], "use --id \"a?b\""),
        (&["--initrd", "/x\x1b[31m"], "/x?[31m: No such file"),
        (&["--drive", &none], "No such file"),
        (&["--drive", &folder], "Is a directory"),
        (&["--drive", &fifo], "it is a pipe"),
        (&["--drive", "/dev/null"], "a character device"),
        (&["--initrd", &none], "No such file"),
        (&["--net", "mfnone"], "no such interface"),
        (&["--net", "lo"], "tap"),
        (&["--net", "a/b"], "no such interface"),
        (&["--net", "fd:40"], "descriptor 40"),
        (&["--net", "fd:2"], "above 2"),
        (&["--net", "user", "--net", "user"], "given twice"),
        (&["--limit", "cpus=x"], "above 0"),
        (&["--cgroup", "nonsense.file=1"], "nonsense"),
        (&["--resource-limit", "no-file=99999999999"], "above what"),
        (&["--console", &below_none], "No such file"),
        (&["--log", &below_none], "No such file"),
        (&["--exit-report", &below_none], "No such file"),
        (&["--exit-report", &endless], "too long"),
        (&["--api-sock", &below_none], "make its folder"),
        (&["--api-sock", &kernel], "there already"),
        (&["--timeout", "never"], "above 0"),
        (&["--nonsense"], "not known"),
        (&["--config", &kernel], "describes the machine already"),
    ];
    for who in BOTH {
        for (words, expected) in many {
            place.refuses(place.run(who, "exit=0", words), expected);
        }
        for (file, expected) in [
            ("broken.json", "EOF"),
            ("list.json", "expected an object"),
            ("odd.json", "boot-source"),
            ("drives.json", "expected a sequence"),
            ("none", "No such file"),
        ] {
            let file = path(file);
            place.refuses(place.jailer(who, &["run", "--config", &file]), expected);
        }
        place.refuses(place.jailer(who, &["run"]), "nothing to run");
        let command = place.run(who, "exit=0", &["--net", "fd:9"]);
        place.refuses(
            inheriting(&command, "exec 9</dev/zero;"),
            "not an attached tap",
        );
    }
    for who in BOTH {
        place.ends(
            place.run(who, "exit=0", &["--resource-limit", "no-file=43"]),
            0,
        );
        // Nothing is wrong with this kernel.
        let command = place.run(who, "exit=0", &["--resource-limit", "no-file=99999999999"]);
        let err = place.refuses(command, "above what");
        assert!(!err.contains("namespaces"), "{err}");
    }
    let sticky = place.host.path("sticky");
    fs::create_dir(&sticky).unwrap();
    fs::set_permissions(&sticky, fs::Permissions::from_mode(0o1777)).unwrap();
    fs::write(sticky.join("r"), "root's").unwrap();
    let theirs = path("sticky/r");
    place.refuses(
        place.run(Who::User, "exit=0", &["--exit-report", &theirs]),
        "another user's",
    );
    place.refuses(
        place.run(Who::User, "exit=0", &["--uid", "0"]),
        "must be your own",
    );
    place.refuses(
        place.run(Who::User, "exit=0", &["--net", "auto"]),
        "that takes root",
    );
    place.refuses(place.run(Who::Stranger, "exit=0", &[]), "group kvm");
    let mut bare = Command::new(place.host.path("mayfly-jailer"));
    bare.args(["run", "--kernel", &kernel]);
    place.refuses(bare, "--uid or --gid is missing");
    let mut bare = Command::new(place.host.path("mayfly-jailer"));
    bare.args(["run", "--kernel", &kernel, "--uid", "1", "--gid", "1"]);
    place.refuses(bare, "name it with --mayfly");
}

#[test]
fn host_without_user_namespaces_is_named_with_the_remedy() {
    let place = place!("rnouser");
    // A user namespace in which no further one may be made stands for a host like that.
    let command = place.run(Who::User, "exit=0", &[]);
    let mut inner = Command::new(command.get_program());
    let words: Vec<_> = command.get_args().collect();
    let is_jailer = |word: &&std::ffi::OsStr| word.to_string_lossy().ends_with("/mayfly-jailer");
    let at = words.iter().position(is_jailer).unwrap();
    inner.args(&words[..at]);
    inner.args([
        "unshare",
        "--user",
        "--map-current-user",
        "--keep-caps",
        "sh",
        "-c",
    ]);
    inner.arg("echo 0 >/proc/sys/user/max_user_namespaces; exec \"$0\" \"$@\"");
    inner.args(&words[at..]).stdin(Stdio::null());
    let text = place.refuses(inner, "user.max_user_namespaces");
    assert!(text.contains("sysctl -w"), "{text}");
}

/// `jailer`, started by the root of a user namespace that `options` of unshare(1) make.
fn as_namespace_root(place: &Place, who: Who, options: &[&str], jailer: &Command) -> Command {
    let mut command = match who {
        Who::Root => Command::new("unshare"),
        _ => place.as_user(who, std::path::Path::new("unshare")),
    };
    command.args(options).arg(jailer.get_program());
    command.args(jailer.get_args()).stdin(Stdio::null());
    command
}

#[test]
fn root_of_a_user_namespace_is_an_ordinary_user() {
    let place = place!("rns");
    // The jailer as such a user starts it: without --uid, by its own path.
    let (kernel, id) = (place.path("kernel"), place.host.name.clone());
    let (jailer, monitor) = (place.path("mayfly-jailer"), place.host.exec_file());
    let run = |more: &[&str]| {
        let mut command = Command::new(&jailer);
        command.args(["run", "--kernel", &kernel, "--id", &id]);
        command.args(["--cmdline", "report exit=0"]);
        command.arg("--mayfly").arg(&monitor).args(more);
        command
    };
    for who in BOTH {
        for options in [&["-r"][..], &["-rm"], &["-rp", "--fork", "--mount-proc"]] {
            let command = as_namespace_root(&place, who, options, &run(&[]));
            let report = Report::parse(place.ends(command, 0).out.lines());
            assert_eq!(report.one("uid"), "0", "{who:?} {options:?}");
            assert!(report.one("file").starts_with("40555 "));
            // It is only itself, whatever it asks for.
            let other = run(&["--uid", "1", "--gid", "0"]);
            let command = as_namespace_root(&place, who, options, &other);
            place.refuses(command, "--uid");
        }
    }
}

#[test]
fn memory_limit_is_told_from_other_kills() {
    let place = place!("rmemory");
    if cgroup_mount("memory").is_none() {
        needs::skip("rmemory", "this host has no memory cgroup of version 1");
        return;
    }
    let report = place.path("report.json");
    let more = [
        "--limit",
        "memory=24M",
        "--limit",
        "pids=30",
        "--limit",
        "cpus=1.5",
        "--exit-report",
        &report,
    ];
    let ended = place.ends(place.run(Who::Root, "hog=100 exit=0", &more), 164);
    assert!(ended.err.contains("memory limit"), "{}", ended.err);
    let text = fs::read_to_string(&report).unwrap();
    assert_eq!(fact(&text, "ended"), "memory-limit");
    assert_eq!(fact(&text, "peak_memory_by"), "cgroup");
    let peak: u64 = fact(&text, "peak_memory_bytes").parse().unwrap();
    assert!((20 << 20..=24 << 20).contains(&peak), "{text}");
    place.ends(place.run(Who::Root, "hog=5 exit=0", &more), 0);
    // Too little to begin with, on the way into the jail or in the monitor before the guest.
    for limit in ["memory=1", "memory=100K"] {
        let more = ["--limit", limit, "--exit-report", &report];
        place.ends(place.run(Who::Root, "exit=0", &more), 164);
        let text = fs::read_to_string(&report).unwrap();
        assert_eq!(fact(&text, "ended"), "memory-limit", "{limit}: {text}");
    }
}

#[test]
fn callers_own_group_holds_the_microvm_and_its_kills_are_told() {
    let place = place!("rown");
    let Some(memory) = cgroup_mount("memory") else {
        needs::skip("rown", "this host has no memory cgroup of version 1");
        return;
    };
    let group = memory.join(format!("mfown-{}", std::process::id()));
    fs::create_dir(&group).unwrap();
    let _broom = Broom(vec![group.clone()]);
    fs::write(group.join("memory.limit_in_bytes"), "60M").unwrap();
    let enter = format!("echo $$ >{}/cgroup.procs;", group.display());
    let report = place.path("report.json");
    let more = ["--exit-report", &report];
    let limited = [&more[..], &["--limit", "memory=200M", "--limit", "pids=30"]].concat();
    // With a group of its own, which is below, and without one.
    for more in [&limited[..], &more] {
        let command = place.run(Who::Root, "hog=100 exit=0", more);
        let ended = place.ends(inheriting(&command, &enter), 164);
        assert!(ended.err.contains("memory limit"), "{}", ended.err);
        let text = fs::read_to_string(&report).unwrap();
        assert_eq!(fact(&text, "ended"), "memory-limit", "{text}");
        assert_ne!(fact(&text, "out_of_memory_kills"), "0", "{text}");
        let command = place.run(Who::Root, "hog=5 exit=0", more);
        place.ends(inheriting(&command, &enter), 0);
        let text = fs::read_to_string(&report).unwrap();
        assert_eq!(fact(&text, "out_of_memory_kills"), "0", "{text}");
        assert_eq!(
            fs::read_dir(&group)
                .unwrap()
                .flatten()
                .filter(|it| it.path().is_dir())
                .count(),
            0
        );
    }
    // A kill that has nothing to do with memory stays one.
    let running = Running::start(&place, Who::Root, "report stay", &[]);
    kill(running.monitor(), "KILL");
    assert_eq!(running.end().0.code(), Some(137));
}

#[test]
fn limits_hold_the_monitor_and_only_it() {
    let place = place!("rgroups");
    let (Some(pids), Some(unified)) = (cgroup_mount("pids"), cgroup_mount("")) else {
        needs::skip("rgroups", "this host has no cgroups of version 1 and 2");
        return;
    };
    let more = ["--limit", "pids=30", "--cgroup", "hugetlb.2MB.max=2097152"];
    let offered = fs::read_to_string(unified.join("cgroup.controllers")).unwrap();
    let has_hugetlb = offered.contains("hugetlb");
    let more = if has_hugetlb { &more[..] } else { &more[..2] };
    let running = Running::start(&place, Who::Root, "report stay", more);
    let name = format!("mayfly/mayfly-{}", place.host.name);
    let inside = |mount: &std::path::Path| {
        let text = fs::read_to_string(mount.join(&name).join("cgroup.procs")).unwrap();
        text.lines().map(str::to_owned).collect::<Vec<_>>()
    };
    let monitor = running.monitor().to_string();
    assert_eq!(inside(&pids), std::slice::from_ref(&monitor));
    let limit = fs::read_to_string(pids.join(&name).join("pids.max")).unwrap();
    assert_eq!(limit.trim(), "30");
    if has_hugetlb {
        assert_eq!(inside(&unified), [monitor]);
    }
    // A second one of that name is refused, and the first goes on.
    let again = place.run(Who::Root, "exit=0", more).output().unwrap();
    let err = String::from_utf8_lossy(&again.stderr).into_owned();
    assert!(err.contains("choose another --id"), "{err}");
    assert_eq!(inside(&pids).len(), 1);
    kill(running.monitor(), "KILL");
    running.end();
    place.nothing_is_left();
}

#[test]
fn limits_of_the_group_that_the_caller_is_in_hold() {
    let place = place!("rengine");
    let Some(memory) = cgroup_mount("memory") else {
        needs::skip("rengine", "this host has no memory controller of version 1");
        return;
    };
    let engine = memory.join(format!("mfengine-{}", std::process::id()));
    fs::create_dir(&engine).unwrap();
    let _broom = Broom(vec![engine.clone()]);
    fs::write(engine.join("memory.limit_in_bytes"), "60M").unwrap();
    let enter = format!("echo $$ >{}/cgroup.procs;", engine.display());
    // More than the engine allows, and less than the caller asks for.
    let (words, more) = ("report hog=100 exit=0", ["--limit", "memory=400M"]);
    for id in ["one", "two"] {
        let command = place.run(Who::Root, words, &[&more[..], &["--id", id]].concat());
        place.ends(inheriting(&command, &enter), 164);
        assert!(!engine.join(format!("mayfly-{id}")).exists());
    }
    // Without an engine's group there is room for it.
    place.ends(place.run(Who::Root, words, &more), 0);
}

#[test]
fn frozen_group_holds_up_no_end() {
    let place = place!("rfrozen");
    let Some(freezer) = cgroup_mount("freezer") else {
        needs::skip("rfrozen", "this host has no freezer of version 1");
        return;
    };
    // From the start, so that it never runs.
    let more = ["--cgroup", "freezer.state=FROZEN", "--timeout", "0.5"];
    place.ends(place.run(Who::Root, "exit=0", &more), 124);
    // While it runs: asked for its end, killed, and without anybody who would ask.
    let more = ["--cgroup", "freezer.state=THAWED", "--limit", "pids=30"];
    let state = freezer.join(format!("mayfly/mayfly-{}/freezer.state", place.host.name));
    for (signal, code) in [("TERM", Some(143)), ("KILL", None)] {
        let running = Running::start(&place, Who::Root, "report stay", &more);
        fs::write(&state, "FROZEN").unwrap();
        kill(running.child.id(), signal);
        let (status, err) = running.end();
        assert_eq!(status.code(), code, "{err}");
        place.nothing_is_left();
    }
}

#[test]
fn user_has_limits_where_a_group_is_delegated() {
    let place = place!("rdelegated");
    let (Some(pids), Some(unified)) = (cgroup_mount("pids"), cgroup_mount("")) else {
        needs::skip("rdelegated", "this host has no cgroups of version 1 and 2");
        return;
    };
    // Nothing is delegated: a message.
    let limit = ["--limit", "pids=30"];
    let text = place.refuses(place.run(Who::User, "exit=0", &limit), "delegated");
    assert!(text.contains("systemd-run --user"), "{text}");

    let parent = format!("mfdeleg-{}", std::process::id());
    let _broom = Broom(vec![unified.join(&parent), pids.join(&parent)]);
    let give = |mount: &std::path::Path| {
        let folder = mount.join(&parent);
        fs::create_dir(&folder).unwrap();
        let files = ["", "cgroup.procs", "tasks", "cgroup.subtree_control"];
        for file in files.map(|file| folder.join(file)) {
            if file.exists() {
                std::os::unix::fs::chown(file, Some(UID), Some(GID)).unwrap();
            }
        }
    };
    give(&pids);
    let more = ["--limit", "pids=30", "--parent-cgroup", &parent];
    place.ends(place.run(Who::User, "report exit=0", &more), 0);

    let offered = fs::read_to_string(unified.join("cgroup.controllers")).unwrap();
    if !offered.contains("hugetlb") {
        needs::skip("rdelegated", "version 2 has no hugetlb here");
        return;
    }
    let _ = fs::write(unified.join("cgroup.subtree_control"), "+hugetlb");
    give(&unified);
    fs::create_dir(unified.join(&parent).join("own")).unwrap();
    let own = unified.join(&parent).join("own/cgroup.procs");
    // The group that holds both the jailer's and the monitor's has to be the user's.
    let more = ["--cgroup", "hugetlb.2MB.max=2097152"];
    let command = place.run(Who::User, "report exit=0", &more);
    place.ends(
        inheriting(&command, &format!("echo $$ >{};", own.display())),
        0,
    );
}

/// Removes groups of a test, its own first.
struct Broom(Vec<std::path::PathBuf>);

impl Drop for Broom {
    fn drop(&mut self) {
        for folder in &self.0 {
            for _ in 0..100 {
                let _ = fs::remove_dir(folder.join("own"));
                if fs::remove_dir(folder).is_ok() || !folder.exists() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
}
