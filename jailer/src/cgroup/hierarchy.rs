//! The hierarchies of control groups that this host has mounted, and the place of this process in them.
//! Only looks.

use std::ffi::{OsStr, OsString};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, OFlags};

use super::{CgroupError, OPEN, Value, Version};
use crate::error::{Advice as _, AnyError, Failure, Step as _};
use crate::sys;

/// A mounted hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hierarchy {
    pub(super) version: Version,
    pub(super) path: PathBuf,
    /// Mount options, the controllers of version 1 among them.
    pub(super) options: Vec<String>,
}

/// The hierarchies of this host. The first mount of each counts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hierarchies(pub(super) Vec<Hierarchy>);

impl Hierarchies {
    /// Finds them.
    pub fn of_host() -> Result<Hierarchies, Failure> {
        let text = std::fs::read("/proc/self/mounts")
            .step("find the cgroup mounts (/proc/self/mounts)")
            .advise("mount /proc")?;
        Ok(Hierarchies::parse(&String::from_utf8_lossy(&text)))
    }

    /// Finds them in the text of a `mounts` file.
    fn parse(mounts: &str) -> Hierarchies {
        let hierarchy = |line: &str| {
            let mut words = line.split(' ').skip(1);
            let (place, kind, options) = (words.next()?, words.next()?, words.next()?);
            Some(Hierarchy {
                version: match kind {
                    "cgroup" => Version::V1,
                    "cgroup2" => Version::V2,
                    _ => return None,
                },
                path: unescape(place),
                options: options.split(',').map(str::to_owned).collect(),
            })
        };
        Hierarchies(mounts.lines().filter_map(hierarchy).collect())
    }

    pub(super) fn v2(&self) -> Option<&Hierarchy> {
        self.0.iter().find(|one| one.version == Version::V2)
    }

    /// The version 1 hierarchy that has `controller`.
    pub fn v1(&self, controller: &str) -> Option<&Hierarchy> {
        self.0
            .iter()
            .filter(|one| one.version == Version::V1)
            .find(|one| one.options.iter().any(|option| option == controller))
    }

    /// The controllers that version 2 offers.
    pub fn offered(&self) -> Result<Vec<String>, Failure> {
        let Some(hierarchy) = self.v2() else {
            return Ok(Vec::new());
        };
        let file = hierarchy.path.join("cgroup.controllers");
        let text = std::fs::read_to_string(&file).step_on("read", &file)?;
        Ok(text.split_whitespace().map(str::to_owned).collect())
    }

    /// The hierarchy for a value, if this host has its controller.
    pub(super) fn of(&self, version: Version, value: &Value) -> Result<&Hierarchy, AnyError> {
        let controller = value.controller();
        let (found, hint) = match version {
            // The commonest reason: hosts are moving, and 1 is the default for compatibility.
            Version::V1 => {
                let has_v1 = self.0.iter().any(|one| one.version == Version::V1);
                let hint = match self.v2() {
                    Some(_) if !has_v1 => {
                        "; it has version 2: give --cgroup-version 2 and its file names".into()
                    }
                    _ => String::new(),
                };
                (self.v1(controller), hint)
            }
            Version::V2 => {
                let hierarchy = self.v2().ok_or(CgroupError::NoVersion2)?;
                let offered = self.offered()?;
                let hint = format!("; this hierarchy offers: {}", offered.join(" "));
                let is_offered = offered.iter().any(|name| name == controller);
                (is_offered.then_some(hierarchy), hint)
            }
        };
        let file = value.file.clone();
        let missing = || CgroupError::NoController {
            file,
            version,
            hint,
        };
        Ok(found.ok_or_else(missing)?)
    }
}

/// Mount points are written with blanks and the like as a backslash and three octal digits.
fn unescape(text: &str) -> PathBuf {
    let bytes = text.as_bytes();
    let mut plain = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        let code = bytes
            .get(at + 1..at + 4)
            .filter(|_| byte == b'\\')
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        plain.push(code.unwrap_or(byte));
        at += if code.is_some() { 4 } else { 1 };
    }
    PathBuf::from(OsString::from_vec(plain))
}

impl Hierarchy {
    /// Opens `cgroup.procs` of the group this process is in; where that lies outside the mount (in
    /// a container), the mount's own.
    pub(super) fn open_home(&self) -> Result<(OwnedFd, PathBuf), Failure> {
        let below = self.home()?.join("cgroup.procs");
        let open = |below: &Path| {
            let path = self.path.join(below);
            sys::open(&path, OFlags::WRONLY).map(|file| (file, path))
        };
        open(&below)
            .or_else(|_| open(Path::new("cgroup.procs")))
            .step_on(OPEN, &self.path)
    }

    /// The group of this process, as a path below the mount point.
    pub(super) fn home(&self) -> Result<PathBuf, Failure> {
        const FILE: &str = "/proc/self/cgroup";
        let memberships = std::fs::read_to_string(FILE).step_on("read", FILE)?;
        let home = self.home_in(&memberships).unwrap_or("/");
        Ok(home.trim_start_matches('/').into())
    }

    /// The same from the text of /proc/self/cgroup: lines of `number:controllers:path`.
    fn home_in<'a>(&self, memberships: &'a str) -> Option<&'a str> {
        memberships.lines().find_map(|line| {
            let mut parts = line.splitn(3, ':');
            let (number, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
            let is_this = match self.version {
                Version::V2 => number == "0" && controllers.is_empty(),
                Version::V1 => controllers
                    .split(',')
                    .any(|name| !name.is_empty() && self.options.iter().any(|it| it == name)),
            };
            is_this.then_some(path)
        })
    }

    /// The nearest group from this process's own upwards that this user may make groups in. Version
    /// 2 wants no process in a group whose groups have controllers.
    pub(super) fn nearest_parent(&self) -> Result<Vec<OsString>, AnyError> {
        let home = self.home()?;
        let may_write = |file: &Path| rustix::fs::access(file, Access::WRITE_OK).is_ok();
        let is_usable = |group: &&Path| {
            let folder = self.path.join(group);
            let procs = folder.join("cgroup.procs");
            let has_no_process =
                || std::fs::read_to_string(&procs).is_ok_and(|text| text.trim().is_empty());
            (self.version == Version::V1 || has_no_process())
                && may_write(&folder)
                && may_write(&procs)
        };
        let found = home.ancestors().find(is_usable);
        let found = found.map(|group| group.iter().map(OsStr::to_owned).collect());
        let home = || format!("/{}", home.display());
        Ok(found.ok_or_else(|| CgroupError::NotDelegated(home()))?)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    const HYBRID: &str = "\
sysfs /sys sysfs rw,relatime 0 0
cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,relatime,cpu,cpuacct 0 0
cgroup /sys/fs/cgroup/a\\040b cgroup rw,relatime,memory 0 0
cgroup2 /sys/fs/cgroup/unified cgroup2 rw,relatime 0 0
cgroup2 /elsewhere cgroup2 rw,relatime 0 0
short line
";

    pub fn v1(path: &Path, options: &[&str]) -> Hierarchy {
        Hierarchy {
            version: Version::V1,
            path: path.into(),
            options: options.iter().map(|&option| option.into()).collect(),
        }
    }

    pub fn v2(path: &Path) -> Hierarchy {
        Hierarchy {
            version: Version::V2,
            path: path.into(),
            options: Vec::new(),
        }
    }

    #[test]
    fn parse_finds_both_versions() {
        let found = Hierarchies::parse(HYBRID);
        let path = |hierarchy: Option<&Hierarchy>| hierarchy.map(|it| it.path.clone());
        assert_eq!(path(found.v2()), Some("/sys/fs/cgroup/unified".into()));
        let cpu = path(found.v1("cpuacct"));
        assert_eq!(cpu, Some("/sys/fs/cgroup/cpu,cpuacct".into()));
        assert_eq!(path(found.v1("memory")), Some("/sys/fs/cgroup/a b".into()));
        assert_eq!(path(found.v1("pids")), None);
    }

    #[test]
    fn unescape_leaves_what_is_no_code() {
        for (text, plain) in [("/a\\040b", "/a b"), ("/a\\", "/a\\"), ("/\\09x", "/\\09x")] {
            assert_eq!(unescape(text), Path::new(plain));
        }
    }

    #[test]
    fn home_is_found_by_version_and_controller() {
        let text = "9:name=systemd:/s\n4:memory:/deep/er\n1:cpu,cpuacct:/c:d\n0::/two\n";
        let v1 = |options: &[&str]| {
            v1(Path::new("/x"), options)
                .home_in(text)
                .map(str::to_owned)
        };
        assert_eq!(v1(&["rw", "memory"]).as_deref(), Some("/deep/er"));
        assert_eq!(v1(&["cpuacct"]).as_deref(), Some("/c:d"));
        assert_eq!(v1(&["pids"]), None);
        assert_eq!(v2(Path::new("/x")).home_in(text), Some("/two"));
    }
}
