//! Whether a worker that has run out of work looks for more by itself before it sleeps, and how long.
//!
//! A sleep and a wake-up cost more than a small request. So a worker waits in two steps: for a window
//! of time it *polls*, which is to look at its queues, its inboxes and its device again and again, with
//! the driver left quiet; then it asks for kicks and sleeps.
//!
//! **The window** is between 0 and the limit. A wait that ended by a sleep, but was shorter than the
//! limit, doubles it; a longer one that was polled in vain halves it, and soon leaves none. Where polling
//! does not pay although waits are short (the guest may need the very CPU that we poll on), it stops, and
//! each further time in vain doubles the number of short waits that go by before it is tried again.
//!
//! **The bound.** Time polled in vain is paid from an allowance that grows by a tenth of the time that
//! passes and holds [`ALLOWANCE_MAX`] at most. A worker therefore never polls in vain for more than that
//! plus a tenth of the time, whatever its guest does, and an idle guest's worker sleeps.
//!
//! **Scarce CPUs.** Two looks at the clock that are further apart than [`PREEMPTED_NANOS`] mean that the
//! thread lost its CPU in between: others need it. That ends the polling at once, and the whole gap is
//! charged to the allowance. A process that may use one CPU only does not poll at all: what it waits for
//! could not run meanwhile.
//!
//! This is the decision only: it is told the time, and does nothing itself.

/// The limit unless a client sets another, in microseconds.
pub const DEFAULT_MICROS: u16 = 50;

/// The first window after none.
const WINDOW_START: u64 = 10_000;

/// How often in a row polling may not pay before it stops: as often as it takes to grow the window.
const TRIES: u32 = 4;

/// At most two to the power of this many short waits go by before polling is tried again.
const SKIP_SHIFT_MAX: u32 = 8;

/// A gap between two looks at the clock that is no work of ours.
const PREEMPTED_NANOS: u64 = 30_000;

/// How long is polled between two offers of the CPU to other threads.
const YIELD_NANOS: u64 = 2_000;

/// The share of time that may be polled in vain.
const VAIN_SHARE: u64 = 10;

/// The most allowance there can be, in nanoseconds.
const ALLOWANCE_MAX: i64 = 1_000_000;

/// The least: how long polling is off after a long gap is bounded.
const ALLOWANCE_MIN: i64 = -10_000_000;

/// What has become of a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Polling found work.
    Paid,
    /// The window passed without any.
    Vain,
    /// The thread lost its CPU.
    Preempted,
}

/// The state of the decision. Times are nanoseconds of one clock.
#[derive(Clone, Debug)]
pub(super) struct Polling {
    /// The longest window; 0 when there is no polling.
    limit: u64,
    window: u64,
    /// Nanoseconds that may be polled in vain. Below 0 while a gap is paid off.
    allowance: i64,
    /// How often in a row polling did not pay.
    in_vain: u32,
    /// Short waits that go by before polling is tried again.
    skip: u32,
    /// When the present wait began.
    since: u64,
    /// The last look at the clock.
    last: u64,
    /// How much of the present wait was polled.
    polled: u64,
    /// How much is polled before the CPU is offered to other threads.
    yields: u64,
    /// The present wait is not polled any more.
    is_over: bool,
    /// When the thread woke up last, if it has slept in the present wait.
    woke: Option<u64>,
}

impl Polling {
    /// No polling.
    pub fn off() -> Self {
        Polling {
            limit: 0,
            window: 0,
            allowance: ALLOWANCE_MAX,
            in_vain: 0,
            skip: 0,
            since: 0,
            last: 0,
            polled: 0,
            yields: 0,
            is_over: true,
            woke: None,
        }
    }

    /// Polls for up to `micros` microseconds.
    pub fn up_to(micros: u16) -> Self {
        Polling {
            limit: u64::from(micros).saturating_mul(1000),
            ..Polling::off()
        }
    }

    /// Whether it ever polls: if not, it need not be told anything.
    pub fn is_on(&self) -> bool {
        self.limit > 0
    }

    /// Work was done since the last call, and there is none left at `now`: a wait ends, another begins.
    /// What has become of the polling in the one that ends, if it was polled to its end.
    pub fn begin(&mut self, now: u64) -> Option<Outcome> {
        self.earn(now);
        let paid = self.polled > 0 && !self.is_over;
        if paid {
            self.in_vain = 0;
        } else if let Some(woke) = self.woke.take() {
            self.adapt(woke.saturating_sub(self.since) <= self.limit);
        }
        self.woke = None;
        self.since = now;
        self.polled = 0;
        self.yields = YIELD_NANOS;
        self.is_over = self.window == 0 || self.allowance <= 0;
        paid.then_some(Outcome::Paid)
    }

    /// Whether the present wait is still to be polled. Needs no time.
    pub fn is_wanted(&self) -> bool {
        !self.is_over
    }

    /// Whether the wait has lasted so long that threads waiting for this CPU should come first.
    pub fn is_long(&mut self) -> bool {
        let long = self.polled >= self.yields;
        if long {
            self.yields = self.polled.saturating_add(YIELD_NANOS);
        }
        long
    }

    /// A look found nothing, and it is `now`. The outcome, if this was the last look.
    pub fn looked(&mut self, now: u64) -> Option<Outcome> {
        let passed = now.saturating_sub(self.last);
        self.earn(now);
        if passed > PREEMPTED_NANOS {
            self.polled = self.polled.saturating_add(passed);
            self.window = 0;
            self.stop();
            return Some(Outcome::Preempted);
        }
        self.polled = self.polled.saturating_add(passed);
        let allowance = u64::try_from(self.allowance).unwrap_or(0);
        if self.polled < self.window.min(allowance) {
            return None;
        }
        self.stop();
        Some(Outcome::Vain)
    }

    /// The thread has slept until `now`.
    pub fn woke(&mut self, now: u64) {
        self.woke = Some(now);
        self.is_over = true;
    }

    /// Sets the window after a wait that ended by a sleep.
    fn adapt(&mut self, is_short: bool) {
        let was_polled = self.polled > 0;
        if was_polled && self.in_vain >= TRIES {
            let shift = self.in_vain.saturating_sub(TRIES).min(SKIP_SHIFT_MAX);
            self.skip = 1u32.wrapping_shl(shift);
            self.window = 0;
        } else if !is_short {
            let half = self.window.checked_div(2).unwrap_or(0);
            self.window = if half < WINDOW_START { 0 } else { half };
        } else if self.in_vain < TRIES {
            let double = self.window.saturating_mul(2).max(WINDOW_START);
            self.window = double.min(self.limit);
        } else if self.skip > 0 {
            self.skip = self.skip.saturating_sub(1);
        } else {
            self.window = self.limit;
        }
    }

    /// Ends the polling of this wait, which was in vain, and pays for it.
    fn stop(&mut self) {
        let spent = i64::try_from(self.polled).unwrap_or(i64::MAX);
        self.allowance = self.allowance.saturating_sub(spent).max(ALLOWANCE_MIN);
        self.in_vain = self.in_vain.saturating_add(1);
        self.is_over = true;
    }

    /// Notes that it is `now`.
    fn earn(&mut self, now: u64) {
        let passed = now.saturating_sub(self.last);
        self.last = now;
        let share = passed.checked_div(VAIN_SHARE).unwrap_or(0);
        let share = i64::try_from(share).unwrap_or(i64::MAX);
        self.allowance = self.allowance.saturating_add(share).min(ALLOWANCE_MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::Random;

    const MICRO: u64 = 1000;
    /// How long a look takes.
    const LOOK: u64 = 500;
    /// How long after its kick a thread that sleeps is awake.
    const WAKE_UP: u64 = 5 * MICRO;

    /// A worker whose work takes no time.
    struct Worker {
        polling: Polling,
        now: u64,
        vain: u64,
        outcomes: Vec<Outcome>,
    }

    impl Worker {
        fn new(micros: u16) -> Self {
            Worker {
                polling: Polling::up_to(micros),
                now: 1_000_000_000,
                vain: 0,
                outcomes: Vec::new(),
            }
        }

        /// Waits for work that comes after `nanos`, each look taking `look`; how long it polled.
        fn wait(&mut self, nanos: u64, look: u64) -> u64 {
            self.outcomes.extend(self.polling.begin(self.now));
            let (began, arrives) = (self.now, self.now + nanos);
            while self.polling.is_wanted() {
                self.now += look;
                if self.now >= arrives {
                    return self.now - began;
                }
                self.outcomes.extend(self.polling.looked(self.now));
            }
            let polled = self.now - began;
            self.vain += polled;
            self.now = self.now.max(arrives) + WAKE_UP;
            self.polling.woke(self.now);
            polled
        }

        /// Short waits until it polls.
        fn warm_up(&mut self) {
            for _ in 0..100_000 {
                if self.wait(3 * MICRO, LOOK) > 0 {
                    return;
                }
            }
            panic!("it never polls: {:?}", self.polling);
        }

        fn count(&self, outcome: Outcome) -> usize {
            self.outcomes.iter().filter(|one| **one == outcome).count()
        }
    }

    #[test]
    fn polling_when_it_pays_goes_on_without_a_sleep() {
        let mut worker = Worker::new(50);
        worker.warm_up();
        for _ in 0..100_000 {
            assert!(worker.wait(3 * MICRO, LOOK) > 0);
        }
        assert_eq!(worker.count(Outcome::Vain), 0);
        assert!(worker.count(Outcome::Paid) >= 100_000);
    }

    #[test]
    fn window_when_sleeps_are_short_grows_to_the_limit_and_no_further() {
        let mut worker = Worker::new(50);
        let mut longest = 0;
        for _ in 0..2000 {
            longest = longest.max(worker.wait(44 * MICRO, LOOK));
        }
        assert!(worker.count(Outcome::Paid) > 1000);
        assert!((44 * MICRO..=50 * MICRO).contains(&longest), "{longest}");
    }

    #[test]
    fn window_when_work_stays_away_shrinks_to_none() {
        let mut worker = Worker::new(50);
        for _ in 0..500 {
            worker.wait(44 * MICRO, LOOK);
        }
        let polled: Vec<u64> = (0..6).map(|_| worker.wait(5_000 * MICRO, LOOK)).collect();
        assert!(polled[0] > 0, "{polled:?}");
        assert!(polled.is_sorted_by(|a, b| a >= b), "{polled:?}");
        assert_eq!(polled[3..], [0, 0, 0]);
    }

    #[test]
    fn polling_when_it_never_pays_though_sleeps_are_short_becomes_rare() {
        // As where the guest needs the CPU that is polled on: it goes on only once we sleep.
        let mut worker = Worker::new(50);
        let mut polls = 0;
        for _ in 0..10_000 {
            worker.outcomes.extend(worker.polling.begin(worker.now));
            if worker.polling.is_wanted() {
                polls += 1;
            }
            while worker.polling.is_wanted() {
                worker.now += LOOK;
                worker.polling.looked(worker.now);
            }
            worker.now += 2 * WAKE_UP;
            worker.polling.woke(worker.now);
        }
        assert!((1..100).contains(&polls), "{polls}");
        // When it pays again, it comes back.
        worker.warm_up();
        assert!((0..100).all(|_| worker.wait(3 * MICRO, LOOK) > 0));
    }

    #[test]
    fn preemption_when_seen_ends_polling_until_the_gap_is_paid_off() {
        let mut worker = Worker::new(50);
        worker.warm_up();
        let gap = 3_000 * MICRO;
        worker.outcomes.clear();
        worker.outcomes.extend(worker.polling.begin(worker.now));
        assert!(worker.polling.is_wanted());
        worker.now += gap;
        let outcome = worker.polling.looked(worker.now);
        assert_eq!(outcome, Some(Outcome::Preempted));
        assert!(!worker.polling.is_wanted());
        // The gap less what there was, times the inverse of the share.
        let off_until = worker.now + 10 * (gap - ALLOWANCE_MAX as u64) - gap;
        while worker.now < off_until {
            assert_eq!(worker.wait(3 * MICRO, LOOK), 0);
        }
        worker.warm_up();
        // The longest gap turns it off for a bounded time.
        worker.polling.begin(worker.now);
        worker.now += 3_600_000_000_000;
        worker.polling.looked(worker.now);
        let end = worker.now + 200_000 * MICRO;
        worker.warm_up();
        assert!(worker.now < end);
    }

    #[test]
    fn time_in_vain_when_the_guest_is_hostile_stays_within_the_bound() {
        let mut random = Random::printed();
        for limit in [1, 20, 50, 1000] {
            let mut worker = Worker::new(limit);
            let began = worker.now;
            for round in 0..50_000 {
                // It knows the window, and offers work right after it; or anything.
                let wait = match random.below(4) {
                    0 => worker.polling.window + LOOK,
                    1 => u64::from(limit) * MICRO - WAKE_UP.min(u64::from(limit) * MICRO),
                    2 => 1 + random.below(5 * MICRO),
                    _ => random.below(300 * MICRO),
                };
                worker.wait(wait, 1 + random.below(2 * LOOK));
                let passed = worker.now - began;
                let bound = ALLOWANCE_MAX as u64 + passed / VAIN_SHARE + 2 * LOOK;
                assert!(
                    worker.vain <= bound,
                    "{limit} {round}: {} {bound}",
                    worker.vain
                );
            }
            assert!(limit == 1 || worker.count(Outcome::Paid) > 0, "{limit}");
        }
    }

    #[test]
    fn polling_when_off_never_begins() {
        for mut polling in [Polling::off(), Polling::up_to(0)] {
            assert!(!polling.is_on());
            for now in (0..1_000_000).step_by(1000) {
                assert_eq!(polling.begin(now), None);
                assert!(!polling.is_wanted());
                polling.woke(now + 10);
            }
        }
    }
}
