//! Faults that are planted, each of which must be found: the checks can fail.

use super::world::{Fault, Shape, World};
use crate::sys::sync::scheduled::finds;

/// Whether some order with `fault` fails, and the message of the first that does.
fn found(shape: Shape, fault: Fault) -> String {
    let found = finds(move || World::run(shape, fault));
    found.unwrap_or_else(|| panic!("{fault:?} is not found"))
}

#[test]
fn request_when_the_device_forgets_it_is_found_in_a_pause_or_a_reset() {
    let message = found(Shape::ONE_WORKER, Fault::ForgottenRequest);
    assert!(message.contains("request in flight"), "{message}");
}

#[test]
fn completion_when_it_does_not_ring_is_found_as_a_lost_wake_up() {
    let message = found(Shape::ONE_WORKER, Fault::SilentHost);
    assert!(message.contains("deadlock"), "{message}");
}

#[test]
fn answer_when_it_comes_twice_is_found() {
    let message = found(Shape::TWO_WORKERS, Fault::SecondAnswer);
    assert!(message.contains("answered twice"), "{message}");
}

#[test]
fn kick_when_it_does_not_reach_the_vcpu_is_found_as_a_lost_wake_up() {
    let message = found(Shape::ONE_WORKER, Fault::NoKick);
    assert!(message.contains("deadlock"), "{message}");
}

#[test]
fn interrupt_when_it_is_lost_is_found_as_a_lost_wake_up() {
    let message = found(Shape::ONE_WORKER, Fault::LostInterrupt);
    assert!(message.contains("deadlock"), "{message}");
}

#[test]
fn write_when_it_is_after_a_pause_is_found() {
    let message = found(Shape::TWO_WORKERS, Fault::LateWrite);
    assert!(message.contains("after quiescent"), "{message}");
}
