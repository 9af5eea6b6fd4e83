//! From what was asked for to a built machine: opens KVM, makes the threads, wires the
//! descriptors. One function, one paragraph a step.
//!
//! The order is the order that KVM is fast in: memory slots before the interrupt controllers, those
//! before the vCPUs. Threads are made first, to wake up beside the rest of the work; they get their work
//! last. Whatever fails, nothing is left but what was configured: the start can be tried again.

mod devices;
mod guest;
mod origin;
mod vcpus;

use std::cell::OnceCell;
use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Duration;
use std::{io, mem};

use kvm_bindings::CpuId;
use kvm_ioctls::{Kvm, VmFd};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use self::devices::{Attach, Attaching, Building, Saved};
use self::origin::{Begins, boots, goes_on};
pub use self::origin::{Origin, Record, Restored, pages};
use self::vcpus::{Making, SavedVcpus, StartState, begin_vcpus, finish_vcpus};
use super::change::Replaced;
use super::configuration::{Configuration, Console};
use super::cpu;
use super::devices::bucket;
use super::machine::Machine;
use super::{Event, Settings};
use crate::arch::boot;
use crate::arch::boot_timer::{self, BootTimer};
use crate::arch::cmos::Cmos;
use crate::arch::i8042::I8042;
use crate::arch::power::{self, Power};
use crate::arch::split::Lines;
use crate::arch::vm::state::{ClockAfterRestore, VmState};
use crate::arch::{self, Vm, cpuid, generation, layout};
use crate::bus::Overlap;
use crate::error::{ActionError, Context};
use crate::inbox::{Sender, inbox};
use crate::memory::Memory;
use crate::memory::lazy::Handler;
use crate::seccomp::Category;
use crate::serial::{self, SerialPort, Streams, UartState};
use crate::sys::{fd, terminal};
use crate::threads::{self, ParkedThread, ReadyLatch, parked};
use crate::timeline::{Moment, Timeline};
use crate::vcpu::{Buses, VcpuHandle};
use crate::virtio::registers;
use crate::{error, info, log, warn};

/// How long the guest waits for the lines about its start to be written.
const LOG_PATIENCE: Duration = Duration::from_millis(50);
/// Messages that may wait for the serial thread.
const SERIAL_MESSAGES: usize = 4;
const _: () = assert!(registers::LENGTH == layout::VIRTIO_MMIO_SIZE);

/// What a start takes from control.
#[derive(Clone, Copy)]
pub struct Host<'a> {
    /// What the command line says.
    pub settings: &'a Settings,
    /// Control's inbox.
    pub events: &'a Sender<Event>,
    /// When what happened.
    pub timeline: &'a Timeline,
    /// A line for the log once the guest is about to run.
    pub line: Option<&'static str>,
    /// Whether the guest can say that it has booted.
    pub has_boot_timer: bool,
}

impl Host<'_> {
    pub(super) fn category(&self, category: Category) -> Option<Category> {
        self.settings.seccomp.then_some(category)
    }
}

/// What of a start needs no configuration: it can be made while that is read.
pub struct Prepared {
    kvm: Arc<Kvm>,
    vm: VmFd,
    serial: ParkedThread,
    /// What the guest's CPU may be, which the serial thread asks meanwhile: it takes longest.
    supported: Receiver<Result<CpuId, kvm_ioctls::Error>>,
}

impl fmt::Debug for Prepared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Prepared")
    }
}

/// Opens /dev/kvm, unless it was `passed`, and makes an empty virtual machine.
///
/// # Errors
/// What failed; nothing of the attempt is left then.
pub fn prepare(passed: Option<&Arc<Kvm>>) -> Result<Prepared, ActionError> {
    let kvm = match passed {
        Some(passed) => Arc::clone(passed),
        None => Arc::new(Kvm::new().context(
            "Opening /dev/kvm failed (is the module loaded, and may this user open it?)",
        )?),
    };
    let serial = parked("serial".into())?;
    let for_asking = Arc::clone(&kvm);
    let supported = serial.ask(move || cpuid::supported(&for_asking));
    let vm = arch::vm::create(&kvm).context(NO_VM)?;
    Ok(Prepared {
        kvm,
        vm,
        serial,
        supported,
    })
}

/// A machine whose guest is not loaded yet.
pub struct Begun {
    kvm: Arc<Kvm>,
    threads: Threads,
    vm: Arc<Vm>,
    lines: Lines,
    vcpus: Vec<Making>,
    buses: Buses,
    console: MadeConsole,
    keyboard: Arc<I8042>,
    power: Arc<Power>,
    /// What KVM is given once the vCPUs are made.
    restored: Option<(VmState, ClockAfterRestore)>,
    handler: Option<Handler>,
}

/// For the files thread: puts the guest into memory. It may wait for files.
pub type Load = Box<dyn FnOnce() -> Loaded + Send>;

/// The console, its registers, and how it is told something.
struct MadeConsole {
    console: serial::Console,
    uart: Arc<SerialPort>,
    messages: Sender<serial::SerialMessage>,
}

/// Guest memory, and how the guest in it is entered, unless it goes on.
pub struct Loaded {
    memory: Memory,
    entry: Result<Option<boot::Entry>, ActionError>,
    /// In the order of slots.
    devices: Vec<Attach>,
}

impl fmt::Debug for Begun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Begun")
    }
}

/// The first half of a start: all that needs no file. `submit` has the files thread do what does,
/// meanwhile; the token is for its result.
///
/// # Errors
/// What failed; nothing of the attempt is left then.
pub fn begin(
    host: &Host<'_>,
    configuration: &Configuration,
    origin: Origin,
    prepare: impl FnOnce() -> Result<Prepared, ActionError>,
    submit: impl FnOnce(Load) -> Result<u64, ActionError>,
) -> Result<(Begun, u64), ActionError> {
    configuration.devices.check_count()?;
    let machine = &configuration.machine;
    let Prepared {
        kvm,
        vm,
        serial,
        supported,
    } = prepare()?;
    let threads = Threads::make(configuration, serial)?;

    // The machine: memory first, then KVM's part of it. And what the guest starts with.
    let Begins {
        mut state,
        mut memory,
        chips,
        load,
        restored,
        handler,
        cpu,
        elapsed,
    } = match origin {
        Origin::Kernel => boots(host, configuration, &kvm)?,
        Origin::Snapshot(restored) => goes_on(*restored)?,
    };
    let vm = Vm::around(vm, &kvm, &memory, machine.track_dirty_pages, chips);
    let vm = Arc::new(vm.context(NO_VM)?);
    host.timeline.mark_again(Moment::MemoryMade);

    // The files thread sees to what it starts with, and to the devices' files, beside all that follows.
    let saved = restored.is_some().then(|| Saved {
        devices: mem::take(&mut state.devices),
        elapsed,
    });
    let mut building = Building::new(saved);
    configuration.devices.visit(&mut building)?;
    let builds = building.builds()?;
    let timeline = host.timeline.clone();
    let ram = memory.regions().collect();
    let token = submit(Box::new(move || {
        let entry = load(&mut memory);
        if matches!(entry, Ok(Some(_))) {
            timeline.mark_again(Moment::KernelLoaded);
        }
        let devices = builds.into_iter().map(|build| build()).collect();
        Loaded {
            memory,
            entry,
            devices,
        }
    }))?;

    // The vCPUs, each made by the thread that will run it, beside all that follows.
    let mut supported = supported
        .recv()
        .unwrap_or_else(|_| cpuid::supported(&kvm))
        .context("KVM_GET_SUPPORTED_CPUID failed")?;
    if let Some(config) = &configuration.cpu {
        if let Some(number) = cpu::missing_capability(&kvm, config) {
            let why = format!("{BAD_CPU}: KVM lacks the capability {number}");
            return Err(ActionError(why));
        }
        cpuid::mask(&mut supported, &cpu::cpuid_masks(config)).context(BAD_CPU)?;
    }
    let start = match restored {
        Some(_) => StartState::Saved(SavedVcpus {
            states: mem::take(&mut state.vcpus),
            check: cpu.map(|cpu| (cpu, Arc::new(supported))),
        }),
        None => StartState::Reset(Arc::new(supported)),
    };
    let vcpus = begin_vcpus(&threads.vcpus, &vm, configuration, start);

    // What the guest can touch, but for its devices: registers on two buses.
    let mut buses = Buses {
        ram,
        ..Buses::default()
    };
    let split = state.chips.unwrap_or_default();
    let lines = Lines::place(chips, &split, &vm, &mut buses.memory, &mut buses.ports);
    let lines = lines.context(NOT_PLACED)?;
    let console = make_console(
        host,
        &state.uart,
        &lines,
        &configuration.console,
        &mut buses,
    )?;
    let keyboard = I8042::new(&state.keyboard, line(&lines, layout::I8042_GSI)?);
    let keyboard = Arc::new(keyboard.bare()?);
    let [first, ..] = layout::I8042_PORTS;
    for port in layout::I8042_PORTS {
        let ports = &mut buses.ports;
        ports
            .insert_part(port, 1, port.wrapping_sub(first), keyboard.clone())
            .context(NOT_PLACED)?;
    }
    buses
        .ports
        .insert(layout::CMOS_PORT, layout::CMOS_PORTS, Arc::new(Cmos))
        .context(NOT_PLACED)?;
    let power = Arc::new(Power::new(&state.power));
    buses
        .ports
        .insert(layout::POWER_PORT, layout::POWER_PORTS, power.clone())
        .context(NOT_PLACED)?;
    let (port, ports) = (layout::EXIT_CODE_PORT, layout::EXIT_CODE_PORTS);
    buses
        .ports
        .insert_part(port, ports, power::EXIT_CODE, power.clone())
        .context(NOT_PLACED)?;
    if host.has_boot_timer {
        place_boot_timer(host, &mut buses).context(NOT_PLACED)?;
    }
    let begun = Begun {
        kvm,
        threads,
        vm,
        lines,
        vcpus,
        buses,
        console,
        keyboard,
        power,
        restored,
        handler,
    };
    Ok((begun, token))
}

/// The second half: the machine that `configuration` asks for. Its devices run then, its vCPUs are
/// paused. `seal` has the files thread install its filter, and report to the latch.
///
/// # Errors
/// What failed; nothing of the attempt is left then.
pub fn complete(
    host: &Host<'_>,
    configuration: &mut Configuration,
    begun: Begun,
    loaded: Loaded,
    seal: impl FnOnce(Option<Category>, &Arc<ReadyLatch>) -> Result<(), ActionError>,
) -> Result<(Machine, Vec<Replaced>), ActionError> {
    let Begun {
        kvm,
        threads,
        vm,
        lines,
        vcpus,
        mut buses,
        console:
            MadeConsole {
                console,
                uart,
                messages,
            },
        keyboard,
        power,
        restored,
        handler,
    } = begun;
    let Loaded {
        memory,
        entry,
        devices,
    } = loaded;
    let entry = entry?;

    let mut attaching = Attaching {
        host,
        vm: &vm,
        lines: &lines,
        memory: &memory,
        buses: &mut buses,
        attached: Vec::new(),
    };
    for attach in devices {
        let attached = attach(&mut attaching)?;
        attaching.attached.push(attached);
    }
    let attached = attaching.attached;

    // The first vCPU starts at the kernel's entry; the guest wakes the others.
    let vcpus = finish_vcpus(host, vcpus, entry.as_ref(), &Arc::new(buses))?;
    if let Some((state, clock)) = &restored {
        vm.restore(state, *clock).context(NO_VM)?;
        // Pulses that were on their way.
        uart.raise_again();
        keyboard.raise_again();
        generation::notify(&lines).bare()?;
    }

    let latch = ReadyLatch::of(threads.count() + 1);
    seal(host.category(Category::Files), &latch)?;
    // From here on nothing fails: every thread, this one included, gets its work and its filter. What is
    // said of it is written beside that, and before the guest can write anything: both may go to one
    // place.
    info!("The microVM is running.");
    if let Some(line) = host.line {
        info!("{line}");
    }
    let mut vcpu_handles = Vec::with_capacity(vcpus.len());
    for ((vcpu, link), thread) in vcpus.into_iter().zip(threads.vcpus) {
        let thread = thread.start(host.category(Category::Vcpu), &latch, move || vcpu.run());
        vcpu_handles.push(VcpuHandle::new(link, thread));
    }
    let mut replaced = Vec::new();
    // As many for each device as it has workers.
    let mut device_threads = threads.devices.into_iter();
    for device in attached {
        let category = host.category(device.category);
        for (enter, thread) in device.enter.into_all().zip(device_threads.by_ref()) {
            let _ = thread.start_entered(category, &latch, enter);
        }
        replaced.push((device.note)(&mut configuration.devices));
    }
    let console_counters = console.counters();
    let category = host.category(Category::Serial);
    let _ = threads.serial.start(category, &latch, move || {
        if let Err(cause) = console.run() {
            error!("The console stopped: {cause}");
        }
    });
    // The machine has its own copies of these.
    replaced.push(configuration.release());
    // The filter lets the terminal be given back, not taken.
    if let Err(error) = terminal::make_raw() {
        warn!("The terminal stays as it is: {error}");
    }
    threads::filter_or_end(host.category(Category::Control));
    latch.wait();
    log::flush(LOG_PATIENCE);

    let machine = Machine {
        vcpus: vcpu_handles,
        console: messages,
        console_counters,
        uart,
        keyboard,
        power,
        lines,
        vm,
        kvm,
        memory: Some(memory),
        handler,
        msrs: OnceCell::new(),
    };
    Ok((machine, replaced))
}

const NO_VM: &str = "Making the virtual machine failed";

const BAD_CPU: &str = "Cannot apply the CPU configuration";
const NOT_PLACED: &str = "Placing a device failed";

/// The threads of a machine, made but idle.
struct Threads {
    vcpus: Vec<ParkedThread>,
    /// In the order of the devices' slots.
    devices: Vec<ParkedThread>,
    serial: ParkedThread,
}

impl Threads {
    fn make(configuration: &Configuration, serial: ParkedThread) -> Result<Self, ActionError> {
        let vcpus = 0..configuration.machine.vcpu_count;
        // Tools pin vCPUs by these names.
        let vcpus = vcpus.map(|index| parked(format!("fc_vcpu {index}")));
        Ok(Threads {
            vcpus: vcpus.collect::<Result<_, _>>()?,
            devices: configuration
                .devices
                .threads()
                .map(parked)
                .collect::<Result<_, _>>()?,
            serial,
        })
    }

    fn count(&self) -> usize {
        self.vcpus.len() + self.devices.len() + 1
    }
}

/// The UART on its ports, the console behind it, and the pipe that log lines will take.
fn make_console(
    host: &Host<'_>,
    state: &UartState,
    lines: &Lines,
    asked: &Console,
    buses: &mut Buses,
) -> Result<MadeConsole, ActionError> {
    const FAILED: &str = "Making the console failed";
    let (input, output) = match &asked.output {
        // A console that goes to a file has no input.
        Some(file) => (None, file.try_clone().context(FAILED)?),
        None => (
            fd::duplicate(fd::STDIN).ok(),
            fd::duplicate(fd::STDOUT).context(FAILED)?,
        ),
    };
    let socket = match &asked.sockets.used {
        Some(socket) => Some(socket.listener.try_clone().context(FAILED)?),
        None => None,
    };
    let streams = Streams {
        input,
        output,
        limit: asked.serial.rate_limiter.and_then(bucket),
        socket,
    };
    let (messages, inbox) = inbox(SERIAL_MESSAGES).context(FAILED)?;
    let line = line(lines, layout::SERIAL_GSI)?;
    let (uart, console) =
        serial::console(state, line, streams, inbox, host.events.outbox()).context(FAILED)?;
    let port = Arc::clone(&uart);
    buses
        .ports
        .insert(layout::SERIAL_PORT, serial::PORTS, uart)
        .context(NOT_PLACED)?;
    Ok(MadeConsole {
        console,
        uart: port,
        messages,
    })
}

/// The device that tells how long the guest took to come up, at its address and at its port.
fn place_boot_timer(host: &Host<'_>, buses: &mut Buses) -> Result<(), Overlap> {
    let timer = Arc::new(BootTimer::new(host.events.outbox()));
    buses
        .memory
        .insert(layout::BOOT_TIMER, boot_timer::LEN, timer.clone())?;
    buses.ports.insert(layout::BOOT_TIMER_PORT, 1, timer)?;
    Ok(())
}

/// An interrupt line: an eventfd that raises `gsi`.
fn line(lines: &Lines, gsi: u32) -> Result<EventFd, ActionError> {
    const FAILED: &str = "Making an interrupt line failed";
    let line = event().context(FAILED)?;
    lines.connect(&line, gsi).context(FAILED)?;
    Ok(line)
}

fn event() -> io::Result<EventFd> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
}
