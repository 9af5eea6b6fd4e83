//! `mayfly-jailer check`: whether this host can run microVMs, one line for each requirement,
//! with the remedy; then a built-in guest in the empty jail, with the milliseconds of every step.
//!
//! It changes nothing and works for any user; what it finds holds for that user.

use std::ffi::OsString;
use std::fmt::Display;
use std::io::Write as _;
use std::os::fd::AsRawFd;
use std::path::Path;

use mayfly::wire::tap;
use rustix::fs::MemfdFlags;
use rustix::process::Resource;
use serde_json::Value;

use crate::args::{ArgsError, Known, Words, account, asks_for_help};
use crate::cgroup::hierarchy::Hierarchies;
use crate::error::{AnyError, Step as _, message};
use crate::guest;
use crate::host;
use crate::run::jail::obstacle;
use crate::run::spec::inherited::Passed;
use crate::run::spec::vm::Described;
use crate::run::spec::{self, Spec, options};
use crate::run::supervise::start::start;
use crate::run::supervise::{Progress, Watch};
use crate::sys::{self, Inherited};

/// What `check --help` prints.
pub const HELP: &str = "\
usage: mayfly-jailer check [--mayfly FILE] [--uid UID --gid GID]

Says whether this host can run microVMs, one line for each requirement, then boots a built-in
guest in an empty jail and prints the milliseconds of each step. Ends with 0 if that worked.
";

/// How the guest is run; the time limit is in seconds.
const RUN: &str = "--memory 16 --console none --quiet --timeout 20";
/// The user and group of the guest when root checks: what the kernel calls nobody.
const UNPRIVILEGED: &str = "65534";

/// What was found: a mark, the text and what to do about it.
struct Finding(&'static str, String);

/// As it should be.
const GOOD: &str = "ok  ";
/// No microVM runs.
const BAD: &str = "NO  ";

fn good(text: impl Into<String>) -> Finding {
    Finding(GOOD, text.into())
}

/// MicroVMs run, with less.
fn less(text: impl Display, remedy: &str) -> Finding {
    Finding("less", format!("{text}; {remedy}"))
}

fn bad(text: impl Display, remedy: impl Display) -> Finding {
    Finding(BAD, format!("{text}; {remedy}"))
}

const KNOWN: Known = Known {
    flags: "",
    once: "--mayfly --uid --gid",
    repeatable: "",
    text: "",
    help: "see check --help",
};

/// Makes sure that the words are options of `run` that this takes; none when help is asked for.
pub fn parse(words: Vec<OsString>) -> Result<Option<Vec<OsString>>, ArgsError> {
    if asks_for_help(&words) {
        return Ok(None);
    }
    let mut sorted = Words::sort(words.clone(), &KNOWN)?;
    sorted.parsed("--uid", account)?;
    sorted.parsed("--gid", account)?;
    Ok(Some(words))
}

/// Checks, and returns the exit code.
pub fn check(words: Vec<OsString>, inherited: Inherited, began_us: u64) -> i32 {
    sys::survive_writes();
    let passed = Passed::keep(inherited, Vec::new());
    let findings = [
        ("KVM", kvm()),
        ("namespaces", namespaces()),
        ("seccomp", seccomp()),
        ("Landlock", landlock()),
        ("taps", taps()),
        ("cgroups", cgroups()),
        ("descriptors", descriptors()),
        ("huge pages", huge_pages()),
    ];
    let mut can_run = true;
    for (name, Finding(mark, text)) in findings {
        can_run &= mark != BAD;
        say(&format!("{mark}  {name}: {text}\n"));
    }
    if !can_run {
        say("This host cannot run microVMs for this user: see the lines marked NO.\n");
        return 1;
    }
    match passed.and_then(|passed| boot(words, passed, began_us)) {
        Ok(watch) => conclude(&watch.run().0),
        Err(error) => {
            say(&format!("NO    guest: {}\n", message(&*error)));
            1
        }
    }
}

fn say(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}

/// Boots the built-in guest, as `run` would.
fn boot(mut words: Vec<OsString>, passed: Passed, began_us: u64) -> Result<Watch, AnyError> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let kernel = rustix::fs::memfd_create("guest", flags)
        .and_then(|file| {
            rustix::io::write(&file, &guest::image())?;
            Ok(file)
        })
        .step("make the built-in guest")?;
    for name in ["--uid", "--gid"] {
        if sys::is_superuser() && !words.iter().any(|word| word == name) {
            words.extend([name.into(), UNPRIVILEGED.into()]);
        }
    }
    let kernel_path = format!("/proc/self/fd/{}", kernel.as_raw_fd());
    words.extend([
        "--kernel".into(),
        kernel_path.into(),
        "--cmdline".into(),
        "".into(),
    ]);
    words.extend(RUN.split(' ').map(OsString::from));
    let mut options = options::parse(words)?.ok_or("help is no way to run a guest")?;
    let described = Described::of(&mut options)?;
    let id = format!("check-{}", std::process::id());
    let began_us = sys::monotonic_us().max(began_us);
    let mut spec = Spec::open(options, &id, began_us, (described, passed))?;
    spec.watch.first_reply = Some(b"?");
    start(spec, None)
}

/// Says how the guest did.
fn conclude(watched: &Progress) -> i32 {
    let verdict = watched.verdict();
    let worked = verdict.word == "reset" && watched.times.first_byte_us.is_some();
    if worked {
        say(
            "ok    guest: booted in the empty jail; console output, input and reset work; milliseconds:\n",
        );
    } else {
        let why = if verdict.message.is_empty() {
            verdict.word
        } else {
            &verdict.message
        };
        say(&format!("NO    guest: {why}\n"));
    }
    let milliseconds = |time: u64| format!("{:>9.3}", time as f64 / 1000.0);
    let times = serde_json::json!(watched.times);
    for (name, step) in [
        ("asked_us", "everything opened"),
        ("jailed_us", "jail stands, API socket made"),
        ("executed_us", "monitor runs"),
        ("started_us", "monitor says the guest runs"),
        ("first_byte_us", "guest's first byte"),
        ("ended_us", "guest and jail gone"),
    ] {
        if let Some(time) = times[name].as_u64() {
            say(&format!("      {}  {step}\n", milliseconds(time)));
        }
    }
    let timeline = watched.timeline.as_deref().unwrap_or_default();
    if let Ok(Value::Object(steps)) = serde_json::from_slice(timeline) {
        say("      of that in the monitor, since it began:\n");
        let steps = steps.into_iter();
        let mut steps: Vec<_> = steps
            .filter_map(|(name, time)| Some((time.as_u64()?, name)))
            .collect();
        steps.sort();
        for (time, name) in steps {
            let name = name.trim_end_matches("_us").replace('_', " ");
            say(&format!("      {}  {name}\n", milliseconds(time)));
        }
    }
    i32::from(!worked)
}

fn kvm() -> Finding {
    if let Err(error) = spec::open_kvm() {
        return bad("/dev/kvm cannot be used", message(&*error));
    }
    let has = |module: &str| Path::new("/sys/module").join(module).exists();
    if host::has_software_kvm() {
        return less(
            "software KVM (kvm_pvm): guest kernels are emulated",
            "use a guest kernel made for it (tools/guest), or a host with VT-x or SVM",
        );
    }
    let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let nested = match flags.split_whitespace().any(|flag| flag == "hypervisor") {
        true => ", itself in a virtual machine",
        false => "",
    };
    let kind = match (has("kvm_intel"), has("kvm_amd")) {
        (true, _) => "Intel",
        (_, true) => "AMD",
        _ => "of a kind that is not known",
    };
    good(format!("hardware, {kind}{nested}"))
}

fn namespaces() -> Finding {
    if let Some(found) = obstacle::here() {
        return bad(found.reason, found.remedy);
    }
    let who = match sys::is_superuser() {
        true => "root",
        false => "this user",
    };
    good(format!(
        "nothing keeps {who} from making them (the guest below proves it)"
    ))
}

fn seccomp() -> Finding {
    match std::fs::read_to_string("/proc/sys/kernel/seccomp/actions_avail") {
        Ok(actions) if actions.contains("trap") => good("filters"),
        Ok(_) => bad("filters cannot trap", "use Linux 4.14 or newer"),
        Err(_) => bad("no filters", "use a kernel with CONFIG_SECCOMP_FILTER"),
    }
}

fn landlock() -> Finding {
    match sys::landlock_version() {
        Ok(version) => good(format!("version {version}")),
        Err(_) => less(
            "this kernel has none: the jail is one wall thinner",
            "boot it with landlock in lsm=, or use Linux 5.13 or newer",
        ),
    }
}

fn taps() -> Finding {
    match tap::open_tun() {
        Ok(_) => good("/dev/net/tun can be opened"),
        Err(_) => less(
            "/dev/net/tun cannot be opened: only a passed tap (--net fd:N) connects a guest",
            "as root: modprobe tun, then chmod 666 /dev/net/tun (it is safe: taps take capabilities)",
        ),
    }
}

fn cgroups() -> Finding {
    let remedy = "limits (--limit) need a group this user may write in: run microVMs under \
                  `systemd-run --user --scope -p Delegate=yes`, or as root";
    let Ok(hierarchies) = Hierarchies::of_host() else {
        return less("none mounted", remedy);
    };
    let offered = hierarchies.offered().unwrap_or_default();
    let find = |(v2, v1): (&str, &str)| match offered.iter().any(|name| name == v2) {
        true => Some(format!("{v2} (2)")),
        false => hierarchies.v1(v1).map(|_| format!("{v1} (1)")),
    };
    let wanted = [
        ("cpu", "cpu"),
        ("memory", "memory"),
        ("pids", "pids"),
        ("io", "blkio"),
    ];
    let found: Vec<String> = wanted.into_iter().filter_map(find).collect();
    let text = found.join(", ");
    match found.len() {
        0 => less("only none", remedy),
        count if count < wanted.len() => less(format!("only {text}"), remedy),
        _ if sys::is_superuser() => good(text),
        _ => less(format!("{text} for those they are delegated to"), remedy),
    }
}

fn descriptors() -> Finding {
    let most = rustix::process::getrlimit(Resource::Nofile).maximum;
    match most {
        Some(most) if most < 256 => less(
            format!("at most {most}: too few for many API clients"),
            "raise ulimit -Hn to 2048",
        ),
        Some(most) => good(format!("at most {most}")),
        None => good("without limit"),
    }
}

fn huge_pages() -> Finding {
    let path = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let count = text.trim().parse::<u64>();
    match count {
        Ok(count) if count > 0 => good(format!("{count} of 2 MiB")),
        _ => less(
            "none reserved: \"huge_pages\": \"2M\" will be refused",
            "as root: sysctl -w vm.nr_hugepages=COUNT",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_knows_its_words() {
        let line = |text: &str| parse(text.split_whitespace().map(OsString::from).collect());
        assert_eq!(line("").unwrap(), Some(vec![]));
        assert_eq!(line("-h").unwrap(), None);
        let words = line("--uid 3 --mayfly m").unwrap().unwrap();
        assert_eq!(words, ["--uid", "3", "--mayfly", "m"]);
        assert!(line("--nonsense").is_err());
        assert!(line("--uid x").is_err());
    }
}
