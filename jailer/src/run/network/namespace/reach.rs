//! A way from the network namespace to the guest (`--reach-from-namespace`). Engines of ordinary users publish a
//! port by a program in the namespace, which connects to the address there. That address stays, and is the guest's
//! too: so such connections would end in this kernel.
//!
//! ```text
//!   program [namespace] ---- 169.254.109.102 tap "mfguest" ---- guest
//!     its kernel: what is made here for the guest's address goes by the tap,
//!     and of what comes in by it, this kernel has what is for its address of the tap
//! ```
//!
//! Only IPv4, as the engines' programs. Addresses and routes of the namespace stay as they are: a rule in front of all
//! others sends to a table with one route. It is without effect once the tap is gone, and goes at the end.

use std::net::Ipv4Addr;

use rustix::io::Errno;

use super::super::netlink::{Netlink, Rule};
use crate::run::agent::{Address, Interface, Route};

/// The address of the namespace's end of the tap: "mf", of those that are never routed.
const HERE: Ipv4Addr = Ipv4Addr::new(169, 254, 0x6d, 0x66);
/// The table with the route to the guest, and that of the kernel's own addresses.
const TABLE: u32 = 0x6d66;
const LOCAL: u32 = 255;
/// Of linux/if_ether.h, and where an IPv4 and an ARP packet have the address that it is for.
const ETH_P_IP: (u16, i32) = (0x0800, 16);
const ETH_P_ARP: (u16, i32) = (0x0806, 24);

/// Takes the rule back.
#[derive(Debug)]
pub struct Reach(Rule);

/// Makes the way to the guest, which is to have another route for it; nothing where it has no address of IPv4.
pub fn open(netlink: &Netlink, tap: u32, found: &mut Interface) -> Result<Option<Reach>, Errno> {
    let mut addresses = found.addresses.iter();
    let four = addresses.find_map(|it| it.bytes.first_chunk().filter(|_| it.bytes.len() == 4));
    let Some(guest) = four.map(|bytes: &[u8; 4]| Ipv4Addr::from(*bytes)) else {
        return Ok(None);
    };
    for (step, (protocol, offset)) in [ETH_P_ARP, ETH_P_IP].into_iter().enumerate() {
        netlink.keep(tap, step as u16, protocol, offset, HERE)?;
    }
    netlink.add_address(tap, HERE, 32)?;
    netlink.add_route_of_table(TABLE, guest, HERE, tap)?;
    let reach = Reach(Rule {
        to: Some(guest),
        table: TABLE,
    });
    reach.put_first(netlink)?;
    let here = Address {
        bytes: HERE.octets().to_vec(),
        prefix: 32,
    };
    let route = Route {
        to: here,
        gateway: Vec::new(),
    };
    found.routes.insert(0, route);
    Ok(Some(reach))
}

impl Reach {
    /// Rules of one priority are in the order in which they were made, and the first one's is the least there is: so
    /// another one for the kernel's own addresses follows ours, and then the first goes.
    fn put_first(&self, netlink: &Netlink) -> Result<(), Errno> {
        let local = Rule {
            to: None,
            table: LOCAL,
        };
        // What one that was killed has left.
        self.close(netlink);
        let before = netlink.count_first(LOCAL)?;
        netlink.add_rule(&self.0)?;
        netlink.add_rule(&local)?;
        (0..before).try_for_each(|_| netlink.remove_rule(&local))
    }

    /// Takes the rule back.
    pub fn close(&self, netlink: &Netlink) {
        while netlink.remove_rule(&self.0).is_ok() {}
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::cable;
    use super::*;

    /// The rules of this namespace, by table, in their order.
    fn tables(netlink: &Netlink) -> Vec<u32> {
        netlink
            .rules()
            .unwrap()
            .iter()
            .map(|(table, _)| *table)
            .collect()
    }

    #[test]
    fn way_to_the_guest_is_first_and_what_was_there_stays() {
        let Some((netlink, a, b)) = cable() else {
            return;
        };
        netlink.set_up(b).unwrap();
        netlink.redirect(b, a).unwrap();
        let before = tables(&netlink);
        let interface = |bytes: &[u8]| Interface {
            mac: [2; 6],
            mtu: 1500,
            addresses: vec![Address {
                bytes: bytes.to_vec(),
                prefix: 24,
            }],
            routes: Vec::new(),
        };
        let mut six = interface(&[0xfd; 16]);
        assert!(open(&netlink, b, &mut six).unwrap().is_none());
        let mut four = interface(&[10, 0, 2, 100]);
        let reach = open(&netlink, b, &mut four).unwrap().unwrap();
        assert_eq!(four.routes[0].to.bytes, HERE.octets());
        assert_eq!(tables(&netlink), [&[TABLE][..], &before].concat());
        // Another one finds what is left of one that was killed, half-way or not.
        netlink.add_rule(&reach.0).unwrap();
        let local = Rule {
            to: None,
            table: LOCAL,
        };
        netlink.add_rule(&local).unwrap();
        reach.put_first(&netlink).unwrap();
        assert_eq!(tables(&netlink), [&[TABLE][..], &before].concat());
        reach.close(&netlink);
        assert_eq!(tables(&netlink), before);
    }
}
