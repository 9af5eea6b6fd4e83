//! bzImages in guest memory: placement by rule, and a property test over headers.

use super::super::kernel::bzimage::tests::Header;
use super::super::kernel::tests::read_bytes;
use super::tests::{file, read, text, told};
use super::*;

const MIB: u64 = 1 << 20;

fn load_file(
    memory: &mut Memory,
    kernel: &[u8],
    initrd: Option<&[u8]>,
    line: &str,
) -> Result<Entry, String> {
    let kernel = read_bytes(kernel).map_err(|error| error.to_string())?;
    let initrd = initrd.map(file);
    let parts = initrd.as_ref().map(|file| (file.as_file(), "initrd"));
    load(memory, &kernel, parts, None, &told(line, 1)).map_err(|error| error.to_string())
}

fn code(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i / 7) as u8).collect()
}

#[test]
fn load_when_it_is_a_bzimage_has_its_header_and_an_initrd_outside_of_its_area() {
    let mut memory = Memory::anonymous(64).unwrap();
    let header = Header {
        init_size: 32 << 20,
        ..Header::default()
    };
    let code = code(200_000);
    let kernel = header.file(&code);
    let entry = load_file(&mut memory, &kernel, Some(&[0x5a; 100_000]), "quiet").unwrap();
    let expected = Entry {
        protocol: Protocol::Linux64,
        rip: 0x100_0200,
    };
    assert_eq!(entry, expected);
    for at in [0, 1, 100_000, 199_999] {
        assert_eq!(read::<u8>(&memory, 0x100_0000 + at), code[at as usize]);
    }

    let params: boot_params = read(&memory, layout::ZERO_PAGE);
    let hdr = params.hdr;
    // What the kernel has told of itself stays; what a loader fills in is there.
    assert_eq!({ hdr.init_size }, 32 << 20);
    assert_eq!({ hdr.xloadflags }, 0x7f);
    assert_eq!({ hdr.cmdline_size }, 2047);
    assert_eq!({ hdr.pref_address }, 0x100_0000);
    assert_eq!(
        ({ hdr.code32_start }, hdr.type_of_loader),
        (0x100_0000, 0xff)
    );
    assert_eq!(text(&memory, u64::from(hdr.cmd_line_ptr)), "quiet");
    assert_eq!(read::<[u32; 2]>(&memory, hdr.setup_data + 8), [9, 32]);
    let initrd = u64::from(hdr.ramdisk_image);
    assert_eq!(
        (initrd, { hdr.ramdisk_size }),
        (64 * MIB - 102_400, 100_000)
    );
    assert_eq!(read::<u8>(&memory, initrd + 99_999), 0x5a);
    assert_eq!(params.e820_entries, 3);
}

#[test]
fn load_when_initrd_may_not_be_high_or_has_no_room_above_goes_below() {
    // At most up to 8 MiB, by the header.
    let limited = Header {
        initrd_addr_max: 0x7f_ffff,
        ..Header::default()
    };
    // 16 + 1 MiB of kernel in 17 MiB of memory.
    for (header, expected) in [(limited, 8 * MIB), (Header::default(), 16 * MIB)] {
        let mut memory = Memory::anonymous(17).unwrap();
        let kernel = header.file(&code(100_000));
        load_file(&mut memory, &kernel, Some(&[1; 5000]), "").unwrap();
        let params: boot_params = read(&memory, layout::ZERO_PAGE);
        assert_eq!(u64::from(params.hdr.ramdisk_image), expected - 8192);
    }
}

#[test]
fn load_when_memory_is_too_small_says_how_much_is_needed() {
    let header = Header {
        init_size: (62 << 20) - 5,
        ..Header::default()
    };
    let kernel = header.file(&code(5000));
    let mut memory = Memory::anonymous(64).unwrap();
    let error = load_file(&mut memory, &kernel, None, "").unwrap_err();
    assert!(
        error.ends_with("; it needs at least 78 MiB of guest memory"),
        "{error}"
    );
    let mut memory = Memory::anonymous(78).unwrap();
    load_file(&mut memory, &kernel, None, "").unwrap();
    // Below the kernel there are 15 MiB.
    load_file(&mut memory, &kernel, Some(&vec![1; 15 << 20]), "").unwrap();
    let error = load_file(&mut memory, &kernel, Some(&vec![1; (15 << 20) + 1]), "").unwrap_err();
    assert!(error.contains("there is room for 15728640"), "{error}");
    assert!(
        error.ends_with("needs at least 94 MiB of guest memory"),
        "{error}"
    );
    // No memory is enough for a kernel that is to end in the hole.
    let header = Header {
        pref_address: 0xbff0_0000,
        init_size: 0x20_0000,
        ..Header::default()
    };
    let error = load_file(&mut memory, &header.file(&code(5000)), None, "").unwrap_err();
    assert!(!error.contains("needs at least"), "{error}");
}

#[test]
fn load_when_kernel_reads_shorter_command_lines_says_so() {
    let header = Header {
        cmdline_size: 10,
        ..Header::default()
    };
    let kernel = header.file(&code(5000));
    let mut memory = Memory::anonymous(18).unwrap();
    load_file(&mut memory, &kernel, None, "0123456789").unwrap();
    let error = load_file(&mut memory, &kernel, None, "0123456789a").unwrap_err();
    assert_eq!(
        error,
        "kernel vmlinux reads command lines of at most 10 bytes, and this one has 11"
    );
}

#[test]
fn load_when_pvh_is_asked_for_refuses_a_bzimage() {
    let kernel = read_bytes(&Header::default().file(&code(5000))).unwrap();
    let mut memory = Memory::anonymous(18).unwrap();
    let pvh = Some(Protocol::Pvh);
    let error = load(&mut memory, &kernel, None, pvh, &told("", 1)).unwrap_err();
    assert_eq!(error.to_string(), "kernel vmlinux has no PVH entry");
}

/// Numbers from a seed (Steele, Lea, Flood: SplitMix).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// `usual` in 13 of 16 cases, else something else: small, at a border, or anything.
    fn field(&mut self, usual: u64) -> u64 {
        match self.below(16) {
            0..=12 => usual,
            13 => self.below(64 << 20),
            14 => (1 << self.below(64)) - self.below(2),
            _ => self.next(),
        }
    }

    fn header(&mut self) -> Header {
        Header {
            setup_sects: self.field(3).max(1) as u8,
            jump: self.field(0x6a) as u8,
            version: self.field(0x20f) as u16,
            loadflags: self.field(1) as u8,
            initrd_addr_max: self.field(0x7fff_ffff) as u32,
            alignment: self.field(0x20_0000) as u32,
            relocatable: self.field(1) as u8,
            xloadflags: self.field(0x7f) as u16,
            cmdline_size: self.field(2047) as u32,
            pref_address: self.field(0x100_0000),
            init_size: self.field(0x20_0000) as u32,
        }
    }
}

/// Whatever a header says: it is refused with one line, or everything is where the rules want it.
#[test]
fn load_when_header_is_any_keeps_the_rules_or_refuses() {
    let seed = std::process::id().into();
    println!("seed {seed}");
    let mut random = Random(seed);
    let mut loaded = 0;
    for round in 0..1000 {
        let header = random.header();
        let size = random.below(40_000) as usize;
        let code = code(size);
        let mut bytes = header.file(&code);
        if random.below(8) == 0 {
            let at = random.below(0x280.min(bytes.len() as u64)) as usize;
            bytes[at] = random.next() as u8;
        }
        if random.below(8) == 0 {
            bytes.truncate(random.below(bytes.len() as u64) as usize);
        }
        let mib = 1 + random.below(40);
        let mut memory = Memory::anonymous(mib).unwrap();
        let limit = 1 << random.below(21);
        let initrd = match random.below(3) {
            0 => None,
            _ => Some(vec![0xa5; 1 + random.below(limit) as usize]),
        };
        let case = format!("seed {seed} round {round}: {header:?} {mib} MiB");
        let line = "console=ttyS0";
        let entry = match load_file(&mut memory, &bytes, initrd.as_deref(), line) {
            Ok(entry) => entry,
            Err(error) => {
                assert!(
                    !error.is_empty() && !error.contains('\n'),
                    "{case}: {error}"
                );
                continue;
            }
        };
        loaded += 1;
        if !bytes.starts_with(&header.file(&code)) {
            // The header says something else now.
            continue;
        }
        let area = entry.rip - 0x200..entry.rip - 0x200 + u64::from(header.init_size);
        assert!(
            area.start >= layout::HIGH_MEMORY && area.end <= mib * MIB,
            "{case}"
        );
        if header.relocatable != 0 {
            assert!(
                area.start.is_multiple_of(u64::from(header.alignment)),
                "{case}"
            );
            assert!(area.start >= header.pref_address, "{case}");
        } else {
            assert_eq!(area.start, header.pref_address, "{case}");
        }
        assert_eq!(read::<u8>(&memory, area.start), code[0], "{case}");
        let params: boot_params = read(&memory, layout::ZERO_PAGE);
        assert_eq!({ params.hdr.init_size }, header.init_size, "{case}");
        let at = u64::from(params.hdr.ramdisk_image);
        let len = u64::from(params.hdr.ramdisk_size);
        assert_eq!(len, initrd.map_or(0, |bytes| bytes.len()) as u64, "{case}");
        if len > 0 {
            let end = at + len;
            assert!(at >= layout::HIGH_MEMORY && end <= mib * MIB, "{case}");
            assert!(end - 1 <= u64::from(header.initrd_addr_max), "{case}");
            assert!(end <= area.start || at >= area.end, "{case}");
            assert_eq!(read::<u8>(&memory, at), 0xa5, "{case}");
            assert_eq!(read::<u8>(&memory, end - 1), 0xa5, "{case}");
        }
    }
    assert!(
        loaded > 100,
        "seed {seed}: only {loaded} of 1000 were loaded"
    );
}
