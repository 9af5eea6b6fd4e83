//! Containers of podman that are microVMs: `mayfly-oci` under the real engine, with real guests. As root, with
//! storage, state and network of the test's own.
//!
//! A guest takes long to boot where its kernel is emulated, so that one container serves many checks.

mod common;

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use common::{Folder, LINUX_PATIENCE, Netns, containers, needs};

const APPLETS: &[&str] = &[
    "sh",
    "cat",
    "sleep",
    "true",
    "id",
    "hostname",
    "nc",
    "ls",
    "stty",
    "wc",
    "kill",
    "grep",
    "dd",
    "sha256sum",
];

/// podman with everything of its own.
struct Podman {
    folder: Folder,
    /// The folder that containers are made of.
    root: String,
    netns: Netns,
}

impl Podman {
    fn new() -> Podman {
        let folder = Folder::new();
        let podman = Podman {
            root: folder.join("rootfs").display().to_string(),
            folder,
            netns: Netns::new(),
        };
        containers::install_warm_runtime(&podman.folder);
        podman.make_root();
        podman
    }

    /// A folder with a shell and some data.
    fn make_root(&self) {
        let root = Path::new(&self.root);
        containers::busybox_root(root, APPLETS);
        for folder in ["etc", "sys", "tmp", "run"] {
            fs::create_dir(root.join(folder)).unwrap();
        }
        let plain = self.folder.file("rootfs/etc/plain", "no program");
        fs::set_permissions(plain, fs::Permissions::from_mode(0o644)).unwrap();
    }

    fn path(&self, name: &str) -> String {
        self.folder.join(name).display().to_string()
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.netns.0));
        command.args([
            "podman",
            "--cgroup-manager",
            "cgroupfs",
            "--events-backend",
            "file",
            "--storage-driver",
            "vfs",
        ]);
        command.args([
            "--root",
            &self.path("store"),
            "--runroot",
            &self.path("run"),
        ]);
        command.args(["--runtime", &self.path("bin/mayfly-oci")]);
        command.args([
            "--runtime-flag",
            &format!("config={}", self.path("oci.json")),
        ]);
        command.args(words);
        command
    }

    fn run(&self, words: &[&str]) -> Output {
        let output = self.command(words).stdin(Stdio::null()).output().unwrap();
        eprintln!("{words:?}: {output:?}");
        output
    }

    fn works(&self, words: &[&str]) -> String {
        let output = self.run(words);
        assert!(output.status.success(), "{words:?}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    /// The words of `podman run`.
    fn container<'a>(&'a self, more: &[&'a str], command: &[&'a str]) -> Vec<&'a str> {
        [&["run"], more, &["--rootfs", &self.root], command].concat()
    }

    /// What podman says of the container `c1`.
    fn inspect(&self, format: &str) -> String {
        self.works(&["inspect", "--format", format, "c1"])
    }

    fn logs_have(&self, name: &str, text: &str) {
        common::wait_until_within(LINUX_PATIENCE, text, || {
            let logs = self.command(&["logs", name]).output().unwrap();
            String::from_utf8_lossy(&logs.stdout).contains(text)
        });
    }

    /// Waits until nothing of a container is there any more.
    fn nothing_is_left(&self) {
        let folder = self.folder.path().display().to_string();
        common::wait_until("no container of this test is left", || {
            let states = fs::read_dir("/run/mayfly-oci")
                .into_iter()
                .flatten()
                .flatten();
            let records = states.map(|entry| fs::read_to_string(entry.path().join("state.json")));
            !records.flatten().any(|record| record.contains(&folder))
        });
        common::wait_until("no process is left", || {
            processes(&format!("{folder}/bin")).is_empty()
        });
    }
}

/// The ids of processes whose command line has `text`.
fn processes(text: &str) -> Vec<i32> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let has_it = |entry: &fs::DirEntry| {
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(text)
    };
    entries
        .filter(|entry| has_it(entry))
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}

impl Drop for Podman {
    fn drop(&mut self) {
        let _ = self
            .command(&["rm", "--all", "--force", "--time", "0"])
            .output();
    }
}

/// The groups of a container, by its id.
fn groups(id: &str) -> Vec<PathBuf> {
    containers::groups(format!("libpod_parent/libpod-{id}"))
}

#[test]
fn containers_at_once_have_each_their_output_and_code() {
    needs!(root, kvm, guest, podman, nsenter);
    let podman = Podman::new();
    let special = [
        (&["/etc/plain"][..], 126),
        (&["/nonexistent/program"], 127),
        (&["sh", "-c", "kill -9 $$"], 137),
        (&["sh", "-c", "kill -15 $$"], 143),
    ];
    let start = |words: &[&str]| {
        let words = podman.container(&["--rm", "--network", "none"], words);
        let mut command = podman.command(&words);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command.spawn().unwrap()
    };
    let mut wanted: Vec<(Vec<String>, String, i32)> = Vec::new();
    for (words, code) in special {
        let words = words.iter().map(|word| (*word).to_owned()).collect();
        wanted.push((words, String::new(), code));
    }
    // An emulated guest with a tenth of a processor does not boot: its timer's interrupts take all of that.
    let (plain, at_once) = match common::is_software_kvm() {
        true => (4, 3),
        false => (16, 20),
    };
    for code in 0..plain {
        let script = format!("echo inside {code}; exit {code}");
        let words = ["sh", "-c", &script].map(str::to_owned).to_vec();
        wanted.push((words, format!("inside {code}\n"), code));
    }
    let mut children: VecDeque<(Child, String, i32)> = VecDeque::new();
    let mut wanted = wanted.into_iter();
    loop {
        while children.len() < at_once
            && let Some((words, text, code)) = wanted.next()
        {
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            children.push_back((start(&words), text, code));
        }
        let Some((child, text, code)) = children.pop_front() else {
            break;
        };
        let output = child.wait_with_output().unwrap();
        assert_eq!(
            (
                output.status.code(),
                String::from_utf8_lossy(&output.stdout).into_owned()
            ),
            (Some(code), text),
            "{output:?}"
        );
    }
    podman.nothing_is_left();
    // One disk for all of them.
    let disks = fs::read_dir(podman.folder.join("cache/disks"))
        .unwrap()
        .flatten();
    let disks = disks.filter(|entry| {
        entry
            .metadata()
            .is_ok_and(|it| it.is_file() && it.len() > 1 << 20)
    });
    assert_eq!(disks.count(), 1);
}

#[test]
fn container_that_stays_is_served_by_podmans_commands() {
    needs!(root, kvm, guest, podman, nsenter);
    let podman = Podman::new();
    fs::create_dir(podman.folder.join("data")).unwrap();
    podman.folder.file("data/file", "from the host\n");
    let volume = format!("{}:/data:ro", podman.path("data"));
    let script = "trap 'echo got usr1' USR1; echo begun; while :; do sleep 1; done";
    let more = [
        "-d",
        "--name",
        "c1",
        "--memory",
        "128m",
        "--volume",
        &volume,
        "--publish",
        "8080:80",
    ];
    let id = podman.works(&podman.container(&more, &["sh", "-c", script]));
    podman.logs_have("c1", "begun");

    // Streams and codes of further processes.
    let output = podman.run(&[
        "exec",
        "c1",
        "sh",
        "-c",
        "cat /data/file; id -u; echo apart >&2; exit 3",
    ]);
    assert_eq!(output.status.code(), Some(3));
    assert_eq!(
        (&*output.stdout, &*output.stderr),
        (&b"from the host\n0\n"[..], &b"apart\n"[..])
    );
    let mut exec = podman.command(&[
        "exec",
        "-i",
        "--user",
        "7",
        "--env",
        "A=b",
        "--workdir",
        "/tmp",
        "c1",
        "sh",
        "-c",
        "cat; id -u; echo $A $PWD",
    ]);
    let mut exec = exec
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    exec.stdin.take().unwrap().write_all(b"typed\n").unwrap();
    let output = exec.wait_with_output().unwrap();
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "typed\n7\nb /tmp\n"
    );
    assert_eq!(
        podman
            .run(&[
                "exec",
                "c1",
                "sh",
                "-c",
                "echo x > /data/file; cat /data/file"
            ])
            .status
            .code(),
        Some(0)
    );
    assert_eq!(podman.folder.read("data/file"), "from the host\n");
    assert!(
        podman
            .works(&["exec", "c1", "hostname"])
            .starts_with(&id[..12])
    );

    a_published_port_carries_bytes(&podman);

    // Limits, as the groups have them.
    let memory = ["memory.limit_in_bytes", "memory.max"];
    let limit = || containers::read_in(&groups(&id), &memory);
    assert_eq!(limit(), (128 << 20).to_string());
    podman.works(&["update", "--memory", "160m", "c1"]);
    assert_eq!(limit(), (160 << 20).to_string());

    podman.works(&["kill", "--signal", "USR1", "c1"]);
    podman.logs_have("c1", "got usr1");
    podman.works(&["pause", "c1"]);
    assert_eq!(podman.inspect("{{.State.Status}}"), "paused");
    podman.works(&["unpause", "c1"]);
    assert_eq!(
        podman.works(&["exec", "c1", "sh", "-c", "echo goes on"]),
        "goes on"
    );

    podman.works(&["stop", "--time", "300", "c1"]);
    assert_eq!(podman.works(&["wait", "c1"]), "143");
    common::wait_until("its control groups are gone", || groups(&id).is_empty());
    podman.works(&["rm", "c1"]);
    podman.nothing_is_left();
}

fn a_published_port_carries_bytes(podman: &Podman) {
    const SIZE: usize = 1 << 20;
    let mut server = podman.command(&["exec", "c1", "sh", "-c", "nc -l -p 80 | sha256sum"]);
    let mut server = server
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut bytes = vec![0; SIZE];
    File::open("/dev/urandom")
        .unwrap()
        .read_exact(&mut bytes)
        .unwrap();
    podman.folder.file("sent", &bytes);
    let address = podman.inspect("{{.NetworkSettings.IPAddress}}");
    podman.netns.inside(|| {
        let mut connection = None;
        common::wait_until_within(LINUX_PATIENCE, "the port is open", || {
            // The address of the bridge: from the host itself, podman's rules take 8080 to the container.
            connection = TcpStream::connect("10.88.0.1:8080").ok();
            assert_eq!(server.try_wait().unwrap(), None, "the server has ended");
            connection.is_some()
        });
        connection.unwrap().write_all(&bytes).unwrap();
    });
    let output = server.wait_with_output().unwrap();
    let sum = Command::new("sha256sum")
        .arg(podman.path("sent"))
        .output()
        .unwrap();
    let first = |text: &[u8]| {
        String::from_utf8_lossy(text)
            .split(' ')
            .next()
            .unwrap()
            .to_owned()
    };
    assert_eq!(first(&output.stdout), first(&sum.stdout), "{address}");
}

#[test]
fn container_ends_with_its_conmon() {
    needs!(root, kvm, guest, podman, nsenter);
    let podman = Podman::new();
    let pid_file = podman.path("pid");
    let more = [
        "-d",
        "--name",
        "c1",
        "--network",
        "none",
        "--pidfile",
        &pid_file,
    ];
    let id = podman.works(&podman.container(&more, &["sleep", "100000"]));
    let conmon = podman.inspect("{{.State.ConmonPid}}");
    let pid: i32 = podman.inspect("{{.State.Pid}}").parse().unwrap();
    common::run("kill", &["-9", &conmon]);
    common::wait_until("the microVM has ended", || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.is_empty() || stat.contains(") Z ")
    });
    // podman 4.3 does not delete what it finds stopped without its conmon, under any runtime.
    let _ = podman.run(&["rm", "--force", "--time", "0", "c1"]);
    let delete = ["delete", "--force", &id];
    common::run(&podman.path("bin/mayfly-oci"), &delete);
    assert!(groups(&id).is_empty());
    podman.nothing_is_left();
}

#[test]
fn what_a_microvm_cannot_have_is_refused_with_the_reason() {
    needs!(root, kvm, guest, podman, nsenter);
    let podman = Podman::new();
    let shared = format!("{}:/data", podman.path("bin"));
    for (more, expected) in [
        (&["--volume", &shared][..], ":ro"),
        (&["--memory", "32m"], "64 MiB or more"),
        (&["--device", "/dev/kvm"], "/dev/kvm"),
        (&["--network", "host"], "the network of the host"),
    ] {
        let network: &[&str] = if more[0] == "--network" {
            &[]
        } else {
            &["--network", "none"]
        };
        let more = [&["--rm"], network, more].concat();
        let output = podman.run(&podman.container(&more, &["true"]));
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(
            !output.status.success() && text.contains(expected),
            "{more:?}"
        );
        assert_eq!(text.matches(expected).count(), 1, "said once: {text}");
        podman.nothing_is_left();
    }
}
