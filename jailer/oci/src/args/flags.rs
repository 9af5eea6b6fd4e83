//! Flags as Go has them: one or two dashes, the value after `=` or in the next word, up to the first word
//! that is none.

use std::path::PathBuf;

use super::{ArgsError, check_id};

/// The flags of one command: names, each with its short one, if it has one, after a `/`.
#[derive(Clone, Copy)]
pub struct Known {
    /// Those without a value.
    pub flags: &'static str,
    /// Those with one.
    pub values: &'static str,
}

/// The flags of one command, and the words after them.
pub struct Sorted {
    command: &'static str,
    flags: Vec<(&'static str, String)>,
    pub words: std::vec::IntoIter<String>,
}

impl Sorted {
    /// Takes the flags from the front of `words`, as Go does.
    pub fn new(
        command: &'static str,
        known: Known,
        words: Vec<String>,
    ) -> Result<Sorted, ArgsError> {
        let find = |among: &'static str, word: &str| {
            let names = among.split_whitespace();
            let mut names = names.map(|names| names.split_once('/').unwrap_or((names, names)));
            names
                .find(|(long, short)| word == *long || word == *short)
                .map(|(long, _)| long)
        };
        let mut flags = Vec::new();
        let mut words = words.into_iter();
        while let Some(word) = words.as_slice().first() {
            let Some(name) = word.strip_prefix('-').filter(|name| !name.is_empty()) else {
                break;
            };
            let name = name.strip_prefix('-').unwrap_or(name).to_owned();
            let word = words.next().unwrap_or_default();
            if word == "--" {
                break;
            }
            let (name, value) = match name.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (name.as_str(), None),
            };
            if let Some(long) = find(known.flags, name) {
                // Whatever the value is, Go's own words for no are all that switches it off.
                let is_off = value.is_some_and(|value| {
                    matches!(
                        value.as_str(),
                        "false" | "0" | "f" | "F" | "FALSE" | "False"
                    )
                });
                if !is_off {
                    flags.push((long, String::new()));
                }
            } else if let Some(long) = find(known.values, name) {
                let value = value.or_else(|| words.next());
                flags.push((long, value.ok_or(ArgsError::NoValue(word, command))?));
            } else {
                return Err(ArgsError::Unknown(word, command));
            }
        }
        Ok(Sorted {
            command,
            flags,
            words,
        })
    }

    pub fn has(&self, name: &str) -> bool {
        self.flags.iter().any(|(other, _)| *other == name)
    }

    /// The last value of `name`, which is the one that counts in Go.
    pub fn last(&self, name: &str) -> Option<&str> {
        let mut flags = self.flags.iter().rev();
        flags
            .find(|(other, _)| *other == name)
            .map(|(_, value)| value.as_str())
    }

    pub fn path(&self, name: &str) -> Option<PathBuf> {
        self.last(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    }

    pub fn all(&self, name: &str) -> Vec<String> {
        let flags = self.flags.iter().filter(|(other, _)| *other == name);
        flags.map(|(_, value)| value.clone()).collect()
    }

    /// The container's id, which comes first.
    pub fn id(&mut self) -> Result<String, ArgsError> {
        let id = self.words.next().ok_or(ArgsError::Words(
            self.command,
            "the container's id is missing",
        ))?;
        check_id(id)
    }

    /// No words but those that were taken.
    pub fn end(&self) -> Result<(), ArgsError> {
        match self.words.as_slice() {
            [] => Ok(()),
            _ => Err(ArgsError::Words(
                self.command,
                "there are more words than it takes; flags come before the id",
            )),
        }
    }
}
