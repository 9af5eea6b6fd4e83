//! What a block device counts, and how that is reported.

use crate::metrics::{Counter, Report, TimeSummary};
use crate::virtio::WorkerCounters;

/// What a block device counts.
#[derive(Debug, Default)]
pub struct BlockCounters {
    /// Requests that read, and were served.
    pub reads: Counter,
    /// Bytes of these.
    pub read_bytes: Counter,
    /// Requests that wrote, and were served.
    pub writes: Counter,
    /// Bytes of these.
    pub write_bytes: Counter,
    /// Flushes that were served.
    pub flushes: Counter,
    /// Discards that were served.
    pub discards: Counter,
    /// Requests to write zeros that were served.
    pub write_zeroes: Counter,
    /// Requests that could not be parsed, or asked for what is not there.
    pub invalid: Counter,
    /// Requests that the host failed.
    pub failed: Counter,
    /// How long those that read took.
    pub read_times: TimeSummary,
    /// How long those that wrote took.
    pub write_times: TimeSummary,
    /// Times a request had to wait for the rate limiter.
    pub throttled: Counter,
    /// Times the disk or the limits were changed.
    pub updates: Counter,
}

impl BlockCounters {
    /// Adds what one of several workers has counted.
    pub(super) fn add(&self, one: &BlockCounters) {
        for (to, from) in [
            (&self.reads, &one.reads),
            (&self.read_bytes, &one.read_bytes),
            (&self.writes, &one.writes),
            (&self.write_bytes, &one.write_bytes),
            (&self.flushes, &one.flushes),
            (&self.discards, &one.discards),
            (&self.write_zeroes, &one.write_zeroes),
            (&self.invalid, &one.invalid),
            (&self.failed, &one.failed),
            (&self.throttled, &one.throttled),
        ] {
            to.add(from.get());
        }
        // Each change is made by all.
        self.updates.set(self.updates.get().max(one.updates.get()));
        self.read_times.add(&one.read_times);
        self.write_times.add(&one.write_times);
    }

    /// Writes them, and what of `worker` belongs to them, into `report`, for the device `name`.
    pub(super) fn read(&self, worker: &WorkerCounters, name: &str, report: &mut Report) {
        self.read_for_prometheus(name, report);
        for group in [&*format!("block_{name}"), "block"] {
            report.expect(group, "block");
            for (key, value) in self.line(worker) {
                report.add(group, key, value);
            }
            report.times(group, "read_agg", &self.read_times);
            report.times(group, "write_agg", &self.write_times);
        }
    }

    /// The values of Firecracker's line that this device has; the others stay 0.
    fn line(&self, worker: &WorkerCounters) -> [(&'static str, u64); 11] {
        [
            ("event_fails", worker.broken.get()),
            ("execute_fails", self.failed.get()),
            ("invalid_reqs_count", self.invalid.get()),
            ("flush_count", self.flushes.get()),
            ("queue_event_count", worker.all_kicks()),
            ("update_count", self.updates.get()),
            ("read_bytes", self.read_bytes.get()),
            ("write_bytes", self.write_bytes.get()),
            ("read_count", self.reads.get()),
            ("write_count", self.writes.get()),
            ("rate_limiter_throttled_events", self.throttled.get()),
        ]
    }

    fn read_for_prometheus(&self, name: &str, report: &mut Report) {
        let reads = [
            ("read", &self.reads),
            ("write", &self.writes),
            ("flush", &self.flushes),
            ("discard", &self.discards),
            ("write_zeroes", &self.write_zeroes),
        ];
        for (operation, count) in reads {
            report.counter(
                "mayfly_block_operations_total",
                "Requests that were served.",
                &[("device", name), ("operation", operation)],
                count.get(),
            );
        }
        for (operation, bytes) in [("read", &self.read_bytes), ("write", &self.write_bytes)] {
            report.counter(
                "mayfly_block_bytes_total",
                "Bytes of requests that were served.",
                &[("device", name), ("operation", operation)],
                bytes.get(),
            );
        }
        for (operation, times) in [("read", &self.read_times), ("write", &self.write_times)] {
            report.seconds(
                "mayfly_block_seconds_total",
                "Time that requests which were served took on the host.",
                &[("device", name), ("operation", operation)],
                times.sum(),
            );
        }
        for (why, count) in [("guest", &self.invalid), ("host", &self.failed)] {
            report.counter(
                "mayfly_block_errors_total",
                "Requests that were malformed (guest), or that the host failed (host).",
                &[("device", name), ("fault", why)],
                count.get(),
            );
        }
        report.counter(
            "mayfly_block_throttled_total",
            "Times a request had to wait for the rate limiter.",
            &[("device", name)],
            self.throttled.get(),
        );
        report.counter(
            "mayfly_block_updates_total",
            "Times the disk or its limits were changed.",
            &[("device", name)],
            self.updates.get(),
        );
    }
}
