//! Which file is mapped where, readable from a signal handler.
//!
//! When a mapped kernel or initrd is cut short under a running guest, the host answers the next
//! touch with SIGBUS and an address. [`file_at`] turns that address into the file's name with
//! atomic loads only: no lock, no allocation.
#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use std::ops::Range;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

/// Bytes kept of a file's name: its end, where paths differ.
pub(super) const NAME_MAX: usize = 192;

/// Ranges that can be on record at a time. A kernel has some five, an initrd one; what does not
/// fit is mapped all the same, and only goes unnamed.
const SLOTS: usize = 24;

struct Slot {
    /// First address; [`FREE`] or [`TAKEN`] while there is nothing to read.
    first: AtomicUsize,
    end: AtomicUsize,
    len: AtomicUsize,
    name: [AtomicU8; NAME_MAX],
}

const FREE: usize = 0;
const TAKEN: usize = 1;

static TABLE: [Slot; SLOTS] = [const {
    Slot {
        first: AtomicUsize::new(FREE),
        end: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        name: [const { AtomicU8::new(0) }; NAME_MAX],
    }
}; SLOTS];

/// Keeps a range on record; dropping it takes the range off.
#[derive(Debug)]
pub(super) struct Record(usize);

impl Drop for Record {
    fn drop(&mut self) {
        if let Some(slot) = TABLE.get(self.0) {
            slot.first.store(FREE, Ordering::Release);
        }
    }
}

/// Puts `range` of this process's addresses on record as mapped from the file `name`.
/// `None` when the table is full.
pub(super) fn record(range: Range<usize>, name: &str) -> Option<Record> {
    let (index, slot) = TABLE.iter().enumerate().find(|(_, slot)| {
        slot.first
            .compare_exchange(FREE, TAKEN, Ordering::Acquire, Ordering::Relaxed)
            .is_ok()
    })?;
    let skip = name.len().saturating_sub(NAME_MAX);
    let mut len: usize = 0;
    for (to, from) in slot.name.iter().zip(name.bytes().skip(skip)) {
        to.store(from, Ordering::Relaxed);
        len = len.saturating_add(1);
    }
    slot.len.store(len, Ordering::Relaxed);
    slot.end.store(range.end, Ordering::Relaxed);
    slot.first.store(range.start, Ordering::Release);
    Some(Record(index))
}

/// The name of the file that is mapped at `address`, as bytes in `name`; the result says how
/// many. Safe to call from a signal handler.
pub(super) fn file_at(address: usize, name: &mut [u8; NAME_MAX]) -> Option<usize> {
    for slot in &TABLE {
        let first = slot.first.load(Ordering::Acquire);
        if first == FREE || first == TAKEN {
            continue;
        }
        if address < first || address >= slot.end.load(Ordering::Relaxed) {
            continue;
        }
        for (to, from) in name.iter_mut().zip(&slot.name) {
            *to = from.load(Ordering::Relaxed);
        }
        return Some(slot.len.load(Ordering::Relaxed).min(NAME_MAX));
    }
    None
}

/// Says which file is mapped at `address`. Runs in a signal handler.
pub fn name_changed_file(address: usize, say: &mut dyn FnMut(&str)) {
    let mut name = [0; NAME_MAX];
    let len = file_at(address, &mut name).unwrap_or(0);
    if let Some(Ok(name)) = name
        .get(..len)
        .filter(|n| !n.is_empty())
        .map(std::str::from_utf8)
    {
        say(": `");
        say(name);
        say("` was cut short; replace such a file by rename");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Addresses that no real mapping of another test can have.
    const BASE: usize = 0xffff_8000_0000_0000;

    fn name_at(address: usize) -> Option<String> {
        let mut name = [0; NAME_MAX];
        let len = file_at(address, &mut name)?;
        Some(String::from_utf8(name[..len].to_vec()).unwrap())
    }

    #[test]
    fn file_at_when_range_is_on_record_names_it_until_dropped() {
        let one = record(BASE..BASE + 0x1000, "/boot/vmlinux").unwrap();
        let two = record(BASE + 0x1000..BASE + 0x3000, "initrd").unwrap();
        assert_eq!(name_at(BASE - 1), None);
        assert_eq!(name_at(BASE).unwrap(), "/boot/vmlinux");
        assert_eq!(name_at(BASE + 0xfff).unwrap(), "/boot/vmlinux");
        assert_eq!(name_at(BASE + 0x1000).unwrap(), "initrd");
        assert_eq!(name_at(BASE + 0x3000), None);
        drop(one);
        assert_eq!(name_at(BASE), None);
        assert_eq!(name_at(BASE + 0x2fff).unwrap(), "initrd");
        drop(two);
        assert_eq!(name_at(BASE + 0x2fff), None);
    }

    #[test]
    fn record_when_name_is_long_keeps_its_end() {
        let base = BASE + 0x10_0000;
        let long = format!("/{}/vmlinux", "x".repeat(500));
        let _record = record(base..base + 1, &long).unwrap();
        let kept = name_at(base).unwrap();
        assert_eq!(kept.len(), NAME_MAX);
        assert!(long.ends_with(&kept));
    }
}
