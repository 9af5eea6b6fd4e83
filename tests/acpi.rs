//! ACPI tables as a guest finds them, and the ways for it to end its machine.

mod common;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::process::Command;

use common::{Folder, LINUX_PATIENCE, Linux, Monitor, Netns, needs, probe_vm};
use serde_json::{Value, json};

const PROTOCOLS: [&str; 2] = ["pvh", "linux64"];

// The tables

/// Where the tables are in guest memory.
const ACPI: u64 = 0xe_0000;

/// Guest memory from [`ACPI`] to 1 MiB, read out of the monitor.
fn tables_of(monitor: &Monitor) -> Vec<u8> {
    let maps = fs::read_to_string(format!("/proc/{}/maps", monitor.pid())).unwrap();
    let memory = File::open(format!("/proc/{}/mem", monitor.pid())).unwrap();
    maps.lines()
        .filter(|line| line.contains(" rw-"))
        .find_map(|line| {
            let (first, last) = line.split(' ').next()?.split_once('-')?;
            let first = u64::from_str_radix(first, 16).ok()?;
            let last = u64::from_str_radix(last, 16).ok()?;
            let mut bytes = vec![0; (1 << 20) - ACPI as usize];
            let fits = first + (1 << 20) <= last;
            let read = fits && memory.read_exact_at(&mut bytes, first + ACPI).is_ok();
            (read && bytes.starts_with(b"RSD PTR ")).then_some(bytes)
        })
        .expect("no mapping of the monitor has ACPI's root pointer where guest memory has it")
}

/// Signature and bytes of each table, by way of the pointers.
fn split(block: &[u8]) -> Vec<(String, Vec<u8>)> {
    let long = |at: usize| u64::from_le_bytes(block[at..at + 8].try_into().unwrap());
    let table = |address: u64| {
        let at = usize::try_from(address - ACPI).unwrap();
        let len = u32::from_le_bytes(block[at + 4..at + 8].try_into().unwrap());
        let bytes = block[at..at + len as usize].to_vec();
        (String::from_utf8(bytes[..4].to_vec()).unwrap(), bytes)
    };
    let at = |address: u64| usize::try_from(address - ACPI).unwrap();
    let xsdt = long(24);
    let (fadt, madt) = (long(at(xsdt) + 36), long(at(xsdt) + 44));
    let dsdt = long(at(fadt) + 140);
    [xsdt, fadt, madt, dsdt].map(table).to_vec()
}

#[test]
fn tables_when_disassembled_by_iasl_give_no_error_or_warning() {
    needs!(kvm, root, "iasl");
    for (vcpus, disks) in [(1, 0), (2, 2), (32, 19)] {
        let folder = Folder::new();
        let disk = folder.disk("disk", 4096);
        let disks = vec![disk.as_path(); disks];
        let mut config = common::probe_vm_with_disks("print:ready,stay", &disks);
        config["machine-config"]["vcpu_count"] = json!(vcpus);
        let monitor = Monitor::boot(&folder, &config);
        monitor.expect("print:ready ok");
        for (name, bytes) in split(&tables_of(&monitor)) {
            let file = folder.file(&format!("{name}.dat"), &bytes);
            let output = Command::new("iasl").arg("-d").arg(&file).output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr).to_lowercase()
                + &String::from_utf8_lossy(&output.stdout).to_lowercase();
            let is_clean = output.status.success()
                && !said.contains("error")
                && !said.contains("warning")
                && !said.contains("invalid");
            assert!(is_clean, "{name} of {vcpus} vCPUs: {said}");
            let text = folder.read(&format!("{name}.dsl"));
            for bad in ["Invalid", "Unknown", "incorrect", "ERROR", "Warning"] {
                assert!(!text.contains(bad), "{name}, {bad}: {text}");
            }
            match name.as_str() {
                "DSDT" => assert_eq!(text.matches("LNRO0005").count(), disks.len(), "{text}"),
                "APIC" => assert_eq!(
                    text.matches("Processor Enabled : 1").count(),
                    vcpus,
                    "{text}"
                ),
                _ => {}
            }
        }
    }
}

#[test]
fn iasl_when_a_table_is_damaged_is_not_content() {
    needs!(kvm, root, "iasl");
    let folder = Folder::new();
    let monitor = Monitor::boot(&folder, &probe_vm("print:ready,stay"));
    monitor.expect("print:ready ok");
    let tables = split(&tables_of(&monitor));
    let (_, mut fadt) = tables.into_iter().find(|(name, _)| name == "FACP").unwrap();
    fadt[9] = fadt[9].wrapping_add(1);
    let file = folder.file("bad.dat", &fadt);
    let output = Command::new("iasl").arg("-d").arg(&file).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).to_lowercase();
    let text = folder.read("bad.dsl");
    assert!(
        said.contains("warning") || said.contains("incorrect") || text.contains("ncorrect"),
        "{said}{text}"
    );
}

#[test]
fn tables_when_walked_by_a_guest_are_whole_and_have_its_processors() {
    needs!(kvm);
    for vcpus in [1, 2, 32] {
        for protocol in PROTOCOLS {
            let folder = Folder::new();
            let mut config = probe_vm("acpi,reset");
            config["machine-config"]["vcpu_count"] = json!(vcpus);
            let mut monitor = Monitor::boot_with(&folder, &config, &["--boot-protocol", protocol]);
            monitor.exits_with(0);
            let output = monitor.stdout();
            let all = format!("probe: acpi ok tables=4 processors={vcpus}");
            assert!(output.contains(&all), "{protocol}: {output}");
        }
    }
}

// What is announced

/// The probe as a Linux kernel looks whose section `.init.data` has this content.
fn probe_with_initial_data(content: &[u8]) -> Vec<u8> {
    let mut file = fs::read(common::probe()).unwrap();
    let names = b"\0.init.data\0";
    let (data_at, names_at) = (file.len(), file.len() + content.len());
    file.extend_from_slice(content);
    file.extend_from_slice(names);
    let table = file.len() as u64;
    for (name, at, len) in [(1u32, data_at, content.len()), (0, names_at, names.len())] {
        let mut header = [0; 64];
        header[..4].copy_from_slice(&name.to_le_bytes());
        header[24..32].copy_from_slice(&(at as u64).to_le_bytes());
        header[32..40].copy_from_slice(&(len as u64).to_le_bytes());
        file.extend_from_slice(&header);
    }
    file[40..48].copy_from_slice(&table.to_le_bytes());
    for (at, value) in [(58, 64u16), (60, 2), (62, 1)] {
        file[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }
    file
}

#[test]
fn command_line_when_the_kernel_reads_acpi_names_no_devices_unless_it_is_switched_off() {
    needs!(kvm);
    let folder = Folder::new();
    let disk = folder.disk("disk", 4096);
    let word = " virtio_mmio.device=4K@0xc0001000:5";
    let with = &b"console=\0acpi_irq_pci=\0"[..];
    let without = &b"console=\0acpi=\0acpi_sci=\0"[..];
    for (content, args, announced) in [
        (with, "probe=bootinfo", false),
        (with, "probe=bootinfo acpi=off", true),
        (without, "probe=bootinfo", true),
        (without, "probe=bootinfo acpi=off", true),
    ] {
        let kernel = folder.file("kernel", probe_with_initial_data(content));
        let mut config = common::probe_vm_with_disks("", &[&disk]);
        config["boot-source"] = json!({"kernel_image_path": kernel, "boot_args": args});
        let mut monitor = Monitor::boot(&folder, &config);
        monitor.exits_with(0);
        let output = monitor.stdout();
        let expected = format!("{args} pci=off{}", if announced { word } else { "" });
        let is_there = output.lines().any(|line| line.ends_with(&expected));
        assert!(is_there, "{expected}: {output}");
    }
}

// The ends

#[test]
fn ends_when_told_apart_have_four_words() {
    needs!(kvm);
    for (words, code, word, log) in [
        ("reset", 0, "reset", "The guest reset its machine."),
        ("acpireset", 0, "reset", "The guest reset its machine."),
        (
            "poweroff",
            0,
            "shutdown",
            "The guest powered its machine off.",
        ),
        ("triple", 160, "crash", "triple fault"),
        ("tellpanic,reset", 165, "panic", "kernel panicked"),
        ("tellpanic,acpireset", 165, "panic", "kernel panicked"),
        ("tellpanic,poweroff", 165, "panic", "kernel panicked"),
        ("tellpanic,triple", 165, "panic", "triple fault"),
    ] {
        let ended = common::end_of(&probe_vm(words), &[], common::PATIENCE);
        assert_eq!(ended.code, Some(code), "{words}: {}", ended.output);
        assert_eq!(ended.report.lines().next(), Some(word), "{words}");
        assert!(ended.log.contains(log), "{words}: {}", ended.log);
        assert!(!ended.output.contains("FAILED"), "{}", ended.output);
    }
}

// Linux

fn from_initramfs(linux: &Linux, boot_args: String) -> Value {
    json!({
        "boot-source": {
            "kernel_image_path": linux.kernel,
            "initrd_path": linux.initrd,
            "boot_args": boot_args,
        },
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 128},
        "drives": [],
    })
}

#[test]
fn linux_when_it_has_acpi_finds_every_device_once_both_processors_and_the_way_out() {
    needs!(kvm, root, tun);
    let linux = common::linux_with_acpi();
    let (netns, folder) = (Netns::new(), Folder::new());
    netns.tap("mftap", "172.16.9.1/24");
    let disk = folder.join("rootfs.ext4");
    fs::copy(&linux.disk, &disk).unwrap();
    let config = json!({
        "boot-source": {
            "kernel_image_path": linux.kernel,
            "initrd_path": common::module_initrd(&linux),
            "boot_args": format!(
                "{} ip=172.16.9.2::172.16.9.1:255.255.255.0::eth0:off \
                 mayfly.run=cpus,buses,echo,poweroff",
                linux.cmdline
            ),
        },
        "machine-config": {"vcpu_count": 2, "mem_size_mib": 128},
        "drives": [{"drive_id": "rootfs", "path_on_host": disk, "is_root_device": true}],
        "network-interfaces": [{"iface_id": "eth0", "host_dev_name": "mftap"}],
    });
    let (mut monitor, _api) = Monitor::boot_inside(&netns, &folder, &config);
    let output = monitor.expect_within("mayfly-guest: echo ready", LINUX_PATIENCE);
    for line in [
        "cpus 2",
        "platform device LNRO0005:00: virtio-mmio",
        "platform device LNRO0005:01: virtio-mmio",
        "platform device VMGENCTR:00: vmgenid",
        "platform device QEMU0001:00: pvpanic-mmio",
        "pnp device 00:00: serial",
    ] {
        assert!(
            output.contains(&format!("mayfly-guest: {line}\r\n")),
            "{line}: {output}"
        );
    }
    // This kernel also takes devices from the command line, and would list those of them.
    let twice = output.contains("LNRO0005:02") || output.contains("device virtio-mmio");
    assert!(!twice, "{output}");
    common::wait_until_within(LINUX_PATIENCE, "the guest answers a ping", || {
        let mut ping = netns.command("ping");
        ping.args(["-c", "1", "-W", "2", "172.16.9.2"]);
        ping.output().unwrap().status.success()
    });
    // Its serial port has an interrupt: without one nothing that is typed arrives.
    monitor.type_in("and out\n");
    monitor.expect_within("mayfly-guest: echo got: and out", LINUX_PATIENCE);
    let status = monitor.wait_within(LINUX_PATIENCE);
    assert_eq!(status.code(), Some(0), "{status}: {}", monitor.stdout());
    let log = folder.read("log");
    assert!(log.contains("The guest powered its machine off."), "{log}");
}

#[test]
fn linux_when_it_panics_tells_so_and_when_it_reboots_uses_the_reset_register() {
    needs!(kvm);
    let linux = common::linux_with_acpi();
    // Without the word, a kernel with ACPI reboots by the reset register.
    let words = linux.cmdline.split(' ').filter(|word| *word != "reboot=k");
    let cmdline: Vec<&str> = words.collect();
    let cmdline = cmdline.join(" ");
    for (task, code, word) in [("panic", 165, "panic"), ("reboot", 0, "reset")] {
        let config = from_initramfs(&linux, format!("{cmdline} mayfly.run={task}"));
        let common::Ended {
            code: seen_code,
            report,
            log,
            output,
        } = common::end_of(&config, &[], LINUX_PATIENCE);
        assert_eq!(seen_code, Some(code), "{task}: {log}{output}");
        assert_eq!(report.lines().next(), Some(word), "{task}: {log}{output}");
        let panicked = output.contains("Kernel panic - not syncing");
        assert_eq!(panicked, task == "panic", "{output}");
    }
}
