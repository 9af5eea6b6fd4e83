//! The register block: any accesses, workers that answer at any time, saving and restoring.

use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::bus::{Completer, Registers as _, Ticket, Written};
use crate::fuzz::Input;
use crate::inbox::{Inbox, inbox};
use crate::virtio::registers::driver_messages;
use crate::virtio::registers::{DriverMsg, LENGTH, Offer, Registers, RegistersState};
use crate::virtio::share::Division;
use crate::virtio::{ConfigSpace, Interrupt, QueueLayout, feature, status};

const SIZES: &[u16] = &[256, 64, 1];
const OFFERED: u64 = feature::COMMON | 0b1010;
const STATUS: u64 = 0x70;
/// The most resets that can be under way: one for each vCPU.
const VCPUS: usize = 32;

/// Reads and writes of any size at any offset, of a device whose worker resets whenever it likes.
/// Checked after each: Status moves as the specification lets it, the worker is told of what was
/// negotiated and of nothing else, and registers that are saved can be restored and saved as the same.
pub fn registers(bytes: &[u8]) {
    let input = &mut Input::new(bytes);
    let (registers, inbox) = make(&RegistersState::default()).unwrap();
    let mut test = Test {
        registers,
        inbox,
        resets: Vec::new(),
        waits: None,
        serving: None,
    };
    while !input.is_empty() {
        match input.below(16) {
            0 => test.read(input),
            1 => test.answer(input),
            2 => test.save(),
            3 => test.interrupt(input),
            4 => {
                let config = ConfigSpace::new().with(0, &[input.u8()]);
                test.registers.set_config(config);
            }
            5 => test.start(input),
            _ => test.write(input),
        }
    }
}

fn make(state: &RegistersState) -> std::io::Result<(Registers, Inbox<DriverMsg>)> {
    let (sender, inbox) = inbox(driver_messages(SIZES.len())).unwrap();
    let interrupt = Interrupt::new(EventFd::new(EFD_NONBLOCK).unwrap());
    let offer = Offer {
        device_id: 2,
        features: OFFERED,
        feature_names: |features| format!("{features:#x}"),
        division: Division::whole(SIZES),
        config: ConfigSpace::new().with(0, &[1, 2, 3, 4, 5, 6, 7, 8, 9]),
    };
    let registers = Registers::new(offer, state, Arc::new(interrupt), sender.into())?;
    Ok((registers, inbox))
}

struct Test {
    registers: Registers,
    inbox: Inbox<DriverMsg>,
    /// Resets that the worker was told of and has not completed.
    resets: Vec<Completer>,
    /// The write of 0 to Status that is not complete, if there is one.
    waits: Option<Ticket>,
    /// What the worker serves: the negotiated features.
    serving: Option<u64>,
}

impl Test {
    fn get(&self, offset: u64) -> u32 {
        let mut data = [0xee; 4];
        self.registers.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn status(&self) -> u32 {
        self.get(STATUS) & !status::DEVICE_NEEDS_RESET
    }

    fn read(&self, input: &mut Input<'_>) {
        let offset = offset(input);
        let mut data = vec![0xee; input.one_of(&[4, 1, 2, 8, 3, 0, 64])];
        let before = self.status();
        self.registers.read(offset, &mut data);
        assert_eq!(self.status(), before);
        if offset >= 0x100 + 64 || offset < 0x100 && data.len() != 4 {
            assert!(data.iter().all(|byte| *byte == 0), "{offset:#x} {data:?}");
        }
    }

    fn write(&mut self, input: &mut Input<'_>) {
        let offset = offset(input);
        let value = match input.below(4) {
            0 => input.u32(),
            1 => u32::from(input.u8()),
            2 => input.one_of(&[0, 1, 3, 11, 15, 0x80, 0x4f, u32::MAX]),
            _ => self.get(offset),
        };
        if self.resets.len() < VCPUS {
            let len = if input.below(16) == 0 {
                input.below(9)
            } else {
                4
            };
            self.put(offset, &u64::from(value).to_le_bytes()[..len]);
        }
    }

    /// What the worker tells the driver by itself, while it serves.
    fn interrupt(&self, input: &mut Input<'_>) {
        match (self.serving, input.below(8)) {
            (None, _) => {}
            (_, 0) => self.registers.interrupt().demand_reset(),
            _ => self.registers.interrupt().used_buffers(),
        }
    }

    /// All that a driver does, up to where the input says.
    fn start(&mut self, input: &mut Input<'_>) {
        if self.resets.len() >= VCPUS {
            return;
        }
        let features = [(0x24, 0), (0x20, input.u32()), (0x24, 1), (0x20, 1)];
        let queue = [(0x30, u32::from(input.u8() % 4)), (0x38, 64), (0x44, 1)];
        let steps = [(0x70, 0), (0x70, 1), (0x70, 3)]
            .into_iter()
            .chain(features);
        let steps = steps.chain([(0x70, 11)]).chain(queue).chain([(0x70, 15)]);
        for (offset, value) in steps.take(input.below(16)) {
            self.put(offset, &value.to_le_bytes());
        }
    }

    fn put(&mut self, offset: u64, data: &[u8]) {
        let before = self.status();
        let was_resetting = self.waits.is_some();
        let written = self.registers.write(offset, data);
        if let Written::After(ticket) = written {
            assert!(offset == STATUS && *data == [0; 4]);
            self.waits.get_or_insert(ticket);
        }
        let after = self.status();
        let is_status = offset == STATUS && data.len() == 4;
        if !is_status || was_resetting {
            assert_eq!(after, before, "{offset:#x} {data:?}");
        } else if after != before {
            let value = u32::from_le_bytes(data.try_into().unwrap());
            assert_eq!(after, value & !status::DEVICE_NEEDS_RESET);
            let added = after & !before;
            assert!(
                after == 0 || after & before == before,
                "{before:#x} {after:#x}"
            );
            assert!(before & status::FAILED == 0 || after == 0);
            let order = [0, status::ACKNOWLEDGE, 3, 11, 15];
            let is_step = order.contains(&before) && order.contains(&after);
            assert!(after == 0 || added == status::FAILED || is_step);
        }
        self.take_messages(before, after);
    }

    /// What the worker is told must follow from the write just made.
    fn take_messages(&mut self, before: u32, after: u32) {
        let mut queues: Vec<(usize, QueueLayout)> = Vec::new();
        while let Some(message) = self.inbox.next() {
            match message {
                DriverMsg::Queue { index, layout } => {
                    assert!(layout.ready && index < SIZES.len());
                    assert!(queues.iter().all(|(other, _)| *other < index));
                    queues.push((index, layout));
                }
                DriverMsg::Activate { features } => {
                    let active = status::DRIVER_OK;
                    assert!(before & active == 0 && after & active != 0);
                    assert!(features & !OFFERED == 0 && features & feature::VERSION_1 != 0);
                    assert_eq!(self.serving.replace(features), None);
                }
                DriverMsg::Reset(completer) => {
                    assert!(before & status::DRIVER_OK != 0);
                    self.resets.push(completer);
                }
            }
        }
        if before & status::DRIVER_OK == 0 && after & status::DRIVER_OK != 0 {
            assert!(self.serving.is_some());
        } else {
            assert!(queues.is_empty());
        }
    }

    /// The worker completes the reset that it was told of first.
    fn answer(&mut self, input: &mut Input<'_>) {
        if self.resets.is_empty() {
            return;
        }
        for completer in self.resets.drain(..1 + input.below(self.resets.len())) {
            self.serving = None;
            drop(completer);
        }
        // Of several resets of one driver the first is the one that counts.
        if self.waits.take_if(|ticket| ticket.is_done()).is_some() {
            assert_eq!(self.get(STATUS), 0);
            for offset in [0x44, 0x60] {
                assert_eq!(self.get(offset), 0);
            }
        }
    }

    fn save(&self) {
        let Some(state) = self.registers.save() else {
            assert!(self.waits.is_some());
            return;
        };
        let (restored, inbox) = make(&state).expect("what was saved can be restored");
        assert!(inbox.next().is_none());
        let again = restored.save().unwrap();
        // The restored device has another configuration, and tells its driver so.
        let changed = state.config != again.config;
        let expected = RegistersState {
            generation: state.generation.wrapping_add(u32::from(changed)),
            interrupt_status: again.interrupt_status,
            config: again.config.clone(),
            ..state.clone()
        };
        assert_eq!(again, expected);
        assert_eq!(
            again.interrupt_status & state.interrupt_status,
            state.interrupt_status
        );
    }
}

/// An offset: of a register as a rule.
fn offset(input: &mut Input<'_>) -> u64 {
    match input.below(8) {
        0 => u64::from(input.u16()) % LENGTH,
        1 => 0x100 + u64::from(input.u8()) % 80,
        2 | 3 => STATUS,
        _ => u64::from(input.u8()) & !3,
    }
}
