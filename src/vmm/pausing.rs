//! Pausing and resuming: does what [`Lifecycle`] decides.
//!
//! Control waits for no thread: vCPUs and devices answer through its inbox, and clients are answered
//! once everything stands still, or once devices have had their time.

use std::time::Instant;

use super::Vmm;
use super::action::{Outcome, Reply};
use super::lifecycle::{Input, Lifecycle, Task, VCPU_PATIENCE};
use super::machine::Machine;
use crate::error::{ActionError, Context};
use crate::metrics::{micros, micros_since};
use crate::virtio::DeviceControl;
use crate::{error, info, warn};

/// In a token: that it belongs to a pause, which one, and to which device. Other tokens count up
/// from 0.
const PAUSE: u64 = 1 << 63;
const DEVICE_BITS: u32 = 8;

/// The token with which device number `device` is told of pause number `pause`.
fn pause_token(pause: u64, device: u32) -> u64 {
    PAUSE | pause.wrapping_shl(DEVICE_BITS) | u64::from(device)
}

/// The pause and the device of a token, if it is one of a pause.
pub(super) fn of_pause_token(token: u64) -> Option<(u64, u32)> {
    let device = token & ((1 << DEVICE_BITS) - 1);
    let device = u32::try_from(device).ok()?;
    (token & PAUSE != 0).then_some(((token & !PAUSE) >> DEVICE_BITS, device))
}

/// Who waits for a pause or a resume.
#[derive(Debug)]
pub(super) enum Waiter {
    /// A client.
    Client(Reply),
    /// A snapshot of a guest that runs ([`super::saving`]).
    Saving,
    /// None: a start, or the end of a snapshot.
    None,
}

/// Why a pause has failed.
fn does_not_stop(vcpus: u32) -> ActionError {
    let vcpus = (0..u32::BITS).filter(|number| vcpus & 1 << number != 0);
    let vcpus: Vec<_> = vcpus.map(|number| number.to_string()).collect();
    ActionError(format!(
        "The guest could not be paused, and runs: vCPU {} has not stopped within {} s. It waits for the \
         host: for a page fault handler, or for the file system of guest memory. Try again when that \
         answers",
        vcpus.join(", "),
        VCPU_PATIENCE.as_secs()
    ))
}

impl Vmm {
    pub(super) fn pause(&mut self, reply: Reply) {
        self.record_working_set();
        self.advance(Input::Pause(Waiter::Client(reply)));
    }

    pub(super) fn resume(&mut self, reply: Reply) {
        self.advance(Input::Resume(Waiter::Client(reply)));
    }

    /// A device has answered what it was told with `token`.
    pub(super) fn device_answered(&mut self, token: u64) {
        if let Some((pause, device)) = of_pause_token(token) {
            self.advance(Input::DevicePaused { pause, device });
        }
    }

    /// Gives a started machine's lifecycle `input`, and does what comes of it.
    pub(super) fn advance(&mut self, input: Input<Waiter>) {
        let Some(lifecycle) = &mut self.lifecycle else {
            return;
        };
        for task in lifecycle.handle(input, Instant::now()) {
            self.perform(task);
        }
    }

    fn perform(&mut self, task: Task<Waiter>) {
        match task {
            Task::PauseVcpus => {
                self.machine.as_ref().map(Machine::pause_vcpus);
            }
            Task::PauseDevices(pause) => {
                pause_devices(self.configuration.devices.running(), pause);
            }
            Task::Resume(waiter) => {
                let since = Instant::now();
                let token = self.new_token();
                resume_devices(self.configuration.devices.running(), token);
                let resumed = self.machine.as_ref().map_or(Ok(()), Machine::resume_vcpus);
                self.counters.resume_us = micros_since(since);
                self.tell_waiter(waiter, resumed.bare());
            }
            Task::GoOn => {
                let resumed = self.machine.as_ref().map_or(Ok(()), Machine::resume_vcpus);
                info!("The vCPUs have stopped after a pause that had failed, and go on.");
                self.tell_waiter(Waiter::None, resumed.bare());
            }
            Task::Refuse(waiter, vcpus) => self.tell_waiter(waiter, Err(does_not_stop(vcpus))),
            Task::Paused { took } => self.counters.pause_us = micros(took),
            Task::Answer(waiter) => self.tell_waiter(waiter, Ok(())),
            Task::ReportVcpus(vcpus) => warn!("vCPUs {vcpus:#x} have not paused yet."),
            Task::ReportDevices(devices) => warn!(
                "Paused, but not quiescent: {devices} devices still have I/O in flight, which may \
                 write guest memory."
            ),
            Task::ReportQuiescent(took) => {
                info!(
                    "Quiescent {} ms after the pause was asked for: no I/O is in flight any more.",
                    took.as_millis()
                );
                self.quiescent_for_saving();
            }
        }
    }

    fn tell_waiter(&mut self, waiter: Waiter, result: Result<(), ActionError>) {
        match (waiter, result) {
            (Waiter::Client(client), result) => client.send(result.map(|()| Outcome::Done)),
            (Waiter::Saving, Ok(())) => self.paused_for_saving(),
            (Waiter::Saving, Err(error)) => self.not_paused_for_saving(error),
            (Waiter::None, Ok(())) => {}
            (Waiter::None, Err(error)) => error!("The guest cannot run: {error}."),
        }
    }

    /// Whether the guest is paused and nothing is in flight.
    pub(super) fn is_quiescent(&self) -> bool {
        self.lifecycle.as_ref().is_some_and(Lifecycle::is_quiescent)
    }

    /// Tells devices again what they could not be told before: one has just answered, and may have
    /// room in its inbox.
    pub(super) fn tell_again(&mut self) {
        let token = self.new_token();
        let Some(lifecycle) = &self.lifecycle else {
            return;
        };
        tell_devices_again(self.configuration.devices.running(), lifecycle, token);
    }
}

/// Tells `devices`, all that there are, of pause number `pause`. One that hangs may have an inbox full of what it
/// was told before: [`tell_devices_again`].
pub(super) fn pause_devices<'a>(devices: impl Iterator<Item = &'a dyn DeviceControl>, pause: u64) {
    for (number, device) in (0..).zip(devices) {
        let _ = device.pause(pause_token(pause, number));
    }
}

/// Tells `devices` to go on.
pub(super) fn resume_devices<'a>(devices: impl Iterator<Item = &'a dyn DeviceControl>, token: u64) {
    for device in devices {
        let _ = device.resume(token);
    }
}

/// Tells those of `devices`, all that there are, what they could not be told before.
pub(super) fn tell_devices_again<'a, C>(
    devices: impl Iterator<Item = &'a dyn DeviceControl>,
    lifecycle: &Lifecycle<C>,
    token: u64,
) {
    for (number, device) in (0..).zip(devices) {
        if device.has_missed() {
            let _ = match lifecycle.devices_paused_by() {
                Some(pause) => device.pause(pause_token(pause, number)),
                None => device.resume(token),
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_when_of_a_pause_tells_which_and_of_what_device() {
        for (pause, device) in [(0, 0), (1, 0), (7, 18), (1 << 40, 255)] {
            let token = pause_token(pause, device);
            assert_eq!(of_pause_token(token), Some((pause, device)));
        }
        for token in [0, 1, 0x1234_5678, (1 << 63) - 1] {
            assert_eq!(of_pause_token(token), None);
        }
    }
}
