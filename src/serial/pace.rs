//! When output is moved on: soon enough for a person or a program that waits for it, seldom enough
//! that a byte does not cost a system call.
//!
//! - The first output after a pause goes at once.
//! - The end of a line goes at once, but not more often than every [`GAP`].
//! - An unfinished line goes when no more came for [`SETTLE`], and after [`HOLD`] in any case.
//! - Half a ring of output goes at once.

use super::ring::{HALF, Wake};

/// The least time between two moves of whole lines, in ns.
const GAP: u64 = 1_000_000;
/// How long an unfinished line is given to go on, in ns.
const SETTLE: u64 = 2_000_000;
/// The longest that an unfinished line is kept, in ns.
const HOLD: u64 = 10_000_000;
/// What comes after a pause of this length goes at once, in ns.
const PAUSE: u64 = 100_000_000;

/// What to do about output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plan {
    /// Move it.
    Take,
    /// Wait to be woken, for at most so many ms.
    Wait(Wake, Option<u32>),
}

/// What is in the ring.
#[derive(Clone, Copy, Debug)]
pub struct Content {
    /// Bytes.
    pub len: usize,
    /// The last of them ends a line.
    pub ends_line: bool,
}

/// What was seen of the output so far. Times are in ns of any clock that only goes on.
#[derive(Debug, Default)]
pub struct Pace {
    /// When output was last moved.
    moved: Option<u64>,
    /// The unfinished line: when it was first seen, when it last grew, and its length then.
    line: Option<(u64, u64, usize)>,
}

impl Pace {
    /// What to do at time `now`.
    pub fn plan(&mut self, now: u64, content: Content) -> Plan {
        let Content { len, ends_line } = content;
        let since = self.moved.map_or(u64::MAX, |at| now.saturating_sub(at));
        if len == 0 {
            self.line = None;
            // What comes next mostly belongs to what was just moved.
            return if since < SETTLE {
                Plan::Wait(Wake::Line, Some(millis(SETTLE)))
            } else {
                Plan::Wait(Wake::Any, None)
            };
        }
        if len >= HALF || since >= PAUSE {
            return self.take(now);
        }
        if since < GAP {
            return Plan::Wait(Wake::Half, Some(millis(GAP)));
        }
        if ends_line {
            return self.take(now);
        }
        let (began, grew, was) = *self.line.get_or_insert((now, now, len));
        let settled = was == len && now.saturating_sub(grew) >= SETTLE;
        if settled || now.saturating_sub(began) >= HOLD {
            return self.take(now);
        }
        if was != len {
            self.line = Some((began, now, len));
        }
        Plan::Wait(Wake::Line, Some(millis(SETTLE)))
    }

    fn take(&mut self, now: u64) -> Plan {
        self.moved = Some(now);
        self.line = None;
        Plan::Take
    }
}

/// `nanos` in ms; all of them are whole.
const fn millis(nanos: u64) -> u32 {
    (nanos / 1_000_000) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn plan(pace: &mut Pace, millis: u64, len: usize, ends_line: bool) -> Plan {
        pace.plan(millis * MS, Content { len, ends_line })
    }

    #[test]
    fn first_output_goes_at_once_and_again_after_a_pause() {
        let mut pace = Pace::default();
        assert_eq!(plan(&mut pace, 5, 0, false), Plan::Wait(Wake::Any, None));
        assert_eq!(plan(&mut pace, 6, 1, false), Plan::Take);
        assert_eq!(
            plan(&mut pace, 6, 0, false),
            Plan::Wait(Wake::Line, Some(2))
        );
        assert_eq!(plan(&mut pace, 8, 0, false), Plan::Wait(Wake::Any, None));
        assert_eq!(plan(&mut pace, 106, 1, false), Plan::Take);
    }

    #[test]
    fn lines_go_at_once_with_a_gap_between_them() {
        let mut pace = Pace::default();
        assert_eq!(plan(&mut pace, 0, 3, true), Plan::Take);
        assert_eq!(plan(&mut pace, 0, 3, true), Plan::Wait(Wake::Half, Some(1)));
        assert_eq!(plan(&mut pace, 1, 9, true), Plan::Take);
        assert_eq!(plan(&mut pace, 3, 4, true), Plan::Take);
    }

    #[test]
    fn unfinished_line_goes_when_it_stops_growing() {
        let mut pace = Pace::default();
        assert_eq!(plan(&mut pace, 0, 1, false), Plan::Take);
        let wait = Plan::Wait(Wake::Line, Some(2));
        assert_eq!(plan(&mut pace, 5, 1, false), wait);
        assert_eq!(plan(&mut pace, 7, 4, false), wait);
        // Woken for something else, too early.
        assert_eq!(plan(&mut pace, 8, 4, false), wait);
        assert_eq!(plan(&mut pace, 9, 4, false), Plan::Take);
    }

    #[test]
    fn unfinished_line_that_goes_on_growing_is_not_kept_for_ever() {
        let mut pace = Pace::default();
        assert_eq!(plan(&mut pace, 0, 1, false), Plan::Take);
        let kept = (2..50).take_while(|n| plan(&mut pace, *n, *n as usize, false) != Plan::Take);
        assert_eq!(kept.count(), 10);
    }

    #[test]
    fn half_a_ring_goes_at_once() {
        let mut pace = Pace::default();
        assert_eq!(plan(&mut pace, 0, 1, false), Plan::Take);
        assert_eq!(plan(&mut pace, 0, HALF, false), Plan::Take);
        assert_ne!(plan(&mut pace, 0, HALF - 1, false), Plan::Take);
    }
}
