//! Control groups, version 1 and 2: making a microVM's group in the hierarchies, writing its limits,
//! moving in.
//!
//! Version 1 has one hierarchy per controller (or per few), version 2 one for all, in which a
//! controller must be enabled level by level; a host may have both (`hierarchy` finds them). Looking
//! comes first (making a [`Request`] changes nothing and keeps nothing open), making second, and all
//! moves together at the end: the first one into a version 1 hierarchy waits some milliseconds for
//! every processor, and those straight after it do not.
//!
//! `limit` knows limits by name, `exclusive` the groups of `mayfly-jailer run`, which are locked by
//! their maker and removed at the end.

pub mod exclusive;
pub mod hierarchy;
pub mod limit;

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use rustix::fs::OFlags;
use rustix::io::Errno;

use self::hierarchy::{Hierarchies, Hierarchy};
use crate::error::{Advice as _, AnyError, Failure, Step as _, errno};
use crate::root::{self, open_beneath};
use crate::sys;
use crate::undo::{Kind, Undo};

/// A control group cannot be found or made.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    #[error(
        "cannot use cgroups of version 2: that hierarchy is not mounted; mount it (`mount -t cgroup2 \
         none DIR`) or use --cgroup-version 1"
    )]
    NoVersion2,
    #[error(
        "cannot set {file}: this host has no cgroup controller \"{}\" of version {version}{hint}",
        controller_of(file)
    )]
    NoController {
        file: String,
        version: Version,
        hint: String,
    },
    #[error("cannot use the cgroup {0}: a microVM of that id is running; choose another --id")]
    IdInUse(PathBuf),
    #[error(
        "cannot find a cgroup for this user's microVMs: none above {0} is delegated to it; run it \
         with `systemd-run --user --scope -p Delegate=yes`, or have root make a group for this user \
         and name it with --parent-cgroup"
    )]
    NotDelegated(String),
}

const OPEN: &str = "open the cgroup";

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
    V1 = 1,
    /// The unified hierarchy.
    V2 = 2,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (*self as u8).fmt(f)
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

impl Request {
    /// The groups `<parent>/<id>` for `values`. Without any, version 1 has nothing to do, and version
    /// 2 moves into `parent` if that exists: as Firecracker's jailer does.
    pub fn compatible(
        version: Version,
        parent: &[OsString],
        id: &str,
        values: &[Value],
        hierarchies: &Hierarchies,
    ) -> Result<Request, AnyError> {
        let mut request = Request::default();
        if values.is_empty() && version == Version::V2 {
            let hierarchy = hierarchies.v2().ok_or(CgroupError::NoVersion2)?;
            let path = join(&hierarchy.path, parent);
            match rustix::fs::stat(&path) {
                // Documented: then the process stays where it is.
                Err(Errno::NOENT) => return Ok(request),
                found => found.step_on(OPEN, path)?,
            };
            request.0.push(Planned {
                hierarchy: hierarchy.clone(),
                steps: parent.to_vec(),
                values: Vec::new(),
            });
            return Ok(request);
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
    ) -> Result<(), AnyError> {
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
    pub fn make(&self, undo: &mut Undo) -> Result<Vec<Group>, AnyError> {
        self.0.iter().map(|group| group.make(undo)).collect()
    }
}

/// The names of a microVM's own group, from the mount point down.
fn own_group(parent: &[OsString], id: &str) -> Vec<OsString> {
    [parent, &[id.into()]].concat()
}

fn join(path: &Path, steps: &[OsString]) -> PathBuf {
    let mut path = path.to_owned();
    path.extend(steps);
    path
}

/// The file of a version 2 group that says which controllers the groups below it have.
const ENABLE: &str = "cgroup.subtree_control";

impl Planned {
    fn make(&self, undo: &mut Undo) -> Result<Group, AnyError> {
        let mut group = Group::open(&self.hierarchy)?;
        let last = self.steps.len().saturating_sub(1);
        for (index, step) in self.steps.iter().enumerate() {
            let is_v2 = group.hierarchy.version == Version::V2;
            if is_v2 {
                self.enable_controllers(&group)?;
            }
            let kind = match index == last {
                true => Kind::Folder,
                false => Kind::SharedFolder,
            };
            let way = [(step.as_os_str(), kind)];
            let (dir, path) = root::make_way(&group.dir, &group.path, &way, undo)?;
            let hierarchy = self.hierarchy.clone();
            let above = std::mem::replace(
                &mut group,
                Group {
                    hierarchy,
                    dir,
                    path,
                },
            );
            if !is_v2 && self.hierarchy.options.iter().any(|it| it == "cpuset") {
                group.fill_cpuset(&above)?;
            }
        }
        for value in &self.values {
            group.set(&value.file, &value.text)?;
        }
        Ok(group)
    }

    /// Version 2: the groups below get the controllers the values need. This is not undone when a
    /// later step fails: another jail may have seen it in the meantime.
    fn enable_controllers(&self, above: &Group) -> Result<(), Failure> {
        if self.values.is_empty() {
            return Ok(());
        }
        let before = above.get(ENABLE)?;
        let mut enabled: Vec<&str> = before.split_whitespace().collect();
        for controller in self.values.iter().map(Value::controller) {
            // What is enabled already is left alone: a delegated tree may not be ours to write above
            // the point of delegation.
            if !enabled.contains(&controller) {
                above.set(ENABLE, &format!("+{controller}"))?;
                enabled.push(controller);
            }
        }
        Ok(())
    }
}

/// An opened group.
#[derive(Debug)]
pub struct Group {
    hierarchy: Hierarchy,
    dir: Rc<OwnedFd>,
    path: PathBuf,
}

impl Group {
    /// The root of a hierarchy.
    fn open(hierarchy: &Hierarchy) -> Result<Group, Failure> {
        let path = hierarchy.path.clone();
        let dir = sys::open_folder(&path).step_on(OPEN, &path)?;
        Ok(Group {
            hierarchy: hierarchy.clone(),
            dir: Rc::new(dir),
            path,
        })
    }

    /// Moves this process in, after noting the way back.
    pub fn attach(&self, undo: &mut Undo) -> Result<(), Failure> {
        // Noted first: going home from home is harmless.
        let (procs, path) = self.hierarchy.open_home()?;
        undo.membership(procs, path);
        self.write("cgroup.procs", "0")
            .step_on("move into the cgroup", &self.path)
            .hints(cannot_enter)
    }

    /// Version 1: a new cpuset is empty, and no process may enter it before it has both processors
    /// and memory nodes; it gets those of the group above.
    fn fill_cpuset(&self, above: &Group) -> Result<(), Failure> {
        for file in ["cpuset.cpus", "cpuset.mems"] {
            if self.get(file)?.trim().is_empty() {
                self.set(file, above.get(file)?.trim())?;
            }
        }
        Ok(())
    }

    fn get(&self, file: &str) -> Result<String, Failure> {
        self.read(file).step_on("read", self.path.join(file))
    }

    fn set(&self, file: &str, text: &str) -> Result<(), Failure> {
        let remedy = |answer| match (answer, file == ENABLE) {
            (Errno::BUSY, true) => {
                Some("processes live in that group itself: choose a --parent-cgroup without any")
            }
            (Errno::NOENT, true) => Some("the group above does not offer that controller"),
            (Errno::NOENT, false) => {
                Some("that controller has no such file on this host: see --cgroup")
            }
            (Errno::INVAL | Errno::RANGE, false) => {
                Some("the kernel does not take that value for this file")
            }
            _ => None,
        };
        let path = self.path.join(file);
        self.write(file, text)
            .step(format!("write \"{text}\" to {}", path.display()))
            .hints(remedy)
    }

    fn read(&self, file: &str) -> Result<String, Errno> {
        let file = open_beneath(&self.dir, OsStr::new(file), OFlags::RDONLY)?;
        std::io::read_to_string(std::fs::File::from(file)).map_err(errno)
    }

    /// Writes a value in one piece: that is how the kernel wants these files written.
    fn write(&self, file: &str, text: &str) -> Result<(), Errno> {
        let file = open_beneath(&self.dir, OsStr::new(file), OFlags::WRONLY | OFlags::TRUNC)?;
        rustix::io::write(&file, format!("{text}\n").as_bytes()).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::hierarchy::tests::{v1, v2};
    use super::*;
    use crate::testing::Folder;

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
    ) -> Result<Request, AnyError> {
        let parent: Vec<OsString> = parent.iter().map(OsString::from).collect();
        let hierarchies = Hierarchies(hierarchies.to_vec());
        Request::compatible(version, &parent, "one", values, &hierarchies)
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
    fn request_when_the_controller_is_missing_says_what_there_is() {
        let values = [value("memory.max", "1")];
        let remedy = |result: Result<Request, AnyError>| result.unwrap_err().to_string();
        let only_v2 = [v2(Path::new("/x"))];
        let text = remedy(request(Version::V1, &[], &values, &only_v2));
        assert!(text.contains("--cgroup-version 2"), "{text}");
        let error = request(Version::V2, &[], &values, &[]).unwrap_err();
        assert!(
            matches!(error.downcast_ref(), Some(CgroupError::NoVersion2)),
            "{error}"
        );
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
