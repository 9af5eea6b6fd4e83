//! What is known of a vCPU that cannot go on: where it was, and what it had left the guest for
//! before. Gathered on the vCPU's own thread, behind its filter, without allocation.

use std::fmt;

use kvm_bindings::{kvm_regs, kvm_sregs};

use super::exits::{Access, End};
use super::instruction;
use crate::sys::kvm::{INSTRUCTION_MAX, Vcpu};

/// How many exits are remembered.
const REMEMBERED: usize = 8;

/// The last accesses of a vCPU to ports and registers, the oldest first.
#[derive(Clone, Copy, Debug, Default)]
pub struct LastExits {
    /// A ring: the oldest is the one that `next` will replace.
    ring: [LastExit; REMEMBERED],
    next: usize,
}

/// One of them. As `Access::None`, there was none yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LastExit {
    access: Access,
    /// The port, or the guest physical address.
    address: u64,
}

impl fmt::Display for LastExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (space, direction) = match self.access {
            Access::PortRead => ("port", "in"),
            Access::PortWrite => ("port", "out"),
            Access::MemoryRead => ("mmio", "read"),
            Access::MemoryWrite => ("mmio", "write"),
            Access::None => return f.write_str("none"),
        };
        write!(f, "{space} {:#x} {direction}", self.address)
    }
}

impl LastExits {
    /// Remembers one more. It is on the way of every exit: two stores.
    #[inline]
    pub(super) fn push(&mut self, access: Access, address: u64) {
        if let Some(slot) = self.ring.get_mut(self.next & (REMEMBERED - 1)) {
            *slot = LastExit { access, address };
        }
        self.next = self.next.wrapping_add(1);
    }

    /// From the oldest to the last.
    pub fn iter(&self) -> impl Iterator<Item = LastExit> + '_ {
        let oldest = self.next & (REMEMBERED - 1);
        let (newer, older) = self.ring.split_at_checked(oldest).unwrap_or_default();
        let all = older.iter().chain(newer).copied();
        all.filter(|exit| exit.access != Access::None)
    }
}

const _: () = assert!(REMEMBERED.is_power_of_two());

/// The registers that tell where a vCPU was, its last exits, and what KVM says of the instruction.
#[derive(Clone, Copy, Debug, Default)]
pub struct Crash {
    /// The instruction pointer, where KVM could tell it.
    pub rip: Option<u64>,
    /// The address of the last page fault, where KVM could tell it.
    pub cr2: Option<u64>,
    /// What the vCPU left the guest for before.
    pub last_exits: LastExits,
    instruction: [u8; INSTRUCTION_MAX],
    instruction_len: usize,
}

impl Crash {
    /// What `vcpu` tells after `end`.
    pub(super) fn of(vcpu: &Vcpu, end: End, last_exits: LastExits) -> Self {
        let mut crash = Crash {
            last_exits,
            ..Crash::default()
        };
        if let (Ok(regs), Ok(sregs)) = (vcpu.get_regs(), vcpu.get_sregs())
            && !(end == End::TripleFault && are_of_a_reset(&regs, &sregs))
        {
            crash.rip = Some(regs.rip);
            crash.cr2 = Some(sregs.cr2);
        }
        if let End::InternalError { .. } = end {
            let error = vcpu.internal_error();
            crash.instruction = error.instruction;
            crash.instruction_len = error.instruction_len;
        }
        crash
    }

    /// The bytes of the instruction that KVM could not emulate, as far as it tells.
    pub fn instruction(&self) -> &[u8] {
        let told = self.instruction.get(..self.instruction_len);
        told.unwrap_or_default()
    }

    /// The name of that instruction, where it is known.
    pub fn instruction_name(&self) -> Option<&'static str> {
        instruction::name(self.instruction())
    }
}

/// Whether KVM has reset the registers: on AMD it does so when the processor shuts down, because
/// they are undefined from then on. Where the guest was is not known then.
fn are_of_a_reset(regs: &kvm_regs, sregs: &kvm_sregs) -> bool {
    const RESET_CS: u64 = 0xffff_0000;
    const RESET_RIP: u64 = 0xfff0;
    const CR0_PROTECTED: u64 = 1;
    regs.rip == RESET_RIP && sregs.cs.base == RESET_CS && sregs.cr0 & CR0_PROTECTED == 0
}

impl fmt::Display for Crash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.rip, self.cr2) {
            (Some(rip), Some(cr2)) => write!(f, "RIP {rip:#x}, CR2 {cr2:#x}")?,
            _ => f.write_str("RIP and CR2 not available from KVM")?,
        }
        for (i, byte) in self.instruction().iter().enumerate() {
            f.write_str(if i == 0 { ", instruction bytes " } else { " " })?;
            write!(f, "{byte:02x}")?;
        }
        if let Some(name) = self.instruction_name() {
            write!(f, " ({name})")?;
        }
        let mut exits = self.last_exits.iter();
        match exits.next() {
            Some(first) => write!(f, ", last exits: {first}")?,
            None => f.write_str(", no exits before")?,
        }
        exits.try_for_each(|exit| write!(f, ", {exit}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_exits_when_there_are_more_keeps_the_newest_in_order() {
        let mut last = LastExits::default();
        assert_eq!(last.iter().count(), 0);
        last.push(Access::PortWrite, 0x3f8);
        last.push(Access::MemoryWrite, 0xc000_1050);
        let told: Vec<String> = last.iter().map(|e| e.to_string()).collect();
        assert_eq!(told, ["port 0x3f8 out", "mmio 0xc0001050 write"]);
        for port in 0..100 {
            last.push(Access::PortRead, port);
        }
        let told: Vec<u64> = last.iter().map(|exit| exit.address).collect();
        assert_eq!(told, (92..100).collect::<Vec<_>>());
    }

    #[test]
    fn crash_when_shown_has_registers_instruction_and_exits() {
        let mut crash = Crash {
            rip: Some(0xffff_ffff_8100_0000),
            cr2: Some(0x10),
            ..Crash::default()
        };
        assert_eq!(
            crash.to_string(),
            "RIP 0xffffffff81000000, CR2 0x10, no exits before"
        );
        crash.last_exits.push(Access::PortRead, 0x60);
        crash.last_exits.push(Access::MemoryRead, 0xd000_0000);
        crash.instruction[..2].copy_from_slice(&[0x0f, 0xc7]);
        crash.instruction_len = 2;
        assert_eq!(
            crash.to_string(),
            "RIP 0xffffffff81000000, CR2 0x10, instruction bytes 0f c7, \
             last exits: port 0x60 in, mmio 0xd0000000 read"
        );
        crash.instruction[..4].copy_from_slice(&[0xf3, 0x0f, 0xb8, 0xc7]);
        crash.instruction_len = 4;
        assert_eq!(
            crash.to_string(),
            "RIP 0xffffffff81000000, CR2 0x10, instruction bytes f3 0f b8 c7 (popcnt), \
             last exits: port 0x60 in, mmio 0xd0000000 read"
        );
        crash.rip = None;
        assert!(crash.to_string().starts_with("RIP and CR2 not available"));
    }

    #[test]
    fn registers_when_kvm_has_reset_them_are_recognised() {
        let mut regs = kvm_regs {
            rip: 0xfff0,
            ..kvm_regs::default()
        };
        let mut sregs = kvm_sregs::default();
        sregs.cs.base = 0xffff_0000;
        sregs.cr0 = 0x6000_0010;
        assert!(are_of_a_reset(&regs, &sregs));
        sregs.cr0 |= 1;
        assert!(!are_of_a_reset(&regs, &sregs));
        sregs.cr0 &= !1;
        regs.rip = 0x10_0000;
        assert!(!are_of_a_reset(&regs, &sregs));
    }
}
