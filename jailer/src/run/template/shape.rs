//! What a template has to have in common with a guest that is to be a copy of it, as one text.
//!
//! Files are known by what `stat` says of them, as disks of images are: device, number, size, and the times of
//! modification and last change, which no program can set. A large kernel is not read for it. One that was changed in the
//! last [`SETTLED`] has no shape yet: two changes within one tick of a file system's clock have one time. The agent is known
//! by its content.

use std::fmt::Write as _;
use std::io::Read as _;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, SystemTime};

use mayfly_agent_protocol::VERSION;

use crate::host;

/// File systems have ticks of up to two seconds.
const SETTLED: Duration = Duration::from_secs(2);
/// The first processor of /proc/cpuinfo is within so many bytes.
const CPU_MAX: u64 = 16 << 10;
/// What of it stays the same.
const OF_CPU: [&str; 6] = [
    "vendor_id",
    "cpu family",
    "model",
    "stepping",
    "microcode",
    "flags",
];

/// What makes a shape.
#[derive(Debug)]
pub struct Parts<'a> {
    /// The monitor's executable.
    pub monitor: BorrowedFd<'a>,
    /// The guest's kernel.
    pub kernel: BorrowedFd<'a>,
    /// The initial RAM disk, with the agent.
    pub initramfs: BorrowedFd<'a>,
    /// The configuration, without what is another in each guest.
    pub machine: &'a str,
}

/// A shape.
#[derive(Debug)]
pub struct Shape(String);

impl Shape {
    /// Why there is none: text for a message.
    pub fn of(parts: &Parts<'_>) -> Result<Shape, String> {
        let mut text = format!(
            "mayfly template 1, jailer {}, protocol {VERSION}\n",
            env!("CARGO_PKG_VERSION")
        );
        add_file(&mut text, "monitor", parts.monitor)?;
        add_file(&mut text, "kernel", parts.kernel)?;
        add_content(&mut text, "initramfs", parts.initramfs)?;
        add_host(&mut text);
        let _ = writeln!(text, "machine {}", parts.machine);
        Ok(Shape(text))
    }

    /// All of it.
    pub fn bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }

    /// Where to look for it.
    pub fn name(&self) -> String {
        format!("{:016x}", hash(self.bytes()))
    }
}

fn add_file(text: &mut String, name: &'static str, file: BorrowedFd<'_>) -> Result<(), String> {
    let found =
        rustix::fs::fstat(file).map_err(|error| format!("cannot look at the {name}: {error}"))?;
    let changed = Duration::from_secs(found.st_ctime.unsigned_abs());
    let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    if changed + SETTLED > now {
        return Err(format!(
            "the {name} was changed less than {} seconds ago",
            SETTLED.as_secs()
        ));
    }
    let _ = writeln!(
        text,
        "{name} {} {} {} {}.{:09} {}.{:09}",
        found.st_dev,
        found.st_ino,
        found.st_size,
        found.st_mtime,
        found.st_mtime_nsec,
        found.st_ctime,
        found.st_ctime_nsec,
    );
    Ok(())
}

fn add_content(text: &mut String, name: &'static str, file: BorrowedFd<'_>) -> Result<(), String> {
    let read = file.as_fd().try_clone_to_owned().and_then(|file| {
        let mut bytes = Vec::new();
        let mut place = 0;
        let mut block = vec![0; 64 << 10];
        loop {
            let count = rustix::io::pread(&file, &mut block, place)?;
            if count == 0 {
                return Ok(bytes);
            }
            bytes.extend_from_slice(&block[..count]);
            place += count as u64;
        }
    });
    let bytes = read.map_err(|error| format!("cannot read the {name}: {error}"))?;
    let _ = writeln!(text, "{name} {} {:016x}", bytes.len(), hash(&bytes));
    Ok(())
}

/// The processor, and the kernel, whose KVM has to know what was saved.
fn add_host(text: &mut String) {
    let host = rustix::system::uname();
    for part in [host.release(), host.version(), host.machine()] {
        let _ = writeln!(text, "host {}", part.to_string_lossy());
    }
    let _ = writeln!(text, "software KVM {}", host::has_software_kvm());
    let mut cpu = Vec::new();
    let file = std::fs::File::open("/proc/cpuinfo");
    let _ = file.map(|file| file.take(CPU_MAX).read_to_end(&mut cpu));
    let cpu = String::from_utf8_lossy(&cpu);
    for line in cpu.lines().take_while(|line| !line.is_empty()) {
        if OF_CPU.contains(&line.split('\t').next().unwrap_or_default()) {
            let _ = writeln!(text, "{line}");
        }
    }
}

/// FNV-1a. It names a folder, and tells one agent of the same length from another; it is no protection, and needs to be
/// none: both are the caller's own.
fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}
