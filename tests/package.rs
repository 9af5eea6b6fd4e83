//! The Debian package that `tools/package` makes, in a fresh Debian.

mod common;

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use common::{Folder, needs};

/// Makes the package in `out`, of the programs under test.
fn package(out: &Path, more: &[&str]) -> Output {
    let built = common::mayfly();
    let mut command = Command::new(common::root().join("tools/package"));
    command.args(more).arg("--out").arg(out);
    command.arg("--from").arg(built.parent().unwrap());
    command.output().unwrap()
}

#[test]
fn package_when_made_twice_is_the_same() {
    let made = [Folder::new(), Folder::new()].map(|folder| {
        let output = package(folder.path(), &[]);
        assert!(output.status.success(), "{output:?}");
        let mut files = fs::read_dir(folder.path()).unwrap();
        let file = files.next().unwrap().unwrap();
        (file.file_name(), fs::read(file.path()).unwrap())
    });
    assert!(made[0] == made[1], "{:?} {:?}", made[0].0, made[1].0);
}

#[test]
fn package_when_installed_works_and_when_removed_leaves_nothing() {
    needs!(root, "debootstrap");
    let folder = Folder::new();
    let output = package(folder.path(), &["--check"]);
    if output.status.code() == Some(77) {
        let why = String::from_utf8_lossy(&output.stdout);
        return needs::skip("package", why.lines().last().unwrap_or_default());
    }
    assert!(output.status.success(), "{output:?}");
}
