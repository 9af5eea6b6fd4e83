//! The compatible jail: a root folder on the host, with Firecracker's layout and command line.
//!
//! One straight sequence. First everything is opened and checked that can be without making
//! anything; then the jail is made, each step noted in `Undo`; then this process (or, for
//! `--daemonize` and `--new-pid-ns`, a child) enters it, gives up its privileges and becomes the
//! monitor. Whatever fails before the monitor runs is reported by the first process, which undoes
//! what was made and ends with 1: also a failed exec, since the privileges it dropped stay within
//! reach until the exec itself.

use std::convert::Infallible;
use std::error::Error;
use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use rustix::fs::{CWD, Mode, OFlags};
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, WaitOptions};
use rustix::thread::{CapabilitySet, UnshareFlags};

use crate::args::Compatible;
use crate::cgroup::hierarchy::Hierarchies;
use crate::cgroup::{Request, Version};
use crate::error::{Advice as _, AnyError, Failure, Step as _, message};
use crate::monitor::{Executable, OPEN_FILES, cannot_execute};
use crate::netns::NetNs;
use crate::root::{self, Root};
use crate::sys::{self, Inherited};
use crate::undo::Undo;

/// The jail cannot be built, or the monitor not started in it.
#[derive(Debug, thiserror::Error)]
pub enum CompatError {
    #[error("cannot build a jail: it needs {0}; run mayfly-jailer as root")]
    Privileges(String),
    #[error("cannot start the monitor: signal {0} arrived")]
    Signal(i32),
    #[error(
        "cannot start another process for the monitor: it ended before the monitor ran; see the \
         kernel's log"
    )]
    Ended,
}

const FORK: &str = "start another process for the monitor";
const DROP: &str = "drop capabilities";

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

/// When the jailer started, for the monitor's own account of its start: microseconds of the monotonic
/// clock, and of processor time.
pub type Started = (u64, u64);

/// Builds the jail and becomes the monitor. Returns `Ok` only in a process that started the monitor
/// as another one.
pub fn run(args: &Compatible, inherited: Inherited, started: Started) -> Result<(), AnyError> {
    let mut undo = Undo::default();
    build(args, inherited, started, &mut undo).map_err(|error| {
        sys::regain_capabilities();
        with_left_behind(error, &undo.run())
    })
}

/// An error, and what could not be undone after it.
fn with_left_behind(error: AnyError, left: &[String]) -> AnyError {
    match left {
        [] => error,
        left => format!("{}; left behind: {}", message(&*error), left.join(", ")).into(),
    }
}

fn build(
    args: &Compatible,
    inherited: Inherited,
    started: Started,
    undo: &mut Undo,
) -> Result<(), AnyError> {
    // First of all, while no file has been opened here: the jail gets descriptors 0 to 2 only.
    inherited
        .keep(&[])
        .step("close inherited descriptors")
        .advise("use Linux 5.9 or newer")?;
    require_privileges()?;

    // Looking. Most mistakes end here, before anything has changed.
    let monitor = Executable::open(&args.exec_file, "--exec-file")?;
    let base = root::open_base(&args.base)?;
    let netns = args.netns.as_deref().map(NetNs::open).transpose()?;
    let cgroups = plan_cgroups(args, monitor.name())?;
    let devices = root::devices();
    let null = args.daemonize.then(open_null).transpose()?;

    // A signal between here and the exec is answered when nothing is half-made.
    let signals = sys::watch_signals().step("hold back signals")?;
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
        cpu_us: sys::process_cpu_us().saturating_sub(started.1),
    };
    if args.daemonize || args.new_pid_ns {
        start_elsewhere(job)
    } else {
        root.write_pid_file(&monitor, rustix::process::getpid())?;
        match job.become_monitor()? {}
    }
}

fn require_privileges() -> Result<(), AnyError> {
    let missing = sys::missing_capabilities(NEEDED).step("build a jail")?;
    let names: Vec<String> = missing
        .iter_names()
        .map(|(name, _)| format!("CAP_{name}"))
        .collect();
    if names.is_empty() {
        return Ok(());
    }
    Err(CompatError::Privileges(names.join(", ")).into())
}

fn plan_cgroups(args: &Compatible, name: &OsStr) -> Result<Request, AnyError> {
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

fn open_null() -> Result<OwnedFd, Failure> {
    sys::open("/dev/null", OFlags::RDWR).step("open /dev/null for --daemonize")
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
    fn become_monitor(&self) -> Result<Infallible, AnyError> {
        if let Some(null) = &self.null {
            sys::replace_standard_streams(null)
                .step("replace standard input and outputs by /dev/null")?;
        }
        // While we may still raise one.
        self.args.limits.set(OPEN_FILES)?;

        // Groups while we are root; the bounding set while we may; the user last. The permitted
        // capabilities stay until the exec, which drops them, or fails and needs them for undoing.
        let (uid, gid) = (self.args.owner.uid, self.args.owner.gid);
        rustix::thread::set_thread_groups(&[]).step("leave supplementary groups")?;
        rustix::thread::set_thread_res_gid(gid, gid, gid)
            .step(format!("become group {} (--gid)", gid.as_raw()))?;
        let kept = if uid.is_root() {
            KEPT_BY_ROOT
        } else {
            CapabilitySet::empty()
        };
        rustix::thread::clear_ambient_capability_set()
            .and_then(|()| sys::bound_capabilities(kept))
            .and_then(|()| rustix::thread::set_keep_capabilities(true))
            .step(DROP)?;
        rustix::thread::set_thread_res_uid(uid, uid, uid)
            .step(format!("become user {} (--uid)", uid.as_raw()))?;
        // And nothing that is executed from here on gives any back.
        rustix::thread::set_no_new_privs(true).step("set no_new_privs")?;

        let program = self.monitor.inner_path();
        let argv = self.argv(program.as_os_str())?;
        rustix::process::umask(self.umask);
        let mut held = std::iter::from_fn(|| sys::next_signal(self.signals.as_fd()));
        if let Some(signal) = held.find(|&signal| signal != libc::SIGCONT) {
            return Err(CompatError::Signal(signal).into());
        }
        sys::reset_signals().step("reset signals")?;
        let answer = sys::exec(CWD, &argv[0], &argv);
        Err(cannot_execute(&program, "--exec-file", answer).into())
    }

    /// The monitor's arguments: its path, ours, then the caller's.
    fn argv(&self, program: &OsStr) -> Result<Vec<CString>, Failure> {
        let ours = [
            ("--id", self.args.id.clone()),
            ("--start-time-us", self.started.0.to_string()),
            ("--start-time-cpu-us", sys::process_cpu_us().to_string()),
            ("--parent-cpu-time-us", self.cpu_us.to_string()),
        ];
        let ours = ours
            .iter()
            .flat_map(|(name, value)| [OsStr::new(*name), OsStr::new(value)]);
        std::iter::once(program)
            .chain(ours)
            .chain(self.args.monitor_args.iter().map(|word| &**word))
            .map(|word| CString::new(word.as_bytes()).step("pass an argument to the monitor"))
            .collect()
    }
}

/// What a child writes to its report just before the exec; the exec then closes the pipe. Anything
/// after it, or in its place, is the message of an error.
const READY: u8 = 0;

/// Starts the monitor in a child, and waits until it runs.
fn start_elsewhere(mut job: Job<'_>) -> Result<(), AnyError> {
    let (hear, report) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).step(FORK)?;
    let result = if job.args.daemonize {
        // Two forks: the first child opens a session without a terminal, the second is not its
        // leader and so never gets one.
        match sys::fork().step(FORK)? {
            Some(child) => {
                drop(job);
                // It ends as soon as it has started the monitor.
                reap(child);
                Ok(())
            }
            None => {
                job.cpu_us += sys::process_cpu_us();
                let started = open_session().and_then(|()| start_child(&job, false, &report));
                if let Err(error) = &started {
                    tell(&report, &**error);
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
        [] if heard.is_empty() => Err(CompatError::Ended.into()),
        [] => Ok(()),
        text => Err(String::from_utf8_lossy(text).into()),
    }
}

fn open_session() -> Result<(), AnyError> {
    rustix::process::setsid().step("open a session")?;
    Ok(())
}

/// Starts the process that becomes the monitor, and writes its pid file before it goes on.
fn start_child(job: &Job<'_>, own_session: bool, report: &OwnedFd) -> Result<(), AnyError> {
    let (wait, go) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).step(FORK)?;
    if job.args.new_pid_ns {
        // The next child is the first process of the new namespace.
        sys::unshare(UnshareFlags::NEWPID).step("make a pid namespace (--new-pid-ns)")?;
    }
    match sys::fork().step(FORK)? {
        None => {
            drop(go);
            // Without this byte, the parent has failed and says why.
            if File::from(wait).read_exact(&mut [0]).is_ok() {
                match in_child(job, own_session, report) {
                    Ok(never) => match never {},
                    Err(error) => tell(report, &*error),
                }
            }
            sys::exit_now(1)
        }
        Some(pid) => {
            if let Err(error) = job.root.write_pid_file(job.monitor, pid) {
                drop(go);
                reap(pid);
                return Err(error.into());
            }
            rustix::io::write(&go, &[READY]).step(FORK)?;
            Ok(())
        }
    }
}

fn in_child(job: &Job<'_>, own_session: bool, report: &OwnedFd) -> Result<Infallible, AnyError> {
    if own_session {
        open_session()?;
    }
    rustix::io::write(report, &[READY]).step("report")?;
    job.become_monitor()
}

fn tell(report: &OwnedFd, error: &(dyn Error + 'static)) {
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
    use rustix::io::Errno;

    #[test]
    fn message_has_the_cause_then_the_remedy_then_what_was_left_behind() {
        let error = cannot_execute("/m", "--exec-file", Errno::NOEXEC);
        let error = with_left_behind(error.into(), &["/x: busy".into()]);
        assert_eq!(
            message(&*error),
            "cannot execute /m in the jail (--exec-file): Exec format error (os error 8); \
             give an executable for this machine; left behind: /x: busy"
        );
    }
}
