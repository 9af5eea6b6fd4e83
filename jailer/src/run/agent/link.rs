//! The supervisor's end of the frames: a socket whose other end is a network interface of the guest. Each
//! packet is a frame of Ethernet with virtio's header in front, as of a tap.
//!
//! Nothing here waits, and nothing is held but one frame that goes out and one that came in. The socket
//! loses no packet: one that is full lets the guest's interface wait.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use mayfly_agent_protocol::{
    AGENT_MAC, ETHER_TYPE, ETHERNET, FRAME_MAX, Frame, Malformed, Message, SUPERVISOR_MAC, frame,
    messages,
};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

/// Length of `struct virtio_net_hdr` (virtio 1.2, 5.1.6), in front of each frame.
const VIRTIO: usize = 12;
/// In front of a frame of the protocol.
const FRONT: usize = VIRTIO + ETHERNET;
/// Most packets that are taken in one turn: a guest that sends without end does not keep the supervisor
/// from all else.
const TURN: usize = 16;

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
            is_closed: false,
        };
        Ok((link, theirs))
    }

    /// Whether bytes of a stream may be added to what is to be sent. Small messages always find room.
    pub fn takes_data(&self) -> bool {
        self.out.is_empty() && !self.is_closed
    }

    /// Whether the frame at hand waits for room in the socket.
    pub fn is_blocked(&self) -> bool {
        self.is_blocked
    }

    /// Whether something can still come.
    pub fn is_open(&self) -> bool {
        !self.is_closed
    }

    /// Sends what is to be sent, as far as it goes now.
    pub fn flush(&mut self) {
        if self.out.is_empty() || self.is_closed {
            return;
        }
        let mut front = [0; FRONT];
        let (_, ethernet) = front.split_at_mut(VIRTIO);
        ethernet[..6].copy_from_slice(&AGENT_MAC);
        ethernet[6..12].copy_from_slice(&SUPERVISOR_MAC);
        ethernet[12..].copy_from_slice(&ETHER_TYPE.to_be_bytes());
        let bytes = self.out.finish(self.next_sent);
        let parts = [std::io::IoSlice::new(&front), std::io::IoSlice::new(bytes)];
        match rustix::io::writev(&self.socket, &parts) {
            Err(Errno::AGAIN | Errno::INTR | Errno::NOBUFS) => self.is_blocked = true,
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
        self.out.clear();
    }

    /// Takes what has come, a bounded part of it, and gives each message to `serve` with what is to be sent.
    pub fn receive<E: From<Malformed>>(
        &mut self,
        mut serve: impl FnMut(&mut Frame, &Message<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        for _ in 0..TURN {
            let count = match rustix::io::read(&self.socket, &mut *self.received) {
                Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
                Ok(0) | Err(_) => {
                    self.close();
                    return Ok(());
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
        Ok(())
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Frames over a stream, between the supervisor and `mayfly-jailer exec`: the same, one behind the other.
#[derive(Debug)]
pub struct StreamLink {
    socket: OwnedFd,
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
    next_sent: u32,
    next_received: u32,
    /// The other side is gone, or nothing can be read of it.
    pub is_closed: bool,
}

/// Most bytes that are held for the other side: the windows of both outputs, and small messages.
const OUTGOING_MAX: usize = 2 * mayfly_agent_protocol::OUTPUT_WINDOW as usize + 2 * FRAME_MAX;

impl StreamLink {
    /// On a socket that does not wait.
    pub fn new(socket: OwnedFd) -> StreamLink {
        StreamLink {
            socket,
            incoming: Vec::new(),
            outgoing: Vec::new(),
            next_sent: 0,
            next_received: 0,
            is_closed: false,
        }
    }

    /// Whether bytes of a stream may be added to what is to be sent.
    pub fn takes_data(&self) -> bool {
        self.outgoing.is_empty() && !self.is_closed
    }

    /// Whether there is something to be sent.
    pub fn is_holding(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// Sends the messages of `frame`, which is empty then.
    pub fn send(&mut self, frame: &mut Frame) {
        if frame.is_empty() || self.is_closed {
            frame.clear();
            return;
        }
        self.outgoing
            .extend_from_slice(frame.finish(self.next_sent));
        self.next_sent = self.next_sent.wrapping_add(1);
        frame.clear();
        self.flush();
        // The credit that was given is less.
        self.is_closed |= self.outgoing.len() > OUTGOING_MAX;
    }

    /// Sends what is held, as far as it goes now.
    pub fn flush(&mut self) {
        if self.outgoing.is_empty() || self.is_closed {
            return;
        }
        match rustix::io::write(&self.socket, &self.outgoing) {
            Ok(count) => drop(self.outgoing.drain(..count)),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => self.is_closed = true,
        }
    }

    /// Takes what has come, at most one more frame's worth.
    pub fn fill(&mut self) {
        if self.incoming.len() >= FRAME_MAX || self.is_closed {
            return;
        }
        let mut piece = [0; 16 * 1024];
        match rustix::io::read(&self.socket, &mut piece) {
            Ok(0) => self.is_closed = true,
            Ok(count) => self.incoming.extend_from_slice(&piece[..count]),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => self.is_closed = true,
        }
    }

    /// Whether a whole frame has come.
    pub fn has_frame(&self) -> bool {
        frame::length(&self.incoming).is_some_and(|length| length <= self.incoming.len())
    }

    /// Whether more is to be read.
    pub fn is_wanting(&self) -> bool {
        !self.is_closed && !self.has_frame()
    }

    /// Gives the messages of the frame that has come to `serve`.
    pub fn take<E: From<Malformed>>(
        &mut self,
        mut serve: impl FnMut(&Message<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let length = frame::length(&self.incoming).unwrap_or(0);
        if length == 0 || length > self.incoming.len() {
            return Ok(());
        }
        let bytes: Vec<u8> = self.incoming.drain(..length).collect();
        let expected = self.next_received;
        self.next_received = expected.wrapping_add(1);
        for message in messages(&bytes, expected)? {
            serve(&message?)?;
        }
        Ok(())
    }
}

impl AsFd for StreamLink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
