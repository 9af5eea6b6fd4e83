//! The host's end of a guest's network interface: a tap, or one end of a connected pair of Unix sockets.
//!
//! A socket of the type SOCK_SEQPACKET keeps the borders of packets as a tap does: each packet is the
//! virtio-net header of [`HEADER`](super::tap::HEADER) bytes and one frame. What is different:
//!
//! - It is for one process at the other end, with no network of the host's behind it: no offloads, no ioctls,
//!   no announcements, and frames of up to [`SOCKET_MTU`] bytes of payload.
//! - It loses nothing: a frame that it has no room for stays with the guest until there is room
//!   ([`Link::room`]), and one that the guest has no buffers for stays in the socket, where it holds up
//!   the other end.
//! - It ends: when the other end is closed, shut down or sends an empty packet, which reads the same.
//!
//! The process at the other end is trusted as far as a network is: its bytes are not.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::net::{AddressFamily, SocketType, sockopt};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::tap::{self, Offloads, Tap};
use super::{fd, socket};

/// What a guest is told that a frame on a socket may hold: as much as the field has room for.
pub const SOCKET_MTU: u16 = u16::MAX;

/// The host's end of a network interface.
#[derive(Debug)]
pub enum Link {
    /// A tap.
    Tap(Tap),
    /// A socket.
    Packets(PacketSocket),
}

/// A connected Unix socket that carries packets.
#[derive(Debug)]
pub struct PacketSocket {
    fd: OwnedFd,
}

impl PacketSocket {
    /// Takes over `fd`, which does not block from then on.
    ///
    /// # Errors
    /// What it is instead, to be put after "is".
    pub fn from_fd(fd: OwnedFd) -> Result<Self, &'static str> {
        PacketSocket::check(&fd)?;
        match fd::set_nonblocking(&fd) {
            Ok(()) => Ok(PacketSocket { fd }),
            Err(_) => Err("a socket that cannot be used without waiting"),
        }
    }

    /// Whether `fd` can be taken over.
    ///
    /// # Errors
    /// What it is instead, to be put after "is".
    pub fn check(fd: impl AsFd) -> Result<(), &'static str> {
        match sockopt::socket_domain(&fd) {
            Err(_) => return Err("not a socket"),
            Ok(AddressFamily::UNIX) => {}
            Ok(_) => return Err("not a Unix socket"),
        }
        if sockopt::socket_type(&fd) != Ok(SocketType::SEQPACKET) {
            return Err("a Unix socket of another type than SOCK_SEQPACKET");
        }
        // A socket that listens has the credentials of what made it.
        let listens = sockopt::socket_acceptconn(&fd) != Ok(false);
        match listens || !socket::is_connected(&fd) {
            true => Err("a socket that is not connected"),
            false => Ok(()),
        }
    }
}

impl Link {
    /// The same by another descriptor.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Link::Tap(tap) => Link::Tap(tap.try_clone()?),
            Link::Packets(PacketSocket { fd }) => Link::Packets(PacketSocket {
                fd: fd.try_clone()?,
            }),
        })
    }

    /// The name the host knows it by, if it has one.
    pub fn name(&self) -> Option<&str> {
        match self {
            Link::Tap(tap) => Some(tap.name()),
            Link::Packets(_) => None,
        }
    }

    /// The tap, if it is one.
    pub fn tap(&self) -> Option<&Tap> {
        match self {
            Link::Tap(tap) => Some(tap),
            Link::Packets(_) => None,
        }
    }

    /// Whether it is a socket.
    pub fn is_socket(&self) -> bool {
        matches!(self, Link::Packets(_))
    }

    /// [`Tap::takes_uso`].
    pub fn takes_uso(&self) -> bool {
        match self {
            Link::Tap(tap) => tap.takes_uso(),
            Link::Packets(_) => false,
        }
    }

    /// [`Tap::set_offloads`]; a socket has none, and a guest is offered none.
    ///
    /// # Errors
    /// When the tap has vanished.
    pub fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        match self {
            Link::Tap(tap) => tap.set_offloads(offloads),
            Link::Packets(_) => Ok(()),
        }
    }

    /// What becomes readable each time that a socket has room again; none of a tap, which drops what it has
    /// no room for.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn room(&self) -> io::Result<Option<Epoll>> {
        let Link::Packets(PacketSocket { fd }) = self else {
            return Ok(None);
        };
        let room = Epoll::new()?;
        let interest = EpollEvent::new(EventSet::OUT | EventSet::EDGE_TRIGGERED, 0);
        room.ctl(ControlOperation::Add, fd.as_raw_fd(), interest)?;
        Ok(Some(room))
    }

    /// Whether reading failed with `error` because there is nothing at the other end any more.
    pub fn is_gone(&self, error: &io::Error) -> bool {
        match self {
            Link::Tap(_) => tap::is_gone(error),
            // The end itself is read as an empty packet; that it was reset is told before what is left.
            Link::Packets(_) => !matches!(
                error.raw_os_error(),
                Some(libc::EAGAIN | libc::EINTR | libc::ECONNRESET | libc::ENOMEM | libc::ENOBUFS)
            ),
        }
    }
}

impl From<Tap> for Link {
    fn from(tap: Tap) -> Self {
        Link::Tap(tap)
    }
}

impl From<PacketSocket> for Link {
    fn from(socket: PacketSocket) -> Self {
        Link::Packets(socket)
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Link::Tap(tap) => tap.as_fd(),
            Link::Packets(PacketSocket { fd }) => fd.as_fd(),
        }
    }
}

impl AsRawFd for Link {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::testing::own_name;
    use rustix::net::{SocketAddrUnix, SocketFlags, bind, listen, socket_with, socketpair};
    use std::fs::File;
    use std::os::unix::net::UnixStream;

    fn listening() -> OwnedFd {
        let kind = SocketType::SEQPACKET;
        let fd = socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap();
        let name = SocketAddrUnix::new_abstract_name(own_name("link").as_bytes()).unwrap();
        bind(&fd, &name).unwrap();
        listen(&fd, 1).unwrap();
        fd
    }

    fn pair() -> (OwnedFd, OwnedFd) {
        let kind = SocketType::SEQPACKET;
        socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap()
    }

    #[test]
    fn descriptor_when_it_is_no_connected_packet_socket_is_told_what_it_is() {
        let (stream, _other) = UnixStream::pair().unwrap();
        let datagrams = socketpair(
            AddressFamily::UNIX,
            SocketType::DGRAM,
            SocketFlags::CLOEXEC,
            None,
        );
        let alone = |family, kind| socket_with(family, kind, SocketFlags::CLOEXEC, None).unwrap();
        for (fd, expected) in [
            (
                OwnedFd::from(File::open("/dev/null").unwrap()),
                "not a socket",
            ),
            (stream.into(), "of another type"),
            (datagrams.unwrap().0, "of another type"),
            (
                alone(AddressFamily::UNIX, SocketType::SEQPACKET),
                "not connected",
            ),
            (listening(), "not connected"),
            (
                alone(AddressFamily::INET, SocketType::STREAM),
                "not a Unix socket",
            ),
        ] {
            let error = PacketSocket::from_fd(fd).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
        let link = Link::from(PacketSocket::from_fd(pair().0).unwrap());
        assert!(link.is_socket() && !link.takes_uso() && link.name().is_none());
        link.set_offloads(Offloads::default()).unwrap();
        link.try_clone().unwrap();
    }

    /// Whether `room` has become readable since it was asked last.
    fn has_edge(room: &Epoll) -> bool {
        let outer = Epoll::new().unwrap();
        let interest = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0);
        outer
            .ctl(ControlOperation::Add, room.as_raw_fd(), interest)
            .unwrap();
        let mut events = [EpollEvent::default()];
        outer.wait(0, &mut events).unwrap() == 1
    }

    #[test]
    fn room_when_the_socket_was_full_and_is_read_from_becomes_readable() {
        let (near, far) = pair();
        let link = Link::from(PacketSocket::from_fd(near).unwrap());
        let room = link.room().unwrap().unwrap();
        let frame = [0; 60_000];
        let mut sent = 0;
        while rustix::io::write(&link, &frame).is_ok() {
            sent += 1;
        }
        assert!(sent > 0 && !has_edge(&room));
        for _ in 0..sent {
            rustix::io::read(&far, &mut [0; 65_536]).unwrap();
        }
        assert!(has_edge(&room));
        assert!(rustix::io::write(&link, &frame).is_ok());
    }
}
