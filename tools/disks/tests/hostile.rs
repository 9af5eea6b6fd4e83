//! Images that were made to lead elsewhere: what an image may open is decided before qemu-img runs.

#[expect(dead_code, reason = "another test file uses the rest of it")]
mod support;

use std::fs;

use support::Folder;
use support::needs::{self, needs};

const HEAD: &str =
    "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\n";

/// A folder with a file that no image may read, and an image's folder with a flat extent.
fn folder() -> Folder {
    let folder = Folder::new();
    fs::write(folder.join("secret"), "secret".repeat(1000)).unwrap();
    fs::create_dir_all(folder.join("vm/below")).unwrap();
    fs::write(folder.join("vm/flat"), "harmless".repeat(1000)).unwrap();
    fs::write(folder.join("vm/below/file"), "secret".repeat(1000)).unwrap();
    folder
}

/// The header of a sparse extent with a descriptor of 20 sectors behind it.
fn sparse_header(sectors: u64, directory: u64) -> Vec<u8> {
    let mut header = b"KDMV".to_vec();
    header.extend([1u32.to_le_bytes(), 3u32.to_le_bytes()].concat());
    for number in [sectors, 128, 1, 20] {
        header.extend(number.to_le_bytes());
    }
    header.extend(512u32.to_le_bytes());
    for number in [0, directory, 128] {
        header.extend(number.to_le_bytes());
    }
    header.extend(b"\0\n \r\n");
    header.resize(512, 0);
    header
}

#[test]
fn a_vmdk_descriptor_that_qemu_img_reads_in_another_way_opens_no_other_file() {
    needs!("qemu-img");
    let folder = folder();
    let absolute = folder.join("secret").display().to_string();
    for name in [absolute.as_str(), "../secret"] {
        for hidden in [
            format!("RW\t2\tFLAT\t\"{name}\" 0"),
            format!("RW 2\tFLAT \"{name}\" 0"),
            format!("RW\u{b}2 FLAT \"{name}\" 0"),
            format!("RW 2FLAT \"{name}\" 0"),
            format!("RW 2 FLAT \"{name}\" 0x"),
            format!("RW\n2 FLAT \"{name}\" 0"),
        ] {
            // qemu-img leaves this one out, so that the sizes agree.
            let text = format!("{HEAD}RDONLY 2 FLAT \"flat\" 0\n{hidden}\n");
            fs::write(folder.join("vm/vm.vmdk"), text).unwrap();
            folder.refuses(&["import", "vm/vm.vmdk", "out"], &["vm.vmdk: "]);
        }
    }
    // Alone it is a part like others.
    let text = format!("{HEAD}RDONLY\t2 FLAT \"flat\" 1\n");
    fs::write(folder.join("vm/vm.vmdk"), text).unwrap();
    folder.succeeds(&["import", "vm/vm.vmdk", "out"]);
    let flat = fs::read(folder.join("vm/flat")).unwrap();
    assert_eq!(fs::read(folder.join("out")).unwrap(), flat[512..1536]);
}

#[test]
fn a_sparse_vmdk_without_a_size_does_not_lead_to_the_files_of_its_descriptor() {
    needs!("qemu-img");
    let folder = folder();
    let mut descriptor = format!("{HEAD}RW 2 FLAT \"../secret\" 0\n").into_bytes();
    descriptor.resize(20 * 512, 0);
    let tables = vec![0; 512 * 107];
    let at_end = [
        &sparse_header(0, u64::MAX)[..],
        &descriptor,
        &tables,
        &sparse_header(2, 21),
        &[0; 512],
    ]
    .concat();
    let plain = [&sparse_header(0, 21)[..], &descriptor, &tables].concat();
    for content in [at_end, plain] {
        fs::write(folder.join("vm/s.vmdk"), &content).unwrap();
        folder.refuses(&["import", "vm/s.vmdk", "out"], &["s.vmdk: is damaged"]);
        for kind in ["SPARSE", "VMFSSPARSE"] {
            let text = format!("{HEAD}RW 2 {kind} \"s.vmdk\"\n");
            fs::write(folder.join("vm/vm.vmdk"), text).unwrap();
            folder.refuses(&["import", "vm/vm.vmdk", "out"], &["s.vmdk: is damaged"]);
        }
    }
}

#[test]
fn an_image_may_name_files_of_its_own_folder_and_not_of_those_below() {
    needs!("qemu-img");
    let folder = folder();
    let text = format!("{HEAD}RW 2 FLAT \"below/file\" 0\n");
    fs::write(folder.join("vm/vm.vmdk"), text).unwrap();
    folder.refuses(
        &["import", "vm/vm.vmdk", "out"],
        &["below/file", "outside", "--allow-outside"],
    );
    folder.succeeds(&["import", "vm/vm.vmdk", "out", "--allow-outside"]);
}

#[test]
fn a_part_of_a_vmdk_is_not_replaced_by_the_output() {
    needs!("qemu-img");
    let folder = folder();
    let text = format!("{HEAD}RW 2 FLAT \"flat\" 0\n");
    fs::write(folder.join("vm/vm.vmdk"), text).unwrap();
    let before = fs::read(folder.join("vm/flat")).unwrap();
    let args = ["import", "vm/vm.vmdk", "vm/flat", "--force"];
    folder.refuses(&args, &["flat: ", "input"]);
    assert_eq!(fs::read(folder.join("vm/flat")).unwrap(), before);
    // Named by its format it is found as well.
    folder.succeeds(&["import", "vm/vm.vmdk", "out", "--format", "vmdk"]);
}

#[test]
fn a_vmdk_that_cannot_be_read_is_refused_before_qemu_img_sees_it() {
    needs!("qemu-img");
    let folder = folder();
    let many = "RW 1 FLAT \"flat\" 0\n".repeat(5000);
    for (lines, word) in [
        ("RW 2 ZERO\n", "ZERO"),
        ("RW x FLAT \"flat\" 0\n", "RW x FLAT"),
        (many.as_str(), "4096"),
    ] {
        fs::write(folder.join("vm/vm.vmdk"), format!("{HEAD}{lines}")).unwrap();
        folder.refuses(&["import", "vm/vm.vmdk", "out"], &["vm.vmdk: ", word]);
    }
    let text = format!("{HEAD}RW 2 FLAT \"flat\" 0\n").replace("monolithicFlat", "fullDevice");
    fs::write(folder.join("vm/vm.vmdk"), text).unwrap();
    folder.refuses(
        &["import", "vm/vm.vmdk", "out"],
        &["vm.vmdk: ", "fullDevice"],
    );
}

#[test]
fn a_bundle_whose_description_is_nested_without_end_is_refused() {
    let folder = Folder::new();
    fs::create_dir(folder.join("disk.hdd")).unwrap();
    let path = folder.join("disk.hdd/DiskDescriptor.xml");
    fs::write(&path, "<a>".repeat(100_000)).unwrap();
    folder.refuses(&["import", "disk.hdd", "out"], &["DiskDescriptor.xml: "]);
}

#[test]
fn a_message_passes_nothing_on_that_a_terminal_obeys() {
    let folder = Folder::new();
    fs::create_dir(folder.join("disk.hdd")).unwrap();
    let path = folder.join("disk.hdd/DiskDescriptor.xml");
    fs::write(&path, "<a \x07\u{9b}31m\u{202e}/>").unwrap();
    let (code, output, messages) = folder.disks(&["import", "disk.hdd", "out"]);
    assert_eq!(code, 1);
    let is_bad = |c: char| (c.is_control() && c != '\n') || c == '\u{202e}';
    assert!(
        !output.chars().chain(messages.chars()).any(is_bad),
        "{messages:?}"
    );
}

#[test]
fn a_header_with_an_offset_of_exabytes_is_said_to_be_truncated() {
    let folder = folder();
    let mut content = sparse_header(2, 21);
    content[28..36].copy_from_slice(&(i64::MAX as u64 / 512 + 1).to_le_bytes());
    content.resize(1 << 17, 0);
    fs::write(folder.join("vm/s.vmdk"), content).unwrap();
    folder.refuses(&["import", "vm/s.vmdk", "out"], &["s.vmdk: is one part"]);
}

#[test]
fn a_root_disk_inside_of_its_own_source_is_refused() {
    let folder = folder();
    folder.refuses(&["rootfs", "vm", "vm/below/out"], &["out: ", "inside"]);
    folder.refuses(&["rootfs", ".", "out"], &["out: ", "inside"]);
}

#[test]
fn a_kernel_inside_that_claims_terabytes_is_not_taken_out() {
    needs!("mke2fs", "debugfs");
    let folder = Folder::new();
    folder.marked("disk.raw", "marked");
    // Only the size grows; what is not there reads as zeros.
    let place = "disk.raw?offset=1048576";
    let change = "sif /boot/vmlinuz-6.1.0-18-amd64 size 0x40000001";
    folder.run("debugfs", &["-w", "-R", change, place]);
    folder.refuses(
        &["import", "disk.raw", "out", "--boot-files"],
        &["vmlinuz-6.1.0-18-amd64", "1024 MiB"],
    );
}
