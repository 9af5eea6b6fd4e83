//! How to undo what this run has made or changed so far.
//!
//! Every step that makes something notes it here at once. When a later step fails, the list is gone
//! through backwards. Everything is held by descriptor, so that undoing works from inside the new
//! root, below a descriptor limit of zero, and whatever happened to the paths.

use std::ffi::OsString;
use std::fmt;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use rustix::fs::{AtFlags, Gid, Mode, Stat, Uid};
use rustix::io::Errno;

/// The list: what each step back is called, and the step. Dropping it keeps everything, as when the
/// monitor runs.
#[derive(Default)]
pub struct Undo(Vec<(String, StepBack)>);

type StepBack = Box<dyn FnOnce() -> Result<(), Errno>>;

impl fmt::Debug for Undo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(self.0.iter().map(|(name, _)| name))
            .finish()
    }
}

/// What sort of directory entry was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A file or a device node.
    File,
    /// A directory, or a cgroup, of this microVM alone.
    Folder,
    /// A directory that other microVMs share: it stays when another one has begun to use it.
    SharedFolder,
}

impl Undo {
    fn note(&mut self, name: String, back: impl FnOnce() -> Result<(), Errno> + 'static) {
        self.0.push((name, Box::new(back)));
    }

    /// Notes that `name` was made in `dir`.
    pub fn entry(&mut self, dir: &Rc<OwnedFd>, name: impl Into<OsString>, kind: Kind, path: &Path) {
        let (dir, name) = (Rc::clone(dir), name.into());
        self.note(path.display().to_string(), move || {
            // If it is gone, another process has removed it.
            remove(&dir, &name, kind).or_else(|error| match error {
                Errno::NOENT => Ok(()),
                error => Err(error),
            })
        });
    }

    /// Notes what owner and mode `file` has before it is given new ones.
    pub fn attributes(&mut self, file: &Rc<OwnedFd>, before: Stat, path: &Path) {
        let file = Rc::clone(file);
        self.note(format!("owner and mode of {}", path.display()), move || {
            let (uid, gid) = (Uid::from_raw(before.st_uid), Gid::from_raw(before.st_gid));
            rustix::fs::fchown(&*file, Some(uid), Some(gid))?;
            rustix::fs::fchmod(&*file, Mode::from_raw_mode(before.st_mode))
        });
    }

    /// Notes the opened `cgroup.procs` of the group that this process is about to leave.
    pub fn membership(&mut self, procs: OwnedFd, path: PathBuf) {
        self.note(format!("return to {}", path.display()), move || {
            rustix::io::write(&procs, b"0").map(drop)
        });
    }

    /// Undoes everything, last first, and returns a line for each thing that stays.
    pub fn run(&mut self) -> Vec<String> {
        let mut left = Vec::new();
        while let Some((name, back)) = self.0.pop() {
            if let Err(error) = back() {
                left.push(format!("{name}: {error}"));
            }
        }
        left
    }
}

fn remove(dir: &OwnedFd, name: &OsString, kind: Kind) -> Result<(), Errno> {
    let flags = match kind {
        Kind::File => AtFlags::empty(),
        Kind::Folder | Kind::SharedFolder => AtFlags::REMOVEDIR,
    };
    // A cgroup stays busy for a moment after its last process has ended.
    for _ in 0..500 {
        match rustix::fs::unlinkat(dir, name, flags) {
            Err(Errno::BUSY | Errno::NOTEMPTY) if kind == Kind::SharedFolder => return Ok(()),
            Err(Errno::BUSY) if kind == Kind::Folder => {
                std::thread::sleep(Duration::from_millis(2));
            }
            other => return other,
        }
    }
    Err(Errno::BUSY)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::OFlags;
    use std::path::Path;

    fn open(path: &Path) -> Rc<OwnedFd> {
        Rc::new(rustix::fs::open(path, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap())
    }

    #[test]
    fn undo_removes_in_reverse_and_restores_the_mode() {
        let base = crate::testing::Folder::new("undo-undo");
        let top = open(base.path());
        std::fs::create_dir(base.path().join("a")).unwrap();
        let a = open(&base.path().join("a"));
        std::fs::write(base.path().join("a/b"), "").unwrap();
        let mut undo = Undo::default();
        let before = rustix::fs::fstat(&*top).unwrap();
        undo.attributes(&top, before, base.path());
        rustix::fs::fchmod(&*top, Mode::from_raw_mode(0o711)).unwrap();
        undo.entry(&top, "a", Kind::Folder, &base.path().join("a"));
        undo.entry(&a, "b", Kind::File, &base.path().join("a/b"));

        assert_eq!(undo.run(), Vec::<String>::new());

        assert!(!base.path().join("a").exists());
        assert_eq!(rustix::fs::fstat(&*top).unwrap().st_mode, before.st_mode);
    }

    #[test]
    fn undo_when_a_shared_folder_is_in_use_keeps_it_silently() {
        let base = crate::testing::Folder::new("undo-shared");
        std::fs::create_dir_all(base.path().join("shared/other")).unwrap();
        let mut undo = Undo::default();
        undo.entry(
            &open(base.path()),
            "shared",
            Kind::SharedFolder,
            &base.path().join("shared"),
        );
        assert_eq!(undo.run(), Vec::<String>::new());
        assert!(base.path().join("shared/other").exists());
    }

    #[test]
    fn undo_when_something_cannot_be_removed_names_it() {
        let base = crate::testing::Folder::new("undo-left");
        std::fs::create_dir_all(base.path().join("mine/foreign")).unwrap();
        let mut undo = Undo::default();
        undo.entry(
            &open(base.path()),
            "mine",
            Kind::Folder,
            &base.path().join("mine"),
        );
        let left = undo.run();
        assert_eq!(left.len(), 1);
        assert!(left[0].contains("/mine: "), "{left:?}");
    }
}
