//! Unix sockets: one that listens and was passed, and bytes that bring descriptors along.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::{self, MaybeUninit};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, accept_with,
    recv, recvmsg, send, sendmsg, sockopt,
};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::fd::{Interest, wait};
use super::passed::{PASSED_MAX, Passed, PassedError};

/// Takes `fd` for a Unix stream socket that listens.
///
/// # Errors
/// What it is instead, to be put after "is".
pub fn listener(fd: OwnedFd) -> Result<UnixListener, &'static str> {
    match sockopt::socket_domain(&fd) {
        Err(_) => return Err("not a socket"),
        Ok(AddressFamily::UNIX) => {}
        Ok(_) => return Err("not a Unix socket"),
    }
    if sockopt::socket_type(&fd) != Ok(SocketType::STREAM) {
        return Err("not a stream socket");
    }
    if sockopt::socket_acceptconn(&fd) != Ok(true) {
        return Err("a socket that does not listen");
    }
    // Connections are born with what the listener has: nothing is to come with their bytes but
    // descriptors. Kernels that do not know one of these do not do it either.
    for extra in [libc::SO_PASSCRED, libc::SO_PASSSEC, SO_PASSPIDFD] {
        let off: libc::c_int = 0;
        let size = mem::size_of_val(&off) as libc::socklen_t;
        // SAFETY: the kernel reads one int behind the pointer, which is what `off` is.
        unsafe {
            libc::setsockopt(
                fd.as_raw_fd(),
                libc::SOL_SOCKET,
                extra,
                (&raw const off).cast(),
                size,
            )
        };
    }
    Ok(UnixListener::from(fd))
}

/// The process at the other end of `socket`, as a descriptor that can be read from once that process
/// has ended. None where the host does not tell: before Linux 6.5 of one in another PID namespace.
pub fn peer_process(socket: &UnixStream) -> Option<OwnedFd> {
    if let Ok([fd]) = peer_option(socket, SO_PEERPIDFD) {
        // SAFETY: the call succeeded: it has made a descriptor, which nothing else owns.
        return Some(unsafe { OwnedFd::from_raw_fd(fd) });
    }
    // A process, a user and a group; 0 for a process that this one cannot see.
    let [process, _, _] = peer_option(socket, libc::SO_PEERCRED).ok()?;
    pidfd_open(Pid::from_raw(process)?, PidfdFlags::empty()).ok()
}

/// Whether a Unix socket is connected, or was. (The user of one that never was is none.)
pub fn is_connected(socket: impl AsFd) -> bool {
    matches!(peer_option(socket, libc::SO_PEERCRED), Ok([_, user, _]) if user != -1)
}

/// What the host knows of the other end, as numbers.
fn peer_option<const N: usize>(socket: impl AsFd, option: libc::c_int) -> io::Result<[i32; N]> {
    let mut numbers = [0; N];
    let mut len = mem::size_of_val(&numbers) as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes behind the pointer, which is what is there, and
    // any bytes are numbers.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            numbers.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    match result {
        0 if len as usize == mem::size_of_val(&numbers) => Ok(numbers),
        0 => Err(io::ErrorKind::InvalidData.into()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether the other end of `socket` is closed.
pub fn is_hung_up(socket: &UnixStream) -> bool {
    let mut poll = [Interest::both(socket.as_raw_fd(), false, false)];
    wait(&mut poll, Some(0)).is_ok() && poll.iter().any(Interest::hung_up)
}

/// Whether a process, as [`peer_process`] gives it, has ended.
pub fn has_ended(process: &OwnedFd) -> bool {
    let mut poll = [Interest::read(process.as_raw_fd())];
    wait(&mut poll, Some(0)).is_ok() && poll.iter().any(Interest::is_ready)
}

/// Takes one connection that waits at `listener`, without waiting for one if that does not block.
///
/// # Errors
/// The host's, EAGAIN included.
pub fn accept(listener: &UnixListener) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(accept_with(listener, flags)?)
}

/// Reads what has come on `socket`, without waiting; 0 at its end.
///
/// # Errors
/// The host's, EAGAIN included.
pub fn receive_now(socket: impl AsFd, bytes: &mut [u8]) -> io::Result<usize> {
    let (count, _) = recv(socket, bytes, RecvFlags::DONTWAIT)?;
    Ok(count)
}

/// Writes what `socket` takes now.
///
/// # Errors
/// The host's, EAGAIN included.
pub fn send_now(socket: impl AsFd, bytes: &[u8]) -> io::Result<usize> {
    Ok(send(
        socket,
        bytes,
        SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
    )?)
}

/// Most descriptors that the kernel passes with one message (SCM_MAX_FD).
const SCM_MAX_FD: usize = 253;

/// Writes what `socket` takes of `bytes`, waiting for room if it is one that waits; `descriptors` go
/// with the first of them. How many bytes it took.
///
/// # Errors
/// The host's; InvalidInput for more descriptors than can be passed at once.
pub fn send_with_descriptors(
    socket: impl AsFd,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<usize> {
    send_all(socket, bytes, descriptors, SendFlags::NOSIGNAL)
}

/// The same, without waiting for room.
///
/// # Errors
/// As above; WouldBlock when there is no room.
pub fn send_now_with_descriptors(
    socket: impl AsFd,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<usize> {
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    send_all(socket, bytes, descriptors, flags)
}

fn send_all(
    socket: impl AsFd,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
    flags: SendFlags,
) -> io::Result<usize> {
    let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SCM_MAX_FD))];
    let mut control = SendAncillaryBuffer::new(&mut room);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    loop {
        let pieces = [IoSlice::new(bytes)];
        match sendmsg(&socket, &pieces, &mut control, flags) {
            Err(rustix::io::Errno::INTR) => {}
            sent => return Ok(sent?),
        }
    }
}

/// Since Linux 6.5.
const SO_PEERPIDFD: libc::c_int = 77;

/// Since Linux 6.5.
const SO_PASSPIDFD: libc::c_int = 76;

/// What a [`receive`] got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    /// Bytes; 0 at the end of the stream.
    pub count: usize,
    /// There may be more: it stopped short of descriptors, or where `bytes` ended.
    pub more: bool,
}

/// Reads what has come on `stream`, without waiting; descriptors that came with it go into
/// `passed`.
///
/// The kernel ends a read behind the bytes of a message with descriptors, but puts bytes of
/// messages before it into the same read: with which byte they came cannot be told. So the bytes
/// are looked at first. If descriptors are among them or behind them, this reads no more than
/// `most` says of the bytes to come, and at least one; else it reads all.
///
/// # Errors
/// The host's, WouldBlock included.
pub fn receive(
    stream: &UnixStream,
    bytes: &mut [u8],
    most: impl FnOnce(&[u8]) -> usize,
    passed: &mut Passed,
) -> io::Result<Received> {
    let limit = bytes.len();
    let (count, marked) = peek(stream, bytes)?;
    let wanted = if marked {
        most(bytes.get(..count).unwrap_or_default()).clamp(1, count.max(1))
    } else {
        count
    };
    let (count, came) = take(stream, bytes.get_mut(..wanted).unwrap_or_default())?;
    *passed = came;
    Ok(Received {
        count,
        more: count > 0 && (marked || count >= limit),
    })
}

/// The next bytes, and whether descriptors came with any of them; or, as kernels have it, with any
/// that come after them.
fn peek(stream: &UnixStream, bytes: &mut [u8]) -> io::Result<(usize, bool)> {
    let mut pieces = [IoSliceMut::new(bytes)];
    // Without room for descriptors none is made, and the flag says that there are.
    let mut none = RecvAncillaryBuffer::default();
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    let message = recvmsg(stream, &mut pieces, &mut none, flags)?;
    Ok((message.bytes, message.flags.contains(ReturnFlags::CTRUNC)))
}

/// Room for more descriptors than may come, so that too many are noticed.
const ROOM: usize = rustix::cmsg_space!(ScmRights(2 * PASSED_MAX));

/// Reads into `bytes`; and the descriptors that came with them.
fn take(stream: &UnixStream, bytes: &mut [u8]) -> io::Result<(usize, Passed)> {
    let mut pieces = [IoSliceMut::new(bytes)];
    let mut room = [MaybeUninit::uninit(); ROOM];
    let mut control = RecvAncillaryBuffer::new(&mut room);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let message = recvmsg(stream, &mut pieces, &mut control, flags)?;

    let mut received = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = part {
            received.extend(descriptors.map(Some));
        }
    }
    let passed = if received.len() > PASSED_MAX {
        Passed::Refused(PassedError::TooMany)
    } else if message.flags.contains(ReturnFlags::CTRUNC) {
        Passed::Refused(PassedError::Lost)
    } else {
        Passed::Received(received)
    };
    Ok((message.bytes, passed))
}

#[cfg(test)]
pub(crate) use tests::send_with;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::fd::pipe;
    use crate::sys::testing::wait_for_last_close;
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::fd::RawFd;
    use std::os::unix::net::UnixDatagram;
    use vmm_sys_util::sock_ctrl_msg::ScmSocket;

    /// Sends `bytes` and `fds` in one message.
    pub(crate) fn send_with(stream: &UnixStream, bytes: &[u8], fds: &[&File]) {
        let fds: Vec<RawFd> = fds.iter().map(|file| file.as_raw_fd()).collect();
        assert_eq!(stream.send_with_fds(&[bytes], &fds).unwrap(), bytes.len());
    }

    /// The reads that it takes to get `total` bytes, one at a time where descriptors are about:
    /// bytes and descriptors.
    fn reads(stream: &UnixStream, room: usize, total: usize) -> Vec<(String, usize)> {
        let (mut found, mut bytes, mut sum) = (Vec::new(), vec![0; room], 0);
        while sum < total {
            let mut passed = Passed::default();
            let received = receive(stream, &mut bytes, |_| 1, &mut passed).unwrap();
            sum += received.count;
            let Passed::Received(fds) = passed else {
                panic!("{passed:?}")
            };
            assert!(received.more || sum == total);
            let text = String::from_utf8_lossy(&bytes[..received.count]);
            found.push((text.into_owned(), fds.len()));
        }
        let empty = receive(stream, &mut bytes, |_| 1, &mut Passed::default());
        assert_eq!(empty.unwrap_err().kind(), io::ErrorKind::WouldBlock);
        found
    }

    #[test]
    fn receive_when_messages_differ_tells_the_byte_that_brought_descriptors() {
        // What is sent, each with so many descriptors; room of a read; what the reads give.
        type Sent<'a> = &'a [(&'a str, usize)];
        let cases: &[(Sent, usize, Sent)] = &[
            (&[("ab", 0), ("cd", 0)], 64, &[("abcd", 0)]),
            (&[("abc", 2)], 64, &[("a", 2), ("bc", 0)]),
            (
                &[("ab", 0), ("cd", 1)],
                64,
                &[("a", 0), ("b", 0), ("c", 1), ("d", 0)],
            ),
            (&[("abc", 1), ("cd", 0)], 64, &[("a", 1), ("bccd", 0)]),
            (
                &[("ab", 1), ("cd", 2)],
                64,
                &[("a", 1), ("b", 0), ("c", 2), ("d", 0)],
            ),
            (
                &[("a", 0), ("bc", 0), ("d", 16), ("e", 0), ("f", 0)],
                64,
                &[("a", 0), ("b", 0), ("c", 0), ("d", 16), ("ef", 0)],
            ),
            // Messages longer than a read.
            (&[("abcdef", 3)], 4, &[("a", 3), ("bcde", 0), ("f", 0)]),
            (&[("abcdef", 0)], 4, &[("abcd", 0), ("ef", 0)]),
        ];
        let file = File::open("/dev/null").unwrap();
        for (sent, room, expected) in cases {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let mut total = 0;
            for (text, fds) in *sent {
                total += text.len();
                if *fds > 0 {
                    send_with(&theirs, text.as_bytes(), &vec![&file; *fds]);
                } else {
                    (&theirs).write_all(text.as_bytes()).unwrap();
                }
            }
            let got = reads(&ours, *room, total);
            let got: Vec<_> = got
                .iter()
                .map(|(text, fds)| (text.as_str(), *fds))
                .collect();
            assert_eq!(got, *expected, "{sent:?}");
        }
    }

    #[test]
    fn receive_when_told_how_many_reads_no_more() {
        let file = File::open("/dev/null").unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        (&theirs).write_all(b"one\ntwo\n").unwrap();
        send_with(&theirs, b"three", &[&file]);
        let line = |next: &[u8]| next.iter().position(|b| *b == b'\n').unwrap() + 1;
        let (mut bytes, mut passed) = ([0; 64], Passed::default());
        for expected in [4, 4] {
            let received = receive(&ours, &mut bytes, line, &mut passed).unwrap();
            assert_eq!((received.count, passed.is_empty()), (expected, true));
        }
        // Nothing and too much are understood as little and all.
        let received = receive(&ours, &mut bytes, |_| 0, &mut passed).unwrap();
        assert_eq!((received.count, passed.is_empty()), (1, false));
        send_with(&theirs, b"four", &[&file]);
        let received = receive(&ours, &mut bytes, |_| usize::MAX, &mut passed).unwrap();
        assert_eq!(received.count, 8);
    }

    #[test]
    fn receive_when_descriptors_come_they_close_at_exec_and_work() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (mut reader, writer) = pipe().unwrap();
        send_with(&theirs, b"x", &[&writer]);
        drop(writer);
        let mut passed = Passed::default();
        receive(&ours, &mut [0; 8], |_| 1, &mut passed).unwrap();
        let fd = passed.claim(0).unwrap();
        // SAFETY: F_GETFD has no effect.
        let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFD) };
        assert_eq!(flags & libc::FD_CLOEXEC, libc::FD_CLOEXEC);
        File::from(fd).write_all(b"through").unwrap();
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "through");
    }

    #[test]
    fn receive_when_there_are_too_many_closes_all() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (reader, writer) = pipe().unwrap();
        for count in [33, 64, 80, 253] {
            send_with(&theirs, b"x", &vec![&writer; count]);
            let mut passed = Passed::default();
            let received = receive(&ours, &mut [0; 8], |_| 1, &mut passed).unwrap();
            assert_eq!(received.count, 1);
            assert!(
                matches!(passed, Passed::Refused(PassedError::TooMany)),
                "{passed:?}"
            );
        }
        drop(writer);
        // The writing end is closed: its end can be read.
        assert_eq!((&reader).read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn receive_when_the_client_is_gone_is_the_end() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        let mut passed = Passed::default();
        let mut received = None;
        wait_for_last_close(|| {
            received = receive(&ours, &mut [0; 8], |_| 1, &mut passed).ok();
            received.is_some()
        });
        let received = received.unwrap();
        assert_eq!((received.count, received.more), (0, false));
    }

    #[test]
    fn listener_when_it_is_none_says_what_it_is() {
        let dir = vmm_sys_util::tempdir::TempDir::new().unwrap();
        let path = dir.as_path().join("s");
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let datagram = UnixDatagram::unbound().unwrap();
        let (stream, _other) = UnixStream::pair().unwrap();
        let cases: [(OwnedFd, &str); 4] = [
            (File::open("/dev/null").unwrap().into(), "not a socket"),
            (tcp.into(), "not a Unix socket"),
            (datagram.into(), "not a stream socket"),
            (stream.into(), "a socket that does not listen"),
        ];
        for (fd, expected) in cases {
            assert_eq!(listener(fd).unwrap_err(), expected);
        }
        let good = UnixListener::bind(&path).unwrap();
        let listener = listener(good.into()).unwrap();
        let _client = UnixStream::connect(&path).unwrap();
        listener.accept().unwrap();
    }
}
