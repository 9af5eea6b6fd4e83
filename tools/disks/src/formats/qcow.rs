//! QCOW, QCOW2 and QED: what their headers say of size, encryption, backing file, data file and
//! snapshots (QEMU's docs/interop/qcow2.rst and qed_spec.rst).

use std::fs::File;
use std::path::Path;

use super::{Image, Kind, Reach, Snapshot, backing, damaged, encrypted, plausible, truncated};
use crate::bytes::{self, be16, be32, be64, le32, le64};
use crate::failure::{Context, Result};

/// QEMU's own limit of a name in the header.
const NAME_MAX: u32 = 1023;
const SNAPSHOTS_MAX: u32 = 65_536;
/// QEMU's own limit of the table of snapshots, in bytes.
const TABLE_MAX: u64 = 64 << 20;
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXTENSION_DATA_FILE: u32 = 0x4441_5441;
const INCOMPATIBLE_DATA_FILE: u64 = 1 << 2;
const QED_BACKING: u64 = 1;
const QED_BACKING_RAW: u64 = 4;

/// The name that is `len` bytes at `at`, if there is one.
fn name(file: &File, path: &Path, at: u64, len: u32) -> Result<Option<String>> {
    if at == 0 || len == 0 {
        return Ok(None);
    }
    if len > NAME_MAX {
        return Err(damaged(path, "the name of its backing file is too long"));
    }
    let name = bytes::read(file, at, len as usize).cannot("read", path)?;
    match String::from_utf8(name) {
        Ok(name) if name.len() == len as usize => Ok(Some(name)),
        _ => Err(damaged(path, "the name of its backing file cannot be read")),
    }
}

pub fn qcow1(file: &File, path: &Path, reach: Reach) -> Result<Image> {
    let header = bytes::read(file, 0, 48).cannot("read", path)?;
    if header.len() < 48 {
        return Err(truncated(path, 48, header.len() as u64));
    }
    if be32(&header, 36) != Some(0) {
        return Err(encrypted(path));
    }
    let mut image = Image::new(Kind::Qcow, path, plausible(path, be64(&header, 24))?);
    let (at, len) = (
        be64(&header, 8).unwrap_or(0),
        be32(&header, 16).unwrap_or(0),
    );
    if let Some(name) = name(file, path, at, len)? {
        image.backing = Some(backing(path, &name, None, reach)?);
    }
    Ok(image)
}

pub fn qed(file: &File, path: &Path, reach: Reach) -> Result<Image> {
    let header = bytes::read(file, 0, 64).cannot("read", path)?;
    if header.len() < 64 {
        return Err(truncated(path, 64, header.len() as u64));
    }
    let features = le64(&header, 16).unwrap_or(0);
    let mut image = Image::new(Kind::Qed, path, plausible(path, le64(&header, 48))?);
    if features & QED_BACKING != 0 {
        let at = u64::from(le32(&header, 56).unwrap_or(0));
        let format = (features & QED_BACKING_RAW != 0).then_some("raw");
        let Some(name) = name(file, path, at, le32(&header, 60).unwrap_or(0))? else {
            return Err(damaged(path, "the name of its backing file is missing"));
        };
        image.backing = Some(backing(path, &name, format, reach)?);
    }
    Ok(image)
}

/// The size in the header: applying a snapshot changes it.
pub fn size(path: &Path) -> Result<u64> {
    let file = File::open(path).cannot("open", path)?;
    let header = bytes::read(&file, 0, 32).cannot("read", path)?;
    plausible(path, be64(&header, 24))
}

pub fn qcow2(file: &File, path: &Path, reach: Reach) -> Result<Image> {
    let header = bytes::read(file, 0, 64 << 10).cannot("read", path)?;
    if header.len() < 104 {
        return Err(truncated(path, 104, header.len() as u64));
    }
    let version = be32(&header, 4).unwrap_or(0);
    if !(2..=3).contains(&version) {
        return Err(damaged(path, &format!("QCOW version {version} is unknown")));
    }
    if be32(&header, 32) != Some(0) {
        return Err(encrypted(path));
    }
    let mut image = Image::new(Kind::Qcow2, path, plausible(path, be64(&header, 24))?);
    let extensions = extensions(&header, version);
    let extension = |kind| {
        let found = extensions.iter().find(|(of, _)| *of == kind);
        found.map(|(_, value)| String::from_utf8_lossy(value).into_owned())
    };
    let (at, len) = (
        be64(&header, 8).unwrap_or(0),
        be32(&header, 16).unwrap_or(0),
    );
    if let Some(name) = name(file, path, at, len)? {
        let format = extension(EXTENSION_BACKING_FORMAT);
        image.backing = Some(backing(path, &name, format.as_deref(), reach)?);
    }
    let features = if version >= 3 {
        be64(&header, 72).unwrap_or(0)
    } else {
        0
    };
    if features & INCOMPATIBLE_DATA_FILE != 0 {
        let Some(name) = extension(EXTENSION_DATA_FILE) else {
            return Err(damaged(path, "the name of its data file is missing"));
        };
        image.data_file = Some(reach.resolve(path, &name, "data file")?);
    }
    let count = be32(&header, 60).unwrap_or(0);
    image.snapshots = snapshots(file, path, be64(&header, 64).unwrap_or(0), count)?;
    Ok(image)
}

/// The extensions of the header: kind and value.
fn extensions(header: &[u8], version: u32) -> Vec<(u32, Vec<u8>)> {
    let (mut at, mut found) = (72, Vec::new());
    if version >= 3 {
        at = be32(header, 100).unwrap_or(0).max(104) as usize;
    }
    while let (Some(kind), Some(len)) = (be32(header, at), be32(header, at + 4)) {
        let len = len as usize;
        let Some(value) = header.get(at + 8..(at + 8).saturating_add(len)) else {
            break;
        };
        if kind == 0 || found.len() >= 64 {
            break;
        }
        found.push((kind, value.to_vec()));
        at += 8 + len.next_multiple_of(8);
    }
    found
}

/// The table of snapshots. The size of each is among the extra data, where there is any.
fn snapshots(file: &File, path: &Path, mut at: u64, count: u32) -> Result<Vec<Snapshot>> {
    if count > SNAPSHOTS_MAX {
        return Err(damaged(path, "it claims more than 65,536 snapshots"));
    }
    let mut found = Vec::new();
    let table_end = at.saturating_add(TABLE_MAX);
    for _ in 0..count {
        if at > table_end {
            return Err(damaged(
                path,
                "its table of snapshots is longer than 64 MiB",
            ));
        }
        let cannot = || damaged(path, "its table of snapshots cannot be read");
        let entry = bytes::read(file, at, 40 + 1024 + 2 * 65_536).cannot("read", path)?;
        let (id_len, name_len) = (be16(&entry, 12), be16(&entry, 14));
        let (Some(id_len), Some(name_len)) = (id_len, name_len) else {
            return Err(cannot());
        };
        let extra = be32(&entry, 36)
            .filter(|&extra| extra <= 1024)
            .ok_or_else(cannot)? as usize;
        let size = if extra >= 16 { be64(&entry, 48) } else { None };
        let (id_len, name_len) = (usize::from(id_len), usize::from(name_len));
        let end = 40 + extra + id_len + name_len;
        if entry.len() < end {
            return Err(cannot());
        }
        let field = |at: usize, len: usize| {
            let bytes = entry.get(at..at + len).unwrap_or_default();
            String::from_utf8_lossy(bytes).into_owned()
        };
        found.push(Snapshot {
            id: field(40 + extra, id_len),
            name: field(40 + extra + id_len, name_len),
            size,
        });
        at = at.saturating_add(end.next_multiple_of(8) as u64);
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn snapshots_whose_table_is_longer_than_that_of_qemu_are_refused() {
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let file = File::from(rustix::fs::memfd_create("disk", flags).unwrap());
        // Each with a name as long as names can be.
        let (count, len) = (1100, 40 + 65_535u64);
        let len = len.next_multiple_of(8);
        for nth in 0..count {
            file.write_all_at(&[0xff; 2], nth * len + 14).unwrap();
        }
        file.set_len(count * len + 8).unwrap();
        let few = snapshots(&file, Path::new("disk"), 0, 1000).unwrap();
        assert_eq!((few.len(), few[999].name.len()), (1000, 65_535));
        let error = snapshots(&file, Path::new("disk"), 0, count as u32).unwrap_err();
        assert!(error.to_string().contains("longer than 64 MiB"), "{error}");
    }
}
