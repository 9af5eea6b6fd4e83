//! Starting and ending: what the guest finds when it begins, how the process ends, and what
//! becomes of the console and the terminal. The guest is the bare-metal probe.

mod common;

use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};

use common::sys::{self, Terminal};
use common::{Api, Folder, Monitor, Netns, needs, probe_vm, probe_vm_with_disks};
use probe_host::{elf, pattern};
use serde_json::{Value, json};

const PROTOCOLS: [(&str, &str); 2] = [("pvh", "Pvh"), ("linux64", "Linux64")];

/// Runs a guest to its end, which must be a reset; what it printed.
fn run(config: &Value, more: &[&str]) -> String {
    let folder = Folder::new();
    let mut monitor = Monitor::boot_with(&folder, config, more);
    monitor.exits_with(0);
    monitor.stdout()
}

/// What follows `key=` in the first line of `text` that has it.
fn value<'a>(text: &'a str, key: &str) -> &'a str {
    let key = format!("{key}=");
    let at = text
        .find(&key)
        .unwrap_or_else(|| panic!("no {key}: {text}"));
    text[at + key.len()..].split_whitespace().next().unwrap()
}

// Protocols and kernels

#[test]
fn kernel_when_it_has_a_pvh_note_is_entered_by_pvh() {
    needs!(kvm);
    let output = run(&probe_vm("bootinfo"), &[]);
    assert!(output.contains("bootinfo ok protocol=Pvh"), "{output}");
}

#[test]
fn kernel_when_linux64_is_asked_for_is_entered_by_it() {
    needs!(kvm);
    let output = run(&probe_vm("bootinfo"), &["--boot-protocol", "linux64"]);
    assert!(output.contains("bootinfo ok protocol=Linux64"), "{output}");
    assert!(output.contains("setup_data type 9 size 32"), "{output}");
}

#[test]
fn kernel_when_it_has_no_pvh_note_is_entered_by_linux64() {
    needs!(kvm);
    let folder = Folder::new();
    let mut kernel = fs::read(common::probe()).unwrap();
    elf::without_pvh(&mut kernel);
    let mut config = probe_vm("bootinfo");
    config["boot-source"]["kernel_image_path"] = json!(folder.file("kernel", kernel));
    let output = run(&config, &[]);
    assert!(output.contains("bootinfo ok protocol=Linux64"), "{output}");
}

#[test]
fn kernel_when_20_mib_large_runs() {
    needs!(kvm);
    let folder = Folder::new();
    let kernel = folder.file("kernel", elf::first_byte(elf::End::Reset, 20 << 20));
    let mut config = probe_vm("");
    config["boot-source"]["kernel_image_path"] = json!(kernel);
    for (protocol, _) in PROTOCOLS {
        assert_eq!(run(&config, &["--boot-protocol", protocol]), "!");
    }
}

#[test]
fn kernel_when_removed_after_put_still_starts() {
    needs!(kvm);
    let folder = Folder::new();
    let kernel = folder.file("kernel", fs::read(common::probe()).unwrap());
    let disk = folder.disk("disk", 4096);
    let (mut monitor, api) = Monitor::unconfigured(&folder);
    api.put(
        "/boot-source",
        json!({"kernel_image_path": kernel, "boot_args": "probe=blkread:0:0"}),
    );
    api.put(
        "/drives/d",
        json!({"drive_id": "d", "path_on_host": disk, "is_root_device": false}),
    );
    fs::remove_file(kernel).unwrap();
    fs::remove_file(disk).unwrap();
    api.put("/actions", json!({"action_type": "InstanceStart"}));
    monitor.exits_with(0);
    let output = monitor.stdout();
    assert!(output.contains("blkread:0:0 ok"), "{output}");
}

#[test]
fn initrd_when_given_is_seen_whole_by_the_guest() {
    needs!(kvm);
    let folder = Folder::new();
    // Copied, mapped, and neither a whole number of pages.
    for len in [1, 5000, 3_000_001] {
        let mut bytes = vec![0; len];
        pattern::fill(7, 0, &mut bytes);
        let sum = pattern::sum(pattern::SUM_START, &bytes);
        let mut config = probe_vm("bootinfo");
        config["boot-source"]["initrd_path"] = json!(folder.file("initrd", &bytes));
        for (protocol, _) in PROTOCOLS {
            let output = run(&config, &["--boot-protocol", protocol]);
            let seen = format!("size {len} sum {sum:016x}");
            assert!(output.contains(&seen), "{protocol}: {seen}: {output}");
        }
    }
}

// The machine

#[test]
fn vcpus_when_configured_are_in_the_mp_table_and_have_threads() {
    needs!(kvm);
    for count in [1, 2, 3, 32] {
        for (protocol, _) in PROTOCOLS {
            let folder = Folder::new();
            let mut config = probe_vm("cpus,print:told,echo");
            config["machine-config"]["vcpu_count"] = json!(count);
            let mut monitor = Monitor::boot_with(&folder, &config, &["--boot-protocol", protocol]);
            let output = monitor.expect("probe: echo ready");
            assert_eq!(value(&output, "processors"), count.to_string(), "{output}");
            assert_eq!(value(&output, "enabled"), count.to_string(), "{output}");
            for id in 0..count {
                let line = format!("  processor apic id {id} ");
                assert!(output.contains(&line), "{line}: {output}");
            }
            let threads = monitor.threads();
            for index in 0..count {
                let name = format!("fc_vcpu {index}");
                assert!(threads.iter().any(|(_, n)| *n == name), "{threads:?}");
            }
            monitor.type_in("\n.\n");
            monitor.exits_with(0);
        }
    }
}

#[test]
fn vcpus_when_the_guest_starts_them_all_run() {
    needs!(kvm);
    for count in [2, 3] {
        let mut config = probe_vm(&format!("smp:{count}"));
        config["machine-config"]["vcpu_count"] = json!(count);
        let output = run(&config, &[]);
        let line = format!("probe: smp:{count} ok cpus={count}");
        assert!(output.contains(&line), "{output}");
    }
}

#[test]
fn memory_when_of_any_size_is_all_there() {
    needs!(kvm);
    const HOLE: u64 = 3072;
    for mib in [4, 5, 128, HOLE - 1, HOLE, HOLE + 1, 4096, 5000] {
        for (protocol, _) in PROTOCOLS {
            let mut config = probe_vm("bootinfo,mem");
            config["machine-config"]["mem_size_mib"] = json!(mib);
            let output = run(&config, &["--boot-protocol", protocol]);
            // All but what the PC keeps for itself below 1 MiB.
            let ram = (mib << 20) - (0x10_0000 - 0x9_fc00);
            assert_eq!(value(&output, "ram"), ram.to_string(), "{mib}: {output}");
            // The first and the last page of each piece were written and read.
            let pages = if mib > HOLE { 6 } else { 4 };
            let line = format!("probe: mem ok pages={pages}");
            assert!(output.contains(&line), "{mib}: {output}");
            let end = (mib.saturating_sub(HOLE) << 20) + (4 << 30);
            let high = format!("region 0x0100000000..{end:#012x} type 1");
            assert_eq!(output.contains(&high), mib > HOLE, "{high}: {output}");
        }
    }
}

#[test]
fn interrupt_controller_when_in_either_place_boots_and_its_timer_counts() {
    needs!(kvm);
    for place in [None, Some("auto"), Some("split"), Some("kernel")] {
        let folder = Folder::new();
        let mut config = probe_vm("pit,pic,smp:2,echo");
        config["machine-config"]["vcpu_count"] = json!(2);
        if let Some(place) = place {
            config["machine-config"]["interrupt_controller"] = json!(place);
        }
        let (mut monitor, api) = Monitor::boot_with_api(&folder, &config);
        let output = monitor.expect("probe: echo ready");
        // Firecracker's clients compare what is reported.
        let shown = &api.get("/machine-config")["interrupt_controller"];
        let expected = place.filter(|place| *place != "auto");
        assert_eq!(shown.as_str(), expected, "{place:?}");
        let number = |name| value(&output, name).parse::<f64>().unwrap();
        let ratio = number("khz") / number("cpuid");
        // A busy host makes it seem greater.
        assert!((0.9..1.8).contains(&ratio), "{place:?}: {ratio}: {output}");
        assert!(output.contains("probe: smp:2 ok"), "{output}");
        monitor.type_in("x\n");
        monitor.exits_with(0);
    }
}

#[test]
fn command_line_when_it_asks_for_the_old_controller_gets_the_kernels() {
    needs!(kvm);
    const TOLD: &str = "The guest waits for interrupts from the 8259 interrupt controller";
    for (words, place, told) in [
        ("", "auto", true),
        (" noapic", "auto", false),
        (" no-kvmclock", "auto", false),
        (" noapic", "split", true),
        ("", "kernel", false),
    ] {
        let mut config = probe_vm("pic");
        let args = config["boot-source"]["boot_args"].as_str().unwrap();
        config["boot-source"]["boot_args"] = json!(format!("{args}{words}"));
        config["machine-config"]["interrupt_controller"] = json!(place);
        let folder = Folder::new();
        let mut monitor = Monitor::boot(&folder, &config);
        monitor.expect("probe: pic ok");
        monitor.exits_with(0);
        let log = fs::read_to_string(folder.join("log")).unwrap();
        assert_eq!(log.contains(TOLD), told, "{words:?} {place}: {log}");
    }
}

#[test]
fn io_apic_when_its_routes_do_not_stop_changing_slows_all_vcpus_down_together() {
    needs!(kvm);
    const AT_ONCE: u64 = 512;
    const VCPUS: u64 = 4;
    for vcpus in [1, VCPUS] {
        let folder = Folder::new();
        let mut config = probe_vm(&format!("smp:{vcpus},routes:3000,echo"));
        config["machine-config"]["vcpu_count"] = json!(vcpus);
        config["machine-config"]["interrupt_controller"] = json!("split");
        let (mut monitor, api) = Monitor::boot_with_api(&folder, &config);
        // A pause reaches vCPUs that wait for their turn.
        monitor.expect("probe: smp");
        api.patch("/vm", json!({"state": "Paused"}));
        monitor.stays_paused(&api, vcpus as usize);
        api.patch("/vm", json!({"state": "Resumed"}));
        let output = monitor.expect("probe: echo ready");
        let number = |name| value(&output, name).parse::<u64>().unwrap();
        let (changes, millis) = (number("changes"), number("took_ms"));
        // One each millisecond, those that waited when the time was over, and the clock's error.
        let most = AT_ONCE + millis + millis / 10 + VCPUS;
        assert!(changes <= most, "{changes} in {millis} ms: {output}");
        assert!(changes >= AT_ONCE, "{changes} in {millis} ms: {output}");
        monitor.type_in("x\n");
        monitor.exits_with(0);
        let log = fs::read_to_string(folder.join("log")).unwrap();
        assert!(log.lines().count() < 20, "{log}");
    }
}

#[test]
fn io_apic_when_accessed_in_every_way_lets_the_guest_go_on() {
    needs!(kvm);
    for place in ["split", "kernel"] {
        let folder = Folder::new();
        let mut config = probe_vm("chipnoise:1:5000,chipnoise:2:5000,ports:3:97");
        config["machine-config"]["interrupt_controller"] = json!(place);
        let mut monitor = Monitor::boot(&folder, &config);
        monitor.exits_with(0);
        let output = monitor.stdout();
        let done = output.matches("probe: chipnoise").count();
        assert_eq!((done, output.contains("FAILED")), (2, false), "{output}");
    }
}

#[test]
fn memory_when_just_enough_for_the_kernel_runs_it() {
    needs!(kvm);
    let folder = Folder::new();
    let mut config = probe_vm("");
    config["boot-source"]["kernel_image_path"] =
        json!(folder.file("kernel", elf::first_byte(elf::End::Reset, 0)));
    config["machine-config"]["mem_size_mib"] = json!(2);
    assert_eq!(run(&config, &[]), "!");
}

#[test]
fn devices_when_19_all_work_in_their_order() {
    needs!(kvm, root);
    let folder = Folder::new();
    let netns = Netns::new();
    let mut words = String::from("bootinfo");
    let (mut drives, mut cards) = (vec![], vec![]);
    for n in 0..16 {
        let disk = folder.disk(&format!("disk{n}"), 512 * (n + 1));
        drives.push(
            json!({"drive_id": format!("d{n}"), "path_on_host": disk, "is_root_device": n == 9}),
        );
        words += &format!(",blkinfo:{n}");
    }
    for n in 16..19 {
        cards.push(json!({
            "iface_id": format!("n{n}"),
            "host_dev_name": format!("mftap{n}"),
            "guest_mac": format!("06:00:00:00:00:{n:02x}"),
        }));
        words += &format!(",netinfo:{n}");
    }
    let mut config = probe_vm(&words);
    config["drives"] = json!(drives);
    config["network-interfaces"] = json!(cards);
    let (mut monitor, _) = Monitor::boot_inside(&netns, &folder, &config);
    monitor.exits_with(0);
    let output = monitor.stdout();
    assert!(output.contains("devices=19"), "{output}");
    // The root goes first, the others keep their order.
    let order = [9].into_iter().chain(0..9).chain(10..16);
    for (place, n) in order.enumerate() {
        let line = output
            .lines()
            .find(|l| l.contains(&format!("blkinfo:{place} ok")))
            .unwrap_or_else(|| panic!("disk {place}: {output}"));
        assert_eq!(value(line, "id"), format!("d{n}"));
        assert_eq!(value(line, "capacity"), (n + 1).to_string());
    }
    for n in 16..19 {
        let line = output
            .lines()
            .find(|l| l.contains(&format!("netinfo:{n} ok")))
            .unwrap_or_else(|| panic!("card {n}: {output}"));
        assert_eq!(value(line, "mac"), format!("06:00:00:00:00:{n:02x}"));
    }
}

/// The kernel command line as the guest finds it.
fn command_line_seen(config: &Value, more: &[&str]) -> String {
    let output = run(config, more);
    let line = output
        .lines()
        .find_map(|l| l.strip_prefix("probe:   cmdline "));
    line.unwrap_or_else(|| panic!("{output}")).to_owned()
}

#[test]
fn command_line_when_the_guest_reads_it_has_what_firecracker_would_add() {
    needs!(kvm);
    let folder = Folder::new();
    let disk = folder.disk("disk", 4096);
    let drive = |id: &str, more: Value| {
        let mut drive = json!({"drive_id": id, "path_on_host": disk, "is_root_device": false});
        drive
            .as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        drive
    };
    let args = "probe=bootinfo a=\"b c\" quiet";
    // boot_args, drives, what the guest is to see
    let cases = [
        (args.to_owned(), vec![], format!("{args} pci=off")),
        (
            args.to_owned(),
            vec![drive("d", json!({}))],
            format!("{args} pci=off virtio_mmio.device=4K@0xc0001000:5"),
        ),
        (
            args.to_owned(),
            vec![
                drive("d", json!({})),
                drive("root", json!({"is_root_device": true})),
            ],
            format!(
                "{args} pci=off root=/dev/vda rw virtio_mmio.device=4K@0xc0001000:5 \
                 virtio_mmio.device=4K@0xc0002000:6"
            ),
        ),
        (
            args.to_owned(),
            vec![drive(
                "root",
                json!({"is_root_device": true, "is_read_only": true, "partuuid": "0eaa91a0-01"}),
            )],
            format!(
                "{args} pci=off root=PARTUUID=0eaa91a0-01 ro virtio_mmio.device=4K@0xc0001000:5"
            ),
        ),
        (
            format!("{args} -- one two"),
            vec![drive("root", json!({"is_root_device": true}))],
            format!(
                "{args} pci=off root=/dev/vda rw virtio_mmio.device=4K@0xc0001000:5 -- one two"
            ),
        ),
    ];
    for (boot_args, drives, expected) in cases {
        let mut config = probe_vm("");
        config["boot-source"]["boot_args"] = json!(boot_args);
        config["drives"] = json!(drives);
        for (protocol, _) in PROTOCOLS {
            let seen = command_line_seen(&config, &["--boot-protocol", protocol]);
            assert_eq!(seen, expected, "{protocol}");
        }
    }
}

#[test]
fn command_line_when_none_is_given_is_firecrackers_default() {
    needs!(kvm);
    const DEFAULT: &str = "reboot=k panic=1 nomodule 8250.nr_uarts=0 i8042.noaux i8042.nomux \
                           i8042.dumbkbd swiotlb=noforce pci=off";
    for boot_args in [None, Some(Value::Null)] {
        let mut config = probe_vm("");
        let source = config["boot-source"].as_object_mut().unwrap();
        source.remove("boot_args");
        source.extend(boot_args.map(|value| ("boot_args".into(), value)));
        // Without words of its own the probe tells the length.
        let output = run(&config, &[]);
        let line = format!(
            "no probe= on the command line (Pvh, {} bytes)",
            DEFAULT.len()
        );
        assert!(output.contains(&line), "{output}");
    }
}

#[test]
fn command_line_when_as_long_as_there_is_room_arrives_whole() {
    needs!(kvm);
    const ROOM: usize = 2047;
    let (begin, end) = ("probe=bootinfo ", " pci=off");
    let args = format!("{begin}{}", "x".repeat(ROOM - begin.len() - end.len()));
    let mut config = probe_vm("");
    config["boot-source"]["boot_args"] = json!(args);
    for (protocol, _) in PROTOCOLS {
        let seen = command_line_seen(&config, &["--boot-protocol", protocol]);
        assert_eq!(seen.len(), ROOM);
        assert_eq!(seen, format!("{args}{end}"));
    }
}

#[test]
fn boot_timer_when_switched_on_logs_the_guests_word() {
    needs!(kvm);
    for (more, logged) in [(&["--boot-timer"][..], true), (&[][..], false)] {
        let folder = Folder::new();
        let mut monitor = Monitor::boot_with(&folder, &probe_vm("timer,print:later"), more);
        monitor.exits_with(0);
        assert!(monitor.stdout().contains("probe: print:later ok"));
        let log = folder.read("log");
        let line = log.lines().find(|l| l.contains("Guest-boot-time ="));
        assert_eq!(line.is_some(), logged, "{log}");
        if let Some(line) = line {
            let micros = line.split('=').nth(1).unwrap().trim();
            let micros: u64 = micros.split(' ').next().unwrap().parse().unwrap();
            assert!(micros > 0, "{line}");
            assert!(line.contains(" CPU us "), "{line}");
        }
    }
}

#[test]
fn ctrl_alt_del_when_sent_reaches_the_guests_keyboard() {
    needs!(kvm);
    let folder = Folder::new();
    let (mut monitor, api) = Monitor::boot_with_api(&folder, &probe_vm("kbd:4:60000"));
    monitor.expect("probe: kbd ready");
    api.put("/actions", json!({"action_type": "SendCtrlAltDel"}));
    monitor.exits_with(0);
    let output = monitor.stdout();
    let pressed: Vec<&str> = output
        .lines()
        .filter(|l| l.starts_with("probe: kbd 0x"))
        .collect();
    // Control, Alt, and Delete with its prefix, in scan code set 2.
    let codes = ["0x14", "0x11", "0xe0", "0x71"].map(|code| format!("probe: kbd {code}"));
    assert_eq!(pressed, codes);
}

// With and without the API

#[test]
fn api_when_switched_off_has_neither_socket_nor_thread() {
    needs!(kvm);
    let folder = Folder::new();
    let mut monitor = Monitor::boot(&folder, &probe_vm("echo"));
    monitor.expect("probe: echo ready");
    let threads = monitor.threads();
    assert!(
        !threads.iter().any(|(_, name)| name == "fc_api"),
        "{threads:?}"
    );
    let sockets = fs::read_to_string("/proc/net/unix").unwrap();
    let ours = fs::read_dir(format!("/proc/{}/fd", monitor.pid()))
        .unwrap()
        .filter_map(|fd| fs::read_link(fd.unwrap().path()).ok())
        .filter_map(|target| {
            let target = target.to_str()?.to_owned();
            Some(
                target
                    .strip_prefix("socket:[")?
                    .strip_suffix(']')?
                    .to_owned(),
            )
        })
        .filter(|inode| sockets.contains(inode.as_str()))
        .count();
    assert_eq!(ours, 0);
    monitor.type_in("x\n");
    monitor.exits_with(0);
}

#[test]
fn config_file_when_given_with_a_socket_starts_and_serves() {
    needs!(kvm);
    let folder = Folder::new();
    let config = probe_vm("print:here,echo");
    let (mut monitor, api) = Monitor::boot_with_api(&folder, &config);
    monitor.expect("probe: echo ready");
    assert_eq!(api.get("/")["state"], "Running");
    let shown = api.get("/vm/config");
    let args = &config["boot-source"]["boot_args"];
    assert_eq!(&shown["boot-source"]["boot_args"], args);
    assert_eq!(shown["machine-config"]["mem_size_mib"], 32);
    monitor.type_in("x\n");
    monitor.exits_with(0);
}

#[test]
fn guest_when_started_by_requests_alone_runs() {
    needs!(kvm);
    let folder = Folder::new();
    let (mut monitor, api) = Monitor::unconfigured(&folder);
    assert_eq!(api.get("/")["state"], "Not started");
    assert_eq!(api.get("/version")["firecracker_version"], "1.17.0");
    let config = probe_vm("cpus,blkinfo:0,echo");
    api.put(
        "/machine-config",
        json!({"vcpu_count": 1, "mem_size_mib": 64}),
    );
    api.patch("/machine-config", json!({"vcpu_count": 2}));
    assert_eq!(api.get("/machine-config")["mem_size_mib"], 64);
    api.put("/boot-source", config["boot-source"].clone());
    let disk = folder.disk("disk", 4096);
    api.put(
        "/drives/rootfs",
        json!({"drive_id": "rootfs", "path_on_host": disk, "is_root_device": true}),
    );
    api.put("/actions", json!({"action_type": "InstanceStart"}));
    let output = monitor.expect("probe: echo ready");
    assert_eq!(value(&output, "processors"), "2", "{output}");
    assert_eq!(value(&output, "id"), "rootfs", "{output}");
    assert_eq!(api.get("/")["state"], "Running");
    let message = api.refused("PUT", "/boot-source", config["boot-source"].clone());
    assert!(
        message.contains("not supported after starting"),
        "{message}"
    );
    monitor.type_in("x\n");
    monitor.exits_with(0);
}

#[test]
fn pause_when_asked_for_stops_the_guest_until_resume() {
    needs!(kvm);
    let folder = Folder::new();
    let mut config = probe_vm("count");
    config["machine-config"]["vcpu_count"] = json!(2);
    let (mut monitor, api) = Monitor::boot_with_api(&folder, &config);
    monitor.expect("probe: count 2 ");
    for _ in 0..3 {
        api.patch("/vm", json!({"state": "Paused"}));
        api.patch("/vm", json!({"state": "Paused"}));
        assert_eq!(api.get("/")["state"], "Paused");
        let before = monitor.stays_paused(&api, 2);
        api.patch("/vm", json!({"state": "Resumed"}));
        api.patch("/vm", json!({"state": "Resumed"}));
        assert_eq!(api.get("/")["state"], "Running");
        let lines = before.matches("probe: count ").count();
        monitor.expect(&format!("probe: count {} ", lines + 2));
    }
    assert!(monitor.child.try_wait().unwrap().is_none());
}

#[test]
fn pauses_and_resumes_when_asked_for_at_once_are_done_one_after_the_other() {
    needs!(kvm);
    let folder = Folder::new();
    let mut config = probe_vm("count");
    config["machine-config"]["vcpu_count"] = json!(2);
    let (mut monitor, api) = Monitor::boot_with_api(&folder, &config);
    monitor.expect("probe: count 2 ");
    std::thread::scope(|scope| {
        for client in 0..8 {
            let api = Api::at(folder.join("api"));
            scope.spawn(move || {
                for turn in 0..50 {
                    let state = ["Paused", "Resumed"][(client + turn) % 2];
                    api.patch("/vm", json!({ "state": state }));
                }
            });
        }
    });
    api.patch("/vm", json!({"state": "Paused"}));
    let before = monitor.stays_paused(&api, 2);
    api.patch("/vm", json!({"state": "Resumed"}));
    let lines = before.matches("probe: count ").count();
    monitor.expect(&format!("probe: count {} ", lines + 2));
    assert!(monitor.child.try_wait().unwrap().is_none());
}

#[test]
fn last_pause_or_resume_wins_when_a_vcpu_is_slow() {
    needs!(kvm);
    let folder = Folder::new();
    let (mut monitor, api) = Monitor::boot_with_api(&folder, &probe_vm("count"));
    monitor.expect("probe: count 2 ");
    api.patch("/vm", json!({"state": "Paused"}));
    let held = common::sys::Held::thread(monitor.thread("fc_vcpu 0"));
    let clients: Vec<_> = (0..25)
        .map(|i| {
            let state = ["Resumed", "Paused"][i % 2];
            let body = json!({"state": state}).to_string();
            let length = body.len();
            let request = format!("PATCH /vm HTTP/1.1\r\nContent-Length: {length}\r\n\r\n{body}");
            let client = api.send_with(request.as_bytes(), &[]);
            // Once this is answered, control has seen the one before it.
            api.get("/");
            client
        })
        .collect();
    drop(held);
    // The last one was a resume.
    let mut answers = clients
        .into_iter()
        .map(|mut client| common::read_response(&mut client));
    assert_eq!(answers.next_back().unwrap().0, 204);
    assert_eq!(api.get("/")["state"], "Running");
    let lines = monitor.stdout().matches("probe: count ").count();
    monitor.expect(&format!("probe: count {} ", lines + 2));
    assert!(monitor.child.try_wait().unwrap().is_none());
}

// The end

#[test]
fn guest_when_it_resets_ends_the_process_with_0() {
    needs!(kvm);
    let folder = Folder::new();
    let mut monitor = Monitor::boot(&folder, &probe_vm("print:bye,reset"));
    monitor.exits_with(0);
    assert!(monitor.stdout().contains("probe: print:bye ok bye"));
    assert!(!monitor.stdout().contains("reset not heard"));
    assert!(folder.read("log").contains("The guest reset its machine."));
    assert_eq!(monitor.stderr(), "");
}

/// What the log tells after `what`.
fn crash_told<'a>(log: &'a str, what: &str) -> &'a str {
    let line = log.lines().find_map(|line| line.split_once(what));
    let (_, told) = line.unwrap_or_else(|| panic!("{what} is not in: {log}"));
    told
}

#[test]
fn guest_when_it_crashes_ends_the_process_with_160() {
    needs!(kvm);
    let folder = Folder::new();
    let mut monitor = Monitor::boot(&folder, &probe_vm("print:bye,triple"));
    monitor.exits_with(160);
    assert!(monitor.stdout().contains("probe: print:bye ok bye"));
    let log = folder.read("log");
    // Where it was, and what it did last: it wrote to the serial port.
    let told = crash_told(&log, "The guest crashed: triple fault on vCPU 0: ");
    assert!(told.contains(", CR2 0x"), "{told}");
    assert!(told.ends_with("port 0x3f8 out."), "{told}");
}

#[test]
fn guest_when_kvm_can_not_run_it_ends_the_process_with_161() {
    needs!(kvm);
    let folder = Folder::new();
    let mut kernel = elf::first_byte(elf::End::Halt, 0);
    // mov eax, 0xd0000000; jmp eax: there is no memory to execute.
    kernel[0x1000..][..7].copy_from_slice(&[0xb8, 0, 0, 0, 0xd0, 0xff, 0xe0]);
    let mut config = probe_vm("");
    config["boot-source"]["kernel_image_path"] = json!(folder.file("kernel", kernel));
    let mut monitor = Monitor::boot(&folder, &config);
    monitor.exits_with(161);
    let log = folder.read("log");
    let told = crash_told(
        &log,
        "Unexpected KVM exit reason 17 (KVM_EXIT_INTERNAL_ERROR) on vCPU 0, suberror 1 (emulation \
         failure: KVM cannot emulate the instruction): ",
    );
    assert!(told.starts_with("RIP 0xd0000000, CR2 0x"), "{told}");
    let is_software = common::is_software_kvm();
    assert_eq!(told.contains("software KVM"), is_software, "{told}");
    assert!(told.contains("no exits before"), "{told}");
}

#[test]
fn guest_when_emulator_lacks_an_instruction_is_told_its_name_and_the_kind_of_host() {
    needs!(kvm);
    // Kernel mode is emulated by software KVM only: elsewhere these instructions work.
    if !common::is_software_kvm() {
        return;
    }
    for (name, code) in [
        ("popcnt", &[0xf3, 0x0f, 0xb8, 0xc7][..]),
        ("int3", &[0xcc]),
        ("fwait", &[0x9b]),
        ("rdrand", &[0x0f, 0xc7, 0xf0]),
        ("xrstor", &[0x0f, 0xae, 0x2f]),
    ] {
        let folder = Folder::new();
        let mut kernel = elf::first_byte(elf::End::Halt, 0);
        kernel[0x1000..][..code.len()].copy_from_slice(code);
        let mut config = probe_vm("");
        config["boot-source"]["kernel_image_path"] = json!(folder.file("kernel", kernel));
        let mut monitor = Monitor::boot(&folder, &config);
        monitor.exits_with(161);
        let log = folder.read("log");
        let told = crash_told(&log, "cannot emulate the instruction): RIP 0x100000, ");
        let bytes: Vec<String> = code.iter().map(|byte| format!("{byte:02x}")).collect();
        assert!(
            told.contains(&format!("instruction bytes {}", bytes.join(" "))),
            "{told}"
        );
        assert!(told.contains(&format!("({name})")), "{told}");
        assert!(told.contains("software KVM (kvm_pvm)"), "{told}");
    }
}

#[test]
fn signal_when_sent_ends_the_process_as_documented() {
    needs!(kvm);
    // signal, exit code; none where the process ends by the signal itself
    for (signal, code) in [
        (libc::SIGTERM, None),
        (libc::SIGINT, None),
        (libc::SIGQUIT, None),
        (libc::SIGHUP, Some(156)),
        (libc::SIGXCPU, Some(154)),
        (libc::SIGSEGV, Some(150)),
        (libc::SIGBUS, Some(149)),
        (libc::SIGILL, Some(157)),
        (libc::SIGSYS, Some(148)),
        (libc::SIGABRT, Some(128 + libc::SIGABRT)),
        (libc::SIGFPE, Some(128 + libc::SIGFPE)),
        (libc::SIGTRAP, Some(128 + libc::SIGTRAP)),
        (libc::SIGUSR1, None),
        (libc::SIGALRM, None),
        (libc::SIGRTMAX(), None),
    ] {
        let folder = Folder::new();
        let mut monitor = Monitor::boot(&folder, &probe_vm("print:up,spin"));
        monitor.expect("probe: print:up ok");
        sys::kill(monitor.pid(), signal);
        let status = monitor.wait();
        assert_eq!(status.code(), code, "signal {signal}: {status}");
        if code.is_none() {
            assert_eq!(status.signal(), Some(signal), "{status}");
        }
    }
}

#[test]
fn signal_when_sent_before_the_start_ends_the_process_too() {
    let folder = Folder::new();
    let (mut monitor, _) = Monitor::unconfigured(&folder);
    sys::kill(monitor.pid(), libc::SIGTERM);
    assert_eq!(monitor.wait().signal(), Some(libc::SIGTERM));
    let folder = Folder::new();
    let (mut monitor, _) = Monitor::unconfigured(&folder);
    sys::kill(monitor.pid(), libc::SIGHUP);
    monitor.exits_with(156);
}

#[test]
fn signal_when_it_is_to_be_ignored_changes_nothing() {
    needs!(kvm);
    let folder = Folder::new();
    let mut monitor = Monitor::boot(&folder, &probe_vm("echo"));
    monitor.expect("probe: echo ready");
    for signal in [libc::SIGPIPE, libc::SIGXFSZ, libc::SIGTTIN, libc::SIGTTOU] {
        sys::kill(monitor.pid(), signal);
    }
    monitor.type_in("still here\n");
    monitor.exits_with(0);
    assert!(monitor.stdout().contains("probe: got still here"));
}

#[test]
fn interrupt_when_the_caller_ignored_it_is_ignored() {
    needs!(kvm);
    let folder = Folder::new();
    let mut command = Command::new("bash");
    command
        .args(["-c", "trap '' INT QUIT; exec \"$0\" \"$@\""])
        .arg(common::mayfly())
        .args(common::boot_args(&folder, &probe_vm("echo")));
    let mut monitor = Monitor::spawn(command);
    monitor.expect("probe: echo ready");
    for signal in [libc::SIGINT, libc::SIGQUIT] {
        sys::kill(monitor.pid(), signal);
    }
    monitor.type_in("still here\n");
    monitor.exits_with(0);
    assert!(monitor.stdout().contains("probe: got still here"));
}

#[test]
fn memory_when_the_host_has_no_more_ends_the_process_in_order() {
    let folder = Folder::new();
    let (mut monitor, api) = Monitor::unconfigured(&folder);
    // Its threads are there.
    api.get("/");
    let limit = format!("--as={}", 1 << 20);
    common::run("prlimit", &["--pid", &monitor.pid().to_string(), &limit]);
    let body = " ".repeat(50_000);
    let text = format!(
        "PUT /vm HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}",
        body.len() + 1
    );
    // Requests that lack a byte, until there is no room for one more.
    let mut clients = Vec::new();
    while monitor.child.try_wait().unwrap().is_none() && clients.len() < 200 {
        // It may end at any moment.
        let Ok(mut client) = UnixStream::connect(&api.0) else {
            break;
        };
        let _ = client.write_all(text.as_bytes());
        clients.push(client);
    }
    monitor.exits_with(162);
    let errors = monitor.stderr();
    assert!(
        errors.contains("thread fc_api: the host has no memory left"),
        "{errors}"
    );
    assert_eq!(errors.lines().count(), 1, "{errors}");
}

// The terminal

/// A guest whose console input is a terminal.
fn on_a_terminal(words: &str) -> (Folder, Terminal, Monitor) {
    let folder = Folder::new();
    let terminal = Terminal::new();
    let mut command = Command::new(common::mayfly());
    command
        .args(common::boot_args(&folder, &probe_vm(words)))
        .stdin(terminal.line.try_clone().unwrap())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let monitor = Monitor::spawn_as_is(command);
    (folder, terminal, monitor)
}

/// Ends a guest on a terminal by `end` and checks that the terminal is as it was.
fn terminal_is_given_back(words: &str, code: Option<i32>, end: impl FnOnce(&Monitor)) {
    let (_folder, terminal, mut monitor) = on_a_terminal(&format!("echo,{words}"));
    let found = Terminal::new().settings();
    assert!(found.is_for_people());
    monitor.expect("probe: echo ready");
    assert!(terminal.settings().is_raw());
    (&terminal.keyboard).write_all(b"go\r").unwrap();
    monitor.expect("probe: got go");
    end(&monitor);
    let status = monitor.wait();
    assert_eq!(status.code(), code, "{status}: {}", monitor.stderr());
    assert_eq!(terminal.settings(), found);
}

#[test]
fn terminal_when_the_guest_resets_is_given_back() {
    if needs::are_met("terminal_when_the_guest_resets_is_given_back", &["kvm"]) {
        terminal_is_given_back("reset", Some(0), |_| {});
    }
}

#[test]
fn terminal_when_the_guest_crashes_is_given_back() {
    if needs::are_met("terminal_when_the_guest_crashes_is_given_back", &["kvm"]) {
        terminal_is_given_back("triple", Some(160), |_| {});
    }
}

#[test]
fn terminal_when_the_process_is_told_to_end_is_given_back() {
    needs!(kvm);
    for (signal, code) in [
        (libc::SIGTERM, None),
        (libc::SIGINT, None),
        (libc::SIGQUIT, None),
        (libc::SIGHUP, Some(156)),
        (libc::SIGXCPU, Some(154)),
        (libc::SIGABRT, Some(128 + libc::SIGABRT)),
        (libc::SIGUSR2, None),
    ] {
        terminal_is_given_back("spin", code, |m| sys::kill(m.pid(), signal));
    }
}

#[test]
fn terminal_when_the_monitor_crashes_is_given_back() {
    needs!(kvm);
    for (signal, code) in [
        (libc::SIGSEGV, 150),
        (libc::SIGBUS, 149),
        (libc::SIGILL, 157),
    ] {
        terminal_is_given_back("spin", Some(code), |m| sys::kill(m.pid(), signal));
    }
}

#[test]
fn terminal_when_a_filter_is_violated_is_given_back() {
    needs!(kvm);
    for thread in ["mayfly", "fc_vcpu", "serial"] {
        terminal_is_given_back("spin", Some(148), |m| {
            sys::inject(m.thread(thread), libc::SYS_socket);
        });
    }
}

#[test]
fn terminal_when_the_guest_can_not_be_started_is_left_alone() {
    needs!(kvm);
    let folder = Folder::new();
    let terminal = Terminal::new();
    let mut config = probe_vm("spin");
    config["boot-source"]["kernel_image_path"] = json!(folder.file("kernel", ""));
    let mut command = Command::new(common::mayfly());
    command
        .args(common::boot_args(&folder, &config))
        .stdin(terminal.line.try_clone().unwrap())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut monitor = Monitor::spawn_as_is(command);
    monitor.exits_with(1);
    assert_eq!(terminal.settings(), Terminal::new().settings());
}

#[test]
fn terminal_when_typed_at_passes_every_key_to_the_guest() {
    needs!(kvm);
    let (_folder, terminal, mut monitor) = on_a_terminal("echo:2");
    monitor.expect("probe: echo ready");
    // Ctrl-C, Ctrl-Z, Ctrl-S and Ctrl-D are the guest's too.
    (&terminal.keyboard)
        .write_all(b"a\x03b\x1ac\x13d\x04e\r")
        .unwrap();
    monitor.expect("probe: got a\x03b\x1ac\x13d\x04e");
    (&terminal.keyboard).write_all(b"done\r").unwrap();
    monitor.exits_with(0);
}

// The console

#[test]
fn console_input_when_piped_reaches_the_guest_in_order() {
    needs!(kvm);
    let folder = Folder::new();
    let mut monitor = Monitor::boot(&folder, &probe_vm("echo:40"));
    // More than the UART holds at once, and before the guest asks for it.
    let lines: Vec<String> = (0..40)
        .map(|n| format!("line {n} {}", "-".repeat(50)))
        .collect();
    monitor.type_in(&(lines.join("\n") + "\n"));
    monitor.close_stdin();
    monitor.exits_with(0);
    let output = monitor.stdout();
    let got: Vec<&str> = output
        .lines()
        .filter_map(|l| l.strip_prefix("probe: got "))
        .collect();
    assert_eq!(got, lines);
}

#[test]
fn console_input_when_it_comes_from_a_file_is_read_to_its_end() {
    needs!(kvm);
    let folder = Folder::new();
    let input = folder.file("input", "from a file\n");
    let mut command = Command::new(common::mayfly());
    command
        .args(common::boot_args(&folder, &probe_vm("echo,spin")))
        .stdin(fs::File::open(input).unwrap())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let monitor = Monitor::spawn_as_is(command);
    monitor.expect("probe: got from a file");
    monitor.comes_to_rest("serial");
}

#[test]
fn console_input_when_it_ends_costs_no_time() {
    needs!(kvm);
    let folder = Folder::new();
    let mut monitor = Monitor::boot(&folder, &probe_vm("echo,spin"));
    monitor.expect("probe: echo ready");
    monitor.type_in("last words\n");
    monitor.close_stdin();
    monitor.expect("probe: got last words");
    monitor.comes_to_rest("serial");
}

/// Words by which the guest prints some 90 KiB: more than the UART's pipe holds.
fn verbose() -> String {
    ["cpuid"; 55].join(",")
}

#[test]
fn console_output_when_nobody_reads_it_costs_bytes_and_not_time() {
    needs!(kvm);
    let folder = Folder::new();
    let disk = folder.disk("disk", 4096);
    let words = format!("{},blkwrite:0:0:8:1,echo", verbose());
    let (unread, output) = std::io::pipe().unwrap();
    sys::set_pipe_size(&unread, 4096);
    let mut command = Command::new(common::mayfly());
    command
        .args(common::boot_args(
            &folder,
            &probe_vm_with_disks(&words, &[&disk]),
        ))
        .stdin(Stdio::piped())
        .stdout(output)
        .stderr(Stdio::piped());
    let mut monitor = Monitor::spawn_as_is(command);
    // Nothing tells how far it is: this waits in the UART until it is asked for.
    monitor.type_in("go\n");
    monitor.exits_with(0);
    let mut expected = vec![0; 4096];
    pattern::fill(1, 0, &mut expected);
    assert!(
        fs::read(disk).unwrap() == expected,
        "the guest did not get that far"
    );
    drop(unread);
}

#[test]
fn console_output_when_it_can_not_be_written_is_lost_without_a_spin() {
    needs!(kvm);
    let (read_end, broken) = std::io::pipe().unwrap();
    drop(read_end);
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    for output in [Stdio::from(broken), Stdio::from(full)] {
        let folder = Folder::new();
        let disk = folder.disk("disk", 4096);
        let words = "cpuid,cpuid,blkwrite:0:0:8:1,echo";
        let mut command = Command::new(common::mayfly());
        command
            .args(common::boot_args(
                &folder,
                &probe_vm_with_disks(words, &[&disk]),
            ))
            .stdin(Stdio::piped())
            .stdout(output)
            .stderr(Stdio::piped());
        let mut monitor = Monitor::spawn_as_is(command);
        let mut expected = vec![0; 4096];
        pattern::fill(1, 0, &mut expected);
        common::wait_until("the guest gets to its disk", || {
            fs::read(&disk).unwrap() == expected
        });
        monitor.comes_to_rest("serial");
        monitor.type_in("go\n");
        monitor.exits_with(0);
    }
}

#[test]
fn standard_streams_when_closed_from_the_start_do_not_keep_the_guest_from_running() {
    needs!(kvm);
    for closed in ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"] {
        let folder = Folder::new();
        let disk = folder.disk("disk", 4096);
        let config = probe_vm_with_disks("print:up,blkwrite:0:0:8:1", &[&disk]);
        let mut command = Command::new("sh");
        command
            .args(["-c", &format!("exec \"$0\" \"$@\" {closed}")])
            .arg(common::mayfly())
            .args(common::boot_args(&folder, &config));
        let mut monitor = Monitor::spawn(command);
        monitor.exits_with(0);
        let mut expected = vec![0; 4096];
        pattern::fill(1, 0, &mut expected);
        // None of the files it opened took the place of a stream.
        assert!(fs::read(disk).unwrap() == expected, "{closed}");
        assert_eq!(
            monitor.stdout().contains("probe: print:up ok"),
            !closed.contains(">&- ") && closed != ">&-"
        );
    }
}

#[test]
fn exit_code_when_nobody_takes_the_sentence_is_the_same() {
    let full = || fs::File::options().write(true).open("/dev/full").unwrap();
    for (args, code) in [
        (&["--foo"][..], 153),
        (&["--no-api", "--config-file", "/no/such"], 1),
        (&["--version"], 1),
        (&["--help"], 1),
    ] {
        let mut command = Command::new(common::mayfly());
        command.args(args).stdout(full()).stderr(full());
        assert_eq!(command.status().unwrap().code(), Some(code), "{args:?}");
    }
}

#[test]
fn log_when_the_start_fails_says_why() {
    let folder = Folder::new();
    let log = folder.join("log");
    let none = folder.file("none.json", "{}");
    let mut bad = probe_vm("up");
    bad["boot-source"]["kernel_image_path"] = json!("/no/such");
    let bad = folder.file("bad.json", bad.to_string());
    for (config, why) in [(none, "missing field `boot-source`"), (bad, "No such file")] {
        let mut monitor = Monitor::start([
            "--no-api".as_ref(),
            "--config-file".as_ref(),
            config.as_os_str(),
            "--log-path".as_ref(),
            log.as_os_str(),
        ]);
        monitor.exits_with(1);
        assert!(monitor.stderr().contains(why), "{}", monitor.stderr());
        let lines = folder.read("log");
        let line = lines.lines().find(|line| line.contains(why)).unwrap();
        let words = "Configuration for VMM from one single json failed";
        assert!(line.contains(words), "{lines}");
        assert!(
            lines.ends_with("Firecracker exiting with error. exit_code=1\n"),
            "{lines}"
        );
        fs::remove_file(&log).unwrap();
    }
}

#[test]
fn log_when_it_goes_to_standard_output_comes_with_the_console() {
    needs!(kvm);
    let folder = Folder::new();
    let file = folder.file("vm.json", probe_vm("echo,print:between").to_string());
    let mut monitor = Monitor::start(["--no-api", "--config-file", file.to_str().unwrap()]);
    // Not before that: lines of the log and of the console may cut into each other.
    monitor.expect("The microVM is running.");
    monitor.type_in("go\n");
    monitor.exits_with(0);
    let output = monitor.stdout();
    let places = [
        "Running Firecracker v1.17.0 (mayfly v",
        "probe: print:between ok",
        "The guest reset its machine.",
    ]
    .map(|text| {
        output
            .find(text)
            .unwrap_or_else(|| panic!("{text}: {output}"))
    });
    assert!(places.is_sorted(), "{output}");
}

#[test]
fn instance_when_named_answers_with_its_name() {
    let folder = Folder::new();
    let socket = folder.join("api");
    let mut command = Command::new(common::mayfly());
    command
        .args(["--id", "some-name", "--api-sock"])
        .arg(&socket);
    let _monitor = Monitor::spawn(command);
    assert_eq!(Api::at(socket).get("/")["id"], "some-name");
}

/// Thirty times, because it is a race that is won or lost.
#[test]
fn start_when_the_guest_ends_at_once_is_answered() {
    needs!(kvm);
    for round in 0..30 {
        let folder = Folder::new();
        let socket = folder.join("api");
        let mut monitor = Monitor::start(["--api-sock", socket.to_str().unwrap()]);
        let api = Api::at(&socket);
        api.put(
            "/boot-source",
            json!({"kernel_image_path": common::firstbyte()}),
        );
        let (status, answer) = api.request(
            "PUT",
            "/actions",
            &json!({"action_type": "InstanceStart"}).to_string(),
        );
        assert_eq!(status, 204, "round {round}: {answer}");
        monitor.exits_with(0);
    }
}
