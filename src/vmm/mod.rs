//! The control thread.

pub mod action;
