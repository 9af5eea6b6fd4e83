//! From a specification to a microVM that is watched: starts the keeper, makes the jail, and gathers
//! what the supervisor will watch.
//!
//! What can fail is done before the jail is asked for, as far as it goes; what fails afterwards dooms
//! the watch, which then ends the process in the jail in the same way as always.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use mayfly::wire::Client;
use mayfly::wire::limits::BODY_MAX;
use rustix::process::{Pid, PidfdFlags};

use super::warm::{self, Chosen};
use super::{Progress, Watch};
use crate::cgroup::exclusive::{self, Entrances};
use crate::console::{self, Console, Relay, Sink};
use crate::error::{Advice as _, AnyError, Failure, Step as _};
use crate::run::agent::Agent;
use crate::run::channel::Channel;
use crate::run::jail::{self, explained, obstacle};
use crate::run::keeper::{Assignment, Keeper};
use crate::run::network::{self, Network, namespace};
use crate::run::outcome::report::Report;
use crate::run::spec::Spec;
use crate::run::spec::options::Console as To;
use crate::run::spec::vm::Vm;
use crate::sys;

/// Starts it.
pub fn start(mut spec: Spec, report: Option<&Report>) -> Result<Watch, AnyError> {
    // A signal from here on is answered by the watch.
    let signals = sys::watch_signals().step("hold back signals")?;
    let own = rustix::process::getpid();
    let own = rustix::process::pidfd_open(own, PidfdFlags::empty())
        .step("get a descriptor of this process")
        .advise("use Linux 5.10 or newer")?;
    let options = &spec.watch.options;
    let mut sockets: Vec<_> = [&options.api_sock, &options.console_socket]
        .into_iter()
        .flatten()
        .cloned()
        .collect();
    if spec.watch.guest.is_some() {
        options.place.make()?;
        sockets.push(options.place.socket(&spec.watch.id));
    }
    // Whoever makes one changes the folder that it works in.
    for path in &mut sockets {
        if let Ok(absolute) = std::path::absolute(&path) {
            *path = absolute;
        }
    }
    let assignment = Assignment {
        groups: spec.cgroups.take(),
        sockets,
        report: None,
        id: spec.watch.id.clone(),
        began_us: spec.watch.began_us,
    };
    let has_groups = assignment.groups.is_some();
    let keeper = Keeper::start(assignment, report, &own)?;
    let made = keeper.as_ref().map_or(Ok(Default::default()), Keeper::made);
    let limited_us = has_groups.then(|| sys::monotonic_us().saturating_sub(spec.watch.began_us));
    match made.and_then(|(sockets, entrances)| make_jail(spec, sockets, entrances, signals, own)) {
        Ok(mut watch) => {
            watch.progress.times.limited_us = limited_us;
            let told = keeper
                .as_ref()
                .map(|keeper| keeper.watch(watch.pidfd.as_fd()));
            if let Some(Err(error)) = told {
                watch.give_up(error.into());
            }
            watch.keeper = keeper;
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

/// The API socket, if it has a name outside, and a connection to it. `made` is the one at a path.
fn connect(
    spec: &mut Spec,
    made: &mut impl Iterator<Item = OwnedFd>,
) -> Result<(Option<OwnedFd>, Option<Client>), Failure> {
    if let Some(path) = &spec.watch.options.api_sock {
        let client = Client::connect(path).step_on("connect to the API socket", path)?;
        return Ok((made.next(), Some(client)));
    }
    let Some((listener, client)) = spec.listener.take() else {
        return Ok((None, None));
    };
    let client = Client::new(UnixStream::from(client));
    let client = client.step("use the API socket that was passed (LISTEN_FDS)")?;
    Ok((Some(listener), Some(client)))
}

/// `sockets` are those the keeper made: for the API first, then for clients of the console, and last for
/// those of the guest's agent.
fn make_jail(
    mut spec: Spec,
    sockets: Vec<OwnedFd>,
    entrances: Entrances,
    signals: OwnedFd,
    own: OwnedFd,
) -> Result<Watch, AnyError> {
    let mut sockets = sockets;
    let for_agent = spec.watch.guest.as_ref().and_then(|_| sockets.pop());
    let mut sockets = sockets.into_iter();
    let (api, client) = connect(&mut spec, &mut sockets)?;
    let mut watched = spec.watch;
    // Many that are started at once find each a place of its own.
    let seed = (sys::monotonic_us() as u32).wrapping_mul(0x9e37_79b1) ^ std::process::id();
    let saved_mac = watched.vm.as_ref().and_then(Vm::saved_mac);
    let network = match (spec.own_tap, saved_mac) {
        (Some(tap), Some(mac)) => Some(Network::of_saved(tap, mac)?),
        (tap, _) => tap.map(|tap| Network::choose(tap, seed)),
    };
    // Without a file for it, the log is for a person: what needs attention.
    let level = spec.log.as_ref().map_or("Warning", |_| "Info");
    let mut more = vec!["--level".to_owned(), level.into(), "--show-level".into()];
    let mut progress = Progress::default();
    if watched.options.snapshot_to.is_some() {
        progress.snapshots.is_wanted = true;
        more.push("--boot-timer".into());
    }
    if let Some(vm) = &mut watched.vm {
        if let Some(socket) = sockets.next() {
            vm.set_console_socket(socket);
        }
        if let Some(network) = network {
            vm.set_guest_address(&network.words(), network.mac());
        }
        // A tap is still to be named in it, and what an agent needs.
        let length = vm.request().len() + 768;
        if length > BODY_MAX {
            more.extend(["--http-api-max-payload-size".into(), length.to_string()]);
        }
    }
    // The monitor has it before any client can ask for anything.
    let console_socket = sockets.next();
    let has_command = watched.guest.is_some();
    let mut redirected = None;
    let (mut making, mut template) = (None, None);
    let agent = match watched.guest.take() {
        Some((mut plan, initramfs)) => {
            if let Some(path) = &watched.options.net_namespace
                && let Some((tap, interface, hold)) = namespace::take_over(
                    path,
                    watched.options.is_reachable_from_namespace,
                    own.as_fd(),
                )?
            {
                if let Some(vm) = &mut watched.vm {
                    vm.set_interface(tap, interface.mac, interface.mtu);
                }
                plan.interface = Some(interface);
                redirected = Some(hold);
            }
            let chosen = match (&watched.options.template, &watched.vm) {
                (Some(folder), Some(vm)) => {
                    let monitor = spec.jail.monitor.file().as_fd();
                    let (chosen, told) =
                        warm::choose(folder, vm, monitor, initramfs.as_fd(), &mut plan)?;
                    told.write(spec.log.as_ref());
                    progress.seen.copied = Some((told.is_copy, told.note));
                    chosen
                }
                _ => Chosen::Boot,
            };
            let (agent, link) = Agent::new(&plan, for_agent, chosen.beginning())?;
            if let Some(vm) = &mut watched.vm {
                vm.set_agent(initramfs, link);
            }
            (making, template) = chosen.apply(&mut watched.vm)?;
            Some(agent)
        }
        None => None,
    };
    let is_terminal = watched.options.console == To::Terminal && !has_command;
    let typed = is_terminal.then(|| console::input(std::io::stdin().as_fd()));
    let pipe = |reader_waits| {
        console::pipe(reader_waits, !reader_waits).step("make pipes to and from the monitor")
    };
    let (to_guest, from_guest, log, end) = (pipe(true)?, pipe(false)?, pipe(false)?, pipe(false)?);
    progress.times.asked_us = Some(sys::monotonic_us().saturating_sub(watched.began_us));
    let plan = jail::Plan {
        spec: spec.jail,
        console: (to_guest.0, from_guest.1),
        log: log.1,
        end: end.1,
        api,
        console_socket,
        entrances: entrances.v1,
        network,
        more,
        parent: own,
        obstacle: obstacle::here(),
    };
    let found = plan.obstacle;
    let (jail, theirs) = Channel::pair().step("make the jail")?;
    let group = entrances.v2.as_ref().map(AsFd::as_fd);
    let Some((pid, pidfd)) = sys::clone(jail::NAMESPACES, group)
        .map_err(|error| obstacle::no_namespaces(error, found))?
    else {
        // The supervisor's end: when it is closed there, the supervisor is gone.
        drop(jail);
        let Err(failure) = jail::enter(&plan, &theirs);
        let _ = theirs.send(jail::FAILED, &explained(&failure, found), &[]);
        sys::exit_now(1)
    };
    drop(theirs);
    let released = release(&plan, &jail, pid);
    drop(plan);
    let console = match spec.console {
        Some(file) => Sink::File(file),
        None if has_command => Sink::Tail(Vec::new()),
        None if is_terminal => Sink::output(std::io::stdout().as_fd()),
        None => Sink::Nowhere,
    };
    let to_log = spec.log.map(Sink::File);
    let to_log = to_log.unwrap_or_else(|| Sink::output(std::io::stderr().as_fd()));
    let announced = network.filter(|_| !watched.options.quiet);
    let console = Relay::new(Some(from_guest.0), console);
    let mut watch = Watch {
        spec: watched,
        pid,
        pidfd,
        jail,
        keeper: None,
        console: Console::new(console, typed.flatten(), to_guest.1),
        log: Relay::new(Some(log.0), to_log),
        agent,
        making,
        template,
        redirected,
        end: end.0,
        signals,
        client,
        kills_before: exclusive::kills_around(),
        announcement: announced.map_or(String::new(), |it| it.announcement(pid)),
        progress,
    };
    if let Err(failure) = released {
        watch.give_up(explained(&failure, found).into());
    }
    Ok(watch)
}

/// Does what the process in the jail waits for.
fn release(plan: &jail::Plan, jail: &Channel, pid: Pid) -> Result<(), Failure> {
    jail::map_owner(pid, plan.spec.owner, plan.spec.as_root)?;
    let tell = |kind| jail.send(kind, "", &[]).step("speak to the jail");
    tell(jail::MAPPED)?;
    if let Some(Network::Auto(block)) = plan.network {
        network::connect_outside(block, pid)?;
        tell(jail::CONNECTED)?;
    }
    Ok(())
}
