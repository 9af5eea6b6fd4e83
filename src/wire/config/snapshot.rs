//! `PUT /snapshot/create` and `PUT /snapshot/load`, and the section `snapshot` of `PUT /vm`.

use serde::{Deserialize, Serialize};

use super::cpu::CpuConfig;
use super::json::{JsonError, object, objects, optional_object};
use super::{
    BootSource, Devices, DriveOverlay, Logger, Mac, MachineConfig, Metrics, PassedFd, Serial,
    Source,
};

/// Which kind of snapshot to take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub enum SnapshotType {
    /// What was written to memory since the last snapshot.
    Diff,
    /// All of memory.
    #[default]
    Full,
    /// All of memory, without copying it while the guest stands still: it needs shared memory.
    Fork,
}

/// `PUT /snapshot/create`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "CreateBody")]
pub struct SnapshotCreate {
    /// Which kind.
    pub snapshot_type: SnapshotType,
    /// Where the machine's state goes.
    pub snapshot_path: Source,
    /// Where memory goes. There is one unless it is a fork.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mem_file_path: Option<Source>,
    /// The /proc/PID/pagemap of this process, which tells which pages hold something, where there is
    /// no /proc.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pagemap: Option<PassedFd>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CreateBody {
    #[serde(default)]
    snapshot_type: SnapshotType,
    snapshot_path: Source,
    mem_file_path: Option<Source>,
    pagemap: Option<PassedFd>,
}

impl TryFrom<CreateBody> for SnapshotCreate {
    type Error = JsonError;

    fn try_from(body: CreateBody) -> Result<Self, JsonError> {
        let CreateBody {
            snapshot_type,
            snapshot_path,
            mem_file_path,
            pagemap,
        } = body;
        if mem_file_path.is_none() && snapshot_type != SnapshotType::Fork {
            return Err(JsonError::new("missing field `mem_file_path`"));
        }
        Ok(SnapshotCreate {
            snapshot_type,
            snapshot_path,
            mem_file_path,
            pagemap,
        })
    }
}

/// What of a configuration lasts longer than its process: a snapshot's state has it under `config`.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct SavedConfig {
    /// The machine.
    pub machine: MachineConfig,
    /// What it booted from. Nothing of it is opened again.
    pub boot_source: Option<BootSource>,
    /// CPUID and MSR masks. The registers have them; CPUID is compared with the host's by them.
    #[serde(default)]
    pub cpu: Option<CpuConfig>,
    /// Disks and network interfaces.
    pub devices: Devices,
}

/// How guest memory gets its content after a load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub enum MemoryBackendType {
    /// From the memory file, as pages are touched.
    File,
    /// From another process, which listens on a Unix socket and gets a userfaultfd.
    Uffd,
}

/// Where guest memory gets its content from.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryBackend {
    /// The memory file, or the socket.
    pub backend_path: Source,
    /// Which of them it is.
    pub backend_type: MemoryBackendType,
}

/// A network interface that gets another tap than the one it was saved with.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct NetworkOverride {
    /// Which interface.
    pub iface_id: String,
    /// Its tap.
    #[serde(alias = "fd")]
    pub host_dev_name: Source,
    /// Where that is a descriptor: the tap's other queues, one for each pair but the first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub queue_fds: Vec<Source>,
    /// The MAC address that the device tells of from now on. A driver that runs does not ask again: the guest has to
    /// set it as well.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_mac: Option<Mac>,
}

/// A disk that gets another image, or another overlay, than it was saved with; one of them is there.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "OverrideBody")]
pub struct DriveOverride {
    /// Which disk.
    pub drive_id: String,
    /// Its image: of the same content, or the guest will find its file system damaged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path_on_host: Option<Source>,
    /// Its overlay: a copy of the one it was saved with; or a new one, over a disk that was saved without.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overlay: Option<DriveOverlay>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OverrideBody {
    drive_id: String,
    #[serde(default, alias = "fd")]
    path_on_host: Option<Source>,
    #[serde(default, deserialize_with = "optional_object")]
    overlay: Option<DriveOverlay>,
}

impl TryFrom<OverrideBody> for DriveOverride {
    type Error = JsonError;

    fn try_from(body: OverrideBody) -> Result<Self, JsonError> {
        if body.path_on_host.is_none() && body.overlay.is_none() {
            return Err(JsonError::new("missing field `path_on_host`"));
        }
        Ok(DriveOverride {
            drive_id: body.drive_id,
            path_on_host: body.path_on_host,
            overlay: body.overlay,
        })
    }
}

/// What pages guest memory is made of after a load.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub enum LoadPages {
    /// Those that it had when it was saved.
    #[default]
    Snapshot,
    /// The host's ordinary pages.
    None,
    /// Ordinary pages that the host may join to transparent huge ones.
    Transparent,
    /// 2 MiB pages from the host's hugetlb pool.
    #[serde(rename = "2M")]
    TwoMib,
}

impl LoadPages {
    fn is_default(&self) -> bool {
        *self == LoadPages::Snapshot
    }
}

/// `PUT /snapshot/load`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "LoadBody")]
pub struct SnapshotLoad {
    /// The machine's state.
    pub snapshot_path: Source,
    /// Its memory.
    pub mem_backend: MemoryBackend,
    /// Log the pages the guest writes, for diff snapshots.
    pub track_dirty_pages: bool,
    /// Let the guest run when all of it was loaded.
    pub resume_vm: bool,
    /// Interfaces that get another tap.
    pub network_overrides: Vec<NetworkOverride>,
    /// Disks that get another image.
    pub drive_overrides: Vec<DriveOverride>,
    /// Let the guest's paravirtual clock have advanced by the time that has passed since.
    pub clock_realtime: bool,
    /// What pages guest memory is made of.
    #[serde(skip_serializing_if = "LoadPages::is_default")]
    pub huge_pages: LoadPages,
    /// Which pages the guest needs first: brought in at once if this file is there, else recorded in it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub working_set: Option<Source>,
    /// The /proc/PID/pagemap of this process, for that record, where there is no /proc.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pagemap: Option<PassedFd>,
    /// Load it on a host whose CPU differs from the one it was saved on, at the risk of the guest.
    pub ignore_cpu_differences: bool,
    /// Members were used that clients should stop using.
    #[serde(skip)]
    pub is_deprecated: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LoadBody {
    snapshot_path: Source,
    mem_file_path: Option<Source>,
    #[serde(default, deserialize_with = "optional_object")]
    mem_backend: Option<MemoryBackend>,
    #[serde(default)]
    enable_diff_snapshots: bool,
    #[serde(default)]
    track_dirty_pages: bool,
    #[serde(default)]
    resume_vm: bool,
    #[serde(default, deserialize_with = "objects")]
    network_overrides: Vec<NetworkOverride>,
    #[serde(default, deserialize_with = "objects")]
    drive_overrides: Vec<DriveOverride>,
    vsock_override: Option<serde_json::Value>,
    #[serde(default)]
    clock_realtime: bool,
    #[serde(default)]
    huge_pages: LoadPages,
    working_set: Option<Source>,
    pagemap: Option<PassedFd>,
    #[serde(default)]
    ignore_cpu_differences: bool,
}

impl TryFrom<LoadBody> for SnapshotLoad {
    type Error = JsonError;

    fn try_from(body: LoadBody) -> Result<Self, JsonError> {
        // Firecracker's words.
        let (mem_backend, by_path) = match (body.mem_backend, body.mem_file_path) {
            (Some(_), Some(_)) => {
                return Err(JsonError::new(
                    "too many fields: either `mem_backend` or `mem_file_path` exclusively is \
                     required",
                ));
            }
            (None, None) => {
                return Err(JsonError::new(
                    "missing field: either `mem_backend` or `mem_file_path` is required",
                ));
            }
            (Some(backend), None) => (backend, false),
            (None, Some(backend_path)) => {
                let backend_type = MemoryBackendType::File;
                let backend = MemoryBackend {
                    backend_path,
                    backend_type,
                };
                (backend, true)
            }
        };
        if body.vsock_override.is_some() {
            return Err(JsonError::new(
                "`vsock_override` is out of scope: this monitor does not offer a vsock device",
            ));
        }
        Ok(SnapshotLoad {
            snapshot_path: body.snapshot_path,
            mem_backend,
            track_dirty_pages: body.track_dirty_pages || body.enable_diff_snapshots,
            resume_vm: body.resume_vm,
            network_overrides: body.network_overrides,
            drive_overrides: body.drive_overrides,
            clock_realtime: body.clock_realtime,
            huge_pages: body.huge_pages,
            working_set: body.working_set,
            pagemap: body.pagemap,
            ignore_cpu_differences: body.ignore_cpu_differences,
            is_deprecated: by_path || body.enable_diff_snapshots,
        })
    }
}

impl SnapshotLoad {
    /// Loads the state and the memory file, with nothing else asked for.
    pub fn new(snapshot_path: Source, backend_path: Source) -> Self {
        SnapshotLoad {
            snapshot_path,
            mem_backend: MemoryBackend {
                backend_path,
                backend_type: MemoryBackendType::File,
            },
            track_dirty_pages: false,
            resume_vm: false,
            network_overrides: Vec::new(),
            drive_overrides: Vec::new(),
            clock_realtime: false,
            huge_pages: LoadPages::default(),
            working_set: None,
            pagemap: None,
            ignore_cpu_differences: false,
            is_deprecated: false,
        }
    }
}

/// What is made of a snapshot: `PUT /snapshot/load`, `PUT /vm` with the section `snapshot`, or
/// `--snapshot`.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Restore {
    /// What to load.
    #[serde(rename = "snapshot", deserialize_with = "object")]
    pub load: SnapshotLoad,
    /// The log.
    #[serde(default, deserialize_with = "optional_object")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logger: Option<Logger>,
    /// The sink of the metrics.
    #[serde(default, deserialize_with = "optional_object")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metrics: Option<Metrics>,
    /// The console.
    #[serde(default, deserialize_with = "optional_object")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<Serial>,
    /// The same as `resume_vm` of what is loaded: in the body of `PUT /vm` it has this name too.
    #[serde(default, skip_serializing)]
    start: bool,
    /// It takes the place of all earlier configuration.
    #[serde(skip, default = "replaces")]
    pub replaces: bool,
}

fn replaces() -> bool {
    true
}

impl Restore {
    /// Loads a snapshot into a process that has no configuration of a machine yet.
    pub fn new(load: SnapshotLoad) -> Self {
        Restore {
            load,
            logger: None,
            metrics: None,
            serial: None,
            start: false,
            replaces: false,
        }
    }

    /// Reads the body of `PUT /vm`, where it has the section `snapshot`.
    ///
    /// # Errors
    /// A wrong member, or a section that a snapshot has itself.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, JsonError> {
        let mut read: Restore = super::json::parse(bytes)?;
        read.load.resume_vm |= read.start;
        read.start = false;
        Ok(read)
    }

    /// As a body of `PUT /vm`.
    pub fn to_request(&self) -> String {
        // Nothing in it is what JSON does not have.
        serde_json::to_string(self).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::super::json::parse;
    use super::*;

    fn create(text: &str) -> Result<SnapshotCreate, JsonError> {
        parse(text.as_bytes())
    }

    fn load(text: &str) -> Result<SnapshotLoad, JsonError> {
        parse(text.as_bytes())
    }

    #[test]
    fn create_when_good_is_taken() {
        let read = create(r#"{"snapshot_path":"s","mem_file_path":"m"}"#).unwrap();
        assert_eq!(
            read,
            SnapshotCreate {
                snapshot_type: SnapshotType::Full,
                snapshot_path: "s".into(),
                mem_file_path: Some("m".into()),
                pagemap: None,
            }
        );
        let read = r#"{"snapshot_type":"Diff","snapshot_path":{"fd":0},"mem_file_path":{"fd":1}}"#;
        let read = create(read).unwrap();
        assert_eq!(read.snapshot_type, SnapshotType::Diff);
        assert_eq!(read.mem_file_path, Some(Source::fd(1)));
        let read = create(r#"{"snapshot_type":"Fork","snapshot_path":"s"}"#).unwrap();
        assert_eq!(read.mem_file_path, None);
        for text in [
            r#"{"snapshot_type":"Fork","snapshot_path":"s"}"#,
            r#"{"snapshot_type":"Diff","snapshot_path":{"fd":0},"mem_file_path":"m"}"#,
            r#"{"snapshot_type":"Full","snapshot_path":"s","mem_file_path":"m","pagemap":{"fd":0}}"#,
        ] {
            let read = create(text).unwrap();
            assert_eq!(serde_json::to_string(&read).unwrap(), text);
        }
    }

    #[test]
    fn create_when_bad_says_why() {
        for (text, reason) in [
            (r#"{"mem_file_path":"m"}"#, "missing field `snapshot_path`"),
            (r#"{"snapshot_path":"s"}"#, "missing field `mem_file_path`"),
            (
                r#"{"snapshot_type":"Diff","snapshot_path":"s","mem_file_path":null}"#,
                "missing field `mem_file_path`",
            ),
            (
                r#"{"snapshot_path":"s","mem_file_path":"m","version":"1.0.0"}"#,
                "unknown field `version`",
            ),
            (
                r#"{"snapshot_path":"s","mem_file_path":"m","snapshot_type":"Half"}"#,
                "unknown variant `Half`, expected one of `Diff`, `Full`, `Fork`",
            ),
            (r#"{"snapshot_path":null,"mem_file_path":"m"}"#, "a string"),
            (r#"["Full","s","m"]"#, "expected an object"),
        ] {
            let error = create(text).unwrap_err().to_string();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }

    #[test]
    fn load_when_good_is_taken() {
        let plain = load(
            r#"{"snapshot_path":"s","mem_backend":{"backend_type":"File","backend_path":"m"}}"#,
        )
        .unwrap();
        assert_eq!(plain, SnapshotLoad::new("s".into(), "m".into()));
        let by_path = load(r#"{"snapshot_path":"s","mem_file_path":"m"}"#).unwrap();
        assert!(by_path.is_deprecated);
        let is_deprecated = true;
        assert_eq!(
            by_path,
            SnapshotLoad {
                is_deprecated,
                ..plain.clone()
            }
        );
        let tracking = load(
            r#"{"snapshot_path":"s","enable_diff_snapshots":true,
                "mem_backend":{"backend_type":"File","backend_path":"m"}}"#,
        )
        .unwrap();
        assert!(tracking.track_dirty_pages && tracking.is_deprecated);
        let all = load(
            r#"{"snapshot_path":{"fd":0,"name":"s"},
                "mem_backend":{"backend_type":"Uffd","backend_path":{"fd":1}},
                "track_dirty_pages":true,"resume_vm":true,"clock_realtime":true,
                "network_overrides":[{"iface_id":"e","host_dev_name":"t","more":1},
                  {"iface_id":"f","fd":2,"guest_mac":"06:00:00:00:00:01"}],
                "drive_overrides":[{"drive_id":"a","path_on_host":"p"},
                  {"drive_id":"b","path_on_host":{"fd":3}},{"drive_id":"c","fd":4}],
                "vsock_override":null,"mem_file_path":null,"huge_pages":"2M","working_set":"w",
                "ignore_cpu_differences":true}"#,
        )
        .unwrap();
        assert_eq!(all.mem_backend.backend_type, MemoryBackendType::Uffd);
        assert_eq!(all.network_overrides[1].host_dev_name, Source::fd(2));
        assert_eq!(all.network_overrides[0].guest_mac, None);
        let mac = Some(Mac([6, 0, 0, 0, 0, 1]));
        assert_eq!(all.network_overrides[1].guest_mac, mac);
        assert_eq!(all.drive_overrides[2].path_on_host, Some(Source::fd(4)));
        assert_eq!(all.huge_pages, LoadPages::TwoMib);
        assert!(all.track_dirty_pages && all.resume_vm && all.clock_realtime);
        assert!(all.ignore_cpu_differences && !all.is_deprecated);
        for read in [plain, all] {
            let text = serde_json::to_string(&read).unwrap();
            assert_eq!(load(&text), Ok(read), "{text}");
        }
    }

    #[test]
    fn load_when_bad_says_why() {
        let with = |rest: &str| format!(r#"{{"snapshot_path":"s","mem_file_path":"m",{rest}}}"#);
        for (text, reason) in [
            (
                r#"{"snapshot_path":"s"}"#.to_owned(),
                "missing field: either `mem_backend` or `mem_file_path` is required",
            ),
            (
                with(r#""mem_backend":{"backend_type":"File","backend_path":"m"}"#),
                "too many fields: either `mem_backend` or `mem_file_path` exclusively is required",
            ),
            (
                with(r#""mem_backend":{"backend_path":"m"}"#),
                "missing field `backend_type`",
            ),
            (with(r#""mem_backend":["m","File"]"#), "expected an object"),
            (
                r#"{"mem_file_path":"m"}"#.to_owned(),
                "missing field `snapshot_path`",
            ),
            (
                with(r#""huge_pages":"1M""#),
                "unknown variant `1M`, expected one of `Snapshot`, `None`, `Transparent`, `2M`",
            ),
            (
                with(r#""vsock_override":{"uds_path":"v"}"#),
                "`vsock_override` is out of scope",
            ),
            (with(r#""resume_vm":null"#), "null"),
            (with(r#""network_overrides":null"#), "null"),
            (
                with(r#""network_overrides":[{"iface_id":"e"}]"#),
                "missing field `host_dev_name`",
            ),
            (
                with(r#""drive_overrides":[{"drive_id":"a"}]"#),
                "missing field `path_on_host`",
            ),
            (
                with(r#""drive_overrides":[{"drive_id":"a","fd":1,"is_read_only":true}]"#),
                "unknown field `is_read_only`",
            ),
            (with(r#""version":"1""#), "unknown field `version`"),
        ] {
            let error = load(&text).unwrap_err().to_string();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }
}
