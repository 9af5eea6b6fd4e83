//! The control thread.

pub mod action;
pub mod rules;
