//! `oci`: a container's way from `create` to its first byte, and what each further one costs.
//!
//! The containers are microVMs of the `mayfly-oci` beside the measured mayfly: once as copies of a template (warm), once
//! booted (cold). Other runtimes with the same command line (runc, crun) take part by `--with`. Their root is a folder with
//! the host's busybox, and they have no network.
//!
//! Of a microVM, what its guest's instructions take is told apart from what the host does: it is the time in which the
//! monitor's vCPU thread ran or waited for a processor, and all other time is the host's. That thread's handling of exits
//! counts as the guest's; where the guest runs while the host works, that time is not the host's either.

mod engine;
mod runtime;

use std::path::Path;

use crate::failure::{Failure, Result};
use crate::monitor::{CommandLine, Monitor};
use crate::proc;
use crate::rounds::{self, Figure, Plan, Sample};
use crate::workspace::Workspace;
use runtime::{Container, Place, Runtime};

/// Further processes of a container whose time is taken in each round.
const EXECS: usize = 5;
/// Bytes of output whose time is taken.
const OUTPUT: usize = 1 << 20;
/// Containers that are made at the same time.
const PARALLEL: usize = 2;

/// How the figures are counted, for the foot of the table.
pub const NOTES: &str = "\
counted: containers with one processor and 128 MiB, without a network, of a root with busybox. The first byte is that of
`echo`, from the start of `create`; `start` follows as soon as that has ended. \"The host's part\" leaves out the
processor time of the vCPU's thread, which is the guest's. `exec` is one of `true`, from its start to its end, the mean of 5.
A life is `create` to the end of `delete`, of `true`. \"mayfly\" copies a template, which was made before and is not
counted; \"mayfly, cold\" boots its kernel. Many containers are made two at a time, and sleep; their memory is PSS of all
their processes, and what MemAvailable fell by. On a host that emulates the guest's kernel, figures with the guest's
part in them say what that costs.
";

/// The rows of the tables: `ours` twice, then the other runtimes.
pub fn rows(monitors: &[Monitor], ours: &str) -> Vec<Monitor> {
    let mut rows = Vec::new();
    for monitor in monitors {
        match monitor.command_line {
            CommandLine::Floor => {}
            CommandLine::Firecracker if monitor.name == ours => {
                let mut cold = monitor.clone();
                cold.name.push_str(COLD);
                rows.extend([monitor.clone(), cold]);
            }
            CommandLine::Firecracker | CommandLine::Runtime => rows.push(monitor.clone()),
        }
    }
    rows
}

/// What the name of the row of booted guests ends with.
const COLD: &str = ", cold";

/// Measures all rows, whose guests are of the folder `linux`; `many` containers at once.
pub fn measure(
    workspace: &Workspace,
    rows: &[Monitor],
    plan: Plan,
    linux: Option<&Path>,
    many: usize,
) -> Result<Vec<Figure>> {
    let place = Place::new(workspace, linux)?;
    let runtimes = rows.iter().map(|row| Runtime::new(&place, row, COLD));
    let runtimes = runtimes.collect::<Result<Vec<_>>>()?;
    let runtime_of = |row: &Monitor| {
        let known = rows.iter().position(|known| known.name == row.name);
        &runtimes[known.expect("it is one of the rows")]
    };
    eprintln!("oci: one life of each, which makes disk and template");
    for runtime in &runtimes {
        life(runtime)?;
    }
    let mut figures = rounds::run(plan, rows, |row| {
        let runtime = runtime_of(row);
        let mut samples = first_byte(runtime)?;
        samples.push(Sample::ms(
            "life of `true`: create to removed",
            life(runtime)?,
        ));
        Ok(samples)
    })?;
    if engine::is_there() {
        eprintln!("oci: the same by podman");
        figures.extend(rounds::run(plan, rows, |row| {
            let ms = engine::life(&place, runtime_of(row))?;
            Ok(vec![Sample::ms("podman run --rm of `true`", ms)])
        })?);
    } else {
        eprintln!("oci: podman is not installed, so its figures are left out");
    }
    eprintln!("oci: {many} containers at once");
    let once = Plan {
        warm_up: 0,
        runs: 1,
    };
    figures.extend(rounds::run(once, rows, |row| {
        // Booting so many says nothing new, and takes long.
        match row.name.ends_with(COLD) {
            true => Ok(Vec::new()),
            false => at_once(runtime_of(row), many),
        }
    })?);
    Ok(figures)
}

/// A container's first byte, a few further processes in it, and output of one.
fn first_byte(runtime: &Runtime<'_>) -> Result<Vec<Sample>> {
    let words = ["sh", "-c", "echo; exec sleep 1000"];
    let mut container = Container::create(runtime, &words)?;
    container.start()?;
    container.first_byte()?;
    let ms = container.ms();
    let mut samples = vec![Sample::ms("create to first byte", ms)];
    if let Some(guest) = container.guest_ms()? {
        samples.push(Sample::ms(
            "create to first byte: the host's part",
            ms - guest,
        ));
    }
    let (mut all, mut hosts) = (0.0, None);
    for _ in 0..EXECS {
        let before = container.guest_ms()?;
        let ms = container.exec(&["true"])?.ms;
        all += ms;
        if let (Some(before), Some(after)) = (before, container.guest_ms()?) {
            *hosts.get_or_insert(0.0) += ms - (after - before);
        }
    }
    samples.push(Sample::ms("exec of `true`", all / EXECS as f64));
    if let Some(hosts) = hosts {
        let figure = "exec of `true`: the host's part";
        samples.push(Sample::ms(figure, hosts / EXECS as f64));
    }
    let done = container.exec(&["head", "-c", &OUTPUT.to_string(), "/dev/zero"])?;
    if done.bytes != OUTPUT {
        let name = &runtime.row.name;
        return Err(Failure::new(format!(
            "{name} carried {} bytes of output out of {OUTPUT}",
            done.bytes
        )));
    }
    samples.push(Sample::ms("exec that writes 1 MiB", done.ms));
    container.delete()?;
    Ok(samples)
}

/// From `create` to the end of `delete`, in milliseconds.
fn life(runtime: &Runtime<'_>) -> Result<f64> {
    let mut container = Container::create(runtime, &["true"])?;
    container.start()?;
    container.end()?;
    container.delete()?;
    Ok(container.ms())
}

/// `many` containers that sleep.
fn at_once(runtime: &Runtime<'_>, many: usize) -> Result<Vec<Sample>> {
    let before = proc::available()?;
    let begun = std::time::Instant::now();
    let made = rounds::in_parallel(many, PARALLEL, || {
        let mut container = Container::create(runtime, &["sh", "-c", "echo; exec sleep 10000"])?;
        container.start()?;
        container.first_byte()?;
        Ok(container)
    });
    let seconds = begun.elapsed().as_secs_f64();
    let mut containers = made.into_iter().collect::<Result<Vec<Container<'_>>>>()?;
    let during = proc::available()?;
    let mut pss = 0.0;
    for container in &containers {
        for pid in container.processes()? {
            pss += proc::pss(pid)?;
        }
    }
    containers.iter_mut().try_for_each(Container::delete)?;
    let each = 1.0 / many as f64;
    Ok(vec![
        Sample::new(
            format!("containers per second, {many}, {PARALLEL} at a time"),
            "1/s",
            many as f64 / seconds,
        ),
        Sample::mib(format!("PSS of each of {many} containers"), pss * each),
        Sample::mib(
            format!("host memory of each of {many} containers"),
            (before - during) * each,
        ),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_ours_in_both_ways_and_the_other_runtimes() {
        let monitor = |name: &str, command_line| Monitor {
            name: name.to_owned(),
            path: "/nowhere".into(),
            command_line,
            extra: Vec::new(),
        };
        let rows = rows(
            &[
                monitor("floor", CommandLine::Floor),
                monitor("mayfly", CommandLine::Firecracker),
                monitor("runc", CommandLine::Runtime),
            ],
            "mayfly",
        );
        let names: Vec<&str> = rows.iter().map(|row| row.name.as_str()).collect();
        assert_eq!(names, ["mayfly", "mayfly, cold", "runc"]);
    }
}
