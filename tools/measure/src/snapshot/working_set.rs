//! Until a restored guest has written 1,000 pages: from exec to its byte.
//!
//! The guest watches when it is stopped. The input that has it write waits for it, so it begins with its first
//! instructions after the restore; its byte comes when all pages are written. They are spread evenly over memory and
//! all in the memory file, since the guest has touched everything before. Our own monitor is measured a second time in
//! the same round with a working set that was recorded before, from a restore to the guest's write to the boot timer
//! after it had written the pages.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::Bench;
use super::machine::{Load, restore, snapshot_of};
use super::place::{Files, Guest};
use crate::failure::{Failure, Result};
use crate::monitor::Monitor;
use crate::rounds::{Figure, Sample};

const WHAT: &str = "restore: exec to 1,000 pages written, 128 MiB fully touched";
const RECORDED: &str = "restore with a recorded working set";
/// How long a working set may take to be written.
const PATIENCE: Duration = Duration::from_secs(5);

/// Restores each monitor's own snapshot without a recorded working set, and ours also with one.
pub fn measure(bench: &Bench<'_>) -> Result<Vec<Figure>> {
    let guest = Guest {
        memory: 128,
        touched: true,
        ..Guest::default()
    };
    let mut snapshots = HashMap::new();
    let mut working_set = None;
    for monitor in bench.monitors_by_api() {
        let made = snapshot_of(&bench.place, monitor, guest, None);
        let Some(files) = bench.or_leave_out(WHAT, monitor, made)? else {
            continue;
        };
        if bench.is_ours(monitor) {
            let made = record(bench, monitor, &files);
            working_set = bench.or_leave_out(RECORDED, monitor, made)?;
        }
        snapshots.insert(monitor.name.clone(), files);
    }
    let takes_part = |row: &Monitor| snapshots.contains_key(&row.name);
    bench.rounds(WHAT, 1.0, takes_part, |row| {
        let files = &snapshots[&row.name];
        let without = written(bench, row, files, Load::ByPath)?;
        let mut samples = vec![Sample::ms(WHAT, without)];
        if let Some(path) = working_set.as_deref().filter(|_| bench.is_ours(row)) {
            let with = written(bench, row, files, Load::WorkingSet(path))?;
            let figure = |what: &str| format!("{WHAT}, {what}");
            samples.push(Sample::ms(figure("recorded working set"), with));
            let ratio = with / without;
            samples.push(Sample::new(figure("with over without"), "ratio", ratio));
        }
        Ok(samples)
    })
}

fn written(bench: &Bench<'_>, row: &Monitor, files: &Files, how: Load<'_>) -> Result<f64> {
    let (running, byte) = restore(&bench.place, row, files, how, b"w")?;
    let ms = running.ms(byte);
    running.stop()?;
    Ok(ms)
}

/// Restores once, so that the working set is recorded; where it lies.
fn record(bench: &Bench<'_>, row: &Monitor, files: &Files) -> Result<PathBuf> {
    let path = files.folder().join("working-set");
    let how = Load::WorkingSet(&path);
    let (mut running, _) = restore(&bench.place, row, files, how, b"w")?;
    running.tell(b"m")?;
    running.first_byte(None)?;
    wait_for(&path)?;
    running.stop()?;
    Ok(path)
}

fn wait_for(path: &Path) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        if path.metadata().is_ok_and(|file| file.len() > 0) {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Err(Failure::refusal(
        "no working set was recorded, although the guest wrote to the boot timer",
    ))
}
