//! Words about the machine itself: what it was told, its processor, its time.

use super::{Arguments, Outcome};
use crate::clock::{self, Moment};
use crate::{boot, pattern, ring0, serial, text, virtio, x86};

/// The boot timer's register and the value that stops the clock, as Firecracker has them.
const BOOT_TIMER: u64 = 0xc000_0000;
const BOOT_TIMER_VALUE: u64 = 123;

pub fn bootinfo(_: &mut Arguments) -> Outcome {
    let info = boot::info();
    serial::line(format_args!(
        "  {:?} structure at {:#x} version {:#x} magic {}",
        info.protocol,
        info.address,
        info.version,
        if info.magic_ok { "ok" } else { "WRONG" }
    ));
    serial::line(format_args!("  cmdline {}", info.command_line));
    for region in info.regions() {
        serial::line(format_args!(
            "  region {:#012x}..{:#012x} type {}",
            region.start,
            region.end(),
            region.kind
        ));
    }
    if let Some((address, size)) = info.initrd {
        // SAFETY: the loader says it put the initrd there; nothing has used that memory since.
        let bytes = unsafe { core::slice::from_raw_parts(address as *const u8, size as usize) };
        let sum = pattern::sum(pattern::SUM_START, bytes);
        serial::line(format_args!(
            "  initrd {address:#x} size {size} sum {sum:016x}"
        ));
    }
    for (kind, size) in SetupData(info.setup_data).take(16) {
        serial::line(format_args!("  setup_data type {kind} size {size}"));
    }
    for index in 0..virtio::count() {
        let base = virtio::address(index).unwrap_or(0);
        serial::line(format_args!("  device {index} at {base:#x}"));
    }
    let ram: u64 = info
        .regions()
        .iter()
        .filter(|r| r.kind == boot::RAM)
        .map(|r| r.size)
        .sum();
    let summary = text!(
        "protocol={:?} cmdline={} regions={} ram={} modules={} initrd={} rsdp={:#x} devices={}",
        info.protocol,
        info.command_line.len(),
        info.regions_told,
        ram,
        info.modules,
        info.initrd.map_or(0, |(_, size)| size),
        info.rsdp,
        virtio::count()
    );
    if info.magic_ok {
        Ok(summary)
    } else {
        Err(summary)
    }
}

/// The linked list of the Linux boot protocol: type and size of each element.
struct SetupData(u64);

impl Iterator for SetupData {
    type Item = (u64, u64);

    fn next(&mut self) -> Option<Self::Item> {
        let at = self.0;
        if at == 0 {
            return None;
        }
        self.0 = x86::load(at, 8);
        Some((x86::load(at + 8, 4), x86::load(at + 12, 4)))
    }
}

pub fn cpuid(arguments: &mut Arguments) -> Outcome {
    let show = |leaf: u32, subleaf: u32| {
        let (a, b, c, d) = x86::cpuid(leaf, subleaf);
        let (ra, rb, rc, rd) = ring0::cpuid(leaf, subleaf);
        serial::line(format_args!(
            "  cpuid {leaf:#x}.{subleaf} ring3 {a:08x} {b:08x} {c:08x} {d:08x} ring0 {ra:08x} {rb:08x} {rc:08x} {rd:08x}"
        ));
    };
    if let Some(leaf) = arguments.text() {
        let leaf = super::number(leaf).ok_or("LEAF is no number")? as u32;
        show(leaf, arguments.number_or("SUBLEAF", 0)? as u32);
        return Ok("".into());
    }
    for (leaf, subleaves) in [
        (0, 1),
        (1, 1),
        (4, 5),
        (0xb, 3),
        (0x1f, 3),
        (0x4000_0000, 1),
        (0x8000_0008, 1),
    ] {
        (0..subleaves).for_each(|subleaf| show(leaf, subleaf));
    }
    Ok("".into())
}

pub fn rdmsr(arguments: &mut Arguments) -> Outcome {
    let index = arguments.number("INDEX")?;
    Ok(text!("{:#x}", ring0::rdmsr(index as u32)))
}

pub fn tsc(_: &mut Arguments) -> Outcome {
    let (khz, source) = clock::rate();
    Ok(text!("{khz} kHz by {source}, now {}", x86::rdtsc()))
}

pub fn pit(_: &mut Arguments) -> Outcome {
    let khz = clock::pit_rate().ok_or("no PIT, or one that does not count")?;
    // Ring 3 may see the host's leaves.
    let (told, ..) = ring0::cpuid(0x4000_0010, 0);
    Ok(text!("khz={khz} cpuid={told}"))
}

/// Lets the timer's line through the first 8259.
pub fn pic(_: &mut Arguments) -> Outcome {
    const MASK: u16 = 0x21;
    x86::outb(MASK, 0xfe);
    match x86::inb(MASK) {
        0xfe => Ok("".into()),
        mask => Err(text!("the mask is {mask:#x}")),
    }
}

pub fn timer(_: &mut Arguments) -> Outcome {
    mark();
    Ok("".into())
}

/// Writes to the boot timer.
pub fn mark() {
    x86::store(BOOT_TIMER, 1, BOOT_TIMER_VALUE);
}

pub fn count(arguments: &mut Arguments) -> Outcome {
    let lines = arguments.number_or("N", u64::MAX)?;
    let start = Moment::now();
    for i in 0..lines {
        serial::line(format_args!(
            "count {i} at {} us",
            start.elapsed_ns() / 1000
        ));
        clock::wait_ms(20);
    }
    Ok("".into())
}

pub fn wait(arguments: &mut Arguments) -> Outcome {
    let ms = arguments.number("MS")?;
    clock::wait_ms(ms);
    Ok("".into())
}

pub fn spin(_: &mut Arguments) -> Outcome {
    serial::line(format_args!("spin"));
    loop {
        core::hint::spin_loop();
    }
}

pub fn halt(_: &mut Arguments) -> Outcome {
    serial::line(format_args!("halted"));
    ring0::halt()
}
