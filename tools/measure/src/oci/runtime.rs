//! A container of an OCI runtime: made, started, watched until it writes, asked for more, removed.

use std::collections::{HashMap, VecDeque};
use std::fs;
use std::io::{PipeReader, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::failure::{Context, Failure, Result};
use crate::monitor::{CommandLine, Monitor};
use crate::sys;
use crate::workspace::Workspace;

/// Longer than any guest takes to boot here.
const PATIENCE: Duration = Duration::from_secs(300);
/// Between two looks at a container that is about to end.
const BETWEEN: Duration = Duration::from_millis(1);
/// A template is made of files only that were not changed just now.
const OLD: Duration = Duration::from_secs(3);
/// What the root has of busybox.
const APPLETS: [&str; 5] = ["sh", "echo", "sleep", "true", "head"];

/// What all containers of a run share.
#[derive(Debug)]
pub struct Place {
    /// The folder of the run.
    folder: PathBuf,
    /// The folder that containers are made of.
    pub root: PathBuf,
    /// Where Linux for the guest lies.
    linux: Option<PathBuf>,
    next: AtomicUsize,
}

impl Place {
    /// Makes the root.
    pub fn new(workspace: &Workspace, linux: Option<&Path>) -> Result<Place> {
        let folder = workspace.directory().to_owned();
        let root = folder.join("rootfs");
        let making = || format!("make the root {}", root.display());
        for name in ["bin", "dev", "proc", "sys", "tmp", "etc", "run"] {
            fs::create_dir_all(root.join(name)).cannot(making)?;
        }
        let busybox = ["/bin/busybox", "/usr/bin/busybox"];
        let busybox = busybox.iter().find(|path| Path::new(path).exists());
        let busybox = busybox.ok_or_else(|| {
            Failure::new("cannot make a container's root: busybox is missing (busybox-static)")
        })?;
        fs::copy(busybox, root.join("bin/busybox")).cannot(making)?;
        for applet in APPLETS {
            symlink("busybox", root.join("bin").join(applet)).cannot(making)?;
        }
        Ok(Place {
            folder,
            root,
            linux: linux.map(Path::to_owned),
            next: AtomicUsize::new(0),
        })
    }

    /// A name that nothing else of the run has.
    pub fn name(&self) -> String {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        format!("mf-bench-{}-{number}", std::process::id())
    }

    /// A file or folder of the run.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }
}

/// A runtime in one of several ways.
#[derive(Debug)]
pub struct Runtime<'a> {
    place: &'a Place,
    pub row: &'a Monitor,
    pub path: PathBuf,
    /// Its settings, where it has some.
    pub settings: Option<PathBuf>,
}

impl<'a> Runtime<'a> {
    /// That of a row; guests boot where its name ends with `cold`.
    pub fn new(place: &'a Place, row: &'a Monitor, cold: &str) -> Result<Runtime<'a>> {
        if row.command_line == CommandLine::Runtime {
            return Ok(Runtime {
                place,
                row,
                path: row.path.clone(),
                settings: None,
            });
        }
        let path = row.path.with_file_name("mayfly-oci");
        for needed in ["mayfly-oci", "mayfly-jailer", "mayfly-agent"] {
            wait_until_old(&row.path.with_file_name(needed))?;
        }
        let linux = place.linux.as_deref();
        let kernel = linux.map(|folder| folder.join("vmlinux"));
        let kernel = kernel.filter(|kernel| kernel.exists()).ok_or_else(|| {
            Failure::new("cannot measure oci: there is no Linux guest: run tools/guest first, or give --linux")
        })?;
        wait_until_old(&kernel)?;
        let cmdline = fs::read_to_string(kernel.with_file_name("cmdline"));
        let cmdline =
            cmdline.cannot(|| format!("read the command line beside {}", kernel.display()))?;
        let is_cold = row.name.ends_with(cold);
        let settings = json!({
            "kernel": kernel,
            "cmdline": cmdline.trim(),
            "memory_mib": 128,
            "cache": place.path("cache"),
            "templates": (!is_cold).then(|| place.path("templates")),
        });
        let file = place.path(if is_cold { "cold.json" } else { "warm.json" });
        fs::write(&file, settings.to_string()).cannot(|| format!("write {}", file.display()))?;
        Ok(Runtime {
            place,
            row,
            path,
            settings: Some(file),
        })
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.path);
        let name = self
            .row
            .name
            .replace(|it: char| !it.is_ascii_alphanumeric(), "-");
        command
            .arg("--root")
            .arg(self.place.path(&format!("state-{name}")));
        if let Some(settings) = &self.settings {
            command.arg("--config").arg(settings);
        }
        command.args(words).stdin(Stdio::null());
        command
    }

    fn run(&self, words: &[&str]) -> Result<Output> {
        let what = || format!("run {} {}", self.row.name, words[0]);
        let output = self.command(words).output().cannot(what)?;
        self.check(words[0], output)
    }

    fn check(&self, what: &str, output: Output) -> Result<Output> {
        match output.status.success() {
            true => Ok(output),
            false => Err(Failure::new(format!(
                "{} {what} ended with {}: {}",
                self.row.name,
                output.status,
                String::from_utf8_lossy(&output.stderr).trim()
            ))),
        }
    }
}

/// Files that were changed just now are in no template.
fn wait_until_old(path: &Path) -> Result<()> {
    let finding = || format!("find {}", path.display());
    let changed = fs::metadata(path)
        .and_then(|it| it.modified())
        .cannot(finding)?;
    if let Ok(left) = (changed + OLD).duration_since(std::time::SystemTime::now()) {
        std::thread::sleep(left);
    }
    Ok(())
}

/// What a further process has done.
#[derive(Debug)]
pub struct Done {
    pub ms: f64,
    pub bytes: usize,
}

/// A container, removed when this value goes.
#[derive(Debug)]
pub struct Container<'a> {
    runtime: &'a Runtime<'a>,
    id: String,
    bundle: PathBuf,
    stdout: PipeReader,
    stderr: PathBuf,
    /// Just before `create`.
    began: Instant,
    pid: u32,
    /// The time file of the vCPU's thread, once it was looked for; none is there in a container without a microVM.
    guest: Option<PathBuf>,
    is_deleted: bool,
}

impl<'a> Container<'a> {
    /// Makes one for `words`.
    pub fn create(runtime: &'a Runtime<'a>, words: &[&str]) -> Result<Container<'a>> {
        let place = runtime.place;
        let id = place.name();
        let bundle = place.path(&id);
        let writing = || format!("write the bundle {}", bundle.display());
        fs::create_dir(&bundle).cannot(writing)?;
        let text = config(&place.root, &id, words).to_string();
        fs::write(bundle.join("config.json"), text).cannot(writing)?;
        let stderr = bundle.join("stderr");
        let errors = fs::File::create(&stderr).cannot(writing)?;
        let (stdout, give) = std::io::pipe().cannot(|| "make a pipe".into())?;
        let path = bundle.display().to_string();
        let mut command = runtime.command(&["create", "--bundle", &path, &id]);
        command.stdout(give).stderr(errors);
        let began = Instant::now();
        let status = command
            .status()
            .cannot(|| format!("run {}", runtime.path.display()));
        // It holds the other end of the pipe.
        drop(command);
        let mut container = Container {
            runtime,
            id,
            bundle,
            stdout,
            stderr,
            began,
            pid: 0,
            guest: None,
            is_deleted: false,
        };
        if !status?.success() {
            return Err(container.failed("create failed"));
        }
        container.pid = container.state()?.1;
        Ok(container)
    }

    fn failed(&self, what: &str) -> Failure {
        let said = fs::read_to_string(&self.stderr).unwrap_or_default();
        let name = &self.runtime.row.name;
        Failure::new(format!("{name}: {what}: {}", said.trim()))
    }

    /// Starts it.
    pub fn start(&mut self) -> Result<()> {
        self.runtime.run(&["start", &self.id]).map(drop)
    }

    /// Waits for its first byte.
    pub fn first_byte(&mut self) -> Result<()> {
        let [is_ready] = sys::poll([self.stdout.as_fd()], PATIENCE)
            .cannot(|| "wait for the container's output".into())?;
        let mut byte = [0];
        match is_ready && self.stdout.read(&mut byte).is_ok_and(|read| read == 1) {
            true => Ok(()),
            false => Err(self.failed("the container wrote nothing")),
        }
    }

    /// Since just before `create`, in milliseconds.
    pub fn ms(&self) -> f64 {
        self.began.elapsed().as_secs_f64() * 1e3
    }

    fn state(&self) -> Result<(String, u32)> {
        let output = self.runtime.run(&["state", &self.id])?;
        let state: Value = serde_json::from_slice(&output.stdout)
            .cannot(|| format!("read the state of {}", self.id))?;
        let status = state["status"].as_str().unwrap_or_default().to_owned();
        let pid = state["pid"].as_u64().and_then(|pid| pid.try_into().ok());
        Ok((status, pid.unwrap_or_default()))
    }

    /// Waits for its end.
    pub fn end(&mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        // Its output ends when it does, or just before.
        let mut bytes = [0; 4096];
        while sys::poll([self.stdout.as_fd()], PATIENCE).is_ok_and(|[is_ready]| is_ready)
            && self.stdout.read(&mut bytes).is_ok_and(|read| read > 0)
        {}
        while self.state()?.0 != "stopped" {
            if Instant::now() > deadline {
                return Err(self.failed("the container does not end"));
            }
            std::thread::sleep(BETWEEN);
        }
        Ok(())
    }

    /// Runs a further process in it.
    pub fn exec(&self, words: &[&str]) -> Result<Done> {
        let words: Vec<&str> = [&["exec", &self.id], words].concat();
        let begun = Instant::now();
        let output = self.runtime.run(&words)?;
        Ok(Done {
            ms: begun.elapsed().as_secs_f64() * 1e3,
            bytes: output.stdout.len(),
        })
    }

    /// The time for which its guest ran so far, or waited for a processor, in milliseconds; nothing where it has none.
    pub fn guest_ms(&mut self) -> Result<Option<f64>> {
        if self.guest.is_none() {
            let threads = self.processes()?.into_iter().flat_map(vcpu_threads);
            self.guest = threads.map(|thread| thread.join("schedstat")).next();
        }
        let Some(path) = &self.guest else {
            return Ok(None);
        };
        let text = fs::read_to_string(path).cannot(|| format!("read {}", path.display()))?;
        let nanos = text
            .split(' ')
            .next()
            .and_then(|word| word.parse::<f64>().ok());
        Ok(nanos.map(|nanos| nanos / 1e6))
    }

    /// Its processes on the host.
    pub fn processes(&self) -> Result<Vec<u32>> {
        Ok(descendants(self.pid, &parents()?))
    }

    /// Ends and removes it.
    pub fn delete(&mut self) -> Result<()> {
        self.is_deleted = true;
        self.runtime.run(&["delete", "--force", &self.id])?;
        // The bundle is ours; what cannot be removed goes with the folder of the run.
        let _ = fs::remove_dir_all(&self.bundle);
        Ok(())
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        if !self.is_deleted {
            let _ = self.delete();
        }
    }
}

/// The threads of a process that run a guest's processor.
fn vcpu_threads(pid: u32) -> Vec<PathBuf> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"));
    let tasks = tasks
        .into_iter()
        .flatten()
        .flatten()
        .map(|task| task.path());
    let is_vcpu = |task: &PathBuf| {
        let name = fs::read_to_string(task.join("comm"));
        name.is_ok_and(|name| name.starts_with("fc_vcpu"))
    };
    tasks.filter(is_vcpu).collect()
}

/// Every process with its parent.
fn parents() -> Result<Vec<(u32, u32)>> {
    let entries = fs::read_dir("/proc").cannot(|| "list processes".into())?;
    let parent = |entry: fs::DirEntry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let text = fs::read_to_string(entry.path().join("stat")).ok()?;
        // The name may hold anything, brackets too.
        let (_, rest) = text.rsplit_once(") ")?;
        Some((pid, rest.split(' ').nth(1)?.parse().ok()?))
    };
    Ok(entries.flatten().filter_map(parent).collect())
}

/// A process and all below it.
fn descendants(pid: u32, parents: &[(u32, u32)]) -> Vec<u32> {
    let mut children: HashMap<u32, Vec<u32>> = HashMap::new();
    for (child, parent) in parents {
        children.entry(*parent).or_default().push(*child);
    }
    let mut found = Vec::new();
    let mut next = VecDeque::from([pid]);
    while let Some(pid) = next.pop_front() {
        found.push(pid);
        next.extend(children.remove(&pid).unwrap_or_default());
    }
    found
}

/// The bundle's config.json.
fn config(root: &Path, id: &str, words: &[&str]) -> Value {
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "args": words,
            "cwd": "/",
            "env": ["PATH=/bin"],
            "user": { "uid": 0, "gid": 0 },
        },
        "root": { "path": root, "readonly": true },
        "hostname": "bench",
        "mounts": [{ "destination": "/proc", "type": "proc", "source": "proc" }],
        "linux": {
            "cgroupsPath": format!("/{id}"),
            "namespaces": [
                { "type": "pid" },
                { "type": "mount" },
                { "type": "ipc" },
                { "type": "uts" },
                { "type": "network" },
            ],
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descendants_are_found_at_any_depth_and_once() {
        let parents = [(2, 1), (3, 2), (4, 3), (5, 1), (6, 5), (7, 3)];
        assert_eq!(descendants(2, &parents), [2, 3, 4, 7]);
        assert_eq!(descendants(6, &parents), [6]);
    }

    #[test]
    fn parents_when_of_this_process_are_told() {
        let own = (std::process::id(), std::os::unix::process::parent_id());
        assert!(parents().unwrap().contains(&own));
    }
}
