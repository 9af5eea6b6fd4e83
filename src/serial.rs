//! The serial console: the UART that vCPUs touch, and the serial thread behind it.
//!
//! ```text
//!   guest --OUT--> SerialPort --ring--> serial thread --> console output, clients of its socket
//!   guest <--IN--- SerialPort <-------- serial thread <-- console input, clients of its socket
//! ```
//!
//! - [`SerialPort`] (`port`) is a 16550 (`uart`) behind one mutex, shared by vCPUs (registers) and
//!   the serial thread (input). Input is taken from its source only while the UART has room for it.
//! - What the guest writes goes into a bounded ring (`ring`). A reader of the console that is slow
//!   or gone costs bytes, which are counted, and never a vCPU's time. The serial thread is woken for
//!   the first byte and for the end of a line, not for each byte (`pace`).
//! - [`Console`] (`console`) is what the serial thread runs.
//! - With a console socket, `clients` keeps the last of the output, which the usual place and the
//!   socket's clients read at their own pace.
//!
//! Output can be limited: what exceeds the limit is dropped and counted.
#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

mod clients;
mod console;
mod input;
mod pace;
mod port;
mod ring;
mod sink;
mod uart;

use std::fs::File;
use std::io;
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use self::clients::Clients;
pub use self::console::Console;
use self::input::Input;
use self::pace::Pace;
pub use self::port::{PORTS, SerialPort};
use self::ring::Ring;
use self::sink::Sink;
use self::uart::Uart;
pub use self::uart::UartState;
#[cfg(any(test, fuzzing))]
pub use self::uart::fuzz;
use crate::inbox::{Inbox, Outbox};
use crate::metrics::{Counter, Report};
use crate::rate_limiter::TokenBucket;

/// What the console counts.
#[derive(Debug, Default)]
pub struct Counters {
    /// Bytes the guest wrote and the ring took; counted under the UART's mutex.
    written: Counter,
    /// Bytes the guest read; counted under the UART's mutex.
    read: Counter,
    /// Bytes the guest wrote while the ring was full; counted under the UART's mutex.
    overrun: Counter,
    /// Bytes that their place did not take; by the serial thread.
    lost: Counter,
    /// Bytes that exceeded the limit; by the serial thread.
    limited: Counter,
    /// Bytes that clients of the socket were too slow for; by the serial thread.
    skipped: Counter,
}

impl Counters {
    /// Writes all of them into `report`.
    pub fn read(&self, report: &mut Report) {
        for (direction, count) in [("output", &self.written), ("input", &self.read)] {
            report.counter(
                "mayfly_console_bytes_total",
                "Bytes that the guest wrote to the console, and read from it.",
                &[("direction", direction)],
                count.get(),
            );
        }
        for (why, count) in [
            ("overrun", &self.overrun),
            ("place", &self.lost),
            ("limit", &self.limited),
            ("client", &self.skipped),
        ] {
            report.counter(
                "mayfly_console_lost_bytes_total",
                "Bytes of console output that came faster than they could be taken (overrun), \
                 that their place did not take, that exceeded the limit, or that a client of the \
                 console socket was too slow for.",
                &[("cause", why)],
                count.get(),
            );
        }
        report.add("uart", "write_count", self.written.get());
        report.add("uart", "read_count", self.read.get());
        report.add("uart", "missed_write_count", self.overrun.get());
        report.add("uart", "error_count", self.lost.get());
        report.add("uart", "rate_limiter_dropped_bytes", self.limited.get());
    }
}

/// Where the console goes to and comes from.
#[derive(Debug)]
pub struct Streams {
    /// Console input; none when the guest gets no input.
    pub input: Option<File>,
    /// Console output.
    pub output: File,
    /// The most output there may be.
    pub limit: Option<TokenBucket>,
    /// Where clients may come to see it, and to type.
    pub socket: Option<UnixListener>,
}

/// What control tells the serial thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SerialMessage {
    /// The guest has ended: write what is left, as far as there is room, and say so.
    Finish,
}

/// What the serial thread tells control.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SerialEvent {
    /// All that could be written is written.
    Finished,
    /// The terminal that is typed at belonged to another job, and is ours again.
    InputIsBack,
}

/// Makes the UART from its state, with interrupts that go to `line`, and the console behind it.
///
/// # Errors
/// When no UART can be in that state, or the host has no descriptor left.
pub fn console(
    uart: &UartState,
    line: EventFd,
    streams: Streams,
    messages: Inbox<SerialMessage>,
    events: Outbox<SerialEvent>,
) -> io::Result<(Arc<SerialPort>, Console)> {
    let uart = Uart::new(uart).map_err(io::Error::other)?;
    let wakeup = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
    let counters = Arc::new(Counters::default());
    let ring = Arc::new(Ring::new());
    let port = Arc::new(SerialPort::new(
        uart,
        line,
        Arc::clone(&ring),
        wakeup.try_clone()?,
        Arc::clone(&counters),
    ));
    let console = Console {
        port: Arc::clone(&port),
        ring,
        wakeup,
        input: Input::new(streams.input),
        output: Sink::new(streams.output),
        pace: Pace::default(),
        limit: streams.limit,
        clients: streams.socket.map(Clients::new),
        messages,
        events,
        counters,
        finishing: false,
        last_patience: console::LAST_PATIENCE,
    };
    Ok((port, console))
}

#[cfg(test)]
mod tests;
