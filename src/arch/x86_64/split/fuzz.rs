//! The interrupt chips and timer in the monitor: any accesses, from any state.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::SplitChipsState;
use super::ioapic::{IoApic, IoApicState, PINS, Router, Routes};
use super::pic::{EdgeLevel, Pic, PicState};
use super::pit::{Bytes, Counter, Pit, PitState, Speaker};
use crate::arch::power::{self, Power, PowerState};
use crate::bus::{Registers, Written};
use crate::fuzz::Input;

/// Accesses at most: with more changes of routes than are good a vCPU is made to wait.
const STEPS_MAX: usize = 400;

/// The chips, new or in states that a file may say, with accesses of any width at any offset. Checked
/// after each: each is saved and made again as the same; the host's routes are those of the I/O APIC's
/// table, and are set only when they change; a masked line has none; each line is listened to once; a
/// register is as wide as it is; the machine is ended by the two values for that and nothing else.
pub fn chips(bytes: &[u8]) {
    let input = &mut Input::new(bytes);
    let Some(mut test) = Test::new(input) else {
        return;
    };
    for _ in 0..STEPS_MAX {
        if input.is_empty() {
            break;
        }
        test.step(input);
        test.check();
    }
}

/// Stands for KVM.
#[derive(Debug, Default)]
struct Host {
    routes: Option<Routes>,
    sets: usize,
    listens: [bool; PINS],
    refuses: bool,
    /// It has refused what was to be set.
    is_late: bool,
}

#[derive(Clone, Debug, Default)]
struct Fake(Arc<Mutex<Host>>);

impl Router for Fake {
    fn set(&self, routes: &Routes) -> io::Result<()> {
        let mut host = self.0.lock().unwrap();
        if host.refuses {
            host.is_late = true;
            return Err(io::Error::from_raw_os_error(libc::ENOMEM));
        }
        assert!(host.is_late || host.routes != Some(*routes));
        host.is_late = false;
        host.routes = Some(*routes);
        host.sets += 1;
        Ok(())
    }

    fn listen(&self, _: &EventFd, gsi: u32) -> io::Result<()> {
        let mut host = self.0.lock().unwrap();
        assert!(!host.listens[gsi as usize], "line {gsi} twice");
        host.listens[gsi as usize] = true;
        Ok(())
    }
}

struct Test {
    host: Fake,
    io_apic: IoApic<Fake>,
    pics: [Pic; 2],
    edge_level: EdgeLevel,
    pit: Arc<Pit>,
    speaker: Speaker,
    power: Power,
    /// Lines that were connected.
    connected: [bool; PINS],
}

impl Test {
    fn new(input: &mut Input<'_>) -> Option<Self> {
        let host = Fake::default();
        let (io_apic, pics, pit, levels) = match input.flag() {
            true => Default::default(),
            false => any_states(input),
        };
        let power = PowerState {
            panicked: input.flag(),
            exit_code: input.flag().then(|| input.u8()),
        };
        let pit_chip = Arc::new(Pit::new(&pit, Instant::now()).ok()?);
        let made = Test {
            io_apic: IoApic::new(&io_apic, host.clone(), Arc::default()).ok()?,
            pics: [
                Pic::new(true, &pics[0], Arc::default()).ok()?,
                Pic::new(false, &pics[1], Arc::default()).ok()?,
            ],
            edge_level: EdgeLevel::new(levels).ok()?,
            speaker: Speaker::new(Arc::clone(&pit_chip)),
            pit: pit_chip,
            power: Power::new(&power),
            host,
            connected: [false; PINS],
        };
        assert_eq!(made.io_apic.save(), io_apic);
        assert_eq!(made.pics.each_ref().map(Pic::save), pics);
        assert_eq!(made.edge_level.save(), levels);
        assert_eq!(made.power.save(), power);
        Some(made)
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.below(10) {
            0..=3 => self.write_table(input),
            4 => self.connect(input.below(PINS)),
            5 => self.host.0.lock().unwrap().refuses = input.below(4) == 0,
            6 => self.access(input, |test| &test.io_apic),
            7 => {
                let which = input.below(2);
                self.access(input, |test| &test.pics[which]);
                self.access(input, |test| &test.edge_level);
            }
            8 => {
                self.access(input, |test| &*test.pit);
                self.access(input, |test| &test.speaker);
            }
            _ => self.access(input, |test| &test.power),
        }
    }

    /// As a driver does: half an entry of the table.
    fn write_table(&mut self, input: &mut Input<'_>) {
        let before = self.host.0.lock().unwrap().sets;
        let register = 0x10 + input.u8() % 64;
        let _ = self.io_apic.write(0, &[register]);
        let value = input.u32() & input.one_of(&[u32::MAX, 0xffff, 0xff00_00ff]);
        let _ = self.io_apic.write(0x10, &value.to_le_bytes());
        let mut read = [0; 4];
        self.io_apic.read(0x10, &mut read);
        let is_there = usize::from(register) < 0x10 + 2 * PINS;
        let writable = match (is_there, register % 2) {
            (false, _) => 0,
            (true, 0) => 0x0001_afff,
            (true, _) => 0xff00_0000,
        };
        assert_eq!(u32::from_le_bytes(read), value & writable);
        assert!(self.host.0.lock().unwrap().sets <= before + 1);
    }

    fn connect(&mut self, pin: usize) {
        // Each device has a line of its own.
        if !std::mem::replace(&mut self.connected[pin], true) {
            let line = EventFd::new(EFD_NONBLOCK).unwrap();
            self.io_apic.connect(line, pin as u32).unwrap();
        }
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        assert!(self.io_apic.connect(line, PINS as u32).is_err());
    }

    fn access<R: Registers>(&self, input: &mut Input<'_>, of: impl Fn(&Self) -> &R) {
        let registers = of(self);
        let offset = match input.below(8) {
            0 => input.u64(),
            _ => u64::from(input.u8() % 0x14),
        };
        let len = input.one_of(&[0, 1, 1, 2, 4, 8]);
        if input.flag() {
            let mut data = [0xee; 8];
            registers.read(offset, &mut data[..len]);
            assert!(data[len..].iter().all(|byte| *byte == 0xee));
            return;
        }
        let data = input.bytes(len);
        let is_power = std::ptr::addr_eq(registers, &self.power);
        let (off, reset) = match (offset, data.first()) {
            (power::SLEEP_CONTROL, Some(byte)) => (byte & 0x3c == 0x34, false),
            (power::RESET, Some(byte)) => (false, *byte == 1),
            _ => (false, false),
        };
        match registers.write(offset, data) {
            Written::Done => assert!(!is_power || !off && !reset),
            Written::PowerOff => assert!(is_power && off),
            Written::MachineReset => assert!(is_power && reset),
            _ => panic!("no register here does more"),
        }
    }

    fn check(&self) {
        let state = self.io_apic.save();
        let again = IoApic::new(&state, Fake::default(), Arc::default()).unwrap();
        assert_eq!(again.save(), state);
        self.check_routes(&state);
        for (is_master, pic) in [true, false].into_iter().zip(&self.pics) {
            let again = Pic::new(is_master, &pic.save(), Arc::default());
            assert_eq!(again.unwrap().save(), pic.save());
        }
        let levels = self.edge_level.save();
        assert_eq!(EdgeLevel::new(levels).unwrap().save(), levels);
        let now = Instant::now();
        let state = self.pit.save(now);
        assert_eq!(Pit::new(&state, now).unwrap().save(now), state);
        assert_eq!(Power::new(&self.power.save()).save(), self.power.save());
    }

    fn check_routes(&self, state: &IoApicState) {
        let host = self.host.0.lock().unwrap();
        for (pin, entry) in state.entries.iter().enumerate() {
            let is_masked = entry & 1 << 16 != 0;
            let route = host.routes.and_then(|routes| routes[pin]);
            assert!(host.is_late || route.is_none() == is_masked);
            if let Some(message) = route {
                assert_eq!(message.address >> 20, 0xfee);
                // Vector, delivery, and level with assert.
                assert_eq!(message.data & !0xc7ff, 0);
            }
            assert!(!host.listens[pin] || self.connected[pin]);
        }
    }
}

type States = (IoApicState, [PicState; 2], PitState, [u8; 2]);

fn any_states(input: &mut Input<'_>) -> States {
    let writable = input.one_of(&[0xff00_0000_0001_afff, u64::MAX]);
    let io_apic = IoApicState {
        id: input.u8() & input.one_of(&[0x0f, 0xff]),
        select: input.u8(),
        entries: std::array::from_fn(|_| input.u64() & writable),
    };
    let pics = std::array::from_fn(|_| PicState {
        mask: input.u8(),
        words_to_come: input.u8() % 5,
    });
    let pit = PitState {
        nanos: input.u64(),
        counters: std::array::from_fn(|_| Counter {
            mode: input.u8() % 7,
            bytes: input.one_of(&[Bytes::Low, Bytes::High, Bytes::Both]),
            count: input.u16(),
            loaded: input.flag().then(|| input.u64()),
            low: input.flag().then(|| input.u8()),
            latched: input.flag().then(|| input.u16()),
            status: input.flag().then(|| input.u8()),
            high_next: input.flag(),
            gate: input.flag(),
        }),
        speaker: input.u8() & input.one_of(&[3, 0xff]),
    };
    (io_apic, pics, pit, [input.u8() & 0xf8, input.u8() & 0xde])
}

/// Chips of a saved state: each is refused, or saved as what it was made of.
pub fn restore(state: &SplitChipsState) {
    if let Ok(chip) = IoApic::new(&state.io_apic, Fake::default(), Arc::default()) {
        assert_eq!(chip.save(), state.io_apic);
    }
    for pic in &state.pics {
        if let Ok(chip) = Pic::new(true, pic, Arc::default()) {
            assert_eq!(chip.save(), *pic);
        }
    }
    if let Ok(chip) = EdgeLevel::new(state.edge_level) {
        assert_eq!(chip.save(), state.edge_level);
    }
    let now = Instant::now();
    if let Ok(chip) = Pit::new(&state.pit, now) {
        assert_eq!(chip.save(now), state.pit);
    }
}
