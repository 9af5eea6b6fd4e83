//! A listening socket at a path of the host: made so that nothing in use is replaced, and removed only
//! if what is there is still this one.
//!
//! The path is the caller's, who is trusted: symbolic links in it are followed, once, to the folder
//! that is held open from then on.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, FlockOperation, Mode, OFlags, Stat};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::error::{Advice as _, AnyError, Step as _};
use crate::root::open_folder_of;
use crate::sys;

/// A socket cannot be made at a path.
#[derive(Debug, thiserror::Error)]
enum SocketError {
    #[error(
        "cannot make the socket {0}: something is there already; choose another path, or remove it"
    )]
    Taken(PathBuf),
    #[error("cannot make the socket {0}: its name may have 107 bytes")]
    LongName(PathBuf),
}

const MAKE: &str = "make the socket";

/// The name of a socket in its folder.
#[derive(Debug)]
pub struct NamedSocket {
    folder: OwnedFd,
    name: OsString,
    /// What was made there. Held open, so that nothing made later gets its number.
    made: OwnedFd,
}

impl NamedSocket {
    /// Makes a socket at `path`, which only this user may connect to, and listens on it. A socket
    /// without a listener was left by a process that was killed, and is replaced. Changes the working
    /// directory: the address of a socket holds 107 bytes.
    pub fn bind(path: &Path) -> Result<(NamedSocket, OwnedFd), AnyError> {
        let (folder, name) = open_folder_of(path)
            .step_on(MAKE, path)
            .hint(Errno::NOENT, "make its folder first")?;
        let _lock = lock(&folder);
        let address = SocketAddrUnix::new(name);
        let address = address.map_err(|_| SocketError::LongName(path.to_owned()))?;
        if let Ok(there) = rustix::fs::statat(&folder, name, AtFlags::SYMLINK_NOFOLLOW) {
            rustix::process::fchdir(&folder).step_on(MAKE, path)?;
            if !is_dead(&there, &address) {
                return Err(SocketError::Taken(path.to_owned()).into());
            }
        }
        Ok(NamedSocket::make(folder, name.to_owned(), &address).step_on(MAKE, path)?)
    }

    fn make(
        folder: OwnedFd,
        name: OsString,
        address: &SocketAddrUnix,
    ) -> Result<(NamedSocket, OwnedFd), Errno> {
        rustix::process::fchdir(&folder)?;
        let socket = stream()?;
        match rustix::fs::unlinkat(&folder, &name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(error),
        }
        // Its file gets the permissions of the socket, without what the umask forbids.
        rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
        rustix::net::bind(&socket, address)?;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let made = rustix::fs::openat(&folder, &name, flags, Mode::empty())?;
        let named = NamedSocket { folder, name, made };
        if let Err(error) = rustix::net::listen(&socket, 128) {
            named.remove();
            return Err(error);
        }
        Ok((named, socket))
    }

    /// Removes the name if it still is that of what was made.
    pub fn remove(self) {
        let _lock = lock(&self.folder);
        let there = rustix::fs::statat(&self.folder, &self.name, AtFlags::SYMLINK_NOFOLLOW);
        let same = rustix::fs::fstat(&self.made).is_ok_and(|own| {
            there.is_ok_and(|it| (it.st_dev, it.st_ino) == (own.st_dev, own.st_ino))
        });
        if same {
            let _ = rustix::fs::unlinkat(&self.folder, &self.name, AtFlags::empty());
        }
    }

    /// Removes a socket without a listener. Changes the working directory.
    pub fn remove_dead(path: &Path) {
        let Ok((folder, name)) = open_folder_of(path) else {
            return;
        };
        let _lock = lock(&folder);
        let there = rustix::fs::statat(&folder, name, AtFlags::SYMLINK_NOFOLLOW);
        if let (Ok(there), Ok(address)) = (there, SocketAddrUnix::new(name))
            && rustix::process::fchdir(&folder).is_ok()
            && is_dead(&there, &address)
        {
            let _ = rustix::fs::unlinkat(&folder, name, AtFlags::empty());
        }
    }
}

fn stream() -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

/// Whether it is a socket without a listener. The working directory is its folder.
fn is_dead(there: &Stat, address: &SocketAddrUnix) -> bool {
    FileType::from_raw_mode(there.st_mode).is_socket()
        && stream()
            .is_ok_and(|socket| rustix::net::connect(&socket, address) == Err(Errno::CONNREFUSED))
}

/// Locks the folder against other jailers that make or remove sockets there. Goes on without the lock
/// after a while: any process that can open the folder can hold it.
fn lock(folder: &OwnedFd) -> Option<OwnedFd> {
    let own = rustix::fs::openat(
        folder,
        ".",
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    );
    sys::lock_soon(own.ok()?, FlockOperation::NonBlockingLockExclusive)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// All in one: these change the working directory, which tests of one process share.
    #[test]
    fn sockets_give_way_only_when_dead_and_are_removed_only_when_ours() {
        let folder = crate::testing::Folder::new("names");
        let path = folder.path().join("s");

        let (named, socket) = NamedSocket::bind(&path).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(std::os::unix::net::UnixStream::connect(&path).is_ok());
        let text = NamedSocket::bind(&path).unwrap_err().to_string();
        assert!(text.contains("there already"), "{text}");
        NamedSocket::remove_dead(&path);
        assert!(path.exists());

        drop(socket);
        let (second, _socket) = NamedSocket::bind(&path).unwrap();
        named.remove();
        assert!(path.exists(), "it is the second one's");
        second.remove();
        assert!(!path.exists());

        std::fs::write(&path, "precious").unwrap();
        assert!(NamedSocket::bind(&path).is_err());
        NamedSocket::remove_dead(&path);
        assert!(path.exists());

        let link = folder.path().join("link");
        std::os::unix::fs::symlink(folder.path(), &link).unwrap();
        let (through_link, _socket) = NamedSocket::bind(&link.join("x")).unwrap();
        assert!(folder.path().join("x").exists());
        std::fs::remove_file(&link).unwrap();
        through_link.remove();
        assert!(!folder.path().join("x").exists());
    }
}
