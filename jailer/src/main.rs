//! The jailer: builds the jail a mayfly runs in, drops privileges and executes the monitor.
//!
//! One thread, one straight sequence of privileged steps, each with its error and the reason for
//! its place. `compat` is that sequence for the jail that Firecracker's clients know, `run` the
//! everyday command with the empty jail, `check` tries whether this host can run microVMs. What they
//! are made of: `root` (folders, nodes, pivot_root), `cgroup`, `netns`, `filter` (seccomp), `undo`,
//! `monitor` (its executable and limits), `error`, and `sys`, the only unsafe code.

mod args;
mod cgroup;
mod check;
mod compat;
mod error;
mod filter;
mod guest;
mod monitor;
mod netns;
mod root;
mod run;
mod sys;
#[cfg(test)]
mod testing;
mod undo;

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

use args::Command;
use error::{AnyError, Step as _, message};

fn main() -> ExitCode {
    let inherited = sys::Inherited::at_start();
    // Before the first child.
    sys::expect_children();
    match dispatch(inherited) {
        Ok(code) => code,
        Err(error) => {
            // With standard error gone, the exit code still says it.
            let line = format!("mayfly-jailer: {}\n", message(&*error));
            let _ = std::io::stderr().write_all(line.as_bytes());
            ExitCode::FAILURE
        }
    }
}

fn dispatch(inherited: sys::Inherited) -> Result<ExitCode, AnyError> {
    let started = (sys::monotonic_us(), sys::process_cpu_us());
    let mut words: Vec<OsString> = std::env::args_os().skip(1).collect();
    let subcommand = words.first().and_then(|word| word.to_str());
    match subcommand {
        Some("run") => match run::spec::options::parse(words.split_off(1))? {
            Some(options) => sys::exit_now(run::run(options, inherited, started.0)),
            None => print(run::spec::options::HELP),
        },
        Some("check") => match check::parse(words.split_off(1))? {
            Some(words) => sys::exit_now(check::check(words, inherited, started.0)),
            None => print(check::HELP),
        },
        _ => match args::parse(words)? {
            Command::Help => print(args::HELP),
            Command::Version => print(concat!(
                "mayfly-jailer v",
                env!("CARGO_PKG_VERSION"),
                " (flags of Firecracker v1.17.0)\n"
            )),
            Command::Compatible(args) => {
                compat::run(&args, inherited, started)?;
                Ok(ExitCode::SUCCESS)
            }
        },
    }
}

fn print(text: &str) -> Result<ExitCode, AnyError> {
    std::io::stdout().write_all(text.as_bytes()).step("print")?;
    Ok(ExitCode::SUCCESS)
}
