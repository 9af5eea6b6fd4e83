//! How to undo what this run has made or changed so far.
//!
//! Every step that makes something notes it here at once. When a later step fails, the list is gone
//! through backwards. Everything is held by descriptor, so that undoing works from inside the new
//! root, below a descriptor limit of zero, and whatever happened to the paths.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use rustix::fs::{AtFlags, Gid, Mode, Stat, Uid};
use rustix::io::Errno;

/// The list. Dropping it keeps everything, as when the monitor runs.
#[derive(Debug, Default)]
pub struct Undo {
    changes: Vec<Change>,
}

#[derive(Debug)]
enum Change {
    /// A directory entry.
    Entry {
        dir: Rc<OwnedFd>,
        name: OsString,
        kind: Kind,
        /// For the message that it could not be removed.
        path: PathBuf,
    },
    /// Owner and mode that something had before.
    Attributes {
        file: Rc<OwnedFd>,
        before: Stat,
        path: PathBuf,
    },
    /// The opened `cgroup.procs` of the cgroup this process came from.
    Membership { procs: OwnedFd, path: PathBuf },
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
    /// Notes that `name` was made in `dir`.
    pub fn entry(
        &mut self,
        dir: &Rc<OwnedFd>,
        name: impl Into<OsString>,
        kind: Kind,
        path: PathBuf,
    ) {
        self.changes.push(Change::Entry {
            dir: Rc::clone(dir),
            name: name.into(),
            kind,
            path,
        });
    }

    /// Notes what owner and mode `file` has before it is given new ones.
    pub fn attributes(&mut self, file: &Rc<OwnedFd>, before: Stat, path: PathBuf) {
        self.changes.push(Change::Attributes {
            file: Rc::clone(file),
            before,
            path,
        });
    }

    /// Notes the cgroup this process is about to leave.
    pub fn membership(&mut self, procs: OwnedFd, path: PathBuf) {
        self.changes.push(Change::Membership { procs, path });
    }

    /// Undoes everything, last first, and returns a line for each thing that stays.
    pub fn run(&mut self) -> Vec<String> {
        let mut left = Vec::new();
        while let Some(change) = self.changes.pop() {
            if let Err((what, error)) = change.undo() {
                left.push(format!("{what}: {error}"));
            }
        }
        left
    }
}

impl Change {
    fn undo(self) -> Result<(), (String, Errno)> {
        match self {
            Change::Entry {
                dir,
                name,
                kind,
                path,
            } => match remove(&dir, &name, kind) {
                // No entry: removed by another process.
                Ok(()) | Err(Errno::NOENT) => Ok(()),
                Err(error) => Err((path.display().to_string(), error)),
            },
            Change::Attributes { file, before, path } => {
                let result = rustix::fs::fchown(
                    &*file,
                    Some(Uid::from_raw(before.st_uid)),
                    Some(Gid::from_raw(before.st_gid)),
                )
                .and_then(|()| rustix::fs::fchmod(&*file, Mode::from_raw_mode(before.st_mode)));
                result.map_err(|error| (format!("owner and mode of {}", path.display()), error))
            }
            Change::Membership { procs, path } => rustix::io::write(&procs, b"0")
                .map(drop)
                .map_err(|error| (format!("return to {}", path.display()), error)),
        }
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
        undo.attributes(&top, before, base.path().into());
        rustix::fs::fchmod(&*top, Mode::from_raw_mode(0o711)).unwrap();
        undo.entry(&top, "a", Kind::Folder, base.path().join("a"));
        undo.entry(&a, "b", Kind::File, base.path().join("a/b"));

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
            base.path().join("shared"),
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
            base.path().join("mine"),
        );
        let left = undo.run();
        assert_eq!(left.len(), 1);
        assert!(left[0].contains("/mine: "), "{left:?}");
    }
}
