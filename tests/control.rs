//! What control does beyond Firecracker's requests, and what those come to: the whole
//! configuration at once, metrics, the log, the console, masks of the CPU, huge pages.

mod common;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use common::{Api, Folder, Monitor, Netns, PATIENCE, needs};
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
    needs!(kvm);
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
        (
            json!({"boot-source": kernel("stay"), "drives": [], "machine-config": machine,
                "logger": {"log_path": path(&log)},
                "metrics": {"metrics_path": "/no/folder/metrics"}}),
            "/no/folder/metrics",
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
    needs!(kvm, root);
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
    needs!(kvm);
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

/// The value of the only sample of `GET /metrics` that begins with `begins`.
fn sample(api: &Api, begins: &str) -> f64 {
    let (status, text) = api.request("GET", "/metrics", "");
    assert_eq!(status, 200);
    let mut found = text.lines().filter(|line| line.starts_with(begins));
    let line = found
        .next()
        .unwrap_or_else(|| panic!("no {begins} in {text}"));
    assert!(found.next().is_none(), "{begins} twice in {text}");
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

/// The lines of a sink, each a JSON object.
fn metrics_lines(file: &Path) -> Vec<Value> {
    let text = fs::read_to_string(file).unwrap_or_default();
    assert!(text.is_empty() || text.ends_with('\n'), "{text}");
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[test]
fn metrics_when_read_are_prometheus_text() {
    let harness = Harness::new();
    let (_, text) = harness.api.request("GET", "/metrics", "");
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (name, value) = line.rsplit_once(' ').unwrap();
        assert!(name.starts_with("mayfly_"), "{line}");
        value.parse::<f64>().unwrap_or_else(|_| panic!("{line}"));
        let family = name.split('{').next().unwrap();
        let family = ["_bucket", "_sum", "_count"]
            .iter()
            .find_map(|end| family.strip_suffix(end))
            .unwrap_or(family);
        assert!(text.contains(&format!("# TYPE {family} ")), "{line}");
    }
    harness.api.refused("PUT", "/boot-source", json!({}));
    harness.api.get("/version");
    let put = "mayfly_api_refused_total{method=\"PUT\",path=\"/boot-source\"}";
    assert_eq!(sample(&harness.api, put), 1.0);
    let get = "mayfly_api_requests_total{method=\"GET\",path=\"/version\"}";
    assert_eq!(sample(&harness.api, get), 1.0);
    assert_eq!(
        sample(&harness.api, "mayfly_state{state=\"Not started\"}"),
        1.0
    );
}

#[test]
fn metrics_when_a_guest_works_count_it() {
    needs!(kvm);
    let harness = Harness::new();
    let sink = harness.folder.join("metrics");
    harness.api.put(
        "/metrics",
        json!({"metrics_path": path(&sink), "emit_id": true,
            "properties": {"cell": "7"}}),
    );
    harness.api.put(
        "/drives/d",
        json!({"drive_id": "d", "path_on_host": path(&harness.folder.disk("d", 1 << 20)),
            "is_root_device": false}),
    );
    harness.boot("blkwrite:0:0:8:1,blkread:0:0:16,print:done,stay");
    harness.monitor.expect("print:done ok");

    let operations = "mayfly_block_operations_total{device=\"d\",operation=";
    let bytes = "mayfly_block_bytes_total{device=\"d\",operation=";
    let writes = sample(&harness.api, &format!("{operations}\"write\"}}"));
    let reads = sample(&harness.api, &format!("{operations}\"read\"}}"));
    assert!(writes >= 1.0 && reads >= 1.0);
    assert_eq!(sample(&harness.api, &format!("{bytes}\"write\"}}")), 4096.0);
    let exits = "mayfly_vcpu_exits_total{vcpu=\"0\",kind=\"port_write\"}";
    assert!(sample(&harness.api, exits) >= 100.0);
    let exits = "mayfly_vcpu_exits_total{vcpu=\"0\",kind=\"mmio_write\"}";
    assert!(sample(&harness.api, exits) >= 10.0);
    let console = "mayfly_console_bytes_total{direction=\"output\"}";
    assert!(sample(&harness.api, console) >= 50.0);
    assert!(
        sample(
            &harness.api,
            "mayfly_start_step_seconds{step=\"guest_entered\"}"
        ) > 0.0
    );

    // The first line comes with the start, the next when asked for; counts are what is new.
    soon("the first line", || {
        (!metrics_lines(&sink).is_empty()).then_some(())
    });
    harness.api.patch("/vm", json!({"state": "Paused"}));
    let flush = json!({"action_type": "FlushMetrics"});
    harness.api.put("/actions", flush.clone());
    harness.api.put("/actions", flush);
    let lines = metrics_lines(&sink);
    assert_eq!(lines.len(), 3, "{lines:?}");
    let sum = |group: &str, key: &str| -> u64 {
        lines.iter().map(|l| l[group][key].as_u64().unwrap()).sum()
    };
    assert_eq!(sum("block_d", "write_bytes"), 4096);
    assert_eq!(sum("block", "write_bytes"), 4096);
    assert!(sum("vcpu", "exit_io_out") >= 100);
    assert!(sum("uart", "write_count") >= 50);
    assert_eq!(sum("put_api_requests", "drive_count"), 1);
    assert_eq!(lines[2]["vcpu"]["exit_io_out"], 0, "the guest is paused");
    assert_eq!(lines[2]["put_api_requests"]["actions_count"], 1);
    assert_eq!(lines[1]["id"], "anonymous-instance");
    assert_eq!(lines[1]["properties"]["cell"], "7");
    let pause = &lines[1]["latencies_us"];
    assert!(pause["pause_vm"].as_u64().unwrap() >= pause["vmm_pause_vm"].as_u64().unwrap());
    assert!(pause["vmm_pause_vm"].as_u64().unwrap() > 0);
    for (group, key) in [("block_d", "write_agg"), ("vcpu", "exit_mmio_write_agg")] {
        let told = |line: &Value, what: &str| line[group][key][what].as_u64().unwrap();
        let took: u64 = lines.iter().map(|line| told(line, "sum_us")).sum();
        let (least, most) = (told(&lines[1], "min_us"), told(&lines[1], "max_us"));
        assert!(
            0 < most && least <= most && most <= took,
            "{group}: {lines:?}"
        );
        assert_eq!(told(&lines[2], "sum_us"), 0, "the guest is paused");
    }
    assert_eq!(
        lines[1]["memory_hotplug"]["plug_agg"],
        json!({"min_us": 0, "max_us": 0, "sum_us": 0})
    );
    for group in [
        "api_server",
        "seccomp",
        "signals",
        "net",
        "i8042",
        "vsock",
        "mmds",
    ] {
        assert!(lines[0][group].is_object(), "{group}");
    }
    let refused = harness
        .api
        .refused("PUT", "/metrics", json!({"metrics_path": path(&sink)}));
    assert!(refused.contains("after starting"), "{refused}");
}

#[test]
fn metrics_when_put_twice_or_nowhere_are_refused() {
    let harness = Harness::new();
    let nowhere = json!({"metrics_path": "/no/folder/metrics"});
    let refused = harness.api.refused("PUT", "/metrics", nowhere);
    assert!(refused.contains("/no/folder/metrics"), "{refused}");
    let sink = json!({"metrics_path": path(&harness.folder.join("metrics"))});
    harness.api.put("/metrics", sink.clone());
    let refused = harness.api.refused("PUT", "/metrics", sink);
    assert!(
        refused.contains("Reinitialization of metrics not allowed"),
        "{refused}"
    );
    // A whole configuration takes the place of what there was.
    for name in ["first", "second"] {
        let sink = harness.folder.join(name);
        let all = json!({"boot-source": {"kernel_image_path": common::probe()}, "drives": [],
            "metrics": {"metrics_path": sink}});
        harness.api.put("/vm", all);
        assert!(sink.exists());
    }
    let early = json!({"action_type": "FlushMetrics"});
    let refused = harness.api.refused("PUT", "/actions", early);
    assert!(refused.contains("before starting"), "{refused}");
}

#[test]
fn metrics_when_asked_for_on_the_command_line_tell_the_startup() {
    needs!(kvm);
    let folder = Folder::new();
    let sink = folder.join("metrics");
    let sink = path(&sink).to_owned();
    let mut harness = Harness::in_folder(
        folder,
        &[
            "--metrics-path",
            &sink,
            "--start-time-us",
            "1",
            "--start-time-cpu-us",
            "0",
            "--parent-cpu-time-us",
            "5000000",
        ],
    );
    let again = json!({"metrics_path": sink});
    harness.api.refused("PUT", "/metrics", again);
    harness.boot("wait:50,reset");
    harness.monitor.exits_with(0);
    // The first line, and the one at the end.
    let lines = metrics_lines(Path::new(&sink));
    assert_eq!(lines.len(), 2);
    let startup = &lines[0]["api_server"];
    assert!(startup["process_startup_time_us"].as_u64().unwrap() > 0);
    let cpu = startup["process_startup_time_cpu_us"].as_u64().unwrap();
    assert!((5_000_000..6_000_000).contains(&cpu), "{cpu}");
}

#[test]
fn metrics_when_their_fifo_is_not_read_hold_nobody_up() {
    needs!(kvm);
    let harness = Harness::new();
    let fifo = harness.folder.join("fifo");
    common::run("mkfifo", &[path(&fifo)]);
    harness
        .api
        .put("/metrics", json!({"metrics_path": path(&fifo)}));
    harness.boot("stay");
    let flush = json!({"action_type": "FlushMetrics"}).to_string();
    let mut refused = 0;
    for _ in 0..40 {
        let (status, _) = harness.api.request("PUT", "/actions", &flush);
        refused += u32::from(status == 400);
    }
    assert!(refused > 0);
    assert!(sample(&harness.api, "mayfly_metrics_lines_missed_total") >= 1.0);
    assert_eq!(harness.api.get("/")["state"], "Running");
}

#[test]
fn log_when_put_goes_where_it_is_told() {
    needs!(kvm);
    let harness = Harness::with(&["--log-format", "json", "--id", "vm-7"]);
    let (first, second) = (harness.folder.join("first"), harness.folder.join("second"));
    harness.api.put("/logger", json!({}));
    harness
        .api
        .put("/logger", json!({"log_path": path(&first)}));
    assert!(first.exists(), "the file is made at once");
    harness.api.put(
        "/logger",
        json!({"log_path": path(&second), "level": "iNfO", "show_level": true}),
    );
    harness.boot("stay");
    let text = soon("the log", || {
        fs::read_to_string(&second)
            .ok()
            .filter(|t| t.contains("running"))
    });
    for line in text.lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        assert_eq!(line["id"], "vm-7");
        assert_eq!(line["level"], "INFO");
        for member in ["time", "thread", "message"] {
            assert!(line[member].is_string(), "{line}");
        }
    }
    let refused = harness.api.refused("PUT", "/logger", json!({}));
    assert!(refused.contains("after starting"), "{refused}");
}

#[test]
fn log_when_its_fifo_is_not_read_holds_nobody_up() {
    needs!(kvm);
    let mut harness = Harness::new();
    let fifo = harness.folder.join("fifo");
    common::run("mkfifo", &[path(&fifo)]);
    harness.api.put(
        "/logger",
        json!({"log_path": path(&fifo), "level": "Trace"}),
    );
    harness.boot("print:up,shell,stay");
    harness.monitor.expect("print:up ok");
    for n in 0..50 {
        harness.api.patch("/vm", json!({"state": "Paused"}));
        harness.api.patch("/vm", json!({"state": "Resumed"}));
        harness.monitor.type_in(&format!("print:round{n}\n"));
        harness.monitor.expect(&format!("print:round{n} ok"));
    }
}

#[test]
fn log_when_a_guest_misbehaves_stays_small() {
    needs!(kvm);
    let harness = Harness::new();
    let log = harness.folder.join("log");
    harness.api.put("/logger", json!({"log_path": path(&log)}));
    harness.api.put(
        "/drives/d",
        json!({"drive_id": "d", "path_on_host": path(&harness.folder.disk("d", 1 << 20)),
            "is_root_device": false}),
    );
    harness.boot("attack:0:all,attack:0:all,print:done,stay");
    harness
        .monitor
        .expect_within("print:done", common::LINUX_PATIENCE);
    let len = fs::metadata(&log).unwrap().len();
    assert!(len < 200 * 1024, "{len} bytes of log");
    assert_eq!(harness.api.get("/")["state"], "Running");
}

#[test]
fn cpu_config_when_the_host_can_not_is_refused_at_the_start() {
    needs!(kvm);
    let harness = Harness::new();
    harness.api.put("/boot-source", kernel("rdmsr:0x277,stay"));
    let start = json!({"action_type": "InstanceStart"});
    for (config, reason) in [
        (
            json!({"cpuid_modifiers": [{"leaf": "0x7777", "subleaf": "0x0", "flags": 0, "modifiers": []}]}),
            "leaf 0x7777",
        ),
        (
            json!({"msr_modifiers": [{"addr": "0xdeadbeef", "bitmap": "0b1"}]}),
            "0xdeadbeef",
        ),
        (json!({"kvm_capabilities": ["4000"]}), "capability 4000"),
    ] {
        harness.api.put("/cpu-config", config);
        let refused = harness.api.refused("PUT", "/actions", start.clone());
        assert!(refused.contains(reason), "{refused}");
        assert_eq!(harness.api.get("/")["state"], "Not started");
    }
    harness.api.put(
        "/cpu-config",
        json!({"kvm_capabilities": ["!4000", "3"],
            "msr_modifiers": [{"addr": "0x277", "bitmap": "0b101"}]}),
    );
    harness.start();
    // A guest sees the masks of MSRs also where KVM is software.
    let text = harness.monitor.expect("rdmsr:0x277 ok");
    assert!(!text.contains("FAILED"), "{text}");
}

#[test]
fn memory_when_of_huge_pages_boots_or_says_what_is_missing() {
    needs!(kvm);
    let pool = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
    let free: u64 = fs::read_to_string(pool).map_or(0, |t| t.trim().parse().unwrap());
    let harness = Harness::new();
    harness
        .api
        .put("/boot-source", kernel("mem,print:huge,stay"));
    for pages in ["2M", "Transparent"] {
        harness.api.put(
            "/machine-config",
            json!({"vcpu_count": 1, "mem_size_mib": 32, "huge_pages": pages,
                "track_dirty_pages": true}),
        );
        assert_eq!(harness.api.get("/machine-config")["huge_pages"], pages);
        if pages == "2M" && free < 16 {
            let start = json!({"action_type": "InstanceStart"});
            let refused = harness.api.refused("PUT", "/actions", start);
            assert!(refused.contains("need 16 huge pages of 2 MiB"), "{refused}");
            continue;
        }
        harness.start();
        harness.monitor.expect("print:huge ok");
        break;
    }
}

/// Reads from a client of the console until `text` has come.
fn console_shows(client: &mut UnixStream, text: &str) -> String {
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut seen = Vec::new();
    let mut bytes = [0; 4096];
    loop {
        let n = client.read(&mut bytes).unwrap();
        assert!(n > 0, "the console closed");
        seen.extend_from_slice(&bytes[..n]);
        let seen = String::from_utf8_lossy(&seen);
        if seen.contains(text) {
            return seen.into_owned();
        }
    }
}

#[test]
fn console_socket_when_attached_late_replays_and_takes_input() {
    needs!(kvm);
    let harness = Harness::new();
    let socket = harness.folder.join("console");
    let output = harness.folder.join("output");
    let body = json!({"console_socket": path(&socket), "serial_out_path": path(&output)});
    harness.api.put("/serial", body.clone());
    harness.api.put("/serial", body);
    harness.boot("print:first,shell,stay");
    soon("the console's file", || {
        fs::read_to_string(&output)
            .ok()
            .filter(|text| text.contains("print:first ok"))
    });
    let mut client = UnixStream::connect(&socket).unwrap();
    console_shows(&mut client, "print:first ok");
    client.write_all(b"print:typed\n").unwrap();
    console_shows(&mut client, "print:typed ok");
    drop(client);
    for n in 0..20 {
        let mut client = UnixStream::connect(&socket).unwrap();
        client
            .write_all(format!("print:again{n}\n").as_bytes())
            .unwrap();
        let seen = console_shows(&mut client, &format!("print:again{n} ok"));
        assert!(seen.contains("print:first ok"), "{seen}");
    }
    soon("the last word in the console's file", || {
        fs::read_to_string(&output)
            .ok()
            .filter(|text| text.contains("print:again19"))
    });
    assert!(!harness.monitor.stdout().contains("print:first"));
}

#[test]
fn console_socket_when_it_can_not_be_made_is_refused() {
    let harness = Harness::new();
    let taken = harness.folder.file("taken", "");
    for place in [path(&taken), "/no/folder/console"] {
        let refused = harness
            .api
            .refused("PUT", "/serial", json!({"console_socket": place}));
        assert!(refused.contains(place), "{refused}");
    }
    let (one, two) = (harness.folder.join("one"), harness.folder.join("two"));
    harness
        .api
        .put("/serial", json!({"console_socket": path(&one)}));
    assert!(one.exists());
    harness
        .api
        .put("/serial", json!({"console_socket": path(&two)}));
    assert!(two.exists());
    common::wait_until("the first socket is removed", || !one.exists());
    harness.api.put("/serial", json!({}));
    common::wait_until("the second socket is removed", || !two.exists());
}

#[test]
fn console_when_limited_drops_what_is_too_much() {
    needs!(kvm);
    let harness = Harness::new();
    let output = harness.folder.join("output");
    harness.api.put(
        "/serial",
        json!({"serial_out_path": path(&output),
            "rate_limiter": {"size": 100, "one_time_burst": 50, "refill_time": 3_600_000}}),
    );
    harness.boot("bootinfo,print:more,print:more,print:more,print:more,stay");
    let dropped = "mayfly_console_lost_bytes_total{cause=\"limit\"}";
    soon("the limit", || {
        (sample(&harness.api, dropped) > 50.0).then_some(())
    });
    assert_eq!(fs::metadata(&output).unwrap().len(), 150);
}
