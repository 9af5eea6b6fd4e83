//! The root file system of a jail: making its folders, device nodes and the copy of the monitor, and
//! moving this process into it.
//!
//! Below the folder for jails, which the caller names, no symbolic link is followed, and nothing
//! changes an owner or a mode by path: each component is made exclusively or opened as what it is,
//! and changed through its descriptor. What belongs to the jail's user is given to it last, when
//! nothing is left to be done inside.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, ResolveFlags, StatVfsMountFlags, Uid};
use rustix::io::Errno;
use rustix::mount::{MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags};
use rustix::process::Pid;
use rustix::thread::UnshareFlags;

use crate::failure::{Doing, Failure};
use crate::made::{Kind, Made};
use crate::sys;

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

/// The user and group a jail belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// User.
    pub uid: Uid,
    /// Group.
    pub gid: Gid,
}

/// A character device to be made in the jail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its folder below the root of the jail.
    folder: &'static str,
    name: &'static str,
    major: u32,
    minor: u32,
}

/// The devices a monitor may need: kvm, tun, urandom, and userfaultfd where the host has it.
pub fn devices() -> Vec<Device> {
    let device = |folder, name, major, minor| Device {
        folder,
        name,
        major,
        minor,
    };
    let mut devices = vec![
        device("dev/net", "tun", MISC, 200),
        device("dev", "kvm", MISC, 232),
        device("dev", "urandom", 1, 9),
    ];
    // Its number is given out when the host starts.
    let misc = std::fs::read_to_string("/proc/misc").unwrap_or_default();
    if let Some(minor) = misc_minor(&misc, "userfaultfd") {
        devices.push(device("dev", "userfaultfd", MISC, minor));
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

/// The executable that is going to be the monitor, opened and looked at.
#[derive(Debug)]
pub struct Executable {
    file: File,
    /// Where it really is.
    path: PathBuf,
    /// Its last component, which names the jail's folder, the copy and the pid file.
    name: std::ffi::OsString,
    mode: Mode,
}

impl Executable {
    /// Opens `path`. Links in it are followed once, to give the jail the name of the real file.
    pub fn open(path: &Path) -> Result<Executable, Failure> {
        let what = || format!("open the executable {} (--exec-file)", path.display());
        let real = path
            .canonicalize()
            .doing_or(what(), |_| "give the path of a static monitor binary")?;
        // NONBLOCK: a pipe must not hold us up.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = rustix::fs::openat2(CWD, &real, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS)
            .doing(what())?;
        let file = File::from(file);
        let metadata = file.metadata().doing(what())?;
        if !metadata.is_file() {
            return Err(Failure::new(what(), "it is not a regular file"));
        }
        if metadata.permissions().mode() & 0o111 == 0 {
            return Err(Failure::new(what(), "nobody may execute it").remedy("run chmod +x on it"));
        }
        let name = real
            .file_name()
            .ok_or_else(|| Failure::new(what(), "it has no name"))?
            .to_owned();
        // The copy has no special bits, can be changed by no second user, and is executable for
        // the one that owns it.
        let mode = Mode::from_raw_mode(metadata.permissions().mode() & 0o755 | 0o500);
        Ok(Executable {
            file,
            path: real,
            name,
            mode,
        })
    }

    /// The file's name.
    pub fn name(&self) -> &OsStr {
        &self.name
    }
}

/// Opens the folder below which jails are made. It is the caller's, who is trusted: links in it are
/// followed, once; everything below it is reached by this descriptor.
pub fn open_base(path: &Path) -> Result<Rc<OwnedFd>, Failure> {
    let what = format!(
        "open the folder for jails {} (--chroot-base-dir)",
        path.display()
    );
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(dir) => Ok(Rc::new(dir)),
        Err(Errno::NOENT) => {
            Err(Failure::new(what, Errno::NOENT).remedy("make it with `mkdir -p`"))
        }
        Err(error) => Err(Failure::new(what, error)),
    }
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
        made: &mut Made,
    ) -> Result<Root, Failure> {
        let steps = [
            (name, Kind::SharedFolder),
            (OsStr::new(id), Kind::Folder),
            (OsStr::new("root"), Kind::Folder),
        ];
        let (dir, path) = make_way(base, base_path, &steps, made)?;
        let mounted = rustix::fs::fstatvfs(&*dir)
            .doing(format_args!(
                "look at the file system of {}",
                path.display()
            ))?
            .f_flag;
        for (flag, word) in [
            (StatVfsMountFlags::NODEV, "nodev"),
            (StatVfsMountFlags::NOEXEC, "noexec"),
        ] {
            if mounted.contains(flag) {
                let what = format!("make the jail {}", path.display());
                return Err(
                    Failure::new(what, format_args!("its file system is mounted {word}"))
                        .remedy("choose another --chroot-base-dir"),
                );
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
        made: &mut Made,
    ) -> Result<(), Failure> {
        let path = self.path.join(&monitor.name);
        self.remove_file(&monitor.name, &path)?;
        let target = make_file(&self.dir, &monitor.name, &path)?;
        made.entry(&self.dir, &monitor.name, Kind::File, path.clone());
        let what = format_args!("copy {} to {}", monitor.path.display(), path.display());
        let (mut from, mut to) = (&monitor.file, File::from(target));
        std::io::copy(&mut from, &mut to).doing_or(what, |error| match error.kind() {
            std::io::ErrorKind::StorageFull => "free some space there",
            _ => "",
        })?;
        // Mode before owner: afterwards the file is no longer ours.
        rustix::fs::fchmod(&to, monitor.mode)
            .and_then(|()| rustix::fs::fchown(&to, Some(owner.uid), Some(owner.gid)))
            .doing(format_args!("hand over {}", path.display()))
    }

    /// Removes a regular file that has this one name, if it is there. A link could lead to a file
    /// outside that the jail's user may not change; it is refused, though removing it would not
    /// follow it, so that the caller learns of it.
    fn remove_file(&self, name: &OsStr, path: &Path) -> Result<(), Failure> {
        let what = format!("replace {}", path.display());
        let refuse = |why: &str| Err(Failure::new(&what, why).remedy("remove it"));
        match rustix::fs::statat(&*self.dir, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => return Ok(()),
            Err(error) => return Err(Failure::new(what, error)),
            Ok(found) if !FileType::from_raw_mode(found.st_mode).is_file() => {
                return refuse("it is not a regular file");
            }
            Ok(found) if found.st_nlink > 1 => return refuse("it has other names (hard links)"),
            Ok(_) => {}
        }
        rustix::fs::unlinkat(&*self.dir, name, AtFlags::empty()).doing(what)
    }

    /// Refuses a jail in which a pid file is left, before anything more is done to it.
    pub fn require_no_pid_file(&self, monitor: &Executable) -> Result<(), Failure> {
        let name = pid_file_name(monitor);
        match rustix::fs::statat(&*self.dir, &name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(Failure::new(
                format_args!("look for {}", self.path.join(&name).display()),
                error,
            )),
            Ok(_) => Err(in_use(Failure::new(
                format_args!("make {}", self.path.join(&name).display()),
                Errno::EXIST,
            ))),
        }
    }

    /// Makes `/dev`, `/dev/net`, `/run` and the device nodes, and returns the folders. Nodes are made
    /// exclusively, which is what refuses an id that is in use.
    pub fn make_nodes(
        &self,
        owner: Owner,
        devices: &[Device],
        made: &mut Made,
    ) -> Result<Folders, Failure> {
        let mut folders = Folders::new();
        for (parent, name, whole) in [
            ("", "dev", "dev"),
            ("dev", "net", "dev/net"),
            ("", "run", "run"),
        ] {
            let parent = folders
                .iter()
                .find(|(path, _)| *path == parent)
                .map_or(&self.dir, |(_, dir)| dir);
            let path = self.path.join(whole);
            let (dir, _) = make_folder(parent, OsStr::new(name), Kind::Folder, &path, made)
                .map_err(|error| no_folder(&path, error))?;
            folders.push((whole, dir));
        }
        for device in devices {
            let dir = folders
                .iter()
                .find(|(path, _)| *path == device.folder)
                .map(|(_, dir)| dir)
                .expect("devices() names folders of the list above");
            let path = self.path.join(device.folder).join(device.name);
            make_node(dir, device, owner, &path, made)?;
        }
        Ok(folders)
    }

    /// Gives those folders and the root folder itself to `owner`. The root folder goes last: from
    /// then on others may write in it.
    pub fn give_to(&self, owner: Owner, folders: &Folders, made: &mut Made) -> Result<(), Failure> {
        for (name, dir) in folders.iter().rev() {
            hand_over(dir, owner, &self.path.join(name), made)?;
        }
        hand_over(&self.dir, owner, &self.path, made)
    }

    /// Says in a file of the jail which process the monitor is; `made` knows of it already.
    pub fn write_pid_file(&self, monitor: &Executable, pid: Pid) -> Result<(), Failure> {
        let name = pid_file_name(monitor);
        let path = self.path.join(&name);
        let what = format!("write the pid file {}", path.display());
        let file = make_file(&self.dir, &name, &path).map_err(in_use)?;
        rustix::fs::fchmod(&file, READABLE).doing(&what)?;
        // One write of a few bytes: a reader sees all of the number or nothing.
        rustix::io::write(&file, pid.as_raw_nonzero().to_string().as_bytes()).doing(&what)?;
        Ok(())
    }

    /// Writes down the pid file before a process that is to write it is started.
    pub fn expect_pid_file(&self, monitor: &Executable, made: &mut Made) {
        let name = pid_file_name(monitor);
        let path = self.path.join(&name);
        made.entry(&self.dir, name, Kind::File, path);
    }

    /// Makes this folder the root of this process, in a mount namespace of its own, with nothing
    /// of the host left mounted. Mounts that are in the folder come along, and mounts the host
    /// makes there later arrive too.
    pub fn enter(&self) -> Result<(), Failure> {
        let what = format!("enter the jail {}", self.path.display());
        // Before unshare, which carries the working directory over into the new namespace: the
        // only way to name the folder there without a path.
        rustix::process::fchdir(&*self.dir).doing(&what)?;
        sys::unshare(UnshareFlags::NEWNS).doing(&what)?;
        // Nothing mounted from here on may show on the host.
        rustix::mount::mount_change(
            "/",
            MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
        )
        .doing(&what)?;
        let tree = rustix::mount::open_tree(
            CWD,
            ".",
            OpenTreeFlags::OPEN_TREE_CLONE
                | OpenTreeFlags::OPEN_TREE_CLOEXEC
                | OpenTreeFlags::AT_RECURSIVE,
        )
        .doing(&what)?;
        pivot_into(&tree).doing_or(&what, |error| match Errno::from_io_error(error) {
            Some(Errno::INVAL) => {
                "the host's root must be a mounted file system, not a bare chroot or initial ramfs"
            }
            _ => "",
        })
    }
}

/// Makes a detached mount the root of this process and lets go of everything else that is mounted.
/// It needs a mount namespace that nobody else uses. The working directory is used as the place to
/// attach the mount to, and is the new root afterwards.
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

/// The path of the copied monitor, as seen from inside the jail.
pub fn inner_path(monitor: &Executable) -> PathBuf {
    Path::new("/").join(&monitor.name)
}

fn pid_file_name(monitor: &Executable) -> std::ffi::OsString {
    let mut name = monitor.name.clone();
    name.push(".pid");
    name
}

fn in_use(failure: Failure) -> Failure {
    failure.remedy("choose another --id, or remove that jail if its monitor has ended")
}

/// Makes folder after folder below `base`, and opens the last. Another jail that fails at the same
/// time may remove a shared folder seen a moment ago, so the walk is tried again a few times.
pub fn make_way(
    base: &Rc<OwnedFd>,
    base_path: &Path,
    steps: &[(&OsStr, Kind)],
    made: &mut Made,
) -> Result<(Rc<OwnedFd>, PathBuf), Failure> {
    let mut tries = 4;
    'again: loop {
        let (mut dir, mut path) = (Rc::clone(base), base_path.to_owned());
        for (name, kind) in steps {
            path.push(name);
            match make_folder(&dir, name, *kind, &path, made) {
                Ok((next, created)) => {
                    if created {
                        rustix::fs::fchmod(&*next, WAY)
                            .doing(format_args!("set the mode of {}", path.display()))?;
                    }
                    dir = next;
                }
                Err(Errno::NOENT) if tries > 0 => {
                    tries -= 1;
                    continue 'again;
                }
                Err(error) => return Err(no_folder(&path, error)),
            }
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
    made: &mut Made,
) -> Result<(Rc<OwnedFd>, bool), Errno> {
    let created = match rustix::fs::mkdirat(&**parent, name, FOLDER) {
        Ok(()) => {
            made.entry(parent, name, kind, path.to_owned());
            true
        }
        Err(Errno::EXIST) => false,
        Err(error) => return Err(error),
    };
    let dir = open_beneath(parent, name, OFlags::RDONLY | OFlags::DIRECTORY)?;
    Ok((Rc::new(dir), created))
}

fn no_folder(path: &Path, error: Errno) -> Failure {
    let what = format!("make the folder {}", path.display());
    match error {
        Errno::LOOP => Failure::new(what, "a symbolic link is in its place")
            .remedy("put a real folder there or remove the link"),
        Errno::NOTDIR => Failure::new(what, "something that is no folder is in its place"),
        error => Failure::new(what, error),
    }
}

/// Makes a file that was not there before, open for writing and for nobody else's eyes yet.
fn make_file(dir: &OwnedFd, name: &OsStr, path: &Path) -> Result<OwnedFd, Failure> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat2(dir, name, flags, PRIVATE, beneath())
        .doing(format_args!("make {}", path.display()))
}

fn make_node(
    dir: &Rc<OwnedFd>,
    device: &Device,
    owner: Owner,
    path: &Path,
    made: &mut Made,
) -> Result<(), Failure> {
    let what = format!("make the device node {}", path.display());
    let number = rustix::fs::makedev(device.major, device.minor);
    rustix::fs::mknodat(
        &**dir,
        device.name,
        FileType::CharacterDevice,
        PRIVATE,
        number,
    )
    .map_err(|error| match error {
        Errno::EXIST => in_use(Failure::new(&what, error)),
        error => Failure::new(&what, error),
    })?;
    made.entry(dir, device.name, Kind::File, path.to_owned());
    // A descriptor that names the node without opening the device.
    let node = open_beneath(dir, OsStr::new(device.name), OFlags::PATH).doing(&what)?;
    let stat = rustix::fs::fstat(&node).doing(&what)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::CharacterDevice || stat.st_rdev != number
    {
        return Err(Failure::new(
            what,
            "somebody put something else in its place",
        ));
    }
    rustix::fs::chownat(
        node.as_fd(),
        "",
        Some(owner.uid),
        Some(owner.gid),
        AtFlags::EMPTY_PATH,
    )
    .doing(what)
}

/// Gives a folder to the jail's user, for that user alone.
fn hand_over(dir: &Rc<OwnedFd>, owner: Owner, path: &Path, made: &mut Made) -> Result<(), Failure> {
    let what = format!("hand over {}", path.display());
    let before = rustix::fs::fstat(&**dir).doing(&what)?;
    made.attributes(dir, before, path.to_owned());
    // Mode before owner: afterwards the folder is no longer ours.
    rustix::fs::fchmod(&**dir, FOLDER)
        .and_then(|()| rustix::fs::fchown(&**dir, Some(owner.uid), Some(owner.gid)))
        .doing(what)
}

/// Opens an entry of `dir` that is no link and leads nowhere else.
pub fn open_beneath(dir: &OwnedFd, name: &OsStr, flags: OFlags) -> Result<OwnedFd, Errno> {
    rustix::fs::openat2(dir, name, flags | OFlags::CLOEXEC, Mode::empty(), beneath())
}

/// How every path below an opened folder is resolved.
pub fn beneath() -> ResolveFlags {
    ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Folder;

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
        let failure = open_base(&folder.path().join("none")).unwrap_err();
        assert!(failure.to_string().contains("mkdir -p"), "{failure}");
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
        let mut made = Made::default();
        let (_, path) = make_way(&base, folder.path(), &steps, &mut made).unwrap();
        assert!(path.is_dir());
        assert_eq!(path, folder.path().join("name/id"));
        let mode = path.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o755);
        assert!(made.undo().is_empty());
        assert!(!path.exists());
        assert!(folder.path().join("name").exists());
    }

    #[test]
    fn make_way_when_a_link_is_in_its_place_refuses() {
        let folder = Folder::new("root-way-link");
        std::os::unix::fs::symlink("/tmp", folder.path().join("name")).unwrap();
        let base = open_base(folder.path()).unwrap();
        let steps = [(OsStr::new("name"), Kind::SharedFolder)];
        let failure = make_way(&base, folder.path(), &steps, &mut Made::default()).unwrap_err();
        assert!(failure.to_string().contains("symbolic link"), "{failure}");
    }

    #[test]
    fn executable_open_names_the_real_file() {
        let folder = Folder::new("root-executable");
        let real = folder.path().join("mayfly-1.0");
        std::fs::write(&real, "x").unwrap();
        std::fs::set_permissions(&real, PermissionsExt::from_mode(0o4777)).unwrap();
        std::os::unix::fs::symlink("mayfly-1.0", folder.path().join("mayfly")).unwrap();
        let executable = Executable::open(&folder.path().join("mayfly")).unwrap();
        assert_eq!(executable.name(), "mayfly-1.0");
        assert_eq!(executable.mode, Mode::from_raw_mode(0o755));
        assert_eq!(inner_path(&executable), Path::new("/mayfly-1.0"));
    }

    #[test]
    fn executable_open_when_it_cannot_run_refuses() {
        let folder = Folder::new("root-not-executable");
        let file = folder.path().join("file");
        std::fs::write(&file, "x").unwrap();
        std::fs::set_permissions(&file, PermissionsExt::from_mode(0o644)).unwrap();
        for (path, reason) in [
            (file.as_path(), "chmod +x"),
            (folder.path(), "not a regular file"),
            (&folder.path().join("none"), "No such file"),
        ] {
            let failure = Executable::open(path).unwrap_err();
            assert!(failure.to_string().contains(reason), "{failure}");
        }
    }
}
