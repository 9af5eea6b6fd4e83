//! The compatible jail: a root folder on the host, with Firecracker's layout and command line.
//!
//! One straight sequence. First everything is opened and checked that can be without making
//! anything; then the jail is made, each step noted in `Undo`; then this process (or, for
//! `--daemonize` and `--new-pid-ns`, a child) enters it, gives up its privileges and becomes the
//! monitor. Whatever fails before the monitor runs is reported by the first process, which undoes
//! what was made and ends with 1: also a failed exec, since the privileges it dropped stay within
//! reach until the exec itself.

use std::borrow::Cow;
use std::convert::Infallible;
use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, Resource, WaitOptions};
use rustix::thread::{CapabilitySet, UnshareFlags};

use crate::args::Compatible;
use crate::cgroup::{CgroupError, Hierarchies, Request, Version};
use crate::error::{Remedy, Reported, message};
use crate::netns::{NetNs, NetNsError};
use crate::root::{self, Executable, Root, RootError};
use crate::sys::{self, Fork, Inherited};
use crate::undo::Undo;

/// The jail cannot be built, or the monitor not started in it.
#[derive(Debug, thiserror::Error)]
pub enum CompatError {
    #[error("cannot build a jail: it needs {0}")]
    Privileges(String),
    #[error(transparent)]
    Root(#[from] RootError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    NetNs(#[from] NetNsError),
    #[error("cannot {0}")]
    Step(&'static str, #[source] Errno),
    #[error("cannot set --resource-limit {0}={1}")]
    Limit(&'static str, u64, #[source] Errno),
    #[error("cannot become {0} {1} ({2})")]
    Become(&'static str, u32, &'static str, #[source] Errno),
    #[error("cannot pass an argument to the monitor: it contains a zero byte")]
    ZeroByte,
    #[error("cannot start the monitor: signal {0} arrived")]
    Signal(i32),
    #[error("cannot execute {0} in the jail (--exec-file)")]
    Execute(PathBuf, #[source] Errno),
    #[error("cannot start another process for the monitor: it ended before the monitor ran")]
    Ended,
    #[error(transparent)]
    Child(Reported),
    #[error("{}", message(&**.0))]
    LeftBehind(Box<CompatError>, String),
}

impl Remedy for CompatError {
    fn remedy(&self) -> Option<Cow<'static, str>> {
        Some(Cow::Borrowed(match self {
            CompatError::Root(error) => return error.remedy(),
            CompatError::Cgroup(error) => return error.remedy(),
            CompatError::NetNs(error) => return error.remedy(),
            CompatError::LeftBehind(_, left) => return Some(format!("left behind: {left}").into()),
            CompatError::Privileges(_) => "run mayfly-jailer as root",
            CompatError::Step(CLOSE, _) => "use Linux 5.9 or newer",
            CompatError::Limit(_, _, Errno::PERM) => "it is above what this host or user allows",
            CompatError::Execute(_, Errno::NOENT) => {
                "it needs an interpreter or shared libraries, which a jail does not have: give a \
                 static executable"
            }
            CompatError::Execute(_, Errno::NOEXEC) => "give an executable for this machine",
            CompatError::Ended => "see the kernel's log",
            _ => return None,
        }))
    }
}

/// Closes the descriptors of the caller.
const CLOSE: &str = "close inherited descriptors";
const FORK: &str = "start another process for the monitor";
const DROP: &str = "drop capabilities";

fn step(what: &'static str) -> impl FnOnce(Errno) -> CompatError {
    move |error| CompatError::Step(what, error)
}

/// What building this jail takes, checked first so that the reason for a refusal is the plain one.
const NEEDED: CapabilitySet = CapabilitySet::SYS_ADMIN
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::CHOWN)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETPCAP);

/// What a monitor that was told to run as root may keep: to open its disks, taps and huge pages as
/// root does. Any other user keeps nothing.
const KEPT_BY_ROOT: CapabilitySet = CapabilitySet::DAC_OVERRIDE
    .union(CapabilitySet::NET_ADMIN)
    .union(CapabilitySet::IPC_LOCK);

/// When the jailer started, for the monitor's own account of its start.
#[derive(Clone, Copy, Debug)]
pub struct Started {
    monotonic_us: u64,
    cpu_us: u64,
}

impl Started {
    /// Now.
    pub fn now() -> Started {
        Started {
            monotonic_us: sys::monotonic_us(),
            cpu_us: sys::process_cpu_us(),
        }
    }

    /// Microseconds of the monotonic clock.
    pub fn monotonic_us(self) -> u64 {
        self.monotonic_us
    }
}

/// Builds the jail and becomes the monitor. Returns `Ok` only in a process that started the monitor
/// as another one.
pub fn run(args: &Compatible, inherited: Inherited, started: Started) -> Result<(), CompatError> {
    let mut undo = Undo::default();
    build(args, inherited, started, &mut undo).map_err(|error| {
        sys::regain_capabilities();
        match undo.run() {
            left if left.is_empty() => error,
            left => CompatError::LeftBehind(Box::new(error), left.join(", ")),
        }
    })
}

fn build(
    args: &Compatible,
    inherited: Inherited,
    started: Started,
    undo: &mut Undo,
) -> Result<(), CompatError> {
    // First of all, while no file has been opened here: the jail gets descriptors 0 to 2 only.
    inherited.keep(Vec::new()).map_err(step(CLOSE))?;
    require_privileges()?;

    // Looking. Most mistakes end here, before anything has changed.
    let monitor = Executable::open(&args.exec_file)?;
    let base = root::open_base(&args.base)?;
    let netns = args.netns.as_deref().map(NetNs::open).transpose()?;
    let cgroups = plan_cgroups(args, monitor.name())?;
    let devices = root::devices();
    let null = args.daemonize.then(open_null).transpose()?;

    // A signal between here and the exec is answered when nothing is half-made.
    let signals = sys::watch_signals().map_err(step("hold back signals"))?;
    // What is made is not for other users, whatever mask the caller has.
    let umask = rustix::process::umask(Mode::from_raw_mode(0o077));

    // Making. The nodes come first in the folder: making them claims the id, and only then may an
    // executable that is there be replaced.
    let root = Root::make(&base, &args.base, monitor.name(), &args.id, undo)?;
    root.require_no_pid_file(&monitor)?;
    let folders = root.make_nodes(args.owner, &devices, undo)?;
    root.copy_monitor(&monitor, args.owner, undo)?;
    root.give_to(args.owner, &folders, undo)?;
    // Limits hold from here on for all that follows; the moves come last and back to back.
    for group in cgroups.make(undo)? {
        group.attach(undo)?;
    }

    // Entering. The namespace is joined first: its file is on the host.
    if let Some(netns) = &netns {
        netns.join()?;
    }
    root.enter()?;

    // Becoming the monitor.
    root.expect_pid_file(&monitor, undo);
    let job = Job {
        args,
        monitor: &monitor,
        root: &root,
        started,
        signals,
        umask,
        null,
        cpu_us: sys::process_cpu_us().saturating_sub(started.cpu_us),
    };
    if args.daemonize || args.new_pid_ns {
        start_elsewhere(job)
    } else {
        root.write_pid_file(&monitor, rustix::process::getpid())?;
        match job.become_monitor()? {}
    }
}

fn require_privileges() -> Result<(), CompatError> {
    let missing = sys::missing_capabilities(NEEDED).map_err(step("build a jail"))?;
    let names: Vec<String> = missing
        .iter_names()
        .map(|(name, _)| format!("CAP_{name}"))
        .collect();
    if names.is_empty() {
        return Ok(());
    }
    Err(CompatError::Privileges(names.join(", ")))
}

fn plan_cgroups(args: &Compatible, name: &OsStr) -> Result<Request, CgroupError> {
    // Version 1 without a value to set has nothing to do, whatever --parent-cgroup says. Version 2
    // has, but only where it is mounted was it asked for on purpose.
    if args.cgroups.is_empty() && args.cgroup_version == Version::V1 {
        return Ok(Request::default());
    }
    let default = [name.to_owned()];
    let parent = args.parent_cgroup.as_deref().unwrap_or(&default);
    let hierarchies = Hierarchies::of_host()?;
    let (version, values) = (args.cgroup_version, &args.cgroups);
    Request::compatible(version, parent, &args.id, values, &hierarchies)
}

fn open_null() -> Result<OwnedFd, CompatError> {
    rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(step("open /dev/null for --daemonize"))
}

/// What the process that becomes the monitor needs to know.
struct Job<'a> {
    args: &'a Compatible,
    monitor: &'a Executable,
    root: &'a Root,
    started: Started,
    /// Signals that are held back.
    signals: OwnedFd,
    /// The caller's, for the monitor.
    umask: Mode,
    /// /dev/null of the host, if the monitor is to be a daemon.
    null: Option<OwnedFd>,
    /// Processor time the jailer has used in processes before this one.
    cpu_us: u64,
}

impl Job<'_> {
    /// The last steps; returns only the reason why the monitor does not run.
    fn become_monitor(&self) -> Result<Infallible, CompatError> {
        if let Some(null) = &self.null {
            rustix::stdio::dup2_stdin(null)
                .and_then(|()| rustix::stdio::dup2_stdout(null))
                .and_then(|()| rustix::stdio::dup2_stderr(null))
                .map_err(step("replace standard input and outputs by /dev/null"))?;
        }
        // While we may still raise one.
        if let Some(bytes) = self.args.file_size {
            limit(Resource::Fsize, bytes, "fsize")?;
        }
        limit(Resource::Nofile, self.args.open_files, "no-file")?;

        // Groups while we are root; the bounding set while we may; the user last. The permitted
        // capabilities stay until the exec, which drops them, or fails and needs them for undoing.
        let (uid, gid) = (self.args.owner.uid, self.args.owner.gid);
        rustix::thread::set_thread_groups(&[]).map_err(step("leave supplementary groups"))?;
        rustix::thread::set_thread_res_gid(gid, gid, gid)
            .map_err(|error| CompatError::Become("group", gid.as_raw(), "--gid", error))?;
        let kept = if uid.is_root() {
            KEPT_BY_ROOT
        } else {
            CapabilitySet::empty()
        };
        rustix::thread::clear_ambient_capability_set().map_err(step(DROP))?;
        sys::bound_capabilities(kept).map_err(step(DROP))?;
        rustix::thread::set_keep_capabilities(true).map_err(step(DROP))?;
        rustix::thread::set_thread_res_uid(uid, uid, uid)
            .map_err(|error| CompatError::Become("user", uid.as_raw(), "--uid", error))?;
        // And nothing that is executed from here on gives any back.
        rustix::thread::set_no_new_privs(true).map_err(step("set no_new_privs"))?;

        let program = self.monitor.inner_path();
        let argv = self.argv(program.as_os_str())?;
        rustix::process::umask(self.umask);
        let mut held = std::iter::from_fn(|| sys::next_signal(self.signals.as_fd()));
        if let Some(signal) = held.find(|&signal| signal != libc::SIGCONT) {
            return Err(CompatError::Signal(signal));
        }
        sys::reset_signals().map_err(step("reset signals"))?;
        let error = sys::exec(CWD, &argv[0], &argv);
        Err(CompatError::Execute(program, error))
    }

    /// The monitor's arguments: its path, ours, then the caller's.
    fn argv(&self, program: &OsStr) -> Result<Vec<CString>, CompatError> {
        let ours = [
            ("--id", self.args.id.clone()),
            ("--start-time-us", self.started.monotonic_us.to_string()),
            ("--start-time-cpu-us", sys::process_cpu_us().to_string()),
            ("--parent-cpu-time-us", self.cpu_us.to_string()),
        ];
        let ours = ours
            .iter()
            .flat_map(|(name, value)| [OsStr::new(*name), OsStr::new(value)]);
        std::iter::once(program)
            .chain(ours)
            .chain(self.args.monitor_args.iter().map(|word| &**word))
            .map(|word| CString::new(word.as_bytes()).map_err(|_| CompatError::ZeroByte))
            .collect()
    }
}

fn limit(resource: Resource, value: u64, name: &'static str) -> Result<(), CompatError> {
    sys::set_limit(resource, value).map_err(|error| CompatError::Limit(name, value, error))
}

/// What a child writes to its report just before the exec; the exec then closes the pipe. Anything
/// after it, or in its place, is the message of an error.
const READY: u8 = 0;

/// Starts the monitor in a child, and waits until it runs.
fn start_elsewhere(mut job: Job<'_>) -> Result<(), CompatError> {
    let (hear, report) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(step(FORK))?;
    let result = if job.args.daemonize {
        // Two forks: the first child opens a session without a terminal, the second is not its
        // leader and so never gets one.
        match sys::fork().map_err(step(FORK))? {
            Fork::Parent(child) => {
                drop(job);
                // It ends as soon as it has started the monitor.
                reap(child);
                Ok(())
            }
            Fork::Child => {
                job.cpu_us += sys::process_cpu_us();
                let started = open_session().and_then(|()| start_child(&job, false, &report));
                if let Err(error) = &started {
                    tell(&report, error);
                }
                sys::exit_now(i32::from(started.is_err()));
            }
        }
    } else {
        // A session of its own if it would share one that ends with this process: the end of a
        // session's leader is a SIGHUP to the others.
        let leader = rustix::process::getsid(None) == Ok(rustix::process::getpid());
        start_child(&job, leader, &report)
    };
    drop(report);
    // Until the monitor runs, or every process that could start it has ended.
    let mut heard = Vec::new();
    let _ = File::from(hear).read_to_end(&mut heard);
    result?;
    match heard.strip_prefix(&[READY]).unwrap_or(&heard) {
        [] if heard.is_empty() => Err(CompatError::Ended),
        [] => Ok(()),
        text => {
            let text = String::from_utf8_lossy(text).into_owned();
            Err(CompatError::Child(Reported(text)))
        }
    }
}

fn open_session() -> Result<(), CompatError> {
    let opened = rustix::process::setsid().map_err(step("open a session"));
    opened.map(drop)
}

/// Starts the process that becomes the monitor, and writes its pid file before it goes on.
fn start_child(job: &Job<'_>, own_session: bool, report: &OwnedFd) -> Result<(), CompatError> {
    let (wait, go) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(step(FORK))?;
    if job.args.new_pid_ns {
        // The next child is the first process of the new namespace.
        sys::unshare(UnshareFlags::NEWPID).map_err(step("make a pid namespace (--new-pid-ns)"))?;
    }
    match sys::fork().map_err(step(FORK))? {
        Fork::Child => {
            drop(go);
            // Without this byte, the parent has failed and says why.
            if File::from(wait).read_exact(&mut [0]).is_ok() {
                match in_child(job, own_session, report) {
                    Ok(never) => match never {},
                    Err(error) => tell(report, &error),
                }
            }
            sys::exit_now(1)
        }
        Fork::Parent(pid) => {
            if let Err(error) = job.root.write_pid_file(job.monitor, pid) {
                drop(go);
                reap(pid);
                return Err(error.into());
            }
            rustix::io::write(&go, &[READY]).map_err(step(FORK))?;
            Ok(())
        }
    }
}

fn in_child(job: &Job<'_>, own_session: bool, report: &OwnedFd) -> Result<Infallible, CompatError> {
    if own_session {
        open_session()?;
    }
    rustix::io::write(report, &[READY]).map_err(step("report"))?;
    job.become_monitor()
}

fn tell(report: &OwnedFd, error: &CompatError) {
    // If the first process is gone there is none to tell.
    let _ = rustix::io::write(report, message(error).as_bytes());
}

fn reap(child: Pid) {
    let _ =
        rustix::io::retry_on_intr(|| rustix::process::waitpid(Some(child), WaitOptions::empty()));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn message_has_the_cause_then_the_remedy_then_what_was_left_behind() {
        let error = CompatError::Execute("/m".into(), Errno::NOEXEC);
        let error = CompatError::LeftBehind(Box::new(error), "/x: busy".into());
        assert_eq!(
            message(&error),
            "cannot execute /m in the jail (--exec-file): Exec format error (os error 8); \
             give an executable for this machine; left behind: /x: busy"
        );
    }
}
