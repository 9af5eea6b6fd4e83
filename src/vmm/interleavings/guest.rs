//! The code that runs on the guest's processors.

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::cpu::Cpu;
use super::device::{ANSWER, QUEUES};
use super::world::{DEVICE, Facts, Fault, POWER};
use crate::memory::Ram;
use crate::sys::sync::scheduled::{below, one_in, rang};
use crate::virtio::testing::Rings;
use crate::virtio::{Registers, feature, status};

/// Entries of a queue.
const SIZE: u16 = 4;
/// Where queue 0 is; each has [`RING_LEN`].
const RINGS: u64 = 0x4000;
const RING_LEN: u64 = 0x4000;
/// What requests are answered in.
const BUFFERS: u64 = 0x1_8000;
/// What the driver's memory holds while the device may not touch it.
const POISON: u8 = 0xa5;

/// The driver's registers (virtio 1.2, 4.2.2).
mod register {
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_SEL: u64 = 0x24;
    pub const QUEUE_SEL: u64 = 0x30;
    pub const QUEUE_NUM: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const INTERRUPT_STATUS: u64 = 0x60;
    pub const INTERRUPT_ACK: u64 = 0x64;
    pub const STATUS: u64 = 0x70;
    pub const QUEUE_DESC: u64 = 0x80;
    pub const QUEUE_DRIVER: u64 = 0x90;
    pub const QUEUE_DEVICE: u64 = 0xa0;
    pub const CONFIG: u64 = 0x100;
}

/// Drives the device.
pub struct Driver<'a> {
    cpu: Arc<Cpu>,
    ram: &'a Ram,
    /// Its kicks: ioeventfds.
    registers: Arc<Registers>,
    /// Its irqfd.
    line: EventFd,
    interrupts: u32,
    facts: Arc<Facts>,
    queues: usize,
}

/// A queue that the driver uses.
struct Used<'a> {
    number: usize,
    rings: Rings<'a>,
    /// By head: it was offered, and has not come back.
    offered: [bool; SIZE as usize],
}

impl Used<'_> {
    fn buffer(&self, head: u16) -> GuestAddress {
        let slot = self.number as u64 * u64::from(SIZE) + u64::from(head);
        GuestAddress(BUFFERS + 16 * slot)
    }

    fn avail_index(&self) -> u16 {
        let at = self.rings.layout().avail + 2;
        self.rings.ram.read_obj(GuestAddress(at)).unwrap()
    }
}

/// What has become of an activation.
#[derive(PartialEq, Eq)]
enum Round {
    /// All requests have come back.
    Done,
    /// The device needs a reset, or was reset by the other vCPU.
    Lost,
}

impl<'a> Driver<'a> {
    pub fn new(
        cpu: Arc<Cpu>,
        ram: &'a Ram,
        registers: Arc<Registers>,
        line: EventFd,
        facts: Arc<Facts>,
        workers: usize,
    ) -> Self {
        Driver {
            cpu,
            ram,
            registers,
            line,
            interrupts: 0,
            facts,
            queues: workers * QUEUES,
        }
    }

    pub fn run(mut self) {
        for _ in 0..1 + below(3) {
            let event_idx = one_in(2);
            let meddlings = self.facts.meddlings();
            let round = match self.activate(event_idx) {
                Some(mut queues) => self.work(&mut queues, event_idx, meddlings),
                None => Round::Lost,
            };
            // A driver may also leave without a reset.
            if round == Round::Lost || one_in(2) {
                self.reset();
            } else {
                break;
            }
        }
        self.cpu.write(POWER, 1);
        self.cpu.halt(|| false);
    }

    fn get(&self, register: u64) -> u32 {
        self.cpu.read(DEVICE + register)
    }

    fn set(&self, register: u64, value: u32) {
        self.cpu.write(DEVICE + register, value);
    }

    /// All up to DRIVER_OK; none when the device was reset meanwhile.
    fn activate(&mut self, event_idx: bool) -> Option<Vec<Used<'a>>> {
        self.set(register::STATUS, status::ACKNOWLEDGE | status::DRIVER);
        let optional = if event_idx { feature::EVENT_IDX } else { 0 };
        for (page, half) in [(0, optional as u32), (1, (feature::VERSION_1 >> 32) as u32)] {
            self.set(register::DRIVER_FEATURES_SEL, page);
            self.set(register::DRIVER_FEATURES, half);
        }
        let accepted = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
        self.set(register::STATUS, accepted);
        let ram = self.ram;
        let first = below(self.queues as u32) as usize;
        let mut queues = Vec::new();
        for number in [first, (first + 1) % self.queues] {
            let base = RINGS + number as u64 * RING_LEN;
            let rings = self.cpu.operation(|| Rings::new(ram, base, SIZE));
            let layout = rings.layout();
            self.set(register::QUEUE_SEL, number as u32);
            self.set(register::QUEUE_NUM, layout.size);
            self.set(register::QUEUE_DESC, layout.descriptors as u32);
            self.set(register::QUEUE_DRIVER, layout.avail as u32);
            self.set(register::QUEUE_DEVICE, layout.used as u32);
            self.set(register::QUEUE_READY, 1);
            queues.push(Used {
                number,
                rings,
                offered: [false; SIZE as usize],
            });
            if one_in(2) {
                break;
            }
        }
        self.set(register::STATUS, accepted | status::DRIVER_OK);
        (self.get(register::STATUS) == accepted | status::DRIVER_OK).then_some(queues)
    }

    /// Offers requests, and waits for all of them, unless it leaves them in flight.
    fn work(&mut self, queues: &mut [Used<'a>], event_idx: bool, meddlings: u64) -> Round {
        for _ in 0..1 + below(4) {
            let at = below(queues.len() as u32) as usize;
            self.offer(&mut queues[at], event_idx);
            if one_in(4) {
                self.collect(queues);
            }
            if one_in(10) {
                return self.break_ring(&mut queues[at], event_idx, meddlings);
            }
        }
        if one_in(4) {
            return Round::Lost;
        }
        loop {
            self.collect(queues);
            let is_idle = |queue: &Used| queue.offered == [false; SIZE as usize];
            if queues.iter().all(is_idle) {
                return Round::Done;
            }
            if event_idx {
                for queue in queues.iter() {
                    let next = queue.rings.taken();
                    self.cpu.operation(|| queue.rings.set_used_event(next));
                }
                // What came before the wish was known does not interrupt.
                if self.collect(queues) {
                    continue;
                }
            }
            loop {
                if self.sleep(meddlings) {
                    return Round::Lost;
                }
                // As drivers do, it looks at its queues only when it is told to.
                if self.serve_interrupt() & 1 != 0 {
                    break;
                }
            }
        }
    }

    /// Makes a request in a free descriptor, if there is one, and kicks if the device wants that.
    fn offer(&self, queue: &mut Used<'a>, event_idx: bool) {
        let Some(head) = (0..SIZE).find(|head| !queue.offered[usize::from(*head)]) else {
            return;
        };
        let buffer = queue.buffer(head);
        queue.offered[usize::from(head)] = true;
        let (before, after) = self.cpu.operation(|| {
            self.ram.write_obj(0u32, buffer).unwrap();
            let before = queue.avail_index();
            queue.rings.offer_chain(head, &[(buffer.0, 4, true)]);
            (before, queue.avail_index())
        });
        let is_wanted = self.cpu.operation(|| match event_idx {
            true => {
                let event = queue.rings.avail_event();
                after.wrapping_sub(event).wrapping_sub(1) < after.wrapping_sub(before)
            }
            false => queue.rings.used_flags() & 1 == 0,
        });
        if is_wanted {
            self.kick(queue);
        }
    }

    fn kick(&self, queue: &Used<'a>) {
        self.cpu.operation(|| {
            self.registers.kicks()[queue.number].write(1).unwrap();
            rang();
        });
    }

    /// Takes what has come back; whether there was anything.
    fn collect(&self, queues: &mut [Used<'a>]) -> bool {
        let mut any = false;
        for queue in queues {
            while let Some((head, len)) = self.cpu.operation(|| queue.rings.take()) {
                any = true;
                let offered = queue.offered.get_mut(head as usize);
                let offered = offered.expect("a head of the queue");
                assert!(
                    std::mem::take(offered),
                    "chain {head} of queue {} came back twice",
                    queue.number
                );
                assert_eq!(len, 4);
                let answer: u32 = self.ram.read_obj(queue.buffer(head as u16)).unwrap();
                assert_eq!(answer, ANSWER, "a chain came back before its answer");
            }
        }
        any
    }

    /// Halts until the interrupt line is pulsed; whether the device was reset by the other vCPU instead.
    fn sleep(&mut self, meddlings: u64) -> bool {
        let mut is_lost = false;
        let (cpu, facts, line) = (&self.cpu, &self.facts, &self.line);
        let interrupts = &mut self.interrupts;
        cpu.halt(|| {
            is_lost = facts.meddlings() != meddlings;
            let is_pulsed = line.read().is_ok();
            *interrupts += u32::from(is_pulsed);
            let is_dropped = facts.fault == Fault::LostInterrupt && interrupts.is_multiple_of(3);
            is_lost || is_pulsed && !is_dropped
        });
        is_lost
    }

    /// Acknowledges an interrupt; its causes.
    fn serve_interrupt(&self) -> u32 {
        let causes = self.get(register::INTERRUPT_STATUS);
        self.set(register::INTERRUPT_ACK, causes);
        if causes & 2 != 0 {
            self.get(register::CONFIG);
        }
        causes
    }

    /// Breaks a rule of the queue; returns once the device asks for a reset.
    fn break_ring(&mut self, queue: &mut Used<'a>, event_idx: bool, meddlings: u64) -> Round {
        let ahead = queue.avail_index().wrapping_add(100);
        self.cpu.operation(|| queue.rings.set_avail_index(ahead));
        // The device may be looking, or ask for a kick.
        let _ = event_idx;
        self.kick(queue);
        while self.get(register::STATUS) & status::DEVICE_NEEDS_RESET == 0 {
            if self.sleep(meddlings) {
                break;
            }
            self.serve_interrupt();
        }
        Round::Lost
    }

    /// Resets the device, and checks what is promised of it.
    fn reset(&self) {
        self.set(register::STATUS, 0);
        self.cpu.operation(|| {
            let count = self.facts.all_in_flight();
            assert_eq!(count, 0, "request in flight after a reset");
        });
        // Either may be the first access after it.
        let first = match one_in(2) {
            true => register::STATUS,
            false => register::INTERRUPT_STATUS,
        };
        assert_eq!(self.get(first), 0, "{first:#x} after a reset");
        assert_eq!(self.get(register::STATUS), 0, "after a reset");
        let len = BUFFERS as usize + 0x1000 - RINGS as usize;
        let mut bytes = vec![POISON; len];
        let at = GuestAddress(RINGS);
        self.cpu
            .operation(|| self.ram.write_slice(&bytes, at))
            .unwrap();
        self.get(register::INTERRUPT_STATUS);
        self.get(register::STATUS);
        self.cpu
            .operation(|| self.ram.read_slice(&mut bytes, at))
            .unwrap();
        let is_whole = bytes.iter().all(|byte| *byte == POISON);
        assert!(is_whole, "guest memory was written after a reset");
    }
}

/// The other vCPU: reads registers, and resets a device that it does not drive.
pub struct Meddler {
    cpu: Arc<Cpu>,
    facts: Arc<Facts>,
}

impl Meddler {
    pub fn new(cpu: Arc<Cpu>, facts: Arc<Facts>) -> Self {
        Meddler { cpu, facts }
    }

    pub fn run(self) {
        for _ in 0..below(4) {
            match below(4) {
                0 => {
                    self.facts.meddle();
                    self.cpu.write(DEVICE + register::STATUS, 0);
                    self.cpu.operation(|| self.facts.meddle());
                }
                1 => drop(self.cpu.read(DEVICE + register::CONFIG)),
                _ => drop(self.cpu.read(DEVICE + register::STATUS)),
            }
        }
        self.cpu.halt(|| false);
    }
}
