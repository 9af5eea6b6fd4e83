//! The boot timer: one register that a guest writes when it has booted.
#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use std::sync::atomic::{AtomicU32, Ordering};

use crate::bus::{Registers, Written};
use crate::inbox::Outbox;

/// The byte that says "booted", at offset 0.
const BOOTED: u8 = 123;

/// Length of the register block in bytes; only its first one does anything.
pub const LEN: u64 = 0x1000;

/// How many times a guest is listened to, so that one which writes without end does not fill
/// its reader's inbox.
const REPORTS_MAX: u32 = 8;

/// The guest says that it has booted.
#[derive(Clone, Copy, Debug)]
pub struct Booted;

/// The register, at [`BOOT_TIMER`](super::layout::BOOT_TIMER) and, by a second block, at
/// [`BOOT_TIMER_PORT`](super::layout::BOOT_TIMER_PORT).
#[derive(Debug)]
pub struct BootTimer {
    reader: Outbox<Booted>,
    reports: AtomicU32,
}

impl BootTimer {
    /// A register whose writes are posted to `reader`.
    pub fn new(reader: Outbox<Booted>) -> BootTimer {
        BootTimer {
            reader,
            reports: AtomicU32::new(0),
        }
    }
}

impl Registers for BootTimer {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) -> Written {
        if offset == 0 && data == [BOOTED] {
            let report = self
                .reports
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| {
                    n.checked_add(1).filter(|n| *n <= REPORTS_MAX)
                });
            if report.is_ok() {
                self.reader.post(Booted);
            }
        }
        Written::Done
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inbox::inbox;

    #[test]
    fn write_when_it_is_the_byte_reports_and_soon_stops() {
        let (sender, inbox) = inbox::<Booted>(100).unwrap();
        let timer = BootTimer::new(sender.outbox());
        for (offset, data) in [(0, &[0u8][..]), (1, &[123]), (0, &[123, 0]), (0, &[])] {
            let _ = timer.write(offset, data);
        }
        assert!(inbox.next().is_none());
        let _ = timer.write(0, &[123]);
        assert!(inbox.next().is_some());
        for _ in 0..50 {
            let _ = timer.write(0, &[123]);
        }
        assert_eq!(std::iter::from_fn(|| inbox.next()).count(), 7);
        let mut data = [9; 3];
        timer.read(0, &mut data);
        assert_eq!(data, [0; 3]);
    }
}
