//! What tests of guests with a command share: a root folder, and the programs that container engines start.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use serde_json::json;

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

/// The same; its settings, for a Linux guest.
pub fn install_runtime(folder: &Folder) -> PathBuf {
    install_programs(folder);
    let linux = super::linux();
    let settings = json!({
        "kernel": linux.kernel,
        "cmdline": linux.cmdline,
        "memory_mib": 128,
        "cache": folder.join("cache"),
        // podman gives a container 240.
        "ready_seconds": 220,
    });
    folder.file("oci.json", settings.to_string())
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
