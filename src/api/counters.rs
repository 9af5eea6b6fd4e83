//! What the API thread counts: requests by operation, and how long their answers took.

use std::time::Duration;

use crate::metrics::{self, Counter, Histogram, Reader, Report};
use crate::vmm::action::Action;
use crate::wire::config::SnapshotType;
use crate::wire::{Method, OPERATIONS};

/// Counters of the API.
#[derive(Debug)]
pub struct Counters {
    /// One for each operation, in their order.
    operations: Vec<Requests>,
    /// Requests for paths that do not exist.
    unknown: Counter,
    /// Bytes that are no request.
    malformed: Counter,
    /// Requests that were not answered in time, or found no place.
    late: Counter,
    connections: Counter,
    times: Histogram,
    /// Microseconds of the last pause, resume, full snapshot, diff snapshot and load.
    pause_us: Counter,
    resume_us: Counter,
    full_us: Counter,
    diff_us: Counter,
    load_us: Counter,
}

#[derive(Debug, Default)]
struct Requests {
    all: Counter,
    refused: Counter,
}

/// What of a request is counted when it is answered.
#[derive(Clone, Copy, Debug)]
pub struct Counted {
    operation: Option<usize>,
    kind: Kind,
}

/// Requests whose times are reported one by one.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Pause,
    Resume,
    FullSnapshot,
    DiffSnapshot,
    Load,
    Other,
}

impl Counted {
    /// A request for `operation` that became `action`.
    pub fn new(operation: Option<usize>, action: &Action) -> Self {
        Counted {
            operation,
            kind: match action {
                Action::Pause => Kind::Pause,
                Action::Resume => Kind::Resume,
                Action::SnapshotCreate(create) => match create.snapshot_type {
                    SnapshotType::Full => Kind::FullSnapshot,
                    SnapshotType::Diff => Kind::DiffSnapshot,
                    SnapshotType::Fork => Kind::Other,
                },
                Action::SnapshotLoad(_) => Kind::Load,
                _ => Kind::Other,
            },
        }
    }
}

impl Counters {
    /// Nothing counted yet.
    pub fn new() -> Self {
        Counters {
            operations: OPERATIONS.iter().map(|_| Requests::default()).collect(),
            unknown: Counter::new(),
            malformed: Counter::new(),
            late: Counter::new(),
            connections: Counter::new(),
            times: Histogram::default(),
            pause_us: Counter::new(),
            resume_us: Counter::new(),
            full_us: Counter::new(),
            diff_us: Counter::new(),
            load_us: Counter::new(),
        }
    }

    /// A client has connected.
    pub fn connected(&self) {
        self.connections.one();
    }

    /// Bytes that are no request.
    pub fn malformed(&self) {
        self.malformed.one();
    }

    /// A request was refused without asking control.
    pub fn refused(&self, operation: Option<usize>) {
        match operation.and_then(|at| self.operations.get(at)) {
            Some(requests) => {
                requests.all.one();
                requests.refused.one();
            }
            None => self.unknown.one(),
        }
    }

    /// Control has answered a request.
    pub fn answered(&self, counted: Counted, good: bool, time: Duration) {
        if let Some(requests) = counted.operation.and_then(|at| self.operations.get(at)) {
            requests.all.one();
            if !good {
                requests.refused.one();
            }
        }
        let micros = metrics::micros(time);
        self.times.observe(micros);
        match counted.kind {
            Kind::Pause if good => self.pause_us.set(micros),
            Kind::Resume if good => self.resume_us.set(micros),
            Kind::FullSnapshot if good => self.full_us.set(micros),
            Kind::DiffSnapshot if good => self.diff_us.set(micros),
            Kind::Load if good => self.load_us.set(micros),
            _ => {}
        }
    }

    /// Control has not answered a request in time.
    pub fn late(&self, counted: Counted) {
        if let Some(requests) = counted.operation.and_then(|at| self.operations.get(at)) {
            requests.all.one();
        }
        self.late.one();
    }
}

/// The operations that Firecracker's metrics line counts: key of the count, key of the failures.
const LINE_KEYS: [(Method, &str, &str, Option<&str>); 15] = [
    (Method::Get, "/", "instance_info_count", None),
    (Method::Get, "/version", "vmm_version_count", None),
    (Method::Get, "/machine-config", "machine_cfg_count", None),
    (
        Method::Put,
        "/actions",
        "actions_count",
        Some("actions_fails"),
    ),
    (
        Method::Put,
        "/boot-source",
        "boot_source_count",
        Some("boot_source_fails"),
    ),
    (
        Method::Put,
        "/cpu-config",
        "cpu_cfg_count",
        Some("cpu_cfg_fails"),
    ),
    (
        Method::Put,
        "/drives/{id}",
        "drive_count",
        Some("drive_fails"),
    ),
    (Method::Put, "/logger", "logger_count", Some("logger_fails")),
    (
        Method::Put,
        "/machine-config",
        "machine_cfg_count",
        Some("machine_cfg_fails"),
    ),
    (
        Method::Put,
        "/metrics",
        "metrics_count",
        Some("metrics_fails"),
    ),
    (
        Method::Put,
        "/network-interfaces/{id}",
        "network_count",
        Some("network_fails"),
    ),
    (Method::Put, "/serial", "serial_count", Some("serial_fails")),
    (
        Method::Patch,
        "/drives/{id}",
        "drive_count",
        Some("drive_fails"),
    ),
    (
        Method::Patch,
        "/machine-config",
        "machine_cfg_count",
        Some("machine_cfg_fails"),
    ),
    (
        Method::Patch,
        "/network-interfaces/{id}",
        "network_count",
        Some("network_fails"),
    ),
];

/// The group of an operation in Firecracker's metrics line, and its keys there.
fn line_keys(
    method: Method,
    path: &str,
) -> Option<(&'static str, &'static str, Option<&'static str>)> {
    let group = match method {
        Method::Get => "get_api_requests",
        Method::Put => "put_api_requests",
        Method::Patch => "patch_api_requests",
        Method::Delete => return None,
    };
    let found = LINE_KEYS
        .iter()
        .find(|(m, p, ..)| *m == method && *p == path);
    found.map(|(_, _, count, fails)| (group, *count, *fails))
}

impl Reader for Counters {
    fn read(&self, report: &mut Report) {
        for (operation, requests) in OPERATIONS.iter().zip(&self.operations) {
            let labels = [
                ("method", operation.method.name()),
                ("path", operation.path),
            ];
            report.counter(
                "mayfly_api_requests_total",
                "Requests for each operation.",
                &labels,
                requests.all.get(),
            );
            report.counter(
                "mayfly_api_refused_total",
                "Those of them that were refused.",
                &labels,
                requests.refused.get(),
            );
            if let Some((group, count, fails)) = line_keys(operation.method, operation.path) {
                report.add(group, count, requests.all.get());
                if let Some(fails) = fails {
                    report.add(group, fails, requests.refused.get());
                }
            }
        }
        for (why, count) in [
            ("unknown", &self.unknown),
            ("malformed", &self.malformed),
            ("late", &self.late),
        ] {
            report.counter(
                "mayfly_api_errors_total",
                "Requests for what there is not, bytes that are no request, and requests that \
                 control had no time for.",
                &[("kind", why)],
                count.get(),
            );
        }
        report.counter(
            "mayfly_api_connections_total",
            "Connections of clients.",
            &[],
            self.connections.get(),
        );
        report.histogram(
            "mayfly_api_request_duration_seconds",
            "Time from a whole request to its answer.",
            &self.times,
        );
        for (key, time) in [
            ("pause_vm", &self.pause_us),
            ("resume_vm", &self.resume_us),
            ("full_create_snapshot", &self.full_us),
            ("diff_create_snapshot", &self.diff_us),
            ("load_snapshot", &self.load_us),
        ] {
            report.set("latencies_us", key, time.get());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Question;

    fn at(method: Method, path: &str) -> Option<usize> {
        OPERATIONS
            .iter()
            .position(|o| o.method == method && o.path == path)
    }

    #[test]
    fn read_when_counted_has_each_operation() {
        let counters = Counters::new();
        let put = at(Method::Put, "/drives/{id}");
        counters.refused(put);
        counters.refused(None);
        counters.answered(
            Counted::new(put, &Action::Ask(Question::Version)),
            true,
            Duration::from_micros(100),
        );
        let pause = Counted::new(at(Method::Patch, "/vm"), &Action::Pause);
        counters.answered(pause, true, Duration::from_micros(1234));
        counters.answered(pause, false, Duration::from_micros(1));
        counters.late(pause);
        let mut report = Report::default();
        counters.read(&mut report);
        let text = report.prometheus();
        for line in [
            "mayfly_api_requests_total{method=\"PUT\",path=\"/drives/{id}\"} 2",
            "mayfly_api_refused_total{method=\"PUT\",path=\"/drives/{id}\"} 1",
            "mayfly_api_requests_total{method=\"PATCH\",path=\"/vm\"} 3",
            "mayfly_api_errors_total{kind=\"unknown\"} 1",
            "mayfly_api_errors_total{kind=\"late\"} 1",
            "mayfly_api_request_duration_seconds_count 3",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} in {text}");
        }
        assert_eq!(counters.pause_us.get(), 1234);
    }

    #[test]
    fn line_keys_when_compared_with_the_operations_are_of_those_that_exist() {
        for (method, path, ..) in LINE_KEYS {
            assert!(at(method, path).is_some(), "{method:?} {path}");
        }
    }
}
