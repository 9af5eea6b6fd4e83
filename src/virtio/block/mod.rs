//! The block device (virtio 1.2, 5.2): one queue of requests on a [`Disk`].
//!
//! One call of `process` serves one request from its parsing to its place in the used ring, so
//! nothing is ever in flight between two calls, and a reset or a pause has nothing to wait for
//! but the one system call under way.

mod counters;
mod disk;
mod request;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};

pub use self::counters::BlockCounters;
pub use self::disk::Disk;

use self::disk::Extents;
#[cfg(test)]
use self::request::status;
use self::request::{Outcome, Request};
use super::queue::{Chain, MAX_SEGMENTS, Popped};
use super::segment::{copy_out, window};
use super::throttle::Throttle;
use super::{
    BrokenRing, ConfigSpace, Device, Progress, Queue, QueueSet, Ram, StateError, Updated,
    WorkerCounters, feature,
};
use crate::metrics::{Report, micros_since};
use crate::rate_limiter::{LimiterState, RateLimiter, RateLimiterUpdate};
use crate::sys::io::ErrorText;

/// Feature bits (virtio 1.2, 5.2.3).
mod bit {
    /// VIRTIO_BLK_F_SIZE_MAX
    pub const SIZE_MAX: u64 = 1 << 1;
    /// VIRTIO_BLK_F_SEG_MAX
    pub const SEG_MAX: u64 = 1 << 2;
    /// VIRTIO_BLK_F_RO
    pub const RO: u64 = 1 << 5;
    /// VIRTIO_BLK_F_FLUSH
    pub const FLUSH: u64 = 1 << 9;

    pub const NAMES: &[(u64, &str)] = &[
        (SIZE_MAX, "VIRTIO_BLK_F_SIZE_MAX"),
        (SEG_MAX, "VIRTIO_BLK_F_SEG_MAX"),
        (RO, "VIRTIO_BLK_F_RO"),
        (FLUSH, "VIRTIO_BLK_F_FLUSH"),
    ];
}

/// Offsets in the configuration space (virtio 1.2, 5.2.4).
mod field {
    pub const CAPACITY: usize = 0;
    pub const SIZE_MAX: usize = 8;
    pub const SEG_MAX: usize = 12;
}

const QUEUE_SIZE: u16 = 256;
const _: () = assert!(QUEUE_SIZE as usize <= MAX_SEGMENTS);

/// Segments and bytes per segment that we ask drivers to stay within: together [`REQUEST_MAX`],
/// so that a request is a bounded piece of work.
const SEG_MAX: u32 = 126;
const SIZE_MAX: u32 = 128 * 1024;

/// The most data one request may have; a larger one is refused.
const REQUEST_MAX: u32 = 16 * 1024 * 1024;
const _: () = assert!(SEG_MAX * SIZE_MAX <= REQUEST_MAX);

/// Bytes of the serial number (virtio 1.2, 5.2.6).
pub const SERIAL_LEN: usize = 20;

/// A change of a running device.
#[derive(Debug, Default)]
pub struct Update {
    /// Another disk in place of the present one; it must be as writable.
    pub disk: Option<Box<Disk>>,
    /// Other limits.
    pub limits: RateLimiterUpdate,
}

/// What is saved of a block device; by default of a new one. No request is ever in flight when it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockState {
    /// The disk took writes.
    pub is_writable: bool,
    /// What the limits have let through.
    pub limiter: LimiterState,
}

/// A block device.
#[derive(Debug)]
pub struct Block {
    disk: Disk,
    serial: [u8; SERIAL_LEN],
    /// Flushes are offered, and reach the disk.
    writeback: bool,
    throttle: Throttle,
    chain: Chain,
    extents: Extents,
    flush_accepted: bool,
    counters: Arc<BlockCounters>,
}

impl Block {
    /// A device over `disk`. The first 20 bytes of `id` are its serial number. With `writeback`,
    /// the guest is offered flushes, and a flush is an fdatasync on the host. It goes on from `state`,
    /// which was saved `elapsed` nanoseconds ago.
    ///
    /// # Errors
    /// When the host has no descriptor left for the rate limiter's timer, or the disk takes no writes
    /// any more.
    pub fn new(
        disk: Disk,
        id: &str,
        writeback: bool,
        limiter: RateLimiter,
        state: &BlockState,
        elapsed: u64,
    ) -> io::Result<Self> {
        if state.is_writable && disk.is_read_only() {
            return Err(io::Error::other(StateError::ReadOnly));
        }
        let mut serial = [0; SERIAL_LEN];
        for (to, from) in serial.iter_mut().zip(id.bytes()) {
            *to = from;
        }
        Ok(Block {
            disk,
            serial,
            writeback,
            throttle: Throttle::new(limiter.restore(&state.limiter, elapsed))?,
            chain: Chain::new(),
            extents: Extents::new(),
            flush_accepted: false,
            counters: Arc::new(BlockCounters::default()),
        })
    }

    /// Serves the chain at hand and returns the number of bytes written to it.
    fn serve(&mut self, ram: &Ram, request: Result<Request, u8>) -> u32 {
        let since = Instant::now();
        let outcome = match request {
            Ok(request) => request.run(
                ram,
                &self.chain,
                &mut self.disk,
                &self.serial,
                &mut self.extents,
            ),
            Err(status) => Outcome::invalid(status),
        };
        let counters = &*self.counters;
        match &outcome {
            Outcome::Read(bytes) => {
                counters.reads.one();
                counters.read_bytes.add(u64::from(*bytes));
                counters.read_times.observe(micros_since(since));
            }
            Outcome::Written(bytes) => {
                counters.writes.one();
                counters.write_bytes.add(u64::from(*bytes));
                counters.write_times.observe(micros_since(since));
            }
            Outcome::Flushed => counters.flushes.one(),
            Outcome::Identified => {}
            Outcome::Invalid(_) => counters.invalid.one(),
            Outcome::Failed(error) => {
                counters.failed.one();
                crate::guest_warn!("a request failed on the host: {}", ErrorText(error));
            }
        }
        // The status is the last byte the device may write (5.2.6).
        let Some(at) = self.chain.writable_len().checked_sub(1) else {
            return 0;
        };
        let place = window(self.chain.writable().iter().copied(), at, 1);
        if !copy_out(ram, place, &[outcome.status()]) {
            return 0;
        }
        match outcome {
            // All of it was written, the status too.
            Outcome::Read(_) | Outcome::Identified => self.chain.writable_len(),
            _ => 1,
        }
    }
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

    fn features(&self) -> u64 {
        let mut features = feature::COMMON | bit::SEG_MAX | bit::SIZE_MAX;
        if self.disk.is_read_only() {
            features |= bit::RO;
        }
        if self.writeback {
            features |= bit::FLUSH;
        }
        features
    }

    fn config(&self) -> ConfigSpace {
        ConfigSpace::new()
            .with(field::CAPACITY, &self.disk.sectors().to_le_bytes())
            .with(field::SIZE_MAX, &SIZE_MAX.to_le_bytes())
            .with(field::SEG_MAX, &SEG_MAX.to_le_bytes())
    }

    fn counters(&self) -> Arc<BlockCounters> {
        Arc::clone(&self.counters)
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
        vec![self.throttle.as_raw_fd()]
    }

    fn activate(&mut self, features: u64) -> io::Result<()> {
        self.flush_accepted = features & bit::FLUSH != 0;
        Ok(())
    }

    fn process(&mut self, _: usize, queue: &mut Queue, ram: &Ram) -> Result<Progress, BrokenRing> {
        match queue.pop(ram, &mut self.chain)? {
            Popped::Empty => return Ok(Progress::Wait),
            Popped::Malformed(_) => {
                self.counters.invalid.one();
                queue.add_used(ram, self.chain.head(), 0)?;
                return Ok(Progress::More);
            }
            Popped::Chain => {}
        }
        let request = Request::parse(ram, &self.chain, &self.disk, self.flush_accepted);
        let bytes = request.as_ref().map_or(0, Request::limited_bytes);
        if !self.throttle.permits(bytes) {
            self.counters.throttled.one();
            queue.rewind(1);
            return Ok(Progress::Wait);
        }
        self.throttle.charge(bytes);
        let written = self.serve(ram, request);
        queue.add_used(ram, self.chain.head(), written)?;
        Ok(Progress::More)
    }

    fn backend(&mut self, _: usize) -> QueueSet {
        QueueSet::one(0)
    }

    fn update(&mut self, update: Update) -> Updated {
        self.counters.updates.one();
        self.throttle.update(update.limits);
        let mut updated = Updated {
            runnable: QueueSet::ALL,
            ..Updated::default()
        };
        if let Some(mut disk) = update.disk {
            std::mem::swap(&mut *disk, &mut self.disk);
            updated.replaced = Some(disk);
            updated.config = Some(self.config());
        }
        updated
    }

    fn state_buffer() -> BlockState {
        BlockState::default()
    }

    fn save(&self, state: &mut BlockState) {
        *state = BlockState {
            is_writable: !self.disk.is_read_only(),
            limiter: self.throttle.save(),
        };
    }

    fn reset(&mut self) {
        self.flush_accepted = false;
    }
}
