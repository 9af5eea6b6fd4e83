//! `console`: what guest output costs: time, processor time, and system calls a byte.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::json;

use crate::failure::{Context, Failure, Result};
use crate::guest::{LINE, Size, Task};
use crate::monitor::{CommandLine, Monitor, Running};
use crate::rounds::{self, Figure, Plan, Sample};
use crate::workspace::{Kernel, Workspace};

/// How the figures are counted, for the foot of the table.
pub const NOTES: &str = "\
output: lines of 64 bytes, one OUT instruction a byte, read from a pipe as it comes; each byte is a KVM_RUN call under
every monitor. Processor time is that of the whole monitor, the guest's included. System calls are those of all threads,
counted by strace over the whole life of the process, in runs of their own; a boot of Linux prints its kernel log.
";

/// What is printed where time is measured, and where calls are counted, in lines.
const LINES: u32 = (1 << 20) / LINE;
const COUNTED_LINES: u32 = (64 << 10) / LINE;

/// Longer than any monitor takes to boot Linux, or to print.
const PATIENCE: Duration = Duration::from_secs(400);

/// Measures each monitor; `linux` is the folder that `tools/guest` makes. The floor has no console, and is left out.
pub fn measure(
    workspace: &Workspace,
    monitors: &[Monitor],
    plan: Plan,
    linux: Option<&Path>,
) -> Result<Vec<Figure>> {
    let timed = workspace.kernel("print", Size::Tiny, Task::PrintAndStay(LINES))?;
    let counted = workspace.kernel("count", Size::Tiny, Task::PrintAndReset(COUNTED_LINES))?;
    let linux = linux
        .filter(|folder| folder.join("vmlinux").exists())
        .map(|folder| boot_of_linux(workspace, folder))
        .transpose()?;
    let strace = Command::new("strace").arg("-V").output().is_ok();
    if !strace {
        eprintln!("console: without system calls a byte: strace is not installed");
    } else if linux.is_none() {
        eprintln!("console: without a boot of Linux: run tools/guest first");
    }
    rounds::run(plan, monitors, |monitor| {
        if monitor.command_line == CommandLine::Floor {
            return Ok(Vec::new());
        }
        let mut samples = time(monitor, &timed)?;
        if strace {
            let calls = count(workspace, monitor, &counted.config, false)?;
            samples.push(Sample::new(
                "64 KiB of output, KVM_RUN and other ioctl",
                "system calls a byte",
                calls.ioctl,
            ));
            samples.push(calls.others("64 KiB of output, all but ioctl"));
            if let Some(config) = &linux {
                let calls = count(workspace, monitor, config, true)?;
                samples.push(calls.others("a boot of Linux, all but ioctl"));
            }
        }
        Ok(samples)
    })
}

/// A configuration that boots Linux with its kernel log on the console, and ends by itself.
fn boot_of_linux(workspace: &Workspace, folder: &Path) -> Result<PathBuf> {
    let path = folder.join("cmdline");
    let words = fs::read_to_string(&path).cannot(|| format!("read {}", path.display()))?;
    let mut words: Vec<&str> = words.split_whitespace().filter(|w| *w != "quiet").collect();
    words.push("mayfly.run=reboot");
    let config = json!({
        "boot-source": {
            "kernel_image_path": folder.join("vmlinux"),
            "initrd_path": folder.join("initramfs.cpio"),
            "boot_args": words.join(" "),
        },
        "machine-config": { "vcpu_count": 1, "mem_size_mib": 128 },
        "drives": [],
    });
    workspace.file("linux.json", &config.to_string())
}

fn time(monitor: &Monitor, kernel: &Kernel) -> Result<Vec<Sample>> {
    let mut running = monitor.boot(kernel)?;
    let began = running.first_byte(None)?;
    let bytes = running.read_output(u64::from(LINES * LINE), PATIENCE)?;
    let took = began.elapsed().as_secs_f64() * 1e3;
    if bytes < u64::from(LINES * LINE) {
        return Err(Failure::new(format!(
            "{} printed {bytes} bytes of 1 MiB",
            monitor.name
        )));
    }
    let processor = processor_ms(running.pid())?;
    running.stop()?;
    Ok(vec![
        Sample::ms("1 MiB of output, time", took),
        Sample::ms("1 MiB of output, processor time", processor),
    ])
}

/// What all threads of a process have used.
fn processor_ms(pid: u32) -> Result<f64> {
    let tasks = format!("/proc/{pid}/task");
    let mut nanos = 0.0;
    for task in fs::read_dir(&tasks).cannot(|| format!("read {tasks}"))? {
        let path = task.cannot(|| format!("read {tasks}"))?.path();
        let path = path.join("schedstat");
        let text = fs::read_to_string(&path).cannot(|| format!("read {}", path.display()))?;
        let first = text.split(' ').next().and_then(|word| word.parse().ok());
        nanos += first.unwrap_or(0.0);
    }
    Ok(nanos / 1e6)
}

/// System calls for each byte that was printed.
struct Calls {
    ioctl: f64,
    others: f64,
}

impl Calls {
    fn others(&self, figure: &str) -> Sample {
        Sample::new(figure, "system calls a byte", self.others)
    }
}

/// Runs a guest that ends by itself under strace. Without a look at `ioctl`, the guest runs at its usual pace.
fn count(
    workspace: &Workspace,
    monitor: &Monitor,
    config: &Path,
    without_ioctl: bool,
) -> Result<Calls> {
    let table = workspace.file("strace", "")?;
    let mut command = Command::new("strace");
    command
        .args(["-f", "-c", "-U", "name,calls", "-o"])
        .arg(&table);
    if without_ioctl {
        command.args(["--seccomp-bpf", "-e", "trace=!ioctl"]);
    }
    command.arg(&monitor.path).args(&monitor.extra);
    command.args(["--level", "Error", "--no-api", "--config-file"]);
    command.arg(config);
    let mut running = Running::start(&monitor.name, command)?;
    let bytes = running.read_output(u64::MAX, PATIENCE)?;
    running.exit()?;
    let text = fs::read_to_string(&table).cannot(|| format!("read {}", table.display()))?;
    let (ioctl, others) = sums(&text);
    if bytes == 0 || others == 0 {
        return Err(Failure::new(format!(
            "{} printed {bytes} bytes under strace, which counted {others} system calls",
            monitor.name
        )));
    }
    Ok(Calls {
        ioctl: ioctl as f64 / bytes as f64,
        others: others as f64 / bytes as f64,
    })
}

/// Calls of `ioctl` and of all others in a table of strace's, whose columns are name and calls.
fn sums(table: &str) -> (u64, u64) {
    let (mut ioctl, mut others) = (0, 0);
    for line in table.lines() {
        let mut words = line.split_whitespace();
        let (Some(name), Some(Ok(calls))) = (words.next(), words.next().map(str::parse::<u64>))
        else {
            continue;
        };
        match name {
            "total" => {}
            "ioctl" => ioctl += calls,
            _ => others += calls,
        }
    }
    (ioctl, others)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_of_a_table_leave_out_its_frame_and_its_total() {
        let table = "syscall              calls\n---------------- ---------\nioctl                  120\n\
                     write                   30\nppoll                    7\n\
                     ---------------- ---------\ntotal                  157\n";
        assert_eq!(sums(table), (120, 37));
    }
}
