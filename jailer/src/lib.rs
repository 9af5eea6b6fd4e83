//! The jailer: builds the jail a mayfly runs in, drops privileges and executes the monitor.
//!
//! One thread, one straight sequence of privileged steps, each with its error and the reason for
//! its place. `compat` is that sequence for the jail that Firecracker's clients know, `run` the
//! everyday command with the empty jail, `attach` what reaches a guest that runs a command, `prepare` waits in
//! a network namespace for what is to be run, `check` tries whether this host can run microVMs. What they are made of: `process` (one in a guest), `console`,
//! `root` (folders, nodes, pivot_root), `cgroup`, `netns`, `filter` (seccomp), `undo`, `monitor` (its
//! executable and limits), `input` (small files of the caller's), `error`, and `sys`, the only unsafe code.

mod args;
mod attach;
mod cgroup;
mod check;
mod compat;
mod console;
mod error;
mod filter;
/// Entry points for `tools/fuzz`.
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzz;
#[cfg(any(test, fuzzing))]
#[path = "../../tests/common/fuzz_input.rs"]
mod fuzz_input;
#[cfg(test)]
#[path = "../../tests/common/fuzz_run.rs"]
mod fuzz_run;
mod guest;
mod host;
mod input;
mod monitor;
mod netns;
mod prepare;
mod process;
mod root;
mod run;
mod sys;
#[cfg(any(test, fuzzing))]
mod testing;
mod undo;

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

use args::Command;
use error::{AnyError, Step as _, message};

/// The program.
pub fn main() -> ExitCode {
    let inherited = sys::Inherited::at_start();
    // Before the first child.
    sys::expect_children();
    match dispatch(inherited) {
        Ok(code) => code,
        Err(error) => {
            // With standard error gone, the exit code still says it.
            let line = format!("mayfly-jailer: {}\n", message(&*error));
            let _ = std::io::stderr().write_all(line.as_bytes());
            match runs_a_command() {
                true => ExitCode::from(125),
                false => ExitCode::FAILURE,
            }
        }
    }
}

/// Whether the exit code would be a command's, from which failures of this program stay apart.
fn runs_a_command() -> bool {
    let mut words = std::env::args_os().skip(1).take_while(|word| word != "--");
    match words.next() {
        Some(word) if word == "exec" || word == "prepare" => true,
        Some(word) if word == "run" => words.any(|word| word == "--image"),
        _ => false,
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
        Some("exec") => match attach::parse_exec(words.split_off(1))? {
            Some(exec) => sys::exit_now(attach::exec(exec, inherited)),
            None => print(attach::EXEC_HELP),
        },
        Some("prepare") => match prepare::parse(words.split_off(1))? {
            Some(order) => match prepare::prepare(&order)? {},
            None => print(prepare::HELP),
        },
        Some("cp") => match attach::parse_copy(words.split_off(1))? {
            Some(copy) => sys::exit_now(attach::copy(copy, inherited)),
            None => print(attach::COPY_HELP),
        },
        Some(name @ ("start" | "signal" | "state")) => {
            let name = name.to_owned();
            match attach::parse_control(&name, words.split_off(1))? {
                Some(control) => sys::exit_now(attach::control(control, inherited)),
                None => print(attach::CONTROL_HELP),
            }
        }
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
