//! The same by podman, with storage and state of the run's own.

use std::process::{Command, Stdio};
use std::time::Instant;

use super::runtime::{Place, Runtime};
use crate::failure::{Context, Failure, Result};

/// Whether podman is installed.
pub fn is_there() -> bool {
    let version = Command::new("podman").arg("--version").output();
    version.is_ok_and(|output| output.status.success())
}

/// `podman run --rm` of `true`, in milliseconds.
pub fn life(place: &Place, runtime: &Runtime<'_>) -> Result<f64> {
    let mut command = Command::new("podman");
    command.args(["--cgroup-manager", "cgroupfs", "--events-backend", "file"]);
    command.args(["--storage-driver", "vfs", "--root"]);
    command.arg(place.path("store")).arg("--runroot");
    command.arg(place.path("run")).arg("--runtime");
    command.arg(&runtime.path);
    if let Some(settings) = &runtime.settings {
        let flag = format!("config={}", settings.display());
        command.args(["--runtime-flag", &flag]);
    }
    command.args(["run", "--rm", "--network", "none", "--cgroups", "enabled"]);
    command.arg("--rootfs").arg(&place.root).arg("true");
    command.stdin(Stdio::null());
    let begun = Instant::now();
    let output = command.output().cannot(|| "run podman".into())?;
    let ms = begun.elapsed().as_secs_f64() * 1e3;
    match output.status.success() {
        true => Ok(ms),
        false => Err(Failure::new(format!(
            "podman with {} ended with {}: {}",
            runtime.row.name,
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        ))),
    }
}
