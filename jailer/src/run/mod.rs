//! `mayfly-jailer run`: one microVM in an empty jail, from nothing to nothing.
//!
//! ```text
//!    terminal, file, socket           clients          control groups, socket at a path
//!           |                            |                        |
//!   +-------v------+  channel    +-------v-----+          +-------v------+
//!   |  supervisor  |------------>|   monitor   |          |    keeper    |
//!   | (run, watch) |   API, fds  | (the jail)  |<---------| (only if     |
//!   |              |------------>| process 1   |  groups  |  needed)     |
//!   +--------------+             +-------------+          +--------------+
//!          '------------- channel, process descriptors ----------'
//! ```
//!
//! - The *supervisor* (this process) opens everything by its name on the host, makes the jail,
//!   configures and starts the monitor through its API, relays the console, waits, says how it ended.
//! - The *monitor* is a copy of this process that enters the empty jail (`jail`) and executes the
//!   monitor there. It ends when the supervisor ends.
//! - The *keeper* (`keeper`) exists only if there is something with a name.

pub mod args;
pub mod build;
pub mod machine;
pub mod outcome;
pub mod refusal;
pub mod supervise;

mod api;
mod channel;
mod console;
mod handed;
mod jail;
mod json;
mod keeper;
mod netlink;
mod network;
pub mod opening;
mod socket;
mod terminal;

use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Gid, Mode, OFlags, Uid};
use rustix::process::PidfdFlags;

use self::args::{Console, Options};
use self::build::Parts;
pub use self::console::Sink;
use self::handed::Handed;
use self::machine::{Described, Own};
use self::outcome::{Asked, Report, Seen, Times, Verdict};
use self::supervise::{Watch, Watched};
use crate::cgroup::exclusive;
use crate::failure::{Doing, Failure};
use crate::root::Owner;
use crate::sys::{self, Inherited};

/// Runs a microVM and returns the exit code.
pub fn run(options: Options, inherited: Inherited, began_us: u64) -> i32 {
    sys::survive_writes();
    let id = options
        .id
        .clone()
        .unwrap_or_else(|| format!("vm-{}", std::process::id()));
    // Inherited descriptors first: the report's is ours.
    let prepared = Handed::look().and_then(|mut handed| {
        let described = machine::describe_machine(&options.machine)?;
        let mut wanted = described
            .as_ref()
            .map(Described::inherited)
            .unwrap_or_default();
        wanted.extend(options.end_with_fd);
        handed.close_others(inherited, wanted)?;
        Ok((handed, described))
    });
    let report = match options.exit_report.as_deref().map(Report::open).transpose() {
        Ok(report) => report,
        Err(failure) => return complain(&failure.to_string(), outcome::NOT_STARTED),
    };
    let mut watched = prepared
        .and_then(|(handed, described)| open(options, &id, began_us, handed, described))
        .and_then(|parts| build::build(parts, report.as_ref()))
        .map(Watch::run);
    let keeper = watched.as_mut().ok().and_then(|it| it.keeper.take());
    let (verdict, facts) = conclude(&id, watched, began_us);
    if let Some(Err(failure)) = report.map(|report| report.write(&facts)) {
        complain(&failure.to_string(), 0);
    }
    if let Some(keeper) = keeper {
        keeper.dismiss();
    }
    match verdict.sentence.as_str() {
        "" => verdict.code,
        sentence => complain(sentence, verdict.code),
    }
}

fn conclude(
    id: &str,
    watched: Result<Watched, Failure>,
    began_us: u64,
) -> (Verdict, serde_json::Value) {
    match watched {
        Ok(watched) => {
            let verdict = watched.verdict();
            let ended = watched.ended.as_ref().ok().copied();
            let facts = outcome::facts(id, &verdict, ended, &watched.seen, &watched.times);
            (verdict, facts)
        }
        Err(failure) => {
            let verdict = Verdict::not_started(&failure);
            let ended_us = Some(sys::monotonic_us().saturating_sub(began_us));
            let times = Times {
                ended_us,
                ..Times::default()
            };
            let facts = outcome::facts(id, &verdict, None, &Seen::default(), &times);
            (verdict, facts)
        }
    }
}

fn complain(sentence: &str, code: i32) -> i32 {
    // With standard error gone, the exit code still says it.
    let _ = std::io::stderr().write_all(format!("mayfly-jailer: {sentence}\n").as_bytes());
    code
}

/// Opens everything. Nothing is made on the host until all that can be looked at has been.
fn open(
    options: Options,
    id: &str,
    began_us: u64,
    mut handed: Handed,
    described: Option<Described>,
) -> Result<Parts, Failure> {
    require_api(&options, described.is_some(), &handed)?;
    let (owner, as_root) = owner(options.uid, options.gid)?;
    let own_tap = described.as_ref().and_then(Described::own_tap);
    if own_tap == Some(Own::Auto) && !as_root {
        return Err(
            Failure::new("make a network (--net auto)", "that takes root").remedy(
                "use --net user with pasta or slirp4netns, or hand in a tap with --net fd:N",
            ),
        );
    }
    let (mut log, mut console) = (options.log.clone(), None);
    if let Some(described) = &described {
        log = log.or_else(|| described.log.clone());
        console = described.console.clone();
    }
    let groups = exclusive::Plan::new(&exclusive::Wanted {
        id,
        limits: &options.limits,
        values: &options.cgroups,
        version: options.cgroup_version,
        parent: options.parent_cgroup.as_deref(),
        as_root,
    })?;
    let monitor_name = monitor_path(options.mayfly.as_deref())?;
    let monitor = open_monitor(&monitor_name)?;
    let kvm = open_kvm()?;
    let listener = handed.take_listener()?;
    let enders = enders(&options, &mut handed)?;
    let machine = described
        .map(|it| it.open(|number| handed.take(number)))
        .transpose()?;
    let sink = match &log {
        Some(path) => Sink::File(opening::open_to_append(path, "--log")?),
        None => Sink::output(std::io::stderr().as_fd()),
    };
    let console = match (options.console, console) {
        (Console::Terminal, Some(path)) => Console::File(path),
        (console, _) => console,
    };
    Ok(Parts {
        id: id.to_owned(),
        began_us,
        owner,
        as_root,
        monitor,
        monitor_name: monitor_name.display().to_string(),
        kvm,
        machine,
        own_tap,
        listener,
        api_sock: options.api_sock,
        groups,
        console,
        log: sink,
        only_troubles: log.is_none(),
        file_size: options.file_size,
        open_files: options.open_files,
        timeout: options.timeout,
        enders,
        quiet: options.quiet,
        on_first_byte: None,
    })
}

/// What ends the microVM besides its guest, a signal and the time limit.
fn enders(options: &Options, handed: &mut Handed) -> Result<Vec<(OwnedFd, Asked)>, Failure> {
    let mut enders = Vec::new();
    if options.with_parent {
        let what = "end with the parent (--with-parent)";
        let parent = rustix::process::getppid().ok_or_else(|| {
            Failure::new(what, "it is outside this process namespace")
                .remedy("use --end-with-fd with a pipe that the parent holds open")
        })?;
        let parent = rustix::process::pidfd_open(parent, PidfdFlags::empty()).doing(what)?;
        enders.push((parent, Asked::Parent));
    }
    if let Some(number) = options.end_with_fd {
        let fd = handed.take(number)?;
        let what = format!("end with descriptor {number} (--end-with-fd)");
        let kind = FileType::from_raw_mode(rustix::fs::fstat(&fd).doing(&what)?.st_mode);
        if !(kind.is_fifo() || kind.is_socket()) {
            return Err(Failure::new(what, "only a pipe or a socket hangs up"));
        }
        enders.push((fd, Asked::HangUp));
    }
    Ok(enders)
}

/// Somebody has to configure the microVM, by one socket.
fn require_api(options: &Options, is_described: bool, handed: &Handed) -> Result<(), Failure> {
    let is_handed = handed.listener().is_some();
    if options.api_sock.is_some() && is_handed {
        return Err(Failure::new(
            "use --api-sock",
            "an API socket was handed in (LISTEN_FDS)",
        ));
    }
    if is_described || options.api_sock.is_some() || is_handed {
        return Ok(());
    }
    Err(Failure::new("run a microVM", "there is nothing to run")
        .remedy("give --kernel, --config, or --api-sock for a client that configures it"))
}

/// Whom the monitor runs as, and whether this process is root.
pub fn owner(uid: Option<u32>, gid: Option<u32>) -> Result<(Owner, bool), Failure> {
    let (own_uid, own_gid) = (rustix::process::geteuid(), rustix::process::getegid());
    if sys::is_superuser() {
        let (Some(uid), Some(gid)) = (uid, gid) else {
            return Err(
                Failure::new("run a microVM as root", "--uid or --gid is missing").remedy(
                    "give a user and group that nothing else runs as; 0 if it is to be root",
                ),
            );
        };
        return Ok((
            Owner {
                uid: Uid::from_raw(uid),
                gid: Gid::from_raw(gid),
            },
            true,
        ));
    }
    for (name, wanted, own) in [
        ("--uid", uid, own_uid.as_raw()),
        ("--gid", gid, own_gid.as_raw()),
    ] {
        if let Some(wanted) = wanted.filter(|&wanted| wanted != own) {
            return Err(Failure::new(
                format_args!("use {name} {wanted}"),
                format_args!("an ordinary user can only be itself ({own})"),
            )
            .remedy("leave it out, or run mayfly-jailer as root"));
        }
    }
    Ok((
        Owner {
            uid: own_uid,
            gid: own_gid,
        },
        false,
    ))
}

/// The monitor, or the one beside this program.
pub fn monitor_path(given: Option<&Path>) -> Result<PathBuf, Failure> {
    if let Some(path) = given {
        return Ok(path.to_owned());
    }
    let own = std::env::current_exe().doing_or(
        "find the monitor beside this program",
        |_| "name it with --mayfly",
    )?;
    Ok(own.with_file_name("mayfly"))
}

/// Opens the monitor's executable.
pub fn open_monitor(path: &Path) -> Result<File, Failure> {
    let what = format!("open the monitor {}", path.display());
    // NONBLOCK: a pipe must not hold us up.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = rustix::fs::open(path, flags, Mode::empty())
        .map(File::from)
        .doing_or(&what, |_| "name it with --mayfly")?;
    let metadata = file.metadata().doing(&what)?;
    if !metadata.is_file() {
        return Err(Failure::new(what, "it is not a regular file"));
    }
    if std::os::unix::fs::MetadataExt::mode(&metadata) & 0o111 == 0 {
        return Err(Failure::new(what, "nobody may execute it").remedy("run chmod +x on it"));
    }
    Ok(file)
}

/// Opens /dev/kvm and makes sure that it is.
pub fn open_kvm() -> Result<OwnedFd, Failure> {
    const KVM: &str = "/dev/kvm";
    let what = format!("open {KVM}");
    let kvm = rustix::fs::open(KVM, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).doing_or(
        &what,
        |error| match error.kind() {
            std::io::ErrorKind::NotFound => {
                "load kvm_intel, kvm_amd or kvm_pvm; in a cloud VM, choose one with nested virtualisation"
            }
            std::io::ErrorKind::PermissionDenied => {
                "add this user to the group kvm (`usermod -aG kvm USER`, then log in again)"
            }
            _ => "",
        },
    )?;
    match sys::kvm_version(kvm.as_fd()) {
        Ok(12) => Ok(kvm),
        Ok(other) => Err(Failure::new(
            what,
            format_args!("it speaks version {other}, not 12"),
        )),
        Err(_) => Err(Failure::new(what, "it is not KVM")),
    }
}
