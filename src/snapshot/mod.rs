//! The files of a snapshot: the state file's format, reading it, and writing a state file and a
//! memory image so that the pair is the old one or the new one, never a mixture.
//!
//! The one module that knows the format (`docs/snapshot-format.md`). It knows bytes and files, not
//! machines: what the state is made of is its callers' (`encode` takes anything that serde can
//! write, `RawState::parse` makes it again), and the memory image is written by a function that
//! gets the open file.
//!
//! Runs on the files thread, and in tools. It never waits for the other end of a FIFO or a device,
//! never reads more than `STATE_MAX` bytes, and trusts nothing that it reads: what is in a file is
//! what a guest or another program may have written. It makes no thread and keeps no state.
#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod header;
mod place;
mod read;
mod working_set;
mod write;
mod write_error;

#[cfg(test)]
mod tests;

pub use self::header::{
    FIRST_VERSION, Header, Kind, MemoryImage, SnapshotId, VERSION, encode, encode_json, version,
};
pub use self::place::{Target, partial_name};
pub use self::read::{
    RawState, Refusal, check_memory, is_onto, memory_of, open_regular, read, read_pair,
};
pub use self::working_set::{is_unrecorded, open_working_set};
pub use self::write::{write_pair, write_state};
pub use self::write_error::WriteError;

/// What the state file of a snapshot is called, where only its folder is named.
pub const STATE_NAME: &str = "state";
/// What its memory image is called there.
pub const MEMORY_NAME: &str = "memory";

/// The longest state file that is read. A guest of 32 vCPUs and all its devices has about 1 MiB.
pub const STATE_MAX: u64 = 64 << 20;
