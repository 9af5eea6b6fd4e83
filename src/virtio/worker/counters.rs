//! What every worker counts, for any device.

use super::polling::Outcome;
use crate::metrics::{Counter, Report};
use crate::virtio::share::Share;

/// What every worker counts.
#[derive(Debug)]
pub struct WorkerCounters {
    /// Times the driver activated the device.
    pub activations: Counter,
    /// Times the driver reset an active device.
    pub resets: Counter,
    /// Times the device had to be marked NEEDS_RESET.
    pub broken: Counter,
    /// Wake-ups by the driver, by the worker's queues.
    kicks: Box<[Counter]>,
    /// The numbers of these, of a device with several workers.
    numbers: Box<[usize]>,
    /// Interrupts for used buffers.
    pub interrupts: Counter,
    /// Waits for work whose polling found some.
    pub polls_paid: Counter,
    /// Waits for work whose polling found none.
    pub polls_vain: Counter,
    /// Waits for work whose polling ended because the thread lost its CPU.
    pub polls_preempted: Counter,
}

impl WorkerCounters {
    /// Of the worker that has `share`.
    pub(super) fn new(share: &Share) -> Self {
        let numbers = match share.has_others() {
            true => share.queues().collect(),
            false => Box::default(),
        };
        WorkerCounters::of(share.queues().count(), numbers)
    }

    /// For the sum of what several workers count, of a device with `queues` queues.
    pub(in crate::virtio) fn of_all(queues: usize) -> Self {
        WorkerCounters::of(queues, Box::default())
    }

    fn of(queues: usize, numbers: Box<[usize]>) -> Self {
        WorkerCounters {
            activations: Counter::new(),
            resets: Counter::new(),
            broken: Counter::new(),
            kicks: (0..queues).map(|_| Counter::new()).collect(),
            numbers,
            interrupts: Counter::new(),
            polls_paid: Counter::new(),
            polls_vain: Counter::new(),
            polls_preempted: Counter::new(),
        }
    }

    /// Adds what `one` of several workers has counted to these. Activations and resets of the device are as many
    /// as those of any of its workers.
    pub(in crate::virtio) fn add(&self, one: &WorkerCounters) {
        for (to, from) in [
            (&self.activations, &one.activations),
            (&self.resets, &one.resets),
        ] {
            to.set(to.get().max(from.get()));
        }
        for (to, from) in [
            (&self.broken, &one.broken),
            (&self.interrupts, &one.interrupts),
            (&self.polls_paid, &one.polls_paid),
            (&self.polls_vain, &one.polls_vain),
            (&self.polls_preempted, &one.polls_preempted),
        ] {
            to.add(from.get());
        }
        for (number, kicks) in one.numbers.iter().zip(&one.kicks) {
            if let Some(sum) = self.kicks.get(*number) {
                sum.add(kicks.get());
            }
        }
    }

    pub(super) fn kicked(&self, queue: usize) {
        if let Some(kicks) = self.kicks.get(queue) {
            kicks.one();
        }
    }

    pub(super) fn polled(&self, outcome: Option<Outcome>) {
        match outcome {
            None => {}
            Some(Outcome::Paid) => self.polls_paid.one(),
            Some(Outcome::Vain) => self.polls_vain.one(),
            Some(Outcome::Preempted) => self.polls_preempted.one(),
        }
    }

    /// Wake-ups by the driver for queue number `queue`.
    #[cfg(test)]
    pub fn kicks(&self, queue: usize) -> u64 {
        self.kicks.get(queue).map_or(0, Counter::get)
    }

    /// Wake-ups by the driver for queue number `queue` of each group of `group` queues; what is left after the last whole
    /// group is in none.
    pub fn kicks_of_each(&self, queue: usize, group: usize) -> u64 {
        let groups = self.kicks.chunks_exact(group.max(1));
        let kicks = groups
            .filter_map(|group| group.get(queue))
            .map(Counter::get);
        kicks.fold(0, u64::saturating_add)
    }

    /// Wake-ups by the driver for any queue.
    pub fn all_kicks(&self) -> u64 {
        let kicks = self.kicks.iter().map(Counter::get);
        kicks.fold(0, u64::saturating_add)
    }

    /// Writes what any device counts into `report`, for the device `name`.
    pub(in crate::virtio) fn read(&self, name: &str, report: &mut Report) {
        let device = [("device", name)];
        report.counter(
            "mayfly_device_activations_total",
            "Times the driver activated the device.",
            &device,
            self.activations.get(),
        );
        report.counter(
            "mayfly_device_resets_total",
            "Times the driver reset the device.",
            &device,
            self.resets.get(),
        );
        report.counter(
            "mayfly_device_broken_total",
            "Protocol violations that put the device into NEEDS_RESET.",
            &device,
            self.broken.get(),
        );
        report.counter(
            "mayfly_device_interrupts_total",
            "Interrupts for used buffers.",
            &device,
            self.interrupts.get(),
        );
        for (result, polls) in [
            ("work", &self.polls_paid),
            ("nothing", &self.polls_vain),
            ("preempted", &self.polls_preempted),
        ] {
            report.counter(
                "mayfly_device_polls_total",
                "Waits for work in which the device's thread polled, by what ended the polling.",
                &[("device", name), ("result", result)],
                polls.get(),
            );
        }
        for (queue, kicks) in self.kicks.iter().enumerate() {
            report.counter(
                "mayfly_device_kicks_total",
                "Wake-ups of the device by the driver.",
                &[("device", name), ("queue", &queue.to_string())],
                kicks.get(),
            );
        }
        report.add("interrupts", "triggers", self.interrupts.get());
    }
}
