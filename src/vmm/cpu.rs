//! From the CPU configuration's words to what `arch` and KVM are asked for.

use std::ffi::c_ulong;

use kvm_ioctls::Kvm;

use crate::arch::mask::{BitMask, CpuidMask, CpuidRegister, MsrMask};
use crate::wire::config::cpu::{self, Bitmap, CpuConfig, KvmCapability};

/// The changes to CPUID.
pub fn cpuid_masks(config: &CpuConfig) -> Vec<CpuidMask> {
    let masks = config.cpuid_modifiers.iter().map(|leaf| CpuidMask {
        leaf: leaf.leaf,
        subleaf: leaf.subleaf,
        flags: leaf.flags,
        changes: leaf
            .modifiers
            .iter()
            .map(|change| (register(change.register), mask(change.bitmap)))
            .collect(),
    });
    masks.collect()
}

/// The changes to model-specific registers.
pub fn msr_masks(config: &CpuConfig) -> Vec<MsrMask> {
    let masks = config.msr_modifiers.iter().map(|msr| MsrMask {
        address: msr.addr,
        mask: mask(msr.bitmap),
    });
    masks.collect()
}

/// The number of a capability that the configuration asks KVM to have, and that it has not.
pub fn missing_capability(kvm: &Kvm, config: &CpuConfig) -> Option<u32> {
    let asked_for = config.kvm_capabilities.iter();
    let mut numbers = asked_for.filter_map(|capability| match capability {
        KvmCapability::Add(number) => Some(*number),
        KvmCapability::Remove(_) => None,
    });
    numbers.find(|number| kvm.check_extension_raw(c_ulong::from(*number)) <= 0)
}

const fn mask<const BITS: usize>(bitmap: Bitmap<BITS>) -> BitMask {
    BitMask {
        bits: bitmap.filter,
        value: bitmap.value,
    }
}

const fn register(register: cpu::CpuidRegister) -> CpuidRegister {
    match register {
        cpu::CpuidRegister::Eax => CpuidRegister::Eax,
        cpu::CpuidRegister::Ebx => CpuidRegister::Ebx,
        cpu::CpuidRegister::Ecx => CpuidRegister::Ecx,
        cpu::CpuidRegister::Edx => CpuidRegister::Edx,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_when_taken_from_a_configuration_are_its_bits() {
        let config: CpuConfig = serde_json::from_value(serde_json::json!({
            "cpuid_modifiers": [{"leaf": "0x7", "subleaf": "0x1", "flags": 1, "modifiers": [
                {"register": "ebx", "bitmap": "0b01x"},
                {"register": "edx", "bitmap": "0b1"}]}],
            "msr_modifiers": [{"addr": "0x174", "bitmap": "0b1x0"}],
        }))
        .unwrap();
        let of = |bits, value| BitMask { bits, value };
        assert_eq!(
            cpuid_masks(&config),
            [CpuidMask {
                leaf: 7,
                subleaf: 1,
                flags: 1,
                changes: vec![
                    (CpuidRegister::Ebx, of(0b110, 0b010)),
                    (CpuidRegister::Edx, of(1, 1))
                ],
            }]
        );
        let (address, mask) = (0x174, of(0b101, 0b100));
        assert_eq!(msr_masks(&config), [MsrMask { address, mask }]);
        assert!(cpuid_masks(&CpuConfig::default()).is_empty());
    }
}
