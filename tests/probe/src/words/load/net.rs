//! `netload`: frames as fast as a network interface takes or brings them, and one that goes to and fro.

use super::{Latency, interrupts, per_second};
use crate::arena::{self, Arena};
use crate::clock::{self, Deadline};
use crate::text::Text;
use crate::virtio::queue::{Buffer, CHAIN_MAX, Interrupts, Queue};
use crate::virtio::{Device, NET};
use crate::words::net::{
    BROADCAST, ETHERNET, EXPERIMENT, HEADER, NUM_BUFFERS, RECEIVE, TRANSMIT, feature,
    write_ethernet,
};
use crate::words::{Arguments, Outcome};
use crate::{serial, text, x86};

const ENTRIES: u32 = 256;
/// The longest frame that needs no segmentation by the host.
const PLAIN_MAX: u64 = 1514;
/// The longest frame: an IPv4 packet of 65,535 bytes.
const FRAME_MAX: u64 = 65_549;
/// Sizes of receive buffers: for ordinary frames, for large ones that are merged, and for large ones that are not.
const SMALL_BUFFER: u64 = 1536 + HEADER;
const PAGE: u64 = 4096;
const LARGE_BUFFER: u64 = 65_562;
/// Frames that are published, and buffers that are given back, between two looks at whether to notify the device.
const BATCH: u32 = 16;
/// How long no frame may come before a span of work begins, and how long a frame may be on its way.
const QUIET_MS: u64 = 20;
const LOST_MS: u64 = 50;
/// Headers of a TCP segment: Ethernet, IPv4, TCP.
const TCP_HEADERS: u64 = 54;
const SEGMENT: u64 = 1448;

/// A running interface with one pair of queues.
struct Port {
    device: Device,
    receive: Queue,
    transmit: Queue,
    arena: Arena,
    buffer_size: u64,
    /// Address of the buffer under each receive descriptor.
    buffers: [u64; ENTRIES as usize],
    merged: bool,
    kicks: u64,
}

impl Port {
    fn open(index: u64, size: u64, wanted: Interrupts) -> Result<Self, Text> {
        let mut device = Device::find_type(index, NET)?;
        let large = size > PLAIN_MAX;
        let offload = if large { feature::OFFLOAD } else { 0 };
        device.negotiate(feature::PLAIN | offload)?;
        let mut arena = Arena::new();
        let mut receive = device.queue(&mut arena, RECEIVE, ENTRIES)?;
        let mut transmit = device.queue(&mut arena, TRANSMIT, ENTRIES)?;
        receive.ask_for_interrupts(wanted);
        transmit.ask_for_interrupts(Interrupts::None);
        let merged = device.features & feature::MRG_RXBUF != 0;
        let buffer_size = match (large, merged) {
            (false, _) => SMALL_BUFFER,
            (true, true) => PAGE,
            (true, false) => LARGE_BUFFER,
        };
        let mut port = Port {
            device,
            receive,
            transmit,
            arena,
            buffer_size,
            buffers: [0; ENTRIES as usize],
            merged,
            kicks: 0,
        };
        let count = match buffer_size {
            LARGE_BUFFER => 64,
            _ => port.receive.size,
        };
        for _ in 0..count.min(port.receive.size) {
            let address = port.arena.take(buffer_size, 64)?;
            port.give(address)?;
        }
        port.device.driver_ok();
        port.kick_receive();
        Ok(port)
    }

    fn give(&mut self, address: u64) -> Result<(), Text> {
        let buffer = Buffer::writable(address, self.buffer_size as u32);
        let head = self.receive.add(&[buffer]).ok_or("receive ring full")?;
        self.buffers[usize::from(head)] = address;
        Ok(())
    }

    fn kick_receive(&mut self) {
        if self.receive.should_kick() {
            self.device.kick(RECEIVE);
            self.kicks += 1;
        }
    }

    fn kick_transmit(&mut self) {
        if self.transmit.should_kick() {
            self.device.kick(TRANSMIT);
            self.kicks += 1;
        }
    }

    /// The next frame's size without its header, if one has come. `look` is shown its first piece, header included;
    /// its buffers are given back at once, and the device is told by `kick_receive`.
    fn take(&mut self, mut look: impl FnMut(&[u8])) -> Result<Option<u64>, Text> {
        let Some((head, size)) = self.receive.pop() else {
            return Ok(None);
        };
        let mut address = self.buffer_of(head)?;
        let mut whole = u64::from(size);
        if whole < HEADER || whole > self.buffer_size {
            return Err(text!("{size} bytes in a buffer of {}", self.buffer_size));
        }
        let count = match self.merged {
            true => x86::load(address + NUM_BUFFERS, 2),
            false => 1,
        };
        look(arena::bytes(address, whole));
        for _ in 1..count {
            self.give(address)?;
            // All buffers of a frame are used at once (section 5.1.6.3.2).
            let (head, size) = self
                .receive
                .pop()
                .ok_or("a frame's further buffers are missing")?;
            address = self.buffer_of(head)?;
            whole += u64::from(size);
        }
        self.give(address)?;
        Ok(Some(whole - HEADER))
    }

    fn buffer_of(&self, head: u16) -> Result<u64, Text> {
        match self.buffers.get(usize::from(head)).copied().unwrap_or(0) {
            0 => Err(text!("completion of unknown buffer {head}")),
            address => Ok(address),
        }
    }

    /// Takes frames until none has come for a while: those meant for an earlier word.
    fn quiet(&mut self) -> Result<(), Text> {
        let mut end = Deadline::in_ms(QUIET_MS);
        let patience = Deadline::in_ms(clock::patience_ms());
        while !end.passed() {
            if self.take(|_| {})?.is_some() {
                self.kick_receive();
                end = Deadline::in_ms(QUIET_MS);
            }
            if patience.passed() {
                return Err("frames come without end".into());
            }
        }
        self.kicks = 0;
        Ok(())
    }
}

/// What is kept of the frames of a word.
struct Tally {
    frames: u64,
    bytes: u64,
    ticks: u64,
}

impl Tally {
    fn text(&self, port: &Port, rest: Text) -> Text {
        text!(
            "frames={} bytes={} ns={} frames/s={} mbit/s={} kicks={} {rest}",
            self.frames,
            self.bytes,
            clock::ns(self.ticks),
            per_second(self.frames, self.ticks),
            per_second(self.bytes.saturating_mul(8), self.ticks) / 1_000_000,
            port.kicks,
        )
    }
}

pub fn load(arguments: &mut Arguments) -> Outcome {
    let index = arguments.number("N")?;
    let mode = arguments.text().ok_or("MODE is missing")?;
    let (size, ms) = (arguments.number("SIZE")?, arguments.number("MS")?);
    if !(TCP_HEADERS + 8..=FRAME_MAX).contains(&size) {
        return Err("SIZE out of range".into());
    }
    let mut wanted = Interrupts::None;
    while let Some(option) = arguments.text() {
        wanted = interrupts(option).ok_or_else(|| text!("no option {option}"))?;
    }
    let mut port = Port::open(index, size, wanted)?;
    port.quiet()?;
    match mode {
        "tx" => transmit(&mut port, size, ms),
        "rx" => receive(&mut port, size, ms),
        "pingpong" => ping_pong(&mut port, size, ms),
        _ => Err(text!("no mode {mode}")),
    }
}

fn begun() {
    serial::line(format_args!("  netload begun"));
}

/// A frame that lies ready: in one piece, or with its data in pages that lie apart as a kernel's would.
#[derive(Clone, Copy)]
struct Prepared {
    chain: [Buffer; CHAIN_MAX as usize],
    count: usize,
}

impl Prepared {
    fn new(port: &mut Port, size: u64) -> Result<Self, Text> {
        let mac: [u8; 6] = core::array::from_fn(|i| port.device.config(i as u64, 1) as u8);
        let first = if size > PLAIN_MAX { TCP_HEADERS } else { size };
        let address = port.arena.take(HEADER + first, 64)?;
        let frame = arena::bytes(address + HEADER, first);
        write_ethernet(frame, &BROADCAST, &mac, EXPERIMENT);
        let mut prepared = Prepared {
            chain: [Buffer::readable(address, (HEADER + first) as u32); CHAIN_MAX as usize],
            count: 1,
        };
        if size > PLAIN_MAX {
            segmented(address, size);
        }
        let mut left = size - first;
        while left > 0 {
            let piece = left.min(PAGE);
            // Every other page.
            let page = port.arena.take(2 * PAGE, PAGE)?;
            *prepared
                .chain
                .get_mut(prepared.count)
                .ok_or("too many pages")? = Buffer::readable(page, piece as u32);
            prepared.count += 1;
            left -= piece;
        }
        Ok(prepared)
    }

    /// Where the frame begins.
    fn frame(&self) -> u64 {
        self.chain[0].address + HEADER
    }

    fn buffers(&self) -> &[Buffer] {
        &self.chain[..self.count]
    }
}

/// Headers of a TCP segment of `size` bytes for the host to cut up (section 5.1.6.2). It goes from one unused
/// address to another.
fn segmented(address: u64, size: u64) {
    const NEEDS_CSUM: u8 = 1;
    const TCPV4: u8 = 1;
    let header = arena::bytes(address, HEADER + TCP_HEADERS);
    header[0] = NEEDS_CSUM;
    header[1] = TCPV4;
    for (at, value) in [(2, TCP_HEADERS), (4, SEGMENT), (6, 34), (8, 16)] {
        header[at..at + 2].copy_from_slice(&(value as u16).to_le_bytes());
    }
    let frame = &mut header[HEADER as usize..];
    frame[12..14].copy_from_slice(&[8, 0]);
    let length = (size as u16 - ETHERNET as u16).to_be_bytes();
    let ip = &mut frame[ETHERNET..];
    ip[..2].copy_from_slice(&[0x45, 0]);
    ip[2..4].copy_from_slice(&length);
    // Time to live, TCP; then 198.18.0.1 to 198.18.0.2, which are for measurements.
    ip[8..10].copy_from_slice(&[64, 6]);
    ip[12..20].copy_from_slice(&[198, 18, 0, 1, 198, 18, 0, 2]);
    let sum: u32 = ip[..20]
        .chunks(2)
        .map(|two| u32::from(u16::from_be_bytes([two[0], two[1]])))
        .sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    // Ports; header of 20 bytes, ACK; a window.
    ip[20..24].copy_from_slice(&[0x13, 0x89, 0x13, 0x89]);
    ip[32..36].copy_from_slice(&[0x50, 0x10, 0xff, 0xff]);
}

/// Sends for `ms` milliseconds, then waits until all is sent.
fn transmit(port: &mut Port, size: u64, ms: u64) -> Outcome {
    let probe = Prepared::new(port, size)?;
    let room = usize::from(port.transmit.size);
    let each = match port.device.features & crate::virtio::feature::INDIRECT_DESC {
        0 => probe.count,
        _ => 1,
    };
    let count = (room / each).min(if probe.count > 1 { 32 } else { room });
    let mut frames = [probe; ENTRIES as usize];
    for frame in &mut frames[1..count] {
        *frame = Prepared::new(port, size)?;
    }
    let mut owner = [0u16; ENTRIES as usize];
    let mut idle: [u16; ENTRIES as usize] = core::array::from_fn(|i| i as u16);
    let mut idle_count = count;
    let (mut sent, mut published) = (0u64, 0u64);
    begun();
    let start = x86::rdtsc();
    let end = super::end_of_span(ms);
    let mut patience = Deadline::in_ms(clock::patience_ms());
    loop {
        let going_on = x86::rdtsc() < end;
        let mut batch = 0;
        while going_on && idle_count > 0 && batch < BATCH {
            let index = idle[idle_count - 1];
            let frame = &frames[usize::from(index)];
            if frame.count == 1 {
                x86::store(frame.frame() + ETHERNET as u64, 8, published.to_be());
            }
            let Some(head) = port.transmit.add(frame.buffers()) else {
                break;
            };
            owner[usize::from(head)] = index;
            idle_count -= 1;
            published += 1;
            batch += 1;
        }
        port.kick_transmit();
        let before = sent;
        while let Some((head, _)) = port.transmit.pop() {
            let index = *owner
                .get(usize::from(head))
                .ok_or("completion of no frame")?;
            *idle
                .get_mut(idle_count)
                .ok_or("more completions than frames")? = index;
            idle_count += 1;
            sent += 1;
        }
        if !going_on && sent == published {
            break;
        }
        if sent != before {
            patience = Deadline::in_ms(clock::patience_ms());
        } else if patience.passed() {
            return Err(text!("{} frames are not sent", published - sent));
        } else {
            core::hint::spin_loop();
        }
    }
    let tally = Tally {
        frames: sent,
        bytes: sent * size,
        ticks: x86::rdtsc() - start,
    };
    Ok(tally.text(port, "".into()))
}

/// Counts what comes, from the first frame on, for `ms` milliseconds. Frames of another size are said, and not counted.
fn receive(port: &mut Port, size: u64, ms: u64) -> Outcome {
    begun();
    let (mut frames, mut bytes, mut strange) = (0, 0, 0u64);
    let (mut start, mut end, mut last) = (0, u64::MAX, 0);
    let patience = Deadline::in_ms(clock::patience_ms());
    loop {
        let mut batch = 0;
        while batch < BATCH {
            let Some(came) = port.take(|_| {})? else {
                break;
            };
            batch += 1;
            if came == size {
                frames += 1;
                bytes += came;
            } else {
                strange += 1;
            }
        }
        port.kick_receive();
        if batch == 0 {
            core::hint::spin_loop();
        } else {
            last = x86::rdtsc();
            if start == 0 && frames > 0 {
                // What came with the first batch came before the span.
                (frames, bytes, start) = (0, 0, last);
                end = super::end_of_span(ms);
            }
        }
        if x86::rdtsc() >= end {
            break;
        }
        if start == 0 && patience.passed() {
            return Err(text!("no frame of {size} bytes came, {strange} others"));
        }
    }
    let tally = Tally {
        frames,
        bytes,
        ticks: last.saturating_sub(start),
    };
    Ok(tally.text(port, text!("others={strange}")))
}

/// Sends a frame and waits for the host's answer to it, again and again, for `ms` milliseconds from the first answer on: the
/// host may begin to answer a little later.
fn ping_pong(port: &mut Port, size: u64, ms: u64) -> Outcome {
    let frame = Prepared::new(port, size)?;
    let number_at = frame.frame() + ETHERNET as u64;
    let mut latency = Latency::new();
    let (mut number, mut lost) = (0u64, 0u64);
    begun();
    let (mut start, mut end) = (0, u64::MAX);
    let patience = Deadline::in_ms(clock::patience_ms());
    while x86::rdtsc() < end {
        number += 1;
        x86::store(number_at, 8, number.to_be());
        let sent = x86::rdtsc();
        port.transmit
            .add(frame.buffers())
            .ok_or("transmit ring full")?;
        port.kick_transmit();
        let limit = Deadline::in_ms(LOST_MS);
        let mut answered = false;
        while !answered && !limit.passed() {
            let mut seen = 0;
            let came = port.take(|bytes| {
                let at = HEADER as usize + ETHERNET;
                if let Some(number) = bytes.get(at..at + 8) {
                    seen = u64::from_be_bytes(number.try_into().unwrap_or_default());
                }
            })?;
            answered = came.is_some() && seen == number;
            if came.is_some() {
                port.kick_receive();
            } else {
                core::hint::spin_loop();
            }
        }
        match answered {
            true if start == 0 => {
                start = x86::rdtsc();
                end = super::end_of_span(ms);
            }
            true => latency.add(x86::rdtsc() - sent),
            false if start == 0 && patience.passed() => return Err("no answer ever came".into()),
            false if start == 0 => {}
            false => lost += 1,
        }
        let limit = Deadline::in_ms(clock::patience_ms());
        while port.transmit.free < port.transmit.size {
            port.transmit.pop();
            if limit.passed() {
                return Err("a frame is not sent".into());
            }
        }
    }
    let tally = Tally {
        frames: latency.count,
        bytes: latency.count * size,
        ticks: x86::rdtsc() - start,
    };
    let text = tally.text(port, text!("lost={lost} {}", latency.text()));
    if latency.count == 0 {
        return Err(text);
    }
    Ok(text)
}
