//! The UART's registers: any accesses and any input, from any state.

use std::collections::VecDeque;

use super::{FIFO, LINE, Uart, UartState, enable, identification, line_status, register};
use crate::fuzz::Input;
use crate::state::StateError;

/// A UART, new or in a state that a file may say, with accesses and input in any order. Checked after
/// each: it holds no more than it may, and is saved and made again as the same; what it says of itself
/// (line status, interrupt identification, interrupt line) agrees; what the guest sends leaves, and what
/// it reads is what was typed, in order, unless it has cleared or looped something itself.
pub fn uart(bytes: &[u8]) {
    let input = &mut Input::new(bytes);
    let state = if input.flag() {
        UartState::default()
    } else {
        any_state(input)
    };
    if restore(&state).is_err() {
        return;
    }
    let uart = Uart::new(&state).unwrap();
    let mut test = Test {
        typed: state.fifo.iter().chain(&state.line).copied().collect(),
        is_lossless: true,
        uart,
    };
    while !input.is_empty() {
        test.step(input);
        test.check();
    }
}

fn any_state(input: &mut Input<'_>) -> UartState {
    let mut few = |most| {
        let len = input.below(most);
        input.bytes(len).to_vec()
    };
    let (fifo, line) = (few(FIFO + 2), few(LINE + 2));
    UartState {
        interrupt_enable: input.u8() & input.one_of(&[0x0f, 0xff]),
        fifo_control: input.u8() & input.one_of(&[0xc1, 0xff]),
        line_control: input.u8(),
        modem_control: input.u8() & input.one_of(&[0x1f, 0xff]),
        modem_changes: input.u8() & input.one_of(&[0x0f, 0xff]),
        scratch: input.u8(),
        divisor: [input.u8(), input.u8()],
        overrun: input.flag(),
        transmitter_pending: input.flag(),
        fifo,
        line,
        line_was_full: input.flag(),
        polls: input.u8() % 10,
        burst: input.u8() % 18,
    }
}

struct Test {
    uart: Uart,
    /// What the guest has not read.
    typed: VecDeque<u8>,
    /// The guest has neither looped anything back nor touched its FIFOs.
    is_lossless: bool,
}

impl Test {
    fn step(&mut self, input: &mut Input<'_>) {
        match input.below(8) {
            0 => {
                let len = input.below(2 * LINE);
                self.feed(input.bytes(len));
            }
            1..=3 => self.write(input.u8() % 9, input.u8()),
            4 => self.write(input.one_of(&[0, 1, 2, 3, 4]), 1 << input.below(8)),
            _ => self.read(input.u8() % 9),
        }
    }

    fn feed(&mut self, bytes: &[u8]) {
        let room = self.uart.room();
        let (taken, effects) = self.uart.feed(bytes);
        assert_eq!(taken, room.min(bytes.len()));
        assert_eq!(self.uart.room(), room - taken);
        assert_eq!((effects.sent, effects.received), (None, false));
        self.typed.extend(&bytes[..taken]);
    }

    fn write(&mut self, register: u8, value: u8) {
        let before = self.uart.save();
        let is_divisor = before.line_control & 0x80 != 0;
        let loops = before.modem_control & 0x10 != 0;
        let is_data = register == register::DATA && !is_divisor;
        let effects = self.uart.write(register, value);
        assert_eq!(effects.sent, (is_data && !loops).then_some(value));
        assert!(!effects.received && !effects.room);
        // Line status and modem status are read-only, and beyond them there is nothing.
        if register == register::LINE_STATUS || register == register::MODEM_STATUS || register > 7 {
            let mut after = self.uart.save();
            (after.polls, after.burst) = (before.polls, before.burst);
            assert_eq!(after, before);
        }
        let is_lossy = is_data && loops || register == register::FIFO_CONTROL;
        self.is_lossless &= !is_lossy;
        assert!(!effects.interrupt || self.uart.interrupts());
    }

    fn read(&mut self, register: u8) {
        let before = self.uart.clone();
        let is_divisor = before.line_control & 0x80 != 0;
        let is_data = register == register::DATA && !is_divisor;
        let ready = before.ready();
        let (value, effects) = self.uart.read(register);
        assert_eq!(effects.sent, None);
        assert_eq!(effects.received, is_data && ready > 0);
        if effects.received {
            if self.is_lossless {
                assert_eq!(Some(value), self.typed.pop_front());
            }
        } else if is_data {
            assert_eq!(value, 0);
        }
        match register {
            register::LINE_STATUS => {
                // This look may be the one by which a driver is seen to poll.
                let is_ready = value & line_status::DATA_READY != 0;
                assert_eq!(is_ready, self.uart.ready() > 0);
                assert_eq!(value & line_status::OVERRUN != 0, before.overrun);
                assert_eq!(value & 0x60, line_status::TRANSMITTER_EMPTY);
                assert!(!self.uart.overrun);
            }
            register::INTERRUPT_ID => is_enabled(value, &before),
            register::SCRATCH => assert_eq!(value, before.scratch),
            8.. => assert_eq!(value, 0),
            _ => {}
        }
        assert!(!effects.interrupt || self.uart.interrupts());
    }

    fn check(&self) {
        let state = self.uart.save();
        assert!(state.fifo.len() <= FIFO && state.line.len() <= LINE);
        assert_eq!(LINE - state.line.len(), self.uart.room());
        assert_eq!(Uart::new(&state).as_ref(), Ok(&self.uart));
        let (value, _) = self.uart.clone().read(register::INTERRUPT_ID);
        let is_none = value & 0x0f == identification::NONE;
        assert_eq!(is_none, !self.uart.interrupts());
        if self.is_lossless {
            let kept = state.fifo.iter().chain(&state.line);
            assert!(kept.eq(&self.typed));
        }
    }
}

/// Only what is enabled is told of as the source of an interrupt.
fn is_enabled(value: u8, uart: &Uart) {
    let bit = match value & 0x0f {
        identification::NONE => return,
        identification::LINE_STATUS => enable::LINE_STATUS,
        identification::RECEIVED | identification::TIMEOUT => enable::RECEIVED,
        identification::TRANSMITTER => enable::TRANSMITTER,
        identification::MODEM_STATUS => enable::MODEM_STATUS,
        other => panic!("no source has the number {other:#x}"),
    };
    assert!(uart.interrupt_enable & bit != 0);
}

/// A UART of a saved state: refused, or saved as what it was made of.
pub fn restore(state: &UartState) -> Result<(), StateError> {
    let uart = Uart::new(state)?;
    let expected = UartState {
        line_was_full: state.line_was_full || state.line.len() == LINE,
        ..state.clone()
    };
    assert_eq!(uart.save(), expected);
    Ok(())
}
