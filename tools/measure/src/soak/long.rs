//! The long life: one microVM with a disk and an interface whose traffic is checked, and everything that can be asked of
//! one that runs, again and again.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::bench::{Bench, Guest, Temporary, plain};
use super::lives::{Kind, copy_of};
use crate::failure::{Failure, Result};
use crate::peer::{LARGE, Mode, Peer};
use crate::snapshot::machine::Machine;
use crate::workspace::TAP;

/// Longer than a word takes on a busy host.
pub const PATIENCE: Duration = Duration::from_secs(300);
/// How long the traffic of each kind lasts, in milliseconds.
const DISK_MS: u64 = 1000;
const NET_MS: u64 = 300;
/// One in so many snapshots is a full one.
const FULL_EACH: u64 = 6;
/// What is sent and received, in turn.
const TRAFFIC: [(Mode, usize); 5] = [
    (Mode::Transmit, 1514),
    (Mode::Receive, 1514),
    (Mode::PingPong, 64),
    (Mode::Transmit, LARGE),
    (Mode::Receive, LARGE),
];

/// The microVM that stays.
#[derive(Debug)]
pub struct Long<'a> {
    bench: &'a Bench<'a>,
    machine: Machine,
    disk: Temporary,
    turns: u64,
}

impl<'a> Long<'a> {
    /// Boots it.
    pub fn boot(bench: &'a Bench<'a>) -> Result<Self> {
        let disk = bench.copy(&bench.base, "long.disk")?;
        let guest = Guest {
            words: "shell",
            disk: plain(&disk.0),
            tap: Some(TAP),
            shared: true,
        };
        let config = bench.config_file("long.json", &guest)?;
        let mut machine = Machine::boot_config(bench.place, &bench.monitor, &config)?;
        machine.running.next_line("shell ready", PATIENCE)?;
        machine.pause()?;
        Ok(Self {
            bench,
            machine,
            disk,
            turns: 0,
        })
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.machine.running.pid()
    }

    /// One turn of all: with its disk busy it is paused, limited, saved, copied. The copies that lived, with how long.
    /// It is paused between turns: a probe that waits for words takes all of a processor.
    pub fn turn(&mut self) -> Result<Vec<(Kind, Duration)>> {
        self.turns += 1;
        self.machine.resume()?;
        let word = match self.turns % 2 {
            0 => format!("blkload:0:randrw:4096:16:{DISK_MS}:check"),
            _ => format!("blkload:0:randrw:32k:4:{DISK_MS}:pieces:check"),
        };
        self.begin(&word)?;
        self.pauses()?;
        self.limits()?;
        let mut copies = vec![self.forked()?];
        copies.extend(self.saved()?);
        self.questions()?;
        self.end(&word)?;
        self.traffic()?;
        self.machine.pause()?;
        Ok(copies)
    }

    /// Ends it.
    pub fn stop(self) -> Result<()> {
        self.machine.stop()
    }

    fn begin(&mut self, word: &str) -> Result<()> {
        self.machine.running.tell(format!("{word}\n").as_bytes())?;
        self.machine.running.next_line(" begun", PATIENCE)?;
        Ok(())
    }

    fn end(&mut self, word: &str) -> Result<()> {
        let line = self
            .machine
            .running
            .next_line(&format!("probe: {word} "), PATIENCE)?;
        match line.contains(" ok ") {
            true => Ok(()),
            false => Err(Failure::new(format!("the long life: {}", line.trim()))),
        }
    }

    fn pauses(&mut self) -> Result<()> {
        for _ in 0..3 {
            self.machine.pause()?;
            self.machine.resume()?;
        }
        Ok(())
    }

    /// Limits of disk and interface on and off, and the disk opened again.
    fn limits(&mut self) -> Result<()> {
        for size in [200, 0] {
            let limiter = json!({ "ops": { "size": size, "refill_time": 100 } });
            let disk = json!({ "drive_id": "disk", "rate_limiter": limiter });
            self.machine.client.patch("/drives/disk", &disk)?;
            let interface = json!({
                "iface_id": "eth0",
                "rx_rate_limiter": limiter,
                "tx_rate_limiter": limiter,
            });
            self.machine
                .client
                .patch("/network-interfaces/eth0", &interface)?;
        }
        let disk = json!({ "drive_id": "disk", "path_on_host": self.disk.0 });
        self.machine.client.patch("/drives/disk", &disk)
    }

    /// A fork, and the life of the child beside its parent.
    fn forked(&mut self) -> Result<(Kind, Duration)> {
        let files = self.bench.place.files()?;
        let began = Instant::now();
        self.machine.pause()?;
        let disk = self.bench.copy(&self.disk.0, "fork.disk")?;
        self.machine.create("Fork", &files)?;
        self.machine.resume()?;
        copy_of(self.bench, &files, instead(&disk), "").map_err(|error| whose("fork", &error))?;
        Ok((Kind::Forked, began.elapsed()))
    }

    /// A diff; or a full snapshot, and the life of a copy.
    fn saved(&mut self) -> Result<Option<(Kind, Duration)>> {
        let files = self.bench.place.files()?;
        let began = Instant::now();
        let is_full = self.turns % FULL_EACH == 1;
        self.machine.pause()?;
        let disk = self.bench.copy(&self.disk.0, "clone.disk")?;
        let kind = if is_full { "Full" } else { "Diff" };
        self.machine.create(kind, &files)?;
        self.machine.resume()?;
        if !is_full {
            return Ok(None);
        }
        copy_of(self.bench, &files, instead(&disk), "").map_err(|error| whose("copy", &error))?;
        Ok(Some((Kind::Cloned, began.elapsed())))
    }

    fn questions(&mut self) -> Result<()> {
        for path in ["/", "/version", "/vm/config", "/vm/timeline", "/metrics"] {
            self.machine.client.get(path)?;
        }
        match self.machine.client.get("/nowhere") {
            Err(error) if error.is_refusal() => Ok(()),
            Err(error) => Err(error),
            Ok(()) => Err(Failure::new("GET /nowhere was answered")),
        }
    }

    fn traffic(&mut self) -> Result<()> {
        let (mode, size) = TRAFFIC[self.turns as usize % TRAFFIC.len()];
        let word = format!("netload:1:{}:{size}:{NET_MS}", mode.word());
        self.begin(&word)?;
        let peer = Peer::start(TAP, mode, size)?;
        let ended = self.end(&word);
        if let Some(peer) = peer {
            peer.stop()?;
        }
        ended
    }
}

/// A disk of its own for a copy.
fn instead(disk: &Temporary) -> Value {
    json!({ "drive_id": "disk", "path_on_host": disk.0 })
}

fn whose(what: &str, error: &Failure) -> Failure {
    Failure::new(format!("a {what} of the long life: {error}"))
}
