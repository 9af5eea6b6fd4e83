//! Output on its way from the guest to the serial thread.
//!
//! A bounded ring between one writer at a time (the vCPU that holds the UART's mutex) and one
//! reader (the serial thread), without a lock between the two. A byte costs the writer no system
//! call, but for one that the reader sleeps for ([`Wake`]): then [`Ring::push`] asks for a wake-up.

use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering, fence};

use crate::sys::zeroed;

/// Bytes in the ring: what a guest may write before the serial thread comes round to it.
pub const SIZE: usize = 64 * 1024;
/// So many bytes wake the reader whatever else it waits for.
pub const HALF: usize = SIZE / 2;

const _: () = assert!(SIZE.is_power_of_two());

/// What the reader is to be woken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Wake {
    /// Nothing: it does not wait, or has no room.
    Never = 0,
    /// Half a ring of bytes.
    Half = 1,
    /// The end of a line, or that.
    Line = 2,
    /// Any byte.
    Any = 3,
}

impl Wake {
    /// Whether the reader is woken by `byte`, the last of `len`.
    const fn is_for(wake: u8, byte: u8, len: usize) -> bool {
        const ANY: u8 = Wake::Any as u8;
        const LINE: u8 = Wake::Line as u8;
        const NEVER: u8 = Wake::Never as u8;
        match wake {
            NEVER => false,
            ANY => true,
            LINE => byte == b'\n' || len >= HALF,
            _ => len >= HALF,
        }
    }
}

/// What became of a byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pushed {
    /// There was no room.
    Lost,
    /// It is in the ring.
    Kept,
    /// It is in the ring, and the reader is to be woken.
    KeptWake,
}

/// The ring.
#[derive(Debug)]
pub struct Ring {
    bytes: &'static [AtomicU8],
    /// Bytes ever put in: written by the writer.
    put: AtomicUsize,
    /// Bytes ever taken out: written by the reader.
    taken: AtomicUsize,
    /// A [`Wake`].
    wake: AtomicU8,
}

impl Ring {
    pub fn new() -> Self {
        Ring {
            // Pages that are never used cost nothing.
            bytes: zeroed::atomic_bytes(SIZE),
            put: AtomicUsize::new(0),
            taken: AtomicUsize::new(0),
            wake: AtomicU8::new(Wake::Never as u8),
        }
    }

    fn slot(&self, position: usize) -> Option<&AtomicU8> {
        self.bytes.get(position & SIZE.wrapping_sub(1))
    }

    /// Puts `byte` in. One thread at a time.
    pub fn push(&self, byte: u8) -> Pushed {
        let put = self.put.load(Ordering::Relaxed);
        let len = put.wrapping_sub(self.taken.load(Ordering::Acquire));
        let Some(slot) = self.slot(put).filter(|_| len < SIZE) else {
            return Pushed::Lost;
        };
        slot.store(byte, Ordering::Relaxed);
        self.put.store(put.wrapping_add(1), Ordering::Release);
        // Either this sees that the reader waits, or the reader sees the byte before it does.
        fence(Ordering::SeqCst);
        let wake = self.wake.load(Ordering::Relaxed);
        if !Wake::is_for(wake, byte, len.wrapping_add(1)) {
            return Pushed::Kept;
        }
        self.wake.store(Wake::Never as u8, Ordering::Relaxed);
        Pushed::KeptWake
    }

    /// Bytes ever put in, as a mark of how far the writer is. For the reader.
    pub fn mark(&self) -> usize {
        self.put.load(Ordering::Acquire)
    }

    /// Bytes in it. For the reader.
    pub fn len(&self) -> usize {
        self.mark().wrapping_sub(self.taken.load(Ordering::Relaxed))
    }

    /// Whether the last byte put in ends a line. For the reader.
    pub fn ends_line(&self) -> bool {
        let last = self.slot(self.mark().wrapping_sub(1));
        self.len() > 0 && last.is_some_and(|slot| slot.load(Ordering::Relaxed) == b'\n')
    }

    /// Says what the reader is about to wait for. It may not when this is false: something came
    /// after `mark` was taken.
    pub fn waits_for(&self, wake: Wake, mark: usize) -> bool {
        self.wake.store(wake as u8, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        wake == Wake::Never || self.put.load(Ordering::Acquire) == mark
    }

    /// Moves bytes to `into`; how many. For the reader.
    pub fn take(&self, into: &mut [u8]) -> usize {
        let taken = self.taken.load(Ordering::Relaxed);
        let count = self.len().min(into.len());
        for (offset, byte) in into.iter_mut().take(count).enumerate() {
            if let Some(slot) = self.slot(taken.wrapping_add(offset)) {
                *byte = slot.load(Ordering::Relaxed);
            }
        }
        self.taken
            .store(taken.wrapping_add(count), Ordering::Release);
        count
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::thread;

    #[test]
    fn full_ring_loses_what_comes_and_keeps_what_is_there() {
        let ring = Ring::new();
        for n in 0..SIZE {
            assert_eq!(ring.push(n as u8), Pushed::Kept);
        }
        assert_eq!(ring.push(0), Pushed::Lost);
        let mut bytes = vec![0; SIZE];
        assert_eq!(ring.take(&mut bytes[..10]), 10);
        assert_eq!(ring.push(7), Pushed::Kept);
        assert_eq!(ring.len(), SIZE - 9);
        assert_eq!(ring.take(&mut bytes), SIZE - 9);
        assert_eq!((bytes[0], bytes[SIZE - 10]), (10, 7));
        assert_eq!(ring.take(&mut bytes), 0);
    }

    #[test]
    fn reader_is_woken_once_for_what_it_waits_for() {
        let ring = Ring::new();
        let wakes = |bytes: &[u8]| -> Vec<bool> {
            let pushed = bytes.iter().map(|byte| ring.push(*byte));
            pushed.map(|pushed| pushed == Pushed::KeptWake).collect()
        };
        assert_eq!(wakes(b"a\n"), [false, false]);
        assert!(ring.waits_for(Wake::Any, ring.mark()));
        assert_eq!(wakes(b"ab"), [true, false]);
        assert!(ring.waits_for(Wake::Line, ring.mark()));
        assert_eq!(wakes(b"c\nd\n"), [false, true, false, false]);
        assert!(ring.ends_line());
        assert!(ring.waits_for(Wake::Half, ring.mark()));
        let more = vec![b'\n'; HALF];
        let woken = wakes(&more);
        assert_eq!(woken.iter().filter(|woken| **woken).count(), 1);
        assert!(woken[HALF - 8 - 1]);
        assert!(ring.waits_for(Wake::Never, ring.mark()));
        assert_eq!(wakes(b"x\n"), [false, false]);
    }

    #[test]
    fn reader_does_not_wait_when_something_came_meanwhile() {
        let ring = Ring::new();
        let mark = ring.mark();
        ring.push(b'x');
        assert!(!ring.waits_for(Wake::Any, mark));
        assert!(!ring.waits_for(Wake::Line, mark));
        assert!(ring.waits_for(Wake::Never, mark));
        assert!(!ring.ends_line());
    }

    #[test]
    fn bytes_arrive_in_order_and_no_wake_up_is_missed() {
        const COUNT: usize = 3_000_000;
        let ring = Arc::new(Ring::new());
        let writers = Arc::clone(&ring);
        let reader = thread::current();
        let writer = thread::spawn(move || {
            for n in 0..COUNT {
                loop {
                    match writers.push((n % 251) as u8) {
                        Pushed::Lost => thread::yield_now(),
                        Pushed::Kept => break,
                        Pushed::KeptWake => {
                            reader.unpark();
                            break;
                        }
                    }
                }
            }
        });
        let mut next = 0;
        let mut bytes = [0; 1000];
        while next < COUNT {
            let mark = ring.mark();
            let count = ring.take(&mut bytes);
            for byte in &bytes[..count] {
                assert_eq!(*byte, (next % 251) as u8);
                next += 1;
            }
            // A wake-up that is missed leaves this waiting for ever.
            if count == 0 && ring.waits_for(Wake::Any, mark) {
                thread::park();
            }
        }
        writer.join().unwrap();
    }
}
