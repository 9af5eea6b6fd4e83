//! The machine to run: a configuration in the monitor's own types, and the opened files that stand for
//! what it names.
//!
//! Reading comes first and opens nothing else ([`Described`]); then everything is opened ([`Vm`]),
//! and the configuration refers to it by number, with the user's name for messages. Then it is sent,
//! in one request that carries all descriptors. A snapshot takes the same way (`snapshot`).

use std::os::fd::{OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use mayfly::wire::command_line;
use mayfly::wire::config::{
    self, Backing, DriveOverride, Mac, NetworkInterface, NetworkOverride, PassedFd,
    RateLimiterConfig, Restore, SnapshotLoad, TokenBucketConfig,
};
use mayfly::wire::limits::{CONFIG_FILE_MAX, DESCRIPTORS_MAX};
use mayfly::wire::{Source, VmConfig};

use mayfly_agent_protocol::AGENT_MAC;

use super::boot_args;
use super::inherited::{Passed, number_in};
use super::options::{Console, Machine, Options};
use super::resources::{self, CONSOLE_SOCKET};
use super::snapshot::{self, Restoring};
use super::{OWN_TAP, OwnTap, SpecError};
use crate::error::{AnyError, Step as _};
use crate::input;

/// What may be added to the files of a machine: a tap, a socket, a pagemap, and two files of a guest with an agent.
const ADDED: usize = 5;
/// Files and taps that a machine may name: all go with one request.
pub const FILES_MAX: usize = 27;
const _: () = assert!(FILES_MAX + ADDED == DESCRIPTORS_MAX);

/// How many frames an agent may send: 20,000 each second, which is a gigabyte of output, and of empty ones no
/// more than a small part of one processor of the supervisor.
const AGENT_FRAMES: TokenBucketConfig = TokenBucketConfig {
    size: 2000,
    one_time_burst: None,
    refill_time: 100,
};

/// The id of the agent's interface.
const AGENT: &str = "agent";

/// What to run, in which descriptors still have the numbers that they were passed with.
#[derive(Debug)]
pub struct Described {
    machine: Unopened,
    /// The tap to be made in the jail.
    pub own_tap: Option<OwnTap>,
}

#[derive(Debug)]
enum Unopened {
    Configuration(Box<VmConfig>),
    Snapshot(Restoring),
}

impl Described {
    /// Reads the configuration that the options name, if they do. What it has for this program, and
    /// not the monitor, to make becomes an option, if it is none already.
    pub fn of(options: &mut Options) -> Result<Option<Described>, AnyError> {
        let (mut config, own_tap) = match std::mem::take(&mut options.machine) {
            Machine::Client => return Ok(None),
            Machine::Config(path) => (read(&path)?, None),
            Machine::Plain(config, own_tap) => (*config, own_tap),
            Machine::Snapshot(restoring, own_tap) => {
                let machine = Unopened::Snapshot(restoring);
                return Ok(Some(Described { machine, own_tap }));
            }
        };
        let logger = config.logger.as_mut();
        let log = take_path(logger.and_then(|it| it.log_path.take()), "log_path")?;
        options.log = options.log.take().or(log);
        if let Some(serial) = &mut config.serial {
            let output = take_path(serial.serial_out_path.take(), "serial_out_path")?;
            if let (Console::Terminal, Some(path)) = (&options.console, output) {
                options.console = Console::File(path);
            }
            let socket = serial.console_socket.take_if(|it| it.name().is_some());
            if let Some(path) = take_path(socket, "console_socket")?
                && options.console_socket.replace(path).is_some()
            {
                return Err(SpecError::TwoConsoleSockets.into());
            }
        }
        let machine = Unopened::Configuration(Box::new(config));
        Ok(Some(Described { machine, own_tap }))
    }

    /// Puts the disk that was found or made for `--image` in the place of what was given.
    pub fn set_root(&mut self, image: &Path) -> Result<(), AnyError> {
        let image = image
            .to_str()
            .ok_or_else(|| SpecError::NotUtf8(image.into()))?;
        if let Unopened::Configuration(config) = &mut self.machine
            && let Some(root) = config.devices.drives.first_mut()
        {
            root.path_on_host = image.into();
        }
        Ok(())
    }

    /// The numbers of the passed descriptors that it names, also by their paths.
    pub fn inherited(&mut self) -> Vec<RawFd> {
        let number = |source: &mut Source| match source {
            Source::Fd(PassedFd { fd, .. }) => RawFd::try_from(*fd).ok(),
            Source::Named(path) => number_in(path),
        };
        match &mut self.machine {
            Unopened::Configuration(config) => {
                let sources = config.sources().into_iter().map(|(_, source)| source);
                sources.filter_map(number).collect()
            }
            Unopened::Snapshot(restoring) => restoring.sources().filter_map(number).collect(),
        }
    }

    /// Opens everything but what is still to be made: a tap in the jail, a socket.
    pub fn open(self, passed: &mut Passed) -> Result<Vm, AnyError> {
        let vm = match self.machine {
            Unopened::Configuration(config) => open(*config, passed)?,
            Unopened::Snapshot(restoring) => {
                let snapshot::Opened {
                    request,
                    files,
                    mac,
                } = restoring.open(passed)?;
                Vm {
                    request: Request::Load(Box::new(request), mac),
                    files,
                }
            }
        };
        match vm.files.len() {
            ..=FILES_MAX => Ok(vm),
            count => Err(SpecError::TooManyFiles(count).into()),
        }
    }
}

fn open(mut config: VmConfig, passed: &mut Passed) -> Result<Vm, AnyError> {
    let mut files = Vec::new();
    for interface in &mut config.devices.network_interfaces {
        interface.name_queues();
    }
    for (backing, source) in config.sources() {
        if backing == Backing::Tap && source.name() == Some(OWN_TAP) {
            continue;
        }
        let (file, name) = resources::open_or_take(backing, source, passed)?;
        *source = Source::passed(files.len() as u32, name);
        files.push(file);
    }
    Ok(Vm {
        request: Request::Boot(Box::new(config)),
        files,
    })
}

/// The interface by which the agent speaks to the supervisor.
fn agent_interface(link: Source) -> NetworkInterface {
    let mut interface = NetworkInterface::new(AGENT, link);
    interface.guest_mac = Some(Mac(AGENT_MAC));
    interface.mtu = Some(u16::MAX);
    interface.tx_rate_limiter = Some(RateLimiterConfig {
        bandwidth: None,
        ops: Some(AGENT_FRAMES),
    });
    interface
}

fn read(path: &Path) -> Result<VmConfig, AnyError> {
    let name = format!("the configuration {} (--config)", path.display());
    let bytes = input::read(path, CONFIG_FILE_MAX).step(format!("read {name}"))?;
    Ok(config::parse_file(&bytes).step(format!("use {name}"))?)
}

/// The path at which this program, and not the monitor, makes something.
fn take_path(source: Option<Source>, member: &'static str) -> Result<Option<PathBuf>, SpecError> {
    match source {
        None => Ok(None),
        Some(Source::Named(path)) => Ok(Some(path.into())),
        Some(Source::Fd(_)) => Err(SpecError::NotAPath(member)),
    }
}

/// A machine with everything it names opened.
#[derive(Debug)]
pub struct Vm {
    request: Request,
    /// In the order of the numbers in the request.
    files: Vec<OwnedFd>,
}

/// What the monitor is to make.
#[derive(Debug)]
enum Request {
    /// A machine that boots.
    Boot(Box<VmConfig>),
    /// A machine that was saved, with this MAC address on the tap of the jail's own.
    Load(Box<Restore>, Option<Mac>),
}

impl Vm {
    fn add(&mut self, file: OwnedFd, name: impl Into<String>) -> Source {
        self.files.push(file);
        Source::passed(self.files.len() as u32 - 1, name)
    }

    /// Where the tap of the jail's own is named.
    fn own_tap(&mut self) -> Option<&mut Source> {
        let mut taps: Box<dyn Iterator<Item = &mut Source>> = match &mut self.request {
            Request::Boot(config) => {
                let interfaces = config.devices.network_interfaces.iter_mut();
                Box::new(interfaces.map(|it| &mut it.host_dev_name))
            }
            Request::Load(restore, _) => {
                let changes = restore.load.network_overrides.iter_mut();
                Box::new(changes.map(|it| &mut it.host_dev_name))
            }
        };
        taps.find(|source| source.name() == Some(OWN_TAP))
    }

    /// Takes the tap that was made in the jail.
    pub fn set_tap(&mut self, tap: OwnedFd) {
        let source = self.add(tap, OWN_TAP);
        if let Some(tap) = self.own_tap() {
            *tap = source;
        }
    }

    /// Takes the socket that was made for clients of the console.
    pub fn set_console_socket(&mut self, listener: OwnedFd) {
        let source = self.add(listener, CONSOLE_SOCKET);
        let serial = match &mut self.request {
            Request::Boot(config) => &mut config.serial,
            Request::Load(restore, _) => &mut restore.serial,
        };
        serial.get_or_insert_default().console_socket = Some(source);
    }

    /// Takes the tap by which a guest takes over an interface of this host.
    pub fn set_interface(&mut self, tap: OwnedFd, mac: [u8; 6], mtu: u32) {
        let tap = self.add(tap, "tap in the network namespace");
        if let Request::Boot(config) = &mut self.request {
            let mut interface = NetworkInterface::new("eth0", tap);
            interface.guest_mac = Some(Mac(mac));
            interface.mtu = u16::try_from(mtu).ok();
            config.devices.network_interfaces.push(interface);
        }
    }

    /// Takes what a guest with an agent has besides: the initial RAM disk, and the other end of the link.
    pub fn set_agent(&mut self, initramfs: OwnedFd, link: OwnedFd) {
        let initramfs = self.add(initramfs, "initial RAM disk of the agent");
        let link = self.add(link, "link to the agent");
        let Request::Boot(config) = &mut self.request else {
            return;
        };
        if let Some(boot) = &mut config.boot_source {
            boot.initrd_path = Some(initramfs);
        }
        // The last one, so that the others have the names in the guest that they have without it.
        let interface = agent_interface(link);
        config.devices.network_interfaces.push(interface);
    }

    /// The configuration of a machine that is to have an agent, without what a copy of it has anew: files, its interface's address. Or why
    /// none can be a copy. `with_network`: it has the interface of a namespace.
    pub fn shape(&self, with_network: bool) -> Result<String, &'static str> {
        let Request::Boot(config) = &self.request else {
            return Err("it starts from a snapshot");
        };
        let mut config = VmConfig::clone(config);
        let devices = &mut config.devices;
        if devices.network_interfaces.len() != usize::from(with_network) {
            return Err("it has an interface of --net, which is configured while the kernel boots");
        }
        for drive in &mut devices.drives {
            // What more a writable disk can do depends on its file, and a driver does not ask for that again.
            if !drive.read_only() || drive.overlay.is_some() {
                return Err("it has a disk that it writes to");
            }
            drive.path_on_host = Source::from("");
        }
        for interface in &mut devices.network_interfaces {
            interface.host_dev_name = Source::from("");
            interface.guest_mac = None;
        }
        let agent = agent_interface(Source::from(""));
        devices.network_interfaces.push(agent);
        if config.serial.take().is_some() {
            return Err("it has a socket for its console");
        }
        let boot = config.boot_source.as_mut().ok_or("it has no kernel")?;
        boot.kernel_image_path = Source::from("");
        boot.initrd_path = None;
        Ok(config.to_request(true))
    }

    /// A file that the configuration names.
    fn file(&self, source: &Source) -> Option<&OwnedFd> {
        let Source::Fd(PassedFd { fd, .. }) = source else {
            return None;
        };
        self.files.get(usize::try_from(*fd).ok()?)
    }

    /// The guest's kernel.
    pub fn kernel(&self) -> Option<&OwnedFd> {
        let Request::Boot(config) = &self.request else {
            return None;
        };
        let boot = config.boot_source.as_ref()?;
        self.file(&boot.kernel_image_path)
    }

    /// The disks of a machine that boots, by id and in order.
    pub fn disks(&self) -> Vec<(String, &OwnedFd)> {
        let Request::Boot(config) = &self.request else {
            return Vec::new();
        };
        let drives = config.devices.drives.iter();
        drives
            .filter_map(|drive| Some((drive.drive_id.clone(), self.file(&drive.path_on_host)?)))
            .collect()
    }

    /// Gives the network interfaces of a machine with an agent, but for the agent's, this address.
    pub fn set_macs(&mut self, mac: [u8; 6]) {
        let Request::Boot(config) = &mut self.request else {
            return;
        };
        for interface in &mut config.devices.network_interfaces {
            if interface.iface_id != AGENT {
                interface.guest_mac = Some(Mac(mac));
            }
        }
    }

    /// Has the machine boot with an empty disk in the place of each: those that it is to have, by id.
    pub fn take_disks(&mut self, empty: &OwnedFd) -> std::io::Result<Vec<(String, OwnedFd)>> {
        let Request::Boot(config) = &mut self.request else {
            return Ok(Vec::new());
        };
        let mut taken = Vec::new();
        for drive in &mut config.devices.drives {
            let Source::Fd(PassedFd { fd, .. }) = drive.path_on_host else {
                continue;
            };
            let place = usize::try_from(fd).ok();
            if let Some(file) = place.and_then(|at| self.files.get_mut(at)) {
                let disk = std::mem::replace(file, empty.try_clone()?);
                taken.push((drive.drive_id.clone(), disk));
                drive.path_on_host = Source::passed(fd, "empty disk");
            }
        }
        Ok(taken)
    }

    /// Has the machine go on from a saved one of its shape, in place of booting.
    pub fn start_from(self, state: OwnedFd, memory: OwnedFd) -> Vm {
        let Request::Boot(config) = self.request else {
            return self;
        };
        let mut old: Vec<_> = self.files.into_iter().map(Some).collect();
        let mut files = vec![state, memory];
        let mut keep = |source: &Source| match source {
            Source::Fd(PassedFd { fd, name }) => {
                let file = usize::try_from(*fd).ok().and_then(|at| old.get_mut(at));
                let file = file.and_then(Option::take);
                file.map_or_else(
                    || source.clone(),
                    |file| {
                        files.push(file);
                        Source::passed(files.len() as u32 - 1, name.clone().unwrap_or_default())
                    },
                )
            }
            Source::Named(_) => source.clone(),
        };
        let mut load = SnapshotLoad {
            resume_vm: true,
            clock_realtime: true,
            ..SnapshotLoad::new(
                Source::passed(0, "state of the template"),
                Source::passed(1, "memory of the template"),
            )
        };
        for drive in &config.devices.drives {
            load.drive_overrides.push(DriveOverride {
                drive_id: drive.drive_id.clone(),
                path_on_host: Some(keep(&drive.path_on_host)),
                overlay: None,
            });
        }
        for interface in &config.devices.network_interfaces {
            load.network_overrides.push(NetworkOverride {
                iface_id: interface.iface_id.clone(),
                host_dev_name: keep(&interface.host_dev_name),
                queue_fds: Vec::new(),
                guest_mac: interface.guest_mac,
            });
        }
        Vm {
            request: Request::Load(Box::new(Restore::new(load)), None),
            files,
        }
    }

    /// Whether the monitor may have a working set to record.
    pub fn may_record(&self) -> bool {
        matches!(&self.request, Request::Load(restore, _) if restore.load.working_set.is_some())
    }

    /// Takes the monitor's own /proc/PID/pagemap, which the jail does not have: it records by it.
    pub fn set_pagemap(&mut self, pagemap: Option<OwnedFd>) {
        if let (Request::Load(restore, _), Some(pagemap)) = (&mut self.request, pagemap) {
            self.files.push(pagemap);
            let fd = self.files.len() as u32 - 1;
            restore.load.pagemap = Some(PassedFd { fd, name: None });
        }
    }

    /// Whether it is one that was saved; the MAC address on the tap of the jail's own, which says which
    /// address that guest has.
    pub fn saved_mac(&self) -> Option<Option<Mac>> {
        match &self.request {
            Request::Boot(_) => None,
            Request::Load(_, mac) => Some(*mac),
        }
    }

    /// Gives the guest its address on the kernel's command line, unless that has one already. One that
    /// was saved has its address.
    pub fn set_guest_address(&mut self, words: &str, mac: Mac) {
        let Request::Boot(config) = &mut self.request else {
            return;
        };
        if let Some(boot) = &mut config.boot_source {
            let line = boot.boot_args.get_or_insert_with(boot_args::default);
            let (kernel, init) = command_line::split(line);
            if !command_line::parameters(kernel).any(|word| word.starts_with("ip=")) {
                let more = match init {
                    "" => format!("{kernel} {words}"),
                    init => format!("{kernel} {words} -- {init}"),
                };
                *line = more.trim_start().to_owned();
            }
        }
        let mut interfaces = config.devices.network_interfaces.iter_mut();
        if let Some(interface) = interfaces.find(|it| it.host_dev_name.name() == Some(OWN_TAP)) {
            interface.guest_mac.get_or_insert(mac);
        }
    }

    /// The body of the request that configures and starts the machine.
    pub fn request(&self) -> String {
        match &self.request {
            Request::Boot(config) => config.to_request(true),
            Request::Load(restore, _) => restore.to_request(),
        }
    }

    /// The same, with the descriptors that go along.
    pub fn into_request(self) -> (String, Vec<OwnedFd>) {
        (self.request(), self.files)
    }
}

#[cfg(test)]
mod tests {
    use super::super::options::parse;
    use super::*;

    fn null() -> OwnedFd {
        std::fs::File::open("/dev/null").unwrap().into()
    }

    fn request_of(described: Described) -> Request {
        match described.machine {
            Unopened::Configuration(config) => Request::Boot(config),
            Unopened::Snapshot(restoring) => panic!("{restoring:?}"),
        }
    }

    /// Reads a configuration from a file of this text.
    fn described(name: &str, text: &str) -> Result<(Described, Options), AnyError> {
        let folder = crate::testing::Folder::new(name);
        let path = folder.path().join("vm.json");
        std::fs::write(&path, text).unwrap();
        let mut options = Options {
            machine: Machine::Config(path),
            ..Options::default()
        };
        let described = Described::of(&mut options)?.unwrap();
        Ok((described, options))
    }

    const BOOT: &str =
        r#""boot-source": { "kernel_image_path": "/k", "initrd_path": { "fd": 8 } }"#;

    #[test]
    fn configuration_gives_up_the_paths_that_the_jailer_opens() {
        let text = format!(
            r#"{{ {BOOT}, "drives": [{{ "drive_id": "a", "is_root_device": true, "fd": 7 }}],
                 "logger": {{ "log_path": "/l", "level": "Info" }},
                 "serial": {{ "serial_out_path": "/s", "console_socket": "/c" }} }}"#
        );
        let (mut described, options) = described("vm-paths", &text).unwrap();
        assert_eq!(described.inherited(), [8, 7]);
        assert_eq!(options.log, Some("/l".into()));
        assert_eq!(options.console, Console::File("/s".into()));
        assert_eq!(options.console_socket, Some("/c".into()));
        for member in ["\"logger\": { \"fd\": 5 }", "\"serial\": { \"fd\": 5 }"] {
            let text = format!(r#"{{ {BOOT}, "drives": [], {member} }}"#);
            let error = self::described("vm-fd", &text).unwrap_err();
            assert!(
                matches!(error.downcast_ref(), Some(SpecError::NotAPath(_))),
                "{error}"
            );
        }
    }

    #[test]
    fn files_when_more_than_go_with_a_request_are_refused_with_the_number_that_does() {
        let opened = |drives: usize| {
            let drive = r#"{ "drive_id": "a", "is_root_device": false, "is_read_only": true,
                             "path_on_host": "/proc/self/exe" }"#;
            let drives = vec![drive; drives].join(", ");
            let text = format!(
                r#"{{ "boot-source": {{ "kernel_image_path": "/proc/self/exe" }}, "drives": [{drives}] }}"#
            );
            let (described, _) = described("vm-files", &text).unwrap();
            described.open(&mut Passed::nothing())
        };
        assert_eq!(opened(FILES_MAX - 1).unwrap().files.len(), FILES_MAX);
        let error = opened(FILES_MAX).unwrap_err().to_string();
        assert!(error.contains(" 28 files and taps"), "{error}");
        assert!(error.contains("at most 27 "), "{error}");
    }

    #[test]
    fn request_has_descriptors_with_names_in_place_of_paths() {
        let words = "--kernel /dev/null --net user --net fd:9 --cmdline quiet";
        let options = parse(words.split(' ').map(Into::into).collect());
        let described = Described::of(&mut options.unwrap().unwrap()).unwrap();
        let described = described.unwrap();
        assert_eq!(described.own_tap, Some(OwnTap::User));
        let mut vm = Vm {
            request: request_of(described),
            files: vec![null()],
        };
        vm.set_guest_address("ip=1", "06:00:00:00:00:01".parse().unwrap());
        vm.set_guest_address("ip=2", "06:00:00:00:00:02".parse().unwrap());
        vm.set_tap(null());
        vm.set_console_socket(null());
        assert_eq!(vm.files.len(), 3);
        let read = config::parse_vm(vm.request().as_bytes()).unwrap();
        let config::VmRequest::Configuration(read, start) = read else {
            panic!("{read:?}")
        };
        assert!(start);
        assert_eq!(read.boot_source.unwrap().boot_args.unwrap(), "quiet ip=1");
        let own = &read.devices.network_interfaces[0];
        assert_eq!(own.host_dev_name, Source::passed(1, OWN_TAP));
        assert_eq!(own.guest_mac, "06:00:00:00:00:01".parse().ok());
        let socket = read.serial.unwrap().console_socket;
        assert_eq!(socket, Some(Source::passed(2, CONSOLE_SOCKET)));
    }

    #[test]
    fn address_goes_before_the_words_for_init_and_a_given_one_stays() {
        for (line, expected) in [
            ("quiet -- single", "quiet ip=1 -- single"),
            ("-- single", "ip=1 -- single"),
            ("quiet\t--\tip=2", "quiet ip=1 -- ip=2"),
            ("a=\" -- \"", "a=\" -- \" ip=1"),
            ("ip=9", "ip=9"),
        ] {
            let config = r#"{ "boot-source": { "kernel_image_path": "/k" }, "drives": [] }"#;
            let mut vm = Vm {
                request: request_of(described("vm-address", config).unwrap().0),
                files: Vec::new(),
            };
            let boot_source = |vm: &mut Vm| match &mut vm.request {
                Request::Boot(config) => config.boot_source.take().unwrap(),
                Request::Load(..) => unreachable!(),
            };
            let mut boot = boot_source(&mut vm);
            boot.boot_args = Some(line.into());
            vm.request = Request::Boot(Box::new(VmConfig {
                boot_source: Some(boot),
                ..VmConfig::default()
            }));
            vm.set_guest_address("ip=1", "06:00:00:00:00:01".parse().unwrap());
            assert_eq!(boot_source(&mut vm).boot_args.unwrap(), expected);
        }
    }
}
