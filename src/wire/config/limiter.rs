//! Limits on what a device may do, as two token buckets.

use serde::{Deserialize, Serialize};

use super::json::optional_object;

/// Limits by two token buckets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimiterConfig {
    /// Bytes.
    #[serde(default, deserialize_with = "optional_object")]
    pub bandwidth: Option<TokenBucketConfig>,
    /// Operations.
    #[serde(default, deserialize_with = "optional_object")]
    pub ops: Option<TokenBucketConfig>,
}

impl RateLimiterConfig {
    /// What is in force: buckets of nothing are no buckets, and no buckets are no limiter.
    pub fn in_force(limiter: Option<Self>) -> Option<Self> {
        let limiter = limiter?;
        let limiter = RateLimiterConfig {
            bandwidth: limiter.bandwidth.and_then(TokenBucketConfig::in_force),
            ops: limiter.ops.and_then(TokenBucketConfig::in_force),
        };
        (limiter != Self::default()).then_some(limiter)
    }

    /// `limiter` after a PATCH: a bucket that is given takes the old one's place (or removes it,
    /// when it is a bucket of nothing), one that is absent stays as it was.
    pub fn patched(limiter: Option<Self>, update: Option<Self>) -> Option<Self> {
        let old = limiter.unwrap_or_default();
        let new = update.unwrap_or_default();
        Self::in_force(Some(RateLimiterConfig {
            bandwidth: new.bandwidth.or(old.bandwidth),
            ops: new.ops.or(old.ops),
        }))
    }
}

/// One token bucket. A size or refill time of 0 means no bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct TokenBucketConfig {
    /// Tokens the bucket holds.
    pub size: u64,
    /// Tokens given once, on top, at the start.
    #[serde(default)]
    pub one_time_burst: Option<u64>,
    /// Milliseconds in which `size` tokens come back.
    pub refill_time: u64,
}

impl TokenBucketConfig {
    /// Itself, unless it is a bucket of nothing.
    pub fn in_force(self) -> Option<Self> {
        (self.size > 0 && self.refill_time > 0).then_some(TokenBucketConfig {
            one_time_burst: self.one_time_burst.filter(|burst| *burst > 0),
            ..self
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bucket(size: u64, refill_time: u64) -> TokenBucketConfig {
        TokenBucketConfig {
            size,
            one_time_burst: Some(0),
            refill_time,
        }
    }

    #[test]
    fn limiter_when_patched_changes_only_the_buckets_given() {
        let (ten, none) = (Some(bucket(10, 100)), Some(bucket(0, 0)));
        let limiter = |bandwidth, ops| Some(RateLimiterConfig { bandwidth, ops });
        let kept = Some(TokenBucketConfig {
            one_time_burst: None,
            ..bucket(10, 100)
        });
        // before, update, after
        let cases = [
            (None, limiter(ten, None), limiter(kept, None)),
            (
                limiter(kept, kept),
                limiter(none, None),
                limiter(None, kept),
            ),
            (limiter(kept, None), limiter(none, None), None),
            (limiter(kept, kept), None, limiter(kept, kept)),
            (None, limiter(None, None), None),
        ];
        for (before, update, after) in cases {
            assert_eq!(RateLimiterConfig::patched(before, update), after);
        }
    }
}
