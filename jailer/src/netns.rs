//! The network namespace a microVM lives in: named by the caller as a file, joined before the jail
//! is entered.
//!
//! Such files are reached through links by custom (`/var/run` is one, `/proc/PID/ns/net` is
//! another). What is joined is the opened file, after a look at what it is.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::netdevice::name_to_index;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

use crate::error::{Advice as _, AnyError, Failure, Step as _};
use crate::sys;

/// `NSFS_MAGIC` of linux/magic.h.
const NAMESPACE_FILE_SYSTEM: u64 = 0x6e73_6673;

/// It is something else.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot use {0} (--netns): not a network namespace; name a file such as /run/netns/NAME or \
     /proc/PID/ns/net (a file left in /run/netns whose namespace is gone is an empty one)"
)]
pub struct OfAnotherKind(PathBuf);

/// Whether the network namespace of this thread has an interface `name`. /sys/class/net would tell of the namespace that
/// /sys was mounted in.
pub fn has_interface(name: &str) -> bool {
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    );
    socket.is_ok_and(|socket| name_to_index(&socket, name).is_ok())
}

/// An opened network namespace.
#[derive(Debug)]
pub struct NetNs {
    file: OwnedFd,
    path: PathBuf,
}

impl NetNs {
    /// Opens `path` and makes sure that it is a network namespace. Changes nothing.
    pub fn open(path: &Path) -> Result<NetNs, AnyError> {
        // NONBLOCK and NOCTTY: whatever else the path names must neither hold us up nor become
        // our terminal.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let path = path.to_owned();
        let (system, file) = rustix::fs::open(&path, flags, Mode::empty())
            .and_then(|file| Ok((rustix::fs::fstatfs(&file)?.f_type, file)))
            .step(format!(
                "open the network namespace {} (--netns)",
                path.display()
            ))
            .hint(
                Errno::NOENT,
                "make one with `ip netns add NAME`; its file is /run/netns/NAME",
            )?;
        let is_network = u64::try_from(system) == Ok(NAMESPACE_FILE_SYSTEM)
            && sys::namespace_kind(file.as_fd()) == Ok(UnshareFlags::NEWNET);
        match is_network {
            true => Ok(NetNs { file, path }),
            false => Err(OfAnotherKind(path).into()),
        }
    }

    /// Waits until no other process holds the namespace so, and then holds it until this is dropped.
    pub fn hold(&self, patience: Duration) -> Result<(), Failure> {
        let until = Instant::now() + patience;
        loop {
            match rustix::fs::flock(&self.file, FlockOperation::NonBlockingLockExclusive) {
                Err(Errno::INTR) => {}
                Err(Errno::WOULDBLOCK) if Instant::now() < until => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                other => {
                    return other
                        .step_on("hold the network namespace", &self.path)
                        .hint(
                            Errno::WOULDBLOCK,
                            "a microVM that has taken its network over has not given it back",
                        );
                }
            }
        }
    }

    /// Moves this process into the namespace.
    pub fn join(&self) -> Result<(), Failure> {
        let network = Some(LinkNameSpaceType::Network);
        rustix::thread::move_into_link_name_space(self.file.as_fd(), network)
            .step_on("join the network namespace", &self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::message;

    #[test]
    fn open_when_the_file_is_missing_names_it() {
        let text = message(&*NetNs::open(Path::new("/nonexistent/ns")).unwrap_err());
        assert!(text.contains("/nonexistent/ns"), "{text}");
        assert!(text.contains("ip netns add"), "{text}");
    }

    #[test]
    fn open_when_it_is_something_else_refuses() {
        for path in ["/dev/null", "/", "/proc/self/ns/uts"] {
            let error = NetNs::open(Path::new(path)).unwrap_err();
            assert!(error.is::<OfAnotherKind>(), "{error}");
        }
    }

    #[test]
    fn open_of_our_own_namespace_succeeds() {
        assert!(NetNs::open(Path::new("/proc/self/ns/net")).is_ok());
    }

    #[test]
    fn namespace_is_held_by_one_at_a_time() {
        // That of another thread, which no other test holds.
        let (tell, number) = std::sync::mpsc::channel();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let other = std::thread::spawn(move || {
            tell.send(rustix::thread::gettid()).unwrap();
            let _ = ended.recv();
        });
        let thread = number.recv().unwrap();
        let path = format!("/proc/self/task/{}/ns/net", thread.as_raw_nonzero());
        let open = || NetNs::open(Path::new(&path)).unwrap();
        let (first, second) = (open(), open());
        first.hold(Duration::from_secs(60)).unwrap();
        let error = second.hold(Duration::ZERO).unwrap_err();
        assert_eq!(error.errno(), Some(Errno::WOULDBLOCK));
        drop(first);
        second.hold(Duration::ZERO).unwrap();
        drop(end);
        other.join().unwrap();
    }
}
