//! The 8254 timer's three counters (Intel 231164) and port 0x61, without interrupts: enough for
//! software that measures the processor's clock by them.
//!
//! A counter is not counted: it is worked out from the time that has passed since it was loaded,
//! when the guest looks. Runs on vCPU threads; one lock, held for a few instructions. Counting in
//! decimal digits is left out, as everywhere.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::bus::{Registers, Written};
use crate::state::{self, StateError};

/// Counters 0 to 2, then the control word.
pub const PORT: u64 = 0x40;
/// Ports from there on.
pub const PORTS: u64 = 4;
/// Gate and output of counter 2.
pub const SPEAKER_PORT: u64 = 0x61;

const CONTROL: u64 = 3;
const COUNTERS: usize = 3;
const MODE_MAX: u8 = 5;

/// Counts in a second.
const FREQUENCY: u128 = 1_193_182;
const NANOS: u128 = 1_000_000_000;

/// Control word: bits 6 and 7 say which counter, 3 for the read-back command; bits 4 and 5 which
/// bytes of it, 0 to latch it; bits 1 to 3 the mode.
const READ_BACK: u8 = 3;
const NOT_COUNT: u8 = 1 << 5;
const NOT_STATUS: u8 = 1 << 4;
/// Status byte: the output, and that a count was written but not loaded yet.
const STATUS_OUTPUT: u8 = 1 << 7;
const STATUS_NULL: u8 = 1 << 6;

/// Port 0x61: what the guest may write (gate of counter 2, speaker); a bit that changes with
/// memory's refresh; the output of counter 2.
const WRITABLE: u8 = 0x03;
const GATE: u8 = 0x01;
const REFRESH: u8 = 1 << 4;
const OUTPUT: u8 = 1 << 5;
/// How often memory was refreshed.
const REFRESH_NANOS: u64 = 15_085;

/// Which bytes of a count are written and read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bytes {
    /// The low one; the high one is 0.
    #[default]
    Low,
    /// The high one; the low one is 0.
    High,
    /// The low one, then the high one.
    Both,
}

/// One counter. Its members are what it is saved as.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Counter {
    /// 0 to 5.
    pub mode: u8,
    /// Which bytes of the count are written and read.
    pub bytes: Bytes,
    /// 0 stands for 65,536, and is what it starts with.
    pub count: u16,
    /// When it was loaded, by [`PitState::nanos`]; `None` until then.
    pub loaded: Option<u64>,
    /// The low byte, until the high one is written.
    pub low: Option<u8>,
    /// A count that was latched, as far as it was not read yet.
    pub latched: Option<u16>,
    /// The same of the status.
    pub status: Option<u8>,
    /// The next byte to read is a high one.
    pub high_next: bool,
    /// Whether its gate is open.
    pub gate: bool,
}

/// The chip and port 0x61, as they are saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PitState {
    /// Nanoseconds that have passed for the chip. It is restored with as many: the time in between
    /// does not pass for it.
    pub nanos: u64,
    /// Its counters.
    pub counters: [Counter; COUNTERS],
    /// What the guest wrote to port 0x61.
    pub speaker: u8,
}

impl Default for PitState {
    fn default() -> Self {
        // Only counter 2 has a gate that software reaches.
        let counter = |gate| Counter {
            gate,
            ..Counter::default()
        };
        PitState {
            nanos: 0,
            counters: [true, true, false].map(counter),
            speaker: 0,
        }
    }
}

/// The chip.
#[derive(Debug)]
pub struct Pit {
    /// Its `nanos` are those of when the chip was made.
    state: Mutex<PitState>,
    made: Instant,
}

impl Counter {
    fn check(&self) -> Result<(), StateError> {
        state::check_max("8254", "mode", self.mode.into(), MODE_MAX.into())
    }

    /// 1 to 65,536.
    fn start(&self) -> u128 {
        match self.count {
            0 => 0x1_0000,
            count => count.into(),
        }
    }

    /// Counts since it was loaded.
    fn passed(&self, now: u64) -> u128 {
        let since = self.loaded.unwrap_or(now);
        let nanos = now.saturating_sub(since);
        u128::from(nanos).saturating_mul(FREQUENCY) / NANOS
    }

    /// What it has come to; of modes 2 and 3 it begins again by itself.
    fn value(&self, now: u64) -> u16 {
        let (start, passed) = (self.start(), self.passed(now));
        let value = match self.mode {
            2 => start.saturating_sub(passed.checked_rem(start).unwrap_or(0)),
            3 => {
                let twice = passed.saturating_mul(2);
                start.saturating_sub(twice.checked_rem(start).unwrap_or(0))
            }
            _ => start.wrapping_sub(passed),
        };
        value as u16
    }

    /// Its output.
    fn output(&self, now: u64) -> bool {
        if self.loaded.is_none() {
            return self.mode != 0;
        }
        let (start, passed) = (self.start(), self.passed(now));
        let within = passed.checked_rem(start).unwrap_or(0);
        match self.mode {
            0 | 1 => passed >= start,
            2 => within.saturating_add(1) != start,
            3 => within < start.div_ceil(2),
            _ => passed != start,
        }
    }

    fn write(&mut self, byte: u8, now: u64) {
        let count = match (self.bytes, self.low.take()) {
            (Bytes::Low, _) => u16::from(byte),
            (Bytes::High, _) => u16::from_le_bytes([0, byte]),
            (Bytes::Both, Some(low)) => u16::from_le_bytes([low, byte]),
            (Bytes::Both, None) => {
                self.low = Some(byte);
                return;
            }
        };
        self.count = count;
        self.loaded = Some(now);
    }

    fn read(&mut self, now: u64) -> u8 {
        if let Some(status) = self.status.take() {
            return status;
        }
        let [low, high] = self
            .latched
            .unwrap_or_else(|| self.value(now))
            .to_le_bytes();
        let (byte, complete) = match (self.bytes, self.high_next) {
            (Bytes::Low, _) => (low, true),
            (Bytes::High, _) => (high, true),
            (Bytes::Both, false) => (low, false),
            (Bytes::Both, true) => (high, true),
        };
        self.high_next = !complete;
        if complete {
            self.latched = None;
        }
        byte
    }

    fn latch(&mut self, now: u64) {
        if self.latched.is_none() {
            self.latched = Some(self.value(now));
        }
    }

    fn latch_status(&mut self, now: u64) {
        if self.status.is_none() {
            let output = if self.output(now) { STATUS_OUTPUT } else { 0 };
            let null = if self.loaded.is_none() {
                STATUS_NULL
            } else {
                0
            };
            let bytes = match self.bytes {
                Bytes::Low => 1,
                Bytes::High => 2,
                Bytes::Both => 3,
            };
            self.status = Some(output | null | (bytes << 4) | (self.mode << 1));
        }
    }

    fn control(&mut self, word: u8, now: u64) {
        self.bytes = match (word >> 4) & 3 {
            0 => return self.latch(now),
            1 => Bytes::Low,
            2 => Bytes::High,
            _ => Bytes::Both,
        };
        // 6 and 7 are other names of 2 and 3.
        self.mode = match (word >> 1) & 7 {
            mode @ 6..=7 => mode & 3,
            mode => mode,
        };
        let gate = self.gate;
        *self = Counter {
            mode: self.mode,
            bytes: self.bytes,
            gate,
            ..Counter::default()
        };
    }

    /// A gate that opens lets all modes but 0 and 4 begin again.
    fn set_gate(&mut self, open: bool, now: u64) {
        if open && !self.gate && !matches!(self.mode, 0 | 4) && self.loaded.is_some() {
            self.loaded = Some(now);
        }
        self.gate = open;
    }
}

impl Pit {
    /// A chip in `state`, made at `now`.
    ///
    /// # Errors
    /// When no chip can be in that state.
    pub fn new(state: &PitState, now: Instant) -> Result<Self, StateError> {
        state::check_bits("8254", "speaker", state.speaker, WRITABLE)?;
        state.counters.iter().try_for_each(Counter::check)?;
        Ok(Pit {
            state: Mutex::new(state.clone()),
            made: now,
        })
    }

    /// Its state at `now`.
    pub fn save(&self, now: Instant) -> PitState {
        let (state, _) = self.lock();
        PitState {
            nanos: self.nanos(&state, now),
            ..state.clone()
        }
    }

    fn lock(&self) -> (MutexGuard<'_, PitState>, u64) {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.nanos(&state, Instant::now());
        (state, now)
    }

    /// Nanoseconds that have passed for the chip at `now`.
    fn nanos(&self, state: &PitState, now: Instant) -> u64 {
        let passed = now.saturating_duration_since(self.made).as_nanos();
        let passed = u64::try_from(passed).unwrap_or(u64::MAX);
        state.nanos.saturating_add(passed)
    }

    fn control(&self, word: u8) {
        let (mut state, now) = self.lock();
        let which = word >> 6;
        if which != READ_BACK {
            if let Some(counter) = state.counters.get_mut(usize::from(which)) {
                counter.control(word, now);
            }
            return;
        }
        for (number, counter) in (1u32..).zip(&mut state.counters) {
            if (word >> number) & 1 == 0 {
                continue;
            }
            if word & NOT_COUNT == 0 {
                counter.latch(now);
            }
            if word & NOT_STATUS == 0 {
                counter.latch_status(now);
            }
        }
    }
}

/// The counter at `offset`.
fn counter(state: &mut PitState, offset: u64) -> Option<&mut Counter> {
    state.counters.get_mut(usize::try_from(offset).ok()?)
}

impl Registers for Pit {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let (mut state, now) = self.lock();
        let value = counter(&mut state, offset).map_or(0, |counter| counter.read(now));
        if let Some(first) = data.first_mut() {
            *first = value;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Written {
        let Some(byte) = data.first() else {
            return Written::Done;
        };
        if offset == CONTROL {
            self.control(*byte);
        } else {
            let (mut state, now) = self.lock();
            if let Some(counter) = counter(&mut state, offset) {
                counter.write(*byte, now);
            }
        }
        Written::Done
    }
}

/// Port 0x61.
#[derive(Debug)]
pub struct Speaker(Arc<Pit>);

impl Speaker {
    /// Of the same machine as `pit`.
    pub fn new(pit: Arc<Pit>) -> Self {
        Speaker(pit)
    }
}

impl Registers for Speaker {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
        let (state, now) = self.0.lock();
        let refresh = (now / REFRESH_NANOS) & 1 != 0;
        let output = state.counters.last().is_some_and(|c| c.output(now));
        let bit = |on: bool, bit: u8| if on { bit } else { 0 };
        if let Some(first) = data.first_mut() {
            *first = state.speaker | bit(refresh, REFRESH) | bit(output, OUTPUT);
        }
    }

    fn write(&self, _: u64, data: &[u8]) -> Written {
        let (mut state, now) = self.0.lock();
        let value = data.first().copied().unwrap_or(0) & WRITABLE;
        state.speaker = value;
        if let Some(counter) = state.counters.last_mut() {
            counter.set_gate(value & GATE != 0, now);
        }
        Written::Done
    }
}

#[cfg(test)]
mod tests;
