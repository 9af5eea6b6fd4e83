//! The two 8259 interrupt controllers (Intel 231468), as far as software looks at them that then
//! uses the I/O APIC: registers that hold what was written, and no interrupts.
//!
//! A kernel finds an 8259 by writing its mask and reading it back; then it initialises both and
//! masks all of their lines. Runs on vCPU threads; one lock a chip, held for a few instructions.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::Missed;
use crate::bus::{Registers, Written};
use crate::state::{self, StateError};

/// First port of each: command, then data.
pub const MASTER_PORT: u64 = 0x20;
pub const SLAVE_PORT: u64 = 0xa0;
/// Two ports that say which lines are levels, one a chip.
pub const EDGE_LEVEL_PORT: u64 = 0x4d0;
/// Ports of each.
pub const PORTS: u64 = 2;

/// Offsets.
const COMMAND: u64 = 0;
const DATA: u64 = 1;

/// First initialisation word: bit 4. With bit 0 a fourth follows, with bit 1 no third.
const INITIALIZE: u8 = 0x10;
const FOURTH_FOLLOWS: u8 = 0x01;
const SINGLE: u8 = 0x02;
/// Words that follow the first one, at most.
const WORDS_MAX: usize = 3;
/// The line to which the other chip is connected.
const CASCADE: u8 = 1 << 2;

/// One 8259.
#[derive(Debug)]
pub struct Pic {
    master: bool,
    state: Mutex<PicState>,
    missed: Arc<Missed>,
}

/// All there is to know of an 8259.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PicState {
    /// Lines that are masked.
    pub mask: u8,
    /// Initialisation words that are still to come at the data port.
    pub words_to_come: u8,
}

impl Pic {
    /// The `master`, or the other one, in `state`.
    ///
    /// # Errors
    /// When no chip can be in that state.
    pub fn new(master: bool, state: &PicState, missed: Arc<Missed>) -> Result<Self, StateError> {
        let words = state.words_to_come.into();
        state::check_max("8259", "words_to_come", words, WORDS_MAX)?;
        Ok(Pic {
            master,
            state: Mutex::new(state.clone()),
            missed,
        })
    }

    /// Its state.
    pub fn save(&self) -> PicState {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, PicState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn command(&self, value: u8) {
        if value & INITIALIZE == 0 {
            return;
        }
        let third = u8::from(value & SINGLE == 0);
        let fourth = u8::from(value & FOURTH_FOLLOWS != 0);
        *self.lock() = PicState {
            mask: 0,
            words_to_come: 1u8.saturating_add(third).saturating_add(fourth),
        };
    }

    fn data(&self, value: u8) {
        let mut state = self.lock();
        if let Some(left) = state.words_to_come.checked_sub(1) {
            state.words_to_come = left;
            return;
        }
        state.mask = value;
        drop(state);
        let cascade = if self.master { CASCADE } else { 0 };
        if value | cascade != 0xff {
            self.missed.warn_once("the 8259 interrupt controller");
        }
    }
}

impl Registers for Pic {
    fn read(&self, offset: u64, data: &mut [u8]) {
        // At the command port: no interrupt is requested, none is being served.
        let value = if offset == DATA { self.lock().mask } else { 0 };
        data.fill(0);
        if let Some(first) = data.first_mut() {
            *first = value;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Written {
        let value = data.first().copied().unwrap_or(0);
        match offset {
            COMMAND => self.command(value),
            DATA => self.data(value),
            _ => {}
        }
        Written::Done
    }
}

/// Which lines of the 8259s are levels: it holds what was written.
#[derive(Debug)]
pub struct EdgeLevel(Mutex<Levels>);

/// The lines that are levels, a bit for each, as they are saved.
pub type Levels = [u8; PORTS as usize];

/// Lines that are always edges: timer, keyboard, cascade; real-time clock and coprocessor.
const ALWAYS_EDGES: Levels = [0x07, 0x21];

impl EdgeLevel {
    /// The registers with these levels.
    ///
    /// # Errors
    /// When one of them is always an edge.
    pub fn new(levels: Levels) -> Result<Self, StateError> {
        for (levels, edges) in levels.iter().zip(ALWAYS_EDGES) {
            state::check_bits("8259", "edge_level", *levels, !edges)?;
        }
        Ok(EdgeLevel(Mutex::new(levels)))
    }

    /// The levels.
    pub fn save(&self) -> Levels {
        *self.lock()
    }

    fn lock(&self) -> MutexGuard<'_, Levels> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Registers for EdgeLevel {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let lines = self.lock();
        let from = lines
            .iter()
            .skip(usize::try_from(offset).unwrap_or(usize::MAX));
        data.fill(0);
        data.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
    }

    fn write(&self, offset: u64, data: &[u8]) -> Written {
        let mut lines = self.lock();
        let at = usize::try_from(offset).unwrap_or(usize::MAX);
        let to = lines.iter_mut().zip(ALWAYS_EDGES).skip(at);
        to.zip(data)
            .for_each(|((to, edges), from)| *to = *from & !edges);
        Written::Done
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::state_round_trip;

    fn get(registers: &impl Registers, offset: u64) -> u8 {
        let mut data = [0xee];
        registers.read(offset, &mut data);
        data[0]
    }

    fn pic(master: bool) -> (Pic, Arc<Missed>) {
        let missed = Arc::new(Missed::default());
        let pic = Pic::new(master, &PicState::default(), Arc::clone(&missed));
        (pic.unwrap(), missed)
    }

    #[test]
    fn state_when_a_chip_is_made_of_it_takes_the_words_that_are_to_come() {
        let (pic, _) = pic(true);
        let restored = |state: PicState| Pic::new(true, &state, Arc::default()).unwrap();
        state_round_trip!(pic, restored);
        for (offset, byte) in [(COMMAND, 0x11), (DATA, 0x30)] {
            let _ = pic.write(offset, &[byte]);
            state_round_trip!(pic, restored);
        }
        let pic = restored(pic.save());
        for byte in [0x04, 0x01, 0xfb] {
            assert_eq!(get(&pic, DATA), 0);
            let _ = pic.write(DATA, &[byte]);
        }
        assert_eq!(get(&pic, DATA), 0xfb);
        state_round_trip!(pic, restored);
    }

    #[test]
    fn state_when_no_chip_can_be_in_it_is_refused() {
        for (words_to_come, fits) in [(3, true), (4, false), (0xff, false)] {
            let state = PicState {
                mask: 0xff,
                words_to_come,
            };
            let made = Pic::new(false, &state, Arc::default());
            assert_eq!(made.is_ok(), fits, "{words_to_come}");
        }
        for levels in [[0x01, 0], [0, 0x20]] {
            let error = EdgeLevel::new(levels).unwrap_err().to_string();
            assert!(error.contains("edge_level"), "{error}");
        }
    }

    #[test]
    fn mask_when_a_kernel_probes_is_read_back() {
        let (pic, missed) = pic(true);
        let _ = pic.write(DATA, &[0xfb]);
        assert_eq!(get(&pic, DATA), 0xfb);
        for byte in [0x11, 0x30, 0x04, 0x01] {
            let offset = if byte == 0x11 { COMMAND } else { DATA };
            let _ = pic.write(offset, &[byte]);
        }
        assert_eq!(get(&pic, DATA), 0, "initialised, nothing is masked");
        let _ = pic.write(DATA, &[0xff]);
        assert_eq!(get(&pic, DATA), 0xff);
        assert_eq!(get(&pic, COMMAND), 0);
        assert!(!missed.has_warned());
    }

    #[test]
    fn words_when_fewer_are_announced_are_fewer() {
        for (first, words) in [(0x10, 2), (0x11, 3), (0x12, 1), (0x13, 2)] {
            let (pic, _) = pic(false);
            let _ = pic.write(COMMAND, &[first]);
            for _ in 0..words {
                let _ = pic.write(DATA, &[0x55]);
                assert_eq!(get(&pic, DATA), 0);
            }
            let _ = pic.write(DATA, &[0xf0]);
            assert_eq!(get(&pic, DATA), 0xf0);
        }
    }

    #[test]
    fn line_when_it_is_unmasked_gives_a_warning() {
        for (master, mask, expected) in [
            (true, 0xff, false),
            (true, 0xfb, false),
            (true, 0xfe, true),
            (false, 0xfb, true),
            (false, 0xff, false),
        ] {
            let (pic, missed) = pic(master);
            let _ = pic.write(DATA, &[mask]);
            assert_eq!(missed.has_warned(), expected, "{master} {mask:#x}");
        }
    }

    #[test]
    fn edge_level_when_written_keeps_what_may_be_a_level() {
        let registers = EdgeLevel::new([0; 2]).unwrap();
        let _ = registers.write(0, &[0xff, 0xff, 0xff]);
        state_round_trip!(registers, |levels| EdgeLevel::new(levels).unwrap());
        assert_eq!((get(&registers, 0), get(&registers, 1)), (0xf8, 0xde));
        let _ = registers.write(1, &[0]);
        let mut data = [0xee; 4];
        registers.read(0, &mut data);
        assert_eq!(data, [0xf8, 0, 0, 0]);
        registers.read(u64::MAX, &mut data);
        assert_eq!(data, [0; 4]);
    }
}
