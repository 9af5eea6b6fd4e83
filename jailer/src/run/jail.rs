//! The empty jail: from a fresh copy of the supervisor, alone in new namespaces, to the monitor.
//!
//! A straight sequence; each line is one step with its error, and stands where it does for a reason.
//! Nothing here is named on the host or outlives this process: the namespaces, the taps in them and
//! the root file system go with their last process. The monitor finds these descriptors and no
//! others: 0 to 2 the console and the log, [`API`], [`KVM`], [`LOG`], [`END`].

use std::convert::Infallible;
use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Gid, MemfdFlags, Mode, SealFlags, Uid};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::{Resource, Rlimit, Signal};
use rustix::thread::{CapabilitiesSecureBits, CapabilitySet, CapabilitySets, UnshareFlags};

use super::channel::Channel;
use super::network::{self, Block};
use super::refusal::{self, Obstacle};
use crate::failure::{Doing, Failure};
use crate::filter;
use crate::root::{Owner, pivot_into};
use crate::sys::{self, Aside};

/// What the jail has of its own.
pub const NAMESPACES: UnshareFlags = UnshareFlags::NEWUSER
    .union(UnshareFlags::NEWNS)
    .union(UnshareFlags::NEWPID)
    .union(UnshareFlags::NEWNET)
    .union(UnshareFlags::NEWIPC)
    .union(UnshareFlags::NEWUTS)
    .union(UnshareFlags::NEWCGROUP);

/// The listening API socket, as the monitor sees it.
const API: u32 = 3;
/// /dev/kvm, as the monitor sees it.
const KVM: u32 = 4;
/// The log, as the monitor sees it.
const LOG: u32 = 5;
/// Where it says how the guest ended, as the monitor sees it.
const END: u32 = 6;

/// How many descriptors the monitor is handed: 0 to [`END`].
const HANDED: u64 = END as u64 + 1;
/// Fewest descriptors that a jail is made with: those handed over are put aside first, and with them
/// the monitor's executable, the supervisor's process and the way to report.
pub const LEAST_OPEN_FILES: u64 = sys::ASIDE as u64 + HANDED + 3;
/// Limit of open descriptors when none is given.
const OPEN_FILES: u64 = 2048;

/// From the supervisor: the user namespace has its users.
pub const MAPPED: u8 = b'm';
/// From the supervisor: the other end of the jail's network is there.
pub const CONNECTED: u8 = b'n';
/// From the jail: it is ready; a connection to the API comes along, and a tap if it has its own.
pub const READY: u8 = b'r';
/// From the jail: a failure's sentence.
pub const FAILED: u8 = b'f';

/// Everything the sequence needs, opened and checked beforehand.
#[derive(Debug)]
pub struct Plan {
    /// Name of the microVM; inside, also of the host.
    pub id: String,
    /// Whom the monitor runs as.
    pub owner: Owner,
    /// Whether this is root becoming somebody else, or an ordinary user.
    pub as_root: bool,
    /// The monitor's executable.
    pub monitor: File,
    /// What it is called, in sentences.
    pub monitor_name: String,
    /// Guest console: what it reads and what it writes to.
    pub console: (OwnedFd, OwnedFd),
    /// Where the log goes.
    pub log: OwnedFd,
    /// Where a word about the guest's end goes.
    pub end: OwnedFd,
    /// /dev/kvm.
    pub kvm: OwnedFd,
    /// A listening API socket, if it has a name outside; else one without a name is made.
    pub api: Option<OwnedFd>,
    /// Files of version 1 control groups, to go into them by.
    pub doors: Vec<OwnedFd>,
    /// The tap to be made inside.
    pub tap: Option<Tap>,
    /// Largest file in bytes.
    pub file_size: Option<u64>,
    /// Most descriptors.
    pub open_files: Option<u64>,
    /// More of the monitor's arguments.
    pub more: Vec<String>,
    /// A descriptor of the supervisor's process.
    pub parent: OwnedFd,
    /// What of the host's may be behind a refusal inside the namespaces.
    pub obstacle: Option<Obstacle>,
}

/// A tap in the jail's own network namespace.
#[derive(Debug)]
pub enum Tap {
    /// Routed to the host over a cable whose other end the supervisor makes.
    Auto(Block),
    /// Routed to whatever the user connects.
    User,
}

/// Becomes the monitor. Returns only why that did not happen.
pub fn enter(plan: &Plan, supervisor: &Channel) -> Failure {
    match try_enter(plan, supervisor) {
        Ok(never) => match never {},
        Err(failure) => failure,
    }
}

fn try_enter(plan: &Plan, supervisor: &Channel) -> Result<Infallible, Failure> {
    wait_for(supervisor, MAPPED)?;
    // What is used from here on counts.
    for door in &plan.doors {
        rustix::io::write(door, b"0").doing_or("enter a control group", |error| {
            match Errno::from_io_error(error) {
                Some(Errno::NOSPC) => "its cpuset has no processor or no memory node",
                Some(Errno::ACCESS) => "that group is not this user's: see --parent-cgroup",
                _ => "",
            }
        })?;
    }
    // What is refused from here on may be for the namespaces' sake.
    let explain = |failure| refusal::explain(failure, plan.obstacle);
    // Before what may be refused for reasons of its own.
    rustix::system::sethostname(plan.id.as_bytes())
        .doing("name the jail's host")
        .map_err(explain)?;
    // While the host's devices are in reach, and this user may still be root.
    let tap = plan.tap.as_ref().map(|_| network::make_tap()).transpose()?;
    // Groups while we may; then nobody can be found in here who is not the jail's user. The
    // capabilities in the new user namespace stay: its root has no number in it.
    if plan.as_root {
        rustix::thread::set_thread_groups(&[])
            .doing("leave supplementary groups")
            .map_err(explain)?;
    }
    become_owner(plan.owner).map_err(explain)?;
    // Best effort: a user may have no room for another set of keys, and the monitor's filters
    // do not let it ask for any.
    let _ = sys::leave_session_keys();
    match &plan.tap {
        Some(Tap::Auto(block)) => {
            // The other end is made meanwhile.
            network::prepare_inside().map_err(explain)?;
            wait_for(supervisor, CONNECTED)?;
            network::connect_inside(block).map_err(explain)?;
        }
        Some(Tap::User) => network::open_inside().map_err(explain)?,
        None => {}
    }
    let (listener, client) = match &plan.api {
        Some(listener) => (Some(listener.as_fd()), None),
        None => (None, Some(unnamed_socket().doing("make the API socket")?)),
    };
    let files: Vec<BorrowedFd<'_>> = client
        .iter()
        .map(|(_, client)| client.as_fd())
        .chain(tap.iter().map(AsFd::as_fd))
        .collect();
    supervisor.send(READY, "", &files).doing("report")?;
    let listener = listener.or(client.as_ref().map(|(listener, _)| listener.as_fd()));
    let listener = listener.ok_or_else(|| Failure::new("make the API socket", "there is none"))?;

    // The network's files were the last that were needed of the host's.
    empty_root().map_err(explain)?;
    limit_resources(plan)?;
    drop_capabilities().doing("drop capabilities")?;
    rustix::thread::set_no_new_privs(true).doing("set no_new_privs")?;
    rustix::process::umask(Mode::from_raw_mode(0o077));
    // A session of its own: signals from a terminal are for the supervisor, which passes them on.
    rustix::process::setsid().doing("open a session")?;

    let argv = argv(plan)?;
    sys::place(
        &[
            plan.console.0.as_fd(),
            plan.console.1.as_fd(),
            plan.log.as_fd(),
            listener,
            plan.kvm.as_fd(),
            plan.log.as_fd(),
            plan.end.as_fd(),
        ],
        [
            plan.monitor.as_fd(),
            plan.parent.as_fd(),
            supervisor.as_fd(),
        ],
        &argv,
        &plan.monitor_name,
        become_monitor,
    )
    .doing("hand over descriptors")
}

/// The last steps, with the monitor's executable, a descriptor of the supervisor, and the channel to
/// it. Returns only when the monitor does not run, which has then been said.
fn become_monitor(
    placed: Result<(), Errno>,
    [monitor, parent, report]: Aside,
    argv: &[CString],
    name: &str,
) {
    let result = placed
        .doing("hand over descriptors")
        .and_then(|()| die_with(parent.as_fd()))
        // After what it denies.
        .and_then(|()| {
            let what = "install the jail's filters";
            filter::install()
                .map_err(std::io::Error::other)
                .doing_or(what, |_| "use a kernel with CONFIG_SECCOMP_FILTER")
        })
        .and_then(|()| sys::reset_signals().doing("reset signals"));
    let failure = match result {
        Err(failure) => failure,
        Ok(()) => execute(name, &File::from(monitor), argv),
    };
    let _ = Channel::from(report).send(FAILED, &failure.to_string(), &[]);
}

fn wait_for(supervisor: &Channel, kind: u8) -> Result<(), Failure> {
    match supervisor.receive().doing("hear from the supervisor")? {
        Some(message) if message.kind == kind => Ok(()),
        // It has failed, or is gone: there is nobody left to tell.
        _ => sys::exit_now(1),
    }
}

fn become_owner(owner: Owner) -> Result<(), Failure> {
    rustix::thread::set_thread_res_gid(owner.gid, owner.gid, owner.gid)
        .doing(format_args!("become group {}", owner.gid.as_raw()))?;
    rustix::thread::set_thread_res_uid(owner.uid, owner.uid, owner.uid)
        .doing(format_args!("become user {}", owner.uid.as_raw()))
}

/// A listening socket that has a name only in this network namespace, where nobody else is, and a
/// connection to it.
fn unnamed_socket() -> Result<(OwnedFd, OwnedFd), Errno> {
    let socket = || {
        rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )
    };
    let (listener, client) = (socket()?, socket()?);
    let name = SocketAddrUnix::new_abstract_name(b"mayfly")?;
    rustix::net::bind(&listener, &name)?;
    rustix::net::listen(&listener, 128)?;
    rustix::net::connect(&client, &name)?;
    Ok((listener, client))
}

/// Makes an empty file system the root of everything, and lets go of the host's.
fn empty_root() -> Result<(), Failure> {
    let what = "make the empty root";
    let context = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).doing(what)?;
    rustix::mount::fsconfig_set_string(&context, "mode", "0555")
        .and_then(|()| rustix::mount::fsconfig_set_string(&context, "nr_inodes", "1"))
        .and_then(|()| rustix::mount::fsconfig_set_flag(&context, "ro"))
        .and_then(|()| rustix::mount::fsconfig_create(&context))
        .doing(what)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOEXEC
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV;
    let root =
        rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes).doing(what)?;
    rustix::process::chdir("/")
        .and_then(|()| pivot_into(&root))
        .doing_or("enter the empty root", |error| match Errno::from_io_error(error) {
            Some(Errno::INVAL) => {
                "the host's root must be a mounted file system, not a bare chroot or initial ramfs"
            }
            _ => "",
        })
}

/// No limit can be raised in here: what is left of soft and hard limits is one number each.
fn limit_resources(plan: &Plan) -> Result<(), Failure> {
    let set = |resource, value, name: &str| {
        sys::set_limit(resource, value).doing_or(
            format_args!("set --resource-limit {name}={value}"),
            |error| match error.kind() {
                std::io::ErrorKind::PermissionDenied => "it is above what this host or user allows",
                _ => "",
            },
        )
    };
    if let Some(bytes) = plan.file_size {
        set(Resource::Fsize, bytes, "fsize")?;
    }
    let files = match plan.open_files {
        Some(files) => files,
        // As many as this user may have, if that is less.
        None => {
            let most = rustix::process::getrlimit(Resource::Nofile).maximum;
            most.map_or(OPEN_FILES, |most| most.min(OPEN_FILES))
        }
    };
    set(Resource::Nofile, files, "no-file")?;
    // Guest memory does not belong into a file.
    set(Resource::Core, 0, "core")?;
    for resource in [
        Resource::As,
        Resource::Cpu,
        Resource::Data,
        Resource::Fsize,
        Resource::Locks,
        Resource::Memlock,
        Resource::Msgqueue,
        Resource::Nice,
        Resource::Nproc,
        Resource::Rss,
        Resource::Rtprio,
        Resource::Rttime,
        Resource::Sigpending,
        Resource::Stack,
    ] {
        let now = rustix::process::getrlimit(resource).current;
        let fixed = Rlimit {
            current: now,
            maximum: now,
        };
        rustix::process::setrlimit(resource, fixed).doing("fix resource limits")?;
    }
    Ok(())
}

/// Gives up every capability in the jail's user namespace, for good. (In the host's there is none
/// since this process was made.)
fn drop_capabilities() -> Result<(), Errno> {
    rustix::thread::clear_ambient_capability_set()?;
    sys::bound_capabilities(CapabilitySet::empty())?;
    rustix::thread::set_capabilities_secure_bits(
        CapabilitiesSecureBits::NO_ROOT
            | CapabilitiesSecureBits::NO_ROOT_LOCKED
            | CapabilitiesSecureBits::NO_SETUID_FIXUP
            | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED
            | CapabilitiesSecureBits::KEEP_CAPS_LOCKED
            | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE
            | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED,
    )?;
    let none = CapabilitySet::empty();
    rustix::thread::set_capabilities(
        None,
        CapabilitySets {
            effective: none,
            permitted: none,
            inheritable: none,
        },
    )
}

/// Ends this process when the supervisor ends. It comes after the change of credentials, which
/// takes it back; and the supervisor may have ended before it.
fn die_with(parent: BorrowedFd<'_>) -> Result<(), Failure> {
    let what = "tie the monitor to the supervisor";
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).doing(what)?;
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let ended = poll(
        &mut [PollFd::from_borrowed_fd(parent, PollFlags::IN)],
        Some(&now),
    );
    match ended.doing(what)? {
        0 => Ok(()),
        _ => sys::exit_now(1),
    }
}

fn argv(plan: &Plan) -> Result<Vec<CString>, Failure> {
    let mut words = vec!["mayfly".to_owned(), "--id".into(), plan.id.clone()];
    for (name, number) in [
        ("--api-fd", API),
        ("--kvm-fd", KVM),
        ("--log-fd", LOG),
        ("--end-fd", END),
    ] {
        words.extend([name.to_owned(), number.to_string()]);
    }
    words.push("--landlock".to_owned());
    words.extend(plan.more.iter().cloned());
    words
        .into_iter()
        .map(|word| {
            CString::new(word).map_err(|_| {
                Failure::new("pass an argument to the monitor", "it contains a zero byte")
            })
        })
        .collect()
}

fn execute(name: &str, monitor: &File, argv: &[CString]) -> Failure {
    let mut error = sys::exec(monitor.as_fd(), c"", argv);
    // Not for this user to execute, or where it lies nothing may be executed: a copy in memory
    // then, which costs its size for every microVM.
    if error == Errno::ACCESS
        && let Ok(copy) = copy_to_memory(monitor)
    {
        error = sys::exec(copy.as_fd(), c"", argv);
    }
    let failure = Failure::new(format_args!("execute {name} in the jail"), error);
    match error {
        Errno::NOENT => failure.remedy(
            "it needs an interpreter or shared libraries, which a jail does not have: give a \
             static executable (--mayfly)",
        ),
        Errno::NOEXEC => failure.remedy("give an executable for this machine (--mayfly)"),
        _ => failure,
    }
}

fn copy_to_memory(mut monitor: &File) -> Result<File, std::io::Error> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let copy = File::from(rustix::fs::memfd_create("mayfly", flags)?);
    std::io::Seek::rewind(&mut monitor)?;
    std::io::copy(&mut monitor, &mut &copy)?;
    rustix::fs::fchmod(&copy, Mode::from_raw_mode(0o555))?;
    let all = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&copy, all)?;
    Ok(copy)
}

/// Gives the jail's user namespace its one user and one group, with the same numbers as outside.
pub fn map_owner(pid: rustix::process::Pid, owner: Owner, as_root: bool) -> Result<(), Failure> {
    let folder = format!("/proc/{}", pid.as_raw_nonzero());
    let write = |name: &str, text: &str| {
        let path = format!("{folder}/{name}");
        File::options()
            .write(true)
            .open(&path)
            .and_then(|file| rustix::io::write(&file, text.as_bytes()).map_err(Into::into))
            .map(drop)
            .doing(format_args!("give the jail its user and group ({path})"))
    };
    let one = |id: u32| format!("{id} {id} 1\n");
    // An ordinary user has to promise first that groups stay as they are.
    if !as_root {
        write("setgroups", "deny")?;
    }
    write("gid_map", &one(Gid::as_raw(owner.gid)))?;
    write("uid_map", &one(Uid::as_raw(owner.uid)))
}
