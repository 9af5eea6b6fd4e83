//! Words that keep devices busy for a measurement, as a good driver would.
//!
//! They fill queues to a given depth, ask for no interrupts (or for each, with the option), poll the used rings, and
//! notify a device only when its event index or flag asks for that. What they do per request is as little as can be, so
//! that the device is what is measured. Each prints `  WORD begun` when the devices are running and their memory has
//! been touched, and works for the given time from there on; the figures come with the word's own line.

mod block;
mod net;

pub use block::load as block;
pub use net::load as net;

use crate::clock;
use crate::text::Text;
use crate::virtio::queue::Interrupts;
use crate::{text, x86};

/// The greatest number of devices, or of queues, that are driven at once.
const LANES: usize = 4;

/// Which interrupts a word asks for, by the option's name.
fn interrupts(option: &str) -> Option<Interrupts> {
    match option {
        "poll" => Some(Interrupts::None),
        "interrupts" => Some(Interrupts::Each),
        _ => None,
    }
}

/// The numbers in `A+B+...`, at most [`LANES`].
fn indices(list: &str) -> Result<([u64; LANES], usize), Text> {
    let (mut indices, mut count) = ([0; LANES], 0);
    for part in list.split('+') {
        let slot = indices.get_mut(count).ok_or("too many devices")?;
        *slot = super::number(part).ok_or_else(|| text!("{part} is no device"))?;
        count += 1;
    }
    Ok((indices, count))
}

/// Times of requests from publishing to completion, in ticks.
struct Latency {
    least: u64,
    most: u64,
    total: u64,
    count: u64,
}

impl Latency {
    fn new() -> Self {
        Latency {
            least: u64::MAX,
            most: 0,
            total: 0,
            count: 0,
        }
    }

    fn add(&mut self, ticks: u64) {
        self.total = self.total.wrapping_add(ticks);
        self.least = self.least.min(ticks);
        self.most = self.most.max(ticks);
        self.count += 1;
    }

    fn join(&mut self, other: &Self) {
        self.total = self.total.wrapping_add(other.total);
        self.least = self.least.min(other.least);
        self.most = self.most.max(other.most);
        self.count += other.count;
    }

    fn text(&self) -> Text {
        let mean = self.total.checked_div(self.count).unwrap_or(0);
        let least = self.least.min(self.most);
        let [least, mean, most] = [least, mean, self.most].map(clock::ns);
        text!("min-ns={least} mean-ns={mean} max-ns={most}")
    }
}

/// `amount` in `ticks` as a number per second.
fn per_second(amount: u64, ticks: u64) -> u64 {
    let ns = u128::from(clock::ns(ticks).max(1));
    (u128::from(amount) * 1_000_000_000 / ns) as u64
}

/// The tick at which a span of `ms` milliseconds that begins now is over.
fn end_of_span(ms: u64) -> u64 {
    x86::rdtsc().saturating_add(clock::ticks(ms.saturating_mul(1_000_000)))
}
