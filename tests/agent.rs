//! Guests that run a command (`mayfly-jailer run --image`), with real binaries and a real Linux guest:
//! streams, exit codes, signals, terminals, further processes, files in and out; and what a hostile agent
//! can do, which the witness plays in the monitor's place.
//!
//! A guest takes long to boot where its kernel is emulated, so that one guest serves many checks.

mod common;

use common::needs;
#[path = "jail/host.rs"]
mod host;
#[path = "jail/image.rs"]
mod image;
#[path = "jail/run.rs"]
mod run;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use common::sys::Terminal;
use common::{LINUX_PATIENCE, containers};
use image::Images;
use run::{Place, Who, fact};

const SIZE: usize = 1 << 20;

impl Images {
    /// With a root of which images are made.
    fn new(test: &str, who: Who) -> Images {
        let images = Images::real(test, who);
        images.make_root();
        images
    }

    /// A folder with a shell, a user, and a file of random bytes.
    fn make_root(&self) {
        let root = PathBuf::from(self.place.path("root"));
        let applets = [
            "sh",
            "cat",
            "sleep",
            "sha256sum",
            "head",
            "hostname",
            "id",
            "stty",
            "true",
            "grep",
            "wc",
            "mkdir",
            "mkfifo",
            "ln",
            "rm",
            "ls",
            "pidof",
            "env",
            "pwd",
            "mount",
            "kill",
            "nc",
            "ip",
            "date",
        ];
        containers::busybox_root(&root, &applets);
        for folder in ["etc", "srv", "home"] {
            fs::create_dir(root.join(folder)).unwrap();
        }
        fs::write(
            root.join("etc/passwd"),
            "root:x:0:0::/:/bin/sh\nguest:x:1000:1001::/home:/bin/sh\n",
        )
        .unwrap();
        fs::write(
            root.join("etc/group"),
            "root:x:0:\nguests:x:1001:\nmore:x:1002:guest\n",
        )
        .unwrap();
        fs::write(root.join("srv/data"), random_bytes()).unwrap();
    }

    fn erofs(&self) -> String {
        let image = self.place.path("root.erofs");
        common::run("mkfs.erofs", &[&image, &self.place.path("root")]);
        image
    }

    fn ext4(&self) -> String {
        let image = self.place.path("root.ext4");
        File::create(&image).unwrap().set_len(16 << 20).unwrap();
        let options = ["-q", "-F", "-t", "ext4", "-O", "^has_journal", "-d"];
        let root = self.place.path("root");
        let words = [&options[..], &[&root, &image]].concat();
        common::run("/usr/sbin/mke2fs", &words);
        common::run("chmod", &["666", &image]);
        image
    }

    /// `mayfly-jailer` with other words, as the same user.
    fn jailer(&self, words: &[&str]) -> Command {
        let program = self.place.host.path("mayfly-jailer");
        let mut jailer = match self.who {
            Who::Root => Command::new(program),
            _ => self.place.as_user(self.who, &program),
        };
        jailer.args(words).stdin(Stdio::null());
        jailer.env("XDG_RUNTIME_DIR", self.place.path("runtime"));
        jailer
    }

    fn exec(&self, more: &[&str], command: &[&str]) -> Command {
        let words = [&["exec", &self.place.host.name], more, &["--"], command].concat();
        self.jailer(&words)
    }

    /// The output of `exec`, which has to end with this code. Where KVM emulates the guest's kernel, programs
    /// of a guest end by a segmentation fault now and then: then it is tried again.
    fn execs(&self, code: i32, more: &[&str], command: &[&str]) -> Output {
        const SEGMENTATION_FAULT: i32 = 128 + 11;
        let mut tries_left = 3;
        loop {
            let output = self.exec(more, command).output().unwrap();
            let is_broken = output.status.code() == Some(SEGMENTATION_FAULT);
            if !is_broken || tries_left == 0 || !common::is_software_kvm() {
                assert_eq!(output.status.code(), Some(code), "{}", err(&output));
                return output;
            }
            tries_left -= 1;
        }
    }

    fn socket(&self) -> PathBuf {
        let name = format!("{}.sock", self.place.host.name);
        match self.who {
            Who::Root => Path::new("/run/mayfly").join(name),
            _ => PathBuf::from(self.place.path("runtime/mayfly")).join(name),
        }
    }

    fn nothing_is_left(&self) {
        self.place.nothing_is_left();
        assert!(!self.socket().exists(), "{}", self.socket().display());
    }
}

/// A program that is killed with the test, should that fail: a jailer that is killed takes its microVM with it.
struct Running(Option<Child>);

impl Running {
    fn start(command: &mut Command) -> Running {
        Running(Some(command.spawn().expect("the jailer starts")))
    }

    fn child(&mut self) -> &mut Child {
        self.0.as_mut().expect("it was not waited for")
    }

    /// Reads exactly this from its standard output.
    fn says(&mut self, text: &str) {
        let mut bytes = vec![0; text.len()];
        let stdout = self.child().stdout.as_mut().expect("it is a pipe");
        let read = stdout.read_exact(&mut bytes);
        assert_eq!(String::from_utf8_lossy(&bytes), text, "{read:?}");
    }

    fn output(mut self) -> Output {
        let child = self.0.take().expect("it was not waited for");
        child.wait_with_output().unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
            // Of a test that failed: what it said may tell why.
            let mut text = String::new();
            if let Some(stderr) = &mut child.stderr {
                let _ = stderr.read_to_string(&mut text);
            }
            println!("the jailer was killed; it had said: {text}");
        }
    }
}

fn ends(mut command: Command, code: i32) -> Output {
    let output = command.output().expect("the jailer starts");
    assert_eq!(
        output.status.code(),
        Some(code),
        "{command:?}: {}",
        err(&output)
    );
    output
}

fn out(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn err(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The same in each call: a megabyte that no compression or run of equal bytes makes easy.
fn random_bytes() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..SIZE).map(|_| next()).collect()
}

/// The SHA-256 of bytes, in digits, by a program of the host's.
fn hash(bytes: &[u8]) -> String {
    let mut child = Command::new("sha256sum")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(bytes).unwrap();
    let output = child.wait_with_output().unwrap();
    out(&output).split(' ').next().unwrap().to_owned()
}

/// Starts a program whose standard input has these bytes, and is closed then.
fn with_input(mut command: Command, bytes: Vec<u8>) -> Child {
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    std::thread::spawn(move || {
        // A program that does not read it all says so by its code.
        let _ = input.write_all(&bytes);
    });
    child
}

#[test]
fn command_from_an_erofs_image_has_its_streams_user_and_exit_code() {
    needs!(root, kvm, guest, "mkfs.erofs", "busybox");
    let images = Images::new("agrun", Who::User);
    let report = images.place.path("runtime/report");
    let more = [
        "-i",
        "--user",
        "guest",
        "--env",
        "GREETING=a b",
        "--workdir",
        "/home",
        "--hostname",
        "box",
        "--exit-report",
        &report,
    ];
    let script = "sha256sum; id; hostname; pwd; echo $GREETING $HOME; echo apart >&2; \
                  mkdir /srv/new && exit 1; exit 7";
    let child = with_input(
        images.run(&images.erofs(), &more, &["sh", "-c", script]),
        random_bytes(),
    );
    let output = child.wait_with_output().unwrap();
    let text = err(&output);
    assert_eq!(output.status.code(), Some(7), "{text}");
    let mut errors = text.lines();
    assert_eq!(errors.next(), Some("apart"), "{text}");
    // Written to by root alone.
    assert!(
        errors
            .next()
            .is_some_and(|line| line.contains("Permission denied")),
        "{text}"
    );
    assert_eq!(errors.next(), None, "{text}");
    let expected = format!(
        "{}  -\nuid=1000(guest) gid=1001(guests) groups=1002(more)\nbox\n/home\na b /home\n",
        hash(&random_bytes())
    );
    assert_eq!(
        out(&output).replace("groups=1001(guests),", "groups="),
        expected
    );
    let text = fs::read_to_string(&report).unwrap();
    assert_eq!(fact(&text, "ended"), "exited", "{text}");
    assert_eq!(fact(&text, "exit_code"), "7", "{text}");
    images.nothing_is_left();
}

#[test]
fn guest_that_runs_takes_further_processes_files_and_a_signal() {
    needs!(root, kvm, guest, "mkfs.erofs", "busybox");
    let images = Images::new("agexec", Who::Root);
    let mut jailer = images.run(
        &images.erofs(),
        &[],
        &["sh", "-c", "echo ready; exec sleep 100000"],
    );
    let piped = jailer.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut jailer = Running::start(piped);
    jailer.says("ready\n");
    let mode = fs::metadata(images.socket()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);

    has_every_exit_code(&images);
    passes_streams_on(&images);
    has_a_terminal(&images);
    copies_both_ways(&images);
    reaps_what_is_left_behind(&images);
    kills_with_the_client(&images);
    finds_users_in_files_without_an_end(&images);

    common::sys::kill(jailer.child().id(), libc::SIGTERM);
    let output = jailer.output();
    assert_eq!(output.status.code(), Some(143), "{}", err(&output));
    assert_eq!(err(&output), "");
    images.nothing_is_left();
    let lost = images.execs(125, &[], &["true"]);
    assert!(
        err(&lost).contains("no microVM of this user with that id"),
        "{}",
        err(&lost)
    );
}

fn has_every_exit_code(images: &Images) {
    for (code, command) in [
        (0, &["true"][..]),
        (7, &["sh", "-c", "exit 7"]),
        (137, &["sh", "-c", "kill -9 $$"]),
        (143, &["sh", "-c", "kill $$"]),
    ] {
        let output = images.execs(code, &[], command);
        assert_eq!((out(&output), err(&output)), (String::new(), String::new()));
    }
    for (code, command, words) in [
        (127, "nothing", "cannot run nothing: no such file"),
        (
            126,
            "/etc/passwd",
            "cannot run /etc/passwd: permission denied",
        ),
    ] {
        let output = images.execs(code, &[], &[command]);
        assert!(err(&output).contains(words), "{}", err(&output));
    }
    let output = images.execs(126, &["--user", "nobody"], &["true"]);
    assert!(
        err(&output).contains("cannot find the user nobody in the image"),
        "{}",
        err(&output)
    );
}

fn passes_streams_on(images: &Images) {
    let bytes = random_bytes();
    let child = with_input(images.exec(&["-i"], &["sha256sum"]), bytes.clone());
    let output = child.wait_with_output().unwrap();
    assert_eq!(out(&output), format!("{}  -\n", hash(&bytes)));

    let script = "echo first >&2; cat /srv/data; echo last >&2";
    let mut command = images.exec(&[], &["sh", "-c", script]);
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A reader that is slower than the guest: what it has not taken waits in the guest.
    let mut slow = child.stdout.take().unwrap();
    let (mut got, mut piece) = (Vec::new(), vec![0; 16 * 1024]);
    while let Ok(count @ 1..) = slow.read(&mut piece) {
        got.extend_from_slice(&piece[..count]);
        std::thread::sleep(Duration::from_millis(2));
    }
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(err(&output), "first\nlast\n");
    assert!(got == bytes, "{} bytes of {}", got.len(), bytes.len());

    // A reader that goes away ends the writer (SIGPIPE), as at a pipe.
    let mut command = images.exec(&[], &["cat", "/dev/zero"]);
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    child.stdout.take().unwrap().read_exact(&mut piece).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(141));
}

fn has_a_terminal(images: &Images) {
    let mut terminal = Terminal::new();
    let set = |size: &[&str]| {
        let line = Stdio::from(terminal.line.try_clone().unwrap());
        assert!(
            Command::new("stty")
                .args(size)
                .stdin(line)
                .status()
                .unwrap()
                .success()
        );
    };
    set(&["rows", "33", "cols", "77"]);
    let script = "stty size; read answer; stty size; echo $answer; exit 9";
    let inner = images.exec(&["-t", "-i"], &["sh", "-c", script]);
    let line = || Stdio::from(terminal.line.try_clone().unwrap());
    let mut command = Command::new("setsid");
    command
        .args(["--ctty", "--wait"])
        .arg(inner.get_program())
        .args(inner.get_args());
    let mut child = command
        .stdin(line())
        .stdout(line())
        .stderr(line())
        .spawn()
        .unwrap();
    let mut screen = terminal.keyboard.try_clone().unwrap();
    let mut seen = String::new();
    let mut sees = |text: &str| {
        let mut bytes = [0; 1024];
        while !seen.contains(text) {
            let count = screen.read(&mut bytes).unwrap();
            seen.push_str(&String::from_utf8_lossy(&bytes[..count]));
        }
    };
    // The line ends as the host's terminal makes it.
    sees("33 77\r");
    assert!(terminal.settings().is_raw());
    set(&["rows", "44", "cols", "88"]);
    // The change is on its way when the answer is: both go by the same link, in this order.
    common::wait_until("the change of size to be passed on", || {
        let output = images.execs(0, &[], &["sh", "-c", "stty size </dev/pts/0"]);
        out(&output) == "44 88\n"
    });
    terminal.keyboard.write_all(b"typed\r").unwrap();
    sees("44 88\r");
    sees("typed\r");
    assert_eq!(child.wait().unwrap().code(), Some(9));
}

fn copies_both_ways(images: &Images) {
    let name = &images.place.host.name;
    let (from, to) = (images.place.path("from"), images.place.path("to"));
    fs::create_dir_all(Path::new(&from).join("inner")).unwrap();
    fs::write(Path::new(&from).join("inner/data"), random_bytes()).unwrap();
    fs::set_permissions(
        Path::new(&from).join("inner/data"),
        fs::Permissions::from_mode(0o751),
    )
    .unwrap();
    std::os::unix::fs::symlink("inner/data", Path::new(&from).join("link")).unwrap();
    ends(
        images.jailer(&["cp", &from, &format!("{name}:/srv/copy")]),
        0,
    );
    let output = images.execs(
        0,
        &[],
        &[
            "sh",
            "-c",
            "sha256sum < /srv/copy/link; ls -l /srv/copy/inner",
        ],
    );
    let text = out(&output);
    assert!(
        text.starts_with(&hash(&random_bytes())) && text.contains("-rwxr-x--x"),
        "{text}"
    );
    ends(images.jailer(&["cp", &format!("{name}:/srv/copy"), &to]), 0);
    assert!(fs::read(Path::new(&to).join("inner/data")).unwrap() == random_bytes());
    assert_eq!(
        fs::read_link(Path::new(&to).join("link")).unwrap(),
        Path::new("inner/data")
    );
    // Into a folder that is there, under its own name; and one file under another.
    ends(
        images.jailer(&["cp", &format!("{name}:/etc/passwd"), &to]),
        0,
    );
    let copied = fs::read_to_string(Path::new(&to).join("passwd")).unwrap();
    assert!(copied.contains("guest:x:1000"), "{copied}");
    // Paths may be as long as Linux has them.
    let deep = format!("/srv/{}", "a".repeat(250) + "/" + &"b".repeat(250) + "/");
    for part in ["", "c/"] {
        let into = format!("{name}:{deep}{part}data");
        let made = format!("mkdir -p {deep}c; echo {part} >{deep}{part}mark");
        images.execs(0, &[], &["sh", "-c", &made]);
        ends(
            images.jailer(&["cp", &format!("{from}/inner/data"), &into]),
            0,
        );
        let marked = images.place.path("marked");
        let mark = format!("{name}:{deep}{part}mark");
        ends(images.jailer(&["cp", &mark, &marked]), 0);
        assert_eq!(fs::read_to_string(marked).unwrap(), format!("{part}\n"));
    }
    let listed = images.execs(0, &[], &["sh", "-c", &format!("ls {deep} {deep}c")]);
    let text = out(&listed);
    assert_eq!(text.matches("data").count(), 2, "{text}");
    for (words, expected) in [
        (
            [format!("{name}:/nothing"), to.clone()],
            "cannot read nothing: no such file",
        ),
        (
            [format!("{from}/nothing"), format!("{name}:/srv")],
            "No such file",
        ),
        (
            [from.clone(), format!("{name}:/nothing/there")],
            "cannot write /nothing/there",
        ),
    ] {
        let output = ends(images.jailer(&["cp", &words[0], &words[1]]), 1);
        assert!(
            err(&output).contains(expected),
            "{words:?}: {}",
            err(&output)
        );
    }
}

fn reaps_what_is_left_behind(images: &Images) {
    let orphans = "for i in 1 2 3; do (sleep 0.01 &) ; done; exit 5";
    images.execs(5, &[], &["sh", "-c", orphans]);
    common::wait_until("no zombie to be left", || {
        let output = images.execs(
            0,
            &[],
            &[
                "sh",
                "-c",
                "cat /proc/[0-9]*/status 2>/dev/null | grep -c 'State:.Z'; true",
            ],
        );
        out(&output) == "0\n"
    });
}

fn finds_users_in_files_without_an_end(images: &Images) {
    let script = "cd /etc && rm group passwd && ln -s /dev/zero group && mkfifo passwd";
    images.execs(0, &[], &["sh", "-c", script]);
    for user in ["guest", "1000:guests"] {
        let output = images.execs(126, &["--user", user], &["true"]);
        assert!(err(&output).contains("in the image"), "{}", err(&output));
    }
}

fn kills_with_the_client(images: &Images) {
    // A shell becomes its last command, so that cat is not the last.
    let mut command = images.exec(&["-i"], &["sh", "-c", "echo $$; cat; true"]);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    stdout.read_line(&mut line).unwrap();
    let is_there = || {
        let words = format!("kill -0 {} 2>/dev/null", line.trim());
        let output = images.exec(&[], &["sh", "-c", &words]).output().unwrap();
        output.status.success()
    };
    assert!(is_there());
    child.kill().unwrap();
    child.wait().unwrap();
    common::wait_until("the process to be killed with its client", || !is_there());
}

#[test]
fn what_a_command_writes_to_an_ext4_image_is_there_afterwards() {
    needs!(root, kvm, guest, "mke2fs", "debugfs", "busybox");
    let images = Images::new("agwrite", Who::Root);
    let image = images.ext4();
    let script = "echo kept >/srv/kept && rm -r /home && mkdir /home && exec sh -c 'kill -9 $$'";
    let command = images.run(&format!("{image}:rw"), &[], &["sh", "-c", script]);
    let output = ends(command, 137);
    assert_eq!(err(&output), "");
    let kept = Command::new("/usr/sbin/debugfs")
        .args(["-R", "cat /srv/kept", &image])
        .output()
        .unwrap();
    assert_eq!(out(&kept), "kept\n", "{}", err(&kept));
    common::run("/usr/sbin/e2fsck", &["-fn", &image]);
    images.nothing_is_left();
}

#[test]
fn supervisor_that_is_killed_leaves_nothing() {
    needs!(root, kvm, guest, "mkfs.erofs", "busybox");
    for who in [Who::Root, Who::User] {
        let images = Images::new(&format!("agkill{who:?}"), who);
        let mut jailer = images.run(&images.erofs(), &[], &["sleep", "1000"]);
        let mut jailer = Running::start(jailer.stdout(Stdio::null()).stderr(Stdio::null()));
        common::wait_until("the socket", || images.socket().exists());
        jailer.child().kill().unwrap();
        jailer.output();
        common::wait_until_within(LINUX_PATIENCE, "the socket to go", || {
            !images.socket().exists()
        });
        images.nothing_is_left();
    }
}

/// A socket that a terminal comes to, as of a container engine.
struct ConsoleSocket {
    path: String,
    listener: UnixListener,
}

impl ConsoleSocket {
    fn new(images: &Images, name: &str) -> ConsoleSocket {
        let path = images.place.path(&format!("runtime/{name}"));
        let listener = UnixListener::bind(&path).unwrap();
        ConsoleSocket { path, listener }
    }

    /// The terminal that came.
    fn terminal(&self) -> File {
        let (socket, _) = self.listener.accept().unwrap();
        let mut name = [0; 100];
        let (count, terminal) = common::sys::receive_with(&socket, &mut name);
        assert_eq!(&name[..count], b"/dev/ptmx");
        terminal.into()
    }
}

/// Reads from a terminal until its last line is this one.
fn read_until(terminal: &mut File, last: &str) -> String {
    let (mut seen, mut bytes) = (String::new(), [0; 1024]);
    while !seen.ends_with(&format!("{last}\r\n")) {
        match terminal.read(&mut bytes) {
            Ok(count @ 1..) => seen.push_str(&String::from_utf8_lossy(&bytes[..count])),
            other => panic!("{other:?} before {last}: {seen}"),
        }
    }
    seen
}

#[test]
fn process_object_is_honoured_and_its_terminal_goes_to_a_console_socket() {
    needs!(root, kvm, guest, "mkfs.erofs", "busybox");
    let images = Images::new("agobject", Who::Root);
    let object = |name: &str, terminal: bool, script: &str| {
        let path = images.place.path(name);
        let net = "[\"CAP_NET_BIND_SERVICE\"]";
        let text = format!(
            r#"{{ "terminal": {terminal}, "consoleSize": {{ "height": 33, "width": 77 }},
                 "user": {{ "uid": 1000, "gid": 1001, "umask": 23, "additionalGids": [7, 1002] }},
                 "args": ["sh", "-c", "{script}"], "cwd": "/srv/new/deep",
                 "env": ["PATH=/bin", "ONLY=this"], "noNewPrivileges": true, "oomScoreAdj": 7,
                 "capabilities": {{ "bounding": ["CAP_KILL", "CAP_NET_BIND_SERVICE"], "effective": {net},
                     "permitted": {net}, "inheritable": {net}, "ambient": {net} }},
                 "rlimits": [{{ "type": "RLIMIT_NOFILE", "hard": 77, "soft": 66 }}] }}"#
        );
        fs::write(&path, text).unwrap();
        path
    };
    let console = ConsoleSocket::new(&images, "console");
    let facts = "stty size; pwd; env; id -u; id -g; umask; ulimit -n; ulimit -Hn; \
                 cat /proc/self/oom_score_adj; \
                 grep -e Groups -e CapBnd -e CapEff -e NoNew /proc/self/status; echo done; \
                 read code; exit $code";
    let path = object("first", true, facts);
    let words = ["--process", &path, "-i", "--console-socket", &console.path];
    let mut command = images.run(&images.erofs(), &words, &[]);
    let jailer = Running::start(command.stdout(Stdio::piped()).stderr(Stdio::piped()));
    let mut terminal = console.terminal();
    let seen = read_until(&mut terminal, "done").replace("\r\n", "\n");
    let expected = "33 77\n/srv/new/deep\n";
    assert!(seen.starts_with(expected), "{seen}");
    for line in [
        "ONLY=this\n",
        "HOME=/home\n",
        "PATH=/bin\n",
        "\n1000\n1001\n0027\n66\n77\n7\n",
        "Groups:\t7 1002 \n",
        "CapEff:\t0000000000000400\n",
        "CapBnd:\t0000000000000420\n",
        "NoNewPrivs:\t1\n",
    ] {
        assert!(seen.contains(line), "{line:?} in {seen}");
    }
    assert!(
        !seen.contains("HOSTNAME=") && !seen.contains("TERM="),
        "{seen}"
    );

    // A further process, which goes on by itself.
    let further = ConsoleSocket::new(&images, "further");
    let path = object("second", true, "stty size; read line; echo got $line");
    let pid_file = images.place.path("pid");
    let id = images.place.host.name.as_str();
    let words = [
        "exec",
        id,
        "--process",
        &path,
        "-i",
        "--detach",
        "--pid-file",
        &pid_file,
        "--console-socket",
        &further.path,
    ];
    let mut detached = images.jailer(&words);
    detached.stdout(Stdio::null()).stderr(Stdio::null());
    assert!(detached.status().unwrap().success());
    let pid = fs::read_to_string(&pid_file).unwrap();
    let mut screen = further.terminal();
    assert_eq!(read_until(&mut screen, "33 77"), "33 77\r\n");
    screen.write_all(b"typed\r").unwrap();
    read_until(&mut screen, "got typed");
    common::wait_until("the detached process to end", || {
        fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |text| text.contains(") Z "))
    });
    // And one that does not, whose code is that of its process.
    let path = object("third", false, "id -u >&2; exit 7");
    let output = ends(images.jailer(&["exec", id, "--process", &path]), 7);
    assert_eq!(
        (out(&output), err(&output)),
        (String::new(), "1000\n".into())
    );
    let refused = ends(
        images.jailer(&[
            "exec",
            id,
            "--process",
            &path,
            "--console-socket",
            &further.path,
        ]),
        125,
    );
    assert!(
        err(&refused).contains("has no terminal"),
        "{}",
        err(&refused)
    );

    terminal.write_all(b"9\r").unwrap();
    let output = jailer.output();
    assert_eq!(output.status.code(), Some(9), "{}", err(&output));
    assert_eq!((out(&output), err(&output)), (String::new(), String::new()));
    images.nothing_is_left();
}

#[test]
fn files_memory_and_a_disk_for_what_is_written_are_there_when_the_command_starts() {
    needs!(
        root,
        kvm,
        guest,
        "mkfs.erofs",
        "mke2fs",
        "debugfs",
        "busybox"
    );
    let images = Images::new("aglaid", Who::Root);
    let path = |name: &str| images.place.path(name);
    let upper = path("upper");
    File::create(&upper).unwrap().set_len(16 << 20).unwrap();
    common::run("/usr/sbin/mke2fs", &["-q", "-F", "-t", "ext4", &upper]);
    common::run("chmod", &["666", &upper]);
    let from = path("from");
    fs::create_dir(&from).unwrap();
    fs::write(path("from/data"), random_bytes()).unwrap();
    common::run("chmod", &["640", &path("from/data")]);
    common::run("chown", &["1000:1001", &path("from/data")]);
    fs::write(path("hosts"), "127.0.0.1 here\n").unwrap();
    let hosts = format!("{}:/etc/hosts", path("hosts"));
    let image = images.erofs();

    let script = "cat /etc/hosts; sha256sum < /srv/a/copy/data; ls -ln /srv/a/copy/data; \
                  grep /scratch /proc/mounts; echo kept >/srv/kept; exit 3";
    let copy = format!("{from}:/srv/a/copy");
    let words = [
        "--upper",
        &upper,
        "--copy-in",
        &copy,
        "--copy-in",
        &hosts,
        "--tmpfs",
        "/scratch/x:size=64k,mode=700,noexec",
    ];
    let output = ends(images.run(&image, &words, &["sh", "-c", script]), 3);
    let text = out(&output);
    let mut lines = text.lines();
    assert_eq!(
        lines.next(),
        Some("127.0.0.1 here"),
        "{text} {}",
        err(&output)
    );
    assert_eq!(
        lines.next(),
        Some(&*format!("{}  -", hash(&random_bytes())))
    );
    let file = lines.next().unwrap_or_default();
    let owners: Vec<_> = file.split_whitespace().take(4).collect();
    assert_eq!(owners, ["-rw-r-----", "1", "1000", "1001"], "{text}");
    let mount = lines.next().unwrap_or_default();
    assert!(
        mount.starts_with("tmpfs /scratch/x tmpfs rw,noexec")
            && mount.contains("size=64k,mode=700"),
        "{text}"
    );
    let kept = Command::new("/usr/sbin/debugfs")
        .args(["-R", "cat /upper/srv/kept", &upper])
        .output()
        .unwrap();
    assert_eq!(out(&kept), "kept\n", "{}", err(&kept));
    common::run("/usr/sbin/e2fsck", &["-fn", &upper]);

    // A root that is only read has what was laid into it all the same.
    let script = "cat /etc/hosts; echo x >/tmp/x && echo x >/srv/x || exit 5";
    let sealed = format!("{image}:ro");
    let words = ["--copy-in", &hosts];
    let output = ends(images.run(&sealed, &words, &["sh", "-c", script]), 5);
    assert_eq!(out(&output), "127.0.0.1 here\n");
    assert!(
        err(&output).contains("/srv/x: Read-only"),
        "{}",
        err(&output)
    );

    // What cannot be copied is named.
    let words = ["--copy-in", "/dev/null:/etc/x"];
    let output = ends(images.run(&image, &words, &["true"]), 125);
    let text = err(&output);
    assert!(
        text.contains("/dev/null") && text.lines().count() == 1,
        "{text}"
    );
    let words = ["--upper", &image];
    let output = ends(images.run(&image, &words, &["true"]), 125);
    assert!(err(&output).contains("not an ext4"), "{}", err(&output));
    images.nothing_is_left();
}

/// A network namespace with a name, gone with its owner.
struct Namespace(String);

impl Namespace {
    fn new(letter: char) -> Namespace {
        let name = format!("mfns{}{letter}", std::process::id());
        common::run("ip", &["netns", "add", &name]);
        Namespace(name)
    }

    fn path(&self) -> String {
        format!("/run/netns/{}", self.0)
    }

    fn ip(&self, words: &str) {
        let words: Vec<_> = ["-n", &self.0]
            .into_iter()
            .chain(words.split(' '))
            .collect();
        common::run("ip", &words);
    }

    /// What `tc` says of its interface: nothing where there is no redirect.
    fn redirect(&self) -> String {
        let words = [
            "netns", "exec", &self.0, "tc", "filter", "show", "dev", "eth0", "ingress",
        ];
        let output = Command::new("ip").args(words).output().unwrap();
        out(&output)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

#[test]
fn guest_takes_over_the_interface_of_a_network_namespace_and_gives_it_back() {
    needs!(root, kvm, guest, "mkfs.erofs", "busybox", "ip", "tc");
    let images = Images::new("agnet", Who::Root);
    let (engine, peer) = (Namespace::new('a'), Namespace::new('b'));
    let pair = format!(
        "link add mfpeer type veth peer name eth0 netns {}",
        engine.0
    );
    peer.ip(&pair);
    peer.ip("addr add 10.77.0.1/24 dev mfpeer");
    peer.ip("link set mfpeer up");
    engine.ip("link set eth0 mtu 1400");
    engine.ip("addr add 10.77.0.2/24 dev eth0");
    let path = peer.path();
    let (tell, port) = std::sync::mpsc::channel();
    let server = std::thread::spawn(move || {
        common::sys::enter_netns(Path::new(&path));
        let listener = std::net::TcpListener::bind("10.77.0.1:0").unwrap();
        tell.send(listener.local_addr().unwrap().port()).unwrap();
        let one = |_| {
            let (mut stream, from) = listener.accept().unwrap();
            stream.write_all(&random_bytes()).unwrap();
            from.ip().to_string()
        };
        [1, 2].map(one)
    });
    let port = port.recv().unwrap();

    let image = images.erofs();
    let own = engine.path();
    let words = ["--net-from-namespace", &own];
    let script =
        format!("ip addr show eth0; ip route; nc 10.77.0.1 {port} </dev/null | sha256sum; exit 4");
    // The first one boots, and the second one is a copy of it with another address.
    settle();
    let template = images.place.path("templates");
    let warm = [&words[..], &["--template", &template]].concat();
    for mac in ["06:11:22:33:44:55", "06:11:22:33:44:66"] {
        engine.ip("link set eth0 down");
        engine.ip(&format!("link set eth0 address {mac}"));
        engine.ip("link set eth0 up");
        engine.ip("route add default via 10.77.0.1");
        let output = ends(images.run(&image, &warm, &["sh", "-c", &script]), 4);
        let text = out(&output);
        for part in [
            "mtu 1400",
            &format!("link/ether {mac}"),
            "inet 10.77.0.2/24 ",
            "default via 10.77.0.1 dev eth0",
            &hash(&random_bytes()),
        ] {
            assert!(text.contains(part), "{part} in {text} {}", err(&output));
        }
        assert_eq!(engine.redirect(), "");
        images.nothing_is_left();
    }
    assert_eq!(server.join().unwrap(), ["10.77.0.2", "10.77.0.2"]);

    // A supervisor that is killed leaves the namespace as it was.
    let mut command = images.run(&image, &words, &["sleep", "1000"]);
    let mut jailer = Running::start(command.stdout(Stdio::null()).stderr(Stdio::null()));
    common::wait_until("the redirect", || engine.redirect().contains("mirred"));
    jailer.child().kill().unwrap();
    jailer.output();
    common::wait_until("the redirect to go", || engine.redirect().is_empty());
    common::wait_until("the socket to go", || !images.socket().exists());

    // One without an interface gives none, and what is no namespace is refused.
    let bare = Namespace::new('c');
    let own = bare.path();
    let words = ["--net-from-namespace", &own];
    let output = ends(
        images.run(&image, &words, &["ip", "addr", "show", "eth0"]),
        1,
    );
    assert!(err(&output).contains("eth0"), "{}", err(&output));
    let words = ["--net-from-namespace", "/dev/null"];
    let output = ends(images.run(&image, &words, &["true"]), 125);
    assert!(
        err(&output).contains("not a network namespace"),
        "{}",
        err(&output)
    );
    assert_eq!(err(&output).lines().count(), 1);
    images.nothing_is_left();
}

/// Waits until no file of a test counts as one that was changed just now: such a one is of no template yet.
fn settle() {
    std::thread::sleep(Duration::from_millis(3500));
}

/// What an exit report says of a template: whether it was used, and the note.
fn template_of(report: &str) -> (bool, String) {
    let report: serde_json::Value = serde_json::from_slice(&fs::read(report).unwrap()).unwrap();
    let template = &report["template"];
    let note = template["note"].as_str().expect("it is told");
    (template["used"] == true, note.to_owned())
}

#[test]
fn copies_of_a_template_have_their_own_disk_name_time_and_random_numbers() {
    let images = Images::new("agwarm", Who::Root);
    let small = images.erofs();
    let large = images.place.path("large.erofs");
    let root = images.place.path("root");
    fs::write(format!("{root}/etc/more"), random_bytes()).unwrap();
    common::run("mkfs.erofs", &[&large, &root]);
    let sectors = |image: &str| (fs::metadata(image).unwrap().len() / 512).to_string();
    assert_ne!(sectors(&small), sectors(&large));
    let templates = images.place.path("templates");
    settle();
    let script = "hostname; cat /sys/block/vda/size; date +%s; head -c 32 /dev/urandom | sha256sum; \
                  sha256sum /srv/data /etc/more; cat >/file && cat /file";
    let run = |image: &str, name: &str| {
        let report = images.place.path(name);
        let words = [
            "--template",
            &templates,
            "--hostname",
            name,
            "--exit-report",
        ];
        let id = format!("{}-{name}", images.place.host.name);
        let more = [&words[..], &[&report, "-i", "--id", &id]].concat();
        let mut command = images.run(image, &more, &["sh", "-c", script]);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut running = Running::start(&mut command);
        let input = running.child().stdin.take();
        input.unwrap().write_all(name.as_bytes()).unwrap();
        running
    };
    let now = || std::time::UNIX_EPOCH.elapsed().unwrap().as_secs();
    let began = now();
    let check = |output: Output, image: &str, name: &str| {
        let text = out(&output);
        assert!(output.status.code().is_some(), "{}", err(&output));
        let lines: Vec<_> = text.lines().collect();
        assert!(lines.len() >= 6, "{text} {}", err(&output));
        assert_eq!(lines[..2], [name, &sectors(image)], "{text}");
        let time: u64 = lines[2].parse().unwrap();
        // A guest's clock and the host's differ by less than a second.
        assert!(
            (began - 1..=now() + 1).contains(&time),
            "{time} after {began}"
        );
        assert!(lines[4].starts_with(&hash(&random_bytes())), "{text}");
        assert_eq!(lines.last(), Some(&name), "{text}");
        assert_eq!(text.contains("/etc/more"), image == large, "{text}");
        lines[3].to_owned()
    };
    let first = check(run(&small, "first").output(), &small, "first");
    let (is_copy, note) = template_of(&images.place.path("first"));
    assert!(!is_copy && note.contains("is made"), "{note}");
    // Two at once, of different images.
    let one = run(&small, "one");
    let other = run(&large, "other");
    let one = check(one.output(), &small, "one");
    let other = check(other.output(), &large, "other");
    for name in ["one", "other"] {
        assert!(template_of(&images.place.path(name)).0, "{name}");
    }
    assert!(first != one && one != other && first != other);
    what_does_not_fit_boots(&images, &small, &templates);
    images.nothing_is_left();
}

/// Templates that are of another shape, or that were damaged, or that no guest of this kind may have, are not used; and a
/// maker that was killed leaves nothing for long.
fn what_does_not_fit_boots(images: &Images, image: &str, templates: &str) {
    let report = images.place.path("report");
    let note = |image: &str, more: &[&str]| {
        let words = [
            "--template",
            templates,
            "--exit-report",
            &report,
            "--timeout",
            "2",
        ];
        let words = [&words[..], more].concat();
        ends(images.run(image, &words, &["true"]), 124);
        let (is_copy, note) = template_of(&report);
        assert!(!is_copy, "{note}");
        note
    };
    let work = Path::new(templates).join("work");
    fs::create_dir(work.join("1-0")).unwrap();
    fs::write(work.join("1-0/memory"), "of a maker that was killed").unwrap();
    assert!(note(image, &["--memory", "160"]).contains("none of its kind"));
    assert_eq!(fs::read_dir(&work).unwrap().count(), 0);
    let disk = images.ext4();
    let written = format!("{disk}:rw");
    assert!(note(&written, &[]).contains("writes to"));
    assert!(note(image, &["--drive", &disk]).contains("writes to"));
    let entries = fs::read_dir(templates).unwrap().flatten();
    let template = entries
        .map(|it| it.path())
        .find(|it| it.join("state").exists());
    let template = template.expect("one was made");
    for (name, length) in [("memory", 4096), ("state", 1000)] {
        let file = File::options()
            .write(true)
            .open(template.join(name))
            .unwrap();
        file.set_len(length).unwrap();
        let note = note(image, &[]);
        assert!(note.contains("cannot be used, and is made anew"), "{note}");
    }
    fs::set_permissions(templates, fs::Permissions::from_mode(0o777)).unwrap();
    let words = ["--template", templates];
    let output = ends(images.run(image, &words, &["true"]), 125);
    let text = err(&output);
    assert!(text.contains("other users can write to it"), "{text}");
}

/// A program to which its own standard output is passed as descriptor 9 as well.
fn with_ready_fd(inner: &Command) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$@\" 9>&1", "sh"]);
    command.arg(inner.get_program()).args(inner.get_args());
    for (name, value) in inner.get_envs() {
        command.env(name, value.unwrap_or_default());
    }
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

#[test]
fn held_command_runs_when_it_is_asked_for_and_takes_signals_by_its_id() {
    needs!(root, kvm, guest, "mkfs.erofs", "busybox");
    let images = Images::new("aghold", Who::User);
    let image = images.erofs();
    let id = format!("{}_{}.x", images.place.host.name, "0".repeat(64 - 20));
    let id = id.as_str();
    let folder = images.place.path("runtime/own");
    let own = ["--runtime-dir", &folder];
    let of_run = [&own[..], &["--hold", "--ready-fd", "9", "-i", "--id", id]].concat();
    let ask = |code, words: &[&str]| ends(images.jailer(&[words, &own[..]].concat()), code);
    let status = || out(&ask(0, &["state", id]));

    let script = "read line; echo got $line; exec sleep 1000";
    let inner = images.run(&image, &of_run, &["sh", "-c", script]);
    let mut jailer = Running::start(&mut with_ready_fd(&inner));
    let mut input = jailer.child().stdin.take().unwrap();
    // What is typed early waits for the command.
    input.write_all(b"typed\n").unwrap();
    jailer.says("1");
    let text = status();
    assert_eq!(
        fact(&text.replace("\":", "\": "), "status"),
        "created",
        "{text}"
    );
    assert!(
        text.contains(&format!("\"pid\":{}", jailer.child().id())),
        "{text}"
    );
    let words = [&["exec", id][..], &own, &["--", "pidof", "sleep"]].concat();
    assert_eq!(out(&ends(images.jailer(&words), 1)), "");
    ask(0, &["start", id]);
    jailer.says("got typed\n");
    let text = status();
    assert!(text.contains("\"status\":\"running\""), "{text}");
    let again = ask(1, &["start", id]);
    assert!(err(&again).contains("started already"), "{}", err(&again));
    ask(0, &["signal", id, "TERM"]);
    let output = jailer.output();
    assert_eq!(output.status.code(), Some(143), "{}", err(&output));
    let lost = ask(3, &["state", id]);
    assert!(
        err(&lost).contains("no microVM of this user"),
        "{}",
        err(&lost)
    );
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 0);

    // Before its command runs, a signal ends the microVM.
    let inner = images.run(&image, &of_run, &["true"]);
    let mut jailer = Running::start(&mut with_ready_fd(&inner));
    jailer.says("1");
    ask(0, &["signal", id, "15"]);
    let output = jailer.output();
    assert_eq!(output.status.code(), Some(143), "{}", err(&output));
    assert!(
        err(&output).contains("signal 15 asked for"),
        "{}",
        err(&output)
    );
    images.nothing_is_left();

    // Closed without a byte: it failed.
    let inner = images.run("/none", &of_run, &["true"]);
    let output = Running::start(&mut with_ready_fd(&inner)).output();
    assert_eq!(
        (output.status.code(), out(&output)),
        (Some(125), String::new())
    );
}

/// `mayfly-jailer run --image` with the witness for a monitor, which plays the guest.
fn played(place: &Place, words: &str, more: &[&str]) -> Command {
    let image = place.path("image");
    let mut bytes = vec![0; 4096];
    bytes[1024..1028].copy_from_slice(&0xe0f5_e1e2_u32.to_le_bytes());
    fs::write(&image, bytes).unwrap();
    fs::write(place.path("agent"), "no agent").unwrap();
    let agent = place.path("agent");
    let options = ["--image", &image, "--agent", &agent];
    let mut jailer = place.run(Who::Root, words, &[&options[..], more].concat());
    jailer.args(["--", "true"]);
    jailer
}

#[test]
fn agent_that_breaks_the_protocol_ends_its_microvm_with_one_message() {
    needs!(root);
    let place = Place::new("aghostile");
    for (kind, expected) in [
        ("garbage", "cannot"),
        ("endless", "more bytes were sent than there was credit for"),
    ] {
        let output = place.ends(played(&place, &format!("agent={kind}"), &[]), 125);
        assert_eq!(output.err.lines().count(), 1, "{}", output.err);
        assert!(
            output.err.contains("the guest's agent broke the protocol"),
            "{}",
            output.err
        );
        assert!(
            kind == "garbage" || output.err.contains(expected),
            "{}",
            output.err
        );
    }
    // Frames of other protocols without end keep the supervisor neither from its limit nor from a signal.
    let output = place.ends(played(&place, "agent=foreign", &["--timeout", "1"]), 124);
    assert_eq!(output.err.lines().count(), 1, "{}", output.err);
    let output = place.ends(played(&place, "exit=0", &[]), 125);
    assert!(
        output
            .err
            .contains("the guest ended before its command did"),
        "{}",
        output.err
    );
}

#[test]
fn commands_that_cannot_be_run_are_refused_in_one_line() {
    needs!(root);
    let place = Place::new("agrefuse");
    let (image, plain) = (place.path("image"), place.path("disk"));
    drop(played(&place, "", &[]));
    let kernel = place.path("kernel");
    let rw = format!("{image}:rw");
    let run = |words: &[&str], command: &[&str]| {
        let mut jailer = place.jailer(Who::Root, &[&["run"], words].concat());
        jailer.args(command);
        let output = place.ends(jailer, 125);
        assert_eq!(output.err.lines().count(), 1, "{}", output.err);
        output.err
    };
    for (words, command, expected) in [
        (
            &["--image", &image][..],
            &["--", "true"][..],
            "--kernel is missing",
        ),
        (
            &["--image", &image, "--kernel", &kernel],
            &[],
            "what to run is missing",
        ),
        (
            &["--image", &image, "--kernel", &kernel, "--snapshot", "x"],
            &["--", "true"],
            "leave one of both out",
        ),
        (
            &[
                "--image",
                &image,
                "--kernel",
                &kernel,
                "--reach-from-namespace",
            ],
            &["--", "true"],
            "needs --net-from-namespace",
        ),
        (
            &["--image", &plain, "--kernel", &kernel],
            &["--", "true"],
            "names no EROFS or ext4 file",
        ),
        (
            &["--image", &rw, "--kernel", &kernel],
            &["--", "true"],
            "never written to",
        ),
        (
            &["--image", &image, "--kernel", &kernel, "-t"],
            &["--", "true"],
            "are not a terminal",
        ),
        (
            &["--image", &image, "--kernel", &kernel, "--agent", "/none"],
            &["--", "true"],
            "mayfly-agent",
        ),
        (
            &["--image", "/none", "--kernel", &kernel],
            &["--", "true"],
            "open the image",
        ),
    ] {
        let text = run(words, command);
        assert!(text.contains(expected), "{words:?}: {text}");
    }
    let long = "x".repeat(70_000);
    let agent = place.path("agent");
    let words = ["--image", &image, "--kernel", &kernel, "--agent", &agent];
    let text = run(&words, &["--", &long]);
    assert!(text.contains("longer than"), "{text}");
}
