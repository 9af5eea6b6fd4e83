//! Slurm's `srun --container` and `sbatch --container` with `mayfly-oci` as the runtime, by the oci.conf of
//! docs/slurm.md: output, exit codes, cancelling, slurmstepd killed, what is refused, and that nothing is left.

#[path = "slurm/cluster.rs"]
mod cluster;
mod common;
#[path = "jail/host.rs"]
mod host;

use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use cluster::{Cluster, Running, kill_slurmstepd_of, text_of};
use common::{Folder, containers, needs};
use host::wait_until;
use serde_json::{Value, json};

const DOCUMENT: &str = include_str!("../docs/slurm.md");
/// Of the guest, the monitor and the image's disk.
const MEMORY: &str = "--mem=400M";

/// One cluster for all: it takes some seconds to start, as each guest does.
#[test]
fn container_of_a_job_when_it_is_a_microvm_is_run_and_ended_as_any_other() {
    needs!(
        root, kvm, guest, cgroup1, munged, slurmctld, slurmd, srun, sbatch, runuser
    );
    let slurm = Slurm::new();
    slurm.bundle_that_cannot_be_honoured_is_refused_by_name();
    slurm.step_has_its_output_environment_and_exit_code();
    slurm.batch_script_runs_in_the_container();
    slurm.cancelled_step_ends_its_microvm();
    slurm.microvm_ends_with_slurmstepd();
}

struct Slurm {
    // Before the folder, which has its files.
    cluster: Cluster,
    folder: Folder,
}

impl Slurm {
    fn new() -> Slurm {
        let folder = Folder::new();
        let settings = containers::install_warm_runtime(&folder);
        let root = folder.join("bundle/rootfs");
        containers::busybox_root(&root, &["sh", "sleep", "env", "grep"]);
        let cluster = Cluster::start(folder.join("slurm"));
        let slurm = Slurm { cluster, folder };
        slurm.configure(&settings);
        slurm.write_bundle(|_| {});
        slurm
    }

    /// The oci.conf of the document, with the test's programs and folders.
    fn configure(&self, settings: &Path) {
        let (_, text) = DOCUMENT.split_once("`oci.conf`:\n\n```text\n").unwrap();
        let (text, _) = text.split_once("```").unwrap();
        let (program, root) = ("mayfly-oci --root", "/tmp/mayfly-%u");
        assert_eq!(text.matches(program).count(), 4, "{text}");
        assert_eq!(text.matches(root).count(), 4, "{text}");
        let ours = format!(
            "{} --config {} --root",
            self.folder.join("bin/mayfly-oci").display(),
            settings.display()
        );
        let state = self.folder.join("state-%u").display().to_string();
        let text = text.replace(program, &ours).replace(root, &state);
        fs::write(self.cluster.path("oci.conf"), text).unwrap();
    }

    fn write_bundle(&self, change: impl FnOnce(&mut Value)) {
        let mut config = json!({
            "ociVersion": "1.0.2",
            "process": {
                "args": ["sh"],
                "cwd": "/",
                "env": ["PATH=/bin", "TWICE=bundle"],
                "terminal": true,
                "user": { "uid": 0, "gid": 0 },
            },
            "root": { "path": "rootfs" },
            "mounts": [{ "destination": "/proc", "type": "proc", "source": "proc" }],
            "linux": { "namespaces": [{ "type": "network" }, { "type": "pid" }] },
        });
        change(&mut config);
        self.folder.file("bundle/config.json", config.to_string());
    }

    /// A program of Slurm's, for a job of this name in the bundle.
    fn command(&self, program: &str, name: &str) -> Command {
        let mut command = self.cluster.command(program);
        let bundle = self.folder.join("bundle").display().to_string();
        command.args(["--job-name", name, MEMORY, "--container", &bundle]);
        command.env("TWICE", "job").env("PATH", path());
        command
    }

    fn has_ended(&self, name: &str, state: &str, code: &str) {
        self.cluster.ends_so(name, state, code);
        self.nothing_is_left();
    }

    /// No process of ours, no state folder, no control group of a microVM, and nothing in Slurm's spool.
    fn nothing_is_left(&self) {
        wait_until("the end of all processes", || self.processes().is_empty());
        let left = || {
            let groups = cluster::groups(std::process::id()).into_iter();
            let is_ours = |part: &PathBuf| {
                let name = part.file_name().unwrap_or_default().to_string_lossy();
                name.starts_with("mayfly")
            };
            let mut left: Vec<PathBuf> = groups.filter(is_ours).collect();
            left.extend(entries(&self.folder.join("state-root")));
            let spools = entries(&self.folder.join("slurm")).into_iter();
            let spools = spools.filter(|it| it.to_string_lossy().contains("/spool-"));
            let bundles = spools.flat_map(|spool| entries(&spool)).filter(|it| {
                let name = it.file_name().unwrap_or_default().to_string_lossy();
                name.starts_with("oci-job")
            });
            left.extend(bundles);
            left
        };
        wait_until("nothing is left", || left().is_empty());
    }

    /// Processes of the programs that were installed here.
    fn processes(&self) -> Vec<u32> {
        let bin = self.folder.join("bin");
        let all = entries(Path::new("/proc")).into_iter();
        let all = all.filter_map(|path| path.file_name()?.to_str()?.parse::<u32>().ok());
        let is_ours = |pid: &u32| {
            let program = fs::read_link(format!("/proc/{pid}/exe"));
            program.is_ok_and(|program| program.starts_with(&bin))
        };
        all.filter(is_ours).collect()
    }

    fn bundle_that_cannot_be_honoured_is_refused_by_name(&self) {
        self.write_bundle(|config| {
            config["hooks"] = json!({ "startContainer": [{ "path": "/bin/true" }] });
        });
        let mut srun = self.command("srun", "refused");
        let output = srun.args(["sh", "-c", "echo inside"]).output().unwrap();
        let all = text_of(&output);
        assert_eq!(output.status.code(), Some(125), "{all}");
        assert!(all.contains("hooks.startContainer"), "{all}");
        self.has_ended("refused", "FAILED", "125:0");
        self.write_bundle(|_| {});
    }

    fn step_has_its_output_environment_and_exit_code(&self) {
        let script = "echo $TWICE $SLURM_JOB_NAME; env | grep -c TWICE; echo apart >&2; exit 3";
        let mut srun = self.command("srun", "step");
        let output = srun.args(["sh", "-c", script]).output().unwrap();
        let all = text_of(&output);
        assert_eq!(output.status.code(), Some(3), "{all}");
        assert_eq!(output.stdout, b"job step\n1\n", "{all}");
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(stderr.lines().any(|line| line == "apart"), "{all}");
        self.has_ended("step", "FAILED", "3:0");
    }

    fn batch_script_runs_in_the_container(&self) {
        let script = self.cluster.path("script.sh");
        fs::write(
            &script,
            "#!/bin/sh\necho \"from $0\"\necho apart >&2\nexit 5\n",
        )
        .unwrap();
        let job = self.cluster.path("batch.out");
        let mut sbatch = self.command("sbatch", "batch");
        sbatch.args(["--wait", "--output"]).arg(&job).arg(script);
        let output = sbatch.output().unwrap();
        let said = fs::read_to_string(&job).unwrap();
        let all = format!("{}{said}", text_of(&output));
        assert_eq!(output.status.code(), Some(5), "{all}");
        assert_eq!(said, "from /tmp/slurm/startup\napart\n");
        self.has_ended("batch", "FAILED", "5:0");
    }

    /// A step whose container has said that it is there.
    fn started(&self, name: &str) -> Running {
        let mut srun = self.command("srun", name);
        srun.args(["sh", "-c", "echo ready; exec sleep 100000"]);
        let mut srun = Running(srun.stdout(Stdio::piped()).spawn().unwrap());
        let mut output = Vec::new();
        let stdout = srun.0.stdout.as_mut().unwrap();
        while !output.ends_with(b"ready\n") {
            let mut byte = [0];
            assert_ne!(stdout.read(&mut byte).unwrap(), 0, "{output:?}");
            output.extend(byte);
        }
        assert_eq!(entries(&self.folder.join("state-root")).len(), 1);
        srun
    }

    fn cancelled_step_ends_its_microvm(&self) {
        let mut srun = self.started("cancelled");
        self.cluster.ask("scancel", &["--name", "cancelled"]);
        assert!(!srun.0.wait().unwrap().success());
        let (state, _) = self.cluster.end_of("cancelled");
        assert_eq!(state, "CANCELLED");
        self.nothing_is_left();
    }

    fn microvm_ends_with_slurmstepd(&self) {
        let srun = self.started("killed");
        kill_slurmstepd_of(self.processes());
        wait_until("the end of all processes", || self.processes().is_empty());
        assert!(entries(&self.folder.join("state-root")).is_empty());
        // Slurm has not noticed, and srun would wait for KillWait.
        self.cluster.ask("scancel", &["--name", "killed"]);
        drop(srun);
    }
}

/// With the folder of busybox: the job's PATH is the container's.
fn path() -> String {
    format!("{}:/bin", std::env::var("PATH").unwrap())
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}
