//! The root file system of a compatible jail: making its folders, device nodes and the copy of the
//! monitor, and moving this process into it.
//!
//! Below the folder for jails, which the caller names, no symbolic link is followed, and nothing
//! changes an owner or a mode by path: each component is made exclusively or opened as what it is,
//! and changed through its descriptor. What belongs to the jail's user is given to it last, when
//! nothing is left to be done inside.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, StatVfsMountFlags, Uid,
};
use rustix::io::Errno;
use rustix::mount::{MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags};
use rustix::path::Arg;
use rustix::process::Pid;
use rustix::thread::UnshareFlags;

use crate::error::{Advice as _, AnyError, Failure, Step as _};
use crate::monitor::{Executable, NOT_A_FILE};
use crate::sys;
use crate::undo::{Kind, Undo};

/// Mode of every folder inside the jail.
const FOLDER: Mode = Mode::from_raw_mode(0o700);
/// Mode of the folders that lead to the jail: they are root's, and passable.
const WAY: Mode = Mode::from_raw_mode(0o755);
/// Mode of device nodes, and of files until they are complete.
const PRIVATE: Mode = Mode::from_raw_mode(0o600);
/// Mode of the pid file, which is root's and there to be read.
const READABLE: Mode = Mode::from_raw_mode(0o644);

/// Major number of the "miscellaneous" devices, kvm, tun and userfaultfd among them.
const MISC: u32 = 10;

/// What is there is not as it has to be.
#[derive(Debug, thiserror::Error)]
pub enum RootError {
    #[error(
        "cannot make the jail {0}: its file system is mounted {1}; choose another --chroot-base-dir"
    )]
    Mounted(PathBuf, &'static str),
    #[error(
        "cannot make the folder {0}: a symbolic link is in its place; put a real folder there or remove the link"
    )]
    LinkInPlace(PathBuf),
    #[error(
        "cannot make {0}: it exists; choose another --id, or remove that jail if its monitor has ended"
    )]
    IdInUse(PathBuf),
    #[error("cannot replace {0}: {1}; remove it")]
    Replace(PathBuf, &'static str),
}

/// Why pivot_root is refused with EINVAL.
pub const NO_PIVOT: &str =
    "the host's root must be a mounted file system, not a bare chroot or initial ramfs";
const COPY: &str = "copy the monitor to";
const GIVE: &str = "change the owner of";
const MAKE: &str = "make";
const MAKE_FOLDER: &str = "make the folder";

/// The user and group a jail belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// User.
    pub uid: Uid,
    /// Group.
    pub gid: Gid,
}

/// A character device to be made in the jail: its folder below the root, its name, its major and
/// minor number.
pub type Device = (&'static str, &'static str, u32, u32);

/// The devices a monitor may need: kvm, tun, urandom, and userfaultfd where the host has it.
pub fn devices() -> Vec<Device> {
    let mut devices = vec![
        ("dev/net", "tun", MISC, 200),
        ("dev", "kvm", MISC, 232),
        ("dev", "urandom", 1, 9),
    ];
    // Its number is given out when the host starts.
    let misc = std::fs::read_to_string("/proc/misc").unwrap_or_default();
    if let Some(minor) = misc_minor(&misc, "userfaultfd") {
        devices.push(("dev", "userfaultfd", MISC, minor));
    }
    devices
}

/// The minor number of `name` in the text of /proc/misc.
fn misc_minor(misc: &str, name: &str) -> Option<u32> {
    misc.lines()
        .filter_map(|line| line.trim().split_once(' '))
        .find(|(_, found)| *found == name)
        .and_then(|(minor, _)| minor.parse().ok())
}

/// Opens the folder below which jails are made. It is the caller's, who is trusted: links in it are
/// followed, once; everything below it is reached by this descriptor.
pub fn open_base(path: &Path) -> Result<Rc<OwnedFd>, Failure> {
    sys::open_folder(path)
        .map(Rc::new)
        .step(format!(
            "open the folder for jails {} (--chroot-base-dir)",
            path.display()
        ))
        .hint(Errno::NOENT, "make it with `mkdir -p`")
}

/// Folders in a jail's root, opened, by their paths below it.
pub type Folders = Vec<(&'static str, Rc<OwnedFd>)>;

/// The root folder of one jail on the host's file system.
#[derive(Debug)]
pub struct Root {
    dir: Rc<OwnedFd>,
    path: PathBuf,
}

impl Root {
    /// Makes `<base>/<name>/<id>/root`. Folders that exist are used as they are: clients put the
    /// guest's kernel and disks into them beforehand.
    pub fn make(
        base: &Rc<OwnedFd>,
        base_path: &Path,
        name: &OsStr,
        id: &str,
        undo: &mut Undo,
    ) -> Result<Root, AnyError> {
        let steps = [
            (name, Kind::SharedFolder),
            (OsStr::new(id), Kind::Folder),
            (OsStr::new("root"), Kind::Folder),
        ];
        let (dir, path) = make_way(base, base_path, &steps, undo)?;
        let mounted = rustix::fs::fstatvfs(&*dir)
            .step_on(MAKE_FOLDER, &path)?
            .f_flag;
        for (flag, word) in [
            (StatVfsMountFlags::NODEV, "nodev"),
            (StatVfsMountFlags::NOEXEC, "noexec"),
        ] {
            if mounted.contains(flag) {
                return Err(RootError::Mounted(path, word).into());
            }
        }
        Ok(Root { dir, path })
    }

    /// Copies the monitor into the jail, in place of an executable that a client or an earlier run
    /// left there. A copy, so that no two jails share pages of it. Call it once the id is ours.
    pub fn copy_monitor(
        &self,
        monitor: &Executable,
        owner: Owner,
        undo: &mut Undo,
    ) -> Result<(), AnyError> {
        let path = self.path.join(monitor.name());
        self.remove_file(monitor.name(), &path)?;
        let target = make_file(&self.dir, monitor.name(), &path)?;
        undo.entry(&self.dir, monitor.name(), Kind::File, &path);
        let (mut from, mut to) = (monitor.file(), File::from(target));
        std::io::copy(&mut from, &mut to)
            .step_on(COPY, &path)
            .hint(Errno::NOSPC, "free some space there")?;
        Ok(give(to, monitor.mode(), owner, &path)?)
    }

    /// What is there by that name; none if nothing is.
    fn look(&self, name: &OsStr) -> Result<Option<Stat>, Failure> {
        match rustix::fs::statat(&*self.dir, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => Ok(None),
            found => found.map(Some).step_on(MAKE, self.path.join(name)),
        }
    }

    /// Removes a regular file that has this one name, if it is there. A link may lead to a file that
    /// the jail's user cannot change; removing it would not follow it, but the caller should know.
    fn remove_file(&self, name: &OsStr, path: &Path) -> Result<(), AnyError> {
        let Some(found) = self.look(name)? else {
            return Ok(());
        };
        let refuse = |why| Err(RootError::Replace(path.to_owned(), why).into());
        if !FileType::from_raw_mode(found.st_mode).is_file() {
            return refuse(NOT_A_FILE);
        }
        if found.st_nlink > 1 {
            return refuse("it has other names (hard links)");
        }
        let removed = rustix::fs::unlinkat(&*self.dir, name, AtFlags::empty());
        Ok(removed.step_on(MAKE, path)?)
    }

    /// Refuses a jail in which a pid file is left, before anything more is done to it.
    pub fn require_no_pid_file(&self, monitor: &Executable) -> Result<(), AnyError> {
        let name = monitor.pid_file_name();
        match self.look(&name)? {
            None => Ok(()),
            Some(_) => Err(RootError::IdInUse(self.path.join(name)).into()),
        }
    }

    /// Makes `/dev`, `/dev/net`, `/run` and the device nodes, and returns the folders. Nodes are made
    /// exclusively, which is what refuses an id that is in use.
    pub fn make_nodes(
        &self,
        owner: Owner,
        devices: &[Device],
        undo: &mut Undo,
    ) -> Result<Folders, AnyError> {
        let mut folders = Folders::new();
        for (parent, name, whole) in [
            ("", "dev", "dev"),
            ("dev", "net", "dev/net"),
            ("", "run", "run"),
        ] {
            let parent = folder(&folders, parent).unwrap_or(&self.dir);
            let path = self.path.join(whole);
            let made = make_folder(parent, OsStr::new(name), Kind::Folder, &path, undo);
            let (dir, _) = no_folder(made, &path)?;
            folders.push((whole, dir));
        }
        for device in devices {
            let dir = folder(&folders, device.0).expect("devices() names folders of that list");
            let path = self.path.join(device.0).join(device.1);
            make_node(dir, device, owner, &path, undo)?;
        }
        Ok(folders)
    }

    /// Gives those folders and the root folder itself to `owner`. The root folder goes last: from
    /// then on others may write in it.
    pub fn give_to(&self, owner: Owner, folders: &Folders, undo: &mut Undo) -> Result<(), Failure> {
        for (name, dir) in folders.iter().rev() {
            give_folder(dir, owner, &self.path.join(name), undo)?;
        }
        give_folder(&self.dir, owner, &self.path, undo)
    }

    /// Writes the monitor's process id into a file of the jail; `undo` knows of it already.
    pub fn write_pid_file(&self, monitor: &Executable, pid: Pid) -> Result<(), Failure> {
        let name = monitor.pid_file_name();
        let path = self.path.join(&name);
        let file = make_file(&self.dir, &name, &path)?;
        // One write of a few bytes: a reader sees all of the number or nothing.
        rustix::fs::fchmod(&file, READABLE)
            .and_then(|()| rustix::io::write(&file, pid.as_raw_pid().to_string().as_bytes()))
            .map(drop)
            .step_on("write the pid file", path)
    }

    /// Notes the pid file before a process that is to write it is started.
    pub fn expect_pid_file(&self, monitor: &Executable, undo: &mut Undo) {
        let name = monitor.pid_file_name();
        let path = self.path.join(&name);
        undo.entry(&self.dir, name, Kind::File, &path);
    }

    /// Makes this folder the root of this process, in a mount namespace of its own, with nothing
    /// of the host left mounted. Mounts that are in the folder come along, and mounts the host
    /// makes there later arrive too.
    pub fn enter(&self) -> Result<(), Failure> {
        self.pivot()
            .step_on("enter the jail", &self.path)
            .hint(Errno::INVAL, NO_PIVOT)
    }

    fn pivot(&self) -> Result<(), Errno> {
        // Before unshare, which carries the working directory over into the new namespace: the
        // only way to name the folder there without a path.
        rustix::process::fchdir(&*self.dir)?;
        sys::unshare(UnshareFlags::NEWNS)?;
        // Nothing mounted from here on may show on the host.
        let private = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
        rustix::mount::mount_change("/", private)?;
        let flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_RECURSIVE;
        pivot_into(&rustix::mount::open_tree(CWD, ".", flags)?)
    }
}

fn folder<'a>(folders: &'a Folders, path: &str) -> Option<&'a Rc<OwnedFd>> {
    let (_, dir) = folders.iter().find(|(known, _)| *known == path)?;
    Some(dir)
}

/// Makes a detached mount the root of this process and lets go of everything else that is mounted.
/// It needs a mount namespace that no other process uses. The working directory is used as the place
/// to attach the mount to, and is the new root afterwards.
pub fn pivot_into(tree: &OwnedFd) -> Result<(), Errno> {
    rustix::mount::move_mount(tree, "", CWD, ".", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    rustix::process::fchdir(tree)?;
    // The same folder twice stacks the old root on the new one, where the next line finds it: no
    // folder is needed to put it in.
    if let Err(error) = rustix::process::pivot_root(".", ".") {
        // Attached as it is, it would keep the folder from being removed.
        let _ = rustix::mount::unmount(".", UnmountFlags::DETACH);
        return Err(error);
    }
    rustix::mount::unmount(".", UnmountFlags::DETACH)?;
    rustix::process::chdir("/")
}

/// Makes folder after folder below `base`, and opens the last. Another jail that fails at the same
/// time may remove a shared folder seen a moment ago, so the walk is tried again a few times.
pub fn make_way(
    base: &Rc<OwnedFd>,
    base_path: &Path,
    steps: &[(&OsStr, Kind)],
    undo: &mut Undo,
) -> Result<(Rc<OwnedFd>, PathBuf), AnyError> {
    let mut tries = 4;
    'again: loop {
        let (mut dir, mut path) = (Rc::clone(base), base_path.to_owned());
        for (name, kind) in steps {
            path.push(name);
            let made = make_folder(&dir, name, *kind, &path, undo);
            if made.as_ref().is_err_and(|error| *error == Errno::NOENT) && tries > 0 {
                tries -= 1;
                continue 'again;
            }
            let (next, is_new) = no_folder(made, &path)?;
            if is_new {
                rustix::fs::fchmod(&*next, WAY).step_on(MAKE_FOLDER, &path)?;
            }
            dir = next;
        }
        return Ok((dir, path));
    }
}

/// Makes a folder, or opens the one that is there; the flag says whether it was made.
fn make_folder(
    parent: &Rc<OwnedFd>,
    name: &OsStr,
    kind: Kind,
    path: &Path,
    undo: &mut Undo,
) -> Result<(Rc<OwnedFd>, bool), Errno> {
    let is_new = match rustix::fs::mkdirat(&**parent, name, FOLDER) {
        Ok(()) => {
            undo.entry(parent, name, kind, path);
            true
        }
        Err(Errno::EXIST) => false,
        Err(error) => return Err(error),
    };
    let dir = open_beneath(parent, name, OFlags::RDONLY | OFlags::DIRECTORY)?;
    Ok((Rc::new(dir), is_new))
}

fn no_folder<T>(made: Result<T, Errno>, path: &Path) -> Result<T, AnyError> {
    match made {
        Err(Errno::LOOP) => Err(RootError::LinkInPlace(path.to_owned()).into()),
        other => Ok(other.step_on(MAKE_FOLDER, path)?),
    }
}

/// Makes a file that was not there before, open for writing and not yet readable by other users.
fn make_file(dir: &OwnedFd, name: &OsStr, path: &Path) -> Result<OwnedFd, Failure> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat2(dir, name, flags, PRIVATE, beneath()).step_on(MAKE, path)
}

fn make_node(
    dir: &Rc<OwnedFd>,
    &(_, name, major, minor): &Device,
    owner: Owner,
    path: &Path,
    undo: &mut Undo,
) -> Result<(), AnyError> {
    let number = rustix::fs::makedev(major, minor);
    let kind = FileType::CharacterDevice;
    match rustix::fs::mknodat(&**dir, name, kind, PRIVATE, number) {
        Err(Errno::EXIST) => return Err(RootError::IdInUse(path.to_owned()).into()),
        made => made.step_on("make the device node", path).hint(
            Errno::PERM,
            "nodes take root outside of any user namespace; without that, use `mayfly-jailer run`",
        )?,
    }
    undo.entry(dir, name, Kind::File, path);
    let given = || {
        // A descriptor that names the node without opening the device.
        let node = open_beneath(dir, OsStr::new(name), OFlags::PATH)?;
        let stat = rustix::fs::fstat(&node)?;
        if FileType::from_raw_mode(stat.st_mode) != kind || stat.st_rdev != number {
            // Another process has put something else in its place.
            return Err(Errno::STALE);
        }
        let (uid, gid) = (Some(owner.uid), Some(owner.gid));
        rustix::fs::chownat(node.as_fd(), "", uid, gid, AtFlags::EMPTY_PATH)
    };
    Ok(given().step_on(GIVE, path)?)
}

/// Gives a folder to the jail's user, for that user alone.
fn give_folder(
    dir: &Rc<OwnedFd>,
    owner: Owner,
    path: &Path,
    undo: &mut Undo,
) -> Result<(), Failure> {
    let before = rustix::fs::fstat(&**dir).step_on(GIVE, path)?;
    undo.attributes(dir, before, path);
    give(dir, FOLDER, owner, path)
}

/// Gives a file or folder to the jail's user.
fn give(file: impl AsFd, mode: Mode, owner: Owner, path: &Path) -> Result<(), Failure> {
    // Mode before owner: afterwards it is no longer ours.
    rustix::fs::fchmod(&file, mode)
        .and_then(|()| rustix::fs::fchown(&file, Some(owner.uid), Some(owner.gid)))
        .step_on(GIVE, path)
}

/// Opens the folder of a path that the caller gave, following links, and finds the name in it.
pub fn open_folder_of(path: &Path) -> Result<(OwnedFd, &OsStr), Errno> {
    let name = path.file_name().ok_or(Errno::ISDIR)?;
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    let folder = sys::open_folder(folder.unwrap_or(Path::new(".")))?;
    Ok((folder, name))
}

/// Gives the file `aside` its `name` in a folder, in place of what has that; `aside` is gone afterwards, also
/// where this fails.
pub fn take_place(folder: &OwnedFd, aside: impl Arg + Copy, name: impl Arg) -> Result<(), Errno> {
    let placed = rustix::fs::renameat(folder, aside, folder, name);
    if placed.is_err() {
        let _ = rustix::fs::unlinkat(folder, aside, AtFlags::empty());
    }
    placed
}

/// Opens an entry of `dir` that is no link and leads nowhere else.
pub fn open_beneath(dir: &OwnedFd, name: &OsStr, flags: OFlags) -> Result<OwnedFd, Errno> {
    rustix::fs::openat2(dir, name, flags | OFlags::CLOEXEC, Mode::empty(), beneath())
}

/// How every path below an opened folder is resolved.
fn beneath() -> ResolveFlags {
    ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::message;
    use crate::testing::Folder;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn misc_minor_finds_the_name_and_only_the_whole_name() {
        let misc = "234 btrfs-control\n 58 userfaultfd\n257 userfaultfd-like\n";
        assert_eq!(misc_minor(misc, "userfaultfd"), Some(58));
        assert_eq!(misc_minor(misc, "kvm"), None);
        assert_eq!(misc_minor("", "userfaultfd"), None);
    }

    #[test]
    fn open_base_follows_links_of_the_caller() {
        let folder = Folder::new("root-link");
        std::fs::create_dir_all(folder.path().join("real/below")).unwrap();
        std::os::unix::fs::symlink("real", folder.path().join("link")).unwrap();
        for path in ["real/below", "link", "link/below"] {
            assert!(open_base(&folder.path().join(path)).is_ok(), "{path}");
        }
    }

    #[test]
    fn open_base_when_it_is_missing_or_a_file_refuses() {
        let folder = Folder::new("root-missing");
        std::fs::write(folder.path().join("file"), "").unwrap();
        let text = message(&open_base(&folder.path().join("none")).unwrap_err());
        assert!(text.contains("mkdir -p"), "{text}");
        assert!(open_base(&folder.path().join("file")).is_err());
    }

    #[test]
    fn make_way_uses_what_exists_and_undo_removes_only_the_rest() {
        let folder = Folder::new("root-way");
        std::fs::create_dir(folder.path().join("name")).unwrap();
        let base = open_base(folder.path()).unwrap();
        let steps = [
            (OsStr::new("name"), Kind::SharedFolder),
            (OsStr::new("id"), Kind::Folder),
        ];
        let mut undo = Undo::default();
        let (_, path) = make_way(&base, folder.path(), &steps, &mut undo).unwrap();
        assert!(path.is_dir());
        assert_eq!(path, folder.path().join("name/id"));
        let mode = path.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o755);
        assert!(undo.run().is_empty());
        assert!(!path.exists());
        assert!(folder.path().join("name").exists());
    }

    #[test]
    fn make_way_when_a_link_is_in_its_place_refuses() {
        let folder = Folder::new("root-way-link");
        std::os::unix::fs::symlink("/tmp", folder.path().join("name")).unwrap();
        let base = open_base(folder.path()).unwrap();
        let steps = [(OsStr::new("name"), Kind::SharedFolder)];
        let error = make_way(&base, folder.path(), &steps, &mut Undo::default()).unwrap_err();
        assert!(
            matches!(error.downcast_ref(), Some(RootError::LinkInPlace(_))),
            "{error}"
        );
    }
}
