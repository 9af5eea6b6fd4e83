//! How a step of the jailer says that it could not be done.
//!
//! The jailer is a list of steps that either all succeed or are all taken back, so there is nothing
//! to match on: a failure is one sentence for the person who started it. It names the work and the
//! thing, then the reason, then the way out where one is known.

use std::fmt;
use std::io;

/// A step that failed, as a sentence: "cannot *work*: *reason*; *remedy*".
#[derive(Debug)]
pub struct Failure {
    sentence: String,
}

impl Failure {
    /// `doing` completes "cannot ...", `why` is the reason.
    pub fn new(doing: impl fmt::Display, why: impl fmt::Display) -> Self {
        Failure {
            sentence: format!("cannot {doing}: {why}"),
        }
    }

    /// A failure that another process of this jailer already put into words.
    pub fn reported(sentence: String) -> Self {
        Failure { sentence }
    }

    /// Adds what the reader can do about it.
    pub fn remedy(mut self, remedy: impl fmt::Display) -> Self {
        self.sentence = format!("{}; {remedy}", self.sentence);
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A path may hold anything: one line stays one line, and a terminal is not told what to do.
        f.write_str(&self.sentence.replace(char::is_control, "?"))
    }
}

impl std::error::Error for Failure {}

impl<E: crate::error::Remedy> From<E> for Failure {
    fn from(error: E) -> Failure {
        Failure {
            sentence: crate::error::message(&error),
        }
    }
}

/// Puts words to the outcome of a system call.
pub trait Doing<T> {
    /// `what` completes "cannot ...".
    fn doing(self, what: impl fmt::Display) -> Result<T, Failure>;

    /// The same, with a remedy that depends on the error; an empty one is left out.
    fn doing_or(
        self,
        what: impl fmt::Display,
        remedy: impl FnOnce(&io::Error) -> &'static str,
    ) -> Result<T, Failure>;
}

impl<T, E: Into<io::Error>> Doing<T> for Result<T, E> {
    fn doing(self, what: impl fmt::Display) -> Result<T, Failure> {
        self.map_err(|error| Failure::new(what, error.into()))
    }

    fn doing_or(
        self,
        what: impl fmt::Display,
        remedy: impl FnOnce(&io::Error) -> &'static str,
    ) -> Result<T, Failure> {
        self.map_err(|error| {
            let error = error.into();
            let remedy = remedy(&error);
            let failure = Failure::new(what, error);
            if remedy.is_empty() {
                failure
            } else {
                failure.remedy(remedy)
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::io::Errno;

    #[test]
    fn sentence_names_work_reason_and_remedy() {
        let result: Result<(), _> =
            Err(Errno::NOENT).doing_or("open the folder /x", |error| match error.kind() {
                io::ErrorKind::NotFound => "make it first",
                _ => "",
            });
        assert_eq!(
            result.unwrap_err().to_string(),
            "cannot open the folder /x: No such file or directory (os error 2); make it first"
        );
    }

    #[test]
    fn sentence_is_one_line_that_does_nothing_to_a_terminal() {
        let failure = Failure::new("open a\nb", "\x1b[31m\u{9b}red").remedy("say ä\t");
        assert_eq!(failure.to_string(), "cannot open a?b: ?[31m?red; say ä?");
    }
}
