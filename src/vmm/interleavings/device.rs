//! A device whose requests end later, and the host that ends them.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};

use super::world::{Facts, Fault};
use crate::memory::Ram;
use crate::metrics::Report;
use crate::sys::sync::scheduled::{below, point, rang, wait_until};
use crate::sys::sync::{Bell, Mutex};
use crate::virtio::queue::{Chain, Popped};
use crate::virtio::{
    BrokenRing, ConfigSpace, Device, Progress, Queue, QueueSet, Updated, WorkerCounters, feature,
};

/// A request that the host works at.
#[derive(Clone, Copy, Debug)]
struct Request {
    queue: usize,
    head: u16,
    /// Where the host writes [`ANSWER`].
    address: u64,
}

/// What requests are answered with.
pub const ANSWER: u32 = 0xda7a_da7a;

/// What one worker's device and the host have in common.
pub struct Disk {
    /// Begun, and not yet seen by the host.
    begun: Mutex<VecDeque<Request>>,
    /// Ended, and not yet seen by the device.
    ended: Mutex<VecDeque<Request>>,
    /// Rings when there is more of it.
    bell: Bell,
}

impl Disk {
    pub fn new() -> Arc<Self> {
        Arc::new(Disk {
            begun: Mutex::new(VecDeque::new()),
            ended: Mutex::new(VecDeque::new()),
            bell: Bell::new().unwrap(),
        })
    }
}

/// The host's thread: ends requests in any order, each by a write to guest memory.
pub struct Host {
    pub disks: Vec<Arc<Disk>>,
    pub ram: Ram,
    pub facts: Arc<Facts>,
}

impl Host {
    pub fn run(self) {
        while let Some((disk, request)) = self.next() {
            assert!(
                !self.facts.is_quiescent(),
                "request in flight after quiescent: {request:?}"
            );
            let at = GuestAddress(request.address);
            self.ram.write_obj(ANSWER, at).unwrap();
            self.facts.in_flight(-1);
            point();
            disk.ended.lock().unwrap().push_back(request);
            if self.facts.fault != Fault::SilentHost {
                disk.bell.ring();
            }
        }
    }

    /// Any request that was begun, once there is one; none when the workers have stopped.
    fn next(&self) -> Option<(&Disk, Request)> {
        wait_until(|| {
            if self.facts.takes_late_write() {
                self.ram.write_obj(ANSWER, GuestAddress(0)).unwrap();
            }
            let first = below(self.disks.len() as u32) as usize;
            for at in 0..self.disks.len() {
                let disk = &self.disks[(first + at) % self.disks.len()];
                let mut begun = disk.begun.lock().unwrap();
                if !begun.is_empty() {
                    let at = below(begun.len() as u32) as usize;
                    let request = begun.remove(at).expect("it is one of them");
                    return Some(Some((&**disk, request)));
                }
            }
            self.facts.have_workers_stopped().then_some(None)
        })
    }
}

/// One worker's device.
pub struct Delayed {
    number: usize,
    disk: Arc<Disk>,
    facts: Arc<Facts>,
    chain: Chain,
    flying: usize,
    /// Ended, and not yet returned to the driver.
    returnable: Vec<Request>,
    version: u8,
}

/// The queues of each worker of a device.
pub const QUEUES: usize = 2;
const SIZE: u16 = 4;

impl Delayed {
    pub fn new(number: usize, disk: Arc<Disk>, facts: Arc<Facts>) -> Self {
        Delayed {
            number,
            disk,
            facts,
            chain: Chain::new(),
            flying: 0,
            returnable: Vec::new(),
            version: 0,
        }
    }

    fn take_ended(&mut self) {
        let mut ended = self.disk.ended.lock().unwrap();
        while let Some(request) = ended.pop_front() {
            self.flying -= 1;
            self.returnable.push(request);
        }
    }
}

impl Device for Delayed {
    const ID: u32 = 2;
    const FEATURES: &'static [(u64, &'static str)] = &[];
    const QUEUES: &'static [u16] = &[SIZE; QUEUES];
    const UNITS_MAY_WAIT: bool = false;
    /// What the configuration space shows from then on.
    type Update = u8;
    type State = u64;
    type Counters = ();

    fn queues_of_several(workers: usize) -> Option<&'static [u16]> {
        [SIZE; 3 * QUEUES].get(..workers * QUEUES).map(|_| {
            const ALL: &[u16] = &[SIZE; 3 * QUEUES];
            &ALL[..workers * QUEUES]
        })
    }

    fn features(&self) -> u64 {
        feature::COMMON
    }

    fn config(&self) -> ConfigSpace {
        ConfigSpace::new()
    }

    fn counters(&self) -> Arc<()> {
        Arc::new(())
    }

    fn add_counters((): &(), (): &()) {}

    fn read_counters((): &(), _: &WorkerCounters, _: &str, _: &mut Report) {}

    fn sources(&self) -> Vec<RawFd> {
        vec![self.disk.bell.as_raw_fd()]
    }

    fn activate(&mut self, _: u64) -> io::Result<()> {
        assert_eq!(self.flying, 0, "activated with a request in flight");
        Ok(())
    }

    fn process(
        &mut self,
        index: usize,
        queue: &mut Queue,
        ram: &Ram,
    ) -> Result<Progress, BrokenRing> {
        if self.complete(index, queue, ram)? == Progress::More {
            return Ok(Progress::More);
        }
        match queue.pop(ram, &mut self.chain)? {
            Popped::Empty => return Ok(Progress::Wait),
            Popped::Chain => {}
            Popped::Malformed(error) => panic!("{error:?}"),
        }
        let request = Request {
            queue: index,
            head: self.chain.head(),
            address: self.chain.writable()[0].addr.0,
        };
        self.flying += 1;
        self.facts.in_flight(1);
        self.disk.begun.lock().unwrap().push_back(request);
        rang();
        Ok(Progress::More)
    }

    fn in_flight(&self) -> usize {
        match self.facts.fault {
            Fault::ForgottenRequest => self.flying.saturating_sub(1),
            _ => self.flying,
        }
    }

    fn complete(
        &mut self,
        index: usize,
        queue: &mut Queue,
        ram: &Ram,
    ) -> Result<Progress, BrokenRing> {
        let Some(at) = self
            .returnable
            .iter()
            .position(|request| request.queue == index)
        else {
            return Ok(Progress::Wait);
        };
        let request = self.returnable.remove(at);
        queue.add_used(ram, request.head, 4)?;
        Ok(Progress::More)
    }

    fn backend(&mut self, source: usize) -> QueueSet {
        assert_eq!(source, 0);
        self.take_ended();
        let mut ready = QueueSet::NONE;
        for request in &self.returnable {
            ready.insert(QueueSet::one(request.queue));
        }
        ready
    }

    fn poll(&mut self) -> QueueSet {
        self.backend(0)
    }

    fn update(&mut self, version: u8) -> Updated {
        self.assert_idle("updated");
        self.version = version;
        let config = ConfigSpace::new().with(0, &[version]);
        Updated {
            config: (self.number == 0).then_some(config),
            ..Updated::default()
        }
    }

    fn state_buffer() -> u64 {
        0
    }

    fn settle(&mut self) -> io::Result<()> {
        self.assert_idle("paused");
        if self.facts.fault == Fault::LateWrite {
            self.facts.write_later();
        }
        Ok(())
    }

    fn save(&self, state: &mut u64) {
        self.assert_idle("saved");
        *state = u64::from(self.version);
    }

    fn reset(&mut self) {
        self.assert_idle("reset");
        self.returnable.clear();
    }
}

impl Delayed {
    fn assert_idle(&self, when: &str) {
        assert_eq!(self.flying, 0, "{when} with a request in flight");
    }
}
