//! A bundle's config.json, and what of it a microVM has: every field is honoured, named in the log as
//! left out, or refused where safety or data depend on it. Only reads.

#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod hooks;
pub mod mounts;
mod namespaces;
pub mod place;
mod process;
pub mod resources;
pub mod ungrouped;
pub mod unknown;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxNamespaceType, LinuxResources, Spec};
use serde_json::{Map, Value};

use self::mounts::Mounts;
use self::place::Place;
pub use self::process::process_text;
use crate::error::{AnyError, Step as _};
use crate::hooks::Hooks;
use crate::input;

/// Where config.json is read from at most this much: engines' are some tens of KiB.
const CONFIG_MAX: u64 = 16 << 20;

/// A field of config.json cannot be honoured.
#[derive(Debug, thiserror::Error)]
#[error("cannot use config.json: {field}: {why}")]
pub struct FieldError {
    /// Its name, from the top down.
    pub field: String,
    /// Why, and what to do.
    pub why: String,
}

/// Refuses a field.
pub fn refuse<T>(field: impl Into<String>, why: impl Into<String>) -> Result<T, FieldError> {
    Err(FieldError {
        field: field.into(),
        why: why.into(),
    })
}

/// What a guest is connected to.
#[derive(Debug, PartialEq, Eq)]
pub enum Network {
    /// Nothing.
    None,
    /// What hooks put into a new network namespace.
    New,
    /// What `eth0` of this network namespace is.
    Namespace(PathBuf),
}

/// What a container's files come from.
#[derive(Debug, PartialEq, Eq)]
pub enum Root {
    /// A folder of the host.
    Folder(PathBuf),
    /// A file with an EROFS file system.
    Image(PathBuf),
}

/// What config.json asks for, as a microVM.
#[derive(Debug)]
pub struct Container {
    pub root: Root,
    pub is_read_only: bool,
    /// The process, as it stands there.
    pub process: Map<String, Value>,
    pub has_terminal: bool,
    pub hostname: Option<String>,
    pub mounts: Mounts,
    pub network: Network,
    /// Where its control groups are.
    pub cgroup: Option<Place>,
    pub resources: LinuxResources,
    pub annotations: HashMap<String, String>,
    /// It is the sandbox of a pod, whose container gets the network that is made for it.
    pub is_sandbox: bool,
    pub hooks: Hooks,
    /// What is left out.
    pub notes: Vec<String>,
}

/// Fields that other kernels' containers need, and that are taken out before the rest is understood.
const GUARDS: &[(&str, &[&str])] = &[
    (
        "linux",
        &[
            "seccomp",
            "maskedPaths",
            "readonlyPaths",
            "rootfsPropagation",
            "mountLabel",
        ],
    ),
    ("process", &["apparmorProfile", "selinuxLabel"]),
];

/// What can be in config.json, and is not done.
const LEFT_OUT: &[&str] = &[
    "/domainname",
    "/linux/sysctl",
    "/linux/timeOffsets",
    "/linux/personality",
    "/linux/intelRdt",
    "/linux/memoryPolicy",
    "/linux/netDevices",
    "/solaris",
    "/windows",
    "/vm",
    "/zos",
];

/// Annotations by which Ray and gVisor name a root that is a file.
const ROOT_SOURCE: &str = "dev.gvisor.spec.rootfs.source";
const ROOT_TYPE: &str = "dev.gvisor.spec.rootfs.type";
const ROOT_OVERLAY: &str = "dev.gvisor.spec.rootfs.overlay";

/// Annotations by which containerd and CRI-O tell a pod's sandbox from its containers.
const CONTAINER_TYPES: [&str; 2] = [
    "io.kubernetes.cri.container-type",
    "io.kubernetes.cri-o.ContainerType",
];

/// How the names of annotations begin that are for a unit of systemd's.
const UNIT_PROPERTY: &str = "org.systemd.property.";

/// Reads the config.json of `bundle`.
pub fn read(bundle: &Path) -> Result<Container, AnyError> {
    let path = bundle.join("config.json");
    let text = input::read(&path, CONFIG_MAX).step_on("read", &path)?;
    let config: Value = serde_json::from_slice(&text).step_on("read", &path)?;
    understand(bundle, config)
}

/// Understands the text of a config.json.
fn understand(bundle: &Path, mut config: Value) -> Result<Container, AnyError> {
    let mut notes = Vec::new();
    for field in LEFT_OUT {
        if config.pointer(field).is_some_and(|value| !is_empty(value)) {
            notes.push(format!(
                "{} is left out: it has no effect in a microVM",
                field[1..].replace('/', ".")
            ));
        }
    }
    for (part, fields) in GUARDS {
        let Some(part) = config.get_mut(part).and_then(Value::as_object_mut) else {
            continue;
        };
        // They guard the host's kernel, and the guest has its own.
        fields.iter().for_each(|field| drop(part.remove(*field)));
    }
    let process = config.get("process").and_then(Value::as_object).cloned();
    if let Some(process) = config.get_mut("process").and_then(Value::as_object_mut) {
        // The jailer takes these as they are.
        process.remove("capabilities");
        process.remove("rlimits");
    }
    let spec: Spec =
        serde_path_to_error::deserialize(&config).step_on("understand config.json of", bundle)?;
    unknown::find(&config, &serde_json::to_value(&spec)?, &mut notes);
    take(bundle, &spec, process, notes)
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Object(map) => map.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::String(text) => text.is_empty(),
        _ => false,
    }
}

fn take(
    bundle: &Path,
    spec: &Spec,
    process: Option<Map<String, Value>>,
    mut notes: Vec<String>,
) -> Result<Container, AnyError> {
    check_version(spec.version())?;
    let Some(mut process) = process else {
        return Ok(refuse("process", "it is missing")?);
    };
    process::keep_last_values(&mut process);
    process::note_unknown_capabilities(&process, &mut notes);
    let typed = spec.process().as_ref();
    let words = typed.and_then(|process| process.args().as_ref());
    if words.is_none_or(|words| words.is_empty()) {
        return Ok(refuse("process.args", "there is nothing to run")?);
    }
    let linux = spec.linux().clone().unwrap_or_default();
    check_ids(&linux)?;
    check_devices(&linux)?;
    namespaces::check(&linux, &mut notes)?;
    let annotations = spec.annotations().clone().unwrap_or_default();
    if annotations
        .keys()
        .any(|name| name.starts_with(UNIT_PROPERTY))
    {
        notes.push(format!(
            "annotations.{UNIT_PROPERTY}* are left out: a scope has the properties of its limits only"
        ));
    }
    let (root, is_read_only) = root(bundle, spec, &annotations)?;
    let resources = linux.resources().clone().unwrap_or_default();
    resources::check(&resources, &mut notes)?;
    Ok(Container {
        root,
        is_read_only,
        has_terminal: typed
            .and_then(|process| process.terminal())
            .unwrap_or(false),
        process,
        hostname: spec
            .hostname()
            .clone()
            .filter(|name| !name.is_empty())
            .or_else(|| hostname_of_pod(spec, &annotations)),
        mounts: mounts::sort(
            bundle,
            spec.mounts().as_deref().unwrap_or_default(),
            &mut notes,
        )?,
        network: network(&linux)?,
        cgroup: linux
            .cgroups_path()
            .as_ref()
            .map(|path| place::parse(path))
            .transpose()?,
        resources,
        is_sandbox: kind_in_pod(&annotations) == Some("sandbox"),
        annotations,
        hooks: hooks::take(spec)?,
        notes,
    })
}

/// What a container is to its pod, if it is in one.
fn kind_in_pod(annotations: &HashMap<String, String>) -> Option<&str> {
    let mut names = CONTAINER_TYPES.iter();
    names.find_map(|name| annotations.get(*name).map(String::as_str))
}

/// Longer names Linux does not take.
const HOSTNAME_MAX: usize = 64;

/// A pod's containers have no name of their own, but the sandbox's, which is in the file that engines mount.
fn hostname_of_pod(spec: &Spec, annotations: &HashMap<String, String>) -> Option<String> {
    kind_in_pod(annotations).filter(|kind| *kind == "container")?;
    let mounts = spec.mounts().as_deref().unwrap_or_default();
    let mount = mounts
        .iter()
        .find(|mount| mount.destination() == Path::new("/etc/hostname"))?;
    let text = input::read(mount.source().as_ref()?, 2 * HOSTNAME_MAX as u64).ok()?;
    let name = String::from_utf8(text).ok()?.trim().to_owned();
    let is_fit = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'.';
    ((1..=HOSTNAME_MAX).contains(&name.len()) && name.bytes().all(is_fit)).then_some(name)
}

fn check_version(version: &str) -> Result<(), FieldError> {
    match version.split('.').next() {
        Some("1") => Ok(()),
        _ => refuse(
            "ociVersion",
            format!("it is \"{version}\", and 1.x is what is understood"),
        ),
    }
}

/// A user namespace shifts the owners of files, which a disk made of them would show.
fn check_ids(linux: &oci_spec::runtime::Linux) -> Result<(), FieldError> {
    let mappings = [
        ("linux.uidMappings", linux.uid_mappings()),
        ("linux.gidMappings", linux.gid_mappings()),
    ];
    for (field, list) in mappings {
        let is_shifted = |list: &Vec<oci_spec::runtime::LinuxIdMapping>| {
            list.iter().any(|one| one.host_id() != one.container_id())
        };
        if list.as_ref().is_some_and(is_shifted) {
            return refuse(
                field,
                "a microVM has users of its own; leave out the user namespace (podman --userns host)",
            );
        }
    }
    Ok(())
}

/// Devices that every guest has.
const DEVICES: &[&str] = &[
    "null", "zero", "full", "random", "urandom", "tty", "console", "ptmx",
];

fn check_devices(linux: &oci_spec::runtime::Linux) -> Result<(), FieldError> {
    let devices = linux.devices().as_deref().unwrap_or_default();
    let is_own = |path: &Path| {
        let name = path.strip_prefix("/dev").ok().and_then(Path::to_str);
        name.is_some_and(|name| DEVICES.contains(&name))
    };
    match devices.iter().find(|device| !is_own(device.path())) {
        Some(device) => refuse(
            "linux.devices",
            format!(
                "{} is a device of the host, which a microVM does not have; leave out --device and --privileged",
                device.path().display()
            ),
        ),
        None => Ok(()),
    }
}

fn root(
    bundle: &Path,
    spec: &Spec,
    annotations: &HashMap<String, String>,
) -> Result<(Root, bool), AnyError> {
    if let Some(source) = annotations.get(ROOT_SOURCE) {
        if let Some(other) = annotations.get(ROOT_TYPE).filter(|kind| *kind != "erofs") {
            let why = format!("\"{other}\" is no type of file system that is taken: erofs is");
            return Ok(refuse(format!("annotations.{ROOT_TYPE}"), why)?);
        }
        return Ok((
            Root::Image(bundle.join(source)),
            !annotations.contains_key(ROOT_OVERLAY),
        ));
    }
    let Some(root) = spec.root() else {
        return Ok(refuse("root", "it is missing")?);
    };
    let path = bundle.join(root.path());
    let kind = std::fs::metadata(&path).step_on("use root.path", &path)?;
    let root_of = if kind.is_dir() {
        Root::Folder(path)
    } else {
        Root::Image(path)
    };
    Ok((root_of, root.readonly().unwrap_or(false)))
}

fn network(linux: &oci_spec::runtime::Linux) -> Result<Network, FieldError> {
    let namespaces = linux.namespaces().as_deref().unwrap_or_default();
    let mut namespaces = namespaces.iter();
    let Some(namespace) = namespaces.find(|one| one.typ() == LinuxNamespaceType::Network) else {
        return refuse(
            "linux.namespaces",
            "the network of the host cannot be given to a microVM; use none (podman --network none; ctr without \
             --net-host)",
        );
    };
    let path = namespace.path().clone();
    Ok(path
        .filter(|path| !path.as_os_str().is_empty())
        .map_or(Network::New, Network::Namespace))
}

#[cfg(test)]
pub mod tests {
    use serde_json::json;

    use super::*;

    /// A config.json that asks for little.
    pub fn plain() -> Value {
        json!({
            "ociVersion": "1.0.2",
            "process": { "args": ["true"], "cwd": "/", "user": { "uid": 0, "gid": 0 } },
            "root": { "path": "/" },
            "linux": { "namespaces": [{ "type": "network" }, { "type": "pid" }] },
        })
    }

    fn with(field: &str, value: Value) -> Value {
        let mut config = plain();
        let mut at = &mut config;
        for part in field.split('/') {
            at = &mut at[part];
        }
        *at = value;
        config
    }

    fn understood(config: Value) -> Result<Container, String> {
        understand(Path::new("/"), config).map_err(|error| crate::error::message(&*error))
    }

    #[test]
    fn plain_config_has_a_root_a_process_and_a_network_of_its_own() {
        let container = understood(plain()).unwrap();
        assert_eq!(
            (container.root, container.is_read_only),
            (Root::Folder("/".into()), false)
        );
        assert_eq!(container.network, Network::New);
        assert_eq!(container.process["args"], json!(["true"]));
        assert!(container.notes.is_empty(), "{:?}", container.notes);
    }

    #[test]
    fn process_keeps_what_the_jailer_is_to_read() {
        let container = understood(with(
            "process/capabilities",
            json!({ "bounding": ["CAP_NEW"] }),
        ))
        .unwrap();
        assert_eq!(
            container.process["capabilities"]["bounding"],
            json!(["CAP_NEW"])
        );
    }

    #[test]
    fn sandbox_of_a_pod_is_told_from_its_containers_which_have_its_name() {
        let file = std::env::temp_dir().join(format!("mayfly-oci-name-{}", std::process::id()));
        let of = |kind: &str, name: &str| {
            std::fs::write(&file, name).unwrap();
            let mut config = with("annotations", json!({ CONTAINER_TYPES[0]: kind }));
            config["mounts"] = json!([{
                "destination": "/etc/hostname", "type": "bind", "source": file, "options": ["rbind", "rw"],
            }]);
            let container = understood(config).unwrap();
            (container.is_sandbox, container.hostname)
        };
        assert_eq!(of("sandbox", "pod\n"), (true, None));
        assert_eq!(
            of("container", "pod-1.x\n"),
            (false, Some("pod-1.x".into()))
        );
        for unfit in ["", "my_pod", "a b", &"x".repeat(65), &"x".repeat(1000)] {
            assert_eq!(of("container", unfit), (false, None), "{unfit}");
        }
        assert_eq!(of("", "pod"), (false, None));
        std::fs::remove_file(&file).unwrap();
        let config = with("annotations", json!({ CONTAINER_TYPES[1]: "sandbox" }));
        assert!(understood(config).unwrap().is_sandbox);
    }

    #[test]
    fn network_is_that_of_the_namespace() {
        let list = json!([{ "type": "network", "path": "/run/netns/n" }]);
        let container = understood(with("linux/namespaces", list)).unwrap();
        assert_eq!(container.network, Network::Namespace("/run/netns/n".into()));
    }

    #[test]
    fn root_of_ray_is_a_file() {
        let annotations =
            json!({ ROOT_SOURCE: "/i.erofs", ROOT_TYPE: "erofs", ROOT_OVERLAY: "self" });
        let container = understood(with("annotations", annotations)).unwrap();
        assert_eq!(
            (container.root, container.is_read_only),
            (Root::Image("/i.erofs".into()), false)
        );
    }

    #[test]
    fn what_only_guards_the_hosts_kernel_is_not_needed() {
        let mut config = with(
            "linux/seccomp",
            json!({ "defaultAction": "SCMP_ACT_OF_TOMORROW" }),
        );
        config["linux"]["maskedPaths"] = json!(["/proc/kcore"]);
        assert!(understood(config).unwrap().notes.is_empty());
    }

    #[test]
    fn what_is_left_out_is_named() {
        for (field, value) in [
            ("linux/sysctl", json!({ "net.ipv4.ip_forward": "1" })),
            ("domainname", json!("d")),
            ("nonsense", json!(7)),
            ("linux/nonsense", json!({ "a": [1] })),
            (
                "annotations",
                json!({ "org.systemd.property.KillSignal": "15" }),
            ),
        ] {
            let notes = understood(with(field, value)).unwrap().notes;
            let name = field.replace('/', ".");
            assert!(
                notes.len() == 1 && notes[0].contains(&name),
                "{field}: {notes:?}"
            );
        }
    }

    #[test]
    fn what_cannot_be_had_is_refused_by_its_name() {
        let device = json!([{ "path": "/dev/kvm", "type": "c", "major": 10, "minor": 232 }]);
        for (field, value, expected) in [
            ("ociVersion", json!("2.0.0"), "ociVersion"),
            ("process", Value::Null, "process"),
            ("process/args", json!([]), "process.args"),
            ("root", Value::Null, "root"),
            ("root/path", json!("/nonexistent/root"), "/nonexistent/root"),
            (
                "hooks",
                json!({ "startContainer": [{ "path": "/bin/true" }] }),
                "hooks.startContainer",
            ),
            (
                "linux/namespaces",
                json!([{ "type": "pid" }]),
                "linux.namespaces",
            ),
            ("linux/devices", device, "/dev/kvm"),
            (
                "linux/cgroupsPath",
                json!("user.slice:x"),
                "linux.cgroupsPath",
            ),
            ("linux/cgroupsPath", json!("/a/../b"), "linux.cgroupsPath"),
            (
                "linux/uidMappings",
                json!([{ "containerID": 0, "hostID": 5, "size": 1 }]),
                "linux.uidMappings",
            ),
            (
                "linux/resources",
                json!({ "memory": { "limit": "1M" } }),
                "linux.resources.memory.limit",
            ),
            (
                "annotations",
                json!({ ROOT_SOURCE: "/i", ROOT_TYPE: "ext4" }),
                ROOT_TYPE,
            ),
        ] {
            let error = understood(with(field, value)).unwrap_err();
            assert!(error.contains(expected), "{field}: {error}");
        }
    }
}
