//! The supervisor's end of the frames: a socket whose other end is a network interface of the guest. Each
//! packet is a frame of Ethernet with virtio's header in front, as of a tap.
//!
//! Nothing here waits, and nothing is held but one frame that goes out and one that came in. The socket
//! loses no packet: one that is full lets the guest's interface wait.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use mayfly_agent_protocol::{
    AGENT_MAC, ETHER_TYPE, ETHERNET, FRAME_MAX, Frame, Malformed, Message, SUPERVISOR_MAC, messages,
};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

/// Length of `struct virtio_net_hdr` (virtio 1.2, 5.1.6), in front of each frame.
const VIRTIO: usize = 12;
/// In front of a frame of the protocol.
const FRONT: usize = VIRTIO + ETHERNET;
/// Most packets that are taken in one turn: a guest that sends without end does not keep the supervisor
/// from all else.
pub const TURN: usize = 8;
/// How long to wait where the host has no memory for a packet: a socket does not tell when it has.
const PAUSE: Duration = Duration::from_millis(10);

/// The supervisor's end.
#[derive(Debug)]
pub struct Link {
    socket: OwnedFd,
    /// What is to be sent next.
    pub out: Box<Frame>,
    received: Box<[u8]>,
    /// Numbers of the next frames.
    next_sent: u32,
    next_received: u32,
    is_blocked: bool,
    /// Before that, nothing is tried again.
    paused_until: Option<Instant>,
    /// The monitor has closed its end.
    is_closed: bool,
}

impl Link {
    /// Both ends: the link, and what the monitor is to have for a network interface.
    pub fn pair() -> Result<(Link, OwnedFd), Errno> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (socket, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        let link = Link {
            socket,
            out: Box::new(Frame::new()),
            received: vec![0; FRONT + FRAME_MAX].into_boxed_slice(),
            next_sent: 0,
            next_received: 0,
            is_blocked: false,
            paused_until: None,
            is_closed: false,
        };
        Ok((link, theirs))
    }

    /// The guest has sent one frame already, and was sent none.
    pub fn is_behind_hello(&mut self) {
        self.next_received = 1;
    }

    /// Whether bytes of a stream may be added to what is to be sent. Small messages always find room.
    pub fn takes_data(&self) -> bool {
        self.out.is_empty() && !self.is_closed
    }

    /// Whether the frame at hand waits for room in the socket.
    pub fn is_blocked(&self) -> bool {
        self.is_blocked
    }

    /// When to try again, where the socket does not tell that.
    pub fn paused_until(&self) -> Option<Instant> {
        self.paused_until
    }

    /// Whether something can still come.
    pub fn is_open(&self) -> bool {
        !self.is_closed
    }

    /// Sends what is to be sent, as far as it goes now.
    pub fn flush(&mut self) {
        let is_paused = self.paused_until.is_some_and(|it| Instant::now() < it);
        if self.out.is_empty() || self.is_closed || is_paused {
            return;
        }
        self.paused_until = None;
        let mut front = [0; FRONT];
        let (_, ethernet) = front.split_at_mut(VIRTIO);
        ethernet[..6].copy_from_slice(&AGENT_MAC);
        ethernet[6..12].copy_from_slice(&SUPERVISOR_MAC);
        ethernet[12..].copy_from_slice(&ETHER_TYPE.to_be_bytes());
        let bytes = self.out.finish(self.next_sent);
        let parts = [std::io::IoSlice::new(&front), std::io::IoSlice::new(bytes)];
        match rustix::io::writev(&self.socket, &parts) {
            Err(Errno::AGAIN | Errno::INTR) => self.is_blocked = true,
            Err(Errno::NOBUFS | Errno::NOMEM) => {
                self.is_blocked = false;
                self.paused_until = Some(Instant::now() + PAUSE);
            }
            Ok(_) => {
                self.next_sent = self.next_sent.wrapping_add(1);
                self.out.clear();
                self.is_blocked = false;
            }
            // The monitor is gone, which is heard of elsewhere.
            Err(_) => self.close(),
        }
    }

    fn close(&mut self) {
        self.is_closed = true;
        self.is_blocked = false;
        self.paused_until = None;
        self.out.clear();
    }

    /// Takes what has come, a bounded part of it, and gives each message to `serve` with what is to be sent.
    /// Whether more may have come.
    pub fn receive<E: From<Malformed>>(
        &mut self,
        mut serve: impl FnMut(&mut Frame, &Message<'_>) -> Result<(), E>,
    ) -> Result<bool, E> {
        for _ in 0..TURN {
            let count = match rustix::io::read(&self.socket, &mut *self.received) {
                Err(Errno::AGAIN | Errno::INTR) => return Ok(false),
                Ok(0) | Err(_) => {
                    self.close();
                    return Ok(false);
                }
                Ok(count) => count,
            };
            let packet = self.received.get(VIRTIO..count).unwrap_or_default();
            let Some((ethernet, bytes)) = packet.split_at_checked(ETHERNET) else {
                continue;
            };
            // What the guest's kernel sends of its own accord.
            if ethernet.get(12..) != Some(&ETHER_TYPE.to_be_bytes()) {
                continue;
            }
            let expected = self.next_received;
            self.next_received = expected.wrapping_add(1);
            for message in messages(bytes, expected)? {
                serve(&mut self.out, &message?)?;
            }
        }
        Ok(true)
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
