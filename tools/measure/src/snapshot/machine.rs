//! A guest that watches, under a monitor that is driven by its API; and the restore of one.

use std::fs;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::place::{Files, Guest, Place};
use crate::failure::{Context, Failure, Result};
use crate::http::Client;
use crate::monitor::{Monitor, Running};

/// Longer than a guest takes to write to every page of 4 GiB on a busy host.
const PATIENCE: Duration = Duration::from_secs(180);

/// Firecracker logs on the stream that its guest writes to, in the middle of a line too; and the guest's write to the
/// boot timer marks the end of a working set.
const WORDS: [&str; 3] = ["--level", "Error", "--boot-timer"];

/// Where a load is asked for.
const LOAD: &str = "/snapshot/load";

/// A running guest with its monitor's API.
#[derive(Debug)]
pub struct Machine {
    /// The process.
    pub running: Running,
    /// The connection to its API.
    pub client: Client,
    socket: PathBuf,
    answers: u32,
}

impl Machine {
    /// Boots a guest, which watches when this returns.
    pub fn boot(place: &Place<'_>, monitor: &Monitor, guest: Guest) -> Result<Self> {
        let mut machine = Self::boot_config(place, monitor, &place.config(guest)?)?;
        machine.running.said_within("watch ready", PATIENCE)?;
        Ok(machine)
    }

    /// Boots what a configuration file says. Its refusal is seen as one: the process ends, so it is tried by requests.
    pub fn boot_config(place: &Place<'_>, monitor: &Monitor, config: &Path) -> Result<Self> {
        let mut machine = Self::listen(place, monitor)?;
        let text = fs::read_to_string(config).cannot(|| format!("read {}", config.display()))?;
        let config: Value =
            serde_json::from_str(&text).cannot(|| format!("read {} as JSON", config.display()))?;
        machine.configure(&config)?;
        Ok(machine)
    }

    /// Sends the requests of what would be a configuration file, and starts the guest.
    pub fn configure(&mut self, config: &Value) -> Result<()> {
        self.client
            .put("/machine-config", &config["machine-config"])?;
        self.client.put("/boot-source", &config["boot-source"])?;
        for (kind, id) in [("drives", "drive_id"), ("network-interfaces", "iface_id")] {
            for device in config[kind].as_array().into_iter().flatten() {
                let id = device[id].as_str().unwrap_or_default();
                self.client.put(&format!("/{kind}/{id}"), device)?;
            }
        }
        let start = json!({ "action_type": "InstanceStart" });
        self.client.put("/actions", &start)
    }

    /// Starts a monitor without a guest.
    pub fn listen(place: &Place<'_>, monitor: &Monitor) -> Result<Self> {
        let socket = place.socket();
        let names = place.next_name()?;
        let mut running = monitor.listen_with(&socket, &WORDS)?;
        let client = Client::new(running.connect(names, &socket)?)?;
        Ok(Self {
            running,
            client,
            socket,
            answers: 0,
        })
    }

    /// The greatest gap that the guest has seen since this was asked last, in milliseconds.
    pub fn gap(&mut self) -> Result<f64> {
        self.answers += 1;
        self.running.tell(b"g")?;
        let end = format!(" ns, answer {}\r\n.", self.answers);
        let said = self.running.said(&end)?;
        let before = said.split(&end).next().unwrap_or_default();
        let ns: f64 = before
            .rsplit(' ')
            .next()
            .and_then(|word| word.parse().ok())
            .ok_or_else(|| Failure::new(format!("the guest told no gap, but: {said}")))?;
        Ok(ns / 1e6)
    }

    /// Has the guest do something that ends with its byte.
    pub fn do_it(&mut self, input: u8) -> Result<Instant> {
        self.running.tell(&[input])?;
        self.running.first_byte(None)
    }

    /// Stops the vCPUs.
    pub fn pause(&mut self) -> Result<()> {
        self.client.patch("/vm", &json!({ "state": "Paused" }))
    }

    /// Lets them run.
    pub fn resume(&mut self) -> Result<()> {
        self.client.patch("/vm", &json!({ "state": "Resumed" }))
    }

    /// Makes a snapshot of the kind `kind`.
    pub fn create(&mut self, kind: &str, files: &Files) -> Result<()> {
        let body = json!({
            "snapshot_type": kind,
            "snapshot_path": files.state(),
            "mem_file_path": files.memory(),
        });
        self.client.put("/snapshot/create", &body)
    }

    /// Pauses, makes a snapshot, resumes; how long that took, in milliseconds.
    pub fn snapshot(&mut self, kind: &str, files: &Files) -> Result<f64> {
        let began = Instant::now();
        self.pause()?;
        self.create(kind, files)?;
        self.resume()?;
        Ok(began.elapsed().as_secs_f64() * 1e3)
    }

    /// Asks for a snapshot to be loaded and resumed.
    pub fn send_load(&mut self, files: &Files, how: Load<'_>) -> Result<()> {
        match how {
            Load::ByPath => {
                let body = load_request(files, json!(files.memory()));
                self.client.send(LOAD, &body)
            }
            Load::Memory(memory) => {
                let body = load_request(files, json!({ "fd": 0 }));
                self.client.send_with(LOAD, &body, memory)
            }
            Load::WorkingSet(path) => {
                let mut body = load_request(files, json!(files.memory()));
                body["working_set"] = json!(path);
                self.client.send(LOAD, &body)
            }
        }
    }

    /// Waits until that is accepted.
    pub fn loaded(&mut self) -> Result<()> {
        self.client.accepted(LOAD)
    }

    /// Gives up the API, and keeps the process.
    pub fn into_running(self) -> Result<Running> {
        // Firecracker leaves its socket behind; others remove theirs, when they end.
        match fs::remove_file(&self.socket) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).cannot(|| "remove an API socket".into())
            }
            _ => Ok(self.running),
        }
    }

    /// Ends it.
    pub fn stop(self) -> Result<()> {
        self.into_running()?.stop()
    }
}

fn load_request(files: &Files, memory: Value) -> Value {
    json!({
        "snapshot_path": files.state(),
        "mem_backend": { "backend_type": "File", "backend_path": memory },
        "resume_vm": true,
    })
}

/// What is loaded besides the state.
#[derive(Clone, Copy)]
pub enum Load<'a> {
    /// The memory file, by its path.
    ByPath,
    /// Memory that is passed as a descriptor.
    Memory(BorrowedFd<'a>),
    /// The memory file, with the working set that this file has or gets.
    WorkingSet(&'a Path),
}

/// Makes a snapshot of a fresh guest that has been given `input` and has written its byte since, if there is any.
pub fn snapshot_of(
    place: &Place<'_>,
    monitor: &Monitor,
    guest: Guest,
    input: Option<u8>,
) -> Result<Files> {
    let files = place.files()?;
    let mut machine = Machine::boot(place, monitor, guest)?;
    if let Some(input) = input {
        machine.do_it(input)?;
    }
    machine.pause()?;
    machine.create("Full", &files)?;
    machine.stop()?;
    Ok(files)
}

/// Starts a monitor, gives its guest `input`, restores; the process, and when the guest's first byte came.
pub fn restore(
    place: &Place<'_>,
    monitor: &Monitor,
    files: &Files,
    how: Load<'_>,
    input: &[u8],
) -> Result<(Running, Instant)> {
    let mut machine = Machine::listen(place, monitor)?;
    machine.running.tell(input)?;
    machine.send_load(files, how)?;
    let byte = machine
        .running
        .first_byte(Some((&mut machine.client, LOAD)))?;
    Ok((machine.into_running()?, byte))
}
