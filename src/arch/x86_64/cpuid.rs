//! What a vCPU answers to CPUID: what KVM supports, with the topology of the guest instead of
//! the host's. Pure, but for [`supported`].
//!
//! One package; vCPU number n has the APIC ID n; with SMT two neighbours share a core and its
//! first two levels of cache. IDs are laid out in powers of two, as kernels expect, so that a
//! guest of 3 vCPUs has room for 4.

use std::error::Error;
use std::fmt;

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;

use crate::wire::config::cpu::{CpuidModifier, CpuidRegister};

/// Leaves that tell about topology (Intel SDM volume 2A, "CPUID"; AMD APM volume 3, appendix E).
const FEATURES: u32 = 0x1;
const CACHES: u32 = 0x4;
const MORE_FEATURES: u32 = 0x7;
const PERFORMANCE: u32 = 0xa;
const TOPOLOGY: u32 = 0xb;
const TOPOLOGY_V2: u32 = 0x1f;
const AMD_FEATURES: u32 = 0x8000_0001;
const AMD_L1: u32 = 0x8000_0005;
const AMD_L2_L3: u32 = 0x8000_0006;
const AMD_SIZES: u32 = 0x8000_0008;
const AMD_CACHES: u32 = 0x8000_001d;
const AMD_TOPOLOGY: u32 = 0x8000_001e;

/// Leaf 1, ECX.
const PDCM: u32 = 1 << 15;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: more than one logical processor in the package.
const HTT: u32 = 1 << 28;
/// Leaf 1, EBX bits 15 to 8: bytes flushed by CLFLUSH, in units of 8.
const CLFLUSH_64: u32 = 8 << 8;

/// Leaf 7, ECX: UMWAIT and TPAUSE, which would put the host's processor to sleep.
const WAITPKG: u32 = 1 << 5;
/// Leaf 7, EDX: IA32_ARCH_CAPABILITIES, which KVM offers on AMD, where it does not exist.
const ARCH_CAPABILITIES: u32 = 1 << 29;

/// AMD leaf 0x8000_0001, ECX: several cores; leaves 0x8000_001D and 0x8000_001E exist.
const CMP_LEGACY: u32 = 1 << 1;
const TOPOLOGY_EXTENSIONS: u32 = 1 << 22;

/// Leaf 0xB, ECX bits 15 to 8: what a level is made of.
const LEVEL_THREAD: u32 = 1 << 8;
const LEVEL_CORE: u32 = 2 << 8;

/// What KVM can offer on this host. Takes a quarter of a millisecond on hosts that are virtual
/// machines themselves, and needs no virtual machine: ask early, once.
///
/// # Errors
/// KVM's.
pub fn supported(kvm: &Kvm) -> Result<CpuId, kvm_ioctls::Error> {
    kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
}

/// A mask for a leaf that KVM does not offer here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoSuchLeaf {
    leaf: u32,
    subleaf: u32,
}

impl fmt::Display for NoSuchLeaf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the CPU configuration changes a CPUID entry that KVM does not support: leaf {:#x}, \
             subleaf {:#x}",
            self.leaf, self.subleaf
        )
    }
}

impl Error for NoSuchLeaf {}

/// Changes what KVM offers by masks. Topology is set after it, by [`table`], and stays the guest's.
///
/// # Errors
/// A mask for a leaf that is not there.
pub fn mask(supported: &mut CpuId, masks: &[CpuidModifier]) -> Result<(), NoSuchLeaf> {
    for mask in masks {
        let (leaf, subleaf) = (mask.leaf, mask.subleaf);
        let entry = supported
            .as_mut_slice()
            .iter_mut()
            .find(|entry| (entry.function, entry.index) == (leaf, subleaf))
            .ok_or(NoSuchLeaf { leaf, subleaf })?;
        entry.flags = mask.flags;
        for change in &mask.modifiers {
            let register = match change.register {
                CpuidRegister::Eax => &mut entry.eax,
                CpuidRegister::Ebx => &mut entry.ebx,
                CpuidRegister::Ecx => &mut entry.ecx,
                CpuidRegister::Edx => &mut entry.edx,
            };
            // The mask has 32 bits, so what it makes of 32 bits has no more.
            *register = change.bitmap.apply(u64::from(*register)) as u32;
        }
    }
    Ok(())
}

/// The table of vCPU number `index` out of `count` (1 to 32); `smt` puts two on a core.
#[cfg_attr(
    not(test),
    expect(
        clippy::expect_used,
        reason = "the list is of the host and ours, and short"
    )
)]
pub fn table(supported: &CpuId, index: u8, count: u8, smt: bool) -> CpuId {
    let topology = Topology::new(index, count, smt);
    let mut entries = supported.as_slice().to_vec();
    let find = |function: u32| entries.iter().find(|e| e.function == function).copied();
    let leaf_0 = find(0).unwrap_or_default();
    let amd = matches!(&vendor(&leaf_0), b"AuthenticAMD" | b"HygonGenuine");
    let has_v2 = find(TOPOLOGY_V2).is_some();
    let amd_caches = match find(AMD_CACHES) {
        Some(entry) if entry.eax & 0x1f != 0 => None,
        _ => Some(amd_caches(find(AMD_L1), find(AMD_L2_L3))),
    };

    entries.retain(|e| match e.function {
        TOPOLOGY | TOPOLOGY_V2 => false,
        AMD_TOPOLOGY => !amd,
        AMD_CACHES => !amd || amd_caches.is_none(),
        _ => true,
    });
    if leaf_0.eax >= TOPOLOGY {
        entries.extend(topology.levels(TOPOLOGY));
    }
    if leaf_0.eax >= TOPOLOGY_V2 && has_v2 {
        entries.extend(topology.levels(TOPOLOGY_V2));
    }
    if amd {
        entries.extend(amd_caches.into_iter().flatten());
        entries.push(topology.amd_unit());
    }
    for entry in &mut entries {
        topology.adapt(entry, amd);
    }
    CpuId::from_entries(&entries).expect("KVM's table and a few leaves more are below the limit")
}

fn vendor(leaf_0: &kvm_cpuid_entry2) -> [u8; 12] {
    let mut name = [0; 12];
    for (to, from) in name
        .chunks_exact_mut(4)
        .zip([leaf_0.ebx, leaf_0.edx, leaf_0.ecx])
    {
        to.copy_from_slice(&from.to_le_bytes());
    }
    name
}

/// Where a vCPU is among the others.
struct Topology {
    id: u32,
    count: u32,
    /// Low bits of an APIC ID that tell the threads of a core apart.
    thread_bits: u32,
    /// Low bits of an APIC ID that tell all vCPUs apart.
    package_bits: u32,
}

impl Topology {
    fn new(index: u8, count: u8, smt: bool) -> Topology {
        let count = u32::from(count.max(1));
        Topology {
            id: u32::from(index),
            count,
            thread_bits: u32::from(smt && count > 1),
            package_bits: count.next_power_of_two().trailing_zeros(),
        }
    }

    fn threads(&self) -> u32 {
        1 << self.thread_bits
    }

    fn adapt(&self, entry: &mut kvm_cpuid_entry2, amd: bool) {
        match entry.function {
            FEATURES => {
                let ids = 1 << self.package_bits;
                entry.ebx = (entry.ebx & 0xff) | CLFLUSH_64 | (ids << 16) | (self.id << 24);
                entry.ecx = (entry.ecx & !PDCM) | TSC_DEADLINE | HYPERVISOR;
                entry.edx = with(entry.edx, HTT, self.count > 1);
            }
            CACHES if entry.eax & 0x1f != 0 => {
                let cores = 1 << (self.package_bits - self.thread_bits);
                entry.eax = (self.share(entry.eax) & 0x03ff_ffff) | ((cores - 1) << 26);
            }
            MORE_FEATURES if entry.index == 0 => {
                entry.ecx &= !WAITPKG;
                entry.edx &= if amd { !ARCH_CAPABILITIES } else { !0 };
            }
            // No performance counters: they are the host's.
            PERFORMANCE => {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
            }
            AMD_FEATURES if amd => {
                entry.ecx = with(entry.ecx, CMP_LEGACY, self.count > 1) | TOPOLOGY_EXTENSIONS;
            }
            AMD_SIZES if amd => {
                entry.ecx = (entry.ecx & !0xf0ff) | (self.package_bits << 12) | (self.count - 1);
            }
            AMD_CACHES if amd && entry.eax & 0x1f != 0 => entry.eax = self.share(entry.eax),
            _ => {}
        }
    }

    /// Leaves 4 and 0x8000_001D, EAX bits 25 to 14: how many IDs share a cache, less one. Levels
    /// 1 and 2 belong to a core, level 3 to everybody.
    fn share(&self, eax: u32) -> u32 {
        let level = (eax >> 5) & 0x7;
        let bits = if level <= 2 {
            self.thread_bits
        } else {
            self.package_bits
        };
        (eax & !0x03ff_c000) | (((1 << bits) - 1) << 14)
    }

    /// Leaves 0xB and 0x1F: threads of a core, cores of the package.
    fn levels(&self, function: u32) -> [kvm_cpuid_entry2; 2] {
        [
            (self.thread_bits, self.threads(), LEVEL_THREAD),
            (self.package_bits, self.count, LEVEL_CORE | 1),
        ]
        .map(|(eax, ebx, ecx)| kvm_cpuid_entry2 {
            function,
            index: ecx & 0xff,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax,
            ebx,
            ecx,
            edx: self.id,
            ..kvm_cpuid_entry2::default()
        })
    }

    /// Leaf 0x8000_001E: core and threads per core, one node.
    fn amd_unit(&self) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function: AMD_TOPOLOGY,
            eax: self.id,
            ebx: (self.id >> self.thread_bits) | ((self.threads() - 1) << 8),
            ..kvm_cpuid_entry2::default()
        }
    }
}

fn with(register: u32, bit: u32, on: bool) -> u32 {
    if on { register | bit } else { register & !bit }
}

/// Leaf 0x8000_001D, which KVM leaves empty, from the older leaves about caches.
fn amd_caches(
    l1: Option<kvm_cpuid_entry2>,
    l2_l3: Option<kvm_cpuid_entry2>,
) -> Vec<kvm_cpuid_entry2> {
    const DATA: u32 = 1;
    const INSTRUCTION: u32 = 2;
    const UNIFIED: u32 = 3;
    let (l1, l2) = (l1.unwrap_or_default(), l2_l3.unwrap_or_default());
    // Size in KiB, ways, bytes of a line.
    let l1_cache = |r: u32| (r >> 24, (r >> 16) & 0xff, r & 0xff);
    let caches = [
        (DATA, 1, l1_cache(l1.ecx)),
        (INSTRUCTION, 1, l1_cache(l1.edx)),
        (UNIFIED, 2, (l2.ecx >> 16, ways(l2.ecx), l2.ecx & 0xff)),
        (
            UNIFIED,
            3,
            ((l2.edx >> 18) * 512, ways(l2.edx), l2.edx & 0xff),
        ),
    ];
    let mut entries: Vec<kvm_cpuid_entry2> = Vec::new();
    for (kind, level, (kib, ways, line)) in caches {
        if kib == 0 || ways == 0 || line == 0 {
            continue;
        }
        entries.push(kvm_cpuid_entry2 {
            function: AMD_CACHES,
            index: entries.len() as u32,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            // Bit 8: works without being initialised by software.
            eax: kind | (level << 5) | (1 << 8),
            ebx: (line - 1) | ((ways - 1) << 22),
            ecx: (kib * 1024 / (ways * line)).max(1) - 1,
            ..kvm_cpuid_entry2::default()
        });
    }
    entries
}

/// Leaf 0x8000_0006, bits 15 to 12: associativity as a code (AMD APM volume 3, table E-4).
fn ways(register: u32) -> u32 {
    match (register >> 12) & 0xf {
        n @ 1..=4 => n,
        5 => 6,
        6 => 8,
        8 | 9 => 16,
        0xa => 32,
        0xb => 48,
        0xc => 64,
        0xd => 96,
        0xe => 128,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
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
        let masks: Vec<CpuidModifier> = serde_json::from_value(serde_json::json!([
            {"leaf": "0x7", "subleaf": "0x0", "flags": 1, "modifiers": [
                {"register": "ebx", "bitmap": "0b0xxx_xxxx_xxxx_xxxx_xxxx_xxxx_xxxx_xx0x"},
                {"register": "ecx", "bitmap": "0b1"},
                {"register": "ebx", "bitmap": "0bx"}]},
            {"leaf": "0x1", "subleaf": "0x0", "flags": 0, "modifiers": [
                {"register": "ebx", "bitmap": "0b11111111xxxxxxxxxxxxxxxxxxxxxxxx"}]},
        ]))
        .unwrap();
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

        let absent: Vec<CpuidModifier> = serde_json::from_value(serde_json::json!([
            {"leaf": "0x7", "subleaf": "0x9", "flags": 0, "modifiers": []}]))
        .unwrap();
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
}
