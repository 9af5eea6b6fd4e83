//! The commands: what each does with a container, in the order in which a container meets them.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Child;

use oci_spec::runtime::LinuxResources;
use serde_json::{Value, json};
use signal_hook::consts::{SIGCONT, SIGHUP, SIGINT, SIGKILL, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2};
use signal_hook::iterator::Signals;

use crate::args::{self, Command, Create, Global};
use crate::error::{AnyError, Log, Step as _};
use crate::host::Host;
use crate::input;
use crate::jailer::Jailer;
use crate::lifecycle::{self, Kind, Status, groups, status};
use crate::process;
use crate::state::{self, Held, Record, Sandbox, StateError};
use crate::templates;

mod exec;

/// How long the resources of `update` may be.
const RESOURCES_MAX: u64 = 1 << 20;

/// A container is not in the state that a command needs.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    // Engines look for these words.
    #[error("cannot {0} the container: container not running")]
    NotRunning(&'static str),
    #[error("cannot {0} the container: it is {1}")]
    State(&'static str, &'static str),
    #[error("cannot change the container: it has no control groups (linux.cgroupsPath)")]
    NoGroups,
    #[error(
        "cannot run a process in the sandbox of a pod: it has no guest; name the container in the pod"
    )]
    NoGuest,
    #[error("cannot write {0}: it is there already")]
    ConfigExists(PathBuf),
}

/// Does what was asked for; the exit code.
pub fn execute(global: &Global, command: Command, log: &Log) -> Result<u8, AnyError> {
    let host = || Host::new(global);
    match command {
        Command::Help => print(args::HELP)?,
        Command::Version => print(&templates::version())?,
        Command::Features => print(&pretty(&templates::features()))?,
        Command::Spec(bundle) => spec(&bundle)?,
        Command::Create(create) => {
            lifecycle::create(&host()?, log, &create, global, Kind::Created)?;
        }
        Command::Run(create, is_detached) => {
            return run(&host()?, log, &create, global, is_detached);
        }
        Command::Start(id) => start(&host()?, log, &id)?,
        Command::State(id) => print_state(&host()?, &id)?,
        Command::Kill(id, signal) => kill(&host()?, &id, signal)?,
        Command::Delete(id, is_forced) => delete(&host()?, log, &id, is_forced)?,
        Command::Exec(exec) => return exec::exec(&host()?, exec),
        Command::Ps(id, as_json) => ps(&host()?, &id, as_json)?,
        Command::Pause(id) => freeze(&host()?, &id, true)?,
        Command::Resume(id) => freeze(&host()?, &id, false)?,
        Command::Update(id, file) => update(&host()?, log, &id, file.as_deref())?,
    }
    Ok(0)
}

fn print(text: &str) -> Result<(), AnyError> {
    Ok(std::io::stdout().write_all(text.as_bytes()).step("print")?)
}

fn pretty(value: &Value) -> String {
    format!("{value:#}\n")
}

fn spec(bundle: &Path) -> Result<(), AnyError> {
    let path = bundle.join("config.json");
    let mut file = match File::options().write(true).create_new(true).open(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            return Err(CommandError::ConfigExists(path).into());
        }
        opened => opened.step_on("make", &path)?,
    };
    Ok(file
        .write_all(pretty(&templates::config()).as_bytes())
        .step_on("write", &path)?)
}

/// What a command works on.
struct Target {
    record: Record,
    folder: PathBuf,
    jailer: Jailer,
    status: Status,
}

impl Target {
    fn find(host: &Host, id: &str) -> Result<Target, AnyError> {
        Target::of(host, state::read(&host.root, id)?)
    }

    fn of(host: &Host, record: Record) -> Result<Target, AnyError> {
        let jailer = Jailer::find()?;
        let status = status(&host.root, &record, &jailer);
        let folder = state::folder(&host.root, &record.id);
        Ok(Target {
            record,
            folder,
            jailer,
            status,
        })
    }

    /// Makes sure of its state.
    fn needs(&self, work: &'static str, wanted: Status) -> Result<(), CommandError> {
        match self.status {
            found if found == wanted => Ok(()),
            Status::Stopped => Err(CommandError::NotRunning(work)),
            found => Err(CommandError::State(work, found.name())),
        }
    }

    fn ask(&self, request: &str, more: &[&str]) -> Result<String, AnyError> {
        self.jailer
            .ask(&self.folder, &self.record.id, request, more)
    }
}

fn start(host: &Host, log: &Log, id: &str) -> Result<(), AnyError> {
    start_held(host, log, &mut state::hold(&host.root, id)?)
}

/// Has all of a container stand still on the host, or go on.
fn freeze(host: &Host, id: &str, is_frozen: bool) -> Result<(), AnyError> {
    let held = state::hold(&host.root, id)?;
    let target = Target::find(host, id)?;
    match is_frozen {
        true => target.needs("pause", Status::Running)?,
        false => target.needs("resume", Status::Paused)?,
    }
    if held.record.groups.is_empty() {
        return Err(CommandError::NoGroups.into());
    }
    groups::of(&held.record)?.freeze(is_frozen)
}

fn print_state(host: &Host, id: &str) -> Result<(), AnyError> {
    let Target { record, status, .. } = Target::find(host, id)?;
    print(&pretty(&lifecycle::state_of(&record, status)))
}

fn kill(host: &Host, id: &str, signal: i32) -> Result<(), AnyError> {
    let record = state::read(&host.root, id)?;
    let pidfd = record.process.as_ref().and_then(process::Known::open);
    let Some(pidfd) = pidfd else {
        return Err(CommandError::NotRunning("signal").into());
    };
    if signal == SIGKILL || record.sandbox.is_some() {
        // The microVM ends whatever its guest does, and also where its process does not answer. A sandbox has none.
        process::send(&pidfd, signal).step("end the microVM")?;
        return match signal {
            SIGKILL => groups::of(&record)?.thaw(),
            _ => Ok(()),
        };
    }
    let target = Target::of(host, record)?;
    if target.status == Status::Stopped {
        return Err(CommandError::NotRunning("signal").into());
    }
    if target.status == Status::Paused {
        return Err(CommandError::State("signal", Status::Paused.name()).into());
    }
    let sent = target.ask("signal", &[&signal.to_string()]);
    match sent {
        // It may have ended meanwhile: engines look for these words.
        Err(_) if Target::find(host, id)?.status == Status::Stopped => {
            Err(CommandError::NotRunning("signal").into())
        }
        sent => sent.map(drop),
    }
}

fn delete(host: &Host, log: &Log, id: &str, is_forced: bool) -> Result<(), AnyError> {
    let held = match state::hold(&host.root, id) {
        // Engines delete twice.
        Err(error) if is_forced && matches!(error.downcast_ref(), Some(StateError::Missing)) => {
            return Ok(());
        }
        held => held?,
    };
    if !is_forced
        && let Some(known) = &held.record.process
        && known.is_there()
    {
        let found = status(&host.root, &held.record, &Jailer::find()?);
        // One that was never started may be removed.
        if !matches!(found, Status::Created | Status::Stopped) {
            return Err(CommandError::State("delete", found.name()).into());
        }
        // What its readers have not taken yet is not lost, nor its exit code.
        if found == Status::Stopped
            && let Some(pidfd) = known.open()
            && !process::wait(&pidfd, lifecycle::PATIENCE)
        {
            // A connection that is lost looks like the end of one that runs.
            let now = status(&host.root, &held.record, &Jailer::find()?);
            if matches!(now, Status::Running | Status::Paused) {
                return Err(CommandError::State("delete", now.name()).into());
            }
        }
    }
    lifecycle::destroy(host, held, log)
}

fn ps(host: &Host, id: &str, as_json: bool) -> Result<(), AnyError> {
    let target = Target::find(host, id)?;
    if matches!(target.status, Status::Stopped | Status::Creating) {
        return Err(CommandError::NotRunning("list the processes of").into());
    }
    // On this host, where engines look them up, the microVM is one process.
    let known = target.record.process.map(|known| known.pid);
    let pids: Vec<i32> = known.into_iter().collect();
    let table = || {
        pids.iter()
            .map(|pid| format!("{pid}\n"))
            .collect::<String>()
    };
    match as_json {
        true => print(&format!("{}\n", json!(pids))),
        false => print(&format!("PID\n{}", table())),
    }
}

fn update(host: &Host, log: &Log, id: &str, file: Option<&Path>) -> Result<(), AnyError> {
    let text = match file {
        Some(path) => input::read(path, RESOURCES_MAX).step_on("read", path)?,
        None => input::read_stream(std::io::stdin(), RESOURCES_MAX).step("read standard input")?,
    };
    let mut parser = serde_json::Deserializer::from_slice(&text);
    let resources: LinuxResources =
        serde_path_to_error::deserialize(&mut parser).step("understand the resources")?;
    let held = state::hold(&host.root, id)?;
    let target = Target::find(host, id)?;
    if target.status == Status::Stopped {
        return Err(CommandError::NotRunning("update").into());
    }
    if held.record.groups.is_empty() {
        return Err(CommandError::NoGroups.into());
    }
    lifecycle::update(host, &held, &resources, log)
}

/// Creates and starts a container, and waits for its end unless it is to be left alone.
fn run(
    host: &Host,
    log: &Log,
    create: &Create,
    global: &Global,
    is_detached: bool,
) -> Result<u8, AnyError> {
    let kind = if is_detached {
        Kind::Detached
    } else {
        Kind::Foreground
    };
    // A signal from here on is the container's, or ends the wait for it.
    let signals = Signals::new([SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2, SIGCONT]);
    let signals = signals.step("hold back signals")?;
    let (mut held, child) = lifecycle::create(host, log, create, global, kind)?;
    let started = start_held(host, log, &mut held);
    if let Err(error) = started {
        lifecycle::destroy(host, held, log)?;
        return Err(error);
    }
    if is_detached {
        return Ok(0);
    }
    drop(held);
    let code = wait(child, signals)?;
    // Another command may have removed it.
    match state::hold(&host.root, &create.id) {
        Ok(held) => lifecycle::destroy(host, held, log)?,
        Err(error) if matches!(error.downcast_ref(), Some(StateError::Missing)) => {}
        Err(error) => return Err(error),
    }
    Ok(code)
}

fn start_held(host: &Host, log: &Log, held: &mut Held) -> Result<(), AnyError> {
    let target = Target::find(host, &held.record.id)?;
    target.needs("start", Status::Created)?;
    if held.record.sandbox.is_some() {
        held.record.sandbox = Some(Sandbox::Started);
        held.write()?;
    } else {
        target.ask("start", &[])?;
    }
    let record = &held.record;
    let hooks = &record.hooks.poststart;
    // It may have ended already.
    let status = match record
        .process
        .as_ref()
        .is_some_and(process::Known::is_there)
    {
        true => Status::Running,
        false => Status::Stopped,
    };
    lifecycle::run_late_hooks("poststart", hooks, record, status, log);
    Ok(())
}

/// Passes signals on until the container ends; its exit code.
fn wait(mut child: Child, mut signals: Signals) -> Result<u8, AnyError> {
    use std::os::unix::process::ExitStatusExt as _;
    let handle = signals.handle();
    let pid = rustix::process::Pid::from_child(&child);
    let pidfd: Option<OwnedFd> =
        rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).ok();
    let passes = std::thread::spawn(move || {
        for signal in signals.forever() {
            if let Some(pidfd) = &pidfd {
                let _ = process::send(pidfd, signal);
            }
        }
    });
    let status = child.wait().step("wait for the container");
    handle.close();
    let _ = passes.join();
    let status = status?;
    let code = status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal));
    Ok(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(255))
}
