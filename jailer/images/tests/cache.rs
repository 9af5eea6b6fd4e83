//! The cache of disks: found again, never the wrong one, one maker at a time, killed at any time, within its limit.

#[expect(dead_code, reason = "another test file uses the rest of it")]
mod support;

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use support::archives::{file, tar};
use support::needs::{self, needs};
use support::{Folder, Random};

/// Longer than any step takes on a slow host.
const PATIENCE: Duration = Duration::from_secs(120);

fn wait_for(what: &str, mut is_there: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !is_there() {
        assert!(Instant::now() < end, "{what} did not come");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Writes a folder of `count` files of random bytes.
fn fill(folder: &Folder, name: &str, count: usize, len: usize) {
    let mut random = Random::new();
    for n in 0..count {
        folder.write(&format!("{name}/usr/file-{n}"), random.bytes(len));
    }
}

/// Waits until what is there now was changed long enough ago to be known again.
fn settle() {
    std::thread::sleep(Duration::from_millis(2500));
}

/// Reads a source, and gives the disk and how many bytes the program read for it.
fn read_for(folder: &Folder, source: &str) -> (PathBuf, u64) {
    let program = env!("CARGO_BIN_EXE_mayfly-image");
    let said = folder.shell(&format!(
        "{program} --cache cache disk {source}; grep ^rchar: /proc/$$/io"
    ));
    let (disk, read) = said.trim_end().split_once('\n').unwrap();
    let read = read.trim_start_matches("rchar: ").parse().unwrap();
    (disk.into(), read)
}

#[test]
fn folder_and_archive_are_not_read_again_once_they_are_known() {
    let folder = Folder::new();
    fill(&folder, "root", 64, 200_000);
    folder.run("tar", &["cf", "root.tar", "root"]);
    settle();
    let size = 64 * 200_000;
    for source in ["root", "root.tar"] {
        let (disk, first) = read_for(&folder, source);
        assert!(first > size, "{source}: {first} bytes were read");
        let (again, second) = read_for(&folder, source);
        assert_eq!(again, disk);
        assert!(second < size / 8, "{source}: {second} bytes were read");
    }
}

#[test]
fn change_of_a_file_gives_another_disk_even_at_once_and_with_its_old_time() {
    needs!("fsck.erofs");
    let folder = Folder::new();
    fill(&folder, "root", 4, 5000);
    folder.write("root/usr/changing", "0000");
    folder.run("touch", &["-d", "@1000000000", "root/usr/changing"]);
    settle();
    let mut disks = vec![folder.disk("root")];
    // A known file first; then files that changed within a tick of the clock.
    for n in 1..10 {
        folder.write("root/usr/changing", format!("{n:04}"));
        folder.run("touch", &["-d", "@1000000000", "root/usr/changing"]);
        let disk = folder.disk("root");
        assert!(!disks.contains(&disk), "change {n} gave an old disk");
        let out = format!("out-{n}");
        folder.unpack(&disk, &out);
        let read = fs::read_to_string(folder.join(&out).join("usr/changing"));
        assert_eq!(read.unwrap(), format!("{n:04}"));
        disks.push(disk);
    }
    // An archive likewise.
    let mut disks = Vec::new();
    for n in 0..10 {
        folder.write("root.tar", tar(&[file("a", &n.to_string())]));
        folder.run("touch", &["-d", "@1000000000", "root.tar"]);
        let disk = folder.disk("root.tar");
        assert!(!disks.contains(&disk), "change {n} gave an old disk");
        disks.push(disk);
    }
    // What only changes owner, mode or name.
    let mut disks = vec![folder.disk("root")];
    for script in [
        "chmod 600 root/usr/file-0",
        "mv root/usr/file-0 root/usr/file-9",
        "ln root/usr/file-1 root/usr/file-8",
        "rm root/usr/file-8",
    ] {
        folder.shell(script);
        let disk = folder.disk("root");
        let is_back = script.starts_with("rm");
        assert_eq!(disks.contains(&disk), is_back, "{script}");
        disks.push(disk);
    }
}

/// Overlay mounts of one image, as an engine makes them for each container.
struct Mounts<'a>(&'a Folder, Vec<String>);

impl Mounts<'_> {
    fn add(&mut self, n: usize) -> String {
        let name = format!("container-{n}");
        self.0.shell(&format!(
            "mkdir -p {name}/up {name}/work {name}/merged
             mount -t overlay overlay -o lowerdir=$PWD/high:$PWD/low,upperdir=$PWD/{name}/up,workdir=$PWD/{name}/work \
             {name}/merged
             ln -s /proc/mounts {name}/merged/etc/mtab"
        ));
        self.1.push(name.clone());
        format!("{name}/merged")
    }
}

impl Drop for Mounts<'_> {
    fn drop(&mut self) {
        for name in &self.1 {
            let place = self.0.join(name).join("merged");
            let _ = std::process::Command::new("umount").arg(place).status();
        }
    }
}

#[test]
fn containers_of_one_image_share_one_disk_and_only_their_own_files_are_read() {
    needs!(root, "mount");
    let folder = Folder::new();
    fill(&folder, "low", 64, 200_000);
    folder.write("low/etc/passwd", "root:x:0:0::/:/bin/sh\n");
    folder.write("high/etc/motd", "welcome");
    settle();
    let mut mounts = Mounts(&folder, Vec::new());
    let first = mounts.add(0);
    let (disk, read) = read_for(&folder, &first);
    assert!(read > 64 * 200_000, "{read}");
    for n in 1..10 {
        let merged = mounts.add(n);
        let (again, read) = read_for(&folder, &merged);
        assert_eq!(again, disk, "container {n}");
        assert!(
            read < 64 * 200_000 / 8,
            "container {n}: {read} bytes were read"
        );
    }
    let merged = mounts.add(10);
    folder.write(&format!("{merged}/usr/file-3"), "another one");
    let (other, read) = read_for(&folder, &merged);
    assert_ne!(other, disk);
    assert_eq!(folder.names("cache/disks").len(), 2);
    assert!(
        read > 64 * 200_000 / 2,
        "a disk was made of nothing: {read}"
    );
}

fn start(folder: &Folder, args: &[&str]) -> Child {
    let mut command = folder.command(args);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

fn disk_of(child: Child) -> PathBuf {
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    PathBuf::from(String::from_utf8(output.stdout).unwrap().trim_end())
}

#[test]
fn several_makers_at_once_give_one_disk() {
    let folder = Folder::new();
    fill(&folder, "root", 50, 100_000);
    folder.shell("cp -a root copy; tar cf root.tar -C root .");
    let sources = ["root", "copy", "root.tar", "root", "root.tar", "copy"];
    let children: Vec<_> = sources
        .iter()
        .map(|source| start(&folder, &["disk", source]))
        .collect();
    let disks: Vec<_> = children.into_iter().map(disk_of).collect();
    assert!(disks.iter().all(|disk| *disk == disks[0]), "{disks:?}");
    assert_eq!(folder.names("cache/disks").len(), 1);
    assert_eq!(folder.names("cache/work"), [""; 0]);
}

/// Whether a process waits for the lock of a file, by the kernel's list of locks.
fn is_awaited(file: &File) -> bool {
    let inode = format!(":{} ", file.metadata().unwrap().ino());
    let locks = fs::read_to_string("/proc/locks").unwrap();
    locks
        .lines()
        .any(|line| line.contains("->") && line.contains(&inode))
}

#[test]
fn maker_waits_for_the_one_before_it_and_makes_nothing_then() {
    let folder = Folder::new();
    fill(&folder, "root", 3, 1000);
    let disk = folder.disk("root");
    let name = disk.file_name().unwrap().to_str().unwrap().to_owned();
    let lock = folder
        .join("cache/locks")
        .join(format!("disk-{}", &name[..2]));
    let lock = File::open(lock).unwrap();
    rustix::fs::flock(&lock, FlockOperation::LockExclusive).unwrap();
    // As if this process were making it.
    fs::rename(&disk, folder.join("made")).unwrap();
    let mut child = start(&folder, &["disk", "root"]);
    wait_for("the second maker", || is_awaited(&lock));
    assert!(child.try_wait().unwrap().is_none());
    fs::rename(folder.join("made"), &disk).unwrap();
    let inode = fs::metadata(&disk).unwrap().ino();
    drop(lock);
    assert_eq!(disk_of(child), disk);
    assert_eq!(
        fs::metadata(&disk).unwrap().ino(),
        inode,
        "it was made again"
    );
}

#[test]
fn killed_at_any_point_leaves_nothing_that_the_next_run_does_not_remove() {
    needs!("fsck.erofs");
    let folder = Folder::new();
    fill(&folder, "root", 200, 40_000);
    folder.shell("tar czf root.tgz -C root .");
    let right = fs::read(folder.disk("root")).unwrap();
    fs::remove_dir_all(folder.join("cache")).unwrap();
    let began = Instant::now();
    folder.disk("root.tgz");
    // The shortest time in which each is known to be made: other work may have drawn out the first.
    let mut whole = [began.elapsed(); 2];
    let mut random = Random::new();
    let mut killed = 0;
    for turn in 0..40 {
        fs::remove_dir_all(folder.join("cache")).unwrap();
        let (source, whole) = match turn % 2 {
            0 => ("root", &mut whole[0]),
            _ => ("root.tgz", &mut whole[1]),
        };
        let latest = whole.as_micros() as u64 * 5 / 4;
        let began = Instant::now();
        let mut child = start(&folder, &["disk", source]);
        std::thread::sleep(Duration::from_micros(random.next() % latest));
        let waited = began.elapsed();
        child.kill().unwrap();
        match child.wait().unwrap().code() {
            Some(_) => *whole = waited.min(*whole),
            None => killed += 1,
        }
        // Whatever is there is whole.
        for name in folder.names("cache/disks") {
            assert!(fs::read(folder.join("cache/disks").join(name)).unwrap() == right);
        }
        folder.succeeds(&["list"]);
        assert_eq!(folder.names("cache/work"), [""; 0], "turn {turn}");
        let disk = folder.disk(source);
        assert!(fs::read(disk).unwrap() == right, "turn {turn}");
    }
    assert!(killed > 5, "{killed} of 40 were killed before their end");
    folder.run("fsck.erofs", &[folder.disk("root").to_str().unwrap()]);
}

#[test]
fn folder_of_a_run_that_goes_on_is_left_alone() {
    let folder = Folder::new();
    fill(&folder, "root", 1, 10);
    folder.disk("root");
    let work = folder.join("cache/work/1-0");
    fs::create_dir(&work).unwrap();
    let lock = File::open(&work).unwrap();
    rustix::fs::flock(&lock, FlockOperation::LockExclusive).unwrap();
    folder.succeeds(&["list"]);
    assert!(work.exists());
    drop(lock);
    // A program that another test starts just now may hold a copy of the descriptor until its exec.
    wait_for("the removal of the folder", || {
        folder.succeeds(&["list"]);
        !work.exists()
    });
}

#[test]
fn limit_removes_what_was_not_used_for_longest_and_nothing_in_use() {
    let folder = Folder::new();
    let sources = ["a", "b", "c", "d"];
    for source in sources {
        fill(&folder, source, 1, 1_000_000);
        folder.write(&format!("{source}/name"), source);
    }
    let [a, b, c] = ["a", "b", "c"].map(|source| folder.disk(source));
    let used = File::open(&a).unwrap();
    rustix::fs::flock(&used, FlockOperation::LockShared).unwrap();
    // b is used again: now c was not used for longest.
    assert_eq!(folder.disk("b"), b);
    let d = folder.succeeds(&["disk", "d", "--size", "3M"]);
    let d = Path::new(d.trim_end());
    assert!(a.exists() && b.exists() && !c.exists() && d.exists());
    let listed = folder.succeeds(&["list"]);
    let lines: Vec<&str> = listed.lines().collect();
    assert_eq!(lines.len(), 3, "{listed}");
    assert!(lines[0].contains(d.to_str().unwrap()), "{listed}");
    assert!(lines[2].contains(a.to_str().unwrap()) && lines[2].contains("in use"));
    // All but what is in use, and what is noted of them.
    folder.succeeds(&["prune", "--all"]);
    assert!(a.exists() && !b.exists() && !d.exists());
    assert_eq!(folder.names("cache/files").len(), 1);
    drop(used);
    // A program that another test starts just now may hold a copy of the descriptor until its exec.
    wait_for("the removal of the last disk", || {
        let said = folder.succeeds(&["prune", "--all"]);
        let is_gone = folder.names("cache/disks").is_empty();
        assert_eq!(said.contains("1 disks removed"), is_gone, "{said}");
        is_gone
    });
}

#[test]
fn disk_or_note_that_a_crash_of_the_host_damaged_is_made_again() {
    let folder = Folder::new();
    fill(&folder, "root", 3, 10_000);
    settle();
    let disk = folder.disk("root");
    let right = fs::read(&disk).unwrap();
    fs::remove_file(&disk).unwrap();
    fs::write(&disk, &right[..right.len() - 4096]).unwrap();
    assert_eq!(folder.disk("root"), disk);
    assert!(fs::read(&disk).unwrap() == right);
    fs::remove_file(&disk).unwrap();
    fs::write(&disk, vec![0; right.len()]).unwrap();
    let name = disk.file_stem().unwrap().to_str().unwrap();
    folder.write(&format!("cache/files/{name}"), "damaged");
    assert_eq!(folder.disk("root"), disk);
    assert!(fs::read(&disk).unwrap() == right);
}

#[test]
fn note_that_cannot_be_written_is_done_without() {
    let folder = Folder::new();
    folder.write("root/file", "content");
    let disk = folder.disk("root");
    let sum = disk.file_stem().unwrap().to_str().unwrap();
    // A folder in its place, as a full file system would be.
    fs::remove_file(folder.join("cache/files").join(sum)).unwrap();
    folder.write(&format!("cache/files/{sum}/in-the-way"), "");
    fs::remove_file(&disk).unwrap();
    assert_eq!(folder.disk("root"), disk);
    assert_eq!(folder.names("cache/work"), [""; 0]);
}
