//! Disks and network cards as a bare-metal driver sees them, well-behaved and hostile, on hosts
//! where things go wrong.

mod common;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::UdpSocket;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use common::fuse::{Hanging, Slow};
use common::sys;
use common::{Api, Folder, Monitor, Netns, needs, probe_vm, probe_vm_with_disks};
use probe_host::pattern;
use serde_json::json;

const SECTOR: usize = 512;

/// What the probe writes to `count` sectors from `first` on.
fn written(seed: u64, first: u64, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count * SECTOR];
    pattern::fill(seed, first, &mut bytes);
    bytes
}

/// The line about a word.
fn line<'a>(output: &'a str, word: &str) -> &'a str {
    let begins = format!("probe: {word} ");
    output
        .lines()
        .find(|l| l.starts_with(&begins))
        .unwrap_or_else(|| panic!("{word}: {output}"))
}

fn succeeded(output: &str, word: &str) {
    let line = line(output, word);
    assert!(line.starts_with(&format!("probe: {word} ok")), "{line}");
}

/// A guest that waits for words on its console.
fn shell(config: &mut serde_json::Value) {
    config["boot-source"]["boot_args"] = json!("probe=shell");
}

/// Has the guest's shell do a word; its line.
fn does(monitor: &mut Monitor, word: &str) -> String {
    let already = monitor.stdout().matches(&format!("probe: {word} ")).count();
    monitor.type_in(&format!("{word}\n"));
    common::wait_until(word, || {
        let output = monitor.stdout();
        assert!(
            monitor.child.try_wait().unwrap().is_none(),
            "{word}: {output}"
        );
        // Whole lines only.
        let whole = &output[..output.rfind('\n').unwrap_or(0)];
        whole.matches(&format!("probe: {word} ")).count() > already
    });
    let output = monitor.stdout();
    let begins = format!("probe: {word} ");
    let line = output.lines().rfind(|l| l.starts_with(&begins));
    line.unwrap_or_else(|| panic!("{word}: {output}"))
        .to_owned()
}

// Disks

#[test]
fn disk_when_written_by_the_guest_holds_it_on_the_host() {
    needs!(kvm);
    let folder = Folder::new();
    let disk = folder.disk("disk", 4 << 20);
    let words = "blkwrite:0:0:8:1,blkwrite:0:100:1000:2,blkwrite:0:8191:1:3,\
                 blkverify:0:100:1000:2,blksg:0:100:100,blkread:0:0:8";
    let mut monitor = Monitor::boot(&folder, &probe_vm_with_disks(words, &[&disk]));
    monitor.exits_with(0);
    let output = monitor.stdout();
    for word in words.split(',') {
        succeeded(&output, word);
    }
    let sum = pattern::sum(pattern::SUM_START, &written(1, 0, 8));
    let read = line(&output, "blkread:0:0:8");
    assert!(read.contains(&format!("sum={sum:016x}")), "{read}");
    // The interrupt of the completion can be seen.
    assert!(read.contains("isr=1"), "{read}");

    let mut expected = vec![0; 4 << 20];
    for (seed, first, count) in [(1, 0, 8), (2, 100, 1000), (3, 8191, 1)] {
        expected[first as usize * SECTOR..][..count * SECTOR]
            .copy_from_slice(&written(seed, first, count));
    }
    assert!(fs::read(disk).unwrap() == expected);
}

#[test]
fn disk_when_read_only_refuses_writes_and_stays_as_it_was() {
    needs!(kvm);
    let folder = Folder::new();
    let content = written(5, 0, 8);
    let disk = folder.file("disk", &content);
    let mut config = probe_vm_with_disks("blkinfo:0,blkwrite:0:0:8:1,blkverify:0:0:8:5", &[&disk]);
    config["drives"][0]["is_read_only"] = json!(true);
    let mut monitor = Monitor::boot(&folder, &config);
    monitor.exits_with(0);
    let output = monitor.stdout();
    assert!(line(&output, "blkinfo:0").contains("ro=true"));
    let write = line(&output, "blkwrite:0:0:8:1");
    assert!(
        write.contains("FAILED request 1 at sector 0: status 1"),
        "{write}"
    );
    succeeded(&output, "blkverify:0:0:8:5");
    assert!(fs::read(disk).unwrap() == content);
}

#[test]
fn disk_when_asked_for_its_id_tells_twenty_bytes_of_it() {
    needs!(kvm);
    let folder = Folder::new();
    let disk = folder.disk("disk", 4096);
    let mut config = probe_vm_with_disks("blkinfo:0,blkinfo:1", &[&disk, &disk]);
    config["drives"][1]["drive_id"] = json!("a_name_that_is_longer_than_that");
    let mut monitor = Monitor::boot(&folder, &config);
    monitor.exits_with(0);
    let output = monitor.stdout();
    assert!(line(&output, "blkinfo:0").ends_with("id=disk0"));
    assert!(line(&output, "blkinfo:1").ends_with("id=a_name_that_is_longe"));
}

#[test]
fn flush_when_the_cache_is_writeback_is_offered_and_done() {
    needs!(kvm);
    let folder = Folder::new();
    let disk = folder.disk("disk", 4096);
    for (cache, offered) in [("Writeback", true), ("Unsafe", false)] {
        let mut config = probe_vm_with_disks("blkinfo:0,blkflush:0,blkread:0:0", &[&disk]);
        config["drives"][0]["cache_type"] = json!(cache);
        let mut monitor = Monitor::boot(&folder, &config);
        monitor.exits_with(0);
        let output = monitor.stdout();
        let info = line(&output, "blkinfo:0");
        assert!(info.contains(&format!("flush={offered}")), "{info}");
        let flush = line(&output, "blkflush:0");
        let outcome = if offered {
            " ok "
        } else {
            "FAILED request 4 at sector 0: status 2"
        };
        assert!(flush.contains(outcome), "{flush}");
        succeeded(&output, "blkread:0:0");
    }
}

#[test]
fn disks_when_two_are_given_keep_apart() {
    needs!(kvm);
    let folder = Folder::new();
    let disks = ["a", "b"].map(|name| folder.disk(name, 8192));
    let words = "blkwrite:0:0:8:1,blkwrite:1:8:8:2,blkverify:0:0:8:1,blkverify:1:8:8:2";
    let config = probe_vm_with_disks(words, &[&disks[0], &disks[1]]);
    let mut monitor = Monitor::boot(&folder, &config);
    monitor.exits_with(0);
    for word in words.split(',') {
        succeeded(&monitor.stdout(), word);
    }
    let empty = vec![0; 4096];
    let first = [written(1, 0, 8), empty.clone()].concat();
    let second = [empty, written(2, 8, 8)].concat();
    assert!(fs::read(&disks[0]).unwrap() == first);
    assert!(fs::read(&disks[1]).unwrap() == second);
}

#[test]
fn disk_when_of_an_odd_size_has_its_whole_sectors_and_never_grows() {
    needs!(kvm);
    let folder = Folder::new();
    for (size, sectors) in [(0, 0), (511, 0), (512, 1), (1535, 2)] {
        let disk = folder.disk("disk", size);
        let beyond = format!("blkwrite:0:{sectors}:1:1");
        let words =
            format!("blkinfo:0,{beyond},blkread:0:{sectors}:1,blkwrite:0:36028797018963968:1:1");
        let mut monitor = Monitor::boot(&folder, &probe_vm_with_disks(&words, &[&disk]));
        monitor.exits_with(0);
        let output = monitor.stdout();
        let info = line(&output, "blkinfo:0");
        assert!(info.contains(&format!("capacity={sectors} ")), "{info}");
        for word in words.split(',').skip(1) {
            let refused = line(&output, word);
            assert!(
                refused.contains("FAILED") && refused.contains("status 1"),
                "{refused}"
            );
        }
        assert_eq!(fs::metadata(disk).unwrap().len(), size);
    }
}

#[test]
fn disk_when_shrunk_gives_errors_and_works_again_when_it_has_grown() {
    needs!(kvm);
    let folder = Folder::new();
    let disk = folder.disk("disk", 1 << 20);
    let mut config = probe_vm_with_disks("", &[&disk]);
    shell(&mut config);
    let (mut monitor, api) = Monitor::boot_with_api(&folder, &config);
    monitor.expect("probe: shell ready");
    assert!(does(&mut monitor, "blkwrite:0:100:8:1").contains(" ok "));
    let file = File::options().write(true).open(&disk).unwrap();
    file.set_len(4096).unwrap();
    let read = does(&mut monitor, "blkread:0:100:8");
    assert!(
        read.contains("FAILED") && read.contains("status 1"),
        "{read}"
    );
    assert!(does(&mut monitor, "blkread:0:0:8").contains(" ok "));
    assert_eq!(api.get("/")["state"], "Running");
    monitor.comes_to_rest("block");
    file.set_len(1 << 20).unwrap();
    assert!(does(&mut monitor, "blkread:0:100:8").contains(" ok "));
}

/// Runs `test` on a thread of its own with the host as it is, then with one that forbids io_uring, and one that has none:
/// threads do the work there.
fn on_each_engine(test: fn()) {
    for errno in [None, Some(libc::EPERM), Some(libc::ENOSYS)] {
        common::with_io_uring_answering(errno, test);
    }
}

#[test]
fn completions_when_the_disk_is_slow_are_told_as_they_come() {
    needs!(kvm, root);
    on_each_engine(|| {
        let folder = Folder::new();
        let slow = Slow::mount(&folder.join("slow"), 1 << 20);
        let config = probe_vm_with_disks("blktell:0:32", &[&slow.path()]);
        let held = slow.hold();
        let mut monitor = Monitor::boot(&folder, &config);
        let held = held;
        for told in 1..=32 {
            // As many as the engine has at the disk at once, out of order.
            let most = (33 - told).min(8);
            common::wait_until("requests are at the disk", || held.count() >= most);
            assert!(!monitor.stdout().contains(&format!("told {told}.")));
            held.answer_last();
            monitor.expect(&format!("told {told}."));
        }
        drop(held);
        monitor.exits_with(0);
        succeeded(&monitor.stdout(), "blktell:0:32");
        drop(slow);
    });
}

#[test]
fn disk_when_its_fsync_hangs_holds_up_nothing_else() {
    needs!(kvm, root);
    // The disk is mounted for one thread and what it starts.
    on_each_engine(|| {
        let folder = Folder::new();
        let slow = Slow::mount(&folder.join("slow"), 1 << 20);
        let other = folder.disk("other", 4096);
        let words = "blkwrite:0:0:8:1,print:flushing,blkflush:0,print:flushed,\
                     blkverify:0:0:8:1,blkread:1:0,echo";
        let mut config = probe_vm_with_disks(words, &[&slow.path(), &other]);
        config["drives"][0]["cache_type"] = json!("Writeback");
        let (mut monitor, _api) = {
            let hanging = slow.hang();
            let started = Monitor::boot_with_api(&folder, &config);
            while_it_hangs(&started.0, &started.1, hanging);
            started
        };
        monitor.expect("probe: print:flushed ok");
        monitor.expect("probe: echo ready");
        let output = monitor.stdout();
        succeeded(&output, "blkverify:0:0:8:1");
        succeeded(&output, "blkread:1:0");
        monitor.type_in("x\n");
        monitor.exits_with(0);
        // The folder can only be removed once nothing is mounted in it for us.
        drop(slow);
    });
}

/// The value of the sample of `GET /metrics` that begins with `begins`.
fn metric(api: &Api, begins: &str) -> u64 {
    let (status, text) = api.request("GET", "/metrics", "");
    assert_eq!(status, 200);
    let value = text.lines().find_map(|line| line.strip_prefix(begins));
    let value = value.unwrap_or_else(|| panic!("{begins} is not in: {text}"));
    value.trim().parse().unwrap()
}

#[test]
fn pause_when_the_disk_hangs_is_quiescent_only_once_that_ends() {
    needs!(kvm, root);
    on_each_engine(|| {
        let folder = Folder::new();
        let slow = Slow::mount(&folder.join("slow"), 1 << 20);
        let mut config = probe_vm_with_disks("blkflush:0,blkread:0:0,echo", &[&slow.path()]);
        config["drives"][0]["cache_type"] = json!("Writeback");
        let hanging = slow.hang();
        let (mut monitor, api) = Monitor::boot_with_api(&folder, &config);
        // Moved: it is let go before the monitor is dropped, also by a panic.
        let hanging = hanging;
        hanging.wait();
        api.patch("/vm", json!({"state": "Paused"}));
        assert_eq!(api.get("/")["state"], "Paused");
        assert_eq!(metric(&api, "mayfly_quiescent"), 0);
        common::wait_until("the log tells of the disk", || {
            let log = folder.read("log");
            log.contains("Paused, but not quiescent: 1 devices")
        });
        assert!(hanging.is_waited_for(), "it did not hang all that time");
        drop(hanging);
        common::wait_until("it is quiescent", || metric(&api, "mayfly_quiescent") == 1);
        common::wait_until("the log tells it", || {
            folder.read("log").contains("no I/O is in flight any more")
        });
        assert_eq!(api.get("/")["state"], "Paused");
        api.patch("/vm", json!({"state": "Resumed"}));
        assert_eq!(metric(&api, "mayfly_quiescent"), 0);
        monitor.expect("probe: echo ready");
        succeeded(&monitor.stdout(), "blkread:0:0");
        // A disk that does not hang: quiescent at once.
        api.patch("/vm", json!({"state": "Paused"}));
        assert_eq!(metric(&api, "mayfly_quiescent"), 1);
        api.patch("/vm", json!({"state": "Resumed"}));
        monitor.type_in("x\n");
        monitor.exits_with(0);
    });
}

/// A paused guest's requests are waited for; one that runs is not kept standing by them. What other clients ask for
/// meanwhile is done in either case.
#[test]
fn snapshot_when_the_disk_hangs_waits_for_it_or_lets_the_guest_run() {
    needs!(kvm, root);
    let folder = Folder::new();
    let slow = Slow::mount(&folder.join("slow"), 1 << 20);
    let mut config = probe_vm_with_disks("blkflush:0,blkread:0:0,echo", &[&slow.path()]);
    config["drives"][0]["cache_type"] = json!("Writeback");
    let send = |api: &Api, method: &str, path: &str, body: serde_json::Value| {
        let body = body.to_string();
        let length = body.len();
        let request = format!("{method} {path} HTTP/1.1\r\nContent-Length: {length}\r\n\r\n{body}");
        let stream = api.send_with(request.as_bytes(), &[]);
        // Once this is answered, control has seen the one before it.
        api.get("/");
        stream
    };
    let fork = json!({
        "snapshot_type": "Fork",
        "snapshot_path": folder.join("state"),
        "mem_file_path": folder.join("memory"),
    });
    let (paused, resumed) = (json!({"state": "Paused"}), json!({"state": "Resumed"}));
    let hanging = slow.hang();
    let (mut monitor, api) = Monitor::boot_with_api(&folder, &config);
    let hanging = hanging;
    hanging.wait();

    // Of a guest that runs: it is refused, and the pause that waited for its end is made.
    let mut asked = send(&api, "PUT", "/snapshot/create", fork.clone());
    api.patch("/vm", paused.clone());
    let (status, answer) = common::read_response(&mut asked);
    assert_eq!(status, 400, "{answer}");
    assert!(answer.contains("still has I/O in flight"), "{answer}");
    assert_eq!(api.get("/")["state"], "Paused");
    api.patch("/vm", resumed.clone());

    // Of a guest that another client has paused: it stays paused, and is saved when its disk has answered.
    let mut pausing = send(&api, "PATCH", "/vm", paused);
    let mut asked = send(&api, "PUT", "/snapshot/create", fork);
    let (status, answer) = common::read_response(&mut pausing);
    assert_eq!(status, 204, "{answer}");
    for _ in 0..100 {
        assert_eq!(api.get("/")["state"], "Paused");
    }
    assert!(!folder.join("state").exists());
    drop(hanging);
    let (status, answer) = common::read_response(&mut asked);
    assert_eq!(status, 204, "{answer}");
    assert_eq!(api.get("/")["state"], "Paused");
    assert!(folder.join("state").exists());
    api.patch("/vm", resumed);
    monitor.expect("probe: echo ready");
    monitor.type_in("x\n");
    monitor.exits_with(0);
    drop(slow);
}

/// The part of a test in which the disk hangs. It ends that first of all, also by a panic: a
/// monitor that waits for its disk cannot be waited for.
fn while_it_hangs(monitor: &Monitor, api: &Api, hanging: Hanging) {
    hanging.wait();
    monitor.expect("probe: print:flushing ok");
    // An answer at all shows that the disk is not waited for: it hangs until this is over.
    for _ in 0..20 {
        assert_eq!(api.get("/")["state"], "Running");
        api.get("/vm/config");
    }
    // The guest can be stopped, and go on, whatever its disk does.
    api.patch("/vm", json!({"state": "Paused"}));
    assert_eq!(api.get("/")["state"], "Paused");
    api.patch("/vm", json!({"state": "Resumed"}));
    assert_eq!(api.get("/")["state"], "Running");
    // What needs the disk itself gets an answer too.
    let limits = json!({"ops": {"size": 1000, "refill_time": 100}});
    let update = json!({"drive_id": "disk0", "rate_limiter": limits});
    let message = api.refused("PATCH", "/drives/disk0", update);
    assert!(message.contains("busy with I/O"), "{message}");
    let update = json!({"drive_id": "disk1", "rate_limiter": limits});
    api.patch("/drives/disk1", update);
    assert!(hanging.is_waited_for(), "it did not hang all that time");
    assert!(!monitor.stdout().contains("probe: print:flushed"));
}

#[test]
fn disk_when_it_hangs_through_many_pauses_works_again_afterwards() {
    needs!(kvm, root);
    on_each_engine(|| {
        let folder = Folder::new();
        let slow = Slow::mount(&folder.join("slow"), 1 << 20);
        let mut config = probe_vm_with_disks("blkflush:0,blkread:0:0,echo", &[&slow.path()]);
        config["drives"][0]["cache_type"] = json!("Writeback");
        let hanging = slow.hang();
        let (mut monitor, api) = Monitor::boot_with_api(&folder, &config);
        let hanging = hanging;
        hanging.wait();
        // More messages than the worker's inbox has room for, an odd one first: the last that it
        // takes is a pause.
        let update = json!({"drive_id": "disk0", "rate_limiter": {"ops": null}});
        let sent: Vec<_> = std::iter::once(("/drives/disk0", update))
            .chain((0..20).map(|i| {
                let state = ["Paused", "Resumed"][i % 2];
                ("/vm", json!({"state": state}))
            }))
            .map(|(path, body)| {
                let body = body.to_string();
                let length = body.len();
                let request =
                    format!("PATCH {path} HTTP/1.1\r\nContent-Length: {length}\r\n\r\n{body}");
                let stream = api.send_with(request.as_bytes(), &[]);
                // Once this is answered, control has seen the one before it.
                api.get("/");
                stream
            })
            .collect();
        assert!(hanging.is_waited_for(), "it did not hang all that time");
        drop(hanging);
        monitor.expect("probe: echo ready");
        assert_eq!(api.get("/")["state"], "Running");
        succeeded(&monitor.stdout(), "blkflush:0");
        succeeded(&monitor.stdout(), "blkread:0:0");
        monitor.type_in("x\n");
        monitor.exits_with(0);
        drop(sent);
    });
}

#[test]
fn disk_when_its_fsync_hangs_and_the_guest_resets_it_waits_without_holding_up_the_api() {
    needs!(kvm, root);
    on_each_engine(|| {
        let folder = Folder::new();
        let slow = Slow::mount(&folder.join("slow"), 1 << 20);
        let mut config = probe_vm_with_disks("blkflush:0,blkread:0:0,echo", &[&slow.path()]);
        config["boot-source"]["boot_args"] =
            json!("probe=blkflush:0,blkread:0:0,echo patience_ms=1000");
        config["drives"][0]["cache_type"] = json!("Writeback");
        let hanging = slow.hang();
        let (mut monitor, api) = Monitor::boot_with_api(&folder, &config);
        // Moved: it is let go before the monitor is dropped, also by a panic.
        let hanging = hanging;
        hanging.wait();
        // The guest gives up and resets the device, which must be over when the write
        // of its status returns: that waits, and can be paused all the same.
        let writes = "mayfly_vcpu_exits_total{vcpu=\"0\",kind=\"mmio_write\"}";
        let before = metric(&api, writes);
        common::wait_until("the guest resets the device", || {
            metric(&api, writes) > before
        });
        for state in ["Paused", "Resumed"] {
            api.patch("/vm", json!({"state": state}));
        }
        assert_eq!(api.get("/")["state"], "Running");
        assert!(hanging.is_waited_for(), "it did not hang all that time");
        drop(hanging);
        monitor.expect("probe: echo ready");
        succeeded(&monitor.stdout(), "blkread:0:0");
        monitor.type_in("x\n");
        monitor.exits_with(0);
    });
}

#[test]
fn drive_when_patched_shows_the_guest_another_file() {
    needs!(kvm);
    let folder = Folder::new();
    let disks = [1, 2].map(|seed| folder.file(&format!("disk{seed}"), written(seed, 0, 8)));
    let mut config = probe_vm_with_disks("", &[&disks[0]]);
    shell(&mut config);
    let (mut monitor, api) = Monitor::boot_with_api(&folder, &config);
    monitor.expect("probe: shell ready");
    assert!(does(&mut monitor, "blkverify:0:0:8:1").contains(" ok "));
    api.patch(
        "/drives/disk0",
        json!({"drive_id": "disk0", "path_on_host": disks[1]}),
    );
    assert!(does(&mut monitor, "blkverify:0:0:8:2").contains(" ok "));
    let missing = json!({"drive_id": "disk0", "path_on_host": "/no/such/disk"});
    let message = api.refused("PATCH", "/drives/disk0", missing);
    assert!(message.contains("/no/such/disk"), "{message}");
    assert!(does(&mut monitor, "blkverify:0:0:4:2").contains(" ok "));
}

// Network cards

/// A guest with one card on the tap `mftap` of a namespace of its own, and a shell.
fn with_card(netns: &Netns, folder: &Folder, words: &str) -> (Monitor, Api) {
    let mut config = probe_vm(words);
    config["network-interfaces"] = json!([{
        "iface_id": "eth0",
        "host_dev_name": "mftap",
        "guest_mac": "06:00:AC:10:09:02",
    }]);
    Monitor::boot_inside(netns, folder, &config)
}

#[test]
fn card_when_pinged_answers() {
    needs!(kvm, root);
    let (netns, folder) = (Netns::new(), Folder::new());
    netns.tap("mftap", "172.16.9.1/24");
    netns.run("ip", &["link", "set", "mftap", "mtu", "9000"]);
    let (mut monitor, _) = with_card(&netns, &folder, "netinfo:0,netping:0:172.16.9.2:6");
    monitor.expect("probe: netping ready mac=06:00:ac:10:09:02");
    let ping = ["-c", "3", "-i", "0.2", "-W", "20", "172.16.9.2"];
    assert!(netns.run("ping", &ping).contains("3 received"));
    // One frame of 8 KB is four buffers of the guest's, merged.
    let large = [
        "-c",
        "3",
        "-i",
        "0.2",
        "-W",
        "20",
        "-s",
        "8000",
        "172.16.9.2",
    ];
    assert!(netns.run("ping", &large).contains("3 received"));
    monitor.exits_with(0);
    let output = monitor.stdout();
    assert!(
        line(&output, "netinfo:0").contains("mergeable=true"),
        "{output}"
    );
    assert!(
        output.contains("netping:0:172.16.9.2:6 ok 6 echoes"),
        "{output}"
    );
}

/// An EtherType that is free for experiments.
const EXPERIMENT: u16 = 0x88b5;

#[test]
fn frames_when_echoed_come_back_as_they_were() {
    needs!(kvm, root);
    // Without and with checksum and segmentation offloads.
    for option in ["", ":offload"] {
        let (netns, folder) = (Netns::new(), Folder::new());
        // The host's own frames would be echoed, and counted, too.
        let quiet = "echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6";
        netns.run("sh", &["-c", quiet]);
        netns.tap("mftap", "172.16.9.1/24");
        netns.run("ip", &["link", "set", "mftap", "mtu", "9000"]);
        let sizes: Vec<usize> = (60..1514)
            .step_by(97)
            .chain([1514, 2035, 2036, 2037, 4084, 9014])
            .collect();
        let word = format!("netecho:0:{}{option}", sizes.len());
        let (mut monitor, _) = with_card(&netns, &folder, &word);
        monitor.expect("probe: netecho ready mac=06:00:ac:10:09:02");
        let guest = [6, 0, 0xac, 0x10, 9, 2];
        netns.inside(|| {
            let mut socket = sys::frames("mftap", EXPERIMENT);
            let mut received = vec![0; 1 << 16];
            for (n, size) in (0u64..).zip(&sizes) {
                let mut frame = vec![0; *size];
                pattern::fill(n, 0, &mut frame);
                frame[..6].copy_from_slice(&guest);
                frame[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
                frame[12..14].copy_from_slice(&EXPERIMENT.to_be_bytes());
                socket.write_all(&frame).unwrap();
                let len = socket.read(&mut received).unwrap_or_else(|e| {
                    panic!(
                        "{word}: frame {n} of {size} bytes: {e}: {}",
                        monitor.stdout()
                    )
                });
                assert_eq!(received[..6], [2, 0, 0, 0, 0, 1]);
                assert_eq!(received[6..12], guest);
                assert!(received[12..len] == frame[12..], "frame of {size} bytes");
            }
        });
        monitor.exits_with(0);
        let output = monitor.stdout();
        let bytes: usize = sizes.iter().sum();
        let told = format!("frames={} bytes={bytes} ", sizes.len());
        assert!(line(&output, &word).contains(&told), "{output}");
    }
}

/// Frame number `n` of a flood: of any size, its content follows from its number.
fn flood_frame(n: u64, content: &[u8], frame: &mut Vec<u8>) {
    let size = 60 + (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as usize % (9014 - 60 + 1);
    frame.clear();
    frame.extend([6, 0, 0xac, 0x10, 9, 2, 2, 0, 0, 0, 0, 1]);
    frame.extend(EXPERIMENT.to_be_bytes());
    frame.extend(n.to_le_bytes());
    let from = n as usize % 4093;
    frame.extend(&content[from..from + size - frame.len()]);
}

/// MAYFLY_NET_MIB makes it a long run: how much goes each way, 16 MiB without it.
#[test]
fn frames_when_many_are_echoed_come_back_whole_and_in_order() {
    needs!(kvm, root);
    // So many that no buffer on the way is full: none may be lost.
    const ON_THE_WAY: u64 = 10;
    let mib = std::env::var("MAYFLY_NET_MIB").map_or(16, |mib| mib.parse().unwrap());
    let (netns, folder) = (Netns::new(), Folder::new());
    let quiet = "echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6";
    netns.run("sh", &["-c", quiet]);
    netns.tap("mftap", "172.16.9.1/24");
    netns.run("ip", &["link", "set", "mftap", "mtu", "9000"]);
    let mut content = vec![0; 9014 + 4093];
    pattern::fill(7, 0, &mut content);
    let (mut count, mut bytes, mut frame) = (0, 0, Vec::new());
    while bytes < mib << 20 {
        flood_frame(count, &content, &mut frame);
        (count, bytes) = (count + 1, bytes + frame.len());
    }
    let word = format!("netecho:0:{count}:offload");
    let (mut monitor, _) = with_card(&netns, &folder, &word);
    monitor.expect("probe: netecho ready mac=06:00:ac:10:09:02");
    netns.inside(|| {
        let mut socket = sys::frames("mftap", EXPERIMENT);
        let (mut sent, mut expected, mut received) = (0, Vec::new(), vec![0; 1 << 16]);
        for n in 0..count {
            while sent < count.min(n + ON_THE_WAY) {
                flood_frame(sent, &content, &mut frame);
                socket.write_all(&frame).unwrap();
                sent += 1;
            }
            let len = socket
                .read(&mut received)
                .unwrap_or_else(|e| panic!("frame {n} of {count}: {e}: {}", monitor.stdout()));
            flood_frame(n, &content, &mut expected);
            let (to, from) = expected[..12].split_at_mut(6);
            to.swap_with_slice(from);
            assert!(received[..len] == expected[..], "frame {n} of {count}");
        }
    });
    monitor.exits_with(0);
    let told = format!("frames={count} bytes={bytes} ");
    let output = monitor.stdout();
    assert!(line(&output, &word).contains(&told), "{output}");
}

#[test]
fn frames_when_sent_by_the_guest_all_reach_the_host() {
    needs!(kvm, root);
    let (netns, folder) = (Netns::new(), Folder::new());
    netns.tap("mftap", "172.16.9.1/24");
    let (mut monitor, _) = with_card(
        &netns,
        &folder,
        "echo,netsend:0:2000:1514,netsend:0:500:60:offload",
    );
    monitor.expect("probe: echo ready");
    let received = |netns: &Netns| -> u64 {
        let shown = netns.run("ip", &["-j", "-s", "link", "show", "mftap"]);
        let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
        shown[0]["stats64"]["rx"]["packets"].as_u64().unwrap()
    };
    let before = received(&netns);
    monitor.type_in("go\n");
    monitor.expect("probe: netsend:0:500:60:offload ok");
    monitor.exits_with(0);
    assert_eq!(received(&netns) - before, 2500);
}

#[test]
fn frames_when_sent_to_the_guest_are_counted_by_it() {
    needs!(kvm, root);
    let (netns, folder) = (Netns::new(), Folder::new());
    netns.tap("mftap", "172.16.9.1/24");
    let (mut monitor, _) = with_card(&netns, &folder, "netcount:0:300");
    monitor.expect("probe: netcount ready");
    netns.inside(|| {
        let socket = UdpSocket::bind("172.16.9.1:0").unwrap();
        socket.set_broadcast(true).unwrap();
        // More are sent than are waited for: the tap may drop some when the guest is slow.
        let deadline = Instant::now() + common::PATIENCE;
        while monitor.child.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "{}", monitor.stdout());
            for _ in 0..20 {
                let _ = socket.send_to(&[7; 1000], "172.16.9.255:9999");
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    });
    monitor.exits_with(0);
    assert!(monitor.stdout().contains("netcount:0:300 ok frames=300"));
}

#[test]
fn tap_when_missing_is_made_and_goes_with_the_monitor() {
    needs!(kvm, root);
    let (netns, folder) = (Netns::new(), Folder::new());
    let (mut monitor, api) = with_card(&netns, &folder, "netinfo:0,echo");
    monitor.expect("probe: echo ready");
    succeeded(&monitor.stdout(), "netinfo:0");
    assert!(
        netns
            .run("ip", &["link", "show", "mftap"])
            .contains("mftap")
    );
    assert_eq!(api.get("/")["state"], "Running");
    monitor.type_in("x\n");
    monitor.exits_with(0);
    assert!(!netns.run("ip", &["link"]).contains("mftap"));
}

#[test]
fn tap_when_it_was_there_stays_after_the_monitor() {
    needs!(kvm, root);
    let (netns, folder) = (Netns::new(), Folder::new());
    netns.tap("mftap", "172.16.9.1/24");
    for _ in 0..2 {
        let (mut monitor, _) = with_card(&netns, &folder, "netsend:0:10:100");
        monitor.exits_with(0);
        succeeded(&monitor.stdout(), "netsend:0:10:100");
        fs::remove_file(folder.join("api")).unwrap();
    }
    assert!(
        netns
            .run("ip", &["-4", "addr", "show", "mftap"])
            .contains("172.16.9.1")
    );
}

#[test]
fn tap_when_it_vanishes_leaves_the_guest_without_network_and_nothing_else() {
    needs!(kvm, root);
    let (netns, folder) = (Netns::new(), Folder::new());
    netns.tap("mftap", "172.16.9.1/24");
    let (mut monitor, api) = with_card(&netns, &folder, "shell");
    monitor.expect("probe: shell ready");
    assert!(does(&mut monitor, "netsend:0:10:100").contains(" ok "));
    netns.run("ip", &["link", "del", "mftap"]);
    // Frames go nowhere; the driver gets its buffers back all the same.
    assert!(does(&mut monitor, "netsend:0:1000:100").contains(" ok "));
    assert!(does(&mut monitor, "netcount:0:1:100").contains("FAILED frames=0"));
    monitor.comes_to_rest("net");
    assert_eq!(api.get("/")["state"], "Running");
    for state in ["Paused", "Resumed"] {
        api.patch("/vm", json!({"state": state}));
    }
    assert!(does(&mut monitor, "print:still:here").contains(" ok "));
    monitor.type_in("end\n");
    monitor.exits_with(0);
}

// A hostile driver

/// What the guest may make the monitor grow by, in KiB.
const GROWTH_MAX: u64 = 1024;

/// Every kind of attack on `place`, one after the other, with a look at the monitor after each.
fn survives_every_attack(
    monitor: &mut Monitor,
    api: &Api,
    folder: &Folder,
    place: &str,
    thread: &str,
) {
    monitor.expect("probe: shell ready");
    does(monitor, &format!("attack:{place}:list"));
    let output = monitor.stdout();
    let kinds: Vec<&str> = output
        .lines()
        .filter_map(|l| l.strip_prefix("probe:   "))
        .filter(|name| !name.contains(' '))
        .collect();
    assert!(kinds.len() >= 49, "{kinds:?}");
    // What is allocated on first use is no growth.
    does(monitor, &format!("attack:{place}:avail-ahead"));
    api.get("/");
    let own = monitor.own_kib();
    let begun = Instant::now();
    for kind in kinds {
        let word = format!("attack:{place}:{kind}");
        // The device works again after a reset: the word checks that itself.
        let line = does(monitor, &word);
        assert!(line.starts_with(&format!("probe: {word} ok")), "{line}");
        assert!(line.ends_with("after=works"), "{line}");
        assert!(!line.contains("WRITTEN AFTER THE RESET"), "{line}");
        assert_eq!(api.get("/")["state"], "Running", "{kind}");
        monitor.comes_to_rest(thread);
        monitor.comes_to_rest("fc_api");
    }
    monitor.comes_to_rest("mayfly");
    let grown = monitor.own_kib().saturating_sub(own);
    assert!(grown <= GROWTH_MAX, "grown by {grown} KiB");
    // 64 KiB at once, 4 KiB a second, and some for what the guest did not cause.
    let log = fs::metadata(folder.join("log")).unwrap().len();
    let limit = (80 << 10) + (4 << 10) * (begun.elapsed().as_secs() + 10);
    assert!(log <= limit, "{log} bytes of log");
    monitor.type_in("end\n");
    monitor.exits_with(0);
}

#[test]
fn disk_when_attacked_in_every_way_survives() {
    needs!(kvm);
    let folder = Folder::new();
    let disk = folder.disk("disk", 1 << 20);
    let (mut monitor, api) =
        Monitor::boot_with_api(&folder, &probe_vm_with_disks("shell", &[&disk]));
    survives_every_attack(&mut monitor, &api, &folder, "0", "block");
    assert_eq!(fs::metadata(disk).unwrap().len(), 1 << 20);
}

#[test]
fn card_when_its_transmit_queue_is_attacked_in_every_way_survives() {
    needs!(kvm, root);
    let (netns, folder) = (Netns::new(), Folder::new());
    netns.tap("mftap", "172.16.9.1/24");
    let (mut monitor, api) = with_card(&netns, &folder, "shell");
    survives_every_attack(&mut monitor, &api, &folder, "0.1", "net");
}

#[test]
fn card_when_its_receive_queue_is_attacked_in_every_way_survives() {
    needs!(kvm, root);
    let (netns, folder) = (Netns::new(), Folder::new());
    netns.tap("mftap", "172.16.9.1/24");
    // Something to receive all the while.
    let mut traffic = netns.command("ping");
    traffic.args(["-b", "-i", "0.02", "-s", "1200", "172.16.9.255"]);
    traffic
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null());
    sys::die_with_us(&mut traffic);
    let (mut monitor, api) = with_card(&netns, &folder, "shell");
    let mut traffic = traffic.spawn().unwrap();
    survives_every_attack(&mut monitor, &api, &folder, "0.0", "net");
    traffic.kill().unwrap();
    traffic.wait().unwrap();
}

#[test]
fn device_when_reset_thousands_of_times_comes_back_and_leaks_nothing() {
    needs!(kvm, root);
    let (netns, folder) = (Netns::new(), Folder::new());
    netns.tap("mftap", "172.16.9.1/24");
    let mut config = probe_vm_with_disks("shell", &[&folder.disk("disk", 1 << 20)]);
    config["network-interfaces"] = json!([{"iface_id": "eth0", "host_dev_name": "mftap"}]);
    let (mut monitor, api) = Monitor::boot_inside(&netns, &folder, &config);
    monitor.expect("probe: shell ready");
    let held = |monitor: &Monitor| {
        let proc = format!("/proc/{}", monitor.pid());
        let descriptors = fs::read_dir(format!("{proc}/fd")).unwrap().count();
        let mappings = fs::read_to_string(format!("{proc}/maps"))
            .unwrap()
            .lines()
            .count();
        (monitor.threads().len(), descriptors, mappings)
    };
    for device in 0..2 {
        let word = format!("attack:{device}:reset-storm:10");
        assert!(does(&mut monitor, &word).contains("after=works"));
    }
    api.get("/");
    monitor.comes_to_rest("fc_api");
    let before = held(&monitor);
    for device in 0..2 {
        let word = format!("attack:{device}:reset-storm:3000");
        let line = does(&mut monitor, &word);
        assert!(line.contains("after=works"), "{line}");
    }
    assert!(does(&mut monitor, "attack:0:reset-busy").contains("after=works"));
    // The API closes a client's descriptor a moment after the client is gone.
    common::wait_until("no thread and no descriptor is left over", || {
        let after = held(&monitor);
        (after.0, after.1) == (before.0, before.1)
    });
    let after = held(&monitor);
    // The kernel may split or join mappings as memory is touched.
    assert!(after.2 <= before.2 + 4, "mappings: {before:?} {after:?}");
    assert_eq!(api.get("/")["state"], "Running");
}

#[test]
fn api_when_the_guest_kicks_without_end_still_answers() {
    needs!(kvm);
    let folder = Folder::new();
    let disk = folder.disk("disk", 1 << 20);
    let config = probe_vm_with_disks("print:begun,attack:0:kick-storm:100000000", &[&disk]);
    let (mut monitor, api) = Monitor::boot_with_api(&folder, &config);
    monitor.expect("probe: print:begun ok");
    for _ in 0..30 {
        assert_eq!(api.get("/")["state"], "Running");
    }
    for (state, shown) in [("Paused", "Paused"), ("Resumed", "Running")] {
        api.patch("/vm", json!({"state": state}));
        assert_eq!(api.get("/")["state"], shown);
    }
    assert!(
        !monitor.stdout().contains("kick-storm:100000000 "),
        "it is over already"
    );
    assert!(monitor.child.try_wait().unwrap().is_none());
}

#[test]
fn log_when_the_guest_provokes_lines_without_end_stays_small() {
    needs!(kvm);
    let folder = Folder::new();
    let disk = folder.disk("disk", 1 << 20);
    // 16 broken rings each time, and a line about each of them.
    let words = ["attack:0:rings-oob"; 60].join(",");
    let begun = Instant::now();
    let mut monitor = Monitor::boot(&folder, &probe_vm_with_disks(&words, &[&disk]));
    monitor.wait_within(4 * common::PATIENCE);
    monitor.exits_with(0);
    let log = folder.read("log");
    assert!(log.contains("needs a reset"), "{log}");
    let limit = (80 << 10) + (4 << 10) * (begun.elapsed().as_secs() + 1);
    assert!((log.len() as u64) < limit, "{} bytes", log.len());
}

#[test]
fn ports_and_registers_when_touched_at_random_give_answers() {
    needs!(kvm, root);
    let (netns, folder) = (Netns::new(), Folder::new());
    netns.tap("mftap", "172.16.9.1/24");
    let disk = folder.disk("disk", 1 << 20);
    // The noise reads and writes the UART as well, so the words come from the command line.
    let words = "ports:0:64,ports:7:64,mmionoise:1:20000,mmionoise:2:20000,blkread:0:0,netinfo:1";
    let mut config = probe_vm_with_disks(words, &[&disk]);
    config["network-interfaces"] = json!([{"iface_id": "eth0", "host_dev_name": "mftap"}]);
    let (mut monitor, api) = Monitor::boot_inside(&netns, &folder, &config);
    monitor.expect("probe: ports:0:64 ok");
    assert_eq!(api.get("/")["state"], "Running");
    monitor.exits_with(0);
    let output = monitor.stdout();
    for word in words.split(',') {
        succeeded(&output, word);
    }
    assert!(!output.contains("broken="), "{output}");
    assert_eq!(monitor.stderr(), "");
}

#[test]
fn disk_when_its_image_is_replaced_under_its_name_stays_the_one_it_was() {
    needs!(kvm);
    let folder = Folder::new();
    let disk = folder.file("disk", written(1, 0, 8));
    let mut config = probe_vm_with_disks("", &[&disk]);
    shell(&mut config);
    let (mut monitor, _) = Monitor::boot_with_api(&folder, &config);
    monitor.expect("probe: shell ready");
    let old = File::open(&disk).unwrap();
    fs::rename(folder.file("new", written(2, 0, 8)), &disk).unwrap();
    assert!(does(&mut monitor, "blkverify:0:0:8:1").contains(" ok "));
    assert!(does(&mut monitor, "blkwrite:0:0:8:3").contains(" ok "));
    let mut bytes = vec![0; 4096];
    old.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == written(3, 0, 8));
    assert!(fs::read(&disk).unwrap() == written(2, 0, 8));
}
