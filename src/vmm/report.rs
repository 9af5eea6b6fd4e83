//! All counters of the process gathered into one report: the one place that knows who has any.

use super::devices::Devices;
use super::machine::Machine;
use super::rules::State;
use crate::log;
use crate::metrics::Report;
use crate::timeline::Timeline;
use crate::virtio::{block, net};

/// What control itself counts.
#[derive(Debug, Default)]
pub struct Counters {
    /// Microseconds from the jailer's start until the API was ready: of time, and of CPU time.
    pub startup_us: u64,
    /// See `startup_us`.
    pub startup_cpu_us: u64,
    /// How long the last pause took, in microseconds.
    pub pause_us: u64,
    /// How long the last resume took, in microseconds.
    pub resume_us: u64,
    /// vCPUs that ended otherwise than by a reset or power-off.
    pub vcpu_failures: u64,
    /// The signal that ends the process, once there is one.
    pub signal: Option<i32>,
    /// Lines of metrics that their sink did not take.
    pub missed_lines: u64,
    /// Lines of metrics that were not written, because the one before had not been.
    pub skipped_lines: u64,
    /// Results of the files thread that came too late.
    pub late_files: u64,
}

/// What Firecracker's line always has, also of devices that there are none of here: its readers
/// may rely on that.
const LINE: &[(&str, &[&str])] = &[
    (
        "api_server",
        &["process_startup_time_us", "process_startup_time_cpu_us"],
    ),
    (
        "balloon",
        &[
            "activate_fails",
            "inflate_count",
            "stats_updates_count",
            "stats_update_fails",
            "deflate_count",
            "event_fails",
            "free_page_report_count",
            "free_page_report_freed",
            "free_page_report_fails",
            "free_page_hint_count",
            "free_page_hint_freed",
            "free_page_hint_fails",
        ],
    ),
    ("block", &block::LINE_KEYS),
    ("deprecated_api", &["deprecated_http_api_calls"]),
    (
        "get_api_requests",
        &[
            "instance_info_count",
            "machine_cfg_count",
            "mmds_count",
            "vmm_version_count",
            "hotplug_memory_count",
        ],
    ),
    (
        "i8042",
        &[
            "error_count",
            "missed_read_count",
            "missed_write_count",
            "read_count",
            "reset_count",
            "write_count",
        ],
    ),
    (
        "uart",
        &[
            "error_count",
            "flush_count",
            "missed_read_count",
            "missed_write_count",
            "read_count",
            "write_count",
            "rate_limiter_dropped_bytes",
        ],
    ),
    (
        "latencies_us",
        &[
            "full_create_snapshot",
            "diff_create_snapshot",
            "load_snapshot",
            "pause_vm",
            "resume_vm",
            "vmm_full_create_snapshot",
            "vmm_diff_create_snapshot",
            "vmm_load_snapshot",
            "vmm_pause_vm",
            "vmm_resume_vm",
        ],
    ),
    (
        "logger",
        &[
            "missed_metrics_count",
            "metrics_fails",
            "missed_log_count",
            "rate_limited_log_count",
        ],
    ),
    (
        "mmds",
        &[
            "rx_accepted",
            "rx_accepted_err",
            "rx_accepted_unusual",
            "rx_bad_eth",
            "rx_invalid_token",
            "rx_no_token",
            "rx_count",
            "tx_bytes",
            "tx_count",
            "tx_errors",
            "tx_frames",
            "connections_created",
            "connections_destroyed",
        ],
    ),
    ("net", &net::LINE_KEYS),
    (
        "patch_api_requests",
        &[
            "drive_count",
            "drive_fails",
            "network_count",
            "network_fails",
            "machine_cfg_count",
            "machine_cfg_fails",
            "mmds_count",
            "mmds_fails",
            "hotplug_memory_count",
            "hotplug_memory_fails",
            "pmem_count",
            "pmem_fails",
        ],
    ),
    (
        "put_api_requests",
        &[
            "actions_count",
            "actions_fails",
            "boot_source_count",
            "boot_source_fails",
            "drive_count",
            "drive_fails",
            "logger_count",
            "logger_fails",
            "machine_cfg_count",
            "machine_cfg_fails",
            "cpu_cfg_count",
            "cpu_cfg_fails",
            "metrics_count",
            "metrics_fails",
            "network_count",
            "network_fails",
            "mmds_count",
            "mmds_fails",
            "vsock_count",
            "vsock_fails",
            "pmem_count",
            "pmem_fails",
            "serial_count",
            "serial_fails",
            "hotplug_memory_count",
            "hotplug_memory_fails",
        ],
    ),
    ("seccomp", &["num_faults"]),
    (
        "vcpu",
        &[
            "exit_io_in",
            "exit_io_out",
            "exit_mmio_read",
            "exit_mmio_write",
            "failures",
            "kvmclock_ctrl_fails",
            "exit_io_in_agg",
            "exit_io_out_agg",
            "exit_mmio_read_agg",
            "exit_mmio_write_agg",
        ],
    ),
    ("vmm", &["panic_count"]),
    (
        "signals",
        &[
            "sigbus", "sigsegv", "sigxfsz", "sigxcpu", "sigpipe", "sighup", "sigill",
        ],
    ),
    (
        "vsock",
        &[
            "activate_fails",
            "cfg_fails",
            "rx_queue_event_fails",
            "tx_queue_event_fails",
            "ev_queue_event_fails",
            "muxer_event_fails",
            "conn_event_fails",
            "rx_queue_event_count",
            "tx_queue_event_count",
            "rx_bytes_count",
            "tx_bytes_count",
            "rx_packets_count",
            "tx_packets_count",
            "conns_added",
            "conns_killed",
            "conns_removed",
            "killq_resync",
            "tx_flush_fails",
            "tx_write_fails",
            "rx_read_fails",
        ],
    ),
    (
        "entropy",
        &[
            "activate_fails",
            "entropy_event_fails",
            "entropy_event_count",
            "entropy_bytes",
            "host_rng_fails",
            "entropy_rate_limiter_throttled",
            "rate_limiter_event_count",
        ],
    ),
    (
        "pmem",
        &[
            "activate_fails",
            "cfg_fails",
            "event_fails",
            "queue_event_count",
            "rate_limiter_throttled_events",
            "rate_limiter_event_count",
        ],
    ),
    ("interrupts", &["triggers", "config_updates"]),
    (
        "memory_hotplug",
        &[
            "activate_fails",
            "queue_event_fails",
            "queue_event_count",
            "plug_agg",
            "plug_count",
            "plug_bytes",
            "plug_fails",
            "unplug_agg",
            "unplug_count",
            "unplug_bytes",
            "unplug_fails",
            "unplug_discard_fails",
            "unplug_all_agg",
            "unplug_all_count",
            "unplug_all_fails",
            "state_agg",
            "state_count",
            "state_fails",
        ],
    ),
];

/// A report with what control knows itself.
pub fn begin(id: &str, state: State, timeline: &Timeline, counters: &Counters) -> Report {
    let mut report = Report::default();
    for (group, keys) in LINE {
        report.expect(group, keys);
    }
    report.gauge(
        "mayfly_info",
        "Always 1; the labels say who this is.",
        &[("id", id), ("version", env!("CARGO_PKG_VERSION"))],
        1,
    );
    for known in [State::NotStarted, State::Running, State::Paused] {
        report.gauge(
            "mayfly_state",
            "1 for the state the microVM is in.",
            &[("state", known.name())],
            u64::from(known == state),
        );
    }
    for (step, micros) in timeline.steps() {
        if let Some(micros) = micros {
            report.time(
                "mayfly_start_step_seconds",
                "When a step of the start happened, since the process began.",
                &[("step", step.strip_suffix("_us").unwrap_or(step))],
                micros,
            );
        }
    }
    for (what, micros) in [("pause", counters.pause_us), ("resume", counters.resume_us)] {
        report.time(
            "mayfly_last_duration_seconds",
            "How long the last pause and the last resume took.",
            &[("action", what)],
            micros,
        );
    }
    let (lost, suppressed) = log::losses();
    for (why, lines) in [("place", lost), ("limit", suppressed)] {
        report.counter(
            "mayfly_log_lines_lost_total",
            "Log lines that their place did not take, or that the guest's limit held back.",
            &[("cause", why)],
            lines,
        );
    }
    report.counter(
        "mayfly_metrics_lines_missed_total",
        "Lines of metrics that their sink did not take.",
        &[],
        counters.missed_lines.saturating_add(counters.skipped_lines),
    );
    report.counter(
        "mayfly_late_file_operations_total",
        "File operations that ended after their deadline; their results were not used.",
        &[],
        counters.late_files,
    );
    report.set("api_server", "process_startup_time_us", counters.startup_us);
    report.set(
        "api_server",
        "process_startup_time_cpu_us",
        counters.startup_cpu_us,
    );
    match counters.signal {
        Some(libc::SIGHUP) => report.add("signals", "sighup", 1),
        Some(libc::SIGXCPU) => report.add("signals", "sigxcpu", 1),
        _ => {}
    }
    report.set("latencies_us", "vmm_pause_vm", counters.pause_us);
    report.set("latencies_us", "vmm_resume_vm", counters.resume_us);
    report.add("logger", "missed_log_count", lost);
    report.add("logger", "rate_limited_log_count", suppressed);
    let missed = counters.missed_lines.saturating_add(counters.skipped_lines);
    report.add("logger", "missed_metrics_count", missed);
    report.add("logger", "metrics_fails", missed);
    report.add("vcpu", "failures", counters.vcpu_failures);
    report
}

/// What a machine's threads have counted.
pub fn machine(machine: &Machine, devices: &Devices, report: &mut Report) {
    report.gauge(
        "mayfly_guest_memory_bytes",
        "Guest memory.",
        &[],
        machine.memory.size_mib().saturating_mul(1 << 20),
    );
    for vcpu in &machine.vcpus {
        vcpu.read_counters(report);
    }
    for device in devices.running() {
        device.read_counters(report);
    }
    machine.console_counters.read(report);
}
