//! The virtio-mmio register block, version 2 (virtio 1.2, 4.2.2): what the guest's driver sees.
//!
//! It belongs to the vCPUs, behind one mutex that is never held while anything waits. Control
//! takes it too when an update has changed the configuration space. It knows what the device
//! offers and what the driver chose; it never touches guest memory, and what becomes of the
//! driver's choices is the worker's business.
//!
//! Registers are 32 bits wide and aligned (4.2.2.1); any other access to them reads as zeros and
//! writes nothing. The configuration space takes any size; beyond its end there are zeros. What
//! the driver may not do at this moment is ignored and counted.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::queue::QueueLayout;
use super::status::{ACKNOWLEDGE, DEVICE_NEEDS_RESET, DRIVER, DRIVER_OK, FAILED, FEATURES_OK};
use super::{ConfigSpace, Counter, Interrupt, feature};
use crate::bus::{self, Completer, Ticket, Tickets, Written};
use crate::inbox::Sender;

/// Length of the block in bytes.
pub const LENGTH: u64 = 0x1000;

/// Offset of QueueNotify, for ioeventfds (datamatch: the queue's number, 4 bytes).
pub const QUEUE_NOTIFY: u64 = reg::QUEUE_NOTIFY;

/// Register offsets (virtio 1.2, 4.2.2, table 4.1).
mod reg {
    pub const MAGIC_VALUE: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_ID: u64 = 0x008;
    pub const VENDOR_ID: u64 = 0x00c;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub const QUEUE_SEL: u64 = 0x030;
    pub const QUEUE_NUM_MAX: u64 = 0x034;
    pub const QUEUE_NUM: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const INTERRUPT_STATUS: u64 = 0x060;
    pub const INTERRUPT_ACK: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESC_LOW: u64 = 0x080;
    pub const QUEUE_DESC_HIGH: u64 = 0x084;
    pub const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x094;
    pub const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
    pub const SHM_LEN_LOW: u64 = 0x0b0;
    pub const SHM_BASE_HIGH: u64 = 0x0bc;
    pub const CONFIG_GENERATION: u64 = 0x0fc;
    pub const CONFIG: u64 = 0x100;
}

/// "virt", little-endian.
const MAGIC: u32 = 0x7472_6976;
/// Not a legacy device.
const VERSION: u32 = 2;
/// Drivers do not look at it.
const VENDOR: u32 = 0;
/// What SHMLen and SHMBase read when there is no such shared memory region.
const NO_SHARED_MEMORY: u32 = u32::MAX;

/// What a driver may do to Status, beside giving up (FAILED) and resetting (0): from, to. Some
/// drivers set the first two bits in one write.
const STEPS: [(u32, u32); 5] = [
    (0, ACKNOWLEDGE),
    (0, ACKNOWLEDGE | DRIVER),
    (ACKNOWLEDGE, ACKNOWLEDGE | DRIVER),
    (ACKNOWLEDGE | DRIVER, ACKNOWLEDGE | DRIVER | FEATURES_OK),
    (
        ACKNOWLEDGE | DRIVER | FEATURES_OK,
        ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK,
    ),
];

/// What a driver tells the device, by way of its registers.
#[derive(Debug)]
pub enum DriverMsg {
    /// A queue that the activation that follows is to serve.
    Queue {
        /// Its number.
        index: usize,
        /// As described, and unchecked.
        layout: QueueLayout,
    },
    /// DRIVER_OK: serve the queues.
    Activate {
        /// What was negotiated.
        features: u64,
    },
    /// Status was set to 0: end what is in flight, forget the queues, then drop the completer.
    Reset(Completer),
}

/// How many messages can be under way for a device with `queues` queues: each vCPU (32) waits for
/// its own reset, and one activation precedes a reset.
pub(super) const fn driver_messages(queues: usize) -> usize {
    queues.saturating_add(40)
}

/// One device's registers.
pub struct Registers {
    device_id: u32,
    offered: u64,
    max_sizes: &'static [u16],
    kicks: Vec<EventFd>,
    interrupt: Arc<Interrupt>,
    driver: Sender<DriverMsg>,
    /// Accesses that no driver should have made.
    ignored: Counter,
    block: Mutex<Block>,
}

/// What is behind the mutex.
#[derive(Debug)]
struct Block {
    status: u32,
    /// The device was activated and has not been reset since.
    active: bool,
    /// A reset that the worker has not completed: Status stays as it is, and nothing else is taken.
    resetting: Option<Ticket>,
    tickets: Tickets,
    device_features_sel: u32,
    driver_features_sel: u32,
    accepted: u64,
    queue_sel: u32,
    layouts: Box<[QueueLayout]>,
    config: ConfigSpace,
    generation: u32,
}

impl Registers {
    /// # Errors
    /// When the host has no descriptor left for the kicks.
    pub(super) fn new(
        device_id: u32,
        offered: u64,
        max_sizes: &'static [u16],
        config: ConfigSpace,
        interrupt: Arc<Interrupt>,
        driver: Sender<DriverMsg>,
    ) -> io::Result<Self> {
        let kicks = max_sizes
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC))
            .collect::<io::Result<_>>()?;
        Ok(Registers {
            device_id,
            offered,
            max_sizes,
            kicks,
            interrupt,
            driver,
            ignored: Counter::default(),
            block: Mutex::new(Block::new(config, max_sizes.len())),
        })
    }

    /// The queues' kicks, by queue number: to be registered as ioeventfds at [`QUEUE_NOTIFY`].
    pub fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    /// The interrupt these registers show.
    pub fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    /// Accesses so far that were ignored because no driver should have made them.
    pub fn ignored(&self) -> u64 {
        self.ignored.get()
    }

    /// Changes the configuration space, and tells the driver if there is one.
    pub fn set_config(&self, config: ConfigSpace) {
        let mut block = self.lock();
        block.config = config;
        block.generation = block.generation.wrapping_add(1);
        if block.status & DRIVER_OK != 0 {
            self.interrupt.config_changed();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Block> {
        // A thread that panics ends the process; in tests the data is as whole as it was.
        let mut block = self.block.lock().unwrap_or_else(PoisonError::into_inner);
        if block.resetting.as_ref().is_some_and(Ticket::is_done) {
            self.finish_reset(&mut block);
        }
        block
    }

    fn finish_reset(&self, block: &mut Block) {
        self.interrupt.clear();
        block.status = 0;
        block.active = false;
        block.resetting = None;
        block.device_features_sel = 0;
        block.driver_features_sel = 0;
        block.accepted = 0;
        block.queue_sel = 0;
        block.layouts.fill(QueueLayout::default());
    }

    fn read_register(&self, offset: u64) -> Option<u32> {
        match offset {
            reg::MAGIC_VALUE => return Some(MAGIC),
            reg::VERSION => return Some(VERSION),
            reg::DEVICE_ID => return Some(self.device_id),
            reg::VENDOR_ID => return Some(VENDOR),
            reg::INTERRUPT_STATUS => return Some(self.interrupt.status()),
            reg::SHM_LEN_LOW..=reg::SHM_BASE_HIGH => return Some(NO_SHARED_MEMORY),
            _ => {}
        }
        let block = self.lock();
        Some(match offset {
            reg::DEVICE_FEATURES => match block.device_features_sel {
                0 => low(self.offered),
                1 => high(self.offered),
                _ => 0,
            },
            reg::QUEUE_NUM_MAX => block
                .selected()
                .and_then(|i| self.max_sizes.get(i))
                .map_or(0, |size| u32::from(*size)),
            reg::QUEUE_READY => block
                .selected()
                .and_then(|i| block.layouts.get(i))
                .map_or(0, |layout| u32::from(layout.ready)),
            reg::STATUS if self.interrupt.needs_reset() => block.status | DEVICE_NEEDS_RESET,
            reg::STATUS => block.status,
            reg::CONFIG_GENERATION => block.generation,
            _ => return None,
        })
    }

    /// What came of writing `value`; `None` when that may not be done, or not now.
    fn write_register(&self, offset: u64, value: u32) -> Option<Written> {
        match offset {
            reg::INTERRUPT_ACK => {
                self.interrupt.acknowledge(value);
                return Some(Written::Done);
            }
            reg::QUEUE_NOTIFY => {
                // Ordinarily an ioeventfd, and never seen here.
                let kick = self.kicks.get(usize::try_from(value).ok()?)?;
                let _ = kick.write(1);
                return Some(Written::Done);
            }
            _ => {}
        }
        let mut block = self.lock();
        let block = &mut *block;
        if offset == reg::STATUS {
            return self.write_status(block, value);
        }
        if block.resetting.is_some() {
            return None;
        }
        match offset {
            reg::DEVICE_FEATURES_SEL => block.device_features_sel = value,
            reg::DRIVER_FEATURES_SEL => block.driver_features_sel = value,
            reg::QUEUE_SEL => block.queue_sel = value,
            reg::DRIVER_FEATURES => {
                if !block.is_between(DRIVER, FEATURES_OK) {
                    return None;
                }
                let rest = block.accepted;
                block.accepted = match block.driver_features_sel {
                    0 => with_low(rest, value),
                    1 => with_high(rest, value),
                    // Bits that do not exist can only be refused.
                    _ if value == 0 => rest,
                    _ => return None,
                };
            }
            _ => {
                if !block.is_between(FEATURES_OK, DRIVER_OK) {
                    return None;
                }
                let index = block.selected().filter(|i| *i < self.max_sizes.len())?;
                let layout = block.layouts.get_mut(index)?;
                match offset {
                    reg::QUEUE_NUM => layout.size = value,
                    reg::QUEUE_READY => layout.ready = value & 1 != 0,
                    reg::QUEUE_DESC_LOW => layout.descriptors = with_low(layout.descriptors, value),
                    reg::QUEUE_DESC_HIGH => {
                        layout.descriptors = with_high(layout.descriptors, value);
                    }
                    reg::QUEUE_DRIVER_LOW => layout.avail = with_low(layout.avail, value),
                    reg::QUEUE_DRIVER_HIGH => layout.avail = with_high(layout.avail, value),
                    reg::QUEUE_DEVICE_LOW => layout.used = with_low(layout.used, value),
                    reg::QUEUE_DEVICE_HIGH => layout.used = with_high(layout.used, value),
                    _ => return None,
                }
            }
        }
        Some(Written::Done)
    }

    fn write_status(&self, block: &mut Block, value: u32) -> Option<Written> {
        if value == 0 {
            return Some(self.reset(block));
        }
        if block.resetting.is_some() {
            return None;
        }
        // Drivers write back what they read; this bit is ours.
        let value = value & !DEVICE_NEEDS_RESET;
        let status = block.status;
        if value == status {
            return Some(Written::Done);
        }
        if value == status | FAILED {
            block.status = value;
            return Some(Written::Done);
        }
        if !STEPS.contains(&(status, value)) {
            return None;
        }
        if value & !status == FEATURES_OK && !self.can_accept(block.accepted) {
            // Refused by leaving the bit clear (3.1.1, step 6).
            return None;
        }
        block.status = value;
        if value & !status == DRIVER_OK {
            block.active = true;
            if !self.activate(block) {
                // The worker is gone.
                self.interrupt.demand_reset();
            }
        }
        Some(Written::Done)
    }

    /// Tells the worker of each queue and to serve them; whether that reached it.
    fn activate(&self, block: &Block) -> bool {
        let described = block.layouts.iter().copied().enumerate();
        let mut queues = described.filter(|(_, layout)| layout.ready);
        let features = block.accepted;
        queues.all(|(index, layout)| {
            let queue = DriverMsg::Queue { index, layout };
            self.driver.send(queue).is_ok()
        }) && self.driver.send(DriverMsg::Activate { features }).is_ok()
    }

    fn reset(&self, block: &mut Block) -> Written {
        if !block.active {
            self.finish_reset(block);
            return Written::Done;
        }
        let (ticket, completer) = block.tickets.issue();
        if self.driver.send(DriverMsg::Reset(completer)).is_err() {
            // The worker is gone, and with it whatever could still be in flight.
            self.finish_reset(block);
            return Written::Done;
        }
        // Messages are taken in order: of several resets the first is the one that counts.
        block.resetting.get_or_insert_with(|| ticket.clone());
        Written::After(ticket)
    }

    fn can_accept(&self, features: u64) -> bool {
        features & !self.offered == 0 && features & feature::VERSION_1 != 0
    }
}

impl bus::Registers for Registers {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(at) = offset.checked_sub(reg::CONFIG) {
            if let Ok(at) = usize::try_from(at) {
                self.lock().config.read(at, data);
            }
        } else if let Ok(data) = <&mut [u8; 4]>::try_from(data)
            && let Some(value) = self.read_register(offset)
        {
            *data = value.to_le_bytes();
        } else {
            self.ignored.one();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Written {
        // No field of our devices' configuration spaces may be written.
        let written = if offset < reg::CONFIG
            && let Ok(data) = <[u8; 4]>::try_from(data)
        {
            self.write_register(offset, u32::from_le_bytes(data))
        } else {
            None
        };
        written.unwrap_or_else(|| {
            self.ignored.one();
            Written::Done
        })
    }
}

impl Block {
    fn new(config: ConfigSpace, queues: usize) -> Self {
        Block {
            status: 0,
            active: false,
            resetting: None,
            tickets: Tickets::default(),
            device_features_sel: 0,
            driver_features_sel: 0,
            accepted: 0,
            queue_sel: 0,
            layouts: vec![QueueLayout::default(); queues].into_boxed_slice(),
            config,
            generation: 0,
        }
    }

    /// Whether the driver has reached `from`, not yet `to`, and has not given up.
    fn is_between(&self, from: u32, to: u32) -> bool {
        self.status & (from | to | FAILED) == from
    }

    fn selected(&self) -> Option<usize> {
        usize::try_from(self.queue_sel).ok()
    }
}

impl fmt::Debug for Registers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registers")
            .field("device_id", &self.device_id)
            .finish_non_exhaustive()
    }
}

const fn low(value: u64) -> u32 {
    (value & 0xffff_ffff) as u32
}

const fn high(value: u64) -> u32 {
    (value >> 32) as u32
}

const fn with_low(value: u64, low: u32) -> u64 {
    value & !0xffff_ffff | low as u64
}

const fn with_high(value: u64, high: u32) -> u64 {
    value & 0xffff_ffff | (high as u64) << 32
}

#[cfg(test)]
mod tests {
    use super::super::testing::{negotiate, read32, set_queue, write32};
    use super::*;
    use crate::bus::Registers as _;
    use crate::inbox::{Inbox, inbox};

    const SIZES: &[u16] = &[256, 64];
    const OFFERED: u64 = feature::COMMON | 0b1010;

    fn registers() -> (Registers, Inbox<DriverMsg>) {
        let (sender, inbox) = inbox(driver_messages(SIZES.len())).unwrap();
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let interrupt = Arc::new(Interrupt::new(line));
        let config = ConfigSpace::new().with(0, &[1, 2, 3, 4, 5, 6, 7, 8, 9]);
        let registers = Registers::new(2, OFFERED, SIZES, config, interrupt, sender).unwrap();
        (registers, inbox)
    }

    /// A device that is active, with its activation taken.
    fn active() -> (Registers, Inbox<DriverMsg>) {
        let (registers, inbox) = registers();
        assert!(negotiate(&registers, feature::VERSION_1));
        write32(&registers, reg::STATUS, 15);
        assert!(matches!(inbox.next(), Some(DriverMsg::Activate { .. })));
        (registers, inbox)
    }

    fn reset(registers: &Registers) -> Written {
        registers.write(reg::STATUS, &[0; 4])
    }

    #[test]
    fn identity_when_read_is_the_specifications() {
        let (registers, _inbox) = registers();
        for (offset, value) in [
            (0x000, u32::from_le_bytes(*b"virt")),
            (0x004, 2),
            (0x008, 2),
            (0x034, 256),
            (0x044, 0),
            (0x060, 0),
            (0x070, 0),
            (0x0b0, u32::MAX),
            (0x0b4, u32::MAX),
            (0x0fc, 0),
            (0x0c0, 0),
            (0x014, 0),
            (0x0f8, 0),
        ] {
            assert_eq!(read32(&registers, offset), value, "{offset:#x}");
        }
    }

    #[test]
    fn status_when_written_follows_the_table() {
        // What is written, what Status is afterwards, how many writes were ignored.
        let cases: &[(&[u32], u32, u64)] = &[
            (&[1], 1, 0),
            (&[3], 3, 0),
            (&[1, 3, 3], 3, 0),
            (&[2], 0, 1),
            (&[4], 0, 1),
            (&[15], 0, 1),
            (&[1, 2], 1, 1),
            (&[1, 3, 1], 3, 1),
            (&[1, 3, 7], 3, 1),
            (&[1, 3, 15], 3, 1),
            (&[1, 3, 11, 3], 11, 1),
            (&[1, 3, 11, 15], 15, 0),
            (&[1, 3, 11, 15, 11], 15, 1),
            (&[1, 3, 11, 15, 0x1f], 15, 1),
            (&[1, 3, 0x1_000b], 3, 1),
            (&[0x80], 0x80, 0),
            (&[1, 0x81], 0x81, 0),
            (&[1, 0x81, 0x83], 0x81, 1),
            (&[1, 0x81, 1], 0x81, 1),
            (&[1, 0x81, 0, 1], 1, 0),
            (&[1, 3, 0x43], 3, 0),
            (&[1, 3, 0x4b], 11, 0),
            (&[0xffff_ffff], 0, 1),
            (&[0], 0, 0),
        ];
        for (writes, after, ignored) in cases {
            let (registers, _inbox) = registers();
            for value in *writes {
                if read32(&registers, reg::STATUS) == 3 {
                    write32(&registers, reg::DRIVER_FEATURES_SEL, 1);
                    write32(&registers, reg::DRIVER_FEATURES, 1);
                }
                let before = registers.ignored();
                write32(&registers, reg::STATUS, *value);
                assert!(registers.ignored() <= before + 1);
            }
            assert_eq!(read32(&registers, reg::STATUS), *after, "{writes:x?}");
            assert_eq!(registers.ignored(), *ignored, "{writes:x?}");
        }
    }

    #[test]
    fn features_when_not_a_subset_or_legacy_are_refused() {
        let (offering, _inbox) = registers();
        let mut offered = 0;
        for page in 0..3 {
            write32(&offering, reg::DEVICE_FEATURES_SEL, page);
            let half = u64::from(read32(&offering, reg::DEVICE_FEATURES));
            offered |= half.checked_shl(32 * page).unwrap_or(0);
        }
        assert_eq!(offered, OFFERED);
        for (features, accepted) in [
            (OFFERED, true),
            (feature::VERSION_1, true),
            (feature::VERSION_1 | 2, true),
            (0, false),
            (OFFERED & !feature::VERSION_1, false),
            (OFFERED | 1, false),
            (OFFERED | 1 << 33, false),
            (u64::MAX, false),
        ] {
            let (registers, _inbox) = registers();
            assert_eq!(negotiate(&registers, features), accepted, "{features:#x}");
            if !accepted {
                // The driver may think again.
                for (page, half) in [(0, 0), (1, 1)] {
                    write32(&registers, reg::DRIVER_FEATURES_SEL, page);
                    write32(&registers, reg::DRIVER_FEATURES, half);
                }
                write32(&registers, reg::STATUS, 11);
                assert_eq!(read32(&registers, reg::STATUS), 11);
            }
        }
    }

    #[test]
    fn features_when_accepted_are_frozen() {
        let (registers, inbox) = registers();
        assert!(negotiate(&registers, feature::VERSION_1 | 2));
        write32(&registers, reg::DRIVER_FEATURES_SEL, 0);
        write32(&registers, reg::DRIVER_FEATURES, 8);
        assert_eq!(registers.ignored(), 1);
        write32(&registers, reg::STATUS, 15);
        let Some(DriverMsg::Activate { features, .. }) = inbox.next() else {
            panic!("no activation");
        };
        assert_eq!(features, feature::VERSION_1 | 2);
    }

    #[test]
    fn queues_when_written_outside_their_time_stay() {
        let layout = QueueLayout {
            size: 128,
            ready: true,
            descriptors: 0x1_2345_6780,
            avail: 0x2_0000_1000,
            used: 0x3_0000_2000,
        };
        let (registers, inbox) = registers();
        set_queue(&registers, 0, &layout);
        assert_eq!(read32(&registers, reg::QUEUE_READY), 0);
        assert!(negotiate(&registers, feature::VERSION_1));
        set_queue(&registers, 1, &layout);
        assert_eq!(read32(&registers, reg::QUEUE_NUM_MAX), 64);
        assert_eq!(read32(&registers, reg::QUEUE_READY), 1);
        for none in [2, 3, 0xffff_ffff] {
            set_queue(&registers, none, &layout);
            assert_eq!(read32(&registers, reg::QUEUE_NUM_MAX), 0);
            assert_eq!(read32(&registers, reg::QUEUE_READY), 0);
        }
        write32(&registers, reg::STATUS, 15);
        let changed = QueueLayout {
            ready: false,
            ..QueueLayout::default()
        };
        set_queue(&registers, 1, &changed);
        assert_eq!(read32(&registers, reg::QUEUE_READY), 1);
        let Some(DriverMsg::Queue {
            index: 1,
            layout: told,
        }) = inbox.next()
        else {
            panic!("no queue");
        };
        assert_eq!(told, layout);
        assert!(matches!(inbox.next(), Some(DriverMsg::Activate { .. })));
    }

    #[test]
    fn registers_when_accessed_oddly_answer_zeros_and_stay() {
        let (registers, _inbox) = registers();
        for len in [1, 2, 3, 5, 8, 64] {
            for offset in 0..0x100 {
                let mut data = vec![0xee; len];
                registers.read(offset, &mut data);
                assert_eq!(data, vec![0; len], "{offset:#x} {len}");
                assert!(matches!(registers.write(offset, &data), Written::Done));
            }
        }
        for offset in [1, 2, 3, 0x06e, 0x071, 0x0fd, 0x0ff] {
            assert_eq!(read32(&registers, offset), 0, "{offset:#x}");
            write32(&registers, offset, 1);
        }
        assert_eq!(read32(&registers, reg::STATUS), 0);
        assert!(registers.ignored() > 0);
    }

    #[test]
    fn config_when_read_at_any_size_is_itself_then_zeros() {
        let (registers, _inbox) = registers();
        for (offset, data) in [
            (0x100, vec![1]),
            (0x101, vec![2, 3]),
            (0x100, vec![1, 2, 3, 4]),
            (0x101, vec![2, 3, 4, 5, 6, 7, 8, 9]),
            (0x107, vec![8, 9, 0, 0]),
            (0x13f, vec![0, 0]),
            (0xffc, vec![0; 4]),
            (u64::MAX, vec![0; 8]),
        ] {
            let mut read = vec![0xee; data.len()];
            registers.read(offset, &mut read);
            assert_eq!(read, data, "{offset:#x}");
        }
        assert!(matches!(registers.write(0x100, &[9, 9]), Written::Done));
        let mut read = [0; 2];
        registers.read(0x100, &mut read);
        assert_eq!(read, [1, 2]);
    }

    #[test]
    fn set_config_when_driver_is_there_tells_it() {
        let config = ConfigSpace::new().with(0, &[7]);
        let (idle, _inbox) = registers();
        idle.set_config(config);
        assert_eq!(read32(&idle, reg::INTERRUPT_STATUS), 0);
        assert_eq!(read32(&idle, reg::CONFIG_GENERATION), 1);
        let (registers, _inbox) = active();
        registers.set_config(config);
        assert_eq!(read32(&registers, reg::INTERRUPT_STATUS), 2);
        let mut read = [0];
        registers.read(0x100, &mut read);
        assert_eq!(read, [7]);
        write32(&registers, reg::INTERRUPT_ACK, 2);
        assert_eq!(read32(&registers, reg::INTERRUPT_STATUS), 0);
    }

    #[test]
    fn reset_when_never_active_is_done_at_once() {
        let (registers, inbox) = registers();
        assert!(negotiate(&registers, feature::VERSION_1));
        write32(&registers, reg::QUEUE_SEL, 1);
        assert!(matches!(reset(&registers), Written::Done));
        assert!(inbox.next().is_none());
        assert_eq!(read32(&registers, reg::STATUS), 0);
        assert_eq!(read32(&registers, reg::QUEUE_NUM_MAX), 256);
    }

    #[test]
    fn reset_when_active_is_done_when_the_worker_says_so() {
        let (registers, inbox) = active();
        registers.interrupt().used_buffers();
        registers.interrupt().demand_reset();
        assert_eq!(read32(&registers, reg::STATUS), 0x4f);
        let Written::After(first) = reset(&registers) else {
            panic!("did not wait");
        };
        // A second vCPU does the same; a third goes on as if nothing were.
        let Written::After(second) = reset(&registers) else {
            panic!("did not wait");
        };
        write32(&registers, reg::STATUS, 1);
        write32(&registers, reg::QUEUE_SEL, 1);
        assert_eq!(read32(&registers, reg::STATUS), 0x4f);
        assert!(!first.is_done() && !second.is_done());

        let Some(DriverMsg::Reset(completer)) = inbox.next() else {
            panic!("no reset");
        };
        drop(completer);
        assert!(first.is_done() && !second.is_done());
        assert_eq!(read32(&registers, reg::STATUS), 0);
        assert_eq!(read32(&registers, reg::INTERRUPT_STATUS), 0);
        // The late one comes before the new activation, and so does it no harm.
        assert!(negotiate(&registers, feature::VERSION_1));
        write32(&registers, reg::STATUS, 15);
        assert!(matches!(inbox.next(), Some(DriverMsg::Reset(_))));
        assert!(second.is_done());
        assert_eq!(read32(&registers, reg::STATUS), 15);
        assert!(matches!(inbox.next(), Some(DriverMsg::Activate { .. })));
    }

    #[test]
    fn worker_when_gone_leaves_no_one_waiting() {
        let (registers, inbox) = active();
        drop(inbox);
        assert!(matches!(reset(&registers), Written::Done));
        assert_eq!(read32(&registers, reg::STATUS), 0);
        assert!(negotiate(&registers, feature::VERSION_1));
        write32(&registers, reg::STATUS, 15);
        assert_eq!(read32(&registers, reg::STATUS), 0x4f);
        assert_eq!(read32(&registers, reg::INTERRUPT_STATUS), 2);
    }

    #[test]
    fn notify_when_no_ioeventfd_took_it_kicks() {
        let (registers, _inbox) = registers();
        write32(&registers, reg::QUEUE_NOTIFY, 1);
        assert_eq!(registers.kicks()[1].read().unwrap(), 1);
        write32(&registers, reg::QUEUE_NOTIFY, 2);
        write32(&registers, reg::QUEUE_NOTIFY, u32::MAX);
        assert_eq!(registers.ignored(), 2);
        assert!(registers.kicks()[0].read().is_err());
    }
}
