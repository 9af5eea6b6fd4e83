//! Words that touch everything: all ports, all device windows, in every size.

use super::{Arguments, Outcome, attack};
use crate::{pattern, serial, text, virtio, x86};

/// Ports whose writes end the machine, say that it panicked, or garble the console: the keyboard
/// controller's command port, the fast reset of port 92h, mayfly's sleep control, reset and panic
/// registers, PCI's reset control, the serial port.
const LEFT_OUT: [(u16, u16); 6] = [
    (0x64, 0x64),
    (0x92, 0x92),
    (0x600, 0x600),
    (0x602, 0x603),
    (0xcf9, 0xcf9),
    (0x3f8, 0x3ff),
];

/// Below this every port is tried, whatever the step: that is where devices are.
const LEGACY: u16 = 0x700;

pub fn ports(arguments: &mut Arguments) -> Outcome {
    let seed = arguments.number_or("SEED", 0)?;
    let step = arguments.number_or("STEP", 1)?.max(1) as u16;
    let mut sum = pattern::SUM_START;
    let (mut reads, mut writes) = (0u64, 0u64);
    for port in (0..=u16::MAX).filter(|port| *port < LEGACY || *port > 0xfffb || port % step == 0) {
        let values = [
            u32::from(x86::inb(port)),
            u32::from(x86::inw(port)),
            x86::inl(port),
        ];
        for value in values {
            reads += 1;
            sum = pattern::sum(sum, &value.to_le_bytes());
        }
        let value = match seed {
            0 => 0,
            seed => pattern::word(seed, u64::from(port)) as u32,
        };
        for size in [1u16, 2, 4] {
            let last = port.saturating_add(size - 1);
            if LEFT_OUT
                .iter()
                .any(|(from, to)| port <= *to && last >= *from)
            {
                continue;
            }
            match size {
                1 => x86::outb(port, value as u8),
                2 => x86::outw(port, value as u16),
                _ => x86::outl(port, value),
            }
            writes += 1;
        }
    }
    // The string forms, where several items arrive in one exit.
    let mut bytes = [0u8; 64];
    for port in [0x60, 0x61, 0x70, 0x2f8, 0x3fa, 0x510, 0x1234, 0xffff] {
        x86::ins(port, &mut bytes);
        x86::outs(port ^ 0x8000, &bytes);
    }
    x86::outs(0x3f8, b"probe: string output to the serial port\r\n");
    Ok(text!("reads={reads} writes={writes} sum={sum:016x}"))
}

pub fn mmio(arguments: &mut Arguments) -> Outcome {
    const START: u64 = 0xc000_0000;
    const SIZE: u64 = 0x2_0000;
    let (seed, count) = (arguments.number("SEED")?, arguments.number("COUNT")?);
    let mut sum = pattern::SUM_START;
    for i in 0..count {
        let dice = pattern::word(seed, i);
        let size = 1u8 << (dice & 3);
        // Three of four within a window's registers, where there is something to hit.
        let offset = match dice >> 2 & 3 {
            0 => (dice >> 8) % SIZE,
            _ => (((dice >> 8) % (SIZE >> 12)) << 12) | ((dice >> 32) % 0x140),
        };
        let at = START + offset;
        if dice >> 4 & 1 == 0 {
            sum = pattern::sum(sum, &x86::load(at, size).to_le_bytes());
        } else {
            x86::store(at, size, pattern::word(!seed, i) >> (dice >> 58));
        }
    }
    let mut broken = 0;
    for index in 0..virtio::count() {
        if let Err(error) = attack::health(index) {
            serial::line(format_args!("  device {index} afterwards: {error}"));
            broken += 1;
        }
    }
    let text = text!(
        "accesses={count} sum={sum:016x} devices={}",
        virtio::count()
    );
    if broken == 0 {
        Ok(text)
    } else {
        Err(text!("{text} broken={broken}"))
    }
}
