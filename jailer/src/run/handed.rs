//! Descriptors that this program was started with: taps and files that the machine names by number,
//! and a listening API socket from a service manager (`LISTEN_FDS`, sd_listen_fds(3)). All others
//! are closed before anything is opened.

use std::os::fd::{AsFd, OwnedFd, RawFd};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use crate::failure::{Doing, Failure};
use crate::sys::{HandedIn, Inherited};

/// The first descriptor that a service manager hands in.
const FIRST: RawFd = 3;

/// What was handed in and not yet taken.
#[derive(Debug)]
pub struct Handed {
    listener: Option<RawFd>,
    rest: HandedIn,
}

impl Handed {
    /// Looks at what a service manager says; opens and closes nothing.
    pub fn look() -> Result<Handed, Failure> {
        let number = |name| std::env::var(name).ok()?.parse::<u32>().ok();
        let for_us = number("LISTEN_PID") == Some(std::process::id());
        let listener = match number("LISTEN_FDS").filter(|_| for_us) {
            None | Some(0) => None,
            Some(1) => Some(FIRST),
            Some(count) => {
                return Err(Failure::new(
                    "use the sockets handed in (LISTEN_FDS)",
                    format_args!("there are {count}, and one is the API's"),
                ));
            }
        };
        Ok(Handed {
            listener,
            rest: HandedIn::default(),
        })
    }

    /// The number of the API socket that was handed in.
    pub fn listener(&self) -> Option<RawFd> {
        self.listener
    }

    /// Closes everything but `wanted`, the console and the API socket.
    pub fn close_others(
        &mut self,
        inherited: Inherited,
        mut wanted: Vec<RawFd>,
    ) -> Result<(), Failure> {
        wanted.extend(self.listener);
        self.rest = inherited
            .keep(wanted)
            .doing_or("close inherited descriptors", |_| "use Linux 5.9 or newer")?;
        Ok(())
    }

    /// Takes descriptor `number`, once.
    pub fn take(&mut self, number: RawFd) -> Result<OwnedFd, Failure> {
        let what = format!("use descriptor {number}");
        let taken = match self.listener {
            Some(listener) if listener == number => None,
            _ => self.rest.take(number),
        };
        match taken {
            Some(Ok(fd)) => Ok(fd),
            Some(Err(error @ Errno::BADF)) => {
                Err(Failure::new(what, error)
                    .remedy("it has to be open when mayfly-jailer is started"))
            }
            Some(Err(error)) => Err(Failure::new(what, error)),
            None => Err(Failure::new(what, "it is named twice")),
        }
    }

    /// Takes the API socket that was handed in, and a connection to it.
    pub fn take_listener(&mut self) -> Result<Option<(OwnedFd, OwnedFd)>, Failure> {
        let Some(number) = self.listener.take() else {
            return Ok(None);
        };
        let what = format!("use the socket handed in as descriptor {number} (LISTEN_FDS)");
        let listener = self.take(number)?;
        let is_stream = rustix::net::sockopt::socket_type(&listener) == Ok(SocketType::STREAM);
        let is_listening = rustix::net::sockopt::socket_acceptconn(&listener) == Ok(true);
        let address = rustix::net::getsockname(listener.as_fd());
        let is_unix = address
            .as_ref()
            .is_ok_and(|it| it.address_family() == AddressFamily::UNIX);
        if !(is_stream && is_listening && is_unix) {
            return Err(
                Failure::new(what, "it is not a listening Unix stream socket")
                    .remedy("see ListenStream= in systemd.socket(5)"),
            );
        }
        let client = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .doing(&what)?;
        let address = address.doing(&what)?;
        rustix::net::connect(&client, &address)
            .doing_or(&what, |_| "its path must be in reach of this program")?;
        Ok(Some((listener, client)))
    }
}
