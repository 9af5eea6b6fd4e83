//! The command line of the compatible jail: words to a checked plain struct. Pure: nothing is
//! opened, nothing of the host is looked at.
//!
//! The flags and their rules are those clients of Firecracker's jailer know: `--flag value`, never
//! `--flag=value`; no flag twice, but for `--cgroup` and `--resource-limit`; a value does not begin
//! with two dashes; everything after a bare `--` belongs to the monitor.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use rustix::fs::{Gid, Uid};

use crate::cgroup::{Value, Version};
use crate::failure::Failure;
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

Arguments after -- are handed to the monitor as they are.
";

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
    /// Whom the jail belongs to.
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
/// Longest id, in bytes.
const LONGEST_ID: usize = 64;

/// The words of one command line, sorted but not yet understood.
#[derive(Default)]
struct Words {
    single: Vec<(&'static str, OsString)>,
    flags: Vec<&'static str>,
    cgroup: Vec<OsString>,
    resource_limit: Vec<OsString>,
}

const SINGLE: [&str; 8] = [
    "--id",
    "--exec-file",
    "--uid",
    "--gid",
    "--chroot-base-dir",
    "--netns",
    "--cgroup-version",
    "--parent-cgroup",
];
const FLAGS: [&str; 2] = ["--daemonize", "--new-pid-ns"];

/// Understands a command line (without the program's name).
pub fn parse(words: Vec<OsString>) -> Result<Command, Failure> {
    let mut own = words;
    let mut monitor_args = Vec::new();
    if let Some(at) = own.iter().position(|word| word == "--") {
        monitor_args = own.split_off(at + 1);
        own.pop();
    }
    // These two win over anything else on the line.
    if own.iter().any(|word| word == "--help" || word == "-h") {
        return Ok(Command::Help);
    }
    if own.iter().any(|word| word == "--version") {
        return Ok(Command::Version);
    }
    let words = sort(own)?;
    understand(words, monitor_args).map(|args| Command::Compatible(Box::new(args)))
}

fn sort(words: Vec<OsString>) -> Result<Words, Failure> {
    let mut sorted = Words::default();
    let mut words = words.into_iter();
    while let Some(word) = words.next() {
        if let Some(&flag) = FLAGS.iter().find(|&&flag| word == flag) {
            if sorted.flags.contains(&flag) {
                return Err(twice(flag));
            }
            sorted.flags.push(flag);
        } else if let Some(&name) = SINGLE.iter().find(|&&name| word == name) {
            if sorted.single.iter().any(|(other, _)| *other == name) {
                return Err(twice(name));
            }
            sorted.single.push((name, value_of(name, words.next())?));
        } else if word == "--cgroup" {
            sorted.cgroup.push(value_of("--cgroup", words.next())?);
        } else if word == "--resource-limit" {
            let value = value_of("--resource-limit", words.next())?;
            sorted.resource_limit.push(value);
        } else {
            let failure = bad(
                &format!("use the argument \"{}\"", word.display()),
                "it is not known",
            );
            let known = word
                .to_str()
                .and_then(|word| word.split_once('='))
                .is_some_and(|(name, _)| {
                    SINGLE.contains(&name) || name == "--cgroup" || name == "--resource-limit"
                });
            return Err(if known {
                failure.remedy("put a blank in place of the first =")
            } else {
                failure.remedy("--help lists what is; arguments of the monitor come after --")
            });
        }
    }
    Ok(sorted)
}

pub(crate) fn value_of(name: &str, value: Option<OsString>) -> Result<OsString, Failure> {
    value
        .filter(|value| !value.as_bytes().starts_with(b"--"))
        .ok_or_else(|| bad(&format!("use {name}"), "its value is missing"))
}

fn twice(name: &str) -> Failure {
    bad(&format!("use {name}"), "it is given twice")
}

fn bad(doing: &str, why: &str) -> Failure {
    Failure::new(doing, why)
}

fn understand(mut words: Words, monitor_args: Vec<OsString>) -> Result<Compatible, Failure> {
    let mut take = |name: &str| {
        let at = words.single.iter().position(|(other, _)| *other == name)?;
        Some(words.single.swap_remove(at).1)
    };
    let mut need = |name: &str| {
        take(name).ok_or_else(|| {
            bad("build a jail", &format!("{name} is missing")).remedy("--help shows what is needed")
        })
    };
    let id = check_id(need("--id")?)?;
    let exec_file = PathBuf::from(need("--exec-file")?);
    let owner = Owner {
        uid: Uid::from_raw(account("--uid", need("--uid")?)?),
        gid: Gid::from_raw(account("--gid", need("--gid")?)?),
    };
    let cgroups = words
        .cgroup
        .into_iter()
        .map(cgroup_value)
        .collect::<Result<_, _>>()?;
    let (mut file_size, mut open_files) = (None, OPEN_FILES);
    for limit in words.resource_limit {
        // As with the original, the last one of a name counts.
        match resource_limit(limit)? {
            Limit::FileSize(bytes) => file_size = Some(bytes),
            Limit::OpenFiles(count) => open_files = count,
        }
    }
    Ok(Compatible {
        id,
        exec_file,
        owner,
        base: take("--chroot-base-dir").map_or_else(|| "/srv/jailer".into(), PathBuf::from),
        netns: take("--netns").map(PathBuf::from),
        cgroup_version: take("--cgroup-version").map_or(Ok(Version::V1), cgroup_version)?,
        cgroups,
        parent_cgroup: take("--parent-cgroup").map(parent_cgroup).transpose()?,
        file_size,
        open_files,
        daemonize: words.flags.contains(&"--daemonize"),
        new_pid_ns: words.flags.contains(&"--new-pid-ns"),
        monitor_args,
    })
}

/// An id is a folder's name on the host and a cgroup's.
pub(crate) fn check_id(id: OsString) -> Result<String, Failure> {
    let what = format!("use the id \"{}\" (--id)", id.display());
    let remedy = format!("an id has 1 to {LONGEST_ID} letters, digits and -");
    if id.is_empty() || id.len() > LONGEST_ID {
        return Err(bad(&what, &format!("it has {} bytes", id.len())).remedy(remedy));
    }
    let id = id
        .into_string()
        .map_err(|_| bad(&what, "it is not UTF-8").remedy(&remedy))?;
    match id
        .chars()
        .find(|&c| !(c.is_ascii_alphanumeric() || c == '-'))
    {
        None => Ok(id),
        Some(c) => Err(bad(&what, &format!("it contains {c:?}")).remedy(remedy)),
    }
}

pub(crate) fn account(name: &str, text: OsString) -> Result<u32, Failure> {
    let number = text.to_str().and_then(|text| text.parse().ok());
    // The highest number means "leave as it is" to the kernel, which here would be root.
    number.filter(|&number| number != u32::MAX).ok_or_else(|| {
        bad(
            &format!("use {name} \"{}\"", text.display()),
            &format!("it is not a number from 0 to {}", u32::MAX - 1),
        )
    })
}

pub(crate) fn cgroup_version(text: OsString) -> Result<Version, Failure> {
    match text.as_bytes() {
        b"1" => Ok(Version::V1),
        b"2" => Ok(Version::V2),
        _ => Err(bad(
            &format!("use --cgroup-version \"{}\"", text.display()),
            "it is neither 1 nor 2",
        )),
    }
}

pub(crate) fn cgroup_value(text: OsString) -> Result<Value, Failure> {
    let what = format!("use --cgroup \"{}\"", text.display());
    let refuse = |why: &str| {
        bad(&what, why).remedy("give FILE=VALUE, the file as CONTROLLER.NAME, e.g. cpu.shares=512")
    };
    let text = text.into_string().map_err(|_| refuse("it is not UTF-8"))?;
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
pub(crate) fn parent_cgroup(text: OsString) -> Result<Vec<OsString>, Failure> {
    let what = format!("use --parent-cgroup \"{}\"", text.display());
    let bytes = text.into_vec();
    let steps: Vec<&[u8]> = bytes.split(|&byte| byte == b'/').collect();
    if steps.iter().any(|&step| step == b"." || step == b"..") {
        return Err(
            bad(&what, "it has . or .. in it").remedy("give a path relative to the cgroup mount")
        );
    }
    Ok(steps
        .into_iter()
        .filter(|step| !step.is_empty())
        .map(|step| OsString::from_vec(step.to_vec()))
        .collect())
}

/// A resource limit of the monitor's process.
pub(crate) enum Limit {
    /// Largest file in bytes.
    FileSize(u64),
    /// Most descriptors.
    OpenFiles(u64),
}

pub(crate) fn resource_limit(text: OsString) -> Result<Limit, Failure> {
    let what = format!("use --resource-limit \"{}\"", text.display());
    let refuse = |why: &str| bad(&what, why).remedy("give fsize=BYTES or no-file=COUNT");
    let (name, value) = text
        .to_str()
        .and_then(|text| text.split_once('='))
        .ok_or_else(|| refuse("it has no ="))?;
    let value = value
        .parse()
        .map_err(|_| refuse("its value is not a number"))?;
    match name {
        "fsize" => Ok(Limit::FileSize(value)),
        "no-file" => Ok(Limit::OpenFiles(value)),
        _ => Err(refuse("that resource is not known")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAST: &str = "--id a --exec-file /m --uid 1 --gid 2";

    fn line(text: &str) -> Result<Command, Failure> {
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
            ("--id a/b --exec-file /m --uid 1 --gid 2", "it contains '/'"),
            ("--id .. --exec-file /m --uid 1 --gid 2", "it contains '.'"),
            (
                &format!("--id {long} --exec-file /m --uid 1 --gid 2"),
                "it has 65 bytes",
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
            let failure = line(text).unwrap_err().to_string();
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
            let failure = line(&format!("{LEAST} {text}")).unwrap_err().to_string();
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
