//! The command line of the soak.

use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::args::{count, unknown, value_of};
use crate::failure::{Failure, Result};

/// What `--help` prints.
pub const USAGE: &str = "\
tools/soak [OPTIONS]: many short lives of microVMs beside two long ones, and whether anything grows or stays behind.
Needs root and /dev/kvm. Ends with 1 when it has found something.

options
  --minutes N, --seconds N   how long (10 minutes); Ctrl-C ends it before
  --settle N                 how many seconds what a life leaves may take to go (60)
  --seed N                   what is random is as in the run that printed this number
  --json FILE                write all samples
  --svg FILE                 draw them
  --mayfly PATH, --jailer PATH, --probe PATH
                             measure these executables, in place of those just built
  --commit TEXT              what was built, for the files
";

/// What was asked for.
#[derive(Debug)]
pub struct Args {
    /// How long.
    pub seconds: u64,
    /// How long what a life leaves may take to go.
    pub settle: Duration,
    /// Where random numbers begin.
    pub seed: u64,
    /// The monitor.
    pub mayfly: PathBuf,
    /// Its jailer.
    pub jailer: PathBuf,
    /// The guest.
    pub probe: PathBuf,
    /// The commit that was built.
    pub commit: Option<String>,
    /// Where the samples go.
    pub json: Option<PathBuf>,
    /// Where the picture goes.
    pub svg: Option<PathBuf>,
}

/// Reads the command line (without the program's name); nothing if help was asked for.
pub fn parse(words: impl IntoIterator<Item = String>) -> Result<Option<Args>> {
    let mut words = words.into_iter();
    let (mut seconds, mut settle, mut seed) = (600, 60, seed());
    let (mut mayfly, mut jailer, mut probe) = (None, None, None);
    let (mut commit, mut json, mut svg) = (None, None, None);
    while let Some(word) = words.next() {
        let mut value = || value_of(&word, &mut words);
        match word.as_str() {
            "--help" | "-h" => return Ok(None),
            "--minutes" => seconds = count::<u64>(&word, &value()?)?.saturating_mul(60),
            "--seconds" => seconds = count(&word, &value()?)?,
            "--settle" => settle = count(&word, &value()?)?,
            "--seed" => seed = count(&word, &value()?)?,
            "--mayfly" => mayfly = Some(value()?),
            "--jailer" => jailer = Some(value()?),
            "--probe" => probe = Some(value()?),
            "--commit" => commit = Some(value()?),
            "--json" => json = Some(PathBuf::from(value()?)),
            "--svg" => svg = Some(PathBuf::from(value()?)),
            _ => return Err(unknown(&word)),
        }
    }
    Ok(Some(Args {
        seconds,
        settle: Duration::from_secs(settle),
        seed,
        mayfly: executable("--mayfly", mayfly)?,
        jailer: executable("--jailer", jailer)?,
        probe: executable("--probe", probe)?,
        commit,
        json,
        svg,
    }))
}

fn executable(option: &str, path: Option<String>) -> Result<PathBuf> {
    let path = path.ok_or_else(|| Failure::new(format!("say which: {option} PATH")))?;
    PathBuf::from(&path)
        .canonicalize()
        .map_err(|error| Failure::new(format!("cannot use {option} {path}: {error}")))
}

/// Another one at each start.
fn seed() -> u64 {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    now.as_nanos() as u64 | 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<Option<Args>> {
        let whole = format!(
            "--mayfly /proc/self/exe --jailer /proc/self/exe --probe /proc/self/exe {text}"
        );
        parse(whole.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn time_when_given_is_in_seconds() {
        assert_eq!(parsed("--minutes 3").unwrap().unwrap().seconds, 180);
        assert_eq!(parsed("--seconds 3").unwrap().unwrap().seconds, 3);
        assert_eq!(parsed("").unwrap().unwrap().seconds, 600);
    }

    #[test]
    fn mistakes_when_made_are_refused() {
        for mistake in ["--minutes", "--minutes 0", "--seed x", "--what", "minutes"] {
            assert!(parsed(mistake).is_err(), "{mistake:?} was taken");
        }
        assert!(parse(["--seed".to_owned(), "1".to_owned()]).is_err());
    }

    #[test]
    fn help_when_asked_for_is_nothing_to_do() {
        assert!(parsed("--help").unwrap().is_none());
    }
}
