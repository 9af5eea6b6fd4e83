//! Where a file of a snapshot goes: at a path, or into a descriptor.
//!
//! At a path the file is written under a temporary name beside it, [`partial_name`], and renamed. A
//! process that works with a temporary name has the file locked until it is done, and the lock goes with the
//! process: so what is not locked was left by one that was killed, and two creates at one place do not mix.

use std::ffi::{OsStr, OsString};
use std::fs::{File, Permissions};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::read::kind_of;
use super::write_error::{WriteError, step};
use crate::sys::fd;
use crate::sys::folder::{self, FileType, Folder};

/// Where a file is to be written.
#[derive(Debug)]
pub enum Target {
    /// Under this name; links are followed.
    Path(PathBuf),
    /// Into this regular file, from its first byte on.
    File {
        /// Open for reading and writing.
        file: File,
        /// What messages call it.
        name: String,
    },
}

/// How many links may be followed, as the kernel has it.
pub(super) const LINKS: usize = 40;

/// The longest name of a file, on the file systems there are.
const NAME_MAX: usize = 255;

/// How long a lock is tried: of a process that was killed it goes a moment later.
const LOCK_PATIENCE: Duration = Duration::from_millis(500);

const PARTIAL: &[u8] = b".mayfly-partial";
const OLD: &[u8] = b".mayfly-old";

/// The temporary name of a file called `name`, in the same folder.
pub fn partial_name(name: &OsStr) -> OsString {
    hidden_name(name, PARTIAL)
}

/// The name that the old file called `name` has meanwhile, where it cannot be exchanged with the new one.
pub(super) fn old_name(name: &OsStr) -> OsString {
    hidden_name(name, OLD)
}

fn hidden_name(name: &OsStr, ending: &[u8]) -> OsString {
    let mut hidden = vec![b'.'];
    let name = name.as_bytes();
    let room = NAME_MAX.saturating_sub(ending.len()).saturating_sub(1);
    match name.get(..room) {
        Some(_) if name.len() > room => {
            let crc = format!("{:08x}", crc32fast::hash(name));
            let kept = room.saturating_sub(crc.len());
            hidden.extend_from_slice(name.get(..kept).unwrap_or_default());
            hidden.extend_from_slice(crc.as_bytes());
        }
        _ => hidden.extend_from_slice(name),
    }
    hidden.extend_from_slice(ending);
    OsString::from_vec(hidden)
}

/// Locks `file`, or finds that another process works with it.
fn locks(file: &File) -> io::Result<bool> {
    folder::lock_where_possible(file, LOCK_PATIENCE)
}

/// A path, its links followed.
#[derive(Debug)]
pub(super) struct Place {
    pub folder: Folder,
    pub name: OsString,
    pub partial: OsString,
    /// As the client named it.
    pub path: PathBuf,
    /// What is there.
    pub old: Option<File>,
}

impl Place {
    pub fn find(path: &Path) -> Result<Self, WriteError> {
        let error = |cause| WriteError::io("find the place of", path, cause);
        let (folder, name) = follow(path).map_err(error)?;
        let bytes = name.as_bytes();
        let is_temporary =
            bytes.starts_with(b".") && (bytes.ends_with(PARTIAL) || bytes.ends_with(OLD));
        if is_temporary {
            return Err(WriteError::Temporary(path.into()));
        }
        if let Some(kind) = folder.other_kind(&name).map_err(error)? {
            let kind = match kind {
                FileType::Directory => "a directory",
                FileType::Fifo => "a FIFO",
                FileType::Socket => "a socket",
                FileType::BlockDevice => "a block device",
                FileType::CharacterDevice => "a character device",
                _ => "something else",
            };
            return Err(WriteError::Kind(path.display().to_string(), kind));
        }
        let old = folder.open_file(&name);
        let old = old.map_err(|cause| WriteError::io("overwrite", path, cause))?;
        Ok(Place {
            partial: partial_name(&name),
            path: path.into(),
            folder,
            name,
            old,
        })
    }

    pub fn error(&self, what: &'static str, cause: io::Error) -> WriteError {
        WriteError::io(what, &self.path, cause)
    }

    fn busy(&self) -> WriteError {
        WriteError::Busy(self.path.clone())
    }

    /// What has `hidden`, one of the names beside it, which a process that was killed left behind: locked now.
    pub fn leftover(&self, hidden: &OsStr) -> Result<Option<File>, WriteError> {
        let error =
            |cause| self.error("look at what was left of an earlier snapshot beside", cause);
        if self.folder.other_kind(hidden).map_err(error)?.is_some() {
            return Err(WriteError::Occupied(self.path.with_file_name(hidden)));
        }
        let Some(file) = self.folder.open_file(hidden).map_err(error)? else {
            return Ok(None);
        };
        // Its process is there, or has just put it in place.
        if !locks(&file).map_err(error)? || !self.folder.is_at(hidden, &file).map_err(error)? {
            return Err(self.busy());
        }
        Ok(Some(file))
    }

    /// Locks what is in place: it is about to get the temporary name.
    pub fn lock_old(&self) -> Result<(), WriteError> {
        match &self.old {
            Some(old) if !locks(old).map_err(|cause| self.error("lock", cause))? => {
                Err(self.busy())
            }
            _ => Ok(()),
        }
    }

    /// Makes the temporary file, with the owner and the mode of the file that it is to replace.
    pub fn begin(&self) -> Result<File, WriteError> {
        let error = |cause| self.error("create a temporary file beside", cause);
        step();
        let file = match self.folder.create(&self.partial) {
            Err(cause) if cause.kind() == io::ErrorKind::AlreadyExists => return Err(self.busy()),
            created => created.map_err(error)?,
        };
        step();
        if !locks(&file).map_err(error)?
            || !self.folder.is_at(&self.partial, &file).map_err(error)?
        {
            return Err(self.busy());
        }
        if let Some(old) = &self.old {
            let [old, new] = [old.metadata(), file.metadata()];
            let (old, new) = (old.map_err(error)?, new.map_err(error)?);
            if (old.uid(), old.gid()) != (new.uid(), new.gid()) {
                // Without the privilege for that it is the writer's, as a new one would be.
                let _ = fchown(&file, Some(old.uid()), Some(old.gid()));
            }
            if old.mode() & 0o777 != new.mode() & 0o777 {
                let mode = Permissions::from_mode(old.mode() & 0o777);
                file.set_permissions(mode).map_err(error)?;
            }
        }
        Ok(file)
    }

    /// Whether `file`, or nothing, is what is in place.
    pub fn is_same(&self, other: &Place) -> io::Result<bool> {
        Ok(self.name == other.name && self.folder.is(&other.folder)?)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(old) = &self.old {
            folder::unlock(old);
        }
    }
}

/// The folder and the name that `path` leads to.
fn follow(path: &Path) -> io::Result<(Folder, OsString)> {
    let mut base = None;
    let mut path = path.to_path_buf();
    for _ in 0..LINKS {
        let is_folder = path.as_os_str().as_bytes().ends_with(b"/");
        let Some(name) = path.file_name().filter(|_| !is_folder) else {
            return Err(io::ErrorKind::IsADirectory.into());
        };
        let parent = match path.parent() {
            Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
            Some(parent) => parent,
            None => Path::new("/"),
        };
        let folder = Folder::open(base.as_ref(), parent)?;
        match folder.link_target(name)? {
            None => return Ok((folder, name.to_owned())),
            Some(target) => {
                path = target;
                base = Some(folder);
            }
        }
    }
    Err(io::Error::from_raw_os_error(libc::ELOOP))
}

/// Whether a passed descriptor can be written a snapshot into.
pub(super) fn check_passed(file: &File, name: &str) -> Result<(), WriteError> {
    let error = |cause| WriteError::io("use", Path::new(name), cause);
    if let Some(kind) = kind_of(&file.metadata().map_err(error)?) {
        return Err(WriteError::Kind(name.into(), kind));
    }
    let access = fd::access(file).map_err(error)?;
    let why = if !access.write || !access.read {
        "was not opened for reading and writing"
    } else if access.append {
        "was opened with O_APPEND, but random-access writes are needed"
    } else if access.direct {
        "was opened with O_DIRECT, but unaligned reads and writes are needed"
    } else {
        return Ok(());
    };
    Err(WriteError::Access(name.into(), why))
}
