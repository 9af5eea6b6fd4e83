//! The block device (virtio 1.2, 5.2): a queue of requests on a [`Disk`]. With several queues there are as
//! many of it ([`super::share`]), each with a [`Disk`] of its own over the same file; what they share is the rate
//! limiter. A flush covers what was written by way of the others too: their writes have reached the file
//! when they end, and the file is what is flushed. An overlay has its map in one thread, and so one queue.
//!
//! A request is begun by `process`, and ends there too if nothing has to wait: what lies in the host's
//! memory is read and written by plain calls, which are told not to wait where the file knows how
//! (`steps`). What would wait goes to the [`Engine`], and the request into a slot of the [`Jobs`] until
//! the host has answered; so other requests go on meanwhile, and each is returned to the driver as it
//! ends. A flush covers the writes that had ended when it was begun (5.2.6.2): it goes the same way.
//!
//! What is pushed to the engine is submitted at the end of the worker's turn. Pause, update, reset and
//! stop find nothing in flight: the worker waits until the host has answered to everything.

mod bounce;
mod bounced_steps;
mod counters;
mod disk;
mod engine;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod job;
mod overlay;
mod pool;
mod request;
mod steps;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vm_memory::Bytes;

pub use self::counters::BlockCounters;
pub use self::disk::Disk;
pub use self::overlay::Reset;

use self::bounce::{Bounce, Bounced, NoBuffer};
use self::disk::Extents;
use self::engine::Engine;
use self::job::{Job, Jobs};
#[cfg(any(test, fuzzing))]
use self::request::status;
use self::request::{Outcome, Request, status_place};
use self::steps::Step;
use super::queue::{Chain, MAX_SEGMENTS, Popped};
use super::throttle::Throttle;
use super::{
    BrokenRing, ConfigSpace, Device, PerWorker, Progress, Queue, QueueSet, Ram, StateError,
    Updated, WorkerCounters, feature,
};
use crate::metrics::Report;
use crate::rate_limiter::{LimiterState, RateLimiter, RateLimiterUpdate};
use crate::sys::clock;
use crate::sys::io::ErrorText;
use crate::wire::limits::QUEUES_MAX;

/// Feature bits (virtio 1.2, 5.2.3).
mod bit {
    /// VIRTIO_BLK_F_SIZE_MAX
    pub const SIZE_MAX: u64 = 1 << 1;
    /// VIRTIO_BLK_F_SEG_MAX
    pub const SEG_MAX: u64 = 1 << 2;
    /// VIRTIO_BLK_F_RO
    pub const RO: u64 = 1 << 5;
    /// VIRTIO_BLK_F_BLK_SIZE
    pub const BLK_SIZE: u64 = 1 << 6;
    /// VIRTIO_BLK_F_FLUSH
    pub const FLUSH: u64 = 1 << 9;
    /// VIRTIO_BLK_F_TOPOLOGY
    pub const TOPOLOGY: u64 = 1 << 10;
    /// VIRTIO_BLK_F_MQ: the driver may use several queues.
    pub const MQ: u64 = 1 << 12;
    /// VIRTIO_BLK_F_DISCARD
    pub const DISCARD: u64 = 1 << 13;
    /// VIRTIO_BLK_F_WRITE_ZEROES
    pub const WRITE_ZEROES: u64 = 1 << 14;

    pub const NAMES: &[(u64, &str)] = &[
        (SIZE_MAX, "VIRTIO_BLK_F_SIZE_MAX"),
        (SEG_MAX, "VIRTIO_BLK_F_SEG_MAX"),
        (RO, "VIRTIO_BLK_F_RO"),
        (BLK_SIZE, "VIRTIO_BLK_F_BLK_SIZE"),
        (FLUSH, "VIRTIO_BLK_F_FLUSH"),
        (TOPOLOGY, "VIRTIO_BLK_F_TOPOLOGY"),
        (MQ, "VIRTIO_BLK_F_MQ"),
        (DISCARD, "VIRTIO_BLK_F_DISCARD"),
        (WRITE_ZEROES, "VIRTIO_BLK_F_WRITE_ZEROES"),
    ];
}

/// Offsets in the configuration space (virtio 1.2, 5.2.4).
mod field {
    pub const CAPACITY: usize = 0;
    pub const SIZE_MAX: usize = 8;
    pub const SEG_MAX: usize = 12;
    pub const BLK_SIZE: usize = 20;
    pub const PHYSICAL_BLOCK_EXP: usize = 24;
    pub const MIN_IO_SIZE: usize = 26;
    pub const NUM_QUEUES: usize = 34;
    pub const MAX_DISCARD_SECTORS: usize = 36;
    pub const MAX_DISCARD_SEG: usize = 40;
    pub const DISCARD_SECTOR_ALIGNMENT: usize = 44;
    pub const MAX_WRITE_ZEROES_SECTORS: usize = 48;
    pub const MAX_WRITE_ZEROES_SEG: usize = 52;
    pub const WRITE_ZEROES_MAY_UNMAP: usize = 56;
}

/// The numbers of what is watched, in the order of [`Device::sources`]; then comes the engine.
mod source {
    pub const TIMER: usize = 0;
}

const QUEUE_SIZE: u16 = 256;
/// Those of a device with as many queues as there may be.
const QUEUE_SIZES: [u16; QUEUES_MAX] = [QUEUE_SIZE; QUEUES_MAX];
const _: () = assert!(QUEUE_SIZE as usize <= MAX_SEGMENTS);

/// Segments and bytes per segment that we ask drivers to stay within: together [`REQUEST_MAX`],
/// so that a request is a bounded piece of work.
const SEG_MAX: u32 = 126;
const SIZE_MAX: u32 = 128 * 1024;

/// The most data one request may have; a larger one is refused.
const REQUEST_MAX: u32 = 16 * 1024 * 1024;
const _: () = assert!(SEG_MAX * SIZE_MAX <= REQUEST_MAX);

/// Sectors of one request to discard: 1 GiB.
const DISCARD_MAX: u32 = 1 << 21;
/// Sectors of one request to write zeros, which may have to be written one by one: 16 MiB.
const ZEROES_MAX: u32 = 1 << 15;

/// Bytes of the serial number (virtio 1.2, 5.2.6).
pub const SERIAL_LEN: usize = 20;

/// A change of a running device.
#[derive(Debug, Default)]
pub struct Update {
    /// Another disk in place of the present one; it must be as writable.
    pub disk: Option<Box<Disk>>,
    /// Forget what the overlay of the disk has.
    pub reset: Option<Box<Reset>>,
    /// Other limits.
    pub limits: RateLimiterUpdate,
    /// Numbers changes of limits, for workers that share them.
    pub number: u64,
}

/// What is saved of a block device; by default of a new one. No request is ever in flight when it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockState {
    /// The disk took writes.
    pub is_writable: bool,
    /// The id of the overlay that has what was written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlay: Option<[u8; 16]>,
    /// What the limits have let through.
    pub limiter: LimiterState,
}

/// Requests that the driver may make, by the features that it has accepted.
#[derive(Clone, Copy, Debug, Default)]
struct Served {
    flush: bool,
    discard: bool,
    write_zeroes: bool,
    /// What is written is stable when it is answered: the driver cannot ask for that (virtio 1.2, 5.2.6.2). The queue
    /// waits for it.
    writes_through: bool,
}

/// A block device.
#[derive(Debug)]
pub struct Block {
    disk: Disk,
    engine: Engine,
    jobs: Jobs,
    serial: [u8; SERIAL_LEN],
    /// Flushes are offered, and reach the disk.
    writeback: bool,
    /// How many queues the driver may use, each with such a device.
    queues: u16,
    throttle: Throttle,
    /// The next request waits for the limiter's timer.
    is_held: bool,
    chain: Chain,
    extents: Extents,
    /// For what a disk that goes past the page cache cannot do with the guest's memory.
    bounce: Option<Box<Bounce>>,
    served: Served,
    counters: Arc<BlockCounters>,
    /// Nanoseconds, at the end of the last unit of this turn; 0 before the first. The next one begins there: one look at
    /// the clock serves the end of a request, the beginning of the next, and the worker.
    now: u64,
}

impl Block {
    /// A device over each of `disks`, which are the same: one for each queue. The first 20 bytes of `id` are the
    /// serial number. With `writeback`, the guest is offered flushes, and a flush is an fdatasync on the host. They
    /// go on from `states`, which were saved `elapsed` nanoseconds ago.
    ///
    /// # Errors
    /// When the host has no descriptor left for the rate limiter's timers, or the disk takes no writes
    /// any more.
    pub fn for_queues(
        disks: PerWorker<Disk>,
        id: &str,
        writeback: bool,
        limiter: RateLimiter,
        states: &PerWorker<BlockState>,
        elapsed: u64,
    ) -> io::Result<PerWorker<Self>> {
        let queues = u16::try_from(disks.count()).unwrap_or(u16::MAX);
        let limiter = limiter.restore(&states.first.limiter, elapsed);
        let throttles = Throttle::for_workers(limiter, disks.count())?;
        let mut states = states.iter();
        disks.zip(throttles).try_map(|(disk, throttle)| {
            let new = BlockState::default();
            let state = states.next().unwrap_or(&new);
            Block::of_queue(disk, id, writeback, queues, throttle, state)
        })
    }

    /// [`Block::for_queues`] with one.
    #[cfg(any(test, fuzzing))]
    pub fn new(
        disk: Disk,
        id: &str,
        writeback: bool,
        limiter: RateLimiter,
        state: &BlockState,
        elapsed: u64,
    ) -> io::Result<Self> {
        let state = PerWorker::from(state.clone());
        let blocks = Block::for_queues(disk.into(), id, writeback, limiter, &state, elapsed)?;
        Ok(blocks.first)
    }

    fn of_queue(
        disk: Disk,
        id: &str,
        writeback: bool,
        queues: u16,
        throttle: Throttle,
        state: &BlockState,
    ) -> io::Result<Self> {
        if state.is_writable && disk.is_read_only() {
            return Err(io::Error::other(StateError::ReadOnly));
        }
        if state.overlay.is_some() && state.overlay != disk.overlay_id() {
            return Err(io::Error::other(StateError::OtherOverlay));
        }
        let mut serial = [0; SERIAL_LEN];
        for (to, from) in serial.iter_mut().zip(id.bytes()) {
            *to = from;
        }
        let engine = match disk.files() {
            // The files of an overlay stay what they are.
            Some(files) if disk.may_wait() => Engine::new(&files, disk.overlay_id().is_none()),
            _ => Engine::Absent,
        };
        Ok(Block {
            disk,
            engine,
            jobs: Jobs::new(),
            serial,
            writeback,
            queues,
            throttle,
            chain: Chain::new(),
            extents: Extents::new(),
            bounce: None,
            served: Served::default(),
            is_held: false,
            counters: Arc::new(BlockCounters::default()),
            now: 0,
        })
    }

    /// Takes what the host has ended out of the engine; whether there is anything new to go on with.
    /// What was there before may have to wait, and must not wake the thread again.
    fn reap(&mut self) -> QueueSet {
        let mut found = QueueSet::NONE;
        while let Some((slot, result)) = self.engine.reap() {
            self.jobs.note(slot, result);
            found = QueueSet::one(0);
        }
        found
    }

    /// Goes on with one request that the host has answered to, if there is one.
    fn go_on(&mut self, queue: &mut Queue, ram: &Ram) -> Result<Progress, BrokenRing> {
        if !self.jobs.has_answered() && self.engine.has_completions() {
            self.reap();
        }
        let Some((slot, mut job, result)) = self.jobs.take_answered() else {
            return Ok(Progress::Wait);
        };
        let ended = match result {
            Ok(moved) if job.is_in_buffer() => {
                let done = self.bounced_moved(ram, &mut job, Some(slot), moved);
                done.err().map(Outcome::Failed)
            }
            other => {
                job.repeat_bounced();
                job.answered(other)
            }
        };
        let outcome = match ended {
            Some(outcome) => outcome,
            None => match self.step(ram, &mut job, Some(slot)) {
                Step::Ended(outcome) => outcome,
                Step::Pushed(slot) => {
                    self.jobs.put(slot, job);
                    self.now = clock::monotonic_nanos();
                    return Ok(Progress::More);
                }
                Step::Yielded(slot) => {
                    self.jobs.put(slot, job);
                    self.jobs.note(slot, Ok(0));
                    self.now = clock::monotonic_nanos();
                    return Ok(Progress::More);
                }
            },
        };
        self.jobs.free(slot);
        self.end(queue, ram, &job, &outcome)?;
        Ok(Progress::More)
    }

    /// Begins the request of the chain at hand; the driver may see its end at once.
    fn begin(
        &mut self,
        queue: &mut Queue,
        ram: &Ram,
        request: Result<Request, u8>,
        bounced: Option<Bounced>,
    ) -> Result<(), BrokenRing> {
        if self.now == 0 {
            self.now = clock::monotonic_nanos();
        }
        let since = self.now;
        let place = status_place(&self.chain);
        let (head, writable) = (self.chain.head(), self.chain.writable_len());
        let job = |request| Job::new(request, head, place, writable, since);
        let (job, outcome) = match request {
            Err(status) => (job(Request::GetId), Outcome::Invalid(status)),
            Ok(request) => {
                let mut job = job(request);
                job.bounced = bounced;
                match self.step(ram, &mut job, None) {
                    Step::Ended(outcome) => (job, outcome),
                    Step::Pushed(slot) => {
                        self.jobs.put(slot, job);
                        self.now = clock::monotonic_nanos();
                        return Ok(());
                    }
                    Step::Yielded(slot) => {
                        self.jobs.put(slot, job);
                        self.jobs.note(slot, Ok(0));
                        self.now = clock::monotonic_nanos();
                        return Ok(());
                    }
                }
            }
        };
        self.end(queue, ram, &job, &outcome)
    }

    /// Returns a request to the driver.
    fn end(
        &mut self,
        queue: &mut Queue,
        ram: &Ram,
        job: &Job,
        outcome: &Outcome,
    ) -> Result<(), BrokenRing> {
        self.now = clock::monotonic_nanos();
        self.count(job, outcome);
        if let (Some(bounced), Some(bounce)) = (&job.bounced, &mut self.bounce) {
            bounce.give_back(bounced);
        }
        let mut written = match job.status {
            Some(at) if ram.write_obj(outcome.status(), at).is_ok() => 1,
            _ => 0,
        };
        if job.writable > 1 {
            // What comes before the status was written whole, or not at all.
            written = match (outcome, &job.request) {
                (Outcome::Done, Request::Read { .. } | Request::GetId) => job.writable,
                _ => 0,
            };
        }
        queue.add_used(ram, job.head, written)
    }

    fn count(&self, job: &Job, outcome: &Outcome) {
        let counters = &*self.counters;
        match outcome {
            Outcome::Invalid(_) => counters.invalid.one(),
            Outcome::Failed(error) => {
                counters.failed.one();
                crate::guest_warn!("a request failed on the host: {}", ErrorText(error));
            }
            Outcome::Done => match job.request {
                Request::Read { len, .. } => {
                    counters.reads.one();
                    counters.read_bytes.add(u64::from(len));
                    counters
                        .read_times
                        .observe(micros(self.now.saturating_sub(job.since)));
                }
                Request::Write { len, .. } => {
                    counters.writes.one();
                    counters.write_bytes.add(u64::from(len));
                    counters
                        .write_times
                        .observe(micros(self.now.saturating_sub(job.since)));
                }
                Request::Flush => counters.flushes.one(),
                Request::Discard { .. } => counters.discards.one(),
                Request::WriteZeroes { .. } => counters.write_zeroes.one(),
                Request::GetId => {}
            },
        }
    }
}

fn micros(nanos: u64) -> u64 {
    nanos.checked_div(1000).unwrap_or(0)
}

impl Device for Block {
    // Block device (virtio 1.2, 5.2).
    const ID: u32 = 2;
    const QUEUES: &'static [u16] = &[QUEUE_SIZE];
    const FEATURES: &'static [(u64, &'static str)] = bit::NAMES;
    const UNITS_MAY_WAIT: bool = true;
    type Update = Update;
    type State = BlockState;
    type Counters = BlockCounters;

    fn queues_of_several(workers: usize) -> Option<&'static [u16]> {
        QUEUE_SIZES.get(..workers)
    }

    fn features(&self) -> u64 {
        let always = bit::SEG_MAX | bit::SIZE_MAX | bit::BLK_SIZE | bit::TOPOLOGY;
        let mut features = feature::COMMON | always;
        if self.disk.is_read_only() {
            features |= bit::RO;
        } else {
            features |= bit::DISCARD | bit::WRITE_ZEROES;
        }
        if self.writeback {
            features |= bit::FLUSH;
        }
        if self.queues > 1 {
            features |= bit::MQ;
        }
        features
    }

    fn config(&self) -> ConfigSpace {
        let blocks = self.disk.blocks();
        let physical_in_logical = blocks.physical.checked_div(blocks.logical).unwrap_or(1);
        let exponent = physical_in_logical.checked_ilog2().unwrap_or(0) as u8;
        let granularity = blocks.physical.checked_div(512).unwrap_or(1);
        let one: u32 = 1;
        // Not there without the feature.
        let queues = if self.queues > 1 { self.queues } else { 0 };
        ConfigSpace::new()
            .with(field::NUM_QUEUES, &queues.to_le_bytes())
            .with(field::CAPACITY, &self.disk.sectors().to_le_bytes())
            .with(field::SIZE_MAX, &SIZE_MAX.to_le_bytes())
            .with(field::SEG_MAX, &SEG_MAX.to_le_bytes())
            .with(field::BLK_SIZE, &blocks.logical.to_le_bytes())
            .with(field::PHYSICAL_BLOCK_EXP, &[exponent])
            .with(
                field::MIN_IO_SIZE,
                &(physical_in_logical as u16).to_le_bytes(),
            )
            .with(field::MAX_DISCARD_SECTORS, &DISCARD_MAX.to_le_bytes())
            .with(field::MAX_DISCARD_SEG, &one.to_le_bytes())
            .with(field::DISCARD_SECTOR_ALIGNMENT, &granularity.to_le_bytes())
            .with(field::MAX_WRITE_ZEROES_SECTORS, &ZEROES_MAX.to_le_bytes())
            .with(field::MAX_WRITE_ZEROES_SEG, &one.to_le_bytes())
            .with(field::WRITE_ZEROES_MAY_UNMAP, &[1])
    }

    fn counters(&self) -> Arc<BlockCounters> {
        Arc::clone(&self.counters)
    }

    fn add_counters(to: &BlockCounters, from: &BlockCounters) {
        to.add(from);
    }

    fn read_counters(
        counters: &BlockCounters,
        worker: &WorkerCounters,
        name: &str,
        report: &mut Report,
    ) {
        counters.read(worker, name, report);
    }

    fn sources(&self) -> Vec<RawFd> {
        let mut sources = vec![self.throttle.as_raw_fd()];
        sources.extend(self.engine.source());
        sources
    }

    fn enter_thread(&mut self, ram: &Ram, filtered: bool) -> io::Result<()> {
        if self.disk.is_direct() {
            let bounce = Box::new(Bounce::new(ram)?);
            self.engine.enter(bounce.view(), filtered)?;
            self.bounce = Some(bounce);
            return Ok(());
        }
        self.engine.enter(ram, filtered)
    }

    fn activate(&mut self, features: u64) -> io::Result<()> {
        self.served = Served {
            flush: features & bit::FLUSH != 0,
            discard: features & bit::DISCARD != 0,
            write_zeroes: features & bit::WRITE_ZEROES != 0,
            writes_through: self.writeback && features & bit::FLUSH == 0,
        };
        Ok(())
    }

    fn process(&mut self, _: usize, queue: &mut Queue, ram: &Ram) -> Result<Progress, BrokenRing> {
        if self.jobs.under_way() > 0 || self.jobs.has_answered() {
            if self.go_on(queue, ram)? == Progress::More {
                return Ok(Progress::More);
            }
            if !self.jobs.has_room() {
                return Ok(Progress::Wait);
            }
        }
        if self.is_held {
            return Ok(Progress::Wait);
        }
        match queue.pop(ram, &mut self.chain)? {
            Popped::Empty => return Ok(Progress::Wait),
            Popped::Malformed(_) => {
                self.counters.invalid.one();
                queue.add_used(ram, self.chain.head(), 0)?;
                return Ok(Progress::More);
            }
            Popped::Chain => queue.prefetch(ram),
        }
        let request = Request::parse(ram, &self.chain, &self.disk, self.served);
        let bytes = request.as_ref().map_or(0, Request::limited_bytes);
        if !self.throttle.permits(bytes) {
            self.is_held = true;
            self.counters.throttled.one();
            queue.rewind(1);
            return Ok(Progress::Wait);
        }
        let bounced = match request.as_ref().map(|request| self.take_buffer(request)) {
            Ok(Ok(bounced)) => bounced,
            Err(_) => None,
            Ok(Err(NoBuffer)) => {
                // Those that have them are under way.
                queue.rewind(1);
                return Ok(Progress::Wait);
            }
        };
        self.throttle.charge(bytes);
        self.begin(queue, ram, request, bounced)?;
        Ok(Progress::More)
    }

    fn last_look(&self) -> u64 {
        match self.now {
            // It only had a malformed chain, or none.
            0 => clock::monotonic_nanos(),
            now => now,
        }
    }

    fn in_flight(&self) -> usize {
        self.jobs.under_way()
    }

    fn complete(&mut self, _: usize, queue: &mut Queue, ram: &Ram) -> Result<Progress, BrokenRing> {
        self.go_on(queue, ram)
    }

    fn end_turn(&mut self) -> QueueSet {
        self.now = 0;
        if self.jobs.under_way() == 0 {
            return QueueSet::NONE;
        }
        let all = self.engine.submit();
        let mut runnable = self.reap();
        if !all {
            runnable.insert(QueueSet::one(0));
        }
        runnable
    }

    fn backend(&mut self, source: usize) -> QueueSet {
        match source {
            source::TIMER => self.is_held = false,
            _ => drop(self.reap()),
        }
        QueueSet::one(0)
    }

    fn poll(&mut self) -> QueueSet {
        if self.engine.has_completions() {
            return self.reap();
        }
        QueueSet::NONE
    }

    fn update(&mut self, update: Update) -> Updated {
        self.counters.updates.one();
        self.throttle.update(update.limits, update.number);
        self.is_held = false;
        let mut updated = Updated {
            runnable: QueueSet::ALL,
            ..Updated::default()
        };
        if let Some(mut disk) = update.disk {
            if let Some(files) = disk.files()
                && let Err(error) = self.engine.replace(&files)
            {
                let error = ErrorText(&error);
                crate::warn!("the disk is served without io_uring from now on: {error}");
            }
            std::mem::swap(&mut *disk, &mut self.disk);
            updated.replaced = Some(disk);
            updated.config = Some(self.config());
        }
        if let Some(mut reset) = update.reset {
            updated.failed = self.disk.reset(&mut reset).err();
            updated.replaced = Some(reset);
        }
        updated
    }

    fn state_buffer() -> BlockState {
        BlockState::default()
    }

    fn save(&self, state: &mut BlockState) {
        *state = BlockState {
            is_writable: !self.disk.is_read_only(),
            overlay: self.disk.overlay_id(),
            limiter: self.throttle.save(),
        };
    }

    fn settle(&mut self) -> io::Result<()> {
        self.disk.settle()
    }

    fn reset(&mut self) {
        self.served = Served::default();
        self.is_held = false;
        self.jobs.clear();
        if let Some(bounce) = &mut self.bounce {
            bounce.clear();
        }
    }
}
