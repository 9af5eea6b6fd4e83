//! The keyboard controller: the way a guest resets its machine, and Ctrl-Alt-Del reaches it.
//!
//! As much of an Intel 8042 with one keyboard as Linux's `i8042` and `atkbd` drivers, or a
//! handful of instructions, need. One lock: vCPUs read and write the ports, control presses keys.
#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

#[cfg(any(test, fuzzing))]
pub mod fuzz;

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::{Registers, Written};
use crate::state::{self, StateError};

/// Offset of the data port, 0x60.
const DATA: u64 = 0;
/// Offset of the port that is status when read and command when written, 0x64.
const COMMAND: u64 = 4;

/// Status: a byte waits at the data port; self-test passed; the last write was a command; the
/// keyboard is not locked.
const STATUS_OUTPUT_FULL: u8 = 0x01;
const STATUS_SYSTEM: u8 = 0x04;
const STATUS_COMMAND: u8 = 0x08;
const STATUS_UNLOCKED: u8 = 0x10;

/// Commands, written to port 0x64.
const READ_CONFIG: u8 = 0x20;
const WRITE_CONFIG: u8 = 0x60;
const TEST_AUX: u8 = 0xa9;
const SELF_TEST: u8 = 0xaa;
const TEST_KEYBOARD: u8 = 0xab;
const DISABLE_KEYBOARD: u8 = 0xad;
const ENABLE_KEYBOARD: u8 = 0xae;
const READ_OUTPUT: u8 = 0xd0;
const WRITE_OUTPUT: u8 = 0xd1;
const LOOP_KEYBOARD: u8 = 0xd2;
const LOOP_AUX: u8 = 0xd3;
const WRITE_AUX: u8 = 0xd4;
/// 0xF0 to 0xFF pulse those of four output lines whose bit is 0; line 0 is the CPU's reset.
const PULSE: u8 = 0xf0;
const PULSE_NOT_RESET: u8 = 0x01;

/// Output port: the CPU's reset line, when low.
const OUTPUT_NOT_RESET: u8 = 0x01;

/// Answers to tests: the controller is fine, an interface is fine, it is broken (there is no
/// second one).
const SELF_TEST_PASSED: u8 = 0x55;
const INTERFACE_FINE: u8 = 0x00;
const INTERFACE_STUCK: u8 = 0x01;

/// Configuration byte: interrupts on, self-test passed, keyboard off, translation to set 1.
const CONFIG_INTERRUPT: u8 = 0x01;
const CONFIG_SYSTEM: u8 = 0x04;
const CONFIG_KEYBOARD_OFF: u8 = 0x10;
const CONFIG_TRANSLATE: u8 = 0x40;

/// Commands to the keyboard itself, written to port 0x60, and its answers.
const KEYBOARD_ECHO: u8 = 0xee;
const KEYBOARD_IDENTIFY: u8 = 0xf2;
const KEYBOARD_RESET: u8 = 0xff;
const ACKNOWLEDGE: u8 = 0xfa;
const RESET_PASSED: u8 = 0xaa;
const IDENTITY: [u8; 2] = [0xab, 0x83];

/// Bytes the keyboard keeps until the guest reads them: Ctrl-Alt-Del four times, which a client
/// that wants a slow guest to end may press again.
const QUEUE_MAX: usize = 4 * CTRL_ALT_DEL_SET_2.len();

/// Left Ctrl, left Alt and Delete pressed, then released, in scan code set 2, which a keyboard
/// sends by itself.
const CTRL_ALT_DEL_SET_2: [u8; 11] = [
    0x14, 0x11, 0xe0, 0x71, 0xe0, 0xf0, 0x71, 0xf0, 0x11, 0xf0, 0x14,
];
/// The same in set 1, as a controller that translates gives it.
const CTRL_ALT_DEL_SET_1: [u8; 8] = [0x1d, 0x38, 0xe0, 0x53, 0xe0, 0xd3, 0xb8, 0x9d];

/// The controller, at ports 0x60 to 0x64.
#[derive(Debug)]
pub struct I8042 {
    state: Mutex<State>,
    /// Interrupt line 1.
    interrupt: EventFd,
}

/// The controller and its keyboard, as they are saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct I8042State {
    /// The configuration byte.
    pub config: u8,
    /// A command whose data byte is still to come.
    pub pending: Option<u8>,
    /// The controller's own answer: read before anything of the keyboard's.
    pub answer: Option<u8>,
    /// What the keyboard has sent, and the guest has not read.
    #[serde(with = "crate::state::hex")]
    pub keyboard: Vec<u8>,
    /// Status: the last write was a command.
    pub last_was_command: bool,
}

impl Default for I8042State {
    fn default() -> Self {
        I8042State {
            config: CONFIG_INTERRUPT | CONFIG_SYSTEM,
            pending: None,
            answer: None,
            keyboard: Vec::new(),
            last_was_command: false,
        }
    }
}

/// What [`I8042State`] says of each member holds here too.
#[derive(Debug)]
struct State {
    config: u8,
    pending: Option<u8>,
    answer: Option<u8>,
    keyboard: VecDeque<u8>,
    last_was_command: bool,
}

/// The guest has not read what was pressed before.
#[derive(Debug, PartialEq, Eq)]
pub struct KeyboardFull;

impl std::fmt::Display for KeyboardFull {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("I8042 error: i8042 internal buffer full: the guest does not read its keyboard")
    }
}

impl std::error::Error for KeyboardFull {}

impl I8042 {
    /// A controller in `state` that raises `interrupt`, an irqfd of line 1.
    ///
    /// # Errors
    /// When no controller can be in that state.
    pub fn new(state: &I8042State, interrupt: EventFd) -> Result<I8042, StateError> {
        let bytes = state.keyboard.len();
        state::check_max("keyboard controller", "bytes in keyboard", bytes, QUEUE_MAX)?;
        // Allocated here once: it never grows beyond this.
        let mut keyboard = VecDeque::with_capacity(QUEUE_MAX);
        keyboard.extend(&state.keyboard);
        Ok(I8042 {
            state: Mutex::new(State {
                config: state.config,
                pending: state.pending,
                answer: state.answer,
                keyboard,
                last_was_command: state.last_was_command,
            }),
            interrupt,
        })
    }

    /// Its state.
    pub fn save(&self) -> I8042State {
        let state = self.lock();
        I8042State {
            config: state.config,
            pending: state.pending,
            answer: state.answer,
            keyboard: state.keyboard.iter().copied().collect(),
            last_was_command: state.last_was_command,
        }
    }

    /// Raises the interrupt if the keyboard has something and the guest wants to know. For a restored
    /// guest: a pulse from before may be lost. To be called when the interrupt controllers are
    /// restored.
    pub fn raise_again(&self) {
        self.interrupt(&self.lock());
    }

    /// Presses and releases Ctrl, Alt and Delete.
    ///
    /// # Errors
    /// [`KeyboardFull`] when the guest has left too much unread.
    pub fn ctrl_alt_del(&self) -> Result<(), KeyboardFull> {
        let mut state = self.lock();
        let keys: &[u8] = if state.config & CONFIG_TRANSLATE != 0 {
            &CTRL_ALT_DEL_SET_1
        } else {
            &CTRL_ALT_DEL_SET_2
        };
        if QUEUE_MAX.saturating_sub(state.keyboard.len()) < keys.len() {
            return Err(KeyboardFull);
        }
        state.keyboard.extend(keys);
        self.interrupt(&state);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No panic can happen under the lock; and if it did, the state is plain bytes.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Raises the interrupt if the keyboard has something and the guest wants to know.
    fn interrupt(&self, state: &State) {
        if state.config & CONFIG_INTERRUPT != 0 && state.keyboard_ready() {
            // The counter is full only if the line is up already.
            let _ = self.interrupt.write(1);
        }
    }

    fn command(&self, state: &mut State, command: u8) -> Written {
        state.last_was_command = true;
        state.pending = None;
        match command {
            READ_CONFIG => state.answer = Some(state.config),
            READ_OUTPUT => state.answer = Some(OUTPUT_NOT_RESET),
            SELF_TEST => state.answer = Some(SELF_TEST_PASSED),
            TEST_KEYBOARD => state.answer = Some(INTERFACE_FINE),
            TEST_AUX => state.answer = Some(INTERFACE_STUCK),
            DISABLE_KEYBOARD => state.config |= CONFIG_KEYBOARD_OFF,
            ENABLE_KEYBOARD => {
                state.config &= !CONFIG_KEYBOARD_OFF;
                self.interrupt(state);
            }
            WRITE_CONFIG | WRITE_OUTPUT | LOOP_KEYBOARD | LOOP_AUX | WRITE_AUX => {
                state.pending = Some(command);
            }
            PULSE..=0xff if command & PULSE_NOT_RESET == 0 => return Written::MachineReset,
            // Including those that switch the second interface on and off: there is none.
            _ => {}
        }
        Written::Done
    }

    fn data(&self, state: &mut State, byte: u8) -> Written {
        state.last_was_command = false;
        match state.pending.take() {
            Some(WRITE_CONFIG) => {
                state.config = byte;
                self.interrupt(state);
            }
            Some(WRITE_OUTPUT) if byte & OUTPUT_NOT_RESET == 0 => return Written::MachineReset,
            // The answer lacks the mark of the second interface: there is none.
            Some(LOOP_KEYBOARD | LOOP_AUX) => state.answer = Some(byte),
            Some(_) => {}
            None => {
                let answer: &[u8] = match byte {
                    KEYBOARD_ECHO => &[KEYBOARD_ECHO],
                    KEYBOARD_IDENTIFY => &[ACKNOWLEDGE, IDENTITY[0], IDENTITY[1]],
                    KEYBOARD_RESET => &[ACKNOWLEDGE, RESET_PASSED],
                    _ => &[ACKNOWLEDGE],
                };
                // A keyboard drops what it was sending when it gets a command.
                state.keyboard.clear();
                state.keyboard.extend(answer);
                self.interrupt(state);
            }
        }
        Written::Done
    }
}

impl State {
    fn keyboard_ready(&self) -> bool {
        self.config & CONFIG_KEYBOARD_OFF == 0 && !self.keyboard.is_empty()
    }

    fn status(&self) -> u8 {
        let mut status = STATUS_UNLOCKED | (self.config & STATUS_SYSTEM);
        if self.answer.is_some() || self.keyboard_ready() {
            status |= STATUS_OUTPUT_FULL;
        }
        if self.last_was_command {
            status |= STATUS_COMMAND;
        }
        status
    }

    fn next(&mut self) -> u8 {
        if let Some(answer) = self.answer.take() {
            return answer;
        }
        if self.keyboard_ready() {
            return self.keyboard.pop_front().unwrap_or(0);
        }
        0
    }
}

impl Registers for I8042 {
    /// Both ports are a byte wide: of a wider access the rest reads as 0.
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let Some(first) = data.first_mut() else {
            return;
        };
        let mut state = self.lock();
        *first = match offset {
            DATA => {
                let byte = state.next();
                self.interrupt(&state);
                byte
            }
            COMMAND => state.status(),
            _ => 0xff,
        };
    }

    /// Both ports are a byte wide: of a wider access the rest is ignored.
    fn write(&self, offset: u64, data: &[u8]) -> Written {
        let Some(first) = data.first() else {
            return Written::Done;
        };
        let mut state = self.lock();
        match offset {
            DATA => self.data(&mut state, *first),
            COMMAND => self.command(&mut state, *first),
            _ => Written::Done,
        }
    }
}

#[cfg(test)]
mod tests;
