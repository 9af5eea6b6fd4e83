//! The smallest guest, for measuring a start: its third instruction writes a byte.
//!
//! It owns nothing and never returns: `!` on the serial port, then a reset. Variants (one
//! that halts, one of 20 MiB) are made by `probe_host::elf`, from the same code bytes.

#![no_std]
#![no_main]

use core::arch::global_asm;

mod code;

/// The code, placed by the linker script; both entries point here.
#[unsafe(no_mangle)]
#[unsafe(link_section = ".text.firstbyte")]
#[used]
static firstbyte_code: [u8; code::RESET.len()] = code::RESET;

// The PVH note: XEN_ELFNOTE_PHYS32_ENTRY (18) with the entry's physical address.
global_asm!(
    ".pushsection .note.pvh, \"a\", @note",
    ".balign 4",
    ".long 4, 8, 18",
    ".asciz \"Xen\"",
    ".quad firstbyte_code",
    ".popsection",
);

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {
        core::hint::spin_loop();
    }
}
