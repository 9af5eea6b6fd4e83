//! What a network device counts, and how that is reported.

use super::queue::{self, PAIR};
use crate::metrics::{Counter, Report, TimeSummary};
use crate::virtio::WorkerCounters;

/// What a network device counts.
#[derive(Debug, Default)]
pub struct NetCounters {
    /// Frames the guest received.
    pub rx_frames: Counter,
    /// Bytes of these, headers not counted.
    pub rx_bytes: Counter,
    /// Frames for the guest that were lost because they did not fit its buffers.
    pub rx_dropped: Counter,
    /// Buffers from the guest that could not be used.
    pub rx_invalid: Counter,
    /// Times reading the tap failed.
    pub rx_failed: Counter,
    /// Times a frame had to wait for the rate limiter.
    pub rx_throttled: Counter,
    /// Frames the guest sent.
    pub tx_frames: Counter,
    /// Bytes of these, headers not counted.
    pub tx_bytes: Counter,
    /// How long each batch of them took.
    pub tx_times: TimeSummary,
    /// Frames from the guest that the host did not take.
    pub tx_dropped: Counter,
    /// Frames from the guest that are malformed.
    pub tx_invalid: Counter,
    /// Times a frame had to wait for the rate limiter.
    pub tx_throttled: Counter,
    /// 1 when the tap has vanished.
    pub tap_gone: Counter,
    /// Times it announced its MAC address after a restore.
    pub announcements: Counter,
    /// Times the limits were changed.
    pub updates: Counter,
}

impl NetCounters {
    /// Adds what one of several workers has counted.
    pub(super) fn add(&self, one: &NetCounters) {
        for (to, from) in [
            (&self.rx_frames, &one.rx_frames),
            (&self.rx_bytes, &one.rx_bytes),
            (&self.rx_dropped, &one.rx_dropped),
            (&self.rx_invalid, &one.rx_invalid),
            (&self.rx_failed, &one.rx_failed),
            (&self.rx_throttled, &one.rx_throttled),
            (&self.tx_frames, &one.tx_frames),
            (&self.tx_bytes, &one.tx_bytes),
            (&self.tx_dropped, &one.tx_dropped),
            (&self.tx_invalid, &one.tx_invalid),
            (&self.tx_throttled, &one.tx_throttled),
            (&self.announcements, &one.announcements),
        ] {
            to.add(from.get());
        }
        // Each change is made by all, and the tap goes for all.
        for (to, from) in [
            (&self.updates, &one.updates),
            (&self.tap_gone, &one.tap_gone),
        ] {
            to.set(to.get().max(from.get()));
        }
        self.tx_times.add(&one.tx_times);
    }

    /// Writes them, and what of `worker` belongs to them, into `report`, for the device `name`.
    pub(super) fn read(&self, worker: &WorkerCounters, name: &str, report: &mut Report) {
        self.read_for_prometheus(name, report);
        for group in [&*format!("net_{name}"), "net"] {
            report.expect(group, "net");
            for (key, value) in self.line(worker) {
                report.add(group, key, value);
            }
            report.times(group, "tap_write_agg", &self.tx_times);
        }
    }

    /// The values of Firecracker's line that this device has; the others stay 0.
    fn line(&self, worker: &WorkerCounters) -> [(&'static str, u64); 15] {
        let rx_lost = [&self.rx_invalid, &self.rx_dropped].map(Counter::get);
        [
            ("event_fails", worker.broken.get()),
            (
                "rx_queue_event_count",
                worker.kicks_of_each(queue::RECEIVE, PAIR),
            ),
            ("rx_rate_limiter_throttled", self.rx_throttled.get()),
            ("rx_bytes_count", self.rx_bytes.get()),
            ("rx_packets_count", self.rx_frames.get()),
            ("rx_count", self.rx_frames.get()),
            ("rx_fails", rx_lost.into_iter().fold(0, u64::saturating_add)),
            ("tap_read_fails", self.rx_failed.get()),
            ("tap_write_fails", self.tx_dropped.get()),
            ("tx_bytes_count", self.tx_bytes.get()),
            ("tx_malformed_frames", self.tx_invalid.get()),
            ("tx_count", self.tx_frames.get()),
            ("tx_packets_count", self.tx_frames.get()),
            (
                "tx_queue_event_count",
                worker.kicks_of_each(queue::TRANSMIT, PAIR),
            ),
            ("tx_rate_limiter_throttled", self.tx_throttled.get()),
        ]
    }

    fn read_for_prometheus(&self, name: &str, report: &mut Report) {
        let both = [
            ("receive", &self.rx_frames, &self.rx_bytes, &self.rx_dropped),
            (
                "transmit",
                &self.tx_frames,
                &self.tx_bytes,
                &self.tx_dropped,
            ),
        ];
        for (direction, frames, bytes, dropped) in both {
            let labels = [("device", name), ("direction", direction)];
            report.counter(
                "mayfly_net_frames_total",
                "Frames that the guest received or sent.",
                &labels,
                frames.get(),
            );
            report.counter(
                "mayfly_net_bytes_total",
                "Bytes of these frames, virtio's headers not counted.",
                &labels,
                bytes.get(),
            );
            report.counter(
                "mayfly_net_dropped_total",
                "Frames that did not fit the guest's buffers, or that the host did not take.",
                &labels,
                dropped.get(),
            );
        }
        let both = [
            ("receive", &self.rx_invalid, &self.rx_throttled),
            ("transmit", &self.tx_invalid, &self.tx_throttled),
        ];
        for (direction, invalid, throttled) in both {
            let labels = [("device", name), ("direction", direction)];
            report.counter(
                "mayfly_net_invalid_total",
                "Buffers or frames of the guest that could not be used.",
                &labels,
                invalid.get(),
            );
            report.counter(
                "mayfly_net_throttled_total",
                "Times a frame had to wait for the rate limiter.",
                &labels,
                throttled.get(),
            );
        }
        let device = [("device", name)];
        report.counter(
            "mayfly_net_tap_read_errors_total",
            "Times reading the tap failed.",
            &device,
            self.rx_failed.get(),
        );
        report.gauge(
            "mayfly_net_tap_gone",
            "1 when the tap has vanished, or the other end of the socket in its place is closed.",
            &device,
            self.tap_gone.get(),
        );
        report.counter(
            "mayfly_net_announcements_total",
            "Times the interface announced its MAC address after a restore.",
            &device,
            self.announcements.get(),
        );
        report.counter(
            "mayfly_net_updates_total",
            "Times the limits were changed.",
            &device,
            self.updates.get(),
        );
    }
}
