use super::super::testing::{INDIRECT, NEXT, Random, Rings, WRITE, ram};
use super::*;

const BASE: u64 = 0x10000;
const TABLE: u64 = 0x50000;
const DATA: u64 = 0x80000;

fn queue(rings: &Rings<'_>, features: u64) -> Queue {
    Queue::new(&QueueState::fresh(rings.layout()), 256, features, rings.ram).unwrap()
}

/// Writes an entry of an indirect table at [`TABLE`].
fn indirect(ram: &Ram, index: u64, descriptor: (u64, u32, u16, u16)) {
    let (addr, len, flags, next) = descriptor;
    let at = GuestAddress(TABLE + 16 * index);
    ram.write_obj(Descriptor::new(addr, len, flags, next), at)
        .unwrap();
}

#[test]
fn new_when_layout_is_impossible_refuses() {
    let ram = ram();
    let good = Rings::new(&ram, BASE, 16).layout();
    assert!(Queue::new(&QueueState::fresh(good), 256, 0, &ram).is_ok());
    let end = 1 << 20;
    let bad: Vec<(&str, QueueLayout)> = vec![
        ("size 0", QueueLayout { size: 0, ..good }),
        ("size no power of two", QueueLayout { size: 15, ..good }),
        ("size above the maximum", QueueLayout { size: 512, ..good }),
        (
            "size beyond 16 bits",
            QueueLayout {
                size: 0x10010,
                ..good
            },
        ),
        (
            "not ready",
            QueueLayout {
                ready: false,
                ..good
            },
        ),
        (
            "table misaligned",
            QueueLayout {
                descriptors: BASE + 8,
                ..good
            },
        ),
        (
            "avail misaligned",
            QueueLayout {
                avail: good.avail + 1,
                ..good
            },
        ),
        (
            "used misaligned",
            QueueLayout {
                used: good.used + 2,
                ..good
            },
        ),
        (
            "table across the end",
            QueueLayout {
                descriptors: end - 16 * 15,
                ..good
            },
        ),
        (
            "avail across the end",
            QueueLayout {
                avail: end - 36,
                ..good
            },
        ),
        (
            "used across the end",
            QueueLayout {
                used: end - 132,
                ..good
            },
        ),
        (
            "table in the hole",
            QueueLayout {
                descriptors: end + 0x1000,
                ..good
            },
        ),
        ("avail never set", QueueLayout { avail: 0, ..good }),
        (
            "table at the top",
            QueueLayout {
                descriptors: u64::MAX - 15,
                ..good
            },
        ),
        (
            "used at the top",
            QueueLayout {
                used: u64::MAX - 3,
                ..good
            },
        ),
    ];
    for (what, layout) in bad {
        let result = Queue::new(&QueueState::fresh(layout), 256, 0, &ram);
        assert_eq!(result.err(), Some(BrokenRing::Layout), "{what}");
    }
    let last = QueueLayout {
        descriptors: end - 256,
        avail: end - 256 - 38,
        used: end - 512 - 134 + 2,
        ..good
    };
    assert!(Queue::new(&QueueState::fresh(last), 256, 0, &ram).is_ok());
}

#[test]
fn pop_when_chain_is_whole_splits_it() {
    let ram = ram();
    let rings = Rings::new(&ram, BASE, 16);
    let mut queue = queue(&rings, 0);
    let mut chain = Chain::new();
    assert_eq!(queue.pop(&ram, &mut chain), Ok(Popped::Empty));
    rings.offer_chain(
        3,
        &[
            (DATA, 16, false),
            (DATA + 16, 4, false),
            (DATA + 99, 512, true),
        ],
    );
    assert_eq!(queue.pop(&ram, &mut chain), Ok(Popped::Chain));
    assert_eq!(chain.head(), 3);
    assert_eq!((chain.readable_len(), chain.writable_len()), (20, 512));
    assert_eq!(chain.readable().len(), 2);
    assert_eq!(
        chain.writable(),
        [Segment {
            addr: GuestAddress(DATA + 99),
            len: 512
        }]
    );
    assert_eq!(queue.pop(&ram, &mut chain), Ok(Popped::Empty));
    queue.rewind(1);
    assert_eq!(queue.pop(&ram, &mut chain), Ok(Popped::Chain));
    assert_eq!(chain.head(), 3);
}

#[test]
fn pop_when_chain_is_hostile_refuses_it_and_goes_on() {
    type Entry = (u64, u32, u16, u16);
    type Case = (&'static str, ChainError, Vec<Entry>, &'static [Entry]);
    let ram_end = 1 << 20;
    #[rustfmt::skip]
    let cases: Vec<Case> = vec![
        ("a loop of one", ChainError::TooLong, vec![(DATA, 1, NEXT, 0)], &[]),
        ("a loop of two", ChainError::TooLong, vec![(DATA, 1, NEXT, 1), (DATA, 1, NEXT, 0)], &[]),
        ("next past the table", ChainError::NextOutOfRange, vec![(DATA, 1, NEXT, 16)], &[]),
        ("next far past the table", ChainError::NextOutOfRange, vec![(DATA, 1, NEXT, 0xffff)], &[]),
        ("no bytes", ChainError::ZeroLength, vec![(DATA, 0, 0, 0)], &[]),
        ("no bytes at the end", ChainError::ZeroLength, vec![(DATA, 1, NEXT, 1), (DATA, 0, WRITE, 0)], &[]),
        ("in the hole", ChainError::OutsideRam, vec![(ram_end + 5, 1, 0, 0)], &[]),
        ("into the hole", ChainError::OutsideRam, vec![(ram_end - 1, 2, 0, 0)], &[]),
        ("over the hole", ChainError::OutsideRam, vec![(ram_end - 1, 0x10_0002, 0, 0)], &[]),
        ("4 GiB", ChainError::OutsideRam, vec![(DATA, u32::MAX, 0, 0)], &[]),
        ("past the top", ChainError::OutsideRam, vec![(u64::MAX, 1, 0, 0)], &[]),
        ("around the top", ChainError::OutsideRam, vec![(u64::MAX - 3, 8, 0, 0)], &[]),
        ("readable after writable", ChainError::ReadableAfterWritable, vec![(DATA, 1, NEXT | WRITE, 1), (DATA, 1, 0, 0)], &[]),
        ("indirect with next", ChainError::UnexpectedIndirect, vec![(TABLE, 16, INDIRECT | NEXT, 1)], &[]),
        ("empty table", ChainError::OddIndirect, vec![(TABLE, 0, INDIRECT, 0)], &[]),
        ("odd table", ChainError::OddIndirect, vec![(TABLE, 17, INDIRECT, 0)], &[]),
        ("short table", ChainError::OddIndirect, vec![(TABLE, 15, INDIRECT, 0)], &[]),
        ("table of 65536", ChainError::TooLong, vec![(0, 0x10_0000, INDIRECT, 0)], &[]),
        ("table in the hole", ChainError::OutsideRam, vec![(ram_end, 16, INDIRECT, 0)], &[]),
        ("table past the top", ChainError::OutsideRam, vec![(u64::MAX - 7, 32, INDIRECT, 0)], &[]),
        ("indirect in indirect", ChainError::NestedIndirect, vec![(TABLE, 32, INDIRECT, 0)], &[(TABLE, 16, INDIRECT, 0)]),
        ("a loop in a table", ChainError::TooLong, vec![(TABLE, 32, INDIRECT, 0)], &[(DATA, 1, NEXT, 1), (DATA, 1, NEXT, 0)]),
        ("next past the indirect table", ChainError::NextOutOfRange, vec![(TABLE, 16, INDIRECT, 0)], &[(DATA, 1, NEXT, 1)]),
    ];
    for (what, error, direct, table) in cases {
        let ram = ram();
        let mut rings = Rings::new(&ram, BASE, 16);
        let mut queue = queue(&rings, feature::INDIRECT_DESC);
        let mut chain = Chain::new();
        for (index, d) in (0..).zip(&direct) {
            rings.describe(index, d.0, d.1, d.2, d.3);
        }
        for (index, d) in (0..).zip(table) {
            indirect(&ram, index, *d);
        }
        rings.offer(0);
        rings.offer_chain(8, &[(DATA, 7, true)]);
        assert_eq!(
            queue.pop(&ram, &mut chain),
            Ok(Popped::Malformed(error)),
            "{what}"
        );
        assert_eq!(chain.head(), 0);
        queue.add_used(&ram, 0, 0).unwrap();
        assert_eq!(queue.pop(&ram, &mut chain), Ok(Popped::Chain), "{what}");
        assert_eq!((chain.head(), chain.writable_len()), (8, 7), "{what}");
        assert_eq!(rings.take(), Some((0, 0)));
    }
}

#[test]
fn pop_when_total_is_over_4_gib_refuses() {
    // 256 pieces of 16 MiB come to exactly 4 GiB: one byte too many for 32 bits.
    let ram = Ram::from_ranges(&[(GuestAddress(0), 32 << 20)]).unwrap();
    let rings = Rings::new(&ram, BASE, 256);
    let mut queue = queue(&rings, 0);
    for i in 0..256 {
        let flags = if i < 255 { NEXT } else { 0 };
        rings.describe(i, 0x100000, 16 << 20, flags, i + 1);
    }
    rings.offer(0);
    assert_eq!(
        queue.pop(&ram, &mut Chain::new()),
        Ok(Popped::Malformed(ChainError::TooLarge))
    );
}

#[test]
fn pop_when_indirect_is_longer_than_we_take_refuses() {
    let ram = ram();
    let rings = Rings::new(&ram, BASE, 16);
    let mut queue = queue(&rings, feature::INDIRECT_DESC);
    for i in 0..MAX_SEGMENTS as u64 + 1 {
        let flags = if i < MAX_SEGMENTS as u64 { NEXT } else { 0 };
        indirect(&ram, i, (DATA, 1, flags, i as u16 + 1));
    }
    let mut chain = Chain::new();
    rings.describe(0, TABLE, 16 * (MAX_SEGMENTS as u32 + 1), INDIRECT, 0);
    rings.offer(0);
    assert_eq!(
        queue.pop(&ram, &mut chain),
        Ok(Popped::Malformed(ChainError::TooLong))
    );
    indirect(&ram, MAX_SEGMENTS as u64 - 1, (DATA, 1, 0, 0));
    rings.offer(0);
    assert_eq!(queue.pop(&ram, &mut chain), Ok(Popped::Chain));
    assert_eq!(chain.readable().len(), MAX_SEGMENTS);
}

#[test]
fn pop_when_indirect_follows_direct_ones_takes_both() {
    let ram = ram();
    let rings = Rings::new(&ram, BASE, 16);
    let mut chain = Chain::new();
    rings.describe(0, DATA, 4, NEXT, 1);
    rings.describe(1, TABLE, 32, INDIRECT, 0);
    indirect(&ram, 0, (DATA, 5, NEXT, 1));
    indirect(&ram, 1, (DATA, 6, WRITE, 0));
    rings.offer(0);
    let mut with = queue(&rings, feature::INDIRECT_DESC);
    assert_eq!(with.pop(&ram, &mut chain), Ok(Popped::Chain));
    assert_eq!((chain.readable_len(), chain.writable_len()), (9, 6));
    let mut without = queue(&rings, 0);
    assert_eq!(
        without.pop(&ram, &mut chain),
        Ok(Popped::Malformed(ChainError::UnexpectedIndirect))
    );
}

#[test]
fn pop_when_ring_is_broken_says_how() {
    for (index, head, broken) in [
        (17, 0, BrokenRing::AvailIndex),
        (0xffff, 0, BrokenRing::AvailIndex),
        (1, 16, BrokenRing::Head),
        (1, 0xffff, BrokenRing::Head),
    ] {
        let ram = ram();
        let rings = Rings::new(&ram, BASE, 16);
        let mut queue = queue(&rings, feature::EVENT_IDX);
        rings.offer(head);
        rings.set_avail_index(index);
        let error = queue.pop(&ram, &mut Chain::new()).unwrap_err();
        assert_eq!(error, broken, "{index} {head}");
    }
}

#[test]
fn chains_when_offered_together_are_served_before_the_index_is_read_again() {
    let ram = ram();
    let rings = Rings::new(&ram, BASE, 16);
    let mut queue = queue(&rings, feature::EVENT_IDX);
    let mut chain = Chain::new();
    for head in 0..3 {
        rings.offer_chain(head, &[(DATA, 1, true)]);
    }
    assert_eq!(queue.pop(&ram, &mut chain), Ok(Popped::Chain));
    rings.set_avail_index(20);
    for head in 1..3 {
        assert!(queue.has_chain(&ram));
        assert_eq!(queue.pop(&ram, &mut chain), Ok(Popped::Chain));
        assert_eq!(chain.head(), head);
    }
    // What was taken and given back is found again.
    queue.rewind(2);
    assert_eq!(queue.pop(&ram, &mut chain), Ok(Popped::Chain));
    assert_eq!(chain.head(), 1);
    queue.pop(&ram, &mut chain).unwrap();
    for _ in 0..2 {
        assert_eq!(queue.pop(&ram, &mut chain), Err(BrokenRing::AvailIndex));
    }
    rings.set_avail_index(3);
    assert_eq!(queue.pop(&ram, &mut chain), Ok(Popped::Empty));
}

#[test]
fn prefetch_whatever_the_ring_holds_changes_nothing() {
    let mut random = Random::printed();
    let ram = ram();
    let rings = Rings::new(&ram, BASE, 16);
    for _ in 0..2000 {
        let mut queue = queue(&rings, feature::EVENT_IDX);
        let offered = random.below(17) as u16;
        rings.set_avail_index(0);
        for head in 0..offered {
            let addr = random.below(u64::MAX) >> random.below(64);
            let (len, flags) = (random.below(1 << 32) as u32, random.below(8) as u16);
            rings.describe(head, addr, len, flags, head);
            rings.offer(if random.below(8) == 0 { 0xffff } else { head });
        }
        rings.set_avail_index(offered);
        for _ in 0..=offered {
            let before = queue.save();
            queue.prefetch(&ram);
            assert_eq!(queue.save(), before);
            let _ = queue.pop(&ram, &mut Chain::new());
        }
        assert_eq!(queue.save().next_avail, offered);
    }
}

#[test]
fn indices_when_they_wrap_go_on() {
    let ram = ram();
    let mut rings = Rings::new(&ram, BASE, 4);
    let mut queue = queue(&rings, feature::EVENT_IDX);
    let mut chain = Chain::new();
    for round in 0..70_000u32 {
        rings.offer_chain((round % 4) as u16, &[(DATA, 1, true)]);
        assert_eq!(queue.pop(&ram, &mut chain), Ok(Popped::Chain));
        queue.add_used(&ram, chain.head(), round).unwrap();
        assert_eq!(rings.take(), Some((round % 4, round)));
    }
}

#[test]
fn used_when_staged_is_invisible_until_published() {
    let ram = ram();
    let mut rings = Rings::new(&ram, BASE, 16);
    let mut queue = queue(&rings, 0);
    for head in 0..3 {
        queue.stage_used(&ram, head, 10 + u32::from(head)).unwrap();
    }
    assert_eq!(rings.used_index(), 0);
    queue.publish_used(&ram).unwrap();
    assert_eq!(rings.used_index(), 3);
    let taken: Vec<_> = std::iter::from_fn(|| rings.take()).collect();
    assert_eq!(taken, [(0, 10), (1, 11), (2, 12)]);
}

#[test]
fn interrupt_when_driver_declines_is_not_wanted() {
    let ram = ram();
    let rings = Rings::new(&ram, BASE, 16);
    let mut queue = queue(&rings, 0);
    assert_eq!(queue.wants_interrupt(&ram), Ok(false));
    queue.add_used(&ram, 0, 0).unwrap();
    assert_eq!(queue.wants_interrupt(&ram), Ok(true));
    assert_eq!(queue.wants_interrupt(&ram), Ok(false));
    rings.set_avail_flags(1);
    queue.add_used(&ram, 0, 0).unwrap();
    assert_eq!(queue.wants_interrupt(&ram), Ok(false));
}

#[test]
fn interrupt_when_event_index_is_used_comes_exactly_then() {
    let ram = ram();
    let rings = Rings::new(&ram, BASE, 16);
    // Published in one go, event index before: 0-based entries published so far in `from`.
    for (from, published, event, wanted) in [
        (0u16, 1, 0, true),
        (0, 1, 1, false),
        (0, 3, 2, true),
        (0, 3, 3, false),
        (5, 2, 4, false),
        (5, 2, 5, true),
        (5, 2, 6, true),
        (5, 2, 7, false),
        (0xffff, 2, 0xffff, true),
        (0xffff, 2, 0, true),
        (0xffff, 2, 1, false),
    ] {
        let mut queue = queue(&rings, feature::EVENT_IDX);
        queue.next_used = from;
        rings.set_used_event(event);
        for _ in 0..published {
            queue.stage_used(&ram, 0, 0).unwrap();
        }
        queue.publish_used(&ram).unwrap();
        let wants = queue.wants_interrupt(&ram).unwrap();
        assert_eq!(wants, wanted, "{from} {published} {event}");
    }
}

#[test]
fn kicks_when_busy_are_declined_and_when_armed_are_asked_for() {
    let ram = ram();
    let rings = Rings::new(&ram, BASE, 16);
    let mut chain = Chain::new();
    let mut by_flag = queue(&rings, 0);
    rings.offer_chain(0, &[(DATA, 1, true)]);
    by_flag.pop(&ram, &mut chain).unwrap();
    assert_eq!(rings.used_flags(), 1);
    assert_eq!(by_flag.pop(&ram, &mut chain), Ok(Popped::Empty));
    assert_eq!(rings.used_flags(), 1);
    assert_eq!(by_flag.arm(&ram), Ok(false));
    assert_eq!(rings.used_flags(), 0);
    let mut by_index = queue(&rings, feature::EVENT_IDX);
    by_index.pop(&ram, &mut chain).unwrap();
    assert_eq!(by_index.pop(&ram, &mut chain), Ok(Popped::Empty));
    assert_eq!(rings.avail_event(), 0);
    assert_eq!(by_index.arm(&ram), Ok(false));
    assert_eq!(rings.avail_event(), 1);
    // What came between the last look and the arming is not missed.
    rings.offer_chain(1, &[(DATA, 1, true)]);
    assert!(by_index.has_chain(&ram));
    assert_eq!(by_index.arm(&ram), Ok(true));
    by_index.pop(&ram, &mut chain).unwrap();
    assert!(!by_index.has_chain(&ram));
}

#[test]
fn queue_when_saved_is_the_same_when_made_anew() {
    let ram = ram();
    let rings = Rings::new(&ram, BASE, 16);
    let mut queue = queue(&rings, feature::EVENT_IDX);
    let mut chain = Chain::new();
    let make = |state: QueueState| Queue::new(&state, 256, feature::EVENT_IDX, &ram).unwrap();
    crate::state::state_round_trip!(queue, make);
    for round in 0..70_003u32 {
        rings.offer_chain((round % 16) as u16, &[(DATA, 1, true)]);
        queue.pop(&ram, &mut chain).unwrap();
        if round % 70_000 != 1 {
            queue.add_used(&ram, chain.head(), 1).unwrap();
        }
    }
    crate::state::state_round_trip!(queue, make);
    let state = queue.save();
    let (avail, used) = (70_003u32 as u16, 70_001u32 as u16);
    assert_eq!((state.next_avail, state.next_used), (avail, used));
    assert_eq!(state.layout, rings.layout());
}

#[test]
fn indices_when_they_are_not_the_drivers_break_the_ring_and_nothing_else() {
    let ram = ram();
    let rings = Rings::new(&ram, BASE, 16);
    rings.offer_chain(0, &[(DATA, 1, true)]);
    for (next_avail, expected) in [
        (0, Ok(Popped::Chain)),
        (1, Ok(Popped::Empty)),
        (2, Err(BrokenRing::AvailIndex)),
        (0x8000, Err(BrokenRing::AvailIndex)),
        (0xffff, Ok(Popped::Chain)),
    ] {
        for next_used in [0, 1, 0x7fff, 0xffff] {
            let state = QueueState {
                layout: rings.layout(),
                next_avail,
                next_used,
            };
            let mut queue = Queue::new(&state, 16, feature::EVENT_IDX, &ram).unwrap();
            let popped = queue.pop(&ram, &mut Chain::new());
            assert_eq!(popped, expected, "{next_avail} {next_used}");
            queue.announce_again();
            queue.add_used(&ram, 0, 1).unwrap();
            queue.wants_interrupt(&ram).unwrap();
            assert_eq!(rings.used_index(), u16::wrapping_add(next_used, 1));
        }
    }
}
