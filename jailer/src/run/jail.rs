//! The empty jail: from a fresh copy of the supervisor, alone in new namespaces, to the monitor.
//!
//! A straight sequence; each line is one step with its error, and stands where it does for a reason.
//! Nothing here is named on the host or outlives this process: the namespaces, the taps in them and
//! the root file system go with their last process. The monitor finds these descriptors and no
//! others: 0 to 2 the console and the log, [`API`], [`KVM`], [`LOG`], [`END`].

pub mod obstacle;

use std::convert::Infallible;
use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Gid, MemfdFlags, Mode, SealFlags, Uid};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::{Pid, Resource, Rlimit, Signal};
use rustix::thread::{CapabilitiesSecureBits, CapabilitySet, CapabilitySets, UnshareFlags};

use self::obstacle::Obstacle;
use super::channel::Channel;
use super::network::{self, Network};
use super::spec::{FOR_MONITOR, JailSpec};
use crate::cgroup::cannot_enter;
use crate::error::{Advice as _, Failure, Step as _, message};
use crate::filter;
use crate::monitor::{OPEN_FILES, cannot_execute};
use crate::root::{NO_PIVOT, Owner, pivot_into};
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
/// The listening socket for clients of the console, if there is one, as the monitor sees it.
const CONSOLE_SOCKET: u32 = 7;

const _: () = assert!(CONSOLE_SOCKET as u64 + 1 == FOR_MONITOR);

/// From the supervisor: the user namespace has its users.
pub const MAPPED: u8 = b'm';
/// From the supervisor: the other end of the jail's network is there.
pub const CONNECTED: u8 = b'n';
/// From the jail: it is ready; a connection to the API comes along, and a tap if it has its own.
pub const READY: u8 = b'r';
/// From the jail: the message of an error.
pub const FAILED: u8 = b'f';

/// The message of a failure, with what may be behind a denial in new namespaces: AppArmor lets them be
/// made and then denies everything in them. It was found outside: inside there is nothing to look at.
pub fn explained(failure: &Failure, obstacle: Option<Obstacle>) -> String {
    let text = message(failure);
    match obstacle.filter(|_| !failure.has_remedy()) {
        Some(found) if matches!(failure.errno(), Some(Errno::PERM | Errno::ACCESS)) => {
            format!("{text}; {}: {}", found.reason, found.remedy)
        }
        _ => text,
    }
}

/// Everything the sequence needs, opened and checked beforehand.
#[derive(Debug)]
pub struct Plan {
    /// What was asked for.
    pub spec: JailSpec,
    /// Guest console: what it reads and what it writes to.
    pub console: (OwnedFd, OwnedFd),
    /// Where the log goes.
    pub log: OwnedFd,
    /// Where the monitor reports how the guest ended.
    pub end: OwnedFd,
    /// A listening API socket, if it has a name outside; else one without a name is made.
    pub api: Option<OwnedFd>,
    /// A listening socket for clients of the console, if a client of the API starts the guest.
    pub console_socket: Option<OwnedFd>,
    /// Files of version 1 control groups, to go into them by.
    pub entrances: Vec<OwnedFd>,
    /// The network to be made inside.
    pub network: Option<Network>,
    /// More of the monitor's arguments.
    pub more: Vec<String>,
    /// A descriptor of the supervisor's process.
    pub parent: OwnedFd,
    /// What on this host may be behind a denial inside the namespaces.
    pub obstacle: Option<Obstacle>,
}

/// Becomes the monitor. Returns only why that did not happen.
pub fn enter(plan: &Plan, supervisor: &Channel) -> Result<Infallible, Failure> {
    let spec = &plan.spec;
    wait_for(supervisor, MAPPED)?;
    // What is used from here on counts.
    for entrance in &plan.entrances {
        rustix::io::write(entrance, b"0")
            .step("enter a control group")
            .hints(cannot_enter)?;
    }
    // Before what may be refused for reasons of its own.
    rustix::system::sethostname(spec.id.as_bytes()).step("name the jail's host")?;
    // While the host's devices are in reach, and this user may still be root.
    let tap = plan.network.map(|_| network::make_tap()).transpose()?;
    // Groups while we may; then no process in here is anything but the jail's user. The capabilities
    // in the new user namespace stay: its root has no number in it.
    if spec.as_root {
        rustix::thread::set_thread_groups(&[]).step("leave supplementary groups")?;
    }
    become_owner(spec.owner)?;
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
        None => Some(unnamed_socket().step("make the API socket")?),
    };
    let client = unnamed.as_ref().map(|(_, client)| client.as_fd());
    let files: Vec<BorrowedFd<'_>> = client
        .into_iter()
        .chain(tap.as_ref().map(AsFd::as_fd))
        .collect();
    supervisor.send(READY, "", &files).step("report")?;
    let listener = unnamed
        .as_ref()
        .map(|(listener, _)| listener)
        .or(plan.api.as_ref());
    let listener = listener.ok_or(Errno::BADF).step("find the API socket")?;

    // The network's files were the last that were needed of the host's.
    empty_root()?;
    limit_resources(spec)?;
    drop_capabilities().step("drop capabilities")?;
    rustix::thread::set_no_new_privs(true).step("set no_new_privs")?;
    rustix::process::umask(Mode::from_raw_mode(0o077));
    // A session of its own: signals from a terminal are for the supervisor, which passes them on.
    rustix::process::setsid().step("open a session")?;

    let argv = argv(plan)?;
    let name = spec.monitor.path().to_string_lossy();
    let mut placed = vec![
        plan.console.0.as_fd(),
        plan.console.1.as_fd(),
        plan.log.as_fd(),
        listener.as_fd(),
        spec.kvm.as_fd(),
        plan.log.as_fd(),
        plan.end.as_fd(),
    ];
    placed.extend(plan.console_socket.as_ref().map(AsFd::as_fd));
    sys::place(
        &placed,
        [
            spec.monitor.file().as_fd(),
            plan.parent.as_fd(),
            supervisor.as_fd(),
        ],
        &argv,
        &name,
        become_monitor,
    )
    .step(PASS)
}

const PASS: &str = "pass descriptors";

/// The last steps, with the monitor's executable, a descriptor of the supervisor, and the channel to
/// it. Returns only when the monitor does not run, which has then been reported.
fn become_monitor(
    placed: Result<(), Errno>,
    [monitor, parent, report]: Aside,
    argv: &[CString],
    name: &str,
) {
    let answer = placed
        .step(PASS)
        .and_then(|()| die_with(parent.as_fd()))
        // After what they deny.
        .and_then(|()| {
            let installed = filter::install().step("install the jail's filters");
            installed.advise("use a kernel with CONFIG_SECCOMP_FILTER")
        })
        .and_then(|()| sys::reset_signals().step("reset signals"));
    let failure = match answer {
        Err(failure) => failure,
        Ok(()) => cannot_execute(name, "--mayfly", execute(&File::from(monitor), argv)),
    };
    let _ = Channel::from(report).send(FAILED, &message(&failure), &[]);
}

fn wait_for(supervisor: &Channel, kind: u8) -> Result<(), Failure> {
    match supervisor.receive().step("hear from the supervisor")? {
        Some(message) if message.kind == kind => Ok(()),
        // It has failed, or is gone: there is no process left to tell.
        _ => sys::exit_now(1),
    }
}

fn become_owner(Owner { uid, gid }: Owner) -> Result<(), Failure> {
    rustix::thread::set_thread_res_gid(gid, gid, gid).step("become the group of --gid")?;
    rustix::thread::set_thread_res_uid(uid, uid, uid).step("become the user of --uid")
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
fn empty_root() -> Result<(), Failure> {
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOEXEC
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV;
    let make = || {
        let context = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        rustix::mount::fsconfig_set_string(&context, "mode", "0555")?;
        rustix::mount::fsconfig_set_string(&context, "nr_inodes", "1")?;
        rustix::mount::fsconfig_set_flag(&context, "ro")?;
        rustix::mount::fsconfig_create(&context)?;
        rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
    };
    let root = make().step("make the empty root")?;
    rustix::process::chdir("/")
        .and_then(|()| pivot_into(&root))
        .step("enter the empty root")
        .hint(Errno::INVAL, NO_PIVOT)
}

const LIMITS: &str = "fix resource limits";

/// No limit can be raised in here: what is left of soft and hard limits is one number each.
fn limit_resources(spec: &JailSpec) -> Result<(), Failure> {
    // As many as this user may have, if that is less.
    let most = rustix::process::getrlimit(Resource::Nofile).maximum;
    spec.limits
        .set(most.map_or(OPEN_FILES, |most| most.min(OPEN_FILES)))?;
    // Guest memory does not belong into a file.
    sys::set_limit(Resource::Core, 0).step(LIMITS)?;
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
        rustix::process::setrlimit(resource, fixed).step(LIMITS)?;
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
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).step(what)?;
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let ended = poll(
        &mut [PollFd::from_borrowed_fd(parent, PollFlags::IN)],
        Some(&now),
    );
    match ended.step(what)? {
        0 => Ok(()),
        _ => sys::exit_now(1),
    }
}

fn argv(plan: &Plan) -> Result<Vec<CString>, Failure> {
    let mut words = vec!["mayfly".to_owned(), "--id".into(), plan.spec.id.clone()];
    let console = plan.console_socket.is_some();
    let console = console.then_some(("--console-fd", CONSOLE_SOCKET));
    let always = [
        ("--api-fd", API),
        ("--kvm-fd", KVM),
        ("--log-fd", LOG),
        ("--end-fd", END),
    ];
    for (name, number) in always.into_iter().chain(console) {
        words.extend([name.to_owned(), number.to_string()]);
    }
    words.push("--landlock".to_owned());
    words.extend(plan.more.iter().cloned());
    let words = words.into_iter().map(CString::new);
    words
        .collect::<Result<_, _>>()
        .step("pass an argument to the monitor")
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
pub fn map_owner(pid: Pid, owner: Owner, as_root: bool) -> Result<(), Failure> {
    let folder = Path::new("/proc").join(pid.as_raw_nonzero().to_string());
    let write = |name: &str, text: &str| {
        let path = folder.join(name);
        std::fs::write(&path, text).step(format!(
            "give the jail its user and group ({})",
            path.display()
        ))
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
        let denied = Failure::new("name the jail's host", Errno::PERM);
        assert_eq!(explained(&denied, None), message(&denied));
        let text = explained(&denied, Some(obstacle::APPARMOR));
        assert!(text.contains("AppArmor"), "{text}");
        let limit = Failure::new("set --resource-limit no-file=9", Errno::PERM);
        for other in [
            Failure::new("name the jail's host", Errno::INVAL),
            limit.hints(|_| Some("it is above what this host or user allows")),
        ] {
            assert_eq!(explained(&other, Some(obstacle::APPARMOR)), message(&other));
        }
    }
}
