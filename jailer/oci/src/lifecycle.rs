//! A container from nothing to ready, and from whatever is left of it to nothing.
//!
//! `create` makes everything in one order, and `destroy` undoes whatever of it is there: the one way to
//! undo, also for a `create` that failed or was killed half-way.

pub mod groups;
mod making;
mod waiting;

use std::io::{IsTerminal as _, stdin, stdout};
use std::path::Path;
use std::process::Child;
use std::time::Duration;

use oci_spec::runtime::LinuxResources;
use rustix::fs::FlockOperation;
use serde_json::{Value, json};

use self::making::Making;
use crate::accounts::Accounts;
use crate::args::{Create, Global};
use crate::bundle::{self, Container, Network, resources};
use crate::cgroup::Home;
use crate::error::{self, AnyError, Level, Log};
use crate::hooks::{self, Hook};
use crate::host::Host;
use crate::jailer::{self, Jailer, Silence};
use crate::process::{self, Known};
use crate::state::{self, Held, Record, Sandbox};
use crate::templates;

/// How long a process that was killed may take to end.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// How long those that tidy up behind it may take, before they are killed too.
const TIDY: Duration = Duration::from_secs(5);

/// A container cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum LifecycleError {
    #[error(
        "cannot create the container: process.terminal is true, and there is no --console-socket to send it to"
    )]
    NoConsoleSocket,
    #[error(
        "cannot create the container: --console-socket is given, and process.terminal is false"
    )]
    NoTerminal,
    #[error(
        "cannot create the container: its guest was not ready after {0} seconds (\"ready_seconds\" in oci.json)"
    )]
    NotReady(u64),
    #[error("cannot remove the container {0}: its process {1} does not end")]
    DoesNotEnd(String, i32),
}

/// How a container is to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// By `create`, for an engine, which has its standard streams. This program does nothing more then.
    Created,
    /// By `run --detach`, which starts it.
    Detached,
    /// For the program that waits for it, with which it ends.
    Foreground,
}

/// What a container is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    Creating,
    Created,
    Running,
    Paused,
    Stopped,
}

impl Status {
    /// Its name, as engines read it.
    pub fn name(self) -> &'static str {
        match self {
            Status::Creating => "creating",
            Status::Created => "created",
            Status::Running => "running",
            Status::Paused => "paused",
            Status::Stopped => "stopped",
        }
    }
}

/// Finds out what a container is, from its process.
pub fn status(root: &Path, record: &Record, jailer: &Jailer) -> Status {
    let folder = state::folder(root, &record.id);
    let Some(process) = &record.process else {
        return match is_being_made(&folder) {
            true => Status::Creating,
            false => Status::Stopped,
        };
    };
    if !process.is_there() {
        return Status::Stopped;
    }
    // It answers nothing then.
    if groups::of(record).is_ok_and(|groups| groups.is_frozen()) {
        return Status::Paused;
    }
    match record.sandbox {
        Some(Sandbox::Created) => return Status::Created,
        Some(Sandbox::Started) => return Status::Running,
        None => {}
    }
    let answer = jailer.state(&folder, &record.id);
    match answer.as_ref().map(|answer| answer.status.as_str()) {
        Ok("created") => Status::Created,
        Ok("running") => Status::Running,
        Ok("paused") => Status::Paused,
        Ok("stopped") => Status::Stopped,
        // Its guest has ended, and its process is about to.
        Err(Silence::Gone) if record.is_made => Status::Stopped,
        _ if process.is_there() => Status::Creating,
        _ => Status::Stopped,
    }
}

/// Whether a `create` has hold of it.
fn is_being_made(folder: &Path) -> bool {
    let lock = std::fs::File::open(folder);
    lock.is_ok_and(|lock| rustix::fs::flock(&lock, FlockOperation::NonBlockingLockShared).is_err())
}

/// Makes a container, whose guest, unless it is the sandbox of a pod, is ready then. On an error nothing is left of it.
pub fn create(
    host: &Host,
    log: &Log,
    create: &Create,
    global: &Global,
    kind: Kind,
) -> Result<(Held, Child), AnyError> {
    let bundle = std::path::absolute(&create.bundle)?;
    let mut container = bundle::read(&bundle)?;
    if global.has_no_network {
        container.network = Network::None;
    }
    if global.has_no_groups {
        container.cgroup = None;
    }
    groups::check(&container, global)?;
    if kind == Kind::Foreground && create.console_socket.is_none() {
        leave_out_missing_terminal(&mut container);
    }
    check_terminal(&container, create, kind)?;
    let kernel = host.kernel()?;
    let jailer = match kind {
        Kind::Created | Kind::Detached => Jailer::find()?,
        Kind::Foreground => Jailer::find()?.apart(),
    };
    let home = Home::find()?;
    let mut record = Record {
        id: create.id.clone(),
        bundle,
        created: error::now(),
        annotations: container.annotations.clone(),
        hooks: container.hooks.clone(),
        ..Record::default()
    };
    let limits = groups::plan(&mut container, host.user, global, &mut record)?;
    let mut held = state::create(&host.root, record)?;
    let making = Making {
        host,
        container: &container,
        create,
        kind,
        kernel,
        jailer,
        home: &home,
        limits,
    };
    let made = match container.is_sandbox {
        true => making.make_sandbox(&mut held, log),
        false => making.make(&mut held, log),
    };
    match made {
        Ok(child) => {
            // What this program goes on with is not the container's. A move between groups can take 20 ms.
            if kind != Kind::Created {
                home.enter();
            }
            Ok((held, child))
        }
        Err(error) => {
            home.enter();
            if let Err(left) = destroy(host, held, log) {
                log.write(Level::Error, &error::message(&*left));
            }
            Err(error)
        }
    }
}

/// The config.json that `spec` writes asks for a terminal, which programs that start from it (Ray) leave as it
/// is: who waits for the container without one gets its streams as they are.
fn leave_out_missing_terminal(container: &mut Container) {
    if container.has_terminal && !(stdin().is_terminal() && stdout().is_terminal()) {
        container.has_terminal = false;
        container.process.insert("terminal".into(), false.into());
        let note = "process.terminal is left out: standard input and output are no terminal";
        container.notes.push(note.into());
    }
}

fn check_terminal(
    container: &Container,
    create: &Create,
    kind: Kind,
) -> Result<(), LifecycleError> {
    match (container.has_terminal, &create.console_socket) {
        (true, None) if kind != Kind::Foreground => Err(LifecycleError::NoConsoleSocket),
        (false, Some(_)) => Err(LifecycleError::NoTerminal),
        _ => Ok(()),
    }
}

/// A container's state, as engines and hooks read it.
pub fn state_of(record: &Record, status: Status) -> Value {
    let process = record.process.as_ref();
    let process = process.filter(|_| status != Status::Stopped);
    json!({
        "ociVersion": templates::OCI_VERSION,
        "id": record.id,
        "status": status.name(),
        "pid": process.map_or(0, |known| known.pid),
        "bundle": record.bundle,
        "rootfs": record.bundle.join("rootfs"),
        "created": record.created,
        "annotations": record.annotations,
    })
}

fn state_text(record: &Record, status: Status) -> Vec<u8> {
    state_of(record, status).to_string().into_bytes()
}

/// Runs hooks whose failure changes nothing but the log.
pub fn run_late_hooks(name: &str, list: &[Hook], record: &Record, status: Status, log: &Log) {
    let state = state_text(record, status);
    hooks::run_each(name, list, &state, |error| {
        log.write(Level::Warning, &error::message(&*error));
    });
}

/// Ends what is left of a container, and removes it.
pub fn destroy(host: &Host, held: Held, log: &Log) -> Result<(), AnyError> {
    let known = match &held.record.process {
        Some(known) => vec![known.clone()],
        // Its create was killed before it could write which one it is.
        None => started_in(held.path(), &held.record.id),
    };
    for known in known {
        let Some(pidfd) = known.open() else {
            continue;
        };
        let _ = process::send(&pidfd, 9);
        // One that stands still ends when it goes on.
        if let Ok(groups) = groups::of(&held.record) {
            groups.thaw()?;
        }
        if !process::wait(&pidfd, PATIENCE) {
            return Err(LifecycleError::DoesNotEnd(held.record.id.clone(), known.pid).into());
        }
    }
    groups::remove(host.user, &held)?;
    if let Some(uid) = held.record.uid
        && let Some(accounts) = Accounts::of(host.user, host.settings.uids)
    {
        accounts.give_back(uid, held.path());
    }
    // Before the folder goes: who is killed here leaves them to the next `delete`.
    let record = &held.record;
    run_late_hooks(
        "poststop",
        &record.hooks.poststop,
        record,
        Status::Stopped,
        log,
    );
    held.remove()
}

/// Processes that were started for the container whose folder this is.
fn started_in(folder: &Path, id: &str) -> Vec<Known> {
    // The link to a process's folder has no links in it.
    let Ok(folder) = std::fs::canonicalize(folder) else {
        return Vec::new();
    };
    let found = process::with_words(&["--id", id, "--runtime-dir", jailer::RUNTIME]);
    let is_ours = |known: &Known| {
        std::fs::read_link(format!("/proc/{}/cwd", known.pid)).is_ok_and(|cwd| cwd == folder)
    };
    found.into_iter().filter(is_ours).collect()
}

/// Changes limits of a container that runs.
pub fn update(
    host: &Host,
    held: &Held,
    resources: &LinuxResources,
    log: &Log,
) -> Result<(), AnyError> {
    let mut notes = Vec::new();
    resources::check(resources, &mut notes)?;
    groups::set(host.user, held, resources, &mut notes)?;
    notes
        .iter()
        .for_each(|note| log.write(Level::Warning, note));
    Ok(())
}
