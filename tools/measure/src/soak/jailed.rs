//! A second long life, in an empty jail: what watches the microVM from outside of the jail lives as long as it does.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::json;

use super::bench::{Bench, Guest, JAIL_TAP, Temporary, plain};
use super::long::PATIENCE;
use crate::failure::{Context, Failure, Result};
use crate::http::Client;
use crate::monitor::Running;
use crate::sys;

const WORK: &str = "blkload:0:randrw:4096:8:200:check,netload:1:tx:1514:50";
/// Between two looks at whether a snapshot is there.
const LOOK: Duration = Duration::from_millis(5);

/// The microVM in its jail, and what watches it.
#[derive(Debug)]
pub struct Jailed {
    running: Running,
    client: Client,
    folder: PathBuf,
    _disk: Temporary,
    socket: Temporary,
}

impl Jailed {
    /// Boots it.
    pub fn boot(bench: &Bench<'_>) -> Result<Self> {
        let disk = bench.copy(&bench.base, "jailed.disk")?;
        let guest = Guest {
            words: "shell",
            disk: plain(&disk.0),
            tap: Some(JAIL_TAP),
            shared: true,
        };
        let config = bench.config_file("jailed.json", &guest)?;
        let folder = bench.place.folder().join("jailed");
        let socket = Temporary(bench.place.socket());
        let names = bench.place.next_name()?;
        let mut command = bench.run();
        command
            .args(["--limit", "pids=64", "--config"])
            .arg(config)
            .arg("--snapshot-to")
            .arg(&folder)
            .args(["--snapshot-and-continue", "--api-sock"])
            .arg(&socket.0);
        let mut running = Running::start("mayfly-jailer", command)?;
        let client = Client::new(running.connect(names, &socket.0)?)?;
        running.next_line("shell ready", PATIENCE)?;
        let mut jailed = Self {
            running,
            client,
            folder,
            _disk: disk,
            socket,
        };
        jailed.set("Paused")?;
        Ok(jailed)
    }

    /// The process that was started: what watches.
    pub fn pid(&self) -> u32 {
        self.running.pid()
    }

    /// Traffic, pauses, and a snapshot by a signal. Between turns it is paused.
    pub fn turn(&mut self) -> Result<()> {
        self.all()
            .map_err(|error| Failure::new(format!("the long life in a jail: {error}")))
    }

    fn all(&mut self) -> Result<()> {
        self.set("Resumed")?;
        self.traffic()?;
        self.saved()?;
        self.set("Paused")
    }

    fn set(&mut self, state: &str) -> Result<()> {
        self.client.patch("/vm", &json!({ "state": state }))
    }

    fn traffic(&mut self) -> Result<()> {
        for word in WORK.split(',') {
            self.running.tell(format!("{word}\n").as_bytes())?;
            self.running.next_line(" begun", PATIENCE)?;
            for state in ["Paused", "Resumed"] {
                self.set(state)?;
            }
            self.client.get("/metrics")?;
            let line = self
                .running
                .next_line(&format!("probe: {word} "), PATIENCE)?;
            if !line.contains(" ok ") {
                return Err(Failure::new(line.trim()));
            }
        }
        Ok(())
    }

    /// Each snapshot is a new file.
    fn saved(&mut self) -> Result<()> {
        let state = self.folder.join("state");
        let file = || fs::metadata(&state).map(|file| (file.ino(), file.mtime_nsec()));
        let before = file().ok();
        sys::signal(self.pid(), sys::USR1).cannot(|| "ask for a snapshot".into())?;
        let asked = Instant::now();
        while file().ok().is_none_or(|now| Some(now) == before) {
            if asked.elapsed() > PATIENCE {
                return Err(Failure::new("the snapshot that was asked for never came"));
            }
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    /// Lets the guest end, and its jail with it; the socket is removed by what watched.
    pub fn stop(mut self) -> Result<()> {
        self.set("Resumed")?;
        self.running.tell(b"reset\n")?;
        let (_, status) = self.running.exit()?;
        if !status.success() {
            return Err(Failure::new(format!(
                "the long life in a jail ended with {status}"
            )));
        }
        if self.socket.0.exists() {
            return Err(Failure::new("the long life in a jail left its socket"));
        }
        Ok(())
    }
}
