//! `mayfly-exit CODE`: tells the monitor of this guest its exit code, by the port that
//! `docs/guests.md` describes, and then resets or powers off the machine if that is asked for.
//!
//! It runs inside a guest, as root, and needs nothing there but a kernel that lets it reach the port:
//! through `/dev/port`, or by ioperm(2). It allocates nothing, has no standard library, and nothing in it
//! panics.

#![no_std]
#![no_main]
#![deny(clippy::arithmetic_side_effects)]

#[expect(
    unsafe_code,
    reason = "system calls and port instructions without a standard library"
)]
mod sys;

use sys::{Errno, Port, exit, print};

const PORT: u16 = 0x610;

const USAGE: &[u8] = b"usage: mayfly-exit [--reboot | --poweroff] CODE

Tells mayfly the exit code of this guest, 0 to 255: that of `mayfly-jailer run`, and in the exit report.
The code counts when the machine then resets or powers off; the one that was written last is it.

  --reboot    write out files (sync), then reset the machine at once, without stopping other processes
  --poweroff  the same, but power it off; a kernel without ACPI cannot

exit codes: 0 written; 1 there is no such port, or it cannot be reached; 2 bad arguments
";

const FAILED: u8 = 1;
const BAD_ARGUMENTS: u8 = 2;

/// Commands of reboot(2).
const RESTART: usize = 0x0123_4567;
const POWER_OFF: usize = 0x4321_fedc;

/// `argument` gives the arguments by number; 0 is the program's name.
fn main(argument: impl Fn(usize) -> Option<&'static [u8]>) -> ! {
    let (mut command, mut code) = (None, None);
    let mut index = 1;
    while let Some(word) = argument(index) {
        index = index.wrapping_add(1);
        match word {
            b"--help" | b"-h" => {
                print(USAGE);
                exit(0)
            }
            b"--reboot" if command.is_none() => command = Some(RESTART),
            b"--poweroff" if command.is_none() => command = Some(POWER_OFF),
            word if code.is_none() => {
                code = byte(word);
                if code.is_none() {
                    refuse(&[b"`", word, b"` is no exit code: a number from 0 to 255 is"])
                }
            }
            word => refuse(&[b"unexpected argument `", word, b"`"]),
        }
    }
    let Some(code) = code else {
        refuse(&[b"the exit code is missing: mayfly-exit CODE"])
    };
    tell(code);
    if let Some(command) = command {
        sys::sync();
        let Errno(error) = sys::reboot(command);
        fail(&[
            b"reboot(2) failed with error ",
            decimal(error, &mut [0; 20]),
        ]);
    }
    exit(0)
}

/// Writes the code to the port, in the first way that the kernel allows.
fn tell(code: u8) {
    let file = match sys::open(c"/dev/port") {
        Ok(file) => file,
        Err(error) => return tell_by_instruction(code, error),
    };
    let failed = match file.read_byte(PORT) {
        Ok(0) => file.write_byte(PORT, code).err(),
        Ok(_) => no_port(),
        Err(error) => Some(error),
    };
    if let Some(Errno(error)) = failed {
        let digits = &mut [0; 20];
        fail(&[b"/dev/port failed with error ", decimal(error, digits)])
    }
}

fn tell_by_instruction(code: u8, Errno(first): Errno) {
    match Port::ask(PORT) {
        Ok(port) if port.read() == 0 => port.write(code),
        Ok(_) => no_port(),
        Err(Errno(second)) => fail(&[
            b"cannot reach the port: /dev/port failed with error ",
            decimal(first, &mut [0; 20]),
            b", ioperm(2) with error ",
            decimal(second, &mut [0; 20]),
            b"; run it as root, on a kernel with CONFIG_DEVPORT or CONFIG_X86_IOPL_IOPERM",
        ]),
    }
}

fn no_port() -> ! {
    fail(&[
        b"this machine has no port for an exit code: it is not mayfly's, or of an older version",
    ])
}

/// A number from 0 to 255.
fn byte(text: &[u8]) -> Option<u8> {
    if text.is_empty() {
        return None;
    }
    text.iter().try_fold(0u8, |value, digit| {
        let digit = digit.checked_sub(b'0').filter(|digit| *digit < 10)?;
        value.checked_mul(10)?.checked_add(digit)
    })
}

/// The digits of a number.
fn decimal(mut number: usize, digits: &mut [u8; 20]) -> &[u8] {
    let mut first = digits.len();
    for (place, digit) in digits.iter_mut().enumerate().rev() {
        *digit = b'0' | (number % 10) as u8;
        number /= 10;
        first = place;
        if number == 0 {
            break;
        }
    }
    digits.get(first..).unwrap_or_default()
}

fn refuse(parts: &[&[u8]]) -> ! {
    complain(parts);
    exit(BAD_ARGUMENTS)
}

fn fail(parts: &[&[u8]]) -> ! {
    complain(parts);
    exit(FAILED)
}

fn complain(parts: &[&[u8]]) {
    print(b"mayfly-exit: ");
    for part in parts {
        print(part);
    }
    print(b"\n");
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    fail(&[b"internal error"])
}
