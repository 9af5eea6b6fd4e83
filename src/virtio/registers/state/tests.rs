use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::super::super::share::Division;
use super::super::super::testing::{negotiate, read32, set_queue, write32};
use super::super::{DriverMsg, Offer, driver_messages, reg};
use super::*;
use crate::bus::{Registers as _, Written};
use crate::inbox::{Inbox, inbox};
use crate::state::state_round_trip;
use crate::virtio::Interrupt;

const OFFERED: u64 = feature::COMMON | 0b1010;

/// Registers of a device whose configuration space begins with `config`.
fn registers_of(
    state: &RegistersState,
    config: u8,
) -> Result<(Registers, Inbox<DriverMsg>, EventFd), String> {
    let (sender, inbox) = inbox(driver_messages(2)).unwrap();
    let line = EventFd::new(EFD_NONBLOCK).unwrap();
    let offer = Offer {
        device_id: 2,
        features: OFFERED,
        feature_names: |features| format!("{features:#x}"),
        division: Division::whole(&[256, 64]),
        config: ConfigSpace::new().with(0, &[config]),
    };
    let interrupt = Arc::new(Interrupt::new(line.try_clone().unwrap()));
    let registers =
        Registers::new(offer, state, interrupt, sender.into()).map_err(|e| e.to_string())?;
    Ok((registers, inbox, line))
}

fn make(state: &RegistersState) -> Registers {
    registers_of(state, 1).unwrap().0
}

/// After negotiation, with a queue described, some other values set, and DRIVER_OK.
fn active() -> (Registers, Inbox<DriverMsg>) {
    let (registers, inbox, _) = registers_of(&RegistersState::default(), 1).unwrap();
    assert!(negotiate(&registers, feature::VERSION_1 | 2));
    let layout = QueueLayout {
        size: 64,
        ready: true,
        descriptors: 0x1_0000,
        avail: 0x2_0000,
        used: 0x3_0000,
    };
    set_queue(&registers, 1, &layout);
    write32(&registers, reg::DEVICE_FEATURES_SEL, 1);
    write32(&registers, reg::STATUS, 15);
    (registers, inbox)
}

#[test]
fn registers_when_saved_at_any_step_are_the_same_when_made_anew() {
    let save = |registers: &Registers| registers.save().unwrap();
    let (registers, _inbox, _) = registers_of(&RegistersState::default(), 1).unwrap();
    for status in [0, 1, 3, 0x83] {
        write32(&registers, reg::STATUS, status);
        // Nonsense that is allowed at this moment.
        write32(&registers, reg::DRIVER_FEATURES, u32::MAX);
        write32(&registers, reg::QUEUE_SEL, u32::MAX);
        state_round_trip!(registers, |state| make(&state), save);
        assert_eq!(save(&registers).status, status);
    }
    let (registers, _inbox) = active();
    registers.interrupt().used_buffers();
    state_round_trip!(registers, |state| make(&state), save);
    registers.interrupt().demand_reset();
    state_round_trip!(registers, |state| make(&state), save);
    let again = make(&save(&registers));
    for offset in (0..0x100).step_by(4) {
        assert_eq!(
            read32(&again, offset),
            read32(&registers, offset),
            "{offset:#x}"
        );
    }
}

#[test]
fn save_when_a_reset_is_under_way_is_refused() {
    let (registers, inbox) = active();
    assert!(registers.save().is_some());
    assert!(matches!(inbox.next(), Some(DriverMsg::Queue { .. })));
    assert!(matches!(inbox.next(), Some(DriverMsg::Activate { .. })));
    let Written::After(ticket) = registers.write(reg::STATUS, &[0; 4]) else {
        panic!("no reset");
    };
    assert_eq!(registers.save(), None);
    drop(inbox.next());
    assert!(ticket.is_done());
    let reset = RegistersState {
        config: registers.save().unwrap().config,
        queues: vec![QueueLayout::default(); 2],
        ..RegistersState::default()
    };
    assert_eq!(registers.save(), Some(reset));
}

#[test]
fn driver_when_made_anew_goes_on_where_it_was() {
    let (registers, _inbox) = active();
    let (again, inbox, _) = registers_of(&registers.save().unwrap(), 1).unwrap();
    // The features are frozen, the reset is the worker's, and a new driver starts from nothing.
    write32(&again, reg::DRIVER_FEATURES, 0);
    assert_eq!(again.ignored(), 1);
    assert!(inbox.next().is_none(), "no second activation");
    let Written::After(ticket) = again.write(reg::STATUS, &[0; 4]) else {
        panic!("no reset");
    };
    assert!(matches!(inbox.next(), Some(DriverMsg::Reset(_))));
    assert!(ticket.is_done());
    assert!(negotiate(&again, feature::VERSION_1));
}

#[test]
fn config_when_it_has_changed_is_told_to_a_driver_once_it_goes_on() {
    let (registers, _inbox) = active();
    let saved = registers.save().unwrap();
    let (again, _inbox, line) = registers_of(&saved, 2).unwrap();
    let mut first = [0];
    again.read(reg::CONFIG, &mut first);
    assert_eq!(first, [2]);
    assert_eq!(read32(&again, reg::CONFIG_GENERATION), 1);
    assert_eq!(read32(&again, reg::INTERRUPT_STATUS), 2);
    assert!(line.read().is_err(), "not before it goes on");
    again.interrupt().raise_again();
    assert_eq!(line.read().unwrap(), 1);
    // Without a driver nothing is announced.
    let (new, _inbox, _) = registers_of(&RegistersState::default(), 1).unwrap();
    write32(&new, reg::STATUS, 1);
    let (again, _inbox, line) = registers_of(&new.save().unwrap(), 2).unwrap();
    assert_eq!(read32(&again, reg::CONFIG_GENERATION), 1);
    assert_eq!(read32(&again, reg::INTERRUPT_STATUS), 0);
    again.interrupt().raise_again();
    assert!(line.read().is_err());
}

#[test]
fn state_when_no_guest_could_have_brought_it_about_is_refused() {
    let good = active().0.save().unwrap();
    let with = |change: &dyn Fn(&mut RegistersState)| {
        let mut state = good.clone();
        change(&mut state);
        registers_of(&state, 1).err()
    };
    assert_eq!(with(&|_| {}), None);
    for status in [2, 4, 5, 7, 8, 9, 10, 12, 14, 16, 0x4f, 0x1_000f, u32::MAX] {
        let error = with(&|state| state.status = status).unwrap();
        assert!(error.contains("`status`"), "{status:#x}: {error}");
    }
    for (what, error) in [
        (
            "interrupt_status",
            with(&|state| state.interrupt_status = 4),
        ),
        (
            "needs_reset",
            with(&|state| (state.status, state.needs_reset) = (11, true)),
        ),
        ("queues", with(&|state| state.queues.truncate(1))),
        (
            "queues",
            with(&|state| state.queues.resize(3, QueueLayout::default())),
        ),
        ("accepted", with(&|state| state.accepted = 2)),
    ] {
        let error = error.expect(what);
        assert!(error.contains(&format!("`{what}`")), "{what}: {error}");
    }
    // Before they are accepted, features may be any: the driver writes what it likes.
    assert_eq!(
        with(&|state| (state.status, state.accepted) = (3, u64::MAX)),
        None
    );
    for status in [11, 15] {
        let accepted = feature::VERSION_1 | 0b111;
        let error = with(&|state| (state.status, state.accepted) = (status, accepted));
        let error = error.unwrap();
        assert!(
            error.contains("features that the device does not offer here: 0x5"),
            "{error}"
        );
    }
}
