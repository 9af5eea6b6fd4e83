//! The console: COM1, polled.
//!
//! Output does not wait for the transmitter: every monitor's port takes a byte at once, and a
//! status read costs an exit to user space. Input polls the line status.

use core::fmt::{self, Write};

use crate::x86;

const DATA: u16 = 0x3f8;
const LINE_STATUS: u16 = 0x3fd;
/// Line status: a received byte waits.
const DATA_READY: u8 = 1;

/// Writes bytes to the port, one access each.
struct Port;

impl Write for Port {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.bytes().for_each(byte);
        Ok(())
    }
}

/// One raw byte.
pub fn byte(value: u8) {
    x86::outb(DATA, value);
}

/// One line of the probe's: the prefix, the text, an end of line.
pub fn line(text: fmt::Arguments) {
    // Writing to the port cannot fail.
    let _ = Port.write_fmt(format_args!("probe: {text}\r\n"));
}

/// The next received byte, if one waits.
pub fn poll() -> Option<u8> {
    (x86::inb(LINE_STATUS) & DATA_READY != 0).then(|| x86::inb(DATA))
}

/// Reads a line into `buffer`, without its end; waits for ever. What does not fit is dropped.
pub fn read_line(buffer: &mut [u8]) -> &str {
    let mut length = 0;
    loop {
        match poll() {
            None => core::hint::spin_loop(),
            Some(b'\r' | b'\n') if length == 0 => {}
            Some(b'\r' | b'\n') => break,
            Some(value) => {
                if let Some(slot) = buffer.get_mut(length) {
                    *slot = value;
                    length += 1;
                }
            }
        }
    }
    core::str::from_utf8(&buffer[..length]).unwrap_or("?")
}
