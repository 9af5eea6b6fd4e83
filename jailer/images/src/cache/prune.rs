//! What is in the cache, and what goes when that is too much.

use std::cmp::Reverse;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use rustix::fs::FlockOperation;

use super::{Cache, DISKS, ENDING, FILES, SOURCES, sum_in};
use crate::failure::{Context, Result};

/// A disk in the cache.
#[derive(Debug)]
pub struct Listed {
    pub path: PathBuf,
    /// What it takes of its file system.
    pub allocated: u64,
    pub last_use: SystemTime,
    pub is_in_use: bool,
}

impl Cache {
    /// All disks, the most recently used first.
    pub fn list(&self) -> Result<Vec<Listed>> {
        let folder = self.folder.join(DISKS);
        let mut all = Vec::new();
        for entry in fs::read_dir(&folder).cannot("list", &folder)? {
            let path = entry.cannot("list", &folder)?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if !name.ends_with(ENDING) {
                continue;
            }
            // It may go meanwhile.
            let Ok(file) = File::open(&path) else {
                continue;
            };
            let it = file.metadata().cannot("open", &path)?;
            let lock = rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive);
            let since = Duration::new(it.atime().max(0) as u64, it.atime_nsec().max(0) as u32);
            all.push(Listed {
                path,
                allocated: it.blocks() * 512,
                last_use: SystemTime::UNIX_EPOCH + since,
                is_in_use: lock.is_err(),
            });
        }
        all.sort_by_key(|disk| Reverse(disk.last_use));
        Ok(all)
    }

    /// Removes the disks that were not used for longest, until the others take at most `limit`; none in use. Gives what
    /// was removed.
    pub fn prune(&self, limit: u64) -> Result<Vec<Listed>> {
        let _lock = self.lock("prune", &[0; 32])?;
        let mut removed = Vec::new();
        let all = self.list()?;
        let mut size: u64 = all.iter().map(|disk| disk.allocated).sum();
        for disk in all.into_iter().rev() {
            if size <= limit {
                break;
            }
            if self.remove(&disk)? {
                size -= disk.allocated;
                removed.push(disk);
            }
        }
        self.forget()?;
        Ok(removed)
    }

    /// Removes a disk, unless it is in use.
    fn remove(&self, disk: &Listed) -> Result<bool> {
        let Ok(file) = File::open(&disk.path) else {
            return Ok(false);
        };
        if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Ok(false);
        }
        fs::remove_file(&disk.path).cannot("remove", &disk.path)?;
        Ok(true)
    }

    /// Removes what is noted of disks that are gone.
    fn forget(&self) -> Result<()> {
        let is_there = |sum: &str| sum_in(sum).is_some_and(|sum| self.place(&sum).exists());
        for name in [FILES, SOURCES] {
            let folder = self.folder.join(name);
            for entry in fs::read_dir(&folder).cannot("list", &folder)? {
                let path = entry.cannot("list", &folder)?.path();
                let keep = match name {
                    FILES => is_there(&path.file_name().unwrap_or_default().to_string_lossy()),
                    _ => fs::read_to_string(&path).is_ok_and(|text| is_there(&text)),
                };
                if !keep {
                    let _ = fs::remove_file(&path);
                }
            }
        }
        Ok(())
    }
}
