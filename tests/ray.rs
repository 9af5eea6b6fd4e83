//! The Python package for Ray (tools/ray): its unit tests, and a real cluster of two nodes. `tools/clients` installs
//! Ray of a pinned version and the package; where it could not, these tests are skipped.

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::{Folder, Netns, needs};

/// The interpreter that has Ray and our package.
fn python(test: &str) -> Option<PathBuf> {
    let folder = std::env::var_os("MAYFLY_CLIENTS")
        .map_or_else(|| common::root().join("target/clients"), PathBuf::from);
    let path = folder.join("ray/bin/python");
    if !path.exists() {
        let why = format!("no Ray in {}: run tools/clients", folder.display());
        needs::skip(test, &why);
        return None;
    }
    Some(path)
}

/// A test program that must succeed; what it said.
fn succeeds(command: &mut Command) -> String {
    // Python finds the package where it was installed, and writes nothing beside its sources.
    command
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env_remove("PYTHONPATH")
        .stdin(Stdio::null());
    let output = command.output().unwrap();
    let said = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success(), "{command:?}: {said}");
    println!("{said}");
    said
}

fn program(name: &str) -> PathBuf {
    common::root().join("tests/ray").join(name)
}

#[test]
fn ray_package_when_alone_keeps_its_promises() {
    let Some(python) = python("ray_package_when_alone_keeps_its_promises") else {
        return;
    };
    let said = succeeds(Command::new(python).arg(program("test_package.py")));
    assert!(said.contains("\nOK\n"), "{said}");
}

/// Tasks, cancelled tasks, a killed worker and a killed node on a cluster; what it said.
fn cluster(python: &Path, guest: &[PathBuf]) -> String {
    let (folder, namespace) = (Folder::new(), Netns::new());
    let mut command = Command::new(python);
    command
        .arg(program("cluster.py"))
        .args([common::jailer(), common::probe(), folder.path().to_owned()])
        .args(guest)
        // Short: sockets are made below.
        .env("RAY_TMPDIR", folder.join("r"))
        .env("RAY_USAGE_STATS_ENABLED", "0");
    std::fs::create_dir(folder.join("r")).unwrap();
    namespace.inside(|| succeeds(&mut command))
}

#[test]
fn ray_cluster_when_tasks_workers_and_nodes_end_leaves_no_microvm() {
    needs!(kvm, root, guest);
    let Some(python) = python("ray_cluster_when_tasks_workers_and_nodes_end_leaves_no_microvm")
    else {
        return;
    };
    let linux = common::linux();
    let said = cluster(&python, &[linux.kernel, linux.disk]);
    for step in [
        "twenty tasks",
        "errors",
        "cancel with force=False",
        "cancel with force=True",
        "actor killed",
        "mayfly-jailer killed",
        "worker killed and task tried again",
        "worker killed while Linux boots",
        "command and files of a Linux guest",
        "node killed",
        "nothing left",
    ] {
        assert!(
            said.contains(&format!("cluster: {step} ok")),
            "{step}: {said}"
        );
    }
}
