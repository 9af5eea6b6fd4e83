//! An I/O APIC (Intel 82093AA, 290566) in the monitor: a table with one entry for each interrupt
//! line, which says what message a pulse on that line becomes.
//!
//! Owns the table, behind one lock. Runs on the vCPU thread whose guest code reads or writes a
//! register. It never delivers an interrupt: each entry that is not masked becomes an MSI route
//! of KVM's, by which a device's irqfd reaches the local APICs without a way through user space;
//! a masked one has no route, so that its pulses are lost, as the chip's specification has it for
//! edges. Lines are pulses and never stay asserted. So the bits that only the chip sets are
//! always 0: delivery status, and remote IRR, which tells of an asserted line whose interrupt is
//! still being served. An entry for a level makes KVM tell of the end of each interrupt
//! (KVM_EXIT_IOAPIC_EOI), and there is nothing to do then.
//!
//! Work is bounded: KVM is called only when a route changes. A change makes the host's kernel
//! wait for a grace period, work that no guest pays for, so a guest that goes on changing routes
//! is slowed down: it has [`BURST`] changes, and one more each [`PERIOD`], whichever of its vCPUs
//! make them.

use std::error::Error;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::Missed;
use crate::arch::layout::GSI_COUNT;
use crate::bus::{Registers, Written};
use crate::error;
use crate::state::{self, StateError};

/// Bytes of registers.
pub const LENGTH: u64 = 0x100;

/// Lines, and entries of the table.
pub const PINS: usize = GSI_COUNT as usize;

/// Offsets: which register is meant, and its value.
const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;

/// Registers, as they are selected; from [`TABLE`] on two of them are an entry.
const ID: u8 = 0x00;
const VERSION: u8 = 0x01;
const ARBITRATION: u8 = 0x02;
const TABLE: u8 = 0x10;

/// Version 0x11: the one without an EOI register. The number of the last entry is in bits 16 to 23.
const VERSION_11: u32 = 0x11 | ((GSI_COUNT - 1) << 16);

/// Bits 24 to 27 of the ID and arbitration registers.
const ID_SHIFT: u32 = 24;
const ID_MASK: u32 = 0x0f;

/// An entry of the table.
mod entry {
    /// What the guest may write: vector, delivery mode, destination mode, polarity, trigger, mask
    /// and destination.
    pub const WRITABLE: u64 = 0xff00_0000_0001_afff;
    pub const VECTOR: u64 = 0xff;
    pub const DELIVERY_SHIFT: u32 = 8;
    pub const DELIVERY: u64 = 0x7;
    pub const LOGICAL: u64 = 1 << 11;
    pub const LEVEL: u64 = 1 << 15;
    pub const MASKED: u64 = 1 << 16;
    pub const DESTINATION_SHIFT: u32 = 56;
}

/// Message address and data (Intel SDM volume 3, section 11.11).
mod message {
    pub const ADDRESS: u32 = 0xfee0_0000;
    pub const DESTINATION_SHIFT: u32 = 12;
    pub const LOGICAL: u32 = 1 << 2;
    pub const DELIVERY_SHIFT: u32 = 8;
    pub const ASSERT: u32 = 1 << 14;
    pub const LEVEL: u32 = 1 << 15;
}

/// Changes of routes that a guest may make in a row.
const BURST: u32 = 512;
/// How often it may make one more.
const PERIOD: Duration = Duration::from_millis(1);
/// A vCPU waits no longer than this: more than one change of each of 32 vCPUs.
const WAIT_MAX: Duration = Duration::from_millis(64);

/// Lines that only the 8254 pulses: 0, and 2 on machines that swap the two.
const TIMER_PINS: [usize; 2] = [0, 2];

/// What a pulse on a line becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// To whom: bits 0 to 31; the others are 0.
    pub address: u32,
    /// What.
    pub data: u32,
}

/// The messages of all lines; `None` for a line that is masked.
pub type Routes = [Option<Message>; PINS];

/// Where routes go: KVM.
pub trait Router: Send + Sync {
    /// From now on, these are the routes.
    ///
    /// # Errors
    /// The host's.
    fn set(&self, routes: &Routes) -> io::Result<()>;

    /// From now on, what is written to `line` is a pulse on line `gsi`, and what was written before
    /// is one pulse.
    ///
    /// # Errors
    /// The host's.
    fn listen(&self, line: &EventFd, gsi: u32) -> io::Result<()>;
}

/// All there is to know of the chip.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IoApicState {
    /// The ID register, 0 to 15.
    pub id: u8,
    /// Which register is selected.
    pub select: u8,
    /// The table.
    pub entries: [u64; PINS],
}

impl Default for IoApicState {
    /// As after a reset: all lines are masked.
    fn default() -> Self {
        IoApicState {
            id: 0,
            select: 0,
            entries: [entry::MASKED; PINS],
        }
    }
}

/// The chip's registers.
#[derive(Debug)]
pub struct IoApic<R> {
    inner: Mutex<Inner>,
    router: R,
    missed: Arc<Missed>,
}

#[derive(Debug)]
struct Inner {
    state: IoApicState,
    /// What KVM has, unless it refused it.
    routes: Option<Routes>,
    /// Eventfds of lines to which KVM does not listen yet.
    unconnected: [Option<EventFd>; PINS],
    /// Those to which it listens: vCPU threads have no system call to close them with.
    connected: Vec<EventFd>,
    pace: Pace,
    failure_logged: bool,
}

/// Why there is no chip.
#[derive(Debug)]
pub enum IoApicError {
    /// No chip can be in such a state.
    State(StateError),
    /// KVM did not take its routes.
    Routes(io::Error),
}

impl fmt::Display for IoApicError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            IoApicError::State(cause) => cause.fmt(f),
            IoApicError::Routes(_) => f.write_str("KVM_SET_GSI_ROUTING failed"),
        }
    }
}

impl Error for IoApicError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            IoApicError::State(_) => None,
            IoApicError::Routes(cause) => Some(cause),
        }
    }
}

impl<R: Router> IoApic<R> {
    /// A chip in `state`, whose routes `router` has none of yet: it gets those that the state has.
    ///
    /// # Errors
    /// When no chip can be in that state, and the host's.
    pub fn new(state: &IoApicState, router: R, missed: Arc<Missed>) -> Result<Self, IoApicError> {
        state.check().map_err(IoApicError::State)?;
        let routes = state.routes();
        if routes != [None; PINS] {
            router.set(&routes).map_err(IoApicError::Routes)?;
        }
        Ok(IoApic {
            inner: Mutex::new(Inner {
                state: state.clone(),
                routes: Some(routes),
                unconnected: [const { None }; PINS],
                // Allocated here once: each line is connected once.
                connected: Vec::with_capacity(PINS),
                pace: Pace::new(Instant::now()),
                failure_logged: false,
            }),
            router,
            missed,
        })
    }

    /// Its state.
    pub fn save(&self) -> IoApicState {
        self.lock().state.clone()
    }

    /// Makes `line` the eventfd of line `gsi`; KVM listens to it from when the line is not masked.
    ///
    /// # Errors
    /// The host's.
    pub fn connect(&self, line: EventFd, gsi: u32) -> io::Result<()> {
        let mut inner = self.lock();
        let pin = usize::try_from(gsi).unwrap_or(usize::MAX);
        if inner.state.routes().get(pin).is_some_and(Option::is_some) {
            return self.router.listen(&line, gsi);
        }
        match inner.unconnected.get_mut(pin) {
            Some(place) => *place = Some(line),
            None => return Err(io::Error::from_raw_os_error(libc::EINVAL)),
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells KVM what has changed, if anything has. How long the caller is to wait for that.
    fn route(&self, inner: &mut Inner) -> Option<Duration> {
        let routes = inner.state.routes();
        if inner.routes == Some(routes) {
            return None;
        }
        match self.router.set(&routes) {
            Ok(()) => {
                inner.routes = Some(routes);
                self.listen(inner, &routes);
            }
            Err(cause) => {
                // Tried again when the guest writes next.
                inner.routes = None;
                inner.log_failure("KVM_SET_GSI_ROUTING", &cause);
            }
        }
        inner.pace.count(Instant::now())
    }

    /// Lets KVM listen to the lines that have a route now.
    fn listen(&self, inner: &mut Inner, routes: &Routes) {
        for (gsi, route) in (0..).zip(routes) {
            let place = inner.unconnected.get_mut(gsi as usize);
            let Some(line) = place.filter(|_| route.is_some()).and_then(Option::take) else {
                continue;
            };
            if let Err(cause) = self.router.listen(&line, gsi) {
                inner.log_failure("KVM_IRQFD", &cause);
            }
            inner.connected.push(line);
        }
    }
}

impl Inner {
    fn log_failure(&mut self, what: &str, cause: &io::Error) {
        if !self.failure_logged {
            self.failure_logged = true;
            error!("{what} failed: {cause}. Interrupts may not reach the guest.");
        }
    }
}

impl IoApicState {
    fn check(&self) -> Result<(), StateError> {
        const NAME: &str = "I/O APIC";
        state::check_bits(NAME, "id", self.id, ID_MASK)?;
        self.entries.iter().try_for_each(|entry| {
            state::check_bits(NAME, "an entry of the table", *entry, entry::WRITABLE)
        })
    }

    fn read(&self) -> u32 {
        let id = (u32::from(self.id) & ID_MASK) << ID_SHIFT;
        match self.select {
            ID | ARBITRATION => id,
            VERSION => VERSION_11,
            _ => match self.place() {
                Some((pin, shift)) => self
                    .entries
                    .get(pin)
                    .map_or(0, |entry| (entry >> shift) as u32),
                None => 0,
            },
        }
    }

    fn write(&mut self, value: u32) {
        if self.select == ID {
            self.id = ((value >> ID_SHIFT) & ID_MASK) as u8;
            return;
        }
        let Some((pin, shift)) = self.place() else {
            return;
        };
        if let Some(entry) = self.entries.get_mut(pin) {
            let half = u64::from(u32::MAX) << shift;
            *entry = ((*entry & !half) | (u64::from(value) << shift)) & entry::WRITABLE;
        }
    }

    /// The entry that is selected, and which half of it.
    fn place(&self) -> Option<(usize, u32)> {
        let index = usize::from(self.select.checked_sub(TABLE)?);
        let shift = if index.is_multiple_of(2) { 0 } else { 32 };
        Some((index >> 1, shift)).filter(|(pin, _)| *pin < PINS)
    }

    fn routes(&self) -> Routes {
        self.entries.map(message_of)
    }
}

/// The message that `entry` stands for, unless it is masked.
fn message_of(entry: u64) -> Option<Message> {
    if entry & entry::MASKED != 0 {
        return None;
    }
    let flag = |of: u64, bit: u32| if entry & of != 0 { bit } else { 0 };
    let destination = (entry >> entry::DESTINATION_SHIFT) as u32;
    let delivery = ((entry >> entry::DELIVERY_SHIFT) & entry::DELIVERY) as u32;
    Some(Message {
        address: message::ADDRESS
            | (destination << message::DESTINATION_SHIFT)
            | flag(entry::LOGICAL, message::LOGICAL),
        data: (entry & entry::VECTOR) as u32
            | (delivery << message::DELIVERY_SHIFT)
            | flag(entry::LEVEL, message::LEVEL | message::ASSERT),
    })
}

impl<R: Router> Registers for IoApic<R> {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let value = match offset {
            SELECT => self.lock().state.select.into(),
            WINDOW => self.lock().state.read(),
            _ => 0,
        };
        let value = u64::from(value).to_le_bytes();
        data.fill(0);
        data.iter_mut().zip(value).for_each(|(to, from)| *to = from);
    }

    fn write(&self, offset: u64, data: &[u8]) -> Written {
        let mut value = [0; 4];
        value
            .iter_mut()
            .zip(data)
            .for_each(|(to, from)| *to = *from);
        let value = u32::from_le_bytes(value);
        let mut inner = self.lock();
        let mut wait = None;
        match offset {
            SELECT => inner.state.select = (value & 0xff) as u8,
            WINDOW => {
                inner.state.write(value);
                wait = self.route(&mut inner);
            }
            _ => {}
        }
        let timer = TIMER_PINS.iter().any(|pin| {
            let entry = inner.state.entries.get(*pin);
            entry.is_some_and(|entry| entry & entry::MASKED == 0)
        });
        drop(inner);
        if timer {
            self.missed.warn_once("the 8254 timer");
        }
        if let Some(wait) = wait {
            // A message for the vCPU ends it.
            thread::park_timeout(wait);
        }
        Written::Done
    }
}

/// A bucket of [`BURST`] changes that gains one each [`PERIOD`]. A change that finds it empty is
/// made nevertheless, and its vCPU waits until the bucket would have had it: so there are as many
/// at once as vCPUs at most, and no more of them in the long run.
#[derive(Debug)]
struct Pace {
    /// When the bucket is full again.
    full_at: Instant,
}

impl Pace {
    fn new(now: Instant) -> Self {
        Pace { full_at: now }
    }

    /// Counts a change made at `now`; when there were too many, how long to wait.
    fn count(&mut self, now: Instant) -> Option<Duration> {
        let full_at = self.full_at.max(now).checked_add(PERIOD);
        self.full_at = full_at.unwrap_or(now);
        let empty = PERIOD.saturating_mul(BURST);
        let wait = self.full_at.duration_since(now).saturating_sub(empty);
        (!wait.is_zero()).then(|| wait.min(WAIT_MAX))
    }
}

#[cfg(test)]
mod tests;
