//! Images of every kind of guest memory, compared byte by byte with what the guest sees.

use std::io::Write;
use std::os::unix::fs::MetadataExt;

use vmm_sys_util::tempfile::TempFile;

use super::*;
use crate::memory::{Backing, HIGH_RAM, MIB, Pages, Source};

const STAMP: Stamp = Stamp {
    offset: 0x9_f000,
    id: *b"sixteen bytes id",
};

fn new_file() -> File {
    TempFile::new().unwrap().into_file()
}

fn shared(mib: u64) -> Memory {
    Memory::new(mib, Pages::Ordinary, Backing::Shared, false).unwrap()
}

/// Some pages with content at the beginning, in the middle and at the end of each piece of RAM, and
/// pages that were touched and are zero.
fn scatter(memory: &Memory) {
    let pieces: Vec<_> = memory.regions().collect();
    for (first, len) in pieces {
        for page in [0, 1, 2, 500, len / PAGE / 2, len / PAGE - 1] {
            let bytes = (page as u32 | 1).to_le_bytes().repeat(1024);
            memory.write(first + page * PAGE, &bytes).unwrap();
        }
        for page in [3, 4, 600, len / PAGE - 2] {
            memory.write(first + page * PAGE, &[0; 4096]).unwrap();
        }
        memory.write(first + 7 * PAGE + 4095, &[1, 2]).unwrap();
    }
}

/// What an image of `memory` has to hold in `window` of it.
fn expected(memory: &Memory, window: Range<u64>) -> Vec<u8> {
    let mut bytes = vec![0; (window.end - window.start) as usize];
    let mut before = 0;
    for (first, len) in memory.regions() {
        let (start, end) = (window.start.max(before), window.end.min(before + len));
        if start < end {
            let to = &mut bytes[(start - window.start) as usize..(end - window.start) as usize];
            let from = GuestAddress(first + start - before);
            memory.ram().read_slice(to, from).unwrap();
        }
        before += len;
    }
    if window.contains(&STAMP.offset) {
        let at = (STAMP.offset - window.start) as usize;
        bytes[at..at + ID_LEN].copy_from_slice(&STAMP.id);
    }
    bytes
}

/// The pages that are not zero, and the check value of all.
fn read_back(memory: &Memory, file: &File) -> Written {
    assert_eq!(file.metadata().unwrap().len(), memory.size_mib() * MIB);
    let mut written = Written { check: 0, pages: 0 };
    for start in (0..memory.size_mib() * MIB).step_by(MIB as usize) {
        let wanted = expected(memory, start..start + MIB);
        let mut bytes = vec![0; MIB as usize];
        file.read_exact_at(&mut bytes, start).unwrap();
        assert!(bytes == wanted, "differs in the MiB at {start:#x}");
        for (index, page) in (0..).zip(bytes.as_chunks().0) {
            if !check::is_zero(page) {
                let value = check::of_page(start / PAGE + index, page);
                written.check = written.check.wrapping_add(value);
                written.pages += 1;
            }
        }
    }
    written
}

/// Writes a full image, and compares it with the memory; the image.
fn check_full(memory: &Memory) -> (File, Written) {
    let file = new_file();
    (&file).write_all(&[0xaa; 10_000]).unwrap();
    let written = memory.contents(None).write_full(&file, &STAMP).unwrap();
    assert_eq!(read_back(memory, &file), written);
    assert_eq!(read_id(&file, STAMP.offset).unwrap(), STAMP.id);
    let on_disk = file.metadata().unwrap().blocks() * 512;
    assert!(on_disk <= (written.pages + 64) * PAGE, "{on_disk} bytes");
    (file, written)
}

fn source(file: &File) -> Arc<Source> {
    Arc::new(Source::new(file, "image").unwrap())
}

#[test]
fn full_image_when_memory_is_anonymous_holds_only_what_is_not_zero() {
    let memory = Memory::anonymous(64).unwrap();
    scatter(&memory);
    let (_, written) = check_full(&memory);
    assert_eq!(written.pages, 6 + 2 + 1);
}

#[test]
fn full_image_when_memory_goes_on_above_4_gib_has_no_hole_for_devices() {
    for memory in [Memory::anonymous(3076).unwrap(), shared(3076)] {
        scatter(&memory);
        assert_eq!(memory.offset_of(HIGH_RAM + 5), Some(3072 * MIB + 5));
        assert_eq!(memory.offset_of(HIGH_RAM - 1), None);
        let file = new_file();
        let written = memory.contents(None).write_full(&file, &STAMP).unwrap();
        assert_eq!(written.pages, 2 * (6 + 2) + 1);
        for start in [
            0,
            MIB,
            1535 * MIB,
            1536 * MIB,
            3071 * MIB,
            3072 * MIB,
            3075 * MIB,
        ] {
            let mut bytes = vec![0; MIB as usize];
            file.read_exact_at(&mut bytes, start).unwrap();
            assert!(bytes == expected(&memory, start..start + MIB), "{start:#x}");
        }
    }
}

#[test]
fn full_image_when_a_kernel_is_mapped_holds_it_and_what_the_guest_changed() {
    let bytes: Vec<u8> = (0..100 * 4096u32).map(|i| (i / 4096) as u8).collect();
    let kernel = new_file();
    (&kernel).write_all(&bytes).unwrap();
    let mut memory = Memory::anonymous(8).unwrap();
    scatter(&memory);
    memory
        .map_file(&source(&kernel), 4096, MIB, 98 * 4096)
        .unwrap();
    memory.write(MIB + 5 * PAGE, b"changed").unwrap();
    memory.write(MIB + 9 * PAGE, &[0; 4096]).unwrap();
    let (_, written) = check_full(&memory);
    // Page 500 of `scatter` lies beyond the kernel, which has one page made zero.
    assert_eq!(written.pages, 9 + 98 - 1);
}

#[test]
fn full_image_when_taken_of_a_restored_guest_holds_both_generations() {
    for first in [Memory::anonymous(64).unwrap(), shared(64)] {
        scatter(&first);
        let (file, _) = check_full(&first);
        let restored = Memory::from_image(&source(&file), 64, Pages::Ordinary, false).unwrap();
        // Equal, but for the id, which is now in guest memory too.
        let (again, written) = check_full(&restored);
        assert_eq!(written.pages, 9);
        restored.write(40 * MIB, b"later").unwrap();
        restored.write(0, &[0; 4096]).unwrap();
        let (_, written) = check_full(&restored);
        assert_eq!(written.pages, 9);
        // The image is as it was.
        assert_eq!(read_back(&first, &file), read_back(&first, &again));
    }
}

#[test]
fn full_image_when_the_means_are_poorer_is_the_same() {
    let memory = Memory::anonymous(16).unwrap();
    scatter(&memory);
    let (_, written) = check_full(&memory);
    let contents = memory.contents(None);
    for finder in Finder::each() {
        let file = new_file();
        let mut finder = finder;
        let name = format!("{finder:?}");
        let poorer = contents
            .write(&file, &STAMP, false, |place, window, pages| {
                finder.find(&contents, place, window, pages);
            })
            .unwrap();
        assert_eq!(poorer, written, "{name}");
        assert_eq!(read_back(&memory, &file), written, "{name}");
    }
}

#[test]
fn full_image_when_memory_is_of_huge_pages_is_the_same() {
    let memory = match Memory::new(4, Pages::TwoMib, Backing::Anonymous, false) {
        Ok(memory) => memory,
        Err(error) => return eprintln!("no huge pages here: {error}"),
    };
    scatter(&memory);
    let (file, _) = check_full(&memory);
    drop(memory);
    let restored = Memory::from_image(&source(&file), 4, Pages::TwoMib, false).unwrap();
    check_full(&restored);
}

#[test]
fn full_image_when_pages_are_transparent_is_the_same() {
    let memory = Memory::new(16, Pages::Transparent, Backing::Anonymous, false).unwrap();
    scatter(&memory);
    let (file, _) = check_full(&memory);
    let restored = Memory::from_image(&source(&file), 16, Pages::Transparent, false).unwrap();
    check_full(&restored);
}

#[test]
fn from_image_when_the_length_differs_says_both() {
    let file = new_file();
    file.set_len(4 * MIB - 1).unwrap();
    let error = Memory::from_image(&source(&file), 4, Pages::Ordinary, false).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the memory file image has 4194303 bytes, but the guest's memory has 4194304"
    );
}

#[test]
fn from_image_when_the_guest_writes_the_file_stays_and_is_named_when_cut() {
    let file = new_file();
    file.set_len(4 * MIB).unwrap();
    file.write_all_at(b"frozen", 2 * MIB).unwrap();
    let memory = Memory::from_image(&source(&file), 4, Pages::Ordinary, false).unwrap();
    memory.write(2 * MIB, b"melted").unwrap();
    let mut bytes = [0; 6];
    file.read_exact_at(&mut bytes, 2 * MIB).unwrap();
    assert_eq!(&bytes, b"frozen");
    let host = memory.ram().get_host_address(GuestAddress(MIB)).unwrap();
    let mut name = [0; crate::memory::mapped::NAME_MAX];
    let len = crate::memory::mapped::file_at(host as usize, &mut name).unwrap();
    assert_eq!(&name[..len], b"image");
    assert_eq!(memory.changed_file(), None);
    file.set_len(MIB).unwrap();
    assert_eq!(memory.changed_file(), Some("image"));
}

#[test]
fn private_image_when_nothing_is_tracked_holds_what_was_written_since_the_restore() {
    let first = Memory::anonymous(64).unwrap();
    scatter(&first);
    let (file, _) = check_full(&first);
    let restored = Memory::from_image(&source(&file), 64, Pages::Ordinary, false).unwrap();
    // Read, and so in the page tables, but not written.
    read_back(&restored, &file);
    restored.write(40 * MIB, b"later").unwrap();
    restored.write(0, &[0; 4096]).unwrap();
    let diff = new_file();
    let contents = restored.contents(None);
    let written = contents.write_private(&diff, &STAMP).unwrap();
    let data: Vec<_> = super::super::occupied::data_ranges(&diff, 0..64 * MIB)
        .map(Result::unwrap)
        .collect();
    let page = |offset| offset..offset + PAGE;
    assert_eq!(data, [page(0), page(STAMP.offset), page(40 * MIB)]);
    assert_eq!(written.pages, 3);

    // Where the host tells less there is more, and it is still right.
    for mut finder in Finder::each() {
        let name = format!("{finder:?}");
        let diff = new_file();
        contents
            .write(&diff, &STAMP, true, |place, window, pages| {
                finder.find_own(&contents, place, window, pages);
            })
            .unwrap();
        let mut there = PageSet::new(64 * MIB / PAGE);
        for range in super::super::occupied::data_ranges(&diff, 0..64 * MIB) {
            let range = range.unwrap();
            let mut bytes = vec![0; (range.end - range.start) as usize];
            diff.read_exact_at(&mut bytes, range.start).unwrap();
            assert!(
                bytes == expected(&restored, range.clone()),
                "{name} {range:?}"
            );
            there.insert(range.start / PAGE..range.end / PAGE);
        }
        for range in &data {
            assert!(there.contains(range.start / PAGE), "{name} {range:?}");
        }
    }
}

#[test]
fn diff_image_when_pages_are_given_holds_those_even_if_zero() {
    let memory = Memory::anonymous(130).unwrap();
    scatter(&memory);
    let base = new_file();
    let contents = memory.contents(None);
    let full = contents.write_full(&base, &STAMP).unwrap();

    memory.write(0, &[0; 4096]).unwrap();
    memory.write(100 * MIB, &[7; 4096]).unwrap();
    memory.write(100 * MIB + PAGE, &[8; 8192]).unwrap();
    let mut changed = PageSet::new(130 * MIB / PAGE);
    changed.insert(0..1);
    changed.insert(100 * MIB / PAGE..100 * MIB / PAGE + 3);
    let diff = new_file();
    let stamp = Stamp {
        id: [5; ID_LEN],
        ..STAMP
    };
    let written = contents.write_diff(&diff, &stamp, &changed).unwrap();
    assert_eq!(written.pages, 5);
    assert_eq!(diff.metadata().unwrap().len(), 130 * MIB);

    // Merged by the rule, with the check value kept up on the way.
    let mut check = full.check;
    let mut diff_check: u64 = 0;
    for data in super::super::occupied::data_ranges(&diff, 0..130 * MIB) {
        let data = data.unwrap();
        for offset in (data.start..data.end).step_by(4096) {
            let (mut old, mut new) = ([0; 4096], [0; 4096]);
            base.read_exact_at(&mut old, offset).unwrap();
            diff.read_exact_at(&mut new, offset).unwrap();
            base.write_all_at(&new, offset).unwrap();
            let value = |page: &[u8; 4096]| check::of_page(offset / PAGE, page);
            diff_check = diff_check.wrapping_add(value(&new));
            if !check::is_zero(&old) {
                check = check.wrapping_sub(value(&old));
            }
            if !check::is_zero(&new) {
                check = check.wrapping_add(value(&new));
            }
        }
    }
    assert_eq!(diff_check, written.check);
    let merged = new_file();
    let wanted = contents.write_full(&merged, &stamp).unwrap();
    assert_eq!(check, wanted.check);
    assert_eq!(read_id(&base, STAMP.offset).unwrap(), stamp.id);
    for start in (0..130 * MIB).step_by(MIB as usize) {
        let (mut a, mut b) = (vec![0; MIB as usize], vec![0; MIB as usize]);
        base.read_exact_at(&mut a, start).unwrap();
        merged.read_exact_at(&mut b, start).unwrap();
        assert!(a == b, "{start:#x}");
    }
}
