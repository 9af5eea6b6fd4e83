//! Why a run ends without its result: one message that names the file, what is wrong and what to do.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

#[derive(Debug)]
pub struct Failure {
    file: Option<PathBuf>,
    text: String,
}

pub type Result<T, E = Failure> = std::result::Result<T, E>;

impl Failure {
    /// `what` is wrong with `file`; `remedy` is what to do about it.
    pub fn new(file: &Path, what: impl fmt::Display, remedy: impl fmt::Display) -> Failure {
        Failure {
            file: Some(file.to_path_buf()),
            text: format!("{what}; {remedy}"),
        }
    }

    /// A failure that concerns no file.
    pub fn plain(what: impl fmt::Display) -> Failure {
        Failure {
            file: None,
            text: what.to_string(),
        }
    }

    /// The same, where a file of the working folder stands for one that the user named.
    pub fn within(mut self, work: &Path, named: &Path) -> Failure {
        if self
            .file
            .as_ref()
            .is_some_and(|file| file.starts_with(work))
        {
            self.file = Some(named.to_path_buf());
        }
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Other programs' words are among it, and names out of images.
        let text = clean(&self.text);
        match &self.file {
            Some(file) => write!(f, "{}: {text}", printable(file)),
            None => f.write_str(&text),
        }
    }
}

/// Names the file and what was being done with it when the system refused.
pub trait Context<T> {
    fn cannot(self, verb: &str, file: &Path) -> Result<T>;
}

impl<T> Context<T> for io::Result<T> {
    fn cannot(self, verb: &str, file: &Path) -> Result<T> {
        self.map_err(|error| {
            let remedy = match error.kind() {
                io::ErrorKind::NotFound => "check the name",
                io::ErrorKind::PermissionDenied => "check its permissions",
                io::ErrorKind::StorageFull => "free some space on its file system",
                _ => "check the file system that holds it",
            };
            Failure::new(file, format!("cannot {verb} it: {error}"), remedy)
        })
    }
}

impl<T> Context<T> for rustix::io::Result<T> {
    fn cannot(self, verb: &str, file: &Path) -> Result<T> {
        self.map_err(io::Error::from).cannot(verb, file)
    }
}

/// A path as text that cannot do anything to a terminal: names come from archives and images too.
pub fn printable(path: &Path) -> String {
    clean(&path.to_string_lossy())
}

/// Text from a file, without control characters and those that turn the direction of writing.
pub fn clean(text: &str) -> String {
    let is_bad =
        |c: char| c.is_control() || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    text.chars()
        .map(|c| if is_bad(c) { '?' } else { c })
        .collect()
}
