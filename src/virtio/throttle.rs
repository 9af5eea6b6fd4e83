//! A rate limiter and the timer that ends its waits.
//!
//! Workers of one device have one limiter between them ([`Shared`]), behind a lock that is taken for the
//! arithmetic of one operation, and only while there is a limit: a device without limits takes none, and one
//! that has them is not meant to be fast.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vmm_sys_util::timerfd::TimerFd;

use super::PerWorker;
use crate::rate_limiter::{LimiterState, RateLimiter, RateLimiterUpdate};
use crate::sys::clock;

/// Holds one queue back. The timer exists even without a limit: one may be set later, when
/// nothing may be opened any more.
#[derive(Debug)]
pub struct Throttle {
    limiter: Limiter,
    timer: TimerFd,
}

/// Whose the limiter is.
#[derive(Debug)]
enum Limiter {
    Own(RateLimiter),
    /// Also that of the device's other workers; the number is this one's.
    Shared(Arc<Shared>, usize),
}

impl Throttle {
    /// # Errors
    /// When the host has no descriptor left.
    pub fn new(limiter: RateLimiter) -> io::Result<Self> {
        Throttle::of(Limiter::Own(limiter))
    }

    /// One for each of `workers` workers, which share `limiter`.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn for_workers(limiter: RateLimiter, workers: usize) -> io::Result<PerWorker<Self>> {
        if workers == 1 {
            return Throttle::new(limiter).map(PerWorker::from);
        }
        let shared = Arc::new(Shared::new(limiter));
        PerWorker::try_make(workers, |worker| {
            Throttle::of(Limiter::Shared(Arc::clone(&shared), worker))
        })
    }

    fn of(limiter: Limiter) -> io::Result<Self> {
        let timer = TimerFd::new().map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
        Ok(Throttle { limiter, timer })
    }

    /// Whether one operation of `bytes` may go ahead; if not, the timer is set to when it may.
    pub fn permits(&mut self, bytes: u64) -> bool {
        if !self.limits() {
            return true;
        }
        let now = clock::monotonic_nanos();
        let wait = match &mut self.limiter {
            Limiter::Own(limiter) => limiter.wait(now, bytes),
            Limiter::Shared(shared, worker) => shared.lock().wait(*worker, now, bytes),
        };
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
        if !self.limits() {
            return;
        }
        let now = clock::monotonic_nanos();
        match &mut self.limiter {
            Limiter::Own(limiter) => limiter.charge(now, bytes),
            Limiter::Shared(shared, _) => shared.lock().limiter.charge(now, bytes),
        }
    }

    /// What of the limiter is saved; of a shared one, by the first worker.
    pub fn save(&self) -> LimiterState {
        let now = clock::monotonic_nanos();
        match &self.limiter {
            Limiter::Own(limiter) if limiter.limits() => limiter.save(now),
            Limiter::Shared(shared, 0) if self.limits() => shared.lock().limiter.save(now),
            _ => LimiterState::default(),
        }
    }

    /// Changes the limits. Each of several workers makes change number `number`; the first that does so
    /// makes it for all.
    pub fn update(&mut self, update: RateLimiterUpdate, number: u64) {
        match &mut self.limiter {
            Limiter::Own(limiter) => limiter.update(update),
            Limiter::Shared(shared, _) => {
                let mut buckets = shared.lock();
                if number > buckets.changes {
                    buckets.changes = number;
                    buckets.turn = None;
                    buckets.limiter.update(update);
                    let limits = buckets.limiter.limits();
                    shared.limits.store(limits, Ordering::Relaxed);
                }
            }
        }
    }

    fn limits(&self) -> bool {
        match &self.limiter {
            Limiter::Own(limiter) => limiter.limits(),
            Limiter::Shared(shared, _) => shared.limits.load(Ordering::Relaxed),
        }
    }
}

impl AsRawFd for Throttle {
    /// Readable when the wait is over; watched edge-triggered, so it is never read.
    fn as_raw_fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }
}

/// The limiter of all workers of a device.
#[derive(Debug)]
struct Shared {
    /// There is a limit; changed with the buckets locked.
    limits: AtomicBool,
    buckets: Mutex<Buckets>,
}

#[derive(Debug)]
struct Buckets {
    limiter: RateLimiter,
    turn: Option<Turn>,
    /// The last change that was made.
    changes: u64,
}

/// A worker had to wait, and goes first: small operations of one queue would otherwise take for ever what a
/// large one of another queue waits for.
#[derive(Clone, Copy, Debug)]
struct Turn {
    worker: usize,
    /// When there will be enough for it.
    due: u64,
}

/// A turn that is not taken for so long after it was due is over: its queue may have been reset.
const TURN_NANOS: u64 = 10_000_000;
/// The least that others wait behind a turn.
const BEHIND_NANOS: u64 = 50_000;

impl Shared {
    fn new(limiter: RateLimiter) -> Self {
        Shared {
            limits: AtomicBool::new(limiter.limits()),
            buckets: Mutex::new(Buckets {
                limiter,
                turn: None,
                changes: 0,
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Buckets> {
        // A panic ends the process.
        self.buckets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Buckets {
    /// Nanoseconds from `now` until `worker` may go on with one operation of `bytes`; 0: at once.
    fn wait(&mut self, worker: usize, now: u64, bytes: u64) -> u64 {
        if let Some(turn) = self.turn
            && turn.worker != worker
            && now < turn.due.saturating_add(TURN_NANOS)
        {
            return turn.due.saturating_sub(now).max(BEHIND_NANOS);
        }
        let wait = self.limiter.wait(now, bytes);
        self.turn = (wait > 0).then_some(Turn {
            worker,
            due: now.saturating_add(wait),
        });
        wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rate_limiter::{BucketUpdate, TokenBucket};

    const MS: u64 = 1_000_000;

    fn buckets(size: u64) -> Buckets {
        Buckets {
            limiter: RateLimiter::new(TokenBucket::new(size, 0, 100), None),
            turn: None,
            changes: 0,
        }
    }

    #[test]
    fn large_operation_when_another_worker_has_many_small_ones_has_its_turn() {
        let mut buckets = buckets(1000);
        buckets.limiter.charge(0, 500);
        // It needs all of the bucket, which small ones would never let fill up.
        assert_eq!(buckets.wait(1, 0, 1000), 50 * MS);
        assert_eq!(buckets.wait(0, 0, 10), 50 * MS);
        assert_eq!(buckets.wait(2, 30 * MS, 10), 20 * MS);
        assert_eq!(buckets.wait(0, 50 * MS, 10), BEHIND_NANOS);
        assert_eq!(buckets.wait(1, 50 * MS, 1000), 0);
        buckets.limiter.charge(50 * MS, 1000);
        assert_eq!(buckets.wait(0, 50 * MS, 10), MS);
    }

    #[test]
    fn turn_when_it_is_not_taken_is_over() {
        let mut buckets = buckets(1000);
        buckets.limiter.charge(0, 1000);
        assert_eq!(buckets.wait(1, 0, 1000), 100 * MS);
        let late = 100 * MS + TURN_NANOS;
        assert_eq!(buckets.wait(0, late - 1, 10), BEHIND_NANOS);
        assert_eq!(buckets.wait(0, late, 10), 0);
    }

    #[test]
    fn workers_when_they_share_a_limit_take_from_one_bucket() {
        let limiter = RateLimiter::new(TokenBucket::new(1000, 0, 3_600_000), None);
        let mut throttles = Throttle::for_workers(limiter, 2).unwrap();
        let second = &mut throttles.others[0];
        assert!(throttles.first.permits(800));
        throttles.first.charge(800);
        assert!(second.permits(200));
        second.charge(200);
        assert!(!second.permits(10));
        assert_eq!(throttles.first.save().bandwidth.missing, 1000);
        assert_eq!(second.save(), LimiterState::default());

        // A change is made once, whichever worker comes first.
        let change = |size| RateLimiterUpdate {
            bandwidth: BucketUpdate::Replace(TokenBucket::new(size, 0, 3_600_000)),
            ..RateLimiterUpdate::default()
        };
        second.update(change(100), 7);
        assert!(throttles.first.permits(60));
        throttles.first.charge(60);
        throttles.first.update(change(100), 7);
        assert!(!throttles.first.permits(60));
        // Nor is an earlier one made later.
        second.update(change(100), 8);
        throttles.first.update(change(0), 7);
        second.charge(100);
        assert!(!throttles.first.permits(1));
        throttles.first.update(change(0), 9);
        assert!(throttles.first.permits(u64::MAX) && second.permits(u64::MAX));
    }
}
