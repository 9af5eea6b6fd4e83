use super::register::{
    DATA, FIFO_CONTROL, INTERRUPT_ENABLE, INTERRUPT_ID, LINE_CONTROL, LINE_STATUS, MODEM_CONTROL,
    MODEM_STATUS, SCRATCH,
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
