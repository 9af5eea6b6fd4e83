//! The custom executor for GitLab's runner (docs/examples/gitlab), with a test in the runner's place: it calls the
//! scripts as the runner does, with its variables, in its order, and kills them.

mod common;

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use common::{Folder, containers, needs, wait_until};
use rustix::process::{Pid, Signal};
use serde_json::Value;

const SCRIPTS: &str = "docs/examples/gitlab";
/// What the runner would have a script end with.
const BUILD_FAILURE: i32 = 11;
const SYSTEM_FAILURE: i32 = 12;

/// The user that monitors run as.
const UID: u32 = 64_322;

struct Runner {
    folder: Folder,
}

impl Runner {
    /// The scripts of the document in a folder of the test, with its settings.
    fn new() -> Runner {
        let folder = Folder::new();
        containers::install_runtime(&folder);
        containers::install(&common::mayfly_image(), &folder.join("bin/mayfly-image"));
        let root = folder.join("images/busybox");
        containers::busybox_root(&root, &["sh", "mkdir", "cat", "hostname"]);
        fs::create_dir(folder.join("scripts")).unwrap();
        let scripts = common::root().join(SCRIPTS);
        for name in ["common", "config", "prepare", "run", "cleanup"] {
            containers::install(&scripts.join(name), &folder.join("scripts").join(name));
        }
        let linux = common::linux();
        let settings = format!(
            "KERNEL={}\nIMAGES={}\nIMAGE=busybox\nSHELL_OF_JOBS=sh\nSTATE={}\n\
             OPTIONS=(--cmdline '{}' --uid {UID} --gid {UID})\n",
            linux.kernel.display(),
            folder.join("images").display(),
            folder.join("state").display(),
            linux.cmdline,
        );
        folder.file("scripts/settings", settings);
        Runner { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// A script, as the runner starts it for the job of this number.
    fn command(&self, script: &str, job: u32, words: &[&str]) -> Command {
        let mut command = Command::new(self.path("scripts").join(script));
        let path = std::env::var("PATH").unwrap();
        let programs = self.path("bin").display().to_string();
        command.args(words).stdin(Stdio::null()).process_group(0);
        command.env("PATH", format!("{programs}:{path}"));
        command.env("MAYFLY_IMAGES", self.path("cache"));
        command.env("CUSTOM_ENV_CI_RUNNER_ID", "7");
        command.env("CUSTOM_ENV_CI_JOB_ID", job.to_string());
        command.env("CUSTOM_ENV_CI_JOB_TIMEOUT", "3600");
        command.env("BUILD_FAILURE_EXIT_CODE", BUILD_FAILURE.to_string());
        command.env("SYSTEM_FAILURE_EXIT_CODE", SYSTEM_FAILURE.to_string());
        command.env("BUILD_EXIT_CODE_FILE", self.path("code"));
        command
    }

    fn call(&self, code: i32, mut command: Command) -> Output {
        let output = command.output().unwrap();
        let all = format!("{command:?}: {output:?}");
        assert_eq!(output.status.code(), Some(code), "{all}");
        output
    }

    /// `run` of a stage whose script is this text, which has to end so.
    fn stage(&self, code: i32, stage: &str, text: &str) -> Output {
        let script = self.path("script");
        fs::write(&script, text).unwrap();
        let script = script.display().to_string();
        self.call(code, self.command("run", 1, &[&script, stage]))
    }

    /// The process that stands for a job's microVM.
    fn pid(&self, job: u32) -> Pid {
        let pid = fs::read_to_string(self.path("state").join(format!("7-{job}/pid")));
        Pid::from_raw(pid.unwrap().trim().parse().unwrap()).unwrap()
    }

    /// Processes of the programs that were installed here.
    fn processes(&self) -> Vec<u32> {
        let bin = self.path("bin");
        let all = fs::read_dir("/proc").unwrap().flatten();
        let all = all.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        let is_ours = |pid: &u32| {
            let program = fs::read_link(format!("/proc/{pid}/exe"));
            program.is_ok_and(|program| program.starts_with(&bin))
        };
        all.filter(is_ours).collect()
    }

    fn nothing_is_left(&self, job: u32) {
        self.call(0, self.command("cleanup", job, &[]));
        let left = fs::read_dir(self.path("state")).unwrap().count();
        assert_eq!(left, 0, "folders of jobs");
        wait_until("the end of all processes", || self.processes().is_empty());
        // As the runner does after a failure, too.
        self.call(0, self.command("cleanup", job, &[]));
    }
}

#[test]
fn job_of_gitlab_when_it_runs_in_a_microvm_has_its_stages_codes_and_end() {
    needs!(root, kvm, guest, bash);
    let runner = Runner::new();
    let config = runner.call(0, runner.command("config", 1, &[]));
    let config: Value = serde_json::from_slice(&config.stdout).unwrap();
    assert_eq!(config["builds_dir"], "/builds", "{config}");
    assert_eq!(config["shell"], "sh", "{config}");

    runner.call(0, runner.command("prepare", 1, &[]));
    let text = "#!/bin/sh\nset -e\nmkdir /builds/project\necho kept > /builds/project/file\nhostname\ncat\n";
    let output = runner.stage(0, "prepare_script", text);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "gitlab-7-1\n");
    let text = "cd /builds/project\ncat file\necho apart >&2\nexit 7\n";
    let output = runner.stage(BUILD_FAILURE, "build_script", text);
    assert_eq!(
        (&*output.stdout, &*output.stderr),
        (&b"kept\n"[..], &b"apart\n"[..])
    );
    assert_eq!(fs::read_to_string(runner.path("code")).unwrap(), "7\n");
    fs::remove_file(runner.path("code")).unwrap();
    // One more goes on after a failure: after_script.
    runner.stage(0, "after_script", "cat /builds/project/file\n");

    rustix::process::kill_process(runner.pid(1), Signal::KILL).unwrap();
    let output = runner.stage(SYSTEM_FAILURE, "step_script", "true\n");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("step_script"), "{said}");
    assert!(!runner.path("code").exists(), "no code of a script");
    runner.nothing_is_left(1);
}

#[test]
fn job_of_gitlab_when_prepare_is_killed_leaves_nothing_after_cleanup() {
    needs!(root, kvm, guest, bash);
    let runner = Runner::new();
    for (name, said) in [
        ("../busybox", "\"../busybox\""),
        ("missing", "no image missing"),
    ] {
        let mut prepare = runner.command("prepare", 2, &[]);
        prepare.env("CUSTOM_ENV_CI_JOB_IMAGE", name);
        let output = runner.call(SYSTEM_FAILURE, prepare);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(error.contains(said), "{error}");
    }
    let mut prepare = runner.command("prepare", 2, &[]);
    prepare.stdout(Stdio::null()).stderr(Stdio::null());
    let mut prepare = prepare.spawn().unwrap();
    wait_until("the monitor of the job", || {
        is_booting(&runner.path("state/7-2"))
    });
    let group = Pid::from_child(&prepare);
    rustix::process::kill_process_group(group, Signal::KILL).unwrap();
    prepare.wait().unwrap();
    // It has a session of its own, and goes on.
    assert!(
        Path::new("/proc")
            .join(runner.pid(2).as_raw_nonzero().to_string())
            .exists()
    );
    runner.nothing_is_left(2);
}

/// Whether the microVM's monitor has been started: its socket is there then.
fn is_booting(folder: &Path) -> bool {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names = entries.map(|entry| entry.path());
    names.any(|path| path.extension().is_some_and(|it| it == "sock"))
}
