//! What `mayfly-jailer run` is to do, in one value: the options, the configuration in the monitor's own
//! types, and everything that they name, opened. `options` reads words, `vm` the configuration,
//! `inherited` takes descriptors that were passed, `resources` opens paths.
//!
//! Nothing is made on the host here but files to append to.

pub mod inherited;
pub mod options;
pub mod resources;
pub mod vm;

use std::borrow::Cow;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use mayfly::wire::config::JsonError;
use mayfly::wire::tap::TapError;
use rustix::fs::{FileType, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;
use rustix::process::PidfdFlags;

use self::inherited::Passed;
use self::options::{Console, Options};
use self::resources::{open_to_append, tun_remedy};
use self::vm::{Described, Vm};
use crate::cgroup::exclusive;
use crate::error::{AnyError, Remedy, at, errno};
use crate::root::Owner;
use crate::sys::{self, Inherited};

/// How many descriptors the monitor is given: the console, and those of the jail.
pub const FOR_MONITOR: u64 = 7;
/// Fewest descriptors that a jail is made with: those for the monitor are put aside first, and with
/// them the monitor's executable, the supervisor's process and the way to report.
pub const LEAST_OPEN_FILES: u64 = sys::ASIDE as u64 + FOR_MONITOR + 3;
/// In place of the name of a tap that is made in the jail; no name of the host's.
pub const OWN_TAP: &str = "tap of the jail";

/// A tap made for this microVM, in the network namespace of its jail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OwnTap {
    /// Connected to the host.
    Auto,
    /// To be connected by a program of the user's.
    User,
}

/// What was asked for cannot be done.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    #[error("cannot run a microVM: there is nothing to run")]
    NothingToRun,
    #[error("cannot use --api-sock: an API socket was passed (LISTEN_FDS)")]
    TwoApiSockets,
    #[error("cannot use --console unix:{0}: a client of the API configures the microVM")]
    NoConsoleSocket(PathBuf),
    #[error("cannot use --console: the configuration has a console_socket already")]
    TwoConsoleSockets,
    #[error("cannot run a microVM as root: --uid or --gid is missing")]
    NoOwner,
    #[error("cannot use {0} {1}: --uid and --gid must be your own ({2}) unless run as root")]
    NotOwnId(&'static str, u32, u32),
    #[error("cannot make a network (--net auto): that takes root")]
    AutoTakesRoot,
    #[error("cannot read the configuration {0} (--config)")]
    ReadConfig(PathBuf, #[source] Errno),
    #[error("cannot use the configuration {0} (--config): it is longer than 1 MiB")]
    LongConfig(PathBuf),
    #[error("cannot use the configuration {0} (--config)")]
    Config(PathBuf, #[source] JsonError),
    #[error(
        "cannot use \"{0}\" of the configuration: it is not a path, and mayfly-jailer opens it itself"
    )]
    NotAPath(&'static str),
    #[error("cannot pass {0} files and taps to the monitor: at most 30 go with one request")]
    TooManyFiles(usize),
    #[error("cannot use the passed sockets (LISTEN_FDS): there are {0}, and one is the API's")]
    ListenFds(u32),
    #[error("cannot close inherited descriptors")]
    CloseOthers(#[source] Errno),
    #[error("cannot use descriptor {0}")]
    Descriptor(u32, #[source] Errno),
    #[error("cannot use descriptor {0}: it is named twice")]
    DescriptorTwice(u32),
    #[error("cannot use descriptor {0} (LISTEN_FDS): it is not a listening Unix stream socket")]
    NotAListener(RawFd),
    #[error("cannot connect to the socket that was passed as descriptor {0} (LISTEN_FDS)")]
    Connect(RawFd, #[source] Errno),
    #[error("cannot end with descriptor {0} (--end-with-fd): only a pipe or a socket hangs up")]
    CannotHangUp(RawFd),
    #[error("cannot end with the parent (--with-parent)")]
    Parent(#[source] Errno),
    #[error("cannot open the {what} {path}")]
    Open {
        what: &'static str,
        path: PathBuf,
        to_write: bool,
        source: Errno,
    },
    #[error("cannot use {name} as {what}: {why}")]
    Unfit {
        name: String,
        what: &'static str,
        why: String,
    },
    #[error("cannot attach to the tap {0:?}: this host has no such interface")]
    NoInterface(String),
    #[error("cannot attach to the tap {0:?}")]
    Tap(String, #[source] TapError),
    #[error("cannot open {0} ({1})")]
    Append(PathBuf, &'static str, #[source] Errno),
    #[error("cannot find the monitor beside this program")]
    FindMonitor(#[source] io::Error),
    #[error("cannot open the monitor {0}")]
    OpenMonitor(PathBuf, #[source] Errno),
    #[error("cannot execute the monitor {0}: {1}")]
    BadMonitor(PathBuf, &'static str),
    #[error("cannot open /dev/kvm")]
    OpenKvm(#[source] Errno),
    #[error("cannot use /dev/kvm: {0}")]
    BadKvm(String),
}

impl Remedy for SpecError {
    fn remedy(&self) -> Option<Cow<'static, str>> {
        Some(Cow::Borrowed(match self {
            SpecError::NothingToRun => {
                "give --kernel, --config, or --api-sock for a client that configures it"
            }
            SpecError::NoConsoleSocket(_) => {
                "let it pass a listening socket as console_socket with PUT /serial"
            }
            SpecError::TwoConsoleSockets => "leave one of them out",
            SpecError::NoOwner => {
                "give a user and group that nothing else runs as; 0 if it is to be root"
            }
            SpecError::NotOwnId(..) => "leave it out, or run mayfly-jailer as root",
            SpecError::AutoTakesRoot => {
                "use --net user with pasta or slirp4netns, or pass a tap with --net fd:N"
            }
            SpecError::NotAPath(_) => "give a path, or leave it out and redirect what is printed",
            SpecError::CloseOthers(_) => "use Linux 5.9 or newer",
            SpecError::Descriptor(_, Errno::BADF) => {
                "it has to be open when mayfly-jailer is started"
            }
            SpecError::NotAListener(_) => "see ListenStream= in systemd.socket(5)",
            SpecError::Connect(..) => "its path must be in reach of this program",
            SpecError::Parent(Errno::SRCH) => {
                "it is outside this process namespace: use --end-with-fd with a pipe that it holds"
            }
            SpecError::Open {
                to_write: true,
                source: Errno::ACCESS | Errno::ROFS | Errno::PERM,
                ..
            } => "add :ro (\"is_read_only\" in a configuration) if the guest only reads it",
            SpecError::NoInterface(_) => {
                "make it (`ip tuntap add NAME mode tap user USER`), or give --net auto or user"
            }
            SpecError::Tap(_, TapError::NotPermitted(_)) => {
                "make it this user's with `ip tuntap add ... user USER`"
            }
            SpecError::Tap(_, TapError::Open(error)) => {
                return Errno::from_io_error(error)
                    .and_then(tun_remedy)
                    .map(Cow::Borrowed);
            }
            SpecError::FindMonitor(_) | SpecError::OpenMonitor(..) => "name it with --mayfly",
            SpecError::BadMonitor(_, "it is not executable") => "run chmod +x on it",
            SpecError::OpenKvm(Errno::NOENT) => {
                "load kvm_intel, kvm_amd or kvm_pvm; in a cloud VM, choose one with nested virtualisation"
            }
            SpecError::OpenKvm(Errno::ACCESS) => {
                "add this user to the group kvm (`usermod -aG kvm USER`, then log in again)"
            }
            _ => return None,
        }))
    }
}

/// What ends the microVM besides its guest, a signal and the time limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ender {
    /// The end of the process that started this one.
    Parent,
    /// The hang-up of the descriptor of `--end-with-fd`.
    HangUp,
}

/// Everything that was asked for, opened.
#[derive(Debug)]
pub struct Spec {
    /// Name of the microVM.
    pub id: String,
    /// When the jailer began, microseconds of the monotonic clock.
    pub began_us: u64,
    /// User and group of the monitor.
    pub owner: Owner,
    /// Whether this process is root, and the monitor becomes another user.
    pub as_root: bool,
    /// The monitor's executable.
    pub monitor: File,
    /// Its path, for messages.
    pub monitor_path: PathBuf,
    /// /dev/kvm.
    pub kvm: OwnedFd,
    /// What to run; none if a client configures it.
    pub vm: Option<Vm>,
    /// The tap to be made in the jail.
    pub own_tap: Option<OwnTap>,
    /// An API socket that was passed, and a connection to it.
    pub listener: Option<(OwnedFd, OwnedFd)>,
    /// Where to make an API socket.
    pub api_sock: Option<PathBuf>,
    /// Where to make a socket for clients of the console.
    pub console_socket: Option<PathBuf>,
    /// Control groups to make.
    pub cgroups: Option<exclusive::Plan>,
    /// Whether the console is the standard input and output.
    pub on_terminal: bool,
    /// A file for the console's output.
    pub console: Option<File>,
    /// A file for the monitor's log, in place of standard error and warnings only.
    pub log: Option<File>,
    /// Largest file in bytes.
    pub file_size: Option<u64>,
    /// Most descriptors.
    pub open_files: Option<u64>,
    /// When to end the microVM.
    pub timeout: Option<Duration>,
    /// What ends it besides: descriptors that are ready then.
    pub enders: Vec<(OwnedFd, Ender)>,
    /// Print nothing of our own.
    pub quiet: bool,
    /// What `check` types at the guest's first byte, once it has asked for the timeline.
    pub first_reply: Option<&'static [u8]>,
}

/// Reads the configuration, and keeps of the inherited descriptors what it and the options name: all
/// others are closed before anything is opened.
pub fn prepare(
    options: &mut Options,
    inherited: Inherited,
) -> Result<(Option<Described>, Passed), SpecError> {
    let mut described = Described::of(std::mem::take(&mut options.machine))?;
    let described_fds = described.as_mut().map(Described::inherited);
    let mut wanted = described_fds.unwrap_or_default();
    wanted.extend(options.end_with_fd);
    let passed = Passed::keep(inherited, wanted)?;
    Ok((described, passed))
}

impl Spec {
    /// The least there is: one machine, without a console, whose log goes to standard error.
    pub fn of(
        id: String,
        began_us: u64,
        (owner, as_root): (Owner, bool),
        mayfly: Option<&Path>,
        vm: Option<Vm>,
    ) -> Result<Spec, SpecError> {
        let monitor_path = monitor_path(mayfly)?;
        Ok(Spec {
            id,
            began_us,
            owner,
            as_root,
            monitor: open_monitor(&monitor_path)?,
            monitor_path,
            kvm: open_kvm()?,
            vm,
            own_tap: None,
            listener: None,
            api_sock: None,
            console_socket: None,
            cgroups: None,
            on_terminal: false,
            console: None,
            log: None,
            file_size: None,
            open_files: None,
            timeout: None,
            enders: Vec::new(),
            quiet: true,
            first_reply: None,
        })
    }

    /// Opens what the options and the configuration name.
    pub fn open(
        options: Options,
        id: &str,
        began_us: u64,
        (mut described, mut passed): (Option<Described>, Passed),
    ) -> Result<Spec, AnyError> {
        let listener = passed.take_listener()?;
        match (&options.api_sock, &listener, &described) {
            (Some(_), Some(_), _) => return Err(SpecError::TwoApiSockets.into()),
            (None, None, None) => return Err(SpecError::NothingToRun.into()),
            _ => {}
        }
        let owner = owner(options.uid, options.gid)?;
        let (mut own_tap, mut log) = (None, options.log.clone());
        let (mut console, mut console_socket) = (options.console.clone(), None);
        if let Some(described) = &mut described {
            own_tap = described.own_tap;
            log = log.or(described.log.take());
            console_socket = described.console_socket.take();
            if let (Console::Terminal, Some(path)) = (&console, described.console.take()) {
                console = Console::File(path);
            }
        }
        if own_tap == Some(OwnTap::Auto) && !owner.1 {
            return Err(SpecError::AutoTakesRoot.into());
        }
        if let Console::Socket(path) = &console {
            if described.is_none() {
                return Err(SpecError::NoConsoleSocket(path.clone()).into());
            }
            if console_socket.replace(path.clone()).is_some() {
                return Err(SpecError::TwoConsoleSockets.into());
            }
        }
        let cgroups = exclusive::Plan::new(&exclusive::Wanted {
            id,
            limits: &options.limits,
            values: &options.cgroups,
            version: options.cgroup_version,
            parent: options.parent_cgroup.as_deref(),
            as_root: owner.1,
        })?;
        let enders = enders(&options, &mut passed)?;
        let spec = Spec::of(
            id.to_owned(),
            began_us,
            owner,
            options.mayfly.as_deref(),
            None,
        )?;
        Ok(Spec {
            vm: described.map(|it| it.open(&mut passed)).transpose()?,
            own_tap,
            listener,
            api_sock: options.api_sock,
            console_socket,
            cgroups,
            on_terminal: console == Console::Terminal,
            console: match console {
                Console::File(path) => Some(open_to_append(&path, "--console")?),
                _ => None,
            },
            log: log.map(|path| open_to_append(&path, "--log")).transpose()?,
            file_size: options.file_size,
            open_files: options.open_files,
            timeout: options.timeout,
            enders,
            quiet: options.quiet,
            ..spec
        })
    }
}

fn enders(options: &Options, passed: &mut Passed) -> Result<Vec<(OwnedFd, Ender)>, SpecError> {
    let mut enders = Vec::new();
    if options.with_parent {
        let parent = rustix::process::getppid().ok_or(SpecError::Parent(Errno::SRCH))?;
        let parent = rustix::process::pidfd_open(parent, PidfdFlags::empty());
        enders.push((parent.map_err(SpecError::Parent)?, Ender::Parent));
    }
    if let Some(number) = options.end_with_fd {
        let fd = passed.take(number.unsigned_abs())?;
        let kind = rustix::fs::fstat(&fd).map(|stat| FileType::from_raw_mode(stat.st_mode));
        if !kind.is_ok_and(|kind| kind.is_fifo() || kind.is_socket()) {
            return Err(SpecError::CannotHangUp(number));
        }
        enders.push((fd, Ender::HangUp));
    }
    Ok(enders)
}

/// User and group of the monitor, and whether this process is root.
pub fn owner(uid: Option<u32>, gid: Option<u32>) -> Result<(Owner, bool), SpecError> {
    if sys::is_superuser() {
        let (uid, gid) = uid.zip(gid).ok_or(SpecError::NoOwner)?;
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        return Ok((Owner { uid, gid }, true));
    }
    let (own_uid, own_gid) = (rustix::process::geteuid(), rustix::process::getegid());
    for (name, wanted, own) in [
        ("--uid", uid, own_uid.as_raw()),
        ("--gid", gid, own_gid.as_raw()),
    ] {
        if let Some(wanted) = wanted.filter(|&wanted| wanted != own) {
            return Err(SpecError::NotOwnId(name, wanted, own));
        }
    }
    let (uid, gid) = (own_uid, own_gid);
    Ok((Owner { uid, gid }, false))
}

/// The monitor, or the one beside this program.
fn monitor_path(given: Option<&Path>) -> Result<PathBuf, SpecError> {
    match given {
        Some(path) => Ok(path.to_owned()),
        None => std::env::current_exe()
            .map(|own| own.with_file_name("mayfly"))
            .map_err(SpecError::FindMonitor),
    }
}

fn open_monitor(path: &Path) -> Result<File, SpecError> {
    // NONBLOCK: a pipe must not hold us up.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = rustix::fs::open(path, flags, Mode::empty())
        .map(File::from)
        .map_err(at(SpecError::OpenMonitor, path))?;
    let metadata = file
        .metadata()
        .map_err(|error| SpecError::OpenMonitor(path.to_owned(), errno(error)))?;
    if !metadata.is_file() {
        return Err(SpecError::BadMonitor(
            path.to_owned(),
            "it is not a regular file",
        ));
    }
    if std::os::unix::fs::MetadataExt::mode(&metadata) & 0o111 == 0 {
        return Err(SpecError::BadMonitor(
            path.to_owned(),
            "it is not executable",
        ));
    }
    Ok(file)
}

/// Opens /dev/kvm and makes sure that it is.
pub fn open_kvm() -> Result<OwnedFd, SpecError> {
    let kvm = rustix::fs::open("/dev/kvm", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(SpecError::OpenKvm)?;
    match sys::kvm_version(kvm.as_fd()) {
        Ok(12) => Ok(kvm),
        Ok(other) => Err(SpecError::BadKvm(format!(
            "its interface has version {other}, not 12"
        ))),
        Err(_) => Err(SpecError::BadKvm("it is not KVM".into())),
    }
}
