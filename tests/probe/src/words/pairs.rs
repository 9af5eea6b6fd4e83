//! `netpairs`: an interface with several pairs of queues (virtio 1.2, section 5.1.6.5.5).

use super::net::{BROADCAST, EXPERIMENT, HEADER, feature, write_ethernet};
use super::{Arguments, Outcome};
use crate::arena::{self, Arena};
use crate::clock::{self, Deadline};
use crate::text::Text;
use crate::virtio::queue::{Buffer, Queue};
use crate::virtio::{Device, NET};
use crate::{serial, text, x86};

/// As many pairs as there may be.
const MOST: usize = 16;
/// Receive buffers of each pair, and their size.
const BUFFERS: u64 = 64;
const BUFFER: u64 = 2048;
/// Where the configuration space says how many pairs there are.
const MAX_PAIRS: u64 = 8;
/// An answer that no device writes.
const UNTOUCHED: u8 = 0xee;
/// Flows by which the host numbers what it sends, and the port of the first.
const FLOWS: usize = 64;
const FIRST_PORT: u16 = 2000;
/// What is before the payload of a UDP datagram in a frame without options.
const HEADERS: usize = 14 + 20 + 8;
const OK: u8 = 0;
const ERR: u8 = 1;

struct Pair {
    receive: Queue,
    transmit: Queue,
    /// Address of the buffer of each receive descriptor.
    buffers: [u64; BUFFERS as usize],
    received: u64,
    /// The number that the last datagram of each flow had.
    numbers: [u32; FLOWS],
}

struct Control {
    number: u32,
    queue: Queue,
    /// The command; its answer behind it.
    memory: u64,
}

impl Control {
    /// Sends `bytes` as a command; the answer.
    fn command(&mut self, device: &Device, bytes: &[u8]) -> Result<u8, Text> {
        let answer = self.memory + 64;
        arena::bytes(self.memory, bytes.len() as u64).copy_from_slice(bytes);
        x86::store(answer, 1, u64::from(UNTOUCHED));
        let chain = [
            Buffer::readable(self.memory, bytes.len() as u32),
            Buffer::writable(answer, 1),
        ];
        self.submit(device, &chain)?;
        Ok(x86::load(answer, 1) as u8)
    }

    fn submit(&mut self, device: &Device, chain: &[Buffer]) -> Result<(), Text> {
        self.queue.add(chain).ok_or("control ring full")?;
        if self.queue.should_kick() {
            device.kick(self.number);
        }
        let mut done = false;
        clock::wait_until(clock::patience_ms(), || {
            done = self.queue.pop().is_some();
            done
        });
        match done {
            true => Ok(()),
            false => Err(text!("command not answered, status {:#x}", device.status())),
        }
    }

    fn pairs(&mut self, device: &Device, count: u16) -> Result<u8, Text> {
        let [low, high] = count.to_le_bytes();
        self.command(device, &[4, 0, low, high])
    }
}

pub fn pairs(arguments: &mut Arguments) -> Outcome {
    let mut device = Device::find_type(arguments.number("N")?, NET)?;
    let wanted = arguments.number("PAIRS")? as u16;
    let frames = arguments.number("FRAMES")?;
    let mut arena = Arena::new();
    device.negotiate(feature::PLAIN | feature::MQ | feature::CTRL_VQ)?;
    if device.features & feature::MQ == 0 {
        return Err("the device has one pair".into());
    }
    let most = device.config(MAX_PAIRS, 2) as u16;
    let mut pairs = [const { None }; MOST];
    for (number, place) in (0..most).zip(&mut pairs) {
        *place = Some(pair(&device, &mut arena, u32::from(number))?);
    }
    let number = 2 * u32::from(most);
    let mut control = Control {
        number,
        queue: device.queue(&mut arena, number, 64)?,
        memory: arena.take(128, 64)?,
    };
    device.driver_ok();
    refusals(&device, &mut control, most)?;
    for count in [most, 1, wanted] {
        let answer = control.pairs(&device, count)?;
        if answer != OK {
            return Err(text!("{count} pairs: answer {answer}"));
        }
    }
    // What came while more pairs were used, the batch that was on its way included, does not count.
    clock::wait_ms(20);
    for (number, pair) in (0..).zip(pairs.iter_mut().flatten()) {
        take(&device, pair, number)?;
        pair.received = 0;
    }
    serial::line(format_args!("  netpairs ready"));
    exchange(&device, &mut arena, &mut pairs, usize::from(wanted), frames)?;
    let mut text = text!("of={most} received");
    for pair in pairs.iter().flatten() {
        text = text!("{text} {}", pair.received);
    }
    Ok(text)
}

fn pair(device: &Device, arena: &mut Arena, number: u32) -> Result<Pair, Text> {
    let mut pair = Pair {
        receive: device.queue(arena, 2 * number, BUFFERS as u32)?,
        transmit: device.queue(arena, 2 * number + 1, 64)?,
        buffers: [0; BUFFERS as usize],
        received: 0,
        numbers: [0; FLOWS],
    };
    for _ in 0..BUFFERS {
        let address = arena.reserve(BUFFER, 64)?;
        give(&mut pair, address)?;
    }
    Ok(pair)
}

fn give(pair: &mut Pair, address: u64) -> Result<(), Text> {
    let head = pair
        .receive
        .add(&[Buffer::writable(address, BUFFER as u32)])
        .ok_or("receive ring full")?;
    pair.buffers[usize::from(head)] = address;
    Ok(())
}

/// What no device may do.
fn refusals(device: &Device, control: &mut Control, most: u16) -> Result<(), Text> {
    for count in [0, most + 1, u16::MAX] {
        let answer = control.pairs(device, count)?;
        if answer != ERR {
            return Err(text!("{count} pairs: answer {answer}"));
        }
    }
    let commands: [&[u8]; 7] = [
        &[4],
        &[4, 0],
        &[4, 0, 1],
        &[4, 0, 1, 0, 0],
        &[4, 1, 1, 0],
        &[0, 0, 1, 0],
        &[0xff; 60],
    ];
    for command in commands {
        let answer = control.command(device, command)?;
        if answer != ERR {
            return Err(text!("{command:x?}: answer {answer}"));
        }
    }
    // No place for the answer; nothing but that place.
    let memory = control.memory;
    control.submit(device, &[Buffer::readable(memory, 4)])?;
    control.submit(device, &[Buffer::writable(memory, 4)])
}

/// Sends a frame by each pair that is used, and receives `frames` by all of them together.
fn exchange(
    device: &Device,
    arena: &mut Arena,
    pairs: &mut [Option<Pair>; MOST],
    used: usize,
    frames: u64,
) -> Result<(), Text> {
    let mac = core::array::from_fn(|i| device.config(i as u64, 1) as u8);
    for (number, pair) in pairs.iter_mut().flatten().enumerate().take(used) {
        let frame = arena.take(HEADER + 60, 64)?;
        let bytes = arena::bytes(frame + HEADER, 60);
        write_ethernet(bytes, &BROADCAST, &mac, EXPERIMENT);
        bytes[14..].fill(number as u8 + 1);
        let chain = [Buffer::readable(frame, (HEADER + 60) as u32)];
        pair.transmit.add(&chain).ok_or("transmit ring full")?;
        if pair.transmit.should_kick() {
            device.kick(2 * number as u32 + 1);
        }
        let sent = || pair.transmit.pop().is_some();
        if !clock::wait_until(clock::patience_ms(), sent) {
            return Err(text!("frame of pair {number} is not sent"));
        }
    }
    let mut total = 0;
    let mut before = 0;
    let mut patience = Deadline::in_ms(clock::patience_ms());
    while total < frames {
        total = 0;
        for (number, pair) in (0..).zip(pairs.iter_mut().flatten()) {
            take(device, pair, number)?;
            total += pair.received;
        }
        if total != before {
            before = total;
            patience = Deadline::in_ms(clock::patience_ms());
        } else if patience.passed() {
            return Err(text!("{total} frames received"));
        }
    }
    Ok(())
}

/// Counts what pair `number` has received, and gives the buffers back.
fn take(device: &Device, pair: &mut Pair, number: u32) -> Result<(), Text> {
    while let Some((head, size)) = pair.receive.pop() {
        let place = pair.buffers.get(usize::from(head));
        let address = *place.ok_or("completion of no buffer")?;
        if size <= HEADER as u32 {
            return Err(text!("frame of {size} bytes"));
        }
        let frame = arena::bytes(address + HEADER, u64::from(size) - HEADER);
        check(frame, &mut pair.numbers).map_err(|why| text!("pair {number}: {why}"))?;
        give(pair, address)?;
        pair.received += 1;
    }
    if pair.receive.should_kick() {
        device.kick(2 * number);
    }
    Ok(())
}

/// Whether a datagram of the host is as it was sent, and comes after those of its flow: it has its number, and bytes that
/// follow from that.
fn check(frame: &[u8], numbers: &mut [u32; FLOWS]) -> Result<(), Text> {
    let Some((headers, payload)) = frame.split_at_checked(HEADERS) else {
        return Ok(());
    };
    // IPv4, UDP, and a port of the flows.
    let flow = u16::from_be_bytes([headers[36], headers[37]]).wrapping_sub(FIRST_PORT);
    let Some(last) = numbers.get_mut(usize::from(flow)) else {
        return Ok(());
    };
    if headers[12..15] != [8, 0, 0x45] || headers[23] != 17 {
        return Ok(());
    }
    let Some((number, bytes)) = payload.split_first_chunk::<4>() else {
        return Err(text!("a datagram of {} bytes", payload.len()));
    };
    let number = u32::from_le_bytes(*number);
    if number <= *last {
        return Err(text!("number {number} of flow {flow} comes after {last}"));
    }
    *last = number;
    let expected = |at: usize| (number as u8).wrapping_mul(31).wrapping_add(at as u8);
    match bytes
        .iter()
        .enumerate()
        .find(|(at, byte)| **byte != expected(*at))
    {
        Some((at, byte)) => Err(text!("byte {at} of number {number} is {byte:#x}")),
        None => Ok(()),
    }
}
