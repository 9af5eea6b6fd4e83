use super::*;
use crate::state::state_round_trip;
use vmm_sys_util::eventfd::EFD_NONBLOCK;

fn controller() -> (I8042, EventFd) {
    let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
    let ours = interrupt.try_clone().unwrap();
    let i8042 = I8042::new(&I8042State::default(), interrupt).unwrap();
    (i8042, ours)
}

fn restored(state: I8042State) -> I8042 {
    I8042::new(&state, EventFd::new(EFD_NONBLOCK).unwrap()).unwrap()
}

fn status(i8042: &I8042) -> u8 {
    let mut data = [0];
    i8042.read(COMMAND, &mut data);
    data[0]
}

fn data(i8042: &I8042) -> u8 {
    let mut data = [0];
    i8042.read(DATA, &mut data);
    data[0]
}

fn command(i8042: &I8042, byte: u8) {
    assert!(matches!(i8042.write(COMMAND, &[byte]), Written::Done));
}

fn send(i8042: &I8042, byte: u8) {
    assert!(matches!(i8042.write(DATA, &[byte]), Written::Done));
}

fn read_all(i8042: &I8042) -> Vec<u8> {
    let mut bytes = vec![];
    while status(i8042) & STATUS_OUTPUT_FULL != 0 {
        bytes.push(data(i8042));
    }
    bytes
}

#[test]
fn write_when_reset_is_commanded_resets() {
    let (i8042, _) = controller();
    for byte in [0xfe, 0xf0, 0xfc] {
        let written = i8042.write(COMMAND, &[byte]);
        assert!(matches!(written, Written::MachineReset), "{byte:#x}");
    }
    for byte in [0xff, 0xf1, 0x00, 0xaa] {
        command(&i8042, byte);
    }
    command(&i8042, WRITE_OUTPUT);
    assert!(matches!(i8042.write(DATA, &[0]), Written::MachineReset));
    // Wider accesses count by their first byte.
    let written = i8042.write(COMMAND, &[0xfe, 1, 2, 3]);
    assert!(matches!(written, Written::MachineReset));
}

#[test]
fn ctrl_alt_del_when_read_gives_every_byte_an_interrupt() {
    let (i8042, interrupt) = controller();
    assert_eq!(status(&i8042), STATUS_UNLOCKED | STATUS_SYSTEM);
    i8042.ctrl_alt_del().unwrap();
    for (left, expected) in CTRL_ALT_DEL_SET_2
        .iter()
        .enumerate()
        .rev()
        .zip(CTRL_ALT_DEL_SET_2)
    {
        assert_eq!(interrupt.read().unwrap(), 1, "{}", left.0);
        assert_eq!(data(&i8042), expected);
    }
    assert!(interrupt.read().is_err());
    assert_eq!(status(&i8042) & STATUS_OUTPUT_FULL, 0);
    assert_eq!(data(&i8042), 0);
}

#[test]
fn ctrl_alt_del_when_translated_is_in_set_1() {
    let (i8042, _) = controller();
    command(&i8042, WRITE_CONFIG);
    send(&i8042, CONFIG_TRANSLATE);
    i8042.ctrl_alt_del().unwrap();
    assert_eq!(read_all(&i8042), CTRL_ALT_DEL_SET_1);
}

#[test]
fn ctrl_alt_del_when_guest_does_not_read_is_refused() {
    let (i8042, _) = controller();
    for _ in 0..4 {
        i8042.ctrl_alt_del().unwrap();
    }
    for _ in 0..1000 {
        assert_eq!(i8042.ctrl_alt_del(), Err(KeyboardFull));
    }
    assert_eq!(read_all(&i8042), CTRL_ALT_DEL_SET_2.repeat(4));
    i8042.ctrl_alt_del().unwrap();
}

#[test]
fn ctrl_alt_del_when_interrupts_are_off_comes_when_they_are_on() {
    let (i8042, interrupt) = controller();
    command(&i8042, WRITE_CONFIG);
    send(&i8042, 0);
    i8042.ctrl_alt_del().unwrap();
    assert!(interrupt.read().is_err());
    command(&i8042, WRITE_CONFIG);
    send(&i8042, CONFIG_INTERRUPT);
    assert_eq!(interrupt.read().unwrap(), 1);
    command(&i8042, DISABLE_KEYBOARD);
    assert_eq!(read_all(&i8042), [0_u8; 0]);
    command(&i8042, ENABLE_KEYBOARD);
    assert_eq!(interrupt.read().unwrap(), 1);
    assert_eq!(read_all(&i8042), CTRL_ALT_DEL_SET_2);
}

#[test]
fn commands_when_answered_are_read_before_keys() {
    let (i8042, _) = controller();
    i8042.ctrl_alt_del().unwrap();
    for (byte, answer) in [
        (READ_CONFIG, CONFIG_INTERRUPT | CONFIG_SYSTEM),
        (SELF_TEST, 0x55),
        (TEST_KEYBOARD, 0),
        (TEST_AUX, 1),
        (READ_OUTPUT, 1),
    ] {
        command(&i8042, byte);
        assert_eq!(status(&i8042) & 0x09, 0x09, "{byte:#x}");
        assert_eq!(data(&i8042), answer, "{byte:#x}");
    }
    command(&i8042, WRITE_CONFIG);
    send(&i8042, 0x45);
    assert_eq!(status(&i8042) & STATUS_COMMAND, 0);
    command(&i8042, READ_CONFIG);
    assert_eq!(data(&i8042), 0x45);
    command(&i8042, LOOP_AUX);
    send(&i8042, 0x5a);
    assert_eq!(data(&i8042), 0x5a);
    // To the second interface, which has no device.
    command(&i8042, WRITE_AUX);
    send(&i8042, 0xff);
    assert_eq!(data(&i8042), CTRL_ALT_DEL_SET_2[0]);
}

#[test]
fn keyboard_when_it_gets_commands_answers() {
    let (i8042, interrupt) = controller();
    for (byte, answer) in [
        (0xf2, &[0xfa, 0xab, 0x83][..]),
        (0xff, &[0xfa, 0xaa]),
        (0xed, &[0xfa]),
        (0x02, &[0xfa]),
        (0xee, &[0xee]),
    ] {
        send(&i8042, byte);
        assert!(interrupt.read().is_ok());
        assert_eq!(read_all(&i8042), answer, "{byte:#x}");
    }
}

#[test]
fn state_when_a_controller_is_made_of_it_has_all_that_was_not_read() {
    let (i8042, _) = controller();
    state_round_trip!(i8042, restored);
    i8042.ctrl_alt_del().unwrap();
    data(&i8042);
    command(&i8042, SELF_TEST);
    state_round_trip!(i8042, restored);
    let restored = restored(i8042.save());
    assert_eq!(status(&restored), status(&i8042));
    let mut expected = vec![SELF_TEST_PASSED];
    expected.extend(&CTRL_ALT_DEL_SET_2[1..]);
    assert_eq!(read_all(&restored), expected);
}

#[test]
fn state_when_a_command_waits_for_its_byte_takes_it() {
    let (i8042, _) = controller();
    command(&i8042, WRITE_CONFIG);
    state_round_trip!(i8042, restored);
    let restored = restored(i8042.save());
    send(&restored, 0x45);
    command(&restored, READ_CONFIG);
    assert_eq!(data(&restored), 0x45);
}

#[test]
fn interrupt_when_raised_again_is_so_only_if_the_keyboard_waits_to_be_read() {
    let (i8042, interrupt) = controller();
    i8042.raise_again();
    assert!(interrupt.read().is_err());
    i8042.ctrl_alt_del().unwrap();
    assert_eq!(interrupt.read().unwrap(), 1);
    i8042.raise_again();
    assert_eq!(interrupt.read().unwrap(), 1);
    command(&i8042, DISABLE_KEYBOARD);
    i8042.raise_again();
    assert!(interrupt.read().is_err());
}

#[test]
fn state_when_its_keyboard_holds_more_than_there_is_room_for_is_refused() {
    for (count, fits) in [(QUEUE_MAX, true), (QUEUE_MAX + 1, false)] {
        let state = I8042State {
            keyboard: vec![0xe0; count],
            ..I8042State::default()
        };
        let made = I8042::new(&state, EventFd::new(EFD_NONBLOCK).unwrap());
        assert_eq!(made.is_ok(), fits, "{count}");
    }
    // Whatever command is pending, its byte has an answer.
    for pending in 0..=0xff {
        let state = I8042State {
            pending: Some(pending),
            ..I8042State::default()
        };
        let _ = restored(state).write(DATA, &[0xff]);
    }
}

#[test]
fn accesses_when_odd_have_an_answer() {
    let (i8042, _) = controller();
    for offset in 0..6 {
        for len in [0, 1, 2, 3, 4, 8, 64] {
            let mut data = vec![0xee; len];
            i8042.read(offset, &mut data);
            assert!(data.iter().skip(1).all(|b| *b == 0), "{offset}, {len}");
            let _ = i8042.write(offset, &vec![0; len]);
        }
    }
}
