//! From the limits that clients ask for to those that devices keep.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::rate_limiter::{BucketUpdate, RateLimiter, RateLimiterUpdate, TokenBucket};
use crate::wire::config::{RateLimiterConfig, TokenBucketConfig};

/// The limiter that `config` asks for.
pub(super) fn limiter(config: Option<RateLimiterConfig>) -> RateLimiter {
    let config = config.unwrap_or_default();
    RateLimiter::new(
        config.bandwidth.and_then(bucket),
        config.ops.and_then(bucket),
    )
}

/// What a change of limits means to a device.
pub(super) fn limiter_update(config: Option<RateLimiterConfig>) -> RateLimiterUpdate {
    // A bucket that is not given stays; one of nothing goes.
    let update = |given: Option<TokenBucketConfig>| {
        given.map_or(BucketUpdate::Keep, |config| {
            BucketUpdate::Replace(bucket(config))
        })
    };
    let config = config.unwrap_or_default();
    RateLimiterUpdate {
        bandwidth: update(config.bandwidth),
        ops: update(config.ops),
    }
}

/// The number of a change: greater than those of all changes before it. Workers that share limits change them
/// once.
pub(super) fn change_number() -> u64 {
    static CHANGES: AtomicU64 = AtomicU64::new(1);
    CHANGES.fetch_add(1, Ordering::Relaxed)
}

/// The bucket that `config` asks for, if it is one.
pub fn bucket(config: TokenBucketConfig) -> Option<TokenBucket> {
    TokenBucket::new(
        config.size,
        config.one_time_burst.unwrap_or(0),
        config.refill_time,
    )
}
