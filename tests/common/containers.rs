//! What tests of guests with a command share: a root folder, and the programs that container engines start.

use std::fs;
use std::os::unix::fs::{DirBuilderExt as _, symlink};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::Folder;

/// A root folder with busybox by the names of `applets`, and where a guest mounts what it needs.
pub fn busybox_root(root: &Path, applets: &[&str]) {
    for folder in ["bin", "dev", "proc"] {
        fs::create_dir_all(root.join(folder)).unwrap();
    }
    fs::copy("/bin/busybox", root.join("bin/busybox")).expect("busybox-static is installed");
    for applet in applets {
        symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
}

/// Installs a program for a container engine.
pub fn install(program: &Path, to: &Path) {
    // By another process: a program that is open for writing here cannot be started by another test.
    let [program, to] = [program, to].map(|path| path.display().to_string());
    super::run("install", &["-m", "755", &program, &to]);
}

/// Installs `mayfly-oci`, with what it starts, in the folder `bin`.
pub fn install_programs(folder: &Folder) {
    fs::create_dir(folder.join("bin")).unwrap();
    for (program, name) in [
        (super::oci(), "mayfly-oci"),
        (super::jailer(), "mayfly-jailer"),
        (super::agent(), "mayfly-agent"),
        (super::mayfly(), "mayfly"),
    ] {
        install(&program, &folder.join("bin").join(name));
    }
}

/// The same; its settings, for a Linux guest, which boots for each container.
pub fn install_runtime(folder: &Folder) -> PathBuf {
    install_programs(folder);
    write_settings(folder, &json!({}))
}

/// The same, where guests are copies of one that booted, in this run of the suite or before. Of root.
pub fn install_warm_runtime(folder: &Folder) -> PathBuf {
    install_programs(folder);
    // A copy of the monitor would be another monitor, whose templates are of no use to the next test.
    let monitor = folder.join("bin/mayfly");
    fs::remove_file(&monitor).unwrap();
    symlink(super::mayfly(), monitor).unwrap();
    write_settings(folder, &json!({"templates": templates()}))
}

/// Installs `bin/runtime`, which is `mayfly-oci` with these settings: containerd's shim has no place for options of its
/// runtime.
pub fn install_with_settings(folder: &Folder, settings: &Path) {
    let program = folder.join("bin/mayfly-oci");
    let (program, settings) = (program.display(), settings.display());
    let script = format!("#!/bin/sh\nexec {program} --config {settings} \"$@\"\n");
    let script = folder.file("script", script);
    install(&script, &folder.join("bin/runtime"));
}

fn write_settings(folder: &Folder, more: &Value) -> PathBuf {
    let linux = super::linux();
    let mut settings = json!({
        "kernel": linux.kernel,
        "cmdline": linux.cmdline,
        "memory_mib": 128,
        "cache": folder.join("cache"),
        // podman gives a container 240.
        "ready_seconds": 220,
    });
    for (name, value) in more.as_object().unwrap() {
        settings[name] = value.clone();
    }
    folder.file("oci.json", settings.to_string())
}

/// What guests of root's tests are copied from: a guest takes long to boot where its kernel is emulated. It is kept
/// beside the kernel, and is of the monitor and the kernel that it was made by.
pub fn templates() -> PathBuf {
    let folder = super::needs::guest_folder().join("templates");
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true).mode(0o700).create(&folder).unwrap();
    folder.canonicalize().unwrap()
}

/// The control groups of this path, in all hierarchies that have them.
pub fn groups(path: impl AsRef<Path>) -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let of = |line: &str| {
        let words: Vec<&str> = line.split(' ').collect();
        let group = Path::new(words[1]).join(&path);
        (words[2].starts_with("cgroup") && group.exists()).then_some(group)
    };
    mounts.lines().filter_map(of).collect()
}

/// What the first of `files` that one of the groups has says: a limit has another name in each version.
pub fn read_in(groups: &[PathBuf], files: &[&str]) -> String {
    let paths = files
        .iter()
        .flat_map(|file| groups.iter().map(move |group| group.join(file)));
    let mut texts = paths.filter_map(|path| fs::read_to_string(path).ok());
    let text = texts.next().expect("one of the files is there");
    text.trim().to_owned()
}
