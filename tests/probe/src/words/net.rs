//! Words for virtio-net (virtio 1.2, section 5.1).
//!
//! Receive buffers stay where they are: an echo sends the very buffer a frame arrived in, its
//! virtio-net header included, and gives it back to the receive queue when that is done.

use core::fmt;

use super::{Arguments, Outcome};
use crate::arena::{self, Arena};
use crate::clock::{self, Deadline, Moment};
use crate::text::Text;
use crate::virtio::queue::{Buffer, CHAIN_MAX, Queue};
use crate::virtio::{Device, NET};
use crate::{serial, text, x86};

/// Feature bits (section 5.1.3).
pub mod feature {
    pub const CSUM: u64 = 1 << 0;
    pub const GUEST_CSUM: u64 = 1 << 1;
    pub const MTU: u64 = 1 << 3;
    pub const MAC: u64 = 1 << 5;
    pub const GUEST_TSO4: u64 = 1 << 7;
    pub const GUEST_TSO6: u64 = 1 << 8;
    pub const HOST_TSO4: u64 = 1 << 11;
    pub const HOST_TSO6: u64 = 1 << 12;
    pub const MRG_RXBUF: u64 = 1 << 15;
    pub const CTRL_VQ: u64 = 1 << 17;
    pub const MQ: u64 = 1 << 22;
    /// What the words ask for; checksums and segmentation only with `offload`.
    pub const PLAIN: u64 = MTU | MAC | MRG_RXBUF;
    pub const OFFLOAD: u64 = CSUM | GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | HOST_TSO4 | HOST_TSO6;
}

pub const RECEIVE: u32 = 0;
pub const TRANSMIT: u32 = 1;
/// Size of the header before every frame, with VERSION_1 (section 5.1.6).
pub const HEADER: u64 = 12;
/// Its field that says how many buffers a received frame fills.
pub const NUM_BUFFERS: u64 = 10;
const MAC: usize = 6;
pub const ETHERNET: usize = 14;
/// Size of each receive buffer: more than an ordinary frame, less than a jumbo frame, so that
/// those need several.
const BUFFER: u64 = 2048;
/// The same when a frame may be 64 KiB long and buffers are not merged.
const LARGE_BUFFER: u64 = 65_562;
/// Longest frame `netsend` makes.
const FRAME_MAX: u64 = 65_550;
const ENTRIES: u32 = 256;
pub const BROADCAST: [u8; MAC] = [0xff; MAC];

/// A frame that has been received: its pieces, header included, in order.
pub struct Frame {
    heads: [u16; CHAIN_MAX as usize],
    sizes: [u32; CHAIN_MAX as usize],
    count: usize,
}

impl Frame {
    /// Size without the header.
    fn size(&self) -> u64 {
        let all: u64 = self.sizes[..self.count].iter().map(|s| u64::from(*s)).sum();
        all.saturating_sub(HEADER)
    }
}

/// A running network device with one pair of queues.
pub struct Nic {
    pub device: Device,
    receive: Queue,
    transmit: Queue,
    arena: Arena,
    buffer_size: u64,
    /// Address of the buffer in each receive descriptor.
    buffers: [u64; ENTRIES as usize],
    /// Frame being sent under each transmit descriptor: buffers to give back, if any.
    sending: [Option<Return>; ENTRIES as usize],
    pub mac: [u8; MAC],
    pub mtu: u64,
}

/// Receive buffers that a transmission borrows.
#[derive(Clone, Copy)]
struct Return {
    addresses: [u64; CHAIN_MAX as usize],
    count: usize,
}

impl Nic {
    pub fn open(index: u64, arguments: &mut Arguments) -> Result<Self, Text> {
        let features = match arguments.text() {
            None => feature::PLAIN,
            Some("offload") => feature::PLAIN | feature::OFFLOAD,
            Some(word) => return Err(text!("no option {word}")),
        };
        Self::open_with(Device::find_type(index, NET)?, features)
    }

    pub fn open_with(mut device: Device, features: u64) -> Result<Self, Text> {
        let mut arena = Arena::new();
        device.negotiate(features)?;
        let receive = device.queue(&mut arena, RECEIVE, ENTRIES)?;
        let transmit = device.queue(&mut arena, TRANSMIT, ENTRIES)?;
        let large = device.features & (feature::GUEST_TSO4 | feature::GUEST_TSO6) != 0
            && device.features & feature::MRG_RXBUF == 0;
        let mac = match device.features & feature::MAC {
            // Locally administered.
            0 => [2, 0, 0, 0x70, 0x72, 0x6f],
            _ => core::array::from_fn(|i| device.config(i as u64, 1) as u8),
        };
        let mtu = match device.features & feature::MTU {
            0 => 0,
            _ => device.config(10, 2),
        };
        let mut nic = Nic {
            device,
            receive,
            transmit,
            arena,
            buffer_size: if large { LARGE_BUFFER } else { BUFFER },
            buffers: [0; ENTRIES as usize],
            sending: [const { None }; ENTRIES as usize],
            mac,
            mtu,
        };
        // Large buffers: as many as fit in 4 MiB.
        let wanted = if large {
            64
        } else {
            u64::from(nic.receive.size)
        };
        for _ in 0..wanted.min(u64::from(nic.receive.size)) {
            let address = nic.arena.reserve(nic.buffer_size, 64)?;
            nic.give(address)?;
        }
        nic.device.driver_ok();
        nic.kick_receive();
        Ok(nic)
    }

    /// Gives a buffer to the receive queue; the device is told by `kick_receive`.
    fn give(&mut self, address: u64) -> Result<(), Text> {
        let buffer = Buffer::writable(address, self.buffer_size as u32);
        let head = self.receive.add(&[buffer]).ok_or("receive ring full")?;
        self.buffers[usize::from(head)] = address;
        Ok(())
    }

    fn kick_receive(&mut self) {
        if self.receive.should_kick() {
            self.device.kick(RECEIVE);
        }
    }

    fn kick_transmit(&mut self) {
        if self.transmit.should_kick() {
            self.device.kick(TRANSMIT);
        }
    }

    /// The next frame, if one has arrived.
    fn poll(&mut self) -> Result<Option<Frame>, Text> {
        let Some((head, size)) = self.receive.pop() else {
            return Ok(None);
        };
        let mut frame = Frame {
            heads: [0; CHAIN_MAX as usize],
            sizes: [0; CHAIN_MAX as usize],
            count: 0,
        };
        let mut next = (head, size);
        let address = self.buffer_of(head)?;
        let merged = self.device.features & feature::MRG_RXBUF != 0;
        let wanted = if merged {
            x86::load(address + NUM_BUFFERS, 2)
        } else {
            1
        };
        if wanted == 0 || wanted > CHAIN_MAX || u64::from(size) < HEADER {
            return Err(text!("frame of {size} bytes in {wanted} buffers"));
        }
        loop {
            self.buffer_of(next.0)?;
            if u64::from(next.1) > self.buffer_size {
                return Err(text!(
                    "{} bytes in a buffer of {}",
                    next.1,
                    self.buffer_size
                ));
            }
            frame.heads[frame.count] = next.0;
            frame.sizes[frame.count] = next.1;
            frame.count += 1;
            if frame.count as u64 == wanted {
                return Ok(Some(frame));
            }
            // All buffers of a frame are used at once (section 5.1.6.3.2).
            next = self
                .receive
                .pop()
                .ok_or("frame's further buffers are missing")?;
        }
    }

    fn buffer_of(&self, head: u16) -> Result<u64, Text> {
        let address = self.buffers.get(usize::from(head)).copied().unwrap_or(0);
        match address {
            0 => Err(text!("completion of unknown buffer {head}")),
            address => Ok(address),
        }
    }

    /// The first piece of a frame, behind the header: enough for all protocol headers.
    fn payload(&self, frame: &Frame) -> &'static mut [u8] {
        let address = self.buffers[usize::from(frame.heads[0])];
        let size = u64::from(frame.sizes[0]) - HEADER;
        arena::bytes(address + HEADER, size)
    }

    /// Gives a frame's buffers back.
    fn drop_frame(&mut self, frame: &Frame) -> Result<(), Text> {
        for head in &frame.heads[..frame.count] {
            self.give(self.buffers[usize::from(*head)])?;
        }
        Ok(())
    }

    /// Sends a received frame; its buffers come back by `reap`.
    fn send_back(&mut self, frame: &Frame) -> Result<(), Text> {
        let mut chain = [Buffer::readable(0, 0); CHAIN_MAX as usize];
        let mut back = Return {
            addresses: [0; CHAIN_MAX as usize],
            count: frame.count,
        };
        for (i, piece) in chain[..frame.count].iter_mut().enumerate() {
            let address = self.buffers[usize::from(frame.heads[i])];
            back.addresses[i] = address;
            *piece = Buffer::readable(address, frame.sizes[i]);
        }
        // What is sent fills no buffers (section 5.1.6.2).
        x86::store(back.addresses[0] + NUM_BUFFERS, 2, 0);
        // A checksum the host vouched for needs no word on the way back.
        if x86::load(back.addresses[0], 1) & 2 != 0 {
            x86::store(back.addresses[0], 1, 0);
        }
        self.send(&chain[..frame.count], Some(back))
    }

    fn send(&mut self, chain: &[Buffer], back: Option<Return>) -> Result<(), Text> {
        let limit = Deadline::in_ms(clock::patience_ms());
        loop {
            if let Some(head) = self.transmit.add(chain) {
                self.sending[usize::from(head)] = back;
                return Ok(());
            }
            self.kick_transmit();
            self.reap()?;
            if limit.passed() {
                return Err("transmit ring stays full".into());
            }
        }
    }

    /// Takes back what has been sent; says how many frames.
    fn reap(&mut self) -> Result<u64, Text> {
        let mut count = 0;
        while let Some((head, _)) = self.transmit.pop() {
            let slot = self.sending.get_mut(usize::from(head));
            let back = slot.ok_or("completion of no transmission")?.take();
            if let Some(back) = back {
                for address in &back.addresses[..back.count] {
                    self.give(*address)?;
                }
            }
            count += 1;
        }
        Ok(count)
    }

    /// Waits until everything has been sent.
    fn drain(&mut self) -> Result<(), Text> {
        self.kick_transmit();
        let limit = Deadline::in_ms(clock::patience_ms());
        while self.transmit.free < self.transmit.size {
            self.reap()?;
            if limit.passed() {
                return Err(text!(
                    "transmission not answered, status {:#x}",
                    self.device.status()
                ));
            }
        }
        Ok(())
    }

    /// Whether a frame can be sent: the check after an attack.
    pub fn health(&mut self) -> Result<(), Text> {
        let address = self.arena.take(HEADER + 60, 64)?;
        let mac = self.mac;
        write_ethernet(
            arena::bytes(address + HEADER, 60),
            &BROADCAST,
            &mac,
            EXPERIMENT,
        );
        self.send(&[Buffer::readable(address, HEADER as u32 + 60)], None)?;
        self.drain()
    }
}

/// EtherTypes; the first is for local experiments.
pub const EXPERIMENT: u16 = 0x88b5;
const IPV4: u16 = 0x0800;
const ARP: u16 = 0x0806;

pub fn write_ethernet(frame: &mut [u8], to: &[u8; MAC], from: &[u8; MAC], kind: u16) {
    frame[..6].copy_from_slice(to);
    frame[6..12].copy_from_slice(from);
    frame[12..14].copy_from_slice(&kind.to_be_bytes());
}

/// Swaps destination and source. A frame to everybody comes back from this device's address.
fn swap_addresses(frame: &mut [u8], own: &[u8; MAC]) {
    let (to, rest) = frame.split_at_mut(MAC);
    to.swap_with_slice(&mut rest[..MAC]);
    if rest[0] & 1 != 0 {
        rest[..MAC].copy_from_slice(own);
    }
}

/// An address, for people.
struct Hex<'a>(&'a [u8; MAC]);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        for (i, byte) in self.0.iter().enumerate() {
            write!(f, "{}{byte:02x}", if i > 0 { ":" } else { "" })?;
        }
        Ok(())
    }
}

pub fn info(arguments: &mut Arguments) -> Outcome {
    let index = arguments.number("N")?;
    let nic = Nic::open_with(
        Device::find_type(index, NET)?,
        feature::PLAIN | feature::OFFLOAD,
    )?;
    let pairs = match nic.device.offered() & feature::MQ {
        0 => 1,
        _ => nic.device.config(8, 2),
    };
    Ok(text!(
        "offered={:#x} features={:#x} mac={} mtu={} pairs={pairs} queue-size={} mergeable={}",
        nic.device.offered(),
        nic.device.features,
        Hex(&nic.mac),
        nic.mtu,
        nic.device.queue_size_max(RECEIVE),
        nic.device.features & feature::MRG_RXBUF != 0,
    ))
}

/// Frames and bytes, and the time from the first to the last.
#[derive(Default)]
struct Tally {
    frames: u64,
    bytes: u64,
    first: Option<Moment>,
    ns: u64,
}

impl Tally {
    fn add(&mut self, bytes: u64) {
        let first = *self.first.get_or_insert_with(Moment::now);
        self.frames += 1;
        self.bytes += bytes;
        self.ns = first.elapsed_ns();
    }

    fn text(&self) -> Text {
        let ns = u128::from(self.ns.max(1));
        text!(
            "frames={} bytes={} ns={} frames/s={} mbit/s={}",
            self.frames,
            self.bytes,
            self.ns,
            u128::from(self.frames) * 1_000_000_000 / ns,
            u128::from(self.bytes) * 8_000 / ns
        )
    }
}

/// Runs `each` on every frame until it says that was enough. `each` says what to do with it.
fn serve(
    nic: &mut Nic,
    limit: Deadline,
    mut each: impl FnMut(&mut [u8], u64) -> Then,
) -> Result<bool, Text> {
    loop {
        let mut enough = false;
        while let Some(frame) = nic.poll()? {
            let payload = nic.payload(&frame);
            if payload.len() < ETHERNET {
                nic.drop_frame(&frame)?;
                continue;
            }
            let then = each(payload, frame.size());
            match then {
                Then::Drop | Then::DropAndStop => nic.drop_frame(&frame)?,
                Then::Send | Then::SendAndStop => nic.send_back(&frame)?,
            }
            enough = matches!(then, Then::DropAndStop | Then::SendAndStop);
            if enough {
                break;
            }
        }
        nic.kick_transmit();
        nic.reap()?;
        nic.kick_receive();
        if enough {
            nic.drain()?;
            return Ok(true);
        }
        if limit.passed() {
            return Ok(false);
        }
    }
}

/// What becomes of a received frame.
enum Then {
    Drop,
    Send,
    DropAndStop,
    SendAndStop,
}

/// No limit of time.
fn for_ever() -> Deadline {
    Deadline::in_ms(u64::MAX)
}

pub fn echo(arguments: &mut Arguments) -> Outcome {
    let index = arguments.number("N")?;
    let wanted = arguments.number_or("FRAMES", u64::MAX)?;
    let mut nic = Nic::open(index, arguments)?;
    let mac = nic.mac;
    serial::line(format_args!("netecho ready mac={}", Hex(&mac)));
    let mut tally = Tally::default();
    serve(&mut nic, for_ever(), |frame, size| {
        swap_addresses(frame, &mac);
        tally.add(size);
        if tally.frames == wanted {
            Then::SendAndStop
        } else {
            Then::Send
        }
    })?;
    Ok(tally.text())
}

pub fn count(arguments: &mut Arguments) -> Outcome {
    let index = arguments.number("N")?;
    let wanted = arguments.number("FRAMES")?;
    let limit = arguments.number_or("MS", u64::MAX)?;
    let mut nic = Nic::open(index, arguments)?;
    serial::line(format_args!("netcount ready mac={}", Hex(&nic.mac)));
    let mut tally = Tally::default();
    let complete = serve(&mut nic, Deadline::in_ms(limit), |_, size| {
        tally.add(size);
        if tally.frames == wanted {
            Then::DropAndStop
        } else {
            Then::Drop
        }
    })?;
    if complete {
        Ok(tally.text())
    } else {
        Err(tally.text())
    }
}

pub fn send(arguments: &mut Arguments) -> Outcome {
    let index = arguments.number("N")?;
    let (count, size) = (arguments.number("COUNT")?, arguments.number("SIZE")?);
    if size < ETHERNET as u64 + 8 || size > FRAME_MAX {
        return Err("SIZE out of range".into());
    }
    let mut nic = Nic::open(index, arguments)?;
    let mac = nic.mac;
    // A frame for each descriptor, as far as a few MiB go.
    let slots = (4 << 20) / size;
    let slots = slots.clamp(1, u64::from(nic.transmit.size));
    let first = nic.arena.take(slots * (HEADER + size), 64)?;
    let start = Moment::now();
    for i in 0..count {
        let address = first + i % slots * (HEADER + size);
        // The frame before in this place must have been sent.
        let limit = Deadline::in_ms(clock::patience_ms());
        while u64::from(nic.transmit.size - nic.transmit.free) >= slots {
            nic.kick_transmit();
            nic.reap()?;
            if limit.passed() {
                return Err(text!("stopped after {i} frames"));
            }
        }
        let frame = arena::bytes(address + HEADER, size);
        write_ethernet(frame, &BROADCAST, &mac, EXPERIMENT);
        frame[ETHERNET..ETHERNET + 8].copy_from_slice(&i.to_be_bytes());
        nic.send(&[Buffer::readable(address, (HEADER + size) as u32)], None)?;
        // A quarter of the ring at a time.
        if i % 64 == 63 {
            nic.kick_transmit();
            nic.reap()?;
        }
    }
    nic.drain()?;
    let tally = Tally {
        frames: count,
        bytes: count * size,
        first: None,
        ns: start.elapsed_ns(),
    };
    Ok(tally.text())
}

pub fn ping(arguments: &mut Arguments) -> Outcome {
    let index = arguments.number("N")?;
    let own = arguments.text().and_then(ipv4).ok_or("IP is no address")?;
    let wanted = arguments.number_or("ECHOES", u64::MAX)?;
    let mut nic = Nic::open(index, arguments)?;
    let mac = nic.mac;
    serial::line(format_args!("netping ready mac={}", Hex(&mac)));
    let mut echoes = 0;
    serve(&mut nic, for_ever(), |frame, _| {
        if answer_arp(frame, &mac, &own) {
            return Then::Send;
        }
        if !answer_echo(frame, &mac, &own) {
            return Then::Drop;
        }
        echoes += 1;
        if echoes == wanted {
            Then::SendAndStop
        } else {
            Then::Send
        }
    })?;
    Ok(text!("{echoes} echoes"))
}

fn ipv4(text: &str) -> Option<[u8; 4]> {
    let mut bytes = text.split('.').map(|part| part.parse().ok());
    let address = [
        bytes.next()??,
        bytes.next()??,
        bytes.next()??,
        bytes.next()??,
    ];
    bytes.next().is_none().then_some(address)
}

/// Turns an ARP request (RFC 826) for `own` into its answer.
fn answer_arp(frame: &mut [u8], mac: &[u8; MAC], own: &[u8; 4]) -> bool {
    let is_request = frame.len() >= 42
        && frame[12..14] == ARP.to_be_bytes()
        && frame[14..22] == [0, 1, 8, 0, 6, 4, 0, 1]
        && frame[38..42] == *own;
    if is_request {
        frame.copy_within(6..12, 0);
        frame[6..12].copy_from_slice(mac);
        frame[21] = 2;
        // The sender becomes the target.
        frame.copy_within(22..32, 32);
        frame[22..28].copy_from_slice(mac);
        frame[28..32].copy_from_slice(own);
    }
    is_request
}

/// Turns an ICMP echo request (RFC 792) to `own` into its answer. IP's checksum stays right
/// when addresses swap places; ICMP's grows by what the type shrinks.
fn answer_echo(frame: &mut [u8], mac: &[u8; MAC], own: &[u8; 4]) -> bool {
    if frame.len() < 38 || frame[12..14] != IPV4.to_be_bytes() || frame[30..34] != *own {
        return false;
    }
    let icmp = ETHERNET + usize::from(frame[14] & 15) * 4;
    const ICMP: u8 = 1;
    const ECHO_REQUEST: u8 = 8;
    if frame[23] != ICMP || frame.len() < icmp + 8 || frame[icmp] != ECHO_REQUEST {
        return false;
    }
    frame.copy_within(6..12, 0);
    frame[6..12].copy_from_slice(mac);
    frame.copy_within(26..30, 30);
    frame[26..30].copy_from_slice(own);
    frame[icmp] = 0;
    let sum = u16::from_be_bytes([frame[icmp + 2], frame[icmp + 3]]);
    let (sum, carry) = sum.overflowing_add(u16::from(ECHO_REQUEST) << 8);
    frame[icmp + 2..icmp + 4].copy_from_slice(&(sum + u16::from(carry)).to_be_bytes());
    true
}
