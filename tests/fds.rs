//! Descriptors in place of paths: with requests, in a configuration, on the command line; and the
//! monitor that cannot open anything any more.

mod common;

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};

use common::{Api, Folder, Monitor, Netns, needs, sys};
use serde_json::{Value, json};

const DEV_KVM: &str = "/dev/kvm";

fn read(path: &Path) -> OwnedFd {
    File::open(path).unwrap().into()
}

fn both(path: impl AsRef<Path>) -> OwnedFd {
    let file = OpenOptions::new().read(true).write(true).open(path);
    file.unwrap().into()
}

fn add(path: &Path) -> OwnedFd {
    let mut options = OpenOptions::new();
    options.create(true).append(true);
    options.open(path).unwrap().into()
}

fn as_path(path: &Path, flags: i32) -> OwnedFd {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(flags);
    options.open(path).unwrap().into()
}

/// A pipe whose end shows when all copies of its writing end are closed.
fn pipe() -> (File, OwnedFd) {
    let (reader, writer) = std::io::pipe().unwrap();
    (File::from(OwnedFd::from(reader)), writer.into())
}

/// `monitor` with `fds` from number 10 on, and `args`.
fn with(fds: &[BorrowedFd<'_>], args: &[&str]) -> Monitor {
    let mut command = Command::new(common::mayfly());
    command.args(args);
    for (number, fd) in (10..).zip(fds) {
        sys::hand_in(&mut command, fd.try_clone_to_owned().unwrap(), number);
    }
    Monitor::spawn(command)
}

fn open_descriptors(monitor: &Monitor) -> Vec<String> {
    let folder = format!("/proc/{}/fd", monitor.pid());
    let mut open: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            let target = fs::read_link(&path).unwrap_or_default();
            format!("{} {}", path.display(), target.display())
        })
        .collect();
    open.sort();
    open
}

#[test]
fn guest_when_all_comes_in_requests_runs_without_a_name() {
    needs!(kvm, root);
    let folder = Folder::new();
    let netns = Netns::new();
    let tap = netns.inside(|| sys::open_tap("mffd0"));
    let disk = folder.disk("disk", 1 << 20);
    let listener = UnixListener::bind(folder.join("api")).unwrap();
    let kvm = both(DEV_KVM);
    let log = add(&folder.join("log"));
    let (mut told, end) = pipe();
    let fds = [listener.as_fd(), kvm.as_fd(), log.as_fd(), end.as_fd()];
    let args = "--api-fd 10 --kvm-fd 11 --log-fd 12 --end-fd 13 --landlock";
    let args: Vec<&str> = args.split(' ').collect();
    let mut monitor = with(&fds, &args);
    drop(listener);
    let api = Api::at(folder.join("api"));

    let words = "print:up,blkinfo:0,blkwrite:0:0:8:7,blkverify:0:0:8:7,netinfo:1,shell";
    // A descriptor that is not asked for comes along: it is closed.
    let (mut unclaimed, writer) = pipe();
    api.put_with(
        "/boot-source",
        json!({"kernel_image_path": {"fd": 1}, "boot_args": format!("probe={words}")}),
        &[writer.as_fd(), read(&common::probe()).as_fd()],
    );
    drop(writer);
    assert_eq!(unclaimed.read(&mut [0]).unwrap(), 0);
    api.put(
        "/machine-config",
        json!({"vcpu_count": 1, "mem_size_mib": 32}),
    );
    api.put_with(
        "/drives/d",
        json!({"drive_id": "d", "is_root_device": false, "fd": 0}),
        &[both(&disk).as_fd()],
    );
    api.put_with(
        "/network-interfaces/n",
        json!({"iface_id": "n", "host_dev_name": {"fd": 0}}),
        &[tap.as_fd()],
    );
    drop(tap);

    // It is shown as it was asked for, and a name cannot be used.
    let config = api.get("/vm/config");
    assert_eq!(config["boot-source"]["kernel_image_path"], json!({"fd": 1}));
    assert_eq!(config["drives"][0]["path_on_host"], json!({"fd": 0}));
    let network = &config["network-interfaces"][0];
    assert_eq!(network["host_dev_name"], json!({"fd": 0}));
    // The socket was there before the monitor, so it may not have answered yet.
    let says = |text: &str| folder.read("log").contains(text);
    common::wait_until("the log tells of Landlock", || {
        says("Landlock holds the monitor") || says("has no Landlock")
    });
    let landlock = says("Landlock holds the monitor");
    if landlock {
        let message = api.refused(
            "PUT",
            "/drives/e",
            json!({"drive_id": "e", "is_root_device": false, "path_on_host": disk}),
        );
        assert!(message.contains("Permission denied"), "{message}");
    }

    api.put("/actions", json!({"action_type": "InstanceStart"}));
    let seen = monitor.expect("probe: netinfo:1 ok");
    for word in [
        "blkinfo:0 ok",
        "blkwrite:0:0:8:7 ok",
        "blkverify:0:0:8:7 ok",
    ] {
        assert!(seen.contains(word), "{seen}");
    }
    let written = fs::read(&disk).unwrap();
    assert!(written.iter().take(4096).any(|byte| *byte != 0));

    // Another disk for the guest that runs, behind the filter and behind Landlock.
    let other = folder.disk("other", 2 << 20);
    api.patch_with(
        "/drives/d",
        json!({"drive_id": "d", "path_on_host": {"fd": 0}}),
        &[both(&other).as_fd()],
    );
    monitor.type_in("blkwrite:0:0:8:9\nblkverify:0:0:8:9\n");
    monitor.expect("probe: blkverify:0:0:8:9 ok");
    assert!(fs::read(&other).unwrap().iter().any(|byte| *byte != 0));
    let (status, message) = api.request_with(
        "PATCH",
        "/drives/d",
        r#"{"drive_id":"d","fd":0}"#,
        &[read(&disk).as_fd()],
    );
    assert_eq!(status, 400);
    assert!(message.contains("not opened for writing"), "{message}");
    monitor.type_in("end\n");
    monitor.exits_with(0);
    drop(end);
    let mut word = String::new();
    told.read_to_string(&mut word).unwrap();
    assert_eq!(word, "reset\n");
}

#[test]
fn guest_when_the_configuration_names_descriptors_runs() {
    needs!(kvm);
    let folder = Folder::new();
    let disk = folder.disk("disk", 1 << 20);
    let (_unread, console) = pipe();
    let config = json!({
        "boot-source": {
            "kernel_image_path": {"fd": 10},
            "initrd_path": {"fd": 11},
            "boot_args": "probe=print:up,bootinfo,blkinfo:0,blkinfo:1",
        },
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 32},
        "drives": [
            {"drive_id": "a", "is_root_device": false, "fd": 12},
            {"drive_id": "b", "is_root_device": false, "is_read_only": true, "fd": 13},
        ],
        "logger": {"fd": 14},
        "serial": {"serial_out_path": {"fd": 15}},
        "metrics": {"metrics_path": {"fd": 16}},
    });
    let file = folder.file("vm.json", config.to_string());
    let fds = [
        read(&common::probe()),
        read(&folder.file("initrd", [7; 5000])),
        both(&disk),
        read(&disk),
        add(&folder.join("log")),
        add(&folder.join("console")),
        console,
        both(DEV_KVM),
    ];
    let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    let mut args = vec!["--no-api", "--config-file", file.to_str().unwrap()];
    args.extend(["--kvm-fd", "17", "--landlock"]);
    let mut monitor = with(&fds, &args);
    monitor.exits_with(0);
    let console = folder.read("console");
    for word in ["print:up", "bootinfo", "blkinfo:0", "blkinfo:1"] {
        assert!(console.contains(&format!("probe: {word} ok")), "{console}");
    }
    assert!(folder.read("log").contains("The guest reset its machine"));
}

#[test]
fn end_fd_when_the_guest_crashes_tells_where_in_a_second_line() {
    needs!(kvm);
    let folder = Folder::new();
    let config = common::probe_vm("print:bye,triple");
    let file = folder.file("vm.json", config.to_string());
    let (mut told, end) = pipe();
    let args = ["--no-api", "--config-file", file.to_str().unwrap()];
    let mut monitor = with(&[end.as_fd()], &[&args[..], &["--end-fd", "10"]].concat());
    monitor.exits_with(160);
    drop(end);
    let mut text = String::new();
    told.read_to_string(&mut text).unwrap();
    let (word, report) = text.split_once('\n').unwrap();
    assert_eq!(word, "crash");
    let report: Value = serde_json::from_str(report).unwrap();
    assert_eq!(report["vcpu"], 0, "{report}");
    // An AMD processor keeps them from KVM.
    for register in ["rip", "cr2"] {
        let value = report[register].as_str();
        assert!(value.is_none_or(|text| text.starts_with("0x")), "{report}");
    }
    let exits = report["last_exits"].as_array().unwrap();
    assert_eq!(exits.last().unwrap(), "port 0x3f8 out", "{report}");
}

#[test]
fn configuration_when_a_descriptor_is_wrong_is_refused() {
    let folder = Folder::new();
    let disk = folder.disk("disk", 1 << 20);
    let kernel = common::probe();
    let (reader, _writer) = pipe();
    let fds = [
        read(&kernel),
        read(&disk),
        reader.into(),
        read(folder.path()),
        as_path(&disk, libc::O_APPEND),
    ];
    let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    let drive = |fd: u32| json!({"drive_id": "d", "is_root_device": false, "fd": fd});
    let kernel = |source: Value| json!({"kernel_image_path": source});
    let fd = |number: u64| json!({"fd": number});
    let twice = json!([drive(14), drive(14)]);
    let cases = [
        (kernel(fd(99)), json!([]), "Descriptor 99 is not open"),
        (
            kernel(fd(1 << 31)),
            json!([]),
            "Descriptor 2147483648 is not open",
        ),
        // The monitor's own: it begins with these three, and whatever it opens comes after them.
        (kernel(fd(3)), json!([]), "Descriptor 3 was not passed"),
        (kernel(fd(12)), json!([]), "is a FIFO, not a file"),
        (kernel(fd(13)), json!([]), "is a directory, not a file"),
        (kernel(fd(1 << 32)), json!([]), "expected u32"),
        (kernel(json!(["x"])), json!([]), "expected a string or"),
        (kernel(fd(10)), json!([drive(10)]), "named twice"),
        (kernel(fd(10)), json!([drive(11)]), "not opened for writing"),
        (kernel(fd(10)), json!([drive(14)]), "O_APPEND"),
        (kernel(fd(10)), twice, "O_APPEND"),
    ];
    for (kernel, drives, reason) in cases {
        let config = json!({"boot-source": kernel, "drives": drives});
        let file = folder.file("vm.json", config.to_string());
        let mut monitor = with(&fds, &["--no-api", "--config-file", file.to_str().unwrap()]);
        monitor.exits_with(1);
        let errors = monitor.stderr();
        assert!(errors.contains(reason), "{config}: {errors}");
        assert_eq!(errors.lines().count(), 1, "{errors}");
    }
}

#[test]
fn option_when_its_descriptor_is_wrong_is_refused_with_153() {
    let folder = Folder::new();
    let null = both("/dev/null");
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let (stream, _other) = UnixStream::pair().unwrap();
    let listener = UnixListener::bind(folder.join("s")).unwrap();
    let folder_fd = read(folder.path());
    let fds = [
        null.as_fd(),
        tcp.as_fd(),
        stream.as_fd(),
        listener.as_fd(),
        folder_fd.as_fd(),
    ];
    let cases = [
        (
            "--api-fd 10",
            "Cannot use --api-fd 10: Descriptor 10 is not a socket.",
        ),
        ("--api-fd 11", "is not a Unix socket"),
        ("--api-fd 12", "does not listen"),
        ("--api-fd 99", "Descriptor 99 is not open"),
        ("--api-fd 4294967295", "is not open"),
        ("--api-fd 3", "was not passed"),
        ("--api-fd x", "takes a whole number"),
        (
            "--api-fd 13 --kvm-fd 10",
            "Cannot use --kvm-fd 10: Descriptor 10 is not /dev/kvm.",
        ),
        ("--api-fd 13 --kvm-fd 13", "is not /dev/kvm"),
        ("--api-fd 13 --kvm-fd 14", "is not /dev/kvm"),
        (
            "--api-fd 13 --log-fd 13 --kvm-fd 13",
            "was not passed to this process, or is named twice",
        ),
        (
            "--api-fd 13 --log-fd 14",
            "The log in descriptor 14 was not opened for writing",
        ),
        ("--api-fd 13 --log-fd 98", "Descriptor 98 is not open"),
        (
            "--api-fd 13 --end-fd 14",
            "The end in descriptor 14 was not opened for writing",
        ),
        ("--api-fd 13 --end-fd 98", "Descriptor 98 is not open"),
        (
            "--api-fd 13 --console-fd 10",
            "The console socket in descriptor 10 is not a socket",
        ),
        ("--api-fd 13 --console-fd 12", "does not listen"),
        ("--api-fd 13 --console-fd 98", "Descriptor 98 is not open"),
        ("--api-fd 13 --api-sock s", "exclude each other"),
    ];
    for (line, reason) in cases {
        let args: Vec<&str> = line.split(' ').collect();
        let mut monitor = with(&fds, &args);
        monitor.exits_with(153);
        let errors = monitor.stderr();
        assert!(errors.contains(reason), "{line}: {errors}");
        assert_eq!(errors.lines().count(), 1, "{errors}");
    }
}

#[test]
fn request_when_its_descriptor_is_wrong_is_refused() {
    let folder = Folder::new();
    let disk = folder.disk("disk", 1 << 20);
    let (_monitor, api) = Monitor::unconfigured(&folder);
    let (reader, writer) = pipe();
    let socket = UnixStream::pair().unwrap();
    let drive = r#"{"drive_id":"d","is_root_device":false,"fd":0}"#;
    let network = r#"{"iface_id":"n","fd":0}"#;
    let kernel = r#"{"kernel_image_path":{"fd":0}}"#;
    let cases: [(&str, &str, OwnedFd, &str); 19] = [
        ("/drives/d", drive, read(&disk), "not opened for writing"),
        ("/drives/d", drive, add(&disk), "not opened for reading"),
        (
            "/drives/d",
            drive,
            as_path(&disk, libc::O_APPEND),
            "O_APPEND",
        ),
        (
            "/drives/d",
            drive,
            as_path(&disk, libc::O_PATH),
            "not opened for reading",
        ),
        (
            "/drives/d",
            drive,
            both("/dev/null"),
            "is a character device",
        ),
        (
            "/drives/d",
            drive,
            socket.0.try_clone().unwrap().into(),
            "is a socket",
        ),
        (
            "/drives/d",
            drive,
            read(folder.path()),
            "not opened for writing",
        ),
        (
            "/network-interfaces/n",
            network,
            both(&disk),
            "is not a tap",
        ),
        (
            "/network-interfaces/n",
            network,
            both("/dev/null"),
            "is not an attached tap",
        ),
        (
            "/network-interfaces/n",
            network,
            socket.1.into(),
            "is not a tap",
        ),
        (
            "/boot-source",
            kernel,
            reader.try_clone().unwrap().into(),
            "is a FIFO",
        ),
        (
            "/boot-source",
            kernel,
            writer.try_clone().unwrap(),
            "not opened for reading",
        ),
        (
            "/boot-source",
            kernel,
            both("/dev/zero"),
            "is a character device",
        ),
        (
            "/boot-source",
            kernel,
            read(folder.path()),
            "is a directory",
        ),
        (
            "/logger",
            r#"{"fd":0}"#,
            read(&disk),
            "not opened for writing",
        ),
        (
            "/serial",
            r#"{"serial_out_path":{"fd":0}}"#,
            read(&disk),
            "not opened for writing",
        ),
        (
            "/metrics",
            r#"{"metrics_path":{"fd":0}}"#,
            read(&disk),
            "not opened for writing",
        ),
        (
            "/logger",
            r#"{"fd":1}"#,
            add(&disk),
            "There is no descriptor 1: 1 came",
        ),
        (
            "/boot-source",
            r#"{"kernel_image_path":{"fd":0},"initrd_path":{"fd":0}}"#,
            read(&disk),
            "Descriptor 0 is named twice",
        ),
    ];
    for (path, body, fd, reason) in cases {
        let (status, answer) = api.request_with("PUT", path, body, &[fd.as_fd()]);
        assert_eq!(status, 400, "{path} {body}: {answer}");
        assert!(
            answer.contains(reason),
            "{path} {body}: {answer}, not {reason}"
        );
        let (status, answer) = api.request("PUT", path, body);
        assert_eq!(status, 400);
        assert!(answer.contains("0 came with the first byte"), "{answer}");
    }
    let config = api.get("/vm/config");
    assert_eq!(config["drives"], json!([]));
    assert_eq!(config["network-interfaces"], json!([]));
}

#[test]
fn requests_when_a_thousand_are_refused_leave_no_descriptor() {
    let folder = Folder::new();
    let disk = folder.disk("disk", 1 << 20);
    let (monitor, api) = Monitor::unconfigured(&folder);
    let (mut reader, writer) = pipe();
    api.get("/");
    // A client's own connection is closed a moment after its answer: the listener stays.
    let at_rest = |monitor: &Monitor| {
        common::wait_until("the connections are closed", || {
            let open = open_descriptors(monitor);
            open.iter().filter(|it| it.contains(" socket:")).count() == 1
        });
        open_descriptors(monitor).len()
    };
    let before = at_rest(&monitor);
    let bodies = [
        (
            "PUT",
            "/drives/d",
            r#"{"drive_id":"d","is_root_device":false,"fd":3}"#,
        ),
        (
            "PUT",
            "/drives/d",
            r#"{"drive_id":"e","is_root_device":false,"fd":3}"#,
        ),
        ("PUT", "/drives/d", "{"),
        ("PUT", "/nowhere", "{}"),
        (
            "PUT",
            "/boot-source",
            r#"{"kernel_image_path":{"fd":0},"initrd_path":{"fd":9}}"#,
        ),
        (
            "PUT",
            "/network-interfaces/n",
            r#"{"iface_id":"n","fd":15}"#,
        ),
        ("PATCH", "/drives/d", r#"{"drive_id":"d","fd":0}"#),
        (
            "PUT",
            "/vm",
            r#"{"boot-source":{"kernel_image_path":{"fd":0}},"drives":[]}"#,
        ),
        ("BREW", "/", "{}"),
        ("GET", "/nope", ""),
    ];
    let file = both(&disk);
    for round in 0..1000 {
        let (method, path, body) = bodies[round % bodies.len()];
        // One too many, every now and then.
        let count = if round % 7 == 0 { 33 } else { 1 + round % 32 };
        let mut fds = vec![writer.as_fd(); count];
        if round % 3 == 0
            && let Some(last) = fds.last_mut()
        {
            *last = file.as_fd();
        }
        let (status, answer) = api.request_with(method, path, body, &fds);
        assert_eq!(status, 400, "{method} {path}: {answer}");
    }
    // Half a request, and its client is gone; a client that goes away unanswered.
    for _ in 0..50 {
        api.send_with(
            b"PUT /drives/d HTTP/1.1\r\nContent-Le",
            &[writer.as_fd(); 16],
        );
        api.send_with(b"GET / HTTP/1.1\r\n\r\n", &[writer.as_fd(); 16]);
    }
    drop(writer);
    assert_eq!(reader.read(&mut [0]).unwrap(), 0, "one is open somewhere");
    assert_eq!(
        at_rest(&monitor),
        before,
        "{:?}",
        open_descriptors(&monitor)
    );
}

#[test]
fn descriptors_when_there_is_no_room_are_refused_and_others_served() {
    let folder = Folder::new();
    let mut command = Command::new(common::mayfly());
    command.arg("--api-sock").arg(folder.join("api"));
    command.arg("--log-path").arg(folder.join("log"));
    sys::limit_descriptors(&mut command, 24);
    let _monitor = Monitor::spawn(command);
    let api = Api::at(folder.join("api"));
    let (_reader, writer) = pipe();
    let held: Vec<UnixStream> = (0..2)
        .map(|_| api.send_with(b"GET / HTT", &[writer.as_fd(); 6]))
        .collect();
    let (status, answer) = api.request_with("GET", "/version", "", &[writer.as_fd(); 16]);
    assert_eq!(status, 400, "{answer}");
    assert!(
        answer.contains("limit of open files") || answer.contains("half sent"),
        "{answer}"
    );
    assert_eq!(api.request("GET", "/version", "").0, 200);
    drop(held);
    assert_eq!(api.request("GET", "/version", "").0, 200);
}

#[test]
fn log_when_it_is_a_stream_of_ours_goes_there() {
    let folder = Folder::new();
    let listener = UnixListener::bind(folder.join("api")).unwrap();
    let monitor = with(&[listener.as_fd()], &["--api-fd", "10", "--log-fd", "2"]);
    let api = Api::at(folder.join("api"));
    api.get("/");
    common::wait_until("the first line of the log", || {
        monitor.stderr().contains("(mayfly v")
    });
    // A descriptor that was passed stays out of what this process would start.
    let info = fs::read_to_string(format!("/proc/{}/fdinfo/10", monitor.pid())).unwrap();
    let flags = info.lines().find_map(|l| l.strip_prefix("flags:")).unwrap();
    let flags = i32::from_str_radix(flags.trim(), 8).unwrap();
    assert_eq!(flags & libc::O_CLOEXEC, libc::O_CLOEXEC);
}

/// The monitor as the first process of a pid namespace; its pid outside.
fn as_first_process(args: &[&str]) -> (Monitor, u32) {
    let mut command = Command::new("unshare");
    command
        .args(["--pid", "--fork", "--kill-child"])
        .arg(common::mayfly());
    command.args(args).stdin(Stdio::null());
    let monitor = Monitor::spawn(command);
    let mut first = None;
    common::wait_until("the first process of the namespace", || {
        let children = format!("/proc/{0}/task/{0}/children", monitor.pid());
        let child = fs::read_to_string(children).unwrap();
        first = child.trim().parse().ok();
        first.is_some_and(|pid: u32| {
            fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name == "mayfly\n")
        })
    });
    (monitor, first.unwrap())
}

#[test]
fn first_process_when_told_to_end_ends_with_143() {
    needs!(kvm, root);
    let folder = Folder::new();
    let socket = folder.join("api");
    for (signal, code) in [
        (libc::SIGTERM, 143),
        (libc::SIGINT, 130),
        (libc::SIGHUP, 156),
    ] {
        let (mut monitor, pid) = as_first_process(&["--api-sock", socket.to_str().unwrap()]);
        let _ = Api::at(&socket);
        sys::kill(pid, signal);
        monitor.exits_with(code);
        fs::remove_file(&socket).unwrap();
    }
    // And with a guest, so behind the filter.
    let file = folder.file("vm.json", common::probe_vm("print:up,spin").to_string());
    let config = file.to_str().unwrap();
    let args = ["--no-api", "--config-file", config, "--level", "Error"];
    let (mut monitor, pid) = as_first_process(&args);
    monitor.expect("probe: print:up ok");
    sys::kill(pid, libc::SIGTERM);
    monitor.exits_with(143);
}
