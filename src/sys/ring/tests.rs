use super::*;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use vm_memory::{Bytes, GuestRegionMmap};
use vmm_sys_util::tempfile::TempFile;

use super::super::fd::{self, Interest};
use super::super::testing::allocator_calls;

type Memory = GuestMemoryMmap<()>;

const ALL: &[Operation] = &[
    Operation::Transfer,
    Operation::Sync,
    Operation::Allocate,
    Operation::ReplaceFile,
];

/// Two regions of 64 KiB that touch.
fn memory() -> Memory {
    Memory::from_ranges(&[(GuestAddress(0), 0x10000), (GuestAddress(0x10000), 0x10000)]).unwrap()
}

fn file_of(bytes: &[u8]) -> File {
    let file = TempFile::new().unwrap().into_file();
    file.write_all_at(bytes, 0).unwrap();
    file
}

fn pattern(len: u32) -> Vec<u8> {
    (0..len).map(|i| (i % 251) as u8).collect()
}

fn ring(file: &impl AsFd, operations: &[Operation], memory: &Memory) -> Ring<()> {
    let design = Design {
        slots: 8,
        pieces: 4,
        operations,
        files: &[file.as_fd()],
        workers: 2,
        has_aside: false,
    };
    let mut ring = Ring::new(&design).unwrap();
    ring.enable(memory).unwrap();
    ring
}

/// Waits for one request to end.
fn wait(ring: &mut Ring<()>) -> Completion {
    ring.submit().unwrap();
    loop {
        if let Some(completion) = ring.reap() {
            return completion;
        }
        let mut rings = [Interest::read(ring.completed())];
        fd::wait(&mut rings, None).unwrap();
    }
}

fn moved(ring: &mut Ring<()>, slot: u16) -> u32 {
    let Completion {
        slot: ended,
        result,
    } = wait(ring);
    assert_eq!(ended, slot);
    result.unwrap()
}

#[test]
fn transfers_when_in_pieces_over_regions_move_all_bytes() {
    let memory = memory();
    let data = pattern(0x5000);
    let file = file_of(&data);
    let mut ring = ring(&file, ALL, &memory);
    let pieces = [(GuestAddress(0xf000), 0x2000), (GuestAddress(0x100), 0x700)];
    let before = allocator_calls();
    ring.push(3, Transfer::Read, 0, 0x123, pieces.into_iter())
        .unwrap();
    assert_eq!(moved(&mut ring, 3), 0x2700);
    assert_eq!(allocator_calls(), before);
    let mut back = vec![0; 0x2000];
    memory.read_slice(&mut back, GuestAddress(0xf000)).unwrap();
    assert_eq!(back, data[0x123..0x2123]);
    memory
        .read_slice(&mut back[..0x700], GuestAddress(0x100))
        .unwrap();
    assert_eq!(back[..0x700], data[0x2123..0x2823]);

    memory
        .write_slice(&[0xaa; 0x1000], GuestAddress(0x2000))
        .unwrap();
    let one = [(GuestAddress(0x2000), 0x1000)];
    ring.push(3, Transfer::Write, 0, 0x800, one.into_iter())
        .unwrap();
    assert_eq!(moved(&mut ring, 3), 0x1000);
    ring.push_sync(0, 0).unwrap();
    assert_eq!(moved(&mut ring, 0), 0);
    let hole = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    ring.push_allocate(1, 0, hole, 0x1000, 0x100).unwrap();
    assert_eq!(moved(&mut ring, 1), 0);
    let mut expected = data;
    expected[0x800..0x1800].fill(0xaa);
    expected[0x1000..0x1100].fill(0);
    let mut on_disk = vec![0; expected.len()];
    file.read_exact_at(&mut on_disk, 0).unwrap();
    assert!(on_disk == expected);
}

#[test]
fn push_when_slot_is_taken_or_memory_is_not_there_is_refused() {
    let memory = memory();
    let (reader, _writer) = UnixStream::pair().unwrap();
    let mut ring = ring(&reader, ALL, &memory);
    let refused =
        |pushed: io::Result<()>| pushed.unwrap_err().kind() == io::ErrorKind::InvalidInput;
    let piece = |at, len| [(GuestAddress(at), len)].into_iter();
    assert!(refused(ring.push(8, Transfer::Read, 0, 0, piece(0, 1))));
    assert!(refused(ring.push(
        0,
        Transfer::Read,
        0,
        0,
        piece(0x1ffff, 2)
    )));
    let five = [(GuestAddress(0), 1); 5];
    assert!(refused(ring.push(
        0,
        Transfer::Read,
        0,
        0,
        five.into_iter()
    )));
    assert_eq!(ring.in_flight(), 0);
    ring.push(0, Transfer::Read, 0, 0, piece(0, 1)).unwrap();
    assert!(refused(ring.push(0, Transfer::Read, 0, 0, piece(0, 1))));
    assert!(refused(ring.push_sync(0, 0)));
    assert_eq!(ring.in_flight(), 1);
    assert!(ring.replace_file(0, &reader).is_err());
}

#[test]
fn completion_when_it_comes_later_rings_the_eventfd() {
    let memory = memory();
    let (reader, mut writer) = UnixStream::pair().unwrap();
    let mut ring = ring(&reader, &[Operation::Transfer], &memory);
    for slot in 0..8 {
        let piece = [(GuestAddress(u64::from(slot)), 1)];
        ring.push(slot, Transfer::Read, 0, 0, piece.into_iter())
            .unwrap();
    }
    ring.submit().unwrap();
    assert!(ring.reap().is_none());
    for left in (0..8).rev() {
        writer.write_all(b"!").unwrap();
        let mut rings = [Interest::read(ring.completed())];
        fd::wait(&mut rings, None).unwrap();
        assert!(ring.has_completions());
        assert_eq!(ring.reap().unwrap().result.unwrap(), 1);
        assert!(ring.reap().is_none());
        assert_eq!(ring.in_flight(), left);
        // Read, so that only the next one makes it readable.
        ring.completed.read().unwrap();
    }
}

#[test]
fn ring_when_dropped_with_requests_under_way_keeps_the_memory() {
    let region = GuestRegionMmap::from_range(GuestAddress(0), 0x1000, None).unwrap();
    let region = Arc::new(region);
    let memory = Memory::from_arc_regions(vec![Arc::clone(&region)]).unwrap();
    let region = Arc::downgrade(&region);
    let (reader, mut writer) = UnixStream::pair().unwrap();
    let mut ring = ring(&reader, &[Operation::Transfer], &memory);
    let piece = [(GuestAddress(0), 1)];
    ring.push(0, Transfer::Read, 0, 0, piece.into_iter())
        .unwrap();
    ring.submit().unwrap();
    drop((ring, memory));
    assert!(region.upgrade().is_some());
    writer.write_all(b"!").unwrap();
}

/// Pushes any entry at all, as a thread could that was led astray.
fn attack(ring: &mut Ring<()>, entry: squeue::Entry) -> i32 {
    let entry = entry.user_data(0);
    // SAFETY: the entries of these tests name no memory, or statics, that the kernel would write to.
    unsafe { ring.ring.submission().push(&entry).unwrap() };
    ring.slots.hold(0);
    ring.in_flight += 1;
    let result = wait(ring).result;
    result.map_or_else(|e| -e.raw_os_error().unwrap(), |moved| moved as i32)
}

#[test]
fn restricted_ring_when_attacked_refuses_all_that_it_is_not_for() {
    let memory = memory();
    let file = file_of(&[1; 4096]);
    let path = c"/etc/passwd".as_ptr();
    let here = types::Fd(libc::AT_FDCWD);
    let raw = types::Fd(file.as_raw_fd());
    static FDS: [RawFd; 1] = [0];
    let forbidden = || {
        [
            ("nop", opcode::Nop::new().build()),
            ("open", opcode::OpenAt::new(here, path).build()),
            ("close", opcode::Close::new(raw).build()),
            ("socket", opcode::Socket::new(1, 1, 0).build()),
            ("splice", opcode::Splice::new(raw, 0, raw, 0, 1).build()),
            ("unlink", opcode::UnlinkAt::new(here, path).build()),
            (
                "accept",
                opcode::Accept::new(raw, std::ptr::null_mut(), std::ptr::null_mut()).build(),
            ),
            ("send", opcode::Send::new(raw, path.cast(), 1).build()),
            ("poll", opcode::PollAdd::new(raw, 1).build()),
            ("madvise", opcode::Madvise::new(path.cast(), 1, 0).build()),
            (
                "fixed buffer",
                opcode::ReadFixed::new(types::Fixed(0), std::ptr::null_mut(), 1, 0).build(),
            ),
            ("message", opcode::MsgRingData::new(raw, 0, 0, None).build()),
        ]
    };
    for operations in [ALL, &[Operation::Transfer]] {
        let mut ring = ring(&file, operations, &memory);
        for (name, entry) in forbidden() {
            assert_eq!(attack(&mut ring, entry), -libc::EACCES, "{name}");
        }
        let read = || opcode::Fsync::new(types::Fixed(0)).build();
        let linked = read().flags(squeue::Flags::IO_LINK);
        assert_eq!(attack(&mut ring, linked), -libc::EACCES);
        let asynchronous = read().flags(squeue::Flags::ASYNC);
        assert_eq!(attack(&mut ring, asynchronous), -libc::EACCES);
    }
    // What one ring is for is not for the other.
    let mut narrow = ring(&file, &[Operation::Transfer], &memory);
    for (name, entry) in [
        ("sync", opcode::Fsync::new(types::Fixed(0)).build()),
        (
            "allocate",
            opcode::Fallocate::new(types::Fixed(0), 1).build(),
        ),
        ("files", opcode::FilesUpdate::new(FDS.as_ptr(), 1).build()),
        (
            "not registered",
            opcode::Read::new(raw, std::ptr::null_mut(), 1).build(),
        ),
    ] {
        assert_eq!(attack(&mut narrow, entry), -libc::EACCES, "{name}");
    }
    // Nothing can be changed about it any more, not even by its own thread.
    for changed in [
        narrow
            .ring
            .submitter()
            .register_files_update(0, &FDS)
            .map(drop),
        narrow.ring.submitter().unregister_files(),
        narrow.ring.submitter().unregister_eventfd(),
        narrow.ring.submitter().register_personality().map(drop),
        narrow.ring.submitter().register_enable_rings(),
        narrow
            .ring
            .submitter()
            .register_restrictions(&mut [Restriction::sqe_op(0)]),
    ] {
        assert!(changed.is_err());
    }
    // It still does what it is for.
    let piece = [(GuestAddress(0), 1)];
    narrow
        .push(0, Transfer::Read, 0, 0, piece.into_iter())
        .unwrap();
    assert_eq!(moved(&mut narrow, 0), 1);
}

#[test]
fn ring_when_used_by_another_thread_refuses() {
    let memory = memory();
    let file = file_of(&[1; 4096]);
    let mut ring = ring(&file, ALL, &memory);
    let refused = thread::spawn(move || {
        let piece = [(GuestAddress(0), 1)];
        ring.push(0, Transfer::Read, 0, 0, piece.into_iter())
            .unwrap();
        (ring.submit().unwrap_err(), ring)
    });
    let (refused, _ring) = refused.join().unwrap();
    assert_eq!(refused.raw_os_error(), Some(libc::EEXIST));
}

#[test]
fn replaced_file_when_pushed_to_is_the_new_one() {
    let memory = memory();
    let (old, new) = (file_of(&[1; 512]), file_of(&[2; 512]));
    let mut ring = ring(&old, ALL, &memory);
    ring.replace_file(0, &new).unwrap();
    assert_eq!(ring.in_flight(), 0);
    drop(old);
    let piece = [(GuestAddress(0), 512)];
    ring.push(0, Transfer::Write, 0, 0, piece.into_iter())
        .unwrap();
    assert_eq!(moved(&mut ring, 0), 512);
    let mut back = Vec::new();
    let mut new = new;
    new.read_to_end(&mut back).unwrap();
    assert_eq!(back, [0; 512]);
}

#[test]
fn request_when_pushed_aside_is_done_by_a_ring_that_was_made_for_it_only() {
    let memory = memory();
    let file = file_of(&pattern(512));
    let mut refusing = ring(&file, ALL, &memory);
    let piece = || [(GuestAddress(0), 512)].into_iter();
    refusing
        .push_aside(0, Transfer::Read, 0, 0, piece())
        .unwrap();
    let refused = wait(&mut refusing).result.unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EACCES));
    let mut ring = Ring::new(&Design {
        slots: 8,
        pieces: 4,
        operations: &[Operation::Transfer],
        files: &[file.as_fd()],
        workers: 2,
        has_aside: true,
    })
    .unwrap();
    ring.enable(&memory).unwrap();
    ring.push_aside(3, Transfer::Read, 0, 0, piece()).unwrap();
    assert_eq!(moved(&mut ring, 3), 512);
    let mut back = [0; 512];
    memory.read_slice(&mut back, GuestAddress(0)).unwrap();
    assert_eq!(back[..], pattern(512));
    // What else was not allowed is not allowed here.
    let linked = opcode::Read::new(types::Fixed(0), std::ptr::null_mut(), 1).build();
    let linked = linked.flags(squeue::Flags::IO_LINK | squeue::Flags::FIXED_FILE);
    assert_eq!(attack(&mut ring, linked), -libc::EACCES);
}
