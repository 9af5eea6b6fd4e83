//! Words that end the machine.

use super::{Arguments, Outcome};
use crate::{clock, fault, serial, text, x86};

const KEYBOARD_COMMAND: u16 = 0x64;
/// Pulse the reset line.
const RESET: u8 = 0xfe;
/// How long a monitor may take to end the machine.
const PATIENCE_MS: u64 = 2000;

/// By the keyboard controller; by a triple fault if that is not heard.
pub fn reset() -> ! {
    x86::outb(KEYBOARD_COMMAND, RESET);
    clock::wait_ms(PATIENCE_MS);
    serial::line(format_args!("reset not heard, triple fault follows"));
    triple_fault()
}

pub fn reset_word(_: &mut Arguments) -> Outcome {
    reset()
}

pub fn triple(_: &mut Arguments) -> Outcome {
    triple_fault()
}

/// An exception with an empty exception table.
fn triple_fault() -> ! {
    fault::uninstall();
    // SAFETY: this is the last instruction.
    unsafe { core::arch::asm!("ud2", options(noreturn)) }
}

/// By the sleep control register of hardware-reduced ACPI (ACPI 6.x, section 4.8.3.7).
pub fn poweroff(_: &mut Arguments) -> Outcome {
    const SLEEP_ENABLE_TYPE_5: u8 = 1 << 5 | 5 << 2;
    let (space, address) = super::firmware::sleep_control()?;
    write(space, address, SLEEP_ENABLE_TYPE_5);
    clock::wait_ms(PATIENCE_MS);
    Err("power-off not heard".into())
}

/// By the FADT's reset register (ACPI 6.x, section 4.8.3.6).
pub fn acpi_reset(_: &mut Arguments) -> Outcome {
    let (space, address, value) = super::firmware::reset_register()?;
    write(space, address, value);
    clock::wait_ms(PATIENCE_MS);
    Err("reset not heard".into())
}

/// One byte to a register in memory, or at a port.
fn write(space: u64, address: u64, value: u8) {
    match space {
        0 => x86::store(address, 1, u64::from(value)),
        _ => x86::outb(address as u16, value),
    }
}

/// Says that a kernel panicked, as Linux's driver pvpanic does, and goes on.
pub fn tell_panic(_: &mut Arguments) -> Outcome {
    const PORT: u16 = 0x603;
    const PANICKED: u8 = 1;
    let understood = x86::inb(PORT);
    if understood & PANICKED == 0 {
        return Err(text!("the panic register reads {understood:#x}"));
    }
    x86::outb(PORT, PANICKED);
    Ok(text!("understood={understood:#x}"))
}

/// Writes the exit code; the bits above a byte go into the other bytes of a wider access.
pub fn exit_code(arguments: &mut Arguments) -> Outcome {
    const PORT: u16 = 0x610;
    let code = arguments.number("the code")? as u32;
    let size = arguments.number_or("the size", 1)?;
    let count = arguments.number_or("the count", 1)?;
    if x86::inb(PORT) != 0 {
        return Err("there is no port for it".into());
    }
    for _ in 0..count {
        match size {
            1 => x86::outb(PORT, code as u8),
            2 => x86::outw(PORT, code as u16),
            4 => x86::outl(PORT, code),
            _ => return Err(text!("no access has {size} bytes")),
        }
    }
    Ok(text!("inb={}", x86::inb(PORT)))
}

/// A page fault that is reported: tests of src/fault.rs.
pub fn fault(_: &mut Arguments) -> Outcome {
    x86::load(0x7f00_0000_1000, 8);
    Err("memory where there is none".into())
}

pub fn panic(_: &mut Arguments) -> Outcome {
    panic!("asked for")
}
