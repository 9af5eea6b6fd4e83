//! `mayfly-oci` as engines call it, with a stand-in for the jailer: what it makes, asks and removes, and that
//! nothing is left whichever command fails or is killed. With real guests and a real engine: tests/podman.rs.

mod common;
#[path = "oci/pods.rs"]
mod pods;
#[path = "oci/real_systemd.rs"]
mod real_systemd;
#[path = "oci/systemd.rs"]
mod systemd;

use std::fs;
use std::io::Read as _;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};

use common::{Folder, containers, needs};
use serde_json::{Value, json};

/// Stands in for the jailer, in the container's folder. What it is to do stands in files of the bundle; what
/// it was told, in `calls`.
const JAILER: &str = r#"#!/bin/sh
here=$(dirname "$0")
echo "$*" >> "$here/calls"
mode=$(cat "$here/mode")
command=$1
[ -e "$here/silent" ] && exec sleep 600
case $command in
run)
    if grep -q '"terminal":true' process.json && ! [ -t 1 ]; then
        case "$*" in *--console-socket*) ;; *) exit 125 ;; esac
    fi
    while [ $# -gt 0 ]; do
        [ "$1" = --ready-fd ] && ready=$2
        [ "$1" = --net-from-namespace ] && echo "$2" > "$here/network"
        shift
    done
    if [ "$mode" = refuses ]; then
        echo 'mayfly-jailer: cannot run it: said by the stand-in' >&2
        echo '{"sentence": "cannot run it: said by the stand-in"}' > exit.json
        exit 125
    fi
    if [ "$mode" = hangs ]; then
        : > "$here/hanging"
        exec sleep 600
    fi
    echo "in the container"
    echo created > status
    trap 'exit 33' TERM
    eval "printf 1 >&$ready; exec $ready>&-"
    while :; do
        case $(cat status) in
        running) [ "$mode" = ends ] && exit 7 ;;
        15) exit 143 ;;
        esac
        sleep 0.01
    done ;;
prepare)
    while [ "$1" != --words-fd ]; do shift; done
    exec python3 -c '
import os, signal, sys
program, socket = sys.argv[1], int(sys.argv[2])
os.write(socket, b"1")
length = int.from_bytes(os.read(socket, 4), sys.byteorder)
if not length:
    signal.pause()
words = b""
while len(words) < length:
    words += os.read(socket, length - len(words)) or sys.exit(1)
os.execv(program, [program.encode(), *words.split(b"\0")[:-1]])
' "$0" "$2" ;;
start) echo running > status ;;
signal) echo "$3" > status ;;
state) echo "{\"status\": \"$(cat status)\"}" ;;
exec)
    process=$6
    case $process in fd:*) process=/dev/fd/${process#fd:} ;; esac
    cat "$process"
    exit 5 ;;
esac
"#;

/// An installation with a stand-in, a state folder, and a bundle.
struct Engine {
    folder: Folder,
    bundle: String,
    /// The control group above the containers'.
    group: String,
    /// The words by which a program runs in the namespaces of a test.
    inside: Vec<String>,
}

impl Engine {
    fn new(mode: &str) -> Engine {
        let folder = Folder::new();
        let group = format!(
            "mf-oci-{}-{}",
            std::process::id(),
            folder.path().file_name().unwrap().display()
        );
        containers::install(&common::oci(), &folder.join("mayfly-oci"));
        let jailer = folder.file("jailer", JAILER);
        containers::install(&jailer, &folder.join("mayfly-jailer"));
        let settings = json!({ "kernel": folder.join("vmlinux"), "cache": folder.join("cache") });
        folder.file("oci.json", settings.to_string());
        folder.file("mode", mode);
        folder.file("calls", "");
        folder.file("vmlinux", "");
        fs::create_dir_all(folder.join("bundle/rootfs/etc")).unwrap();
        folder.file("bundle/rootfs/etc/plain", "");
        let engine = Engine {
            bundle: folder.join("bundle").display().to_string(),
            folder,
            group,
            inside: Vec::new(),
        };
        engine.configure(|_| {});
        engine
    }

    /// Writes the bundle's config.json.
    fn configure(&self, change: impl FnOnce(&mut Value)) {
        let mut config = json!({
            "ociVersion": "1.0.2",
            "process": { "args": ["true"], "cwd": "/", "env": ["A=1"], "user": { "uid": 0, "gid": 0 } },
            "root": { "path": "rootfs" },
            "linux": {
                "namespaces": [{ "type": "network" }],
                "cgroupsPath": format!("/{}/c1", self.group),
            },
        });
        change(&mut config);
        self.folder.file("bundle/config.json", config.to_string());
    }

    /// The program, with a log.
    fn command(&self, words: &[&str]) -> Command {
        let path = |name: &str| self.folder.join(name).display().to_string();
        let mut words_before = self.inside.clone();
        words_before.push(path("mayfly-oci"));
        let mut command = Command::new(&words_before[0]);
        command.args(&words_before[1..]);
        let log = path("log");
        command.args([
            "--root",
            &path("state"),
            "--log",
            &log,
            "--log-format=json",
            "--config",
            &path("oci.json"),
        ]);
        command.args(words).stdin(Stdio::null());
        command
    }

    fn run(&self, words: &[&str]) -> Output {
        let output = common::output_of(self.command(words));
        eprintln!("{words:?}: {output:?}");
        output
    }

    fn works(&self, words: &[&str]) -> String {
        let output = self.run(words);
        assert!(output.status.success(), "{words:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// What it is refused for, which stands in the log too.
    fn refused(&self, words: &[&str]) -> String {
        let output = self.run(words);
        assert!(!output.status.success(), "{words:?}");
        let log = self.folder.read("log");
        let last: Value = serde_json::from_str(log.lines().last().unwrap()).unwrap();
        assert_eq!(last["level"], "error");
        let text = last["msg"].as_str().unwrap().to_owned();
        let told = String::from_utf8(output.stderr).unwrap();
        assert_eq!(told.matches(&text).count(), 1, "told once: {told}");
        text
    }

    /// That it is refused for a reason with these words.
    fn refuses(&self, words: &[&str], why: &str) {
        let text = self.refused(words);
        assert!(text.contains(why), "{words:?}: {text}");
    }

    /// The words of a command that makes a container of the bundle.
    fn of_bundle<'a>(&'a self, command: &'a str, id: &'a str) -> [&'a str; 4] {
        [command, "--bundle", &self.bundle, id]
    }

    /// The streams of `create` are the container's, which outlive it.
    fn create(&self) {
        let out = fs::File::create(self.folder.join("out")).unwrap();
        let pid_file = self.folder.join("pid").display().to_string();
        let [create, option, bundle, id] = self.of_bundle("create", "c1");
        let mut command = self.command(&[create, option, bundle, "--pid-file", &pid_file, id]);
        let status = command
            .stdout(out.try_clone().unwrap())
            .stderr(out)
            .status()
            .unwrap();
        assert!(status.success(), "{}", self.folder.read("out"));
    }

    /// A `create` to be killed.
    fn spawn_create(&self) -> Child {
        let mut create = self.command(&self.of_bundle("create", "c1"));
        create.stdout(Stdio::null()).stderr(Stdio::null());
        create.spawn().unwrap()
    }

    fn state(&self) -> Value {
        serde_json::from_str(&self.works(&["state", "c1"])).unwrap()
    }

    /// The groups above the container's, in all hierarchies.
    fn groups(&self) -> Vec<PathBuf> {
        containers::groups(&self.group)
    }

    fn waits_until_it_has_ended(&self) {
        common::wait_until("the container has ended", || {
            self.state()["status"] == "stopped"
        });
    }

    /// That `delete --force` leaves nothing of the container.
    fn delete_removes_all(&self) {
        self.works(&["delete", "--force", "c1"]);
        self.nothing_is_left();
    }

    fn nothing_is_left(&self) {
        assert!(!self.folder.join("state/c1").exists(), "the state folder");
        assert_eq!(self.groups(), Vec::<PathBuf>::new());
        let folder = self.folder.path().display().to_string();
        for entry in fs::read_dir("/run/mayfly-oci.users")
            .into_iter()
            .flatten()
            .flatten()
        {
            // Others' tests take and give theirs meanwhile.
            let owner = fs::read_to_string(entry.path()).unwrap_or_default();
            assert!(!owner.starts_with(&folder), "{entry:?}");
        }
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line);
            let is_left = line.contains(&folder) && line.contains("mayfly-jailer");
            assert!(!is_left, "{line}");
        }
    }
}

#[test]
fn container_from_create_to_delete() {
    needs!(root);
    let engine = Engine::new("stays");
    engine.create();
    let state = engine.state();
    assert_eq!(
        (&state["status"], &state["id"]),
        (&json!("created"), &json!("c1"))
    );
    assert_eq!(state["pid"].to_string(), engine.folder.read("pid"));
    let group = &engine.groups()[0];
    let inside = fs::read_to_string(group.join("c1/cgroup.procs")).unwrap();
    assert!(
        inside.lines().any(|pid| pid == engine.folder.read("pid")),
        "{inside}"
    );

    engine.works(&["start", "c1"]);
    assert_eq!(engine.state()["status"], "running");
    engine.refuses(&["start", "c1"], "it is running");
    engine.refuses(&["delete", "c1"], "it is running");
    engine.works(&["pause", "c1"]);
    assert_eq!(engine.state()["status"], "paused");
    engine.refuses(&["exec", "c1", "true"], "it is paused");
    engine.refuses(&["kill", "c1", "15"], "it is paused");
    engine.works(&["resume", "c1"]);
    engine.refuses(&["resume", "c1"], "it is running");
    let pid = engine.folder.read("pid");
    assert_eq!(engine.works(&["ps", "c1"]), format!("PID\n{pid}\n"));
    assert_eq!(
        engine.works(&["ps", "-format", "json", "c1"]),
        format!("[{}]\n", engine.folder.read("pid"))
    );

    engine.works(&["kill", "c1", "15"]);
    engine.waits_until_it_has_ended();
    assert_eq!(engine.state()["pid"], 0);
    engine.refuses(&["kill", "c1", "KILL"], "container not running");
    engine.refuses(&["exec", "c1", "true"], "container not running");
    engine.works(&["delete", "c1"]);
    assert_eq!(engine.folder.read("out"), "in the container\n");
    engine.nothing_is_left();

    engine.refuses(&["state", "c1"], "container does not exist");
    engine.refuses(&["delete", "c1"], "container does not exist");
    engine.works(&["delete", "--force", "c1"]);
}

#[test]
fn jailer_is_told_what_config_json_asks_for() {
    needs!(root);
    let engine = Engine::new("stays");
    let hosts = engine.folder.file("bundle/hosts", "");
    engine.configure(|config| {
        config["root"]["readonly"] = json!(true);
        config["hostname"] = json!("box");
        config["mounts"] = json!([
            { "destination": "/proc", "type": "proc" },
            { "destination": "/etc/hosts", "type": "bind", "source": hosts, "options": ["bind"] },
            { "destination": "/run", "type": "tmpfs", "options": ["size=1m", "mode=700"] },
        ]);
        config["linux"]["resources"] = json!({
            "memory": { "limit": 128 << 20 }, "cpu": { "quota": 150_000, "period": 100_000 },
        });
    });
    engine.create();
    let calls = engine.folder.read("calls");
    let disk = engine.folder.join("cache/disks");
    for words in [
        "run --id c1 --runtime-dir run ".to_owned(),
        format!("--image {}/", disk.display()),
        ".erofs:ro --kernel ".into(),
        format!("--copy-in {}:/etc/hosts ", hosts.display()),
        "--memory 112 --vcpus 2 --hostname box ".into(),
        "--tmpfs /run:size=1m,mode=700".into(),
    ] {
        assert!(calls.contains(&words), "{words}: {calls}");
    }
    assert!(!calls.contains("--template"), "{calls}");
    engine.works(&["delete", "-force", "c1"]);

    let templates = engine.folder.join("templates");
    let path = |name: &str| engine.folder.join(name);
    let settings =
        json!({ "kernel": path("vmlinux"), "cache": path("cache"), "templates": templates });
    engine.folder.file("oci.json", settings.to_string());
    engine.create();
    let calls = engine.folder.read("calls");
    let words = format!(
        "--vcpus 2 --template {} --hostname box ",
        templates.display()
    );
    assert!(calls.contains(&words), "{words}: {calls}");
    engine.works(&["delete", "-force", "c1"]);
    engine.nothing_is_left();
}

#[test]
fn limits_are_in_the_groups_and_change_with_update() {
    needs!(root, cgroup1);
    let engine = Engine::new("stays");
    engine.configure(|config| {
        config["linux"]["resources"] = json!({
            "memory": { "limit": 128 << 20 }, "pids": { "limit": 100 }, "cpu": { "shares": 512, "cpus": "0" },
        });
    });
    engine.create();
    let read = |files: &[&str]| {
        containers::read_in(&containers::groups(format!("{}/c1", engine.group)), files)
    };
    let memory = ["memory.limit_in_bytes", "memory.max"];
    assert_eq!(read(&memory), (128 << 20).to_string());
    assert_eq!(read(&["pids.max"]), "100");
    assert_eq!(read(&["cpuset.cpus"]), "0");
    let more = engine.folder.file(
        "more.json",
        json!({ "memory": { "limit": 192 << 20 } }).to_string(),
    );
    engine.works(&["update", &format!("--resources={}", more.display()), "c1"]);
    assert_eq!(read(&memory), (192 << 20).to_string());
    let nothing = engine.folder.file("nothing.json", "");
    let nothing = nothing.display().to_string();
    engine.refuses(
        &["update", "--resources", &nothing, "c1"],
        "understand the resources",
    );
    engine.delete_removes_all();
}

#[test]
fn create_that_fails_says_why_once_and_leaves_nothing() {
    needs!(root);
    let engine = Engine::new("refuses");
    let create = engine.of_bundle("create", "c1");
    assert_eq!(
        engine.refused(&create),
        "cannot run it: said by the stand-in"
    );
    engine.nothing_is_left();

    engine.configure(|config| {
        config["linux"]["resources"] = json!({ "cpu": { "cpus": "4096" } });
    });
    engine.refuses(&create, "cpuset.cpus");
    engine.nothing_is_left();

    let path = json!([{ "type": "network", "path": "/run/netns/x" }]);
    engine.configure(|config| config["linux"]["namespaces"] = path);
    engine.refuses(&create, "cannot run it: said by the stand-in");
    let network = fs::read_to_string(engine.folder.join("network"));
    assert_eq!(network.unwrap(), "/run/netns/x\n");

    let folder = json!([{ "destination": "/x", "type": "bind", "source": "/usr", "options": ["rbind", "rw"] }]);
    engine.configure(|config| config["mounts"] = folder);
    let text = engine.refused(&create);
    assert!(
        text.contains("mounts.0 (/x)") && text.contains(":ro"),
        "{text}"
    );
    engine.configure(|config| config["process"]["terminal"] = json!(true));
    engine.refuses(&create, "--console-socket");
    fs::remove_file(engine.folder.join("bundle/config.json")).unwrap();
    engine.refuses(&create, "config.json");
    engine.nothing_is_left();
}

#[test]
fn create_that_is_killed_leaves_what_delete_removes() {
    needs!(root);
    let engine = Engine::new("hangs");
    let mut create = engine.spawn_create();
    common::wait_until("the jailer runs", || engine.folder.join("hanging").exists());
    assert_eq!(engine.state()["status"], "creating");
    create.kill().unwrap();
    create.wait().unwrap();
    assert!(!engine.groups().is_empty());
    engine.refuses(&engine.of_bundle("create", "c1"), "already exists");
    engine.delete_removes_all();
}

#[test]
fn create_that_is_killed_at_any_moment_leaves_what_delete_removes() {
    needs!(root);
    let engine = Engine::new("stays");
    let mut seed = u64::from(std::process::id());
    eprintln!("seed {seed}");
    for _ in 0..40 {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let mut create = engine.spawn_create();
        // Anywhere in it: no moment is better than another.
        std::thread::sleep(std::time::Duration::from_micros(seed >> 32 & 0x7fff));
        create.kill().unwrap();
        create.wait().unwrap();
        // By a link to the state folder, as /var/run is.
        let _ = std::os::unix::fs::symlink("state", engine.folder.join("link"));
        let link = engine.folder.join("link").display().to_string();
        engine.works(&["--root", &link, "delete", "--force", "c1"]);
        engine.nothing_is_left();
    }
}

#[test]
fn run_waits_for_the_end_and_has_its_code() {
    needs!(root);
    let engine = Engine::new("ends");
    let run = engine.of_bundle("run", "c1");
    // The config.json that `spec` writes asks for a terminal, which this test's streams are not.
    engine.configure(|config| config["process"]["terminal"] = json!(true));
    let output = engine.run(&run);
    assert_eq!(
        (output.status.code(), &*output.stdout),
        (Some(7), &b"in the container\n"[..])
    );
    let log = fs::read_to_string(engine.folder.join("log")).unwrap();
    assert!(log.contains("process.terminal is left out"), "{log}");
    engine.nothing_is_left();

    engine.folder.file("mode", "stays");
    let mut child = engine.command(&run).stdout(Stdio::piped()).spawn().unwrap();
    common::wait_until("it runs", || {
        engine
            .run(&["state", "c1"])
            .stdout
            .windows(9)
            .any(|it| it == b"\"running\"")
    });
    signal(&child, rustix::process::Signal::TERM);
    let mut text = String::new();
    child
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut text)
        .unwrap();
    // The stand-in's own code for a signal that it was sent.
    assert_eq!(child.wait().unwrap().code(), Some(33));
    engine.nothing_is_left();

    engine.folder.file("mode", "refuses");
    assert_eq!(engine.run(&run).status.code(), Some(125));
    engine.nothing_is_left();
}

fn signal(child: &Child, signal: rustix::process::Signal) {
    rustix::process::kill_process(rustix::process::Pid::from_child(child), signal).unwrap();
}

#[test]
fn container_that_stands_still_ends_with_kill_or_delete() {
    needs!(root);
    for command in [&["kill", "c1", "9"][..], &["delete", "--force", "c1"]] {
        let engine = Engine::new("stays");
        engine.create();
        engine.works(&["start", "c1"]);
        engine.works(&["pause", "c1"]);
        engine.works(command);
        if command[0] == "kill" {
            engine.waits_until_it_has_ended();
            engine.works(&["delete", "c1"]);
        }
        engine.nothing_is_left();
    }
}

#[test]
fn exec_becomes_the_jailer_with_a_process() {
    needs!(root);
    let engine = Engine::new("stays");
    engine.create();
    engine.works(&["start", "c1"]);
    let output = engine.run(&[
        "exec", "-cwd", "/tmp", "-env", "B=2", "-user", "5:6", "c1", "id", "-u",
    ]);
    let process: Value = serde_json::from_slice(&output.stdout).unwrap();
    let expected = json!({
        "args": ["id", "-u"], "cwd": "/tmp", "env": ["A=1", "B=2"], "terminal": false, "user": { "uid": 5, "gid": 6 },
    });
    assert_eq!((output.status.code(), process), (Some(5), expected));
    let file = engine.folder.file("process.json", "{\"args\": [\"x\"]}");
    let output = engine.run(&[
        "exec",
        "--process",
        file.to_str().unwrap(),
        "--detach",
        "c1",
    ]);
    assert_eq!(&*output.stdout, b"{\"args\": [\"x\"]}");
    // The microVM ends whatever its guest does.
    engine.works(&["kill", "c1", "KILL"]);
    engine.waits_until_it_has_ended();
    engine.works(&["delete", "c1"]);
    engine.nothing_is_left();
}

#[test]
fn templates_are_written() {
    let engine = Engine::new("stays");
    let folder = engine.folder.path().display().to_string();
    engine.works(&["spec", "-bundle", &folder]);
    let config: Value = serde_json::from_str(&engine.folder.read("config.json")).unwrap();
    assert_eq!(config["process"]["args"], json!(["sh"]));
    engine.refuses(&["spec", "--bundle", &folder], "it is there already");
    let features: Value = serde_json::from_str(&engine.works(&["features"])).unwrap();
    assert_eq!(features["linux"]["cgroup"]["systemd"], true);
    assert!(
        engine
            .works(&["--version"])
            .starts_with("mayfly-oci version")
    );
    assert!(engine.works(&["--help"]).contains("--resources FILE"));
    assert_eq!(engine.run(&["checkpoint", "c1"]).status.code(), Some(1));
}

#[test]
fn group_with_processes_of_others_is_refused_and_they_go_on() {
    needs!(root);
    let engine = Engine::new("stays");
    engine.create();
    let first = engine.state();
    // Another container of the same group, and one whose root is not there.
    let create = engine.of_bundle("create", "c2");
    engine.refuses(&create, "there are processes in it");
    engine.configure(|config| config["root"]["path"] = json!("/dev/null"));
    engine.refused(&create);
    assert!(!engine.folder.join("state/c2").exists());
    // What a create left that was killed before it had looked at its groups.
    let record = engine.folder.read("state/c1/state.json");
    let mut record: Value = serde_json::from_str(&record).unwrap();
    record["id"] = json!("c2");
    record["process"] = Value::Null;
    record["has_groups"] = json!(false);
    fs::create_dir(engine.folder.join("state/c2")).unwrap();
    engine
        .folder
        .file("state/c2/state.json", record.to_string());
    engine.works(&["delete", "--force", "c2"]);
    assert!(!engine.folder.join("state/c2").exists());
    assert_eq!(engine.state(), first);
    engine.delete_removes_all();
}

#[test]
fn root_that_looks_like_an_image_layout_is_the_root() {
    needs!(root);
    let engine = Engine::new("stays");
    engine.folder.file("bundle/rootfs/oci-layout", "{}");
    engine.folder.file("bundle/rootfs/index.json", "no JSON");
    engine.create();
    engine.delete_removes_all();
}

#[test]
fn bundle_whose_config_has_no_end_is_refused() {
    needs!(root);
    let engine = Engine::new("stays");
    let config = engine.folder.join("bundle/config.json");
    fs::remove_file(&config).unwrap();
    common::run("mkfifo", &[&config.display().to_string()]);
    let create = engine.of_bundle("create", "c1");
    engine.refuses(&create, "not a regular file");
    fs::remove_file(&config).unwrap();
    std::os::unix::fs::symlink("/dev/zero", &config).unwrap();
    engine.refuses(&create, "not a regular file");
    engine.nothing_is_left();
}

#[test]
fn settings_and_resources_without_an_end_are_refused() {
    needs!(root);
    let engine = Engine::new("stays");
    engine.create();
    let long = engine.folder.file("long", vec![b' '; (1 << 20) + 1]);
    let pipe = engine.folder.join("pipe");
    common::run("mkfifo", &[&pipe.display().to_string()]);
    for (file, why) in [
        (&pipe, "not a regular file"),
        (&long, "longer than 1024 KiB"),
    ] {
        let file = file.display().to_string();
        engine.refuses(&["update", "--resources", &file, "c1"], why);
        engine.refuses(&["--config", &file, "state", "c1"], why);
    }
    let mut update = engine.command(&["update", "--resources", "-", "c1"]);
    update.stdin(fs::File::open("/dev/zero").unwrap());
    let output = common::output_of(update);
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(told.contains("longer than 1024 KiB"), "{told}");
    engine.delete_removes_all();
}

#[test]
fn create_whose_state_cannot_be_written_leaves_nothing() {
    needs!(root);
    let engine = Engine::new("stays");
    let state = engine.folder.join("state");
    fs::create_dir(&state).unwrap();
    let state = state.display().to_string();
    // Room for the folder of the container, and for no file in it.
    common::run(
        "mount",
        &["-t", "tmpfs", "-o", "nr_inodes=2,mode=700", "tmpfs", &state],
    );
    let output = engine.run(&engine.of_bundle("create", "c1"));
    let is_left = engine.folder.join("state/c1").exists();
    common::run("umount", &[&state]);
    assert!(!output.status.success() && !is_left);
    engine.nothing_is_left();
}

#[test]
fn container_whose_process_does_not_answer_ends_with_kill() {
    needs!(root);
    let engine = Engine::new("stays");
    engine.create();
    // As where it is stopped: nothing that is asked of it is answered.
    engine.folder.file("silent", "");
    engine.works(&["kill", "c1", "KILL"]);
    fs::remove_file(engine.folder.join("silent")).unwrap();
    engine.delete_removes_all();
}
