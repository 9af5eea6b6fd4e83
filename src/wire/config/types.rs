//! What is not a device: kernel, machine, log, metrics, console.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize};

use super::cpu::CpuConfig;
use super::json::{object, optional_object};
use super::{Source, TokenBucketConfig};
use crate::wire::Level;

/// `PUT /boot-source`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct BootSource {
    /// The kernel: an ELF `vmlinux`, or a bzImage.
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
    /// Where the interrupt controllers are. Not reported unless it was asked for: other programs
    /// compare the answer with what they know.
    #[serde(default, skip_serializing_if = "InterruptController::is_auto")]
    pub interrupt_controller: InterruptController,
    /// What guest memory is kept in. Reported as `interrupt_controller` is.
    #[serde(default, skip_serializing_if = "RamBackend::is_anonymous")]
    pub memory_backend: RamBackend,
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
            interrupt_controller: InterruptController::Auto,
            memory_backend: RamBackend::Anonymous,
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

/// Where the guest's interrupt controllers and its old timer are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum InterruptController {
    /// Where they suit the guest: `Split`, unless host or kernel command line speak against it.
    #[default]
    Auto,
    /// All in the host's kernel, the 8259 and the 8254 among them.
    Kernel,
    /// In the host's kernel only what is part of a processor.
    Split,
}

impl InterruptController {
    /// Whether nothing was asked for.
    pub fn is_auto(&self) -> bool {
        *self == InterruptController::Auto
    }
}

/// What guest memory is kept in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RamBackend {
    /// Memory of the monitor's own.
    #[default]
    Anonymous,
    /// A memfd, by which a running guest can be forked.
    Shared,
}

impl RamBackend {
    /// Whether nothing else was asked for.
    pub fn is_anonymous(&self) -> bool {
        *self == RamBackend::Anonymous
    }
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
    /// See [`MachineConfig`].
    #[serde(default)]
    pub interrupt_controller: Option<InterruptController>,
    /// See [`MachineConfig`].
    #[serde(default)]
    pub memory_backend: Option<RamBackend>,
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
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(untagged)]
pub enum CpuConfigSource {
    /// A file that holds the masks.
    File(Source),
    /// The masks.
    Inline(#[serde(deserialize_with = "object")] CpuConfig),
}
