//! Tests of the module above.

use super::*;
use crate::vmm::devices::Reopened;
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
        let open = Devices::opening(all, Reopened::default()).unwrap();
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

#[test]
fn default_boot_args_when_there_is_an_initrd_let_modules_be_loaded() {
    assert_eq!(default_boot_args(false), DEFAULT_BOOT_ARGS);
    let line = default_boot_args(true);
    assert!(!line.contains("nomodule"), "{line}");
    assert_eq!(line.len() + "nomodule ".len(), DEFAULT_BOOT_ARGS.len());
}
