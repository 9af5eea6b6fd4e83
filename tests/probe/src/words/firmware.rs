//! Words about the tables firmware would have left: MP specification 1.4 and ACPI.

use super::{Arguments, Outcome};
use crate::text::Text;
use crate::{boot, paging, serial, text, x86};

/// Where the MP specification lets the floating pointer be: the last KiB of base memory, for
/// 640 and for 639 KiB of it, and the BIOS ROM.
const MP_PLACES: [(u64, u64); 2] = [(0x9_f800, 0xa_0000), (0xe_0000, 0x10_0000)];

fn sum(at: u64, size: u64) -> u8 {
    (at..at + size).fold(0u8, |sum, at| sum.wrapping_add(x86::load(at, 1) as u8))
}

fn signature(at: u64) -> [u8; 4] {
    (x86::load(at, 4) as u32).to_le_bytes()
}

/// A signature's or identifier's printable part.
fn printable(bytes: &[u8]) -> &str {
    core::str::from_utf8(bytes).unwrap_or("?").trim_end()
}

pub fn cpus(_: &mut Arguments) -> Outcome {
    let pointer = MP_PLACES
        .iter()
        .flat_map(|(start, end)| (*start..*end).step_by(16))
        .find(|at| &signature(*at) == b"_MP_" && sum(*at, 16) == 0)
        .ok_or("no MP floating pointer")?;
    let table = x86::load(pointer + 4, 4);
    let size = x86::load(table + 4, 2);
    if &signature(table) != b"PCMP" || sum(table, size) != 0 {
        return Err(text!("MP table at {table:#x} is damaged"));
    }
    let local_apic = x86::load(table + 36, 4);
    let [
        mut processors,
        mut enabled,
        mut buses,
        mut io_apics,
        mut irqs,
        mut local,
    ] = [0u32; 6];
    let mut at = table + 44;
    let mut entries = 0;
    // By length, as Linux does: the count in the header is often wrong.
    while at < table + size {
        entries += 1;
        let byte = |offset| x86::load(at + offset, 1);
        match byte(0) {
            0 => {
                processors += 1;
                enabled += (byte(3) & 1) as u32;
                serial::line(format_args!(
                    "  processor apic id {} version {:#x} flags {:#x}",
                    byte(1),
                    byte(2),
                    byte(3)
                ));
            }
            1 => buses += 1,
            2 => {
                io_apics += 1;
                serial::line(format_args!(
                    "  ioapic id {} flags {:#x} at {:#x}",
                    byte(1),
                    byte(3),
                    x86::load(at + 4, 4)
                ));
            }
            3 => irqs += 1,
            4 => local += 1,
            kind => return Err(text!("MP entry of type {kind} at {at:#x}")),
        }
        at += if byte(0) == 0 { 20 } else { 8 };
    }
    if at != table + size {
        return Err(text!(
            "MP entries end at {at:#x}, the table at {:#x}",
            table + size
        ));
    }
    Ok(text!(
        "mp={pointer:#x} entries={entries} told={} processors={processors} enabled={enabled} buses={buses} ioapics={io_apics} irqs={irqs} local={local} lapic={local_apic:#x}",
        x86::load(table + 34, 2)
    ))
}

/// Calls `each` with the address and signature of every table; says how many there are.
fn tables(mut each: impl FnMut(u64, [u8; 4])) -> Result<u32, Text> {
    let rsdp = boot::info().rsdp;
    if rsdp == 0 {
        return Err("no RSDP was passed".into());
    }
    paging::map(rsdp, rsdp + 36)?;
    if x86::load(rsdp, 8) != u64::from_le_bytes(*b"RSD PTR ") || sum(rsdp, 20) != 0 {
        return Err(text!("RSDP at {rsdp:#x} is damaged"));
    }
    let extended = x86::load(rsdp + 15, 1) >= 2;
    if extended && sum(rsdp, 36) != 0 {
        return Err("RSDP's extended checksum is wrong".into());
    }
    let (root, width) = match extended {
        true => (x86::load(rsdp + 24, 8), 8),
        false => (x86::load(rsdp + 16, 4), 4),
    };
    check(root)?;
    each(root, signature(root));
    let mut count = 1;
    let mut entry = root + 36;
    while entry < root + x86::load(root + 4, 4) {
        let table = x86::load(entry, width);
        check(table)?;
        each(table, signature(table));
        if &signature(table) == b"FACP" {
            let wide = x86::load(table + 140, 8);
            let dsdt = if wide == 0 {
                x86::load(table + 40, 4)
            } else {
                wide
            };
            check(dsdt)?;
            each(dsdt, signature(dsdt));
            count += 1;
        }
        count += 1;
        entry += u64::from(width);
    }
    Ok(count)
}

fn check(table: u64) -> Result<(), Text> {
    paging::map(table, table + 0x10000)?;
    let size = x86::load(table + 4, 4);
    if size < 36 || sum(table, size) != 0 {
        return Err(text!("ACPI table at {table:#x}, size {size}, is damaged"));
    }
    Ok(())
}

pub fn acpi(_: &mut Arguments) -> Outcome {
    let mut processors = 0;
    let count = tables(|table, name| {
        serial::line(format_args!(
            "  acpi {} at {table:#x} size {} revision {}",
            printable(&name),
            x86::load(table + 4, 4),
            x86::load(table + 8, 1)
        ));
        if &name == b"APIC" {
            processors += enabled_processors(table);
        }
    })?;
    Ok(text!("tables={count} processors={processors}"))
}

/// Enabled local APICs and x2APICs in a MADT.
fn enabled_processors(madt: u64) -> u32 {
    let end = madt + x86::load(madt + 4, 4);
    let mut at = madt + 44;
    let mut count = 0;
    while at + 2 <= end && x86::load(at + 1, 1) >= 2 {
        count += match x86::load(at, 1) {
            0 => x86::load(at + 4, 4) & 1,
            9 => x86::load(at + 8, 4) & 1,
            _ => 0,
        };
        at += x86::load(at + 1, 1);
    }
    count as u32
}

/// The FADT, if it is long enough to have the register at `offset`.
fn fadt(offset: u64) -> Result<u64, Text> {
    let mut found = None;
    tables(|table, name| {
        if &name == b"FACP" && x86::load(table + 4, 4) >= offset + 12 {
            found = Some(table);
        }
    })?;
    found.ok_or_else(|| text!("no FADT with a register at {offset}"))
}

/// Address space and address of the FADT's register at `offset`.
fn register(offset: u64) -> Result<(u64, u64), Text> {
    let fadt = fadt(offset)?;
    let address = x86::load(fadt + offset + 4, 8);
    match address {
        0 => Err(text!("the FADT's register at {offset} has no address")),
        _ => Ok((x86::load(fadt + offset, 1), address)),
    }
}

/// Address space and address of the FADT's sleep control register.
pub fn sleep_control() -> Result<(u64, u64), Text> {
    register(244)
}

/// The same of its reset register, and what is to be written there.
pub fn reset_register() -> Result<(u64, u64, u8), Text> {
    let (space, address) = register(116)?;
    Ok((space, address, x86::load(fadt(116)? + 128, 1) as u8))
}
