//! One answer of a device out of those of its workers.
//!
//! Each message has a token that comes back with the answer. Of pauses and saves the last one counts, which begins
//! with [`Answers::begin_pause`] or [`Answers::begin_save`]: control has given up on those before, and a late answer to
//! one of them is ignored. Changes are few, and the oldest is forgotten when there are too many.

use std::io;

use crate::virtio::{ConfigSpace, Done, Replaced, WorkerReply};

/// Changes that can wait for answers; as many as a worker's inbox has room for.
const UPDATES_MAX: usize = 16;

/// What comes of an answer.
#[derive(Debug)]
pub enum Gathered {
    /// It is not of this device.
    Other(WorkerReply),
    /// Other workers have not answered yet.
    Partly,
    /// The device has answered.
    Whole(WorkerReply),
}

/// The bit of worker number `worker`.
pub(super) fn bit(worker: usize) -> u32 {
    let worker = u32::try_from(worker).unwrap_or(u32::MAX);
    1u32.checked_shl(worker).unwrap_or(0)
}

/// What was answered to one message.
#[derive(Debug, Default)]
struct Part {
    /// Of the message whose answers count, until all have come.
    token: Option<u64>,
    /// Workers that have answered, by bit.
    answered: u32,
}

impl Part {
    /// None has answered to `token`, and answers to any other do not count.
    fn begin(token: u64) -> Self {
        Part {
            token: Some(token),
            answered: 0,
        }
    }

    /// Notes that worker number `worker` has answered to `token`; whether all `workers` have, which is said once.
    fn note(&mut self, token: u64, worker: usize, workers: usize) -> bool {
        if self.token != Some(token) {
            return false;
        }
        self.answered |= bit(worker);
        let is_whole = self.answered.count_ones() as usize == workers;
        if is_whole {
            self.token = None;
        }
        is_whole
    }
}

/// What workers have answered to a change.
#[derive(Debug, Default)]
struct Update {
    part: Part,
    config: Option<ConfigSpace>,
    replaced: Vec<Replaced>,
    failed: Option<io::Error>,
}

/// What the workers of one device have answered while others have not.
#[derive(Debug, Default)]
pub(super) struct Answers {
    pause: Part,
    save: Part,
    /// A worker has not saved itself.
    is_unsaved: bool,
    updates: Vec<Update>,
}

impl Answers {
    /// Notes `reply`, of one of `workers` workers; the whole answer, if that was the last.
    pub fn gather(&mut self, reply: WorkerReply, workers: usize) -> Gathered {
        if workers == 1 {
            return Gathered::Whole(reply);
        }
        let WorkerReply {
            device,
            worker,
            token,
            done,
        } = reply;
        let whole = match done {
            Done::Resumed => (worker == 0).then_some(Done::Resumed),
            Done::Paused => self
                .pause
                .note(token, worker, workers)
                .then_some(Done::Paused),
            Done::Saved => self.saved(token, worker, workers, true),
            Done::NotSaved => self.saved(token, worker, workers, false),
            Done::Updated {
                config,
                replaced,
                failed,
            } => self.updated(token, worker, workers, |update| {
                update.config = update.config.or(config);
                update.replaced.extend(replaced);
                update.failed = update.failed.take().or(failed);
            }),
        };
        match whole {
            None => Gathered::Partly,
            Some(done) => Gathered::Whole(WorkerReply {
                device,
                worker,
                token,
                done,
            }),
        }
    }

    fn saved(&mut self, token: u64, worker: usize, workers: usize, is_saved: bool) -> Option<Done> {
        self.is_unsaved |= !is_saved && self.save.token == Some(token);
        let is_whole = self.save.note(token, worker, workers);
        is_whole.then_some(match self.is_unsaved {
            true => Done::NotSaved,
            false => Done::Saved,
        })
    }

    /// Workers are told to pause, with `token`.
    pub fn begin_pause(&mut self, token: u64) {
        self.pause = Part::begin(token);
    }

    /// Workers are told to save themselves, with `token`.
    pub fn begin_save(&mut self, token: u64) {
        self.save = Part::begin(token);
        self.is_unsaved = false;
    }

    fn updated(
        &mut self,
        token: u64,
        worker: usize,
        workers: usize,
        note: impl FnOnce(&mut Update),
    ) -> Option<Done> {
        let at = self
            .updates
            .iter()
            .position(|u| u.part.token == Some(token));
        let at = at.unwrap_or_else(|| {
            if self.updates.len() >= UPDATES_MAX {
                self.updates.remove(0);
            }
            self.updates.push(Update {
                part: Part::begin(token),
                ..Update::default()
            });
            self.updates.len().saturating_sub(1)
        });
        let update = self.updates.get_mut(at)?;
        note(update);
        if !update.part.note(token, worker, workers) {
            return None;
        }
        let update = self.updates.remove(at);
        let replaced: Option<Replaced> = match update.replaced.is_empty() {
            true => None,
            false => Some(Box::new(update.replaced)),
        };
        Some(Done::Updated {
            config: update.config,
            replaced,
            failed: update.failed,
        })
    }
}
