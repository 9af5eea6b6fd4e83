//! Opening what a machine names, on the host: each as what it is to be, and without waiting.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use mayfly::wire::config::Backing;
use mayfly::wire::tap::{self, Tap, TapError};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;

use super::SpecError;
use crate::error::errno;

/// What a socket for clients of the console is called.
pub const CONSOLE_SOCKET: &str = "console socket";

fn word(backing: Backing) -> &'static str {
    match backing {
        Backing::Kernel => "kernel",
        Backing::Initrd => "initrd",
        Backing::Disk { .. } => "disk image",
        Backing::Tap => "tap",
        Backing::CpuConfig => "CPU configuration",
        Backing::Log => "log",
        Backing::Metrics => "metrics file",
        Backing::ConsoleOutput => "console output",
        Backing::ConsoleSocket => CONSOLE_SOCKET,
    }
}

/// Opens what `name` names.
pub fn open(backing: Backing, name: &str) -> Result<OwnedFd, SpecError> {
    if backing == Backing::Tap {
        return open_tap(name);
    }
    // NONBLOCK: a pipe must not hold us up.
    let common = OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let flags = match backing {
        Backing::Disk { read_only: false } => OFlags::RDWR,
        Backing::Log | Backing::Metrics | Backing::ConsoleOutput => {
            OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE
        }
        _ => OFlags::RDONLY,
    };
    let file = rustix::fs::open(name, flags | common, Mode::from_raw_mode(0o600));
    let file = file.map_err(|source| SpecError::Open {
        what: word(backing),
        path: name.into(),
        to_write: flags == OFlags::RDWR,
        source,
    })?;
    examine(backing, file.as_fd(), name)?;
    Ok(file)
}

/// Refuses what cannot be what it is to be.
pub fn examine(backing: Backing, fd: BorrowedFd<'_>, name: &str) -> Result<(), SpecError> {
    let unfit = |why: String| SpecError::Unfit {
        name: name.to_owned(),
        what: word(backing),
        why,
    };
    if backing == Backing::Tap {
        let copy = fd
            .try_clone_to_owned()
            .map_err(|error| unfit(error.to_string()))?;
        return match Tap::from_fd(copy) {
            Ok(_) => Ok(()),
            Err(TapError::NotAttached(_)) => Err(unfit("it is not an attached tap".into())),
            Err(error) => Err(unfit(error.to_string())),
        };
    }
    let looked = rustix::fs::fstat(fd).and_then(|stat| Ok((stat, rustix::fs::fcntl_getfl(fd)?)));
    let (stat, flags) = looked.map_err(|error| unfit(error.to_string()))?;
    let kind = FileType::from_raw_mode(stat.st_mode);
    let fits = match backing {
        Backing::Disk { .. } => kind.is_file() || kind.is_block_device(),
        Backing::ConsoleSocket => kind.is_socket(),
        Backing::Log | Backing::Metrics | Backing::ConsoleOutput => {
            kind.is_file() || kind.is_fifo()
        }
        _ => kind.is_file(),
    };
    if !fits {
        return Err(unfit(format!("it is {}", describe(kind))));
    }
    let access = flags & OFlags::RWMODE;
    let enough = match backing {
        Backing::Disk { read_only: false } => access == OFlags::RDWR,
        Backing::Log | Backing::Metrics | Backing::ConsoleOutput => access != OFlags::RDONLY,
        _ => access != OFlags::WRONLY,
    };
    match enough {
        true => Ok(()),
        false => Err(unfit("it is not open for what it is needed for".into())),
    }
}

fn describe(kind: FileType) -> &'static str {
    match kind {
        FileType::Directory => "a folder",
        FileType::CharacterDevice => "a character device",
        FileType::BlockDevice => "a block device",
        FileType::Fifo => "a pipe",
        FileType::Socket => "a socket",
        _ => "of another kind",
    }
}

/// Attaches to a tap of the host. One that does not exist would be made, and lead nowhere.
fn open_tap(name: &str) -> Result<OwnedFd, SpecError> {
    let is_name = !name.contains('/') && !name.is_empty();
    if !is_name || !Path::new("/sys/class/net").join(name).exists() {
        return Err(SpecError::NoInterface(name.to_owned()));
    }
    Tap::open(name)
        .map(OwnedFd::from)
        .map_err(|error| SpecError::Tap(name.to_owned(), error))
}

/// Opens the host's tun device.
pub fn open_tun() -> Result<OwnedFd, Errno> {
    tap::open_tun().map_err(errno)
}

/// What to do about a tun device that cannot be opened.
pub fn tun_remedy(error: Errno) -> Option<&'static str> {
    Some(match error {
        Errno::NOENT => "load it with `modprobe tun`",
        Errno::ACCESS => {
            "give this user access (`setfacl -m u:USER:rw /dev/net/tun`), or pass a tap (--net fd:N)"
        }
        _ => return None,
    })
}

/// Opens `path` to append to, made if it does not exist.
pub fn open_to_append(path: &Path, option: &'static str) -> Result<File, SpecError> {
    let flags = OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE | OFlags::NONBLOCK;
    let flags = flags | OFlags::CLOEXEC | OFlags::NOCTTY;
    rustix::fs::open(path, flags, Mode::from_raw_mode(0o600))
        .map(File::from)
        .map_err(|error| SpecError::Append(PathBuf::from(path), option, error))
}
