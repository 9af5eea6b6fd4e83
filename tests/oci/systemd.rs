//! `--systemd-cgroup`, with a stand-in for busctl and so for systemd: what it is asked, and that no unit of another's
//! is ended. With a real systemd: tests/oci/real_systemd.rs.

use std::fs;

use serde_json::json;

use super::common::{self, containers, needs};
use super::{Engine, Value};

/// Stands in for busctl, and has one unit: its state and description are in files.
const BUSCTL: &str = r#"#!/bin/sh
here=$(dirname "$0")
echo "$*" >> "$here/asked"
refused() { echo "$1" >&2; exit 1; }
[ -e "$here/no-systemd" ] && refused 'Failed to connect to bus: No such file or directory'
while [ "$1" != -- ]; do shift; done
shift
state=$(cat "$here/unit")
say() { echo "{\"type\":\"s\",\"data\":$1}"; }
case "$1 $5" in
'call StartTransientUnit')
    [ "$state" = inactive ] || refused "Call failed: Unit $7 was already loaded or has a fragment file."
    while [ "$1" != Description ]; do shift; done
    echo "$3" > "$here/description"
    cat "$here/becomes" > "$here/unit"
    say '["/org/freedesktop/systemd1/job/1"]' ;;
'call StopUnit') echo inactive > "$here/unit"; say '["/org/freedesktop/systemd1/job/2"]' ;;
'call ResetFailedUnit') [ "$state" = failed ] && echo inactive > "$here/unit" ;;
'call SetUnitProperties') ;;
'get-property Description')
    # One answer after the other: a unit may become another meanwhile.
    shift 4
    for name; do
        case $name in
        Description) say "\"$(cat "$here/description")\"" ;;
        Job) say '[0, "/"]' ;;
        ActiveState) say "\"$(cat "$here/unit")\"" ;;
        esac
        [ ! -e "$here/next" ] || mv "$here/next" "$here/unit"
    done ;;
'get-property ControlGroup') say "\"$(cat "$here/where")\"" ;;
'get-property Version') say '"252.38-1"' ;;
*) refused "the stand-in does not know: $*" ;;
esac
exit 0
"#;

/// An installation with a stand-in for systemd, which has no unit yet.
fn engine(mode: &str) -> Engine {
    let engine = Engine::new(mode);
    let busctl = engine.folder.file("stand-in", BUSCTL);
    containers::install(&busctl, &engine.folder.join("busctl"));
    for (name, text) in [
        ("asked", ""),
        ("unit", "inactive"),
        ("description", "libpod-c1.scope"),
        ("becomes", "active"),
    ] {
        engine.folder.file(name, text);
    }
    let at = format!("/{}/machine.slice/libpod-c1.scope", engine.group);
    engine.folder.file("where", at);
    in_scope(&engine, |_| {});
    engine
}

/// A config.json as podman writes it.
fn in_scope(engine: &Engine, change: impl FnOnce(&mut Value)) {
    engine.configure(|config| {
        config["linux"]["cgroupsPath"] = json!("machine.slice:libpod:c1");
        change(config);
    });
}

fn create(engine: &Engine) -> [&str; 5] {
    [
        "--systemd-cgroup",
        "create",
        "--bundle",
        &engine.bundle,
        "c1",
    ]
}

/// Makes one whose streams are a file.
fn created(engine: &Engine) {
    let out = fs::File::create(engine.folder.join("out")).unwrap();
    let mut command = engine.command(&create(engine));
    let command = command.stdout(out.try_clone().unwrap()).stderr(out);
    assert!(
        command.status().unwrap().success(),
        "{}",
        engine.folder.read("out")
    );
}

/// What systemd was asked by these words.
fn asked(engine: &Engine, words: &str) -> Vec<String> {
    let asked = engine.folder.read("asked");
    let lines = asked.lines().filter(|line| line.contains(words));
    lines.map(str::to_owned).collect()
}

fn is_ended(engine: &Engine) {
    assert_eq!(engine.folder.read("unit").trim(), "inactive");
    engine.nothing_is_left();
}

#[test]
fn scope_is_asked_for_told_its_limits_and_ended() {
    needs!(root, cgroup1);
    let engine = engine("stays");
    in_scope(&engine, |config| {
        config["linux"]["resources"] = json!({
            "memory": { "limit": 128 << 20 }, "pids": { "limit": 100 },
            "cpu": { "quota": 50_000, "period": 100_000, "cpus": "0" },
        });
    });
    created(&engine);
    let started = asked(&engine, "StartTransientUnit");
    let folder = engine.folder.join("state/c1").display().to_string();
    for words in [
        "--system --json=short -- call org.freedesktop.systemd1 /org/freedesktop/systemd1 \
         org.freedesktop.systemd1.Manager StartTransientUnit ssa(sv)a(sa(sv)) libpod-c1.scope fail 15 Description s"
            .to_owned(),
        format!(" Description s mayfly-oci container {folder} Slice s machine.slice PIDs au 1 "),
        " Delegate b true ".into(),
        " CollectMode s inactive-or-failed ".into(),
        format!(" MemoryLimit t {} ", 128 << 20),
        " TasksMax t 100 ".into(),
        " AllowedCPUs ay 1 1 ".into(),
        " CPUQuotaPerSecUSec t 500000 CPUQuotaPeriodUSec t 100000 0".into(),
    ] {
        assert!(started.len() == 1 && started[0].contains(&words), "{words}: {started:?}");
    }
    let groups = containers::groups(format!("{}/machine.slice/libpod-c1.scope", engine.group));
    let pid = engine.state()["pid"].to_string();
    for group in &groups {
        let inside = fs::read_to_string(group.join("cgroup.procs")).unwrap();
        assert!(inside.lines().any(|one| one == pid), "{group:?}: {inside}");
    }
    let memory = ["memory.limit_in_bytes", "memory.max"];
    assert_eq!(
        containers::read_in(&groups, &memory),
        (128 << 20).to_string()
    );

    let more = json!({ "memory": { "limit": 192 << 20 } }).to_string();
    let more = engine.folder.file("more.json", more);
    engine.works(&["update", &format!("--resources={}", more.display()), "c1"]);
    assert_eq!(
        containers::read_in(&groups, &memory),
        (192 << 20).to_string()
    );
    let words = format!(
        "SetUnitProperties sba(sv) libpod-c1.scope true 1 MemoryLimit t {}",
        192 << 20
    );
    assert_eq!(asked(&engine, &words).len(), 1);
    engine.works(&["start", "c1"]);
    engine.works(&["pause", "c1"]);
    assert_eq!(engine.state()["status"], "paused");
    // Engines do not say it then.
    engine.works(&["delete", "--force", "c1"]);
    assert_eq!(
        asked(&engine, "StopUnit ss libpod-c1.scope replace").len(),
        1
    );
    is_ended(&engine);
}

#[test]
fn scope_that_becomes_active_while_systemd_answers_is_made() {
    needs!(root);
    let engine = engine("stays");
    engine.folder.file("becomes", "inactive");
    engine.folder.file("next", "active");
    created(&engine);
    engine.works(&["delete", "--force", "c1"]);
    is_ended(&engine);
}

#[test]
fn scope_is_its_containers_by_whichever_path_of_the_state_folder() {
    needs!(root);
    let engine = engine("stays");
    created(&engine);
    let other = engine.folder.join("other");
    std::os::unix::fs::symlink(engine.folder.join("state"), &other).unwrap();
    let other = other.display().to_string();
    engine.works(&["--root", &other, "delete", "--force", "c1"]);
    is_ended(&engine);
}

#[test]
fn create_that_fails_or_is_killed_leaves_no_scope() {
    needs!(root);
    let engine = engine("refuses");
    engine.refuses(&create(&engine), "cannot run it: said by the stand-in");
    is_ended(&engine);
    engine.folder.file("becomes", "inactive");
    engine.refuses(
        &create(&engine),
        "cannot make the scope libpod-c1.scope: systemd did not start it",
    );
    is_ended(&engine);
    engine.folder.file("becomes", "active");
    engine
        .folder
        .file("where", "/machine.slice/../libpod-c1.scope");
    engine.refuses(&create(&engine), "which is not where its slice is");
    is_ended(&engine);

    let engine = self::engine("stays");
    let mut seed = u64::from(std::process::id());
    eprintln!("seed {seed}");
    for _ in 0..20 {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let mut create = engine.command(&create(&engine));
        create
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null());
        let mut create = create.spawn().unwrap();
        // Anywhere in it: no moment is better than another.
        std::thread::sleep(std::time::Duration::from_micros(seed >> 32 & 0x3_ffff));
        create.kill().unwrap();
        create.wait().unwrap();
        // systemd refuses a process that has ended; the stand-in takes any.
        common::wait_until("what it asked is answered", || {
            !fs::read_dir("/proc").unwrap().flatten().any(|entry| {
                let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
                let line = String::from_utf8_lossy(&line).into_owned();
                line.contains(&engine.folder.join("busctl").display().to_string())
            })
        });
        engine.works(&["delete", "--force", "c1"]);
        is_ended(&engine);
    }
}

#[test]
fn unit_of_another_is_named_and_left_alone() {
    needs!(root);
    let engine = engine("stays");
    engine.folder.file("unit", "active");
    engine.folder.file("description", "another's");
    engine.refuses(
        &create(&engine),
        "systemd has a unit of this name, which is active; end that container",
    );
    assert!(asked(&engine, "StopUnit").is_empty());
    assert_eq!(engine.folder.read("unit"), "active");
    engine.nothing_is_left();

    // One that failed gives way.
    engine.folder.file("unit", "failed");
    created(&engine);
    assert_eq!(asked(&engine, "ResetFailedUnit s libpod-c1.scope").len(), 1);
    assert!(engine.folder.read("description").contains("state/c1"));
    // It has ended, and another container has its name and groups.
    engine.folder.file("description", "another's");
    let first = engine.state()["pid"].clone();
    engine.works(&["kill", "c1", "KILL"]);
    engine.waits_until_it_has_ended();
    assert_ne!(engine.state()["pid"], first);
    common::wait_until("its groups are empty", || {
        let groups = containers::groups(format!("{}/machine.slice/libpod-c1.scope", engine.group));
        let is_empty = |group: &std::path::PathBuf| {
            fs::read_to_string(group.join("cgroup.procs")).is_ok_and(|it| it.is_empty())
        };
        groups.iter().all(is_empty)
    });
    engine.works(&["delete", "c1"]);
    assert!(asked(&engine, "StopUnit").is_empty());
    assert_eq!(engine.folder.read("unit").trim(), "active");
    engine.nothing_is_left();
}

#[test]
fn without_systemd_it_is_said_once_what_to_do() {
    needs!(root);
    let engine = engine("stays");
    engine.folder.file("no-systemd", "");
    let why = match std::path::Path::new("/run/systemd/system").is_dir() {
        true => "Failed to connect to bus",
        false => {
            "systemd does not run on this host (/run/systemd/system is missing); have the engine use cgroupfs"
        }
    };
    engine.refuses(&create(&engine), why);
    fs::remove_file(engine.folder.join("busctl")).unwrap();
    let empty = engine.folder.join("empty");
    fs::create_dir(&empty).unwrap();
    let mut command = engine.command(&create(&engine));
    command.env("PATH", &empty);
    let output = common::output_of(command);
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(
        told.contains("busctl, which comes with systemd, is not in PATH"),
        "{told}"
    );
    assert!(told.contains("--cgroup-manager cgroupfs"), "{told}");
    engine.nothing_is_left();
}

#[test]
fn path_and_option_must_fit() {
    needs!(root);
    let engine = engine("stays");
    let [_, rest @ ..] = create(&engine);
    engine.refuses(
        &rest,
        "it asks systemd for libpod-c1.scope; have the engine give --systemd-cgroup",
    );
    engine.configure(|_| {});
    engine.refuses(
        &create(&engine),
        "is not SLICE:PREFIX:NAME, as --systemd-cgroup needs",
    );
    in_scope(&engine, |config| {
        config["linux"]["cgroupsPath"] = json!("a--b.slice:libpod:c1")
    });
    engine.refuses(&create(&engine), "is not the name of a slice");
    assert!(asked(&engine, "").is_empty());
    engine.nothing_is_left();
}
