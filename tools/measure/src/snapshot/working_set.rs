//! Until a restored guest has written 1,000 pages: from exec to its byte.
//!
//! The guest watches when it is stopped. The input that has it write waits for it, so it begins with its first
//! instructions after the restore; its byte comes when all pages are written. They are spread evenly over memory and
//! all in the memory file, since the guest has touched everything before.

use super::Bench;
use super::machine::{restore, snapshot_of};
use super::place::Guest;
use crate::failure::Result;
use crate::monitor::Monitor;
use crate::rounds::{Figure, Sample};
use std::collections::HashMap;

/// Restores each monitor's own snapshot without a recorded working set.
pub fn measure(bench: &Bench<'_>) -> Result<Vec<Figure>> {
    let what = "restore: exec to 1,000 pages written, 128 MiB fully touched";
    let guest = Guest {
        memory: 128,
        touched: true,
        ..Guest::default()
    };
    let mut snapshots = HashMap::new();
    for monitor in bench.monitors_by_api() {
        let made = snapshot_of(&bench.place, monitor, guest, None);
        if let Some(files) = bench.unless_refused(what, monitor, made)? {
            snapshots.insert(monitor.name.clone(), files);
        }
    }
    let takes_part = |row: &Monitor| snapshots.contains_key(&row.name);
    bench.skip(
        "restore with a recorded working set",
        "all",
        "not measured here yet",
    );
    bench.rounds(what, 1.0, takes_part, |row| {
        let (running, byte) = restore(&bench.place, row, &snapshots[&row.name], None, b"w")?;
        let ms = running.ms(byte);
        running.stop()?;
        Ok(vec![Sample::ms(what, ms)])
    })
}
