//! What every worker counts, for any device.

use super::polling::Outcome;
use crate::metrics::{Counter, Report};

/// What every worker counts.
#[derive(Debug)]
pub struct WorkerCounters {
    /// Times the driver activated the device.
    pub activations: Counter,
    /// Times the driver reset an active device.
    pub resets: Counter,
    /// Times the device had to be marked NEEDS_RESET.
    pub broken: Counter,
    /// Wake-ups by the driver, by queue.
    kicks: Box<[Counter]>,
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
    /// Of a device with `queues` queues.
    pub(super) fn new(queues: usize) -> Self {
        WorkerCounters {
            activations: Counter::new(),
            resets: Counter::new(),
            broken: Counter::new(),
            kicks: (0..queues).map(|_| Counter::new()).collect(),
            interrupts: Counter::new(),
            polls_paid: Counter::new(),
            polls_vain: Counter::new(),
            polls_preempted: Counter::new(),
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
    pub fn kicks(&self, queue: usize) -> u64 {
        self.kicks.get(queue).map_or(0, Counter::get)
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
