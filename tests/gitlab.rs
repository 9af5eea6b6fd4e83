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
        containers::install_warm_runtime(&folder);
        containers::install(&common::mayfly_image(), &folder.join("bin/mayfly-image"));
        let root = folder.join("images/busybox");
        containers::busybox_root(&root, &["sh", "mkdir", "cat", "hostname"]);
        let linux = common::linux();
        let settings = format!(
            "KERNEL={}\nOPTIONS=(--cmdline '{}' --uid {UID} --gid {UID})\n",
            linux.kernel.display(),
            linux.cmdline,
        );
        Runner::with(folder, &settings)
    }

    /// With a program in the place of `mayfly-jailer`, which appends its words to the file `words`.
    fn of_scripts_alone() -> Runner {
        let folder = Folder::new();
        for name in ["bin", "images", "images/busybox"] {
            fs::create_dir(folder.join(name)).unwrap();
        }
        let jailer = folder.file("jailer", FAKE_JAILER);
        containers::install(&jailer, &folder.join("bin/mayfly-jailer"));
        Runner::with(folder, "KERNEL=/kernel\n")
    }

    fn with(folder: Folder, settings: &str) -> Runner {
        fs::create_dir(folder.join("scripts")).unwrap();
        let scripts = common::root().join(SCRIPTS);
        for name in ["common", "config", "prepare", "run", "cleanup"] {
            containers::install(&scripts.join(name), &folder.join("scripts").join(name));
        }
        let settings = format!(
            "{settings}IMAGES={}\nIMAGE=busybox\nSHELL_OF_JOBS=sh\nSTATE={}\n",
            folder.join("images").display(),
            folder.join("state").display(),
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
        command.env("MAYFLY_JOB", name_of(job));
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
        let pid = fs::read_to_string(self.path("state").join(name_of(job)).join("pid"));
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

/// Says that it is ready and stays, as `run` does; what it does else is in the variables FAKE_...
const FAKE_JAILER: &str = r#"#!/bin/bash
here=$(dirname "$0")/..
echo "$*" >>"$here/words"
case $1 in
run)
  [ -z "${FAKE_MUTE:-}" ] || exit 1
  printf 1 >&3
  exec 3>&-
  while [ ! -e "$here/end" ]; do sleep 0.05; done
  ;;
exec) exit "${FAKE_CODE:-0}" ;;
state)
  # As long as it takes a supervisor whose clients have gone already.
  [ -n "${FAKE_ENDS:-}" ] || exit 0
  [ -e "$here/asked" ] && exit 1
  touch "$here/asked"
  ;;
esac
"#;

/// What `config` might have chosen for a job.
fn name_of(job: u32) -> String {
    format!("7-{job}-{job:016x}")
}

#[test]
fn job_of_gitlab_when_it_has_the_numbers_of_another_has_a_microvm_of_its_own() {
    needs!(bash);
    let runner = Runner::of_scripts_alone();
    let jobs: Vec<String> = (0..2)
        .map(|_| {
            let mut config = runner.command("config", 1, &[]);
            config.env_remove("MAYFLY_JOB");
            let output = runner.call(0, config);
            let config: Value = serde_json::from_slice(&output.stdout).unwrap();
            let name = config["job_env"]["MAYFLY_JOB"].as_str().unwrap().to_owned();
            assert!(name.starts_with("7-1-") && name.len() == 20, "{name}");
            assert_eq!(config["hostname"], format!("gitlab-{name}"));
            name
        })
        .collect();
    assert_ne!(jobs[0], jobs[1]);
    let call = |script: &str, job: &str| {
        let mut command = runner.command(script, 1, &[]);
        command.env("MAYFLY_JOB", job);
        runner.call(0, command);
    };
    call("prepare", &jobs[0]);
    call("prepare", &jobs[1]);
    let pid = |job: &str| {
        let pid = fs::read_to_string(runner.path("state").join(job).join("pid"));
        format!("/proc/{}/cmdline", pid.unwrap().trim())
    };
    let (first, second) = (pid(&jobs[0]), pid(&jobs[1]));
    // Of a process that nobody has waited for yet it is empty.
    let is_running = |cmdline: &str| fs::read(cmdline).is_ok_and(|words| !words.is_empty());
    call("cleanup", &jobs[1]);
    assert!(is_running(&first) && !is_running(&second));
    call("cleanup", &jobs[0]);
    assert!(!is_running(&first));
    assert_eq!(fs::read_dir(runner.path("state")).unwrap().count(), 0);
    // Where `config` failed.
    let mut command = runner.command("cleanup", 1, &[]);
    command.env_remove("MAYFLY_JOB");
    runner.call(0, command);
    for name in ["", "7-1", "../7-1-0000000000000000"] {
        let mut command = runner.command("prepare", 1, &[]);
        command.env("MAYFLY_JOB", name);
        runner.call(SYSTEM_FAILURE, command);
    }
}

#[test]
fn job_of_gitlab_when_its_microvm_cannot_start_fails_at_once() {
    needs!(bash);
    let runner = Runner::of_scripts_alone();
    let mut mute = runner.command("prepare", 1, &[]);
    mute.env("FAKE_MUTE", "1");
    let output = runner.call(SYSTEM_FAILURE, mute);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("the microVM did not start"), "{said}");
    runner.call(0, runner.command("cleanup", 1, &[]));
    // As on a full disk: no byte can be written to a file.
    let prepare = runner.command("prepare", 1, &[]);
    let mut full = Command::new("timeout");
    let limited = r#"ulimit -f 0; exec "$0""#;
    full.args(["60", "bash", "-c", limited])
        .arg(prepare.get_program());
    full.envs(
        prepare
            .get_envs()
            .filter_map(|(name, value)| Some((name, value?))),
    );
    full.stdin(Stdio::null());
    runner.call(SYSTEM_FAILURE, full);
    runner.call(0, runner.command("cleanup", 1, &[]));
    for (timeout, code) in [
        ("0000090", 0),
        ("99999999", SYSTEM_FAILURE),
        ("-1", SYSTEM_FAILURE),
    ] {
        let mut prepare = runner.command("prepare", 1, &[]);
        prepare.env("CUSTOM_ENV_CI_JOB_TIMEOUT", timeout);
        runner.call(code, prepare);
        runner.call(0, runner.command("cleanup", 1, &[]));
    }
    let words = fs::read_to_string(runner.path("words")).unwrap();
    assert!(words.contains(" --timeout 690 "), "{words}");
}

#[test]
fn job_of_gitlab_when_its_microvm_is_just_ending_is_a_failure_of_the_system() {
    needs!(bash);
    let runner = Runner::of_scripts_alone();
    runner.call(0, runner.command("prepare", 1, &[]));
    let words = ["/script", "step_script"];
    for (fake, ends, code) in [
        ("137", false, BUILD_FAILURE),
        ("3", false, BUILD_FAILURE),
        ("137", true, SYSTEM_FAILURE),
    ] {
        let mut run = runner.command("run", 1, &words);
        run.env("FAKE_CODE", fake);
        if ends {
            run.env("FAKE_ENDS", "1");
        }
        runner.call(code, run);
    }
    runner.call(0, runner.command("cleanup", 1, &[]));
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
    let hostname = format!("gitlab-{}\n", name_of(1));
    assert_eq!(String::from_utf8_lossy(&output.stdout), hostname);
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
        is_booting(&runner.path("state").join(name_of(2)))
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
