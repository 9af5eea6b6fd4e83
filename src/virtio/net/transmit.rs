//! From the guest to the tap.

use std::time::Instant;

use super::{FRAME_MAX, HEADER, Net};
use crate::metrics::micros_since;
use crate::sys;
use crate::virtio::queue::Popped;
use crate::virtio::segment::slices;
use crate::virtio::{BrokenRing, Progress, Queue, Ram};

impl Net {
    /// Passes one frame from the guest to the tap.
    pub(super) fn transmit(
        &mut self,
        queue: &mut Queue,
        ram: &Ram,
    ) -> Result<Progress, BrokenRing> {
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
                // A network device drops what it cannot send; virtio has no error for it.
                self.counters.tx_dropped.one();
                self.note_if_gone(&error);
            }
        }
    }
}
