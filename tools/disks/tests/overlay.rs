//! What overlays hold, and their way into a base.

#[expect(dead_code, reason = "another test file uses the rest of it")]
mod support;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use mayfly::overlay::{BaseId, Content, Durability, Overlay, Storage, lock};
use support::Folder;
use support::needs::{self, needs};

/// No whole number of units.
const SIZE: usize = (10 << 20) + 512;

fn file(path: &Path) -> File {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    options.open(path).unwrap()
}

fn base_id(path: &Path) -> BaseId {
    let base = file(path);
    let metadata = base.metadata().unwrap();
    let modified = (metadata.mtime(), metadata.mtime_nsec() as u32);
    BaseId::of(&base, metadata.len(), modified).unwrap()
}

fn open(folder: &Folder) -> Overlay<File> {
    let file = file(&folder.join("overlay"));
    let base = base_id(&folder.join("base"));
    let content = Content::open(&file, &base, [5; 16]).unwrap();
    Overlay::load(Arc::new(file), &content, Durability::Immediate).unwrap()
}

/// A base, an overlay over it, and what a guest sees of the two.
fn made(folder: &Folder) -> Vec<u8> {
    let mut disk: Vec<u8> = (0..SIZE).map(|at| (at / 512 % 251) as u8 | 1).collect();
    let base_path = folder.join("base");
    fs::write(&base_path, &disk).unwrap();
    let base = file(&base_path);
    let mut overlay = open(folder);
    for (at, len) in [
        (0usize, 4096usize),
        (5 << 20, 1 << 20),
        (9 << 20, 512),
        (SIZE - 512, 512),
    ] {
        let mut bytes = vec![0xee; len];
        disk[at..at + len].copy_from_slice(&bytes);
        overlay.before_write(&base, at as u64, len as u64).unwrap();
        let place = overlay.write_at(at as u64);
        overlay.file().write_all_at(&mut bytes, place).unwrap();
        overlay.wrote(at as u64, len as u64).unwrap();
    }
    let (at, len) = (2 << 20, (1 << 20) + 1024);
    overlay.before_write(&base, at as u64, len as u64).unwrap();
    let place = overlay.write_at(at as u64);
    overlay.file().punch(place..place + len as u64).unwrap();
    overlay.set_zero(at as u64, len as u64).unwrap();
    disk[at..at + len].fill(0);
    disk
}

#[test]
fn info_shows_what_an_overlay_holds() {
    let folder = Folder::new();
    made(&folder);
    let shown = folder.succeeds(&["overlay", "info", "overlay"]);
    for line in [
        "overlay: an overlay\n",
        "  disk          10.0 MiB (10486272 bytes)\n",
        "  generation    1\n",
        "  in use        no\n",
        // Of the zeros, the last two sectors are in a unit of which the rest was copied.
        "  written       1.0 MiB (1061376 bytes)\n",
        "  zeros         1 MiB\n",
    ] {
        assert!(shown.contains(line), "{line}{shown}");
    }
    let held = file(&folder.join("overlay"));
    lock(&held, false).unwrap();
    let shown = folder.succeeds(&["overlay", "info", "overlay"]);
    assert!(shown.contains("in use        yes"), "{shown}");
    let (code, _, message) = folder.disks(&["overlay", "info", "base"]);
    assert_eq!(code, 1);
    assert!(message.contains("is not an overlay"), "{message}");
}

#[test]
fn commit_to_a_copy_leaves_base_and_overlay_as_they_are() {
    let folder = Folder::new();
    let disk = made(&folder);
    let before = (
        fs::read(folder.join("base")).unwrap(),
        fs::read(folder.join("overlay")).unwrap(),
    );
    folder.succeeds(&["overlay", "commit", "overlay", "base", "out"]);
    assert!(fs::read(folder.join("out")).unwrap() == disk);
    let after = (
        fs::read(folder.join("base")).unwrap(),
        fs::read(folder.join("overlay")).unwrap(),
    );
    assert!(before == after);
    assert_eq!(folder.names(), ["base", "out", "overlay"]);
    let (code, _, message) = folder.disks(&["overlay", "commit", "overlay", "base", "out"]);
    assert_eq!(code, 1);
    assert!(message.contains("exists"), "{message}");
    let (code, ..) = folder.disks(&["overlay", "commit", "overlay", "base"]);
    assert_eq!(code, 2);
}

#[test]
fn commit_into_the_base_changes_it_and_empties_the_overlay() {
    needs!("cmp");
    let folder = Folder::new();
    fs::write(folder.join("disk"), made(&folder)).unwrap();
    folder.succeeds(&["overlay", "commit", "overlay", "base", "--into-base"]);
    assert!(folder.same("base", "disk"));
    let shown = folder.succeeds(&["overlay", "info", "overlay"]);
    assert!(shown.contains("  written       0 bytes\n"), "{shown}");
    assert!(shown.contains("  generation    2\n"), "{shown}");
    // Space was given back, and it is an overlay of the new base.
    assert!(fs::metadata(folder.join("overlay")).unwrap().blocks() * 512 < 100_000);
    assert_eq!(open(&folder).locate(0, 4096).1, 4096);
}

#[test]
fn commit_that_was_interrupted_is_ended_by_the_next_and_nothing_else_uses_the_overlay() {
    let folder = Folder::new();
    let disk = made(&folder);
    let inode = fs::metadata(folder.join("base")).unwrap().ino();
    open(&folder).set_committing(inode).unwrap();
    // Half of it was written.
    file(&folder.join("base"))
        .write_all_at(&mut vec![0xee; 4096], 0)
        .unwrap();
    let refused = Content::open(
        &file(&folder.join("overlay")),
        &base_id(&folder.join("base")),
        [0; 16],
    );
    assert!(refused.unwrap_err().to_string().contains("being committed"));
    let (code, _, message) = folder.disks(&["overlay", "commit", "overlay", "base", "out"]);
    assert_eq!(code, 1);
    assert!(message.contains("run that again"), "{message}");
    // Another disk of the same size is not what it has to be ended with.
    let other = vec![0x55; fs::metadata(folder.join("base")).unwrap().len() as usize];
    fs::write(folder.join("other"), &other).unwrap();
    let (code, _, message) =
        folder.disks(&["overlay", "commit", "overlay", "other", "--into-base"]);
    assert_eq!(code, 1);
    assert!(message.contains("another base"), "{message}");
    assert!(fs::read(folder.join("other")).unwrap() == other);
    folder.succeeds(&["overlay", "commit", "overlay", "base", "--into-base"]);
    assert!(fs::read(folder.join("base")).unwrap() == disk);
    open(&folder);
}

#[test]
fn commit_when_the_base_was_written_to_since_takes_a_word() {
    let folder = Folder::new();
    let disk = made(&folder);
    // The same content, at another time.
    let base = fs::read(folder.join("base")).unwrap();
    fs::write(folder.join("base"), &base).unwrap();
    let (code, _, message) = folder.disks(&["overlay", "commit", "overlay", "base", "out"]);
    assert_eq!(code, 1);
    assert!(message.contains("--changed-base"), "{message}");
    folder.succeeds(&[
        "overlay",
        "commit",
        "overlay",
        "base",
        "out",
        "--changed-base",
    ]);
    assert!(fs::read(folder.join("out")).unwrap() == disk);
}

#[test]
fn commit_when_a_file_is_in_use_or_wrong_changes_nothing() {
    let folder = Folder::new();
    made(&folder);
    let all = || ["base", "overlay"].map(|name| fs::read(folder.join(name)).unwrap());
    let before = all();
    let refused = |args: &[&str], reason: &str| {
        let (code, _, message) = folder.disks(args);
        assert_eq!(code, 1, "{args:?}");
        assert!(message.contains(reason), "{args:?}: {message}");
        assert!(all() == before, "{args:?}");
    };
    let into_base = ["overlay", "commit", "overlay", "base", "--into-base"];
    let to_copy = ["overlay", "commit", "overlay", "base", "out"];
    let held = file(&folder.join("overlay"));
    lock(&held, false).unwrap();
    refused(&into_base, "is in use");
    refused(&to_copy, "is in use");
    drop(held);
    // A microVM has another overlay over the base.
    let held = file(&folder.join("base"));
    lock(&held, true).unwrap();
    refused(&into_base, "is in use");
    folder.succeeds(&to_copy);
    drop(held);
    let mut other = before[0].clone();
    other[1024] ^= 1;
    fs::write(folder.join("other"), &other).unwrap();
    refused(
        &["overlay", "commit", "overlay", "other", "--into-base"],
        "belongs to another base",
    );
    fs::write(folder.join("short"), &other[..8192]).unwrap();
    refused(
        &["overlay", "commit", "overlay", "short", "--into-base"],
        "belongs to a disk of",
    );
    refused(
        &["overlay", "commit", "base", "overlay", "out2"],
        "is not an overlay",
    );
}
