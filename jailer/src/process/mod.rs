//! A process in a guest, as programs of this host see it: what both `run --image` and `attach` know.
//!
//! `command` is what is to be run, `object` what a container engine wants to be run, `front` the caller's side of it
//! (streams, a terminal, signals), `pty` a terminal that is made for it, `stream` the frames between a supervisor and
//! the programs that reach its guest, `place` where the socket for those is, `pack` files for the guest.
//!
//! It runs in the loop of the program that uses it, and never waits; only the child that `pack` starts does. What comes
//! from the guest is hostile here too.

pub mod command;
pub mod front;
mod object;
pub mod pack;
pub mod place;
mod pty;
pub mod stream;
