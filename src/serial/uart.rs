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

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::state::{self, StateError};

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

/// What [`StateError`] calls it.
const NAME: &str = "UART";

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
mod tests {
    use super::register::{
        DATA, FIFO_CONTROL, INTERRUPT_ENABLE, INTERRUPT_ID, LINE_CONTROL, LINE_STATUS,
        MODEM_CONTROL, MODEM_STATUS, SCRATCH,
    };
    use super::*;
    use crate::state::state_round_trip;

    const LOOPBACK: u8 = 0x10;
    /// Enabled, both cleared.
    const FIFOS: u8 = 0x07;
    const TRIGGER_AT_8: u8 = 0x80;

    impl Default for Uart {
        fn default() -> Self {
            Uart::new(&UartState::default()).unwrap()
        }
    }

    impl Uart {
        fn get(&mut self, register: u8) -> u8 {
            self.read(register).0
        }

        /// All that can be read, as a driver does that looks before it reads.
        fn drain(&mut self) -> Vec<u8> {
            let mut all = Vec::new();
            while self.get(LINE_STATUS) & 1 != 0 {
                all.push(self.get(DATA));
            }
            all
        }
    }

    /// A UART with these sources pending and these interrupts enabled.
    fn with(overrun: bool, bytes: u8, transmitter: bool, modem: bool, fifo: u8, ier: u8) -> Uart {
        let mut uart = Uart::default();
        uart.write(FIFO_CONTROL, fifo);
        uart.write(MODEM_CONTROL, LOOPBACK);
        // An overrun is a byte more than there is room for.
        let depth = if fifo & 1 != 0 { 16 } else { 1 };
        if overrun {
            for _ in 0..=depth {
                uart.write(DATA, b'o');
            }
            while uart.take().is_some() {}
        }
        for n in 0..bytes {
            uart.write(DATA, n);
        }
        uart.get(MODEM_STATUS);
        if modem {
            uart.write(MODEM_CONTROL, LOOPBACK | 0x02);
        }
        uart.write(INTERRUPT_ENABLE, ier);
        if !transmitter {
            uart.transmitter_pending = false;
        } else if ier & 2 == 0 {
            uart.transmitter_pending = true;
        }
        uart
    }

    #[test]
    fn interrupt_id_is_the_first_of_what_is_pending_and_enabled_in_every_combination() {
        // The data sheet's table, by priority: identification, enable bit.
        let mut seen = std::collections::BTreeSet::new();
        for (fifo, counts) in [
            (0, &[0u8, 1][..]),
            (FIFOS | TRIGGER_AT_8, &[0, 1, 7, 8, 16]),
        ] {
            for bytes in counts {
                for bits in 0..8u8 {
                    for ier in 0..16u8 {
                        let (overrun, transmitter, modem) =
                            (bits & 1 != 0, bits & 2 != 0, bits & 4 != 0);
                        let received = match (fifo, *bytes) {
                            (_, 0) => None,
                            (0, _) | (_, 8..) => Some(0x04),
                            _ => Some(0x0c),
                        };
                        let table = [
                            (overrun.then_some(0x06), 0x04),
                            (received, 0x01),
                            (transmitter.then_some(0x02), 0x02),
                            (modem.then_some(0x00), 0x08),
                        ];
                        let wanted = table
                            .iter()
                            .find_map(|(id, enable)| id.filter(|_| ier & enable != 0))
                            .unwrap_or(0x01);
                        let fifo_bits = if fifo != 0 { 0xc0 } else { 0 };
                        let mut uart = with(overrun, *bytes, transmitter, modem, fifo, ier);
                        let told = uart.get(INTERRUPT_ID);
                        assert_eq!(
                            told,
                            wanted | fifo_bits,
                            "FCR {fifo:#x}, {bytes} bytes, overrun {overrun}, \
                             transmitter {transmitter}, modem {modem}, IER {ier:#x}"
                        );
                        // Read again: all is as it was, but for a transmitter that was told.
                        let again = if wanted == 0x02 {
                            table[3].0.filter(|_| ier & 0x08 != 0).unwrap_or(0x01)
                        } else {
                            wanted
                        };
                        assert_eq!(uart.get(INTERRUPT_ID), again | fifo_bits);
                        seen.insert(told);
                    }
                }
            }
        }
        let all = [
            0x00, 0x01, 0x02, 0x04, 0x06, 0xc0, 0xc1, 0xc2, 0xc4, 0xc6, 0xcc,
        ];
        assert_eq!(Vec::from_iter(seen), all);
    }

    #[test]
    fn received_data_and_empty_transmitter_are_told_one_after_the_other() {
        let mut uart = Uart::default();
        uart.write(FIFO_CONTROL, FIFOS);
        uart.write(INTERRUPT_ENABLE, 0x03);
        uart.feed(b"x");
        assert_eq!(uart.get(INTERRUPT_ID), 0xc4);
        assert_eq!(uart.get(INTERRUPT_ID), 0xc4, "the byte still waits");
        assert_eq!(uart.get(DATA), b'x');
        assert_eq!(uart.get(INTERRUPT_ID), 0xc2);
        assert_eq!(uart.get(INTERRUPT_ID), 0xc1);
    }

    #[test]
    fn line_status_is_cleared_by_its_read_only() {
        let mut uart = with(true, 0, false, false, FIFOS, 0x0f);
        for other in [INTERRUPT_ID, MODEM_STATUS, DATA, INTERRUPT_ENABLE] {
            uart.get(other);
        }
        assert_eq!(uart.get(INTERRUPT_ID), 0xc6);
        assert_eq!(uart.get(LINE_STATUS), 0x62);
        assert_eq!(uart.get(LINE_STATUS), 0x60);
        assert_eq!(uart.get(INTERRUPT_ID), 0xc1);
    }

    #[test]
    fn modem_status_is_cleared_by_its_read_only() {
        let mut uart = with(false, 0, false, true, FIFOS, 0x08);
        for other in [INTERRUPT_ID, LINE_STATUS, DATA] {
            uart.get(other);
        }
        assert_eq!(uart.get(INTERRUPT_ID), 0xc0);
        // Clear to send, and that it changed.
        assert_eq!(uart.get(MODEM_STATUS), 0x11);
        assert_eq!(uart.get(MODEM_STATUS), 0x10);
        assert_eq!(uart.get(INTERRUPT_ID), 0xc1);
    }

    #[test]
    fn transmitter_interrupts_when_enabled_and_after_each_byte() {
        let mut uart = Uart::default();
        assert!(!uart.write(DATA, b'a').interrupt, "nothing is enabled");
        assert!(uart.write(INTERRUPT_ENABLE, 2).interrupt);
        assert_eq!(uart.get(INTERRUPT_ID), 0x02);
        assert!(!uart.write(INTERRUPT_ENABLE, 2).interrupt, "it was enabled");
        assert_eq!(uart.get(INTERRUPT_ID), 0x01);
        let sent = uart.write(DATA, b'b');
        assert_eq!((sent.sent, sent.interrupt), (Some(b'b'), true));
        // Without a look at the identification, the next byte interrupts too.
        assert!(uart.write(DATA, b'c').interrupt);
        assert_eq!(uart.get(INTERRUPT_ID), 0x02);
        uart.write(INTERRUPT_ENABLE, 0);
        assert!(uart.write(INTERRUPT_ENABLE, 2).interrupt);
    }

    #[test]
    fn burst_of_a_full_fifo_interrupts_once() {
        let mut uart = Uart::default();
        uart.write(FIFO_CONTROL, FIFOS);
        uart.write(INTERRUPT_ENABLE, 2);
        for _ in 0..3 {
            assert_eq!(uart.get(INTERRUPT_ID), 0xc2);
            let rises = (0..16).filter(|_| uart.write(DATA, b'x').interrupt).count();
            assert_eq!(rises, 1);
        }
        // A driver that never asks what it is interrupted for.
        for _ in 0..3 {
            let rises = (0..16).filter(|_| uart.write(DATA, b'x').interrupt).count();
            assert_eq!(rises, 1);
        }
        uart.get(LINE_STATUS);
        assert!(uart.write(DATA, b'x').interrupt);
    }

    #[test]
    fn interrupt_line_rises_once_for_what_stays_pending() {
        let mut uart = Uart::default();
        uart.write(FIFO_CONTROL, FIFOS);
        assert!(!uart.feed(b"a").1.interrupt);
        assert!(uart.write(INTERRUPT_ENABLE, 1).interrupt);
        assert!(!uart.feed(b"b").1.interrupt);
        assert!(!uart.read(DATA).1.interrupt);
        assert!(!uart.read(DATA).1.interrupt);
        assert!(uart.feed(b"c").1.interrupt);
        assert!(!uart.write(INTERRUPT_ENABLE, 0).interrupt);
        assert!(uart.write(INTERRUPT_ENABLE, 1).interrupt);
        // Without FIFOs each byte is an arrival.
        uart.write(FIFO_CONTROL, 0);
        uart.drain();
        assert!(uart.feed(b"de").1.interrupt);
        assert!(uart.read(DATA).1.interrupt);
        assert!(!uart.read(DATA).1.interrupt);
    }

    /// The 8250 driver of Linux, from its probe to the moment it takes input.
    fn linux_sets_up(uart: &mut Uart) -> Vec<u8> {
        let mut lost = Vec::new();
        let mut look_and_read = |uart: &mut Uart| {
            if uart.get(LINE_STATUS) & 1 != 0 {
                lost.push(uart.get(DATA));
            } else {
                assert_eq!(uart.get(DATA), 0);
            }
            uart.get(INTERRUPT_ID);
            uart.get(MODEM_STATUS);
        };
        // The console before the driver.
        for byte in b"early" {
            uart.get(LINE_STATUS);
            uart.write(DATA, *byte);
        }
        uart.write(INTERRUPT_ENABLE, 0);
        uart.write(INTERRUPT_ENABLE, 0x0f);
        assert_eq!(uart.get(INTERRUPT_ENABLE), 0x0f);
        uart.write(INTERRUPT_ENABLE, 0);
        uart.write(MODEM_CONTROL, LOOPBACK | 0x0a);
        assert_eq!(uart.get(MODEM_STATUS) & 0xf0, 0x90);
        uart.write(MODEM_CONTROL, 0);
        uart.write(FIFO_CONTROL, 1);
        assert_eq!(uart.get(INTERRUPT_ID) >> 6, 3, "a 16550A");
        for _ in 0..2 {
            for value in [1, 7, 0] {
                uart.write(FIFO_CONTROL, value);
            }
            look_and_read(uart);
        }
        assert_ne!(uart.get(LINE_STATUS), 0xff);
        uart.get(LINE_STATUS);
        uart.write(LINE_CONTROL, 3);
        uart.write(INTERRUPT_ENABLE, 2);
        uart.get(INTERRUPT_ENABLE);
        assert_eq!(uart.get(INTERRUPT_ID) & 0x0f, 2);
        uart.write(INTERRUPT_ENABLE, 0);
        look_and_read(uart);
        uart.write(INTERRUPT_ENABLE, 5);
        uart.write(LINE_CONTROL, 0x83);
        uart.write(DATA, 1);
        uart.write(LINE_CONTROL, 3);
        uart.write(FIFO_CONTROL, 1);
        uart.write(FIFO_CONTROL, 0x81);
        lost
    }

    #[test]
    fn input_that_comes_before_the_driver_is_ready_is_kept() {
        let mut uart = Uart::default();
        assert_eq!(uart.feed(b"typed early").0, 11);
        assert_eq!(linux_sets_up(&mut uart), b"");
        assert_eq!(uart.get(INTERRUPT_ID), 0xc4);
        assert_eq!(uart.drain(), b"typed early");
        // It is closed and opened again: what comes in between is kept as well.
        uart.write(INTERRUPT_ENABLE, 0);
        uart.feed(b"and again");
        assert_eq!(linux_sets_up(&mut uart), b"");
        assert_eq!(uart.drain(), b"and again");
    }

    #[test]
    fn driver_that_polls_gets_input_without_interrupts() {
        let mut uart = Uart::default();
        uart.feed(b"abc");
        // A driver that only writes looks once before each byte.
        for _ in 0..3 {
            assert_eq!(uart.get(LINE_STATUS), 0x60);
            uart.write(DATA, b'.');
        }
        for _ in 1..POLLS {
            assert_eq!(uart.get(LINE_STATUS), 0x60);
        }
        assert_eq!(uart.get(LINE_STATUS), 0x61);
        assert_eq!(uart.get(DATA), b'a');
        assert_eq!(uart.get(LINE_STATUS), 0x61);
        assert_eq!(uart.drain(), b"bc");
        // Another driver sets it up.
        uart.write(DATA, b'.');
        uart.feed(b"def");
        assert_eq!(linux_sets_up(&mut uart), b"");
        assert_eq!(uart.drain(), b"def");
    }

    #[test]
    fn clearing_the_receiver_drops_what_the_driver_was_shown() {
        for clear in [&[0x03][..], &[0x07], &[0x00], &[0x00, 0x01]] {
            let mut uart = Uart::default();
            uart.write(FIFO_CONTROL, 1);
            uart.write(INTERRUPT_ENABLE, 1);
            uart.feed(&[b'x'; 20]);
            assert_eq!(uart.get(LINE_STATUS), 0x61);
            for value in clear {
                uart.write(FIFO_CONTROL, *value);
            }
            assert_eq!(uart.drain().len(), 4, "{clear:x?}");
        }
        // Neither does: the bits count with the enable bit only, and one is the transmitter's.
        for keep in [0x01, 0x05, 0xc1] {
            let mut uart = Uart::default();
            uart.write(FIFO_CONTROL, 1);
            uart.write(INTERRUPT_ENABLE, 1);
            uart.feed(&[b'x'; 20]);
            uart.get(LINE_STATUS);
            uart.write(FIFO_CONTROL, keep);
            assert_eq!(uart.drain().len(), 20, "{keep:#x}");
        }
        let mut uart = Uart::default();
        uart.write(INTERRUPT_ENABLE, 1);
        uart.feed(b"xy");
        uart.get(LINE_STATUS);
        uart.write(FIFO_CONTROL, 0x02);
        assert_eq!(uart.drain(), b"xy");
    }

    #[test]
    fn loop_back_brings_output_back_and_cuts_the_line() {
        for (fifo, depth, kept) in [
            (FIFOS, 16, b"0123456789:;<=>?".to_vec()),
            (0, 1, b"@".to_vec()),
        ] {
            let mut uart = Uart::default();
            uart.write(INTERRUPT_ENABLE, 1);
            uart.write(FIFO_CONTROL, fifo);
            uart.write(MODEM_CONTROL, LOOPBACK);
            assert_eq!(uart.feed(b"outside"), (7, Effects::default()));
            assert_eq!(uart.get(LINE_STATUS), 0x60);
            for n in 0..=depth {
                let effects = uart.write(DATA, if depth == 1 { b'?' } else { b'0' } + n);
                assert_eq!(effects.sent, None);
            }
            assert_eq!(uart.get(LINE_STATUS), 0x63, "one was too many");
            assert_eq!(uart.drain(), kept);
            uart.write(MODEM_CONTROL, 0);
            assert_eq!(uart.drain(), b"outside");
        }
    }

    #[test]
    fn loop_back_connects_the_modem_lines() {
        let mut uart = Uart::default();
        assert_eq!(uart.get(MODEM_STATUS), 0xb0);
        for outputs in 0..16u8 {
            uart.write(MODEM_CONTROL, LOOPBACK | outputs);
            let inputs = uart.get(MODEM_STATUS) >> 4;
            let wanted = (outputs & 2) >> 1 | (outputs & 1) << 1 | outputs & 0x0c;
            assert_eq!(inputs, wanted, "{outputs:#x}");
            assert_eq!(uart.get(MODEM_STATUS) & 0x0f, 0);
        }
        // The end of a ring is told, its beginning is not.
        uart.write(MODEM_CONTROL, LOOPBACK);
        uart.get(MODEM_STATUS);
        uart.write(MODEM_CONTROL, LOOPBACK | 4);
        assert_eq!(uart.get(MODEM_STATUS), 0x40);
        uart.write(MODEM_CONTROL, LOOPBACK);
        assert_eq!(uart.get(MODEM_STATUS), 0x04);
    }

    #[test]
    fn plain_registers_keep_the_bits_they_have() {
        let mut uart = Uart::default();
        for (register, bits) in [
            (INTERRUPT_ENABLE, 0x0f),
            (MODEM_CONTROL, 0x1f),
            (SCRATCH, 0xff),
        ] {
            for value in [0xff, 0x55, 0xaa, 0] {
                uart.write(register, value);
                assert_eq!(uart.get(register), value & bits);
            }
        }
        uart.write(LINE_CONTROL, 0x80);
        uart.write(DATA, 0x12);
        uart.write(INTERRUPT_ENABLE, 0x34);
        assert_eq!((uart.get(DATA), uart.get(INTERRUPT_ENABLE)), (0x12, 0x34));
        uart.write(LINE_CONTROL, 0x7f);
        assert_eq!(uart.get(LINE_CONTROL), 0x7f);
        assert_eq!((uart.get(DATA), uart.get(INTERRUPT_ENABLE)), (0, 0));
        // Read-only, and none at all.
        uart.get(MODEM_STATUS);
        uart.write(LINE_STATUS, 0xff);
        uart.write(MODEM_STATUS, 0);
        assert_eq!(
            (uart.get(LINE_STATUS), uart.get(MODEM_STATUS)),
            (0x60, 0xb0)
        );
        uart.write(8, 0xff);
        assert_eq!(uart.get(8), 0);
    }

    #[test]
    fn line_tells_of_room_when_it_was_full() {
        let mut uart = Uart::default();
        uart.write(INTERRUPT_ENABLE, 1);
        assert_eq!(uart.feed(&[b'x'; LINE - 1]).0, LINE - 1);
        for _ in 0..LINE - 1 {
            assert!(!uart.read(DATA).1.room);
        }
        assert_eq!(uart.feed(&[b'x'; LINE + 1]).0, LINE);
        assert_eq!((uart.room(), uart.feed(b"x").0), (0, 0));
        let told: Vec<bool> = (0..LINE).map(|_| uart.read(DATA).1.room).collect();
        assert_eq!(told.iter().position(|told| *told), Some(LINE - 1));
    }

    #[test]
    fn uart_when_it_was_saved_in_the_middle_of_a_transmission_goes_on() {
        let mut uart = Uart::default();
        uart.write(FIFO_CONTROL, FIFOS);
        uart.write(INTERRUPT_ENABLE, 2);
        assert_eq!(uart.get(INTERRUPT_ID), 0xc2);
        assert!(!uart.interrupts());
        assert!(uart.write(DATA, b'a').interrupt);
        // The driver waits for the interrupt of this byte, which was raised and not served.
        let mut uart = Uart::new(&uart.save()).unwrap();
        assert!(uart.interrupts(), "to be raised again");
        assert_eq!(uart.get(INTERRUPT_ID), 0xc2);
        assert!(!uart.interrupts());
        assert!(uart.write(DATA, b'b').interrupt);
    }

    #[test]
    fn input_when_it_was_typed_before_the_uart_was_saved_is_kept() {
        let mut uart = Uart::default();
        uart.write(INTERRUPT_ENABLE, 1);
        uart.write(FIFO_CONTROL, FIFOS);
        uart.feed(&[b'x'; LINE]);
        uart.get(LINE_STATUS);
        let mut uart = Uart::new(&uart.save()).unwrap();
        assert!(uart.interrupts());
        assert_eq!(
            uart.feed(b"yz").0,
            2,
            "what was shown to the driver left the line"
        );
        let read: Vec<_> = (0..LINE).map(|_| uart.read(DATA)).collect();
        assert!(read.iter().all(|(byte, _)| *byte == b'x'));
        assert_eq!(uart.drain(), b"yz");
    }

    #[test]
    fn line_when_it_was_saved_full_tells_of_room() {
        let mut uart = Uart::default();
        uart.feed(&[b'x'; LINE]);
        // Also when the state does not say so itself.
        for line_was_full in [true, false] {
            let state = UartState {
                line_was_full,
                ..uart.save()
            };
            let mut again = Uart::new(&state).unwrap();
            again.write(INTERRUPT_ENABLE, 1);
            let told = (0..LINE).filter(|_| again.read(DATA).1.room).count();
            assert_eq!(told, 1);
        }
    }

    #[test]
    fn state_when_no_uart_can_be_in_it_is_refused_by_name() {
        let good = UartState::default;
        let fifos = || UartState {
            fifo_control: 1,
            ..good()
        };
        for (state, named) in [
            (
                UartState {
                    interrupt_enable: 0x10,
                    ..good()
                },
                "interrupt_enable",
            ),
            (
                UartState {
                    fifo_control: 0x02,
                    ..good()
                },
                "fifo_control",
            ),
            (
                UartState {
                    modem_control: 0x20,
                    ..good()
                },
                "modem_control",
            ),
            (
                UartState {
                    modem_changes: 0x10,
                    ..good()
                },
                "modem_changes",
            ),
            (
                UartState {
                    polls: POLLS + 1,
                    ..good()
                },
                "polls",
            ),
            (
                UartState {
                    burst: 17,
                    ..good()
                },
                "burst",
            ),
            (
                UartState {
                    fifo: vec![0; 2],
                    ..good()
                },
                "bytes in fifo: 2",
            ),
            (
                UartState {
                    fifo: vec![0; 17],
                    ..fifos()
                },
                "bytes in fifo: 17",
            ),
            (
                UartState {
                    line: vec![0; LINE + 1],
                    ..good()
                },
                "bytes in line: 65",
            ),
        ] {
            let error = Uart::new(&state).unwrap_err().to_string();
            assert!(error.contains("state of the UART"), "{error}");
            assert!(error.contains(named), "{named}: {error}");
        }
        for state in [
            UartState {
                fifo: vec![0; 16],
                burst: 16,
                polls: POLLS,
                ..fifos()
            },
            UartState {
                fifo: vec![0],
                line: vec![0; LINE],
                ..good()
            },
        ] {
            assert!(Uart::new(&state).is_ok(), "{state:?}");
        }
    }

    #[test]
    fn any_accesses_leave_it_within_its_bounds() {
        let seed = std::process::id().wrapping_mul(0x9e37_79b9) | 1;
        println!("seed {seed}");
        let mut state = seed;
        let mut random = || {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            (state >> 8) as u8
        };
        let mut uart = Uart::default();
        let (mut fed, mut taken, mut saved) = (0u64, 0u64, 0);
        for _ in 0..200_000 {
            match random() % 8 {
                0 => fed += uart.feed(&[random(); 9]).0 as u64,
                1..4 => {
                    uart.write(random() % 9, random());
                }
                _ => taken += u64::from(uart.read(random() % 9).1.received),
            }
            assert!(uart.fifo.len() <= FIFO && uart.line.len() <= LINE);
            assert!(uart.ready() <= FIFO.max(uart.fifo.len()));
            let pending = uart.identification() != 1;
            assert_eq!(uart.interrupt_line, pending);
            if random() == 0 {
                // Nor does it matter that it is saved and made again meanwhile.
                state_round_trip!(uart, |state| Uart::new(&state).unwrap());
                let again = Uart::new(&uart.save()).unwrap();
                assert_eq!(again, uart);
                uart = again;
                saved += 1;
            }
        }
        assert!(saved > 100, "{saved}");
        assert!(fed > 0 && taken > 0);
        // Neither buffer was ever moved to a larger place.
        assert!(uart.fifo.capacity() < 2 * FIFO && uart.line.capacity() < 2 * LINE);
    }
}
