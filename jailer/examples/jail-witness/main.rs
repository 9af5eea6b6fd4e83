//! A program to be put into a jail in the monitor's place, which says what it sees there.
//!
//! One fact a line, "name value", on standard output, or with `--report FILE` in that file. With
//! `--attack` it tries to get out first. With `--stay` it then waits, a minute at most, so that it
//! can be looked at from outside: until standard input ends, or for ever where that is /dev/null.
//!
//! In an empty jail, where nothing can be said on its command line, it is the `monitor`.

mod cable;
mod escape;
mod monitor;
mod raw;

use std::fmt::Write as _;
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::time::Duration;

use rustix::fs::{CWD, FileType, Mode};
use rustix::process::{Pid, Resource, Rlimit, Signal};

fn main() {
    let args: Vec<String> = std::env::args().collect();
    if args.iter().any(|arg| arg == "--api-fd") {
        monitor::run(&args);
    }
    let after = |name: &str| {
        let at = args.iter().position(|arg| arg == name)?;
        args.get(at + 1)
    };
    let mut report = String::new();
    see(&mut report, &args);
    if args.iter().any(|arg| arg == "--attack") {
        let victim = after("--victim").and_then(|pid| pid.parse().ok());
        attack(&mut report, victim.and_then(Pid::from_raw));
    }
    report.push_str("end\n");
    match after("--report") {
        Some(file) => {
            let aside = format!("{file}.part");
            std::fs::write(&aside, &report).expect("the report's folder is writable");
            std::fs::rename(&aside, file).expect("same folder");
        }
        None => print!("{report}"),
    }
    if args.iter().any(|arg| arg == "--stay") {
        std::thread::spawn(|| {
            let mut rest = Vec::new();
            // The end of /dev/null says nothing about the tests.
            let is_null = rustix::fs::fstat(std::io::stdin())
                .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode).is_char_device());
            if !is_null && std::io::stdin().read_to_end(&mut rest).is_ok() {
                std::process::exit(0);
            }
        });
        std::thread::sleep(Duration::from_secs(60));
    }
}

fn see(report: &mut String, args: &[String]) {
    let mut say = |name: &str, value: &dyn std::fmt::Display| {
        writeln!(report, "{name} {value}").expect("a string grows");
    };
    for arg in args {
        say("arg", arg);
    }
    for (name, value) in std::env::vars() {
        say("env", &format!("{name}={value}"));
    }
    let cwd = std::env::current_dir().map_or("none".into(), |dir| dir.display().to_string());
    say("cwd", &cwd);
    say("pid", &std::process::id());
    say("uid", &rustix::process::getuid().as_raw());
    say("euid", &rustix::process::geteuid().as_raw());
    say("gid", &rustix::process::getgid().as_raw());
    say("egid", &rustix::process::getegid().as_raw());
    let groups = rustix::process::getgroups().unwrap_or_default();
    say("groups", &groups.len());
    say(
        "umask",
        &format!(
            "{:03o}",
            rustix::process::umask(Mode::empty()).as_raw_mode()
        ),
    );
    for (name, resource) in [("nofile", Resource::Nofile), ("fsize", Resource::Fsize)] {
        let limit = rustix::process::getrlimit(resource);
        let text = |value: Option<u64>| value.map_or("none".into(), |value| value.to_string());
        say(
            name,
            &format!("{} {}", text(limit.current), text(limit.maximum)),
        );
    }
    for device in [
        "/dev/kvm",
        "/dev/net/tun",
        "/dev/urandom",
        "/dev/userfaultfd",
    ] {
        let opened = std::fs::File::options().read(true).write(true).open(device);
        say(
            "open",
            &format!("{device} {}", if opened.is_ok() { "yes" } else { "no" }),
        );
    }
    walk(Path::new("/"), &mut |line| say("file", &line));
}

/// Everything below `path`: mode, owner, group, device number, links, name.
fn walk(path: &Path, say: &mut dyn FnMut(String)) {
    let Ok(meta) = std::fs::symlink_metadata(path) else {
        return;
    };
    let device = if meta.file_type().is_char_device() {
        let number = meta.rdev();
        format!(
            "{}:{}",
            rustix::fs::major(number),
            rustix::fs::minor(number)
        )
    } else {
        "-".to_owned()
    };
    let (mode, uid, gid, links) = (meta.mode(), meta.uid(), meta.gid(), meta.nlink());
    let links = if meta.is_dir() { 0 } else { links };
    say(format!(
        "{mode:o} {uid} {gid} {device} {links} {}",
        path.display()
    ));
    if meta.is_dir()
        && let Ok(entries) = std::fs::read_dir(path)
    {
        for entry in entries.flatten() {
            walk(&entry.path(), say);
        }
    }
}

/// What a compromised monitor would try first.
fn attack(report: &mut String, victim: Option<Pid>) {
    let mut tried = |name: &str, worked: bool| {
        let outcome = if worked { "WORKED" } else { "refused" };
        writeln!(report, "attack {name} {outcome}").expect("a string grows");
    };
    for path in [
        "/etc/passwd",
        "/../etc/passwd",
        "/proc/self/status",
        "/sys",
        "/dev/mem",
    ] {
        tried(path, std::fs::metadata(path).is_ok());
    }
    let none = rustix::mount::MountFlags::empty();
    tried(
        "mount",
        rustix::mount::mount("none", "/run", "tmpfs", none, None).is_ok(),
    );
    tried(
        "umount",
        rustix::mount::unmount("/", rustix::mount::UnmountFlags::DETACH).is_ok(),
    );
    let memory = rustix::fs::makedev(1, 1);
    let node = rustix::fs::mknodat(
        CWD,
        "/run/mem",
        FileType::CharacterDevice,
        Mode::RWXU,
        memory,
    );
    tried("mknod", node.is_ok());
    tried("chroot", rustix::process::chroot("/run").is_ok());
    tried(
        "setuid",
        rustix::thread::set_thread_uid(rustix::fs::Uid::ROOT).is_ok(),
    );
    tried(
        "setgid",
        rustix::thread::set_thread_gid(rustix::fs::Gid::ROOT).is_ok(),
    );
    tried("hostname", rustix::system::sethostname(b"mf").is_ok());
    let more = Rlimit {
        current: Some(4096),
        maximum: Some(4096),
    };
    tried(
        "rlimit",
        rustix::process::setrlimit(Resource::Nofile, more).is_ok(),
    );
    if let Some(victim) = victim {
        // One that does no harm. (SIGCONT would get through: all of a session may send it.)
        tried(
            "signal",
            rustix::process::kill_process(victim, Signal::WINCH).is_ok(),
        );
        tried(
            "limits",
            rustix::process::prlimit(Some(victim), Resource::Nofile, more).is_ok(),
        );
    }
    let owner = rustix::fs::chownat(
        CWD,
        "/run",
        Some(rustix::fs::Uid::ROOT),
        None,
        rustix::fs::AtFlags::empty(),
    );
    tried("chown", owner.is_ok());
}
