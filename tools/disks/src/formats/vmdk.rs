//! VMDK of VMware: a descriptor, which is text, and extents, each a file: flat (the bytes), or
//! sparse (a header, and tables that say where each grain is). A sparse extent may have the
//! descriptor in it. qemu-img reads an extent that ends early as zeros, and opens whatever path a
//! descriptor names: both are checked here before it is run. It reads descriptors by rules of its
//! own (tabs, line ends, access), so it is never given one of others: it gets one that is written
//! here, whose extents are links to the files that were checked.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use super::{Image, Kind, Reach, backing, damaged, plausible, truncated};
use crate::bytes::{self, has, le16, le32, le64};
use crate::failure::{Context, Failure, Result, clean, printable};

const SECTOR: u64 = 512;
/// VMware writes at most 20 sectors; long lists of extents need more.
const DESCRIPTOR_MAX: usize = 1 << 20;
const NO_PARENT: &str = "ffffffff";
/// Where the offset of the grain directory is only in a copy of the header, at the file's end.
const AT_END: u64 = u64::MAX;
const COMPRESSED: u32 = 1 << 16;
/// Tables of grains that qemu-img reads at most, and how much of their directory is read at once.
const TABLES_MAX: u64 = 32 << 20;
const DIRECTORY_CHUNK: usize = 64 << 10;
/// A disk of 8 TiB in parts of 2 GiB.
const EXTENTS_MAX: usize = 4096;
/// The types of disks in files whose extents qemu-img reads.
const TYPES: &[&str] = &[
    "monolithicFlat",
    "twoGbMaxExtentFlat",
    "twoGbMaxExtentSparse",
    "vmfs",
    "vmfsSparse",
    "seSparse",
];
/// What a folder may hold while a descriptor is looked for.
const FOLDER_MAX: usize = 4096;

#[derive(Debug, PartialEq, Eq)]
struct Extent {
    sectors: u64,
    kind: String,
    name: String,
    offset: u64,
}

#[derive(Debug, Default)]
struct Descriptor {
    kind: String,
    parent: Option<String>,
    /// By these qemu-img tells that a parent is the right one.
    ids: [u32; 2],
    extents: Vec<Extent>,
    /// A line that begins like an extent and is none.
    unread: Option<String>,
}

/// What qemu-img is told in place of a descriptor.
#[derive(Debug)]
pub struct Checked {
    kind: String,
    ids: [u32; 2],
    extents: Vec<(Extent, PathBuf)>,
}

impl Checked {
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.extents.iter().map(|(_, path)| path.as_path())
    }

    /// Writes the descriptor, and links to its extents, into the new folder `folder`; its path.
    pub fn write(&self, folder: &Path) -> Result<PathBuf> {
        fs::create_dir(folder).cannot("create", folder)?;
        let [id, parent] = self.ids;
        // No empty line: qemu-img reads the line behind it twice.
        let mut text = format!(
            "# Disk DescriptorFile\nversion=1\nCID={id:08x}\nparentCID={parent:08x}\ncreateType=\"{}\"\n",
            self.kind
        );
        for (index, (extent, path)) in self.extents.iter().enumerate() {
            let name = format!("extent-{index}");
            symlink(path, folder.join(&name)).cannot("create", folder)?;
            let sectors = extent.sectors;
            let _ = match extent.kind.as_str() {
                // The same for VMFS, but that qemu-img reads no offset there.
                "FLAT" | "VMFS" => {
                    writeln!(text, "RW {sectors} FLAT \"{name}\" {}", extent.offset)
                }
                kind => writeln!(text, "RW {sectors} {kind} \"{name}\""),
            };
        }
        let path = folder.join("descriptor");
        fs::write(&path, text).cannot("write", &path)?;
        Ok(path)
    }
}

impl Descriptor {
    /// None: not text with extents.
    fn parse(bytes: &[u8]) -> Option<Descriptor> {
        let text = bytes.split(|&byte| byte == 0).next()?;
        let text = String::from_utf8_lossy(text);
        let (mut descriptor, mut has_parent, mut hint) = (Descriptor::default(), false, None);
        descriptor.ids = [0, u32::MAX];
        for line in text.lines().map(str::trim) {
            if let Some((key, value)) = line.split_once('=') {
                let value = value.trim().trim_matches('"');
                match key.trim() {
                    "createType" => value.clone_into(&mut descriptor.kind),
                    "CID" => descriptor.ids[0] = u32::from_str_radix(value, 16).unwrap_or(0),
                    "parentCID" => {
                        has_parent = !value.eq_ignore_ascii_case(NO_PARENT);
                        descriptor.ids[1] = u32::from_str_radix(value, 16).unwrap_or(u32::MAX);
                    }
                    "parentFileNameHint" => hint = Some(value.to_owned()),
                    _ => {}
                }
            }
            let access = line.split_whitespace().next().unwrap_or("");
            if ACCESS.contains(&access) {
                match extent(line) {
                    Some(extent) => descriptor.extents.push(extent),
                    None => descriptor.unread = Some(clean(line)),
                }
            }
        }
        if has_parent {
            descriptor.parent = Some(hint.unwrap_or_default());
        }
        let has_extents = !descriptor.extents.is_empty() || descriptor.unread.is_some();
        has_extents.then_some(descriptor)
    }

    fn bytes(&self) -> Option<u64> {
        let mut all = self.extents.iter().map(|extent| extent.sectors);
        all.try_fold(0u64, u64::checked_add)?.checked_mul(SECTOR)
    }
}

const ACCESS: [&str; 3] = ["RW", "RDONLY", "NOACCESS"];

/// `RW 204801 FLAT "name" 0`
fn extent(line: &str) -> Option<Extent> {
    let (access, rest) = line.split_once(char::is_whitespace)?;
    if !ACCESS.contains(&access) {
        return None;
    }
    let (sectors, rest) = rest.trim_start().split_once(char::is_whitespace)?;
    let rest = rest.trim_start();
    let (kind, rest) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
    let mut quoted = rest.splitn(3, '"').skip(1);
    let name = quoted.next().unwrap_or("").to_owned();
    let offset = quoted.next().unwrap_or("").split_whitespace().next();
    Some(Extent {
        sectors: sectors.parse().ok()?,
        kind: kind.to_owned(),
        name,
        offset: offset.map_or(Some(0), |text| text.parse().ok())?,
    })
}

/// A disk whose descriptor is a file of its own.
pub fn described(file: &File, path: &Path, reach: Reach) -> Result<Image> {
    let text = bytes::read(file, 0, DESCRIPTOR_MAX).cannot("read", path)?;
    let Some(descriptor) = Descriptor::parse(&text) else {
        return Err(damaged(path, "the VMDK descriptor names no extents"));
    };
    if let Some(line) = &descriptor.unread {
        return Err(damaged(path, &format!("its line {line:?} is no extent")));
    }
    if descriptor.extents.len() > EXTENTS_MAX {
        return Err(Failure::new(
            path,
            format!("has more than {EXTENTS_MAX} extents"),
            "clone it into one file: vmware-vdiskmanager -r FILE -t 0 NEW.vmdk",
        ));
    }
    let size = descriptor.bytes();
    let (mut missing, mut found) = (Vec::new(), Vec::new());
    for extent in descriptor.extents {
        if extent.kind.starts_with("VMFSR") {
            return Err(Failure::new(
                path,
                "is a mapping of a device of its host (RDM) and holds no data",
                "clone it into a disk file: vmkfstools -i FILE -d thin NEW.vmdk",
            ));
        }
        if extent.kind == "ZERO" {
            return Err(Failure::new(
                path,
                "has a part without a file (ZERO), which is not read here",
                "clone it into one file: vmware-vdiskmanager -r FILE -t 0 NEW.vmdk",
            ));
        }
        let folder = path.parent().unwrap_or(Path::new("/"));
        if !extent.name.contains(':') && !folder.join(&extent.name).exists() {
            missing.push(clean(&extent.name));
            continue;
        }
        let file_path = reach.resolve(path, &extent.name, "extent")?;
        check_extent(&extent, &file_path)?;
        found.push((extent, file_path));
    }
    if !missing.is_empty() {
        return Err(Failure::new(
            path,
            format!("these files of it are missing: {}", missing.join(", ")),
            "put them into the same folder",
        ));
    }
    let kind = &descriptor.kind;
    if !TYPES.contains(&kind.as_str()) {
        return Err(Failure::new(
            path,
            format!(
                "is a VMDK of type {:?}, which is not read here",
                clean(kind)
            ),
            "clone it into one file: vmware-vdiskmanager -r FILE -t 0 NEW.vmdk",
        ));
    }
    let mut image = Image::new(Kind::VmdkDescriptor, path, plausible(path, size)?);
    image.shape.clone_from(kind);
    image.backing = parent(path, descriptor.parent.as_deref(), reach)?;
    image.checked = Some(Checked {
        kind: descriptor.kind,
        ids: descriptor.ids,
        extents: found,
    });
    Ok(image)
}

fn parent(path: &Path, name: Option<&str>, reach: Reach) -> Result<Option<Box<Image>>> {
    match name {
        None => Ok(None),
        Some("") => Err(damaged(path, "the name of its parent is missing")),
        Some(name) => backing(path, name, None, reach).map(Some),
    }
}

/// That the file of an extent has what the descriptor says.
fn check_extent(extent: &Extent, path: &Path) -> Result<()> {
    let file = File::open(path).cannot("open", path)?;
    let len = file.metadata().cannot("open", path)?.len();
    let end = extent
        .offset
        .checked_add(extent.sectors)
        .and_then(|end| end.checked_mul(SECTOR));
    let Some(end) = end else {
        return Err(damaged(path, "the descriptor says an impossible length"));
    };
    match extent.kind.as_str() {
        "FLAT" | "VMFS" if len < end => Err(truncated(path, end, len)),
        "FLAT" | "VMFS" => Ok(()),
        "SPARSE" => {
            let header = Header::read(&file, path, len)?;
            if header.capacity != extent.sectors {
                let (says, has) = (extent.sectors * SECTOR, header.capacity * SECTOR);
                let what =
                    format!("it holds {has} bytes of the disk, and its descriptor says {says}");
                return Err(damaged(path, &what));
            }
            header.check_grains(&file, path, len)
        }
        // Their tables are qemu-img's to read. With another magic number it would take the first
        // for a sparse extent, which is checked above.
        "VMFSSPARSE" => {
            let magic = bytes::read(&file, 0, 4).cannot("read", path)?;
            match has(&magic, 0, b"COWD") {
                true => Ok(()),
                false => Err(damaged(path, "its header is not valid")),
            }
        }
        "SESPARSE" => Ok(()),
        other => Err(damaged(
            path,
            &format!("an extent of type {:?} is unknown", clean(other)),
        )),
    }
}

/// A disk that is one sparse extent with its descriptor, or a part of a disk, whose descriptor is
/// looked for.
pub fn sparse(file: &File, path: &Path, reach: Reach) -> Result<Image> {
    let len = file.metadata().cannot("open", path)?.len();
    let magic = bytes::read(file, 0, 4).cannot("read", path)?;
    if has(&magic, 0, b"COWD") {
        return of_extent(path, reach)?.ok_or_else(|| alone(path));
    }
    let header = Header::read(file, path, len)?;
    if header.descriptor == 0 {
        return of_extent(path, reach)?.ok_or_else(|| alone(path));
    }
    let at = header.descriptor.saturating_mul(SECTOR);
    let size = (header.descriptor_len.saturating_mul(SECTOR)).min(DESCRIPTOR_MAX as u64);
    let text = bytes::read(file, at, size as usize).cannot("read", path)?;
    let Some(descriptor) = Descriptor::parse(&text) else {
        // A part may have room for one.
        return of_extent(path, reach)?.ok_or_else(|| alone(path));
    };
    header.check_grains(file, path, len)?;
    let size = plausible(path, header.capacity.checked_mul(SECTOR))?;
    let mut image = Image::new(Kind::VmdkSparse, path, size);
    image.shape = clean(&descriptor.kind);
    image.backing = parent(path, descriptor.parent.as_deref(), reach)?;
    Ok(image)
}

fn alone(path: &Path) -> Failure {
    Failure::new(
        path,
        "is one part (extent) of a VMDK, and no descriptor in its folder names it",
        "put all files of the disk into one folder and name the small .vmdk file",
    )
}

/// Whether the name is one that only extents have.
pub fn is_extent_name(path: &Path) -> bool {
    let name = path
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .to_lowercase();
    let Some(stem) = name.strip_suffix(".vmdk") else {
        return false;
    };
    let numbered = |letter: &str| {
        stem.rsplit_once(letter).is_some_and(|(_, digits)| {
            digits.len() >= 3 && digits.bytes().all(|b| b.is_ascii_digit())
        })
    };
    ["-flat", "-delta", "-sesparse"]
        .iter()
        .any(|end| stem.ends_with(end))
        || numbered("-f")
        || numbered("-s")
}

/// The refusal of a file with the name of an extent and no descriptor.
pub fn extent_alone(path: &Path) -> Failure {
    alone(path)
}

/// The disk of which `path` is an extent, by the descriptor in its folder that names it.
pub fn of_extent(path: &Path, reach: Reach) -> Result<Option<Image>> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    let entries = fs::read_dir(folder).cannot("list", folder)?;
    let mut candidates: Vec<PathBuf> = entries
        .flatten()
        .take(FOLDER_MAX)
        .map(|entry| entry.path())
        .filter(|other| {
            other
                .extension()
                .is_some_and(|end| end.eq_ignore_ascii_case("vmdk"))
        })
        .filter(|other| other != path)
        .collect();
    candidates.sort();
    for other in candidates {
        let is_small =
            fs::metadata(&other).is_ok_and(|it| it.is_file() && it.len() <= DESCRIPTOR_MAX as u64);
        if !is_small {
            continue;
        }
        let file = File::open(&other).cannot("open", &other)?;
        if Kind::of(&file, &other).ok() != Some(Kind::VmdkDescriptor) {
            continue;
        }
        let text = bytes::read(&file, 0, DESCRIPTOR_MAX).cannot("read", &other)?;
        let names = Descriptor::parse(&text).map_or_else(Vec::new, |found| found.extents);
        let is_it = |extent: &Extent| {
            folder
                .join(&extent.name)
                .canonicalize()
                .is_ok_and(|it| it == path)
        };
        if names.iter().any(is_it) {
            let mut image = described(&file, &other, reach)?;
            let note = format!("{} is a part of it", printable(path));
            image.notes.push(note);
            return Ok(Some(image));
        }
    }
    Ok(None)
}

/// The header of a sparse extent.
#[derive(Debug)]
struct Header {
    /// All in sectors.
    capacity: u64,
    grain: u64,
    descriptor: u64,
    descriptor_len: u64,
    directory: u64,
    grains_per_table: u64,
    is_compressed: bool,
}

impl Header {
    fn read(file: &File, path: &Path, len: u64) -> Result<Header> {
        let bytes = bytes::read(file, 0, 512).cannot("read", path)?;
        let mut header =
            Header::parse(&bytes).ok_or_else(|| damaged(path, "its header is not valid"))?;
        let (descriptor, descriptor_len) = (header.descriptor, header.descriptor_len);
        if header.directory == AT_END {
            // The last two sectors: this header again, and the end of the stream.
            let bytes = bytes::read(file, len.saturating_sub(1024), 512).cannot("read", path)?;
            header = Header::parse(&bytes)
                .filter(|header| header.directory != AT_END)
                .ok_or_else(|| damaged(path, "the footer at its end is missing (truncated?)"))?;
            (header.descriptor, header.descriptor_len) = (descriptor, descriptor_len);
        }
        Ok(header)
    }

    fn parse(bytes: &[u8]) -> Option<Header> {
        let header = Header {
            capacity: le64(bytes, 12)?,
            grain: le64(bytes, 20)?,
            descriptor: le64(bytes, 28)?,
            descriptor_len: le64(bytes, 36)?,
            grains_per_table: u64::from(le32(bytes, 44)?),
            directory: le64(bytes, 56)?,
            is_compressed: le32(bytes, 8)? & COMPRESSED != 0 && le16(bytes, 77)? == 1,
        };
        let is_possible = has(bytes, 0, b"KDMV")
            // Without a size qemu-img would follow a descriptor in it to other files.
            && (1..=1 << 47).contains(&header.capacity)
            && (1..=1 << 20).contains(&header.grain)
            && (1..=1 << 16).contains(&header.grains_per_table);
        is_possible.then_some(header)
    }

    /// That every grain which the tables name is in the file. Each has a place of its own there, as each
    /// table has: so no more are looked at than there is room for.
    fn check_grains(&self, file: &File, path: &Path, len: u64) -> Result<()> {
        let mut left = len;
        let mut take = |size: u64| {
            left = left
                .checked_sub(size)
                .ok_or_else(|| damaged(path, "its tables name more than the file has"))?;
            Ok(())
        };
        let tables = self.capacity.div_ceil(self.grain * self.grains_per_table);
        let directory = self.directory.saturating_mul(SECTOR);
        let end = directory.saturating_add(tables * 4);
        if end > len {
            return Err(truncated(path, end, len));
        }
        if tables > TABLES_MAX {
            return Err(damaged(path, "it has more tables than qemu-img reads"));
        }
        let mut chunk = Vec::new();
        for index in 0..tables {
            let within = index as usize * 4 % DIRECTORY_CHUNK;
            if within == 0 {
                let at = directory + index * 4;
                chunk = bytes::read(file, at, DIRECTORY_CHUNK).cannot("read", path)?;
            }
            let table = u64::from(le32(&chunk, within).unwrap_or(0)) * SECTOR;
            if table == 0 {
                continue;
            }
            let size = self.grains_per_table * 4;
            if table + size > len {
                return Err(truncated(path, table + size, len));
            }
            take(size)?;
            let entries = bytes::read(file, table, size as usize).cannot("read", path)?;
            for nth in 0..self.grains_per_table {
                let at = u64::from(le32(&entries, nth as usize * 4).unwrap_or(0)) * SECTOR;
                // 0: not there; 1: zeros.
                if at <= SECTOR {
                    continue;
                }
                let first = (index * self.grains_per_table + nth) * self.grain;
                let visible = self.capacity.saturating_sub(first).min(self.grain) * SECTOR;
                let size = if self.is_compressed {
                    let marker = bytes::read(file, at, 12).cannot("read", path)?;
                    12 + u64::from(le32(&marker, 8).unwrap_or(0))
                } else {
                    visible
                };
                if at + size > len {
                    return Err(truncated(path, at + size, len));
                }
                take(size)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn extents_are_read_as_vmware_writes_them() {
        let extents = |line: &str| extent(line).map(|it| (it.sectors, it.kind, it.name, it.offset));
        let text = |text: &str| text.to_owned();
        assert_eq!(
            extents(r#"RW 204801 FLAT "a disk-flat.vmdk" 7"#),
            Some((204_801, text("FLAT"), text("a disk-flat.vmdk"), 7))
        );
        assert_eq!(extents("RW 63 ZERO"), Some((63, text("ZERO"), text(""), 0)));
        assert_eq!(extents(r#"RW x FLAT "a" 0"#), None);
        assert_eq!(extents("version=1"), None);
    }

    #[test]
    fn tables_and_grains_that_share_a_place_or_are_too_many_are_refused() {
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let file = File::from(rustix::fs::memfd_create("disk", flags).unwrap());
        let header = |capacity: u64| Header {
            capacity,
            grain: 8,
            descriptor: 0,
            descriptor_len: 0,
            directory: 2,
            grains_per_table: 128,
            is_compressed: false,
        };
        let tables = 1 << 18;
        let len = 4 << 20;
        file.set_len(len).unwrap();
        let check = |capacity| header(capacity).check_grains(&file, Path::new("disk"), len);
        let put = |at: u64, numbers: &[u8]| file.write_all_at(numbers, at).unwrap();
        // One table with a grain, beyond the first piece of the directory.
        put(1024 + 20_000 * 4, &4000u32.to_le_bytes());
        put(4000 * SECTOR, &5000u32.to_le_bytes());
        assert!(check(tables * 1024).is_ok());
        put(4000 * SECTOR, &u32::MAX.to_le_bytes());
        assert!(
            check(tables * 1024)
                .unwrap_err()
                .to_string()
                .contains("truncated")
        );
        // Every table is the same one, and so is every grain.
        put(4000 * SECTOR, &5000u32.to_le_bytes().repeat(128));
        put(
            1024 + tables * 2,
            &4000u32.to_le_bytes().repeat(tables as usize / 2),
        );
        let error = check(tables * 1024).unwrap_err().to_string();
        assert!(error.contains("more than the file has"), "{error}");
        let sparse = header((TABLES_MAX + 1) * 1024);
        let error = sparse
            .check_grains(&file, Path::new("disk"), u64::MAX)
            .unwrap_err();
        assert!(error.to_string().contains("more tables"), "{error}");
    }

    #[test]
    fn names_of_extents_are_told_from_those_of_disks() {
        let is = |name: &str| is_extent_name(Path::new(name));
        assert!(is("a-flat.vmdk") && is("a-f001.vmdk") && is("A-S012.VMDK"));
        assert!(!is("a.vmdk") && !is("my-files.vmdk") && !is("a-flat.img"));
    }
}
