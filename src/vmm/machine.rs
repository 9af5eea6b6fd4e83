//! A built virtual machine: what control holds of it once it exists.

use std::fs::File;
use std::sync::Arc;

use super::action::ActionError;
use super::devices;
use super::opened::ConsoleSocket;
use super::pausing::pause_token;
use crate::arch::Vm;
use crate::arch::i8042::{I8042, KeyboardFull};
use crate::config::{ConfigError, Draft, DriveUpdate, NetworkUpdate};
use crate::inbox::Sender;
use crate::memory::Memory;
use crate::serial::{self, SerialMessage};
use crate::sys::handed::Handed;
use crate::vcpu::{Crash, UnresponsiveVcpu, VcpuHandle};
use crate::virtio::block::Block;
use crate::virtio::net::Net;
use crate::virtio::{ConfigSpace, DeviceControl, DeviceHandle};

/// Handles of everything that makes up a VM. The threads own the things themselves.
#[derive(Debug)]
pub struct Machine {
    /// What was asked for, kept up to date with what PATCH changes.
    pub draft: Box<Draft>,
    /// One for each vCPU, by number.
    pub vcpus: Vec<VcpuHandle>,
    /// One for each drive.
    pub blocks: Vec<DeviceHandle<Block>>,
    /// One for each network interface.
    pub nets: Vec<DeviceHandle<Net>>,
    /// The serial thread.
    pub console: Sender<SerialMessage>,
    /// What it and the UART count.
    pub console_counters: Arc<serial::Counters>,
    /// Its socket stays for as long as the machine does.
    pub _console_socket: Option<Arc<ConsoleSocket>>,
    /// The pipe that the log goes into, to the end: other threads may not write it anywhere else.
    pub _log_writer: File,
    /// Where Ctrl-Alt-Del is pressed.
    pub keyboard: Arc<I8042>,
    /// Kept open: the last one to hold it ends the virtual machine.
    pub _vm: Arc<Vm>,
    /// Kept mapped.
    pub memory: Memory,
}

impl Machine {
    /// Lets every vCPU run.
    ///
    /// # Errors
    /// When a vCPU's thread does not take messages.
    pub fn run_vcpus(&self) -> Result<(), UnresponsiveVcpu> {
        self.vcpus.iter().try_for_each(VcpuHandle::run)
    }

    /// Asks every vCPU to pause.
    pub fn pause_vcpus(&self) {
        for vcpu in &self.vcpus {
            // The inbox has room: a vCPU is told the next thing once it has answered the last.
            let _ = vcpu.pause();
        }
    }

    /// What is known of vCPU `index`, if it could not go on.
    pub fn crash(&self, index: u8) -> Option<&Crash> {
        self.vcpus.get(usize::from(index))?.crash()
    }

    /// How many devices there are.
    pub fn devices(&self) -> usize {
        self.blocks.len().saturating_add(self.nets.len())
    }

    /// Every device, of whichever kind, in the order of their slots.
    fn each(&self) -> impl Iterator<Item = &dyn DeviceControl> {
        let blocks = self
            .blocks
            .iter()
            .map(|device| device as &dyn DeviceControl);
        blocks.chain(self.nets.iter().map(|device| device as &dyn DeviceControl))
    }

    /// Asks every device to pause; the answers come with the tokens of pause number `pause`.
    pub fn pause_devices(&self, pause: u64) {
        for (number, device) in (0..).zip(self.each()) {
            // A device that hangs may have an inbox full of what it was told before: `tell_again`.
            let _ = device.pause(pause_token(pause, number));
        }
    }

    /// Lets every device work again.
    pub fn resume_devices(&self, token: u64) {
        for device in self.each() {
            let _ = device.resume(token);
        }
    }

    /// Tells devices of pause number `pause`, or else to work, that could not take it when they were
    /// told.
    pub fn tell_again(&self, pause: Option<u64>, token: u64) {
        for (number, device) in (0..).zip(self.each()) {
            if device.has_missed() {
                let _ = match pause {
                    Some(pause) => device.pause(pause_token(pause, number)),
                    None => device.resume(token),
                };
            }
        }
    }

    /// Presses Ctrl-Alt-Del on the guest's keyboard.
    ///
    /// # Errors
    /// When the guest has not read what was pressed before.
    pub fn press_ctrl_alt_del(&self) -> Result<(), KeyboardFull> {
        self.keyboard.ctrl_alt_del()
    }

    /// Sends a drive a new disk image, new limits, or both.
    ///
    /// # Errors
    /// No such drive, an image that can not be opened, a device that takes no messages.
    pub fn update_drive(
        &mut self,
        update: &DriveUpdate,
        handed: &mut Handed,
        token: u64,
    ) -> Result<(), ActionError> {
        let sentence = |e: &dyn std::error::Error| ActionError::of(e);
        self.draft
            .check_drive_update(update)
            .map_err(|e| sentence(&e))?;
        let device = devices::block_update(&self.draft, update, handed)?;
        let handle = self
            .blocks
            .iter()
            .find(|handle| *handle.name() == *update.drive_id)
            .ok_or_else(|| ActionError::of(&ConfigError::NoSuchDrive(update.drive_id.clone())))?;
        handle.update(token, device).map_err(|e| sentence(&e))?;
        self.draft.patch_drive(update).map_err(|e| sentence(&e))
    }

    /// Sends a network interface new limits.
    ///
    /// # Errors
    /// No such interface, a device that takes no messages.
    pub fn update_network(
        &mut self,
        update: &NetworkUpdate,
        token: u64,
    ) -> Result<(), ActionError> {
        let sentence = |e: &dyn std::error::Error| ActionError::of(e);
        let handle = self
            .nets
            .iter()
            .find(|handle| *handle.name() == *update.iface_id)
            .ok_or_else(|| ActionError::of(&ConfigError::NoSuchNetwork(update.iface_id.clone())))?;
        handle
            .update(token, devices::net_update(update))
            .map_err(|e| sentence(&e))?;
        self.draft.patch_network(update).map_err(|e| sentence(&e))
    }

    /// Shows the guest's driver a configuration space that an update has changed: of a disk, whose
    /// size may be another now. No other device changes its own.
    pub fn set_device_config(&self, device: &str, config: ConfigSpace) {
        if let Some(handle) = self.blocks.iter().find(|handle| *handle.name() == *device) {
            handle.registers().set_config(config);
        }
    }

    /// Tells the serial thread to write out what is left; whether it will answer.
    pub fn finish_console(&self) -> bool {
        self.console.send(SerialMessage::Finish).is_ok()
    }

    /// What was asked for.
    pub fn draft(&self) -> &Draft {
        &self.draft
    }
}
