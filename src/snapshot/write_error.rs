//! Why a snapshot was not written, and where its tests end the process that writes one.

use std::error::Error;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// Why a snapshot was not written.
#[derive(Debug)]
pub enum WriteError {
    /// The host's.
    Io {
        /// What was to be done.
        what: &'static str,
        /// With what.
        file: PathBuf,
        /// Why it failed.
        cause: io::Error,
    },
    /// There is something else than a regular file.
    Kind(String, &'static str),
    /// A passed descriptor was opened in a way that does not serve.
    Access(String, &'static str),
    /// Both files are one.
    Same,
    /// Another process writes a snapshot there.
    Busy(PathBuf),
    /// The name is of the form that temporary files have.
    Temporary(PathBuf),
    /// What has the temporary name is no file.
    Occupied(PathBuf),
    /// The memory image was not written.
    Memory(Box<dyn Error + Send + Sync>),
    /// The state was not put together.
    State(Box<dyn Error + Send + Sync>),
    /// The memory image was not passed on.
    Pass(io::Error),
    /// It took so long that the client has been told that it failed.
    GivenUp,
}

impl WriteError {
    pub(super) fn io(what: &'static str, file: &Path, cause: io::Error) -> Self {
        let file = file.into();
        WriteError::Io { what, file, cause }
    }
}

impl fmt::Display for WriteError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            WriteError::Io { what, file, cause } => {
                write!(f, "Cannot {what} `{}`: {cause}", file.display())
            }
            WriteError::Kind(file, kind) => write!(
                f,
                "Cannot write a snapshot to `{file}`: it is {kind}, not a file"
            ),
            WriteError::Access(file, why) => {
                write!(f, "Cannot write a snapshot to `{file}`: it {why}")
            }
            WriteError::Same => f.write_str(
                "The state and the memory of a snapshot cannot be written to one and the same file. \
                 Name two",
            ),
            WriteError::Busy(file) => write!(
                f,
                "Cannot write a snapshot to `{}`: another process is writing one there. Try again \
                 when it has finished",
                file.display()
            ),
            WriteError::Temporary(file) => write!(
                f,
                "Cannot write a snapshot to `{}`: names that end like this are those of temporary \
                 files. Choose another",
                file.display()
            ),
            WriteError::Occupied(file) => write!(
                f,
                "Cannot write a snapshot: the temporary file `{}` cannot be made, because there is \
                 something else than a file. Remove it",
                file.display()
            ),
            WriteError::Memory(_) => f.write_str("Cannot write the guest's memory"),
            WriteError::State(_) => f.write_str("Cannot put the state together"),
            WriteError::Pass(_) => f.write_str("Cannot pass the memory"),
            WriteError::GivenUp => f.write_str("A file did not answer in time"),
        }
    }
}

impl Error for WriteError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            WriteError::Memory(cause) | WriteError::State(cause) => Some(cause.as_ref()),
            WriteError::Pass(cause) => Some(cause),
            _ => None,
        }
    }
}

/// Tests end the process here, before each system call that changes something.
#[cfg(not(test))]
pub(super) fn step() {}
#[cfg(test)]
pub(super) use super::tests::step;

/// Tests have it that a file system cannot exchange two files, or has no hard links.
#[cfg(not(test))]
pub(super) const fn has_exchange() -> bool {
    true
}
#[cfg(not(test))]
pub(super) const fn has_links() -> bool {
    true
}
#[cfg(test)]
pub(super) use super::tests::{has_exchange, has_links};
