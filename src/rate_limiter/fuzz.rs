//! Token buckets against a model: one number that grows with time and shrinks with what is taken.

use super::{NANOS_PER_MILLI, RateLimiter, TokenBucket};
use crate::fuzz::Input;

/// A limiter of any two buckets, on a clock that goes on as a rule. Checked after each step: how long it
/// makes wait is what the model says, to the nanosecond, and after that it does not; what was saved and
/// restored is saved as the same. Then the same bytes as numbers of any size ([`extremes`]).
pub fn limiter(bytes_in: &[u8]) {
    let input = &mut Input::new(bytes_in);
    let (bytes, bytes_model) = bucket(input);
    let (ops, ops_model) = bucket(input);
    let new = RateLimiter::new(bytes, ops);
    let mut test = Test {
        limiter: new.clone(),
        new,
        bytes: bytes_model,
        ops: ops_model,
        now: input.u64() >> 1,
    };
    while !input.is_empty() {
        test.step(input);
    }
    extremes(bytes_in);
}

/// A bucket as a model keeps it: tokens times the nanoseconds of a refill.
#[derive(Clone)]
struct Model {
    size: i128,
    refill: i128,
    burst: u64,
    burst_size: u64,
    level: i128,
    since: Option<u64>,
}

/// Sizes and times that the model can multiply.
fn bucket(input: &mut Input<'_>) -> (Option<TokenBucket>, Option<Model>) {
    let size = amount(input) >> 16;
    let burst = amount(input) >> input.one_of(&[0, 16, 60]);
    let refill_ms = u64::from(input.u32() >> input.one_of(&[0, 16, 24, 30]));
    let bucket = TokenBucket::new(size, burst, refill_ms);
    assert_eq!(bucket.is_some(), size > 0 && refill_ms > 0);
    let refill = i128::from(refill_ms) * i128::from(NANOS_PER_MILLI);
    let model = bucket.is_some().then(|| Model {
        size: size.into(),
        refill,
        burst,
        burst_size: burst,
        level: i128::from(size) * refill,
        since: None,
    });
    (bucket, model)
}

/// Small, or anything.
fn amount(input: &mut Input<'_>) -> u64 {
    match input.below(4) {
        0 => input.u64(),
        1 => u64::from(input.u32()) << 16,
        _ => u64::from(input.u8()) << 16,
    }
}

impl Model {
    fn at(&mut self, now: u64) {
        let since = self.since.unwrap_or(now);
        self.since = Some(now.max(since));
        let earned = i128::from(now.saturating_sub(since)) * self.size;
        self.level = (self.level + earned).min(self.size * self.refill);
    }

    fn wait(&mut self, now: u64, wanted: u64) -> u64 {
        self.at(now);
        let wanted = i128::from(wanted.saturating_sub(self.burst));
        let needed = if wanted > self.size { 0 } else { wanted };
        // What lacks is counted in whole tokens: less than one of debt is none.
        if self.level.div_euclid(self.refill) >= needed {
            return 0;
        }
        let missing = needed * self.refill - self.level;
        u64::try_from(missing.unsigned_abs().div_ceil(self.size.unsigned_abs())).unwrap_or(u64::MAX)
    }

    fn take(&mut self, now: u64, wanted: u64) {
        self.at(now);
        let from_burst = wanted.min(self.burst);
        self.burst -= from_burst;
        self.level -= i128::from(wanted - from_burst) * self.refill;
    }

    /// Tokens that it lacks of being full.
    fn missing(&self, now: u64) -> u64 {
        let mut later = self.clone();
        later.at(now);
        u64::try_from(later.size - later.level.div_euclid(later.refill)).unwrap_or(u64::MAX)
    }
}

struct Test {
    new: RateLimiter,
    limiter: RateLimiter,
    bytes: Option<Model>,
    ops: Option<Model>,
    now: u64,
}

impl Test {
    fn step(&mut self, input: &mut Input<'_>) {
        match input.below(6) {
            0 => self.now = self.now.saturating_sub(u64::from(input.u16())),
            1 => self.now = (self.now.saturating_add(amount(input) >> 8)).min(u64::MAX >> 1),
            2 => self.let_one_through(amount(input) >> 16),
            3 => {
                let bytes = amount(input) >> 16;
                self.limiter.charge(self.now, bytes);
                self.take(bytes);
            }
            4 => self.take_some(amount(input) >> 16),
            _ => self.save_and_restore(),
        }
    }

    fn wait(&mut self, bytes: u64) -> u64 {
        let wait = self.limiter.wait(self.now, bytes);
        let now = self.now;
        let for_bytes = self.bytes.as_mut().map_or(0, |it| it.wait(now, bytes));
        let for_ops = self.ops.as_mut().map_or(0, |it| it.wait(now, 1));
        assert_eq!(wait, for_bytes.max(for_ops), "{bytes} bytes at {now}");
        wait
    }

    fn take(&mut self, bytes: u64) {
        let now = self.now;
        self.bytes.iter_mut().for_each(|it| it.take(now, bytes));
        self.ops.iter_mut().for_each(|it| it.take(now, 1));
    }

    /// As a device does: waits as long as it is told, and no nanosecond longer.
    fn let_one_through(&mut self, bytes: u64) {
        let wait = self.wait(bytes);
        let Some(end) = self
            .now
            .checked_add(wait)
            .filter(|end| *end < u64::MAX >> 1)
        else {
            return;
        };
        // A clock that went back has to come to where it was first.
        let models = self.bytes.iter().chain(&self.ops);
        let clock = models.filter_map(|it| it.since).max().unwrap_or(0);
        let late = clock.saturating_sub(self.now);
        if wait > 0 && late == 0 {
            self.now = end - 1;
            assert!(self.wait(bytes) > 0);
        }
        self.now = end + late;
        assert_eq!(self.wait(bytes), 0, "after {wait}");
        self.limiter.charge(self.now, bytes);
        self.take(bytes);
    }

    fn take_some(&mut self, wanted: u64) {
        let (Some(bucket), Some(model)) = (&mut self.limiter.bandwidth, &mut self.bytes) else {
            return;
        };
        model.at(self.now);
        let there = model.level.div_euclid(model.refill).max(0);
        let there = (there as u64).saturating_add(model.burst);
        let some = bucket.take_some(self.now, wanted);
        assert_eq!(some, there.min(wanted));
        model.take(self.now, some);
    }

    fn save_and_restore(&mut self) {
        let saved = self.limiter.save(self.now);
        let now = self.now;
        for (model, saved) in [(&self.bytes, saved.bandwidth), (&self.ops, saved.ops)] {
            let missing = model.as_ref().map_or(0, |it| it.missing(now));
            assert_eq!(saved.missing, missing);
            let used = model.as_ref().map_or(0, |it| it.burst_size - it.burst);
            assert_eq!(saved.burst_used, used);
        }
        let restored = self.new.clone().restore(&saved, 0);
        assert_eq!(restored.save(0), saved);
        // Later there is no more to wait for, whatever the clock says.
        let mut later = self.new.clone().restore(&saved, 1 << 20);
        assert!(later.wait(7, 1) <= restored.clone().wait(u64::MAX, 1));
    }
}

/// Buckets and states of any numbers, on a clock that says anything: no step overflows, and what was
/// let through at once is no more than what was wanted.
fn extremes(bytes: &[u8]) {
    let input = &mut Input::new(bytes);
    let mut bucket = || TokenBucket::new(input.u64(), input.u64(), input.u64());
    let (bytes, ops) = (bucket(), bucket());
    let mut limiter = RateLimiter::new(bytes, ops);
    while !input.is_empty() {
        let (now, wanted) = (input.u64(), input.u64());
        let _ = limiter.wait(now, wanted);
        limiter.charge(now, wanted);
        if let Some(bucket) = &mut limiter.bandwidth {
            assert!(bucket.take_some(input.u64(), wanted) <= wanted);
            assert!(bucket.tokens <= i128::from(bucket.size));
        }
        let mut state = limiter.save(input.u64());
        if input.flag() {
            state.bandwidth.missing = input.u64();
            state.bandwidth.burst_used = input.u64();
        }
        limiter = limiter.restore(&state, input.u64());
    }
}
