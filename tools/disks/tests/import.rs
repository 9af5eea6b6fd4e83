//! Disks of other hypervisors, made by qemu-img or by hand, and what becomes of them.

mod support;

use std::fs;
use std::os::unix::fs::symlink;
use std::process::{Child, Command, Stdio};

use support::needs::{self, needs};
use support::{Folder, SIZE};

/// Formats as qemu-img makes them: name of the file, format, options.
const FORMATS: &[(&str, &str, &str)] = &[
    ("sparse.vmdk", "vmdk", "subformat=monolithicSparse"),
    ("flat.vmdk", "vmdk", "subformat=monolithicFlat"),
    ("split.vmdk", "vmdk", "subformat=twoGbMaxExtentSparse"),
    ("split-flat.vmdk", "vmdk", "subformat=twoGbMaxExtentFlat"),
    ("stream.vmdk", "vmdk", "subformat=streamOptimized"),
    ("dynamic.vhd", "vpc", "force_size=on"),
    ("fixed.vhd", "vpc", "subformat=fixed,force_size=on"),
    ("disk.vhdx", "vhdx", ""),
    ("disk.vdi", "vdi", ""),
    ("fixed.vdi", "vdi", "static=on"),
    ("disk.hdd", "parallels", ""),
    ("disk.qcow", "qcow", ""),
    ("disk.qcow2", "qcow2", ""),
    ("old.qcow2", "qcow2", "compat=0.10"),
    ("disk.qed", "qed", ""),
];

#[test]
fn disks_of_every_format_are_imported_exactly_whatever_their_name() {
    needs!("qemu-img", "mke2fs");
    let folder = Folder::new();
    folder.marked("disk.raw", "marked");
    for (name, format, options) in FORMATS {
        folder.convert(format, options, "disk.raw", name);
        // Only content counts. Descriptors are left: extents have their names.
        let given = if name.contains("flat") || name.contains("split") {
            *name
        } else {
            "nameless"
        };
        if given != *name {
            fs::rename(folder.join(name), folder.join(given)).unwrap();
        }
        let said = folder.succeeds(&["import", given, "out"]);
        assert!(folder.same("disk.raw", "out"), "{name}");
        assert!(said.contains("ext4 \"mark\""), "{name}: {said}");
        assert!(
            said.contains("--kernel") && said.contains("root=/dev/vda1 rw"),
            "{said}"
        );
        assert!(folder.allocated("out") < 20 << 20, "{name}");
        folder.run("sh", &["-c", "rm -f out nameless *.vmdk"]);
    }
    assert_eq!(folder.names(), ["disk.raw"]);
}

#[test]
fn a_raw_disk_is_copied_and_its_kernel_and_initrd_are_taken_out() {
    needs!("mke2fs", "debugfs");
    let folder = Folder::new();
    folder.marked("disk.raw", "marked");
    let said = folder.succeeds(&["import", "disk.raw", "out", "--boot-files"]);
    assert!(folder.same("disk.raw", "out"));
    assert_eq!(
        fs::read(folder.join("out.kernel")).unwrap(),
        b"marked".repeat(5000)
    );
    assert_eq!(fs::read(folder.join("out.initrd")).unwrap(), b"an initrd");
    assert!(said.contains("out.kernel --initrd"), "{said}");
    assert!(said.contains("/boot/vmlinuz-6.1.0-18-amd64"), "{said}");
}

#[test]
fn an_output_is_not_replaced_and_may_not_be_the_input() {
    needs!("qemu-img", "mke2fs");
    let folder = Folder::new();
    folder.marked("disk.raw", "marked");
    fs::write(folder.join("out"), "precious").unwrap();
    folder.refuses(
        &["import", "disk.raw", "out"],
        &["out", "exists", "--force"],
    );
    folder.refuses(&["import", "disk.raw"], &["disk.raw", "input"]);
    folder.refuses(&["import", "disk.raw", "disk.raw", "--force"], &["input"]);
    folder.qemu_img("create -q -f qcow2 -F raw -b disk.raw top.qcow2");
    folder.refuses(&["import", "top.qcow2", "disk.raw", "--force"], &["input"]);
    folder.refuses(&["import", "disk.raw", "no/such/out"], &["no/such/out"]);
    folder.succeeds(&["import", "disk.raw", "out", "--force"]);
    assert!(folder.same("disk.raw", "out"));
}

/// A program that is killed when this goes, also by a test that fails.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_run_that_is_killed_leaves_nothing() {
    needs!("mke2fs", "gzip");
    let folder = Folder::new();
    folder.marked("disk.raw", "marked");
    folder.run("gzip", &["-k", "disk.raw"]);
    // A gzip that never ends.
    fs::create_dir(folder.join("bin")).unwrap();
    folder.program("bin/gzip", "touch started\nexec sleep 100000");
    let path = format!(
        "{}:{}",
        folder.join("bin").display(),
        std::env::var("PATH").unwrap()
    );
    let child = Command::new(env!("CARGO_BIN_EXE_mayfly-disks"))
        .args(["import", "disk.raw.gz", "out"])
        .current_dir(folder.path())
        .env("PATH", path)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut child = Running(child);
    while !folder.has("started") {
        assert!(child.0.try_wait().unwrap().is_none(), "it ended");
        std::thread::yield_now();
    }
    folder.refuses(&["import", "disk.raw.gz", "out"], &["another run"]);
    assert!(folder.has(".out.unfinished"));
    drop(child);
    // gzip ends with the program, and then the folder goes, but it may take a moment.
    while folder.has(".out.unfinished") {
        std::thread::yield_now();
    }
    assert_eq!(
        folder.names(),
        ["bin", "disk.raw", "disk.raw.gz", "started"]
    );
    folder.succeeds(&["import", "disk.raw.gz", "out"]);
    assert!(folder.same("disk.raw", "out") && !folder.has(".out.unfinished"));
}

#[test]
fn what_is_no_disk_is_refused_with_its_name() {
    needs!("mke2fs", "zstd", "xz", "gzip");
    let folder = Folder::new();
    fs::write(folder.join("empty"), "").unwrap();
    folder.refuses(&["import", "empty", "out"], &["empty: is empty"]);
    fs::write(folder.join("text"), "only text\n".repeat(500)).unwrap();
    folder.refuses(
        &["import", "text", "out"],
        &["text: ", "no partition table", "--format raw"],
    );
    folder.refuses(&["import", "missing", "out"], &["missing: cannot open"]);
    folder.run("mkfifo", &["fifo"]);
    folder.refuses(&["import", "fifo", "out"], &["fifo: ", "regular file"]);
    fs::write(folder.join("a.zip"), "PK\x03\x04 and more").unwrap();
    folder.refuses(&["import", "a.zip", "out"], &["archive"]);
    fs::write(folder.join("vm.ovf"), "<?xml version=\"1.0\"?><Envelope/>").unwrap();
    folder.refuses(&["import", "vm.ovf", "out"], &["describes"]);
    fs::create_dir(folder.join("folder")).unwrap();
    folder.refuses(
        &["import", "folder", "out"],
        &["folder: ", "DiskDescriptor.xml"],
    );
    folder.run("gzip", &["-k", "text"]);
    folder.refuses(
        &["import", "text.gz", "out"],
        &["text.gz: ", "no partition table"],
    );
    folder.run("gzip", &["-k", "empty"]);
    folder.refuses(&["import", "empty.gz", "out"], &["empty.gz: is empty"]);
    folder.run("tar", &["cf", "files.tar", "text"]);
    folder.refuses(
        &["import", "files.tar", "out"],
        &["without a disk", "rootfs"],
    );
    // Odd sizes have their last sector filled up.
    fs::write(folder.join("odd"), vec![7; 1000]).unwrap();
    folder.succeeds(&["import", "odd", "out", "--format", "raw"]);
    assert_eq!(folder.len("out"), 1024);
}

#[test]
fn a_disk_that_is_compressed_or_in_an_ova_is_unpacked() {
    needs!("qemu-img", "mke2fs", "xz", "zstd", "gzip");
    let folder = Folder::new();
    folder.marked("disk.raw", "marked");
    for (program, name) in [
        ("gzip", "disk.raw.gz"),
        ("xz", "disk.raw.xz"),
        ("zstd", "disk.raw.zst"),
    ] {
        folder.run(program, &["-k", "-q", "disk.raw"]);
        folder.succeeds(&["import", name, "out"]);
        assert!(folder.same("disk.raw", "out"), "{name}");
        assert!(folder.allocated("out") < 20 << 20, "{name}");
        fs::remove_file(folder.join("out")).unwrap();
        // Truncated and damaged.
        folder.cut(name, 9);
        folder.refuses(&["import", name, "out"], &[name, "damaged or truncated"]);
    }
    folder.convert(
        "vmdk",
        "subformat=streamOptimized",
        "disk.raw",
        "vm-disk1.vmdk",
    );
    fs::write(folder.join("vm.ovf"), "<Envelope/>").unwrap();
    folder.run("tar", &["cf", "vm.ova", "vm.ovf", "vm-disk1.vmdk"]);
    folder.succeeds(&["import", "vm.ova"]);
    assert!(folder.same("disk.raw", "vm.raw"));
    fs::copy(folder.join("vm-disk1.vmdk"), folder.join("vm-disk2.vmdk")).unwrap();
    folder.run(
        "tar",
        &["cf", "two.ova", "vm.ovf", "vm-disk1.vmdk", "vm-disk2.vmdk"],
    );
    folder.refuses(
        &["import", "two.ova", "out"],
        &["vm-disk1.vmdk, vm-disk2.vmdk", "--disk"],
    );
    folder.succeeds(&["import", "two.ova", "out", "--disk", "vm-disk2.vmdk"]);
    assert!(folder.same("disk.raw", "out"));
    folder.run("gzip", &["vm.ova"]);
    folder.succeeds(&["import", "vm.ova.gz", "out", "--force"]);
    assert!(folder.same("disk.raw", "out"));
    let cut = folder.len("two.ova") / 2;
    folder.cut("two.ova", cut);
    folder.refuses(
        &["import", "two.ova", "out2", "--disk", "vm-disk1.vmdk"],
        &["two.ova", "truncated"],
    );
}

#[test]
fn a_truncated_disk_of_any_format_is_refused() {
    needs!("qemu-img", "mke2fs");
    let folder = Folder::new();
    folder.marked("disk.raw", "marked");
    // No format fills up the last cluster, and there is data in it.
    let file = fs::File::options()
        .write(true)
        .open(folder.join("disk.raw"))
        .unwrap();
    file.set_len(100 << 20).unwrap();
    folder.write_at("disk.raw", 96 << 20, &b"mark".repeat(1 << 20));
    for (name, format, options) in FORMATS {
        folder.convert(format, options, "disk.raw", name);
        let of = match *name {
            "flat.vmdk" => "flat-flat.vmdk",
            "split.vmdk" => "split-s001.vmdk",
            "split-flat.vmdk" => "split-flat-f001.vmdk",
            name => name,
        };
        // What was written last is at the end of these files, or what fills up a block.
        for bytes in [100, 60_000, folder.len(of) / 2] {
            folder.cut(of, bytes);
            if folder.disks(&["import", name, "out"]).0 == 0 {
                assert!(
                    folder.same("disk.raw", "out"),
                    "{name} without {bytes} bytes"
                );
                assert!(bytes < 1 << 20 && *name == "stream.vmdk", "{name} {bytes}");
                fs::remove_file(folder.join("out")).unwrap();
                continue;
            }
            folder.refuses(&["import", name, "out"], &[of]);
        }
        folder.run(
            "sh",
            &[
                "-c",
                "rm -f *.vmdk *.vhd *.vhdx *.vdi *.hdd *.qcow *.qcow2 *.qed",
            ],
        );
    }
}

/// Gives a VHD footer another creator and geometry.
fn with_footer(bytes: &mut [u8], creator: &[u8; 4], geometry: [u8; 4]) {
    bytes[28..32].copy_from_slice(creator);
    bytes[56..60].copy_from_slice(&geometry);
    bytes[64..68].fill(0);
    let sum: u32 = bytes[..512].iter().map(|&byte| u32::from(byte)).sum();
    bytes[64..68].copy_from_slice(&(!sum).to_be_bytes());
}

#[test]
fn a_vhd_has_the_size_of_its_footer_whoever_made_it() {
    needs!("qemu-img", "mke2fs");
    let folder = Folder::new();
    folder.marked("disk.raw", "marked");
    let shapes = [
        ("subformat=fixed,force_size=on", true),
        ("force_size=on", false),
    ];
    for (options, is_fixed) in shapes {
        folder.convert("vpc", options, "disk.raw", "made.vhd");
        let made = fs::read(folder.join("made.vhd")).unwrap();
        for creator in [
            b"win ", b"qem2", b"d2v ", b"tap\0", b"CTXS", b"vpc ", b"qemu", b"vbox", b"mine",
        ] {
            // A geometry of less than the disk's size, and of more.
            for cylinders in [0u8, 3] {
                let mut vhd = made.clone();
                let geometry = [cylinders, 100, 16, 63];
                let end = vhd.len() - 512;
                with_footer(&mut vhd[end..], creator, geometry);
                if !is_fixed {
                    with_footer(&mut vhd[..512], creator, geometry);
                }
                fs::write(folder.join("made.vhd"), &vhd).unwrap();
                let said = folder.succeeds(&["import", "made.vhd", "out", "--force"]);
                assert!(
                    folder.same("disk.raw", "out"),
                    "{creator:?} {options} {cylinders}"
                );
                assert!(said.contains("geometry"), "{said}");
            }
        }
    }
}

#[test]
fn a_vhd_that_is_damaged_or_a_difference_is_refused() {
    needs!("qemu-img", "mke2fs");
    let folder = Folder::new();
    folder.marked("disk.raw", "marked");
    folder.convert(
        "vpc",
        "subformat=fixed,force_size=on",
        "disk.raw",
        "fixed.vhd",
    );
    folder.write_at("fixed.vhd", SIZE + 100, b"x");
    folder.refuses(
        &["import", "fixed.vhd", "out"],
        &["fixed.vhd: ", "checksum"],
    );
    folder.convert(
        "vpc",
        "subformat=fixed,force_size=on",
        "disk.raw",
        "fixed.vhd",
    );
    let mut short = fs::read(folder.join("fixed.vhd")).unwrap();
    short.drain(1 << 20..2 << 20);
    fs::write(folder.join("fixed.vhd"), &short).unwrap();
    folder.refuses(
        &["import", "fixed.vhd", "out"],
        &["fixed.vhd: is truncated"],
    );
    folder.convert("vpc", "force_size=on", "disk.raw", "diff.vhd");
    let mut diff = fs::read(folder.join("diff.vhd")).unwrap();
    let end = diff.len() - 512;
    for at in [0, end] {
        diff[at + 63] = 4;
        let geometry = diff[at + 56..at + 60].try_into().unwrap();
        with_footer(&mut diff[at..], b"win ", geometry);
    }
    fs::write(folder.join("diff.vhd"), &diff).unwrap();
    folder.refuses(&["import", "diff.vhd", "out"], &["differencing", "Merge"]);
}

#[test]
fn an_extent_of_a_vmdk_leads_to_its_disk_or_is_refused() {
    needs!("qemu-img", "mke2fs");
    let folder = Folder::new();
    folder.marked("disk.raw", "marked");
    for (options, extent) in [
        ("subformat=monolithicFlat", "vm-flat.vmdk"),
        ("subformat=twoGbMaxExtentFlat", "vm-f001.vmdk"),
        ("subformat=twoGbMaxExtentSparse", "vm-s001.vmdk"),
    ] {
        folder.convert("vmdk", options, "disk.raw", "vm.vmdk");
        let said = folder.succeeds(&["import", extent, "out", "--force"]);
        assert!(
            said.contains("is a part of it") && folder.same("disk.raw", "out"),
            "{said}"
        );
        fs::rename(folder.join("vm.vmdk"), folder.join("away")).unwrap();
        folder.refuses(&["import", extent, "out2"], &[extent, "one part"]);
        fs::rename(folder.join("away"), folder.join("vm.vmdk")).unwrap();
        fs::remove_file(folder.join(extent)).unwrap();
        folder.refuses(
            &["import", "vm.vmdk", "out2"],
            &["vm.vmdk: ", extent, "missing"],
        );
    }
}

#[test]
fn a_vmdk_in_parts_needs_them_all() {
    needs!("qemu-img", "mke2fs");
    let folder = Folder::new();
    folder.marked("disk.raw", "marked");
    let file = fs::File::options()
        .write(true)
        .open(folder.join("disk.raw"))
        .unwrap();
    file.set_len(5 << 30).unwrap();
    folder.write_at("disk.raw", (5 << 30) - 9, b"behind it");
    folder.convert(
        "vmdk",
        "subformat=twoGbMaxExtentSparse",
        "disk.raw",
        "vm.vmdk",
    );
    folder.succeeds(&["import", "vm.vmdk", "out"]);
    assert_eq!(folder.len("out"), 5 << 30);
    let output = Command::new("tail")
        .args(["-c", "9"])
        .arg(folder.join("out"))
        .output()
        .unwrap();
    assert_eq!(output.stdout, b"behind it");
    fs::rename(folder.join("vm-s003.vmdk"), folder.join("away")).unwrap();
    folder.refuses(&["import", "vm.vmdk", "out2"], &["vm-s003.vmdk"]);
    // The part of another disk, and one that is shorter.
    fs::copy(folder.join("vm-s001.vmdk"), folder.join("vm-s003.vmdk")).unwrap();
    folder.refuses(
        &["import", "vm.vmdk", "out3"],
        &["vm-s003.vmdk", "descriptor"],
    );
    folder.write_at("vm-s003.vmdk", 12, &8u64.to_le_bytes());
    folder.refuses(
        &["import", "vm.vmdk", "out3"],
        &["vm-s003.vmdk", "descriptor"],
    );
}

#[test]
fn a_vmdk_through_a_symbolic_link_is_found_and_one_that_leads_outside_is_refused() {
    needs!("qemu-img", "mke2fs");
    let folder = Folder::new();
    folder.marked("disk.raw", "marked");
    fs::create_dir(folder.join("vm")).unwrap();
    folder.convert("vmdk", "subformat=monolithicFlat", "disk.raw", "vm/vm.vmdk");
    symlink("vm/vm.vmdk", folder.join("link")).unwrap();
    folder.succeeds(&["import", "link", "out"]);
    assert!(folder.same("disk.raw", "out"));
    let text = fs::read(folder.join("vm/vm.vmdk")).unwrap();
    let text = String::from_utf8_lossy(&text)
        .trim_end_matches('\0')
        .to_owned();
    fs::rename(folder.join("vm/vm-flat.vmdk"), folder.join("secret")).unwrap();
    let absolute = folder.join("secret").display().to_string();
    for name in ["../secret", &absolute] {
        fs::write(
            folder.join("vm/vm.vmdk"),
            text.replace("vm-flat.vmdk", name),
        )
        .unwrap();
        folder.refuses(
            &["import", "vm/vm.vmdk", "out2"],
            &["outside", "--allow-outside"],
        );
    }
    folder.succeeds(&["import", "vm/vm.vmdk", "out2", "--allow-outside"]);
    assert!(folder.same("disk.raw", "out2"));
    // A link in the folder is a way out too.
    fs::write(folder.join("vm/vm.vmdk"), &text).unwrap();
    symlink("../secret", folder.join("vm/vm-flat.vmdk")).unwrap();
    folder.refuses(&["import", "vm/vm.vmdk", "out3"], &["outside"]);
    fs::write(
        folder.join("vm/vm.vmdk"),
        text.replace("vm-flat.vmdk", "nbd://127.0.0.1/x"),
    )
    .unwrap();
    folder.refuses(&["import", "vm/vm.vmdk", "out3"], &["no file name"]);
}

#[test]
fn qcow2_snapshots_are_named_and_imported_whole() {
    needs!("qemu-img", "mke2fs");
    let folder = Folder::new();
    folder.marked("disk.raw", "marked");
    folder.convert("qcow2", "", "disk.raw", "vm.qcow2");
    folder.run(
        "qemu-img",
        &["snapshot", "-c", "before the change", "vm.qcow2"],
    );
    folder.qemu_img("resize -q --shrink vm.qcow2 50M");
    folder.run(
        "qemu-io",
        &["-f", "qcow2", "-c", "write -P 7 20M 1M", "vm.qcow2"],
    );
    let said = folder.succeeds(&["import", "vm.qcow2", "out"]);
    assert!(
        said.contains("snapshots left out: \"before the change\""),
        "{said}"
    );
    assert_eq!(folder.len("out"), 50 << 20);
    let said = folder.succeeds(&[
        "import",
        "vm.qcow2",
        "old",
        "--snapshot",
        "before the change",
    ]);
    assert!(!said.contains("left out"), "{said}");
    assert!(folder.same("disk.raw", "old"));
    folder.succeeds(&["import", "vm.qcow2", "old", "--snapshot", "1", "--force"]);
    assert!(folder.same("disk.raw", "old"));
    folder.refuses(
        &["import", "vm.qcow2", "out2", "--snapshot", "other"],
        &["\"before the change\""],
    );
    folder.refuses(
        &["import", "disk.raw", "out2", "--snapshot", "other"],
        &["no snapshots"],
    );
    // With a backing file.
    folder.qemu_img("create -q -f qcow2 -F raw -b disk.raw top.qcow2");
    folder.qemu_img("snapshot -c one top.qcow2");
    folder.run(
        "qemu-io",
        &["-f", "qcow2", "-c", "write -P 7 20M 1M", "top.qcow2"],
    );
    folder.succeeds(&["import", "top.qcow2", "one", "--snapshot", "one"]);
    assert!(folder.same("disk.raw", "one"));
}

#[test]
fn backing_and_data_files_are_taken_from_the_images_folder_only() {
    needs!("qemu-img", "mke2fs");
    let folder = Folder::new();
    folder.marked("disk.raw", "marked");
    fs::create_dir(folder.join("vm")).unwrap();
    let vm = Folder(folder.join("vm"));
    vm.convert("qcow2", "", "../disk.raw", "base.qcow2");
    vm.qemu_img("create -q -f qcow2 -F qcow2 -b base.qcow2 mid.qcow2");
    vm.qemu_img("create -q -f qed -F qcow2 -b mid.qcow2 top.qed");
    // Not from the current folder.
    let said = folder.succeeds(&["import", "vm/top.qed", "out"]);
    assert!(
        folder.same("disk.raw", "out") && said.contains("on top of"),
        "{said}"
    );
    vm.qemu_img("rebase -u -F qcow2 -b gone.qcow2 mid.qcow2");
    folder.refuses(
        &["import", "vm/top.qed", "out2"],
        &["mid.qcow2", "gone.qcow2", "same folder"],
    );
    for name in ["../disk.raw", "/etc/hostname"] {
        vm.run(
            "qemu-img",
            &["rebase", "-u", "-F", "raw", "-b", name, "mid.qcow2"],
        );
        folder.refuses(
            &["import", "vm/top.qed", "out2"],
            &["outside", "--allow-outside"],
        );
    }
    for name in ["nbd://127.0.0.1:9/x", r#"json:{"driver":"null-co"}"#] {
        vm.run(
            "qemu-img",
            &["rebase", "-u", "-F", "raw", "-b", name, "mid.qcow2"],
        );
        folder.refuses(&["import", "vm/top.qed", "out2"], &["no file name"]);
    }
    vm.qemu_img("rebase -u -F qcow2 -b mid.qcow2 mid.qcow2");
    folder.refuses(&["import", "vm/mid.qcow2", "out2"], &["circle"]);
    fs::copy(folder.join("disk.raw"), folder.join("vm/data.raw")).unwrap();
    vm.qemu_img("create -q -f qcow2 -o data_file=data.raw,data_file_raw=on data.qcow2 104858112");
    fs::copy(folder.join("disk.raw"), folder.join("vm/data.raw")).unwrap();
    folder.succeeds(&["import", "vm/data.qcow2", "out", "--force"]);
    assert!(folder.same("disk.raw", "out"));
    fs::rename(folder.join("vm/data.raw"), folder.join("data.raw")).unwrap();
    folder.refuses(
        &["import", "vm/data.qcow2", "out2"],
        &["data file data.raw"],
    );
    std::mem::forget(vm);
}

#[test]
fn an_encrypted_disk_is_refused() {
    needs!("qemu-img");
    let folder = Folder::new();
    fs::write(folder.join("secret"), "secret").unwrap();
    for (format, name) in [("qcow2", "a.qcow2"), ("qcow", "a.qcow")] {
        let options = "encrypt.format=aes,encrypt.key-secret=s";
        let secret = ["create", "-q", "--object", "secret,id=s,file=secret"];
        folder.run(
            "qemu-img",
            &[&secret[..], &["-f", format, "-o", options, name, "1M"]].concat(),
        );
    }
    // Their headers alone: qemu-img measures the processor before it makes a key for LUKS, and gives
    // up ("Unable to get accurate CPU usage") where the machine is busy.
    folder.qemu_img("create -q -f qcow2 luks.qcow2 1M");
    folder.write_at("luks.qcow2", 32, &2u32.to_be_bytes());
    let mut container = vec![0; 1 << 20];
    container[..6].copy_from_slice(b"LUKS\xba\xbe");
    fs::write(folder.join("a.luks"), container).unwrap();
    for name in ["a.qcow2", "a.luks", "a.qcow", "luks.qcow2"] {
        folder.refuses(&["import", name, "out"], &[name, "encrypted"]);
    }
}

/// CRC-32C, as VHDX has it.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |mut crc, &byte| {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg());
        }
        crc
    })
}

/// Gives a VHDX a log with one entry, which writes the byte 7 into the guest's bytes 8192 to 12287,
/// as a host that lost its power leaves it.
fn with_log(path: &std::path::Path) {
    let mut file = fs::read(path).unwrap();
    let number = |file: &[u8], at: usize| u64::from_le_bytes(file[at..at + 8].try_into().unwrap());
    let headers = [64 << 10, 128 << 10];
    let newer = headers
        .into_iter()
        .max_by_key(|&at| number(&file, at + 8))
        .unwrap();
    let log = number(&file, newer + 72) as usize;
    // The first entry of the block table: the place of the first block in MiB, above 20 bits.
    let region = |index: usize| number(&file, (192 << 10) + 16 + index * 32 + 16) as usize;
    let table = region(0).max(region(1));
    let mut block = [region(0), region(1)]
        .map(|at| number(&file, at))
        .into_iter();
    let block = block
        .find(|&entry| entry & 7 == 6)
        .unwrap_or_else(|| panic!("no block at {table}"));
    let target = ((block >> 20) << 20) + 8192;
    let len = file.len() as u64;
    let id = [9; 16];
    let mut entry = vec![0; 8192];
    entry[..4].copy_from_slice(b"loge");
    entry[8..12].copy_from_slice(&8192u32.to_le_bytes());
    entry[16..24].copy_from_slice(&1u64.to_le_bytes());
    entry[24..28].copy_from_slice(&1u32.to_le_bytes());
    entry[32..48].copy_from_slice(&id);
    entry[48..56].copy_from_slice(&len.to_le_bytes());
    entry[56..64].copy_from_slice(&len.to_le_bytes());
    entry[64..68].copy_from_slice(b"desc");
    entry[68..80].fill(7);
    entry[80..88].copy_from_slice(&target.to_le_bytes());
    entry[88..96].copy_from_slice(&1u64.to_le_bytes());
    entry[4096..4100].copy_from_slice(b"data");
    entry[4104..8188].fill(7);
    entry[8188..].copy_from_slice(&1u32.to_le_bytes());
    let sum = crc32c(&entry);
    entry[4..8].copy_from_slice(&sum.to_le_bytes());
    file[log..log + 8192].copy_from_slice(&entry);
    let header = &mut file[newer..newer + 4096];
    header[48..64].copy_from_slice(&id);
    header[4..8].fill(0);
    let sum = crc32c(header);
    header[4..8].copy_from_slice(&sum.to_le_bytes());
    fs::write(path, file).unwrap();
}

#[test]
fn a_vhdx_with_a_log_is_imported_through_a_copy() {
    needs!("qemu-img", "mke2fs");
    let folder = Folder::new();
    folder.marked("disk.raw", "marked");
    folder.convert("vhdx", "", "disk.raw", "vm.vhdx");
    with_log(&folder.join("vm.vhdx"));
    let before = fs::read(folder.join("vm.vhdx")).unwrap();
    let said = folder.succeeds(&["import", "vm.vhdx", "out"]);
    assert!(said.contains("log was not written back"), "{said}");
    assert!(
        before == fs::read(folder.join("vm.vhdx")).unwrap(),
        "the image was changed"
    );
    folder.write_at("disk.raw", 8192, &[7; 4096]);
    assert!(folder.same("disk.raw", "out"));
}

fn bundle(images: &str) -> String {
    format!(
        "<?xml version=\"1.0\"?><Parallels_disk_image Version=\"1.0\"><Disk_Parameters>\
         <Disk_size>204801</Disk_size><Encryption><Engine/><Data/></Encryption></Disk_Parameters>\
         <StorageData><Storage><Start>0</Start><End>204801</End><Blocksize>2048</Blocksize>\
         {images}</Storage></StorageData></Parallels_disk_image>"
    )
}

fn bundle_image(kind: &str, file: &str) -> String {
    format!("<Image><GUID>{{5}}</GUID><Type>{kind}</Type><File>{file}</File></Image>")
}

#[test]
fn a_parallels_bundle_of_one_image_is_read() {
    needs!("qemu-img", "mke2fs");
    let folder = Folder::new();
    folder.marked("disk.raw", "marked");
    fs::create_dir(folder.join("vm.hdd")).unwrap();
    folder.convert("parallels", "", "disk.raw", "vm.hdd/vm.hdd.0.hds");
    let describe = |images: &str| {
        fs::write(folder.join("vm.hdd/DiskDescriptor.xml"), bundle(images)).unwrap();
    };
    describe(&bundle_image("Compressed", "vm.hdd.0.hds"));
    let said = folder.succeeds(&["import", "vm.hdd"]);
    assert!(
        folder.same("disk.raw", "vm.raw") && said.contains("bundle"),
        "{said}"
    );
    fs::copy(folder.join("disk.raw"), folder.join("vm.hdd/plain")).unwrap();
    describe(&bundle_image("Plain", "plain"));
    folder.succeeds(&["import", "vm.hdd", "out"]);
    assert!(folder.same("disk.raw", "out"));
    folder.cut("vm.hdd/plain", 512);
    folder.refuses(&["import", "vm.hdd", "out2"], &["plain: is truncated"]);
    describe(&bundle_image("Plain", "../disk.raw"));
    folder.refuses(&["import", "vm.hdd", "out2"], &["outside"]);
    describe(&bundle_image("Compressed", "gone.hds"));
    folder.refuses(&["import", "vm.hdd", "out2"], &["gone.hds"]);
    let two = bundle_image("Compressed", "vm.hdd.0.hds") + &bundle_image("Compressed", "other.hds");
    describe(&two);
    folder.refuses(&["import", "vm.hdd", "out2"], &["2 images", "snapshots"]);
    fs::write(folder.join("vm.hdd/DiskDescriptor.xml"), "<a><b></a>").unwrap();
    folder.refuses(&["import", "vm.hdd", "out2"], &["not valid XML"]);
    let cipher = bundle("").replace("<Engine/>", "<Engine>{1}</Engine>");
    fs::write(folder.join("vm.hdd/DiskDescriptor.xml"), cipher).unwrap();
    folder.refuses(&["import", "vm.hdd", "out2"], &["encrypted"]);
}

#[test]
fn a_gpt_whose_backup_is_not_at_the_end_is_reported_and_mended() {
    needs!("mke2fs", "sfdisk", "sgdisk");
    let folder = Folder::new();
    folder.marked("disk.raw", "marked");
    let script =
        "printf 'label: gpt\\nstart=2048,size=81920,name=\"root part\"\\n' | sfdisk -q disk.raw";
    folder.run("sh", &["-c", script]);
    let said = folder.succeeds(&["import", "disk.raw", "out"]);
    assert!(
        said.contains("GPT, 1 partitions\n") && said.contains("\"root part\""),
        "{said}"
    );
    assert!(said.contains("knows MBR"), "{said}");
    let file = fs::File::options()
        .write(true)
        .open(folder.join("disk.raw"))
        .unwrap();
    file.set_len(120 << 20).unwrap();
    let said = folder.succeeds(&["import", "disk.raw", "out", "--force"]);
    assert!(
        said.contains("backup is at sector 204800") && said.contains("--mend-gpt"),
        "{said}"
    );
    assert!(folder.same("disk.raw", "out"));
    folder.succeeds(&["import", "disk.raw", "out", "--force", "--mend-gpt"]);
    let said = folder.run("sgdisk", &["--verify", "out"]);
    assert!(said.contains("No problems found"), "{said}");
    assert_eq!(folder.mark("out", "/etc/mark"), "marked");
    // Only the backup is left, and only the first one.
    folder.write_at("out", 512, &[0; 512]);
    let said = folder.succeeds(&["import", "out", "again", "--mend-gpt"]);
    assert!(said.contains("only its backup is valid"), "{said}");
    assert!(
        folder
            .run("sgdisk", &["--verify", "again"])
            .contains("No problems found")
    );
    file.set_len(100 << 20).unwrap();
    let said = folder.succeeds(&["import", "disk.raw", "cut", "--mend-gpt"]);
    assert!(said.contains("backup is missing"), "{said}");
    assert!(
        folder
            .run("sgdisk", &["--verify", "cut"])
            .contains("No problems found")
    );
    file.set_len(41 << 20).unwrap();
    folder.refuses(
        &["import", "disk.raw", "cut2", "--mend-gpt"],
        &["partition 1 reaches"],
    );
}

#[test]
fn file_systems_and_partitions_are_named() {
    needs!("mke2fs", "mkfs.vfat", "mkswap", "mkfs.erofs", "sfdisk");
    let folder = Folder::new();
    let blank = |name: &str| {
        let file = fs::File::create(folder.join(name)).unwrap();
        file.set_len(40 << 20).unwrap();
    };
    fs::create_dir(folder.join("content")).unwrap();
    fs::write(folder.join("content/file"), "x").unwrap();
    let made: &[(&str, &str)] = &[
        (
            "mke2fs -q -t ext2 -L two fs",
            "the whole disk: ext2 \"two\"",
        ),
        ("mke2fs -q -t ext3 fs", "the whole disk: ext3"),
        ("mke2fs -q -t ext4 fs", "the whole disk: ext4"),
        (
            "mkfs.vfat -F 32 -n THIRTYTWO fs",
            "the whole disk: vfat \"THIRTYTWO\"",
        ),
        (
            "mkfs.vfat -F 16 -n SIXTEEN fs",
            "the whole disk: vfat \"SIXTEEN\"",
        ),
        ("mkswap -q -L paging fs", "the whole disk: swap \"paging\""),
        ("mkfs.erofs --quiet fs content", "the whole disk: erofs"),
        (
            "mkfs.erofs --quiet -zlz4 fs content",
            "the whole disk: erofs",
        ),
        (
            "mkfs.erofs --quiet -zlz4 -Elegacy-compress fs content",
            "the whole disk: erofs",
        ),
    ];
    for (command, expected) in made {
        blank("fs");
        folder.run("sh", &["-c", command]);
        let said = folder.succeeds(&["import", "fs", "out", "--force"]);
        assert!(said.contains(&format!("{expected}\n")), "{command}: {said}");
        let is_beyond_small_kernel = said.contains("knows MBR");
        assert_eq!(is_beyond_small_kernel, command.contains("-zlz4"), "{said}");
    }
    // By their magic numbers alone: not every host has the programs.
    let magic: &[(u64, &[u8], &str)] = &[
        (0, b"XFSB", "xfs"),
        (0x10040, b"_BHRfS_M", "btrfs"),
        (3, b"NTFS    ", "ntfs"),
        (0, b"hsqs", "squashfs"),
        (536, b"LVM2 001", "LVM physical volume"),
        (0x8001, b"CD001", "iso9660"),
    ];
    for (at, bytes, expected) in magic {
        blank("fs");
        folder.write_at("fs", *at, bytes);
        let said = folder.succeeds(&["import", "fs", "out", "--force"]);
        assert!(
            said.contains(&format!("the whole disk: {expected}\n")),
            "{said}"
        );
    }
    // Logical partitions, one of which is encrypted, and a file system that was cut.
    blank("fs");
    let script = "printf 'label: dos\\nstart=2048,size=8192,type=83\\nstart=10240,size=61440,type=5\\n\
                  start=12288,size=8192,type=83\\nstart=24576,size=8192,type=82\\n' | sfdisk -q fs";
    folder.run("sh", &["-c", script]);
    folder.write_at("fs", 24576 * 512, b"LUKS\xba\xbe");
    folder.run("sh", &["-c", "mke2fs -q -t ext4 part 20M && dd if=part of=fs bs=1M seek=6 count=1 conv=notrunc status=none"]);
    let said = folder.succeeds(&["import", "fs", "out", "--force"]);
    for words in [
        "MBR, 3 partitions",
        "partition 1: 4 MiB at 1 MiB: no known file system",
        "partition 5: 4 MiB at 6 MiB: ext4 (of 20 MiB, which is more than there is: truncated)",
        "partition 6: 4 MiB at 12 MiB: LUKS (encrypted)",
        "root=/dev/vda5",
    ] {
        assert!(said.contains(words), "{words}: {said}");
    }
}
