//! The frames of the protocol over a stream: between the supervisor of a microVM and the programs that reach
//! its guest (`mayfly-jailer exec`, `cp` and the like).
//!
//! Nothing here waits; what is held for a slow reader is bounded by the credit that it gave.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use mayfly_agent_protocol::{FRAME_MAX, Frame, Malformed, Message, frame, messages};
use rustix::io::Errno;

/// Frames over a stream, between the supervisor and `mayfly-jailer exec`: the same, one behind the other.
#[derive(Debug)]
pub struct StreamLink {
    socket: OwnedFd,
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
    next_sent: u32,
    next_received: u32,
    /// The other side takes no more. What it sent before may still be there.
    cannot_send: bool,
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
            cannot_send: false,
            is_closed: false,
        }
    }

    /// Whether bytes of a stream may be added to what is to be sent.
    pub fn takes_data(&self) -> bool {
        self.outgoing.is_empty() && !self.cannot_send && !self.is_closed
    }

    /// Whether the other side takes no more.
    pub fn cannot_send(&self) -> bool {
        self.cannot_send
    }

    /// Whether there is something to be sent.
    pub fn is_holding(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// Sends the messages of `frame`, which is empty then.
    pub fn send(&mut self, frame: &mut Frame) {
        if frame.is_empty() || self.is_closed || self.cannot_send {
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
            Err(_) => {
                self.cannot_send = true;
                self.outgoing.clear();
            }
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
        self.check_length();
    }

    /// A frame that is longer than any never comes whole.
    fn check_length(&mut self) {
        self.is_closed |= frame::length(&self.incoming).is_some_and(|length| length > FRAME_MAX);
    }

    /// Whether a whole frame has come.
    pub fn has_frame(&self) -> bool {
        frame::length(&self.incoming).is_some_and(|length| length <= self.incoming.len())
    }

    /// The kind of the first message of the frame that has come; none of one that is malformed.
    pub fn next_kind(&self) -> Option<u8> {
        let kind = self.incoming.get(frame::HEADER);
        kind.copied().filter(|_| self.has_frame())
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
        self.check_length();
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

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn stream() -> (StreamLink, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (StreamLink::new(ours.into()), theirs)
    }

    fn frame_of(sequence: u32, messages: &[Message<'_>]) -> Vec<u8> {
        let mut frame = Frame::new();
        assert!(messages.iter().all(|message| frame.push(message)));
        frame.finish(sequence).to_vec()
    }

    const SIGNAL: Message<'_> = Message::Signal {
        process: 1,
        number: 2,
    };

    #[test]
    fn frame_longer_than_any_closes_the_connection() {
        let long = [2, 0, 0xff, 0xff, 1, 0, 0, 0];
        // As the first, and behind one that is right.
        for before in [Vec::new(), frame_of(0, &[SIGNAL])] {
            let (mut link, mut theirs) = stream();
            theirs.write_all(&[&before[..], &long].concat()).unwrap();
            link.fill();
            while link.has_frame() {
                link.take(|_| Ok::<_, Malformed>(())).unwrap();
            }
            assert!(link.is_closed && !link.is_wanting());
        }
    }

    #[test]
    fn what_came_before_the_other_side_was_gone_is_still_read() {
        let (mut link, mut theirs) = stream();
        theirs.write_all(&frame_of(0, &[SIGNAL])).unwrap();
        drop(theirs);
        let mut out = Frame::new();
        assert!(out.push(&SIGNAL));
        link.send(&mut out);
        assert!(link.cannot_send() && !link.is_closed && !link.is_holding());
        link.fill();
        let mut count = 0;
        link.take(|_| {
            count += 1;
            Ok::<_, Malformed>(())
        })
        .unwrap();
        assert_eq!(count, 1);
        link.fill();
        assert!(link.is_closed);
    }
}
