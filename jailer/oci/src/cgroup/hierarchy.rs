//! The hierarchies of control groups that this host has, and this process's own place in them.

use std::fs::File;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use crate::error::{Failure, Step as _};

/// The controllers of version 1 whose groups a container is in.
const V1: &[&str] = &[
    "memory", "cpu", "cpuacct", "cpuset", "pids", "blkio", "freezer",
];

/// The hierarchy in which systemd of a host with version 1 keeps its units. It has no limits.
const NAMED: &str = "name=systemd";

/// A mounted hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hierarchy {
    pub is_v2: bool,
    pub(super) mount: PathBuf,
    /// Its controllers; of version 2, those that its root offers.
    pub(super) controllers: Vec<String>,
}

impl Hierarchy {
    pub(super) fn has(&self, controller: &str) -> bool {
        self.controllers.iter().any(|one| one == controller)
    }
}

/// The hierarchies of this host that have limits.
pub fn hierarchies() -> Result<Vec<Hierarchy>, Failure> {
    Ok(parse(&mounts()?, V1))
}

fn mounts() -> Result<String, Failure> {
    std::fs::read_to_string("/proc/self/mounts").step("find the control groups (/proc/self/mounts)")
}

/// Those of version 2, and those of version 1 that have one of `wanted`.
fn parse(mounts: &str, wanted: &[&str]) -> Vec<Hierarchy> {
    let mut found: Vec<Hierarchy> = Vec::new();
    for line in mounts.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let [_, mount, kind, options, ..] = words[..] else {
            continue;
        };
        let mount = PathBuf::from(mount.replace("\\040", " "));
        let controllers: Vec<String> = match kind {
            "cgroup" => options
                .split(',')
                .filter(|one| wanted.contains(one))
                .map(str::to_owned)
                .collect(),
            "cgroup2" => {
                let offered =
                    std::fs::read_to_string(mount.join("cgroup.controllers")).unwrap_or_default();
                offered.split_whitespace().map(str::to_owned).collect()
            }
            _ => continue,
        };
        let is_v2 = kind == "cgroup2";
        // The first mount of each counts; one of version 1 without a controller is not for limits.
        let is_known = |it: &Hierarchy| it.is_v2 == is_v2 && it.controllers == controllers;
        if (is_v2 || !controllers.is_empty()) && !found.iter().any(is_known) {
            found.push(Hierarchy {
                is_v2,
                mount,
                controllers,
            });
        }
    }
    found
}

/// This process's own groups, to come back to.
pub struct Home(Vec<(Hierarchy, PathBuf)>);

impl Home {
    /// Finds them. systemd's own is among them: it ends the processes that it finds there.
    pub fn find() -> Result<Home, Failure> {
        let memberships = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let of = |one: &Hierarchy| {
            let below = home_in(&memberships, one)
                .unwrap_or("/")
                .trim_start_matches('/')
                .to_owned();
            let path = one.mount.join(below);
            // In a container, what lies above the mount cannot be seen.
            let path = if path.is_dir() {
                path
            } else {
                one.mount.clone()
            };
            (one.clone(), path)
        };
        let hierarchies = parse(&mounts()?, &[V1, &[NAMED]].concat());
        Ok(Home(hierarchies.iter().map(of).collect()))
    }

    /// Moves this process back; where its group is gone, as a scope is that it was alone in, to the next one above
    /// that takes it.
    pub fn enter(&self) {
        for (hierarchy, path) in &self.0 {
            let above = path.ancestors();
            let mut above = above.take_while(|it| it.starts_with(&hierarchy.mount));
            // What does not work leaves it in a group that cannot be removed, which is reported then.
            let _ = above.find(|it| enter(hierarchy, it).is_ok());
        }
    }
}

/// Lines of /proc/self/cgroup are `number:controllers:path`.
fn home_in<'a>(memberships: &'a str, hierarchy: &Hierarchy) -> Option<&'a str> {
    memberships.lines().find_map(|line| {
        let mut parts = line.splitn(3, ':');
        let (number, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
        let is_it = match hierarchy.is_v2 {
            true => number == "0" && controllers.is_empty(),
            false => controllers.split(',').any(|name| hierarchy.has(name)),
        };
        is_it.then_some(path)
    })
}

pub(super) fn enter(hierarchy: &Hierarchy, path: &Path) -> Result<(), Failure> {
    // Moving the one thread that writes does not wait for a quiet moment of every processor, as moving a
    // process does.
    let file = if hierarchy.is_v2 {
        "cgroup.procs"
    } else {
        "tasks"
    };
    write(&path.join(file), "0").step_on("move into the control group", path)
}

/// Writes a value in one piece: that is how the kernel wants these files written.
pub(super) fn write(path: &Path, text: &str) -> Result<(), Errno> {
    let file = File::options().write(true).open(path).map_err(errno)?;
    match rustix::io::write(&file, format!("{text}\n").as_bytes())? {
        0 => Err(Errno::IO),
        _ => Ok(()),
    }
}

pub(super) fn errno(error: std::io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
sysfs /sys sysfs rw 0 0
cgroup /c/cpu,cpuacct cgroup rw,cpu,cpuacct 0 0
cgroup /c/a\\040b cgroup rw,memory 0 0
cgroup /again cgroup rw,memory 0 0
cgroup /c/systemd cgroup rw,name=systemd 0 0
cgroup2 /c/unified cgroup2 rw 0 0
";

    fn hierarchy(mount: &str, is_v2: bool, controllers: &[&str]) -> Hierarchy {
        let controllers = controllers.iter().map(|&one| one.to_owned()).collect();
        Hierarchy {
            is_v2,
            mount: mount.into(),
            controllers,
        }
    }

    #[test]
    fn hierarchies_of_both_versions_are_found_once() {
        let expected = [
            hierarchy("/c/cpu,cpuacct", false, &["cpu", "cpuacct"]),
            hierarchy("/c/a b", false, &["memory"]),
            hierarchy("/c/unified", true, &[]),
        ];
        assert_eq!(parse(MOUNTS, V1), expected);
        let named = &parse(MOUNTS, &[NAMED])[0];
        assert_eq!(*named, hierarchy("/c/systemd", false, &[NAMED]));
        assert_eq!(home_in("1:name=systemd:/s\n", named), Some("/s"));
        let memberships = "4:memory:/m\n1:cpu,cpuacct:/c:d\n0::/two\n";
        let homes: Vec<_> = expected
            .iter()
            .map(|one| home_in(memberships, one))
            .collect();
        assert_eq!(homes, [Some("/c:d"), Some("/m"), Some("/two")]);
    }
}
