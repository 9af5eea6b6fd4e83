//! The few requests to the kernel's routing socket that a jail's network takes (rtnetlink(7)): make
//! a cable, bring an interface up, give an address, add a route, list what there is, and pass all that comes in by one
//! interface out of another (tc-mirred(8)).
//!
//! A request is a header, a fixed structure and attributes; every one is answered by an error number,
//! 0 if there was none. All of it is written byte by byte: no structure of the kernel's is needed.

mod rules;

use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

use libc::{AF_INET, IFA_ADDRESS, IFA_LOCAL, IFF_UP, RTA_DST, RTA_GATEWAY, RTA_OIF};
use libc::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR,
};
use libc::{RT_SCOPE_LINK, RT_SCOPE_UNIVERSE, RT_TABLE_MAIN, RTN_UNICAST, RTPROT_STATIC};
use libc::{RTM_NEWADDR, RTM_NEWLINK, RTM_NEWROUTE};
use rustix::io::Errno;
use rustix::net::netdevice::name_to_index;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

pub use self::rules::Rule;

/// Of linux/rtnetlink.h and linux/pkt_sched.h.
const RTM_NEWQDISC: u16 = 36;
const RTM_DELQDISC: u16 = 37;
const RTM_NEWTFILTER: u16 = 44;
const RTM_GETTFILTER: u16 = 46;
/// The priority of our filters, by which they are known ("mf").
const PRIORITY: u16 = 0x6d66;
const INGRESS: u32 = 0xffff_0000;
const INGRESS_PARENT: u32 = 0xffff_fff1;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_U32_SEL: u16 = 5;
const TCA_U32_ACT: u16 = 7;
const TCA_MIRRED_PARMS: u16 = 2;
const IFLA_MTU: u16 = 4;
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

    /// `struct tcmsg`.
    fn traffic_control(&mut self, index: u32, handle: u32, parent: u32, info: u32) {
        self.0.extend([0; 4]);
        for word in [index, handle, parent, info] {
            self.0.extend(word.to_ne_bytes());
        }
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

    /// Brings an interface up, with this MTU.
    pub fn set_up_with_mtu(&self, index: u32, mtu: u32) -> Result<(), Errno> {
        let mut request = Request::new(RTM_NEWLINK, 0);
        request.interface(index, true);
        request.attribute(IFLA_MTU, &mtu.to_ne_bytes());
        self.ask(request)
    }

    /// Passes all that comes in by the interface `from` out of the interface `to`. Nothing of it reaches this kernel.
    pub fn redirect(&self, from: u32, to: u32) -> Result<(), Errno> {
        self.redirect_with(PRIORITY, from, to)
    }

    /// The same by a filter of this priority.
    pub fn redirect_with(&self, priority: u16, from: u32, to: u32) -> Result<(), Errno> {
        let mut request = Request::new(RTM_NEWQDISC, NEW);
        request.traffic_control(from, INGRESS, INGRESS_PARENT, 0);
        request.name(TCA_KIND, "ingress");
        self.ask(request)?;
        // Of all protocols (ETH_P_ALL).
        let mut request = filter(from, priority, 3);
        request.nest(TCA_OPTIONS, |request| {
            request.attribute(TCA_U32_SEL, &selector([0; 16]));
            request.nest(TCA_U32_ACT, |request| {
                request.nest(1, |request| {
                    request.name(TCA_KIND, "mirred");
                    request.nest(TCA_OPTIONS, |request| {
                        // struct tc_mirred: TC_ACT_STOLEN, TCA_EGRESS_REDIR.
                        let words = [0, 0, 4, 0, 0, 1, to];
                        let words: Vec<u8> = words.iter().flat_map(|it| it.to_ne_bytes()).collect();
                        request.attribute(TCA_MIRRED_PARMS, &words);
                    });
                });
            });
        });
        self.ask(request)
    }

    /// Of what comes in by an interface that is redirected, this kernel has the packets of a protocol that have
    /// `address` at an offset. `number`, 0 or 1, is another for each protocol.
    pub fn keep(
        &self,
        from: u32,
        number: u16,
        protocol: u16,
        offset: i32,
        address: Ipv4Addr,
    ) -> Result<(), Errno> {
        // Before that of all protocols; one filter is of one protocol.
        let mut request = filter(from, PRIORITY - 2 + number, protocol);
        // struct tc_u32_key: mask, value, offset, mask of the offset.
        let words = [[0xff; 4], address.octets(), offset.to_ne_bytes(), [0; 4]];
        let mut key = [0; 16];
        key.copy_from_slice(words.as_flattened());
        request.nest(TCA_OPTIONS, |request| {
            request.attribute(TCA_U32_SEL, &selector(key));
        });
        self.ask(request)
    }

    /// Takes back what [`Netlink::redirect`] made of an interface.
    pub fn remove_redirect(&self, from: u32) -> Result<(), Errno> {
        let mut request = Request::new(RTM_DELQDISC, 0);
        request.traffic_control(from, INGRESS, INGRESS_PARENT, 0);
        self.ask(request)
    }

    /// Whether what is made of the packets that come in by an interface is a redirect of ours, and no more.
    pub fn is_redirected(&self, from: u32) -> Result<bool, Errno> {
        let mut request = Request(Vec::new());
        request.traffic_control(from, 0, INGRESS, 0);
        let filters = self.list_of(RTM_GETTFILTER, &request.0)?;
        let is_ours = |it: &Listed| {
            let info = it.fixed.last_chunk().map(|it| u32::from_ne_bytes(*it));
            info.is_some_and(|info| info >> 16 == u32::from(PRIORITY))
        };
        Ok(!filters.is_empty() && filters.iter().all(is_ours))
    }

    /// All there is of a kind, for a request of it: each one's fixed part of so many bytes, and its attributes.
    pub fn list(&self, request: u16, fixed: usize) -> Result<Vec<Listed>, Errno> {
        self.list_of(request, &vec![0; fixed])
    }

    /// The same of what the request's fixed part says.
    fn list_of(&self, request: u16, part: &[u8]) -> Result<Vec<Listed>, Errno> {
        let fixed = part.len();
        let mut bytes = Request::new(request, NLM_F_DUMP).0;
        // No answer besides.
        let flags = (NLM_F_REQUEST | NLM_F_DUMP) as u16;
        bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
        bytes.extend(part);
        let length = bytes.len() as u32;
        bytes[..4].copy_from_slice(&length.to_ne_bytes());
        rustix::net::send(&self.0, &bytes, SendFlags::empty())?;
        let mut all = Vec::new();
        let mut answer = vec![0_u8; 64 * 1024];
        loop {
            let receive = || rustix::net::recv(&self.0, &mut answer[..], RecvFlags::empty());
            let (count, _) = rustix::io::retry_on_intr(receive)?;
            let mut rest = &answer[..count];
            while let Some((kind, body, more)) = split_message(rest) {
                match i32::from(kind) {
                    NLMSG_DONE => return Ok(all),
                    NLMSG_ERROR => {
                        let number = body.first_chunk().map_or(0, |it| i32::from_ne_bytes(*it));
                        return Err(Errno::from_raw_os_error(number.wrapping_neg()));
                    }
                    _ => all.extend(Listed::of(body, fixed)),
                }
                rest = more;
            }
            if count == 0 {
                return Err(Errno::BADMSG);
            }
        }
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

/// A new filter of what comes in by an interface, of packets of a protocol.
fn filter(from: u32, priority: u16, protocol: u16) -> Request {
    let mut request = Request::new(RTM_NEWTFILTER, NEW);
    let info = u32::from(priority) << 16 | u32::from(protocol.to_be());
    request.traffic_control(from, 0, INGRESS, info);
    request.name(TCA_KIND, "u32");
    request
}

/// `struct tc_u32_sel`: terminal, and one key. Everything has that of zeros.
fn selector(key: [u8; 16]) -> [u8; 32] {
    let mut selector = [0; 32];
    (selector[0], selector[2]) = (1, 1);
    selector[16..].copy_from_slice(&key);
    selector
}

/// A message: its kind, its body, and what follows it.
fn split_message(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = u32::from_ne_bytes(*bytes.first_chunk()?) as usize;
    let kind = u16::from_ne_bytes(*bytes.get(4..)?.first_chunk()?);
    let body = bytes.get(HEADER..length)?;
    let rest = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    Some((kind, body, rest))
}

/// One of what was listed.
#[derive(Debug)]
pub struct Listed {
    /// Its fixed part.
    pub fixed: Vec<u8>,
    attributes: Vec<(u16, Vec<u8>)>,
}

impl Listed {
    fn of(body: &[u8], fixed: usize) -> Option<Listed> {
        let (fixed, mut rest) = body.split_at_checked(fixed)?;
        let mut attributes = Vec::new();
        while let Some((length, kind)) = rest.first_chunk::<4>().map(|it| {
            let [a, b, c, d] = *it;
            (
                usize::from(u16::from_ne_bytes([a, b])),
                u16::from_ne_bytes([c, d]),
            )
        }) {
            let Some(value) = rest.get(4..length) else {
                break;
            };
            attributes.push((kind, value.to_vec()));
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
        Some(Listed {
            fixed: fixed.to_vec(),
            attributes,
        })
    }

    /// The value of an attribute.
    pub fn attribute(&self, kind: u16) -> Option<&[u8]> {
        let found = self.attributes.iter().find(|(other, _)| *other == kind);
        found.map(|(_, value)| value.as_slice())
    }

    /// The same of one that is a number.
    pub fn number(&self, kind: u16) -> Option<u32> {
        let value = self.attribute(kind)?.first_chunk()?;
        Some(u32::from_ne_bytes(*value))
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
