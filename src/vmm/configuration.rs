//! What was asked for, and what was opened for it: the one copy, before the start and after.
//!
//! Each part is checked for itself and beside the others as it comes; a part that is refused changes
//! nothing. Clients may remove a file once they have PUT it, so it is opened then and kept.

use std::fs::File;
use std::mem;
use std::sync::Arc;

use super::action::Part;
use super::change::{Change, Edit, Replaced, edit};
use super::devices::Devices;
use crate::error::ActionError;
use crate::files::open::{self, ConsoleSocket, INITRD, Image, KERNEL};
use crate::sys::passed::Passed;
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
    pub socket: Option<Arc<ConsoleSocket>>,
}

impl Boot {
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

    fn open(source: BootSource, passed: &mut Passed) -> Result<Self, ActionError> {
        let kernel = Image::open(&KERNEL, &source.kernel_image_path, passed)?;
        let initrd = match &source.initrd_path {
            Some(initrd) => Some(Image::open(&INITRD, initrd, passed)?),
            None => None,
        };
        let images = Some(Arc::new((kernel, initrd)));
        Ok(Boot { source, images })
    }
}

impl Console {
    fn open(
        mut serial: Serial,
        before: Option<Arc<ConsoleSocket>>,
        passed: &mut Passed,
    ) -> Result<Self, ActionError> {
        serial.rate_limiter = serial.rate_limiter.and_then(TokenBucketConfig::in_force);
        let output = match &serial.serial_out_path {
            Some(sink) => Some(open::sink(&open::CONSOLE_OUTPUT, sink, passed)?),
            None => None,
        };
        let socket = match &serial.console_socket {
            Some(source) => match before.filter(|socket| socket.is_at(source)) {
                Some(same) => Some(same),
                None => Some(Arc::new(ConsoleSocket::open(source, passed)?)),
            },
            None => None,
        };
        Ok(Console {
            serial,
            output,
            socket,
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
                let before = self.console.socket.clone();
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
        let devices = self.devices.replace(config.devices)?;
        let socket = self.console.socket.clone();
        let (cpu, serial, source) = (config.cpu_config, config.serial, config.boot_source);
        Ok(Change::new(move |passed| {
            let cpu = cpu.map(|cpu| open::cpu_config(cpu, passed)).transpose()?;
            let console = match serial {
                Some(serial) => Console::open(serial, socket, passed)?,
                None => Console::default(),
            };
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::DEFAULT_BOOT_ARGS;
    use crate::wire::config::{self, AnyDevice, AnyUpdate, DeviceKind, RateLimiterConfig, json};
    use crate::wire::limits::DEVICES_MAX;
    use std::os::unix::fs::MetadataExt;
    use vmm_sys_util::tempfile::TempFile;

    /// All three steps of a request.
    fn put(configuration: &mut Configuration, part: Part) -> Result<(), ActionError> {
        let change = configuration.check(part)?;
        let edit = change.open(&mut Passed::default())?;
        drop(edit(configuration));
        Ok(())
    }

    fn drive(id: &str, root: bool) -> Part {
        let text = format!(
            r#"{{"drive_id":"{id}","path_on_host":"/proc/self/exe","is_root_device":{root},"is_read_only":true}}"#
        );
        Part::Device(AnyDevice::parse(DeviceKind::Drive, text.as_bytes()).unwrap())
    }

    fn ids(configuration: &Configuration) -> Vec<String> {
        configuration
            .devices
            .configs()
            .ids()
            .map(str::to_owned)
            .collect()
    }

    fn kernel() -> Part {
        Part::BootSource(json::parse(br#"{"kernel_image_path":"/proc/self/exe"}"#).unwrap())
    }

    #[test]
    fn machine_when_put_is_checked() {
        // vcpu_count, mem_size_mib, smt, huge_pages, taken
        let cases = [
            (1, 128, false, HugePages::None, true),
            (32, 1, false, HugePages::None, true),
            (3, 1, false, HugePages::None, true),
            (0, 128, false, HugePages::None, false),
            (33, 128, false, HugePages::None, false),
            (1, 1, true, HugePages::None, true),
            (2, 1, true, HugePages::None, true),
            (3, 1, true, HugePages::None, false),
            (1, 0, false, HugePages::None, false),
            (1, u64::MAX, false, HugePages::None, true),
            (1, 3, false, HugePages::TwoMib, false),
            (1, 4, false, HugePages::TwoMib, true),
            (1, 3, false, HugePages::Transparent, false),
        ];
        for (vcpu_count, mem_size_mib, smt, huge_pages, taken) in cases {
            let machine = MachineConfig {
                vcpu_count,
                mem_size_mib,
                smt,
                huge_pages,
                ..MachineConfig::default()
            };
            let mut configuration = Configuration::default();
            let result = put(&mut configuration, Part::Machine(machine.clone()));
            assert_eq!(result.is_ok(), taken, "{machine:?}: {result:?}");
            assert_eq!(
                configuration.machine == machine,
                taken || machine == MachineConfig::default()
            );
        }
    }

    #[test]
    fn machine_when_patched_keeps_the_rest() {
        let mut configuration = Configuration::default();
        let patch = |text: &str| Part::MachineUpdate(json::parse(text.as_bytes()).unwrap());
        put(&mut configuration, patch(r#"{"smt":true,"vcpu_count":2}"#)).unwrap();
        put(&mut configuration, patch(r#"{"track_dirty_pages":true}"#)).unwrap();
        assert!(put(&mut configuration, patch(r#"{"vcpu_count":3}"#)).is_err());
        assert_eq!(
            configuration.machine,
            MachineConfig {
                vcpu_count: 2,
                smt: true,
                track_dirty_pages: true,
                ..MachineConfig::default()
            }
        );
        let default = Part::Machine(MachineConfig::default());
        put(&mut configuration, default).unwrap();
        assert!(!configuration.machine.smt);
    }

    #[test]
    fn boot_args_when_put_may_have_2047_bytes() {
        let check = |boot_args: String| {
            Boot::check(&BootSource {
                kernel_image_path: "k".into(),
                initrd_path: None,
                boot_args: Some(boot_args),
            })
        };
        assert_eq!(check("a".repeat(2047)), Ok(()));
        let error = check("a".repeat(2048)).unwrap_err();
        assert!(error.0.contains("has 2048 bytes"), "{error}");
        assert!(check("a\0b".into()).is_err());
        assert_eq!(check(String::new()), Ok(()));
        assert_eq!(check(DEFAULT_BOOT_ARGS.into()), Ok(()));
    }

    #[test]
    fn drives_when_put_come_in_the_order_of_their_devices() {
        // (id, root) in the order of PUT; order of devices
        type Puts<'a> = &'a [(&'a str, bool)];
        let cases: &[(Puts, &[&str])] = &[
            (&[("a", false), ("r", true), ("b", false)], &["r", "a", "b"]),
            (&[("r", true), ("a", false), ("r", true)], &["r", "a"]),
            (&[("a", false), ("b", false), ("b", true)], &["b", "a"]),
            (&[("r", true), ("r", false), ("s", true)], &["s", "r"]),
        ];
        for (puts, order) in cases {
            let mut configuration = Configuration::default();
            let mut all = crate::wire::config::Devices::default();
            for (id, root) in *puts {
                let action = drive(id, *root);
                if let Part::Device(AnyDevice::Drive(drive)) = &action {
                    all.drives.push(drive.clone());
                }
                put(&mut configuration, action).unwrap();
            }
            assert_eq!(ids(&configuration), *order);
            // And at once.
            let open = Configuration::default().devices.replace(all).unwrap();
            configuration.devices = open(&mut Passed::default()).unwrap();
            assert_eq!(ids(&configuration), *order);
        }
    }

    #[test]
    fn drive_when_a_second_root_or_vhost_user_is_refused() {
        let mut configuration = Configuration::default();
        put(&mut configuration, drive("r", true)).unwrap();
        let error = put(&mut configuration, drive("s", true)).unwrap_err();
        let expected = "root block device already exists: `r`";
        assert!(error.0.contains(expected), "{error}");
        let Part::Device(AnyDevice::Drive(mut socket)) = drive("v", false) else {
            unreachable!()
        };
        socket.socket = Some("/s".into());
        let socket = Part::Device(AnyDevice::Drive(socket));
        assert!(put(&mut configuration, socket).is_err());
        assert_eq!(ids(&configuration), ["r"]);
    }

    #[test]
    fn drive_when_put_is_reported_with_its_defaults() {
        let mut configuration = Configuration::default();
        let Part::Device(AnyDevice::Drive(mut limited)) = drive("a", false) else {
            unreachable!()
        };
        let bucket = |size, refill_time| {
            Some(TokenBucketConfig {
                size,
                one_time_burst: Some(0),
                refill_time,
            })
        };
        limited.rate_limiter = Some(RateLimiterConfig {
            bandwidth: bucket(10, 100),
            ops: bucket(1, 0),
        });
        limited.is_read_only = None;
        limited.path_on_host = "/dev/null".into();
        let action = Part::Device(AnyDevice::Drive(limited.clone()));
        assert!(put(&mut configuration, action).is_err());
        let file = TempFile::new().unwrap();
        limited.path_on_host = file.as_path().to_str().unwrap().into();
        let path = limited.path_on_host.to_string();
        let action = Part::Device(AnyDevice::Drive(limited));
        put(&mut configuration, action).unwrap();
        let reported = configuration.report();
        let reported = serde_json::to_value(config::Reported(&reported)).unwrap();
        assert_eq!(
            reported["drives"][0],
            serde_json::json!({"drive_id":"a","partuuid":null,"is_root_device":false,
                "cache_type":"Unsafe","is_read_only":false,"path_on_host":path,
                "rate_limiter":{"bandwidth":{"size":10,"one_time_burst":null,"refill_time":100},
                "ops":null},"io_engine":"Sync","socket":null})
        );
        assert_eq!(
            reported["boot-source"],
            serde_json::json!({"kernel_image_path":"","initrd_path":null,"boot_args":null})
        );
        assert_eq!(
            reported["machine-config"],
            serde_json::json!({"vcpu_count":1,"mem_size_mib":128,"smt":false,
                "track_dirty_pages":false,"huge_pages":"None"})
        );
        for section in ["balloon", "cpu-config", "vsock", "mmds-config", "logger"] {
            assert!(reported[section].is_null() && reported.get(section).is_some());
        }
    }

    #[test]
    fn put_when_refused_keeps_what_there_was() {
        let mut configuration = Configuration::default();
        put(&mut configuration, kernel()).unwrap();
        put(&mut configuration, drive("a", false)).unwrap();
        let inode = |configuration: &Configuration| {
            let images = configuration.boot.as_ref().unwrap().images.as_ref();
            images.unwrap().0.file.metadata().unwrap().ino()
        };
        let before = inode(&configuration);
        for body in [
            r#"{"kernel_image_path":"/no/such"}"#,
            r#"{"kernel_image_path":"/proc/self/exe","initrd_path":"/no/such"}"#,
            r#"{"kernel_image_path":{"fd":0}}"#,
        ] {
            let action = Part::BootSource(json::parse(body.as_bytes()).unwrap());
            put(&mut configuration, action).unwrap_err();
        }
        assert_eq!(inode(&configuration), before);
        let config = br#"{"boot-source":{"kernel_image_path":"/proc/self/exe"},
            "drives":[{"drive_id":"b","path_on_host":"/no/such","is_root_device":false}]}"#;
        let config = crate::wire::config::parse_file(config).unwrap();
        let change = configuration.replace(config).unwrap();
        assert!(change.open(&mut Passed::default()).is_err());
        assert_eq!(ids(&configuration), ["a"]);
    }

    #[test]
    fn update_when_the_device_is_not_there_is_refused() {
        let mut configuration = Configuration::default();
        put(&mut configuration, drive("a", false)).unwrap();
        let check = |kind, text: &str| {
            let update = AnyUpdate::parse(kind, text.as_bytes()).unwrap();
            configuration.devices.patch(update).map(drop)
        };
        let drives = |text: &str| check(DeviceKind::Drive, text);
        assert!(drives(r#"{"drive_id":"b","path_on_host":"x"}"#).is_err());
        assert!(drives(r#"{"drive_id":"a"}"#).is_err());
        assert!(drives(r#"{"drive_id":"a","rate_limiter":null}"#).is_err());
        assert!(drives(r#"{"drive_id":"a","rate_limiter":{}}"#).is_ok());
        assert!(drives(r#"{"drive_id":"a","path_on_host":"/new"}"#).is_ok());
        assert!(check(DeviceKind::NetworkInterface, r#"{"iface_id":"a"}"#).is_err());
    }

    #[test]
    fn start_when_parts_do_not_fit_together_says_why() {
        let mut configuration = Configuration::default();
        let error = configuration.check_start().unwrap_err();
        assert!(error.0.contains("without kernel configuration"), "{error}");
        put(&mut configuration, kernel()).unwrap();
        for i in 0..DEVICES_MAX {
            put(&mut configuration, drive(&format!("d{i}"), false)).unwrap();
        }
        configuration.check_start().unwrap();
        put(&mut configuration, drive("more", false)).unwrap();
        let error = configuration.check_start().unwrap_err();
        let expected = "20 drives and 0 network interfaces are more than the 19 devices";
        assert!(error.0.contains(expected), "{error}");
        let mut configuration = Configuration::default();
        put(&mut configuration, kernel()).unwrap();
        configuration.machine.mem_size_mib = u64::MAX;
        let error = configuration.check_start().unwrap_err();
        assert!(error.0.contains("more memory than a machine"), "{error}");
    }
}
