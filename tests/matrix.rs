//! Every operation of the API against the real monitor: with a good body, each member missing, each
//! type wrong, each bound crossed, the body of a wrong shape, and in each wrong state. The table
//! at the end counts the cases; MAYFLY_MATRIX names a file that gets it too.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use common::{Api, Folder, Monitor, Netns, needs};
use mayfly::wire::OPERATIONS;
use serde_json::{Value, json};

const BEFORE: &str = "not supported before starting the microVM";
const AFTER: &str = "not supported after starting the microVM";
const RUNNING: &str = "save/restore unavailable while running";
const CONFIGURED: &str = "not allowed after configuring boot-specific resources";

/// When an operation is taken.
#[derive(Clone, Copy, PartialEq)]
enum When {
    Before,
    After,
    Paused,
}

/// One operation with one good body.
struct Row {
    method: &'static str,
    /// As in the table of operations; every id is `a`.
    path: &'static str,
    when: When,
    body: Value,
    /// Members that must be there, as JSON pointers.
    required: &'static [&'static str],
    /// Members that may be null, besides those that are null in the body.
    nullable: &'static [&'static str],
    /// What to put where, and the status.
    bounds: Vec<(&'static str, Value, u16)>,
    /// Done a second time it is refused, or something else: only the good body is sent, last.
    once: bool,
    /// Unknown members are ignored.
    open: bool,
    /// The status of the good body, and what its answer holds.
    good: (u16, &'static str),
}

impl Row {
    fn new(method: &'static str, path: &'static str, when: When, body: Value) -> Self {
        Row {
            method,
            path,
            when,
            body,
            required: &[],
            nullable: &[],
            bounds: Vec::new(),
            once: false,
            open: false,
            good: (204, ""),
        }
    }

    fn path(&self) -> String {
        self.path.replace("{id}", "a")
    }
}

/// Monitors in each state, and what their bodies name.
struct World {
    folder: Folder,
    netns: Netns,
    before: Api,
    running: Api,
    paused: Api,
    _monitors: Vec<Monitor>,
}

impl World {
    fn new() -> Self {
        let (folder, netns) = (Folder::new(), Netns::new());
        folder.disk("disk", 8192);
        folder.file("initrd", "no initrd");
        let mut monitors = Vec::new();
        let [before, running, paused] = ["before", "running", "paused"].map(|state| {
            let socket = folder.join(state);
            let mut command = netns.command(common::mayfly());
            command.arg("--api-sock").arg(&socket);
            monitors.push(Monitor::spawn(command));
            Api::at(socket)
        });
        let world = World {
            folder,
            netns,
            before,
            running,
            paused,
            _monitors: monitors,
        };
        for (api, tap) in [(&world.running, "tapr"), (&world.paused, "tapp")] {
            api.put("/boot-source", world.boot_source());
            api.put("/drives/a", world.drive());
            api.put("/network-interfaces/a", world.network(tap));
            api.put("/actions", json!({"action_type": "InstanceStart"}));
        }
        world.paused.patch("/vm", json!({"state": "Paused"}));
        world
    }

    fn file(&self, name: &str) -> String {
        text(&self.folder.join(name))
    }

    fn boot_source(&self) -> Value {
        json!({"kernel_image_path": text(&common::probe()), "initrd_path": self.file("initrd"),
            "boot_args": "probe=stay"})
    }

    fn drive(&self) -> Value {
        json!({"drive_id": "a", "path_on_host": self.file("disk"), "is_root_device": false,
            "is_read_only": false, "partuuid": null, "cache_type": "Unsafe", "io_engine": "Sync",
            "rate_limiter": limiter(), "socket": null})
    }

    fn network(&self, tap: &str) -> Value {
        json!({"iface_id": "a", "host_dev_name": tap, "guest_mac": "06:00:ac:10:00:02",
            "mtu": 1500, "rx_rate_limiter": limiter(), "tx_rate_limiter": limiter()})
    }
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

fn machine() -> Value {
    json!({"vcpu_count": 2, "mem_size_mib": 64, "smt": false, "track_dirty_pages": false,
        "huge_pages": "None", "cpu_template": "None"})
}

fn limiter() -> Value {
    json!({"bandwidth": {"size": 1_000_000, "one_time_burst": 5, "refill_time": 100},
        "ops": {"size": 1000, "one_time_burst": 5, "refill_time": 100}})
}

const MACHINE_BOUNDS: [(&str, i64, u16); 8] = [
    ("/vcpu_count", 0, 400),
    ("/vcpu_count", 1, 204),
    ("/vcpu_count", 32, 204),
    ("/vcpu_count", 33, 400),
    ("/vcpu_count", 256, 400),
    ("/vcpu_count", -1, 400),
    ("/mem_size_mib", 0, 400),
    ("/mem_size_mib", -1, 400),
];

fn machine_bounds() -> Vec<(&'static str, Value, u16)> {
    let mut bounds: Vec<_> = MACHINE_BOUNDS
        .iter()
        .map(|(at, value, status)| (*at, json!(value), *status))
        .collect();
    bounds.extend([
        ("/mem_size_mib", json!(u64::MAX), 204),
        ("/mem_size_mib", json!(1e20), 400),
        ("/huge_pages", json!("1G"), 400),
        ("/cpu_template", json!("T2"), 400),
    ]);
    bounds
}

const BUCKETS: [&str; 4] = [
    "/rate_limiter/bandwidth/size",
    "/rate_limiter/bandwidth/refill_time",
    "/rate_limiter/ops/size",
    "/rate_limiter/ops/refill_time",
];

/// The bounds of all numbers of the limiter at `member`.
fn limiter_bounds(places: &[&'static str]) -> Vec<(&'static str, Value, u16)> {
    places
        .iter()
        .flat_map(|at| {
            [
                (*at, json!(0), 204),
                (*at, json!(u64::MAX), 204),
                (*at, json!(-1), 400),
                (*at, json!(1e20), 400),
            ]
        })
        .collect()
}

const RX_TX: [&str; 8] = [
    "/rx_rate_limiter/bandwidth/size",
    "/rx_rate_limiter/bandwidth/refill_time",
    "/rx_rate_limiter/ops/size",
    "/rx_rate_limiter/ops/refill_time",
    "/tx_rate_limiter/bandwidth/size",
    "/tx_rate_limiter/bandwidth/refill_time",
    "/tx_rate_limiter/ops/size",
    "/tx_rate_limiter/ops/refill_time",
];

fn drive_bounds(world: &World) -> Vec<(&'static str, Value, u16)> {
    let mut bounds = limiter_bounds(&BUCKETS);
    bounds.extend([
        ("/path_on_host", json!("/does/not/exist"), 400),
        ("/path_on_host", json!(text(world.folder.path())), 400),
        ("/path_on_host", json!("/dev/null"), 400),
    ]);
    bounds
}

/// All operations with a body, in an order in which each finds what it needs.
fn rows(world: &World) -> Vec<Row> {
    use When::{After, Before};
    let long = |n: usize| json!("a".repeat(n));
    let mut drive_put = drive_bounds(world);
    drive_put.extend([
        ("/drive_id", json!("b"), 400),
        ("/cache_type", json!("WriteBack"), 400),
        ("/cache_type", json!("Writeback"), 204),
        ("/io_engine", json!("Async"), 204),
        ("/io_engine", json!("async"), 400),
        ("/socket", json!("/s"), 400),
    ]);
    let mut network_put = limiter_bounds(&RX_TX);
    network_put.extend([
        ("/iface_id", json!("b"), 400),
        ("/host_dev_name", json!("a_name_too_long_"), 400),
        ("/host_dev_name", json!("a/b"), 400),
        ("/host_dev_name", json!(""), 204),
        ("/guest_mac", json!("06:00:ac:10:00"), 400),
        ("/guest_mac", json!("06:00:ac:10:00:0g"), 400),
        ("/mtu", json!(67), 400),
        ("/mtu", json!(68), 204),
        ("/mtu", json!(65535), 204),
        ("/mtu", json!(65536), 400),
    ]);
    let mask = json!({"kvm_capabilities": ["!56"],
        "msr_modifiers": [{"addr": "0x10a", "bitmap": "0bx1"}],
        "cpuid_modifiers": [{"leaf": "0x1", "subleaf": "0x0", "flags": 0,
            "modifiers": [{"register": "ecx", "bitmap": "0bx"}]}]});
    let action = |name: &str| json!({ "action_type": name });
    let wrong_action = vec![
        ("/action_type", json!("instancestart"), 400),
        ("/action_type", json!(""), 400),
    ];
    let state = |name: &str| json!({ "state": name });
    let wrong_state = vec![
        ("/state", json!("paused"), 400),
        ("/state", json!("Running"), 400),
    ];
    vec![
        Row {
            required: &["/vcpu_count", "/mem_size_mib"],
            nullable: &["/cpu_template"],
            bounds: machine_bounds(),
            ..Row::new("PUT", "/machine-config", Before, machine())
        },
        Row {
            nullable: &[
                "/vcpu_count",
                "/mem_size_mib",
                "/smt",
                "/track_dirty_pages",
                "/huge_pages",
                "/cpu_template",
            ],
            bounds: machine_bounds(),
            ..Row::new("PATCH", "/machine-config", Before, machine())
        },
        Row {
            required: &["/kernel_image_path"],
            nullable: &["/initrd_path", "/boot_args"],
            bounds: vec![
                ("/boot_args", long(2047), 204),
                ("/boot_args", long(2048), 400),
                ("/boot_args", json!("a\0b"), 400),
                ("/kernel_image_path", json!("/does/not/exist"), 400),
                ("/kernel_image_path", json!(""), 400),
                ("/kernel_image_path", json!("/dev/null"), 400),
                ("/initrd_path", json!("/does/not/exist"), 400),
            ],
            ..Row::new("PUT", "/boot-source", Before, world.boot_source())
        },
        Row {
            required: &[
                "/drive_id",
                "/path_on_host",
                "/is_root_device",
                BUCKETS[0],
                BUCKETS[1],
                BUCKETS[2],
                BUCKETS[3],
            ],
            nullable: &[
                "/is_read_only",
                "/io_engine",
                "/rate_limiter",
                "/rate_limiter/bandwidth",
                "/rate_limiter/ops",
                "/rate_limiter/bandwidth/one_time_burst",
                "/rate_limiter/ops/one_time_burst",
            ],
            bounds: drive_put,
            ..Row::new("PUT", "/drives/{id}", Before, world.drive())
        },
        Row {
            required: &[
                "/iface_id",
                "/host_dev_name",
                RX_TX[0],
                RX_TX[1],
                RX_TX[2],
                RX_TX[3],
                RX_TX[4],
                RX_TX[5],
                RX_TX[6],
                RX_TX[7],
            ],
            nullable: &[
                "/guest_mac",
                "/mtu",
                "/rx_rate_limiter",
                "/rx_rate_limiter/bandwidth",
                "/rx_rate_limiter/ops",
                "/rx_rate_limiter/bandwidth/one_time_burst",
                "/rx_rate_limiter/ops/one_time_burst",
                "/tx_rate_limiter",
                "/tx_rate_limiter/bandwidth",
                "/tx_rate_limiter/ops",
                "/tx_rate_limiter/bandwidth/one_time_burst",
                "/tx_rate_limiter/ops/one_time_burst",
            ],
            bounds: network_put,
            ..Row::new(
                "PUT",
                "/network-interfaces/{id}",
                Before,
                world.network("tapb"),
            )
        },
        Row {
            required: &[
                "/msr_modifiers/0/addr",
                "/msr_modifiers/0/bitmap",
                "/cpuid_modifiers/0/leaf",
                "/cpuid_modifiers/0/subleaf",
                "/cpuid_modifiers/0/flags",
                "/cpuid_modifiers/0/modifiers",
                "/cpuid_modifiers/0/modifiers/0/register",
                "/cpuid_modifiers/0/modifiers/0/bitmap",
            ],
            bounds: vec![
                ("/kvm_capabilities/0", json!("x"), 400),
                ("/kvm_capabilities/0", json!("4294967296"), 400),
                ("/msr_modifiers/0/addr", json!("10"), 400),
                ("/msr_modifiers/0/addr", json!("0x100000000"), 400),
                ("/msr_modifiers/0/bitmap", json!("0b2"), 400),
                ("/msr_modifiers/0/bitmap", long(65), 400),
                ("/cpuid_modifiers/0/leaf", json!("0x"), 400),
                ("/cpuid_modifiers/0/subleaf", json!("-0x1"), 400),
                ("/cpuid_modifiers/0/flags", json!(4_294_967_296_u64), 400),
                ("/cpuid_modifiers/0/modifiers/0/register", json!("esi"), 400),
                (
                    "/cpuid_modifiers/0/modifiers/0/bitmap",
                    json!(format!("0b{}", "x".repeat(33))),
                    400,
                ),
            ],
            ..Row::new("PUT", "/cpu-config", Before, mask)
        },
        Row {
            required: &["/rate_limiter/size", "/rate_limiter/refill_time"],
            nullable: &["/serial_out_path", "/rate_limiter"],
            bounds: vec![
                ("/serial_out_path", json!("/does/not/exist/console"), 400),
                ("/rate_limiter/size", json!(-1), 400),
                ("/rate_limiter/size", json!(0), 204),
                ("/rate_limiter/refill_time", json!(-1), 400),
                ("/rate_limiter/refill_time", json!(0), 204),
            ],
            ..Row::new(
                "PUT",
                "/serial",
                Before,
                json!({"serial_out_path": world.file("console"),
                    "rate_limiter": {"size": 1000, "refill_time": 100}}),
            )
        },
        Row {
            nullable: &[
                "/log_path",
                "/level",
                "/show_level",
                "/show_log_origin",
                "/module",
            ],
            bounds: vec![
                ("/level", json!("WARNING"), 204),
                ("/level", json!("loud"), 400),
                ("/log_path", json!("/does/not/exist/log"), 400),
            ],
            ..Row::new(
                "PUT",
                "/logger",
                Before,
                json!({"log_path": world.file("log"), "level": "Info", "show_level": true,
                    "show_log_origin": false, "module": "mayfly"}),
            )
        },
        Row {
            required: &["/metrics_path"],
            nullable: &["/properties"],
            bounds: vec![("/metrics_path", json!("/does/not/exist/metrics"), 400)],
            once: true,
            open: true,
            ..Row::new(
                "PUT",
                "/metrics",
                Before,
                json!({"metrics_path": world.file("metrics"), "emit_id": true,
                    "properties": {"cell": "7"}}),
            )
        },
        Row {
            required: &[
                "/boot-source",
                "/drives",
                "/boot-source/kernel_image_path",
                "/drives/0/drive_id",
                "/drives/0/path_on_host",
                "/drives/0/is_root_device",
                "/network-interfaces/0/iface_id",
                "/network-interfaces/0/host_dev_name",
                "/machine-config/vcpu_count",
                "/machine-config/mem_size_mib",
            ],
            nullable: &[
                "/boot-source/boot_args",
                "/machine-config",
                "/logger",
                "/serial",
                "/logger/level",
                "/network-interfaces/0/mtu",
            ],
            bounds: vec![
                ("/machine-config/vcpu_count", json!(33), 400),
                ("/machine-config/mem_size_mib", json!(0), 400),
                ("/boot-source/kernel_image_path", json!("/nothing"), 400),
                ("/drives/0/path_on_host", json!("/nothing"), 400),
                ("/network-interfaces/0/mtu", json!(67), 400),
                ("/logger/level", json!("loud"), 400),
                ("/cpu-config", json!("/nothing"), 400),
                ("/vsock", json!({}), 400),
                ("/balloon", json!({}), 400),
                ("/pmem", json!([{}]), 400),
                ("/pmem", json!([]), 204),
            ],
            ..Row::new(
                "PUT",
                "/vm",
                Before,
                json!({
                    // The last good body is what is started in the end: a guest that stays.
                    "boot-source": {"kernel_image_path": text(&common::probe()),
                        "boot_args": "probe=stay"},
                    "drives": [{"drive_id": "a", "path_on_host": world.file("disk"),
                        "is_root_device": false}],
                    "network-interfaces": [{"iface_id": "a", "host_dev_name": "tapb", "mtu": 1500}],
                    "machine-config": {"vcpu_count": 1, "mem_size_mib": 64},
                    "logger": {"level": "Info"},
                    "serial": {},
                    "start": false,
                }),
            )
        },
        Row {
            required: &["/snapshot_path", "/mem_file_path"],
            bounds: vec![
                ("/snapshot_type", json!("Half"), 400),
                ("/snapshot_type", json!("full"), 400),
                ("/snapshot_path", json!("/does/not/exist/state"), 400),
                ("/snapshot_path", json!("/dev/null"), 400),
                ("/snapshot_path", json!(world.file("memory")), 400),
                ("/mem_file_path", json!("/does/not/exist/memory"), 400),
                ("/mem_file_path", json!(text(world.folder.path())), 400),
            ],
            ..Row::new(
                "PUT",
                "/snapshot/create",
                When::Paused,
                json!({"snapshot_type": "Full", "snapshot_path": world.file("state"),
                    "mem_file_path": world.file("memory")}),
            )
        },
        Row {
            required: &[
                "/snapshot_path",
                "/mem_backend",
                "/mem_backend/backend_type",
                "/mem_backend/backend_path",
                "/network_overrides/0/iface_id",
                "/network_overrides/0/host_dev_name",
                "/drive_overrides/0/drive_id",
                "/drive_overrides/0/path_on_host",
            ],
            nullable: &["/working_set"],
            bounds: vec![
                ("/mem_backend/backend_type", json!("file"), 400),
                ("/huge_pages", json!("1G"), 400),
                ("/vsock_override", json!({"uds_path": "v"}), 400),
            ],
            // The rows above have named parts of a boot.
            good: (400, CONFIGURED),
            ..Row::new(
                "PUT",
                "/snapshot/load",
                Before,
                json!({"snapshot_path": "/nothing",
                    "mem_backend": {"backend_type": "File", "backend_path": "/nothing"},
                    "track_dirty_pages": false, "resume_vm": false, "clock_realtime": false,
                    "enable_diff_snapshots": false, "ignore_cpu_differences": false,
                    "network_overrides": [{"iface_id": "a", "host_dev_name": "tapb"}],
                    "drive_overrides": [{"drive_id": "a", "path_on_host": "/nothing"}],
                    "vsock_override": null, "huge_pages": "Snapshot", "working_set": "/nothing"}),
            )
        },
        Row {
            required: &["/drive_id", BUCKETS[0], BUCKETS[1], BUCKETS[2], BUCKETS[3]],
            nullable: &[
                "/path_on_host",
                "/rate_limiter",
                "/rate_limiter/bandwidth",
                "/rate_limiter/ops",
                "/rate_limiter/bandwidth/one_time_burst",
                "/rate_limiter/ops/one_time_burst",
            ],
            bounds: drive_bounds(world),
            ..Row::new(
                "PATCH",
                "/drives/{id}",
                After,
                json!({"drive_id": "a", "path_on_host": world.file("disk"),
                    "rate_limiter": limiter()}),
            )
        },
        Row {
            required: &[
                "/iface_id",
                RX_TX[0],
                RX_TX[1],
                RX_TX[2],
                RX_TX[3],
                RX_TX[4],
                RX_TX[5],
                RX_TX[6],
                RX_TX[7],
            ],
            nullable: &[
                "/rx_rate_limiter",
                "/rx_rate_limiter/bandwidth",
                "/rx_rate_limiter/ops",
                "/rx_rate_limiter/bandwidth/one_time_burst",
                "/rx_rate_limiter/ops/one_time_burst",
                "/tx_rate_limiter",
                "/tx_rate_limiter/bandwidth",
                "/tx_rate_limiter/ops",
                "/tx_rate_limiter/bandwidth/one_time_burst",
                "/tx_rate_limiter/ops/one_time_burst",
            ],
            bounds: limiter_bounds(&RX_TX),
            ..Row::new(
                "PATCH",
                "/network-interfaces/{id}",
                After,
                json!({"iface_id": "a", "rx_rate_limiter": limiter(), "tx_rate_limiter": limiter()}),
            )
        },
        Row {
            required: &["/state"],
            bounds: wrong_state.clone(),
            once: true,
            ..Row::new("PATCH", "/vm", After, state("Paused"))
        },
        Row {
            required: &["/state"],
            bounds: wrong_state,
            ..Row::new("PATCH", "/vm", After, state("Resumed"))
        },
        Row {
            required: &["/action_type"],
            bounds: wrong_action.clone(),
            ..Row::new("PUT", "/actions", After, action("SendCtrlAltDel"))
        },
        Row {
            required: &["/action_type"],
            ..Row::new("PUT", "/actions", After, action("FlushMetrics"))
        },
        Row {
            required: &["/action_type"],
            bounds: wrong_action,
            once: true,
            ..Row::new("PUT", "/actions", Before, action("InstanceStart"))
        },
    ]
}

/// Paths of the operations without a body, allowed in every state.
fn plain() -> impl Iterator<Item = &'static str> {
    OPERATIONS
        .iter()
        .filter(|operation| operation.method.name() == "GET")
        .map(|operation| operation.path)
}

const COLUMNS: [&str; 6] = ["good", "missing", "type", "bound", "shape", "state"];

/// Counts cases by operation and column.
#[derive(Default)]
struct Table(BTreeMap<(String, &'static str), [usize; COLUMNS.len()]>);

impl Table {
    /// Sends a request and checks what comes back.
    fn case(&mut self, column: &str, operation: (&str, &'static str), case: Case) {
        let Case {
            api,
            path,
            body,
            status,
            message,
        } = case;
        let (method, pattern) = operation;
        let (found, answer) = api.request(method, &path, &body);
        assert!(
            found == status && message.split('|').any(|one| answer.contains(one)),
            "{column}: {method} {path} {body:.300}\nis answered {found} {answer}\nnot {status} `{message}`"
        );
        if status == 400 {
            let told: Value = serde_json::from_str(&answer).unwrap();
            assert!(!told["fault_message"].as_str().unwrap().is_empty());
        }
        let counts = self.0.entry((method.to_owned(), pattern)).or_default();
        counts[COLUMNS.iter().position(|c| *c == column).unwrap()] += 1;
    }

    /// In the order of the table of operations; every one of them must be there.
    fn text(&self) -> String {
        let mut text = String::from("| operation |");
        COLUMNS.iter().for_each(|c| text += &format!(" {c} |"));
        text += "\n|---|";
        COLUMNS.iter().for_each(|_| text += "---:|");
        text.push('\n');
        let mut all = 0;
        for operation in OPERATIONS {
            let name = (operation.method.name().to_owned(), operation.path);
            let counts = self
                .0
                .get(&name)
                .unwrap_or_else(|| panic!("{name:?} is not in the matrix"));
            text += &format!("| {} {} |", name.0, name.1);
            counts
                .iter()
                .for_each(|count| text += &format!(" {count} |"));
            text.push('\n');
            all += counts.iter().sum::<usize>();
        }
        text + &format!("{all} cases\n")
    }
}

/// One request.
struct Case<'a> {
    api: &'a Api,
    path: String,
    body: String,
    status: u16,
    /// What the answer must hold; alternatives are parted by `|`.
    message: &'a str,
}

/// A copy of `body` in which the member at `pointer` is `value`.
fn with(body: &Value, pointer: &str, value: Value) -> Value {
    let mut body = body.clone();
    let (parent, name) = pointer.rsplit_once('/').unwrap();
    match body.pointer_mut(parent).unwrap() {
        Value::Array(items) => items[name.parse::<usize>().unwrap()] = value,
        parent => parent[name] = value,
    }
    body
}

/// A copy without it.
fn without(body: &Value, pointer: &str) -> Option<Value> {
    let mut body = body.clone();
    let (parent, name) = pointer.rsplit_once('/').unwrap();
    body.pointer_mut(parent)?.as_object_mut()?.remove(name);
    Some(body)
}

/// The places of all members of `body`, those inside others too.
fn members(body: &Value) -> BTreeSet<String> {
    fn look(body: &Value, at: &str, found: &mut BTreeSet<String>) {
        let mut inside = |name: &str, value: &Value| {
            let here = format!("{at}/{name}");
            look(value, &here, found);
            found.insert(here);
        };
        match body {
            Value::Object(map) => map.iter().for_each(|(name, value)| inside(name, value)),
            Value::Array(items) => items
                .iter()
                .enumerate()
                .for_each(|(n, value)| inside(&n.to_string(), value)),
            _ => {}
        }
    }
    let mut found = BTreeSet::new();
    look(body, "", &mut found);
    found
}

/// Values of every other type than `right`, which null may stand for.
fn wrong_types(right: &Value, nullable: bool) -> Vec<Value> {
    let all = [
        json!(true),
        json!(5),
        json!(1.5),
        json!("five"),
        json!([]),
        json!({}),
        json!(null),
    ];
    all.into_iter()
        .filter(|value| match (value, right) {
            // Of those that are null in the good body, each takes a string.
            (Value::String(_), Value::String(_) | Value::Null)
            | (Value::Bool(_), Value::Bool(_))
            | (Value::Array(_), Value::Array(_))
            | (Value::Object(_), Value::Object(_))
            | (Value::Null, Value::Null) => false,
            (Value::Number(n), Value::Number(_)) => n.is_f64(),
            (Value::Null, _) => !nullable,
            _ => true,
        })
        .collect()
}

/// The name of the member at `place`; of its list, for an item.
fn name_of(place: &str) -> &str {
    place
        .rsplit('/')
        .find(|name| name.parse::<usize>().is_err())
        .unwrap()
}

#[test]
fn operations_when_asked_in_every_way_answer_as_they_must() {
    needs!(kvm, root);
    let world = World::new();
    let mut table = Table::default();
    for path in plain() {
        for api in [&world.before, &world.running, &world.paused] {
            let case = |body: &str, status| Case {
                api,
                path: path.to_owned(),
                body: body.to_owned(),
                status,
                message: "",
            };
            table.case("good", ("GET", path), case("", 200));
            table.case("shape", ("GET", path), case("{}", 400));
        }
    }
    for row in rows(&world) {
        check(&world, &row, &mut table);
    }
    assert_eq!(world.before.get("/")["state"], "Running");
    assert_eq!(world.running.get("/")["state"], "Running");
    assert_eq!(world.paused.get("/")["state"], "Paused");
    let text = table.text();
    println!("{text}");
    if let Some(file) = std::env::var_os("MAYFLY_MATRIX") {
        std::fs::write(file, text).unwrap();
    }
    drop(world.netns);
}

/// All cases of one row.
fn check(world: &World, row: &Row, table: &mut Table) {
    let operation = (row.method, row.path);
    let api = match row.when {
        When::Before => &world.before,
        When::After => &world.running,
        When::Paused => &world.paused,
    };
    let mut send = |column: &str, api: &Api, path: &str, body: String, status, message: &str| {
        let case = Case {
            api,
            path: path.to_owned(),
            body,
            status,
            message,
        };
        table.case(column, operation, case);
    };
    let (path, good) = (row.path(), row.body.to_string());

    match row.when {
        When::Before => {
            send("state", &world.running, &path, good.clone(), 400, AFTER);
            send("state", &world.paused, &path, good.clone(), 400, AFTER);
        }
        When::After => send("state", &world.before, &path, good.clone(), 400, BEFORE),
        When::Paused => {
            send("state", &world.before, &path, good.clone(), 400, BEFORE);
            send("state", &world.running, &path, good.clone(), 400, RUNNING);
        }
    }
    let (status, told) = row.good;

    for place in members(&row.body) {
        let Some(less) = without(&row.body, &place) else {
            continue;
        };
        let name = name_of(&place);
        if row.required.contains(&place.as_str()) {
            let message = format!("missing field `{name}`|missing field: either `{name}`");
            send("missing", api, &path, less.to_string(), 400, &message);
        } else if !row.once {
            send("missing", api, &path, less.to_string(), status, told);
        }
    }
    for required in row.required {
        assert!(row.body.pointer(required).is_some(), "{required}");
    }

    for place in members(&row.body) {
        let right = row.body.pointer(&place).unwrap();
        for wrong in wrong_types(right, row.nullable.contains(&place.as_str())) {
            // A number in the place of a path asks for a descriptor, of which none was sent; where the
            // good body is refused too, for another reason, that is not found out.
            let message = match (told, wrong.is_u64()) {
                ("", _) | (_, false) => format!("{}|descriptor", name_of(&place)),
                (told, true) => format!("{}|{told}", name_of(&place)),
            };
            let body = with(&row.body, &place, wrong).to_string();
            send("type", api, &path, body, 400, &message);
        }
    }

    for (place, value, status) in &row.bounds {
        let body = with(&row.body, place, value.clone()).to_string();
        send("bound", api, &path, body, *status, "");
    }

    send("shape", api, &path, String::new(), 400, "Empty");
    send("shape", api, &path, "{".into(), 400, "EOF");
    send("shape", api, &path, "nothing".into(), 400, "expected");
    send("shape", api, &path, format!("[{good}]"), 400, "sequence");
    send("shape", api, &path, format!("{good} x"), 400, "trailing");
    let (first, value) = row.body.as_object().unwrap().iter().next().unwrap();
    let twice = good.replacen('{', &format!("{{\"{first}\":{value},"), 1);
    send("shape", api, &path, twice, 400, "duplicate field");
    if !row.open {
        let unknown = with(&row.body, "/nobody_knows", json!(1)).to_string();
        let message = "unknown field `nobody_knows`";
        send("shape", api, &path, unknown, 400, message);
    }
    if row.path.contains("{id}") {
        for (id, message) in [
            ("", "cannot be empty"),
            ("a-b", "alphanumeric"),
            ("b", "does not match"),
        ] {
            let path = row.path.replace("{id}", id);
            send("shape", api, &path, good.clone(), 400, message);
        }
    }

    send("good", api, &path, good.clone(), status, told);
    if row.when == When::After && row.path != "/vm" {
        send("good", &world.paused, &path, good, 204, "");
    }
}
