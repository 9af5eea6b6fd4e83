//! What was PUT so far, and the rules that hold between its parts.

use super::cpu::CpuConfig;
use super::{
    BootSource, ConfigError, Devices, Drive, DriveUpdate, HugePages, IoEngine, MachineConfig,
    MachineConfigUpdate, NetworkInterface, NetworkUpdate, RateLimiterConfig, Serial, Source,
    TokenBucketConfig, VmConfig,
};
use crate::wire::DEFAULT_BOOT_ARGS;
use crate::wire::limits::{COMMAND_LINE_MAX, DEVICES_MAX, MTU_MIN, TAP_NAME_MAX, VCPUS_MAX};

/// What was asked for so far. Each part is checked for itself, and against the others, as it
/// comes; a part that is refused changes nothing.
#[derive(Clone, Debug, Default)]
pub struct Draft {
    machine: MachineConfig,
    boot_source: Option<BootSource>,
    /// In the order of the guest's devices: the root drive first.
    drives: Vec<Drive>,
    networks: Vec<NetworkInterface>,
    cpu: Option<CpuConfig>,
    serial: Serial,
}

/// All that boot needs, checked together.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// The machine.
    pub machine: MachineConfig,
    /// The kernel.
    pub kernel_image_path: Source,
    /// The initial RAM disk.
    pub initrd_path: Option<Source>,
    /// The kernel command line as the user wants it, or the default one.
    pub boot_args: String,
    /// The disks in the order of their devices.
    pub drives: Vec<Drive>,
    /// The network interfaces in the order of their devices, after the disks.
    pub networks: Vec<NetworkInterface>,
    /// CPUID and MSR masks.
    pub cpu: Option<CpuConfig>,
    /// The console.
    pub serial: Serial,
}

impl Draft {
    /// The machine as asked for so far.
    pub fn machine_config(&self) -> &MachineConfig {
        &self.machine
    }

    /// The kernel, if one was named.
    pub fn boot_source(&self) -> Option<&BootSource> {
        self.boot_source.as_ref()
    }

    /// The disks in the order of their devices.
    pub fn drives(&self) -> &[Drive] {
        &self.drives
    }

    /// The network interfaces in the order of their devices.
    pub fn networks(&self) -> &[NetworkInterface] {
        &self.networks
    }

    /// Takes the place of all that was said of the machine.
    ///
    /// # Errors
    /// Numbers out of bounds.
    pub fn put_machine_config(&mut self, machine: MachineConfig) -> Result<(), ConfigError> {
        check_machine(&machine)?;
        self.machine = machine;
        Ok(())
    }

    /// Changes what is named, keeps the rest.
    ///
    /// # Errors
    /// Numbers out of bounds.
    pub fn patch_machine_config(&mut self, update: MachineConfigUpdate) -> Result<(), ConfigError> {
        let old = &self.machine;
        self.put_machine_config(MachineConfig {
            vcpu_count: update.vcpu_count.unwrap_or(old.vcpu_count),
            mem_size_mib: update.mem_size_mib.unwrap_or(old.mem_size_mib),
            smt: update.smt.unwrap_or(old.smt),
            cpu_template: None,
            track_dirty_pages: update.track_dirty_pages.unwrap_or(old.track_dirty_pages),
            huge_pages: update.huge_pages.unwrap_or(old.huge_pages),
        })
    }

    /// Whether [`Draft::put_boot_source`] will take this: to be asked before files are opened.
    ///
    /// # Errors
    /// A command line that is too long or holds a zero.
    pub fn check_boot_source(&self, boot_source: &BootSource) -> Result<(), ConfigError> {
        let boot_args = boot_source.boot_args.as_deref().unwrap_or_default();
        if boot_args.len() > COMMAND_LINE_MAX {
            return Err(ConfigError::BootArgsTooLong(boot_args.len()));
        }
        if boot_args.contains('\0') {
            return Err(ConfigError::BootArgsZero);
        }
        Ok(())
    }

    /// Names the kernel.
    ///
    /// # Errors
    /// As [`Draft::check_boot_source`].
    pub fn put_boot_source(&mut self, boot_source: BootSource) -> Result<(), ConfigError> {
        self.check_boot_source(&boot_source)?;
        self.boot_source = Some(boot_source);
        Ok(())
    }

    /// Whether [`Draft::put_drive`] will take this: to be asked before files are opened.
    ///
    /// # Errors
    /// A second root drive, or a vhost-user socket.
    pub fn check_drive(&self, drive: &Drive) -> Result<(), ConfigError> {
        if drive.socket.is_some() {
            return Err(ConfigError::VhostUser(drive.drive_id.clone()));
        }
        match self.drives.iter().find(|d| d.is_root_device) {
            Some(root) if drive.is_root_device && root.drive_id != drive.drive_id => {
                Err(ConfigError::SecondRoot {
                    drive: drive.drive_id.clone(),
                    root: root.drive_id.clone(),
                })
            }
            _ => Ok(()),
        }
    }

    /// Adds a drive, or takes the place of the one with the same id. A root drive comes first.
    ///
    /// # Errors
    /// As [`Draft::check_drive`].
    pub fn put_drive(&mut self, mut drive: Drive) -> Result<(), ConfigError> {
        self.check_drive(&drive)?;
        drive.is_read_only = Some(drive.read_only());
        drive.io_engine = Some(drive.io_engine.unwrap_or(IoEngine::Sync));
        drive.rate_limiter = RateLimiterConfig::in_force(drive.rate_limiter);
        let root = drive.is_root_device;
        match self
            .drives
            .iter()
            .position(|d| d.drive_id == drive.drive_id)
        {
            None if root => self.drives.insert(0, drive),
            None => self.drives.push(drive),
            Some(place) => {
                if let Some(old) = self.drives.get_mut(place) {
                    *old = drive;
                }
                if root {
                    // The two change places, as clients know it: the guest names disks by order.
                    self.drives.swap(0, place);
                }
            }
        }
        Ok(())
    }

    /// Notes what a PATCH changed in a drive of the running VM.
    ///
    /// # Errors
    /// As [`Draft::check_drive_update`].
    pub fn patch_drive(&mut self, update: &DriveUpdate) -> Result<(), ConfigError> {
        self.check_drive_update(update)?;
        if let Some(drive) = self
            .drives
            .iter_mut()
            .find(|d| d.drive_id == update.drive_id)
        {
            if let Some(path) = &update.path_on_host {
                drive.path_on_host.clone_from(path);
            }
            drive.rate_limiter =
                RateLimiterConfig::patched(drive.rate_limiter, update.rate_limiter);
        }
        Ok(())
    }

    /// Whether [`Draft::patch_drive`] will take this.
    ///
    /// # Errors
    /// No such drive, or nothing to change.
    pub fn check_drive_update(&self, update: &DriveUpdate) -> Result<(), ConfigError> {
        let id = &update.drive_id;
        if !self.drives.iter().any(|d| d.drive_id == *id) {
            return Err(ConfigError::NoSuchDrive(id.clone()));
        }
        if update.path_on_host.is_none() && update.rate_limiter.is_none() {
            return Err(ConfigError::NothingToPatch(id.clone()));
        }
        Ok(())
    }

    /// Whether [`Draft::put_network`] will take this: to be asked before the tap is opened.
    ///
    /// # Errors
    /// A tap or MAC that another interface has, a name the host cannot have, a wrong MTU.
    pub fn check_network(&self, network: &NetworkInterface) -> Result<(), ConfigError> {
        let id = || network.iface_id.clone();
        // What a descriptor is a tap of is the client's affair: a name says nothing across
        // network namespaces.
        let tap = network.host_dev_name.name().unwrap_or_default();
        if tap.len() > TAP_NAME_MAX
            || tap.contains(['/', '\0'])
            || tap.contains(char::is_whitespace)
        {
            return Err(ConfigError::TapName {
                iface: id(),
                tap: tap.into(),
            });
        }
        if let Some(mtu) = network.mtu.filter(|mtu| *mtu < MTU_MIN) {
            return Err(ConfigError::Mtu { iface: id(), mtu });
        }
        for other in &self.networks {
            if other.iface_id == network.iface_id {
                continue;
            }
            // An empty name, or one with a `%d`, lets the host choose.
            if other.host_dev_name.name() == Some(tap) && !tap.is_empty() && !tap.contains('%') {
                return Err(ConfigError::TapInUse {
                    iface: id(),
                    tap: tap.into(),
                    other: other.iface_id.clone(),
                });
            }
            if let Some(mac) = network
                .guest_mac
                .filter(|_| other.guest_mac == network.guest_mac)
            {
                return Err(ConfigError::MacInUse {
                    iface: id(),
                    mac,
                    other: other.iface_id.clone(),
                });
            }
        }
        Ok(())
    }

    /// Adds a network interface, or takes the place of the one with the same id.
    ///
    /// # Errors
    /// As [`Draft::check_network`].
    pub fn put_network(&mut self, mut network: NetworkInterface) -> Result<(), ConfigError> {
        self.check_network(&network)?;
        network.rx_rate_limiter = RateLimiterConfig::in_force(network.rx_rate_limiter);
        network.tx_rate_limiter = RateLimiterConfig::in_force(network.tx_rate_limiter);
        match self
            .networks
            .iter_mut()
            .find(|n| n.iface_id == network.iface_id)
        {
            Some(old) => *old = network,
            None => self.networks.push(network),
        }
        Ok(())
    }

    /// Notes what a PATCH changed in a network interface of the running VM.
    ///
    /// # Errors
    /// No such interface.
    pub fn patch_network(&mut self, update: &NetworkUpdate) -> Result<(), ConfigError> {
        let network = self
            .networks
            .iter_mut()
            .find(|n| n.iface_id == update.iface_id)
            .ok_or_else(|| ConfigError::NoSuchNetwork(update.iface_id.clone()))?;
        network.rx_rate_limiter =
            RateLimiterConfig::patched(network.rx_rate_limiter, update.rx_rate_limiter);
        network.tx_rate_limiter =
            RateLimiterConfig::patched(network.tx_rate_limiter, update.tx_rate_limiter);
        Ok(())
    }

    /// Sets the masks of CPUID and MSRs.
    pub fn put_cpu_config(&mut self, cpu: CpuConfig) {
        self.cpu = Some(cpu);
    }

    /// Sets where the console goes.
    pub fn put_serial(&mut self, mut serial: Serial) {
        serial.rate_limiter = serial.rate_limiter.and_then(TokenBucketConfig::in_force);
        self.serial = serial;
    }

    /// What `GET /vm/config` answers.
    pub fn vm_config(&self) -> VmConfig {
        VmConfig {
            machine_config: Some(self.machine.clone()),
            boot_source: self.boot_source.clone(),
            devices: Devices {
                drives: self.drives.clone(),
                network_interfaces: self.networks.clone(),
            },
            ..VmConfig::default()
        }
    }

    /// Judges all of it together.
    ///
    /// # Errors
    /// No kernel, more devices than there is room for, or more memory than there are addresses.
    pub fn check(&self) -> Result<Config, ConfigError> {
        let boot_source = self.boot_source.clone().ok_or(ConfigError::NoBootSource)?;
        let (drives, networks) = (self.drives.len(), self.networks.len());
        if drives.saturating_add(networks) > DEVICES_MAX {
            return Err(ConfigError::TooManyDevices { drives, networks });
        }
        let mib = self.machine.mem_size_mib;
        if mib.checked_mul(1 << 20).is_none() {
            return Err(ConfigError::MemoryUnaddressable(mib));
        }
        Ok(Config {
            machine: self.machine.clone(),
            kernel_image_path: boot_source.kernel_image_path,
            initrd_path: boot_source.initrd_path,
            boot_args: boot_source
                .boot_args
                .unwrap_or_else(|| DEFAULT_BOOT_ARGS.into()),
            drives: self.drives.clone(),
            networks: self.networks.clone(),
            cpu: self.cpu.clone(),
            serial: self.serial.clone(),
        })
    }
}

fn check_machine(machine: &MachineConfig) -> Result<(), ConfigError> {
    let count = machine.vcpu_count;
    let even = count.is_multiple_of(2);
    if count == 0 || count > VCPUS_MAX || (machine.smt && count != 1 && !even) {
        return Err(ConfigError::VcpuCount {
            count,
            smt: machine.smt,
        });
    }
    let mib = machine.mem_size_mib;
    let whole_pages = match machine.huge_pages {
        HugePages::None => true,
        HugePages::Transparent | HugePages::TwoMib => mib.is_multiple_of(2),
    };
    if mib == 0 || !whole_pages {
        return Err(ConfigError::MemorySize(mib));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::json;

    fn drive(id: &str, root: bool) -> Drive {
        json::parse(
            format!(r#"{{"drive_id":"{id}","path_on_host":"/{id}","is_root_device":{root}}}"#)
                .as_bytes(),
        )
        .unwrap()
    }

    fn network(id: &str, tap: &str, rest: &str) -> NetworkInterface {
        json::parse(format!(r#"{{"iface_id":"{id}","host_dev_name":"{tap}"{rest}}}"#).as_bytes())
            .unwrap()
    }

    fn bucket(size: u64, refill_time: u64) -> TokenBucketConfig {
        TokenBucketConfig {
            size,
            one_time_burst: Some(0),
            refill_time,
        }
    }

    fn ids(draft: &Draft) -> Vec<&str> {
        draft.drives().iter().map(|d| d.drive_id.as_str()).collect()
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
            let mut draft = Draft::default();
            let result = draft.put_machine_config(machine.clone());
            assert_eq!(result.is_ok(), taken, "{machine:?}: {result:?}");
            assert_eq!(
                *draft.machine_config() == machine,
                taken || machine == MachineConfig::default()
            );
        }
    }

    #[test]
    fn machine_when_patched_keeps_the_rest() {
        let mut draft = Draft::default();
        let patch = |text: &str| json::parse::<MachineConfigUpdate>(text.as_bytes()).unwrap();
        draft
            .patch_machine_config(patch(r#"{"smt":true,"vcpu_count":2}"#))
            .unwrap();
        draft
            .patch_machine_config(patch(r#"{"track_dirty_pages":true}"#))
            .unwrap();
        assert!(
            draft
                .patch_machine_config(patch(r#"{"vcpu_count":3}"#))
                .is_err()
        );
        assert_eq!(
            *draft.machine_config(),
            MachineConfig {
                vcpu_count: 2,
                smt: true,
                track_dirty_pages: true,
                ..MachineConfig::default()
            }
        );
        draft.put_machine_config(MachineConfig::default()).unwrap();
        assert!(!draft.machine_config().smt);
    }

    #[test]
    fn boot_args_when_put_may_have_2047_bytes() {
        let mut draft = Draft::default();
        let source = |boot_args: String| BootSource {
            kernel_image_path: "k".into(),
            initrd_path: None,
            boot_args: Some(boot_args),
        };
        draft.put_boot_source(source("a".repeat(2047))).unwrap();
        let error = draft.put_boot_source(source("a".repeat(2048))).unwrap_err();
        assert_eq!(error, ConfigError::BootArgsTooLong(2048));
        assert!(draft.put_boot_source(source("a\0b".into())).is_err());
        assert!(draft.put_boot_source(source(String::new())).is_ok());
        assert_eq!(draft.check().unwrap().boot_args, "");
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
            let mut draft = Draft::default();
            for (id, root) in *puts {
                draft.put_drive(drive(id, *root)).unwrap();
            }
            assert_eq!(ids(&draft), *order);
        }
    }

    #[test]
    fn drive_when_a_second_root_or_vhost_user_is_refused() {
        let mut draft = Draft::default();
        draft.put_drive(drive("r", true)).unwrap();
        let error = draft.put_drive(drive("s", true)).unwrap_err().to_string();
        assert!(
            error.contains("root block device already exists: `r`"),
            "{error}"
        );
        let mut socket = drive("v", false);
        socket.socket = Some("/s".into());
        assert!(draft.put_drive(socket).is_err());
        assert_eq!(ids(&draft), ["r"]);
    }

    #[test]
    fn drive_when_put_is_reported_with_its_defaults() {
        let mut draft = Draft::default();
        let mut limited = drive("a", false);
        limited.rate_limiter = Some(RateLimiterConfig {
            bandwidth: Some(bucket(10, 100)),
            ops: Some(bucket(1, 0)),
        });
        draft.put_drive(limited).unwrap();
        let reported = serde_json::to_value(draft.vm_config()).unwrap();
        assert_eq!(
            reported["drives"][0],
            serde_json::json!({"drive_id":"a","partuuid":null,"is_root_device":false,
                "cache_type":"Unsafe","is_read_only":false,"path_on_host":"/a",
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
    fn limiter_when_patched_changes_only_the_buckets_given() {
        let (ten, none) = (Some(bucket(10, 100)), Some(bucket(0, 0)));
        let limiter = |bandwidth, ops| Some(RateLimiterConfig { bandwidth, ops });
        let kept = Some(TokenBucketConfig {
            one_time_burst: None,
            ..bucket(10, 100)
        });
        // before, update, after
        let cases = [
            (None, limiter(ten, None), limiter(kept, None)),
            (
                limiter(kept, kept),
                limiter(none, None),
                limiter(None, kept),
            ),
            (limiter(kept, None), limiter(none, None), None),
            (limiter(kept, kept), None, limiter(kept, kept)),
            (None, limiter(None, None), None),
        ];
        for (before, update, after) in cases {
            assert_eq!(RateLimiterConfig::patched(before, update), after);
        }
    }

    #[test]
    fn drive_when_patched_needs_something_to_change() {
        let mut draft = Draft::default();
        draft.put_drive(drive("a", false)).unwrap();
        let mut patch = |text: &str| {
            let update = json::parse::<DriveUpdate>(text.as_bytes()).unwrap();
            draft.patch_drive(&update)
        };
        assert!(patch(r#"{"drive_id":"b","path_on_host":"x"}"#).is_err());
        assert!(patch(r#"{"drive_id":"a"}"#).is_err());
        assert!(patch(r#"{"drive_id":"a","rate_limiter":null}"#).is_err());
        assert!(patch(r#"{"drive_id":"a","rate_limiter":{}}"#).is_ok());
        assert!(patch(r#"{"drive_id":"a","path_on_host":"/new"}"#).is_ok());
        assert_eq!(draft.drives().first().unwrap().path_on_host, "/new".into());
    }

    #[test]
    fn network_when_put_shares_neither_tap_nor_mac() {
        let mut draft = Draft::default();
        let mac = r#","guest_mac":"AA:00:00:00:00:01""#;
        draft.put_network(network("a", "tap0", mac)).unwrap();
        draft.put_network(network("a", "tap0", mac)).unwrap();
        assert!(draft.put_network(network("b", "tap0", "")).is_err());
        let error = draft.put_network(network("b", "tap1", mac)).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("The MAC address is already in use: aa:00:00:00:00:01"),
            "{error}"
        );
        draft.put_network(network("b", "tap1", "")).unwrap();
        draft.put_network(network("c", "tap%d", "")).unwrap();
        draft.put_network(network("d", "tap%d", "")).unwrap();
        assert_eq!(draft.networks().len(), 4);
        draft
            .put_network(network("a", "tap9", r#","mtu":1500"#))
            .unwrap();
        assert_eq!(
            draft.networks().first().unwrap().host_dev_name,
            "tap9".into()
        );
    }

    #[test]
    fn network_when_out_of_bounds_is_refused() {
        for (tap, rest, taken) in [
            ("t", r#","mtu":67"#, false),
            ("t", r#","mtu":68"#, true),
            ("t", r#","mtu":65535"#, true),
            ("fifteen_letters", "", true),
            ("sixteen_letters_", "", false),
            ("a/b", "", false),
            ("a b", "", false),
            ("", "", true),
        ] {
            let result = Draft::default().put_network(network("a", tap, rest));
            assert_eq!(result.is_ok(), taken, "{tap} {rest}");
        }
    }

    #[test]
    fn network_when_patched_may_be_without_fields() {
        let mut draft = Draft::default();
        draft.put_network(network("a", "t", "")).unwrap();
        let mut patch = |text: &str| {
            let update = json::parse::<NetworkUpdate>(text.as_bytes()).unwrap();
            draft.patch_network(&update)
        };
        assert!(patch(r#"{"iface_id":"a"}"#).is_ok());
        assert!(patch(r#"{"iface_id":"b"}"#).is_err());
        assert!(
            patch(r#"{"iface_id":"a","tx_rate_limiter":{"ops":{"size":1,"refill_time":1}}}"#)
                .is_ok()
        );
        assert!(draft.networks().first().unwrap().tx_rate_limiter.is_some());
    }

    #[test]
    fn check_when_parts_do_not_fit_together_says_why() {
        let mut draft = Draft::default();
        assert_eq!(draft.check(), Err(ConfigError::NoBootSource));
        draft
            .put_boot_source(json::parse(br#"{"kernel_image_path":"/k"}"#).unwrap())
            .unwrap();
        assert_eq!(draft.check().unwrap().boot_args, DEFAULT_BOOT_ARGS);
        for i in 0..DEVICES_MAX {
            draft.put_drive(drive(&format!("d{i}"), false)).unwrap();
        }
        draft.check().unwrap();
        draft.put_network(network("n", "t", "")).unwrap();
        let error = draft.check().unwrap_err().to_string();
        assert!(
            error.contains("19 drives and 1 network interfaces"),
            "{error}"
        );
        let mut draft = Draft::default();
        draft
            .put_boot_source(json::parse(br#"{"kernel_image_path":"/k"}"#).unwrap())
            .unwrap();
        draft
            .put_machine_config(MachineConfig {
                mem_size_mib: u64::MAX,
                ..MachineConfig::default()
            })
            .unwrap();
        assert_eq!(
            draft.check(),
            Err(ConfigError::MemoryUnaddressable(u64::MAX))
        );
    }
}
