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
//! removed, whichever process is killed when.

pub mod namespace;
mod netlink;

use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

use mayfly::wire::config::Mac;
use mayfly::wire::tap::{self, Tap};
use rustix::io::Errno;
use rustix::process::Pid;

use self::netlink::Netlink;
use super::spec::OwnTap;
use super::spec::resources::tun_remedy;
use crate::error::{Advice as _, Failure, Step as _};
use crate::netns::has_interface;

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

/// A guest that was saved cannot have such a network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    #[error(
        "cannot make a network for the guest of this snapshot (--net {0}): it has the address that it \
         was booted with, which is not one of --net {0}; connect it as at its boot"
    )]
    Other(&'static str),
    #[error(
        "cannot make a network for the guest of this snapshot (--net auto): its address belongs to a \
         microVM that runs ({0}); for many at once take the snapshot with --net user"
    )]
    Taken(String),
}

/// A network of the jail's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Network {
    /// Routed to the host, over a cable whose other end the supervisor makes.
    Auto(Block),
    /// Routed to whatever program the user connects.
    User,
}

impl Network {
    /// Chooses the addresses.
    pub fn choose(tap: OwnTap, seed: u32) -> Network {
        match tap {
            OwnTap::Auto => Network::Auto(choose_block(seed)),
            OwnTap::User => Network::User,
        }
    }

    /// That of a guest that was saved, which keeps the address that it was booted with.
    pub fn of_saved(tap: OwnTap, mac: Option<Mac>) -> Result<Network, NetworkError> {
        let found = match tap {
            OwnTap::User => Some(Network::User),
            OwnTap::Auto => mac.and_then(Block::of_mac).map(Network::Auto),
        };
        match found.filter(|network| mac == Some(network.mac())) {
            Some(Network::Auto(block)) if block.is_taken() => {
                Err(NetworkError::Taken(block.interface()))
            }
            Some(network) => Ok(network),
            None => Err(NetworkError::Other(match tap {
                OwnTap::Auto => "auto",
                OwnTap::User => "user",
            })),
        }
    }

    fn guest(self) -> Ipv4Addr {
        match self {
            Network::Auto(block) => block.address(Role::Guest),
            Network::User => USER_GUEST,
        }
    }

    /// The guest's address on a Linux command line.
    pub fn words(self) -> String {
        let (gateway, mask) = match self {
            Network::Auto(block) => (
                block.address(Role::Gateway),
                Ipv4Addr::new(255, 255, 255, 252),
            ),
            Network::User => (USER_GATEWAY, Ipv4Addr::new(255, 255, 255, 0)),
        };
        format!("ip={}::{gateway}:{mask}::eth0:off", self.guest())
    }

    /// A MAC address for the guest, locally administered.
    pub fn mac(self) -> Mac {
        let [a, b, c, d] = self.guest().octets();
        Mac([6, 0, a, b, c, d])
    }

    /// What the user is told, once the process in the jail has the number `pid`.
    pub fn announcement(self, pid: Pid) -> String {
        let guest = self.guest();
        match self {
            Network::Auto(block) => format!(
                "mayfly-jailer: the guest's address is {guest} (the host's, to the guest: {})\n",
                block.address(Role::Host)
            ),
            Network::User => format!(
                "mayfly-jailer: the guest's address is {guest}; connect its network with one of\n  \
                 slirp4netns --configure PID tap0\n  pasta --config-net PID\n\
                 where PID is {0} (network namespace /proc/{0}/ns/net)\n",
                pid.as_raw_nonzero()
            ),
        }
    }
}

/// The addresses of one microVM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block(u32);

/// Whose address it is, by its place in the block.
#[derive(Clone, Copy, Debug)]
enum Role {
    Host = 1,
    Jail = 2,
    GuestsNetwork = 4,
    Gateway = 5,
    Guest = 6,
}

impl Block {
    /// One of them all; which one, `seed` says.
    fn of(seed: u32) -> Block {
        Block(seed % BLOCKS)
    }

    fn address(self, role: Role) -> Ipv4Addr {
        Ipv4Addr::from_bits(POOL + self.0 * PER_GUEST + role as u32)
    }

    /// The one whose guest has this MAC address.
    fn of_mac(mac: Mac) -> Option<Block> {
        let [_, _, a, b, c, d] = mac.0;
        let offset = u32::from_be_bytes([a, b, c, d]).checked_sub(POOL)?;
        let block = Block(offset / PER_GUEST);
        (block.0 < BLOCKS).then_some(block)
    }

    /// Whether a microVM of this host has it, as far as can be seen.
    fn is_taken(self) -> bool {
        has_interface(&self.interface())
    }

    /// Name of the host's end of the cable; that it exists once is what makes the block ours.
    fn interface(self) -> String {
        format!("mf{}", self.0)
    }
}

/// Chooses a block no microVM of this host has, as far as can be seen; making the cable decides.
fn choose_block(seed: u32) -> Block {
    (0..BLOCKS)
        .map(|step| Block::of(seed.wrapping_add(step)))
        .find(|block| !block.is_taken())
        .unwrap_or(Block::of(seed))
}

/// On the host: makes the cable into the jail and routes the guest's network into it.
pub fn connect_outside(block: Block, pid: Pid) -> Result<(), Failure> {
    let name = block.interface();
    let remedy = |answer| match answer {
        Errno::OPNOTSUPP => Some("this kernel has no veth: load it with `modprobe veth`"),
        Errno::EXIST => Some("another microVM took that name just now: start again"),
        _ => None,
    };
    let netlink = Netlink::open()
        .and_then(|netlink| {
            netlink.make_cable(&name, CABLE, pid.as_raw_nonzero().get())?;
            Ok(netlink)
        })
        .step(format!(
            "make the cable {name} between the jail and the host"
        ))
        .hints(remedy)?;
    let guests = block.address(Role::GuestsNetwork);
    netlink
        .index(&name)
        .and_then(|index| {
            netlink.add_address(index, block.address(Role::Host), PREFIX)?;
            netlink.set_up(index)?;
            netlink.add_route(guests, PREFIX, Some(block.address(Role::Jail)), index)
        })
        .step(format!("give the cable {name} its address and route"))
        .hint(
            Errno::EXIST,
            "a route of this host is in the way in 198.18.0.0/15",
        )
}

/// In the jail: makes the tap.
pub fn make_tap() -> Result<OwnedFd, Failure> {
    let tun = tap::open_tun()
        .step("open /dev/net/tun")
        .hints(tun_remedy)?;
    let tap = Tap::attach(tun, TAP).step("make a tap in the jail")?;
    tap.make_persistent().step("keep the tap of the jail")?;
    Ok(tap.into())
}

/// In the jail: lets its kernel pass on what is not for itself.
pub fn prepare_inside() -> Result<(), Failure> {
    set("ip_forward", "1")
}

/// In the jail: configures both ends of what the guest needs to reach the host.
pub fn connect_inside(block: &Block) -> Result<(), Failure> {
    let connect = || {
        let netlink = Netlink::open()?;
        let cable = netlink.index(CABLE)?;
        netlink.set_up(cable)?;
        netlink.add_address(cable, block.address(Role::Jail), PREFIX)?;
        netlink.add_route(
            Ipv4Addr::UNSPECIFIED,
            0,
            Some(block.address(Role::Host)),
            cable,
        )?;
        let tap = netlink.index(TAP)?;
        netlink.set_up(tap)?;
        netlink.add_address(tap, block.address(Role::Gateway), PREFIX)
    };
    connect().step(SET_UP)
}

/// In the jail: lets the guest have whatever network appears here later. The kernel answers for the
/// guest towards that network, and for all of that network towards the guest.
pub fn open_inside() -> Result<(), Failure> {
    prepare_inside()?;
    for (name, value) in [
        ("conf/all/proxy_arp", "1"),
        ("conf/default/proxy_arp", "1"),
        (&format!("neigh/{TAP}/proxy_delay"), "0"),
        (&format!("conf/{TAP}/proxy_arp"), "1"),
    ] {
        set(name, value)?;
    }
    let open = || {
        let netlink = Netlink::open()?;
        let tap = netlink.index(TAP)?;
        netlink.set_up(1)?;
        netlink.set_up(tap)?;
        netlink.add_route(USER_GUEST, 32, None, tap)
    };
    open().step(SET_UP)
}

const SET_UP: &str = "set up the network in the jail";

fn set(name: &str, value: &str) -> Result<(), Failure> {
    let path = format!("/proc/sys/net/ipv4/{name}");
    std::fs::write(&path, value)
        .step(format!("set {path} in the jail"))
        .advise("mount /proc writable")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_have_their_own_addresses() {
        let (first, last) = (Block::of(0), Block::of(BLOCKS - 1));
        assert_eq!(first.address(Role::Host), Ipv4Addr::new(198, 18, 0, 1));
        assert_eq!(first.address(Role::Guest), Ipv4Addr::new(198, 18, 0, 6));
        assert_eq!(last.address(Role::Guest), Ipv4Addr::new(198, 19, 255, 254));
        assert_eq!(Block::of(BLOCKS), first);
        let network = Network::Auto(first);
        assert_eq!(
            network.words(),
            "ip=198.18.0.6::198.18.0.5:255.255.255.252::eth0:off"
        );
        assert_eq!(network.mac().to_string(), "06:00:c6:12:00:06");
        assert!(last.interface().len() < 16);
        for block in [first, last] {
            assert_eq!(Block::of_mac(Network::Auto(block).mac()), Some(block));
        }
    }

    #[test]
    fn guest_that_was_saved_keeps_its_address_or_has_no_such_network() {
        let auto = Network::Auto(Block::of(BLOCKS - 1));
        let user = Network::User;
        let found = |tap, mac: Network| Network::of_saved(tap, Some(mac.mac())).ok();
        assert_eq!(found(OwnTap::Auto, auto), Some(auto));
        assert_eq!(found(OwnTap::User, user), Some(user));
        assert_eq!(found(OwnTap::User, auto), None);
        assert_eq!(found(OwnTap::Auto, user), None);
        for tap in [OwnTap::Auto, OwnTap::User] {
            assert!(Network::of_saved(tap, None).is_err());
            // In the pool, and no guest's.
            let other = Some(Mac([6, 0, 198, 18, 0, 5]));
            assert!(Network::of_saved(tap, other).is_err());
        }
    }
}
