//! The command line.

use std::path::PathBuf;
use std::str::FromStr;

use crate::failure::{Failure, Result};
use crate::jail;
use crate::monitor::{CommandLine, Monitor};
use crate::snapshot;

/// What `--help` prints.
pub const USAGE: &str = "\
tools/bench FIGURE [OPTIONS]: measures mayfly beside a floor (a program that makes only the unavoidable KVM calls) and
beside other monitors, interleaved round by round in rotating order.

figures
  start      exec to first guest byte and to the end of the process, by configuration file; tiny and 20 MiB kernels
  api        exec to socket ready, to configured, to first guest byte, by API requests
  api-load   how long GET / takes beside a halted guest and beside one that writes
  limits     rate limiters: how exact they are, and how soon a change takes hold (needs root)
  console    1 MiB of guest output: time and processor time; system calls for each byte of it, and over a boot of Linux
  memory     private dirty memory of the monitor; PSS per VM of 8 VMs with one 20 MiB kernel
  density    host memory and PSS per VM of many idle VMs; starts per second
  life       exec to the end of the process, processor time of a life, lives per second
  snapshot   restore to first guest byte and ping reply; pauses for full and diff snapshots and forks; clones (needs root)
  block      a disk under load: requests and bytes per second, processor time of a request
  overlay    mayfly's disk under the same load with an overlay, in a file and in memory, beside one without
  all        block and net
  net        a network interface under load: frames per second both ways, time to and fro (needs root)
  linux      a disk and TCP under a Linux guest: meaningful on hosts with hardware KVM only (needs root)
  oci        containers: create to first byte, exec, whole lives, many at once; warm, cold and by other runtimes (needs root)
  jail       exec to first guest byte and to the end, and lives per second, in and out of jails (needs root)

options
  --with NAME=PATH   also measure this monitor, which has Firecracker's command line (oci: this runtime, runc say); may be
                     repeated
  --extra NAME=WORDS more words (split at spaces) for that monitor's command line, --seccomp-filter FILE say
  --jailer NAME=PATH jail: also start that monitor by this jailer, which has Firecracker's command line
  --mayfly PATH      measure this executable as mayfly, in place of the one just built; jail and oci: the other programs
                     are beside it
  --no-mayfly        leave mayfly out
  --probe PATH       api-load, limits, snapshot, block, overlay, net and all: the probe guest, in place of the one just built
  --linux DIR        console, snapshot, linux and oci: the folder that tools/guest made (target/guest)
  --runs N           rounds that count (start, api, life and jail: 30; snapshot: 20, and fewer where a round takes
                     seconds; api-load, limits, block, overlay, net, all and oci: 5; others: 3)
  --vms N            VMs at once, for density (50), snapshot (1000) and oci (50)
  --row NAME         snapshot: only restore, full, fork, diff, clones, working-set or linux; block, overlay, net and all: only
                     the cases whose names hold NAME ('depth 32'); may be repeated
  --media DIR        block and overlay: where the disk lies (/dev/shm, which is tmpfs)
  --span MS          block, overlay, net and all: how long each case takes in each round (1000)
  --devices          start and api: with one drive and one network interface (needs root)
  --svg FILE         block, net and all: also draw the comparison to FILE
  --commit TEXT      the commit that was built, for --json and --svg (tools/bench gives it)
  --json FILE        also write every sample to FILE

On a machine with other work, `chrt -r 5 tools/bench ...` (root) measures what is started here before that work; where
there is no chrt, `nice -n -20` helps a little.
";

/// Which measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// See `start`.
    Start,
    /// See `api`.
    Api,
    /// See `api_load`.
    ApiLoad,
    /// See `limits`.
    Limits,
    /// See `console`.
    Console,
    /// See `memory`.
    Memory,
    /// See `density`.
    Density,
    /// See `life`.
    Life,
    /// See `snapshot`.
    Snapshot,
    /// See `jail`.
    Jail,
    /// Disks: see `load`.
    Block,
    /// Disks with an overlay: see `load`.
    Overlay,
    /// Network interfaces: see `load`.
    Net,
    /// Both.
    All,
    /// A disk under a Linux guest: see `load`.
    Linux,
    /// See `oci`.
    Oci,
}

/// What was asked for.
#[derive(Debug)]
pub struct Args {
    /// Which measurement.
    pub which: Which,
    /// Whom to measure: the floor, mayfly, then the others.
    pub monitors: Vec<Monitor>,
    /// Rounds that count.
    pub runs: usize,
    /// VMs at once.
    pub vms: usize,
    /// What of `snapshot`, `block` or `net` to measure; all of it if there are none.
    pub rows: Vec<String>,
    /// With a drive and a network interface.
    pub devices: bool,
    /// The probe guest, for the figures that need it.
    pub probe: Option<PathBuf>,
    /// Where disks under load lie.
    pub media: PathBuf,
    /// How long each load lasts, in milliseconds.
    pub span_ms: usize,
    /// Where Linux for the guest lies.
    pub linux: Option<PathBuf>,
    /// The jailers with Firecracker's command line, by the monitor's name.
    pub jailers: Vec<(String, PathBuf)>,
    /// Where the picture goes.
    pub svg: Option<PathBuf>,
    /// The commit that was built.
    pub commit: Option<String>,
    /// Where the samples go.
    pub json: Option<PathBuf>,
}

/// The name our own monitor is measured under.
pub const OURS: &str = "mayfly";

/// Reads the command line (without the program's name); nothing if help was asked for. `floor` is the floor program.
pub fn parse(words: impl IntoIterator<Item = String>, floor: PathBuf) -> Result<Option<Args>> {
    let mut words = words.into_iter();
    let (mut which, mut runs, mut json) = (None, None, None);
    let (mut vms, mut devices, mut probe) = (None, false, None);
    let mut rows = Vec::new();
    let (mut svg, mut commit) = (None, None);
    let (mut media, mut span_ms) = (PathBuf::from("/dev/shm"), 1000);
    let (mut ours, mut with_ours, mut linux) = (None, true, None);
    let mut others = Vec::new();
    let mut extras = Vec::new();
    let mut jailers = Vec::new();
    while let Some(word) = words.next() {
        let mut value = || value_of(&word, &mut words);
        match word.as_str() {
            "--help" | "-h" => return Ok(None),
            "start" => which = Some(Which::Start),
            "api" => which = Some(Which::Api),
            "api-load" => which = Some(Which::ApiLoad),
            "limits" => which = Some(Which::Limits),
            "console" => which = Some(Which::Console),
            "memory" => which = Some(Which::Memory),
            "density" => which = Some(Which::Density),
            "life" => which = Some(Which::Life),
            "snapshot" => which = Some(Which::Snapshot),
            "jail" => which = Some(Which::Jail),
            "block" => which = Some(Which::Block),
            "overlay" => which = Some(Which::Overlay),
            "net" => which = Some(Which::Net),
            "linux" => which = Some(Which::Linux),
            "all" => which = Some(Which::All),
            "oci" => which = Some(Which::Oci),
            "--with" => others.push(named(&word, &value()?)?),
            "--extra" => extras.push(named(&word, &value()?)?),
            "--jailer" => {
                let (name, path) = named(&word, &value()?)?;
                jailers.push((name, PathBuf::from(path)));
            }
            "--mayfly" => ours = Some(value()?),
            "--probe" => probe = Some(PathBuf::from(value()?)),
            "--linux" => linux = Some(PathBuf::from(value()?)),
            "--no-mayfly" => with_ours = false,
            "--runs" => runs = Some(count(&word, &value()?)?),
            "--vms" => vms = Some(count(&word, &value()?)?),
            "--media" => media = PathBuf::from(value()?),
            "--span" => span_ms = count(&word, &value()?)?,
            "--row" => rows.push(value()?),
            "--devices" => devices = true,
            "--svg" => svg = Some(PathBuf::from(value()?)),
            "--commit" => commit = Some(value()?),
            "--json" => json = Some(PathBuf::from(value()?)),
            _ => return Err(unknown(&word)),
        }
    }
    let which = which.ok_or_else(|| {
        Failure::new(
            "say what to measure: start, api, api-load, limits, console, memory, density, life, snapshot, jail, block, net, all, linux or oci",
        )
    })?;
    if devices && !matches!(which, Which::Start | Which::Api) {
        return Err(Failure::new("--devices goes with start and api only"));
    }
    let mut monitors = vec![monitor("floor", floor, CommandLine::Floor)?];
    if with_ours {
        let path = ours.ok_or_else(|| Failure::new("say which mayfly: --mayfly PATH"))?;
        monitors.push(monitor(OURS, path.into(), CommandLine::Firecracker)?);
    }
    let theirs = match which {
        Which::Oci => CommandLine::Runtime,
        _ => CommandLine::Firecracker,
    };
    for (name, path) in others {
        if monitors.iter().any(|known| known.name == name) {
            return Err(Failure::new(format!("two monitors are called {name}")));
        }
        monitors.push(monitor(&name, path.into(), theirs)?);
    }
    for (name, words) in extras {
        let known = monitors
            .iter_mut()
            .find(|known| known.name == name)
            .ok_or_else(|| Failure::new(format!("--extra names {name}, which is not measured")))?;
        known
            .extra
            .extend(words.split_whitespace().map(str::to_owned));
    }
    if !jailers.is_empty() && which != Which::Jail {
        return Err(Failure::new("--jailer goes with jail only"));
    }
    jail::check(&monitors, &jailers)?;
    let usual = match which {
        Which::Start | Which::Api | Which::Life | Which::Jail => 30,
        Which::Snapshot => 20,
        Which::ApiLoad
        | Which::Limits
        | Which::Block
        | Which::Overlay
        | Which::Net
        | Which::All
        | Which::Oci => 5,
        Which::Console | Which::Memory | Which::Density | Which::Linux => 3,
    };
    match which {
        Which::Snapshot => snapshot::check_rows(&rows)?,
        Which::Block | Which::Overlay | Which::Net | Which::All | Which::Linux => {}
        _ if rows.is_empty() => {}
        _ => {
            return Err(Failure::new(
                "--row goes with snapshot, block, overlay, net, all and linux only",
            ));
        }
    }
    let has_load = matches!(which, Which::Block | Which::Net | Which::All);
    if svg.is_some() && !has_load && which != Which::Linux {
        return Err(Failure::new(
            "--svg goes with block, net, all and linux only",
        ));
    }
    let needs_probe = has_load
        || matches!(
            which,
            Which::ApiLoad | Which::Limits | Which::Snapshot | Which::Overlay
        );
    if needs_probe && probe.is_none() {
        return Err(Failure::new("say which probe guest: --probe PATH"));
    }
    Ok(Some(Args {
        which,
        monitors,
        runs: runs.unwrap_or(usual),
        vms: vms.unwrap_or(if which == Which::Snapshot { 1000 } else { 50 }),
        rows,
        devices,
        probe,
        media,
        span_ms,
        linux,
        jailers,
        svg,
        commit,
        json,
    }))
}

fn named(option: &str, text: &str) -> Result<(String, String)> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() && !value.is_empty() => {
            Ok((name.to_owned(), value.to_owned()))
        }
        _ => Err(Failure::new(format!(
            "{option} takes NAME=VALUE, not {text}"
        ))),
    }
}

/// What follows an option.
pub(crate) fn value_of(option: &str, words: &mut impl Iterator<Item = String>) -> Result<String> {
    words
        .next()
        .ok_or_else(|| Failure::new(format!("{option} needs a value")))
}

/// A word that no option is.
pub(crate) fn unknown(word: &str) -> Failure {
    Failure::new(format!("{word} is not known here; --help lists what is"))
}

/// A number above 0.
pub(crate) fn count<T: FromStr + Default + PartialOrd>(option: &str, text: &str) -> Result<T> {
    match text.parse() {
        Ok(number) if number > T::default() => Ok(number),
        _ => Err(Failure::new(format!(
            "{option} takes a number above 0, not {text}"
        ))),
    }
}

fn monitor(name: &str, path: PathBuf, command_line: CommandLine) -> Result<Monitor> {
    let path = path.canonicalize().map_err(|error| {
        Failure::new(format!("cannot find {name} at {}: {error}", path.display()))
    })?;
    Ok(Monitor {
        name: name.to_owned(),
        path,
        command_line,
        extra: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<Option<Args>> {
        parse(text.split(' ').map(str::to_owned), "/proc/self/exe".into())
    }

    #[test]
    fn figure_when_given_with_monitors_keeps_their_order() {
        let args = parsed("start --with b=/proc/self/exe --mayfly /proc/self/exe --runs 7");
        let args = args.unwrap().unwrap();
        let names: Vec<&str> = args.monitors.iter().map(|m| m.name.as_str()).collect();
        assert_eq!(names, ["floor", "mayfly", "b"]);
        assert_eq!((args.which, args.runs), (Which::Start, 7));
    }

    #[test]
    fn extra_when_given_is_split_into_words() {
        let args = parsed("start --no-mayfly --with b=/proc/self/exe --extra b=--level").unwrap();
        assert_eq!(args.unwrap().monitors[1].extra, ["--level"]);
    }

    #[test]
    fn mistakes_when_made_are_refused() {
        for mistake in [
            "",
            "start",
            "start --mayfly",
            "start --no-mayfly --runs 0",
            "start --no-mayfly --with firecracker",
            "start --no-mayfly --with floor=/proc/self/exe",
            "start --no-mayfly --with b=/no/such/file",
            "start --no-mayfly --extra b=x",
            "start --no-mayfly --what",
            "memory --no-mayfly --devices",
            "limits --no-mayfly",
            "snapshot --no-mayfly",
            "snapshot --no-mayfly --probe p --row what",
            "start --no-mayfly --row fork",
            "start --no-mayfly --svg x",
            "block --no-mayfly",
            "start --no-mayfly --with b=/proc/self/exe --jailer b=/proc/self/exe",
            "jail --no-mayfly --jailer b=/proc/self/exe",
        ] {
            assert!(parsed(mistake).is_err(), "{mistake:?} was taken");
        }
    }

    #[test]
    fn others_when_containers_are_measured_are_runtimes() {
        let args = parsed("oci --with runc=/proc/self/exe --mayfly /proc/self/exe").unwrap();
        let monitors = args.unwrap().monitors;
        let lines: Vec<CommandLine> = monitors.iter().map(|m| m.command_line).collect();
        use CommandLine::{Firecracker, Floor, Runtime};
        assert_eq!(lines, [Floor, Firecracker, Runtime]);
    }

    #[test]
    fn help_when_asked_for_is_nothing_to_do() {
        assert!(parsed("start --help").unwrap().is_none());
    }
}
