//! Drives and network interfaces with several queues, each with a thread of its own.

mod common;
#[path = "snapshot/pair.rs"]
mod pair;

use std::fs;
use std::io::Read;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use common::{
    Api, Folder, LINUX_PATIENCE, Monitor, Netns, needs, probe_vm, probe_vm_with_disks, sys,
};
use pair::{Pair, save_and_end};
use serde_json::{Value, json};

/// A guest whose disk has `queues` queues, or what a client gets who says nothing.
fn guest(folder: &Folder, words: &str, queues: Option<u16>) -> Value {
    let disk = folder.disk("disk", 8 << 20);
    let mut config = probe_vm_with_disks(words, &[&disk]);
    if let Some(queues) = queues {
        config["drives"][0]["queues"] = json!(queues);
    }
    config
}

/// The values of the samples of `GET /metrics` that begin with `name`, in their order.
fn samples(api: &Api, name: &str) -> Vec<u64> {
    let (status, text) = api.request("GET", "/metrics", "");
    assert_eq!(status, 200);
    let lines = text.lines().filter(|line| line.starts_with(name));
    lines
        .map(|line| line.rsplit(' ').next().unwrap().parse().unwrap())
        .collect()
}

/// The names of the threads of devices.
fn device_threads(monitor: &Monitor) -> Vec<String> {
    let names = monitor.threads().into_iter().map(|(_, name)| name);
    let mut names: Vec<_> = names
        .filter(|name| !name.starts_with("block-pool"))
        .filter(|name| name.starts_with("block") || name.starts_with("net"))
        .collect();
    names.sort();
    names
}

#[test]
fn disk_when_it_has_several_queues_serves_each_by_a_thread_of_its_own() {
    needs!(kvm);
    let folder = Folder::new();
    let load = "blkload:0:randrw:4096:16:1500:queues=4:check";
    let words = format!("blkinfo:0,{load},attack:0.3:all,blkinfo:0,stay");
    let config = guest(&folder, &words, Some(4));
    let (monitor, api) = Monitor::boot_with_api(&folder, &config);
    let output = monitor.expect("probe: attack:0.3:all ok");
    assert!(output.contains(&format!("probe: {load} ok")), "{output}");
    assert!(output.contains(" queues=4 "), "{output}");
    let threads = device_threads(&monitor);
    assert_eq!(threads.len(), 4, "{threads:?}");
    let id = config["drives"][0]["drive_id"].as_str().unwrap();
    for name in [format!("block {id}"), format!("block3 {id}")] {
        assert!(threads.contains(&name), "{threads:?}");
    }
    assert_eq!(api.get("/vm/config")["drives"][0]["queues"], 4);
    let kicks = samples(&api, "mayfly_device_kicks_total");
    assert!(
        kicks.len() == 4 && kicks.iter().all(|kicks| *kicks > 0),
        "{kicks:?}"
    );
    // As many as the driver made, not as there are workers.
    let activations = samples(&api, "mayfly_device_activations_total")[0];
    let resets = samples(&api, "mayfly_device_resets_total")[0];
    assert!(activations >= resets && activations - resets <= 1);
    let expected = output.matches("blkinfo").count() as u64;
    assert!(activations > expected, "{activations}");
}

#[test]
fn disk_when_nothing_is_said_has_the_one_queue_that_it_always_had() {
    needs!(kvm);
    let mut seen = Vec::new();
    for queues in [None, Some(1)] {
        let folder = Folder::new();
        let config = guest(&folder, "blkinfo:0,stay", queues);
        let (monitor, api) = Monitor::boot_with_api(&folder, &config);
        // With its end: a line can come in parts.
        let output = monitor.expect(" id=disk0\r\n");
        let line = output.lines().find(|line| line.contains("blkinfo:0 ok"));
        seen.push(line.unwrap().to_owned());
        assert_eq!(device_threads(&monitor).len(), 1);
        assert_eq!(samples(&api, "mayfly_device_kicks_total").len(), 1);
        let shown = &api.get("/vm/config")["drives"][0]["queues"];
        assert_eq!(*shown, json!(queues));
    }
    assert_eq!(seen[0], seen[1]);
    // VIRTIO_BLK_F_MQ is not among these: what a disk offered before there were several queues.
    assert!(seen[0].contains(" offered=0x130006446 "), "{}", seen[0]);
    assert!(seen[0].contains(" queues=1 "), "{}", seen[0]);
}

#[test]
fn guest_when_saved_with_requests_on_all_queues_goes_on_with_them() {
    needs!(kvm);
    let folder = Folder::new();
    // Longer than saving it takes on a busy host.
    let load = "blkload:0:randrw:8192:32:8000:queues=4:check";
    let config = guest(&folder, &format!("{load},poweroff"), Some(4));
    let own = Folder::new();
    let (monitor, api) = Monitor::boot_with_api(&own, &config);
    monitor.expect("blkload begun");
    let pair = Pair::new(&folder, "first");
    common::wait_until("a request to be answered", || {
        samples(&api, "mayfly_block_operations_total")
            .iter()
            .sum::<u64>()
            > 0
    });
    save_and_end(monitor, &api, &pair);
    assert_eq!(version_of(&pair), "v1.1.0\n");

    let own = Folder::new();
    let (mut monitor, api) = Monitor::unconfigured(&own);
    api.put("/snapshot/load", pair.resume(json!({})));
    assert_eq!(device_threads(&monitor).len(), 4);
    let output = monitor.expect_within(&format!("probe: {load} ok"), Duration::from_secs(60));
    assert!(output.contains(&format!("probe: {load} ok")), "{output}");
    monitor.exits_with(0);
}

/// The version of the format that the state file has.
fn version_of(pair: &Pair) -> String {
    let mut monitor = Monitor::start(["--describe-snapshot".as_ref(), pair.state.as_os_str()]);
    monitor.exits_with(0);
    monitor.stdout()
}

#[test]
fn snapshot_when_no_device_was_given_queues_has_the_first_version_and_none_of_their_members() {
    needs!(kvm);
    let (folder, own) = (Folder::new(), Folder::new());
    let config = guest(&folder, "print:up,stay", None);
    let (monitor, api) = Monitor::boot_with_api(&own, &config);
    monitor.expect("probe: print:up ok");
    let pair = Pair::new(&folder, "one");
    save_and_end(monitor, &api, &pair);
    assert_eq!(version_of(&pair), "v1.0.0\n");
    let state = fs::read(&pair.state).unwrap();
    let state = String::from_utf8_lossy(&state);
    assert!(state.contains("\"drive_id\""), "{state}");
    for member in ["\"others\"", "\"pairs\"", "\"queue_fds\""] {
        assert!(!state.contains(member), "{member} in {state}");
    }
}

#[test]
fn disk_when_it_bypasses_the_page_cache_or_has_no_io_uring_keeps_what_all_queues_write() {
    needs!(kvm);
    for (cache, has_ring) in [(true, true), (true, false), (false, false)] {
        let errno = (!has_ring).then_some(libc::EPERM);
        common::with_io_uring_answering(errno, move || {
            let folder = Folder::new();
            // The loads of two sizes: one of whole pages, and one of sectors, side by side in a block.
            let loads =
                [4096, 512].map(|size| format!("blkload:0:randrw:{size}:16:1000:queues=3:check"));
            let mut config = guest(&folder, &format!("{},stay", loads.join(",")), Some(3));
            match cache {
                true => config["drives"][0]["cache"] = json!("none"),
                false => config["drives"][0]["cache_type"] = json!("Writeback"),
            }
            let (monitor, api) = Monitor::boot_with_api(&folder, &config);
            let output = monitor.expect(&format!("probe: {} ok", loads[1]));
            for load in &loads {
                assert!(output.contains(&format!("probe: {load} ok")), "{output}");
            }
            let kicks = samples(&api, "mayfly_device_kicks_total");
            assert!(
                kicks.len() == 3 && kicks.iter().all(|kicks| *kicks > 0),
                "{kicks:?}"
            );
            let threads = monitor.threads();
            let pool = threads
                .iter()
                .filter(|(_, name)| name.starts_with("block-pool"));
            assert_eq!(pool.count() > 0, !has_ring, "{threads:?}");
        });
    }
}

#[test]
fn disk_when_changed_while_all_queues_work_is_another_one_afterwards() {
    needs!(kvm);
    let folder = Folder::new();
    let load = "blkload:0:randread:4096:16:2500:queues=3";
    let config = guest(&folder, &format!("{load},shell"), Some(3));
    let (mut monitor, api) = Monitor::boot_with_api(&folder, &config);
    monitor.expect("blkload begun");
    let id = config["drives"][0]["drive_id"].as_str().unwrap();
    for round in 0..20u64 {
        let other = folder.disk(&format!("other{round}"), (9 + round) << 20);
        let limits = json!({"ops": {"size": 1_000_000, "refill_time": 10 + round}});
        let body = json!({"drive_id": id, "path_on_host": other, "rate_limiter": limits});
        api.patch(&format!("/drives/{id}"), body);
    }
    // After the last change, however long they took.
    monitor.expect("shell ready");
    monitor.type_in("blkinfo:0\n");
    let output = monitor.expect(" id=disk0");
    assert!(output.contains(&format!("probe: {load} ok")), "{output}");
    assert!(
        output.contains(&format!(" capacity={} ", 28 << 11)),
        "{output}"
    );
    assert_eq!(samples(&api, "mayfly_block_updates_total"), [20]);
}

#[test]
fn queues_when_they_cannot_be_are_refused_with_a_message() {
    let folder = Folder::new();
    let (_monitor, api) = Monitor::unconfigured(&folder);
    let disk = folder.disk("disk", 1 << 20);
    let drive = |more: Value| {
        let mut drive = json!({"drive_id": "d", "path_on_host": disk, "is_root_device": false});
        let more = more.as_object().unwrap().clone();
        drive.as_object_mut().unwrap().extend(more);
        drive
    };
    for queues in [0, 17, 65535] {
        let why = api.refused("PUT", "/drives/d", drive(json!({"queues": queues})));
        let expected = format!("queues {queues} of `d` is out of range [1, 16]");
        assert!(why.contains(&expected), "{why}");
    }
    let overlay = json!({"queues": 2, "overlay": {"memory": true}});
    let why = api.refused("PUT", "/drives/d", drive(overlay));
    assert!(why.contains("`d` has an overlay"), "{why}");
    api.put(
        "/drives/d",
        drive(json!({"queues": 1, "overlay": {"memory": true}})),
    );
    api.put("/drives/d", drive(json!({"queues": 16})));
    assert_eq!(api.get("/vm/config")["drives"][0]["queues"], 16);
}

/// A tap with several queues, in a namespace of its own.
fn multi_queue_tap(netns: &Netns, name: &str) {
    let quiet = "echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6";
    netns.run("sh", &["-c", quiet]);
    let add = format!("tuntap add dev {name} mode tap vnet_hdr multi_queue");
    for words in [
        add,
        format!("addr add 172.16.9.1/24 dev {name}"),
        format!("link set {name} up"),
        format!("neigh add 172.16.9.2 lladdr 02:00:00:00:00:09 dev {name}"),
    ] {
        netns.run("ip", &words.split(' ').collect::<Vec<_>>());
    }
}

/// The number of the next datagram.
static NEXT: AtomicU32 = AtomicU32::new(1);

/// Sends datagrams of many flows to the guest, until `is_over`: each has its number, and bytes that follow from it,
/// which the guest checks.
fn send_flows(netns: &Netns, mut is_over: impl FnMut() -> bool + Send) {
    netns.inside(|| {
        let sockets: Vec<_> = (0..64)
            .map(|_| std::net::UdpSocket::bind("172.16.9.1:0").unwrap())
            .collect();
        while !is_over() {
            for (port, socket) in (2000..).zip(&sockets) {
                let number = NEXT.fetch_add(1, Ordering::Relaxed);
                let mut datagram = number.to_le_bytes().to_vec();
                let first = (number as u8).wrapping_mul(31);
                datagram.extend((0..96).map(|at| first.wrapping_add(at)));
                let _ = socket.send_to(&datagram, ("172.16.9.2", port));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    });
}

/// The type of the frames that the guest sends (IEEE Std 802, for experiments).
const EXPERIMENT: u16 = 0x88b5;

/// How many frames each pair has received, by the line of the word.
fn received(output: &str) -> Vec<u64> {
    let (_, rest) = output.split_once(" received ").expect(output);
    let counts = rest.lines().next().unwrap().split(' ');
    counts.map_while(|count| count.parse().ok()).collect()
}

#[test]
fn interface_when_it_has_several_pairs_uses_those_that_the_driver_says() {
    needs!(kvm, root, tun);
    let (netns, folder) = (Netns::new(), Folder::new());
    multi_queue_tap(&netns, "mfmq");
    let words = "netpairs:0:3:3000,attack:0.8:all,netpairs:0:1:500,print:end,stay";
    let mut config = probe_vm(words);
    config["network-interfaces"] = json!([{
        "iface_id": "eth0", "host_dev_name": "mfmq", "queues": 4, "guest_mac": "02:00:00:00:00:09",
    }]);
    let mut sent = netns.inside(|| sys::frames("mfmq", EXPERIMENT));
    let (monitor, api) = Monitor::boot_inside(&netns, &folder, &config);
    monitor.expect("netpairs ready");
    assert_eq!(device_threads(&monitor).len(), 4);
    // One frame by each pair in use, as the guest wrote it.
    let mut pairs = [(); 3].map(|()| {
        let mut frame = [0; 1514];
        let size = sent.read(&mut frame).unwrap();
        assert_eq!(size, 60);
        assert_eq!(
            frame[..14],
            *b"\xff\xff\xff\xff\xff\xff\x02\0\0\0\0\x09\x88\xb5"
        );
        assert!(
            frame[14..60].iter().all(|byte| *byte == frame[14]),
            "{frame:?}"
        );
        frame[14]
    });
    pairs.sort_unstable();
    assert_eq!(pairs, [1, 2, 3]);
    assert_eq!(api.get("/vm/config")["network-interfaces"][0]["queues"], 4);
    send_flows(&netns, || monitor.stdout().contains("print:end ok"));
    let output = monitor.stdout();
    let lines: Vec<_> = output
        .lines()
        .filter(|line| line.starts_with("probe: netpairs"))
        .collect();
    let (three, one) = (received(lines[0]), received(lines[1]));
    assert!(three[..3].iter().all(|count| *count > 0), "{three:?}");
    assert_eq!(three[3], 0, "{three:?}");
    assert!(one[0] >= 500 && one[1..] == [0, 0, 0], "{one:?}");
    assert!(output.contains("attack:0.8:all ok"), "{output}");
}

#[test]
fn interface_when_saved_with_several_pairs_has_them_again() {
    needs!(kvm, root, tun);
    let (netns, folder, own) = (Netns::new(), Folder::new(), Folder::new());
    multi_queue_tap(&netns, "mfmq");
    let mut config = probe_vm("netpairs:0:3:6000,poweroff");
    config["network-interfaces"] = json!([{
        "iface_id": "eth0", "host_dev_name": "mfmq", "queues": 3, "guest_mac": "02:00:00:00:00:09",
    }]);
    let (monitor, api) = Monitor::boot_inside(&netns, &own, &config);
    monitor.expect("netpairs ready");
    let mut rounds = 0;
    send_flows(&netns, || {
        rounds += 1;
        rounds > 20
    });
    let pair = Pair::new(&folder, "pairs");
    save_and_end(monitor, &api, &pair);

    let own = Folder::new();
    let mut command = netns.command(common::mayfly());
    command.arg("--api-sock").arg(own.join("api"));
    let monitor = Monitor::spawn(command);
    let api = Api::at(own.join("api"));
    api.put("/snapshot/load", pair.resume(json!({})));
    assert_eq!(
        netns
            .run(
                "sh",
                &["-c", "ls -d /sys/class/net/mfmq/queues/rx-* | wc -l"]
            )
            .trim(),
        "3"
    );
    send_flows(&netns, || monitor.stdout().contains(" received "));
    let output = monitor.expect("probe: netpairs:0:3:6000 ok");
    let counts = received(&output);
    assert!(counts.iter().all(|count| *count > 0), "{counts:?}");
}

#[test]
fn tap_when_it_has_one_queue_and_several_are_asked_for_is_refused_with_its_name() {
    needs!(root, tun);
    let (netns, folder) = (Netns::new(), Folder::new());
    netns.tap("mfone", "172.16.9.1/24");
    let mut command = netns.command(common::mayfly());
    command.arg("--api-sock").arg(folder.join("api"));
    let _monitor = Monitor::spawn(command);
    let api = Api::at(folder.join("api"));
    let interface =
        |queues| json!({"iface_id": "eth0", "host_dev_name": "mfone", "queues": queues});
    let why = api.refused("PUT", "/network-interfaces/eth0", interface(2));
    assert!(
        why.contains("mfone") && why.contains("multi_queue"),
        "{why}"
    );
    let why = api.refused("PUT", "/network-interfaces/eth0", interface(17));
    assert!(
        why.contains("queues 17 of `eth0` is out of range [1, 16]"),
        "{why}"
    );
    api.put("/network-interfaces/eth0", interface(1));
    // One that is missing is made with several.
    let made = json!({"iface_id": "eth1", "host_dev_name": "mfmade", "queues": 2});
    api.put("/network-interfaces/eth1", made);
}

#[test]
fn interface_when_the_queues_of_its_tap_are_passed_uses_them() {
    needs!(kvm, root, tun);
    let (netns, folder) = (Netns::new(), Folder::new());
    multi_queue_tap(&netns, "mfpq");
    let taps = netns.inside(|| [(); 3].map(|()| sys::open_tap_queue("mfpq")));
    let (monitor, api) = Monitor::unconfigured(&folder);
    let config = probe_vm("netpairs:0:3:3000,poweroff");
    for section in ["boot-source", "machine-config"] {
        api.put(&format!("/{section}"), config[section].clone());
    }
    let interface = json!({
        "iface_id": "eth0", "host_dev_name": {"fd": 0}, "queues": 3, "queue_fds": [{"fd": 1}, {"fd": 2}],
        "guest_mac": "02:00:00:00:00:09",
    });
    let fds = taps.each_ref().map(AsFd::as_fd);
    api.put_with("/network-interfaces/eth0", interface, &fds);
    drop(taps);
    api.put("/actions", json!({"action_type": "InstanceStart"}));
    monitor.expect("netpairs ready");
    send_flows(&netns, || monitor.stdout().contains(" received "));
    let output = monitor.expect("probe: netpairs:0:3:3000 ok");
    let counts = received(&output);
    assert!(counts.iter().all(|count| *count > 0), "{counts:?}");
}

#[test]
fn queue_fds_when_they_are_not_the_other_queues_of_the_tap_are_refused() {
    needs!(root, tun);
    let (netns, folder) = (Netns::new(), Folder::new());
    let (queue, other, single) = netns.inside(|| {
        let queues = ["mfqa", "mfqb"].map(sys::open_tap_queue);
        let [queue, other] = queues;
        (queue, other, sys::open_tap("mfqs"))
    });
    let second = netns.inside(|| sys::open_tap_queue("mfqa"));
    let again = single.try_clone().unwrap();
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
        .unwrap();
    let (_monitor, api) = Monitor::unconfigured(&folder);
    let path = "/network-interfaces/eth0";
    let interface = |queues: u16, fds: Value| json!({"iface_id": "eth0", "host_dev_name": {"fd": 0}, "queues": queues, "queue_fds": fds});
    for (queues, queue_fds, fds, why) in [
        (
            3,
            json!([{"fd": 1}]),
            [&queue, &second],
            "has 3 queues and 1 in `queue_fds`",
        ),
        (
            2,
            json!([]),
            [&queue, &second],
            "has 2 queues and 0 in `queue_fds`",
        ),
        (
            1,
            json!([{"fd": 1}]),
            [&queue, &second],
            "has 1 queues and 1 in `queue_fds`",
        ),
        (
            2,
            json!(["mfqa"]),
            [&queue, &second],
            "has 2 queues and 1 in `queue_fds`",
        ),
        (
            2,
            json!([{"fd": 1}]),
            [&queue, &other],
            "is not another queue of the same tap",
        ),
        (
            2,
            json!([{"fd": 1}]),
            [&queue, &single],
            "is not another queue of the same tap",
        ),
        (
            2,
            json!([{"fd": 1}]),
            [&single, &again],
            "is not another queue of the same tap",
        ),
        (
            2,
            json!([{"fd": 1}]),
            [&queue, &file.as_fd().try_clone_to_owned().unwrap()],
            "is not an attached tap",
        ),
    ] {
        let body = interface(queues, queue_fds).to_string();
        let (status, answer) = api.request_with("PUT", path, &body, &fds.map(AsFd::as_fd));
        assert_eq!(status, 400, "{body}: {answer}");
        assert!(answer.contains(why), "{body}: {answer}, not {why}");
    }
    let fds = [queue.as_fd(), second.as_fd()];
    api.put_with(path, interface(2, json!([{"fd": 1}])), &fds);
}

#[test]
fn linux_when_its_disk_has_several_queues_uses_them() {
    needs!(kvm);
    let folder = Folder::new();
    let linux = common::linux();
    let disk = folder.join("disk");
    fs::copy(&linux.disk, &disk).unwrap();
    let config = json!({
        "boot-source": {
            "kernel_image_path": linux.kernel,
            "boot_args": format!("{} mayfly.run=shell", linux.cmdline),
        },
        "machine-config": {"vcpu_count": 2, "mem_size_mib": 128},
        "drives": [{
            "drive_id": "rootfs",
            "path_on_host": disk,
            "is_root_device": true,
            "cache_type": "Writeback",
            "queues": 2,
        }],
    });
    let mut tries_left = 3;
    let (_own, _monitor, api, output) = loop {
        let own = Folder::new();
        let (mut monitor, api) = Monitor::boot_with_api(&own, &config);
        monitor.expect_within("mayfly-guest: shell ready", LINUX_PATIENCE);
        monitor.type_in(
            "mount -t proc proc /proc; echo mq $(ls /sys/block/vda/mq | wc -l); \
             for cpu in 1 2; do taskset $cpu dd if=/dev/urandom of=/file$cpu bs=64k count=4 conv=fsync 2>/dev/null; done; \
             echo sums $(sha256sum /file1 /file2 | cut -c1-64); echo 3 >/proc/sys/vm/drop_caches; \
             echo sums $(taskset 2 sha256sum /file1 /file2 | cut -c1-64); echo do''ne\n",
        );
        match monitor.wait_for("done\r\n", LINUX_PATIENCE) {
            Ok(output) => break (own, monitor, api, output),
            // Where KVM emulates the guest's kernel, programs of a guest with two vCPUs end so now and then.
            Err(output)
                if tries_left > 0
                    && common::is_software_kvm()
                    && output.contains("Segmentation fault") =>
            {
                tries_left -= 1;
            }
            Err(output) => panic!("{output}"),
        }
    };
    assert!(output.contains("mq 2\r\n"), "{output}");
    let mut sums = output
        .lines()
        .filter(|line| line.starts_with("sums ") && line.len() > 128);
    let (written, read) = (sums.next().unwrap(), sums.next().unwrap());
    assert_eq!(written, read);
    let kicks = samples(&api, "mayfly_device_kicks_total");
    assert!(kicks.iter().all(|kicks| *kicks > 0), "{kicks:?}");
}
