//! What a guest with an agent boots from: an initial RAM disk in memory, of the agent and the folders that
//! it mounts things on. It has no name on the host, and is passed as a descriptor.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{MemfdFlags, SealFlags};

use crate::error::{Advice as _, AnyError, Failure, Step as _};
use crate::input;

/// Folders in it.
const FOLDERS: [&str; 4] = ["dev", "lower", "memory", "root"];
/// The largest agent that is taken for one.
const AGENT_MAX: u64 = 64 << 20;

/// The archive, with the agent at `given`, or the one beside this program.
pub fn make(given: Option<&Path>) -> Result<OwnedFd, AnyError> {
    let path = match given {
        Some(path) => path.to_owned(),
        None => std::env::current_exe()
            .step("find the agent beside this program")
            .advise("name it with --agent")?
            .with_file_name("mayfly-agent"),
    };
    let agent = input::read(&path, AGENT_MAX)
        .step_on("read the guest's agent", &path)
        .advise("it is mayfly-agent, beside mayfly-jailer; or name it with --agent")?;
    Ok(in_memory(&archive(&agent))?)
}

fn in_memory(bytes: &[u8]) -> Result<OwnedFd, Failure> {
    const WHAT: &str = "make the guest's initial RAM disk in memory";
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = rustix::fs::memfd_create("mayfly-initramfs", flags).step(WHAT)?;
    let mut file = File::from(file);
    file.write_all(bytes).step(WHAT)?;
    let all = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&file, all).step(WHAT)?;
    Ok(file.into())
}

/// In the kernel's format ("newc", Documentation/driver-api/early-userspace/buffer-format.rst).
fn archive(agent: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(agent.len() + 1024);
    for folder in FOLDERS {
        add(&mut bytes, folder, 0o040_755, &[]);
    }
    // The kernel opens it for its first process, which would be without standard streams.
    add_with(&mut bytes, "dev/console", 0o020_600, &[], (5, 1));
    add(&mut bytes, "init", 0o100_755, agent);
    add(&mut bytes, "TRAILER!!!", 0, &[]);
    bytes
}

fn add(archive: &mut Vec<u8>, name: &str, mode: u32, content: &[u8]) {
    add_with(archive, name, mode, content, (0, 0));
}

fn add_with(archive: &mut Vec<u8>, name: &str, mode: u32, content: &[u8], device: (u32, u32)) {
    let number = archive.len() as u32;
    let fields = [
        number,
        mode,
        0,
        0,
        1,
        0,
        content.len() as u32,
        0,
        0,
        device.0,
        device.1,
        name.len() as u32 + 1,
        0,
    ];
    archive.extend_from_slice(b"070701");
    for field in fields {
        archive.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    archive.extend_from_slice(name.as_bytes());
    archive.push(0);
    let pad = |archive: &mut Vec<u8>| archive.resize(archive.len().next_multiple_of(4), 0);
    pad(archive);
    archive.extend_from_slice(content);
    pad(archive);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn archive_is_what_cpio_unpacks() {
        let folder = crate::testing::Folder::new("initramfs");
        let archive = folder.path().join("archive");
        std::fs::write(&archive, super::archive(b"#!agent")).unwrap();
        let listed = std::process::Command::new("cpio")
            .arg("-itv")
            .stdin(File::open(&archive).unwrap())
            .output();
        let Ok(listed) = listed else {
            println!("cpio is missing, which this test needs");
            return;
        };
        let text = String::from_utf8_lossy(&listed.stdout);
        let names: Vec<_> = text
            .lines()
            .map(|line| line.rsplit(' ').next().unwrap())
            .collect();
        assert_eq!(
            names,
            ["dev", "lower", "memory", "root", "dev/console", "init"],
            "{text}"
        );
        assert!(
            text.contains("-rwxr-xr-x") && text.contains("5,   1"),
            "{text}"
        );
    }
}
