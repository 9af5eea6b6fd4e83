//! Pods as Kubernetes makes them: containerd's CRI, asked as a kubelet asks it, with `mayfly-oci` as the runtime, CNI
//! plug-ins for the network, and real guests. As root, with folders, a socket and namespaces of the test's own.
//!
//! The questions are gRPC by curl, and their few messages are put together here.

mod common;

use std::cell::RefCell;
use std::fs;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use common::{Folder, LINUX_PATIENCE, Netns, containers, needs};
use serde_json::json;

const IMAGE: &str = "docker.io/mf/pod:1";

/// A message of protocol buffers.
#[derive(Clone, Default)]
struct Message(Vec<u8>);

impl Message {
    fn length(&mut self, mut number: u64) {
        while number >= 0x80 {
            self.0.push(number as u8 | 0x80);
            number >>= 7;
        }
        self.0.push(number as u8);
    }

    fn with(mut self, field: u8, bytes: impl AsRef<[u8]>) -> Message {
        self.0.push(field << 3 | 2);
        self.length(bytes.as_ref().len() as u64);
        self.0.extend_from_slice(bytes.as_ref());
        self
    }

    fn with_number(mut self, field: u8, number: u64) -> Message {
        self.0.push(field << 3);
        self.length(number);
        self
    }
}

impl AsRef<[u8]> for Message {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// The first value of a field, as its bytes or its number.
fn field(message: &[u8], wanted: u64) -> Option<(Vec<u8>, u64)> {
    let mut rest = message;
    fn number(rest: &mut &[u8]) -> Option<u64> {
        let mut value = 0;
        for place in 0..10 {
            let (byte, tail) = rest.split_first()?;
            *rest = tail;
            value |= u64::from(byte & 0x7f) << (7 * place);
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }
    while !rest.is_empty() {
        let key = number(&mut rest)?;
        let value = number(&mut rest)?;
        let bytes = match key & 7 {
            0 => Vec::new(),
            2 => {
                let (bytes, tail) = rest.split_at_checked(value as usize)?;
                rest = tail;
                bytes.to_vec()
            }
            other => panic!("wire type {other}"),
        };
        if key >> 3 == wanted {
            return Some((bytes, value));
        }
    }
    None
}

fn text(message: &[u8], wanted: u64) -> String {
    let (bytes, _) = field(message, wanted).unwrap_or_default();
    String::from_utf8(bytes).unwrap()
}

/// containerd with its CRI, and a network that its plug-ins make pods' in.
struct Node {
    folder: Folder,
    netns: Netns,
    daemon: Child,
    /// The pods that are still to be removed.
    pods: RefCell<Vec<String>>,
}

impl Node {
    fn new() -> Node {
        let (folder, netns) = (Folder::new(), Netns::new());
        let settings = containers::install_warm_runtime(&folder);
        let path = |name: &str| folder.join(name).display().to_string();
        containers::install_with_settings(&folder, &settings);
        fs::create_dir(folder.join("cni")).unwrap();
        let network = json!({
            "cniVersion": "0.4.0",
            "name": "mf",
            "plugins": [{
                "type": "bridge", "bridge": "mfpods", "isGateway": true, "ipMasq": false,
                "ipam": {
                    "type": "host-local", "dataDir": path("addresses"),
                    "ranges": [[{ "subnet": "10.99.0.0/24" }]], "routes": [{ "dst": "0.0.0.0/0" }],
                },
            }],
        });
        folder.file("cni/10-mf.conflist", network.to_string());
        let config = format!(
            r#"version = 2
root = "{0}/root"
state = "{0}/state"
[grpc]
address = "{0}/sock"
[ttrpc]
address = "{0}/sock.ttrpc"
[plugins."io.containerd.internal.v1.opt"]
path = "{0}/opt"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{IMAGE}"
disable_apparmor = true
stream_server_port = "0"
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/usr/lib/cni"
conf_dir = "{0}/cni"
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "native"
default_runtime_name = "mayfly"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.mayfly]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.mayfly.options]
BinaryName = "{0}/bin/runtime"
"#,
            folder.path().display()
        );
        let config = folder.file("config.toml", config);
        let log = fs::File::create(folder.join("log")).unwrap();
        // What is mounted there, the network namespaces of pods among it, goes with the daemon.
        let script = "mount -t tmpfs none /run/netns && mkdir -p /run/containerd && \
                      mount -t tmpfs none /run/containerd && exec containerd -c \"$1\"";
        let mut daemon = Command::new("nsenter");
        daemon
            .arg(format!("--net=/run/netns/{}", netns.0))
            .args(["unshare", "--mount", "--propagation", "private"])
            .args(["sh", "-c", script, "sh"])
            .arg(config)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        let daemon = daemon.spawn().unwrap();
        let node = Node {
            folder,
            netns,
            daemon,
            pods: RefCell::default(),
        };
        common::wait_until("containerd's CRI answers", || {
            let status = node.try_asking("RuntimeService/Version", &Message::default());
            status.is_ok_and(|answer| text(&answer, 2) == "containerd")
        });
        node.import_image();
        node
    }

    /// An image with busybox, of which pods' containers and their sandboxes are made.
    fn import_image(&self) {
        let root = self.folder.join("image");
        containers::busybox_root(&root, &["sh", "cat", "ip", "nc", "sleep", "hostname", "ls"]);
        for name in ["etc", "sys", "tmp"] {
            fs::create_dir(root.join(name)).unwrap();
        }
        let path = |name: &str| self.folder.join(name).display().to_string();
        let (layer, image) = (path("layer.tar"), path("image"));
        let owner = ["--numeric-owner", "--owner=0", "--group=0"];
        common::run(
            "tar",
            &[&["-cf", &layer], &owner[..], &["-C", &image, "."]].concat(),
        );
        let sum = Command::new("sha256sum").arg(&layer).output();
        let sum = String::from_utf8(sum.unwrap().stdout).unwrap();
        let config = json!({
            "architecture": "amd64", "os": "linux",
            "config": { "Cmd": ["/bin/sh"], "Env": ["PATH=/bin"] },
            "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{}", &sum[..64])] },
        });
        let manifest =
            json!([{ "Config": "config.json", "RepoTags": [IMAGE], "Layers": ["layer.tar"] }]);
        self.folder.file("config.json", config.to_string());
        self.folder.file("manifest.json", manifest.to_string());
        let (archive, own) = (path("archive.tar"), path(""));
        let files = ["manifest.json", "config.json", "layer.tar"];
        common::run(
            "tar",
            &[&["-cf", &archive, "-C", &own], &files[..]].concat(),
        );
        let mut import = Command::new("ctr");
        import.arg("-a").arg(self.folder.join("sock"));
        import.args([
            "-n",
            "k8s.io",
            "images",
            "import",
            "--snapshotter",
            "native",
        ]);
        let output = import.arg(archive).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let wanted = Message::default().with(1, Message::default().with(1, IMAGE));
        common::wait_until("the CRI knows the image", || {
            let status = self.ask("ImageService/ImageStatus", &wanted);
            field(&status, 1).is_some_and(|(image, _)| !image.is_empty())
        });
    }

    /// The answer, or the error's text.
    fn try_asking(&self, method: &str, request: &Message) -> Result<Vec<u8>, String> {
        let mut body = vec![0];
        body.extend_from_slice(&(request.0.len() as u32).to_be_bytes());
        body.extend_from_slice(&request.0);
        let place = Folder::new();
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--http2-prior-knowledge", "--max-time", "600"]);
        curl.arg("--unix-socket").arg(self.folder.join("sock"));
        curl.args(["-H", "content-type: application/grpc", "-H", "te: trailers"]);
        curl.arg("-D").arg(place.join("headers"));
        curl.args(["--data-binary", "@-"]);
        curl.arg(format!("http://localhost/runtime.v1.{method}"));
        curl.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = curl.spawn().unwrap();
        child.stdin.take().unwrap().write_all(&body).unwrap();
        let output = child.wait_with_output().unwrap();
        let headers = place.read("headers");
        let of = |name: &str| {
            let line = headers.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap_or_default().trim().to_owned()
        };
        match &*of("grpc-status:") {
            "0" => Ok(output.stdout.get(5..).unwrap_or_default().to_vec()),
            _ => Err(of("grpc-message:")),
        }
    }

    fn ask(&self, method: &str, request: &Message) -> Vec<u8> {
        let answer = self.try_asking(method, request);
        answer.unwrap_or_else(|why| panic!("{method}: {why}\n{}", self.folder.read("log")))
    }

    /// Makes a pod: its configuration, id and address.
    fn pod(&self, name: &str) -> (Message, String, String) {
        let metadata = Message::default().with(1, name).with(2, name).with(3, "mf");
        let linux = Message::default().with(1, format!("/mf-pods-{}", std::process::id()));
        let config = Message::default().with(1, metadata).with(2, name);
        let config = config.with(3, self.folder.join("logs").as_os_str().as_encoded_bytes());
        let config = config.with(8, linux);
        let request = Message::default().with(1, &config).with(2, "mayfly");
        let id = text(&self.ask("RuntimeService/RunPodSandbox", &request), 1);
        self.pods.borrow_mut().push(id.clone());
        let status = self.ask(
            "RuntimeService/PodSandboxStatus",
            &Message::default().with(1, &id),
        );
        let (status, _) = field(&status, 1).unwrap();
        let (network, _) = field(&status, 5).unwrap();
        (config, id, text(&network, 1))
    }

    /// Makes and starts a container in a pod; its id.
    fn container(&self, pod: &(Message, String, String), name: &str, script: &str) -> String {
        self.try_container(pod, name, script).unwrap()
    }

    fn try_container(
        &self,
        (config, id, _): &(Message, String, String),
        name: &str,
        script: &str,
    ) -> Result<String, String> {
        let own = Message::default()
            .with(1, Message::default().with(1, name))
            .with(2, Message::default().with(1, IMAGE))
            .with(3, "/bin/sh")
            .with(4, "-c")
            .with(4, script)
            .with(11, name)
            .with(15, Message::default());
        let request = Message::default().with(1, id).with(2, own).with(3, config);
        let answer = self.try_asking("RuntimeService/CreateContainer", &request)?;
        let container = text(&answer, 1);
        let request = Message::default().with(1, &container);
        self.try_asking("RuntimeService/StartContainer", &request)?;
        Ok(container)
    }

    /// The exit code of a container, once it has ended.
    fn code(&self, container: &str) -> u64 {
        const EXITED: u64 = 2;
        let mut code = 0;
        common::wait_until_within(LINUX_PATIENCE, "the container has ended", || {
            let request = Message::default().with(1, container);
            let status = self.ask("RuntimeService/ContainerStatus", &request);
            let (status, _) = field(&status, 1).unwrap();
            code = field(&status, 7).map_or(0, |(_, code)| code);
            field(&status, 3).is_some_and(|(_, state)| state == EXITED)
        });
        code
    }

    /// What a container wrote, as the kubelet reads it: `TIME STREAM F TEXT`.
    fn log_of(&self, name: &str) -> String {
        let log = self.folder.read(&format!("logs/{name}"));
        let lines = log
            .lines()
            .map(|line| line.splitn(4, ' ').skip(1).collect::<Vec<_>>());
        lines.map(|words| words.join(" ") + "\n").collect()
    }

    /// The control groups above pods'.
    fn groups(&self) -> Vec<PathBuf> {
        containers::groups(format!("mf-pods-{}", std::process::id()))
    }

    fn removes(&self, pod: &str) {
        let request = Message::default().with(1, pod);
        self.ask("RuntimeService/StopPodSandbox", &request);
        self.ask("RuntimeService/RemovePodSandbox", &request);
        self.pods.borrow_mut().retain(|it| it != pod);
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Of a test that failed.
        for pod in self.pods.take() {
            let request = Message::default().with(1, pod);
            for method in ["StopPodSandbox", "RemovePodSandbox"] {
                let _ = self.try_asking(&format!("RuntimeService/{method}"), &request);
            }
        }
        for group in self.groups() {
            let _ = fs::remove_dir(group);
        }
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

#[test]
fn pod_has_a_network_that_its_container_gets() {
    needs!(
        root,
        kvm,
        guest,
        containerd,
        ctr,
        curl,
        nsenter,
        unshare,
        tar,
        sha256sum,
        "/usr/lib/cni/bridge"
    );
    let node = Node::new();
    let pod = node.pod("first");
    assert!(pod.2.starts_with("10.99.0."), "{}", pod.2);

    // A first container, as one that prepares something for those that come after it.
    let script = "ip addr show eth0; ip route; cat /etc/hosts; echo apart >&2; exit 7";
    let container = node.container(&pod, "prepares", script);
    assert_eq!(node.code(&container), 7);
    let log = node.log_of("prepares");
    for words in [
        format!("inet {}/24", pod.2),
        "default via 10.99.0.1 dev eth0".into(),
        "stderr F apart".into(),
    ] {
        assert!(log.contains(&words), "{words}: {log}");
    }

    // One that serves, with the same address.
    let script = "hostname; while :; do echo served | nc -l -p 8080; done";
    let container = node.container(&pod, "serves", script);
    let address = pod.2.clone();
    let answer = || {
        let mut nc = node.netns.command("busybox");
        nc.args(["nc", "-w", "5", &address, "8080"])
            .stdin(Stdio::null());
        String::from_utf8(nc.output().unwrap().stdout).unwrap()
    };
    common::wait_until_within(LINUX_PATIENCE, "the pod serves", || answer() == "served\n");
    // It comes another way than the answer.
    common::wait_until("the log has its name", || {
        node.log_of("serves").lines().next() == Some("stdout F first")
    });
    let exec = Message::default()
        .with(1, &container)
        .with(2, "sh")
        .with(2, "-c");
    let exec = exec.with(2, "echo inside; exit 3").with_number(3, 300);
    let answer = node.ask("RuntimeService/ExecSync", &exec);
    assert_eq!(text(&answer, 1), "inside\n");
    assert_eq!(field(&answer, 3).map(|(_, code)| code), Some(3));

    // A second one at the same time has no network left.
    let why = node.try_container(&pod, "second", "true").unwrap_err();
    assert!(why.contains("another microVM has this network"), "{why}");

    let stop = Message::default().with(1, &container).with_number(2, 60);
    node.ask("RuntimeService/StopContainer", &stop);
    assert_eq!(node.code(&container), 143);
    node.removes(&pod.1);
    let left: Vec<_> = node
        .groups()
        .iter()
        .flat_map(|group| fs::read_dir(group).unwrap().flatten())
        .filter(|entry| entry.path().is_dir())
        .collect();
    assert!(left.is_empty(), "{left:?}");
}
