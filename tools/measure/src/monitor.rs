//! A monitor under measurement: started, watched until its guest speaks, stopped.

use std::ffi::OsStr;
use std::io::{ErrorKind, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use crate::failure::{Context, Failure, Result};
use crate::filter::{self, Filters};
use crate::guest::MARKER;
use crate::http::Client;
use crate::workspace::Kernel;
use crate::{proc, sys};

/// Longer than any monitor takes for anything here, also where this program and its monitors are stopped meanwhile (by
/// SIGSTOP, say).
const PATIENCE: Duration = Duration::from_secs(600);

/// Lets a monitor finish what follows its guest's first byte.
pub const SETTLE: Duration = Duration::from_millis(50);

/// How a monitor is told what to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CommandLine {
    /// The floor program's: `floor KERNEL`.
    Floor,
    /// Firecracker's.
    Firecracker,
    /// That of an OCI runtime (see `oci`): no monitor, and only measured with containers.
    Runtime,
}

/// A program to measure.
#[derive(Clone, Debug)]
pub struct Monitor {
    /// What the tables call it.
    pub name: String,
    /// The executable.
    pub path: PathBuf,
    /// How it is told what to run.
    pub command_line: CommandLine,
    /// More words for its command line.
    pub extra: Vec<String>,
}

impl Monitor {
    /// Whether it can be driven by an API socket.
    pub fn has_api(&self) -> bool {
        self.command_line == CommandLine::Firecracker
    }

    /// What it says about its version, if it says anything.
    pub fn version(&self) -> Option<String> {
        if self.command_line == CommandLine::Floor {
            return None;
        }
        let output = Command::new(&self.path).arg("--version").output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout);
        text.lines().next().map(|line| line.trim().to_owned())
    }

    /// Starts it with a configuration file and without an API.
    pub fn boot(&self, kernel: &Kernel) -> Result<Running> {
        let mut command = self.command();
        match self.command_line {
            CommandLine::Floor => command.arg(&kernel.path),
            CommandLine::Firecracker => command
                .arg("--no-api")
                .arg("--config-file")
                .arg(&kernel.config),
            CommandLine::Runtime => {
                let name = &self.name;
                return Err(Failure::new(format!("{name} runs containers only")));
            }
        };
        Running::start(&self.name, command)
    }

    /// Starts it with the configuration file `config` and without an API.
    pub fn boot_config(&self, config: &Path) -> Result<Running> {
        let mut command = self.command();
        command.arg("--no-api").arg("--config-file").arg(config);
        Running::start(&self.name, command)
    }

    /// The same, and only errors in its log, which some monitors write among the guest's output.
    pub fn boot_config_quietly(&self, config: &Path) -> Result<Running> {
        let mut command = self.command();
        command.args(["--level", "Error", "--no-api", "--config-file"]);
        command.arg(config);
        Running::start(&self.name, command)
    }

    /// The same with an API socket.
    pub fn boot_config_and_listen(&self, config: &Path, socket: &Path) -> Result<Running> {
        let mut command = self.command();
        command.arg("--config-file").arg(config);
        command.arg("--api-sock").arg(socket);
        Running::start(&self.name, command)
    }

    /// Starts it waiting for requests on an API socket.
    pub fn listen(&self, socket: &Path) -> Result<Running> {
        self.listen_with(socket, &[])
    }

    /// The same with more words on its command line.
    pub fn listen_with(&self, socket: &Path, words: &[&str]) -> Result<Running> {
        let mut command = self.command();
        command.args(words);
        command.arg("--api-sock").arg(socket);
        Running::start(&self.name, command)
    }

    /// Starts it with the options `words` and nothing else.
    pub fn start_with(&self, words: &[&OsStr]) -> Result<Running> {
        let mut command = self.command();
        command.args(words);
        Running::start(&self.name, command)
    }

    /// Whether its help names `option`, followed by a value.
    pub fn has_option(&self, option: &str) -> bool {
        let Ok(output) = Command::new(&self.path).arg("--help").output() else {
            return false;
        };
        let help = String::from_utf8_lossy(&output.stdout);
        help.split_whitespace().any(|word| word == option)
    }

    /// Boots a guest that stays, and looks at the filters of the monitor's threads.
    pub fn filters(&self, staying: &Kernel) -> Result<Filters> {
        let mut running = self.boot(staying)?;
        running.first_byte(None)?;
        // Some monitors install the last filter when the guest runs already.
        std::thread::sleep(SETTLE);
        let filters = filter::filters(running.pid())?;
        running.stop()?;
        Ok(filters)
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.path);
        command.env_clear().args(&self.extra);
        command
    }
}

/// A started monitor. It is killed when this value goes.
#[derive(Debug)]
pub struct Running {
    name: String,
    child: Child,
    ended: bool,
    pidfd: OwnedFd,
    stdout: PipeReader,
    stderr: PipeReader,
    /// Held open: an idle console, not one at its end.
    stdin: PipeWriter,
    /// What `said` has read.
    printed: String,
    /// Bytes that came with the guest's first.
    came_along: usize,
    /// Just before the process was made.
    pub started: Instant,
}

impl Running {
    /// Starts `command`, which is called `name`.
    ///
    /// The standard library starts programs by `posix_spawn` (vfork and exec) as long as nothing else is asked of the
    /// child, so that the size of this process costs nothing.
    pub fn start(name: &str, mut command: Command) -> Result<Self> {
        let starting = || format!("start {name}");
        let (stdin, keep_stdin) = std::io::pipe().cannot(starting)?;
        let (stdout, give_stdout) = std::io::pipe().cannot(starting)?;
        let (stderr, give_stderr) = std::io::pipe().cannot(starting)?;
        command.stdin(stdin).stdout(give_stdout).stderr(give_stderr);
        let started = Instant::now();
        let mut child = command.spawn().cannot(starting)?;
        // The command holds the child's ends of the pipes.
        drop(command);
        let pidfd = match sys::pidfd(child.id()) {
            Ok(pidfd) => pidfd,
            Err(error) => {
                // Both can only fail when it is gone already.
                let _ = child.kill();
                let _ = child.wait();
                return Err(error).cannot(|| format!("watch {name}"));
            }
        };
        Ok(Self {
            name: name.to_owned(),
            child,
            ended: false,
            pidfd,
            stdout,
            stderr,
            stdin: keep_stdin,
            printed: String::new(),
            came_along: 0,
            started,
        })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Milliseconds from the start to `then`.
    pub fn ms(&self, then: Instant) -> f64 {
        then.duration_since(self.started).as_secs_f64() * 1e3
    }

    /// Waits for the guest's first byte. With a client whose request to this path starts the guest and is under way, its
    /// refusal is a failure (an acceptance may come before or after the byte).
    pub fn first_byte(&mut self, mut starting: Option<(&mut Client, &str)>) -> Result<Instant> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let stdout = self.stdout.as_fd();
            let [spoke, answered] = match &starting {
                Some((client, _)) => sys::poll([stdout, client.as_fd()], left),
                None => sys::poll([stdout], left).map(|[spoke]| [spoke, false]),
            }
            .map_err(|error| self.poll_failure(&error))?;
            let now = Instant::now();
            if spoke {
                let mut bytes = [0; 4096];
                let len = self
                    .stdout
                    .read(&mut bytes)
                    .cannot(|| format!("read what {} prints", self.name))?;
                if let Some(at) = bytes[..len].iter().position(|byte| *byte == MARKER) {
                    self.came_along = len - at - 1;
                    return Ok(now);
                }
                if len == 0 {
                    return Err(self.failure("ended before its guest's first byte"));
                }
            } else if answered {
                if let Some((client, path)) = starting.take() {
                    client.accepted(path)?;
                }
            } else {
                return Err(self.failure("was silent: its guest's first byte never came"));
            }
        }
    }

    /// Gives its guest input.
    pub fn tell(&mut self, input: &[u8]) -> Result<()> {
        self.stdin
            .write_all(input)
            .cannot(|| format!("give the guest of {} input", self.name))
    }

    /// Waits until its guest has said `text`; all that was printed by then.
    pub fn said(&mut self, text: &str) -> Result<String> {
        self.said_within(text, PATIENCE)
    }

    /// The same with a limit of the caller's.
    pub fn said_within(&mut self, text: &str, patience: Duration) -> Result<String> {
        let deadline = Instant::now() + patience;
        while !self.printed.contains(text) {
            let left = deadline.saturating_duration_since(Instant::now());
            self.read_more(text, left)?;
        }
        Ok(self.printed.clone())
    }

    /// Reads once what its guest printed while `text` is waited for.
    fn read_more(&mut self, text: &str, left: Duration) -> Result<()> {
        let [spoke] =
            sys::poll([self.stdout.as_fd()], left).map_err(|error| self.poll_failure(&error))?;
        let mut bytes = [0; 4096];
        let len = if spoke {
            self.stdout
                .read(&mut bytes)
                .cannot(|| format!("read what {} prints", self.name))?
        } else {
            0
        };
        if len == 0 {
            let printed = self.printed.trim().to_owned();
            return Err(self.failure(&format!("never said `{text}`, but: {printed}")));
        }
        self.printed
            .push_str(&String::from_utf8_lossy(&bytes[..len]));
        Ok(())
    }

    /// Waits for the next line with `text` in it, and forgets all up to its end.
    pub fn next_line(&mut self, text: &str, patience: Duration) -> Result<String> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(at) = self.printed.find(text)
                && let Some(rest) = self.printed[at..].find('\n')
            {
                let begin = self.printed[..at].rfind('\n').map_or(0, |end| end + 1);
                let line = self.printed[begin..at + rest].to_owned();
                self.printed.drain(..=at + rest);
                return Ok(line);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            self.read_more(text, left)?;
        }
    }

    /// Reads what its guest prints until `wanted` bytes have come, those that came with its first byte included, or
    /// until the end of the output; how many came.
    pub fn read_output(&mut self, wanted: u64, patience: Duration) -> Result<u64> {
        let mut came = self.came_along as u64;
        let deadline = Instant::now() + patience;
        let mut bytes = vec![0; 64 << 10];
        while came < wanted {
            let left = deadline.saturating_duration_since(Instant::now());
            let [spoke] = sys::poll([self.stdout.as_fd()], left)
                .map_err(|error| self.poll_failure(&error))?;
            if !spoke {
                return Err(self.failure(&format!("printed {came} bytes and no more")));
            }
            match self.stdout.read(&mut bytes) {
                Ok(0) => break,
                Ok(len) => came += len as u64,
                Err(_) => return Err(self.failure("could not be read from")),
            }
        }
        Ok(came)
    }

    /// Waits for the name of its API socket to appear, then connects. Between bind and listen a connection is refused;
    /// it is tried again after giving up the processor.
    pub fn connect(
        &mut self,
        names: &impl AsFd,
        socket: &Path,
    ) -> Result<std::os::unix::net::UnixStream> {
        let [appeared, ended] = sys::poll([names.as_fd(), self.pidfd.as_fd()], PATIENCE)
            .map_err(|error| self.poll_failure(&error))?;
        if !appeared {
            return Err(self.failure(if ended {
                "ended before its API socket was there"
            } else {
                "did not make its API socket"
            }));
        }
        let deadline = Instant::now() + PATIENCE;
        loop {
            match std::os::unix::net::UnixStream::connect(socket) {
                Ok(stream) => return Ok(stream),
                Err(error)
                    if error.kind() == ErrorKind::ConnectionRefused
                        && Instant::now() < deadline =>
                {
                    std::thread::yield_now();
                }
                Err(_) => return Err(self.failure("does not listen on its API socket")),
            }
        }
    }

    /// Waits until the process is gone, its VM closed.
    pub fn exit(&mut self) -> Result<(Instant, ExitStatus)> {
        let [ended] =
            sys::poll([self.pidfd.as_fd()], PATIENCE).map_err(|error| self.poll_failure(&error))?;
        let now = Instant::now();
        if !ended {
            return Err(self.failure("did not end after its guest's reset"));
        }
        let status = self.reap()?;
        Ok((now, status))
    }

    /// Kills the process and waits until it is gone.
    pub fn stop(mut self) -> Result<()> {
        self.kill();
        self.reap().map(|_| ())
    }

    /// Asks for the end, without waiting for it.
    pub fn kill(&mut self) {
        // It fails when the process is gone already.
        let _ = self.child.kill();
    }

    fn reap(&mut self) -> Result<ExitStatus> {
        let status = self
            .child
            .wait()
            .cannot(|| format!("wait for {}", self.name))?;
        self.ended = true;
        Ok(status)
    }

    fn poll_failure(&self, error: &std::io::Error) -> Failure {
        if error.kind() == ErrorKind::Interrupted {
            Failure::interrupted()
        } else {
            Failure::new(format!("cannot wait for {}: {error}", self.name))
        }
    }

    /// A failure that quotes what the monitor said last, with what its threads were doing.
    fn failure(&mut self, what: &str) -> Failure {
        let threads = proc::threads(self.pid());
        self.kill();
        let status = self.reap();
        let mut said = String::new();
        for pipe in [&mut self.stdout, &mut self.stderr] {
            let mut bytes = Vec::new();
            // What cannot be read cannot be quoted.
            let _ = pipe.read_to_end(&mut bytes);
            said.push_str(&String::from_utf8_lossy(&bytes));
        }
        let said: Vec<&str> = said
            .lines()
            .map(str::trim)
            .filter(|l| !l.is_empty())
            .collect();
        let last = said.len().saturating_sub(4);
        let mut text = format!("{} {what}", self.name);
        if let Ok(status) = status {
            text.push_str(&format!(" ({status})"));
        }
        if !threads.is_empty() {
            text.push_str(&format!("; its threads: {}", threads.join(", ")));
        }
        if !said.is_empty() {
            text.push_str(&format!("; it said: {}", said[last..].join(" / ")));
        }
        Failure::new(text)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.ended {
            self.kill();
            // Nothing is left to do if the process cannot be waited for.
            let _ = self.child.wait();
        }
    }
}
