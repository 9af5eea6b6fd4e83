//! The log: one line at a time to one descriptor, from any thread.
//!
//! A line is formatted into a buffer on the stack and written with one `write`; nothing is
//! allocated and nothing waits: a line that can not be written at once is counted and lost.
//! Lines the guest can provoke go through [`guest!`], which limits them for the whole VM
//! (64 KiB at once, then 4 KiB a second) and counts what it drops.

use std::error::Error;
use std::fmt::Write;

/// An error and its causes as one sentence, each said once.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        // Writing to a string does not fail.
        let _ = write!(text, ": {error}");
        cause = error.source();
    }
    text
}
