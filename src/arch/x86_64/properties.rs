//! Chips of the machine that a guest uses in any way: whatever it does, the state is one that a restore takes, and what
//! was restored goes on as the first would have.

use std::sync::Arc;
use std::time::Instant;

use proptest::collection::vec;
use proptest::prelude::*;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::i8042::{I8042, I8042State};
use super::power::{Power, PowerState};
use super::split::Missed;
use super::split::pic::{Pic, PicState};
use super::split::pit::{Pit, PitState, Speaker};
use crate::bus::{Registers, Written};
use crate::properties::hold;

/// An access: offset, what is written if anything is, length.
type Access = (u64, Option<Vec<u8>>, usize);

fn accesses() -> impl Strategy<Value = Vec<Access>> {
    let offset = prop_oneof![0..8u64, any::<u64>()];
    let byte = || {
        prop_oneof![
            any::<u8>(),
            prop_oneof![
                Just(0x60),
                Just(0xd1),
                Just(0xd2),
                Just(0xff),
                Just(0xf2),
                Just(0x11),
                Just(0x36),
                Just(0xc2)
            ]
        ]
    };
    let written = prop::option::of(vec(byte(), 0..4));
    vec((offset, written, 0..5usize), 0..60)
}

/// What an access gives.
fn access(chip: &dyn Registers, (offset, written, len): &Access) -> (Vec<u8>, &'static str) {
    match written {
        Some(bytes) => {
            let what = match chip.write(*offset, bytes) {
                Written::Done => "done",
                Written::After(_) => "after",
                Written::MachineReset => "reset",
                Written::PowerOff => "off",
            };
            (Vec::new(), what)
        }
        None => {
            let mut data = vec![0xee; *len];
            chip.read(*offset, &mut data);
            (data, "read")
        }
    }
}

/// Saves a chip after any accesses, and compares what it and the restored one do after that.
fn goes_on<C: Registers, S: PartialEq + std::fmt::Debug>(
    new: impl Fn(Option<&S>) -> C,
    save: impl Fn(&C) -> S,
) {
    hold((accesses(), accesses()), |(before, after)| {
        let chip = new(None);
        for one in &before {
            access(&chip, one);
        }
        let state = save(&chip);
        let restored = new(Some(&state));
        assert_eq!(save(&restored), state);
        for one in &after {
            assert_eq!(
                access(&chip, one),
                access(&restored, one),
                "{one:?} after {state:?}"
            );
        }
        assert_eq!(save(&restored), save(&chip));
    });
}

#[test]
fn keyboard_controller_when_saved_anywhere_goes_on() {
    let new = |state: Option<&I8042State>| {
        let fresh = I8042State::default();
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let chip = I8042::new(state.unwrap_or(&fresh), line).expect("a state that was saved");
        // As a client does now and then; it may find no room.
        let _ = state.is_none() && chip.ctrl_alt_del().is_ok();
        chip
    };
    goes_on(new, I8042::save);
}

#[test]
fn interrupt_controller_when_saved_anywhere_goes_on() {
    for master in [true, false] {
        // It warns once.
        let missed = Arc::new(Missed::default());
        let new = |state: Option<&PicState>| {
            let fresh = PicState::default();
            let chip = Pic::new(master, state.unwrap_or(&fresh), Arc::clone(&missed));
            chip.expect("a state that was saved")
        };
        goes_on(new, Pic::save);
    }
}

#[test]
fn power_when_saved_anywhere_goes_on() {
    goes_on(
        |state: Option<&PowerState>| Power::new(state.unwrap_or(&PowerState::default())),
        Power::save,
    );
}

/// Its time goes on meanwhile, so only what is saved is compared.
#[test]
fn timer_when_saved_anywhere_is_made_anew_with_the_same_state() {
    hold((accesses(), accesses()), |(timer, speaker)| {
        let began = Instant::now();
        let pit = Arc::new(Pit::new(&PitState::default(), began).unwrap());
        let port = Speaker::new(Arc::clone(&pit));
        for (number, one) in timer.iter().enumerate() {
            access(&*pit, one);
            if let Some(one) = speaker.get(number) {
                access(&port, one);
            }
        }
        let now = Instant::now();
        let state = pit.save(now);
        let restored = Pit::new(&state, now).expect("a state that was saved");
        assert_eq!(restored.save(now), state);
    });
}
