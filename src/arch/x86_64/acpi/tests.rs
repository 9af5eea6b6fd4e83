use super::*;

const ID: [u8; 16] = *b"generation of it";

fn devices(count: usize) -> Vec<(u64, u32)> {
    (0..count).filter_map(layout::virtio_device).collect()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// The table at guest address `address`, checked for what all have.
fn table(block: &[u8], address: u64, signature: &[u8; 4]) -> Vec<u8> {
    let at = usize::try_from(address - layout::ACPI).unwrap();
    let len = usize::try_from(u32_at(block, at + 4)).unwrap();
    let table = block[at..at + len].to_vec();
    assert_eq!(&table[..4], signature);
    assert_eq!(sum(&table), 0, "{signature:?}");
    assert_eq!(&table[10..16], b"MAYFLY");
    assert!(address.is_multiple_of(ALIGNMENT));
    table
}

/// FADT, MADT and DSDT, by way of the pointers.
fn walk(block: &[u8]) -> [Vec<u8>; 3] {
    assert_eq!(&block[..8], b"RSD PTR ");
    assert_eq!(sum(&block[..20]), 0);
    assert_eq!(sum(&block[..36]), 0);
    assert_eq!((block[15], u32_at(block, 20)), (2, 36));
    assert_eq!(u32_at(block, 16), 0, "no RSDT");
    let xsdt = table(block, u64_at(block, 24), b"XSDT");
    assert_eq!(xsdt.len(), 36 + 2 * 8);
    let fadt = table(block, u64_at(&xsdt, 36), b"FACP");
    let madt = table(block, u64_at(&xsdt, 44), b"APIC");
    let dsdt = table(block, u64_at(&fadt, 140), b"DSDT");
    [fadt, madt, dsdt]
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

#[test]
fn tables_when_pointers_are_followed_are_whole_and_fit() {
    for vcpus in 1..=32 {
        for count in [0, 1, 7, 19] {
            let block = tables(vcpus, &devices(count), ID);
            assert!(block.len() <= layout::ACPI_MAX, "{}", block.len());
            assert!(layout::ACPI + block.len() as u64 <= layout::HIGH_MEMORY);
            let [.., dsdt] = walk(&block);
            assert!(block.ends_with(&dsdt));
            let at = (layout::GENERATION_ID - layout::ACPI) as usize;
            assert_eq!(&block[at..at + 16], ID);
            assert!(layout::GENERATION_ID.is_multiple_of(8));
            assert!(layout::GENERATION_ID >= layout::ACPI + Rsdp::len() as u64);
        }
    }
    assert!(layout::ACPI_TABLES >= layout::GENERATION_ID + ID.len() as u64);
}

/// Offsets: ACPI Specification 6.5, table 5.9.
#[test]
fn fadt_when_read_has_the_registers_that_end_the_machine_and_no_others() {
    let [fadt, ..] = walk(&tables(1, &[], ID));
    assert_eq!(fadt.len(), 276);
    let port = |at: usize| {
        assert_eq!(fadt[at..at + 4], [1, 8, 0, 1], "one byte of a port");
        u64_at(&fadt, at + 4)
    };
    assert_eq!(port(116), 0x602);
    assert_eq!(fadt[128], 1);
    assert_eq!(port(244), 0x600);
    assert_eq!(port(256), 0x601);
    // Hardware-reduced; reset register; no fixed buttons; WBINVD works.
    assert_eq!(u32_at(&fadt, 112), 1 << 20 | 1 << 10 | 1 << 5 | 1 << 4 | 1);
    assert_eq!(fadt[109..111], [0b10_1110, 0]);
    // FACS, 32-bit DSDT; SCI to the century; the blocks in 64 bits.
    assert!(fadt[36..44].iter().all(|byte| *byte == 0));
    assert!(fadt[46..109].iter().all(|byte| *byte == 0));
    assert!(fadt[148..244].iter().all(|byte| *byte == 0));
}

#[test]
fn madt_when_read_has_every_processor_and_the_io_apic() {
    for vcpus in [1, 2, 32] {
        let [_, madt, _] = walk(&tables(vcpus, &[], ID));
        assert_eq!(u32_at(&madt, 36), 0xfee0_0000);
        assert_eq!(u32_at(&madt, 40), 0, "no 8259");
        let (processors, io_apic) = madt[44..].split_at(8 * usize::from(vcpus));
        for (id, entry) in (0u8..).zip(processors.chunks(8)) {
            assert_eq!(entry, [0, 8, id, id, 1, 0, 0, 0]);
        }
        assert_eq!(io_apic, [1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]);
    }
}

/// ACPI Specification 6.5, section 20.2.5: a method of one argument, serialized; if the argument is 3,
/// VGEN is notified of 0x80.
#[test]
fn event_when_it_is_the_generation_lines_notifies_the_device_of_the_generation_id() {
    let [.., dsdt] = walk(&tables(1, &devices(19), ID));
    let method = [
        &b"\x14\x13_EVT\x09"[..],
        b"\xa0\x0c\x93\x68\x0a\x03",
        b"\x86VGEN\x0a\x80",
    ];
    let method = method.concat();
    let found = dsdt.windows(method.len()).filter(|w| *w == method).count();
    assert_eq!(found, 1, "{dsdt:x?}");
}

#[test]
fn dsdt_when_read_has_the_devices_in_the_order_of_slots() {
    let [.., dsdt] = walk(&tables(1, &devices(19), ID));
    assert_eq!(dsdt[8], 2, "integers of 64 bits");
    let mut from = 0;
    for (number, (address, gsi)) in devices(19).into_iter().enumerate() {
        let name = format!("V{number:03}");
        let at = from
            + dsdt[from..]
                .windows(4)
                .position(|w| w == name.as_bytes())
                .unwrap();
        let device = &dsdt[at..at + 72];
        assert!(contains(device, b"LNRO0005\0"), "{name}");
        // Memory32Fixed, writable; extended interrupt: a consumer's, edges, active high, not shared.
        let mut resources = vec![0x86, 9, 0, 1];
        resources.extend_from_slice(&(address as u32).to_le_bytes());
        resources.extend_from_slice(&0x1000u32.to_le_bytes());
        resources.extend_from_slice(&[0x89, 6, 0, 0b11, 1]);
        resources.extend_from_slice(&gsi.to_le_bytes());
        assert!(contains(device, &resources), "{name}");
        from = at + 4;
    }
    assert!(!contains(&dsdt, b"V019"));
    let [.., none] = walk(&tables(1, &[], ID));
    assert!(!contains(&none, b"LNRO0005"));
}

#[test]
fn dsdt_when_read_has_the_platform_devices_and_one_sleep_state() {
    let [.., dsdt] = walk(&tables(1, &[], ID));
    let end = dsdt.len();
    // \_S5_ is a package of two: 5 and 0.
    assert_eq!(dsdt[end - 6..], [0x12, 5, 2, 0x0a, 5, 0]);
    assert_eq!(&dsdt[end - 12..end - 6], b"\x08\\_S5_");
    // ADDR is a package of two: the address's low half, and 0.
    let mut address = b"ADDR\x12\x08\x02\x0c".to_vec();
    address.extend_from_slice(&0x000e_0030u32.to_le_bytes());
    address.push(0);
    assert!(contains(&dsdt, &address), "{dsdt:x?}");
    for (name, id, resource) in [
        (
            b"COM1",
            &b"\x0c\x41\xd0\x05\x01"[..],
            &[0x47, 1, 0xf8, 3, 0xf8, 3, 1, 8][..],
        ),
        (
            b"KBD_",
            b"\x0c\x41\xd0\x03\x03",
            &[0x47, 1, 0x60, 0, 0x60, 0, 1, 1],
        ),
        (b"VGEN", b"VMGENCTR\0", b"VM_Gen_Counter\0"),
        (b"GED_", b"ACPI0013\0", &[0x89, 6, 0, 0b11, 1, 3, 0, 0, 0]),
        (b"PEVT", b"QEMU0001\0", &[0x47, 1, 3, 6, 3, 6, 1, 1]),
    ] {
        let at = dsdt.windows(4).position(|w| w == name).unwrap();
        let device = &dsdt[at..(at + 90).min(end)];
        assert!(
            contains(device, id) && contains(device, resource),
            "{name:?}"
        );
    }
}
