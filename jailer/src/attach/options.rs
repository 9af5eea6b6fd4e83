//! The command lines of `mayfly-jailer exec` and `cp`: words to checked plain structs. Pure.

use std::ffi::OsString;
use std::path::PathBuf;

use super::copy::Copy;
use crate::args::{self, ArgsError, Known, Words, asks_for_help};
use crate::run::agent::command::Command;
use crate::run::spec::options::split_command;

/// What `exec --help` prints.
pub const EXEC_HELP: &str = include_str!("exec.txt");
/// What `cp --help` prints.
pub const COPY_HELP: &str = include_str!("cp.txt");

/// A command for a guest that runs.
#[derive(Debug, PartialEq)]
pub struct Exec {
    /// The microVM.
    pub id: String,
    /// What it is to run.
    pub command: Command,
}

const KNOWN: Known = Known {
    flags: "-t --tty -i --interactive",
    once: "--user --workdir",
    repeatable: "--env",
    text: "",
    help: "see exec --help; the command comes after --",
};

/// Understands the words after `exec`; none when help is asked for.
pub fn parse_exec(words: Vec<OsString>) -> Result<Option<Exec>, ArgsError> {
    let (mut words, command) = split_command(words);
    if asks_for_help(&words) {
        return Ok(None);
    }
    // The id stands before the options, or after them.
    let is_option = |word: &OsString| word.as_encoded_bytes().starts_with(b"-");
    let id = match (words.first(), words.last()) {
        (Some(first), _) if !is_option(first) => words.remove(0),
        (_, Some(last)) if words.len() > 1 && !is_option(last) => words.remove(words.len() - 1),
        _ => return Err(ArgsError::Missing("ID, as in `exec ID -- CMD`,")),
    };
    let id = text(id, "exec", args::id)?;
    let command = command.filter(|command| !command.is_empty());
    let command = command.ok_or(ArgsError::Missing("the command, after --,"))?;
    let mut words = Words::sort(words, &KNOWN)?;
    let command = Command::take(&mut words, command)?;
    Ok(Some(Exec { id, command }))
}

/// Understands the words after `cp`; none when help is asked for.
pub fn parse_copy(words: Vec<OsString>) -> Result<Option<Copy>, ArgsError> {
    if asks_for_help(&words) {
        return Ok(None);
    }
    let count = words.len();
    let mut words = words;
    words.retain(|word| word != "--merge");
    let merges = words.len() < count;
    let [from, to]: [OsString; 2] = words
        .try_into()
        .map_err(|_| ArgsError::Missing("one of the two places, as in `cp ID:PATH FILE`,"))?;
    match (guest_place(&from), guest_place(&to)) {
        (Some((id, path)), None) => Ok(Some(Copy::FromGuest {
            id,
            path,
            to: to.into(),
            merges,
        })),
        (None, Some((id, path))) => Ok(Some(Copy::ToGuest {
            id,
            path,
            from: PathBuf::from(from),
        })),
        _ => {
            let why = "one of the two is a place in a microVM, ID:/PATH, and the other is one of this \
                       host; write ./ before a name with a colon";
            Err(ArgsError::Value(
                "cp",
                from.display().to_string(),
                why.into(),
            ))
        }
    }
}

/// The parts of `ID:/PATH`.
fn guest_place(word: &OsString) -> Option<(String, String)> {
    let (id, path) = word.to_str()?.split_once(':')?;
    let id = args::id(id).ok()?;
    path.starts_with('/').then(|| (id, path.to_owned()))
}

fn text<T>(
    word: OsString,
    name: &'static str,
    understand: impl Fn(&str) -> Result<T, args::Why>,
) -> Result<T, ArgsError> {
    let understood = word
        .to_str()
        .ok_or("it is not UTF-8".into())
        .and_then(understand);
    understood.map_err(|why| ArgsError::Value(name, word.display().to_string(), why))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<OsString> {
        line.split_whitespace().map(OsString::from).collect()
    }

    #[test]
    fn exec_takes_the_id_before_or_after_the_options() {
        for line in [
            "vm-1 -t -i --user me --env A=b --workdir /x -- ls -l --help",
            "-t -i --user me --env A=b --workdir /x vm-1 -- ls -l --help",
        ] {
            let exec = parse_exec(words(line)).unwrap().unwrap();
            assert_eq!(exec.id, "vm-1");
            assert_eq!(exec.command.words, ["ls", "-l", "--help"]);
            assert!(exec.command.is_terminal && exec.command.has_input);
            assert_eq!(exec.command.variables, ["A=b"]);
        }
        assert_eq!(parse_exec(words("--help")).unwrap(), None);
        for line in [
            "",
            "vm-1",
            "vm-1 --",
            "-t -- ls",
            "a/b -- ls",
            "vm-1 -x -- ls",
            "vm-1 --workdir x -- ls",
        ] {
            assert!(parse_exec(words(line)).is_err(), "{line}");
        }
    }

    #[test]
    fn copy_has_one_place_on_each_side() {
        let copy = |line| parse_copy(words(line));
        let (id, path) = ("vm-1".to_owned(), "/etc/x".to_owned());
        let to = PathBuf::from("./a:b");
        for (line, merges) in [
            ("vm-1:/etc/x ./a:b", false),
            ("--merge vm-1:/etc/x ./a:b", true),
        ] {
            let expected = Copy::FromGuest {
                id: id.clone(),
                path: path.clone(),
                to: to.clone(),
                merges,
            };
            assert_eq!(copy(line).unwrap(), Some(expected));
        }
        let from = PathBuf::from("/y");
        assert_eq!(
            copy("/y vm-1:/etc/x").unwrap(),
            Some(Copy::ToGuest { id, path, from })
        );
        for line in ["", "a", "a b", "vm:/a vm:/b", "vm:a b", "a b c"] {
            assert!(copy(line).is_err(), "{line}");
        }
    }
}
