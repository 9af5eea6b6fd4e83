//! From an address the guest used to the register block that answers.
//!
//! A [`Bus`] is built once by control and read-only afterwards, so vCPU threads share it without
//! a lock. It owns no device: a [`Registers`] implementation is whatever part of a device vCPUs
//! may touch, and it guards itself. There is one bus for memory-mapped addresses and one for ports.
//!
//! Any access gets a defined answer: nothing at the address reads as all ones and swallows
//! writes, and an access that crosses the end of a block is treated as nothing there.
#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use std::fmt;
use std::sync::Arc;

use crate::sys::sync::atomic::{AtomicU64, Ordering};
use crate::sys::sync::thread::{self, Thread};

/// The part of a device that vCPUs touch, at offsets from the start of its block.
///
/// Both calls must return promptly, whatever the guest wrote and however long `data` is
/// (1 to 8 bytes from KVM, more if a string instruction is split); waiting is asked for through
/// [`Written::After`].
pub trait Registers: Send + Sync {
    /// Fills all of `data`.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Takes all of `data`, and says when the guest may go on.
    fn write(&self, offset: u64, data: &[u8]) -> Written;
}

/// What a write asks of the vCPU that made it.
#[derive(Debug)]
#[must_use]
pub enum Written {
    /// Nothing: the guest goes on.
    Done,
    /// The write is complete only when the ticket is (a virtio reset waits for I/O in flight).
    After(Ticket),
    /// The guest asked for a machine reset: it does not go on at all.
    MachineReset,
    /// The guest switched the machine off: it does not go on at all.
    PowerOff,
}

/// Where the tickets of one register block come from. Each of the threads that complete them does so in
/// their order. Issuing and completing allocate and free nothing.
#[derive(Debug)]
pub struct Tickets {
    issued: u64,
    /// The last number that each of those threads has completed.
    completed: Arc<[AtomicU64]>,
}

impl Default for Tickets {
    /// Tickets that one thread completes.
    fn default() -> Self {
        Tickets::completed_by(1)
    }
}

/// The waiting half of a write that another thread completes.
///
/// The vCPU parks until [`Ticket::is_done`] or until it has a message of its own.
#[derive(Clone, Debug)]
pub struct Ticket {
    number: u64,
    completed: Arc<[AtomicU64]>,
}

/// The completing half. Completed when dropped, so that a worker that ends cannot leave a vCPU
/// waiting for ever.
#[derive(Debug)]
pub struct Completer {
    number: u64,
    completed: Arc<[AtomicU64]>,
    /// Which of the threads that complete tickets has it.
    thread: usize,
    waiter: Thread,
}

impl Tickets {
    /// Tickets that are done when each of `threads` threads has completed them.
    pub fn completed_by(threads: usize) -> Self {
        Tickets {
            issued: 0,
            completed: (0..threads).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// A ticket for the calling thread, and what completes it, for each thread that has to.
    pub fn issue(&mut self) -> (Ticket, impl Iterator<Item = Completer> + use<>) {
        self.issued = self.issued.saturating_add(1);
        let number = self.issued;
        let completed = Arc::clone(&self.completed);
        let ticket = Ticket { number, completed };
        let completed = Arc::clone(&self.completed);
        let waiter = thread::current();
        let completers = (0..completed.len()).map(move |thread| Completer {
            number,
            completed: Arc::clone(&completed),
            thread,
            waiter: waiter.clone(),
        });
        (ticket, completers)
    }
}

impl Ticket {
    /// Whether the guest may go on.
    pub fn is_done(&self) -> bool {
        let mut completed = self.completed.iter();
        completed.all(|last| last.load(Ordering::Acquire) >= self.number)
    }
}

impl Drop for Completer {
    fn drop(&mut self) {
        if let Some(last) = self.completed.get(self.thread) {
            last.fetch_max(self.number, Ordering::AcqRel);
        }
        self.waiter.unpark();
    }
}

struct Range {
    first: u64,
    /// Inclusive, so that a block may end at the top of the address space.
    last: u64,
    /// Of `first` in its block, a part of which this may be.
    offset: u64,
    registers: Arc<dyn Registers>,
}

/// Address ranges and their register blocks.
#[derive(Default)]
pub struct Bus {
    /// Sorted by address, without overlap.
    ranges: Vec<Range>,
}

/// A block could not be put on the bus because the addresses are taken or make no range.
#[derive(Debug, PartialEq, Eq)]
pub struct Overlap {
    /// First address of the refused block.
    pub first: u64,
    /// Length of the refused block in bytes.
    pub len: u64,
}

impl fmt::Display for Overlap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:#x} bytes at {:#x} are not free on the bus",
            self.len, self.first
        )
    }
}

impl std::error::Error for Overlap {}

impl Bus {
    /// A bus with nothing on it.
    #[cfg(test)]
    pub fn new() -> Self {
        Bus::default()
    }

    /// Puts `registers` at `first..first + len`.
    ///
    /// # Errors
    /// [`Overlap`] when `len` is 0, the range wraps, or any of it is taken.
    pub fn insert(
        &mut self,
        first: u64,
        len: u64,
        registers: Arc<dyn Registers>,
    ) -> Result<(), Overlap> {
        self.insert_part(first, len, 0, registers)
    }

    /// Puts the part of `registers` that begins at `offset` at `first..first + len`: something else
    /// may be between the parts of a block.
    ///
    /// # Errors
    /// As for [`Bus::insert`].
    pub fn insert_part(
        &mut self,
        first: u64,
        len: u64,
        offset: u64,
        registers: Arc<dyn Registers>,
    ) -> Result<(), Overlap> {
        let refused = Overlap { first, len };
        let last = match len.checked_sub(1).and_then(|l| first.checked_add(l)) {
            Some(last) => last,
            None => return Err(refused),
        };
        let at = self.ranges.partition_point(|r| r.last < first);
        if self.ranges.get(at).is_some_and(|r| r.first <= last) {
            return Err(refused);
        }
        self.ranges.insert(
            at,
            Range {
                first,
                last,
                offset,
                registers,
            },
        );
        Ok(())
    }

    /// Answers a read of `data.len()` bytes at `address`; all ones when nothing is there.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some((range, offset)) => range.registers.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Delivers a write; it is swallowed when nothing is there.
    pub fn write(&self, address: u64, data: &[u8]) -> Written {
        match self.find(address, data.len()) {
            Some((range, offset)) => range.registers.write(offset, data),
            None => Written::Done,
        }
    }

    fn find(&self, address: u64, len: usize) -> Option<(&Range, u64)> {
        let last = address.checked_add(u64::try_from(len).ok()?.checked_sub(1)?)?;
        let at = self.ranges.partition_point(|r| r.last < address);
        let range = self.ranges.get(at)?;
        if range.first > address || last > range.last {
            return None;
        }
        let within = address.checked_sub(range.first)?;
        Some((range, range.offset.checked_add(within)?))
    }
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(self.ranges.iter().map(|r| (r.first, r.last)))
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Echo(Mutex<Vec<(u64, Vec<u8>)>>);

    impl Registers for Echo {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&self, offset: u64, data: &[u8]) -> Written {
            self.0.lock().unwrap().push((offset, data.to_vec()));
            Written::Done
        }
    }

    #[test]
    fn insert_when_ranges_touch_is_fine_and_overlap_is_refused() {
        let mut bus = Bus::new();
        bus.insert(0x1000, 0x1000, Arc::new(Echo::default()))
            .unwrap();
        bus.insert(0x2000, 0x1000, Arc::new(Echo::default()))
            .unwrap();
        bus.insert(0, 0x1000, Arc::new(Echo::default())).unwrap();
        for (first, len) in [
            (0x1fff, 1),
            (0x2fff, 2),
            (0, 0x10000),
            (5, 0),
            (u64::MAX, 2),
        ] {
            assert_eq!(
                bus.insert(first, len, Arc::new(Echo::default())),
                Err(Overlap { first, len })
            );
        }
        bus.insert(u64::MAX, 1, Arc::new(Echo::default())).unwrap();
    }

    #[test]
    fn read_when_nothing_is_there_gives_ones() {
        let mut bus = Bus::new();
        bus.insert(0x1000, 0x10, Arc::new(Echo::default())).unwrap();
        let mut data = [0u8; 4];
        for address in [0, 0xffd, 0x100d, 0x1010, u64::MAX - 1, u64::MAX] {
            data.fill(0);
            bus.read(address, &mut data);
            assert_eq!(data, [0xff; 4], "at {address:#x}");
        }
        bus.read(0x1004, &mut data);
        assert_eq!(data, [4; 4]);
    }

    #[test]
    fn write_when_it_crosses_the_end_is_swallowed() {
        let echo = Arc::new(Echo::default());
        let mut bus = Bus::new();
        bus.insert(0x1000, 0x10, echo.clone()).unwrap();
        assert!(matches!(bus.write(0x100e, &[1, 2, 3, 4]), Written::Done));
        assert!(matches!(bus.write(0x100c, &[1, 2, 3, 4]), Written::Done));
        assert!(matches!(bus.write(0x100c, &[]), Written::Done));
        assert_eq!(*echo.0.lock().unwrap(), [(0xc, vec![1, 2, 3, 4])]);
    }

    #[test]
    fn part_when_something_is_between_two_has_its_own_offset() {
        let (echo, other) = (Arc::new(Echo::default()), Arc::new(Echo::default()));
        let mut bus = Bus::new();
        bus.insert_part(0x60, 1, 0, echo.clone()).unwrap();
        bus.insert(0x61, 1, other.clone()).unwrap();
        bus.insert_part(0x64, 1, 4, echo.clone()).unwrap();
        for address in 0x60..=0x65 {
            assert!(matches!(
                bus.write(address, &[address as u8]),
                Written::Done
            ));
        }
        assert_eq!(*echo.0.lock().unwrap(), [(0, vec![0x60]), (4, vec![0x64])]);
        assert_eq!(*other.0.lock().unwrap(), [(0, vec![0x61])]);
        assert!(bus.insert_part(0x64, 1, 0, echo).is_err());
    }

    #[test]
    fn ticket_when_completer_is_dropped_is_done() {
        let mut tickets = Tickets::default();
        let (first, mut first_completer) = tickets.issue();
        let (second, mut second_completer) = tickets.issue();
        assert!(!first.is_done() && !second.is_done());
        drop(first_completer.next());
        assert!(first.is_done() && !second.is_done());
        drop(second_completer.next());
        assert!(second.is_done());
        assert!(first_completer.next().is_none());
    }

    #[test]
    fn ticket_when_several_threads_complete_it_waits_for_the_last() {
        let mut tickets = Tickets::completed_by(2);
        let (first, mut of_first) = tickets.issue();
        let (second, mut of_second) = tickets.issue();
        // One thread is ahead of the other.
        drop(of_first.next());
        drop(of_second.next());
        assert!(!first.is_done() && !second.is_done());
        drop(of_first.next());
        assert!(first.is_done() && !second.is_done());
        drop(of_second.next());
        assert!(second.is_done());
    }
}
