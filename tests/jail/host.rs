//! What the jail tests need of the host: a folder and names of their own, a way to start the
//! jailer, a list of what it leaves, and the removal of what a killed run left.
#![allow(
    dead_code,
    clippy::allow_attributes,
    reason = "each test file uses a part of it"
)]

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// First part of every folder and cgroup these tests make; their process's id follows.
const MARK: &str = "mfjail-";

/// The user and group of the jails.
pub const UID: u32 = 64_321;
pub const GID: u32 = 64_322;

/// The programs under test.
struct Programs {
    jailer: PathBuf,
    witness: PathBuf,
}

/// `MAYFLY_JAILER_BIN` and `MAYFLY_JAIL_WITNESS`, or what cargo makes of this tree beside the
/// monitor.
fn programs() -> &'static Programs {
    static PROGRAMS: OnceLock<Programs> = OnceLock::new();
    PROGRAMS.get_or_init(|| {
        remove_leftovers();
        let given = |name| std::env::var_os(name).map(PathBuf::from);
        let (jailer, witness) = (given("MAYFLY_JAILER_BIN"), given("MAYFLY_JAIL_WITNESS"));
        let folder = Path::new(env!("CARGO_BIN_EXE_mayfly"))
            .parent()
            .expect("it is in a folder");
        if jailer.is_none() || witness.is_none() {
            // Fresh ones: a stale jailer must not pass.
            let mut build = Command::new(env!("CARGO"));
            build.current_dir(env!("CARGO_MANIFEST_DIR"));
            build.args(["build", "--quiet", "--package", "mayfly-jailer", "--bins"]);
            build.args(["--example", "jail-witness"]);
            if folder.ends_with("release") {
                build.arg("--release");
            }
            assert!(
                build.status().expect("cargo runs").success(),
                "building the jailer"
            );
        }
        Programs {
            jailer: jailer.unwrap_or_else(|| folder.join("mayfly-jailer")),
            witness: witness.unwrap_or_else(|| folder.join("examples/jail-witness")),
        }
    })
}

/// Copies a program, by another process: a descriptor for writing in this one could be inherited by the child of
/// another test just then, and a program open for writing does not start.
pub fn copy(from: &Path, to: &Path) {
    let status = Command::new("cp")
        .arg(from)
        .arg(to)
        .status()
        .expect("cp runs");
    assert!(status.success());
    fs::set_permissions(to, fs::Permissions::from_mode(0o755)).expect("just made");
}

/// One test's share of the host. Dropping it removes whatever the test made.
pub struct Host {
    folder: PathBuf,
    /// Name of the executable, and so of the jail's folder and parent cgroup.
    pub name: String,
}

impl Host {
    pub fn new(test: &str) -> Host {
        programs();
        let name = format!("{MARK}{}-{test}", std::process::id());
        let folder = std::env::temp_dir()
            .canonicalize()
            .expect("there is a folder for temporary files")
            .join(&name);
        fs::create_dir(&folder).expect("it is writable");
        // Jails are to be found by their user, too.
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o755)).expect("just made");
        fs::create_dir(folder.join("base")).expect("just made");
        let host = Host { folder, name };
        copy(&programs().witness, &host.exec_file());
        host
    }

    /// The jailer's program.
    pub fn jailer_program(&self) -> &'static Path {
        &programs().jailer
    }

    pub fn path(&self, below: &str) -> PathBuf {
        self.folder.join(below)
    }

    /// The witness, under this test's name.
    pub fn exec_file(&self) -> PathBuf {
        self.folder.join(&self.name)
    }

    pub fn base(&self) -> PathBuf {
        self.folder.join("base")
    }

    /// The root of a jail on the host.
    pub fn root(&self, id: &str) -> PathBuf {
        self.base().join(&self.name).join(id).join("root")
    }

    pub fn pid_file(&self, id: &str) -> PathBuf {
        self.root(id).join(format!("{}.pid", self.name))
    }

    /// The jailer with the least of arguments and those in `more`.
    pub fn jailer(&self, id: &str, more: &[&str]) -> Command {
        let mut words = vec!["--id".to_owned(), id.to_owned()];
        words.extend([
            "--exec-file".to_owned(),
            self.exec_file().display().to_string(),
        ]);
        words.extend(["--uid".to_owned(), UID.to_string()]);
        words.extend(["--gid".to_owned(), GID.to_string()]);
        words.extend([
            "--chroot-base-dir".to_owned(),
            self.base().display().to_string(),
        ]);
        words.extend(more.iter().map(|&word| word.to_owned()));
        self.bare(&words)
    }

    /// The jailer with just these arguments.
    pub fn bare<S: AsRef<std::ffi::OsStr>>(&self, words: &[S]) -> Command {
        let mut command = Command::new(&programs().jailer);
        command.args(words).stdin(Stdio::null());
        command
    }

    /// Runs a jailer that has to fail, and returns its one line.
    pub fn refused(&self, mut jailer: Command) -> String {
        let output = jailer.output().expect("the jailer starts");
        let text = String::from_utf8(output.stderr).expect("errors are text");
        assert_eq!(output.status.code(), Some(1), "{jailer:?}: {text}");
        assert_eq!(text.lines().count(), 1, "{jailer:?}: {text}");
        assert!(output.stdout.is_empty(), "{jailer:?}");
        assert!(text.starts_with("mayfly-jailer: cannot "), "{text}");
        text
    }

    /// What is below the base folder: nothing, after a failure.
    pub fn left(&self) -> Vec<String> {
        let mut left = Vec::new();
        list(&self.base(), &mut left);
        left.extend(
            cgroups_named(&self.name)
                .iter()
                .map(|path| path.display().to_string()),
        );
        left
    }
}

fn list(folder: &Path, found: &mut Vec<String>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        found.push(entry.path().display().to_string());
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            list(&entry.path(), found);
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        clean(&self.folder, &self.name);
    }
}

/// Ends the processes of a test by their pid files, then removes its cgroups and its folder.
fn clean(folder: &Path, name: &str) {
    let mut files = Vec::new();
    list(folder, &mut files);
    for file in files.iter().filter(|file| file.ends_with(".pid")) {
        let pid = fs::read_to_string(file).unwrap_or_default();
        let exe = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
        // A pid file may be older than the process that has its number now.
        if exe.to_string_lossy().contains(name) {
            let _ = Command::new("kill").args(["-KILL", &pid]).status();
            wait_until("the process is gone", || {
                !Path::new(&format!("/proc/{pid}")).exists()
            });
        }
    }
    for group in cgroups_named(name) {
        for _ in 0..500 {
            if fs::remove_dir(&group).is_ok() {
                break;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    let _ = fs::remove_dir_all(folder);
}

/// Removes what earlier runs left that were killed.
fn remove_leftovers() {
    let dead = |name: &str| {
        let pid = name
            .strip_prefix(MARK)
            .and_then(|rest| rest.split('-').next());
        pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists())
    };
    let Ok(temporary) = std::env::temp_dir().canonicalize() else {
        return;
    };
    for entry in fs::read_dir(temporary).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if dead(&name) {
            clean(&entry.path(), &name);
        }
    }
    for group in cgroups_named(MARK) {
        let name = group
            .components()
            .map(|part| part.as_os_str().to_string_lossy());
        if name.into_iter().any(|part| dead(&part)) {
            let _ = fs::remove_dir(&group);
        }
    }
}

/// All cgroups with `name` in their path, the lowest first.
pub fn cgroups_named(name: &str) -> Vec<PathBuf> {
    fn look(folder: &Path, name: &str, inside: bool, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                let inside = inside || entry.file_name().to_string_lossy().starts_with(name);
                look(&entry.path(), name, inside, found);
                if inside {
                    found.push(entry.path());
                }
            }
        }
    }
    let mut found = Vec::new();
    for mount in cgroup_mounts() {
        look(&mount, name, false, &mut found);
    }
    found
}

fn cgroup_mounts() -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let kind = |line: &str| {
        line.split(' ')
            .nth(2)
            .is_some_and(|kind| kind.starts_with("cgroup"))
    };
    let place = |line: &str| line.split(' ').nth(1).map(PathBuf::from);
    mounts
        .lines()
        .filter(|line| kind(line))
        .filter_map(place)
        .collect()
}

/// The mount point of the cgroup hierarchy with this option ("" for version 2).
pub fn cgroup_mount(controller: &str) -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    mounts.lines().find_map(|line| {
        let words: Vec<&str> = line.split(' ').collect();
        let found = match *words.get(2)? {
            "cgroup" => words.get(3)?.split(',').any(|option| option == controller),
            "cgroup2" => controller.is_empty(),
            _ => false,
        };
        found.then(|| PathBuf::from(words[1]))
    })
}

/// The facts a witness reported.
#[derive(Debug)]
pub struct Report(BTreeMap<String, Vec<String>>);

impl Report {
    pub fn parse<'a>(lines: impl IntoIterator<Item = &'a str>) -> Report {
        let mut facts: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for line in lines {
            let (name, value) = line.split_once(' ').unwrap_or((line, ""));
            facts
                .entry(name.to_owned())
                .or_default()
                .push(value.to_owned());
        }
        Report(facts)
    }

    /// Runs a jailer whose witness does not stay.
    pub fn of(mut jailer: Command) -> Report {
        let output = jailer.output().expect("the jailer starts");
        Report::of_output(&output)
    }

    pub fn of_output(output: &Output) -> Report {
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{:?}: {errors}", output.status);
        let text = std::str::from_utf8(&output.stdout).expect("reports are text");
        let report = Report::parse(text.lines());
        report.one("end");
        report
    }

    pub fn all(&self, name: &str) -> &[String] {
        self.0.get(name).map_or(&[], Vec::as_slice)
    }

    pub fn one(&self, name: &str) -> &str {
        match self.all(name) {
            [value] => value,
            other => panic!("{name}: {other:?} in {self:?}"),
        }
    }

    /// Mode, owner, group, device and links of a file in the jail.
    pub fn file(&self, path: &str) -> &str {
        self.all("file")
            .iter()
            .find_map(|line| line.strip_suffix(path)?.strip_suffix(' '))
            .unwrap_or_else(|| panic!("{path} in {self:?}"))
    }
}

/// A witness that stays, to be looked at from outside; it ends with its standard input.
pub struct Staying {
    child: Child,
    pub pid: u32,
    pub report: Report,
}

impl Staying {
    /// `jailer` without its own arguments for the witness.
    pub fn start(host: &Host, id: &str, mut jailer: Command, more: &[&str]) -> Staying {
        jailer.args(["--", "--stay"]).args(more);
        jailer.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = jailer.spawn().expect("the jailer starts");
        let output = BufReader::new(child.stdout.take().expect("piped above"));
        let mut lines = Vec::new();
        for line in output.lines() {
            lines.push(line.expect("reports are text"));
            if lines.last().is_some_and(|line| line == "end") {
                break;
            }
        }
        let report = Report::parse(lines.iter().map(String::as_str));
        report.one("end");
        let pid = pid_in(&host.pid_file(id));
        Staying { child, pid, report }
    }

    /// The jailer's own process.
    pub fn jailer_pid(&self) -> u32 {
        self.child.id()
    }

    pub fn end(mut self) {
        drop(self.child.stdin.take());
        assert!(self.child.wait().expect("it is ours").success());
        let process = PathBuf::from(format!("/proc/{}", self.pid));
        wait_until("the witness has ended", || !process.exists());
    }
}

pub fn pid_in(file: &Path) -> u32 {
    let text = fs::read_to_string(file).expect("there is a pid file");
    text.parse().expect("it is a number and nothing else")
}

/// A line of /proc/PID/status.
pub fn status(pid: u32, field: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).expect("the process lives");
    text.lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))
        .unwrap_or_else(|| panic!("{field} in {text}"))
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
}

/// The namespace of a process, as the kernel names it.
pub fn namespace(pid: u32, kind: &str) -> PathBuf {
    fs::read_link(format!("/proc/{pid}/ns/{kind}")).expect("the process lives")
}

/// The open descriptors of a process and what they are.
pub fn descriptors(pid: u32) -> BTreeMap<u32, PathBuf> {
    fs::read_dir(format!("/proc/{pid}/fd"))
        .expect("the process lives")
        .flatten()
        .filter_map(|entry| {
            let number = entry.file_name().to_str()?.parse().ok()?;
            Some((number, fs::read_link(entry.path()).ok()?))
        })
        .collect()
}

pub fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(
            start.elapsed() < Duration::from_secs(300),
            "waited for: {what}"
        );
        std::thread::sleep(Duration::from_millis(2));
    }
}
