//! The jailer: builds the jail a mayfly runs in, drops privileges and executes the monitor.
//!
//! One thread, one straight sequence of privileged steps, each with its error and the reason for
//! its place. `compat` is that sequence for the jail that Firecracker's clients know, `run` the
//! everyday command with the empty jail, `check` the question whether it would work. What they are made of: `root` (folders, nodes, pivot_root), `cgroup`, `netns`, `undo` (how to take everything
//! back), `failure` (how a step says that it failed), and `sys`, the only unsafe code.

mod args;
mod cgroup;
mod check;
mod compat;
mod error;
mod failure;
mod filter;
mod guest;
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
use failure::Failure;

fn main() -> ExitCode {
    let inherited = sys::Inherited::at_start();
    let started = compat::Started::now();
    // Before the first child.
    sys::expect_children();
    let words: Vec<OsString> = std::env::args_os().skip(1).collect();
    let result = match words.split_first() {
        Some((word, rest)) if word == "run" => match run::args::parse(rest.to_vec()) {
            Ok(Some(options)) => {
                sys::exit_now(run::run(options, inherited, started.monotonic_us()))
            }
            Ok(None) => print(run::args::HELP),
            Err(failure) => Err(failure),
        },
        Some((word, rest)) if word == "check" => match check::parse(rest.to_vec()) {
            Ok(Some(options)) => sys::exit_now(check::check(&options, started.monotonic_us())),
            Ok(None) => print(check::HELP),
            Err(failure) => Err(failure),
        },
        _ => args::parse(words).and_then(|command| match command {
            Command::Help => print(args::HELP),
            Command::Version => print(concat!(
                "mayfly-jailer v",
                env!("CARGO_PKG_VERSION"),
                " (flags of Firecracker v1.17.0)\n"
            )),
            Command::Compatible(args) => compat::run(&args, inherited, started),
        }),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // With standard error gone, the exit code still says it.
            let line = format!("mayfly-jailer: {failure}\n");
            let _ = std::io::stderr().write_all(line.as_bytes());
            ExitCode::FAILURE
        }
    }
}

fn print(text: &str) -> Result<(), Failure> {
    use failure::Doing;
    std::io::stdout().write_all(text.as_bytes()).doing("print")
}
