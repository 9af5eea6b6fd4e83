//! What `mayfly-jailer run` is to do, in one value: the options, the configuration in the monitor's own
//! types, and everything that they name, opened. `options` reads words, `devices`
//! those that stand for a disk or an interface, `vm` the configuration,
//! `snapshot` what was saved, `inherited` takes descriptors that were passed, `resources` opens paths.
//!
//! Nothing is made on the host here but files to append to, and the folder of a snapshot to be taken.

pub mod boot_args;
pub mod devices;
pub mod image;
pub mod inherited;
mod memory;
pub mod options;
pub mod resources;
pub mod snapshot;
pub mod vm;

use std::fs::{DirBuilder, File};
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd, RawFd};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use mayfly::wire::limits::INSTANCE_ID_MAX;
use rustix::fs::{FileType, Gid, OFlags, Uid};
use rustix::io::Errno;
use rustix::process::PidfdFlags;

use self::image::Image;
use self::inherited::Passed;
use self::options::{GuestCommand, Options};
use self::resources::open_to_append;
use self::vm::{Described, FILES_MAX, Vm};
use crate::cgroup::exclusive;
use crate::error::{Advice as _, AnyError, Failure, Step as _};
use crate::monitor::{Executable, ResourceLimits};
use crate::root::Owner;
use crate::run::agent::{self, RootMode};
use crate::sys::{self, Inherited};

/// How many descriptors the monitor is given: the console, and those of the jail.
pub const FOR_MONITOR: u64 = 8;
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
    #[error(
        "cannot run a microVM: there is nothing to run; give --kernel, --config, --snapshot, or \
         --api-sock for a client that configures it"
    )]
    NothingToRun,
    #[error("cannot use --api-sock: an API socket was passed (LISTEN_FDS)")]
    TwoApiSockets,
    #[error(
        "cannot use --console: the configuration has a console_socket already; leave one of them out"
    )]
    TwoConsoleSockets,
    #[error(
        "cannot run a microVM as root: --uid or --gid is missing; give a user and group that nothing \
         else runs as; 0 if it is to be root"
    )]
    NoOwner,
    #[error(
        "cannot use {0} {1}: --uid and --gid must be your own ({2}) unless run as root; leave it \
         out, or run mayfly-jailer as root"
    )]
    NotOwnId(&'static str, u32, u32),
    #[error(
        "cannot make a network (--net auto): that takes root; use --net user with pasta or \
         slirp4netns, or pass a tap with --net fd:N"
    )]
    AutoTakesRoot,
    #[error(
        "cannot use \"{0}\" of the configuration: it is not a path, and mayfly-jailer opens it \
         itself; give a path, or leave it out and redirect what is printed"
    )]
    NotAPath(&'static str),
    #[error(
        "cannot pass {0} files and taps to the monitor: at most {FILES_MAX} go with one request; name \
         fewer drives, interfaces or queues"
    )]
    TooManyFiles(usize),
    #[error("cannot use the passed sockets (LISTEN_FDS): there are {0}, and one is the API's")]
    ListenFds(u32),
    #[error("cannot use descriptor {0}: it was not passed, or is named twice")]
    NotPassed(u32),
    #[error(
        "cannot use descriptor {0} (LISTEN_FDS): it is {1}, not a listening Unix stream socket; see \
         ListenStream= in systemd.socket(5)"
    )]
    NotAListener(RawFd, &'static str),
    #[error(
        "cannot end with descriptor {0} (--end-with-fd): only a pipe, a socket or a process \
         descriptor hangs up"
    )]
    CannotHangUp(RawFd),
    #[error("cannot use {0} as {1}: {2}")]
    Unfit(String, &'static str, String),
    #[error(
        "cannot attach to the tap {0:?}: this host has no such interface; make it (`ip tuntap add \
         NAME mode tap user USER`), or give --net auto or user"
    )]
    NoInterface(String),
    #[error(
        "cannot use the disk {0} (--image): its name is not UTF-8; give the cache another place"
    )]
    NotUtf8(PathBuf),
    #[error(
        "cannot use {0} (--upper): it is not an ext4 file system; make one with `mkfs.ext4 FILE`, of a file of the size \
         that it is to have"
    )]
    WrittenUpper(PathBuf),
    #[error("cannot use /dev/kvm: {0}")]
    BadKvm(String),
}

/// What ends the microVM besides its guest, a signal and the time limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ender {
    /// The end of the process that started this one.
    Parent,
    /// The hang-up of the descriptor of `--end-with-fd`.
    HangUp,
    /// The end of the process that descriptor is of.
    Process,
}

/// Everything that was asked for, opened.
#[derive(Debug)]
pub struct Spec {
    /// For the jail.
    pub jail: JailSpec,
    /// For the supervisor.
    pub watch: WatchSpec,
    /// The tap to be made in the jail.
    pub own_tap: Option<OwnTap>,
    /// An API socket that was passed, and a connection to it.
    pub listener: Option<(OwnedFd, OwnedFd)>,
    /// Control groups to make.
    pub cgroups: Option<exclusive::Plan>,
    /// A file for the console's output.
    pub console: Option<File>,
    /// A file for the monitor's log, in place of standard error and warnings only.
    pub log: Option<File>,
}

/// What becomes of the process in the jail.
#[derive(Debug)]
pub struct JailSpec {
    /// Name of the microVM to the monitor, and of the jail's host ([`name_inside`]).
    pub id: String,
    /// User and group of the monitor.
    pub owner: Owner,
    /// Whether this process is root, and the monitor becomes another user.
    pub as_root: bool,
    /// The monitor's executable.
    pub monitor: Executable,
    /// /dev/kvm.
    pub kvm: OwnedFd,
    /// Limits of the process.
    pub limits: ResourceLimits,
}

/// What the supervisor does with it.
#[derive(Debug)]
pub struct WatchSpec {
    /// When the jailer began, microseconds of the monotonic clock.
    pub began_us: u64,
    /// Name of the microVM.
    pub id: String,
    /// The options, but for what became the rest.
    pub options: Options,
    /// What to start; none if a client of the API does that.
    pub vm: Option<Vm>,
    /// What ends the microVM besides: descriptors that are ready then.
    pub enders: Vec<(OwnedFd, Ender)>,
    /// What the guest runs, where that is a command, and its initial RAM disk.
    pub guest: Option<(agent::Plan, OwnedFd)>,
    /// Its root disk, locked: no cache of disks removes it.
    #[expect(dead_code, reason = "it is held for its lock")]
    pub image: Option<OwnedFd>,
    /// Where to say that the command runs, or could.
    pub ready: Option<OwnedFd>,
    /// What `check` types at the guest's first byte, once it has asked for the timeline.
    pub first_reply: Option<&'static [u8]>,
}

/// Reads the configuration, and keeps of the inherited descriptors what it and the options name: all
/// others are closed before anything is opened.
pub fn prepare(
    options: &mut Options,
    inherited: Inherited,
) -> Result<(Option<Described>, Passed), AnyError> {
    let mut described = Described::of(options)?;
    let paths = [&options.log, &options.exit_report, &options.mayfly].into_iter();
    let paths = paths.flatten().map(PathBuf::as_path);
    let paths = paths.chain(options.console.file());
    let mut wanted: Vec<RawFd> = paths.filter_map(inherited::number_in).collect();
    wanted.extend(
        described
            .as_mut()
            .map(Described::inherited)
            .unwrap_or_default(),
    );
    wanted.extend(
        [options.end_with_fd, options.ready_fd]
            .into_iter()
            .flatten(),
    );
    let passed = Passed::keep(inherited, wanted)?;
    Ok((described, passed))
}

impl Spec {
    /// Opens what the options and the configuration name.
    pub fn open(
        mut options: Options,
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
        let (owner, as_root) = owner(options.uid, options.gid)?;
        let own_tap = described.as_ref().and_then(|it| it.own_tap);
        if own_tap == Some(OwnTap::Auto) && !as_root {
            return Err(SpecError::AutoTakesRoot.into());
        }
        if let Some(folder) = &options.snapshot_to {
            make_folder(folder)?;
        }
        let (guest, image) = match options.guest.take() {
            Some(mut guest) => {
                guest.command.prepare_terminal()?;
                let image = Image::open(&guest.image, guest.mode)?;
                if let Some(described) = &mut described {
                    described.set_root(&image.path)?;
                }
                (Some(open_guest(guest, &image, id)?), Some(image.lock))
            }
            None => (None, None),
        };
        let append =
            |path: Option<&Path>, option| path.map(|it| open_to_append(it, option)).transpose();
        Ok(Spec {
            own_tap,
            listener,
            cgroups: exclusive::Plan::new(id, &options.cgroups, as_root)?,
            console: append(options.console.file(), "--console")?,
            log: append(options.log.as_deref(), "--log")?,
            jail: JailSpec {
                id: name_inside(id),
                owner,
                as_root,
                monitor: open_monitor(options.mayfly.as_deref())?,
                kvm: open_kvm()?,
                limits: options.limits,
            },
            watch: WatchSpec {
                began_us,
                id: id.to_owned(),
                ready: take_ready(&options, &mut passed)?,
                enders: enders(&options, &mut passed)?,
                vm: described.map(|it| it.open(&mut passed)).transpose()?,
                options,
                guest,
                image,
                first_reply: None,
            },
        })
    }
}

/// The name of a microVM as the monitor and a host take one: shorter, and of fewer characters.
fn name_inside(id: &str) -> String {
    let fit = |c: char| if c.is_alphanumeric() { c } else { '-' };
    id.chars().take(INSTANCE_ID_MAX).map(fit).collect()
}

/// The descriptor of `--ready-fd`.
fn take_ready(options: &Options, passed: &mut Passed) -> Result<Option<OwnedFd>, AnyError> {
    let number = options.ready_fd.map(RawFd::unsigned_abs);
    number.map(|number| passed.take(number)).transpose()
}

/// Finds out what a guest with a command is to be, and makes what it boots from.
fn open_guest(
    guest: GuestCommand,
    image: &Image,
    id: &str,
) -> Result<(agent::Plan, OwnedFd), AnyError> {
    // What is laid into it needs a place to be written to first.
    let is_sealed = guest.mode == Some(RootMode::ReadOnly)
        && !(guest.copies.is_empty() && guest.memory.is_empty());
    let root_mode = match is_sealed {
        true => RootMode::Overlay,
        false => guest.mode.unwrap_or(RootMode::Overlay),
    };
    let plan = agent::Plan {
        hostname: guest.hostname.unwrap_or_else(|| name_inside(id)),
        root_type: image.root_type,
        root_mode,
        command: guest.command,
        is_held: guest.is_held,
        is_sealed,
        upper_type: guest.upper.as_deref().map(image::upper_type).transpose()?,
        memory: guest.memory,
        interface: None,
        copies: guest.copies,
        renewal: None,
    };
    let initramfs = agent::initramfs::make(guest.agent.as_deref())?;
    Ok((plan, initramfs))
}

/// Makes the folder for a snapshot, for its owner alone: guest memory holds secrets.
fn make_folder(folder: &Path) -> Result<(), Failure> {
    let mut builder = DirBuilder::new();
    let made = builder.recursive(true).mode(0o700).create(folder);
    made.step(format!(
        "make the folder {} (--snapshot-to)",
        folder.display()
    ))
}

fn enders(options: &Options, passed: &mut Passed) -> Result<Vec<(OwnedFd, Ender)>, AnyError> {
    let mut enders = Vec::new();
    if options.with_parent {
        let parent = rustix::process::getppid()
            .ok_or(Errno::SRCH)
            .and_then(|parent| rustix::process::pidfd_open(parent, PidfdFlags::empty()))
            .step("end with the parent (--with-parent)")
            .hint(
                Errno::SRCH,
                "it is outside this process namespace: use --end-with-fd with a pipe that it holds",
            )?;
        enders.push((parent, Ender::Parent));
    }
    if let Some(number) = options.end_with_fd {
        let fd = passed.take(number.unsigned_abs())?;
        let kind = rustix::fs::fstat(&fd).map(|stat| FileType::from_raw_mode(stat.st_mode));
        if is_process(&fd) {
            enders.push((fd, Ender::Process));
            return Ok(enders);
        }
        if !kind.is_ok_and(|kind| kind.is_fifo() || kind.is_socket()) {
            return Err(SpecError::CannotHangUp(number).into());
        }
        enders.push((fd, Ender::HangUp));
    }
    Ok(enders)
}

/// Whether a descriptor is one of a process.
fn is_process(fd: &OwnedFd) -> bool {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()));
    info.is_ok_and(|info| info.lines().any(|line| line.starts_with("Pid:")))
}

/// User and group of the monitor, and whether this process is root.
fn owner(uid: Option<u32>, gid: Option<u32>) -> Result<(Owner, bool), SpecError> {
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

/// Opens the monitor, or the one beside this program.
fn open_monitor(given: Option<&Path>) -> Result<Executable, AnyError> {
    const OPTION: &str = "--mayfly";
    match given {
        Some(path) => Executable::open(path, OPTION),
        None => {
            let own = std::env::current_exe().step("find the monitor beside this program");
            let own = own.advise("name it with --mayfly")?;
            Executable::open(&own.with_file_name("mayfly"), OPTION)
        }
    }
}

/// Opens /dev/kvm and makes sure that it is.
pub fn open_kvm() -> Result<OwnedFd, AnyError> {
    let remedy = |answer| match answer {
        Errno::NOENT => Some(
            "load kvm_intel, kvm_amd or kvm_pvm; in a cloud VM, choose one with nested virtualisation",
        ),
        Errno::ACCESS => {
            Some("add this user to the group kvm (`usermod -aG kvm USER`, then log in again)")
        }
        _ => None,
    };
    let kvm = sys::open("/dev/kvm", OFlags::RDWR)
        .step("open /dev/kvm")
        .hints(remedy)?;
    let why = match sys::kvm_version(kvm.as_fd()) {
        Ok(12) => return Ok(kvm),
        Ok(other) => format!("its interface has version {other}, not 12"),
        Err(_) => "it is not KVM".into(),
    };
    Err(SpecError::BadKvm(why).into())
}
