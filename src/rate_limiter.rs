//! How much a device may do: token buckets for bytes and for operations.
//!
//! Pure arithmetic on a clock that is passed in (nanoseconds of any monotonic clock); who waits,
//! and how, is the device's business. The rules are Firecracker's: a bucket holds `size` tokens,
//! is full at the start and again `refill_ms` after it was empty; `burst` more are given once, at
//! the start; a size or refill time of 0 means no bucket. What is larger than the whole bucket is
//! let through as soon as the bucket is out of debt, and everything after it waits until the
//! debt is paid.
#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

#[cfg(any(test, fuzzing))]
pub mod fuzz;

use std::num::NonZeroU64;

use serde::{Deserialize, Serialize};

const NANOS_PER_MILLI: u64 = 1_000_000;

/// One bucket of tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenBucket {
    size: u64,
    refill_nanos: NonZeroU64,
    /// What is left of the burst, and what it was.
    burst: u64,
    burst_size: u64,
    /// Negative: a debt left by a request larger than the bucket.
    tokens: i128,
    /// What has been earned of the next token, in tokens times `refill_nanos`.
    fraction: u128,
    /// When it was last refilled; `None` before the first use.
    refilled_at: Option<u64>,
}

impl TokenBucket {
    /// A full bucket; `None`, for no limit, when `size` or `refill_ms` is 0.
    pub fn new(size: u64, burst: u64, refill_ms: u64) -> Option<Self> {
        if size == 0 {
            return None;
        }
        let refill_nanos = NonZeroU64::new(refill_ms.saturating_mul(NANOS_PER_MILLI))?;
        Some(TokenBucket {
            size,
            refill_nanos,
            burst,
            burst_size: burst,
            tokens: i128::from(size),
            fraction: 0,
            refilled_at: None,
        })
    }

    /// What of it is saved, at `now`.
    fn save(&self, now: u64) -> BucketState {
        let mut now_full = self.clone();
        now_full.refill(now);
        let missing = i128::from(self.size).saturating_sub(now_full.tokens);
        BucketState {
            missing: u64::try_from(missing.max(0)).unwrap_or(u64::MAX),
            burst_used: self.burst_size.saturating_sub(self.burst),
        }
    }

    /// The same bucket as it was saved, `elapsed` nanoseconds later.
    fn restore(mut self, state: &BucketState, elapsed: u64) -> Self {
        self.tokens = i128::from(self.size).saturating_sub(i128::from(state.missing));
        self.burst = self.burst_size.saturating_sub(state.burst_used);
        self.refilled_at = Some(0);
        self.refill(elapsed);
        // The clock may be another one.
        self.refilled_at = None;
        self
    }

    /// Nanoseconds from `now` until `wanted` tokens may be taken; 0: at once.
    fn wait(&mut self, now: u64, wanted: u64) -> u64 {
        self.refill(now);
        let wanted = u128::from(wanted).saturating_sub(u128::from(self.burst));
        // More than the bucket can ever hold only has to wait for the debt to be paid.
        let needed = i128::try_from(wanted)
            .ok()
            .filter(|n| *n <= i128::from(self.size))
            .unwrap_or(0);
        let missing = needed.saturating_sub(self.tokens);
        let Ok(missing) = u128::try_from(missing) else {
            return 0;
        };
        let nanos = missing
            .saturating_mul(u128::from(self.refill_nanos.get()))
            .saturating_sub(self.fraction)
            .div_ceil(u128::from(self.size.max(1)));
        u64::try_from(nanos).unwrap_or(u64::MAX)
    }

    /// Takes as many of the `wanted` tokens as there are; how many these are.
    pub fn take_some(&mut self, now: u64, wanted: u64) -> u64 {
        self.refill(now);
        let there = u64::try_from(self.tokens.max(0)).unwrap_or(u64::MAX);
        let some = wanted.min(there.saturating_add(self.burst));
        self.take(now, some);
        some
    }

    fn take(&mut self, now: u64, wanted: u64) {
        self.refill(now);
        let from_burst = wanted.min(self.burst);
        self.burst = self.burst.saturating_sub(from_burst);
        let rest = wanted.saturating_sub(from_burst);
        self.tokens = self.tokens.saturating_sub(i128::from(rest));
    }

    fn refill(&mut self, now: u64) {
        let since = self.refilled_at.unwrap_or(now);
        self.refilled_at = Some(now.max(since));
        let elapsed = u128::from(now.saturating_sub(since));
        // Tokens times `refill_nanos`; both factors come from 64 bits, so the product fits.
        let earned = elapsed
            .saturating_mul(u128::from(self.size))
            .saturating_add(self.fraction);
        let refill = u128::from(self.refill_nanos.get());
        let whole = earned.checked_div(refill).unwrap_or(0);
        let whole = i128::try_from(whole).unwrap_or(i128::MAX);
        let full = i128::from(self.size);
        self.tokens = self.tokens.saturating_add(whole);
        if self.tokens >= full {
            self.tokens = full;
            self.fraction = 0;
        } else {
            self.fraction = earned.checked_rem(refill).unwrap_or(0);
        }
    }
}

/// What a bucket has given; by default nothing. Its size and times are its configuration's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BucketState {
    /// Tokens that it lacks of being full; more than its size is a debt.
    pub missing: u64,
    /// Tokens of the burst that are used up.
    pub burst_used: u64,
}

/// What the buckets of a limiter have given. It holds no instants: time passes by the wall clock while
/// it is saved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LimiterState {
    /// Bytes.
    pub bandwidth: BucketState,
    /// Operations.
    pub ops: BucketState,
}

/// What happens to one bucket of a running limiter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum BucketUpdate {
    /// It stays as it is.
    #[default]
    Keep,
    /// This takes its place; `None`: no limit any more.
    Replace(Option<TokenBucket>),
}

/// What happens to a running limiter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RateLimiterUpdate {
    /// Bytes.
    pub bandwidth: BucketUpdate,
    /// Operations.
    pub ops: BucketUpdate,
}

/// A limit on bytes and operations; by default none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RateLimiter {
    bandwidth: Option<TokenBucket>,
    ops: Option<TokenBucket>,
}

impl RateLimiter {
    /// A limiter of these buckets; `None` is no limit.
    pub fn new(bandwidth: Option<TokenBucket>, ops: Option<TokenBucket>) -> Self {
        RateLimiter { bandwidth, ops }
    }

    /// What of it is saved, at `now`.
    pub fn save(&self, now: u64) -> LimiterState {
        let save = |bucket: &Option<TokenBucket>| {
            let bucket = bucket.as_ref();
            bucket.map_or_else(BucketState::default, |bucket| bucket.save(now))
        };
        LimiterState {
            bandwidth: save(&self.bandwidth),
            ops: save(&self.ops),
        }
    }

    /// A limiter of the same buckets as they were saved, refilled by the `elapsed` nanoseconds since.
    #[must_use]
    pub fn restore(self, state: &LimiterState, elapsed: u64) -> Self {
        let restore = |bucket: Option<TokenBucket>, state| {
            bucket.map(|bucket| bucket.restore(state, elapsed))
        };
        RateLimiter {
            bandwidth: restore(self.bandwidth, &state.bandwidth),
            ops: restore(self.ops, &state.ops),
        }
    }

    /// Whether there is any limit at all.
    pub fn limits(&self) -> bool {
        self.bandwidth.is_some() || self.ops.is_some()
    }

    /// Nanoseconds from `now` until one operation of `bytes` may go ahead; 0: at once.
    pub fn wait(&mut self, now: u64, bytes: u64) -> u64 {
        let for_ops = self.ops.as_mut().map_or(0, |b| b.wait(now, 1));
        let for_bytes = self.bandwidth.as_mut().map_or(0, |b| b.wait(now, bytes));
        for_ops.max(for_bytes)
    }

    /// Charges one operation of `bytes`, into debt if need be.
    pub fn charge(&mut self, now: u64, bytes: u64) {
        if let Some(bucket) = &mut self.ops {
            bucket.take(now, 1);
        }
        if let Some(bucket) = &mut self.bandwidth {
            bucket.take(now, bytes);
        }
    }

    /// Changes the limits from now on.
    pub fn update(&mut self, update: RateLimiterUpdate) {
        if let BucketUpdate::Replace(bucket) = update.bandwidth {
            self.bandwidth = bucket;
        }
        if let BucketUpdate::Replace(bucket) = update.ops {
            self.ops = bucket;
        }
    }
}

#[cfg(test)]
mod properties;

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = NANOS_PER_MILLI;

    fn bytes(size: u64, burst: u64, refill_ms: u64) -> RateLimiter {
        RateLimiter::new(TokenBucket::new(size, burst, refill_ms), None)
    }

    #[test]
    fn new_when_size_or_time_is_zero_is_no_bucket() {
        assert_eq!(TokenBucket::new(0, 5, 100), None);
        assert_eq!(TokenBucket::new(5, 5, 0), None);
        let mut none = RateLimiter::default();
        assert!(!none.limits());
        none.charge(0, u64::MAX);
        assert_eq!(none.wait(0, u64::MAX), 0);
        let bucket = || TokenBucket::new(5, 0, 100);
        assert!(RateLimiter::new(bucket(), None).limits());
        assert!(RateLimiter::new(None, bucket()).limits());
    }

    #[test]
    fn wait_when_tokens_are_no_whole_nanoseconds_is_rounded_up_and_counts_what_is_earned() {
        let mut limiter = bytes(3, 0, 10);
        limiter.charge(0, 3);
        assert_eq!(limiter.wait(0, 1), 3_333_334);
        assert_eq!(limiter.wait(1, 1), 3_333_333);
        assert_eq!(limiter.wait(3_333_333, 1), 1);
        assert_eq!(limiter.wait(3_333_334, 1), 0);
    }

    #[test]
    fn fraction_when_the_bucket_is_just_full_is_not_kept() {
        let mut limiter = bytes(3, 0, 10);
        limiter.charge(0, 1);
        // A token and two thirds are earned, and there is room for one.
        let now = 5_555_555;
        assert_eq!(limiter.wait(now, 3), 0);
        limiter.charge(now, 3);
        assert_eq!(limiter.wait(now, 1), 3_333_334);
    }

    #[test]
    fn burst_when_there_is_no_token_is_taken_at_once() {
        let empty = LimiterState {
            bandwidth: BucketState {
                missing: 100,
                burst_used: 0,
            },
            ..LimiterState::default()
        };
        let mut limiter = bytes(100, 50, 100).restore(&empty, 0);
        assert_eq!(limiter.wait(0, 50), 0);
        assert_eq!(limiter.wait(0, 51), MS);
        limiter.charge(0, 50);
        assert_eq!(limiter.wait(0, 1), MS);
    }

    #[test]
    fn wait_when_empty_is_the_exact_time_to_refill() {
        let mut limiter = bytes(1000, 0, 100);
        assert_eq!(limiter.wait(5, 1000), 0);
        limiter.charge(5, 1000);
        assert_eq!(limiter.wait(5, 1), MS / 10);
        assert_eq!(limiter.wait(5, 1000), 100 * MS);
        assert_eq!(limiter.wait(5 + 50 * MS, 1000), 50 * MS);
        assert_eq!(limiter.wait(5 + 50 * MS, 500), 0);
    }

    #[test]
    fn take_some_when_there_are_fewer_takes_those() {
        let mut bucket = TokenBucket::new(100, 20, 1000).unwrap();
        assert_eq!(bucket.take_some(0, 90), 90);
        assert_eq!(bucket.take_some(0, 90), 30);
        assert_eq!(bucket.take_some(0, 90), 0);
        assert_eq!(bucket.take_some(100 * MS, 90), 10);
        assert_eq!(bucket.take_some(5000 * MS, 200), 100);
    }

    #[test]
    fn burst_when_used_up_does_not_come_back() {
        let mut limiter = bytes(100, 50, 100);
        assert_eq!(limiter.wait(0, 150), 0);
        limiter.charge(0, 150);
        assert_eq!(limiter.wait(0, 100), 100 * MS);
        assert_eq!(limiter.wait(1000 * MS, 100), 0);
        limiter.charge(1000 * MS, 100);
        assert_eq!(limiter.wait(1000 * MS, 1), MS);
    }

    #[test]
    fn charge_when_larger_than_the_bucket_leaves_a_debt() {
        let mut limiter = bytes(100, 0, 100);
        assert_eq!(limiter.wait(0, 1000), 0);
        limiter.charge(0, 1000);
        assert_eq!(limiter.wait(0, 1), 901 * MS);
        assert_eq!(limiter.wait(0, 1000), 900 * MS);
        assert_eq!(limiter.wait(900 * MS, 1000), 0);
        assert_eq!(limiter.wait(900 * MS, 50), 50 * MS);
    }

    #[test]
    fn refill_when_asked_often_loses_no_fraction() {
        // 3 tokens in 10 ms, asked every microsecond.
        let mut limiter = bytes(3, 0, 10);
        limiter.charge(0, 3);
        for micro in 1..10_000 {
            assert!(limiter.wait(micro * 1000, 3) > 0, "at {micro}");
        }
        assert_eq!(limiter.wait(10 * MS, 3), 0);
    }

    #[test]
    fn both_buckets_when_one_is_empty_make_wait() {
        let mut limiter =
            RateLimiter::new(TokenBucket::new(1000, 0, 10), TokenBucket::new(2, 0, 10));
        limiter.charge(0, 1);
        limiter.charge(0, 1);
        assert_eq!(limiter.wait(0, 1), 5 * MS);
        limiter.update(RateLimiterUpdate {
            ops: BucketUpdate::Replace(None),
            ..Default::default()
        });
        assert_eq!(limiter.wait(0, 1), 0);
        assert_eq!(limiter.wait(0, 1000), 10 * MS / 1000 * 2);
    }

    #[test]
    fn extremes_when_given_do_not_overflow() {
        let mut limiter = bytes(u64::MAX, u64::MAX, u64::MAX);
        limiter.charge(0, u64::MAX);
        limiter.charge(u64::MAX, u64::MAX);
        limiter.charge(0, u64::MAX);
        let _ = limiter.wait(u64::MAX, u64::MAX);
        let mut tiny = bytes(1, 0, u64::MAX);
        tiny.charge(0, u64::MAX);
        assert_eq!(tiny.wait(u64::MAX, 1), u64::MAX);
    }

    #[test]
    fn limiter_when_saved_is_the_same_when_made_anew() {
        let new = || RateLimiter::new(TokenBucket::new(1000, 50, 100), TokenBucket::new(2, 0, 10));
        let mut limiter = new();
        let make = |state: LimiterState| new().restore(&state, 0);
        let save = |limiter: &RateLimiter| limiter.save(7 * MS);
        crate::state::state_round_trip!(limiter, make, save);
        limiter.charge(0, 700);
        crate::state::state_round_trip!(limiter, make, save);
        // A debt.
        limiter.charge(5 * MS, 5000);
        crate::state::state_round_trip!(limiter, make, save);
        assert_eq!(RateLimiter::default().save(3), LimiterState::default());
        assert_eq!(new().restore(&LimiterState::default(), 0), new());
    }

    #[test]
    fn restore_when_time_has_passed_refills_by_that_and_no_more() {
        let new = || bytes(1000, 50, 100);
        let mut limiter = new();
        limiter.charge(5 * MS, 50 + 1500);
        let state = limiter.save(5 * MS);
        assert_eq!(
            state.bandwidth,
            BucketState {
                missing: 1500,
                burst_used: 50
            }
        );
        for (elapsed, wait) in [
            (0, 60 * MS),
            (50 * MS, 10 * MS),
            (60 * MS, 0),
            (u64::MAX, 0),
        ] {
            // The other clock may be anywhere.
            let mut restored = new().restore(&state, elapsed);
            assert_eq!(restored.wait(u64::MAX / 2, 100), wait, "{elapsed}");
        }
        let mut full = new().restore(&state, u64::MAX);
        assert_eq!(full.wait(0, 1000), 0);
        full.charge(0, 1000);
        assert_eq!(full.wait(0, 1), MS / 10, "the burst is not given again");
    }

    #[test]
    fn restore_when_the_state_is_extreme_does_not_overflow() {
        let hostile = BucketState {
            missing: u64::MAX,
            burst_used: u64::MAX,
        };
        let state = LimiterState {
            bandwidth: hostile,
            ops: hostile,
        };
        for (size, refill) in [(1, 1), (u64::MAX, u64::MAX), (1, u64::MAX), (u64::MAX, 1)] {
            let bucket = || TokenBucket::new(size, 1, refill);
            let mut limiter = RateLimiter::new(bucket(), bucket()).restore(&state, u64::MAX);
            let _ = limiter.wait(u64::MAX, u64::MAX);
            limiter.charge(u64::MAX, u64::MAX);
            let _ = limiter.save(u64::MAX);
        }
        // Without a bucket there is nothing to restore.
        assert_eq!(
            RateLimiter::default().restore(&state, 5),
            RateLimiter::default()
        );
    }
}
