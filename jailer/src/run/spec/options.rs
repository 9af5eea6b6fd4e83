//! The command line of `mayfly-jailer run`: words to a checked plain struct. Pure. `guest` is what of it is about a
//! command for the guest.

mod guest;
#[cfg(test)]
mod tests;

use std::ffi::{OsStr, OsString};
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mayfly::wire::command_line;
use mayfly::wire::config::{
    BootSource, Drive, InterruptController, MachineConfig, NetworkInterface,
};
use mayfly::wire::{Source, VmConfig};

pub use self::guest::GuestCommand;
use super::boot_args;
use super::devices::{drive, net};
use super::snapshot::Restoring;
use super::{LEAST_OPEN_FILES, OwnTap};
use crate::args::{self, ArgsError, Known, Why, Words, account, asks_for_help, resource_limits};
use crate::cgroup::exclusive::Wanted;
use crate::cgroup::limit::Limit;
use crate::monitor::ResourceLimits;
use crate::process::command::split_command;
use crate::process::place::Place;

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
    /// Control groups.
    pub cgroups: Wanted,
    /// Limits of the monitor's process.
    pub limits: ResourceLimits,
    /// The monitor.
    pub mayfly: Option<PathBuf>,
    /// Where the console goes.
    pub console: Console,
    /// Where to make a socket for clients of the console.
    pub console_socket: Option<PathBuf>,
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
    /// The folder to take a snapshot into.
    pub snapshot_to: Option<PathBuf>,
    /// Let the guest go on then.
    pub snapshot_and_continue: bool,
    /// Where to write how it ended.
    pub exit_report: Option<PathBuf>,
    /// Print nothing of our own.
    pub quiet: bool,
    /// What the guest runs, where that is a command.
    pub guest: Option<GuestCommand>,
    /// Where the socket of a guest with a command is.
    pub place: Place,
    /// The network namespace whose interface the guest takes over.
    pub net_namespace: Option<PathBuf>,
    /// Programs of that namespace reach the guest.
    pub is_reachable_from_namespace: bool,
    /// The folder of templates that guests may be copies of.
    pub template: Option<PathBuf>,
    /// Tell this passed descriptor when the command runs, or could.
    pub ready_fd: Option<RawFd>,
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
    /// From a snapshot, with a tap that is made in the jail.
    Snapshot(Restoring, Option<OwnTap>),
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
}

impl Console {
    /// The file.
    pub fn file(&self) -> Option<&Path> {
        match self {
            Console::File(path) => Some(path),
            _ => None,
        }
    }
}

const KNOWN: Known = Known {
    flags: "--with-parent --quiet --same-disks --ignore-cpu-differences \
            --snapshot-and-continue -t --tty -i --interactive --hold --reach-from-namespace",
    once: "--image --agent --hostname --user --workdir --config --snapshot --working-set --snapshot-to \
           --kernel --initrd --vcpus --memory --id --uid --gid --cgroup-version --parent-cgroup \
           --mayfly --console --log --api-sock --timeout --end-with-fd --exit-report --ready-fd \
           --runtime-dir --process --console-socket --upper --net-from-namespace --template \
           --interrupt-controller",
    repeatable: "--drive --net --limit --cgroup --resource-limit --env --tmpfs --copy-in",
    text: "--cmdline",
    help: "see run --help",
};

/// Those that describe the machine, which a config file does as well.
const OF_MACHINE: &str =
    "--kernel --initrd --cmdline --vcpus --memory --interrupt-controller --drive --net";

/// Understands the words after `run`; none when help is asked for.
pub fn parse(words: Vec<OsString>) -> Result<Option<Options>, ArgsError> {
    let (words, command) = split_command(words);
    if asks_for_help(&words) {
        return Ok(None);
    }
    let mut words = Words::sort(words, &KNOWN)?;
    let guest = guest::take(&mut words, command)?;
    let machine = machine(&mut words, guest.as_ref())?;
    let snapshot_to = words.path("--snapshot-to");
    if snapshot_to.is_none() && words.has("--snapshot-and-continue") {
        return refuse(
            "--snapshot-and-continue",
            &mut words,
            "it needs --snapshot-to",
        );
    }
    let limits = resource_limits(&mut words)?;
    let (console, console_socket) = console(words.one("--console"));
    if let Some(count) = limits.open_files.filter(|&count| count < LEAST_OPEN_FILES) {
        let why = format!(
            "a jail takes {LEAST_OPEN_FILES} to make; give no-file={LEAST_OPEN_FILES} or more"
        );
        let value = format!("no-file={count}");
        return Err(ArgsError::Value("--resource-limit", value, why.into()));
    }
    Ok(Some(Options {
        machine,
        id: words.parsed("--id", args::name)?,
        uid: words.parsed("--uid", account)?,
        gid: words.parsed("--gid", account)?,
        cgroups: Wanted {
            limits: words.all("--limit", limit)?,
            values: words.all("--cgroup", args::cgroup_value)?,
            version: words.parsed("--cgroup-version", args::cgroup_version)?,
            parent: args::parent_cgroup(&mut words)?,
        },
        limits,
        mayfly: words.path("--mayfly"),
        console,
        console_socket,
        log: words.path("--log"),
        api_sock: words.path("--api-sock"),
        timeout: words.parsed("--timeout", seconds)?,
        with_parent: words.has("--with-parent"),
        end_with_fd: words.parsed("--end-with-fd", args::descriptor)?,
        snapshot_to,
        snapshot_and_continue: words.has("--snapshot-and-continue"),
        exit_report: words.path("--exit-report"),
        quiet: words.has("--quiet"),
        guest,
        place: Place::new(words.path("--runtime-dir")),
        net_namespace: words.path("--net-from-namespace"),
        is_reachable_from_namespace: words.has("--reach-from-namespace"),
        template: words.path("--template"),
        ready_fd: words.parsed("--ready-fd", args::descriptor)?,
    }))
}

/// Those that a snapshot has its own of.
const SAVED: &str = "--config --kernel --initrd --cmdline --vcpus --memory --interrupt-controller";
/// Those that say something of a snapshot.
const OF_SNAPSHOT: [&str; 3] = ["--same-disks", "--ignore-cpu-differences", "--working-set"];

fn refuse<T>(name: &'static str, words: &mut Words, why: &'static str) -> Result<T, ArgsError> {
    let value = words.one(name).unwrap_or_default();
    let value = value.display().to_string();
    Err(ArgsError::Value(name, value, why.into()))
}

fn machine(words: &mut Words, guest: Option<&GuestCommand>) -> Result<Machine, ArgsError> {
    let folder = words.path("--snapshot");
    let of_snapshot = OF_SNAPSHOT.into_iter().find(|name| words.has(name));
    if let (None, Some(name)) = (&folder, of_snapshot) {
        return refuse(name, words, "it needs --snapshot");
    }
    match folder {
        Some(folder) => saved_machine(folder, words),
        None => new_machine(words, guest),
    }
}

/// One that was saved, with files and taps for what it has.
fn saved_machine(folder: PathBuf, words: &mut Words) -> Result<Machine, ArgsError> {
    if let Some(name) = SAVED.split(' ').find(|name| words.has(name)) {
        let why = "--snapshot has the machine already, as it was saved; leave it out";
        return refuse(name, words, why);
    }
    let mut restoring = Restoring {
        folder,
        working_set: words.path("--working-set"),
        same_disks: words.has("--same-disks"),
        ignore_cpu_differences: words.has("--ignore-cpu-differences"),
        ..Restoring::default()
    };
    let mut unnamed = 0..;
    let drives = words.all("--drive", |text| {
        let (id, text) = split_id(text);
        let given = drive(&text)?;
        none_given(given.settings.first())?;
        Ok((id, given))
    })?;
    for (id, given) in drives {
        let id = id.unwrap_or_else(|| drive_id(unnamed.next().unwrap_or(0)));
        if restoring.drives.iter().any(|(other, ..)| *other == id) {
            return Err(ArgsError::Value("--drive", id, TWICE.into()));
        }
        restoring.drives.push((id, given));
    }
    let mut own_tap = None;
    let mut unnamed = 0..;
    let nets = words.all("--net", |text| {
        let (id, text) = split_id(text);
        let given = net(&text)?;
        none_given(given.first_setting())?;
        Ok((id, (given.tap, given.own)))
    })?;
    for (id, (tap, own)) in nets {
        own_tap = one_own_tap(own_tap, own)?;
        let id = id.unwrap_or_else(|| interface_id(unnamed.next().unwrap_or(0)));
        if restoring.taps.iter().any(|(other, _)| *other == id) {
            return Err(ArgsError::Value("--net", id, TWICE.into()));
        }
        restoring.taps.push((id, tap));
    }
    Ok(Machine::Snapshot(restoring, own_tap))
}

/// Refuses settings of devices that were saved.
fn none_given(setting: Option<&str>) -> Result<(), Why> {
    match setting {
        None => Ok(()),
        Some(name) => Err(format!(
            "a guest that was saved keeps the settings of its devices; leave out :{name}="
        )
        .into()),
    }
}

const TWICE: &str = "it is given twice";

/// The id that the `index`th `--drive` gives its disk.
fn drive_id(index: usize) -> String {
    match index {
        0 => "root".to_owned(),
        _ => format!("disk{index}"),
    }
}

/// The id that the `index`th `--net` gives its interface.
fn interface_id(index: usize) -> String {
    format!("eth{index}")
}

/// The id in `ID=WHAT`, if there is one, and the rest. A path that begins like this can be written
/// with `./` before it.
fn split_id(text: &str) -> (Option<String>, String) {
    let is_id = |id: &str| {
        let mut bytes = id.bytes();
        !id.is_empty() && bytes.all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
    };
    match text.split_once('=').filter(|(id, _)| is_id(id)) {
        Some((id, rest)) => (Some(id.to_owned()), rest.to_owned()),
        None => (None, text.to_owned()),
    }
}

/// The only tap of the jail's own that there may be.
fn one_own_tap(
    before: Option<OwnTap>,
    another: Option<OwnTap>,
) -> Result<Option<OwnTap>, ArgsError> {
    if before.is_some() && another.is_some() {
        let why = "it is given twice; one such interface is what a jail has; give taps for others";
        return Err(ArgsError::Value("--net", "auto or user".into(), why.into()));
    }
    Ok(another.or(before))
}

fn new_machine(words: &mut Words, guest: Option<&GuestCommand>) -> Result<Machine, ArgsError> {
    let plain = OF_MACHINE.split(' ').find(|name| words.has(name));
    let config = words.path("--config");
    if let (Some(_), Some(name)) = (&config, plain) {
        let why = "--config describes the machine already; write it into that file";
        return refuse(name, words, why);
    }
    if let Some(file) = config {
        return Ok(Machine::Config(file));
    }
    let Some(kernel) = words.parsed("--kernel", source)? else {
        let why = "--kernel is missing; run --help shows what a machine takes";
        return plain.map_or(Ok(Machine::Client), |name| refuse(name, words, why));
    };
    let initrd_path = words.parsed("--initrd", source)?;
    let cmdline = words.parsed("--cmdline", |text| Ok(text.to_owned()))?;
    // The initrd is the root file system, or the command line names another than the first drive.
    let has_root = initrd_path.is_some() || cmdline.as_deref().is_some_and(names_root);
    let mut config = VmConfig {
        boot_source: Some(BootSource {
            kernel_image_path: kernel,
            initrd_path,
            boot_args: Some(cmdline.unwrap_or_else(boot_args::default)),
        }),
        machine_config: Some(MachineConfig {
            vcpu_count: words.parsed("--vcpus", vcpus)?.unwrap_or(1),
            mem_size_mib: words.parsed("--memory", memory)?.unwrap_or(128),
            interrupt_controller: words
                .parsed("--interrupt-controller", interrupt_controller)?
                .unwrap_or_default(),
            ..MachineConfig::default()
        }),
        ..VmConfig::default()
    };
    let mut drives = words.all("--drive", drive)?;
    if let Some(guest) = guest {
        drives.splice(0..0, guest.drives()?);
    }
    let has_root = has_root || guest.is_some();
    for (index, given) in drives.into_iter().enumerate() {
        config.devices.drives.push(Drive {
            is_root_device: index == 0 && !has_root,
            ..given.into_drive(drive_id(index))
        });
    }
    let mut own_tap = None;
    for (index, given) in words.all("--net", net)?.into_iter().enumerate() {
        own_tap = one_own_tap(own_tap, given.own)?;
        let interface = NetworkInterface {
            queues: given.queues,
            poll_us: given.poll_us,
            ..NetworkInterface::new(interface_id(index), given.tap)
        };
        config.devices.network_interfaces.push(interface);
    }
    Ok(Machine::Plain(Box::new(config), own_tap))
}

/// Whether a kernel command line says where the root file system is, before what is for init.
fn names_root(line: &str) -> bool {
    let (kernel, _) = command_line::split(line);
    command_line::parameters(kernel).any(|word| word.starts_with("root="))
}

/// A file by its path.
pub(super) fn source(text: &str) -> Result<Source, Why> {
    Ok(Source::Named(text.to_owned()))
}

fn vcpus(text: &str) -> Result<u8, Why> {
    let count = text.parse().ok();
    count.ok_or("it is not a number from 0 to 255".into())
}

fn interrupt_controller(text: &str) -> Result<InterruptController, Why> {
    match text {
        "auto" => Ok(InterruptController::Auto),
        "split" => Ok(InterruptController::Split),
        "kernel" => Ok(InterruptController::Kernel),
        _ => Err("it is none of auto, split and kernel".into()),
    }
}

/// Bytes, or with K, M or G after it.
pub(super) fn size(text: &str) -> Option<u64> {
    let (last, shift) = match text.as_bytes().last()?.to_ascii_uppercase() {
        b'K' => (1, 10),
        b'M' => (1, 20),
        b'G' => (1, 30),
        _ => (0, 0),
    };
    let number = text[..text.len() - last].parse::<u64>().ok()?;
    number.checked_mul(1 << shift)
}

/// MiB; a bare number is MiB already.
fn memory(text: &str) -> Result<u64, Why> {
    let bytes = || size(text).filter(|bytes| bytes.is_multiple_of(1 << 20));
    let mib = text
        .parse()
        .ok()
        .or_else(|| bytes().map(|bytes| bytes >> 20));
    let why = "it is not a whole number of MiB; give MiB, or a number with M or G, e.g. 512M";
    mib.ok_or(why.into())
}

/// Where the console goes, and where a socket for it is to be.
fn console(text: Option<OsString>) -> (Console, Option<PathBuf>) {
    let Some(text) = text else {
        return (Console::Terminal, None);
    };
    match text.as_bytes().strip_prefix(b"unix:") {
        Some(path) => (Console::None, Some(OsStr::from_bytes(path).into())),
        None if text == "none" => (Console::None, None),
        None => (Console::File(text.into()), None),
    }
}

fn seconds(text: &str) -> Result<Duration, Why> {
    let seconds = text.parse::<f64>().ok().filter(|&seconds| seconds > 0.0);
    let seconds = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    seconds.ok_or("it is not a number of seconds above 0".into())
}

fn limit(text: &str) -> Result<Limit, Why> {
    let refuse = |why| {
        let give = "give cpus=1.5, memory=300M, pids=64 or io=DEVICE:BYTES, e.g. io=/dev/vda:20M";
        Why::from(format!("{why}; {give}"))
    };
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
            let parts = value.rsplit_once(':');
            let (device, bytes) = parts.ok_or_else(|| refuse("it names no device and bytes"))?;
            above_zero(size(bytes)).map(|bytes| Limit::Io(device.into(), bytes))
        }
        _ => Err(refuse("that limit is not known")),
    }
}
