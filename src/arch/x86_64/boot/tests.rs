use super::super::kernel::tests::{elf, read_bytes};
use super::*;
use std::io::Write;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::tempfile::TempFile;

const SEED: [u8; 32] = [7; 32];

pub(super) fn read<T: ByteValued>(memory: &Memory, address: u64) -> T {
    memory.ram().read_obj(GuestAddress(address)).unwrap()
}

pub(super) fn text(memory: &Memory, address: u64) -> String {
    let bytes = (address..)
        .map(|a| read::<u8>(memory, a))
        .take_while(|b| *b != 0)
        .collect();
    String::from_utf8(bytes).unwrap()
}

pub(super) fn file(bytes: &[u8]) -> TempFile {
    let file = TempFile::new().unwrap();
    file.as_file().write_all(bytes).unwrap();
    file
}

fn load_one(
    memory: &mut Memory,
    kernel: &Kernel,
    protocol: Option<Protocol>,
) -> Result<Entry, BootError> {
    load(memory, kernel, None, protocol, &told("console=ttyS0", 1))
}

pub(super) fn told(command_line: &str, vcpus: u8) -> Told<'_> {
    Told {
        command_line,
        vcpus,
        devices: &[(0xc000_1000, 5)],
        seed: &SEED,
        generation_id: [9; 16],
    }
}

fn kernel(len: usize, pvh: bool) -> Kernel {
    let entry = 0x10_0010u32.to_le_bytes();
    let code: Vec<u8> = (0..len).map(|i| (i / 11) as u8).collect();
    read_bytes(&elf(&code, 0x10_0000, pvh.then_some(&entry[..]))).unwrap()
}

#[test]
fn load_when_kernel_has_the_note_writes_start_info() {
    let mut memory = Memory::anonymous(16).unwrap();
    let initrd = file(&[0x5a; 100_000]);
    let kernel = kernel(200_000, true);
    let parts = Some((initrd.as_file(), "initrd"));
    let entry = load(&mut memory, &kernel, parts, None, &told("quiet", 4)).unwrap();
    assert_eq!(
        entry,
        Entry {
            protocol: Protocol::Pvh,
            rip: 0x10_0010
        }
    );
    let info: hvm_start_info = read(&memory, layout::PVH_START_INFO);
    assert_eq!(
        (info.magic, info.version, info.nr_modules),
        (0x336e_c578, 1, 1)
    );
    assert_eq!(text(&memory, info.cmdline_paddr), "quiet");
    assert_eq!(read::<[u8; 8]>(&memory, info.rsdp_paddr), *b"RSD PTR ");
    assert_eq!(read::<[u8; 16]>(&memory, layout::GENERATION_ID), [9; 16]);
    let module: hvm_modlist_entry = read(&memory, info.modlist_paddr);
    assert_eq!((module.paddr, module.size), ((16 << 20) - 102_400, 100_000));
    let bytes: [u8; 32] = read(&memory, module.paddr + 99_968);
    assert_eq!(bytes, [0x5a; 32]);
    let map: Vec<_> = (0..u64::from(info.memmap_entries))
        .map(|n| read::<hvm_memmap_table_entry>(&memory, info.memmap_paddr + 24 * n))
        .map(|e| (e.addr, e.size, e.type_))
        .collect();
    assert_eq!(
        map,
        [
            (0, 0x9_fc00, 1),
            (0x9_fc00, 0x6_0400, 2),
            (1 << 20, 15 << 20, 1)
        ]
    );
    assert_eq!(read::<[u8; 4]>(&memory, layout::MP_TABLE), *b"_MP_");
    assert_eq!(
        read::<u8>(&memory, 0x10_0000 + 199_999),
        (199_999 / 11) as u8
    );
    assert_eq!(memory.changed_file(), None);
}

#[test]
fn load_when_there_is_no_note_writes_boot_params_and_page_tables() {
    let mut memory = Memory::anonymous(4096).unwrap();
    let entry = load_one(&mut memory, &kernel(5000, false), None).unwrap();
    assert_eq!(
        entry,
        Entry {
            protocol: Protocol::Linux64,
            rip: 0x10_0000
        }
    );
    let params: boot_params = read(&memory, layout::ZERO_PAGE);
    let hdr = params.hdr;
    assert_eq!({ hdr.header }, 0x5372_6448);
    assert_eq!({ hdr.ramdisk_size }, 0);
    assert_eq!(
        read::<[u8; 8]>(&memory, params.acpi_rsdp_addr),
        *b"RSD PTR "
    );
    assert_eq!(text(&memory, u64::from(hdr.cmd_line_ptr)), "console=ttyS0");
    assert_eq!(read::<u64>(&memory, hdr.setup_data), 0);
    assert_eq!(read::<[u32; 2]>(&memory, hdr.setup_data + 8), [9, 32]);
    assert_eq!(read::<[u8; 32]>(&memory, hdr.setup_data + 16), SEED);
    let table = params.e820_table;
    let map: Vec<_> = table[..usize::from(params.e820_entries)]
        .iter()
        .map(|e| ({ e.addr }, { e.size }, { e.r#type }))
        .collect();
    assert_eq!(
        map,
        [
            (0, 0x9_fc00, 1),
            (0x9_fc00, 0x6_0400, 2),
            (1 << 20, 0xbff0_0000, 1),
            (1 << 32, 1 << 30, 1)
        ]
    );
    // Walk the tables for a few addresses.
    for address in [0u64, layout::ZERO_PAGE, 0x10_0000, 0x3fff_ffff] {
        let mut table = layout::PAGE_TABLES;
        for shift in [39, 30] {
            let entry: u64 = read(&memory, table + ((address >> shift) & 511) * 8);
            assert_eq!(entry & 0xfff, 3);
            table = entry & !0xfff;
        }
        let entry: u64 = read(&memory, table + ((address >> 21) & 511) * 8);
        assert_eq!(entry, (address & !0x1f_ffff) | 0x83);
    }
}

#[test]
fn load_when_protocol_is_given_follows_it() {
    let kernel = kernel(5000, true);
    let mut memory = Memory::anonymous(4).unwrap();
    let entry = load_one(&mut memory, &kernel, Some(Protocol::Linux64)).unwrap();
    assert_eq!((entry.protocol, entry.rip), (Protocol::Linux64, 0x10_0000));

    let kernel = self::kernel(5000, false);
    let mut memory = Memory::anonymous(4).unwrap();
    let error = load_one(&mut memory, &kernel, Some(Protocol::Pvh)).unwrap_err();
    assert_eq!(error.to_string(), "kernel vmlinux has no PVH entry");
}

#[test]
fn load_when_something_does_not_fit_says_the_sizes() {
    let mut memory = Memory::anonymous(1).unwrap();
    let error = load_one(&mut memory, &kernel(5000, true), None).unwrap_err();
    assert_eq!(
        error.to_string(),
        "kernel vmlinux is too large: it ends at 1053576 bytes, and guest memory for kernels, \
         below the hole at 3 GiB, at 1048576; it needs at least 2 MiB of guest memory"
    );

    let mut memory = Memory::anonymous(2).unwrap();
    let kernel = kernel(5000, true);
    let mut load_initrd = |bytes: &[u8]| {
        let file = file(bytes);
        let parts = Some((file.as_file(), "initrd"));
        load(&mut memory, &kernel, parts, None, &told("", 1)).map(|_| ())
    };
    let room = (1 << 20) - 8192;
    assert_eq!(
        load_initrd(&vec![1; room + 1]).unwrap_err().to_string(),
        "initrd initrd does not fit: it has 1040385 bytes and there is room for 1040384; with this \
         kernel it needs at least 3 MiB of guest memory"
    );
    load_initrd(&vec![1; room]).unwrap();
    assert_eq!(
        load_initrd(&[]).unwrap_err().to_string(),
        "initrd initrd is empty"
    );
}

#[test]
fn load_when_entry_is_elsewhere_is_refused() {
    let entry = 0x20_0000u32.to_le_bytes();
    let kernel = read_bytes(&elf(&[0x90; 64], 0x10_0000, Some(&entry))).unwrap();
    let mut memory = Memory::anonymous(4).unwrap();
    let error = load_one(&mut memory, &kernel, None).unwrap_err();
    assert!(error.to_string().contains("entry at 0x200000, outside"));
}

#[test]
fn load_when_a_file_was_changed_since_it_was_read_is_refused() {
    let file = file(&elf(&[0x90; 200_000], 0x10_0000, None));
    let kernel = Kernel::read(file.as_file(), "vmlinux").unwrap();
    file.as_file().set_len(250_000).unwrap();
    let mut memory = Memory::anonymous(4).unwrap();
    let error = load_one(&mut memory, &kernel, None).unwrap_err();
    assert!(error.to_string().starts_with("vmlinux was changed"));
}
