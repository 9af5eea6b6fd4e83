//! A network interface: the cases, what the host's side of them does, and their floor.

use std::fs;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::json;

use super::guest::{Guest, Waits, Work};
use super::{BusyThread, Row, Wanted, boot_source};
use crate::failure::{Context, Failure, Result};
use crate::monitor::CommandLine;
use crate::peer::{self, LARGE, Mode, Peer, frame};
use crate::rounds::Sample;
use crate::sys;
use crate::workspace::{MEMORY_MIB, TAP, Workspace};

/// How the figures are counted, for the foot of the tables.
pub const NOTES: &str = "\
counted: a bare-metal guest with one vCPU polls and asks for no interrupts. tx: it keeps its ring full; the host's stack
drops what comes, and must have seen all of it. rx: a thread of the host sends without end, and the guest counts. 64 KiB
frames are TCP segments with 65,160 bytes of data for the other side to cut up. Ping-pong: a thread of the host answers
each frame. \"floor\" is this program in the monitor's place at the bare tap, beside a thread that never sleeps in the
vCPU's place: write, read, or one after the other. CPU is the processor time of the monitor for each frame: all its
threads (those of io_uring in the kernel too) but the vCPU's, which polls without end.
";

/// The share of sent frames that the host must have seen: others (neighbour discovery) may be counted with them.
const SEEN: f64 = 0.999;

/// One kind of traffic.
struct Case {
    name: &'static str,
    mode: Mode,
    size: usize,
}

const CASES: [Case; 5] = [
    case("tx 1514 B", Mode::Transmit, 1514),
    case("tx 64 KiB TSO", Mode::Transmit, LARGE),
    case("rx 1514 B", Mode::Receive, 1514),
    case("rx 64 KiB", Mode::Receive, LARGE),
    case("ping-pong 64 B", Mode::PingPong, 64),
];

const fn case(name: &'static str, mode: Mode, size: usize) -> Case {
    Case { name, mode, size }
}

impl Case {
    fn word(&self, ms: usize) -> String {
        format!("netload:0:{}:{}:{ms}", self.mode.word(), self.size)
    }

    /// The figure of so many frames in so much time.
    fn sample(&self, frames: f64, seconds: f64) -> Sample {
        match self.mode {
            Mode::PingPong => Sample::new(self.name, "us", seconds / frames.max(1.0) * 1e6),
            _ => Sample::new(self.name, "packets/s", frames / seconds),
        }
    }
}

/// The tap, and what to do with it.
pub struct Bench<'a> {
    workspace: &'a Workspace,
    wanted: Wanted<'a>,
}

impl<'a> Bench<'a> {
    /// Brings up the tap of the workspace.
    pub fn new(workspace: &'a Workspace, wanted: Wanted<'a>) -> Result<Self> {
        peer::bring_up(TAP)?;
        Ok(Self { workspace, wanted })
    }

    /// All cases, once, by one row.
    pub fn round(&self, row: &Row, waits: &mut Waits) -> Result<Vec<Sample>> {
        let cases = CASES.iter().filter(|case| self.wanted.has(case.name));
        if row.monitor.command_line == CommandLine::Floor {
            return cases.map(|case| self.floor(case)).collect();
        }
        let config = self.config()?;
        let mut guest = Guest::boot(&row.monitor, &config)?;
        let mut samples = Vec::new();
        for case in cases {
            let work = self.work(&mut guest, case)?;
            // With a thread of ours on the other side, the guest may wait for that.
            if case.mode == Mode::Transmit {
                waits.add(work.waited);
            }
            let frames = work.field("frames")?;
            samples.push(match case.mode {
                Mode::PingPong => case.sample(1.0, work.field("mean-ns")? / 1e9),
                _ => case.sample(frames, work.field("ns")? / 1e9),
            });
            samples.push(Sample::new(
                format!("{}, CPU", case.name),
                "us",
                work.busy.as_secs_f64() * 1e6 / frames.max(1.0),
            ));
        }
        guest.stop()?;
        Ok(samples)
    }

    fn work(&self, guest: &mut Guest, case: &Case) -> Result<Work> {
        let before = frames_seen()?;
        let word = case.word(self.wanted.span_ms);
        let (work, peer) = guest.work_with(&word, || Peer::start(TAP, case.mode, case.size))?;
        if let Some(peer) = peer {
            peer.stop()?;
        }
        let seen = frames_seen()?.saturating_sub(before) as f64;
        let sent = work.field("frames")?;
        if case.mode == Mode::Transmit && seen < sent * SEEN {
            return Err(Failure::new(format!(
                "{}: of {sent} frames sent the host has seen {seen}",
                case.name
            )));
        }
        Ok(work)
    }

    fn config(&self) -> Result<PathBuf> {
        let text = json!({
            "boot-source": boot_source(self.wanted.probe),
            "machine-config": { "vcpu_count": 1, "mem_size_mib": MEMORY_MIB },
            "drives": [],
            "network-interfaces": [{ "iface_id": "eth0", "host_dev_name": TAP }],
        });
        self.workspace.file("load.json", &text.to_string())
    }

    /// The same traffic with this thread at the tap, and another that never sleeps in the vCPU's place.
    fn floor(&self, case: &Case) -> Result<Sample> {
        let using = || format!("use the tap {TAP}");
        let mut tap = sys::open_tap(TAP).cannot(using)?;
        let span = Duration::from_millis(self.wanted.span_ms as u64);
        let frame = frame(case.size, sys::TAP_HEADER);
        let mut space = vec![0; 1 << 17];
        let _vcpu = BusyThread::start();
        let peer = Peer::start(TAP, case.mode, case.size)?;
        if case.mode == Mode::Receive {
            tap.read(&mut space).cannot(using)?;
        }
        let mut frames = 0_u64;
        let began = Instant::now();
        while began.elapsed() < span {
            if case.mode != Mode::Receive {
                tap.write_all(&frame).cannot(using)?;
            }
            if case.mode != Mode::Transmit {
                let len = tap.read(&mut space).cannot(using)?;
                if len != frame.len() {
                    continue;
                }
            }
            frames += 1;
        }
        let seconds = began.elapsed().as_secs_f64();
        if let Some(peer) = peer {
            peer.stop()?;
        }
        Ok(case.sample(frames as f64, seconds))
    }
}

/// Frames that the tap has taken from its reader and writer since it was made.
fn frames_seen() -> Result<u64> {
    let path = "/proc/thread-self/net/dev";
    let text = fs::read_to_string(path).cannot(|| format!("read {path}"))?;
    parse_frames(&text, TAP)
        .ok_or_else(|| Failure::new(format!("cannot find {TAP} in what {path} says")))
}

fn parse_frames(text: &str, name: &str) -> Option<u64> {
    let line = text
        .lines()
        .find_map(|line| line.trim_start().strip_prefix(name)?.strip_prefix(':'))?;
    // Received: bytes, packets.
    line.split_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_when_parsed_are_those_of_the_named_interface() {
        let text = "Inter-|   Receive\n face |bytes    packets\n   mf01:   5      6    0\n    mf0:  1200      3    0    0\n";
        assert_eq!(parse_frames(text, "mf0"), Some(3));
        assert_eq!(parse_frames(text, "mf2"), None);
    }

    #[test]
    fn sample_when_of_a_ping_pong_is_the_time_of_one() {
        let sample = CASES[4].sample(1000.0, 0.02);
        let wanted = Sample::new("ping-pong 64 B", "us", 20.0);
        assert_eq!(format!("{sample:?}"), format!("{wanted:?}"));
    }
}
