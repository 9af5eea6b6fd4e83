//! `limits`: how exact rate limiters are, by the clock of a guest that is held back by them.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::failure::{Context, Failure, Result};
use crate::http::Client;
use crate::monitor::Monitor;
use crate::rounds::{self, Figure, Plan, Sample};
use crate::sys;
use crate::workspace::{TAP, Workspace};

/// In how many milliseconds every bucket comes back.
const REFILL_MS: u64 = 200;
/// Buckets: operations or frames, and bytes of a disk and of a network.
const OPS: u64 = 100;
const DISK_BYTES: u64 = 2 << 20;
const NET_BYTES: u64 = 100_000;
const FRAMES: u64 = 600;
const FRAME: u64 = 1000;

/// How the figures are counted, for the foot of the table.
pub const NOTES: &str = "\
counted: the rate that a guest came to, by its own clock, in percent of the one asked for (500 operations or frames a
second; 10 MiB/s of a disk, 500 kB/s of a network), over about a second and without the bucket that is full at the
start; 100 is exact, and the goal is 95 to 105. A change: from the PATCH to the end of a request that waited for a
bucket of 8 s when that was replaced by one of 200 ms, so the goal is below 200 ms.
";

/// One limit and what the guest does under it.
struct Case {
    figure: &'static str,
    /// The member of the guest's configuration that has the limit, and the member of that.
    place: Place,
    bucket: (&'static str, u64),
    word: String,
    amount: u64,
}

#[derive(Clone, Copy, PartialEq)]
enum Place {
    Drive,
    Receive,
    Send,
}

fn cases() -> Vec<Case> {
    let case = |figure, place, bucket, word: String, amount| Case {
        figure,
        place,
        bucket,
        word,
        amount,
    };
    let blocks = 192;
    let (sent, received) = (
        format!("netsend:1:{FRAMES}:{FRAME}"),
        format!("netcount:1:{FRAMES}:20000"),
    );
    vec![
        case(
            "drive, operations",
            Place::Drive,
            ("ops", OPS),
            format!("blkbench:0:4096:{FRAMES}:8"),
            FRAMES,
        ),
        case(
            "drive, bytes",
            Place::Drive,
            ("bandwidth", DISK_BYTES),
            format!("blkbench:0:64k:{blocks}:4"),
            blocks << 16,
        ),
        case(
            "network, frames sent",
            Place::Send,
            ("ops", OPS),
            sent.clone(),
            FRAMES,
        ),
        case(
            "network, bytes sent",
            Place::Send,
            ("bandwidth", NET_BYTES),
            sent,
            FRAMES * FRAME,
        ),
        case(
            "network, frames received",
            Place::Receive,
            ("ops", OPS),
            received.clone(),
            FRAMES,
        ),
        case(
            "network, bytes received",
            Place::Receive,
            ("bandwidth", NET_BYTES),
            received,
            FRAMES * FRAME,
        ),
    ]
}

/// Boots a probe guest under each limit and lets it work. The floor has no limits, and is left out.
pub fn measure(
    workspace: &Workspace,
    monitors: &[Monitor],
    plan: Plan,
    probe: &Path,
) -> Result<Vec<Figure>> {
    let up = Command::new("ip").args(["link", "set", TAP, "up"]).status();
    if !up.is_ok_and(|status| status.success()) {
        return Err(Failure::new(
            "cannot bring the tap up: is iproute2 installed?",
        ));
    }
    let cases = cases();
    let configs: Vec<PathBuf> = cases
        .iter()
        .enumerate()
        .map(|(n, case)| workspace.probe(&format!("limit{n}"), probe, &case.word, limiters(case)))
        .collect::<Result<_>>()?;
    let slow = json!({"ops": {"size": 2, "refill_time": 16_000}});
    let changed = workspace.probe(
        "changed",
        probe,
        "print:begun,blkbench:0:512:3:1",
        [Some(slow), None, None],
    )?;
    rounds::run(plan, monitors, |monitor| {
        if !monitor.has_api() {
            return Ok(Vec::new());
        }
        let mut samples = Vec::new();
        for (case, config) in cases.iter().zip(&configs) {
            samples.push(rate(monitor, case, config)?);
        }
        samples.push(change(workspace, monitor, &changed)?);
        Ok(samples)
    })
}

/// Limiters of the drive, of what is received and of what is sent.
fn limiters(case: &Case) -> [Option<Value>; 3] {
    let limiter = json!({case.bucket.0: {"size": case.bucket.1, "refill_time": REFILL_MS}});
    [Place::Drive, Place::Receive, Place::Send]
        .map(|place| (place == case.place).then(|| limiter.clone()))
}

fn rate(monitor: &Monitor, case: &Case, config: &Path) -> Result<Sample> {
    let mut running = monitor.boot_config(config)?;
    if case.place == Place::Receive {
        running.said("netcount ready")?;
        send_frames()?;
    }
    running.said(&format!("{} ok", case.word))?;
    // The word that follows: the line before it is whole.
    let said = running.said("halted")?;
    running.stop()?;
    let ns = after(&said, " ns=")
        .ok_or_else(|| Failure::new(format!("{} says no time: {said}", monitor.name)))?;
    let size = case.bucket.1;
    let asked = (case.amount - size) as f64 / size as f64 * REFILL_MS as f64 * 1e6;
    Ok(Sample::new(
        case.figure,
        "% of the rate asked for",
        asked / ns * 100.0,
    ))
}

fn after(text: &str, key: &str) -> Option<f64> {
    let (_, rest) = text.split_once(key)?;
    let end = rest.find(|c: char| !c.is_ascii_digit())?;
    rest.get(..end)?.parse().ok()
}

/// All of them at once; they wait in the queue of the tap, which holds more.
fn send_frames() -> Result<()> {
    let mut socket = sys::frame_socket(TAP).cannot(|| format!("open a socket on {TAP}"))?;
    let mut frame = vec![0xff; FRAME as usize];
    frame[12..14].copy_from_slice(&sys::EXPERIMENT.to_be_bytes());
    for _ in 0..FRAMES {
        socket
            .write_all(&frame)
            .cannot(|| format!("send a frame to {TAP}"))?;
    }
    Ok(())
}

fn change(workspace: &Workspace, monitor: &Monitor, config: &Path) -> Result<Sample> {
    let sockets = workspace.sockets();
    let socket = sockets.join("limits");
    let names =
        sys::watch_for_names(&sockets).cannot(|| "watch the directory of sockets".into())?;
    let mut running = monitor.boot_config_and_listen(config, &socket)?;
    let mut client = Client::new(running.connect(&names, &socket)?)?;
    running.said("print:begun ok")?;
    std::thread::sleep(Duration::from_millis(300));
    let limiter = json!({"ops": {"size": OPS, "refill_time": REFILL_MS}});
    let body = json!({"drive_id": "disk", "rate_limiter": limiter});
    let began = Instant::now();
    client.patch("/drives/disk", &body)?;
    running.said("blkbench:0:512:3:1 ok")?;
    let took = began.elapsed().as_secs_f64() * 1e3;
    running.stop()?;
    std::fs::remove_file(&socket).cannot(|| "remove an API socket".into())?;
    Ok(Sample::ms("a change takes hold", took))
}
