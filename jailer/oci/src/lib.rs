//! `mayfly-oci`: the command line of an OCI runtime, for containers that are microVMs.
//!
//! A thin program, started by an engine for each command, with one thread. It translates: config.json
//! (`bundle`) and the command line (`args`) into those of `mayfly-jailer` (`jailer`), which runs the
//! microVM and handles all that comes from the guest. What it adds is what engines expect of a runtime:
//! the state folder (`state`), control groups (`cgroup`, `scope`), users for monitors (`accounts`), hooks (`hooks`),
//! and a way to undo all of it, whichever command was killed (`lifecycle`). It never speaks to a guest.
//!
//! Imports point down this list: `commands`, `lifecycle`, `jailer`, `image`, `cgroup`, `scope`, `accounts`,
//! `bundle`, `state`, `hooks`, `process`, `host`, `user`, `input`, `error`, `args`.

mod accounts;
mod args;
mod bundle;
mod cgroup;
mod commands;
mod error;
/// Entry points for `tools/fuzz`.
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzz;
#[cfg(any(test, fuzzing))]
#[path = "../../../tests/common/fuzz_input.rs"]
mod fuzz_input;
#[cfg(test)]
#[path = "../../../tests/common/fuzz_run.rs"]
mod fuzz_run;
mod hooks;
mod host;
mod image;
mod input;
mod jailer;
mod lifecycle;
mod process;
mod scope;
mod state;
mod templates;
mod user;

use std::io::Write as _;
use std::process::ExitCode;

use args::Command;
use error::{AnyError, Level, Log, message};

/// The program.
pub fn main() -> ExitCode {
    let words = std::env::args_os().skip(1).collect();
    let (global, command) = match args::parse(words) {
        Ok(parsed) => parsed,
        Err(error) => return failed(&error.into(), &Log::default(), 1),
    };
    let log = match Log::open(global.log.as_deref(), global.log_format) {
        Ok(log) => log,
        Err(error) => return failed(&error.into(), &Log::default(), 1),
    };
    // As of the command that would have run.
    let otherwise = if matches!(command, Command::Run(..)) {
        125
    } else {
        1
    };
    match commands::execute(&global, command, &log) {
        Ok(code) => ExitCode::from(code),
        Err(error) => failed(&error, &log, otherwise),
    }
}

fn failed(error: &AnyError, log: &Log, code: u8) -> ExitCode {
    let text = message(&**error);
    log.write(Level::Error, &text);
    // What the jailer has told to the same standard error is not told again.
    if !error.is::<jailer::Told>() {
        let _ = std::io::stderr().write_all(format!("mayfly-oci: {text}\n").as_bytes());
    }
    ExitCode::from(code)
}
