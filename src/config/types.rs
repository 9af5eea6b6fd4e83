//! The wire format: Firecracker's JSON, as plain structs.

use std::collections::BTreeMap;

use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::cpu::CpuConfig;
use super::json::{object, optional_object};
use super::mac::Mac;
use super::source::Source;
use crate::log::Level;

/// `PUT /boot-source`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct BootSource {
    /// The kernel: an ELF `vmlinux`.
    pub kernel_image_path: Source,
    /// An initial RAM disk.
    #[serde(default)]
    pub initrd_path: Option<Source>,
    /// The kernel command line; the default one when absent or null.
    #[serde(default)]
    pub boot_args: Option<String>,
}

/// `PUT /machine-config` and its answer.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// 1 to 32.
    pub vcpu_count: u8,
    /// Guest memory in MiB.
    pub mem_size_mib: u64,
    /// Two threads a core.
    #[serde(default)]
    pub smt: bool,
    /// Taken for old clients' sake; never reported.
    #[serde(default, skip_serializing)]
    pub cpu_template: Option<CpuTemplate>,
    /// Log the pages the guest writes, for diff snapshots.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// What pages guest memory is made of.
    #[serde(default)]
    pub huge_pages: HugePages,
}

impl Default for MachineConfig {
    fn default() -> Self {
        MachineConfig {
            vcpu_count: 1,
            mem_size_mib: 128,
            smt: false,
            cpu_template: None,
            track_dirty_pages: false,
            huge_pages: HugePages::None,
        }
    }
}

/// The deprecated static CPU templates: of them there is only "None".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CpuTemplate {
    /// No template.
    None,
}

impl<'de> Deserialize<'de> for CpuTemplate {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match String::deserialize(deserializer)?.as_str() {
            "None" => Ok(CpuTemplate::None),
            other => Err(serde::de::Error::custom(format!(
                "`cpu_template` may only be `None`, not `{other}`: static CPU templates are out \
                 of scope, PUT /cpu-config takes their place"
            ))),
        }
    }
}

/// Page size behind guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub enum HugePages {
    /// The host's ordinary pages.
    #[default]
    None,
    /// Ordinary pages that the host may join to transparent huge ones.
    Transparent,
    /// 2 MiB pages from the host's hugetlb pool.
    #[serde(rename = "2M")]
    TwoMib,
}

/// `PATCH /machine-config`: what is absent stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfigUpdate {
    /// See [`MachineConfig`].
    #[serde(default)]
    pub vcpu_count: Option<u8>,
    /// See [`MachineConfig`].
    #[serde(default)]
    pub mem_size_mib: Option<u64>,
    /// See [`MachineConfig`].
    #[serde(default)]
    pub smt: Option<bool>,
    /// See [`MachineConfig`].
    #[serde(default)]
    pub cpu_template: Option<CpuTemplate>,
    /// See [`MachineConfig`].
    #[serde(default)]
    pub track_dirty_pages: Option<bool>,
    /// See [`MachineConfig`].
    #[serde(default)]
    pub huge_pages: Option<HugePages>,
}

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
}

impl Drive {
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

/// Limits by two token buckets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimiterConfig {
    /// Bytes.
    #[serde(default, deserialize_with = "optional_object")]
    pub bandwidth: Option<TokenBucketConfig>,
    /// Operations.
    #[serde(default, deserialize_with = "optional_object")]
    pub ops: Option<TokenBucketConfig>,
}

impl RateLimiterConfig {
    /// What is in force: buckets of nothing are no buckets, and no buckets are no limiter.
    pub fn in_force(limiter: Option<Self>) -> Option<Self> {
        let limiter = limiter?;
        let limiter = RateLimiterConfig {
            bandwidth: limiter.bandwidth.and_then(TokenBucketConfig::in_force),
            ops: limiter.ops.and_then(TokenBucketConfig::in_force),
        };
        (limiter != Self::default()).then_some(limiter)
    }

    /// `limiter` after a PATCH: a bucket that is given takes the old one's place (or removes it,
    /// when it is a bucket of nothing), one that is absent stays as it was.
    pub fn patched(limiter: Option<Self>, update: Option<Self>) -> Option<Self> {
        let old = limiter.unwrap_or_default();
        let new = update.unwrap_or_default();
        Self::in_force(Some(RateLimiterConfig {
            bandwidth: new.bandwidth.or(old.bandwidth),
            ops: new.ops.or(old.ops),
        }))
    }
}

/// One token bucket. A size or refill time of 0 means no bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct TokenBucketConfig {
    /// Tokens the bucket holds.
    pub size: u64,
    /// Tokens given once, on top, at the start.
    #[serde(default)]
    pub one_time_burst: Option<u64>,
    /// Milliseconds in which `size` tokens come back.
    pub refill_time: u64,
}

impl TokenBucketConfig {
    /// Itself, unless it is a bucket of nothing.
    pub fn in_force(self) -> Option<Self> {
        (self.size > 0 && self.refill_time > 0).then_some(TokenBucketConfig {
            one_time_burst: self.one_time_burst.filter(|burst| *burst > 0),
            ..self
        })
    }
}

/// `PUT /logger`: what is absent or null stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Logger {
    /// A file, made when missing, or a FIFO.
    #[serde(default, alias = "fd")]
    pub log_path: Option<Source>,
    /// The least important lines that are still written.
    #[serde(default)]
    pub level: Option<Level>,
    /// Write the level of a line.
    #[serde(default)]
    pub show_level: Option<bool>,
    /// Write the file and line of the code that wrote a line.
    #[serde(default)]
    pub show_log_origin: Option<bool>,
    /// Write only lines of modules whose path begins so.
    #[serde(default)]
    pub module: Option<String>,
}

impl<'de> Deserialize<'de> for Level {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        Level::parse(&name).ok_or_else(|| {
            serde::de::Error::custom(format!(
                "`{name}` is no log level: it takes Off, Error, Warning, Info, Debug or Trace"
            ))
        })
    }
}

impl Serialize for Level {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// `PUT /metrics`. Members that are not known are taken and ignored.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Metrics {
    /// A file, made when missing, or a FIFO: one line of JSON for each flush.
    #[serde(alias = "fd")]
    pub metrics_path: Source,
    /// Write the instance's id into each line.
    #[serde(default)]
    pub emit_id: bool,
    /// Written into each line as they are.
    #[serde(default)]
    pub properties: Option<BTreeMap<String, String>>,
}

/// `PUT /serial`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Serial {
    /// A file or FIFO in place of stdout.
    #[serde(default, alias = "fd")]
    pub serial_out_path: Option<Source>,
    /// Limit on bytes; what exceeds it is dropped and counted.
    #[serde(default, deserialize_with = "optional_object")]
    pub rate_limiter: Option<TokenBucketConfig>,
    /// A socket to make, for clients that want to see the console and to type.
    #[serde(default)]
    pub console_socket: Option<Source>,
}

/// The `cpu-config` section of a config file.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum CpuConfigSource {
    /// A file that holds the masks.
    File(Source),
    /// The masks.
    Inline(#[serde(deserialize_with = "object")] CpuConfig),
}

/// A whole configuration: `--config-file`, `PUT /vm`, and the answer to `GET /vm/config`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct VmConfig {
    /// The machine.
    pub machine_config: Option<MachineConfig>,
    /// The kernel.
    pub boot_source: Option<BootSource>,
    /// The disks, root first.
    pub drives: Vec<Drive>,
    /// The network interfaces.
    pub network_interfaces: Vec<NetworkInterface>,
    /// CPUID and MSR masks; not reported.
    pub cpu_config: Option<CpuConfigSource>,
    /// The log; not reported.
    pub logger: Option<Logger>,
    /// The sink of the metrics; not reported.
    pub metrics: Option<Metrics>,
    /// The console; not reported.
    pub serial: Option<Serial>,
}

impl Serialize for VmConfig {
    /// All sections that Firecracker's clients may look for, those out of scope as null.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        const NULL: Option<()> = None;
        let no_kernel = BootSource {
            kernel_image_path: "".into(),
            initrd_path: None,
            boot_args: None,
        };
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("balloon", &NULL)?;
        map.serialize_entry("drives", &self.drives)?;
        map.serialize_entry(
            "boot-source",
            self.boot_source.as_ref().unwrap_or(&no_kernel),
        )?;
        map.serialize_entry("cpu-config", &NULL)?;
        map.serialize_entry("logger", &NULL)?;
        map.serialize_entry("machine-config", &self.machine_config)?;
        map.serialize_entry("metrics", &NULL)?;
        map.serialize_entry("mmds-config", &NULL)?;
        map.serialize_entry("network-interfaces", &self.network_interfaces)?;
        map.serialize_entry("vsock", &NULL)?;
        map.serialize_entry("entropy", &NULL)?;
        map.serialize_entry("pmem", &[(); 0])?;
        map.serialize_entry("memory-hotplug", &NULL)?;
        map.end()
    }
}
