//! The few requests to the kernel's routing socket that a jail's network takes (rtnetlink(7)): make
//! a cable, bring an interface up, give an address, add a route.
//!
//! A request is a header, a fixed structure and attributes; every one is answered by an error number,
//! 0 if there was none. All of it is written byte by byte: no structure of the kernel's is needed.

use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

use libc::{AF_INET, IFA_ADDRESS, IFA_LOCAL, IFF_UP, RTA_DST, RTA_GATEWAY, RTA_OIF};
use libc::{NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NLMSG_ERROR};
use libc::{RT_SCOPE_LINK, RT_SCOPE_UNIVERSE, RT_TABLE_MAIN, RTN_UNICAST, RTPROT_STATIC};
use libc::{RTM_NEWADDR, RTM_NEWLINK, RTM_NEWROUTE};
use rustix::io::Errno;
use rustix::net::netdevice::name_to_index;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

/// Attributes of an interface.
const IFLA_IFNAME: u16 = 3;
const IFLA_LINKINFO: u16 = 18;
const IFLA_NET_NS_PID: u16 = 19;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const VETH_INFO_PEER: u16 = 1;
/// To make something new.
const NEW: i32 = NLM_F_CREATE | NLM_F_EXCL;

/// Bytes of a message's own header.
const HEADER: usize = 16;

/// A routing socket, of the network namespace it was made in.
#[derive(Debug)]
pub struct Netlink(OwnedFd);

/// A request under way.
struct Request(Vec<u8>);

impl Request {
    fn new(kind: u16, flags: i32) -> Request {
        let mut bytes = vec![0; HEADER];
        let flags = flags | NLM_F_REQUEST | NLM_F_ACK;
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&(flags as u16).to_ne_bytes());
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
        let mut request = Request::new(RTM_NEWLINK, NEW);
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
        self.ask(request)
    }

    /// The number of the interface `name`.
    pub fn index(&self, name: &str) -> Result<u32, Errno> {
        name_to_index(&self.0, name)
    }

    /// Brings an interface up.
    pub fn set_up(&self, index: u32) -> Result<(), Errno> {
        let mut request = Request::new(RTM_NEWLINK, 0);
        request.interface(index, true);
        self.ask(request)
    }

    /// Gives an interface an address, and the network of `prefix` bits around it.
    pub fn add_address(&self, index: u32, address: Ipv4Addr, prefix: u8) -> Result<(), Errno> {
        let mut request = Request::new(RTM_NEWADDR, NEW);
        // struct ifaddrmsg
        request
            .0
            .extend([AF_INET as u8, prefix, 0, RT_SCOPE_UNIVERSE]);
        request.0.extend(index.to_ne_bytes());
        request.attribute(IFA_LOCAL, &address.octets());
        request.attribute(IFA_ADDRESS, &address.octets());
        self.ask(request)
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
        let mut request = Request::new(RTM_NEWROUTE, NEW);
        let scope = gateway.map_or(RT_SCOPE_LINK, |_| RT_SCOPE_UNIVERSE);
        // struct rtmsg
        request.0.extend([AF_INET as u8, prefix, 0, 0]);
        request
            .0
            .extend([RT_TABLE_MAIN, RTPROT_STATIC, scope, RTN_UNICAST]);
        request.0.extend([0; 4]);
        if prefix > 0 {
            request.attribute(RTA_DST, &to.octets());
        }
        if let Some(gateway) = gateway {
            request.attribute(RTA_GATEWAY, &gateway.octets());
        }
        request.attribute(RTA_OIF, &index.to_ne_bytes());
        self.ask(request)
    }

    /// Sends a request and waits for its answer.
    fn ask(&self, request: Request) -> Result<(), Errno> {
        let mut bytes = request.0;
        let length = bytes.len() as u32;
        bytes[..4].copy_from_slice(&length.to_ne_bytes());
        rustix::net::send(&self.0, &bytes, SendFlags::empty())?;
        let mut answer = [0_u8; 8192];
        let receive = || rustix::net::recv(&self.0, &mut answer[..], RecvFlags::empty());
        let (count, _) = rustix::io::retry_on_intr(receive)?;
        // A header, which says what it is, and the number.
        let answer = answer[..count].first_chunk::<{ HEADER + 4 }>();
        let Some([_, _, _, _, kind, kind_high, .., a, b, c, d]) = answer else {
            return Err(Errno::BADMSG);
        };
        let is_error = i32::from(u16::from_ne_bytes([*kind, *kind_high])) == NLMSG_ERROR;
        match i32::from_ne_bytes([*a, *b, *c, *d]) {
            0 if is_error => Ok(()),
            number if is_error => Err(Errno::from_raw_os_error(number.wrapping_neg())),
            _ => Err(Errno::BADMSG),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nested_attributes_have_their_lengths() {
        let mut request = Request::new(RTM_NEWLINK, 0);
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
