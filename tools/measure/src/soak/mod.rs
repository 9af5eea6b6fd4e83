//! The soak: many short lives beside two long ones, and whether anything grows or stays behind.
//!
//! ```text
//!   the long life          a microVM with disk and interface, both busy, driven by its API: paused, limited, saved
//!                          (full and diff), forked, asked; its copies live beside it      long
//!   one in a jail          the same in small; what watches it lives as long as it does    jailed
//!   short lives            one after the other, every way to begin and to end             lives
//!   after each turn        memory, descriptors, threads of the long ones;
//!                          processes, files, interfaces, control groups, mounts of all    census
//! ```
//!
//! `bench` has what lives share, `record` what was seen and what is wrong with it, `plot` the picture.
//!
//! What is read or received by guests is checked by them, and every end by its exit code: a life that does not go well
//! ends the run. So does what is left behind, which this program sees because it adopts all that its children leave
//! (as a host's first process does), has a network of its own, and puts jails below a control group of its own. What
//! long lives have may change while they work, so it is read between turns, when their guests wait for words.

pub mod args;
mod bench;
mod census;
mod jailed;
mod lives;
mod long;
pub mod plot;
pub mod record;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use crate::failure::{Context, Failure, Result};
use crate::progress::Progress;
use crate::snapshot::place::Place;
use crate::workspace::Workspace;
use crate::{proc, sys};

use args::Args;
use bench::Bench;
use census::Usage;
use jailed::Jailed;
use lives::{Kind, Lives};
use long::Long;
use record::{Record, Sample, different};

/// Lives of each kind in a turn.
const EACH: usize = 3;
/// Turns before the first sample: what is allocated once is there then.
const WARM_UP: usize = 2;
/// Turns that there are at least, however short the time.
const LEAST: usize = 5;
/// Between two looks.
const LOOK: Duration = Duration::from_millis(20);

/// Runs it. Whatever goes wrong once lives have begun is in the record.
pub fn run(args: &Args) -> Result<Record> {
    sys::catch_interrupts();
    sys::adopt_orphans().cannot(|| "become the parent of orphans".into())?;
    let workspace = Workspace::new(true)?;
    let place = Place::new(&workspace, &args.probe)?;
    let bench = Bench::new(&place, args)?;
    let mut record = Record::new(args.seed);
    let ended = soak(&bench, args.seconds, &mut record);
    record.is_cut = sys::interrupted();
    record.failure = match ended {
        // What was under way did not fail by itself.
        Err(_) if record.is_cut => None,
        ended => ended.err().map(|error| error.to_string()),
    };
    census::end_all(args.settle);
    Ok(record)
}

fn soak(bench: &Bench<'_>, seconds: u64, record: &mut Record) -> Result<()> {
    let before = census::everything(bench)?;
    let lives = Lives::new(bench)?;
    let mut progress = Progress::new(seconds as usize);
    // Once each, so that folders and files that stay are there.
    for kind in Kind::ALONE {
        record.lived(kind, lives.live(kind)?);
    }
    census::nothing_alive(bench, &before)?;
    let mut long = Long::boot(bench)?;
    let mut jailed = Jailed::boot(bench)?;
    turn(&mut long, &mut jailed, record)?;
    let expected = census::everything(bench)?;
    while record.turns < LEAST || record.seconds() < seconds as f64 {
        for kind in Kind::ALONE
            .into_iter()
            .cycle()
            .take(EACH * Kind::ALONE.len())
        {
            record.lived(kind, lives.live(kind)?);
            progress.at(record.seconds() as usize);
        }
        turn(&mut long, &mut jailed, record)?;
        census::nothing_left(bench, &expected)?;
        if record.turns > WARM_UP {
            let sample = sample(bench, record, long.pid(), jailed.pid())?;
            record.samples.push(sample);
        }
        if sys::interrupted() {
            return Err(Failure::interrupted());
        }
    }
    jailed.stop()?;
    long.stop()?;
    census::nothing_left(bench, &expected)?;
    census::nothing_alive(bench, &BTreeSet::from_iter(before))
}

fn turn(long: &mut Long<'_>, jailed: &mut Jailed, record: &mut Record) -> Result<()> {
    for (kind, took) in long.turn()? {
        record.lived(kind, took);
    }
    jailed.turn()?;
    record.turns += 1;
    Ok(())
}

/// What the long ones have; as at the first time, if they come to that soon.
fn sample(bench: &Bench<'_>, record: &Record, monitor: u32, jailer: u32) -> Result<Sample> {
    let began = Instant::now();
    loop {
        let sample = Sample {
            at: record.seconds(),
            processes: processes(monitor, jailer)?,
            slab: proc::slab()?,
        };
        let Some(first) = record.samples.first() else {
            return Ok(sample);
        };
        let differs = first.processes.iter().any(|(name, before)| {
            let now = sample.processes.get(name);
            now.is_none_or(|now| different(name, before, now).is_some())
        });
        if !differs || began.elapsed() > bench.settle {
            return Ok(sample);
        }
        std::thread::sleep(LOOK);
    }
}

fn processes(monitor: u32, jailer: u32) -> Result<BTreeMap<String, Usage>> {
    let mut found = BTreeMap::from([("monitor".to_owned(), Usage::read(monitor)?)]);
    for (index, pid) in census::family(jailer).into_iter().enumerate() {
        let name = match index {
            0 => "jailer".to_owned(),
            _ => format!("jail: {}", census::name(pid)),
        };
        found.insert(name, Usage::read(pid)?);
    }
    Ok(found)
}
