//! Containers of podman that are microVMs, for an ordinary user: `mayfly-oci` under the real engine, which starts it
//! as root of a user namespace, with real guests.
//!
//! The user, its further users, the devices and all processes are of namespaces of the test's own: they are not there
//! on the host, and nothing of them is left when the test is killed.

mod common;

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use common::{Folder, LINUX_PATIENCE, containers, needs};
use serde_json::json;

const APPLETS: &[&str] = &[
    "sh",
    "cat",
    "sleep",
    "true",
    "id",
    "nc",
    "test",
    "sha256sum",
    "dd",
];

/// The user, the group that may use /dev/kvm, and the first of the users that are given to its namespaces.
const UID: u32 = 64_331;
const KVM: u32 = 64_332;
const FURTHER: u32 = 2_000_000;
/// An address of the host that is not the loopback's: that one is not reached through slirp4netns.
const HOST: &str = "192.0.2.1";

/// Makes the place, then waits until the test closes its standard input, or is killed: all processes end with this one.
/// The test's folder is at a short path: sockets' paths have few bytes.
const SCRIPT: &str = r#"
    set -eu
    ip link set lo up
    ip addr add "$2/32" dev lo
    mount --bind "$1" /mnt
    mount -t tmpfs none /mnt/devices
    mknod -m 660 /mnt/devices/kvm c 10 232
    chgrp "$3" /mnt/devices/kvm
    mknod -m 666 /mnt/devices/tun c 10 200
    mount --bind /mnt/devices/kvm /dev/kvm
    mount --bind /mnt/devices/tun /dev/net/tun
    for file in passwd group subuid subgid; do mount --bind "/mnt/etc/$file" "/etc/$file"; done
    echo made
    read -r end || true
"#;

/// A host of an ordinary user.
struct Place {
    folder: Folder,
    /// Its first process.
    shell: Child,
}

impl Place {
    fn new() -> Place {
        let folder = Folder::new();
        containers::install_programs(&folder);
        containers::busybox_root(&folder.join("rootfs"), APPLETS);
        for name in ["etc", "sys", "tmp", "run"] {
            fs::create_dir_all(folder.join("rootfs").join(name)).unwrap();
        }
        for name in ["devices", "etc", "run", "home/.config/mayfly"] {
            fs::create_dir_all(folder.join(name)).unwrap();
        }
        let linux = common::linux();
        containers::install(&linux.kernel, &folder.join("vmlinux"));
        let settings = json!({
            "kernel": "/mnt/vmlinux",
            "cmdline": linux.cmdline,
            "memory_mib": 128,
            "templates": "/mnt/home/templates",
            "ready_seconds": 220,
        });
        folder.file("home/.config/mayfly/oci.json", settings.to_string());
        folder.file(
            "etc/passwd",
            format!("root:x:0:0::/root:/bin/sh\nmf:x:{UID}:{UID}::/mnt/home:/bin/sh\n"),
        );
        folder.file(
            "etc/group",
            format!("root:x:0:\nmf:x:{UID}:\nkvm:x:{KVM}:\n"),
        );
        for file in ["etc/subuid", "etc/subgid"] {
            folder.file(file, format!("mf:{FURTHER}:65536\n"));
        }
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::set_permissions(folder.join("run"), fs::Permissions::from_mode(0o700)).unwrap();
        for name in ["home", "run", "rootfs"] {
            let owner = format!("{UID}:{UID}");
            folder.run("chown", &["-R", &owner, name]);
        }
        let shell = start(folder.path());
        Place { folder, shell }
    }

    /// A command in this place.
    fn inside(&self, user: u32, groups: &str) -> Command {
        let shell = self.shell.id();
        // The process that `unshare` has started.
        let children = fs::read_to_string(format!("/proc/{shell}/task/{shell}/children"));
        let children = children.unwrap();
        let mut command = Command::new("nsenter");
        command.args(["--all", "--target", children.trim()]);
        command.args(["setpriv", "--reuid", &user.to_string()]);
        command.args(["--regid", &user.to_string()]);
        match groups {
            "" => command.arg("--clear-groups"),
            groups => command.args(["--groups", groups]),
        };
        command.args(["--inh-caps=-all", "env", "-i", "HOME=/mnt/home"]);
        command.args(["XDG_RUNTIME_DIR=/mnt/run", "TERM=xterm"]);
        command.arg("PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin");
        command
    }

    fn podman_of(&self, groups: &str, words: &[&str]) -> Command {
        let mut command = self.inside(UID, groups);
        command.args(["podman", "--cgroup-manager", "cgroupfs"]);
        command.args(["--events-backend", "file", "--storage-driver", "vfs"]);
        command.args(["--log-level", "error", "--runtime", "/mnt/bin/mayfly-oci"]);
        command.args(words).stdin(Stdio::null());
        command
    }

    fn podman(&self, words: &[&str]) -> Command {
        self.podman_of(&KVM.to_string(), words)
    }

    fn works(&self, words: &[&str]) -> String {
        let output = self.podman(words).output().unwrap();
        eprintln!("{words:?}: {output:?}");
        assert!(output.status.success(), "{words:?}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    /// The processes here whose program's name begins so: their users, as the host has them.
    fn users_of(&self, name: &str) -> Vec<u32> {
        let script = "cat /proc/[0-9]*/status";
        let output = self.inside(0, "").args(["sh", "-c", script]).output();
        let text = String::from_utf8(output.unwrap().stdout).unwrap();
        let processes = text.split("Name:\t").filter(|it| it.starts_with(name));
        let user = |it: &str| {
            let line = it.lines().find_map(|line| line.strip_prefix("Uid:\t"))?;
            line.split('\t').next()?.parse().ok()
        };
        // One that has ended is still there while its parent takes no notice.
        let running = processes.filter(|it| !it.contains("State:\tZ"));
        running.filter_map(user).collect()
    }

    fn nothing_is_left(&self) {
        common::wait_until("no microVM is left", || self.users_of("mayfly").is_empty());
        let states = fs::read_dir(self.folder.join("run/mayfly-oci"));
        common::wait_until("no state is left", || {
            let states = states.as_ref().map_or(0, |_| {
                fs::read_dir(self.folder.join("run/mayfly-oci"))
                    .unwrap()
                    .count()
            });
            states == 0
        });
    }

    fn logs_have(&self, name: &str, text: &str) {
        common::wait_until_within(LINUX_PATIENCE, text, || {
            let logs = self.podman(&["logs", name]).output().unwrap();
            String::from_utf8_lossy(&logs.stdout).contains(text)
        });
    }

    /// Does something in the network of this place.
    fn in_network<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let shell = self.shell.id();
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                common::sys::enter_netns(Path::new(&format!("/proc/{shell}/ns/net")));
                work()
            });
            inside.join().unwrap()
        })
    }
}

fn start(folder: &Path) -> Child {
    let mut command = Command::new("unshare");
    command.args(["--mount", "--net", "--pid", "--fork", "--kill-child"]);
    command.args(["--mount-proc", "sh", "-c", SCRIPT, "sh"]);
    command.arg(folder).args([HOST, &KVM.to_string()]);
    let mut shell = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut made = [0; 5];
    let said = shell.stdout.as_mut().unwrap().read_exact(&mut made);
    assert!(said.is_ok() && made == *b"made\n", "the place is not made");
    shell
}

impl Drop for Place {
    fn drop(&mut self) {
        drop(self.shell.stdin.take());
        let _ = self.shell.wait();
    }
}

fn first_word(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    text.split_whitespace()
        .next()
        .unwrap_or_default()
        .to_owned()
}

fn assert_ends(output: &Output, code: i32, text: &str) {
    assert_eq!(
        (
            output.status.code(),
            &*String::from_utf8_lossy(&output.stdout)
        ),
        (Some(code), text),
        "{output:?}"
    );
}

#[test]
fn ordinary_users_containers_are_microvms() {
    needs!(
        root,
        kvm,
        tun,
        guest,
        podman,
        nsenter,
        unshare,
        setpriv,
        newuidmap,
        slirp4netns
    );
    let place = Place::new();

    // Who may not use KVM is told, and how that is mended.
    let plain = [
        "run",
        "--rm",
        "--network",
        "none",
        "--rootfs",
        "/mnt/rootfs",
    ];
    let refused = place.podman_of("", &[&plain[..], &["true"]].concat());
    let output = { refused }.output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(
        text.contains("/dev/kvm") && text.contains("group kvm"),
        "{text}"
    );
    place.nothing_is_left();

    let script = "test -t 1 && echo terminal; id -u; exit 7";
    let words = [&plain[..2], &["-t"], &plain[2..], &["sh", "-c", script]].concat();
    let output = place.podman(&words).output().unwrap();
    assert_ends(&output, 7, "terminal\r\n0\r\n");
    place.nothing_is_left();

    one_that_stays_is_served(&place);
    one_ends_with_its_conmon(&place);

    // What is kept is the user's own.
    for kept in ["home/.cache/mayfly/images/disks", "home/templates"] {
        let count = fs::read_dir(place.folder.join(kept)).unwrap().count();
        assert!(count > 0, "{kept}");
    }
}

fn one_that_stays_is_served(place: &Place) {
    let script = "trap 'echo got usr1' USR1; echo begun; while :; do sleep 1; done";
    place.works(&[
        "run",
        "-d",
        "--name",
        "c1",
        "--publish",
        "8080:80",
        "--rootfs",
        "/mnt/rootfs",
        "sh",
        "-c",
        script,
    ]);
    place.logs_have("c1", "begun");

    // The monitor is another user than the engine's, and of those that were given to this one.
    let monitors: Vec<u32> = place
        .users_of("mayfly")
        .into_iter()
        .filter(|uid| *uid != UID)
        .collect();
    let given = FURTHER + 32_000..FURTHER + 65_536;
    assert!(
        !monitors.is_empty() && monitors.iter().all(|uid| given.contains(uid)),
        "{monitors:?}"
    );

    let exec = [
        "exec",
        "-i",
        "--user",
        "7",
        "c1",
        "sh",
        "-c",
        "cat; id -u; exit 3",
    ];
    let mut exec = place.podman(&exec);
    let exec = exec.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let mut exec = exec.unwrap();
    exec.stdin.take().unwrap().write_all(b"typed\n").unwrap();
    assert_ends(&exec.wait_with_output().unwrap(), 3, "typed\n7\n");

    network_carries_bytes_both_ways(place);

    place.works(&["kill", "--signal", "USR1", "c1"]);
    place.logs_have("c1", "got usr1");
    place.works(&["stop", "--time", "300", "c1"]);
    assert_eq!(place.works(&["wait", "c1"]), "143");
    place.works(&["rm", "c1"]);
    place.nothing_is_left();
}

fn network_carries_bytes_both_ways(place: &Place) {
    // Longer than one packet.
    let sent: Vec<u8> = (0..1 << 20)
        .map(|at: u32| ((at / 251) ^ at) as u8)
        .collect();
    let sum = {
        place.folder.file("sent", &sent);
        first_word(place.folder.run("sha256sum", &["sent"]).as_bytes())
    };
    // From the guest.
    let listener = place.in_network(|| TcpListener::bind((HOST, 0)).unwrap());
    let port = listener.local_addr().unwrap().port();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(&sent).unwrap();
        sent
    });
    let script = format!("nc {HOST} {port} </dev/null | sha256sum");
    let output = place.works(&["exec", "c1", "sh", "-c", &script]);
    assert_eq!(
        first_word(output.as_bytes()),
        sum,
        "from the host to the guest"
    );
    let sent = server.join().unwrap();

    // To the guest, by the published port.
    let script = "nc -l -p 80 | sha256sum";
    let mut server = place.podman(&["exec", "c1", "sh", "-c", script]);
    let mut server = server.stdout(Stdio::piped()).spawn().unwrap();
    common::wait_until_within(LINUX_PATIENCE, "the server of the guest listens", || {
        assert_eq!(server.try_wait().unwrap(), None, "the server has ended");
        let sockets = place.works(&["exec", "c1", "sh", "-c", "cat /proc/net/tcp*"]);
        // Port 80, of one that listens.
        sockets
            .lines()
            .any(|line| line.contains(":0050 ") && line.contains(" 0A "))
    });
    place.in_network(|| {
        let mut stream = TcpStream::connect("127.0.0.1:8080").unwrap();
        stream.write_all(&sent).unwrap();
    });
    let output = server.wait_with_output().unwrap();
    assert_eq!(first_word(&output.stdout), sum, "by the published port");
}

fn one_ends_with_its_conmon(place: &Place) {
    place.works(&[
        "run",
        "-d",
        "--name",
        "c2",
        "--network",
        "none",
        "--rootfs",
        "/mnt/rootfs",
        "sleep",
        "100000",
    ]);
    let conmon = place.works(&["inspect", "--format", "{{.State.ConmonPid}}", "c2"]);
    let id = place.works(&["inspect", "--format", "{{.Id}}", "c2"]);
    let killed = place.inside(0, "").args(["kill", "-9", &conmon]).status();
    assert!(killed.unwrap().success());
    common::wait_until_within(Duration::from_secs(60), "the microVM has ended", || {
        place.users_of("mayfly").is_empty()
    });
    // podman 4.3 does not delete what it finds stopped without its conmon, under any runtime.
    let _ = place
        .podman(&["rm", "--force", "--time", "0", "c2"])
        .output();
    let mut delete = place.inside(UID, "");
    delete.args([
        "podman",
        "unshare",
        "/mnt/bin/mayfly-oci",
        "delete",
        "--force",
        &id,
    ]);
    assert!(delete.status().unwrap().success());
    place.nothing_is_left();
}
