//! The options that were given, and their values.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

use super::ArgsError;
use super::options::{NOT_OFFERED, OPTIONS};

/// The options that were given, each once, with their values.
pub(super) struct Given(Vec<(&'static str, OsString)>);

impl Given {
    /// Reads the words of a command line.
    ///
    /// # Errors
    /// A word that is no option, or an option without its value or given twice.
    pub fn read(words: Vec<OsString>) -> Result<Self, ArgsError> {
        let mut given = Given(Vec::new());
        let mut words = words.into_iter();
        while let Some(word) = words.next() {
            let lossy = word.to_string_lossy();
            let name = lossy.strip_prefix("--").unwrap_or_default();
            if let Some((option, why)) = NOT_OFFERED.iter().find(|(option, _)| *option == name) {
                return Err(ArgsError::NotOffered(option, why));
            }
            let option = OPTIONS
                .iter()
                .find(|option| option.name == name)
                .ok_or_else(|| ArgsError::Unexpected(lossy.clone().into_owned()))?;
            if given.has(option.name) {
                return Err(ArgsError::Twice(option.name));
            }
            let value = if option.value.is_empty() {
                OsString::new()
            } else {
                words
                    .next()
                    .filter(|value| !value.as_encoded_bytes().starts_with(b"--"))
                    .ok_or(ArgsError::NoValue(option.name))?
            };
            given.0.push((option.name, value));
        }
        Ok(given)
    }

    fn value(&self, name: &str) -> Option<&OsStr> {
        let (_, value) = self.0.iter().find(|(option, _)| *option == name)?;
        Some(value)
    }

    pub fn has(&self, name: &str) -> bool {
        self.value(name).is_some()
    }

    pub fn path(&self, name: &str) -> Option<PathBuf> {
        self.value(name).map(PathBuf::from)
    }

    pub fn text(&self, name: &'static str) -> Result<Option<String>, ArgsError> {
        self.parsed(name, "text in UTF-8", |text| Some(text.to_string()))
    }

    pub fn number<N: std::str::FromStr>(&self, name: &'static str) -> Result<Option<N>, ArgsError> {
        self.parsed(name, "a whole number", |text| text.parse().ok())
    }

    pub fn one_of<T: Copy>(
        &self,
        name: &'static str,
        choices: &[(&str, T)],
    ) -> Result<Option<T>, ArgsError> {
        let takes = OPTIONS
            .iter()
            .find(|option| option.name == name)
            .map_or("", |option| option.value);
        self.parsed(name, takes, |text| {
            let (_, choice) = choices.iter().find(|(word, _)| *word == text)?;
            Some(*choice)
        })
    }

    /// The value of `option`, if it is given, as `parse` makes it of the text.
    pub fn parsed<T>(
        &self,
        option: &'static str,
        takes: &'static str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Result<Option<T>, ArgsError> {
        let Some(value) = self.value(option) else {
            return Ok(None);
        };
        match value.to_str().and_then(parse) {
            Some(parsed) => Ok(Some(parsed)),
            None => Err(ArgsError::Value {
                option,
                value: value.to_string_lossy().into_owned(),
                takes,
            }),
        }
    }
}
