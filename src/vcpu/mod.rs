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
//! A vCPU knows the buses and nothing of what is on them. It never waits for anything that cannot
//! be interrupted by a message: control sends one, then kicks ([`signal::kick`]) and unparks the
//! thread. It never exits before the process does. When it has paused, the guest's last instruction is
//! finished, so that control may read the registers by a descriptor of its own.
#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

mod crash;
mod end;
mod exits;
mod handle;
mod instruction;
#[cfg(test)]
pub mod testing;
#[cfg(test)]
mod tests;

use std::sync::{Arc, OnceLock};

pub use self::crash::Crash;
use self::crash::LastExits;
pub use self::end::GuestStatus;
pub use self::exits::End;
use self::exits::{Access, Outcome, Processor, Ran, run_once};
use self::handle::VcpuMessages;
pub use self::handle::{UnresponsiveVcpu, VcpuHandle, VcpuLink};
use crate::arch;
use crate::bus::{Bus, Ticket};
use crate::inbox::Outbox;
use crate::metrics::{Counter, TimeSummary, micros_since};
use crate::sys::sync::atomic::{AtomicBool, Ordering};
use crate::sys::sync::mpsc::{Receiver, TryRecvError, sync_channel};
use crate::sys::sync::thread;
use crate::sys::{kvm, signal};
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
    /// No guest code runs on this vCPU until it is told to run, and its registers are whole.
    Paused {
        /// Number of the vCPU.
        index: u8,
    },
    /// No guest code will run on this vCPU again.
    Ended {
        /// Number of the vCPU.
        index: u8,
        /// Why. What else is known, [`VcpuHandle::crash`] tells.
        end: End,
    },
}

/// What a vCPU's thread tells beside its events. On cache lines of its own: each vCPU writes to its.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Shared {
    exits: ExitCounters,
    /// The vCPU is paused in the middle of an instruction. Set before [`VcpuEvent::Paused`] is sent,
    /// which orders it.
    in_access: AtomicBool,
    /// Set before [`VcpuEvent::Ended`] is sent, unless the guest ended by itself.
    crash: OnceLock<Crash>,
}

/// Exits of a vCPU by kind.
#[derive(Debug, Default)]
struct ExitCounters {
    port_reads: TimedCounter,
    port_writes: TimedCounter,
    memory_reads: TimedCounter,
    memory_writes: TimedCounter,
    interruptions: Counter,
    others: Counter,
}

/// Exits of one kind, and how long each took to be answered.
#[derive(Debug, Default)]
struct TimedCounter {
    count: Counter,
    times: TimeSummary,
}

impl ExitCounters {
    fn count(&self, ran: &Ran) {
        let counter = match (&ran.outcome, ran.access) {
            (Outcome::Interrupted | Outcome::NotRun, _) => return self.interruptions.one(),
            (_, Access::None) => return self.others.one(),
            (_, Access::PortRead) => &self.port_reads,
            (_, Access::PortWrite) => &self.port_writes,
            (_, Access::MemoryRead) => &self.memory_reads,
            (_, Access::MemoryWrite) => &self.memory_writes,
        };
        counter.count.one();
        counter.times.observe(micros_since(ran.since));
    }
}

/// A vCPU and everything its thread uses.
#[derive(Debug)]
pub struct Vcpu {
    fd: arch::Vcpu,
    body: VcpuLoop,
}

/// What the thread of a vCPU uses beside the vCPU.
#[derive(Debug)]
struct VcpuLoop {
    index: u8,
    buses: Arc<Buses>,
    messages: Receiver<VcpuMessage>,
    events: Outbox<VcpuEvent>,
    /// A write of the guest's that another thread has yet to complete.
    waiting_for: Option<Ticket>,
    /// The guest has left for an access, which the next KVM_RUN will finish.
    in_access: bool,
    /// Times in a row that KVM_RUN did nothing.
    not_run: u32,
    timeline: Timeline,
    last_exits: LastExits,
    shared: Arc<Shared>,
}

/// How often in a row KVM may refuse to run the first vCPU.
const REFUSALS: u32 = 1000;

/// How many exits the rest of an instruction may take when a vCPU pauses. KVM goes on with a string
/// for up to 1024 of them.
const RUNS_TO_FINISH: u32 = 4096;

/// Messages that may wait for a vCPU: control sends the next after the answer to the last.
const MESSAGES: usize = 8;

impl Vcpu {
    /// Vcpu `index`, its registers already set, to be run on a thread of its own by
    /// [`Vcpu::run`]. The second value becomes a [`VcpuHandle`] with that thread.
    pub fn new(
        index: u8,
        fd: arch::Vcpu,
        buses: Arc<Buses>,
        events: Outbox<VcpuEvent>,
        timeline: Timeline,
    ) -> (Self, VcpuLink) {
        let (body, messages) = VcpuLoop::new(index, buses, events, timeline);
        let access = fd.access();
        (Vcpu { fd, body }, VcpuLink { messages, access })
    }

    /// The body of the thread. Begins paused; returns only if control is gone.
    pub fn run(self) {
        let Vcpu { fd, body } = self;
        // For good: kicks, which may come at any time, write to the page that it shares with KVM.
        let vcpu: &'static arch::Vcpu = Box::leak(Box::new(fd));
        signal::aim_kicks_at(vcpu.immediate_exit());
        let vcpu: &kvm::Vcpu = vcpu;
        body.run(vcpu);
    }
}

impl VcpuLoop {
    /// The loop of vCPU `index`, and where control talks to it.
    fn new(
        index: u8,
        buses: Arc<Buses>,
        events: Outbox<VcpuEvent>,
        timeline: Timeline,
    ) -> (Self, VcpuMessages) {
        let (sender, messages) = sync_channel(MESSAGES);
        let shared = Arc::new(Shared::default());
        let control = VcpuMessages {
            index,
            messages: sender,
            shared: Arc::clone(&shared),
        };
        let body = VcpuLoop {
            index,
            buses,
            messages,
            events,
            waiting_for: None,
            in_access: false,
            not_run: 0,
            timeline,
            last_exits: LastExits::default(),
            shared,
        };
        (body, control)
    }

    /// Runs guest code on `vcpu` as control says; begins paused.
    fn run(mut self, vcpu: &impl Processor) {
        let mut state = Stage::Paused;
        loop {
            state = match state {
                Stage::Paused => self.paused(),
                Stage::Running => self.running(vcpu),
                Stage::Ended => self.ended(),
                Stage::Abandoned => return,
            }
        }
    }

    /// Edges: to running, to abandoned.
    fn paused(&mut self) -> Stage {
        loop {
            match self.messages.recv() {
                Ok(VcpuMessage::Run) => return Stage::Running,
                Ok(VcpuMessage::Pause) => self.tell(VcpuEvent::Paused { index: self.index }),
                Err(_) => return Stage::Abandoned,
            }
        }
    }

    /// Edges: to paused, to ended, to abandoned.
    fn running(&mut self, vcpu: &impl Processor) -> Stage {
        self.timeline.mark(Moment::GuestEntered);
        loop {
            // Cleared before the look at the messages: a kick after it makes KVM_RUN return.
            vcpu.forget_kicks();
            match self.messages.try_recv() {
                Ok(VcpuMessage::Run) | Err(TryRecvError::Empty) => {}
                Ok(VcpuMessage::Pause) => {
                    let end = self.finish_access(vcpu);
                    if let Some(end) = end {
                        self.end(vcpu, end);
                    }
                    self.tell(VcpuEvent::Paused { index: self.index });
                    return match end {
                        Some(_) => Stage::Ended,
                        None => Stage::Paused,
                    };
                }
                Err(TryRecvError::Disconnected) => return Stage::Abandoned,
            }
            if let Some(ticket) = &self.waiting_for {
                if !ticket.is_done() {
                    // Unparked by the thread that completes the ticket, and by control with a message.
                    thread::park();
                    continue;
                }
                self.waiting_for = None;
            }
            if let Some(end) = self.step(vcpu) {
                self.end(vcpu, end);
                return Stage::Ended;
            }
        }
    }

    /// One run of the guest, up to its next exit; why it will not run again, if so.
    fn step(&mut self, vcpu: &impl Processor) -> Option<End> {
        let ran = run_once(vcpu, &self.buses);
        self.shared.exits.count(&ran);
        self.in_access = ran.access != Access::None;
        if self.in_access {
            self.last_exits.push(ran.access, ran.address);
        }
        match self.give_up_if_refused(ran.outcome) {
            Outcome::Continue | Outcome::Interrupted | Outcome::NotRun => None,
            Outcome::Wait(ticket) => {
                self.waiting_for = Some(ticket);
                None
            }
            Outcome::End(end) => Some(end),
        }
    }

    /// Ends the instruction that the guest last left for. KVM does so at the beginning of the next
    /// KVM_RUN: until then the answer to a read is in no register, and the instruction pointer may
    /// be before the instruction. No guest code runs meanwhile. What of the instruction needs another
    /// exit (the next bytes of a string, an access that crosses pages) is answered as ever; a write
    /// among them that waits is the last, and waits on.
    fn finish_access(&mut self, vcpu: &impl Processor) -> Option<End> {
        let mut end = None;
        for _ in 0..RUNS_TO_FINISH {
            if !self.in_access || end.is_some() {
                break;
            }
            vcpu.leave_at_once();
            end = self.step(vcpu);
        }
        self.shared
            .in_access
            .store(self.in_access, Ordering::Relaxed);
        end
    }

    /// The same outcome, but a first vCPU that KVM refuses to run again and again has ended. The
    /// others are refused, each time after a wait, until the guest wakes them.
    fn give_up_if_refused(&mut self, outcome: Outcome) -> Outcome {
        let Outcome::NotRun = outcome else {
            self.not_run = 0;
            return outcome;
        };
        self.not_run = self.not_run.saturating_add(1);
        if self.index == 0 && self.not_run >= REFUSALS {
            return Outcome::End(End::RunFailed(libc::EAGAIN));
        }
        outcome
    }

    /// Tells control that no guest code runs here again, and why.
    fn end(&self, vcpu: &impl Processor, end: End) {
        if !matches!(end, End::Reset | End::PowerOff) {
            // It is set once: a vCPU ends once.
            let _ = self.shared.crash.set(vcpu.crash(end, self.last_exits));
        }
        self.tell(VcpuEvent::Ended {
            index: self.index,
            end,
        });
    }

    /// Answers for a vCPU that does not run again. Edge: to abandoned.
    fn ended(&mut self) -> Stage {
        loop {
            match self.messages.recv() {
                Ok(VcpuMessage::Run) => {}
                Ok(VcpuMessage::Pause) => self.tell(VcpuEvent::Paused { index: self.index }),
                Err(_) => return Stage::Abandoned,
            }
        }
    }

    fn tell(&self, event: VcpuEvent) {
        // Control's inbox has room for an event of every vCPU; if control is gone, so are we.
        let _ = self.events.post(event);
    }
}

enum Stage {
    Paused,
    Running,
    Ended,
    Abandoned,
}
