//! Linux in the guest. It takes a while to boot where its kernel half is emulated, so each boot
//! here is good for several checks.

mod common;

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use common::{Folder, LINUX_PATIENCE, Monitor, Netns, needs};
use serde_json::json;

const GUEST: &str = "172.16.9.2";
const HOST: &str = "172.16.9.1";
const PORT: u16 = 8000;

/// How much the guest fetches, and how often the host fetches 12 MiB: more than 10 MB, and no whole number of
/// anything; with MAYFLY_NET_MIB set, so much both ways.
fn amounts() -> (usize, usize) {
    match std::env::var("MAYFLY_NET_MIB") {
        Err(_) => (10_500_001, 1),
        Ok(mib) => {
            let mib: usize = mib.parse().unwrap();
            ((mib << 20) + 1, mib.div_ceil(12))
        }
    }
}

/// Large frames, and so few of them: each one costs an emulated kernel half a millisecond.
const MTU: u16 = 32_000;

/// The checksum of a file, by the host's own tool.
fn sha256(folder: &Folder, name: &str) -> String {
    let output = Command::new("sha256sum")
        .arg(folder.join(name))
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    text.split(' ').next().unwrap().to_owned()
}

/// Whether the guest's first process ended by a fault seen on busy software-KVM hosts alone, once in
/// many boots with two vCPUs: a pointer that init reads through FS is 0. The monitor is not concerned:
/// it neither reads nor sets a vCPU's registers once the guest runs.
fn host_broke_init(output: &str) -> bool {
    common::is_software_kvm() && output.contains("init[1]: segfault at 0 ")
}

/// Answers one HTTP request with `content`.
fn serve(listener: &TcpListener, content: &[u8]) {
    listener.set_nonblocking(true).unwrap();
    let deadline = Instant::now() + LINUX_PATIENCE;
    let mut client = loop {
        match listener.accept() {
            Ok((client, _)) => break client,
            Err(e) => assert!(Instant::now() < deadline, "the guest asks for nothing: {e}"),
        }
        thread::sleep(Duration::from_millis(20));
    };
    client.set_nonblocking(false).unwrap();
    client.set_read_timeout(Some(LINUX_PATIENCE)).unwrap();
    client.set_write_timeout(Some(LINUX_PATIENCE)).unwrap();
    let mut request = Vec::new();
    let mut byte = [0];
    while !request.ends_with(b"\r\n\r\n") {
        client.read_exact(&mut byte).unwrap();
        request.push(byte[0]);
    }
    write!(
        client,
        "HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n",
        content.len()
    )
    .unwrap();
    client.write_all(content).unwrap();
}

/// What the guest serves at `path`.
fn fetch(path: &str) -> Vec<u8> {
    let mut server = TcpStream::connect((GUEST, 80)).unwrap();
    server.set_read_timeout(Some(LINUX_PATIENCE)).unwrap();
    write!(server, "GET {path} HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    server.read_to_end(&mut answer).unwrap();
    let end = answer.windows(4).position(|w| w == b"\r\n\r\n").unwrap();
    assert!(answer.starts_with(b"HTTP/1.") && answer[9..].starts_with(b"200"));
    answer.split_off(end + 4)
}

/// Whether the guest answers pings of the host's.
fn answers_ping(netns: &Netns) -> bool {
    let mut ping = netns.command("ping");
    ping.args(["-c", "2", "-i", "0.2", "-W", "2", GUEST]);
    ping.output().unwrap().status.success()
}

/// Waits until it does: on a busy host an answer may take long.
fn expect_ping(netns: &Netns) {
    let deadline = Instant::now() + LINUX_PATIENCE;
    while !answers_ping(netns) {
        assert!(Instant::now() < deadline, "the guest answers no ping");
    }
}

#[test]
fn linux_when_booted_from_a_disk_reads_writes_and_talks() {
    needs!(kvm, root);
    let linux = common::linux();
    let (netns, folder) = (Netns::new(), Folder::new());
    netns.tap("mftap", &format!("{HOST}/24"));
    netns.run("ip", &["link", "set", "mftap", "mtu", &MTU.to_string()]);
    let disk = folder.join("rootfs.ext4");
    fs::copy(&linux.disk, &disk).unwrap();
    let (len, fetches) = amounts();
    let content: Vec<u8> = (0u32..)
        .flat_map(|n| (n ^ 0x5bd1_e995).to_le_bytes())
        .take(len)
        .collect();
    folder.file("content", &content);
    let config = json!({
        "boot-source": {
            "kernel_image_path": linux.kernel,
            "boot_args": format!(
                "{} ip={GUEST}::{HOST}:255.255.255.0::eth0:off mayfly.run=cpus,mem,echo,\
                 write=by-the-guest,wget=http://{HOST}:{PORT}/content,serve",
                linux.cmdline
            ),
        },
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 128},
        "drives": [{
            "drive_id": "rootfs",
            "path_on_host": disk,
            "is_root_device": true,
            "cache_type": "Writeback",
        }],
        "network-interfaces": [{
            "iface_id": "eth0",
            "host_dev_name": "mftap",
            "guest_mac": "06:00:AC:10:09:02",
            "mtu": MTU,
        }],
    });
    let listener = netns.inside(|| TcpListener::bind((HOST, PORT)).unwrap());
    let (mut monitor, api) = Monitor::boot_inside(&netns, &folder, &config);

    // It boots, and sees the machine it was given.
    monitor.expect_within("mayfly-guest: init reached", LINUX_PATIENCE);
    let output = monitor.expect_within("mayfly-guest: echo ready", LINUX_PATIENCE);
    assert!(output.contains("mayfly-guest: cpus 1"), "{output}");
    let mem = output.split("mayfly-guest: mem ").nth(1).unwrap();
    let kib: u64 = mem.split(' ').next().unwrap().parse().unwrap();
    assert!((96 << 10..128 << 10).contains(&kib), "{kib} KiB");

    // It hears what is typed, but not while it is paused.
    expect_ping(&netns);
    api.patch("/vm", json!({"state": "Paused"}));
    monitor.type_in("hello guest\n");
    let output = monitor.stays_paused(&api, 1);
    assert!(!answers_ping(&netns), "a paused guest answers");
    assert!(!output.contains("echo got"), "a paused guest goes on");
    api.patch("/vm", json!({"state": "Resumed"}));
    monitor.expect_within("mayfly-guest: echo got: hello guest", LINUX_PATIENCE);
    expect_ping(&netns);

    // It writes a file, which is on the disk of the host while the guest goes on.
    monitor.expect_within("mayfly-guest: write done", LINUX_PATIENCE);
    let cat = Command::new("debugfs")
        .args(["-R", "cat /written-by-guest"])
        .arg(&disk)
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .output()
        .unwrap();
    assert_eq!(
        String::from_utf8_lossy(&cat.stdout),
        "by-the-guest\n",
        "{cat:?}"
    );

    // It fetches from the host what the host has, and the host from it what it has.
    serve(&listener, &content);
    let sum = sha256(&folder, "content");
    let line = format!("mayfly-guest: wget sha256 {sum} length {len}");
    monitor.expect_within(&line, LINUX_PATIENCE);
    monitor.expect_within("mayfly-guest: serve ready", LINUX_PATIENCE);
    common::wait_until_within(LINUX_PATIENCE, "the guest accepts a connection", || {
        netns.inside(|| TcpStream::connect((GUEST, 80)).is_ok())
    });
    let on_disk: String = (1_000_000..)
        .map(|n| format!("{n}\n"))
        .take(12 << 17)
        .collect();
    folder.file("on-disk", &on_disk.as_bytes()[..12 << 20]);
    for _ in 0..fetches {
        let served = netns.inside(|| fetch("/data"));
        folder.file("served", &served);
        assert_eq!(served.len(), 12 << 20);
        assert_eq!(sha256(&folder, "served"), sha256(&folder, "on-disk"));
    }

    assert_eq!(api.get("/")["state"], "Running");
    assert!(monitor.child.try_wait().unwrap().is_none());
    let log = folder.read("log");
    assert!(
        !log.contains("needs a reset") && !log.contains("failed"),
        "{log}"
    );
    assert_eq!(monitor.stderr(), "");
}

#[test]
fn linux_when_booted_from_an_initramfs_with_2_vcpus_uses_both_and_reboots() {
    needs!(kvm);
    let linux = common::linux();
    let folder = Folder::new();
    let config = json!({
        "boot-source": {
            "kernel_image_path": linux.kernel,
            "initrd_path": linux.initrd,
            "boot_args": format!("{} mayfly.run=cpus,echo", linux.cmdline),
        },
        "machine-config": {"vcpu_count": 2, "mem_size_mib": 128},
        "drives": [],
    });
    let (mut monitor, output) = (0..3)
        .find_map(|_| {
            let mut monitor = Monitor::boot(&folder, &config);
            // Typed before the guest's driver exists: nothing of it is lost.
            monitor.type_in("well then\n");
            match monitor.wait_for("mayfly-guest: echo ready", LINUX_PATIENCE) {
                Ok(output) => Some((monitor, output)),
                Err(output) if host_broke_init(&output) => None,
                Err(output) => panic!("no echo. Output:\n{output}\nErrors:\n{}", monitor.stderr()),
            }
        })
        .expect("the host broke the guest's init three times");
    assert!(output.contains("mayfly-guest: cpus 2"), "{output}");
    for cpu in 0..2 {
        let line = format!("mayfly-guest: cpu {cpu}: package 0 core {cpu} apic {cpu}");
        assert!(output.contains(&line), "{line}: {output}");
    }
    monitor.expect_within("mayfly-guest: echo got: well then", LINUX_PATIENCE);
    let status = monitor.wait_within(LINUX_PATIENCE);
    assert_eq!(status.code(), Some(0), "{status}: {}", monitor.stdout());
    assert!(folder.read("log").contains("The guest reset its machine."));
}

/// The root file system after a guest worked on it: its journal is replayed, as at the next mount, and then it is whole.
#[test]
fn ext4_when_its_guest_has_ended_is_whole_whatever_the_end() {
    needs!(kvm, "e2fsck", "debugfs");
    let linux = common::linux();
    for (mode, is_killed) in [
        (json!({"cache_type": "Writeback"}), true),
        (json!({"cache": "none"}), true),
        (json!({"cache": "none"}), false),
    ] {
        let folder = Folder::new();
        let disk = folder.join("rootfs.ext4");
        fs::copy(&linux.disk, &disk).unwrap();
        let mut drive = json!({"drive_id": "rootfs", "path_on_host": disk, "is_root_device": true});
        for (key, value) in mode.as_object().unwrap() {
            drive[key] = value.clone();
        }
        let then = if is_killed { "echo" } else { "reboot" };
        let config = json!({
            "boot-source": {
                "kernel_image_path": linux.kernel,
                "boot_args": format!("{} mayfly.run=write=synced,{then}", linux.cmdline),
            },
            "machine-config": {"vcpu_count": 1, "mem_size_mib": 128},
            "drives": [drive],
        });
        let mut monitor = Monitor::boot(&folder, &config);
        monitor.expect_within("mayfly-guest: write done", LINUX_PATIENCE);
        if is_killed {
            monitor.child.kill().unwrap();
            monitor.wait();
        } else {
            let status = monitor.wait_within(LINUX_PATIENCE);
            assert_eq!(status.code(), Some(0), "{status}: {}", monitor.stdout());
        }
        let tool = |name: &str, args: &[&str]| {
            let mut run = Command::new(name);
            let run = run.args(args).arg(&disk);
            run.env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
                .output()
                .unwrap()
        };
        // Without a question; it does no more than replay the journal, or fails.
        let replayed = tool("e2fsck", &["-p"]);
        assert!(
            matches!(replayed.status.code(), Some(0 | 1)),
            "{mode}: {replayed:?}"
        );
        let checked = tool("e2fsck", &["-fn"]);
        assert_eq!(checked.status.code(), Some(0), "{mode}: {checked:?}");
        let cat = tool("debugfs", &["-R", "cat /written-by-guest"]);
        assert_eq!(cat.stdout, b"synced\n", "{mode}: {cat:?}");
    }
}
