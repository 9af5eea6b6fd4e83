//! Tests of the module above.

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

#[test]
fn machine_when_made_paused_is_quiescent_until_it_is_resumed() {
    let clock = Clock::new();
    let mut life = Life::new_paused(2, 2, clock.0);
    assert!(life.is_paused() && life.is_quiescent());
    assert_eq!(life.handle(Input::Pause("a"), clock.0), [Task::Answer("a")]);
    assert_eq!(
        life.handle(Input::Resume("b"), clock.0),
        [Task::Resume("b")]
    );
    assert_eq!(life.handle(Input::Pause("c"), clock.0), [Task::PauseVcpus]);
}

/// What ticks bring until the pause has failed, with `life` told to pause at `clock`'s time.
fn ticks_until_failed(life: &mut Life, clock: &mut Clock) -> Vec<Task<&'static str>> {
    let mut tasks = Vec::new();
    for _ in 0..VCPU_PATIENCE.as_secs() / PATIENCE.as_secs() {
        assert!(!tasks.iter().any(|task| matches!(task, Task::Refuse(..))));
        clock.pass(PATIENCE);
        assert!(life.deadline().unwrap() <= clock.0);
        tasks = life.handle(Input::Tick, clock.0);
    }
    tasks
}

#[test]
fn vcpu_that_does_not_stop_makes_the_pause_fail_and_goes_on_later() {
    let mut clock = Clock::new();
    let mut life = Life::new(2, 1);
    life.handle(Input::Pause("a"), clock.0);
    life.handle(Input::VcpuPaused(0), clock.0);
    life.handle(Input::Resume("b"), clock.0);
    life.handle(Input::Pause("c"), clock.0);
    assert_eq!(
        ticks_until_failed(&mut life, &mut clock),
        [
            Task::ReportVcpus(2),
            Task::Refuse("a", 2),
            Task::Answer("b"),
            Task::Refuse("c", 2)
        ]
    );
    assert!(!life.is_paused() && life.deadline().is_none());
    // It counts as running.
    assert!(life.is_to_run());
    assert_eq!(
        life.handle(Input::Resume("d"), clock.0),
        [Task::Answer("d")]
    );
    assert_eq!(life.handle(Input::VcpuPaused(1), clock.0), [Task::GoOn]);
    // The next pause is one like others.
    assert_eq!(life.handle(Input::Pause("e"), clock.0), [Task::PauseVcpus]);
    life.handle(Input::VcpuPaused(0), clock.0);
    assert_eq!(
        life.handle(Input::VcpuPaused(1), clock.0),
        [Task::PauseDevices(1)]
    );
}

#[test]
fn guest_is_to_run_as_the_last_client_wanted_it() {
    let mut clock = Clock::new();
    let mut life = Life::new(1, 1);
    assert!(life.is_to_run());
    for (input, is_to_run) in [
        (Input::Pause("a"), false),
        (Input::Resume("b"), true),
        (Input::Pause("c"), false),
        (Input::VcpuPaused(0), false),
        (Input::Resume("d"), true),
        (Input::End, false),
    ] {
        let text = format!("{input:?}");
        life.handle(input, clock.0);
        clock.pass(Duration::from_millis(1));
        assert_eq!(life.is_to_run(), is_to_run, "{text}");
    }
}

#[test]
fn pause_after_one_that_has_failed_waits_for_the_same_vcpus() {
    let mut clock = Clock::new();
    let mut life = Life::new(2, 0);
    life.handle(Input::Pause("a"), clock.0);
    life.handle(Input::VcpuPaused(1), clock.0);
    ticks_until_failed(&mut life, &mut clock);
    assert_eq!(life.handle(Input::Pause("b"), clock.0), []);
    clock.pass(Duration::from_millis(5));
    assert_eq!(
        life.handle(Input::VcpuPaused(0), clock.0),
        [
            Task::PauseDevices(1),
            Task::Paused {
                took: Duration::from_millis(5)
            },
            Task::Answer("b")
        ]
    );
    // Once more, and this one fails too.
    let mut life = Life::new(1, 0);
    life.handle(Input::Pause("a"), clock.0);
    ticks_until_failed(&mut life, &mut clock);
    life.handle(Input::Pause("b"), clock.0);
    let tasks = ticks_until_failed(&mut life, &mut clock);
    assert_eq!(tasks, [Task::ReportVcpus(1), Task::Refuse("b", 1)]);
    life.handle(Input::End, clock.0);
    assert_eq!(life.handle(Input::VcpuPaused(0), clock.0), []);
}
