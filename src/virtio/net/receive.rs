//! From the tap to the guest.
//!
//! A frame is read straight into as many of the guest's buffers as the largest frame may need; those
//! it did not need stay at hand, parsed, for the next one. Only when the guest has run out of
//! buffers in the middle of a frame does its end wait, for a moment and in memory of ours, for the
//! guest to bring more.

use std::io;

use super::buffers::Buffers;
use super::{FRAME_MAX, HEADER, NUM_BUFFERS, Net};
use crate::sys::{self, clock};
use crate::virtio::queue::Popped;
use crate::virtio::segment::{copy_out, slices};
use crate::virtio::{BrokenRing, Progress, Queue, Ram};

/// How long the end of a frame waits for the guest's buffers before the frame is dropped.
pub(super) const PATIENCE_NANOS: u64 = 50_000_000;

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
    pub fn new(len: u32, in_guest: u32) -> Self {
        UnfinishedFrame {
            len,
            in_guest,
            until: clock::monotonic_nanos().saturating_add(PATIENCE_NANOS),
        }
    }

    /// Lets it wait as long as a new one.
    pub fn wait_anew(&mut self) {
        *self = UnfinishedFrame::new(self.len, self.in_guest);
    }
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
    /// Passes one frame from the tap to the guest.
    pub(super) fn receive(&mut self, queue: &mut Queue, ram: &Ram) -> Result<Progress, BrokenRing> {
        if !self.held.is_empty() {
            self.walk_held(queue, ram)?;
        }
        if let Some(frame) = self.unfinished {
            return self.receive_end(frame, queue, ram);
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
                    self.unfinished = Some(UnfinishedFrame::new(len, room));
                    return Ok(Progress::More);
                }
                self.deliver(len, room, queue, ram)
            }
            Err(error) => {
                // The next frame makes a new edge.
                self.readable = false;
                if error.kind() != io::ErrorKind::WouldBlock {
                    self.counters.rx_failed.one();
                    self.note_if_gone(&error);
                }
                Ok(Progress::Wait)
            }
        }
    }

    /// Takes the buffers at hand that a saved state names. Whatever the guest has made of them since, no
    /// more than what it could have offered anew comes of it.
    fn walk_held(&mut self, queue: &mut Queue, ram: &Ram) -> Result<(), BrokenRing> {
        for head in &self.held {
            let found = queue.walk_again(ram, *head, &mut self.chain)?;
            let usable = found == Popped::Chain && Buffers::can_hold(&self.chain);
            if !usable || !self.buffers.push(&self.chain) {
                self.counters.rx_invalid.one();
                queue.add_used(ram, *head, 0)?;
            }
        }
        self.held.clear();
        Ok(())
    }

    /// Brings the end of a frame to the guest once there is room for it.
    fn receive_end(
        &mut self,
        frame: UnfinishedFrame,
        queue: &mut Queue,
        ram: &Ram,
    ) -> Result<Progress, BrokenRing> {
        if let Gathered::Refused = self.gather(frame.len, queue, ram)? {
            return Ok(Progress::More);
        }
        let room = self.buffers.room();
        if room < frame.len {
            let left = frame.until.saturating_sub(clock::monotonic_nanos());
            if left > 0 {
                self.rx_throttle.wake_in(left);
                return Ok(Progress::Wait);
            }
            self.unfinished = None;
            self.counters.rx_dropped.one();
            return Ok(Progress::More);
        }
        self.unfinished = None;
        let rest = frame.len.saturating_sub(frame.in_guest);
        let place = self.buffers.place(frame.in_guest, rest);
        let end = self.spill.get(..rest as usize).unwrap_or_default();
        if !copy_out(ram, place, end) {
            return Err(BrokenRing::Memory);
        }
        self.deliver(frame.len, room, queue, ram)
    }

    /// Passes the frame of `len` bytes, which the tap has just written, to the guest.
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
}
