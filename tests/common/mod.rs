//! What integration tests share: the binaries, guests, a client of the API, and the certainty
//! that nothing outlives a test.
#![expect(dead_code, reason = "each test file uses a part of it")]

pub mod containers;
pub mod filters;
mod folder;
pub mod fuse;
pub mod needs;
pub mod sys;

pub use folder::Folder;
pub(crate) use needs::needs;

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

/// How long anything may take before a test gives up. Only there so that a fault does not hang the
/// suite: no test measures time with it, so it is as long as the busiest machine may need.
pub const PATIENCE: Duration = Duration::from_secs(300);
/// The same for a Linux guest on a host that emulates its kernel, which alone takes half a minute.
pub const LINUX_PATIENCE: Duration = Duration::from_secs(1800);

/// The monitor under test: MAYFLY_BIN, else the one cargo built beside this test.
pub fn mayfly() -> PathBuf {
    std::env::var_os("MAYFLY_BIN").map_or_else(|| env!("CARGO_BIN_EXE_mayfly").into(), Into::into)
}

/// The folder of the workspace.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// For tests that do not use [`needs!`] yet.
pub fn kvm(test: &str) -> bool {
    needs::are_met(test, &["kvm"])
}

/// For tests that do not use [`needs!`] yet.
pub fn needs_root(test: &str) -> bool {
    needs::are_met(test, &["root"])
}

/// The bare-metal probe guest: MAYFLY_PROBE, else the one `tools/test` built.
pub fn probe() -> PathBuf {
    built("MAYFLY_PROBE", "probe")
}

/// The guest whose first instruction writes a byte.
pub fn firstbyte() -> PathBuf {
    built("MAYFLY_FIRSTBYTE", "firstbyte")
}

/// The agent of guests that run a command: MAYFLY_AGENT, else the one `tools/test` built.
pub fn agent() -> PathBuf {
    built("MAYFLY_AGENT", "mayfly-agent")
}

/// The program that makes disks of folders, archives and container images: MAYFLY_IMAGE_BIN, else the one
/// `tools/test` built.
pub fn mayfly_image() -> PathBuf {
    built("MAYFLY_IMAGE_BIN", "mayfly-image")
}

/// The command line of an OCI runtime: MAYFLY_OCI_BIN, else the one `tools/test` built.
pub fn oci() -> PathBuf {
    built("MAYFLY_OCI_BIN", "mayfly-oci")
}

/// The jailer under test: MAYFLY_JAILER_BIN, else the one beside the monitor.
pub fn jailer() -> PathBuf {
    let path = std::env::var_os("MAYFLY_JAILER_BIN")
        .map_or_else(|| mayfly().with_file_name("mayfly-jailer"), Into::into);
    assert!(
        path.exists(),
        "{} is missing: build it with `cargo build -p mayfly-jailer`",
        path.display()
    );
    path
}

/// The program that a variable names, else the release build of this tree, whose folder is beside that of any build.
pub fn built(variable: &str, name: &str) -> PathBuf {
    if let Some(path) = std::env::var_os(variable) {
        return path.into();
    }
    let builds = Path::new(env!("CARGO_BIN_EXE_mayfly")).ancestors().nth(2);
    let builds = builds.expect("it is in the folder of a build");
    let path = builds.join("release").join(name);
    assert!(
        path.exists(),
        "{} is missing: build it with `cargo build --release -p {}`",
        path.display(),
        match name {
            "firstbyte" => "probe",
            "mayfly-image" => "mayfly-images",
            "mayfly-soak" => "mayfly-measure",
            _ => name,
        }
    );
    path
}

/// A Linux guest as `tools/guest` makes it.
pub struct Linux {
    pub kernel: PathBuf,
    pub disk: PathBuf,
    pub initrd: PathBuf,
    pub cmdline: String,
}

/// The Linux guest; `tools/guest` must have run. What the calling thread starts from now on comes
/// before other processes: where the guest's kernel is emulated, one that gets a fraction of a
/// processor spends all of it on its timer interrupts, and never boots.
pub fn linux() -> Linux {
    sys::prefer_what_is_started();
    let folder = needs::guest_folder();
    let cmdline = folder.join("cmdline");
    let cmdline = fs::read_to_string(&cmdline)
        .unwrap_or_else(|e| panic!("{}: {e}: run `tools/guest` first", cmdline.display()));
    Linux {
        kernel: folder.join("vmlinux"),
        disk: folder.join("rootfs.ext4"),
        initrd: folder.join("initramfs.cpio"),
        cmdline: cmdline.trim().to_owned(),
    }
}

/// The Linux guest whose kernel relies on ACPI, as those of distributions do: `tools/guest --with stock-like`. Its
/// drivers of disks and networks are modules, which [`Linux::initrd`] does not have, and [`module_initrd`] loads.
pub fn linux_with_acpi() -> Linux {
    let linux = linux();
    let file = |name: &str| linux.kernel.with_file_name("stock-like").join(name);
    let cmdline = fs::read_to_string(file("cmdline"))
        .unwrap_or_else(|e| panic!("{e}: run `tools/guest --with stock-like` first"));
    Linux {
        kernel: file("vmlinux"),
        cmdline: cmdline.trim().to_owned(),
        ..linux
    }
}

/// The initramfs that loads the modules of a kernel of [`linux_with_acpi`], and goes on in the root.
pub fn module_initrd(linux: &Linux) -> PathBuf {
    linux.kernel.with_file_name("initramfs.cpio")
}

impl Folder {
    /// A file of `len` bytes, all zero.
    pub fn disk(&self, name: &str, len: u64) -> PathBuf {
        let path = self.join(name);
        File::create(&path).unwrap().set_len(len).unwrap();
        path
    }

    /// Content of a file, as text; empty when it is not there.
    pub fn read(&self, name: &str) -> String {
        fs::read(self.join(name)).map_or_else(
            |_| String::new(),
            |bytes| String::from_utf8_lossy(&bytes).into_owned(),
        )
    }

    /// A file with this content.
    pub fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.join(name);
        fs::write(&path, content).unwrap();
        path
    }
}

#[derive(Default)]
struct Output {
    bytes: Mutex<Vec<u8>>,
    more: Condvar,
    /// The end that is read, for asking whether all was.
    pipe: Option<OwnedFd>,
}

/// A running monitor. Killed, by its own id, when dropped.
pub struct Monitor {
    pub child: Child,
    stdin: Option<ChildStdin>,
    stdout: Arc<Output>,
    stderr: Arc<Output>,
}

impl Monitor {
    /// Starts the monitor with `args`; its standard streams are ours.
    pub fn start<S: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = S>) -> Self {
        let mut command = Command::new(mayfly());
        command.args(args);
        Monitor::spawn(command)
    }

    /// Starts `command`, which is or becomes a monitor.
    pub fn spawn(mut command: Command) -> Self {
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        Monitor::spawn_as_is(command)
    }

    /// The same with the standard streams that `command` says; those that are pipes are ours.
    pub fn spawn_as_is(mut command: Command) -> Self {
        sys::die_with_us(&mut command);
        sys::heed_the_user();
        let mut child = command
            .spawn()
            .unwrap_or_else(|e| panic!("{command:?}: {e}"));
        Monitor {
            stdin: child.stdin.take(),
            stdout: child.stdout.take().map(collect).unwrap_or_default(),
            stderr: child.stderr.take().map(collect).unwrap_or_default(),
            child,
        }
    }

    /// Starts a guest from a configuration, without the API.
    pub fn boot(folder: &Folder, config: &serde_json::Value) -> Self {
        Monitor::boot_with(folder, config, &[])
    }

    /// The same with more arguments. The log goes to the file `log` of the folder, so that
    /// standard output is the guest's alone.
    pub fn boot_with(folder: &Folder, config: &serde_json::Value, more: &[&str]) -> Self {
        let mut command = Command::new(mayfly());
        command.args(boot_args(folder, config)).args(more);
        Monitor::spawn(command)
    }

    /// Starts a guest from a configuration, with the API at the socket `api` of the folder.
    pub fn boot_with_api(folder: &Folder, config: &serde_json::Value) -> (Self, Api) {
        let mut command = Command::new(mayfly());
        command.args(api_args(folder, config));
        let monitor = Monitor::spawn(command);
        (monitor, Api::at(folder.join("api")))
    }

    /// The same inside of a network namespace.
    pub fn boot_inside(netns: &Netns, folder: &Folder, config: &serde_json::Value) -> (Self, Api) {
        let mut command = netns.command(mayfly());
        command.args(api_args(folder, config));
        let monitor = Monitor::spawn(command);
        (monitor, Api::at(folder.join("api")))
    }

    /// A monitor that waits to be configured.
    pub fn unconfigured(folder: &Folder) -> (Self, Api) {
        let socket = folder.join("api");
        let mut command = Command::new(mayfly());
        command.arg("--api-sock").arg(&socket);
        command.arg("--log-path").arg(folder.join("log"));
        let monitor = Monitor::spawn(command);
        (monitor, Api::at(socket))
    }

    /// All of standard output so far.
    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&self.stdout.bytes.lock().unwrap()).into_owned()
    }

    /// All of standard error so far.
    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.stderr.bytes.lock().unwrap()).into_owned()
    }

    /// Waits for `text` on standard output; what was there by then.
    pub fn expect(&self, text: &str) -> String {
        self.expect_within(text, PATIENCE)
    }

    pub fn expect_within(&self, text: &str, patience: Duration) -> String {
        self.wait_for(text, patience).unwrap_or_else(|output| {
            panic!(
                "`{text}` did not appear. Output:\n{output}\nErrors:\n{}",
                self.stderr()
            )
        })
    }

    /// Waits until `text` was written; what was written is the error once `patience` is over, or
    /// once the monitor has ended and nothing more comes.
    pub fn wait_for(&self, text: &str, patience: Duration) -> Result<String, String> {
        let deadline = Instant::now() + patience;
        loop {
            // The reader's own reference is gone when it has read all there is.
            let is_all = Arc::strong_count(&self.stdout) == 1;
            let bytes = self.stdout.bytes.lock().unwrap();
            let seen = String::from_utf8_lossy(&bytes).into_owned();
            if seen.contains(text) {
                return Ok(seen);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if is_all || left.is_zero() {
                return Err(seen);
            }
            let step = left.min(Duration::from_secs(1));
            drop(self.stdout.more.wait_timeout(bytes, step).unwrap());
        }
    }

    /// Types on the console.
    pub fn type_in(&mut self, text: &str) {
        let stdin = self.stdin.as_mut().unwrap();
        stdin.write_all(text.as_bytes()).unwrap();
        stdin.flush().unwrap();
    }

    /// Closes standard input.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the process to end.
    pub fn wait(&mut self) -> ExitStatus {
        self.wait_within(PATIENCE)
    }

    pub fn wait_within(&mut self, patience: Duration) -> ExitStatus {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                // What it wrote last is still on its way through the pipes.
                self.stdout.settle();
                self.stderr.settle();
                return status;
            }
            assert!(
                Instant::now() < deadline,
                "the monitor does not end. Output:\n{}\nErrors:\n{}",
                self.stdout(),
                self.stderr()
            );
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits for the end and checks the exit code.
    pub fn exits_with(&mut self, code: i32) {
        let status = self.wait();
        assert_eq!(
            status.code(),
            Some(code),
            "{status}. Output:\n{}\nErrors:\n{}",
            self.stdout(),
            self.stderr()
        );
    }

    /// The id of the thread whose name begins with `name`.
    pub fn thread(&self, name: &str) -> i32 {
        let deadline = Instant::now() + PATIENCE;
        loop {
            // A thread names itself once it runs.
            let threads = self.threads();
            if let Some((id, _)) = threads.iter().find(|(_, known)| known.starts_with(name)) {
                return *id;
            }
            assert!(
                Instant::now() < deadline,
                "no thread {name} among {threads:?}"
            );
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// State, and nanoseconds on a processor, of a thread.
    fn run_time(&self, id: i32) -> (char, u64) {
        let folder = format!("/proc/{}/task/{id}", self.pid());
        let stat = fs::read_to_string(format!("{folder}/stat")).unwrap();
        let schedstat = fs::read_to_string(format!("{folder}/schedstat")).unwrap();
        // The name may hold anything; what follows its closing parenthesis is the state.
        let state = stat.rsplit(") ").next().unwrap().chars().next().unwrap();
        let nanos = schedstat.split(' ').next().unwrap().parse().unwrap();
        (state, nanos)
    }

    /// Waits until the thread whose name begins with `name` sleeps: a while in which it uses no
    /// processor at all. One that spins never does.
    pub fn comes_to_rest(&self, name: &str) {
        let id = self.thread(name);
        let deadline = Instant::now() + PATIENCE;
        loop {
            let before = self.run_time(id);
            thread::sleep(Duration::from_millis(20));
            let after = self.run_time(id);
            if before == after && after.0 == 'S' {
                return;
            }
            assert!(Instant::now() < deadline, "thread {name} never sleeps");
        }
    }

    /// Whether the vCPU thread `index` waits for a message: it sleeps, and not in KVM_RUN, where a
    /// guest that waits for an interrupt sleeps too.
    pub fn is_vcpu_stopped(&self, index: usize) -> bool {
        let id = self.thread(&format!("fc_vcpu {index}"));
        // The number of the system call that it is in, or "running".
        let call = fs::read_to_string(format!("/proc/{}/task/{id}/syscall", self.pid())).unwrap();
        let call = call.split_whitespace().next().unwrap();
        self.run_time(id).0 == 'S' && call != libc::SYS_ioctl.to_string() && call != "running"
    }

    /// That the paused guest with `vcpus` vCPUs does not run while the API is used for a while;
    /// what it wrote on the console until then.
    pub fn stays_paused(&self, api: &Api, vcpus: usize) -> String {
        // The answer to a pause may come before the last vCPU thread is back at its inbox.
        wait_until("the vCPUs are stopped", || {
            (0..vcpus).all(|index| self.is_vcpu_stopped(index))
        });
        // What it printed before is on its way to us.
        self.comes_to_rest("serial");
        let output = self.settled_stdout();
        for _ in 0..50 {
            assert_eq!(api.get("/")["state"], "Paused");
            assert!((0..vcpus).all(|index| self.is_vcpu_stopped(index)));
        }
        assert_eq!(self.settled_stdout(), output, "a paused guest writes");
        output
    }

    /// All that was written on standard output so far, what is still in the pipe included.
    fn settled_stdout(&self) -> String {
        let mut output = String::new();
        wait_until("the pipe is read", || {
            // Bytes are in the pipe or, once this lock is free, noted.
            let bytes = self.stdout.bytes.lock().unwrap();
            output = String::from_utf8_lossy(&bytes).into_owned();
            self.stdout
                .pipe
                .as_ref()
                .is_none_or(|pipe| sys::waiting_in(pipe) == 0)
        });
        output
    }

    /// KiB of memory that are the monitor's alone and not the guest's: its heap, its stacks, its
    /// variables. Guest memory shows as anonymous mappings of a MiB and more.
    pub fn own_kib(&self) -> u64 {
        let smaps = fs::read_to_string(format!("/proc/{}/smaps", self.pid())).unwrap();
        let (mut own, mut counts, mut anonymous) = (0, false, false);
        for line in smaps.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            let kib = || words[1].parse::<u64>().unwrap();
            match words[0] {
                "Size:" => counts |= anonymous && kib() < 1024,
                "Private_Dirty:" if counts => own += kib(),
                word if !word.ends_with(':') => {
                    let name = words.get(5).copied().unwrap_or_default();
                    anonymous = name.is_empty();
                    counts = ["[heap]", "[stack]"].contains(&name) || name.ends_with("/mayfly");
                }
                _ => {}
            }
        }
        own
    }

    /// Names of its threads, by thread id.
    pub fn threads(&self) -> Vec<(i32, String)> {
        let folder = format!("/proc/{}/task", self.pid());
        let mut threads: Vec<_> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| {
                let path = entry.unwrap().path();
                let id = path.file_name().unwrap().to_str().unwrap().parse().unwrap();
                let name = fs::read_to_string(path.join("comm")).unwrap_or_default();
                (id, name.trim_end().to_owned())
            })
            .collect();
        threads.sort();
        threads
    }
}

/// What a monitor left behind.
pub struct Ended {
    pub code: Option<i32>,
    /// What `--end-fd` was told.
    pub report: String,
    pub log: String,
    pub output: String,
}

/// Runs the monitor with `more` arguments to the end of its guest.
pub fn end_of(config: &serde_json::Value, more: &[&str], patience: Duration) -> Ended {
    let folder = Folder::new();
    let end = folder.file("end", "");
    let mut command = Command::new("/bin/sh");
    command
        .args(["-c", "exec \"$@\" 9>>\"$0\""])
        .arg(&end)
        .arg(mayfly())
        .args(boot_args(&folder, config))
        .args(["--end-fd", "9"])
        .args(more);
    let mut monitor = Monitor::spawn(command);
    Ended {
        code: monitor.wait_within(patience).code(),
        report: folder.read("end"),
        log: folder.read("log"),
        output: monitor.stdout(),
    }
}

/// Whether KVM of this host emulates the guest's kernel.
pub fn is_software_kvm() -> bool {
    Path::new("/sys/module/kvm_pvm").exists()
}

/// Runs `test` on a thread of its own; with an `errno`, as on a host that answers io_uring_setup with that.
pub fn with_io_uring_answering(errno: Option<i32>, test: impl FnOnce() + Send + 'static) {
    let own = thread::spawn(move || {
        if let Some(errno) = errno {
            sys::forbid_io_uring(errno);
        }
        test();
    });
    own.join().unwrap_or_else(|e| std::panic::resume_unwind(e));
}

/// Waits for something to become true.
pub fn wait_until(what: &str, is_so: impl FnMut() -> bool) {
    wait_until_within(PATIENCE, what, is_so);
}

pub fn wait_until_within(patience: Duration, what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + patience;
    while !is_so() {
        assert!(Instant::now() < deadline, "in vain: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// The command line that starts a guest from a configuration and makes no socket.
pub fn boot_args(folder: &Folder, config: &serde_json::Value) -> Vec<PathBuf> {
    let file = folder.file("vm.json", config.to_string());
    let log = folder.join("log");
    vec![
        "--no-api".into(),
        "--config-file".into(),
        file,
        "--log-path".into(),
        log,
    ]
}

/// The same with a socket, `api` of the folder.
fn api_args(folder: &Folder, config: &serde_json::Value) -> Vec<PathBuf> {
    let mut args = boot_args(folder, config);
    args.splice(0..1, ["--api-sock".into(), folder.join("api")]);
    args
}

/// A machine whose guest is the probe, doing `words`.
pub fn probe_vm(words: &str) -> serde_json::Value {
    serde_json::json!({
        "boot-source": {"kernel_image_path": probe(), "boot_args": format!("probe={words}")},
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 32},
        "drives": [],
    })
}

/// A machine whose guest is the probe, doing `words`, with these disks, none of them the root.
pub fn probe_vm_with_disks(words: &str, disks: &[&Path]) -> serde_json::Value {
    let mut config = probe_vm(words);
    let drives = disks.iter().enumerate().map(|(n, disk)| {
        serde_json::json!({
            "drive_id": format!("disk{n}"),
            "path_on_host": disk,
            "is_root_device": false,
        })
    });
    config["drives"] = drives.collect();
    config
}

impl Drop for Monitor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Output {
    /// Waits until the pipe has been read to its end (marked by the reader's own reference gone).
    fn settle(self: &Arc<Self>) {
        // Longer only where a process that was left behind holds the other end.
        let deadline = Instant::now() + Duration::from_secs(30);
        while Arc::strong_count(self) > 1 && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

fn collect(mut pipe: impl Read + AsFd + AsRawFd + Send + 'static) -> Arc<Output> {
    let output = Arc::new(Output {
        pipe: Some(pipe.as_fd().try_clone_to_owned().unwrap()),
        ..Output::default()
    });
    let ours = Arc::clone(&output);
    thread::spawn(move || {
        let mut bytes = [0; 4096];
        loop {
            sys::await_bytes(&pipe);
            // Read and noted under one lock: see `settled_stdout`.
            let mut noted = ours.bytes.lock().unwrap();
            let Ok(n @ 1..) = pipe.read(&mut bytes) else {
                return;
            };
            noted.extend_from_slice(&bytes[..n]);
            ours.more.notify_all();
        }
    });
    output
}

/// A client of the API: one connection a request, as curl makes them.
pub struct Api(pub PathBuf);

impl Api {
    /// Waits until the socket at `path` accepts clients.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        let deadline = Instant::now() + PATIENCE;
        while UnixStream::connect(&path).is_err() {
            assert!(
                Instant::now() < deadline,
                "{} accepts no client",
                path.display()
            );
            thread::sleep(Duration::from_millis(1));
        }
        Api(path)
    }

    /// Status and body.
    pub fn request(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        let mut stream = UnixStream::connect(&self.0).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let length = if body.is_empty() {
            String::new()
        } else {
            format!(
                "Content-Type: application/json\r\nContent-Length: {}\r\n",
                body.len()
            )
        };
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\n{length}\r\n{body}"
        )
        .unwrap();
        read_response(&mut stream)
    }

    /// The same with descriptors that come with the first byte.
    pub fn request_with(
        &self,
        method: &str,
        path: &str,
        body: &str,
        fds: &[BorrowedFd<'_>],
    ) -> (u16, String) {
        let length = if body.is_empty() {
            String::new()
        } else {
            format!("Content-Length: {}\r\n", body.len())
        };
        let request = format!("{method} {path} HTTP/1.1\r\n{length}\r\n{body}");
        read_response(&mut self.send_with(request.as_bytes(), fds))
    }

    /// A new connection by which these bytes and descriptors were sent, in one message.
    pub fn send_with(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> UnixStream {
        let stream = UnixStream::connect(&self.0).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        sys::send_with(&stream, bytes, fds);
        stream
    }

    /// What comes of `ask`, and how often `GET /` was answered until then: all the time.
    pub fn answers_while<T: Send>(&self, ask: impl FnOnce(&Api) -> T + Send) -> (T, u32) {
        thread::scope(|scope| {
            let asking = scope.spawn(|| ask(self));
            let mut rounds = 0;
            while !asking.is_finished() {
                self.get("/");
                rounds += 1;
                thread::sleep(Duration::from_millis(20));
            }
            let asked = asking.join();
            (
                asked.unwrap_or_else(|e| std::panic::resume_unwind(e)),
                rounds,
            )
        })
    }

    /// A PUT with descriptors that must succeed.
    pub fn put_with(&self, path: &str, body: serde_json::Value, fds: &[BorrowedFd<'_>]) {
        let (status, answer) = self.request_with("PUT", path, &body.to_string(), fds);
        assert_eq!(status, 204, "PUT {path} {body}: {answer}");
    }

    /// A PATCH with descriptors that must succeed.
    pub fn patch_with(&self, path: &str, body: serde_json::Value, fds: &[BorrowedFd<'_>]) {
        let (status, answer) = self.request_with("PATCH", path, &body.to_string(), fds);
        assert_eq!(status, 204, "PATCH {path} {body}: {answer}");
    }

    pub fn get(&self, path: &str) -> serde_json::Value {
        let (status, body) = self.request("GET", path, "");
        assert_eq!(status, 200, "GET {path}: {body}");
        serde_json::from_str(&body).unwrap()
    }

    /// A PUT that must succeed.
    pub fn put(&self, path: &str, body: serde_json::Value) {
        let (status, answer) = self.request("PUT", path, &body.to_string());
        assert_eq!(status, 204, "PUT {path} {body}: {answer}");
    }

    /// A PATCH that must succeed.
    pub fn patch(&self, path: &str, body: serde_json::Value) {
        let (status, answer) = self.request("PATCH", path, &body.to_string());
        assert_eq!(status, 204, "PATCH {path} {body}: {answer}");
    }

    /// A request that must be refused; the message.
    pub fn refused(&self, method: &str, path: &str, body: serde_json::Value) -> String {
        let (status, answer) = self.request(method, path, &body.to_string());
        assert_eq!(status, 400, "{method} {path} {body}: {answer}");
        let answer: serde_json::Value = serde_json::from_str(&answer).unwrap();
        answer["fault_message"].as_str().unwrap().to_owned()
    }
}

/// Reads one response: status and body.
pub fn read_response(stream: &mut UnixStream) -> (u16, String) {
    let mut bytes = Vec::new();
    let mut byte = [0];
    while !bytes.ends_with(b"\r\n\r\n") {
        let n = match stream.read(&mut byte) {
            // A read with a time limit is not begun again after a stop and a continue.
            Err(e) if e.kind() == ErrorKind::Interrupted => continue,
            n => n.unwrap(),
        };
        assert!(n > 0, "closed after {:?}", String::from_utf8_lossy(&bytes));
        bytes.push(byte[0]);
    }
    let head = String::from_utf8(bytes).unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let length = head
        .lines()
        .find_map(|line| {
            let (name, value) = line.split_once(':')?;
            name.eq_ignore_ascii_case("content-length")
                .then(|| value.trim().parse().unwrap())
        })
        .unwrap_or(0usize);
    let mut body = vec![0; length];
    stream.read_exact(&mut body).unwrap();
    (status, String::from_utf8(body).unwrap())
}

/// A network namespace that goes away with its test. Named `mf` and the test's process.
pub struct Netns(pub String);

impl Netns {
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("mf{}-{n}", std::process::id());
        sweep_namespaces();
        run("ip", &["netns", "add", &name]);
        run("ip", &["-n", &name, "link", "set", "lo", "up"]);
        Netns(name)
    }

    /// A command to run inside.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.0]).arg(program);
        command
    }

    /// A tap with an address, up.
    pub fn tap(&self, name: &str, address: &str) {
        run(
            "ip",
            &[
                "-n", &self.0, "tuntap", "add", "dev", name, "mode", "tap", "vnet_hdr",
            ],
        );
        run("ip", &["-n", &self.0, "addr", "add", address, "dev", name]);
        run("ip", &["-n", &self.0, "link", "set", name, "up"]);
    }

    /// Does `work` on a thread inside.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let path = Path::new("/run/netns").join(&self.0);
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                sys::enter_netns(&path);
                work()
            });
            inside
                .join()
                .unwrap_or_else(|e| std::panic::resume_unwind(e))
        })
    }

    /// Runs a command inside that must succeed; its output.
    pub fn run(&self, program: &str, args: &[&str]) -> String {
        let output = self.command(program).args(args).output().unwrap();
        assert!(output.status.success(), "{program} {args:?}: {output:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

/// Removes namespaces of test processes that no longer exist.
fn sweep_namespaces() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        for entry in fs::read_dir("/run/netns").into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let Some(pid) = name.strip_prefix("mf").and_then(|r| r.split('-').next()) else {
                continue;
            };
            if pid.parse::<u32>().is_ok() && !Path::new("/proc").join(pid).exists() {
                let _ = Command::new("ip").args(["netns", "del", &name]).status();
            }
        }
    });
}

/// Runs a command to its end, and to that of its outputs. Where that does not come, what it started is
/// killed, as far as that is of its process group.
pub fn output_of(command: Command) -> std::process::Output {
    output_within(PATIENCE, command)
}

pub fn output_within(patience: Duration, mut command: Command) -> std::process::Output {
    command.process_group(0);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command
        .spawn()
        .unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let group = child.id();
    let (tell, ended) = mpsc::channel();
    thread::spawn(move || tell.send(child.wait_with_output()));
    match ended.recv_timeout(patience) {
        Ok(output) => output.unwrap(),
        Err(_) => {
            sys::kill_group(group);
            panic!("{command:?} does not end");
        }
    }
}

/// Runs a command that must succeed.
pub fn run(program: &str, args: &[&str]) {
    let output = Command::new(program)
        .args(args)
        .output()
        .unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(output.status.success(), "{program} {args:?}: {output:?}");
}
