//! Words against the I/O APIC: accesses of every kind, and routes that do not stop changing.

use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use super::{Arguments, Outcome};
use crate::clock::{self, Moment};
use crate::{pattern, serial, text, x86};

const IO_APIC: u64 = 0xfec0_0000;
const WINDOW: u64 = IO_APIC + 0x10;
const VERSION: u64 = 1;
/// The low half of the entry of line 7: no device of this guest's has it.
const ENTRY: u64 = 0x10 + 2 * 7;
const MASKED: u64 = 1 << 16;

/// Whether the other processors take part.
static STORM: AtomicBool = AtomicBool::new(false);
static CHANGES: AtomicU32 = AtomicU32::new(0);

fn write(register: u64, value: u64) {
    x86::store(IO_APIC, 4, register);
    x86::store(WINDOW, 4, value);
}

fn read(register: u64) -> u64 {
    x86::store(IO_APIC, 4, register);
    x86::load(WINDOW, 4)
}

fn mask_all() {
    (0..24).for_each(|line| write(0x10 + 2 * line, MASKED));
}

/// What another processor does beside counting. Each change has another vector than the ones before
/// it, whichever processors made those.
pub fn take_part() {
    if STORM.load(Ordering::Relaxed) {
        change();
    }
}

fn change() {
    let number = CHANGES.fetch_add(1, Ordering::Relaxed);
    write(ENTRY, u64::from(0x10 + number % 240));
}

/// `routes:MS`: this processor, and those that `smp` has started, change a route for a while.
pub fn routes(arguments: &mut Arguments) -> Outcome {
    let ms = arguments.number("MS")?;
    CHANGES.store(0, Ordering::Relaxed);
    let since = Moment::now();
    STORM.store(true, Ordering::Relaxed);
    while since.elapsed_ns() / 1_000_000 < ms {
        change();
    }
    STORM.store(false, Ordering::Relaxed);
    // Others may be in the midst of a change.
    clock::wait_ms(100);
    mask_all();
    let changes = CHANGES.load(Ordering::Relaxed);
    Ok(text!(
        "changes={changes} took_ms={}",
        since.elapsed_ns() / 1_000_000
    ))
}

/// `chipnoise:SEED:COUNT`: accesses of every size all over the I/O APIC's page.
pub fn noise(arguments: &mut Arguments) -> Outcome {
    let (seed, count) = (arguments.number("SEED")?, arguments.number("COUNT")?);
    let mut sum = pattern::SUM_START;
    for i in 0..count {
        let dice = pattern::word(seed, i);
        let size = 1u8 << (dice & 3);
        // Mostly where there are registers.
        let at = match dice >> 2 & 3 {
            0 => IO_APIC + (dice >> 8) % 0xff8,
            1 => IO_APIC + (dice >> 8) % 0x20,
            2 => IO_APIC,
            _ => WINDOW,
        };
        if dice >> 4 & 3 == 0 {
            sum = pattern::sum(sum, &x86::load(at, size).to_le_bytes());
        } else {
            x86::store(at, size, pattern::word(!seed, i));
        }
    }
    mask_all();
    serial::line(format_args!("  sum {sum:016x}"));
    let version = read(VERSION);
    match version & 0xff00ff {
        0x17_0011 => Ok(text!("accesses={count}")),
        _ => Err(text!("version {version:#x}")),
    }
}
