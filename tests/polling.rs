//! Device threads that poll for work before they sleep, with a real guest.

mod common;

use std::fs;
use std::thread;
use std::time::Duration;

use common::{Api, Folder, Monitor, Netns, needs, probe_vm_with_disks};
use serde_json::json;

/// What the scheduler knows of a thread: nanoseconds on a CPU and times it was put on one.
fn schedule(monitor: &Monitor, name: &str) -> (u64, u64) {
    let path = format!(
        "/proc/{}/task/{}/schedstat",
        monitor.pid(),
        monitor.thread(name)
    );
    let text = fs::read_to_string(path).unwrap();
    let mut numbers = text
        .split_whitespace()
        .map(|number| number.parse().unwrap());
    let (ran, _, times) = (
        numbers.next().unwrap(),
        numbers.next(),
        numbers.next().unwrap(),
    );
    (ran, times)
}

/// The samples of `GET /metrics` of polls of `device`, by what ended them: work, nothing, preempted.
fn polls(api: &Api, device: &str) -> [u64; 3] {
    let (status, text) = api.request("GET", "/metrics", "");
    assert_eq!(status, 200);
    ["work", "nothing", "preempted"].map(|result| {
        let sample =
            format!(r#"mayfly_device_polls_total{{device="{device}",result="{result}"}} "#);
        let value = text.lines().find_map(|line| line.strip_prefix(&*sample));
        value
            .unwrap_or_else(|| panic!("{sample} is not in: {text}"))
            .parse()
            .unwrap()
    })
}

#[test]
fn threads_when_the_guest_is_idle_take_no_cpu_time_in_ten_seconds() {
    needs!(kvm, root);
    let (netns, folder) = (Netns::new(), Folder::new());
    let quiet = "echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6";
    netns.run("sh", &["-c", quiet]);
    netns.tap("mftap", "172.16.9.1/24");
    let disk = folder.disk("disk", 1 << 20);
    // Work first, then a guest that is halted for ever, with both devices up to the end of the load.
    let words = "blkbench:0:4096:20000:1:randread,netsend:0:5000:64,print:idle,hlt";
    let mut config = probe_vm_with_disks(words, &[&disk]);
    config["network-interfaces"] = json!([{"iface_id": "eth0", "host_dev_name": "mftap"}]);
    let (monitor, _api) = Monitor::boot_inside(&netns, &folder, &config);
    monitor.expect("probe: print:idle ok");
    let threads = ["block", "net"];
    for name in threads {
        monitor.comes_to_rest(name);
    }
    let before = threads.map(|name| schedule(&monitor, name));
    thread::sleep(Duration::from_secs(10));
    assert_eq!(threads.map(|name| schedule(&monitor, name)), before);
}

#[test]
fn polling_when_asked_for_is_counted_and_when_declined_is_not_done() {
    needs!(kvm);
    for (poll_us, polls_wanted) in [(None, true), (Some(1000), true), (Some(0), false)] {
        let folder = Folder::new();
        let disk = folder.disk("disk", 1 << 20);
        let load = "blkbench:0:4096:20000:1:randread,stay";
        let mut config = probe_vm_with_disks(load, &[&disk]);
        if let Some(micros) = poll_us {
            config["drives"][0]["poll_us"] = json!(micros);
        }
        let (monitor, api) = Monitor::boot_with_api(&folder, &config);
        monitor.expect("randread ok");
        let shown = api.get("/vm/config")["drives"][0]["poll_us"].clone();
        assert_eq!(shown, poll_us.map_or(json!(null), |micros| json!(micros)));
        let polled = polls(&api, config["drives"][0]["drive_id"].as_str().unwrap());
        let has_polled = polled.iter().sum::<u64>() > 0;
        // One CPU is too few.
        let expected = polls_wanted && thread::available_parallelism().unwrap().get() > 1;
        assert_eq!(has_polled, expected, "{poll_us:?}: {polled:?}");
    }
}

#[test]
fn poll_us_when_out_of_range_is_refused() {
    let folder = Folder::new();
    let (_monitor, api) = Monitor::unconfigured(&folder);
    let disk = folder.disk("disk", 1 << 20);
    let drive = |micros| json!({"drive_id": "d", "path_on_host": disk, "is_root_device": false, "poll_us": micros});
    let why = api.refused("PUT", "/drives/d", drive(1001));
    assert!(
        why.contains("poll_us 1001 of `d` is out of range [0, 1000]"),
        "{why}"
    );
    api.put("/drives/d", drive(1000));
}

#[test]
fn thread_when_the_guest_kicks_without_end_and_without_work_does_not_poll() {
    needs!(kvm);
    let folder = Folder::new();
    let disk = folder.disk("disk", 1 << 20);
    let config = probe_vm_with_disks("attack:0:kick-storm:20000,stay", &[&disk]);
    let (monitor, api) = Monitor::boot_with_api(&folder, &config);
    monitor.expect("kick-storm:20000 ok");
    // What it did before the storm may have been polled for.
    let [work, nothing, preempted] = polls(&api, config["drives"][0]["drive_id"].as_str().unwrap());
    assert!(
        work + nothing + preempted < 100,
        "{work} {nothing} {preempted}"
    );
}
