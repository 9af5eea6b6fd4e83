//! Disks with an overlay, with real guests: what is written stays out of the base, which many share; a reset; what is
//! refused; snapshots and clones; and monitors that are killed while the guest writes.

mod common;
#[path = "snapshot/pair.rs"]
mod pair;

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use common::fuse::Slow;
use common::{Api, Folder, Monitor, needs, probe_vm_with_disks, wait_until};
use mayfly::overlay::{BaseId, Content, Durability, Overlay, Place, Storage};
use pair::{Pair, pause, resume, save_and_end};
use probe_host::{epochs, pattern};
use serde_json::{Value, json};

/// Sectors of a base.
const SECTORS: u64 = 4096;

/// A base with the pattern of `seed`, as the probe's `blkwrite` leaves it.
fn base(folder: &Folder, seed: u64) -> PathBuf {
    let mut bytes = vec![0; SECTORS as usize * 512];
    pattern::fill(seed, 0, &mut bytes);
    folder.file("base", bytes)
}

/// A machine with the disk `base` under `overlay`.
fn machine(words: &str, base: &Path, overlay: Value) -> Value {
    let mut config = probe_vm_with_disks(words, &[base]);
    config["drives"][0]["overlay"] = overlay;
    config
}

fn in_file(path: &Path) -> Value {
    json!({"path_on_host": path})
}

/// Bytes of storage that a file takes.
fn space(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

/// What a guest would see of a disk, by the format of its overlay; the bytes of the base come along.
fn seen(base: &Path, overlay: &Path) -> (Vec<u8>, Vec<u8>) {
    let before = fs::read(base).unwrap();
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(overlay)
        .unwrap();
    let base = File::open(base).unwrap();
    let metadata = base.metadata().unwrap();
    let modified = (metadata.mtime(), metadata.mtime_nsec() as u32);
    let id = BaseId::of(&base, metadata.len(), modified).unwrap();
    let content = Content::open(&file, &id, [0; 16]).unwrap();
    let overlay = Overlay::load(Arc::new(file), &content, Durability::Immediate).unwrap();
    let mut disk = before.clone();
    let (mut at, len) = (0, disk.len() as u64);
    while at < len {
        let (place, count) = overlay.locate(at, len - at);
        let part = &mut disk[at as usize..(at + count) as usize];
        match place {
            Place::Base => {}
            Place::Zero => part.fill(0),
            Place::File(from) => Storage::read_exact_at(overlay.file(), part, from).unwrap(),
        }
        at += count;
    }
    (disk, before)
}

/// Types words, waits until all have been done, and tells what the guest has said so far. Each must have succeeded.
fn does(monitor: &mut Monitor, words: &[&str]) -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let mark = format!("print:{}", COUNT.fetch_add(1, Ordering::Relaxed));
    monitor.type_in(&format!("{}\n{mark}\n", words.join("\n")));
    let said = monitor.expect(&format!("probe: {mark} ok"));
    for word in words {
        assert!(
            said.contains(&format!("probe: {word} ok")),
            "{word}: {said}"
        );
    }
    assert!(!said.contains("FAILED"), "{said}");
    said
}

/// A monitor whose guest waits for words.
fn boot(folder: &Folder, config: &Value) -> (Monitor, Api) {
    let (monitor, api) = Monitor::boot_with_api(folder, config);
    monitor.expect("shell ready");
    (monitor, api)
}

fn ends(monitor: &mut Monitor) {
    monitor.type_in("reset\n");
    monitor.exits_with(0);
}

#[test]
fn writes_when_there_is_an_overlay_stay_out_of_the_base_that_others_read() {
    needs!(kvm);
    for cache in ["Unsafe", "Writeback"] {
        let (folder, second) = (Folder::new(), Folder::new());
        let base = base(&folder, 1);
        let before = fs::read(&base).unwrap();
        let started = |place: &Folder, overlay: Value| {
            let mut config = machine("shell", &base, overlay);
            config["drives"][0]["cache_type"] = json!(cache);
            boot(place, &config).0
        };
        let overlays = [in_file(&folder.join("overlay")), json!({"memory": true})];
        let [first_overlay, other_overlay] = &overlays;
        let mut first = started(&folder, first_overlay.clone());
        let mut other = started(&second, other_overlay.clone());
        for (monitor, seed) in [(&mut first, 2), (&mut other, 3)] {
            does(
                monitor,
                &[
                    "blkverify:0:0:4096:1",
                    // Whole units; a part of one; parts of two; the end of the disk.
                    &format!("blkwrite:0:8:16:{seed}"),
                    &format!("blkwrite:0:35:2:{seed}"),
                    &format!("blkwrite:0:70:20:{seed}"),
                    &format!("blkwrite:0:4090:6:{seed}"),
                    &format!("blkverify:0:8:16:{seed}"),
                    &format!("blkverify:0:70:20:{seed}"),
                    "blkverify:0:0:8:1",
                    "blkverify:0:24:11:1",
                    "blkverify:0:37:33:1",
                    &format!("blkverify:0:35:2:{seed}"),
                    "blkverify:0:90:4000:1",
                    &format!("blkverify:0:4090:6:{seed}"),
                    "blkflush:0",
                ][..if cache == "Writeback" { 14 } else { 13 }],
            );
        }
        ends(&mut first);
        ends(&mut other);
        assert!(fs::read(&base).unwrap() == before);
        // It is all there for the next.
        let third = Folder::new();
        let mut again = started(&third, in_file(&folder.join("overlay")));
        does(
            &mut again,
            &[
                "blkverify:0:8:16:2",
                "blkverify:0:35:2:2",
                "blkverify:0:37:33:1",
            ],
        );
        ends(&mut again);
        assert!(space(&folder.join("overlay")) < 200 << 10);
    }
}

#[test]
fn overlay_when_reset_while_paused_is_what_its_base_is() {
    needs!(kvm);
    for (cache, is_memory) in [("Unsafe", false), ("Writeback", false), ("Unsafe", true)] {
        let folder = Folder::new();
        let base = base(&folder, 1);
        let overlay = folder.join("overlay");
        let place = if is_memory {
            json!({"memory": true})
        } else {
            in_file(&overlay)
        };
        let mut config = machine("shell", &base, place);
        config["drives"][0]["cache_type"] = json!(cache);
        let (mut monitor, api) = boot(&folder, &config);
        let reset = json!({"drive_id": "disk0", "reset_overlay": true});
        let refused = api.refused("PATCH", "/drives/disk0", reset.clone());
        assert!(refused.contains("pause it first"), "{refused}");
        // Several times: the parts of the file take turns.
        for seed in 2..6 {
            let write = format!("blkwrite:0:0:2048:{seed}");
            let verify = format!("blkverify:0:0:2048:{seed}");
            does(&mut monitor, &["blkverify:0:0:4096:1", &write, &verify]);
            if !is_memory {
                assert!(space(&overlay) >= 1 << 20);
            }
            pause(&api);
            api.patch("/drives/disk0", reset.clone());
            resume(&api);
        }
        // The answer does not wait for the space.
        if !is_memory {
            wait_until("the space is given back", || space(&overlay) < 200 << 10);
        }
        does(&mut monitor, &["blkverify:0:0:4096:1", "blkwrite:0:9:1:7"]);
        if cache == "Writeback" {
            // Only that promises that the write is there.
            does(&mut monitor, &["blkflush:0"]);
        }
        ends(&mut monitor);
        if !is_memory {
            let (disk, before) = seen(&base, &overlay);
            let mut expected = before;
            pattern::fill(7, 9, &mut expected[9 * 512..10 * 512]);
            assert!(disk == expected);
        }
    }
}

#[test]
fn space_when_discarded_is_given_back_and_reads_as_zeros() {
    needs!(kvm);
    let folder = Folder::new();
    let base = base(&folder, 1);
    let overlay = folder.join("overlay");
    let config = machine("shell", &base, in_file(&overlay));
    let (mut monitor, _) = boot(&folder, &config);
    let said = does(&mut monitor, &["blkinfo:0"]);
    assert!(said.contains("discard=true zeroes=true"), "{said}");
    does(
        &mut monitor,
        &["blkwrite:0:0:2048:2", "blkverify:0:0:2048:2"],
    );
    let full = space(&overlay);
    does(
        &mut monitor,
        &[
            "blkdiscard:0:8:1024",
            "blkzero:0:1100:500",
            "blkzero:0:3000:17",
        ],
    );
    let less = space(&overlay);
    assert!(less + (480 << 10) < full, "{less} of {full}");
    does(
        &mut monitor,
        &[
            "blkverify:0:0:8:2",
            "blkverify:0:1032:68:2",
            "blkverify:0:1600:448:2",
        ],
    );
    ends(&mut monitor);
    let (disk, before) = seen(&base, &overlay);
    let mut expected = before;
    pattern::fill(2, 0, &mut expected[..2048 * 512]);
    // A unit that was discarded shows nothing of the base, either.
    for (sector, count) in [(8, 1024), (1100, 500), (3000, 17)] {
        expected[sector * 512..(sector + count) * 512].fill(0);
    }
    assert!(disk == expected);
}

#[test]
fn requests_when_random_do_what_a_model_of_the_disk_says() {
    needs!(kvm);
    let seed = seed();
    for place in ["file", "memory"] {
        for cache in ["Unsafe", "Writeback"] {
            let folder = Folder::new();
            let base = base(&folder, 1);
            let before = fs::read(&base).unwrap();
            let overlay = match place {
                "file" => in_file(&folder.join("overlay")),
                _ => json!({"memory": true}),
            };
            let words = format!("blkfuzz:0:{seed}:3000:8,reset");
            let mut config = machine(&words, &base, overlay);
            config["drives"][0]["cache_type"] = json!(cache);
            let mut monitor = Monitor::boot(&folder, &config);
            monitor.exits_with(0);
            let said = monitor.stdout();
            assert!(
                said.contains("blkfuzz") && !said.contains("FAILED"),
                "seed {seed}: {said}"
            );
            assert!(fs::read(&base).unwrap() == before);
        }
    }
}

fn seed() -> u64 {
    let given = std::env::var("MAYFLY_TEST_SEED").ok();
    given.map_or_else(
        || {
            SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap()
                .subsec_nanos()
                .into()
        },
        |text| text.parse().expect("MAYFLY_TEST_SEED is a number"),
    )
}

#[test]
fn file_when_it_is_not_an_overlay_of_this_base_is_refused_and_left_alone() {
    needs!(kvm);
    let folder = Folder::new();
    let base = base(&folder, 1);
    let overlay = folder.join("overlay");
    let (mut monitor, _) = boot(&folder, &machine("shell", &base, in_file(&overlay)));
    does(&mut monitor, &["blkwrite:0:0:64:2"]);
    let place = Folder::new();
    let (busy, api) = Monitor::unconfigured(&place);
    let refused = |base: &Path, overlay: Value| {
        let drive = json!({
            "drive_id": "a", "path_on_host": base, "is_root_device": false, "overlay": overlay,
        });
        api.refused("PUT", "/drives/a", drive)
    };
    let said = refused(&base, in_file(&overlay));
    assert!(said.contains("is in use by another process"), "{said}");
    ends(&mut monitor);

    let good = fs::read(&overlay).unwrap();
    let mut other_bytes = fs::read(&base).unwrap();
    other_bytes[1024] ^= 1;
    let other = folder.file("other", &other_bytes);
    let short = folder.file("short", &other_bytes[..1 << 20]);
    for (base, words) in [
        (&other, "belongs to another base"),
        (&short, "belongs to a disk of"),
    ] {
        let said = refused(base, in_file(&overlay));
        assert!(said.contains(words), "{said}");
    }
    let altered = folder.join("altered");
    for (at, words) in [
        (0, "is not an overlay"),
        (8, "is an overlay of version"),
        (24, "is damaged: its header"),
        (4096, "is damaged: its map"),
        (4096 + 16, "is damaged: its map"),
    ] {
        let mut bytes = good.clone();
        bytes[at] ^= 0x40;
        fs::write(&altered, &bytes).unwrap();
        let said = refused_or_at_start(&api, &base, &altered);
        assert!(said.contains(words), "{at}: {said}");
        assert!(fs::read(&altered).unwrap() == bytes, "{at}");
    }
    for len in [good.len() - 4096, 4096, 100] {
        fs::write(&altered, &good[..len]).unwrap();
        let said = refused(&base, in_file(&altered));
        assert!(
            said.contains("cut off") || said.contains("is not an overlay"),
            "{said}"
        );
    }
    let folder_path = folder.path().to_owned();
    let said = refused(&base, in_file(&folder_path));
    assert!(
        said.contains("Drive config error: Opening the overlay"),
        "{said}"
    );
    let said = refused(&base, in_file(Path::new("/dev/null")));
    assert!(said.contains("is a character device"), "{said}");
    let drive = json!({
        "drive_id": "a", "path_on_host": base, "is_root_device": false, "is_read_only": true,
        "overlay": {"memory": true},
    });
    let said = api.refused("PUT", "/drives/a", drive);
    assert!(
        said.contains("has an overlay") && said.contains("read-only"),
        "{said}"
    );
    drop(busy);
}

/// A damaged map is found when it is read, at the start.
fn refused_or_at_start(api: &Api, base: &Path, overlay: &Path) -> String {
    let drive = json!({
        "drive_id": "a", "path_on_host": base, "is_root_device": false, "overlay": in_file(overlay),
    });
    let (status, body) = api.request("PUT", "/drives/a", &drive.to_string());
    if status == 400 {
        return body;
    }
    let boot = json!({"kernel_image_path": common::probe(), "boot_args": "probe=stay"});
    api.put("/boot-source", boot);
    api.refused("PUT", "/actions", json!({"action_type": "InstanceStart"}))
}

#[test]
fn overlay_when_refused_leaves_no_file_that_was_made_for_it() {
    let folder = Folder::new();
    let base = folder.disk("base", (2 << 40) + 4096);
    let (overlay, own) = (folder.join("overlay"), folder.disk("own", 0));
    let (_monitor, api) = Monitor::unconfigured(&folder);
    for path in [&overlay, &own] {
        let drive = json!({"drive_id": "d", "path_on_host": base, "is_root_device": false, "overlay": in_file(path)});
        let why = api.refused("PUT", "/drives/d", drive);
        assert!(why.contains("cannot be made"), "{why}");
    }
    assert!(!overlay.exists());
    assert!(own.exists());
}

#[test]
fn drive_when_put_again_keeps_its_overlay_and_shows_it() {
    needs!(kvm);
    let folder = Folder::new();
    let base = base(&folder, 1);
    let overlay = folder.join("overlay");
    let (monitor, api) = Monitor::unconfigured(&folder);
    let drive = machine("stay", &base, in_file(&overlay))["drives"][0].clone();
    api.put("/drives/disk0", drive.clone());
    api.put("/drives/disk0", drive.clone());
    assert_eq!(
        api.get("/vm/config")["drives"][0]["overlay"],
        in_file(&overlay)
    );
    // Of another drive's it is kept.
    let mut other = drive.clone();
    other["drive_id"] = json!("disk1");
    let said = api.refused("PUT", "/drives/disk1", other);
    assert!(said.contains("is in use"), "{said}");
    // Passed, as in a jail.
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(folder.join("passed"));
    let mut passed = drive.clone();
    passed["overlay"] = json!({"fd": 0});
    api.put_with("/drives/disk0", passed, &[file.unwrap().as_fd()]);
    assert_eq!(
        api.get("/vm/config")["drives"][0]["overlay"]["path_on_host"]["fd"],
        0
    );
    let mut plain = drive;
    plain.as_object_mut().unwrap().remove("overlay");
    api.put("/drives/disk0", plain);
    assert!(api.get("/vm/config")["drives"][0].get("overlay").is_none());
    api.put(
        "/boot-source",
        json!({"kernel_image_path": common::probe(), "boot_args": "probe=shell"}),
    );
    api.put("/actions", json!({"action_type": "InstanceStart"}));
    monitor.expect("shell ready");
    let patch = json!({"drive_id": "disk0", "reset_overlay": true});
    pause(&api);
    let said = api.refused("PATCH", "/drives/disk0", patch);
    assert!(said.contains("has no overlay"), "{said}");
}

#[test]
fn disk_of_an_overlay_when_changed_is_refused() {
    needs!(kvm);
    let folder = Folder::new();
    let base = base(&folder, 1);
    let config = machine("shell", &base, json!({"memory": true}));
    let (_monitor, api) = boot(&folder, &config);
    let said = api.refused(
        "PATCH",
        "/drives/disk0",
        json!({"drive_id": "disk0", "path_on_host": base}),
    );
    assert!(said.contains("has an overlay"), "{said}");
    pause(&api);
    let said = api.refused(
        "PUT",
        "/snapshot/create",
        Pair::new(&folder, "s").create("Full"),
    );
    assert!(said.contains("is in memory"), "{said}");
}

#[test]
fn clones_when_each_has_a_copy_of_the_overlay_go_on_where_the_guest_was() {
    needs!(kvm);
    for cache in ["Unsafe", "Writeback"] {
        let folder = Folder::new();
        let base = base(&folder, 1);
        let overlay = folder.join("overlay");
        let mut config = machine("shell", &base, in_file(&overlay));
        config["drives"][0]["cache_type"] = json!(cache);
        let (mut monitor, api) = boot(&folder, &config);
        // Not flushed: the snapshot has it all the same.
        does(&mut monitor, &["blkwrite:0:3:100:2"]);
        let pair = Pair::new(&folder, "snapshot");
        save_and_end(monitor, &api, &pair);

        // Another overlay does not do, nor one of memory.
        for wrong in [in_file(&folder.join("new")), json!({"memory": true})] {
            let place = Folder::new();
            let (_monitor, api) = Monitor::unconfigured(&place);
            let drives = json!({"drive_overrides": [{"drive_id": "disk0", "overlay": wrong}]});
            let said = api.refused("PUT", "/snapshot/load", pair.resume(drives));
            assert!(
                said.contains("what its guest wrote is in an overlay"),
                "{said}"
            );
        }
        let mut clones: Vec<_> = (10..14)
            .map(|seed| {
                let own = Folder::new();
                let copy = own.join("copy");
                fs::copy(&overlay, &copy).unwrap();
                let drives =
                    json!({"drive_overrides": [{"drive_id": "disk0", "overlay": in_file(&copy)}]});
                let (monitor, _) = pair.restore(&own, drives);
                (seed, monitor, own)
            })
            .collect();
        for (seed, monitor, _own) in &mut clones {
            does(
                monitor,
                &[
                    "blkverify:0:3:100:2",
                    &format!("blkwrite:0:50:500:{seed}"),
                    &format!("blkverify:0:50:500:{seed}"),
                    "blkverify:0:600:1000:1",
                ],
            );
        }
        for (seed, monitor, _own) in &mut clones {
            does(monitor, &[&format!("blkverify:0:50:500:{seed}")]);
        }
        // And where it was, with nothing said.
        drop(clones);
        let place = Folder::new();
        let (mut monitor, _) = pair.restore(&place, json!({}));
        does(&mut monitor, &["blkverify:0:3:100:2"]);
    }
}

#[test]
fn load_when_it_fails_late_gives_its_disks_free_for_the_next() {
    needs!(kvm);
    let folder = Folder::new();
    let base = base(&folder, 1);
    let mut config = probe_vm_with_disks("shell", &[&base, &base]);
    for (drive, name) in ["one", "two"].into_iter().enumerate() {
        config["drives"][drive]["overlay"] = in_file(&folder.join(name));
    }
    let (mut monitor, api) = boot(&folder, &config);
    does(&mut monitor, &["blkwrite:0:3:100:2", "blkwrite:1:3:100:4"]);
    let pair = Pair::new(&folder, "snapshot");
    save_and_end(monitor, &api, &pair);

    let place = Folder::new();
    let (mut monitor, api) = Monitor::unconfigured(&place);
    let wrong = in_file(&folder.join("new"));
    let drives = json!({"drive_overrides": [{"drive_id": "disk0", "overlay": wrong}]});
    let said = api.refused("PUT", "/snapshot/load", pair.resume(drives));
    assert!(
        said.contains("what its guest wrote is in an overlay"),
        "{said}"
    );
    // Nothing of it is left.
    assert_eq!(api.get("/vm/config")["drives"], json!([]));
    api.put("/snapshot/load", pair.resume(json!({})));
    does(
        &mut monitor,
        &["blkverify:0:3:100:2", "blkverify:1:3:100:4"],
    );
}

/// By the virtio specification, 1.2, 5.2.6.2: what a driver that knows no flush has written is stable when it is told.
#[test]
fn writes_of_a_driver_without_flushes_are_there_after_a_kill() {
    needs!(kvm);
    let folder = Folder::new();
    let base = base(&folder, 1);
    let overlay = folder.join("overlay");
    let mut config = machine("shell", &base, in_file(&overlay));
    config["drives"][0]["cache_type"] = json!("Writeback");
    let (mut monitor, _) = boot(&folder, &config);
    does(&mut monitor, &["blkplain:0:3:100:2"]);
    monitor.child.kill().unwrap();
    monitor.child.wait().unwrap();
    let own = Folder::new();
    let config = machine("shell", &base, in_file(&overlay));
    let (mut monitor, _) = boot(&own, &config);
    does(&mut monitor, &["blkverify:0:3:100:2"]);
}

#[test]
fn clones_when_a_plain_disk_becomes_their_base_share_it() {
    needs!(kvm);
    let folder = Folder::new();
    let base = base(&folder, 1);
    let mut config = probe_vm_with_disks("shell", &[&base]);
    config["drives"][0]["cache_type"] = json!("Writeback");
    let (mut monitor, api) = boot(&folder, &config);
    does(&mut monitor, &["blkwrite:0:3:100:2"]);
    let pair = Pair::new(&folder, "snapshot");
    save_and_end(monitor, &api, &pair);
    let before = fs::read(&base).unwrap();
    let mut clones: Vec<_> = (10..14)
        .map(|seed| {
            let own = Folder::new();
            let overlay = match seed % 2 {
                0 => in_file(&own.join("overlay")),
                _ => json!({"memory": true}),
            };
            let drives = json!({"drive_overrides": [{"drive_id": "disk0", "overlay": overlay}]});
            let (monitor, api) = pair.restore(&own, drives);
            assert_eq!(api.get("/vm/config")["drives"][0]["overlay"], overlay);
            (seed, monitor, own)
        })
        .collect();
    for (seed, monitor, _own) in &mut clones {
        let (write, verify) = (
            format!("blkwrite:0:0:64:{seed}"),
            format!("blkverify:0:0:64:{seed}"),
        );
        does(
            monitor,
            &["blkverify:0:3:100:2", &write, "blkflush:0", &verify],
        );
    }
    for (seed, monitor, _own) in &mut clones {
        does(
            monitor,
            &[&format!("blkverify:0:0:64:{seed}"), "blkverify:0:64:39:2"],
        );
    }
    drop(clones);
    assert!(fs::read(&base).unwrap() == before);
}

/// Without a flush: as on a disk that is a plain file.
#[test]
fn writes_when_the_monitor_ends_in_order_are_all_there_at_the_next_start() {
    needs!(kvm);
    type End = fn(&mut Monitor, &Api);
    let ends: [(&str, End); 6] = [
        ("reset", |monitor, _| ends(monitor)),
        ("poweroff", |monitor, _| {
            monitor.type_in("poweroff\n");
            monitor.exits_with(0);
        }),
        ("Ctrl-Alt-Del", |monitor, api| {
            monitor.type_in("kbd:4:60000\nreset\n");
            monitor.expect("probe: kbd ready");
            api.put("/actions", json!({"action_type": "SendCtrlAltDel"}));
            monitor.exits_with(0);
            assert!(monitor.stdout().contains("probe: kbd 0x71"));
        }),
        ("triple", |monitor, _| {
            monitor.type_in("triple\n");
            monitor.wait();
        }),
        ("SIGTERM", |monitor, _| {
            common::sys::kill(monitor.pid(), libc::SIGTERM);
            assert_eq!(monitor.wait().signal(), Some(libc::SIGTERM));
        }),
        ("paused, SIGTERM", |monitor, api| {
            api.patch("/vm", json!({"state": "Paused"}));
            common::sys::kill(monitor.pid(), libc::SIGTERM);
            assert_eq!(monitor.wait().signal(), Some(libc::SIGTERM));
        }),
    ];
    for (seed, (name, end)) in (40..).zip(ends) {
        let folder = Folder::new();
        let base = base(&folder, 1);
        let overlay = folder.join("overlay");
        let mut config = machine("shell", &base, in_file(&overlay));
        config["drives"][0]["cache_type"] = json!("Writeback");
        let (mut monitor, api) = boot(&folder, &config);
        does(
            &mut monitor,
            &[&format!("blkwrite:0:8:64:{seed}"), "blkzero:0:800:16"],
        );
        end(&mut monitor, &api);
        let (disk, before) = seen(&base, &overlay);
        let mut expected = before;
        pattern::fill(seed, 8, &mut expected[8 * 512..72 * 512]);
        expected[800 * 512..816 * 512].fill(0);
        assert!(disk == expected, "{name}");
    }
}

/// A disk that never answers keeps the end from being a clean one, and not from coming. (The process is there until what
/// it asked of the file system is answered: that is the kernel's rule.)
#[test]
fn end_when_the_disk_of_an_overlay_hangs_comes_all_the_same_and_is_told() {
    needs!(kvm, root);
    // The disk is mounted for one thread and what it starts.
    let own = thread::spawn(|| {
        for is_flushing in [true, false] {
            let folder = Folder::new();
            let base = base(&folder, 1);
            // The file system of the test cannot make one.
            let made = folder.join("made");
            let config = |overlay: &Path| {
                let mut config = machine("shell", &base, in_file(overlay));
                config["drives"][0]["cache_type"] = json!("Writeback");
                config
            };
            let mut monitor = Monitor::boot(&folder, &config(&made));
            monitor.expect("shell ready");
            does(&mut monitor, &["blkwrite:0:0:8:2"]);
            ends(&mut monitor);
            let place = Folder::new();
            let slow = Slow::mount_with(&place.join("slow"), fs::read(&made).unwrap());
            let mut monitor = Monitor::boot(&place, &config(&slow.path()));
            monitor.expect("shell ready");
            does(&mut monitor, &["blkverify:0:0:8:2", "blkwrite:0:0:8:3"]);
            let hanging = slow.hang();
            if is_flushing {
                monitor.type_in("blkflush:0\n");
                hanging.wait();
            }
            common::sys::kill(monitor.pid(), libc::SIGTERM);
            hanging.wait();
            wait_until("the log tells of the disk", || {
                place
                    .read("log")
                    .contains("The disk `disk0` does not answer")
            });
            assert!(hanging.is_waited_for(), "it did not hang all that time");
            drop(hanging);
            assert_eq!(monitor.wait().signal(), Some(libc::SIGTERM));
            drop(slow);
        }
    });
    own.join().unwrap_or_else(|e| std::panic::resume_unwind(e));
}

/// Kills monitors at random moments while their guests write, and looks at what is left: all that was flushed, or all
/// that was complete where no flush is offered. `MAYFLY_KILLS` is how many, of both kinds together.
#[test]
fn overlay_when_its_monitor_is_killed_has_all_that_was_flushed() {
    needs!(kvm);
    let kills: u64 = std::env::var("MAYFLY_KILLS").map_or(6, |text| text.parse().unwrap());
    let seed = seed();
    let mut found = epochs::Found::default();
    let mut flushes = 0;
    for cache in ["Unsafe", "Writeback"] {
        let folder = Folder::new();
        let base = base(&folder, 1);
        let untouched = fs::read(&base).unwrap();
        let overlay = folder.join("overlay");
        let mut before = untouched.clone();
        for kill in 0..kills.div_ceil(2) {
            let seed = seed + kill;
            let writes = 1 + pattern::word(seed, 1) % 12;
            let words = format!("blkepochs:0:{seed}:{writes}:4");
            let mut config = machine(&words, &base, in_file(&overlay));
            config["drives"][0]["cache_type"] = json!(cache);
            let mut monitor = Monitor::boot(&folder, &config);
            let last = 1 + pattern::word(seed, 2) % 20;
            monitor.expect(&format!("flushed {last}"));
            thread::sleep(Duration::from_micros(pattern::word(seed, 3) % 3000));
            monitor.child.kill().unwrap();
            monitor.child.wait().unwrap();
            let said = monitor.stdout();
            // The last line may be half of one; what was waited for has been seen in any case.
            let whole = said.rfind('\n').map_or("", |end| &said[..end]);
            let epoch = whole
                .lines()
                .filter_map(|line| line.rsplit_once("flushed ")?.1.trim().parse::<u64>().ok())
                .max()
                .map_or(last, |epoch| epoch.max(last));
            flushes += epoch;
            let (disk, base_now) = seen(&base, &overlay);
            assert!(base_now == untouched);
            let is = epochs::check(&disk, &before, (seed, writes), epoch)
                .unwrap_or_else(|wrong| panic!("{cache}, kill {kill}, seed {seed}: {wrong}"));
            found.flushed += is.flushed;
            found.later += is.later;
            before = disk;
        }
    }
    println!("{kills} kills after {flushes} flushes: {found:?}");
    assert!(found.flushed > 0);
}
