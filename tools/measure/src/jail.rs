//! `jail`: what a jail adds to a start, and how many jailed lives fit into a second.

use std::fs::{self, DirBuilder, Permissions};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use serde_json::json;

use crate::failure::{Context, Failure, Result};
use crate::guest::{Size, Task};
use crate::monitor::{CommandLine, Monitor, Running};
use crate::rounds::{self, Figure, Plan, Sample};
use crate::workspace::{Kernel, MEMORY_MIB, Workspace};

/// The user that jailed monitors run as, and nothing else.
pub const USER: &str = "64321";

/// Starts or lives whose rate is taken.
const COUNT: usize = 100;

/// Starts or lives under way at the same time.
const PARALLEL: usize = 2;

/// What "net, limits" adds.
const MORE: [&str; 8] = [
    "--net",
    "auto",
    "--limit",
    "cpus=1",
    "--limit",
    "memory=300M",
    "--limit",
    "pids=64",
];

/// How the figures are counted, for the foot of the table.
pub const NOTES: &str = "\
counted: guests with a tiny kernel, which write a byte and reset. \"+ run\" is started by `mayfly-jailer run`, whose jail is
counted with it; \"+ run, net, limits\" has --net auto and --limit cpus=1, memory=300M and pids=64 besides. \"+ jailer\" is
started by a jailer with Firecracker's command line (--jailer): its folder, with the kernel in it, is made before and
removed after, uncounted; the monitor's copy is made by the jailer and so is counted. A start is from exec to the first
byte, with two under way at a time, while earlier guests still end beside them; a life is from exec to the end of the
process, with two under way at a time. Both rates are taken in a third of the rounds.
";

/// What is said in place of figures to a user who may not make jails.
pub const SKIPPED: &str =
    "skipped, because jails for other users, taps and cgroups are made by root only.\n";

/// How a row of the table is started.
enum Start {
    /// As in the other figures.
    Alone,
    /// By `mayfly-jailer run` (this executable), with more words.
    Run(PathBuf, &'static [&'static str]),
    /// By a jailer with Firecracker's command line.
    Jailer(PathBuf),
}

/// Whether this program may make jails.
pub fn permitted() -> bool {
    fs::metadata("/proc/self").is_ok_and(|this| this.uid() == 0)
}

/// Measures every monitor alone, `ours` in the jails of the jailer beside it, and those in `jailers` in theirs. The
/// rows of the tables come back with the figures.
pub fn measure(
    workspace: &Workspace,
    monitors: &[Monitor],
    ours: &str,
    jailers: &[(String, PathBuf)],
    plan: Plan,
) -> Result<(Vec<Monitor>, Vec<Figure>)> {
    let kernel = workspace.kernel("tiny", Size::Tiny, Task::Reset)?;
    let place = Place {
        kernel: &kernel,
        jails: workspace.directory().join("jails"),
        group: format!("mayfly-bench-{}", std::process::id()),
        next: AtomicUsize::new(0),
    };
    let mut rows = Vec::new();
    let mut starts = Vec::new();
    for monitor in monitors {
        let mut add = |what: &str, start| {
            let mut row = monitor.clone();
            row.name.push_str(what);
            rows.push(row);
            starts.push(start);
        };
        add("", Start::Alone);
        if monitor.name == ours {
            let jailer = monitor.path.with_file_name("mayfly-jailer");
            add(" + run", Start::Run(jailer.clone(), &[]));
            add(" + run, net, limits", Start::Run(jailer, &MORE));
        }
        for (_, path) in jailers.iter().filter(|(name, _)| *name == monitor.name) {
            add(" + jailer", Start::Jailer(path.clone()));
        }
    }
    let start_of = |row: &Monitor| {
        let known = rows.iter().position(|known| known.name == row.name);
        &starts[known.expect("it is one of the rows")]
    };
    let mut figures = rounds::run(plan, &rows, |row| {
        let life = place.life(row, start_of(row))?;
        Ok(vec![
            Sample::ms("exec to first guest byte", life.byte),
            Sample::ms("exec to end of the process", life.end),
        ])
    })?;
    let fewer = Plan {
        warm_up: 1,
        runs: plan.runs.div_ceil(3),
    };
    figures.extend(rounds::run(fewer, &rows, |row| match start_of(row) {
        Start::Jailer(_) => Ok(Vec::new()),
        start => Ok(vec![
            Sample::new(
                format!("starts per second, {COUNT} starts, {PARALLEL} at a time"),
                "1/s",
                place.starts(row, start)?,
            ),
            Sample::new(
                format!("lives per second, {COUNT} lives, {PARALLEL} at a time"),
                "1/s",
                place.lives(row, start)?,
            ),
        ]),
    })?);
    Ok((rows, figures))
}

/// When, in milliseconds from exec.
struct Life {
    byte: f64,
    end: f64,
}

/// What the jails are made of, and where.
struct Place<'a> {
    kernel: &'a Kernel,
    /// Below it are the folders of jails.
    jails: PathBuf,
    /// Below it are the cgroups of jails.
    group: String,
    next: AtomicUsize,
}

/// One process whose guest is about to write and to reset, with the folder it needs.
struct Started<'a> {
    running: Running,
    name: &'a str,
    _folder: Option<Folder>,
}

impl Started<'_> {
    /// Waits for the process to end in order.
    fn end(&mut self) -> Result<Instant> {
        let mut end = self.running.exit();
        if end.is_err() && crate::sys::interrupted() {
            // A jailer is given the time to take its jail away.
            end = self.running.exit();
        }
        let (end, status) = end?;
        if !status.success() {
            return Err(Failure::new(format!(
                "{} ended with {status} after its guest's reset",
                self.name
            )));
        }
        Ok(end)
    }
}

impl Place<'_> {
    fn start<'a>(&self, row: &'a Monitor, start: &Start) -> Result<Started<'a>> {
        let (running, folder) = match start {
            Start::Alone => (row.boot(self.kernel)?, None),
            Start::Run(jailer, more) => {
                let mut command = Command::new(jailer);
                command
                    .env_clear()
                    .args(["run", "--quiet", "--uid", USER, "--gid", USER])
                    .args(["--parent-cgroup", &self.group])
                    .arg("--mayfly")
                    .arg(&row.path)
                    .args(["--memory", &MEMORY_MIB.to_string()])
                    .arg("--kernel")
                    .arg(&self.kernel.path)
                    .args(*more);
                (Running::start(&row.name, command)?, None)
            }
            Start::Jailer(jailer) => {
                let id = format!("bench-{}", self.next.fetch_add(1, Ordering::Relaxed));
                let folder = Folder::new(&self.jails, &row.path, &id, &self.kernel.path)?;
                let mut command = Command::new(jailer);
                command
                    .env_clear()
                    .args(["--id", &id, "--uid", USER, "--gid", USER])
                    .arg("--exec-file")
                    .arg(&row.path)
                    .arg("--chroot-base-dir")
                    .arg(&self.jails)
                    .args(["--", "--no-api", "--config-file", "/config.json"])
                    .args(&row.extra);
                (Running::start(&row.name, command)?, Some(folder))
            }
        };
        Ok(Started {
            running,
            name: &row.name,
            _folder: folder,
        })
    }

    fn life(&self, row: &Monitor, start: &Start) -> Result<Life> {
        let mut started = self.start(row, start)?;
        // Whatever became of the byte, the end is waited for.
        let byte = started.running.first_byte(None);
        let end = started.end();
        Ok(Life {
            byte: started.running.ms(byte?),
            end: started.running.ms(end?),
        })
    }

    /// Starts per second; the ends are waited for afterwards.
    fn starts(&self, row: &Monitor, start: &Start) -> Result<f64> {
        let begun = Instant::now();
        let groups = rounds::in_parallel(COUNT, PARALLEL, || {
            let mut started = self.start(row, start)?;
            let byte = started.running.first_byte(None);
            if byte.is_err() {
                // It is the failure of the byte that is told.
                let _ = started.end();
            }
            byte.map(|_| started)
        });
        let seconds = begun.elapsed().as_secs_f64();
        let mut failure = None;
        let mut count = 0;
        for result in groups {
            match result.and_then(|mut started| started.end()) {
                Ok(_) => count += 1,
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        failure.map_or(Ok(f64::from(count) / seconds), Err)
    }

    /// Lives per second.
    fn lives(&self, row: &Monitor, start: &Start) -> Result<f64> {
        let begun = Instant::now();
        let lives = rounds::in_parallel(COUNT, PARALLEL, || self.life(row, start));
        let seconds = begun.elapsed().as_secs_f64();
        let lives = lives.into_iter().collect::<Result<Vec<Life>>>()?;
        Ok(lives.len() as f64 / seconds)
    }
}

impl Drop for Place<'_> {
    /// The jailer may leave the group that its groups were in.
    fn drop(&mut self) {
        remove_groups(&self.group);
    }
}

/// Removes the group `name` from each hierarchy, where it is there and empty.
pub fn remove_groups(name: &str) {
    let root = Path::new("/sys/fs/cgroup");
    let _ = fs::remove_dir(root.join(name));
    for hierarchy in fs::read_dir(root).into_iter().flatten().flatten() {
        let _ = fs::remove_dir(hierarchy.path().join(name));
    }
}

/// The folder of one jail, removed with this value.
pub struct Folder(PathBuf);

impl Folder {
    /// Makes it where a jailer looks for it, with the kernel and a configuration in it.
    pub fn new(jails: &Path, monitor: &Path, id: &str, kernel: &Path) -> Result<Self> {
        let folder = jails.join(monitor.file_name().unwrap_or_default()).join(id);
        let making = || format!("make the jail {}", folder.display());
        let root = folder.join("root");
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(&root)
            .cannot(making)?;
        let made = Self(folder.clone());
        let config = root.join("config.json");
        let text = json!({
            "boot-source": { "kernel_image_path": "/kernel" },
            "machine-config": { "vcpu_count": 1, "mem_size_mib": MEMORY_MIB },
            "drives": [],
            "network-interfaces": [],
        });
        fs::hard_link(kernel, root.join("kernel")).cannot(making)?;
        fs::write(&config, text.to_string()).cannot(making)?;
        for file in [kernel, &config] {
            fs::set_permissions(file, Permissions::from_mode(0o644)).cannot(making)?;
        }
        Ok(made)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What stays goes with the workspace.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Whether `monitors` has what `jailers` names, by Firecracker's command line.
pub fn check(monitors: &[Monitor], jailers: &[(String, PathBuf)]) -> Result<()> {
    for (name, path) in jailers {
        let known = |monitor: &Monitor| {
            monitor.name == *name && monitor.command_line == CommandLine::Firecracker
        };
        if !monitors.iter().any(known) {
            return Err(Failure::new(format!(
                "--jailer names {name}, which is not measured"
            )));
        }
        if !path.is_file() {
            return Err(Failure::new(format!(
                "cannot find the jailer of {name} at {}",
                path.display()
            )));
        }
    }
    Ok(())
}
