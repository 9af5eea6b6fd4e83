//! Diffs and forks of the probe guest, with disk requests under way: what is in an image, and that a
//! fork's parent and its children never see each other's writes.

mod common;
#[path = "snapshot/pair.rs"]
mod pair;

use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::fuse::Slow;
use common::{Api, Folder, Monitor, needs, probe_vm, probe_vm_with_disks, sys};
use pair::{Pair, assert_same, await_disk, pause, resume, snapshot_tool};
use probe_host::pattern;
use serde_json::{Value, json};

/// Size of the disks.
const DISK: usize = 4 << 20;

/// A disk whose sectors are all different, and other ones for another seed.
fn patterned(folder: &Folder, name: &str, seed: u64) -> PathBuf {
    let mut bytes = vec![0; DISK];
    pattern::fill(seed, 0, &mut bytes);
    folder.file(name, bytes)
}

/// A guest that reads its disk at random into a few pages of memory, slowly, and nothing else: but for
/// rings, only the monitor writes to guest memory. When it has done so, a shell.
fn reader(disk: &Path) -> Value {
    let words = "fill:4:1,blkbench:0:4096:2500:16:randread,shell";
    let mut config = probe_vm_with_disks(words, &[disk]);
    config["drives"][0]["rate_limiter"] = json!({"ops": {"size": 100, "refill_time": 500}});
    config
}

/// Lets the disk be as fast as it can.
fn hurry(api: &Api) {
    let limit = json!({"ops": {"size": 0, "refill_time": 0}});
    api.patch(
        "/drives/disk0",
        json!({"drive_id": "disk0", "rate_limiter": limit}),
    );
}

/// That the guest's reads all end well.
fn reads_end_well(monitor: &Monitor) {
    let output = monitor.expect("shell ready");
    assert!(output.contains("randread ok iops="), "{output}");
}

#[test]
fn diffs_when_ten_are_merged_equal_a_full_snapshot() {
    needs!(kvm);
    let folder = Folder::new();
    let disk = patterned(&folder, "disk", 5);
    let mut config = reader(&disk);
    config["machine-config"]["track_dirty_pages"] = json!(true);
    let (monitor, api) = Monitor::boot_with_api(&folder, &config);
    await_disk(&api, "read", 50);
    pause(&api);
    let base = Pair::new(&folder, "base");
    api.put("/snapshot/create", base.create("Full"));
    let mut diffs = Vec::new();
    for number in 0..10 {
        resume(&api);
        await_disk(&api, "read", 20);
        pause(&api);
        let diff = Pair::new(&folder, &format!("diff{number}"));
        api.put("/snapshot/create", diff.create("Diff"));
        diffs.push(diff);
    }
    let full = Pair::new(&folder, "full");
    api.put("/snapshot/create", full.create("Full"));
    assert!(!monitor.stdout().contains("blkbench"), "it has ended");
    drop(monitor);

    // A diff holds a small part, and says what it is applied to.
    let mut parent = base.header()["id"].clone();
    for diff in &diffs {
        let header = diff.header();
        assert_eq!(header["kind"], "Diff");
        assert_eq!(header["parent"], parent);
        parent = header["id"].clone();
        let (len, blocks) = sizes(&diff.memory);
        assert!(blocks < len / 4, "{blocks} of {len}");
    }
    // What changed between the first and the last is what the disk put there.
    assert!(base.memory() != full.memory());

    let merged = Pair::new(&folder, "merged");
    let mut args = vec![Path::new("merge"), &base.state, &base.memory];
    args.extend(diffs.iter().flat_map(|diff| [&*diff.state, &*diff.memory]));
    args.extend([Path::new("-o"), &merged.state, &merged.memory]);
    snapshot_tool(&args);
    assert_same(&merged.memory(), &full.memory());
    snapshot_tool(&[Path::new("verify"), &merged.state, &merged.memory]);
    snapshot_tool(&[Path::new("verify"), &full.state, &full.memory]);

    // What was merged goes on, and tracks further.
    let own = Folder::new();
    let (mut monitor, api) = merged.restore(&own, json!({"track_dirty_pages": true}));
    hurry(&api);
    reads_end_well(&monitor);
    monitor.type_in("check:4:1\nfill:1:6\n");
    monitor.expect("fill:1:6 ok");
    assert!(
        monitor.stdout().contains("check:4:1 ok"),
        "{}",
        monitor.stdout()
    );
    pause(&api);
    let next = Pair::new(&folder, "next");
    api.put("/snapshot/create", next.create("Diff"));
    assert_eq!(next.header()["parent"], merged.header()["id"]);
    let whole = Pair::new(&folder, "whole");
    api.put("/snapshot/create", whole.create("Full"));
    snapshot_tool(&[
        Path::new("merge"),
        &merged.state,
        &merged.memory,
        &next.state,
        &next.memory,
        Path::new("-o"),
        &merged.state,
        &merged.memory,
    ]);
    assert_same(&merged.memory(), &whole.memory());
}

/// As Firecracker does it, which puts what has changed into a memory file that is there.
#[test]
fn diff_when_written_in_place_of_its_base_is_whole() {
    needs!(kvm);
    let folder = Folder::new();
    let mut config = probe_vm("fill:4:1,shell");
    config["machine-config"]["track_dirty_pages"] = json!(true);
    let at = Folder::new();
    let (mut monitor, api) = Monitor::boot_with_api(&at, &config);
    monitor.expect("shell ready");
    let pair = Pair::new(&folder, "snapshot");
    pause(&api);
    api.put("/snapshot/create", pair.create("Full"));
    for seed in [2, 3] {
        resume(&api);
        monitor.type_in(&format!("fill:1:{seed}\n"));
        monitor.expect(&format!("fill:1:{seed} ok"));
        pause(&api);
        api.put("/snapshot/create", pair.create("Diff"));
        assert_eq!(pair.header()["kind"], "Full");
        let own = Folder::new();
        let (mut child, _api) = pair.restore(&own, json!({}));
        child.type_in(&format!("check:1:{seed}\n"));
        child.expect(&format!("check:1:{seed} ok"));
    }
    // Elsewhere it is a diff to what is there now.
    resume(&api);
    pause(&api);
    let next = Pair::new(&folder, "next");
    api.put("/snapshot/create", next.create("Diff"));
    let [base, next] = [pair, next].map(|pair| pair.header());
    assert_eq!(
        [&next["kind"], &next["parent"]],
        [&json!("Diff"), &base["id"]]
    );
}

/// A guest that is over does not take its snapshot with it.
#[test]
fn fork_when_the_guest_ends_while_it_is_written_is_completed() {
    needs!(kvm, root);
    let own = std::thread::spawn(|| {
        let folder = Folder::new();
        let slow = Slow::mount(&folder.join("slow"), 0);
        let (mut monitor, api) = Monitor::boot_with_api(&folder, &probe_vm("fill:4:1,shell"));
        monitor.expect("shell ready");
        let pair = Pair {
            state: folder.join("state"),
            memory: slow.path(),
        };
        let memory = File::options()
            .read(true)
            .write(true)
            .open(slow.path())
            .unwrap();
        let hanging = slow.hang();
        let body = json!({
            "snapshot_type": "Fork", "snapshot_path": pair.state, "mem_file_path": {"fd": 0},
        })
        .to_string();
        let length = body.len();
        let request =
            format!("PUT /snapshot/create HTTP/1.1\r\nContent-Length: {length}\r\n\r\n{body}");
        let mut asked = api.send_with(request.as_bytes(), &[memory.as_fd()]);
        hanging.wait();
        monitor.type_in("end\n");
        monitor.expect("shell ok");
        // More than what is waited for at an end otherwise.
        std::thread::sleep(Duration::from_secs(5));
        assert!(hanging.is_waited_for(), "it was given up");
        drop(hanging);
        let (status, answer) = common::read_response(&mut asked);
        assert_eq!(status, 204, "{answer}");
        monitor.exits_with(0);
        let own = Folder::new();
        let (mut child, _api) = pair.restore(&own, json!({}));
        writes_for_itself(&mut child, 1, 9);
        drop(child);
        drop((memory, slow));
    });
    own.join().unwrap_or_else(|e| std::panic::resume_unwind(e));
}

/// Bytes that a file has, and that it takes.
fn sizes(path: &Path) -> (u64, u64) {
    use std::os::unix::fs::MetadataExt;
    let metadata = path.metadata().unwrap();
    (metadata.len(), metadata.blocks() * 512)
}

/// The memory of a fork, which comes by a socket.
fn fork(api: &Api, state: &Path) -> File {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let body = json!({
        "snapshot_type": "Fork",
        "snapshot_path": state,
        "mem_file_path": {"fd": 0},
    });
    api.put_with("/snapshot/create", body, &[theirs.as_fd()]);
    drop(theirs);
    sys::receive_with(&ours, &mut [0]).1.into()
}

/// The receiver has gone, or takes no more: what was there before is what children can be made of.
#[test]
fn fork_when_its_memory_cannot_be_passed_leaves_the_old_state() {
    needs!(kvm);
    let folder = Folder::new();
    let state = folder.join("state");
    let mut config = probe_vm("touch,shell");
    config["machine-config"]["memory_backend"] = json!("shared");
    let (_parent, api) = Monitor::boot_with_api(&folder, &config);
    let first = fork(&api, &state);
    let old = std::fs::read(&state).unwrap();
    let body = json!({
        "snapshot_type": "Fork",
        "snapshot_path": state,
        "mem_file_path": {"fd": 0},
    });
    let (ours, theirs) = UnixStream::pair().unwrap();
    drop(ours);
    let fds = [theirs.as_fd()];
    let (status, answer) = api.request_with("PUT", "/snapshot/create", &body.to_string(), &fds);
    assert_eq!(status, 400, "{answer}");
    assert!(answer.contains("Cannot pass the memory: "), "{answer}");
    assert!(std::fs::read(&state).unwrap() == old);
    let own = Folder::new();
    let (_child, child_api) = Monitor::unconfigured(&own);
    let load = json!({
        "snapshot_path": state,
        "mem_backend": {"backend_type": "File", "backend_path": {"fd": 0}},
    });
    child_api.put_with("/snapshot/load", load, &[first.as_fd()]);
    // And the parent can be forked again.
    fork(&api, &state);
}

fn content(mut file: &File) -> Vec<u8> {
    let mut bytes = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

/// A child of a fork, with a disk of its own.
fn child(own: &Folder, state: &Path, memory: &File, disk: &Path) -> (Monitor, Api) {
    let (monitor, api) = Monitor::unconfigured(own);
    let body = json!({
        "snapshot_path": state,
        "mem_backend": {"backend_type": "File", "backend_path": {"fd": 0}},
        "drive_overrides": [{"drive_id": "disk0", "path_on_host": disk}],
        "resume_vm": true,
    });
    api.put_with("/snapshot/load", body, &[memory.as_fd()]);
    (monitor, api)
}

/// Whether a guest has the pattern that it wrote, and can write another.
fn writes_for_itself(monitor: &mut Monitor, was: u64, becomes: u64) {
    monitor.type_in(&format!("check:4:{was}\nfill:4:{becomes}\n"));
    let output = monitor.expect(&format!("fill:4:{becomes} ok"));
    assert!(output.contains(&format!("check:4:{was} ok")), "{output}");
}

fn has(monitor: &mut Monitor, seed: u64, disk: u64) {
    let word = format!("blkverify:0:0:{}:{disk}", DISK / 512);
    monitor.type_in(&format!("check:4:{seed}\n{word}\nprint:then-{seed}\n"));
    let output = monitor.expect(&format!("print:then-{seed} ok"));
    assert!(output.contains(&format!("check:4:{seed} ok")), "{output}");
    assert!(output.contains(&format!("{word} ok")), "{output}");
}

/// Both read their disks, of different content, into the same guest addresses at the same time.
#[test]
fn fork_when_both_go_on_neither_sees_what_the_other_writes() {
    needs!(kvm);
    let folder = Folder::new();
    for engine in ["Sync", "Async"] {
        let disk = patterned(&folder, "disk", 5);
        let mut config = reader(&disk);
        config["machine-config"]["memory_backend"] = json!("shared");
        config["drives"][0]["io_engine"] = json!(engine);
        let at = Folder::new();
        let (mut parent, api) = Monitor::boot_with_api(&at, &config);
        await_disk(&api, "read", 50);
        let state = folder.join("first");
        let memory = fork(&api, &state);
        assert_eq!(api.get("/")["state"], "Running");
        assert!(!parent.stdout().contains("blkbench"), "it has ended");
        let frozen = content(&memory);
        let owns = [Folder::new(), Folder::new()];
        let mut children: Vec<_> = (0u64..)
            .zip(&owns)
            .map(|(number, own)| {
                let disk = patterned(own, "disk", 6 + number);
                child(own, &state, &memory, &disk)
            })
            .collect();
        // At the same time.
        for api in children.iter().map(|(_, api)| api).chain([&api]) {
            await_disk(api, "read", 20);
            hurry(api);
        }
        reads_end_well(&parent);
        writes_for_itself(&mut parent, 1, 2);
        for (number, (child, _)) in (0..).zip(&mut children) {
            reads_end_well(child);
            writes_for_itself(child, 1, 10 + number);
        }
        has(&mut parent, 2, 5);
        for (number, (child, _)) in (0..).zip(&mut children) {
            has(child, 10 + number, 6 + number);
        }
        assert_same(&content(&memory), &frozen);
        drop(children);

        // A second and a third fork of the same parent hold what it has by then; the first is as it was.
        for (number, seed) in [(2, 2), (3, 20)] {
            let state = folder.join(&format!("fork{number}"));
            parent.type_in(&format!("fill:4:{seed}\n"));
            parent.expect(&format!("fill:4:{seed} ok"));
            let memory = fork(&api, &state);
            parent.type_in("fill:4:90\n");
            let own = Folder::new();
            let disk = patterned(&own, "disk", 7);
            let (mut child, child_api) = child(&own, &state, &memory, &disk);
            has(&mut child, seed, 7);
            // A child that was restored is forked too.
            let state = folder.join("grandchild");
            let memory = fork(&child_api, &state);
            child.type_in("fill:4:91\n");
            child.expect("fill:4:91 ok");
            let below = Folder::new();
            let (mut grandchild, _) = self::child(&below, &state, &memory, &disk);
            has(&mut grandchild, seed, 7);
            has(&mut child, 91, 7);
        }
        let own = Folder::new();
        let disk = patterned(&own, "disk", 8);
        let (child, child_api) = child(&own, &state, &memory, &disk);
        hurry(&child_api);
        reads_end_well(&child);
        assert_same(&content(&memory), &frozen);
        has(&mut parent, 90, 5);
    }
}

/// To a file, of a guest that is paused, and one that runs; with memory that is not shared too.
#[test]
fn fork_when_written_to_a_file_is_a_snapshot_like_others() {
    needs!(kvm);
    for backend in ["shared", "private"] {
        let folder = Folder::new();
        let disk = patterned(&folder, "disk", 5);
        let mut config = probe_vm_with_disks("fill:4:1,shell", &[&disk]);
        if backend == "shared" {
            config["machine-config"]["memory_backend"] = json!(backend);
        }
        let at = Folder::new();
        let (mut monitor, api) = Monitor::boot_with_api(&at, &config);
        monitor.expect("shell ready");
        let running = Pair::new(&folder, "running");
        api.put("/snapshot/create", running.create("Fork"));
        assert_eq!(api.get("/")["state"], "Running");
        writes_for_itself(&mut monitor, 1, 2);
        pause(&api);
        let paused = Pair::new(&folder, "paused");
        api.put("/snapshot/create", paused.create("Fork"));
        assert_eq!(api.get("/")["state"], "Paused");
        // Nothing has run between them.
        let full = Pair::new(&folder, "full");
        api.put("/snapshot/create", full.create("Full"));
        assert_same(&paused.memory(), &full.memory());
        resume(&api);
        writes_for_itself(&mut monitor, 2, 3);
        for (pair, seed) in [(running, 1), (paused, 2)] {
            assert_eq!(pair.header()["kind"], "Fork");
            snapshot_tool(&[Path::new("verify"), &pair.state, &pair.memory]);
            let own = Folder::new();
            let (mut child, _) = pair.restore(&own, json!({}));
            writes_for_itself(&mut child, seed, 9);
        }
        monitor.type_in("check:4:3\n");
        monitor.expect("check:4:3 ok");
    }
}
