//! The network of a container engine, for a guest (`--net-from-namespace`): the engine made a network namespace with
//! one interface, its addresses and routes, and the guest takes that interface's place.
//!
//! ```text
//!   engine's network ---- eth0 [namespace] ==redirect== tap "mfguest" ---- guest
//!                        its addresses stay, and reach       the same MAC address,
//!                        nothing: all that comes goes on     addresses and routes
//! ```
//!
//! A process of its own goes into the namespace, makes the tap and the redirects, and stays: it takes them back when
//! the supervisor closes its channel, or is killed. The tap goes with its last descriptor. What one that was killed
//! has left is known by the priority of its filter, and the next one puts its own in its place; it holds the namespace
//! meanwhile, so that one that ends late takes nothing back that is another's.

mod reach;

use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use libc::{RT_SCOPE_UNIVERSE, RT_TABLE_MAIN, RTN_UNICAST, RTPROT_KERNEL};
use libc::{RTM_GETADDR, RTM_GETLINK, RTM_GETROUTE};
use mayfly::wire::tap::{self, Tap, TapError};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::Pid;

use self::reach::Reach;
use super::netlink::{Listed, Netlink};
use crate::error::{Advice as _, AnyError, Step as _, message};
use crate::netns::NetNs;
use crate::run::agent::{Address, Interface, Route};
use crate::run::channel::Channel;
use crate::run::spec::resources::tun_remedy;
use crate::sys;

/// The tap's name in the namespace.
const TAP: &str = "mfguest";
/// From that process: what it found, and the tap; or the message of an error.
const FOUND: u8 = b'+';
const FAILED: u8 = b'-';

/// How long the process of a microVM that has ended may take to take its redirects back.
const PATIENCE: Duration = Duration::from_secs(10);

const WHAT: &str = "take over the network of the namespace (--net-from-namespace)";

/// What the process is told.
#[derive(Clone, Debug)]
struct Order {
    path: PathBuf,
    /// Programs of the namespace reach the guest.
    is_reachable: bool,
}

/// The hold on that process.
#[derive(Debug)]
pub struct Redirected {
    channel: Option<Channel>,
    pid: Pid,
}

impl Drop for Redirected {
    fn drop(&mut self) {
        // Which ends it.
        self.channel = None;
        let _ = sys::wait(self.pid);
    }
}

/// Takes over the network of a namespace, if it has one: the tap, what the guest is to have, and the hold on both.
pub fn take_over(
    path: &Path,
    is_reachable: bool,
    supervisor: BorrowedFd<'_>,
) -> Result<Option<(OwnedFd, Interface, Redirected)>, AnyError> {
    let (channel, theirs) = Channel::pair().step(WHAT)?;
    let order = Order {
        path: path.to_owned(),
        is_reachable,
    };
    let pid = sys::fork_apart(theirs.into(), supervisor, &order, stay).step(WHAT)?;
    let told = channel.receive().step(WHAT)?;
    let redirected = Redirected {
        channel: Some(channel),
        pid,
    };
    let Some(told) = told else {
        return Err(
            "cannot take over the network (--net-from-namespace): the process that does was killed"
                .into(),
        );
    };
    if told.kind != FOUND {
        return Err(told.text.into());
    }
    let Some(tap) = told.files.into_iter().next() else {
        return Ok(None);
    };
    let interface = serde_json::from_str(&told.text).step(WHAT)?;
    Ok(Some((tap, interface, redirected)))
}

/// The life of that process.
fn stay(closed: Result<(), Errno>, channel: OwnedFd, supervisor: BorrowedFd<'_>, order: &Order) {
    let channel = Channel::from(channel);
    let made = closed
        .step(WHAT)
        .map_err(AnyError::from)
        .and_then(|()| make(order));
    let told = match &made {
        Ok(Some(made)) => {
            let text = serde_json::json!(made.found).to_string();
            channel.send(FOUND, &text, &[std::os::fd::AsFd::as_fd(&made.tap)])
        }
        Ok(None) => channel.send(FOUND, "", &[]),
        Err(error) => channel.send(FAILED, &message(&**error), &[]),
    };
    let Ok(Some(Made {
        index,
        tap,
        reach,
        namespace: _held,
        ..
    })) = made
    else {
        return;
    };
    drop(tap);
    if told.is_ok() {
        let _ = sys::leave_standard_streams();
        let ends = [std::os::fd::AsFd::as_fd(&channel), supervisor];
        let mut ends = ends.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        let _ = rustix::io::retry_on_intr(|| poll(&mut ends, None));
    }
    // The namespace is the caller's, who may want to use it otherwise.
    let Ok(netlink) = Netlink::open() else {
        return;
    };
    if let Some(reach) = reach {
        reach.close(&netlink);
    }
    let _ = netlink.remove_redirect(index);
}

/// What the guest needs.
struct Made {
    /// The interface whose place it takes.
    index: u32,
    tap: OwnedFd,
    found: Interface,
    /// The way to it from the namespace.
    reach: Option<Reach>,
    /// Held, so that nothing else takes it over.
    namespace: NetNs,
}

/// Goes into the namespace, and makes what the guest needs; none where there is no network.
fn make(order: &Order) -> Result<Option<Made>, AnyError> {
    let namespace = NetNs::open(&order.path)?;
    namespace.join()?;
    let netlink = Netlink::open().step(WHAT)?;
    let Some((index, mut found)) = look(&netlink).step(WHAT)? else {
        return Ok(None);
    };
    let tun = tap::open_tun()
        .step("open /dev/net/tun")
        .hints(tun_remedy)?;
    let tap = Tap::attach(tun, TAP);
    let is_taken = matches!(tap, Err(TapError::Busy(_)));
    let tap = tap.step("make a tap in the network namespace (--net-from-namespace)");
    let tap = match is_taken {
        true => tap.advise(
            "another microVM has this network: give each a namespace of its own, or start one when the other has ended",
        )?,
        false => tap?,
    };
    // No microVM has the network now, or there would have been such a tap; one may be about to have ended.
    namespace.hold(PATIENCE)?;
    // The tap has no use for an address of its own.
    let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{TAP}/disable_ipv6"), "1");
    let redirect = || {
        let guest = netlink.index(TAP)?;
        netlink.set_up_with_mtu(guest, found.mtu)?;
        netlink.redirect(guest, index)?;
        redirect_anew(&netlink, index, guest)
    };
    let remedy = |answer| match answer {
        Errno::EXIST => Some(
            "its interface has an ingress queueing discipline already: `tc qdisc del dev IFACE ingress`",
        ),
        Errno::NOENT => Some(
            "this kernel lacks one of CONFIG_NET_SCH_INGRESS, CONFIG_NET_CLS_U32 and CONFIG_NET_ACT_MIRRED: load it with \
             `modprobe`",
        ),
        _ => None,
    };
    let redirected = redirect();
    if redirected.is_err() && redirected != Err(Errno::EXIST) {
        let _ = netlink.remove_redirect(index);
    }
    redirected.step(WHAT).hints(remedy)?;
    let reach = match order.is_reachable {
        true => netlink
            .index(TAP)
            .and_then(|tap| reach::open(&netlink, tap, &mut found)),
        false => Ok(None),
    };
    if reach.is_err() {
        let _ = netlink.remove_redirect(index);
    }
    let reach = reach
        .step("make a way to the guest in the network namespace (--reach-from-namespace)")
        .hint(
            Errno::OPNOTSUPP,
            "this kernel lacks CONFIG_IP_MULTIPLE_TABLES",
        )?;
    Ok(Some(Made {
        index,
        tap: tap.into(),
        found,
        reach,
        namespace,
    }))
}

/// Redirects what comes in by an interface, in place of a redirect of ours that was left there.
fn redirect_anew(netlink: &Netlink, from: u32, to: u32) -> Result<(), Errno> {
    match netlink.redirect(from, to) {
        Err(Errno::EXIST) if netlink.is_redirected(from)? => {
            netlink.remove_redirect(from)?;
            netlink.redirect(from, to)
        }
        other => other,
    }
}

/// The interface that is not the loopback: the one with a default route, if there are several.
fn look(netlink: &Netlink) -> Result<Option<(u32, Interface)>, Errno> {
    /// `ARPHRD_ETHER`.
    const ETHERNET: u16 = 1;
    const ADDRESS: u16 = 1;
    const MTU: u16 = 4;
    let links = netlink.list(RTM_GETLINK, 16)?;
    let routes = netlink.list(RTM_GETROUTE, 12)?;
    let addresses = netlink.list(RTM_GETADDR, 8)?;
    let word = |it: &Listed, at: usize| {
        let bytes = it.fixed.get(at..).and_then(|it| it.first_chunk());
        bytes.map_or(0, |it| u32::from_ne_bytes(*it))
    };
    let routes_of = |index: u32| routes.iter().filter_map(move |it| route(it, index));
    let mut found: Vec<_> = links
        .iter()
        .filter(|it| {
            let kind = it.fixed.get(2..).and_then(|it| it.first_chunk());
            let is_up = word(it, 8) & libc::IFF_UP as u32 != 0;
            is_up && kind.map(|it| u16::from_ne_bytes(*it)) == Some(ETHERNET)
        })
        .filter_map(|it| {
            let mac = <[u8; 6]>::try_from(it.attribute(ADDRESS)?).ok()?;
            Some((word(it, 4), mac, it.number(MTU)?))
        })
        .collect();
    let has_default = |index: u32| routes_of(index).any(|route| route.to.prefix == 0);
    found.sort_by_key(|(index, ..)| !has_default(*index));
    let Some((index, mac, mtu)) = found.into_iter().next() else {
        return Ok(None);
    };
    let mut routes: Vec<_> = routes_of(index).collect();
    // A gateway may be reached by another of them.
    routes.sort_by_key(|route| !route.gateway.is_empty());
    let addresses = addresses.iter().filter_map(|it| address(it, index));
    let found = Interface {
        mac,
        mtu,
        addresses: addresses.collect(),
        routes,
    };
    Ok(Some((index, found)))
}

/// An address of an interface that others reach it by.
fn address(listed: &Listed, index: u32) -> Option<Address> {
    const ADDRESS: u16 = 1;
    const LOCAL: u16 = 2;
    let [_, prefix, _, scope, number @ ..] = *listed.fixed.first_chunk::<8>()?;
    let is_ours = u32::from_ne_bytes(number) == index && scope == RT_SCOPE_UNIVERSE;
    let bytes = listed.attribute(LOCAL).or(listed.attribute(ADDRESS))?;
    let bytes = bytes.to_vec();
    (is_ours && matches!(bytes.len(), 4 | 16)).then_some(Address { bytes, prefix })
}

/// A route by an interface; not those that come with its addresses.
fn route(listed: &Listed, index: u32) -> Option<Route> {
    const TO: u16 = 1;
    const OUT: u16 = 4;
    const GATEWAY: u16 = 5;
    let [family, prefix, _, _, table, protocol, _, kind, ..] = *listed.fixed.first_chunk::<12>()?;
    let size = match i32::from(family) {
        libc::AF_INET => 4,
        libc::AF_INET6 => 16,
        _ => return None,
    };
    let is_ours = listed.number(OUT) == Some(index)
        && (table, kind) == (RT_TABLE_MAIN, RTN_UNICAST)
        && protocol != RTPROT_KERNEL;
    let bytes = listed.attribute(TO).map_or(vec![0; size], <[u8]>::to_vec);
    let gateway = listed.attribute(GATEWAY).unwrap_or_default().to_vec();
    is_ours.then_some(Route {
        to: Address { bytes, prefix },
        gateway,
    })
}

#[cfg(test)]
pub mod tests {
    use rustix::thread::UnshareFlags;

    use super::*;

    /// Two ends of a cable in a new network namespace of the test's thread; nothing where none may be made.
    pub fn cable() -> Option<(Netlink, u32, u32)> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIPPED: it makes a network namespace, which only root may");
            return None;
        }
        sys::unshare(UnshareFlags::NEWNET).unwrap();
        let thread = rustix::thread::gettid().as_raw_nonzero().get();
        let netlink = Netlink::open().unwrap();
        netlink.make_cable("mfa", "mfb", thread).unwrap();
        let [a, b] = ["mfa", "mfb"].map(|end| netlink.index(end).unwrap());
        Some((netlink, a, b))
    }

    #[test]
    fn redirect_that_was_left_is_replaced_and_that_of_another_program_is_not() {
        let Some((netlink, a, b)) = cable() else {
            return;
        };
        assert_eq!(netlink.is_redirected(a), Ok(false));
        redirect_anew(&netlink, a, b).unwrap();
        assert_eq!(netlink.is_redirected(a), Ok(true));
        assert_eq!(netlink.redirect(a, b), Err(Errno::EXIST));
        redirect_anew(&netlink, a, b).unwrap();
        assert_eq!(netlink.is_redirected(a), Ok(true));
        netlink.remove_redirect(a).unwrap();
        netlink.redirect_with(1, a, b).unwrap();
        assert_eq!(netlink.is_redirected(a), Ok(false));
        assert_eq!(redirect_anew(&netlink, a, b), Err(Errno::EXIST));
        assert_eq!(netlink.remove_redirect(a), Ok(()), "it is still there");
    }
}
