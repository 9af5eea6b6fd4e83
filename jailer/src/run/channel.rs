//! Short messages, with descriptors, between the processes of one run: the supervisor, the one that
//! becomes the monitor, and the keeper. A channel ends for its reader when every writer is gone.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use mayfly::wire::limits::DESCRIPTORS_MAX;
use mayfly::wire::send_with_descriptors;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType,
};

use crate::error::errno;

/// Longest message in bytes; a longer text is cut there.
const LONGEST: usize = 4096;
/// One end.
#[derive(Debug)]
pub struct Channel(OwnedFd);

/// A message.
#[derive(Debug, Default)]
pub struct Message {
    /// Its first byte says what it is.
    pub kind: u8,
    /// The rest of it.
    pub text: String,
    /// The descriptors that came with it.
    pub files: Vec<OwnedFd>,
}

impl Channel {
    /// Both ends.
    pub fn pair() -> Result<(Channel, Channel), Errno> {
        let (one, other) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        Ok((Channel(one), Channel(other)))
    }

    /// Sends a message. The other end being gone is not an error: what matters then is the end of
    /// the process there, which is watched elsewhere.
    pub fn send(&self, kind: u8, text: &str, files: &[BorrowedFd<'_>]) -> Result<(), Errno> {
        let mut bytes = vec![kind];
        bytes.extend_from_slice(&text.as_bytes()[..text.len().min(LONGEST - 1)]);
        match send_with_descriptors(&self.0, &bytes, files).map_err(errno) {
            Ok(_) | Err(Errno::PIPE | Errno::CONNRESET) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// The next message; none when the other end is gone. Waits.
    pub fn receive(&self) -> Result<Option<Message>, Errno> {
        let mut bytes = [0; LONGEST];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            let mut into = [IoSliceMut::new(&mut bytes)];
            match rustix::net::recvmsg(&self.0, &mut into, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Err(Errno::INTR) => {}
                Err(Errno::CONNRESET) => return Ok(None),
                other => break other?.bytes,
            }
        };
        let mut files = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                files.extend(rights);
            }
        }
        Ok(bytes[..received]
            .split_first()
            .map(|(&kind, text)| Message {
                kind,
                text: String::from_utf8_lossy(text).into_owned(),
                files,
            }))
    }
}

impl From<OwnedFd> for Channel {
    fn from(end: OwnedFd) -> Self {
        Channel(end)
    }
}

impl From<Channel> for OwnedFd {
    fn from(channel: Channel) -> Self {
        channel.0
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_carry_text_and_descriptors_and_end() {
        let (one, other) = Channel::pair().unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        one.send(b'x', "text", &[file.as_fd(), file.as_fd()])
            .unwrap();
        one.send(b'y', &"z".repeat(9000), &[]).unwrap();
        drop(one);
        let message = other.receive().unwrap().unwrap();
        assert_eq!(
            (message.kind, &*message.text, message.files.len()),
            (b'x', "text", 2)
        );
        let message = other.receive().unwrap().unwrap();
        assert_eq!((message.kind, message.text.len()), (b'y', LONGEST - 1));
        assert!(other.receive().unwrap().is_none());
        other.send(b'x', "lost", &[]).unwrap();
    }
}
