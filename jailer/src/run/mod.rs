//! `mayfly-jailer run`: one microVM in an empty jail, from nothing to nothing.
//!
//! ```text
//!    terminal, file                   clients          control groups, sockets at a path
//!           |                            |                        |
//!   +-------v------+  channel    +-------v-----+          +-------v------+
//!   |  supervisor  |------------>|   monitor   |          |    keeper    |
//!   | (supervise)  |   API, fds  | (the jail)  |<---------| (only if     |
//!   |              |------------>| process 1   |  groups  |  needed)     |
//!   +--------------+             +-------------+          +--------------+
//!          '------------- channel, process descriptors ----------'
//! ```
//!
//! - The *supervisor* (this process) opens everything by its name on the host (`spec`), makes the jail,
//!   configures and starts the monitor through its API, relays the console, waits, reports how it
//!   ended (`outcome`).
//! - The *monitor* is a copy of this process that enters the empty jail (`jail`, `network`) and
//!   executes the monitor there. It ends when the supervisor ends.
//! - The *keeper* (`keeper`) exists only if there is something with a name to remove or a report to
//!   write.
//! - A guest that runs a command has an agent, with which the supervisor has a session (`agent`).
//!
//! - A guest with an agent may be a copy of one that waits for its disks (`template`).
//!
//! Imports point down this list: `supervise`, `keeper`, `outcome`, `jail`, `network`, `spec`, `template`, `agent`,
//! `channel`.

pub mod agent;
pub mod jail;
pub mod outcome;
pub mod spec;
pub mod supervise;

mod channel;
mod keeper;
mod network;
mod template;

use std::io::Write as _;

use self::outcome::report::Report;
use self::outcome::{Seen, Times, Verdict};
use self::spec::Spec;
use self::spec::options::Options;
use self::supervise::start::start;
use self::supervise::{Progress, Watch};
use crate::error::{AnyError, message};
use crate::sys::{self, Inherited};

/// Runs a microVM and returns the exit code.
pub fn run(mut options: Options, inherited: Inherited, began_us: u64) -> i32 {
    sys::survive_writes();
    let id = options
        .id
        .take()
        .unwrap_or_else(|| format!("vm-{}", std::process::id()));
    let quiet = options.quiet;
    let has_command = options.guest.is_some();
    // While descriptors that were passed are there.
    let read = options.guest.as_mut().map(|guest| guest.command.read());
    let read = read.transpose();
    let prepared = read.and_then(|_| spec::prepare(&mut options, inherited));
    let report = options.exit_report.take();
    let report = match report.as_deref().map(Report::open).transpose() {
        Ok(report) => report,
        Err(error) => {
            let code = Verdict::not_started(String::new())
                .with_command(has_command)
                .code;
            return complain(&message(&*error), code);
        }
    };
    let watched = prepared
        .and_then(|prepared| Spec::open(options, &id, began_us, prepared))
        .and_then(|spec| start(spec, report.as_ref()))
        .map(Watch::run);
    let (watched, keeper) = match watched {
        Ok((watched, keeper)) => (Ok(watched), keeper),
        Err(error) => (Err(error), None),
    };
    if let Ok(watched) = &watched
        && !watched.console_tail.trim().is_empty()
        && watched.verdict().code != 0
    {
        let text = format!(
            "mayfly-jailer: the guest's console at its end:\n{}\n",
            watched.console_tail.trim_end()
        );
        // With standard error gone, the exit code still says it.
        let _ = std::io::stderr().write_all(text.as_bytes());
    }
    let (verdict, facts) = conclude(&id, watched, began_us, has_command);
    if let Some(Err(error)) = report.map(|report| report.write(&facts)) {
        complain(&message(&error), 0);
    }
    if let Some(keeper) = keeper {
        keeper.dismiss();
    }
    match verdict.message.as_str() {
        "" => verdict.code,
        _ if verdict.code == 0 && quiet => 0,
        text => complain(text, verdict.code),
    }
}

fn conclude(
    id: &str,
    watched: Result<Progress, AnyError>,
    began_us: u64,
    has_command: bool,
) -> (Verdict, serde_json::Value) {
    match watched {
        Ok(watched) => {
            let verdict = watched.verdict().with_command(has_command);
            let ended = watched.ended.and_then(Result::ok);
            let facts = outcome::facts(id, &verdict, ended, &watched.seen, &watched.times);
            (verdict, facts)
        }
        Err(error) => {
            let verdict = Verdict::not_started(message(&*error)).with_command(has_command);
            let times = Times::ended_now(began_us);
            let facts = outcome::facts(id, &verdict, None, &Seen::default(), &times);
            (verdict, facts)
        }
    }
}

fn complain(text: &str, code: i32) -> i32 {
    // With standard error gone, the exit code still says it.
    let _ = std::io::stderr().write_all(format!("mayfly-jailer: {text}\n").as_bytes());
    code
}
