//! The ports of the UART: what vCPUs touch.
//!
//! [`SerialPort`] is a [`Uart`] behind one mutex, shared by the vCPU threads (registers) and the
//! serial thread (input), with what the UART's accesses cause: an interrupt, a byte of output, a
//! count. It never waits for a reader of the console.

use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::Counters;
use super::uart::{Effects, Uart};
use crate::bus::{Registers, Written};

/// Ports of a 16550.
pub const PORTS: u64 = 8;

/// The UART as the bus has it.
pub struct SerialPort {
    uart: Mutex<Uart>,
    /// The interrupt line.
    interrupt: EventFd,
    /// Written to when the UART has room for input again.
    room: EventFd,
    output: File,
    counters: Arc<Counters>,
}

impl SerialPort {
    pub(super) fn new(
        interrupt: EventFd,
        room: EventFd,
        output: File,
        counters: Arc<Counters>,
    ) -> Self {
        SerialPort {
            uart: Mutex::new(Uart::default()),
            interrupt,
            room,
            output,
            counters,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Uart> {
        // A panic ends the process, so a poisoned lock is never seen.
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Room for input, in bytes. It only grows, but for [`SerialPort::feed`].
    pub(super) fn room(&self) -> usize {
        self.lock().room()
    }

    /// Gives the guest input; how many bytes the UART took.
    pub(super) fn feed(&self, input: &[u8]) -> usize {
        let mut uart = self.lock();
        let (count, effects) = uart.feed(input);
        self.carry_out(effects);
        count
    }

    /// Does what an access caused. The caller holds the mutex.
    fn carry_out(&self, effects: Effects) {
        if let Some(byte) = effects.sent {
            match (&self.output).write(&[byte]) {
                Ok(1) => self.counters.written.one(),
                _ => self.counters.overrun.one(),
            }
        }
        if effects.received {
            self.counters.read.one();
        }
        // An eventfd only refuses when it has been written to 2^64 - 2 times without a read.
        let signal = |event: &EventFd| -> io::Result<()> { event.write(1) };
        if effects.interrupt {
            let _ = signal(&self.interrupt);
        }
        if effects.room {
            let _ = signal(&self.room);
        }
    }
}

impl fmt::Debug for SerialPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SerialPort")
    }
}

/// The registers are bytes: the first byte of a wider access is the access, the rest reads as 0.
impl Registers for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let (Some(first), Ok(register)) = (data.first_mut(), u8::try_from(offset)) {
            let mut uart = self.lock();
            let (value, effects) = uart.read(register);
            *first = value;
            self.carry_out(effects);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Written {
        if let (Some(first), Ok(register)) = (data.first(), u8::try_from(offset)) {
            let mut uart = self.lock();
            let effects = uart.write(register, *first);
            self.carry_out(effects);
        }
        Written::Done
    }
}
