//! Disks of other hypervisors in a guest: imported by `tools/guest`, booted from, read, written,
//! exported and read back. Linux boots once, with a disk of every format.

mod common;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::process::Command;

use common::{Folder, LINUX_PATIENCE, Monitor, needs};

/// Format of `export`, of qemu-img, and its options. VMDK as in an OVA is the root disk's.
const FORMATS: &[(&str, &str, &str)] = &[
    ("vmdk", "vmdk", "subformat=monolithicSparse"),
    ("vmdk-stream", "vmdk", "subformat=twoGbMaxExtentFlat"),
    ("vhd", "vpc", "force_size=on"),
    ("vhd-fixed", "vpc", "subformat=fixed,force_size=on"),
    ("vhdx", "vhdx", ""),
    ("vdi", "vdi", ""),
    ("parallels", "parallels", ""),
    ("qcow2", "qcow2", ""),
    // Only the way in exists for these.
    ("qcow2", "qcow", ""),
    ("qcow2", "qed", ""),
];

/// What the guest runs: reads the mark of each disk, and writes one.
const CHECK: &str = r#"
for disk in /dev/vd[b-z]1; do
    mount -t ext4 $disk /mnt && read -r mark </mnt/mark && echo "check: $disk holds $mark" &&
        echo "written through $disk" >/mnt/written && umount /mnt || echo "check: $disk failed"
done
echo "check: done as process $$ of $A"
"#;

/// Runs a program in the folder, which must succeed.
fn run(folder: &Folder, program: &str, args: &[&str]) -> String {
    let path = std::env::var("PATH").unwrap() + ":/usr/sbin:/sbin";
    let mut command = Command::new(program);
    command
        .args(args)
        .current_dir(folder.path())
        .env("PATH", path);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{program} {args:?}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn guest(folder: &Folder, args: &[&str]) -> String {
    let tool = common::root().join("tools/guest");
    run(folder, tool.to_str().unwrap(), args)
}

/// A disk with one partition, which is `image`.
fn partitioned(folder: &Folder, image: &str, disk: &str) {
    let content = fs::read(folder.join(image)).unwrap();
    let sectors = content.len() as u32 / 512;
    let file = File::create(folder.join(disk)).unwrap();
    file.set_len((1 << 20) + content.len() as u64 + 512)
        .unwrap();
    let mut table = [0; 512];
    table[446 + 4] = 0x83;
    table[446 + 8..446 + 12].copy_from_slice(&2048u32.to_le_bytes());
    table[446 + 12..446 + 16].copy_from_slice(&sectors.to_le_bytes());
    table[510..].copy_from_slice(&[0x55, 0xaa]);
    file.write_all_at(&table, 0).unwrap();
    file.write_all_at(&content, 1 << 20).unwrap();
}

/// Content of a file in the partition of a raw disk.
fn cat(folder: &Folder, disk: &str, path: &str) -> String {
    let place = format!("{disk}?offset=1048576");
    run(folder, "debugfs", &["-R", &format!("cat {path}"), &place])
}

/// A container image as `docker save` writes it, whose command is [`CHECK`], becomes the root disk
/// `root.ext4`.
fn root_disk(folder: &Folder) {
    let top = folder.join("image/1");
    fs::create_dir_all(top.join("bin")).unwrap();
    fs::create_dir_all(top.join("mnt")).unwrap();
    fs::copy("/bin/busybox", top.join("bin/busybox")).unwrap();
    for applet in [
        "sh", "mount", "umount", "sync", "reboot", "mkdir", "hostname",
    ] {
        symlink("busybox", top.join("bin").join(applet)).unwrap();
    }
    fs::write(top.join("check"), format!("#!/bin/sh\n{CHECK}")).unwrap();
    fs::set_permissions(top.join("check"), fs::Permissions::from_mode(0o755)).unwrap();
    run(
        folder,
        "tar",
        &[
            "-C",
            "image/1",
            "--owner=0",
            "--group=0",
            "-cf",
            "image/layer.tar",
            ".",
        ],
    );
    let config = r#"{"os":"linux","architecture":"amd64","config":{"Entrypoint":["/check"],"Env":["A=an image"]}}"#;
    fs::write(folder.join("image/config.json"), config).unwrap();
    let manifest = r#"[{"Config":"config.json","RepoTags":["check:1"],"Layers":["layer.tar"]}]"#;
    fs::write(folder.join("image/manifest.json"), manifest).unwrap();
    run(
        folder,
        "tar",
        &[
            "-C",
            "image",
            "-cf",
            "image.tar",
            "layer.tar",
            "config.json",
            "manifest.json",
        ],
    );
    let said = guest(folder, &["rootfs", "image.tar", "root.ext4"]);
    assert!(said.contains("init=/sbin/mayfly-init"), "{said}");
}

#[test]
fn linux_boots_from_an_imported_disk_and_reads_and_writes_one_of_every_format() {
    needs!(
        kvm,
        root,
        guest,
        "qemu-img",
        "mke2fs",
        "debugfs",
        "faked-sysv",
        "busybox"
    );
    let folder = Folder::new();

    // The root disk comes as an appliance.
    root_disk(&folder);
    partitioned(&folder, "root.ext4", "root.made");
    let options = ["-o", "subformat=streamOptimized", "root.made", "root.vmdk"];
    run(
        &folder,
        "qemu-img",
        &[&["convert", "-f", "raw", "-O", "vmdk"], &options[..]].concat(),
    );
    fs::write(folder.join("vm.ovf"), "<Envelope/>").unwrap();
    run(&folder, "tar", &["cf", "vm.ova", "vm.ovf", "root.vmdk"]);
    let said = guest(&folder, &["import", "vm.ova", "root"]);
    assert!(said.contains("root=/dev/vda1 rw"), "{said}");

    let mut drives = Vec::new();
    for (index, (_, format, options)) in FORMATS.iter().enumerate() {
        let (mark, made, foreign) = (
            format!("mark-{index}"),
            "made",
            format!("vm.{index}.{format}"),
        );
        fs::create_dir_all(folder.join("content")).unwrap();
        fs::write(folder.join("content/mark"), format!("{mark}\n")).unwrap();
        let features = "^has_journal,^metadata_csum";
        run(
            &folder,
            "mke2fs",
            &[
                "-q", "-F", "-t", "ext4", "-O", features, "-d", "content", "fs", "4M",
            ],
        );
        partitioned(&folder, "fs", made);
        let mut args = vec!["convert", "-f", "raw", "-O", format];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        run(
            &folder,
            "qemu-img",
            &[&args[..], &[made, &foreign]].concat(),
        );
        let disk = format!("disk.{index}");
        guest(&folder, &["import", &foreign, &disk]);
        drives.push(format!("--drive {}", folder.join(&disk).display()));
    }

    // The command that import printed, with the init that the disk has, and the other disks.
    let command = said.lines().last().unwrap().trim().to_owned();
    assert!(command.contains("init=/sbin/init'"), "{command}");
    let command = command.replace("init=/sbin/init'", "init=/sbin/mayfly-init'");
    let command = format!(
        "{command} --mayfly {} {}",
        common::mayfly().display(),
        drives.join(" ")
    );
    let jailer = common::jailer();
    let mut shell = Command::new("sh");
    shell
        .args(["-c", &format!("exec {command}")])
        .current_dir(folder.path());
    let path = std::env::var("PATH").unwrap();
    shell.env(
        "PATH",
        format!("{}:{path}", jailer.parent().unwrap().display()),
    );
    let mut monitor = Monitor::spawn(shell);
    monitor.expect_within("check: done", LINUX_PATIENCE);
    let status = monitor.wait_within(LINUX_PATIENCE);
    let output = monitor.stdout();
    assert!(status.success(), "{status}: {output}");
    assert!(output.contains("of an image"), "{output}");

    for (index, (format, ..)) in FORMATS.iter().enumerate() {
        let device = format!("/dev/vd{}1", char::from(b'b' + index as u8));
        assert!(
            output.contains(&format!("check: {device} holds mark-{index}")),
            "{output}"
        );
        let (disk, out, back) = (
            format!("disk.{index}"),
            format!("out.{index}"),
            format!("back.{index}"),
        );
        guest(&folder, &["export", &disk, &out, "--format", format]);
        guest(&folder, &["import", &out, &back]);
        assert_eq!(
            cat(&folder, &back, "/written"),
            format!("written through {device}\n")
        );
        run(&folder, "cmp", &[&disk, &back]);
    }
}

#[test]
fn tools_guest_passes_disks_commands_on_with_their_exit_codes() {
    let folder = Folder::new();
    let tool = common::root().join("tools/guest");
    let ended = |args: &[&str]| {
        let output = Command::new(&tool)
            .args(args)
            .current_dir(folder.path())
            .output()
            .unwrap();
        (
            output.status.code().unwrap(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    };
    let (code, messages) = ended(&["import", "no such file"]);
    assert!(
        code == 1 && messages.contains("no such file: cannot open it"),
        "{code} {messages}"
    );
    assert_eq!(ended(&["export", "--help"]).0, 0);
    assert_eq!(ended(&["rootfs", "--no-such-option"]).0, 2);
    assert!(fs::read_dir(folder.path()).unwrap().next().is_none());
}
