//! What a UART is saved as, and made from.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::{
    FIFO, LINE, POLLS, Uart, enable, fifo_control, identification, modem_control, modem_status,
};
use crate::state::{self, StateError};

/// What [`StateError`] calls it.
const NAME: &str = "UART";

/// All that a 16550A remembers, as it is saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UartState {
    /// Interrupt enable register.
    pub interrupt_enable: u8,
    /// FIFO control register: the bits that stay, which are enable and the receiver's trigger level.
    pub fifo_control: u8,
    /// Line control register.
    pub line_control: u8,
    /// Modem control register.
    pub modem_control: u8,
    /// Low half of the modem status: inputs that changed since it was read.
    pub modem_changes: u8,
    /// Scratch register.
    pub scratch: u8,
    /// Low byte, high byte.
    pub divisor: [u8; 2],
    /// A byte was lost since the line status was read. Only loop-back loses bytes.
    pub overrun: bool,
    /// The transmitter became empty, and the driver has not been told.
    pub transmitter_pending: bool,
    /// Bytes that have arrived, and were not read.
    #[serde(with = "crate::state::hex")]
    pub fifo: Vec<u8>,
    /// Input on its way.
    #[serde(with = "crate::state::hex")]
    pub line: Vec<u8>,
    /// The line was full, and has had bytes all the time since.
    pub line_was_full: bool,
    /// Line status reads in a row, up to [`POLLS`].
    pub polls: u8,
    /// Bytes sent in a row, up to the transmitter's depth.
    pub burst: u8,
}

impl Default for UartState {
    /// As firmware would leave it: 8 bits, no parity, 9600 baud.
    fn default() -> Self {
        UartState {
            interrupt_enable: 0,
            fifo_control: 0,
            line_control: 0x03,
            modem_control: modem_control::OUT2,
            modem_changes: 0,
            scratch: 0,
            divisor: [0x0c, 0x00],
            overrun: false,
            transmitter_pending: false,
            fifo: Vec::new(),
            line: Vec::new(),
            line_was_full: false,
            polls: 0,
            burst: 0,
        }
    }
}

impl Uart {
    /// A UART in `state`.
    ///
    /// # Errors
    /// When no UART can be in that state.
    pub fn new(state: &UartState) -> Result<Self, StateError> {
        let fifo_bits = fifo_control::ENABLE | fifo_control::TRIGGER;
        for (what, value, bits) in [
            ("interrupt_enable", state.interrupt_enable, enable::ALL),
            ("fifo_control", state.fifo_control, fifo_bits),
            ("modem_control", state.modem_control, modem_control::ALL),
            ("modem_changes", state.modem_changes, modem_status::CHANGES),
        ] {
            state::check_bits(NAME, what, value, bits)?;
        }
        let mut uart = Uart {
            interrupt_enable: state.interrupt_enable,
            fifo_control: state.fifo_control,
            line_control: state.line_control,
            modem_control: state.modem_control,
            modem_changes: state.modem_changes,
            scratch: state.scratch,
            divisor: state.divisor,
            overrun: state.overrun,
            transmitter_pending: state.transmitter_pending,
            // Allocated here once: neither grows beyond this.
            fifo: VecDeque::with_capacity(FIFO),
            line: VecDeque::with_capacity(LINE),
            // Or the serial thread would never hear that there is room again.
            line_was_full: state.line_was_full || state.line.len() == LINE,
            polls: state.polls,
            burst: state.burst,
            interrupt_line: false,
        };
        for (what, count, most) in [
            ("bytes in fifo", state.fifo.len(), uart.depth()),
            ("bytes in line", state.line.len(), LINE),
            ("polls", state.polls.into(), POLLS.into()),
            ("burst", state.burst.into(), FIFO),
        ] {
            state::check_max(NAME, what, count, most)?;
        }
        uart.fifo.extend(&state.fifo);
        uart.line.extend(&state.line);
        uart.interrupt_line = uart.identification() != identification::NONE;
        Ok(uart)
    }

    /// Its state.
    pub fn save(&self) -> UartState {
        UartState {
            interrupt_enable: self.interrupt_enable,
            fifo_control: self.fifo_control,
            line_control: self.line_control,
            modem_control: self.modem_control,
            modem_changes: self.modem_changes,
            scratch: self.scratch,
            divisor: self.divisor,
            overrun: self.overrun,
            transmitter_pending: self.transmitter_pending,
            fifo: self.fifo.iter().copied().collect(),
            line: self.line.iter().copied().collect(),
            line_was_full: self.line_was_full,
            polls: self.polls,
            burst: self.burst,
        }
    }
}
