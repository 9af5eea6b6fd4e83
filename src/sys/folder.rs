//! Files by their names in an open folder: what is done to them stays in that folder, whatever is
//! renamed above it. Nothing here follows a link or waits for the other end of a FIFO.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, RenameFlags};
pub use rustix::fs::{FileType, FlockOperation};
use rustix::io::Errno;

use super::fd;

/// An open folder.
#[derive(Debug)]
pub struct Folder {
    fd: OwnedFd,
    /// It may be read, and so synced.
    readable: bool,
}

/// What no name is opened without.
const ALWAYS: OFlags = OFlags::CLOEXEC
    .union(OFlags::NOFOLLOW)
    .union(OFlags::NONBLOCK)
    .union(OFlags::NOCTTY);

impl Folder {
    /// Opens the folder at `path`, seen from `base` unless it begins at the root. Links on the way are
    /// followed.
    ///
    /// # Errors
    /// The host's: there is none, it is no folder, it may not be entered.
    pub fn open(base: Option<&Folder>, path: &Path) -> io::Result<Self> {
        let base = base.map_or(CWD, |folder| folder.fd.as_fd());
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
        let open = |mode| rustix::fs::openat(base, path, flags | mode, Mode::empty());
        // A folder that may be written to and not read has names all the same.
        let (fd, readable) = match open(OFlags::RDONLY) {
            Err(Errno::ACCESS) => (open(OFlags::PATH)?, false),
            opened => (opened?, true),
        };
        Ok(Folder { fd, readable })
    }

    /// What the link `name` points to; nothing when it is no link, or when there is none.
    ///
    /// # Errors
    /// The host's.
    pub fn link_target(&self, name: &OsStr) -> io::Result<Option<PathBuf>> {
        match rustix::fs::readlinkat(&self.fd, name, Vec::new()) {
            Ok(target) => Ok(Some(
                std::ffi::OsString::from_vec(target.into_bytes()).into(),
            )),
            Err(Errno::INVAL | Errno::NOENT) => Ok(None),
            Err(cause) => Err(cause.into()),
        }
    }

    /// Opens the file `name` for reading and writing; nothing when there is none.
    ///
    /// # Errors
    /// The host's.
    pub fn open_file(&self, name: &OsStr) -> io::Result<Option<File>> {
        match rustix::fs::openat(&self.fd, name, OFlags::RDWR | ALWAYS, Mode::empty()) {
            Ok(fd) => Ok(Some(fd.into())),
            Err(Errno::NOENT) => Ok(None),
            Err(cause) => Err(cause.into()),
        }
    }

    /// What `name` stands for, if it is there and is no regular file.
    ///
    /// # Errors
    /// The host's.
    pub fn other_kind(&self, name: &OsStr) -> io::Result<Option<FileType>> {
        match rustix::fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(found) => {
                let kind = FileType::from_raw_mode(found.st_mode);
                Ok(Some(kind).filter(|kind| *kind != FileType::RegularFile))
            }
            Err(Errno::NOENT) => Ok(None),
            Err(cause) => Err(cause.into()),
        }
    }

    /// Makes the file `name`, which there must not be yet, with what the process's mask leaves of
    /// 0666.
    ///
    /// # Errors
    /// The host's, EEXIST included.
    pub fn create(&self, name: &OsStr) -> io::Result<File> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | ALWAYS;
        let mode = Mode::from_raw_mode(0o666);
        Ok(rustix::fs::openat(&self.fd, name, flags, mode)?.into())
    }

    /// Whether `file` is what `name` stands for.
    ///
    /// # Errors
    /// The host's, but not that there is none.
    pub fn is_at(&self, name: &OsStr, file: &File) -> io::Result<bool> {
        let metadata = file.metadata()?;
        match rustix::fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(found) => Ok((found.st_dev, found.st_ino) == (metadata.dev(), metadata.ino())),
            Err(Errno::NOENT) => Ok(false),
            Err(cause) => Err(cause.into()),
        }
    }

    /// Whether it is the same folder as `other`.
    ///
    /// # Errors
    /// The host's.
    pub fn is(&self, other: &Folder) -> io::Result<bool> {
        let [ours, theirs] = [rustix::fs::fstat(&self.fd)?, rustix::fs::fstat(&other.fd)?];
        Ok((ours.st_dev, ours.st_ino) == (theirs.st_dev, theirs.st_ino))
    }

    /// Gives the file `from` the name `to`, in place of what has it.
    ///
    /// # Errors
    /// The host's.
    pub fn rename(&self, from: &OsStr, to: &OsStr) -> io::Result<()> {
        Ok(rustix::fs::renameat(&self.fd, from, &self.fd, to)?)
    }

    /// Exchanges what `one` and `other` stand for, at once; false when this file system cannot.
    ///
    /// # Errors
    /// The host's.
    pub fn exchange(&self, one: &OsStr, other: &OsStr) -> io::Result<bool> {
        match rustix::fs::renameat_with(&self.fd, one, &self.fd, other, RenameFlags::EXCHANGE) {
            Ok(()) => Ok(true),
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => Ok(false),
            Err(cause) => Err(cause.into()),
        }
    }

    /// Gives the file `from` the name `to` as well, which there must not be yet; false when this file system cannot, or
    /// the host does not let this user.
    ///
    /// # Errors
    /// The host's.
    pub fn link(&self, from: &OsStr, to: &OsStr) -> io::Result<bool> {
        match rustix::fs::linkat(&self.fd, from, &self.fd, to, AtFlags::empty()) {
            Ok(()) => Ok(true),
            Err(Errno::PERM | Errno::MLINK | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                Ok(false)
            }
            Err(cause) => Err(cause.into()),
        }
    }

    /// Removes the file `name`, if there is one.
    ///
    /// # Errors
    /// The host's.
    pub fn remove(&self, name: &OsStr) -> io::Result<()> {
        match rustix::fs::unlinkat(&self.fd, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(cause) => Err(cause.into()),
        }
    }

    /// Waits until the names in it are on the disk. Of a folder that may not be read, they are there
    /// when the file system next writes.
    ///
    /// # Errors
    /// The host's.
    pub fn sync(&self) -> io::Result<()> {
        match self.readable {
            // Not every file system has that for folders.
            true => match rustix::fs::fsync(&self.fd) {
                Err(Errno::INVAL) => Ok(()),
                synced => Ok(synced?),
            },
            false => Ok(()),
        }
    }
}

/// How many milliseconds lie between two tries of a lock.
const LOCK_PAUSE: u32 = 10;

/// Locks `file` until its last descriptor is closed, or until [`unlock`]; false when another open file has the lock for
/// longer than `patience`. Of a process that was killed the kernel closes the files a moment after its end: when its
/// memory is given back, and what an io_uring had of them is done.
///
/// # Errors
/// The host's.
pub fn lock(file: &File, how: FlockOperation, patience: Duration) -> Result<bool, Errno> {
    let since = Instant::now();
    loop {
        match rustix::fs::flock(file, how) {
            Ok(()) => return Ok(true),
            Err(Errno::INTR) => {}
            Err(Errno::WOULDBLOCK) if since.elapsed() >= patience => return Ok(false),
            Err(Errno::WOULDBLOCK) => {
                // Nothing tells when it is let go of.
                let _ = fd::wait(&mut [], Some(LOCK_PAUSE));
            }
            Err(cause) => return Err(cause),
        }
    }
}

/// Locks `file` for this process alone, as [`lock`] does. Where the file system has no locks, it counts as locked.
///
/// # Errors
/// The host's.
pub fn lock_where_possible(file: &File, patience: Duration) -> io::Result<bool> {
    match lock(file, FlockOperation::NonBlockingLockExclusive, patience) {
        Err(Errno::NOLCK | Errno::OPNOTSUPP | Errno::NOSYS) => Ok(true),
        locked => Ok(locked?),
    }
}

/// Lets go of a lock that [`lock`] took, also where another process has a copy of the descriptor: one that was forked
/// meanwhile has it until it executes another program.
pub fn unlock(file: &File) {
    // Without it, the lock goes with the last copy.
    let _ = rustix::fs::flock(file, FlockOperation::Unlock);
}
