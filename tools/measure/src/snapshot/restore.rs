//! From exec to the first byte of a restored guest.
//!
//! The guest was stopped while it wrote bytes without end, so its first instructions after the restore write one. The
//! clock starts just before the process is made and stops when its output becomes readable and holds that byte. A
//! monitor with an API is connected to when its socket appears, and told by one request; the floor's guest is made for
//! the purpose and not restored from a state.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::time::Instant;

use super::machine::{Load, restore, snapshot_of};
use super::place::{Files, Guest};
use super::{Bench, own_name};
use crate::failure::Result;
use crate::guest::LOAD_AT;
use crate::monitor::{Monitor, Running};
use crate::rounds::{Figure, Sample};

const CASES: [(&str, Guest); 3] = [
    ("128 MiB", plain(128, false)),
    ("1 GiB", plain(1024, false)),
    ("1 GiB fully touched", plain(1024, true)),
];

/// A guest with nothing but so much memory.
const fn plain(memory: u64, touched: bool) -> Guest {
    Guest {
        memory,
        touched,
        shared: false,
        tracked: false,
    }
}

/// Restores each monitor's own snapshot.
pub fn measure(bench: &Bench<'_>) -> Result<Vec<Figure>> {
    let mut figures = Vec::new();
    for (name, guest) in CASES {
        let figure = format!("restore: exec to first guest byte, {name}");
        let floor = bench.place.floor(guest)?;
        let mut snapshots = HashMap::new();
        for monitor in bench.monitors_by_api() {
            let made = snapshot_of(&bench.place, monitor, guest, Some(b'p'));
            if let Some(files) = bench.or_leave_out(&figure, monitor, made)? {
                snapshots.insert(monitor.name.as_str(), files);
            }
        }
        let files_of = |row: &Monitor| {
            if bench.is_floor(row) {
                Some(&floor)
            } else {
                snapshots.get(own_name(row))
            }
        };
        let takes_part = |row: &Monitor| files_of(row).is_some() && bench.can_start(row);
        figures.extend(bench.rounds(&figure, 1.0, takes_part, |row| {
            let Some(files) = files_of(row) else {
                return Ok(Vec::new());
            };
            let (running, byte) = by_row(bench, row, files, b"")?;
            let ms = running.ms(byte);
            running.stop()?;
            Ok(vec![Sample::ms(&figure, ms)])
        })?);
    }
    Ok(figures)
}

/// Restores in the row's way, with input for the guest; the process, and when the guest's first byte came.
pub fn by_row(
    bench: &Bench<'_>,
    row: &Monitor,
    files: &Files,
    input: &[u8],
) -> Result<(Running, Instant)> {
    if bench.is_floor(row) {
        return floor(row, files);
    }
    if bench.is_by_api(row) {
        return restore(&bench.place, row, files, Load::ByPath, input);
    }
    let words = [
        "--no-api".as_ref(),
        "--snapshot".as_ref(),
        files.folder().as_os_str(),
    ];
    let mut running = row.start_with(&words)?;
    running.tell(input)?;
    let byte = running.first_byte(None)?;
    Ok((running, byte))
}

/// Starts the floor on a memory file of its own.
fn floor(row: &Monitor, files: &Files) -> Result<(Running, Instant)> {
    let memory = files.memory();
    let entry = LOAD_AT.to_string();
    let words: [&OsStr; 3] = ["--restore".as_ref(), memory.as_ref(), entry.as_ref()];
    let mut running = row.start_with(&words)?;
    let byte = running.first_byte(None)?;
    Ok((running, byte))
}
