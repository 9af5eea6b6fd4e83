//! mayfly: a minimal microVM monitor for Linux KVM. One process runs one microVM.
//!
//! **One owner per thing, one thread per owner, a message at every border.** Folders are named
//! after who owns the code at run time.
//!
//! ```text
//!       client
//!         | HTTP on a Unix socket
//!    +----v----+  Command + reply   +----------------------------+
//!    |   api   |------------------->|  control: Vmm { state }    |
//!    |         |<-------------------|  Machine { handles }       |
//!    +---------+      Answer        +---+--------+-----------^---+
//!                                       |        |           |  Event: guest reset,
//!                     VcpuMsg + signal  |        |           |  vCPU exit, worker failed
//!                                       |        | ControlMsg<D> + reply
//!                                  +----v----+ +-v--------+---------+--------+
//!              KVM_RUN <---------->|  vcpu   | | block    |  net    | serial |
//!                                  +----+----+ | Disk     |  Tap    | in/out |
//!                   MMIO or port exit   |      | Queue    |  2Queue | ring   |
//!                                  +----v----+ +-^---^--+-+---------+--------+
//!                                  |  Bus    |   |   |  |
//!                                  |Registers|---'   |  '---> Interrupt -> irqfd -> guest
//!                                  | (mutex) |  DriverMsg
//!                                  +---------+       '------- ioeventfd <- guest kick
//! ```
//!
//! Which way imports point: a file may import from lines below its own, or from its own folder,
//! never from above (`tests/layering.rs` holds the code to this picture).
//!
//! ```text
//!   7  program          and args
//!   6  api              of vmm it sees `action` only
//!   5  vmm              the one folder that knows all the others
//!   4  vcpu             sees arch and bus; does not know that virtio exists
//!   3  virtio   arch    neither sees the other
//!   2  serial   memory   snapshot   overlay   files   threads
//!   1  bus   rate_limiter   inbox   seccomp   metrics   timeline   log   error   steps   of each other they see nothing
//!      state            what the saved states of all parts share
//!      wire             what the programs that drive the monitor know too: configuration, ids, limits, client
//!      sys              system calls
//! ```
// What a guest, a client or a file may bring about is never a panic. Where numbers of theirs are
// reckoned with, unchecked arithmetic is denied too, by the module.
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::panic
    )
)]

mod api;
mod arch;
mod args;
mod bus;
mod error;
mod files;
/// Entry points for `tools/fuzz`.
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzz;
#[cfg(any(test, fuzzing))]
#[path = "../tests/common/fuzz_input.rs"]
mod fuzz_input;
#[cfg(test)]
#[path = "../tests/common/fuzz_run.rs"]
mod fuzz_run;
mod inbox;
mod log;
mod memory;
mod metrics;
#[cfg(test)]
#[path = "../tests/common/needs.rs"]
mod needs;
/// The format of an overlay's file, for the tool that looks at it and commits it.
#[doc(hidden)]
pub mod overlay;
mod program;
#[cfg(test)]
mod properties;
mod rate_limiter;
mod seccomp;
mod serial;
/// The format of a snapshot's files, for the tools that look at them and merge them.
#[doc(hidden)]
pub mod snapshot;
mod state;
mod steps;
mod sys;
mod threads;
mod timeline;
mod vcpu;
mod virtio;
mod vmm;
pub mod wire;

#[cfg(test)]
use needs::needs;
use wire::exit;

pub use program::main;
#[doc(hidden)]
pub use sys::allocator::Allocator;

/// The binary's allocator: a host without memory ends the process with a code of its own.
pub const ALLOCATOR: Allocator = Allocator {
    exit_code: exit::WORKER_FAILED,
};
