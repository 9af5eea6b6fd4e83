//! What all lives of a soak share: the programs, disks and taps, and the random numbers.

use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use crate::failure::{Context, Failure, Result};
use crate::monitor::{CommandLine, Monitor};
use crate::peer;
use crate::snapshot::place::{Files, Place};
use crate::soak::args::Args;
use crate::sys;
use crate::workspace::TAP;

/// The tap of short lives, and of the long one in a jail; [`TAP`] is that of the other.
pub const SHORT_TAP: &str = "mf1";
pub const JAIL_TAP: &str = "mf2";
/// Bytes of a disk.
const DISK: u64 = 8 << 20;
/// Guest memory, in MiB.
const MEMORY: u64 = 64;

/// What all lives share.
#[derive(Debug)]
pub struct Bench<'a> {
    /// Where files lie.
    pub place: &'a Place<'a>,
    /// The monitor.
    pub monitor: Monitor,
    /// Its jailer.
    pub jailer: PathBuf,
    /// The guest.
    pub probe: PathBuf,
    /// Below it are the control groups of jails.
    pub group: String,
    /// A disk that is only read.
    pub base: PathBuf,
    /// How long what a life leaves may take to go.
    pub settle: Duration,
    /// What the next random number is made of.
    dice: Cell<u64>,
}

/// What a guest is made of.
#[derive(Debug, Default)]
pub struct Guest<'a> {
    /// What it does.
    pub words: &'a str,
    /// Its disk.
    pub disk: Value,
    /// Its tap.
    pub tap: Option<&'a str>,
    /// It can be forked, and its dirty pages are tracked.
    pub shared: bool,
}

impl<'a> Bench<'a> {
    /// Makes the disk, and the taps ready.
    pub fn new(place: &'a Place<'a>, args: &Args) -> Result<Self> {
        for tap in [SHORT_TAP, JAIL_TAP] {
            sys::make_tap(tap).cannot(|| format!("make the tap {tap}"))?;
        }
        for tap in [TAP, SHORT_TAP, JAIL_TAP] {
            peer::bring_up(tap)?;
        }
        let base = place.folder().join("base");
        let disk = fs::File::create(&base).and_then(|file| file.set_len(DISK));
        disk.cannot(|| format!("make the disk {}", base.display()))?;
        Ok(Self {
            place,
            monitor: Monitor {
                name: "mayfly".to_owned(),
                path: args.mayfly.clone(),
                command_line: CommandLine::Firecracker,
                extra: Vec::new(),
            },
            jailer: args.jailer.clone(),
            probe: args.probe.clone(),
            group: format!("mayfly-soak-{}", std::process::id()),
            base,
            settle: args.settle,
            dice: Cell::new(args.seed | 1),
        })
    }

    /// A random number below `limit`.
    pub fn below(&self, limit: u64) -> u64 {
        let mut next = self.dice.get();
        next ^= next << 13;
        next ^= next >> 7;
        next ^= next << 17;
        self.dice.set(next);
        next % limit.max(1)
    }

    /// A name in the folder of all files, for a disk or an overlay.
    pub fn file(&self, name: &str) -> Temporary {
        Temporary(self.place.folder().join(name))
    }

    /// A copy of a disk.
    pub fn copy(&self, from: &Path, name: &str) -> Result<Temporary> {
        let to = self.file(name);
        fs::copy(from, &to.0).cannot(|| format!("copy the disk {}", from.display()))?;
        Ok(to)
    }

    /// The configuration of a guest.
    pub fn config(&self, guest: &Guest<'_>) -> Value {
        let mut machine = json!({ "vcpu_count": 1, "mem_size_mib": MEMORY });
        if guest.shared {
            machine["memory_backend"] = json!("shared");
            machine["track_dirty_pages"] = json!(true);
        }
        let interfaces: Vec<Value> = guest
            .tap
            .iter()
            .map(|tap| json!({ "iface_id": "eth0", "host_dev_name": tap }))
            .collect();
        let mut disk = guest.disk.clone();
        disk["drive_id"] = json!("disk");
        disk["is_root_device"] = json!(false);
        json!({
            "boot-source": {
                "kernel_image_path": self.probe,
                "boot_args": format!("probe={} patience_ms=120000", guest.words),
            },
            "machine-config": machine,
            "drives": [disk],
            "network-interfaces": interfaces,
        })
    }

    /// The start of a command line that makes an empty jail.
    pub fn run(&self) -> Command {
        let mut command = Command::new(&self.jailer);
        let user = crate::jail::USER;
        command
            .env_clear()
            .args(["run", "--quiet", "--uid", user, "--gid", user])
            .args(["--parent-cgroup", &self.group])
            .arg("--mayfly")
            .arg(&self.monitor.path);
        command
    }

    /// A file with a configuration, by its name.
    pub fn config_file(&self, name: &str, guest: &Guest<'_>) -> Result<PathBuf> {
        let text = self.config(guest).to_string();
        self.place.workspace.file(name, &text)
    }
}

impl Drop for Bench<'_> {
    /// The jailer may leave the group that its groups were in.
    fn drop(&mut self) {
        crate::jail::remove_groups(&self.group);
    }
}

/// A file that is removed with this value, if it is there.
#[derive(Debug)]
pub struct Temporary(pub PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        // It may never have been made.
        let _ = fs::remove_file(&self.0);
    }
}

/// A disk that is written to itself.
pub fn plain(path: &Path) -> Value {
    json!({ "path_on_host": path, "is_read_only": false })
}

/// A disk under an overlay.
pub fn overlaid(base: &Path, overlay: &Path) -> Value {
    json!({
        "path_on_host": base,
        "is_read_only": false,
        "overlay": { "path_on_host": overlay },
    })
}

/// The request that makes a running guest of a snapshot, with its disk and tap.
pub fn load(files: &Files, disk: Value) -> Value {
    json!({
        "snapshot_path": files.state(),
        "mem_backend": { "backend_type": "File", "backend_path": files.memory() },
        "drive_overrides": [disk],
        "network_overrides": [{ "iface_id": "eth0", "host_dev_name": SHORT_TAP }],
        "resume_vm": true,
    })
}

/// That a guest's words all ended well.
pub fn all_well(who: &str, said: &str) -> Result<()> {
    match said
        .lines()
        .find(|line| line.contains("FAILED") || line.contains("panic"))
    {
        Some(line) => Err(Failure::new(format!("{who}: {}", line.trim()))),
        None => Ok(()),
    }
}
