//! The operations of the API: method, path, and what is asked for.

use super::config::{DeviceKind, each_device_kind};

/// The methods of the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// GET
    Get,
    /// PUT
    Put,
    /// PATCH
    Patch,
    /// DELETE
    Delete,
}

impl Method {
    /// The method of that name.
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "GET" => Some(Method::Get),
            "PUT" => Some(Method::Put),
            "PATCH" => Some(Method::Patch),
            "DELETE" => Some(Method::Delete),
            _ => None,
        }
    }

    /// As it is written.
    pub const fn name(self) -> &'static str {
        match self {
            Method::Get => "GET",
            Method::Put => "PUT",
            Method::Patch => "PATCH",
            Method::Delete => "DELETE",
        }
    }
}

/// What can be asked without changing anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Question {
    /// `GET /`
    Instance,
    /// `GET /version`
    Version,
    /// `GET /vm/config`
    VmConfig,
    /// `GET /vm/timeline`
    Timeline,
    /// `GET /machine-config`
    MachineConfig,
    /// `GET /metrics`
    Metrics,
}

/// What an operation asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// `GET` of something.
    Ask(Question),
    /// `PUT /actions`
    PutAction,
    /// `PUT /boot-source`
    PutBootSource,
    /// `PUT /cpu-config`
    PutCpuConfig,
    /// `PUT /logger`
    PutLogger,
    /// `PUT /machine-config`
    PutMachineConfig,
    /// `PATCH /machine-config`
    PatchMachineConfig,
    /// `PUT /metrics`
    PutMetrics,
    /// `PUT /serial`
    PutSerial,
    /// `PUT /snapshot/create`
    PutSnapshotCreate,
    /// `PUT /snapshot/load`
    PutSnapshotLoad,
    /// `PUT /vm`
    PutVm,
    /// `PATCH /vm`
    PatchVm,
    /// `PUT` of a device.
    PutDevice(DeviceKind),
    /// `PATCH` of a device.
    PatchDevice(DeviceKind),
}

/// One operation of the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operation {
    /// The method.
    pub method: Method,
    /// The path; `{id}` stands for a segment that the client chooses. Segments beyond it are
    /// ignored, as Firecracker does.
    pub path: &'static str,
    /// What is asked for.
    pub call: Call,
}

const fn operation(method: Method, path: &'static str, call: Call) -> Operation {
    Operation { method, path, call }
}

use Method::{Get, Patch, Put};

macro_rules! declare {
    ($($list:ident = $section:literal: $wire:ident::$config:ident, $control:ident::$kind:ident [$($serde:tt)*];)+) => {
        /// All operations.
        pub const OPERATIONS: &[Operation] = &[
            operation(Get, "/", Call::Ask(Question::Instance)),
            operation(Get, "/version", Call::Ask(Question::Version)),
            operation(Get, "/vm/config", Call::Ask(Question::VmConfig)),
            operation(Get, "/vm/timeline", Call::Ask(Question::Timeline)),
            operation(Get, "/machine-config", Call::Ask(Question::MachineConfig)),
            operation(Get, "/metrics", Call::Ask(Question::Metrics)),
            operation(Put, "/actions", Call::PutAction),
            operation(Put, "/boot-source", Call::PutBootSource),
            operation(Put, "/cpu-config", Call::PutCpuConfig),
            $(
                operation(Put, DeviceKind::$config.path(), Call::PutDevice(DeviceKind::$config)),
                operation(Patch, DeviceKind::$config.path(), Call::PatchDevice(DeviceKind::$config)),
            )+
            operation(Put, "/logger", Call::PutLogger),
            operation(Put, "/machine-config", Call::PutMachineConfig),
            operation(Patch, "/machine-config", Call::PatchMachineConfig),
            operation(Put, "/metrics", Call::PutMetrics),
            operation(Put, "/serial", Call::PutSerial),
            operation(Put, "/snapshot/create", Call::PutSnapshotCreate),
            operation(Put, "/snapshot/load", Call::PutSnapshotLoad),
            operation(Put, "/vm", Call::PutVm),
            operation(Patch, "/vm", Call::PatchVm),
        ];
    };
}

each_device_kind!(declare);
