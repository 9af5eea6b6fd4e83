//! `blkepochs`: writes in epochs with a flush after each, so that a host that kills the monitor can tell from the disk
//! whether all that was flushed is there.
//!
//! Which sectors an epoch writes, and with what, follows from the seed (see `crate::pattern`): the library of this
//! package says whether a disk is one that such a guest can have left (`probe_host::epochs`). `  flushed EPOCH` is
//! printed when the flush after an epoch has succeeded; without FLUSH, when all its writes have.

use super::block::{HEADER, SECTOR, UNTOUCHED, config, feature, request};
use super::{Arguments, Outcome};
use crate::arena::{self, Arena};
use crate::clock::{self, Deadline};
use crate::text::Text;
use crate::virtio::queue::{Buffer, Queue};
use crate::virtio::{BLOCK, Device};
use crate::{pattern, serial, text, x86};

const SLOTS: usize = 64;
const ENTRIES: u32 = 256;

struct Writer {
    device: Device,
    queue: Queue,
    /// Header and status byte, and data, of each request that can be in flight.
    headers: [u64; SLOTS],
    data: [u64; SLOTS],
    /// Which slot a chain's head belongs to.
    owner: [u8; ENTRIES as usize],
    idle: [u8; SLOTS],
    idle_count: usize,
    depth: usize,
}

pub fn epochs(arguments: &mut Arguments) -> Outcome {
    let index = arguments.number("N")?;
    let (seed, writes) = (arguments.number("SEED")?, arguments.number("WRITES")?);
    let depth = arguments.number("DEPTH")? as usize;
    let last = arguments.number_or("EPOCHS", u64::MAX)?;
    if depth == 0 || depth > SLOTS {
        return Err("DEPTH out of range".into());
    }
    let mut writer = Writer::open(index, depth)?;
    let sectors = writer.device.config(config::CAPACITY, 8);
    if sectors < pattern::EPOCH_SECTORS {
        return Err(text!("a disk of {sectors} sectors is too small"));
    }
    let flushes = writer.device.features & feature::FLUSH != 0;
    serial::line(format_args!("  blkepochs flushes={flushes}"));
    for epoch in 1..=last {
        for write in 0..writes {
            let (sector, count) = pattern::epoch_place(seed, epoch, write, sectors);
            writer.write(pattern::epoch_seed(seed, epoch), sector, count)?;
        }
        writer.wait_for(writer.depth)?;
        if flushes {
            writer.publish(request::FLUSH, 0, 0)?;
            writer.wait_for(writer.depth)?;
        }
        serial::line(format_args!("  flushed {epoch}"));
    }
    Ok(text!("epochs={last} writes={}", last * writes))
}

/// Makes COUNT reads at once, and says of each completion that it has come.
pub fn tell(arguments: &mut Arguments) -> Outcome {
    let (index, count) = (arguments.number("N")?, arguments.number("COUNT")? as usize);
    if count == 0 || count > SLOTS {
        return Err("COUNT out of range".into());
    }
    let mut writer = Writer::open(index, count)?;
    for sector in 0..count {
        writer.publish(request::READ, sector as u64, 1)?;
    }
    for told in 1..=count {
        writer.wait_for(told)?;
        serial::line(format_args!("  told {told}."));
    }
    Ok(text!("count={count}"))
}

impl Writer {
    fn open(index: u64, depth: usize) -> Result<Self, Text> {
        let mut device = Device::find_type(index, BLOCK)?;
        device.negotiate(feature::ALL)?;
        let mut arena = Arena::new();
        let queue = device.queue(&mut arena, 0, ENTRIES)?;
        device.driver_ok();
        let (mut headers, mut data) = ([0; SLOTS], [0; SLOTS]);
        for slot in 0..depth {
            headers[slot] = arena.take(HEADER + 1, 64)?;
            data[slot] = arena.take(pattern::EPOCH_SECTORS * SECTOR, 4096)?;
        }
        Ok(Writer {
            device,
            queue,
            headers,
            data,
            owner: [0; ENTRIES as usize],
            idle: core::array::from_fn(|i| i as u8),
            idle_count: depth,
            depth,
        })
    }

    fn write(&mut self, seed: u64, sector: u64, count: u64) -> Result<(), Text> {
        self.wait_for(1)?;
        let slot = usize::from(self.idle[self.idle_count - 1]);
        let bytes = arena::bytes(self.data[slot], count * SECTOR);
        pattern::fill(seed, sector, bytes);
        self.publish(request::WRITE, sector, count)
    }

    fn publish(&mut self, kind: u32, sector: u64, count: u64) -> Result<(), Text> {
        let slot = self.idle[self.idle_count - 1];
        let (at, data) = (
            self.headers[usize::from(slot)],
            self.data[usize::from(slot)],
        );
        x86::store(at, 8, u64::from(kind));
        x86::store(at + 8, 8, sector);
        x86::store(at + HEADER, 1, u64::from(UNTOUCHED));
        let header = Buffer::readable(at, HEADER as u32);
        let status = Buffer::writable(at + HEADER, 1);
        let head = match count {
            0 => self.queue.add(&[header, status]),
            _ => {
                let len = (count * SECTOR) as u32;
                let data = match kind {
                    request::READ => Buffer::writable(data, len),
                    _ => Buffer::readable(data, len),
                };
                self.queue.add(&[header, data, status])
            }
        };
        let head = usize::from(head.ok_or("ring full")?);
        *self.owner.get_mut(head).ok_or("a head beyond the ring")? = slot;
        self.idle_count -= 1;
        if self.queue.should_kick() {
            self.device.kick(0);
        }
        Ok(())
    }

    /// Takes completions until `count` requests can be made.
    fn wait_for(&mut self, count: usize) -> Result<(), Text> {
        let limit = Deadline::in_ms(clock::patience_ms());
        while self.idle_count < count {
            let Some((head, _)) = self.queue.pop() else {
                if limit.passed() {
                    return Err(text!(
                        "{} requests are not answered",
                        self.depth - self.idle_count
                    ));
                }
                core::hint::spin_loop();
                continue;
            };
            let slot = *self
                .owner
                .get(usize::from(head))
                .ok_or("completion of no request")?;
            let status = x86::load(self.headers[usize::from(slot)] + HEADER, 1);
            if status != 0 {
                return Err(text!("a request ended with status {status}"));
            }
            *self
                .idle
                .get_mut(self.idle_count)
                .ok_or("more completions than requests")? = slot;
            self.idle_count += 1;
        }
        Ok(())
    }
}
