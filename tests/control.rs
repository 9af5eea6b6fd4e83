//! What control does beyond Firecracker's requests, and what those come to: the whole
//! configuration at once, metrics, the log, the console, masks of the CPU, huge pages.

mod common;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use common::{Api, Folder, Monitor, Netns, PATIENCE};
use serde_json::{Value, json};

/// A monitor that waits at its socket, and a folder for it.
struct Harness {
    folder: Folder,
    monitor: Monitor,
    api: Api,
}

impl Harness {
    fn new() -> Self {
        Harness::with(&[])
    }

    fn with(args: &[&str]) -> Self {
        Harness::in_folder(Folder::new(), args)
    }

    fn in_folder(folder: Folder, args: &[&str]) -> Self {
        let socket = folder.join("api.socket");
        let mut all = vec!["--api-sock", socket.to_str().unwrap()];
        all.extend(args);
        let monitor = Monitor::start(all);
        let api = Api::at(&socket);
        Harness {
            folder,
            monitor,
            api,
        }
    }

    /// Puts a probe guest with `words` and starts it.
    fn boot(&self, words: &str) {
        self.api.put("/boot-source", kernel(words));
        self.start();
    }

    fn start(&self) {
        self.api
            .put("/actions", json!({"action_type": "InstanceStart"}));
    }
}

fn kernel(words: &str) -> Value {
    json!({"kernel_image_path": path(&common::probe()), "boot_args": format!("probe={words}")})
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Waits until `found` gives something.
fn soon<T>(what: &str, mut found: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = found() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what} does not come");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn vm_when_put_with_start_boots_in_one_request() {
    if !common::kvm("vm_when_put_with_start") {
        return;
    }
    let harness = Harness::new();
    let log = harness.folder.join("log");
    // Named before, and not in the whole configuration: gone.
    harness.api.put(
        "/drives/old",
        json!({"drive_id": "old", "path_on_host": path(&harness.folder.disk("old", 512)),
            "is_root_device": false}),
    );
    harness.api.put(
        "/vm",
        json!({
            "boot-source": kernel("print:whole,blkinfo:0,stay"),
            "drives": [{"drive_id": "d", "path_on_host": path(&harness.folder.disk("d", 4096)),
                "is_root_device": false}],
            "machine-config": {"vcpu_count": 2, "mem_size_mib": 48},
            "logger": {"log_path": path(&log), "level": "Debug"},
            "metrics": {"metrics_path": path(&harness.folder.join("metrics"))},
            "start": true
        }),
    );
    harness.monitor.expect("print:whole ok");
    assert_eq!(harness.api.get("/")["state"], "Running");
    let config = harness.api.get("/vm/config");
    assert_eq!(config["machine-config"]["mem_size_mib"], 48);
    assert_eq!(config["drives"].as_array().unwrap().len(), 1);
    assert_eq!(config["drives"][0]["drive_id"], "d");
    soon("the log", || {
        fs::read_to_string(&log)
            .ok()
            .filter(|text| text.contains("The microVM is running."))
    });
    let refused = harness.api.refused(
        "PUT",
        "/vm",
        json!({"boot-source": kernel("stay"), "drives": []}),
    );
    assert!(refused.contains("after starting"), "{refused}");
}

#[test]
fn vm_when_refused_changes_nothing() {
    let harness = Harness::new();
    harness.api.put(
        "/machine-config",
        json!({"vcpu_count": 3, "mem_size_mib": 77}),
    );
    let disk = harness.folder.disk("d", 4096);
    let drive = json!({"drive_id": "d", "path_on_host": path(&disk), "is_root_device": false});
    let machine = json!({"vcpu_count": 1, "mem_size_mib": 64});
    let log = harness.folder.join("log");
    for (body, reason) in [
        (json!({"drives": []}), "missing field `boot-source`"),
        (
            json!({"boot-source": kernel("stay"), "drives": [], "more": 1}),
            "unknown field `more`",
        ),
        (
            json!({"boot-source": {"kernel_image_path": "/no/such"}, "drives": [],
                "machine-config": machine, "logger": {"log_path": path(&log)}}),
            "/no/such",
        ),
        (
            json!({"boot-source": kernel("stay"), "machine-config": machine,
                "drives": [drive, {"drive_id": "e", "path_on_host": "/no/disk", "is_root_device": false}]}),
            "/no/disk",
        ),
        (
            json!({"boot-source": kernel("stay"), "drives": [], "machine-config": machine,
                "logger": {"log_path": "/no/folder/log"}}),
            "/no/folder/log",
        ),
    ] {
        let refused = harness.api.refused("PUT", "/vm", body.clone());
        assert!(refused.contains(reason), "{body}: {refused}");
        let config = harness.api.get("/vm/config");
        assert_eq!(config["machine-config"]["mem_size_mib"], 77, "{body}");
        assert_eq!(config["drives"], json!([]), "{body}");
    }
    assert!(!log.exists(), "a refused configuration made a log");
}

#[test]
fn vm_when_it_names_a_tap_of_before_keeps_it() {
    let test = "vm_when_it_names_a_tap_of_before";
    if !common::kvm(test) || !common::needs_root(test) {
        return;
    }
    let folder = Folder::new();
    let netns = Netns::new();
    netns.tap("mftap", "172.16.9.1/24");
    let mut command = netns.command(common::mayfly());
    let socket = folder.join("api.socket");
    command.arg("--api-sock").arg(&socket);
    let monitor = Monitor::spawn(command);
    let api = Api::at(&socket);
    let network = json!({"iface_id": "n", "host_dev_name": "mftap"});
    api.put("/network-interfaces/n", network.clone());
    let whole = json!({"boot-source": kernel("netinfo:0,stay"), "drives": [],
        "network-interfaces": [network]});
    api.put("/vm", whole.clone());
    api.put("/vm", whole);
    api.put("/actions", json!({"action_type": "InstanceStart"}));
    monitor.expect("netinfo:0 ok");
}

#[test]
fn drive_when_its_new_disk_is_larger_shows_it_to_the_guest() {
    if !common::kvm("drive_when_its_new_disk_is_larger") {
        return;
    }
    let mut harness = Harness::new();
    harness.api.put(
        "/drives/d",
        json!({"drive_id": "d", "path_on_host": path(&harness.folder.disk("small", 4096)),
            "is_root_device": false}),
    );
    harness.boot("blkinfo:0,shell,stay");
    harness.monitor.expect("capacity=8 ");
    harness.api.patch(
        "/drives/d",
        json!({"drive_id": "d", "path_on_host": path(&harness.folder.disk("large", 8192))}),
    );
    harness.monitor.type_in("blkinfo:0\n");
    harness.monitor.expect("capacity=16 ");
}
