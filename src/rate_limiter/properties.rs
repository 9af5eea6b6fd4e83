//! Buckets against a model that counts in fractions of a token, and all of small ones.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::properties::hold;

/// Exact: one token is `refill` parts, and each nanosecond earns `size` of them.
#[derive(Clone, Debug)]
struct Model {
    size: i128,
    refill: i128,
    parts: i128,
    burst: i128,
    now: u64,
}

impl Model {
    fn new(size: u64, burst: u64, refill_nanos: u64) -> Self {
        let (size, refill) = (i128::from(size), i128::from(refill_nanos));
        Model {
            size,
            refill,
            parts: size * refill,
            burst: i128::from(burst),
            now: 0,
        }
    }

    fn pass(&mut self, nanos: u64) {
        self.now += nanos;
        let earned = self.parts + i128::from(nanos) * self.size;
        self.parts = earned.min(self.size * self.refill);
    }

    /// The least time after which `wanted` tokens are there; what can never be there waits for no debt.
    fn wait(&self, wanted: u64) -> u64 {
        let rest = (i128::from(wanted) - self.burst).max(0);
        let needed = if rest > self.size { 0 } else { rest };
        let missing = needed * self.refill - self.parts;
        let nanos = (missing.max(0) + self.size - 1).div_euclid(self.size);
        u64::try_from(nanos).unwrap_or(u64::MAX)
    }

    fn take(&mut self, wanted: u64) {
        let from_burst = i128::from(wanted).min(self.burst);
        self.burst -= from_burst;
        self.parts -= (i128::from(wanted) - from_burst) * self.refill;
    }
}

fn bucket(size: u64, burst: u64, refill_nanos: u64) -> TokenBucket {
    TokenBucket {
        size,
        refill_nanos: NonZeroU64::new(refill_nanos).unwrap(),
        burst,
        burst_size: burst,
        tokens: i128::from(size),
        fraction: 0,
        refilled_at: Some(0),
    }
}

/// Takes and waits, of a bucket and of the model of it; they agree at each step.
fn check(size: u64, burst: u64, refill_nanos: u64, steps: &[(u64, u64, u64)]) {
    let mut real = bucket(size, burst, refill_nanos);
    let mut model = Model::new(size, burst, refill_nanos);
    for &(nanos, wanted, taken) in steps {
        model.pass(nanos);
        let now = model.now;
        let wait = real.wait(now, wanted);
        assert_eq!(wait, model.wait(wanted), "{real:?} {model:?} {wanted}");
        if wait > 0 {
            let before = now.saturating_add(wait - 1);
            assert!(real.clone().wait(before, wanted) > 0, "{real:?}");
        }
        // The longest is said of all that are longer.
        if wait < u64::MAX
            && let Some(then) = now.checked_add(wait)
        {
            assert_eq!(real.clone().wait(then, wanted), 0, "{real:?}");
        }
        real.take(now, taken);
        model.take(taken);
        assert_eq!(i128::from(real.burst), model.burst);

        // A saved bucket lacks less than one token more.
        let saved = real.save(now);
        let mut restored = bucket(size, burst, refill_nanos).restore(&saved, 0);
        assert_eq!(restored.save(5), saved);
        let (then, now) = (restored.wait(5, wanted), real.wait(now, wanted));
        let token = refill_nanos.div_ceil(size);
        let most = now.saturating_add(token);
        assert!((now..=most).contains(&then), "{real:?} {restored:?}");
    }
}

#[test]
fn bucket_when_used_in_any_way_agrees_with_the_model() {
    let sizes = prop_oneof![1..10u64, 1..1_000_000u64, 1..1u64 << 40];
    let refills = prop_oneof![1..10u64, 1..1_000_000_000u64, 1..1u64 << 50];
    let steps = (
        prop_oneof![0..10u64, 0..1_000_000_000u64, 0..1u64 << 52],
        prop_oneof![0..10u64, 0..1_000_000u64, any::<u64>()],
        prop_oneof![0..10u64, 0..1_000_000u64, 0..1u64 << 45],
    );
    let inputs = (sizes, 0..1_000_000u64, refills, vec(steps, 1..12));
    hold(inputs, |(size, burst, refill, steps)| {
        check(size, burst, refill, &steps);
    });
}

#[test]
fn operations_when_held_back_for_as_long_as_told_stay_within_the_limit() {
    let inputs = (
        1..100_000u64,
        1..1_000u64,
        vec((0..2_000u64, 0..1_000_000u64), 1..60),
    );
    hold(inputs, |(size, refill_ms, operations)| {
        let mut limiter = RateLimiter::new(TokenBucket::new(size, 0, refill_ms), None);
        let (mut now, mut total) = (0, 0u64);
        for (bytes, pause) in operations {
            // What fits into the bucket: larger ones go into debt.
            let bytes = bytes.min(size);
            now += pause;
            now += limiter.wait(now, bytes);
            assert_eq!(limiter.wait(now, bytes), 0);
            limiter.charge(now, bytes);
            total += bytes;
            let refill = u128::from(refill_ms * NANOS_PER_MILLI);
            let most = u128::from(size) + u128::from(now) * u128::from(size) / refill;
            assert!(u128::from(total) <= most, "{total} by {now}");
        }
    });
}

/// No prover for Rust is at hand (kani): all small buckets, in all ways for three steps.
#[test]
fn bucket_when_it_is_any_small_one_agrees_with_the_model_in_all_ways() {
    let steps: Vec<(u64, u64, u64)> = (0..36).map(|n| (n % 3, n / 3 % 4, n / 12)).collect();
    for (size, refill) in (1..=3).flat_map(|size| (1..=4).map(move |refill| (size, refill))) {
        for burst in [0, 2] {
            for all in 0..36usize.pow(3) {
                let steps = [all % 36, all / 36 % 36, all / 36 / 36].map(|n| steps[n]);
                check(size, burst, refill, &steps);
            }
        }
    }
}
