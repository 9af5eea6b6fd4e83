//! The MP table: how kernels without ACPI learn of processors and interrupt lines
//! (MultiProcessor Specification 1.4, chapter 4).

use super::layout;
use crate::wire::limits::VCPUS_MAX;

/// Version of the specification, and of the APICs.
const SPECIFICATION: u8 = 4;
const APIC_VERSION: u8 = 0x14;

/// Entry types (table 4-3).
const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IO_APIC: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;

/// Processor flags (table 4-4): usable; the one that boots. Signature and features as of a
/// processor with an FPU and a local APIC; kernels ask CPUID.
const ENABLED: u8 = 1;
const BOOTS: u8 = 2;
const SIGNATURE: u32 = 0x600;
const FEATURES: u32 = 0x201;

/// Interrupt types (table 4-11).
const INTERRUPT: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;

/// "All local APICs" (table 4-12).
const EVERY_APIC: u8 = 0xff;

const ISA_BUS: u8 = 0;

/// The table for `vcpus` processors with the APIC IDs 0, 1, ..., to be put at
/// [`layout::MP_TABLE`]; `None` for 0 and for more than 32.
#[cfg_attr(
    not(test),
    expect(
        clippy::indexing_slicing,
        reason = "the headers are written a few lines above"
    )
)]
pub fn table(vcpus: u8) -> Option<Vec<u8>> {
    if vcpus == 0 || vcpus > VCPUS_MAX {
        return None;
    }
    let io_apic_id = vcpus;
    let mut entries = Vec::new();
    let mut count: u16 = 0;
    let mut add = |entry: &[&[u8]]| {
        entries.extend(entry.iter().flat_map(|part| part.iter()).copied());
        count += 1;
    };
    for id in 0..vcpus {
        let flags = if id == 0 { ENABLED | BOOTS } else { ENABLED };
        add(&[
            &[PROCESSOR, id, APIC_VERSION, flags],
            &SIGNATURE.to_le_bytes(),
            &FEATURES.to_le_bytes(),
            &[0; 8],
        ]);
    }
    add(&[&[BUS, ISA_BUS], b"ISA   "]);
    add(&[
        &[IO_APIC, io_apic_id, APIC_VERSION, ENABLED],
        &layout::IO_APIC.to_le_bytes(),
    ]);
    for line in 0..layout::GSI_COUNT as u8 {
        // Polarity and trigger as usual on the bus: edges.
        add(&[&[
            IO_INTERRUPT,
            INTERRUPT,
            0,
            0,
            ISA_BUS,
            line,
            io_apic_id,
            line,
        ]]);
    }
    add(&[&[LOCAL_INTERRUPT, EXT_INT, 0, 0, ISA_BUS, 0, 0, 0]]);
    add(&[&[LOCAL_INTERRUPT, NMI, 0, 0, ISA_BUS, 0, EVERY_APIC, 1]]);

    // Configuration table header (table 4-2).
    let mut table = Vec::from(*b"PCMP");
    table.extend_from_slice(&((HEADER + entries.len()) as u16).to_le_bytes());
    table.extend_from_slice(&[SPECIFICATION, 0]);
    table.extend_from_slice(b"MAYFLY  MICROVM     ");
    table.extend_from_slice(&[0; 6]);
    table.extend_from_slice(&count.to_le_bytes());
    table.extend_from_slice(&layout::LOCAL_APIC.to_le_bytes());
    table.extend_from_slice(&[0; 4]);
    table.extend_from_slice(&entries);
    table[7] = checksum(&table);

    // Floating pointer (table 4-1), right before it.
    let mut pointer = Vec::from(*b"_MP_");
    pointer.extend_from_slice(&(layout::MP_TABLE as u32 + POINTER as u32).to_le_bytes());
    pointer.extend_from_slice(&[1, SPECIFICATION, 0, 0, 0, 0, 0, 0]);
    pointer[10] = checksum(&pointer);
    pointer.extend_from_slice(&table);
    Some(pointer)
}

const POINTER: usize = 16;
const HEADER: usize = 44;

/// What makes all bytes add up to 0.
fn checksum(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0u8, |sum, byte| sum.wrapping_add(*byte))
        .wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        checksum(bytes).wrapping_neg()
    }

    #[test]
    fn table_when_read_back_has_every_processor_and_line() {
        for vcpus in 1..=32 {
            let bytes = table(vcpus).unwrap();
            assert!(bytes.len() <= layout::MP_TABLE_MAX, "{vcpus}");
            assert_eq!(&bytes[..4], b"_MP_");
            let at = u32::from_le_bytes(bytes[4..8].try_into().unwrap());
            assert_eq!(u64::from(at), layout::MP_TABLE + 16);
            assert_eq!(bytes[8], 1, "paragraphs");
            assert_eq!(sum(&bytes[..16]), 0);

            let config = &bytes[16..];
            assert_eq!(&config[..4], b"PCMP");
            let len = u16::from_le_bytes(config[4..6].try_into().unwrap());
            assert_eq!(usize::from(len), config.len());
            assert_eq!(sum(config), 0);
            assert_eq!(config[36..40], 0xfee0_0000u32.to_le_bytes());

            let mut seen = [0u32; 5];
            let mut rest = &config[44..];
            let mut count = 0;
            while let Some(&kind) = rest.first() {
                let len = if kind == PROCESSOR { 20 } else { 8 };
                let entry = &rest[..len];
                let number = seen[usize::from(kind)];
                match kind {
                    PROCESSOR => {
                        assert_eq!(u32::from(entry[1]), number);
                        assert_eq!(entry[3], if number == 0 { 3 } else { 1 });
                    }
                    BUS => assert_eq!(&entry[1..], b"\0ISA   "),
                    IO_APIC => {
                        assert_eq!(entry[1], vcpus);
                        assert_eq!(entry[4..8], 0xfec0_0000u32.to_le_bytes());
                    }
                    IO_INTERRUPT => {
                        let line = number as u8;
                        assert_eq!(entry[1..], [0, 0, 0, 0, line, vcpus, line]);
                    }
                    LOCAL_INTERRUPT => assert_eq!(
                        entry[1..],
                        [[3, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0xff, 1]][number as usize]
                    ),
                    kind => panic!("entry of type {kind}"),
                }
                seen[usize::from(kind)] += 1;
                count += 1;
                rest = &rest[len..];
            }
            assert_eq!(seen, [u32::from(vcpus), 1, 1, 24, 2]);
            assert_eq!(config[34..36], u16::to_le_bytes(count));
        }
    }

    #[test]
    fn table_when_vcpus_are_too_many_or_none_is_refused() {
        assert!(table(0).is_none());
        assert!(table(33).is_none());
    }
}
