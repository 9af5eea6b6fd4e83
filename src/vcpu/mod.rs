//! The vCPU threads: each owns one vCPU and runs guest code until it is told not to.
//!
//! ```text
//!              Run                      the guest resets, crashes, ...
//!   paused() <------> running() ----------------------------------> ended()
//!              Pause      ^ | a write that waits (virtio reset)
//!                         | v
//!                       waiting inside running(): a message ends the wait, Run takes it up again
//! ```
//!
//! A vCPU knows the buses and nothing of what is on them. It never waits for anything that can
//! not be interrupted by a message: control sends one, then kicks ([`signal::kick`]) and unparks
//! the thread. It never exits before the process does.

mod exits;

use std::error::Error;
use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::thread::{self, JoinHandle};

pub use self::exits::End;
use self::exits::{Outcome, run_once};
use crate::arch;
use crate::bus::{Bus, Ticket};
use crate::inbox::Outbox;
use crate::sys::kvm::RunPage;
use crate::sys::signal;
use crate::timeline::{Moment, Timeline};

/// What a guest can address: built once, shared by all vCPUs, never changed.
#[derive(Debug, Default)]
pub struct Buses {
    /// Memory-mapped registers, by guest physical address.
    pub memory: Bus,
    /// Ports.
    pub ports: Bus,
    /// Where guest memory is: first address and length of each piece, in bytes.
    pub ram: Vec<(u64, u64)>,
}

impl Buses {
    /// Whether `address` is guest memory. The guest leaves for such an address only when the host
    /// can no longer provide it.
    fn is_ram(&self, address: u64) -> bool {
        self.ram
            .iter()
            .any(|(first, len)| address.wrapping_sub(*first) < *len)
    }
}

/// What control tells a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VcpuMessage {
    /// Run guest code.
    Run,
    /// Stop running guest code and say so.
    Pause,
}

/// What a vCPU tells control.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VcpuEvent {
    /// No guest code runs on this vCPU until it is told to run.
    Paused {
        /// Number of the vCPU.
        index: u8,
    },
    /// No guest code will run on this vCPU again.
    Ended {
        /// Number of the vCPU.
        index: u8,
        /// Why.
        end: End,
    },
}

/// A vCPU and everything its thread uses.
#[derive(Debug)]
pub struct Vcpu {
    index: u8,
    // Declared before `fd`, whose mapping it points into: see `RunPage::of`.
    page: RunPage,
    fd: arch::Vcpu,
    buses: Arc<Buses>,
    messages: Receiver<VcpuMessage>,
    events: Outbox<VcpuEvent>,
    /// A write of the guest's that another thread has yet to complete.
    waiting_for: Option<Ticket>,
    timeline: Timeline,
}

/// Control's end of a vCPU.
#[derive(Debug)]
pub struct VcpuHandle {
    index: u8,
    messages: SyncSender<VcpuMessage>,
    thread: JoinHandle<()>,
}

/// A vCPU does not take messages: its thread is gone or does not answer.
#[derive(Debug)]
pub struct Deaf {
    index: u8,
}

impl fmt::Display for Deaf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "The thread of vCPU {} takes no messages", self.index)
    }
}

impl Error for Deaf {}

/// Messages that may wait for a vCPU: control sends the next after the answer to the last.
const MESSAGES: usize = 8;

impl Vcpu {
    /// Vcpu `index`, its registers already set, to be run on a thread of its own by
    /// [`Vcpu::run`]. The second value becomes a [`VcpuHandle`] with that thread.
    pub fn new(
        index: u8,
        mut fd: arch::Vcpu,
        buses: Arc<Buses>,
        events: Outbox<VcpuEvent>,
        timeline: Timeline,
    ) -> (Self, SyncSender<VcpuMessage>) {
        let (sender, messages) = sync_channel(MESSAGES);
        let vcpu = Vcpu {
            index,
            page: RunPage::of(&mut fd),
            fd,
            buses,
            messages,
            events,
            waiting_for: None,
            timeline,
        };
        (vcpu, sender)
    }

    /// The life of the thread. Begins paused; returns only if control is gone.
    pub fn run(mut self) {
        signal::aim_kicks_at(&self.page);
        let mut state = State::Paused;
        loop {
            state = match state {
                State::Paused => self.paused(),
                State::Running => self.running(),
                State::Ended => self.ended(),
                State::Abandoned => return,
            }
        }
    }

    /// Edges: to running, to abandoned.
    fn paused(&mut self) -> State {
        loop {
            match self.messages.recv() {
                Ok(VcpuMessage::Run) => return State::Running,
                Ok(VcpuMessage::Pause) => self.tell(VcpuEvent::Paused { index: self.index }),
                Err(_) => return State::Abandoned,
            }
        }
    }

    /// Edges: to paused, to ended, to abandoned.
    fn running(&mut self) -> State {
        self.timeline.mark(Moment::GuestEntered);
        loop {
            // Cleared before the look at the messages: a kick after it makes KVM_RUN return.
            self.page.set_immediate_exit(false);
            match self.messages.try_recv() {
                Ok(VcpuMessage::Run) | Err(TryRecvError::Empty) => {}
                Ok(VcpuMessage::Pause) => {
                    self.tell(VcpuEvent::Paused { index: self.index });
                    return State::Paused;
                }
                Err(TryRecvError::Disconnected) => return State::Abandoned,
            }
            if let Some(ticket) = &self.waiting_for {
                if !ticket.is_done() {
                    // Unparked by whoever completes the ticket, and by control with a message.
                    thread::park();
                    continue;
                }
                self.waiting_for = None;
            }
            match run_once(&mut self.fd, &self.page, &self.buses) {
                Outcome::Continue | Outcome::Interrupted => {}
                Outcome::Wait(ticket) => self.waiting_for = Some(ticket),
                Outcome::End(end) => {
                    self.tell(VcpuEvent::Ended {
                        index: self.index,
                        end,
                    });
                    return State::Ended;
                }
            }
        }
    }

    /// Answers for a vCPU that does not run again. Edge: to abandoned.
    fn ended(&mut self) -> State {
        loop {
            match self.messages.recv() {
                Ok(VcpuMessage::Run) => {}
                Ok(VcpuMessage::Pause) => self.tell(VcpuEvent::Paused { index: self.index }),
                Err(_) => return State::Abandoned,
            }
        }
    }

    fn tell(&self, event: VcpuEvent) {
        // Control's inbox has room for an event of every vCPU; if control is gone, so are we.
        let _ = self.events.post(event);
    }
}

enum State {
    Paused,
    Running,
    Ended,
    Abandoned,
}

impl VcpuHandle {
    /// A handle of the vCPU that runs on `thread`.
    pub fn new(index: u8, messages: SyncSender<VcpuMessage>, thread: JoinHandle<()>) -> Self {
        VcpuHandle {
            index,
            messages,
            thread,
        }
    }

    /// Lets guest code run.
    ///
    /// # Errors
    /// [`Deaf`] when the thread takes no messages.
    pub fn run(&self) -> Result<(), Deaf> {
        self.send(VcpuMessage::Run)
    }

    /// Asks the vCPU to stop running guest code. It answers with [`VcpuEvent::Paused`].
    ///
    /// # Errors
    /// [`Deaf`] when the thread takes no messages.
    pub fn pause(&self) -> Result<(), Deaf> {
        self.send(VcpuMessage::Pause)?;
        signal::kick(&self.thread);
        self.thread.thread().unpark();
        Ok(())
    }

    fn send(&self, message: VcpuMessage) -> Result<(), Deaf> {
        self.messages
            .try_send(message)
            .map_err(|_| Deaf { index: self.index })
    }
}
