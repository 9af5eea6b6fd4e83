use super::super::mask::BitMask;
use super::*;

type Registers = [u32; 4];

fn entry(function: u32, index: u32, [eax, ebx, ecx, edx]: Registers) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function,
        index,
        eax,
        ebx,
        ecx,
        edx,
        ..kvm_cpuid_entry2::default()
    }
}

/// What KVM offers on a processor of Intel, in parts, with the host's topology in it.
fn intel() -> CpuId {
    CpuId::from_entries(&[
        // "GenuineIntel"
        entry(0, 0, [0x1f, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
        entry(1, 0, [0xc06f2, 0x0720_0800, 0x7efa_b223, 0x0f8b_fbff]),
        entry(4, 0, [0xfc00_4121, 0x02c0_003f, 0x3f, 0]),
        entry(4, 1, [0xfc00_4122, 0x01c0_003f, 0x3f, 0]),
        entry(4, 2, [0xfc00_4143, 0x03c0_003f, 0x7ff, 0]),
        entry(4, 3, [0xfc1f_c163, 0x04c0_003f, 0x1a000, 4]),
        entry(4, 4, [0, 0, 0, 0]),
        entry(7, 0, [1, 0xf1bf_27eb, 0x1a40_5f6e, 0xffd1_4412]),
        entry(7, 1, [0x1c30, 0, 0, 0]),
        entry(0xa, 0, [0x0730_0402, 0, 0, 0x603]),
        entry(0xb, 0, [1, 2, 0x100, 7]),
        entry(0x1f, 0, [1, 2, 0x100, 7]),
        entry(
            0x4000_0000,
            0,
            [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d],
        ),
        entry(0x4000_0001, 0, [0x0100_7efb, 0, 0, 0]),
        entry(0x8000_0000, 0, [0x8000_0008, 0, 0, 0]),
        entry(0x8000_0001, 0, [0, 0, 0x121, 0x2c10_0800]),
        entry(0x8000_0008, 0, [0x3030_3934, 0, 0, 0]),
    ])
    .unwrap()
}

/// The same on a processor of AMD.
fn amd() -> CpuId {
    CpuId::from_entries(&[
        // "AuthenticAMD"
        entry(0, 0, [0x10, 0x6874_7541, 0x444d_4163, 0x6974_6e65]),
        entry(1, 0, [0xa00f11, 0x0540_0800, 0x7ed8_320b, 0x178b_fbff]),
        entry(7, 0, [0, 0x219c_95a9, 0x0040_069c, 0x2000_0000]),
        entry(0x8000_0000, 0, [0x8000_0021, 0, 0, 0]),
        entry(
            0x8000_0001,
            0,
            [0xa00f11, 0x4000_0000, 0x0040_03f3, 0x2fd3_fbff],
        ),
        entry(0x8000_0005, 0, [0, 0, 0x2008_0140, 0x2008_0140]),
        entry(0x8000_0006, 0, [0, 0, 0x0200_6140, 0x0100_9140]),
        entry(0x8000_0008, 0, [0x3030, 0x0001_3205, 0x703f, 0]),
        entry(0x8000_001d, 0, [0, 0, 0, 0]),
        entry(0x8000_001e, 0, [5, 0x102, 0, 0]),
    ])
    .unwrap()
}

fn get(table: &CpuId, function: u32, index: u32) -> Registers {
    let mut found = table
        .as_slice()
        .iter()
        .filter(|e| e.function == function && e.index == index);
    let entry = found
        .next()
        .unwrap_or_else(|| panic!("{function:#x}.{index}"));
    assert!(found.next().is_none(), "{function:#x}.{index} twice");
    [entry.eax, entry.ebx, entry.ecx, entry.edx]
}

#[test]
fn table_when_intel_has_the_guests_topology() {
    // vCPU, vCPUs, SMT; leaf 1 EBX and EDX; leaf 4 EAX: L1 data, L2, L3; leaf 0xB: two levels.
    #[rustfmt::skip]
    let golden = [
        (0, 1, false, [0x0001_0800, 0x0f8b_fbff], [0x0000_0121, 0x0000_0143, 0x0000_0163],
         [[0, 1, 0x100, 0], [0, 1, 0x201, 0]]),
        (0, 1, true, [0x0001_0800, 0x0f8b_fbff], [0x0000_0121, 0x0000_0143, 0x0000_0163],
         [[0, 1, 0x100, 0], [0, 1, 0x201, 0]]),
        (1, 2, false, [0x0102_0800, 0x1f8b_fbff], [0x0400_0121, 0x0400_0143, 0x0400_4163],
         [[0, 1, 0x100, 1], [1, 2, 0x201, 1]]),
        (1, 2, true, [0x0102_0800, 0x1f8b_fbff], [0x0000_4121, 0x0000_4143, 0x0000_4163],
         [[1, 2, 0x100, 1], [1, 2, 0x201, 1]]),
        (2, 3, false, [0x0204_0800, 0x1f8b_fbff], [0x0c00_0121, 0x0c00_0143, 0x0c00_c163],
         [[0, 1, 0x100, 2], [2, 3, 0x201, 2]]),
        (2, 3, true, [0x0204_0800, 0x1f8b_fbff], [0x0400_4121, 0x0400_4143, 0x0400_c163],
         [[1, 2, 0x100, 2], [2, 3, 0x201, 2]]),
        (31, 32, false, [0x1f20_0800, 0x1f8b_fbff], [0x7c00_0121, 0x7c00_0143, 0x7c07_c163],
         [[0, 1, 0x100, 31], [5, 32, 0x201, 31]]),
        (31, 32, true, [0x1f20_0800, 0x1f8b_fbff], [0x3c00_4121, 0x3c00_4143, 0x3c07_c163],
         [[1, 2, 0x100, 31], [5, 32, 0x201, 31]]),
    ];
    for (index, count, smt, leaf_1, caches, levels) in golden {
        let case = format!("{index} of {count}, smt {smt}");
        let table = table(&intel(), index, count, smt);
        let [eax, ebx, ecx, edx] = get(&table, 1, 0);
        assert_eq!((eax, [ebx, edx]), (0xc06f2, leaf_1), "{case}");
        assert_eq!(ecx, 0xfffa_3223, "{case}");
        let eax = [0, 2, 3].map(|level| get(&table, 4, level)[0]);
        assert_eq!(eax, caches, "{case}");
        assert_eq!(get(&table, 4, 3)[1..], [0x04c0_003f, 0x1a000, 4]);
        for leaf in [0xb, 0x1f] {
            let both = [get(&table, leaf, 0), get(&table, leaf, 1)];
            assert_eq!(both, levels, "{case}");
        }
    }
}

#[test]
fn mask_when_applied_changes_just_its_bits() {
    let bits = |bits, value| BitMask { bits, value };
    let masks = [
        CpuidMask {
            leaf: 7,
            subleaf: 0,
            flags: 1,
            changes: vec![
                (CpuidRegister::Ebx, bits(0x8000_0002, 0)),
                (CpuidRegister::Ecx, bits(1, 1)),
                (CpuidRegister::Ebx, bits(0, 0)),
            ],
        },
        CpuidMask {
            leaf: 1,
            subleaf: 0,
            flags: 0,
            changes: vec![(CpuidRegister::Ebx, bits(0xff00_0000, 0xff00_0000))],
        },
    ];
    let mut supported = intel();
    mask(&mut supported, &masks).unwrap();
    assert_eq!(
        get(&supported, 7, 0),
        [1, 0x71bf_27e9, 0x1a40_5f6f, 0xffd1_4412]
    );
    // The APIC ID is the guest's, also when the mask has another.
    let table = table(&supported, 1, 2, false);
    assert_eq!(get(&table, 1, 0)[1] >> 24, 1);
    assert_eq!(get(&table, 7, 0)[1], 0x71bf_27e9);

    let absent = [CpuidMask {
        leaf: 7,
        subleaf: 9,
        flags: 0,
        changes: Vec::new(),
    }];
    let error = mask(&mut supported, &absent).unwrap_err().to_string();
    assert!(error.ends_with("leaf 0x7, subleaf 0x9"), "{error}");
}

#[test]
fn table_when_intel_keeps_what_is_not_topology() {
    let table = table(&intel(), 1, 2, false);
    for (function, index) in [
        (0, 0),
        (4, 4),
        (7, 1),
        (0x4000_0000, 0),
        (0x4000_0001, 0),
        (0x8000_0001, 0),
        (0x8000_0008, 0),
    ] {
        let before = get(&intel(), function, index);
        assert_eq!(get(&table, function, index), before, "{function:#x}");
    }
    assert_eq!(get(&table, 0xa, 0), [0; 4]);
    assert_eq!(
        get(&table, 7, 0),
        [1, 0xf1bf_27eb, 0x1a40_5f6e & !WAITPKG, 0xffd1_4412]
    );
    assert_eq!(table.as_slice().len(), intel().as_slice().len() + 2);
}

#[test]
fn table_when_amd_has_the_guests_topology() {
    // vCPU, vCPUs, SMT; leaf 0x8000_0001 ECX, 0x8000_0008 ECX, 0x8000_001D EAX: L1 data, L1
    // instruction, L2, L3; 0x8000_001E EAX, EBX.
    #[rustfmt::skip]
    let golden = [
        (0, 1, false, [0x0040_03f1, 0x0000], [0x121, 0x122, 0x143, 0x163], [0, 0]),
        (0, 1, true, [0x0040_03f1, 0x0000], [0x121, 0x122, 0x143, 0x163], [0, 0]),
        (1, 2, false, [0x0040_03f3, 0x1001], [0x121, 0x122, 0x143, 0x4163], [1, 1]),
        (1, 2, true, [0x0040_03f3, 0x1001], [0x4121, 0x4122, 0x4143, 0x4163], [1, 0x100]),
        (2, 3, false, [0x0040_03f3, 0x2002], [0x121, 0x122, 0x143, 0xc163], [2, 2]),
        (2, 3, true, [0x0040_03f3, 0x2002], [0x4121, 0x4122, 0x4143, 0xc163], [2, 0x101]),
        (31, 32, false, [0x0040_03f3, 0x501f], [0x121, 0x122, 0x143, 0x7_c163], [31, 31]),
        (31, 32, true, [0x0040_03f3, 0x501f], [0x4121, 0x4122, 0x4143, 0x7_c163], [31, 0x10f]),
    ];
    for (index, count, smt, ecx, caches, unit) in golden {
        let case = format!("{index} of {count}, smt {smt}");
        let table = table(&amd(), index, count, smt);
        let both = [0x8000_0001, 0x8000_0008].map(|leaf| get(&table, leaf, 0)[2]);
        assert_eq!(both, ecx, "{case}");
        let eax = [0, 1, 2, 3].map(|cache| get(&table, AMD_CACHES, cache)[0]);
        assert_eq!(eax, caches, "{case}");
        assert_eq!(get(&table, AMD_TOPOLOGY, 0)[..2], unit, "{case}");
        assert_eq!(get(&table, 0xb, 1)[1], u32::from(count), "{case}");
        assert_eq!(get(&table, 7, 0)[3], 0, "{case}");
    }
    // 32 KiB in 8 ways of 64 sets; 512 KiB in 8 of 1024; 32 MiB in 16 of 32768.
    let table = table(&amd(), 0, 1, false);
    assert_eq!(get(&table, AMD_CACHES, 0)[1..3], [7 << 22 | 63, 63]);
    assert_eq!(get(&table, AMD_CACHES, 2)[1..3], [7 << 22 | 63, 1023]);
    assert_eq!(get(&table, AMD_CACHES, 3)[1..3], [15 << 22 | 63, 32767]);
}

#[test]
fn table_when_kvm_fills_amd_caches_only_sharing_changes() {
    let mut entries = amd().as_slice().to_vec();
    entries.retain(|e| e.function != AMD_CACHES);
    entries.push(entry(AMD_CACHES, 0, [0x4121, 0x01c0_003f, 0x3f, 0]));
    let supported = CpuId::from_entries(&entries).unwrap();
    let table = table(&supported, 0, 4, false);
    assert_eq!(get(&table, AMD_CACHES, 0), [0x121, 0x01c0_003f, 0x3f, 0]);
}
