//! What holds for any numbers of a guest's.

use proptest::collection::vec;
use proptest::prelude::*;
use vmm_sys_util::tempfile::TempFile;

use super::block::Disk;
use super::queue::{Chain, Popped, QueueState};
use super::testing::{Rings, ram};
use super::{BrokenRing, ConfigSpace, Queue, feature};
use crate::properties::hold;

#[test]
fn config_space_when_read_anywhere_has_what_was_put_there_and_zeros() {
    let field = (
        prop_oneof![0..70usize, any::<usize>()],
        vec(any::<u8>(), 0..80),
    );
    let read = (prop_oneof![0..70usize, any::<usize>()], 0..80usize);
    hold((vec(field, 0..4), vec(read, 1..8)), |(fields, reads)| {
        let mut model = [0u8; 64];
        let mut config = ConfigSpace::new();
        for (offset, bytes) in fields {
            config = config.with(offset, &bytes);
            for (at, byte) in bytes.iter().enumerate() {
                let at = offset.checked_add(at);
                if let Some(place) = at.and_then(|at| model.get_mut(at)) {
                    *place = *byte;
                }
            }
        }
        for (offset, len) in reads {
            let mut data = vec![0xee; len];
            config.read(offset, &mut data);
            for (at, byte) in data.iter().enumerate() {
                let at = offset.checked_add(at);
                let expected = at.and_then(|at| model.get(at)).copied().unwrap_or(0);
                assert_eq!(*byte, expected, "{offset} {at:?}");
            }
        }
    });
}

#[test]
fn sectors_when_any_are_named_are_found_just_where_the_disk_has_all_of_them() {
    let number = || {
        prop_oneof![
            0..100u64,
            0..1u64 << 32,
            any::<u64>(),
            (0..64u32).prop_map(|bit| 1 << bit)
        ]
    };
    let bytes = prop_oneof![0..100_000u64, 0..1u64 << 42];
    hold(
        (bytes, vec((number(), number()), 1..20)),
        |(size, ranges)| {
            let file = TempFile::new().unwrap().into_file();
            file.set_len(size).unwrap();
            let disk = Disk::new(file, false).unwrap();
            for (first, len) in ranges {
                // Whole sectors more often than not.
                for len in [len, len & !511] {
                    let at = u128::from(first) * 512;
                    let end = at + u128::from(len);
                    let fits = len % 512 == 0 && end <= u128::from(size / 512 * 512);
                    let expected = fits.then_some(at as u64);
                    assert_eq!(disk.locate(first, len), expected, "{size} {first} {len}");
                }
            }
        },
    );
}

const BASE: u64 = 0x1_0000;

/// A queue of `size` entries at these indices.
fn queue(rings: &Rings<'_>, next_avail: u16, next_used: u16) -> Queue {
    let state = QueueState {
        layout: rings.layout(),
        next_avail,
        next_used,
    };
    let features = feature::VERSION_1 | feature::EVENT_IDX;
    Queue::new(&state, 256, features, rings.ram).unwrap()
}

/// No prover for Rust is at hand (kani): all indices that a driver may write, for the smallest and the largest
/// queue, at the places where 16 bits wrap.
#[test]
fn queue_when_the_drivers_index_is_anything_takes_what_is_offered_and_nothing_else() {
    let ram = ram();
    for size in [1, 2, 256] {
        let rings = Rings::new(&ram, BASE, size);
        for head in 0..size {
            rings.describe(head, 0x8_0000, 1, 0, 0);
        }
        for next in [0, 1, 0x7fff, 0x8000, 0xffff] {
            for index in 0..=u16::MAX {
                rings.set_avail_index(index);
                let mut queue = queue(&rings, next, 0);
                let offered = index.wrapping_sub(next);
                assert_eq!(queue.has_chain(&ram), offered != 0);
                let popped = queue.pop(&ram, &mut Chain::new());
                let expected = match offered {
                    0 => Ok(Popped::Empty),
                    1.. if offered <= size => Ok(Popped::Chain),
                    _ => Err(BrokenRing::AvailIndex),
                };
                assert_eq!(popped, expected, "{size} {next} {index}");
            }
        }
    }
}

/// The same of the index after which the driver wants an interrupt (virtio 1.2, 2.7.7.1).
#[test]
fn interrupt_when_the_drivers_event_is_anything_is_sent_just_when_it_was_passed() {
    let ram = ram();
    for size in [1u16, 2, 256] {
        let rings = Rings::new(&ram, BASE, size);
        for next_used in [0u16, 1, 0x7fff, 0x8000, 0xffff] {
            let mut queue = queue(&rings, 0, next_used);
            for event in 0..=u16::MAX {
                rings.set_used_event(event);
                // As many as the queue has were published, up to `next_used`.
                queue.announce_again();
                let passed = (1..=size).any(|before| next_used.wrapping_sub(before) == event);
                let wanted = queue.wants_interrupt(&ram).unwrap();
                assert_eq!(wanted, passed, "{size} {next_used} {event}");
                assert!(!queue.wants_interrupt(&ram).unwrap());
            }
        }
    }
}
