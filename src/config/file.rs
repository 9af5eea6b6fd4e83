//! A whole configuration in one piece of JSON: `--config-file` and `PUT /vm`.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::json::{self, JsonError, object, objects, optional_object};
use super::{
    BootSource, CpuConfigSource, Drive, Logger, MachineConfig, Metrics, NetworkInterface, Serial,
    VmConfig,
};

/// The sections as they are written; those out of scope are there to be refused by name.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Sections {
    #[serde(deserialize_with = "object")]
    boot_source: BootSource,
    #[serde(deserialize_with = "objects")]
    drives: Vec<Drive>,
    #[serde(default, deserialize_with = "objects")]
    network_interfaces: Vec<NetworkInterface>,
    #[serde(default, deserialize_with = "optional_object")]
    machine_config: Option<MachineConfig>,
    cpu_config: Option<CpuConfigSource>,
    #[serde(default, deserialize_with = "optional_object")]
    logger: Option<Logger>,
    #[serde(default, deserialize_with = "optional_object")]
    metrics: Option<Metrics>,
    #[serde(default, deserialize_with = "optional_object")]
    serial: Option<Serial>,
    balloon: Option<IgnoredAny>,
    vsock: Option<IgnoredAny>,
    entropy: Option<IgnoredAny>,
    mmds_config: Option<IgnoredAny>,
    memory_hotplug: Option<IgnoredAny>,
    #[serde(default)]
    pmem: Vec<IgnoredAny>,
}

/// The names that `PUT /vm` knows, our own `start` last.
const SECTIONS: [&str; 15] = [
    "boot-source",
    "drives",
    "network-interfaces",
    "machine-config",
    "cpu-config",
    "logger",
    "metrics",
    "serial",
    "balloon",
    "vsock",
    "entropy",
    "mmds-config",
    "memory-hotplug",
    "pmem",
    "start",
];

/// Reads a config file. Sections that nobody knows are ignored, as Firecracker does.
///
/// # Errors
/// What is not JSON, a wrong member, or a section that is out of scope and not null.
pub fn parse_file(bytes: &[u8]) -> Result<VmConfig, JsonError> {
    if std::str::from_utf8(bytes).is_err() {
        return Err(JsonError::new("it holds bytes that are not UTF-8"));
    }
    let sections: Sections = json::parse(bytes)?;
    let out_of_scope = [
        ("balloon", sections.balloon.is_some()),
        ("vsock", sections.vsock.is_some()),
        ("entropy", sections.entropy.is_some()),
        ("mmds-config", sections.mmds_config.is_some()),
        ("memory-hotplug", sections.memory_hotplug.is_some()),
        ("pmem", !sections.pmem.is_empty()),
    ];
    if let Some((name, _)) = out_of_scope.iter().find(|(_, asked_for)| *asked_for) {
        return Err(JsonError::new(format!(
            "the section `{name}` is out of scope: there is no such device"
        )));
    }
    Ok(VmConfig {
        machine_config: sections.machine_config,
        boot_source: Some(sections.boot_source),
        drives: sections.drives,
        network_interfaces: sections.network_interfaces,
        cpu_config: sections.cpu_config,
        logger: sections.logger,
        metrics: sections.metrics,
        serial: sections.serial,
    })
}

/// Reads the body of `PUT /vm`: a config file's sections, no others, and whether to start.
///
/// # Errors
/// As [`parse_file`], and for a section that nobody knows.
pub fn parse_vm(bytes: &[u8]) -> Result<(VmConfig, bool), JsonError> {
    #[derive(Deserialize)]
    struct Start {
        #[serde(default)]
        start: bool,
    }
    let names: BTreeMap<String, IgnoredAny> = json::parse(bytes)?;
    if let Some(name) = names.keys().find(|n| !SECTIONS.contains(&n.as_str())) {
        let known = SECTIONS.join("`, `");
        return Err(JsonError::new(format!(
            "unknown field `{name}`, expected one of `{known}`"
        )));
    }
    let Start { start } = json::parse(bytes)?;
    Ok((parse_file(bytes)?, start))
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
        assert_eq!(config.network_interfaces.len(), 1);
        assert_eq!(
            config.cpu_config,
            Some(CpuConfigSource::File("/masks.json".into()))
        );
        assert!(config.serial.is_some() && config.metrics.is_some() && config.logger.is_some());
    }

    #[test]
    fn file_when_it_is_a_reported_configuration_is_taken_again() {
        let config = parse_file(format!("{{{SMALL}}}").as_bytes()).unwrap();
        let reported = serde_json::to_vec(&config).unwrap();
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
        assert!(!parse("").unwrap().1);
        assert!(parse(r#","start":true"#).unwrap().1);
        assert!(parse(r#","start":null"#).is_err());
        assert!(parse(r#","vsock":{}"#).is_err());
        let error = parse(r#","something":1"#).unwrap_err().to_string();
        assert!(error.starts_with("unknown field `something`"), "{error}");
    }
}
