//! The groups of one `mayfly-jailer run`: planned beforehand; made, entered, read and removed by its
//! keeper.
//!
//! A group is `<parent>/mayfly-<id>`, and its maker holds a lock on it. So a group of that name that
//! is not locked was left by a run that was killed together with its keeper: every start removes
//! such groups, those of other ids unless some start is making its own just then. Groups of other
//! names are never touched.
//!
//! The parent is the group that the caller is in, so that the limits of whatever started it hold,
//! or the nearest above it that may have groups below it.

use std::ffi::{OsStr, OsString};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::path::PathBuf;
use std::time::Duration;

use rustix::fs::{AtFlags, Dir, FlockOperation, OFlags};

use super::hierarchy::{Hierarchies, Hierarchy};
use super::limit::Limit;
use super::{CgroupError, Group, OPEN, Request, Value, Version, join, own_group};
use crate::error::{AnyError, Failure, Step as _};
use crate::root::open_beneath;
use crate::sys;
use crate::undo::Undo;

/// First part of the names of our groups.
const MARK: &str = "mayfly-";
/// The group that holds those of root, where root is in the hierarchy's root itself.
const PARENT: &str = "mayfly";

/// What the groups are to be. It holds no descriptor, so that a keeper can be told it.
#[derive(Clone, Debug)]
pub struct Plan {
    name: String,
    request: Request,
}

/// What the groups counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Processes killed because they reached a memory limit.
    pub out_of_memory: u64,
    /// Most memory used at once, in bytes, where it was counted.
    pub peak_memory: Option<u64>,
}

/// What a caller asks for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Wanted {
    /// Limits by name, for whichever version has them.
    pub limits: Vec<Limit>,
    /// Values for files of groups.
    pub values: Vec<Value>,
    /// Version of those files; none: the one that has the controller.
    pub version: Option<Version>,
    /// The groups above the microVM's, from the mount point down; none: see above.
    pub parent: Option<Vec<OsString>>,
}

impl Plan {
    /// Finds out which groups are asked for, for the microVM `id`; none where no limit is.
    pub fn new(id: &str, wanted: &Wanted, as_root: bool) -> Result<Option<Plan>, AnyError> {
        if wanted.values.is_empty() && wanted.limits.is_empty() {
            return Ok(None);
        }
        let hierarchies = Hierarchies::of_host()?;
        let offered = hierarchies.offered()?;
        let version_of = |v2: &str, v1: &str| {
            let is_offered = offered.iter().any(|name| name == v2);
            if !is_offered && (hierarchies.v1(v1).is_some() || hierarchies.v2().is_none()) {
                Version::V1
            } else {
                Version::V2
            }
        };
        let mut request = Request::default();
        for value in &wanted.values {
            let controller = value.controller();
            let found = || version_of(controller, controller);
            request.add(value, wanted.version.unwrap_or_else(found), &hierarchies)?;
        }
        for limit in &wanted.limits {
            let (v2, v1) = limit.controllers();
            let version = version_of(v2, v1);
            for value in limit.values(version)? {
                request.add(&value, version, &hierarchies)?;
            }
        }
        let name = format!("{MARK}{id}");
        for group in &mut request.0 {
            let parent = match &wanted.parent {
                Some(parent) => parent.clone(),
                None => default_parent(&group.hierarchy, as_root)?,
            };
            group.steps = own_group(&parent, &name);
        }
        Ok(Some(Plan { name, request }))
    }

    /// Makes the groups and locks them.
    pub fn make(&self) -> Result<Groups, AnyError> {
        // A clean-up elsewhere may take a shared group away under us, and a keeper that was killed a
        // moment ago may still hold its lock while it ends.
        let mut attempt = 1;
        loop {
            self.remove_unlocked();
            let mut undo = Undo::default();
            match self.make_once(&mut undo) {
                Ok(groups) => return Ok(Groups { groups, undo }),
                Err(error) => {
                    undo.run();
                    if attempt == 8 {
                        return Err(error);
                    }
                    std::thread::sleep(Duration::from_millis(5 * attempt));
                    attempt += 1;
                }
            }
        }
    }

    fn make_once(&self, undo: &mut Undo) -> Result<Vec<Group>, AnyError> {
        // Until they are locked themselves, groups look as if their makers were gone.
        let _making: Vec<_> = self
            .request
            .0
            .iter()
            .map(|group| hold_off(&group.hierarchy.path))
            .collect();
        // One that was left by this id has counts and limits of its own.
        self.remove_left_behind();
        let groups = self.request.make(undo)?;
        for group in &groups {
            rustix::fs::flock(&*group.dir, FlockOperation::NonBlockingLockExclusive)
                .map_err(|_| CgroupError::IdInUse(group.path.clone()))?;
            // Fails if a clean-up has removed the group before it was locked.
            group.read("cgroup.procs").step_on(OPEN, &group.path)?;
        }
        Ok(groups)
    }

    /// Removes groups whose runs and keepers are gone.
    fn remove_unlocked(&self) {
        for (hierarchy, folder) in self.parents() {
            remove_unlocked(hierarchy, &folder);
        }
    }

    /// Removes this run's groups, whose keeper was killed and whose last process has just ended.
    pub fn remove_abandoned(&self) {
        // A group stays busy for a moment after its last process.
        for _ in 0..2500 {
            self.remove_left_behind();
            let mut parents = self.parents();
            if !parents.any(|(_, folder)| folder.join(&self.name).exists()) {
                break;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        self.remove_parents();
    }

    /// Removes the groups of this name that no run holds.
    fn remove_left_behind(&self) {
        for (_, folder) in self.parents() {
            if let Ok(parent) = sys::open(&folder, OFlags::DIRECTORY | OFlags::NOFOLLOW) {
                remove_if_unlocked(&parent, OsStr::new(&self.name));
            }
        }
    }

    /// Removes the groups that only hold ours, when none is left: the run that made them may have
    /// been killed.
    pub fn remove_parents(&self) {
        for (_, folder) in self.parents() {
            if folder.ends_with(PARENT) {
                let _ = rustix::fs::rmdir(folder);
            }
        }
    }

    /// The groups that hold ours, with their hierarchies.
    fn parents(&self) -> impl Iterator<Item = (&Path, PathBuf)> {
        self.request.0.iter().map(|group| {
            let above = group.steps.len().saturating_sub(1);
            let hierarchy = group.hierarchy.path.as_path();
            (hierarchy, join(hierarchy, &group.steps[..above]))
        })
    }
}

fn default_parent(hierarchy: &Hierarchy, as_root: bool) -> Result<Vec<OsString>, AnyError> {
    match hierarchy.nearest_parent() {
        Ok(parent) if !as_root || !parent.is_empty() => Ok(parent),
        Err(error) if !as_root => Err(error),
        _ => Ok(vec![PARENT.into()]),
    }
}

/// Keeps others from removing what is not locked in this hierarchy, for as long as the result is open. Any process can
/// hold this lock: after a while the work goes on without it.
fn hold_off(hierarchy: &Path) -> Option<OwnedFd> {
    let top = sys::open(hierarchy, OFlags::DIRECTORY).ok()?;
    sys::lock_soon(top, FlockOperation::NonBlockingLockShared)
}

/// Removes groups of ours whose makers are gone, unless one is being made in this hierarchy: a later run does it then.
fn remove_unlocked(hierarchy: &Path, folder: &Path) {
    let Ok(top) = sys::open(hierarchy, OFlags::DIRECTORY) else {
        return;
    };
    if rustix::fs::flock(&top, FlockOperation::NonBlockingLockExclusive).is_err() {
        return;
    }
    let Ok(parent) = sys::open(folder, OFlags::DIRECTORY | OFlags::NOFOLLOW) else {
        return;
    };
    let Ok(entries) = Dir::read_from(&parent) else {
        return;
    };
    for entry in entries.flatten() {
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        if !name.as_bytes().starts_with(MARK.as_bytes()) {
            continue;
        }
        remove_if_unlocked(&parent, name);
    }
}

fn remove_if_unlocked(parent: &OwnedFd, name: &OsStr) {
    let Ok(group) = open_beneath(parent, name, OFlags::RDONLY | OFlags::DIRECTORY) else {
        return;
    };
    // Locked by its maker as long as that lives. A group with a process in it is not removed.
    if rustix::fs::flock(&group, FlockOperation::NonBlockingLockExclusive).is_ok() {
        let _ = rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR);
    }
}

/// Groups that were made and locked.
#[derive(Debug)]
pub struct Groups {
    groups: Vec<Group>,
    undo: Undo,
}

/// The ways into the groups for a new process.
#[derive(Debug, Default)]
pub struct Entrances {
    /// The version 2 group, to be made in.
    pub v2: Option<OwnedFd>,
    /// Files of version 1 groups, to write `0` to: that moves the one thread that writes, and so
    /// does not wait for a quiet moment of every processor, as moving a process by number does.
    pub v1: Vec<OwnedFd>,
}

impl Groups {
    /// Opens the ways in.
    pub fn entrances(&self) -> Result<Entrances, Failure> {
        let mut entrances = Entrances::default();
        for group in &self.groups {
            let opened = match group.hierarchy.version {
                Version::V1 => open_beneath(&group.dir, OsStr::new("tasks"), OFlags::WRONLY)
                    .map(|tasks| entrances.v1.push(tasks)),
                Version::V2 => rustix::io::dup(&*group.dir).map(|dir| entrances.v2 = Some(dir)),
            };
            opened.step_on(OPEN, &group.path)?;
        }
        Ok(entrances)
    }

    /// Lets what was killed in the groups end, which a frozen group of version 1 would hold up.
    pub fn let_end(&self) {
        for group in &self.groups {
            let files: &[(&str, &str)] = match group.hierarchy.version {
                Version::V1 => &[("freezer.state", "THAWED")],
                Version::V2 => &[("cgroup.kill", "1"), ("cgroup.freeze", "0")],
            };
            for (file, value) in files {
                // Not every group and not every kernel has them.
                let _ = group.write(file, value);
            }
        }
    }

    /// What the groups counted, and their end. Lines for what could not be removed.
    pub fn end(mut self) -> (Usage, Vec<String>) {
        let mut usage = Usage::default();
        for group in &self.groups {
            let read = |name| group.read(name).unwrap_or_default();
            let (events, peak) = memory_files(group.hierarchy.version);
            usage.out_of_memory += kills_in(&read(events));
            if let Ok(bytes) = read(peak).trim().parse() {
                usage.peak_memory = Some(bytes);
            }
        }
        (usage, self.undo.run())
    }
}

/// The files in which a group counts kills at its memory limit, and the most memory it used.
fn memory_files(version: Version) -> (&'static str, &'static str) {
    match version {
        Version::V1 => ("memory.oom_control", "memory.max_usage_in_bytes"),
        Version::V2 => ("memory.events", "memory.peak"),
    }
}

/// How many processes were killed at a memory limit of the group that this process is in, which it
/// shares with others. None where the host does not count it.
pub fn kills_around() -> Option<u64> {
    let hierarchies = Hierarchies::of_host().ok()?;
    let memory = [hierarchies.v1("memory"), hierarchies.v2()];
    memory.into_iter().flatten().find_map(|hierarchy| {
        let (events, _) = memory_files(hierarchy.version);
        let file = hierarchy.path.join(hierarchy.home().ok()?).join(events);
        Some(kills_in(&std::fs::read_to_string(file).ok()?))
    })
}

fn kills_in(events: &str) -> u64 {
    let count = |line: &str| line.strip_prefix("oom_kill ")?.parse::<u64>().ok();
    events.lines().find_map(count).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kills_are_found_in_the_file_of_either_version() {
        assert_eq!(kills_in("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"), 2);
        assert_eq!(kills_in("low 0\nhigh 0\nmax 3\noom 1\noom_kill 1\n"), 1);
        assert_eq!(kills_in(""), 0);
    }

    #[test]
    fn clean_up_removes_unlocked_groups_of_ours_only() {
        let folder = crate::testing::Folder::new("groups-unlocked");
        for name in ["mayfly-dead", "mayfly-alive", "other"] {
            std::fs::create_dir(folder.path().join(name)).unwrap();
        }
        let alive = std::fs::File::open(folder.path().join("mayfly-alive")).unwrap();
        rustix::fs::flock(&alive, FlockOperation::NonBlockingLockExclusive).unwrap();
        let making = hold_off(folder.path());
        remove_unlocked(folder.path(), folder.path());
        assert!(folder.path().join("mayfly-dead").exists());
        drop(making);
        remove_unlocked(folder.path(), folder.path());
        let mut left: Vec<_> = std::fs::read_dir(folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        left.sort();
        assert_eq!(left, ["mayfly-alive", "other"]);
    }
}
