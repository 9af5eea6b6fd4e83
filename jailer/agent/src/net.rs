//! The network that the supervisor tells of: an interface by its address, its addresses and routes, set by netlink
//! (rtnetlink(7)).

use mayfly_agent_protocol::{Fields, fields};

use crate::link::{self, Link};
use crate::sys::{self, Errno, Fd};
use crate::text::Text;

/// Longest request: headers, and three attributes.
const ROOM: usize = 128;
const NEW_LINK: u16 = 16;
const NEW_ADDRESS: u16 = 20;
const NEW_ROUTE: u16 = 24;
/// NLM_F_REQUEST, NLM_F_ACK, NLM_F_CREATE.
const FLAGS: u16 = 1 | 4 | 0x400;

/// A request under way.
struct Request {
    bytes: [u8; ROOM],
    used: usize,
}

impl Request {
    fn new(kind: u16, fixed: &[u8]) -> Request {
        let mut request = Request {
            bytes: [0; ROOM],
            used: 16,
        };
        request.bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        request.bytes[6..8].copy_from_slice(&FLAGS.to_ne_bytes());
        request.add(fixed);
        request
    }

    fn add(&mut self, bytes: &[u8]) {
        let end = self.used + bytes.len();
        if let Some(place) = self.bytes.get_mut(self.used..end) {
            place.copy_from_slice(bytes);
            self.used = end.next_multiple_of(4);
        }
    }

    fn attribute(&mut self, kind: u16, value: &[u8]) {
        let [a, b] = (value.len() as u16 + 4).to_ne_bytes();
        let [c, d] = kind.to_ne_bytes();
        self.add(&[a, b, c, d]);
        self.add(value);
    }

    fn ask(mut self, socket: &Fd) -> sys::Result<()> {
        let length = self.used.min(ROOM);
        self.bytes[..4].copy_from_slice(&(length as u32).to_ne_bytes());
        sys::write(socket, &self.bytes[..length])?;
        let mut answer = [0; 1024];
        let count = sys::read(socket, &mut answer)?;
        let number = answer[..count].get(16..).and_then(|it| it.first_chunk());
        match number.map(|it| i32::from_ne_bytes(*it)) {
            Some(0) => Ok(()),
            Some(number) => Err(Errno(number.wrapping_neg())),
            None => Err(Errno::INVAL),
        }
    }
}

/// AF_INET or AF_INET6 of an address of so many bytes.
fn family(length: usize) -> Option<u8> {
    match length {
        4 => Some(2),
        16 => Some(10),
        _ => None,
    }
}

/// Sets up what a setup with these fields tells of.
pub fn set_up(all: Fields<'_>, link: &Link) -> Result<(), Text> {
    let mut socket = None;
    let mut index = [0; 4];
    let mut found_by = None;
    for field in all.flatten() {
        let bytes = field.bytes();
        let done = match (field.tag, bytes.split_first()) {
            (fields::FOUND_BY, _) => {
                found_by = Some(bytes);
                continue;
            }
            (fields::INTERFACE, _) => {
                let opened = sys::netlink_socket();
                let opened = opened.map_err(|error| Text::of(b"make a netlink socket", error))?;
                let socket = socket.insert(opened);
                let Some((mac, mtu)) = bytes.split_at_checked(6) else {
                    continue;
                };
                let Some(found) = link::index_of(link, found_by.unwrap_or(mac)) else {
                    let mut text = Text::new();
                    text.add(b"cannot find the network interface of the namespace");
                    return Err(text);
                };
                index = found.to_ne_bytes();
                let [a, b, c, d] = index;
                // struct ifinfomsg: IFF_UP, and that this changes.
                let fixed = [0, 0, 0, 0, a, b, c, d, 1, 0, 0, 0, 1, 0, 0, 0];
                let mut request = Request::new(NEW_LINK, &fixed);
                request.attribute(4, mtu);
                if found_by.take().is_some() {
                    request.attribute(1, mac);
                }
                request.ask(socket)
            }
            (fields::ADDRESS, Some((prefix, address))) => match (&socket, family(address.len())) {
                (Some(socket), Some(family)) => {
                    add_address(socket, index, family, *prefix, address)
                }
                _ => Ok(()),
            },
            (fields::ROUTE, Some((prefix, rest))) => {
                let length = if matches!(rest.len(), 4 | 8) { 4 } else { 16 };
                match (&socket, family(length), rest.split_at_checked(length)) {
                    (Some(socket), Some(family), Some((to, gateway))) => {
                        add_route(socket, index, family, *prefix, to, gateway)
                    }
                    _ => Ok(()),
                }
            }
            _ => continue,
        };
        match done {
            Ok(()) | Err(Errno::EXIST) => {}
            // A kernel without IPv6 goes without its addresses.
            Err(_) if field.tag != fields::INTERFACE && bytes.len() > 9 => {}
            Err(error) => return Err(Text::of(b"set up the network (CONFIG_INET)", error)),
        }
    }
    Ok(())
}

fn add_address(
    socket: &Fd,
    [a, b, c, d]: [u8; 4],
    family: u8,
    prefix: u8,
    address: &[u8],
) -> sys::Result<()> {
    /// IFA_F_NODAD: the address was the host's, which has made sure of it.
    const AT_ONCE: u8 = 2;
    let mut request = Request::new(NEW_ADDRESS, &[family, prefix, AT_ONCE, 0, a, b, c, d]);
    request.attribute(2, address);
    request.attribute(1, address);
    request.ask(socket)
}

fn add_route(
    socket: &Fd,
    index: [u8; 4],
    family: u8,
    prefix: u8,
    to: &[u8],
    gateway: &[u8],
) -> sys::Result<()> {
    // RT_SCOPE_LINK or RT_SCOPE_UNIVERSE; RT_TABLE_MAIN, RTPROT_STATIC, RTN_UNICAST.
    let scope = if gateway.is_empty() { 253 } else { 0 };
    let fixed = [family, prefix, 0, 0, 254, 4, scope, 1, 0, 0, 0, 0];
    let mut request = Request::new(NEW_ROUTE, &fixed);
    if prefix > 0 {
        request.attribute(1, to);
    }
    if !gateway.is_empty() {
        request.attribute(5, gateway);
    }
    request.attribute(4, &index);
    request.ask(socket)
}
