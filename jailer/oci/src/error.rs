//! Errors of this program, and the engine's channels for them.
//!
//! What is refused for what it is has a variant in an enum of its module. What the kernel did not do is
//! a [`Failure`], which says what it was to do. `main` prints the chain once: as one line to standard
//! error, and, where the engine named a log (`--log`), as one record there.

use std::borrow::Cow;
use std::error::Error;
use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::OFlags;
use serde_json::json;

use crate::args::LogFormat;

/// Any error.
pub type AnyError = Box<dyn Error>;

/// A step failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {work}")]
pub struct Failure {
    work: Cow<'static, str>,
    #[source]
    cause: AnyError,
}

/// The result of a step.
pub trait Step<T> {
    /// Says what it was to do, as an imperative.
    fn step(self, work: impl Into<Cow<'static, str>>) -> Result<T, Failure>;
    /// The same of what is done to a path.
    fn step_on(self, work: &str, path: impl AsRef<Path>) -> Result<T, Failure>;
}

impl<T, E: Into<AnyError>> Step<T> for Result<T, E> {
    fn step(self, work: impl Into<Cow<'static, str>>) -> Result<T, Failure> {
        self.map_err(|cause| Failure {
            work: work.into(),
            cause: cause.into(),
        })
    }

    fn step_on(self, work: &str, path: impl AsRef<Path>) -> Result<T, Failure> {
        self.step(format!("{work} {}", path.as_ref().display()))
    }
}

/// The error and its causes, in one line without control characters.
pub fn message(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text.replace(char::is_control, "?")
}

/// How much a record in the log matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// What was asked for, and is not done.
    Error,
    /// What was asked for, and is left out.
    Warning,
}

impl Level {
    fn name(self) -> &'static str {
        match self {
            Level::Error => "error",
            Level::Warning => "warning",
        }
    }
}

/// Where engines read what went wrong (`--log`), if they named a file.
#[derive(Debug, Default)]
pub struct Log {
    file: Option<File>,
    format: LogFormat,
}

impl Log {
    /// Opens it.
    pub fn open(path: Option<&Path>, format: LogFormat) -> Result<Log, Failure> {
        let open = |path: &Path| {
            // NONBLOCK: a pipe that has no reader, or a slow one, must not hold up a container.
            let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits() as i32;
            let mut options = File::options();
            let opened = options
                .append(true)
                .create(true)
                .custom_flags(flags)
                .open(path);
            opened.step_on("open the log (--log)", path)
        };
        Ok(Log {
            file: path.map(open).transpose()?,
            format,
        })
    }

    /// Writes a record, in one piece: others may write to the same file.
    pub fn write(&self, level: Level, text: &str) {
        let Some(mut file) = self.file.as_ref() else {
            return;
        };
        let (time, level) = (now(), level.name());
        let mut line = match self.format {
            LogFormat::Json => json!({ "level": level, "msg": text, "time": time }).to_string(),
            LogFormat::Text => format!("time=\"{time}\" level={level} msg={text:?}"),
        };
        line.push('\n');
        // A log that cannot be written to does not keep a container from anything.
        let _ = file.write_all(line.as_bytes());
    }
}

/// The time of day in UTC, as RFC 3339 has it.
pub fn now() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    rfc3339(now.unwrap_or_default().as_secs())
}

/// The same of a number of seconds since 1970.
fn rfc3339(seconds: u64) -> String {
    let (mut days, rest) = (seconds / 86_400, seconds % 86_400);
    let is_leap =
        |year: u64| year.is_multiple_of(4) && !year.is_multiple_of(100) || year.is_multiple_of(400);
    let mut year = 1970;
    loop {
        let length = 365 + u64::from(is_leap(year));
        if days < length {
            break;
        }
        days -= length;
        year += 1;
    }
    let february = 28 + u64::from(is_leap(year));
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!(
        "{year:04}-{month:02}-{:02}T{hour:02}:{minute:02}:{second:02}Z",
        days + 1
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_as_date_prints_them() {
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_796_083_199, "2026-11-30T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(rfc3339(seconds), expected);
        }
    }

    #[test]
    fn message_is_one_line_with_the_causes() {
        let error = Err::<(), _>("a\nb").step("do it").unwrap_err();
        assert_eq!(message(&error), "cannot do it: a?b");
    }

    #[test]
    fn records_are_lines_of_the_format_that_was_asked_for() {
        let path = std::env::temp_dir().join(format!("mayfly-oci-log-{}", std::process::id()));
        for format in [LogFormat::Json, LogFormat::Text] {
            let log = Log::open(Some(&path), format).unwrap();
            log.write(Level::Error, "no \"x\"");
        }
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let (json, plain) = text.trim_end().split_once('\n').unwrap();
        let json: serde_json::Value = serde_json::from_str(json).unwrap();
        assert_eq!(
            (&json["level"], &json["msg"]),
            (&"error".into(), &"no \"x\"".into())
        );
        assert!(
            plain.ends_with("level=error msg=\"no \\\"x\\\"\""),
            "{plain}"
        );
        Log::default().write(Level::Warning, "to nowhere");
    }

    #[test]
    fn log_that_is_a_pipe_without_a_reader_is_refused_and_not_waited_for() {
        let path = std::env::temp_dir().join(format!("mayfly-oci-pipe-{}", std::process::id()));
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, mode).unwrap();
        let opened = Log::open(Some(&path), LogFormat::Json);
        std::fs::remove_file(&path).unwrap();
        assert!(message(&opened.unwrap_err()).contains("--log"));
    }
}
