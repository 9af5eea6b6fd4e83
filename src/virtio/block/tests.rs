mod direct;

use super::super::queue::QueueState;
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
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

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
    bench_of(file(sectors), read_only)
}

fn bench_of(file: File, read_only: bool) -> Bench {
    let disk = Disk::new(file.try_clone().unwrap(), read_only).unwrap();
    let mut block = Block::new(
        disk,
        "rootfs",
        true,
        RateLimiter::default(),
        &BlockState::default(),
        0,
    )
    .unwrap();
    let ram = ram();
    block.enter_thread(&ram, false).unwrap();
    block.activate(block.features()).unwrap();
    Bench { ram, file, block }
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
        let mut queue = Queue::new(
            &QueueState::fresh(rings.layout()),
            256,
            feature::COMMON,
            &ram,
        )
        .unwrap();
        rings.offer_chain(0, parts);
        let (head, len) = self.until_used(&mut queue, &mut rings);
        assert_eq!(head, 0);
        (len, ram.read_obj(GuestAddress(STATUS)).unwrap())
    }

    /// Works until something has been returned.
    fn until_used(&mut self, queue: &mut Queue, rings: &mut Rings<'_>) -> (u32, u32) {
        let ram = self.ram.clone();
        loop {
            while self.block.process(0, queue, &ram).unwrap() == Progress::More {}
            self.block.end_turn();
            self.block.backend(1);
            if let Some(used) = rings.take() {
                return used;
            }
        }
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
        (12, 0, 16, false, status::UNSUPP),
        (u32::MAX, 0, 512, true, status::UNSUPP),
    ];
    for (kind, sector, len, writable, status) in cases {
        let mut bench = bench(4, false);
        let before = bench.on_disk();
        let served = bench.request(*kind, *sector, *len, *writable);
        // A status behind bytes that were not written is not among those that were.
        let used = u32::from(!writable);
        assert_eq!(served, (used, *status), "{kind} {sector} {len}");
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
    assert_eq!(bench.serve(&parts), (0, status::IOERR));
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
    // All that is said to be written is.
    let before = [0xee; 512];
    bench.ram.write_slice(&before, GuestAddress(DATA)).unwrap();
    assert_eq!(bench.request(GET_ID, 0, 512, true), (513, status::OK));
    assert_eq!(bench.guest(DATA, 6), b"rootfs");
    assert_eq!(bench.guest(DATA + 6, 506), [0; 506]);
}

#[test]
fn disk_when_shrunk_fails_the_request() {
    let mut bench = bench(8, false);
    bench.file.set_len(1000).unwrap();
    assert_eq!(bench.request(IN, 0, 512, true), (513, status::OK));
    assert_eq!(bench.request(IN, 1, 512, true), (0, status::IOERR));
    assert_eq!(bench.request(IN, 7, 512, true), (0, status::IOERR));
    assert_eq!(bench.block.counters.failed.get(), 2);
}

#[test]
fn throttle_when_empty_leaves_the_request_in_the_ring() {
    let mut bench = bench(8, false);
    bench.block.update(Update {
        disk: None,
        reset: None,
        limits: RateLimiterUpdate {
            ops: BucketUpdate::Replace(TokenBucket::new(1, 0, 3_600_000)),
            ..RateLimiterUpdate::default()
        },
        number: 0,
    });
    let ram = bench.ram.clone();
    let mut rings = Rings::new(&ram, BASE, 256);
    let mut queue = Queue::new(
        &QueueState::fresh(rings.layout()),
        256,
        feature::COMMON,
        &ram,
    )
    .unwrap();
    bench.header(FLUSH, 0);
    for first in [0, 2] {
        rings.offer_chain(first, &[(HEAD, 16, false), (STATUS, 1, true)]);
    }
    assert_eq!(bench.until_used(&mut queue, &mut rings), (0, 1));
    for _ in 0..3 {
        assert_eq!(bench.block.process(0, &mut queue, &ram), Ok(Progress::Wait));
    }
    assert_eq!(rings.take(), None);
    bench.block.update(Update {
        disk: None,
        reset: None,
        limits: RateLimiterUpdate {
            ops: BucketUpdate::Replace(None),
            ..RateLimiterUpdate::default()
        },
        number: 0,
    });
    assert_eq!(bench.until_used(&mut queue, &mut rings), (2, 1));
}

/// One look serves the end of a request, for its metric, the beginning of the next, and the worker.
#[test]
fn clock_when_requests_follow_each_other_is_looked_at_once_for_each() {
    let mut bench = bench(8, false);
    let ram = bench.ram.clone();
    let rings = Rings::new(&ram, BASE, 256);
    let state = QueueState::fresh(rings.layout());
    let mut queue = Queue::new(&state, 256, feature::COMMON, &ram).unwrap();
    bench.header(IN, 1);
    for number in 0..20 {
        let parts = [(HEAD, 16, false), (DATA, 512, true), (STATUS, 1, true)];
        rings.offer_chain(number * 3, &parts);
    }
    let begun = std::time::Instant::now();
    let before = clock::LOOKS.get();
    for _ in 0..20 {
        let done = bench.block.process(0, &mut queue, &ram);
        assert_eq!(done, Ok(Progress::More));
        assert_ne!(bench.block.last_look(), 0);
    }
    // And one at the beginning of the first.
    assert_eq!(clock::LOOKS.get() - before, 21);
    bench.block.end_turn();
    let all = bench.block.counters.read_times.sum();
    assert!(u128::from(all) <= begun.elapsed().as_micros());
    assert_eq!(bench.block.counters.reads.get(), 20);
}

#[test]
fn update_when_disk_is_new_tells_its_capacity_and_gives_back_the_old() {
    let mut bench = bench(8, false);
    let updated = bench.block.update(Update {
        disk: Some(Box::new(Disk::new(file(3), false).unwrap())),
        reset: None,
        limits: RateLimiterUpdate::default(),
        number: 0,
    });
    let mut capacity = [0; 8];
    updated.config.unwrap().read(field::CAPACITY, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), 3);
    assert_eq!(
        updated
            .replaced
            .unwrap()
            .downcast::<Disk>()
            .unwrap()
            .sectors(),
        8
    );
    assert_eq!(bench.request(IN, 3, 512, true), (0, status::IOERR));
}

impl Bench {
    /// A request with one range.
    fn range(&mut self, kind: u32, sector: u64, sectors: u32, flags: u32) -> (u32, u8) {
        self.header(kind, 0);
        let mut range = [0; 16];
        range[..8].copy_from_slice(&sector.to_le_bytes());
        range[8..12].copy_from_slice(&sectors.to_le_bytes());
        range[12..].copy_from_slice(&flags.to_le_bytes());
        self.ram.write_slice(&range, GuestAddress(DATA)).unwrap();
        self.serve(&[(HEAD, 16, false), (DATA, 16, false), (STATUS, 1, true)])
    }

    /// Blocks of 512 bytes that the file takes on the host.
    fn allocated(&self) -> u64 {
        std::os::unix::fs::MetadataExt::blocks(&self.file.metadata().unwrap())
    }
}

#[test]
fn ranges_when_discarded_or_zeroed_leave_holes_and_zeros() {
    for kind in [DISCARD, WRITE_ZEROES] {
        let mut bench = bench(64, false);
        bench.file.sync_all().unwrap();
        let before = bench.allocated();
        let flags = u32::from(kind == WRITE_ZEROES);
        assert_eq!(bench.range(kind, 8, 16, flags), (1, status::OK));
        let disk = bench.on_disk();
        assert_eq!(disk.len(), 64 * 512);
        assert_eq!(disk[8 * 512..24 * 512], [0; 16 * 512]);
        assert_eq!((disk[8 * 512 - 1], disk[24 * 512]), (8, 25));
        assert_eq!(bench.allocated(), before - 16);
    }
    // Without leave to give the space back it is kept.
    let mut bench = bench(64, false);
    bench.file.sync_all().unwrap();
    let before = bench.allocated();
    assert_eq!(bench.range(WRITE_ZEROES, 8, 16, 0), (1, status::OK));
    assert_eq!(bench.on_disk()[8 * 512..24 * 512], [0; 16 * 512]);
    assert_eq!(bench.allocated(), before);
    assert_eq!(bench.block.counters.write_zeroes.get(), 1);
}

#[test]
fn zeros_when_they_have_to_be_written_are_written_in_bounded_units() {
    // A file system that gives space back, and does not make bytes 0 by itself.
    let Ok(temp) = TempFile::new_in(std::path::Path::new("/dev/shm")) else {
        return;
    };
    let file = temp.into_file();
    (&file).write_all(&[0xff; 6 << 20]).unwrap();
    let mut bench = bench_of(file, false);
    bench.header(WRITE_ZEROES, 0);
    let (sector, sectors) = (1024u64, 8192u32);
    let mut range = [0; 16];
    range[..8].copy_from_slice(&sector.to_le_bytes());
    range[8..12].copy_from_slice(&sectors.to_le_bytes());
    bench.ram.write_slice(&range, GuestAddress(DATA)).unwrap();
    let ram = bench.ram.clone();
    let mut rings = Rings::new(&ram, BASE, 256);
    let state = QueueState::fresh(rings.layout());
    let mut queue = Queue::new(&state, 256, feature::COMMON, &ram).unwrap();
    rings.offer_chain(
        0,
        &[(HEAD, 16, false), (DATA, 16, false), (STATUS, 1, true)],
    );
    for _ in 0..3 {
        let done = bench.block.process(0, &mut queue, &ram);
        assert_eq!((done, rings.used_index()), (Ok(Progress::More), 0));
        assert_eq!(bench.block.in_flight(), 0);
    }
    assert_eq!(bench.until_used(&mut queue, &mut rings), (0, 1));
    let disk = bench.on_disk();
    let zeroed = 1024 * 512..9216 * 512;
    for (at, bytes) in disk.chunks(512).enumerate() {
        let expected = if zeroed.contains(&(at * 512)) {
            0
        } else {
            0xff
        };
        assert!(bytes.iter().all(|byte| *byte == expected), "sector {at}");
    }
}

#[test]
fn ranges_when_wrong_are_refused_and_change_nothing() {
    for (kind, sector, sectors, flags, status) in [
        (DISCARD, 60, 5, 0, status::IOERR),
        (DISCARD, u64::MAX, 1, 0, status::IOERR),
        (DISCARD, 0, DISCARD_MAX + 1, 0, status::IOERR),
        (DISCARD, 0, 8, 1, status::UNSUPP),
        (WRITE_ZEROES, 64, 1, 0, status::IOERR),
        (WRITE_ZEROES, 0, ZEROES_MAX + 1, 0, status::IOERR),
        (WRITE_ZEROES, 0, 8, 2, status::UNSUPP),
    ] {
        let mut bench = bench(64, false);
        let before = bench.on_disk();
        let served = bench.range(kind, sector, sectors, flags);
        assert_eq!(served, (1, status), "{kind} {sector} {sectors} {flags}");
        assert_eq!(bench.on_disk(), before);
    }
    let mut read_only = bench(64, true);
    assert_eq!(
        read_only.block.features() & (bit::DISCARD | bit::WRITE_ZEROES),
        0
    );
    read_only.block.activate(u64::MAX).unwrap();
    assert_eq!(read_only.range(DISCARD, 0, 8, 0), (1, status::IOERR));
    let mut not_accepted = bench(64, false);
    not_accepted.block.activate(feature::COMMON).unwrap();
    assert_eq!(not_accepted.range(DISCARD, 0, 8, 0), (1, status::UNSUPP));
    assert_eq!(
        not_accepted.range(WRITE_ZEROES, 0, 8, 0),
        (1, status::UNSUPP)
    );
}
