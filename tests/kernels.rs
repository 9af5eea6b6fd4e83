//! Kernels as users have them: bzImages, and the errors for those that cannot be booted.

mod common;

use std::path::Path;

use common::{Folder, Monitor, needs};
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
