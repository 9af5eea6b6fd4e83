//! The folder in which one disk is made. A lock on it tells one in use from one that was left behind when its process
//! was killed: such a one is removed by the next run, whatever was in it.

use std::fs::{self, DirBuilder, File};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::{FlockOperation, Mode, OFlags};

use crate::failure::{Context, Failure, Result};

const TRIES: u32 = 100;

#[derive(Debug)]
pub struct Work {
    path: PathBuf,
    _lock: File,
}

impl Work {
    /// A new one in the folder `all`.
    pub fn new(all: &Path) -> Result<Work> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        for _ in 0..TRIES {
            let count = COUNT.fetch_add(1, Ordering::Relaxed);
            let path = all.join(format!("{}-{count}", std::process::id()));
            match DirBuilder::new().mode(0o700).create(&path) {
                // Of another process namespace, or left behind.
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => continue,
                other => other.cannot("create", &path)?,
            }
            // Another run may have taken it for one that was left behind, and have removed it.
            if let Some(lock) = lock(&path)? {
                return Ok(Work { path, _lock: lock });
            }
        }
        Err(Failure::new(
            all,
            "is full of folders of other runs",
            "remove what is in it",
        ))
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Takes a folder that is there; none: another has it, or it is gone.
fn lock(path: &Path) -> Result<Option<File>> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let Ok(folder) = rustix::fs::open(path, flags, Mode::empty()) else {
        return Ok(None);
    };
    if rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive).is_err() {
        return Ok(None);
    }
    let folder = File::from(folder);
    let own = folder.metadata().cannot("open", path)?;
    let there = fs::symlink_metadata(path);
    let is_it = there.is_ok_and(|there| (there.dev(), there.ino()) == (own.dev(), own.ino()));
    Ok(is_it.then_some(folder))
}

/// Removes what runs left that were killed.
pub fn remove_left_behind(all: &Path) -> Result<()> {
    for entry in fs::read_dir(all).cannot("list", all)? {
        let path = entry.cannot("list", all)?.path();
        if let Some(_lock) = lock(&path)? {
            fs::remove_dir_all(&path).cannot("remove", &path)?;
        }
    }
    Ok(())
}
