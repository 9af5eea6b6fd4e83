//! Taps and sockets for whole Ethernet frames.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use super::owned;

/// EtherType for local experiments.
pub const EXPERIMENT: u16 = 0x88b5;

/// Size of the header before each frame of an opened tap.
pub const TAP_HEADER: usize = 12;

/// Makes a tap that stays until its network namespace goes.
pub fn make_tap(name: &str) -> io::Result<()> {
    let tap = attach(name)?;
    ioctl(&tap, libc::TUNSETPERSIST as _, 1)
}

/// Opens a tap as a monitor does: with a header before each frame, and with checksums and segments left to the reader.
pub fn open_tap(name: &str) -> io::Result<File> {
    let tap = attach(name)?;
    let mut size = TAP_HEADER as libc::c_int;
    // SAFETY: TUNSETVNETHDRSZ reads one int.
    if unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETVNETHDRSZ as _, &mut size) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let offload = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6;
    ioctl(&tap, libc::TUNSETOFFLOAD as _, offload.into())?;
    Ok(tap)
}

fn attach(name: &str) -> io::Result<File> {
    let tun = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    // SAFETY: all zeroes is a valid ifreq: an empty name and no flags.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "name too long"));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags =
        (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which `request` is.
    if unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF as _, &mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(tun)
}

/// For requests that take an integer.
fn ioctl(file: &File, request: libc::Ioctl, value: libc::c_ulong) -> io::Result<()> {
    // SAFETY: the request takes an integer and no pointer.
    if unsafe { libc::ioctl(file.as_raw_fd(), request, value) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// A socket that sends whole Ethernet frames to interface `name`.
pub fn frame_socket(name: &str) -> io::Result<File> {
    frames(name, 0)
}

/// The same, and it receives those of type [`EXPERIMENT`].
pub fn experiment_socket(name: &str) -> io::Result<File> {
    frames(name, EXPERIMENT)
}

fn frames(name: &str, protocol: u16) -> io::Result<File> {
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
    // SAFETY: the call has three integer arguments. Protocol 0: it only sends, unless it is bound to another.
    let socket = owned(i64::from(unsafe { libc::socket(libc::AF_PACKET, kind, 0) }))?;
    let name = CString::new(name)?;
    // SAFETY: the name is a C string that outlives the call.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    // SAFETY: all zeroes is a valid sockaddr_ll.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol.to_be();
    address.sll_ifindex = index as libc::c_int;
    // SAFETY: the address is ours and has the size given.
    let bound = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of_val(&address) as u32,
        )
    };
    if index == 0 || bound < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(File::from(socket))
}

/// What is written to a frame socket begins with a header of 10 bytes that says how the frame is to be cut up.
pub fn with_header(socket: &File) -> io::Result<()> {
    let on: libc::c_int = 1;
    set(socket, libc::SOL_PACKET, libc::PACKET_VNET_HDR, &on)
}

/// Bytes on their way to the interface before a write waits.
pub fn limit_sending(socket: &File, bytes: i32) -> io::Result<()> {
    set(socket, libc::SOL_SOCKET, libc::SO_SNDBUF, &bytes)
}

/// After which time a read or a write that has waited is an error.
pub fn limit_waiting(socket: &File, time: Duration) -> io::Result<()> {
    let time = libc::timeval {
        tv_sec: time.as_secs() as libc::time_t,
        tv_usec: time.subsec_micros().into(),
    };
    set(socket, libc::SOL_SOCKET, libc::SO_RCVTIMEO, &time)?;
    set(socket, libc::SOL_SOCKET, libc::SO_SNDTIMEO, &time)
}

/// Sends `frame` many times by one call, or as often as there is room for.
pub fn send_many(socket: &File, frame: &[u8]) -> io::Result<()> {
    const COUNT: usize = 32;
    let mut piece = libc::iovec {
        iov_base: frame.as_ptr().cast_mut().cast(),
        iov_len: frame.len(),
    };
    // SAFETY: all zeroes is a valid mmsghdr: no name, no buffers, no control data.
    let mut messages: [libc::mmsghdr; COUNT] = unsafe { std::mem::zeroed() };
    for message in &mut messages {
        message.msg_hdr.msg_iov = &raw mut piece;
        message.msg_hdr.msg_iovlen = 1;
    }
    // SAFETY: the messages, their one buffer and the frame outlive the call, which only reads the frame.
    let sent = unsafe {
        libc::sendmmsg(
            socket.as_raw_fd(),
            messages.as_mut_ptr(),
            COUNT as libc::c_uint,
            0,
        )
    };
    if sent < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn set<T>(socket: &File, level: libc::c_int, option: libc::c_int, value: &T) -> io::Result<()> {
    // SAFETY: the value is a whole plain structure of the option's kind, and lives longer than the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            std::ptr::from_ref(value).cast(),
            size_of::<T>() as libc::socklen_t,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
