//! What was asked for, and what was opened for it: the one copy, before the start and after.
//!
//! Each part is checked for itself and beside the others as it comes; a part that is refused changes
//! nothing. Clients may remove a file once they have PUT it, so it is opened then and kept.

#[cfg(test)]
mod tests;

use std::fs::File;
use std::mem;
use std::sync::Arc;

use super::action::Part;
use super::change::{Change, Edit, Replaced, edit};
use super::devices::Devices;
use crate::error::ActionError;
use crate::files::open::{self, ConsoleSocket, INITRD, Image, KERNEL};
use crate::sys::passed::Passed;
use crate::wire::DEFAULT_BOOT_ARGS;
use crate::wire::config::cpu::CpuConfig;
use crate::wire::config::{
    BootSource, HugePages, MachineConfig, MachineConfigUpdate, Serial, TokenBucketConfig, VmConfig,
};
use crate::wire::limits::{COMMAND_LINE_MAX, VCPUS_MAX};

/// A part that was checked.
type Step = Result<Change<Edit<Configuration>>, ActionError>;

/// What a virtual machine is made of.
#[derive(Debug, Default)]
pub struct Configuration {
    /// The machine.
    pub machine: MachineConfig,
    /// The kernel, if one was named, and its files until the start.
    pub boot: Option<Boot>,
    /// Disks, network interfaces.
    pub devices: Devices,
    /// CPUID and MSR masks.
    pub cpu: Option<CpuConfig>,
    /// The console.
    pub console: Console,
}

/// What boots.
#[derive(Debug)]
pub struct Boot {
    /// What was asked for.
    pub source: BootSource,
    /// The kernel's file, and the initial RAM disk's. They go with the start.
    pub images: Option<Arc<(Image, Option<Image>)>>,
}

/// The console.
#[derive(Debug, Default)]
pub struct Console {
    /// What was asked for.
    pub serial: Serial,
    /// Where output goes instead of standard output. It goes with the start.
    pub output: Option<File>,
    /// Where its clients come.
    pub sockets: ConsoleSockets,
}

/// Where clients of the console come.
#[derive(Clone, Debug, Default)]
pub struct ConsoleSockets {
    /// What was asked for, or else the one of the command line.
    pub used: Option<Arc<ConsoleSocket>>,
    /// The one of the command line, for any configuration that asks for none.
    pub given: Option<Arc<ConsoleSocket>>,
}

impl Boot {
    /// That of a machine that has started from `source`, whose files are not opened any more.
    pub fn started(source: BootSource) -> Self {
        let images = None;
        Boot { source, images }
    }

    fn check(source: &BootSource) -> Result<(), ActionError> {
        let boot_args = source.boot_args.as_deref().unwrap_or_default();
        let length = boot_args.len();
        if length > COMMAND_LINE_MAX {
            return Err(ActionError(format!(
                "Boot source error: boot_args has {length} bytes, and a kernel command line at most \
                 {COMMAND_LINE_MAX}"
            )));
        }
        if boot_args.contains('\0') {
            return Err(ActionError(
                "Boot source error: boot_args holds a zero byte, which would end it".into(),
            ));
        }
        Ok(())
    }

    fn open(mut source: BootSource, passed: &mut Passed) -> Result<Self, ActionError> {
        let has_initrd = source.initrd_path.is_some();
        let default_line = || default_boot_args(has_initrd);
        source.boot_args.get_or_insert_with(default_line);
        let kernel = Image::open(&KERNEL, &source.kernel_image_path, passed)?;
        let initrd = match &source.initrd_path {
            Some(initrd) => Some(Image::open(&INITRD, initrd, passed)?),
            None => None,
        };
        let images = Some(Arc::new((kernel, initrd)));
        Ok(Boot { source, images })
    }
}

/// The kernel command line where none was asked for. An initial RAM disk may hold what a kernel needs
/// as modules, as those of distributions do.
fn default_boot_args(has_initrd: bool) -> String {
    let words = DEFAULT_BOOT_ARGS.split(' ');
    let words = words.filter(|word| !has_initrd || *word != "nomodule");
    words.collect::<Vec<_>>().join(" ")
}

impl Console {
    fn open(
        mut serial: Serial,
        before: ConsoleSockets,
        passed: &mut Passed,
    ) -> Result<Self, ActionError> {
        serial.rate_limiter = serial.rate_limiter.and_then(TokenBucketConfig::in_force);
        let output = match &serial.serial_out_path {
            Some(sink) => Some(open::sink(&open::CONSOLE_OUTPUT, sink, passed)?),
            None => None,
        };
        let given = before.given;
        let used = match &serial.console_socket {
            Some(source) => match before.used.filter(|socket| socket.is_at(source)) {
                Some(same) => Some(same),
                None => Some(Arc::new(ConsoleSocket::open(source, passed)?)),
            },
            None => given.clone(),
        };
        Ok(Console {
            serial,
            output,
            sockets: ConsoleSockets { used, given },
        })
    }
}

impl Configuration {
    /// The first step of a PUT or PATCH of a part. The log, the metrics and the whole are the caller's.
    ///
    /// # Errors
    /// The message for the client.
    pub fn check(&self, part: Part) -> Step {
        match part {
            Part::Machine(machine) => put_machine(machine),
            Part::MachineUpdate(update) => put_machine(self.patched(update)),
            Part::BootSource(source) => {
                Boot::check(&source)?;
                Ok(Change::new(|passed| {
                    let boot = Boot::open(source, passed)?;
                    edit(|configuration: &mut Self| configuration.boot.replace(boot))
                }))
            }
            Part::Device(device) => {
                let change = self.devices.put(device)?;
                Ok(change.map(|edit| -> Edit<Self> { Box::new(|whole| edit(&mut whole.devices)) }))
            }
            Part::Serial(serial) => {
                let before = self.console.sockets.clone();
                Ok(Change::new(|passed| {
                    let console = Console::open(serial, before, passed)?;
                    edit(|configuration: &mut Self| {
                        mem::replace(&mut configuration.console, console)
                    })
                }))
            }
            Part::Cpu(cpu) => {
                Ok(
                    Change::new(|_| edit(|configuration: &mut Self| configuration.cpu = Some(cpu)))
                        .waiting(false),
                )
            }
            Part::Logger(_) | Part::Metrics(_) | Part::All { .. } => {
                Err(ActionError("This is not a part of the machine.".into()))
            }
        }
    }

    /// The first step of taking up a whole configuration in place of this one; its log and metrics
    /// are the caller's.
    ///
    /// # Errors
    /// The message for the client.
    pub fn replace(&self, config: VmConfig) -> Step {
        let machine = config.machine_config.unwrap_or_default();
        check_machine(&machine)?;
        if let Some(source) = &config.boot_source {
            Boot::check(source)?;
        }
        let devices = Devices::opening(config.devices, self.devices.reopened()?)?;
        let before = self.console.sockets.clone();
        let serial = config.serial.unwrap_or_default();
        let (cpu, source) = (config.cpu_config, config.boot_source);
        Ok(Change::new(move |passed| {
            let cpu = cpu.map(|cpu| open::cpu_config(cpu, passed)).transpose()?;
            let console = Console::open(serial, before, passed)?;
            let boot = source
                .map(|source| Boot::open(source, passed))
                .transpose()?;
            let devices = devices(passed)?;
            let new = Configuration {
                machine,
                boot,
                devices,
                cpu,
                console,
            };
            edit(move |configuration| mem::replace(configuration, new))
        }))
    }

    fn patched(&self, update: MachineConfigUpdate) -> MachineConfig {
        let old = &self.machine;
        MachineConfig {
            vcpu_count: update.vcpu_count.unwrap_or(old.vcpu_count),
            mem_size_mib: update.mem_size_mib.unwrap_or(old.mem_size_mib),
            smt: update.smt.unwrap_or(old.smt),
            cpu_template: None,
            track_dirty_pages: update.track_dirty_pages.unwrap_or(old.track_dirty_pages),
            huge_pages: update.huge_pages.unwrap_or(old.huge_pages),
            interrupt_controller: update
                .interrupt_controller
                .unwrap_or(old.interrupt_controller),
            memory_backend: update.memory_backend.unwrap_or(old.memory_backend),
        }
    }

    /// Judges all of it together, before the start.
    ///
    /// # Errors
    /// No kernel, more devices than there is room for, or more memory than there are addresses.
    pub fn check_start(&self) -> Result<&Boot, ActionError> {
        let boot = self.boot.as_ref().ok_or_else(|| {
            ActionError(
                "Start microvm error: Cannot start microvm without kernel configuration: name a \
                 kernel with PUT /boot-source"
                    .into(),
            )
        })?;
        self.devices.check_count()?;
        let mib = self.machine.mem_size_mib;
        if mib.checked_mul(1 << 20).is_none() {
            return Err(ActionError(format!(
                "Invalid Memory Configuration: Cannot create mmap region: Out of memory (os error \
                 12): mem_size_mib is {mib}, which is more memory than a machine can address"
            )));
        }
        Ok(boot)
    }

    /// Takes up a machine that was saved; the console stays as it was configured.
    pub fn restore(
        &mut self,
        machine: MachineConfig,
        boot: Option<Boot>,
        cpu: Option<CpuConfig>,
        devices: Devices,
    ) -> impl Send + use<> {
        let devices = mem::replace(&mut self.devices, devices);
        let boot = mem::replace(&mut self.boot, boot);
        self.machine = machine;
        self.cpu = cpu;
        (boot, devices)
    }

    /// Gives up what a machine that has started has copies of; the files thread closes it.
    pub fn release(&mut self) -> Replaced {
        let images = self.boot.as_mut().and_then(|boot| boot.images.take());
        Box::new((images, self.console.output.take()))
    }

    /// What `GET /vm/config` answers.
    pub fn report(&self) -> VmConfig {
        VmConfig {
            machine_config: Some(self.machine.clone()),
            boot_source: self.boot.as_ref().map(|boot| boot.source.clone()),
            devices: self.devices.configs(),
            ..VmConfig::default()
        }
    }
}

fn put_machine(machine: MachineConfig) -> Step {
    check_machine(&machine)?;
    let open = |_: &mut Passed| edit(|whole: &mut Configuration| whole.machine = machine);
    Ok(Change::new(open).waiting(false))
}

fn check_machine(machine: &MachineConfig) -> Result<(), ActionError> {
    let count = machine.vcpu_count;
    let even = count.is_multiple_of(2);
    if count == 0 || count > VCPUS_MAX || (machine.smt && count != 1 && !even) {
        let smt = if machine.smt { " with smt" } else { "" };
        return Err(ActionError(format!(
            "Machine config error: vcpu_count is {count}{smt}: The number of vCPUs must be greater \
             than 0, at most {VCPUS_MAX}, and 1 or an even number if SMT is enabled."
        )));
    }
    let mib = machine.mem_size_mib;
    let whole_pages = match machine.huge_pages {
        HugePages::None => true,
        HugePages::Transparent | HugePages::TwoMib => mib.is_multiple_of(2),
    };
    if mib == 0 || !whole_pages {
        return Err(ActionError(format!(
            "Machine config error: mem_size_mib is {mib}: The memory size (MiB) is either 0, or not a \
             multiple of the configured page size."
        )));
    }
    Ok(())
}
