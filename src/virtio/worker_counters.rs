//! What every worker counts, whatever its device.

use super::{Counter, MAX_QUEUES};
use crate::metrics::Report;

/// What every worker counts.
#[derive(Debug, Default)]
pub struct WorkerCounters {
    /// Times the driver activated the device.
    pub activations: Counter,
    /// Times the driver reset an active device.
    pub resets: Counter,
    /// Times the device had to be marked NEEDS_RESET.
    pub broken: Counter,
    /// Wake-ups by the driver, by queue.
    pub kicks: [Counter; MAX_QUEUES],
    /// Interrupts for used buffers.
    pub interrupts: Counter,
}

impl WorkerCounters {
    /// Writes what any device counts into `report`, for the device `name`.
    pub(super) fn read(&self, name: &str, report: &mut Report) {
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
            "Times the driver did what only a reset mends.",
            &device,
            self.broken.get(),
        );
        report.counter(
            "mayfly_device_interrupts_total",
            "Interrupts for used buffers.",
            &device,
            self.interrupts.get(),
        );
        for (queue, kicks) in ["0", "1"].into_iter().zip(&self.kicks) {
            report.counter(
                "mayfly_device_kicks_total",
                "Wake-ups of the device by the driver.",
                &[("device", name), ("queue", queue)],
                kicks.get(),
            );
        }
        report.add("interrupts", "triggers", self.interrupts.get());
    }
}
