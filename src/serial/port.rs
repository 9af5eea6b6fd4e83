//! The ports of the UART: what vCPUs touch.
//!
//! [`SerialPort`] is a [`Uart`] behind one mutex, shared by the vCPU threads (registers) and the
//! serial thread (input), with what the UART's accesses cause: an interrupt, a byte of output, a
//! wake-up of the serial thread, a count. It never waits for a reader of the console.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::Counters;
use super::ring::{Pushed, Ring};
use super::uart::{Effects, Uart, UartState};
use crate::bus::{Registers, Written};

/// Ports of a 16550.
pub const PORTS: u64 = 8;

/// The UART as the bus has it.
pub struct SerialPort {
    uart: Mutex<Uart>,
    /// The interrupt line.
    interrupt: EventFd,
    /// Output, on its way to the serial thread.
    output: Arc<Ring>,
    /// Written to when the serial thread waits for output, or when the UART has room for input.
    wakeup: EventFd,
    counters: Arc<Counters>,
}

impl SerialPort {
    pub(super) fn new(
        uart: Uart,
        interrupt: EventFd,
        output: Arc<Ring>,
        wakeup: EventFd,
        counters: Arc<Counters>,
    ) -> Self {
        SerialPort {
            uart: Mutex::new(uart),
            interrupt,
            output,
            wakeup,
            counters,
        }
    }

    /// The UART's state. Input may come while it is taken: it is in there, or it is still to come.
    pub fn save(&self) -> UartState {
        self.lock().save()
    }

    /// Raises the interrupt if the UART's line is high. For a restored guest: a pulse from before may
    /// be lost, and no further one comes while the line stays high. To be called when the interrupt
    /// controllers are restored.
    pub fn raise_again(&self) {
        let uart = self.lock();
        if uart.interrupts() {
            let _ = self.interrupt.write(1);
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
        self.access(|uart| uart.feed(input))
    }

    /// One access to the UART, and what it causes.
    fn access<T>(&self, access: impl FnOnce(&mut Uart) -> (T, Effects)) -> T {
        let mut uart = self.lock();
        let (value, effects) = access(&mut uart);
        // The ring takes bytes from one thread at a time, and so do the counters.
        let wakeup = self.count(effects);
        // Not while others would wait for the system calls.
        drop(uart);
        // An eventfd only refuses when it was written to 2^64 - 2 times without a read.
        if effects.interrupt {
            let _ = self.interrupt.write(1);
        }
        if wakeup {
            let _ = self.wakeup.write(1);
        }
        value
    }

    /// Passes output on and counts; whether the serial thread is to be woken.
    fn count(&self, effects: Effects) -> bool {
        if effects.received {
            self.counters.read.one();
        }
        let pushed = effects.sent.map(|byte| self.output.push(byte));
        match pushed {
            None => {}
            Some(Pushed::Lost) => self.counters.overrun.one(),
            Some(Pushed::Kept | Pushed::KeptWake) => self.counters.written.one(),
        }
        effects.room || pushed == Some(Pushed::KeptWake)
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
            *first = self.access(|uart| uart.read(register));
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Written {
        if let (Some(first), Ok(register)) = (data.first(), u8::try_from(offset)) {
            self.access(|uart| ((), uart.write(register, *first)));
        }
        Written::Done
    }
}
