//! What `/proc` says about a running monitor: its mappings and its page tables.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use crate::failure::{Context, Failure, Result};
use crate::guest::{PAGE, SIGNATURE};

/// One entry of `/proc/PID/smaps`; sizes in KiB.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Mapping {
    /// First address.
    pub start: u64,
    /// First address after it.
    pub end: u64,
    /// Readable and writable.
    pub writable: bool,
    /// File name, `[heap]`, or empty.
    pub name: String,
    /// Resident.
    pub rss: u64,
    /// Resident, each page divided by the number of its users.
    pub pss: u64,
    /// Written, and in this process only.
    pub private_dirty: u64,
    /// Belonging to no file, copies of a file's pages included.
    pub anonymous: u64,
}

impl Mapping {
    /// KiB that the process wrote for itself alone. A page of a file on disk that is not yet written back (a program
    /// built just now) is called dirty too, but belongs to the file.
    pub fn own_dirty(&self) -> u64 {
        let of_a_file = self.name.starts_with('/')
            && !["/memfd:", "/dev/", "/SYSV"]
                .iter()
                .any(|made| self.name.starts_with(made));
        if of_a_file {
            self.private_dirty.min(self.anonymous)
        } else {
            self.private_dirty
        }
    }
}

/// Reads the mappings of a process.
pub fn mappings(pid: u32) -> Result<Vec<Mapping>> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps"))
        .cannot(|| format!("read /proc/{pid}/smaps"))?;
    Ok(parse_smaps(&text))
}

fn parse_smaps(text: &str) -> Vec<Mapping> {
    let mut found: Vec<Mapping> = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let Some(first) = words.next() else { continue };
        if let Some(key) = first.strip_suffix(':') {
            let (Some(mapping), Some(value)) =
                (found.last_mut(), words.next().and_then(|v| v.parse().ok()))
            else {
                continue;
            };
            match key {
                "Rss" => mapping.rss = value,
                "Pss" => mapping.pss = value,
                "Private_Dirty" => mapping.private_dirty = value,
                "Anonymous" => mapping.anonymous = value,
                _ => {}
            }
        } else if let Some((start, end)) = first.split_once('-') {
            let hex = |text| u64::from_str_radix(text, 16);
            if let (Ok(start), Ok(end)) = (hex(start), hex(end)) {
                found.push(Mapping {
                    start,
                    end,
                    writable: words.next().is_some_and(|p| p.starts_with("rw")),
                    name: words.skip(3).collect::<Vec<_>>().join(" "),
                    ..Default::default()
                });
            }
        }
    }
    found
}

/// The part of a process that is its guest's memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GuestRam {
    /// First address.
    pub start: u64,
    /// First address after it.
    pub end: u64,
}

/// Finds the guest's memory: in a gapless run of readable and writable mappings (whatever backs them), `len` bytes with
/// the guest's signature at guest-physical address `signature_at`.
pub fn guest_ram(pid: u32, mappings: &[Mapping], len: u64, signature_at: u64) -> Result<GuestRam> {
    let memory =
        File::open(format!("/proc/{pid}/mem")).cannot(|| format!("open /proc/{pid}/mem"))?;
    for (start, end) in runs(mappings) {
        let mut base = start;
        while base + len <= end {
            let mut bytes = [0; SIGNATURE.len()];
            if memory
                .read_exact_at(&mut bytes, base + signature_at)
                .is_ok()
                && bytes == *SIGNATURE
            {
                let end = base + len;
                return Ok(GuestRam { start: base, end });
            }
            base += PAGE as u64;
        }
    }
    Err(Failure::new(format!(
        "cannot find the guest's memory among the mappings of process {pid}"
    )))
}

/// Gapless runs of readable and writable mappings.
fn runs(mappings: &[Mapping]) -> Vec<(u64, u64)> {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for mapping in mappings.iter().filter(|mapping| mapping.writable) {
        match runs.last_mut() {
            Some((_, end)) if *end == mapping.start => *end = mapping.end,
            _ => runs.push((mapping.start, mapping.end)),
        }
    }
    runs
}

/// What a process uses, in MiB.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// Private dirty memory outside the guest's memory: stacks, heap, written data and relocations of the monitor.
    pub own_dirty: f64,
    /// Resident pages of the guest's memory, private or from the kernel file.
    pub guest_resident: f64,
    /// Private dirty pages of the guest's memory.
    pub guest_dirty: f64,
    /// Proportional share of everything resident.
    pub pss: f64,
    /// The kernel's page tables for the process.
    pub page_tables: f64,
}

/// Measures a process whose guest has `len` bytes of memory.
pub fn usage(pid: u32, len: u64, signature_at: u64) -> Result<Usage> {
    // The mappings are read before the search, whose reads could change them.
    let mappings = mappings(pid)?;
    let page_tables = status_kib(pid, "VmPTE:")?;
    let ram = guest_ram(pid, &mappings, len, signature_at)?;
    let (mut own_dirty, mut guest_resident, mut guest_dirty) = (0, 0, 0);
    for mapping in &mappings {
        if mapping.end <= ram.start || mapping.start >= ram.end {
            own_dirty += mapping.own_dirty();
        } else {
            // The kernel merges neighbours that are alike; what such a mapping has beyond guest memory is ours.
            let beyond = anonymous_kib(pid, mapping.start, ram.start)?
                + anonymous_kib(pid, ram.end, mapping.end)?;
            own_dirty += beyond;
            guest_dirty += mapping.own_dirty().saturating_sub(beyond);
            guest_resident += mapping.rss.saturating_sub(beyond);
        }
    }
    Ok(Usage {
        own_dirty: mib(own_dirty),
        guest_resident: mib(guest_resident),
        guest_dirty: mib(guest_dirty),
        pss: mib(mappings.iter().map(|mapping| mapping.pss).sum()),
        page_tables: mib(page_tables),
    })
}

/// KiB of present pages between two addresses that belong to no file.
fn anonymous_kib(pid: u32, start: u64, end: u64) -> Result<u64> {
    const PRESENT: u64 = 1 << 63;
    const OF_A_FILE: u64 = 1 << 61;
    if start >= end {
        return Ok(0);
    }
    let reading = || format!("read /proc/{pid}/pagemap");
    let pagemap = File::open(format!("/proc/{pid}/pagemap")).cannot(reading)?;
    let mut entries = vec![0; ((end - start) / PAGE as u64 * 8) as usize];
    pagemap
        .read_exact_at(&mut entries, start / PAGE as u64 * 8)
        .cannot(reading)?;
    let pages = entries
        .chunks_exact(8)
        .filter_map(|entry| entry.try_into().ok())
        .map(u64::from_le_bytes)
        .filter(|entry| entry & PRESENT != 0 && entry & OF_A_FILE == 0)
        .count();
    Ok(pages as u64 * PAGE as u64 / 1024)
}

/// Proportional share of everything resident in a process, in MiB.
pub fn pss(pid: u32) -> Result<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))
        .cannot(|| format!("read /proc/{pid}/smaps_rollup"))?;
    kib_after(&text, "Pss:")
        .map(mib)
        .ok_or_else(|| Failure::new(format!("cannot find Pss in /proc/{pid}/smaps_rollup")))
}

/// Memory that the kernel could give to new programs, in MiB.
pub fn available() -> Result<f64> {
    let text = fs::read_to_string("/proc/meminfo").cannot(|| "read /proc/meminfo".into())?;
    kib_after(&text, "MemAvailable:")
        .map(mib)
        .ok_or_else(|| Failure::new("cannot find MemAvailable in /proc/meminfo"))
}

/// Memory that the kernel has for its own tables, in MiB.
pub fn slab() -> Result<f64> {
    let text = fs::read_to_string("/proc/meminfo").cannot(|| "read /proc/meminfo".into())?;
    kib_after(&text, "Slab:")
        .map(mib)
        .ok_or_else(|| Failure::new("cannot find Slab in /proc/meminfo"))
}

/// The threads of a process, each with the letter of its state: R runs, S sleeps, D waits in the kernel, T is stopped.
pub fn threads(pid: u32) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"));
    tasks
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|task| {
            let text = fs::read_to_string(task.path().join("stat")).ok()?;
            let (_, rest) = text.split_once('(')?;
            let (name, rest) = rest.rsplit_once(") ")?;
            Some(format!("{name} {}", rest.split(' ').next()?))
        })
        .collect()
}

/// How many files this program may open.
pub fn open_files_limit() -> Option<usize> {
    let text = fs::read_to_string("/proc/self/limits").ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// A line of a process's status, in KiB.
pub fn status_kib(pid: u32, key: &str) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))
        .cannot(|| format!("read /proc/{pid}/status"))?;
    kib_after(&text, key)
        .ok_or_else(|| Failure::new(format!("cannot find {key} in /proc/{pid}/status")))
}

fn kib_after(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    line.split_whitespace().next()?.parse().ok()
}

/// KiB in MiB.
pub fn mib(kib: u64) -> f64 {
    kib as f64 / 1024.0
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
7f0000000000-7f0000100000 rw-p 00000000 00:00 0 
Size:               1024 kB
Rss:                   8 kB
Pss:                   8 kB
Private_Clean:         0 kB
Private_Dirty:         4 kB
VmFlags: rd wr mr mw me ac sd
7f0000100000-7f0000200000 rw-p 00001000 fe:00 77   /tmp/a kernel
Rss:                  16 kB
Pss:                   2 kB
Private_Dirty:         0 kB
7f0000300000-7f0000301000 r--p 00000000 00:00 0    [vvar]
Rss:                   0 kB
";

    #[test]
    fn smaps_when_parsed_gives_each_mapping_with_its_sizes() {
        let found = parse_smaps(SMAPS);
        assert_eq!(found.len(), 3);
        assert_eq!(found[0].private_dirty, 4);
        assert_eq!(found[0].name, "");
        assert_eq!(found[1].name, "/tmp/a kernel");
        assert_eq!((found[1].rss, found[1].pss), (16, 2));
        assert!(found[1].writable && !found[2].writable);
    }

    #[test]
    fn dirt_when_of_a_file_on_disk_is_not_the_process_s() {
        let mapping = |name: &str| Mapping {
            name: name.to_owned(),
            private_dirty: 8,
            anonymous: 4,
            ..Default::default()
        };
        assert_eq!(mapping("/usr/bin/monitor").own_dirty(), 4);
        assert_eq!(mapping("/memfd:guest (deleted)").own_dirty(), 8);
        assert_eq!(mapping("[heap]").own_dirty(), 8);
    }

    #[test]
    fn threads_when_of_this_process_have_names_and_states() {
        let found = threads(std::process::id());
        assert!(found.iter().any(|one| one.ends_with(" R")), "{found:?}");
        assert!(threads(u32::MAX).is_empty());
    }

    #[test]
    fn runs_when_mappings_touch_join_them() {
        let found = runs(&parse_smaps(SMAPS));
        assert_eq!(found, [(0x7f00_0000_0000, 0x7f00_0020_0000)]);
    }
}
