//! A network of the jail's own: a tap in its network namespace, routed by the kernel there to the
//! host (`--net auto`) or to whatever program the user connects (`--net user`).
//!
//! ```text
//!   auto:   guest --- tap "guest" [jail routes] "host" --- cable --- "mf..." on the host
//!            .6            .5                     .2                    .1
//!   user:   guest --- tap "guest" [jail routes, answers for others] --- pasta's or slirp4netns's tap
//!         10.0.2.15                                                      10.0.2.100, or the host's
//! ```
//!
//! The tap is persistent and so left to its namespace: closing one takes 34 ms, a namespace takes
//! all its interfaces down at once, later, the cable's other end with them. So nothing has to be
//! removed, whoever is killed when.

use std::net::Ipv4Addr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::io::Errno;
use rustix::process::Pid;

use super::netlink::Netlink;
use super::opening::open_tun;
use crate::failure::{Doing, Failure};
use crate::sys;

/// The tap's name in the jail.
const TAP: &str = "guest";
/// The cable's end in the jail.
const CABLE: &str = "host";

/// 198.18.0.0/15, set aside for tests of networks (RFC 2544): what a host is least likely to use.
const POOL: u32 = 0xc612_0000;
/// Addresses of one microVM: two networks of four.
const PER_GUEST: u32 = 8;
/// Blocks of that size in the pool.
const BLOCKS: u32 = (1 << 17) / PER_GUEST;
/// Bits of each of the two networks.
const PREFIX: u8 = 30;

/// What slirp4netns gives its network; pasta does not mind.
const USER_GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
const USER_GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);

/// The addresses of one microVM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block(u32);

impl Block {
    /// One of them all; which one, `seed` says.
    fn of(seed: u32) -> Block {
        Block(seed % BLOCKS)
    }

    fn address(self, offset: u32) -> Ipv4Addr {
        Ipv4Addr::from_bits(POOL + self.0 * PER_GUEST + offset)
    }

    /// The host's end of the cable.
    pub fn host(self) -> Ipv4Addr {
        self.address(1)
    }

    fn jail(self) -> Ipv4Addr {
        self.address(2)
    }

    fn guests_network(self) -> Ipv4Addr {
        self.address(4)
    }

    fn gateway(self) -> Ipv4Addr {
        self.address(5)
    }

    /// The guest.
    pub fn guest(self) -> Ipv4Addr {
        self.address(6)
    }

    /// Name of the host's end of the cable; that it exists once is what makes the block ours.
    pub fn interface(self) -> String {
        format!("mf{}", self.0)
    }

    /// The guest's address on a Linux command line.
    pub fn words(self) -> String {
        words(
            self.guest(),
            self.gateway(),
            Ipv4Addr::new(255, 255, 255, 252),
        )
    }

    /// A MAC address for the guest, locally administered.
    pub fn mac(self) -> String {
        mac(self.guest())
    }
}

fn words(guest: Ipv4Addr, gateway: Ipv4Addr, mask: Ipv4Addr) -> String {
    format!("ip={guest}::{gateway}:{mask}::eth0:off")
}

fn mac(guest: Ipv4Addr) -> String {
    let [a, b, c, d] = guest.octets();
    format!("06:00:{a:02x}:{b:02x}:{c:02x}:{d:02x}")
}

/// The address, as words for Linux, and the MAC of a guest whose network is the user's.
pub fn user_guest() -> (Ipv4Addr, String, String) {
    let mask = Ipv4Addr::new(255, 255, 255, 0);
    (
        USER_GUEST,
        words(USER_GUEST, USER_GATEWAY, mask),
        mac(USER_GUEST),
    )
}

/// Chooses a block no microVM of this host has, as far as can be seen; making the cable decides.
pub fn choose_block(seed: u32) -> Block {
    (0..BLOCKS)
        .map(|step| Block::of(seed.wrapping_add(step)))
        .find(|block| !Path::new("/sys/class/net").join(block.interface()).exists())
        .unwrap_or(Block::of(seed))
}

/// On the host: makes the cable into the jail and routes the guest's network into it.
pub fn connect_outside(block: Block, pid: Pid) -> Result<(), Failure> {
    let what = format!("connect the jail to the host ({})", block.interface());
    let netlink = Netlink::open().doing(&what)?;
    netlink
        .make_cable(&block.interface(), CABLE, pid.as_raw_nonzero().get())
        .doing_or(&what, |error| match Errno::from_io_error(error) {
            Some(Errno::OPNOTSUPP) => "this kernel has no veth: load it with `modprobe veth`",
            Some(Errno::EXIST) => "another microVM took that name just now: start again",
            _ => "",
        })?;
    let index = netlink.index(&block.interface()).doing(&what)?;
    netlink
        .add_address(index, block.host(), PREFIX)
        .doing(&what)?;
    netlink.set_up(index).doing(&what)?;
    netlink
        .add_route(block.guests_network(), PREFIX, Some(block.jail()), index)
        .doing_or(&what, |error| match Errno::from_io_error(error) {
            Some(Errno::EXIST) => "a route of this host is in the way in 198.18.0.0/15",
            _ => "",
        })
}

/// In the jail: makes the tap.
pub fn make_tap() -> Result<OwnedFd, Failure> {
    let what = "make a tap in the jail";
    let tap = open_tun()?;
    sys::attach_tap(tap.as_fd(), TAP).doing(what)?;
    sys::keep_tap(tap.as_fd()).doing(what)?;
    Ok(tap)
}

/// In the jail: lets its kernel pass on what is not for itself.
pub fn prepare_inside() -> Result<(), Failure> {
    set("ip_forward", "1")
}

/// In the jail: configures both ends of what the guest needs to reach the host.
pub fn connect_inside(block: &Block) -> Result<(), Failure> {
    let what = "set up the jail's network";
    let netlink = Netlink::open().doing(what)?;
    let cable = netlink.index(CABLE).doing(what)?;
    netlink.set_up(cable).doing(what)?;
    netlink
        .add_address(cable, block.jail(), PREFIX)
        .doing(what)?;
    netlink
        .add_route(Ipv4Addr::UNSPECIFIED, 0, Some(block.host()), cable)
        .doing(what)?;
    let tap = netlink.index(TAP).doing(what)?;
    netlink.set_up(tap).doing(what)?;
    netlink
        .add_address(tap, block.gateway(), PREFIX)
        .doing(what)
}

/// In the jail: lets the guest have whatever network appears here later. The kernel answers for the
/// guest towards that network, and for all of that network towards the guest.
pub fn open_inside() -> Result<(), Failure> {
    let what = "set up the jail's network";
    prepare_inside()?;
    for (name, value) in [
        ("conf/all/proxy_arp", "1"),
        ("conf/default/proxy_arp", "1"),
        (&format!("neigh/{TAP}/proxy_delay"), "0"),
        (&format!("conf/{TAP}/proxy_arp"), "1"),
    ] {
        set(name, value)?;
    }
    let netlink = Netlink::open().doing(what)?;
    let tap = netlink.index(TAP).doing(what)?;
    netlink.set_up(1).doing(what)?;
    netlink.set_up(tap).doing(what)?;
    netlink.add_route(USER_GUEST, 32, None, tap).doing(what)
}

fn set(name: &str, value: &str) -> Result<(), Failure> {
    let path = format!("/proc/sys/net/ipv4/{name}");
    std::fs::write(&path, value).doing_or(
        format_args!("set {path} in the jail"),
        |_| "mount /proc writable",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_have_their_own_addresses() {
        let (first, last) = (Block::of(0), Block::of(BLOCKS - 1));
        assert_eq!(first.host(), Ipv4Addr::new(198, 18, 0, 1));
        assert_eq!(first.guest(), Ipv4Addr::new(198, 18, 0, 6));
        assert_eq!(last.guest(), Ipv4Addr::new(198, 19, 255, 254));
        assert_eq!(Block::of(BLOCKS), first);
        assert_eq!(
            first.words(),
            "ip=198.18.0.6::198.18.0.5:255.255.255.252::eth0:off"
        );
        assert_eq!(first.mac(), "06:00:c6:12:00:06");
        assert!(last.interface().len() < 16);
    }
}
