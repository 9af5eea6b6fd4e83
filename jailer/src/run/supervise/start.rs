//! From a specification to a microVM that is watched: starts the keeper, makes the jail, and gathers
//! what the supervisor will watch.
//!
//! What can fail is done before the jail is asked for, as far as it goes; what fails afterwards dooms
//! the watch, which then ends the process in the jail in the same way as always.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use mayfly::wire::limits::BODY_MAX;
use mayfly::wire::{Client, ClientError};
use rustix::io::Errno;
use rustix::process::Pid;

use super::Watch;
use crate::cgroup::exclusive::{self, Entrances};
use crate::error::{AnyError, Remedy, Reported};
use crate::run::channel::Channel;
use crate::run::console::{self, Console, Relay, Sink};
use crate::run::jail::obstacle::{self, NamespacesError};
use crate::run::jail::{self, JailError, step};
use crate::run::keeper::{self, Keeper};
use crate::run::network::{self, Network};
use crate::run::outcome::Report;
use crate::run::spec::Spec;
use crate::sys::{self, Clone};

/// The microVM cannot be prepared.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("cannot hold back signals")]
    Signals(#[source] Errno),
    #[error("cannot connect to the API socket {0}")]
    Connect(PathBuf, #[source] ClientError),
    #[error("cannot use the API socket that was passed (LISTEN_FDS)")]
    Passed(#[source] ClientError),
    #[error("cannot make pipes to and from the monitor")]
    Pipes(#[source] Errno),
}

impl Remedy for StartError {}

/// Starts it.
pub fn start(mut spec: Spec, report: Option<&Report>) -> Result<Watch, AnyError> {
    // A signal from here on is answered by the watch.
    let signals = sys::watch_signals().map_err(StartError::Signals)?;
    let own = keeper::own_descriptor()?;
    let sockets: Vec<PathBuf> = [&spec.api_sock, &spec.console_socket]
        .into_iter()
        .flatten()
        .cloned()
        .collect();
    let groups = spec.cgroups.take();
    let has_groups = groups.is_some();
    let keeper = if has_groups || !sockets.is_empty() || report.is_some() {
        let report = report.map(|report| (report, spec.id.as_str(), spec.began_us));
        Some(Keeper::start(groups, sockets, report, &own)?)
    } else {
        None
    };
    let made = keeper.as_ref().map_or(Ok(Default::default()), Keeper::made);
    let limited_us = has_groups.then(|| sys::monotonic_us().saturating_sub(spec.began_us));
    let result = made.and_then(|(sockets, entrances)| {
        let connections = connect(&mut spec, sockets)?;
        make_jail(spec, connections, entrances, signals, own)
    });
    match result {
        Ok(mut watch) => {
            watch.limited_us = limited_us;
            if let Some(keeper) = keeper {
                if let Err(error) = keeper.watch(watch.pidfd.as_fd()) {
                    watch.doomed.get_or_insert(error.into());
                }
                watch.keeper = Some(keeper);
            }
            Ok(watch)
        }
        Err(error) => {
            if let Some(keeper) = keeper {
                keeper.remove();
                keeper.dismiss();
            }
            Err(error)
        }
    }
}

/// What connects the jail and the watch.
struct Connections {
    api: Option<OwnedFd>,
    client: Option<Client>,
    typed: Option<OwnedFd>,
    to_guest: (OwnedFd, OwnedFd),
    from_guest: (OwnedFd, OwnedFd),
    log: (OwnedFd, OwnedFd),
    end: (OwnedFd, OwnedFd),
}

/// `sockets` are those the keeper made: for the API first, then for clients of the console.
fn connect(spec: &mut Spec, sockets: Vec<OwnedFd>) -> Result<Connections, StartError> {
    let mut made = sockets.into_iter();
    let (api, client) = match (&spec.api_sock, spec.listener.take()) {
        (Some(path), _) => {
            let client = Client::connect(path);
            let client = client.map_err(|error| StartError::Connect(path.clone(), error))?;
            (made.next(), Some(client))
        }
        (None, Some((listener, client))) => {
            let client = Client::new(UnixStream::from(client)).map_err(StartError::Passed)?;
            (Some(listener), Some(client))
        }
        (None, None) => (None, None),
    };
    if let (Some(vm), Some(socket)) = (&mut spec.vm, made.next()) {
        vm.set_console_socket(socket);
    }
    let typed = spec
        .on_terminal
        .then(|| rustix::io::fcntl_dupfd_cloexec(std::io::stdin(), 3).ok())
        .flatten();
    let pipe = |reader_waits| console::pipe(reader_waits, !reader_waits).map_err(StartError::Pipes);
    Ok(Connections {
        api,
        client,
        typed,
        to_guest: pipe(true)?,
        from_guest: pipe(false)?,
        log: pipe(false)?,
        end: pipe(false)?,
    })
}

fn make_jail(
    mut spec: Spec,
    connections: Connections,
    entrances: Entrances,
    signals: OwnedFd,
    own: OwnedFd,
) -> Result<Watch, AnyError> {
    // Many that are started at once find each a place of its own.
    let seed = (sys::monotonic_us() as u32).wrapping_mul(0x9e37_79b1) ^ std::process::id();
    let network = spec.own_tap.map(|tap| Network::choose(tap, seed));
    // Without a file for it, the log is for a person: what needs attention.
    let level = if spec.log.is_some() {
        "Info"
    } else {
        "Warning"
    };
    let mut more = vec!["--level".to_owned(), level.into(), "--show-level".into()];
    if let Some(vm) = &mut spec.vm {
        if let Some(network) = network {
            vm.set_guest_address(&network.words(), network.mac());
        }
        // A tap is still to be named in it.
        let length = vm.request().len() + 256;
        if length > BODY_MAX {
            more.extend(["--http-api-max-payload-size".into(), length.to_string()]);
        }
    }
    let asked_us = sys::monotonic_us().saturating_sub(spec.began_us);
    let plan = jail::Plan {
        id: spec.id,
        owner: spec.owner,
        as_root: spec.as_root,
        monitor: spec.monitor,
        monitor_path: spec.monitor_path,
        console: (connections.to_guest.0, connections.from_guest.1),
        log: connections.log.1,
        end: connections.end.1,
        kvm: spec.kvm,
        api: connections.api,
        entrances: entrances.v1,
        network,
        file_size: spec.file_size,
        open_files: spec.open_files,
        more,
        parent: own,
        obstacle: obstacle::here(),
    };
    let found = plan.obstacle;
    let (jail, theirs) = Channel::pair().map_err(step("make the jail"))?;
    let (pid, pidfd) = match sys::clone(jail::NAMESPACES, entrances.v2.as_ref().map(AsFd::as_fd))
        .map_err(|error| NamespacesError::of(error, found))?
    {
        Clone::Child => {
            // The supervisor's end: when it is closed there, the supervisor is gone.
            drop(jail);
            let text = jail::enter(&plan, &theirs).explained(found);
            let _ = theirs.send(jail::FAILED, &text, &[]);
            sys::exit_now(1)
        }
        Clone::Parent(pid, pidfd) => (pid, pidfd),
    };
    drop(theirs);
    let doomed = release(&plan, &jail, pid).err();
    let doomed = doomed.map(|error| Reported(error.explained(found)).into());
    drop(plan);
    let console = spec.console.map_or(
        if spec.on_terminal {
            Sink::output(std::io::stdout().as_fd())
        } else {
            Sink::Nowhere
        },
        Sink::File,
    );
    let log = spec
        .log
        .map_or_else(|| Sink::output(std::io::stderr().as_fd()), Sink::File);
    let announced = network.filter(|_| !spec.quiet);
    Ok(Watch {
        began_us: spec.began_us,
        asked_us,
        pid,
        pidfd,
        jail,
        keeper: None,
        limited_us: None,
        vm: spec.vm,
        console: Console::new(
            Relay::new(connections.from_guest.0, console),
            connections.to_guest.1,
            connections.typed,
        ),
        log: Relay::new(connections.log.0, log),
        end: connections.end.0,
        signals,
        client: connections.client,
        enders: spec.enders,
        kills_before: exclusive::kills_around(),
        time_limit_us: spec.timeout.map(|limit| limit.as_micros() as u64),
        first_reply: spec.first_reply,
        announcement: announced.map_or(String::new(), |it| it.announcement(pid)),
        doomed,
    })
}

/// Does what the process in the jail waits for.
fn release(plan: &jail::Plan, jail: &Channel, pid: Pid) -> Result<(), JailError> {
    jail::map_owner(pid, plan.owner, plan.as_root)?;
    let tell = |kind| jail.send(kind, "", &[]).map_err(step("speak to the jail"));
    tell(jail::MAPPED)?;
    if let Some(Network::Auto(block)) = plan.network {
        network::connect_outside(block, pid)?;
        tell(jail::CONNECTED)?;
    }
    Ok(())
}
