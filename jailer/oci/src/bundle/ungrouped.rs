//! The limits of a container whose config.json names no control groups, or none that this user may make: as
//! an engine writes it that an ordinary user runs. The jailer makes groups of its own for those of them that
//! it knows, or says why it cannot.

use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources};

use super::resources::{self, PIDS_MIN};
use super::{FieldError, refuse};

/// The jailer's words for the limits. What it has no word for is refused; what engines always write along with
/// another limit is noted.
pub fn limits(
    resources: &LinuxResources,
    notes: &mut Vec<String>,
) -> Result<Vec<String>, FieldError> {
    if let Some(field) = of_groups_alone(resources) {
        return refuse(
            format!("linux.resources.{field}"),
            "it is of a control group, and there is none for this container: name one in linux.cgroupsPath that this \
             user may make (podman --cgroup-parent), or leave it out",
        );
    }
    let mut limits = Vec::new();
    if let Some(bytes) = resources::memory_limit(resources) {
        limits.push(format!("memory={bytes}"));
    }
    let swap = resources.memory().as_ref().and_then(LinuxMemory::swap);
    if swap.is_some_and(|swap| swap > 0) {
        notes.push("linux.resources.memory.swap is left out: there are no control groups".into());
    }
    if let Some((quota, period)) = resources::quota(resources) {
        let thousandths = quota.saturating_mul(1000) / period;
        limits.push(format!(
            "cpus={}.{:03}",
            thousandths / 1000,
            thousandths % 1000
        ));
    }
    if let Some(pids) = resources.pids().filter(|pids| pids.limit() > 0) {
        limits.push(format!("pids={}", pids.limit().max(PIDS_MIN)));
    }
    Ok(limits)
}

/// A limit that only the engine's groups can have.
fn of_groups_alone(resources: &LinuxResources) -> Option<&'static str> {
    let memory = resources.memory().as_ref();
    let cpu = resources.cpu().as_ref();
    let io = resources.block_io().as_ref();
    let is_named = |list: &Option<String>| list.as_ref().is_some_and(|list| !list.is_empty());
    let fields = [
        (
            "memory.reservation",
            memory
                .and_then(LinuxMemory::reservation)
                .is_some_and(|least| least > 0),
        ),
        (
            "cpu.shares",
            cpu.and_then(LinuxCpu::shares)
                .is_some_and(|shares| shares > 0),
        ),
        ("cpu.cpus", cpu.is_some_and(|cpu| is_named(cpu.cpus()))),
        ("cpu.mems", cpu.is_some_and(|cpu| is_named(cpu.mems()))),
        (
            "blockIO",
            io.is_some_and(|io| *io != LinuxBlockIo::default()),
        ),
        (
            "unified",
            resources.unified().iter().flatten().next().is_some(),
        ),
    ];
    let found = fields.into_iter().find(|(_, is_asked_for)| *is_asked_for);
    found.map(|(field, _)| field)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn limits_of(value: Value) -> Result<(Vec<String>, Vec<String>), String> {
        let mut notes = Vec::new();
        let resources = serde_json::from_value(value).unwrap();
        let limits = limits(&resources, &mut notes).map_err(|error| error.to_string())?;
        Ok((limits, notes))
    }

    #[test]
    fn jailer_has_the_limits_that_it_knows() {
        let given = json!({
            "memory": { "limit": 134_217_728, "swap": 268_435_456 },
            "cpu": { "quota": 150_000, "period": 100_000 },
            "pids": { "limit": 100 },
        });
        let (limits, notes) = limits_of(given).unwrap();
        assert_eq!(limits, ["memory=134217728", "cpus=1.500", "pids=100"]);
        assert!(
            notes.len() == 1 && notes[0].contains("memory.swap"),
            "{notes:?}"
        );
        let few =
            json!({ "pids": { "limit": 3 }, "memory": { "limit": -1 }, "cpu": { "quota": -1 } });
        assert_eq!(limits_of(few).unwrap(), (vec!["pids=64".into()], vec![]));
        let none = json!({ "devices": [{ "allow": false }], "memory": {}, "cpu": { "shares": 0 }, "blockIO": {} });
        assert_eq!(limits_of(none).unwrap(), (vec![], vec![]));
    }

    #[test]
    fn limit_of_groups_alone_is_refused_by_its_name() {
        let device = json!([{ "major": 8, "minor": 0, "rate": 7 }]);
        for (value, field) in [
            (
                json!({ "memory": { "reservation": 1 } }),
                "memory.reservation",
            ),
            (json!({ "cpu": { "shares": 512 } }), "cpu.shares"),
            (json!({ "cpu": { "cpus": "0" } }), "cpu.cpus"),
            (json!({ "cpu": { "mems": "0" } }), "cpu.mems"),
            (
                json!({ "blockIO": { "throttleReadBpsDevice": device } }),
                "blockIO",
            ),
            (json!({ "unified": { "memory.high": "1" } }), "unified"),
        ] {
            let error = limits_of(value).unwrap_err();
            assert!(
                error.contains(&format!("linux.resources.{field}:")),
                "{error}"
            );
        }
    }
}
