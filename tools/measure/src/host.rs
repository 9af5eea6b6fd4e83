//! What a figure needs to be understood later: the machine it was measured on.

use std::fs;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

/// Facts about the host.
#[derive(Debug)]
pub struct Host {
    /// Release of the running kernel.
    pub kernel: String,
    /// What runs the guest's ring 0.
    pub kvm: &'static str,
    /// Processors this program may use.
    pub cores: usize,
    /// The processor's name.
    pub cpu: String,
    /// Load average of the last minute when the measurement began.
    pub load: f64,
    began: Option<Ticks>,
    read_at: SystemTime,
}

/// Processor time used since boot, in the kernel's ticks, by all processors together.
#[derive(Clone, Copy, Debug)]
struct Ticks {
    /// By all programs, waiting included.
    total: u64,
    /// By all programs.
    busy: u64,
    /// By this program and the programs it started and has waited for.
    ours: u64,
}

impl Host {
    /// Reads the facts; what cannot be read is "unknown".
    pub fn read() -> Self {
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let cpu = cpus
            .lines()
            .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
            .map_or("unknown", |(_, name)| name);
        let kvm = if Path::new("/sys/module/kvm_pvm").exists() {
            "software (kvm_pvm: the guest's ring 0 is emulated)"
        } else if Path::new("/sys/module/kvm_intel").exists() {
            "hardware (kvm_intel)"
        } else if Path::new("/sys/module/kvm_amd").exists() {
            "hardware (kvm_amd)"
        } else {
            "unknown"
        };
        Self {
            kernel: kernel.trim().to_owned(),
            kvm,
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            cpu: cpu.to_owned(),
            load: load(),
            began: ticks(),
            read_at: SystemTime::now(),
        }
    }

    /// The share of the processors that other programs (and the kernel's own threads) used since the facts were read.
    fn others(&self) -> f64 {
        match (self.began, ticks()) {
            (Some(began), Some(now)) if now.total > began.total => {
                let busy = (now.busy - began.busy).saturating_sub(now.ours - began.ours);
                busy as f64 / (now.total - began.total) as f64
            }
            _ => f64::NAN,
        }
    }

    /// The day, in UTC.
    pub fn date(&self) -> String {
        let since = self.read_at.duration_since(UNIX_EPOCH).unwrap_or_default();
        date(since.as_secs() / 86_400)
    }

    /// The machine in a few words.
    pub fn line(&self) -> String {
        format!(
            "Linux {}, {} cores ({}), KVM: {}",
            self.kernel, self.cores, self.cpu, self.kvm
        )
    }

    /// One paragraph for people.
    pub fn text(&self) -> String {
        let others = self.others() * 100.0;
        let mut text = format!(
            "host: {}\n      load average {:.2} at the start, {:.2} at the end; others used {others:.0}% of the processors meanwhile\n",
            self.line(),
            self.load,
            load(),
        );
        if others > 15.0 {
            text.push_str(
                "      that is much: read minima, and ratios per round, rather than maxima\n",
            );
        }
        text
    }

    /// The same for machines.
    pub fn json(&self) -> Value {
        json!({
            "kernel": self.kernel,
            "kvm": self.kvm,
            "cores": self.cores,
            "cpu": self.cpu,
            "load_at_start": self.load,
            "load_at_end": load(),
            "others_share": self.others(),
        })
    }
}

/// A day of the Gregorian calendar by its number since 1970-01-01.
fn date(days: u64) -> String {
    // Counted in years that begin in March, so that the leap day is a year's last.
    let days = days + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let (year, month) = match month {
        0..=9 => (era * 400 + year, month + 3),
        _ => (era * 400 + year + 1, month - 9),
    };
    format!("{year:04}-{month:02}-{day:02}")
}

fn ticks() -> Option<Ticks> {
    let all = fs::read_to_string("/proc/stat").ok()?;
    let own = fs::read_to_string("/proc/self/stat").ok()?;
    parse_ticks(&all, &own)
}

fn parse_ticks(all: &str, own: &str) -> Option<Ticks> {
    // user nice system idle iowait irq softirq steal; the rest is contained in these.
    let columns = all.lines().next()?.strip_prefix("cpu ")?;
    let columns: Vec<u64> = columns
        .split_whitespace()
        .take(8)
        .filter_map(|word| word.parse().ok())
        .collect();
    let total: u64 = columns.iter().sum();
    // Times of the program and of its children: the 12th to the 15th field after the name.
    let (_, after_name) = own.rsplit_once(')')?;
    let fields = after_name.split_whitespace().skip(11).take(4);
    Some(Ticks {
        total,
        busy: total - columns.get(3)? - columns.get(4)?,
        ours: fields.filter_map(|field| field.parse::<u64>().ok()).sum(),
    })
}

fn load() -> f64 {
    fs::read_to_string("/proc/loadavg")
        .ok()
        .and_then(|text| text.split_whitespace().next()?.parse().ok())
        .unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn date_when_of_known_days_is_theirs() {
        let known = [
            (0, "1970-01-01"),
            (59, "1970-03-01"),
            (11_016, "2000-02-29"),
            (20_786, "2026-11-29"),
        ];
        for (days, text) in known {
            assert_eq!(date(days), text);
        }
    }

    #[test]
    fn ticks_when_parsed_leave_out_waiting_and_what_is_counted_twice() {
        let all = "cpu  10 1 20 100 50 2 3 4 9 9\ncpu0 0 0 0 0\n";
        let own = "7 (a) b) S 1 1 1 0 -1 0 0 0 0 0 5 6 7 8 20 0 1";
        let found = parse_ticks(all, own).unwrap();
        assert_eq!((found.total, found.busy, found.ours), (190, 40, 26));
    }
}
