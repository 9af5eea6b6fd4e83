//! Counters, and the two forms they are read in: Prometheus' text for `GET /metrics`, and
//! Firecracker's line of JSON for the sink of `PUT /metrics`.
//!
//! Nothing here knows a device. The thread that counts owns its [`Counter`]s, on one thread, and has a
//! function that reads them out into a [`Report`]; control calls these when a client asks, so
//! counting costs a thread one plain addition and nothing else.
#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::fs::File;
use std::io::{self, Write as _};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

/// A number that only grows: written by one thread (or under one lock), read by any.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// None counted yet.
    pub const fn new() -> Self {
        Counter(AtomicU64::new(0))
    }

    /// Counts `n` more. There is one writer, so nothing is lost between load and store, and no
    /// processor waits for another.
    pub fn add(&self, n: u64) {
        self.0.store(self.get().wrapping_add(n), Ordering::Relaxed);
    }

    /// Counts one more.
    pub fn one(&self) {
        self.add(1);
    }

    /// Takes the place of the count: for what is no count but the last of its kind.
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// The count so far.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Upper bounds of a [`Histogram`]'s buckets, in microseconds, and as Prometheus is told them.
const BOUNDS: [(u64, &str); 8] = [
    (50, "0.00005"),
    (200, "0.0002"),
    (1_000, "0.001"),
    (5_000, "0.005"),
    (20_000, "0.02"),
    (100_000, "0.1"),
    (1_000_000, "1"),
    (10_000_000, "10"),
];

/// How long things took: written by one thread, read by any.
#[derive(Debug, Default)]
pub struct Histogram {
    /// One for each bound, each for what the ones before do not hold; the rest last.
    buckets: [Counter; BOUNDS.len() + 1],
    micros: Counter,
}

impl Histogram {
    /// Something took `micros` microseconds.
    pub fn observe(&self, micros: u64) {
        let bucket = BOUNDS.iter().position(|(bound, _)| micros <= *bound);
        if let Some(bucket) = self.buckets.get(bucket.unwrap_or(BOUNDS.len())) {
            bucket.one();
        }
        self.micros.add(micros);
    }
}

/// Least, most and sum of how long things took: written by one thread, read by any.
#[derive(Debug, Default)]
pub struct Spread {
    least: Counter,
    most: Counter,
    sum: Counter,
}

impl Spread {
    /// Something took `micros` microseconds.
    pub fn observe(&self, micros: u64) {
        // 0 is both "none yet" and the least there can be.
        if self.least.get() == 0 || micros < self.least.get() {
            self.least.set(micros);
        }
        if micros > self.most.get() {
            self.most.set(micros);
        }
        self.sum.add(micros);
    }

    /// The sum, in microseconds.
    pub fn sum(&self) -> u64 {
        self.sum.get()
    }
}

/// `time` in microseconds.
pub fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// Microseconds from `then` to now.
pub fn micros_since(then: Instant) -> u64 {
    micros(then.elapsed())
}

/// Something that counts and can be asked without knowing what it is.
pub trait Reader: fmt::Debug + Send + Sync {
    /// Writes all it has counted into `report`.
    fn read(&self, report: &mut Report);
}

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
enum Value {
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

type Groups = BTreeMap<String, BTreeMap<&'static str, Value>>;

/// All counters at one moment.
#[derive(Debug, Default)]
pub struct Report {
    families: Vec<Family>,
    groups: Groups,
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

    /// For the line: the times of `spread`, together with those that `key` of `group` has already.
    pub fn times(&mut self, group: &str, key: &'static str, spread: &Spread) {
        let more = Value::Times {
            least: spread.least.get(),
            most: spread.most.get(),
            sum: spread.sum.get(),
        };
        let slot = self.slot(group, key);
        *slot = slot.and(more);
    }

    /// For the line: all of `keys` in `group` are there, zeros unless something else is said.
    /// Those that end in `_agg` hold least, most and sum of a time.
    pub fn expect(&mut self, group: &str, keys: &[&'static str]) {
        for key in keys {
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

/// Where lines of metrics go: a file or a FIFO that never blocks.
#[derive(Debug)]
pub struct Sink {
    file: File,
    /// Written into each line.
    id: Option<String>,
    properties: Option<BTreeMap<String, String>>,
    /// The report of the last line that was taken.
    told: Groups,
    /// The end of a line of which only the beginning was taken.
    rest: Vec<u8>,
    /// Lines that were not taken.
    missed: u64,
}

impl Sink {
    /// Lines go to `file`, which does not block; each has `id` and `properties`, if any.
    pub fn new(
        file: File,
        id: Option<String>,
        properties: Option<BTreeMap<String, String>>,
    ) -> Self {
        Sink {
            file,
            id,
            properties,
            told: Groups::new(),
            rest: Vec::new(),
            missed: 0,
        }
    }

    /// Lines that were not taken so far.
    pub fn missed(&self) -> u64 {
        self.missed
    }

    /// Writes one line with what is new in `report`. What is not taken now is not lost: the next
    /// line that is tells it.
    ///
    /// # Errors
    /// Without a reader, or with a full disk, there is no new line.
    pub fn write(&mut self, report: Report) -> io::Result<()> {
        let result = self.write_rest().and_then(|()| {
            let mut line = serde_json::to_vec(&Line {
                sink: self,
                groups: &report.groups,
            })?;
            line.push(b'\n');
            match self.file.write(&line) {
                Ok(taken) => self.rest = line.split_off(taken.min(line.len())),
                Err(error) => return Err(error),
            }
            self.told = report.groups;
            // A disk that is full says so only at the second attempt.
            self.write_rest().or(Ok(()))
        });
        if result.is_err() {
            self.missed = self.missed.saturating_add(1);
        }
        result
    }

    fn write_rest(&mut self) -> io::Result<()> {
        while !self.rest.is_empty() {
            match self.file.write(&self.rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(taken) => self.rest = self.rest.split_off(taken.min(self.rest.len())),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// One line.
struct Line<'a> {
    sink: &'a Sink,
    groups: &'a Groups,
}

impl Serialize for Line<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("utc_timestamp_ms", &now.as_millis())?;
        if let Some(id) = &self.sink.id {
            map.serialize_entry("id", id)?;
        }
        if let Some(properties) = &self.sink.properties {
            map.serialize_entry("properties", properties)?;
        }
        for (name, values) in self.groups {
            map.serialize_entry(name, &Group(values, self.sink.told.get(name)))?;
        }
        map.end()
    }
}

type Values = BTreeMap<&'static str, Value>;

/// The values of a group, and those of the line before.
struct Group<'a>(&'a Values, Option<&'a Values>);

impl Serialize for Group<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(key, value)| {
            let before = match self.1.and_then(|told| told.get(key)) {
                Some(Value::Count(before) | Value::Times { sum: before, .. }) => *before,
                _ => 0,
            };
            let shown = match value {
                Value::Count(sum) => Shown::Number(sum.saturating_sub(before)),
                Value::Now(now) => Shown::Number(*now),
                Value::Times { least, most, sum } => Shown::Times([
                    ("min_us", *least),
                    ("max_us", *most),
                    ("sum_us", sum.saturating_sub(before)),
                ]),
            };
            (key, shown)
        }))
    }
}

enum Shown {
    Number(u64),
    Times([(&'static str, u64); 3]),
}

impl Serialize for Shown {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Shown::Number(number) => serializer.serialize_u64(*number),
            Shown::Times(members) => serializer.collect_map(members.iter().copied()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek};
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;
    use vmm_sys_util::tempfile::TempFile;

    fn report(reads: u64) -> Report {
        let mut report = Report::default();
        report.expect("block", &["read_count", "write_count", "read_agg"]);
        report.add("block", "read_count", reads);
        report.set("latencies_us", "pause_vm", reads);
        report
    }

    fn lines(text: &str) -> Vec<serde_json::Value> {
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

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
    fn times_when_of_several_are_told_as_one() {
        let (first, second) = (Spread::default(), Spread::default());
        let times = |least: u64, most: u64, sum: u64| serde_json::json!({"min_us": least, "max_us": most, "sum_us": sum});
        let mut file = TempFile::new().unwrap().into_file();
        let mut sink = Sink::new(file.try_clone().unwrap(), None, None);
        let mut write = || {
            let mut report = report(0);
            for spread in [&first, &second] {
                report.times("block", "read_agg", spread);
            }
            sink.write(report).unwrap();
        };
        first.observe(40);
        first.observe(30);
        write();
        second.observe(9);
        second.observe(70);
        write();
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        let lines = lines(&text);
        assert_eq!(lines[0]["block"]["read_agg"], times(30, 40, 70));
        assert_eq!(lines[1]["block"]["read_agg"], times(9, 70, 79));
    }

    #[test]
    fn line_when_written_again_tells_what_is_new() {
        let mut file = TempFile::new().unwrap().into_file();
        let properties = BTreeMap::from([("cell".to_owned(), "7".to_owned())]);
        let mut sink = Sink::new(
            file.try_clone().unwrap(),
            Some("i".into()),
            Some(properties),
        );
        sink.write(report(5)).unwrap();
        sink.write(report(7)).unwrap();
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        let lines = lines(&text);
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[0]["block"]["read_count"], 5);
        assert_eq!(lines[0]["block"]["write_count"], 0);
        assert_eq!(
            lines[0]["block"]["read_agg"],
            serde_json::json!({"min_us": 0, "max_us": 0, "sum_us": 0})
        );
        assert_eq!(lines[1]["block"]["read_count"], 2);
        assert_eq!(lines[1]["latencies_us"]["pause_vm"], 7);
        assert_eq!(lines[1]["id"], "i");
        assert_eq!(lines[1]["properties"]["cell"], "7");
        assert!(lines[1]["utc_timestamp_ms"].as_u64().unwrap() > 1_600_000_000_000);
    }

    #[test]
    fn line_when_nobody_reads_is_missed_and_no_line_is_torn() {
        let (mut reader, writer) = UnixStream::pair().unwrap();
        writer.set_nonblocking(true).unwrap();
        let mut sink = Sink::new(OwnedFd::from(writer).into(), None, None);
        let mut taken = 0;
        let mut wrote = 0;
        // Long lines, so that one is cut.
        let long = || {
            let mut long = report(taken + 1);
            for group in 0..2000 {
                long.add(&format!("group{group}"), "value", 1);
            }
            long
        };
        while sink.write(long()).is_ok() {
            wrote += 1;
            assert!(wrote < 100_000);
        }
        taken += 1;
        assert_eq!(sink.missed(), 1);
        let mut text = String::new();
        reader.set_nonblocking(true).unwrap();
        let _ = reader.read_to_string(&mut text);
        sink.write(report(taken + 100)).unwrap();
        let mut more = String::new();
        let _ = reader.read_to_string(&mut more);
        text.push_str(&more);
        let lines = lines(&text);
        assert_eq!(lines.len(), wrote + 1);
        let reads: u64 = lines
            .iter()
            .map(|l| l["block"]["read_count"].as_u64().unwrap())
            .sum();
        assert_eq!(reads, taken + 100);
    }
}
