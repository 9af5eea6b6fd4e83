//! From the guest to the link.
//!
//! Frames go in batches: one system call for each, since nothing else that was measured is cheaper (see
//! [`crate::sys::packets`]), but the used index is published, the clock read and counters written once.

use std::io;
use std::time::Instant;

use super::batch::Batch;
use super::{FRAME_MAX, HEADER, Net};
use crate::metrics::micros_since;
use crate::sys::packets::write_packet;
use crate::virtio::queue::Popped;
use crate::virtio::segment::slices;
use crate::virtio::{BrokenRing, Progress, Queue, Ram};

impl Net {
    /// Passes a batch of frames from the guest to the link.
    pub(super) fn transmit(
        &mut self,
        queue: &mut Queue,
        ram: &Ram,
    ) -> Result<Progress, BrokenRing> {
        let mut batch = Batch::new();
        let result = self.transmit_batch(&mut batch, queue, ram);
        if batch.is_staged {
            queue.publish_used(ram)?;
        }
        self.counters.tx_frames.add(batch.frames);
        self.counters.tx_bytes.add(batch.bytes);
        if let Some(since) = batch.since {
            self.counters.tx_times.observe(micros_since(since));
        }
        result
    }

    fn transmit_batch(
        &mut self,
        batch: &mut Batch,
        queue: &mut Queue,
        ram: &Ram,
    ) -> Result<Progress, BrokenRing> {
        while batch.goes_on() {
            let popped = queue.pop(ram, &mut self.chain)?;
            if popped == Popped::Empty {
                return Ok(batch.progress());
            }
            let len = self.chain.readable_len();
            if popped != Popped::Chain
                || len <= HEADER
                || len > FRAME_MAX
                || self.chain.writable_len() != 0
            {
                self.counters.tx_invalid.one();
            } else {
                let payload = u64::from(len.saturating_sub(HEADER));
                if !self.tx_throttle.permits(payload) {
                    queue.rewind(1);
                    if batch.progress() == Progress::Wait {
                        self.counters.tx_throttled.one();
                    }
                    return Ok(batch.progress());
                }
                if !self.send(payload, ram, batch) {
                    queue.rewind(1);
                    return Ok(batch.progress());
                }
                self.tx_throttle.charge(payload);
            }
            queue.stage_used(ram, self.chain.head(), 0)?;
            batch.step();
        }
        Ok(Progress::More)
    }

    /// Sends the chain at hand; `false` if it has to wait for room in a socket, which is an event of its own.
    /// The header's contents are the receiver's to check: a tap's kernel copies the header once, and looks
    /// at that copy.
    fn send(&mut self, payload: u64, ram: &Ram, batch: &mut Batch) -> bool {
        if self.gone {
            self.counters.tx_dropped.one();
            return true;
        }
        batch.since.get_or_insert_with(Instant::now);
        let pieces = slices(ram, self.chain.readable().iter().copied());
        match write_packet(&self.link, pieces) {
            Ok(_) => batch.add(payload),
            Err(error) if self.link.is_socket() => {
                if error.kind() == io::ErrorKind::WouldBlock {
                    return false;
                }
                // That there is no other end is found out by reading, behind what it has still sent.
                self.counters.tx_dropped.one();
            }
            Err(error) => {
                // A network device drops what it cannot send; virtio has no error for it.
                self.counters.tx_dropped.one();
                self.note_if_gone(&error);
            }
        }
        true
    }
}
