//! A Slurm cluster of three nodes on this machine, without systemd: munged, slurmctld and three slurmd as
//! children of the test, with key, socket, state and logs in its folder. Dropping it ends all of their
//! processes, jobs included, and removes their control groups; the next one does that for a test that was
//! killed.

use std::fs::{self, File};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use rustix::process::{Pid, Signal};

use super::common::sys;
use super::host::{cgroups_named, wait_until};

/// Nodes are `mf` and the test's process id, `n` and a number; slurmd names its control groups
/// `slurm_NODE`.
const MARK: &str = "slurm_mf";
const NODES: usize = 3;
/// How many microVMs a node may run at once.
pub const MICROVMS: usize = 2;

pub struct Cluster {
    folder: PathBuf,
    daemons: Vec<Child>,
}

impl Cluster {
    /// Starts it, with its files in `folder`, which is made.
    pub fn start(folder: PathBuf) -> Cluster {
        remove_leftovers();
        fs::create_dir(&folder).unwrap();
        let mut cluster = Cluster {
            folder,
            daemons: Vec::new(),
        };
        cluster.configure();
        let socket = cluster.path("munge.sock");
        let mut munged = Command::new("munged");
        munged.args(["--force", "--foreground", "--num-threads", "2"]);
        for (option, file) in [
            ("--socket", "munge.sock"),
            ("--key-file", "key"),
            ("--pid-file", "munged.pid"),
            ("--seed-file", "munged.seed"),
            ("--log-file", "munged.own.log"),
        ] {
            munged.arg(option).arg(cluster.path(file));
        }
        cluster.daemon("munged", munged);
        wait_until("the socket of munged", || socket.exists());

        let mut controller = Command::new("slurmctld");
        controller.arg("-D");
        cluster.daemon("slurmctld", controller);
        for node in (1..=NODES).map(node) {
            let mut slurmd = Command::new("slurmd");
            slurmd.args(["-D", "-N", &node]);
            cluster.daemon(&node, slurmd);
        }
        wait_until("three idle nodes", || {
            let nodes = cluster.ask("sinfo", &["-h", "-N", "-o", "%T"]);
            nodes.lines().filter(|state| *state == "idle").count() == NODES
        });
        cluster
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// A program of Slurm's, for this cluster.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("SLURM_CONF", self.path("slurm.conf"));
        command.current_dir(&self.folder).stdin(Stdio::null());
        command
    }

    /// Standard output of a program of Slurm's.
    pub fn ask(&self, program: &str, words: &[&str]) -> String {
        let output = self.command(program).args(words).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// What the controller says of each job with this name, a line each.
    pub fn jobs(&self, name: &str) -> Vec<String> {
        let all = self.ask("scontrol", &["show", "job", "-o"]);
        let name = format!(" JobName={name} ");
        let lines = all.lines().filter(|line| line.contains(&name));
        lines.map(str::to_owned).collect()
    }

    /// Waits until the only job of this name has ended, and says how.
    pub fn end_of(&self, name: &str) -> (String, String) {
        let mut job = String::new();
        wait_until(&format!("the end of job {name}"), || {
            job = self.jobs(name).pop().unwrap_or_default();
            !job.is_empty()
                && !["RUNNING", "PENDING", "COMPLETING"].contains(&field(&job, "JobState"))
        });
        (
            field(&job, "JobState").into(),
            field(&job, "ExitCode").into(),
        )
    }

    /// The job of this name ends in this state and with this code.
    pub fn ends_so(&self, name: &str, state: &str, code: &str) {
        let ended = self.end_of(name);
        assert_eq!(ended, (state.to_owned(), code.to_owned()), "{name}");
    }

    fn configure(&self) {
        let key = self.path("key");
        let mut bytes = [0; 1024];
        std::io::Read::read_exact(&mut File::open("/dev/urandom").unwrap(), &mut bytes).unwrap();
        fs::write(&key, bytes).unwrap();
        fs::set_permissions(&key, fs::Permissions::from_mode(0o400)).unwrap();

        // All are open at once, so that they differ.
        let ports: Vec<TcpListener> = (0..=NODES)
            .map(|_| TcpListener::bind("127.0.0.1:0").unwrap())
            .collect();
        let ports: Vec<u16> = ports
            .iter()
            .map(|port| port.local_addr().unwrap().port())
            .collect();
        let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
        let (host, folder) = (host.trim(), self.folder.display());
        let mut conf = format!(
            "ClusterName=mayfly\nSlurmctldHost={host}(127.0.0.1)\nSlurmctldPort={}\n\
             AuthType=auth/munge\nCredType=cred/munge\nAuthInfo=socket={folder}/munge.sock\n\
             SlurmUser=root\nSlurmdUser=root\nReturnToService=2\nMpiDefault=none\nKillWait=60\n\
             SlurmctldPidFile={folder}/slurmctld.pid\nSlurmdPidFile={folder}/%n.pid\n\
             SlurmdSpoolDir={folder}/spool-%n\nStateSaveLocation={folder}/state\n\
             SlurmctldLogFile={folder}/slurmctld.own.log\nSlurmdLogFile={folder}/%n.own.log\n\
             ProctrackType=proctrack/cgroup\nTaskPlugin=task/cgroup\n\
             SelectType=select/cons_tres\nSelectTypeParameters=CR_Core_Memory\n\
             SlurmdParameters=config_overrides\nGresTypes=microvm\n\
             PartitionName=all Nodes=ALL Default=YES State=UP\n",
            ports[0]
        );
        let mut gres = String::new();
        for (number, port) in ports.iter().enumerate().skip(1) {
            let node = node(number);
            conf += &format!(
                "NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=8 \
                 RealMemory=7000 Gres=microvm:{MICROVMS}\n"
            );
            gres += &format!("NodeName={node} Name=microvm Count={MICROVMS} Flags=CountOnly\n");
        }
        let cgroup = "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\nCgroupMountpoint=/sys/fs/cgroup\n\
                      ConstrainRAMSpace=yes\n";
        for (name, text) in [
            ("slurm.conf", conf.as_str()),
            ("gres.conf", &gres),
            ("cgroup.conf", cgroup),
        ] {
            fs::write(self.path(name), text).unwrap();
        }
        fs::create_dir(self.path("state")).unwrap();
    }

    fn daemon(&mut self, name: &str, mut command: Command) {
        let log = File::create(self.path(&format!("{name}.log"))).unwrap();
        command.env("SLURM_CONF", self.path("slurm.conf"));
        command.current_dir(&self.folder).stdin(Stdio::null());
        command.stdout(log.try_clone().unwrap()).stderr(log);
        sys::die_with_us(&mut command);
        let child = command.spawn();
        self.daemons
            .push(child.unwrap_or_else(|error| panic!("{name}: {error}")));
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for daemon in [
                "slurmctld.own.log".to_owned(),
                format!("{}.own.log", node(1)),
            ] {
                let log = fs::read_to_string(self.path(&daemon)).unwrap_or_default();
                let lines: Vec<&str> = log.lines().collect();
                let tail = &lines[lines.len().saturating_sub(20)..];
                eprintln!("{daemon}:\n{}", tail.join("\n"));
            }
        }
        for daemon in &mut self.daemons {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
        remove(&groups(std::process::id()), &self.folder);
    }
}

/// `srun`, which is ended if the test fails.
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Kills the slurmstepd that started one of these processes.
pub fn kill_slurmstepd_of(processes: Vec<u32>) {
    let mut starters = processes.into_iter().map(parent);
    let step = starters.find(|pid| {
        let comm = fs::read_to_string(format!("/proc/{pid}/comm"));
        comm.is_ok_and(|comm| comm.trim() == "slurmstepd")
    });
    let step = Pid::from_raw(step.expect("it started one of them").cast_signed());
    rustix::process::kill_process(step.unwrap(), Signal::KILL).unwrap();
}

fn parent(pid: u32) -> u32 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("PPid:"));
    line.map_or(0, |pid| pid.trim().parse().unwrap())
}

/// What a command said, both streams.
pub fn text_of(output: &Output) -> String {
    let text = [&output.stdout[..], &output.stderr].concat();
    String::from_utf8_lossy(&text).into_owned()
}

/// The name of a node of this test.
fn node(number: usize) -> String {
    format!("mf{}n{number}", std::process::id())
}

/// One value of a line of `scontrol show -o`.
pub fn field<'a>(line: &'a str, name: &str) -> &'a str {
    let mut words = line.split(' ');
    words
        .find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
        .unwrap_or_else(|| panic!("{name} in {line}"))
}

/// The control groups of the test with this process id, the deepest first.
pub fn groups(pid: u32) -> Vec<PathBuf> {
    cgroups_named(&format!("{MARK}{pid}n"))
}

/// Ends the processes in `groups` and those that have a file below `folder` open (the daemons and
/// slurmstepd their logs), and removes the groups.
fn remove(groups: &[PathBuf], folder: &Path) {
    for pid in processes(groups, folder) {
        // It may be gone by now.
        let pid = Pid::from_raw(pid.cast_signed());
        let _ = pid.map(|pid| rustix::process::kill_process(pid, Signal::KILL));
    }
    wait_until("the end of Slurm's processes", || {
        processes(groups, folder).is_empty()
    });
    for group in groups {
        let _ = fs::remove_dir(group);
    }
}

fn processes(groups: &[PathBuf], folder: &Path) -> Vec<u32> {
    let members = groups.iter().flat_map(|group| {
        let text = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
        let pids = text.lines().filter_map(|line| line.parse().ok());
        pids.collect::<Vec<u32>>()
    });
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let all = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let with_files = all.filter(|pid| *pid != std::process::id() && has_file(*pid, folder));
    members.chain(with_files).collect()
}

fn has_file(pid: u32, folder: &Path) -> bool {
    let fds = fs::read_dir(format!("/proc/{pid}/fd"));
    let mut files = fds.into_iter().flatten().flatten();
    files.any(|fd| fs::read_link(fd.path()).is_ok_and(|file| file.starts_with(folder)))
}

/// Removes what a test left that was killed.
fn remove_leftovers() {
    let mut dead: Vec<u32> = cgroups_named(MARK)
        .iter()
        .flat_map(|group| group.components())
        .filter_map(|part| {
            let (pid, _) = part
                .as_os_str()
                .to_str()?
                .strip_prefix(MARK)?
                .split_once('n')?;
            pid.parse().ok()
        })
        .filter(|pid: &u32| !Path::new("/proc").join(pid.to_string()).exists())
        .collect();
    dead.sort_unstable();
    dead.dedup();
    for pid in dead {
        let name = format!("mfjail-{pid}-slurm/slurm");
        remove(&groups(pid), &std::env::temp_dir().join(name));
    }
}
