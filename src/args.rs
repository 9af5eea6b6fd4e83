//! The command line, to a plain struct. Pure: nothing is opened, printed or left here.
//!
//! Firecracker's options, with its rules: `--option value` and never `--option=value`, each at
//! most once, `--help` and `--version` wherever they stand. Those that have no meaning here are
//! refused with a message.

mod error;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod given;
mod options;

pub use error::ArgsError;
pub use options::{help, version};

use std::ffi::OsString;
use std::path::PathBuf;

use self::given::Given;
use self::options::EXCLUDE;
use crate::arch::Protocol;
use crate::log::{Format, Level};
use crate::snapshot::{MEMORY_NAME, STATE_NAME};
use crate::wire::config::SnapshotLoad;
use crate::wire::limits::BODY_MAX;
use crate::wire::{Source, id};

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
    /// A listening socket for clients of the console.
    pub console_fd: Option<u32>,
    /// End with the exit code that the guest wrote.
    pub guest_exit_code: bool,
    /// Give up the file system, and what else Landlock can deny, before anything else.
    pub landlock: bool,
    /// A configuration to boot from at once.
    pub config_file: Option<PathBuf>,
    /// A snapshot to resume at once.
    pub snapshot: Option<SnapshotLoad>,
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
            console_fd: None,
            guest_exit_code: false,
            landlock: false,
            config_file: None,
            snapshot: None,
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
    if no_api && !given.has("config-file") && !given.has("snapshot") {
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
        console_fd: given.number("console-fd")?,
        guest_exit_code: given.has("guest-exit-code"),
        landlock: given.has("landlock"),
        config_file: given.path("config-file"),
        snapshot: given.parsed(
            "snapshot",
            "a directory, or the descriptors of the state and of the memory: fd:N,fd:M",
            snapshot,
        )?,
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

/// What `--snapshot` asks for: the machine of that snapshot, running, with the wall clock of today.
fn snapshot(value: &str) -> Option<SnapshotLoad> {
    let descriptor = |text: &str| {
        let number = text.strip_prefix("fd:")?.parse().ok()?;
        Some(Source::fd(number))
    };
    let (state, memory) = match value.split_once(',') {
        Some((state, memory)) if value.starts_with("fd:") => {
            (descriptor(state)?, descriptor(memory)?)
        }
        _ if value.is_empty() || value.starts_with("fd:") => return None,
        _ => {
            let file = |name| Source::Named(format!("{}/{name}", value.trim_end_matches('/')));
            (file(STATE_NAME), file(MEMORY_NAME))
        }
    };
    Some(SnapshotLoad {
        resume_vm: true,
        clock_realtime: true,
        ..SnapshotLoad::new(state, memory)
    })
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
                "--no-api --snapshot /srv/snapshot/",
                Args {
                    api_sock: None,
                    snapshot: Some(SnapshotLoad {
                        resume_vm: true,
                        clock_realtime: true,
                        ..SnapshotLoad::new(
                            "/srv/snapshot/state".into(),
                            "/srv/snapshot/memory".into(),
                        )
                    }),
                    ..default()
                },
            ),
            (
                "--snapshot fd:5,fd:6",
                Args {
                    snapshot: Some(SnapshotLoad {
                        resume_vm: true,
                        clock_realtime: true,
                        ..SnapshotLoad::new(Source::fd(5), Source::fd(6))
                    }),
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
            ("--snapshot", "--snapshot needs a value", 153),
            ("--snapshot fd:1", "--snapshot takes a directory, or", 153),
            ("--snapshot fd:1,fd:x", "--snapshot takes a directory", 153),
            ("--snapshot fd:1,fd:2,fd:3", "takes a directory", 153),
            ("--snapshot d --config-file f", "exclude each other", 153),
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
