//! Limits by name, and the values that say the same to a cgroup of either version.

use std::path::{Path, PathBuf};

use rustix::fs::FileType;
use rustix::io::Errno;

use super::{Value, Version};
use crate::error::{Advice as _, Failure, Step as _};

/// Period of processor time limits, in microseconds.
const PERIOD_US: u64 = 100_000;

/// A limit by name.
#[derive(Clone, Debug, PartialEq)]
pub enum Limit {
    /// Thousandths of a processor.
    Cpus(u64),
    /// Bytes.
    Memory(u64),
    /// Processes and threads.
    Pids(u64),
    /// Bytes a second, each way, to and from a block device.
    Io(PathBuf, u64),
}

impl Limit {
    /// The controller of version 2, and of version 1.
    pub(super) fn controllers(&self) -> (&'static str, &'static str) {
        match self {
            Limit::Cpus(_) => ("cpu", "cpu"),
            Limit::Memory(_) => ("memory", "memory"),
            Limit::Pids(_) => ("pids", "pids"),
            Limit::Io(..) => ("io", "blkio"),
        }
    }

    /// What to write.
    pub(super) fn values(&self, version: Version) -> Result<Vec<Value>, Failure> {
        let values = match (self, version) {
            (Limit::Cpus(milli), _) => {
                let (period, quota) = (PERIOD_US.to_string(), milli * PERIOD_US / 1000);
                match version {
                    Version::V1 => vec![
                        ("cpu.cfs_period_us", period),
                        ("cpu.cfs_quota_us", quota.to_string()),
                    ],
                    Version::V2 => vec![("cpu.max", format!("{quota} {period}"))],
                }
            }
            (Limit::Memory(bytes), Version::V1) => {
                vec![("memory.limit_in_bytes", bytes.to_string())]
            }
            (Limit::Memory(bytes), Version::V2) => vec![("memory.max", bytes.to_string())],
            (Limit::Pids(count), _) => vec![("pids.max", count.to_string())],
            (Limit::Io(device, bytes), _) => {
                let device = number_of(device)?;
                let of_v1 = format!("{device} {bytes}");
                match version {
                    Version::V1 => vec![
                        ("blkio.throttle.read_bps_device", of_v1.clone()),
                        ("blkio.throttle.write_bps_device", of_v1),
                    ],
                    Version::V2 => vec![("io.max", format!("{device} rbps={bytes} wbps={bytes}"))],
                }
            }
        };
        let value = |(file, text): (&str, String)| Value {
            file: file.into(),
            text,
        };
        Ok(values.into_iter().map(value).collect())
    }
}

/// The number of a block device, as the kernel writes it.
fn number_of(device: &Path) -> Result<String, Failure> {
    let stat = rustix::fs::stat(device)
        .and_then(|stat| {
            let is_block = FileType::from_raw_mode(stat.st_mode).is_block_device();
            is_block.then_some(stat).ok_or(Errno::NOTBLK)
        })
        .step_on("limit I/O of", device)
        .hint(
            Errno::NOTBLK,
            "name the device that the files lie on, e.g. /dev/vda",
        )?;
    let (major, minor) = (
        rustix::fs::major(stat.st_rdev),
        rustix::fs::minor(stat.st_rdev),
    );
    Ok(format!("{major}:{minor}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_have_the_files_of_their_version() {
        let texts = |limit: Limit, version| -> Vec<String> {
            let values = limit.values(version).unwrap();
            values
                .into_iter()
                .map(|value| format!("{}={}", value.file, value.text))
                .collect()
        };
        assert_eq!(
            texts(Limit::Cpus(1500), Version::V2),
            ["cpu.max=150000 100000"]
        );
        assert_eq!(
            texts(Limit::Cpus(500), Version::V1),
            ["cpu.cfs_period_us=100000", "cpu.cfs_quota_us=50000"]
        );
        assert_eq!(
            texts(Limit::Memory(7), Version::V1),
            ["memory.limit_in_bytes=7"]
        );
        assert_eq!(texts(Limit::Memory(7), Version::V2), ["memory.max=7"]);
        assert_eq!(texts(Limit::Pids(7), Version::V2), ["pids.max=7"]);
        let error = Limit::Io("/dev/null".into(), 1)
            .values(Version::V2)
            .unwrap_err();
        assert_eq!(error.errno(), Some(Errno::NOTBLK), "{error}");
    }
}
