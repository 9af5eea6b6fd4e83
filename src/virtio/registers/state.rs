//! What of the registers is saved, and what they are made of.

#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

use super::{RegisterBlock, Registers, STEPS};
use crate::bus::Tickets;
use crate::virtio::interrupt::STATUS_BITS;
use crate::virtio::queue::QueueLayout;
use crate::virtio::state::StateError;
use crate::virtio::status::{DRIVER_OK, FAILED, FEATURES_OK};
use crate::virtio::{ConfigSpace, feature};

/// A device's registers, interrupt included; by default those of a new device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegistersState {
    /// Status, without NEEDS_RESET.
    #[serde(default)]
    pub status: u32,
    /// NEEDS_RESET.
    #[serde(default)]
    pub needs_reset: bool,
    /// InterruptStatus.
    #[serde(default)]
    pub interrupt_status: u32,
    /// DeviceFeaturesSel.
    #[serde(default)]
    pub device_features_sel: u32,
    /// DriverFeaturesSel.
    #[serde(default)]
    pub driver_features_sel: u32,
    /// What the driver has written to DriverFeatures, all pages together.
    #[serde(default)]
    pub accepted: u64,
    /// QueueSel.
    #[serde(default)]
    pub queue_sel: u32,
    /// The queues as the driver has described them; none of a new device.
    #[serde(default)]
    pub queues: Vec<QueueLayout>,
    /// ConfigGeneration.
    #[serde(default)]
    pub generation: u32,
    /// The configuration space that the driver has seen; empty for a new device.
    #[serde(default, with = "crate::state::hex")]
    pub config: Vec<u8>,
}

impl RegistersState {
    /// What the driver has accepted for good; `None` before that.
    pub fn negotiated(&self) -> Option<u64> {
        (self.status & FEATURES_OK != 0).then_some(self.accepted)
    }

    /// Checks it for a device that offers `offered` and has `queues` queues.
    pub(super) fn check(
        &self,
        offered: u64,
        queues: usize,
        names: impl Fn(u64) -> String,
    ) -> Result<(), StateError> {
        let step = self.status & !FAILED;
        if step != 0 && !STEPS.iter().any(|(_, to)| *to == step) {
            return Err(StateError::Value("status"));
        }
        if self.interrupt_status & !STATUS_BITS != 0 {
            return Err(StateError::Value("interrupt_status"));
        }
        if self.needs_reset && self.status & DRIVER_OK == 0 {
            return Err(StateError::Value("needs_reset"));
        }
        if !self.queues.is_empty() && self.queues.len() != queues {
            return Err(StateError::Value("queues"));
        }
        let Some(accepted) = self.negotiated() else {
            return Ok(());
        };
        let missing = accepted & !offered;
        if missing != 0 {
            return Err(StateError::Features(names(missing)));
        }
        if accepted & feature::VERSION_1 == 0 {
            return Err(StateError::Value("accepted"));
        }
        Ok(())
    }
}

impl RegisterBlock {
    /// The registers of a device whose configuration space is `config`, in a `state` that was
    /// checked; whether `config` is not what the driver has seen.
    pub(super) fn new(
        state: &RegistersState,
        config: ConfigSpace,
        queues: usize,
        tickets: Tickets,
    ) -> (Self, bool) {
        let mut layouts = vec![QueueLayout::default(); queues].into_boxed_slice();
        for (layout, saved) in layouts.iter_mut().zip(&state.queues) {
            *layout = *saved;
        }
        let has_changed = !state.config.is_empty() && state.config != config.bytes;
        let block = RegisterBlock {
            status: state.status,
            resetting: None,
            tickets,
            device_features_sel: state.device_features_sel,
            driver_features_sel: state.driver_features_sel,
            accepted: state.accepted,
            queue_sel: state.queue_sel,
            layouts,
            config,
            generation: state.generation.wrapping_add(u32::from(has_changed)),
        };
        (block, has_changed)
    }
}

impl Registers {
    /// The state to save; `None` while a reset is under way. No vCPU runs, and the worker is paused.
    pub fn save(&self) -> Option<RegistersState> {
        let block = self.lock();
        if block.resetting.is_some() {
            return None;
        }
        Some(RegistersState {
            status: block.status,
            needs_reset: self.interrupt.needs_reset(),
            interrupt_status: self.interrupt.status(),
            device_features_sel: block.device_features_sel,
            driver_features_sel: block.driver_features_sel,
            accepted: block.accepted,
            queue_sel: block.queue_sel,
            queues: block.layouts.to_vec(),
            generation: block.generation,
            config: block.config.bytes.to_vec(),
        })
    }
}
