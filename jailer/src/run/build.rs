//! From everything opened to a microVM that is watched: starts the keeper, makes the jail, and
//! gathers what the supervisor will watch.
//!
//! What can fail is done before the jail is asked for, as far as it goes; what fails afterwards dooms
//! the watch, which then ends the process in the jail in the same way as always.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::Pid;

use super::api::Client;
use super::args;
use super::channel::Channel;
use super::console::{self, Console, Relay, Sink};
use super::jail::{self, Tap};
use super::keeper::{self, Keeper};
use super::machine::{Machine, Own};
use super::outcome::{Asked, Report};
use super::supervise::{FirstByte, Log, Watch};
use super::{network, opening, refusal, socket};
use crate::cgroup::exclusive::{self, Entrances};
use crate::failure::{Doing, Failure};
use crate::root::Owner;
use crate::sys::{self, Clone};

/// Longest body of a request that the monitor takes unless it is told otherwise.
const PAYLOAD: usize = 51_200;

/// Everything that was opened.
#[derive(Debug)]
pub struct Parts {
    /// What ends the microVM besides: descriptors that are ready then, and why.
    pub enders: Vec<(OwnedFd, Asked)>,
    /// Name of the microVM.
    pub id: String,
    /// When the jailer began, microseconds of the monotonic clock.
    pub began_us: u64,
    /// Whom the monitor runs as.
    pub owner: Owner,
    /// Whether this process is root.
    pub as_root: bool,
    /// The monitor's executable.
    pub monitor: File,
    /// What that is called.
    pub monitor_name: String,
    /// /dev/kvm.
    pub kvm: OwnedFd,
    /// What to run; none if a client says it.
    pub machine: Option<Machine>,
    /// The tap to be made in the jail.
    pub own_tap: Option<Own>,
    /// An API socket that was handed in, and a connection to it.
    pub listener: Option<(OwnedFd, OwnedFd)>,
    /// Where to make an API socket.
    pub api_sock: Option<PathBuf>,
    /// Control groups to make.
    pub groups: Option<exclusive::Plan>,
    /// Where the console goes.
    pub console: args::Console,
    /// Where the log goes.
    pub log: Sink,
    /// Whether only troubles are worth telling there.
    pub only_troubles: bool,
    /// Largest file in bytes.
    pub file_size: Option<u64>,
    /// Most descriptors.
    pub open_files: Option<u64>,
    /// When to end the microVM.
    pub timeout: Option<Duration>,
    /// Print nothing of our own.
    pub quiet: bool,
    /// What to do at the guest's first byte.
    pub on_first_byte: Option<FirstByte>,
}

/// What the guest's own network is.
fn tap_of(parts: &mut Parts) -> (Option<Tap>, String) {
    let Some(machine) = &mut parts.machine else {
        return (None, String::new());
    };
    match parts.own_tap {
        None => (None, String::new()),
        Some(Own::Auto) => {
            // Whoever starts many at once finds each a place of its own.
            let seed = (sys::monotonic_us() as u32).wrapping_mul(0x9e37_79b1) ^ std::process::id();
            let block = network::choose_block(seed);
            machine.set_guest_address(&block.words(), &block.mac());
            let text = format!(
                "mayfly-jailer: the guest's address is {} (the host's, to the guest: {})\n",
                block.guest(),
                block.host()
            );
            (Some(Tap::Auto(block)), text)
        }
        Some(Own::User) => {
            let (guest, words, mac) = network::user_guest();
            machine.set_guest_address(&words, &mac);
            let text = format!(
                "mayfly-jailer: the guest's address is {guest}; connect its network with one of\n  \
                 slirp4netns --configure PID tap0\n  pasta --config-net PID\n\
                 where PID is @PID@ (network namespace /proc/@PID@/ns/net)\n"
            );
            (Some(Tap::User), text)
        }
    }
}

/// Builds it.
pub fn build(mut parts: Parts, report: Option<&Report>) -> Result<Watch, Failure> {
    // A signal from here on is answered by the watch.
    let signals = sys::watch_signals().doing("hold back signals")?;
    let own = keeper::own_descriptor()?;
    let console_socket = match &parts.console {
        args::Console::Socket(path) => Some(path.clone()),
        _ => None,
    };
    let machine_socket = parts.machine.as_ref().and_then(Machine::socket);
    let sockets: Vec<PathBuf> = parts
        .api_sock
        .iter()
        .cloned()
        .chain(console_socket)
        .chain(machine_socket.map(Path::to_owned))
        .collect();
    let has_groups = parts.groups.is_some();
    let keeper = if has_groups || !sockets.is_empty() || report.is_some() {
        let errand = keeper::Errand {
            groups: parts.groups.take(),
            sockets,
            report: None,
        };
        let report = report.map(|report| (report, parts.id.as_str(), parts.began_us));
        Some(Keeper::start(errand, report, &own)?)
    } else {
        None
    };
    let made = keeper.as_ref().map_or(Ok(Default::default()), Keeper::made);
    let limited_us = has_groups.then(|| sys::monotonic_us().saturating_sub(parts.began_us));
    let result = made.and_then(|(sockets, doors)| {
        let pieces = gather(&mut parts, sockets)?;
        start(parts, pieces, doors, signals, own)
    });
    match result {
        Ok(mut watch) => {
            watch.limited_us = limited_us;
            if let Some(keeper) = keeper {
                if let Err(failure) = keeper.watch(watch.pidfd.as_fd()) {
                    watch.doomed.get_or_insert(failure);
                }
                watch.keeper = Some(keeper);
            }
            Ok(watch)
        }
        Err(failure) => {
            if let Some(keeper) = keeper {
                keeper.remove();
                keeper.dismiss();
            }
            Err(failure)
        }
    }
}

/// What the jail and the watch are connected by.
struct Pieces {
    api: Option<OwnedFd>,
    client: Option<OwnedFd>,
    sink: Sink,
    typed: Option<OwnedFd>,
    to_guest: (OwnedFd, OwnedFd),
    from_guest: (OwnedFd, OwnedFd),
    log: (OwnedFd, OwnedFd),
    end: (OwnedFd, OwnedFd),
}

/// `sockets` are those the keeper made: for the API first, then for the console, then for the
/// console of the monitor's own.
fn gather(parts: &mut Parts, sockets: Vec<OwnedFd>) -> Result<Pieces, Failure> {
    let mut made = sockets.into_iter();
    let (api, client) = match (&parts.api_sock, parts.listener.take()) {
        (Some(path), _) => {
            let client = socket::connect(path)
                .doing(format_args!("connect to the API socket {}", path.display()))?;
            (made.next(), Some(client))
        }
        (None, Some((listener, client))) => (Some(listener), Some(client)),
        (None, None) => (None, None),
    };
    let sink = match &parts.console {
        args::Console::Terminal => Sink::output(std::io::stdout().as_fd()),
        args::Console::None => Sink::Nowhere,
        args::Console::File(path) => Sink::File(opening::open_to_append(path, "--console")?),
        args::Console::Socket(_) => match made.next() {
            Some(listener) => Sink::socket(listener),
            None => return Err(Failure::new("make the console's socket", "there is none")),
        },
    };
    if let (Some(machine), Some(listener)) = (&mut parts.machine, made.next()) {
        machine.set_socket(listener);
    }
    let typed = matches!(parts.console, args::Console::Terminal)
        .then(|| rustix::io::fcntl_dupfd_cloexec(std::io::stdin(), 3).ok())
        .flatten();
    let pipe = |reader_waits| {
        console::pipe(reader_waits, !reader_waits).doing("make pipes to and from the monitor")
    };
    Ok(Pieces {
        api,
        client,
        sink,
        typed,
        to_guest: pipe(true)?,
        from_guest: pipe(false)?,
        log: pipe(false)?,
        end: pipe(false)?,
    })
}

fn start(
    mut parts: Parts,
    pieces: Pieces,
    doors: Entrances,
    signals: OwnedFd,
    own: OwnedFd,
) -> Result<Watch, Failure> {
    let (tap, announcement) = tap_of(&mut parts);
    let mut more = ["--level", "Info", "--show-level"]
        .map(str::to_owned)
        .to_vec();
    let longest = parts.machine.as_ref().map_or(0, Machine::longest_body);
    if longest > PAYLOAD {
        more.extend(["--http-api-max-payload-size".into(), longest.to_string()]);
    }
    let asked_us = sys::monotonic_us().saturating_sub(parts.began_us);
    let plan = jail::Plan {
        id: parts.id,
        owner: parts.owner,
        as_root: parts.as_root,
        monitor: parts.monitor,
        monitor_name: parts.monitor_name,
        console: (pieces.to_guest.0, pieces.from_guest.1),
        log: pieces.log.1,
        end: pieces.end.1,
        kvm: parts.kvm,
        api: pieces.api,
        doors: doors.v1,
        tap,
        file_size: parts.file_size,
        open_files: parts.open_files,
        more,
        parent: own,
        obstacle: refusal::here(),
    };
    let obstacle = plan.obstacle;
    let (jail, theirs) = Channel::pair().doing("make the jail")?;
    let (pid, pidfd) = match sys::clone(jail::NAMESPACES, doors.v2.as_ref().map(AsFd::as_fd))
        .map_err(refusal::of_namespaces)?
    {
        Clone::Child => {
            // Ours is the other end: when the supervisor's is closed, it is gone.
            drop(jail);
            let failure = jail::enter(&plan, &theirs);
            let _ = theirs.send(jail::FAILED, &failure.to_string(), &[]);
            sys::exit_now(1)
        }
        Clone::Parent(pid, pidfd) => (pid, pidfd),
    };
    drop(theirs);
    let explain = |failure| refusal::explain(failure, obstacle);
    let doomed = settle(&plan, &jail, pid).err().map(explain);
    drop(plan);
    let announcement = if parts.quiet {
        String::new()
    } else {
        announcement.replace("@PID@", &pid.as_raw_nonzero().to_string())
    };
    Ok(Watch {
        kills_before: exclusive::kills_around(),
        enders: parts.enders,
        began_us: parts.began_us,
        asked_us,
        pid,
        pidfd,
        jail,
        keeper: None,
        limited_us: None,
        machine: parts.machine,
        console: Console::new(
            Relay::new(pieces.from_guest.0, pieces.sink),
            pieces.to_guest.1,
            pieces.typed,
        ),
        log: Log::new(Relay::new(pieces.log.0, parts.log), parts.only_troubles),
        end: pieces.end.0,
        signals,
        client: pieces.client.map(Client::new),
        time_limit_us: parts.timeout.map(|limit| limit.as_micros() as u64),
        on_first_byte: parts.on_first_byte,
        announcement,
        doomed,
    })
}

/// What the process in the jail waits for.
fn settle(plan: &jail::Plan, jail: &Channel, pid: Pid) -> Result<(), Failure> {
    jail::map_owner(pid, plan.owner, plan.as_root)?;
    jail.send(jail::MAPPED, "", &[])
        .doing("speak to the jail")?;
    if let Some(Tap::Auto(block)) = &plan.tap {
        network::connect_outside(*block, pid)?;
        jail.send(jail::CONNECTED, "", &[])
            .doing("speak to the jail")?;
    }
    Ok(())
}
