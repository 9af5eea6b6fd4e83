//! `block` and `net`: what disks and network interfaces carry, beside the floor of the host and beside other monitors.
//!
//! - `guest`: a probe guest that is told by its console what to do, and what it and the kernel say of the work;
//! - `block`: the cases of disks, and the same reads and writes by this program itself, which is the floor;
//! - `net`: the cases of network interfaces, and the same traffic by this program itself at the bare tap;
//! - `linux`: a disk and streams of TCP under a Linux guest instead;
//! - `picture`: the same as a chart;
//! - `summary`: one line for each case: our monitor beside the better engine of the best peer.
//!
//! The guest is bare metal, polls, and keeps a number of requests in flight by itself (tests/probe, words/load), so that
//! what a guest's kernel costs is in no figure.

mod block;
mod guest;
mod linux;
mod net;
pub mod picture;
mod summary;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use serde_json::{Value, json};

use crate::failure::{Failure, Result};
use crate::monitor::{CommandLine, Monitor};
use crate::report::Measured;
use crate::rounds::{self, Figure, Plan};
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

/// A row of the tables: a monitor, and what its disks are.
#[derive(Clone, Debug)]
struct Row {
    monitor: Monitor,
    engine: Option<&'static str>,
    overlay: Option<Overlay>,
}

/// Where an overlay is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Overlay {
    File,
    Memory,
}

/// The floor, our own monitor, and every other one; with each engine of its disks where that matters.
fn rows(monitors: &[Monitor], ours: &str, with_engines: bool) -> Vec<Row> {
    let mut rows = Vec::new();
    for monitor in monitors {
        if !with_engines || monitor.command_line == CommandLine::Floor || monitor.name == ours {
            rows.push(Row {
                monitor: monitor.clone(),
                engine: None,
                overlay: None,
            });
            continue;
        }
        for engine in ["Sync", "Async"] {
            let mut monitor = monitor.clone();
            monitor.name = format!("{} {}", monitor.name, engine.to_lowercase());
            rows.push(Row {
                monitor,
                engine: Some(engine),
                overlay: None,
            });
        }
    }
    rows
}

/// Our own monitor without an overlay, and with each.
fn overlay_rows(monitors: &[Monitor], ours: &str) -> Result<Vec<Row>> {
    let ours = monitors.iter().find(|monitor| monitor.name == ours);
    let ours = ours.ok_or_else(|| Failure::new("overlay measures mayfly, which was left out"))?;
    let row = |(what, overlay)| {
        let mut monitor = ours.clone();
        monitor.name.push_str(what);
        Row {
            monitor,
            engine: None,
            overlay,
        }
    };
    let kinds = [
        ("", None),
        (", overlay in a file", Some(Overlay::File)),
        (", overlay in memory", Some(Overlay::Memory)),
    ];
    Ok(kinds.map(row).into())
}

/// Measures disks.
pub fn block(
    workspace: &Workspace,
    monitors: &[Monitor],
    plan: Plan,
    wanted: &Wanted<'_>,
) -> Result<Measured> {
    let rows = rows(monitors, wanted.ours, true);
    let (figures, waits) = disks(workspace, &rows, plan, wanted)?;
    Ok(measured(rows, figures, wanted, block::NOTES, &waits))
}

/// The figures of disks, and what was waited for.
fn disks(
    workspace: &Workspace,
    rows: &[Row],
    plan: Plan,
    wanted: &Wanted<'_>,
) -> Result<(Vec<Figure>, Waits)> {
    let bench = block::Bench::new(workspace, *wanted)?;
    let mut waits = Waits::default();
    let figures = rounds::run(plan, rows, |row| bench.round(row, &mut waits))?;
    Ok((figures, waits))
}

/// Measures disks with an overlay beside one without.
pub fn overlay(
    workspace: &Workspace,
    monitors: &[Monitor],
    plan: Plan,
    wanted: &Wanted<'_>,
) -> Result<Measured> {
    let rows = overlay_rows(monitors, wanted.ours)?;
    let (figures, waits) = disks(workspace, &rows, plan, wanted)?;
    Ok(Measured {
        rows: rows.into_iter().map(|row| row.monitor).collect(),
        figures,
        notes: format!("{}{}{}", block::NOTES, block::OVERLAY_NOTES, waits.text()),
        has_failures: false,
        is_too_busy: waits.too_busy(),
    })
}

/// Measures network interfaces.
pub fn net(
    workspace: &Workspace,
    monitors: &[Monitor],
    plan: Plan,
    wanted: &Wanted<'_>,
) -> Result<Measured> {
    let rows = rows(monitors, wanted.ours, false);
    let bench = net::Bench::new(workspace, *wanted)?;
    let mut waits = Waits::default();
    let figures = rounds::run(plan, &rows, |row| bench.round(row, &mut waits))?;
    Ok(measured(rows, figures, wanted, net::NOTES, &waits))
}

/// Measures a disk and streams of TCP under a Linux guest; `folder` is what `tools/guest` made.
pub fn linux(
    workspace: &Workspace,
    monitors: &[Monitor],
    plan: Plan,
    wanted: &Wanted<'_>,
    folder: Option<&Path>,
) -> Result<Measured> {
    let rows = rows(monitors, wanted.ours, true);
    let bench = linux::Bench::new(workspace, *wanted, folder)?;
    let figures = rounds::run(plan, &rows, |row| bench.round(row))?;
    Ok(measured(
        rows,
        figures,
        wanted,
        linux::NOTES,
        &Waits::default(),
    ))
}

/// Measures both. Rows that only one of them has are empty in the figures of the other.
pub fn all(
    workspace: &Workspace,
    monitors: &[Monitor],
    plan: Plan,
    wanted: &Wanted<'_>,
) -> Result<Measured> {
    let disks = block(workspace, monitors, plan, wanted)?;
    let interfaces = net(workspace, monitors, plan, wanted)?;
    let mut rows = disks.rows;
    let mut figures = disks.figures;
    for row in &interfaces.rows {
        if !rows.iter().any(|known| known.name == row.name) {
            rows.push(row.clone());
        }
    }
    for figure in &mut figures {
        figure.samples.resize(rows.len(), Vec::new());
    }
    for mut figure in interfaces.figures {
        let mut samples = vec![Vec::new(); rows.len()];
        for (row, taken) in interfaces.rows.iter().zip(&mut figure.samples) {
            let place = rows.iter().position(|known| known.name == row.name);
            samples[place.expect("each row was added")] = std::mem::take(taken);
        }
        figures.push(Figure { samples, ..figure });
    }
    Ok(Measured {
        rows,
        figures,
        notes: format!("{}\n{}", disks.notes, interfaces.notes),
        has_failures: false,
        is_too_busy: disks.is_too_busy || interfaces.is_too_busy,
    })
}

fn measured(
    rows: Vec<Row>,
    figures: Vec<Figure>,
    wanted: &Wanted<'_>,
    counted: &str,
    waits: &Waits,
) -> Measured {
    let rows: Vec<Monitor> = rows.into_iter().map(|row| row.monitor).collect();
    let mut notes = summary::text(&figures, &rows, wanted.ours);
    notes.push_str(counted);
    notes.push_str(&waits.text());
    Measured {
        rows,
        figures,
        notes,
        has_failures: false,
        is_too_busy: waits.too_busy(),
    }
}

/// A thread that never sleeps, as the guest's vCPU does not: the floor shares the processors with one too.
struct BusyThread {
    enough: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl BusyThread {
    fn start() -> Self {
        let enough = Arc::new(AtomicBool::new(false));
        let noticed = enough.clone();
        let thread = std::thread::spawn(move || {
            while !noticed.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        });
        Self {
            enough,
            thread: Some(thread),
        }
    }
}

impl Drop for BusyThread {
    fn drop(&mut self) {
        self.enough.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("a busy thread does not panic");
        }
    }
}

/// The member of a configuration that boots the probe guest, which then waits for words on its console.
fn boot_source(probe: &Path) -> Value {
    json!({ "kernel_image_path": probe, "boot_args": "probe=print:ready,shell" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn busy_thread_when_dropped_has_ended() {
        let busy = BusyThread::start();
        let noticed = Arc::downgrade(&busy.enough);
        drop(busy);
        assert!(noticed.upgrade().is_none());
    }

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
        let names: Vec<String> = rows(&monitors, "mayfly", true)
            .into_iter()
            .map(|row| row.monitor.name)
            .collect();
        assert_eq!(names, ["floor", "mayfly", "b sync", "b async"]);

        let rows = overlay_rows(&monitors, "mayfly").unwrap();
        let kinds: Vec<_> = rows.iter().map(|row| row.overlay).collect();
        assert_eq!(kinds, [None, Some(Overlay::File), Some(Overlay::Memory)]);
        assert!(overlay_rows(&monitors[..1], "mayfly").is_err());
    }
}
