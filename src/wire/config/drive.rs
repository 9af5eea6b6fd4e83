//! `PUT` and `PATCH /drives/{id}`: a disk.

use serde::{Deserialize, Serialize};

use super::json::optional_object;
use super::{Backing, DeviceConfig, RateLimiterConfig, Source};

/// How far a guest's flush reaches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub enum CacheType {
    /// Flushes are not offered to the guest.
    #[default]
    Unsafe,
    /// A guest's flush is an fsync on the host.
    Writeback,
}

/// The engine a client asks for; reported back as asked, whatever serves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub enum IoEngine {
    /// System calls.
    #[default]
    Sync,
    /// io_uring.
    Async,
}

/// `PUT /drives/{id}`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Drive {
    /// Letters, digits and `_`; also the virtio-block serial (first 20 bytes).
    pub drive_id: String,
    /// GPT partition to boot from, with `is_root_device`.
    #[serde(default)]
    pub partuuid: Option<String>,
    /// Whether the kernel mounts it as `/`.
    pub is_root_device: bool,
    /// Flush semantics.
    #[serde(default)]
    pub cache_type: CacheType,
    /// Refuse writes.
    #[serde(default)]
    pub is_read_only: Option<bool>,
    /// The disk image.
    #[serde(alias = "fd")]
    pub path_on_host: Source,
    /// Limits on operations and bandwidth.
    #[serde(default, deserialize_with = "optional_object")]
    pub rate_limiter: Option<RateLimiterConfig>,
    /// The engine asked for.
    #[serde(default)]
    pub io_engine: Option<IoEngine>,
    /// A vhost-user socket: out of scope, so null.
    #[serde(default)]
    pub socket: Option<String>,
    /// How long its thread looks for work before it sleeps, in microseconds: at most
    /// [`POLL_US_MAX`](crate::wire::limits::POLL_US_MAX), 0 for not at all. Reported when it was given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub poll_us: Option<u16>,
}

impl DeviceConfig for Drive {
    type Update = DriveUpdate;

    fn id(&self) -> &str {
        &self.drive_id
    }

    fn updated(update: &DriveUpdate) -> &str {
        &update.drive_id
    }

    fn sources(&mut self) -> Vec<(Backing, &mut Source)> {
        let read_only = self.read_only();
        vec![(Backing::Disk { read_only }, &mut self.path_on_host)]
    }
}

impl Drive {
    /// One with the image at `path_on_host`, and what clients get who say no more.
    pub fn new(drive_id: impl Into<String>, path_on_host: Source) -> Self {
        Drive {
            drive_id: drive_id.into(),
            partuuid: None,
            is_root_device: false,
            cache_type: CacheType::default(),
            is_read_only: None,
            path_on_host,
            rate_limiter: None,
            io_engine: None,
            socket: None,
            poll_us: None,
        }
    }

    /// Whether the guest may only read.
    pub fn read_only(&self) -> bool {
        self.is_read_only.unwrap_or(false)
    }
}

/// `PATCH /drives/{id}`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DriveUpdate {
    /// Which drive.
    pub drive_id: String,
    /// A new disk image.
    #[serde(default, alias = "fd")]
    pub path_on_host: Option<Source>,
    /// New limits.
    #[serde(default, deserialize_with = "optional_object")]
    pub rate_limiter: Option<RateLimiterConfig>,
}
