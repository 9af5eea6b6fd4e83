//! `mayfly-jailer check`: whether this host can run microVMs, one line for each requirement,
//! with the remedy; then a built-in guest in the empty jail, with the milliseconds of every step.
//!
//! It changes nothing and works for any user; what it finds holds for that user.

use std::ffi::OsString;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::MemfdFlags;
use rustix::io::Errno;
use rustix::process::Resource;

use crate::args::{ArgsError, Takes, Words, account};
use crate::cgroup::Hierarchies;
use crate::error::{AnyError, Remedy, message};
use crate::guest;
use crate::run::jail::obstacle;
use crate::run::spec::resources::open_tun;
use crate::run::spec::vm::Vm;
use crate::run::spec::{self, Spec};
use crate::run::supervise::start::start;
use crate::run::supervise::{Watch, Watched};
use crate::sys;

/// The built-in guest cannot be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot make the built-in guest")]
struct GuestError(#[source] Errno);

impl Remedy for GuestError {}

/// What `check --help` prints.
pub const HELP: &str = "\
usage: mayfly-jailer check [--mayfly FILE] [--uid UID --gid GID]

Says whether this host can run microVMs, one line for each requirement, then boots a built-in
guest in an empty jail and prints the milliseconds of each step. Ends with 0 if that worked.
";

/// The user and group of the guest when root checks: what the kernel calls nobody.
const NOBODY: u32 = 65_534;
/// How long the guest may take.
const TIMEOUT: Duration = Duration::from_secs(20);
const GUEST_MIB: u64 = 16;

/// What was found.
enum Finding {
    /// As it should be.
    Good(String),
    /// MicroVMs run, with less.
    Less(String, &'static str),
    /// No microVM runs.
    Bad(String, String),
}

/// The words after `check`.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Options {
    mayfly: Option<PathBuf>,
    uid: Option<u32>,
    gid: Option<u32>,
}

const OPTIONS: [(&str, Takes); 3] = [
    ("--mayfly", Takes::Value),
    ("--uid", Takes::Value),
    ("--gid", Takes::Value),
];

/// Understands them; none when help is asked for.
pub fn parse(words: Vec<OsString>) -> Result<Option<Options>, ArgsError> {
    if words.iter().any(|word| word == "--help" || word == "-h") {
        return Ok(None);
    }
    let mut words = Words::sort(words, &OPTIONS, "see check --help")?;
    Ok(Some(Options {
        mayfly: words.one("--mayfly").map(PathBuf::from),
        uid: words.parsed("--uid", |text| account("--uid", text))?,
        gid: words.parsed("--gid", |text| account("--gid", text))?,
    }))
}

/// Checks, and returns the exit code.
pub fn check(options: &Options, began_us: u64) -> i32 {
    sys::survive_writes();
    let mut can_run = true;
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
    for (name, finding) in findings {
        let (mark, text) = match finding {
            Finding::Good(text) => ("ok  ", text),
            Finding::Less(text, remedy) => ("less", format!("{text}; {remedy}")),
            Finding::Bad(text, remedy) => {
                can_run = false;
                ("NO  ", format!("{text}; {remedy}"))
            }
        };
        say(&format!("{mark}  {name}: {text}\n"));
    }
    if !can_run {
        say("This host cannot run microVMs for this user: see the lines marked NO.\n");
        return 1;
    }
    match boot(options, began_us).map(Watch::run) {
        Ok(watched) => conclude(&watched),
        Err(error) => {
            say(&format!("NO    guest: {}\n", message(&*error)));
            1
        }
    }
}

fn say(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}

/// Boots the built-in guest.
fn boot(options: &Options, began_us: u64) -> Result<Watch, AnyError> {
    let or_nobody = |id: Option<u32>| id.or(sys::is_superuser().then_some(NOBODY));
    let owner = spec::owner(or_nobody(options.uid), or_nobody(options.gid))?;
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let kernel = rustix::fs::memfd_create("guest", flags).map_err(GuestError)?;
    rustix::io::write(&kernel, &guest::image()).map_err(GuestError)?;
    let spec = Spec {
        timeout: Some(TIMEOUT),
        first_reply: Some(b"?"),
        ..Spec::of(
            format!("check-{}", std::process::id()),
            sys::monotonic_us().max(began_us),
            owner,
            options.mayfly.as_deref(),
            Some(Vm::of_kernel(kernel, GUEST_MIB)),
        )?
    };
    start(spec, None)
}

/// Says how the guest did.
fn conclude(watched: &Watched) -> i32 {
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
    for (name, time) in watched.times.steps() {
        let name = match name {
            "asked_us" => "everything opened",
            "jailed_us" => "jail stands, API socket made",
            "executed_us" => "monitor runs",
            "started_us" => "monitor says the guest runs",
            "first_byte_us" => "guest's first byte",
            "ended_us" => "guest and jail gone",
            _ => continue,
        };
        if let Some(time) = time {
            say(&format!("      {:>9.3}  {name}\n", time as f64 / 1000.0));
        }
    }
    let timeline = watched.timeline.as_deref().unwrap_or_default();
    if let Ok(serde_json::Value::Object(steps)) = serde_json::from_slice(timeline) {
        say("      of that in the monitor, since it began:\n");
        let mut steps: Vec<(String, u64)> = steps
            .into_iter()
            .filter_map(|(name, time)| Some((name, time.as_u64()?)))
            .collect();
        steps.sort_by_key(|(_, time)| *time);
        for (name, time) in steps {
            let name = name.trim_end_matches("_us").replace('_', " ");
            say(&format!("      {:>9.3}  {name}\n", time as f64 / 1000.0));
        }
    }
    i32::from(!worked)
}

fn kvm() -> Finding {
    match spec::open_kvm() {
        Err(error) => Finding::Bad("/dev/kvm cannot be used".into(), message(&error)),
        Ok(_) => {
            let has = |module: &str| Path::new("/sys/module").join(module).exists();
            let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
            let nested = flags.split_whitespace().any(|flag| flag == "hypervisor");
            let nested = if nested {
                ", itself in a virtual machine"
            } else {
                ""
            };
            if has("kvm_pvm") {
                return Finding::Less(
                    "software KVM (kvm_pvm): guest kernels are emulated".into(),
                    "use a guest kernel made for it (tools/guest), or a host with VT-x or SVM",
                );
            }
            let kind = match (has("kvm_intel"), has("kvm_amd")) {
                (true, _) => "Intel",
                (_, true) => "AMD",
                _ => "of a kind that is not known",
            };
            Finding::Good(format!("hardware, {kind}{nested}"))
        }
    }
}

fn namespaces() -> Finding {
    if let Some(found) = obstacle::here() {
        return Finding::Bad(found.reason().into(), found.remedy().into());
    }
    let who = if sys::is_superuser() {
        "root"
    } else {
        "this user"
    };
    Finding::Good(format!(
        "nothing keeps {who} from making them (the guest below proves it)"
    ))
}

fn seccomp() -> Finding {
    let actions = std::fs::read_to_string("/proc/sys/kernel/seccomp/actions_avail");
    match actions {
        Ok(actions) if actions.contains("trap") => Finding::Good("filters".into()),
        Ok(_) => Finding::Bad(
            "filters cannot trap".into(),
            "use Linux 4.14 or newer".into(),
        ),
        Err(_) => Finding::Bad(
            "no filters".into(),
            "use a kernel with CONFIG_SECCOMP_FILTER".into(),
        ),
    }
}

fn landlock() -> Finding {
    match sys::landlock_version() {
        Ok(version) => Finding::Good(format!("version {version}")),
        Err(_) => Finding::Less(
            "this kernel has none: the jail is one wall thinner".into(),
            "boot it with landlock in lsm=, or use Linux 5.13 or newer",
        ),
    }
}

fn taps() -> Finding {
    match open_tun() {
        Ok(_) => Finding::Good("/dev/net/tun can be opened".into()),
        Err(_) => Finding::Less(
            "/dev/net/tun cannot be opened: only a passed tap (--net fd:N) connects a guest".into(),
            "as root: modprobe tun, then chmod 666 /dev/net/tun (it is safe: taps take capabilities)",
        ),
    }
}

fn cgroups() -> Finding {
    let remedy = "limits (--limit) need a group this user may write in: run microVMs under \
                  `systemd-run --user --scope -p Delegate=yes`, or as root";
    let Ok(hierarchies) = Hierarchies::of_host() else {
        return Finding::Less("none mounted".into(), remedy);
    };
    let wanted = ["cpu", "memory", "pids", "io"];
    let offered = hierarchies.offered().unwrap_or_default();
    let found: Vec<String> = wanted
        .iter()
        .filter_map(|&name| {
            let v1 = if name == "io" { "blkio" } else { name };
            if offered.iter().any(|other| other == name) {
                Some(format!("{name} (2)"))
            } else {
                hierarchies.has_v1(v1).then(|| format!("{v1} (1)"))
            }
        })
        .collect();
    if found.len() < wanted.len() {
        let text = format!(
            "only {}",
            if found.is_empty() {
                "none".into()
            } else {
                found.join(", ")
            }
        );
        return Finding::Less(text, remedy);
    }
    if !sys::is_superuser() {
        return Finding::Less(
            format!("{} for those they are delegated to", found.join(", ")),
            remedy,
        );
    }
    Finding::Good(found.join(", "))
}

fn descriptors() -> Finding {
    let most = rustix::process::getrlimit(Resource::Nofile).maximum;
    match most {
        Some(most) if most < 256 => Finding::Less(
            format!("at most {most}: too few for many API clients"),
            "raise ulimit -Hn to 2048",
        ),
        Some(most) => Finding::Good(format!("at most {most}")),
        None => Finding::Good("without limit".into()),
    }
}

fn huge_pages() -> Finding {
    let path = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
    let count = std::fs::read_to_string(path)
        .ok()
        .and_then(|text| text.trim().parse::<u64>().ok());
    match count {
        Some(count) if count > 0 => Finding::Good(format!("{count} of 2 MiB")),
        _ => Finding::Less(
            "none reserved: \"huge_pages\": \"2M\" will be refused".into(),
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
        assert_eq!(line("").unwrap(), Some(Options::default()));
        assert_eq!(line("-h").unwrap(), None);
        let options = line("--mayfly m --uid 3").unwrap().unwrap();
        assert_eq!((options.mayfly, options.uid), (Some("m".into()), Some(3)));
        assert!(line("--nonsense").is_err());
    }
}
