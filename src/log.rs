//! The log: one line at a time, from any thread, to one place.
//!
//! A line is formatted into a buffer on the stack and written by one call into a pipe that never
//! blocks; nothing is allocated and nothing waits. The log thread ([`writer`]) carries lines from
//! the pipe to their place: standard output, or what [`redirect`] was given. A slow or hanging
//! disk, terminal or reader costs lines, which are counted and told with the next line that gets
//! through, and never the time of another thread.
//!
//! Lines that a guest can provoke go through [`guest_warn!`](crate::guest_warn), which limits them
//! for the whole VM to 64 KiB at once and 4 KiB a second after that, and each kind of line to a
//! quarter of that, so that one kind cannot silence the others. Lines never hold bytes that a
//! guest or a client chose: numbers and our own words only.

pub mod firecracker;
mod line;
mod writer;

pub use self::writer::{Writer, flush, is_redirected, redirect, start};

use std::error::Error;
use std::fmt::{Arguments, Write};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

use self::line::{Line, Utc};
use crate::sys::{clock, thread};
pub use crate::wire::Level;

/// The shape of a line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Format {
    /// `time [id:thread] message`
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// What the guest may make us write at once, and in a second, in bytes.
const GUEST_BURST: u64 = 64 * 1024;
const GUEST_RATE: u64 = 4 * 1024;
/// The part of it that one kind of line may have.
const KIND_SHARE: u64 = 4;
const NANOS: u64 = 1_000_000_000;

static LEVEL: AtomicU8 = AtomicU8::new(Level::Info as u8);
static FORMAT: AtomicU8 = AtomicU8::new(Format::Text as u8);
static SHOW_LEVEL: AtomicBool = AtomicBool::new(false);
static SHOW_ORIGIN: AtomicBool = AtomicBool::new(false);
/// Lines lost that no line has told of yet, and all of them.
static LOST: AtomicU64 = AtomicU64::new(0);
static LOST_EVER: AtomicU64 = AtomicU64::new(0);
static SUPPRESSED: AtomicU64 = AtomicU64::new(0);
/// The guest's budget as a time: it moves forward by each line's cost and may not run further
/// ahead of the clock than a whole burst costs.
static GUEST_SPENT_UNTIL: AtomicU64 = AtomicU64::new(0);
static INSTANCE: OnceLock<String> = OnceLock::new();
static MODULE: OnceLock<String> = OnceLock::new();

/// The instance named in each line. Only the first call counts.
pub fn set_instance(id: &str) {
    let _ = INSTANCE.set(id.to_owned());
}

/// Only lines from modules whose path begins with `module` are written. The first call counts.
pub fn set_module(module: &str) {
    let _ = MODULE.set(module.to_owned());
}

/// Lines above `level` are not written.
pub fn set_level(level: Level) {
    LEVEL.store(level as u8, Ordering::Relaxed);
}

/// Text or JSON.
pub fn set_format(format: Format) {
    FORMAT.store(format as u8, Ordering::Relaxed);
}

/// Whether a text line shows its level, and the place in the code that wrote it; `None` leaves
/// that as it is.
pub fn set_shown(level: Option<bool>, origin: Option<bool>) {
    if let Some(level) = level {
        SHOW_LEVEL.store(level, Ordering::Relaxed);
    }
    if let Some(origin) = origin {
        SHOW_ORIGIN.store(origin, Ordering::Relaxed);
    }
}

/// Lines lost so far because their place could not take them, and lines the guest's limit held back.
pub fn losses() -> (u64, u64) {
    (
        LOST_EVER.load(Ordering::Relaxed),
        SUPPRESSED.load(Ordering::Relaxed),
    )
}

/// An error and its causes in one line, each once.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        // Writing to a string does not fail.
        let _ = write!(text, ": {error}");
        cause = error.source();
    }
    text
}

/// Whether a line of `level` would be written.
pub fn enabled(level: Level) -> bool {
    level != Level::Off && level as u8 <= LEVEL.load(Ordering::Relaxed)
}

/// Writes a line. Use the macros.
pub fn line(level: Level, origin: (&str, &str, u32), message: Arguments<'_>) {
    if !enabled(level) {
        return;
    }
    if MODULE
        .get()
        .is_some_and(|m| !origin.0.starts_with(m.as_str()))
    {
        return;
    }
    let mut buffer = Line::new();
    // Taken, so that of two threads only one tells of them.
    let lost = LOST.swap(0, Ordering::Relaxed);
    compose(&mut buffer, level, origin, message, lost);
    if !writer::deliver(buffer.finish()) {
        LOST.fetch_add(lost, Ordering::Relaxed);
        count_lost(1);
    }
}

/// Counts lines that were lost on their way.
fn count_lost(lines: u64) {
    LOST.fetch_add(lines, Ordering::Relaxed);
    LOST_EVER.fetch_add(lines, Ordering::Relaxed);
}

/// One kind of line that a guest can provoke: one place in the code.
#[derive(Debug, Default)]
pub struct Kind {
    /// Its own allowance, kept as that of all of them is.
    spent_until: AtomicU64,
    /// Lines held back that no line has told of yet.
    held_back: AtomicU64,
}

impl Kind {
    /// A kind that has all its allowance.
    pub const fn new() -> Self {
        Kind {
            spent_until: AtomicU64::new(0),
            held_back: AtomicU64::new(0),
        }
    }
}

/// Writes a line that the guest provoked, if its kind's and the VM's allowance for such lines
/// permit it.
pub fn guest_line(kind: &Kind, level: Level, origin: (&str, &str, u32), message: Arguments<'_>) {
    // The cost is an upper bound, taken before formatting: what is refused costs no formatting.
    const COST: u64 = 256;
    if !enabled(level) {
        return;
    }
    let now = clock::monotonic_nanos();
    let share = COST.saturating_mul(KIND_SHARE);
    if spend(&kind.spent_until, now, share) && spend(&GUEST_SPENT_UNTIL, now, COST) {
        match kind.held_back.swap(0, Ordering::Relaxed) {
            0 => line(level, origin, message),
            more => line(
                level,
                origin,
                format_args!("{message} ({more} such lines held back before)"),
            ),
        }
    } else {
        kind.held_back.fetch_add(1, Ordering::Relaxed);
        SUPPRESSED.fetch_add(1, Ordering::Relaxed);
    }
}

/// Takes `bytes` from the allowance whose state is `spent_until`; whether it was there.
fn spend(spent_until: &AtomicU64, now: u64, bytes: u64) -> bool {
    let cost = bytes.saturating_mul(NANOS / GUEST_RATE);
    let burst = GUEST_BURST.saturating_mul(NANOS / GUEST_RATE);
    spent_until
        .fetch_update(Ordering::AcqRel, Ordering::Acquire, |until| {
            let after = until.max(now).saturating_add(cost);
            (after <= now.saturating_add(burst)).then_some(after)
        })
        .is_ok()
}

fn compose(
    out: &mut Line,
    level: Level,
    (_, file, row): (&str, &str, u32),
    message: Arguments<'_>,
    lost: u64,
) {
    let id = INSTANCE.get().map_or("anonymous-instance", String::as_str);
    let time = Utc::now();
    // A line that does not fit is cut; formatting into it does not fail.
    let _ = if FORMAT.load(Ordering::Relaxed) == Format::Json as u8 {
        thread::with_name(|name| {
            write!(out, "{{\"time\":\"{time}Z\",\"id\":\"{id}\",\"thread\":\"")?;
            out.escaping = true;
            out.write_str(name)?;
            out.escaping = false;
            write!(out, "\",\"level\":\"{}\",", level.name())?;
            if lost > 0 {
                write!(out, "\"lost_before\":{lost},")?;
            }
            out.write_str("\"message\":\"")?;
            out.escaping = true;
            out.write_fmt(message)?;
            out.escaping = false;
            out.write_str("\"}")
        })
    } else {
        thread::with_name(|name| {
            write!(out, "{time} [{id}:{name}")?;
            if SHOW_LEVEL.load(Ordering::Relaxed) {
                write!(out, ":{}", level.name())?;
            }
            if SHOW_ORIGIN.load(Ordering::Relaxed) {
                write!(out, ":{file}:{row}")?;
            }
            out.write_str("] ")?;
            if lost > 0 {
                write!(out, "({lost} lines lost before this one) ")?;
            }
            out.write_fmt(message)
        })
    };
}

/// Logs that something failed.
#[macro_export]
macro_rules! error {
    ($($arg:tt)+) => { $crate::log::line($crate::log::Level::Error, (module_path!(), file!(), line!()), format_args!($($arg)+)) };
}

/// Logs that something is odd.
#[macro_export]
macro_rules! warn {
    ($($arg:tt)+) => { $crate::log::line($crate::log::Level::Warn, (module_path!(), file!(), line!()), format_args!($($arg)+)) };
}

/// Logs what a person running it wants to know.
#[macro_export]
macro_rules! info {
    ($($arg:tt)+) => { $crate::log::line($crate::log::Level::Info, (module_path!(), file!(), line!()), format_args!($($arg)+)) };
}

/// Logs what those who build it want to know.
#[macro_export]
macro_rules! debug {
    ($($arg:tt)+) => { $crate::log::line($crate::log::Level::Debug, (module_path!(), file!(), line!()), format_args!($($arg)+)) };
}

/// Logs something odd that the guest did, within the guest's allowance.
#[macro_export]
macro_rules! guest_warn {
    ($($arg:tt)+) => {{
        static KIND: $crate::log::Kind = $crate::log::Kind::new();
        $crate::log::guest_line(&KIND, $crate::log::Level::Warn, (module_path!(), file!(), line!()), format_args!($($arg)+))
    }};
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fmt;

    #[test]
    fn spend_when_burst_is_gone_refills_at_the_rate() {
        let state = AtomicU64::new(0);
        let lines = |now| (0..10_000).take_while(|_| spend(&state, now, 256)).count();
        assert_eq!(lines(NANOS), 256);
        assert_eq!(lines(NANOS), 0);
        assert_eq!(lines(2 * NANOS), 16);
        assert_eq!(lines(1000 * NANOS), 256);
    }

    #[test]
    fn guest_lines_when_of_one_kind_leave_room_for_others() {
        let noisy = Kind::new();
        let before = losses().1;
        for _ in 0..1000 {
            guest_line(&noisy, Level::Warn, ("test", "", 0), format_args!("noise"));
        }
        let held = noisy.held_back.load(Ordering::Relaxed);
        assert!((900..960).contains(&held), "{held}");
        assert!(losses().1 >= before + held);
        let quiet = Kind::new();
        guest_line(&quiet, Level::Warn, ("test", "", 0), format_args!("heard"));
        assert_eq!(quiet.held_back.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn chain_when_there_are_causes_says_each_once() {
        #[derive(Debug)]
        struct Outer(std::io::Error);
        impl fmt::Display for Outer {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("Reading the thing failed")
            }
        }
        impl Error for Outer {
            fn source(&self) -> Option<&(dyn Error + 'static)> {
                Some(&self.0)
            }
        }
        assert_eq!(
            chain(&Outer(std::io::Error::other("no disk"))),
            "Reading the thing failed: no disk"
        );
    }

    #[test]
    fn level_when_named_in_any_case_is_found() {
        assert_eq!(Level::parse("WaRnInG"), Some(Level::Warn));
        assert_eq!(Level::parse("loud"), None);
    }
}
