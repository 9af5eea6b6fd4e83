//! One run: all that there is, and what all of it know.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};

use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::control::{Client, Control, Event};
use super::cpu::{Cpu, Power, Thread};
use super::device::{Delayed, Disk, Host};
use super::guest::{Driver, Meddler};
use crate::bus;
use crate::inbox::inbox;
use crate::memory::Ram;
use crate::sys::sync::scheduled::{below, one_in, rang, spawn, thread_of};
use crate::vcpu::Buses;
use crate::vcpu::testing::{TestVcpu, VcpuThread};
use crate::virtio::registers::{LENGTH, RegistersState};
use crate::virtio::worker::{WorkerState, attach_all};
use crate::virtio::{PerWorker, Start};

/// Where the device's registers are.
pub const DEVICE: u64 = 0xd000_0000;
/// A write here ends the machine.
pub const POWER: u64 = 0xe000_0000;
/// All of guest memory.
pub const MEMORY: u64 = 0x2_0000;

/// How many of each there are.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub workers: usize,
    pub clients: usize,
    /// The workers poll before they sleep.
    pub polls: bool,
}

impl Shape {
    pub const ONE_WORKER: Shape = Shape {
        workers: 1,
        clients: 2,
        polls: false,
    };
    pub const TWO_WORKERS: Shape = Shape {
        workers: 2,
        clients: 2,
        polls: false,
    };
    pub const POLLING: Shape = Shape {
        workers: 1,
        clients: 1,
        polls: true,
    };
}

/// What is planted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    None,
    /// The device says that one request less is in flight than is.
    ForgottenRequest,
    /// The host does not tell that a request has ended.
    SilentHost,
    /// Each answer of a worker's comes twice.
    SecondAnswer,
    /// Signals do not reach vCPUs.
    NoKick,
    /// Every third pulse of the interrupt line is lost.
    LostInterrupt,
    /// Guest memory is written after a pause.
    LateWrite,
}

#[derive(Debug)]
/// What every thread knows. None of it is a point: what is checked is no part of what runs.
pub struct Facts {
    pub fault: Fault,
    quiescent: AtomicBool,
    ending: AtomicBool,
    in_flight: AtomicI64,
    workers_stopped: AtomicBool,
    over: AtomicBool,
    writes_later: AtomicBool,
    /// Resets of the device by a vCPU that does not drive it.
    meddlings: AtomicU64,
}

impl Facts {
    fn new(fault: Fault) -> Arc<Self> {
        Arc::new(Facts {
            fault,
            quiescent: AtomicBool::new(false),
            ending: AtomicBool::new(false),
            in_flight: AtomicI64::new(0),
            workers_stopped: AtomicBool::new(false),
            over: AtomicBool::new(false),
            writes_later: AtomicBool::new(false),
            meddlings: AtomicU64::new(0),
        })
    }

    /// No guest code runs, and nothing writes to guest memory.
    pub fn is_quiescent(&self) -> bool {
        self.quiescent.load(Ordering::SeqCst)
    }

    pub fn set_quiescent(&self, quiescent: bool) {
        self.quiescent.store(quiescent, Ordering::SeqCst);
    }

    /// Control answers no client any more.
    pub fn end(&self) {
        self.ending.store(true, Ordering::SeqCst);
    }

    pub fn is_ending(&self) -> bool {
        self.ending.load(Ordering::SeqCst)
    }

    /// As many more requests are in flight.
    pub fn in_flight(&self, more: i64) {
        self.in_flight.fetch_add(more, Ordering::SeqCst);
    }

    pub fn all_in_flight(&self) -> i64 {
        self.in_flight.load(Ordering::SeqCst)
    }

    /// No vCPU runs any more.
    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    pub fn have_workers_stopped(&self) -> bool {
        self.workers_stopped.load(Ordering::SeqCst)
    }

    pub fn write_later(&self) {
        self.writes_later.store(true, Ordering::SeqCst);
    }

    /// Whether it is time for the write of [`Fault::LateWrite`].
    pub fn takes_late_write(&self) -> bool {
        self.is_quiescent() && self.writes_later.swap(false, Ordering::SeqCst)
    }

    pub fn meddle(&self) {
        self.meddlings.fetch_add(1, Ordering::SeqCst);
    }

    pub fn meddlings(&self) -> u64 {
        self.meddlings.load(Ordering::SeqCst)
    }
}

thread_local! {
    static NOW: Cell<u64> = const { Cell::new(0) };
}

/// A clock that goes on by a microsecond with each look.
fn clock() -> u64 {
    NOW.set(NOW.get() + 1000);
    NOW.get()
}

pub struct World;

impl World {
    /// The first thread of a run: makes all others, and waits for them.
    pub fn run(shape: Shape, fault: Fault) {
        NOW.set(0);
        let facts = Facts::new(fault);
        let ram = Ram::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap();
        let (sender, events) = inbox::<Event>(64).unwrap();
        let disks: Vec<_> = (0..shape.workers).map(|_| Disk::new()).collect();
        let devices = PerWorker::try_make(shape.workers, |number| {
            let disk = Arc::clone(&disks[number]);
            Ok::<_, ()>(Delayed::new(number, disk, Arc::clone(&facts)))
        });
        // A guest that starts runs; one that is restored stands still.
        let is_restored = one_in(2);
        let start = match is_restored {
            true => {
                let idle = |_| Ok::<_, ()>(WorkerState::default());
                let idle = PerWorker::try_make(shape.workers, idle).unwrap();
                Start::saved(RegistersState::default(), idle)
            }
            false => Start::default(),
        };
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let irqfd = line.try_clone().unwrap();
        let (registers, workers, handle) = attach_all(
            devices.unwrap(),
            "disk",
            &start,
            &ram,
            irqfd,
            &sender.outbox(),
            &sender.outbox(),
        )
        .unwrap();

        let mut threads = Vec::new();
        for (number, mut worker) in workers.into_all().enumerate() {
            if shape.polls {
                worker.poll_by(20, clock);
            }
            threads.push(spawn(&format!("worker {number}"), move || {
                drop(worker.run())
            }));
        }
        let host = Host {
            disks,
            ram: ram.clone(),
            facts: Arc::clone(&facts),
        };
        let host = spawn("host", move || host.run());

        let mut buses = Buses::default();
        let block: Arc<dyn bus::Registers> = registers.clone();
        buses.memory.insert(DEVICE, LENGTH, block).unwrap();
        buses.memory.insert(POWER, 4, Arc::new(Power)).unwrap();
        let buses = Arc::new(buses);
        let mut vcpus = Vec::new();
        let mut vcpu_threads = Vec::new();
        let mut guests = Vec::new();
        for index in 0..2 {
            let (vcpu, handle) = TestVcpu::new(index, Arc::clone(&buses), sender.outbox());
            let cpu = Cpu::new(Arc::clone(&facts));
            let processor = Arc::clone(&cpu);
            let thread = spawn(&format!("vcpu {index}"), move || vcpu.run(&*processor));
            let signalled = Thread::new(thread_of(&thread), Arc::clone(&cpu));
            vcpu_threads.push(thread);
            vcpus.push((handle, signalled));
            let (ram, registers) = (ram.clone(), Arc::clone(&registers));
            let line = line.try_clone().unwrap();
            let facts = Arc::clone(&facts);
            let workers = shape.workers;
            guests.push(spawn(&format!("guest {index}"), move || {
                Cpu::execute(|| match index {
                    0 => Driver::new(cpu, &ram, registers, line, facts, workers).run(),
                    _ => Meddler::new(cpu, facts).run(),
                });
            }));
        }

        let control = Control::new(
            events,
            vcpus,
            handle,
            ram,
            Arc::clone(&facts),
            shape.workers,
            is_restored,
        );
        let control = spawn("control", move || control.run());
        let clients = (0..shape.clients).map(|number| {
            let client = Client::new(number, sender.clone(), Arc::clone(&facts));
            spawn(&format!("client {number}"), move || {
                client.run(2 + below(4))
            })
        });
        let clients: Vec<_> = clients.collect();
        let mut answers = Vec::new();
        for client in clients {
            answers.extend(client.join().unwrap());
        }
        // So that the guest comes to its end.
        answers.extend(Client::new(shape.clients, sender, Arc::clone(&facts)).resume());
        let control = control.join().unwrap();
        for thread in threads {
            thread.join().unwrap();
        }
        facts.workers_stopped.store(true, Ordering::SeqCst);
        rang();
        host.join().unwrap();
        control.check(&answers);
        // Processes end with control; here its vCPUs see that it is gone.
        for (handle, thread) in control.into_vcpus() {
            drop(handle);
            thread.signal();
            thread.unpark();
        }
        for thread in vcpu_threads {
            thread.join().unwrap();
        }
        facts.over.store(true, Ordering::SeqCst);
        rang();
        for guest in guests {
            guest.join().unwrap();
        }
    }
}
