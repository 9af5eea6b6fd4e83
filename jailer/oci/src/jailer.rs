//! `mayfly-jailer`, which runs the microVMs: its command lines, and what it answers.
//!
//! A container is one process of it (`run --hold`), which stands for the container to the engine: it has
//! the container's standard streams, and ends as its command does. All other commands ask that process,
//! by a socket below the container's folder, which is their working folder: so its path is short whatever
//! the engine calls its folders. The sandbox of a pod is a process of it too (`prepare`), which is not asked.

use std::ffi::{OsStr, OsString};
use std::io::{IsTerminal as _, stdin};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::Deserialize;

use crate::bundle::Container;
use crate::error::AnyError;
use crate::host;

/// The process, in the container's folder.
pub const PROCESS: &str = "process.json";
/// Where in the container's folder its socket is. The jailer locks this folder, and waits for its lock: `create` holds
/// that of the container's own for as long as the jailer starts.
pub const RUNTIME: &str = "run";
/// How the container ended, in its folder.
pub const REPORT: &str = "exit.json";

/// The jailer refused, in its own words.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
pub struct Refused {
    text: String,
    /// Nothing is there that could be asked, or not any more.
    is_gone: bool,
}

/// There is no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Silence {
    /// There is nothing that answers, yet or any more.
    Gone,
    /// It stands still, or is refused.
    Other,
}

/// `mayfly-jailer` could ask nothing.
const GONE: i32 = 3;

/// It failed with the container's standard error, where its message is.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Told(pub String);

/// The program.
#[derive(Debug)]
pub struct Jailer {
    path: PathBuf,
    /// Its processes are in groups of their own.
    is_apart: bool,
}

/// What a container's process says of itself.
#[derive(Debug, Deserialize)]
pub struct Answer {
    /// `creating`, `created`, `running`, `paused` or `stopped`.
    pub status: String,
}

/// What is to be run besides what config.json says.
#[derive(Debug)]
pub struct Machine<'a> {
    pub id: &'a str,
    /// The disk that the root is made of.
    pub disk: &'a Path,
    pub kernel: &'a Path,
    /// Its command line, if not the usual one.
    pub cmdline: Option<&'a str>,
    pub memory_mib: u64,
    pub vcpus: u64,
    /// The folder of templates of guests, if there is one.
    pub templates: Option<&'a Path>,
    /// The network namespace that the guest's network is that of.
    pub network: Option<&'a Path>,
    pub uid: Option<u32>,
    /// The network namespace's programs connect to it.
    pub is_reachable: bool,
    /// The number of the descriptor that is told when it is ready.
    pub ready: i32,
    /// The engine's socket, to which its terminal is sent.
    pub console: Option<&'a Path>,
    /// The number of a descriptor of the engine's process, with which it ends.
    pub starter: Option<i32>,
    /// Ends with the process that starts it.
    pub is_in_foreground: bool,
    /// Limits of groups of its own, where the engine names none.
    pub limits: &'a [String],
}

impl Jailer {
    /// Finds it.
    pub fn find() -> Result<Jailer, AnyError> {
        let path = host::program("mayfly-jailer")?;
        let is_apart = false;
        Ok(Jailer { path, is_apart })
    }

    /// The same, whose processes do not get the signals that this process's group gets: who passes on what comes to
    /// itself would send them twice. (In a terminal's background it could not be typed to, however.)
    pub fn apart(self) -> Jailer {
        let is_apart = !stdin().is_terminal();
        Jailer { is_apart, ..self }
    }

    /// A command of it, in the container's folder.
    pub fn command(&self, folder: &Path, words: &[OsString]) -> Command {
        let mut command = Command::new(&self.path);
        command.args(words).current_dir(folder);
        if self.is_apart {
            command.process_group(0);
        }
        command
    }

    /// Asks something of the container `id`; what it prints.
    pub fn ask(
        &self,
        folder: &Path,
        id: &str,
        request: &str,
        more: &[&str],
    ) -> Result<String, AnyError> {
        let words: Vec<OsString> = [request, id]
            .iter()
            .chain(more)
            .chain(&["--runtime-dir", RUNTIME])
            .map(OsString::from)
            .collect();
        let mut command = self.command(folder, &words);
        let output = command.stdin(Stdio::null()).output()?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let text = String::from_utf8_lossy(&output.stderr);
        let text = text.trim().trim_start_matches("mayfly-jailer: ");
        let refused = Refused {
            text: text.to_owned(),
            is_gone: output.status.code() == Some(GONE),
        };
        Err(refused.into())
    }

    /// What the container `id` says of itself.
    pub fn state(&self, folder: &Path, id: &str) -> Result<Answer, Silence> {
        let said = self.ask(folder, id, "state", &[]);
        let said = said.map_err(|error| match error.downcast_ref() {
            Some(Refused { is_gone: true, .. }) => Silence::Gone,
            _ => Silence::Other,
        })?;
        serde_json::from_str(&said).map_err(|_| Silence::Other)
    }
}

/// The words that run a container.
pub fn run_words(container: &Container, machine: &Machine<'_>) -> Vec<OsString> {
    let mut words = Words::default();
    words.add("run");
    words.option("--id", machine.id);
    words.option("--runtime-dir", RUNTIME);
    let mut image = machine.disk.as_os_str().to_owned();
    // Always one of them: the name may end so itself.
    image.push(match container.is_read_only {
        true => ":ro",
        false => ":overlay",
    });
    words.option("--image", &image);
    words.option("--kernel", machine.kernel);
    if let Some(cmdline) = machine.cmdline {
        words.option("--cmdline", cmdline);
    }
    words.option("--memory", machine.memory_mib.to_string());
    words.option("--vcpus", machine.vcpus.to_string());
    if let Some(folder) = machine.templates {
        words.option("--template", folder);
    }
    words.option("--hostname", hostname(container, machine.id));
    if let Some(path) = machine.network {
        words.option("--net-from-namespace", path);
        if machine.is_reachable {
            words.add("--reach-from-namespace");
        }
    }
    words.option("--process", PROCESS);
    words.option("--exit-report", REPORT);
    words.add("--hold");
    words.option("--ready-fd", machine.ready.to_string());
    if let Some(uid) = machine.uid {
        words.option("--uid", uid.to_string());
        words.option("--gid", uid.to_string());
    }
    if machine.is_in_foreground {
        words.add("--with-parent");
    }
    if let Some(number) = machine.starter {
        words.option("--end-with-fd", number.to_string());
    }
    // Also of a terminal.
    words.add("-i");
    if let Some(path) = machine.console {
        words.option("--console-socket", path);
    }
    for (from, to) in &container.mounts.copies {
        words.option("--copy-in", pair(from, to.as_os_str()));
    }
    for (to, options) in &container.mounts.tmpfs {
        let options = OsString::from(options.join(","));
        match options.is_empty() {
            true => words.option("--tmpfs", to),
            false => words.option("--tmpfs", pair(to, &options)),
        }
    }
    machine
        .limits
        .iter()
        .for_each(|limit| words.option("--limit", limit));
    words.0
}

#[derive(Default)]
struct Words(Vec<OsString>);

impl Words {
    fn add(&mut self, word: impl AsRef<OsStr>) {
        self.0.push(word.as_ref().to_owned());
    }

    fn option(&mut self, name: &str, value: impl AsRef<OsStr>) {
        self.add(name);
        self.add(value);
    }
}

fn pair(from: &Path, to: &OsStr) -> OsString {
    let mut pair = from.as_os_str().to_owned();
    pair.push(":");
    pair.push(to);
    pair
}

/// The guest's name: the engine's, or the beginning of the id.
fn hostname(container: &Container, id: &str) -> String {
    let short = || {
        let plain = id
            .chars()
            .filter(|it| it.is_ascii_alphanumeric() || *it == '-');
        plain.take(12).collect()
    };
    container.hostname.clone().unwrap_or_else(short)
}
