//! File systems and the like, by the magic numbers of their superblocks.

use std::fmt;
use std::fs::File;
use std::io;

use crate::bytes::{self, has, le16, le32, text};

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileSystem {
    pub kind: &'static str,
    pub label: String,
    /// Its magic number is in the first sector, where a partition table would be.
    pub begins_at_0: bool,
    /// The size that it says, where that is looked for.
    pub size: Option<u64>,
    /// Larger than what holds it.
    pub is_cut: bool,
    /// An EROFS with compressed files.
    pub is_compressed: bool,
}

impl FileSystem {
    /// A guest's kernel could have its root here.
    pub fn may_be_root(&self) -> bool {
        [
            "ext2", "ext3", "ext4", "xfs", "btrfs", "squashfs", "erofs", "f2fs",
        ]
        .contains(&self.kind)
    }

    pub fn is_ext(&self) -> bool {
        self.kind.starts_with("ext") && self.kind != "exfat"
    }

    /// It cannot be written to.
    pub fn is_read_only(&self) -> bool {
        ["squashfs", "erofs", "iso9660"].contains(&self.kind)
    }
}

impl fmt::Display for FileSystem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind)?;
        if !self.label.is_empty() {
            write!(f, " {:?}", self.label)?;
        }
        if self.is_cut {
            let size = bytes::size(self.size.unwrap_or(0));
            write!(f, " (of {size}, which is more than there is: truncated)")?;
        }
        Ok(())
    }
}

/// What is looked for: name, offset and bytes of the magic number, offset and length of a label.
type Row = (&'static str, usize, &'static [u8], usize, usize);

/// The first that fits counts.
const MAGIC: &[Row] = &[
    ("LUKS (encrypted)", 0, b"LUKS\xba\xbe", 0, 0),
    ("BitLocker (encrypted)", 3, b"-FVE-FS-", 0, 0),
    ("xfs", 0, b"XFSB", 108, 12),
    ("squashfs", 0, b"hsqs", 0, 0),
    ("ntfs", 3, b"NTFS    ", 0, 0),
    ("exfat", 3, b"EXFAT   ", 0, 0),
    ("vfat", 82, b"FAT32   ", 71, 11),
    ("vfat", 54, b"FAT16   ", 43, 11),
    ("vfat", 54, b"FAT12   ", 43, 11),
    ("LVM physical volume", 536, b"LVM2 001", 0, 0),
    ("LVM physical volume", 24, b"LVM2 001", 0, 0),
    ("btrfs", 0x10040, b"_BHRfS_M", 0x1012b, 255),
    ("erofs", 1024, &[0xe2, 0xe1, 0xf5, 0xe0], 1024 + 64, 16),
    ("f2fs", 1024, &[0x10, 0x20, 0xf5, 0xf2], 0, 0),
    (
        "Linux RAID member",
        4096,
        &[0xfc, 0x4e, 0x2b, 0xa9],
        4096 + 32,
        32,
    ),
    ("swap", 4086, b"SWAPSPACE2", 1052, 16),
    ("iso9660", 0x8001, b"CD001", 0x8028, 32),
];

/// All magic numbers and labels are before this.
const HEAD: usize = 0x1012b + 256;
const SUPERBLOCK: usize = 1024;

/// What is at `start`, on `len` bytes.
pub fn find(file: &File, start: u64, len: u64) -> io::Result<Option<FileSystem>> {
    let len_read = HEAD.min(usize::try_from(len).unwrap_or(HEAD));
    let head = bytes::read(file, start, len_read)?;
    let row = MAGIC
        .iter()
        .find(|(_, at, magic, ..)| has(&head, *at, magic));
    // The offset of the label is within the superblock for all but ext.
    Ok(match row {
        Some((kind, at, _, label, label_len)) => Some(FileSystem {
            kind,
            label: text(&head, *label, *label_len),
            begins_at_0: *at < 512,
            size: None,
            is_cut: false,
            is_compressed: *kind == "erofs" && is_compressed(&head),
        }),
        None => ext(&head, len),
    })
}

/// Whether an EROFS says that files are compressed: it has padding for it, or algorithms (LZ4's largest distance, in older
/// ones).
fn is_compressed(head: &[u8]) -> bool {
    let incompat = le32(head, SUPERBLOCK + 0x50);
    let algorithms = le16(head, SUPERBLOCK + 0x54);
    incompat.is_some_and(|bits| bits & 0x1 != 0) || algorithms.is_some_and(|it| it != 0)
}

/// ext2, 3 and 4 differ in their features only.
fn ext(head: &[u8], len: u64) -> Option<FileSystem> {
    let number = |at: usize| le32(head, SUPERBLOCK + at);
    if le16(head, SUPERBLOCK + 0x38)? != 0xef53 {
        return None;
    }
    let (compat, incompat, ro_compat) = (number(0x5c)?, number(0x60)?, number(0x64)?);
    // Extents, 64 bits, flexible groups; huge files, checksums of groups, many folders, large inodes, checksums.
    let is_ext4 = incompat & 0x2c0 != 0 || ro_compat & 0x478 != 0;
    let kind = match () {
        () if incompat & 0x8 != 0 => "ext journal",
        () if is_ext4 => "ext4",
        () if compat & 0x4 != 0 => "ext3",
        () => "ext2",
    };
    let high = if incompat & 0x80 != 0 {
        number(0x150)?
    } else {
        0
    };
    let blocks = u64::from(number(4)?) | u64::from(high) << 32;
    let size = 1024u64
        .checked_shl(number(0x18)?)
        .and_then(|block| blocks.checked_mul(block))?;
    Some(FileSystem {
        kind,
        label: text(head, SUPERBLOCK + 0x78, 16),
        begins_at_0: false,
        size: Some(size),
        is_cut: size > len,
        is_compressed: false,
    })
}
