//! Looks at snapshots (`info`), checks them (`verify`), and merges diffs into what they are applied to
//! (`merge`). `tools/snapshot` builds and runs this.
//!
//! One thread; it reads files, and writes nothing but the result of a merge, which is in place whole or
//! not at all. Snapshots are hostile input: the library reads state files, and of a memory file nothing
//! is believed but its pages.

#[cfg(test)]
mod files_tests;
/// Entry points for `tools/fuzz`.
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzz;
#[cfg(any(test, fuzzing))]
#[path = "../../../tests/common/fuzz_folder.rs"]
mod fuzz_folder;
#[cfg(any(test, fuzzing))]
#[path = "../../../tests/common/fuzz_input.rs"]
mod fuzz_input;
#[cfg(test)]
#[path = "../../../tests/common/fuzz_run.rs"]
mod fuzz_run;
mod image;
mod info;
mod merge;
mod opened;
mod verify;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use opened::{Failure, Paths};

const USAGE: &str = "\
usage: tools/snapshot info STATE|DIR
       tools/snapshot verify DIR | STATE MEMORY
       tools/snapshot merge BASE DIFF... -o OUT

  info    prints what a state file says: version, id, parent, memory, machine
  verify  whether the files are whole, belong together, and hold what was written; reads all of the memory
  merge   writes the snapshot that BASE and the DIFFs, in the order in which they were taken, amount to; it has
          the state and the id of the last one. The base of a diff may be a diff too: so is the result then.

BASE, each DIFF and OUT are either a directory with the files `state` and `memory`, or two files: STATE MEMORY.
OUT may be what BASE is: it is replaced when the result is whole.
";

/// What the command line asks for.
enum Asked {
    Help,
    Info(PathBuf),
    Verify(Paths),
    Merge {
        base: Paths,
        diffs: Vec<Paths>,
        output: Paths,
    },
}

/// The program.
pub fn main() -> ExitCode {
    let words: Vec<OsString> = std::env::args_os().skip(1).collect();
    let Some(asked) = parse(&words) else {
        eprint!("{USAGE}");
        return ExitCode::from(2);
    };
    let result = match asked {
        Asked::Help => {
            print!("{USAGE}");
            Ok(())
        }
        Asked::Info(path) => info::run(&path),
        Asked::Verify(paths) => verify::run(&paths),
        Asked::Merge {
            base,
            diffs,
            output,
        } => merge::run(&base, &diffs, &output),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure(message)) => {
            eprintln!("snapshot: {message}");
            ExitCode::FAILURE
        }
    }
}

fn parse(words: &[OsString]) -> Option<Asked> {
    if words.iter().any(|word| word == "--help" || word == "-h") {
        return Some(Asked::Help);
    }
    let (command, rest) = words.split_first()?;
    match (command.to_str()?, rest) {
        ("info", [path]) => {
            let path = PathBuf::from(path);
            Some(Asked::Info(match path.is_dir() {
                true => path.join("state"),
                false => path,
            }))
        }
        ("verify", rest) => {
            let mut all = pairs(rest)?;
            match (all.pop(), all.is_empty()) {
                (Some(only), true) => Some(Asked::Verify(only)),
                _ => None,
            }
        }
        ("merge", rest) => {
            let at = rest.iter().position(|word| word == "-o")?;
            let (inputs, output) = (rest.get(..at)?, rest.get(at.checked_add(1)?..)?);
            let output = match output {
                [folder] => Paths::in_folder(folder.as_ref()),
                [state, memory] => Paths::new(state, memory),
                _ => return None,
            };
            let mut diffs = pairs(inputs)?;
            if diffs.len() < 2 {
                return None;
            }
            Some(Asked::Merge {
                base: diffs.remove(0),
                diffs,
                output,
            })
        }
        _ => None,
    }
}

/// Snapshots by their directories, or by two files each.
fn pairs(words: &[OsString]) -> Option<Vec<Paths>> {
    let mut found = Vec::new();
    let mut words = words.iter();
    while let Some(word) = words.next() {
        found.push(match PathBuf::from(word).is_dir() {
            true => Paths::in_folder(word.as_ref()),
            false => Paths::new(word, words.next()?),
        });
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(line: &str) -> Option<Asked> {
        let words: Vec<OsString> = line.split_whitespace().map(OsString::from).collect();
        parse(&words)
    }

    #[test]
    fn parse_when_good_knows_directories_from_files() {
        assert!(matches!(asked("info /etc/x"), Some(Asked::Info(path)) if path.ends_with("x")));
        assert!(
            matches!(asked("info /etc"), Some(Asked::Info(path)) if path.ends_with("etc/state"))
        );
        assert!(matches!(asked("verify /etc"), Some(Asked::Verify(_))));
        assert!(matches!(
            asked("verify /etc/s /etc/m"),
            Some(Asked::Verify(_))
        ));
        assert!(matches!(asked("merge x --help"), Some(Asked::Help)));
        let Some(Asked::Merge {
            base,
            diffs,
            output,
        }) = asked("merge /etc a b /usr -o c d")
        else {
            panic!("it is a merge")
        };
        assert!(base.state.ends_with("etc/state") && base.memory.ends_with("etc/memory"));
        assert_eq!(diffs.len(), 2);
        assert!(diffs[0].state.ends_with("a") && diffs[0].memory.ends_with("b"));
        assert!(output.state.ends_with("c") && output.memory.ends_with("d"));
    }

    #[test]
    fn parse_when_bad_is_nothing() {
        for line in [
            "",
            "info",
            "info a b",
            "verify",
            "verify a",
            "verify /etc /usr",
            "merge /etc /usr",
            "merge /etc -o x",
            "merge /etc a -o x",
            "merge /etc /usr -o",
            "merge /etc /usr -o a b c",
            "look /etc",
        ] {
            assert!(asked(line).is_none(), "{line}");
        }
    }
}
