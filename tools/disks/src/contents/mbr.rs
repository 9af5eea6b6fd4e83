//! The partition table of a PC's first sector, with the chain of logical partitions.

use std::fs::File;
use std::io;

use super::Partition;
use crate::bytes::{self, has, le32};

const SECTOR: u64 = 512;
const ENTRIES: usize = 446;
/// A chain that is longer is one that was made to be.
const LOGICAL_MAX: u32 = 64;

/// Type, first sector, sectors.
type Entry = (u8, u64, u64);

/// The four entries; none where the sector is no partition table.
fn entries(sector: &[u8]) -> Option<Vec<Entry>> {
    if sector.len() < 512 || !has(sector, 510, &[0x55, 0xaa]) {
        return None;
    }
    let entry = |index: usize| {
        let at = ENTRIES + index * 16;
        let is_valid = matches!(sector.get(at)?, 0 | 0x80);
        let first = u64::from(le32(sector, at + 8)?);
        let count = u64::from(le32(sector, at + 12)?);
        is_valid.then_some((*sector.get(at + 4)?, first, count))
    };
    (0..4).map(entry).collect()
}

fn is_extended(kind: u8) -> bool {
    matches!(kind, 0x05 | 0x0f | 0x85)
}

pub fn read(file: &File, len: u64) -> io::Result<Vec<Partition>> {
    let Some(table) = entries(&bytes::read(file, 0, 512)?) else {
        return Ok(Vec::new());
    };
    let is_there = |&(kind, first, count): &Entry| kind != 0 && first != 0 && count != 0;
    // A boot sector of something else may end in the same two bytes.
    if table
        .iter()
        .any(|entry| is_there(entry) && entry.1.saturating_mul(SECTOR) >= len)
    {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for (entry, number) in table.iter().zip(1..) {
        if is_there(entry) && !is_extended(entry.0) {
            found.push(partition(number, entry.1, entry.2));
        }
    }
    if let Some(&(_, first, _)) = table
        .iter()
        .find(|entry| is_there(entry) && is_extended(entry.0))
    {
        logical(file, first, &mut found)?;
    }
    Ok(found)
}

/// Partitions 5 and up: each has a table of its own, which leads to the next.
fn logical(file: &File, extended: u64, found: &mut Vec<Partition>) -> io::Result<()> {
    let mut at = extended;
    for number in 5..5 + LOGICAL_MAX {
        let sector = bytes::read(file, at.saturating_mul(SECTOR), 512)?;
        let Some(table) = entries(&sector) else { break };
        let (kind, first, count) = table[0];
        if kind != 0 && count != 0 {
            found.push(partition(number, at.saturating_add(first), count));
        }
        let (kind, next, _) = table[1];
        if !is_extended(kind) || next == 0 {
            break;
        }
        at = extended.saturating_add(next);
    }
    Ok(())
}

fn partition(number: u32, first: u64, count: u64) -> Partition {
    Partition {
        number,
        start: first.saturating_mul(SECTOR),
        len: count.saturating_mul(SECTOR),
        name: String::new(),
        content: None,
    }
}
