//! The network card (virtio 1.2, 5.1): a receive queue and a transmit queue on a [`Tap`].
//!
//! Frames go between guest memory and the tap without a copy of ours: one `readv` or `writev` for
//! each. A received frame is read straight into as many of the guest's buffers as the largest
//! frame may need; those it did not need stay at hand, parsed, for the next one. Only when the
//! guest has run out of buffers in the middle of a frame does its end wait, for a moment and in
//! memory of ours, for the guest to bring more.

mod buffers;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Instant;

use self::buffers::Buffers;
use super::queue::{Chain, Popped};
use super::segment::{copy_out, slices};
use super::throttle::Throttle;
use super::{
    BrokenRing, ConfigSpace, Counter, Device, Progress, Queue, QueueSet, Ram, Updated,
    WorkerCounters, device_id, feature,
};
use crate::metrics::{Report, Spread, micros_since};
use crate::rate_limiter::{RateLimiter, RateLimiterUpdate};
use crate::sys;
use crate::sys::clock;
use crate::sys::tap::{self, Offloads, Tap};

/// Feature bits (virtio 1.2, 5.1.3).
mod bit {
    /// VIRTIO_NET_F_CSUM: the guest may leave checksums to us.
    pub const CSUM: u64 = 1 << 0;
    /// VIRTIO_NET_F_GUEST_CSUM: we may leave checksums to the guest.
    pub const GUEST_CSUM: u64 = 1 << 1;
    /// VIRTIO_NET_F_MTU
    pub const MTU: u64 = 1 << 3;
    /// VIRTIO_NET_F_MAC
    pub const MAC: u64 = 1 << 5;
    /// VIRTIO_NET_F_GUEST_TSO4: the guest takes unsegmented TCP.
    pub const GUEST_TSO4: u64 = 1 << 7;
    /// VIRTIO_NET_F_GUEST_TSO6
    pub const GUEST_TSO6: u64 = 1 << 8;
    /// VIRTIO_NET_F_GUEST_ECN
    pub const GUEST_ECN: u64 = 1 << 9;
    /// VIRTIO_NET_F_GUEST_UFO
    pub const GUEST_UFO: u64 = 1 << 10;
    /// VIRTIO_NET_F_HOST_TSO4: we take unsegmented TCP.
    pub const HOST_TSO4: u64 = 1 << 11;
    /// VIRTIO_NET_F_HOST_TSO6
    pub const HOST_TSO6: u64 = 1 << 12;
    /// VIRTIO_NET_F_HOST_ECN
    pub const HOST_ECN: u64 = 1 << 13;
    /// VIRTIO_NET_F_HOST_UFO
    pub const HOST_UFO: u64 = 1 << 14;
    /// VIRTIO_NET_F_MRG_RXBUF: a frame may take several buffers.
    pub const MRG_RXBUF: u64 = 1 << 15;

    /// What is offered always.
    pub const ALWAYS: u64 = CSUM
        | GUEST_CSUM
        | GUEST_TSO4
        | GUEST_TSO6
        | GUEST_ECN
        | GUEST_UFO
        | HOST_TSO4
        | HOST_TSO6
        | HOST_ECN
        | HOST_UFO
        | MRG_RXBUF;
    /// With any of these, frames may be as large as [`super::FRAME_MAX`].
    pub const GUEST_LARGE: u64 = GUEST_TSO4 | GUEST_TSO6 | GUEST_UFO;
}

/// Offsets in the configuration space (virtio 1.2, 5.1.4).
mod field {
    pub const MAC: usize = 0;
    pub const MTU: usize = 10;
}

/// The queues' numbers (virtio 1.2, 5.1.2).
mod queue {
    pub const RECEIVE: usize = 0;
    pub const TRANSMIT: usize = 1;
}

/// The numbers of what is watched, in the order of [`Device::sources`].
mod source {
    pub const TAP: usize = 0;
    pub const RECEIVE_TIMER: usize = 1;
}

const QUEUE_SIZE: u16 = 256;

/// The header in front of each frame, `struct virtio_net_hdr` (virtio 1.2, 5.1.6).
const HEADER: u32 = tap::HEADER as u32;
/// Where `num_buffers` is in it.
const NUM_BUFFERS: u32 = 10;

/// The largest frame, with its header (virtio 1.2, 5.1.6.3.1).
const FRAME_MAX: u32 = 65562 + HEADER;
/// The largest without segmentation, for an MTU of 1500: Ethernet's header, two VLAN tags.
const FRAME_OVERHEAD: u32 = HEADER + 14 + 8;
const MTU_DEFAULT: u16 = 1500;

/// How long the end of a frame waits for the guest's buffers before the frame is dropped.
const PATIENCE_NANOS: u64 = 50_000_000;

/// What a network card counts.
#[derive(Debug, Default)]
pub struct Counters {
    /// Frames the guest received.
    pub rx_frames: Counter,
    /// Bytes of these, headers not counted.
    pub rx_bytes: Counter,
    /// Frames for the guest that were lost because they did not fit its buffers.
    pub rx_dropped: Counter,
    /// Buffers from the guest that could not be used.
    pub rx_invalid: Counter,
    /// Times reading the tap failed.
    pub rx_failed: Counter,
    /// Times a frame had to wait for the rate limiter.
    pub rx_throttled: Counter,
    /// Frames the guest sent.
    pub tx_frames: Counter,
    /// Bytes of these, headers not counted.
    pub tx_bytes: Counter,
    /// How long the tap took for each.
    pub tx_times: Spread,
    /// Frames from the guest that the host did not take.
    pub tx_dropped: Counter,
    /// Frames from the guest that make no sense.
    pub tx_invalid: Counter,
    /// Times a frame had to wait for the rate limiter.
    pub tx_throttled: Counter,
    /// 1 when the tap has vanished.
    pub tap_gone: Counter,
    /// Times the limits were changed.
    pub updates: Counter,
}

/// The keys of the original's metrics for a network interface.
pub const LINE_KEYS: [&str; 26] = [
    "activate_fails",
    "cfg_fails",
    "no_rx_avail_buffer",
    "no_tx_avail_buffer",
    "event_fails",
    "rx_queue_event_count",
    "rx_event_rate_limiter_count",
    "rx_rate_limiter_throttled",
    "rx_tap_event_count",
    "rx_bytes_count",
    "rx_packets_count",
    "rx_fails",
    "rx_count",
    "tap_read_fails",
    "tap_write_fails",
    "tap_write_agg",
    "tx_bytes_count",
    "tx_malformed_frames",
    "tx_fails",
    "tx_count",
    "tx_packets_count",
    "tx_queue_event_count",
    "tx_rate_limiter_event_count",
    "tx_rate_limiter_throttled",
    "tx_spoofed_mac_count",
    "tx_remaining_reqs_count",
];

impl Counters {
    fn read(&self, worker: &WorkerCounters, name: &str, report: &mut Report) {
        let both = [
            ("receive", &self.rx_frames, &self.rx_bytes, &self.rx_dropped),
            (
                "transmit",
                &self.tx_frames,
                &self.tx_bytes,
                &self.tx_dropped,
            ),
        ];
        for (direction, frames, bytes, dropped) in both {
            let labels = [("device", name), ("direction", direction)];
            report.counter(
                "mayfly_net_frames_total",
                "Frames that the guest received or sent.",
                &labels,
                frames.get(),
            );
            report.counter(
                "mayfly_net_bytes_total",
                "Bytes of these frames, virtio's headers not counted.",
                &labels,
                bytes.get(),
            );
            report.counter(
                "mayfly_net_dropped_total",
                "Frames that did not fit the guest's buffers, or that the host did not take.",
                &labels,
                dropped.get(),
            );
        }
        let both = [
            ("receive", &self.rx_invalid, &self.rx_throttled),
            ("transmit", &self.tx_invalid, &self.tx_throttled),
        ];
        for (direction, invalid, throttled) in both {
            let labels = [("device", name), ("direction", direction)];
            report.counter(
                "mayfly_net_invalid_total",
                "Buffers or frames of the guest that make no sense.",
                &labels,
                invalid.get(),
            );
            report.counter(
                "mayfly_net_throttled_total",
                "Times a frame had to wait for the rate limiter.",
                &labels,
                throttled.get(),
            );
        }
        let device = [("device", name)];
        report.counter(
            "mayfly_net_tap_read_errors_total",
            "Times reading the tap failed.",
            &device,
            self.rx_failed.get(),
        );
        report.gauge(
            "mayfly_net_tap_gone",
            "1 when the tap has vanished.",
            &device,
            self.tap_gone.get(),
        );
        report.counter(
            "mayfly_net_updates_total",
            "Times the limits were changed.",
            &device,
            self.updates.get(),
        );
        let (rx_kicks, tx_kicks) = (worker.kicks(queue::RECEIVE), worker.kicks(queue::TRANSMIT));
        for group in [&*format!("net_{name}"), "net"] {
            report.expect(group, &LINE_KEYS);
            report.add(group, "event_fails", worker.broken.get());
            report.add(group, "rx_queue_event_count", rx_kicks);
            report.add(group, "rx_rate_limiter_throttled", self.rx_throttled.get());
            report.add(group, "rx_bytes_count", self.rx_bytes.get());
            report.add(group, "rx_packets_count", self.rx_frames.get());
            report.add(group, "rx_count", self.rx_frames.get());
            report.add(
                group,
                "rx_fails",
                self.rx_invalid.get().saturating_add(self.rx_dropped.get()),
            );
            report.add(group, "tap_read_fails", self.rx_failed.get());
            report.add(group, "tap_write_fails", self.tx_dropped.get());
            report.times(group, "tap_write_agg", &self.tx_times);
            report.add(group, "tx_bytes_count", self.tx_bytes.get());
            report.add(group, "tx_malformed_frames", self.tx_invalid.get());
            report.add(group, "tx_count", self.tx_frames.get());
            report.add(group, "tx_packets_count", self.tx_frames.get());
            report.add(group, "tx_queue_event_count", tx_kicks);
            report.add(group, "tx_rate_limiter_throttled", self.tx_throttled.get());
        }
    }
}

/// A change of a running device.
#[derive(Debug, Default)]
pub struct Update {
    /// Other limits on what the guest receives.
    pub rx_limits: RateLimiterUpdate,
    /// Other limits on what the guest sends.
    pub tx_limits: RateLimiterUpdate,
}

/// A network card.
#[derive(Debug)]
pub struct Net {
    tap: Tap,
    mac: Option<[u8; 6]>,
    mtu: Option<u16>,
    rx_throttle: Throttle,
    tx_throttle: Throttle,
    /// The tap may have a frame: true from an edge until it said that there is none.
    readable: bool,
    /// The tap has vanished; it is left alone from then on.
    gone: bool,
    mergeable: bool,
    /// The room that is gathered for the next frame.
    room_wanted: u32,
    chain: Chain,
    buffers: Buffers,
    /// Takes the end of a frame that is longer than the buffers at hand.
    spill: Box<[u8]>,
    held: Option<Held>,
    counters: Arc<Counters>,
}

/// A frame whose end waits in the spill; all the buffers at hand hold its beginning.
#[derive(Clone, Copy, Debug)]
struct Held {
    /// Its length with its header.
    len: u32,
    /// How much of that is in the guest's buffers.
    in_guest: u32,
    /// When it is dropped.
    until: u64,
}

/// What came of gathering buffers.
enum Gathered {
    /// There are some, as many as there is a use for.
    Ready,
    /// There are none.
    None,
    /// One was refused: that was this unit's work.
    Refused,
}

impl Net {
    /// A card on `tap`. Without a `mac` the guest chooses its own; with an `mtu` it is told to
    /// keep to it.
    ///
    /// # Errors
    /// When the host has no descriptor left for the rate limiters' timers.
    pub fn new(
        tap: Tap,
        mac: Option<[u8; 6]>,
        mtu: Option<u16>,
        rx_limiter: RateLimiter,
        tx_limiter: RateLimiter,
    ) -> io::Result<Self> {
        Ok(Net {
            tap,
            mac,
            mtu,
            rx_throttle: Throttle::new(rx_limiter)?,
            tx_throttle: Throttle::new(tx_limiter)?,
            readable: false,
            gone: false,
            mergeable: false,
            room_wanted: 0,
            chain: Chain::new(),
            buffers: Buffers::new(),
            spill: vec![0; FRAME_MAX as usize].into_boxed_slice(),
            held: None,
            counters: Arc::new(Counters::default()),
        })
    }

    /// Passes one frame from the tap to the guest.
    fn receive(&mut self, queue: &mut Queue, ram: &Ram) -> Result<Progress, BrokenRing> {
        if let Some(held) = self.held {
            return self.receive_end(held, queue, ram);
        }
        if !self.readable {
            return Ok(Progress::Wait);
        }
        match self.gather(self.room_wanted, queue, ram)? {
            Gathered::Ready => {}
            Gathered::None => return Ok(Progress::Wait),
            Gathered::Refused => return Ok(Progress::More),
        }
        // How long it is will only be known when it has been read; the limiter takes a debt.
        if !self.rx_throttle.permits(1) {
            self.counters.rx_throttled.one();
            return Ok(Progress::Wait);
        }
        let room = if self.mergeable {
            self.buffers.room()
        } else {
            self.buffers.next_room()
        };
        let slices = slices(ram, self.buffers.place(0, room));
        match sys::io::read_packet(&self.tap, slices, &mut self.spill) {
            Ok(len) => {
                let len = u32::try_from(len).unwrap_or(u32::MAX);
                if self.mergeable && room < len && len <= FRAME_MAX {
                    self.held = Some(Held {
                        len,
                        in_guest: room,
                        until: clock::monotonic_nanos().saturating_add(PATIENCE_NANOS),
                    });
                    return Ok(Progress::More);
                }
                self.deliver(len, room, queue, ram)
            }
            Err(error) => {
                // Whatever it was, the next frame makes a new edge.
                self.readable = false;
                if error.kind() != io::ErrorKind::WouldBlock {
                    self.counters.rx_failed.one();
                    self.note_if_gone(&error);
                }
                Ok(Progress::Wait)
            }
        }
    }

    /// Brings the end of a frame to the guest once there is room for it.
    fn receive_end(
        &mut self,
        held: Held,
        queue: &mut Queue,
        ram: &Ram,
    ) -> Result<Progress, BrokenRing> {
        if let Gathered::Refused = self.gather(held.len, queue, ram)? {
            return Ok(Progress::More);
        }
        let room = self.buffers.room();
        if room < held.len {
            let left = held.until.saturating_sub(clock::monotonic_nanos());
            if left > 0 {
                self.rx_throttle.wake_in(left);
                return Ok(Progress::Wait);
            }
            self.held = None;
            self.counters.rx_dropped.one();
            return Ok(Progress::More);
        }
        self.held = None;
        let rest = held.len.saturating_sub(held.in_guest);
        let place = self.buffers.place(held.in_guest, rest);
        let end = self.spill.get(..rest as usize).unwrap_or_default();
        if !copy_out(ram, place, end) {
            return Err(BrokenRing::Memory);
        }
        self.deliver(held.len, room, queue, ram)
    }

    /// Hands the frame of `len` bytes, which the tap has just written, to the guest.
    fn deliver(
        &mut self,
        len: u32,
        room: u32,
        queue: &mut Queue,
        ram: &Ram,
    ) -> Result<Progress, BrokenRing> {
        if len <= HEADER || len > room {
            // It did not fit; its buffers take the next one.
            self.counters.rx_dropped.one();
            return Ok(Progress::More);
        }
        let payload = u64::from(len.saturating_sub(HEADER));
        self.rx_throttle.charge(payload);
        // The tap leaves this field to us (5.1.6.3). Every buffer holds at least the header.
        let count = self.buffers.count_for(len);
        let place = self.buffers.place(NUM_BUFFERS, size_of_val(&count) as u32);
        if !copy_out(ram, place, &count.to_le_bytes()) {
            return Err(BrokenRing::Memory);
        }
        let mut left = len;
        for _ in 0..count {
            let Some(buffer) = self.buffers.pop() else {
                break;
            };
            let used = left.min(buffer.len);
            left = left.saturating_sub(used);
            queue.stage_used(ram, buffer.head, used)?;
        }
        queue.publish_used(ram)?;
        self.counters.rx_frames.one();
        self.counters.rx_bytes.add(payload);
        Ok(Progress::More)
    }

    /// Gets buffers of `wanted` bytes ready, or as many as there are.
    fn gather(
        &mut self,
        wanted: u32,
        queue: &mut Queue,
        ram: &Ram,
    ) -> Result<Gathered, BrokenRing> {
        while self.buffers.room() < wanted {
            match queue.pop(ram, &mut self.chain)? {
                Popped::Empty => break,
                Popped::Chain if Buffers::can_hold(&self.chain) => {
                    if !self.buffers.push(&self.chain) {
                        queue.rewind(1);
                        break;
                    }
                }
                Popped::Chain | Popped::Malformed(_) => {
                    self.counters.rx_invalid.one();
                    queue.add_used(ram, self.chain.head(), 0)?;
                    return Ok(Gathered::Refused);
                }
            }
        }
        Ok(if self.buffers.room() == 0 {
            Gathered::None
        } else {
            Gathered::Ready
        })
    }

    /// Passes one frame from the guest to the tap.
    fn transmit(&mut self, queue: &mut Queue, ram: &Ram) -> Result<Progress, BrokenRing> {
        let popped = queue.pop(ram, &mut self.chain)?;
        if popped == Popped::Empty {
            return Ok(Progress::Wait);
        }
        let len = self.chain.readable_len();
        if popped != Popped::Chain
            || len <= HEADER
            || len > FRAME_MAX
            || self.chain.writable_len() != 0
        {
            self.counters.tx_invalid.one();
            queue.add_used(ram, self.chain.head(), 0)?;
            return Ok(Progress::More);
        }
        let payload = u64::from(len.saturating_sub(HEADER));
        if !self.tx_throttle.permits(payload) {
            self.counters.tx_throttled.one();
            queue.rewind(1);
            return Ok(Progress::Wait);
        }
        self.tx_throttle.charge(payload);
        self.send(payload, ram);
        queue.add_used(ram, self.chain.head(), 0)?;
        Ok(Progress::More)
    }

    /// Sends the chain at hand. The header's contents are the kernel's to check: it copies the
    /// header once, and looks at that copy.
    fn send(&mut self, payload: u64, ram: &Ram) {
        if self.gone {
            self.counters.tx_dropped.one();
            return;
        }
        let pieces = slices(ram, self.chain.readable().iter().copied());
        let since = Instant::now();
        match sys::io::write_packet(&self.tap, pieces) {
            Ok(_) => {
                self.counters.tx_frames.one();
                self.counters.tx_bytes.add(payload);
                self.counters.tx_times.observe(micros_since(since));
            }
            Err(error) => {
                // A network card drops what it can not send; there is no other way to say so.
                self.counters.tx_dropped.one();
                self.note_if_gone(&error);
            }
        }
    }

    fn note_if_gone(&mut self, error: &io::Error) {
        if tap::is_gone(error) && !self.gone {
            self.gone = true;
            self.readable = false;
            self.counters.tap_gone.one();
            crate::error!("the tap has vanished: this network interface is cut off from now on");
        }
    }
}

impl Device for Net {
    const ID: u32 = device_id::NET;
    const QUEUES: &'static [u16] = &[QUEUE_SIZE, QUEUE_SIZE];
    const UNITS_MAY_WAIT: bool = false;
    type Update = Update;
    type Counters = Counters;

    fn features(&self) -> u64 {
        let mut features = feature::COMMON | bit::ALWAYS;
        if self.mac.is_some() {
            features |= bit::MAC;
        }
        if self.mtu.is_some() {
            features |= bit::MTU;
        }
        features
    }

    fn config(&self) -> ConfigSpace {
        ConfigSpace::new()
            .with(field::MAC, &self.mac.unwrap_or_default())
            .with(field::MTU, &self.mtu.unwrap_or_default().to_le_bytes())
    }

    fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }

    fn read_counters(
        counters: &Counters,
        worker: &WorkerCounters,
        name: &str,
        report: &mut Report,
    ) {
        counters.read(worker, name, report);
    }

    fn sources(&self) -> Vec<RawFd> {
        vec![
            self.tap.as_raw_fd(),
            self.rx_throttle.as_raw_fd(),
            self.tx_throttle.as_raw_fd(),
        ]
    }

    fn activate(&mut self, features: u64) -> io::Result<()> {
        let has = |bits| features & bits != 0;
        self.mergeable = has(bit::MRG_RXBUF);
        self.room_wanted = if !self.mergeable {
            // One buffer at a time, whatever its size.
            1
        } else if has(bit::GUEST_LARGE) {
            FRAME_MAX
        } else {
            u32::from(self.mtu.unwrap_or(MTU_DEFAULT).max(MTU_DEFAULT))
                .saturating_add(FRAME_OVERHEAD)
        };
        // Frames may have come before the driver did: their edge is past.
        self.readable = !self.gone;
        let offloads = Offloads {
            checksum: has(bit::GUEST_CSUM),
            tso4: has(bit::GUEST_TSO4),
            tso6: has(bit::GUEST_TSO6),
            ecn: has(bit::GUEST_ECN),
            ufo: has(bit::GUEST_UFO),
        };
        match self.tap.set_offloads(offloads) {
            // Without a tap the card works like one without a cable.
            Err(error) if tap::is_gone(&error) => {
                self.note_if_gone(&error);
                Ok(())
            }
            other => other,
        }
    }

    fn process(
        &mut self,
        index: usize,
        queue: &mut Queue,
        ram: &Ram,
    ) -> Result<Progress, BrokenRing> {
        match index {
            queue::RECEIVE => self.receive(queue, ram),
            _ => self.transmit(queue, ram),
        }
    }

    fn backend(&mut self, source: usize) -> QueueSet {
        match source {
            source::TAP => {
                self.readable = !self.gone;
                QueueSet::one(queue::RECEIVE)
            }
            source::RECEIVE_TIMER => QueueSet::one(queue::RECEIVE),
            _ => QueueSet::one(queue::TRANSMIT),
        }
    }

    fn update(&mut self, update: Update) -> Updated {
        self.counters.updates.one();
        self.rx_throttle.update(update.rx_limits);
        self.tx_throttle.update(update.tx_limits);
        Updated {
            runnable: QueueSet::ALL,
            ..Updated::default()
        }
    }

    fn reset(&mut self) {
        self.buffers.clear();
        self.held = None;
        self.mergeable = false;
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Rings, ram};
    use super::*;
    use crate::sys::testing::allocator_calls;
    use std::os::unix::net::UnixDatagram;
    use std::time::Duration;
    use vm_memory::{Bytes, GuestAddress};

    const BASE: u64 = 0x10000;
    const DATA: u64 = 0x40000;

    struct Bench {
        ram: Ram,
        net: Net,
        /// The far end of the cable.
        peer: UnixDatagram,
    }

    fn bench(features: u64) -> Bench {
        let (ours, peer) = UnixDatagram::pair().unwrap();
        peer.set_nonblocking(true).unwrap();
        let limiter = RateLimiter::default;
        let mut net = Net::new(
            Tap::fake(ours),
            Some([2, 0, 0, 0, 0, 1]),
            None,
            limiter(),
            limiter(),
        )
        .unwrap();
        net.activate(features).unwrap();
        Bench {
            ram: ram(),
            net,
            peer,
        }
    }

    /// A frame as the tap gives it: an empty header and a payload with a pattern.
    fn frame(payload: usize) -> Vec<u8> {
        let mut frame = vec![0; HEADER as usize];
        frame.extend((0..payload).map(|i| (i % 251) as u8));
        frame
    }

    fn queue(rings: &Rings<'_>) -> Queue {
        Queue::new(&rings.layout(), 256, feature::COMMON, rings.ram).unwrap()
    }

    fn guest(ram: &Ram, addr: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        ram.read_slice(&mut data, GuestAddress(addr)).unwrap();
        data
    }

    fn num_buffers(ram: &Ram, addr: u64) -> u16 {
        ram.read_obj(GuestAddress(addr + 10)).unwrap()
    }

    #[test]
    fn features_when_options_are_given_follow() {
        let (ours, _peer) = UnixDatagram::pair().unwrap();
        let tap = Tap::fake(ours);
        let with = |mac, mtu| {
            let limiter = RateLimiter::default;
            Net::new(tap.try_clone().unwrap(), mac, mtu, limiter(), limiter()).unwrap()
        };
        let plain = with(None, None);
        assert_eq!(plain.features() & (bit::MAC | bit::MTU), 0);
        let full = with(Some([2, 3, 4, 5, 6, 7]), Some(9000));
        assert_eq!(full.features() & (bit::MAC | bit::MTU), bit::MAC | bit::MTU);
        let mut config = [0; 12];
        full.config().read(0, &mut config);
        assert_eq!(config, [2, 3, 4, 5, 6, 7, 0, 0, 0, 0, 0x28, 0x23]);
    }

    #[test]
    fn transmit_when_frame_is_whole_reaches_the_tap() {
        let mut bench = bench(feature::COMMON);
        let ram = bench.ram.clone();
        let mut rings = Rings::new(&ram, BASE, 256);
        let mut queue = queue(&rings);
        let sent = frame(1000);
        ram.write_slice(&sent, GuestAddress(DATA)).unwrap();
        rings.offer_chain(
            0,
            &[
                (DATA, 12, false),
                (DATA + 12, 500, false),
                (DATA + 512, 500, false),
            ],
        );
        assert_eq!(bench.net.process(1, &mut queue, &ram), Ok(Progress::More));
        assert_eq!(bench.net.process(1, &mut queue, &ram), Ok(Progress::Wait));
        assert_eq!(rings.take(), Some((0, 0)));
        let mut got = vec![0; 2000];
        let n = bench.peer.recv(&mut got).unwrap();
        assert_eq!(got[..n], sent);
        assert_eq!(bench.net.counters.tx_bytes.get(), 1000);
    }

    #[test]
    fn transmit_when_frame_makes_no_sense_drops_and_completes_it() {
        let big: Vec<(u64, u32, bool)> = vec![(DATA, 65562 + 13, false)];
        for parts in [
            vec![(DATA, 11, false)],
            vec![(DATA, 12, false)],
            vec![(DATA, 100, true)],
            vec![(DATA, 100, false), (DATA, 100, true)],
            vec![(DATA, 0, false)],
            vec![(1 << 20, 100, false)],
            big,
        ] {
            let mut bench = bench(feature::COMMON);
            let ram = bench.ram.clone();
            let mut rings = Rings::new(&ram, BASE, 256);
            let mut queue = queue(&rings);
            rings.offer_chain(0, &parts);
            assert_eq!(bench.net.process(1, &mut queue, &ram), Ok(Progress::More));
            assert_eq!(rings.take(), Some((0, 0)), "{parts:x?}");
            assert_eq!(bench.net.counters.tx_invalid.get(), 1, "{parts:x?}");
            assert!(bench.peer.recv(&mut [0; 10]).is_err());
        }
    }

    #[test]
    fn transmit_when_the_host_does_not_take_it_drops_and_completes_it() {
        let mut bench = bench(feature::COMMON);
        let ram = bench.ram.clone();
        let mut rings = Rings::new(&ram, BASE, 256);
        let mut queue = queue(&rings);
        // Nobody reads: sooner or later the socket is full.
        for round in 0..2000u32 {
            rings.offer_chain(0, &[(DATA, 1500, false)]);
            assert_eq!(bench.net.process(1, &mut queue, &ram), Ok(Progress::More));
            assert_eq!(rings.take(), Some((0, 0)), "{round}");
        }
        let counters = &bench.net.counters;
        assert!(counters.tx_dropped.get() > 0);
        assert_eq!(counters.tx_dropped.get() + counters.tx_frames.get(), 2000);
    }

    #[test]
    fn receive_when_one_buffer_is_enough_uses_one() {
        for features in [feature::COMMON, feature::COMMON | bit::MRG_RXBUF] {
            let mut bench = bench(features);
            let ram = bench.ram.clone();
            let mut rings = Rings::new(&ram, BASE, 256);
            let mut queue = queue(&rings);
            rings.offer_chain(0, &[(DATA, 12, true), (DATA + 0x1000, 1600, true)]);
            rings.offer_chain(2, &[(DATA + 0x2000, 2000, true)]);
            ram.write_slice(&[0xee; 12], GuestAddress(DATA)).unwrap();
            for payload in [100, 1514] {
                bench.peer.send(&frame(payload)).unwrap();
            }
            for _ in 0..2 {
                assert_eq!(bench.net.process(0, &mut queue, &ram), Ok(Progress::More));
            }
            assert_eq!(bench.net.process(0, &mut queue, &ram), Ok(Progress::Wait));
            assert_eq!(rings.take(), Some((0, 112)));
            assert_eq!(rings.take(), Some((2, 1526)));
            assert_eq!(num_buffers(&ram, DATA), 1);
            assert_eq!(guest(&ram, DATA + 0x1000, 100), frame(100)[12..]);
            assert_eq!(guest(&ram, DATA + 0x200c, 1514), frame(1514)[12..]);
        }
    }

    #[test]
    fn receive_when_mergeable_spreads_over_as_many_buffers_as_needed() {
        let mut bench = bench(feature::COMMON | bit::MRG_RXBUF | bit::GUEST_CSUM | bit::GUEST_TSO4);
        let ram = bench.ram.clone();
        let mut rings = Rings::new(&ram, BASE, 256);
        let mut queue = queue(&rings);
        for i in 0..100 {
            rings.offer_chain(i, &[(DATA + u64::from(i) * 1536, 1536, true)]);
        }
        let sent = frame(65000);
        bench.peer.send(&sent).unwrap();
        bench.peer.send(&frame(60)).unwrap();
        let before = allocator_calls();
        assert_eq!(bench.net.process(0, &mut queue, &ram), Ok(Progress::More));
        assert_eq!(allocator_calls(), before);
        let used = rings.used_index();
        assert_eq!(usize::from(used), sent.len().div_ceil(1536));
        assert_eq!(num_buffers(&ram, DATA), used);
        let mut total = 0;
        for head in 0..u32::from(used) {
            let (id, len) = rings.take().unwrap();
            assert_eq!(id, head);
            total += len as usize;
        }
        assert_eq!(total, sent.len());
        assert_eq!(guest(&ram, DATA + 12, 65000), sent[12..]);
        // Buffers that were gathered and not needed take the next frame.
        assert_eq!(bench.net.process(0, &mut queue, &ram), Ok(Progress::More));
        assert_eq!(rings.take(), Some((u32::from(used), 72)));
    }

    #[test]
    fn receive_when_there_are_no_buffers_waits_for_a_kick() {
        let mut bench = bench(feature::COMMON | bit::MRG_RXBUF);
        let ram = bench.ram.clone();
        let mut rings = Rings::new(&ram, BASE, 256);
        let mut queue = queue(&rings);
        bench.peer.send(&frame(60)).unwrap();
        bench.net.backend(source::TAP);
        for _ in 0..3 {
            assert_eq!(bench.net.process(0, &mut queue, &ram), Ok(Progress::Wait));
        }
        rings.offer_chain(0, &[(DATA, 1536, true)]);
        assert_eq!(bench.net.process(0, &mut queue, &ram), Ok(Progress::More));
        assert_eq!(rings.take(), Some((0, 72)));
    }

    #[test]
    fn receive_when_buffers_run_out_in_a_frame_waits_for_more() {
        let mut bench = bench(feature::COMMON | bit::MRG_RXBUF | bit::GUEST_TSO4);
        let ram = bench.ram.clone();
        let rings = Rings::new(&ram, BASE, 256);
        let mut queue = queue(&rings);
        rings.offer_chain(0, &[(DATA, 1000, true)]);
        rings.offer_chain(1, &[(DATA + 1000, 1000, true)]);
        let sent = frame(5000);
        bench.peer.send(&sent).unwrap();
        assert_eq!(bench.net.process(0, &mut queue, &ram), Ok(Progress::More));
        assert_eq!(bench.net.process(0, &mut queue, &ram), Ok(Progress::Wait));
        assert_eq!(rings.used_index(), 0);
        rings.offer_chain(2, &[(DATA + 2000, 2000, true)]);
        assert_eq!(bench.net.process(0, &mut queue, &ram), Ok(Progress::Wait));
        rings.offer_chain(3, &[(DATA + 4000, 2000, true)]);
        assert_eq!(bench.net.process(0, &mut queue, &ram), Ok(Progress::More));
        assert_eq!(rings.used_index(), 4);
        assert_eq!(num_buffers(&ram, DATA), 4);
        assert_eq!(guest(&ram, DATA + 12, 5000), sent[12..]);
        assert_eq!(bench.net.counters.rx_frames.get(), 1);
    }

    #[test]
    fn receive_when_no_more_buffers_come_drops_the_frame_and_goes_on() {
        let mut bench = bench(feature::COMMON | bit::MRG_RXBUF | bit::GUEST_TSO4);
        let ram = bench.ram.clone();
        let mut rings = Rings::new(&ram, BASE, 256);
        let mut queue = queue(&rings);
        rings.offer_chain(0, &[(DATA, 1000, true)]);
        bench.peer.send(&frame(5000)).unwrap();
        bench.peer.send(&frame(500)).unwrap();
        assert_eq!(bench.net.process(0, &mut queue, &ram), Ok(Progress::More));
        assert_eq!(bench.net.process(0, &mut queue, &ram), Ok(Progress::Wait));
        std::thread::sleep(Duration::from_nanos(PATIENCE_NANOS));
        assert_eq!(bench.net.process(0, &mut queue, &ram), Ok(Progress::More));
        assert_eq!(bench.net.counters.rx_dropped.get(), 1);
        assert_eq!(bench.net.process(0, &mut queue, &ram), Ok(Progress::More));
        assert_eq!(rings.take(), Some((0, 512)));
        assert_eq!(guest(&ram, DATA + 12, 500), frame(500)[12..]);
    }

    #[test]
    fn receive_when_not_mergeable_and_too_long_drops_and_keeps_the_buffer() {
        let mut bench = bench(feature::COMMON);
        let ram = bench.ram.clone();
        let mut rings = Rings::new(&ram, BASE, 256);
        let mut queue = queue(&rings);
        rings.offer_chain(0, &[(DATA, 1000, true)]);
        for payload in [989, 988] {
            bench.peer.send(&frame(payload)).unwrap();
        }
        assert_eq!(bench.net.process(0, &mut queue, &ram), Ok(Progress::More));
        assert_eq!(rings.used_index(), 0);
        assert_eq!(bench.net.process(0, &mut queue, &ram), Ok(Progress::More));
        assert_eq!(rings.take(), Some((0, 1000)));
        assert_eq!(bench.net.counters.rx_dropped.get(), 1);
    }

    #[test]
    fn receive_when_buffers_are_unusable_returns_them_empty() {
        let mut bench = bench(feature::COMMON | bit::MRG_RXBUF);
        let ram = bench.ram.clone();
        let mut rings = Rings::new(&ram, BASE, 256);
        let mut queue = queue(&rings);
        rings.offer_chain(0, &[(DATA, 12, true)]);
        rings.offer_chain(1, &[(DATA, 2000, false)]);
        rings.offer_chain(2, &[(DATA, 20, false), (DATA, 2000, true)]);
        rings.offer_chain(4, &[(1 << 20, 2000, true)]);
        rings.offer_chain(5, &[(DATA, 2000, true)]);
        bench.peer.send(&frame(60)).unwrap();
        for head in [0, 1, 2, 4] {
            assert_eq!(bench.net.process(0, &mut queue, &ram), Ok(Progress::More));
            assert_eq!(rings.take(), Some((head, 0)));
        }
        assert_eq!(bench.net.process(0, &mut queue, &ram), Ok(Progress::More));
        assert_eq!(rings.take(), Some((5, 72)));
        assert_eq!(bench.net.counters.rx_invalid.get(), 4);
    }

    #[test]
    fn receive_when_buffers_are_in_many_pieces_keeps_to_its_places() {
        let mut bench = bench(feature::COMMON | bit::MRG_RXBUF | bit::GUEST_TSO4);
        let ram = bench.ram.clone();
        let mut rings = Rings::new(&ram, BASE, 256);
        let mut queue = queue(&rings);
        // Two chains of 90 pieces find a place, a third must wait for its turn; one of 193 pieces
        // never finds one.
        let offer = |first: u16, pieces: u64, at: u64| {
            let parts: Vec<_> = (0..pieces)
                .map(|i| (DATA + at + i * 20, 20, true))
                .collect();
            rings.offer_chain(first, &parts);
        };
        offer(0, 90, 0);
        offer(90, 90, 1800);
        offer(180, 70, 3600);
        for payload in [3000, 900] {
            bench.peer.send(&frame(payload)).unwrap();
        }
        assert_eq!(bench.net.process(0, &mut queue, &ram), Ok(Progress::More));
        assert_eq!(bench.net.process(0, &mut queue, &ram), Ok(Progress::More));
        offer(0, 193, 0);
        offer(200, 50, 0);
        bench.peer.send(&frame(60)).unwrap();
        assert_eq!(bench.net.process(0, &mut queue, &ram), Ok(Progress::More));
        assert_eq!(bench.net.process(0, &mut queue, &ram), Ok(Progress::More));
        assert_eq!(
            guest(&ram, DATA + 1812, 1000)[..988],
            frame(3000)[1812..2800]
        );
        assert_eq!(guest(&ram, DATA + 3612, 900), frame(900)[12..]);
        let used: Vec<_> = std::iter::from_fn(|| rings.take()).collect();
        assert_eq!(used, [(0, 1800), (90, 1212), (180, 912), (0, 0), (200, 72)]);
    }

    #[test]
    fn reset_when_buffers_are_at_hand_forgets_them() {
        let mut bench = bench(feature::COMMON | bit::MRG_RXBUF | bit::GUEST_TSO4);
        let ram = bench.ram.clone();
        let rings = Rings::new(&ram, BASE, 256);
        let mut old = queue(&rings);
        rings.offer_chain(0, &[(DATA, 1000, true)]);
        bench.peer.send(&frame(5000)).unwrap();
        assert_eq!(bench.net.process(0, &mut old, &ram), Ok(Progress::More));
        bench.net.reset();
        bench.net.activate(feature::COMMON).unwrap();
        let mut rings = Rings::new(&ram, BASE, 256);
        let mut queue = queue(&rings);
        bench.peer.send(&frame(100)).unwrap();
        assert_eq!(bench.net.process(0, &mut queue, &ram), Ok(Progress::Wait));
        rings.offer_chain(7, &[(DATA + 0x1000, 1600, true)]);
        assert_eq!(bench.net.process(0, &mut queue, &ram), Ok(Progress::More));
        assert_eq!(rings.take(), Some((7, 112)));
    }

    #[test]
    fn tap_when_it_vanishes_is_left_alone() {
        let name = "mf-t-gone";
        let Ok(tap) = Tap::open(name) else {
            eprintln!("SKIPPED: no tap may be made here");
            return;
        };
        let limiter = RateLimiter::default;
        let mut net = Net::new(tap, None, None, limiter(), limiter()).unwrap();
        net.activate(net.features()).unwrap();
        let ram = ram();
        let mut receive_rings = Rings::new(&ram, BASE, 256);
        let mut receive = queue(&receive_rings);
        let mut transmit_rings = Rings::new(&ram, BASE + 0x8000, 256);
        let mut transmit = queue(&transmit_rings);
        receive_rings.offer_chain(0, &[(DATA, 65574, true)]);
        assert_eq!(net.process(0, &mut receive, &ram), Ok(Progress::Wait));
        let deleted = std::process::Command::new("ip")
            .args(["link", "delete", name])
            .status();
        if !deleted.is_ok_and(|s| s.success()) {
            eprintln!("SKIPPED: no ip command here");
            return;
        }
        net.backend(source::TAP);
        assert_eq!(net.process(0, &mut receive, &ram), Ok(Progress::Wait));
        assert_eq!(net.counters.tap_gone.get(), 1);
        for _ in 0..3 {
            transmit_rings.offer_chain(0, &[(DATA, 100, false)]);
            assert_eq!(net.process(1, &mut transmit, &ram), Ok(Progress::More));
            assert_eq!(transmit_rings.take(), Some((0, 0)));
            net.backend(source::TAP);
            assert_eq!(net.process(0, &mut receive, &ram), Ok(Progress::Wait));
        }
        assert_eq!(net.counters.tx_dropped.get(), 3);
        assert_eq!(net.counters.rx_failed.get(), 1);
        // A driver that starts anew finds a card without a cable.
        net.reset();
        net.activate(net.features()).unwrap();
        assert_eq!(net.counters.tap_gone.get(), 1);
        assert_eq!(receive_rings.take(), None);
    }
}
