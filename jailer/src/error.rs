//! What all errors of the jailer have in common, and how one is printed.
//!
//! Each module has an enum of what may fail in it: a variant names the work and the thing, and
//! carries the cause in `source()`, never also in its text. What the reader can do about it is
//! [`Remedy::remedy`]. Nothing is printed before the error has reached `main`, or the first process
//! of a run, which prints the chain once with [`message`].

use std::borrow::Cow;
use std::error::Error;
use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

/// An error of the jailer.
pub trait Remedy: Error + 'static {
    /// What the reader can do about it, as an imperative, where that is known.
    fn remedy(&self) -> Option<Cow<'static, str>> {
        None
    }
}

/// Any error of the jailer, where it is only going to be printed.
pub type AnyError = Box<dyn Remedy>;

impl<E: Remedy> From<E> for AnyError {
    fn from(error: E) -> AnyError {
        Box::new(error)
    }
}

/// The message for the person who started the jailer: the error, its causes, the remedy. A path may
/// hold anything: one line stays one line, and a terminal gets no control characters.
pub fn message(error: &dyn Remedy) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        // Writing to a string does not fail.
        let _ = write!(text, ": {error}");
        cause = error.source();
    }
    if let Some(remedy) = error.remedy() {
        let _ = write!(text, "; {remedy}");
    }
    text.replace(char::is_control, "?")
}

/// An error of another process of this jailer, which sent its message.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Reported(pub String);

impl Remedy for Reported {}

/// Makes an error of what went wrong with `path`: `.map_err(at(RootError::Copy, path))`.
pub fn at<E>(variant: fn(PathBuf, Errno) -> E, path: &Path) -> impl FnOnce(Errno) -> E {
    move |error| variant(path.to_owned(), error)
}

/// The number of a system call's error that the standard library wraps.
pub fn errno(error: io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot open the folder {0}")]
    struct OpenFolder(&'static str, #[source] Errno);

    impl Remedy for OpenFolder {
        fn remedy(&self) -> Option<Cow<'static, str>> {
            (self.1 == Errno::NOENT).then_some("make it first".into())
        }
    }

    #[test]
    fn message_has_the_work_the_cause_and_the_remedy() {
        assert_eq!(
            message(&OpenFolder("/x", Errno::NOENT)),
            "cannot open the folder /x: No such file or directory (os error 2); make it first"
        );
        assert_eq!(
            message(&OpenFolder("/x", Errno::ACCESS)),
            "cannot open the folder /x: Permission denied (os error 13)"
        );
    }

    #[test]
    fn message_is_one_line_without_control_characters() {
        let error = Reported("open a\nb: \x1b[31m\u{9b}red; say ä\t".into());
        assert_eq!(message(&error), "open a?b: ?[31m?red; say ä?");
    }
}
