//! How far one call of the worker's goes.

use std::time::Instant;

use crate::virtio::Progress;

/// Frames that are passed on before the worker looks at its messages and at its other queue, and before
/// the driver is interrupted.
const FRAMES: u32 = 32;
/// Their bytes, more or less: a batch of large frames takes no longer than one of small ones.
const BYTES: u64 = 128 << 10;

/// One batch of frames, and what has come of it.
pub(super) struct Batch {
    steps_left: u32,
    /// Frames passed on.
    pub frames: u64,
    /// Bytes of these, headers not counted.
    pub bytes: u64,
    /// Used entries were written that the driver does not see yet.
    pub is_staged: bool,
    /// When the first frame was passed on.
    pub since: Option<Instant>,
}

impl Batch {
    pub fn new() -> Self {
        Batch {
            steps_left: FRAMES,
            frames: 0,
            bytes: 0,
            is_staged: false,
            since: None,
        }
    }

    /// Whether there may be another step.
    pub fn goes_on(&self) -> bool {
        self.steps_left > 0 && self.bytes < BYTES
    }

    /// A chain of the driver's was done with.
    pub fn step(&mut self) {
        self.steps_left = self.steps_left.saturating_sub(1);
        self.is_staged = true;
    }

    /// A frame with a payload of `bytes` was passed on.
    pub fn add(&mut self, bytes: u64) {
        self.frames = self.frames.saturating_add(1);
        self.bytes = self.bytes.saturating_add(bytes);
    }

    /// What to tell the worker when there is nothing left to do.
    pub fn progress(&self) -> Progress {
        if self.steps_left < FRAMES {
            Progress::More
        } else {
            Progress::Wait
        }
    }
}
