//! From what was asked for to a built machine: opens KVM, makes the threads, wires the
//! descriptors. One function, one paragraph a step.
//!
//! The order is the order that KVM is fast in: memory slots before the interrupt controllers, those
//! before the vCPUs. Threads are made first, to wake up beside the rest of the work; they get theirs
//! last. Whatever fails, nothing is left but what was configured: the start can be tried again.

use std::error::Error;
use std::ffi::c_ulong;
use std::fmt;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use kvm_bindings::CpuId;
use kvm_ioctls::{IoEventAddress, Kvm};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::devices;
use super::machine::Machine;
use super::opened::{OpenError, Opened};
use super::threads::{self, Berth, Muster, SpawnError, berth};
use super::{Event, Settings};
use crate::arch::boot::{self, BootError, CommandLineError, Root};
use crate::arch::boot_timer::{self, BootTimer};
use crate::arch::cpuid::NoSuchLeaf;
use crate::arch::i8042::I8042;
use crate::arch::vcpu::VcpuError;
use crate::arch::{self, Kernel, KernelError, Vm, VmError, cpuid, layout};
use crate::bus::{Overlap, Registers};
use crate::config::cpu::{CpuConfig, KvmCapability, MsrModifier};
use crate::config::{Config, ConfigError, Draft, HugePages};
use crate::inbox::{Sender, inbox};
use crate::memory::{Memory, MemoryError, Pages};
use crate::seccomp::Category;
use crate::serial::{self, Streams};
use crate::sys::{fd, terminal};
use crate::timeline::{Moment, Timeline};
use crate::vcpu::{Buses, Vcpu, VcpuHandle, VcpuLink};
use crate::virtio::{self, Device, DeviceHandle, Worker, registers};
use crate::{error, info, log, warn};

/// How long the guest waits for the lines about its start to be written.
const LOG_PATIENCE: Duration = Duration::from_millis(50);
/// Messages that may wait for the serial thread.
const SERIAL_MESSAGES: usize = 4;
const _: () = assert!(registers::LENGTH == layout::VIRTIO_MMIO_SIZE);

/// Why a VM could not be started.
#[derive(Debug)]
pub enum StartError {
    /// What was asked for does not fit together.
    Config(ConfigError),
    /// A file changed since it was named.
    File(OpenError),
    /// KVM itself.
    Kvm(kvm_ioctls::Error),
    /// What the host's processor offers guests.
    Cpuid(kvm_ioctls::Error),
    /// The CPU configuration asks for what KVM does not have.
    Mask(NoSuchLeaf),
    /// A KVM capability, by number, that the CPU configuration asks for and KVM does not have.
    Capability(u32),
    /// The virtual machine.
    Vm(VmError),
    /// Guest memory.
    Memory(MemoryError),
    /// The kernel's file.
    Kernel(KernelError),
    /// The command line.
    CommandLine(CommandLineError),
    /// Kernel, initrd or tables.
    Load(BootError),
    /// A vCPU's registers.
    Vcpu(VcpuError),
    /// A thread.
    Thread(SpawnError),
    /// Two register blocks at one place.
    Bus(Overlap),
    /// A device, by name.
    Device(String, io::Error),
    /// A descriptor, or what KVM does with one.
    Descriptor(&'static str, io::Error),
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StartError::Config(_) => f.write_str("The configuration can not be started"),
            StartError::File(_) => f.write_str("A file can not be used"),
            StartError::Kvm(_) => f.write_str(
                "Opening /dev/kvm failed (is the module loaded, and may this user open it?)",
            ),
            StartError::Cpuid(_) => f.write_str("KVM does not tell what guests may see of the CPU"),
            StartError::Mask(_) => f.write_str("The CPU can not be as it was asked for"),
            StartError::Capability(number) => write!(
                f,
                "The CPU can not be as it was asked for: KVM lacks the capability {number}"
            ),
            StartError::Vm(_) => f.write_str("Making the virtual machine failed"),
            StartError::Memory(_) => f.write_str("Making guest memory failed"),
            StartError::Kernel(_) => f.write_str("The kernel can not be booted"),
            StartError::CommandLine(_) => f.write_str("The kernel command line does not fit"),
            StartError::Load(_) => f.write_str("Loading the guest failed"),
            StartError::Vcpu(_) => f.write_str("Setting up a vCPU failed"),
            StartError::Thread(_) => f.write_str("The microVM lacks a thread"),
            StartError::Bus(_) => f.write_str("Placing a device failed"),
            StartError::Device(name, _) => write!(f, "Making the device `{name}` failed"),
            StartError::Descriptor(what, _) => write!(f, "Making {what} failed"),
        }
    }
}

impl Error for StartError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            StartError::Config(e) => Some(e),
            StartError::File(e) => Some(e),
            StartError::Kvm(e) | StartError::Cpuid(e) => Some(e),
            StartError::Mask(e) => Some(e),
            StartError::Capability(_) => None,
            StartError::Vm(e) => Some(e),
            StartError::Memory(e) => Some(e),
            StartError::Kernel(e) => Some(e),
            StartError::CommandLine(e) => Some(e),
            StartError::Load(e) => Some(e),
            StartError::Vcpu(e) => Some(e),
            StartError::Thread(e) => Some(e),
            StartError::Bus(e) => Some(e),
            StartError::Device(_, e) | StartError::Descriptor(_, e) => Some(e),
        }
    }
}

/// Errors whose variant says enough.
macro_rules! from {
    ($($cause:ty => $variant:ident),+ $(,)?) => {
        $(impl From<$cause> for StartError {
            fn from(cause: $cause) -> Self {
                StartError::$variant(cause)
            }
        })+
    };
}

from! {
    NoSuchLeaf => Mask, ConfigError => Config, OpenError => File, VmError => Vm, MemoryError => Memory,
    KernelError => Kernel, CommandLineError => CommandLine, BootError => Load,
    VcpuError => Vcpu, SpawnError => Thread, Overlap => Bus,
}

/// What a start takes from control.
#[derive(Clone, Copy)]
pub struct Host<'a> {
    /// What the command line says.
    pub settings: &'a Settings,
    /// Control's inbox.
    pub events: &'a Sender<Event>,
    /// When what happened.
    pub timeline: &'a Timeline,
    /// /dev/kvm, if it was handed in.
    pub kvm: Option<&'a Arc<Kvm>>,
    /// Said in the log once the guest is about to run.
    pub word: Option<&'static str>,
}

impl Host<'_> {
    fn category(&self, category: Category) -> Option<Category> {
        self.settings.seccomp.then_some(category)
    }
}

/// Builds the machine that `draft` asks for from the files in `opened`. Its vCPUs are paused.
///
/// # Errors
/// [`StartError`]; nothing of the attempt is left then.
pub fn start(host: &Host<'_>, draft: &Draft, opened: &Opened) -> Result<Machine, StartError> {
    let config = draft.check()?;
    let kvm = match host.kvm {
        Some(handed_in) => Arc::clone(handed_in),
        None => Arc::new(Kvm::new().map_err(StartError::Kvm)?),
    };
    let berths = Berths::make(&config)?;
    // Half a millisecond that needs no virtual machine: the serial thread asks meanwhile.
    let for_asking = Arc::clone(&kvm);
    let supported = berths.serial.ask(move || cpuid::supported(&for_asking));

    // The machine: memory first, then KVM's part of it.
    let pages = match config.machine.huge_pages {
        HugePages::None => Pages::Ordinary,
        HugePages::Transparent => Pages::Transparent,
        HugePages::TwoMib => Pages::TwoMib,
    };
    let mut memory = Memory::new(config.machine.mem_size_mib, pages)?;
    let vm = Arc::new(Vm::new(&kvm, &memory, config.machine.track_dirty_pages)?);
    host.timeline.mark_again(Moment::MemoryMade);

    // The vCPUs, each made by the thread that will run it, beside all that follows.
    let mut supported = supported
        .recv()
        .unwrap_or_else(|_| cpuid::supported(&kvm))
        .map_err(StartError::Cpuid)?;
    if let Some(cpu) = &config.cpu {
        check_capabilities(&kvm, cpu)?;
        cpuid::mask(&mut supported, &cpu.cpuid_modifiers)?;
    }
    let vcpus = begin_vcpus(&berths.vcpus, &vm, &config, Arc::new(supported));

    // What the guest starts with: kernel, initrd, command line, tables.
    let entry = load(host, &mut memory, &config, opened)?;
    host.timeline.mark_again(Moment::KernelLoaded);

    // What the guest can touch: registers on two buses.
    let mut buses = Buses {
        ram: memory.regions().collect(),
        ..Buses::default()
    };
    let mut slots = Slots { vm: &vm, next: 0 };
    let disks = config.drives.iter();
    let disks = disks.map(|drive| (drive.drive_id.as_str(), devices::block(drive, opened)));
    let blocks = attach_all(host, &memory, disks, &mut buses, &mut slots)?;
    let cards = config.networks.iter();
    let cards = cards.map(|network| (network.iface_id.as_str(), devices::net(network, opened)));
    let nets = attach_all(host, &memory, cards, &mut buses, &mut slots)?;
    let (console, console_sender, log_writer) =
        make_console(host, &vm, &config, opened, &mut buses)?;
    let keyboard = Arc::new(I8042::new(line(&vm, layout::I8042_GSI)?));
    buses
        .ports
        .insert(layout::I8042_PORT, layout::I8042_PORTS, keyboard.clone())?;
    if host.settings.boot_timer {
        place_boot_timer(host, &mut buses)?;
    }

    // The first vCPU starts at the kernel's entry; the guest wakes the others.
    let vcpus = finish_vcpus(host, vcpus, &entry, &Arc::new(buses))?;

    // From here on nothing fails: every thread, this one included, gets its work and its filter.
    let muster = Muster::of(berths.count());
    let mut vcpu_handles = Vec::with_capacity(vcpus.len());
    for ((vcpu, seat), berth) in vcpus.into_iter().zip(berths.vcpus) {
        let thread = berth.occupy(host.category(Category::Vcpu), &muster, move || vcpu.run());
        vcpu_handles.push(VcpuHandle::new(seat, thread));
    }
    let console_counters = console.counters();
    let blocks = occupy(host, Category::Block, &muster, blocks, berths.blocks);
    let nets = occupy(host, Category::Net, &muster, nets, berths.nets);
    let _ = berths
        .serial
        .occupy(host.category(Category::Serial), &muster, move || {
            if let Err(cause) = console.run() {
                error!("The console stopped: {cause}");
            }
        });
    // The filter lets the terminal be given back, not taken.
    if let Err(error) = terminal::make_raw() {
        warn!("The terminal stays as it is: {error}");
    }
    threads::filter_or_end(host.category(Category::Control));
    // Written before the guest can write anything: both may go to one place.
    info!("The microVM is running.");
    if let Some(word) = host.word {
        info!("{word}");
    }
    muster.wait();
    log::flush(LOG_PATIENCE);

    Ok(Machine {
        draft: Box::new(draft.clone()),
        vcpus: vcpu_handles,
        blocks,
        nets,
        console: console_sender,
        console_counters,
        _console_socket: opened.console_socket.clone(),
        _log_writer: log_writer,
        keyboard,
        _vm: vm,
        memory,
    })
}

/// The threads of a machine, made but idle.
struct Berths {
    vcpus: Vec<Berth>,
    blocks: Vec<Berth>,
    nets: Vec<Berth>,
    serial: Berth,
}

impl Berths {
    fn make(config: &Config) -> Result<Self, SpawnError> {
        // Tools pin vCPUs by these names.
        Ok(Berths {
            vcpus: (0..config.machine.vcpu_count)
                .map(|index| berth(format!("fc_vcpu {index}")))
                .collect::<Result<_, _>>()?,
            blocks: config
                .drives
                .iter()
                .map(|drive| berth(format!("block {}", drive.drive_id)))
                .collect::<Result<_, _>>()?,
            nets: config
                .networks
                .iter()
                .map(|network| berth(format!("net {}", network.iface_id)))
                .collect::<Result<_, _>>()?,
            serial: berth("serial".into())?,
        })
    }

    fn count(&self) -> usize {
        self.vcpus.len() + self.blocks.len() + self.nets.len() + 1
    }
}

/// Device slots: addresses and interrupt lines, handed out in order.
struct Slots<'a> {
    vm: &'a Vm,
    next: usize,
}

impl Slots<'_> {
    /// Puts `registers` into the next slot: on the bus, with its kicks and its line wired to KVM.
    fn place(
        &mut self,
        buses: &mut Buses,
        name: &str,
        registers: Arc<virtio::Registers>,
        irqfd: &EventFd,
    ) -> Result<(), StartError> {
        let fail = |cause: kvm_ioctls::Error| StartError::Device(name.to_owned(), cause.into());
        // `Draft::check` counted the devices.
        let (address, gsi) = layout::virtio_device(self.next)
            .ok_or_else(|| StartError::Device(name.to_owned(), io::Error::other("no slot left")))?;
        self.next += 1;
        self.vm.register_irqfd(irqfd, gsi).map_err(fail)?;
        for (queue, kick) in (0u32..).zip(registers.kicks()) {
            let at = IoEventAddress::Mmio(address + registers::QUEUE_NOTIFY);
            self.vm.register_ioevent(kick, &at, queue).map_err(fail)?;
        }
        let registers: Arc<dyn Registers> = registers;
        buses
            .memory
            .insert(address, layout::VIRTIO_MMIO_SIZE, registers)?;
        Ok(())
    }
}

fn load(
    host: &Host<'_>,
    memory: &mut Memory,
    config: &Config,
    opened: &Opened,
) -> Result<boot::Entry, StartError> {
    let image = opened.kernel.as_ref().ok_or(ConfigError::NoBootSource)?;
    image.check_unchanged()?;
    let kernel = Kernel::read(&image.file, &image.name)?;
    let initrd = match &opened.initrd {
        Some(initrd) => {
            initrd.check_unchanged()?;
            Some((&initrd.file, initrd.name.as_str()))
        }
        None => None,
    };
    let root = config
        .drives
        .first()
        .filter(|d| d.is_root_device)
        .map(|drive| Root {
            partuuid: drive.partuuid.as_deref(),
            read_only: drive.read_only(),
        });
    let devices: Vec<(u64, u32)> = (0..config.drives.len() + config.networks.len())
        .filter_map(layout::virtio_device)
        .collect();
    let command_line = boot::command_line(&config.boot_args, root, &devices)?;
    let mut seed = [0; 32];
    fd::random(&mut seed).map_err(|e| StartError::Descriptor("the guest's random seed", e))?;
    Ok(boot::load(
        memory,
        &kernel,
        initrd,
        &command_line,
        config.machine.vcpu_count,
        host.settings.protocol,
        &seed,
    )?)
}

type Attached<D> = Vec<(Worker<D>, DeviceHandle<D>)>;

/// Attaches each device of `made`, in order, by its name.
fn attach_all<'a, D: Device>(
    host: &Host<'_>,
    memory: &Memory,
    made: impl Iterator<Item = (&'a str, io::Result<D>)>,
    buses: &mut Buses,
    slots: &mut Slots<'_>,
) -> Result<Attached<D>, StartError> {
    made.map(|(name, device)| {
        let device = device.map_err(|e| StartError::Device(name.to_owned(), e))?;
        attach(host, memory, device, name, buses, slots)
    })
    .collect()
}

fn attach<D: Device>(
    host: &Host<'_>,
    memory: &Memory,
    device: D,
    name: &str,
    buses: &mut Buses,
    slots: &mut Slots<'_>,
) -> Result<(Worker<D>, DeviceHandle<D>), StartError> {
    let fail = |cause| StartError::Device(name.to_owned(), cause);
    let irqfd = event().map_err(fail)?;
    let for_kvm = irqfd.try_clone().map_err(fail)?;
    let (registers, worker, handle) = virtio::attach(
        device,
        name,
        memory.ram().clone(),
        irqfd,
        host.events.outbox(),
        host.events.outbox(),
    )
    .map_err(fail)?;
    slots.place(buses, name, registers, &for_kvm)?;
    Ok((worker, handle))
}

fn occupy<D: Device>(
    host: &Host<'_>,
    category: Category,
    muster: &Arc<Muster>,
    devices: Attached<D>,
    berths: Vec<Berth>,
) -> Vec<DeviceHandle<D>> {
    let mut handles = Vec::with_capacity(devices.len());
    for ((worker, handle), berth) in devices.into_iter().zip(berths) {
        let _ = berth.occupy(host.category(category), muster, move || worker.run());
        handles.push(handle);
    }
    handles
}

/// The UART on its ports, the console behind it, and the pipe that log lines will take.
fn make_console(
    host: &Host<'_>,
    vm: &Vm,
    config: &Config,
    opened: &Opened,
    buses: &mut Buses,
) -> Result<(serial::Console, Sender<serial::SerialMessage>, File), StartError> {
    let fail = |cause| StartError::Descriptor("the console", cause);
    let (log_from, log_writer) = fd::pipe().map_err(fail)?;
    let (input, output) = match &opened.console {
        // A console that goes to a file has nobody who types.
        Some(file) => (None, file.try_clone().map_err(fail)?),
        None => (
            fd::duplicate(fd::STDIN).ok(),
            fd::duplicate(fd::STDOUT).map_err(fail)?,
        ),
    };
    let socket = match &opened.console_socket {
        Some(socket) => Some(socket.listener.try_clone().map_err(fail)?),
        None => None,
    };
    let streams = Streams {
        input,
        output,
        limit: config.serial.rate_limiter.and_then(devices::bucket),
        socket,
        log_from,
        log_to: fd::duplicate(fd::STDOUT).map_err(fail)?,
    };
    let (messages, inbox) = inbox(SERIAL_MESSAGES).map_err(fail)?;
    let line = line(vm, layout::SERIAL_GSI)?;
    let (uart, console) =
        serial::console(line, streams, inbox, host.events.outbox()).map_err(fail)?;
    buses
        .ports
        .insert(layout::SERIAL_PORT, serial::PORTS, uart)?;
    Ok((console, messages, log_writer))
}

/// The device that tells how long the guest took to come up, at its address and at its port.
fn place_boot_timer(host: &Host<'_>, buses: &mut Buses) -> Result<(), StartError> {
    let timer = Arc::new(BootTimer::new(host.events.outbox()));
    buses
        .memory
        .insert(layout::BOOT_TIMER, boot_timer::LEN, timer.clone())?;
    buses.ports.insert(layout::BOOT_TIMER_PORT, 1, timer)?;
    Ok(())
}

type Seats = Vec<(Vcpu, VcpuLink)>;

/// Whether KVM has what the CPU configuration asks it to have.
fn check_capabilities(kvm: &Kvm, cpu: &CpuConfig) -> Result<(), StartError> {
    for capability in &cpu.kvm_capabilities {
        if let KvmCapability::Add(number) = *capability
            && kvm.check_extension_raw(c_ulong::from(number)) <= 0
        {
            return Err(StartError::Capability(number));
        }
    }
    Ok(())
}

/// A vCPU that its thread is making.
type Making = Receiver<Result<arch::Vcpu, StartError>>;

/// Lets the thread of each vCPU make it.
fn begin_vcpus(
    berths: &[Berth],
    vm: &Arc<Vm>,
    config: &Config,
    supported: Arc<CpuId>,
) -> Vec<Making> {
    let (count, smt) = (config.machine.vcpu_count, config.machine.smt);
    let masks = config.cpu.as_ref().map(|cpu| &*cpu.msr_modifiers);
    let masks: Arc<[MsrModifier]> = Arc::from(masks.unwrap_or_default());
    (0u8..)
        .zip(berths)
        .map(|(index, berth)| {
            let (vm, supported) = (Arc::clone(vm), Arc::clone(&supported));
            let masks = Arc::clone(&masks);
            berth.ask(move || {
                let vcpu = vm.create_vcpu(index)?;
                arch::vcpu::prepare(&vcpu, &cpuid::table(&supported, index, count, smt))?;
                arch::vcpu::mask_msrs(&vcpu, &masks)?;
                Ok(vcpu)
            })
        })
        .collect()
}

/// Collects the vCPUs, in order, and puts the first before the guest's first instruction.
fn finish_vcpus(
    host: &Host<'_>,
    making: Vec<Making>,
    entry: &boot::Entry,
    buses: &Arc<Buses>,
) -> Result<Seats, StartError> {
    (0u8..)
        .zip(making)
        .map(|(index, making)| {
            let gone = |_| io::Error::other("its thread is gone");
            let fd = making
                .recv()
                .map_err(|e| StartError::Descriptor("a vCPU", gone(e)))??;
            if index == 0 {
                arch::vcpu::enter(&fd, entry)?;
            }
            Ok(Vcpu::new(
                index,
                fd,
                Arc::clone(buses),
                host.events.outbox(),
                host.timeline.clone(),
            ))
        })
        .collect()
}

/// An interrupt line: an eventfd that raises `gsi`.
fn line(vm: &Vm, gsi: u32) -> Result<EventFd, StartError> {
    let fail = |cause| StartError::Descriptor("an interrupt line", cause);
    let line = event().map_err(fail)?;
    vm.register_irqfd(&line, gsi).map_err(|e| fail(e.into()))?;
    Ok(line)
}

fn event() -> io::Result<EventFd> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
}
