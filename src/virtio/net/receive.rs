//! From the link to the guest.
//!
//! A frame is read straight into as many of the guest's buffers as the largest frame may need; those
//! it did not need stay at hand, parsed, for the next one. Frames come in batches: one system call for
//! each, but the used index is published once, and the memory of the buffers at hand is looked up once. Only when the guest has run out of
//! buffers in the middle of a frame does its end wait, for a moment and in memory of ours, for the
//! guest to bring more.

use std::io;

use super::batch::Batch;
use super::buffers::Buffers;
use super::{FRAME_MAX, HEADER, NUM_BUFFERS, Net, SOCKET_FRAME_MAX};
use crate::sys::clock;
use crate::sys::link::Link;
use crate::sys::packets::Incoming;
use crate::virtio::queue::Popped;
use crate::virtio::segment::{copy_out, mark_written};
use crate::virtio::{BrokenRing, Progress, Queue, Ram};

/// How long the end of a frame waits for the guest's buffers before the frame is dropped.
pub(super) const PATIENCE_NANOS: u64 = 50_000_000;
/// The same on a socket, which is to lose nothing: only a guest that never has the buffers gets there.
pub(super) const SOCKET_PATIENCE_NANOS: u64 = 30_000_000_000;

/// The one that is right for `link`.
pub(super) fn patience(link: &Link) -> u64 {
    match link.is_socket() {
        true => SOCKET_PATIENCE_NANOS,
        false => PATIENCE_NANOS,
    }
}

/// A frame whose end waits in the spill; all the buffers at hand hold its beginning.
#[derive(Clone, Copy, Debug)]
pub(super) struct UnfinishedFrame {
    /// Its length with its header.
    pub len: u32,
    /// How much of that is in the guest's buffers.
    pub in_guest: u32,
    /// When it is dropped.
    until: u64,
}

impl UnfinishedFrame {
    /// A frame that waits from now on.
    pub fn new(len: u32, in_guest: u32, patience: u64) -> Self {
        UnfinishedFrame {
            len,
            in_guest,
            until: clock::monotonic_nanos().saturating_add(patience),
        }
    }

    /// Lets it wait as long as a new one.
    pub fn wait_anew(&mut self, patience: u64) {
        *self = UnfinishedFrame::new(self.len, self.in_guest, patience);
    }
}

/// What came of gathering buffers.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Gathered {
    /// There are some, as many as there is a use for.
    Ready,
    /// There are none.
    None,
    /// One was refused, and returned to the driver.
    Refused,
}

/// After how long the link is read again that could not be read.
const AFTER_ERROR_NANOS: u64 = 1_000_000;

impl Net {
    /// Passes a batch of frames from the link to the guest.
    pub(super) fn receive(&mut self, queue: &mut Queue, ram: &Ram) -> Result<Progress, BrokenRing> {
        let has_frame = self.unfinished.is_some() || self.readable;
        if !has_frame && self.held.is_empty() {
            return Ok(Progress::Wait);
        }
        let mut incoming = self.buffers.incoming(ram);
        self.walk_held(queue, ram, &mut incoming)?;
        if !has_frame {
            return Ok(Progress::Wait);
        }
        let mut batch = Batch::new();
        let result = self.receive_batch(&mut batch, queue, ram, &mut incoming);
        if batch.is_staged {
            queue.publish_used(ram)?;
        }
        self.counters.rx_frames.add(batch.frames);
        self.counters.rx_bytes.add(batch.bytes);
        result
    }

    fn receive_batch<'a>(
        &mut self,
        batch: &mut Batch,
        queue: &mut Queue,
        ram: &'a Ram,
        incoming: &mut Incoming<'a>,
    ) -> Result<Progress, BrokenRing> {
        while batch.goes_on() {
            let unfinished = self.unfinished;
            let wanted = unfinished.map_or(self.room_wanted, |frame| frame.len);
            let gathered = self.gather(wanted, queue, ram, incoming)?;
            if gathered == Gathered::Refused {
                batch.step();
                continue;
            }
            if let Some(frame) = unfinished {
                if !self.receive_end(frame, batch, queue, ram, incoming)? {
                    return Ok(batch.progress());
                }
                continue;
            }
            if gathered == Gathered::None {
                return Ok(batch.progress());
            }
            // How long it is will only be known when it has been read; the limiter takes a debt.
            if !self.rx_throttle.permits(1) {
                if batch.progress() == Progress::Wait {
                    self.counters.rx_throttled.one();
                }
                return Ok(batch.progress());
            }
            match self.read(ram, incoming) {
                Ok((0, _)) if self.link.is_socket() => {
                    self.end();
                    return Ok(batch.progress());
                }
                Ok((len, room)) if self.mergeable && room < len && len <= self.frame_max() => {
                    self.unfinished = Some(UnfinishedFrame::new(len, room, self.patience));
                    batch.step();
                }
                Ok((len, room)) => self.deliver(len, room, batch, queue, ram, incoming)?,
                // Told once, before what the other end had sent.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => batch.step(),
                Err(error) => {
                    if error.kind() == io::ErrorKind::WouldBlock || self.link.is_gone(&error) {
                        // The next frame makes a new edge.
                        self.readable = false;
                    } else {
                        // It costs one frame, or is the host's for a while: what is behind it makes no edge.
                        self.rx_throttle.wake_in(AFTER_ERROR_NANOS);
                    }
                    if error.kind() != io::ErrorKind::WouldBlock {
                        self.counters.rx_failed.one();
                        self.note_if_gone(&error);
                    }
                    return Ok(batch.progress());
                }
            }
        }
        Ok(Progress::More)
    }

    /// Reads the next frame into the buffers at hand; its length, and how much of it they can take.
    fn read(&mut self, ram: &Ram, incoming: &mut Incoming<'_>) -> io::Result<(u32, u32)> {
        let (room, pieces) = if self.mergeable {
            self.buffers.all()
        } else {
            self.buffers.next()
        };
        let spill = if room < FRAME_MAX {
            &mut self.spill[..]
        } else {
            &mut []
        };
        let read = incoming.read(&self.link, pieces, spill);
        // The log of writes is only looked into while the worker is paused: between two batches.
        match &read {
            Ok(len) => {
                let len = u32::try_from(*len).unwrap_or(u32::MAX);
                mark_written(ram, self.buffers.place(0, len.min(room)));
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => mark_written(ram, self.buffers.place(0, room)),
        }
        Ok((u32::try_from(read?).unwrap_or(u32::MAX), room))
    }

    /// Takes the buffers at hand that a saved state names. Whatever the guest has made of them since, no
    /// more than what it could have offered anew comes of it.
    fn walk_held<'a>(
        &mut self,
        queue: &mut Queue,
        ram: &'a Ram,
        incoming: &mut Incoming<'a>,
    ) -> Result<(), BrokenRing> {
        for head in &self.held {
            let found = queue.walk_again(ram, *head, &mut self.chain)?;
            let usable = found == Popped::Chain && Buffers::can_hold(&self.chain);
            if !usable || !self.buffers.push(&self.chain, ram, incoming) {
                self.counters.rx_invalid.one();
                queue.add_used(ram, *head, 0)?;
            }
        }
        self.held.clear();
        Ok(())
    }

    /// Brings the end of a frame to the guest if there is room for it, or drops the frame after a while;
    /// `false` if it has to wait.
    fn receive_end(
        &mut self,
        frame: UnfinishedFrame,
        batch: &mut Batch,
        queue: &mut Queue,
        ram: &Ram,
        incoming: &mut Incoming<'_>,
    ) -> Result<bool, BrokenRing> {
        let (room, _) = self.buffers.all();
        if room < frame.len {
            let left = frame.until.saturating_sub(clock::monotonic_nanos());
            if left > 0 {
                self.rx_throttle.wake_in(left);
                return Ok(false);
            }
            self.unfinished = None;
            self.counters.rx_dropped.one();
            batch.step();
            return Ok(true);
        }
        self.unfinished = None;
        let rest = frame.len.saturating_sub(frame.in_guest);
        let place = self.buffers.place(frame.in_guest, rest);
        let end = self.spill.get(..rest as usize).unwrap_or_default();
        if !copy_out(ram, place, end) {
            return Err(BrokenRing::Memory);
        }
        self.deliver(frame.len, room, batch, queue, ram, incoming)?;
        Ok(true)
    }

    /// The largest frame that is passed on, with its header.
    fn frame_max(&self) -> u32 {
        match self.link.is_socket() {
            true => SOCKET_FRAME_MAX,
            false => FRAME_MAX,
        }
    }

    /// Passes the frame of `len` bytes, which the link has just written, to the guest.
    fn deliver(
        &mut self,
        len: u32,
        room: u32,
        batch: &mut Batch,
        queue: &mut Queue,
        ram: &Ram,
        incoming: &mut Incoming<'_>,
    ) -> Result<(), BrokenRing> {
        batch.step();
        if len <= HEADER || len > room.min(self.frame_max()) {
            // It did not fit; its buffers take the next one.
            self.counters.rx_dropped.one();
            return Ok(());
        }
        let payload = u64::from(len.saturating_sub(HEADER));
        self.rx_throttle.charge(payload);
        // The link leaves the last field to us (5.1.6.3). Every buffer holds at least the header.
        let count = self.buffers.count_for(len);
        let [low, high] = count.to_le_bytes();
        let header = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, low, high];
        // The others tell of offloads, which a guest is never offered on a socket: whatever the other end says, 0.
        let ours = match self.link.is_socket() {
            true => 0,
            false => NUM_BUFFERS,
        };
        let said = header.get(ours as usize..).unwrap_or_default();
        let place = self.buffers.place(ours, said.len() as u32);
        if !copy_out(ram, place, said) {
            return Err(BrokenRing::Memory);
        }
        let mut left = len;
        for _ in 0..count {
            let Some(buffer) = self.buffers.pop() else {
                break;
            };
            incoming.consume(buffer.pieces);
            let used = left.min(buffer.len);
            left = left.saturating_sub(used);
            queue.stage_used(ram, buffer.head, used)?;
        }
        batch.add(payload);
        Ok(())
    }

    /// Gets buffers of `wanted` bytes ready, or as many as there are.
    fn gather<'a>(
        &mut self,
        wanted: u32,
        queue: &mut Queue,
        ram: &'a Ram,
        incoming: &mut Incoming<'a>,
    ) -> Result<Gathered, BrokenRing> {
        while self.buffers.all().0 < wanted {
            let popped = queue.pop(ram, &mut self.chain)?;
            if popped == Popped::Empty {
                break;
            }
            if popped == Popped::Chain && Buffers::can_hold(&self.chain) {
                if self.buffers.push(&self.chain, ram, incoming) {
                    continue;
                }
                if !self.buffers.is_empty() {
                    // There is place once those at hand are used.
                    queue.rewind(1);
                    break;
                }
            }
            self.counters.rx_invalid.one();
            queue.stage_used(ram, self.chain.head(), 0)?;
            return Ok(Gathered::Refused);
        }
        Ok(if self.buffers.is_empty() {
            Gathered::None
        } else {
            Gathered::Ready
        })
    }
}
