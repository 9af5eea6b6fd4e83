//! What this run has made or changed so far, and how to take it back.
//!
//! Every step that makes something writes it down here at once. When a later step fails, `undo`
//! goes through the list backwards. Everything is held by descriptor, so taking back works from
//! inside the new root, below a descriptor limit of zero, and whatever happened to the paths.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use rustix::fs::{AtFlags, Gid, Mode, Stat, Uid};
use rustix::io::Errno;

/// The list. Dropping it keeps everything: it is forgotten on purpose when the monitor runs.
#[derive(Debug, Default)]
pub struct Made {
    things: Vec<Thing>,
}

#[derive(Debug)]
enum Thing {
    /// A directory entry.
    Entry {
        dir: Rc<OwnedFd>,
        name: OsString,
        kind: Kind,
        /// For the sentence that says it could not be removed.
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

impl Made {
    /// Writes down that `name` was made in `dir`.
    pub fn entry(
        &mut self,
        dir: &Rc<OwnedFd>,
        name: impl Into<OsString>,
        kind: Kind,
        path: PathBuf,
    ) {
        self.things.push(Thing::Entry {
            dir: Rc::clone(dir),
            name: name.into(),
            kind,
            path,
        });
    }

    /// Writes down what owner and mode `file` has before it is given new ones.
    pub fn attributes(&mut self, file: &Rc<OwnedFd>, before: Stat, path: PathBuf) {
        self.things.push(Thing::Attributes {
            file: Rc::clone(file),
            before,
            path,
        });
    }

    /// Writes down the cgroup this process is about to leave.
    pub fn membership(&mut self, procs: OwnedFd, path: PathBuf) {
        self.things.push(Thing::Membership { procs, path });
    }

    /// Takes everything back, last first, and returns a line for each thing that stays.
    pub fn undo(&mut self) -> Vec<String> {
        let mut left = Vec::new();
        while let Some(thing) = self.things.pop() {
            if let Err((what, error)) = thing.undo() {
                left.push(format!("{what}: {error}"));
            }
        }
        left
    }
}

impl Thing {
    fn undo(self) -> Result<(), (String, Errno)> {
        match self {
            Thing::Entry {
                dir,
                name,
                kind,
                path,
            } => match remove(&dir, &name, kind) {
                // Gone already: what was wanted.
                Ok(()) | Err(Errno::NOENT) => Ok(()),
                Err(error) => Err((path.display().to_string(), error)),
            },
            Thing::Attributes { file, before, path } => {
                let result = rustix::fs::fchown(
                    &*file,
                    Some(Uid::from_raw(before.st_uid)),
                    Some(Gid::from_raw(before.st_gid)),
                )
                .and_then(|()| rustix::fs::fchmod(&*file, Mode::from_raw_mode(before.st_mode)));
                result.map_err(|error| (format!("owner and mode of {}", path.display()), error))
            }
            Thing::Membership { procs, path } => rustix::io::write(&procs, b"0")
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
        let base = crate::testing::Folder::new("made-undo");
        let top = open(base.path());
        std::fs::create_dir(base.path().join("a")).unwrap();
        let a = open(&base.path().join("a"));
        std::fs::write(base.path().join("a/b"), "").unwrap();
        let mut made = Made::default();
        let before = rustix::fs::fstat(&*top).unwrap();
        made.attributes(&top, before, base.path().into());
        rustix::fs::fchmod(&*top, Mode::from_raw_mode(0o711)).unwrap();
        made.entry(&top, "a", Kind::Folder, base.path().join("a"));
        made.entry(&a, "b", Kind::File, base.path().join("a/b"));

        assert_eq!(made.undo(), Vec::<String>::new());

        assert!(!base.path().join("a").exists());
        assert_eq!(rustix::fs::fstat(&*top).unwrap().st_mode, before.st_mode);
    }

    #[test]
    fn undo_when_a_shared_folder_is_in_use_keeps_it_silently() {
        let base = crate::testing::Folder::new("made-shared");
        std::fs::create_dir_all(base.path().join("shared/other")).unwrap();
        let mut made = Made::default();
        made.entry(
            &open(base.path()),
            "shared",
            Kind::SharedFolder,
            base.path().join("shared"),
        );
        assert_eq!(made.undo(), Vec::<String>::new());
        assert!(base.path().join("shared/other").exists());
    }

    #[test]
    fn undo_when_something_cannot_be_removed_names_it() {
        let base = crate::testing::Folder::new("made-left");
        std::fs::create_dir_all(base.path().join("mine/foreign")).unwrap();
        let mut made = Made::default();
        made.entry(
            &open(base.path()),
            "mine",
            Kind::Folder,
            base.path().join("mine"),
        );
        let left = made.undo();
        assert_eq!(left.len(), 1);
        assert!(left[0].contains("/mine: "), "{left:?}");
    }
}
