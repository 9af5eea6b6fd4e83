//! Raw disks to other formats, and back.

#[expect(dead_code, reason = "another test file uses the rest of it")]
mod support;

use std::fs;

use support::needs::{self, needs};
use support::{Folder, SIZE};

const FORMATS: &[(&str, &str)] = &[
    ("vmdk", "vmdk"),
    ("vmdk-stream", "vmdk"),
    ("vhd", "vpc"),
    ("vhd-fixed", "vpc"),
    ("vhdx", "vhdx"),
    ("vdi", "vdi"),
    ("parallels", "parallels"),
    ("qcow2", "qcow2"),
];

#[test]
fn a_disk_that_was_imported_and_changed_is_exported_exactly() {
    needs!("qemu-img", "mke2fs", "debugfs");
    let folder = Folder::new();
    folder.marked("made.raw", "marked");
    folder.convert("vmdk", "", "made.raw", "vm.vmdk");
    for (format, driver) in FORMATS {
        folder.succeeds(&["import", "vm.vmdk", "disk", "--force"]);
        fs::write(folder.join("change"), format).unwrap();
        folder.run(
            "debugfs",
            &["-w", "-R", "write change /changed", "disk?offset=1048576"],
        );
        folder.succeeds(&["export", "disk", "out", "--format", format]);
        // As other programs read it, which is by the number of bytes for a VHD of this maker.
        folder.run(
            "qemu-img",
            &["compare", "-q", "-f", driver, "-F", "raw", "out", "disk"],
        );
        folder.succeeds(&["import", "out", "back"]);
        assert!(folder.same("disk", "back"), "{format}");
        assert_eq!(folder.mark("back", "/changed"), *format);
        assert_eq!(folder.mark("back", "/etc/mark"), "marked");
        assert_eq!(
            folder.names(),
            ["back", "change", "disk", "made.raw", "out", "vm.vmdk"]
        );
        for name in ["out", "back"] {
            fs::remove_file(folder.join(name)).unwrap();
        }
    }
    assert_eq!(folder.len("disk"), SIZE);
}

#[test]
fn what_cannot_be_exported_is_refused_and_nothing_is_left() {
    needs!("qemu-img", "mke2fs");
    let folder = Folder::new();
    fs::File::create(folder.join("large"))
        .unwrap()
        .set_len((2040 << 30) + 512)
        .unwrap();
    for format in ["vhd", "vhd-fixed"] {
        folder.refuses(
            &["export", "large", "out", "--format", format],
            &["large", "2040 GiB", "vhdx"],
        );
    }
    folder.marked("disk", "marked");
    folder.refuses(
        &["export", "disk", "disk", "--format", "vdi", "--force"],
        &["input"],
    );
    folder.convert("qcow2", "", "disk", "vm.qcow2");
    folder.refuses(
        &["export", "vm.qcow2", "out", "--format", "vdi"],
        &["vm.qcow2", "not raw but QCOW2"],
    );
    fs::write(folder.join("out"), "precious").unwrap();
    folder.refuses(
        &["export", "disk", "out", "--format", "vdi"],
        &["out", "exists"],
    );
    fs::write(folder.join("empty"), "").unwrap();
    folder.refuses(
        &["export", "empty", "out2", "--format", "vdi"],
        &["empty: is empty"],
    );
    // What a guest wrote into its first sector does not make its disk another format.
    folder.write_at("disk", 0, b"QFI\xfb\0\0\0\x03");
    folder.refuses(&["export", "disk", "out2", "--format", "vhdx"], &["--raw"]);
    folder.succeeds(&["export", "disk", "out2", "--format", "vhdx", "--raw"]);
    folder.qemu_img("compare -q -f vhdx -F raw out2 disk");
}

#[test]
fn a_vhd_of_the_largest_size_is_exported() {
    needs!("qemu-img");
    let folder = Folder::new();
    fs::File::create(folder.join("large"))
        .unwrap()
        .set_len(2040 << 30)
        .unwrap();
    folder.succeeds(&["export", "large", "out", "--format", "vhd"]);
    assert!(folder.len("out") < 64 << 20);
}
