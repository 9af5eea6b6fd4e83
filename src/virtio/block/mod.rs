//! The block device (virtio 1.2, 5.2): one queue of requests on a [`Disk`].
//!
//! One call of `process` serves one request from its parsing to its place in the used ring, so
//! nothing is ever in flight between two calls, and a reset or a pause has nothing to wait for
//! but the one system call under way.

mod disk;
mod request;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Instant;

pub use disk::{Disk, DiskError};

#[cfg(test)]
use self::request::status;
use self::request::{Outcome, Request};
use super::queue::{Chain, MAX_SEGMENTS, Popped};
use super::segment::{copy_out, window};
use super::throttle::Throttle;
use super::{
    BrokenRing, ConfigSpace, Counter, Device, Progress, Queue, QueueSet, Ram, Updated,
    WorkerCounters, device_id, feature,
};
use crate::metrics::{Report, Spread, micros_since};
use crate::rate_limiter::{RateLimiter, RateLimiterUpdate};
use crate::sys::io::Brief;

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

/// What a block device counts.
#[derive(Debug, Default)]
pub struct Counters {
    /// Requests that read, and were served.
    pub reads: Counter,
    /// Bytes of these.
    pub read_bytes: Counter,
    /// Requests that wrote, and were served.
    pub writes: Counter,
    /// Bytes of these.
    pub write_bytes: Counter,
    /// Flushes that were served.
    pub flushes: Counter,
    /// Requests that could not be parsed, or asked for what is not there.
    pub invalid: Counter,
    /// Requests that the host failed.
    pub failed: Counter,
    /// How long those that read took.
    pub read_times: Spread,
    /// How long those that wrote took.
    pub write_times: Spread,
    /// Times a request had to wait for the rate limiter.
    pub throttled: Counter,
    /// Times the disk or the limits were changed.
    pub updates: Counter,
}

/// The keys of the original's metrics for a disk.
pub const LINE_KEYS: [&str; 20] = [
    "activate_fails",
    "cfg_fails",
    "no_avail_buffer",
    "event_fails",
    "execute_fails",
    "invalid_reqs_count",
    "flush_count",
    "queue_event_count",
    "rate_limiter_event_count",
    "update_count",
    "update_fails",
    "read_bytes",
    "write_bytes",
    "read_count",
    "write_count",
    "read_agg",
    "write_agg",
    "rate_limiter_throttled_events",
    "io_engine_throttled_events",
    "remaining_reqs_count",
];

impl Counters {
    fn read(&self, worker: &WorkerCounters, name: &str, report: &mut Report) {
        let reads = [
            ("read", &self.reads),
            ("write", &self.writes),
            ("flush", &self.flushes),
        ];
        for (operation, count) in reads {
            report.counter(
                "mayfly_block_operations_total",
                "Requests that were served.",
                &[("device", name), ("operation", operation)],
                count.get(),
            );
        }
        for (operation, bytes) in [("read", &self.read_bytes), ("write", &self.write_bytes)] {
            report.counter(
                "mayfly_block_bytes_total",
                "Bytes of requests that were served.",
                &[("device", name), ("operation", operation)],
                bytes.get(),
            );
        }
        for (operation, times) in [("read", &self.read_times), ("write", &self.write_times)] {
            report.seconds(
                "mayfly_block_seconds_total",
                "Time that requests which were served took on the host.",
                &[("device", name), ("operation", operation)],
                times.sum(),
            );
        }
        for (why, count) in [("guest", &self.invalid), ("host", &self.failed)] {
            report.counter(
                "mayfly_block_errors_total",
                "Requests that made no sense (guest), or that the host failed (host).",
                &[("device", name), ("fault", why)],
                count.get(),
            );
        }
        report.counter(
            "mayfly_block_throttled_total",
            "Times a request had to wait for the rate limiter.",
            &[("device", name)],
            self.throttled.get(),
        );
        report.counter(
            "mayfly_block_updates_total",
            "Times the disk or its limits were changed.",
            &[("device", name)],
            self.updates.get(),
        );
        for group in [&*format!("block_{name}"), "block"] {
            report.expect(group, &LINE_KEYS);
            report.add(group, "event_fails", worker.broken.get());
            report.add(group, "execute_fails", self.failed.get());
            report.add(group, "invalid_reqs_count", self.invalid.get());
            report.add(group, "flush_count", self.flushes.get());
            report.add(group, "queue_event_count", worker.all_kicks());
            report.add(group, "update_count", self.updates.get());
            report.add(group, "read_bytes", self.read_bytes.get());
            report.add(group, "write_bytes", self.write_bytes.get());
            report.add(group, "read_count", self.reads.get());
            report.add(group, "write_count", self.writes.get());
            report.times(group, "read_agg", &self.read_times);
            report.times(group, "write_agg", &self.write_times);
            report.add(group, "rate_limiter_throttled_events", self.throttled.get());
        }
    }
}

/// A change of a running device.
#[derive(Debug, Default)]
pub struct Update {
    /// Another disk in place of the present one; it must be as writable.
    pub disk: Option<Disk>,
    /// Other limits.
    pub limits: RateLimiterUpdate,
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
    flush_accepted: bool,
    counters: Arc<Counters>,
}

impl Block {
    /// A device over `disk`. The first 20 bytes of `id` are its serial number. With `writeback`,
    /// the guest is offered flushes, and a flush is an fdatasync on the host.
    ///
    /// # Errors
    /// When the host has no descriptor left for the rate limiter's timer.
    pub fn new(disk: Disk, id: &str, writeback: bool, limiter: RateLimiter) -> io::Result<Self> {
        let mut serial = [0; SERIAL_LEN];
        for (to, from) in serial.iter_mut().zip(id.bytes()) {
            *to = from;
        }
        Ok(Block {
            disk,
            serial,
            writeback,
            throttle: Throttle::new(limiter)?,
            chain: Chain::new(),
            flush_accepted: false,
            counters: Arc::new(Counters::default()),
        })
    }

    /// Serves the chain at hand and returns the number of bytes written to it.
    fn serve(&self, ram: &Ram, request: Result<Request, u8>) -> u32 {
        let since = Instant::now();
        let outcome = match request {
            Ok(request) => request.run(ram, &self.chain, &self.disk, &self.serial),
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
                crate::guest_warn!("a request failed on the host: {}", Brief(error));
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
    const ID: u32 = device_id::BLOCK;
    const QUEUES: &'static [u16] = &[QUEUE_SIZE];
    const UNITS_MAY_WAIT: bool = true;
    type Update = Update;
    type Counters = Counters;

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

    fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }

    fn read_counters(
        counters: &Counters,
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
        if let Some(disk) = update.disk {
            let old = std::mem::replace(&mut self.disk, disk);
            updated.replaced = Some(old.into_file());
            updated.config = Some(self.config());
        }
        updated
    }

    fn reset(&mut self) {
        self.flush_accepted = false;
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Rings, ram};
    use super::*;
    use crate::rate_limiter::{BucketUpdate, TokenBucket};
    use std::fs::File;
    use std::io::{Read, Seek, SeekFrom, Write};
    use vm_memory::{Bytes, GuestAddress};
    use vmm_sys_util::tempfile::TempFile;

    const BASE: u64 = 0x10000;
    const HEAD: u64 = 0x20000;
    const DATA: u64 = 0x30000;
    const STATUS: u64 = 0x2f000;

    const IN: u32 = 0;
    const OUT: u32 = 1;
    const FLUSH: u32 = 4;
    const GET_ID: u32 = 8;

    /// Sectors filled with their number plus one.
    fn file(sectors: u8) -> File {
        let mut file = TempFile::new().unwrap().into_file();
        for sector in 0..sectors {
            file.write_all(&[sector + 1; 512]).unwrap();
        }
        file
    }

    struct Bench {
        ram: Ram,
        file: File,
        block: Block,
    }

    fn bench(sectors: u8, read_only: bool) -> Bench {
        let file = file(sectors);
        let disk = Disk::new(file.try_clone().unwrap(), read_only).unwrap();
        let mut block = Block::new(disk, "rootfs", true, RateLimiter::default()).unwrap();
        block.activate(block.features()).unwrap();
        Bench {
            ram: ram(),
            file,
            block,
        }
    }

    impl Bench {
        fn header(&self, kind: u32, sector: u64) {
            let mut header = [0; 16];
            header[..4].copy_from_slice(&kind.to_le_bytes());
            header[8..].copy_from_slice(&sector.to_le_bytes());
            self.ram.write_slice(&header, GuestAddress(HEAD)).unwrap();
            self.ram.write_obj(0xeeu8, GuestAddress(STATUS)).unwrap();
        }

        /// Offers one chain and has it served: used length and status.
        fn serve(&mut self, parts: &[(u64, u32, bool)]) -> (u32, u8) {
            let ram = self.ram.clone();
            let mut rings = Rings::new(&ram, BASE, 256);
            let mut queue = Queue::new(&rings.layout(), 256, feature::COMMON, &ram).unwrap();
            rings.offer_chain(0, parts);
            assert_eq!(self.block.process(0, &mut queue, &ram), Ok(Progress::More));
            assert_eq!(self.block.process(0, &mut queue, &ram), Ok(Progress::Wait));
            let (head, len) = rings.take().expect("not used");
            assert_eq!(head, 0);
            (len, ram.read_obj(GuestAddress(STATUS)).unwrap())
        }

        fn request(&mut self, kind: u32, sector: u64, len: u32, writable: bool) -> (u32, u8) {
            self.header(kind, sector);
            self.serve(&[(HEAD, 16, false), (DATA, len, writable), (STATUS, 1, true)])
        }

        fn guest(&self, addr: u64, len: usize) -> Vec<u8> {
            let mut data = vec![0; len];
            self.ram.read_slice(&mut data, GuestAddress(addr)).unwrap();
            data
        }

        fn on_disk(&mut self) -> Vec<u8> {
            let mut data = Vec::new();
            self.file.seek(SeekFrom::Start(0)).unwrap();
            self.file.read_to_end(&mut data).unwrap();
            data
        }
    }

    #[test]
    fn read_when_in_range_fills_the_guests_buffer() {
        let mut bench = bench(8, false);
        assert_eq!(bench.request(IN, 3, 1024, true), (1025, status::OK));
        assert_eq!(bench.guest(DATA, 512), [4; 512]);
        assert_eq!(bench.guest(DATA + 512, 512), [5; 512]);
        assert_eq!(bench.block.counters.read_bytes.get(), 1024);
    }

    #[test]
    fn write_when_in_range_reaches_the_file() {
        let mut bench = bench(4, false);
        bench
            .ram
            .write_slice(&[0xaa; 1024], GuestAddress(DATA))
            .unwrap();
        assert_eq!(bench.request(OUT, 1, 1024, false), (1, status::OK));
        let disk = bench.on_disk();
        assert_eq!(disk[512..1536], [0xaa; 1024]);
        assert_eq!((disk[0], disk[1536], disk.len()), (1, 4, 2048));
    }

    #[test]
    fn requests_when_not_allowed_are_refused_and_change_nothing() {
        let cases: &[(u32, u64, u32, bool, u8)] = &[
            (IN, 4, 512, true, status::IOERR),
            (IN, 3, 1024, true, status::IOERR),
            (IN, u64::MAX, 512, true, status::IOERR),
            (IN, 1 << 55, 512, true, status::IOERR),
            (IN, 0, 511, true, status::IOERR),
            (IN, 0, 512, false, status::IOERR),
            (OUT, 4, 512, false, status::IOERR),
            (OUT, 3, 1024, false, status::IOERR),
            (OUT, u64::MAX - 1, 512, false, status::IOERR),
            (OUT, 0, 100, false, status::IOERR),
            (OUT, 0, 512, true, status::IOERR),
            (GET_ID, 0, 19, true, status::IOERR),
            (GET_ID, 0, 20, false, status::IOERR),
            (2, 0, 512, true, status::UNSUPP),
            (11, 0, 16, false, status::UNSUPP),
            (u32::MAX, 0, 512, true, status::UNSUPP),
        ];
        for (kind, sector, len, writable, status) in cases {
            let mut bench = bench(4, false);
            let before = bench.on_disk();
            let served = bench.request(*kind, *sector, *len, *writable);
            assert_eq!(served, (1, *status), "{kind} {sector} {len}");
            assert_eq!(bench.on_disk(), before, "{kind} {sector} {len}");
            assert_eq!(bench.block.counters.invalid.get(), 1);
        }
    }

    #[test]
    fn request_when_larger_than_we_take_is_refused() {
        // Sixteen MiB and a sector, by pointing at the same memory again and again.
        let mut bench = bench(4, false);
        bench.header(IN, 0);
        let mut parts = vec![(HEAD, 16, false)];
        parts.extend((0..33).map(|_| (DATA, 0x80000, true)));
        parts.push((STATUS, 1, true));
        assert_eq!(bench.serve(&parts), (1, status::IOERR));
    }

    #[test]
    fn header_and_status_when_split_anywhere_are_found() {
        let mut bench = bench(8, false);
        bench.header(IN, 2);
        let served = bench.serve(&[
            (HEAD, 1, false),
            (HEAD + 1, 10, false),
            (HEAD + 11, 5, false),
            (DATA, 100, true),
            (DATA + 100, 412, true),
            (STATUS, 1, true),
        ]);
        assert_eq!(served, (513, status::OK));
        assert_eq!(bench.guest(DATA, 512), [3; 512]);
        // The status is the last byte of the last part, wherever the data ends.
        bench.header(IN, 1);
        assert_eq!(
            bench.serve(&[(HEAD, 16, false), (STATUS - 512, 513, true)]),
            (513, status::OK)
        );
        assert_eq!(bench.guest(STATUS - 512, 513)[..512], [2; 512]);
        // Data behind the header in the same part.
        bench.header(OUT, 0);
        bench
            .ram
            .write_slice(&[7; 512], GuestAddress(HEAD + 16))
            .unwrap();
        assert_eq!(
            bench.serve(&[(HEAD, 528, false), (STATUS, 1, true)]),
            (1, status::OK)
        );
        assert_eq!(bench.on_disk()[..512], [7; 512]);
    }

    #[test]
    fn chains_when_too_short_are_used_without_harm() {
        for (parts, len) in [
            (vec![(HEAD, 16, false)], 0),
            (vec![(HEAD, 8, false), (STATUS, 1, true)], 1),
            (vec![(STATUS, 1, true)], 1),
            (
                vec![(HEAD, 16, false), (DATA, 0, true), (STATUS, 1, true)],
                0,
            ),
            (
                vec![(HEAD, 16, false), (DATA, 512, true), (STATUS, 1, false)],
                0,
            ),
        ] {
            let mut bench = bench(4, false);
            bench.header(IN, 0);
            assert_eq!(bench.serve(&parts).0, len, "{parts:x?}");
            assert_eq!(bench.block.counters.invalid.get(), 1, "{parts:x?}");
        }
    }

    #[test]
    fn disk_when_read_only_offers_and_holds_it() {
        let mut bench = bench(4, true);
        assert!(bench.block.features() & bit::RO != 0);
        assert_eq!(bench.request(IN, 0, 512, true), (513, status::OK));
        let before = bench.on_disk();
        assert_eq!(bench.request(OUT, 0, 512, false), (1, status::IOERR));
        assert_eq!(bench.on_disk(), before);
    }

    #[test]
    fn flush_when_negotiated_is_served_else_unsupported() {
        let mut bench = bench(4, false);
        bench.header(FLUSH, 0);
        assert_eq!(
            bench.serve(&[(HEAD, 16, false), (STATUS, 1, true)]),
            (1, status::OK)
        );
        assert_eq!(bench.block.counters.flushes.get(), 1);
        bench.block.activate(feature::COMMON).unwrap();
        bench.header(FLUSH, 0);
        assert_eq!(
            bench.serve(&[(HEAD, 16, false), (STATUS, 1, true)]),
            (1, status::UNSUPP)
        );
    }

    #[test]
    fn get_id_when_asked_tells_the_serial() {
        let mut bench = bench(4, false);
        assert_eq!(bench.request(GET_ID, 0, 20, true), (21, status::OK));
        assert_eq!(bench.guest(DATA, 20), b"rootfs\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    }

    #[test]
    fn disk_when_shrunk_fails_the_request() {
        let mut bench = bench(8, false);
        bench.file.set_len(1000).unwrap();
        assert_eq!(bench.request(IN, 0, 512, true), (513, status::OK));
        assert_eq!(bench.request(IN, 1, 512, true), (1, status::IOERR));
        assert_eq!(bench.request(IN, 7, 512, true), (1, status::IOERR));
        assert_eq!(bench.block.counters.failed.get(), 2);
    }

    #[test]
    fn throttle_when_empty_leaves_the_request_in_the_ring() {
        let mut bench = bench(8, false);
        bench.block.update(Update {
            disk: None,
            limits: RateLimiterUpdate {
                ops: BucketUpdate::Replace(TokenBucket::new(1, 0, 3_600_000)),
                ..RateLimiterUpdate::default()
            },
        });
        let ram = bench.ram.clone();
        let mut rings = Rings::new(&ram, BASE, 256);
        let mut queue = Queue::new(&rings.layout(), 256, feature::COMMON, &ram).unwrap();
        bench.header(FLUSH, 0);
        for first in [0, 2] {
            rings.offer_chain(first, &[(HEAD, 16, false), (STATUS, 1, true)]);
        }
        assert_eq!(bench.block.process(0, &mut queue, &ram), Ok(Progress::More));
        for _ in 0..3 {
            assert_eq!(bench.block.process(0, &mut queue, &ram), Ok(Progress::Wait));
        }
        assert_eq!(rings.take(), Some((0, 1)));
        assert_eq!(rings.take(), None);
        bench.block.update(Update {
            disk: None,
            limits: RateLimiterUpdate {
                ops: BucketUpdate::Replace(None),
                ..RateLimiterUpdate::default()
            },
        });
        assert_eq!(bench.block.process(0, &mut queue, &ram), Ok(Progress::More));
        assert_eq!(rings.take(), Some((2, 1)));
    }

    #[test]
    fn update_when_disk_is_new_tells_its_capacity_and_gives_back_the_old() {
        let mut bench = bench(8, false);
        let updated = bench.block.update(Update {
            disk: Some(Disk::new(file(3), false).unwrap()),
            limits: RateLimiterUpdate::default(),
        });
        let mut capacity = [0; 8];
        updated.config.unwrap().read(field::CAPACITY, &mut capacity);
        assert_eq!(u64::from_le_bytes(capacity), 3);
        assert_eq!(updated.replaced.unwrap().metadata().unwrap().len(), 8 * 512);
        assert_eq!(bench.request(IN, 3, 512, true), (1, status::IOERR));
    }
}
