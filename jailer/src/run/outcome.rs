//! How a microVM ended: one word, one exit code and one sentence for each way, and the report.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags};
use rustix::io::Errno;
use serde_json::{Value, json};

use crate::cgroup::exclusive::Usage;
use crate::failure::{Doing, Failure};
use crate::sys::{self, Ended, Used};

/// The microVM could not be started.
pub const NOT_STARTED: i32 = 1;
/// The jailer could not learn how it ended.
const UNKNOWN: i32 = 1;
/// As timeout(1) has it.
const TIME_LIMIT: i32 = 124;
/// Above the monitor's own codes.
const MEMORY_LIMIT: i32 = 164;

/// The monitor's words for an orderly end of the guest (`--end-fd`), and the report's too.
pub const ORDERLY: [&str; 2] = ["reset", "shutdown"];

/// What asked for the end of the microVM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// This signal, or the user who left the console (SIGINT then).
    Signal(i32),
    /// The end of the process that started this one.
    Parent,
    /// The hang-up of the descriptor of `--end-with-fd`.
    HangUp,
}

/// What was seen besides the monitor's exit.
#[derive(Debug, Default)]
pub struct Seen {
    /// What the monitor said of the guest's end, if it was one of [`ORDERLY`].
    pub told: Option<&'static str>,
    /// `--timeout` came.
    pub timed_out: bool,
    /// What asked for the end.
    pub asked: Option<Asked>,
    /// What the control groups counted.
    pub account: Usage,
}

impl Seen {
    /// Whether the kernel ended a monitor that ended like this for want of memory in its group.
    pub fn was_memory_limit(&self, ended: Ended) -> bool {
        ended == Ended::Killed(libc::SIGKILL) && self.account.out_of_memory > 0
    }
}

/// How it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// For programs.
    pub word: &'static str,
    /// For shells.
    pub code: i32,
    /// For people; empty when there is nothing to say.
    pub sentence: String,
}

impl Verdict {
    /// From all that is known.
    pub fn of(ended: Ended, seen: &Seen) -> Verdict {
        let of = |word, code, sentence: &str| Verdict {
            word,
            code,
            sentence: sentence.to_owned(),
        };
        if seen.timed_out {
            return of(
                "time-limit",
                TIME_LIMIT,
                "the time limit (--timeout) ended the microVM",
            );
        }
        // The two that are no signal are reported as SIGHUP, which a terminal sends in that case.
        let stopped = |signal, sentence: String| Verdict {
            word: "stopped",
            code: 128 + signal,
            sentence,
        };
        match seen.asked {
            Some(Asked::Signal(signal)) => {
                let sentence = format!("signal {signal} asked for the end of the microVM");
                return stopped(signal, sentence);
            }
            Some(Asked::Parent) => {
                let sentence = "the process that started mayfly-jailer ended (--with-parent)";
                return stopped(libc::SIGHUP, sentence.into());
            }
            Some(Asked::HangUp) => {
                let sentence = "the other end of the descriptor was closed (--end-with-fd)";
                return stopped(libc::SIGHUP, sentence.into());
            }
            None => {}
        }
        if seen.was_memory_limit(ended) {
            return of(
                "memory-limit",
                MEMORY_LIMIT,
                "the memory limit of its control group ended the microVM",
            );
        }
        match ended {
            Ended::Exited(0) => of(seen.told.unwrap_or("ended"), 0, ""),
            Ended::Exited(code @ 1) => of("error", code, "the monitor failed; its log says why"),
            Ended::Exited(code @ 148) => of(
                "seccomp",
                code,
                "the monitor made a system call that its filter denies",
            ),
            Ended::Exited(code @ 149) => of(
                "file-cut-short",
                code,
                "a file mapped into the guest was cut short",
            ),
            Ended::Exited(code @ 160) => of("crash", code, "the guest crashed (triple fault)"),
            Ended::Exited(code @ 161) => {
                of("not-runnable", code, "KVM cannot run the guest any further")
            }
            Ended::Exited(code @ 162) => {
                of("worker-failed", code, "a device of the monitor failed")
            }
            Ended::Exited(code @ 152..=153) => of(
                "refused",
                code,
                "the monitor did not understand its arguments: do the versions match?",
            ),
            Ended::Exited(code @ (150 | 157 | 163)) => of(
                "fault",
                code,
                "the monitor found itself wrong: this is a bug in it",
            ),
            Ended::Exited(code @ 129..=192) => Verdict {
                word: "killed",
                code,
                sentence: format!("the monitor ended with code {code}, as for a signal or limit"),
            },
            Ended::Exited(code) => Verdict {
                word: "fault",
                code,
                sentence: format!("the monitor ended with code {code}, which it does not have"),
            },
            Ended::Killed(
                signal @ (libc::SIGSEGV | libc::SIGBUS | libc::SIGILL | libc::SIGABRT),
            ) => Verdict {
                word: "fault",
                code: 128 + signal,
                sentence: format!("signal {signal} ended the monitor: this is a bug in it"),
            },
            Ended::Killed(libc::SIGSYS) => of(
                "seccomp",
                148,
                "the monitor made a system call that its filter denies",
            ),
            Ended::Killed(signal) => Verdict {
                word: "killed",
                code: 128 + signal,
                sentence: format!("signal {signal} ended the monitor"),
            },
        }
    }

    /// Its end was not to be had.
    pub fn unknown(failure: &Failure) -> Verdict {
        Verdict {
            word: "unknown",
            code: UNKNOWN,
            sentence: failure.to_string(),
        }
    }

    /// The supervisor was killed, and the monitor ended with it; the keeper reports that.
    pub fn jailer_killed() -> Verdict {
        Verdict {
            word: "jailer-killed",
            code: 128 + libc::SIGKILL,
            sentence: "mayfly-jailer was killed, and the microVM ended with it".into(),
        }
    }

    /// It never ran.
    pub fn not_started(failure: &Failure) -> Verdict {
        Verdict {
            word: "not-started",
            code: NOT_STARTED,
            sentence: failure.to_string(),
        }
    }
}

/// When what happened, in microseconds since the jailer began.
#[derive(Clone, Copy, Debug, Default)]
pub struct Times {
    /// Everything was opened, the jail is asked for.
    pub asked_us: Option<u64>,
    /// The jail stands.
    pub jailed_us: Option<u64>,
    /// The control groups hold the monitor.
    pub limited_us: Option<u64>,
    /// The monitor runs.
    pub executed_us: Option<u64>,
    /// The monitor has started the guest.
    pub started_us: Option<u64>,
    /// The guest's first byte on the console.
    pub first_byte_us: Option<u64>,
    /// The monitor is gone.
    pub ended_us: Option<u64>,
}

impl Times {
    /// With their names, in order.
    pub fn steps(&self) -> [(&'static str, Option<u64>); 7] {
        [
            ("asked_us", self.asked_us),
            ("jailed_us", self.jailed_us),
            ("limited_us", self.limited_us),
            ("executed_us", self.executed_us),
            ("started_us", self.started_us),
            ("first_byte_us", self.first_byte_us),
            ("ended_us", self.ended_us),
        ]
    }
}

/// The report's place, taken before anything else: an unnamed file that gets its name when it is
/// written, so that a run that is killed leaves none.
#[derive(Debug)]
pub struct Report {
    path: PathBuf,
    file: File,
    /// Where to link the unnamed file; none if the file has its name already.
    link: Option<(OwnedFd, OsString)>,
}

impl Report {
    /// Makes sure that it can be written.
    pub fn open(path: &Path) -> Result<Report, Failure> {
        let what = format!("make the exit report {}", path.display());
        let kind = rustix::fs::stat(path).map(|stat| FileType::from_raw_mode(stat.st_mode));
        let is_other = kind.is_ok_and(|kind| !kind.is_file());
        // The caller's own link to a file stays one: what is replaced is the file. Any user may have
        // put one into a folder such as /tmp: that is replaced itself.
        let is_trusted = rustix::fs::lstat(path)
            .is_ok_and(|link| [0, rustix::process::geteuid().as_raw()].contains(&link.st_uid));
        let real = path.canonicalize().ok().filter(|_| is_trusted && !is_other);
        let path = real.as_deref().unwrap_or(path);
        let mode = Mode::from_raw_mode(0o644);
        let name = path.file_name().filter(|_| !is_other);
        let folder = path
            .parent()
            .filter(|folder| !folder.as_os_str().is_empty());
        if let Some(name) = name {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let folder = rustix::fs::open(folder.unwrap_or(Path::new(".")), flags, Mode::empty())
                .doing(&what)?;
            // Whether it can be a name there, and whether what has it may be replaced.
            match rustix::fs::statat(&folder, name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(old) => {
                    let place = rustix::fs::fstat(&folder).doing(&what)?;
                    let own = rustix::process::geteuid();
                    let is_ours =
                        own.is_root() || [old.st_uid, place.st_uid].contains(&own.as_raw());
                    if Mode::from_raw_mode(place.st_mode).contains(Mode::SVTX) && !is_ours {
                        let why =
                            "it is somebody else's, in a folder where each replaces their own";
                        return Err(Failure::new(what, why));
                    }
                }
                Err(Errno::NOENT) => {}
                Err(error) => return Err(Failure::new(what, error)),
            }
            let flags = OFlags::WRONLY | OFlags::TMPFILE | OFlags::CLOEXEC;
            // Some file systems have no files without a name.
            if let Ok(file) = rustix::fs::openat(&folder, ".", flags, mode) {
                return Ok(Report {
                    path: path.to_owned(),
                    file: file.into(),
                    link: Some((folder, name.to_owned())),
                });
            }
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = rustix::fs::open(path, flags | OFlags::NOCTTY, mode).doing(&what)?;
        Ok(Report {
            path: path.to_owned(),
            file: file.into(),
            link: None,
        })
    }

    /// What another process needs to write it: descriptors to pass on, and the rest for [`Report::of`].
    pub fn parts(&self) -> (Vec<BorrowedFd<'_>>, PathBuf, Option<OsString>) {
        let folder = self.link.as_ref().map(|(folder, _)| folder.as_fd());
        let files = std::iter::once(self.file.as_fd()).chain(folder).collect();
        let name = self.link.as_ref().map(|(_, name)| name.clone());
        (files, self.path.clone(), name)
    }

    /// The report of those [`Report::parts`].
    pub fn of(files: Vec<OwnedFd>, path: PathBuf, name: Option<OsString>) -> Option<Report> {
        let mut files = files.into_iter();
        let file = files.next()?.into();
        let link = files.next().zip(name);
        Some(Report { path, file, link })
    }

    /// Whether any process has written it, as far as can be told: a pipe does not tell.
    pub fn is_written(&self) -> bool {
        let stat = rustix::fs::fstat(&self.file);
        stat.is_ok_and(|stat| match self.link {
            Some(_) => stat.st_nlink > 0,
            None => stat.st_size > 0,
        })
    }

    /// Writes it, whole or not at all.
    pub fn write(&self, facts: &Value) -> Result<(), Failure> {
        let what = format!("write the exit report {}", self.path.display());
        let text = format!("{facts:#}\n");
        std::io::Write::write_all(&mut &self.file, text.as_bytes()).doing(&what)?;
        let Some((folder, name)) = &self.link else {
            let size = rustix::fs::ftruncate(&self.file, text.len() as u64);
            // A pipe or device has no size.
            return size.or(Ok(()));
        };
        // By way of a second name, since a link does not replace what is there. It has nothing of the
        // first, which may be as long as a name can be; processes of one number are told apart by
        // the time.
        let aside = format!(".mayfly-{}-{:x}", std::process::id(), sys::monotonic_us());
        let own = format!(
            "/proc/self/fd/{}",
            std::os::fd::AsRawFd::as_raw_fd(&self.file)
        );
        rustix::fs::linkat(CWD, own, folder, &aside, AtFlags::SYMLINK_FOLLOW)
            .and_then(|()| {
                let renamed = rustix::fs::renameat(folder, &aside, folder, name);
                if renamed.is_err() {
                    let _ = rustix::fs::unlinkat(folder, &aside, AtFlags::empty());
                }
                renamed
            })
            .doing(what)
    }
}

/// What the report says.
pub fn facts(
    id: &str,
    verdict: &Verdict,
    ended: Option<(Ended, Used)>,
    seen: &Seen,
    times: &Times,
) -> Value {
    let began = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let wall_us = times.ended_us.unwrap_or(0);
    let (exit_code, signal) = match ended {
        Some((Ended::Exited(code), _)) => (Some(code), None),
        Some((Ended::Killed(signal), _)) => (None, Some(signal)),
        None => (None, None),
    };
    let used = ended.map(|(_, used)| used).unwrap_or_default();
    let steps: serde_json::Map<String, Value> = times
        .steps()
        .into_iter()
        .map(|(name, time)| (name.to_owned(), time.into()))
        .collect();
    json!({
        "id": id,
        "ended": verdict.word,
        "exit_code": verdict.code,
        "sentence": verdict.sentence,
        "monitor": { "exit_code": exit_code, "signal": signal },
        "ended_at_unix_ms": began.as_millis() as u64,
        "wall_us": wall_us,
        "cpu_us": used.cpu_us,
        "peak_memory_bytes": seen.account.peak_memory.unwrap_or(used.peak_memory),
        "peak_memory_by": if seen.account.peak_memory.is_some() { "cgroup" } else { "process" },
        "out_of_memory_kills": seen.account.out_of_memory,
        "times": steps,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(ended: Ended, seen: Seen) -> (&'static str, i32) {
        let verdict = Verdict::of(ended, &seen);
        (verdict.word, verdict.code)
    }

    #[test]
    fn every_end_has_its_word_and_code() {
        let seen = Seen::default;
        let out_of_memory = || Seen {
            account: Usage {
                out_of_memory: 1,
                peak_memory: None,
            },
            ..seen()
        };
        let cases = [
            (
                Ended::Exited(0),
                Seen {
                    told: Some("shutdown"),
                    ..seen()
                },
                ("shutdown", 0),
            ),
            (
                Ended::Exited(0),
                Seen {
                    told: Some("reset"),
                    ..seen()
                },
                ("reset", 0),
            ),
            (Ended::Exited(0), seen(), ("ended", 0)),
            (Ended::Exited(1), seen(), ("error", 1)),
            (Ended::Exited(148), seen(), ("seccomp", 148)),
            (Ended::Exited(160), seen(), ("crash", 160)),
            (Ended::Exited(161), seen(), ("not-runnable", 161)),
            (Ended::Exited(162), seen(), ("worker-failed", 162)),
            (Ended::Exited(163), seen(), ("fault", 163)),
            (Ended::Exited(143), seen(), ("killed", 143)),
            (Ended::Exited(7), seen(), ("fault", 7)),
            (Ended::Killed(9), seen(), ("killed", 137)),
            (Ended::Killed(11), seen(), ("fault", 139)),
            (Ended::Killed(31), seen(), ("seccomp", 148)),
            (Ended::Killed(9), out_of_memory(), ("memory-limit", 164)),
            (Ended::Exited(0), out_of_memory(), ("ended", 0)),
            (
                Ended::Killed(9),
                Seen {
                    timed_out: true,
                    ..seen()
                },
                ("time-limit", 124),
            ),
            (
                Ended::Exited(143),
                Seen {
                    asked: Some(Asked::Signal(15)),
                    ..seen()
                },
                ("stopped", 143),
            ),
        ];
        for asked in [Asked::Parent, Asked::HangUp] {
            let seen = Seen {
                asked: Some(asked),
                ..seen()
            };
            assert_eq!(word(Ended::Killed(9), seen), ("stopped", 129));
        }
        for (ended, seen, expected) in cases {
            assert_eq!(word(ended, seen), expected, "{ended:?}");
        }
    }

    #[test]
    fn report_has_no_name_until_it_is_written_and_replaces_an_old_one() {
        let folder = crate::testing::Folder::new("report");
        let path = folder.path().join("r.json");
        let report = Report::open(&path).unwrap();
        assert!(!path.exists() && !report.is_written());
        report.write(&json!({ "a": 1 })).unwrap();
        Report::open(&path)
            .unwrap()
            .write(&json!({ "a": 2 }))
            .unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(
            serde_json::from_str::<Value>(&text).unwrap(),
            json!({ "a": 2 })
        );
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        let through_link = Report::open(&link).unwrap();
        let (files, at, name) = through_link.parts();
        let files = files.iter().map(|fd| fd.try_clone_to_owned().unwrap());
        let passed = Report::of(files.collect(), at, name).unwrap();
        passed.write(&json!({ "a": 3 })).unwrap();
        assert!(through_link.is_written() && link.is_symlink());
        assert!(std::fs::read_to_string(&path).unwrap().contains('3'));
        std::fs::remove_file(&link).unwrap();
        assert!(Report::open(&folder.path().join("none/r.json")).is_err());
        assert!(Report::open(folder.path()).is_err());
        assert!(Report::open(&folder.path().join("x".repeat(256))).is_err());
        let path = folder.path().join("x".repeat(255));
        let report = Report::open(&path).unwrap();
        report.write(&json!({ "a": 3 })).unwrap();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
    }
}
