//! The few requests to the kernel's routing socket that a jail's network takes (rtnetlink(7)): make
//! a cable, give an address, add a route, find an interface.
//!
//! A request is a header, a fixed structure and attributes; every one is answered, by nothing or an
//! error number. All of it is written byte by byte: no structure of the kernel's is needed.

use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

/// Kinds of messages.
const NEWLINK: u16 = 16;
const GETLINK: u16 = 18;
const NEWADDR: u16 = 20;
const NEWROUTE: u16 = 24;
const ERROR: u16 = 2;

/// What to do with a request.
const REQUEST: u16 = 1;
const ACKNOWLEDGE: u16 = 4;
const EXCLUSIVE: u16 = 0x200;
const CREATE: u16 = 0x400;

/// Attributes of an interface.
const IFLA_IFNAME: u16 = 3;
const IFLA_LINKINFO: u16 = 18;
const IFLA_NET_NS_PID: u16 = 19;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const VETH_INFO_PEER: u16 = 1;
/// Attributes of an address.
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
/// Attributes of a route.
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;

const AF_INET: u8 = 2;
const IFF_UP: u32 = 1;
const TABLE_MAIN: u8 = 254;
const PROTO_STATIC: u8 = 4;
const SCOPE_UNIVERSE: u8 = 0;
const SCOPE_LINK: u8 = 253;
const TYPE_UNICAST: u8 = 1;

/// Bytes of a message's own header.
const HEADER: usize = 16;

/// A routing socket, of the network namespace it was made in.
#[derive(Debug)]
pub struct Netlink(OwnedFd);

/// A request under way.
struct Request(Vec<u8>);

impl Request {
    fn new(kind: u16, flags: u16) -> Request {
        let mut bytes = vec![0; HEADER];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&(flags | REQUEST | ACKNOWLEDGE).to_ne_bytes());
        Request(bytes)
    }

    /// `struct ifinfomsg`.
    fn interface(&mut self, index: u32, up: bool) {
        let up = if up { IFF_UP } else { 0 };
        self.0.extend([0; 4]);
        self.0.extend(index.to_ne_bytes());
        self.0.extend(up.to_ne_bytes());
        self.0.extend(up.to_ne_bytes());
    }

    fn attribute(&mut self, kind: u16, value: &[u8]) {
        let length = (value.len() + 4) as u16;
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    fn name(&mut self, kind: u16, name: &str) {
        let mut value = name.as_bytes().to_vec();
        value.push(0);
        self.attribute(kind, &value);
    }

    /// An attribute whose value is more of them.
    fn nest(&mut self, kind: u16, inside: impl FnOnce(&mut Request)) {
        let at = self.0.len();
        self.attribute(kind, &[]);
        inside(self);
        let length = (self.0.len() - at) as u16;
        self.0[at..at + 2].copy_from_slice(&length.to_ne_bytes());
    }
}

impl Netlink {
    /// Opens one.
    pub fn open() -> Result<Netlink, Errno> {
        rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            // NETLINK_ROUTE
            None,
        )
        .map(Netlink)
    }

    /// Makes two interfaces connected by a cable: `name` here, `peer` in the network namespace of
    /// process `pid`. Neither is up: it takes both to exist for that.
    pub fn make_cable(&self, name: &str, peer: &str, pid: i32) -> Result<(), Errno> {
        let mut request = Request::new(NEWLINK, CREATE | EXCLUSIVE);
        request.interface(0, false);
        request.name(IFLA_IFNAME, name);
        request.nest(IFLA_LINKINFO, |request| {
            request.attribute(IFLA_INFO_KIND, b"veth");
            request.nest(IFLA_INFO_DATA, |request| {
                request.nest(VETH_INFO_PEER, |request| {
                    request.interface(0, false);
                    request.name(IFLA_IFNAME, peer);
                    request.attribute(IFLA_NET_NS_PID, &pid.to_ne_bytes());
                });
            });
        });
        self.ask(request).map(drop)
    }

    /// The number of the interface `name`.
    pub fn index(&self, name: &str) -> Result<u32, Errno> {
        let mut request = Request::new(GETLINK, 0);
        request.interface(0, false);
        request.name(IFLA_IFNAME, name);
        let answer = self.ask(request)?;
        // After the header: family, type, index.
        let index = answer
            .get(HEADER + 4..HEADER + 8)
            .and_then(|bytes| bytes.try_into().ok());
        index.map(u32::from_ne_bytes).ok_or(Errno::BADMSG)
    }

    /// Brings an interface up.
    pub fn set_up(&self, index: u32) -> Result<(), Errno> {
        let mut request = Request::new(NEWLINK, 0);
        request.interface(index, true);
        self.ask(request).map(drop)
    }

    /// Gives an interface an address, and the network of `prefix` bits around it.
    pub fn add_address(&self, index: u32, address: Ipv4Addr, prefix: u8) -> Result<(), Errno> {
        let mut request = Request::new(NEWADDR, CREATE | EXCLUSIVE);
        // struct ifaddrmsg
        request.0.extend([AF_INET, prefix, 0, SCOPE_UNIVERSE]);
        request.0.extend(index.to_ne_bytes());
        request.attribute(IFA_LOCAL, &address.octets());
        request.attribute(IFA_ADDRESS, &address.octets());
        self.ask(request).map(drop)
    }

    /// Sends what is for `to` (a network of `prefix` bits) out of an interface, by way of a gateway
    /// if there is one.
    pub fn add_route(
        &self,
        to: Ipv4Addr,
        prefix: u8,
        gateway: Option<Ipv4Addr>,
        index: u32,
    ) -> Result<(), Errno> {
        let mut request = Request::new(NEWROUTE, CREATE | EXCLUSIVE);
        let scope = if gateway.is_some() {
            SCOPE_UNIVERSE
        } else {
            SCOPE_LINK
        };
        // struct rtmsg
        request.0.extend([
            AF_INET,
            prefix,
            0,
            0,
            TABLE_MAIN,
            PROTO_STATIC,
            scope,
            TYPE_UNICAST,
        ]);
        request.0.extend([0; 4]);
        if prefix > 0 {
            request.attribute(RTA_DST, &to.octets());
        }
        if let Some(gateway) = gateway {
            request.attribute(RTA_GATEWAY, &gateway.octets());
        }
        request.attribute(RTA_OIF, &index.to_ne_bytes());
        self.ask(request).map(drop)
    }

    /// Sends a request and returns the answer, or the error it is.
    fn ask(&self, request: Request) -> Result<Vec<u8>, Errno> {
        let mut bytes = request.0;
        let length = bytes.len() as u32;
        bytes[..4].copy_from_slice(&length.to_ne_bytes());
        rustix::net::send(&self.0, &bytes, SendFlags::empty())?;
        let mut answer = Vec::new();
        loop {
            let mut buffer = [0_u8; 8192];
            let (count, _) = rustix::io::retry_on_intr(|| {
                rustix::net::recv(&self.0, &mut buffer[..], RecvFlags::empty())
            })?;
            let mut rest = &buffer[..count];
            while let Some(header) = rest.first_chunk::<HEADER>() {
                let length = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]);
                let message = rest.get(..length as usize).ok_or(Errno::BADMSG)?;
                if u16::from_ne_bytes([header[4], header[5]]) == ERROR {
                    // The last of an answer: an error number, or 0.
                    let number = message
                        .get(HEADER..HEADER + 4)
                        .and_then(|b| b.try_into().ok());
                    return match number.map_or(-1, i32::from_ne_bytes) {
                        0 => Ok(answer),
                        number => Err(Errno::from_raw_os_error(number.wrapping_neg())),
                    };
                }
                if answer.is_empty() {
                    answer = message.to_vec();
                }
                let next = (length as usize).next_multiple_of(4).max(HEADER);
                rest = rest.get(next..).unwrap_or_default();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nested_attributes_have_their_lengths() {
        let mut request = Request::new(NEWLINK, 0);
        request.nest(7, |request| request.name(3, "abcd"));
        let attributes = &request.0[HEADER..];
        // Outer: 4 + inner 4 + "abcd\0" padded to 8.
        assert_eq!(attributes.len(), 16);
        assert_eq!(attributes[..2], 16_u16.to_ne_bytes());
        assert_eq!(attributes[4..6], 9_u16.to_ne_bytes());
    }

    #[test]
    fn index_of_loopback_is_found_and_of_nothing_is_not() {
        let netlink = Netlink::open().unwrap();
        assert_eq!(netlink.index("lo"), Ok(1));
        assert_eq!(netlink.index("mf-none"), Err(Errno::NODEV));
    }
}
