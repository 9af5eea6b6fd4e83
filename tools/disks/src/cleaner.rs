//! Removes the folder of a run that a signal ended (Ctrl-C, SIGKILL), which can hold many gigabytes
//! under a hidden name. It is this program once more, in a process group of its own, so that the
//! terminal's signals do not reach it. It waits at a pipe: a byte says that the run has cleaned up,
//! the end without one that the run is gone. It touches no folder but the one of that run, and only
//! once no program of the run holds its lock.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use clap::Args;
use rustix::fs::{FlockOperation, Mode, OFlags};

/// Programs of the run that are ending may still make a file.
const TRIES: u32 = 100;

/// What the process that cleans up is told.
#[derive(Debug, Args)]
pub struct Clean {
    folder: PathBuf,
    device: u64,
    inode: u64,
}

/// The process, while the run goes on.
#[derive(Debug)]
pub struct Cleaner(Child);

impl Cleaner {
    /// Starts it for `folder`, which `lock` is. Without it a folder is removed by the next run.
    pub fn start(folder: &Path, lock: &File) -> Option<Cleaner> {
        // There the program would be the tests.
        if cfg!(test) {
            return None;
        }
        let it = lock.metadata().ok()?;
        let mut command = Command::new(std::env::current_exe().ok()?);
        command
            .arg("clean")
            .arg(folder)
            .args([it.dev().to_string(), it.ino().to_string()])
            .current_dir("/")
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command.spawn().ok().map(Cleaner)
    }
}

impl Drop for Cleaner {
    /// The run has removed its folder.
    fn drop(&mut self) {
        if let Some(mut pipe) = self.0.stdin.take() {
            let _ = pipe.write_all(b".");
        }
        let _ = self.0.wait();
    }
}

/// What the process does.
pub fn run(args: &Clean) {
    let mut told = Vec::new();
    if std::io::stdin().read_to_end(&mut told).is_err() || !told.is_empty() {
        return;
    }
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let Ok(folder) = rustix::fs::open(&args.folder, flags, Mode::empty()) else {
        return;
    };
    let folder = File::from(folder);
    let is_it = |it: fs::Metadata| (it.dev(), it.ino()) == (args.device, args.inode);
    if !folder.metadata().is_ok_and(is_it)
        || rustix::fs::flock(&folder, FlockOperation::LockExclusive).is_err()
    {
        return;
    }
    for _ in 0..TRIES {
        // The next run may have taken the place meanwhile.
        if !fs::symlink_metadata(&args.folder).is_ok_and(is_it)
            || fs::remove_dir_all(&args.folder).is_ok()
        {
            return;
        }
    }
}
