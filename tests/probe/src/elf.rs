//! Makes the smallest guest's ELF file in memory, at any size.
//!
//! The file has a PVH note and a 64-bit entry, one loadable segment at 1 MiB whose file part is
//! page aligned (a monitor may map it), and nothing else: no sections, no symbols. Padding is
//! incompressible, non-zero data behind the code in the same segment: what a monitor pays for
//! a kernel of that size, with none of the kernel's own work.

use crate::code;
use crate::pattern;

/// What the guest does once it has written its byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Reset through the keyboard controller: the monitor exits.
    Reset,
    /// Halt for ever: the monitor stays.
    Halt,
}

/// Physical address of the segment and of both entries.
const LOAD_ADDRESS: u64 = 0x10_0000;
/// Offset of the segment in the file, equal to the address modulo a page.
const SEGMENT_OFFSET: usize = 0x1000;
const PAGE: usize = 0x1000;
/// Sizes of an ELF header and of a program header.
const EHDR: usize = 64;
const PHDR: usize = 56;
/// Offsets, within the code, of the reset and of the halt behind it.
const RESET_AT: usize = 7;
const HALT_AT: usize = 11;
/// A one-byte instruction that does nothing.
const NOP: u8 = 0x90;
/// XEN_ELFNOTE_PHYS32_ENTRY.
const PHYS32_ENTRY: u32 = 18;

/// A guest that writes `!` to port 0x3f8 with its third instruction, in a file whose segment
/// holds at least `segment_size` bytes (rounded up to whole pages).
pub fn first_byte(end: End, segment_size: usize) -> Vec<u8> {
    let note = note();
    let note_offset = EHDR + 2 * PHDR;
    let segment_size = segment_size.next_multiple_of(PAGE).max(PAGE);
    let mut file = vec![0u8; SEGMENT_OFFSET + segment_size];

    let mut at = 0;
    let mut put = |bytes: &[u8]| {
        file[at..at + bytes.len()].copy_from_slice(bytes);
        at += bytes.len();
    };
    // ELF header: 64 bits, little endian, executable, x86-64.
    put(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    put(&2u16.to_le_bytes());
    put(&62u16.to_le_bytes());
    put(&1u32.to_le_bytes());
    put(&LOAD_ADDRESS.to_le_bytes());
    put(&(EHDR as u64).to_le_bytes());
    put(&0u64.to_le_bytes());
    put(&0u32.to_le_bytes());
    for field in [EHDR as u16, PHDR as u16, 2, 0, 0, 0] {
        put(&field.to_le_bytes());
    }
    // PT_LOAD (1), readable and executable.
    put(&1u32.to_le_bytes());
    put(&5u32.to_le_bytes());
    for field in [
        SEGMENT_OFFSET as u64,
        LOAD_ADDRESS,
        LOAD_ADDRESS,
        segment_size as u64,
        segment_size as u64,
        PAGE as u64,
    ] {
        put(&field.to_le_bytes());
    }
    // PT_NOTE (4), readable.
    put(&4u32.to_le_bytes());
    put(&4u32.to_le_bytes());
    for field in [
        note_offset as u64,
        0,
        0,
        note.len() as u64,
        note.len() as u64,
        4,
    ] {
        put(&field.to_le_bytes());
    }
    put(&note);

    let segment = &mut file[SEGMENT_OFFSET..];
    pattern::fill(1, 0, segment);
    let mut guest = code::RESET;
    if end == End::Halt {
        guest[RESET_AT..HALT_AT].fill(NOP);
    }
    segment[..guest.len()].copy_from_slice(&guest);
    file
}

/// Turns the note headers of any of the guests into nothing, so that a monitor takes the
/// 64-bit Linux entry instead of PVH's.
pub fn without_pvh(file: &mut [u8]) {
    const COUNT_AT: usize = 56;
    const NOTE: [u8; 4] = 4u32.to_le_bytes();
    let count = usize::from(u16::from_le_bytes([file[COUNT_AT], file[COUNT_AT + 1]]));
    for header in file[EHDR..].chunks_mut(PHDR).take(count) {
        if header[..4] == NOTE {
            header[..4].fill(0);
        }
    }
}

/// The PVH note with the segment's address as entry.
fn note() -> Vec<u8> {
    let mut note = Vec::new();
    for field in [4u32, 8, PHYS32_ENTRY] {
        note.extend(field.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend(LOAD_ADDRESS.to_le_bytes());
    note
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_byte_when_small_then_one_page_at_1_mib() {
        let file = first_byte(End::Reset, 0);
        assert_eq!(file.len(), 2 * PAGE);
        assert_eq!(&file[..4], b"\x7fELF");
        assert_eq!(file[24..32], LOAD_ADDRESS.to_le_bytes());
        assert_eq!(file[SEGMENT_OFFSET..][..code::RESET.len()], code::RESET);
    }

    #[test]
    fn without_pvh_when_noted_then_only_the_load_remains() {
        let mut file = first_byte(End::Reset, 0);
        without_pvh(&mut file);
        assert_eq!(file[EHDR], 1);
        assert_eq!(file[EHDR + PHDR], 0);
    }

    #[test]
    fn first_byte_when_20_mib_then_all_of_it_is_file_backed() {
        let size = 20 << 20;
        let file = first_byte(End::Reset, size);
        assert_eq!(file.len(), SEGMENT_OFFSET + size);
        // File and memory sizes of the first program header.
        assert_eq!(file[EHDR + 32..][..8], (size as u64).to_le_bytes());
        assert_eq!(file[EHDR + 40..][..8], (size as u64).to_le_bytes());
    }

    #[test]
    fn first_byte_when_halting_then_the_reset_is_gone() {
        let file = first_byte(End::Halt, 0);
        let guest = &file[SEGMENT_OFFSET..][..code::RESET.len()];
        assert!(!guest.contains(&0x64));
        assert_eq!(guest[..RESET_AT], code::RESET[..RESET_AT]);
        assert_eq!(guest[HALT_AT..], code::RESET[HALT_AT..]);
    }
}
