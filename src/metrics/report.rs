//! All counters at one moment: as Prometheus' text, and as the groups of Firecracker's line.

use std::collections::BTreeMap;
use std::fmt::{self, Write};

use super::{BOUNDS, Histogram, TimeSummary};

// `FIRECRACKER`: the groups of its line and their keys, from `resources/metrics/firecracker.json`.
include!(concat!(env!("OUT_DIR"), "/metrics.rs"));

/// What a family of values is to Prometheus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Counter,
    Gauge,
    Histogram,
}

/// All values of one name.
#[derive(Debug)]
struct Family {
    name: &'static str,
    help: &'static str,
    kind: Kind,
    samples: String,
}

/// A value of the line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Value {
    /// The line tells what was added since the line before.
    Count(u64),
    /// The line tells it as it is.
    Now(u64),
    /// The line tells the least and the most as they are, and what was added to the sum.
    Times { least: u64, most: u64, sum: u64 },
}

impl Value {
    const NO_TIMES: Value = Value::Times {
        least: 0,
        most: 0,
        sum: 0,
    };

    /// Times of two that are told as one.
    fn and(self, other: Value) -> Value {
        let (
            Value::Times { least, most, sum },
            Value::Times {
                least: other_least,
                most: other_most,
                sum: other_sum,
            },
        ) = (self, other)
        else {
            return other;
        };
        Value::Times {
            least: match (least, other_least) {
                // None, or as good as none, on one side.
                (0, least) | (least, 0) => least,
                (one, other) => one.min(other),
            },
            most: most.max(other_most),
            sum: sum.saturating_add(other_sum),
        }
    }
}

pub(super) type Groups = BTreeMap<String, Values>;
pub(super) type Values = BTreeMap<&'static str, Value>;

/// All counters at one moment.
#[derive(Debug, Default)]
pub struct Report {
    families: Vec<Family>,
    pub(super) groups: Groups,
}

/// Names and values that tell the samples of a family apart.
type Labels<'a> = &'a [(&'a str, &'a str)];

impl Report {
    /// For Prometheus: a number that only grows.
    pub fn counter(
        &mut self,
        name: &'static str,
        help: &'static str,
        labels: Labels<'_>,
        value: u64,
    ) {
        self.sample(
            Kind::Counter,
            name,
            help,
            "",
            labels,
            format_args!("{value}"),
        );
    }

    /// For Prometheus: a number that goes up and down.
    pub fn gauge(&mut self, name: &'static str, help: &'static str, labels: Labels<'_>, n: u64) {
        self.sample(Kind::Gauge, name, help, "", labels, format_args!("{n}"));
    }

    /// For Prometheus: a time that only grows.
    pub fn seconds(
        &mut self,
        name: &'static str,
        help: &'static str,
        labels: Labels<'_>,
        micros: u64,
    ) {
        let value = Seconds(micros);
        self.sample(
            Kind::Counter,
            name,
            help,
            "",
            labels,
            format_args!("{value}"),
        );
    }

    /// For Prometheus: a time.
    pub fn time(
        &mut self,
        name: &'static str,
        help: &'static str,
        labels: Labels<'_>,
        micros: u64,
    ) {
        let value = Seconds(micros);
        self.sample(Kind::Gauge, name, help, "", labels, format_args!("{value}"));
    }

    /// For Prometheus: how long things took.
    pub fn histogram(&mut self, name: &'static str, help: &'static str, histogram: &Histogram) {
        let kind = Kind::Histogram;
        let mut sum: u64 = 0;
        let bounds = BOUNDS.iter().map(|(_, text)| *text).chain(["+Inf"]);
        for (bound, bucket) in bounds.zip(&histogram.buckets) {
            sum = sum.saturating_add(bucket.get());
            let labels = [("le", bound)];
            self.sample(kind, name, help, "_bucket", &labels, format_args!("{sum}"));
        }
        let seconds = Seconds(histogram.micros.get());
        self.sample(kind, name, help, "_sum", &[], format_args!("{seconds}"));
        self.sample(kind, name, help, "_count", &[], format_args!("{sum}"));
    }

    fn sample(
        &mut self,
        kind: Kind,
        name: &'static str,
        help: &'static str,
        suffix: &str,
        labels: Labels<'_>,
        value: fmt::Arguments<'_>,
    ) {
        let known = self.families.iter().position(|f| f.name == name);
        let at = known.unwrap_or(self.families.len());
        if known.is_none() {
            self.families.push(Family {
                name,
                help,
                kind,
                samples: String::new(),
            });
        }
        let Some(Family { samples, .. }) = self.families.get_mut(at) else {
            return;
        };
        // Writing to a string does not fail.
        let _ = write!(samples, "{name}{suffix}");
        let mut before = '{';
        for (label, text) in labels {
            let _ = write!(samples, "{before}{label}=\"{}\"", Escaped(text));
            before = ',';
        }
        let end = if labels.is_empty() { "" } else { "}" };
        let _ = writeln!(samples, "{end} {value}");
    }

    /// For the line: `value` more in `key` of `group`; the line tells what is new.
    pub fn add(&mut self, group: &str, key: &'static str, value: u64) {
        let slot = self.slot(group, key);
        if let Value::Count(sum) = slot {
            *sum = sum.saturating_add(value);
        } else {
            *slot = Value::Count(value);
        }
    }

    /// For the line: `value` in `key` of `group`, as it is.
    pub fn set(&mut self, group: &str, key: &'static str, value: u64) {
        *self.slot(group, key) = Value::Now(value);
    }

    /// For the line: the times of `summary`, together with those that `key` of `group` has already.
    pub fn times(&mut self, group: &str, key: &'static str, summary: &TimeSummary) {
        let more = Value::Times {
            least: summary.least.get(),
            most: summary.most.get(),
            sum: summary.sum.get(),
        };
        let slot = self.slot(group, key);
        *slot = slot.and(more);
    }

    /// A report whose line has all of Firecracker's groups, with zeros: its readers may rely on them,
    /// also for devices that there are none of here.
    pub fn with_all_groups() -> Self {
        let mut report = Report::default();
        for (group, _) in FIRECRACKER {
            report.expect(group, group);
        }
        report
    }

    /// For the line: `group` has all keys of Firecracker's group `like`, zeros unless something else is
    /// said. Those that end in `_agg` hold least, most and sum of a time.
    pub fn expect(&mut self, group: &str, like: &str) {
        let found = FIRECRACKER.iter().filter(|(name, _)| *name == like);
        for key in found.flat_map(|(_, keys)| *keys) {
            let slot = self.slot(group, key);
            if key.ends_with("_agg") {
                *slot = Value::NO_TIMES;
            }
        }
    }

    fn slot(&mut self, group: &str, key: &'static str) -> &mut Value {
        if !self.groups.contains_key(group) {
            self.groups.insert(group.to_owned(), BTreeMap::new());
        }
        self.groups
            .entry(group.to_owned())
            .or_default()
            .entry(key)
            .or_insert(Value::Count(0))
    }

    /// The text that Prometheus reads (text format 0.0.4).
    pub fn prometheus(&self) -> String {
        let mut text = String::new();
        for Family {
            name,
            help,
            kind,
            samples,
        } in &self.families
        {
            let kind = match kind {
                Kind::Counter => "counter",
                Kind::Gauge => "gauge",
                Kind::Histogram => "histogram",
            };
            let _ = write!(
                text,
                "# HELP {name} {help}\n# TYPE {name} {kind}\n{samples}"
            );
        }
        text
    }
}

/// Microseconds, printed as seconds.
struct Seconds(u64);

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole = self.0.checked_div(1_000_000).unwrap_or(0);
        let rest = self.0.checked_rem(1_000_000).unwrap_or(0);
        write!(f, "{whole}.{rest:06}")
    }
}

/// The value of a label.
struct Escaped<'a>(&'a str);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in self.0.chars() {
            match c {
                '\\' | '"' => write!(f, "\\{c}")?,
                '\n' => f.write_str("\\n")?,
                _ => f.write_char(c)?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prometheus_when_read_has_families_once() {
        let mut report = Report::default();
        report.counter("a_total", "Things.", &[("device", "x\"y\\z\n")], 1);
        report.gauge("b", "Now.", &[], 5);
        report.counter("a_total", "Things.", &[("device", "w"), ("k", "v")], 2);
        report.time("c_seconds", "Time.", &[], 1_000_042);
        let text = "# HELP a_total Things.\n# TYPE a_total counter\n\
                    a_total{device=\"x\\\"y\\\\z\\n\"} 1\na_total{device=\"w\",k=\"v\"} 2\n\
                    # HELP b Now.\n# TYPE b gauge\nb 5\n\
                    # HELP c_seconds Time.\n# TYPE c_seconds gauge\nc_seconds 1.000042\n";
        assert_eq!(report.prometheus(), text);
    }

    #[test]
    fn histogram_when_read_adds_up() {
        let histogram = Histogram::default();
        for micros in [1, 50, 51, 999, u64::from(u32::MAX)] {
            histogram.observe(micros);
        }
        let mut report = Report::default();
        report.histogram("h_seconds", "Times.", &histogram);
        let text = report.prometheus();
        for line in [
            "h_seconds_bucket{le=\"0.00005\"} 2",
            "h_seconds_bucket{le=\"0.0002\"} 3",
            "h_seconds_bucket{le=\"0.001\"} 4",
            "h_seconds_bucket{le=\"10\"} 4",
            "h_seconds_bucket{le=\"+Inf\"} 5",
            "h_seconds_count 5",
            "h_seconds_sum 4294.968396",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} in {text}");
        }
    }

    #[test]
    fn report_when_made_has_all_of_firecrackers_groups() {
        let groups = Report::with_all_groups().groups;
        assert_eq!(groups.len(), FIRECRACKER.len());
        assert_eq!(groups["signals"]["sighup"], Value::Count(0));
        assert_eq!(groups["block"]["read_agg"], Value::NO_TIMES);
    }
}
