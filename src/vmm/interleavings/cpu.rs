//! Processors: what KVM_RUN is to the loop of a vCPU, over a thread that is the guest's code.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::world::{Facts, Fault};
use crate::bus::{self, Written};
use crate::sys::kvm::{Exit, InternalError, PortAccess};
use crate::sys::sync::scheduled::{one_in, point, rang, wait_until};
use crate::sys::sync::thread;
use crate::vcpu::testing::{LastExits, Processor, VcpuThread};
use crate::vcpu::{Crash, End};

/// The part of KVM's vCPU that the loop uses, over a thread that is the guest's code.
pub struct Cpu {
    state: Mutex<State>,
    facts: Arc<Facts>,
}

#[derive(Debug, Default)]
struct State {
    /// The vCPU's thread is in KVM_RUN.
    entered: bool,
    /// Guest code is within an operation that no exit and no signal divides.
    in_operation: bool,
    /// What guest code has left for.
    exit: Option<Exit>,
    /// What it has read.
    answer: [u8; 4],
    /// `immediate_exit`.
    flag: bool,
    /// A signal was sent, and its handler has not run.
    signal: bool,
}

/// Why guest code ends: the run is over.
struct Over;

impl Cpu {
    pub fn new(facts: Arc<Facts>) -> Arc<Self> {
        Arc::new(Cpu {
            state: Mutex::new(State::default()),
            facts,
        })
    }

    /// Held for no point, so it is never waited for.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest's next instruction may begin.
    fn enter<R>(&self, mut begin: impl FnMut(&mut State) -> Option<R>) -> R {
        let begun = wait_until(|| {
            if self.facts.is_over() {
                return Some(None);
            }
            let mut state = self.state();
            let may = state.entered && state.exit.is_none();
            may.then(|| begin(&mut state)).flatten().map(Some)
        });
        let Some(begun) = begun else {
            resume_unwind(Box::new(Over));
        };
        assert!(
            !self.facts.is_quiescent(),
            "guest code runs after quiescent"
        );
        begun
    }

    /// Runs guest code; returns when the run is over.
    pub fn execute(code: impl FnOnce()) {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(code))
            && !panic.is::<Over>()
        {
            resume_unwind(panic);
        }
    }

    /// Does something without leaving KVM_RUN.
    pub fn operation<R>(&self, operation: impl FnOnce() -> R) -> R {
        self.enter(|state| {
            state.in_operation = true;
            Some(())
        });
        let result = operation();
        self.state().in_operation = false;
        rang();
        result
    }

    /// Sleeps until `is_woken`, without leaving KVM_RUN.
    pub fn halt(&self, mut is_woken: impl FnMut() -> bool) {
        self.enter(|_| is_woken().then_some(()));
    }

    fn leave(&self, exit: Exit) {
        self.enter(|state| {
            state.exit = Some(exit);
            Some(())
        });
        rang();
    }

    pub fn write(&self, address: u64, value: u32) {
        let mut data = [0; 8];
        data[..4].copy_from_slice(&value.to_le_bytes());
        self.leave(Exit::MemoryWrite {
            address,
            data,
            len: 4,
        });
    }

    pub fn read(&self, address: u64) -> u32 {
        self.leave(Exit::MemoryRead { address, len: 4 });
        self.enter(|state| Some(u32::from_le_bytes(state.answer)))
    }
}

impl Processor for Cpu {
    fn run(&self) -> Result<Exit, i32> {
        point();
        {
            let mut state = self.state();
            state.flag |= std::mem::take(&mut state.signal);
            if state.flag {
                return Err(libc::EINTR);
            }
            state.entered = true;
        }
        rang();
        wait_until(|| {
            let mut state = self.state();
            if state.in_operation {
                return None;
            }
            let left = match state.exit.take() {
                Some(exit) => Ok(exit),
                None if state.signal => Err(libc::EINTR),
                None => return None,
            };
            state.flag |= std::mem::take(&mut state.signal);
            state.entered = false;
            Some(left)
        })
    }

    fn forget_kicks(&self) {
        point();
        let mut state = self.state();
        // The handler runs now, or later.
        if one_in(2) {
            state.signal = false;
        }
        state.flag = false;
    }

    fn leave_at_once(&self) {
        self.state().flag = true;
    }

    fn port_data(&self, _: PortAccess, _: usize) -> [u8; 4] {
        unreachable!("guest code uses no port")
    }

    fn answer_port(&self, _: PortAccess, _: usize, _: &[u8]) {
        unreachable!("guest code uses no port")
    }

    fn answer_memory(&self, data: &[u8]) {
        self.state().answer.copy_from_slice(data);
    }

    fn internal_error(&self) -> InternalError {
        InternalError::default()
    }

    fn crash(&self, end: End, _: LastExits) -> Crash {
        unreachable!("guest code ends its machine: {end:?}")
    }
}

/// The vCPU's thread, for control.
pub struct Thread {
    thread: thread::Thread,
    cpu: Arc<Cpu>,
}

impl Thread {
    pub fn new(thread: thread::Thread, cpu: Arc<Cpu>) -> Self {
        Thread { thread, cpu }
    }

    /// A signal that arrives.
    pub fn signal(&self) {
        self.cpu.state().signal = true;
        rang();
    }
}

impl VcpuThread for Thread {
    fn kick(&self) {
        if self.cpu.facts.fault != Fault::NoKick {
            self.signal();
        }
    }

    fn unpark(&self) {
        self.thread.unpark();
    }
}

/// Where a guest ends its machine.
pub struct Power;

impl bus::Registers for Power {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _: u64, _: &[u8]) -> Written {
        Written::PowerOff
    }
}
