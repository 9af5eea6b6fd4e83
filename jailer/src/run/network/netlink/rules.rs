//! Rules for IPv4, which say in which table a route is looked for (rtnetlink(7), fib_rules.h), and routes of such a table.

use std::net::Ipv4Addr;

use libc::{AF_INET, NLM_F_CREATE, RT_SCOPE_LINK, RTA_DST, RTA_OIF, RTN_UNICAST, RTPROT_STATIC};
use libc::{RTM_DELRULE, RTM_GETRULE, RTM_NEWROUTE, RTM_NEWRULE};
use rustix::io::Errno;

use super::{Listed, NEW, Netlink, Request};

const RTA_PREFSRC: u16 = 7;
const RTA_TABLE: u16 = 15;
/// Attributes of a rule (linux/fib_rules.h), and what it does: look a table up.
const FRA_DST: u16 = 1;
const FRA_IIFNAME: u16 = 3;
const FRA_PRIORITY: u16 = 6;
const FRA_TABLE: u16 = 15;
const FR_ACT_TO_TBL: u8 = 1;

/// A rule for IPv4, of the least priority number there is: those of one priority are in the order in which they were
/// made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Only of what is made here, and is for this address.
    pub to: Option<Ipv4Addr>,
    /// Where to look for a route.
    pub table: u32,
}

impl Netlink {
    /// Sends what is for `to` out of an interface, as from `source`, in a table that rules name.
    pub fn add_route_of_table(
        &self,
        table: u32,
        to: Ipv4Addr,
        source: Ipv4Addr,
        index: u32,
    ) -> Result<(), Errno> {
        let mut request = Request::new(RTM_NEWROUTE, NEW);
        // struct rtmsg, whose byte for a table is too small.
        request.0.extend([AF_INET as u8, 32, 0, 0]);
        request
            .0
            .extend([0, RTPROT_STATIC, RT_SCOPE_LINK, RTN_UNICAST]);
        request.0.extend([0; 4]);
        request.attribute(RTA_DST, &to.octets());
        request.attribute(RTA_PREFSRC, &source.octets());
        request.attribute(RTA_OIF, &index.to_ne_bytes());
        request.attribute(RTA_TABLE, &table.to_ne_bytes());
        self.ask(request)
    }

    /// Makes a rule, behind those of its priority.
    pub fn add_rule(&self, rule: &Rule) -> Result<(), Errno> {
        // Also where there is the same one already.
        self.rule(RTM_NEWRULE, NLM_F_CREATE, rule)
    }

    /// Removes the first such rule.
    pub fn remove_rule(&self, rule: &Rule) -> Result<(), Errno> {
        self.rule(RTM_DELRULE, 0, rule)
    }

    fn rule(&self, kind: u16, flags: i32, rule: &Rule) -> Result<(), Errno> {
        let mut request = Request::new(kind, flags);
        let length = if rule.to.is_some() { 32 } else { 0 };
        // struct fib_rule_hdr
        request.0.extend([AF_INET as u8, length, 0, 0]);
        request.0.extend([0, 0, 0, FR_ACT_TO_TBL, 0, 0, 0, 0]);
        if let Some(to) = rule.to {
            request.attribute(FRA_DST, &to.octets());
            request.name(FRA_IIFNAME, "lo");
        }
        request.attribute(FRA_PRIORITY, &[0; 4]);
        request.attribute(FRA_TABLE, &rule.table.to_ne_bytes());
        self.ask(request)
    }

    /// All rules for IPv4, in their order: the table, and whether it is of the least priority number.
    pub fn rules(&self) -> Result<Vec<(u32, bool)>, Errno> {
        let mut part = [0; 12];
        part[0] = AF_INET as u8;
        let rules = self.list_of(RTM_GETRULE, &part)?;
        let of = |it: &Listed| Some((it.number(FRA_TABLE)?, it.number(FRA_PRIORITY).is_none()));
        Ok(rules.iter().filter_map(of).collect())
    }

    /// How many rules of the least priority number lead to `table`.
    pub fn count_first(&self, table: u32) -> Result<usize, Errno> {
        let rules = self.rules()?;
        Ok(rules.iter().filter(|it| **it == (table, true)).count())
    }
}
