//! What of a device is saved: its registers, its worker and the device itself, each beside the part
//! that is made of it. Control composes them once the worker has answered.
//!
//! A saved state is distrusted like what a guest writes: the part that is made of it refuses what no
//! guest could have brought about, and keeps to its bounds whatever else is in it.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::PerWorker;
use super::registers::RegistersState;
use super::worker::WorkerState;
use super::{BrokenRing, feature};

/// A whole device; by default a new one.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceState<S> {
    /// What vCPUs see of it.
    pub registers: RegistersState,
    /// Its queues.
    pub worker: WorkerState,
    /// What only its kind has.
    pub device: S,
    /// Of a device with several workers: the others.
    #[serde(default = "Vec::new", skip_serializing_if = "Vec::is_empty")]
    pub others: Vec<ShareState<S>>,
}

/// What one of several workers has.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShareState<S> {
    /// Its queues.
    pub worker: WorkerState,
    /// What only its kind of device has.
    pub device: S,
}

/// What registers and worker begin with; by default those of a new device.
#[derive(Debug, Default)]
pub struct Start {
    registers: RegistersState,
    workers: PerWorker<WorkerState>,
    is_saved: bool,
}

impl Start {
    /// As they were saved: paused, until control resumes them.
    pub fn saved(registers: RegistersState, workers: PerWorker<WorkerState>) -> Self {
        Start {
            registers,
            workers,
            is_saved: true,
        }
    }

    pub(super) fn registers(&self) -> &RegistersState {
        &self.registers
    }

    /// What worker number `worker` begins with.
    pub(super) fn worker(&self, worker: usize) -> WorkerState {
        let saved = self.workers.get(worker);
        saved.cloned().unwrap_or_default()
    }

    /// Checks that it is for `workers` workers.
    ///
    /// # Errors
    /// As many were not saved.
    pub(super) fn check(&self, workers: usize) -> Result<(), StateError> {
        match self.is_saved && self.workers.count() != workers {
            true => Err(StateError::Value("others")),
            false => Ok(()),
        }
    }

    /// Whether they were saved.
    pub(super) fn is_saved(&self) -> bool {
        self.is_saved
    }
}

/// Why a device cannot be made of a saved state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StateError {
    /// The driver uses features, of these names, that the device does not have now.
    Features(String),
    /// The disk is read-only now.
    ReadOnly,
    /// What the guest wrote is in an overlay, and this is not it, nor a copy of it.
    OtherOverlay,
    /// The value of this member of the state cannot be.
    Value(&'static str),
    /// This queue cannot be served.
    Ring(usize, BrokenRing),
}

impl fmt::Display for StateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StateError::Features(names) => write!(
                f,
                "its guest uses features that the device does not offer here: {names}; configure it \
                 as it was when it was saved"
            ),
            StateError::ReadOnly => f.write_str(
                "its guest uses a writable disk, and the disk is read-only here; use a writable one",
            ),
            StateError::OtherOverlay => f.write_str(
                "what its guest wrote is in an overlay, of which neither that nor a copy is used here; name it, or a copy \
                 of it as it was when the guest was saved",
            ),
            StateError::Value(member) => {
                write!(f, "its saved state is invalid: the value of `{member}`")
            }
            StateError::Ring(queue, why) => {
                write!(f, "its saved state is invalid: queue {queue}: {why}")
            }
        }
    }
}

impl std::error::Error for StateError {}

/// The names of the bits `features`, by the tables of all devices and of one.
pub(super) fn feature_names(features: u64, table: &[(u64, &str)]) -> String {
    let name = |bit: u64| {
        let mut known = feature::NAMES.iter().chain(table);
        let known = known.find(|(feature, _)| *feature == bit);
        known.map_or_else(
            || format!("bit {}", bit.trailing_zeros()),
            |(_, name)| (*name).to_owned(),
        )
    };
    let bits = (0..u64::BITS).filter_map(|bit| 1u64.checked_shl(bit));
    let names = bits.filter(|bit| features & bit != 0).map(name);
    names.collect::<Vec<_>>().join(", ")
}
