//! Files that guest memory is filled from.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};

/// A file to fill guest memory from, with its size and time of change when it was opened.
#[derive(Debug)]
pub struct Source {
    pub(super) file: File,
    pub(super) name: String,
    len: u64,
    /// None of a file in memory of this process's own: nothing else changes that.
    modified: Option<(i64, i64)>,
}

impl Source {
    /// Takes a copy of the descriptor `file`; `name` is how errors call it.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn new(file: &File, name: &str) -> io::Result<Source> {
        let file = file.try_clone()?;
        let metadata = file.metadata()?;
        Ok(Source {
            name: name.to_owned(),
            len: metadata.len(),
            modified: Some((metadata.mtime(), metadata.mtime_nsec())),
            file,
        })
    }

    /// A file in memory of this process's own, of `len` bytes.
    pub(super) fn in_memory(file: File, name: &str, len: u64) -> Source {
        Source {
            file,
            name: name.to_owned(),
            len,
            modified: None,
        }
    }

    /// The file itself.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Another handle on the same file, with the size and time of change of this one.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn try_clone(&self) -> io::Result<Source> {
        Ok(Source {
            file: self.file.try_clone()?,
            name: self.name.clone(),
            len: self.len,
            modified: self.modified,
        })
    }

    /// How errors call it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes in the file when it was opened.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there was nothing in the file.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Fills `bytes` from `offset` on, without moving the file's position.
    ///
    /// # Errors
    /// The host's, or an unexpected end.
    pub fn read_exact_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(bytes, offset)
    }

    /// Whether size and time of change are what they were.
    pub fn is_unchanged(&self) -> bool {
        self.modified.is_none_or(|modified| {
            let now = self.file.metadata();
            now.is_ok_and(|now| {
                now.len() == self.len && (now.mtime(), now.mtime_nsec()) == modified
            })
        })
    }
}
