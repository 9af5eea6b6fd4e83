//! Opening what a machine names, on the host: each as what it is said to be, and never waiting.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags};

use crate::failure::{Doing, Failure};
use crate::sys;

/// What sort of thing a configuration names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Guest kernel.
    Kernel,
    /// Initial RAM disk.
    Initrd,
    /// Disk image.
    Disk {
        /// Whether the guest only reads it.
        read_only: bool,
    },
    /// Where metrics are written.
    Metrics,
    /// Network interface.
    Tap,
    /// Where clients of the monitor's console connect.
    Console,
}

impl Kind {
    /// What it is called.
    pub(super) fn word(self) -> &'static str {
        match self {
            Kind::Kernel => "kernel",
            Kind::Initrd => "initrd",
            Kind::Disk { .. } => "disk image",
            Kind::Metrics => "metrics file",
            Kind::Tap => "tap",
            Kind::Console => "console socket",
        }
    }

    /// Opens `path` as this.
    pub(super) fn open(self, path: &Path) -> Result<OwnedFd, Failure> {
        let what = format!("open the {} {}", self.word(), path.display());
        // NONBLOCK: a pipe must not hold us up.
        let common = OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let flags = match self {
            Kind::Disk { read_only: false } | Kind::Tap => OFlags::RDWR,
            Kind::Metrics => OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE,
            _ => OFlags::RDONLY,
        };
        let mode = Mode::from_raw_mode(0o600);
        let file = rustix::fs::open(path, flags | common, mode).doing_or(&what, |error| {
            let denied = matches!(
                error.kind(),
                std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::ReadOnlyFilesystem
            );
            if denied && self == (Kind::Disk { read_only: false }) {
                "add :ro (\"is_read_only\" in a configuration) if the guest only reads it"
            } else {
                ""
            }
        })?;
        self.examine(file.as_fd(), &path.display().to_string())?;
        Ok(file)
    }

    /// Refuses what cannot be what it is said to be.
    pub(super) fn examine(self, fd: BorrowedFd<'_>, name: &str) -> Result<(), Failure> {
        let what = format!("use {name} as {}", self.word());
        if self == Kind::Tap {
            return match sys::is_guest_tap(fd) {
                Ok(true) => Ok(()),
                Ok(false) => Err(Failure::new(what, "that tap is attached in another way")
                    .remedy("attach it with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR")),
                Err(_) => Err(Failure::new(what, "it is not an attached tap")),
            };
        }
        let kind = FileType::from_raw_mode(rustix::fs::fstat(fd).doing(&what)?.st_mode);
        let fits = match self {
            Kind::Kernel | Kind::Initrd => kind.is_file(),
            Kind::Disk { .. } => kind.is_file() || kind.is_block_device(),
            Kind::Metrics => kind.is_file() || kind.is_fifo(),
            Kind::Console => kind.is_socket(),
            Kind::Tap => false,
        };
        if !fits {
            return Err(Failure::new(what, format_args!("it is {}", describe(kind))));
        }
        let access = rustix::fs::fcntl_getfl(fd).doing(&what)? & OFlags::RWMODE;
        let enough = match self {
            Kind::Disk { read_only: false } => access == OFlags::RDWR,
            Kind::Metrics => access != OFlags::RDONLY,
            _ => access != OFlags::WRONLY,
        };
        if enough {
            Ok(())
        } else {
            Err(Failure::new(
                what,
                "it is not open for what it is needed for",
            ))
        }
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
pub(super) fn open_tap(name: &str) -> Result<OwnedFd, Failure> {
    let what = format!("attach to the tap {name:?}");
    if !Path::new("/sys/class/net").join(name).exists() || name.contains('/') || name.is_empty() {
        return Err(
            Failure::new(what, "this host has no such interface").remedy(
                "make it (`ip tuntap add NAME mode tap user USER`), or give --net auto or user",
            ),
        );
    }
    let tun = open_tun()?;
    sys::attach_tap(tun.as_fd(), name).map_err(|error| {
        let failure = Failure::new(what, error);
        match error {
            rustix::io::Errno::BUSY => failure.remedy("another process is attached to it"),
            rustix::io::Errno::PERM => {
                failure.remedy("make it this user's with `ip tuntap add ... user USER`")
            }
            rustix::io::Errno::INVAL => failure.remedy("it is no tap with a single queue"),
            _ => failure,
        }
    })?;
    Ok(tun)
}

/// Opens the host's tun device.
pub fn open_tun() -> Result<OwnedFd, Failure> {
    const TUN: &str = "/dev/net/tun";
    rustix::fs::open(
        TUN,
        OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK,
        Mode::empty(),
    )
    .doing_or(format_args!("open {TUN}"), |error| match error.kind() {
        std::io::ErrorKind::NotFound => "load it with `modprobe tun`",
        std::io::ErrorKind::PermissionDenied => {
            "give this user access (`setfacl -m u:USER:rw /dev/net/tun`), or hand in a tap (--net fd:N)"
        }
        _ => "",
    })
}

/// Opens `path` to append to, made if it does not exist.
pub fn open_to_append(path: &Path, what: &str) -> Result<File, Failure> {
    let flags = OFlags::WRONLY
        | OFlags::APPEND
        | OFlags::CREATE
        | OFlags::CLOEXEC
        | OFlags::NOCTTY
        | OFlags::NONBLOCK;
    rustix::fs::open(path, flags, Mode::from_raw_mode(0o600))
        .map(File::from)
        .doing(format_args!("open {} ({what})", path.display()))
}
