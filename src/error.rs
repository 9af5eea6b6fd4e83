//! Errors of the parts, put into one message each.

use std::error::Error;
use std::fmt;

/// Why a request was refused or failed: one message for the client that sent it, or for the person
/// who wrote the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ActionError(pub String);

impl ActionError {
    /// Puts an error and all its causes into one message.
    pub fn of(error: &dyn Error) -> Self {
        ActionError(crate::log::chain(error))
    }
}

impl fmt::Display for ActionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Error for ActionError {}

/// Errors of the parts, as messages for the client.
pub trait Context<T> {
    /// Puts what failed before the cause.
    fn context(self, what: impl fmt::Display) -> Result<T, ActionError>;

    /// The cause says enough.
    fn bare(self) -> Result<T, ActionError>;
}

impl<T, E: Error> Context<T> for Result<T, E> {
    fn context(self, what: impl fmt::Display) -> Result<T, ActionError> {
        self.map_err(|cause| ActionError(format!("{what}: {}", crate::log::chain(&cause))))
    }

    fn bare(self) -> Result<T, ActionError> {
        self.map_err(|cause| ActionError::of(&cause))
    }
}
