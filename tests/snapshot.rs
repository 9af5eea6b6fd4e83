//! Snapshots of the probe guest: taken, loaded, resumed; with other disks and networks than before; and
//! what is refused.

mod common;
#[path = "snapshot/pair.rs"]
mod pair;

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::symlink;
use std::path::Path;

use common::{Api, Folder, Monitor, Netns, needs, probe_vm, probe_vm_with_disks};
use pair::{Pair, await_disk, pause, resume, save_and_end};
use probe_host::pattern;
use serde_json::{Value, json};

/// The pattern of the probe's word `blkwrite`, from sector 0.
fn patterned(folder: &Folder, name: &str, seed: u64) -> std::path::PathBuf {
    let mut bytes = vec![0; 1 << 20];
    pattern::fill(seed, 0, &mut bytes);
    folder.file(name, bytes)
}

/// A guest that counts, with one or two vCPUs: what it has written until it is paused, and what its
/// restored self writes after that, are the numbers in order, with no byte lost or doubled.
#[test]
fn guest_when_restored_goes_on_where_it_was() {
    needs!(kvm);
    for (words, vcpus) in [("count", 1), ("smp,count", 2)] {
        let (folder, other) = (Folder::new(), Folder::new());
        let mut config = probe_vm(words);
        config["machine-config"]["vcpu_count"] = json!(vcpus);
        let (monitor, api) = Monitor::boot_with_api(&folder, &config);
        monitor.expect("probe: count 2 at");
        pause(&api);
        let before = monitor.stays_paused(&api, vcpus);
        let pair = Pair::new(&folder, "snapshot");
        api.put("/snapshot/create", pair.create("Full"));
        drop((monitor, api));

        let (monitor, api) = Monitor::unconfigured(&other);
        api.put("/snapshot/load", pair.load());
        assert_eq!(api.get("/")["state"], "Paused");
        assert_eq!(monitor.stays_paused(&api, vcpus), "");
        resume(&api);
        let last = before.matches("probe: count").count() + 3;
        let after = monitor.expect(&format!("probe: count {last} at"));
        let all = before + &after;
        let counts = all.lines().filter(|line| line.contains("count "));
        let counts: Vec<_> = counts.collect();
        assert!(counts.len() > last, "{all}");
        for (number, line) in counts.iter().take(last).enumerate() {
            let start = format!("probe: count {number} at ");
            assert!(line.starts_with(&start), "{line:?} in {all}");
            assert!(line.ends_with(" us"), "{line:?} in {all}");
        }
    }
}

#[test]
fn guest_when_restored_has_its_memory_console_and_disk() {
    needs!(kvm);
    let (folder, other) = (Folder::new(), Folder::new());
    let disk = patterned(&folder, "disk", 1);
    let config = probe_vm_with_disks("fill:4:7,shell", &[&disk]);
    let (monitor, api) = Monitor::boot_with_api(&folder, &config);
    monitor.expect("shell ready");
    let before = api.get("/vm/config");
    let pair = Pair::new(&folder, "snapshot");
    save_and_end(monitor, &api, &pair);

    let (mut monitor, api) = pair.restore(&other, json!({}));
    assert_eq!(api.get("/")["state"], "Running");
    assert_eq!(api.get("/vm/config"), before);
    monitor.type_in(
        "check:4:7\nblkverify:0:0:2048:1\nblkwrite:0:8:64:2\nblkverify:0:8:64:2\nprint:done\n",
    );
    let output = monitor.expect("probe: print:done ok");
    assert!(output.contains("probe: check:4:7 ok"), "{output}");
    assert!(!output.contains("FAILED"), "{output}");
    monitor.type_in("reset\n");
    monitor.exits_with(0);
    let mut expected = vec![0; 64 * 512];
    pattern::fill(2, 8, &mut expected);
    let written = fs::read(&disk).unwrap();
    assert!(written[8 * 512..72 * 512] == expected[..]);
}

/// A disk with requests under way: none is lost, or the guest would wait for ever, and each is done.
#[test]
fn disk_when_in_use_goes_on_after_a_restore() {
    needs!(kvm);
    for engine in ["Sync", "Async"] {
        let (folder, other) = (Folder::new(), Folder::new());
        let disk = patterned(&folder, "disk", 1);
        let mut config = probe_vm_with_disks("blkbench:0:4096:4000:16:randwrite,shell", &[&disk]);
        // So that the pause comes in the middle of it.
        config["drives"][0]["rate_limiter"] = json!({"ops": {"size": 200, "refill_time": 100}});
        config["drives"][0]["io_engine"] = json!(engine);
        let (monitor, api) = Monitor::boot_with_api(&folder, &config);
        await_disk(&api, "write", 50);
        let copy = folder.join("copy");
        let pair = Pair::new(&folder, "snapshot");
        pause(&api);
        assert!(!monitor.stdout().contains("blkbench"));
        api.put("/snapshot/create", pair.create("Full"));
        fs::copy(&disk, &copy).unwrap();
        drop(monitor);

        let drives = json!({"drive_overrides": [{"drive_id": "disk0", "path_on_host": copy}]});
        let (mut monitor, api) = pair.restore(&other, drives);
        await_disk(&api, "write", 50);
        let faster =
            json!({"drive_id": "disk0", "rate_limiter": {"ops": {"size": 0, "refill_time": 0}}});
        api.patch("/drives/disk0", faster);
        let output = monitor.expect("shell ready");
        assert!(output.contains("randwrite ok iops="), "{output}");
        monitor.type_in("blkwrite:0:0:64:9\nblkverify:0:0:64:9\nreset\n");
        monitor.exits_with(0);
        let output = monitor.stdout();
        assert!(output.contains("blkverify:0:0:64:9 ok"), "{output}");
    }
}

#[test]
fn clones_when_many_at_once_have_a_disk_each() {
    needs!(kvm);
    let folder = Folder::new();
    let disk = patterned(&folder, "disk", 1);
    let config = probe_vm_with_disks("fill:4:3,shell", &[&disk]);
    let (monitor, api) = Monitor::boot_with_api(&folder, &config);
    monitor.expect("shell ready");
    let pair = Pair::new(&folder, "snapshot");
    save_and_end(monitor, &api, &pair);
    fs::remove_file(&disk).unwrap();

    let mut clones: Vec<_> = (10..18u64)
        .map(|seed| {
            let own = Folder::new();
            let disk = patterned(&own, "disk", seed);
            let drive = match seed % 2 {
                0 => json!({"drive_id": "disk0", "path_on_host": disk}),
                _ => json!({"drive_id": "disk0", "path_on_host": {"fd": 0}}),
            };
            let (mut monitor, api) = Monitor::unconfigured(&own);
            let body = pair.resume(json!({"drive_overrides": [drive]}));
            let disk = File::options().read(true).write(true).open(disk).unwrap();
            match seed % 2 {
                0 => api.put("/snapshot/load", body),
                _ => api.put_with("/snapshot/load", body, &[disk.as_fd()]),
            }
            monitor.type_in(&format!("blkverify:0:0:2048:{seed}\nfill:4:{seed}\n"));
            (seed, own, monitor)
        })
        .collect();
    for (seed, _own, monitor) in &mut clones {
        monitor.expect(&format!("blkverify:0:0:2048:{seed} ok"));
        monitor.type_in(&format!("check:4:{seed}\n"));
        monitor.expect(&format!("check:4:{seed} ok"));
    }
}

#[test]
fn network_when_overridden_goes_on_by_another_tap() {
    needs!(kvm, root, tun);
    let (folder, other) = (Folder::new(), Folder::new());
    let (before, after) = (Netns::new(), Netns::new());
    before.tap("mfone", "172.16.9.1/24");
    after.tap("mftwo", "172.16.9.1/24");
    let answers = |netns: &Netns| {
        common::wait_until("the guest answers", || {
            let mut ping = netns.command("ping");
            ping.args(["-c", "1", "-W", "1", "172.16.9.2"]);
            ping.output().unwrap().status.success()
        });
    };
    let mut config = probe_vm("netping:0:172.16.9.2");
    config["network-interfaces"] =
        json!([{"iface_id": "eth0", "host_dev_name": "mfone", "guest_mac": "06:00:AC:10:09:02"}]);
    let (monitor, api) = Monitor::boot_inside(&before, &folder, &config);
    answers(&before);
    let pair = Pair::new(&folder, "snapshot");
    save_and_end(monitor, &api, &pair);

    let mut command = after.command(common::mayfly());
    command.arg("--api-sock").arg(other.join("api"));
    let monitor = Monitor::spawn(command);
    let api = Api::at(other.join("api"));
    let override_ = json!([{"iface_id": "eth0", "host_dev_name": "mftwo"}]);
    let body = pair.resume(json!({"network_overrides": override_}));
    api.put("/snapshot/load", body);
    answers(&after);
    let config = api.get("/vm/config");
    assert_eq!(config["network-interfaces"][0]["host_dev_name"], "mftwo");
    drop(monitor);
}

/// A tap has one holder: a load takes it over from the configuration that it replaces.
#[test]
fn tap_when_the_configuration_before_holds_it_is_taken_over_by_a_load() {
    needs!(kvm, root, tun);
    let (folder, other) = (Folder::new(), Folder::new());
    let netns = Netns::new();
    netns.tap("mfone", "172.16.9.1/24");
    let mut config = probe_vm("netping:0:172.16.9.2");
    config["network-interfaces"] =
        json!([{"iface_id": "eth0", "host_dev_name": "mfone", "guest_mac": "06:00:AC:10:09:02"}]);
    let (monitor, api) = Monitor::boot_inside(&netns, &folder, &config);
    let pair = Pair::new(&folder, "snapshot");
    save_and_end(monitor, &api, &pair);

    let mut command = netns.command(common::mayfly());
    command.arg("--api-sock").arg(other.join("api"));
    let _monitor = Monitor::spawn(command);
    let api = Api::at(other.join("api"));
    api.put("/vm", config);
    api.put("/vm", json!({"snapshot": pair.resume(json!({}))}));
    assert_eq!(api.get("/")["state"], "Running");
}

#[test]
fn snapshot_when_in_descriptors_or_behind_links_is_taken_and_loaded() {
    needs!(kvm);
    let folder = Folder::new();
    let (monitor, api) = Monitor::boot_with_api(&folder, &probe_vm("fill:4:7,shell"));
    monitor.expect("shell ready");
    pause(&api);

    // Into descriptors, and from them.
    let pair = Pair::new(&folder, "fd");
    let open = |path: &Path| {
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false);
        options.open(path).unwrap()
    };
    let (state, memory) = (open(&pair.state), open(&pair.memory));
    let body = json!({"snapshot_path": {"fd": 0}, "mem_file_path": {"fd": 1}});
    api.put_with("/snapshot/create", body, &[state.as_fd(), memory.as_fd()]);
    let checked = |mut monitor: Monitor| {
        monitor.type_in("check:4:7\n");
        monitor.expect("check:4:7 ok");
    };
    let other = Folder::new();
    let (restored, other_api) = Monitor::unconfigured(&other);
    let body = json!({
        "snapshot_path": {"fd": 1},
        "mem_backend": {"backend_type": "File", "backend_path": {"fd": 0}},
        "resume_vm": true,
    });
    other_api.put_with("/snapshot/load", body, &[memory.as_fd(), state.as_fd()]);
    checked(restored);
    let own = Folder::new();
    checked(pair.restore(&own, json!({})).0);

    // Through a link to a folder, and over a link to a file: the link stays.
    fs::create_dir(folder.join("there")).unwrap();
    symlink("there", folder.join("link")).unwrap();
    symlink("elsewhere", folder.join("there/memory")).unwrap();
    let pair = Pair {
        state: folder.join("link/state"),
        memory: folder.join("link/memory"),
    };
    for _ in 0..2 {
        api.put("/snapshot/create", pair.create("Full"));
    }
    assert!(folder.join("there/memory").is_symlink());
    assert!(folder.join("there/elsewhere").is_file());
    let own = Folder::new();
    checked(pair.restore(&own, json!({})).0);

    // By the command line: a folder.
    let log = folder.join("log-2");
    let args = [
        Path::new("--no-api"),
        Path::new("--snapshot"),
        &folder.join("link"),
    ];
    let more = [Path::new("--log-path"), &log];
    checked(Monitor::start(
        args.iter().chain(&more).map(|arg| arg.as_os_str()),
    ));
    // What was interrupted or made on the way is not left behind.
    let left: Vec<_> = [folder.path().to_owned(), folder.join("there")]
        .iter()
        .flat_map(|at| fs::read_dir(at).unwrap())
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.contains("partial"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
    drop(monitor);
}

#[test]
fn create_when_refused_says_why_and_the_guest_goes_on() {
    needs!(kvm);
    let folder = Folder::new();
    let (mut monitor, api) = Monitor::unconfigured(&folder);
    let pair = Pair::new(&folder, "snapshot");
    let refused = |body: Value| api.refused("PUT", "/snapshot/create", body);
    let before = refused(pair.create("Full"));
    assert_eq!(
        before,
        "The requested operation is not supported before starting the microVM."
    );
    let disk = folder.disk("disk", 1 << 20);
    let mut config = probe_vm_with_disks("shell", &[&disk]);
    config["start"] = json!(true);
    api.put("/vm", config);
    monitor.expect("shell ready");
    for kind in ["Full", "Diff"] {
        assert_eq!(
            refused(pair.create(kind)),
            "Create snapshot error: Cannot save the microVM state: Operation not allowed: \
             save/restore unavailable while running"
        );
    }
    pause(&api);
    let link = folder.join("link");
    fs::write(&pair.state, "").unwrap();
    fs::hard_link(&pair.state, &link).unwrap();
    for (path, words) in [
        (pair.state.clone(), "one and the same file"),
        (link, "one and the same file"),
        (folder.join("none/memory"), "No such file or directory"),
        (folder.path().to_owned(), "it is a directory, not a file"),
        ("/dev/null".into(), "it is a character device, not a file"),
    ] {
        let mut body = pair.create("Full");
        body["mem_file_path"] = json!(path);
        let message = refused(body);
        assert!(message.contains(words), "{}: {message}", path.display());
        assert_eq!(fs::read(&pair.state).unwrap(), b"");
    }
    let link = folder.join("link to the disk");
    symlink(&disk, &link).unwrap();
    for member in ["snapshot_path", "mem_file_path"] {
        for path in [&disk, &link] {
            let mut body = pair.create("Full");
            body[member] = json!(path);
            let message = refused(body);
            let words = "is a file of the disk `disk0` of this guest";
            assert!(message.contains(words), "{message}");
        }
    }
    assert!(fs::symlink_metadata(&disk).unwrap().is_file());
    let message = refused(json!({"snapshot_path": pair.state}));
    assert!(
        message.contains("missing field `mem_file_path`"),
        "{message}"
    );
    resume(&api);
    monitor.type_in("print:on\n");
    monitor.expect("print:on ok");
    pause(&api);
    api.put("/snapshot/create", pair.create("Full"));
}

/// Which loads are refused, with which words; after each of them the process can load, or boot.
#[test]
fn load_when_refused_says_why_and_the_process_can_go_on() {
    needs!(kvm);
    let folder = Folder::new();
    let disk = folder.disk("disk", 1 << 20);
    let mut config = probe_vm_with_disks("shell", &[&disk]);
    config["machine-config"]["track_dirty_pages"] = json!(true);
    let (monitor, api) = Monitor::boot_with_api(&folder, &config);
    monitor.expect("shell ready");
    let [pair, diff, other] = ["full", "diff", "other"].map(|name| Pair::new(&folder, name));
    pause(&api);
    api.put("/snapshot/create", pair.create("Full"));
    api.put("/snapshot/create", diff.create("Diff"));
    api.put("/snapshot/create", other.create("Full"));

    // After what is for a boot.
    {
        let own = Folder::new();
        let (_monitor, api) = Monitor::unconfigured(&own);
        api.put("/boot-source", config["boot-source"].clone());
        assert_eq!(
            api.refused("PUT", "/snapshot/load", pair.load()),
            "Load snapshot error: Loading a microVM snapshot not allowed after configuring \
             boot-specific resources."
        );
        api.put("/actions", json!({"action_type": "InstanceStart"}));
        let after = api.refused("PUT", "/snapshot/load", pair.load());
        assert_eq!(
            after,
            "The requested operation is not supported after starting the microVM."
        );
    }

    let state = fs::read(&pair.state).unwrap();
    let with_state = |name: &str, bytes: &[u8]| {
        let state = folder.file(name, bytes);
        json!({
            "snapshot_path": state,
            "mem_backend": {"backend_type": "File", "backend_path": pair.memory},
        })
    };
    let changed = |at: usize, to: u8| {
        let mut bytes = state.clone();
        bytes[at] = to;
        bytes
    };
    let with_memory = |path: &Path| {
        let mut body = pair.load();
        body["mem_backend"]["backend_path"] = json!(path);
        body
    };
    let with = |name: &str, value: Value| {
        let mut body = pair.load();
        body[name] = value;
        body
    };
    let fifo = folder.join("fifo");
    common::run("mkfifo", &[fifo.to_str().unwrap()]);
    let mut long = state.clone();
    long.push(b' ');
    let refusals = [
        (
            with_state("short", &state[..state.len() - 1]),
            "is truncated",
        ),
        (with_state("shorter", &state[..10]), "is truncated"),
        (with_state("empty", b""), "is truncated"),
        (
            with_state("long", &long),
            "was altered after it was written",
        ),
        (
            with_state("altered", &changed(state.len() - 9, 0)),
            "was altered after it was written",
        ),
        (
            with_state("foreign", b"hello, hello, hello, hello, hello, hello"),
            "is not a snapshot of mayfly",
        ),
        (
            with_state("newer", &changed(8, 2)),
            "has version v2.0.0 of the format",
        ),
        (
            with_state("later", &changed(10, 9)),
            "has version v1.9.0 of the format",
        ),
        (
            diff.load(),
            "is a diff snapshot, which holds a part of memory only",
        ),
        (
            with("snapshot_path", json!(folder.join("none"))),
            "No such file or directory",
        ),
        (
            with("snapshot_path", json!(folder.path())),
            "is a directory, not a file",
        ),
        (with("snapshot_path", json!(fifo)), "is a FIFO, not a file"),
        (
            with("snapshot_path", json!("/dev/zero")),
            "is a character device, not a file",
        ),
        (
            with("snapshot_path", json!(pair.memory)),
            "or is the memory file",
        ),
        (with_memory(&other.memory), "belongs to another snapshot"),
        (
            with_memory(&pair.state),
            "it is truncated, or belongs to another snapshot",
        ),
        (with_memory(&fifo), "is a FIFO, not a file"),
        (
            with_memory(&folder.disk("zeros", 32 << 20)),
            "belongs to another snapshot",
        ),
        (
            with_memory(&folder.disk("small", 16 << 20)),
            "it is truncated",
        ),
        (
            with_memory(&folder.join("none")),
            "No such file or directory",
        ),
        (
            with(
                "drive_overrides",
                json!([{"drive_id": "x", "path_on_host": disk}]),
            ),
            "the snapshot has no drive `x`",
        ),
        (
            with(
                "drive_overrides",
                json!([{"drive_id": "disk0", "path_on_host": folder.join("none")}]),
            ),
            "Load snapshot error: Failed to restore from snapshot: ",
        ),
        (
            with(
                "network_overrides",
                json!([{"iface_id": "x", "host_dev_name": "mftap"}]),
            ),
            "the snapshot has no network interface `x`",
        ),
        (
            with("vsock_override", json!({"uds_path": "v"})),
            "`vsock_override` is out of scope",
        ),
    ];
    let own = Folder::new();
    let (mut process, own_api) = Monitor::unconfigured(&own);
    for (body, words) in refusals {
        let message = own_api.refused("PUT", "/snapshot/load", body.clone());
        assert!(message.contains(words), "{body}: {message}");
        assert_eq!(own_api.get("/")["state"], "Not started");
    }
    // It can load all the same.
    own_api.put("/snapshot/load", pair.resume(json!({})));
    process.type_in("print:loaded\n");
    process.expect("print:loaded ok");
    let message = own_api.refused("PUT", "/snapshot/load", pair.load());
    assert!(message.contains("after starting the microVM"), "{message}");
    drop(process);

    // Or boot.
    let own = Folder::new();
    let (mut process, own_api) = Monitor::unconfigured(&own);
    own_api.refused("PUT", "/snapshot/load", diff.load());
    let mut config = probe_vm_with_disks("shell", &[&disk]);
    config["start"] = json!(true);
    own_api.put("/vm", config);
    process.type_in("print:booted\n");
    process.expect("print:booted ok");
}
