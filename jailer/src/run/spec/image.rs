//! The root disk of a guest with a command: a disk that is ready, or the one that `mayfly-image` makes of a folder, an
//! archive or an image layout. That is a program of its own, beside this one: what reads foreign files is not in here.
//! The disk's file is locked (shared) as long as the supervisor has it, so that no cache of disks removes it.

use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::{FileType, FlockOperation, OFlags};
use rustix::io::Errno;

use super::SpecError;
use crate::error::{Advice as _, AnyError, Failure, Step as _};

use crate::run::agent::RootMode;
use crate::sys;

const EROFS: &str = "erofs";
const EXT4: &str = "ext4";
/// A disk may be removed from its cache before it is locked.
const TRIES: u32 = 3;

/// Why an image cannot be the root disk.
#[derive(Debug, thiserror::Error)]
enum ImageError {
    #[error(
        "cannot use the image {0} (--image) with :rw: {1}; leave :rw out, and what is written goes to the guest's memory"
    )]
    ReadOnly(PathBuf, &'static str),
    #[error("cannot make a disk of {0} (--image): {1}")]
    NotMade(PathBuf, String),
}

/// The root disk.
#[derive(Debug)]
pub struct Image {
    /// Its file.
    pub path: PathBuf,
    /// Of its file system.
    pub root_type: &'static str,
    /// Its file, locked.
    pub lock: OwnedFd,
}

impl Image {
    /// Finds the disk of what was given, and has it made where that is none.
    pub fn open(given: &Path, mode: Option<RootMode>) -> Result<Image, AnyError> {
        let is_written = mode == Some(RootMode::ReadWrite);
        let refused = |why| Err(ImageError::ReadOnly(given.to_owned(), why).into());
        // NONBLOCK: a pipe must not hold us up.
        let file = sys::open(given, OFlags::RDONLY | OFlags::NONBLOCK)
            .step_on("open the image (--image)", given)?;
        if let Some(root_type) = type_of(&file, given, "--image")? {
            if is_written && root_type == EROFS {
                return refused("an EROFS file system is never written to");
            }
            if !is_written {
                // One that is written to is no disk of a cache. Another program's own lock is its business.
                let _ = rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared);
            }
            return Ok(Image {
                path: given.to_owned(),
                root_type,
                lock: file,
            });
        }
        if is_written {
            return refused("a disk is made of it, which all microVMs share");
        }
        for _ in 0..TRIES {
            let path = make(given)?;
            if let Some(lock) = lock(&path)? {
                return Ok(Image {
                    path,
                    root_type: EROFS,
                    lock,
                });
            }
        }
        let why = "it is removed from its cache again and again; raise the limit of the cache";
        Err(ImageError::NotMade(given.to_owned(), why.into()).into())
    }
}

/// The type of the file system in the image of `--upper`, which is written to.
pub fn upper_type(path: &Path) -> Result<&'static str, AnyError> {
    const OPTION: &str = "--upper";
    let file = sys::open(path, OFlags::RDONLY | OFlags::NONBLOCK)
        .step_on("open the disk (--upper)", path)?;
    match type_of(&file, path, OPTION)? {
        Some(EXT4) => Ok(EXT4),
        _ => Err(SpecError::WrittenUpper(path.to_owned()).into()),
    }
}

/// The type of the file system in an image, by its content; none: it is no disk.
fn type_of(image: &OwnedFd, path: &Path, option: &str) -> Result<Option<&'static str>, Failure> {
    /// Where both have their superblock.
    const SUPERBLOCK: u64 = 1024;
    const EROFS_MAGIC: [u8; 4] = 0xe0f5_e1e2_u32.to_le_bytes();
    /// In it, where ext4 has its number.
    const EXT4_AT: usize = 56;
    const EXT4_MAGIC: [u8; 2] = 0xef53_u16.to_le_bytes();
    let work = format!("read the image ({option})");
    let it = rustix::fs::fstat(image).step_on(&work, path)?;
    if FileType::from_raw_mode(it.st_mode).is_dir() {
        return Ok(None);
    }
    let mut block = [0; 64];
    let count = rustix::io::pread(image, &mut block, SUPERBLOCK).step_on(&work, path)?;
    let block = &block[..count];
    if block.starts_with(&EROFS_MAGIC) {
        return Ok(Some(EROFS));
    }
    let is_ext4 = block.get(EXT4_AT..EXT4_AT + 2) == Some(&EXT4_MAGIC);
    Ok(is_ext4.then_some(EXT4))
}

/// Has `mayfly-image` make the disk of a source, or find it; its path.
fn make(source: &Path) -> Result<PathBuf, AnyError> {
    const NAME: &str = "mayfly-image";
    let program = std::env::current_exe().step("find mayfly-image beside this program")?;
    let program = program.with_file_name(NAME);
    let mut command = Command::new(&program);
    // A source may begin with a dash.
    command.arg("disk").arg("--").arg(source);
    let output = command.stdin(Stdio::null()).output().step_on("run", &program).hint(
        Errno::NOENT,
        "--image names no EROFS or ext4 file, and what makes one of a folder, an archive or an image layout is not \
         beside mayfly-jailer: build it (cargo build --release -p mayfly-images), or make the file with mkfs.erofs",
    )?;
    let said = String::from_utf8_lossy(&output.stderr);
    let line = output.stdout.strip_suffix(b"\n").unwrap_or_default();
    if !output.status.success() || line.is_empty() {
        let why = said.lines().last().unwrap_or("it gave no reason");
        let why = why.strip_prefix("mayfly-image: ").unwrap_or(why);
        let why = why.trim_end_matches('.').to_owned();
        return Err(ImageError::NotMade(source.to_owned(), why).into());
    }
    // What the disk lacks.
    for line in said.lines() {
        eprintln!("{}", line.replace(char::is_control, "?"));
    }
    Ok(OsStr::from_bytes(line).into())
}

/// Locks a disk of a cache; none: it is gone.
fn lock(path: &Path) -> Result<Option<OwnedFd>, Failure> {
    const WORK: &str = "lock the disk";
    let file = match sys::open(path, OFlags::RDONLY) {
        Err(Errno::NOENT) => return Ok(None),
        other => other.step_on(WORK, path)?,
    };
    loop {
        match rustix::fs::flock(file.as_fd(), FlockOperation::LockShared) {
            Err(Errno::INTR) => {}
            other => break other.step_on(WORK, path)?,
        }
    }
    let it = rustix::fs::fstat(&file).step_on(WORK, path)?;
    Ok((it.st_nlink > 0).then_some(file))
}
