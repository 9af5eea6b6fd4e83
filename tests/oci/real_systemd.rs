//! `--systemd-cgroup` with a real systemd, as process 1 of namespaces of its own: seconds, without a guest.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;

use super::common::{self, containers, needs};
use super::{Engine, Value};

const UNIT: &str = "libpod-c1.scope";
/// Namespaces with a systemd, and an installation whose program runs in them.
struct Systemd {
    engine: Engine,
    starter: Child,
}

impl Systemd {
    fn new(mode: &str) -> Systemd {
        let engine = Engine::new(mode);
        let boot = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/oci/boot-systemd");
        let log = File::create(engine.folder.join("systemd")).unwrap();
        let mut command = Command::new(boot);
        command.arg(engine.folder.path()).arg(&engine.group);
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        let starter = command.spawn().unwrap();
        let children = format!("/proc/{0}/task/{0}/children", starter.id());
        let mut systemd = Systemd { engine, starter };
        let mut first = String::new();
        common::wait_until("there are namespaces", || {
            first = fs::read_to_string(&children)
                .unwrap_or_default()
                .trim()
                .to_owned();
            let name = fs::read_to_string(format!("/proc/{first}/comm")).unwrap_or_default();
            name.trim() == "systemd"
        });
        systemd.engine.inside = ["nsenter", "--all", "--target", &first]
            .map(str::to_owned)
            .into();
        common::wait_until("systemd has started what it is to", || {
            systemd.ask(&["is-active", "mf.target"]).trim() == "active"
        });
        systemd.limit(json!({}));
        systemd
    }

    /// What `systemctl` prints.
    fn ask(&self, words: &[&str]) -> String {
        let inside = &self.engine.inside;
        let mut command = Command::new(&inside[0]);
        command.args(&inside[1..]).arg("systemctl").args(words);
        let output = common::output_of(command);
        String::from_utf8(output.stdout).unwrap()
    }

    fn property(&self, name: &str) -> String {
        let value = self.ask(&["show", UNIT, "--value", "--property", name]);
        value.trim().to_owned()
    }

    fn limit(&self, resources: Value) {
        self.engine.configure(|config| {
            config["linux"]["cgroupsPath"] = json!("machine.slice:libpod:c1");
            config["linux"]["resources"] = resources;
        });
    }

    fn create(&self) -> Command {
        let bundle = &self.engine.bundle;
        let words = ["--systemd-cgroup", "create", "--bundle", bundle, "c1"];
        let mut command = self.engine.command(&words);
        let out = File::create(self.engine.folder.join("out")).unwrap();
        command.stdout(out.try_clone().unwrap()).stderr(out);
        command
    }

    fn created(&self) {
        let is_made = self.create().status().unwrap().success();
        let said = ["out", "log"].map(|file| self.engine.folder.read(file));
        assert!(is_made, "{said:?}");
    }

    fn groups(&self) -> Vec<std::path::PathBuf> {
        containers::groups(format!("{}/machine.slice/{UNIT}", self.engine.group))
    }

    fn memory(&self) -> u64 {
        let text = containers::read_in(&self.groups(), &["memory.limit_in_bytes", "memory.max"]);
        text.parse().unwrap()
    }

    fn nothing_is_left(&self) {
        common::wait_until("there is no unit", || {
            self.ask(&["list-units", "--all", "--plain", "--no-legend", "libpod*"])
                .is_empty()
        });
        assert!(self.groups().is_empty(), "{:?}", self.groups());
        assert!(!self.engine.folder.join("state/c1").exists());
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.engine.folder.read("systemd"));
        }
        // Its namespaces end with it.
        let _ = self.starter.kill();
        let _ = self.starter.wait();
        // They go when the last process has.
        let until = Instant::now() + Duration::from_secs(30);
        while Instant::now() < until && !self.engine.groups().is_empty() {
            for group in self.engine.groups() {
                let mut find = Command::new("find");
                find.arg(&group)
                    .args(["-depth", "-type", "d", "-exec", "rmdir", "{}", "+"]);
                let _ = common::output_of(find);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        if !std::thread::panicking() {
            assert!(self.engine.groups().is_empty(), "its control groups stay");
        }
    }
}

#[test]
fn scope_of_a_real_systemd_has_the_container_its_limits_and_its_end() {
    needs!(
        root,
        unshare,
        busctl,
        systemctl,
        "dbus-daemon",
        "/lib/systemd/systemd"
    );
    let systemd = Systemd::new("stays");
    let engine = &systemd.engine;
    systemd.limit(json!({
        "memory": { "limit": 128 << 20 }, "pids": { "limit": 100 },
        "cpu": { "quota": 50_000, "period": 100_000 },
    }));
    systemd.created();
    assert_eq!(systemd.property("ActiveState"), "active");
    assert_eq!(systemd.property("Slice"), "machine.slice");
    assert_eq!(
        (
            &*systemd.property("Delegate"),
            &*systemd.property("TasksMax")
        ),
        ("yes", "100")
    );
    for group in systemd.groups() {
        let inside = fs::read_to_string(group.join("cgroup.procs")).unwrap();
        // The stand-in for the jailer, and what it waits by.
        assert!(!inside.is_empty(), "{}", group.display());
    }
    assert_eq!(systemd.memory(), 128 << 20);
    systemd.ask(&["daemon-reload"]);
    assert_eq!(systemd.memory(), 128 << 20);

    let more = json!({ "memory": { "limit": 192 << 20 } }).to_string();
    let more = engine.folder.file("more.json", more);
    engine.works(&["update", &format!("--resources={}", more.display()), "c1"]);
    systemd.ask(&["daemon-reload"]);
    assert_eq!(systemd.memory(), 192 << 20);
    engine.works(&["start", "c1"]);
    engine.works(&["pause", "c1"]);
    assert_eq!(engine.state()["status"], "paused");
    // As podman does: without the option, and without a PATH.
    let mut delete = engine.command(&["delete", "--force", "c1"]);
    assert!(delete.env_clear().status().unwrap().success());
    systemd.nothing_is_left();

    // One that ends by itself.
    systemd.created();
    engine.works(&["start", "c1"]);
    engine.works(&["kill", "c1", "KILL"]);
    engine.waits_until_it_has_ended();
    engine.works(&["delete", "c1"]);
    systemd.nothing_is_left();

    // What a hook uses is not the container's, which waits in its scope meanwhile.
    let script =
        "cat /proc/self/cgroup >hook-groups; systemctl is-active libpod-c1.scope >hook-unit";
    engine.configure(|config| {
        let folder = engine.folder.path().display();
        config["linux"]["cgroupsPath"] = json!("machine.slice:libpod:c1");
        config["hooks"]["createRuntime"] = json!([{
            "path": "/bin/sh", "args": ["sh", "-c", format!("cd {folder} && {{ {script}; }}")],
            "env": ["PATH=/usr/bin:/bin"],
        }]);
    });
    systemd.created();
    assert_eq!(engine.folder.read("hook-unit"), "active\n");
    let groups = engine.folder.read("hook-groups");
    assert!(!groups.is_empty() && !groups.contains(UNIT), "{groups}");
    for group in systemd.groups() {
        let inside = fs::read_to_string(group.join("cgroup.procs")).unwrap();
        assert!(!inside.is_empty(), "{}", group.display());
    }
    engine.works(&["delete", "--force", "c1"]);
    systemd.nothing_is_left();
    systemd.limit(json!({}));

    engine.folder.file("mode", "ends");
    let run = ["--systemd-cgroup", "run", "--bundle", &engine.bundle, "c1"];
    let output = engine.run(&run);
    assert_eq!(
        (output.status.code(), &*output.stdout),
        (Some(7), &b"in the container\n"[..])
    );
    systemd.nothing_is_left();
}

#[test]
fn real_systemd_keeps_nothing_of_a_create_that_fails_or_is_killed() {
    needs!(
        root,
        unshare,
        busctl,
        systemctl,
        "dbus-daemon",
        "/lib/systemd/systemd"
    );
    let systemd = Systemd::new("refuses");
    let engine = &systemd.engine;
    let words = [
        "--systemd-cgroup",
        "create",
        "--bundle",
        &engine.bundle,
        "c1",
    ];
    engine.refuses(&words, "cannot run it: said by the stand-in");
    systemd.nothing_is_left();

    // Another's unit.
    engine.folder.file("mode", "stays");
    systemd.created();
    let other = [
        "--systemd-cgroup",
        "create",
        "--bundle",
        &engine.bundle,
        "c2",
    ];
    engine.refuses(&other, "systemd has a unit of this name, which is active");
    assert_eq!(systemd.property("ActiveState"), "active");
    engine.works(&["delete", "--force", "c1"]);
    systemd.nothing_is_left();

    let mut seed = u64::from(std::process::id());
    eprintln!("seed {seed}");
    for _ in 0..10 {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let mut create = systemd.create().spawn().unwrap();
        // Anywhere in it: no moment is better than another.
        std::thread::sleep(std::time::Duration::from_micros(seed >> 32 & 0x3_ffff));
        // `nsenter` is the program by then, or waits for it.
        for pid in children_of(create.id()) {
            let pid = rustix::process::Pid::from_raw(pid).unwrap();
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
        create.kill().unwrap();
        create.wait().unwrap();
        engine.works(&["delete", "--force", "c1"]);
        systemd.nothing_is_left();
    }
}

/// Children that `nsenter` starts, for a namespace of processes.
fn children_of(pid: u32) -> Vec<i32> {
    let list = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    list.split_whitespace()
        .filter_map(|pid| pid.parse().ok())
        .collect()
}
