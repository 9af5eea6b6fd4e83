//! A process in a guest, as programs of this host see it: what both `run --image` and `attach` know.
//!
//! `command` is what is to be run, `front` the caller's side of it (streams, a terminal, signals), `stream` the
//! frames between a supervisor and the programs that reach its guest, `place` where the socket for those is, `object` what a container engine wants to be run,
//! `pack` files for the guest, `pty` a terminal for
//! it.

pub mod command;
pub mod front;
mod object;
pub mod pack;
pub mod place;
mod pty;
pub mod stream;
