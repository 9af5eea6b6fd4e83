//! What the bare-metal guest proves about disks and network interfaces at volume: random requests against a model, every
//! mode, size and depth, flushed writes after kill -9, and frames both ways.
//!
//! Short runs by default. `MAYFLY_KILLS=100` kills so many monitors, `MAYFLY_FRAMES_MIB=10240` sends so much both ways,
//! `MAYFLY_REQUESTS=1000000` makes so many random requests; `MAYFLY_SEED` repeats a run.

mod common;

use std::fs;
use std::io::{Read, Write};
use std::path::Path;

use common::{Folder, Monitor, Netns, needs, probe_vm, probe_vm_with_disks, sys};
use probe_host::{epochs, pattern};
use serde_json::{Value, json};

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| {
        text.parse()
            .unwrap_or_else(|_| panic!("{name} is no number"))
    })
}

/// What a drive has of a mode by name: with "none" the host's page cache is gone past.
fn caching(mode: &str) -> Value {
    match mode {
        "none" => json!({ "cache": "none" }),
        other => json!({ "cache_type": other }),
    }
}

/// Says the seed, so that a run can be repeated.
fn seed() -> u64 {
    let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap();
    let seed = number("MAYFLY_SEED", now.as_nanos() as u64 & 0xffff_ffff);
    eprintln!("MAYFLY_SEED={seed}");
    seed
}

/// Boots a guest with one disk, and lets it do one word to the end; what the word said.
fn done(folder: &Folder, word: &str, disk: &Path, more: Value) -> String {
    let mut monitor = Monitor::boot(folder, &with_disk(word, disk, more));
    monitor.exits_with(0);
    let output = monitor.stdout();
    let start = format!("probe: {word} ok ");
    match output.lines().find_map(|line| line.strip_prefix(&start)) {
        Some(said) => said.to_owned(),
        None => panic!("{word}: {output}"),
    }
}

fn with_disk(words: &str, disk: &Path, more: Value) -> Value {
    let mut config = probe_vm_with_disks(words, &[disk]);
    for (key, value) in more.as_object().unwrap() {
        config["drives"][0][key] = value.clone();
    }
    config
}

fn field<'a>(said: &'a str, key: &str) -> &'a str {
    said.split_whitespace()
        .find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
        .unwrap_or_else(|| panic!("no {key} in {said}"))
}

#[test]
fn disk_when_asked_at_random_is_what_the_model_says() {
    needs!(kvm);
    let seed = seed();
    let requests = number("MAYFLY_REQUESTS", 3000);
    let folder = Folder::new();
    for (round, (depth, cache, option)) in (0..).zip([
        (1, "Unsafe", ""),
        (8, "Writeback", ""),
        (64, "Unsafe", ":framed"),
        (64, "Writeback", ""),
        (1, "none", ""),
        (64, "none", ":framed"),
    ]) {
        let disk = folder.disk("disk", (4 << 20) + 512 * round);
        let word = format!("blkfuzz:0:{}:{requests}:{depth}{option}", seed + round);
        let said = done(&folder, &word, &disk, caching(cache));
        let host = pattern::sum(pattern::SUM_START, &fs::read(&disk).unwrap());
        assert_eq!(
            field(&said, "sum"),
            format!("{host:016x}"),
            "{word}: {said}"
        );
        assert_ne!(field(&said, "writes"), "0", "{word}: {said}");
        if cache != "Unsafe" {
            assert_ne!(field(&said, "flushes"), "0", "{word}: {said}");
        }
    }
}

#[test]
fn disk_when_used_in_every_mode_size_and_depth_gives_back_what_was_written() {
    needs!(kvm);
    let folder = Folder::new();
    let disk = folder.disk("disk", 32 << 20);
    for size in ["512", "4096", "64k", "128k", "1m"] {
        let mut words = String::new();
        for depth in [1, 8, 32, 128] {
            for option in ["", ":pieces", ":interrupts"] {
                words.push_str(&format!(
                    "blkload:0:randrw:{size}:{depth}:20:check{option},"
                ));
            }
        }
        let mut config = with_disk(&words, &disk, json!({}));
        config["machine-config"]["mem_size_mib"] = json!(512);
        // A read is of what was written before now and then, which a busy host may not come to in one run.
        let has_checked = (0..10).any(|_| {
            let mut monitor = Monitor::boot(&folder, &config);
            monitor.exits_with(0);
            let output = monitor.stdout();
            let said: Vec<_> = output.lines().filter(|l| l.contains(" ok ")).collect();
            assert_eq!(said.len(), 12, "{output}");
            let checked = said
                .iter()
                .map(|l| field(l, "checked").parse::<u64>().unwrap());
            checked.sum::<u64>() > 0
        });
        assert!(has_checked, "{size}");
    }
}

#[test]
fn disk_when_its_monitor_is_killed_holds_all_that_was_flushed() {
    needs!(kvm);
    let seed = seed();
    let folder = Folder::new();
    for kill in 0..number("MAYFLY_KILLS", 4) {
        let random = |place, end| pattern::word(seed + kill, place) % end;
        let (writes, depth) = (1 + random(0, 100), 1 + random(1, 64));
        let cache = ["Unsafe", "Writeback", "none"][random(2, 3) as usize];
        let disk = folder.disk("disk", (4 + random(3, 8)) << 20);
        let before = fs::read(&disk).unwrap();
        let word = format!("blkepochs:0:{}:{writes}:{depth}", seed + kill);
        let config = with_disk(&word, &disk, caching(cache));
        let mut monitor = Monitor::boot(&folder, &config);
        monitor.expect(&format!("flushed {}\r\n", 1 + random(4, 30)));
        // Anywhere in what follows.
        std::thread::sleep(std::time::Duration::from_micros(random(5, 20_000)));
        monitor.child.kill().unwrap();
        monitor.wait();
        let flushed = last_flushed(&monitor.stdout());
        let disk = fs::read(&disk).unwrap();
        let found = epochs::check(&disk, &before, (seed + kill, writes), flushed)
            .unwrap_or_else(|error| panic!("{word}, cache {cache}: {error}"));
        assert!(found.flushed > 0, "{word}: {found:?}");
    }
}

/// The last epoch that a whole line says was flushed.
fn last_flushed(output: &str) -> u64 {
    output
        .rsplit("\r\n")
        .skip(1)
        .find_map(|line| line.strip_prefix("probe:   flushed ")?.parse().ok())
        .unwrap_or(0)
}

const EXPERIMENT: u16 = 0x88b5;
/// Frames on their way at the same time: as many as the socket holds.
const WINDOW: u64 = 8;

#[test]
fn frames_when_many_go_both_ways_come_back_as_they_were() {
    needs!(kvm, root);
    let seed = seed();
    let wanted = number("MAYFLY_FRAMES_MIB", 64) << 20;
    let (netns, folder) = (Netns::new(), Folder::new());
    let quiet = "echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6";
    netns.run("sh", &["-c", quiet]);
    netns.tap("mftap", "172.16.9.1/24");
    netns.run("ip", &["link", "set", "mftap", "mtu", "9000"]);
    let mut config = probe_vm("netecho:0::offload");
    config["network-interfaces"] = json!([{ "iface_id": "eth0", "host_dev_name": "mftap" }]);
    let (monitor, _) = Monitor::boot_inside(&netns, &folder, &config);
    monitor.expect("probe: netecho ready");
    let size = |n: u64| 60 + (pattern::word(seed, n) % 8955) as usize;
    let frame = |n: u64| {
        let mut frame = vec![0; size(n)];
        pattern::fill(seed ^ n, 0, &mut frame);
        frame[..6].copy_from_slice(&[0xff; 6]);
        frame[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
        frame[12..14].copy_from_slice(&EXPERIMENT.to_be_bytes());
        frame
    };
    netns.inside(|| {
        let mut socket = sys::frames("mftap", EXPERIMENT);
        let mut received = vec![0; 1 << 14];
        let (mut sent, mut come, mut bytes) = (0, 0, 0);
        while bytes < wanted {
            while sent - come < WINDOW {
                socket.write_all(&frame(sent)).unwrap();
                sent += 1;
            }
            let len = socket
                .read(&mut received)
                .unwrap_or_else(|e| panic!("frame {come}: {e}: {}", monitor.stdout()));
            let sent = frame(come);
            assert!(received[12..len] == sent[12..], "frame {come}, {len} bytes");
            come += 1;
            bytes += 2 * len as u64;
        }
        eprintln!("{come} frames, {bytes} bytes both ways");
    });
}
