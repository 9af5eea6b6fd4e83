//! Counters, and the two forms they are read in: Prometheus' text for `GET /metrics`, and
//! Firecracker's line of JSON for the sink of `PUT /metrics`.
//!
//! Nothing here knows a device. The thread that counts owns its [`Counter`]s, on one thread, and has a
//! function that reads them out into a [`Report`]; control calls these when a client asks, so
//! counting costs a thread one plain addition and nothing else.
#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

mod report;
mod sink;

pub use report::Report;
pub use sink::Sink;

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A number that only grows: written by one thread (or under one lock), read by any.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// None counted yet.
    pub const fn new() -> Self {
        Counter(AtomicU64::new(0))
    }

    /// Counts `n` more. There is one writer, so nothing is lost between load and store, and no
    /// processor waits for another.
    pub fn add(&self, n: u64) {
        self.0.store(self.get().wrapping_add(n), Ordering::Relaxed);
    }

    /// Counts one more.
    pub fn one(&self) {
        self.add(1);
    }

    /// Takes the place of the count: for what is no count but the last of its kind.
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// The count so far.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Upper bounds of a [`Histogram`]'s buckets, in microseconds, and as Prometheus is told them.
const BOUNDS: [(u64, &str); 8] = [
    (50, "0.00005"),
    (200, "0.0002"),
    (1_000, "0.001"),
    (5_000, "0.005"),
    (20_000, "0.02"),
    (100_000, "0.1"),
    (1_000_000, "1"),
    (10_000_000, "10"),
];

/// How long things took: written by one thread, read by any.
#[derive(Debug, Default)]
pub struct Histogram {
    /// One for each bound, each for what the ones before do not hold; the rest last.
    buckets: [Counter; BOUNDS.len() + 1],
    micros: Counter,
}

impl Histogram {
    /// Something took `micros` microseconds.
    pub fn observe(&self, micros: u64) {
        let bucket = BOUNDS.iter().position(|(bound, _)| micros <= *bound);
        if let Some(bucket) = self.buckets.get(bucket.unwrap_or(BOUNDS.len())) {
            bucket.one();
        }
        self.micros.add(micros);
    }
}

/// Least, most and sum of how long things took: written by one thread, read by any.
#[derive(Debug, Default)]
pub struct TimeSummary {
    least: Counter,
    most: Counter,
    sum: Counter,
}

impl TimeSummary {
    /// Something took `micros` microseconds.
    pub fn observe(&self, micros: u64) {
        // 0 is both "none yet" and the least there can be.
        if self.least.get() == 0 || micros < self.least.get() {
            self.least.set(micros);
        }
        if micros > self.most.get() {
            self.most.set(micros);
        }
        self.sum.add(micros);
    }

    /// Adds what another thread has observed, to a summary that no thread writes.
    pub fn add(&self, other: &TimeSummary) {
        let (least, most) = (other.least.get(), other.most.get());
        if self.least.get() == 0 || (least != 0 && least < self.least.get()) {
            self.least.set(least);
        }
        self.most.set(self.most.get().max(most));
        self.sum.add(other.sum());
    }

    /// The sum, in microseconds.
    pub fn sum(&self) -> u64 {
        self.sum.get()
    }
}

/// `time` in microseconds.
pub fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// Microseconds from `then` to now.
pub fn micros_since(then: Instant) -> u64 {
    micros(then.elapsed())
}

/// Something that counts and can be asked without knowing what it is.
pub trait Reader: fmt::Debug + Send + Sync {
    /// Writes all it has counted into `report`.
    fn read(&self, report: &mut Report);
}
