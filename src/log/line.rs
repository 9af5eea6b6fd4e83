//! A line of the log under construction, and the time in it. Nothing is allocated.

use std::fmt::{self, Write};
use std::time::{SystemTime, UNIX_EPOCH};

/// A line is cut at this many bytes: below PIPE_BUF, so that it arrives whole.
const LINE_MAX: usize = 1024;

/// A line under construction: cut at [`LINE_MAX`], without control characters.
pub(super) struct Line {
    bytes: [u8; LINE_MAX],
    len: usize,
    /// Whether quotes and backslashes are escaped for JSON.
    pub(super) escaping: bool,
}

impl Line {
    pub(super) const fn new() -> Self {
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

    pub(super) fn finish(&mut self) -> &[u8] {
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
pub(super) struct Utc {
    seconds: u64,
    nanos: u32,
}

impl Utc {
    pub(super) fn now() -> Self {
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
}
