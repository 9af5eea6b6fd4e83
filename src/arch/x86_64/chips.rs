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
use crate::wire::command_line::parameters;

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
const NEEDS_KERNEL: [&str; 22] = [
    "acpi=noirq",
    "acpi=off",
    "acpi=rsdt",
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

/// The parameters whose value is a list, of which one word may be a reason.
const LISTS: [&str; 2] = ["clearcpuid", "pci"];

/// What `clearcpuid=` takes from the processor that the guest's clocks need: names, and the same as
/// numbers (Linux, `arch/x86/include/asm/cpufeatures.h`).
const FEATURES: [&str; 10] = [
    "4",
    "tsc",
    "9",
    "apic",
    "104",
    "constant_tsc",
    "152",
    "tsc_deadline_timer",
    "159",
    "hypervisor",
];

/// What of CPUID a guest needs to do without the 8254: leaf, register, bits, and their value. (That
/// there is a hypervisor, and the local APIC's timer with a deadline, every guest is told: see
/// [`cpuid::table`](super::cpuid::table).)
const CLOCKS: [(u32, CpuidRegister, u64, u64); 5] = [
    // The time stamp counter, and the local APIC.
    (1, CpuidRegister::Edx, LEAF_1_EDX, LEAF_1_EDX),
    // Which hypervisor: "KVMKVMKVM".
    (0x4000_0000, CpuidRegister::Ebx, 0xffff_ffff, 0x4b4d_564b),
    (0x4000_0000, CpuidRegister::Ecx, 0xffff_ffff, 0x564b_4d56),
    (0x4000_0000, CpuidRegister::Edx, 0xffff_ffff, 0x4d),
    // Its clock.
    (KVM_FEATURES, CpuidRegister::Eax, KVM_CLOCK, KVM_CLOCK),
];
const LEAF_1_EDX: u64 = 1 << 4 | 1 << 9;
const KVM_FEATURES: u32 = 0x4000_0001;
const KVM_CLOCK: u64 = 1 << 0 | 1 << 3;

/// What suits a guest with the kernel command line `boot_args` and a processor changed by `masks`,
/// on the host whose `kvm` this is.
pub fn choose(kvm: &Kvm, boot_args: &str, masks: &[CpuidMask]) -> Chips {
    if host_can_split(kvm) && !names_a_reason(boot_args) && keeps_clocks(masks) {
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

/// Whether the command line says that the guest is to use what only KVM's chips have. Arguments of
/// init count too: some of Linux's parameters are searched for in the whole line.
fn names_a_reason(boot_args: &str) -> bool {
    parameters(boot_args).any(|parameter| is_reason(&parameter))
}

fn is_reason(parameter: &str) -> bool {
    let Some((name, value)) = parameter.split_once('=') else {
        return is_listed(parameter);
    };
    if !LISTS.contains(&name) {
        return is_listed(parameter);
    }
    let mut words = value.split(',');
    match name {
        "clearcpuid" => words.any(|word| FEATURES.contains(&word)),
        _ => words.any(|word| is_listed(&format!("{name}={word}"))),
    }
}

/// Whether it is among [`NEEDS_KERNEL`]. Linux takes `-` and `_` in a name for the same.
fn is_listed(parameter: &str) -> bool {
    let same = |a: &str, b: &str| {
        a.len() == b.len()
            && a.bytes()
                .zip(b.bytes())
                .all(|(a, b)| a == b || (matches!(a, b'-' | b'_') && matches!(b, b'-' | b'_')))
    };
    NEEDS_KERNEL.iter().any(|reason| same(parameter, reason))
}

/// Whether the guest still finds its clocks.
fn keeps_clocks(masks: &[CpuidMask]) -> bool {
    let changes = masks
        .iter()
        .flat_map(|mask| mask.changes.iter().map(move |change| (mask.leaf, change)));
    changes
        .flat_map(|change| CLOCKS.iter().map(move |clock| (change, clock)))
        .filter(|((leaf, (register, _)), clock)| (*leaf, *register) == (clock.0, clock.1))
        .all(|((_, (_, change)), (_, _, bits, value))| change.apply(*value) & bits == *value)
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
            ("clocksource=\"pit\"", true),
            ("\"noapic\"", true),
            ("dyndbg=\"file noapic +p\"", false),
            ("quiet -- noapic", true),
            ("pci=off,noacpi", true),
            ("pci=off,conf1", false),
            ("clearcpuid=tsc_deadline_timer", true),
            ("clearcpuid=avx,152,avx2", true),
            ("clearcpuid=hypervisor,popcnt", true),
            ("clearcpuid=cx16,popcnt,1520", false),
        ] {
            assert_eq!(names_a_reason(line), expected, "{line}");
        }
    }

    #[test]
    fn clocks_when_a_mask_takes_one_away_are_missed() {
        assert!(keeps_clocks(&[]));
        let (eax, ebx) = (CpuidRegister::Eax, CpuidRegister::Ebx);
        let (ecx, edx) = (CpuidRegister::Ecx, CpuidRegister::Edx);
        // Leaf, register, which bits become what, whether the clocks stay.
        for (leaf, register, bits, value, expected) in [
            (KVM_FEATURES, eax, 0x1, 0x0, false),
            (KVM_FEATURES, eax, 0x8, 0x0, false),
            (KVM_FEATURES, eax, 0x6, 0x0, true),
            (KVM_FEATURES, eax, 0xf, 0x9, true),
            (KVM_FEATURES, edx, 0xf, 0x0, true),
            (1, eax, 0xf, 0x0, true),
            // These two stay whatever a mask says.
            (1, ecx, 1 << 24, 0, true),
            (1, ecx, 1 << 31, 0, true),
            (1, edx, 1 << 4, 0, false),
            (1, edx, 1 << 9, 0, false),
            (1, edx, 1 << 10, 0, true),
            (0x4000_0000, eax, 0xffff_ffff, 0x4000_0001, true),
            (0x4000_0000, ebx, 0xffff_ffff, 0, false),
            (0x4000_0000, ebx, 0xffff_ffff, 0x4b4d_564b, true),
            (0x4000_0000, edx, 1, 0, false),
        ] {
            let mask = CpuidMask {
                leaf,
                subleaf: 0,
                flags: 0,
                changes: vec![(register, BitMask { bits, value })],
            };
            assert_eq!(keeps_clocks(&[mask]), expected, "{leaf:#x} {bits:#x}");
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
