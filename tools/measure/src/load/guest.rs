//! A probe guest under load: told by its console what to do, and watched while it works.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::failure::{Context, Failure, Result};
use crate::monitor::{Monitor, Running};
use crate::stats;
use crate::sys;

/// Longer than any case takes, its span of work included.
const PATIENCE: Duration = Duration::from_secs(60);

/// A booted guest that waits for words on its console.
pub struct Guest {
    running: Running,
    name: String,
}

/// What one span of work came to.
#[derive(Debug)]
pub struct Work {
    /// The numbers the guest said.
    fields: BTreeMap<String, f64>,
    word: String,
    /// Processor time of the monitor without its vCPU threads, from the begin of the work to its end.
    pub busy: Duration,
    /// The share of the time that a vCPU could run but had no processor.
    pub waited: f64,
}

impl Work {
    /// The number the guest said under `key`.
    pub fn field(&self, key: &str) -> Result<f64> {
        self.fields.get(key).copied().ok_or_else(|| {
            Failure::new(format!("the probe guest says no {key} after {}", self.word))
        })
    }
}

impl Guest {
    /// Boots with a configuration whose guest ends its words with `shell`.
    pub fn boot(monitor: &Monitor, config: &Path) -> Result<Self> {
        let mut running = monitor.boot_config_quietly(config)?;
        running.next_line("probe: print:ready ok", PATIENCE)?;
        Ok(Self {
            running,
            name: monitor.name.clone(),
        })
    }

    /// Lets the guest do `word`, which says `begun` when its work begins.
    pub fn work(&mut self, word: &str) -> Result<Work> {
        Ok(self.work_with(word, || Ok(()))?.0)
    }

    /// The same, and does `at_begin` when the work begins.
    pub fn work_with<T>(
        &mut self,
        word: &str,
        at_begin: impl FnOnce() -> Result<T>,
    ) -> Result<(Work, T)> {
        self.running.tell(format!("{word}\n").as_bytes())?;
        self.running.next_line(" begun", PATIENCE)?;
        let with_it = at_begin()?;
        let begin = Times::read(self.running.pid())?;
        let line = self
            .running
            .next_line(&format!("probe: {word} "), PATIENCE)?;
        let end = Times::read(self.running.pid())?;
        let Some((_, said)) = line.split_once(" ok ") else {
            return Err(Failure::new(format!("{}: {}", self.name, line.trim())));
        };
        let run = end.vcpu_run.saturating_sub(begin.vcpu_run).as_secs_f64();
        let wait = end.vcpu_wait.saturating_sub(begin.vcpu_wait).as_secs_f64();
        let work = Work {
            fields: fields(said),
            word: word.to_owned(),
            busy: end.others.saturating_sub(begin.others),
            waited: wait / (run + wait).max(1e-9),
        };
        Ok((work, with_it))
    }

    /// Ends the guest and its monitor.
    pub fn stop(self) -> Result<()> {
        self.running.stop()
    }
}

/// `KEY=NUMBER` words.
fn fields(text: &str) -> BTreeMap<String, f64> {
    text.split_whitespace()
        .filter_map(|word| {
            let (key, value) = word.split_once('=')?;
            Some((key.to_owned(), value.parse().ok()?))
        })
        .collect()
}

/// Processor times of a monitor.
#[derive(Debug)]
struct Times {
    /// On a processor: all threads but the vCPUs, kernel threads that work for it (io_uring) included.
    others: Duration,
    vcpu_run: Duration,
    /// Able to run, but without a processor.
    vcpu_wait: Duration,
}

impl Times {
    fn read(pid: u32) -> Result<Self> {
        let (mut run, mut wait) = (0, 0);
        let tasks = format!("/proc/{pid}/task");
        for task in fs::read_dir(&tasks).cannot(|| format!("read {tasks}"))? {
            let task = task.cannot(|| format!("read {tasks}"))?.path();
            // A thread that is gone by now is no vCPU.
            let name = fs::read_to_string(task.join("comm")).unwrap_or_default();
            if !name.contains("vcpu") {
                continue;
            }
            let text = fs::read_to_string(task.join("schedstat"))
                .cannot(|| format!("read {}/schedstat", task.display()))?;
            let mut numbers = text
                .split_whitespace()
                .map(|word| word.parse().unwrap_or(0));
            run += numbers.next().unwrap_or(0);
            wait += numbers.next().unwrap_or(0);
        }
        let all = sys::time_of_process(pid).cannot(|| format!("read the time of process {pid}"))?;
        let vcpu_run = Duration::from_nanos(run);
        Ok(Self {
            others: all.saturating_sub(vcpu_run),
            vcpu_run,
            vcpu_wait: Duration::from_nanos(wait),
        })
    }
}

/// How long vCPUs waited for processors: what tells whether figures can be believed.
#[derive(Debug, Default)]
pub struct Waits(Vec<f64>);

impl Waits {
    /// Above this share, other programs are part of what was measured.
    const TOO_MUCH: f64 = 0.05;

    /// Notes the share of one span of work.
    pub fn add(&mut self, share: f64) {
        self.0.push(share);
    }

    /// Whether the machine was too busy for the figures to be believed.
    pub fn too_busy(&self) -> bool {
        stats::summary(&self.0).is_some_and(|waits| waits.median > Self::TOO_MUCH)
    }

    /// A line for below the tables.
    pub fn text(&self) -> String {
        let Some(waits) = stats::summary(&self.0) else {
            return String::new();
        };
        let [min, median, max] = [waits.min, waits.median, waits.max].map(|share| share * 100.0);
        let mut text = format!(
            "vCPUs waited for a processor in {min:.1} to {max:.1}% of the time, median {median:.1}%\n"
        );
        if self.too_busy() {
            text.push_str("THE MACHINE WAS TOO BUSY: other programs took processors from the guests. Do not believe these figures; ratios per round say a little.\n");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_when_parsed_are_the_numbers() {
        let found = fields("requests=12 bytes=49152 what min-ns=7 isr=x\r");
        assert_eq!(found.len(), 3);
        assert_eq!(found["bytes"], 49152.0);
        assert_eq!(found["min-ns"], 7.0);
    }

    #[test]
    fn waits_when_most_are_long_tell_that_the_machine_was_busy() {
        let mut waits = Waits::default();
        waits.add(0.9);
        waits.add(0.01);
        waits.add(0.02);
        assert!(!waits.too_busy() && !waits.text().contains("TOO BUSY"));
        waits.add(0.5);
        waits.add(0.06);
        assert!(waits.too_busy() && waits.text().contains("TOO BUSY"));
    }

    #[test]
    fn times_when_of_this_process_are_read() {
        let times = Times::read(std::process::id()).unwrap();
        assert_eq!(times.vcpu_run, Duration::ZERO);
    }
}
