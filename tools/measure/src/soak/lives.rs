//! Short lives: every way to begin and to end one.

use std::fs;
use std::path::Path;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::bench::{Bench, Guest, SHORT_TAP, Temporary, all_well, load, overlaid, plain};
use crate::failure::{Context, Failure, Result};
use crate::guest::{Size, Task};
use crate::jail;
use crate::monitor::Running;
use crate::snapshot::machine::Machine;
use crate::snapshot::place::Files;
use crate::workspace::Kernel;

/// What a guest does with its disk, and with its interface.
const DISK_WORK: &str = "blkload:0:randrw:4096:8:20:check";
const NET_WORK: &str = "netload:1:tx:1514:10";
/// The same without end.
const ENDLESS: &str = "blkload:0:randrw:4096:8:100000000:check";
/// A life that is killed has at most so long, in microseconds; it takes some ten milliseconds to start.
const KILLED_WITHIN: u64 = 60_000;

/// A way to begin and to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// From a configuration file; ends itself.
    File,
    /// By requests, with an overlay and an interface; ends itself.
    Api,
    /// The same; killed at any time.
    Killed,
    /// Its first requests are refused; then as the one by requests.
    Refused,
    /// From a snapshot that all of these share; ends itself.
    Restored,
    /// A copy of the long one, by a fork while its disk is busy.
    Forked,
    /// The same by a full snapshot.
    Cloned,
    /// In an empty jail, with an interface and limits; ends itself.
    Jailed,
    /// The same, and its jailer is killed at any time.
    JailKilled,
    /// In a jail as Firecracker's jailer makes them; ends itself.
    Compatible,
}

impl Kind {
    /// Those that are lived by themselves. The others are copies of the long one.
    pub const ALONE: [Kind; 8] = [
        Kind::File,
        Kind::Api,
        Kind::Killed,
        Kind::Refused,
        Kind::Restored,
        Kind::Jailed,
        Kind::JailKilled,
        Kind::Compatible,
    ];

    /// What tables call it.
    pub fn name(self) -> &'static str {
        match self {
            Kind::File => "booted from a file",
            Kind::Api => "booted by requests",
            Kind::Killed => "killed",
            Kind::Refused => "refused, then booted",
            Kind::Restored => "restored",
            Kind::Forked => "forked",
            Kind::Cloned => "cloned",
            Kind::Jailed => "in an empty jail",
            Kind::JailKilled => "jailer killed",
            Kind::Compatible => "in a compatible jail",
        }
    }
}

/// What short lives share.
#[derive(Debug)]
pub struct Lives<'a> {
    bench: &'a Bench<'a>,
    /// A guest that waits for words.
    template: Files,
    /// A guest without devices.
    tiny: Kernel,
}

impl<'a> Lives<'a> {
    /// Makes the snapshot that restored ones begin from.
    pub fn new(bench: &'a Bench<'a>) -> Result<Self> {
        let guest = Guest {
            words: "shell",
            disk: plain(&bench.base),
            tap: Some(SHORT_TAP),
            ..Guest::default()
        };
        let config = bench.config_file("template.json", &guest)?;
        let template = bench.place.files()?;
        let mut machine = Machine::boot_config(bench.place, &bench.monitor, &config)?;
        machine.running.said("shell ready")?;
        machine.pause()?;
        machine.create("Full", &template)?;
        machine.stop()?;
        Ok(Self {
            bench,
            template,
            tiny: bench
                .place
                .workspace
                .kernel("tiny", Size::Tiny, Task::Reset)?,
        })
    }

    /// Lives one life; how long it took.
    pub fn live(&self, kind: Kind) -> Result<Duration> {
        let began = Instant::now();
        let lived = match kind {
            Kind::File => self.file(),
            Kind::Api => self.api(),
            Kind::Killed => self.killed(),
            Kind::Refused => self.refused(),
            Kind::Restored => self.restored(),
            Kind::Jailed => self.jailed(),
            Kind::JailKilled => self.jail_killed(),
            Kind::Compatible => self.compatible(),
            Kind::Forked | Kind::Cloned => Err(Failure::new("it is lived by the long one")),
        };
        lived
            .map(|()| began.elapsed())
            .map_err(|error| Failure::new(format!("a life ({}): {error}", kind.name())))
    }

    fn file(&self) -> Result<()> {
        let disk = self.bench.copy(&self.bench.base, "disk")?;
        let words = format!("{DISK_WORK},reset");
        let guest = Guest {
            words: &words,
            disk: plain(&disk.0),
            ..Guest::default()
        };
        let config = self.bench.config_file("life.json", &guest)?;
        let running = self.bench.monitor.boot_config_quietly(&config)?;
        ended_well(running, DISK_WORK)
    }

    fn api(&self) -> Result<()> {
        let (machine, _overlay) = self.booted(&format!("{DISK_WORK},{NET_WORK},reset"))?;
        ended_well(machine.into_running()?, NET_WORK)
    }

    fn killed(&self) -> Result<()> {
        let (mut machine, _overlay) = self.booted(ENDLESS)?;
        std::thread::sleep(Duration::from_micros(self.bench.below(KILLED_WITHIN)));
        if self.bench.below(2) == 0 {
            machine.pause()?;
        }
        machine.stop()
    }

    fn refused(&self) -> Result<()> {
        let mut machine = Machine::listen(self.bench.place, &self.bench.monitor)?;
        let nowhere = self.bench.file("nowhere");
        let broken = self.bench.file("broken");
        let text = fs::read(self.template.state()).cannot(|| "read a state file".into())?;
        let half = &text[..text.len() / 2];
        fs::write(&broken.0, half).cannot(|| "write half a state file".into())?;
        let loaded = json!({
            "snapshot_path": broken.0,
            "mem_backend": { "backend_type": "File", "backend_path": self.template.memory() },
        });
        let start = json!({ "action_type": "InstanceStart" });
        let disk =
            json!({ "drive_id": "disk", "path_on_host": nowhere.0, "is_root_device": false });
        for (path, body) in [
            ("/boot-source", json!({ "kernel_image_path": nowhere.0 })),
            ("/drives/disk", disk),
            (
                "/machine-config",
                json!({ "vcpu_count": 0, "mem_size_mib": 1 }),
            ),
            ("/snapshot/load", loaded),
            ("/actions", start),
        ] {
            match machine.client.put(path, &body) {
                Err(error) if error.is_refusal() => {}
                Err(error) => return Err(error),
                Ok(()) => return Err(Failure::new(format!("{path} was not refused: {body}"))),
            }
        }
        let overlay = self.bench.file("overlay");
        let words = format!("{DISK_WORK},reset");
        let guest = self.guest(&words, &overlay.0);
        machine.configure(&self.bench.config(&guest))?;
        ended_well(machine.into_running()?, DISK_WORK)
    }

    fn restored(&self) -> Result<()> {
        let overlay = self.bench.file("overlay");
        let disk = json!({ "drive_id": "disk", "overlay": { "path_on_host": overlay.0 } });
        let words = format!("{DISK_WORK}\n{NET_WORK}\n");
        copy_of(self.bench, &self.template, disk, &words)
    }

    fn jailed(&self) -> Result<()> {
        let words = format!("{DISK_WORK},{NET_WORK},reset");
        let (running, _overlay) = self.in_a_jail(&words)?;
        ended_well(running, NET_WORK)
    }

    fn jail_killed(&self) -> Result<()> {
        let (running, _overlay) = self.in_a_jail(ENDLESS)?;
        std::thread::sleep(Duration::from_micros(self.bench.below(KILLED_WITHIN)));
        running.stop()
    }

    fn compatible(&self) -> Result<()> {
        let id = format!("soak-{}", std::process::id());
        let (monitor, user) = (&self.bench.monitor.path, jail::USER);
        let jails = self.bench.place.workspace.directory().join("jails");
        let _folder = jail::Folder::new(&jails, monitor, &id, &self.tiny.path)?;
        let mut command = std::process::Command::new(&self.bench.jailer);
        command
            .env_clear()
            .args(["--id", &id, "--uid", user, "--gid", user, "--exec-file"])
            .arg(monitor)
            .arg("--chroot-base-dir")
            .arg(&jails)
            .args(["--", "--no-api", "--config-file", "/config.json"]);
        let mut running = Running::start("mayfly-jailer", command)?;
        running.first_byte(None)?;
        in_order(running.exit()?.1)
    }

    fn in_a_jail(&self, words: &str) -> Result<(Running, Temporary)> {
        let overlay = self.bench.file("overlay");
        let mut drive = self.bench.base.clone().into_os_string();
        drive.push(":overlay=");
        drive.push(&overlay.0);
        let mut command = self.bench.run();
        command
            .args(["--memory", "64", "--net", "auto"])
            .args(["--limit", "cpus=1", "--limit", "memory=200M"])
            .args(["--limit", "pids=64", "--drive"])
            .arg(drive)
            .arg("--kernel")
            .arg(&self.bench.probe)
            .args(["--cmdline", &format!("probe={words} patience_ms=120000")]);
        Ok((Running::start("mayfly-jailer", command)?, overlay))
    }

    /// A guest with an overlay and an interface.
    fn booted(&self, words: &str) -> Result<(Machine, Temporary)> {
        let overlay = self.bench.file("overlay");
        let guest = self.guest(words, &overlay.0);
        let mut machine = Machine::listen(self.bench.place, &self.bench.monitor)?;
        machine.configure(&self.bench.config(&guest))?;
        Ok((machine, overlay))
    }

    fn guest<'g>(&self, words: &'g str, overlay: &Path) -> Guest<'g> {
        Guest {
            words,
            disk: overlaid(&self.bench.base, overlay),
            tap: Some(SHORT_TAP),
            shared: false,
        }
    }
}

/// Lives the life of a copy: it goes on with what it was doing, does `words`, and ends itself.
pub fn copy_of(bench: &Bench<'_>, files: &Files, disk: Value, words: &str) -> Result<()> {
    let mut machine = Machine::listen(bench.place, &bench.monitor)?;
    let body = load(files, disk);
    machine.client.put("/snapshot/load", &body)?;
    let words = format!("{words}print:copied\nreset\n");
    machine.running.tell(words.as_bytes())?;
    ended_well(machine.into_running()?, "print:copied")
}

/// That the guest's last words were `word`, all ended well, and the process ended in order.
fn ended_well(mut running: Running, word: &str) -> Result<()> {
    let said = running.said(&format!("probe: {word} ok"));
    let end = running.exit();
    let said = said?;
    all_well("the guest", &said)?;
    in_order(end?.1)
}

fn in_order(status: ExitStatus) -> Result<()> {
    match status.success() {
        true => Ok(()),
        false => Err(Failure::new(format!(
            "it ended with {status} after its guest's reset"
        ))),
    }
}
