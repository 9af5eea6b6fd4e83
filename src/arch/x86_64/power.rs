//! Four ports by which a guest ends its machine, or says that its kernel panicked, and a fifth for the
//! exit code that it wants its end to have.
//!
//! The registers are ACPI's (section 4.8.3.7, "Sleep Control and Status Registers", and 4.8.3.6, "Reset
//! Register"; the FADT tells where they are) and pvpanic's (QEMU, `docs/specs/pvpanic`). vCPU threads
//! write them; control asks, once the guest has ended, whether there was a panic, and for the code.
//!
//! The exit code is ours (docs/guests.md). Writing it ends nothing, waits for nothing and is not logged:
//! a guest may write it as often as it likes, and the last one counts.
//!
//! Each register is a byte wide: of a wider access the first byte counts, and the rest reads as 0.
#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};

use serde::{Deserialize, Serialize};

use crate::bus::{Registers, Written};

/// Offsets from [`POWER_PORT`](super::layout::POWER_PORT).
pub const SLEEP_CONTROL: u64 = 0;
/// See [`SLEEP_CONTROL`].
pub const SLEEP_STATUS: u64 = 1;
/// See [`SLEEP_CONTROL`].
pub const RESET: u64 = 2;
/// See [`SLEEP_CONTROL`].
pub const PANIC: u64 = 3;
/// The exit code, which has a place of its own: [`EXIT_CODE_PORT`](super::layout::EXIT_CODE_PORT).
pub const EXIT_CODE: u64 = 4;

/// Sleep control: bits 2 to 4 are the state, bit 5 says to enter it. There is one state, S5.
pub const SLEEP_TYPE_OFF: u8 = 5;
const SLEEP_TYPE_SHIFT: u32 = 2;
const SLEEP_TYPE_MASK: u8 = 0b111;
const SLEEP_ENABLE: u8 = 1 << 5;

/// What resets the machine when it is written to the reset register.
pub const RESET_VALUE: u8 = 1;

/// What a kernel can say of a panic, and reads in the same register as what is understood: that it
/// stops for it, or that it goes on in another kernel which saves a dump.
const PANICKED: u8 = 1 << 0;
const CRASH_LOADED: u8 = 1 << 1;

/// The registers, as they are saved.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PowerState {
    /// The guest has said that its kernel panicked.
    pub panicked: bool,
    /// The exit code that the guest has written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<u8>,
}

/// What [`Power::exit_code`] is while the guest has written none.
const NO_CODE: u16 = u16::MAX;

/// The registers.
#[derive(Debug)]
pub struct Power {
    panicked: AtomicBool,
    /// A byte, or [`NO_CODE`].
    exit_code: AtomicU16,
}

impl Power {
    /// Registers in `state`.
    pub fn new(state: &PowerState) -> Self {
        Power {
            panicked: AtomicBool::new(state.panicked),
            exit_code: AtomicU16::new(state.exit_code.map_or(NO_CODE, u16::from)),
        }
    }

    /// Their state.
    pub fn save(&self) -> PowerState {
        PowerState {
            panicked: self.has_panicked(),
            exit_code: self.exit_code(),
        }
    }

    /// Whether the guest has said that its kernel panicked.
    pub fn has_panicked(&self) -> bool {
        self.panicked.load(Ordering::Acquire)
    }

    /// The exit code that the guest wrote last.
    pub fn exit_code(&self) -> Option<u8> {
        u8::try_from(self.exit_code.load(Ordering::Acquire)).ok()
    }
}

impl Registers for Power {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let (PANIC, Some(first)) = (offset, data.first_mut()) {
            *first = PANICKED | CRASH_LOADED;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Written {
        let Some(&byte) = data.first() else {
            return Written::Done;
        };
        let sleep_type = (byte >> SLEEP_TYPE_SHIFT) & SLEEP_TYPE_MASK;
        match offset {
            SLEEP_CONTROL if byte & SLEEP_ENABLE != 0 && sleep_type == SLEEP_TYPE_OFF => {
                Written::PowerOff
            }
            RESET if byte == RESET_VALUE => Written::MachineReset,
            PANIC if byte & (PANICKED | CRASH_LOADED) != 0 => {
                // How the kernel goes on is its own affair (`panic=` on its command line).
                self.panicked.store(true, Ordering::Release);
                Written::Done
            }
            EXIT_CODE => {
                self.exit_code.store(u16::from(byte), Ordering::Release);
                Written::Done
            }
            _ => Written::Done,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::state_round_trip;

    fn power() -> Power {
        Power::new(&PowerState::default())
    }

    /// What the machine does after a write: "on", "off" or "reset".
    fn effect(power: &Power, offset: u64, data: &[u8]) -> &'static str {
        match power.write(offset, data) {
            Written::Done => "on",
            Written::PowerOff => "off",
            Written::MachineReset => "reset",
            Written::After(_) => "waits",
        }
    }

    #[test]
    fn write_when_any_byte_goes_to_any_register_only_one_powers_off_and_one_resets() {
        let power = power();
        for byte in 0..=0xff {
            let off = byte & 0b0011_1100 == 0b0011_0100;
            let reset = byte == 1;
            assert_eq!(
                effect(&power, SLEEP_CONTROL, &[byte]),
                if off { "off" } else { "on" },
                "{byte:#x}"
            );
            assert_eq!(effect(&power, SLEEP_STATUS, &[byte]), "on", "{byte:#x}");
            assert_eq!(
                effect(&power, RESET, &[byte]),
                if reset { "reset" } else { "on" },
                "{byte:#x}"
            );
        }
        assert!(!power.has_panicked());
    }

    #[test]
    fn write_when_it_tells_of_a_panic_is_remembered() {
        for byte in 0..=0xff {
            let power = power();
            assert_eq!(effect(&power, PANIC, &[byte]), "on");
            assert_eq!(power.has_panicked(), byte & 3 != 0, "{byte:#x}");
            assert_eq!(effect(&power, PANIC, &[0]), "on");
            assert_eq!(power.has_panicked(), byte & 3 != 0, "{byte:#x}");
            state_round_trip!(power, |state| Power::new(&state));
            let restored = Power::new(&power.save());
            assert_eq!(restored.has_panicked(), byte & 3 != 0, "{byte:#x}");
        }
    }

    #[test]
    fn exit_code_when_written_is_the_last_byte_and_nothing_else_changes_it() {
        let power = power();
        assert_eq!(power.exit_code(), None);
        for offset in [SLEEP_CONTROL, SLEEP_STATUS, RESET, PANIC, 5, 6, 7] {
            let _ = power.write(offset, &[9]);
            assert_eq!(power.exit_code(), None, "{offset}");
        }
        let power = self::power();
        for code in (0..=0xff).chain([0]) {
            assert_eq!(effect(&power, EXIT_CODE, &[code]), "on");
            assert_eq!(effect(&power, EXIT_CODE, &[]), "on");
            assert_eq!(power.exit_code(), Some(code));
            state_round_trip!(power, |state| Power::new(&state));
            assert_eq!(Power::new(&power.save()).exit_code(), Some(code));
        }
        assert_eq!(effect(&power, EXIT_CODE, &[7, 0xff, 0xff, 0xff]), "on");
        assert_eq!(power.exit_code(), Some(7));
        assert!(!power.has_panicked());
    }

    #[test]
    fn state_when_no_code_was_written_has_no_such_member() {
        let text = serde_json::to_string(&power().save()).unwrap();
        assert_eq!(text, "{\"panicked\":false}");
        let state: PowerState = serde_json::from_str(&text).unwrap();
        assert_eq!(Power::new(&state).exit_code(), None);
        for bad in ["256", "-1", "\"7\"", "1.5"] {
            let text = format!("{{\"panicked\":false,\"exit_code\":{bad}}}");
            assert!(serde_json::from_str::<PowerState>(&text).is_err(), "{bad}");
        }
    }

    #[test]
    fn accesses_when_wide_or_empty_count_by_their_first_byte() {
        let power = power();
        assert_eq!(effect(&power, SLEEP_CONTROL, &[0x34, 0, 1, 3]), "off");
        assert_eq!(effect(&power, SLEEP_CONTROL, &[0, 0, 1, 3]), "on");
        assert_eq!(effect(&power, RESET, &[1, 0xff]), "reset");
        assert_eq!(effect(&power, RESET, &[0, 1]), "on");
        for offset in 0..4 {
            assert_eq!(effect(&power, offset, &[]), "on");
        }
        assert!(!power.has_panicked());
        assert_eq!(effect(&power, EXIT_CODE, &[0xff]), "on");
        for (offset, first) in [(0, 0), (1, 0), (2, 0), (3, 3), (EXIT_CODE, 0), (7, 0)] {
            for len in 0..=8 {
                let mut data = vec![0xee; len];
                power.read(offset, &mut data);
                let expected: Vec<u8> = std::iter::once(first).chain([0; 7]).take(len).collect();
                assert_eq!(data, expected, "{len} bytes at {offset}");
            }
        }
    }
}
