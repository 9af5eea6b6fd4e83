//! The network namespace a microVM lives in: given by the caller as a file, joined before the jail
//! is entered.
//!
//! Such files are reached through links by custom (`/var/run` is one, `/proc/PID/ns/net` is
//! another), so this is the one path of the jailer that may contain links. What is then joined is
//! the opened file, after a look at what it is.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

use crate::failure::{Doing, Failure};
use crate::sys;

/// `NSFS_MAGIC` of linux/magic.h.
const NAMESPACE_FILE_SYSTEM: u64 = 0x6e73_6673;

/// An opened network namespace.
#[derive(Debug)]
pub struct NetNs {
    file: OwnedFd,
    path: PathBuf,
}

impl NetNs {
    /// Opens `path` and makes sure that it is a network namespace. Changes nothing.
    pub fn open(path: &Path) -> Result<NetNs, Failure> {
        let what = || format!("open the network namespace {}", path.display());
        // NONBLOCK and NOCTTY: whatever else the path names must neither hold us up nor become
        // our terminal.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = rustix::fs::open(path, flags, Mode::empty()).map_err(|error| {
            let failure = Failure::new(what(), error);
            match error {
                Errno::NOENT => {
                    failure.remedy("make one with `ip netns add NAME`; its file is /run/netns/NAME")
                }
                _ => failure,
            }
        })?;
        let system = rustix::fs::fstatfs(&file).doing(what())?;
        let is_network = u64::try_from(system.f_type) == Ok(NAMESPACE_FILE_SYSTEM)
            && sys::namespace_kind(file.as_fd()) == Ok(UnshareFlags::NEWNET);
        if !is_network {
            return Err(
                Failure::new(what(), "it is not a network namespace").remedy(
                    "name a file such as /run/netns/NAME or /proc/PID/ns/net \
                 (a file left in /run/netns whose namespace is gone is an empty one)",
                ),
            );
        }
        Ok(NetNs {
            file,
            path: path.to_owned(),
        })
    }

    /// Moves this process into the namespace.
    pub fn join(&self) -> Result<(), Failure> {
        rustix::thread::move_into_link_name_space(
            self.file.as_fd(),
            Some(LinkNameSpaceType::Network),
        )
        .doing(format_args!(
            "join the network namespace {}",
            self.path.display()
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn open_when_the_file_is_missing_names_it() {
        let failure = NetNs::open(Path::new("/nonexistent/ns")).unwrap_err();
        let text = failure.to_string();
        assert!(text.contains("/nonexistent/ns"), "{text}");
        assert!(text.contains("ip netns add"), "{text}");
    }

    #[test]
    fn open_when_it_is_something_else_refuses() {
        for path in ["/dev/null", "/", "/proc/self/ns/uts"] {
            let text = NetNs::open(Path::new(path)).unwrap_err().to_string();
            assert!(text.contains("not a network namespace"), "{path}: {text}");
        }
    }

    #[test]
    fn open_of_our_own_namespace_succeeds() {
        assert!(NetNs::open(Path::new("/proc/self/ns/net")).is_ok());
    }
}
