//! When each step of a start happened, in microseconds since the process began.
#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::sys::clock;

/// A step of a start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// The API socket accepts clients.
    ApiReady,
    /// The state file of a snapshot was read, and what it names is open.
    SnapshotRead,
    /// Everything needed is configured: the start was asked for.
    Configured,
    /// Guest memory exists and KVM knows it.
    MemoryMade,
    /// Kernel, initrd and tables are in guest memory.
    KernelLoaded,
    /// The first vCPU is about to run its first guest instruction.
    GuestEntered,
    /// The guest wrote to the boot-timer device.
    BootTimer,
}

/// Names in the order in which the steps happen, as `GET /vm/timeline` has them.
const MOMENTS: [(Moment, &str); 7] = [
    (Moment::ApiReady, "api_ready_us"),
    (Moment::SnapshotRead, "snapshot_read_us"),
    (Moment::Configured, "configured_us"),
    (Moment::MemoryMade, "memory_made_us"),
    (Moment::KernelLoaded, "kernel_loaded_us"),
    (Moment::GuestEntered, "guest_entered_us"),
    (Moment::BootTimer, "boot_timer_us"),
];

/// Written by the thread a step happens on, read by control; clones share the same moments.
#[derive(Clone, Debug)]
pub struct Timeline {
    /// Nanoseconds of the monotonic clock.
    began: u64,
    /// Nanoseconds of the monotonic clock; 0 where it has not happened.
    moments: Arc<[AtomicU64; MOMENTS.len()]>,
}

impl Timeline {
    /// A timeline that begins now.
    pub fn begin() -> Self {
        Timeline {
            began: clock::monotonic_nanos(),
            moments: Arc::default(),
        }
    }

    /// `moment` is now; only the first time counts.
    pub fn mark(&self, moment: Moment) {
        if let Some(slot) = self.moments.get(moment as usize) {
            let now = clock::monotonic_nanos();
            let _ = slot.compare_exchange(0, now, Ordering::Relaxed, Ordering::Relaxed);
        }
    }

    /// `moment` happens anew: a start that failed is tried again.
    pub fn mark_again(&self, moment: Moment) {
        if let Some(slot) = self.moments.get(moment as usize) {
            slot.store(clock::monotonic_nanos(), Ordering::Relaxed);
        }
    }

    /// Microseconds from the beginning to `moment`, if it has happened.
    pub fn micros(&self, moment: Moment) -> Option<u64> {
        let at = self.moments.get(moment as usize)?.load(Ordering::Relaxed);
        (at != 0).then(|| at.saturating_sub(self.began) / 1000)
    }

    /// Every step and its microseconds, in order.
    pub fn steps(&self) -> impl Iterator<Item = (&'static str, Option<u64>)> + '_ {
        MOMENTS
            .into_iter()
            .map(|(moment, name)| (name, self.micros(moment)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_when_some_happened_have_times_in_order() {
        let timeline = Timeline::begin();
        timeline.mark(Moment::ApiReady);
        timeline.mark(Moment::Configured);
        let first = timeline.micros(Moment::ApiReady).unwrap();
        timeline.mark(Moment::ApiReady);
        assert_eq!(timeline.micros(Moment::ApiReady), Some(first));
        assert!(timeline.micros(Moment::Configured).unwrap() >= first);
        assert_eq!(timeline.micros(Moment::BootTimer), None);
        assert_eq!(timeline.steps().count(), 7);
        for (index, (moment, _)) in MOMENTS.into_iter().enumerate() {
            assert_eq!(moment as usize, index);
        }
    }
}
