//! What all errors of the jailer have in common, and how one is printed.
//!
//! There are two sorts. What is refused for what it is has a variant in an enum of its module, whose
//! text says what to do. What the kernel (or a library) did not do is a [`Failure`], made where it
//! was asked, with the typed cause in `source()` and never also in the text: [`Step::step`] says what
//! it was to do, [`Advice::hint`] what the reader can do about an answer. Nothing is printed before
//! the error has reached `main`, or the first process of a run, which prints the chain once with
//! [`message`].

use std::borrow::Cow;
use std::error::Error;
use std::fmt::Write as _;
use std::io;
use std::path::Path;

use rustix::io::Errno;

/// Any error of the jailer.
pub type AnyError = Box<dyn Error>;

/// A step failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {work}")]
pub struct Failure {
    work: Cow<'static, str>,
    #[source]
    cause: AnyError,
    /// What the reader can do about it, as an imperative, where that is known.
    remedy: Option<Cow<'static, str>>,
}

impl Failure {
    /// To do `work`, an imperative, for this cause.
    pub fn new(work: impl Into<Cow<'static, str>>, cause: impl Error + 'static) -> Failure {
        Failure {
            work: work.into(),
            cause: cause.into(),
            remedy: None,
        }
    }

    /// The kernel's answer, where it was one.
    pub fn errno(&self) -> Option<Errno> {
        let of_io = |error: &io::Error| Errno::from_io_error(error);
        let of_std = || self.cause.downcast_ref().and_then(of_io);
        self.cause.downcast_ref().copied().or_else(of_std)
    }

    /// What to do about it, where that is known.
    pub fn remedy(self, remedy: Option<&'static str>) -> Failure {
        let remedy = remedy.map(Cow::Borrowed).or(self.remedy);
        Failure { remedy, ..self }
    }

    /// What to do about it, if `find` knows it for the kernel's answer.
    pub fn hints(self, find: impl FnOnce(Errno) -> Option<&'static str>) -> Failure {
        let found = self.errno().and_then(find);
        self.remedy(found)
    }

    /// Whether it says what to do.
    pub fn has_remedy(&self) -> bool {
        self.remedy.is_some()
    }
}

/// The result of a step.
pub trait Step<T> {
    /// Says what it was to do, as an imperative.
    fn step(self, work: impl Into<Cow<'static, str>>) -> Result<T, Failure>;
    /// The same of what is done to a path.
    fn step_on(self, work: &str, path: impl AsRef<Path>) -> Result<T, Failure>;
}

impl<T, E: Error + 'static> Step<T> for Result<T, E> {
    fn step(self, work: impl Into<Cow<'static, str>>) -> Result<T, Failure> {
        self.map_err(|cause| Failure::new(work, cause))
    }

    fn step_on(self, work: &str, path: impl AsRef<Path>) -> Result<T, Failure> {
        self.map_err(|cause| Failure::new(format!("{work} {}", path.as_ref().display()), cause))
    }
}

/// What to do about a step that failed.
pub trait Advice: Sized {
    /// If `find` knows it for the kernel's answer.
    fn hints(self, find: impl FnOnce(Errno) -> Option<&'static str>) -> Self;
    /// If the kernel gave this answer.
    fn hint(self, answer: Errno, remedy: &'static str) -> Self;
    /// Whatever the cause.
    fn advise(self, remedy: impl Into<Cow<'static, str>>) -> Self;
}

impl<T> Advice for Result<T, Failure> {
    fn hints(self, find: impl FnOnce(Errno) -> Option<&'static str>) -> Self {
        self.map_err(|failure| failure.hints(find))
    }

    fn hint(self, answer: Errno, remedy: &'static str) -> Self {
        self.hints(|errno| (errno == answer).then_some(remedy))
    }

    fn advise(self, remedy: impl Into<Cow<'static, str>>) -> Self {
        let remedy = Some(remedy.into());
        self.map_err(|failure| Failure { remedy, ..failure })
    }
}

/// The message for the person who started the jailer: the error, its causes, the remedy. A path may
/// hold anything: one line stays one line, and a terminal gets no control characters.
pub fn message(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        // Writing to a string does not fail.
        let _ = write!(text, ": {error}");
        cause = error.source();
    }
    let failure = error.downcast_ref::<Failure>();
    if let Some(remedy) = failure.and_then(|failure| failure.remedy.as_ref()) {
        let _ = write!(text, "; {remedy}");
    }
    text.replace(char::is_control, "?")
}

/// The number of a system call's error that the standard library wraps.
pub fn errno(error: io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open_folder(answer: Errno) -> Failure {
        Err::<(), _>(answer)
            .step_on("open the folder", "/x")
            .hint(Errno::NOENT, "make it first")
            .hint(Errno::PERM, "not this")
            .unwrap_err()
    }

    #[test]
    fn message_has_the_work_the_cause_and_the_remedy() {
        assert_eq!(
            message(&open_folder(Errno::NOENT)),
            "cannot open the folder /x: No such file or directory (os error 2); make it first"
        );
        assert_eq!(
            message(&open_folder(Errno::ACCESS)),
            "cannot open the folder /x: Permission denied (os error 13)"
        );
    }

    #[test]
    fn failure_has_the_kernels_answer_however_it_came() {
        let through_io = Err::<(), _>(io::Error::from(Errno::PERM)).step("open");
        assert_eq!(through_io.unwrap_err().errno(), Some(Errno::PERM));
        assert_eq!(open_folder(Errno::PERM).errno(), Some(Errno::PERM));
        let other = Err::<(), _>(std::fmt::Error).step("print");
        assert_eq!(other.unwrap_err().errno(), None);
    }

    #[test]
    fn message_is_one_line_without_control_characters() {
        let error = AnyError::from("open a\nb: \x1b[31m\u{9b}red; say ä\t");
        assert_eq!(message(&*error), "open a?b: ?[31m?red; say ä?");
    }
}
