//! The network device (virtio 1.2, 5.1): a receive queue and a transmit queue on a [`Link`], a tap or a socket.
//!
//! With several pairs there are as many of it, each with a queue of the tap's (`pairs`); what they share is the
//! rate limiters, and which of the tap's queues are attached.
//!
//! Frames go between guest memory and the link without a copy of ours, in batches: `mod@receive` and
//! `mod@transmit`.

mod announce;
mod batch;
mod buffers;
mod counters;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod pairs;
mod receive;
mod state;
#[cfg(test)]
mod tests;
mod transmit;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use vmm_sys_util::epoll::Epoll;

use self::buffers::Buffers;
pub use self::counters::NetCounters;
use self::pairs::Pairs;
use self::receive::{UnfinishedFrame, patience};
pub use self::state::NetState;
use super::queue::Chain;
use super::throttle::Throttle;
use super::{
    BrokenRing, ConfigSpace, Device, PerWorker, Progress, Queue, QueueSet, Ram, StateError,
    Updated, WorkerCounters, feature,
};
use crate::metrics::Report;
use crate::rate_limiter::{RateLimiter, RateLimiterUpdate};
use crate::sys::link::{Link, SOCKET_MTU};
use crate::sys::tap::{self, Offloads};
use crate::wire::limits::QUEUES_MAX;

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
    /// VIRTIO_NET_F_CTRL_VQ: there is a control queue.
    pub const CTRL_VQ: u64 = 1 << 17;
    /// VIRTIO_NET_F_MQ: the driver may use several pairs of queues.
    pub const MQ: u64 = 1 << 22;
    /// VIRTIO_NET_F_GUEST_USO4: the guest takes unsegmented UDP (virtio 1.3, 5.1.3).
    pub const GUEST_USO4: u64 = 1 << 54;
    /// VIRTIO_NET_F_GUEST_USO6
    pub const GUEST_USO6: u64 = 1 << 55;
    /// VIRTIO_NET_F_HOST_USO: we take unsegmented UDP.
    pub const HOST_USO: u64 = 1 << 56;

    pub const NAMES: &[(u64, &str)] = &[
        (CSUM, "VIRTIO_NET_F_CSUM"),
        (GUEST_CSUM, "VIRTIO_NET_F_GUEST_CSUM"),
        (MTU, "VIRTIO_NET_F_MTU"),
        (MAC, "VIRTIO_NET_F_MAC"),
        (GUEST_TSO4, "VIRTIO_NET_F_GUEST_TSO4"),
        (GUEST_TSO6, "VIRTIO_NET_F_GUEST_TSO6"),
        (GUEST_ECN, "VIRTIO_NET_F_GUEST_ECN"),
        (GUEST_UFO, "VIRTIO_NET_F_GUEST_UFO"),
        (HOST_TSO4, "VIRTIO_NET_F_HOST_TSO4"),
        (HOST_TSO6, "VIRTIO_NET_F_HOST_TSO6"),
        (HOST_ECN, "VIRTIO_NET_F_HOST_ECN"),
        (HOST_UFO, "VIRTIO_NET_F_HOST_UFO"),
        (MRG_RXBUF, "VIRTIO_NET_F_MRG_RXBUF"),
        (CTRL_VQ, "VIRTIO_NET_F_CTRL_VQ"),
        (MQ, "VIRTIO_NET_F_MQ"),
        (GUEST_USO4, "VIRTIO_NET_F_GUEST_USO4"),
        (GUEST_USO6, "VIRTIO_NET_F_GUEST_USO6"),
        (HOST_USO, "VIRTIO_NET_F_HOST_USO"),
    ];

    /// What is offered on a tap.
    pub const TAP: u64 = CSUM
        | GUEST_CSUM
        | GUEST_TSO4
        | GUEST_TSO6
        | GUEST_ECN
        | GUEST_UFO
        | HOST_TSO4
        | HOST_TSO6
        | HOST_ECN
        | HOST_UFO;
    /// What is offered where the tap takes it.
    pub const USO: u64 = GUEST_USO4 | GUEST_USO6 | HOST_USO;
    /// A tap takes these together or not at all.
    pub const GUEST_USO: u64 = GUEST_USO4 | GUEST_USO6;
    /// With any of these, frames may be as large as [`super::FRAME_MAX`].
    pub const GUEST_LARGE: u64 = GUEST_TSO4 | GUEST_TSO6 | GUEST_UFO | GUEST_USO;
}

/// Offsets in the configuration space (virtio 1.2, 5.1.4).
mod field {
    pub const MAC: usize = 0;
    pub const MAX_PAIRS: usize = 8;
    pub const MTU: usize = 10;
}

/// The places of a worker's queues (virtio 1.2, 5.1.2).
mod queue {
    pub const RECEIVE: usize = 0;
    pub const TRANSMIT: usize = 1;
    /// How many a pair has.
    pub const PAIR: usize = 2;
    /// Of the first of several workers.
    pub const CONTROL: usize = 2;
}

/// The numbers of what is watched, in the order of [`Device::sources`].
mod source {
    pub const LINK: usize = 0;
    pub const RECEIVE_TIMER: usize = 1;
    /// Room in a socket, or the timer of several pairs.
    pub const LAST: usize = 3;
}

const QUEUE_SIZE: u16 = 256;
/// Those of a device with as many pairs as there may be, and the control queue.
const QUEUE_SIZES: [u16; QUEUES_MAX * 2 + 1] = [QUEUE_SIZE; QUEUES_MAX * 2 + 1];

/// The header in front of each frame, `struct virtio_net_hdr` (virtio 1.2, 5.1.6).
const HEADER: u32 = tap::HEADER as u32;
/// Where `num_buffers` is in it.
const NUM_BUFFERS: u32 = 10;

/// The largest frame, with its header (virtio 1.2, 5.1.6.3.1).
const FRAME_MAX: u32 = 65562 + HEADER;
/// The largest without segmentation, for an MTU of 1500: Ethernet's header, two VLAN tags.
const FRAME_OVERHEAD: u32 = HEADER + 14 + 8;
const MTU_DEFAULT: u16 = 1500;
/// The largest frame on a socket. It is less than [`FRAME_MAX`]: what is longer than the room for it is
/// cut off without a word, and so is told by its length.
const SOCKET_FRAME_MAX: u32 = SOCKET_MTU as u32 + FRAME_OVERHEAD;
const _: () = assert!(SOCKET_FRAME_MAX < FRAME_MAX);

/// A change of a running device.
#[derive(Debug, Default)]
pub struct Update {
    /// Other limits on what the guest receives.
    pub rx_limits: RateLimiterUpdate,
    /// Other limits on what the guest sends.
    pub tx_limits: RateLimiterUpdate,
    /// Numbers changes of limits, for workers that share them.
    pub number: u64,
}

/// A network device.
#[derive(Debug)]
pub struct Net {
    link: Link,
    /// Tells when a socket has room again.
    room: Option<Epoll>,
    mac: Option<[u8; 6]>,
    mtu: Option<u16>,
    takes_uso: bool,
    rx_throttle: Throttle,
    tx_throttle: Throttle,
    /// What the tap was last told that the guest takes over.
    offloads: Option<Offloads>,
    /// The link may have a frame: true from an edge until it said that there is none.
    readable: bool,
    /// The link has ended; it is left alone from then on.
    gone: bool,
    mergeable: bool,
    /// The room that is gathered for the next frame.
    room_wanted: u32,
    chain: Chain,
    buffers: Buffers,
    /// Chains that were at hand when the state was saved: to be walked again, in order.
    held: Vec<u16>,
    /// Takes the end of a frame that is longer than the buffers at hand.
    spill: Box<[u8]>,
    unfinished: Option<UnfinishedFrame>,
    /// How long that waits for the guest's buffers, in nanoseconds.
    patience: u64,
    /// It is one of several.
    pairs: Option<Box<Pairs>>,
    counters: Arc<NetCounters>,
}

impl Net {
    /// A device on each of `links`, which are queues of one tap, one for each pair, or one link. Without a `mac` the guest
    /// chooses its own; with an `mtu` it is told to keep to it. They go on from `states`, which were saved
    /// `elapsed` nanoseconds ago.
    ///
    /// # Errors
    /// When the host has no descriptor left, or does not attach and detach queues of the tap, or `states` cannot be.
    pub fn for_pairs(
        links: PerWorker<Link>,
        (mac, mtu): (Option<[u8; 6]>, Option<u16>),
        rx_limiter: RateLimiter,
        tx_limiter: RateLimiter,
        states: &PerWorker<NetState>,
        elapsed: u64,
    ) -> io::Result<PerWorker<Self>> {
        let count = links.count();
        let rx_limiter = rx_limiter.restore(&states.first.rx_limiter, elapsed);
        let tx_limiter = tx_limiter.restore(&states.first.tx_limiter, elapsed);
        let rx = Throttle::for_workers(rx_limiter, count)?;
        let tx = Throttle::for_workers(tx_limiter, count)?;
        let takes_uso = links.first.takes_uso();
        let mut others = Vec::new();
        for tap in links.others.iter().filter_map(Link::tap) {
            tap.detach()?;
            others.push(tap.try_clone()?);
        }
        let (mut number, mut states) = (0usize, states.iter());
        links.zip(rx.zip(tx)).try_map(|(link, throttles)| {
            let new = NetState::default();
            let state = states.next().unwrap_or(&new);
            let pairs = match count {
                1 => None,
                _ => Some(Pairs {
                    number,
                    count: u16::try_from(count).unwrap_or(u16::MAX),
                    others: std::mem::take(&mut others),
                    active: 1,
                    wanted: state.pairs.max(1),
                    features: 0,
                    throttle: Throttle::new(pairs::changes())?,
                }),
            };
            number = number.saturating_add(1);
            Net::of_pair(link, (mac, mtu, takes_uso), throttles, state, pairs)
        })
    }

    /// [`Net::for_pairs`] with one.
    #[cfg(test)]
    pub fn new(
        link: impl Into<Link>,
        mac: Option<[u8; 6]>,
        mtu: Option<u16>,
        rx_limiter: RateLimiter,
        tx_limiter: RateLimiter,
        state: &NetState,
        elapsed: u64,
    ) -> io::Result<Self> {
        let state = PerWorker::from(state.clone());
        let links = PerWorker::from(link.into());
        let nets = Net::for_pairs(links, (mac, mtu), rx_limiter, tx_limiter, &state, elapsed)?;
        Ok(nets.first)
    }

    fn of_pair(
        link: Link,
        (mac, mtu, takes_uso): (Option<[u8; 6]>, Option<u16>, bool),
        (rx_throttle, tx_throttle): (Throttle, Throttle),
        state: &NetState,
        pairs: Option<Pairs>,
    ) -> io::Result<Self> {
        let most = match &pairs {
            Some(pairs) if pairs.number == 0 => pairs.count,
            _ => 0,
        };
        if state.pairs > most {
            return Err(io::Error::other(StateError::Value("pairs")));
        }
        let unfinished = state.check().map_err(io::Error::other)?;
        let mut spill = vec![0; FRAME_MAX as usize].into_boxed_slice();
        for (to, from) in spill.iter_mut().zip(&state.unfinished.rest) {
            *to = *from;
        }
        Ok(Net {
            takes_uso,
            room: link.room()?,
            mac,
            mtu: mtu.or(link.is_socket().then_some(SOCKET_MTU)),
            patience: patience(&link),
            link,
            rx_throttle,
            tx_throttle,
            offloads: None,
            readable: false,
            gone: false,
            mergeable: false,
            room_wanted: 0,
            chain: Chain::new(),
            buffers: Buffers::new(),
            held: state.held.clone(),
            spill,
            unfinished,
            pairs: pairs.map(Box::new),
            counters: Arc::new(NetCounters::default()),
        })
    }

    fn note_if_gone(&mut self, error: &io::Error) {
        if self.link.is_gone(error) {
            self.end();
        }
    }

    /// The link is of no more use.
    fn end(&mut self) {
        self.readable = false;
        if !self.gone {
            self.gone = true;
            self.counters.tap_gone.one();
            let why = match self.link.is_socket() {
                true => "the other end of the packet socket was closed, or sent an empty packet",
                false => "the tap has vanished",
            };
            crate::error!("{why}: this network interface is cut off from now on");
        }
    }
}

impl Device for Net {
    // Network device (virtio 1.2, 5.1).
    const ID: u32 = 1;
    const QUEUES: &'static [u16] = &[QUEUE_SIZE, QUEUE_SIZE];
    const FEATURES: &'static [(u64, &'static str)] = bit::NAMES;
    // A batch of large frames takes some 100 us.
    const UNITS_MAY_WAIT: bool = true;
    type Update = Update;
    type State = NetState;
    type Counters = NetCounters;

    fn queues_of_several(workers: usize) -> Option<&'static [u16]> {
        QUEUE_SIZES.get(..workers.checked_mul(2)?.checked_add(1)?)
    }

    fn features(&self) -> u64 {
        let mut features = feature::COMMON | bit::MRG_RXBUF;
        if !self.link.is_socket() {
            features |= bit::TAP;
        }
        if self.mac.is_some() {
            features |= bit::MAC;
        }
        if self.mtu.is_some() {
            features |= bit::MTU;
        }
        if self.takes_uso {
            features |= bit::USO;
        }
        if self.pairs.is_some() {
            features |= bit::CTRL_VQ | bit::MQ;
        }
        features
    }

    fn config(&self) -> ConfigSpace {
        // Not there without the feature.
        let pairs = self.pairs.as_ref().map_or(0, |pairs| pairs.count);
        ConfigSpace::new()
            .with(field::MAX_PAIRS, &pairs.to_le_bytes())
            .with(field::MAC, &self.mac.unwrap_or_default())
            .with(field::MTU, &self.mtu.unwrap_or_default().to_le_bytes())
    }

    fn counters(&self) -> Arc<NetCounters> {
        Arc::clone(&self.counters)
    }

    fn add_counters(to: &NetCounters, from: &NetCounters) {
        to.add(from);
    }

    fn read_counters(
        counters: &NetCounters,
        worker: &WorkerCounters,
        name: &str,
        report: &mut Report,
    ) {
        counters.read(worker, name, report);
    }

    fn sources(&self) -> Vec<RawFd> {
        let mut sources = vec![
            self.link.as_raw_fd(),
            self.rx_throttle.as_raw_fd(),
            self.tx_throttle.as_raw_fd(),
        ];
        // Only a socket has the one, and only a tap the other.
        sources.extend(self.room.as_ref().map(AsRawFd::as_raw_fd));
        sources.extend(self.pairs.as_ref().map(|pairs| pairs.throttle.as_raw_fd()));
        sources
    }

    fn activate(&mut self, features: u64) -> io::Result<()> {
        let has = |bits| features & bits != 0;
        self.mergeable = has(bit::MRG_RXBUF);
        self.room_wanted = if !self.mergeable {
            // One buffer at a time, of any size.
            1
        } else if has(bit::GUEST_LARGE) {
            FRAME_MAX
        } else {
            u32::from(self.mtu.unwrap_or(MTU_DEFAULT).max(MTU_DEFAULT))
                .saturating_add(FRAME_OVERHEAD)
        };
        self.activate_pairs(features)?;
        // Frames may have come before the driver did: their edge is past.
        self.readable = !self.gone;
        let offloads = Offloads {
            checksum: has(bit::GUEST_CSUM),
            tso4: has(bit::GUEST_TSO4),
            tso6: has(bit::GUEST_TSO6),
            ecn: has(bit::GUEST_ECN),
            ufo: has(bit::GUEST_UFO),
            uso: features & bit::GUEST_USO == bit::GUEST_USO,
        };
        // They are of the whole tap, and each call takes a lock that all of the host's network has.
        let is_another_pair = self.pairs.as_ref().is_some_and(|pairs| pairs.number != 0);
        if is_another_pair || self.offloads == Some(offloads) {
            return Ok(());
        }
        match self.link.set_offloads(offloads) {
            // Without a tap the device works like one without a cable.
            Err(error) if self.link.is_gone(&error) => self.note_if_gone(&error),
            other => other?,
        }
        self.offloads = Some(offloads);
        Ok(())
    }

    fn process(
        &mut self,
        index: usize,
        queue: &mut Queue,
        ram: &Ram,
    ) -> Result<Progress, BrokenRing> {
        if self.is_control(index) {
            return self.control(queue, ram);
        }
        match index {
            queue::RECEIVE => self.receive(queue, ram),
            _ => self.transmit(queue, ram),
        }
    }

    fn backend(&mut self, source: usize) -> QueueSet {
        match source {
            source::LINK => {
                self.readable = !self.gone;
                QueueSet::one(queue::RECEIVE)
            }
            source::RECEIVE_TIMER => QueueSet::one(queue::RECEIVE),
            source::LAST if self.pairs.is_some() => QueueSet::one(queue::CONTROL),
            // Its timer, or room.
            _ => QueueSet::one(queue::TRANSMIT),
        }
    }

    fn poll(&mut self) -> QueueSet {
        if self.readable || self.gone {
            // What is waited for then is buffers, or the limiter's timer.
            return QueueSet::NONE;
        }
        // To try and read costs less than to ask.
        self.readable = true;
        QueueSet::one(queue::RECEIVE)
    }

    fn update(&mut self, update: Update) -> Updated {
        self.counters.updates.one();
        self.rx_throttle.update(update.rx_limits, update.number);
        self.tx_throttle.update(update.tx_limits, update.number);
        Updated {
            runnable: QueueSet::ALL,
            ..Updated::default()
        }
    }

    fn state_buffer() -> NetState {
        NetState::buffer()
    }

    fn save(&self, state: &mut NetState) {
        self.save_into(state);
    }

    fn was_restored(&mut self) {
        if let Some(frame) = &mut self.unfinished {
            frame.wait_anew(self.patience);
        }
        // Once for all pairs.
        if self.pairs.as_ref().is_none_or(|pairs| pairs.number == 0) {
            self.announce();
        }
    }

    fn reset(&mut self) {
        self.held.clear();
        self.buffers.clear();
        self.unfinished = None;
        self.mergeable = false;
        self.reset_pairs();
    }
}
