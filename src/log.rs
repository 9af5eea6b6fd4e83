//! The log: one line at a time to one descriptor, from any thread.
//!
//! A line is formatted into a buffer on the stack and written by one call; nothing is allocated
//! and nothing waits: a line that can not be written at once is lost and counted, and the count is
//! told with the next line that gets through. While a guest runs, the descriptor is a pipe that
//! the serial thread empties into the log's real place, so that a slow disk, terminal or reader
//! costs lines and never the time of a vCPU or a device.
//!
//! Lines that a guest can provoke go through [`guest_warn!`](crate::guest_warn), which limits them
//! for the whole VM to 64 KiB at once and 4 KiB a second after that, and each kind of line to a
//! quarter of that, so that one kind can not silence the others. Lines never hold bytes that a
//! guest or a client chose: numbers and our own words only.

use std::error::Error;
use std::fmt::{self, Arguments, Write};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU8, AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::sys::{clock, fd, thread};
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

/// A line is cut at this many bytes: below PIPE_BUF, so that it arrives whole.
const LINE_MAX: usize = 1024;

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
/// Standard output until told otherwise.
static DESCRIPTOR: AtomicI32 = AtomicI32::new(1);
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

/// Where lines go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// A descriptor that may block: it is asked first whether it has room.
    Blocking(i32),
    /// A descriptor that never does: threads that may do little else can write to it.
    NonBlocking(i32),
}

/// Set in [`DESCRIPTOR`] beside the number of one that never blocks, to change both at once.
const NON_BLOCKING: i32 = 1 << 30;

/// Sends lines to `place` from now on. The caller keeps it open for as long as lines may go there.
pub fn redirect(place: Place) {
    let value = match place {
        Place::Blocking(fd) => fd,
        Place::NonBlocking(fd) => fd | NON_BLOCKING,
    };
    DESCRIPTOR.store(value, Ordering::Release);
}

/// The descriptor lines go to now.
pub fn descriptor() -> i32 {
    DESCRIPTOR.load(Ordering::Acquire) & !NON_BLOCKING
}

fn deliver(line: &[u8]) -> bool {
    let value = DESCRIPTOR.load(Ordering::Acquire);
    if value & NON_BLOCKING == 0 {
        fd::write_now(value, line)
    } else {
        fd::write(value & !NON_BLOCKING, line).is_ok_and(|n| n == line.len())
    }
}

/// Lines lost so far because their place could not take them, and lines the guest's limit held back.
pub fn losses() -> (u64, u64) {
    (
        LOST_EVER.load(Ordering::Relaxed),
        SUPPRESSED.load(Ordering::Relaxed),
    )
}

/// An error and its causes as one sentence, each said once.
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
    if !deliver(buffer.finish()) {
        LOST.fetch_add(lost, Ordering::Relaxed);
        count_lost(1);
    }
}

fn count_lost(lines: u64) {
    LOST.fetch_add(lines, Ordering::Relaxed);
    LOST_EVER.fetch_add(lines, Ordering::Relaxed);
}

/// Counts `bytes` of lines that were lost on their way; a line of them is at least one.
pub fn count_lost_bytes(bytes: u64) {
    // What such lines are long, so that the count is near the truth.
    const USUAL: u64 = 100;
    if bytes > 0 {
        count_lost(bytes.div_ceil(USUAL));
    }
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

/// A line under construction: cut at [`LINE_MAX`], without control characters.
struct Line {
    bytes: [u8; LINE_MAX],
    len: usize,
    /// Whether quotes and backslashes are escaped for JSON.
    escaping: bool,
}

impl Line {
    const fn new() -> Self {
        Line {
            bytes: [0; LINE_MAX],
            len: 0,
            escaping: false,
        }
    }

    /// Adds all of `bytes`, or none.
    fn push(&mut self, bytes: &[u8]) {
        // Room is kept for the end of a JSON line and for the newline.
        let room = LINE_MAX - if self.escaping { 8 } else { 4 };
        let end = self.len + bytes.len();
        if end <= room
            && let Some(slots) = self.bytes.get_mut(self.len..end)
        {
            slots.copy_from_slice(bytes);
            self.len = end;
        }
    }

    fn finish(&mut self) -> &[u8] {
        if let Some(slot) = self.bytes.get_mut(self.len) {
            *slot = b'\n';
            self.len += 1;
        }
        self.bytes.get(..self.len).unwrap_or_default()
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for char in text.chars() {
            match char {
                '"' => self.push(if self.escaping { b"\\\"" } else { b"\"" }),
                '\\' => self.push(if self.escaping { b"\\\\" } else { b"\\" }),
                // One line stays one line, and a terminal is not told what to do.
                _ if char.is_control() => self.push(b" "),
                _ => self.push(char.encode_utf8(&mut [0; 4]).as_bytes()),
            }
        }
        Ok(())
    }
}

/// A moment in UTC, printed as `2026-01-31T23:59:59.000000000`.
struct Utc {
    seconds: u64,
    nanos: u32,
}

impl Utc {
    fn now() -> Self {
        let since = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        Utc {
            seconds: since.as_secs(),
            nanos: since.subsec_nanos(),
        }
    }

    /// Year, month and day of the proleptic Gregorian calendar, counted in eras of 400 years
    /// that begin on 1 March.
    fn date(&self) -> (u64, u64, u64) {
        let days = self.seconds / 86_400 + 719_468;
        let era = days / 146_097;
        let day_of_era = days % 146_097;
        let year_of_era =
            (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted_month = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
        let month = if shifted_month < 10 {
            shifted_month + 3
        } else {
            shifted_month - 9
        };
        let year = era * 400 + year_of_era + u64::from(month <= 2);
        (year, month, day)
    }
}

impl fmt::Display for Utc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (year, month, day) = self.date();
        let second = self.seconds % 86_400;
        write!(
            f,
            "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:09}",
            second / 3_600,
            second / 60 % 60,
            second % 60,
            self.nanos
        )
    }
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

    #[test]
    fn date_when_at_the_edges_of_years_is_right() {
        for (seconds, date) in [
            (0, (1970, 1, 1)),
            (951_782_400, (2000, 2, 29)),
            (1_709_164_800, (2024, 2, 29)),
            (1_735_689_599, (2024, 12, 31)),
            (4_107_542_400, (2100, 3, 1)),
        ] {
            assert_eq!(Utc { seconds, nanos: 0 }.date(), date, "{seconds}");
        }
    }

    #[test]
    fn line_when_too_long_is_cut_and_still_ends() {
        let mut line = Line::new();
        let _ = write!(line, "{}", "x".repeat(5000));
        let bytes = line.finish();
        assert!(bytes.len() <= LINE_MAX);
        assert_eq!(bytes.last(), Some(&b'\n'));
        assert_eq!(bytes.iter().filter(|b| **b == b'\n').count(), 1);
    }

    #[test]
    fn line_when_json_and_cut_is_still_whole_json() {
        for before in 0..8 {
            for piece in ["\"\\\n", "\\", "\u{e9}", "\u{1f41d}\""] {
                let mut line = Line::new();
                let _ = line.write_str("{\"message\":\"");
                line.escaping = true;
                let _ = write!(line, "{}{}", "x".repeat(before), piece.repeat(1000));
                line.escaping = false;
                let _ = line.write_str("\"}");
                let value: serde_json::Value = serde_json::from_slice(line.finish()).unwrap();
                let message = &value["message"].as_str().unwrap()[before..];
                assert!(message.starts_with(&piece.replace('\n', " ")), "{message}");
            }
        }
    }

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
