//! The model-specific registers a kernel finds set when it starts. What KVM sets by itself at
//! creation (time stamp counter, SYSENTER, STAR and the like: 0) is left alone.

use kvm_bindings::kvm_msr_entry;

/// IA32_MISC_ENABLE: bit 0, fast strings, or Linux takes `rep movs` for slow
/// (Intel SDM volume 4, table 2-2).
const MISC_ENABLE: u32 = 0x1a0;
const FAST_STRINGS: u64 = 1;

/// IA32_MTRR_DEF_TYPE: bit 11, enabled; memory is write-back where nothing else is said
/// (Intel SDM volume 3, section 12.11.2.1).
const MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLED: u64 = 1 << 11;
const WRITE_BACK: u64 = 6;

/// The time stamp counter, and the value of it at which the local APIC's timer goes off (Intel SDM
/// volume 4, table 2-2).
pub const TSC: u32 = 0x10;
pub const TSC_DEADLINE: u32 = 0x6e0;

/// Registers and values, the same on every vCPU.
pub const BOOT: [kvm_msr_entry; 2] = [
    kvm_msr_entry {
        index: MISC_ENABLE,
        reserved: 0,
        data: FAST_STRINGS,
    },
    kvm_msr_entry {
        index: MTRR_DEF_TYPE,
        reserved: 0,
        data: MTRR_ENABLED | WRITE_BACK,
    },
];
