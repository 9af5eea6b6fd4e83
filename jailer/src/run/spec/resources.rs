//! Opening what a machine names, on the host: each as what it is to be, and without waiting.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use mayfly::wire::PacketSocket;
use mayfly::wire::Source;
use mayfly::wire::config::{Backing, PassedFd};
use mayfly::wire::tap::{Tap, TapError};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;

use super::SpecError;
use super::inherited::Passed;
use crate::error::{Advice as _, AnyError, Failure, Step as _};
use crate::netns::has_interface;

/// What a socket for clients of the console is called.
pub const CONSOLE_SOCKET: &str = "console socket";

fn word(backing: Backing) -> &'static str {
    match backing {
        Backing::Kernel => "kernel",
        Backing::Initrd => "initrd",
        Backing::Disk { .. } => "disk image",
        Backing::Overlay => "overlay",
        Backing::Tap | Backing::TapQueue => "tap",
        Backing::CpuConfig => "CPU configuration",
        Backing::Log => "log",
        Backing::Metrics => "metrics file",
        Backing::ConsoleOutput => "console output",
        Backing::ConsoleSocket => CONSOLE_SOCKET,
    }
}

/// Opens what `source` names, or takes it from what was passed; and what messages call it. A disk has
/// its whole path there, by which a snapshot of the microVM finds it again.
pub fn open_or_take(
    backing: Backing,
    source: &Source,
    passed: &mut Passed,
) -> Result<(OwnedFd, String), AnyError> {
    match source {
        Source::Named(name) => {
            let file = open(backing, name)?;
            let absolute = std::path::absolute(name).ok();
            let is_disk = matches!(backing, Backing::Disk { .. } | Backing::Overlay);
            let whole = absolute.and_then(|path| path.into_os_string().into_string().ok());
            let called = whole.filter(|_| is_disk).unwrap_or_else(|| name.clone());
            Ok((file, called))
        }
        Source::Fd(PassedFd { fd, name }) => {
            let called = name.clone().unwrap_or_else(|| format!("descriptor {fd}"));
            let file = passed.take(*fd)?;
            examine(backing, file.as_fd(), &called)?;
            Ok((file, called))
        }
    }
}

/// Opens what `name` names.
fn open(backing: Backing, name: &str) -> Result<OwnedFd, AnyError> {
    match backing {
        Backing::Tap => return open_tap(name, Tap::open),
        Backing::TapQueue => return open_tap(name, Tap::open_queue),
        _ => {}
    }
    // NONBLOCK: a pipe must not hold us up.
    let common = OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let flags = match backing {
        Backing::Disk { read_only: false } => OFlags::RDWR,
        Backing::Overlay => OFlags::RDWR | OFlags::CREATE,
        Backing::Log | Backing::Metrics | Backing::ConsoleOutput => {
            OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE
        }
        _ => OFlags::RDONLY,
    };
    let file = rustix::fs::open(name, flags | common, Mode::from_raw_mode(0o600))
        .step(format!("open the {} {name}", word(backing)))
        .hints(|answer| {
            let only_to_read = matches!(answer, Errno::ACCESS | Errno::ROFS | Errno::PERM);
            (only_to_read && flags == OFlags::RDWR).then_some(
                "add :ro (\"is_read_only\" in a configuration) if the guest only reads it",
            )
        })?;
    examine(backing, file.as_fd(), name)?;
    Ok(file)
}

/// Refuses what cannot be what it is to be.
pub fn examine(backing: Backing, fd: BorrowedFd<'_>, name: &str) -> Result<(), SpecError> {
    let unfit = |why| SpecError::Unfit(name.to_owned(), word(backing), why);
    if matches!(backing, Backing::Tap | Backing::TapQueue) {
        let stat = rustix::fs::fstat(fd);
        let is_socket = stat.is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode).is_socket());
        if is_socket && backing == Backing::Tap {
            return PacketSocket::check(fd).map_err(|what| unfit(format!("it is {what}")));
        }
        let copy = fd.try_clone_to_owned().map_err(TapError::NotAttached);
        return copy.and_then(Tap::from_fd).map(drop).map_err(|error| {
            unfit(match error {
                TapError::NotAttached(_) => "it is not an attached tap".into(),
                error => error.to_string(),
            })
        });
    }
    let looked = rustix::fs::fstat(fd).and_then(|stat| Ok((stat, rustix::fs::fcntl_getfl(fd)?)));
    let (stat, flags) = looked.map_err(|error| unfit(error.to_string()))?;
    let kind = FileType::from_raw_mode(stat.st_mode);
    let access = flags & OFlags::RWMODE;
    let (fits, is_enough) = match backing {
        Backing::Disk { read_only } => (
            kind.is_file() || kind.is_block_device(),
            access == OFlags::RDWR || (read_only && access == OFlags::RDONLY),
        ),
        Backing::Overlay => (kind.is_file(), access == OFlags::RDWR),
        Backing::ConsoleSocket => (kind.is_socket(), true),
        Backing::Log | Backing::Metrics | Backing::ConsoleOutput => {
            (kind.is_file() || kind.is_fifo(), access != OFlags::RDONLY)
        }
        _ => (kind.is_file(), access != OFlags::WRONLY),
    };
    let kind = match kind {
        _ if fits && is_enough => return Ok(()),
        _ if fits => return Err(unfit("it is not open for what it is needed for".into())),
        FileType::Directory => "a folder",
        FileType::CharacterDevice => "a character device",
        FileType::BlockDevice => "a block device",
        FileType::Fifo => "a pipe",
        FileType::Socket => "a socket",
        _ => "of another kind",
    };
    Err(unfit(format!("it is {kind}")))
}

/// Attaches to a tap of the host. One that does not exist would be made, and lead nowhere.
fn open_tap(name: &str, open: fn(&str) -> Result<Tap, TapError>) -> Result<OwnedFd, AnyError> {
    if !has_interface(name) {
        return Err(SpecError::NoInterface(name.to_owned()).into());
    }
    let opened = open(name).map_err(|error| {
        let remedy = match &error {
            TapError::Open(answer) => Errno::from_io_error(answer).and_then(tun_remedy),
            _ => None,
        };
        Failure::new(format!("attach to the tap {name:?}"), error).remedy(remedy)
    });
    Ok(opened?.into())
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
pub fn open_to_append(path: &Path, option: &str) -> Result<File, Failure> {
    let flags = OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE | OFlags::NONBLOCK;
    let flags = flags | OFlags::CLOEXEC | OFlags::NOCTTY;
    rustix::fs::open(path, flags, Mode::from_raw_mode(0o600))
        .map(File::from)
        .step(format!("open {} ({option})", path.display()))
}
