//! The registers of a 16550A, as its data sheet has them.
//!
//! [`Uart`] is plain state: it does no I/O, takes no lock and never waits. Each access returns what
//! it caused ([`Effects`]), and [`super::port`] does that. It runs on the vCPU threads (registers)
//! and on the serial thread ([`Uart::feed`]), behind one mutex.
//!
//! - Interrupt identification is never stored: it is derived from what is pending and what is
//!   enabled, in the data sheet's order. Reading it clears the transmitter's interrupt and nothing
//!   else.
//! - Output leaves at once, so the transmitter is always empty.
//! - Input waits on the line until a driver is there to take it: one that has enabled the receive
//!   interrupt, or that polls the line status. It counts as arrived once the driver has been shown
//!   it (data ready) or reads it. What a driver does while it sets the UART up (clearing the FIFOs,
//!   reading registers without looking at them) therefore loses nothing that was typed before.
//! - In loop-back mode output comes back as input, and the line is disconnected.
//!
//! Not modelled, as no virtual line has them: the bit rate, parity and framing errors, breaks, and
//! changes of the modem's inputs other than in loop-back mode. The interrupt output is not gated
//! by OUT2.

#[cfg(any(test, fuzzing))]
pub mod fuzz;
#[cfg(test)]
mod properties;
mod state;

use std::collections::VecDeque;

pub use self::state::UartState;

/// Bytes in the receiver's FIFO, and in the transmitter's.
const FIFO: usize = 16;
/// Bytes that may wait on the line.
pub const LINE: usize = 64;

/// Register offsets.
pub mod register {
    /// Receiver buffer (read) and transmitter holding register (write); divisor's low byte.
    pub const DATA: u8 = 0;
    /// Interrupt enable; divisor's high byte.
    pub const INTERRUPT_ENABLE: u8 = 1;
    /// Interrupt identification (read).
    pub const INTERRUPT_ID: u8 = 2;
    /// FIFO control (write).
    pub const FIFO_CONTROL: u8 = 2;
    /// Line control.
    pub const LINE_CONTROL: u8 = 3;
    /// Modem control.
    pub const MODEM_CONTROL: u8 = 4;
    /// Line status.
    pub const LINE_STATUS: u8 = 5;
    /// Modem status.
    pub const MODEM_STATUS: u8 = 6;
    /// Scratch.
    pub const SCRATCH: u8 = 7;
}

/// Bits of the interrupt enable register.
mod enable {
    pub const RECEIVED: u8 = 0x01;
    pub const TRANSMITTER: u8 = 0x02;
    pub const LINE_STATUS: u8 = 0x04;
    pub const MODEM_STATUS: u8 = 0x08;
    pub const ALL: u8 = 0x0f;
}

/// Values and bits of the interrupt identification register.
mod identification {
    pub const NONE: u8 = 0x01;
    pub const LINE_STATUS: u8 = 0x06;
    pub const RECEIVED: u8 = 0x04;
    pub const TIMEOUT: u8 = 0x0c;
    pub const TRANSMITTER: u8 = 0x02;
    pub const MODEM_STATUS: u8 = 0x00;
    pub const FIFOS_ENABLED: u8 = 0xc0;
}

/// Bits of the FIFO control register.
mod fifo_control {
    pub const ENABLE: u8 = 0x01;
    pub const CLEAR_RECEIVER: u8 = 0x02;
    pub const TRIGGER: u8 = 0xc0;
}

/// Bit of the line control register that puts the divisor in the place of two registers.
const DIVISOR_ACCESS: u8 = 0x80;

/// Bits of the modem control register.
mod modem_control {
    pub const DTR: u8 = 0x01;
    pub const RTS: u8 = 0x02;
    pub const OUT1: u8 = 0x04;
    pub const OUT2: u8 = 0x08;
    pub const LOOPBACK: u8 = 0x10;
    pub const ALL: u8 = 0x1f;
}

/// Bits of the line status register.
mod line_status {
    pub const DATA_READY: u8 = 0x01;
    pub const OVERRUN: u8 = 0x02;
    pub const TRANSMITTER_EMPTY: u8 = 0x60;
}

/// Bits of the modem status register. Each input's change is told four bits below it.
mod modem_status {
    pub const CTS: u8 = 0x10;
    pub const DSR: u8 = 0x20;
    pub const RING: u8 = 0x40;
    pub const DCD: u8 = 0x80;
    pub const RING_ENDED: u8 = 0x04;
    pub const CHANGES: u8 = 0x0f;
}

/// Reads of the line status in a row, without any other access, that mean a driver which polls.
/// Linux reads it twice while it sets the UART up.
const POLLS: u8 = 8;

/// What an access caused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Effects {
    /// The guest sent this byte.
    pub sent: Option<u8>,
    /// The guest took a byte of input.
    pub received: bool,
    /// The interrupt line rose.
    pub interrupt: bool,
    /// A line that was full of input has room again.
    pub room: bool,
}

/// The UART: what [`UartState`] says of each member holds here too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uart {
    interrupt_enable: u8,
    fifo_control: u8,
    line_control: u8,
    modem_control: u8,
    modem_changes: u8,
    scratch: u8,
    divisor: [u8; 2],
    overrun: bool,
    transmitter_pending: bool,
    fifo: VecDeque<u8>,
    line: VecDeque<u8>,
    line_was_full: bool,
    polls: u8,
    burst: u8,
    /// Whether the interrupt line was high after the last access.
    interrupt_line: bool,
}

impl Uart {
    /// Whether the interrupt line is high.
    pub const fn interrupts(&self) -> bool {
        self.interrupt_line
    }

    /// The guest reads `register`.
    pub fn read(&mut self, register: u8) -> (u8, Effects) {
        let mut effects = Effects::default();
        self.notice(register, false);
        let mut next_byte = false;
        let value = match register {
            register::DATA if self.divisor_access() => self.divisor[0],
            register::INTERRUPT_ENABLE if self.divisor_access() => self.divisor[1],
            register::DATA => {
                let byte = self.take();
                effects.received = byte.is_some();
                // Without FIFOs each byte arrives, and interrupts, by itself.
                next_byte = effects.received && !self.fifos_enabled() && self.ready() > 0;
                byte.unwrap_or(0)
            }
            register::INTERRUPT_ENABLE => self.interrupt_enable,
            register::INTERRUPT_ID => {
                let fifos = if self.fifos_enabled() {
                    identification::FIFOS_ENABLED
                } else {
                    0
                };
                let source = self.identification();
                if source == identification::TRANSMITTER {
                    self.transmitter_pending = false;
                }
                source | fifos
            }
            register::LINE_CONTROL => self.line_control,
            register::MODEM_CONTROL => self.modem_control,
            register::LINE_STATUS => self.read_line_status(),
            register::MODEM_STATUS => {
                let status = self.modem_inputs() | self.modem_changes;
                self.modem_changes = 0;
                status
            }
            register::SCRATCH => self.scratch,
            _ => 0,
        };
        effects.room = self.line_has_room_again();
        effects.interrupt = self.interrupt_line_rises(next_byte);
        (value, effects)
    }

    /// The guest writes `value` to `register`.
    pub fn write(&mut self, register: u8, value: u8) -> Effects {
        let mut effects = Effects::default();
        self.notice(register, true);
        let mut sent_again = false;
        match register {
            register::DATA if self.divisor_access() => self.divisor[0] = value,
            register::INTERRUPT_ENABLE if self.divisor_access() => self.divisor[1] = value,
            register::DATA => {
                if self.loops_back() {
                    self.arrive(value);
                } else {
                    effects.sent = Some(value);
                }
                sent_again = self.sent();
            }
            register::INTERRUPT_ENABLE => {
                let before = self.interrupt_enable;
                self.interrupt_enable = value & enable::ALL;
                // Enabled while the transmitter is empty, as it always is.
                if !before & self.interrupt_enable & enable::TRANSMITTER != 0 {
                    self.transmitter_pending = true;
                }
            }
            register::FIFO_CONTROL => self.write_fifo_control(value),
            register::LINE_CONTROL => self.line_control = value,
            register::MODEM_CONTROL => {
                let before = self.modem_inputs();
                self.modem_control = value & modem_control::ALL;
                self.note_modem_changes(before);
            }
            register::SCRATCH => self.scratch = value,
            // Line status and modem status are read-only.
            _ => {}
        }
        effects.interrupt = self.interrupt_line_rises(sent_again);
        effects
    }

    /// Input comes; how much of it the line took.
    pub fn feed(&mut self, input: &[u8]) -> (usize, Effects) {
        let count = self.room().min(input.len());
        self.line.extend(input.iter().take(count));
        if self.room() == 0 {
            self.line_was_full = true;
        }
        let effects = Effects {
            interrupt: self.interrupt_line_rises(false),
            ..Effects::default()
        };
        (count, effects)
    }

    /// Room on the line, in bytes.
    pub fn room(&self) -> usize {
        LINE.saturating_sub(self.line.len())
    }

    const fn divisor_access(&self) -> bool {
        self.line_control & DIVISOR_ACCESS != 0
    }

    const fn loops_back(&self) -> bool {
        self.modem_control & modem_control::LOOPBACK != 0
    }

    const fn fifos_enabled(&self) -> bool {
        self.fifo_control & fifo_control::ENABLE != 0
    }

    /// Bytes that the receiver, or the transmitter, holds.
    const fn depth(&self) -> usize {
        if self.fifos_enabled() { FIFO } else { 1 }
    }

    /// Bytes in the receiver's FIFO that make an interrupt without a timeout.
    const fn trigger(&self) -> usize {
        match self.fifo_control & fifo_control::TRIGGER {
            0x00 => 1,
            0x40 => 4,
            0x80 => 8,
            _ => 14,
        }
    }

    /// Whether a driver is there to take input from the line.
    const fn line_is_open(&self) -> bool {
        let driver = self.interrupt_enable & enable::RECEIVED != 0 || self.polls >= POLLS;
        driver && !self.loops_back()
    }

    /// Bytes that can be read, as far as the receiver holds them.
    fn ready(&self) -> usize {
        let arrived = self.fifo.len();
        if self.line_is_open() {
            arrived.saturating_add(self.line.len()).min(self.depth())
        } else {
            arrived
        }
    }

    /// Keeps count of what tells one kind of driver from another.
    fn notice(&mut self, register: u8, write: bool) {
        let data = register == register::DATA && !self.divisor_access();
        self.polls = match register {
            register::LINE_STATUS if !write => self.polls.saturating_add(1).min(POLLS),
            // A driver that polls reads data between its looks.
            _ if data && !write => self.polls,
            _ => 0,
        };
        if !(data && write) {
            self.burst = 0;
        }
    }

    /// One byte for the guest.
    fn take(&mut self) -> Option<u8> {
        match self.fifo.pop_front() {
            None if self.line_is_open() => self.line.pop_front(),
            arrived => arrived,
        }
    }

    /// A byte arrives, wanted or not.
    fn arrive(&mut self, byte: u8) {
        if self.fifo.len() < self.depth() {
            self.fifo.push_back(byte);
            return;
        }
        self.overrun = true;
        if !self.fifos_enabled() {
            // It takes the place of the one before.
            self.fifo.clear();
            self.fifo.push_back(byte);
        }
    }

    fn read_line_status(&mut self) -> u8 {
        // What the driver is shown has arrived: it is the driver's to read or to clear.
        while self.fifo.len() < self.ready() {
            match self.line.pop_front() {
                Some(byte) => self.fifo.push_back(byte),
                None => break,
            }
        }
        let mut status = line_status::TRANSMITTER_EMPTY;
        if !self.fifo.is_empty() {
            status |= line_status::DATA_READY;
        }
        if self.overrun {
            status |= line_status::OVERRUN;
            self.overrun = false;
        }
        status
    }

    fn write_fifo_control(&mut self, value: u8) {
        let before = self.fifo_control;
        // Without the enable bit the others are not programmed.
        self.fifo_control = if value & fifo_control::ENABLE != 0 {
            value & (fifo_control::ENABLE | fifo_control::TRIGGER)
        } else {
            before & fifo_control::TRIGGER
        };
        let switched = (before ^ self.fifo_control) & fifo_control::ENABLE != 0;
        let cleared = self.fifos_enabled() && value & fifo_control::CLEAR_RECEIVER != 0;
        if switched || cleared {
            self.fifo.clear();
        }
    }

    /// A byte was sent and the transmitter is empty again; whether that interrupts even if the
    /// line is high already.
    ///
    /// A transmitter interrupts once for what it was given at once. A driver that neither reads the
    /// interrupt identification nor fills the FIFO depends on the next one all the same.
    fn sent(&mut self) -> bool {
        self.transmitter_pending = true;
        let first = self.burst == 0 || usize::from(self.burst) >= self.depth();
        self.burst = if first {
            1
        } else {
            self.burst.saturating_add(1)
        };
        first && self.interrupt_enable & enable::TRANSMITTER != 0
    }

    /// The modem's inputs. In loop-back mode they are connected to the modem's outputs.
    fn modem_inputs(&self) -> u8 {
        if !self.loops_back() {
            return modem_status::CTS | modem_status::DSR | modem_status::DCD;
        }
        [
            (modem_control::RTS, modem_status::CTS),
            (modem_control::DTR, modem_status::DSR),
            (modem_control::OUT1, modem_status::RING),
            (modem_control::OUT2, modem_status::DCD),
        ]
        .iter()
        .filter(|(output, _)| self.modem_control & output != 0)
        .fold(0, |inputs, (_, input)| inputs | input)
    }

    fn note_modem_changes(&mut self, before: u8) {
        let now = self.modem_inputs();
        let changed = (before ^ now) >> 4;
        // Of the ring indicator only the end is told.
        let ring_ended = before & !now & modem_status::RING != 0;
        self.modem_changes |= changed & !modem_status::RING_ENDED;
        if ring_ended {
            self.modem_changes |= modem_status::RING_ENDED;
        }
    }

    /// The low half of the interrupt identification register: the first of the sources that are
    /// pending and enabled.
    fn identification(&self) -> u8 {
        let enabled = |bit| self.interrupt_enable & bit != 0;
        let ready = self.ready();
        if enabled(enable::LINE_STATUS) && self.overrun {
            identification::LINE_STATUS
        } else if enabled(enable::RECEIVED) && ready > 0 {
            if !self.fifos_enabled() || ready >= self.trigger() {
                identification::RECEIVED
            } else {
                // No more is coming: the pause that the timeout waits for has passed.
                identification::TIMEOUT
            }
        } else if enabled(enable::TRANSMITTER) && self.transmitter_pending {
            identification::TRANSMITTER
        } else if enabled(enable::MODEM_STATUS) && self.modem_changes != 0 {
            identification::MODEM_STATUS
        } else {
            identification::NONE
        }
    }

    /// Whether the interrupt line rises, or has to be seen to rise `again`.
    fn interrupt_line_rises(&mut self, again: bool) -> bool {
        let before = self.interrupt_line;
        self.interrupt_line = self.identification() != identification::NONE;
        self.interrupt_line && (!before || again)
    }

    fn line_has_room_again(&mut self) -> bool {
        let again = self.line_was_full && self.line.is_empty();
        if again {
            self.line_was_full = false;
        }
        again
    }
}

#[cfg(test)]
mod tests;
