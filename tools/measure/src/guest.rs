//! The guests of the measurements: ELF files made here byte by byte.
//!
//! A guest has one loadable segment at 1 MiB, an ELF note that offers the PVH entry, and an ELF entry for the 64-bit
//! boot protocol. Both entries are the same address: the instructions below are encoded alike in 32-bit protected mode
//! and in 64-bit mode, use no stack and touch no memory outside the segment.

/// The byte a guest writes to the serial port first. It occurs in no UTF-8 text, so a monitor's log line on the same
/// stream cannot be taken for it.
pub const MARKER: u8 = 0xf7;

/// Guest-physical address of the segment.
pub const LOAD_AT: u32 = 0x10_0000;

/// Stands in the segment's first page; by it a guest's memory is found among a monitor's mappings.
pub const SIGNATURE: &[u8; 16] = b"mayfly-guest-ram";

/// Bytes of the segment of a [`Size::Large`] guest: what an uncompressed Linux kernel weighs.
pub const LARGE: usize = 20 << 20;

/// Bytes of a page.
pub const PAGE: usize = 4096;

const EHDR_LEN: usize = 64;
const PHDR_LEN: usize = 56;
const NOTE_AT: usize = EHDR_LEN + 2 * PHDR_LEN;
/// Header (three words), name "Xen\0", and an address of eight bytes.
const NOTE_LEN: usize = 12 + 4 + 8;
/// Where the code of a tiny guest stands in its file, which is loaded whole.
const TINY_CODE_AT: usize = NOTE_AT + NOTE_LEN + 8;

const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// `XEN_ELFNOTE_PHYS32_ENTRY`: the note's address is the PVH entry point.
const NOTE_PHYS32_ENTRY: u32 = 18;

/// Bytes of a line that a printing guest writes, its end included.
pub const LINE: u32 = 64;

/// How much there is to load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// A file of a few hundred bytes.
    Tiny,
    /// [`LARGE`] bytes of data without a zero page, page-aligned in the file and in memory.
    Large,
}

/// What the guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// Writes the marker, then resets the machine through the keyboard controller.
    Reset,
    /// Writes the marker, then halts for ever.
    Stay,
    /// Reads a byte of each of its pages, writes the marker, then halts for ever.
    ReadAndStay,
    /// Writes the marker and so many lines, then halts for ever.
    PrintAndStay(u32),
    /// Writes the marker and so many lines, then resets the machine.
    PrintAndReset(u32),
}

/// A guest, ready to be written to a file.
#[derive(Debug)]
pub struct Image {
    /// The ELF file.
    pub file: Vec<u8>,
    /// Guest-physical address of [`SIGNATURE`].
    pub signature_at: u64,
}

/// Makes a guest.
pub fn image(size: Size, task: Task) -> Image {
    let code = code(size, task);
    let (offset, entry_in_file, file_len) = match size {
        Size::Tiny => (0, TINY_CODE_AT, TINY_CODE_AT + code.len() + SIGNATURE.len()),
        Size::Large => (PAGE, PAGE, PAGE + LARGE),
    };
    let entry = u64::from(LOAD_AT) + (entry_in_file - offset) as u64;
    let signature_in_file = entry_in_file + code.len();

    let mut file = Vec::with_capacity(file_len);
    file.extend(elf_header(entry));
    let segment_len = (file_len - offset) as u64;
    let align = if size == Size::Large { PAGE } else { 1 };
    file.extend(program_header(
        PT_LOAD,
        offset as u64,
        u64::from(LOAD_AT),
        segment_len,
        align as u64,
    ));
    file.extend(program_header(
        PT_NOTE,
        NOTE_AT as u64,
        0,
        NOTE_LEN as u64,
        4,
    ));
    file.extend(pvh_note(entry));
    file.resize(entry_in_file, 0);
    file.extend(&code);
    file.extend(SIGNATURE);
    let tail = file_len - file.len();
    file.extend(noise().take(tail));
    Image {
        file,
        signature_at: u64::from(LOAD_AT) + (signature_in_file - offset) as u64,
    }
}

/// The instructions alone: they run at any address.
pub fn instructions(task: Task) -> Vec<u8> {
    code(Size::Tiny, task)
}

fn code(size: Size, task: Task) -> Vec<u8> {
    let mut code = Vec::new();
    if task == Task::ReadAndStay {
        let pages = match size {
            Size::Tiny => 1,
            Size::Large => LARGE / PAGE,
        };
        code.push(0xbe); // mov esi, LOAD_AT
        code.extend(LOAD_AT.to_le_bytes());
        code.push(0xb9); // mov ecx, pages
        code.extend((pages as u32).to_le_bytes());
        code.extend([0x8a, 0x06]); // next: mov al, [esi]
        code.extend([0x81, 0xc6]); // add esi, PAGE
        code.extend((PAGE as u32).to_le_bytes());
        code.extend([0xff, 0xc9]); // dec ecx
        code.extend([0x75, 0xf4]); // jnz next
    }
    code.extend([0x66, 0xba, 0xf8, 0x03]); // mov dx, 0x3f8
    code.extend([0xb0, MARKER]); // mov al, MARKER
    code.push(0xee); // out dx, al
    if let Task::PrintAndStay(lines) | Task::PrintAndReset(lines) = task {
        code.push(0xbe); // mov esi, lines
        code.extend(lines.to_le_bytes());
        code.push(0xb9); // line: mov ecx, LINE - 2
        code.extend((LINE - 2).to_le_bytes());
        code.extend([0xb0, b'x']); // mov al, 'x'
        code.push(0xee); // character: out dx, al
        code.extend([0xff, 0xc9]); // dec ecx
        code.extend([0x75, 0xfb]); // jnz character
        code.extend([0xb0, b'\r', 0xee]); // mov al, '\r'; out dx, al
        code.extend([0xb0, b'\n', 0xee]); // mov al, '\n'; out dx, al
        code.extend([0xff, 0xce]); // dec esi
        code.extend([0x75, 0xea]); // jnz line
    }
    if matches!(task, Task::Reset | Task::PrintAndReset(_)) {
        code.extend([0xb0, 0xfe]); // mov al, 0xfe: pulse the reset line
        code.extend([0xe6, 0x64]); // out 0x64, al
    }
    code.push(0xf4); // halt: hlt (interrupts are off at both entries)
    code.extend([0xeb, 0xfd]); // jmp halt
    code
}

fn elf_header(entry: u64) -> Vec<u8> {
    let mut header = Vec::with_capacity(EHDR_LEN);
    header.extend(b"\x7fELF");
    header.extend([2, 1, 1, 0]); // 64-bit, little-endian, version 1, System V
    header.extend([0; 8]);
    header.extend(2_u16.to_le_bytes()); // ET_EXEC
    header.extend(62_u16.to_le_bytes()); // EM_X86_64
    header.extend(1_u32.to_le_bytes());
    header.extend(entry.to_le_bytes());
    header.extend((EHDR_LEN as u64).to_le_bytes()); // program headers follow at once
    header.extend(0_u64.to_le_bytes()); // no sections
    header.extend(0_u32.to_le_bytes());
    header.extend((EHDR_LEN as u16).to_le_bytes());
    header.extend((PHDR_LEN as u16).to_le_bytes());
    header.extend(2_u16.to_le_bytes());
    header.extend([0; 6]); // section header size, count, names
    header
}

fn program_header(kind: u32, offset: u64, address: u64, len: u64, align: u64) -> Vec<u8> {
    let mut header = Vec::with_capacity(PHDR_LEN);
    header.extend(kind.to_le_bytes());
    header.extend(7_u32.to_le_bytes()); // readable, writable, executable
    for field in [offset, address, address, len, len, align] {
        header.extend(field.to_le_bytes());
    }
    header
}

fn pvh_note(entry: u64) -> Vec<u8> {
    let mut note = Vec::with_capacity(NOTE_LEN);
    note.extend(4_u32.to_le_bytes()); // length of the name
    note.extend(8_u32.to_le_bytes()); // length of the address
    note.extend(NOTE_PHYS32_ENTRY.to_le_bytes());
    note.extend(b"Xen\0");
    note.extend(entry.to_le_bytes());
    note
}

/// Bytes without two pages alike (xorshift64), so that nothing between file and guest can merge or skip them.
fn noise() -> impl Iterator<Item = u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    })
    .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [(Size, Task); 6] = [
        (Size::Tiny, Task::Reset),
        (Size::Tiny, Task::Stay),
        (Size::Tiny, Task::ReadAndStay),
        (Size::Large, Task::Reset),
        (Size::Large, Task::Stay),
        (Size::Large, Task::ReadAndStay),
    ];

    fn u64_at(file: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(file[at..at + 8].try_into().unwrap())
    }

    fn u32_at(file: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(file[at..at + 4].try_into().unwrap())
    }

    /// File offset of a guest-physical address, by the first program header.
    fn offset_of(file: &[u8], address: u64) -> usize {
        (address - u64_at(file, EHDR_LEN + 24) + u64_at(file, EHDR_LEN + 8)) as usize
    }

    #[test]
    fn segment_when_made_covers_the_rest_of_the_file() {
        for (size, task) in ALL {
            let file = image(size, task).file;
            assert_eq!(u32_at(&file, EHDR_LEN), PT_LOAD);
            let end = u64_at(&file, EHDR_LEN + 8) + u64_at(&file, EHDR_LEN + 32);
            assert_eq!(end, file.len() as u64);
        }
    }

    #[test]
    fn entries_when_read_back_are_the_first_instruction() {
        for (size, task) in ALL {
            let file = image(size, task).file;
            let entry = u64_at(&file, 24);
            let note_at = u64_at(&file, EHDR_LEN + PHDR_LEN + 8) as usize;
            assert_eq!(u32_at(&file, note_at + 8), NOTE_PHYS32_ENTRY);
            assert_eq!(&file[note_at + 12..note_at + 16], b"Xen\0");
            assert_eq!(u64_at(&file, note_at + 16), entry);
            let code = code(size, task);
            let at = offset_of(&file, entry);
            assert_eq!(&file[at..at + code.len()], &code[..]);
        }
    }

    #[test]
    fn signature_when_looked_for_is_where_the_image_says() {
        for (size, task) in ALL {
            let image = image(size, task);
            let at = offset_of(&image.file, image.signature_at);
            assert_eq!(&image.file[at..at + SIGNATURE.len()], SIGNATURE);
            assert!(image.signature_at < u64::from(LOAD_AT) + PAGE as u64);
        }
    }

    #[test]
    fn tiny_when_made_is_a_few_hundred_bytes() {
        assert!(image(Size::Tiny, Task::ReadAndStay).file.len() < 400);
    }

    #[test]
    fn large_when_made_is_page_aligned_without_a_zero_page() {
        let file = image(Size::Large, Task::Reset).file;
        assert_eq!(file.len(), PAGE + LARGE);
        assert_eq!(u64_at(&file, EHDR_LEN + 8), PAGE as u64);
        assert!(
            file.chunks(PAGE)
                .all(|page| page.iter().any(|byte| *byte != 0))
        );
    }

    #[test]
    fn jumps_of_a_printing_guest_reach_its_line_and_its_character() {
        let code = code(Size::Tiny, Task::PrintAndStay(3));
        let line = code.iter().position(|byte| *byte == 0xb9).unwrap();
        let character = line + 7;
        assert_eq!(code[character], 0xee);
        let targets: Vec<i64> = (character..code.len() - 2)
            .filter(|at| code[*at] == 0x75)
            .map(|at| at as i64 + 2 + i64::from(code[at + 1] as i8))
            .collect();
        assert_eq!(targets, [character as i64, line as i64]);
    }

    #[test]
    fn jump_of_the_reading_loop_when_taken_reaches_the_load() {
        let code = code(Size::Large, Task::ReadAndStay);
        let load = code.windows(2).position(|two| two == [0x8a, 0x06]).unwrap();
        let jump = code.windows(2).position(|two| two == [0x75, 0xf4]).unwrap();
        assert_eq!(
            jump as i64 + 2 + i64::from(code[jump + 1] as i8),
            load as i64
        );
    }
}
