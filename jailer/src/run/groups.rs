//! The control groups of one run: which, found out beforehand; made, entered, read and removed by
//! the keeper.
//!
//! A group is `<parent>/mayfly-<id>`, and its maker holds a lock on it. So a group of that name that
//! nobody locks was left by a run that was killed together with its keeper: every start sweeps such
//! groups away. Groups of other names are never touched.

use std::ffi::{OsStr, OsString};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use rustix::fs::{AtFlags, Dir, FileType, FlockOperation, OFlags};

use super::args::{CgroupLimit, Options};
use crate::cgroup::{
    Group, Hierarchies, Plan, Value, Version, Wanted, home, read_below, write_below,
};
use crate::failure::{Doing, Failure};
use crate::made::Made;
use crate::root::open_beneath;

/// First part of the names of our groups.
const MARK: &str = "mayfly-";
/// The group that holds root's, unless another is named.
const PARENT: &str = "mayfly";
/// Period of processor time limits, in microseconds.
const PERIOD_US: u64 = 100_000;

/// What to make.
#[derive(Clone, Debug)]
pub struct Errand {
    id: String,
    parts: Vec<Part>,
    hierarchies: Hierarchies,
}

/// The values of one version, and where their group goes.
#[derive(Clone, Debug)]
struct Part {
    version: Version,
    parent: Vec<OsString>,
    values: Vec<Value>,
}

/// What the limits came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Account {
    /// Processes killed for want of memory.
    pub out_of_memory: u64,
    /// Most memory used at once, in bytes, where it was counted.
    pub peak_memory: Option<u64>,
}

/// Finds out which groups the options ask for; none where they ask for none.
pub fn plan(options: &Options, id: &str, as_root: bool) -> Result<Option<Errand>, Failure> {
    if options.cgroups.is_empty() && options.limits.is_empty() {
        return Ok(None);
    }
    let hierarchies = Hierarchies::of_host()?;
    let offered = hierarchies.offered()?;
    let mut parts: Vec<Part> = Vec::new();
    let mut add = |version: Version, value: Value| match parts
        .iter_mut()
        .find(|part| part.version == version)
    {
        Some(part) => part.values.push(value),
        None => parts.push(Part {
            version,
            parent: Vec::new(),
            values: vec![value],
        }),
    };
    let version_of = |controller: &str, other: &str| {
        if offered.split_whitespace().any(|name| name == controller) {
            Version::V2
        } else if hierarchies.of_controller(other).is_some() || hierarchies.v2.is_none() {
            Version::V1
        } else {
            Version::V2
        }
    };
    for value in &options.cgroups {
        let controller = value.controller();
        let version = options
            .cgroup_version
            .unwrap_or_else(|| version_of(controller, controller));
        add(version, value.clone());
    }
    for limit in &options.limits {
        let (v2, v1) = limit.controllers();
        let version = version_of(v2, v1);
        for value in limit.values(version)? {
            add(version, value);
        }
    }
    let mut errand = Errand {
        id: format!("{MARK}{id}"),
        parts,
        hierarchies,
    };
    // Missing controllers are better found before anything is started.
    errand.plans()?;
    for part in &mut errand.parts {
        part.parent = match &options.parent_cgroup {
            Some(parent) => parent.clone(),
            None if as_root => vec![PARENT.into()],
            None => delegated(&errand.hierarchies, part)?,
        };
    }
    Ok(Some(errand))
}

impl CgroupLimit {
    /// The controller of version 2, and of version 1.
    fn controllers(&self) -> (&'static str, &'static str) {
        match self {
            CgroupLimit::Cpus(_) => ("cpu", "cpu"),
            CgroupLimit::Memory(_) => ("memory", "memory"),
            CgroupLimit::Pids(_) => ("pids", "pids"),
            CgroupLimit::Io(..) => ("io", "blkio"),
        }
    }

    fn values(&self, version: Version) -> Result<Vec<Value>, Failure> {
        let value = |file: &str, text: String| Value {
            file: file.into(),
            text,
        };
        Ok(match (self, version) {
            (CgroupLimit::Cpus(milli), _) => {
                let quota = milli * PERIOD_US / 1000;
                match version {
                    Version::V1 => vec![
                        value("cpu.cfs_period_us", PERIOD_US.to_string()),
                        value("cpu.cfs_quota_us", quota.to_string()),
                    ],
                    Version::V2 => vec![value("cpu.max", format!("{quota} {PERIOD_US}"))],
                }
            }
            (CgroupLimit::Memory(bytes), Version::V1) => {
                vec![value("memory.limit_in_bytes", bytes.to_string())]
            }
            (CgroupLimit::Memory(bytes), Version::V2) => {
                vec![value("memory.max", bytes.to_string())]
            }
            (CgroupLimit::Pids(count), _) => vec![value("pids.max", count.to_string())],
            (CgroupLimit::Io(device, bytes), _) => {
                let device = number_of(device)?;
                match version {
                    Version::V1 => vec![
                        value(
                            "blkio.throttle.read_bps_device",
                            format!("{device} {bytes}"),
                        ),
                        value(
                            "blkio.throttle.write_bps_device",
                            format!("{device} {bytes}"),
                        ),
                    ],
                    Version::V2 => {
                        vec![value(
                            "io.max",
                            format!("{device} rbps={bytes} wbps={bytes}"),
                        )]
                    }
                }
            }
        })
    }
}

/// The number of a block device, as the kernel writes it.
fn number_of(device: &Path) -> Result<String, Failure> {
    let what = format!("limit I/O of {}", device.display());
    let stat = rustix::fs::stat(device).doing(&what)?;
    if !FileType::from_raw_mode(stat.st_mode).is_block_device() {
        return Err(Failure::new(what, "it is not a block device")
            .remedy("name the device that the files lie on, e.g. /dev/vda"));
    }
    Ok(format!(
        "{}:{}",
        rustix::fs::major(stat.st_rdev),
        rustix::fs::minor(stat.st_rdev)
    ))
}

/// The group an ordinary user's groups go into: the nearest one, from its own upwards, that it may
/// change and that no process is in (version 2 wants that of a group with groups in it).
fn delegated(hierarchies: &Hierarchies, part: &Part) -> Result<Vec<OsString>, Failure> {
    let what = "find a control group for this user's microVMs";
    let remedy = "run it with `systemd-run --user --scope -p Delegate=yes`, or have root make a \
                  group for this user and name it with --parent-cgroup";
    let memberships = std::fs::read_to_string("/proc/self/cgroup").doing(what)?;
    let mount = match part.version {
        Version::V2 => hierarchies.v2.as_ref().map(|path| (path, Vec::new())),
        Version::V1 => part
            .values
            .first()
            .and_then(|value| hierarchies.of_controller(value.controller()))
            .map(|(path, options)| (path, options.clone())),
    };
    let (mount, options) =
        mount.ok_or_else(|| Failure::new(what, "that hierarchy is not mounted"))?;
    let own = home(&memberships, part.version, &options).unwrap_or("/");
    for group in Path::new(own.trim_start_matches('/')).ancestors() {
        let folder = mount.join(group);
        let may_write =
            |file: &Path| rustix::fs::access(file, rustix::fs::Access::WRITE_OK).is_ok();
        let free = part.version == Version::V1
            || std::fs::read_to_string(folder.join("cgroup.procs"))
                .is_ok_and(|processes| processes.trim().is_empty());
        if free && may_write(&folder) && may_write(&folder.join("cgroup.procs")) {
            return Ok(group.iter().map(OsStr::to_owned).collect());
        }
    }
    Err(Failure::new(what, format_args!("none above {own} is delegated to it")).remedy(remedy))
}

impl Errand {
    fn plans(&self) -> Result<Vec<Plan>, Failure> {
        self.parts
            .iter()
            .map(|part| {
                let wanted = Wanted {
                    version: part.version,
                    parent: &part.parent,
                    id: &self.id,
                    values: &part.values,
                };
                Plan::new(&wanted, &self.hierarchies)
            })
            .collect()
    }

    /// The numbers of the descriptors a plan keeps open are its own; so planning is done anew by
    /// whoever makes the groups. Sweeps first.
    pub fn make(&self) -> Result<Groups, Failure> {
        let mut last = None;
        // A sweep or a clean-up elsewhere may take a shared group away under us, and a keeper that
        // was killed a moment ago may still hold its lock while it ends.
        for attempt in 0..8 {
            std::thread::sleep(Duration::from_millis(5 * attempt));
            self.sweep();
            let mut made = Made::default();
            match self.make_once(&mut made) {
                Ok(groups) => return Ok(Groups { groups, made }),
                Err(failure) => {
                    made.undo();
                    last = Some(failure);
                }
            }
        }
        Err(last.unwrap_or_else(|| Failure::new("make control groups", "there are none")))
    }

    fn make_once(&self, made: &mut Made) -> Result<Vec<Group>, Failure> {
        let mut groups = Vec::new();
        for plan in self.plans()? {
            groups.extend(plan.make(made)?);
        }
        for group in &groups {
            let what = format!("take the control group {}", group.path.display());
            let taken = rustix::fs::flock(&*group.dir, FlockOperation::NonBlockingLockExclusive);
            if taken.is_err() {
                return Err(Failure::new(what, "a microVM of that id is running")
                    .remedy("choose another --id"));
            }
            read_below(&group.dir, OsStr::new("cgroup.procs")).doing(what)?;
        }
        Ok(groups)
    }

    /// Removes groups whose runs and keepers are gone.
    pub fn sweep(&self) {
        for folder in self.parents() {
            sweep_folder(&folder);
        }
    }

    /// Removes this run's groups, whose keeper was killed and whose last process has just ended.
    pub fn remove_abandoned(&self) {
        for folder in self.parents() {
            // A group stays busy for a moment after its last process.
            for _ in 0..2500 {
                sweep_folder(&folder);
                if !folder.join(&self.id).exists() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        self.tidy();
    }

    /// Removes the groups that only hold ours, when none is left: whoever made them may be gone.
    pub fn tidy(&self) {
        let own = Path::new(PARENT);
        for folder in self.parents().iter().filter(|folder| folder.ends_with(own)) {
            let _ = rustix::fs::rmdir(folder);
        }
    }

    /// The groups that hold ours, in every hierarchy.
    fn parents(&self) -> Vec<PathBuf> {
        let mut parents = Vec::new();
        for part in &self.parts {
            let mut below = PathBuf::new();
            below.extend(&part.parent);
            match part.version {
                Version::V2 => parents.extend(self.hierarchies.v2.iter().map(|it| it.join(&below))),
                Version::V1 => parents.extend(
                    part.values
                        .iter()
                        .filter_map(|value| self.hierarchies.of_controller(value.controller()))
                        .map(|(path, _)| path.join(&below)),
                ),
            }
        }
        parents.dedup();
        parents
    }
}

fn sweep_folder(folder: &Path) {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let none = rustix::fs::Mode::empty();
    let Ok(parent) = rustix::fs::open(folder, flags, none) else {
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
        let Ok(group) = open_beneath(&parent, name, OFlags::RDONLY | OFlags::DIRECTORY) else {
            continue;
        };
        // Held by its maker as long as that lives. A group with a process in it is not removed.
        if rustix::fs::flock(&group, FlockOperation::NonBlockingLockExclusive).is_ok() {
            let _ = rustix::fs::unlinkat(&parent, name, AtFlags::REMOVEDIR);
        }
    }
}

/// Groups that were made.
#[derive(Debug)]
pub struct Groups {
    groups: Vec<Group>,
    made: Made,
}

/// The way into the groups for a new process.
#[derive(Debug, Default)]
pub struct Doors {
    /// The version 2 group, to be made in.
    pub v2: Option<OwnedFd>,
    /// Files of version 1 groups, to write `0` to: that moves the one thread that writes, and so
    /// does not wait for a quiet moment of every processor, as moving a process by number does.
    pub v1: Vec<OwnedFd>,
}

impl Groups {
    /// Opens the way in.
    pub fn doors(&self) -> Result<Doors, Failure> {
        let mut doors = Doors::default();
        for group in &self.groups {
            let what = format!("open the control group {}", group.path.display());
            match group.version {
                Version::V1 => {
                    let tasks = open_beneath(&group.dir, OsStr::new("tasks"), OFlags::WRONLY);
                    doors.v1.push(tasks.doing(what)?);
                }
                Version::V2 => doors.v2 = Some(rustix::io::dup(&*group.dir).doing(what)?),
            }
        }
        Ok(doors)
    }

    /// Lets what was killed in the groups end: a group of version 1 that is frozen holds even that up.
    pub fn let_end(&self) {
        for group in &self.groups {
            let files: &[(&str, &str)] = match group.version {
                Version::V1 => &[("freezer.state", "THAWED")],
                Version::V2 => &[("cgroup.kill", "1"), ("cgroup.freeze", "0")],
            };
            for (file, value) in files {
                // Not every group and not every kernel has them.
                let _ = write_below(&group.dir, OsStr::new(file), value);
            }
        }
    }

    /// What the limits came to, and the end of the groups. Lines for what could not be removed.
    pub fn end(mut self) -> (Account, Vec<String>) {
        let mut account = Account::default();
        for group in &self.groups {
            account.add(&group.dir, group.version);
        }
        let left = self.made.undo();
        (account, left)
    }
}

impl Account {
    fn add(&mut self, dir: &Rc<OwnedFd>, version: Version) {
        let read = |name: &str| read_below(dir, OsStr::new(name)).unwrap_or_default();
        let (events, peak) = match version {
            Version::V1 => ("memory.oom_control", "memory.max_usage_in_bytes"),
            Version::V2 => ("memory.events", "memory.peak"),
        };
        self.out_of_memory += killed_for_memory(&read(events));
        if let Ok(bytes) = read(peak).trim().parse() {
            self.peak_memory = Some(bytes);
        }
    }
}

fn killed_for_memory(events: &str) -> u64 {
    let count = |line: &str| line.strip_prefix("oom_kill ")?.parse::<u64>().ok();
    events.lines().find_map(count).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_have_the_files_of_their_version() {
        let texts = |limit: CgroupLimit, version| -> Vec<String> {
            let values = limit.values(version).unwrap();
            values
                .into_iter()
                .map(|value| format!("{}={}", value.file, value.text))
                .collect()
        };
        assert_eq!(
            texts(CgroupLimit::Cpus(1500), Version::V2),
            ["cpu.max=150000 100000"]
        );
        assert_eq!(
            texts(CgroupLimit::Cpus(500), Version::V1),
            ["cpu.cfs_period_us=100000", "cpu.cfs_quota_us=50000"]
        );
        assert_eq!(
            texts(CgroupLimit::Memory(7), Version::V1),
            ["memory.limit_in_bytes=7"]
        );
        assert_eq!(texts(CgroupLimit::Memory(7), Version::V2), ["memory.max=7"]);
        assert_eq!(texts(CgroupLimit::Pids(7), Version::V2), ["pids.max=7"]);
        let failure = CgroupLimit::Io("/dev/null".into(), 1)
            .values(Version::V2)
            .unwrap_err();
        assert!(
            failure.to_string().contains("not a block device"),
            "{failure}"
        );
    }

    #[test]
    fn kills_are_found_in_either_versions_file() {
        assert_eq!(
            killed_for_memory("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"),
            2
        );
        assert_eq!(
            killed_for_memory("low 0\nhigh 0\nmax 3\noom 1\noom_kill 1\n"),
            1
        );
        assert_eq!(killed_for_memory(""), 0);
    }

    #[test]
    fn sweep_takes_what_nobody_holds_and_is_named_so() {
        let folder = crate::testing::Folder::new("groups-sweep");
        for name in ["mayfly-dead", "mayfly-alive", "other"] {
            std::fs::create_dir(folder.path().join(name)).unwrap();
        }
        let alive = std::fs::File::open(folder.path().join("mayfly-alive")).unwrap();
        rustix::fs::flock(&alive, FlockOperation::NonBlockingLockExclusive).unwrap();
        sweep_folder(folder.path());
        let mut left: Vec<_> = std::fs::read_dir(folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        left.sort();
        assert_eq!(left, ["mayfly-alive", "other"]);
    }
}
