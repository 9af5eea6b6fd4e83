//! Whether a kernel reads ACPI tables, told from its file, so that what it finds there is not announced
//! to it on the command line as well.
//!
//! A Linux with CONFIG_ACPI and CONFIG_PCI, without which its ACPI does not come up, knows the parameter
//! `acpi_irq_pci=`. Its name is in the section `.init.data` of the `vmlinux`, and no other kernel has that
//! name there. Only the section headers and that section are read, a few hundred KiB. A kernel without
//! section headers, or one that is no Linux, is taken for one without ACPI: it gets the announcements too,
//! as Firecracker gives them to every kernel; a Linux that reads both then complains about each device once
//! and works. What is no ELF file at all (a bzImage, whose content is compressed) is taken for a
//! distribution's kernel: those have ACPI.
//!
//! The file may hold anything: every number is checked, and what is read is bounded.

use super::super::kernel::Kernel;
use crate::memory::Source;

/// The name of the parameter, with what ends it.
const MARK: &[u8] = b"acpi_irq_pci=\0";
/// The section that has it.
const SECTION: &[u8] = b".init.data\0";

/// ELF header and section headers (System V ABI, "ELF Header", "Sections").
const ELF_MAGIC: &[u8] = b"\x7fELF";
const ELF_HEADER: usize = 64;
const SECTION_HEADER: usize = 64;
/// Section headers at most, and bytes of their names; a vmlinux has some 40 and 500.
const SECTIONS_MAX: u64 = 512;
const NAMES_MAX: u64 = 64 * 1024;

/// As much of the section is looked at: after the kernel's own data it holds a built-in initramfs, if
/// there is one.
const SEARCHED_MAX: u64 = 4 << 20;
/// As much is read at a time.
const CHUNK: usize = 128 * 1024;

impl Kernel {
    /// Whether it reads ACPI tables.
    pub fn reads_acpi(&self) -> bool {
        // What cannot be read or makes no sense is not found.
        reads_acpi(&self.source).unwrap_or(false)
    }
}

fn reads_acpi(source: &Source) -> Option<bool> {
    let header: [u8; ELF_HEADER] = array(&read(source, 0, ELF_HEADER as u64)?, 0)?;
    if !header.starts_with(ELF_MAGIC) {
        return Some(true);
    }
    let table = u64::from_le_bytes(array(&header, 40)?);
    let size = u16::from_le_bytes(array(&header, 58)?);
    let count = u64::from(u16::from_le_bytes(array(&header, 60)?));
    let names = usize::from(u16::from_le_bytes(array(&header, 62)?));
    if usize::from(size) != SECTION_HEADER || count > SECTIONS_MAX {
        return None;
    }
    let headers = read(source, table, count.checked_mul(u64::from(size))?)?;
    let headers = || headers.chunks_exact(SECTION_HEADER);
    let (names_at, names_len) = place(headers().nth(names)?)?;
    let names = read(source, names_at, names_len.min(NAMES_MAX))?;
    let section = headers().find(|header| {
        let name = array(header, 0).map(u32::from_le_bytes);
        let name = name.and_then(|at| names.get(usize::try_from(at).ok()?..));
        name.is_some_and(|name| name.starts_with(SECTION))
    });
    let (at, len) = place(section?)?;
    Some(contains_mark(source, at, len.min(SEARCHED_MAX)))
}

/// Where in the file a section is, and its length.
fn place(header: &[u8]) -> Option<(u64, u64)> {
    let at = u64::from_le_bytes(array(header, 24)?);
    Some((at, u64::from_le_bytes(array(header, 32)?)))
}

/// Whether the mark is among the `len` bytes at `offset`, which are read piece by piece.
fn contains_mark(source: &Source, mut offset: u64, len: u64) -> bool {
    let Some(end) = offset.checked_add(len) else {
        return false;
    };
    // Each piece begins with the last bytes of the one before, where the mark may have begun.
    let mut piece = vec![0; CHUNK];
    let mut kept = 0;
    while offset < end {
        let wanted = usize::try_from(end.saturating_sub(offset)).unwrap_or(CHUNK);
        let wanted = wanted.min(CHUNK.saturating_sub(kept));
        let filled = kept.saturating_add(wanted);
        let Some(new) = piece.get_mut(kept..filled) else {
            return false;
        };
        if source.read_exact_at(new, offset).is_err() {
            return false;
        }
        if find_mark(piece.get(..filled).unwrap_or_default()) {
            return true;
        }
        offset = offset.saturating_add(wanted as u64);
        kept = filled.min(MARK.len().saturating_sub(1));
        piece.copy_within(filled.saturating_sub(kept)..filled, 0);
    }
    false
}

/// Whether the mark is in `bytes`. Wherever it is, one of the bytes at multiples of its length belongs to
/// it: only those are looked at, and what is around the few that could.
fn find_mark(bytes: &[u8]) -> bool {
    let mut could = [false; 256];
    for byte in MARK {
        if let Some(entry) = could.get_mut(usize::from(*byte)) {
            // Zeroes are everywhere; see below.
            *entry = *byte != 0;
        }
    }
    let step = MARK.len().saturating_sub(1);
    let candidates = bytes
        .iter()
        .enumerate()
        .skip(step.saturating_sub(1))
        .step_by(step);
    candidates
        .filter(|(_, byte)| could.get(usize::from(**byte)).is_some_and(|could| *could))
        .any(|(at, _)| {
            let first = at.saturating_sub(step);
            let around = bytes.get(first..at.saturating_add(MARK.len()).min(bytes.len()));
            around.is_some_and(|around| around.windows(MARK.len()).any(|window| window == MARK))
        })
}

/// `len` bytes at `offset`, which the caller has bounded.
fn read(source: &Source, offset: u64, len: u64) -> Option<Vec<u8>> {
    if offset.checked_add(len)? > source.len() {
        return None;
    }
    let mut bytes = vec![0; usize::try_from(len).ok()?];
    source.read_exact_at(&mut bytes, offset).ok()?;
    Some(bytes)
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk::<N>().copied()
}

#[cfg(test)]
mod tests {
    use super::super::super::kernel::tests::elf;
    use super::*;
    use std::io::Write;
    use vmm_sys_util::tempfile::TempFile;

    /// An ELF kernel with the sections `names`, whose last one holds `content`.
    fn with_sections(names: &[&str], content: &[u8]) -> Vec<u8> {
        let mut file = elf(&[0x90; 64], 0x10_0000, None);
        let mut strings = vec![0];
        let mut entries: Vec<(usize, usize, usize)> = Vec::new();
        for name in names {
            let at = strings.len();
            strings.extend_from_slice(name.as_bytes());
            strings.push(0);
            entries.push((at, file.len(), content.len()));
        }
        file.extend_from_slice(content);
        entries.push((0, file.len(), strings.len()));
        file.extend_from_slice(&strings);
        let table = file.len() as u64;
        for (name, at, len) in &entries {
            let mut header = [0; SECTION_HEADER];
            header[..4].copy_from_slice(&(*name as u32).to_le_bytes());
            header[24..32].copy_from_slice(&(*at as u64).to_le_bytes());
            header[32..40].copy_from_slice(&(*len as u64).to_le_bytes());
            file.extend_from_slice(&header);
        }
        file[40..48].copy_from_slice(&table.to_le_bytes());
        for (at, value) in [
            (58, 64),
            (60, entries.len() as u16),
            (62, names.len() as u16),
        ] {
            file[at..at + 2].copy_from_slice(&u16::to_le_bytes(value));
        }
        file
    }

    fn source(bytes: &[u8]) -> Source {
        let file = TempFile::new().unwrap();
        file.as_file().write_all(bytes).unwrap();
        Source::new(file.as_file(), "vmlinux").unwrap()
    }

    fn found(bytes: &[u8]) -> bool {
        reads_acpi(&source(bytes)).unwrap_or(false)
    }

    #[test]
    fn kernel_when_its_initial_data_has_the_parameter_reads_acpi() {
        let content = |len: usize, at: usize| {
            let mut content = vec![b'x'; len];
            content[at..at + MARK.len()].copy_from_slice(MARK);
            content
        };
        // At every offset around the ends of pieces, and for every remainder of the search's step.
        for at in (0..40)
            .chain(CHUNK - 25..CHUNK + 25)
            .chain(2 * CHUNK - 40..2 * CHUNK)
        {
            let content = content(2 * CHUNK + 100, at);
            assert!(
                found(&with_sections(&[".text", ".init.data"], &content)),
                "{at}"
            );
        }
        let last = content(5000, 5000 - MARK.len());
        assert!(found(&with_sections(&[".init.data"], &last)));
    }

    #[test]
    fn kernel_when_it_has_no_such_parameter_reads_none() {
        let none = b"acpi=\0acpi_sci=\0acpi_irq_pci\0acpi_irq_pc=\0acpi_irq_pci= \0";
        assert!(!found(&with_sections(&[".init.data"], none)));
        assert!(!found(&with_sections(&[".rodata"], MARK)));
        assert!(!found(&with_sections(&[".init.data.x"], MARK)));
        assert!(!found(&elf(MARK, 0x10_0000, None)));
        assert!(found(&with_sections(&[".init.data"], MARK)));
        assert!(found(&[0; 4096]), "what is no ELF file has ACPI");
    }

    #[test]
    fn kernel_when_any_number_of_its_sections_is_changed_never_panics() {
        let good = with_sections(&[".text", ".init.data"], MARK);
        let table = good.len() - 3 * SECTION_HEADER;
        for at in (0..ELF_HEADER).chain(table..good.len()) {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut bad = good.clone();
                bad[at] = value;
                let _ = found(&bad);
            }
        }
        for len in 0..good.len() {
            // An empty file is no source.
            if len > 0 {
                let _ = found(&good[..len]);
            }
        }
    }
}
