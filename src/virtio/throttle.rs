//! A rate limiter and the timer that ends its waits.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use vmm_sys_util::timerfd::TimerFd;

use crate::rate_limiter::{LimiterState, RateLimiter, RateLimiterUpdate};
use crate::sys::clock;

/// Holds one queue back. The timer exists even without a limit: one may be set later, when
/// nothing may be opened any more.
#[derive(Debug)]
pub struct Throttle {
    limiter: RateLimiter,
    timer: TimerFd,
}

impl Throttle {
    /// # Errors
    /// When the host has no descriptor left.
    pub fn new(limiter: RateLimiter) -> io::Result<Self> {
        let timer = TimerFd::new().map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
        Ok(Throttle { limiter, timer })
    }

    /// Whether one operation of `bytes` may go ahead; if not, the timer is set to when it may.
    pub fn permits(&mut self, bytes: u64) -> bool {
        if !self.limiter.limits() {
            return true;
        }
        let wait = self.limiter.wait(clock::monotonic_nanos(), bytes);
        if wait == 0 {
            return true;
        }
        // A timer that cannot be set must not stop the device for ever.
        self.timer.reset(Duration::from_nanos(wait), None).is_err()
    }

    /// Makes the timer come in `nanos`, which are not 0, without holding anything back.
    pub fn wake_in(&mut self, nanos: u64) {
        // Without the timer it is the next kick that wakes.
        let _ = self.timer.reset(Duration::from_nanos(nanos), None);
    }

    /// Charges one operation of `bytes`.
    pub fn charge(&mut self, bytes: u64) {
        if self.limiter.limits() {
            self.limiter.charge(clock::monotonic_nanos(), bytes);
        }
    }

    /// What of the limiter is saved.
    pub fn save(&self) -> LimiterState {
        if self.limiter.limits() {
            self.limiter.save(clock::monotonic_nanos())
        } else {
            LimiterState::default()
        }
    }

    /// Changes the limits.
    pub fn update(&mut self, update: RateLimiterUpdate) {
        self.limiter.update(update);
    }
}

impl AsRawFd for Throttle {
    /// Readable when the wait is over; watched edge-triggered, so it is never read.
    fn as_raw_fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }
}
