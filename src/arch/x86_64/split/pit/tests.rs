use super::*;
use crate::state::state_round_trip;
use std::time::Duration;

/// Nanoseconds of `counts`, rounded up.
fn nanos(counts: u128) -> u64 {
    (counts * NANOS).div_ceil(FREQUENCY) as u64
}

fn pit() -> Pit {
    Pit::new(&PitState::default(), Instant::now()).unwrap()
}

fn loaded(mode: u8, count: u16) -> Counter {
    let mut counter = Counter::default();
    counter.control(0x30 | mode << 1, 0);
    let [low, high] = count.to_le_bytes();
    counter.write(low, 0);
    counter.write(high, 0);
    counter
}

fn read(counter: &mut Counter, now: u64) -> u16 {
    let low = counter.read(now);
    u16::from_le_bytes([low, counter.read(now)])
}

#[test]
fn counter_when_time_passes_counts_down() {
    // Mode, count, counts that have passed, value, output.
    for (mode, count, passed, value, output) in [
        (0, 1000, 0, 1000, false),
        (0, 1000, 999, 1, false),
        (0, 1000, 1000, 0, true),
        (0, 1000, 1001, 0xffff, true),
        (0, 0, 0xffff, 1, false),
        (0, 0, 0x1_0000, 0, true),
        (2, 1000, 0, 1000, true),
        (2, 1000, 999, 1, false),
        (2, 1000, 1000, 1000, true),
        (2, 1000, 2500, 500, true),
        (3, 1000, 0, 1000, true),
        (3, 1000, 250, 500, true),
        (3, 1000, 500, 1000, false),
        (3, 1000, 999, 2, false),
        (3, 1000, 1000, 1000, true),
        (4, 10, 10, 0, false),
        (4, 10, 11, 0xffff, true),
    ] {
        let mut counter = loaded(mode, count);
        let now = nanos(passed);
        let what = format!("mode {mode}, {count}, after {passed}");
        assert_eq!(counter.output(now), output, "{what}");
        assert_eq!(read(&mut counter, now), value, "{what}");
    }
}

#[test]
fn counter_when_latched_stays_until_it_is_read() {
    let mut counter = loaded(0, 0x1234);
    counter.control(0x00, nanos(0x34));
    counter.control(0x00, nanos(0x234));
    assert_eq!(read(&mut counter, nanos(0x1000)), 0x1200);
    assert_eq!(read(&mut counter, nanos(0x1000)), 0x0234);
}

#[test]
fn counter_when_one_byte_of_it_is_meant_reads_and_writes_that() {
    let mut counter = Counter::default();
    counter.control(0x10, 0);
    counter.write(0x80, 0);
    assert_eq!((counter.count, counter.read(0)), (0x80, 0x80));
    counter.control(0x20, 0);
    counter.write(0x80, 0);
    assert_eq!((counter.count, counter.read(0)), (0x8000, 0x80));
}

#[test]
fn read_back_when_status_and_count_are_asked_for_gives_status_first() {
    let pit = pit();
    let get = |offset| {
        let mut data = [0xee];
        pit.read(offset, &mut data);
        data[0]
    };
    let _ = pit.write(CONTROL, &[0x34]);
    let _ = pit.write(CONTROL, &[0xe2]);
    assert_eq!(get(0), STATUS_OUTPUT | STATUS_NULL | 0x34, "no count yet");
    let _ = pit.write(0, &[0xff]);
    let _ = pit.write(0, &[0xff]);
    let _ = pit.write(CONTROL, &[0xc2]);
    assert_eq!(get(0) & !STATUS_OUTPUT, 0x34);
    let first = u16::from_le_bytes([get(0), get(0)]);
    assert!(first > 0, "latched");
    assert_eq!(get(CONTROL), 0);
}

#[test]
fn speaker_port_when_counter_2_has_run_out_says_so() {
    let pit = Arc::new(pit());
    let speaker = Speaker::new(Arc::clone(&pit));
    let get = || {
        let mut data = [0xee];
        speaker.read(0, &mut data);
        data[0]
    };
    // As Linux does: gate open, mode 0, then the count.
    let _ = speaker.write(0, &[0xff]);
    let _ = pit.write(CONTROL, &[0xb0]);
    let count = (FREQUENCY / 20) as u16;
    let before = Instant::now();
    for byte in count.to_le_bytes() {
        let _ = pit.write(2, &[byte]);
    }
    assert_eq!(get() & 0x0f, 0x03);
    while get() & OUTPUT == 0 {}
    let took = before.elapsed();
    assert!(took >= Duration::from_millis(49), "{took:?}");
    assert!(took < Duration::from_secs(5), "{took:?}");
}

#[test]
fn gate_when_it_opens_begins_again_but_in_modes_0_and_4() {
    for (mode, again) in [(0, false), (1, true), (2, true), (3, true), (4, false)] {
        let mut counter = loaded(mode, 1000);
        counter.set_gate(true, nanos(100));
        let passed = counter.passed(nanos(100));
        assert_eq!(passed == 0, again, "mode {mode}");
    }
}

#[test]
fn state_when_a_chip_is_made_of_it_counts_on_from_there() {
    let made = Instant::now();
    let pit = Pit::new(&PitState::default(), made).unwrap();
    state_round_trip!(pit, |state| Pit::new(&state, made).unwrap(), |pit| pit
        .save(made));
    let pit = Arc::new(pit);
    let _ = Speaker::new(Arc::clone(&pit)).write(0, &[3]);
    // Mode 0, both bytes; one of them read, one latched count, one status.
    for (offset, byte) in [
        (3, 0xb0),
        (2, 0x34),
        (2, 0x12),
        (3, 0xc8),
        (3, 0x34),
        (0, 1),
    ] {
        let _ = pit.write(offset, &[byte]);
    }
    pit.read(2, &mut [0]);
    let later = made + Duration::from_secs(1);
    let saved = pit.save(later);
    assert_eq!(saved.nanos, 1_000_000_000);
    let restored_at = later + Duration::from_secs(3600);
    state_round_trip!(
        pit,
        |state| Arc::new(Pit::new(&state, later).unwrap()),
        |pit| pit.save(later)
    );
    let restored = Pit::new(&saved, restored_at).unwrap();
    let half_a_second = restored.save(restored_at + Duration::from_millis(500));
    assert_eq!(half_a_second.nanos, 1_500_000_000);
    assert_eq!(half_a_second.counters, saved.counters);
    assert_eq!(
        restored.save(made).nanos,
        1_000_000_000,
        "time that goes back"
    );
}

#[test]
fn state_when_no_chip_can_be_in_it_is_refused() {
    let good = PitState::default;
    let with = |counter: Counter| PitState {
        counters: [Counter::default(), counter, Counter::default()],
        ..good()
    };
    let mode = |mode| Counter {
        mode,
        ..Counter::default()
    };
    let now = Instant::now();
    assert!(Pit::new(&with(mode(5)), now).is_ok());
    let error = Pit::new(&with(mode(6)), now).unwrap_err().to_string();
    assert!(
        error.contains("8254") && error.contains("mode: 6"),
        "{error}"
    );
    let speaker = PitState {
        speaker: 0x10,
        ..good()
    };
    let error = Pit::new(&speaker, now).unwrap_err().to_string();
    assert!(error.contains("speaker is 0x10"), "{error}");
}

#[test]
fn state_when_its_times_are_beyond_all_others_can_be_read() {
    for (nanos, loaded) in [(u64::MAX, 0), (0, u64::MAX), (u64::MAX, u64::MAX)] {
        for mode in 0..=5 {
            let counter = Counter {
                mode,
                loaded: Some(loaded),
                ..Counter::default()
            };
            let state = PitState {
                nanos,
                counters: [(); 3].map(|()| counter.clone()),
                speaker: 0,
            };
            let pit = Arc::new(Pit::new(&state, Instant::now()).unwrap());
            let _ = pit.write(CONTROL, &[0xce]);
            for offset in 0..3 {
                pit.read(offset, &mut [0]);
            }
            Speaker::new(Arc::clone(&pit)).read(0, &mut [0]);
            assert!(pit.save(Instant::now()).nanos >= nanos);
        }
    }
}

#[test]
fn anything_when_written_leaves_a_counter_that_can_be_read() {
    let pit = pit();
    let speaker = Speaker::new(Arc::new(
        Pit::new(&pit.save(Instant::now()), Instant::now()).unwrap(),
    ));
    for word in 0..=255u8 {
        for byte in [0, 1, 0xff] {
            let _ = pit.write(CONTROL, &[word]);
            for offset in 0..4 {
                let _ = pit.write(offset, &[byte]);
                let _ = pit.write(offset, &[]);
                let mut data = [0xee; 8];
                pit.read(offset, &mut data);
                assert_eq!(data[1..], [0; 7]);
            }
            let _ = speaker.write(0, &[byte]);
        }
    }
}
