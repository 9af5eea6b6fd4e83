//! Snapshots of a Linux guest: a chain of restores while its disk and its network are used.
//!
//! MAYFLY_SNAPSHOT_CHAIN says how many restores the long chain has.

mod common;
#[path = "snapshot/pair.rs"]
mod pair;

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use common::{Api, Folder, LINUX_PATIENCE, Monitor, Netns, needs};
use pair::{Pair, save_and_end};
use probe_host::pattern;
use serde_json::{Value, json};

const GUEST: &str = "172.16.9.2";
const HOST: &str = "172.16.9.1";
/// Where the guest takes bytes from, and where it returns them.
const PORTS: [u16; 2] = [5000, 5001];
/// Large frames, and so few of them: each one costs an emulated kernel half a millisecond.
const MTU: &str = "32000";
/// Bytes that go through the guest in one link of the chain. Its programs take them in small pieces, each
/// of which is several system calls of an emulated kernel.
const LINK: usize = 8 << 10;

/// Types a command into the guest's shell; what it put out, up to a word that ends it.
fn shell(monitor: &mut Monitor, command: &str) -> String {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    // Echoes of what is typed do not have these words.
    let (begin, end) = (format!("begin-{number}\r\n"), format!("done-{number}\r\n"));
    let then = if command.ends_with('&') { "" } else { ";" };
    let line = format!("echo beg''in-{number}; {command}{then} echo do''ne-{number}\n");
    monitor.type_in(&line);
    let output = monitor.expect_within(&end, LINUX_PATIENCE);
    let (_, said) = output.split_once(&begin).expect("the beginning");
    let (said, _) = said.split_once(&end).expect("the end");
    said.trim().to_owned()
}

/// Restores, in the namespace of the guest's tap.
fn restore(netns: &Netns, own: &Folder, pair: &Pair, more: Value) -> (Monitor, Api) {
    let mut command = netns.command(common::mayfly());
    command.arg("--api-sock").arg(own.join("api"));
    command.arg("--log-path").arg(own.join("log"));
    let monitor = Monitor::spawn(command);
    let api = Api::at(own.join("api"));
    api.put("/snapshot/load", pair.resume(more));
    (monitor, api)
}

/// A Linux guest with a shell, a disk and a network.
fn boot(netns: &Netns, folder: &Folder, own: &Folder) -> (Monitor, Api) {
    // By ACPI a restored guest learns that it is a clone.
    let linux = common::linux_with_acpi();
    netns.tap("mftap", &format!("{HOST}/24"));
    netns.run("ip", &["link", "set", "mftap", "mtu", MTU]);
    let disk = folder.join("disk");
    fs::copy(&linux.disk, &disk).unwrap();
    let config = json!({
        "boot-source": {
            "kernel_image_path": linux.kernel,
            "initrd_path": common::module_initrd(&linux),
            "boot_args": format!(
                "{} ip={GUEST}::{HOST}:255.255.255.0::eth0:off mayfly.run=shell", linux.cmdline
            ),
        },
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 128},
        "drives": [{
            "drive_id": "rootfs",
            "path_on_host": disk,
            "is_root_device": true,
            "cache_type": "Writeback",
        }],
        "network-interfaces": [
            {"iface_id": "eth0", "host_dev_name": "mftap", "guest_mac": "06:00:AC:10:09:02"},
        ],
    });
    let (monitor, api) = Monitor::boot_inside(netns, own, &config);
    monitor.expect_within("mayfly-guest: shell ready", LINUX_PATIENCE);
    (monitor, api)
}

#[test]
fn linux_when_restored_again_and_again_answers_its_shell_and_pings() {
    needs!(kvm, root, tun);
    let (netns, folder, own) = (Netns::new(), Folder::new(), Folder::new());
    let (monitor, api) = boot(&netns, &folder, &own);
    let mut here = (own, monitor, api);
    for link in 0..3 {
        let pair = Pair::new(&folder, &format!("link{link}"));
        let (_, monitor, api) = here;
        save_and_end(monitor, &api, &pair);
        let own = Folder::new();
        let (mut monitor, api) = restore(&netns, &own, &pair, json!({}));
        // By the shell itself: no other program of the guest has a part in it.
        let said = shell(&mut monitor, "number=$((number + 1)); echo number $number");
        assert_eq!(said, format!("number {}", link + 1));
        netns.run("ping", &["-c", "1", "-W", "20", GUEST]);
        here = (own, monitor, api);
    }
}

/// How far the guest's clock is behind the host's, between these. A kernel that is emulated loses some
/// seconds of timer interrupts while it boots.
fn seconds_behind(monitor: &mut Monitor) -> RangeInclusive<i64> {
    let now = || {
        let passed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        i64::try_from(passed.as_secs()).unwrap()
    };
    let before = now();
    let its: i64 = shell(monitor, "date +%s").parse().unwrap();
    before - its..=now() - its
}

#[test]
fn clones_when_two_are_started_have_random_numbers_of_their_own_and_the_right_time() {
    needs!(kvm);
    // By ACPI a restored guest learns that it is a clone.
    let linux = common::linux_with_acpi();
    let (folder, own) = (Folder::new(), Folder::new());
    let config = json!({
        "boot-source": {
            "kernel_image_path": linux.kernel,
            "initrd_path": linux.initrd,
            "boot_args": format!("{} mayfly.run=shell", linux.cmdline),
        },
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 128},
        "drives": [],
    });
    let (mut monitor, api) = Monitor::boot_with_api(&own, &config);
    monitor.expect_within("mayfly-guest: shell ready", LINUX_PATIENCE);
    // The generator is seeded, and what it would give next is in memory.
    let first = shell(&mut monitor, RANDOM);
    let behind = seconds_behind(&mut monitor);
    let pair = Pair::new(&folder, "template");
    save_and_end(monitor, &api, &pair);
    // So far behind would be a clone whose clock went on where it was.
    thread::sleep(Duration::from_secs(20));

    let folders = [Folder::new(), Folder::new()];
    let mut clones = folders
        .iter()
        .map(|own| pair.restore(own, json!({"clock_realtime": true})).0)
        .collect::<Vec<_>>();
    let mut numbers = vec![first];
    for clone in &mut clones {
        numbers.push(shell(clone, RANDOM));
        let now_behind = seconds_behind(clone);
        assert!(
            now_behind.start() - 1 <= *behind.end() && behind.start() - 1 <= *now_behind.end(),
            "{now_behind:?} s behind, and {behind:?} before it was saved"
        );
    }
    assert!(
        numbers.iter().all(|number| number.len() == 16 * 3 - 1),
        "{numbers:?}"
    );
    numbers.sort();
    numbers.dedup();
    assert_eq!(numbers.len(), 3, "{numbers:?}");
}

/// Prints a random number of the guest's kernel.
const RANDOM: &str = "od -An -N16 -tx1 /dev/urandom";

/// For long runs: on hosts whose KVM emulates the guest's kernel, programs of the guest end by
/// segmentation faults now and then, also where it was never saved.
#[test]
#[ignore = "a long run: `cargo test --test snapshot_linux -- --ignored`"]
fn linux_when_restored_in_a_chain_loses_nothing() {
    needs!(kvm, root, tun);
    let (netns, folder, own) = (Netns::new(), Folder::new(), Folder::new());
    let (mut monitor, api) = boot(&netns, &folder, &own);
    shell(&mut monitor, &format!("ip link set eth0 mtu {MTU}"));
    let disk = folder.join("disk");
    if !chain(&netns, &folder, monitor, &api, &disk) {
        let test = "linux_when_restored_in_a_chain_loses_nothing";
        common::needs::skip(test, "the host broke a program of the guest");
    }
}

/// Whether a program of the guest has ended by a segmentation fault, as on a software-KVM host those of guests
/// that were never saved do now and then.
fn host_broke_it(monitor: &Monitor) -> bool {
    common::is_software_kvm() && monitor.stdout().contains("Segmentation fault")
}

/// Waits until something is so; whether it came to that, and the host did not break the guest.
fn is_soon(monitor: &mut Monitor, what: &str, mut is_so: impl FnMut() -> bool) -> bool {
    let (mut broken, mut asked) = (false, Instant::now());
    common::wait_until_within(LINUX_PATIENCE, what, || {
        let ended = monitor.child.try_wait().unwrap();
        assert!(ended.is_none(), "it has ended: {}", monitor.stdout());
        if asked.elapsed() > Duration::from_secs(20) {
            // The shell tells what has become of its jobs when a line is entered.
            monitor.type_in("\n");
            asked = Instant::now();
        }
        broken = host_broke_it(monitor);
        broken || is_so()
    });
    !broken
}

/// Ends both streams, and with them the threads that use them, however the test ends.
struct Streams<'a>([TcpStream; 2], &'a AtomicUsize);

impl Drop for Streams<'_> {
    fn drop(&mut self) {
        self.1.store(usize::MAX / 2, Ordering::Relaxed);
        for stream in &self.0 {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }
}

/// A stream of bytes goes through the guest and, on its way, into a file on its disk. The guest is
/// saved and restored in the middle of it, again and again. Whether the host let it be.
fn chain(netns: &Netns, folder: &Folder, mut monitor: Monitor, api: &Api, disk: &Path) -> bool {
    let links = std::env::var("MAYFLY_SNAPSHOT_CHAIN").map_or(8, |it| it.parse().unwrap());
    let listeners = PORTS.map(|port| netns.inside(|| TcpListener::bind((HOST, port)).unwrap()));
    let command = format!(
        "{{ nc {HOST} {} </dev/null | tee /received | nc {HOST} {} >/dev/null; }} &",
        PORTS[0], PORTS[1]
    );
    shell(&mut monitor, &command);
    let mut streams = Vec::new();
    for (number, listener) in listeners.into_iter().enumerate() {
        listener.set_nonblocking(true).unwrap();
        let is_there = is_soon(&mut monitor, "the guest connects", || {
            let accepted = listener.accept().ok();
            streams.extend(accepted.map(|(stream, _)| stream));
            streams.len() > number
        });
        if !is_there {
            return false;
        }
    }
    for stream in &streams {
        stream.set_nonblocking(false).unwrap();
    }
    let mut sent = vec![0; (links + 1) * LINK];
    pattern::fill(11, 0, &mut sent);
    // Bytes that came back, links that were begun, and all that is sent.
    let (returned, begun, all) = (AtomicUsize::new(0), AtomicUsize::new(0), &sent);
    let [mut to, mut from] = <[TcpStream; 2]>::try_from(streams).unwrap();
    let ends = Streams([to.try_clone().unwrap(), from.try_clone().unwrap()], &begun);
    let went_on = thread::scope(|scope| {
        let (ends, begun) = (ends, &begun);
        let writer = scope.spawn(move || {
            // Two links ahead at most: there is always more to come.
            for (number, piece) in all.chunks(LINK / 2).enumerate() {
                common::wait_until_within(LINUX_PATIENCE, "the chain goes on", || {
                    begun.load(Ordering::Relaxed) + 2 > number / 2
                });
                if to.write_all(piece).is_err() {
                    return;
                }
            }
            let _ = to.shutdown(std::net::Shutdown::Write);
        });
        let reader = scope.spawn(|| returns(&mut from, all, &returned));
        let mut here = (Folder::new(), monitor, Api(api.0.clone()));
        for link in 0..links {
            // In the middle of it: there is more to come, and something under way.
            let goes_on = is_soon(&mut here.1, "the stream goes on", || {
                reader.is_finished() || returned.load(Ordering::Relaxed) > link * LINK
            });
            if !goes_on {
                return false;
            }
            if reader.is_finished() && link + 1 < links {
                // A program of the guest has ended. The shell does not say how for one in a pipe.
                let jobs = shell(&mut here.1, "jobs -l");
                assert!(
                    common::is_software_kvm(),
                    "the stream ended at link {link}: {jobs}"
                );
                return false;
            }
            let pair = Pair::new(folder, &format!("link{}", link % 2));
            let (_, monitor, api) = here;
            save_and_end(monitor, &api, &pair);
            let own = Folder::new();
            let (monitor, api) = restore(netns, &own, &pair, json!({}));
            here = (own, monitor, api);
            begun.store(link + 1, Ordering::Relaxed);
        }
        let (own, mut monitor, api) = here;
        if !is_soon(&mut monitor, "all comes back", || reader.is_finished()) {
            return false;
        }
        writer.join().unwrap();
        assert_eq!(reader.join().unwrap(), sent.len());
        drop(ends);
        let said = shell(&mut monitor, "sync; sha256sum /received");
        if host_broke_it(&monitor) {
            return false;
        }
        folder.file("sent", &sent);
        let sum = sha256(&folder.join("sent"));
        assert!(said.contains(&sum), "{sum}: {said}");
        assert_eq!(api.get("/")["state"], "Running");
        drop(monitor);
        let log = own.read("log");
        assert!(
            !log.contains("needs a reset") && !log.contains("failed"),
            "{log}"
        );
        true
    });
    if !went_on {
        return false;
    }
    let check = std::process::Command::new("e2fsck")
        .args(["-fp"])
        .arg(disk)
        .output()
        .unwrap();
    assert!(
        check.status.code().is_some_and(|code| code < 4),
        "{check:?}"
    );
    true
}

/// Reads what comes back and compares it; how much that was, when it ends.
fn returns(from: &mut TcpStream, sent: &[u8], returned: &AtomicUsize) -> usize {
    let mut bytes = vec![0; 64 << 10];
    loop {
        let before = returned.load(Ordering::Relaxed);
        let Ok(n) = from.read(&mut bytes) else {
            return before;
        };
        assert!(
            sent[before..].starts_with(&bytes[..n]),
            "other bytes after {before}"
        );
        returned.store(before + n, Ordering::Relaxed);
        if n == 0 || before + n == sent.len() {
            return before + n;
        }
    }
}

fn sha256(path: &Path) -> String {
    let output = std::process::Command::new("sha256sum")
        .arg(path)
        .output()
        .unwrap();
    String::from_utf8_lossy(&output.stdout[..64]).into_owned()
}
