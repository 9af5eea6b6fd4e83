//! `block`: what disks carry, beside the floor of the host and beside other monitors.
//!
//! - `guest`: a probe guest that is told by its console what to do, and what it and the kernel say of the work;
//! - `block`: the cases of disks, and the same reads and writes by this program itself, which is the floor;
//! - `summary`: one line for each case: our monitor beside the better engine of the best peer.
//!
//! The guest is bare metal, polls, and keeps a number of requests in flight by itself (tests/probe, words/load), so that
//! what a guest's kernel costs is in no figure.

mod block;
mod guest;
mod summary;

use std::path::Path;

use crate::failure::Result;
use crate::monitor::{CommandLine, Monitor};
use crate::report::Measured;
use crate::rounds::{self, Plan};
use crate::workspace::Workspace;

pub use guest::Waits;

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// The probe guest.
    pub probe: &'a Path,
    /// Where disks lie.
    pub media: &'a Path,
    /// Words of the names of cases; all cases if there are none.
    pub rows: &'a [String],
    /// Milliseconds of work for each case and round.
    pub span_ms: usize,
    /// The name our own monitor is measured under.
    pub ours: &'a str,
}

impl Wanted<'_> {
    /// Whether the case `name` is to be measured.
    fn has(&self, name: &str) -> bool {
        self.rows.is_empty() || self.rows.iter().any(|row| name.contains(row.as_str()))
    }
}

/// A row of the tables: a monitor, and the engine its disks have.
#[derive(Clone, Debug)]
struct Row {
    monitor: Monitor,
    engine: Option<&'static str>,
}

/// The floor, our own monitor, and every other one with each engine.
fn rows(monitors: &[Monitor], ours: &str) -> Vec<Row> {
    let mut rows = Vec::new();
    for monitor in monitors {
        if monitor.command_line == CommandLine::Floor || monitor.name == ours {
            rows.push(Row {
                monitor: monitor.clone(),
                engine: None,
            });
            continue;
        }
        for engine in ["Sync", "Async"] {
            let mut monitor = monitor.clone();
            monitor.name = format!("{} {}", monitor.name, engine.to_lowercase());
            rows.push(Row {
                monitor,
                engine: Some(engine),
            });
        }
    }
    rows
}

/// Measures disks.
pub fn measure(
    workspace: &Workspace,
    monitors: &[Monitor],
    plan: Plan,
    wanted: &Wanted<'_>,
) -> Result<Measured> {
    let rows = rows(monitors, wanted.ours);
    let bench = block::Bench::new(workspace, *wanted)?;
    let mut waits = Waits::default();
    let figures = rounds::run(plan, &rows, |row| bench.round(row, &mut waits))?;
    let rows: Vec<Monitor> = rows.into_iter().map(|row| row.monitor).collect();
    let mut notes = summary::text(&figures, &rows, wanted.ours);
    notes.push_str(block::NOTES);
    notes.push_str(&waits.text());
    Ok(Measured {
        rows,
        figures,
        notes,
        has_failures: false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_when_made_hold_both_engines_of_others_only() {
        let monitor = |name: &str, command_line| Monitor {
            name: name.to_owned(),
            path: "/nowhere".into(),
            command_line,
            extra: Vec::new(),
        };
        let monitors = [
            monitor("floor", CommandLine::Floor),
            monitor("mayfly", CommandLine::Firecracker),
            monitor("b", CommandLine::Firecracker),
        ];
        let names: Vec<String> = rows(&monitors, "mayfly")
            .into_iter()
            .map(|row| row.monitor.name)
            .collect();
        assert_eq!(names, ["floor", "mayfly", "b sync", "b async"]);
    }
}
