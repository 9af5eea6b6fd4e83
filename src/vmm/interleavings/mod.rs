//! What control, workers, registers and vCPUs tell each other, in orders that the host's scheduler may never choose.
//!
//! **What is real.** Inboxes, channels, tickets, parking; registers and interrupt; a worker's loop with its queues,
//! its epoll set and its eventfds; the handle of a device; the loop of a vCPU and the exits it answers;
//! the table of pauses ([`super::lifecycle`]) and what is done about its tasks ([`super::pausing`]'s functions). They
//! run on threads of [`scheduled`], which goes on with any of them at each lock, atomic, message, wake-up and
//! write to guest memory.
//!
//! **What is not.** The thinnest layers that are the kernel's or need KVM:
//! - KVM_RUN is a [`cpu::Cpu`]: guest code is a thread that runs while the vCPU's thread is in it, and leaves for
//!   registers; a kick is a signal that is taken at any time up to the next KVM_RUN.
//! - A wait in epoll or ppoll is one that does not wait, asked again when an eventfd was written to.
//! - The disk is a [`device::Host`]: a thread that writes to guest memory for each request, when it likes, as the
//!   kernel does for io_uring, and only then says so.
//! - Control is [`control::Control`], which does with its parts what `Vmm` does with the same ones: `Vmm` itself cannot
//!   be without a virtual machine.
//! - ioeventfds and irqfds are eventfds that the guest writes to and reads.
//!
//! **What must hold**, whatever the order of activate, reset, pause, resume, save, update and stop:
//! 1. *No lost wake-up*: no order ends with every thread waiting. Each chain that was offered comes back, unless
//!    the device was reset; each reset ends.
//! 2. *No answer twice*: a worker answers each message of control's once; each client is answered once, and none is
//!    left without an answer while control lives.
//! 3. *Nothing after quiescent*: from when the table of pauses says so until the next resume no byte of guest
//!    memory changes, no guest code runs, and a save is done.
//! 4. *A reset is complete when its write returns*: at the guest's next instruction Status is 0, no request is in
//!    flight, and the device writes nothing until it is activated again.
//! 5. *Changes meet nothing in flight*: an update, a reset and a save find no request begun.
//! 6. *No chain twice*: a chain comes back once, and only if it was offered since the last reset.
//! 7. *Saved is what is*: indices of saved queues are those in guest memory, and a device can be made of what was saved.
//! 8. *Stop ends*: each worker returns.
//!
//! Each is an assertion in one of the files, and `faults` plants faults to show that these can fail.

mod control;
mod cpu;
mod device;
mod faults;
mod guest;
mod world;

use crate::sys::sync::scheduled::explore;
use world::{Fault, Shape, World};

#[test]
fn messages_when_one_worker_serves_a_device_keep_what_is_promised_in_any_order() {
    explore(|| World::run(Shape::ONE_WORKER, Fault::None));
}

#[test]
fn messages_when_two_workers_serve_a_device_keep_what_is_promised_in_any_order() {
    explore(|| World::run(Shape::TWO_WORKERS, Fault::None));
}

#[test]
fn messages_when_a_worker_polls_keep_what_is_promised_in_any_order() {
    explore(|| World::run(Shape::POLLING, Fault::None));
}
