//! VDI of VirtualBox: a header, a map of blocks, the blocks.

use std::fs::File;
use std::path::Path;

use super::{Image, Kind, damaged, need32, plausible, truncated};
use crate::bytes::{self, le64};
use crate::failure::{Context, Failure, Result};

const TYPE_DYNAMIC: u32 = 1;
const TYPE_STATIC: u32 = 2;

pub fn open(file: &File, path: &Path) -> Result<Image> {
    let len = file.metadata().cannot("open", path)?.len();
    let header = bytes::read(file, 0, 512).cannot("read", path)?;
    let number = |at| need32(path, &header, at);
    let mut image = Image::new(Kind::Vdi, path, plausible(path, le64(&header, 0x170))?);
    match number(0x4c)? {
        TYPE_DYNAMIC => "dynamic".clone_into(&mut image.shape),
        TYPE_STATIC => "fixed".clone_into(&mut image.shape),
        _ => {
            return Err(Failure::new(
                path,
                "is a snapshot's difference and no whole disk",
                "clone the disk in VirtualBox: VBoxManage clonemedium FILE NEW.vdi",
            ));
        }
    }
    let (map, data) = (u64::from(number(0x154)?), u64::from(number(0x158)?));
    let (block, blocks) = (u64::from(number(0x178)?), u64::from(number(0x180)?));
    let allocated = u64::from(number(0x184)?);
    if blocks.saturating_mul(block) < image.size || allocated > blocks {
        return Err(damaged(path, "its header has too few blocks for its size"));
    }
    let needed = data + allocated.saturating_mul(block);
    let needed = needed.max(map + blocks * 4);
    if len < needed {
        return Err(truncated(path, needed, len));
    }
    Ok(image)
}
