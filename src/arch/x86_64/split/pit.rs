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
mod tests {
    use super::*;
    use crate::state::state_round_trip;
    use std::time::Duration;

    /// Nanoseconds of `counts`, rounded up.
    fn nanos(counts: u128) -> u64 {
        (counts * NANOS).div_ceil(FREQUENCY) as u64
    }

    fn pit() -> Pit {
        Pit::new(&PitState::default(), Instant::now()).unwrap()
    }

    fn loaded(mode: u8, count: u16) -> Counter {
        let mut counter = Counter::default();
        counter.control(0x30 | mode << 1, 0);
        let [low, high] = count.to_le_bytes();
        counter.write(low, 0);
        counter.write(high, 0);
        counter
    }

    fn read(counter: &mut Counter, now: u64) -> u16 {
        let low = counter.read(now);
        u16::from_le_bytes([low, counter.read(now)])
    }

    #[test]
    fn counter_when_time_passes_counts_down() {
        // Mode, count, counts that have passed, value, output.
        for (mode, count, passed, value, output) in [
            (0, 1000, 0, 1000, false),
            (0, 1000, 999, 1, false),
            (0, 1000, 1000, 0, true),
            (0, 1000, 1001, 0xffff, true),
            (0, 0, 0xffff, 1, false),
            (0, 0, 0x1_0000, 0, true),
            (2, 1000, 0, 1000, true),
            (2, 1000, 999, 1, false),
            (2, 1000, 1000, 1000, true),
            (2, 1000, 2500, 500, true),
            (3, 1000, 0, 1000, true),
            (3, 1000, 250, 500, true),
            (3, 1000, 500, 1000, false),
            (3, 1000, 999, 2, false),
            (3, 1000, 1000, 1000, true),
            (4, 10, 10, 0, false),
            (4, 10, 11, 0xffff, true),
        ] {
            let mut counter = loaded(mode, count);
            let now = nanos(passed);
            let what = format!("mode {mode}, {count}, after {passed}");
            assert_eq!(counter.output(now), output, "{what}");
            assert_eq!(read(&mut counter, now), value, "{what}");
        }
    }

    #[test]
    fn counter_when_latched_stays_until_it_is_read() {
        let mut counter = loaded(0, 0x1234);
        counter.control(0x00, nanos(0x34));
        counter.control(0x00, nanos(0x234));
        assert_eq!(read(&mut counter, nanos(0x1000)), 0x1200);
        assert_eq!(read(&mut counter, nanos(0x1000)), 0x0234);
    }

    #[test]
    fn counter_when_one_byte_of_it_is_meant_reads_and_writes_that() {
        let mut counter = Counter::default();
        counter.control(0x10, 0);
        counter.write(0x80, 0);
        assert_eq!((counter.count, counter.read(0)), (0x80, 0x80));
        counter.control(0x20, 0);
        counter.write(0x80, 0);
        assert_eq!((counter.count, counter.read(0)), (0x8000, 0x80));
    }

    #[test]
    fn read_back_when_status_and_count_are_asked_for_gives_status_first() {
        let pit = pit();
        let get = |offset| {
            let mut data = [0xee];
            pit.read(offset, &mut data);
            data[0]
        };
        let _ = pit.write(CONTROL, &[0x34]);
        let _ = pit.write(CONTROL, &[0xe2]);
        assert_eq!(get(0), STATUS_OUTPUT | STATUS_NULL | 0x34, "no count yet");
        let _ = pit.write(0, &[0xff]);
        let _ = pit.write(0, &[0xff]);
        let _ = pit.write(CONTROL, &[0xc2]);
        assert_eq!(get(0) & !STATUS_OUTPUT, 0x34);
        let first = u16::from_le_bytes([get(0), get(0)]);
        assert!(first > 0, "latched");
        assert_eq!(get(CONTROL), 0);
    }

    #[test]
    fn speaker_port_when_counter_2_has_run_out_says_so() {
        let pit = Arc::new(pit());
        let speaker = Speaker::new(Arc::clone(&pit));
        let get = || {
            let mut data = [0xee];
            speaker.read(0, &mut data);
            data[0]
        };
        // As Linux does: gate open, mode 0, then the count.
        let _ = speaker.write(0, &[0xff]);
        let _ = pit.write(CONTROL, &[0xb0]);
        let count = (FREQUENCY / 20) as u16;
        let before = Instant::now();
        for byte in count.to_le_bytes() {
            let _ = pit.write(2, &[byte]);
        }
        assert_eq!(get() & 0x0f, 0x03);
        while get() & OUTPUT == 0 {}
        let took = before.elapsed();
        assert!(took >= Duration::from_millis(49), "{took:?}");
        assert!(took < Duration::from_secs(5), "{took:?}");
    }

    #[test]
    fn gate_when_it_opens_begins_again_but_in_modes_0_and_4() {
        for (mode, again) in [(0, false), (1, true), (2, true), (3, true), (4, false)] {
            let mut counter = loaded(mode, 1000);
            counter.set_gate(true, nanos(100));
            let passed = counter.passed(nanos(100));
            assert_eq!(passed == 0, again, "mode {mode}");
        }
    }

    #[test]
    fn state_when_a_chip_is_made_of_it_counts_on_from_there() {
        let made = Instant::now();
        let pit = Pit::new(&PitState::default(), made).unwrap();
        state_round_trip!(pit, |state| Pit::new(&state, made).unwrap(), |pit| pit
            .save(made));
        let pit = Arc::new(pit);
        let _ = Speaker::new(Arc::clone(&pit)).write(0, &[3]);
        // Mode 0, both bytes; one of them read, one latched count, one status.
        for (offset, byte) in [
            (3, 0xb0),
            (2, 0x34),
            (2, 0x12),
            (3, 0xc8),
            (3, 0x34),
            (0, 1),
        ] {
            let _ = pit.write(offset, &[byte]);
        }
        pit.read(2, &mut [0]);
        let later = made + Duration::from_secs(1);
        let saved = pit.save(later);
        assert_eq!(saved.nanos, 1_000_000_000);
        let restored_at = later + Duration::from_secs(3600);
        state_round_trip!(
            pit,
            |state| Arc::new(Pit::new(&state, later).unwrap()),
            |pit| pit.save(later)
        );
        let restored = Pit::new(&saved, restored_at).unwrap();
        let half_a_second = restored.save(restored_at + Duration::from_millis(500));
        assert_eq!(half_a_second.nanos, 1_500_000_000);
        assert_eq!(half_a_second.counters, saved.counters);
        assert_eq!(
            restored.save(made).nanos,
            1_000_000_000,
            "time that goes back"
        );
    }

    #[test]
    fn state_when_no_chip_can_be_in_it_is_refused() {
        let good = PitState::default;
        let with = |counter: Counter| PitState {
            counters: [Counter::default(), counter, Counter::default()],
            ..good()
        };
        let mode = |mode| Counter {
            mode,
            ..Counter::default()
        };
        let now = Instant::now();
        assert!(Pit::new(&with(mode(5)), now).is_ok());
        let error = Pit::new(&with(mode(6)), now).unwrap_err().to_string();
        assert!(
            error.contains("8254") && error.contains("mode: 6"),
            "{error}"
        );
        let speaker = PitState {
            speaker: 0x10,
            ..good()
        };
        let error = Pit::new(&speaker, now).unwrap_err().to_string();
        assert!(error.contains("speaker is 0x10"), "{error}");
    }

    #[test]
    fn state_when_its_times_are_beyond_all_others_can_be_read() {
        for (nanos, loaded) in [(u64::MAX, 0), (0, u64::MAX), (u64::MAX, u64::MAX)] {
            for mode in 0..=5 {
                let counter = Counter {
                    mode,
                    loaded: Some(loaded),
                    ..Counter::default()
                };
                let state = PitState {
                    nanos,
                    counters: [(); 3].map(|()| counter.clone()),
                    speaker: 0,
                };
                let pit = Arc::new(Pit::new(&state, Instant::now()).unwrap());
                let _ = pit.write(CONTROL, &[0xce]);
                for offset in 0..3 {
                    pit.read(offset, &mut [0]);
                }
                Speaker::new(Arc::clone(&pit)).read(0, &mut [0]);
                assert!(pit.save(Instant::now()).nanos >= nanos);
            }
        }
    }

    #[test]
    fn anything_when_written_leaves_a_counter_that_can_be_read() {
        let pit = pit();
        let speaker = Speaker::new(Arc::new(
            Pit::new(&pit.save(Instant::now()), Instant::now()).unwrap(),
        ));
        for word in 0..=255u8 {
            for byte in [0, 1, 0xff] {
                let _ = pit.write(CONTROL, &[word]);
                for offset in 0..4 {
                    let _ = pit.write(offset, &[byte]);
                    let _ = pit.write(offset, &[]);
                    let mut data = [0xee; 8];
                    pit.read(offset, &mut data);
                    assert_eq!(data[1..], [0; 7]);
                }
                let _ = speaker.write(0, &[byte]);
            }
        }
    }
}
