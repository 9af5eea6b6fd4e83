//! The command lines of the jailer: words to checked plain structs. Pure: no file is opened, nothing
//! of the host is looked at.
//!
//! [`Words`] serves every subcommand. The flags of the compatible jail and their rules are those
//! that clients of Firecracker's jailer know: `--flag value`, never `--flag=value`; no flag twice,
//! but for `--cgroup` and `--resource-limit`; a value does not begin with two dashes; everything
//! after a bare `--` belongs to the monitor.

#[cfg(any(test, fuzzing))]
pub mod fuzz;

use std::borrow::Cow;
use std::ffi::{OsStr, OsString};
use std::os::fd::RawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use mayfly::wire;
use rustix::fs::{Gid, Uid};

use crate::cgroup::{Value, Version};
use crate::monitor::ResourceLimits;
use crate::root::Owner;

/// What `--help` prints.
pub const HELP: &str = include_str!("help.txt");

/// A command line cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ArgsError {
    #[error("cannot use the argument \"{0}\": it is not known; {1}")]
    Unknown(String, &'static str),
    #[error("cannot use {0}: it is given twice")]
    Twice(&'static str),
    #[error("cannot use {0}: its value is missing")]
    NoValue(&'static str),
    #[error("cannot build a jail: {0} is missing; --help shows what is needed")]
    Missing(&'static str),
    #[error("cannot use {0} \"{1}\": {2}")]
    Value(&'static str, String, Why),
}

/// Why a value cannot be used, and what to do about it.
pub type Why = Cow<'static, str>;

/// The options that a command line may have, by what they are followed by.
#[derive(Debug)]
pub struct Known {
    /// By nothing.
    pub flags: &'static str,
    /// By a value.
    pub once: &'static str,
    /// By a value, any number of times.
    pub repeatable: &'static str,
    /// By a value that may begin with two dashes.
    pub text: &'static str,
    /// Where they are shown.
    pub help: &'static str,
}

/// The options of one command line, not yet understood.
#[derive(Debug, Default)]
pub struct Words(Vec<(&'static str, OsString)>);

impl Words {
    /// Finds the options that are known in `words`.
    pub fn sort(words: Vec<OsString>, known: &Known) -> Result<Words, ArgsError> {
        let find =
            |among: &'static str, word: &OsStr| among.split_whitespace().find(|name| word == *name);
        let with_value = |word: &OsStr| {
            let once = find(known.once, word).or_else(|| find(known.text, word));
            once.or_else(|| find(known.repeatable, word))
        };
        let mut sorted = Words::default();
        let mut words = words.into_iter();
        while let Some(word) = words.next() {
            let (name, value) = if let Some(name) = find(known.flags, &word) {
                (name, Some(OsString::new()))
            } else if let Some(name) = with_value(&word) {
                let may_be = |value: &OsString| {
                    find(known.text, &word).is_some() || !value.as_bytes().starts_with(b"--")
                };
                (name, words.next().filter(may_be))
            } else {
                let joined = word.to_str().and_then(|word| word.split_once('='));
                let is_joined = joined
                    .and_then(|(name, _)| with_value(name.as_ref()))
                    .is_some();
                let remedy = match is_joined {
                    true => "put a blank in place of the first =",
                    false => known.help,
                };
                return Err(ArgsError::Unknown(word.display().to_string(), remedy));
            };
            if find(known.repeatable, &word).is_none() && sorted.has(name) {
                return Err(ArgsError::Twice(name));
            }
            sorted
                .0
                .push((name, value.ok_or(ArgsError::NoValue(name))?));
        }
        Ok(sorted)
    }

    /// Whether `name` was given.
    pub fn has(&self, name: &str) -> bool {
        self.0.iter().any(|(other, _)| *other == name)
    }

    /// The next value of `name`.
    pub fn one(&mut self, name: &str) -> Option<OsString> {
        let at = self.0.iter().position(|(other, _)| *other == name)?;
        Some(self.0.remove(at).1)
    }

    /// The next value of `name`, a path.
    pub fn path(&mut self, name: &str) -> Option<PathBuf> {
        self.one(name).map(PathBuf::from)
    }

    /// The next value of `name`, a text, understood.
    pub fn parsed<T>(
        &mut self,
        name: &'static str,
        understand: impl Fn(&str) -> Result<T, Why>,
    ) -> Result<Option<T>, ArgsError> {
        let understood = |value: OsString| {
            let text = value.to_str().ok_or("it is not UTF-8".into());
            let value = || value.display().to_string();
            text.and_then(&understand)
                .map_err(|why| ArgsError::Value(name, value(), why))
        };
        self.one(name).map(understood).transpose()
    }

    /// All values of `name`, understood.
    pub fn all<T>(
        &mut self,
        name: &'static str,
        understand: impl Fn(&str) -> Result<T, Why>,
    ) -> Result<Vec<T>, ArgsError> {
        std::iter::from_fn(|| self.parsed(name, &understand).transpose()).collect()
    }

    /// The next value of `name`, which must be there.
    fn need<T>(
        &mut self,
        name: &'static str,
        understand: impl Fn(&str) -> Result<T, Why>,
    ) -> Result<T, ArgsError> {
        self.parsed(name, understand)?
            .ok_or(ArgsError::Missing(name))
    }
}

/// Whether help is asked for, which wins over anything else.
pub fn asks_for_help(words: &[OsString]) -> bool {
    words.iter().any(|word| word == "--help" || word == "-h")
}

/// What the jailer is asked to do.
#[derive(Debug, PartialEq, Eq)]
pub enum Command {
    /// Print the help text.
    Help,
    /// Print the version.
    Version,
    /// Build a jail with a root folder on the host and execute the monitor in it.
    Compatible(Box<Compatible>),
}

/// The compatible jail, as asked for.
#[derive(Debug, PartialEq, Eq)]
pub struct Compatible {
    /// Name of the jail and of the microVM.
    pub id: String,
    /// The monitor's executable.
    pub exec_file: PathBuf,
    /// User and group of the jail.
    pub owner: Owner,
    /// Folder below which jails are made.
    pub base: PathBuf,
    /// File of the network namespace to join.
    pub netns: Option<PathBuf>,
    /// Which cgroup interface.
    pub cgroup_version: Version,
    /// Values for cgroup files, in the order given.
    pub cgroups: Vec<Value>,
    /// Names of the groups above the microVM's; none: the name of the executable.
    pub parent_cgroup: Option<Vec<OsString>>,
    /// Limits of the monitor's process.
    pub limits: ResourceLimits,
    /// Detach from terminal and session.
    pub daemonize: bool,
    /// A pid namespace of its own.
    pub new_pid_ns: bool,
    /// What follows `--`.
    pub monitor_args: Vec<OsString>,
}

const KNOWN: Known = Known {
    flags: "--daemonize --new-pid-ns",
    once: "--id --exec-file --uid --gid --chroot-base-dir --netns --cgroup-version --parent-cgroup",
    repeatable: "--cgroup --resource-limit",
    text: "",
    help: "--help lists what is; arguments of the monitor come after --",
};

/// Understands a command line (without the program's name).
pub fn parse(mut words: Vec<OsString>) -> Result<Command, ArgsError> {
    let mut monitor_args = Vec::new();
    if let Some(at) = words.iter().position(|word| word == "--") {
        monitor_args = words.split_off(at + 1);
        words.pop();
    }
    if asks_for_help(&words) {
        return Ok(Command::Help);
    }
    if words.iter().any(|word| word == "--version") {
        return Ok(Command::Version);
    }
    let mut words = Words::sort(words, &KNOWN)?;
    let limits = resource_limits(&mut words)?;
    Ok(Command::Compatible(Box::new(Compatible {
        id: words.need("--id", id)?,
        exec_file: words
            .path("--exec-file")
            .ok_or(ArgsError::Missing("--exec-file"))?,
        owner: Owner {
            uid: Uid::from_raw(words.need("--uid", account)?),
            gid: Gid::from_raw(words.need("--gid", account)?),
        },
        base: words
            .path("--chroot-base-dir")
            .unwrap_or_else(|| "/srv/jailer".into()),
        netns: words.path("--netns"),
        cgroup_version: words
            .parsed("--cgroup-version", cgroup_version)?
            .unwrap_or(Version::V1),
        cgroups: words.all("--cgroup", cgroup_value)?,
        parent_cgroup: parent_cgroup(&mut words)?,
        limits,
        daemonize: words.has("--daemonize"),
        new_pid_ns: words.has("--new-pid-ns"),
        monitor_args,
    })))
}

/// An id is a folder's name on the host and a cgroup's.
pub fn id(text: &str) -> Result<String, Why> {
    wire::id::instance(text)
        .map(str::to_owned)
        .map_err(|why| why.to_string().into())
}

/// The number of a descriptor that was passed.
pub fn descriptor(text: &str) -> Result<RawFd, Why> {
    // 0 to 2 are the console's.
    let number = text.parse().ok().filter(|&number: &RawFd| number > 2);
    number.ok_or("it is not the number of a descriptor above 2".into())
}

/// The name of a microVM that is run, as container engines give one to a container.
pub fn name(text: &str) -> Result<String, Why> {
    /// A socket is named after it, and the name of that has 107 bytes at most.
    const LONGEST: usize = 100;
    let is_fit = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    let is_plain = text
        .as_bytes()
        .first()
        .is_some_and(u8::is_ascii_alphanumeric);
    match is_plain && text.len() <= LONGEST && text.bytes().all(is_fit) {
        true => Ok(text.to_owned()),
        false => Err(format!(
            "an id has 1 to {LONGEST} letters, digits, -, _ and ., and begins with a letter or digit"
        )
        .into()),
    }
}

/// The number of a user or a group.
pub fn account(text: &str) -> Result<u32, Why> {
    // The highest number means "leave as it is" to the kernel, which here would be root.
    let number = text.parse().ok().filter(|&number| number != u32::MAX);
    number.ok_or_else(|| format!("it is not a number from 0 to {}", u32::MAX - 1).into())
}

/// A version of cgroups.
pub fn cgroup_version(text: &str) -> Result<Version, Why> {
    match text {
        "1" => Ok(Version::V1),
        "2" => Ok(Version::V2),
        _ => Err("it is neither 1 nor 2".into()),
    }
}

/// A value for a file of a cgroup.
pub fn cgroup_value(text: &str) -> Result<Value, Why> {
    let give = "give FILE=VALUE, the file as CONTROLLER.NAME, e.g. cpu.shares=512";
    let refuse = |why: &str| Err(format!("{why}; {give}").into());
    let Some((file, value)) = text.split_once('=') else {
        return refuse("it has no =");
    };
    if value.is_empty() || value.contains('\n') {
        return refuse("its value is empty or has more than one line");
    }
    if file.contains('/') {
        return refuse("a file of the cgroup itself is wanted, without a path");
    }
    match file.split_once('.') {
        Some((controller, name)) if !controller.is_empty() && !name.is_empty() => Ok(Value {
            file: file.to_owned(),
            text: value.to_owned(),
        }),
        _ => refuse("its file names no controller"),
    }
}

/// The names of a path that leads down only. It is relative to the cgroup mount; a slash before it
/// is how /proc/self/cgroup writes such paths.
pub fn parent_cgroup(words: &mut Words) -> Result<Option<Vec<OsString>>, ArgsError> {
    const NAME: &str = "--parent-cgroup";
    let Some(path) = words.one(NAME) else {
        return Ok(None);
    };
    let steps: Vec<&[u8]> = path.as_bytes().split(|&byte| byte == b'/').collect();
    if steps.iter().any(|&step| step == b"." || step == b"..") {
        let why = "it has . or .. in it; give a path relative to the cgroup mount";
        return Err(ArgsError::Value(
            NAME,
            path.display().to_string(),
            why.into(),
        ));
    }
    let names = steps.into_iter().filter(|step| !step.is_empty());
    let names = names.map(|step| OsString::from_vec(step.to_vec()));
    Ok(Some(names.collect()))
}

/// Limits of the monitor's process. As in Firecracker, the last one of a name counts.
pub fn resource_limits(words: &mut Words) -> Result<ResourceLimits, ArgsError> {
    let mut limits = ResourceLimits::default();
    let given = words.all("--resource-limit", |text| {
        let refuse = |why| Why::from(format!("{why}; give fsize=BYTES or no-file=COUNT"));
        let (name, value) = text.split_once('=').ok_or_else(|| refuse("it has no ="))?;
        let value = value.parse::<u64>();
        let value = value.map_err(|_| refuse("its value is not a number"))?;
        match name {
            "fsize" | "no-file" => Ok((name == "fsize", value)),
            _ => Err(refuse("that resource is not known")),
        }
    })?;
    for (is_size, value) in given {
        let limit = match is_size {
            true => &mut limits.file_size,
            false => &mut limits.open_files,
        };
        *limit = Some(value);
    }
    Ok(limits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::message;

    const LEAST: &str = "--id a --exec-file /m --uid 1 --gid 2";

    fn line(text: &str) -> Result<Command, ArgsError> {
        parse(
            text.split(' ')
                .filter(|word| !word.is_empty())
                .map(OsString::from)
                .collect(),
        )
    }

    fn compatible(text: &str) -> Compatible {
        match line(text) {
            Ok(Command::Compatible(args)) => *args,
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn parse_of_the_least_gives_the_defaults() {
        assert_eq!(
            compatible(LEAST),
            Compatible {
                id: "a".into(),
                exec_file: "/m".into(),
                owner: Owner {
                    uid: Uid::from_raw(1),
                    gid: Gid::from_raw(2),
                },
                base: "/srv/jailer".into(),
                netns: None,
                cgroup_version: Version::V1,
                cgroups: vec![],
                parent_cgroup: None,
                limits: ResourceLimits::default(),
                daemonize: false,
                new_pid_ns: false,
                monitor_args: vec![],
            }
        );
    }

    #[test]
    fn parse_of_everything() {
        let args = compatible(&format!(
            "{LEAST} --chroot-base-dir b --netns n --cgroup cpu.shares=2 --cgroup io.max=8:0=x \
             --cgroup-version 2 --parent-cgroup /x//y/ --resource-limit fsize=5 \
             --resource-limit no-file=6 --resource-limit no-file=7 --daemonize --new-pid-ns \
             -- --id other --version --"
        ));
        assert_eq!(args.base, PathBuf::from("b"));
        assert_eq!(args.netns, Some("n".into()));
        assert_eq!(args.cgroup_version, Version::V2);
        assert_eq!(args.parent_cgroup, Some(vec!["x".into(), "y".into()]));
        let limits = (args.limits.file_size, args.limits.open_files);
        assert_eq!(limits, (Some(5), Some(7)));
        assert!(args.daemonize && args.new_pid_ns);
        assert_eq!(args.cgroups[0].controller(), "cpu");
        assert_eq!(args.cgroups[1].text, "8:0=x");
        assert_eq!(args.monitor_args, ["--id", "other", "--version", "--"]);
    }

    #[test]
    fn help_and_version_win_before_the_separator_only() {
        assert_eq!(line("--nonsense -h").unwrap(), Command::Help);
        assert_eq!(line("--id --help").unwrap(), Command::Help);
        assert_eq!(line("--version --id").unwrap(), Command::Version);
        assert!(matches!(
            line(&format!("{LEAST} -- --help")),
            Ok(Command::Compatible(_))
        ));
    }

    #[test]
    fn parse_when_something_is_wrong_names_it() {
        let long = "a".repeat(65);
        for (text, expected) in [
            ("", "--id is missing"),
            ("--id a --exec-file /m --uid 1", "--gid is missing"),
            ("--id a --id b", "--id: it is given twice"),
            ("--daemonize --daemonize", "--daemonize: it is given twice"),
            ("--id", "--id: its value is missing"),
            ("--id --uid", "--id: its value is missing"),
            ("--id=a", "put a blank"),
            ("--cgroup=cpu.shares=1", "put a blank"),
            ("--daemonize=1", "not known"),
            ("--node 1", "\"--node\": it is not known"),
            ("word", "\"word\": it is not known"),
            (
                "--id a/b --exec-file /m --uid 1 --gid 2",
                "has 1 to 64 letters",
            ),
            (
                "--id .. --exec-file /m --uid 1 --gid 2",
                "has 1 to 64 letters",
            ),
            (
                &format!("--id {long} --exec-file /m --uid 1 --gid 2"),
                "has 1 to 64 letters",
            ),
            ("--id a --exec-file /m --uid root --gid 2", "--uid \"root\""),
            ("--id a --exec-file /m --uid -1 --gid 2", "--uid \"-1\""),
            (
                "--id a --exec-file /m --uid 4294967295 --gid 2",
                "--uid \"4294967295\"",
            ),
            (
                "--id a --exec-file /m --uid 1 --gid 4294967295",
                "--gid \"4294967295\"",
            ),
        ] {
            let failure = message(&line(text).unwrap_err());
            assert!(failure.contains(expected), "{text}: {failure}");
        }
    }

    #[test]
    fn parse_when_an_option_has_a_bad_value_names_it() {
        for (text, expected) in [
            ("--cgroup-version 3", "neither 1 nor 2"),
            ("--cgroup cpu", "it has no ="),
            ("--cgroup cpu.shares=", "its value is empty"),
            ("--cgroup shares=1", "names no controller"),
            ("--cgroup .x=1", "names no controller"),
            ("--cgroup ../cpu.shares=1", "without a path"),
            ("--parent-cgroup x/../y", "it has . or .."),
            ("--parent-cgroup /./y", "it has . or .."),
            ("--resource-limit fsize", "it has no ="),
            ("--resource-limit fsize=x", "not a number"),
            ("--resource-limit nproc=1", "not known"),
        ] {
            let failure = message(&line(&format!("{LEAST} {text}")).unwrap_err());
            assert!(failure.contains(expected), "{text}: {failure}");
        }
    }

    #[test]
    fn id_that_is_not_utf8_is_refused() {
        let words = ["--id", "x", "--exec-file", "/m", "--uid", "1", "--gid", "1"];
        let mut words: Vec<OsString> = words.into_iter().map(OsString::from).collect();
        words[1] = OsString::from_vec(vec![b'a', 0xff]);
        assert!(parse(words).unwrap_err().to_string().contains("UTF-8"));
    }
}
