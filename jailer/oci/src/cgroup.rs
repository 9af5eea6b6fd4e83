//! The control groups of a container, in every hierarchy that this host has: made, entered, told their
//! limits, emptied and removed.
//!
//! The jailer has groups of its own, for its monitor alone, which end with it. Those here are the
//! engine's: it chose the path (`linux.cgroupsPath`), watches all processes there, changes limits while
//! they run, and reads what they used. So all processes of the container are in them, from the first on.
//!
//! A group above that had to be made is marked, and goes with the last one in it.

mod hierarchy;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::XattrFlags;
use rustix::io::Errno;

pub use self::hierarchy::{Hierarchy, Home, hierarchies};
use self::hierarchy::{enter, errno, write};
use crate::bundle::resources::{FileText, Setting};
use crate::error::{AnyError, Failure, Step as _};
use crate::process::{self, Known};
use crate::user::may_make;

/// Marks a group that was made to hold a container's.
const MARK: &str = "trusted.mayfly-oci";
/// Files that a host may lack although it has their controller.
const OPTIONAL: &[&str] = &[
    "memory.memsw.limit_in_bytes",
    "memory.swap.max",
    "blkio.bfq.weight",
    "io.bfq.weight",
];
/// How long processes that were killed may take to end.
const PATIENCE: Duration = Duration::from_secs(20);

/// A control group cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    #[error(
        "cannot set {0}: this host has no control group controller for it, or this user has no part of it"
    )]
    NoController(String),
    #[error(
        "cannot use the control group {0}: there are processes in it; give another linux.cgroupsPath"
    )]
    InUse(PathBuf),
    #[error("cannot change {0}: its processes neither all stand still nor all go on")]
    NotFrozen(PathBuf),
    #[error("cannot remove the control group {0}: a process in it does not end")]
    NotEmpty(PathBuf),
}

/// The groups of a container: a folder in each hierarchy.
#[derive(Debug, Default)]
pub struct Groups(Vec<(Hierarchy, PathBuf)>);

impl Groups {
    /// Those at `below`, which need not be there.
    pub fn at(below: &Path, hierarchies: &[Hierarchy]) -> Groups {
        let of = |one: &Hierarchy| (one.clone(), one.mount.join(below));
        Groups(hierarchies.iter().map(of).collect())
    }

    /// Those that were made at `paths`.
    pub fn made(paths: &[PathBuf], hierarchies: &[Hierarchy]) -> Groups {
        let of = |path: &PathBuf| {
            let hierarchy = hierarchies
                .iter()
                .find(|one| path.starts_with(&one.mount))?;
            Some((hierarchy.clone(), path.clone()))
        };
        Groups(paths.iter().filter_map(of).collect())
    }

    /// Leaves out those that this user can neither make nor use. Limits of them are refused when they are
    /// written.
    pub fn leave_out_denied(&mut self, notes: &mut Vec<String>) {
        self.0.retain(|(_, path)| {
            let may_use = may_make(path);
            if !may_use {
                notes.push(format!(
                    "linux.cgroupsPath: {} is left out: it is not this user's to make",
                    path.display()
                ));
            }
            may_use
        });
    }

    /// Their folders.
    pub fn paths(&self) -> Vec<PathBuf> {
        self.0.iter().map(|(_, path)| path.clone()).collect()
    }

    /// The groups above them that are still to be made.
    pub fn missing_above(&self) -> Vec<PathBuf> {
        let above = |(hierarchy, path): &(Hierarchy, PathBuf)| {
            let mount = hierarchy.mount.clone();
            let above = path.ancestors().skip(1).map(Path::to_owned);
            above
                .take_while(move |it| *it != mount)
                .filter(|it| !it.exists())
                .collect::<Vec<_>>()
        };
        self.0.iter().flat_map(above).collect()
    }

    /// Makes them. Others' processes must not be in them.
    pub fn make(&self) -> Result<(), AnyError> {
        for (hierarchy, path) in &self.0 {
            make(hierarchy, path)?;
            if !processes(path).is_empty() {
                return Err(CgroupError::InUse(path.to_owned()).into());
            }
        }
        Ok(())
    }

    /// Makes those that systemd has not made for a scope: it knows some controllers of version 1 only.
    pub fn complete(&self) -> Result<(), AnyError> {
        let mut missing = self.0.iter().filter(|(_, path)| !path.is_dir());
        missing.try_for_each(|(hierarchy, path)| make(hierarchy, path))
    }

    /// The files that these settings are for here, and their texts.
    pub fn files<'a>(&self, settings: &'a [Setting]) -> Vec<&'a FileText> {
        let chosen = settings
            .iter()
            .filter_map(|setting| self.choose(setting).ok());
        chosen.filter_map(|(_, value)| value.as_ref()).collect()
    }

    /// Writes limits into them; what this host lacks a file for is noted.
    pub fn set(&self, settings: &[Setting], notes: &mut Vec<String>) -> Result<(), AnyError> {
        // A limit can depend on another that comes later (memory, and memory with swap).
        let mut later = Vec::new();
        for setting in settings {
            if self.set_one(setting, notes).is_err() {
                later.push(setting);
            }
        }
        later
            .into_iter()
            .try_for_each(|setting| self.set_one(setting, notes))
    }

    fn set_one(&self, setting: &Setting, notes: &mut Vec<String>) -> Result<(), AnyError> {
        let (group, value) = self.choose(setting)?;
        let Some((file, text)) = value else {
            return Ok(());
        };
        let path = group.join(file);
        match write(&path, text) {
            Err(Errno::NOENT) if OPTIONAL.contains(&file.as_str()) => {
                notes.push(format!("{file} is left out: this host does not count it"));
                Ok(())
            }
            written => Ok(written.step(format!("write \"{text}\" to {}", path.display()))?),
        }
    }

    /// The group that a setting is for, and what is written to it.
    fn choose<'a>(
        &self,
        setting: &'a Setting,
    ) -> Result<(&Path, &'a Option<FileText>), CgroupError> {
        let of_file = |file: &str| file.split('.').next().unwrap_or_default().to_owned();
        let find = |is_v2: bool, controller: &str| {
            let has_it = |it: &&(Hierarchy, PathBuf)| it.0.is_v2 == is_v2 && it.0.has(controller);
            self.0.iter().find(has_it).map(|(_, path)| path.as_path())
        };
        let (v2, v1) = setting.controllers;
        let v2 = match v2 {
            "" => setting
                .v2
                .as_ref()
                .map_or(String::new(), |(file, _)| of_file(file)),
            name => name.to_owned(),
        };
        match (find(true, &v2), find(false, v1)) {
            (Some(group), _) => Ok((group, &setting.v2)),
            (None, Some(group)) => Ok((group, &setting.v1)),
            (None, None) => {
                let name = setting.v2.as_ref().or(setting.v1.as_ref());
                let name = name.map_or(v2, |(file, _)| file.clone());
                Err(CgroupError::NoController(name))
            }
        }
    }

    /// Moves this process in. It has one thread.
    pub fn enter(&self) -> Result<(), Failure> {
        self.0
            .iter()
            .try_for_each(|(hierarchy, path)| enter(hierarchy, path))
    }

    /// Stops all processes in them, or lets them go on.
    pub fn freeze(&self, is_frozen: bool) -> Result<(), AnyError> {
        let Some((hierarchy, path)) = self.freezer() else {
            return Err(CgroupError::NoController("freezer".into()).into());
        };
        let (file, text) = match (hierarchy.is_v2, is_frozen) {
            (false, true) => ("freezer.state", "FROZEN"),
            (false, false) => ("freezer.state", "THAWED"),
            (true, true) => ("cgroup.freeze", "1"),
            (true, false) => ("cgroup.freeze", "0"),
        };
        write(&path.join(file), text).step_on("write to", path.join(file))?;
        let until = Instant::now() + PATIENCE;
        while self.is_frozen() != is_frozen {
            if Instant::now() >= until {
                return Err(CgroupError::NotFrozen(path.clone()).into());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Lets all processes in them go on, if they stand still.
    pub fn thaw(&self) -> Result<(), AnyError> {
        match self.is_frozen() {
            true => self.freeze(false),
            false => Ok(()),
        }
    }

    /// Whether all processes in them stand still.
    pub fn is_frozen(&self) -> bool {
        let read = |path: PathBuf| std::fs::read_to_string(path).unwrap_or_default();
        match self.freezer() {
            Some((hierarchy, path)) if hierarchy.is_v2 => {
                read(path.join("cgroup.events")).contains("frozen 1")
            }
            Some((_, path)) => read(path.join("freezer.state")).trim() == "FROZEN",
            None => false,
        }
    }

    /// The group that stops processes: that of version 1, where a host has both.
    fn freezer(&self) -> Option<&(Hierarchy, PathBuf)> {
        let is_it = |one: &&(Hierarchy, PathBuf)| !one.0.is_v2 && one.0.has("freezer");
        let of_v1 = self.0.iter().find(is_it);
        of_v1.or_else(|| self.0.iter().find(|one| one.0.is_v2))
    }

    /// Kills all processes in them, but not this one, which has to say what became of them.
    pub fn kill(&self) {
        let own = std::process::id();
        for (_, path) in &self.0 {
            for process in processes(path) {
                if let Some(pidfd) = process.open()
                    && u32::try_from(process.pid) != Ok(own)
                {
                    let _ = process::send(&pidfd, 9);
                }
            }
        }
    }

    /// Whether this process is in one.
    pub fn have_this_process(&self) -> bool {
        let own = std::process::id();
        let mut all = self.0.iter().flat_map(|(_, path)| processes(path));
        all.any(|process| u32::try_from(process.pid) == Ok(own))
    }

    /// Whether no process is in any.
    pub fn are_empty(&self) -> bool {
        self.0.iter().all(|(_, path)| processes(path).is_empty())
    }

    /// Removes those that nothing is in. `above` were missing before.
    pub fn remove_empty(&self, above: &[PathBuf]) {
        for (hierarchy, path) in &self.0 {
            let _ = rustix::fs::rmdir(path);
            remove_above(hierarchy, path, above);
        }
    }

    /// Removes them, with all processes that are still in them. `above` were missing before.
    pub fn remove(&self, above: &[PathBuf]) -> Result<(), AnyError> {
        let until = Instant::now() + PATIENCE;
        for (hierarchy, path) in &self.0 {
            while !remove_tree(path) {
                if Instant::now() >= until {
                    return Err(CgroupError::NotEmpty(path.clone()).into());
                }
                self.kill();
                std::thread::sleep(Duration::from_millis(2));
            }
            remove_above(hierarchy, path, above);
        }
        Ok(())
    }
}

fn make(hierarchy: &Hierarchy, path: &Path) -> Result<(), AnyError> {
    let mut attempt = 1;
    loop {
        match make_once(hierarchy, path) {
            // A group above, which another container made, went with that one meanwhile.
            Err(Errno::NOENT) if attempt < 16 => attempt += 1,
            made => {
                made.step_on("make the control group", path)?;
                break;
            }
        }
    }
    Ok(())
}

fn make_once(hierarchy: &Hierarchy, path: &Path) -> Result<(), Errno> {
    let below = path
        .strip_prefix(&hierarchy.mount)
        .map_err(|_| Errno::INVAL)?;
    let mut at = hierarchy.mount.clone();
    for step in below {
        if hierarchy.is_v2 {
            enable(&at, &hierarchy.controllers);
        }
        let above = at.clone();
        at.push(step);
        match std::fs::create_dir(&at) {
            Ok(()) if at != path => mark(&at),
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(errno(error)),
        }
        if hierarchy.has("cpuset") && !hierarchy.is_v2 {
            fill_cpuset(&above, &at)?;
        }
    }
    Ok(())
}

fn mark(path: &Path) {
    // Without a mark it stays, as other runtimes' groups do.
    let _ = rustix::fs::setxattr(path, MARK, b"1", XattrFlags::CREATE);
}

/// Version 2: lets the groups below have their own limits. What cannot be had is reported when a limit of
/// it is written.
fn enable(group: &Path, controllers: &[String]) {
    let file = group.join("cgroup.subtree_control");
    let enabled = std::fs::read_to_string(&file).unwrap_or_default();
    for one in controllers {
        if !enabled.split_whitespace().any(|it| it == one) {
            let _ = write(&file, &format!("+{one}"));
        }
    }
}

/// Version 1: a cpuset lets no process in before it has processors and memory nodes.
fn fill_cpuset(above: &Path, group: &Path) -> Result<(), Errno> {
    let read = |path: &Path| std::fs::read_to_string(path).map_err(errno);
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let own = group.join(file);
        if read(&own)?.trim().is_empty() {
            write(&own, read(&above.join(file))?.trim())?;
        }
    }
    Ok(())
}

/// The processes in a group and in those below it.
fn processes(group: &Path) -> Vec<Known> {
    let list = std::fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
    let own = list
        .lines()
        .filter_map(|line| Known::of(line.trim().parse().ok()?));
    let below = below(group).into_iter().flat_map(|group| processes(&group));
    own.chain(below).collect()
}

fn below(group: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(group).into_iter().flatten().flatten();
    let folders = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    folders.map(|entry| entry.path()).collect()
}

/// Removes a group with those below it; whether it is gone.
fn remove_tree(group: &Path) -> bool {
    for one in below(group) {
        remove_tree(&one);
    }
    match rustix::fs::rmdir(group) {
        Ok(()) | Err(Errno::NOENT) => true,
        Err(_) => false,
    }
}

/// Removes the groups above that were made to hold this one, as far as they hold nothing else.
fn remove_above(hierarchy: &Hierarchy, path: &Path, listed: &[PathBuf]) {
    let mount = &hierarchy.mount;
    for above in path.ancestors().skip(1).take_while(|it| it != mount) {
        let mut value = [0_u8; 4];
        let mut is_marked = || rustix::fs::getxattr(above, MARK, &mut value[..]).is_ok();
        // Its maker may have been killed before it was marked.
        let is_ours = listed.iter().any(|one| one == above) || is_marked();
        // One that its maker did not come to make is not there.
        let is_gone = || matches!(rustix::fs::rmdir(above), Ok(()) | Err(Errno::NOENT));
        if !is_ours || !is_gone() {
            break;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hierarchy(mount: &Path, is_v2: bool, controllers: &[&str]) -> Hierarchy {
        let controllers = controllers.iter().map(|&one| one.to_owned()).collect();
        Hierarchy {
            is_v2,
            mount: mount.into(),
            controllers,
        }
    }

    fn setting(controller: &'static str, v2: &str, v1: &str) -> Setting {
        Setting {
            controllers: (controller, controller),
            v2: Some((v2.to_owned(), "2".to_owned())),
            v1: Some((v1.to_owned(), "1".to_owned())),
        }
    }

    /// Recorded: folders in place of groups.
    #[test]
    fn limits_go_to_the_version_that_has_the_controller() {
        let top = std::env::temp_dir().join(format!("mayfly-oci-cgroup-{}", std::process::id()));
        let (one, two) = (top.join("one"), top.join("two"));
        let groups = Groups::at(
            Path::new("a/b"),
            &[
                hierarchy(&one, false, &["cpu", "memory"]),
                hierarchy(&two, true, &["memory"]),
            ],
        );
        for mount in [&one, &two] {
            std::fs::create_dir_all(mount.join("a/b")).unwrap();
        }
        std::fs::write(two.join("a/b/memory.max"), "").unwrap();
        std::fs::write(one.join("a/b/cpu.shares"), "").unwrap();
        let mut notes = Vec::new();
        let settings = [
            setting("memory", "memory.max", "memory.limit_in_bytes"),
            setting("cpu", "cpu.weight", "cpu.shares"),
            setting("memory", "memory.swap.max", "memory.memsw.limit_in_bytes"),
        ];
        groups.set(&settings, &mut notes).unwrap();
        let read = |path: PathBuf| std::fs::read_to_string(path).unwrap();
        assert_eq!(read(two.join("a/b/memory.max")), "2\n");
        assert_eq!(read(one.join("a/b/cpu.shares")), "1\n");
        assert!(
            notes.iter().all(|note| note.starts_with("memory.swap.max")),
            "{notes:?}"
        );
        for (setting, expected) in [
            (setting("pids", "pids.max", "pids.max"), "pids.max"),
            (setting("cpu", "cpu.max", "cpu.nonsense"), "cpu.nonsense"),
        ] {
            let error = groups.set(&[setting], &mut notes).unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
        }
        // Its maker was killed before it came to the lower ones.
        std::fs::remove_dir_all(one.join("a")).unwrap();
        std::fs::create_dir(one.join("a")).unwrap();
        let deep = Groups::at(Path::new("a/b/c"), &[hierarchy(&one, false, &["cpu"])]);
        deep.remove(&[one.join("a/b"), one.join("a")]).unwrap();
        assert!(one.exists() && !one.join("a").exists());
        let made = Groups::made(&groups.paths(), &[]);
        assert!(made.paths().is_empty());
        std::fs::remove_dir_all(&top).unwrap();
    }

    #[test]
    fn groups_above_when_their_maker_was_killed_between_two_are_removed_all_the_same() {
        let name = format!("mayfly-oci-groups-{}", std::process::id());
        let mount = std::env::temp_dir().join(name);
        let [outer, inner] = ["a", "a/b"].map(|below| mount.join(below));
        std::fs::create_dir_all(&outer).unwrap();
        let hierarchy = Hierarchy {
            is_v2: true,
            mount: mount.clone(),
            controllers: Vec::new(),
        };
        remove_above(&hierarchy, &inner.join("c"), &[outer.clone(), inner]);
        assert!(!outer.exists());
        std::fs::remove_dir(&mount).unwrap();
    }
}
