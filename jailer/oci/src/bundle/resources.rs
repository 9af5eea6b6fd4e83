//! The limits of config.json: what a microVM is made of for them, and what its control groups are told,
//! in either version.

use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources};

use super::{FieldError, refuse};

/// What the processes on the host need beside the guest's memory, in MiB.
const HOST_MIB: u64 = 16;
/// The least memory of a guest, in MiB.
const GUEST_MIN_MIB: u64 = 48;
/// More than any host has, in MiB.
const MEMORY_MAX_MIB: u64 = 16 << 20;
/// The least number of processes and threads that a microVM is made of, with some to spare.
pub const PIDS_MIN: i64 = 64;
/// The most processors of a guest.
const VCPUS_MAX: u64 = 32;

/// A file of a control group, and what is written to it.
pub type FileText = (String, String);

/// A value for a file of a control group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// The controller of version 2, and of version 1.
    pub controllers: (&'static str, &'static str),
    /// File and text of version 2, if it has it.
    pub v2: Option<FileText>,
    /// File and text of version 1, if it has it.
    pub v1: Option<FileText>,
}

/// Refuses what cannot be had, and notes what is left out.
pub fn check(resources: &LinuxResources, notes: &mut Vec<String>) -> Result<(), FieldError> {
    memory_mib(resources, 0)?;
    let of_memory =
        |is_given: &dyn Fn(&LinuxMemory) -> bool| resources.memory().as_ref().is_some_and(is_given);
    for (field, is_given) in [
        (
            "hugepageLimits",
            resources
                .hugepage_limits()
                .as_ref()
                .is_some_and(|list| !list.is_empty()),
        ),
        ("network", resources.network().is_some()),
        (
            "rdma",
            resources.rdma().as_ref().is_some_and(|map| !map.is_empty()),
        ),
        (
            "memory.swappiness",
            of_memory(&|it| it.swappiness().is_some()),
        ),
        // The guest's kernel chooses there.
        (
            "memory.disableOOMKiller",
            of_memory(&|it| it.disable_oom_killer() == Some(true)),
        ),
        (
            "memory.kernel",
            of_memory(&|it| it.kernel().is_some_and(|bytes| bytes > 0)),
        ),
        (
            "memory.kernelTCP",
            of_memory(&|it| it.kernel_tcp().is_some_and(|bytes| bytes > 0)),
        ),
        (
            "cpu.realtimeRuntime",
            resources
                .cpu()
                .as_ref()
                .and_then(LinuxCpu::realtime_runtime)
                .is_some_and(|time| time > 0),
        ),
    ] {
        if is_given {
            notes.push(format!(
                "linux.resources.{field} is left out: it has no effect on a microVM"
            ));
        }
    }
    if let Some(pids) = resources
        .pids()
        .filter(|pids| (1..PIDS_MIN).contains(&pids.limit()))
    {
        notes.push(format!(
            "linux.resources.pids.limit is {PIDS_MIN} instead of {}: it counts the threads of the microVM on the host",
            pids.limit()
        ));
    }
    let unified = resources.unified().iter().flatten();
    for (file, text) in unified {
        let is_plain = file.contains('.') && !file.contains('/') && !text.contains('\n');
        if !is_plain || file.starts_with("cgroup.") {
            return refuse(
                format!("linux.resources.unified.{file}"),
                "it is no file of a controller",
            );
        }
    }
    Ok(())
}

/// The guest's memory in MiB: what a limit leaves, or `otherwise`.
pub fn memory_mib(resources: &LinuxResources, otherwise: u64) -> Result<u64, FieldError> {
    let Some(bytes) = memory_limit(resources) else {
        return Ok(otherwise);
    };
    let mib = (bytes >> 20).saturating_sub(HOST_MIB);
    if mib < GUEST_MIN_MIB {
        let least = HOST_MIB + GUEST_MIN_MIB;
        return refuse(
            "linux.resources.memory.limit",
            format!(
                "{bytes} bytes are too few for a microVM, which has a kernel of its own; give {least} MiB or more"
            ),
        );
    }
    // More than any host has is no limit.
    Ok(if mib > MEMORY_MAX_MIB { otherwise } else { mib })
}

/// How many processors the guest has: what a quota comes to, or `otherwise`.
pub fn vcpus(resources: &LinuxResources, otherwise: u64) -> u64 {
    match quota(resources) {
        Some((quota, period)) => quota.div_ceil(period).clamp(1, VCPUS_MAX),
        None => otherwise,
    }
}

/// The kernel's own period, in microseconds.
const PERIOD_US: u64 = 100_000;

/// The limit of memory in bytes, if there is one.
pub fn memory_limit(resources: &LinuxResources) -> Option<u64> {
    let limit = resources.memory().as_ref().and_then(LinuxMemory::limit)?;
    above_zero(limit)
}

/// The limit of processor time, if there is one: microseconds of it in each period, which is above 0.
pub fn quota(resources: &LinuxResources) -> Option<(u64, u64)> {
    let cpu = resources.cpu().as_ref()?;
    let period = cpu.period().filter(|period| *period > 0);
    Some((above_zero(cpu.quota()?)?, period.unwrap_or(PERIOD_US)))
}

/// Limits of zero and below are none.
fn above_zero(limit: i64) -> Option<u64> {
    u64::try_from(limit).ok().filter(|limit| *limit > 0)
}

/// What the groups are to be told, in this order.
pub fn settings(resources: &LinuxResources) -> Vec<Setting> {
    let mut settings = Vec::new();
    if let Some(memory) = resources.memory() {
        add_memory(memory, &mut settings);
    }
    if let Some(cpu) = resources.cpu() {
        add_cpu(cpu, &mut settings);
    }
    if let Some(pids) = resources.pids().filter(|pids| pids.limit() != 0) {
        let text = match pids.limit() {
            limit if limit < 0 => "max".to_owned(),
            limit => limit.max(PIDS_MIN).to_string(),
        };
        settings.push(both("pids", "pids.max", text.clone(), "pids.max", text));
    }
    if let Some(io) = resources.block_io() {
        add_io(io, &mut settings);
    }
    let mut unified: Vec<_> = resources.unified().iter().flatten().collect();
    unified.sort();
    for (file, text) in unified {
        settings.push(Setting {
            // The file says which.
            controllers: ("", ""),
            v2: Some((file.clone(), text.clone())),
            v1: None,
        });
    }
    settings
}

fn both(controller: &'static str, v2: &str, v2_text: String, v1: &str, v1_text: String) -> Setting {
    Setting {
        controllers: (controller, controller),
        v2: Some((v2.to_owned(), v2_text)),
        v1: Some((v1.to_owned(), v1_text)),
    }
}

fn add_memory(memory: &LinuxMemory, settings: &mut Vec<Setting>) {
    // What is below zero is no limit.
    let max = |bytes: i64| {
        if bytes < 0 {
            "max".to_owned()
        } else {
            bytes.to_string()
        }
    };
    if let Some(limit) = memory.limit().filter(|limit| *limit != 0) {
        settings.push(both(
            "memory",
            "memory.max",
            max(limit),
            "memory.limit_in_bytes",
            limit.to_string(),
        ));
    }
    if let Some(swap) = memory.swap().filter(|swap| *swap != 0) {
        let limit = memory.limit().filter(|limit| *limit > 0).unwrap_or(0);
        let only_swap = if swap < 0 {
            swap
        } else {
            swap.saturating_sub(limit).max(0)
        };
        settings.push(both(
            "memory",
            "memory.swap.max",
            max(only_swap),
            "memory.memsw.limit_in_bytes",
            swap.to_string(),
        ));
    }
    if let Some(least) = memory.reservation().filter(|least| *least != 0) {
        settings.push(both(
            "memory",
            "memory.low",
            max(least),
            "memory.soft_limit_in_bytes",
            least.to_string(),
        ));
    }
}

fn add_cpu(cpu: &LinuxCpu, settings: &mut Vec<Setting>) {
    if let Some(shares) = cpu.shares().filter(|shares| *shares != 0) {
        // 2 to 262144 of version 1 are 1 to 10000 of version 2.
        let weight = 1 + shares.clamp(2, 262_144).saturating_sub(2) * 9999 / 262_142;
        settings.push(both(
            "cpu",
            "cpu.weight",
            weight.to_string(),
            "cpu.shares",
            shares.to_string(),
        ));
    }
    let period = cpu.period().filter(|period| *period != 0);
    let quota = cpu.quota().filter(|quota| *quota != 0);
    if period.is_some() || quota.is_some() {
        let period = period.unwrap_or(PERIOD_US);
        let text = match quota {
            Some(quota) if quota > 0 => quota.to_string(),
            _ => "max".to_owned(),
        };
        settings.push(Setting {
            controllers: ("cpu", "cpu"),
            v2: Some(("cpu.max".into(), format!("{text} {period}"))),
            v1: Some(("cpu.cfs_period_us".into(), period.to_string())),
        });
        settings.push(Setting {
            controllers: ("cpu", "cpu"),
            v2: None,
            v1: Some(("cpu.cfs_quota_us".into(), quota.unwrap_or(-1).to_string())),
        });
    }
    for (file, list) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
        if let Some(list) = list.as_ref().filter(|list| !list.is_empty()) {
            settings.push(both("cpuset", file, list.clone(), file, list.clone()));
        }
    }
}

fn add_io(io: &LinuxBlockIo, settings: &mut Vec<Setting>) {
    let lists = [
        (
            io.throttle_read_bps_device(),
            "rbps",
            "blkio.throttle.read_bps_device",
        ),
        (
            io.throttle_write_bps_device(),
            "wbps",
            "blkio.throttle.write_bps_device",
        ),
        (
            io.throttle_read_iops_device(),
            "riops",
            "blkio.throttle.read_iops_device",
        ),
        (
            io.throttle_write_iops_device(),
            "wiops",
            "blkio.throttle.write_iops_device",
        ),
    ];
    for (list, name, file) in lists {
        for one in list.iter().flatten() {
            let device = format!("{}:{}", one.major(), one.minor());
            settings.push(Setting {
                controllers: ("io", "blkio"),
                v2: Some(("io.max".into(), format!("{device} {name}={}", one.rate()))),
                v1: Some((file.into(), format!("{device} {}", one.rate()))),
            });
        }
    }
    if let Some(weight) = io.weight().filter(|weight| *weight != 0) {
        settings.push(Setting {
            controllers: ("io", "blkio"),
            v2: Some(("io.bfq.weight".into(), weight.to_string())),
            v1: Some(("blkio.bfq.weight".into(), weight.to_string())),
        });
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn resources(value: Value) -> LinuxResources {
        serde_json::from_value(value).unwrap()
    }

    /// The files and texts of one version.
    fn texts(value: Value, version: u8) -> Vec<String> {
        let settings = settings(&resources(value));
        let of = |setting: Setting| if version == 1 { setting.v1 } else { setting.v2 };
        settings
            .into_iter()
            .filter_map(of)
            .map(|(file, text)| format!("{file}={text}"))
            .collect()
    }

    #[test]
    fn limit_above_what_any_host_has_is_none() {
        for limit in [i64::MAX, 0x7fff_ffff_ffff_f000, -1, 0] {
            let given = resources(json!({ "memory": { "limit": limit } }));
            assert_eq!(memory_mib(&given, 256).unwrap(), 256, "{limit}");
        }
    }

    #[test]
    fn limits_have_the_files_of_their_version() {
        let all = json!({
            "memory": { "limit": 1000, "swap": 3000, "reservation": 500 },
            "cpu": { "shares": 1024, "quota": 50000, "period": 100000, "cpus": "0-1", "mems": "0" },
            "pids": { "limit": 100 },
            "blockIO": { "throttleReadBpsDevice": [{ "major": 8, "minor": 0, "rate": 7 }] },
            "unified": { "memory.high": "900" },
        });
        assert_eq!(
            texts(all.clone(), 1),
            [
                "memory.limit_in_bytes=1000",
                "memory.memsw.limit_in_bytes=3000",
                "memory.soft_limit_in_bytes=500",
                "cpu.shares=1024",
                "cpu.cfs_period_us=100000",
                "cpu.cfs_quota_us=50000",
                "cpuset.cpus=0-1",
                "cpuset.mems=0",
                "pids.max=100",
                "blkio.throttle.read_bps_device=8:0 7",
            ]
        );
        assert_eq!(
            texts(all, 2),
            [
                "memory.max=1000",
                "memory.swap.max=2000",
                "memory.low=500",
                "cpu.weight=39",
                "cpu.max=50000 100000",
                "cpuset.cpus=0-1",
                "cpuset.mems=0",
                "pids.max=100",
                "io.max=8:0 rbps=7",
                "memory.high=900",
            ]
        );
    }

    #[test]
    fn no_limit_is_said_as_each_version_says_it() {
        let none = json!({ "memory": { "limit": -1, "swap": -1 }, "cpu": { "quota": -1 }, "pids": { "limit": -1 } });
        assert_eq!(
            texts(none.clone(), 1),
            [
                "memory.limit_in_bytes=-1",
                "memory.memsw.limit_in_bytes=-1",
                "cpu.cfs_period_us=100000",
                "cpu.cfs_quota_us=-1",
                "pids.max=max",
            ]
        );
        assert_eq!(
            texts(none, 2),
            [
                "memory.max=max",
                "memory.swap.max=max",
                "cpu.max=max 100000",
                "pids.max=max"
            ]
        );
        assert!(
            texts(
                json!({ "memory": {}, "cpu": {}, "devices": [{ "allow": false }] }),
                1
            )
            .is_empty()
        );
    }

    #[test]
    fn guest_has_what_a_limit_leaves_it() {
        let memory =
            |limit: i64| memory_mib(&resources(json!({ "memory": { "limit": limit } })), 256);
        assert_eq!(memory(128 << 20).unwrap(), 112);
        assert_eq!(memory(-1).unwrap(), 256);
        assert!(memory(63 << 20).unwrap_err().to_string().contains("64 MiB"));
        let cpus = |quota: i64, period: u64| {
            vcpus(
                &resources(json!({ "cpu": { "quota": quota, "period": period } })),
                1,
            )
        };
        assert_eq!(
            (cpus(150_000, 100_000), cpus(-1, 0), cpus(1, 100_000)),
            (2, 1, 1)
        );
        assert_eq!(cpus(i64::MAX, 1), VCPUS_MAX);
    }

    #[test]
    fn what_a_microvm_does_not_have_is_noted_or_refused() {
        let mut notes = Vec::new();
        let few = json!({ "pids": { "limit": 5 }, "hugepageLimits": [{ "pageSize": "2MB", "limit": 1 }] });
        check(&resources(few), &mut notes).unwrap();
        assert!(
            notes.len() == 2 && notes[1].contains("pids.limit"),
            "{notes:?}"
        );
        let memory =
            json!({ "swappiness": 60, "disableOOMKiller": true, "kernel": -1, "kernelTCP": 1 });
        let mut notes = Vec::new();
        let given = json!({ "memory": memory, "cpu": { "realtimeRuntime": 1 } });
        check(&resources(given), &mut notes).unwrap();
        let names: Vec<_> = notes.iter().map(|note| note.split(' ').next()).collect();
        let fields = [
            "memory.swappiness",
            "memory.disableOOMKiller",
            "memory.kernelTCP",
            "cpu.realtimeRuntime",
        ];
        let expected = fields.map(|field| format!("linux.resources.{field}"));
        assert_eq!(names, expected.each_ref().map(|name| Some(&**name)));
        for file in ["cgroup.procs", "a/b.c", "plain"] {
            let unified = json!({ "unified": { file: "1" } });
            assert!(check(&resources(unified), &mut notes).is_err(), "{file}");
        }
    }
}
