//! The command line of `mayfly-jailer run`: words to a checked plain struct. Pure.

use std::ffi::{OsStr, OsString};
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::Duration;

use mayfly::wire::config::{BootSource, CacheType, Drive, MachineConfig, NetworkInterface};
use mayfly::wire::{DEFAULT_BOOT_ARGS, Source, VmConfig};

use super::{LEAST_OPEN_FILES, OWN_TAP, OwnTap};
use crate::args::{ArgsError, ResourceLimit, Takes, Words, account, bad, cgroup_value};
use crate::args::{cgroup_version, check_id, parent_cgroup, resource_limit};
use crate::cgroup::limit::Limit;
use crate::cgroup::{Value, Version};

/// What `run --help` prints.
pub const HELP: &str = include_str!("help.txt");

/// What to run, in which jail, with what around it.
#[derive(Debug, Default, PartialEq)]
pub struct Options {
    /// The machine.
    pub machine: Machine,
    /// Name of the jail.
    pub id: Option<String>,
    /// User to run the monitor as.
    pub uid: Option<u32>,
    /// Group to run the monitor as.
    pub gid: Option<u32>,
    /// Limits by name, for whichever cgroup version has them.
    pub limits: Vec<Limit>,
    /// Values for cgroup files.
    pub cgroups: Vec<Value>,
    /// Version of those files.
    pub cgroup_version: Option<Version>,
    /// Names of the groups above the microVM's.
    pub parent_cgroup: Option<Vec<OsString>>,
    /// Largest file in bytes.
    pub file_size: Option<u64>,
    /// Most descriptors.
    pub open_files: Option<u64>,
    /// The monitor.
    pub mayfly: Option<PathBuf>,
    /// Where the console goes.
    pub console: Console,
    /// The monitor's log.
    pub log: Option<PathBuf>,
    /// Where to make the API socket.
    pub api_sock: Option<PathBuf>,
    /// When to end the microVM.
    pub timeout: Option<Duration>,
    /// End it with the process that started this one.
    pub with_parent: bool,
    /// End it at the hang-up of this passed descriptor.
    pub end_with_fd: Option<RawFd>,
    /// Where to write how it ended.
    pub exit_report: Option<PathBuf>,
    /// Print nothing of our own.
    pub quiet: bool,
}

/// Where the description of the machine comes from.
#[derive(Debug, Default, PartialEq)]
pub enum Machine {
    /// From a client of the API socket, later.
    #[default]
    Client,
    /// From a file.
    Config(PathBuf),
    /// From the command line, with a tap that is made in the jail.
    Plain(Box<VmConfig>, Option<OwnTap>),
}

/// Where the console goes.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Console {
    /// Standard input and output.
    #[default]
    Terminal,
    /// Nowhere.
    None,
    /// To the end of a file.
    File(PathBuf),
    /// To the clients of a socket.
    Socket(PathBuf),
}

const OPTIONS: [(&str, Takes); 25] = [
    ("--config", Takes::Value),
    ("--kernel", Takes::Value),
    ("--initrd", Takes::Value),
    ("--cmdline", Takes::Text),
    ("--vcpus", Takes::Value),
    ("--memory", Takes::Value),
    ("--drive", Takes::Values),
    ("--net", Takes::Values),
    ("--id", Takes::Value),
    ("--uid", Takes::Value),
    ("--gid", Takes::Value),
    ("--limit", Takes::Values),
    ("--cgroup", Takes::Values),
    ("--cgroup-version", Takes::Value),
    ("--parent-cgroup", Takes::Value),
    ("--resource-limit", Takes::Values),
    ("--mayfly", Takes::Value),
    ("--console", Takes::Value),
    ("--log", Takes::Value),
    ("--api-sock", Takes::Value),
    ("--timeout", Takes::Value),
    ("--with-parent", Takes::Nothing),
    ("--end-with-fd", Takes::Value),
    ("--exit-report", Takes::Value),
    ("--quiet", Takes::Nothing),
];
/// Those that describe the machine, which a config file does as well.
const OF_MACHINE: [&str; 7] = [
    "--kernel",
    "--initrd",
    "--cmdline",
    "--vcpus",
    "--memory",
    "--drive",
    "--net",
];

/// Understands the words after `run`; none when help is asked for.
pub fn parse(words: Vec<OsString>) -> Result<Option<Options>, ArgsError> {
    if words.iter().any(|word| word == "--help" || word == "-h") {
        return Ok(None);
    }
    let mut words = Words::sort(words, &OPTIONS, "see run --help")?;
    let machine = machine(&mut words)?;
    let (mut file_size, mut open_files) = (None, None);
    for limit in words.all("--resource-limit", resource_limit)? {
        match limit {
            ResourceLimit::FileSize(bytes) => file_size = Some(bytes),
            ResourceLimit::OpenFiles(count) if count < LEAST_OPEN_FILES => {
                let value = format!("no-file={count}");
                let why = format!("a jail takes {LEAST_OPEN_FILES} to make");
                let remedy = "give no-file=42 or more";
                return Err(bad("--resource-limit", value, why, remedy));
            }
            ResourceLimit::OpenFiles(count) => open_files = Some(count),
        }
    }
    let mut path = |name| words.one(name).map(PathBuf::from);
    let (mayfly, log, api_sock) = (path("--mayfly"), path("--log"), path("--api-sock"));
    let exit_report = path("--exit-report");
    Ok(Some(Options {
        machine,
        id: words.parsed("--id", check_id)?,
        uid: words.parsed("--uid", |text| account("--uid", text))?,
        gid: words.parsed("--gid", |text| account("--gid", text))?,
        limits: words.all("--limit", limit)?,
        cgroups: words.all("--cgroup", cgroup_value)?,
        cgroup_version: words.parsed("--cgroup-version", cgroup_version)?,
        parent_cgroup: words.parsed("--parent-cgroup", parent_cgroup)?,
        file_size,
        open_files,
        mayfly,
        console: words.one("--console").map_or(Console::Terminal, console),
        log,
        api_sock,
        timeout: words.parsed("--timeout", seconds)?,
        with_parent: words.has("--with-parent"),
        end_with_fd: words.parsed("--end-with-fd", |text| {
            let text = utf8("--end-with-fd", text)?;
            descriptor("--end-with-fd", &text, &text)
        })?,
        exit_report,
        quiet: words.has("--quiet"),
    }))
}

fn machine(words: &mut Words) -> Result<Machine, ArgsError> {
    let plain = OF_MACHINE.into_iter().find(|name| words.has(name));
    if let Some(file) = words.one("--config") {
        let why = "--config describes the machine already";
        return match plain {
            None => Ok(Machine::Config(file.into())),
            Some(name) => {
                let value = words.one(name).unwrap_or_default();
                Err(bad(name, value.display(), why, "write it into that file"))
            }
        };
    }
    let Some(kernel) = words.one("--kernel") else {
        let remedy = "run --help shows what a machine takes";
        return match plain {
            None => Ok(Machine::Client),
            Some(name) => {
                let value = words.one(name).unwrap_or_default();
                Err(bad(name, value.display(), "--kernel is missing", remedy))
            }
        };
    };
    let mut config = VmConfig {
        boot_source: Some(BootSource {
            kernel_image_path: source("--kernel", kernel)?,
            initrd_path: words.parsed("--initrd", |text| source("--initrd", text))?,
            boot_args: Some(match words.one("--cmdline") {
                Some(text) => utf8("--cmdline", text)?,
                None => default_boot_args(),
            }),
        }),
        machine_config: Some(MachineConfig {
            vcpu_count: words.parsed("--vcpus", vcpus)?.unwrap_or(1),
            mem_size_mib: words.parsed("--memory", memory)?.unwrap_or(128),
            ..MachineConfig::default()
        }),
        ..VmConfig::default()
    };
    let boot = config.boot_source.as_ref();
    // The initrd is the root file system, or the command line names another than the first drive.
    let named = |boot: &BootSource| boot.boot_args.as_ref().is_some_and(|line| names_root(line));
    let has_root = boot.is_some_and(|boot| boot.initrd_path.is_some() || named(boot));
    for (index, (path, read_only)) in words.all("--drive", drive)?.into_iter().enumerate() {
        config.devices.drives.push(Drive {
            drive_id: match index {
                0 => "root".into(),
                _ => format!("disk{index}"),
            },
            partuuid: None,
            is_root_device: index == 0 && !has_root,
            cache_type: CacheType::default(),
            is_read_only: Some(read_only),
            path_on_host: path,
            rate_limiter: None,
            io_engine: None,
            socket: None,
        });
    }
    let mut own_tap = None;
    for (index, (tap, own)) in words.all("--net", net)?.into_iter().enumerate() {
        if own.is_some() && own_tap.is_some() {
            let remedy = "one such interface is what a jail has; give taps for others";
            return Err(bad("--net", "auto or user", "it is given twice", remedy));
        }
        own_tap = own.or(own_tap);
        let interface = NetworkInterface {
            iface_id: format!("eth{index}"),
            host_dev_name: tap,
            guest_mac: None,
            mtu: None,
            rx_rate_limiter: None,
            tx_rate_limiter: None,
        };
        config.devices.network_interfaces.push(interface);
    }
    Ok(Machine::Plain(Box::new(config), own_tap))
}

/// Whether a kernel command line says where the root file system is, before what is for init.
fn names_root(line: &str) -> bool {
    let words = line.split_whitespace().take_while(|word| *word != "--");
    words.into_iter().any(|word| word.starts_with("root="))
}

/// The monitor's default command line with a console, which this command shows: the word that keeps
/// Linux from looking for serial ports goes.
pub fn default_boot_args() -> String {
    let words = DEFAULT_BOOT_ARGS.split_whitespace();
    let words = words.filter(|word| !word.starts_with("8250."));
    words.fold("console=ttyS0".into(), |line, word| {
        format!("{line} {word}")
    })
}

fn utf8(name: &'static str, text: OsString) -> Result<String, ArgsError> {
    text.into_string()
        .map_err(|text| bad(name, text.display(), "it is not UTF-8", ""))
}

fn source(name: &'static str, text: OsString) -> Result<Source, ArgsError> {
    utf8(name, text).map(Source::Named)
}

fn vcpus(text: OsString) -> Result<u8, ArgsError> {
    let number = text.to_str().and_then(|text| text.parse().ok());
    let why = "it is not a number from 0 to 255";
    number.ok_or_else(|| bad("--vcpus", text.display(), why, ""))
}

fn drive(text: OsString) -> Result<(Source, bool), ArgsError> {
    let (path, read_only) = match text.as_bytes().strip_suffix(b":ro") {
        Some(path) => (OsStr::from_bytes(path).to_owned(), true),
        None => (text, false),
    };
    Ok((source("--drive", path)?, read_only))
}

/// What a network interface is connected to, and whether that is made in the jail.
fn net(text: OsString) -> Result<(Source, Option<OwnTap>), ArgsError> {
    let text = utf8("--net", text)?;
    Ok(match text.as_str() {
        "auto" => (OWN_TAP.into(), Some(OwnTap::Auto)),
        "user" => (OWN_TAP.into(), Some(OwnTap::User)),
        _ => match text.strip_prefix("fd:") {
            Some(number) => {
                let number = descriptor("--net", &text, number)?;
                (Source::fd(number.unsigned_abs()), None)
            }
            None => (Source::Named(text), None),
        },
    })
}

fn descriptor(name: &'static str, given: &str, number: &str) -> Result<RawFd, ArgsError> {
    // 0 to 2 are the console's.
    let number = number.parse().ok().filter(|&number: &RawFd| number > 2);
    let why = "it is not the number of a descriptor above 2";
    number.ok_or_else(|| bad(name, given, why, ""))
}

/// Bytes, or with K, M or G after it.
fn size(text: &str) -> Option<u64> {
    let (digits, factor) = match text.as_bytes().last()? {
        b'K' | b'k' => (&text[..text.len() - 1], 1 << 10),
        b'M' | b'm' => (&text[..text.len() - 1], 1 << 20),
        b'G' | b'g' => (&text[..text.len() - 1], 1 << 30),
        _ => (text, 1),
    };
    digits.parse::<u64>().ok()?.checked_mul(factor)
}

/// MiB; a bare number is MiB already.
fn memory(text: OsString) -> Result<u64, ArgsError> {
    let give = "give MiB, or a number with M or G, e.g. 512M";
    let why = "it is not a whole number of MiB";
    let mib = text.to_str().and_then(|text| {
        let bytes = || size(text).filter(|bytes| bytes.is_multiple_of(1 << 20));
        text.parse()
            .ok()
            .or_else(|| bytes().map(|bytes| bytes >> 20))
    });
    mib.ok_or_else(|| bad("--memory", text.display(), why, give))
}

fn console(text: OsString) -> Console {
    if text == "none" {
        return Console::None;
    }
    match text.as_bytes().strip_prefix(b"unix:") {
        Some(path) => Console::Socket(PathBuf::from(OsStr::from_bytes(path))),
        None => Console::File(text.into()),
    }
}

fn seconds(text: OsString) -> Result<Duration, ArgsError> {
    let seconds = text.to_str().and_then(|text| text.parse::<f64>().ok());
    let why = "it is not a number of seconds above 0";
    seconds
        .filter(|&seconds| seconds > 0.0)
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .ok_or_else(|| bad("--timeout", text.display(), why, ""))
}

fn limit(text: OsString) -> Result<Limit, ArgsError> {
    let give = "give cpus=1.5, memory=300M, pids=64 or io=DEVICE:BYTES, e.g. io=/dev/vda:20M";
    let refuse = |why: &'static str| bad("--limit", text.display(), why, give);
    let text = text.to_str().ok_or_else(|| refuse("it is not UTF-8"))?;
    let (name, value) = text.split_once('=').ok_or_else(|| refuse("it has no ="))?;
    let above_zero = |number: Option<u64>| {
        let number = number.filter(|&number| number > 0);
        number.ok_or_else(|| refuse("its value is not a number above 0"))
    };
    match name {
        "cpus" => {
            let cpus = value.parse::<f64>().ok();
            let cpus = cpus.filter(|cpus| (0.01..=4096.0).contains(cpus));
            above_zero(cpus.map(|cpus| (cpus * 1000.0).round() as u64)).map(Limit::Cpus)
        }
        "memory" => above_zero(size(value)).map(Limit::Memory),
        "pids" => above_zero(value.parse().ok()).map(Limit::Pids),
        "io" => {
            let (device, bytes) = value
                .rsplit_once(':')
                .ok_or_else(|| refuse("it names no device and bytes"))?;
            above_zero(size(bytes)).map(|bytes| Limit::Io(device.into(), bytes))
        }
        _ => Err(refuse("that limit is not known")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::error::message;

    fn line(text: &str) -> Result<Option<Options>, ArgsError> {
        parse(text.split_whitespace().map(OsString::from).collect())
    }

    fn options(text: &str) -> Options {
        line(text).unwrap().unwrap()
    }

    #[test]
    fn the_first_drive_is_the_root_unless_the_command_line_names_one() {
        let is_root = |text: &str| match options(text).machine {
            Machine::Plain(config, _) => config.devices.drives[0].is_root_device,
            other => panic!("{other:?}"),
        };
        assert!(is_root("--kernel k --drive a"));
        assert!(is_root("--kernel k --cmdline quiet --drive a"));
        assert!(!is_root("--kernel k --cmdline root=/dev/vda2 --drive a"));
        assert!(!names_root("quiet -- root=x noroot=x") && names_root("quiet root=LABEL=x -- y"));
    }

    #[test]
    fn parse_of_plain_options() {
        let options = options(
            "--kernel k --initrd i --cmdline --x --drive a --drive b:ro --net fd:7 \
             --net tap0 --net user --vcpus 2 --memory 1G --id x --timeout 1.5 --quiet --limit \
             cpus=1.5 --limit memory=1M --limit pids=5 --limit io=/dev/x:2K --console unix:/s \
             --with-parent --end-with-fd 9",
        );
        let Machine::Plain(config, own_tap) = options.machine else {
            panic!("{:?}", options.machine)
        };
        assert_eq!(own_tap, Some(OwnTap::User));
        let boot = config.boot_source.unwrap();
        assert_eq!(boot.kernel_image_path, "k".into());
        assert_eq!(boot.initrd_path, Some("i".into()));
        assert_eq!(boot.boot_args, Some("--x".into()));
        let [root, second] = &config.devices.drives[..] else {
            panic!("{:?}", config.devices.drives)
        };
        assert_eq!(
            (root.drive_id.as_str(), &root.path_on_host),
            ("root", &"a".into())
        );
        // The initrd is the root file system.
        assert!(!root.is_root_device && !root.read_only());
        assert!(second.read_only() && second.path_on_host == "b".into());
        let taps = config.devices.network_interfaces.into_iter();
        let taps: Vec<Source> = taps.map(|it| it.host_dev_name).collect();
        assert_eq!(taps, [Source::fd(7), "tap0".into(), OWN_TAP.into()]);
        let machine = config.machine_config.unwrap();
        assert_eq!((machine.vcpu_count, machine.mem_size_mib), (2, 1024));
        assert_eq!(options.timeout, Some(Duration::from_millis(1500)));
        assert_eq!(options.console, Console::Socket("/s".into()));
        assert_eq!(
            options.limits,
            [
                Limit::Cpus(1500),
                Limit::Memory(1 << 20),
                Limit::Pids(5),
                Limit::Io("/dev/x".into(), 2048)
            ]
        );
        assert!(options.quiet && options.with_parent);
        assert_eq!(options.end_with_fd, Some(9));
    }

    #[test]
    fn parse_of_a_config_or_nothing() {
        assert_eq!(options("--config f").machine, Machine::Config("f".into()));
        assert_eq!(options("--api-sock s").machine, Machine::Client);
        assert!(line("--config f -h").unwrap().is_none());
    }

    #[test]
    fn parse_when_wrong_says_what() {
        for (text, expected) in [
            ("--config f --kernel k", "describes the machine already"),
            ("--vcpus 1", "--kernel is missing"),
            ("--nonsense", "not known"),
            ("--config", "value is missing"),
            ("--kernel k --kernel k", "given twice"),
            ("--kernel k --net fd:1", "descriptor above 2"),
            ("--kernel k --memory 5K", "MiB"),
            ("--kernel k --memory x", "MiB"),
            ("--kernel k --vcpus x", "not a number"),
            ("--config f --end-with-fd 2", "descriptor above 2"),
            ("--config f --timeout 0", "above 0"),
            ("--config f --timeout -1", "above 0"),
            ("--config f --limit x=1", "not known"),
            ("--config f --limit cpus=0", "above 0"),
            ("--config f --limit memory", "no ="),
            ("--config f --id a/b", "1 to 64 letters"),
            ("--config f --uid x", "--uid"),
            ("--kernel k --net user --net auto", "given twice"),
            ("--config f --resource-limit x=1", "not known"),
            (
                "--config f --resource-limit no-file=41",
                "no-file=42 or more",
            ),
        ] {
            let failure = message(&line(text).unwrap_err());
            assert!(failure.contains(expected), "{text}: {failure}");
        }
    }
}
