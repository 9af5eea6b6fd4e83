//! Descriptors that are passed over a Unix socket.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use super::owned;

/// Room for the control message that carries one descriptor, aligned as its header must be.
#[repr(C, align(8))]
struct OneDescriptor([u8; 24]);

/// Sends `bytes` in one piece, and one descriptor with them.
pub fn send_with_descriptor(
    stream: &UnixStream,
    bytes: &[u8],
    passed: BorrowedFd<'_>,
) -> io::Result<()> {
    let mut control = OneDescriptor([0; 24]);
    let mut piece = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    let message = message(&mut piece, &mut control);
    // SAFETY: the control buffer has room for one header and one descriptor, as its length says.
    unsafe {
        let header = libc::CMSG_FIRSTHDR(&message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(size_of::<libc::c_int>() as u32) as usize;
        libc::CMSG_DATA(header)
            .cast::<libc::c_int>()
            .write_unaligned(passed.as_raw_fd());
    }
    // SAFETY: the message's buffers outlive the call, which only reads them.
    let sent = unsafe { libc::sendmsg(stream.as_raw_fd(), &message, libc::MSG_NOSIGNAL) };
    match usize::try_from(sent) {
        Ok(sent) if sent == bytes.len() => Ok(()),
        Ok(_) => Err(io::ErrorKind::WriteZero.into()),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

/// Receives one descriptor; nothing if what came has none.
pub fn receive_descriptor(stream: &UnixStream) -> io::Result<Option<OwnedFd>> {
    let mut control = OneDescriptor([0; 24]);
    let mut byte = 0_u8;
    let mut piece = libc::iovec {
        iov_base: (&raw mut byte).cast(),
        iov_len: 1,
    };
    let mut message = message(&mut piece, &mut control);
    // SAFETY: the message's buffers outlive the call and have the lengths given.
    let received =
        unsafe { libc::recvmsg(stream.as_raw_fd(), &mut message, libc::MSG_CMSG_CLOEXEC) };
    if received < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has filled the control buffer and set its length.
    let header = unsafe { libc::CMSG_FIRSTHDR(&message) };
    if header.is_null() {
        return Ok(None);
    }
    // SAFETY: a header that CMSG_FIRSTHDR gives lies whole in the control buffer.
    if unsafe { (*header).cmsg_type } != libc::SCM_RIGHTS {
        return Ok(None);
    }
    // SAFETY: with SCM_RIGHTS at least one descriptor follows the header, and there is room for one.
    let fd = unsafe {
        libc::CMSG_DATA(header)
            .cast::<libc::c_int>()
            .read_unaligned()
    };
    owned(i64::from(fd)).map(Some)
}

fn message(piece: &mut libc::iovec, control: &mut OneDescriptor) -> libc::msghdr {
    // SAFETY: all zeroes is a valid msghdr: no address, no buffers, no flags.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = piece;
    message.msg_iovlen = 1;
    message.msg_control = control.0.as_mut_ptr().cast();
    message.msg_controllen = control.0.len();
    message
}
