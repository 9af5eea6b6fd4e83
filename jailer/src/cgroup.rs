//! Control groups, version 1 and 2: finding the hierarchies, making a microVM's group in them,
//! writing its limits, moving in.
//!
//! Version 1 has one hierarchy per controller (or per few), version 2 one for all, in which a
//! controller must be switched on level by level; a host may have both. A group is
//! `<mount>/<parent>/<id>`. Looking comes first (`Plan::new` changes nothing), making second, and
//! all moves together at the end: the first one into a version 1 hierarchy waits some milliseconds
//! for every processor, and those straight after it do not.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::failure::{Doing, Failure};
use crate::made::{Kind, Made};
use crate::root::{self, open_beneath};

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
        self.file.split('.').next().unwrap_or_default()
    }
}

/// Where cgroup hierarchies are mounted on this host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hierarchies {
    /// Mount point and the options, controllers among them, of each version 1 hierarchy.
    v1: Vec<(PathBuf, Vec<String>)>,
    /// Mount point of the version 2 hierarchy.
    pub(crate) v2: Option<PathBuf>,
}

impl Hierarchies {
    /// Reads the host's.
    pub fn of_host() -> Result<Hierarchies, Failure> {
        const MOUNTS: &str = "/proc/self/mounts";
        let text = std::fs::read(MOUNTS).doing_or(
            format_args!("find the cgroup mounts in {MOUNTS}"),
            |_| "mount /proc",
        )?;
        Ok(Hierarchies::parse(&String::from_utf8_lossy(&text)))
    }

    /// Reads them from the text of a `mounts` file. The first mount of a hierarchy counts.
    pub fn parse(mounts: &str) -> Hierarchies {
        let mut found = Hierarchies::default();
        for line in mounts.lines() {
            let mut words = line.split(' ');
            let (_, Some(place), Some(kind), Some(options)) =
                (words.next(), words.next(), words.next(), words.next())
            else {
                continue;
            };
            match kind {
                "cgroup" => {
                    let options = options.split(',').map(str::to_owned).collect();
                    found.v1.push((unescape(place), options));
                }
                "cgroup2" if found.v2.is_none() => found.v2 = Some(unescape(place)),
                _ => {}
            }
        }
        found
    }

    /// The names of the controllers that version 2 offers, with blanks between them.
    pub(crate) fn offered(&self) -> Result<String, Failure> {
        let Some(path) = &self.v2 else {
            return Ok(String::new());
        };
        let file = path.join("cgroup.controllers");
        std::fs::read_to_string(&file).doing(format_args!("read {}", file.display()))
    }

    /// The version 1 hierarchy that has `controller`.
    pub(crate) fn of_controller(&self, controller: &str) -> Option<&(PathBuf, Vec<String>)> {
        self.v1
            .iter()
            .find(|(_, options)| options.iter().any(|option| option == controller))
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

/// What the caller asks for.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// Which interface.
    pub version: Version,
    /// The groups above the microVM's, from the mount point down.
    pub parent: &'a [OsString],
    /// The microVM's own group.
    pub id: &'a str,
    /// Its limits. Without any, version 1 does nothing and version 2 moves into `parent`, if that
    /// exists.
    pub values: &'a [Value],
}

/// The groups to be made, with everything about them found out that can be without making them.
#[derive(Debug)]
pub struct Plan {
    groups: Vec<Planned>,
}

#[derive(Debug)]
struct Planned {
    version: Version,
    mount: Rc<OwnedFd>,
    mount_path: PathBuf,
    /// Mount options of a version 1 hierarchy, to know it again in /proc/self/cgroup.
    options: Vec<String>,
    /// Names below the mount point, the microVM's own last.
    steps: Vec<OsString>,
    values: Vec<Value>,
}

/// A group this process can move into.
#[derive(Debug)]
pub struct Group {
    /// Of which interface it is.
    pub(crate) version: Version,
    /// Its folder, opened.
    pub(crate) dir: Rc<OwnedFd>,
    /// Its folder's name, for sentences.
    pub(crate) path: PathBuf,
    mount: Rc<OwnedFd>,
    mount_path: PathBuf,
    options: Vec<String>,
}

impl Plan {
    /// Finds the hierarchies for all of `wanted`, and refuses controllers this host does not have.
    pub fn new(wanted: &Wanted<'_>, hierarchies: &Hierarchies) -> Result<Plan, Failure> {
        match wanted.version {
            Version::V1 => Plan::v1(wanted, hierarchies),
            Version::V2 => Plan::v2(wanted, hierarchies),
        }
    }

    fn v1(wanted: &Wanted<'_>, hierarchies: &Hierarchies) -> Result<Plan, Failure> {
        let mut groups: Vec<Planned> = Vec::new();
        for value in wanted.values {
            let (path, options) = hierarchies
                .of_controller(value.controller())
                .ok_or_else(|| no_controller(value, wanted.version, hierarchies))?;
            if let Some(group) = groups.iter_mut().find(|group| group.mount_path == *path) {
                group.values.push(value.clone());
                continue;
            }
            groups.push(Planned {
                version: Version::V1,
                mount: open_mount(path)?,
                mount_path: path.clone(),
                options: options.clone(),
                steps: own_group(wanted),
                values: vec![value.clone()],
            });
        }
        Ok(Plan { groups })
    }

    fn v2(wanted: &Wanted<'_>, hierarchies: &Hierarchies) -> Result<Plan, Failure> {
        let Some(path) = &hierarchies.v2 else {
            return Err(
                Failure::new("use cgroups of version 2", "that hierarchy is not mounted")
                    .remedy("mount it (`mount -t cgroup2 none DIR`) or use --cgroup-version 1"),
            );
        };
        let mount = open_mount(path)?;
        let steps = if wanted.values.is_empty() {
            let mut parent = PathBuf::new();
            parent.extend(wanted.parent);
            if parent.as_os_str().is_empty() {
                parent.push(".");
            }
            match open_beneath(&mount, parent.as_os_str(), OFlags::PATH | OFlags::DIRECTORY) {
                Ok(_) => wanted.parent.to_vec(),
                // Documented: then the process stays where it is.
                Err(Errno::NOENT) => return Ok(Plan { groups: Vec::new() }),
                Err(error) => {
                    return Err(Failure::new(
                        format_args!("open the cgroup {}", path.join(parent).display()),
                        error,
                    ));
                }
            }
        } else {
            let offered = read_below(&mount, OsStr::new("cgroup.controllers"))
                .doing(format_args!("read {}/cgroup.controllers", path.display()))?;
            for value in wanted.values {
                if !offered
                    .split_whitespace()
                    .any(|name| name == value.controller())
                {
                    return Err(no_controller(value, wanted.version, hierarchies)
                        .remedy(format_args!("this hierarchy offers: {}", offered.trim())));
                }
            }
            own_group(wanted)
        };
        Ok(Plan {
            groups: vec![Planned {
                version: Version::V2,
                mount,
                mount_path: path.clone(),
                options: Vec::new(),
                steps,
                values: wanted.values.to_vec(),
            }],
        })
    }

    /// Makes the groups and writes their limits. Nobody moves yet.
    pub fn make(self, made: &mut Made) -> Result<Vec<Group>, Failure> {
        self.groups
            .into_iter()
            .map(|group| group.make(made))
            .collect()
    }
}

/// The names of the microVM's own group, from the mount point down.
fn own_group(wanted: &Wanted<'_>) -> Vec<OsString> {
    let mut steps = wanted.parent.to_vec();
    steps.push(wanted.id.into());
    steps
}

fn no_controller(value: &Value, version: Version, hierarchies: &Hierarchies) -> Failure {
    let failure = Failure::new(
        format_args!("set {} (--cgroup)", value.file),
        format_args!(
            "this host has no cgroup controller \"{}\" of version {version}",
            value.controller()
        ),
    );
    // The commonest reason: hosts are moving, and 1 is the default for compatibility's sake.
    if version == Version::V1 && hierarchies.v1.is_empty() && hierarchies.v2.is_some() {
        return failure.remedy("it has version 2: give --cgroup-version 2 and its file names");
    }
    failure
}

fn open_mount(path: &Path) -> Result<Rc<OwnedFd>, Failure> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS)
        .map(Rc::new)
        .doing(format_args!("open the cgroup mount {}", path.display()))
}

impl Planned {
    fn make(self, made: &mut Made) -> Result<Group, Failure> {
        let mut dir = Rc::clone(&self.mount);
        let mut path = self.mount_path.clone();
        let last = self.steps.len().saturating_sub(1);
        for (index, step) in self.steps.iter().enumerate() {
            if self.version == Version::V2 {
                self.switch_on(&dir, &path)?;
            }
            let kind = if index == last {
                Kind::Folder
            } else {
                Kind::SharedFolder
            };
            let above = dir;
            (dir, path) = root::make_way(&above, &path, &[(step.as_os_str(), kind)], made)?;
            if self.version == Version::V1 {
                self.fill_cpuset(&above, &dir, &path)?;
            }
        }
        for value in &self.values {
            write_below(&dir, OsStr::new(&value.file), &value.text).map_err(|error| {
                let failure = Failure::new(
                    format_args!(
                        "write \"{}\" to {}",
                        value.text,
                        path.join(&value.file).display()
                    ),
                    error,
                );
                match error {
                    Errno::NOENT => failure
                        .remedy("that controller has no such file on this host: see --cgroup"),
                    Errno::INVAL | Errno::RANGE => {
                        failure.remedy("the kernel does not take that value for this file")
                    }
                    _ => failure,
                }
            })?;
        }
        Ok(Group {
            version: self.version,
            dir,
            path,
            mount: self.mount,
            mount_path: self.mount_path,
            options: self.options,
        })
    }

    /// Version 2: the groups below `dir` get the controllers the values need. This is not taken
    /// back when a later step fails: another jail may have seen it on in the meantime.
    fn switch_on(&self, dir: &OwnedFd, path: &Path) -> Result<(), Failure> {
        if self.values.is_empty() {
            return Ok(());
        }
        let file = OsStr::new("cgroup.subtree_control");
        let what = |controller: &str| {
            format!(
                "switch on the controller \"{controller}\" in {}",
                path.join(file).display()
            )
        };
        let mut on: Vec<String> = read_below(dir, file)
            .doing(what("any"))?
            .split_whitespace()
            .map(str::to_owned)
            .collect();
        for value in &self.values {
            let controller = value.controller();
            // What is on already is left alone: a delegated tree may not be ours to write above
            // the point of delegation.
            if on.iter().any(|name| name == controller) {
                continue;
            }
            write_below(dir, file, &format!("+{controller}")).doing_or(
                what(controller),
                |error| match Errno::from_io_error(error) {
                    Some(Errno::BUSY) => {
                        "processes live in that group itself: choose a --parent-cgroup without any"
                    }
                    Some(Errno::NOENT) => "the group above does not offer that controller",
                    _ => "",
                },
            )?;
            on.push(controller.to_owned());
        }
        Ok(())
    }

    /// Version 1: a new cpuset is empty, and no process may enter it before it has both processors
    /// and memory nodes; it gets those of the group above.
    fn fill_cpuset(&self, above: &OwnedFd, dir: &OwnedFd, path: &Path) -> Result<(), Failure> {
        if !self.options.iter().any(|option| option == "cpuset") {
            return Ok(());
        }
        for file in ["cpuset.cpus", "cpuset.mems"].map(OsStr::new) {
            let what = || format!("fill {}", path.join(file).display());
            let have = read_below(dir, file).doing(what())?;
            if have.trim().is_empty() {
                let given = read_below(above, file).doing(what())?;
                write_below(dir, file, given.trim()).doing(what())?;
            }
        }
        Ok(())
    }
}

impl Group {
    /// Moves this process in, after writing down the way back.
    pub fn attach(&self, made: &mut Made) -> Result<(), Failure> {
        let what = format!("move into the cgroup {}", self.path.display());
        let memberships = std::fs::read_to_string("/proc/self/cgroup").doing(&what)?;
        let home = home(&memberships, self.version, &self.options);
        let (procs, path) = self.open_home(home).doing(&what)?;
        // Written down first: going home from home is harmless.
        made.membership(procs, path);
        write_below(&self.dir, OsStr::new("cgroup.procs"), "0").doing_or(what, |error| {
            match Errno::from_io_error(error) {
                Some(Errno::NOSPC) => "its cpuset has no processor or no memory node",
                Some(Errno::BUSY) => {
                    "it has controllers switched on for the groups below it, so that no process \
                     may be in it: choose a group further down"
                }
                Some(Errno::OPNOTSUPP) => "it is a threaded or a broken group",
                _ => "",
            }
        })
    }

    /// Opens `cgroup.procs` of the group this process is in; where that lies outside the mount (in
    /// a container), the mount's own.
    fn open_home(&self, home: Option<&str>) -> Result<(OwnedFd, PathBuf), Errno> {
        let below = Path::new(home.unwrap_or("/").trim_start_matches('/')).join("cgroup.procs");
        let top = Path::new("cgroup.procs");
        let mut last = Errno::NOENT;
        for name in [below.as_path(), top] {
            match open_beneath(&self.mount, name.as_os_str(), OFlags::WRONLY) {
                Ok(procs) => return Ok((procs, self.mount_path.join(name))),
                Err(error) => last = error,
            }
        }
        Err(last)
    }
}

/// The path of this process's group in one hierarchy, from the text of /proc/self/cgroup: lines of
/// `number:controllers:path`.
pub(crate) fn home<'a>(
    memberships: &'a str,
    version: Version,
    options: &[String],
) -> Option<&'a str> {
    memberships.lines().find_map(|line| {
        let mut parts = line.splitn(3, ':');
        let (number, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
        let found = match version {
            Version::V2 => number == "0" && controllers.is_empty(),
            Version::V1 => controllers
                .split(',')
                .any(|name| !name.is_empty() && options.iter().any(|option| option == name)),
        };
        found.then_some(path)
    })
}

/// Reads a file of the group `dir`.
pub(crate) fn read_below(dir: &OwnedFd, name: &OsStr) -> Result<String, io::Error> {
    let file = open_beneath(dir, name, OFlags::RDONLY)?;
    io::read_to_string(std::fs::File::from(file))
}

/// Writes a value in one piece: that is how the kernel wants these files written.
pub(crate) fn write_below(dir: &OwnedFd, name: &OsStr, text: &str) -> Result<(), Errno> {
    let file = open_beneath(dir, name, OFlags::WRONLY | OFlags::TRUNC)?;
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

    fn wanted<'a>(version: Version, parent: &'a [OsString], values: &'a [Value]) -> Wanted<'a> {
        Wanted {
            version,
            parent,
            id: "one",
            values,
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
        assert_eq!(
            found.v2.as_deref(),
            Some(Path::new("/sys/fs/cgroup/unified"))
        );
        let place = |name| found.of_controller(name).map(|(path, _)| path.as_path());
        assert_eq!(
            place("cpuacct"),
            Some(Path::new("/sys/fs/cgroup/cpu,cpuacct"))
        );
        assert_eq!(place("memory"), Some(Path::new("/sys/fs/cgroup/a b")));
        assert_eq!(place("pids"), None);
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
        let options = |names: &[&str]| {
            names
                .iter()
                .map(|&name| name.to_owned())
                .collect::<Vec<_>>()
        };
        assert_eq!(
            home(text, Version::V1, &options(&["rw", "memory"])),
            Some("/deep/er")
        );
        assert_eq!(
            home(text, Version::V1, &options(&["cpuacct"])),
            Some("/c:d")
        );
        assert_eq!(home(text, Version::V1, &options(&["pids"])), None);
        assert_eq!(home(text, Version::V2, &[]), Some("/two"));
    }

    #[test]
    fn plan_when_the_controller_is_missing_says_what_there_is() {
        let values = [value("memory.max", "1")];
        let only_v2 = Hierarchies {
            v2: Some("/x".into()),
            ..Hierarchies::default()
        };
        let failure = Plan::new(&wanted(Version::V1, &[], &values), &only_v2).unwrap_err();
        assert!(
            failure.to_string().contains("--cgroup-version 2"),
            "{failure}"
        );
        let failure =
            Plan::new(&wanted(Version::V2, &[], &values), &Hierarchies::default()).unwrap_err();
        assert!(failure.to_string().contains("not mounted"), "{failure}");
        let tree = recorded(
            "cgroup-none",
            &[""],
            &[("cgroup.controllers", "cpu pids\n")],
        );
        let hierarchies = Hierarchies {
            v2: Some(tree.path().into()),
            ..Hierarchies::default()
        };
        let failure = Plan::new(&wanted(Version::V2, &[], &values), &hierarchies).unwrap_err();
        assert!(
            failure.to_string().contains("offers: cpu pids"),
            "{failure}"
        );
    }

    #[test]
    fn v2_switches_controllers_on_above_and_writes_values() {
        let tree = recorded(
            "cgroup-v2",
            &["", "top", "top/one"],
            &[
                ("cgroup.controllers", "cpu memory\n"),
                ("cgroup.subtree_control", "cpu\n"),
                ("cgroup.procs", ""),
                ("memory.max", "max\n"),
                ("cpu.max", "max 100000\n"),
            ],
        );
        let hierarchies = Hierarchies {
            v2: Some(tree.path().into()),
            ..Hierarchies::default()
        };
        let parent = [OsString::from("top")];
        let values = [
            value("memory.max", "67108864"),
            value("cpu.max", "50000 100000"),
        ];

        let plan = Plan::new(&wanted(Version::V2, &parent, &values), &hierarchies).unwrap();
        let mut made = Made::default();
        let groups = plan.make(&mut made).unwrap();

        assert_eq!(groups.len(), 1);
        assert_eq!(groups[0].path, tree.path().join("top/one"));
        assert_eq!(read(&tree, "cgroup.subtree_control"), "+memory\n");
        assert_eq!(read(&tree, "top/cgroup.subtree_control"), "+memory\n");
        assert_eq!(read(&tree, "top/one/cgroup.subtree_control"), "cpu\n");
        assert_eq!(read(&tree, "top/one/memory.max"), "67108864\n");
        assert_eq!(read(&tree, "top/one/cpu.max"), "50000 100000\n");
        assert!(made.undo().is_empty());
        assert!(tree.path().join("top/one").exists(), "it was there before");
    }

    #[test]
    fn v2_without_values_uses_the_parent_only_if_it_exists() {
        let tree = recorded("cgroup-v2-parent", &["", "there"], &[("cgroup.procs", "")]);
        let hierarchies = Hierarchies {
            v2: Some(tree.path().into()),
            ..Hierarchies::default()
        };
        let there = [OsString::from("there")];
        let plan = Plan::new(&wanted(Version::V2, &there, &[]), &hierarchies).unwrap();
        let groups = plan.make(&mut Made::default()).unwrap();
        assert_eq!(groups[0].path, tree.path().join("there"));
        let missing = [OsString::from("missing")];
        let plan = Plan::new(&wanted(Version::V2, &missing, &[]), &hierarchies).unwrap();
        assert!(plan.groups.is_empty());
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
        let hierarchies = Hierarchies {
            v1: vec![(tree.path().into(), vec!["cpuset".into(), "cpu".into()])],
            v2: None,
        };
        let parent = [OsString::from("top")];
        let values = [value("cpu.shares", "10"), value("cpuset.cpus", "1")];

        let plan = Plan::new(&wanted(Version::V1, &parent, &values), &hierarchies).unwrap();
        let groups = plan.make(&mut Made::default()).unwrap();

        assert_eq!(groups.len(), 1);
        assert_eq!(read(&tree, "top/cpuset.cpus"), "0-1\n");
        assert_eq!(read(&tree, "top/one/cpuset.mems"), "0\n");
        assert_eq!(read(&tree, "top/one/cpuset.cpus"), "1\n");
        assert_eq!(read(&tree, "top/one/cpu.shares"), "10\n");
    }

    #[test]
    fn make_when_a_file_is_missing_names_it_and_undo_removes_the_group() {
        let tree = recorded("cgroup-file", &[""], &[]);
        let hierarchies = Hierarchies {
            v1: vec![(tree.path().into(), vec!["memory".into()])],
            v2: None,
        };
        let values = [value("memory.nonsense", "1")];
        let parent = [OsString::from("top")];
        let plan = Plan::new(&wanted(Version::V1, &parent, &values), &hierarchies).unwrap();
        let mut made = Made::default();
        let failure = plan.make(&mut made).unwrap_err();
        assert!(
            failure.to_string().contains("top/one/memory.nonsense"),
            "{failure}"
        );
        assert!(made.undo().is_empty());
        assert!(!tree.path().join("top").exists());
    }
}
