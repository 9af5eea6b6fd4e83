//! Firecracker's line of JSON: what has been added since the line before.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

use super::Report;
use super::report::{Groups, Value, Values};

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
    use crate::metrics::TimeSummary;
    use std::io::{Read, Seek};
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;
    use vmm_sys_util::tempfile::TempFile;

    fn report(reads: u64) -> Report {
        let mut report = Report::default();
        report.expect("block", "block");
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
    fn times_when_of_several_are_told_as_one() {
        let (first, second) = (TimeSummary::default(), TimeSummary::default());
        let times = |least: u64, most: u64, sum: u64| serde_json::json!({"min_us": least, "max_us": most, "sum_us": sum});
        let mut file = TempFile::new().unwrap().into_file();
        let mut sink = Sink::new(file.try_clone().unwrap(), None, None);
        let mut write = || {
            let mut report = report(0);
            for summary in [&first, &second] {
                report.times("block", "read_agg", summary);
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
