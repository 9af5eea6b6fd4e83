//! The configuration in JSON: the bodies of the API, the sections of a config file, and their reader.
//! Field names, defaults and limits are Firecracker's. What each part means beside the others is for
//! control to judge.

pub mod cpu;
mod devices;
mod drive;
mod file;
pub mod json;
mod limiter;
mod mac;
mod network;
mod snapshot;
mod source;
mod types;

pub(crate) use devices::each_device_kind;
pub use devices::*;
pub use file::{Reported, VmConfig, VmRequest, parse_file, parse_vm};
pub use json::JsonError;
pub use limiter::{RateLimiterConfig, TokenBucketConfig};
pub use mac::{BadMac, Mac};
pub use snapshot::*;
pub use source::{PassedFd, Source};
pub use types::*;
