//! What a test needs of the host. A test that cannot run here says so, in one place: on standard
//! error, and in the list that `tools/test` prints and counts (the file MAYFLY_SKIPPED). With
//! MAYFLY_REQUIRE_KVM=1 that is a failure, whatever it is that is missing.
//!
//! The integration tests, and the unit tests of monitor and jailer, all include this file.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Leaves the test, and counts that, unless the host has all of this: `kvm`, `root`, `fuse`, `tun`,
/// `cgroup1`, `guest` (the Linux guest that `tools/guest` makes), or the name of a program.
macro_rules! needs {
    ($($need:tt),+ $(,)?) => {
        fn here() {}
        let test = std::any::type_name_of_val(&here).trim_end_matches("::here");
        if !needs::are_met(test, &[$(stringify!($need)),+]) {
            return;
        }
    };
}
pub(crate) use needs;

/// Whether the host has all of `needs`; what is missing is reported.
pub fn are_met(test: &str, needs: &[&str]) -> bool {
    let missing = needs.iter().find_map(|need| missing(need));
    if let Some(why) = &missing {
        skip(test, why);
    }
    missing.is_none()
}

/// Reports a test, or a part of one, that did not run.
pub fn skip(test: &str, why: &str) {
    assert!(
        std::env::var_os("MAYFLY_REQUIRE_KVM").is_none_or(|value| value != "1"),
        "{test} cannot run here: {why}"
    );
    if let Some(list) = std::env::var_os("MAYFLY_SKIPPED") {
        let list = File::options().append(true).create(true).open(list);
        writeln!(list.unwrap(), "{test}: {why}").unwrap();
    }
    eprintln!("SKIPPED {test}: {why}");
}

/// Why a need is not met, if it is not.
fn missing(need: &str) -> Option<String> {
    let opens = |path: &str| File::options().read(true).write(true).open(path).is_ok();
    let (is_met, why) = match need {
        "kvm" => (opens("/dev/kvm"), "no usable /dev/kvm"),
        "fuse" => (opens("/dev/fuse"), "no usable /dev/fuse"),
        "tun" => (opens("/dev/net/tun"), "no usable /dev/net/tun"),
        "root" => (is_root(), "needs root"),
        "cgroup1" => (
            Path::new("/proc/cgroups").exists() && mounts("cgroup"),
            "no control groups of version 1",
        ),
        "guest" => (
            guest_folder().join("vmlinux").exists(),
            "no guest kernel: run tools/guest",
        ),
        program => {
            let name = program.trim_matches('"');
            let path = std::env::var_os("PATH").unwrap_or_default();
            let mut places =
                std::env::split_paths(&path).chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
            let is_there = places.any(|place| place.join(name).exists());
            return (!is_there).then(|| format!("no program {name}"));
        }
    };
    (!is_met).then(|| why.to_owned())
}

/// Whether a file system of this type is mounted.
fn mounts(kind: &str) -> bool {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    mounts
        .lines()
        .any(|line| line.split(' ').nth(2) == Some(kind))
}

/// Whether the test runs as root.
pub fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|it| it.uid() == 0)
}

/// Where `tools/guest` puts the Linux guest.
pub fn guest_folder() -> PathBuf {
    let standard = || {
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
        let root = manifest
            .ancestors()
            .find(|at| at.join("tools/guest").exists());
        root.unwrap_or(manifest).join("target/guest")
    };
    std::env::var_os("MAYFLY_GUEST_DIR").map_or_else(standard, PathBuf::from)
}
