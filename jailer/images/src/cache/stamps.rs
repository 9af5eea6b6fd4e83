//! What is known of an archive or a layout without reading it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use rustix::fs::FileType;
use sha2::{Digest, Sha256};

use crate::content::{Stamp, Sum};
use crate::failure::{Context, Result};
use crate::identity::{Identity, Key};

/// Layouts with more files are read each time.
const LAYOUT_FILES_MAX: usize = 4096;

/// What is to be known of the files of an archive or a layout.
#[derive(Debug)]
pub struct Stamps {
    identity: Identity,
    all: Vec<(PathBuf, Stamp)>,
}

impl Stamps {
    /// None: it cannot be known.
    pub fn of(path: &Path) -> Result<Option<Stamps>> {
        let file = File::open(path).cannot("open", path)?;
        let Some(identity) = Identity::of(&file) else {
            return Ok(None);
        };
        let mut all = Vec::new();
        let mut todo = vec![path.to_path_buf()];
        while let Some(path) = todo.pop() {
            let it = rustix::fs::stat(&path).cannot("open", &path)?;
            if FileType::from_raw_mode(it.st_mode).is_dir() {
                for entry in fs::read_dir(&path).cannot("list", &path)? {
                    todo.push(entry.cannot("list", &path)?.path());
                }
            }
            all.push((path, Stamp::of(&it)));
            if all.len() + todo.len() > LAYOUT_FILES_MAX {
                return Ok(None);
            }
        }
        all.sort_by(|one, other| one.0.cmp(&other.0));
        Ok(Some(Stamps { identity, all }))
    }

    pub fn key(&self, name: Option<&str>) -> Option<Sum> {
        let keys: Option<Vec<Key>> = self
            .all
            .iter()
            .map(|(_, it)| self.identity.key(it))
            .collect();
        let mut hash = Sha256::new();
        // What an earlier version made of it is another disk.
        hash.update(crate::digest::VERSION);
        hash.update(keys?.concat());
        hash.update(name.unwrap_or_default());
        Some(hash.finalize().into())
    }

    pub fn is_as(&self, other: &Stamps) -> bool {
        self.all == other.all
    }

    pub fn are_settled(&self) -> bool {
        self.all.iter().all(|(_, it)| self.identity.is_settled(it))
    }
}
