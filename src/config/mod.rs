//! What was asked for: the bodies of the API and the sections of a config file, and the rules
//! that hold between them. No I/O, no KVM, no threads.
//!
//! A [`Draft`] collects what was PUT, each part checked for itself as it comes; [`Draft::check`]
//! judges all of it together and gives a [`Config`], after which start-up has no validation left.
//! Field names, defaults and limits are Firecracker's.

mod types;

pub use types::*;
