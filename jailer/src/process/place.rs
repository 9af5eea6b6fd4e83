//! Where the socket of a microVM that runs a command is, by its id: in a folder of this user alone.

use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::net::SocketAddrUnix;
use rustix::net::sockopt::{self, Timeout};

use crate::error::{Advice as _, AnyError, Step as _};
use crate::root::open_folder_of;
use crate::sys;

/// Where root's are.
const OF_ROOT: &str = "/run/mayfly";
/// Others may not write to it, whatever else they may.
const WRITABLE: u32 = 0o022;
/// Others may not do anything with it.
const OPEN: u32 = 0o077;

/// The folder is not this user's alone.
#[derive(Debug, thiserror::Error)]
enum PlaceError {
    #[error(
        "cannot use the folder {0}: it is not a folder of this user that no other may open (mode 0700); remove it, or \
         set XDG_RUNTIME_DIR to a folder of this user"
    )]
    NotOwn(PathBuf),
    #[error(
        "cannot use the folder {0} (--runtime-dir): it is not a folder of this user that no other may write to; give \
         another, or change its owner and mode"
    )]
    GivenNotOwn(PathBuf),
}

/// The folder for the sockets of one user.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// `--runtime-dir`.
    given: Option<PathBuf>,
}

impl Place {
    /// The given folder, or the one of this user: `/run/mayfly` of root, `$XDG_RUNTIME_DIR/mayfly` of others, and
    /// without that variable `/tmp/mayfly-UID`.
    pub fn new(given: Option<PathBuf>) -> Place {
        Place { given }
    }

    fn folder(&self) -> PathBuf {
        if let Some(given) = &self.given {
            return given.clone();
        }
        let uid = rustix::process::geteuid();
        if uid.is_root() {
            return OF_ROOT.into();
        }
        let runtime = std::env::var_os("XDG_RUNTIME_DIR");
        match runtime.filter(|it| it.as_encoded_bytes().starts_with(b"/")) {
            Some(runtime) => Path::new(&runtime).join("mayfly"),
            None => format!("/tmp/mayfly-{}", uid.as_raw()).into(),
        }
    }

    /// The socket of `id`.
    pub fn socket(&self, id: &str) -> PathBuf {
        self.folder().join(format!("{id}.sock"))
    }

    /// Makes the folder, if it is not there, and makes sure that it is this user's.
    pub fn make(&self) -> Result<(), AnyError> {
        let folder = self.folder();
        let mut builder = std::fs::DirBuilder::new();
        let made = builder.mode(0o700).create(&folder);
        if let Err(error) = made
            && error.kind() != std::io::ErrorKind::AlreadyExists
        {
            let failed = Err::<(), _>(error).step_on("make the folder for sockets", &folder);
            let remedy = match self.given {
                Some(_) => "make the folder around it first (--runtime-dir)",
                None => "set XDG_RUNTIME_DIR to a folder of this user",
            };
            return Ok(failed.advise(remedy)?);
        }
        if self.given.is_none() {
            close_to_others(&folder);
        }
        self.check()
    }

    /// Makes sure that the folder is this user's, and that no other can put a socket there.
    pub fn check(&self) -> Result<(), AnyError> {
        let folder = self.folder();
        let denied = match self.given {
            Some(_) => WRITABLE,
            None => OPEN,
        };
        match is_own(&folder, denied)? {
            true => Ok(()),
            false if self.given.is_some() => Err(PlaceError::GivenNotOwn(folder).into()),
            false => Err(PlaceError::NotOwn(folder).into()),
        }
    }
}

/// A folder of this user that others may read, but not write to, is closed to them.
fn close_to_others(folder: &Path) {
    let uid = rustix::process::geteuid().as_raw();
    let is_own =
        |it: &std::fs::Metadata| it.is_dir() && it.uid() == uid && it.mode() & WRITABLE == 0;
    if std::fs::symlink_metadata(folder).is_ok_and(|it| is_own(&it)) {
        let own = std::fs::Permissions::from_mode(0o700);
        // What comes of it is looked at.
        let _ = std::fs::set_permissions(folder, own);
    }
}

/// How long who listens at a socket may take to take a connection, where as many wait as may.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Connects to a socket at a path; EAGAIN: none of those that wait was taken in time. The address of one has 107 bytes
/// at most: so it is the name in the folder, which is the working folder meanwhile.
pub fn connect_to(socket: &OwnedFd, path: &Path, patience: Duration) -> Result<(), Errno> {
    let (folder, name) = open_folder_of(path)?;
    let address = SocketAddrUnix::new(name)?;
    let flags = OFlags::PATH | OFlags::DIRECTORY;
    let before = sys::open(".", flags)?;
    rustix::process::fchdir(&folder)?;
    let connected = connect_within(socket, &address, patience);
    rustix::process::fchdir(&before)?;
    connected
}

fn connect_within(
    socket: &OwnedFd,
    address: &SocketAddrUnix,
    patience: Duration,
) -> Result<(), Errno> {
    let until = Instant::now() + patience;
    let connected = loop {
        let left = until.saturating_duration_since(Instant::now());
        // Zero would be without end.
        let left = left.max(Duration::from_millis(1));
        sockopt::set_socket_timeout(socket, Timeout::Send, Some(left))?;
        match rustix::net::connect(socket, address) {
            Err(Errno::INTR) => {}
            other => break other,
        }
    };
    sockopt::set_socket_timeout(socket, Timeout::Send, None)?;
    connected
}

/// Gives the thread of a test a working folder of its own: others change theirs meanwhile.
#[cfg(test)]
pub fn own_working_folder() {
    sys::unshare(rustix::thread::UnshareFlags::FS).expect("it needs no privilege");
}

/// Whether it is a folder of this user, and others have none of the permissions in `denied`.
fn is_own(folder: &Path, denied: u32) -> Result<bool, AnyError> {
    let found = std::fs::symlink_metadata(folder).step_on("look at the folder", folder)?;
    let is_own = found.uid() == rustix::process::geteuid().as_raw();
    Ok(found.is_dir() && is_own && found.mode() & denied == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(path: &Path, mode: u32) {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn folder_that_others_may_open_is_closed_to_them_or_refused() {
        let own = crate::testing::Folder::new("place");
        let is_own = |path: &Path| super::is_own(path, OPEN).unwrap();
        set(own.path(), 0o700);
        assert!(is_own(own.path()));
        set(own.path(), 0o755);
        assert!(!is_own(own.path()));
        close_to_others(own.path());
        assert!(is_own(own.path()));
        for mode in [0o777, 0o720] {
            set(own.path(), mode);
            close_to_others(own.path());
            assert!(!is_own(own.path()));
        }
        set(own.path(), 0o700);
        let link = own.path().join("link");
        std::os::unix::fs::symlink(own.path(), &link).unwrap();
        assert!(!is_own(&link));
    }

    #[test]
    fn given_folder_is_made_and_stays_as_it_is_but_no_other_may_write_to_it() {
        let own = crate::testing::Folder::new("place-given");
        let path = own.path().join("run");
        let place = Place::new(Some(path.clone()));
        place.make().unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o700);
        assert_eq!(place.socket("a.b_c"), path.join("a.b_c.sock"));
        set(&path, 0o711);
        place.make().unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o711);
        set(&path, 0o770);
        let text = crate::error::message(&*place.make().unwrap_err());
        assert!(text.contains("--runtime-dir"), "{text}");
    }
}
