//! What the kernel says of the long lives, and of what short ones have left.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::bench::Bench;
use crate::failure::{Context, Failure, Result};
use crate::{proc, sys};

/// Between two looks.
const LOOK: Duration = Duration::from_millis(20);
/// What monitors call the memory of a guest that can be forked.
const GUEST_MEMORY: &str = "/memfd:guest memory";

/// What a process has.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Usage {
    /// Memory that it wrote for itself alone, without the guest's, and its page tables; MiB.
    pub memory: f64,
    /// Resident memory of its guest; MiB.
    pub guest: f64,
    /// Descriptors, by what they are.
    pub descriptors: BTreeMap<String, usize>,
    /// Threads.
    pub threads: usize,
    /// Mappings.
    pub mappings: usize,
}

impl Usage {
    /// Reads it.
    pub fn read(pid: u32) -> Result<Self> {
        let mappings = proc::mappings(pid)?;
        let (guest, own): (Vec<_>, Vec<_>) = mappings
            .iter()
            .partition(|mapping| mapping.name.starts_with(GUEST_MEMORY));
        let own: u64 = own.iter().map(|mapping| mapping.own_dirty()).sum();
        let page_tables = proc::status_kib(pid, "VmPTE:")?;
        let threads = format!("/proc/{pid}/task");
        let threads = fs::read_dir(&threads).cannot(|| format!("read {threads}"))?;
        Ok(Self {
            memory: proc::mib(own + page_tables),
            guest: proc::mib(guest.iter().map(|mapping| mapping.rss).sum()),
            descriptors: descriptors(pid)?,
            threads: threads.count(),
            mappings: mappings.len(),
        })
    }

    /// How many descriptors.
    pub fn open(&self) -> usize {
        self.descriptors.values().sum()
    }

    /// For machines.
    pub fn json(&self) -> Value {
        json!({
            "memory_mib": self.memory,
            "guest_mib": self.guest,
            "descriptors": self.open(),
            "threads": self.threads,
            "mappings": self.mappings,
        })
    }
}

/// The descriptors of a process, by what they are.
fn descriptors(pid: u32) -> Result<BTreeMap<String, usize>> {
    let folder = format!("/proc/{pid}/fd");
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(&folder).cannot(|| format!("read {folder}"))? {
        let entry = entry.cannot(|| format!("read {folder}"))?;
        // One that is gone by now is not open.
        if let Ok(target) = fs::read_link(entry.path()) {
            *found.entry(kind(&target)).or_default() += 1;
        }
    }
    Ok(found)
}

/// Numbers are left out: they tell one from another of the same kind.
fn kind(target: &Path) -> String {
    let name = target.to_string_lossy();
    let mut kind = String::new();
    for part in name.split_inclusive(|c: char| !c.is_ascii_digit()) {
        let rest = part.trim_start_matches(|c: char| c.is_ascii_digit());
        if rest.len() < part.len() {
            kind.push('#');
        }
        kind.push_str(rest);
    }
    kind
}

/// The process `pid` and all that descend from it, in order of their ids.
pub fn family(pid: u32) -> Vec<u32> {
    let mut found = vec![pid];
    let mut at = 0;
    while let Some(pid) = found.get(at).copied() {
        found.extend(children(pid));
        at += 1;
    }
    found.sort_unstable();
    found
}

fn children(pid: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"));
    let mut found = Vec::new();
    for task in tasks.into_iter().flatten().flatten() {
        let text = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        found.extend(
            text.split_whitespace()
                .filter_map(|word| word.parse::<u32>().ok()),
        );
    }
    found
}

/// Ends all that descends from this process: what a failed run has left.
pub fn end_all(patience: Duration) {
    let own = std::process::id();
    let began = Instant::now();
    while began.elapsed() < patience {
        let others: Vec<u32> = family(own).into_iter().filter(|pid| *pid != own).collect();
        if others.is_empty() {
            return;
        }
        for pid in others {
            // One that has ended meanwhile is gone.
            let _ = sys::signal(pid, sys::KILL);
            sys::reap(pid);
        }
        std::thread::sleep(LOOK);
    }
}

/// What a process is called.
pub fn name(pid: u32) -> String {
    described(pid).0
}

/// What a process is called, and whether it is a zombie.
fn described(pid: u32) -> (String, bool) {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let name = text.split_once('(').and_then(|(_, rest)| {
        let (name, rest) = rest.rsplit_once(") ")?;
        Some((name.to_owned(), rest.starts_with('Z')))
    });
    name.unwrap_or_default()
}

/// All that there is of lives: processes, files, interfaces, control groups, mounts.
pub fn everything(bench: &Bench<'_>) -> Result<BTreeSet<String>> {
    let mut all = BTreeSet::new();
    let own = std::process::id();
    let mine = children(own);
    for pid in family(own).into_iter().filter(|pid| *pid != own) {
        let (name, is_zombie) = described(pid);
        match (is_zombie, mine.contains(&pid)) {
            // Its parent is gone, so it is ours to take, as it would be the first process's.
            (true, true) => sys::reap(pid),
            (true, false) => {
                all.insert(format!("zombie {name} {pid}"));
            }
            (false, _) => {
                all.insert(format!("process {name} {pid}"));
            }
        }
    }
    for folder in [bench.place.folder(), bench.place.workspace.directory()] {
        files(folder, &mut all)?;
    }
    all.extend(interfaces()?);
    groups(Path::new("/sys/fs/cgroup"), &bench.group, &mut all);
    all.extend(mounts(bench)?);
    Ok(all)
}

fn files(folder: &Path, all: &mut BTreeSet<String>) -> Result<()> {
    let reading = || format!("read {}", folder.display());
    for entry in fs::read_dir(folder).cannot(reading)? {
        let path = entry.cannot(reading)?.path();
        all.insert(format!("file {}", path.display()));
        if path.is_dir() && !path.is_symlink() {
            files(&path, all)?;
        }
    }
    Ok(())
}

fn interfaces() -> Result<Vec<String>> {
    let path = "/proc/thread-self/net/dev";
    let text = fs::read_to_string(path).cannot(|| format!("read {path}"))?;
    let names = text.lines().filter_map(|line| line.split_once(':'));
    Ok(names
        .map(|(name, _)| format!("interface {}", name.trim()))
        .collect())
}

/// Control groups below the one named `name`, in any hierarchy. One that goes while it is read is gone.
fn groups(folder: &Path, name: &str, all: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() && !path.is_symlink() {
            if path.components().any(|part| part.as_os_str() == name) {
                all.insert(format!("control group {}", path.display()));
            }
            groups(&path, name, all);
        }
    }
}

/// Mounts that name a file of ours, or a namespace.
fn mounts(bench: &Bench<'_>) -> Result<Vec<String>> {
    let path = "/proc/self/mountinfo";
    let text = fs::read_to_string(path).cannot(|| format!("read {path}"))?;
    let folders = [bench.place.folder(), bench.place.workspace.directory()];
    let of_ours = |line: &&str| {
        let names = |folder: &Path| line.contains(&*folder.to_string_lossy());
        folders.into_iter().any(names)
    };
    Ok(text
        .lines()
        .filter(of_ours)
        .map(|line| format!("mount {line}"))
        .collect())
}

/// Waits until there is nothing but `expected`; what there is besides is a failure.
pub fn nothing_left(bench: &Bench<'_>, expected: &BTreeSet<String>) -> Result<()> {
    wait_until_gone(bench, expected, |_| true)
}

/// The same for what may not stay a moment: processes and interfaces.
pub fn nothing_alive(bench: &Bench<'_>, expected: &BTreeSet<String>) -> Result<()> {
    wait_until_gone(bench, expected, |what| {
        !what.starts_with("file ") && !what.starts_with("control group ")
    })
}

fn wait_until_gone(
    bench: &Bench<'_>,
    expected: &BTreeSet<String>,
    counts: impl Fn(&str) -> bool,
) -> Result<()> {
    let began = Instant::now();
    loop {
        let all = everything(bench)?;
        let left: Vec<&String> = all
            .difference(expected)
            .filter(|what| counts(what))
            .collect();
        if left.is_empty() {
            return Ok(());
        }
        if began.elapsed() > bench.settle || sys::interrupted() {
            return Err(Failure::new(format!("left behind: {left:?}")));
        }
        std::thread::sleep(LOOK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_when_of_this_process_counts_what_is_open() {
        let before = Usage::read(std::process::id()).unwrap();
        let file = fs::File::open("/proc/self/stat").unwrap();
        let name = fs::read_link("/proc/self/fd/0").map(|target| kind(&target));
        let after = descriptors(std::process::id()).unwrap();
        drop(file);
        assert!(
            after.keys().any(|name| name.ends_with("/stat")),
            "{after:?}"
        );
        assert!(name.is_ok_and(|name| before.descriptors.contains_key(&name)));
        assert!(before.memory > 0.0 && before.threads > 0 && before.mappings > 3);
        assert_eq!(before.guest, 0.0);
    }

    #[test]
    fn descriptors_when_named_leave_numbers_out() {
        assert_eq!(kind(Path::new("socket:[1234]")), "socket:[#]");
        assert_eq!(kind(Path::new("/tmp/12/disk7")), "/tmp/#/disk#");
        assert_eq!(kind(Path::new("/dev/kvm")), "/dev/kvm");
    }

    #[test]
    fn child_when_it_has_ended_is_a_zombie_of_the_family() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let began = Instant::now();
        while described(child.id()) != ("true".to_owned(), true) {
            assert!(
                began.elapsed() < Duration::from_secs(60),
                "{:?}",
                described(child.id())
            );
            std::thread::sleep(LOOK);
        }
        assert!(family(std::process::id()).contains(&child.id()));
        child.wait().unwrap();
        assert!(!family(std::process::id()).contains(&child.id()));
    }
}
