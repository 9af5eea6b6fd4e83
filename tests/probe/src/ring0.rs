//! What only ring 0 can do, asked for from ring 3 by a page fault (boot.s, `serve`).
//!
//! Each costs some microseconds where ring 0 is emulated; nothing here is for hot paths.

use core::arch::global_asm;

global_asm!(include_str!("boot.s"));

const HALT: u32 = 1;
const READ_MSR: u32 = 2;
const CPUID: u32 = 3;
const WRITE_MSR: u32 = 4;

unsafe extern "C" {
    fn ring0_call(request: u32, registers: *mut [u32; 4]);
}

/// Halts this processor for ever, interrupts off.
pub fn halt() -> ! {
    let mut registers = [0; 4];
    // SAFETY: boot.s serves this request by never coming back.
    unsafe { ring0_call(HALT, &raw mut registers) };
    unreachable!("ring 0 came back from a halt")
}

/// Reads a model-specific register; one that is not there ends in a general protection fault.
pub fn rdmsr(index: u32) -> u64 {
    let mut registers = [0, 0, index, 0];
    // SAFETY: the call saves what it changes and writes only `registers`.
    unsafe { ring0_call(READ_MSR, &raw mut registers) };
    u64::from(registers[3]) << 32 | u64::from(registers[0])
}

/// Writes a model-specific register.
pub fn wrmsr(index: u32, value: u64) {
    let mut registers = [value as u32, 0, index, (value >> 32) as u32];
    // SAFETY: as for rdmsr; the caller knows what the register does.
    unsafe { ring0_call(WRITE_MSR, &raw mut registers) };
}

/// CPUID as ring 0 sees it: on software KVM not the same as in ring 3.
pub fn cpuid(leaf: u32, subleaf: u32) -> (u32, u32, u32, u32) {
    let mut registers = [leaf, 0, subleaf, 0];
    // SAFETY: as for rdmsr.
    unsafe { ring0_call(CPUID, &raw mut registers) };
    (registers[0], registers[1], registers[2], registers[3])
}
