//! The Python package for Ray (tools/ray): its unit tests, and a real cluster of two nodes. `tools/clients` installs
//! Ray of a pinned version and the package; where it could not, these tests are skipped.

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::{Folder, Netns, containers, needs};

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

const DOCUMENT: &str = include_str!("../docs/ray.md");

/// The stand-in for mkfs.erofs of the document, with the test's mayfly-image and a cache of its own.
fn mkfs(folder: &Folder) -> String {
    let (_, script) = DOCUMENT.split_once("```\n#!/bin/sh\n").unwrap();
    let (script, _) = script.split_once("```").unwrap();
    let program = "mayfly-image disk";
    assert!(script.contains(program), "{script}");
    let ours = format!(
        "{} disk --cache {}",
        folder.join("bin/mayfly-image").display(),
        folder.join("cache").display()
    );
    format!("#!/bin/sh\n{}", script.replace(program, &ours))
}

#[test]
fn rays_own_sandboxes_when_runsc_is_mayfly_oci_are_made_used_and_deleted() {
    needs!(kvm, root, guest);
    let Some(python) =
        python("rays_own_sandboxes_when_runsc_is_mayfly_oci_are_made_used_and_deleted")
    else {
        return;
    };
    let (folder, namespace) = (Folder::new(), Netns::new());
    let settings = containers::install_warm_runtime(&folder);
    let root = folder.join("root");
    containers::busybox_root(&root, &["sh", "cat", "mkdir", "dirname", "sleep"]);
    std::fs::create_dir(root.join("srv")).unwrap();
    std::fs::write(root.join("srv/of-image"), "of the image\n").unwrap();
    let image = folder.join(&format!("mf-{}.tar", std::process::id()));
    let [archive, tree] = [&image, &root].map(|path| path.display().to_string());
    folder.run("tar", &["-cf", &archive, "-C", &tree, "."]);

    let bin = folder.join("bin");
    containers::install(&common::mayfly_image(), &bin.join("mayfly-image"));
    let path = std::env::var("PATH").unwrap();
    let path = format!("{}:{path}", folder.join("path").display());
    std::fs::create_dir(folder.join("path")).unwrap();
    // Ray has no place for options of its runtime.
    let runsc = format!(
        "#!/bin/sh\nexec {} --config {} \"$@\"\n",
        bin.join("mayfly-oci").display(),
        settings.display()
    );
    for (name, script) in [("runsc", runsc), ("mkfs.erofs", mkfs(&folder))] {
        let script = folder.file("script", script);
        containers::install(&script, &folder.join("path").join(name));
    }
    let mut command = Command::new(python);
    command
        .arg(program("sandbox.py"))
        .args([&image, &bin])
        .env("PATH", path)
        .env("RAY_TMPDIR", folder.join("r"))
        .env("RAY_USAGE_STATS_ENABLED", "0");
    std::fs::create_dir(folder.join("r")).unwrap();
    let said = namespace.inside(|| succeeds(&mut command));
    for step in [
        "create",
        "exec",
        "write_file and read_file",
        "delete",
        "scratch folder",
        "worker killed",
    ] {
        assert!(
            said.contains(&format!("sandbox: {step} ok")),
            "{step}: {said}"
        );
    }
}
