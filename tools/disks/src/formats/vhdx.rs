//! VHDX of Hyper-V (MS-VHDX): two headers at 64 and 128 KiB of which the newer one counts, regions
//! for the block table and for the metadata, which hold the size. A log that was not written back
//! has its id in the header.

use std::fs::File;
use std::path::Path;

use super::{Image, Kind, damaged, plausible, truncated};
use crate::bytes::{self, has, le16, le32, le64};
use crate::failure::{Context, Failure, Result};

const HEADERS: [u64; 2] = [64 << 10, 128 << 10];
const REGIONS: u64 = 192 << 10;
/// The ids of what is needed here, as they are in the file.
const METADATA_REGION: [u8; 16] = [
    0x06, 0xa2, 0x7c, 0x8b, 0x90, 0x47, 0x9a, 0x4b, 0xb8, 0xfe, 0x57, 0x5f, 0x05, 0x0f, 0x88, 0x6e,
];
const FILE_PARAMETERS: [u8; 16] = [
    0x37, 0x67, 0xa1, 0xca, 0x36, 0xfa, 0x43, 0x4d, 0xb3, 0xb6, 0x33, 0xf0, 0xaa, 0x44, 0xe7, 0x6b,
];
const VIRTUAL_DISK_SIZE: [u8; 16] = [
    0x24, 0x42, 0xa5, 0x2f, 0x1b, 0xcd, 0x76, 0x48, 0xb2, 0x11, 0x5d, 0xbe, 0xd8, 0x3b, 0xf4, 0xb8,
];
const HAS_PARENT: u32 = 2;

pub fn open(file: &File, path: &Path) -> Result<Image> {
    let len = file.metadata().cannot("open", path)?.len();
    let read = |at, len| bytes::read(file, at, len).cannot("read", path);
    let mut newest: Option<(u64, Vec<u8>)> = None;
    for at in HEADERS {
        let header = read(at, 4096)?;
        let sequence = le64(&header, 8).unwrap_or(0);
        if has(&header, 0, b"head") && newest.as_ref().is_none_or(|(other, _)| sequence > *other) {
            newest = Some((sequence, header));
        }
    }
    let Some((_, header)) = newest else {
        return Err(damaged(path, "it has no header (truncated?)"));
    };
    let has_log = header
        .get(48..64)
        .is_some_and(|id| id.iter().any(|&byte| byte != 0));
    let regions = read(REGIONS, 64 << 10)?;
    if !has(&regions, 0, b"regi") {
        return Err(damaged(path, "it has no table of regions (truncated?)"));
    }
    let mut metadata = None;
    for index in 0..le32(&regions, 8).unwrap_or(0).min(2047) as usize {
        let entry = 16 + index * 32;
        let (at, size) = (le64(&regions, entry + 16), le32(&regions, entry + 24));
        let (Some(at), Some(size)) = (at, size) else {
            break;
        };
        let end = at.saturating_add(u64::from(size));
        if end > len {
            return Err(truncated(path, end, len));
        }
        if has(&regions, entry, &METADATA_REGION) {
            metadata = Some(at);
        }
    }
    // All of its structures are whole MiB.
    if len % 512 != 0 {
        return Err(truncated(path, len.next_multiple_of(1 << 20), len));
    }
    let Some(metadata) = metadata else {
        return Err(damaged(path, "it has no metadata"));
    };
    let table = read(metadata, 64 << 10)?;
    let (mut size, mut has_parent) = (None, false);
    for index in 0..usize::from(le16(&table, 10).unwrap_or(0)).min(2047) {
        let entry = 32 + index * 32;
        let Some(offset) = le32(&table, entry + 16) else {
            break;
        };
        let item = read(metadata.saturating_add(u64::from(offset)), 8)?;
        if has(&table, entry, &VIRTUAL_DISK_SIZE) {
            size = le64(&item, 0);
        }
        if has(&table, entry, &FILE_PARAMETERS) {
            has_parent = le32(&item, 4).unwrap_or(0) & HAS_PARENT != 0;
        }
    }
    if has_parent {
        return Err(Failure::new(
            path,
            "is a differencing disk, which holds only what changed since its parent",
            "merge it into its parent first (Merge-VHD, or Edit Disk in Hyper-V Manager)",
        ));
    }
    let mut image = Image::new(Kind::Vhdx, path, plausible(path, size)?);
    image.has_log = has_log;
    Ok(image)
}
