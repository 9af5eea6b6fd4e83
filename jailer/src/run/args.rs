//! The command line of `mayfly-jailer run`: words to a checked plain struct. Pure.

use std::ffi::{OsStr, OsString};
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::Duration;

use super::jail::LEAST_OPEN_FILES;
use crate::args::{ResourceLimit, account, cgroup_value, cgroup_version, check_id, parent_cgroup};
use crate::args::{resource_limit, value_of};
use crate::cgroup::limit::Limit as CgroupLimit;
use crate::cgroup::{Value, Version};
use crate::failure::Failure;

/// What `run --help` prints.
pub const HELP: &str = "\
usage: mayfly-jailer run --kernel FILE [options]
       mayfly-jailer run --config FILE [options]
       mayfly-jailer run --api-sock PATH [options]

Makes an empty jail, starts a microVM in it, relays its console, and ends as the guest does.
Needs no privileges but the permission to open /dev/kvm. With --api-sock alone, a client of that
socket configures and starts the microVM.

the machine:
  --config FILE            the configuration in JSON, as for mayfly --config-file
  --kernel FILE            guest kernel: an ELF vmlinux
  --initrd FILE            initial RAM disk
  --cmdline TEXT           kernel command line [default: a serial console; reboot=k panic=1 ...]
  --drive FILE[:ro]        disk image, :ro for read-only; the first is the root disk; repeatable
  --net TAP|auto|user|fd:N network interface; repeatable:
                             TAP   an existing tap
                             auto  a new one with an address the host reaches (root)
                             user  a new one in the jail, for pasta or slirp4netns (any user)
                             fd:N  an attached tap, inherited as descriptor N
  --vcpus COUNT            processors [default: 1]
  --memory SIZE            guest memory in MiB, or with M or G [default: 128]

the jail:
  --id ID                  its name: letters, digits and -, at most 64 [default: vm-PID]
  --uid UID, --gid GID     whom the monitor runs as; needed when root runs this
  --limit NAME=VALUE       cpus=1.5, memory=300M, pids=64, io=DEVICE:BYTES (a second, each way):
                           a cgroup limit of whichever version the host has; repeatable
  --cgroup FILE=VALUE      value of a cgroup file, e.g. memory.max=300M; repeatable
  --cgroup-version 1|2     version of --cgroup's files [default: the one that has the controller]
  --parent-cgroup PATH     cgroup below which the microVM's is made
                           [default: the caller's own, or the nearest above that may have some;
                           mayfly where that is the root]
  --resource-limit NAME=N  fsize or no-file [default: no-file=2048]; repeatable
  --mayfly FILE            the monitor [default: mayfly beside this program]

around it:
  --console WHERE          none, a file to append to, or unix:PATH for a socket to attach to
                           [default: the terminal; Ctrl-A X leaves]
  --log FILE               the monitor's log [default: standard error]
  --api-sock PATH          make the API socket there, for other clients
  --timeout SECONDS        end the microVM after that long
  --with-parent            end it when the process that started this one has ended
  --end-with-fd N          end it at the hang-up of a pipe or socket, inherited as descriptor N
  --exit-report FILE       how it ended, with times and peak memory, as JSON
  --quiet                  print nothing but the console and errors

exit codes: 0 the guest shut down or reset; 1 could not start, or the monitor failed; 124 time
limit; 128 and more: ended by that signal; 148 seccomp violation; 149 a mapped file was cut short;
160 guest crash; 161 KVM cannot run the guest; 162 worker failed; 163 monitor fault; 164 memory
limit.
";

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
    pub limits: Vec<CgroupLimit>,
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
    /// End it at the hang-up of this inherited descriptor.
    pub end_with_fd: Option<RawFd>,
    /// Where to say how it ended.
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
    /// From the command line.
    Plain(Plain),
}

/// A machine in plain options.
#[derive(Debug, Default, PartialEq)]
pub struct Plain {
    /// Guest kernel.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: Option<String>,
    /// Disk images, and whether they are read-only.
    pub drives: Vec<(PathBuf, bool)>,
    /// Network interfaces.
    pub nets: Vec<Net>,
    /// Processors.
    pub vcpus: Option<u64>,
    /// MiB.
    pub memory: Option<u64>,
}

/// What a network interface of the guest is connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Net {
    /// An existing tap.
    Tap(String),
    /// An inherited descriptor.
    Descriptor(RawFd),
    /// A tap made for this guest, with an address.
    Auto,
    /// A tap in the jail that a program of the user's will be connected to.
    User,
}

/// Where the console goes.
#[derive(Debug, Default, PartialEq)]
pub enum Console {
    /// Standard input and output.
    #[default]
    Terminal,
    /// Nowhere.
    None,
    /// To the end of a file.
    File(PathBuf),
    /// To whoever connects.
    Socket(PathBuf),
}

const SINGLE: [&str; 20] = [
    "--config",
    "--kernel",
    "--initrd",
    "--cmdline",
    "--vcpus",
    "--memory",
    "--id",
    "--uid",
    "--gid",
    "--cgroup-version",
    "--parent-cgroup",
    "--mayfly",
    "--console",
    "--log",
    "--api-sock",
    "--timeout",
    "--with-parent",
    "--end-with-fd",
    "--exit-report",
    "--quiet",
];
const MANY: [&str; 5] = [
    "--drive",
    "--net",
    "--limit",
    "--cgroup",
    "--resource-limit",
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

/// The words of one command line, sorted but not yet understood.
struct Words(Vec<(&'static str, OsString)>);

impl Words {
    fn sort(words: Vec<OsString>) -> Result<Words, Failure> {
        let mut sorted = Vec::new();
        let mut words = words.into_iter();
        while let Some(word) = words.next() {
            let known = SINGLE.iter().chain(&MANY).find(|&&name| word == name);
            let Some(&name) = known else {
                let what = format!("use the argument \"{}\"", word.display());
                return Err(Failure::new(what, "it is not known").remedy("see run --help"));
            };
            if SINGLE.contains(&name) && sorted.iter().any(|(other, _)| *other == name) {
                return Err(Failure::new(
                    format_args!("use {name}"),
                    "it is given twice",
                ));
            }
            let value = match name {
                "--quiet" | "--with-parent" => OsString::new(),
                // A kernel's words may begin with anything.
                "--cmdline" => words.next().ok_or_else(|| no_value(name))?,
                _ => value_of(name, words.next())?,
            };
            sorted.push((name, value));
        }
        Ok(Words(sorted))
    }

    fn one(&mut self, name: &str) -> Option<OsString> {
        let at = self.0.iter().position(|(other, _)| *other == name)?;
        Some(self.0.remove(at).1)
    }

    fn all<T, E>(
        &mut self,
        name: &str,
        understand: impl Fn(OsString) -> Result<T, E>,
    ) -> Result<Vec<T>, E> {
        let mut found = Vec::new();
        while let Some(value) = self.one(name) {
            found.push(understand(value)?);
        }
        Ok(found)
    }
}

fn no_value(name: &str) -> Failure {
    Failure::new(format_args!("use {name}"), "its value is missing")
}

/// Understands the words after `run`; none when help is asked for.
pub fn parse(words: Vec<OsString>) -> Result<Option<Options>, Failure> {
    if words.iter().any(|word| word == "--help" || word == "-h") {
        return Ok(None);
    }
    let mut words = Words::sort(words)?;
    let machine = machine(&mut words)?;
    let (mut file_size, mut open_files) = (None, None);
    for limit in words.all("--resource-limit", resource_limit)? {
        match limit {
            ResourceLimit::FileSize(bytes) => file_size = Some(bytes),
            ResourceLimit::OpenFiles(count) if count < LEAST_OPEN_FILES => {
                return Err(Failure::new(
                    format_args!("use --resource-limit no-file={count}"),
                    format_args!("a jail takes {LEAST_OPEN_FILES} to make"),
                )
                .remedy(format_args!("give no-file={LEAST_OPEN_FILES} or more")));
            }
            ResourceLimit::OpenFiles(count) => open_files = Some(count),
        }
    }
    let api_sock = words.one("--api-sock").map(PathBuf::from);
    Ok(Some(Options {
        machine,
        id: words.one("--id").map(check_id).transpose()?,
        uid: words
            .one("--uid")
            .map(|text| account("--uid", text))
            .transpose()?,
        gid: words
            .one("--gid")
            .map(|text| account("--gid", text))
            .transpose()?,
        limits: words.all("--limit", cgroup_limit)?,
        cgroups: words.all("--cgroup", cgroup_value)?,
        cgroup_version: words
            .one("--cgroup-version")
            .map(cgroup_version)
            .transpose()?,
        parent_cgroup: words
            .one("--parent-cgroup")
            .map(parent_cgroup)
            .transpose()?,
        file_size,
        open_files,
        mayfly: words.one("--mayfly").map(PathBuf::from),
        console: words.one("--console").map_or(Console::Terminal, console),
        log: words.one("--log").map(PathBuf::from),
        api_sock,
        timeout: words.one("--timeout").map(seconds).transpose()?,
        with_parent: words.one("--with-parent").is_some(),
        end_with_fd: words
            .one("--end-with-fd")
            .map(|text| {
                let text = utf8("--end-with-fd", text)?;
                descriptor(&format!("--end-with-fd {text}"), &text)
            })
            .transpose()?,
        exit_report: words.one("--exit-report").map(PathBuf::from),
        quiet: words.one("--quiet").is_some(),
    }))
}

fn machine(words: &mut Words) -> Result<Machine, Failure> {
    let plain = words
        .0
        .iter()
        .find(|(name, _)| OF_MACHINE.contains(name))
        .map(|(name, _)| *name);
    if let Some(file) = words.one("--config") {
        return match plain {
            None => Ok(Machine::Config(file.into())),
            Some(name) => Err(Failure::new(
                format_args!("use {name}"),
                "--config describes the machine already",
            )
            .remedy("write it into that file")),
        };
    }
    let Some(kernel) = words.one("--kernel") else {
        return match plain {
            None => Ok(Machine::Client),
            Some(name) => Err(
                Failure::new(format_args!("use {name}"), "--kernel is missing")
                    .remedy("run --help shows what a machine takes"),
            ),
        };
    };
    Ok(Machine::Plain(Plain {
        kernel: kernel.into(),
        initrd: words.one("--initrd").map(PathBuf::from),
        cmdline: words
            .one("--cmdline")
            .map(|text| utf8("--cmdline", text))
            .transpose()?,
        drives: words.all("--drive", |text| Ok::<_, Failure>(drive(text)))?,
        nets: words.all("--net", net)?,
        vcpus: words
            .one("--vcpus")
            .map(|text| number("--vcpus", text))
            .transpose()?,
        memory: words.one("--memory").map(memory).transpose()?,
    }))
}

fn utf8(name: &str, text: OsString) -> Result<String, Failure> {
    text.into_string().map_err(|text| {
        Failure::new(
            format_args!("use {name} \"{}\"", text.display()),
            "it is not UTF-8",
        )
    })
}

fn number(name: &str, text: OsString) -> Result<u64, Failure> {
    text.to_str()
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| {
            Failure::new(
                format_args!("use {name} \"{}\"", text.display()),
                "it is not a number",
            )
        })
}

fn drive(text: OsString) -> (PathBuf, bool) {
    match text.as_bytes().strip_suffix(b":ro") {
        Some(path) => (PathBuf::from(OsStr::from_bytes(path)), true),
        None => (text.into(), false),
    }
}

fn net(text: OsString) -> Result<Net, Failure> {
    let text = utf8("--net", text)?;
    Ok(match text.as_str() {
        "auto" => Net::Auto,
        "user" => Net::User,
        _ => match text.strip_prefix("fd:") {
            Some(number) => Net::Descriptor(descriptor(&format!("--net {text}"), number)?),
            None => Net::Tap(text),
        },
    })
}

fn descriptor(what: &str, text: &str) -> Result<RawFd, Failure> {
    // 0 to 2 are the console's.
    text.parse()
        .ok()
        .filter(|&number: &RawFd| number > 2)
        .ok_or_else(|| {
            Failure::new(
                format_args!("use {what}"),
                "it is not the number of a descriptor above 2",
            )
        })
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
fn memory(text: OsString) -> Result<u64, Failure> {
    let what = format!("use --memory \"{}\"", text.display());
    let refuse =
        |why| Failure::new(&what, why).remedy("give MiB, or a number with M or G, e.g. 512M");
    let text = text.to_str().ok_or_else(|| refuse("it is not UTF-8"))?;
    if let Ok(mib) = text.parse() {
        return Ok(mib);
    }
    match size(text) {
        Some(bytes) if bytes.is_multiple_of(1 << 20) => Ok(bytes >> 20),
        _ => Err(refuse("it is not a whole number of MiB")),
    }
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

fn seconds(text: OsString) -> Result<Duration, Failure> {
    let seconds = text.to_str().and_then(|text| text.parse::<f64>().ok());
    seconds
        .filter(|&seconds| seconds > 0.0)
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .ok_or_else(|| {
            let what = format!("use --timeout \"{}\"", text.display());
            Failure::new(what, "it is not a number of seconds above 0")
        })
}

fn cgroup_limit(text: OsString) -> Result<CgroupLimit, Failure> {
    let what = format!("use --limit \"{}\"", text.display());
    let refuse = |why: &str| {
        Failure::new(&what, why)
            .remedy("give cpus=1.5, memory=300M, pids=64 or io=DEVICE:BYTES, e.g. io=/dev/vda:20M")
    };
    let text = text.to_str().ok_or_else(|| refuse("it is not UTF-8"))?;
    let (name, value) = text.split_once('=').ok_or_else(|| refuse("it has no ="))?;
    let above_zero = |number: Option<u64>| {
        number
            .filter(|&number| number > 0)
            .ok_or_else(|| refuse("its value is not a number above 0"))
    };
    match name {
        "cpus" => {
            let cpus = value
                .parse::<f64>()
                .ok()
                .filter(|cpus| (0.01..=4096.0).contains(cpus));
            above_zero(cpus.map(|cpus| (cpus * 1000.0).round() as u64)).map(CgroupLimit::Cpus)
        }
        "memory" => above_zero(size(value)).map(CgroupLimit::Memory),
        "pids" => above_zero(value.parse().ok()).map(CgroupLimit::Pids),
        "io" => {
            let (device, bytes) = value
                .rsplit_once(':')
                .ok_or_else(|| refuse("it names no device and bytes"))?;
            above_zero(size(bytes)).map(|bytes| CgroupLimit::Io(device.into(), bytes))
        }
        _ => Err(refuse("that limit is not known")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str) -> Result<Option<Options>, Failure> {
        parse(text.split_whitespace().map(OsString::from).collect())
    }

    fn options(text: &str) -> Options {
        line(text).unwrap().unwrap()
    }

    #[test]
    fn parse_of_plain_options() {
        let options = options(
            "--kernel k --initrd i --cmdline --x --drive a --drive b:ro --net auto --net fd:7 \
             --net tap0 --net user --vcpus 2 --memory 1G --id x --timeout 1.5 --quiet --limit \
             cpus=1.5 --limit memory=1M --limit pids=5 --limit io=/dev/x:2K --console unix:/s \
             --with-parent --end-with-fd 9",
        );
        assert_eq!(
            options.machine,
            Machine::Plain(Plain {
                kernel: "k".into(),
                initrd: Some("i".into()),
                cmdline: Some("--x".into()),
                drives: vec![("a".into(), false), ("b".into(), true)],
                nets: vec![
                    Net::Auto,
                    Net::Descriptor(7),
                    Net::Tap("tap0".into()),
                    Net::User
                ],
                vcpus: Some(2),
                memory: Some(1024),
            })
        );
        assert_eq!(options.timeout, Some(Duration::from_millis(1500)));
        assert_eq!(options.console, Console::Socket("/s".into()));
        assert_eq!(
            options.limits,
            [
                CgroupLimit::Cpus(1500),
                CgroupLimit::Memory(1 << 20),
                CgroupLimit::Pids(5),
                CgroupLimit::Io("/dev/x".into(), 2048)
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
            ("--config f --resource-limit x=1", "not known"),
            (
                "--config f --resource-limit no-file=41",
                "no-file=42 or more",
            ),
        ] {
            let failure = line(text).unwrap_err().to_string();
            assert!(failure.contains(expected), "{text}: {failure}");
        }
    }
}
