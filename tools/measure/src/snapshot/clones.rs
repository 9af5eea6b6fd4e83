//! How fast clones come one after another, and what many of them take of the host while all are alive.
//!
//! A clone counts from the start of its process to its guest's byte; the next is started then. Its guest is given a byte
//! of input before the restore, answers with the byte that is waited for, and halts for ever. Clones of a snapshot come
//! from its files; forks are clones of a guest that runs beside them, whose memory was frozen by one fork and is passed
//! to each clone as a descriptor.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::json;

use super::Bench;
use super::machine::{Load, Machine, restore, snapshot_of};
use super::place::{Files, Guest};
use super::restore::by_row;
use crate::failure::{Context, Failure, Result};
use crate::monitor::{Monitor, Running};
use crate::proc;
use crate::rounds::{Figure, Sample};
use crate::sys;

/// Clones whose rate is taken.
const COUNT: usize = 100;
/// Descriptors held here for each clone: three pipes and a pidfd.
const FILES_EACH: usize = 4;
/// MiB that are left to the host: no more clones are made when less is available.
const RESERVE: f64 = 3072.0;
/// Lets the kernel catch up: what ended processes held was seen to come back over some three seconds.
const SETTLE: Duration = Duration::from_secs(3);
/// How long a fork's memory may take to come.
const PATIENCE: Duration = Duration::from_secs(20);

/// What clones are made from.
struct Source {
    files: Files,
    /// The frozen memory of a running guest, and that guest.
    fork: Option<(OwnedFd, Machine)>,
}

/// A hundred clones for their rate, then `count` at once for their memory.
pub fn measure(bench: &Bench<'_>, count: usize) -> Result<Vec<Figure>> {
    let limit = proc::open_files_limit().unwrap_or(usize::MAX);
    if count * FILES_EACH + 64 > limit {
        return Err(Failure::new(format!(
            "{count} clones need {} open files here, and the limit is {limit}: raise it with ulimit -n",
            count * FILES_EACH + 64
        )));
    }
    let mut figures = rates(bench)?;
    figures.extend(all_alive(bench, count)?);
    Ok(figures)
}

fn guest(shared: bool) -> Guest {
    Guest {
        memory: 128,
        shared,
        ..Guest::default()
    }
}

fn rates(bench: &Bench<'_>) -> Result<Vec<Figure>> {
    let what = format!("clones of a snapshot, {COUNT} one after another");
    bench.rounds(
        &what,
        0.1,
        |row| bench.can_start(row),
        |row| {
            let source = snapshot(bench, row)?;
            let began = Instant::now();
            let clones = clones(bench, row, &source, COUNT)?;
            let seconds = began.elapsed().as_secs_f64();
            let rate = clones.len() as f64 / seconds;
            end(clones)?;
            Ok(vec![Sample::new(&what, "1/s", rate)])
        },
    )
}

fn all_alive(bench: &Bench<'_>, count: usize) -> Result<Vec<Figure>> {
    let what = format!("{count} clones alive at once");
    bench.rounds(
        &what,
        0.0,
        |row| bench.is_floor(row) || bench.is_by_api(row),
        |row| {
            let source = if bench.is_ours(row) {
                fork(bench, row)?
            } else {
                snapshot(bench, row)?
            };
            std::thread::sleep(SETTLE);
            let before = proc::available()?;
            let began = Instant::now();
            let clones = clones(bench, row, &source, count)?;
            let seconds = began.elapsed().as_secs_f64();
            std::thread::sleep(SETTLE);
            let during = proc::available()?;
            let mut pss = 0.0;
            for clone in &clones {
                pss += proc::pss(clone.pid())?;
            }
            let made = clones.len() as f64;
            end(clones)?;
            std::thread::sleep(SETTLE);
            // Between before and after, so that what other programs take steadily cancels out.
            let taken = (before + proc::available()?) / 2.0 - during;
            if let Some((_, parent)) = source.fork {
                parent.stop()?;
            }
            Ok(vec![
                Sample::new(format!("{what}: how many there were"), "clones", made),
                Sample::mib(format!("{what}: host memory for each"), taken / made),
                Sample::mib(format!("{what}: PSS of each"), pss / made),
                Sample::new(format!("{what}: rate"), "1/s", made / seconds),
            ])
        },
    )
}

fn snapshot(bench: &Bench<'_>, row: &Monitor) -> Result<Source> {
    let files = if bench.is_floor(row) {
        bench.place.floor(guest(false))?
    } else {
        snapshot_of(&bench.place, row, guest(false), None)?
    };
    Ok(Source { files, fork: None })
}

/// Boots a guest with shared memory and forks it; it runs on.
fn fork(bench: &Bench<'_>, row: &Monitor) -> Result<Source> {
    let files = bench.place.files()?;
    let mut machine = Machine::boot(&bench.place, row, guest(true))?;
    let (ours, theirs) = UnixStream::pair().cannot(|| "make a pair of sockets".into())?;
    let body = json!({
        "snapshot_type": "Fork",
        "snapshot_path": files.state(),
        "mem_file_path": { "fd": 0 },
    });
    machine
        .client
        .put_with("/snapshot/create", &body, theirs.as_fd())?;
    drop(theirs);
    let receiving = || "receive the memory of a fork".to_owned();
    ours.set_read_timeout(Some(PATIENCE)).cannot(receiving)?;
    let memory = sys::receive_descriptor(&ours)
        .cannot(receiving)?
        .ok_or_else(|| Failure::new(format!("{} passed no memory of its fork", row.name)))?;
    // It runs on, which an answer proves.
    machine.gap()?;
    Ok(Source {
        files,
        fork: Some((memory, machine)),
    })
}

/// Makes clones until there are `count`, or until the host has no more memory to spare.
fn clones(bench: &Bench<'_>, row: &Monitor, source: &Source, count: usize) -> Result<Vec<Running>> {
    let mut clones = Vec::with_capacity(count);
    while clones.len() < count {
        if sys::interrupted() {
            return Err(Failure::interrupted());
        }
        if clones.len() % 50 == 49 && proc::available()? < RESERVE {
            break;
        }
        let files = &source.files;
        let (clone, _) = match &source.fork {
            None => by_row(bench, row, files, b"h")?,
            Some((memory, _)) => {
                let how = Load::Memory(memory.as_fd());
                restore(&bench.place, row, files, how, b"h")?
            }
        };
        clones.push(clone);
    }
    Ok(clones)
}

fn end(mut clones: Vec<Running>) -> Result<()> {
    clones.iter_mut().for_each(Running::kill);
    clones.into_iter().try_for_each(Running::stop)
}
