//! The keyboard controller: any accesses and key presses, from any state.

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{
    COMMAND, CONFIG_INTERRUPT, CONFIG_KEYBOARD_OFF, DATA, I8042, I8042State, QUEUE_MAX,
    STATUS_OUTPUT_FULL, WRITE_OUTPUT,
};
use crate::bus::{Registers, Written};
use crate::fuzz::Input;

/// A controller, new or in a state that a file may say. Checked after each access: the keyboard keeps no
/// more than it may; it is saved and made again as the same; the machine is reset by the two commands
/// for that and nothing else; an interrupt is raised only for a byte that can be read; the status tells
/// of a byte just when there is one; of a wide access all but the first byte is 0.
pub fn i8042(bytes: &[u8]) {
    let input = &mut Input::new(bytes);
    let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
    let state = match input.flag() {
        true => I8042State::default(),
        false => I8042State {
            config: input.u8(),
            pending: input.flag().then(|| input.u8()),
            answer: input.flag().then(|| input.u8()),
            keyboard: {
                let len = input.below(QUEUE_MAX + 3);
                input.bytes(len).to_vec()
            },
            last_was_command: input.flag(),
        },
    };
    let Ok(chip) = I8042::new(&state, interrupt.try_clone().unwrap()) else {
        assert!(state.keyboard.len() > QUEUE_MAX);
        return;
    };
    assert_eq!(chip.save(), state);
    chip.raise_again();
    check(&chip, &interrupt);
    while !input.is_empty() {
        step(&chip, input);
        check(&chip, &interrupt);
    }
}

fn check(chip: &I8042, interrupt: &EventFd) {
    let state = chip.save();
    let can_be_read = state.config & CONFIG_KEYBOARD_OFF == 0 && !state.keyboard.is_empty();
    assert!(state.keyboard.len() <= QUEUE_MAX);
    if interrupt.read().is_ok() {
        assert!(state.config & CONFIG_INTERRUPT != 0 && can_be_read);
    }
    let mut status = [0xee];
    chip.read(COMMAND, &mut status);
    let is_full = status[0] & STATUS_OUTPUT_FULL != 0;
    assert_eq!(is_full, state.answer.is_some() || can_be_read);
    // Looking at the status changes nothing.
    assert_eq!(chip.save(), state);
    let again = I8042::new(&state, interrupt.try_clone().unwrap()).unwrap();
    assert_eq!(again.save(), state);
}

fn step(chip: &I8042, input: &mut Input<'_>) {
    let before = chip.save();
    let port = input.one_of(&[DATA, COMMAND, DATA, COMMAND, 1, 7]);
    match input.below(8) {
        0 => {
            let is_full = chip.ctrl_alt_del().is_err();
            let added = chip.save().keyboard.len() - before.keyboard.len();
            assert_eq!(is_full, added == 0);
        }
        1..=4 => {
            let len = input.one_of(&[1, 1, 1, 2, 4, 8]);
            let data = input.bytes(len);
            let written = chip.write(port, data);
            let resets = data.first().is_some_and(|first| match port {
                COMMAND => *first >= 0xf0 && first & 1 == 0,
                DATA => before.pending == Some(WRITE_OUTPUT) && first & 1 == 0,
                _ => false,
            });
            assert_eq!(matches!(written, Written::MachineReset), resets);
        }
        _ => {
            let len = input.below(9);
            let mut data = [0xee; 8];
            chip.read(port, &mut data[..len]);
            assert!(data[1..len.max(1)].iter().all(|byte| *byte == 0));
            assert!(data[len..].iter().all(|byte| *byte == 0xee));
            if port != DATA || len == 0 {
                assert_eq!(chip.save(), before);
            }
        }
    }
}
