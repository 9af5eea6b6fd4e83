//! Taking a snapshot of the guest that is watched (`run --snapshot-to`), when the guest says that it
//! has booted, or at SIGUSR1.
//!
//! ```text
//!   both files begun --> guest paused --> monitor writes --> resumed, or ended --> files in place
//! ```
//!
//! The files are made here, outside the jail, by the rules of [`mayfly::snapshot`]: under temporary
//! names, synced, then exchanged. So whenever this program is killed, the folder has the old
//! snapshot or the new one. The monitor gets descriptors: the memory file, a file in memory for the state,
//! whose bytes go into place as they are, and its own /proc/PID/pagemap, which the jail does not have
//! and which tells pages that hold something. Without that it looks for them in slower ways.
//!
//! While the monitor works, everything else is served as always: what ends the microVM ends the
//! snapshot too, and what was in place stays.

use std::cell::RefCell;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use mayfly::snapshot::{self, Header, MEMORY_NAME, MemoryImage, Refusal, STATE_NAME, Target};
use mayfly::wire::config::{PassedFd, SnapshotCreate, SnapshotType};
use mayfly::wire::limits::END_REPORT_MAX;
use mayfly::wire::{BOOTED, Response, Source};
use rustix::fs::MemfdFlags;
use rustix::process::Pid;

use super::{Question, Watch};
use crate::error::{Failure, message};
use crate::sys;

/// The monitor has not given a snapshot.
#[derive(Debug, thiserror::Error)]
pub(super) enum TakeError {
    #[error("the monitor refused: {0}")]
    Refused(String),
    #[error("the microVM is ending")]
    Ending,
    #[error("cannot speak to the monitor: {0}")]
    NoAnswer(String),
    #[error("cannot make a file in memory: {0}")]
    NoFile(#[from] rustix::io::Errno),
    #[error("what the monitor wrote {0}")]
    Unfit(Refusal),
}

/// What there is to know of snapshots to be taken.
#[derive(Debug, Default)]
pub struct Snapshots {
    /// `--snapshot-to` is given.
    pub is_wanted: bool,
    /// One is to be taken now.
    pub is_due: bool,
    /// How many have been taken.
    taken: u32,
    /// The answer to the last question about them.
    pub answer: Option<Response>,
    /// What the monitor has said so far on the descriptor that tells of the guest.
    pub heard: Vec<u8>,
    /// Nothing more is to be heard there that matters before the end.
    has_heard: bool,
    /// The guest was ended for this, or for want of it.
    pub outcome: Option<Result<String, String>>,
}

impl Snapshots {
    /// Whether the guest may still say that it has booted.
    pub fn is_waiting(&self) -> bool {
        self.is_wanted && !self.has_heard
    }

    /// Takes what the monitor says of its guest.
    pub fn hear(&mut self, end: BorrowedFd<'_>) {
        let mut bytes = [0; END_REPORT_MAX];
        let count = match rustix::io::read(end, &mut bytes) {
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return,
            other => other.unwrap_or(0),
        };
        self.heard.extend(&bytes[..count]);
        let is_booted = self.heard.starts_with(BOOTED.as_bytes());
        self.is_due |= is_booted && self.taken == 0;
        // It says at most a line before the end.
        self.has_heard = is_booted || count == 0 || self.heard.len() >= BOOTED.len();
    }

    /// Whether the guest ended by itself before there was one.
    pub fn is_missing(&self) -> bool {
        self.is_wanted && self.taken == 0 && self.outcome.is_none()
    }
}

/// A process's table of pages, where this host lets it be read.
pub(super) fn pagemap_of(pid: Pid) -> Option<OwnedFd> {
    let number = pid.as_raw_nonzero();
    let opened = File::open(format!("/proc/{number}/pagemap"));
    opened.ok().map(OwnedFd::from)
}

impl Watch {
    /// Takes one, if it is time.
    pub(super) fn take_snapshot_when_due(&mut self) {
        let progress = &mut self.progress;
        let is_ending = progress.failure.is_some()
            || progress.seen.asked.is_some()
            || progress.snapshots.outcome.is_some();
        let is_free = progress.has_started && progress.is_monitor && progress.question.is_none();
        if is_ending || !is_free || self.client.is_none() || !progress.snapshots.is_due {
            return;
        }
        let Some(folder) = self.spec.options.snapshot_to.clone() else {
            return;
        };
        progress.snapshots.is_due = false;
        let goes_on = self.spec.options.snapshot_and_continue;
        let taken = self.take_snapshot(&folder, goes_on);
        // How it ends counts then, and that is still to be seen.
        if let Err(snapshot::WriteError::Memory(cause)) = &taken
            && let Some(TakeError::Ending) = cause.downcast_ref()
        {
            return;
        }
        let taken = taken.map_err(|error| {
            let work = format!("take a snapshot into {} (--snapshot-to)", folder.display());
            message(&Failure::new(work, error))
        });
        if goes_on {
            let text = match &taken {
                Ok(_) if self.spec.options.quiet => return,
                Ok(text) | Err(text) => format!("mayfly-jailer: {text}\n"),
            };
            // A reader that does not read it does not hold up the guest.
            let _ = std::io::Write::write_all(&mut std::io::stderr(), text.as_bytes());
            return;
        }
        self.progress.snapshots.outcome = Some(taken);
        self.kill();
    }

    pub(super) fn is_ending(&self) -> bool {
        let progress = &self.progress;
        progress.failure.is_some() || progress.seen.asked.is_some() || progress.seen.timed_out
    }

    /// Takes one; what there is to say of it.
    pub(super) fn take_snapshot(
        &mut self,
        folder: &Path,
        goes_on: bool,
    ) -> Result<String, snapshot::WriteError> {
        let target = |file| Target::Path(folder.join(file));
        // The state file's bytes, and what it says of the memory file.
        let state = RefCell::new(Vec::new());
        let mut stood_us = 0;
        let mut sizes = (0, 0);
        let fill = |memory: &File| {
            let began = sys::monotonic_us();
            let written = self.have_written(memory, goes_on);
            stood_us = sys::monotonic_us() - began;
            let (header, bytes) = written?;
            *state.borrow_mut() = bytes;
            let metadata = memory.metadata().ok();
            sizes = metadata.map_or((0, 0), |it| (it.len(), it.blocks() * 512));
            Ok::<MemoryImage, TakeError>(header.memory)
        };
        let mut state_len = 0;
        let encode = |_: MemoryImage| {
            let bytes = state.take();
            state_len = bytes.len();
            Ok::<Vec<u8>, TakeError>(bytes)
        };
        snapshot::write_pair(target(STATE_NAME), target(MEMORY_NAME), fill, encode)?;
        self.progress.snapshots.taken += 1;
        let mib = |bytes: u64| bytes.div_ceil(1 << 20);
        Ok(format!(
            "the snapshot is in {}: {} MiB of memory ({} MiB in the file), {} KiB of state; it took \
             {}.{:03} ms",
            folder.display(),
            mib(sizes.0),
            mib(sizes.1),
            state_len.div_ceil(1 << 10),
            stood_us / 1000,
            stood_us % 1000
        ))
    }

    /// Has the monitor write the guest's memory into `memory`; the state file that belongs to it.
    fn have_written(
        &mut self,
        memory: &File,
        goes_on: bool,
    ) -> Result<(Header, Vec<u8>), TakeError> {
        let state = File::from(rustix::fs::memfd_create("state", MemfdFlags::CLOEXEC)?);
        let pagemap = pagemap_of(self.pid);
        let request = SnapshotCreate {
            snapshot_type: SnapshotType::Full,
            snapshot_path: Source::passed(0, STATE_NAME),
            mem_file_path: Some(Source::passed(1, MEMORY_NAME)),
            pagemap: pagemap.as_ref().map(|_| PassedFd { fd: 2, name: None }),
        };
        let body = serde_json::json!(request).to_string();
        let mut files = vec![state.as_fd(), memory.as_fd()];
        files.extend(pagemap.as_ref().map(AsFd::as_fd));
        self.ask("PATCH", "/vm", r#"{"state":"Paused"}"#, &[])?;
        let created = self.ask("PUT", "/snapshot/create", &body, &files);
        if goes_on {
            self.ask("PATCH", "/vm", r#"{"state":"Resumed"}"#, &[])?;
        }
        created?;
        // A monitor that was taken over may have written anything: it is no snapshot then.
        let (header, raw) = snapshot::read(&state).map_err(TakeError::Unfit)?;
        snapshot::check_memory(&header, memory).map_err(TakeError::Unfit)?;
        Ok((header, raw.into_bytes()))
    }

    /// Asks the monitor and serves everything else until it has answered.
    pub(super) fn ask(
        &mut self,
        method: &str,
        path: &str,
        body: &str,
        files: &[BorrowedFd<'_>],
    ) -> Result<(), TakeError> {
        let client = self.client.as_mut().ok_or(TakeError::Ending)?;
        let sent = client.send(method, path, body, files);
        sent.map_err(|error| TakeError::NoAnswer(message(&error)))?;
        self.progress.question = Some(Question::Snapshot);
        loop {
            if let Some(answer) = self.progress.snapshots.answer.take() {
                return match answer.is_success() {
                    true => Ok(()),
                    false => Err(TakeError::Refused(answer.fault())),
                };
            }
            // The connection may be gone.
            if self.is_ending() || self.progress.question.is_none() || self.serve() {
                return Err(TakeError::Ending);
            }
        }
    }
}
