//! Hooks of config.json under `mayfly-oci`, with the real jailer: when they run, what they are told, and what a
//! failing, killed or endless one leaves behind. The guest's network is what a hook makes, as nerdctl's does.

mod common;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use common::{Folder, LINUX_PATIENCE, Netns, containers, needs};
use serde_json::{Value, json};

/// A hook: it writes down what it was told, and does what its name says.
const HOOK: &str = r#"#!/bin/sh
cat > "$OUT/$1.json"
pid=$(sed 's/.*"pid":\([0-9]*\).*/\1/' "$OUT/$1.json")
echo "$1" >> "$OUT/order"
env | sort > "$OUT/$1.env"
cat /proc/self/cgroup > "$OUT/$1.cgroup"
readlink "/proc/$pid/ns/net" > "$OUT/$1.namespace"
case $1 in
network)
    ip link add "mfh$$" type veth peer name eth0 netns "$pid" || exit 1
    inside="nsenter -t $pid -n ip"
    $inside link set eth0 address 06:11:22:33:44:77
    $inside link set eth0 up
    $inside addr add 10.77.7.2/24 dev eth0
    $inside route add default via 10.77.7.1 ;;
last) ls -d $GROUPS_OF > "$OUT/groups" 2> /dev/null || true ;;
fails)
    echo 'said by the hook'
    exit 3 ;;
hangs)
    : > "$OUT/hanging"
    exec sleep 600 ;;
prints)
    while :; do echo noise; done ;;
esac
"#;

/// An installation with a bundle, whose hosts' side is a network namespace of its own.
struct Engine {
    folder: Folder,
    netns: Netns,
    bundle: String,
    group: String,
}

impl Engine {
    fn new() -> Engine {
        let folder = Folder::new();
        containers::install_warm_runtime(&folder);
        let hook = folder.file("plain-hook", HOOK);
        containers::install(&hook, &folder.join("hook"));
        fs::create_dir_all(folder.join("bundle")).unwrap();
        containers::busybox_root(&folder.join("bundle/rootfs"), &["sh", "ip", "sleep"]);
        let number = folder.path().file_name().unwrap().display().to_string();
        Engine {
            bundle: folder.join("bundle").display().to_string(),
            folder,
            netns: Netns::new(),
            group: format!("mf-hooks-{}-{number}", std::process::id()),
        }
    }

    /// A hook by its name.
    fn hook(&self, name: &str) -> Value {
        let mount = "/sys/fs/cgroup";
        json!({
            "path": self.folder.join("hook"),
            "args": ["the-hook", name],
            "env": [
                "PATH=/usr/sbin:/usr/bin:/sbin:/bin",
                format!("OUT={}", self.folder.path().display()),
                format!("GROUPS_OF={mount}/{0} {mount}/*/{0}", self.group),
            ],
        })
    }

    /// One that is killed after a time in which it begins also on a busy host.
    fn short(&self, name: &str) -> Value {
        let mut hook = self.hook(name);
        hook["timeout"] = json!(10);
        hook
    }

    fn configure(&self, hooks: Value) {
        self.configure_with(hooks, &["sleep", "600"], json!({ "type": "network" }));
    }

    fn configure_with(&self, hooks: Value, words: &[&str], network: Value) {
        let config = json!({
            "ociVersion": "1.0.2",
            "process": {
                "args": words, "cwd": "/", "env": ["PATH=/bin"], "user": { "uid": 0, "gid": 0 },
            },
            "root": { "path": "rootfs" },
            "hooks": hooks,
            "annotations": { "key": "a value" },
            "linux": {
                "namespaces": [network],
                "cgroupsPath": format!("/{}/c1", self.group),
            },
        });
        self.folder.file("bundle/config.json", config.to_string());
    }

    fn command(&self, words: &[&str]) -> Command {
        let path = |name: &str| self.folder.join(name).display().to_string();
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.netns.0));
        command.arg(path("bin/mayfly-oci"));
        command.args(["--root", &path("state"), "--log", &path("log")]);
        command.args(["--config", &path("oci.json")]);
        command.args(words).stdin(Stdio::null());
        command
    }

    /// A `create`, whose streams are the container's.
    fn create_command(&self) -> Command {
        let out = File::create(self.folder.join("out")).unwrap();
        let pid_file = self.folder.join("pid").display().to_string();
        let words = [
            "create",
            "--bundle",
            &self.bundle,
            "--pid-file",
            &pid_file,
            "c1",
        ];
        let mut command = self.command(&words);
        command.stdout(out.try_clone().unwrap()).stderr(out);
        command
    }

    /// That a `create` fails; its message.
    fn create_fails(&self) -> String {
        let status = self.create_command().status().unwrap();
        let out = self.folder.read("out");
        assert_eq!(status.code(), Some(1), "{out}");
        out
    }

    fn works(&self, words: &[&str]) -> String {
        let output = common::output_of(self.command(words));
        assert!(output.status.success(), "{words:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn state(&self) -> Value {
        serde_json::from_str(&self.works(&["state", "c1"])).unwrap()
    }

    /// What a hook was told.
    fn told(&self, hook: &str) -> Value {
        serde_json::from_str(&self.folder.read(&format!("{hook}.json"))).unwrap()
    }

    /// The hooks that ran, in their order, from now on anew.
    fn ran(&self) -> Vec<String> {
        let order = self.folder.read("order");
        self.folder.file("order", "");
        order.lines().map(str::to_owned).collect()
    }

    fn nothing_is_left(&self) {
        assert!(!self.folder.join("state/c1").exists(), "the state folder");
        assert_eq!(containers::groups(&self.group), Vec::<PathBuf>::new());
        let folder = self.folder.path().display().to_string();
        common::wait_until("the processes to end", || {
            let entries = fs::read_dir("/proc").unwrap().flatten();
            let mut lines =
                entries.map(|it| fs::read(it.path().join("cmdline")).unwrap_or_default());
            let is_ours = |line: Vec<u8>| String::from_utf8_lossy(&line).contains(&folder);
            !lines.any(is_ours)
        });
        common::wait_until("the host's end of the network to go", || {
            !self.netns.run("ip", &["link"]).contains("mfh")
        });
    }
}

fn namespace_of(pid: &Value) -> String {
    let link = fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
    link.display().to_string()
}

#[test]
fn hooks_run_at_their_moments_and_make_the_guests_network() {
    needs!(kvm, root, guest, tun, ip, nsenter);
    let engine = Engine::new();
    let hook = |name| engine.hook(name);
    engine.configure_with(
        json!({
            "prestart": [hook("first")],
            "createRuntime": [hook("network"), hook("second")],
            "poststart": [hook("third"), hook("fails"), hook("fourth")],
            "poststop": [hook("fails"), hook("last")],
        }),
        &["sh", "-c", "ip addr show eth0; ip route; exec sleep 600"],
        json!({ "type": "network" }),
    );
    let status = engine.create_command().status().unwrap();
    assert!(status.success(), "{}", engine.folder.read("out"));
    assert_eq!(engine.ran(), ["first", "network", "second"]);
    let state = engine.state();
    assert_eq!(state["status"], "created");
    let pid = state["pid"].clone();
    assert_eq!(pid.to_string(), engine.folder.read("pid"));
    for name in ["first", "network", "second"] {
        let told = engine.told(name);
        let expected =
            json!({ "status": "creating", "pid": pid, "id": "c1", "bundle": engine.bundle });
        for (field, value) in expected.as_object().unwrap() {
            assert_eq!(&told[field], value, "{name}: {field}");
        }
        assert_eq!(told["annotations"]["key"], "a value");
        // It is the container's network namespace all the time.
        let namespace = engine.folder.read(&format!("{name}.namespace"));
        assert_eq!(namespace.trim(), namespace_of(&pid), "{name}");
        let groups = engine.folder.read(&format!("{name}.cgroup"));
        assert!(!groups.contains(&engine.group), "{name}: {groups}");
    }
    assert_ne!(namespace_of(&pid), namespace_of(&json!(std::process::id())));
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    assert!(
        groups.contains(&format!("/{}/c1", engine.group)),
        "{groups}"
    );
    let env = engine.folder.read("first.env");
    let names: Vec<_> = env
        .lines()
        .filter_map(|line| line.split('=').next())
        .collect();
    assert_eq!(names, ["GROUPS_OF", "OUT", "PATH", "PWD"], "{env}");

    // What they were is what counts.
    engine.configure(json!({}));
    engine.works(&["start", "c1"]);
    assert_eq!(engine.ran(), ["third", "fails", "fourth"]);
    let told = engine.told("fourth");
    assert_eq!((&told["status"], &told["pid"]), (&json!("running"), &pid));
    let log = engine.folder.read("log");
    let path = engine.folder.join("hook").display().to_string();
    let warning = |kind: &str, index: u32| {
        format!(
            "level=warning msg=\"cannot run the hook hooks.{kind}.{index} {path}: it ended with exit code 3; it \
             printed: said by the hook\""
        )
    };
    assert!(log.contains(&warning("poststart", 1)), "{log}");
    assert_eq!(engine.state()["status"], "running");
    common::wait_until_within(LINUX_PATIENCE, "the guest's network", || {
        engine.folder.read("out").contains("default via")
    });
    let out = engine.folder.read("out");
    for part in [
        "link/ether 06:11:22:33:44:77",
        "inet 10.77.7.2/24 ",
        "default via 10.77.7.1 dev eth0",
    ] {
        assert!(out.contains(part), "{part} in {out}");
    }

    engine.works(&["kill", "c1", "KILL"]);
    common::wait_until("its end", || engine.state()["status"] == "stopped");
    assert_eq!(engine.ran(), [""; 0]);
    engine.works(&["delete", "c1"]);
    assert_eq!(engine.ran(), ["fails", "last"]);
    let told = engine.told("last");
    assert_eq!(
        (&told["status"], &told["pid"]),
        (&json!("stopped"), &json!(0))
    );
    assert_eq!(engine.folder.read("groups"), "");
    let log = engine.folder.read("log");
    assert!(log.contains(&warning("poststop", 0)), "{log}");
    engine.nothing_is_left();
}

#[test]
fn hook_that_fails_or_does_not_end_fails_the_create() {
    needs!(root, guest, ip, nsenter);
    let engine = Engine::new();
    let hook = |name| engine.hook(name);
    let script = engine.folder.join("hook").display().to_string();
    for (kind, failing, expected) in [
        (
            "prestart",
            hook("fails"),
            "it ended with exit code 3; it printed: said by the hook",
        ),
        (
            "createRuntime",
            hook("fails"),
            "it ended with exit code 3; it printed: said by the hook",
        ),
        (
            "createRuntime",
            engine.short("hangs"),
            "it did not end within 10 seconds (its timeout), and was killed",
        ),
        ("prestart", engine.short("prints"), "noise noise noise"),
    ] {
        let mut hooks = json!({
            "createRuntime": [hook("second")], "poststart": [hook("third")], "poststop": [hook("last")],
        });
        let name = failing["args"][1].as_str().unwrap().to_owned();
        hooks[kind] = json!([hook("network"), failing, hook("fourth")]);
        engine.configure(hooks);
        let text = engine.create_fails();
        let named = format!("cannot run the hook hooks.{kind}.1 {script}: ");
        assert!(text.contains(&named) && text.contains(expected), "{text}");
        assert!(text.len() < 4096 && text.lines().count() == 1, "{text}");
        assert_eq!(engine.ran(), ["network", &name, "last"]);
        assert_eq!(engine.told("last")["status"], "stopped");
        engine.nothing_is_left();
    }
    // One that cannot be run is none at all.
    engine.configure(json!({ "createRuntime": [{ "path": "/nonexistent/hook" }] }));
    let text = engine.create_fails();
    assert!(text.contains("/nonexistent/hook: No such file"), "{text}");
    engine.configure(json!({ "startContainer": [hook("first")], "poststop": [hook("last")] }));
    let text = engine.create_fails();
    assert!(text.contains("hooks.startContainer: "), "{text}");
    assert_eq!(engine.ran(), [""; 0], "nothing was made");
    engine.nothing_is_left();
}

#[test]
fn hooks_are_in_the_engines_network_namespace_or_a_new_one() {
    needs!(root, guest, ip, nsenter);
    let engine = Engine::new();
    let own = namespace_of(&json!(std::process::id()));
    let other = Netns::new();
    let path = format!("/run/netns/{}", other.0);
    let named = other.run("readlink", &["/proc/self/ns/net"]);
    let hooks = json!({ "createRuntime": [engine.hook("first"), engine.hook("fails")] });
    let network = json!({ "type": "network", "path": path });
    engine.configure_with(hooks.clone(), &["true"], network);
    engine.create_fails();
    assert_eq!(engine.folder.read("first.namespace"), named);
    engine.configure(hooks);
    engine.create_fails();
    let new = engine.folder.read("first.namespace");
    assert!(
        new.starts_with("net:[") && new != named && new.trim() != own,
        "{new}"
    );
    // Whatever has no network then, a hook is not given the host's.
    let words = [
        "--network",
        "none",
        "create",
        "--bundle",
        &engine.bundle,
        "c1",
    ];
    let status = engine
        .command(&words)
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert_eq!(status.code(), Some(1));
    let none = engine.folder.read("first.namespace");
    assert!(none.starts_with("net:[") && none.trim() != own, "{none}");
    engine.nothing_is_left();
}

#[test]
fn create_that_is_killed_while_a_hook_runs_leaves_what_delete_removes() {
    needs!(root, guest, ip, nsenter);
    let engine = Engine::new();
    let hooks = json!({
        "createRuntime": [engine.hook("network"), engine.hook("hangs")], "poststop": [engine.hook("last")],
    });
    engine.configure(hooks);
    let mut create: Child = engine.create_command().spawn().unwrap();
    common::wait_until("the hook runs", || engine.folder.join("hanging").exists());
    let state = engine.state();
    assert_eq!(state["status"], "creating");
    let process = format!("/proc/{}", state["pid"]);
    assert!(Path::new(&process).exists());
    create.kill().unwrap();
    create.wait().unwrap();
    // The process that waits does not wait for ever.
    common::wait_until("it ends with the create", || {
        let stat = fs::read_to_string(format!("{process}/stat")).unwrap_or_default();
        stat.is_empty() || stat.contains(") Z ")
    });
    engine.works(&["delete", "--force", "c1"]);
    assert_eq!(engine.ran(), ["network", "hangs", "last"]);
    // The hook itself is the engine's to end.
    let hanging = fs::read_dir("/proc").unwrap().flatten().find(|entry| {
        let read = |name: &str| fs::read(entry.path().join(name)).unwrap_or_default();
        let out = format!("OUT={}", engine.folder.path().display());
        let is_ours = String::from_utf8_lossy(&read("environ")).contains(&out);
        is_ours && read("cmdline").starts_with(b"sleep")
    });
    let number = hanging.expect("the hook goes on").file_name();
    common::run("kill", &["-9", number.to_str().unwrap()]);
    engine.nothing_is_left();
}
