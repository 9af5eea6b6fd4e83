//! Which interrupt chips a guest gets: KVM's own, or only their local APICs with the rest in the
//! monitor ([`super::split`]).
//!
//! The split chip is the better one for a guest that can do with it: a VM without KVM's 8254 and
//! 8259 ends some 20 ms earlier. Two kinds of guest need what only KVM's chips have, interrupts by
//! the 8259 and by the 8254: those without an I/O APIC, and those without a clock of KVM's. Linux
//! says on its command line if it is to be one of them. Where nothing was asked for, this module
//! decides by that line and by what the host has, and in doubt takes KVM's.
#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use kvm_ioctls::{Cap, Kvm};

use super::mask::{CpuidMask, CpuidRegister};

/// Where the interrupt chips are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chips {
    /// Local APICs, I/O APIC, 8259 and 8254 in KVM.
    Kernel,
    /// Local APICs in KVM, the others in the monitor, which delivers no interrupts of 8259 and
    /// 8254.
    Split,
}

/// Words of Linux's command line by which it does without I/O APIC, local APIC's timer, KVM's
/// clock or the tables that tell of processors. (Linux, `admin-guide/kernel-parameters.txt`.)
const NEEDS_KERNEL: [&str; 21] = [
    "acpi=noirq",
    "acpi=off",
    "clocksource=acpi_pm",
    "clocksource=hpet",
    "clocksource=jiffies",
    "clocksource=pit",
    "disable_timer_pin_1",
    "disableapic",
    "enable_timer_pin_1",
    "lapic=notscdeadline",
    "maxcpus=0",
    "no-kvmclock",
    "noapic",
    "noapictimer",
    "nolapic",
    "nolapic_timer",
    "nopv",
    "nosmp",
    "notsc",
    "pci=noacpi",
    "tsc=unstable",
];

/// CPUID leaf of KVM's features, and the bits of its EAX by which it has a clock.
const KVM_FEATURES: u32 = 0x4000_0001;
const KVM_CLOCK: u64 = 1 << 0 | 1 << 3;

/// What suits a guest with the kernel command line `boot_args` and a processor changed by `masks`,
/// on the host whose `kvm` this is.
pub fn choose(kvm: &Kvm, boot_args: &str, masks: &[CpuidMask]) -> Chips {
    if host_can_split(kvm) && !names_a_reason(boot_args) && keeps_clock(masks) {
        Chips::Split
    } else {
        Chips::Kernel
    }
}

/// Whether the host has what the split chip takes: it, and a timer of the local APIC that needs no
/// other timer to be measured by.
pub fn host_can_split(kvm: &Kvm) -> bool {
    kvm.check_extension(Cap::SplitIrqchip) && kvm.check_extension(Cap::TscDeadlineTimer)
}

/// Whether the command line says that the guest is to use what only KVM's chips have. Linux takes
/// `-` and `_` in a name for the same.
fn names_a_reason(boot_args: &str) -> bool {
    let same = |a: &str, b: &str| {
        a.len() == b.len()
            && a.bytes()
                .zip(b.bytes())
                .all(|(a, b)| a == b || (matches!(a, b'-' | b'_') && matches!(b, b'-' | b'_')))
    };
    boot_args
        .split([' ', '\t', '\n', '"'])
        .any(|word| NEEDS_KERNEL.iter().any(|reason| same(word, reason)))
}

/// Whether the guest still finds KVM's clock.
fn keeps_clock(masks: &[CpuidMask]) -> bool {
    let of_features = masks.iter().filter(|mask| mask.leaf == KVM_FEATURES);
    of_features
        .flat_map(|mask| &mask.changes)
        .filter(|(register, _)| *register == CpuidRegister::Eax)
        .all(|(_, change)| change.apply(KVM_CLOCK) & KVM_CLOCK == KVM_CLOCK)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::mask::BitMask;
    use crate::needs;

    #[test]
    fn command_line_when_it_names_a_reason_is_found_out() {
        for (line, expected) in [
            ("", false),
            ("console=ttyS0 reboot=k panic=1 pci=off", false),
            ("console=ttyS0 noapic reboot=k", true),
            ("noapic", true),
            ("no_kvmclock", true),
            ("no-kvmclock quiet", true),
            ("quiet\tnolapic", true),
            ("noapic=1 xnoapic noapicx", false),
            ("clocksource=kvm-clock lapic=notscdeadline", true),
            ("clocksource=tsc", false),
            ("maxcpus=0", true),
            ("maxcpus=01 maxcpus=1", false),
            ("init=\"/x\" notsc", true),
        ] {
            assert_eq!(names_a_reason(line), expected, "{line}");
        }
    }

    #[test]
    fn clock_when_a_mask_takes_it_away_is_missed() {
        assert!(keeps_clock(&[]));
        let (eax, edx) = (CpuidRegister::Eax, CpuidRegister::Edx);
        // Leaf, register, which bits become what, whether the clock stays.
        for (leaf, register, bits, value, expected) in [
            (KVM_FEATURES, eax, 0x1, 0x0, false),
            (KVM_FEATURES, eax, 0x8, 0x0, false),
            (KVM_FEATURES, eax, 0x6, 0x0, true),
            (KVM_FEATURES, eax, 0xf, 0x9, true),
            (KVM_FEATURES, edx, 0xf, 0x0, true),
            (1, eax, 0xf, 0x0, true),
        ] {
            let mask = CpuidMask {
                leaf,
                subleaf: 0,
                flags: 0,
                changes: vec![(register, BitMask { bits, value })],
            };
            assert_eq!(keeps_clock(&[mask]), expected, "{leaf:#x} {bits:#x}");
        }
    }

    #[test]
    fn choice_when_the_host_can_and_nothing_speaks_against_it_is_split() {
        needs!(kvm);
        let kvm = Kvm::new().unwrap();
        let expected = if host_can_split(&kvm) {
            Chips::Split
        } else {
            Chips::Kernel
        };
        assert_eq!(choose(&kvm, "console=ttyS0", &[]), expected);
        assert_eq!(choose(&kvm, "console=ttyS0 noapic", &[]), Chips::Kernel);
    }
}
