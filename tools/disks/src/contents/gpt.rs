//! GUID partition tables (UEFI specification, chapter 5): a header and entries at the begin, and a
//! backup of both at the end. A disk that grew on its way, or lost its last sectors, has the backup
//! in the wrong place; [`Gpt::mend`] writes both anew where they belong.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crc32fast::hash as crc32;

use super::Partition;
use crate::bytes::{self, has, le32, le64};
use crate::failure::{Context, Failure, Result};

const SECTOR: u64 = 512;
/// Entries have 128 bytes, of which Linux takes any power of two; tables have 128 entries.
const ENTRIES_MAX: u64 = 1 << 20;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    Good,
    /// The backup is valid, at this sector, which is not the last one.
    BackupMisplaced(u64),
    /// There is no valid backup.
    BackupMissing,
    /// Only the backup is valid.
    PrimaryDamaged,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            State::Good => f.write_str("good"),
            State::BackupMisplaced(at) => {
                write!(f, "its backup is at sector {at} and not at the disk's end")
            }
            State::BackupMissing => f.write_str("its backup is missing"),
            State::PrimaryDamaged => f.write_str("only its backup is valid"),
        }
    }
}

#[derive(Debug)]
pub struct Gpt {
    header: Vec<u8>,
    entries: Vec<u8>,
    entry_size: usize,
    last_sector: u64,
    pub state: State,
}

/// Header, entries, and the size of an entry.
type Half = (Vec<u8>, Vec<u8>, usize);

/// A valid header and its entries at a sector.
fn table(file: &File, at: u64) -> io::Result<Option<Half>> {
    let header = bytes::read(file, at.saturating_mul(SECTOR), SECTOR as usize)?;
    let number = |at| le32(&header, at).unwrap_or(0);
    let size = number(12) as usize;
    if !has(&header, 0, b"EFI PART") || !(92..=512).contains(&size) || header.len() < 512 {
        return Ok(None);
    }
    let mut checked = header.clone();
    checked.truncate(size);
    checked[16..20].fill(0);
    if crc32(&checked) != number(16) || le64(&header, 24) != Some(at) {
        return Ok(None);
    }
    let (count, entry_size) = (u64::from(number(80)), u64::from(number(84)));
    let len = count.saturating_mul(entry_size);
    if entry_size < 128 || !entry_size.is_power_of_two() || len > ENTRIES_MAX {
        return Ok(None);
    }
    let place = le64(&header, 72).unwrap_or(0).saturating_mul(SECTOR);
    let entries = bytes::read(file, place, len as usize)?;
    if entries.len() as u64 != len || crc32(&entries) != number(88) {
        return Ok(None);
    }
    Ok(Some((header, entries, entry_size as usize)))
}

impl Gpt {
    /// The table of a disk of `len` bytes, if it has one that is valid.
    pub fn read(file: &File, len: u64) -> io::Result<Option<Gpt>> {
        let last_sector = (len / SECTOR).saturating_sub(1);
        if last_sector < 4 {
            return Ok(None);
        }
        let primary = table(file, 1)?;
        let at_end = table(file, last_sector)?;
        let (state, (header, entries, entry_size)) = match (primary, at_end) {
            (Some(primary), at_end) => {
                let place = le64(&primary.0, 32).unwrap_or(0);
                let state = if place == last_sector && at_end.is_some() {
                    State::Good
                } else if place > 1 && table(file, place)?.is_some() {
                    State::BackupMisplaced(place)
                } else {
                    State::BackupMissing
                };
                (state, primary)
            }
            (None, Some(backup)) => (State::PrimaryDamaged, backup),
            (None, None) => return Ok(None),
        };
        Ok(Some(Gpt {
            header,
            entries,
            entry_size,
            last_sector,
            state,
        }))
    }

    pub fn partitions(&self) -> Vec<Partition> {
        let used = |entry: &[u8]| entry.iter().take(16).any(|&byte| byte != 0);
        let entries = self.entries.chunks(self.entry_size).zip(1..);
        entries
            .filter(|(entry, _)| used(entry))
            .filter_map(|(entry, number)| {
                let (first, last) = (le64(entry, 32)?, le64(entry, 40)?);
                let count = last.checked_sub(first)?.checked_add(1)?;
                let units = entry.get(56..128)?.chunks(2);
                let units: Vec<u16> = units
                    .map(|pair| u16::from_le_bytes([pair[0], pair[1]]))
                    .take_while(|&unit| unit != 0)
                    .collect();
                Some(Partition {
                    number,
                    start: first.saturating_mul(SECTOR),
                    len: count.saturating_mul(SECTOR),
                    name: crate::failure::clean(&String::from_utf16_lossy(&units)),
                    content: None,
                })
            })
            .collect()
    }

    /// Writes the table and its backup where they belong on this disk.
    pub fn mend(&self, file: &File, path: &Path) -> Result<()> {
        let sectors = (self.entries.len() as u64).div_ceil(SECTOR);
        let last_usable = self.last_sector.saturating_sub(sectors + 1);
        let behind = |it: &Partition| it.start.saturating_add(it.len) > (last_usable + 1) * SECTOR;
        if let Some(partition) = self.partitions().iter().find(|it| behind(it)) {
            return Err(Failure::new(
                path,
                format!(
                    "cannot mend its GPT: partition {} reaches the disk's end",
                    partition.number
                ),
                "leave out --mend-gpt; Linux reads the disk as it is",
            ));
        }
        let first_usable = le64(&self.header, 40).unwrap_or(0);
        let copy = |own: u64, other: u64, entries: u64| {
            let mut header = self.header.clone();
            let size = le32(&header, 12).unwrap_or(92) as usize;
            header[24..32].copy_from_slice(&own.to_le_bytes());
            header[32..40].copy_from_slice(&other.to_le_bytes());
            header[48..56].copy_from_slice(&last_usable.to_le_bytes());
            header[72..80].copy_from_slice(&entries.to_le_bytes());
            header[16..20].fill(0);
            let sum = crc32(&header[..size]);
            header[16..20].copy_from_slice(&sum.to_le_bytes());
            header
        };
        // Both tables, each with its header, and a sector of the MBR.
        if self.last_sector < 2 * (sectors + 1) {
            return Err(Failure::new(
                path,
                "cannot mend its GPT: the disk has no room for two of its tables",
                "leave out --mend-gpt",
            ));
        }
        if first_usable < 2 + sectors {
            return Err(Failure::new(
                path,
                "cannot mend its GPT: the entries are not at sector 2",
                "leave out --mend-gpt",
            ));
        }
        let backup_entries = self.last_sector - sectors;
        let write = |bytes: &[u8], sector: u64| {
            file.write_all_at(bytes, sector * SECTOR)
                .cannot("write", path)
        };
        write(&self.entries, backup_entries)?;
        write(&copy(self.last_sector, 1, backup_entries), self.last_sector)?;
        write(&self.entries, 2)?;
        write(&copy(1, self.last_sector, 2), 1)?;
        self.mend_protective(file, path)
    }

    /// The MBR that keeps other systems away covers the whole disk.
    fn mend_protective(&self, file: &File, path: &Path) -> Result<()> {
        let mut sector = bytes::read(file, 0, 512).cannot("read", path)?;
        if sector.len() < 512 || !has(&sector, 510, &[0x55, 0xaa]) {
            return Ok(());
        }
        let entry = (0..4)
            .map(|index| 446 + index * 16)
            .find(|&at| sector[at + 4] == 0xee);
        if let Some(at) = entry {
            let first = u64::from(le32(&sector, at + 8).unwrap_or(1));
            let count = (self.last_sector + 1)
                .saturating_sub(first)
                .min(u64::from(u32::MAX)) as u32;
            sector[at + 12..at + 16].copy_from_slice(&count.to_le_bytes());
            file.write_all_at(&sector, 0).cannot("write", path)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc32_is_that_of_the_standard() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    }

    /// A disk of `sectors` whose table has no partition and `count` entries at sector 2, and no backup.
    fn disk(sectors: u64, count: u32) -> File {
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let file = File::from(rustix::fs::memfd_create("disk", flags).unwrap());
        file.set_len(sectors * SECTOR).unwrap();
        let mut header = [0; 512];
        header[..8].copy_from_slice(b"EFI PART");
        let entries = vec![0; count as usize * 128];
        for (at, number) in [
            (12, 92),
            (24, 1),
            (40, 1000),
            (72, 2),
            (80, count),
            (84, 128),
        ] {
            header[at..at + 4].copy_from_slice(&number.to_le_bytes());
        }
        header[88..92].copy_from_slice(&crc32(&entries).to_le_bytes());
        let sum = crc32(&header[..92]);
        header[16..20].copy_from_slice(&sum.to_le_bytes());
        file.write_all_at(&header, SECTOR).unwrap();
        file
    }

    #[test]
    fn table_is_mended_where_there_is_room_for_two_and_refused_where_not() {
        for (sectors, count, has_room) in [
            (8, 8, true),
            (8, 12, false),
            (8, 20, false),
            (8, 24, false),
            (4096, 128, true),
        ] {
            let file = disk(sectors, count);
            let len = sectors * SECTOR;
            let found = Gpt::read(&file, len).unwrap().unwrap();
            assert_eq!(found.state, State::BackupMissing);
            let mended = found.mend(&file, Path::new("disk"));
            assert_eq!(mended.is_ok(), has_room, "{sectors} {count}");
            let again = Gpt::read(&file, len).unwrap().unwrap();
            assert_eq!(again.state == State::Good, has_room);
        }
    }
}
