//! Disks: the cases, and their floor.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::json;

use super::guest::{Guest, Waits};
use super::{BusyThread, Overlay, Row, Wanted, boot_source};
use crate::failure::{Context, Result};
use crate::monitor::CommandLine;
use crate::rounds::Sample;
use crate::sys;
use crate::workspace::{MEMORY_MIB, Workspace};

/// How the figures are counted, for the foot of the tables.
pub const NOTES: &str = "\
counted: a bare-metal guest with one vCPU keeps DEPTH requests in flight on each disk (256 MiB), polls for completions,
asks for no interrupts unless the case says so, and counts by its time stamp counter. Where a monitor offers requests of
one buffer only (no SEG_MAX), a scattered read is as many requests as it has pages. \"floor\" is
pread and pwrite of the same sizes at the same kind of places by one thread of the host for each disk, without a VM,
beside a thread that never sleeps in the vCPU's place. CPU is the processor time of the monitor for each read or write:
all its threads (those of io_uring in the kernel too) but the vCPU's, which polls without end.
";

/// What is to be said of overlays besides.
pub const OVERLAY_NOTES: &str = "\
Overlays have all of their disks when the cases begin, as the disk without one has no holes: the guest writes everything
first. Into an empty overlay each first write also takes memory or blocks of the file system.
";

/// Bytes of the disk: more than caches hold, little enough for a small host.
pub const DISK_LEN: u64 = 256 << 20;

/// One kind of work on a disk.
struct Case {
    name: &'static str,
    mode: &'static str,
    size: u64,
    depth: u64,
    /// In MB/s and not in requests per second.
    in_bytes: bool,
    /// Indices of disks, with `+` between them.
    disks: &'static str,
    /// More words for the guest.
    options: &'static str,
}

const CASES: [Case; 9] = [
    requests("randread 4k, depth 1", "randread", 1),
    requests("randread 4k, depth 32", "randread", 32),
    requests("randwrite 4k, depth 1", "randwrite", 1),
    requests("randwrite 4k, depth 32", "randwrite", 32),
    Case {
        options: ":pieces",
        ..bytes("read 128k over 4k pages, depth 8", "read")
    },
    bytes("read 128k, depth 8", "read"),
    bytes("write 128k, depth 8", "write"),
    Case {
        options: ":interrupts",
        ..requests("randread 4k, depth 32, interrupts", "randread", 32)
    },
    Case {
        disks: "0+1",
        ..requests("randread 4k, depth 32, two disks", "randread", 32)
    },
];

/// Writes all of both disks, some times.
const FILL: Case = Case {
    disks: "0+1",
    ..bytes("fill", "write")
};

const fn requests(name: &'static str, mode: &'static str, depth: u64) -> Case {
    Case {
        name,
        mode,
        size: 4096,
        depth,
        in_bytes: false,
        disks: "0",
        options: "",
    }
}

const fn bytes(name: &'static str, mode: &'static str) -> Case {
    Case {
        size: 128 << 10,
        in_bytes: true,
        ..requests(name, mode, 8)
    }
}

impl Case {
    fn word(&self, ms: usize) -> String {
        let Self {
            mode,
            size,
            depth,
            disks,
            options,
            ..
        } = self;
        format!("blkload:{disks}:{mode}:{size}:{depth}:{ms}{options}")
    }

    /// The figure of so much work in so much time.
    fn sample(&self, requests: f64, bytes: f64, seconds: f64) -> Sample {
        if self.in_bytes {
            Sample::new(self.name, "MB/s", bytes / seconds / 1e6)
        } else {
            Sample::new(self.name, "IOPS", requests / seconds)
        }
    }
}

/// The disk, and what to do with it.
pub struct Bench<'a> {
    workspace: &'a Workspace,
    wanted: Wanted<'a>,
    disks: [Disk; 2],
}

impl<'a> Bench<'a> {
    /// Makes the disk.
    pub fn new(workspace: &'a Workspace, wanted: Wanted<'a>) -> Result<Self> {
        let disk = |number| Disk::new(wanted.media, number, DISK_LEN);
        let disks = [disk(0)?, disk(1)?];
        Ok(Self {
            workspace,
            wanted,
            disks,
        })
    }

    /// All cases, once, by one row.
    pub fn round(&self, row: &Row, waits: &mut Waits) -> Result<Vec<Sample>> {
        let cases = CASES.iter().filter(|case| self.wanted.has(case.name));
        if row.monitor.command_line == CommandLine::Floor {
            return cases.map(|case| self.floor(case)).collect();
        }
        let overlays = match row.overlay {
            Some(Overlay::File) => self
                .disks
                .each_ref()
                .map(|disk| Some(OverlayFile::of(disk))),
            _ => [None, None],
        };
        let config = self.config(row, &overlays)?;
        let mut guest = Guest::boot(&row.monitor, &config)?;
        if row.overlay.is_some() {
            guest.work(&FILL.word(self.wanted.span_ms))?;
        }
        let mut samples = Vec::new();
        for case in cases {
            let work = guest.work(&case.word(self.wanted.span_ms))?;
            waits.add(work.waited);
            let (requests, bytes) = (work.field("requests")?, work.field("bytes")?);
            samples.push(case.sample(requests, bytes, work.field("ns")? / 1e9));
            samples.push(Sample::new(
                format!("{}, CPU", case.name),
                "us",
                work.busy.as_secs_f64() * 1e6 / (bytes / case.size as f64).max(1.0),
            ));
        }
        guest.stop()?;
        Ok(samples)
    }

    fn config(&self, row: &Row, overlays: &[Option<OverlayFile>; 2]) -> Result<PathBuf> {
        let drives = [0, 1].map(|number| {
            let mut drive = json!({
                "drive_id": format!("disk{number}"),
                "path_on_host": self.disks[number].path,
                "is_root_device": false,
                "is_read_only": false,
            });
            if let Some(engine) = row.engine {
                drive["io_engine"] = engine.into();
            }
            if let Some(file) = &overlays[number] {
                drive["overlay"] = json!({ "path_on_host": file.0 });
            } else if row.overlay == Some(Overlay::Memory) {
                drive["overlay"] = json!({ "memory": true });
            }
            drive
        });
        let text = json!({
            "boot-source": boot_source(self.wanted.probe),
            "machine-config": { "vcpu_count": 1, "mem_size_mib": MEMORY_MIB },
            "drives": drives,
            "network-interfaces": [],
        });
        self.workspace.file("load.json", &text.to_string())
    }

    /// The same reads or writes by a thread for each disk, beside one that never sleeps in the vCPU's place.
    fn floor(&self, case: &Case) -> Result<Sample> {
        let _vcpu = BusyThread::start();
        let rates = std::thread::scope(|scope| {
            let disks = self.disks.iter().take(case.disks.split('+').count());
            let threads: Vec<_> = disks
                .map(|disk| scope.spawn(|| self.rate(case, disk)))
                .collect();
            let ended = threads.into_iter().map(|thread| thread.join());
            ended
                .map(|rate| rate.expect("a thread of the floor does not panic"))
                .collect::<Result<Vec<f64>>>()
        })?;
        let requests: f64 = rates.iter().sum();
        Ok(case.sample(requests, requests * case.size as f64, 1.0))
    }

    /// Requests per second of this thread.
    fn rate(&self, case: &Case, disk: &Disk) -> Result<f64> {
        let file = &disk.file;
        let size = case.size as usize;
        let mut buffers = vec![vec![1_u8; size]; case.depth as usize];
        // Every other page of some more memory.
        let mut pages = vec![
            1_u8;
            if case.options == ":pieces" {
                2 * size
            } else {
                0
            }
        ];
        let places = DISK_LEN / case.size;
        let span = Duration::from_millis(self.wanted.span_ms as u64);
        let (mut count, mut place) = (0_u64, 1_u64);
        let began = Instant::now();
        while began.elapsed() < span {
            // The clock is no part of the work.
            for _ in 0..32 {
                let buffer = &mut buffers[(count % case.depth) as usize];
                place = if case.mode.starts_with("rand") {
                    scattered(place)
                } else {
                    place + 1
                };
                let at = place % places * case.size;
                let done = if !pages.is_empty() {
                    sys::read_scattered(file, &mut pages, at)
                } else if case.mode.ends_with("write") {
                    file.write_all_at(buffer, at)
                } else {
                    file.read_exact_at(buffer, at)
                };
                done.cannot(|| format!("use {}", disk.path.display()))?;
                count += 1;
            }
        }
        Ok(count as f64 / began.elapsed().as_secs_f64())
    }
}

/// The next of a row of numbers without a pattern (xorshift).
fn scattered(mut state: u64) -> u64 {
    state ^= state << 13;
    state ^= state >> 7;
    state ^ state << 17
}

/// A file without holes that is removed at the end.
pub struct Disk {
    /// Where it lies.
    pub path: PathBuf,
    file: File,
}

impl Disk {
    /// Makes it.
    pub fn new(folder: &Path, number: u32, len: u64) -> Result<Self> {
        let path = folder.join(format!("mayfly-bench-{}.disk{number}", std::process::id()));
        let make = || {
            let mut file = File::options()
                .read(true)
                .write(true)
                .create_new(true)
                .open(&path)?;
            let mut state = 1;
            let chunk: Vec<u8> = (0..1 << 20)
                .map(|_| {
                    state = scattered(state);
                    state as u8
                })
                .collect();
            for _ in 0..len / chunk.len() as u64 {
                file.write_all(&chunk)?;
            }
            file.sync_all()?;
            Ok::<File, std::io::Error>(file)
        };
        let file = make().cannot(|| format!("make the disk {}", path.display()))?;
        Ok(Self { path, file })
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            let path = self.path.display();
            eprintln!("mayfly-measure: cannot remove {path}: {error}.");
        }
    }
}

/// Where what a guest writes goes, for one round. The monitor makes the file.
struct OverlayFile(PathBuf);

impl OverlayFile {
    fn of(disk: &Disk) -> Self {
        let mut path = disk.path.clone().into_os_string();
        path.push(".overlay");
        Self(path.into())
    }
}

impl Drop for OverlayFile {
    fn drop(&mut self) {
        // Without a guest that started there is none.
        let _ = fs::remove_file(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disk_when_dropped_is_removed() {
        let disk = Disk::new(&std::env::temp_dir(), 7, 2 << 20).unwrap();
        let path = disk.path.clone();
        assert_eq!(fs::metadata(&path).unwrap().len(), 2 << 20);
        drop(disk);
        assert!(!path.exists());
    }

    #[test]
    fn case_when_in_bytes_is_counted_in_megabytes() {
        let mut case = requests("x", "read", 8);
        case.in_bytes = true;
        let sample = case.sample(100.0, 13e6, 0.5);
        assert_eq!(
            format!("{sample:?}"),
            format!("{:?}", Sample::new("x", "MB/s", 26.0))
        );
    }
}
