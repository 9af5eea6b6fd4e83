//! The empty jail with the real monitor and real guests in it, as root and as an ordinary user:
//! `check`, the ends a guest can come to, a disk by descriptor, the monitor's own end; and the units
//! for systemd.

#[path = "common/mod.rs"]
mod common;

use common::{Netns, needs};
#[path = "jail/host.rs"]
mod host;
#[path = "jail/run.rs"]
mod run;

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};

use host::cgroup_mount;
use run::{BOTH, Ended, Place, Who, activated, fact};

/// The place for a test of this name, with the real monitor, unless it has to be skipped.
macro_rules! place {
    ($test:literal) => {{
        needs!(root, kvm);
        Place::real($test, &common::mayfly())
    }};
}

#[test]
fn check_boots_its_guest_and_prints_every_step() {
    let place = place!("gcheck");
    for who in BOTH {
        let ended = place.ends(place.jailer(who, &["check"]), 0);
        for words in [
            "KVM:",
            "namespaces:",
            "seccomp:",
            "Landlock:",
            "taps:",
            "cgroups:",
            "ok    guest: booted",
            "everything opened",
            "jail stands",
            "monitor runs",
            "guest's first byte",
            "jail gone",
            "guest entered",
        ] {
            assert!(ended.out.contains(words), "{words} in {}", ended.out);
        }
        assert!(!ended.out.contains("\nNO"), "{}", ended.out);
    }
    let ended = place.ends(place.jailer(Who::Stranger, &["check"]), 1);
    assert!(
        ended.out.contains("NO    KVM: ") && ended.out.contains("group kvm"),
        "{}",
        ended.out
    );
}

#[test]
fn check_when_root_of_a_user_namespace_starts_it_boots_its_guest() {
    let place = place!("gchecknsroot");
    for options in ["-r", "-rm"] {
        let check = place.jailer(Who::User, &["check"]);
        // The last word but those of the jailer is the jailer.
        let mut command = place.as_user(Who::User, Path::new("unshare"));
        command.arg(options).arg(place.path("mayfly-jailer"));
        let own = place.path("mayfly-jailer");
        let words = check.get_args().skip_while(|word| **word != *own).skip(1);
        command.args(words).stdin(Stdio::null());
        let ended = place.ends(command, 0);
        assert!(ended.out.contains("ok    guest:"), "{}", ended.out);
    }
}

#[test]
fn guests_end_in_every_way_they_can() {
    let place = place!("gends");
    copy_readable(&common::probe(), &place.path("probe"));
    copy_readable(&common::firstbyte(), &place.path("firstbyte"));
    let report = place.path("shared/report.json");
    for who in BOTH {
        let kernel = place.path("firstbyte");
        let words = ["run", "--kernel", &kernel, "--exit-report", &report];
        let output = place.jailer(who, &words).output().unwrap();
        assert_eq!(
            String::from_utf8_lossy(&output.stdout),
            "!",
            "{:?}",
            Ended::of(&output)
        );
        assert_eq!(output.status.code(), Some(0));
        let text = fs::read_to_string(&report).unwrap();
        assert_eq!(fact(&text, "ended"), "reset", "{text}");
        assert!(
            fact(&text, "first_byte_us").parse::<u64>().is_ok(),
            "{text}"
        );
        assert!(
            fact(&text, "peak_memory_bytes").parse::<u64>().unwrap() > 1 << 20,
            "{text}"
        );
        for (word, code, ended) in [("reset", 0, "reset"), ("triple", 160, "crash")] {
            let kernel = place.path("probe");
            let cmdline = format!("probe={word}");
            let words = [
                "run",
                "--kernel",
                &kernel,
                "--cmdline",
                &cmdline,
                "--exit-report",
                &report,
            ];
            let output = place.jailer(who, &words).output().unwrap();
            let text = fs::read_to_string(&report).unwrap();
            assert_eq!(
                fact(&text, "ended"),
                ended,
                "{who:?} {word}: {text} {:?}",
                Ended::of(&output)
            );
            assert_eq!(output.status.code(), Some(code));
        }
        fs::remove_file(&report).unwrap();
        place.nothing_is_left();
    }
}

#[test]
fn process_limit_that_is_too_low_is_an_end_and_not_a_spin() {
    let place = place!("gpids");
    if cgroup_mount("pids").is_none() {
        needs::skip("gpids", "this host has no cgroup of version 1 for pids");
        return;
    }
    copy_readable(&common::firstbyte(), &place.path("firstbyte"));
    let kernel = place.path("firstbyte");
    let mut codes = Vec::new();
    for most in 1..=8 {
        let limit = format!("pids={most}");
        let words = [
            "run",
            "--kernel",
            &kernel,
            "--limit",
            &limit,
            "--timeout",
            "30",
        ];
        let ended = Ended::of(&place.jailer(Who::Root, &words).output().unwrap());
        assert_ne!(ended.code, Some(124), "{most}: {ended:?}");
        assert_eq!(
            ended.code == Some(0),
            ended.err.is_empty(),
            "{most}: {ended:?}"
        );
        if ended.code == Some(161) {
            assert!(ended.err.contains("too low?"), "{ended:?}");
        }
        codes.push(ended.code);
        place.nothing_is_left();
    }
    // One of these is enough for the monitor's threads, and not for the one that KVM makes when a
    // guest first runs.
    assert_eq!(codes.last(), Some(&Some(0)), "{codes:?}");
}

#[test]
fn disk_and_tap_when_given_queues_have_them_in_the_jail() {
    needs!(tun);
    let place = place!("gqueues");
    copy_readable(&common::probe(), &place.path("probe"));
    let (kernel, disk, netns) = (place.path("probe"), place.path("big"), Netns::new());
    fs::write(&disk, vec![0; 8 << 20]).unwrap();
    fs::set_permissions(&disk, fs::Permissions::from_mode(0o666)).unwrap();
    for words in [
        "tuntap add dev mfjq mode tap vnet_hdr multi_queue",
        "addr add 172.16.9.1/24 dev mfjq",
        "link set mfjq up",
        "neigh add 172.16.9.2 lladdr 02:00:00:00:00:09 dev mfjq",
    ] {
        netns.run("ip", &words.split(' ').collect::<Vec<_>>());
    }
    let load = "blkload:0:randrw:4096:16:1000:queues=2:check";
    let cmdline = format!("probe={load},netpairs:1:2:300,reset");
    let drive = format!("{disk}:queues=2");
    let words = [
        "run",
        "--kernel",
        &kernel,
        "--cmdline",
        &cmdline,
        "--drive",
        &drive,
        "--net",
        "mfjq:queues=2",
    ];
    let output = netns.inside(|| {
        let mut command = place.jailer(Who::Root, &words);
        let command = command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let sockets: Vec<_> = (0..64)
            .map(|_| std::net::UdpSocket::bind("172.16.9.1:0").unwrap())
            .collect();
        while child.try_wait().unwrap().is_none() {
            for (port, socket) in (3000..).zip(&sockets) {
                let _ = socket.send_to(b"for a queue", ("172.16.9.2", port));
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        child.wait_with_output().unwrap()
    });
    let ended = Ended::of(&output);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(
        ended.out.contains(&format!("probe: {load} ok")),
        "{ended:?}"
    );
    let (_, counts) = ended.out.split_once(" of=2 received ").expect(&ended.out);
    let counts: Vec<u64> = counts
        .split([' ', '\r', '\n'])
        .map_while(|count| count.parse().ok())
        .collect();
    assert!(
        counts.len() == 2 && counts.iter().all(|count| *count > 0),
        "{ended:?}"
    );
    place.nothing_is_left();
}

#[test]
fn overlay_takes_what_the_guest_writes_and_the_disk_stays_as_it_was() {
    let place = place!("goverlay");
    copy_readable(&common::probe(), &place.path("probe"));
    let (kernel, disk) = (place.path("probe"), place.path("disk"));
    // Where every user may make a file, and one is no fault.
    let folder = place.path("overlays");
    fs::create_dir(&folder).unwrap();
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o777)).unwrap();
    for who in BOTH {
        let overlay = format!("{folder}/overlay");
        let runs = |drive: &str, words: &str| {
            let cmdline = format!("probe={words},reset");
            let machine = ["run", "--kernel", &kernel, "--cmdline", &cmdline];
            let words = [&machine[..], &["--drive", drive]].concat();
            let ended = place.ends(place.jailer(who, &words), 0);
            assert!(!ended.out.contains("FAILED"), "{who:?}: {ended:?}");
            assert!(ended.out.contains(" ok "), "{who:?}: {ended:?}");
        };
        let in_file = format!("{disk}:overlay={overlay}");
        runs(&in_file, "blkwrite:0:1:2:5");
        runs(&in_file, "blkverify:0:1:2:5");
        runs(
            &format!("{disk}:overlay=memory"),
            "blkwrite:0:1:2:6,blkverify:0:1:2:6",
        );
        runs(&in_file, "blkverify:0:1:2:5");
        assert_eq!(fs::read(&disk).unwrap(), [0; 4096]);
        fs::remove_file(overlay).unwrap();
        place.nothing_is_left();
    }
}

#[test]
fn disk_when_it_has_settings_is_as_they_say() {
    let place = place!("gsettings");
    copy_readable(&common::probe(), &place.path("probe"));
    let (kernel, disk) = (place.path("probe"), place.path("disk"));
    for who in BOTH {
        for (settings, flush, queues) in [
            ("cache=none", true, 1),
            ("cache=writeback:poll_us=0", true, 1),
            ("cache=unsafe:queues=2", false, 2),
            ("queues=3:ops=1000:cache=none:bandwidth=1M", true, 3),
        ] {
            let cmdline = "probe=blkinfo:0,blkwrite:0:1:2:5,blkverify:0:1:2:5,reset";
            let drive = format!("{disk}:{settings}");
            let words = [
                "run",
                "--kernel",
                &kernel,
                "--cmdline",
                cmdline,
                "--drive",
                &drive,
            ];
            let ended = place.ends(place.jailer(who, &words), 0);
            let told = format!("flush={flush} ");
            assert!(!ended.out.contains("FAILED"), "{who:?}: {ended:?}");
            assert!(ended.out.contains(&told), "{settings}: {ended:?}");
            assert!(
                ended.out.contains(&format!("queues={queues}")),
                "{settings}: {ended:?}"
            );
            let written = fs::read(&disk).unwrap();
            assert_ne!(written, [0; 4096], "{settings}");
            fs::write(&disk, [0; 4096]).unwrap();
        }
        let refused = format!("{disk}:overlay=memory:cache=none");
        let words = ["run", "--kernel", &kernel, "--drive", &refused];
        place.refuses(place.jailer(who, &words), "has an overlay");
        place.nothing_is_left();
    }
}

#[test]
fn configuration_in_a_file_has_its_paths_opened_outside() {
    let place = place!("gconfig");
    copy_readable(&common::probe(), &place.path("probe"));
    let config = format!(
        r#"{{ "boot-source": {{ "kernel_image_path": "{}", "boot_args": "probe=blkinfo:0,reset" }},
             "drives": [{{ "drive_id": "d", "path_on_host": "{}", "is_root_device": false,
                          "is_read_only": true }}],
             "logger": {{ "level": "Off" }},
             "machine-config": {{ "vcpu_count": 1, "mem_size_mib": 64 }} }}"#,
        place.path("probe"),
        place.path("disk")
    );
    fs::write(place.path("vm.json"), config).unwrap();
    let config = place.path("vm.json");
    let report = place.path("shared/report.json");
    for who in BOTH {
        let words = ["run", "--config", &config, "--exit-report", &report];
        let ended = Ended::of(&place.jailer(who, &words).output().unwrap());
        assert!(ended.out.contains("blkinfo:0 ok"), "{ended:?}");
        // How it ended does not hang on what the log says.
        let text = fs::read_to_string(&report).unwrap();
        assert_eq!(fact(&text, "ended"), "reset", "{text}");
        fs::remove_file(&report).unwrap();
        place.nothing_is_left();
    }
    let bad = place.path("bad.json");
    for (text, expected) in [
        (
            r#"{ "kernel_image_path": "/no/such/kernel" }"#,
            "No such file",
        ),
        (r#"{ "kernel_image_path": "/k" }, "vsock": {}"#, "`vsock`"),
        (r#"{ "kernel_image_path": 5 }"#, "descriptor 5"),
        (
            r#"{ "kernel_image_path": "/k", "kernel_image_path": "/l" }"#,
            "duplicate field `kernel_image_path`",
        ),
    ] {
        fs::write(
            &bad,
            format!(r#"{{ "drives": [], "boot-source": {text} }}"#),
        )
        .unwrap();
        let command = place.jailer(Who::Root, &["run", "--config", &bad]);
        place.refuses(command, expected);
    }
    // What the monitor does not take is its own message.
    let kernel = place.path("kernel");
    place.refuses(
        place.jailer(Who::Root, &["run", "--kernel", &kernel]),
        "start the microVM: ",
    );
}

#[test]
fn configuration_of_any_length_a_file_may_have_is_taken() {
    let place = place!("glong");
    copy_readable(&common::probe(), &place.path("probe"));
    let (config, socket) = (place.path("vm.json"), place.shared("console"));
    let start = format!(
        r#"{{ "boot-source": {{ "kernel_image_path": "{}", "boot_args": "probe=print:here,stay" }},
             "drives": [], "something": {{ "else": 1 }}, "vsock": null,
             "serial": {{ "console_socket": "{socket}" }} }}"#,
        place.path("probe"),
    );
    // One that the monitor would not take by itself, of names alone.
    let masks = (0..2500).map(|n| format!(r#"{{"addr":"{n:#x}","bitmap":"0bx"}}"#));
    let masks = masks.collect::<Vec<_>>().join(",");
    let long = format!(r#"{{ "msr_modifiers": [{masks}] }}"#);
    let spaces = " ".repeat((1 << 20) - start.len());
    for who in BOTH {
        fs::write(&config, format!("{start}{spaces}")).unwrap();
        let words = ["run", "--config", &config];
        let mut child = place
            .jailer(who, &words)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut text = String::new();
        host::wait_until("the console's socket", || {
            UnixStream::connect(&socket).is_ok()
        });
        let mut caller = UnixStream::connect(&socket).unwrap();
        read_until(&mut caller, &mut text, "here");
        let _ = Command::new("kill").arg(child.id().to_string()).status();
        assert_eq!(child.wait().unwrap().code(), Some(143));
        place.nothing_is_left();

        // The monitor has a word about what is in it, and not about its length.
        let with = start.replace("\"something\"", &format!("\"cpu-config\": {long}, \"x\""));
        fs::write(&config, with).unwrap();
        place.refuses(place.jailer(who, &words), "MSR");
        fs::write(&config, format!("{start}{spaces} ")).unwrap();
        place.refuses(place.jailer(who, &words), "longer than 1 MiB");
    }
}

/// Reads until `words` are among what came.
fn read_until(client: &mut UnixStream, text: &mut String, words: &str) {
    let patience = Some(std::time::Duration::from_secs(120));
    client.set_read_timeout(patience).unwrap();
    while !text.contains(words) {
        let mut bytes = [0; 256];
        let count = match std::io::Read::read(client, &mut bytes) {
            // What was typed and not read when the monitor ended; what it wrote comes after that.
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => continue,
            read => read.unwrap(),
        };
        assert!(count > 0, "{words} in {text}");
        text.push_str(&String::from_utf8_lossy(&bytes[..count]));
    }
}

/// Types a line to a guest with `echo:1`, which answers it; what the client has read.
fn echoes(client: &mut UnixStream) -> String {
    let mut text = String::new();
    read_until(client, &mut text, "echo ready");
    std::io::Write::write_all(client, b"typed\n").unwrap();
    read_until(client, &mut text, "got typed");
    text
}

#[test]
fn console_socket_is_the_monitors_and_is_removed() {
    let place = place!("gsocket");
    copy_readable(&common::probe(), &place.path("probe"));
    let (kernel, socket) = (place.path("probe"), place.shared("console"));
    let at = format!("unix:{socket}");
    let boot_args = "probe=print:here,echo:1";
    for who in BOTH {
        let words = [
            "run",
            "--console",
            &at,
            "--kernel",
            &kernel,
            "--cmdline",
            boot_args,
        ];
        let mut child = place.jailer(who, &words).spawn().unwrap();
        host::wait_until("the console's socket", || {
            UnixStream::connect(&socket).is_ok()
        });
        let mode = std::os::unix::fs::MetadataExt::mode(&fs::metadata(&socket).unwrap());
        assert_eq!(mode & 0o777, 0o600);
        let mut client = UnixStream::connect(&socket).unwrap();
        // What was written before anything was connected is there too.
        let text = echoes(&mut client);
        assert!(text.contains("here"), "{text}");
        assert_eq!(child.wait().unwrap().code(), Some(0));
        place.nothing_is_left();
    }
    let config = format!(
        r#"{{"boot-source":{{"kernel_image_path":"{kernel}"}},"drives":[],
            "serial":{{"console_socket":"{socket}"}}}}"#
    );
    fs::write(place.path("vm.json"), config).unwrap();
    let words = ["run", "--config", &place.path("vm.json"), "--console", &at];
    place.refuses(place.jailer(Who::Root, &words), "console_socket already");
}

#[test]
fn console_socket_serves_a_microvm_that_a_client_configures() {
    let place = place!("gclient");
    copy_readable(&common::probe(), &place.path("probe"));
    let (api, socket) = (place.shared("api"), place.shared("console"));
    let at = format!("unix:{socket}");
    for who in BOTH {
        let words = ["run", "--api-sock", &api, "--console", &at];
        let mut child = place.jailer(who, &words).spawn().unwrap();
        host::wait_until("the API's socket", || UnixStream::connect(&api).is_ok());
        let kernel = fs::File::open(place.path("probe")).unwrap();
        let mut client = mayfly::wire::Client::connect(&api).unwrap();
        let boot =
            r#"{ "kernel_image_path": { "fd": 0 }, "boot_args": "probe=print:here,echo:1" }"#;
        let start = r#"{ "action_type": "InstanceStart" }"#;
        for (path, body, files) in [
            ("/boot-source", boot, &[kernel.as_fd()][..]),
            ("/actions", start, &[]),
        ] {
            let patience = std::time::Duration::from_secs(300);
            let answer = client.request("PUT", path, body, files, patience);
            let answer = answer.unwrap();
            assert!(answer.is_success(), "{}", answer.fault());
        }
        let mut console = UnixStream::connect(&socket).unwrap();
        let text = echoes(&mut console);
        assert!(text.contains("here"), "{text}");
        assert_eq!(child.wait().unwrap().code(), Some(0));
        place.nothing_is_left();
    }
}

#[test]
fn request_that_came_before_the_monitor_finds_the_consoles_socket_too() {
    let place = place!("gearly");
    copy_readable(&common::probe(), &place.path("probe"));
    let (api, socket) = (place.shared("api"), place.shared("console"));
    let at = format!("unix:{socket}");
    for who in BOTH {
        let listener = UnixListener::bind(&api).unwrap();
        fs::set_permissions(&api, fs::Permissions::from_mode(0o666)).unwrap();
        let mut client = mayfly::wire::Client::connect(Path::new(&api)).unwrap();
        let kernel = fs::File::open(place.path("probe")).unwrap();
        let body = r#"{ "boot-source": { "kernel_image_path": { "fd": 0 },
            "boot_args": "probe=print:here,echo:1" }, "drives": [], "start": true }"#;
        let sent = client.send("PUT", "/vm", body, &[kernel.as_fd()]);
        sent.unwrap();
        let mut shell = activated(&place.jailer(who, &["run", "--console", &at]), listener);
        let mut child = shell.spawn().unwrap();
        drop(shell);
        let mut console = None;
        host::wait_until("the console's socket", || {
            console = UnixStream::connect(&socket).ok();
            console.is_some()
        });
        let mut console = console.unwrap();
        let text = echoes(&mut console);
        assert!(text.contains("here"), "{text}");
        assert_eq!(child.wait().unwrap().code(), Some(0));
        fs::remove_file(&api).unwrap();
        place.nothing_is_left();
    }
}

#[test]
fn crash_is_reported_with_its_vcpu() {
    let place = place!("gcrash");
    copy_readable(&common::probe(), &place.path("probe"));
    let (kernel, report) = (place.path("probe"), place.path("report.json"));
    let machine = ["run", "--kernel", &kernel, "--cmdline", "probe=triple"];
    let words = [&machine[..], &["--exit-report", &report]].concat();
    let ended = place.ends(place.jailer(Who::Root, &words), 160);
    assert!(ended.err.contains("vCPU 0, RIP 0x"), "{ended:?}");
    let text = fs::read_to_string(&report).unwrap();
    assert!(fact(&text, "rip").starts_with("0x"), "{text}");
    assert!(text.contains("\"last_exits\": ["), "{text}");
}

#[test]
fn files_are_called_by_their_names() {
    let place = place!("gnames");
    copy_readable(&common::probe(), &place.path("probe"));
    let (text, kernel, disk) = (
        place.path("kernel"),
        place.path("probe"),
        place.path("disk"),
    );
    let big = place.path("big");
    fs::File::create(&big).unwrap().set_len(1 << 30).unwrap();
    fs::set_permissions(&big, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    let plain: [(&[&str], &str); 2] = [
        (&["--kernel", &text], &text),
        (&["--kernel", &kernel, "--initrd", &big], &big),
    ];
    for (words, name) in plain {
        let command = place.jailer(Who::Root, &[&["run"], words].concat());
        let err = place.refuses(command, name);
        assert!(!err.contains("descriptor"), "{err}");
    }
    // As many as one request carries.
    let drives: Vec<String> = (0..18)
        .map(|n| format!(r#"{{"drive_id":"d{n}","path_on_host":"{disk}","is_root_device":false}}"#))
        .collect();
    let config = format!(
        r#"{{"boot-source":{{"kernel_image_path":"{text}"}},"drives":[{}]}}"#,
        drives.join(",")
    );
    fs::write(place.path("many.json"), config).unwrap();
    let many = place.path("many.json");
    let command = place.jailer(Who::Root, &["run", "--config", &many]);
    let err = place.refuses(command, "start the microVM: ");
    assert!(!err.contains("descriptor"), "{err}");
}

#[test]
fn monitor_ends_in_order_when_asked() {
    let place = place!("gterm");
    copy_readable(&common::probe(), &place.path("probe"));
    let (kernel, report) = (place.path("probe"), place.path("shared/report.json"));
    for who in BOTH {
        let words = [
            "run",
            "--kernel",
            &kernel,
            "--cmdline",
            "probe=print:here,stay",
            "--exit-report",
            &report,
        ];
        let mut child = place
            .jailer(who, &words)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut byte = [0];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut byte).unwrap();
        let _ = Command::new("kill").arg(child.id().to_string()).status();
        assert_eq!(child.wait().unwrap().code(), Some(143));
        // By itself, not by the kill that comes after three seconds.
        let text = fs::read_to_string(&report).unwrap();
        assert_eq!(fact(&text, "signal"), "null", "{text}");
        fs::remove_file(&report).unwrap();
        place.nothing_is_left();
    }
}

fn copy_readable(from: &Path, to: &str) {
    fs::copy(from, to).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    fs::set_permissions(to, mode).unwrap();
}

#[test]
fn units_are_what_systemd_takes() {
    needs!("systemd-analyze");
    let folder = common::Folder::new();
    for name in ["mayfly@.service", "mayfly@.socket"] {
        let text = fs::read_to_string(common::root().join("resources/systemd").join(name)).unwrap();
        if name.ends_with("socket") {
            // All tenants' users are in the group kvm.
            assert!(text.contains("\nSocketMode=0600\n"), "{text}");
        }
        // A program that is there, on any machine.
        let text = text.replace("/usr/local/bin/mayfly-jailer", "/bin/true");
        fs::write(folder.path().join(name), text).unwrap();
    }
    let output = Command::new("systemd-analyze")
        .arg("verify")
        .args(["mayfly@one.service", "mayfly@one.socket"].map(|name| folder.path().join(name)))
        .output()
        .unwrap();
    let err = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && !err.contains("mayfly@"), "{err}");
}
