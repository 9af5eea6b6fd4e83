//! An overlay: what was written to a disk, in a file of its own, over a base that is only read.
//!
//! The one module that knows the format (`docs/overlay-format.md`); the monitor and `tools/guest
//! overlay` both use it. A disk is made of *units* of 4 KiB. For each, a map says where its bytes
//! are: in the base, in the overlay's file, or nowhere, because they are zeros. An overlay says
//! where to read and to write; the reads and writes of a guest are its user's, who tells what has been
//! written.
//!
//! ```text
//!   0        4096            data_at                 data_at + region       data_at + 2 * region
//!   | header | map: sectors  | data, even generations | data, odd generations |
//! ```
//!
//! **Order.** The bytes of a unit are in the file before the map says so. A kill at any moment leaves
//! each unit as it was before or after a write, never a mixture with what the file held before. What
//! of it survives the host's own end is `Durability`'s to say.
//!
//! **Generations.** Each sector of the map names the generation that it belongs to, and the header names
//! the present one: a new number there makes all units those of the base at once. The two data regions
//! take turns, so that `Stale` space is given back by another thread while new data is written.
//!
//! Runs on the files thread when it is opened, then on the thread of its disk. Makes no thread; after it
//! was opened it allocates nothing. A file is distrusted like what a guest writes: what it says is
//! checked, and the memory of the map is two bits for each unit of a disk of at most `SIZE_MAX` bytes.
#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod header;
mod layout;
mod map;
mod open;
mod stale;
mod storage;
mod store;
#[cfg(test)]
pub mod tests;

pub use self::header::{BaseId, Header};
pub use self::layout::{SIZE_MAX, UNIT};
pub use self::map::State;
pub use self::open::{Content, Refusal, lock};
pub use self::stale::Stale;
pub use self::storage::Storage;
pub use self::store::{Durability, Overlay, Place};
