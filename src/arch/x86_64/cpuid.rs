//! What a vCPU answers to CPUID: what KVM supports, with the topology of the guest instead of
//! the host's. Pure, but for [`supported`].
//!
//! One package; vCPU number n has the APIC ID n; with SMT two neighbours share a core and its
//! first two levels of cache. IDs are laid out in powers of two, as kernels expect, so that a
//! guest of 3 vCPUs has room for 4.

#[cfg(test)]
mod tests;

use std::error::Error;
use std::fmt;

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;

use super::mask::{CpuidMask, CpuidRegister};

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

/// The first of the hypervisor's leaves, whose EAX is the last of them; and the one that tells the
/// rates of the processor's counter and of the local APIC's timer, in kHz.
const HYPERVISOR_LEAVES: u32 = 0x4000_0000;
const RATES: u32 = 0x4000_0010;
/// KVM's local APICs count nanoseconds.
const APIC_KHZ: u32 = 1_000_000;

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
pub fn mask(supported: &mut CpuId, masks: &[CpuidMask]) -> Result<(), NoSuchLeaf> {
    for mask in masks {
        let (leaf, subleaf) = (mask.leaf, mask.subleaf);
        let entry = supported
            .as_mut_slice()
            .iter_mut()
            .find(|entry| (entry.function, entry.index) == (leaf, subleaf))
            .ok_or(NoSuchLeaf { leaf, subleaf })?;
        entry.flags = mask.flags;
        for (register, change) in &mask.changes {
            let register = match register {
                CpuidRegister::Eax => &mut entry.eax,
                CpuidRegister::Ebx => &mut entry.ebx,
                CpuidRegister::Ecx => &mut entry.ecx,
                CpuidRegister::Edx => &mut entry.edx,
            };
            // Of the mask, the low 32 bits: the register has no more.
            *register = change.apply(u64::from(*register)) as u32;
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

/// The same table with the rate of the processor's counter in it, which a guest without KVM's clock
/// would have to measure.
#[cfg_attr(
    not(test),
    expect(
        clippy::expect_used,
        reason = "the list is of the host and ours, and short"
    )
)]
pub fn with_rates(table: &CpuId, tsc_khz: u32) -> CpuId {
    let mut entries = table.as_slice().to_vec();
    let first = entries
        .iter_mut()
        .find(|entry| entry.function == HYPERVISOR_LEAVES);
    // KVM's own leaves are there on every host; a table without them is not given others.
    let Some(first) = first else {
        return table.clone();
    };
    first.eax = first.eax.max(RATES);
    entries.retain(|entry| entry.function != RATES);
    entries.push(kvm_cpuid_entry2 {
        function: RATES,
        eax: tsc_khz,
        ebx: APIC_KHZ,
        ..kvm_cpuid_entry2::default()
    });
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
