//! The probe: a guest without an operating system that does what its command line says.
//!
//! It owns a whole virtual machine with one processor (more with the word `smp`): boots by PVH
//! or by the 64-bit Linux protocol, drops to ring 3 after some twenty instructions, and from
//! there works natively on every KVM host, polling its devices and printing on the serial
//! port. It never takes an interrupt, never allocates beyond fixed arenas, and never trusts a
//! device to answer: every wait has a limit.
//!
//! `probe=WORD,WORD,...` on the command line are executed in order, each printing one line
//! `probe: WORD ok ...` or `probe: WORD FAILED reason` (words are listed in [`words`]). After
//! the last one the machine is reset, unless that is `stay`. Three more words of the command
//! line are read: `virtio_mmio.device=SIZE@ADDRESS:IRQ`, one for each device, `tsc_khz=N` for
//! machines that give no means to find that out, and `patience_ms=N`, after which what is not
//! answered has failed.
//!
//! ```text
//!   boot.s        entries, tables, the few instructions of ring 0
//!   boot          what the boot loader passed: command line, memory map, initrd
//!   x86 ring0 fault paging     the processor
//!   serial clock text arena    the means to work and to speak
//!   virtio/       transport and split queue, raw enough to be misused
//!   words/        what the command line can ask for
//! ```

#![no_std]
#![no_main]

mod arena;
mod boot;
mod clock;
mod fault;
mod paging;
mod pattern;
mod ring0;
mod serial;
mod text;
mod virtio;
mod words;
mod x86;

/// First code of ring 3. `protocol` and `info` come from boot.s: which entry was taken, and
/// the address of what it was given.
#[unsafe(no_mangle)]
extern "C" fn ring3_start(protocol: u32, info: u64) -> ! {
    fault::install();
    boot::read(protocol, info);
    words::run_command_line();
    words::power::reset();
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo) -> ! {
    serial::line(format_args!("panic: {}", info.message()));
    if let Some(location) = info.location() {
        serial::line(format_args!("  at {}:{}", location.file(), location.line()));
    }
    words::power::reset();
}
