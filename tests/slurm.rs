//! microVMs as jobs of Slurm, on a cluster of three nodes on this machine: output, exit codes, limits,
//! counts, a terminal, cancelling, and slurmstepd killed; with the job script of docs/slurm.md as it stands.

#[path = "slurm/cluster.rs"]
mod cluster;
mod common;
#[path = "jail/host.rs"]
mod host;
#[path = "jail/run.rs"]
mod run;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use cluster::{Cluster, MICROVMS, Running, field, kill_slurmstepd_of, text_of};
use common::needs;
use common::sys::Terminal;
use host::{GID, UID, wait_until};
use run::Place;
use serde_json::Value;

const DOCUMENT: &str = include_str!("../docs/slurm.md");

/// One cluster for all: it takes some seconds to start.
#[test]
fn slurm_job_when_it_is_a_microvm_is_run_limited_counted_and_ended_as_any_other() {
    needs!(root, kvm, cgroup1, munged, slurmctld, slurmd, srun, sbatch);
    let place = Place::real("slurm", &common::mayfly());
    fs::copy(common::probe(), place.path("kernel")).unwrap();
    let slurm = Slurm {
        cluster: Cluster::start(place.host.path("slurm")),
        place,
    };
    slurm.srun_has_the_console_and_the_exit_code();
    slurm.terminal_is_the_guests_console();
    slurm.memory_of_the_job_holds_over_the_microvm();
    slurm.script_of_the_document_is_an_array_that_gres_counts();
    slurm.cancelled_job_ends_its_microvm_and_has_its_report();
    slurm.microvm_ends_with_slurmstepd("--with-parent", "");
    slurm.microvm_ends_with_slurmstepd("--end-with-fd 9", "9>&1");

    let Slurm { cluster, place } = slurm;
    drop(cluster);
    place.nothing_is_left();
    let groups = cluster::groups(std::process::id());
    assert!(groups.is_empty(), "{groups:?}");
}

struct Slurm {
    cluster: Cluster,
    place: Place,
}

impl Slurm {
    /// `mayfly-jailer run` of the test's copies.
    fn jailer(&self) -> String {
        format!(
            "{} run --uid {UID} --gid {GID}",
            self.place.path("mayfly-jailer")
        )
    }

    /// The words of `mayfly-jailer run` with the probe doing `words`.
    fn guest(&self, words: &str, more: &str) -> Vec<String> {
        let kernel = self.place.path("kernel");
        let all = format!("{} --quiet --kernel {kernel} {more}", self.jailer());
        let mut all: Vec<String> = all.split_whitespace().map(str::to_owned).collect();
        all.extend(["--cmdline".to_owned(), format!("probe={words}")]);
        all
    }

    /// `srun` of a job with this name and these options.
    fn srun(&self, name: &str, options: &[&str]) -> Command {
        let mut command = self.cluster.command("srun");
        command.args(["--job-name", name]).args(options);
        command
    }

    fn has_ended(&self, name: &str, state: &str, code: &str) {
        self.cluster.ends_so(name, state, code);
        self.is_clean();
    }

    /// No process of a microVM is left, and no group of one below the groups of Slurm.
    fn is_clean(&self) {
        self.place.nothing_is_left();
        let groups = cluster::groups(std::process::id());
        let ours = |part: &Path| {
            let name = part.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with("mayfly-")
        };
        let left: Vec<_> = groups.iter().filter(|group| ours(group)).collect();
        assert!(left.is_empty(), "{left:?}");
    }

    fn srun_has_the_console_and_the_exit_code(&self) {
        let crash = "the guest crashed (triple fault)";
        for (name, words, state, code, said) in [
            ("fine", "print:hello,reset", "COMPLETED", 0, "hello"),
            ("seven", "exitcode:7,reset", "FAILED", 7, "exitcode:7 ok"),
            ("crash", "triple", "FAILED", 160, crash),
        ] {
            let mut srun = self.srun(name, &[]);
            let output = srun.args(self.guest(words, "")).output().unwrap();
            let all = text_of(&output);
            assert_eq!(output.status.code(), Some(code), "{name}: {all}");
            assert!(all.contains(said), "{name}: {all}");
            self.has_ended(name, state, &format!("{code}:0"));
        }
    }

    fn terminal_is_the_guests_console(&self) {
        let mut terminal = Terminal::new();
        let mut srun = self.srun("terminal", &["--pty"]);
        srun.args(self.guest("shell", ""));
        let line = || Stdio::from(terminal.line.try_clone().unwrap());
        srun.stdin(line()).stdout(line()).stderr(line());
        let mut srun = srun.spawn().unwrap();
        let mut output = Vec::new();
        let shown = |output: &[u8], text: &str| {
            let all = String::from_utf8_lossy(output);
            all.contains(text)
        };
        while !shown(&output, "shell ready") {
            let mut piece = [0; 4096];
            let length = terminal.keyboard.read(&mut piece).unwrap();
            output.extend(&piece[..length]);
        }
        terminal.keyboard.write_all(b"exitcode:7\nreset\n").unwrap();
        assert_eq!(srun.wait().unwrap().code(), Some(7));
        self.has_ended("terminal", "FAILED", "7:0");
    }

    fn memory_of_the_job_holds_over_the_microvm(&self) {
        let said = "the memory limit of its control group ended the microVM";
        let limits: [(&str, &str, &str, &str); 3] = [
            // Slurm's counter of kills is that of the job's own group; a group of the microVM's has its own.
            ("slurms", "", "OUT_OF_MEMORY", "0:125"),
            ("higher", "--limit memory=200M", "FAILED", "164:0"),
            ("lower", "--limit memory=30M", "FAILED", "164:0"),
        ];
        for (name, limit, state, code) in limits {
            let more = format!("--memory 256 {limit}");
            let mut srun = self.srun(name, &["--mem=60M"]);
            let output = srun.args(self.guest("touch,reset", &more)).output();
            let all = text_of(&output.unwrap());
            assert!(all.contains(said), "{name}: {all}");
            assert!(!all.contains("touch ok"), "{name}: {all}");
            self.has_ended(name, state, code);
        }
    }

    /// The job script of the document, of this name, with the test's programs and guest.
    fn sbatch(&self, name: &str, options: &[&str], words: &str) -> Command {
        let (_, script) = DOCUMENT.split_once("```bash\n").unwrap();
        let (script, _) = script.split_once("```").unwrap();
        let (command, kernel) = ("mayfly-jailer run", "KERNEL=/srv/mayfly/vmlinux");
        assert!(script.contains(command) && script.contains(kernel));
        let own = format!("KERNEL={}", self.place.path("kernel"));
        let script = script
            .replace(command, &self.jailer())
            .replace(kernel, &own);
        let path = self.cluster.path(&format!("{name}.sh"));
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        let mut command = self.cluster.command("sbatch");
        command.env("CMDLINE", format!("probe={words}"));
        command.args(["--job-name", name]).args(options).arg(path);
        command
    }

    fn script_of_the_document_is_an_array_that_gres_counts(&self) {
        let mut sbatch = self.sbatch("array", &["--wait"], "wait:1000,exitcode:7,reset");
        let output = sbatch.output().unwrap();
        assert_eq!(output.status.code(), Some(7), "{}", text_of(&output));
        let jobs = self.cluster.jobs("array");
        assert_eq!(jobs.len(), 20, "{jobs:?}");
        let mut lives = Vec::new();
        for job in &jobs {
            assert_eq!(field(job, "ExitCode"), "7:0", "{job}");
            let report = self.report(field(job, "JobId"));
            assert_eq!(report["guest_code"], 7, "{report}");
            let end = report["ended_at_unix_ms"].as_u64().unwrap() * 1000;
            let start = end - report["wall_us"].as_u64().unwrap();
            lives.push((field(job, "BatchHost"), start, end));
            let file = field(job, "StdOut");
            let output = fs::read_to_string(file).unwrap();
            assert!(output.contains("exitcode:7 ok"), "{file}: {output}");
        }
        // At the start of each, how many run on its node.
        let most = lives.iter().map(|(node, at, _)| {
            let others = lives.iter().filter(|(of, ..)| of == node);
            others.filter(|(_, from, to)| from <= at && at < to).count()
        });
        let most = most.max().unwrap();
        assert!((1..=MICROVMS).contains(&most), "{most}: {lives:?}");
        self.is_clean();
    }

    fn report(&self, job: &str) -> Value {
        let path = self.cluster.path(&format!("microvm-{job}.json"));
        let text = fs::read_to_string(&path);
        let text = text.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        serde_json::from_str(&text).unwrap()
    }

    fn cancelled_job_ends_its_microvm_and_has_its_report(&self) {
        let mut sbatch = self.sbatch("cancelled", &["--array=1-1"], "stay");
        let output = sbatch.output().unwrap();
        assert!(output.status.success(), "{}", text_of(&output));
        let mut job = String::new();
        wait_until("the guest of the job", || {
            job = self.cluster.jobs("cancelled").pop().unwrap_or_default();
            let files = job.split(' ').find_map(|word| word.strip_prefix("StdOut="));
            let output = files.and_then(|file| fs::read_to_string(file).ok());
            output.is_some_and(|output| output.contains("halted"))
        });
        self.cluster.ask("scancel", &["--name", "cancelled"]);
        self.has_ended("cancelled", "CANCELLED", "143:0");
        let report = self.report(field(&job, "JobId"));
        assert_eq!(report["ended"], "stopped", "{report}");
        assert_eq!(report["exit_code"], 143, "{report}");
    }

    /// `mayfly-jailer` with `option`, started by a shell that opens descriptors as `redirection` says.
    fn microvm_ends_with_slurmstepd(&self, option: &str, redirection: &str) {
        let name = option.trim_matches(|c: char| !c.is_ascii_lowercase());
        let words = self.guest("stay", option).join(" ");
        let shell = format!("exec {words} {redirection}");
        let mut srun = self.srun(name, &[]);
        srun.args(["sh", "-c", &shell]).stdout(Stdio::piped());
        let mut srun = Running(srun.spawn().unwrap());
        let mut output = String::new();
        let mut stdout = srun.0.stdout.take().unwrap();
        while !output.contains("halted") {
            let mut piece = [0; 256];
            let length = stdout.read(&mut piece).unwrap();
            assert_ne!(length, 0, "{output}");
            output += &String::from_utf8_lossy(&piece[..length]);
        }
        kill_slurmstepd_of(self.place.processes());
        self.place.nothing_is_left();
        // Slurm has not noticed, and srun would wait for KillWait.
        self.cluster.ask("scancel", &["--name", name]);
        drop(srun);
        self.is_clean();
    }
}
