//! What programs on the host need to know of the probe guests.
//!
//! The guests themselves are the binaries of this package; this library is ordinary host code
//! for tests and measurements: [`elf`] makes start-measurement guests of any size from
//! scratch, [`pattern`] knows what the probe writes to disks and how it sums what it reads,
//! [`epochs`] whether a disk holds what was flushed.
//! It never runs in a guest, opens no files and starts nothing.

#![warn(missing_docs)]

#[path = "firstbyte/code.rs"]
mod code;
pub mod elf;
pub mod epochs;
pub mod pattern;
