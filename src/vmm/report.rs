//! All counters of the process gathered into one report: the one place that knows who has any.

use super::configuration::Configuration;
use super::machine::Machine;
use super::rules::State;
use crate::log;
use crate::metrics::Report;
use crate::timeline::Timeline;

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

/// A report with what control knows itself.
pub fn begin(id: &str, state: State, timeline: &Timeline, counters: &Counters) -> Report {
    let mut report = Report::with_all_groups();
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
pub fn machine(machine: &Machine, configuration: &Configuration, report: &mut Report) {
    report.gauge(
        "mayfly_guest_memory_bytes",
        "Guest memory.",
        &[],
        configuration.machine.mem_size_mib.saturating_mul(1 << 20),
    );
    for vcpu in &machine.vcpus {
        vcpu.read_counters(report);
    }
    for device in configuration.devices.running() {
        device.read_counters(report);
    }
    machine.console_counters.read(report);
}
