//! Space of an earlier generation, given back beside the work on the present one.

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use super::storage::Storage;

/// Bytes given back at once: a reset that waits for the lock waits for no more.
const STEP: u64 = 64 << 20;

/// Where the data region in use begins. A thread that gives space back holds the lock for a step and looks
/// before it; a reset changes it.
pub(super) type InUse = Arc<Mutex<u64>>;

/// The data region of an earlier generation. It gives its space back when it is dropped, which may wait for
/// the file: drop it where that does no harm.
pub struct Stale<S: Storage> {
    pub(super) file: Arc<S>,
    pub(super) region: Range<u64>,
    pub(super) in_use: InUse,
    /// The header must last before the space is given back: otherwise an end of the host might bring the
    /// earlier generation back, with holes.
    pub(super) is_ordered: bool,
}

impl<S: Storage> Stale<S> {
    /// Gives space back, until all is done or the region is in use again.
    fn give_back(&self) -> io::Result<()> {
        if self.is_ordered {
            self.file.sync_all()?;
        }
        let mut rest = self.region.clone();
        while let Some(data) = self.file.next_data(rest.clone())? {
            let end = data.start.saturating_add(STEP).min(data.end);
            let in_use = self.in_use.lock().unwrap_or_else(PoisonError::into_inner);
            if *in_use == self.region.start {
                break;
            }
            self.file.punch(data.start..end)?;
            drop(in_use);
            rest.start = end;
        }
        Ok(())
    }
}

impl<S: Storage> Drop for Stale<S> {
    fn drop(&mut self) {
        // What is not given back now is found when the overlay is opened the next time.
        let _ = self.give_back();
    }
}

impl<S: Storage> fmt::Debug for Stale<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Stale").field(&self.region).finish()
    }
}
