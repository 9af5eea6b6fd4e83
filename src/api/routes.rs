//! Requests to actions: the path says which operation, the body what of it. Pure.

use std::time::Duration;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::http::{Method, Request, Response};
use super::paths::{place, unknown};
use super::responses::fault;
use crate::vmm::action::{Action, Part};
use crate::wire::config::{
    AnyDevice, AnyUpdate, DeviceKind, JsonError, MachineConfigUpdate, Restore, VmRequest,
    json as reader, parse_vm,
};
use crate::wire::{Call, id};

/// The action that `request` asks for.
///
/// # Errors
/// The response that refuses it.
pub fn action(request: &Request) -> Result<Action, Response> {
    find(request).map_err(|reason| fault(400, &reason))
}

fn find(request: &Request) -> Result<Action, String> {
    match (request.method, &request.body) {
        (Method::Get, Some(_)) => return Err("GET request cannot have a body.".into()),
        (Method::Put, None) => return Err("Empty PUT request.".into()),
        (Method::Patch, None) => return Err("Empty PATCH request.".into()),
        (Method::Delete, Some(_)) => return Err("DELETE request cannot have a body.".into()),
        _ => {}
    }
    let body = request.body.as_deref().unwrap_or_default();
    let Some((_, operation, id)) = place(request) else {
        return Err(unknown(request));
    };
    to_action(operation.call, id, body)
}

/// What `call` asks of control, with `id` from the path where it has one.
fn to_action(call: Call, id: &str, bytes: &[u8]) -> Result<Action, String> {
    Ok(match call {
        Call::Ask(question) => Action::Ask(question),
        Call::PutAction => put_action(bytes)?,
        Call::PutBootSource => Action::Configure(Part::BootSource(body(bytes)?)),
        Call::PutCpuConfig => Action::Configure(Part::Cpu(body(bytes)?)),
        Call::PutLogger => Action::Configure(Part::Logger(body(bytes)?)),
        Call::PutMachineConfig => Action::Configure(Part::Machine(body(bytes)?)),
        Call::PatchMachineConfig => {
            let update: MachineConfigUpdate = body(bytes)?;
            if update == MachineConfigUpdate::default() {
                return Err("Empty PATCH request.".into());
            }
            Action::Configure(Part::MachineUpdate(update))
        }
        Call::PutMetrics => Action::Configure(Part::Metrics(body(bytes)?)),
        Call::PutSerial => Action::Configure(Part::Serial(body(bytes)?)),
        Call::PutSnapshotCreate => Action::SnapshotCreate(body(bytes)?),
        Call::PutSnapshotLoad => Action::SnapshotLoad(Box::new(Restore::new(body(bytes)?))),
        Call::PutVm => put_vm(bytes)?,
        Call::PatchVm => patch_vm(bytes)?,
        Call::PutDevice(kind) => put_device(kind, id, bytes)?,
        Call::PatchDevice(kind) => patch_device(kind, id, bytes)?,
    })
}

fn put_device(kind: DeviceKind, id: &str, bytes: &[u8]) -> Result<Action, String> {
    checked_id(id)?;
    let device = AnyDevice::parse(kind, bytes).map_err(bad_body)?;
    same_id(id, device.id())?;
    Ok(Action::Configure(Part::Device(device)))
}

fn patch_device(kind: DeviceKind, id: &str, bytes: &[u8]) -> Result<Action, String> {
    checked_id(id)?;
    let update = AnyUpdate::parse(kind, bytes).map_err(bad_body)?;
    same_id(id, update.id())?;
    Ok(Action::PatchDevice(update))
}

fn put_vm(bytes: &[u8]) -> Result<Action, String> {
    let (config, start) = match parse_vm(bytes).map_err(bad_body)? {
        VmRequest::Snapshot(restore) => return Ok(Action::SnapshotLoad(restore)),
        VmRequest::Configuration(config, start) => (config, start),
    };
    // Later requests name devices in their paths.
    for id in config.devices.ids() {
        checked_id(id)?;
    }
    Ok(Action::Configure(Part::All { config, start }))
}

fn checked_id(id: &str) -> Result<&str, String> {
    id::device(id).map_err(|error| error.to_string())
}

fn same_id(path: &str, body: &str) -> Result<(), String> {
    if path == body {
        return Ok(());
    }
    Err(format!(
        "The id from the path [{path}] does not match the id from the body [{body}]!"
    ))
}

fn body<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    reader::parse(bytes).map_err(bad_body)
}

fn bad_body(error: JsonError) -> String {
    format!("An error occurred when deserializing the json body of a request: {error}.")
}

fn put_action(bytes: &[u8]) -> Result<Action, String> {
    #[derive(Deserialize)]
    enum Type {
        FlushMetrics,
        InstanceStart,
        SendCtrlAltDel,
    }
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Body {
        action_type: Type,
    }
    let Body { action_type } = body(bytes)?;
    Ok(match action_type {
        Type::FlushMetrics => Action::FlushMetrics,
        Type::InstanceStart => Action::Start,
        Type::SendCtrlAltDel => Action::SendCtrlAltDel,
    })
}

fn patch_vm(bytes: &[u8]) -> Result<Action, String> {
    #[derive(Deserialize)]
    enum State {
        Paused,
        Resumed,
    }
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Body {
        state: State,
    }
    let Body { state } = body(bytes)?;
    Ok(match state {
        State::Paused => Action::Pause,
        State::Resumed => Action::Resume,
    })
}

/// What the log says of a request with a member that clients should stop using, if it has one.
pub fn deprecated(action: &Action) -> Option<&'static str> {
    match action {
        Action::Configure(Part::Machine(machine)) => machine.cpu_template.and(Some(
            "PUT /machine-config: cpu_template field is deprecated.",
        )),
        Action::Configure(Part::MachineUpdate(update)) => update.cpu_template.and(Some(
            "PATCH /machine-config: cpu_template field is deprecated.",
        )),
        Action::SnapshotLoad(restore) => restore.load.is_deprecated.then_some(
            "PUT /snapshot/load: mem_file_path and enable_diff_snapshots fields are deprecated.",
        ),
        _ => None,
    }
}

/// How long control may think about `action` before the client is told that it still does.
pub fn patience(action: &Action) -> Duration {
    match action {
        // Memory is made, files are read.
        Action::Start | Action::Configure(Part::All { .. }) | Action::SnapshotLoad(_) => {
            Duration::from_secs(120)
        }
        // All of guest memory is written to a disk.
        Action::SnapshotCreate(_) => Duration::from_secs(3600),
        _ => Duration::from_secs(30),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(method: Method, path: &str, body: &str) -> Request {
        Request {
            method,
            path: path.into(),
            body: (!body.is_empty()).then(|| body.as_bytes().to_vec()),
            close: false,
        }
    }

    /// What `Debug` calls the action, or the reason it is refused for.
    fn asked(method: Method, path: &str, body: &str) -> Result<String, String> {
        match action(&request(method, path, body)) {
            Ok(action) => Ok(format!("{action:?}")),
            Err(response) => {
                assert_eq!(response.status, 400);
                let body: serde_json::Value =
                    serde_json::from_str(&response.body.unwrap()).unwrap();
                Err(body["fault_message"].as_str().unwrap().into())
            }
        }
    }

    const MACHINE: &str = r#"{"vcpu_count":1,"mem_size_mib":128}"#;
    const DRIVE: &str = r#"{"drive_id":"a","path_on_host":"p","is_root_device":false}"#;
    const NET: &str = r#"{"iface_id":"a","host_dev_name":"t"}"#;

    #[test]
    fn action_when_good_is_found() {
        use Method::*;
        let cases = [
            (Get, "/", "", "Ask(Instance)"),
            (Get, "", "", "Ask(Instance)"),
            (Get, "///", "", "Ask(Instance)"),
            (Get, "/version", "", "Ask(Version)"),
            (Get, "//version/x/y", "", "Ask(Version)"),
            (Get, "/vm/config", "", "Ask(VmConfig)"),
            (Get, "/vm/config/", "", "Ask(VmConfig)"),
            (Get, "/vm/timeline", "", "Ask(Timeline)"),
            (Get, "/machine-config", "", "Ask(MachineConfig)"),
            (Get, "/metrics", "", "Ask(Metrics)"),
            (Put, "/machine-config", MACHINE, "Configure(Machine("),
            (
                Patch,
                "/machine-config",
                r#"{"smt":true}"#,
                "Configure(MachineUpdate(",
            ),
            (
                Patch,
                "/machine-config",
                r#"{"cpu_template":"None"}"#,
                "Configure(MachineUpdate(",
            ),
            (
                Put,
                "/boot-source",
                r#"{"kernel_image_path":"k","initrd_path":null,"boot_args":null}"#,
                "Configure(BootSource(",
            ),
            (Put, "/drives/a", DRIVE, "Configure(Device(Drive"),
            (Put, "/drives/a/b", DRIVE, "Configure(Device(Drive"),
            (
                Patch,
                "/drives/a",
                r#"{"drive_id":"a"}"#,
                "PatchDevice(Drive",
            ),
            (
                Put,
                "/network-interfaces/a",
                NET,
                "Configure(Device(NetworkInterface",
            ),
            (
                Patch,
                "/network-interfaces/a",
                r#"{"iface_id":"a"}"#,
                "PatchDevice(NetworkInterface",
            ),
            (
                Put,
                "/actions",
                r#"{"action_type":"InstanceStart"}"#,
                "Start",
            ),
            (
                Put,
                "/actions",
                r#"{"action_type":"SendCtrlAltDel"}"#,
                "SendCtrlAltDel",
            ),
            (
                Put,
                "/actions/x",
                r#"{"action_type":"FlushMetrics"}"#,
                "FlushMetrics",
            ),
            (Patch, "/vm", r#"{"state":"Paused"}"#, "Pause"),
            (Patch, "/vm/x", r#"{"state":"Resumed"}"#, "Resume"),
            (
                Put,
                "/logger",
                r#"{"level":"wArNing"}"#,
                "Configure(Logger(",
            ),
            (
                Put,
                "/metrics",
                r#"{"metrics_path":"m","other":1}"#,
                "Configure(Metrics(",
            ),
            (Put, "/serial", "{}", "Configure(Serial("),
            (Put, "/cpu-config", "{}", "Configure(Cpu("),
            (
                Put,
                "/vm",
                r#"{"boot-source":{"kernel_image_path":"k"},"drives":[],"start":true}"#,
                "Configure(All",
            ),
            (
                Put,
                "/vm",
                r#"{"snapshot":{"snapshot_path":"s","mem_file_path":"m"},"start":true}"#,
                "SnapshotLoad(Restore",
            ),
            (
                Put,
                "/snapshot/load",
                r#"{"snapshot_path":"s","mem_file_path":"m"}"#,
                "SnapshotLoad(Restore",
            ),
            (
                Put,
                "/snapshot/create/x",
                r#"{"snapshot_path":"s","mem_file_path":"m"}"#,
                "SnapshotCreate(SnapshotCreate",
            ),
        ];
        for (method, path, body, name) in cases {
            let asked = asked(method, path, body);
            assert!(
                asked.as_ref().is_ok_and(|a| a.starts_with(name)),
                "{method:?} {path}: {asked:?}"
            );
        }
    }

    #[test]
    fn action_when_bad_is_refused_with_the_reason() {
        use Method::*;
        let cases = [
            (Get, "/version", "{}", "GET request cannot have a body."),
            (Get, "/nope", "{}", "GET request cannot have a body."),
            (Put, "/nope", "", "Empty PUT request."),
            (Put, "/actions", "", "Empty PUT request."),
            (Patch, "/vm", "", "Empty PATCH request."),
            (Patch, "/machine-config", "{}", "Empty PATCH request."),
            (
                Patch,
                "/machine-config",
                r#"{"smt":null}"#,
                "Empty PATCH request.",
            ),
            (Delete, "/drives/a", "{}", "cannot have a body"),
            (Delete, "/drives/a", "", "hotplug"),
            (
                Delete,
                "/",
                "",
                "Invalid request method and/or path: DELETE /.",
            ),
            (
                Get,
                "/nope",
                "",
                "Invalid request method and/or path: GET /nope.",
            ),
            (Get, "/vm", "", "Invalid request method"),
            (Get, "/vm//config", "", "Invalid request method"),
            (Get, "/version?x=1", "", "Invalid request method"),
            (Get, "/%76ersion", "", "Invalid request method"),
            (Get, "/drives/a", "", "Invalid request method"),
            (Put, "/version", "{}", "Invalid request method"),
            (Patch, "/boot-source", "{}", "Invalid request method"),
            (Put, "/drives", DRIVE, "The ID cannot be empty."),
            (Put, "/drives/", DRIVE, "The ID cannot be empty."),
            (Put, "/drives//a", DRIVE, "The ID cannot be empty."),
            (Put, "/drives/a-b", DRIVE, "alphanumeric"),
            (
                Put,
                "/vm",
                r#"{"boot-source":{"kernel_image_path":"k"},"drives":[{"drive_id":"a b",
                    "path_on_host":"p","is_root_device":false}]}"#,
                "alphanumeric",
            ),
            (Put, "/drives/b", DRIVE, "[b] does not match"),
            (Patch, "/drives/b", r#"{"drive_id":"a"}"#, "does not match"),
            (Put, "/network-interfaces", NET, "The ID cannot be empty."),
            (Put, "/network-interfaces/b", NET, "does not match"),
            (
                Put,
                "/actions",
                r#"{"action_type":"x"}"#,
                "An error occurred when deserializing the json body of a request: unknown variant `x`",
            ),
            (Put, "/actions", r#"{"action_type":null}"#, "action_type"),
            (
                Put,
                "/actions",
                r#"{"action_type":"InstanceStart","payload":1}"#,
                "unknown field `payload`",
            ),
            (
                Patch,
                "/vm",
                r#"{"state":"paused"}"#,
                "unknown variant `paused`",
            ),
            (Put, "/machine-config", "x", "expected value"),
            (
                Put,
                "/machine-config",
                r#"{"vcpu_count":1,"mem_size_mib":1,"cpu_template":"T2"}"#,
                "static CPU templates are out of scope",
            ),
            (Put, "/logger", r#"{"level":"loud"}"#, "`loud`"),
            (Put, "/metrics", "{}", "missing field `metrics_path`"),
            (Put, "/vsock", "{}", "out of scope"),
            (Get, "/balloon/statistics", "", "out of scope"),
            (Get, "/mmds", "", "out of scope"),
            (Put, "/entropy", "{}", "out of scope"),
            (Put, "/pmem/a", "{}", "out of scope"),
            (Get, "/hotplug/memory", "", "out of scope"),
            (
                Put,
                "/snapshot/create",
                "{}",
                "missing field `snapshot_path`",
            ),
            (
                Put,
                "/snapshot/load",
                r#"{"snapshot_path":"s"}"#,
                "either `mem_backend` or `mem_file_path` is required.",
            ),
            (Put, "/snapshot/x", "{}", "Invalid request method"),
            (Put, "/snapshot", "{}", "Invalid request method"),
            (Patch, "/snapshot/load", "{}", "Invalid request method"),
        ];
        for (method, path, body, reason) in cases {
            let asked = asked(method, path, body);
            assert!(
                asked.as_ref().is_err_and(|told| told.contains(reason)),
                "{method:?} {path}: {asked:?}"
            );
        }
    }

    #[test]
    fn body_when_null_is_not_absent() {
        let machine = |rest: &str| format!(r#"{{"vcpu_count":1,"mem_size_mib":1,{rest}}}"#);
        let drive = |rest: &str| {
            format!(r#"{{"drive_id":"a","path_on_host":"p","is_root_device":false,{rest}}}"#)
        };
        let cases = [
            ("/machine-config", machine(r#""smt":null"#), false),
            (
                "/machine-config",
                machine(r#""track_dirty_pages":null"#),
                false,
            ),
            ("/machine-config", machine(r#""huge_pages":null"#), false),
            ("/machine-config", machine(r#""cpu_template":null"#), true),
            ("/drives/a", drive(r#""cache_type":null"#), false),
            ("/drives/a", drive(r#""is_read_only":null"#), true),
            ("/drives/a", drive(r#""io_engine":null"#), true),
            ("/drives/a", drive(r#""partuuid":null,"socket":null"#), true),
            (
                "/drives/a",
                drive(r#""rate_limiter":{"bandwidth":null}"#),
                true,
            ),
            (
                "/drives/a",
                drive(r#""rate_limiter":{"ops":{"size":1,"refill_time":1,"x":1}}"#),
                true,
            ),
            ("/drives/a", drive(r#""rate_limiter":{"x":1}"#), false),
        ];
        for (path, body, taken) in cases {
            let asked = asked(Method::Put, path, &body);
            assert_eq!(asked.is_ok(), taken, "{body}: {asked:?}");
        }
    }
}
