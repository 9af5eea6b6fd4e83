//! Kernels as users have them: bzImages, and the errors for those that cannot be booted.

mod common;

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use common::{Folder, LINUX_PATIENCE, Monitor, needs};
use serde_json::{Value, json};

/// Offsets of the setup header (Linux, Documentation/arch/x86/boot.rst).
const PREF_ADDRESS: usize = 0x258;
const INIT_SIZE: usize = 0x260;

/// Where the kernel goes, and how much it asks for there.
const ADDRESS: u64 = 16 << 20;
const AREA: u32 = 8 << 20;

/// A bzImage whose 64-bit entry writes what it finds by its zero page, and resets the machine.
fn bzimage() -> Vec<u8> {
    let mut file = vec![0; 4 * 512];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[3]);
    put(0x1f4, &(0x400u32 / 16).to_le_bytes());
    put(0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(0x202, b"HdrS\x0f\x02");
    put(0x211, &[1]);
    put(0x22c, &0x3fff_ffffu32.to_le_bytes());
    put(0x230, &0x20_0000u32.to_le_bytes());
    put(0x234, &[1, 21, 0x7f, 0]);
    put(0x238, &2047u32.to_le_bytes());
    put(PREF_ADDRESS, &ADDRESS.to_le_bytes());
    put(INIT_SIZE, &AREA.to_le_bytes());
    let code: &[&[u8]] = &[
        // mov edx, 0x3f8
        &[0xba, 0xf8, 0x03, 0, 0],
        // The header's magic: mov al, [rsi + 0x202]; out dx, al
        &[0x8a, 0x86, 0x02, 0x02, 0, 0, 0xee],
        // The command line: mov ebx, [rsi + 0x228]; mov al, [rbx]; out dx, al
        &[0x8b, 0x9e, 0x28, 0x02, 0, 0, 0x8a, 0x03, 0xee],
        // The initrd: mov ebx, [rsi + 0x218]; mov al, [rbx]; out dx, al
        &[0x8b, 0x9e, 0x18, 0x02, 0, 0, 0x8a, 0x03, 0xee],
        // mov al, 0xfe; out 0x64, al; hlt; jmp to the hlt
        &[0xb0, 0xfe, 0xe6, 0x64, 0xf4, 0xeb, 0xfd],
    ];
    file.resize(file.len() + 0x200, 0xf4);
    for part in code {
        file.extend_from_slice(part);
    }
    file.resize(4 * 512 + 0x400, 0xf4);
    file
}

fn vm(kernel: &Path, initrd: Option<&Path>, mib: u64) -> Value {
    json!({
        "boot-source": {
            "kernel_image_path": kernel,
            "initrd_path": initrd,
            "boot_args": "command line",
        },
        "machine-config": {"vcpu_count": 1, "mem_size_mib": mib},
        "drives": [],
    })
}

#[test]
fn bzimage_when_booted_is_entered_in_64_bit_mode_with_its_zero_page() {
    needs!(kvm);
    let folder = Folder::new();
    // The name says nothing.
    let kernel = folder.file("vmlinux.elf", bzimage());
    let initrd = folder.file("initrd", "initrd");
    let mut monitor = Monitor::boot(&folder, &vm(&kernel, Some(&initrd), 32));
    monitor.exits_with(0);
    assert!(monitor.stdout().contains("Hci"), "{}", monitor.stdout());
}

#[test]
fn bzimage_when_booted_on_huge_or_much_memory_works_too() {
    needs!(kvm);
    for (mib, pages) in [(24, "None"), (4096, "None"), (64, "Transparent")] {
        let folder = Folder::new();
        let kernel = folder.file("bzImage", bzimage());
        let initrd = folder.file("initrd", "initrd");
        let mut config = vm(&kernel, Some(&initrd), mib);
        config["machine-config"]["huge_pages"] = json!(pages);
        let mut monitor = Monitor::boot(&folder, &config);
        monitor.exits_with(0);
        assert!(monitor.stdout().contains("Hci"), "{mib} {pages}");
    }
}

#[test]
fn bzimage_when_it_cannot_be_booted_is_refused_with_the_reason() {
    needs!(kvm);
    let change = |at: usize, bytes: &[u8]| {
        let mut file = bzimage();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        file
    };
    let whole = bzimage();
    let mut nowhere = change(0x234, &[0]);
    nowhere[PREF_ADDRESS..][..8].fill(0);
    for (file, mib, why) in [
        (whole.clone(), 23, "needs at least 24 MiB of guest memory"),
        (
            whole[..2500].to_vec(),
            32,
            "is truncated: it needs 3072 bytes and has 2500",
        ),
        (
            change(0x206, &[0x0b]),
            32,
            "version 2.11 of the Linux boot protocol",
        ),
        (change(0x211, &[0]), 32, "zImage"),
        (change(0x236, &[0x7e]), 32, "no 64-bit entry"),
        (
            change(INIT_SIZE, &[0; 4]),
            32,
            "syssize and init_size contradict",
        ),
        (change(0x230, &[3]), 32, "not a power of two"),
        (nowhere, 32, "nor that it is relocatable"),
        (
            change(0x238, &[5, 0, 0, 0]),
            32,
            "reads command lines of at most 5 bytes",
        ),
    ] {
        let folder = Folder::new();
        let kernel = folder.file("bzImage", file);
        let mut monitor = Monitor::boot(&folder, &vm(&kernel, None, mib));
        monitor.exits_with(1);
        let said = monitor.stderr() + &folder.read("log");
        assert!(said.contains(why), "{why}: {said}");
        assert!(said.contains(kernel.to_str().unwrap()), "{said}");
        assert!(!said.contains("panic"), "{said}");
    }
}

/// A bzImage that holds `elf`, compressed by `tool` as the kernel's build does it.
fn packed(folder: &Folder, tool: &[&str], elf: &[u8]) -> Vec<u8> {
    let plain = folder.file("plain", elf);
    let output = Command::new(tool[0]).args(&tool[1..]).arg(&plain).output();
    let mut payload = output.unwrap().stdout;
    assert!(!payload.is_empty(), "{tool:?}");
    if tool[0] != "gzip" {
        payload.extend_from_slice(&(elf.len() as u32).to_le_bytes());
    }
    let mut file = bzimage();
    let offset = (file.len() - 4 * 512) as u32;
    file[0x248..][..4].copy_from_slice(&offset.to_le_bytes());
    file[0x24c..][..4].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    file.extend_from_slice(&payload);
    // Something follows: it is not the kernel's.
    file.extend_from_slice(b"a signature");
    file
}

fn extract(file: &Path, out: &Path) -> Output {
    let mut command = Command::new(common::root().join("tools/guest"));
    command.arg("extract").arg(file).arg(out).output().unwrap()
}

fn elf_of_some_size() -> Vec<u8> {
    let lines = (0..60_000).flat_map(|n| format!("line {n}\n").into_bytes());
    b"\x7fELF".iter().copied().chain(lines).collect()
}

const PACKERS: &[&[&str]] = &[
    &["gzip", "-9c"],
    &["xz", "-c", "--check=crc32", "--x86", "--lzma2"],
    &["lz4", "-lc"],
    &["zstd", "-qc"],
    &["bzip2", "-c"],
    &["lzma", "-c"],
];

#[test]
fn extract_when_bzimage_is_compressed_in_any_way_gives_its_vmlinux() {
    needs!("gzip", "xz", "lz4", "zstd", "bzip2", "lzma");
    let elf = elf_of_some_size();
    for tool in PACKERS {
        let folder = Folder::new();
        let file = folder.file("vmlinuz", packed(&folder, tool, &elf));
        let out = folder.join("vmlinux");
        let output = extract(&file, &out);
        assert!(output.status.success(), "{tool:?}: {output:?}");
        assert_eq!(fs::read(&out).unwrap(), elf, "{tool:?}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 3);
    }
}

#[test]
fn extract_when_file_is_bad_says_why_and_leaves_nothing() {
    needs!("gzip", "xz", "zstd");
    let elf = elf_of_some_size();
    let folder = Folder::new();
    let whole = packed(&folder, &["zstd", "-qc"], &elf);
    let mut damaged = packed(&folder, &["xz", "-c"], &elf);
    damaged[4 * 512 + 0x400 + 100] ^= 0xff;
    let mut lying = packed(&folder, &["gzip", "-c"], &elf);
    lying[0x24c] ^= 0x10;
    let mut bomb = packed(&folder, &["zstd", "-qc"], &vec![0; 64 << 20]);
    let size_at = bomb.len() - b"a signature".len() - 4;
    bomb[size_at..][..4].copy_from_slice(&1000u32.to_le_bytes());
    let other = packed(&folder, &["gzip", "-c"], b"no ELF file, but long enough");
    for (content, why) in [
        (b"#!/bin/sh".to_vec(), "is not a bzImage"),
        (elf, "is an ELF file: a vmlinux already"),
        (whole[..whole.len() - 2000].to_vec(), "is truncated"),
        (whole[..700].to_vec(), "is not a bzImage"),
        (damaged, "is damaged: xz cannot unpack"),
        (lying, "is damaged"),
        (other, "holds something else than an ELF kernel"),
        (bomb, "unpacks to more"),
        (bzimage(), "says that its kernel has 0 bytes"),
    ] {
        let folder = Folder::new();
        let file = folder.file("vmlinuz", content);
        let output = extract(&file, &folder.join("out"));
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            !output.status.success() && said.contains(why),
            "{why}: {said}"
        );
        assert!(said.contains(file.to_str().unwrap()), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "{why}");
    }
    // Its output is what it is made from, or no file at all: both stay.
    let folder = Folder::new();
    let file = folder.file("vmlinuz", &whole);
    let device = folder.join("device");
    std::os::unix::fs::symlink("/dev/null", &device).unwrap();
    for out in [&file, &device, Path::new("/proc/vmlinux")] {
        let output = extract(&file, out);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{output:?}");
        assert!(said.contains("name another place"), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
    assert_eq!(fs::read(&file).unwrap(), whole);
    assert!(device.is_symlink());
    // Names that are options of other programs, or that a terminal obeys.
    for name in ["-k", "a\x1b[31m\nb"] {
        folder.file(name, b"x");
        let output = extract(Path::new(name), &folder.join("out"));
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            !output.status.success() && said.starts_with("guest: "),
            "{said}"
        );
        assert!(
            said.lines().count() == 1 && !said.contains('\x1b'),
            "{said:?}"
        );
    }
    let folder = Folder::new();
    for file in [folder.path(), &folder.join("missing")] {
        let output = extract(file, &folder.join("out"));
        assert!(!output.status.success(), "{output:?}");
    }
}

#[test]
fn linux_like_a_stock_one_when_booted_as_a_bzimage_loads_its_modules_and_goes_to_its_root() {
    needs!(kvm);
    // The stand-in for a distribution's kernel.
    let linux = common::linux_with_acpi();
    let folder = Folder::new();
    let disk = folder.join("rootfs.ext4");
    fs::copy(common::linux().disk, &disk).unwrap();
    let config = json!({
        "boot-source": {
            "kernel_image_path": linux.kernel.with_file_name("bzImage"),
            "initrd_path": common::module_initrd(&linux),
            "boot_args": format!("{} mayfly.run=buses,write=by-the-guest,poweroff", linux.cmdline),
        },
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 128},
        "drives": [{
            "drive_id": "rootfs",
            "path_on_host": disk,
            "is_root_device": true,
            "cache_type": "Writeback",
        }],
    });
    let mut monitor = Monitor::boot(&folder, &config);
    // On the disk: the initramfs has no /srv, and its writes go nowhere.
    monitor.expect_within("mayfly-guest: write done", LINUX_PATIENCE);
    let status = monitor.wait_within(LINUX_PATIENCE);
    assert_eq!(status.code(), Some(0), "{status}: {}", monitor.stdout());
    let output = monitor.stdout();
    assert!(output.contains("virtio"), "{output}");
    assert!(!output.contains("is not loaded"), "{output}");
    assert!(!output.contains("going on without"), "{output}");
    assert!(folder.read("log").contains("powered its machine off"));
    let cat = Command::new("debugfs")
        .args(["-R", "cat /written-by-guest"])
        .arg(&disk)
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&cat.stdout), "by-the-guest\n");
}
