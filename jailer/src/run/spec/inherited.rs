//! Descriptors that were passed to this program at its start: taps and files that the machine names
//! by number, the one of `--end-with-fd`, and a listening API socket from a service manager
//! (`LISTEN_FDS`, sd_listen_fds(3)). All others are closed before anything is opened.

use std::os::fd::{OwnedFd, RawFd};
use std::path::Path;

use mayfly::wire::{listener, take_over};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::SpecError;
use crate::error::{Advice as _, AnyError, Step as _};
use crate::sys::Inherited;

/// The first descriptor that a service manager passes.
const FIRST: RawFd = 3;

/// The number in a path that names a descriptor of this process.
pub fn number_in(path: impl AsRef<Path>) -> Option<RawFd> {
    let path = path.as_ref().to_str()?;
    let number = path.strip_prefix("/dev/fd/");
    let number = number.or_else(|| path.strip_prefix("/proc/self/fd/"))?;
    number.parse().ok().filter(|number| *number >= FIRST)
}

/// What was passed and not yet taken.
#[derive(Debug)]
pub struct Passed {
    listener: Option<RawFd>,
}

impl Passed {
    /// No descriptor was passed.
    #[cfg(test)]
    pub fn nothing() -> Passed {
        Passed { listener: None }
    }

    /// Keeps those of the numbers in `wanted` and the API socket, and closes all others but the
    /// console.
    pub fn keep(inherited: Inherited, mut wanted: Vec<RawFd>) -> Result<Passed, AnyError> {
        let number = |name| std::env::var(name).ok()?.parse::<u32>().ok();
        let for_us = number("LISTEN_PID") == Some(std::process::id());
        let listener = match number("LISTEN_FDS").filter(|_| for_us) {
            None | Some(0) => None,
            Some(1) => Some(FIRST),
            Some(count) => return Err(SpecError::ListenFds(count).into()),
        };
        wanted.extend(listener);
        inherited
            .keep(&wanted)
            .step("close inherited descriptors")
            .advise("use Linux 5.9 or newer")?;
        Ok(Passed { listener })
    }

    /// Takes descriptor `number`, once.
    pub fn take(&mut self, number: u32) -> Result<OwnedFd, AnyError> {
        let known = RawFd::try_from(number).ok();
        let known = known.filter(|it| Some(*it) != self.listener);
        match known.map(take_over) {
            Some(Ok(taken)) => Ok(taken),
            Some(Err(Some(cause))) => {
                Ok(Err(cause).step(format!("use descriptor {number}")).hint(
                    Errno::BADF,
                    "it has to be open when mayfly-jailer is started",
                )?)
            }
            // It is this program's own.
            _ => Err(SpecError::NotPassed(number).into()),
        }
    }

    /// Takes the API socket that was passed, and makes a connection to it.
    pub fn take_listener(&mut self) -> Result<Option<(OwnedFd, OwnedFd)>, AnyError> {
        let Some(number) = self.listener.take() else {
            return Ok(None);
        };
        let listener = listener(self.take(number.unsigned_abs())?);
        let listener = listener.map_err(|what| SpecError::NotAListener(number, what))?;
        let socket = || {
            let address = rustix::net::getsockname(&listener)?;
            let (family, flags) = (AddressFamily::UNIX, SocketFlags::CLOEXEC);
            let client = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
            rustix::net::connect(&client, &address)?;
            Ok::<_, Errno>(client)
        };
        let client = socket()
            .step(format!(
                "connect to the socket that was passed as descriptor {number} (LISTEN_FDS)"
            ))
            .advise("its path must be in reach of this program")?;
        Ok(Some((listener.into(), client)))
    }
}
