//! The one error of this program: a message, complete enough to act on.

use std::fmt;

/// A message that says what could not be done and why.
#[derive(Debug)]
pub struct Failure {
    message: String,
    refusal: bool,
}

/// What every fallible function here returns.
pub type Result<T> = std::result::Result<T, Failure>;

impl Failure {
    /// Makes a failure of a message (without its full stop).
    pub fn new(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            refusal: false,
        }
    }

    /// A request that a monitor understood and refused: what it asks for may be missing there.
    pub fn refusal(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            refusal: true,
        }
    }

    /// Whether a monitor refused a request.
    pub fn is_refusal(&self) -> bool {
        self.refusal
    }

    /// The person at the terminal, or their supervisor, asked us to stop.
    pub fn interrupted() -> Self {
        Self::new("interrupted")
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

/// Puts what was being done in front of a cause.
pub trait Context<T> {
    /// `doing` completes "cannot ...".
    fn cannot(self, doing: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: fmt::Display> Context<T> for std::result::Result<T, E> {
    fn cannot(self, doing: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|cause| Failure::new(format!("cannot {}: {cause}", doing())))
    }
}
