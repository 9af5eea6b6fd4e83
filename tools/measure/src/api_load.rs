//! `api-load`: how long `GET /` takes while the guest does nothing, and while it writes to its disk.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::failure::{Context, Result};
use crate::http::Client;
use crate::monitor::Monitor;
use crate::rounds::{self, Figure, Plan, Sample};
use crate::stats;
use crate::sys;
use crate::workspace::Workspace;

/// Requests of one round, one after the other on one connection.
const REQUESTS: usize = 1000;
/// Between two of them: long enough that each finds the threads asleep.
const BETWEEN: Duration = Duration::from_millis(1);

/// How the figures are counted, for the foot of the table.
pub const NOTES: &str = "\
counted: 1,000 requests a round, 1 ms apart, on one connection that is kept alive; from the first byte sent to the last
byte of the answer. Writing: 4 KiB at random places, 8 at a time, by one vCPU that polls. Goal: a 99th percentile below
5 ms while the guest writes.
";

/// Boots a guest that does nothing, then one that writes, and asks. The floor has no API, and is left out.
pub fn measure(
    workspace: &Workspace,
    monitors: &[Monitor],
    plan: Plan,
    probe: &Path,
) -> Result<Vec<Figure>> {
    let config = |name: &str, words| workspace.probe(name, probe, words, [None, None, None]);
    // The last word takes longer than any round; the guest is killed.
    let guests = [
        ("the guest halted", config("halted", "print:begun,stay")?),
        (
            "the guest writing",
            config("writing", "print:begun,blkbench:0:4096:1000m:8:randwrite")?,
        ),
    ];
    rounds::run(plan, monitors, |monitor| {
        if !monitor.has_api() {
            return Ok(Vec::new());
        }
        let mut samples = Vec::new();
        for (name, config) in &guests {
            let times = ask(workspace, monitor, config)?;
            for (what, share) in [("median", 0.5), ("99th percentile", 0.99), ("slowest", 1.0)] {
                let value = stats::percentile(&times, share).unwrap_or(f64::NAN);
                samples.push(Sample::ms(format!("GET /, {name}: {what}"), value));
            }
        }
        Ok(samples)
    })
}

fn ask(workspace: &Workspace, monitor: &Monitor, config: &Path) -> Result<Vec<f64>> {
    let sockets = workspace.sockets();
    let socket = sockets.join("load");
    let names =
        sys::watch_for_names(&sockets).cannot(|| "watch the directory of sockets".into())?;
    let mut running = monitor.boot_config_and_listen(config, &socket)?;
    let mut client = Client::new(running.connect(&names, &socket)?)?;
    running.said("print:begun ok")?;
    let mut times = Vec::with_capacity(REQUESTS);
    for _ in 0..REQUESTS {
        let began = Instant::now();
        client.get("/")?;
        times.push(began.elapsed().as_secs_f64() * 1e3);
        std::thread::sleep(BETWEEN);
    }
    running.stop()?;
    std::fs::remove_file(&socket).cannot(|| "remove an API socket".into())?;
    Ok(times)
}
