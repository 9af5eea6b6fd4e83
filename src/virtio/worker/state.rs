//! What of a worker is saved.

use serde::{Deserialize, Serialize};

use crate::virtio::queue::QueueState;

/// How far a device and its driver have got.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// No driver.
    #[default]
    Idle,
    /// Serving the queues.
    Active,
    /// Waiting to be reset.
    Broken,
}

/// A paused worker with nothing in flight; by default a new one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorkerState {
    /// How far device and driver have got.
    pub phase: Phase,
    /// The live queues, by number; `None` for those that are not served.
    pub queues: Vec<Option<QueueState>>,
}

/// What a worker writes its state into. Control makes it and frees it.
#[derive(Debug)]
pub(in crate::virtio) struct StateBuffer<S> {
    /// Of the message that it came with.
    pub token: u64,
    /// It was filled.
    pub is_filled: bool,
    pub worker: WorkerState,
    pub device: S,
}

impl<S> StateBuffer<S> {
    /// For a device with `queues` queues.
    pub fn new(token: u64, queues: usize, device: S) -> Self {
        StateBuffer {
            token,
            is_filled: false,
            worker: WorkerState {
                phase: Phase::Idle,
                queues: Vec::with_capacity(queues),
            },
            device,
        }
    }
}
