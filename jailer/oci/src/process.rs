//! Processes of the host, known by their id and the time at which they started: an id alone may be
//! another process's by now.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal};
use serde::{Deserialize, Serialize};

/// A process that was there once.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct Known {
    pub pid: i32,
    /// When it started, in ticks since this host did.
    pub start: u64,
    /// Which start of the host.
    pub boot: String,
}

impl Known {
    /// The process `pid`, which is there.
    pub fn of(pid: i32) -> Option<Known> {
        Some(Known {
            pid,
            start: look(pid)?.start,
            boot: boot(),
        })
    }

    /// A descriptor of it, while it runs. A process that has ended, and whose parent has not taken
    /// notice, does not.
    pub fn open(&self) -> Option<OwnedFd> {
        let pid = Pid::from_raw(self.pid)?;
        let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok()?;
        // Looked at after it was opened: so it is the one that is looked at.
        let now = look(self.pid)?;
        (now.start == self.start && !now.has_ended && self.boot == boot()).then_some(pidfd)
    }

    /// Whether it runs.
    pub fn is_there(&self) -> bool {
        self.open().is_some()
    }
}

/// What /proc says of a process.
struct Looked {
    start: u64,
    has_ended: bool,
}

fn look(pid: i32) -> Option<Looked> {
    parse(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// The name, in parentheses, may hold anything.
fn parse(stat: &str) -> Option<Looked> {
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut words = rest.split_ascii_whitespace();
    let state = words.next()?;
    Some(Looked {
        has_ended: matches!(state, "Z" | "X" | "x"),
        start: words.nth(18)?.parse().ok()?,
    })
}

fn boot() -> String {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
    id.unwrap_or_default().trim().to_owned()
}

/// The process that started this one, by a descriptor, if it is one of those `names`.
pub fn starter(names: &[String]) -> Option<OwnedFd> {
    let parent = rustix::process::getppid()?;
    let pidfd = rustix::process::pidfd_open(parent, PidfdFlags::empty()).ok()?;
    let name = std::fs::read_to_string(format!("/proc/{}/comm", parent.as_raw_nonzero())).ok()?;
    let name = name.trim_end();
    let is_parent = rustix::process::getppid() == Some(parent);
    (is_parent && names.iter().any(|wanted| name.starts_with(kept(wanted)))).then_some(pidfd)
}

/// What the kernel keeps of a process's name: 15 bytes.
fn kept(name: &str) -> &str {
    name.get(..15).unwrap_or(name)
}

/// Processes whose command line has these words one after the other.
pub fn with_words(words: &[&str]) -> Vec<Known> {
    let wanted: Vec<u8> = words
        .iter()
        .flat_map(|word| [word.as_bytes(), b"\0"].concat())
        .collect();
    let has_them = |pid: &i32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.windows(wanted.len().max(1))
            .any(|piece| piece == wanted)
    };
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(has_them).filter_map(Known::of).collect()
}

/// Sends a signal.
pub fn send(pidfd: &OwnedFd, number: i32) -> Result<(), Errno> {
    match number {
        // Engines ask for this to learn whether it is there.
        0 => Ok(()),
        _ => {
            let signal = Signal::from_named_raw(number).ok_or(Errno::INVAL)?;
            rustix::process::pidfd_send_signal(pidfd, signal)
        }
    }
}

/// Waits until it has ended; whether it has.
pub fn wait(pidfd: &OwnedFd, patience: Duration) -> bool {
    let until = Instant::now() + patience;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).unwrap_or_default();
        let mut ended = [PollFd::new(pidfd, PollFlags::IN)];
        match poll(&mut ended, Some(&left)) {
            Ok(0) => return false,
            Ok(_) => return true,
            Err(Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn process_is_known_until_it_ends_and_another_of_its_id_is_not_it() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let known = Known::of(child.id() as i32).unwrap();
        assert!(known.is_there());
        let other = Known {
            start: known.start + 1,
            ..known.clone()
        };
        let earlier = Known {
            boot: "x".into(),
            ..known.clone()
        };
        assert!(!other.is_there() && !earlier.is_there());
        // The kernel lets this process go on before the new program's words are in place.
        let until = Instant::now() + Duration::from_secs(60);
        let words = format!("/proc/{}/cmdline", known.pid);
        while std::fs::read(&words).unwrap().is_empty() && Instant::now() < until {
            std::thread::yield_now();
        }
        assert_eq!(
            with_words(&["sleep", "60"])
                .iter()
                .filter(|it| **it == known)
                .count(),
            1
        );
        let pidfd = known.open().unwrap();
        assert!(!wait(&pidfd, Duration::ZERO));
        send(&pidfd, 9).unwrap();
        assert!(wait(&pidfd, Duration::from_secs(60)));
        // It is still there for its parent.
        assert!(!known.is_there());
        child.wait().unwrap();
        assert!(!known.is_there());
    }

    #[test]
    fn stat_is_read_behind_the_name() {
        let stat = "7 (a) R 1) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20";
        let looked = parse(stat).unwrap();
        assert!((looked.start, looked.has_ended) == (4242, false));
        assert!(parse(&stat.replace(") S", ") Z")).unwrap().has_ended);
        assert!(parse("7 (a) S 1 2").is_none());
    }
}
