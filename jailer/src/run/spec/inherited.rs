//! Descriptors that were passed to this program at its start: taps and files that the machine names
//! by number, the one of `--end-with-fd`, and a listening API socket from a service manager
//! (`LISTEN_FDS`, sd_listen_fds(3)). All others are closed before anything is opened.

use std::os::fd::{AsFd, OwnedFd, RawFd};

use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::SpecError;
use crate::sys::{Inherited, PassedNumbers};

/// The first descriptor that a service manager passes.
const FIRST: RawFd = 3;

/// What was passed and not yet taken.
#[derive(Debug)]
pub struct Passed {
    listener: Option<RawFd>,
    rest: PassedNumbers,
}

impl Passed {
    /// Keeps those of the numbers in `wanted` and the API socket, and closes all others but the
    /// console.
    pub fn keep(inherited: Inherited, mut wanted: Vec<RawFd>) -> Result<Passed, SpecError> {
        let number = |name| std::env::var(name).ok()?.parse::<u32>().ok();
        let for_us = number("LISTEN_PID") == Some(std::process::id());
        let listener = match number("LISTEN_FDS").filter(|_| for_us) {
            None | Some(0) => None,
            Some(1) => Some(FIRST),
            Some(count) => return Err(SpecError::ListenFds(count)),
        };
        wanted.extend(listener);
        let rest = inherited.keep(wanted).map_err(SpecError::CloseOthers)?;
        Ok(Passed { listener, rest })
    }

    /// Takes descriptor `number`, once.
    pub fn take(&mut self, number: u32) -> Result<OwnedFd, SpecError> {
        let known = RawFd::try_from(number)
            .ok()
            .filter(|it| Some(*it) != self.listener);
        match known.and_then(|number| self.rest.take(number)) {
            Some(taken) => taken.map_err(|error| SpecError::Descriptor(number, error)),
            None => Err(SpecError::DescriptorTwice(number)),
        }
    }

    /// Takes the API socket that was passed, and makes a connection to it.
    pub fn take_listener(&mut self) -> Result<Option<(OwnedFd, OwnedFd)>, SpecError> {
        let Some(number) = self.listener.take() else {
            return Ok(None);
        };
        let listener = self.take(number.unsigned_abs())?;
        let is_stream = rustix::net::sockopt::socket_type(&listener) == Ok(SocketType::STREAM);
        let is_listening = rustix::net::sockopt::socket_acceptconn(&listener) == Ok(true);
        let address = rustix::net::getsockname(listener.as_fd());
        let address = address
            .ok()
            .filter(|it| it.address_family() == AddressFamily::UNIX);
        let Some(address) = address.filter(|_| is_stream && is_listening) else {
            return Err(SpecError::NotAListener(number));
        };
        let flags = SocketFlags::CLOEXEC;
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
            .and_then(|client| rustix::net::connect(&client, &address).map(|()| client))
            .map(|client| Some((listener, client)))
            .map_err(|error| SpecError::Connect(number, error))
    }
}
