//! The empty jail: from a fresh copy of the supervisor, alone in new namespaces, to the monitor.
//!
//! A straight sequence; each line is one step with its error, and stands where it does for a reason.
//! Nothing here is named on the host or outlives this process: the namespaces, the taps in them and
//! the root file system go with their last process. The monitor finds these descriptors and no
//! others: 0 to 2 the console and the log, [`API`], [`KVM`], [`LOG`], [`END`].

pub mod obstacle;

use std::borrow::Cow;
use std::convert::Infallible;
use std::ffi::{CString, NulError};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Gid, MemfdFlags, Mode, SealFlags, Uid};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::{Resource, Rlimit, Signal};
use rustix::thread::{CapabilitiesSecureBits, CapabilitySet, CapabilitySets, UnshareFlags};

use self::obstacle::Obstacle;
use super::channel::Channel;
use super::network::{self, Network, NetworkError};
use super::spec::FOR_MONITOR;
use crate::cgroup::cannot_enter;
use crate::error::{Remedy, errno, message};
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

const _: () = assert!(END as u64 + 1 == FOR_MONITOR);
/// Limit of open descriptors when none is given.
const OPEN_FILES: u64 = 2048;

/// From the supervisor: the user namespace has its users.
pub const MAPPED: u8 = b'm';
/// From the supervisor: the other end of the jail's network is there.
pub const CONNECTED: u8 = b'n';
/// From the jail: it is ready; a connection to the API comes along, and a tap if it has its own.
pub const READY: u8 = b'r';
/// From the jail: the message of an error.
pub const FAILED: u8 = b'f';

/// The jail cannot be made or entered.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    #[error("cannot {0}")]
    Step(&'static str, #[source] Errno),
    #[error("cannot give the jail its user and group ({0})")]
    Map(PathBuf, #[source] Errno),
    #[error(transparent)]
    Network(#[from] NetworkError),
    #[error("cannot enter the empty root")]
    EnterRoot(#[source] Errno),
    #[error("cannot enter a control group")]
    EnterGroup(#[source] Errno),
    #[error("cannot set --resource-limit {0}={1}")]
    Limit(&'static str, u64, #[source] Errno),
    #[error("cannot install the jail's filters")]
    Filter(#[source] seccompiler::Error),
    #[error("cannot pass an argument to the monitor")]
    Argument(#[source] NulError),
    #[error("cannot execute {0} in the jail")]
    Execute(PathBuf, #[source] Errno),
}

/// For `map_err`: the step that failed.
pub fn step(what: &'static str) -> impl FnOnce(Errno) -> JailError {
    move |error| JailError::Step(what, error)
}

impl Remedy for JailError {
    fn remedy(&self) -> Option<Cow<'static, str>> {
        Some(Cow::Borrowed(match self {
            JailError::EnterGroup(error) => cannot_enter(*error)?,
            JailError::Network(error) => return error.remedy(),
            JailError::EnterRoot(Errno::INVAL) => {
                "the host's root must be a mounted file system, not a bare chroot or initial ramfs"
            }
            JailError::Limit(_, _, Errno::PERM) => "it is above what this host or user allows",
            JailError::Filter(_) => "use a kernel with CONFIG_SECCOMP_FILTER",
            JailError::Execute(_, Errno::NOENT) => {
                "it needs an interpreter or shared libraries, which a jail does not have: give a \
                 static executable (--mayfly)"
            }
            JailError::Execute(_, Errno::NOEXEC) => {
                "give an executable for this machine (--mayfly)"
            }
            _ => return None,
        }))
    }
}

impl JailError {
    /// The message, with what may be behind a denial in new namespaces: AppArmor lets them be made
    /// and then denies everything in them. It was found outside: inside there is nothing to look at.
    pub fn explained(&self, obstacle: Option<Obstacle>) -> String {
        let error = match self {
            JailError::Step(_, error) | JailError::Map(_, error) | JailError::EnterRoot(error) => {
                Some(*error)
            }
            JailError::Network(error) => error.errno(),
            _ => None,
        };
        let text = message(self);
        match obstacle {
            Some(found) if matches!(error, Some(Errno::PERM | Errno::ACCESS)) => {
                format!("{text}; {}: {}", found.reason(), found.remedy())
            }
            _ => text,
        }
    }
}

/// Everything the sequence needs, opened and checked beforehand.
#[derive(Debug)]
pub struct Plan {
    /// Name of the microVM; inside, also of the host.
    pub id: String,
    /// User and group of the monitor.
    pub owner: Owner,
    /// Whether this is root, which becomes another user, or an ordinary user.
    pub as_root: bool,
    /// The monitor's executable.
    pub monitor: File,
    /// Its path, for messages.
    pub monitor_path: PathBuf,
    /// Guest console: what it reads and what it writes to.
    pub console: (OwnedFd, OwnedFd),
    /// Where the log goes.
    pub log: OwnedFd,
    /// Where the monitor reports how the guest ended.
    pub end: OwnedFd,
    /// /dev/kvm.
    pub kvm: OwnedFd,
    /// A listening API socket, if it has a name outside; else one without a name is made.
    pub api: Option<OwnedFd>,
    /// Files of version 1 control groups, to go into them by.
    pub entrances: Vec<OwnedFd>,
    /// The network to be made inside.
    pub network: Option<Network>,
    /// Largest file in bytes.
    pub file_size: Option<u64>,
    /// Most descriptors.
    pub open_files: Option<u64>,
    /// More of the monitor's arguments.
    pub more: Vec<String>,
    /// A descriptor of the supervisor's process.
    pub parent: OwnedFd,
    /// What on this host may be behind a denial inside the namespaces.
    pub obstacle: Option<Obstacle>,
}

/// Becomes the monitor. Returns only why that did not happen.
pub fn enter(plan: &Plan, supervisor: &Channel) -> JailError {
    match try_enter(plan, supervisor) {
        Ok(never) => match never {},
        Err(error) => error,
    }
}

fn try_enter(plan: &Plan, supervisor: &Channel) -> Result<Infallible, JailError> {
    wait_for(supervisor, MAPPED)?;
    // What is used from here on counts.
    for entrance in &plan.entrances {
        rustix::io::write(entrance, b"0").map_err(JailError::EnterGroup)?;
    }
    // Before what may be refused for reasons of its own.
    rustix::system::sethostname(plan.id.as_bytes()).map_err(step("name the jail's host"))?;
    // While the host's devices are in reach, and this user may still be root.
    let tap = plan.network.map(|_| network::make_tap()).transpose()?;
    // Groups while we may; then no process in here is anything but the jail's user. The capabilities
    // in the new user namespace stay: its root has no number in it.
    if plan.as_root {
        rustix::thread::set_thread_groups(&[]).map_err(step("leave supplementary groups"))?;
    }
    become_owner(plan.owner)?;
    // Best effort: a user may have no room for another set of keys, and the monitor's filters
    // do not let it ask for any.
    let _ = sys::leave_session_keys();
    match &plan.network {
        Some(Network::Auto(block)) => {
            // The other end is made meanwhile.
            network::prepare_inside()?;
            wait_for(supervisor, CONNECTED)?;
            network::connect_inside(block)?;
        }
        Some(Network::User) => network::open_inside()?,
        None => {}
    }
    let unnamed = match plan.api {
        Some(_) => None,
        None => Some(unnamed_socket().map_err(step("make the API socket"))?),
    };
    let client = unnamed.as_ref().map(|(_, client)| client.as_fd());
    let files: Vec<BorrowedFd<'_>> = client
        .into_iter()
        .chain(tap.as_ref().map(AsFd::as_fd))
        .collect();
    supervisor.send(READY, "", &files).map_err(step("report"))?;
    let listener = unnamed
        .as_ref()
        .map(|(listener, _)| listener)
        .or(plan.api.as_ref());
    let listener = listener.ok_or(JailError::Step("find the API socket", Errno::BADF))?;

    // The network's files were the last that were needed of the host's.
    empty_root()?;
    limit_resources(plan)?;
    drop_capabilities().map_err(step("drop capabilities"))?;
    rustix::thread::set_no_new_privs(true).map_err(step("set no_new_privs"))?;
    rustix::process::umask(Mode::from_raw_mode(0o077));
    // A session of its own: signals from a terminal are for the supervisor, which passes them on.
    rustix::process::setsid().map_err(step("open a session"))?;

    let argv = argv(plan)?;
    let name = plan.monitor_path.to_string_lossy();
    sys::place(
        &[
            plan.console.0.as_fd(),
            plan.console.1.as_fd(),
            plan.log.as_fd(),
            listener.as_fd(),
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
        &name,
        become_monitor,
    )
    .map_err(step("pass descriptors"))
}

/// The last steps, with the monitor's executable, a descriptor of the supervisor, and the channel to
/// it. Returns only when the monitor does not run, which has then been reported.
fn become_monitor(
    placed: Result<(), Errno>,
    [monitor, parent, report]: Aside,
    argv: &[CString],
    name: &str,
) {
    let result = placed
        .map_err(step("pass descriptors"))
        .and_then(|()| die_with(parent.as_fd()))
        // After what they deny.
        .and_then(|()| filter::install().map_err(JailError::Filter))
        .and_then(|()| sys::reset_signals().map_err(step("reset signals")));
    let error = match result {
        Err(error) => error,
        Ok(()) => JailError::Execute(name.into(), execute(&File::from(monitor), argv)),
    };
    let _ = Channel::from(report).send(FAILED, &message(&error), &[]);
}

fn wait_for(supervisor: &Channel, kind: u8) -> Result<(), JailError> {
    match supervisor
        .receive()
        .map_err(step("hear from the supervisor"))?
    {
        Some(message) if message.kind == kind => Ok(()),
        // It has failed, or is gone: there is no process left to tell.
        _ => sys::exit_now(1),
    }
}

fn become_owner(Owner { uid, gid }: Owner) -> Result<(), JailError> {
    rustix::thread::set_thread_res_gid(gid, gid, gid).map_err(step("become the group of --gid"))?;
    rustix::thread::set_thread_res_uid(uid, uid, uid).map_err(step("become the user of --uid"))
}

/// A listening socket that has a name only in this network namespace, where nothing else is, and a
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
fn empty_root() -> Result<(), JailError> {
    let what = "make the empty root";
    let context =
        rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).map_err(step(what))?;
    rustix::mount::fsconfig_set_string(&context, "mode", "0555")
        .and_then(|()| rustix::mount::fsconfig_set_string(&context, "nr_inodes", "1"))
        .and_then(|()| rustix::mount::fsconfig_set_flag(&context, "ro"))
        .and_then(|()| rustix::mount::fsconfig_create(&context))
        .map_err(step(what))?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOEXEC
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV;
    let root = rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
        .map_err(step(what))?;
    rustix::process::chdir("/")
        .and_then(|()| pivot_into(&root))
        .map_err(JailError::EnterRoot)
}

/// No limit can be raised in here: what is left of soft and hard limits is one number each.
fn limit_resources(plan: &Plan) -> Result<(), JailError> {
    let set = |resource, value, name| {
        sys::set_limit(resource, value).map_err(|error| JailError::Limit(name, value, error))
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
        rustix::process::setrlimit(resource, fixed).map_err(step("fix resource limits"))?;
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
fn die_with(parent: BorrowedFd<'_>) -> Result<(), JailError> {
    let what = "tie the monitor to the supervisor";
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).map_err(step(what))?;
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let ended = poll(
        &mut [PollFd::from_borrowed_fd(parent, PollFlags::IN)],
        Some(&now),
    );
    match ended.map_err(step(what))? {
        0 => Ok(()),
        _ => sys::exit_now(1),
    }
}

fn argv(plan: &Plan) -> Result<Vec<CString>, JailError> {
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
    let words = words.into_iter().map(CString::new);
    words.collect::<Result<_, _>>().map_err(JailError::Argument)
}

fn execute(monitor: &File, argv: &[CString]) -> Errno {
    let error = sys::exec(monitor.as_fd(), c"", argv);
    // Not for this user to execute, or where it lies nothing may be executed: a copy in memory
    // then, which costs its size for every microVM.
    if error == Errno::ACCESS
        && let Ok(copy) = copy_to_memory(monitor)
    {
        return sys::exec(copy.as_fd(), c"", argv);
    }
    error
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
pub fn map_owner(pid: rustix::process::Pid, owner: Owner, as_root: bool) -> Result<(), JailError> {
    let folder = Path::new("/proc").join(pid.as_raw_nonzero().to_string());
    let write = |name: &str, text: &str| {
        let path = folder.join(name);
        let file = File::options().write(true).open(&path).map_err(errno);
        file.and_then(|file| rustix::io::write(&file, text.as_bytes()))
            .map(drop)
            .map_err(|error| JailError::Map(path, error))
    };
    let one = |id: u32| format!("{id} {id} 1\n");
    // An ordinary user has to promise first that groups stay as they are.
    if !as_root {
        write("setgroups", "deny")?;
    }
    write("gid_map", &one(Gid::as_raw(owner.gid)))?;
    write("uid_map", &one(Uid::as_raw(owner.uid)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn denial_is_explained_by_what_was_found_and_nothing_else_is() {
        let denied = JailError::Step("name the jail's host", Errno::PERM);
        assert_eq!(denied.explained(None), message(&denied));
        let text = denied.explained(Some(Obstacle::AppArmor));
        assert!(text.contains("AppArmor"), "{text}");
        for other in [
            JailError::Step("name the jail's host", Errno::INVAL),
            JailError::Limit("no-file", 9, Errno::PERM),
        ] {
            assert_eq!(other.explained(Some(Obstacle::AppArmor)), message(&other));
        }
    }
}
