//! A UART that is used in any way.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::properties::hold;

#[derive(Clone, Debug)]
enum Step {
    Read(u8),
    Write(u8, u8),
    Feed(Vec<u8>),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let value = || {
        prop_oneof![
            any::<u8>(),
            prop_oneof![
                Just(0),
                Just(1),
                Just(3),
                Just(7),
                Just(0x0f),
                Just(0x10),
                Just(0x80)
            ]
        ]
    };
    let step = prop_oneof![
        (0..9u8).prop_map(Step::Read),
        (0..9u8, value()).prop_map(|(register, value)| Step::Write(register, value)),
        vec(any::<u8>(), 0..40).prop_map(Step::Feed),
    ];
    vec(step, 0..60)
}

fn take(uart: &mut Uart, step: &Step) -> (u8, usize, Effects) {
    match step {
        Step::Read(register) => {
            let (value, effects) = uart.read(*register);
            (value, 0, effects)
        }
        Step::Write(register, value) => (0, 0, uart.write(*register, *value)),
        Step::Feed(bytes) => {
            let (taken, effects) = uart.feed(bytes);
            (0, taken, effects)
        }
    }
}

/// Whatever a guest does, the state is one that a restore takes; and what was restored goes on as the first would have.
#[test]
fn uart_when_saved_anywhere_goes_on_as_if_it_had_not_been() {
    hold((steps(), steps()), |(before, after)| {
        let mut uart = Uart::new(&UartState::default()).unwrap();
        for step in &before {
            take(&mut uart, step);
        }
        let state = uart.save();
        let mut restored = Uart::new(&state).expect("the state of a UART is one");
        assert_eq!(restored.save(), state);
        for step in &after {
            assert_eq!(
                take(&mut uart, step),
                take(&mut restored, step),
                "{step:?} after {state:?}"
            );
        }
        assert_eq!(restored.save(), uart.save());
    });
}
