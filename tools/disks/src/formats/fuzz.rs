//! Files that are disks of some format, or raw ones with some content, or say so.

use std::fs;
use std::os::unix::fs::FileExt;

use crc32fast::hash as crc32;

use super::*;
use crate::contents::Contents;
use crate::contents::gpt::{Gpt, State};
use crate::fuzz::Input;
use crate::fuzz_folder::Folder;

/// A file of pieces at some places, beside another one. Checked: it is taken for one kind, and looked at as that
/// it is an image of a bounded size whose other files are in its folder, or refused in one bounded line; as a
/// raw disk it has partitions by numbers that a guest could use, told in lines without control characters;
/// and a partition table that is mended is good after that, with the same partitions.
pub fn disk(bytes: &[u8]) {
    let input = &mut Input::new(bytes);
    let folder = Folder::new();
    let path = folder.path().join("disk.img");
    let other = folder.path().join("other.vmdk");
    let file = file(&path, input);
    fs::write(&other, OTHER[input.below(OTHER.len())]).unwrap();
    let len = file.metadata().unwrap().len();
    let kind = match Kind::of(&file, &path) {
        Ok(kind) => kind,
        Err(refusal) => return assert!(len == 0, "{refusal}"),
    };
    assert!(!kind.name().is_empty());
    match Image::open(&path, kind, Reach::new(false)) {
        Ok(image) => check(&image, folder.path()),
        Err(refusal) => is_short(&refusal.to_string()),
    }
    raw(&file, &path, len);
}

/// What the file beside may be.
const OTHER: [&[u8]; 3] = [
    b"# Disk DescriptorFile\ncreateType=\"monolithicFlat\"\nRW 1 FLAT \"disk.img\" 0\n",
    &[0; 4096],
    b"KDMV",
];

/// Where pieces begin: sectors that mean something, and others.
const PLACES: [u64; 14] = [
    0, 512, 1024, 1536, 4096, 257, 0x1fe, 0x40, 0x8001, 0x10040, 446, 65536, 196_608, 262_144,
];

fn file(path: &Path, input: &mut Input<'_>) -> File {
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .unwrap();
    let size =
        input.one_of(&[0u64, 512, 4096, 65536, 1 << 20, 1 << 24]) + u64::from(input.u8()) * 512;
    file.set_len(size).unwrap();
    let last = size.saturating_sub(512);
    while !input.is_empty() {
        let at = match input.below(4) {
            0 => last,
            1 => u64::from(input.u8()) * 512,
            _ => input.one_of(&PLACES),
        };
        match input.below(8) {
            0 => {
                let (at, magic, _) = MAGIC[input.below(MAGIC.len())];
                file.write_all_at(magic, at as u64).unwrap();
            }
            1 => gpt(&file, at / 512, size / 512, input),
            2 => vhd(&file, at, input),
            3 => {
                let entry = [0x80, 0, 0, 0, input.one_of(&[0x83, 0x05, 0xee]), 0, 0, 0];
                let numbers = [u32::from(input.u8()), u32::from(input.u8())].map(u32::to_le_bytes);
                let sector = at / 512 * 512;
                let at = sector + 446 + 16 * input.below(4) as u64;
                file.write_all_at(&[&entry[..], &numbers.concat()].concat(), at)
                    .unwrap();
                file.write_all_at(&[0x55, 0xaa], sector + 510).unwrap();
            }
            4 => {
                let text = TEXTS[input.below(TEXTS.len())];
                file.write_all_at(text.as_bytes(), at).unwrap();
            }
            _ => {
                let len = input.below(128);
                file.write_all_at(input.bytes(len), at).unwrap();
            }
        }
    }
    file
}

/// Lines of descriptors, and names that lead elsewhere.
const TEXTS: [&str; 10] = [
    "# Disk DescriptorFile\ncreateType=\"monolithicFlat\"\nRW 8 FLAT \"other.vmdk\" 0\n",
    "# Disk DescriptorFile\ncreateType=\"twoGbMaxExtentSparse\"\nRW 8 SPARSE \"disk.img\"\n",
    "# Disk DescriptorFile\nRW 8 FLAT \"../../etc/passwd\" 0\ncreateType=\"vmfs\"\n",
    "parentCID=1\nparentFileNameHint=\"other.vmdk\"\nCID=2\ncreateType=\"a\"\nRW 1 SPARSE \"x\"\n",
    "RW 18446744073709551615 FLAT \"other.vmdk\" 18446744073709551615\n",
    "/etc/passwd",
    "other.vmdk",
    "disk.img",
    "json:{}",
    "nbd://host/x",
];

/// A GPT's header with its own check value and that of its entries.
fn gpt(file: &File, at: u64, sectors: u64, input: &mut Input<'_>) {
    let count = input.one_of(&[4u32, 1, 128, 0, 8192]);
    let size = input.one_of(&[128u32, 256, 1 << 15, 127]);
    let somewhere = u64::from(input.u8());
    let place = input.one_of(&[2, at + 1, sectors.saturating_sub(9), 0, somewhere]);
    let mut entry = [0u8; 128];
    entry[0] = 1;
    entry[32..40].copy_from_slice(&u64::from(input.u16()).to_le_bytes());
    entry[40..48].copy_from_slice(&u64::from(input.u16()).to_le_bytes());
    entry[56] = input.u8();
    entry[57] = input.u8() & 0xd8;
    if input.flag() && place != 0 {
        file.write_all_at(&entry, place * 512).unwrap();
    }
    let mut header = [0u8; 512];
    header[..8].copy_from_slice(b"EFI PART");
    header[12..16].copy_from_slice(&input.one_of(&[92u32, 512, 91, 513]).to_le_bytes());
    header[24..32].copy_from_slice(&at.to_le_bytes());
    let backup = input.one_of(&[sectors.saturating_sub(1), 1, 8, somewhere]);
    header[32..40].copy_from_slice(&backup.to_le_bytes());
    header[40..48].copy_from_slice(&input.one_of(&[34, 3, 4, u64::MAX]).to_le_bytes());
    header[72..80].copy_from_slice(&place.to_le_bytes());
    header[80..84].copy_from_slice(&count.to_le_bytes());
    header[84..88].copy_from_slice(&size.to_le_bytes());
    let len = u64::from(count) * u64::from(size);
    let entries = bytes::read(file, place.saturating_mul(512), len.min(1 << 20) as usize).unwrap();
    header[88..92].copy_from_slice(&crc32(&entries).to_le_bytes());
    let size = le32(&header, 12).unwrap().min(512) as usize;
    let sum = crc32(&header[..size]);
    header[16..20].copy_from_slice(&sum.to_le_bytes());
    file.write_all_at(&header, at * 512).unwrap();
}

/// A footer with its check value.
fn vhd(file: &File, at: u64, input: &mut Input<'_>) {
    let mut footer = [0u8; 512];
    footer[..8].copy_from_slice(b"conectix");
    footer[16..24].copy_from_slice(&input.one_of(&[512u64, 1024, u64::MAX]).to_be_bytes());
    footer[48..56].copy_from_slice(&input.one_of(&[512u64, 65536, 0, u64::MAX]).to_be_bytes());
    footer[56..60].copy_from_slice(&input.u32().to_be_bytes());
    footer[60..64].copy_from_slice(&input.one_of(&[2u32, 3, 4, 5]).to_be_bytes());
    let sum: u32 = footer.iter().map(|byte| u32::from(*byte)).sum();
    footer[64..68].copy_from_slice(&(!sum).to_be_bytes());
    file.write_all_at(&footer, at).unwrap();
}

fn is_short(text: &str) {
    assert!(
        !text.contains(|it: char| it.is_control() && it != '\n') && text.len() < 8192,
        "{text}"
    );
}

fn check(image: &Image, folder: &Path) {
    // What ext4 has at most, and qemu-img.
    assert!(
        image.size > 0 && image.size <= i64::MAX as u64,
        "{}",
        image.size
    );
    let others = image.data_file.iter().map(PathBuf::as_path);
    let others = others.chain(image.checked.iter().flat_map(vmdk::Checked::files));
    for other in others.chain([&*image.path]) {
        assert_eq!(other.parent(), Some(folder), "{}", other.display());
    }
    image.notes.iter().for_each(|note| is_short(note));
    assert!(image.notes.len() < 64 && image.snapshots.len() <= 65_536);
    if let Some(backing) = &image.backing {
        check(backing, folder);
    }
}

fn raw(file: &File, path: &Path, len: u64) {
    let contents = Contents::read(file, path, len).unwrap();
    assert!(contents.partitions.len() <= 8192);
    contents.lines().iter().for_each(|line| is_short(line));
    let mut numbers: Vec<u32> = contents.partitions.iter().map(|it| it.number).collect();
    numbers.dedup();
    assert!(numbers.is_sorted() && numbers.len() == contents.partitions.len());
    assert!(numbers.first().is_none_or(|first| *first > 0));
    let Some(gpt) = Gpt::read(file, len).unwrap() else {
        return;
    };
    let before = gpt.partitions();
    match gpt.mend(file, path) {
        Ok(()) => {
            let mended = Gpt::read(file, len).unwrap().expect("it was written");
            assert_eq!(mended.state, State::Good);
            assert_eq!(mended.partitions(), before);
            assert_eq!(file.metadata().unwrap().len(), len);
        }
        Err(refusal) => is_short(&refusal.to_string()),
    }
}
