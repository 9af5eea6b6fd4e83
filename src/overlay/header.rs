//! The first 512 bytes of an overlay's file: what it belongs to, and its present generation.
//!
//! ```text
//!   0    8  "mayflyOV"
//!   8    4  version, 1
//!   12   4  bytes of a unit, 4096
//!   16   8  bytes of the disk
//!   24   8  generation, from 1 on
//!   32  16  id: random, the same for copies of the file
//!   48   4  check value of samples of the base
//!   52   4  1 while a commit into the base is under way, else 0
//!   56   8  modification time of the base when the overlay was made: seconds
//!   64   4  and nanoseconds
//!   68   8  inode of that base while a commit into it is under way, else 0
//!   76      zeros
//!   508  4  CRC-32 of all before it
//! ```
//!
//! Numbers are little-endian.

use std::io;

use super::layout::{SECTOR, UNIT};
use super::storage::Storage;

const MAGIC: [u8; 8] = *b"mayflyOV";
const VERSION: u32 = 1;
const CHECK_AT: usize = 508;

/// What tells one base from another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BaseId {
    /// Bytes of the disk.
    pub size: u64,
    /// Check value of pieces of it, the first and the last among them.
    pub samples: u32,
    /// Modification time: seconds and nanoseconds. A copy has another.
    pub modified: (i64, u32),
}

/// How many pieces of a base are looked at.
const SAMPLES: u64 = 16;

impl BaseId {
    /// Of the first `size` bytes of `base`, which was modified at `modified`.
    ///
    /// # Errors
    /// The host's.
    pub fn of(base: &impl Storage, size: u64, modified: (i64, u32)) -> io::Result<Self> {
        let mut crc = crc32fast::Hasher::new();
        let mut piece = [0; UNIT as usize];
        let last = size.saturating_sub(UNIT);
        let mut sample = |at: u64| {
            let len = size.saturating_sub(at).min(UNIT) as usize;
            let piece = piece.get_mut(..len).unwrap_or_default();
            base.read_exact_at(piece, at)?;
            crc.update(piece);
            io::Result::Ok(())
        };
        let step = last.checked_div(SAMPLES).unwrap_or(0) & !(UNIT.wrapping_sub(1));
        for number in 0..SAMPLES {
            sample(number.saturating_mul(step))?;
        }
        // Where file systems have their second copies, and a partition table has its.
        for at in [0x1_0000, last] {
            sample(at.min(last))?;
        }
        Ok(BaseId {
            size,
            samples: crc.finalize(),
            modified,
        })
    }
}

/// What the first sector of the file says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The base that it belongs to.
    pub base: BaseId,
    /// Units whose sectors of the map have another are those of the base.
    pub generation: u64,
    /// Random; copies of the file have the same.
    pub id: [u8; 16],
    /// A commit into the base is under way: the base, by its inode, is a mixture until it has ended.
    pub committing: Option<u64>,
}

/// Why the first bytes of a file are no header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BadHeader {
    /// It is another file.
    Magic,
    /// It was made by another version of the program.
    Version(u32),
    /// It was altered.
    Damaged,
}

impl Header {
    /// As it is in the file.
    pub(super) fn encode(&self) -> [u8; SECTOR] {
        let mut bytes = [0; SECTOR];
        let (seconds, nanos) = self.base.modified;
        for (at, field) in [
            (0, &MAGIC[..]),
            (8, &VERSION.to_le_bytes()),
            (12, &(UNIT as u32).to_le_bytes()),
            (16, &self.base.size.to_le_bytes()),
            (24, &self.generation.to_le_bytes()),
            (32, &self.id),
            (48, &self.base.samples.to_le_bytes()),
            (52, &u32::from(self.committing.is_some()).to_le_bytes()),
            (56, &seconds.to_le_bytes()),
            (64, &nanos.to_le_bytes()),
            (68, &self.committing.unwrap_or(0).to_le_bytes()),
        ] {
            put(&mut bytes, at, field);
        }
        let check = crc32fast::hash(bytes.get(..CHECK_AT).unwrap_or_default());
        put(&mut bytes, CHECK_AT, &check.to_le_bytes());
        bytes
    }

    /// Reads it.
    pub(super) fn decode(bytes: &[u8; SECTOR]) -> Result<Self, BadHeader> {
        if get::<8>(bytes, 0) != MAGIC {
            return Err(BadHeader::Magic);
        }
        let version = u32::from_le_bytes(get(bytes, 8));
        if version != VERSION {
            return Err(BadHeader::Version(version));
        }
        let check = crc32fast::hash(bytes.get(..CHECK_AT).unwrap_or_default());
        let generation = u64::from_le_bytes(get(bytes, 24));
        // The highest is left out: there is always a next one.
        if check != u32::from_le_bytes(get(bytes, CHECK_AT))
            || u64::from(u32::from_le_bytes(get(bytes, 12))) != UNIT
            || generation == 0
            || generation == u64::MAX
        {
            return Err(BadHeader::Damaged);
        }
        Ok(Header {
            base: BaseId {
                size: u64::from_le_bytes(get(bytes, 16)),
                samples: u32::from_le_bytes(get(bytes, 48)),
                modified: (
                    i64::from_le_bytes(get(bytes, 56)),
                    u32::from_le_bytes(get(bytes, 64)),
                ),
            },
            generation,
            id: get(bytes, 32),
            committing: match u32::from_le_bytes(get(bytes, 52)) {
                0 => None,
                _ => Some(u64::from_le_bytes(get(bytes, 68))),
            },
        })
    }
}

fn put(bytes: &mut [u8], at: usize, field: &[u8]) {
    for (to, from) in bytes.iter_mut().skip(at).zip(field) {
        *to = *from;
    }
}

fn get<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let rest = bytes.get(at..).unwrap_or_default();
    rest.first_chunk().copied().unwrap_or([0; N])
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: Header = Header {
        base: BaseId {
            size: 4608,
            samples: 0x1234_5678,
            modified: (-5, 999_999_999),
        },
        generation: 77,
        id: *b"0123456789abcdef",
        committing: Some(77),
    };

    #[test]
    fn header_when_written_is_read_back() {
        assert_eq!(Header::decode(&HEADER.encode()), Ok(HEADER));
    }

    #[test]
    fn header_when_altered_anywhere_is_refused() {
        let bytes = HEADER.encode();
        for at in 0..SECTOR {
            let mut altered = bytes;
            altered[at] ^= 4;
            let expected = match at {
                0..8 => BadHeader::Magic,
                8 => BadHeader::Version(5),
                9..12 => BadHeader::Version(1 + (4 << (8 * (at - 8)))),
                _ => BadHeader::Damaged,
            };
            assert_eq!(Header::decode(&altered), Err(expected), "{at}");
        }
        for generation in [0, u64::MAX] {
            let header = Header {
                generation,
                ..HEADER
            };
            assert_eq!(Header::decode(&header.encode()), Err(BadHeader::Damaged));
        }
    }

    #[test]
    fn base_when_changed_at_its_ends_or_of_another_size_has_another_id() {
        for size in [512u64, 4096, 5120, 1 << 20, (1 << 20) + 512] {
            let mut bytes: Vec<u8> = (0..size).map(|at| (at % 251) as u8).collect();
            let id = |bytes: &Vec<u8>| BaseId::of(bytes, size, (0, 0)).unwrap();
            let before = id(&bytes);
            assert_eq!(before, id(&bytes));
            for at in [0, 1100, 0x1_0000, size as usize - 1] {
                if at < bytes.len() {
                    bytes[at] ^= 1;
                    assert_ne!(id(&bytes), before, "{size} {at}");
                    bytes[at] ^= 1;
                }
            }
        }
        assert!(BaseId::of(&vec![0; 100], 512, (0, 0)).is_err());
    }
}
