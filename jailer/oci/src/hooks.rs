//! Hooks: programs of config.json that run on this host at moments of a container's life.
//!
//! ```text
//!   prestart, createRuntime   `create`, when the container's process and its network namespace are there:
//!                             the first one that fails fails the `create`
//!   poststart                 `start`, when its command runs          those that fail are
//!   poststop                  `delete`, when the rest of it is gone   noted in the log
//! ```
//!
//! A hook gets the container's state on its standard input, its own environment, and the working folder of
//! this program. What it prints is read while it runs, and its end is kept for the message if it fails. It
//! has a process group of its own, which is killed when its time is over; with no `timeout` in
//! config.json it has as long as it takes, as the specification has it. What it leaves running in the
//! background is not waited for.

use std::fs::File;
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, PidfdFlags, Signal};
use serde::{Deserialize, Serialize};

use crate::error::{AnyError, Step as _};
use crate::process;

/// How much of the end of what a hook prints is kept.
const KEPT: usize = 1024;
/// How much is read at once, and how often after a hook has ended: what others print is no concern.
const PIECE: usize = 4096;
const LAST_PIECES: usize = 64;
/// How long a hook that was killed may take to end.
const PATIENCE: Duration = Duration::from_secs(5);

/// A program to run.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct Hook {
    pub path: PathBuf,
    /// With its name, which comes first; empty: as `path`.
    pub args: Vec<String>,
    /// All of its environment.
    pub env: Vec<(String, String)>,
    /// How many seconds it has.
    pub timeout: Option<u64>,
}

/// The hooks of a container.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub struct Hooks {
    pub prestart: Vec<Hook>,
    pub create_runtime: Vec<Hook>,
    pub poststart: Vec<Hook>,
    pub poststop: Vec<Hook>,
}

/// A hook failed.
#[derive(Debug, thiserror::Error)]
enum HookError {
    #[error("it did not end within {0} seconds (its timeout), and was killed{1}")]
    TimedOut(u64, Printed),
    #[error("it did not end within {0} seconds (its timeout), nor when it was killed")]
    Unkillable(u64),
    #[error("it ended with {0}{1}")]
    Failed(Ending, Printed),
}

/// How a process ended.
#[derive(Debug)]
struct Ending(ExitStatus);

impl std::fmt::Display for Ending {
    fn fmt(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.0.code(), self.0.signal()) {
            (Some(code), _) => write!(to, "exit code {code}"),
            (_, Some(signal)) => write!(to, "signal {signal}"),
            _ => write!(to, "{}", self.0),
        }
    }
}

/// The end of what it printed.
#[derive(Debug)]
struct Printed(String);

impl std::fmt::Display for Printed {
    fn fmt(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0.as_str() {
            "" => Ok(()),
            text => write!(to, "; it printed: {text}"),
        }
    }
}

/// Runs the hooks of `list`, whose name in config.json is `name`, one after the other, until one fails.
pub fn run_all(name: &str, list: &[Hook], state: &[u8]) -> Result<(), AnyError> {
    for (index, hook) in list.iter().enumerate() {
        run_named(name, index, hook, state)?;
    }
    Ok(())
}

/// Runs all hooks of `list`, and tells of each that fails.
pub fn run_each(name: &str, list: &[Hook], state: &[u8], mut tell: impl FnMut(AnyError)) {
    for (index, hook) in list.iter().enumerate() {
        if let Err(error) = run_named(name, index, hook, state) {
            tell(error);
        }
    }
}

fn run_named(name: &str, index: usize, hook: &Hook, state: &[u8]) -> Result<(), AnyError> {
    let what = format!("run the hook hooks.{name}.{index}");
    Ok(run(hook, state).step_on(&what, &hook.path)?)
}

/// Runs one.
fn run(hook: &Hook, state: &[u8]) -> Result<(), AnyError> {
    let until = hook
        .timeout
        .and_then(|seconds| Instant::now().checked_add(Duration::from_secs(seconds)));
    let (printed, prints) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    rustix::io::ioctl_fionbio(&printed, true)?;
    let mut command = Command::new(&hook.path);
    if let Some((name, rest)) = hook.args.split_first() {
        command.arg0(name).args(rest);
    }
    let mut child = command
        .env_clear()
        .envs(hook.env.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::piped())
        .stdout(prints.try_clone()?)
        .stderr(prints)
        .process_group(0)
        .spawn()?;
    // It has its ends of the pipe.
    drop(command);
    let mut running = Running::new(&mut child, printed.into(), state)?;
    let has_ended = running.until_its_end(until)?;
    let kept = running.kept();
    match hook.timeout {
        Some(seconds) if !has_ended => Err(kill(child, seconds, kept).into()),
        _ => {
            let status = child.wait()?;
            match status.success() {
                true => Ok(()),
                false => Err(HookError::Failed(Ending(status), kept).into()),
            }
        }
    }
}

/// Kills a hook, and what it has started in its group.
fn kill(mut child: Child, seconds: u64, kept: Printed) -> HookError {
    let pid = Pid::from_child(&child);
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty());
    // It is this process's child, which was not waited for: its number is no other's.
    let _ = rustix::process::kill_process_group(pid, Signal::KILL);
    if !pidfd.is_ok_and(|pidfd| process::wait(&pidfd, PATIENCE)) {
        return HookError::Unkillable(seconds);
    }
    let _ = child.wait();
    HookError::TimedOut(seconds, kept)
}

/// A hook that runs: its streams, and what is left to write and was read.
struct Running<'a> {
    pidfd: OwnedFd,
    input: Option<ChildStdin>,
    state: &'a [u8],
    output: Option<File>,
    printed: Vec<u8>,
}

impl<'a> Running<'a> {
    fn new(child: &mut Child, output: File, state: &'a [u8]) -> Result<Running<'a>, AnyError> {
        let input = child.stdin.take();
        if let Some(input) = &input {
            rustix::io::ioctl_fionbio(input, true)?;
        }
        let pidfd = rustix::process::pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
        Ok(Running {
            pidfd,
            input,
            state,
            output: Some(output),
            printed: Vec::new(),
        })
    }

    /// Writes and reads until it has ended, or its time is over; whether it has ended.
    fn until_its_end(&mut self, until: Option<Instant>) -> Result<bool, AnyError> {
        loop {
            self.write();
            let Some((has_ended, prints)) = self.wait(until)? else {
                return Ok(false);
            };
            if has_ended {
                for _ in 0..LAST_PIECES {
                    if !self.read() {
                        break;
                    }
                }
                return Ok(true);
            }
            if prints {
                self.read();
            }
        }
    }

    /// Waits until there is something to do: whether it has ended, and whether there is something to read; nothing
    /// if the time is over.
    fn wait(&self, until: Option<Instant>) -> Result<Option<(bool, bool)>, Errno> {
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        if left == Some(Duration::ZERO) {
            return Ok(None);
        }
        let left = left.map(|left| Timespec::try_from(left).unwrap_or_default());
        let mut polled = vec![PollFd::new(&self.pidfd, PollFlags::IN)];
        polled.extend(
            self.output
                .as_ref()
                .map(|it| PollFd::new(it, PollFlags::IN)),
        );
        polled.extend(
            self.input
                .as_ref()
                .map(|it| PollFd::new(it, PollFlags::OUT)),
        );
        match poll(&mut polled, left.as_ref()) {
            Ok(0) => return Ok(None),
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(Some((false, false))),
            Err(error) => return Err(error),
        }
        let mut ready = polled.iter().map(|it| !it.revents().is_empty());
        let has_ended = ready.next().unwrap_or_default();
        let prints = self.output.is_some() && ready.next().unwrap_or_default();
        Ok(Some((has_ended, prints)))
    }

    /// Writes what fits; a hook need not read it.
    fn write(&mut self) {
        let Some(input) = &mut self.input else {
            return;
        };
        while !self.state.is_empty() {
            match input.write(self.state) {
                Ok(count) => self.state = self.state.get(count..).unwrap_or_default(),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(_) => break,
            }
        }
        // That is its end.
        self.input = None;
    }

    /// Reads a piece, and keeps the end of all; whether there may be more.
    fn read(&mut self) -> bool {
        let Some(output) = &mut self.output else {
            return false;
        };
        let mut piece = [0; PIECE];
        match output.read(&mut piece) {
            Ok(count @ 1..) => {
                self.printed.extend(piece.get(..count).unwrap_or_default());
                let surplus = self.printed.len().saturating_sub(KEPT);
                self.printed.drain(..surplus);
                true
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => true,
            Err(error) if error.kind() == ErrorKind::WouldBlock => false,
            _ => {
                self.output = None;
                false
            }
        }
    }

    /// What is kept, as one line.
    fn kept(&self) -> Printed {
        let text = String::from_utf8_lossy(&self.printed);
        Printed(text.split_whitespace().collect::<Vec<_>>().join(" "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::message;

    fn shell(script: &str) -> Hook {
        Hook {
            path: "/bin/sh".into(),
            args: ["hook", "-c", script].map(str::to_owned).into(),
            env: vec![("A".into(), "1 2".into())],
            timeout: None,
        }
    }

    fn failure(hook: &Hook, state: &[u8]) -> String {
        message(&*run_all("createRuntime", std::slice::from_ref(hook), state).unwrap_err())
    }

    #[test]
    fn hook_gets_the_state_its_words_and_only_its_environment() {
        let script = "/usr/bin/env | /usr/bin/sort; echo \"$0\"; /bin/cat; exit 3";
        let mut hook = shell(script);
        hook.args = ["name", "-c", script, "word"].map(str::to_owned).into();
        let text = failure(&hook, b"{\"id\": 7}");
        assert_eq!(
            text,
            "cannot run the hook hooks.createRuntime.0 /bin/sh: it ended with exit code 3; it printed: A=1 2 \
             PWD=CWD word {\"id\": 7}"
                .replace("CWD", &std::env::current_dir().unwrap().display().to_string())
        );
        assert_eq!(run(&shell("exit 0"), b"").ok(), Some(()));
        assert_eq!(
            run(
                &Hook {
                    args: vec![],
                    path: "/bin/true".into(),
                    ..hook
                },
                b""
            )
            .ok(),
            Some(())
        );
    }

    #[test]
    fn state_that_is_longer_than_a_pipe_is_read_or_not() {
        let state = vec![b'x'; 1 << 20];
        let count = failure(&shell("/usr/bin/wc -c; exit 1"), &state);
        assert!(count.ends_with("it printed: 1048576"), "{count}");
        run(&shell("exit 0"), &state).unwrap();
        run(&shell("exec <&-; exit 0"), &state).unwrap();
    }

    #[test]
    fn hook_that_prints_for_ever_or_does_not_end_is_killed_with_what_it_started() {
        let folder = std::env::temp_dir().join(format!("mayfly-oci-hook-{}", std::process::id()));
        let prints = "while :; do echo noise; done";
        let sleeps = format!("echo $$ > {}; /bin/sleep 1000; exit 0", folder.display());
        let closes = "exec >&- 2>&-; /bin/sleep 1000";
        // The second has to have begun by then, also on a busy host.
        for (script, timeout) in [(prints, 1), (&sleeps, 10), (closes, 1)] {
            let hook = Hook {
                timeout: Some(timeout),
                ..shell(script)
            };
            let began = Instant::now();
            let text = failure(&hook, b"");
            let expected = format!("within {timeout} seconds (its timeout), and was killed");
            assert!(text.contains(&expected), "{text}");
            assert!(text.len() < 2 * KEPT, "{}", text.len());
            assert!(began.elapsed() >= Duration::from_secs(timeout));
        }
        let group = std::fs::read_to_string(&folder).unwrap();
        std::fs::remove_file(&folder).unwrap();
        let group = Pid::from_raw(group.trim().parse().unwrap()).unwrap();
        let until = Instant::now() + Duration::from_secs(60);
        // Its child is not this process's to wait for.
        while rustix::process::test_kill_process_group(group).is_ok() && Instant::now() < until {
            std::thread::yield_now();
        }
        assert_eq!(
            rustix::process::test_kill_process_group(group),
            Err(Errno::SRCH)
        );
    }

    #[test]
    fn what_a_hook_leaves_in_the_background_is_not_waited_for() {
        run(&shell("/bin/sleep 5 & exit 0"), b"").unwrap();
        let noise = "(n=0; while [ $n -lt 200000 ]; do echo noise; n=$((n + 1)); done) & exit 4";
        let text = failure(&shell(noise), b"");
        assert!(text.contains("exit code 4"), "{text}");
    }

    #[test]
    fn first_that_fails_is_the_last_or_all_run() {
        let list = [shell("exit 0"), shell("kill -9 $$"), shell("exit 5")];
        let text = message(&*run_all("prestart", &list, b"").unwrap_err());
        assert_eq!(
            text,
            "cannot run the hook hooks.prestart.1 /bin/sh: it ended with signal 9"
        );
        let mut told = Vec::new();
        run_each("poststop", &list, b"", |error| told.push(message(&*error)));
        assert_eq!(told.len(), 2);
        assert!(
            told[1].contains("hooks.poststop.2 /bin/sh: it ended with exit code 5"),
            "{told:?}"
        );
        let missing = Hook {
            path: "/nonexistent/hook".into(),
            ..shell("")
        };
        assert!(failure(&missing, b"").contains("/nonexistent/hook: No such file"));
    }
}
