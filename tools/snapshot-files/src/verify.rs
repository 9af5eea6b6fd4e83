//! `verify`: whether a snapshot is what was written.

use mayfly::snapshot::Kind;

use crate::image::sums;
use crate::opened::{Failure, Opened, Paths};

/// Which pages of zeros in a diff count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zeros {
    /// They were written.
    Written,
    /// There were none: the file system shows data in larger pieces than pages.
    Holes,
}

/// Prints that the snapshot is whole.
pub fn run(paths: &Paths) -> Result<(), Failure> {
    let snapshot = Opened::at(paths)?;
    let id = snapshot.header.id;
    match content(&snapshot)? {
        Some(_) => println!("whole: snapshot {id}, its memory as it was written"),
        None => println!(
            "whole as far as is known: snapshot {id}; it has no check value of its memory's content"
        ),
    }
    Ok(())
}

/// Compares the content of the memory file with its check value, if it has one.
pub fn content(snapshot: &Opened) -> Result<Option<Zeros>, Failure> {
    let path = &snapshot.paths.memory;
    let memory = &snapshot.header.memory;
    let Some(expected) = memory.check else {
        return Ok(None);
    };
    let found = sums(&snapshot.memory, memory.len);
    let found = found.map_err(|cause| Failure::io("Reading the memory file", path, &cause))?;
    let is_diff = snapshot.header.kind == Kind::Diff;
    if is_diff && found.data == expected {
        return Ok(Some(Zeros::Written));
    }
    if found.not_zero == expected {
        return Ok(Some(Zeros::Holes));
    }
    let copied = match is_diff {
        true => {
            " It is a diff: copying it with a program that fills holes or makes new ones does that too."
        }
        false => "",
    };
    Err(Failure(format!(
        "The memory file `{}` was altered after it was written: its content adds up to {:016x}, and the \
         state file says {expected:016x}.{copied} Take the snapshot again",
        path.display(),
        if is_diff { found.data } else { found.not_zero },
    )))
}
