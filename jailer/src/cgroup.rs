//! Control groups, version 1 and 2: finding the hierarchies, making a microVM's group in them,
//! writing its limits, moving in.
//!
//! Version 1 has one hierarchy per controller (or per few), version 2 one for all, in which a
//! controller must be enabled level by level; a host may have both. Looking comes first (making a
//! [`Request`] changes nothing and keeps nothing open), making second, and all moves together at the
//! end: the first one into a version 1 hierarchy waits some milliseconds for every processor, and
//! those straight after it do not.
//!
//! `limit` knows limits by name, `exclusive` the groups of `mayfly-jailer run`, which are locked by
//! their maker and removed at the end.

pub mod exclusive;
pub mod limit;

use std::borrow::Cow;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use rustix::fs::{Access, Mode, OFlags};
use rustix::io::Errno;

use crate::error::{Remedy, at, errno};
use crate::root::{self, RootError, open_beneath};
use crate::undo::{Kind, Undo};

/// A control group cannot be found, made or used.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    #[error("cannot find the cgroup mounts (/proc/self/mounts)")]
    Mounts(#[source] Errno),
    #[error("cannot use cgroups of version 2: that hierarchy is not mounted")]
    NoVersion2,
    #[error(
        "cannot set {file}: this host has no cgroup controller \"{}\" of version {version}",
        controller_of(file)
    )]
    NoController {
        file: String,
        version: Version,
        remedy: Option<String>,
    },
    #[error("cannot read {0}")]
    Read(PathBuf, #[source] Errno),
    #[error("cannot write \"{text}\" to {path}")]
    Write {
        path: PathBuf,
        text: String,
        source: Errno,
    },
    #[error("cannot open the cgroup {0}")]
    Open(PathBuf, #[source] Errno),
    #[error(transparent)]
    Make(#[from] RootError),
    #[error("cannot move into the cgroup {0}")]
    Enter(PathBuf, #[source] Errno),
    #[error("cannot use the cgroup {0}: a microVM of that id is running")]
    IdInUse(PathBuf),
    #[error("cannot find a cgroup for this user's microVMs: none above {0} is delegated to it")]
    NotDelegated(String),
    #[error("cannot limit I/O of {0}")]
    Device(PathBuf, #[source] Errno),
}

impl Remedy for CgroupError {
    fn remedy(&self) -> Option<Cow<'static, str>> {
        Some(Cow::Borrowed(match self {
            CgroupError::Mounts(_) => "mount /proc",
            CgroupError::NoVersion2 => {
                "mount it (`mount -t cgroup2 none DIR`) or use --cgroup-version 1"
            }
            CgroupError::NoController { remedy, .. } => return remedy.clone().map(Cow::Owned),
            CgroupError::Write { path, source, .. } if path.ends_with(ENABLE) => match *source {
                Errno::BUSY => {
                    "processes live in that group itself: choose a --parent-cgroup without any"
                }
                Errno::NOENT => "the group above does not offer that controller",
                _ => return None,
            },
            CgroupError::Write { source, .. } => match *source {
                Errno::NOENT => "that controller has no such file on this host: see --cgroup",
                Errno::INVAL | Errno::RANGE => "the kernel does not take that value for this file",
                _ => return None,
            },
            CgroupError::Enter(_, error) => return cannot_enter(*error).map(Cow::Borrowed),
            CgroupError::IdInUse(_) => "choose another --id",
            CgroupError::NotDelegated(_) => {
                "run it with `systemd-run --user --scope -p Delegate=yes`, or have root make a \
                 group for this user and name it with --parent-cgroup"
            }
            CgroupError::Device(_, Errno::NOTBLK) => {
                "name the device that the files lie on, e.g. /dev/vda"
            }
            CgroupError::Make(error) => return error.remedy(),
            _ => return None,
        }))
    }
}

/// Why a process is not let into a group.
pub fn cannot_enter(error: Errno) -> Option<&'static str> {
    Some(match error {
        Errno::NOSPC => "its cpuset has no processor or no memory node",
        Errno::ACCESS => "that group is not this user's: see --parent-cgroup",
        Errno::BUSY => {
            "it has controllers enabled for the groups below it, so that no process may be in it: \
             choose a group further down"
        }
        Errno::OPNOTSUPP => "it is a threaded or a broken group",
        _ => return None,
    })
}

/// Which interface of the kernel is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// One hierarchy per controller.
    V1,
    /// The unified hierarchy.
    V2,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Version::V1 => "1",
            Version::V2 => "2",
        })
    }
}

/// One value to be written: the file's name, its controller being what stands before the first dot,
/// and the text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Value {
    /// For instance `memory.limit_in_bytes`.
    pub file: String,
    /// Written as it is, with a newline.
    pub text: String,
}

impl Value {
    /// The controller this value is for.
    pub fn controller(&self) -> &str {
        controller_of(&self.file)
    }
}

fn controller_of(file: &str) -> &str {
    file.split('.').next().unwrap_or_default()
}

/// A mounted hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Hierarchy {
    version: Version,
    path: PathBuf,
    /// Mount options, the controllers of version 1 among them.
    options: Vec<String>,
}

/// The hierarchies of this host. The first mount of each counts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hierarchies(Vec<Hierarchy>);

impl Hierarchies {
    /// Finds them.
    pub fn of_host() -> Result<Hierarchies, CgroupError> {
        let text = std::fs::read("/proc/self/mounts")
            .map_err(|error| CgroupError::Mounts(errno(error)))?;
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

    fn v2(&self) -> Option<&Hierarchy> {
        self.0.iter().find(|one| one.version == Version::V2)
    }

    /// Whether a version 1 hierarchy has `controller`.
    pub fn has_v1(&self, controller: &str) -> bool {
        self.v1(controller).is_some()
    }

    fn v1(&self, controller: &str) -> Option<&Hierarchy> {
        let has = |one: &&Hierarchy| one.options.iter().any(|option| option == controller);
        self.0
            .iter()
            .filter(|one| one.version == Version::V1)
            .find(has)
    }

    /// The controllers that version 2 offers.
    pub fn offered(&self) -> Result<Vec<String>, CgroupError> {
        let Some(hierarchy) = self.v2() else {
            return Ok(Vec::new());
        };
        let file = hierarchy.path.join("cgroup.controllers");
        let text = std::fs::read_to_string(&file)
            .map_err(|error| CgroupError::Read(file, errno(error)))?;
        Ok(text.split_whitespace().map(str::to_owned).collect())
    }

    /// The hierarchy for a value, if this host has its controller.
    fn of(&self, version: Version, value: &Value) -> Result<&Hierarchy, CgroupError> {
        let missing = |remedy| CgroupError::NoController {
            file: value.file.clone(),
            version,
            remedy,
        };
        match version {
            // The commonest reason: hosts are moving, and 1 is the default for compatibility.
            Version::V1 => self.v1(value.controller()).ok_or_else(|| {
                let only_2 =
                    self.0.iter().all(|one| one.version == Version::V2) && self.v2().is_some();
                missing(only_2.then(|| {
                    "it has version 2: give --cgroup-version 2 and its file names".to_owned()
                }))
            }),
            Version::V2 => {
                let hierarchy = self.v2().ok_or(CgroupError::NoVersion2)?;
                let offered = self.offered()?;
                if offered.iter().any(|name| name == value.controller()) {
                    Ok(hierarchy)
                } else {
                    let offers = format!("this hierarchy offers: {}", offered.join(" "));
                    Err(missing(Some(offers)))
                }
            }
        }
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

/// The groups that one microVM is to have, checked against the host.
#[derive(Clone, Debug, Default)]
pub struct Request(Vec<Planned>);

/// One group in one hierarchy.
#[derive(Clone, Debug)]
struct Planned {
    hierarchy: Hierarchy,
    /// Names below the mount point, the microVM's own last.
    steps: Vec<OsString>,
    values: Vec<Value>,
}

/// A group this process can move into.
#[derive(Debug)]
pub struct Group {
    hierarchy: Hierarchy,
    dir: Rc<OwnedFd>,
    path: PathBuf,
}

impl Request {
    /// The groups `<parent>/<id>` for `values`. Without any, version 1 has nothing to do, and version
    /// 2 moves into `parent` if that exists: as Firecracker's jailer does.
    pub fn compatible(
        version: Version,
        parent: &[OsString],
        id: &str,
        values: &[Value],
        hierarchies: &Hierarchies,
    ) -> Result<Request, CgroupError> {
        let mut request = Request::default();
        if values.is_empty() && version == Version::V2 {
            let hierarchy = hierarchies.v2().ok_or(CgroupError::NoVersion2)?;
            let path = join(&hierarchy.path, parent);
            return match rustix::fs::stat(&path) {
                Ok(_) => {
                    request.0.push(Planned {
                        hierarchy: hierarchy.clone(),
                        steps: parent.to_vec(),
                        values: Vec::new(),
                    });
                    Ok(request)
                }
                // Documented: then the process stays where it is.
                Err(Errno::NOENT) => Ok(request),
                Err(error) => Err(CgroupError::Open(path, error)),
            };
        }
        for value in values {
            request.add(value, version, hierarchies)?;
        }
        for group in &mut request.0 {
            group.steps = own_group(parent, id);
        }
        Ok(request)
    }

    /// Adds `value` to the group in its hierarchy.
    fn add(
        &mut self,
        value: &Value,
        version: Version,
        hierarchies: &Hierarchies,
    ) -> Result<(), CgroupError> {
        let hierarchy = hierarchies.of(version, value)?;
        match self.0.iter_mut().find(|one| one.hierarchy == *hierarchy) {
            Some(group) => group.values.push(value.clone()),
            None => self.0.push(Planned {
                hierarchy: hierarchy.clone(),
                steps: Vec::new(),
                values: vec![value.clone()],
            }),
        }
        Ok(())
    }

    /// Makes the groups and writes their limits. No process moves yet.
    pub fn make(&self, undo: &mut Undo) -> Result<Vec<Group>, CgroupError> {
        self.0.iter().map(|group| group.make(undo)).collect()
    }
}

/// The names of a microVM's own group, from the mount point down.
fn own_group(parent: &[OsString], id: &str) -> Vec<OsString> {
    let mut steps = parent.to_vec();
    steps.push(id.into());
    steps
}

fn join(path: &Path, steps: &[OsString]) -> PathBuf {
    let mut path = path.to_owned();
    path.extend(steps);
    path
}

/// The file of a version 2 group that says which controllers the groups below it have.
const ENABLE: &str = "cgroup.subtree_control";

impl Planned {
    fn make(&self, undo: &mut Undo) -> Result<Group, CgroupError> {
        let mut path = self.hierarchy.path.clone();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let mut dir = rustix::fs::open(&path, flags, Mode::empty())
            .map(Rc::new)
            .map_err(at(CgroupError::Open, &path))?;
        let last = self.steps.len().saturating_sub(1);
        for (index, step) in self.steps.iter().enumerate() {
            if self.hierarchy.version == Version::V2 {
                self.enable_controllers(&dir, &path)?;
            }
            let kind = if index == last {
                Kind::Folder
            } else {
                Kind::SharedFolder
            };
            let above = dir;
            (dir, path) = root::make_way(&above, &path, &[(step.as_os_str(), kind)], undo)?;
            if self.hierarchy.version == Version::V1 {
                self.fill_cpuset(&above, &dir, &path)?;
            }
        }
        for value in &self.values {
            set(&dir, &path, &value.file, &value.text)?;
        }
        Ok(Group {
            hierarchy: self.hierarchy.clone(),
            dir,
            path,
        })
    }

    /// Version 2: the groups below `dir` get the controllers the values need. This is not undone
    /// when a later step fails: another jail may have seen it in the meantime.
    fn enable_controllers(&self, dir: &OwnedFd, path: &Path) -> Result<(), CgroupError> {
        if self.values.is_empty() {
            return Ok(());
        }
        let before = get(dir, path, ENABLE)?;
        let mut enabled: Vec<&str> = before.split_whitespace().collect();
        for controller in self.values.iter().map(Value::controller) {
            // What is enabled already is left alone: a delegated tree may not be ours to write above
            // the point of delegation.
            if !enabled.contains(&controller) {
                set(dir, path, ENABLE, &format!("+{controller}"))?;
                enabled.push(controller);
            }
        }
        Ok(())
    }

    /// Version 1: a new cpuset is empty, and no process may enter it before it has both processors
    /// and memory nodes; it gets those of the group above.
    fn fill_cpuset(&self, above: &OwnedFd, dir: &OwnedFd, path: &Path) -> Result<(), CgroupError> {
        if !self.hierarchy.options.iter().any(|name| name == "cpuset") {
            return Ok(());
        }
        for file in ["cpuset.cpus", "cpuset.mems"] {
            if get(dir, path, file)?.trim().is_empty() {
                set(dir, path, file, get(above, path, file)?.trim())?;
            }
        }
        Ok(())
    }
}

impl Group {
    /// Moves this process in, after noting the way back.
    pub fn attach(&self, undo: &mut Undo) -> Result<(), CgroupError> {
        // Noted first: going home from home is harmless.
        let (procs, path) = self.hierarchy.open_home()?;
        undo.membership(procs, path);
        write_below(&self.dir, "cgroup.procs", "0").map_err(at(CgroupError::Enter, &self.path))
    }
}

impl Hierarchy {
    /// Opens `cgroup.procs` of the group this process is in; where that lies outside the mount (in
    /// a container), the mount's own.
    fn open_home(&self) -> Result<(OwnedFd, PathBuf), CgroupError> {
        let below = self.home()?.join("cgroup.procs");
        let open = |path: &Path| {
            let flags = OFlags::WRONLY | OFlags::CLOEXEC;
            rustix::fs::open(path, flags, Mode::empty()).map(|file| (file, path.to_owned()))
        };
        open(&self.path.join(below))
            .or_else(|_| open(&self.path.join("cgroup.procs")))
            .map_err(at(CgroupError::Open, &self.path))
    }

    /// The group of this process, as a path below the mount point.
    fn home(&self) -> Result<PathBuf, CgroupError> {
        const FILE: &str = "/proc/self/cgroup";
        let memberships = std::fs::read_to_string(FILE)
            .map_err(|error| CgroupError::Read(FILE.into(), errno(error)))?;
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
    fn nearest_parent(&self) -> Result<Vec<OsString>, CgroupError> {
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
        home.ancestors()
            .find(is_usable)
            .map(|group| group.iter().map(OsStr::to_owned).collect())
            .ok_or_else(|| CgroupError::NotDelegated(format!("/{}", home.display())))
    }
}

fn get(dir: &OwnedFd, path: &Path, file: &str) -> Result<String, CgroupError> {
    read_below(dir, file).map_err(|error| CgroupError::Read(path.join(file), error))
}

fn set(dir: &OwnedFd, path: &Path, file: &str, text: &str) -> Result<(), CgroupError> {
    write_below(dir, file, text).map_err(|source| CgroupError::Write {
        path: path.join(file),
        text: text.to_owned(),
        source,
    })
}

/// Reads a file of the group `dir`.
fn read_below(dir: &OwnedFd, name: &str) -> Result<String, Errno> {
    let file = open_beneath(dir, OsStr::new(name), OFlags::RDONLY)?;
    std::io::read_to_string(std::fs::File::from(file)).map_err(errno)
}

/// Writes a value in one piece: that is how the kernel wants these files written.
fn write_below(dir: &OwnedFd, name: &str, text: &str) -> Result<(), Errno> {
    let file = open_beneath(dir, OsStr::new(name), OFlags::WRONLY | OFlags::TRUNC)?;
    rustix::io::write(&file, format!("{text}\n").as_bytes()).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Folder;

    const HYBRID: &str = "\
sysfs /sys sysfs rw,relatime 0 0
cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,relatime,cpu,cpuacct 0 0
cgroup /sys/fs/cgroup/a\\040b cgroup rw,relatime,memory 0 0
cgroup2 /sys/fs/cgroup/unified cgroup2 rw,relatime 0 0
cgroup2 /elsewhere cgroup2 rw,relatime 0 0
short line
";

    fn value(file: &str, text: &str) -> Value {
        Value {
            file: file.into(),
            text: text.into(),
        }
    }

    fn request(
        version: Version,
        parent: &[&str],
        values: &[Value],
        hierarchies: &[Hierarchy],
    ) -> Result<Request, CgroupError> {
        let parent: Vec<OsString> = parent.iter().map(OsString::from).collect();
        let hierarchies = Hierarchies(hierarchies.to_vec());
        Request::compatible(version, &parent, "one", values, &hierarchies)
    }

    fn v1(path: &Path, options: &[&str]) -> Hierarchy {
        Hierarchy {
            version: Version::V1,
            path: path.into(),
            options: options.iter().map(|&option| option.into()).collect(),
        }
    }

    fn v2(path: &Path) -> Hierarchy {
        Hierarchy {
            version: Version::V2,
            path: path.into(),
            options: Vec::new(),
        }
    }

    /// A tree with the files a kernel would show, since plain folders do not fill themselves.
    fn recorded(name: &str, folders: &[&str], files: &[(&str, &str)]) -> Folder {
        let folder = Folder::new(name);
        for below in folders {
            std::fs::create_dir_all(folder.path().join(below)).unwrap();
            for (file, text) in files {
                std::fs::write(folder.path().join(below).join(file), text).unwrap();
            }
        }
        folder
    }

    fn read(folder: &Folder, path: &str) -> String {
        std::fs::read_to_string(folder.path().join(path)).unwrap()
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

    #[test]
    fn request_when_the_controller_is_missing_says_what_there_is() {
        let values = [value("memory.max", "1")];
        let remedy = |result: Result<Request, CgroupError>| {
            let error = result.unwrap_err();
            error.remedy().unwrap().into_owned()
        };
        let only_v2 = [v2(Path::new("/x"))];
        let text = remedy(request(Version::V1, &[], &values, &only_v2));
        assert!(text.contains("--cgroup-version 2"), "{text}");
        let error = request(Version::V2, &[], &values, &[]).unwrap_err();
        assert!(matches!(error, CgroupError::NoVersion2), "{error}");
        let tree = recorded(
            "cgroup-none",
            &[""],
            &[("cgroup.controllers", "cpu pids\n")],
        );
        let text = remedy(request(Version::V2, &[], &values, &[v2(tree.path())]));
        assert!(text.contains("offers: cpu pids"), "{text}");
    }

    #[test]
    fn v2_enables_controllers_above_and_writes_values() {
        let tree = recorded(
            "cgroup-v2",
            &["", "top", "top/one"],
            &[
                ("cgroup.controllers", "cpu memory\n"),
                (ENABLE, "cpu\n"),
                ("cgroup.procs", ""),
                ("memory.max", "max\n"),
                ("cpu.max", "max 100000\n"),
            ],
        );
        let values = [
            value("memory.max", "67108864"),
            value("cpu.max", "50000 100000"),
        ];

        let request = request(Version::V2, &["top"], &values, &[v2(tree.path())]).unwrap();
        let mut undo = Undo::default();
        let groups = request.make(&mut undo).unwrap();

        assert_eq!(groups.len(), 1);
        assert_eq!(groups[0].path, tree.path().join("top/one"));
        assert_eq!(read(&tree, ENABLE), "+memory\n");
        assert_eq!(read(&tree, "top/cgroup.subtree_control"), "+memory\n");
        assert_eq!(read(&tree, "top/one/cgroup.subtree_control"), "cpu\n");
        assert_eq!(read(&tree, "top/one/memory.max"), "67108864\n");
        assert_eq!(read(&tree, "top/one/cpu.max"), "50000 100000\n");
        assert!(undo.run().is_empty());
        assert!(tree.path().join("top/one").exists(), "it was there before");
    }

    #[test]
    fn v2_without_values_uses_the_parent_only_if_it_exists() {
        let tree = recorded("cgroup-v2-parent", &["", "there"], &[("cgroup.procs", "")]);
        let make = |parent| {
            let request = request(Version::V2, &[parent], &[], &[v2(tree.path())]).unwrap();
            request.make(&mut Undo::default()).unwrap()
        };
        assert_eq!(make("there")[0].path, tree.path().join("there"));
        assert!(make("missing").is_empty());
        assert!(!tree.path().join("missing").exists());
    }

    #[test]
    fn v1_fills_cpusets_from_above_and_joins_controllers_of_one_mount() {
        let tree = recorded(
            "cgroup-v1",
            &["", "top", "top/one"],
            &[
                ("cpuset.cpus", "\n"),
                ("cpuset.mems", "\n"),
                ("cpu.shares", "1024\n"),
            ],
        );
        std::fs::write(tree.path().join("cpuset.cpus"), "0-1\n").unwrap();
        std::fs::write(tree.path().join("cpuset.mems"), "0\n").unwrap();
        let values = [value("cpu.shares", "10"), value("cpuset.cpus", "1")];

        let both = [v1(tree.path(), &["cpuset", "cpu"])];
        let request = request(Version::V1, &["top"], &values, &both).unwrap();
        let groups = request.make(&mut Undo::default()).unwrap();

        assert_eq!(groups.len(), 1);
        assert_eq!(read(&tree, "top/cpuset.cpus"), "0-1\n");
        assert_eq!(read(&tree, "top/one/cpuset.mems"), "0\n");
        assert_eq!(read(&tree, "top/one/cpuset.cpus"), "1\n");
        assert_eq!(read(&tree, "top/one/cpu.shares"), "10\n");
    }

    #[test]
    fn make_when_a_file_is_missing_names_it_and_undo_removes_the_group() {
        let tree = recorded("cgroup-file", &[""], &[]);
        let values = [value("memory.nonsense", "1")];
        let memory = [v1(tree.path(), &["memory"])];
        let request = request(Version::V1, &["top"], &values, &memory).unwrap();
        let mut undo = Undo::default();
        let text = request.make(&mut undo).unwrap_err().to_string();
        assert!(text.contains("top/one/memory.nonsense"), "{text}");
        assert!(undo.run().is_empty());
        assert!(!tree.path().join("top").exists());
    }
}
