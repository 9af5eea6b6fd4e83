//! `snapshot`: what snapshots, restores, forks and clones cost.
//!
//! One file for each kind of figure; each says between which two events it measures. The guest of all but the last is
//! the probe (tests/probe) with its word `watch`, which does what single bytes of serial input ask and measures by its
//! own counter how long it stood still:
//!
//! - `restore`: from exec to the first byte of a restored guest;
//! - `pause`: how long a full snapshot, a diff snapshot and a fork stop a guest;
//! - `clones`: how fast clones come one after another, and what many that are alive at once take of the host;
//! - `working_set`: until a restored guest has written 1,000 pages;
//! - `linux`: from exec to the first ping reply of a restored Linux;
//! - `place` and `machine`: where the files lie, and a guest that is driven by an API.
//!
//! A request that a monitor refuses takes that monitor out of the figure, and is said below the tables: what is missing
//! is never a figure. So does a failure, but then the program fails at its end.

mod clones;
mod linux;
pub mod machine;
mod pause;
pub mod place;
mod restore;
mod working_set;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;

use crate::failure::{Failure, Result};
use crate::monitor::{CommandLine, Monitor};
use crate::report::Measured;
use crate::rounds::{self, Figure, Plan, Sample};
use crate::sys;
use crate::workspace::Workspace;

use place::Place;

/// How the figures are counted, for the foot of the table.
const NOTES: &str = "\
counted: all files are on tmpfs; the log level is Error. A restore is from exec to the guest's first byte, by one API
request on a socket that is waited for (\"--snapshot\": by that option, without an API); the guest was stopped while it
wrote bytes without end. \"floor\" maps a memory file privately, makes VM and vCPU, sets registers and runs to a first
byte (\"split\": with a split interrupt chip, as mayfly has by default). A pause as the client sees it is from sending
PATCH Paused to the answer to PATCH Resumed, with PUT /snapshot/create between; as the guest sees it, the greatest
step of its time stamp counter meanwhile, less than 0.1 ms of which is its own loop; there \"floor\" finds and writes
the pages of a memory of its own. A fork is one request on a running guest. \"Fully touched\": the guest has written to
every page. Clones are started one after another, each when the guest before has written its byte, and all stay alive;
their host memory is what MemAvailable fell by, for each; PSS is the sum over all of them. Forks are clones of a guest
that runs on.
";

/// The parts that `--row` names.
pub const ROWS: [&str; 7] = [
    "restore",
    "full",
    "fork",
    "diff",
    "clones",
    "working-set",
    "linux",
];

/// What `snapshot` is told.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// The probe guest.
    pub probe: &'a Path,
    /// The folder that `tools/guest` made, where there is one.
    pub linux: Option<&'a Path>,
    /// The names in [`ROWS`] to measure; all of them if there are none.
    pub rows: &'a [String],
    /// Clones alive at once.
    pub clones: usize,
    /// The name our own monitor is measured under.
    pub ours: &'a str,
}

/// Measures what is wanted.
pub fn measure(
    workspace: &Workspace,
    monitors: &[Monitor],
    plan: Plan,
    wanted: &Wanted<'_>,
) -> Result<Measured> {
    let bench = Bench {
        place: Place::new(workspace, wanted.probe)?,
        rows: rows(monitors, wanted.ours),
        ours: wanted.ours,
        has_option: has_option(monitors, wanted.ours),
        plan,
        left_out: RefCell::default(),
    };
    for row in bench.rows.iter().filter(|row| !bench.can_start(row)) {
        let why = "its help names no such option";
        bench.skip("all figures", &row.name, why);
    }
    let has = |row: &str| wanted.rows.is_empty() || wanted.rows.iter().any(|name| name == row);
    let mut figures = Vec::new();
    if has("restore") {
        figures.extend(restore::measure(&bench)?);
    }
    if has("full") {
        figures.extend(pause::full(&bench)?);
    }
    if has("fork") {
        figures.extend(pause::fork(&bench)?);
    }
    if has("diff") {
        figures.extend(pause::diff(&bench)?);
    }
    if has("clones") {
        figures.extend(clones::measure(&bench, wanted.clones)?);
    }
    if has("working-set") {
        figures.extend(working_set::measure(&bench)?);
    }
    if has("linux") {
        figures.extend(linux::measure(&bench, wanted.linux)?);
    }
    let mut notes = NOTES.to_owned();
    let left_out = bench.left_out.into_inner();
    for ((what, who), reason) in &left_out {
        let (how, why) = match reason {
            Reason::Missing(why) => ("skipped", why),
            Reason::Failed(why) => ("failed", why),
        };
        notes.push_str(&format!("{how}: {what}, {who}: {why}\n"));
    }
    let mut reasons = left_out.values();
    Ok(Measured {
        rows: bench.rows,
        figures,
        notes,
        is_too_busy: false,
        has_failures: reasons.any(|reason| matches!(reason, Reason::Failed(_))),
    })
}

/// Why a monitor is left out of a figure.
enum Reason {
    /// It has no such thing.
    Missing(String),
    /// It was to have it.
    Failed(String),
}

/// What all figures need.
struct Bench<'a> {
    place: Place<'a>,
    rows: Vec<Monitor>,
    ours: &'a str,
    /// Whether ours has the option `--snapshot`.
    has_option: bool,
    plan: Plan,
    /// By figure and monitor: why it was left out.
    left_out: RefCell<BTreeMap<(String, String), Reason>>,
}

/// The ending of the name of a row that is started by the option `--snapshot`.
const BY_OPTION: &str = " --snapshot";

/// The floor with both interrupt chips, the monitors by their APIs, and ours also by its option.
fn rows(monitors: &[Monitor], ours: &str) -> Vec<Monitor> {
    let mut rows = crate::life::rows(monitors);
    if let Some(monitor) = monitors.iter().find(|monitor| monitor.name == ours) {
        let mut by_option = monitor.clone();
        by_option.name.push_str(BY_OPTION);
        let after_ours = rows.iter().position(|row| row.name == ours);
        rows.insert(after_ours.map_or(0, |at| at + 1), by_option);
    }
    rows
}

fn has_option(monitors: &[Monitor], ours: &str) -> bool {
    let mut monitors = monitors.iter();
    monitors.any(|monitor| monitor.name == ours && monitor.has_option("--snapshot"))
}

/// The name of the monitor whose snapshots a row restores.
fn own_name(row: &Monitor) -> &str {
    row.name.strip_suffix(BY_OPTION).unwrap_or(&row.name)
}

impl Bench<'_> {
    /// Whether a row can be started in its way.
    fn can_start(&self, row: &Monitor) -> bool {
        self.has_option || !row.name.ends_with(BY_OPTION)
    }

    /// A row that stands for a monitor by its API.
    fn is_by_api(&self, row: &Monitor) -> bool {
        row.has_api() && !row.name.ends_with(BY_OPTION)
    }

    fn is_ours(&self, row: &Monitor) -> bool {
        row.name == self.ours
    }

    fn is_floor(&self, row: &Monitor) -> bool {
        row.command_line == CommandLine::Floor
    }

    fn monitors_by_api(&self) -> impl Iterator<Item = &Monitor> {
        self.rows.iter().filter(|row| self.is_by_api(row))
    }

    /// Says that a monitor is left out of a figure, since it has no such thing.
    fn skip(&self, what: &str, who: &str, why: &str) {
        self.leave_out(what, who, Reason::Missing(why.to_owned()));
    }

    fn leave_out(&self, what: &str, who: &str, reason: Reason) {
        let key = (what.to_owned(), who.to_owned());
        self.left_out.borrow_mut().insert(key, reason);
    }

    /// The value; or nothing if the monitor refused a request on the way to it, or failed, which is said.
    fn or_leave_out<T>(&self, what: &str, row: &Monitor, made: Result<T>) -> Result<Option<T>> {
        let failure = match made {
            Ok(value) => return Ok(Some(value)),
            Err(failure) if sys::interrupted() => return Err(failure),
            Err(failure) => failure,
        };
        let why = failure.to_string();
        let reason = if failure.is_refusal() {
            Reason::Missing(why)
        } else {
            eprintln!("snapshot: {what}: {} failed: {why}", row.name);
            Reason::Failed(why)
        };
        self.leave_out(what, &row.name, reason);
        Ok(None)
    }

    /// Runs `measure` in rounds for the rows that `takes_part` names, until they refuse something or fail. A share of the
    /// rounds is run where one takes seconds.
    fn rounds(
        &self,
        what: &str,
        share: f64,
        takes_part: impl Fn(&Monitor) -> bool,
        mut measure: impl FnMut(&Monitor) -> Result<Vec<Sample>>,
    ) -> Result<Vec<Figure>> {
        let plan = Plan {
            warm_up: if share < 1.0 { 0 } else { self.plan.warm_up },
            runs: ((self.plan.runs as f64 * share).round() as usize).max(1),
        };
        let is_left_out = |row: &Monitor| {
            let key = (what.to_owned(), row.name.clone());
            self.left_out.borrow().contains_key(&key)
        };
        eprintln!("snapshot: {what}");
        rounds::run(plan, &self.rows, |row| {
            if !takes_part(row) || is_left_out(row) {
                return Ok(Vec::new());
            }
            let samples = self.or_leave_out(what, row, measure(row))?;
            Ok(samples.unwrap_or_default())
        })
    }

    /// Whether the host has this much memory to spare; otherwise the figure is skipped for every monitor.
    fn has_memory(&self, what: &str, mib: u64) -> Result<bool> {
        let available = crate::proc::available()?;
        let enough = available >= mib as f64;
        if !enough {
            let why = format!("it needs {mib} MiB of free memory, and {available:.0} are left");
            self.skip(what, "all", &why);
        }
        Ok(enough)
    }
}

/// Checks the names given to `--row`.
pub fn check_rows(rows: &[String]) -> Result<()> {
    match rows.iter().find(|row| !ROWS.contains(&row.as_str())) {
        Some(unknown) => Err(Failure::new(format!(
            "--row takes {}, not {unknown}",
            ROWS.join(", ")
        ))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn monitor(name: &str, command_line: CommandLine) -> Monitor {
        Monitor {
            name: name.to_owned(),
            path: "/nowhere".into(),
            command_line,
            extra: Vec::new(),
        }
    }

    #[test]
    fn rows_when_made_have_the_floor_and_ours_in_two_ways() {
        let monitors = [
            monitor("floor", CommandLine::Floor),
            monitor("mayfly", CommandLine::Firecracker),
            monitor("b", CommandLine::Firecracker),
        ];
        let names: Vec<String> = rows(&monitors, "mayfly")
            .into_iter()
            .map(|row| row.name)
            .collect();
        assert_eq!(
            names,
            ["floor (split)", "floor", "mayfly", "mayfly --snapshot", "b"]
        );
    }

    #[test]
    fn rows_when_named_must_be_known() {
        assert!(check_rows(&["full".to_owned(), "fork".to_owned()]).is_ok());
        assert!(check_rows(&["pause".to_owned()]).is_err());
    }
}
