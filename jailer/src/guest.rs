//! The built-in guest of `check`: an ELF file of a few hundred bytes, made here byte by byte.
//!
//! It writes a byte to the serial port, waits until one is typed, and resets its machine: enough to
//! prove a start, the console both ways and an orderly end. Every instruction is encoded alike in
//! 32-bit protected mode and in 64-bit mode, so that one sequence serves as PVH entry and as 64-bit
//! entry; it uses no stack and no memory.

/// Guest-physical address the file is loaded at.
const LOAD_AT: u64 = 0x10_0000;

const HEADER: usize = 64;
const SEGMENT_HEADER: usize = 56;
const NOTE_AT: usize = HEADER + 2 * SEGMENT_HEADER;
/// Three words, the name "Xen\0" and an address of eight bytes.
const NOTE: usize = 12 + 4 + 8;
const CODE_AT: usize = NOTE_AT + NOTE;

/// `PT_LOAD` and `PT_NOTE` of elf.h.
const LOAD: u32 = 1;
const NOTES: u32 = 4;
/// `XEN_ELFNOTE_PHYS32_ENTRY`: the note holds the PVH entry point.
const PVH_ENTRY: u32 = 18;

const CODE: [u8; 28] = [
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8: the serial port's data
    0xb0, b'!', // mov al, '!'
    0xee, // out dx, al
    0xb2, 0xfd, // mov dl, 0xfd: its line status
    0xec, // wait: in al, dx
    0xa8, 0x01, // test al, 1: a byte is there
    0x74, 0xfb, // jz wait
    0xb2, 0xf8, // mov dl, 0xf8
    0xec, // in al, dx
    0xee, // out dx, al: back to where it came from
    0xb0, 0xfe, // mov al, 0xfe: pulse the reset line
    0xe6, 0x64, // out 0x64, al
    0xf4, // halt: hlt
    0xeb, 0xfd, // jmp halt
    0x90, 0x90, 0x90, // to a round size
];

/// The file.
pub fn image() -> Vec<u8> {
    let entry = LOAD_AT + CODE_AT as u64;
    let size = (CODE_AT + CODE.len()) as u64;
    let mut file = Vec::with_capacity(CODE_AT + CODE.len());
    // 64-bit, little-endian, version 1, System V
    file.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    for (value, bytes) in [
        (2, 2),  // an executable
        (62, 2), // for x86_64
        (1, 4),
        (entry, 8),
        (HEADER as u64, 8), // segment headers follow
        (0, 8),             // no sections
        (0, 4),
        (HEADER as u64, 2),
        (SEGMENT_HEADER as u64, 2),
        (2, 2),
        (0, 6),
    ] {
        file.extend(&u64::to_le_bytes(value)[..bytes]);
    }
    for (kind, at, address, size, align) in [
        (LOAD, 0, LOAD_AT, size, 1),
        (NOTES, NOTE_AT as u64, 0, NOTE as u64, 4),
    ] {
        // Readable, writable, executable.
        file.extend([kind.to_le_bytes(), 7_u32.to_le_bytes()].concat());
        for value in [at, address, address, size, size, align] {
            file.extend(u64::to_le_bytes(value));
        }
    }
    for word in [4, 8, PVH_ENTRY] {
        file.extend(word.to_le_bytes());
    }
    file.extend(b"Xen\0");
    file.extend(entry.to_le_bytes());
    file.extend(CODE);
    file
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn image_has_its_parts_where_its_headers_say() {
        let image = image();
        assert_eq!(image.len(), CODE_AT + CODE.len());
        assert!(image.len() < 300);
        assert_eq!(image[24..32], (LOAD_AT + CODE_AT as u64).to_le_bytes());
        assert_eq!(&image[NOTE_AT + 12..NOTE_AT + 16], b"Xen\0");
        assert_eq!(&image[CODE_AT..CODE_AT + 4], &CODE[..4]);
    }
}
