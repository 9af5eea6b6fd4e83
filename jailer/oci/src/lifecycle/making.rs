//! What `create` makes, in its order.
//!
//! ```text
//!   without hooks:                        folder, user, disk, control groups, microVM
//!   with prestart or createRuntime hooks: folder, user, control groups, process that waits in its network
//!                                         namespace, hooks, disk, microVM
//!   the sandbox of a pod:                 folder, control groups, process that waits, hooks; it stays
//! ```
//!
//! A scope of systemd's ends when no process is in it: its groups are made right before the first of them starts.

use std::ffi::OsString;
use std::io::Read as _;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pipe::PipeFlags;

use super::waiting::{self, Waiting};
use super::{Kind, LifecycleError, Status, TIDY, groups, state_text};
use crate::accounts::Accounts;
use crate::args::Create;
use crate::bundle::{Container, Network, process_text, resources};
use crate::cgroup::Home;
use crate::error::{AnyError, Level, Log, Step as _};
use crate::hooks;
use crate::host::Host;
use crate::image::Disk;
use crate::input;
use crate::jailer::{self, Jailer, Machine, Told};
use crate::process::{self, Known};
use crate::state::{self, Held, Sandbox};

/// How long the jailer's report may be.
const REPORT_MAX: u64 = 1 << 20;

/// All that it takes.
pub struct Making<'a> {
    pub host: &'a Host,
    pub container: &'a Container,
    pub create: &'a Create,
    pub kind: Kind,
    pub kernel: PathBuf,
    pub jailer: Jailer,
    pub home: &'a Home,
    pub limits: Vec<String>,
}

/// The network namespace of the process that opens it.
const OWN_NETWORK: &str = "/proc/self/ns/net";

impl Making<'_> {
    /// Makes it; the process that stands for it.
    pub fn make(&self, held: &mut Held, log: &Log) -> Result<Child, AnyError> {
        let mut notes = self.container.notes.clone();
        if let Some(accounts) = Accounts::of(self.host.user, self.host.settings.uids) {
            let folder = held.path().to_owned();
            accounts.take(&folder, |uid| {
                held.record.uid = Some(uid);
                held.write()
            })?;
        }
        held.write_file(jailer::PROCESS, &process_text(&self.container.process)?)?;
        let (ready, told) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).step("make a pipe")?;
        // Also of a program that waits in the foreground: the engine's death alone does not end that one.
        let starter = process::starter(&self.host.settings.end_with);
        let passed: Vec<&OwnedFd> = [Some(&told), starter.as_ref()]
            .into_iter()
            .flatten()
            .collect();
        let waiting = self.run_hooks(held, &passed, &mut notes)?;
        // After the hooks, which may write there.
        let disk = Disk::of(&self.container.root, &self.host.settings, &mut notes)?;
        if waiting.is_none() {
            groups::enter(self.container, self.host.user, held, &mut notes)?;
        }
        notes
            .iter()
            .for_each(|note| log.write(Level::Warning, &format!("config.json: {note}")));
        let words = self.words(held, disk.path(), &told, starter.as_ref(), &waiting)?;
        let mut child = match waiting {
            Some(waiting) => waiting.go(&words)?,
            None => self.start(held, &words, &passed)?,
        };
        drop(starter);
        drop(told);
        if let Err(error) = self.wait_until_ready(held, ready) {
            // It is this process's child: no other waits for it.
            let _ = child.kill();
            let _ = child.wait();
            return Err(error);
        }
        held.record.is_made = true;
        held.write()?;
        if let Some(path) = &self.create.pid_file {
            state::replace(path, child.id().to_string().as_bytes(), 0o644)?;
        }
        Ok(child)
    }

    /// Makes the sandbox of a pod: a process in its network namespace and its control groups, for as long as the
    /// pod is there. What an image of a sandbox would run does nothing but wait, and no microVM is made for that.
    pub fn make_sandbox(&self, held: &mut Held, log: &Log) -> Result<Child, AnyError> {
        let mut notes = self.container.notes.clone();
        notes.push(
            "process, mounts and root are left out: the sandbox of a pod has no guest".into(),
        );
        let waiting = self.start_waiting(held, &[], &mut notes)?;
        notes
            .iter()
            .for_each(|note| log.write(Level::Warning, &format!("config.json: {note}")));
        if let (Some(path), Some(pid)) = (&self.create.pid_file, waiting.pid()) {
            state::replace(path, pid.to_string().as_bytes(), 0o644)?;
        }
        let child = waiting.stay()?;
        held.record.sandbox = Some(Sandbox::Created);
        held.write()?;
        Ok(child)
    }

    /// Runs the hooks that come before the microVM, if there are any; the process that waits for it then.
    fn run_hooks(
        &self,
        held: &mut Held,
        passed: &[&OwnedFd],
        notes: &mut Vec<String>,
    ) -> Result<Option<Waiting>, AnyError> {
        let hooks = &self.container.hooks;
        if hooks.prestart.is_empty() && hooks.create_runtime.is_empty() {
            return Ok(None);
        }
        self.start_waiting(held, passed, notes).map(Some)
    }

    /// Starts the process that waits, and runs these hooks.
    fn start_waiting(
        &self,
        held: &mut Held,
        passed: &[&OwnedFd],
        notes: &mut Vec<String>,
    ) -> Result<Waiting, AnyError> {
        let hooks = &self.container.hooks;
        let namespace = match &self.container.network {
            Network::Namespace(path) => Some(path.as_path()),
            Network::New | Network::None => None,
        };
        groups::enter(self.container, self.host.user, held, notes)?;
        let id = &self.create.id;
        let mut waiting = Waiting::start(&self.jailer, held.path(), id, namespace, passed)?;
        held.record.process = waiting.pid().and_then(Known::of);
        held.write()?;
        // What hooks use is not the container's.
        self.home.enter();
        let patience = Duration::from_secs(self.host.settings.ready_seconds);
        waiting.wait(patience)?;
        let state = state_text(&held.record, Status::Creating);
        hooks::run_all("prestart", &hooks.prestart, &state)?;
        hooks::run_all("createRuntime", &hooks.create_runtime, &state)?;
        Ok(waiting)
    }

    /// The words of `mayfly-jailer run`.
    fn words(
        &self,
        held: &Held,
        disk: &Path,
        told: &OwnedFd,
        starter: Option<&OwnedFd>,
        waiting: &Option<Waiting>,
    ) -> Result<Vec<OsString>, AnyError> {
        let console = self
            .create
            .console_socket
            .as_deref()
            .map(std::path::absolute)
            .transpose()?;
        let container = self.container;
        let network = match (&container.network, waiting) {
            (Network::None, _) | (Network::New, None) => None,
            (Network::Namespace(path), None) => Some(path.as_path()),
            (Network::New | Network::Namespace(_), Some(_)) => Some(Path::new(OWN_NETWORK)),
        };
        let machine = Machine {
            id: &self.create.id,
            disk,
            kernel: &self.kernel,
            cmdline: self.host.settings.cmdline.as_deref(),
            memory_mib: resources::memory_mib(&container.resources, self.host.settings.memory_mib)?,
            vcpus: resources::vcpus(&container.resources, self.host.settings.vcpus),
            templates: self.host.settings.templates.as_deref(),
            network,
            uid: held.record.uid,
            // Root's publish ports outside of it.
            is_reachable: !self.host.user.is_root(),
            ready: told.as_raw_fd(),
            console: console.as_deref(),
            starter: starter.map(AsRawFd::as_raw_fd),
            is_in_foreground: self.kind == Kind::Foreground,
            limits: &self.limits,
        };
        Ok(jailer::run_words(container, &machine))
    }

    fn start(
        &self,
        held: &mut Held,
        words: &[OsString],
        passed: &[&OwnedFd],
    ) -> Result<Child, AnyError> {
        let mut command = self.jailer.command(held.path(), words);
        let child = waiting::spawn(&mut command, passed, &self.create.id)?;
        held.record.process = Known::of(child.id() as i32);
        held.write()?;
        Ok(child)
    }

    fn wait_until_ready(&self, held: &Held, ready: OwnedFd) -> Result<(), AnyError> {
        let seconds = self.host.settings.ready_seconds;
        let patience = Timespec {
            tv_sec: seconds.try_into().unwrap_or(i64::MAX),
            tv_nsec: 0,
        };
        let wait = || poll(&mut [PollFd::new(&ready, PollFlags::IN)], Some(&patience));
        let said = rustix::io::retry_on_intr(wait).step("wait for the guest")?;
        if said == 0 {
            return Err(LifecycleError::NotReady(seconds).into());
        }
        let mut byte = Vec::new();
        std::fs::File::from(ready)
            .read_to_end(&mut byte)
            .step("wait for the guest")?;
        if !byte.is_empty() {
            return Ok(());
        }
        if let Some(pidfd) = held.record.process.as_ref().and_then(Known::open) {
            process::wait(&pidfd, TIDY);
        }
        Err(Told(reason(held.path())).into())
    }
}

/// Why a container did not start, by the jailer's report. Its message went to the standard error that the
/// container was to have.
fn reason(folder: &Path) -> String {
    let report = input::read(&folder.join(jailer::REPORT), REPORT_MAX).unwrap_or_default();
    let report: serde_json::Value = serde_json::from_slice(&report).unwrap_or_default();
    let sentence = report["sentence"].as_str().unwrap_or_default();
    match sentence {
        "" => "the microVM did not start; the container's standard error has the message of mayfly-jailer".to_owned(),
        text => text.to_owned(),
    }
}
