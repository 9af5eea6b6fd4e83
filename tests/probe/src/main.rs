#![no_std]
#![no_main]
use core::arch::global_asm;
global_asm!(
    ".pushsection .note.pvh, \"a\", @note",
    ".balign 4",
    ".long 4, 8, 18",
    ".asciz \"Xen\"",
    ".quad linux64_entry",
    ".popsection",
    ".globl linux64_entry",
    "linux64_entry: hlt"
);
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}
