//! What this monitor and the programs that drive it both know: its exit codes and its words for how
//! a guest ended, the configuration in JSON and its reader, ids, limits, the operations of its API
//! and a client for it, descriptors that go along with a request, and taps.
//!
//! The public module of the library, for the jailer, the tests and the measuring tools (tools that read
//! snapshots also see [`snapshot`](crate::snapshot)). It makes
//! no threads, knows nothing of KVM and has no state; of the rest of the library it sees only the
//! wrappers of system calls. What is read from a client or a file is never trusted: reading is
//! bounded by the caller, and a wrong member is an error with its name.
#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

pub mod check;
pub mod client;
pub mod command_line;
pub mod config;
pub mod end;
pub mod exit;
pub mod id;
mod level;
pub mod limits;
pub mod operations;

pub use client::{Client, ClientError, Response};
pub use config::{Source, VmConfig};
pub use end::{BOOTED, Crash, End, EndReport, SOFTWARE_KVM};
pub use level::Level;
pub use operations::{Call, Method, OPERATIONS, Operation, Question};

pub use crate::sys::fd::take_over;
pub use crate::sys::link::PacketSocket;
pub use crate::sys::socket::{listener, send_with_descriptors};
pub use crate::sys::tap;

/// The version of Firecracker's API that this program answers for.
pub const API_VERSION: &str = "1.17.0";

/// The kernel command line of a boot source that names none.
pub const DEFAULT_BOOT_ARGS: &str = "reboot=k panic=1 nomodule 8250.nr_uarts=0 i8042.noaux \
                                     i8042.nomux i8042.dumbkbd swiotlb=noforce";
