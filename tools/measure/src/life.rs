//! `life`: the whole life of a guest that writes a byte and resets, and what it costs.

use std::time::Instant;

use crate::failure::{Context, Failure, Result};
use crate::guest::{Size, Task};
use crate::monitor::{CommandLine, Monitor};
use crate::rounds::{self, Figure, Plan, Sample};
use crate::sys;
use crate::workspace::{Kernel, Workspace};

/// Lives whose rate is taken.
const COUNT: usize = 100;

/// Lives under way at the same time.
const PARALLEL: usize = 2;

/// How the figures are counted, for the foot of the table.
pub const NOTES: &str = "\
counted: a life is from exec to the end of the process of a guest with a tiny kernel, which writes a byte and resets. Its
processor time is that of the monitor's process, from fork to exit, all threads, user and kernel; what the host's kernel
does later, or by threads of its own, is in none. The rate has two lives under way at a time, and is taken in a third of
the rounds; a guest's VM may still be taken apart while the next lives. \"floor (split)\" is the floor with a split
interrupt chip, as mayfly has by default; \"floor\" has interrupt controllers and timer in the kernel, as Firecracker has.
";

/// The rows of the table: the floor in both ways, then the other monitors.
pub fn rows(monitors: &[Monitor]) -> Vec<Monitor> {
    let mut rows = Vec::new();
    for monitor in monitors {
        if monitor.command_line == CommandLine::Floor {
            let mut split = monitor.clone();
            split.name.push_str(" (split)");
            split.extra.push("--split".to_owned());
            rows.push(split);
        }
        rows.push(monitor.clone());
    }
    rows
}

/// Lives one after the other, then two at a time.
pub fn measure(workspace: &Workspace, rows: &[Monitor], plan: Plan) -> Result<Vec<Figure>> {
    let kernel = workspace.kernel("tiny", Size::Tiny, Task::Reset)?;
    let mut figures = rounds::run(plan, rows, |monitor| {
        let counting = || "read the processor time of children".to_owned();
        let before = sys::time_of_children().cannot(counting)?;
        let ms = life(monitor, &kernel)?;
        let after = sys::time_of_children().cannot(counting)?;
        Ok(vec![
            Sample::ms("exec to end of the process", ms),
            Sample::ms(
                "processor time of a life",
                after.saturating_sub(before).as_secs_f64() * 1e3,
            ),
        ])
    })?;
    let fewer = Plan {
        warm_up: 1,
        runs: plan.runs.div_ceil(3),
    };
    figures.extend(rounds::run(fewer, rows, |monitor| {
        let begun = Instant::now();
        let lives = rounds::in_parallel(COUNT, PARALLEL, || life(monitor, &kernel));
        let seconds = begun.elapsed().as_secs_f64();
        let lives = lives.into_iter().collect::<Result<Vec<f64>>>()?;
        Ok(vec![Sample::new(
            format!("lives per second, {COUNT} lives, {PARALLEL} at a time"),
            "1/s",
            lives.len() as f64 / seconds,
        )])
    })?);
    Ok(figures)
}

/// One life, in milliseconds.
fn life(monitor: &Monitor, kernel: &Kernel) -> Result<f64> {
    let mut running = monitor.boot(kernel)?;
    running.first_byte(None)?;
    let (end, status) = running.exit()?;
    if !status.success() {
        return Err(Failure::new(format!(
            "{} ended with {status} after its guest's reset",
            monitor.name
        )));
    }
    Ok(running.ms(end))
}
