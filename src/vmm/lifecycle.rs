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
//! There are two pauses. *Paused* is what clients ask for: no vCPU runs guest code. *Quiescent* is
//! more: no device has anything in flight either, and none writes guest memory from then on. A pause
//! is answered when it is quiescent, or after [`PATIENCE`] without: a disk that hangs does not keep a
//! guest from being paused. The device that hung may answer later, and then it is quiescent.

use std::collections::VecDeque;
use std::mem;
use std::time::{Duration, Instant};

/// How long devices may take to finish what is in flight before a pause is answered without them.
pub(super) const PATIENCE: Duration = Duration::from_secs(1);

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
        match self.stage {
            Stage::Running => {
                self.clients.push(client);
                self.stage = Stage::StoppingVcpus {
                    since: now,
                    deadline: now + PATIENCE,
                    vcpus: self.vcpus,
                };
                tasks.push(Task::PauseVcpus);
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
            Stage::Running => tasks.push(Task::Answer(client)),
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
                deadline, vcpus, ..
            } if *deadline <= now => {
                *deadline = now + PATIENCE;
                tasks.push(Task::ReportVcpus(*vcpus));
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

    /// Goes on to the next stage when the last answer has come.
    fn advance(&mut self, now: Instant, tasks: &mut Vec<Task<C>>) {
        if let Stage::StoppingVcpus {
            since,
            deadline,
            vcpus: 0,
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

#[cfg(test)]
mod tests {
    use super::*;

    type Life = Lifecycle<&'static str>;

    /// A clock that stands still unless it is told to move.
    struct Clock(Instant);

    impl Clock {
        fn new() -> Self {
            Clock(Instant::now())
        }

        fn pass(&mut self, time: Duration) {
            self.0 += time;
        }
    }

    fn device(pause: u64, device: u32) -> Input<&'static str> {
        Input::DevicePaused { pause, device }
    }

    /// Paused, with two vCPUs and two devices, by a pause of number 1.
    fn paused(clock: &Clock) -> Life {
        let mut life = Life::new(2, 2);
        life.handle(Input::Pause("first"), clock.0);
        for event in [
            Input::VcpuPaused(0),
            Input::VcpuPaused(1),
            device(1, 0),
            device(1, 1),
        ] {
            life.handle(event, clock.0);
        }
        assert!(life.is_paused() && life.is_quiescent());
        life
    }

    #[test]
    fn pause_when_all_answer_goes_through_vcpus_then_devices() {
        let mut clock = Clock::new();
        let mut life = Life::new(2, 2);
        assert_eq!(life.handle(Input::Pause("a"), clock.0), [Task::PauseVcpus]);
        assert_eq!(life.deadline(), Some(clock.0 + PATIENCE));
        assert_eq!(life.handle(Input::VcpuPaused(1), clock.0), []);
        assert_eq!(life.devices_paused_by(), None);
        clock.pass(Duration::from_millis(3));
        let tasks = life.handle(Input::VcpuPaused(0), clock.0);
        assert_eq!(tasks, [Task::PauseDevices(1)]);
        assert_eq!(life.devices_paused_by(), Some(1));
        assert_eq!(life.handle(device(1, 1), clock.0), []);
        assert!(!life.is_paused() && !life.is_quiescent());
        clock.pass(Duration::from_millis(4));
        let took = Duration::from_millis(7);
        assert_eq!(
            life.handle(device(1, 0), clock.0),
            [Task::Paused { took }, Task::Answer("a")]
        );
        assert!(life.is_paused() && life.is_quiescent());
        assert_eq!(life.deadline(), None);
        assert_eq!(
            life.handle(Input::Resume("b"), clock.0),
            [Task::Resume("b")]
        );
        assert!(!life.is_paused() && !life.is_quiescent());
    }

    #[test]
    fn pause_when_there_are_no_devices_ends_with_the_last_vcpu() {
        let clock = Clock::new();
        let mut life = Life::new(1, 0);
        life.handle(Input::Pause("a"), clock.0);
        let took = Duration::ZERO;
        assert_eq!(
            life.handle(Input::VcpuPaused(0), clock.0),
            [
                Task::PauseDevices(1),
                Task::Paused { took },
                Task::Answer("a")
            ]
        );
    }

    #[test]
    fn pause_or_resume_when_it_is_so_already_is_answered_at_once() {
        let clock = Clock::new();
        let mut life = paused(&clock);
        assert_eq!(life.handle(Input::Pause("b"), clock.0), [Task::Answer("b")]);
        life.handle(Input::Resume("c"), clock.0);
        assert_eq!(
            life.handle(Input::Resume("d"), clock.0),
            [Task::Answer("d")]
        );
    }

    #[test]
    fn requests_while_a_pause_is_under_way_are_done_after_it_in_order() {
        let clock = Clock::new();
        let mut life = Life::new(1, 1);
        life.handle(Input::Pause("a"), clock.0);
        for (event, why) in [
            (Input::Pause("b"), "joins"),
            (Input::Resume("c"), "waits"),
            (Input::Pause("d"), "comes after the resume"),
            (Input::Resume("e"), "comes last"),
        ] {
            assert_eq!(life.handle(event, clock.0), [], "{why}");
        }
        life.handle(Input::VcpuPaused(0), clock.0);
        let took = Duration::ZERO;
        assert_eq!(
            life.handle(device(1, 0), clock.0),
            [
                Task::Paused { took },
                Task::Answer("a"),
                Task::Answer("b"),
                Task::Resume("c"),
                Task::PauseVcpus,
            ]
        );
        assert!(!life.is_paused());
        life.handle(Input::VcpuPaused(0), clock.0);
        assert_eq!(
            life.handle(device(2, 0), clock.0),
            [Task::Paused { took }, Task::Answer("d"), Task::Resume("e")]
        );
    }

    #[test]
    fn device_that_hangs_leaves_it_paused_and_not_quiescent() {
        let mut clock = Clock::new();
        let mut life = Life::new(1, 2);
        life.handle(Input::Pause("a"), clock.0);
        life.handle(Input::VcpuPaused(0), clock.0);
        life.handle(device(1, 0), clock.0);
        clock.pass(PATIENCE - Duration::from_millis(1));
        assert_eq!(life.handle(Input::Tick, clock.0), []);
        clock.pass(Duration::from_millis(1));
        let took = PATIENCE;
        assert_eq!(
            life.handle(Input::Tick, clock.0),
            [
                Task::ReportDevices(1),
                Task::Paused { took },
                Task::Answer("a")
            ]
        );
        assert!(life.is_paused() && !life.is_quiescent());
        // It answers late: no client is told again, but it is quiescent now.
        clock.pass(PATIENCE);
        let late = Task::ReportQuiescent(PATIENCE * 2);
        assert_eq!(life.handle(device(1, 1), clock.0), [late]);
        assert!(life.is_quiescent());
        assert_eq!(life.handle(device(1, 1), clock.0), []);
    }

    #[test]
    fn answer_of_a_device_to_the_pause_before_does_not_count() {
        let mut clock = Clock::new();
        let mut life = Life::new(1, 1);
        life.handle(Input::Pause("a"), clock.0);
        life.handle(Input::VcpuPaused(0), clock.0);
        clock.pass(PATIENCE);
        life.handle(Input::Tick, clock.0);
        life.handle(Input::Resume("b"), clock.0);
        life.handle(Input::Pause("c"), clock.0);
        assert_eq!(
            life.handle(Input::VcpuPaused(0), clock.0),
            [Task::PauseDevices(2)]
        );
        assert_eq!(life.handle(device(1, 0), clock.0), []);
        assert!(!life.is_paused());
        life.handle(device(2, 0), clock.0);
        assert!(life.is_quiescent());
    }

    #[test]
    fn vcpu_that_is_slow_keeps_clients_waiting_and_is_reported_each_second() {
        let mut clock = Clock::new();
        let mut life = Life::new(3, 1);
        life.handle(Input::Pause("a"), clock.0);
        life.handle(Input::VcpuPaused(1), clock.0);
        for _ in 0..3 {
            clock.pass(PATIENCE);
            assert_eq!(
                life.handle(Input::Tick, clock.0),
                [Task::ReportVcpus(0b101)]
            );
        }
        assert!(!life.is_paused());
        life.handle(Input::VcpuPaused(0), clock.0);
        assert_eq!(
            life.handle(Input::VcpuPaused(2), clock.0),
            [Task::PauseDevices(1)]
        );
    }

    #[test]
    fn events_that_belong_to_no_pause_change_nothing() {
        let clock = Clock::new();
        let mut life = paused(&clock);
        // An update while paused has another number; a vCPU may say twice that it is paused.
        for event in [
            device(0, 0),
            device(7, 1),
            Input::VcpuPaused(0),
            Input::Tick,
        ] {
            assert_eq!(life.handle(event, clock.0), []);
            assert!(life.is_quiescent());
        }
        life.handle(Input::Resume("b"), clock.0);
        for event in [device(1, 0), Input::VcpuPaused(40), Input::Tick] {
            assert_eq!(life.handle(event, clock.0), []);
            assert!(!life.is_paused());
        }
    }

    #[test]
    fn end_while_pausing_drops_every_client_and_nothing_follows() {
        let clock = Clock::new();
        // The clients are counted by the references to them.
        let client = std::rc::Rc::new(());
        let mut life = Lifecycle::new(2, 1);
        life.handle(Input::Pause(client.clone()), clock.0);
        life.handle(Input::Resume(client.clone()), clock.0);
        life.handle(Input::VcpuPaused(0), clock.0);
        // The other vCPU ends: the guest crashed, and the process with it.
        assert_eq!(life.handle(Input::End, clock.0), []);
        assert_eq!(std::rc::Rc::strong_count(&client), 1);
        for event in [
            Input::VcpuPaused(1),
            Input::Pause(client.clone()),
            Input::Resume(client.clone()),
            Input::Tick,
        ] {
            assert_eq!(life.handle(event, clock.0), []);
        }
        assert_eq!(std::rc::Rc::strong_count(&client), 1);
        assert!(!life.is_paused() && life.deadline().is_none());
    }

    #[test]
    fn machine_of_the_largest_size_is_waited_for_to_the_last() {
        let clock = Clock::new();
        let mut life = Life::new(32, 32);
        life.handle(Input::Pause("a"), clock.0);
        for vcpu in 0..31 {
            assert_eq!(life.handle(Input::VcpuPaused(vcpu), clock.0), []);
        }
        assert_eq!(
            life.handle(Input::VcpuPaused(31), clock.0),
            [Task::PauseDevices(1)]
        );
        for number in 0..31 {
            assert_eq!(life.handle(device(1, number), clock.0), []);
        }
        life.handle(device(1, 31), clock.0);
        assert!(life.is_quiescent());
    }
}
