//! Containers of containerd that are microVMs: `mayfly-oci` under the real daemon and its shim, with real guests. As root,
//! with folders and a socket of the test's own.

mod common;

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use common::{Folder, containers, needs};

/// The daemon, with everything of its own.
struct Containerd {
    folder: Folder,
    daemon: Child,
}

impl Containerd {
    fn new() -> Containerd {
        let folder = Folder::new();
        let root = folder.join("rootfs");
        containers::busybox_root(&root, &["sh", "echo", "sleep", "id"]);
        for name in ["sys", "tmp"] {
            fs::create_dir(root.join(name)).unwrap();
        }
        let settings = containers::install_runtime(&folder);
        containers::install_with_settings(&folder, &settings);
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
    let groups = containers::groups(format!("default/{id}"));
    groups.is_empty() && !Path::new("/run/containerd/runc/default").join(id).exists()
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
