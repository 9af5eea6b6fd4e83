//! Words that speak and listen: serial port and keyboard controller.

use super::{Arguments, Outcome, run};
use crate::clock::{self, Deadline};
use crate::{serial, text, x86};

const KEYBOARD_DATA: u16 = 0x60;
const KEYBOARD_STATUS: u16 = 0x64;
/// Keyboard status: a byte waits.
const OUTPUT_FULL: u8 = 1;
/// Longest input line.
const LINE: usize = 256;

pub fn byte(_: &mut Arguments) -> Outcome {
    serial::byte(b'!');
    Ok("".into())
}

pub fn print(arguments: &mut Arguments) -> Outcome {
    Ok(text!("{}", arguments.text().unwrap_or("")))
}

pub fn echo(arguments: &mut Arguments) -> Outcome {
    let lines = arguments.number_or("LINES", 1)?;
    serial::line(format_args!("echo ready"));
    let mut buffer = [0; LINE];
    for _ in 0..lines {
        let line = serial::read_line(&mut buffer);
        serial::line(format_args!("got {line}"));
    }
    Ok(text!("{lines} lines"))
}

pub fn shell(_: &mut Arguments) -> Outcome {
    serial::line(format_args!("shell ready"));
    let mut buffer = [0; LINE];
    loop {
        match serial::read_line(&mut buffer) {
            "end" => return Ok("".into()),
            line => run(line),
        }
    }
}

pub fn keyboard(arguments: &mut Arguments) -> Outcome {
    let wanted = arguments.number_or("CODES", 3)?;
    let limit = Deadline::in_ms(arguments.number_or("MS", clock::patience_ms())?);
    serial::line(format_args!("kbd ready"));
    let mut seen = 0;
    while seen < wanted && !limit.passed() {
        let status = x86::inb(KEYBOARD_STATUS);
        if status != 0xff && status & OUTPUT_FULL != 0 {
            let code = x86::inb(KEYBOARD_DATA);
            serial::line(format_args!("kbd {code:#04x}"));
            seen += 1;
        } else {
            clock::wait_ms(1);
        }
    }
    if seen < wanted {
        return Err(text!("{seen} of {wanted} scancodes"));
    }
    Ok(text!("{seen} scancodes"))
}
