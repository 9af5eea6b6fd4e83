//! The kinds of devices there are, and what is the same for all of them.
//!
//! [`each_device_kind`] is where a kind is registered: its lists, its section of a configuration, its
//! operations of the API and its place in the order of slots all come from there, here and in
//! control.

use std::fmt::Debug;

use serde::de::DeserializeOwned;
use serde::ser::SerializeMap;
use serde::{Deserialize, Serialize};

use super::Source;
use super::json::{self, JsonError, objects};

/// One kind of device, as clients write it.
pub trait DeviceConfig: Clone + Debug + PartialEq + Serialize + DeserializeOwned {
    /// The body of a PATCH.
    type Update: Clone + Debug + PartialEq + DeserializeOwned;

    /// Its name among those of its kind.
    fn id(&self) -> &str;

    /// The name of the one that `update` is for.
    fn updated(update: &Self::Update) -> &str;

    /// What of the host it names.
    fn sources(&mut self) -> Vec<(Backing, &mut Source)>;
}

/// What a [`Source`] must be good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// A kernel, to be mapped into the guest.
    Kernel,
    /// An initial RAM disk, to be mapped into the guest.
    Initrd,
    /// A disk image.
    Disk {
        /// Whether the guest only reads it.
        read_only: bool,
    },
    /// The file of an overlay, made when it is missing.
    Overlay,
    /// A tap of the host.
    Tap,
    /// One of several queues of a tap of the host.
    TapQueue,
    /// A configuration of the CPU in JSON.
    CpuConfig,
    /// A file or FIFO to append the log to.
    Log,
    /// A file or FIFO to append metrics to.
    Metrics,
    /// A file or FIFO to append the console's output to.
    ConsoleOutput,
    /// A socket that clients of the console connect to.
    ConsoleSocket,
}

/// Calls the macro `$then` with a row for each kind of device, in the order of their slots: its list,
/// its section in a configuration (the first segment of its path in the API too), its file beside this
/// one and its type there, as clients write it, its file in `vmm::devices` and its type there, as
/// control knows it, and how serde reads the section.
///
/// Beside the row, a kind has a `mod` line for each of its files: here, there, and in `virtio`.
macro_rules! each_device_kind {
    ($then:ident) => {
        $then! {
            drives = "drives": drive::Drive, block::Block [deserialize_with = "objects"];
            network_interfaces = "network-interfaces": network::NetworkInterface, net::Net [default, deserialize_with = "objects"];
        }
    };
}
pub(crate) use each_device_kind;

macro_rules! declare {
    ($($list:ident = $section:literal: $wire:ident::$config:ident, $control:ident::$kind:ident [$($serde:tt)*];)+) => {
        $(pub use super::$wire::*;)+

        /// The kinds of devices, in the order of their slots.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum DeviceKind {
            $(#[doc = concat!("Those of the section `", $section, "`.")] $config,)+
        }

        impl DeviceKind {
            /// All of them.
            pub const ALL: &[DeviceKind] = &[$(DeviceKind::$config),+];

            /// Its section in a configuration, and the first segment of its path in the API.
            pub const fn section(self) -> &'static str {
                match self {
                    $(DeviceKind::$config => $section,)+
                }
            }

            /// The kind whose section is called `name`.
            pub fn of_section(name: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|kind| kind.section() == name)
            }

            /// Its path in the API.
            pub const fn path(self) -> &'static str {
                match self {
                    $(DeviceKind::$config => concat!("/", $section, "/{id}"),)+
                }
            }
        }

        /// A device of any kind.
        #[derive(Clone, Debug, PartialEq)]
        pub enum AnyDevice {
            $(#[doc = concat!("One of `", $section, "`.")] $config($config),)+
        }

        impl AnyDevice {
            /// Reads one of `kind`.
            ///
            /// # Errors
            /// What is wrong with it.
            pub fn parse(kind: DeviceKind, bytes: &[u8]) -> Result<Self, JsonError> {
                match kind {
                    $(DeviceKind::$config => json::parse(bytes).map(AnyDevice::$config),)+
                }
            }

            /// Its name among those of its kind.
            pub fn id(&self) -> &str {
                match self {
                    $(AnyDevice::$config(device) => device.id(),)+
                }
            }
        }

        /// A change to a running device of any kind.
        #[derive(Clone, Debug, PartialEq)]
        pub enum AnyUpdate {
            $(
                #[doc = concat!("For one of `", $section, "`.")]
                $config(<$config as DeviceConfig>::Update),
            )+
        }

        impl AnyUpdate {
            /// Reads one for a device of `kind`.
            ///
            /// # Errors
            /// What is wrong with it.
            pub fn parse(kind: DeviceKind, bytes: &[u8]) -> Result<Self, JsonError> {
                match kind {
                    $(DeviceKind::$config => json::parse(bytes).map(AnyUpdate::$config),)+
                }
            }

            /// The name of the device that it is for.
            pub fn id(&self) -> &str {
                match self {
                    $(AnyUpdate::$config(update) => $config::updated(update),)+
                }
            }
        }

        /// The devices of a configuration.
        #[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
        #[serde(rename_all = "kebab-case")]
        pub struct Devices {
            $(
                #[doc = concat!("The section `", $section, "`.")]
                #[serde($($serde)*)]
                pub $list: Vec<$config>,
            )+
        }

        impl Devices {
            /// Their ids, in the order of their slots.
            pub fn ids(&self) -> impl Iterator<Item = &str> {
                std::iter::empty()$(.chain(self.$list.iter().map(DeviceConfig::id)))+
            }

            /// What of the host they name.
            pub fn sources(&mut self) -> impl Iterator<Item = (Backing, &mut Source)> {
                std::iter::empty()$(.chain(self.$list.iter_mut().flat_map(DeviceConfig::sources)))+
            }

            /// Writes the section of `kind`.
            pub(super) fn write<M: SerializeMap>(
                &self,
                kind: DeviceKind,
                map: &mut M,
            ) -> Result<(), M::Error> {
                match kind {
                    $(DeviceKind::$config => map.serialize_entry($section, &self.$list),)+
                }
            }
        }
    };
}

each_device_kind!(declare);
