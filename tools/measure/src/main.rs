//! What `tools/bench` runs.

use std::fs;
use std::process::ExitCode;

use mayfly_measure::args::{self, Args, OURS, USAGE, Which};
use mayfly_measure::failure::{Context, Failure, Result};
use mayfly_measure::filter::Filters;
use mayfly_measure::guest::{Size, Task};
use mayfly_measure::host::Host;
use mayfly_measure::load::picture::{self, Heading};
use mayfly_measure::monitor::{CommandLine, Monitor};
use mayfly_measure::report::Measured;
use mayfly_measure::rounds::{Figure, Plan};
use mayfly_measure::snapshot::Wanted;
use mayfly_measure::workspace::Workspace;
use mayfly_measure::{
    api, api_load, console, density, jail, life, limits, load, memory, oci, report, snapshot,
    start, sys,
};
use serde_json::json;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mayfly-measure: {error}.");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let floor = std::env::current_exe()
        .cannot(|| "find this program".into())?
        .with_file_name("floor");
    let Some(args) = args::parse(std::env::args().skip(1), floor)? else {
        print!("{USAGE}");
        return Ok(());
    };
    sys::catch_interrupts();
    if matches!(args.which, Which::Jail | Which::Oci) && !jail::permitted() {
        print!("{}", jail::SKIPPED);
        return Ok(());
    }
    let host = Host::read();
    let with_tap = matches!(
        args.which,
        Which::Limits | Which::Snapshot | Which::Net | Which::All | Which::Linux
    );
    let workspace = Workspace::new(args.devices || with_tap)?;
    let filters = filters(&args, &workspace)?;
    let Measured {
        rows,
        figures,
        notes,
        has_failures,
        is_too_busy,
    } = measured(&args, &workspace)?;

    print!("{}", host.text());
    for (monitor, filters) in args.monitors.iter().zip(&filters) {
        println!("{}", described(monitor, *filters));
    }
    for runtime in args
        .monitors
        .iter()
        .filter(|it| it.command_line == CommandLine::Runtime)
    {
        println!(
            "{}: {}",
            runtime.name,
            runtime.version().unwrap_or_default()
        );
    }
    println!(
        "{} rounds after {} to warm up; guests with 1 vCPU and {}\n",
        args.runs,
        plan(&args).warm_up,
        match (args.which, args.devices) {
            (Which::Snapshot, _) => "the memory named below",
            (_, true) => "128 MiB, one drive and one network interface",
            (_, false) => "128 MiB",
        }
    );
    for figure in &figures {
        println!("{}", report::table(figure, &rows, OURS));
    }
    print!("{}{notes}", report::LEGEND);

    if let Some(path) = &args.json {
        let monitors: Vec<_> = args
            .monitors
            .iter()
            .zip(&filters)
            .map(|(monitor, filters)| {
                json!({
                    "name": monitor.name,
                    "path": monitor.path,
                    "version": monitor.version(),
                    "threads": filters.threads,
                    "filtered_threads": filters.filtered,
                    "threads_that_may_not_exec": filters.strict,
                })
            })
            .collect();
        let figures: Vec<_> = figures
            .iter()
            .map(|figure| report::json(figure, &rows, OURS))
            .collect();
        let all = json!({
            "host": host.json(),
            "monitors": monitors,
            "runs": args.runs,
            "date": host.date(),
            "commit": args.commit,
            "too_busy": is_too_busy,
            "devices": args.devices,
            "figures": figures,
        });
        fs::write(path, format!("{all:#}\n")).cannot(|| format!("write {}", path.display()))?;
    }
    if let Some(path) = &args.svg {
        let heading = heading(&args, &host, is_too_busy);
        let text = picture::draw(&figures, &rows, OURS, &heading);
        fs::write(path, text).cannot(|| format!("write {}", path.display()))?;
    }
    if has_failures {
        return Err(Failure::new(
            "a monitor failed, and was left out of a figure: see `failed` above",
        ));
    }
    Ok(())
}

/// What stands above the picture.
fn heading(args: &Args, host: &Host, is_too_busy: bool) -> Heading {
    let monitors: Vec<String> = args
        .monitors
        .iter()
        .filter_map(|monitor| Some(format!("{}: {}", monitor.name, monitor.version()?)))
        .collect();
    let commit = args.commit.as_deref().unwrap_or("unknown");
    let mut lines = vec![
        format!(
            "{}; commit {commit}; medians of {} rounds",
            host.date(),
            args.runs
        ),
        host.line(),
        monitors.join("; "),
    ];
    if is_too_busy {
        lines.push("THE MACHINE WAS TOO BUSY for these figures to be believed".to_owned());
    }
    Heading {
        title: "mayfly beside others: a bare-metal guest under load".to_owned(),
        lines,
    }
}

fn plan(args: &Args) -> Plan {
    let warm_up = match args.which {
        Which::Start | Which::Api | Which::Life | Which::Jail | Which::Snapshot => 2,
        Which::ApiLoad | Which::Limits | Which::Memory | Which::Density | Which::Oci => 1,
        Which::Console | Which::Block | Which::Overlay | Which::Net | Which::All | Which::Linux => {
            0
        }
    };
    Plan {
        warm_up,
        runs: args.runs,
    }
}

/// "Filters on" is looked at, never assumed.
fn filters(args: &Args, workspace: &Workspace) -> Result<Vec<Filters>> {
    let staying = workspace.kernel("stay", Size::Tiny, Task::Stay)?;
    args.monitors
        .iter()
        .filter(|monitor| monitor.command_line != CommandLine::Runtime)
        .map(|monitor| monitor.filters(&staying))
        .collect()
}

/// Measures. The rows of the tables are the monitors, but `life`, `snapshot` and `jail` have some in several ways.
fn measured(args: &Args, workspace: &Workspace) -> Result<Measured> {
    let (rows, figures, notes) = match args.which {
        Which::Snapshot => {
            let wanted = Wanted {
                probe: args.probe.as_deref().unwrap_or_else(|| "".as_ref()),
                linux: args.linux.as_deref(),
                rows: &args.rows,
                clones: args.vms,
                ours: OURS,
            };
            return snapshot::measure(workspace, &args.monitors, plan(args), &wanted);
        }
        Which::Block | Which::Overlay | Which::Net | Which::All | Which::Linux => {
            let wanted = load::Wanted {
                probe: args.probe.as_deref().unwrap_or_else(|| "".as_ref()),
                media: &args.media,
                rows: &args.rows,
                span_ms: args.span_ms,
                ours: OURS,
            };
            return match args.which {
                Which::All => load::all(workspace, &args.monitors, plan(args), &wanted),
                Which::Linux => load::linux(
                    workspace,
                    &args.monitors,
                    plan(args),
                    &wanted,
                    args.linux.as_deref(),
                ),
                Which::Net => load::net(workspace, &args.monitors, plan(args), &wanted),
                Which::Overlay => load::overlay(workspace, &args.monitors, plan(args), &wanted),
                _ => load::block(workspace, &args.monitors, plan(args), &wanted),
            };
        }
        Which::Jail => {
            let (monitors, jailers) = (&args.monitors, &args.jailers);
            let (rows, figures) = jail::measure(workspace, monitors, OURS, jailers, plan(args))?;
            (rows, figures, jail::NOTES)
        }
        Which::Oci => {
            let rows = oci::rows(&args.monitors, OURS);
            let linux = args.linux.as_deref();
            let figures = oci::measure(workspace, &rows, plan(args), linux, args.vms)?;
            (rows, figures, oci::NOTES)
        }
        Which::Life => {
            let rows = life::rows(&args.monitors);
            let figures = life::measure(workspace, &rows, plan(args))?;
            (rows, figures, life::NOTES)
        }
        _ => {
            let (figures, notes) = figures(args, workspace)?;
            (args.monitors.clone(), figures, notes)
        }
    };
    Ok(Measured {
        rows,
        figures,
        notes: notes.to_owned(),
        has_failures: false,
        is_too_busy: false,
    })
}

fn figures(args: &Args, workspace: &Workspace) -> Result<(Vec<Figure>, &'static str)> {
    let (monitors, plan) = (&args.monitors[..], plan(args));
    let probe = args.probe.as_deref().unwrap_or_else(|| "".as_ref());
    Ok(match args.which {
        Which::Start => (start::measure(workspace, monitors, plan)?, ""),
        Which::Api => {
            if !monitors.iter().any(|monitor| monitor.has_api()) {
                return Err(Failure::new("api needs a monitor that has one"));
            }
            (api::measure(workspace, monitors, plan)?, "")
        }
        Which::ApiLoad => (
            api_load::measure(workspace, monitors, plan, probe)?,
            api_load::NOTES,
        ),
        Which::Limits => (
            limits::measure(workspace, monitors, plan, probe)?,
            limits::NOTES,
        ),
        Which::Console => (
            console::measure(workspace, monitors, plan, args.linux.as_deref())?,
            console::NOTES,
        ),
        Which::Memory => (memory::measure(workspace, monitors, plan)?, memory::NOTES),
        Which::Density => (
            density::measure(workspace, monitors, plan, args.vms)?,
            density::NOTES,
        ),
        Which::Life
        | Which::Snapshot
        | Which::Jail
        | Which::Block
        | Which::Overlay
        | Which::Net
        | Which::All
        | Which::Oci
        | Which::Linux => {
            unreachable!("their rows are their own")
        }
    })
}

fn described(monitor: &Monitor, filters: Filters) -> String {
    let mut text = monitor.name.clone();
    if let Some(version) = monitor.version() {
        text.push_str(&format!(": {version}"));
    }
    text.push_str(&format!("; {}", filters.text()));
    if !filters.all_on() && monitor.command_line == CommandLine::Firecracker {
        text.push_str("\n  hint: its figures are without filters; a build without any can be given a set (--extra)");
    }
    text
}
