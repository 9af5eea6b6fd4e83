//! The compatible jail: a root folder on the host, with Firecracker's layout and command line.
//!
//! One straight sequence. First everything is opened and checked that can be without making
//! anything; then the jail is made, each step noted in `Undo`; then this process (or, for
//! `--daemonize` and `--new-pid-ns`, a child) enters it, gives up its privileges and becomes the
//! monitor. Whatever fails before the monitor runs is reported by the first process, which takes
//! back what was made and ends with 1: also a failed exec, since the privileges it dropped stay
//! within reach until the exec itself.

use std::convert::Infallible;
use std::ffi::{CString, OsStr, OsString};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, Resource, WaitOptions};
use rustix::thread::{CapabilitySet, UnshareFlags};

use crate::args::Compatible;
use crate::cgroup::{Hierarchies, Request, Version};
use crate::error::Reported;
use crate::failure::{Doing, Failure};
use crate::netns::NetNs;
use crate::root::{self, Executable, Root};
use crate::sys::{self, Fork, Inherited};
use crate::undo::Undo;

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
pub fn run(args: &Compatible, inherited: Inherited, started: Started) -> Result<(), Failure> {
    let mut undo = Undo::default();
    let result = build(args, inherited, started, &mut undo);
    result.map_err(|failure| {
        sys::regain_capabilities();
        match undo.run() {
            left if left.is_empty() => failure,
            left => failure.remedy(format_args!("left behind: {}", left.join(", "))),
        }
    })
}

fn build(
    args: &Compatible,
    inherited: Inherited,
    started: Started,
    undo: &mut Undo,
) -> Result<(), Failure> {
    // First of all, while nothing here has opened anything: the jail gets descriptors 0 to 2 only.
    inherited
        .keep(Vec::new())
        .doing_or("close inherited descriptors", |_| "use Linux 5.9 or newer")?;
    require_privileges()?;

    // Looking. Most mistakes end here, before anything has changed.
    let monitor = Executable::open(&args.exec_file)?;
    let base = root::open_base(&args.base)?;
    let netns = args.netns.as_deref().map(NetNs::open).transpose()?;
    let cgroups = plan_cgroups(args, monitor.name())?;
    let devices = root::devices();
    let null = args.daemonize.then(open_null).transpose()?;

    // A signal between here and the exec is answered when nothing is half-made.
    sys::hold_ending_signals().doing("hold back signals")?;
    // What is made is for nobody else's eyes, whatever mask the caller has.
    let umask = rustix::process::umask(Mode::from_raw_mode(0o077));

    // Making. The nodes come first in the folder: making them claims the id, and only then may an
    // executable that is there be replaced.
    let root = Root::make(&base, &args.base, monitor.name(), &args.id, undo)?;
    root.require_no_pid_file(&monitor)?;
    let folders = root.make_nodes(args.owner, &devices, undo)?;
    root.copy_monitor(&monitor, args.owner, undo)?;
    root.give_to(args.owner, &folders, undo)?;
    // Limits hold from here on for all that follows; the moves come last and back to back.
    let groups = match cgroups {
        Some(request) => request.make(undo)?,
        None => Vec::new(),
    };
    for group in &groups {
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

fn require_privileges() -> Result<(), Failure> {
    let what = "build a jail";
    let missing = sys::missing_capabilities(NEEDED).doing(what)?;
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<String> = missing
        .iter_names()
        .map(|(name, _)| format!("CAP_{name}"))
        .collect();
    Err(
        Failure::new(what, format_args!("it needs {}", names.join(", ")))
            .remedy("run mayfly-jailer as root"),
    )
}

fn plan_cgroups(args: &Compatible, name: &OsStr) -> Result<Option<Request>, Failure> {
    // Version 1 without a value to set has nothing to do, whatever --parent-cgroup says. Version 2
    // has, but only where it is mounted was it asked for on purpose.
    if args.cgroups.is_empty() && args.cgroup_version == Version::V1 {
        return Ok(None);
    }
    let default = [name.to_owned()];
    let parent = args.parent_cgroup.as_deref().unwrap_or(&default);
    let hierarchies = Hierarchies::of_host()?;
    let (version, values) = (args.cgroup_version, &args.cgroups);
    let request = Request::compatible(version, parent, &args.id, values, &hierarchies)?;
    Ok(Some(request))
}

fn open_null() -> Result<OwnedFd, Failure> {
    rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .doing("open /dev/null for --daemonize")
}

/// What the process that becomes the monitor needs to know.
struct Job<'a> {
    args: &'a Compatible,
    monitor: &'a Executable,
    root: &'a Root,
    started: Started,
    /// The caller's, for the monitor.
    umask: Mode,
    /// /dev/null of the host, if the monitor is to be a daemon.
    null: Option<OwnedFd>,
    /// Processor time the jailer has used in processes before this one.
    cpu_us: u64,
}

impl Job<'_> {
    /// The last steps; returns only the reason why the monitor does not run.
    fn become_monitor(&self) -> Result<Infallible, Failure> {
        let owner = self.args.owner;
        if let Some(null) = &self.null {
            rustix::stdio::dup2_stdin(null)
                .and_then(|()| rustix::stdio::dup2_stdout(null))
                .and_then(|()| rustix::stdio::dup2_stderr(null))
                .doing("replace standard input and outputs by /dev/null")?;
        }
        // While we may still raise one.
        if let Some(bytes) = self.args.file_size {
            limit(Resource::Fsize, bytes, "fsize")?;
        }
        limit(Resource::Nofile, self.args.open_files, "no-file")?;

        // Groups while we are root; the bounding set while we may; the user last. The permitted
        // capabilities stay until the exec, which drops them, or fails and needs them for undoing.
        rustix::thread::set_thread_groups(&[]).doing("leave supplementary groups")?;
        rustix::thread::set_thread_res_gid(owner.gid, owner.gid, owner.gid)
            .doing(format_args!("become group {} (--gid)", owner.gid.as_raw()))?;
        let kept = if owner.uid.is_root() {
            KEPT_BY_ROOT
        } else {
            CapabilitySet::empty()
        };
        rustix::thread::clear_ambient_capability_set().doing("drop capabilities")?;
        sys::bound_capabilities(kept).doing("drop capabilities")?;
        rustix::thread::set_keep_capabilities(true).doing("drop capabilities")?;
        rustix::thread::set_thread_res_uid(owner.uid, owner.uid, owner.uid)
            .doing(format_args!("become user {} (--uid)", owner.uid.as_raw()))?;
        // And nothing that is executed from here on gives any back.
        rustix::thread::set_no_new_privs(true).doing("set no_new_privs")?;

        let program = c_string(self.monitor.inner_path().into_os_string())?;
        let argv = self.argv(&program)?;
        rustix::process::umask(self.umask);
        if let Some(signal) = sys::held_signal() {
            return Err(Failure::new(
                "start the monitor",
                format_args!("signal {signal} arrived"),
            ));
        }
        sys::reset_signals().doing("reset signals")?;
        let error = sys::exec(&program, &argv);
        let failure = Failure::new(
            format_args!(
                "execute {} in the jail (--exec-file {})",
                program.to_string_lossy(),
                self.args.exec_file.display()
            ),
            error,
        );
        Err(match error {
            Errno::NOENT => failure.remedy(
                "it needs an interpreter or shared libraries, which a jail does not have: \
                 give a static executable",
            ),
            Errno::NOEXEC => failure.remedy("give an executable for this machine"),
            _ => failure,
        })
    }

    /// The monitor's arguments: ours, then the caller's.
    fn argv(&self, program: &CString) -> Result<Vec<CString>, Failure> {
        let own = [
            ("--id", self.args.id.clone()),
            ("--start-time-us", self.started.monotonic_us.to_string()),
            ("--start-time-cpu-us", sys::process_cpu_us().to_string()),
            ("--parent-cpu-time-us", self.cpu_us.to_string()),
        ];
        let mut argv = vec![program.clone()];
        for (name, value) in own {
            argv.push(c_string(name.into())?);
            argv.push(c_string(value.into())?);
        }
        for word in &self.args.monitor_args {
            argv.push(c_string(word.clone())?);
        }
        Ok(argv)
    }
}

fn limit(resource: Resource, value: u64, name: &str) -> Result<(), Failure> {
    sys::set_limit(resource, value).doing_or(
        format_args!("set --resource-limit {name}={value}"),
        |error| match error.kind() {
            std::io::ErrorKind::PermissionDenied => "it is above what this host or user allows",
            _ => "",
        },
    )
}

fn c_string(word: OsString) -> Result<CString, Failure> {
    CString::new(word.as_bytes())
        .map_err(|_| Failure::new("pass an argument to the monitor", "it contains a zero byte"))
}

/// What a child writes to its report just before the exec; the exec then closes the pipe. Anything
/// after it, or in its place, is the sentence of a failure.
const READY: u8 = 0;

/// Starts the monitor in a child, and waits until it runs.
fn start_elsewhere(mut job: Job<'_>) -> Result<(), Failure> {
    let what = "start another process for the monitor";
    let (hear, report) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).doing(what)?;
    let result = if job.args.daemonize {
        // Two forks: the first child opens a session without a terminal, the second is not its
        // leader and so never gets one.
        match sys::fork().doing(what)? {
            Fork::Parent(child) => {
                drop(job);
                // It ends as soon as it has started the monitor.
                reap(child);
                Ok(())
            }
            Fork::Child => {
                let result = rustix::process::setsid()
                    .doing("open a session")
                    .and_then(|_| {
                        job.cpu_us += sys::process_cpu_us();
                        start_child(&job, false, &report)
                    });
                if let Err(failure) = &result {
                    tell(&report, failure);
                }
                sys::exit_now(i32::from(result.is_err()));
            }
        }
    } else {
        // A session of its own if it would share one that ends with this process: the end of a
        // session's leader is a SIGHUP to the others.
        let leader = rustix::process::getsid(None) == Ok(rustix::process::getpid());
        start_child(&job, leader, &report)
    };
    drop(report);
    // Until the monitor runs, or nobody is left who could start it.
    let heard = listen(&hear);
    result?;
    match heard.split_first() {
        Some((&READY, [])) => Ok(()),
        Some((&READY, message)) => Err(reported(message)),
        Some(_) => Err(reported(&heard)),
        None => {
            Err(Failure::new(what, "it ended before the monitor ran")
                .remedy("see the kernel's log"))
        }
    }
}

fn reported(message: &[u8]) -> Failure {
    Reported(String::from_utf8_lossy(message).into_owned()).into()
}

/// Starts the process that becomes the monitor, and writes its pid file before it goes on.
fn start_child(job: &Job<'_>, own_session: bool, report: &OwnedFd) -> Result<(), Failure> {
    let what = "start another process for the monitor";
    let (wait, go) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).doing(what)?;
    if job.args.new_pid_ns {
        // The next child is the first process of the new namespace.
        sys::unshare(UnshareFlags::NEWPID).doing("make a pid namespace (--new-pid-ns)")?;
    }
    match sys::fork().doing(what)? {
        Fork::Child => {
            drop(go);
            // Without the word, the parent has failed and says why.
            if listen_one(&wait) {
                let failure = in_child(job, own_session, report);
                tell(report, &failure);
            }
            sys::exit_now(1)
        }
        Fork::Parent(pid) => {
            let written = job.root.write_pid_file(job.monitor, pid);
            if written.is_err() {
                drop(go);
                reap(pid);
                return Ok(written?);
            }
            rustix::io::write(&go, &[READY]).doing(what)?;
            Ok(())
        }
    }
}

fn in_child(job: &Job<'_>, own_session: bool, report: &OwnedFd) -> Failure {
    if own_session && let Err(failure) = rustix::process::setsid().doing("open a session") {
        return failure;
    }
    if let Err(failure) = rustix::io::write(report, &[READY]).doing("report") {
        return failure;
    }
    match job.become_monitor() {
        Ok(never) => match never {},
        Err(failure) => failure,
    }
}

fn tell(report: &OwnedFd, failure: &Failure) {
    // If the first process is gone there is nobody to tell.
    let _ = rustix::io::write(report, failure.to_string().as_bytes());
}

/// Everything that comes out of a pipe until its last writer is gone.
fn listen(pipe: &OwnedFd) -> Vec<u8> {
    let mut heard = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        match rustix::io::read(pipe, &mut buffer) {
            Ok(0) => return heard,
            Ok(count) => heard.extend_from_slice(&buffer[..count]),
            Err(Errno::INTR) => {}
            Err(_) => return heard,
        }
    }
}

fn listen_one(pipe: &OwnedFd) -> bool {
    rustix::io::retry_on_intr(|| rustix::io::read(pipe, &mut [0; 1])) == Ok(1)
}

fn reap(child: Pid) {
    let _ =
        rustix::io::retry_on_intr(|| rustix::process::waitpid(Some(child), WaitOptions::empty()));
}
