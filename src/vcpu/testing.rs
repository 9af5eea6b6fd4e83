//! The loop of a vCPU on a processor of the test's, for the tests of what threads tell each other.

use std::sync::Arc;

pub use super::crash::LastExits;
pub use super::exits::Processor;
use super::handle::VcpuMessages;
pub use super::handle::VcpuThread;
use super::{Buses, UnresponsiveVcpu, VcpuEvent, VcpuLoop, VcpuMessage};
use crate::inbox::Outbox;
use crate::timeline::Timeline;

/// The loop, before it has a thread.
pub struct TestVcpu(VcpuLoop);

/// Control's end of it.
pub struct TestHandle(VcpuMessages);

impl TestVcpu {
    pub fn new(index: u8, buses: Arc<Buses>, events: Outbox<VcpuEvent>) -> (Self, TestHandle) {
        let (body, messages) = VcpuLoop::new(index, buses, events, Timeline::begin());
        (TestVcpu(body), TestHandle(messages))
    }

    /// The body of the thread; returns once the handle is dropped.
    pub fn run(self, processor: &impl Processor) {
        self.0.run(processor);
    }
}

impl TestHandle {
    pub fn run(&self) -> Result<(), UnresponsiveVcpu> {
        self.0.send(VcpuMessage::Run)
    }

    pub fn pause(&self, thread: &impl VcpuThread) -> Result<(), UnresponsiveVcpu> {
        self.0.pause(thread)
    }
}
