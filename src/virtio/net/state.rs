//! What is saved of a network device.
//!
//! Buffers of the guest that are at hand have been popped and not returned. They are saved by what
//! names them in the rings, and walked again after a restore. Rewinding the queue instead would not do:
//! a chain that cannot be used is returned as soon as it is found, also from behind others that are at
//! hand, and would be returned twice.
//!
//! A frame whose end waits for the guest to bring buffers cannot be read from the tap again. Its
//! beginning lies in the guest's buffers, and so in the saved memory; its end is saved here, at most
//! [`FRAME_MAX`] bytes. It then waits as long as a new one.

#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

use super::receive::{PATIENCE_NANOS, UnfinishedFrame};
use super::{FRAME_MAX, HEADER, Net, QUEUE_SIZE};
use crate::rate_limiter::LimiterState;
use crate::virtio::StateError;

/// What is saved of a network device; by default of a new one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetState {
    /// What the limits have let through to the guest.
    pub rx_limiter: LimiterState,
    /// What the limits have let through from the guest.
    pub tx_limiter: LimiterState,
    /// The receive buffers at hand, by their descriptors, in order.
    #[serde(default)]
    pub held: Vec<u16>,
    /// A frame whose end waits.
    #[serde(default)]
    pub unfinished: UnfinishedState,
    /// Of the first of several pairs: how many of them the driver uses, once it has accepted several.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub pairs: u16,
}

/// A frame whose end waits for buffers; by default there is none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UnfinishedState {
    /// Its length with its header; 0 if there is none.
    pub len: u32,
    /// How much of that is in the buffers at hand.
    pub in_guest: u32,
    /// The rest.
    #[serde(with = "crate::state::hex")]
    pub rest: Vec<u8>,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde passes what it asks about by reference"
)]
fn is_zero(number: &u16) -> bool {
    *number == 0
}

impl NetState {
    pub(super) fn buffer() -> Self {
        NetState {
            held: Vec::with_capacity(QUEUE_SIZE.into()),
            unfinished: UnfinishedState {
                rest: Vec::with_capacity(FRAME_MAX as usize),
                ..UnfinishedState::default()
            },
            ..NetState::default()
        }
    }

    /// Checks what no device could have saved; the unfinished frame.
    pub(super) fn check(&self) -> Result<Option<UnfinishedFrame>, StateError> {
        if self.held.len() > QUEUE_SIZE.into() {
            return Err(StateError::Value("held"));
        }
        let UnfinishedState {
            len,
            in_guest,
            ref rest,
        } = self.unfinished;
        let rest_len = len.checked_sub(in_guest);
        if rest_len.map(|len| len as usize) != Some(rest.len()) {
            return Err(StateError::Value("unfinished"));
        }
        if len == 0 {
            return Ok(None);
        }
        if len <= HEADER || len > FRAME_MAX || rest.is_empty() {
            return Err(StateError::Value("unfinished"));
        }
        Ok(Some(UnfinishedFrame::new(len, in_guest, PATIENCE_NANOS)))
    }
}

impl Net {
    /// Writes the state into `state`, which is a [`NetState::buffer`].
    pub(super) fn save_into(&self, state: &mut NetState) {
        state.pairs = self.saved_pairs();
        state.rx_limiter = self.rx_throttle.save();
        state.tx_limiter = self.tx_throttle.save();
        state.held.clear();
        // Either those of a saved state, not walked yet, or those at hand.
        let held = self.held.iter().copied().chain(self.buffers.heads());
        state.held.extend(held.take(QUEUE_SIZE.into()));
        let (len, in_guest) = match self.unfinished {
            Some(frame) => (frame.len, frame.in_guest),
            None => (0, 0),
        };
        let rest = self.spill.get(..len.saturating_sub(in_guest) as usize);
        state.unfinished.len = len;
        state.unfinished.in_guest = in_guest;
        state.unfinished.rest.clear();
        let rest = rest.unwrap_or_default();
        state.unfinished.rest.extend_from_slice(rest);
    }
}
