//! The disk that a container's root is made of: one of the cache, which is kept for as long as this
//! program or a microVM has it open, or a file that is one.

use std::path::{Path, PathBuf};

use mayfly_images::{Cache, Disk as Cached, Failure, SIZE, Source, default_folder};

use crate::bundle::Root;
use crate::error::AnyError;
use crate::host::Settings;

/// A read-only disk.
pub enum Disk {
    /// One that is not of the cache.
    File(PathBuf),
    /// One of the cache, with its lock.
    Cached(Cached),
}

/// There is none.
#[derive(Debug, thiserror::Error)]
#[error("cannot make a disk of root.path: {0}")]
struct NoDisk(Failure);

impl Disk {
    /// Finds the disk of `root`, or makes it. What of the root it does not have is noted.
    pub fn of(root: &Root, settings: &Settings, notes: &mut Vec<String>) -> Result<Disk, AnyError> {
        let folder = match root {
            Root::Image(file) => return Ok(Disk::File(file.clone())),
            Root::Folder(folder) => folder,
        };
        let cache = match &settings.cache {
            Some(cache) => cache.clone(),
            None => default_folder().map_err(NoDisk)?,
        };
        let limit = settings
            .cache_mib
            .map_or(SIZE, |mib| mib.saturating_mul(1 << 20));
        let cache = Cache::open(&cache, limit).map_err(NoDisk)?;
        let disk = cache.disk(&Source::root(folder)).map_err(NoDisk)?;
        let left_out = disk.left_out.lines();
        notes.extend(left_out.iter().map(|note| format!("root.path: {note}")));
        Ok(Disk::Cached(disk))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        match self {
            Disk::File(path) => path,
            Disk::Cached(disk) => &disk.path,
        }
    }
}
