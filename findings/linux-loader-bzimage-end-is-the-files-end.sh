#!/usr/bin/env bash
# Finding: linux-loader 0.14.0, BzImage: kernel_end is where the file ends in memory, not where the kernel needs memory to.
#
# Version:  linux-loader 0.14.0, vm-memory 0.18.0
# Expected: by the Linux boot protocol a kernel of version 2.10 or later needs init_size bytes from its run-time start,
#           which for a relocatable kernel is its load address brought up to kernel_alignment; a loader that reports the
#           end of the kernel reports at least that, for what is placed after it (an initrd, say).
# Seen:     a header with init_size of 48 MiB and kernel_alignment of 2 MiB, loaded at 1 MiB with 4 KiB of payload, gives
#           kernel_end = 1 MiB + 4 KiB. pref_address, init_size and kernel_alignment are not looked at.
# So:       an initrd at kernel_end lies where the kernel unpacks itself, and is overwritten. The rules of placement are
#           the caller's.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/src"
cat >"$work/Cargo.toml" <<'TOML'
[package]
name = "finding"
version = "0.0.0"
edition = "2021"
[dependencies]
linux-loader = { version = "=0.14.0", features = ["bzimage"] }
vm-memory = { version = "=0.18.0", features = ["backend-mmap"] }
TOML
cat >"$work/src/main.rs" <<'RUST'
use linux_loader::loader::{bzimage::BzImage, KernelLoader};
use std::io::Cursor;
use vm_memory::{GuestAddress, GuestMemoryMmap};

fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

fn main() {
    // One boot sector, one sector of set-up, 4 KiB of protected-mode code.
    let mut image = vec![0u8; 1024 + 4096];
    put(&mut image, 0x1f1, &[1]); // setup_sects
    put(&mut image, 0x1fe, &0xaa55u16.to_le_bytes()); // boot_flag
    put(&mut image, 0x202, b"HdrS");
    put(&mut image, 0x206, &0x020fu16.to_le_bytes()); // version 2.15
    put(&mut image, 0x211, &[1]); // loadflags: LOADED_HIGH
    put(&mut image, 0x214, &0x10_0000u32.to_le_bytes()); // code32_start
    put(&mut image, 0x230, &0x20_0000u32.to_le_bytes()); // kernel_alignment
    put(&mut image, 0x234, &[1]); // relocatable_kernel
    put(&mut image, 0x258, &0x100_0000u64.to_le_bytes()); // pref_address
    put(&mut image, 0x260, &(48u32 << 20).to_le_bytes()); // init_size

    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 128 << 20)]).unwrap();
    let loaded = BzImage::load(&memory, None, &mut Cursor::new(&image), None).unwrap();
    let header = loaded.setup_header.unwrap();
    let (init_size, alignment) = (header.init_size, header.kernel_alignment);
    println!("init_size {init_size:#x}, kernel_alignment {alignment:#x}");
    println!("kernel_load {:#x}", loaded.kernel_load.0);
    println!("kernel_end  {:#x}", loaded.kernel_end);
}
RUST
seen=$(cd "$work" && cargo run --quiet)
expected="init_size 0x3000000, kernel_alignment 0x200000
kernel_load 0x100000
kernel_end  0x101000"
printf '%s\n' "$seen"
[ "$seen" = "$expected" ] || { echo "changed: this is no longer what the crate does" >&2; exit 1; }
