//! The command lines of `mayfly-jailer exec` and `cp`: words to checked plain structs. Pure.

use std::ffi::OsString;
use std::path::PathBuf;

use super::Target;
use super::copy::Copy;
use crate::args::{self, ArgsError, Known, Words, asks_for_help};
use crate::process::command::{Command, split_command};
use crate::process::place::Place;

/// What `exec --help` prints.
pub const EXEC_HELP: &str = include_str!("exec.txt");
/// What `cp --help` prints.
pub const COPY_HELP: &str = include_str!("cp.txt");

/// A command for a guest that runs.
#[derive(Debug, PartialEq)]
pub struct Exec {
    /// The microVM.
    pub target: Target,
    /// What it is to run.
    pub command: Command,
    /// Whether a process of its own goes on with it.
    pub is_detached: bool,
    /// Where the number of that, or of this one, is written.
    pub pid_file: Option<PathBuf>,
}

const KNOWN: Known = Known {
    flags: "-t --tty -i --interactive --detach",
    once: "--user --workdir --runtime-dir --process --console-socket --pid-file",
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
    let id = text(id, "exec", args::name)?;
    let mut words = Words::sort(words, &KNOWN)?;
    let place = Place::new(words.path("--runtime-dir"));
    let missing = ArgsError::Missing("the command, after -- or with --process,");
    let command = Command::take(&mut words, command, missing)?;
    let target = Target { id, place };
    Ok(Some(Exec {
        target,
        command,
        is_detached: words.has("--detach"),
        pid_file: words.path("--pid-file"),
    }))
}

const OF_PLACE: Known = Known {
    flags: "--merge",
    once: "--runtime-dir",
    repeatable: "",
    text: "",
    help: "see --help of it",
};

/// The options of a command line and its other words, which may stand anywhere among them.
pub fn separate(words: Vec<OsString>) -> Result<(Words, Vec<OsString>), ArgsError> {
    let (mut options, mut others) = (Vec::new(), Vec::new());
    let mut words = words.into_iter();
    while let Some(word) = words.next() {
        let has_value = word == "--runtime-dir";
        match word.as_encoded_bytes().starts_with(b"--") {
            true => options.push(word),
            false => others.push(word),
        }
        options.extend(words.by_ref().take(usize::from(has_value)));
    }
    Ok((Words::sort(options, &OF_PLACE)?, others))
}

/// Understands the words after `cp`; none when help is asked for.
pub fn parse_copy(words: Vec<OsString>) -> Result<Option<Copy>, ArgsError> {
    if asks_for_help(&words) {
        return Ok(None);
    }
    let (mut options, places) = separate(words)?;
    let merges = options.has("--merge");
    let place = Place::new(options.path("--runtime-dir"));
    let [from, to]: [OsString; 2] = places
        .try_into()
        .map_err(|_| ArgsError::Missing("one of the two places, as in `cp ID:PATH FILE`,"))?;
    match (guest_place(&from), guest_place(&to)) {
        (Some((id, path)), None) => Ok(Some(Copy::FromGuest {
            target: Target { id, place },
            path,
            to: to.into(),
            merges,
        })),
        (None, Some((id, path))) => Ok(Some(Copy::ToGuest {
            target: Target { id, place },
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
    let id = args::name(id).ok()?;
    path.starts_with('/').then(|| (id, path.to_owned()))
}

/// Understands a word.
pub fn text<T>(
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
            assert_eq!(exec.target.id, "vm-1");
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
        let path = "/etc/x".to_owned();
        let target = |given: Option<&str>| Target {
            id: "vm-1".to_owned(),
            place: Place::new(given.map(PathBuf::from)),
        };
        let to = PathBuf::from("./a:b");
        for (line, merges, given) in [
            ("vm-1:/etc/x ./a:b", false, None),
            ("--merge vm-1:/etc/x ./a:b", true, None),
            (
                "vm-1:/etc/x --runtime-dir /r ./a:b --merge",
                true,
                Some("/r"),
            ),
        ] {
            let expected = Copy::FromGuest {
                target: target(given),
                path: path.clone(),
                to: to.clone(),
                merges,
            };
            assert_eq!(copy(line).unwrap(), Some(expected));
        }
        let from = PathBuf::from("/y");
        let target = target(None);
        assert_eq!(
            copy("/y vm-1:/etc/x").unwrap(),
            Some(Copy::ToGuest { target, path, from })
        );
        for line in ["", "a", "a b", "vm:/a vm:/b", "vm:a b", "a b c"] {
            assert!(copy(line).is_err(), "{line}");
        }
    }
}
