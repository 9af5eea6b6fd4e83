//! Kernels: any file as an ELF image or a bzImage, and a guest that is put together from it.

use std::fs::File;
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::{Bytes, GuestAddress};

use super::{Kernel, PROGRAM_HEADERS_MAX, Segment};
use crate::arch::boot::{self, Protocol, Told, command_line};
use crate::arch::layout;
use crate::fuzz::Input;
use crate::memory::Memory;

/// A file, padded with some zeros, as a kernel. Checked of one that is taken: its segments lie in the file
/// and above the first MiB, and none has content for an address of another; with an initrd beside it in a
/// small memory it is entered inside a segment, its bytes are where they belong, the initrd's too and
/// beside them, and so is the command line.
pub fn kernel(bytes: &[u8]) {
    let input = &mut Input::new(bytes);
    let protocol = input.one_of(&[None, Some(Protocol::Pvh), Some(Protocol::Linux64)]);
    let (initrd, padding) = (input.u8(), 64 * usize::from(input.u8()));
    let mut bytes = input.bytes(usize::MAX).to_vec();
    bytes.resize(bytes.len() + padding, 0);
    let file = memory_file(&bytes);
    let kernel = match Kernel::read(&file, "vmlinux") {
        Ok(kernel) => kernel,
        Err(error) => {
            assert!(error.to_string().len() < 200);
            return;
        }
    };
    check(&kernel, bytes.len() as u64);
    boot(&kernel, &bytes, protocol, initrd);
}

fn memory_file(content: &[u8]) -> File {
    let file = File::from(memfd_create("mayfly-fuzz", MemfdFlags::CLOEXEC).unwrap());
    file.write_all_at(content, 0).unwrap();
    file
}

fn check(kernel: &Kernel, len: u64) {
    let segments = &kernel.segments;
    assert!(!segments.is_empty() && segments.len() <= PROGRAM_HEADERS_MAX);
    for (number, one) in segments.iter().enumerate() {
        assert!(
            one.offset
                .checked_add(one.file_len)
                .is_some_and(|end| end <= len)
        );
        assert!(one.address >= layout::HIGH_MEMORY);
        assert!(
            one.address
                .checked_add(one.file_len)
                .is_some_and(|end| end <= one.end)
        );
        let has_bytes_of = |other: &Segment| {
            one.address < other.address + other.file_len
                && other.address < one.address + one.file_len
        };
        let others = &segments[number + 1..];
        assert!(one.file_len == 0 || !others.iter().any(|it| it.file_len > 0 && has_bytes_of(it)));
    }
    if let Some(image) = &kernel.bzimage {
        assert!(segments.len() == 1 && kernel.pvh_entry.is_none());
        // What the zero page has room for.
        assert!(image.header.len() <= 0x290 - 0x1f1);
    }
}

/// MiB of guest memory.
const MEMORY: u64 = 16;

fn boot(kernel: &Kernel, bytes: &[u8], protocol: Option<Protocol>, initrd: u8) {
    let mut memory = Memory::anonymous(MEMORY).unwrap();
    let initrd_bytes = vec![0xa5; usize::from(initrd) * 300];
    let initrd_file = memory_file(&initrd_bytes);
    let line = command_line("console=ttyS0", None, &[]).unwrap();
    let told = Told {
        command_line: &line,
        vcpus: 1,
        devices: &[],
        seed: &[7; 32],
        generation_id: [9; 16],
    };
    let parts = (initrd > 0).then_some((&initrd_file, "initrd"));
    let entry = match boot::load(&mut memory, kernel, parts, protocol, &told) {
        Ok(entry) => entry,
        Err(error) => {
            assert!(error.to_string().len() < 300);
            return;
        }
    };
    assert!(kernel.contains(entry.rip) && kernel.end() <= MEMORY << 20);
    assert!(protocol.is_none_or(|protocol| protocol == entry.protocol));
    let guest = |at: u64, len: u64| {
        let mut bytes = vec![0; len as usize];
        memory
            .ram()
            .read_slice(&mut bytes, GuestAddress(at))
            .unwrap();
        bytes
    };
    for one in &kernel.segments {
        let content = &bytes[one.offset as usize..][..one.file_len as usize];
        assert!(guest(one.address, one.file_len) == content, "{one:x?}");
    }
    let expected = [line.as_bytes(), &[0]].concat();
    assert_eq!(guest(layout::COMMAND_LINE, expected.len() as u64), expected);
    // Address and length of the initrd, as a kernel finds them.
    let number = |at, len| {
        let mut number = [0; 8];
        number[..len as usize].copy_from_slice(&guest(at, len));
        u64::from_le_bytes(number)
    };
    let (at, len) = match entry.protocol {
        // hvm_start_info: the number of modules, and where their list is.
        Protocol::Pvh if number(layout::PVH_START_INFO + 12, 4) == 0 => (0, 0),
        Protocol::Pvh => {
            let list = number(layout::PVH_START_INFO + 16, 8);
            (number(list, 8), number(list + 8, 8))
        }
        // boot_params: ramdisk_image and ramdisk_size.
        Protocol::Linux64 => {
            let at = |field| number(layout::ZERO_PAGE + field, 4);
            (at(0x218), at(0x21c))
        }
    };
    assert_eq!(len, initrd_bytes.len() as u64);
    assert!(guest(at, len) == initrd_bytes);
    for one in &kernel.segments {
        assert!(
            len == 0 || at >= one.end || at + len <= one.address,
            "{one:x?} {at:#x}"
        );
    }
}
