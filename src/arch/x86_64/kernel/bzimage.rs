//! Reading a bzImage's setup header, and where such a kernel goes (Linux,
//! `Documentation/arch/x86/boot.rst`).
//!
//! What is loaded of the file is the part after the setup sectors: a program that unpacks the
//! kernel to [`Segment::address`], and needs [`HEADER_INIT_SIZE`] bytes from there for that. All of
//! these bytes are the segment, so that nothing else is put there.
#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use super::{Kernel, Reason, Segment, array_at, u16_at, u32_at, u64_at};
use crate::arch::layout;
use crate::memory::Source;

/// `HdrS` marks a bzImage, at this offset.
const MAGIC_AT: usize = 0x202;
const MAGIC: [u8; 4] = *b"HdrS";

// Fields of the setup header, by their offset in the file and in the zero page.
/// How many sectors of 512 bytes follow the first; 0 stands for 4.
const SETUP_SECTS: usize = 0x1f1;
/// Length of the part that is loaded, in units of 16 bytes.
const SYSSIZE: usize = 0x1f4;
/// The header ends this many bytes after [`MAGIC_AT`].
const JUMP_LENGTH: usize = 0x201;
const VERSION: usize = 0x206;
const LOADFLAGS: usize = 0x211;
const INITRD_ADDR_MAX: usize = 0x22c;
const KERNEL_ALIGNMENT: usize = 0x230;
const RELOCATABLE_KERNEL: usize = 0x234;
const XLOADFLAGS: usize = 0x236;
const CMDLINE_SIZE: usize = 0x238;
const PREF_ADDRESS: usize = 0x258;
/// Bytes that the kernel needs from its address on, until it has unpacked itself.
const HEADER_INIT_SIZE: usize = 0x260;

/// The first version with `xloadflags` (Linux 3.8).
const VERSION_MIN: u16 = 0x020c;
/// `loadflags`: loaded at 1 MiB or above, as every bzImage is and no zImage.
const LOADED_HIGH: u8 = 1;
/// `xloadflags`: has a 64-bit entry.
const XLF_KERNEL_64: u16 = 1;
/// Where that entry is.
const ENTRY_64: u64 = 0x200;

/// A setup header of today ends at 0x26c; the zero page has something else from here on.
const HEADER_END_MAX: usize = 0x290;
/// The last field that is read ends here.
const HEADER_END_MIN: usize = HEADER_INIT_SIZE + 4;
/// Where a setup header begins, in the file and in the zero page.
pub const HEADER_AT: usize = SETUP_SECTS;

/// What is to be known of a bzImage besides its segment.
#[derive(Debug)]
pub struct BzImage {
    /// The setup header: for the zero page, at [`HEADER_AT`].
    pub header: Vec<u8>,
    /// First address that is too high for an initrd.
    pub initrd_limit: u64,
    /// Longest command line, the closing zero not counted.
    pub command_line_max: u64,
}

/// Whether the file that begins with `start` is a bzImage.
pub(super) fn is_bzimage(start: &[u8]) -> bool {
    start
        .get(MAGIC_AT..)
        .is_some_and(|rest| rest.starts_with(&MAGIC))
}

/// Reads the header of the bzImage `source`, which begins with `start`.
pub(super) fn parse(source: Source, start: &[u8]) -> Result<Kernel, Reason> {
    let jump = usize::from(u8_at(start, JUMP_LENGTH));
    let header_end = MAGIC_AT.saturating_add(jump).min(HEADER_END_MAX);
    let version = u16_at(start, VERSION);
    if version < VERSION_MIN {
        return Err(Reason::OldProtocol(version));
    }
    if u8_at(start, LOADFLAGS) & LOADED_HIGH == 0 {
        return Err(Reason::Malformed(
            "the flag of a zImage (LOADED_HIGH is not set): only a bzImage can be booted",
        ));
    }
    if u16_at(start, XLOADFLAGS) & XLF_KERNEL_64 == 0 {
        return Err(Reason::Malformed(
            "no 64-bit entry: it is for 32-bit processors",
        ));
    }
    if header_end < HEADER_END_MIN || start.len() < header_end {
        return Err(Reason::Malformed("a setup header that is too short"));
    }
    let header = start.get(HEADER_AT..header_end).unwrap_or_default();

    let sectors = match u8_at(start, SETUP_SECTS) {
        0 => 4,
        sectors => u64::from(sectors),
    };
    let offset = sectors.saturating_add(1).saturating_mul(512);
    let file_len = u64::from(u32_at(start, SYSSIZE)).saturating_mul(16);
    let needed = offset.saturating_add(file_len);
    if needed > source.len() {
        return Err(Reason::Truncated {
            needed,
            len: source.len(),
        });
    }
    let init_size = u64::from(u32_at(start, HEADER_INIT_SIZE));
    // It is moved to the end of this area, and unpacked to its beginning.
    if file_len <= ENTRY_64 || file_len > init_size {
        return Err(Reason::Malformed(
            "a setup header in which syssize and init_size contradict each other",
        ));
    }
    let address = address(start)?;
    let Some(end) = address.checked_add(init_size) else {
        return Err(Reason::Malformed("an address past the last one"));
    };
    // The entry is checked against the segment like any other.
    let entry = address.saturating_add(ENTRY_64);
    Ok(Kernel {
        segments: vec![Segment {
            offset,
            address,
            file_len,
            end,
        }],
        entry,
        pvh_entry: None,
        bzimage: Some(BzImage {
            header: header.to_vec(),
            initrd_limit: u64::from(u32_at(start, INITRD_ADDR_MAX)).saturating_add(1),
            command_line_max: u64::from(u32_at(start, CMDLINE_SIZE)),
        }),
        source,
    })
}

/// Where the kernel is loaded: where it prefers to be. Linux never runs below that, and one that
/// is not relocatable nowhere else.
fn address(start: &[u8]) -> Result<u64, Reason> {
    let preferred = u64_at(start, PREF_ADDRESS);
    if u8_at(start, RELOCATABLE_KERNEL) == 0 {
        return match preferred < layout::HIGH_MEMORY {
            true => Err(Reason::Malformed(
                "a setup header that says neither where it is loaded nor that it is relocatable",
            )),
            false => Ok(preferred),
        };
    }
    let alignment = u64::from(u32_at(start, KERNEL_ALIGNMENT));
    if !alignment.is_power_of_two() {
        return Err(Reason::Malformed(
            "a kernel_alignment that is not a power of two",
        ));
    }
    preferred
        .max(layout::HIGH_MEMORY)
        .checked_next_multiple_of(alignment)
        .ok_or(Reason::Malformed("an address past the last one"))
}

fn u8_at(bytes: &[u8], at: usize) -> u8 {
    let [byte] = array_at(bytes, at);
    byte
}

#[cfg(test)]
pub mod tests {
    use super::super::tests::read_bytes;
    use super::*;

    /// What a bzImage says of itself; the default is one like those of today.
    #[derive(Clone, Copy, Debug)]
    pub struct Header {
        pub setup_sects: u8,
        pub jump: u8,
        pub version: u16,
        pub loadflags: u8,
        pub initrd_addr_max: u32,
        pub alignment: u32,
        pub relocatable: u8,
        pub xloadflags: u16,
        pub cmdline_size: u32,
        pub pref_address: u64,
        pub init_size: u32,
    }

    impl Default for Header {
        fn default() -> Self {
            Header {
                setup_sects: 3,
                jump: 0x6a,
                version: 0x20f,
                loadflags: 1,
                initrd_addr_max: 0x7fff_ffff,
                alignment: 0x20_0000,
                relocatable: 1,
                xloadflags: 0x7f,
                cmdline_size: 2047,
                pref_address: 0x100_0000,
                init_size: 0x10_0000,
            }
        }
    }

    impl Header {
        /// A file with this header, in which `code` is what is loaded; its length is padded to 16.
        pub fn file(&self, code: &[u8]) -> Vec<u8> {
            let sectors = match self.setup_sects {
                0 => 4,
                sectors => usize::from(sectors),
            };
            let units = code.len().div_ceil(16);
            let mut file = vec![0; ((sectors + 1) * 512).max(1024)];
            file.truncate((sectors + 1) * 512);
            let mut put = |at: usize, bytes: &[u8]| {
                file[at..at + bytes.len()].copy_from_slice(bytes);
            };
            put(SETUP_SECTS, &[self.setup_sects]);
            put(SYSSIZE, &(units as u32).to_le_bytes());
            put(0x1fe, &[0x55, 0xaa, 0xeb, self.jump]);
            put(MAGIC_AT, &MAGIC);
            put(VERSION, &self.version.to_le_bytes());
            put(LOADFLAGS, &[self.loadflags]);
            put(INITRD_ADDR_MAX, &self.initrd_addr_max.to_le_bytes());
            put(KERNEL_ALIGNMENT, &self.alignment.to_le_bytes());
            put(RELOCATABLE_KERNEL, &[self.relocatable]);
            put(XLOADFLAGS, &self.xloadflags.to_le_bytes());
            put(CMDLINE_SIZE, &self.cmdline_size.to_le_bytes());
            put(PREF_ADDRESS, &self.pref_address.to_le_bytes());
            put(HEADER_INIT_SIZE, &self.init_size.to_le_bytes());
            file.extend_from_slice(code);
            file.resize((sectors + 1) * 512 + units * 16, 0);
            file
        }
    }

    const CODE: [u8; 5000] = [0x90; 5000];

    fn read_header(header: Header) -> Result<Kernel, String> {
        read_bytes(&header.file(&CODE)).map_err(|error| error.to_string())
    }

    #[test]
    fn read_when_it_is_a_bzimage_places_it_where_it_prefers() {
        let kernel = read_header(Header::default()).unwrap();
        let expected = Segment {
            offset: 2048,
            address: 0x100_0000,
            file_len: 5008,
            end: 0x110_0000,
        };
        assert_eq!(kernel.segments, [expected]);
        assert_eq!((kernel.entry, kernel.pvh_entry), (0x100_0200, None));
        let image = kernel.bzimage.unwrap();
        assert_eq!(image.initrd_limit, 0x8000_0000);
        assert_eq!(image.command_line_max, 2047);
        assert_eq!(image.header.len(), 0x26c - 0x1f1);
    }

    #[test]
    fn read_when_setup_sects_is_0_means_4() {
        let header = Header {
            setup_sects: 0,
            ..Header::default()
        };
        assert_eq!(read_header(header).unwrap().segments[0].offset, 5 * 512);
    }

    #[test]
    fn read_when_address_is_not_aligned_or_low_goes_above() {
        for (pref_address, relocatable, alignment, expected) in [
            (0x100_0001, 1, 0x20_0000, 0x120_0000),
            (0, 1, 0x20_0000, 0x20_0000),
            (0, 1, 1, 0x10_0000),
            // Wherever it says, if it is not relocatable.
            (0x100_0001, 0, 0, 0x100_0001),
        ] {
            let header = Header {
                pref_address,
                relocatable,
                alignment,
                ..Header::default()
            };
            assert_eq!(read_header(header).unwrap().segments[0].address, expected);
        }
    }

    #[test]
    fn read_when_bzimage_cannot_be_booted_says_why() {
        let with = |change: fn(&mut Header)| {
            let mut header = Header::default();
            change(&mut header);
            read_header(header).unwrap_err()
        };
        assert_eq!(
            with(|h| h.version = 0x20b),
            "kernel vmlinux has version 2.11 of the Linux boot protocol; 2.12 or newer is needed \
             (Linux 3.8)"
        );
        assert!(with(|h| h.loadflags = 0).contains("zImage"));
        assert!(with(|h| h.xloadflags = 0x7e).contains("32-bit"));
        assert!(with(|h| h.jump = 0x20).contains("too short"));
        assert!(with(|h| h.init_size = 5000).contains("contradict"));
        assert!(with(|h| h.alignment = 3).contains("power of two"));
        assert!(with(|h| h.alignment = 0).contains("power of two"));
        assert!(with(|h| h.pref_address = u64::MAX).contains("past the last one"));
        let fixed_low = |h: &mut Header| (h.relocatable, h.pref_address) = (0, 0x9_0000);
        assert!(with(fixed_low).contains("nor that it is relocatable"));
        let fixed_high = |h: &mut Header| (h.relocatable, h.pref_address) = (0, u64::MAX);
        assert!(with(fixed_high).contains("past the last one"));
        let file = Header::default().file(&CODE);
        let error = read_bytes(&file[..file.len() - 1]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "kernel vmlinux is truncated: it needs 7056 bytes and has 7055"
        );
        let empty = Header::default().file(&[]);
        assert!(
            read_bytes(&empty)
                .unwrap_err()
                .to_string()
                .contains("contradict")
        );
        for len in 0x206..0x290 {
            assert!(read_bytes(&file[..len]).is_err());
        }
    }

    #[test]
    fn read_when_more_follows_in_the_file_leaves_that_out() {
        // A signature, for example.
        let mut file = Header::default().file(&CODE);
        file.extend_from_slice(&[0xee; 999]);
        let kernel = read_bytes(&file).unwrap();
        assert_eq!(kernel.segments[0].file_len, 5008);
    }
}
