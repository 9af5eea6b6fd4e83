//! Programs that do part of the work: found, or the package to install is named. They run with an
//! English locale, without input unless given some, and end with this process.

use std::ffi::OsStr;
use std::io::Read;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;

use crate::failure::{Context, Failure, Result, clean};

/// How much of a program's standard error is kept.
const MESSAGES_MAX: u64 = 16 << 10;
/// How much standard output a program may have where it is read as a whole.
const OUTPUT_MAX: u64 = 16 << 20;

#[derive(Debug, Clone)]
pub struct Tool {
    program: PathBuf,
}

/// How a program ended, and what it said.
#[derive(Debug)]
pub struct Ended {
    /// None: by a signal.
    pub code: Option<i32>,
    pub output: Vec<u8>,
    messages: String,
}

impl Ended {
    /// The first line of its messages, without the program's name.
    pub fn why(&self) -> String {
        let line = self.messages.lines().find(|line| !line.trim().is_empty());
        let line = line.unwrap_or("it gave no reason").trim();
        let line = line.split_once(": ").map_or(
            line,
            |(name, rest)| {
                if name.contains(' ') { line } else { rest }
            },
        );
        clean(line.trim_end_matches('.'))
    }

    pub fn messages(&self) -> &str {
        &self.messages
    }
}

fn in_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = std::env::split_paths(&path).chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
    places
        .map(|place| place.join(name))
        .find(|place| rustix::fs::access(place, rustix::fs::Access::EXEC_OK).is_ok())
}

impl Tool {
    /// The program `name`, which Debian's `package` has.
    pub fn find(name: &'static str, package: &str) -> Result<Tool> {
        match in_path(name) {
            Some(program) => Ok(Tool { program }),
            None => Err(Failure::plain(format!(
                "the program {name} is missing; install it: apt-get install {package}"
            ))),
        }
    }

    /// A command that does not outlive this process, even one that is killed.
    pub fn command(&self) -> Command {
        self.command_ended_by("KILL")
    }

    /// The same with another signal.
    pub fn command_ended_by(&self, signal: &str) -> Command {
        let mut command = match in_path("setpriv") {
            Some(setpriv) => {
                let mut command = Command::new(setpriv);
                command.args(["--pdeathsig", signal]).arg(&self.program);
                command
            }
            None => Command::new(&self.program),
        };
        command.env("LC_ALL", "C").stdin(Stdio::null());
        command
    }

    /// Runs it to its end and takes its output whole.
    pub fn run<S: AsRef<OsStr>>(&self, args: &[S]) -> Result<Ended> {
        let mut command = self.command();
        command.args(args);
        self.finish(command, |out| {
            let mut output = Vec::new();
            out.take(OUTPUT_MAX)
                .read_to_end(&mut output)
                .map(|_| output)
        })
    }

    /// Runs `command`, which [`Tool::command`] began, while `read` takes its output.
    pub fn finish(
        &self,
        mut command: Command,
        read: impl FnOnce(&mut dyn Read) -> std::io::Result<Vec<u8>>,
    ) -> Result<Ended> {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().cannot("run", &self.program)?;
        let mut errors = child.stderr.take().expect("a pipe was asked for");
        let messages = thread::spawn(move || {
            let mut kept = Vec::new();
            let _ = (&mut errors).take(MESSAGES_MAX).read_to_end(&mut kept);
            let _ = std::io::copy(&mut errors, &mut std::io::sink());
            kept
        });
        let mut stdout = child.stdout.take().expect("a pipe was asked for");
        let output = read(&mut stdout);
        if output.is_err() {
            // What does not read on must not leave the program waiting.
            let _ = child.kill();
        }
        drop(stdout);
        let status = child.wait().cannot("wait for", &self.program)?;
        let messages = messages.join().expect("reading does not panic");
        let output = output.cannot("read the output of", &self.program)?;
        Ok(Ended {
            code: status.code(),
            output,
            messages: String::from_utf8_lossy(&messages).into_owned(),
        })
    }
}
