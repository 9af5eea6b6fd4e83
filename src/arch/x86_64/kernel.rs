//! Reading a kernel's headers: an ELF64 `vmlinux`, its segments and its PVH entry; or a bzImage
//! (`bzimage`). The content of the file decides which it is.
//!
//! A client names the file: it may hold anything. Every field is checked before it is used, counts are
//! bounded, and only headers and notes are read: the segments themselves stay in the file until
//! `boot` maps them.
#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

pub(super) mod bzimage;
#[cfg(any(test, fuzzing))]
pub mod fuzz;

use std::error::Error;
use std::fmt;
use std::fs::File;
use std::io;

use self::bzimage::BzImage;
use super::layout;
use crate::memory::Source;

/// `e_ident`: the magic, then 64 bits and little-endian (System V ABI, "ELF Identification").
const ELF_MAGIC: [u8; 4] = *b"\x7fELF";
const ELF_CLASS_AND_ORDER: [u8; 2] = [2, 1];
/// `e_machine` of x86-64.
const ELF_MACHINE: u16 = 62;
const ELF_HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
/// `p_type` of what is loaded, and of notes.
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;

/// As much is read at first: both kinds of header of every kernel seen so far.
const FIRST_READ: u64 = 1024;

/// Program headers at most; a vmlinux has about six.
const PROGRAM_HEADERS_MAX: usize = 64;

/// Bytes of notes looked at in each note segment; a vmlinux has about 500.
const NOTES_MAX: u64 = 64 * 1024;

/// The note that holds the PVH entry (Xen, `public/elfnote.h`).
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
const XEN_NOTE_NAME: &[u8] = b"Xen\0";

/// A kernel whose headers have been read and checked.
#[derive(Debug)]
pub struct Kernel {
    pub(super) source: Source,
    pub(super) segments: Vec<Segment>,
    /// Guest address of the 64-bit entry.
    pub(super) entry: u64,
    /// Guest address of the PVH entry, if the kernel has one.
    pub(super) pvh_entry: Option<u64>,
    /// Present when it is a bzImage.
    pub(super) bzimage: Option<BzImage>,
}

/// One loadable segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    /// Where it begins in the file.
    pub offset: u64,
    /// Guest physical address.
    pub address: u64,
    /// Bytes in the file.
    pub file_len: u64,
    /// First guest address after it, with the zeroed part, or the room to unpack in.
    pub end: u64,
}

/// Why a file is no kernel that can be started.
#[derive(Debug)]
pub struct KernelError {
    name: String,
    reason: Reason,
}

#[derive(Debug)]
enum Reason {
    NotAFile,
    Empty,
    Unrecognised,
    OldProtocol(u16),
    OtherMachine,
    Truncated { needed: u64, len: u64 },
    Malformed(&'static str),
    Low { address: u64 },
    Read(io::Error),
}

impl fmt::Display for KernelError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "kernel {} ", self.name)?;
        match &self.reason {
            Reason::NotAFile => write!(f, "is not a regular file"),
            Reason::Empty => write!(f, "is empty"),
            Reason::Unrecognised => write!(f, "is neither an ELF file (vmlinux) nor a bzImage"),
            Reason::OldProtocol(version) => write!(
                f,
                "has version {}.{} of the Linux boot protocol; 2.12 or newer is needed (Linux 3.8)",
                version >> 8,
                version & 0xff
            ),
            Reason::OtherMachine => write!(f, "is not for 64-bit x86 processors"),
            Reason::Truncated { needed, len } => {
                write!(f, "is truncated: it needs {needed} bytes and has {len}")
            }
            Reason::Malformed(what) => write!(f, "has {what}"),
            Reason::Low { address } => write!(
                f,
                "has a segment at {address:#x}, below {:#x} where RAM for kernels begins",
                layout::HIGH_MEMORY
            ),
            Reason::Read(_) => write!(f, "cannot be read"),
        }
    }
}

impl Error for KernelError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match &self.reason {
            Reason::Read(cause) => Some(cause),
            _ => None,
        }
    }
}

impl Kernel {
    /// Reads and checks the headers of `file`, which errors call `name`. A copy of the descriptor
    /// is kept; the file's position is not moved.
    ///
    /// # Errors
    /// [`KernelError`] when the file is empty, cut short, neither an ELF64 file for x86 nor a
    /// bzImage with a 64-bit entry, or has fields that are invalid.
    pub fn read(file: &File, name: &str) -> Result<Kernel, KernelError> {
        Kernel::parse(file, name).map_err(|reason| KernelError {
            name: name.to_owned(),
            reason,
        })
    }

    /// Where the kernel ends in guest memory.
    pub fn end(&self) -> u64 {
        self.segments.iter().map(|s| s.end).max().unwrap_or(0)
    }

    /// Whether the kernel has a PVH entry.
    #[cfg(test)]
    pub fn has_pvh_entry(&self) -> bool {
        self.pvh_entry.is_some()
    }

    /// Whether `address` lies in a segment.
    pub(super) fn contains(&self, address: u64) -> bool {
        self.segments
            .iter()
            .any(|s| (s.address..s.end).contains(&address))
    }

    fn parse(file: &File, name: &str) -> Result<Kernel, Reason> {
        if !file.metadata().map_err(Reason::Read)?.is_file() {
            return Err(Reason::NotAFile);
        }
        let source = Source::new(file, name).map_err(Reason::Read)?;
        if source.is_empty() {
            return Err(Reason::Empty);
        }
        let start = read(&source, 0, source.len().min(FIRST_READ))?;
        if !start.starts_with(&ELF_MAGIC) {
            return match bzimage::is_bzimage(&start) {
                true => bzimage::parse(source, &start),
                false => Err(Reason::Unrecognised),
            };
        }
        let Some(header) = start.first_chunk::<ELF_HEADER>() else {
            return Err(Reason::Truncated {
                needed: ELF_HEADER as u64,
                len: source.len(),
            });
        };
        // Field offsets: System V ABI, "ELF header".
        if array_at(header, 4) != ELF_CLASS_AND_ORDER || u16_at(header, 18) != ELF_MACHINE {
            return Err(Reason::OtherMachine);
        }
        let entry = u64_at(header, 24);
        let table = u64_at(header, 32);
        if usize::from(u16_at(header, 54)) != PROGRAM_HEADER {
            return Err(Reason::Malformed("program headers of an unknown size"));
        }
        let count = usize::from(u16_at(header, 56));
        if count > PROGRAM_HEADERS_MAX {
            return Err(Reason::Malformed("too many program headers (64 at most)"));
        }
        let table_len = count.saturating_mul(PROGRAM_HEADER);
        let headers = read_after(&source, &start, table, table_len as u64)?;

        let mut segments = Vec::new();
        let mut pvh_entry = None;
        for header in headers.chunks_exact(PROGRAM_HEADER) {
            let kind = u32_at(header, 0);
            let offset = u64_at(header, 8);
            let file_len = u64_at(header, 32);
            if kind == PT_LOAD {
                segments.extend(segment(header, source.len())?);
            } else if kind == PT_NOTE && pvh_entry.is_none() {
                let notes = read(&source, offset, file_len.min(NOTES_MAX))?;
                // Padded to 4 bytes, by some linkers to 8.
                pvh_entry = find_pvh_entry(&notes, 4).or_else(|| find_pvh_entry(&notes, 8));
            }
        }
        if segments.is_empty() {
            return Err(Reason::Malformed("no segment to load"));
        }
        if contents_overlap(&segments) {
            return Err(Reason::Malformed("segments with content for one address"));
        }
        Ok(Kernel {
            source,
            segments,
            entry,
            pvh_entry,
            bzimage: None,
        })
    }
}

/// Checks a PT_LOAD header; `None` when the segment is empty.
fn segment(header: &[u8], file_size: u64) -> Result<Option<Segment>, Reason> {
    // Field offsets: System V ABI, "Program header".
    let offset = u64_at(header, 8);
    let address = u64_at(header, 24);
    let file_len = u64_at(header, 32);
    let memory_len = u64_at(header, 40);
    if memory_len == 0 && file_len == 0 {
        return Ok(None);
    }
    if file_len > memory_len {
        return Err(Reason::Malformed(
            "a segment that is longer in the file than in memory",
        ));
    }
    let wraps = Reason::Malformed("a segment that ends past the last address");
    let Some(end) = address.checked_add(memory_len) else {
        return Err(wraps);
    };
    let Some(needed) = offset.checked_add(file_len) else {
        return Err(wraps);
    };
    if needed > file_size {
        return Err(Reason::Truncated {
            needed,
            len: file_size,
        });
    }
    if address < layout::HIGH_MEMORY {
        return Err(Reason::Low { address });
    }
    Ok(Some(Segment {
        offset,
        address,
        file_len,
        end,
    }))
}

/// Whether two segments have content for one address: no linker makes such, and a file that has could
/// have one piece of itself loaded again and again.
fn contents_overlap(segments: &[Segment]) -> bool {
    let content = |s: &Segment| (s.address, s.address.saturating_add(s.file_len));
    let with_content = segments.iter().filter(|s| s.file_len > 0);
    let mut contents: Vec<(u64, u64)> = with_content.map(content).collect();
    contents.sort_unstable();
    let mut pairs = contents.windows(2);
    pairs.any(|pair| matches!(pair, [(_, end), (next, _)] if end > next))
}

/// The PVH entry among the notes of one segment, whose names and contents end at multiples of
/// `alignment`. What does not parse ends the search.
fn find_pvh_entry(mut notes: &[u8], alignment: usize) -> Option<u64> {
    let padded = |len: u32| {
        usize::try_from(len)
            .ok()?
            .checked_next_multiple_of(alignment)
    };
    while let Some((header, rest)) = notes.split_at_checked(12) {
        let name_len = u32_at(header, 0);
        let content_len = u32_at(header, 4);
        let kind = u32_at(header, 8);
        // The header is 12 bytes: the name is padded as seen from the note's beginning.
        let name_end = padded(name_len.checked_add(12)?)?.checked_sub(12)?;
        let (name, rest) = rest.split_at_checked(name_end)?;
        if kind == XEN_ELFNOTE_PHYS32_ENTRY
            && name_len as usize == XEN_NOTE_NAME.len()
            && name.starts_with(XEN_NOTE_NAME)
        {
            // 32 bits by the specification; Linux writes a pointer of 64.
            let content = rest.get(..content_len as usize)?;
            return match content.len() {
                4 => Some(u64::from(u32_at(content, 0))),
                8 => Some(u64_at(content, 0)),
                _ => None,
            };
        }
        notes = rest.get(padded(content_len)?..)?;
    }
    None
}

/// `len` bytes at `offset`, of which the beginning of the file is there already.
fn read_after(source: &Source, start: &[u8], offset: u64, len: u64) -> Result<Vec<u8>, Reason> {
    let here = usize::try_from(offset)
        .ok()
        .zip(usize::try_from(len).ok())
        .and_then(|(offset, len)| start.get(offset..offset.checked_add(len)?));
    match here {
        Some(bytes) => Ok(bytes.to_vec()),
        None => read(source, offset, len),
    }
}

/// Reads `len` bytes, which the caller has bounded, at `offset`.
fn read(source: &Source, offset: u64, len: u64) -> Result<Vec<u8>, Reason> {
    let needed = offset
        .checked_add(len)
        .ok_or(Reason::Malformed("headers past the last offset"))?;
    if needed > source.len() {
        return Err(Reason::Truncated {
            needed,
            len: source.len(),
        });
    }
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    source
        .read_exact_at(&mut bytes, offset)
        .map_err(Reason::Read)?;
    Ok(bytes)
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array_at(bytes, at))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array_at(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array_at(bytes, at))
}

/// `N` bytes at a fixed offset of a header whose length has been checked; zeroes if it was not.
fn array_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes
        .get(at..)
        .and_then(|rest| rest.first_chunk::<N>())
        .copied()
        .unwrap_or([0; N])
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::io::Write;
    use vmm_sys_util::tempfile::TempFile;

    /// An ELF file with one segment of `code` for `address`, entered at its beginning, and a PVH
    /// note with the entry `pvh` if there is one.
    pub fn elf(code: &[u8], address: u64, pvh: Option<&[u8]>) -> Vec<u8> {
        let note = pvh.map_or(vec![], |content| {
            // First a note of another owner, with lengths that need padding.
            let mut note = Vec::new();
            for word in [6u32, 5, 18] {
                note.extend_from_slice(&word.to_le_bytes());
            }
            note.extend_from_slice(b"Linux\0\0\0hello\0\0\0");
            for word in [4, content.len() as u32, 18] {
                note.extend_from_slice(&word.to_le_bytes());
            }
            note.extend_from_slice(b"Xen\0");
            note.extend_from_slice(content);
            note
        });
        let notes_at = 64 + 2 * 56;
        let code_at = (notes_at + note.len() as u64).next_multiple_of(4096);
        let mut file = Vec::new();
        file.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
        for half in [2u16, 62] {
            file.extend_from_slice(&half.to_le_bytes());
        }
        file.extend_from_slice(&1u32.to_le_bytes());
        for long in [address, 64, 0] {
            file.extend_from_slice(&long.to_le_bytes());
        }
        file.extend_from_slice(&0u32.to_le_bytes());
        for half in [64u16, 56, 2, 0, 0, 0] {
            file.extend_from_slice(&half.to_le_bytes());
        }
        let len = code.len() as u64;
        for (kind, offset, address, len) in [
            (PT_NOTE, notes_at, 0, note.len() as u64),
            (PT_LOAD, code_at, address, len),
        ] {
            file.extend_from_slice(&kind.to_le_bytes());
            file.extend_from_slice(&7u32.to_le_bytes());
            for long in [offset, address, address, len, len, 4] {
                file.extend_from_slice(&long.to_le_bytes());
            }
        }
        file.extend_from_slice(&note);
        file.resize(code_at as usize, 0);
        file.extend_from_slice(code);
        file
    }

    pub fn read_bytes(bytes: &[u8]) -> Result<Kernel, KernelError> {
        let file = TempFile::new().unwrap();
        file.as_file().write_all(bytes).unwrap();
        Kernel::read(file.as_file(), "vmlinux")
    }

    fn error(bytes: &[u8]) -> String {
        read_bytes(bytes).unwrap_err().to_string()
    }

    #[test]
    fn read_when_pvh_note_is_there_finds_its_entry() {
        for pvh in [&0x10_0040u32.to_le_bytes()[..], &0x10_0040u64.to_le_bytes()] {
            let kernel = read_bytes(&elf(&[0x90; 5000], 0x10_0000, Some(pvh))).unwrap();
            assert_eq!(kernel.pvh_entry, Some(0x10_0040));
            assert_eq!(kernel.entry, 0x10_0000);
            assert_eq!(kernel.end(), 0x10_0000 + 5000);
            assert_eq!(kernel.segments.len(), 1);
        }
    }

    #[test]
    fn read_when_note_is_missing_or_odd_has_no_pvh_entry() {
        for pvh in [None, Some(&[1u8, 2][..]), Some(&[])] {
            let kernel = read_bytes(&elf(&[0x90; 50], 0x10_0000, pvh)).unwrap();
            assert!(!kernel.has_pvh_entry());
        }
    }

    #[test]
    fn read_when_file_is_no_kernel_says_why() {
        let good = elf(&[0x90; 5000], 0x10_0000, None);
        let with = |at: usize, bytes: &[u8]| {
            let mut bad = good.clone();
            bad[at..at + bytes.len()].copy_from_slice(bytes);
            error(&bad)
        };
        assert_eq!(error(b""), "kernel vmlinux is empty");
        assert_eq!(
            error(b"#!/bin/sh"),
            "kernel vmlinux is neither an ELF file (vmlinux) nor a bzImage"
        );
        assert_eq!(
            error(&good[..40]),
            "kernel vmlinux is truncated: it needs 64 bytes and has 40"
        );
        assert_eq!(
            error(&good[..100]),
            "kernel vmlinux is truncated: it needs 176 bytes and has 100"
        );
        assert_eq!(
            error(&good[..8000]),
            "kernel vmlinux is truncated: it needs 9096 bytes and has 8000"
        );
        let mut bzimage = vec![0; 4096];
        bzimage[0x202..0x206].copy_from_slice(b"HdrS");
        assert!(error(&bzimage).contains("version 0.0 of the Linux boot protocol"));
        let other = "kernel vmlinux is not for 64-bit x86 processors";
        assert_eq!(with(4, &[1]), other);
        assert_eq!(with(5, &[2]), other);
        assert_eq!(with(18, &[183]), other);
        assert!(with(54, &[32]).ends_with("program headers of an unknown size"));
        assert!(with(56, &[0xff, 0xff]).ends_with("too many program headers (64 at most)"));
        assert!(with(56, &[0, 0]).ends_with("no segment to load"));
        assert!(with(32, &[0xff; 8]).ends_with("headers past the last offset"));
        // The second program header: offset, address, file size, memory size.
        let load = 64 + 56;
        assert!(with(load + 8, &[0xff; 8]).ends_with("past the last address"));
        assert!(with(load + 24, &[0xff; 8]).ends_with("past the last address"));
        assert!(with(load + 24, &0x9_0000u64.to_le_bytes()).contains("segment at 0x90000, below"));
        assert!(with(load + 40, &4999u64.to_le_bytes()).contains("longer in the file"));
        // The first: length of the notes.
        assert!(with(64 + 32, &[0xff, 0xff]).contains("truncated"));
    }

    #[test]
    fn read_when_two_segments_have_content_for_one_address_says_so() {
        // The second program header is put in the place of the first as well.
        let mut file = elf(&[0x90; 5000], 0x10_0000, None);
        file.copy_within(64 + 56..64 + 2 * 56, 64);
        for (address, expected) in [
            (0x10_0000u64, false),
            (0x10_1387, false),
            (0x10_1388, true),
            (0x20_0000, true),
        ] {
            file[64 + 24..64 + 32].copy_from_slice(&address.to_le_bytes());
            match read_bytes(&file) {
                Ok(_) => assert!(expected, "{address:#x}"),
                Err(error) => {
                    assert!(!expected, "{address:#x}");
                    let error = error.to_string();
                    assert!(error.ends_with("segments with content for one address"));
                }
            }
        }
    }

    #[test]
    fn read_when_any_header_byte_is_changed_never_panics() {
        let good = elf(&[0x90; 100], 0x10_0000, Some(&0x10_0000u32.to_le_bytes()));
        for at in 0..300 {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut bad = good.clone();
                bad[at] = value;
                let _ = read_bytes(&bad);
            }
        }
    }

    #[test]
    fn read_when_it_is_a_directory_says_so() {
        let directory = File::open("/").unwrap();
        let error = Kernel::read(&directory, "/").unwrap_err();
        assert_eq!(error.to_string(), "kernel / is not a regular file");
    }
}
