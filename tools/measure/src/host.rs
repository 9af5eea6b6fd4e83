//! What a figure needs to be understood later: the machine it was measured on.

use std::fs;
use std::path::Path;

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
    /// Load average of the last minute when asked.
    pub load: f64,
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
        }
    }

    /// One paragraph for people.
    pub fn text(&self) -> String {
        let load_now = load();
        let mut text = format!(
            "host: Linux {}, {} cores ({}), KVM: {}, load average {:.2} at the start and {load_now:.2} at the end\n",
            self.kernel, self.cores, self.cpu, self.kvm, self.load
        );
        if self.load > 0.5 {
            text.push_str(
                "      others were using this machine: read minima, and ratios per round, rather than maxima\n",
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
        })
    }
}

fn load() -> f64 {
    fs::read_to_string("/proc/loadavg")
        .ok()
        .and_then(|text| text.split_whitespace().next()?.parse().ok())
        .unwrap_or(f64::NAN)
}
