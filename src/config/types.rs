//! The wire format: Firecracker's JSON, as plain structs.

use serde::{Deserialize, Serialize};

/// `PUT /boot-source`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct BootSource {
    /// The kernel: an ELF `vmlinux`.
    pub kernel_image_path: String,
    /// An initial RAM disk.
    #[serde(default)]
    pub initrd_path: Option<String>,
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
    /// Log the pages the guest writes, for diff snapshots.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// What pages guest memory is made of.
    #[serde(default)]
    pub huge_pages: HugePages,
}

/// Page size behind guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub enum HugePages {
    /// The host's ordinary pages.
    #[default]
    None,
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
    /// The disk image.
    pub path_on_host: String,
    /// Whether the kernel mounts it as `/`.
    pub is_root_device: bool,
    /// GPT partition to boot from, with `is_root_device`.
    #[serde(default)]
    pub partuuid: Option<String>,
    /// Refuse writes.
    #[serde(default)]
    pub is_read_only: Option<bool>,
    /// Flush semantics.
    #[serde(default)]
    pub cache_type: CacheType,
    /// Limits on operations and bandwidth.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiterConfig>,
    /// The engine asked for.
    #[serde(default)]
    pub io_engine: Option<IoEngine>,
}

/// `PATCH /drives/{id}`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DriveUpdate {
    /// Which drive.
    pub drive_id: String,
    /// A new disk image.
    #[serde(default)]
    pub path_on_host: Option<String>,
    /// New limits.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiterConfig>,
}

/// `PUT /network-interfaces/{id}`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkInterface {
    /// Letters, digits and `_`.
    pub iface_id: String,
    /// Name of the tap; made when missing.
    pub host_dev_name: String,
    /// MAC address in the usual notation; kept in lower case.
    #[serde(default)]
    pub guest_mac: Option<String>,
    /// Limits on what the guest receives.
    #[serde(default)]
    pub rx_rate_limiter: Option<RateLimiterConfig>,
    /// Limits on what the guest sends.
    #[serde(default)]
    pub tx_rate_limiter: Option<RateLimiterConfig>,
    /// MTU offered to the guest, in bytes.
    #[serde(default)]
    pub mtu: Option<u16>,
}

/// `PATCH /network-interfaces/{id}`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkUpdate {
    /// Which interface.
    pub iface_id: String,
    /// New limits on what the guest receives.
    #[serde(default)]
    pub rx_rate_limiter: Option<RateLimiterConfig>,
    /// New limits on what the guest sends.
    #[serde(default)]
    pub tx_rate_limiter: Option<RateLimiterConfig>,
}

/// Limits by two token buckets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimiterConfig {
    /// Bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<TokenBucketConfig>,
    /// Operations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ops: Option<TokenBucketConfig>,
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

/// A whole configuration: `--config-file`, and the answer to `GET /vm/config`.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct VmConfig {
    /// The machine.
    #[serde(rename = "machine-config")]
    pub machine_config: Option<MachineConfig>,
    /// The kernel.
    #[serde(rename = "boot-source")]
    pub boot_source: Option<BootSource>,
    /// The disks, root first.
    pub drives: Vec<Drive>,
    /// The network interfaces.
    #[serde(rename = "network-interfaces")]
    pub network_interfaces: Vec<NetworkInterface>,
}
