//! Exceptions: none is expected, so each is reported on the serial port and ends the machine.
//!
//! The stubs of boot.s save what the processor pushed and return to ring 3 here.

use crate::{serial, words, x86};

unsafe extern "C" {
    static fault_stubs: u8;
    static mut idt: [[u64; 2]; 32];
    static fault_words: [u64; 7];
}

/// Present interrupt gate to code selector 8, callable from ring 0 only.
const GATE: u64 = 0x8e00_0008_0000;
/// Size of a stub: a call of five bytes, padded.
const STUB: u64 = 8;
/// The vectors whose exceptions push an error code.
const WITH_ERROR_CODE: u32 = 1 << 8 | 0b11111 << 10 | 1 << 17 | 1 << 21 | 1 << 29 | 1 << 30;

/// Points every gate at its stub.
pub fn install() {
    let stubs = &raw const fault_stubs as u64;
    for vector in 0..32u64 {
        let stub = stubs + vector * STUB;
        let low = stub & 0xffff | GATE | (stub & 0xffff_0000) << 32;
        // SAFETY: boot.s reserves 32 gates; nothing else writes them.
        unsafe { (&raw mut idt[vector as usize]).write_volatile([low, stub >> 32]) };
    }
}

/// Empties the table, so that the next exception is a triple fault.
pub fn uninstall() {
    // SAFETY: as in `install`.
    unsafe { (&raw mut idt).write_volatile([[0; 2]; 32]) };
}

/// Where boot.s comes back to ring 3 after an exception.
#[unsafe(no_mangle)]
extern "C" fn fault_main() -> ! {
    // SAFETY: boot.s wrote it just before; no further exception has happened since.
    let words = unsafe { (&raw const fault_words).read_volatile() };
    let vector = words[0].wrapping_sub(&raw const fault_stubs as u64) / STUB;
    let has_code = vector < 32 && WITH_ERROR_CODE & 1 << vector != 0;
    let (code, rip, cs) = if has_code {
        (words[1], words[2], words[3])
    } else {
        (0, words[1], words[2])
    };
    serial::line(format_args!(
        "exception {vector} code {code:#x} at {cs:#x}:{rip:#x} address {:#x} time {}",
        words[6],
        x86::rdtsc()
    ));
    words::power::reset();
}
