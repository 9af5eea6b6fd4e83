//! The loop with a device whose units take long: each is announced to the driver at once.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::super::super::queue::{Chain, Popped};
use super::super::super::testing::{Rings, mailbox, ram, start, wait_until};
use super::super::super::{
    BrokenRing, ConfigSpace, Progress, Queue, QueueSet, Ram, Updated, feature,
};
use super::super::*;
use super::EVENT_IDX;
use crate::metrics::Report;

const BASE: u64 = 0x10000;
const DATA: u64 = 0x30000;

/// A disk whose every request waits for the test, and then takes as long as it says.
struct Slow {
    go: Receiver<Duration>,
    chain: Chain,
}

impl Device for Slow {
    plain!();
    const QUEUES: &'static [u16] = &[64];
    const UNITS_MAY_WAIT: bool = true;
    type State = ();

    fn sources(&self) -> Vec<RawFd> {
        Vec::new()
    }

    fn process(&mut self, _: usize, queue: &mut Queue, ram: &Ram) -> Result<Progress, BrokenRing> {
        match queue.pop(ram, &mut self.chain)? {
            Popped::Empty => return Ok(Progress::Wait),
            Popped::Chain => {}
            Popped::Malformed(error) => panic!("{error:?}"),
        }
        if let Ok(time) = self.go.recv() {
            thread::sleep(time);
        }
        queue.add_used(ram, self.chain.head(), 0)?;
        Ok(Progress::More)
    }

    fn backend(&mut self, _: usize) -> QueueSet {
        QueueSet::NONE
    }

    fn update(&mut self, (): ()) -> Updated {
        Updated::default()
    }

    fn state_buffer() {}

    fn save(&self, (): &mut ()) {}

    fn reset(&mut self) {}
}

/// Has `count` requests served, and calls `check` before each is let go.
fn serve(count: u16, features: u64, check: impl Fn(u16, &Rings<'_>, &EventFd, &Sender<Duration>)) {
    let ram = ram();
    let line = EventFd::new(EFD_NONBLOCK).unwrap();
    let (to_replies, _replies) = mailbox();
    let (to_events, _events) = mailbox();
    let (let_go, go) = channel();
    let device = Slow {
        go,
        chain: Chain::new(),
    };
    let irqfd = line.try_clone().unwrap();
    let (registers, worker, handle) = attach(
        device,
        "slow",
        &Start::default(),
        ram.clone(),
        irqfd,
        to_replies,
        to_events,
    )
    .unwrap();
    let thread = thread::spawn(move || worker.run());
    let rings = Rings::new(&ram, BASE, 64);
    for head in 0..count {
        rings.offer_chain(head, &[(DATA, 1, false)]);
    }
    start(&registers, features, &[rings.layout()]);
    for number in 1..=count {
        check(number, &rings, &line, &let_go);
    }
    wait_until("all are returned", || rings.used_index() == count);
    handle.stop().unwrap();
    thread.join().unwrap();
}

#[test]
fn completions_when_each_takes_long_are_announced_one_by_one() {
    for features in [0, EVENT_IDX] {
        serve(32, features, |number, rings, line, let_go| {
            // The driver waits for the next one, as Linux does. No other request goes on before it
            // knows of this one, or the test fails.
            rings.set_used_event(number - 1);
            let_go.send(Duration::from_micros(200)).unwrap();
            wait_until("the interrupt", || line.read().is_ok());
            assert!(rings.used_index() >= number);
        });
    }
}

#[test]
fn completions_when_each_is_fast_are_announced_together() {
    // Thirty-two at once: the worker is asleep before it is let go, and awake until the last.
    let interrupts = std::cell::Cell::new(0);
    serve(32, 0, |number, rings, line, let_go| {
        if number == 32 {
            for _ in 0..32 {
                let_go.send(Duration::ZERO).unwrap();
            }
            wait_until("all are returned", || rings.used_index() == 32);
            wait_until("the interrupt", || {
                interrupts.set(interrupts.get() + line.read().unwrap_or(0));
                interrupts.get() > 0
            });
        }
    });
    // How many depends on how often the host takes the processor away; never one for each.
    assert!((1..32).contains(&interrupts.get()), "{}", interrupts.get());
}
