//! Containers of containerd that are microVMs: `mayfly-oci` under the real daemon and its shim, with real guests. As root,
//! with folders and a socket of the test's own.

mod common;

use std::fs;
use std::os::unix::fs::symlink;
use std::process::{Child, Command, Output, Stdio};

use common::{Folder, LINUX_PATIENCE, needs};
use serde_json::json;

/// The daemon, with everything of its own.
struct Containerd {
    folder: Folder,
    daemon: Child,
}

impl Containerd {
    fn new() -> Containerd {
        let folder = Folder::new();
        let linux = common::linux();
        let path = |name: &str| folder.join(name).display().to_string();
        for name in [
            "bin",
            "rootfs/bin",
            "rootfs/dev",
            "rootfs/proc",
            "rootfs/sys",
            "rootfs/tmp",
        ] {
            fs::create_dir_all(folder.join(name)).unwrap();
        }
        for (program, name) in [
            (common::oci(), "mayfly-oci"),
            (common::jailer(), "mayfly-jailer"),
            (common::agent(), "mayfly-agent"),
            (common::mayfly(), "mayfly"),
            ("/bin/busybox".into(), "../rootfs/bin/busybox"),
        ] {
            // By another process: a program that is open for writing here cannot be started by another test.
            let to = path(&format!("bin/{name}"));
            common::run(
                "install",
                &["-m", "755", &program.display().to_string(), &to],
            );
        }
        for applet in ["sh", "echo", "sleep", "id"] {
            symlink("busybox", folder.join("rootfs/bin").join(applet)).unwrap();
        }
        let settings = json!({
            "kernel": linux.kernel,
            "cmdline": linux.cmdline,
            "memory_mib": 128,
            "cache": path("cache"),
            "ready_seconds": LINUX_PATIENCE.as_secs(),
        });
        let settings = folder.file("oci.json", settings.to_string());
        // The shim has no place for options of its runtime.
        let script = format!(
            "#!/bin/sh\nexec {} --config {} \"$@\"\n",
            path("bin/mayfly-oci"),
            settings.display()
        );
        let script = folder.file("script", script);
        common::run(
            "install",
            &[
                "-m",
                "755",
                &script.display().to_string(),
                &path("bin/runtime"),
            ],
        );
        let config = format!(
            "version = 2\nroot = \"{0}/root\"\nstate = \"{0}/state\"\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
             [grpc]\naddress = \"{0}/sock\"\n[ttrpc]\naddress = \"{0}/sock.ttrpc\"\n\
             [plugins.\"io.containerd.internal.v1.opt\"]\npath = \"{0}/opt\"\n",
            folder.path().display()
        );
        let config = folder.file("config.toml", config);
        let log = fs::File::create(folder.join("log")).unwrap();
        let mut daemon = Command::new("containerd");
        daemon
            .arg("-c")
            .arg(config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        let daemon = daemon.spawn().unwrap();
        let containerd = Containerd { folder, daemon };
        common::wait_until("containerd answers", || {
            containerd
                .ctr(&["version"])
                .output()
                .unwrap()
                .status
                .success()
        });
        containerd
    }

    fn ctr(&self, words: &[&str]) -> Command {
        let mut command = Command::new("ctr");
        command.arg("-a").arg(self.folder.join("sock")).args(words);
        // In the host's groups one name may be used by one container at a time.
        command.stdin(Stdio::null());
        command
    }

    fn run(&self, words: &[&str]) -> Output {
        let output = self.ctr(words).output().unwrap();
        eprintln!("{words:?}: {output:?}");
        output
    }

    /// `ctr run` of a container whose name no other test has.
    fn container(&self, more: &[&str], name: &str, command: &[&str]) -> (String, Output) {
        let id = format!("mf-{}-{name}", std::process::id());
        let runtime = self.folder.join("bin/runtime").display().to_string();
        let root = self.folder.join("rootfs").display().to_string();
        let words = [
            &["run", "--rootfs", "--runc-binary", &runtime],
            more,
            &[&root, &id],
            command,
        ]
        .concat();
        let output = self.run(&words);
        (id, output)
    }

    fn works(&self, words: &[&str]) -> String {
        let output = self.run(words);
        assert!(output.status.success(), "{words:?}");
        String::from_utf8(output.stdout).unwrap()
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

/// Whether a container's groups and state are gone.
fn is_gone(id: &str) -> bool {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let has_group = mounts.lines().any(|line| {
        let words: Vec<&str> = line.split(' ').collect();
        words[2].starts_with("cgroup")
            && std::path::Path::new(words[1])
                .join("default")
                .join(id)
                .exists()
    });
    !has_group
        && !std::path::Path::new("/run/containerd/runc/default")
            .join(id)
            .exists()
}

#[test]
fn containers_of_ctr_have_their_output_code_and_further_processes() {
    needs!(root, kvm, guest, containerd, ctr);
    let containerd = Containerd::new();
    let (id, output) =
        containerd.container(&["--rm"], "once", &["sh", "-c", "echo inside; exit 7"]);
    assert_eq!(
        (output.status.code(), &*output.stdout),
        (Some(7), &b"inside\n"[..])
    );
    assert!(is_gone(&id));

    let (id, output) = containerd.container(&["-d"], "stays", &["sleep", "100000"]);
    assert!(output.status.success());
    let exec = [
        "tasks",
        "exec",
        "--exec-id",
        "e1",
        &id,
        "sh",
        "-c",
        "id -u; exit 3",
    ];
    let output = containerd.run(&exec);
    assert_eq!(
        (output.status.code(), &*output.stdout),
        (Some(3), &b"0\n"[..])
    );
    containerd.works(&["tasks", "kill", "-s", "TERM", &id]);
    common::wait_until("it has stopped", || {
        containerd.works(&["tasks", "ls"]).contains("STOPPED")
    });
    let output = containerd.run(&["tasks", "rm", &id]);
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("143"),
        "its code"
    );
    containerd.works(&["containers", "rm", &id]);
    assert!(is_gone(&id));
}

#[test]
fn errors_reach_the_client_of_containerd() {
    needs!(root, kvm, guest, containerd, ctr);
    let containerd = Containerd::new();
    let shared = format!(
        "type=bind,src={},dst=/x,options=rbind:rw",
        containerd.folder.path().display()
    );
    for (more, expected) in [
        (
            &["--mount", &shared][..],
            "nothing is shared with a microVM",
        ),
        (&["--net-host"], "the network of the host"),
        (
            &["--memory-limit", "1000000"],
            "linux.resources.memory.limit",
        ),
    ] {
        let more = [&["--rm"], more].concat();
        let (id, output) = containerd.container(&more, "refused", &["true"]);
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(
            !output.status.success() && text.contains(expected),
            "{more:?}: {text}"
        );
        assert!(is_gone(&id));
    }
}
