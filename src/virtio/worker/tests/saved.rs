//! Workers that are saved and made anew, on the same guest memory and the same disk.

use std::io::{Read, Seek, SeekFrom};
use std::sync::atomic::{Ordering, fence};

use super::super::super::testing::Random;
use super::super::super::{DeviceState, block::BlockState};
use super::*;
use crate::state::state_round_trip;

type BlockDevice = DeviceState<BlockState>;

const SECTORS: u64 = 64;

/// A host with one disk, and a device on it.
struct Host {
    file: File,
    ram: Ram,
    device: Bench,
}

fn device(ram: &Ram, file: &File, saved: Option<BlockDevice>) -> io::Result<Bench> {
    let disk = Disk::new(file.try_clone().unwrap(), false).unwrap();
    let (start, state) = match saved {
        Some(saved) => (
            Start::saved(saved.registers, saved.worker.into()),
            saved.device,
        ),
        None => (Start::default(), BlockState::default()),
    };
    let block = Block::new(disk, "disk", true, RateLimiter::default(), &state, 0)?;
    bench_of(block, ram, &start)
}

impl Host {
    fn new() -> Self {
        let file = TempFile::new().unwrap().into_file();
        file.set_len(SECTORS * 512).unwrap();
        let ram = ram();
        let device = device(&ram, &file, None).unwrap();
        Host { file, ram, device }
    }

    /// Saves the device, paused already, and makes it anew; it is still paused then.
    fn make_anew(&mut self) {
        let saved = save(&self.device);
        let text = serde_json::to_string(&saved).unwrap();
        let read: BlockDevice = serde_json::from_str(&text).unwrap();
        self.device = device(&self.ram, &self.file, Some(read)).unwrap();
        assert_eq!(save(&self.device), saved);
    }
}

fn pause(device: &Bench) {
    device.handle.pause(1).unwrap();
    assert!(matches!(next(&device.replies).done, Done::Paused));
}

fn resume(device: &Bench) {
    device.handle.resume(2).unwrap();
    assert!(matches!(next(&device.replies).done, Done::Resumed));
}

/// The state of a device that is paused.
fn save(device: &Bench) -> BlockDevice {
    device.handle.save(3).unwrap();
    assert!(matches!(next(&device.replies).done, Done::Saved));
    device.handle.take_saved().unwrap()
}

#[test]
fn save_when_the_worker_is_not_paused_is_refused() {
    let device = bench();
    device.handle.save(1).unwrap();
    assert!(matches!(next(&device.replies).done, Done::NotSaved));
    assert!(device.handle.take_saved().is_none());
    pause(&device);
    assert_eq!(save(&device).worker.phase, Phase::Idle);
    assert!(device.handle.take_saved().is_none(), "it is taken once");
    // What nothing took does not stand in for what is saved later.
    for token in 10..30 {
        device.handle.save(token).unwrap();
        assert_eq!(next(&device.replies).token, token);
    }
    resume(&device);
    device.handle.save(1).unwrap();
    assert!(matches!(next(&device.replies).done, Done::NotSaved));
    assert!(device.handle.take_saved().is_none());
}

#[test]
fn device_when_saved_in_any_phase_is_the_same_when_made_anew() {
    let host = Host::new();
    let make = |state: BlockDevice| device(&host.ram, &host.file, Some(state)).unwrap();
    pause(&host.device);
    state_round_trip!(host.device, make, save);
    resume(&host.device);

    let mut rings = Rings::new(&host.ram, BASE, 16);
    start(&host.device.registers, EVENT_IDX, &[rings.layout()]);
    host.device.offer(&rings, 0);
    host.device.kick();
    rings.wait();
    pause(&host.device);
    state_round_trip!(host.device, make, save);
    let saved = save(&host.device);
    let queue = saved.worker.queues[0].unwrap();
    assert_eq!((queue.next_avail, queue.next_used), (1, 1));
    assert_eq!(saved.registers.status, 15);
    assert_eq!(saved.registers.interrupt_status, 1);
    resume(&host.device);

    rings.set_avail_index(1000);
    host.device.kick();
    host.device.wait_for_status(0x4f);
    pause(&host.device);
    state_round_trip!(host.device, make, save);
    assert_eq!(save(&host.device).worker.phase, Phase::Broken);
}

#[test]
fn device_when_made_anew_waits_for_its_resume_and_needs_no_kick() {
    let mut host = Host::new();
    let ram = host.ram.clone();
    let mut rings = Rings::new(&ram, BASE, 16);
    start(&host.device.registers, 0, &[rings.layout()]);
    host.device.round_trip();
    pause(&host.device);
    host.device.offer(&rings, 0);
    host.make_anew();
    host.device.round_trip();
    assert_eq!(rings.take(), None);
    resume(&host.device);
    assert_eq!(rings.wait(), (0, 21));
    wait_until("the interrupt", || host.device.line.read().is_ok());
}

#[test]
fn driver_when_restored_is_interrupted_for_what_it_may_have_missed_and_for_nothing_else() {
    let mut host = Host::new();
    let ram = host.ram.clone();
    let mut rings = Rings::new(&ram, BASE, 16);
    start(&host.device.registers, EVENT_IDX, &[rings.layout()]);
    host.device.offer(&rings, 0);
    host.device.kick();
    rings.wait();
    pause(&host.device);
    host.make_anew();
    // Not before it goes on.
    host.device.round_trip();
    assert!(host.device.line.read().is_err());
    assert_eq!(read32(&host.device.registers, 0x60), 1);
    resume(&host.device);
    wait_until("the interrupt", || host.device.line.read().is_ok());
    // A driver that has noticed everything is not interrupted.
    write32(&host.device.registers, 0x64, 1);
    rings.set_used_event(1);
    pause(&host.device);
    host.make_anew();
    resume(&host.device);
    host.device.round_trip();
    assert!(host.device.line.read().is_err());
    // A driver that has acknowledged the interrupt and not looked yet has not moved its event index.
    rings.set_used_event(0);
    pause(&host.device);
    host.make_anew();
    resume(&host.device);
    wait_until("the interrupt", || host.device.line.read().is_ok());
    assert_eq!(read32(&host.device.registers, 0x60), 1);
}

#[test]
fn disk_when_it_has_another_size_now_is_announced_at_the_first_resume() {
    let mut host = Host::new();
    let ram = host.ram.clone();
    let rings = Rings::new(&ram, BASE, 16);
    // Used buffers are not what it is interrupted for.
    rings.set_used_event(100);
    start(&host.device.registers, EVENT_IDX, &[rings.layout()]);
    host.device.round_trip();
    pause(&host.device);
    let saved = save(&host.device);
    host.file.set_len(80 * 512).unwrap();
    host.device = device(&host.ram, &host.file, Some(saved)).unwrap();
    let registers = &host.device.registers;
    let mut capacity = [0; 8];
    registers.read(0x100, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), 80);
    assert_eq!((read32(registers, 0xfc), read32(registers, 0x60)), (1, 2));
    assert!(host.device.line.read().is_err(), "not before it goes on");
    resume(&host.device);
    wait_until("the interrupt", || host.device.line.read().is_ok());
    assert_eq!(read32(registers, 0x60), 2);
}

#[test]
fn requests_when_devices_are_made_anew_in_between_are_each_done_once() {
    let mut random = Random::printed();
    for features in [0, EVENT_IDX] {
        let mut host = Host::new();
        let ram = host.ram.clone();
        let mut driver = Driver::new(&ram, features, &host.device);
        let mut writes = 0;
        for _ in 0..400 {
            if random.one_in(8) {
                // What was kicked just now may be lost with the eventfd.
                pause(&host.device);
                writes += host.device.handle.counters().writes.get();
                host.make_anew();
                if random.one_in(3) {
                    host.make_anew();
                }
                resume(&host.device);
            } else if random.one_in(2) {
                driver.write(&mut random, &host.device);
            } else if host.device.line.read().is_ok() {
                driver.interrupted(&host.device);
            }
        }
        while driver.is_waiting() {
            wait_until("the interrupt", || host.device.line.read().is_ok());
            driver.interrupted(&host.device);
        }
        writes += host.device.handle.counters().writes.get();
        assert_eq!(writes, driver.offered);
        let mut disk = Vec::new();
        host.file.seek(SeekFrom::Start(0)).unwrap();
        host.file.read_to_end(&mut disk).unwrap();
        assert_eq!(disk, driver.expected);
    }
}

/// A driver that writes sectors, and looks into the used ring only when it is interrupted.
struct Driver<'a> {
    ram: &'a Ram,
    rings: Rings<'a>,
    /// Whether the requests that begin at descriptors 0, 3, 6, 9 and 12 are under way.
    under_way: [bool; 5],
    offered: u64,
    /// What is on the disk in the end: requests are done in order.
    expected: Vec<u8>,
}

impl<'a> Driver<'a> {
    fn new(ram: &'a Ram, features: u64, device: &Bench) -> Self {
        let rings = Rings::new(ram, BASE, 16);
        start(&device.registers, features, &[rings.layout()]);
        Driver {
            ram,
            rings,
            under_way: [false; 5],
            offered: 0,
            expected: vec![0; SECTORS as usize * 512],
        }
    }

    fn is_waiting(&self) -> bool {
        self.under_way.contains(&true)
    }

    /// Begins to write a sector, if there is a place for one more request.
    fn write(&mut self, random: &mut Random, device: &Bench) {
        let Some(slot) = self.under_way.iter().position(|busy| !busy) else {
            return;
        };
        self.under_way[slot] = true;
        self.offered += 1;
        let sector = random.below(SECTORS);
        let slot = slot as u64;
        let (head, data, status) = (HEAD + slot * 16, DATA + slot * 512, STATUS + slot);
        let mut header = [0; 16];
        header[0] = 1;
        header[8] = sector as u8;
        let byte = random.below(256) as u8;
        self.expected[sector as usize * 512..][..512].fill(byte);
        self.ram.write_slice(&header, GuestAddress(head)).unwrap();
        self.ram
            .write_slice(&[byte; 512], GuestAddress(data))
            .unwrap();
        self.ram.write_obj(0xffu8, GuestAddress(status)).unwrap();
        let parts = [(head, 16, false), (data, 512, false), (status, 1, true)];
        self.rings.offer_chain(slot as u16 * 3, &parts);
        device.kick();
    }

    /// Handles an interrupt: takes what is done.
    fn interrupted(&mut self, device: &Bench) {
        write32(&device.registers, 0x64, 3);
        loop {
            while let Some((head, len)) = self.rings.take() {
                let slot = head as usize / 3;
                let was_under_way = std::mem::take(&mut self.under_way[slot]);
                assert!(was_under_way, "request {head} is returned twice");
                let status = GuestAddress(STATUS + slot as u64);
                assert_eq!((len, self.ram.read_obj(status).unwrap()), (1, 0u8));
            }
            self.rings.set_used_event(self.rings.taken());
            // The device does the same the other way round.
            fence(Ordering::SeqCst);
            if self.rings.used_index() == self.rings.taken() {
                return;
            }
        }
    }
}
