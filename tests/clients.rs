//! Clients of other projects, unmodified, against the real monitor. `tools/clients` gets them:
//! the crate firecracker-rs-sdk (tests/clients/rust-sdk) and schemathesis (from PyPI).

mod common;

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use common::{Api, Folder, Monitor, Netns, needs};
use serde_json::json;

/// What `tools/clients` made.
fn client(below: &str) -> PathBuf {
    let folder = std::env::var_os("MAYFLY_CLIENTS")
        .map_or_else(|| common::root().join("target/clients"), PathBuf::from);
    let path = folder.join(below);
    assert!(
        path.exists(),
        "{} is missing: run `tools/clients` first",
        path.display()
    );
    path
}

/// Runs a client that must succeed; what it said.
fn succeeds(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().unwrap();
    let said = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success(), "{command:?}: {said}");
    said
}

#[test]
fn rust_sdk_when_unmodified_leads_a_whole_life() {
    needs!(kvm);
    let folder = Folder::new();
    let said = succeeds(
        Command::new(client("rust-sdk-client"))
            .arg(common::mayfly())
            .arg(folder.path())
            .arg(common::probe())
            .arg(folder.disk("disk", 1 << 20)),
    );
    for step in [
        "create",
        "configure",
        "start",
        "update",
        "pause",
        "resume",
        "stop",
    ] {
        assert!(said.contains(&format!("sdk: {step} ok")), "{step}: {said}");
    }
    let metrics = std::fs::read_to_string(folder.join("metrics")).unwrap();
    assert!(metrics.starts_with('{'), "{metrics}");
}

/// Checks that contradict what clients of Firecracker rely on, or that one request cannot know.
const SWITCHED_OFF: [(&str, &str); 5] = [
    (
        "positive_data_acceptance",
        "a good body may be refused: files may be missing, and the state decides",
    ),
    (
        "unsupported_method",
        "Firecracker answers 400 to an unknown method, never 405",
    ),
    (
        "allow_header_conformance",
        "without a 405 there is no Allow",
    ),
    (
        "use_after_free",
        "nothing is ever deleted; a PUT and a PATCH have different times",
    ),
    (
        "ensure_resource_availability",
        "what a PUT made cannot be asked for by its own path",
    ),
];

/// The user of the jails, and of nothing else.
const UID: &str = "64321";

/// A monitor in a jail and a network namespace of its own, with what the examples of the OpenAPI
/// document name: whatever a generated body says, only the jail can be touched.
struct Jailed {
    monitor: Monitor,
    api: Api,
    root: PathBuf,
    _namespace: Netns,
    _folder: Folder,
}

impl Jailed {
    fn new() -> Self {
        let (folder, namespace) = (Folder::new(), Netns::new());
        let tap = ["tuntap", "add", "dev", "tap0", "mode", "tap", "user", UID];
        let inside = ["-n", &namespace.0];
        common::run("ip", &[&inside[..], &tap].concat());
        let namespace_file = format!("/run/netns/{}", namespace.0);
        let mut command = Command::new(common::jailer());
        command
            .args(["--id", "fuzzed", "--uid", UID, "--gid", UID, "--exec-file"])
            .arg(common::mayfly())
            .arg("--chroot-base-dir")
            .arg(folder.path())
            .args([
                "--netns",
                &namespace_file,
                "--",
                "--api-sock",
                "/api.socket",
            ]);
        let root = folder.join("mayfly/fuzzed/root");
        let monitor = Monitor::spawn(command);
        let api = Api::at(root.join("api.socket"));
        let place = |name: &str| root.join(name);
        for name in ["srv", "tmp"] {
            std::fs::create_dir(place(name)).unwrap();
            common::run("chown", &[UID, place(name).to_str().unwrap()]);
        }
        std::fs::copy(common::probe(), place("srv/vmlinux")).unwrap();
        std::fs::write(place("srv/rootfs.ext4"), [0; 1 << 20]).unwrap();
        common::run("chown", &[UID, place("srv/rootfs.ext4").to_str().unwrap()]);
        Jailed {
            monitor,
            api,
            root,
            _namespace: namespace,
            _folder: folder,
        }
    }
}

/// Passes TCP connections to the API socket at `socket`, bytes as they are; its port on the
/// loopback interface. It lasts as long as the test's process.
fn bridge(socket: &Path) -> u16 {
    fn pump(
        mut from: impl Read + Send + 'static,
        mut to: impl Write + Send + 'static,
        end: impl FnOnce() + Send + 'static,
    ) {
        thread::spawn(move || {
            // An end that is gone ends the other one too.
            let _ = io::copy(&mut from, &mut to);
            end();
        });
    }
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let socket = socket.to_owned();
    thread::spawn(move || {
        for client in listener.incoming() {
            let client: TcpStream = client.unwrap();
            let Ok(server) = UnixStream::connect(&socket) else {
                // The monitor has ended; the client sees that in its connection.
                continue;
            };
            let (client_end, server_end) =
                (client.try_clone().unwrap(), server.try_clone().unwrap());
            pump(
                client.try_clone().unwrap(),
                server.try_clone().unwrap(),
                move || {
                    let _ = server_end.shutdown(Shutdown::Both);
                },
            );
            pump(server, client, move || {
                let _ = client_end.shutdown(Shutdown::Both);
            });
        }
    });
    port
}

/// MAYFLY_SEED, else always the same.
fn seed() -> u64 {
    std::env::var("MAYFLY_SEED").map_or(4, |text| text.parse().expect("MAYFLY_SEED is a number"))
}

/// Runs schemathesis against our OpenAPI document; it must find nothing, and the monitor live on.
fn schemathesis(jailed: &mut Jailed) {
    let port = bridge(&jailed.api.0);
    let scratch = Folder::new();
    let off: Vec<&str> = SWITCHED_OFF.iter().map(|(name, _)| *name).collect();
    let seed = seed();
    println!("MAYFLY_SEED={seed}; switched off: {SWITCHED_OFF:#?}");
    let said = succeeds(
        Command::new(client("venv/bin/schemathesis"))
            .arg("run")
            .arg(common::root().join("resources/openapi.yaml"))
            .args(["--url", &format!("http://127.0.0.1:{port}")])
            .args(["--seed", &seed.to_string()])
            .args(["--max-examples", "20"])
            .args(["--phases", "examples,coverage,fuzzing"])
            .args(["--exclude-checks", &off.join(",")])
            .args(["--generation-database", "none", "--no-color"])
            .args(["--request-timeout", "30", "--continue-on-failure"])
            // What it keeps for itself goes away with the folder.
            .current_dir(scratch.path()),
    );
    println!("{said}");
    let summary = said.split("SUMMARY").nth(1).unwrap_or_default();
    let tested = mayfly::wire::OPERATIONS.len();
    assert!(summary.contains(&format!("Tested: {tested}")), "{said}");
    let ended = jailed.monitor.child.try_wait().unwrap();
    assert_eq!(ended, None, "{}", jailed.monitor.stderr());
    jailed.api.get("/");
}

#[test]
fn schemathesis_when_before_the_start_finds_nothing() {
    needs!(root);
    let mut jailed = Jailed::new();
    // Without KVM no guest starts and ends the run; every start is refused.
    let _ = std::fs::remove_file(jailed.root.join("dev/kvm"));
    schemathesis(&mut jailed);
    assert_eq!(jailed.api.get("/")["state"], "Not started");
}

#[test]
fn schemathesis_when_after_the_start_finds_nothing() {
    needs!(kvm, root);
    let mut jailed = Jailed::new();
    // What the examples of the document change.
    jailed.api.put(
        "/boot-source",
        json!({"kernel_image_path": "/srv/vmlinux", "boot_args": "probe=stay"}),
    );
    jailed.api.put(
        "/drives/rootfs",
        json!({"drive_id": "rootfs", "path_on_host": "/srv/rootfs.ext4", "is_root_device": false}),
    );
    jailed.api.put(
        "/network-interfaces/eth0",
        json!({"iface_id": "eth0", "host_dev_name": "tap0"}),
    );
    jailed
        .api
        .put("/actions", json!({"action_type": "InstanceStart"}));
    schemathesis(&mut jailed);
    assert_ne!(jailed.api.get("/")["state"], "Not started");
}
