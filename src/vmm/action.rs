//! All that the outside can say to control, and all that control answers.
//!
//! The API thread turns a request into an [`Action`] and an [`Outcome`] into a response; it knows
//! nothing else of `vmm`. Guest and device events arrive in the same inbox, as [`Event`](super::Event)s, so one
//! place decides the order of everything that happens to a VM.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

pub use crate::error::ActionError;
use crate::inbox::Outbox;
use crate::sys::passed::Passed;
use crate::wire::config::cpu::CpuConfig;
use crate::wire::config::{
    AnyDevice, AnyUpdate, BootSource, Logger, MachineConfig, MachineConfigUpdate, Metrics, Restore,
    Serial, SnapshotCreate, VmConfig,
};
pub use crate::wire::operations::Question;

/// One request to control.
#[derive(Debug)]
pub enum Action {
    /// A question: answered at once, in every state.
    Ask(Question),
    /// A part of the configuration, or all of it.
    Configure(Part),
    /// `PATCH` of a device
    PatchDevice(AnyUpdate),
    /// `PUT /actions` InstanceStart
    Start,
    /// `PUT /actions` SendCtrlAltDel
    SendCtrlAltDel,
    /// `PUT /actions` FlushMetrics
    FlushMetrics,
    /// `PATCH /vm` Paused
    Pause,
    /// `PATCH /vm` Resumed
    Resume,
    /// `PUT /snapshot/create`
    SnapshotCreate(SnapshotCreate),
    /// `PUT /snapshot/load`, and `PUT /vm` with a snapshot.
    SnapshotLoad(Box<Restore>),
}

/// A part of the configuration.
#[derive(Debug)]
pub enum Part {
    /// `PUT /machine-config`
    Machine(MachineConfig),
    /// `PATCH /machine-config`
    MachineUpdate(MachineConfigUpdate),
    /// `PUT /boot-source`
    BootSource(BootSource),
    /// `PUT` of a device: `/drives/{id}`, `/network-interfaces/{id}`
    Device(AnyDevice),
    /// `PUT /serial`
    Serial(Serial),
    /// `PUT /cpu-config`
    Cpu(CpuConfig),
    /// `PUT /logger`
    Logger(Logger),
    /// `PUT /metrics`
    Metrics(Metrics),
    /// `PUT /vm`: the whole configuration at once, and whether to start it.
    All {
        /// What a config file would hold.
        config: Box<VmConfig>,
        /// Start when all of it was taken.
        start: bool,
    },
}

/// What an [`Action`] came to when it succeeded.
#[derive(Debug, PartialEq)]
pub enum Outcome {
    /// Done; nothing to tell.
    Done,
    /// The answer to [`Question::Instance`].
    Instance(InstanceInfo),
    /// The version of Firecracker's API that this program answers for.
    Version(&'static str),
    /// The answer to [`Question::MachineConfig`].
    MachineConfig(MachineConfig),
    /// The answer to [`Question::VmConfig`].
    VmConfig(Box<VmConfig>),
    /// The answer to [`Question::Metrics`]: Prometheus' text format.
    Metrics(String),
    /// The answer to [`Question::Timeline`]: microseconds since the process began, by name, in
    /// order; what has not happened yet has none.
    Timeline(Vec<(&'static str, Option<u64>)>),
}

/// Who this is and how far it has got.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct InstanceInfo {
    /// The `--id` given on the command line.
    pub id: String,
    /// "Not started", "Running" or "Paused".
    pub state: &'static str,
    /// Version of this program.
    pub vmm_version: &'static str,
    /// Name of the program.
    pub app_name: &'static str,
}

/// What a requester is told.
pub type Answer = Result<Outcome, ActionError>;

/// The way back to the client: answers exactly once, also when it is dropped unanswered.
#[derive(Debug)]
pub struct Reply {
    token: u64,
    to: Option<Outbox<(u64, Answer)>>,
    pending: PendingReplies,
}

/// Answers that control has given and that have not been written to their clients yet. Control
/// looks at it before it ends the process, so that a client whose request made the guest end
/// still hears that it was done.
#[derive(Clone, Debug, Default)]
pub struct PendingReplies(Arc<AtomicUsize>);

impl PendingReplies {
    /// An answer was written, or its client is gone.
    pub fn settle(&self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }

    /// Whether every client has its answer.
    pub fn is_settled(&self) -> bool {
        self.0.load(Ordering::Acquire) == 0
    }

    fn give(&self, to: &Outbox<(u64, Answer)>, token: u64, answer: Answer) {
        self.0.fetch_add(1, Ordering::AcqRel);
        if !to.post((token, answer)) {
            // A requester that is gone no longer wants to know.
            self.settle();
        }
    }
}

impl Reply {
    /// Answers go to `to`, marked with `token`, and are pending until `pending` is told otherwise.
    pub fn new(token: u64, to: Outbox<(u64, Answer)>, pending: PendingReplies) -> Self {
        Reply {
            token,
            to: Some(to),
            pending,
        }
    }

    /// Answers the request.
    pub fn send(mut self, answer: Answer) {
        if let Some(to) = self.to.take() {
            self.pending.give(&to, self.token, answer);
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if let Some(to) = self.to.take() {
            let error = ActionError("The request was given up: the microVM is ending.".into());
            self.pending.give(&to, self.token, Err(error));
        }
    }
}

/// An [`Action`] and the way back.
#[derive(Debug)]
pub struct Command {
    /// What is asked. Boxed: a slot of the inbox stays small.
    pub action: Box<Action>,
    /// The descriptors that came with it; those that are not claimed are closed when it is done.
    pub passed: Passed,
    /// Where the answer goes.
    pub reply: Reply,
}
