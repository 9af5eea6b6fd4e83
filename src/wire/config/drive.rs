//! `PUT` and `PATCH /drives/{id}`: a disk.

use serde::{Deserialize, Serialize};

use super::json::{JsonError, optional_object};
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

/// Whether the host's page cache has a part in reads and writes of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub enum Cache {
    /// It has none (O_DIRECT). Flushes are offered, whatever the [`CacheType`] is.
    #[serde(rename = "none")]
    Bypassed,
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

/// Where what a guest writes goes: its disk image is only read then, and may be that of others too.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "OverlayBody", untagged)]
pub enum DriveOverlay {
    /// To a file, which keeps it.
    File {
        /// It is made if it is missing.
        path_on_host: Source,
    },
    /// To memory, which goes with the process.
    Memory {
        /// Always true.
        memory: bool,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OverlayBody {
    #[serde(default, alias = "fd")]
    path_on_host: Option<Source>,
    #[serde(default)]
    memory: bool,
}

impl TryFrom<OverlayBody> for DriveOverlay {
    type Error = JsonError;

    fn try_from(body: OverlayBody) -> Result<Self, JsonError> {
        match (body.path_on_host, body.memory) {
            (Some(path_on_host), false) => Ok(DriveOverlay::File { path_on_host }),
            (None, true) => Ok(DriveOverlay::Memory { memory: true }),
            _ => Err(JsonError::new(
                "an overlay has either `path_on_host` (or `fd`), or `memory`, which is true",
            )),
        }
    }
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
    /// Go past the host's page cache. Reported when it was given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<Cache>,
    /// Refuse writes.
    #[serde(default)]
    pub is_read_only: Option<bool>,
    /// The disk image.
    #[serde(alias = "fd")]
    pub path_on_host: Source,
    /// Takes what the guest writes in place of the image.
    #[serde(default, deserialize_with = "optional_object")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overlay: Option<DriveOverlay>,
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
    /// How many queues the guest may use, each with a thread: 1 to
    /// [`QUEUES_MAX`](crate::wire::limits::QUEUES_MAX). Reported when it was given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queues: Option<u16>,
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
        // Under an overlay it is a base, which is only read.
        let read_only = self.read_only() || self.overlay.is_some();
        let mut sources = vec![(Backing::Disk { read_only }, &mut self.path_on_host)];
        if let Some(DriveOverlay::File { path_on_host }) = &mut self.overlay {
            sources.push((Backing::Overlay, path_on_host));
        }
        sources
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
            cache: None,
            is_read_only: None,
            path_on_host,
            overlay: None,
            rate_limiter: None,
            io_engine: None,
            socket: None,
            poll_us: None,
            queues: None,
        }
    }

    /// Whether a guest's flush is offered, and reaches the host's storage.
    pub fn has_flush(&self) -> bool {
        self.cache_type == CacheType::Writeback || self.is_direct()
    }

    /// Whether the host's page cache is gone past.
    pub fn is_direct(&self) -> bool {
        self.cache == Some(Cache::Bypassed)
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
    /// Forget what its overlay holds: the disk is what its base is.
    #[serde(default)]
    pub reset_overlay: bool,
    /// New limits.
    #[serde(default, deserialize_with = "optional_object")]
    pub rate_limiter: Option<RateLimiterConfig>,
}

#[cfg(test)]
mod tests {
    use super::super::json::parse;
    use super::*;

    fn overlay(text: &str) -> Result<Option<DriveOverlay>, JsonError> {
        let drive =
            r#"{"drive_id":"a","is_root_device":true,"path_on_host":"p","overlay":OVERLAY}"#;
        parse::<Drive>(drive.replace("OVERLAY", text).as_bytes()).map(|drive| drive.overlay)
    }

    #[test]
    fn overlay_when_parsed_is_a_file_or_memory() {
        let file = |path_on_host| Some(DriveOverlay::File { path_on_host });
        let memory = Some(DriveOverlay::Memory { memory: true });
        for (text, expected) in [
            (r#"{"path_on_host":"/o"}"#, file("/o".into())),
            (r#"{"fd":3}"#, file(Source::fd(3))),
            (
                r#"{"path_on_host":{"fd":3,"name":"o"}}"#,
                file(Source::passed(3, "o")),
            ),
            (r#"{"path_on_host":"/o","memory":false}"#, file("/o".into())),
            (r#"{"memory":true}"#, memory),
            ("null", None),
        ] {
            let read = overlay(text).unwrap();
            assert_eq!(read, expected, "{text}");
            let Some(read) = read else { continue };
            let written = serde_json::to_string(&read).unwrap();
            assert_eq!(overlay(&written).unwrap(), Some(read));
        }
        let drive = Drive::new("a", "p".into());
        assert!(!serde_json::to_string(&drive).unwrap().contains("overlay"));
    }

    #[test]
    fn cache_when_parsed_is_none_or_absent_and_brings_flushes() {
        let drive = |text: &str| {
            let drive = r#"{"drive_id":"a","is_root_device":true,"path_on_host":"p","cache_type":"Unsafe"MORE}"#;
            parse::<Drive>(drive.replace("MORE", text).as_bytes())
        };
        let none = drive(r#","cache":"none""#).unwrap();
        assert!(none.is_direct() && none.has_flush());
        let written = serde_json::to_string(&none).unwrap();
        assert!(written.contains(r#""cache":"none""#), "{written}");
        assert!(written.contains(r#""cache_type":"Unsafe""#), "{written}");
        for absent in ["", r#","cache":null"#] {
            let absent = drive(absent).unwrap();
            assert!(!absent.is_direct() && !absent.has_flush());
            let written = serde_json::to_string(&absent).unwrap();
            assert!(!written.contains(r#""cache":"#), "{written}");
        }
        for wrong in ["None", "unsafe", "writeback", ""] {
            assert!(drive(&format!(r#","cache":"{wrong}""#)).is_err(), "{wrong}");
        }
    }

    #[test]
    fn overlay_when_wrong_says_why() {
        for (text, reason) in [
            ("{}", "either `path_on_host`"),
            (r#"{"memory":false}"#, "either `path_on_host`"),
            (
                r#"{"memory":true,"path_on_host":"o"}"#,
                "either `path_on_host`",
            ),
            (r#"{"path":"o"}"#, "unknown field `path`"),
            (r#"{"memory":1}"#, "invalid type"),
            (r#"["o"]"#, "expected an object"),
            (r#""o""#, "expected an object"),
        ] {
            let error = overlay(text).unwrap_err().to_string();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }

    #[test]
    fn sources_when_there_is_an_overlay_are_a_base_to_read_and_its_file() {
        let mut drive = Drive::new("a", "p".into());
        let kinds = |drive: &mut Drive| {
            let sources = drive.sources().into_iter();
            sources.map(|(backing, _)| backing).collect::<Vec<_>>()
        };
        assert_eq!(kinds(&mut drive), [Backing::Disk { read_only: false }]);
        drive.overlay = Some(DriveOverlay::Memory { memory: true });
        assert_eq!(kinds(&mut drive), [Backing::Disk { read_only: true }]);
        drive.overlay = Some(DriveOverlay::File {
            path_on_host: "o".into(),
        });
        assert_eq!(
            kinds(&mut drive),
            [Backing::Disk { read_only: true }, Backing::Overlay]
        );
    }
}
