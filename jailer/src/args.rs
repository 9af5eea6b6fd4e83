//! The command lines of the jailer: words to checked plain structs. Pure: no file is opened, nothing
//! of the host is looked at.
//!
//! [`Words`] serves every subcommand. The flags of the compatible jail and their rules are those
//! that clients of Firecracker's jailer know: `--flag value`, never `--flag=value`; no flag twice,
//! but for `--cgroup` and `--resource-limit`; a value does not begin with two dashes; everything
//! after a bare `--` belongs to the monitor.

use std::borrow::Cow;
use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use mayfly::wire;
use rustix::fs::{Gid, Uid};

use crate::cgroup::{Value, Version};
use crate::error::Remedy;
use crate::root::Owner;

/// What `--help` prints.
pub const HELP: &str = "\
usage: mayfly-jailer run --kernel FILE [options]    run a microVM in an empty jail: run --help
       mayfly-jailer check                          whether this host can: check --help
       mayfly-jailer --id ID --exec-file FILE --uid UID --gid GID [options] [-- monitor arguments]

The last builds a jail with a root folder on the host, drops privileges, and executes the monitor in
it, as Firecracker's jailer does.

required:
  --id ID                      name of the jail: letters, digits and -, at most 64
  --exec-file FILE             the monitor, a static executable; it is copied into the jail
  --uid UID                    user the monitor runs as
  --gid GID                    group the monitor runs as

options:
  --chroot-base-dir DIR        folder below which jails are made [default: /srv/jailer];
                               a jail's root is DIR/<name of FILE>/ID/root
  --netns FILE                 network namespace to join, e.g. /run/netns/NAME
  --cgroup FILE=VALUE          value of a cgroup file, e.g. memory.limit_in_bytes=134217728;
                               may be repeated
  --cgroup-version 1|2         cgroup interface to use [default: 1]
  --parent-cgroup PATH         cgroup below which the microVM's is made [default: name of FILE]
  --resource-limit NAME=VALUE  fsize (bytes of the largest file) or no-file (descriptors)
                               [default: no-file=2048]; may be repeated
  --daemonize                  a new session, with /dev/null for standard input and outputs
  --new-pid-ns                 run the monitor as process 1 of a new pid namespace
  --version                    print the version
  --help, -h                   print this

Arguments after -- are passed to the monitor as they are.
";

/// A command line cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ArgsError {
    #[error("cannot use the argument \"{0}\": it is not known")]
    Unknown(String, &'static str),
    #[error("cannot use {0}: it is given twice")]
    Twice(&'static str),
    #[error("cannot use {0}: its value is missing")]
    NoValue(&'static str),
    #[error("cannot build a jail: {0} is missing")]
    Missing(&'static str),
    #[error("cannot use {option} \"{value}\": {why}")]
    Value {
        option: &'static str,
        value: String,
        why: Cow<'static, str>,
        remedy: &'static str,
    },
}

impl Remedy for ArgsError {
    fn remedy(&self) -> Option<Cow<'static, str>> {
        let remedy = match self {
            ArgsError::Unknown(_, remedy) | ArgsError::Value { remedy, .. } => remedy,
            ArgsError::Missing(_) => "--help shows what is needed",
            _ => "",
        };
        (!remedy.is_empty()).then_some(remedy.into())
    }
}

/// The error of an option's value.
pub fn bad(
    option: &'static str,
    value: impl fmt::Display,
    why: impl Into<Cow<'static, str>>,
    remedy: &'static str,
) -> ArgsError {
    ArgsError::Value {
        option,
        value: value.to_string(),
        why: why.into(),
        remedy,
    }
}

/// What an option is followed by, and how often it may be given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Takes {
    /// Nothing; once.
    Nothing,
    /// A value; once.
    Value,
    /// A value that may begin with two dashes; once.
    Text,
    /// A value; any number of times.
    Values,
}

/// The options of one command line, not yet understood.
#[derive(Debug, Default)]
pub struct Words(Vec<(&'static str, OsString)>);

impl Words {
    /// Sorts `words` by the table of `known` options. `help` says where that is shown.
    pub fn sort(
        words: Vec<OsString>,
        known: &[(&'static str, Takes)],
        help: &'static str,
    ) -> Result<Words, ArgsError> {
        let mut sorted = Words::default();
        let mut words = words.into_iter();
        while let Some(word) = words.next() {
            let Some(&(name, takes)) = known.iter().find(|(name, _)| word == *name) else {
                let name = word.to_str().and_then(|word| word.split_once('='));
                let is_joined = |(name, _): (&str, &str)| {
                    known
                        .iter()
                        .any(|&(known, takes)| known == name && takes != Takes::Nothing)
                };
                let remedy = if name.is_some_and(is_joined) {
                    "put a blank in place of the first ="
                } else {
                    help
                };
                return Err(ArgsError::Unknown(word.display().to_string(), remedy));
            };
            if takes != Takes::Values && sorted.has(name) {
                return Err(ArgsError::Twice(name));
            }
            let value = match takes {
                Takes::Nothing => Some(OsString::new()),
                Takes::Text => words.next(),
                Takes::Value | Takes::Values => Some(value_of(name, words.next())?),
            };
            let value = value.ok_or(ArgsError::NoValue(name))?;
            sorted.0.push((name, value));
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

    /// The next value of `name`, understood.
    pub fn parsed<T>(
        &mut self,
        name: &str,
        understand: impl Fn(OsString) -> Result<T, ArgsError>,
    ) -> Result<Option<T>, ArgsError> {
        self.one(name).map(understand).transpose()
    }

    /// All values of `name`, understood.
    pub fn all<T>(
        &mut self,
        name: &str,
        understand: impl Fn(OsString) -> Result<T, ArgsError>,
    ) -> Result<Vec<T>, ArgsError> {
        let mut found = Vec::new();
        while let Some(value) = self.parsed(name, &understand)? {
            found.push(value);
        }
        Ok(found)
    }

    fn need(&mut self, name: &'static str) -> Result<OsString, ArgsError> {
        self.one(name).ok_or(ArgsError::Missing(name))
    }
}

/// The value of `name`, which the next word has to be.
pub fn value_of(name: &'static str, value: Option<OsString>) -> Result<OsString, ArgsError> {
    value
        .filter(|value| !value.as_bytes().starts_with(b"--"))
        .ok_or(ArgsError::NoValue(name))
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
    /// Largest file in bytes.
    pub file_size: Option<u64>,
    /// Most descriptors open at once.
    pub open_files: u64,
    /// Detach from terminal and session.
    pub daemonize: bool,
    /// A pid namespace of its own.
    pub new_pid_ns: bool,
    /// What follows `--`.
    pub monitor_args: Vec<OsString>,
}

/// Limit of open descriptors when none is given.
const OPEN_FILES: u64 = 2048;

const OPTIONS: [(&str, Takes); 12] = [
    ("--id", Takes::Value),
    ("--exec-file", Takes::Value),
    ("--uid", Takes::Value),
    ("--gid", Takes::Value),
    ("--chroot-base-dir", Takes::Value),
    ("--netns", Takes::Value),
    ("--cgroup-version", Takes::Value),
    ("--parent-cgroup", Takes::Value),
    ("--cgroup", Takes::Values),
    ("--resource-limit", Takes::Values),
    ("--daemonize", Takes::Nothing),
    ("--new-pid-ns", Takes::Nothing),
];

/// Understands a command line (without the program's name).
pub fn parse(mut words: Vec<OsString>) -> Result<Command, ArgsError> {
    let mut monitor_args = Vec::new();
    if let Some(at) = words.iter().position(|word| word == "--") {
        monitor_args = words.split_off(at + 1);
        words.pop();
    }
    // These two win over anything else on the line.
    if words.iter().any(|word| word == "--help" || word == "-h") {
        return Ok(Command::Help);
    }
    if words.iter().any(|word| word == "--version") {
        return Ok(Command::Version);
    }
    let help = "--help lists what is; arguments of the monitor come after --";
    let mut words = Words::sort(words, &OPTIONS, help)?;
    let (mut file_size, mut open_files) = (None, OPEN_FILES);
    for limit in words.all("--resource-limit", resource_limit)? {
        // As in Firecracker, the last one of a name counts.
        match limit {
            ResourceLimit::FileSize(bytes) => file_size = Some(bytes),
            ResourceLimit::OpenFiles(count) => open_files = count,
        }
    }
    Ok(Command::Compatible(Box::new(Compatible {
        id: check_id(words.need("--id")?)?,
        exec_file: words.need("--exec-file")?.into(),
        owner: Owner {
            uid: Uid::from_raw(account("--uid", words.need("--uid")?)?),
            gid: Gid::from_raw(account("--gid", words.need("--gid")?)?),
        },
        base: words
            .one("--chroot-base-dir")
            .map_or_else(|| "/srv/jailer".into(), PathBuf::from),
        netns: words.one("--netns").map(PathBuf::from),
        cgroup_version: words
            .parsed("--cgroup-version", cgroup_version)?
            .unwrap_or(Version::V1),
        cgroups: words.all("--cgroup", cgroup_value)?,
        parent_cgroup: words.parsed("--parent-cgroup", parent_cgroup)?,
        file_size,
        open_files,
        daemonize: words.has("--daemonize"),
        new_pid_ns: words.has("--new-pid-ns"),
        monitor_args,
    })))
}

/// An id is a folder's name on the host and a cgroup's.
pub fn check_id(id: OsString) -> Result<String, ArgsError> {
    let text = id
        .to_str()
        .ok_or_else(|| bad("--id", id.display(), "it is not UTF-8", ""))?;
    wire::id::instance(text)
        .map(str::to_owned)
        .map_err(|why| bad("--id", text, why.to_string(), ""))
}

/// The number of a user or a group.
pub fn account(name: &'static str, text: OsString) -> Result<u32, ArgsError> {
    let number = text.to_str().and_then(|text| text.parse().ok());
    // The highest number means "leave as it is" to the kernel, which here would be root.
    number.filter(|&number| number != u32::MAX).ok_or_else(|| {
        let why = format!("it is not a number from 0 to {}", u32::MAX - 1);
        bad(name, text.display(), why, "")
    })
}

/// A version of cgroups.
pub fn cgroup_version(text: OsString) -> Result<Version, ArgsError> {
    match text.as_bytes() {
        b"1" => Ok(Version::V1),
        b"2" => Ok(Version::V2),
        _ => {
            let why = "it is neither 1 nor 2";
            Err(bad("--cgroup-version", text.display(), why, ""))
        }
    }
}

/// A value for a file of a cgroup.
pub fn cgroup_value(text: OsString) -> Result<Value, ArgsError> {
    let give = "give FILE=VALUE, the file as CONTROLLER.NAME, e.g. cpu.shares=512";
    let refuse = |why: &'static str| bad("--cgroup", text.display(), why, give);
    let text = text.to_str().ok_or_else(|| refuse("it is not UTF-8"))?;
    let (file, value) = text.split_once('=').ok_or_else(|| refuse("it has no ="))?;
    if value.is_empty() || value.contains('\n') {
        return Err(refuse("its value is empty or has more than one line"));
    }
    if file.contains('/') {
        return Err(refuse(
            "a file of the cgroup itself is wanted, without a path",
        ));
    }
    match file.split_once('.') {
        Some((controller, name)) if !controller.is_empty() && !name.is_empty() => Ok(Value {
            file: file.to_owned(),
            text: value.to_owned(),
        }),
        _ => Err(refuse("its file names no controller")),
    }
}

/// The names of a path that leads down only. It is relative to the cgroup mount; a slash before it
/// is how /proc/self/cgroup writes such paths.
pub fn parent_cgroup(text: OsString) -> Result<Vec<OsString>, ArgsError> {
    let steps: Vec<&[u8]> = text.as_bytes().split(|&byte| byte == b'/').collect();
    if steps.iter().any(|&step| step == b"." || step == b"..") {
        let remedy = "give a path relative to the cgroup mount";
        let why = "it has . or .. in it";
        return Err(bad("--parent-cgroup", text.display(), why, remedy));
    }
    let names = steps.into_iter().filter(|step| !step.is_empty());
    Ok(names
        .map(|step| OsString::from_vec(step.to_vec()))
        .collect())
}

/// A resource limit of the monitor's process.
pub enum ResourceLimit {
    /// Largest file in bytes.
    FileSize(u64),
    /// Most descriptors.
    OpenFiles(u64),
}

/// Understands one.
pub fn resource_limit(text: OsString) -> Result<ResourceLimit, ArgsError> {
    let give = "give fsize=BYTES or no-file=COUNT";
    let refuse = |why: &'static str| bad("--resource-limit", text.display(), why, give);
    let parts = text.to_str().and_then(|text| text.split_once('='));
    let (name, value) = parts.ok_or_else(|| refuse("it has no ="))?;
    let value = value
        .parse()
        .map_err(|_| refuse("its value is not a number"))?;
    match name {
        "fsize" => Ok(ResourceLimit::FileSize(value)),
        "no-file" => Ok(ResourceLimit::OpenFiles(value)),
        _ => Err(refuse("that resource is not known")),
    }
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
                file_size: None,
                open_files: 2048,
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
        assert_eq!((args.file_size, args.open_files), (Some(5), 7));
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
