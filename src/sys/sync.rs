//! What threads meet by: locks, atomics, channels, parking, and the eventfd that ends a wait for descriptors.
//!
//! In the program these are the standard library's, under one name. In unit tests they are the same inside
//! wrappers (`scheduled`), which do nothing more on an ordinary thread. On a thread of a run of
//! `scheduled::explore` each of them is a place where any other thread may go on, and a wait is one that
//! the run knows of: so the real code of the parts that use this module is run in the orders that the test chooses.
//!
//! Used by all that the messages between control, workers, registers and vCPUs are made of. What is only
//! counted, and what no other thread waits for, has no need of it.

#[cfg(test)]
pub mod scheduled;

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

#[cfg(not(test))]
pub use plain::{Mutex, MutexGuard, atomic, mpsc, rang, thread, wait_for};
#[cfg(test)]
pub use scheduled::{Mutex, MutexGuard, atomic, mpsc, rang, thread, wait_for};

/// The program's.
#[cfg(not(test))]
mod plain {
    pub use std::sync::{Mutex, MutexGuard};

    pub mod atomic {
        pub use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
    }

    pub mod mpsc {
        pub use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
    }

    pub mod thread {
        pub use std::thread::{Thread, current, park};
    }

    /// Calls `wait`, which waits for descriptors for at most so many milliseconds (for ever when it is
    /// -1) and says how many were ready.
    #[inline]
    pub fn wait_for<E>(
        millis: i32,
        mut wait: impl FnMut(i32) -> Result<usize, E>,
    ) -> Result<usize, E> {
        wait(millis)
    }

    /// A descriptor that a thread may wait for has been written to.
    #[inline]
    pub const fn rang() {}
}

/// An eventfd that is written to. What waits for it, waits for its descriptor.
#[derive(Debug)]
pub struct Bell(EventFd);

impl Bell {
    /// # Errors
    /// When the host has no descriptor left.
    pub fn new() -> io::Result<Self> {
        EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map(Bell)
    }

    /// Ends the wait of the thread that waits for it, or its next one.
    pub fn ring(&self) {
        // Refused only when the counter is at 2^64 - 2: then it has not been heard yet.
        let _ = self.0.write(1);
        rang();
    }

    /// Acknowledges what was heard.
    pub fn silence(&self) {
        // Nothing to read only means that the wake-up was spurious.
        let _ = self.0.read();
    }

    /// How often it rang since it was silenced last.
    #[cfg(test)]
    pub fn count(&self) -> u64 {
        self.0.read().unwrap_or(0)
    }
}

impl From<EventFd> for Bell {
    fn from(fd: EventFd) -> Self {
        Bell(fd)
    }
}

impl AsRawFd for Bell {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
