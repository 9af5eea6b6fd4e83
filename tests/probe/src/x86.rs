//! Instructions Rust has no words for, and the memory functions the compiler calls.
//!
//! All of them are allowed in ring 3, in and out by IOPL 3.

use core::arch::asm;

/// The serial port's and the keyboard controller's width.
pub fn outb(port: u16, value: u8) {
    // SAFETY: a port write has no effect on this program's memory.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack)) }
}

pub fn outw(port: u16, value: u16) {
    // SAFETY: as for outb.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value, options(nomem, nostack)) }
}

pub fn outl(port: u16, value: u32) {
    // SAFETY: as for outb.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack)) }
}

pub fn inb(port: u16) -> u8 {
    let value: u8;
    // SAFETY: a port read has no effect on this program's memory.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack)) }
    value
}

pub fn inw(port: u16) -> u16 {
    let value: u16;
    // SAFETY: as for inb.
    unsafe { asm!("in ax, dx", in("dx") port, out("ax") value, options(nomem, nostack)) }
    value
}

pub fn inl(port: u16) -> u32 {
    let value: u32;
    // SAFETY: as for inb.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack)) }
    value
}

/// String output: `rep outsb`, the form that reaches a monitor as several items at once.
pub fn outs(port: u16, bytes: &[u8]) {
    // SAFETY: reads exactly the bytes of the slice.
    unsafe {
        asm!("rep outsb", in("dx") port, inout("rsi") bytes.as_ptr() => _,
             inout("rcx") bytes.len() => _, options(readonly, nostack))
    }
}

/// String input: `rep insb`.
pub fn ins(port: u16, bytes: &mut [u8]) {
    // SAFETY: writes exactly the bytes of the slice.
    unsafe {
        asm!("rep insb", in("dx") port, inout("rdi") bytes.as_mut_ptr() => _,
             inout("rcx") bytes.len() => _, options(nostack))
    }
}

/// Reads `size` (1, 2, 4 or 8) bytes of a device register or of foreign memory.
pub fn load(address: u64, size: u8) -> u64 {
    let value: u64;
    // SAFETY: the callers' addresses lie in device windows, firmware tables or the arena;
    // anything else ends in src/fault.rs, not in undefined behaviour of this program's data.
    unsafe {
        match size {
            1 => {
                asm!("movzx {v:e}, byte ptr [{a}]", v = out(reg) value, a = in(reg) address, options(nostack))
            }
            2 => {
                asm!("movzx {v:e}, word ptr [{a}]", v = out(reg) value, a = in(reg) address, options(nostack))
            }
            4 => {
                asm!("mov {v:e}, dword ptr [{a}]", v = out(reg) value, a = in(reg) address, options(nostack))
            }
            _ => {
                asm!("mov {v}, qword ptr [{a}]", v = out(reg) value, a = in(reg) address, options(nostack))
            }
        }
    }
    value
}

/// Writes the low `size` (1, 2, 4 or 8) bytes of `value`.
pub fn store(address: u64, size: u8, value: u64) {
    // SAFETY: as for `load`; what lies at the address is never a Rust object in use.
    unsafe {
        match size {
            1 => {
                asm!("mov byte ptr [{a}], {v}", v = in(reg_byte) value as u8, a = in(reg) address, options(nostack))
            }
            2 => {
                asm!("mov word ptr [{a}], {v:x}", v = in(reg) value, a = in(reg) address, options(nostack))
            }
            4 => {
                asm!("mov dword ptr [{a}], {v:e}", v = in(reg) value, a = in(reg) address, options(nostack))
            }
            _ => {
                asm!("mov qword ptr [{a}], {v}", v = in(reg) value, a = in(reg) address, options(nostack))
            }
        }
    }
}

/// The time stamp counter.
pub fn rdtsc() -> u64 {
    // SAFETY: reads a counter; CR4.TSD is clear.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// CPUID as ring 3 sees it: (eax, ebx, ecx, edx).
pub fn cpuid(leaf: u32, subleaf: u32) -> (u32, u32, u32, u32) {
    let r = core::arch::x86_64::__cpuid_count(leaf, subleaf);
    (r.eax, r.ebx, r.ecx, r.edx)
}

// The compiler turns copies and comparisons into calls of these.

#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    // SAFETY: the caller vouches for both ranges, which do not overlap.
    unsafe {
        asm!("rep movsb", inout("rdi") to => _, inout("rsi") from => _,
             inout("rcx") count => _, options(nostack))
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= count {
        // SAFETY: copying upwards never overwrites what is still to be read.
        return unsafe { memcpy(to, from, count) };
    }
    // SAFETY: copying downwards from the last byte; `count` is not zero here.
    unsafe {
        asm!("std", "rep movsb", "cld",
             inout("rdi") to.add(count - 1) => _, inout("rsi") from.add(count - 1) => _,
             inout("rcx") count => _, options(nostack))
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, value: i32, count: usize) -> *mut u8 {
    // SAFETY: the caller vouches for the range.
    unsafe {
        asm!("rep stosb", inout("rdi") to => _, inout("rcx") count => _,
             in("al") value as u8, options(nostack))
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, count: usize) -> i32 {
    for i in 0..count {
        // SAFETY: the caller vouches for both ranges.
        let (x, y) = unsafe { (a.add(i).read_volatile(), b.add(i).read_volatile()) };
        if x != y {
            return i32::from(x) - i32::from(y);
        }
    }
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, count: usize) -> i32 {
    // SAFETY: the caller vouches for both ranges.
    unsafe { memcmp(a, b, count) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn strlen(text: *const u8) -> usize {
    let mut length = 0;
    // SAFETY: the caller vouches for a terminating zero.
    while unsafe { text.add(length).read_volatile() } != 0 {
        length += 1;
    }
    length
}
