//! What the tests of `mayfly-jailer run` need besides: copies of the programs that an ordinary user
//! can reach, a way to start them as root or as that user, and a list of everything a run may leave.
#![allow(
    dead_code,
    clippy::allow_attributes,
    reason = "each test file uses a part of it"
)]

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use super::host::{GID, Host, UID, cgroups_named, copy};

/// Who runs the jailer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    Root,
    /// An ordinary user who may open /dev/kvm and /dev/net/tun.
    User,
    /// An ordinary user who may not.
    Stranger,
}

pub const BOTH: [Who; 2] = [Who::Root, Who::User];

/// One test's programs and files.
pub struct Place {
    pub host: Host,
    /// Whether the monitor is the real one.
    pub mayfly: Option<PathBuf>,
}

impl Place {
    /// With the witness in the monitor's place.
    pub fn new(test: &str) -> Place {
        let host = Host::new(test);
        copy(host.jailer_program(), &host.path("mayfly-jailer"));
        fs::write(host.path("kernel"), "no kernel").expect("just made");
        fs::write(host.path("disk"), [0; 4096]).expect("just made");
        for name in ["kernel", "disk"] {
            let mode = fs::Permissions::from_mode(0o666);
            fs::set_permissions(host.path(name), mode).expect("just made");
        }
        let shared = host.path("shared");
        fs::create_dir(&shared).expect("just made");
        fs::set_permissions(&shared, fs::Permissions::from_mode(0o777)).expect("just made");
        Place { host, mayfly: None }
    }

    /// With the real monitor.
    pub fn real(test: &str, mayfly: &Path) -> Place {
        let mut place = Place::new(test);
        copy(mayfly, &place.host.path("mayfly"));
        place.mayfly = Some(place.host.path("mayfly"));
        place
    }

    /// A file in this test's folder.
    pub fn path(&self, name: &str) -> String {
        self.host.path(name).display().to_string()
    }

    /// A file in a folder that every user may write to.
    pub fn shared(&self, name: &str) -> String {
        self.path(&format!("shared/{name}"))
    }

    /// `mayfly-jailer run` of a machine whose command line is `words`, with `more` options.
    pub fn run(&self, who: Who, words: &str, more: &[&str]) -> Command {
        let (kernel, cmdline) = (self.path("kernel"), words.to_owned());
        let machine = ["--kernel", &kernel, "--cmdline", &cmdline];
        self.jailer(who, &[&["run"], &machine[..], more].concat())
    }

    /// The jailer with these words, and what it needs to find the monitor and its user.
    pub fn jailer(&self, who: Who, words: &[&str]) -> Command {
        let mut command = match who {
            Who::Root => Command::new(self.host.path("mayfly-jailer")),
            Who::User | Who::Stranger => self.as_user(who, &self.host.path("mayfly-jailer")),
        };
        command.args(words);
        let monitor = self.mayfly.clone().unwrap_or_else(|| self.host.exec_file());
        command.arg("--mayfly").arg(monitor);
        if who == Who::Root && !words.contains(&"--uid") {
            command.args(["--uid", &UID.to_string(), "--gid", &GID.to_string()]);
        }
        if !words.contains(&"--id") && words.first() == Some(&"run") {
            command.arg("--id").arg(&self.host.name);
        }
        command.stdin(Stdio::null());
        command
    }

    /// A mount namespace in which every user may use the devices, and an ordinary user in it; nothing of
    /// the host's own changes. It becomes `program`, so that the process started is that.
    pub fn as_user(&self, who: Who, program: &Path) -> Command {
        const SCRIPT: &str = r#"
            if [ "$1" = User ]; then
                mount -t tmpfs none "$2" && mknod -m 666 "$2/kvm" c 10 232 &&
                mknod -m 666 "$2/tun" c 10 200 && mount --bind "$2/kvm" /dev/kvm &&
                mount --bind "$2/tun" /dev/net/tun || exit 99
            fi
            uid=$3 gid=$4; shift 4
            exec setpriv --reuid "$uid" --regid "$gid" --clear-groups "$@""#;
        let devices = self.host.path("devices");
        let _ = fs::create_dir(&devices);
        let mut command = Command::new("unshare");
        command.args([
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-c",
            SCRIPT,
            "sh",
        ]);
        command.arg(format!("{who:?}")).arg(devices);
        command.args([UID.to_string(), GID.to_string()]);
        command.arg(program);
        command
    }

    /// Runs to the end, checks the exit code, and that nothing is left.
    pub fn ends(&self, mut command: Command, code: i32) -> Ended {
        let output = command.output().expect("the jailer starts");
        let ended = Ended::of(&output);
        assert_eq!(output.status.code(), Some(code), "{command:?}: {ended:?}");
        self.nothing_is_left();
        ended
    }

    /// Runs a jailer that has to refuse, in one line.
    pub fn refuses(&self, command: Command, expected: &str) -> String {
        let ended = self.ends(command, 1);
        assert!(
            ended.err.starts_with("mayfly-jailer: cannot "),
            "{}",
            ended.err
        );
        assert_eq!(ended.err.lines().count(), 1, "{}", ended.err);
        assert!(
            ended.err.contains(expected),
            "expected {expected:?} in: {}",
            ended.err
        );
        ended.err
    }

    /// Waits until no process of this test's programs, no cgroup and no socket is there any more.
    pub fn nothing_is_left(&self) {
        let start = Instant::now();
        loop {
            let left = self.left();
            if left.is_empty() {
                return;
            }
            assert!(
                start.elapsed() < Duration::from_secs(300),
                "left behind: {left:?}"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Everything of this test's that a run could leave.
    pub fn left(&self) -> Vec<String> {
        let mut left: Vec<String> = self
            .processes()
            .into_iter()
            .map(|pid| {
                let comm = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
                format!("process {pid} {}", comm.trim())
            })
            .collect();
        left.extend(self.host.left());
        let groups = cgroups_named(&format!("mayfly-{}", self.host.name));
        left.extend(groups.iter().map(|path| path.display().to_string()));
        let files = fs::read_dir(self.host.path("shared"))
            .into_iter()
            .flatten()
            .flatten();
        left.extend(files.map(|file| file.path().display().to_string()));
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        left.extend(
            mounts
                .lines()
                .filter(|line| line.contains(&self.host.name))
                .map(str::to_owned),
        );
        left
    }

    /// All processes that run one of this test's programs.
    pub fn processes(&self) -> Vec<u32> {
        let folder = self.host.path("");
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        entries
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .filter(|pid| {
                let exe = fs::read_link(format!("/proc/{pid}/exe"));
                exe.is_ok_and(|exe| exe.starts_with(&folder))
            })
            .collect()
    }
}

/// What a run said.
#[derive(Debug)]
pub struct Ended {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Ended {
    pub fn of(output: &Output) -> Ended {
        Ended {
            code: output.status.code(),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

/// Names of the host's interfaces that runs make.
pub fn cables() -> BTreeSet<String> {
    fs::read_dir("/sys/class/net")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| {
            name.strip_prefix("mf")
                .is_some_and(|rest| rest.parse::<u32>().is_ok())
        })
        .collect()
}

/// One number of a report in JSON, or a word.
pub fn fact(report: &str, name: &str) -> String {
    let key = format!("\"{name}\": ");
    let (_, rest) = report
        .split_once(&key)
        .unwrap_or_else(|| panic!("{name} in {report}"));
    rest.split([',', '\n', '}'])
        .next()
        .unwrap_or_default()
        .trim_matches('"')
        .to_owned()
}

/// `command`, started by a shell that does `before` first.
pub fn inheriting(command: &Command, before: &str) -> Command {
    let mut shell = Command::new("bash");
    shell.args(["-c", &format!("{before} exec \"$0\" \"$@\"")]);
    shell.arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        if let Some(value) = value {
            shell.env(name, value);
        }
    }
    shell.stdin(Stdio::null());
    shell
}

/// `command`, started with this socket as a service manager does (sd_listen_fds(3)): the shell's process id becomes that of
/// the command.
pub fn activated(command: &Command, listener: UnixListener) -> Command {
    let before = "exec 3<&0 0</dev/null; export LISTEN_FDS=1 LISTEN_PID=$$;";
    let mut shell = inheriting(command, before);
    shell.stdin(OwnedFd::from(listener));
    shell
}
