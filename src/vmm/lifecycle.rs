//! When vCPUs and devices run and when they stand still: a table of stages and inputs, without KVM,
//! threads or clocks. What it asks for, [`super::pausing`] does.
//!
//! ```text
//!              Pause                 the last vCPU            the last device
//!   Running ---------> StoppingVcpus -------------> Draining -----------------> Paused, quiescent
//!      ^                                                |                          ^    |
//!      |                                                '- deadline -> Paused -----'    |
//!      |                                                                 |  the last device
//!      '---------------------------- Resume -----------------------------'--------------'
//! ```
//!
//! A vCPU that does not stop (its thread waits in the kernel, for a page fault handler or a file
//! system that does not answer) makes a pause fail after [`VCPU_PATIENCE`]: who asked is told, the
//! guest counts as running, and the vCPUs go on once the last has stopped.
//!
//! There are two pauses. *Paused* is what clients ask for: no vCPU runs guest code. *Quiescent* is
//! more: no device has anything in flight either, and none writes guest memory from then on. A pause
//! is answered when it is quiescent, or after [`PATIENCE`] without: a disk that hangs does not keep a
//! guest from being paused. The device that hung may answer later, and then it is quiescent.

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::mem;
use std::time::{Duration, Instant};

/// How long devices may take to finish what is in flight before a pause is answered without them.
pub(super) const PATIENCE: Duration = Duration::from_secs(1);

/// How long vCPUs may take to stop before a pause has failed.
pub(super) const VCPU_PATIENCE: Duration = Duration::from_secs(10);

/// What happens. `C` is the way back to a client.
#[derive(Debug)]
pub(super) enum Input<C> {
    /// A client wants the guest paused.
    Pause(C),
    /// A client wants it to go on.
    Resume(C),
    /// This vCPU runs no guest code any more.
    VcpuPaused(u8),
    /// Nothing of this device is in flight any more, after the pause of this number.
    DevicePaused { pause: u64, device: u32 },
    /// Time has passed.
    Tick,
    /// The process is about to end.
    End,
}

/// What is to be done.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Task<C> {
    /// Tell every vCPU to pause.
    PauseVcpus,
    /// Tell every device to pause; its answer comes with the number.
    PauseDevices(u64),
    /// Let devices and vCPUs go on, and tell the client.
    Resume(C),
    /// No vCPU runs any more, and devices have finished or taken too long: see
    /// [`Lifecycle::is_quiescent`].
    Paused { took: Duration },
    /// Tell the client that the guest is paused.
    Answer(C),
    /// Tell the client that the guest cannot be paused, because of these vCPUs.
    Refuse(C, u32),
    /// Let vCPUs go on after a pause that has failed.
    GoOn,
    /// Log that these vCPUs have not answered yet.
    ReportVcpus(u32),
    /// Log that as many devices have not finished; clients are answered nevertheless.
    ReportDevices(u32),
    /// Log that the last of them has now.
    ReportQuiescent(Duration),
}

#[derive(Debug)]
enum Stage {
    Running,
    /// vCPUs have been told to pause; those by bit have not answered.
    StoppingVcpus {
        since: Instant,
        deadline: Instant,
        vcpus: u32,
        /// The pause has failed, and no client wants another so far.
        has_failed: bool,
    },
    /// Devices have been told to pause; those by bit have not answered.
    Draining {
        since: Instant,
        deadline: Instant,
        devices: u32,
    },
    /// Clients have been told. With no bit left, it is quiescent.
    Paused {
        since: Instant,
        devices: u32,
    },
    Ended,
}

/// What a client wants while a pause is under way: done after it, in order. A vCPU is told one
/// thing at a time, so that its answer can only belong to that.
#[derive(Debug)]
enum Wanted<C> {
    Pause(C),
    Resume(C),
}

/// Whether a started machine runs.
#[derive(Debug)]
pub(super) struct Lifecycle<C> {
    /// All vCPUs, and all devices, by bit.
    vcpus: u32,
    devices: u32,
    stage: Stage,
    /// Counts pauses, so that a late answer to one is not taken for an answer to the next.
    pause: u64,
    clients: Vec<C>,
    then: VecDeque<Wanted<C>>,
}

/// As many bits as there are things to wait for.
fn bits(count: usize) -> u32 {
    let count = u32::try_from(count).unwrap_or(u32::MAX);
    1u32.checked_shl(count)
        .map_or(u32::MAX, |bit| bit.wrapping_sub(1))
}

fn without(set: u32, index: u32) -> u32 {
    set & !1u32.checked_shl(index).unwrap_or(0)
}

impl<C> Lifecycle<C> {
    /// A machine that runs, with at most 32 vCPUs and 32 devices.
    pub(super) fn new(vcpus: usize, devices: usize) -> Self {
        Lifecycle {
            vcpus: bits(vcpus),
            devices: bits(devices),
            stage: Stage::Running,
            pause: 0,
            clients: Vec::new(),
            then: VecDeque::new(),
        }
    }

    /// One that stands still, quiescent, and has not run yet.
    pub(super) fn new_paused(vcpus: usize, devices: usize, now: Instant) -> Self {
        Lifecycle {
            stage: Stage::Paused {
                since: now,
                devices: 0,
            },
            ..Lifecycle::new(vcpus, devices)
        }
    }

    /// Whether it runs, or will when all that clients have asked for is done.
    pub(super) fn is_to_run(&self) -> bool {
        match self.stage {
            Stage::Running
            | Stage::StoppingVcpus {
                has_failed: true, ..
            } => true,
            Stage::StoppingVcpus { .. } | Stage::Draining { .. } => {
                matches!(self.then.back(), Some(Wanted::Resume(_)))
            }
            Stage::Paused { .. } | Stage::Ended => false,
        }
    }

    /// Whether clients are told that it is paused.
    pub(super) fn is_paused(&self) -> bool {
        matches!(self.stage, Stage::Paused { .. })
    }

    /// Whether it is paused, nothing is in flight, and no guest memory is written.
    pub(super) fn is_quiescent(&self) -> bool {
        matches!(self.stage, Stage::Paused { devices: 0, .. })
    }

    /// The number of the pause that devices have been told of; none while they are to work.
    pub(super) fn devices_paused_by(&self) -> Option<u64> {
        match self.stage {
            Stage::Draining { .. } | Stage::Paused { .. } => Some(self.pause),
            Stage::Running | Stage::StoppingVcpus { .. } | Stage::Ended => None,
        }
    }

    /// When a [`Input::Tick`] is due.
    pub(super) fn deadline(&self) -> Option<Instant> {
        match self.stage {
            Stage::StoppingVcpus {
                has_failed: true, ..
            } => None,
            Stage::StoppingVcpus { deadline, .. } | Stage::Draining { deadline, .. } => {
                Some(deadline)
            }
            Stage::Running | Stage::Paused { .. } | Stage::Ended => None,
        }
    }

    /// Takes `input`, which comes at `now`; what is to be done, in order.
    pub(super) fn handle(&mut self, input: Input<C>, now: Instant) -> Vec<Task<C>> {
        let mut tasks = Vec::new();
        match input {
            Input::Pause(client) => self.want_pause(client, now, &mut tasks),
            Input::Resume(client) => self.want_resume(client, &mut tasks),
            Input::VcpuPaused(index) => {
                if let Stage::StoppingVcpus { vcpus, .. } = &mut self.stage {
                    *vcpus = without(*vcpus, u32::from(index));
                }
            }
            Input::DevicePaused { pause, device } if pause == self.pause => {
                self.device_paused(device, now, &mut tasks);
            }
            Input::DevicePaused { .. } => {}
            Input::Tick => self.tick(now, &mut tasks),
            Input::End => {
                self.stage = Stage::Ended;
                // Dropped unanswered, clients are told that the microVM is ending.
                self.clients.clear();
                self.then.clear();
            }
        }
        self.advance(now, &mut tasks);
        tasks
    }

    fn want_pause(&mut self, client: C, now: Instant, tasks: &mut Vec<Task<C>>) {
        match &mut self.stage {
            Stage::Running => {
                self.clients.push(client);
                self.stage = Stage::StoppingVcpus {
                    since: now,
                    deadline: now + PATIENCE,
                    vcpus: self.vcpus,
                    has_failed: false,
                };
                tasks.push(Task::PauseVcpus);
            }
            // vCPUs have been told already.
            Stage::StoppingVcpus {
                since,
                deadline,
                has_failed,
                ..
            } if *has_failed => {
                (*since, *deadline, *has_failed) = (now, now + PATIENCE, false);
                self.clients.push(client);
            }
            Stage::StoppingVcpus { .. } | Stage::Draining { .. } if self.then.is_empty() => {
                self.clients.push(client);
            }
            Stage::StoppingVcpus { .. } | Stage::Draining { .. } => {
                self.then.push_back(Wanted::Pause(client));
            }
            Stage::Paused { .. } => tasks.push(Task::Answer(client)),
            Stage::Ended => {}
        }
    }

    fn want_resume(&mut self, client: C, tasks: &mut Vec<Task<C>>) {
        match self.stage {
            // Resuming what runs is fine.
            Stage::Running
            | Stage::StoppingVcpus {
                has_failed: true, ..
            } => tasks.push(Task::Answer(client)),
            Stage::StoppingVcpus { .. } | Stage::Draining { .. } => {
                self.then.push_back(Wanted::Resume(client));
            }
            Stage::Paused { .. } => {
                self.stage = Stage::Running;
                tasks.push(Task::Resume(client));
            }
            Stage::Ended => {}
        }
    }

    fn device_paused(&mut self, device: u32, now: Instant, tasks: &mut Vec<Task<C>>) {
        match &mut self.stage {
            Stage::Draining { devices, .. } => *devices = without(*devices, device),
            Stage::Paused { devices, since } if *devices != 0 => {
                *devices = without(*devices, device);
                if *devices == 0 {
                    let took = now.saturating_duration_since(*since);
                    tasks.push(Task::ReportQuiescent(took));
                }
            }
            _ => {}
        }
    }

    fn tick(&mut self, now: Instant, tasks: &mut Vec<Task<C>>) {
        match &mut self.stage {
            Stage::StoppingVcpus {
                since,
                deadline,
                vcpus,
                has_failed,
            } if *deadline <= now && !*has_failed => {
                *deadline = now + PATIENCE;
                tasks.push(Task::ReportVcpus(*vcpus));
                if now.saturating_duration_since(*since) >= VCPU_PATIENCE {
                    *has_failed = true;
                    let vcpus = *vcpus;
                    self.refuse(vcpus, tasks);
                }
            }
            Stage::Draining {
                deadline,
                devices,
                since,
            } if *deadline <= now && *devices != 0 => {
                let (since, devices) = (*since, *devices);
                tasks.push(Task::ReportDevices(devices.count_ones()));
                self.paused(since, devices, now, tasks);
            }
            _ => {}
        }
    }

    /// Tells the clients of a pause that it has failed, and who wanted something after it.
    fn refuse(&mut self, vcpus: u32, tasks: &mut Vec<Task<C>>) {
        let refuse = |client| Task::Refuse(client, vcpus);
        tasks.extend(self.clients.drain(..).map(refuse));
        tasks.extend(self.then.drain(..).map(|wanted| match wanted {
            Wanted::Pause(client) => Task::Refuse(client, vcpus),
            Wanted::Resume(client) => Task::Answer(client),
        }));
    }

    /// Goes on to the next stage when the last answer has come.
    fn advance(&mut self, now: Instant, tasks: &mut Vec<Task<C>>) {
        if let Stage::StoppingVcpus {
            vcpus: 0,
            has_failed: true,
            ..
        } = self.stage
        {
            self.stage = Stage::Running;
            tasks.push(Task::GoOn);
        }
        if let Stage::StoppingVcpus {
            since,
            deadline,
            vcpus: 0,
            ..
        } = self.stage
        {
            // No new kick can come: now the devices finish what they have begun.
            self.pause = self.pause.wrapping_add(1);
            self.stage = Stage::Draining {
                since,
                deadline,
                devices: self.devices,
            };
            tasks.push(Task::PauseDevices(self.pause));
        }
        if let Stage::Draining {
            since, devices: 0, ..
        } = self.stage
        {
            self.paused(since, 0, now, tasks);
        }
    }

    /// Answers the clients of this pause, then does what was asked for since.
    fn paused(&mut self, since: Instant, devices: u32, now: Instant, tasks: &mut Vec<Task<C>>) {
        self.stage = Stage::Paused { since, devices };
        let took = now.saturating_duration_since(since);
        tasks.push(Task::Paused { took });
        tasks.extend(self.clients.drain(..).map(Task::Answer));
        for wanted in mem::take(&mut self.then) {
            match wanted {
                Wanted::Pause(client) => self.want_pause(client, now, tasks),
                Wanted::Resume(client) => self.want_resume(client, tasks),
            }
        }
    }
}
