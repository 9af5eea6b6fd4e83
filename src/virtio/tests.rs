//! What devices write into guest memory counts for the next diff: one test for each place that writes.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::net::UnixDatagram;

use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::tempfile::TempFile;

use super::block::{Block, BlockState, Disk};
use super::net::{Net, NetState};
use super::queue::{Chain, Popped, QueueState};
use super::segment::{Segment, copy_out};
use super::testing::Rings;
use super::*;
use crate::memory::{Backing, Memory, PAGE, Pages};
use crate::rate_limiter::RateLimiter;
use crate::sys::tap::Tap;

const BASE: u64 = 0x10000;
const HEAD: u64 = 0x20000;
const STATUS: u64 = 0x28000;
const DATA: u64 = 0x40000;
const USED_PAGE: u64 = (BASE + 0x3000) / PAGE;

/// Guest memory whose writes by the monitor are logged; 4 MiB.
fn logged() -> Memory {
    Memory::new(4, Pages::Ordinary, Backing::Anonymous, true).unwrap()
}

/// The pages that are marked.
fn marked(ram: &Ram) -> Vec<u64> {
    let mut marked = Vec::new();
    for region in ram.iter() {
        let pages = 0..region.len() / PAGE;
        let log = region.bitmap();
        marked.extend(pages.filter(|page| log.dirty_at((page * PAGE) as usize)));
    }
    marked
}

/// The pages that `act` marks: what the driver has written before is KVM's to log.
fn marked_by(memory: &Memory, act: impl FnOnce()) -> Vec<u64> {
    memory.forget_writes();
    act();
    marked(memory.ram())
}

fn queue(rings: &Rings<'_>, features: u64) -> Queue {
    let state = QueueState::fresh(rings.layout());
    Queue::new(&state, 256, features, rings.ram).unwrap()
}

fn page(address: u64) -> u64 {
    address / PAGE
}

#[test]
fn rings_when_written_are_marked() {
    let memory = logged();
    let ram = memory.ram();
    let rings = Rings::new(ram, BASE, 256);
    for features in [0, feature::EVENT_IDX] {
        let mut queue = queue(&rings, features);
        let mut chain = Chain::new();
        // The driver is asked to kick: a flag, or an index behind the used ring.
        let asked = marked_by(&memory, || {
            assert_eq!(queue.pop(ram, &mut chain), Ok(Popped::Empty));
            assert_eq!(queue.arm(ram), Ok(false));
        });
        assert_eq!(asked, [USED_PAGE]);
        rings.offer_chain(0, &[(DATA, 1, true)]);
        let declined = marked_by(&memory, || {
            assert_eq!(queue.pop(ram, &mut chain), Ok(Popped::Chain));
        });
        assert!(declined.is_empty() || declined == [USED_PAGE]);
        let staged = marked_by(&memory, || queue.stage_used(ram, 0, 1).unwrap());
        assert_eq!(staged, [USED_PAGE]);
        let published = marked_by(&memory, || queue.publish_used(ram).unwrap());
        assert_eq!(published, [USED_PAGE]);
        rings.set_avail_index(0);
    }
}

#[test]
fn copies_when_written_are_marked_by_segment() {
    let memory = logged();
    let ram = memory.ram();
    let segments = [(DATA + PAGE - 1, 2), (DATA + 8 * PAGE, 1)].map(|(addr, len)| Segment {
        addr: GuestAddress(addr),
        len,
    });
    let copied = marked_by(&memory, || {
        assert!(copy_out(ram, segments.into_iter(), b"abc"));
    });
    assert_eq!(copied, [page(DATA), page(DATA) + 1, page(DATA) + 8]);
}

#[test]
fn disk_reads_and_their_status_when_written_are_marked() {
    let memory = logged();
    let ram = memory.ram();
    let mut file: File = TempFile::new().unwrap().into_file();
    file.write_all(&[7; 8 * 512]).unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    let disk = Disk::new(file, false).unwrap();
    let limiter = RateLimiter::default();
    let mut block = Block::new(disk, "disk", true, limiter, &BlockState::default(), 0).unwrap();
    let rings = Rings::new(ram, BASE, 256);
    let mut queue = queue(&rings, 0);
    // Two pieces, the first across two pages.
    ram.write_slice(&[0; 16], GuestAddress(HEAD)).unwrap();
    let data = [
        (DATA + PAGE - 512, 1024, true),
        (DATA + 4 * PAGE, 512, true),
    ];
    let [first, second] = data;
    rings.offer_chain(0, &[(HEAD, 16, false), first, second, (STATUS, 1, true)]);
    let read = marked_by(&memory, || {
        assert_eq!(block.process(0, &mut queue, ram), Ok(Progress::More));
    });
    let data = page(DATA);
    assert_eq!(read, [USED_PAGE, page(STATUS), data, data + 1, data + 4]);
    // A write reads guest memory only.
    ram.write_obj(1u32, GuestAddress(HEAD)).unwrap();
    rings.offer_chain(
        0,
        &[(HEAD, 16, false), (DATA, 512, false), (STATUS, 1, true)],
    );
    let written = marked_by(&memory, || {
        assert_eq!(block.process(0, &mut queue, ram), Ok(Progress::More));
    });
    assert_eq!(written, [USED_PAGE, page(STATUS)]);
    // The serial number.
    ram.write_obj(8u32, GuestAddress(HEAD)).unwrap();
    rings.offer_chain(0, &[(HEAD, 16, false), (DATA, 20, true), (STATUS, 1, true)]);
    let identified = marked_by(&memory, || {
        assert_eq!(block.process(0, &mut queue, ram), Ok(Progress::More));
    });
    assert_eq!(identified, [USED_PAGE, page(STATUS), data]);
}

#[test]
fn frames_when_received_are_marked() {
    let memory = logged();
    let ram = memory.ram();
    let (near, far) = UnixDatagram::pair().unwrap();
    let (limiter, state) = (RateLimiter::default, NetState::default());
    let tap = Tap::fake(near);
    let mut net = Net::new(tap, None, None, limiter(), limiter(), &state, 0).unwrap();
    // MRG_RXBUF and GUEST_TSO4.
    net.activate(feature::COMMON | 1 << 15 | 1 << 7).unwrap();
    let rings = Rings::new(ram, BASE, 256);
    let mut queue = queue(&rings, 0);
    rings.offer_chain(0, &[(DATA, 2 * PAGE as u32, true)]);
    far.send(&[1; 3 * PAGE as usize]).unwrap();
    let data = page(DATA);
    let begun = marked_by(&memory, || {
        assert_eq!(net.process(0, &mut queue, ram), Ok(Progress::More));
    });
    // The driver was asked to kick when there were no more buffers.
    assert_eq!(begun, [USED_PAGE, data, data + 1]);
    // The end of a frame whose buffers had run out, and the number of buffers in its first.
    rings.offer_chain(1, &[(DATA + 16 * PAGE, 2 * PAGE as u32, true)]);
    let ended = marked_by(&memory, || {
        assert_eq!(net.process(0, &mut queue, ram), Ok(Progress::More));
    });
    assert_eq!(rings.used_index(), 2);
    assert_eq!(ended, [USED_PAGE, data, data + 16]);
    // What the guest sends is only read.
    rings.offer_chain(2, &[(DATA, 1000, false)]);
    let sent = marked_by(&memory, || {
        assert_eq!(net.process(1, &mut queue, ram), Ok(Progress::More));
    });
    assert_eq!(sent, [USED_PAGE]);
}
