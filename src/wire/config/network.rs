//! `PUT` and `PATCH /network-interfaces/{id}`: a network interface.

use serde::{Deserialize, Serialize};

use super::json::optional_object;
use super::{Backing, DeviceConfig, Mac, RateLimiterConfig, Source};
use crate::wire::limits::QUEUES_MAX;

/// `PUT /network-interfaces/{id}`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkInterface {
    /// Letters, digits and `_`.
    pub iface_id: String,
    /// The tap; made when missing.
    #[serde(alias = "fd")]
    pub host_dev_name: Source,
    /// MAC address of the guest's side; the driver chooses one when absent or null.
    #[serde(default)]
    pub guest_mac: Option<Mac>,
    /// MTU offered to the guest, in bytes: 68 to 65,535.
    #[serde(default)]
    pub mtu: Option<u16>,
    /// Limits on what the guest receives.
    #[serde(default, deserialize_with = "optional_object")]
    pub rx_rate_limiter: Option<RateLimiterConfig>,
    /// Limits on what the guest sends.
    #[serde(default, deserialize_with = "optional_object")]
    pub tx_rate_limiter: Option<RateLimiterConfig>,
    /// How long its thread looks for work before it sleeps, in microseconds: at most
    /// [`POLL_US_MAX`](crate::wire::limits::POLL_US_MAX), 0 for not at all. Reported when it was given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub poll_us: Option<u16>,
    /// How many pairs of queues the guest may use, each with a thread: 1 to
    /// [`QUEUES_MAX`]. Reported when it was given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queues: Option<u16>,
    /// Where the tap is a descriptor: its other queues, one for each pair but the first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub queue_fds: Vec<Source>,
}

impl NetworkInterface {
    /// One on the tap `host_dev_name`, and what clients get who say no more.
    pub fn new(iface_id: impl Into<String>, host_dev_name: Source) -> Self {
        NetworkInterface {
            iface_id: iface_id.into(),
            host_dev_name,
            guest_mac: None,
            mtu: None,
            rx_rate_limiter: None,
            tx_rate_limiter: None,
            poll_us: None,
            queues: None,
            queue_fds: Vec::new(),
        }
    }

    /// Where its tap has a name and it has several queues: names the tap for each of the others, so that each can be
    /// opened in the place of that.
    pub fn name_queues(&mut self) {
        if let Source::Named(_) = &self.host_dev_name {
            let others = usize::from(self.queues.unwrap_or(1)).saturating_sub(1);
            self.queue_fds = vec![self.host_dev_name.clone(); others.min(QUEUES_MAX)];
        }
    }
}

impl DeviceConfig for NetworkInterface {
    type Update = NetworkUpdate;

    fn id(&self) -> &str {
        &self.iface_id
    }

    fn updated(update: &NetworkUpdate) -> &str {
        &update.iface_id
    }

    fn sources(&mut self) -> Vec<(Backing, &mut Source)> {
        let backing = match self.queues {
            None | Some(0 | 1) => Backing::Tap,
            Some(_) => Backing::TapQueue,
        };
        let others = self.queue_fds.iter_mut();
        let sources = std::iter::once(&mut self.host_dev_name).chain(others);
        sources.map(|source| (backing, source)).collect()
    }
}

/// `PATCH /network-interfaces/{id}`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkUpdate {
    /// Which interface.
    pub iface_id: String,
    /// New limits on what the guest receives.
    #[serde(default, deserialize_with = "optional_object")]
    pub rx_rate_limiter: Option<RateLimiterConfig>,
    /// New limits on what the guest sends.
    #[serde(default, deserialize_with = "optional_object")]
    pub tx_rate_limiter: Option<RateLimiterConfig>,
}
