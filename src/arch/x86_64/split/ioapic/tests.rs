use super::*;
use crate::state::state_round_trip;
use vmm_sys_util::eventfd::EFD_NONBLOCK;

/// Keeps what it was given.
#[derive(Debug, Default)]
struct RouterLog {
    calls: Mutex<Vec<Routes>>,
    refuse: Mutex<bool>,
    connected: Mutex<Vec<u32>>,
}

impl Router for Arc<RouterLog> {
    fn set(&self, routes: &Routes) -> io::Result<()> {
        if *self.refuse.lock().unwrap() {
            return Err(io::Error::from_raw_os_error(libc::ENOMEM));
        }
        self.calls.lock().unwrap().push(*routes);
        Ok(())
    }

    fn listen(&self, _: &EventFd, gsi: u32) -> io::Result<()> {
        self.connected.lock().unwrap().push(gsi);
        Ok(())
    }
}

impl RouterLog {
    fn last(&self) -> Routes {
        self.calls
            .lock()
            .unwrap()
            .last()
            .copied()
            .unwrap_or([None; PINS])
    }
    fn count(&self) -> usize {
        self.calls.lock().unwrap().len()
    }
}

fn chip() -> (IoApic<Arc<RouterLog>>, Arc<RouterLog>, Arc<Missed>) {
    chip_in(&IoApicState::default())
}

fn chip_in(state: &IoApicState) -> (IoApic<Arc<RouterLog>>, Arc<RouterLog>, Arc<Missed>) {
    let (router, missed) = (Arc::new(RouterLog::default()), Arc::new(Missed::default()));
    let chip = IoApic::new(state, Arc::clone(&router), Arc::clone(&missed));
    (chip.unwrap(), router, missed)
}

fn put(chip: &impl Registers, register: u8, value: u32) {
    let _ = chip.write(SELECT, &u32::from(register).to_le_bytes());
    let _ = chip.write(WINDOW, &value.to_le_bytes());
}

fn get(chip: &impl Registers, register: u8) -> u32 {
    let _ = chip.write(SELECT, &u32::from(register).to_le_bytes());
    let mut data = [0xff; 4];
    chip.read(WINDOW, &mut data);
    u32::from_le_bytes(data)
}

#[test]
fn registers_when_reset_are_as_the_specification_says() {
    let (chip, router, _) = chip();
    assert_eq!(get(&chip, 0), 0);
    assert_eq!(get(&chip, 1), 0x0017_0011);
    assert_eq!(get(&chip, 2), 0);
    for pin in 0..24 {
        assert_eq!(get(&chip, 0x10 + 2 * pin), 0x0001_0000, "pin {pin}");
        assert_eq!(get(&chip, 0x11 + 2 * pin), 0, "pin {pin}");
    }
    assert_eq!(router.count(), 0);
}

#[test]
fn id_when_written_keeps_four_bits_and_shows_in_the_arbitration_register() {
    let (chip, ..) = chip();
    put(&chip, 0, 0xf5ff_ffff);
    assert_eq!(get(&chip, 0), 0x0500_0000);
    assert_eq!(get(&chip, 2), 0x0500_0000);
    put(&chip, 1, 0xffff_ffff);
    assert_eq!(get(&chip, 1), 0x0017_0011);
    put(&chip, 2, 0);
    assert_eq!(get(&chip, 0), 0x0500_0000);
}

#[test]
fn entry_when_all_ones_are_written_keeps_what_the_chip_sets_at_zero() {
    let (chip, router, _) = chip();
    put(&chip, 0x16, u32::MAX);
    put(&chip, 0x17, u32::MAX);
    // Delivery status (12), remote IRR (14) and reserved bits stay 0.
    assert_eq!(get(&chip, 0x16), 0x0001_afff);
    assert_eq!(get(&chip, 0x17), 0xff00_0000);
    assert_eq!(router.count(), 0, "it is masked");
}

#[test]
fn entry_when_it_is_not_masked_becomes_a_message() {
    // Low half, high half, address, data.
    for (low, high, address, data) in [
        (0x31, 0, 0xfee0_0000, 0x31),
        (0x31, 0x0300_0000, 0xfee0_3000, 0x31),
        // Logical destination, lowest priority: what older kernels use.
        (0x0931, 0x0100_0000, 0xfee0_1004, 0x131),
        // Polarity means nothing for a message; a level asserts.
        (0xa031, 0, 0xfee0_0000, 0xc031),
        (0x0400, 0xff00_0000, 0xfeef_f000, 0x400),
    ] {
        let (chip, router, _) = chip();
        put(&chip, 0x1b, high);
        put(&chip, 0x1a, low);
        let mut expected = [None; PINS];
        expected[5] = Some(Message { address, data });
        assert_eq!(router.last(), expected, "{low:#x} {high:#x}");
        put(&chip, 0x1a, low | 1 << 16);
        assert_eq!(router.last(), [None; PINS]);
    }
}

#[test]
fn entry_when_nothing_changes_for_kvm_makes_no_call() {
    let (chip, router, _) = chip();
    put(&chip, 0x1a, 0x31);
    assert_eq!(router.count(), 1);
    for _ in 0..10_000 {
        put(&chip, 0x1a, 0x31);
        // Polarity, and what is masked.
        put(&chip, 0x1a, 0x2031);
        put(&chip, 0x1c, 0x1_0032);
        put(&chip, 0x1c, 0x1_0033);
        put(&chip, 0, 0x0100_0000);
        get(&chip, 0x1a);
    }
    assert_eq!(router.count(), 1);
}

#[test]
fn entry_when_kvm_refuses_is_tried_again_at_the_next_write() {
    let (chip, router, _) = chip();
    *router.refuse.lock().unwrap() = true;
    put(&chip, 0x1a, 0x31);
    *router.refuse.lock().unwrap() = false;
    put(&chip, 0, 0);
    assert_eq!(router.last()[5].unwrap().data, 0x31);
}

#[test]
fn line_when_it_is_first_unmasked_is_listened_to() {
    let (chip, router, _) = chip();
    let line = || EventFd::new(EFD_NONBLOCK).unwrap();
    chip.connect(line(), 5).unwrap();
    chip.connect(line(), 6).unwrap();
    assert!(chip.connect(line(), 24).is_err());
    put(&chip, 0x1a, 0x1_0031);
    assert_eq!(*router.connected.lock().unwrap(), [0; 0]);
    for low in [0x31, 0x1_0031, 0x32] {
        put(&chip, 0x1a, low);
        assert_eq!(*router.connected.lock().unwrap(), [5]);
    }
    put(&chip, 0x1e, 0x33);
    assert_eq!(
        *router.connected.lock().unwrap(),
        [5],
        "line 7 has no eventfd"
    );
    chip.connect(line(), 7).unwrap();
    put(&chip, 0x1c, 0x34);
    assert_eq!(*router.connected.lock().unwrap(), [5, 7, 6]);
}

#[test]
fn access_when_it_is_anywhere_of_any_length_changes_nothing_else() {
    let (chip, router, _) = chip();
    put(&chip, 0x1a, 0x31);
    for offset in 0..LENGTH {
        for len in 0..17 {
            let mut data = vec![0xff; len];
            chip.read(offset, &mut data);
            if ![SELECT, WINDOW].contains(&offset) {
                assert!(data.iter().all(|byte| *byte == 0), "{offset} {len}");
                let _ = chip.write(offset, &vec![0xff; len]);
            }
        }
    }
    for register in 0x40..=0xff {
        put(&chip, register, u32::MAX);
        assert_eq!(get(&chip, register), 0, "{register:#x}");
    }
    assert_eq!(router.count(), 1);
    assert_eq!(get(&chip, 0x1a), 0x31);
}

#[test]
fn state_when_a_chip_is_made_of_it_gives_the_same_routes() {
    let (chip, router, _) = chip();
    put(&chip, 0x1b, 0x0200_0000);
    put(&chip, 0x1a, 0x8031);
    put(&chip, 0x3e, 0x44);
    put(&chip, 0, 0x0500_0000);
    get(&chip, 0x3e);
    state_round_trip!(chip, |state| chip_in(&state).0);
    let (copy, other, _) = chip_in(&chip.save());
    assert_eq!((other.count(), other.last()), (1, router.last()));
    let mut selected = [0; 4];
    copy.read(WINDOW, &mut selected);
    assert_eq!(u32::from_le_bytes(selected), 0x44);
}

#[test]
fn state_when_a_chip_is_made_of_it_has_unmasked_lines_listened_to_at_once() {
    let (chip, ..) = chip();
    put(&chip, 0x1a, 0x31);
    put(&chip, 0x1c, 0x1_0032);
    let (copy, router, _) = chip_in(&chip.save());
    for gsi in [5, 6] {
        copy.connect(EventFd::new(EFD_NONBLOCK).unwrap(), gsi)
            .unwrap();
    }
    assert_eq!(*router.connected.lock().unwrap(), [5]);
    put(&copy, 0x1c, 0x32);
    assert_eq!(*router.connected.lock().unwrap(), [5, 6]);
    put(&copy, 0x1a, 0x31);
    assert_eq!(router.count(), 2, "that one was known");
}

#[test]
fn state_when_no_chip_can_be_in_it_is_refused() {
    let made = |state: &IoApicState| {
        let made = IoApic::new(state, Arc::new(RouterLog::default()), Arc::default());
        made.map(drop).map_err(|error| error.to_string())
    };
    let mut state = IoApicState {
        id: 0x10,
        ..IoApicState::default()
    };
    assert!(made(&state).unwrap_err().contains("id is 0x10"));
    state.id = 0x0f;
    state.entries[7] = entry::WRITABLE;
    state.select = 0xff;
    assert_eq!(made(&state), Ok(()));
    // What only the chip sets: delivery status, remote IRR; and a bit that is reserved.
    for bit in [12, 14, 17, 55] {
        state.entries[7] = 1 << bit;
        let error = made(&state).unwrap_err();
        assert!(error.contains("entry"), "{error}");
    }
}

#[test]
fn state_when_kvm_refuses_its_routes_makes_no_chip() {
    let router = Arc::new(RouterLog::default());
    *router.refuse.lock().unwrap() = true;
    let mut state = IoApicState::default();
    assert!(IoApic::new(&state, Arc::clone(&router), Arc::default()).is_ok());
    state.entries[7] = 0x31;
    assert!(IoApic::new(&state, router, Arc::default()).is_err());
}

#[test]
fn timer_line_when_it_is_unmasked_gives_a_warning() {
    for (register, expected) in [(0x10, true), (0x14, true), (0x12, false), (0x18, false)] {
        let (chip, _, missed) = chip();
        put(&chip, register, 0x1_0030);
        assert!(!missed.has_warned());
        put(&chip, register, 0x30);
        assert_eq!(missed.has_warned(), expected, "{register:#x}");
    }
}

#[test]
fn pace_when_changes_do_not_end_lets_one_pass_each_period() {
    let start = Instant::now();
    let mut pace = Pace::new(start);
    for n in 0..BURST {
        assert_eq!(pace.count(start), None, "{n}");
    }
    assert_eq!(pace.count(start), Some(PERIOD));
    assert_eq!(pace.count(start + PERIOD), Some(PERIOD));
    assert_eq!(pace.count(start + PERIOD * 3), None);
    assert_eq!(pace.count(start + PERIOD * 3), Some(PERIOD));
    let later = start + PERIOD * (BURST * 3);
    for _ in 0..BURST {
        assert_eq!(pace.count(later), None);
    }
    assert_eq!(pace.count(later), Some(PERIOD));
}

#[test]
fn pace_when_many_vcpus_change_routes_is_the_same_for_all_of_them_together() {
    const VCPUS: usize = 32;
    const SECONDS: u32 = 10;
    let start = Instant::now();
    let mut pace = Pace::new(start);
    // When each goes on; the one that goes on first makes the next change.
    let mut ready = [start; VCPUS];
    let mut changes = 0;
    loop {
        let next = ready.iter_mut().min().unwrap();
        if *next >= start + Duration::from_secs(1) * SECONDS {
            break;
        }
        changes += 1;
        *next += pace.count(*next).unwrap_or_default();
    }
    assert!(changes >= SECONDS * 1000, "{changes}");
    assert!(
        changes <= SECONDS * 1000 + BURST + VCPUS as u32,
        "{changes}"
    );
}
