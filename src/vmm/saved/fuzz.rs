//! Whole machines out of state files.

use super::SavedMachine;
use crate::arch::i8042::I8042;
use crate::arch::power::Power;
use crate::fuzz::Input;
use crate::serial;
use crate::snapshot::fuzz::{REFUSAL_MAX, state_file};
use crate::state::StateError;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// A state file and the machine in it. Checked: what is read as a machine is written and read again as
/// the same one, in a version that has all of it; each part is refused with a reason, or made and saved
/// as what it was made of.
pub fn state(bytes: &[u8]) {
    let Some((_, raw)) = state_file(&mut Input::new(bytes)) else {
        return;
    };
    let saved: SavedMachine = match raw.parse() {
        Ok(saved) => saved,
        Err(refusal) => return assert!(refusal.to_string().len() < REFUSAL_MAX),
    };
    let text = serde_json::to_vec(&saved).unwrap();
    let again: SavedMachine = serde_json::from_slice(&text).unwrap();
    assert_eq!(again, saved);
    assert_eq!(again.version(), saved.version());
    let state = &saved.state;
    let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
    let refused = |error: StateError| assert!(error.to_string().len() < REFUSAL_MAX);
    match I8042::new(&state.keyboard, interrupt) {
        Ok(chip) => assert_eq!(chip.save(), state.keyboard),
        Err(error) => refused(error),
    }
    if let Err(error) = serial::fuzz::restore(&state.uart) {
        refused(error);
    }
    assert_eq!(Power::new(&state.power).save(), state.power);
    if let Some(chips) = &state.chips {
        crate::arch::split::fuzz::restore(chips);
    }
    for block in &state.devices.drives {
        crate::virtio::block::fuzz::restore(&block.state);
    }
    for net in &state.devices.network_interfaces {
        crate::virtio::net::fuzz::restore(&net.state);
    }
    let vcpus = saved.state.vcpus.len();
    let count = usize::from(saved.config.machine.vcpu_count);
    let has_clock = saved.state.vm.is_some();
    assert_eq!(saved.checked().is_ok(), vcpus == count && has_clock);
}
