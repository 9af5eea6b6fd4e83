//! The command line of an OCI runtime, as engines write it: words to checked plain structs. Pure.
//!
//! Engines are written in Go, whose flags have one or two dashes and their value after `=` or in the
//! next word, and end at the first word that is none. There is no such parser among those of Rust, and
//! a table of names for each command is all that it takes.

mod flags;

use std::ffi::OsString;
use std::path::PathBuf;

use self::flags::{Known, Sorted};

/// What `--help` prints.
pub const HELP: &str = include_str!("help.txt");

/// A command line cannot be used.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum ArgsError {
    #[error("cannot use the argument \"{0}\": it is not UTF-8")]
    NotUtf8(String),
    #[error("cannot run the command \"{0}\": it is not one of {COMMANDS}")]
    Command(String),
    #[error("cannot run nothing: give a command, one of {COMMANDS}; --help shows what they take")]
    NoCommand,
    #[error("cannot use {0} of \"{1}\": it is not known here; leave it out")]
    Unknown(String, &'static str),
    #[error("cannot use {0} of \"{1}\": its value is missing")]
    NoValue(String, &'static str),
    #[error("cannot use {0} \"{1}\": {2}")]
    Value(&'static str, String, &'static str),
    #[error("cannot run \"{0}\": {1}")]
    Words(&'static str, &'static str),
}

const COMMANDS: &str =
    "spec, run, create, start, state, kill, delete, exec, ps, pause, resume, update, features";

/// In which form the log is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// `time="..." level=error msg="..."`.
    #[default]
    Text,
    /// An object in each line.
    Json,
}

/// What holds for every command.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Global {
    /// The state folder.
    pub root: Option<PathBuf>,
    /// Where errors are written as well.
    pub log: Option<PathBuf>,
    /// In which form.
    pub log_format: LogFormat,
    /// The configuration of this program.
    pub config: Option<PathBuf>,
    /// The guest's kernel.
    pub kernel: Option<PathBuf>,
    /// No network, whatever config.json says.
    pub has_no_network: bool,
    /// No control groups, whatever config.json says.
    pub has_no_groups: bool,
    /// Control groups are asked of systemd.
    pub has_systemd: bool,
}

/// What is to be done.
#[derive(Debug, PartialEq)]
pub enum Command {
    Help,
    Version,
    Features,
    /// Write a config.json into a folder.
    Spec(PathBuf),
    Create(Create),
    /// Create and start; whether to leave it alone then.
    Run(Create, bool),
    Start(String),
    State(String),
    Kill(String, i32),
    /// Whether it may run, or be missing.
    Delete(String, bool),
    Exec(Exec),
    /// Whether as JSON.
    Ps(String, bool),
    Pause(String),
    Resume(String),
    /// The file of resources, or standard input.
    Update(String, Option<PathBuf>),
}

/// A container to be made.
#[derive(Debug, Default, PartialEq)]
pub struct Create {
    pub id: String,
    pub bundle: PathBuf,
    pub pid_file: Option<PathBuf>,
    pub console_socket: Option<PathBuf>,
}

/// A further process for a container.
#[derive(Debug, Default, PartialEq)]
pub struct Exec {
    pub id: String,
    /// The process, as a file of JSON.
    pub process: Option<PathBuf>,
    /// Or its words.
    pub words: Vec<String>,
    pub env: Vec<String>,
    pub cwd: Option<String>,
    /// `UID[:GID]`.
    pub user: Option<(u32, Option<u32>)>,
    pub has_terminal: bool,
    pub is_detached: bool,
    pub pid_file: Option<PathBuf>,
    pub console_socket: Option<PathBuf>,
}

/// The longest id.
const ID_MAX: usize = 100;

/// An id is the name of a folder.
fn check_id(id: String) -> Result<String, ArgsError> {
    let is_fit = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.');
    match (1..=ID_MAX).contains(&id.len())
        && id.bytes().all(is_fit)
        && !id.starts_with('.')
        && !id.starts_with('-')
    {
        true => Ok(id),
        false => Err(ArgsError::Value(
            "the id",
            id,
            "an id has 1 to 100 letters, digits, _, - and ., and begins with none of - and .",
        )),
    }
}

const GLOBAL: Known = Known {
    flags: "help/h version/v systemd-cgroup rootless ignore-cgroups debug",
    values: "root log log-format log-level network config kernel",
};

/// Understands a command line (without the program's name).
pub fn parse(words: Vec<OsString>) -> Result<(Global, Command), ArgsError> {
    let text = |word: OsString| {
        word.into_string()
            .map_err(|word| ArgsError::NotUtf8(word.display().to_string()))
    };
    let words = words.into_iter().map(text).collect::<Result<Vec<_>, _>>()?;
    let mut sorted = Sorted::new("mayfly-oci", GLOBAL, words)?;
    let global = Global {
        root: sorted.path("root"),
        log: sorted.path("log"),
        log_format: match sorted.last("log-format") {
            None | Some("text" | "") => LogFormat::Text,
            Some("json") => LogFormat::Json,
            Some(other) => {
                return Err(ArgsError::Value(
                    "--log-format",
                    other.to_owned(),
                    "it is neither text nor json",
                ));
            }
        },
        config: sorted.path("config"),
        kernel: sorted.path("kernel"),
        has_no_network: match sorted.last("network") {
            Some("none") => true,
            // The namespace that config.json names.
            None | Some("sandbox") => false,
            Some(other) => {
                return Err(ArgsError::Value(
                    "--network",
                    other.to_owned(),
                    "it is neither none nor sandbox",
                ));
            }
        },
        has_no_groups: sorted.has("ignore-cgroups"),
        has_systemd: sorted.has("systemd-cgroup"),
    };
    if sorted.has("help") {
        return Ok((global, Command::Help));
    }
    if sorted.has("version") {
        return Ok((global, Command::Version));
    }
    let command = sorted.words.next().ok_or(ArgsError::NoCommand)?;
    let words = sorted.words.collect();
    Ok((global, parse_command(&command, words)?))
}

fn parse_command(command: &str, words: Vec<String>) -> Result<Command, ArgsError> {
    let sort = |command, flags, values, words| Sorted::new(command, Known { flags, values }, words);
    Ok(match command {
        "help" => Command::Help,
        "features" => {
            sort("features", "", "", words)?.end()?;
            Command::Features
        }
        "spec" => {
            let sorted = sort("spec", "rootless", "bundle/b", words)?;
            sorted.end()?;
            Command::Spec(sorted.path("bundle").unwrap_or_else(|| ".".into()))
        }
        "create" => Command::Create(create(sort(
            "create",
            "no-pivot no-new-keyring",
            CREATE,
            words,
        )?)?),
        "run" => {
            let sorted = sort(
                "run",
                "detach/d no-pivot no-new-keyring no-subreaper",
                CREATE,
                words,
            )?;
            let is_detached = sorted.has("detach");
            Command::Run(create(sorted)?, is_detached)
        }
        "start" => Command::Start(only_id(sort("start", "", "", words)?)?),
        "state" => Command::State(only_id(sort("state", "", "", words)?)?),
        "pause" => Command::Pause(only_id(sort("pause", "", "", words)?)?),
        "resume" => Command::Resume(only_id(sort("resume", "", "", words)?)?),
        "kill" => {
            // All processes of a microVM end with the first.
            let mut sorted = sort("kill", "all/a", "", words)?;
            let id = sorted.id()?;
            let signal = signal(sorted.words.next().as_deref().unwrap_or("TERM"))?;
            sorted.end()?;
            Command::Kill(id, signal)
        }
        "delete" => {
            let sorted = sort("delete", "force/f", "", words)?;
            let is_forced = sorted.has("force");
            Command::Delete(only_id(sorted)?, is_forced)
        }
        "exec" => exec(words)?,
        "ps" => {
            let sorted = sort("ps", "", "format/f", words)?;
            let as_json = match sorted.last("format") {
                None | Some("table") => false,
                Some("json") => true,
                Some(other) => {
                    return Err(ArgsError::Value(
                        "--format",
                        other.to_owned(),
                        "it is neither table nor json",
                    ));
                }
            };
            Command::Ps(only_id(sorted)?, as_json)
        }
        "update" => {
            let sorted = sort("update", "", "resources/r", words)?;
            let file = sorted.path("resources").ok_or(ArgsError::Words(
                "update",
                "--resources FILE is missing (- is standard input)",
            ))?;
            let file = Some(file).filter(|file| file.as_os_str() != "-");
            Command::Update(only_id(sorted)?, file)
        }
        other => return Err(ArgsError::Command(other.to_owned())),
    })
}

const CREATE: &str = "bundle/b pid-file console-socket preserve-fds";

fn create(sorted: Sorted) -> Result<Create, ArgsError> {
    check_no_descriptors(&sorted)?;
    Ok(Create {
        bundle: sorted.path("bundle").unwrap_or_else(|| ".".into()),
        pid_file: sorted.path("pid-file"),
        console_socket: sorted.path("console-socket"),
        id: only_id(sorted)?,
    })
}

fn check_no_descriptors(sorted: &Sorted) -> Result<(), ArgsError> {
    match sorted.last("preserve-fds") {
        None | Some("0") => Ok(()),
        Some(count) => Err(ArgsError::Value(
            "--preserve-fds",
            count.to_owned(),
            "descriptors cannot be passed into a microVM",
        )),
    }
}

fn only_id(mut sorted: Sorted) -> Result<String, ArgsError> {
    let id = sorted.id()?;
    sorted.end()?;
    Ok(id)
}

fn exec(words: Vec<String>) -> Result<Command, ArgsError> {
    let known = Known {
        flags: "detach/d tty/t",
        values: "process/p env/e cwd user/u pid-file console-socket preserve-fds",
    };
    let mut sorted = Sorted::new("exec", known, words)?;
    check_no_descriptors(&sorted)?;
    let id = sorted.id()?;
    let exec = Exec {
        id,
        process: sorted.path("process"),
        env: sorted.all("env"),
        cwd: sorted.last("cwd").map(str::to_owned),
        user: sorted.last("user").map(user).transpose()?,
        has_terminal: sorted.has("tty"),
        is_detached: sorted.has("detach"),
        pid_file: sorted.path("pid-file"),
        console_socket: sorted.path("console-socket"),
        words: sorted.words.collect(),
    };
    if exec.process.is_none() && exec.words.is_empty() {
        return Err(ArgsError::Words(
            "exec",
            "give --process FILE, or a command after the id",
        ));
    }
    Ok(Command::Exec(exec))
}

fn user(text: &str) -> Result<(u32, Option<u32>), ArgsError> {
    let (uid, gid) = text
        .split_once(':')
        .map_or((text, None), |(uid, gid)| (uid, Some(gid)));
    let refuse = |_| ArgsError::Value("--user", text.to_owned(), "give numbers, UID or UID:GID");
    let gid = gid.map(str::parse).transpose().map_err(refuse)?;
    Ok((uid.parse().map_err(refuse)?, gid))
}

/// The signals by their names, without SIG.
const SIGNALS: &[(&str, i32)] = &[
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
    ("STKFLT", 16),
    ("CHLD", 17),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("VTALRM", 26),
    ("PROF", 27),
    ("WINCH", 28),
    ("IO", 29),
    ("PWR", 30),
    ("SYS", 31),
];

/// A signal by its number or name.
fn signal(text: &str) -> Result<i32, ArgsError> {
    let name = text.to_ascii_uppercase();
    let name = name.strip_prefix("SIG").unwrap_or(&name);
    let by_name = || {
        SIGNALS
            .iter()
            .find(|(other, _)| *other == name)
            .map(|(_, number)| *number)
    };
    let by_number = text.parse().ok().filter(|number| (1..=64).contains(number));
    by_number.or_else(by_name).ok_or_else(|| {
        ArgsError::Value(
            "the signal",
            text.to_owned(),
            "it is no signal of Linux: give its number or name",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str) -> Result<(Global, Command), ArgsError> {
        parse(text.split_whitespace().map(OsString::from).collect())
    }

    fn command(text: &str) -> Command {
        line(text).unwrap().1
    }

    #[test]
    fn podman_containerd_and_ray_write_these() {
        let create = Create {
            id: "c1".into(),
            bundle: "/b".into(),
            pid_file: Some("/p".into()),
            console_socket: Some("/s".into()),
        };
        assert_eq!(
            command("create --bundle /b --pid-file /p --console-socket /s c1"),
            Command::Create(create)
        );
        let (global, other) =
            line("--root /r --log /l --log-format json delete --force c1").unwrap();
        assert_eq!(
            (global.root, global.log, global.log_format),
            (Some("/r".into()), Some("/l".into()), LogFormat::Json)
        );
        assert_eq!(other, Command::Delete("c1".into(), true));
        let (global, other) =
            line("--rootless --root /r --network none run --bundle d c1").unwrap();
        assert!(global.has_no_network && !global.has_no_groups);
        let (global, _) = line("--ignore-cgroups --root /r run --bundle d c1").unwrap();
        assert!(global.has_no_groups && !global.has_systemd);
        let (global, _) = line("--systemd-cgroup --root /r create --bundle d c1").unwrap();
        assert!(global.has_systemd);
        assert!(matches!(other, Command::Run(Create { .. }, false)));
        assert_eq!(
            command("delete -force c1"),
            Command::Delete("c1".into(), true)
        );
        assert_eq!(command("kill c1 SIGKILL"), Command::Kill("c1".into(), 9));
        assert_eq!(command("kill --all c1 10"), Command::Kill("c1".into(), 10));
        assert_eq!(command("kill c1"), Command::Kill("c1".into(), 15));
        assert_eq!(
            command("update --resources=/f c1"),
            Command::Update("c1".into(), Some("/f".into()))
        );
        assert_eq!(
            command("update --resources - c1"),
            Command::Update("c1".into(), None)
        );
        assert_eq!(command("spec"), Command::Spec(".".into()));
        assert_eq!(
            command("ps --format json c1"),
            Command::Ps("c1".into(), true)
        );
        assert_eq!(command("--rootless=true --version"), Command::Version);
    }

    #[test]
    fn exec_has_a_process_or_words_that_are_left_as_they_are() {
        let exec = |text| match command(text) {
            Command::Exec(exec) => exec,
            other => panic!("{other:?}"),
        };
        let of_podman =
            exec("exec --pid-file /p --process /f --detach --tty --console-socket /s c1");
        assert!(of_podman.is_detached && of_podman.has_terminal);
        assert_eq!(of_podman.process, Some("/f".into()));
        let of_ray = exec("exec -cwd /w -env A=b -env C=d=e -user 5:6 c1 sh -c --x");
        assert_eq!(of_ray.words, ["sh", "-c", "--x"]);
        assert_eq!(of_ray.env, ["A=b", "C=d=e"]);
        assert_eq!(
            (of_ray.cwd.as_deref(), of_ray.user),
            (Some("/w"), Some((5, Some(6))))
        );
    }

    #[test]
    fn what_cannot_be_used_is_named() {
        for (text, expected) in [
            ("", "give a command"),
            ("checkpoint c1", "\"checkpoint\""),
            ("create", "id is missing"),
            ("create --bundle", "--bundle of \"create\": its value"),
            ("create --nonsense c1", "--nonsense of \"create\""),
            ("create --preserve-fds 2 c1", "--preserve-fds \"2\""),
            ("start a b", "more words"),
            ("start ../x", "../x"),
            ("start .x", ".x"),
            ("state a/b", "a/b"),
            ("kill c1 NONSENSE", "NONSENSE"),
            ("kill c1 65", "65"),
            ("update c1", "--resources"),
            ("exec c1", "--process"),
            ("exec --user me c1 x", "--user \"me\""),
            ("--network host run c1", "--network \"host\""),
            ("--log-format xml state c1", "xml"),
        ] {
            let error = line(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
        let long = "x".repeat(ID_MAX + 1);
        assert!(line(&format!("state {long}")).is_err());
    }
}
