//! Changes to what a vCPU shows of the processor, as plain numbers.

use serde::{Deserialize, Serialize};

/// Bits of a register that are set to a value; the others stay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BitMask {
    /// Which bits.
    pub bits: u64,
    /// What they become.
    pub value: u64,
}

impl BitMask {
    /// The register's new value.
    pub const fn apply(self, register: u64) -> u64 {
        register & !self.bits | self.value & self.bits
    }
}

/// The registers that CPUID answers in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CpuidRegister {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

/// Changes to one leaf of CPUID.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuidMask {
    /// Leaf (EAX).
    pub leaf: u32,
    /// Subleaf (ECX).
    pub subleaf: u32,
    /// `KVM_CPUID_FLAG_*`, in place of KVM's own.
    pub flags: u32,
    /// The changes, done in order.
    pub changes: Vec<(CpuidRegister, BitMask)>,
}

/// A change to a model-specific register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsrMask {
    /// Address of the register.
    pub address: u32,
    /// Which bits, and what they become.
    pub mask: BitMask,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mask_when_applied_changes_just_its_bits() {
        for (bits, value, register, expected) in [
            (0, 0, 0xffff, 0xffff),
            (0xf0, 0x50, 0xffff, 0xff5f),
            (u64::MAX, 7, u64::MAX, 7),
            // A value has no say beyond its bits.
            (0xf, 0xff, 0, 0xf),
        ] {
            assert_eq!(BitMask { bits, value }.apply(register), expected);
        }
    }
}
