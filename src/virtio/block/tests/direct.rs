//! Disks that go past the host's page cache: on the file system of the build folder, which has to be on storage.

use super::*;
use crate::overlay::tests::Random;
use crate::sys;
use crate::sys::io::{Access, Alignment};
use std::collections::BTreeSet;
use std::os::unix::fs::FileExt;

/// A file of `len` bytes on storage, and the same opened so that it goes past the page cache; none, with a message,
/// where the build folder is in memory.
fn on_storage(len: usize) -> Option<(File, File)> {
    let program = std::env::current_exe().unwrap();
    let folder = program.parent().unwrap();
    let temp = TempFile::new_in(folder).unwrap();
    let again = File::options().read(true).write(true).open(temp.as_path());
    let (file, direct) = (temp.into_file(), again.unwrap());
    let content: Vec<u8> = (0..len).map(|i| (i / 512 % 251) as u8 + 1).collect();
    file.write_all_at(&content, 0).unwrap();
    if Access::of(&file).unwrap() == Access::InMemory {
        eprintln!("SKIPPED: {} is in memory", folder.display());
        return None;
    }
    sys::fd::set_direct(&direct).unwrap();
    Some((file, direct))
}

fn bench(file: File, direct: File, alignment: Option<Alignment>) -> Bench {
    let mut disk = Disk::new(direct, false).unwrap().past_cache();
    assert_eq!(disk.file(disk::FileIndex::DATA).unwrap().1, Access::Direct);
    assert_ne!(disk.alignment(), Alignment::NONE);
    if let Some(alignment) = alignment {
        disk.set_alignment(alignment);
    }
    let (limiter, state) = (RateLimiter::default(), BlockState::default());
    let mut block = Block::new(disk, "direct", true, limiter, &state, 0).unwrap();
    let ram = ram();
    block.enter_thread(&ram, false).unwrap();
    block.activate(block.features()).unwrap();
    Bench { ram, file, block }
}

/// A queue of 256 descriptors, from both ends.
fn rings(ram: &Ram) -> (Rings<'_>, Queue) {
    let rings = Rings::new(ram, BASE, 256);
    let state = QueueState::fresh(rings.layout());
    let queue = Queue::new(&state, 256, feature::COMMON, ram).unwrap();
    (rings, queue)
}

#[test]
fn transfers_when_they_may_wait_go_through_the_ring() {
    let Some((file, direct)) = on_storage(1 << 20) else {
        return;
    };
    let mut bench = bench(file, direct, None);
    let ram = bench.ram.clone();
    let (mut rings, mut queue) = rings(&ram);
    let content: Vec<u8> = (0..8192u32).map(|i| (i % 249) as u8).collect();
    ram.write_slice(&content, GuestAddress(0x40000)).unwrap();
    for (kind, at, expected) in [(OUT, 0x40000, 1), (IN, 0x50000, 8193)] {
        bench.header(kind, 64);
        let is_read = kind == IN;
        let parts = [
            (HEAD, 16, false),
            (at, 4096, is_read),
            (at + 0x2000 - 4096, 4096, is_read),
            (STATUS, 1, true),
        ];
        rings.offer_chain(0, &parts);
        let begun = bench.block.process(0, &mut queue, &ram);
        assert_eq!(begun, Ok(Progress::More));
        // It is in flight, and nothing has been waited for.
        assert_eq!(bench.block.in_flight(), 1);
        assert_eq!(rings.used_index(), rings.taken());
        assert_eq!(bench.until_used(&mut queue, &mut rings), (0, expected));
        assert_eq!(
            ram.read_obj::<u8>(GuestAddress(STATUS)).unwrap(),
            status::OK
        );
        assert_eq!(bench.block.in_flight(), 0);
    }
    assert_eq!(bench.guest(0x50000, 8192), content);
    assert_eq!(bench.on_disk()[64 * 512..80 * 512], content);
}

/// A request of a batch.
struct Asked {
    kind: u32,
    sector: u64,
    sectors: u64,
    memory: Vec<(u64, u32)>,
    head: u16,
}

/// Makes a batch of requests of which none writes what another one reads or writes, and offers it.
fn offer_batch(random: &mut Random, bench: &Bench, rings: &Rings<'_>, sectors: u64) -> Vec<Asked> {
    let mut asked: Vec<Asked> = Vec::new();
    let (mut written, mut read) = (BTreeSet::new(), BTreeSet::new());
    let (mut memory, mut descriptor) = (0x40000u64, 0u16);
    for number in 0..=random.below(20) {
        let kind = [IN, IN, OUT, OUT, WRITE_ZEROES, FLUSH][random.below(6) as usize];
        // Now and then more than a buffer holds.
        let most = if number == 0 { 600 } else { 24 };
        let count = 1 + random.below(most);
        let sector = random.below(sectors - count);
        let mut all = sector..sector + count;
        let is_free = match kind {
            IN => !all.any(|s| written.contains(&s)),
            FLUSH => true,
            _ => !all.any(|s| written.contains(&s) || read.contains(&s)),
        };
        if !is_free {
            continue;
        }
        match kind {
            IN => read.extend(sector..sector + count),
            FLUSH => {}
            _ => written.extend(sector..sector + count),
        }
        let base = 0x20000 + number * 0x100;
        let mut header = [0; 32];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..16].copy_from_slice(&sector.to_le_bytes());
        header[16..24].copy_from_slice(&sector.to_le_bytes());
        header[24..28].copy_from_slice(&(count as u32).to_le_bytes());
        header[28] = random.below(2) as u8;
        bench.ram.write_slice(&header, GuestAddress(base)).unwrap();
        bench
            .ram
            .write_obj(0xeeu8, GuestAddress(base + 64))
            .unwrap();
        let mut pieces = Vec::new();
        let mut left = count * 512;
        if number == 0 {
            memory = 0x20_0000;
        } else if memory >= 0x20_0000 {
            memory = 0x40000;
        }
        let odd = [1, 2, 4, 16, 512, 4096][random.below(6) as usize];
        while left > 0 && matches!(kind, IN | OUT) {
            memory = memory.next_multiple_of(4096) + odd % 4096;
            let len = match pieces.len() {
                4 => left,
                _ => left.min(odd * (1 + random.below(4096 / odd))),
            };
            pieces.push((memory, len as u32));
            let bytes: Vec<u8> = (0..len).map(|_| random.below(256) as u8).collect();
            bench.ram.write_slice(&bytes, GuestAddress(memory)).unwrap();
            memory += len;
            left -= len;
        }
        let mut parts = vec![(base, 16, false)];
        if kind == WRITE_ZEROES {
            parts.push((base + 16, 16, false));
        }
        parts.extend(pieces.iter().map(|(at, len)| (*at, *len, kind == IN)));
        parts.push((base + 64, 1, true));
        rings.offer_chain(descriptor, &parts);
        asked.push(Asked {
            kind,
            sector,
            sectors: count,
            memory: pieces,
            head: descriptor,
        });
        descriptor += parts.len() as u16;
    }
    asked
}

/// What the guest has in `pieces`.
fn gathered(bench: &Bench, pieces: &[(u64, u32)]) -> Vec<u8> {
    let parts = pieces.iter();
    parts
        .flat_map(|(at, len)| bench.guest(*at, *len as usize))
        .collect()
}

#[test]
fn requests_when_of_any_alignment_do_what_a_model_does() {
    const SECTORS: u64 = 2048;
    let page = Alignment {
        memory: 4096,
        file: 4096,
    };
    for alignment in [None, Some(page)] {
        let seed = Random::seed();
        eprintln!("MAYFLY_TEST_SEED={seed}");
        let mut random = Random::new(seed);
        let Some((file, direct)) = on_storage(SECTORS as usize * 512) else {
            return;
        };
        let mut bench = bench(file, direct, alignment);
        let mut model = bench.on_disk();
        let ram = bench.ram.clone();
        for round in 0..40 {
            let mut rings = Rings::new(&ram, BASE, 256);
            let state = QueueState::fresh(rings.layout());
            let mut queue = Queue::new(&state, 256, feature::COMMON, &ram).unwrap();
            let asked = offer_batch(&mut random, &bench, &rings, SECTORS);
            for _ in &asked {
                let (head, len) = bench.until_used(&mut queue, &mut rings);
                let one = asked
                    .iter()
                    .find(|one| u32::from(one.head) == head)
                    .unwrap();
                let expected = if one.kind == IN { one.sectors * 512 } else { 0 };
                assert_eq!(u64::from(len), expected + 1, "round {round}: {}", one.kind);
            }
            for one in &asked {
                let place = one.sector as usize * 512..(one.sector + one.sectors) as usize * 512;
                match one.kind {
                    OUT => model[place].copy_from_slice(&gathered(&bench, &one.memory)),
                    WRITE_ZEROES => model[place].fill(0),
                    IN => {
                        let read = gathered(&bench, &one.memory);
                        assert!(read == model[place], "round {round}: sector {}", one.sector);
                    }
                    _ => {}
                }
            }
            assert_eq!(bench.block.in_flight(), 0);
        }
        assert!(bench.on_disk() == model, "{alignment:?}");
        assert_eq!(bench.block.counters.failed.get(), 0);
        assert_ne!(bench.block.counters.writes.get(), 0);
    }
}

#[test]
fn buffers_when_all_are_taken_leave_requests_in_the_ring() {
    let Some((file, direct)) = on_storage(1 << 20) else {
        return;
    };
    let mut bench = bench(file, direct, None);
    let ram = bench.ram.clone();
    let (mut rings, mut queue) = rings(&ram);
    bench.header(IN, 5);
    for number in 0..20 {
        let memory = 0x40001 + u64::from(number) * 0x1000;
        let parts = [(HEAD, 16, false), (memory, 512, true), (STATUS, 1, true)];
        rings.offer_chain(number * 3, &parts);
    }
    while bench.block.process(0, &mut queue, &ram).unwrap() == Progress::More {
        assert!(bench.block.in_flight() <= 8);
    }
    let mut used = 0;
    while used < 20 {
        assert_eq!(bench.until_used(&mut queue, &mut rings).1, 513);
        used += 1;
    }
    for number in 0..20 {
        assert_eq!(bench.guest(0x40001 + number * 0x1000, 512), [6; 512]);
    }
    // A reset forgets what has not been returned.
    rings.offer_chain(
        0,
        &[(HEAD, 16, false), (0x40001, 512, true), (STATUS, 1, true)],
    );
    assert_eq!(bench.block.process(0, &mut queue, &ram), Ok(Progress::More));
    bench.block.end_turn();
    while bench.block.in_flight() > 0 {
        bench.block.backend(1);
    }
    bench.block.reset();
    assert_eq!(bench.request(IN, 7, 512, true), (513, status::OK));
}
