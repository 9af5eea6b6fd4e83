//! Network interfaces, as control handles them.

use std::io;

use super::limits::{change_number, limiter, limiter_update};
use super::{Kind, check_poll_us, check_queues};
use crate::error::{ActionError, Context};
use crate::files::open::{TAP, link_from};
use crate::seccomp::Category;
use crate::sys::link::Link;
use crate::sys::passed::Passed;
use crate::sys::tap::Tap;
use crate::virtio::PerWorker;
use crate::virtio::net::{self, NetState};
use crate::wire::config::{NetworkInterface, NetworkUpdate, RateLimiterConfig, Source};
use crate::wire::limits::{MTU_MIN, TAP_NAME_MAX};

/// Network interfaces.
#[derive(Debug)]
pub struct Net;

fn refuse(why: String) -> ActionError {
    ActionError(format!("{}{why}", TAP.section))
}

impl Kind for Net {
    type Config = NetworkInterface;
    /// One for each pair of queues.
    type Opened = PerWorker<Link>;
    type Device = net::Net;
    const CATEGORY: Category = Category::Net;
    const THREAD: &'static str = "net";

    fn check<'a>(
        network: &mut NetworkInterface,
        others: impl Iterator<Item = &'a NetworkInterface>,
    ) -> Result<(), ActionError> {
        let id = &network.iface_id;
        // What a descriptor is a tap of is the client's affair: a name says nothing across
        // network namespaces.
        let tap = network.host_dev_name.name().unwrap_or_default();
        let bad = |c: char| c == '/' || c == '\0' || c.is_whitespace();
        if tap.len() > TAP_NAME_MAX || tap.contains(bad) {
            let tap = tap.escape_debug();
            return Err(refuse(format!(
                "host_dev_name `{tap}` of `{id}` is no interface name: it takes at most \
                 {TAP_NAME_MAX} bytes, without `/` and spaces"
            )));
        }
        if let Some(mtu) = network.mtu.filter(|mtu| *mtu < MTU_MIN) {
            return Err(refuse(format!(
                "MTU {mtu} of `{id}` is out of range [68, 65535]"
            )));
        }
        check_poll_us(TAP.section, id, network.poll_us)?;
        check_queues(TAP.section, id, network.queues)?;
        let other_queues = match network.host_dev_name {
            Source::Named(_) => 0,
            Source::Fd(_) => Self::queues(network).saturating_sub(1),
        };
        if network.queue_fds.len() != other_queues
            || network.queue_fds.iter().any(|fd| fd.name().is_some())
        {
            return Err(refuse(format!(
                "`{id}` has {} queues and {} in `queue_fds`: where the tap is a descriptor, give there those of its \
                 other queues, one fewer than `queues`; else nothing",
                Self::queues(network),
                network.queue_fds.len()
            )));
        }
        for other in others.filter(|other| other.iface_id != *id) {
            let used_by = &other.iface_id;
            // An empty name, or one with a `%d`, lets the host choose.
            let chosen = tap.is_empty() || tap.contains('%');
            if !chosen && other.host_dev_name.name() == Some(tap) {
                return Err(refuse(format!(
                    "the tap {tap} of `{id}` is already in use by `{used_by}`"
                )));
            }
            let shared = network
                .guest_mac
                .filter(|mac| other.guest_mac == Some(*mac));
            if let Some(mac) = shared {
                return Err(ActionError(format!(
                    "Network config error: The MAC address is already in use: {mac}, asked for by \
                     `{id}`, belongs to `{used_by}`"
                )));
            }
        }
        network.rx_rate_limiter = RateLimiterConfig::in_force(network.rx_rate_limiter);
        network.tx_rate_limiter = RateLimiterConfig::in_force(network.tx_rate_limiter);
        Ok(())
    }

    fn queues(network: &NetworkInterface) -> usize {
        network.queues.unwrap_or(1).into()
    }

    fn poll_us(network: &NetworkInterface) -> Option<u16> {
        network.poll_us
    }

    // A tap can be attached only once.
    fn reopen(links: &PerWorker<Link>) -> io::Result<Option<PerWorker<Link>>> {
        Self::copy(links).map(Some)
    }

    fn open(
        network: &mut NetworkInterface,
        before: &mut Vec<PerWorker<Link>>,
        passed: &mut Passed,
    ) -> Result<PerWorker<Link>, ActionError> {
        let queues = Self::queues(network);
        let Source::Named(name) = &network.host_dev_name else {
            let mut links = PerWorker::from(link_from(&network.host_dev_name, passed)?);
            for source in &network.queue_fds {
                let link = link_from(source, passed)?;
                let tap = link.tap().filter(|tap| tap.has_queues());
                if tap.is_none_or(|tap| Some(tap.name()) != links.first.name()) {
                    return Err(TAP.wrong(source, "is not another queue of the same tap"));
                }
                links.others.push(link);
            }
            return Ok(links);
        };
        let failed = || format!("{}Open tap device failed", TAP.section);
        let same = |links: &PerWorker<Link>| links.first.name() == Some(name);
        let mut links = match before.iter().position(same) {
            Some(at) => before.swap_remove(at),
            None if queues == 1 => Link::from(Tap::open(name).context(failed())?).into(),
            None => Link::from(Tap::open_queue(name).context(failed())?).into(),
        };
        // The host may have chosen the name.
        let name = links.first.name().unwrap_or(name).to_owned();
        links.others.truncate(queues.saturating_sub(1));
        while links.count() < queues {
            let tap = Tap::open_queue(&name).context(failed())?;
            links.others.push(tap.into());
        }
        network.host_dev_name = Source::Named(name);
        Ok(links)
    }

    fn copy(links: &PerWorker<Link>) -> io::Result<PerWorker<Link>> {
        let others = links.others.iter().map(Link::try_clone);
        Ok(PerWorker {
            first: links.first.try_clone()?,
            others: others.collect::<io::Result<_>>()?,
        })
    }

    fn build(
        network: &NetworkInterface,
        links: PerWorker<Link>,
        states: &PerWorker<NetState>,
        elapsed: u64,
    ) -> io::Result<PerWorker<net::Net>> {
        net::Net::for_pairs(
            links,
            (network.guest_mac.map(|mac| mac.0), network.mtu),
            limiter(network.rx_rate_limiter),
            limiter(network.tx_rate_limiter),
            states,
            elapsed,
        )
    }

    fn check_update(
        network: Option<&NetworkInterface>,
        update: &NetworkUpdate,
    ) -> Result<(), ActionError> {
        match network {
            Some(_) => Ok(()),
            None => Err(ActionError(format!(
                "Network config error: Unable to update the net device: Device not found: `{}`",
                update.iface_id
            ))),
        }
    }

    fn open_update(
        network: &NetworkInterface,
        update: &NetworkUpdate,
        _: &mut Passed,
    ) -> Result<PerWorker<net::Update>, ActionError> {
        let number = change_number();
        PerWorker::try_make(Self::queues(network), |_| {
            Ok(net::Update {
                rx_limits: limiter_update(update.rx_rate_limiter),
                tx_limits: limiter_update(update.tx_rate_limiter),
                number,
            })
        })
    }

    fn note_update(network: &mut NetworkInterface, update: NetworkUpdate) {
        let patched = RateLimiterConfig::patched;
        network.rx_rate_limiter = patched(network.rx_rate_limiter, update.rx_rate_limiter);
        network.tx_rate_limiter = patched(network.tx_rate_limiter, update.tx_rate_limiter);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::config::json;

    fn network(id: &str, tap: &str, rest: &str) -> NetworkInterface {
        let text = format!(r#"{{"iface_id":"{id}","host_dev_name":"{tap}"{rest}}}"#);
        json::parse(text.as_bytes()).unwrap()
    }

    fn check(
        others: &[NetworkInterface],
        mut network: NetworkInterface,
    ) -> Result<(), ActionError> {
        Net::check(&mut network, others.iter())
    }

    #[test]
    fn interface_when_checked_shares_neither_tap_nor_mac() {
        let mac = r#","guest_mac":"AA:00:00:00:00:01""#;
        let mut others = vec![network("a", "tap0", mac)];
        check(&others, network("a", "tap0", mac)).unwrap();
        check(&others, network("b", "tap0", "")).unwrap_err();
        let error = check(&others, network("b", "tap1", mac)).unwrap_err();
        let expected = "The MAC address is already in use: aa:00:00:00:00:01";
        assert!(error.0.contains(expected), "{error}");
        others.push(network("b", "tap1", ""));
        check(&others, network("c", "tap2", "")).unwrap();
        others.push(network("c", "tap%d", ""));
        check(&others, network("d", "tap%d", "")).unwrap();
    }

    #[test]
    fn interface_when_out_of_bounds_is_refused() {
        for (tap, rest, taken) in [
            ("t", r#","mtu":67"#, false),
            ("t", r#","mtu":68"#, true),
            ("t", r#","mtu":65535"#, true),
            ("fifteen_letters", "", true),
            ("sixteen_letters_", "", false),
            ("a/b", "", false),
            ("a b", "", false),
            ("", "", true),
            ("t", r#","poll_us":0"#, true),
            ("t", r#","poll_us":1000"#, true),
            ("t", r#","poll_us":1001"#, false),
        ] {
            let result = check(&[], network("a", tap, rest));
            assert_eq!(result.is_ok(), taken, "{tap} {rest}");
        }
    }

    #[test]
    fn update_when_noted_changes_only_what_it_names() {
        let mut config = network(
            "a",
            "t",
            r#","rx_rate_limiter":{"ops":{"size":2,"refill_time":2}}"#,
        );
        let update: NetworkUpdate = json::parse(br#"{"iface_id":"a"}"#).unwrap();
        assert!(Net::check_update(Some(&config), &update).is_ok());
        assert!(Net::check_update(None, &update).is_err());
        let before = config.clone();
        Net::note_update(&mut config, update);
        assert_eq!(config, before);
        let update = br#"{"iface_id":"a","tx_rate_limiter":{"ops":{"size":1,"refill_time":1}}}"#;
        Net::note_update(&mut config, json::parse(update).unwrap());
        assert!(config.tx_rate_limiter.is_some());
        assert_eq!(config.rx_rate_limiter, before.rx_rate_limiter);
    }
}
