//! A whole configuration in one piece of JSON: `--config-file`, `PUT /vm`, and the answer to
//! `GET /vm/config`.

use std::collections::BTreeMap;

use serde::de::IgnoredAny;
use serde::ser::SerializeMap;
use serde::{Deserialize, Serialize, Serializer};

use super::json::{self, JsonError, optional_object, some_object};
use super::{
    Backing, BootSource, CpuConfigSource, DeviceKind, Devices, Logger, MachineConfig, Metrics,
    Restore, Serial, Source,
};

/// A whole configuration, as it is written in a file or in the body of `PUT /vm`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct VmConfig {
    /// The kernel. A file must name one.
    #[serde(deserialize_with = "some_object")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub boot_source: Option<BootSource>,
    /// The machine.
    #[serde(default, deserialize_with = "optional_object")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub machine_config: Option<MachineConfig>,
    /// CPUID and MSR masks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_config: Option<CpuConfigSource>,
    /// The log.
    #[serde(default, deserialize_with = "optional_object")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logger: Option<Logger>,
    /// The sink of the metrics.
    #[serde(default, deserialize_with = "optional_object")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metrics: Option<Metrics>,
    /// The console.
    #[serde(default, deserialize_with = "optional_object")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<Serial>,
    /// Disks, network interfaces: a section for each kind. Read by [`parse_file`].
    #[serde(flatten, skip_deserializing)]
    pub devices: Devices,
}

/// Sections of Firecracker's configuration for devices that it has beside disks and network
/// interfaces; those that there is no kind for are out of scope.
const OTHER_DEVICES: [&str; 6] = [
    "balloon",
    "vsock",
    "entropy",
    "mmds-config",
    "memory-hotplug",
    "pmem",
];

fn out_of_scope() -> impl Iterator<Item = &'static str> {
    OTHER_DEVICES
        .into_iter()
        .filter(|name| DeviceKind::of_section(name).is_none())
}

/// The sections that are not about devices.
const SECTIONS: [&str; 6] = [
    "boot-source",
    "machine-config",
    "cpu-config",
    "logger",
    "metrics",
    "serial",
];

/// Reads a config file. Sections that are not known are ignored, as Firecracker does.
///
/// # Errors
/// What is not JSON, a wrong member, or a section that is out of scope and neither null nor empty.
pub fn parse_file(bytes: &[u8]) -> Result<VmConfig, JsonError> {
    if std::str::from_utf8(bytes).is_err() {
        return Err(JsonError::new("it holds bytes that are not UTF-8"));
    }
    let mut config: VmConfig = json::parse(bytes)?;
    config.devices = json::parse(bytes)?;
    let all: BTreeMap<String, Given> = json::parse(bytes)?;
    for name in out_of_scope() {
        if all.get(name).is_some_and(|given| !given.is_nothing()) {
            return Err(JsonError::new(format!(
                "the section `{name}` is out of scope: there is no such device"
            )));
        }
    }
    Ok(config)
}

/// What a section holds, as far as it matters for one that is out of scope.
#[derive(Deserialize)]
#[serde(untagged)]
enum Given {
    List(Vec<IgnoredAny>),
    Other(Option<IgnoredAny>),
}

impl Given {
    fn is_nothing(&self) -> bool {
        match self {
            Given::List(list) => list.is_empty(),
            Given::Other(value) => value.is_none(),
        }
    }
}

/// The body of `PUT /vm`.
#[derive(Clone, Debug, PartialEq)]
pub enum VmRequest {
    /// A config file's sections, and whether to start.
    Configuration(Box<VmConfig>, bool),
    /// A snapshot, and what it does not hold.
    Snapshot(Box<Restore>),
}

/// Reads the body of `PUT /vm`: a config file's sections, no others, and whether to start; or a
/// snapshot.
///
/// # Errors
/// As [`parse_file`], and for a section that is not known.
pub fn parse_vm(bytes: &[u8]) -> Result<VmRequest, JsonError> {
    #[derive(Deserialize)]
    struct Start {
        #[serde(default)]
        start: bool,
    }
    let names: BTreeMap<String, IgnoredAny> = json::parse(bytes)?;
    let devices = DeviceKind::ALL.iter().map(|kind| kind.section());
    let known: Vec<&str> = devices
        .chain(SECTIONS)
        .chain(out_of_scope())
        .chain(["snapshot", "start"])
        .collect();
    if let Some(name) = names.keys().find(|name| !known.contains(&name.as_str())) {
        let known = known.join("`, `");
        return Err(JsonError::new(format!(
            "unknown field `{name}`, expected one of `{known}`"
        )));
    }
    if names.contains_key("snapshot") {
        let restore = Restore::parse(bytes)?;
        return Ok(VmRequest::Snapshot(Box::new(restore)));
    }
    let Start { start } = json::parse(bytes)?;
    let config = Box::new(parse_file(bytes)?);
    Ok(VmRequest::Configuration(config, start))
}

impl VmConfig {
    /// What of the host it names, and what each must be good for.
    pub fn sources(&mut self) -> Vec<(Backing, &mut Source)> {
        let mut found = Vec::new();
        if let Some(boot) = &mut self.boot_source {
            found.push((Backing::Kernel, &mut boot.kernel_image_path));
            found.extend(
                boot.initrd_path
                    .as_mut()
                    .map(|initrd| (Backing::Initrd, initrd)),
            );
        }
        found.extend(self.devices.sources());
        if let Some(CpuConfigSource::File(source)) = &mut self.cpu_config {
            found.push((Backing::CpuConfig, source));
        }
        let logger = self
            .logger
            .as_mut()
            .and_then(|logger| logger.log_path.as_mut());
        found.extend(logger.map(|source| (Backing::Log, source)));
        if let Some(metrics) = &mut self.metrics {
            found.push((Backing::Metrics, &mut metrics.metrics_path));
        }
        if let Some(serial) = &mut self.serial {
            let output = serial.serial_out_path.as_mut();
            found.extend(output.map(|source| (Backing::ConsoleOutput, source)));
            let socket = serial.console_socket.as_mut();
            found.extend(socket.map(|source| (Backing::ConsoleSocket, source)));
        }
        found
    }

    /// As a body of `PUT /vm`, or a config file: the sections that there are.
    pub fn to_request(&self, start: bool) -> String {
        #[derive(Serialize)]
        struct Request<'a> {
            #[serde(flatten)]
            config: &'a VmConfig,
            start: bool,
        }
        let config = self;
        // Nothing in it is what JSON does not have.
        serde_json::to_string(&Request { config, start }).unwrap_or_default()
    }
}

/// The sections of the answer to `GET /vm/config`, in the order in which Firecracker has them.
const REPORTED: [&str; 13] = [
    "balloon",
    "drives",
    "boot-source",
    "cpu-config",
    "logger",
    "machine-config",
    "metrics",
    "mmds-config",
    "network-interfaces",
    "vsock",
    "entropy",
    "pmem",
    "memory-hotplug",
];

/// The answer to `GET /vm/config`.
#[derive(Debug)]
pub struct Reported<'a>(pub &'a VmConfig);

impl Serialize for Reported<'_> {
    /// All sections that Firecracker's clients may look for, those out of scope as null.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Reported(config) = self;
        let no_kernel = BootSource {
            kernel_image_path: "".into(),
            initrd_path: None,
            boot_args: None,
        };
        let mut map = serializer.serialize_map(None)?;
        for name in REPORTED {
            match (DeviceKind::of_section(name), name) {
                (Some(kind), _) => config.devices.write(kind, &mut map)?,
                (None, "boot-source") => {
                    let boot = config.boot_source.as_ref().unwrap_or(&no_kernel);
                    map.serialize_entry(name, boot)?;
                }
                (None, "machine-config") => map.serialize_entry(name, &config.machine_config)?,
                (None, "pmem") => map.serialize_entry(name, &[(); 0])?,
                _ => map.serialize_entry(name, &None::<()>)?,
            }
        }
        map.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: &str = r#""boot-source":{"kernel_image_path":"k"},"drives":[]"#;

    #[test]
    fn file_when_good_is_taken() {
        let text = format!(
            r#"{{{SMALL},"machine-config":{{"vcpu_count":2,"mem_size_mib":64}},
            "network-interfaces":[{{"iface_id":"e","host_dev_name":"t"}}],
            "cpu-config":"/masks.json","logger":{{"level":"debug"}},
            "metrics":{{"metrics_path":"m"}},"serial":{{}},
            "vsock":null,"balloon":null,"pmem":[],"something":{{"else":1}}}}"#
        );
        let config = parse_file(text.as_bytes()).unwrap();
        assert_eq!(config.machine_config.unwrap().vcpu_count, 2);
        assert_eq!(config.devices.network_interfaces.len(), 1);
        assert_eq!(
            config.cpu_config,
            Some(CpuConfigSource::File("/masks.json".into()))
        );
        assert!(config.serial.is_some() && config.metrics.is_some() && config.logger.is_some());
    }

    #[test]
    fn file_when_it_is_a_reported_configuration_is_taken_again() {
        let config = parse_file(format!("{{{SMALL}}}").as_bytes()).unwrap();
        let reported = serde_json::to_vec(&Reported(&config)).unwrap();
        assert_eq!(parse_file(&reported), Ok(config));
    }

    #[test]
    fn file_when_bad_says_why() {
        let with = |section: &str| format!("{{{SMALL},{section}}}").into_bytes();
        let cases: Vec<(Vec<u8>, &str)> = vec![
            (b"{}".to_vec(), "missing field `boot-source`"),
            (
                br#"{"boot-source":{"kernel_image_path":"k"}}"#.to_vec(),
                "missing field `drives`",
            ),
            (b"\xff".to_vec(), "not UTF-8"),
            (b"".to_vec(), "EOF"),
            (with(r#""vsock":{}"#), "`vsock` is out of scope"),
            (with(r#""balloon":1"#), "`balloon` is out of scope"),
            (with(r#""pmem":[{}]"#), "`pmem` is out of scope"),
            (with(r#""mmds-config":{}"#), "`mmds-config` is out of scope"),
            (with(r#""drives":[]"#), "duplicate field `drives`"),
            (with(r#""network-interfaces":null"#), "network-interfaces"),
            (
                with(r#""machine-config":{"vcpu_count":1,"mem_size_mib":1,"y":1}"#),
                "unknown field `y`",
            ),
        ];
        for (text, reason) in cases {
            let error = parse_file(&text).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
    }

    #[test]
    fn vm_when_parsed_knows_start_and_refuses_strangers() {
        let parse = |rest: &str| parse_vm(format!("{{{SMALL}{rest}}}").as_bytes());
        let starts = |rest: &str| match parse(rest).unwrap() {
            VmRequest::Configuration(_, start) => start,
            VmRequest::Snapshot(_) => panic!("no snapshot was named"),
        };
        assert!(!starts(""));
        assert!(starts(r#","start":true"#));
        assert!(parse(r#","start":null"#).is_err());
        assert!(parse(r#","vsock":{}"#).is_err());
        let error = parse(r#","something":1"#).unwrap_err().to_string();
        assert!(error.starts_with("unknown field `something`"), "{error}");
    }

    #[test]
    fn config_when_written_as_a_request_is_read_back() {
        let text = format!(
            r#"{{{SMALL},"machine-config":{{"vcpu_count":2,"mem_size_mib":64}},
            "network-interfaces":[{{"iface_id":"e","host_dev_name":"t"}}],
            "cpu-config":{{"kvm_capabilities":["!121"]}},"logger":{{"level":"debug"}},
            "metrics":{{"metrics_path":"m"}},"serial":{{"fd":1}}}}"#
        );
        let mut config = parse_file(text.as_bytes()).unwrap();
        for (place, (_, source)) in (0..).zip(config.sources()) {
            *source = Source::passed(place, source.to_string());
        }
        let request = config.to_request(true);
        let read = |config: VmConfig, start| Ok(VmRequest::Configuration(Box::new(config), start));
        assert_eq!(parse_vm(request.as_bytes()), read(config, true));
        let small = parse_file(format!("{{{SMALL}}}").as_bytes()).unwrap();
        let request = small.to_request(false);
        assert!(
            !request.contains("null,\"metrics\"") && !request.contains("logger"),
            "{request}"
        );
        assert_eq!(parse_vm(request.as_bytes()), read(small, false));
    }

    #[test]
    fn vm_when_it_is_a_snapshot_has_what_a_snapshot_does_not_hold() {
        let load = r#""snapshot":{"snapshot_path":"s","mem_file_path":"m"}"#;
        let parse = |rest: &str| parse_vm(format!("{{{load}{rest}}}").as_bytes());
        let read = |rest: &str| match parse(rest).unwrap() {
            VmRequest::Snapshot(restore) => *restore,
            VmRequest::Configuration(..) => panic!("a snapshot was named"),
        };
        assert!(!read("").load.resume_vm && read("").replaces);
        let all = read(r#","start":true,"logger":{"fd":1},"metrics":{"fd":2},"serial":{"fd":3}"#);
        assert!(all.load.resume_vm);
        assert!(all.logger.is_some() && all.metrics.is_some() && all.serial.is_some());
        let again = parse_vm(all.to_request().as_bytes()).unwrap();
        let VmRequest::Snapshot(again) = again else {
            panic!("{again:?}")
        };
        assert!(again.load.is_deprecated != all.load.is_deprecated);
        assert_eq!((&again.logger, &again.serial), (&all.logger, &all.serial));
        assert_eq!(again.load.mem_backend, all.load.mem_backend);
        for (rest, reason) in [
            (r#","drives":[]"#, "unknown field `drives`"),
            (
                r#","machine-config":null"#,
                "unknown field `machine-config`",
            ),
            (r#","something":1"#, "unknown field `something`"),
            (r#","start":null"#, "null"),
        ] {
            let error = parse(rest).unwrap_err().to_string();
            assert!(error.contains(reason), "{rest}: {error}");
        }
        let error = parse_vm(br#"{"snapshot":null}"#).unwrap_err().to_string();
        assert!(error.contains("null"), "{error}");
        let error = parse_vm(br#"{"snapshot":{"snapshot_path":"s"}}"#);
        let error = error.unwrap_err().to_string();
        assert!(error.contains("either `mem_backend` or"), "{error}");
    }

    #[test]
    fn sources_when_listed_are_all_that_is_opened() {
        let text = r#"{"boot-source":{"kernel_image_path":"k","initrd_path":"i"},
            "drives":[{"drive_id":"a","path_on_host":"d","is_root_device":false},
              {"drive_id":"b","path_on_host":"r","is_root_device":false,"is_read_only":true}],
            "network-interfaces":[{"iface_id":"e","host_dev_name":"t"}],
            "cpu-config":"c","logger":{"log_path":"l"},"metrics":{"metrics_path":"m"},
            "serial":{"serial_out_path":"o","console_socket":"s"}}"#;
        let mut config = parse_file(text.as_bytes()).unwrap();
        let found: Vec<(Backing, String)> = config
            .sources()
            .into_iter()
            .map(|(backing, source)| (backing, source.to_string()))
            .collect();
        let expected = [
            (Backing::Kernel, "k"),
            (Backing::Initrd, "i"),
            (Backing::Disk { read_only: false }, "d"),
            (Backing::Disk { read_only: true }, "r"),
            (Backing::Tap, "t"),
            (Backing::CpuConfig, "c"),
            (Backing::Log, "l"),
            (Backing::Metrics, "m"),
            (Backing::ConsoleOutput, "o"),
            (Backing::ConsoleSocket, "s"),
        ];
        assert_eq!(
            found,
            expected.map(|(backing, name)| (backing, name.to_owned()))
        );
    }
}
