//! The command line, to a plain struct. Pure: nothing is opened, printed or left here.
//!
//! Firecracker's options, with its rules: `--option value` and never `--option=value`, each at
//! most once, `--help` and `--version` wherever they stand. Those that have no meaning here are
//! refused with a message.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::path::PathBuf;

use crate::arch::Protocol;
use crate::exit;
use crate::log::{Format, Level};
use crate::wire::limits::BODY_MAX;
use crate::wire::{API_VERSION, Source, id};

/// Where the API socket is made unless `--api-sock` says otherwise.
const DEFAULT_API_SOCK: &str = "/run/firecracker.socket";
/// `--id` unless it is given.
const DEFAULT_ID: &str = "anonymous-instance";

/// What the command line asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asked {
    /// Run a microVM.
    Run(Box<Args>),
    /// Print [`help`] and end well.
    Help,
    /// Print [`version`] and end well.
    Version,
    /// Print the version of the snapshot format and end well.
    SnapshotVersion,
    /// Print the version of this snapshot's format and end well.
    DescribeSnapshot(PathBuf),
}

/// How to run a microVM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Args {
    /// Where to make the API socket; none with `--no-api` and with `--api-fd`.
    pub api_sock: Option<PathBuf>,
    /// The API socket, as a descriptor that the process was started with.
    pub api_fd: Option<u32>,
    /// /dev/kvm, as a descriptor that the process was started with.
    pub kvm_fd: Option<u32>,
    /// The descriptor that is told how the guest ended.
    pub end_fd: Option<u32>,
    /// Give up the file system, and what else Landlock can deny, before anything else.
    pub landlock: bool,
    /// A configuration to boot from at once.
    pub config_file: Option<PathBuf>,
    /// The name of this microVM.
    pub id: String,
    /// Install the filters; off only for debugging.
    pub seccomp: bool,
    /// Offer the port by which a guest tells that it has booted.
    pub boot_timer: bool,
    /// Least important lines of the log.
    pub level: Option<Level>,
    /// Where the log goes, other than stdout.
    pub log_path: Option<Source>,
    /// Write the level of a line.
    pub show_level: bool,
    /// Write the origin of a line.
    pub show_log_origin: bool,
    /// Only lines of this module.
    pub module: Option<String>,
    /// The shape of lines.
    pub log_format: Format,
    /// Where metrics go.
    pub metrics_path: Option<String>,
    /// When the jailer began, microseconds of the monotonic clock.
    pub start_time_us: Option<u64>,
    /// When the jailer began, microseconds of its CPU time.
    pub start_time_cpu_us: Option<u64>,
    /// CPU time the jailer used, in microseconds.
    pub parent_cpu_time_us: Option<u64>,
    /// Most bytes of an API request's body.
    pub payload_max: usize,
    /// How to enter the kernel, when the kernel is not to decide.
    pub boot_protocol: Option<Protocol>,
}

impl Default for Args {
    fn default() -> Self {
        Args {
            api_sock: Some(DEFAULT_API_SOCK.into()),
            api_fd: None,
            kvm_fd: None,
            end_fd: None,
            landlock: false,
            config_file: None,
            id: DEFAULT_ID.into(),
            seccomp: true,
            boot_timer: false,
            level: None,
            log_path: None,
            show_level: false,
            show_log_origin: false,
            module: None,
            log_format: Format::Text,
            metrics_path: None,
            start_time_us: None,
            start_time_cpu_us: None,
            parent_cpu_time_us: None,
            payload_max: BODY_MAX,
            boot_protocol: None,
        }
    }
}

/// Why a command line is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ArgsError {
    /// Not an option of ours.
    Unexpected(String),
    /// An option without the value it takes.
    NoValue(&'static str),
    /// An option given twice.
    Twice(&'static str),
    /// An option that needs another.
    Needs(&'static str, &'static str),
    /// An option given beside another that says the same.
    Beside(&'static str, &'static str),
    /// A value that the option does not take.
    Value {
        /// The option.
        option: &'static str,
        /// Its value.
        value: String,
        /// What it takes.
        takes: &'static str,
    },
    /// A log level that is none.
    Level(String),
    /// An option of Firecracker's that has no meaning here.
    NotOffered(&'static str, &'static str),
}

impl ArgsError {
    /// The exit code that tells of it.
    pub fn exit_code(&self) -> i32 {
        match self {
            ArgsError::Level(_) => exit::BAD_LOG_LEVEL,
            _ => exit::BAD_ARGUMENTS,
        }
    }
}

impl fmt::Display for ArgsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ArgsError::Unexpected(found) => write!(
                f,
                "Arguments parsing error: `{}` is not an option of this program",
                found.escape_debug()
            )?,
            ArgsError::NoValue(option) => {
                write!(f, "Arguments parsing error: --{option} needs a value")?;
            }
            ArgsError::Twice(option) => {
                write!(f, "Arguments parsing error: --{option} is given twice")?;
            }
            ArgsError::Needs(one, other) => {
                write!(f, "Arguments parsing error: --{one} needs --{other}")?;
            }
            ArgsError::Beside(one, other) => write!(
                f,
                "Arguments parsing error: --{one} and --{other} exclude each other"
            )?,
            ArgsError::Value {
                option,
                value,
                takes,
            } => write!(
                f,
                "Arguments parsing error: --{option} takes {takes}, not `{}`",
                value.escape_debug()
            )?,
            ArgsError::Level(level) => write!(
                f,
                "Invalid value for logger level: `{}` is none of Off, Error, Warning, Info, \
                 Debug, Trace",
                level.escape_debug()
            )?,
            ArgsError::NotOffered(option, why) => {
                write!(
                    f,
                    "Arguments parsing error: --{option} is not offered: {why}"
                )?;
            }
        }
        f.write_str(". For more information try --help.")
    }
}

impl std::error::Error for ArgsError {}

/// One option.
struct Opt {
    name: &'static str,
    /// What its value is called in the help; empty for one that takes none.
    value: &'static str,
    help: &'static str,
}

const fn option(name: &'static str, value: &'static str, help: &'static str) -> Opt {
    Opt { name, value, help }
}

const OPTIONS: &[Opt] = &[
    option(
        "api-fd",
        "fd",
        "Serve the API on this inherited socket, which listens.",
    ),
    option(
        "api-sock",
        "path",
        "Where to make the API socket. [default: /run/firecracker.socket]",
    ),
    option(
        "boot-protocol",
        "pvh|linux64",
        "Enter the kernel this way, whatever it offers.",
    ),
    option(
        "boot-timer",
        "",
        "Log the time from start until the guest says it has booted.",
    ),
    option(
        "config-file",
        "path",
        "Boot this configuration, in JSON, at once.",
    ),
    option(
        "describe-snapshot",
        "path",
        "Print the format version of this snapshot.",
    ),
    option(
        "end-fd",
        "fd",
        "Write how the guest ended, in a word, to this inherited pipe or file.",
    ),
    option("help", "", "Print this."),
    option(
        "http-api-max-payload-size",
        "bytes",
        "Largest body of an API request. [default: 51200]",
    ),
    option(
        "id",
        "id",
        "Name of this microVM. [default: anonymous-instance]",
    ),
    option("kvm-fd", "fd", "Use this inherited /dev/kvm."),
    option(
        "landlock",
        "",
        "Give up all access to files by name, with Landlock.",
    ),
    option("level", "level", "Least important lines of the log."),
    option(
        "log-fd",
        "fd",
        "Write the log to this inherited file or pipe.",
    ),
    option(
        "log-format",
        "text|json",
        "Shape of the log's lines. [default: text]",
    ),
    option(
        "log-path",
        "path",
        "File or FIFO for the log, instead of stdout.",
    ),
    option("metrics-path", "path", "File or FIFO for metrics."),
    option("module", "path", "Log only what this module says."),
    option("no-api", "", "Make no API socket; needs --config-file."),
    option(
        "no-seccomp",
        "",
        "Install no system call filters. For debugging only.",
    ),
    option("parent-cpu-time-us", "us", "CPU time that the jailer used."),
    option("show-level", "", "Write levels into the log."),
    option(
        "show-log-origin",
        "",
        "Write file names and lines into the log.",
    ),
    option(
        "snapshot-version",
        "",
        "Print the version of the snapshot format.",
    ),
    option(
        "start-time-cpu-us",
        "us",
        "CPU time of the jailer at its start.",
    ),
    option("start-time-us", "us", "Time of the jailer's start."),
    option("version", "", "Print the version."),
];

/// Options of Firecracker's without a meaning here, and why.
const NOT_OFFERED: &[(&str, &str)] = &[
    ("enable-pci", "devices are on virtio-mmio, there is no PCI"),
    ("metadata", "there is no metadata service"),
    ("mmds-size-limit", "there is no metadata service"),
    ("seccomp-filter", "the filters are part of the program"),
];

/// Options that say the same in different ways.
const EXCLUDE: &[(&str, &str)] = &[
    ("api-fd", "api-sock"),
    ("api-fd", "no-api"),
    ("log-fd", "log-path"),
];

/// What `--help` prints.
pub fn help() -> String {
    let mut text = format!("{}\n\nOptions:\n", version());
    for opt in OPTIONS {
        let left = if opt.value.is_empty() {
            format!("--{}", opt.name)
        } else {
            format!("--{} <{}>", opt.name, opt.value)
        };
        text.push_str(&format!("  {left:<38} {}\n", opt.help));
    }
    text
}

/// What `--version` prints.
pub fn version() -> String {
    format!(
        "mayfly v{} (API of Firecracker v{API_VERSION})",
        env!("CARGO_PKG_VERSION")
    )
}

/// Understands a command line, without the program's name.
///
/// # Errors
/// The first thing that is wrong with it.
pub fn parse<I>(arguments: I) -> Result<Asked, ArgsError>
where
    I: IntoIterator<Item = OsString>,
{
    // Nothing takes what follows a lone `--`.
    let words: Vec<OsString> = arguments
        .into_iter()
        .take_while(|word| word != "--")
        .collect();
    if words.iter().any(|word| word == "--help" || word == "-h") {
        return Ok(Asked::Help);
    }
    if words.iter().any(|word| word == "--version") {
        return Ok(Asked::Version);
    }
    let given = Given::read(words)?;
    if given.has("snapshot-version") {
        return Ok(Asked::SnapshotVersion);
    }
    if let Some(path) = given.path("describe-snapshot") {
        return Ok(Asked::DescribeSnapshot(path));
    }
    let no_api = given.has("no-api");
    if no_api && !given.has("config-file") {
        return Err(ArgsError::Needs("no-api", "config-file"));
    }
    for (one, other) in EXCLUDE {
        if given.has(one) && given.has(other) {
            return Err(ArgsError::Beside(one, other));
        }
    }
    let default = Args::default();
    let api_fd = given.number("api-fd")?;
    let log_fd: Option<u32> = given.number("log-fd")?;
    let api_sock = given.path("api-sock").or(default.api_sock);
    Ok(Asked::Run(Box::new(Args {
        api_sock: api_sock.filter(|_| !no_api && api_fd.is_none()),
        api_fd,
        kvm_fd: given.number("kvm-fd")?,
        end_fd: given.number("end-fd")?,
        landlock: given.has("landlock"),
        config_file: given.path("config-file"),
        id: match given.text("id")? {
            Some(id) => checked_id(id)?,
            None => default.id,
        },
        seccomp: !given.has("no-seccomp"),
        boot_timer: given.has("boot-timer"),
        level: match given.text("level")? {
            Some(name) => Some(Level::parse(&name).ok_or(ArgsError::Level(name))?),
            None => None,
        },
        log_path: match log_fd {
            Some(fd) => Some(Source::fd(fd)),
            None => given.text("log-path")?.map(Source::Named),
        },
        show_level: given.has("show-level"),
        show_log_origin: given.has("show-log-origin"),
        module: given.text("module")?,
        log_format: given
            .one_of(
                "log-format",
                &[("text", Format::Text), ("json", Format::Json)],
            )?
            .unwrap_or_default(),
        metrics_path: given.text("metrics-path")?,
        start_time_us: given.number("start-time-us")?,
        start_time_cpu_us: given.number("start-time-cpu-us")?,
        parent_cpu_time_us: given.number("parent-cpu-time-us")?,
        payload_max: given
            .number("http-api-max-payload-size")?
            .unwrap_or(default.payload_max),
        boot_protocol: given.one_of(
            "boot-protocol",
            &[("pvh", Protocol::Pvh), ("linux64", Protocol::Linux64)],
        )?,
    })))
}

/// The options that were given, each once, with their values.
struct Given(Vec<(&'static str, OsString)>);

impl Given {
    fn read(words: Vec<OsString>) -> Result<Self, ArgsError> {
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

    fn has(&self, name: &str) -> bool {
        self.value(name).is_some()
    }

    fn path(&self, name: &str) -> Option<PathBuf> {
        self.value(name).map(PathBuf::from)
    }

    fn text(&self, name: &'static str) -> Result<Option<String>, ArgsError> {
        self.parsed(name, "text in UTF-8", |text| Some(text.to_string()))
    }

    fn number<N: std::str::FromStr>(&self, name: &'static str) -> Result<Option<N>, ArgsError> {
        self.parsed(name, "a whole number", |text| text.parse().ok())
    }

    fn one_of<T: Copy>(
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

    fn parsed<T>(
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

fn checked_id(id: String) -> Result<String, ArgsError> {
    match id::instance(&id) {
        Ok(_) => Ok(id),
        Err(_) => Err(ArgsError::Value {
            option: "id",
            value: id,
            takes: "1 to 64 letters, digits and hyphens",
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStringExt;

    fn asked(line: &str) -> Result<Asked, ArgsError> {
        parse(line.split_whitespace().map(OsString::from))
    }

    fn args(line: &str) -> Args {
        match asked(line).unwrap() {
            Asked::Run(args) => *args,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn parse_when_good_fills_the_struct() {
        let path = |text: &str| Some(PathBuf::from(text));
        let default = Args::default;
        let cases = [
            ("", default()),
            (
                "--api-sock s --id a-1",
                Args {
                    api_sock: path("s"),
                    id: "a-1".into(),
                    ..default()
                },
            ),
            (
                "--no-api --config-file f --no-seccomp --boot-timer",
                Args {
                    api_sock: None,
                    config_file: path("f"),
                    seccomp: false,
                    boot_timer: true,
                    ..default()
                },
            ),
            (
                "--level wArNing --log-path l --show-level --show-log-origin --module m --log-format json",
                Args {
                    level: Some(Level::Warn),
                    log_path: Some("l".into()),
                    show_level: true,
                    show_log_origin: true,
                    module: Some("m".into()),
                    log_format: Format::Json,
                    ..default()
                },
            ),
            (
                "--api-fd 5 --kvm-fd 6 --log-fd 7 --end-fd 8 --landlock",
                Args {
                    api_sock: None,
                    api_fd: Some(5),
                    kvm_fd: Some(6),
                    end_fd: Some(8),
                    log_path: Some(Source::fd(7)),
                    landlock: true,
                    ..default()
                },
            ),
            (
                "--start-time-us 1 --start-time-cpu-us 2 --parent-cpu-time-us 3 --metrics-path m",
                Args {
                    start_time_us: Some(1),
                    start_time_cpu_us: Some(2),
                    parent_cpu_time_us: Some(3),
                    metrics_path: Some("m".into()),
                    ..default()
                },
            ),
            (
                "--http-api-max-payload-size 7 --boot-protocol linux64",
                Args {
                    payload_max: 7,
                    boot_protocol: Some(Protocol::Linux64),
                    ..default()
                },
            ),
            (
                "--boot-protocol pvh -- --nonsense",
                Args {
                    boot_protocol: Some(Protocol::Pvh),
                    ..default()
                },
            ),
        ];
        for (line, expected) in cases {
            assert_eq!(args(line), expected, "{line}");
        }
        let raw = OsString::from_vec(vec![0xff]);
        let parsed = parse(["--api-sock".into(), raw.clone()]).unwrap();
        assert!(matches!(parsed, Asked::Run(args) if args.api_sock == Some(raw.into())));
    }

    #[test]
    fn parse_when_asked_for_text_ends_there() {
        for (line, expected) in [
            ("--nonsense --help", Asked::Help),
            ("-h", Asked::Help),
            ("--nonsense --version", Asked::Version),
            ("--snapshot-version", Asked::SnapshotVersion),
            ("--describe-snapshot f", Asked::DescribeSnapshot("f".into())),
        ] {
            assert_eq!(asked(line), Ok(expected), "{line}");
        }
        assert!(help().contains("--api-sock <path>"));
        let version = version();
        assert!(
            version.starts_with("mayfly v") && version.ends_with("(API of Firecracker v1.17.0)")
        );
    }

    #[test]
    fn parse_when_bad_is_refused_with_the_code() {
        let long = format!("--id {}", "a".repeat(65));
        let cases = [
            ("--foo", "`--foo` is not an option", 153),
            ("foo", "`foo` is not an option", 153),
            ("--", "", 0),
            ("--id=a", "`--id=a` is not an option", 153),
            ("--id", "--id needs a value", 153),
            ("--id --no-api", "--id needs a value", 153),
            ("--id a --id b", "--id is given twice", 153),
            ("--boot-timer --boot-timer", "given twice", 153),
            ("--id a_b", "--id takes 1 to 64", 153),
            (&long, "--id takes 1 to 64", 153),
            ("--no-api", "--no-api needs --config-file", 153),
            ("--level loud", "`loud` is none of", 152),
            ("--api-fd x", "takes a whole number", 153),
            ("--api-fd -1", "takes a whole number", 153),
            ("--kvm-fd 4294967296", "takes a whole number", 153),
            ("--api-fd 3 --api-sock s", "exclude each other", 153),
            ("--api-fd 3 --no-api --config-file f", "exclude", 153),
            ("--log-fd 3 --log-path p", "exclude each other", 153),
            ("--level", "--level needs a value", 153),
            ("--start-time-us x", "takes a whole number", 153),
            (
                "--http-api-max-payload-size -1",
                "takes a whole number",
                153,
            ),
            ("--boot-protocol efi", "takes pvh|linux64", 153),
            ("--log-format xml", "takes text|json", 153),
            ("--seccomp-filter f", "part of the program", 153),
            ("--metadata f", "no metadata service", 153),
            ("--mmds-size-limit 1", "no metadata service", 153),
            ("--enable-pci", "no PCI", 153),
        ];
        for (line, reason, code) in cases {
            match asked(line) {
                Ok(_) => assert_eq!(code, 0, "{line}"),
                Err(error) => {
                    assert!(error.to_string().contains(reason), "{line}: {error}");
                    assert_eq!(error.exit_code(), code, "{line}");
                }
            }
        }
        let empty = parse(["--id".into(), OsString::new()]);
        assert_eq!(empty.unwrap_err().exit_code(), 153);
        let raw = parse(["--id".into(), OsString::from_vec(vec![0xff])]);
        assert_eq!(raw.unwrap_err().exit_code(), 153);
    }
}
