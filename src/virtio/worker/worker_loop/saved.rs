//! How a worker begins from a state, and how it is saved.
//!
//! An activation and a restore are one path: [`WorkerLoop::serve`] takes the states of queues, which are
//! fresh ones for an activation, and applies the same checks to both.

use std::fmt;
use std::io;

use super::super::messages::Done;
use super::super::state::{Phase, StateBuffer, WorkerState};
use super::WorkerLoop;
use crate::guest_warn;
use crate::sys::io::ErrorText;
use crate::virtio::queue::QueueState;
use crate::virtio::{BrokenRing, Device, Queue, QueueSet, StateError};

impl<D: Device> WorkerLoop<D> {
    /// Goes on from `state`, whose driver has accepted `features`. With `is_saved`, once it is resumed.
    ///
    /// # Errors
    /// When `state` cannot be, or the host refuses what the driver has chosen.
    pub(in crate::virtio::worker) fn begin(
        &mut self,
        state: &WorkerState,
        features: u64,
        is_saved: bool,
    ) -> io::Result<()> {
        let invalid = |member| io::Error::other(StateError::Value(member));
        if !state.queues.is_empty() && state.queues.len() != self.queues.len() {
            return Err(invalid("queues"));
        }
        self.paused = is_saved;
        self.is_restored = is_saved;
        if state.phase == Phase::Active {
            let queues = state.queues.iter().copied();
            self.serve(features, queues).map_err(|why| match why {
                Unserved::Ring(index, why) => io::Error::other(StateError::Ring(index, why)),
                Unserved::Host(error) => error,
            })?;
        } else if state.queues.iter().any(Option::is_some) {
            return Err(invalid("queues"));
        } else {
            self.device.reset();
            self.phase = state.phase;
        }
        Ok(())
    }

    /// The first resume of a worker that was made of a saved state. Kicks and pulses of the line that were
    /// under way are lost: each queue is looked into, and the driver is interrupted for all that it may
    /// not have noticed.
    pub(super) fn continue_restored(&mut self) {
        self.runnable = QueueSet::ALL;
        for queue in self.queues.iter_mut().flatten() {
            queue.announce_again();
        }
        self.interrupt.raise_again();
        self.device.was_restored();
    }

    /// Writes the state into `buffer`, which goes back to control in any case.
    pub(super) fn save(&mut self, token: u64, mut buffer: Box<StateBuffer<D::State>>) {
        buffer.is_filled = self.paused && self.device.in_flight() == 0 && self.settle();
        let done = if buffer.is_filled {
            self.break_with_others();
            if self.phase != Phase::Active {
                // What it may still have of a ring that broke.
                self.device.reset();
            }
            let queues = self.queues.iter();
            let queues = queues.map(|queue| queue.as_ref().map(Queue::save));
            buffer.worker.phase = self.phase;
            buffer.worker.queues.clear();
            buffer.worker.queues.extend(queues);
            self.device.save(&mut buffer.device);
            Done::Saved
        } else {
            Done::NotSaved
        };
        // There is a place for each message.
        let _ = self.saved.try_send(buffer);
        self.reply(token, done);
    }

    fn settle(&mut self) -> bool {
        let settled = self.device.settle();
        if let Err(error) = &settled {
            guest_warn!("the device cannot be saved: {}", ErrorText(error));
        }
        settled.is_ok()
    }

    /// Serves queues in these states from now on.
    ///
    /// # Errors
    /// When a queue is impossible, or the host refuses what the driver asks for.
    pub(super) fn serve(
        &mut self,
        features: u64,
        states: impl Iterator<Item = Option<QueueState>>,
    ) -> Result<(), Unserved> {
        self.phase = Phase::Active;
        self.runnable = QueueSet::ALL;
        self.empty = QueueSet::NONE;
        let slots = self.queues.iter_mut().zip(self.share.sizes()).enumerate();
        for ((index, (slot, max_size)), state) in slots.zip(states) {
            *slot = match state {
                Some(state) => {
                    let queue = Queue::new(&state, max_size, features, &self.ram);
                    Some(queue.map_err(|why| Unserved::Ring(self.share.number_of(index), why))?)
                }
                None => None,
            };
        }
        self.device.activate(features).map_err(Unserved::Host)
    }
}

/// Why queues cannot be served.
pub(super) enum Unserved {
    /// This one is impossible.
    Ring(usize, BrokenRing),
    /// The host refuses what the driver asks for.
    Host(io::Error),
}

impl fmt::Display for Unserved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Unserved::Ring(_, why) => why.fmt(f),
            Unserved::Host(error) => ErrorText(error).fmt(f),
        }
    }
}
