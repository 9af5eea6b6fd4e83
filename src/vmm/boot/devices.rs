//! Devices in their slots: each made on the files thread, then given its address, its line and its
//! registers on the bus.

use std::sync::Arc;
use std::{io, mem};

use kvm_ioctls::IoEventAddress;
use vmm_sys_util::eventfd::EventFd;

use super::{Host, event};
use crate::arch::split::Lines;
use crate::arch::{Vm, layout};
use crate::bus::Registers;
use crate::error::{ActionError, Context};
use crate::memory::Memory;
use crate::seccomp::Category;
use crate::steps;
use crate::vcpu::Buses;
use crate::virtio::{self, DeviceState, POLL_DEFAULT_MICROS, PerWorker, Start, registers};
use crate::vmm::change::Replaced;
use crate::vmm::devices::{Backing, Devices, Entry, Listed, SavedDevices, StateOf, Visit};
use crate::wire::config::DeviceConfig;

/// A device that was built and waits for its thread.
pub(super) struct Attached {
    pub category: Category,
    /// For each of its threads, before its filter: returns the worker's loop.
    pub enter: PerWorker<Box<dyn FnOnce() -> Work + Send>>,
    /// For control: its handle takes its place in the list.
    pub note: Box<dyn FnOnce(&mut Devices) -> Replaced>,
}

/// What a device's thread does behind its filter.
pub(super) type Work = Box<dyn FnOnce()>;

/// Gives each device a slot, in order: address, interrupt line, registers on the bus.
pub(super) struct Attaching<'a> {
    pub host: &'a Host<'a>,
    pub vm: &'a Vm,
    pub lines: &'a Lines,
    pub memory: &'a Memory,
    pub buses: &'a mut Buses,
    pub attached: Vec<Attached>,
}

/// Makes a device. For the files thread: what it is made of may have to be asked for its size.
pub(super) type Build = Box<dyn FnOnce() -> Attach + Send>;
/// Attaches it, unless it could not be made.
pub(super) type Attach =
    Box<dyn FnOnce(&mut Attaching<'_>) -> Result<Attached, ActionError> + Send>;

/// How each device is made, in the order of slots.
#[derive(Default)]
pub(super) struct Building {
    builds: Vec<Build>,
    saved: Option<Saved>,
}

/// Devices as they were saved.
pub(super) struct Saved {
    pub devices: SavedDevices,
    /// Nanoseconds since.
    pub elapsed: u64,
}

impl Building {
    /// Devices that go on from what was saved; without that, new ones.
    pub(super) fn new(saved: Option<Saved>) -> Self {
        Building {
            builds: Vec::new(),
            saved,
        }
    }

    /// How each is made.
    ///
    /// # Errors
    /// When a saved device has no place.
    pub(super) fn builds(self) -> Result<Vec<Build>, ActionError> {
        let left = self
            .saved
            .as_ref()
            .and_then(|saved| saved.devices.ids().next());
        match left {
            Some(id) => Err(ActionError(format!(
                "The device `{id}` was saved, and is not configured"
            ))),
            None => Ok(self.builds),
        }
    }

    /// What the device `id` of kind `K` begins with, and how many nanoseconds ago that was saved.
    fn state<K: Listed>(
        &mut self,
        id: &str,
    ) -> Result<(Start, PerWorker<StateOf<K>>, u64), ActionError> {
        let Some(saved) = &mut self.saved else {
            return Ok((Start::default(), PerWorker::default(), 0));
        };
        let list = K::saved(&mut saved.devices);
        let at = list.iter().position(|device| device.id == id);
        let at = at.ok_or_else(|| {
            ActionError(format!(
                "The device `{id}` is configured, and was not saved"
            ))
        })?;
        let DeviceState {
            registers,
            worker,
            device,
            others,
        } = list.remove(at).state;
        let others = others.into_iter().map(|share| (share.worker, share.device));
        let saved_workers = PerWorker {
            first: (worker, device),
            others: others.collect(),
        };
        let (workers, devices) = saved_workers.unzip();
        Ok((Start::saved(registers, workers), devices, saved.elapsed))
    }
}

impl Visit for Building {
    fn device<K: Listed>(&mut self, entry: &Entry<K>) -> Result<(), ActionError> {
        let config = entry.config.clone();
        let what = format!("Making the device `{}` failed", config.id());
        let opened = match &entry.backing {
            Backing::Opened(opened) => K::copy(opened),
            Backing::Running(_) => Err(io::Error::other("it runs already")),
        };
        let opened = opened.context(&what)?;
        let (start, state, elapsed) = self.state::<K>(config.id())?;
        self.builds.push(Box::new(move || {
            steps::may_wait(format_args!("making the device `{}`", config.id()));
            let devices = K::build(&config, opened, &state, elapsed);
            Box::new(move |attaching: &mut Attaching<'_>| {
                let attached =
                    devices.and_then(|devices| attaching.attach::<K>(&config, devices, &start));
                attached.context(what)
            })
        }));
        Ok(())
    }
}

impl Attaching<'_> {
    fn attach<K: Listed>(
        &mut self,
        config: &K::Config,
        devices: PerWorker<K::Device>,
        start: &Start,
    ) -> io::Result<Attached> {
        let id = config.id().to_owned();
        let irqfd = event()?;
        let for_kvm = irqfd.try_clone()?;
        let events = self.host.events;
        let (answers, failures) = (events.outbox(), events.outbox());
        let ram = self.memory.ram();
        let (registers, workers, handle) =
            virtio::attach_all(devices, &id, start, ram, irqfd, &answers, &failures)?;
        self.place(registers, &for_kvm)?;
        let filtered = self.host.category(K::CATEGORY).is_some();
        let micros = K::poll_us(config).unwrap_or(POLL_DEFAULT_MICROS);
        let enter = workers.map(|mut worker| {
            worker.poll_up_to(micros);
            Box::new(move || {
                worker.enter_thread(filtered);
                // No filter has the calls for taking the worker apart.
                Box::new(move || mem::forget(worker.run())) as Work
            }) as Box<dyn FnOnce() -> Work + Send>
        });
        Ok(Attached {
            category: K::CATEGORY,
            enter,
            note: Box::new(move |devices| {
                let list = &mut K::list(devices).0;
                let entry = list.iter_mut().find(|entry| entry.config.id() == id);
                Box::new(
                    entry.map(|entry| mem::replace(&mut entry.backing, Backing::Running(handle))),
                )
            }),
        })
    }

    /// Puts `registers` into the next slot: on the bus, with its kicks and its line wired to KVM.
    fn place(&mut self, registers: Arc<virtio::Registers>, irqfd: &EventFd) -> io::Result<()> {
        // `check_start` counted the devices.
        let (address, gsi) = layout::virtio_device(self.attached.len())
            .ok_or_else(|| io::Error::other("no slot left"))?;
        self.lines.connect(irqfd, gsi)?;
        for (queue, kick) in (0u32..).zip(registers.kicks()) {
            let at = IoEventAddress::Mmio(address + registers::QUEUE_NOTIFY);
            self.vm.register_ioevent(kick, &at, queue)?;
        }
        let registers: Arc<dyn Registers> = registers;
        let bus = &mut self.buses.memory;
        bus.insert(address, layout::VIRTIO_MMIO_SIZE, registers)
            .map_err(io::Error::other)
    }
}
