//! Sockets, and what is asked of network interfaces.

use super::{CLOSE_ON_EXEC, Fd, NONBLOCK, Result, call, fd, number};

/// A packet socket of one interface, for frames of one EtherType.
pub fn packet_socket() -> Result<Fd> {
    const FAMILY: usize = 17;
    const DATAGRAMS: usize = 2;
    // Without a protocol nothing comes before it is bound.
    fd(call!(
        SOCKET,
        FAMILY,
        DATAGRAMS | CLOSE_ON_EXEC as usize | NONBLOCK as usize,
        0
    ))
}

/// A socket for requests about the network (rtnetlink(7)).
pub fn netlink_socket() -> Result<Fd> {
    const FAMILY: usize = 16;
    const RAW: usize = 3;
    fd(call!(SOCKET, FAMILY, RAW | CLOSE_ON_EXEC as usize, 0))
}

/// The link-layer address of a peer on an interface (packet(7)).
pub fn packet_address(interface: i32, ether_type: u16, mac: [u8; 6]) -> [u8; 20] {
    let mut address = [0; 20];
    address[0] = 17;
    address[2..4].copy_from_slice(&ether_type.to_be_bytes());
    address[4..8].copy_from_slice(&interface.to_le_bytes());
    address[11] = 6;
    address[12..18].copy_from_slice(&mac);
    address
}

pub fn bind(socket: &Fd, address: &[u8; 20]) -> Result<()> {
    call!(BIND, socket.0, address.as_ptr(), address.len()).map(drop)
}

pub fn send(socket: &Fd, bytes: &[u8], to: &[u8; 20]) -> Result<()> {
    let (at, length) = (bytes.as_ptr(), bytes.len());
    call!(SENDTO, socket.0, at, length, 0, to.as_ptr(), to.len()).map(drop)
}

pub fn receive(socket: &Fd, into: &mut [u8]) -> Result<usize> {
    call!(RECVFROM, socket.0, into.as_mut_ptr(), into.len(), 0, 0, 0)
}

/// Lets so many bytes wait in a socket for being received (SO_RCVBUFFORCE).
pub fn set_receive_buffer(socket: &Fd, bytes: i32) {
    let bytes = bytes.to_le_bytes();
    let _ = call!(SETSOCKOPT, socket.0, 1, 33, bytes.as_ptr(), bytes.len());
}

/// Has a socket take only what comes in by one interface (SO_ATTACH_FILTER, bpf(4)).
pub fn take_only_from(socket: &Fd, interface: i32) -> Result<()> {
    /// Where a filter finds the interface (SKF_AD_OFF, SKF_AD_IFINDEX).
    const INTERFACE: u32 = 0xffff_f008;
    let instruction = |code: u16, is_not: u8, value: u32| {
        let [a, b] = code.to_le_bytes();
        let [c, d, e, f] = value.to_le_bytes();
        [a, b, 0, is_not, c, d, e, f]
    };
    let program = [
        instruction(0x20, 0, INTERFACE),
        instruction(0x15, 1, interface.unsigned_abs()),
        instruction(0x06, 0, u32::MAX),
        instruction(0x06, 0, 0),
    ];
    // struct sock_fprog: how many instructions, and where they are.
    let described = [program.len(), program.as_ptr() as usize];
    let (at, length) = (described.as_ptr(), size_of_val(&described));
    call!(SETSOCKOPT, socket.0, 1, 26, at, length).map(drop)
}

/// A request about an interface (netdevice(7)): its name, and 24 bytes.
pub struct InterfaceRequest(pub [u8; 40]);

impl InterfaceRequest {
    pub const GET_NAME: usize = 0x8910;
    pub const SET_FLAGS: usize = 0x8914;
    pub const SET_NAME: usize = 0x8923;
    pub const GET_MAC: usize = 0x8927;

    pub fn ask(&mut self, socket: &Fd, request: usize) -> Result<()> {
        call!(IOCTL, socket.0, request, self.0.as_mut_ptr()).map(drop)
    }
}
