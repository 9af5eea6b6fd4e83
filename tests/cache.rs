//! `"cache": "none"`: disks that go past the host's page cache.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use common::{Api, Folder, Monitor, needs, probe_vm, probe_vm_with_disks, sys};
use probe_host::pattern;
use serde_json::{Value, json};

fn drive(path: &Path) -> Value {
    json!({"drive_id": "d", "path_on_host": path, "is_root_device": false, "cache": "none"})
}

#[test]
fn cache_none_when_it_cannot_be_is_refused_with_the_name_of_the_disk() {
    needs!(root);
    let own = thread::spawn(|| {
        let folder = Folder::new();
        let memory = folder.join("memory");
        fs::create_dir(&memory).unwrap();
        sys::own_mounts();
        sys::mount("ramfs", &memory, "");
        let (good, bad) = (folder.disk("disk", 1 << 20), memory.join("disk"));
        fs::write(&bad, [0; 4096]).unwrap();
        let (mut monitor, api) = Monitor::unconfigured(&folder);
        let why = api.refused("PUT", "/drives/d", drive(&bad));
        assert!(
            why.contains(&format!("The disk `{}` cannot be used", bad.display())),
            "{why}"
        );
        assert!(why.contains("Leave `cache` out"), "{why}");
        let mut layered = drive(&good);
        layered["overlay"] = json!({"memory": true});
        let why = api.refused("PUT", "/drives/d", layered);
        assert!(why.contains("`d` has an overlay"), "{why}");
        // What was refused leaves the way free, and what is taken is shown.
        api.put("/drives/d", drive(&good));
        let shown = &api.get("/vm/config")["drives"][0];
        assert_eq!(shown["cache"], "none");
        assert_eq!(shown["cache_type"], "Unsafe");
        monitor.child.kill().unwrap();
        monitor.wait();
        fs::remove_file(folder.join("api")).unwrap();
        refused_while_it_runs(&folder, &good, &bad);
    });
    own.join().unwrap();
}

fn refused_while_it_runs(folder: &Folder, good: &Path, bad: &Path) {
    needs!(kvm);
    let mut config = probe_vm("hlt");
    config["drives"] = json!([drive(good)]);
    let (_monitor, api) = Monitor::boot_with_api(folder, &config);
    let update = |path: &Path| json!({"drive_id": "d", "path_on_host": path});
    let why = api.refused("PATCH", "/drives/d", update(bad));
    assert!(why.contains("cannot be used with"), "{why}");
    let other = folder.disk("other", 1 << 20);
    api.patch("/drives/d", update(&other));
}

/// Pages of a file that are in the host's page cache.
fn cached(path: &Path) -> u64 {
    let mut run = Command::new("fincore");
    let output = run.args(["-n", "-o", "PAGES"]).arg(path).output().unwrap();
    String::from_utf8(output.stdout)
        .unwrap()
        .trim()
        .parse()
        .unwrap()
}

#[test]
fn disk_when_the_cache_is_gone_past_leaves_nothing_in_it() {
    needs!(kvm, "fincore");
    let folder = Folder::new();
    for mode in ["Writeback", "none"] {
        let disk = folder.disk(mode, 8 << 20);
        let words = "blkload:0:randrw:4096:8:200:check,blkload:0:randrw:64k:8:50:check";
        let mut config = probe_vm_with_disks(words, &[&disk]);
        match mode {
            "none" => config["drives"][0]["cache"] = json!("none"),
            other => config["drives"][0]["cache_type"] = json!(other),
        }
        let mut monitor = Monitor::boot(&folder, &config);
        monitor.exits_with(0);
        let pages = cached(&disk);
        match mode {
            "none" if is_memory(&folder) => {
                needs::skip(
                    "disk_when_the_cache_is_gone_past",
                    "the folder is in memory",
                );
            }
            "none" => assert_eq!(pages, 0),
            _ => assert_ne!(pages, 0),
        }
    }
}

fn is_memory(folder: &Folder) -> bool {
    let run = Command::new("stat")
        .args(["-f", "-c", "%T"])
        .arg(folder.path())
        .output();
    String::from_utf8(run.unwrap().stdout).unwrap().trim() == "tmpfs"
}

/// A block device over a file, for as long as this lasts.
struct Loop(PathBuf);

impl Loop {
    fn over(file: &Path, block: &str) -> Option<Self> {
        let args = ["--find", "--show", "--sector-size", block];
        let output = Command::new("losetup")
            .args(args)
            .arg(file)
            .output()
            .unwrap();
        let name = String::from_utf8(output.stdout).unwrap();
        output.status.success().then(|| Loop(name.trim().into()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.0).status();
    }
}

#[test]
fn block_device_when_asked_at_random_is_what_the_model_says() {
    needs!(kvm, root, "losetup");
    let folder = Folder::new();
    for (seed, (block, mode)) in
        (1..).zip([("512", "none"), ("4096", "none"), ("512", "Writeback")])
    {
        let file = folder.disk("file", 4 << 20);
        let Some(device) = Loop::over(&file, block) else {
            needs::skip("block_device_when_asked_at_random", "no loop devices");
            return;
        };
        let word = format!("blkfuzz:0:{seed}:2000:32");
        let mut config = probe_vm_with_disks(&word, &[&device.0]);
        match mode {
            "none" => config["drives"][0]["cache"] = json!("none"),
            other => config["drives"][0]["cache_type"] = json!(other),
        }
        let mut monitor = Monitor::boot(&folder, &config);
        monitor.exits_with(0);
        let output = monitor.stdout();
        let host = pattern::sum(pattern::SUM_START, &fs::read(&device.0).unwrap());
        assert!(
            output.contains(&format!("sum={host:016x}")),
            "{block}, {mode}: {output}"
        );
    }
}

#[test]
fn descriptor_when_passed_is_read_and_written_past_the_cache() {
    needs!(kvm);
    let folder = Folder::new();
    let disk = folder.disk("disk", 4 << 20);
    let (mut monitor, api): (Monitor, Api) = Monitor::unconfigured(&folder);
    let config = probe_vm("blkfuzz:0:5:500:8");
    api.put("/machine-config", config["machine-config"].clone());
    api.put("/boot-source", config["boot-source"].clone());
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open(&disk)
        .unwrap();
    let mut passed = drive(&disk);
    passed["path_on_host"] = json!({"fd": 0});
    api.put_with("/drives/d", passed, &[std::os::fd::AsFd::as_fd(&file)]);
    api.put("/actions", json!({"action_type": "InstanceStart"}));
    monitor.exits_with(0);
    let host = pattern::sum(pattern::SUM_START, &fs::read(&disk).unwrap());
    let output = monitor.stdout();
    assert!(output.contains(&format!("sum={host:016x}")), "{output}");
}
