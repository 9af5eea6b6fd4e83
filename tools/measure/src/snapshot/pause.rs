//! How long a guest stands still for a snapshot or a fork.
//!
//! As the client sees it: from before PATCH Paused is sent until the answer to PATCH Resumed has come, with
//! PUT /snapshot/create between (a fork is one request). As the guest sees it: the greatest gap of its counter between
//! two questions, one before and one after. The floor is a program without a guest that finds and writes the same pages.

use std::ffi::OsStr;
use std::time::Instant;

use serde_json::json;

use super::Bench;
use super::machine::Machine;
use super::place::{Files, Guest};
use crate::failure::{Failure, Result};
use crate::monitor::Monitor;
use crate::rounds::{Figure, Sample};

/// A full snapshot of a guest that was started just before.
pub fn full(bench: &Bench<'_>) -> Result<Vec<Figure>> {
    let cases = [
        ("128 MiB barely used", 128, false, 1.0),
        ("1 GiB fully touched", 1024, true, 0.25),
    ];
    let mut figures = Vec::new();
    for (name, memory, touched, share) in cases {
        let guest = Guest {
            memory,
            touched,
            ..Guest::default()
        };
        let what = format!("full snapshot, {name}");
        if !bench.has_memory(&what, memory * 3)? {
            continue;
        }
        // The floor has no interrupt chip here, so once is enough.
        let is_floor = |row: &Monitor| bench.is_floor(row) && row.extra.is_empty();
        let takes_part = |row: &Monitor| bench.is_by_api(row) || is_floor(row);
        figures.extend(bench.rounds(&what, share, takes_part, |row| {
            let files = bench.place.files()?;
            if bench.is_floor(row) {
                let ms = floor(row, guest, &files)?;
                let [client, _] = samples(&what, ms, ms);
                return Ok(vec![client]);
            }
            let mut machine = Machine::boot(&bench.place, row, guest)?;
            machine.gap()?;
            let client = machine.snapshot("Full", &files)?;
            let samples = samples(&what, client, machine.gap()?);
            let file = Sample::mib(format!("{what}: memory file"), files.allocated()?);
            machine.stop()?;
            Ok(samples.into_iter().chain([file]).collect())
        })?);
    }
    Ok(figures)
}

/// How long the floor takes to write a memory image, in milliseconds.
fn floor(row: &Monitor, guest: Guest, files: &Files) -> Result<f64> {
    let memory = guest.memory.to_string();
    let touched = if guest.touched { "all" } else { "few" };
    let path = files.memory();
    let words: [&OsStr; 4] = [
        "--image".as_ref(),
        memory.as_ref(),
        touched.as_ref(),
        path.as_ref(),
    ];
    let mut running = row.start_with(&words)?;
    let said = running.said(" ms\n")?;
    running.exit()?;
    let number = said.strip_prefix("took ").and_then(|rest| {
        let (number, _) = rest.split_once(' ')?;
        number.parse().ok()
    });
    number.ok_or_else(|| Failure::new(format!("the floor told no time, but: {said}")))
}

/// A diff snapshot after a full one and 1,000 written pages.
pub fn diff(bench: &Bench<'_>) -> Result<Vec<Figure>> {
    let what = "diff snapshot, 1 GiB fully touched, 1,000 dirty pages";
    let guest = Guest {
        memory: 1024,
        touched: true,
        tracked: true,
        ..Guest::default()
    };
    if !bench.has_memory(what, guest.memory * 3)? {
        return Ok(Vec::new());
    }
    let by_api = |row: &Monitor| bench.is_by_api(row);
    bench.rounds(what, 0.25, by_api, |row| {
        let (base, files) = (bench.place.files()?, bench.place.files()?);
        let mut machine = Machine::boot(&bench.place, row, guest)?;
        machine.snapshot("Full", &base)?;
        machine.do_it(b'w')?;
        machine.gap()?;
        let client = machine.snapshot("Diff", &files)?;
        let samples = samples(what, client, machine.gap()?);
        let file = Sample::mib(format!("{what}: memory file"), files.allocated()?);
        machine.stop()?;
        Ok(samples.into_iter().chain([file]).collect())
    })
}

/// A fork of a running guest. Only our own monitor has such a thing.
pub fn fork(bench: &Bench<'_>) -> Result<Vec<Figure>> {
    let mut figures = Vec::new();
    for (name, memory) in [("1 GiB", 1024), ("4 GiB", 4096)] {
        let guest = Guest {
            memory,
            touched: true,
            shared: true,
            ..Guest::default()
        };
        let what = format!("fork, {name} fully touched");
        if !bench.has_memory(&what, memory * 2)? {
            continue;
        }
        let ours = |row: &Monitor| bench.is_ours(row);
        figures.extend(bench.rounds(&what, 0.25, ours, |row| {
            let files = bench.place.files()?;
            let mut machine = Machine::boot(&bench.place, row, guest)?;
            machine.gap()?;
            let body = json!({ "snapshot_type": "Fork", "snapshot_path": files.state() });
            let began = Instant::now();
            machine.client.put("/snapshot/create", &body)?;
            let client = began.elapsed().as_secs_f64() * 1e3;
            let gap = machine.gap()?;
            machine.stop()?;
            Ok(vec![
                Sample::ms(format!("{what}: pause as the guest sees it"), gap),
                Sample::ms(format!("{what}: the whole request"), client),
            ])
        })?);
    }
    Ok(figures)
}

fn samples(what: &str, client: f64, guest: f64) -> [Sample; 2] {
    [
        Sample::ms(format!("{what}: pause as the client sees it"), client),
        Sample::ms(format!("{what}: pause as the guest sees it"), guest),
    ]
}
