//! What was asked for: the bodies of the API and the sections of a config file, and the rules
//! that hold between them. No I/O, no KVM, no threads.
//!
//! A [`Draft`] collects what was PUT, each part checked for itself as it comes; [`Draft::check`]
//! judges all of it together and gives a [`Config`], after which start-up has no validation left.
//! Field names, defaults and limits are Firecracker's.
#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use std::fmt;

mod draft;

pub use crate::wire::config::*;
use crate::wire::limits::{COMMAND_LINE_MAX, TAP_NAME_MAX};
use crate::wire::limits::{DEVICES_MAX, VCPUS_MAX};
pub use draft::*;

/// Why a part of the configuration, or all of it together, is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConfigError {
    /// 0, more than there may be, or an odd number of threads on cores of two.
    VcpuCount {
        /// What was asked for.
        count: u8,
        /// Whether with two threads a core.
        smt: bool,
    },
    /// 0 MiB, or not a whole number of huge pages.
    MemorySize(u64),
    /// More MiB than 64 bits of bytes.
    MemoryUnaddressable(u64),
    /// A command line of so many bytes.
    BootArgsTooLong(usize),
    /// A zero in the command line.
    BootArgsZero,
    /// No kernel was named.
    NoBootSource,
    /// Two root drives.
    SecondRoot {
        /// The new one.
        drive: String,
        /// The one there was.
        root: String,
    },
    /// A drive with a vhost-user socket.
    VhostUser(String),
    /// A PATCH of a drive that is not there.
    NoSuchDrive(String),
    /// A PATCH of a drive without anything to change.
    NothingToPatch(String),
    /// A PATCH of a network interface that is not there.
    NoSuchNetwork(String),
    /// A name that no interface of the host can have.
    TapName {
        /// The interface.
        iface: String,
        /// The name.
        tap: String,
    },
    /// An MTU below what IPv4 needs.
    Mtu {
        /// The interface.
        iface: String,
        /// The MTU.
        mtu: u16,
    },
    /// One tap for two interfaces.
    TapInUse {
        /// The new interface.
        iface: String,
        /// The tap.
        tap: String,
        /// The interface that has it.
        other: String,
    },
    /// One MAC for two interfaces.
    MacInUse {
        /// The new interface.
        iface: String,
        /// The MAC.
        mac: Mac,
        /// The interface that has it.
        other: String,
    },
    /// More devices than interrupt lines.
    TooManyDevices {
        /// Disks.
        drives: usize,
        /// Network interfaces.
        networks: usize,
    },
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use ConfigError::*;
        match self {
            VcpuCount { count, smt } => write!(
                f,
                "Machine config error: vcpu_count is {count}{}: The number of vCPUs must be \
                 greater than 0, at most {VCPUS_MAX}, and 1 or an even number if SMT is enabled.",
                if *smt { " with smt" } else { "" }
            ),
            MemorySize(mib) => write!(
                f,
                "Machine config error: mem_size_mib is {mib}: The memory size (MiB) is either 0, \
                 or not a multiple of the configured page size."
            ),
            MemoryUnaddressable(mib) => write!(
                f,
                "Invalid Memory Configuration: Cannot create mmap region: Out of memory (os error \
                 12): mem_size_mib is {mib}, which is more memory than a machine \
                 can address"
            ),
            BootArgsTooLong(length) => write!(
                f,
                "Boot source error: boot_args has {length} bytes, and a kernel command line at \
                 most {COMMAND_LINE_MAX}"
            ),
            BootArgsZero => {
                f.write_str("Boot source error: boot_args holds a zero byte, which would end it")
            }
            NoBootSource => f.write_str(
                "Start microvm error: Cannot start microvm without kernel configuration: name a \
                 kernel with PUT /boot-source",
            ),
            SecondRoot { drive, root } => write!(
                f,
                "Drive config error: `{drive}` cannot be the root device: A root block device \
                 already exists: `{root}`"
            ),
            VhostUser(drive) => write!(
                f,
                "Drive config error: `{drive}` has a `socket`: vhost-user devices are out of scope"
            ),
            NoSuchDrive(drive) => write!(
                f,
                "Drive config error: Unable to patch the block device: Device not found: `{drive}`"
            ),
            // "Running method expected different backend" is how the original says it.
            NothingToPatch(drive) => write!(
                f,
                "Drive config error: Running method expected different backend. The update of `{drive}` has neither `path_on_host` nor \
                 `rate_limiter`"
            ),
            NoSuchNetwork(iface) => {
                write!(
                    f,
                    "Network config error: Unable to update the net device: Device not found: \
                     `{iface}`"
                )
            }
            TapName { iface, tap } => write!(
                f,
                "Network config error: Could not create the network device: host_dev_name `{}` \
                 of `{iface}` is no interface name: it takes at most {TAP_NAME_MAX} bytes, without \
                 `/` and spaces",
                tap.escape_debug()
            ),
            Mtu { iface, mtu } => write!(
                f,
                "Network config error: Could not create the network device: MTU {mtu} of \
                 `{iface}` is out of range [68, 65535]"
            ),
            TapInUse { iface, tap, other } => write!(
                f,
                "Network config error: Could not create the network device: the tap {tap} of \
                 `{iface}` is already in use by `{other}`"
            ),
            MacInUse { iface, mac, other } => write!(
                f,
                "Network config error: The MAC address is already in use: {mac}, asked for by \
                 `{iface}`, belongs to `{other}`"
            ),
            TooManyDevices { drives, networks } => write!(
                f,
                "Start microvm error: {drives} drives and {networks} network interfaces are more \
                 than the {DEVICES_MAX} devices there is room for"
            ),
        }
    }
}

impl std::error::Error for ConfigError {}
