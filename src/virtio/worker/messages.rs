//! What control and a device's worker tell each other.

use std::fmt;
use std::io;
use std::sync::Arc;

use super::state::StateBuffer;
use crate::virtio::{ConfigSpace, Device, Replaced};

/// What control asks of a worker. The number comes back in the answer.
pub(in crate::virtio) enum ControlMsg<D: Device> {
    Pause(u64),
    Resume(u64),
    Update(u64, D::Update),
    /// The state goes into the box, which comes back by a channel of its own.
    Save(u64, Box<StateBuffer<D::State>>),
    #[cfg_attr(
        not(test),
        expect(
            dead_code,
            reason = "only tests end a worker: the process ends with all of them"
        )
    )]
    Stop,
}

/// A worker's answer to control.
#[derive(Debug)]
pub struct WorkerReply {
    /// Whose answer it is: the name given to `attach`.
    pub device: Arc<str>,
    /// Which of the device's workers it is of.
    pub worker: usize,
    /// The number that came with the question.
    pub token: u64,
    /// The answer.
    pub done: Done,
}

/// What a worker has done.
#[derive(Debug)]
pub enum Done {
    /// Nothing is in flight, and no guest memory is written from now on.
    Paused,
    /// Work goes on.
    Resumed,
    /// The state can be taken from the handle.
    Saved,
    /// The state was not saved: the worker is not paused.
    NotSaved,
    /// The update holds. Pass a changed configuration space to `Registers::set_config`; drop what was
    /// replaced.
    Updated {
        /// The configuration space, when it has changed.
        config: Option<ConfigSpace>,
        /// What the device has no more use for.
        replaced: Option<Replaced>,
        /// Why the change was not made, if it was not.
        failed: Option<io::Error>,
    },
}

/// What a worker tells control unasked.
#[derive(Debug)]
pub enum WorkerEvent {
    /// The worker cannot go on, and has ended.
    Failed {
        /// The name given to `attach`.
        device: Arc<str>,
        /// What the host said.
        error: io::Error,
    },
}

impl fmt::Display for WorkerEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let WorkerEvent::Failed { device, error } = self;
        write!(f, "The thread of device `{device}` cannot go on: {error}.")
    }
}
