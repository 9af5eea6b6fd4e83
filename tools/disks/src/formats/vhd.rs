//! VHD of Virtual PC and Hyper-V ("Virtual Hard Disk Image Format Specification", 1.0): a footer of
//! 512 bytes at the end; dynamic disks have a copy of it at the begin. It has the size twice, as a
//! number of bytes and as a geometry, which can say less. qemu-img believes one or the other
//! depending on its version and on who made the file; here the number of bytes counts.

use std::fs::File;
use std::path::Path;

use super::{Image, Kind, damaged, plausible, truncated};
use crate::bytes::{self, be16, be32, be64, has};
use crate::failure::{Context, Failure, Result};

const FOOTER: u64 = 512;
const CHECKSUM: usize = 64;
const FIXED: u32 = 2;
const DYNAMIC: u32 = 3;
const DIFFERENCING: u32 = 4;

pub fn open(file: &File, path: &Path) -> Result<Image> {
    let len = file.metadata().cannot("open", path)?.len();
    let head = bytes::read(file, 0, FOOTER as usize).cannot("read", path)?;
    let tail = bytes::read(file, len.saturating_sub(FOOTER), FOOTER as usize);
    let tail = tail.cannot("read", path)?;
    let at_end = has(&tail, 0, b"conectix");
    if !at_end && be32(&head, 60) == Some(FIXED) {
        return Err(damaged(path, "it begins with the footer of a fixed VHD"));
    }
    let footer = if at_end { tail } else { head };
    if footer.len() < FOOTER as usize || checksum(&footer) != be32(&footer, CHECKSUM) {
        return Err(Failure::new(
            path,
            "the checksum of its VHD footer is wrong",
            "copy it again from where it came, or give --format raw if it is no VHD",
        ));
    }
    let size = plausible(path, be64(&footer, 48))?;
    let mut image = match be32(&footer, 60) {
        Some(FIXED) => {
            let needed = size.saturating_add(FOOTER);
            if len < needed {
                return Err(truncated(path, needed, len));
            }
            Image::new(Kind::VhdFixed, path, size)
        }
        Some(DYNAMIC) if !at_end => {
            return Err(damaged(
                path,
                "the footer at its end is missing (truncated?)",
            ));
        }
        Some(DYNAMIC) => {
            check_table(file, path, &footer, len)?;
            Image::new(Kind::VhdDynamic, path, size)
        }
        Some(DIFFERENCING) => {
            return Err(Failure::new(
                path,
                "is a differencing disk, which holds only what changed since its parent",
                "merge it into its parent first (Merge-VHD, or Edit Disk in Hyper-V Manager)",
            ));
        }
        _ => return Err(damaged(path, "its type is unknown")),
    };
    let creator = bytes::text(&footer, 28, 4);
    let geometry = geometry(&footer);
    if geometry != size {
        image.notes.push(format!(
            "the footer (made by {creator:?}) says {size} bytes, its geometry {geometry}: taken are {size}"
        ));
    }
    Ok(image)
}

/// The size by cylinders, heads and sectors.
fn geometry(footer: &[u8]) -> u64 {
    let cylinders = u64::from(be16(footer, 56).unwrap_or(0));
    let byte = |at: usize| u64::from(footer.get(at).copied().unwrap_or(0));
    cylinders * byte(58) * byte(59) * 512
}

/// One's complement of the sum of all bytes but its own.
fn checksum(footer: &[u8]) -> Option<u32> {
    let all: u32 = footer.iter().map(|&byte| u32::from(byte)).sum();
    let own = footer.get(CHECKSUM..CHECKSUM + 4)?;
    Some(!(all - own.iter().map(|&byte| u32::from(byte)).sum::<u32>()))
}

/// That the header and the block table of a dynamic disk are in the file.
fn check_table(file: &File, path: &Path, footer: &[u8], len: u64) -> Result<()> {
    let at = be64(footer, 16).unwrap_or(u64::MAX);
    let header = bytes::read(file, at, 1024).cannot("read", path)?;
    if !has(&header, 0, b"cxsparse") || header.len() < 1024 {
        return Err(damaged(path, "the header of a dynamic VHD is missing"));
    }
    let table = be64(&header, 16).unwrap_or(u64::MAX);
    let entries = u64::from(be32(&header, 28).unwrap_or(0));
    let needed = table.saturating_add(entries * 4);
    if needed > len {
        return Err(truncated(path, needed, len));
    }
    Ok(())
}
