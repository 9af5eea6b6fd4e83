//! Pausing and resuming: vCPUs first, so that no new kick can come, then the devices, which finish
//! what they have begun.
//!
//! Nobody is waited for: vCPUs and devices answer through control's inbox, and clients are
//! answered once everything stands still. A device that hangs in I/O does not keep the guest from
//! being reported paused: after a second the pause is, with a line in the log.

use std::mem;
use std::time::{Duration, Instant};

use super::action::{ActionError, Outcome, Reply};
use super::{State, Vmm};
use crate::metrics::micros_since;
use crate::warn;

/// How long devices may take to finish their I/O before a pause is reported without them.
const PAUSE_PATIENCE: Duration = Duration::from_secs(1);

/// A pause under way.
#[derive(Debug)]
pub(super) struct Pausing {
    since: Instant,
    /// vCPUs that still run guest code, by bit.
    vcpus: u32,
    /// Tokens of devices that still work.
    devices: Vec<u64>,
    clients: Vec<Reply>,
    /// What was asked for since: done in order once everything stands still. A vCPU is told one
    /// thing at a time, so that its answer can only belong to that.
    then: Vec<(Wanted, Reply)>,
    deadline: Instant,
}

/// What a client wants of the vCPUs.
#[derive(Clone, Copy, Debug)]
enum Wanted {
    Pause,
    Resume,
}

impl Pausing {
    /// When the pause is looked at again, answers or not.
    pub(super) fn deadline(&self) -> Instant {
        self.deadline
    }

    /// The device that was told with `token` has finished what it had begun.
    pub(super) fn device_stands(&mut self, token: u64) {
        self.devices.retain(|waiting| *waiting != token);
    }
}

impl Vmm {
    pub(super) fn pause(&mut self, reply: Reply) {
        match mem::replace(&mut self.state, State::Between) {
            State::Running(machine) => {
                let pausing = Pausing {
                    since: Instant::now(),
                    vcpus: machine.pause_vcpus(),
                    devices: Vec::new(),
                    clients: vec![reply],
                    then: Vec::new(),
                    deadline: Instant::now() + PAUSE_PATIENCE,
                };
                self.state = State::Pausing(machine, pausing);
            }
            State::Pausing(machine, mut pausing) => {
                if pausing.then.is_empty() {
                    pausing.clients.push(reply);
                } else {
                    pausing.then.push((Wanted::Pause, reply));
                }
                self.state = State::Pausing(machine, pausing);
            }
            // Pausing what is paused is fine.
            other => {
                self.state = other;
                reply.send(Ok(Outcome::Done));
            }
        }
    }

    pub(super) fn vcpu_paused(&mut self, index: u8) {
        let first_token = self.next_token;
        let State::Pausing(machine, pausing) = &mut self.state else {
            return;
        };
        pausing.vcpus &= !1u32.checked_shl(u32::from(index)).unwrap_or(0);
        if pausing.vcpus != 0 {
            return;
        }
        // No new kick can come: now the devices finish what they have begun.
        pausing.devices = machine.pause_devices(first_token);
        self.next_token = first_token.wrapping_add(machine.devices() as u64);
        self.finish_pause_if_done();
    }

    pub(super) fn finish_pause_if_done(&mut self) {
        match mem::replace(&mut self.state, State::Between) {
            State::Pausing(machine, pausing)
                if pausing.vcpus == 0 && pausing.devices.is_empty() =>
            {
                self.state = State::Paused(machine);
                self.counters.pause_us = micros_since(pausing.since);
                for client in pausing.clients {
                    client.send(Ok(Outcome::Done));
                }
                for (wanted, client) in pausing.then {
                    match wanted {
                        Wanted::Pause => self.pause(client),
                        Wanted::Resume => self.resume(client),
                    }
                }
            }
            other => self.state = other,
        }
    }

    pub(super) fn resume(&mut self, reply: Reply) {
        let token = self.new_token();
        let since = Instant::now();
        match mem::replace(&mut self.state, State::Between) {
            State::Paused(machine) => {
                machine.resume_devices(token);
                let resumed = machine.run_vcpus();
                self.state = State::Running(machine);
                self.counters.resume_us = micros_since(since);
                let resumed = resumed.map(|()| Outcome::Done);
                reply.send(resumed.map_err(|e| ActionError::of(&e)));
            }
            State::Pausing(machine, mut pausing) => {
                pausing.then.push((Wanted::Resume, reply));
                self.state = State::Pausing(machine, pausing);
            }
            // Resuming what runs is fine.
            other => {
                self.state = other;
                reply.send(Ok(Outcome::Done));
            }
        }
    }

    /// Reports a pause whose devices take too long.
    pub(super) fn look_at_pause(&mut self, now: Instant) {
        if let State::Pausing(_, pausing) = &mut self.state
            && pausing.deadline <= now
        {
            if pausing.vcpus == 0 {
                // The guest stands still; a disk that hangs can not change that.
                warn!(
                    "Paused with {} devices still in I/O.",
                    pausing.devices.len()
                );
                pausing.devices.clear();
                self.finish_pause_if_done();
            } else {
                pausing.deadline = now + PAUSE_PATIENCE;
                warn!("vCPUs {:#x} have not paused yet.", pausing.vcpus);
            }
        }
    }
}
