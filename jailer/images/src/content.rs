//! The content of one file: where it is, how long, and its SHA-256 once that is known. Content of a folder of the host
//! stays there, and is read only as long as it is what it was when the folder was listed.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags, ResolveFlags, Stat};
use sha2::{Digest, Sha256};

use crate::failure::{Context, Failure, Result};

/// A SHA-256.
pub type Sum = [u8; 32];

/// How much is read at once.
pub const CHUNK: usize = 256 << 10;

/// In hexadecimal digits.
pub fn hex(sum: &[u8]) -> String {
    sum.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What tells one state of a file from another: the kernel sets the time of the last change, which no program can.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    pub dev: u64,
    pub ino: u64,
    pub size: u64,
    pub mtime: (i64, u64),
    pub ctime: (i64, u64),
}

impl Stamp {
    pub fn of(it: &Stat) -> Stamp {
        Stamp {
            dev: it.st_dev,
            ino: it.st_ino,
            size: it.st_size.max(0) as u64,
            mtime: (it.st_mtime, it.st_mtime_nsec),
            ctime: (it.st_ctime, it.st_ctime_nsec),
        }
    }

    /// The same, with what stands for its file system in place of the number, which only holds for one mount.
    pub fn write(&self, to: &mut Sha256) {
        for number in [self.ino, self.size, self.mtime.1, self.ctime.1] {
            to.update(number.to_le_bytes());
        }
        for number in [self.mtime.0, self.ctime.0] {
            to.update(number.to_le_bytes());
        }
    }
}

/// A folder of the host, whose files are opened without following any link.
#[derive(Debug)]
pub struct Folder {
    fd: OwnedFd,
    path: PathBuf,
}

impl Folder {
    pub fn open(path: &Path) -> Result<Folder> {
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::empty()).cannot("open", path)?;
        Ok(Folder {
            fd,
            path: path.to_path_buf(),
        })
    }

    pub fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens `name` below, with `flags`; the empty name is the folder itself.
    pub fn at(&self, name: &Path, flags: OFlags) -> Result<OwnedFd> {
        let below = match name.as_os_str().is_empty() {
            true => Path::new("."),
            false => name,
        };
        // A pipe in the place of a file must not hold us up.
        let flags = flags | OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        rustix::fs::openat2(&self.fd, below, flags, Mode::empty(), resolve)
            .cannot("open", &self.path.join(name))
    }
}

#[derive(Debug, Clone)]
pub enum Place {
    /// A file of the working folder.
    Own(PathBuf),
    /// A file of the folder that the tree was read from, and what it was then.
    Below(Arc<Folder>, PathBuf, Stamp),
}

#[derive(Debug, Clone)]
pub struct Content {
    pub place: Place,
    pub len: u64,
    pub sum: Option<Sum>,
}

/// Content that is being read.
#[derive(Debug)]
pub struct Opened {
    pub file: File,
    is: Option<(Stamp, PathBuf)>,
}

impl Content {
    #[cfg(test)]
    pub fn of_nothing(name: &str) -> Content {
        Content {
            place: Place::Own(name.into()),
            len: 0,
            sum: None,
        }
    }

    pub fn path(&self) -> PathBuf {
        match &self.place {
            Place::Own(path) => path.clone(),
            Place::Below(folder, name, _) => folder.path().join(name),
        }
    }

    pub fn open(&self) -> Result<Opened> {
        let opened = match &self.place {
            Place::Own(path) => Opened {
                file: File::open(path).cannot("open", path)?,
                is: None,
            },
            Place::Below(folder, name, stamp) => Opened {
                file: folder.at(name, OFlags::empty())?.into(),
                is: Some((*stamp, self.path())),
            },
        };
        opened.check()?;
        Ok(opened)
    }

    /// Reads all of it in pieces, and gives its sum.
    pub fn read(&self, each: &mut dyn FnMut(&[u8]) -> std::io::Result<()>) -> Result<Sum> {
        let opened = self.open()?;
        let mut hash = Sha256::new();
        let mut left = self.len;
        let mut buffer = vec![0; CHUNK.min(usize::try_from(left).unwrap_or(CHUNK))];
        while left > 0 {
            let want = buffer.len().min(usize::try_from(left).unwrap_or(CHUNK));
            let len = crate::sparse::fill(&mut &opened.file, &mut buffer[..want])
                .cannot("read", &self.path())?;
            if len == 0 {
                return Err(changed(&self.path()));
            }
            hash.update(&buffer[..len]);
            each(&buffer[..len]).cannot("copy", &self.path())?;
            left -= len as u64;
        }
        opened.check()?;
        Ok(hash.finalize().into())
    }
}

impl Opened {
    /// That the file is what it was.
    pub fn check(&self) -> Result<()> {
        let Some((stamp, path)) = &self.is else {
            return Ok(());
        };
        let it = rustix::fs::fstat(&self.file).cannot("open", path)?;
        match Stamp::of(&it) == *stamp {
            true => Ok(()),
            false => Err(changed(path)),
        }
    }
}

pub fn changed(path: &Path) -> Failure {
    Failure::new(
        path,
        "was changed while it was read",
        "end what writes to it, and try again",
    )
}

/// Computes a sum on the way.
pub struct Hashing<'a> {
    pub from: &'a mut dyn Read,
    pub hash: Sha256,
}

impl Read for Hashing<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let len = self.from.read(buffer)?;
        self.hash.update(&buffer[..len]);
        Ok(len)
    }
}

/// The SHA-256 of a file.
pub fn sum_of(path: &Path) -> Result<Sum> {
    let len = std::fs::metadata(path).cannot("open", path)?.len();
    let content = Content {
        place: Place::Own(path.to_path_buf()),
        len,
        sum: None,
    };
    content.read(&mut |_| Ok(()))
}
