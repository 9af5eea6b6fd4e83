//! What was seen, and what is made of it.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::census::Usage;
use super::lives::Kind;
use crate::stats;

/// What a process may have more than at the beginning, in MiB.
pub const GROWTH: f64 = 2.0;

/// Everything of one run.
#[derive(Debug)]
pub struct Record {
    /// Where its random numbers began.
    pub seed: u64,
    began: Instant,
    /// Turns of the long lives that were whole.
    pub turns: usize,
    /// What the long lives had after each; the first is what the others are compared with.
    pub samples: Vec<Sample>,
    /// When each short life had ended, in seconds, and how long it had taken, in milliseconds.
    pub lives: BTreeMap<Kind, Vec<(f64, f64)>>,
    /// What ended the run before its time.
    pub failure: Option<String>,
    /// A signal ended it before its time; what was seen by then counts.
    pub is_cut: bool,
}

/// What there was at one moment.
#[derive(Clone, Debug)]
pub struct Sample {
    /// Seconds since the begin.
    pub at: f64,
    /// The processes of the long lives, by their names.
    pub processes: BTreeMap<String, Usage>,
    /// Memory of the host's kernel (slabs), of which all that runs on it has a part; MiB.
    pub slab: f64,
}

impl Record {
    /// Nothing was seen.
    pub fn new(seed: u64) -> Self {
        Self {
            seed,
            began: Instant::now(),
            turns: 0,
            samples: Vec::new(),
            lives: BTreeMap::new(),
            failure: None,
            is_cut: false,
        }
    }

    /// Since the begin.
    pub fn seconds(&self) -> f64 {
        self.began.elapsed().as_secs_f64()
    }

    /// One life has ended.
    pub fn lived(&mut self, kind: Kind, took: Duration) {
        let at = self.seconds();
        let lives = self.lives.entry(kind).or_default();
        lives.push((at, took.as_secs_f64() * 1e3));
    }

    /// How many lives there were.
    pub fn count(&self) -> usize {
        self.lives.values().map(Vec::len).sum()
    }

    /// All that is wrong, each with its figures.
    pub fn findings(&self) -> Vec<String> {
        let mut found: Vec<String> = self.failure.clone().into_iter().collect();
        let Some((first, rest)) = self.samples.split_first() else {
            return found;
        };
        for (name, before) in &first.processes {
            let later = || rest.iter().filter_map(|sample| sample.processes.get(name));
            let most = later().map(|now| now.memory).fold(0.0, f64::max);
            if most > before.memory + GROWTH {
                found.push(format!(
                    "{name}: memory grew from {:.2} to {most:.2} MiB",
                    before.memory
                ));
            }
            for now in later() {
                found.extend(different(name, before, now));
            }
        }
        found.dedup();
        found
    }

    /// For machines.
    pub fn json(&self) -> Value {
        let samples: Vec<Value> = self.samples.iter().map(Sample::json).collect();
        let lives: BTreeMap<&str, Value> = self
            .lives
            .iter()
            .map(|(kind, lives)| (kind.name(), times(lives)))
            .collect();
        json!({
            "seed": self.seed,
            "seconds": self.seconds(),
            "turns": self.turns,
            "ended_by_a_signal": self.is_cut,
            "lives": lives,
            "samples": samples,
            "findings": self.findings(),
        })
    }

    /// How much there was, in a line.
    pub fn line(&self) -> String {
        let cut = if self.is_cut {
            ", ended by a signal"
        } else {
            ""
        };
        format!(
            "{} short lives and {} turns of two long ones in {:.0} s{cut}",
            self.count(),
            self.turns,
            self.seconds()
        )
    }

    /// For people.
    pub fn text(&self) -> String {
        let mut text = format!("{} (seed {})\n\n", self.line(), self.seed);
        let _ = writeln!(
            text,
            "  {:22} {:>7} {:>30}",
            "lives", "", "median ms: whole, begin, end"
        );
        for (kind, lives) in &self.lives {
            let [all, begin, end] = medians(lives);
            let (name, count) = (kind.name(), lives.len());
            let _ = writeln!(
                text,
                "  {name:22} {count:7} {all:10.1} {begin:9.1} {end:9.1}"
            );
        }
        text.push('\n');
        text.push_str(&self.processes());
        for found in self.findings() {
            let _ = writeln!(text, "FOUND: {found}");
        }
        text
    }

    fn processes(&self) -> String {
        let (Some(first), Some(last)) = (self.samples.first(), self.samples.last()) else {
            return String::new();
        };
        let mut text = format!(
            "  {:22} {:>24} {:>12} {:>9} {:>9}\n",
            "long lives", "memory MiB: begin, end", "descriptors", "threads", "mappings"
        );
        for (name, before) in &first.processes {
            let Some(now) = last.processes.get(name) else {
                continue;
            };
            let _ = writeln!(
                text,
                "  {name:22} {:12.2} {:11.2} {:7} {:4} {:4} {:4} {:4} {:4}",
                before.memory,
                now.memory,
                before.open(),
                now.open(),
                before.threads,
                now.threads,
                before.mappings,
                now.mappings,
            );
        }
        text
    }
}

impl Sample {
    fn json(&self) -> Value {
        let processes: BTreeMap<&str, Value> = self
            .processes
            .iter()
            .map(|(name, usage)| (name.as_str(), usage.json()))
            .collect();
        json!({ "at_s": self.at, "processes": processes, "host_slab_mib": self.slab })
    }
}

/// How what a process has now differs from what it had, in what may not differ.
pub fn different(name: &str, before: &Usage, now: &Usage) -> Option<String> {
    if before.threads != now.threads {
        return Some(format!(
            "{name}: it had {} threads, and has {}",
            before.threads, now.threads
        ));
    }
    if before.open() == now.open() {
        return None;
    }
    let mut changed = Vec::new();
    for (what, count) in &now.descriptors {
        let had = before.descriptors.get(what).copied().unwrap_or(0);
        if had != *count {
            changed.push(format!("{what}: {had}, {count}"));
        }
    }
    Some(format!(
        "{name}: it had {} descriptors, and has {} ({})",
        before.open(),
        now.open(),
        changed.join("; ")
    ))
}

fn times(lives: &[(f64, f64)]) -> Value {
    let [all, begin, end] = medians(lives);
    json!({ "count": lives.len(), "median_ms": all, "median_ms_at_begin": begin, "median_ms_at_end": end })
}

/// Medians of all, and of the first and the last quarter.
fn medians(lives: &[(f64, f64)]) -> [f64; 3] {
    let quarter = lives.len().div_ceil(4);
    [
        lives,
        &lives[..quarter],
        &lives[lives.len().saturating_sub(quarter)..],
    ]
    .map(|part| {
        let times: Vec<f64> = part.iter().map(|(_, ms)| *ms).collect();
        stats::summary(&times).map_or(0.0, |all| all.median)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(usages: &[(f64, usize, usize)]) -> Record {
        let mut record = Record::new(1);
        for (memory, descriptors, threads) in usages {
            let usage = Usage {
                memory: *memory,
                descriptors: BTreeMap::from([("socket:[#]".to_owned(), *descriptors)]),
                threads: *threads,
                ..Usage::default()
            };
            record.samples.push(Sample {
                at: 1.0,
                processes: BTreeMap::from([("monitor".to_owned(), usage)]),
                slab: 0.0,
            });
        }
        record
    }

    #[test]
    fn growth_when_within_the_bound_is_no_finding() {
        let found = record(&[(1.0, 7, 3), (2.9, 7, 3), (0.5, 7, 3)]).findings();
        assert!(found.is_empty(), "{found:?}");
    }

    #[test]
    fn growth_when_beyond_the_bound_is_found_even_if_it_went_again() {
        let found = record(&[(1.0, 7, 3), (3.1, 7, 3), (1.0, 7, 3)]).findings();
        assert_eq!(found, ["monitor: memory grew from 1.00 to 3.10 MiB"]);
    }

    #[test]
    fn descriptors_and_threads_when_other_are_found_with_their_kind() {
        let found = record(&[(1.0, 7, 3), (1.0, 8, 3), (1.0, 7, 4)]).findings();
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].contains("7 descriptors, and has 8 (socket:[#]: 7, 8)"));
        assert!(found[1].contains("3 threads, and has 4"));
    }

    #[test]
    fn run_when_ended_by_a_signal_is_judged_by_what_was_seen() {
        let mut record = record(&[(1.0, 7, 3), (3.1, 7, 3)]);
        record.is_cut = true;
        assert_eq!(record.findings().len(), 1);
        assert!(record.line().ends_with("ended by a signal"));
    }

    #[test]
    fn medians_when_taken_are_of_the_quarters() {
        let lives: Vec<(f64, f64)> = (1..=8).map(|n| (0.0, f64::from(n))).collect();
        assert_eq!(medians(&lives), [4.5, 1.5, 7.5]);
        assert_eq!(medians(&[]), [0.0; 3]);
    }
}
