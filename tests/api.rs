//! The API of the real monitor, over its socket: what its operations come to, in each state; and
//! HTTP as bad clients speak it. tests/matrix.rs has every operation with every kind of wrong body.

mod common;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use common::{Api, Folder, Monitor, PATIENCE, needs, read_response};
use serde_json::{Value, json};

const GET: &[u8] = b"GET /version HTTP/1.1\r\n\r\n";
const BEFORE: &str = "not supported before starting the microVM";
const AFTER: &str = "not supported after starting the microVM";

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
        let folder = Folder::new();
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

    /// With a guest that runs and does nothing.
    fn running() -> Self {
        let harness = Harness::new();
        harness.api.put("/boot-source", harness.boot_source());
        harness.api.put("/drives/d", harness.drive());
        harness.start();
        harness
    }

    fn start(&self) {
        self.api
            .put("/actions", json!({"action_type": "InstanceStart"}));
    }

    fn boot_source(&self) -> Value {
        json!({
            "kernel_image_path": path(&common::probe()),
            "initrd_path": null,
            "boot_args": "probe=stay"
        })
    }

    fn kernel_like(&self) -> Value {
        json!({"kernel_image_path": path(&self.folder.file("kernel", "no kernel")),
            "initrd_path": path(&self.folder.file("initrd", "no initrd")), "boot_args": "quiet"})
    }

    fn drive(&self) -> Value {
        let limiter = json!({"bandwidth": {"size": 1_000_000, "one_time_burst": 5, "refill_time": 100},
            "ops": {"size": 1000, "refill_time": 100}});
        json!({"drive_id": "d", "path_on_host": path(&self.folder.disk("disk", 8192)),
            "is_root_device": false, "is_read_only": false, "partuuid": null,
            "cache_type": "Unsafe", "io_engine": "Sync", "rate_limiter": limiter})
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.api.0).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// What comes back for raw bytes, up to the first response's end.
    fn raw(&self, bytes: &[u8]) -> (u16, String) {
        let mut stream = self.connect();
        stream.write_all(bytes).unwrap();
        read_response(&mut stream)
    }

    fn is_alive(&mut self) -> bool {
        self.monitor.child.try_wait().unwrap().is_none() && self.api.get("/")["state"].is_string()
    }
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn machine() -> Value {
    json!({"vcpu_count": 2, "mem_size_mib": 64, "smt": false, "track_dirty_pages": false,
        "huge_pages": "None"})
}

fn cpu_config() -> Value {
    json!({"kvm_capabilities": [], "msr_modifiers": [{"addr": "0x10a", "bitmap": "0bx1"}],
        "cpuid_modifiers": [{"leaf": "0x1", "subleaf": "0x0", "flags": 0,
            "modifiers": [{"register": "ecx", "bitmap": "0bx"}]}]})
}

/// A copy of `body` in which the member at `pointer` is `value`.
fn with(body: &Value, pointer: &str, value: Value) -> Value {
    let mut body = body.clone();
    let (parent, name) = pointer.rsplit_once('/').unwrap();
    let parent = body.pointer_mut(parent).unwrap();
    match parent {
        Value::Array(items) => items[name.parse::<usize>().unwrap()] = value,
        parent => parent[name] = value,
    }
    body
}

/// Operations with a body that are taken before the start.
fn bodies(harness: &Harness) -> Vec<(&'static str, &'static str, Value)> {
    let serial = json!({"serial_out_path": path(&harness.folder.file("console", "")),
        "rate_limiter": {"size": 1000, "refill_time": 100}});
    let logger = json!({"log_path": path(&harness.folder.file("log", "")), "level": "Debug",
        "show_level": true, "show_log_origin": false, "module": null});
    vec![
        ("PUT", "/machine-config", machine()),
        ("PATCH", "/machine-config", machine()),
        ("PUT", "/boot-source", harness.kernel_like()),
        ("PUT", "/drives/d", harness.drive()),
        ("PUT", "/cpu-config", cpu_config()),
        ("PUT", "/serial", serial),
        ("PUT", "/logger", logger),
    ]
}

#[test]
fn operations_when_good_are_taken() {
    let harness = Harness::new();
    for (method, path, body) in bodies(&harness) {
        let (status, answer) = harness.api.request(method, path, &body.to_string());
        assert_eq!(status, 204, "{method} {path}: {answer}");
        assert!(answer.is_empty());
    }
    let instance = harness.api.get("/");
    assert_eq!(instance["state"], "Not started");
    assert_eq!(instance["id"], "anonymous-instance");
    assert!(instance["app_name"].is_string() && instance["vmm_version"].is_string());
    assert_eq!(
        harness.api.get("/version"),
        json!({"firecracker_version": "1.17.0"})
    );
    assert_eq!(harness.api.get("/machine-config"), machine());
    let config = harness.api.get("/vm/config");
    assert_eq!(config["machine-config"], machine());
    assert_eq!(config["drives"][0]["drive_id"], "d");
    assert_eq!(config["boot-source"]["boot_args"], "quiet");
    assert!(config["vsock"].is_null());
    assert!(harness.api.get("/vm/timeline").is_object());
}

#[test]
fn members_when_null_are_not_always_absent() {
    let harness = Harness::new();
    let drive = harness.drive();
    let kernel = harness.kernel_like();
    let cases = [
        ("/machine-config", machine(), "/smt", 400),
        ("/machine-config", machine(), "/track_dirty_pages", 400),
        ("/machine-config", machine(), "/huge_pages", 400),
        ("/machine-config", machine(), "/cpu_template", 204),
        ("/boot-source", kernel.clone(), "/kernel_image_path", 400),
        ("/boot-source", kernel.clone(), "/boot_args", 204),
        ("/boot-source", kernel, "/initrd_path", 204),
        ("/drives/d", drive.clone(), "/cache_type", 400),
        ("/drives/d", drive.clone(), "/is_root_device", 400),
        ("/drives/d", drive.clone(), "/is_read_only", 204),
        ("/drives/d", drive.clone(), "/io_engine", 204),
        ("/drives/d", drive.clone(), "/rate_limiter", 204),
        ("/drives/d", drive.clone(), "/rate_limiter/ops", 204),
        ("/drives/d", drive.clone(), "/socket", 204),
        ("/cpu-config", cpu_config(), "/msr_modifiers", 400),
        ("/logger", json!({}), "/level", 204),
        ("/serial", json!({}), "/serial_out_path", 204),
    ];
    for (path, body, place, expected) in cases {
        let body = with(&body, place, Value::Null).to_string();
        let (status, answer) = harness.api.request("PUT", path, &body);
        assert_eq!(status, expected, "{path} {body}: {answer}");
    }
}

#[test]
fn drives_when_put_again_replace_and_root_comes_first() {
    let harness = Harness::new();
    let disk = harness.folder.disk("disk", 513);
    let put = |id: &str, root: bool| {
        let body = json!({"drive_id": id, "path_on_host": path(&disk), "is_root_device": root});
        harness
            .api
            .request("PUT", &format!("/drives/{id}"), &body.to_string())
    };
    let order = || -> Vec<String> {
        let config = harness.api.get("/vm/config");
        let drives = config["drives"].as_array().unwrap();
        drives
            .iter()
            .map(|d| d["drive_id"].as_str().unwrap().into())
            .collect()
    };
    for (id, root) in [("a", false), ("r", true), ("b", false), ("a", false)] {
        assert_eq!(put(id, root).0, 204, "{id}");
    }
    assert_eq!(order(), ["r", "a", "b"]);
    let (status, answer) = put("b", true);
    assert_eq!(status, 400);
    assert!(
        answer.contains("root block device already exists"),
        "{answer}"
    );
    assert_eq!(order(), ["r", "a", "b"]);
}

#[test]
fn sentences_when_refused_hold_the_words_that_clients_match() {
    let harness = Harness::new();
    harness.api.put("/boot-source", harness.boot_source());
    harness.api.put("/drives/d", harness.drive());
    let root = json!({"drive_id": "r", "is_root_device": true,
        "path_on_host": path(&harness.folder.disk("root", 512))});
    harness.api.put("/drives/r", root.clone());
    let again = with(&root, "/drive_id", json!("s"));
    let lost = with(&root, "/path_on_host", json!("foo.bar"));
    let both = json!({"drive_id": "d", "is_read_only": true, "path_on_host": "foo.bar"});
    let kernel = json!({"kernel_image_path": "foo.bar"});
    for (method, path, body, words) in [
        (
            "PUT",
            "/boot-source",
            kernel.clone(),
            "The kernel file cannot be opened: No such file or directory (os error 2)",
        ),
        ("PATCH", "/boot-source", kernel, "Invalid request method"),
        (
            "PATCH",
            "/logger",
            json!({"level": "Error"}),
            "Invalid request method",
        ),
        (
            "PUT",
            "/drives/r",
            lost,
            "Error manipulating the backing file: No such file or directory (os error 2) foo.bar",
        ),
        (
            "PUT",
            "/drives/s",
            again,
            "A root block device already exists",
        ),
        ("PATCH", "/drives/d", both, "unknown field `is_read_only`"),
        (
            "PUT",
            "/machine-config",
            json!({"mem_size_mib": 128}),
            "missing field `vcpu_count` at line 1 column 20.",
        ),
        (
            "PUT",
            "/machine-config",
            json!({"vcpu_count": 2}),
            "missing field `mem_size_mib` at line 1 column 16.",
        ),
        (
            "PUT",
            "/machine-config",
            json!({"vcpu_count": 2, "mem_size_mib": 1e19 * 2.0}),
            "error occurred when deserializing the json body of a request: invalid type",
        ),
        (
            "PATCH",
            "/machine-config",
            json!({"mem_size_mib": 0}),
            "The memory size (MiB) is either 0, or not a multiple of the configured page size.",
        ),
        (
            "PUT",
            "/actions",
            json!({"action_type": "FlushMetrics"}),
            "The requested operation is not supported before starting the microVM.",
        ),
    ] {
        let message = harness.api.refused(method, path, body);
        assert!(message.contains(words), "{message}");
    }
    needs!(kvm);
    harness
        .api
        .patch("/machine-config", json!({"mem_size_mib": u64::MAX}));
    let start = json!({"action_type": "InstanceStart"});
    let message = harness.api.refused("PUT", "/actions", start);
    let words =
        "Invalid Memory Configuration: Cannot create mmap region: Out of memory (os error 12)";
    assert!(message.contains(words), "{message}");
    harness
        .api
        .patch("/machine-config", json!({"mem_size_mib": 64}));
    harness.start();
    for (body, words) in [
        (
            json!({"drive_id": "d"}),
            "Running method expected different backend.",
        ),
        (
            json!({"drive_id": "d", "path_on_host": "foo.bar"}),
            "Error manipulating the backing file: No such file or directory (os error 2) foo.bar",
        ),
        (
            json!({"drive_id": "d", "io_engine": "Sync"}),
            "unknown field `io_engine`",
        ),
    ] {
        let message = harness.api.refused("PATCH", "/drives/d", body);
        assert!(message.contains(words), "{message}");
    }
}

#[test]
fn members_when_deprecated_are_told_in_a_header_and_in_the_log() {
    let harness = Harness::new();
    let head = |method: &str, body: &str| {
        let mut stream = harness.connect();
        let length = body.len();
        write!(stream, "{method} /machine-config HTTP/1.1\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 204"), "{answer}");
        answer
    };
    let deprecation = "Deprecation: true\r\n";
    let machine = r#"{"vcpu_count":1,"mem_size_mib":64"#;
    assert!(!head("PUT", &format!("{machine}}}")).contains(deprecation));
    let named = format!(r#"{machine},"cpu_template":"None"}}"#);
    assert!(head("PUT", &named).contains(deprecation));
    assert!(head("PATCH", r#"{"cpu_template":"None"}"#).contains(deprecation));
    for method in ["PUT", "PATCH"] {
        let line = format!("{method} /machine-config: cpu_template field is deprecated.");
        harness.monitor.expect(&line);
    }
}

#[test]
fn patch_when_before_the_start_changes_only_the_machine() {
    let harness = Harness::new();
    harness.api.put("/machine-config", machine());
    harness
        .api
        .patch("/machine-config", json!({"vcpu_count": 4, "smt": true}));
    let message = harness
        .api
        .refused("PATCH", "/machine-config", json!({"vcpu_count": 5}));
    assert!(message.contains("vcpu_count"), "{message}");
    for empty in [json!({}), json!({"smt": null})] {
        let message = harness.api.refused("PATCH", "/machine-config", empty);
        assert!(message.contains("Empty PATCH request"), "{message}");
    }
    let expected = with(
        &with(&machine(), "/vcpu_count", json!(4)),
        "/smt",
        json!(true),
    );
    assert_eq!(harness.api.get("/machine-config"), expected);
    harness.api.put(
        "/machine-config",
        json!({"vcpu_count": 1, "mem_size_mib": 64}),
    );
    assert_eq!(harness.api.get("/machine-config")["smt"], false);
}

#[test]
fn requests_when_before_the_start_know_their_state() {
    let harness = Harness::new();
    for (method, path, body) in [
        ("PATCH", "/vm", json!({"state": "Paused"})),
        ("PATCH", "/vm", json!({"state": "Resumed"})),
        ("PUT", "/actions", json!({"action_type": "SendCtrlAltDel"})),
        ("PUT", "/actions", json!({"action_type": "FlushMetrics"})),
        (
            "PATCH",
            "/drives/d",
            json!({"drive_id": "d", "path_on_host": "/x"}),
        ),
        ("PATCH", "/network-interfaces/n", json!({"iface_id": "n"})),
    ] {
        let message = harness.api.refused(method, path, body);
        assert!(message.contains(BEFORE), "{method} {path}: {message}");
    }
    let start = json!({"action_type": "InstanceStart"});
    let message = harness.api.refused("PUT", "/actions", start.clone());
    assert!(
        message.contains("Cannot start microvm without kernel configuration"),
        "{message}"
    );
    harness.api.put(
        "/boot-source",
        json!({"kernel_image_path": path(&harness.folder.file("empty", ""))}),
    );
    harness.api.refused("PUT", "/actions", start);
    assert_eq!(harness.api.get("/")["state"], "Not started");
}

#[test]
fn requests_when_after_the_start_know_their_state() {
    needs!(kvm);
    let harness = Harness::running();
    for state in ["Running", "Paused"] {
        if state == "Paused" {
            harness.api.patch("/vm", json!({"state": "Paused"}));
            harness.api.patch("/vm", json!({"state": "Paused"}));
        }
        assert_eq!(harness.api.get("/")["state"], state);
        for (method, path, body) in bodies(&harness) {
            let message = harness.api.refused(method, path, body);
            assert!(message.contains(AFTER), "{method} {path}: {message}");
        }
        for (method, path, body) in [
            ("PUT", "/actions", json!({"action_type": "InstanceStart"})),
            (
                "PUT",
                "/network-interfaces/n",
                json!({"iface_id": "n", "host_dev_name": "mf-api0"}),
            ),
            (
                "PUT",
                "/metrics",
                json!({"metrics_path": path(&harness.folder.join("metrics"))}),
            ),
        ] {
            let message = harness.api.refused(method, path, body);
            assert!(message.contains(AFTER), "{method} {path}: {message}");
        }
        harness
            .api
            .put("/actions", json!({"action_type": "FlushMetrics"}));
        harness
            .api
            .refused("PATCH", "/drives/d", json!({"drive_id": "d"}));
        harness.api.refused(
            "PATCH",
            "/drives/d",
            json!({"drive_id": "d", "rate_limiter": null}),
        );
        harness.api.refused(
            "PATCH",
            "/drives/nobody",
            json!({"drive_id": "nobody", "path_on_host": "/x"}),
        );
        harness.api.refused(
            "PATCH",
            "/drives/d",
            json!({"drive_id": "d", "path_on_host": "/does/not/exist"}),
        );
        for path in [
            "/",
            "/version",
            "/machine-config",
            "/vm/config",
            "/vm/timeline",
        ] {
            harness.api.get(path);
        }
    }
    harness.api.patch("/vm", json!({"state": "Resumed"}));
    harness.api.patch("/vm", json!({"state": "Resumed"}));
    assert_eq!(harness.api.get("/")["state"], "Running");
}

#[test]
fn start_when_it_failed_can_be_asked_for_again() {
    needs!(kvm);
    let harness = Harness::new();
    harness.api.put("/boot-source", harness.boot_source());
    harness.api.put(
        "/machine-config",
        json!({"vcpu_count": 1, "mem_size_mib": u64::MAX}),
    );
    let start = json!({"action_type": "InstanceStart"});
    let message = harness.api.refused("PUT", "/actions", start);
    assert!(message.contains("mem"), "{message}");
    assert_eq!(harness.api.get("/")["state"], "Not started");
    harness.api.put(
        "/machine-config",
        json!({"vcpu_count": 1, "mem_size_mib": 64}),
    );
    harness.start();
    assert_eq!(harness.api.get("/")["state"], "Running");
}

#[test]
fn paths_when_odd_are_read_as_the_original_does() {
    let harness = Harness::new();
    for (method, path, body, expected) in [
        ("GET", "//version", "", 200),
        ("GET", "/version/x", "", 200),
        ("GET", "///", "", 200),
        ("GET", "/vm/config/x", "", 200),
        ("GET", "http://localhost/version", "", 200),
        ("GET", "/vm", "", 400),
        ("GET", "/vm//config", "", 400),
        ("GET", "/version?x=1", "", 400),
        ("GET", "/%76ersion", "", 400),
        ("GET", "/version", "{}", 400),
        ("PUT", "/machine-config", "", 400),
        ("PATCH", "/machine-config", "", 400),
        ("PATCH", "/boot-source", "{}", 400),
        ("DELETE", "/drives/d", "", 400),
        ("DELETE", "/", "", 400),
        ("PUT", "/nope", "{}", 400),
    ] {
        let (status, answer) = harness.api.request(method, path, body);
        assert_eq!(status, expected, "{method} {path}: {answer}");
        assert_eq!(status == 400, answer.contains("fault_message"));
    }
}

#[test]
fn endpoints_when_out_of_scope_say_so() {
    let harness = Harness::new();
    for (method, path, body) in [
        ("PUT", "/vsock", json!({"guest_cid": 3, "uds_path": "/s"})),
        ("PUT", "/balloon", json!({"amount_mib": 1})),
        ("PATCH", "/balloon/statistics", json!({})),
        ("PUT", "/mmds", json!({})),
        ("PUT", "/mmds/config", json!({})),
        ("PUT", "/entropy", json!({})),
        ("PUT", "/pmem/p", json!({})),
        ("PUT", "/hotplug/memory", json!({})),
    ] {
        let message = harness.api.refused(method, path, body);
        assert!(message.contains("out of scope"), "{message}");
    }
}

#[test]
fn http_when_malformed_gets_one_400_and_harms_nobody() {
    let mut harness = Harness::new();
    let long_line = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(1100));
    let long_header = format!("GET / HTTP/1.1\r\nA: {}\r\n\r\n", "x".repeat(1100));
    let cases: Vec<&[u8]> = vec![
        b"FOO\r\n\r\n",
        b"\r\n\r\n",
        b"POST / HTTP/1.1\r\n\r\n",
        b"get / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/2.0\r\n\r\n",
        b"GET  HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\n\n",
        b"GET /\xff HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nfoo\r\n\r\n",
        b"GET / HTTP/1.1\r\na: b\r\n c\r\n\r\n",
        b"PUT / HTTP/1.1\r\nContent-Length: x\r\n\r\n",
        b"PUT / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"PUT / HTTP/1.1\r\nContent-Length: 51201\r\n\r\n",
        b"PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        b"GET /version HTTP/1.1\r\n\r\nFOO\r\n\r\nGET /version HTTP/1.1\r\n\r\n",
        long_line.as_bytes(),
        long_header.as_bytes(),
    ];
    for bytes in cases {
        let (status, answer) = harness.raw(bytes);
        let shown = String::from_utf8_lossy(bytes);
        assert_eq!(status, 400, "{shown}");
        let answer: Value = serde_json::from_str(&answer).unwrap();
        assert!(answer["error"].is_string(), "{shown}: {answer}");
    }
    assert!(harness.is_alive());
}

#[test]
fn client_when_refused_while_it_writes_gets_the_400_and_then_the_end() {
    let harness = Harness::new();
    let long_line = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(1100));
    let cases: [&[u8]; 6] = [
        b"PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"PUT / HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"PUT / HTTP/1.1\r\nContent-Length: 4194304\r\n\r\n",
        b"PUT / HTTP/1.1\r\nContent-Length: 51201\r\nConnection: close\r\n\r\n",
        b"GET / HTTP/1.1\n\n",
        long_line.as_bytes(),
    ];
    for bytes in cases {
        let shown = String::from_utf8_lossy(bytes);
        let mut stream = harness.connect();
        stream.write_all(bytes).unwrap();
        // As clients do that look at the answer when they have sent everything. Each block is a
        // write of its own, so that most are written when the answer is there.
        for _ in 0..64 {
            stream.write_all(&[b'x'; 1 << 16]).unwrap();
        }
        assert_eq!(read_response(&mut stream).0, 400, "{shown}");
        assert_eq!(stream.read(&mut [0]).unwrap(), 0, "{shown}");
    }
    // One that has its answer and does not close its side is not waited for.
    let mut stream = harness.connect();
    stream.write_all(b"GET / HTTP/1.1\n\n").unwrap();
    assert_eq!(read_response(&mut stream).0, 400);
    common::wait_until("the end of the connection", || {
        stream.write_all(b"x").is_err()
    });
    harness.api.get("/");
}

#[test]
fn http_when_pipelined_answers_in_order_also_after_400() {
    let harness = Harness::new();
    let mut stream = harness.connect();
    let nope = b"GET /nope HTTP/1.1\r\n\r\n".as_slice();
    stream
        .write_all(&[GET, nope, GET].concat().repeat(20))
        .unwrap();
    for _ in 0..20 {
        let answers = [(); 3].map(|()| read_response(&mut stream).0);
        assert_eq!(answers, [200, 400, 200]);
    }
}

#[test]
fn http_when_of_version_1_0_keeps_the_connection() {
    let harness = Harness::new();
    let mut stream = harness.connect();
    for _ in 0..3 {
        stream.write_all(b"GET /version HTTP/1.0\r\n\r\n").unwrap();
        assert_eq!(read_response(&mut stream).0, 200);
    }
    stream
        .write_all(b"GET /version HTTP/1.0\r\nConnection: close\r\n\r\n")
        .unwrap();
    assert_eq!(read_response(&mut stream).0, 200);
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
}

#[test]
fn http_when_in_pieces_or_expected_is_taken() {
    let harness = Harness::new();
    let mut stream = harness.connect();
    let body = machine().to_string();
    let head = format!(
        "PUT /machine-config HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    for byte in head.bytes() {
        stream.write_all(&[byte]).unwrap();
    }
    assert_eq!(read_response(&mut stream).0, 100);
    for byte in body.bytes() {
        stream.write_all(&[byte]).unwrap();
    }
    assert_eq!(read_response(&mut stream).0, 204);
    let largest = format!("{body}{}", " ".repeat(51_200 - body.len()));
    let (status, _) = harness.api.request("PUT", "/machine-config", &largest);
    assert_eq!(status, 204);
    let small = Harness::with(&["--http-api-max-payload-size", "10"]);
    let (status, answer) = small.api.request("PUT", "/machine-config", &body);
    assert_eq!(status, 400);
    assert!(answer.contains("limit of 10"), "{answer}");
}

#[test]
fn clients_when_they_stall_delay_nobody() {
    let harness = Harness::new();
    let mut half = harness.connect();
    half.write_all(b"GET /ver").unwrap();
    let mut greedy = harness.connect();
    greedy
        .set_write_timeout(Some(Duration::from_millis(200)))
        .unwrap();
    while greedy.write_all(&GET.repeat(1000)).is_ok() {}
    // These two never go on by themselves: an answer at all shows that they are not waited for.
    for _ in 0..50 {
        harness.api.get("/version");
    }
    half.write_all(b"sion HTTP/1.1\r\n\r\n").unwrap();
    assert_eq!(read_response(&mut half).0, 200);
    let mut ended = harness.connect();
    ended.write_all(GET).unwrap();
    ended.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_response(&mut ended).0, 200);
    assert_eq!(ended.read(&mut [0]).unwrap(), 0);
}

#[test]
fn api_when_the_monitor_has_few_descriptors_goes_on() {
    let folder = Folder::new();
    let socket = folder.join("api.socket");
    let mut command = std::process::Command::new("sh");
    command.args([
        "-c",
        "ulimit -n 32; exec \"$0\" --api-sock \"$1\"",
        path(&common::mayfly()),
        path(&socket),
    ]);
    let mut monitor = Monitor::spawn(command);
    let api = Api::at(&socket);
    let mut open = Vec::new();
    for _ in 0..60 {
        let mut stream = UnixStream::connect(&socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(GET).unwrap();
        assert_eq!(read_response(&mut stream).0, 200);
        open.push(stream);
    }
    api.get("/");
    assert!(monitor.child.try_wait().unwrap().is_none());
}

#[test]
fn socket_when_it_exists_is_an_error() {
    let harness = Harness::new();
    let mut second = Monitor::start(["--api-sock", path(&harness.api.0)]);
    second.exits_with(1);
    assert!(
        second.stderr().contains("already used"),
        "{}",
        second.stderr()
    );
    harness.api.get("/");
}

#[test]
fn command_line_when_bad_ends_with_its_code() {
    for (args, code) in [
        (vec!["--foo"], 153),
        (vec!["--id=a"], 153),
        (vec!["--id", "a", "--id", "b"], 153),
        (vec!["--no-api"], 153),
        (vec!["--seccomp-filter", "x"], 153),
        (vec!["--enable-pci"], 153),
        (vec!["--level", "loud"], 152),
        (vec!["--no-api", "--config-file", "/does/not/exist"], 1),
        (vec!["--snapshot", "fd:3"], 153),
        (vec!["--describe-snapshot", "/does/not/exist"], 1),
        (vec!["--snapshot-version"], 0),
        (vec!["--version"], 0),
        (vec!["-h"], 0),
    ] {
        let mut monitor = Monitor::start(&args);
        monitor.exits_with(code);
        let said = if code == 0 {
            monitor.stdout()
        } else {
            monitor.stderr()
        };
        assert!(!said.is_empty(), "{args:?}");
    }
}

#[test]
fn describe_snapshot_when_given_a_file_tells_its_version_or_what_is_wrong() {
    use mayfly::snapshot::{
        FIRST_VERSION, Header, Kind, MemoryImage, SnapshotId, VERSION, encode, version,
    };
    let folder = Folder::new();
    let header = Header {
        version: VERSION,
        id: SnapshotId([1; 16]),
        kind: Kind::Full,
        parent: None,
        memory: MemoryImage {
            len: 0,
            check: None,
            id_at: 0,
        },
        taken: 0,
    };
    let whole = encode(&header, &0).unwrap();
    let first = Header {
        version: FIRST_VERSION,
        ..header
    };
    let first = encode(&first, &0).unwrap();
    let mut newer = whole.clone();
    newer[8] = 2;
    let mut newer_minor = whole.clone();
    newer_minor[10] += 1;
    let mut latest = Monitor::start(["--snapshot-version"]);
    latest.exits_with(0);
    assert_eq!(latest.stdout(), format!("{}\n", version(VERSION)));
    for (bytes, told) in [
        (&whole[..], Ok(VERSION)),
        (&first, Ok(FIRST_VERSION)),
        (&whole[..40], Err("is truncated: it has 40 of")),
        (&newer, Err("has version v2.1.0 of the format")),
        (&newer_minor, Err("has version v1.2.0 of the format")),
        (b"text", Err("is not a snapshot of mayfly")),
    ] {
        let file = folder.join("state");
        std::fs::write(&file, bytes).unwrap();
        let mut monitor = Monitor::start(["--describe-snapshot", path(&file)]);
        match told {
            Ok(told) => {
                monitor.exits_with(0);
                assert_eq!(monitor.stdout(), format!("{}\n", version(told)));
                assert_eq!(monitor.stderr(), "");
            }
            Err(reason) => {
                monitor.exits_with(1);
                assert!(monitor.stderr().contains(reason), "{}", monitor.stderr());
            }
        }
    }
    let fifo = folder.join("fifo");
    common::run("mkfifo", &[path(&fifo)]);
    let mut monitor = Monitor::start(["--describe-snapshot", path(&fifo)]);
    monitor.exits_with(1);
    assert!(
        monitor.stderr().contains("is a FIFO"),
        "{}",
        monitor.stderr()
    );
}

#[test]
fn config_file_when_bad_names_the_reason() {
    let folder = Folder::new();
    let cases: [(&[u8], &str); 5] = [
        (b"{}", "missing field"),
        (b"\xff", "UTF-8"),
        (br#"{"boot-source":{"kernel_image_path":"/k"}}"#, "drives"),
        (
            br#"{"boot-source":{"kernel_image_path":"/k"},"drives":[],"vsock":{}}"#,
            "`vsock` is out of scope",
        ),
        (
            br#"{"boot-source":{"kernel_image_path":"/does/not/exist"},"drives":[]}"#,
            "/does/not/exist",
        ),
    ];
    for (text, reason) in cases {
        let file = folder.file("vm.json", text);
        let mut monitor = Monitor::start(["--no-api", "--config-file", path(&file)]);
        monitor.exits_with(1);
        assert!(monitor.stderr().contains(reason), "{}", monitor.stderr());
    }
}
